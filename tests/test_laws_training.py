"""What a training writes of itself, where it stands, how its weights move, and what its weights say of it."""

from __future__ import annotations

import copy
import csv
import ctypes
import json
import math
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from feed_store import Pipeline
from spies import CONFIG, Alone

from fastsrgan.core.ranks import Ranks
from fastsrgan.data import dali, feed, settings_check
from fastsrgan.data.subject import PatchRule
from fastsrgan.data.visit import Visits
from fastsrgan.errors import InputError, ModelError, ResourceError
from fastsrgan.model import checkpoint
from fastsrgan.model.arithmetic import Arithmetic
from fastsrgan.model.networks import CriticSpec
from fastsrgan.observation.model import Degradation, Degraded
from fastsrgan.train import loop, precision, snapshots, validate
from fastsrgan.train import run as train_run
from fastsrgan.train.gan import Models
from fastsrgan.train.logs import Board, RunLog
from fastsrgan.train.optimise import Optimiser, grouped
from fastsrgan.train.state import Position, Run, Turn, data_identity

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def notes(caplog):
    """Not warnings alone."""
    caplog.set_level("INFO", logger="fastsrgan")


# --- log and tables ---------------------------------------------------------------------------------------------------


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_tables_have_a_row_for_each_epoch_and_the_last_word_of_it(tmp_path):
    """Dice of every name in one, MSE in the other, where they were asked for; an epoch that came twice is one row."""
    log = RunLog(tmp_path, tmp_path / "d" / "dice.csv", tmp_path / "m" / "mse.csv")
    scores = {"Dice_label_1": 0.5, "Dice_mask0": 0.25, "MSE": 0.125, "PSNR": 30.0}
    for epoch, dice in ((1, 0.5), (2, 0.75), (10, 0.25), (2, 0.625)):
        log.epoch(epoch, scores | {"Dice_label_1": dice})
    log.epoch(11, {"PSNR": 31.0})  # whole volumes alone
    dices = {"1": "0.5", "10": "0.25", "2": "0.625"}
    assert table(log.dice_file) == [{"": e, "Dice_label_1": d, "Dice_mask0": "0.25"} for e, d in dices.items()]
    assert table(log.mse_file) == [{"": e, "MSE": "0.125"} for e in dices]
    assert [row["epoch"] for row in log.validations()] == [1, 2, 10, 2, 11]


def test_a_run_that_goes_on_forgets_what_lies_behind_its_snapshot(tmp_path):
    """Updates behind it, validations of its epoch and of later ones, half a line of a killed process; of the tables,
    rows of these epochs and the empty ones that the original writes."""
    log = RunLog(tmp_path)
    for epoch, updates in ((1, (1, 2)), (2, (3, 4)), (3, (5, 6))):
        for update in updates:
            log.step(epoch, update, 0.5, 0.25, {"g_total": 1.0})
        log.epoch(epoch, {"Dice": epoch / 10, "MSE": 0.5}, "lost" if epoch == 1 else "")
    with open(log.path, "a", encoding="utf8") as file:
        file.write('{"epoch": 3, "upd')
    log.mse_file.write_text(",MSE\n1,0.5\n2,\n3,0.5\nx,0.5\n", encoding="utf8")
    log.cut(5, 3)
    rows = [json.loads(line) for line in log.path.read_text(encoding="utf8").splitlines()]
    assert [(row["epoch"], row.get("update")) for row in rows] == [
        (1, 1), (1, 2), (1, None), (2, 3), (2, 4), (2, None), (3, 5)
    ]  # fmt: skip
    assert rows[0] == {"epoch": 1, "update": 1, "seconds": 0.5, "data_wait_seconds": 0.25, "g_total": 1.0}
    assert rows[2] == {"epoch": 1, "validation": {"Dice": 0.1, "MSE": 0.5}, "warning": "lost"}
    assert "warning" not in rows[5]
    assert [row[""] for row in table(log.dice_file)] == ["1", "2"] and table(log.mse_file) == [{"": "1", "MSE": "0.5"}]


class Writer:
    """In place of TensorBoard's."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.events = [(folder, purge_step)]

    def __getattr__(self, name):
        return lambda *args, **more: self.events.append((name, *args, *more.values()))


def test_a_board_hides_what_a_process_before_wrote_from_its_first_update_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    board = Board(tmp_path, 7)
    board.scalars("train", {"a": 1.0, "b": 2.0}, 8)
    board.picture("panel", torch.tensor([[-1.0, 0.5], [0.25, 3.0]]), 9)
    board.flush()
    board.close()
    first, a, b, picture, *ends = board.writer.events
    assert first == (str(tmp_path / "tensorboard"), 7) and [a, b] == [
        ("add_scalar", "train/a", 1.0, 8), ("add_scalar", "train/b", 2.0, 8)
    ]  # fmt: skip
    assert picture[:2] == ("add_image", "panel") and picture[2].tolist() == [[0, 0.5], [0.25, 1]]
    assert picture[3:] == (9, "HW") and ends == [("flush",), ("close",)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ResourceError, match="tensorboard: is not installed"):
        Board(tmp_path, 1)


# --- where a run stands -----------------------------------------------------------------------------------------------


def test_a_position_counts_the_updates_of_its_epoch():
    at = Position(epoch=3, group=1, step=4, steps=6, updates=20, epoch_updates=5, left=["a"], before=0.5, stale=2)
    at.next_group()
    assert (at.group, at.step, at.steps, at.epoch_updates, at.updates) == (2, 0, 0, 9, 20) and at.left == ["a"]
    at.next_epoch()
    assert (at.epoch, at.group, at.epoch_updates, at.left, at.before) == (4, 0, 0, None, 0.0)
    assert at.updates == 20 and at.stale == 2


def run_at(position: Position, **more) -> Run:
    made = {"folder": Path("run"), "config": CONFIG.replace(epochs=3), "store": None, "models": None, "test": []}
    made |= {"feed": SimpleNamespace(seed=3), "train": list("abcdef"), "mask_classes": 0, "position": position}
    return Run(**made | more)


def test_what_is_left_of_a_run_are_the_groups_that_are_not_done():
    """Of a new run all of all epochs; of one that goes on those of its epoch from its group on; what waits for its
    validation alone is an empty group."""
    whole = run_at(Position(resident=2)).plan()
    assert [(turn.epoch, turn.group, turn.groups) for turn in whole] == [(e, g, 3) for e in (1, 2, 3) for g in range(3)]
    for epoch in (1, 2, 3):
        assert sorted(name for turn in whole if turn.epoch == epoch for name in turn.subjects) == list("abcdef")
    assert run_at(Position(epoch=2, group=1, resident=2)).plan() == whole[4:]
    waiting = run_at(Position(epoch=2, group=3, resident=2)).plan()
    assert waiting == [Turn(2, 3, 4, []), *whole[6:]]
    some = run_at(Position(epoch=2, resident=2, left=list("abc"))).plan()
    assert sorted(name for turn in some[:2] for name in turn.subjects) == list("abc") and some[2:] == whole[6:]
    assert run_at(Position(epoch=3, left=[])).plan() == [Turn(3, 0, 1, [])]
    assert [turn.subjects for turn in run_at(Position()).plan()[:6]] != [turn.subjects for turn in whole[:6]]
    later = run_at(Position(), config=CONFIG.replace(epochs=5, init_epoch=4), ranks=Alone(1, 2))
    assert later.beginning == Position(epoch=4, world=2) and later.last_epoch == 5 and not later.first


def subject(**change) -> SimpleNamespace:
    facts = {"id": "a", "split": "Train", "shape": (4, 5, 6), "affine": np.eye(4), "arrays": {"image": "x"}}
    return SimpleNamespace(**facts | {"files": {"image": "sum"}} | change)


def test_data_are_known_by_all_that_the_manifest_says_of_every_subject():
    changes = [
        {"id": "b"}, {"split": "Test"}, {"shape": (4, 5, 7)}, {"affine": np.diag([1, 1, 2, 1.0])},
        {"arrays": {"image": "y"}}, {"files": {"image": "other"}},
    ]  # fmt: skip
    found = {data_identity(SimpleNamespace(subjects=[subject(**change), subject()])) for change in ({}, *changes)}
    assert len(found) == 1 + len(changes)
    assert data_identity(SimpleNamespace(subjects=[subject()])) == data_identity(SimpleNamespace(subjects=[subject()]))


@pytest.mark.parametrize(("world", "left"), [(1, 4), (2, 4), (5, 0)])
def test_what_is_left_of_an_epoch_is_dealt_to_the_ranks_there_are_now(world, left, caplog):
    """One of six groups is done and the next begun: its subject comes again, its updates count. Where fewer subjects
    are left than there are ranks they wait for the next epoch, which is told."""
    run = run_at(Position(), ranks=Alone(0, world), train=list("abcde"))
    at = Position(epoch=2, group=1, step=2, steps=4, updates=9, epoch_updates=5, resident=1)
    done = feed.deal(list("abcde"), 3, 2, 1, 0, 1)[0]
    snapshots.redeal(run, at)
    assert at.left == ([name for name in "abcde" if name not in done] if left else [])
    assert at.before == pytest.approx(1.5 / 5) and (at.epoch_updates, at.updates) == (7, 9)
    assert (at.group, at.step, at.steps, at.resident, at.world) == (0, 0, 0, None, world)
    assert ("4 subjects left for 5 ranks wait for the next epoch" in caplog.text) == (not left)


def test_a_state_is_tensors_and_plain_values_alone(tmp_path):
    state = {"models": {"a": torch.ones(2)}, "position": {"epoch": 3}, "data": "x"}
    torch.save(state, tmp_path / "state.pt")
    assert snapshots.read_state(tmp_path, "cpu")["position"] == {"epoch": 3}
    assert bytes(snapshots.packed(state))[:2] == b"PK"
    for wrong, told in ((Path("x"), "is damaged or holds more"), ({"models": {}, "data": ""}, "by another version")):
        torch.save(wrong, tmp_path / "state.pt")
        with pytest.raises(ModelError, match=told):
            snapshots.read_state(tmp_path, "cpu")
    (tmp_path / "state.pt").write_bytes(b"PK")
    with pytest.raises(ModelError, match="is damaged or holds more"):
        snapshots.read_state(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("recorded", "kept"),
    [
        (
            {"precision": "bf16", "layer_forms": {"mode": "measured", "forms": {"a": "b", "c": 3}}},
            ("bf16", "measured", {"a": "b"}),
        ),
        ({"precision": "fp32", "layer_forms": {"mode": "fixed"}}, ("fp32", "fixed", {})),
        ({"precision": "int8", "layer_forms": {"mode": "fixed"}}, (None, "fixed", {})),
        ({"precision": "bf16", "layer_forms": {"mode": "fastest"}}, (None, "fixed", {})),
        ({"precision": "bf16"}, (None, "fixed", {})),
        (None, (None, "fixed", {})),
    ],
)
def test_a_run_goes_on_as_its_newest_whole_snapshot_computed(tmp_path, recorded, kept):
    for step, facts in ((1, recorded), (2, {"precision": "fp16", "layer_forms": {"mode": "measured"}})):
        folder = checkpoint.write(
            tmp_path, step, {"a": lambda path: path.write_text("x")}, {} if facts is None else {"arithmetic": facts}
        )
    assert snapshots.kept_arithmetic(tmp_path) == ("fp16", "measured", {})
    (folder / "a").unlink()
    assert snapshots.kept_arithmetic(tmp_path) == kept
    assert snapshots.kept_arithmetic(tmp_path / "none") == (None, "fixed", {})


# --- how weights move -------------------------------------------------------------------------------------------------


def stepped(clip: float, gradient: float, loss: float = 1.0) -> tuple[dict, torch.Tensor, Optimiser]:
    """What a step of one weight vector of three says, and how far it moves. Adam's eps is large, so that its movement
    follows the gradient's size."""
    network = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    optimiser = Optimiser(network, 1.0, (0.0, 0.0), 1e6, clip=clip)
    network.weight.grad = torch.full((1, 3), gradient)
    optimiser.send(torch.tensor(loss))
    told = optimiser.step()
    return told, -1e6 * network.weight.detach(), optimiser


def test_gradients_are_clipped_to_a_norm_that_is_told_as_it_was():
    for clip, gradient, seen in (
        (0.0, 4.0, 4.0),
        (3.0, 1.0, 1.0),
        (3.0, 4.0, math.sqrt(3)),
        (3.0, -4.0, -math.sqrt(3)),
    ):
        told, moved, optimiser = stepped(clip, gradient)
        assert float(told["gradient"]) == pytest.approx(abs(gradient) * math.sqrt(3)) and told["skipped"] == 0
        assert moved.flatten().tolist() == pytest.approx([seen] * 3, rel=2e-5)  # found: 4e-6
        assert all(p.grad is None for p in optimiser.parameters) and optimiser._sent == []


@pytest.mark.parametrize(("gradient", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_what_is_not_finite_moves_nothing(gradient, loss):
    told, moved, optimiser = stepped(0.0, gradient, loss)
    assert told["skipped"] == 1 and not moved.any() and "overflow" not in told
    assert all(not state["exp_avg"].any() for state in optimiser.adam.state.values())


def test_gradients_travel_in_four_groups_the_last_layers_first_and_the_smallest_last():
    parameters = [torch.zeros(n) for n in (1, 10, 20, 20, 30, 30, 50)]
    groups = grouped(parameters)
    assert [id(p) for group in groups for p in group] == [id(p) for p in reversed(parameters)]
    sizes = [sum(p.numel() for p in group) for group in groups]
    assert sizes == [50, 60, 50, 1] and all(size >= 161 / 4 for size in sizes[:-1])
    assert len(grouped([torch.zeros(5)])) == 1


def test_a_rate_is_a_share_of_the_first_and_moments_are_taken_over():
    network = torch.nn.Linear(3, 1, bias=False)
    one = Optimiser(network, 0.5, (0.5, 0.9), 1e-8)
    for _ in range(2):
        network.weight.grad = torch.ones(1, 3)
        one.send(torch.ones(()))
        one.step()
    one.set_rate(0.25)
    one.set_rate(0.5)
    assert one.adam.param_groups[0]["lr"] == 0.25
    other = Optimiser(torch.nn.Linear(3, 1, bias=False), 0.5, (0.25, 0.75), 1e-8)
    other.load_state(copy.deepcopy(one.state()))
    (mine,), (its,) = one.adam.state.values(), other.adam.state.values()
    assert its["step"] == 2 and all(torch.equal(mine[k], its[k]) for k in ("exp_avg", "exp_avg_sq"))
    assert other.adam.param_groups[0]["betas"] == (0.25, 0.75)


def test_tf32_and_the_layout_are_for_cuda_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    asked = CONFIG.replace(tf32=True, layout="channels_last", precision="fp32")
    assert precision.choose(asked, CPU) == Arithmetic(CPU)
    assert precision.choose(asked, torch.device("cuda")) == Arithmetic(
        torch.device("cuda"), channels_last=True, tf32=True
    )


def test_an_arithmetic_says_what_it_is_in_settings_and_what_needs_a_scale():
    for dtype, name, scaled in (
        (torch.float32, "fp32", False),
        (torch.bfloat16, "bf16", False),
        (torch.float16, "fp16", True),
    ):
        made = Arithmetic(CPU, dtype)
        assert (made.name, made.scaled, made.proven) == (name, scaled, dtype == torch.float32)
        with made.autocast():
            assert torch.is_autocast_enabled("cpu") == (dtype != torch.float32)
    assert not Arithmetic(torch.device("cuda")).proven


# --- snapshots and weights --------------------------------------------------------------------------------------------


def test_files_of_the_originals_form_are_known_by_their_epoch():
    names = {"SegSRGAN_epoch_7": 7, "SegSRGAN_epoch_120": 120, "SegSRGAN_epoch_07": None, "SegSRGAN_epoch_0": None}
    names |= {"7": None, "SegSRGAN_epoch_": None, "SegSRGAN_epoch_7.h5": None, "x_SegSRGAN_epoch_7": None}
    assert {name: snapshots.epoch_of(Path("keras") / name) for name in names} == names


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A run of tiny networks that stands at update 5, and what its snapshots are given."""
    given = SimpleNamespace(writes=[], prunes=[])
    monkeypatch.setattr(snapshots, "data_identity", lambda store: "data")
    monkeypatch.setattr(snapshots, "said_of", lambda run: {"made_for": {"ages": "adults"}})
    monkeypatch.setattr(snapshots.checkpoint, "write", lambda *args: given.writes.append(args))
    monkeypatch.setattr(snapshots.checkpoint, "prune", lambda *args: given.prunes.append(args))
    run = run_at(
        Position(epoch=2, updates=5), folder=tmp_path, models=Models(CONFIG.replace(ema=0.5, precision="fp32"), 0, CPU),
        snapshot_folder=tmp_path / "keras",
    )  # fmt: skip
    return run, given


def test_a_snapshot_is_of_the_first_rank_and_says_where_and_how_the_run_computes(training, tmp_path):
    run, given = training
    snapshots.save(run)
    ((folder, updates, writers, facts),) = given.writes
    assert (folder, updates, list(writers)) == (tmp_path, 5, ["model.safetensors", "state.pt", "config.yaml"])
    assert (facts["epoch"], facts["ranks"], facts["arithmetic"]["precision"]) == (2, 1, "fp32")
    assert set(facts["arithmetic"]["layer_forms"]) == {"mode", "forms"}
    assert given.prunes == [(tmp_path, run.config.keep_checkpoints)]
    run.ranks = Alone(1, 2)
    for write in (
        snapshots.save,
        lambda r: snapshots.export(r, 3),
        lambda r: snapshots.write_weights(r, tmp_path / "w", {}),
    ):
        write(run)
    assert len(given.writes) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("network", ["generator", "critic"])
def test_weights_that_are_not_finite_are_no_snapshot(training, network):
    run, given = training
    with torch.no_grad():
        list(getattr(run.models, network).parameters())[-1].view(-1)[-1] = math.inf
    with pytest.raises(ResourceError, match="after 5 updates the weights are not finite, so no snapshot"):
        snapshots.save(run)
    assert not given.writes


def test_weights_for_use_say_when_and_with_which_settings_they_were_made(training, tmp_path):
    run, _ = training
    snapshots.write_weights(run, tmp_path / "w.safetensors", {"epoch": 3, "PSNR": 30.5})
    card = snapshots.modelfile.read_header(tmp_path / "w.safetensors").card
    assert (card["epoch"], card["PSNR"], card["updates"], card["made_for"]) == (3, 30.5, 5, {"ages": "adults"})
    assert card["config"] == json.loads(json.dumps(run.config.to_dict())) and card["torch"] == torch.__version__


def test_a_critic_of_other_layers_is_refused_with_the_settings_that_fit_it(tmp_path):
    folder = tmp_path / "checkpoints" / "step-1"
    snapshots.check_critic(folder, CriticSpec(4, 16), CriticSpec(4, 16))
    with pytest.raises(ModelError) as error:
        snapshots.check_critic(folder, CriticSpec(4, 16), CriticSpec(8, 64))
    assert (
        error.value.hint
        == f"resume with --patch-size 16 --kernel-dis 4, or start anew in another folder with -w {tmp_path}"
    )
    assert "kernel 4" in error.value.reason and "kernel 8" in error.value.reason


def test_weights_know_the_bounds_of_what_was_drawn_and_of_the_training_subjects_alone():
    """Sizes over all bounds, ratios of each; a structure of tissues counts its values."""

    def one(name, split, counts, mm=1.0, **attrs):  # fmt: skip
        return SimpleNamespace(
            id=name, split=split, spacing=(mm, mm, mm), affine=np.eye(4), attrs={"tissues_counts": counts, **attrs}
        )

    subjects = [one("a", "Train", {"3": 4000, "42": 2000, "5": 10**6}), one("b", "Train", {"3": 1000}, 2.0)]
    subjects += [one("c", "Train", {"5": 9}), one("t", "Test", {"3": 10**9})]
    made = SimpleNamespace(
        store=SimpleNamespace(subjects=subjects), visits=Visits(structure=(3, 42)),
        degradation=Degradation(((0.5, 1.0, 2.0), (1.0, 1.0, 6.0))), axes=None,
    )  # fmt: skip
    found = snapshots.made_for(made)
    assert (
        found.structures == ((1, "label 3, 42"),) and found.voxel_mm == (0.5, 1.0) and found.slice_ratio == (4.0, 6.0)
    )
    assert found.structure_ml == pytest.approx((6 / 1.5, 8 * 1.5))
    made.visits = Visits()
    for s, name in zip(subjects, ("cortex", "cortex", "cortex", "other"), strict=True):
        s.attrs = {"label_counts": {"0": 5, "1": 3000}, "label_classes": [3], "label_name": name}
    found = snapshots.made_for(made)
    assert found.structures == ((1, "cortex"),) and found.structure_ml == pytest.approx((3 / 1.5, 24 * 1.5))
    subjects[1].attrs["label_name"] = "another"
    assert snapshots.made_for(made).structures == ((1, "label 3"),)
    subjects[1].attrs["label_classes"] = [4]
    assert snapshots.made_for(made).structures == ((1, "structure of the training's labels"),)


@pytest.mark.parametrize(
    ("low_res", "axes", "geometry", "planes"),
    [
        (((1, 1, 3),), None, "physical", ("axial", "coronal")),
        (((1, 1, 1), (1, 1, 3)), None, "physical", ("axial", "coronal")),
        (((1, 1, 3),), (0, 1, 2), "physical", ("axial",)),
        (((3, 1, 1), (6, 1, 1)), (0, 1, 2), "physical", ("sagittal",)),
        (((1, 1, 3),), None, "segsrgan", ()),
        (((1, 1, 1),), None, "physical", ()),
    ],
)
def test_weights_know_in_which_planes_the_slices_of_their_training_lay(low_res, axes, geometry, planes):
    """Of the Train subjects, as each is stored, or along the world's axes where they were named; and whether left and
    right were exchanged, which the first axis of patches is where all slices are axial."""
    stored = {"a": np.eye(4), "b": np.eye(4)[[0, 2, 1, 3]], "t": np.eye(4)[[2, 1, 0, 3]]}
    subjects = [
        SimpleNamespace(id=i, split="Test" if i == "t" else "Train", spacing=(1, 1, 1), affine=affine, attrs={})
        for i, affine in stored.items()
    ]
    law = Degradation(low_res, geometry=geometry)
    made = SimpleNamespace(store=SimpleNamespace(subjects=subjects), visits=Visits(), degradation=law, axes=axes)
    assert snapshots.made_for(made).slices == planes
    alike = "R" if planes == ("axial",) else ""
    assert [snapshots.made_for(made, flips).mirrored for flips in ("", "x", "zx", "yz")] == ["", alike, alike, ""]


# --- validation -------------------------------------------------------------------------------------------------------


def test_test_subjects_are_dealt_like_cards_and_a_stop_is_asked_for_before_each_turn():
    for rank, indices in ((0, [0, 2, 4]), (1, [1, 3])):
        asked: list[bool] = []
        assert list(validate.dealt(5, Alone(rank, 2), lambda asked=asked: bool(asked.append(True)))) == indices
        assert len(asked) == 3, "all ranks ask as often"
    answers = iter((False, True))
    seen = []
    with pytest.raises(validate.Stopped):
        seen.extend(n for n in validate.dealt(5, Ranks(), lambda: next(answers)))
    assert list(validate.dealt(0, Ranks(), lambda: True)) == []


def test_a_volume_below_the_window_of_ssim_has_a_psnr_alone():
    rng = np.random.default_rng(0)
    for edge, names in ((11, {"who_PSNR", "who_SSIM"}), (10, {"who_PSNR"})):
        truth = rng.random((12, 13, edge), np.float32)
        assert set(validate.image_scores("who", truth * np.float32(0.9), truth)) == names
    assert set(validate.image_scores("who", truth, truth)) == set(), "infinite"


def test_a_test_subject_with_an_image_of_its_own_is_judged_by_it(caplog):
    """And one that cannot be read is told once and left out."""
    asked = []
    visits = SimpleNamespace(of=lambda sample, key, device, share: asked.append((sample, key, share)) or sample)

    def read(name):
        if name == "bad":
            raise InputError("bad", "is damaged", "convert it again")
        return f"sample {name}"

    made = SimpleNamespace(
        quarantined={}, visits=visits, store=SimpleNamespace(read=read), device=CPU, strict=False
    )  # fmt: skip
    assert validate.readable(made, "a") == "sample a" and asked == [("sample a", (0, "validation", "a"), 0.0)]
    assert validate.readable(made, "bad") is validate.readable(made, "bad") is None
    assert [message[:40] for message in caplog.messages] == ["Test subject bad is left out of every va"]
    made.quarantined.clear()
    made.strict = True
    with pytest.raises(InputError, match="is damaged"):
        validate.readable(made, "bad")


def test_of_patches_without_structure_the_one_in_the_middle_is_shown():
    plain = SimpleNamespace(label=torch.zeros(40, 40, 40), origins=np.array([(0, 0, 0), (24, 24, 24), (13, 12, 10)]))
    assert validate.central_patch(plain, 16) == 2
    plain.label[:8, :8, :16] = 1  # the middle planes of the first patch hold it
    assert validate.central_patch(plain, 16) == 0


def test_classes_of_a_mask_are_scored_from_the_first_on():
    probabilities = np.zeros((3, 1, 1, 4))
    probabilities[[0, 1, 1, 2], 0, 0, range(4)] = 1  # background, cortex, cortex, white matter
    truth = np.array([[[0, 1, 2, 2]]])
    found = validate.structure_dices(probabilities, truth, ("cortex", "white"))
    assert found == {"whole_Dice_cortex": pytest.approx(2 / 3), "whole_Dice_white": pytest.approx(2 / 3)}
    assert validate.structure_dices(probabilities, None, ("cortex",)) == {}
    assert validate.structure_dices(probabilities, truth, ()) == {}


# --- data -------------------------------------------------------------------------------------------------------------


def test_volumes_through_a_pipeline_come_back_as_what_they_were_and_errors_as_theirs(monkeypatch):
    """Image and label by their names, a mask that is not there as None; a pipeline whose law failed is used again."""
    monkeypatch.setattr(dali, "define", Pipeline)
    mover = dali.DaliMover(CPU, 2)
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    label, mask = (image > 5).astype(np.uint8), (image > 9).astype(np.uint8)
    done = Degraded(image + 1, image + 2, image + 3, 1.0, (1.0, 1.0, 1.0))
    first = mover._idle.queue[-1][0]
    with pytest.raises(ZeroDivisionError):
        mover(image, label, mask, lambda _: 1 // 0)
    for given in (mask, None):
        interpolated, hr, its_label, its_mask = mover(image, label, given, lambda _: done)
        assert np.array_equal(interpolated, done.interpolated) and np.array_equal(hr, done.hr)
        assert np.array_equal(its_label, label)
        assert its_mask is None if given is None else np.array_equal(its_mask, mask)
    assert [pair[0] for pair in mover._idle.queue if pair] == [first] and not mover.busy


def test_at_the_end_pipelines_at_work_are_left_behind_and_the_others_are_not(monkeypatch):
    """Neither stopped by DALI, which keeps a list of all, nor freed: one whose step hangs would keep the process."""
    monkeypatch.setattr(dali, "define", Pipeline)
    monkeypatch.setattr(dali, "_movers", weakref.WeakSet())
    movers = [dali.DaliMover(CPU) for _ in range(2)]
    pipelines = [mover._idle.queue[-1][0] for mover in movers]
    monkeypatch.setattr(Pipeline, "_pipes", set(map(weakref.ref, pipelines)), raising=False)
    held = [sys.getrefcount(pipeline) for pipeline in pipelines]
    with movers[0]._pipeline():
        dali._leave()
    dali._leave()  # neither is at work now
    assert [sys.getrefcount(pipeline) for pipeline in pipelines] == [held[0] + 1, held[1]]
    assert Pipeline._pipes == {weakref.ref(pipelines[1])}
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(pipelines[0]))


def test_labels_of_other_values_are_told_in_the_order_of_numbers():
    counts = {"label_counts": {str(value): 5 for value in (10, 2, 0, 1, 9, 30, 4, 7)}}
    one = SimpleNamespace(
        id="a", attrs=counts, has_label=True, has_tissues=False, has_image=True, has_mask=True, spacing=(1, 1, 1),
        affine=np.eye(4), shape=(20, 20, 20),
    )  # fmt: skip
    store = SimpleNamespace(subjects=[one], url="s")
    with pytest.raises(InputError) as error:
        settings_check.refuse_faults(store, Degradation(((1.0, 1.0, 3.0),)), PatchRule(16, 8), (0, 1, 2))
    assert error.value.reason == "labels hold other values than 0 and 1: a (also 2, 4, 7, 9, 10)"


def test_values_that_occur_in_no_label_map_are_told_once_for_all():
    """One map that holds a value is enough; what the conversion noted is kept by subject."""

    def one(name, classes, absent, **more):  # fmt: skip
        return SimpleNamespace(id=name, attrs={"label_classes": classes, "label_absent": absent, **more})

    subjects = [one("a", [3, 42, 7], [42, 7], warnings=["odd"]), one("b", [3, 42], [42]), one("c", [7], [])]
    subjects[1].attrs["structures"] = [["white", [41]]]
    found = settings_check.data_warnings(subjects)
    assert found == {"a": ["odd"], "--label": ["42 occurs in none of the 2 label maps"]}
    subjects[1].attrs["label_absent"] = [41, 42]
    assert settings_check.data_warnings(subjects)["--label"][0] == "41 occurs not in the label map"


def test_residents_count_in_the_type_that_they_are_kept_in(monkeypatch):
    """Two images, a label and a mask where there is one; a made image as large as it may grow."""

    def one(**more):  # fmt: skip
        return SimpleNamespace(**{"shape": (10, 10, 10), "attrs": {}, "has_mask": False, "has_tissues": False} | more)

    def limit(subject, budget, **more):
        store = SimpleNamespace(subject=lambda name: subject)
        return feed.resident_limit(store, list("abcdefghij"), budget, **more)

    assert [limit(one(), n * 2 * 9000) for n in (1, 3, 100)] == [1, 3, 10]
    assert limit(one(has_mask=True), 3 * 2 * 10000) == 3 > limit(one(has_mask=True), 3 * 2 * 10000 - 1)
    assert limit(one(), 4 * 3 * 5000, precision="bf16", prefetch=2) == 4
    growth = Visits().settings.growth
    assert growth > 1 and limit(one(has_tissues=True), int(3 * 2 * 9000 * growth) + 1) == 3
    assert limit(one(has_tissues=True), int(3 * 2 * 9000 * growth) - 10) == 2
    boxed = one(attrs={"bounding_box": [[2, 8], [0, 10], [1, 3]], "intensity": {"min": 0}})
    assert feed.resident_voxels(boxed, 4) == 6 * 10 * 4 and feed.resident_voxels(boxed, 0) == 1000


@pytest.mark.parametrize(("others", "expected"), [(3, 3), (9, 5)])
def test_all_ranks_hold_as_many_subjects_as_the_one_with_the_least_memory(monkeypatch, others, expected):
    """Ranks that held other numbers would deal other groups."""
    asked = []
    ranks = SimpleNamespace(minimum=lambda value: asked.append(value) or min(value, others))
    law = SimpleNamespace(degradation=SimpleNamespace(geometry="physical"), rule=SimpleNamespace(patch=16), visits=None)
    models = SimpleNamespace(device=torch.device("cpu"))
    held = SimpleNamespace(config=CONFIG, ranks=ranks, store=None, train=["a"], models=models, feed=law)
    monkeypatch.setattr(train_run, "resident_limit", lambda *given, **more: 5)
    assert train_run.group_size(held) == expected and asked == [5]


@pytest.mark.parametrize(
    ("here", "anywhere", "left"), [(None, 15, 15), (2, 15, 15), (None, 0, None), (10, 0, 10)], ids=str
)
def test_all_ranks_stop_with_the_signal_of_any(here, anywhere, left):
    """One that came here after the question stays for the next."""
    asked = []
    ranks = SimpleNamespace(minimum=lambda value: asked.append(value) or -anywhere)
    stop = SimpleNamespace(signal=here)
    assert loop.stopped(SimpleNamespace(ranks=ranks), stop) == (anywhere > 0)
    assert stop.signal == left and asked == [-(here or 0)]
