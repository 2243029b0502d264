"""The training loop end to end on small phantoms: it learns, keeps the best, ends when told, names what is wrong."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cohort import SMALL, losses, make_store, rows

from fastsrgan.cli.main import main
from fastsrgan.config import SETTINGS
from fastsrgan.errors import InputError, ModelError, ResourceError, UsageError
from fastsrgan.model import checkpoint, weights
from fastsrgan.report.curves import SUMMARY
from fastsrgan.train import gan as trial
from fastsrgan.train import loop
from fastsrgan.train.gan import Models
from fastsrgan.train.logs import RunLog
from fastsrgan.train.run import train

CONFIG = SMALL


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two training subjects and one test subject of 24 x 28 x 30 voxels."""
    return make_store(tmp_path_factory.mktemp("cohort"))


def test_a_run_leaves_weights_tables_log_and_settings(store, tmp_path):
    result = train(store, tmp_path / "run", CONFIG, snapshot_folder=tmp_path / "snapshots")
    run = tmp_path / "run"
    assert result["updates"] == 8 and result["exit_code"] == 0 and 0 < result["seconds"] < 1e6
    generator = weights.load_generator(run / "model.safetensors")
    assert generator.spec.kernel == 2
    original = weights.load_generator(tmp_path / "snapshots" / "SegSRGAN_epoch_2")
    for a, b in zip(generator.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (run / "dice.csv").read_text(encoding="utf8").splitlines()[0] == ",Dice"
    assert [line.split(",")[0] for line in (run / "mse.csv").read_text(encoding="utf8").splitlines()] == ["", "1", "2"]
    assert "epochs: 2" in (run / "config.yaml").read_text(encoding="utf8")
    assert not checkpoint.verify(checkpoint.newest(run))


def test_training_lowers_the_reconstruction_loss(store, tmp_path):
    config = CONFIG.replace(
        lambda_adv=0.0, epochs=1, steps_per_epoch=40, stride=2, lr_gen=3e-3, beta1=0.9, zero_head=True, noise=0.0
    )
    train(store, tmp_path / "run", config)
    history = [r["g_reconstruction"] for r in rows(tmp_path / "run")]
    assert np.mean(history[-8:]) < 0.6 * np.mean(history[:8])  # found: 0.54


def test_starting_from_weights_takes_generator_and_critic(store, tmp_path):
    train(store, tmp_path / "first", CONFIG.replace(epochs=1))
    config = CONFIG.replace(epochs=1, steps_per_epoch=1, lr_gen=1e-12, lr_dis=1e-12)
    result = train(store, tmp_path / "second", config, start_weights=tmp_path / "first")
    assert result["start_weights"]["file"] == str(tmp_path / "first" / "best.safetensors")
    for load in (weights.load_generator, weights.load_critic):
        first, second = (load(tmp_path / name / "model.safetensors") for name in ("first", "second"))
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.allclose(a, b, atol=2e-11)  # found: 3.6e-12
    with pytest.raises(ModelError, match="kernel_gen"):
        train(
            store,
            tmp_path / "third",
            CONFIG.replace(kernel_gen=3),
            start_weights=tmp_path / "first" / "model.safetensors",
        )


def test_a_resumed_run_and_its_weights_still_say_what_the_run_began_with(store, tmp_path):
    train(store, tmp_path / "first", CONFIG.replace(epochs=1, steps_per_epoch=1))
    config = CONFIG.replace(epochs=1, steps_per_epoch=1)
    began_with = train(store, tmp_path / "run", config, start_weights=tmp_path / "first")["start_weights"]
    assert began_with["sha256"] == weights.info(tmp_path / "first" / "best.safetensors")["sha256"]
    train(store, tmp_path / "run", config.replace(epochs=2), resume=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf8"))
    assert summary["updates"] == 2 and summary["start_weights"] == began_with
    plain = {key for key, value in summary.items() if not isinstance(value, (dict, list))} - {"start_weights"}
    assert plain <= SUMMARY.keys() | SETTINGS.keys(), "the report of a run has words for all"
    assert summary["weights"] == "model.safetensors" and (tmp_path / "run" / summary["weights"]).is_file()
    for name in ("model.safetensors", "best.safetensors"):
        assert weights.info(tmp_path / "run" / name)["card"]["start_weights"] == began_with


@pytest.mark.parametrize("lambda_adv", [0.0, 0.001])
def test_a_missing_critic_is_told_where_one_is_used(lambda_adv, caplog):
    config = CONFIG.replace(kernel_gen=12, scaled=True, lambda_adv=lambda_adv)
    with caplog.at_level("INFO", logger="fastsrgan"):
        Models(config, 0, torch.device("cpu")).start_from(weights.shipped("adult"))
    assert ("the critic starts anew" in caplog.text) == (lambda_adv > 0)


@pytest.mark.fault(36)
def test_nan_updates_are_skipped_and_end_the_run(store, tmp_path, monkeypatch):
    original = Models.generate
    monkeypatch.setattr(Models, "generate", lambda self, batch: original(self, batch) * float("nan"))
    with pytest.raises(ResourceError, match="3 updates in a row") as caught:
        train(store, tmp_path / "run", CONFIG.replace(max_bad_steps=3))
    assert "snapshot" not in str(caught.value), "there is none"
    bad = json.loads((tmp_path / "run" / "bad_batch.json").read_text(encoding="utf8"))
    assert bad["patches"] and bad["facts"]["d_skipped"] == 1.0


@pytest.mark.fault(26)
def test_an_existing_run_is_not_overwritten(store, tmp_path):
    train(store, tmp_path / "run", CONFIG.replace(epochs=1, steps_per_epoch=1))
    with pytest.raises(UsageError, match="--resume"):
        train(store, tmp_path / "run", CONFIG)


def test_a_batch_larger_than_a_group_takes_what_there_is(store, tmp_path):
    result = train(store, tmp_path / "run", CONFIG.replace(batch_size=24, epochs=1, critic_iterations=1))
    assert result["updates"] == 1


@pytest.mark.parametrize("size", [1, 2])
def test_steps_per_epoch_are_shared_out_among_the_groups(store, tmp_path, size):
    config = CONFIG.replace(resident_subjects=size, steps_per_epoch=3, stride=8, critic_iterations=1)
    train(store, tmp_path / "run", config)
    assert [r["epoch"] for r in rows(tmp_path / "run")] == [1, 1, 1, 2, 2, 2]


@pytest.mark.fault(29)
def test_a_damaged_subject_is_left_out_or_ends_a_strict_run(store, tmp_path, caplog):
    copy = tmp_path / "damaged.zarr"
    shutil.copytree(store, copy)
    damage(copy, "sub-0")
    result = train(copy, tmp_path / "run", CONFIG)
    assert list(result["left_out"]) and result["updates"] > 0
    with pytest.raises(InputError):
        train(copy, tmp_path / "strict", CONFIG, strict=True)
    assert threading.active_count() < 20


def damage(store: Path, subject: str) -> None:
    """Flip bits in the largest file of a subject."""
    chunk = max((p for p in store.rglob("*") if p.is_file() and subject in str(p)), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 255
    chunk.write_bytes(bytes(data))


def test_a_damaged_test_subject_is_left_out_of_every_validation(store, tmp_path, caplog):
    copy = tmp_path / "damaged.zarr"
    shutil.copytree(store, copy)
    damage(copy, "sub-2")
    result = train(copy, tmp_path / "run", CONFIG)
    assert list(result["left_out"]) == ["sub-2"] and result["best"] is None
    assert caplog.text.count("left out of every validation") == 1
    with pytest.raises(InputError, match="sub-2"):
        train(copy, tmp_path / "strict", CONFIG, strict=True)


def test_when_no_subject_can_be_read_training_ends_with_an_error(store, tmp_path):
    copy = tmp_path / "damaged.zarr"
    shutil.copytree(store, copy)
    for subject in ("sub-0", "sub-1"):
        damage(copy, subject)
    with pytest.raises(InputError, match="none of its 2 Train subjects"):
        train(copy, tmp_path / "run", CONFIG)


# --- what the loop does between updates ---------------------------------------------------------------------------


def scripted(monkeypatch, scores: list[float]) -> list[str]:
    """Validations that give these Dice, PSNR and MSE in turn; returns the names of the weights files written."""
    told, written, write = iter(scores), [], loop.write_weights
    others = {"PSNR_spline": 26.0, "SSIM": 0.9, "Seg_share": 0.1, "Label_share": 0.1}
    names = ("Dice", "PSNR", "MSE")
    monkeypatch.setattr(loop, "validate", lambda *a, **k: dict(zip(names, next(told), strict=True)) | others)
    monkeypatch.setattr(
        loop, "write_weights", lambda run, path, facts: (written.append(path.name), write(run, path, facts))
    )
    return written


def test_patience_ends_a_run_behind_the_best_epoch(store, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fastsrgan")
    dice = [0.1, 0.4, 0.3, 0.4, 0.2, 0.9]
    scripted(monkeypatch, [(d, 20 - d, 1.0) for d in dice])
    config = CONFIG.replace(best_by="dice", epochs=6, patience=3, steps_per_epoch=1, snapshot=4, critic_iterations=1)
    result = train(store, tmp_path / "run", config)
    assert result["ended_early"] == 5 and result["updates"] == 5 and result["best"] == 0.4
    assert result["exit_code"] == 0 and checkpoint.newest(tmp_path / "run").name == "step-00000005"
    assert weights.info(tmp_path / "run" / "best.safetensors")["card"]["epoch"] == 2
    again = train(store, tmp_path / "run", config, resume=True)  # a requeued job has nothing to do
    assert again["updates"] == 5 and again["ended_early"] == 5 and "larger patience" in caplog.text
    more = train(store, tmp_path / "run", config.replace(patience=4), resume=True)
    assert more["updates"] == 6 and more["best"] == 0.9 and more["ended_early"] is None


def test_best_by_chooses_the_score_that_counts(store, tmp_path, monkeypatch):
    for best_by, epoch in (("dice", 2), ("psnr", 1), ("both", 1)):
        scripted(monkeypatch, [(0.1, 30.0, 1.0), (0.2, 20.0, 1.0)])
        config = CONFIG.replace(best_by=best_by, steps_per_epoch=1, critic_iterations=1)
        train(store, tmp_path / best_by, config)
        assert weights.info(tmp_path / best_by / "best.safetensors")["card"]["epoch"] == epoch
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("by", "told"),
    [
        ("both", "epoch 1, Dice plus gain 0.7019 (Dice 0.1000) on the Test"),  # 0.1 + 1 - 10^-0.4
        ("dice", "epoch 2, Dice 0.2000 on the Test"),
        ("psnr", "epoch 1, PSNR 30.00 dB on the Test"),
    ],
)
def test_the_last_line_names_the_score_that_chose(store, tmp_path, monkeypatch, capsys, by, told):
    scripted(monkeypatch, [(0.1, 30.0, 1.0), (0.2, 20.0, 1.0)])
    config = CONFIG.replace(best_by=by, steps_per_epoch=1, critic_iterations=1)
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf8")
    assert main(["train", str(store), "-o", str(tmp_path / "run"), "--config", str(tmp_path / "c.yaml")]) == 0
    assert f"best: {told} subjects" in capsys.readouterr().out.splitlines()


@pytest.mark.fault(24)
def test_a_full_disk_under_the_log_is_named(tmp_path):
    log = RunLog(tmp_path)
    log.path = Path("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(ResourceError, match="/dev/full: no space left"):
        log.step(1, 1, 0.1, 0.0, {})


def test_the_log_follows_the_schedule_and_the_optimisers_follow_the_log(store, tmp_path, monkeypatch):
    taken, original = [], Models.generator_update

    def noting(self, *args):
        taken.append([o.adam.param_groups[0]["lr"] for o in (self.optimiser_g, self.optimiser_d)])
        return original(self, *args)

    monkeypatch.setattr(Models, "generator_update", noting)
    config = CONFIG.replace(lr_schedule="linear", lr_end=0.25, lr_warmup=2, lr_dis=5e-4, critic_iterations=1)
    train(store, tmp_path / "run", config)
    done = np.arange(8) / 8
    expected = (1 - 0.75 * done) * np.minimum(1, np.arange(1, 9) / 2)
    assert np.allclose([r["lr_factor"] for r in rows(tmp_path / "run")], expected)
    assert np.allclose(taken, expected[:, None] * [[1e-4, 5e-4]])


def test_rows_of_the_log_say_what_a_step_cost(store, tmp_path):
    train(store, tmp_path / "run", CONFIG.replace(epochs=1))
    for row in rows(tmp_path / "run"):
        assert 0 < row["seconds"] < 1e6 and row["patches_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["memory_bytes"] > 1e7 and row["data_wait_seconds"] >= 0  # found: 4.51e8
        assert {"g_total", "g_gradient", "d_wasserstein", "d_penalty", "d_gradient", "lr_factor"} <= set(row)


class Noting:
    """A progress display that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list = []
        self.told: list = []

    def start(self, label, total, unit):
        self.lines.append((label, total, unit))

    def advance(self, n=1, **facts):
        self.lines.append((n, facts))

    def finish(self):
        self.lines.append("finish")

    def tell(self, group, text, **facts):
        self.told.append((group, text, facts))


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    """So that every reader of JSON can read it."""
    log = RunLog(tmp_path)
    log.step(1, 2, 0.5, 0.0, {"g_total": float("nan"), "d_total": float("-inf"), "lr_factor": 1.0})
    log.epoch(1, {"PSNR": 30.0})
    lines = log.path.read_text(encoding="utf8").splitlines()
    step, epoch = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (step["g_total"], step["d_total"], step["lr_factor"], epoch["validation"]) == (
        None,
        None,
        1.0,
        {"PSNR": 30.0},
    )


def test_a_row_tells_patches_of_all_ranks_and_the_time_that_this_call_needs():
    """Of a run that went on at 0.5 and is at 0.75 after ten hours, ten are left."""
    logged, progress = [], Noting()
    run = SimpleNamespace(
        log=SimpleNamespace(step=lambda *row: logged.append(row)),
        ranks=SimpleNamespace(world=4),
        feed=SimpleNamespace(waited=0.0),
        models=SimpleNamespace(device=torch.device("cpu")),
        progress=progress,
        board=None,
        began=time.perf_counter() - 36000,
        began_at=0.5,
    )
    told = loop.Told({}, {}, ["a@0,0,0", "b@0,0,0"], update=1, done=0.75, seconds=0.25)
    loop.tell(run, SimpleNamespace(epoch=1), {"g_reconstruction": 1.0}, told)
    assert logged[0][-1]["patches_per_second"] == progress.lines[0][1]["patches/s"] == 2 * 4 / 0.25
    assert progress.lines[0][1]["run"] == "10.0 h left"


def test_progress_counts_updates_and_shows_losses_wait_memory_and_time_left(store, tmp_path):
    progress = Noting()
    train(store, tmp_path / "run", CONFIG, progress=progress)
    assert progress.lines[0] == ("training epoch 1/2", 4, "update")
    shown = [line[1] for line in progress.lines if line != "finish" and len(line) == 2]
    assert len(shown) == 8
    assert set(shown[0]) == {"rec", "W", "gp", "|G|", "|D|", "patches/s", "wait", "GB", "run"}
    assert shown[-1]["run"] == "0 s left" and shown[0]["wait"].endswith("%")


def test_progress_of_a_run_that_goes_on_within_an_epoch_counts_what_is_left(store, tmp_path, monkeypatch):
    """Each stretch moves on by as much as it was said to take, also the one that was begun before."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stopped", lambda run, stop: run.position.updates == 1)
        train(store, tmp_path / "run", CONFIG)
    progress = Noting()
    train(store, tmp_path / "run", CONFIG, resume=True, progress=progress)
    begun = [line for line in progress.lines if len(line) == 3]
    assert begun == [("training epoch 1/2", 3, "update"), ("training epoch 2/2", 4, "update")]
    assert sum(line[0] for line in progress.lines if len(line) == 2) == 3 + 4


def test_progress_names_the_part_of_an_epoch_whose_subjects_are_in_memory(store, tmp_path):
    """Counts began anew within an epoch, and nothing said of what."""
    progress = Noting()
    train(store, tmp_path / "run", CONFIG.replace(resident_subjects=1, epochs=1), progress=progress)
    begun = [line[0] for line in progress.lines if len(line) == 3]
    assert begun == ["training epoch 1/1, part 1/2", "training epoch 1/1, part 2/2"]


# --- TensorBoard --------------------------------------------------------------------------------------------------


def test_tensorboard_gets_scalars_and_images(store, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(store, tmp_path / "run", CONFIG.replace(tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    history = rows(tmp_path / "run")
    found = events.Scalars("train/g_total")
    assert [e.step for e in found] == [r["update"] for r in history]
    assert np.allclose([e.value for e in found], [r["g_total"] for r in history])
    ends = {r["epoch"]: r["update"] for r in history}
    assert [e.step for e in events.Scalars("validation/Dice")] == list(ends.values()) != list(ends)
    assert len(ends) == 2 and len(events.Tags()["images"]) == 1
    image = events.Images(events.Tags()["images"][0])[-1]
    assert (image.height, image.width) == (3 * 16 + 4, 5 * 16 + 8)


def test_tensorboard_that_is_missing_is_said_before_the_first_update(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ResourceError, match=r"pip install 'fastsrgan\[tensorboard\]'"):
        train(store, tmp_path / "run", CONFIG.replace(tensorboard=True))
    assert not rows(tmp_path / "run") if (tmp_path / "run" / "log.jsonl").exists() else True


# --- memory -------------------------------------------------------------------------------------------------------


def memory_for(monkeypatch, most: int, message: str = "CUDA out of memory. Tried to allocate 20.00 GiB") -> None:
    """A device whose memory takes a generator update of at most ``most`` patches."""
    original = Models.generator_update

    def limited(self, batch, adversarial):
        if len(batch.x) > most:
            raise torch.OutOfMemoryError(message)
        return original(self, batch, adversarial)

    monkeypatch.setattr(Models, "generator_update", limited)


@pytest.mark.fault(34)
def test_out_of_memory_names_the_peak_and_the_batch_that_fits(store, tmp_path, monkeypatch):
    memory_for(monkeypatch, 3)
    with pytest.raises(ResourceError) as caught:
        train(store, tmp_path / "run", CONFIG.replace(batch_size=8, stride=4))
    assert "at a batch of 8 patches, the process held" in str(caught.value)
    assert "--batch-size 2 fits, or --accumulate 4" in str(caught.value)


def test_the_advice_after_out_of_memory_counts_the_micro_batches_there_were(monkeypatch):
    """Four parts of each of three parts: the same patches at once as the batch that fits."""
    monkeypatch.setattr(trial, "fits", lambda config, classes, device, batch: batch <= 2)
    models = Models(CONFIG.replace(batch_size=8, accumulate=3), 0, torch.device("cpu"))
    assert "--batch-size 2 fits, or --accumulate 12" in str(trial.memory_error(models, "out of memory"))
    models = Models(CONFIG.replace(batch_size=5), 0, torch.device("cpu"))  # two, two and one
    assert "--batch-size 2 fits, or --accumulate 3" in str(trial.memory_error(models, "out of memory"))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_hopeless_batch_is_told_the_bound_of_all_ranks_batches(monkeypatch, world):
    """What the hint allows is not refused, what lies beyond it is: the option counts the patches of all ranks."""
    ranks = SimpleNamespace(rank=0, world=world, local_world=world)
    room = trial.least_bytes(CONFIG, 0, 10) + 1  # of each rank, for ten patches
    monkeypatch.setattr(trial, "free_memory", lambda: room * world)

    def asked(batch: int) -> None:
        trial.refuse_hopeless(CONFIG.replace(batch_size=batch), 0, torch.device("cpu"), ranks)

    with pytest.raises(ResourceError, match=r"--batch-size: .* more than .* on each rank") as told:
        asked(64 * world)
    bound = int(re.search(r"below (\d+)", told.value.hint)[1])
    asked(bound - world)
    with pytest.raises(ResourceError):
        asked(bound + world)


def test_the_batch_that_fits_is_of_all_ranks_as_the_one_asked_for_is(monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "fits", lambda config, classes, device, batch: tried.append(batch) or batch <= 2)
    ranks = SimpleNamespace(world=3, minimum=lambda value: value)
    config = CONFIG.replace(batch_size=24)
    assert trial.batch_that_fits(config, 0, torch.device("cpu"), ranks) == 6 and tried == [8, 4, 2]


@pytest.mark.fault(34)
def test_auto_batch_lowers_the_batch_before_the_first_update_and_keeps_it(store, tmp_path, monkeypatch, caplog):
    memory_for(monkeypatch, 3)
    config = CONFIG.replace(batch_size=4, stride=4, critic_iterations=1, auto_batch=True)
    result = train(store, tmp_path / "run", config.replace(epochs=1))
    assert result["batch_size"] == 2 and result["updates"] == 4
    assert "batch_size: 2" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf8")
    again = train(store, tmp_path / "run", config, resume=True)
    assert again["batch_size"] == 2 and again["updates"] == 8 and "begins anew" not in caplog.text
    caplog.clear()
    train(store, tmp_path / "run", config.replace(epochs=3, batch_size=1), resume=True)
    assert "batch_size 1: --auto-batch keeps the run's 2" in caplog.text
    assert "memory" not in caplog.text
    memory_for(monkeypatch, 0)
    with pytest.raises(ResourceError, match="no memory for a batch of one patch"):
        train(store, tmp_path / "none", config)


@pytest.mark.fault(34)
def test_a_batch_beyond_any_memory_is_refused_before_the_first_update(store, tmp_path, monkeypatch):
    """A system that promises more memory than it has would end the process without a word."""
    huge = CONFIG.replace(batch_size=10**7)
    with pytest.raises(
        ResourceError, match=r"--batch-size: 10000000 patches of .* are free \(below \d+, or --auto-batch"
    ):
        train(store, tmp_path / "run", huge)
    assert trial.least_bytes(CONFIG.replace(accumulate=2), 0, 4) < trial.least_bytes(CONFIG, 0, 4)
    monkeypatch.setattr(trial, "Models", lambda *given: pytest.fail("tried what cannot fit"))
    assert not trial.fits(huge, 0, torch.device("cpu"), huge.batch_size)


def test_an_error_that_is_not_about_memory_stays_what_it_is(store, tmp_path, monkeypatch):
    def broken(self, batch, adversarial):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(Models, "generator_update", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        train(store, tmp_path / "run", CONFIG)


# --- surroundings -------------------------------------------------------------------------------------------------


@pytest.mark.fault(45, 46)
def test_surroundings_change_no_bit(store, tmp_path, monkeypatch):
    """No standard input, no terminal, C and Turkish locales, blanks and umlauts in paths; a clock that runs back."""
    config = CONFIG.replace(epochs=1, steps_per_epoch=2, conditional=True)
    hours = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    train(store, tmp_path / "here", config)
    monkeypatch.undo()
    folder = tmp_path / "mit Ümlaut und blank"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf8")
    program = "from fastsrgan.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        f"import sys, torch; torch.set_num_threads({torch.get_num_threads()}); {program}",
        "train",
        str(store),
    ]
    command += ["-o", str(folder / "run"), "--config", str(folder / "config.yaml")]
    language = {"LC_ALL": "C", "LANG": "tr_TR.UTF-8", "LANGUAGE": "tr", "COLUMNS": "80", "PYTHONUTF8": "0"}
    environment = {**os.environ, **language, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" <&-', "bash", *command], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stderr + done.stdout and b"epoch 1/1" in done.stderr
    assert losses(folder / "run") == losses(tmp_path / "here")
