"""What an inference of many images tells, refuses, keeps and leaves; sizes of grids at their bounds."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nifti_files import rigid
from spies import Alone

from fastsrgan.core.files import ResultLock, finite, read_json
from fastsrgan.errors import InputError, ModelError, ResourceError, UsageError, counted
from fastsrgan.infer import files, memory, modes, planes, tiles
from fastsrgan.infer import network as network_module
from fastsrgan.infer.memory import TilingJob, memory_of
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import JOURNAL, Interpolated, Unfinished, Whole, coarser, is_isotropic, target_spacing
from fastsrgan.infer.settings import InferSettings
from fastsrgan.infer.stitch import Stitcher
from fastsrgan.infer.sweep import Sweep, predict
from fastsrgan.io import nifti as images
from fastsrgan.io.image_list import Image
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.volume.geometry import Orientation
from fastsrgan.volume.intensity import normaliser

FAST = {"patch": 16, "step": 12, "device": "cpu"}
SHAPE, MM = (14, 12, 6), (1.0, 1.0, 2.5)


@pytest.fixture(autouse=True)
def notes(caplog):
    """Not warnings alone."""
    caplog.set_level("INFO", logger="fastsrgan")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    return weights.save_generator(path, build_generator(GeneratorSpec(kernel=1), seed=6))


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("scans")
    data = np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.int16)
    return [images.save(folder / f"{name}.nii.gz", data, rigid(MM)) for name in "abc"]


# --- many images ------------------------------------------------------------------------------------------------------


class Store:
    """Counters and notes as the store of all ranks has them."""

    def __init__(self) -> None:
        self.counts, self.notes = {}, {}

    def add(self, name: str, n: int) -> int:
        self.counts[name] = self.counts.get(name, 0) + n
        return self.counts[name]


def test_none_of_the_last_images_is_taken_ahead_of_need(monkeypatch):
    """One for each rank is left for those that are free first; alone a process reads ahead to the end."""
    monkeypatch.setattr(files, "size_of", lambda image: 1)
    deal = files.Deal(range(5), SimpleNamespace(store=Store(), world=2))
    assert [deal.take(ahead=True) for _ in range(6)] == [0, 1, 2, 3, None, None]
    assert [deal.take() for _ in range(3)] == [4, None, None]
    alone = files.Deal(range(3), SimpleNamespace(store=None))
    assert [alone.take(ahead=True) for _ in range(4)] == [0, 1, 2, None]


def test_an_image_is_numbered_among_all_and_a_single_one_tells_no_progress(scans, model, tmp_path, monkeypatch, caplog):
    labels, compute = [], files.compute
    monkeypatch.setattr(files, "compute", lambda loaded, job, label, **more: (
        labels.append(label), compute(loaded, job, label, **more))[1])  # fmt: skip
    summary = files.infer_files(scans, tmp_path / "out", model, **FAST)
    alone = files.infer_files(scans[:1], tmp_path / "one", model, **FAST)
    for folder, told in (("out", summary), ("one", alone)):
        assert told["out_dir"] == str(tmp_path / folder) and told["weights"]["path"] == str(model)
        for item in told["items"]:
            record = read_json(tmp_path / folder / f"{item['stem']}.json")
            of_record = set(item) - {"input", "stem", "status"}
            assert of_record == {"outputs", "structures", "plausibility", "seconds", "warnings"}
            paths = {kind: str(tmp_path / folder / name) for kind, name in record["outputs"].items()}
            expected = {key: record[key] for key in of_record} | {"outputs": paths}
            assert finite({key: item[key] for key in of_record}) == expected
            assert item["input"] == record["input"]["path"]
    assert labels == ["1/3 a.nii.gz", "2/3 b.nii.gz", "3/3 c.nii.gz", "a.nii.gz"]
    assert sum("of 3 images" in message for message in caplog.messages) == 3
    files.tell_progress([{"status": "done"}], 1, 1, 1, 0.0)  # also as one of several ranks
    assert not any("of 1 images" in message for message in caplog.messages)
    assert not (tmp_path / "one" / files.SUMMARY).exists()


def test_what_is_not_a_users_fault_keeps_its_traceback_and_a_name(caplog):
    """Of every failure one line; an error without words has its kind."""
    item = {"stem": "a"}
    refused, bug = InputError("a.nii", "is empty", "another"), ZeroDivisionError()
    assert files.failure(item, refused) == item | {"error": str(refused), "exit_code": 3}
    assert files.failure(item, bug) == item | {"error": "ZeroDivisionError", "exit_code": 1}
    assert [record.exc_info and record.exc_info[0] for record in caplog.records] == [None, ZeroDivisionError]
    caplog.clear()
    assert files.failure(item, bug, tell=False)["exit_code"] == 1 and not caplog.records
    unneeded = files.Isotropic("a.nii", "is isotropic", "another")
    assert files.failure(item, unneeded) == item | {"status": "unneeded", "reason": str(unneeded)}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(("others", "hint"), [(0, "see the error above"), (1, "see infer_summary.json")])
def test_who_counts_failures_says_where_they_stand(tmp_path, others, hint):
    items = [{"stem": "a", "status": "failed", "exit_code": 3}, *[{"stem": "b", "status": "done"}] * others]
    error = files._some_failed(tmp_path, {"failed": 1, "done": others, "skipped": 0, "items": items})
    assert error.exit_code == (6 if others else 3)  # where nothing is done, the first failure's
    assert error.reason == f"1 of {counted(1 + others, 'volume')} failed: a" and error.hint == hint
    assert error.summary["items"] is items


def job_of(tmp_path, resume=False, **options):
    return files.ImageJob(
        tmp_path, SimpleNamespace(mask_classes=0), InferSettings(**FAST, **options), {}, files.QUIET, resume
    )


def test_room_is_asked_for_all_that_will_be_written_anew(scans, tmp_path, monkeypatch):
    """What stands there is left out of a resumed call alone; of DICOM the slices that are there count, by half."""
    asked = []
    monkeypatch.setattr(files, "need_space", lambda folder, size: asked.append((folder, size)))
    listed = [Image(path, path.name[0]) for path in scans]
    (tmp_path / "b.json").write_text("{}")
    files.need_room(listed, job_of(tmp_path))
    files.need_room(listed, job_of(tmp_path, resume=True))
    one = 14 * 12 * 15 * 4.125
    assert asked == [(tmp_path, 3 * int(one)), (tmp_path, 2 * int(one))]
    each = [files.bytes_of(listed[0], job_of(tmp_path, **more)) / (14 * 12 * 15) for more in (
        {"dtype": "input"}, {"save_prob": True}, {"uncertainty": True}, {"png": True})]  # fmt: skip
    # Found: 0; sizes are whole bytes, 4e-4 of a voxel here
    assert each == pytest.approx([2.125, 8.125, 12.125, 4.125], abs=1e-3)
    monkeypatch.setattr(files.dicom, "is_dicom", lambda path: True)
    monkeypatch.setattr(files, "size_of", lambda image: 1000)
    assert files.bytes_of(listed[0], job_of(tmp_path)) == 500


def test_the_tiles_are_told_where_the_step_was_left_open_alone():
    for options, told in (
        ({"step": None}, "tiles of 16 voxels, 8 apart: --patch and --step choose others"),
        ({"step": 4}, ""),
        ({"step": None, "patch": None}, ""),
    ):
        typed = InferSettings(**FAST | options)
        assert typed.placed().chosen_tiles(typed) == told


def test_what_stands_there_is_counted(scans, tmp_path):
    """Its first file by name, the others by number."""
    for name, more in (("a_sr.nii.gz", ""), ("a_seg.nii.gz", " and 1 more file"), ("a.json", " and 2 more files")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UsageError) as error:
            files._check_outputs([Image(scans[0], "a")], job_of(tmp_path), False)
        assert error.value.what == f"{tmp_path / 'a_sr.nii.gz'}{more}"
    files._check_outputs([Image(scans[0], "a")], job_of(tmp_path), True)


def test_nobody_writes_before_all_have_agreed_on_the_images(scans, model, tmp_path, monkeypatch):
    class Apart(Alone):
        def agree(self, name, value):
            assert (name, value) == ("images", ["a", "b", "c"])
            raise ResourceError("ranks", "differ", "start them alike")

    monkeypatch.setattr(files, "load", lambda *args: pytest.fail("read"))
    with pytest.raises(ResourceError, match="differ"):
        files.infer_files(scans, tmp_path / "out", model, ranks=Apart(), **FAST)


# --- one volume over several ranks ------------------------------------------------------------------------------------


class Both(Alone):
    """One of two ranks of a machine; what the other says in each vote is known."""

    local_world = 2

    def __init__(self, rank: int, *others) -> None:
        super().__init__(rank, 2)
        self.others = list(others)

    def gather(self, value):
        other = self.others.pop(0) if self.others else [None, 9]
        return [value, other] if self.rank == 0 else [other, value]


def test_ranks_vote_for_the_smallest_and_a_failed_one_ends_all():
    assert modes.Together(Both(0, [None, 3])).vote(5) == 3 and modes.Together(Both(1, [None, 7])).vote(5) == 5
    other = modes.Together(Both(0, ["disk: full (another)", 0]))
    with pytest.raises(ResourceError, match=r"rank 1: disk: full \(another\)"):
        other.vote(5)
    assert other.left == 0
    mine = modes.Together(Both(0))
    mine.failed(MemoryError("none left"))  # told once, and not raised a second time
    assert mine.left == 0
    mine.ranks.gather = lambda value: pytest.fail("they know")
    mine.failed(MemoryError())
    other.ranks.gather = lambda value: pytest.fail("they know")
    other.failed(MemoryError())


def test_a_volume_is_split_over_the_ranks_of_one_machine_alone():
    apart = Both(0)
    apart.local_world = 1
    with pytest.raises(UsageError, match="on several machines"):
        modes.Together(apart)
    with pytest.raises(UsageError, match="nobody to share with"):
        modes.Together(Alone())


def test_what_is_left_of_a_volume_that_failed_is_taken_away_by_the_first_rank(
    scans, model, tmp_path, monkeypatch, caplog
):
    """What another call makes at this moment is not touched."""
    job = replace(job_of(tmp_path), models=files.ModelChoice(model))
    partial = Unfinished.partial_of(job.planes(Image(scans[0], "a")))

    def process(*args, **more):
        raise InputError("a", "is no image", "another one")

    monkeypatch.setattr("fastsrgan.infer.image.process", process)
    for rank, held in ((1, False), (0, True), (0, False)):
        partial.mkdir(exist_ok=True)
        caplog.clear()
        with ResultLock(job.record(Image(scans[0], "a"))) if held else contextlib.nullcontext():
            items = files.together(job, [Image(scans[0], "a")], Both(rank))
        assert [(item["status"], item["exit_code"]) for item in items] == [("failed", 5 if held else 3)]
        assert partial.exists() == (rank == 1 or held)
        assert any(record.levelname == "ERROR" for record in caplog.records) == (rank == 0)


def test_what_a_killed_split_volume_left_is_no_damage_to_a_process_alone(model, tmp_path, monkeypatch, caplog):
    """Its planes are begun by no process alone: they are begun anew, and no file is said to be damaged."""
    network = TileNetwork(weights.load_generator(model), 1.0)
    network.batch = 1
    data = np.random.default_rng(1).random((40, 16, 16), np.float32)
    image = SimpleNamespace(
        source=Whole(torch.from_numpy(data)), turn=Orientation(), norm=normaliser(data), region=None
    )
    plan = tiles.plan(data.shape, 16, 8)

    def killed(*args, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(modes, "stream", killed)
        with pytest.raises(KeyboardInterrupt):
            modes.by_ranks(image, plan, network, tmp_path / "a", "key", modes.Together(Both(0)), files.QUIET, "a")
    assert Unfinished.partial_of(tmp_path / "a").is_dir()
    caplog.clear()
    *made, facts = modes.by_slabs(image, plan, network, tmp_path / "a", "key")
    assert facts["begun_at_plane"] == 0 and "damaged" not in caplog.text
    *wanted, _ = modes.by_slabs(image, plan, network, tmp_path / "b", "key")
    assert all(np.array_equal(one, other) for one, other in zip(made, wanted, strict=True))


def test_the_progress_of_a_part_counts_its_own_tiles():
    told = []
    shown = SimpleNamespace(start=lambda *words: told.append(words), advance=None, finish=None)
    modes._ShareOfProgress(shown, 7).start("a", 100, "tile")
    assert told == [("a", 7, "tile")]


def test_weights_that_give_nan_are_tried_in_full_precision_where_they_were_not():
    broken = np.full((3, 4, 5), np.nan, np.float32), np.zeros((1, 3, 4, 5), np.float32)
    for precision, hint in (("fp32", "other weights"), ("fp16", "--precision fp32, or other weights")):
        with pytest.raises(ModelError) as error:
            modes.check_result(broken, np.ones((3, 4, 5), np.float32), precision, "x")
        assert error.value.hint == hint


def test_zeros_of_a_scan_with_values_below_them_are_no_mask():
    same = SimpleNamespace(
        norm=SimpleNamespace(floor=-1.0), turn=Orientation(), spacing=(1, 1, 1), wanted=(1, 1, 1), geometry="physical"
    )
    zeros = np.zeros((4, 4, 4))
    assert planes.keep_empty(zeros + 1, zeros[None] + 1, zeros, same, modes.Observation((None,) * 3)) == 0


def test_a_residual_lies_on_the_scan_as_it_is_stored(scans, model, tmp_path):
    """However that is: the same voxels of the head have the same values."""
    scan = images.load(scans[0])
    turn = Orientation((2, 0, 1), (True, False, True))
    data, affine = turn.apply(scan.data).astype(np.int16), turn.affine(scan.affine, scan.data.shape)
    turned = images.save(tmp_path / "t.nii.gz", np.ascontiguousarray(data), affine)
    found = []
    for n, path in enumerate((scans[0], turned)):
        files.infer_files([path], tmp_path / str(n), model, **FAST, save_residual=True)
        found.append(images.load(next((tmp_path / str(n)).glob("*_residual.nii.gz"))).data)
    assert found[1].shape == data.shape and np.abs(found[0]).max() > 1  # found: 652
    assert np.array_equal(found[1], turn.apply(found[0]))


# --- files of planes --------------------------------------------------------------------------------------------------


SHAPES = {"sr": (4, 5, 6)}


@pytest.mark.parametrize(
    "array",
    [np.ones((4, 5, 6)), np.ones((4, 5, 7), np.float32), np.ones((6, 5, 4), np.float32), np.ones((4, 5, 6), np.int32)],
    ids=["float64", "longer", "turned", "integers"],
)
def test_planes_of_another_type_or_size_are_made_anew(tmp_path, array):
    begun = Unfinished(tmp_path / "a", "key", SHAPES, 4)
    begun.note(2)
    np.save(begun.partial / "sr.npy", array)
    anew = Unfinished(tmp_path / "a", "key", SHAPES, 4)
    assert anew.done == 0 and (anew.arrays["sr"] == 0).all() and anew.arrays["sr"].dtype == np.float32


def test_planes_that_were_all_done_are_kept_and_take_the_place_of_an_older_result(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.npy").write_bytes(b"old")
    begun = Unfinished(tmp_path / "a", "key", SHAPES, 4)
    begun.arrays["sr"][:] = 3
    begun.note(4)
    again = Unfinished(tmp_path / "a", "key", SHAPES, 4)
    assert again.done == 4
    done = again.finish()
    assert list(done) == ["sr"] and (done["sr"] == 3).all() and not again.partial.exists()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [JOURNAL, "sr.npy"]


def test_planes_reach_the_disk_before_the_journal_says_so(tmp_path, monkeypatch):
    begun, events = Unfinished(tmp_path / "a", "key", SHAPES, 4), []
    monkeypatch.setattr(np.memmap, "flush", lambda self: events.append("planes"))
    write = planes.atomic_write
    monkeypatch.setattr(planes, "atomic_write", lambda path: (events.append(path.name), write(path))[1])
    begun.note(2)
    assert events == ["planes", JOURNAL] and json.loads((begun.partial / JOURNAL).read_text())["done"] == 2


@pytest.mark.parametrize(("spacing", "held"), [((1, 1, 1), False), ((1, 1, 3), False), ((3, 1, 1), True)])
def test_an_image_whose_planes_mix_is_held_in_float32(spacing, held):
    """Where the first axis is interpolated, which in the processed orientation is no thick one."""
    data = np.random.default_rng(0).random((6, 7, 8))
    source = Interpolated(data, Orientation(), normaliser(data), spacing, (1, 1, 1), "physical")
    source.planes(0, 1)
    assert source.held_bytes == (4 * data.size if held else 0)
    assert source.held_bytes == (0 if source._low is None else source._low.nbytes)


# --- sizes of voxels --------------------------------------------------------------------------------------------------


def asked(mm) -> InferSettings:
    return InferSettings(**FAST, new_resolution=mm)


def test_an_axis_keeps_its_own_size_over_rounding_alone():
    """A thousandth, unless that makes another number of voxels."""
    assert target_spacing((0.9, 1.0, 1.0), (100, 100, 100), asked((0.9008, 1.0005, 1.002))) == (0.9, 1.0, 1.002)
    assert target_spacing((1.0, 1.0, 1.0), (2000, 100, 100), asked(1.0008)) == (1.0008, 1.0, 1.0)


def test_what_nobody_asked_for_grows_to_two_hundred_times_at_most():
    assert target_spacing((0.1, 0.1, 19.9), (10, 10, 10), asked(None)) == (0.1, 0.1, 0.1)
    with pytest.raises(InputError, match=r"voxels of 0.1 x 0.1 x 20.1 mm: 0.1 mm along all axes"):
        target_spacing((0.1, 0.1, 20.1), (10, 10, 10), asked(None))
    assert target_spacing((0.1, 0.1, 20.1), (10, 10, 10), asked(0.1)) == (0.1, 0.1, 0.1)


def test_a_result_has_two_thousand_million_voxels_at_most():
    whole = (2048, 1024, 1024)
    assert target_spacing((1, 1, 1), whole, asked("same")) == (1, 1, 1)
    with pytest.raises(ResourceError, match="new resolution"):
        target_spacing((1, 1, 1), (2049, 1024, 1024), asked("same"))


def test_voxels_within_a_hundredth_are_isotropic_and_no_coarser():
    assert is_isotropic((1.0, 1.009, 0.995)) is False and is_isotropic((1.0, 1.009, 1.0)) is True
    assert coarser((1, 1, 3), (1.009, 1, 1)) == [] and coarser((1, 1, 3), (0.5, 0.5, 0.5)) == []
    assert coarser((1, 1, 3), (1.02, 1, 3.2)) == [
        "the new resolution is coarser than the image along axis 0, 2: details may alias"
    ]


def test_what_is_below_zero_in_a_mask_is_outside():
    scan = np.ones((1, 1, 3), np.float32)
    assert planes.masked(scan, np.array([[[-1, 0, 1]]])).tolist() == [[[0, 0, 1]]]


# --- networks and sums ------------------------------------------------------------------------------------------------


def test_a_network_is_left_in_the_state_it_came_in():
    """Also where a pass fails."""
    generator = build_generator(GeneratorSpec(kernel=1))
    for training in (True, False):
        generator.train(training)
        network = TileNetwork(generator, 1.0)
        with pytest.raises(ZeroDivisionError), network.working():
            assert not generator.training and torch.is_inference_mode_enabled()
            raise ZeroDivisionError
        assert generator.training is training


def test_a_batch_is_no_larger_than_there_are_tiles_and_batches_are_of_one_size():
    """Five tiles at four a pass are three and two; where passes are compiled all are as large."""
    volume = torch.rand(16, 16, 80, generator=torch.Generator().manual_seed(0))
    plan, seen = tiles.plan(volume.shape, 16, 16), []
    network = TileNetwork(torch.nn.Identity(), 1.0)
    network._forward = lambda generator, x: (seen.append(len(x)), x)[1]
    for asked_for, size, batches in ((4, 4, [3, 2]), (9, 5, [5]), (2, 2, [2, 2, 1])):
        assert network.choose_batch(asked_for, plan) == network.size == size
        seen.clear()
        assert len(torch.cat(list(network.outputs(volume, plan, list(range(5)))))) == 5 and seen == batches
    network.compiled = True
    assert network.choose_batch(9, plan) == 9
    seen.clear()
    assert len(torch.cat(list(network.outputs(volume, plan, list(range(5)))))) == 5 and seen == [9]


def test_progress_ends_whatever_happens():
    events = []
    progress = SimpleNamespace(
        start=lambda *words: events.append(words),
        advance=lambda n, **facts: events.append(n),
        finish=lambda: events.append("end"),
    )
    volume = torch.rand(16, 16, 20, generator=torch.Generator().manual_seed(0))
    plan = tiles.plan(volume.shape, 16, 8)
    network = TileNetwork(torch.nn.Identity(), 1.0, batch=1)
    _, facts = predict(volume, plan, network, progress=progress, label="x")
    assert events == [("x", len(plan), "tile"), *[1] * len(plan), "end"]
    assert facts["tiles_network"] == len(plan) and facts["tiles_constant"] == facts["tiles_outside"] == 0
    assert facts["batch"] == 1 and facts["tiles_per_second"] * facts["tile_seconds"] == pytest.approx(len(plan))
    network.generator = lambda x: 1 // 0
    with pytest.raises(AttributeError):
        predict(volume, plan, network, progress=progress)
    assert events[-1] == "end"


def test_a_sweep_that_begins_again_counts_anew():
    """As where sums move to the host since the device is full."""
    volume = torch.rand(16, 16, 40, generator=torch.Generator().manual_seed(0))
    plan = tiles.plan(volume.shape, 16, 8)
    sweep = Sweep(Whole(volume), plan, TileNetwork(torch.nn.Identity(), 1.0))
    for _ in range(2):
        assert sweep.restart(0) == 0 and sweep.done == 0
        sweep.run(lambda channels: Stitcher(plan, channels))
        assert sweep.done == len(plan) == sweep.facts["tiles_network"]


class Beyond(torch.nn.Module):
    """Probabilities beyond their bounds by rounding."""

    def forward(self, x):
        return torch.cat([x, torch.where(x > 0.5, 1 + 1e-6, -1e-6)], 1)


def test_probabilities_lie_between_0_and_1_whatever_sums_round_to():
    volume = torch.rand(16, 16, 20, generator=torch.Generator().manual_seed(0))
    out, _ = predict(volume, tiles.plan(volume.shape, 16, 8), TileNetwork(Beyond(), 1.0))
    assert torch.equal(out[1], (volume > 0.5).float()) and torch.equal(out[0], volume)


class Coarse(torch.nn.Module):
    """Rounds as half precision would, by one unit below zero and two above."""

    def forward(self, x):
        off = torch.tensor([-0.25, 0.125]) if torch.is_autocast_enabled("cpu") else torch.zeros(2)
        left = torch.arange(x.shape[-1]) < x.shape[-1] // 2
        return torch.cat([x, x], 1) + torch.where(left, off[0], off[1])


def test_the_cost_of_a_precision_is_its_largest_and_its_root_mean_square_deviation(monkeypatch):
    """Of the chosen one, and of the others that this processor has; of those it has not, one small tile."""
    volume = torch.rand(48, 48, 96, generator=torch.Generator().manual_seed(0))
    whole = Whole(volume), tiles.plan(volume.shape, 48, 48), Coarse(), 1.0, torch.device("cpu")
    monkeypatch.setattr(network_module, "native", lambda name: name == "fp32")
    assert set(network_module.deviations(*whole, "fp32")) == {"fp32"}
    found = network_module.deviations(*whole, "bf16")
    assert set(found) == {"bf16"}
    row = found["bf16"]
    assert (row["tiles"], row["edge"], row["sr_max"], row["prob_max"]) == (1, 32, 0.25, 0.25)
    assert row["sr_rms"] == row["prob_rms"] == pytest.approx(math.sqrt((0.25**2 + 0.125**2) / 2))
    monkeypatch.setattr(network_module, "native", lambda name: True)
    found = network_module.deviations(*whole, "fp32")
    assert set(found) == {"fp32", "bf16", "fp16"} and not any(v for k, v in found["fp32"].items() if "_" in k)
    assert all((row["tiles"], row["edge"]) == (2, 48) for row in found.values())


def test_sums_of_levels_are_planned_with_both_of_them():
    """The finished levels' and that of the level in work; rows and slabs beside them."""
    plan = tiles.plan((40, 30, 37), 16, 8, window="gaussian")
    onto = torch.zeros(3, *plan.padded_shape)
    own = sum(array.nbytes for array in Stitcher(plan, 3, onto=onto).adder.own.values())
    assert memory_of(plan, 3, "cpu", False, True) == 2 * onto.nbytes + own + 4 * 3 * 16 * 16 * 37
    one = tiles.plan((16, 30, 16), 16, 8, window="gaussian")  # a slab is the whole: its sum has a place of its own
    onto = torch.zeros(3, *one.padded_shape)
    own = sum(array.nbytes for array in Stitcher(one, 3, onto=onto).adder.own.values())
    assert memory_of(one, 3, "cpu", False, True) == 2 * onto.nbytes + own > 2 * onto.nbytes


def test_a_sum_is_given_when_it_is_whole_and_not_before():
    plan = tiles.plan((16, 16, 40), 16, 8)
    some = torch.ones(len(plan), 2, 16, 16, 16)
    stitcher = Stitcher(plan, 2)
    stitcher.add(some[:-1])
    with pytest.raises(AssertionError, match="3 of 4 tiles"):
        stitcher.result()
    rolling = Stitcher(plan, 2, rolling=True, finished=lambda first, planes: None)
    rolling.add(some)
    with pytest.raises(AssertionError, match="went to"):
        rolling.result()


def test_a_refusal_of_a_long_volume_names_the_way_that_fits(monkeypatch):
    """For a whole volume a folder; within a budget no budget."""
    network = SimpleNamespace(
        device=torch.device("cpu"), bytes_of=lambda patch, count=1: 1000 * count, choose_batch=lambda batch, plan: 1
    )
    job = TilingJob(tiles.plan((3000, 32, 32), 16, 16), 2)
    limit = 40 * 2**20
    for more, words in (({}, "with scratch, a folder for its files"), ({"levels": True}, "without --budget")):
        with pytest.raises(ResourceError) as error:
            memory.plan_memory(replace(job, **more), network, 1, limit)
        assert words in error.value.hint and "by slabs it needs" in error.value.hint
    assert memory.plan_memory(replace(job, can_stream=True), network, 1, limit).mode == memory.SLABS
    told = memory.plan_memory(replace(job, can_stream=True), network, 1, limit).to_dict()
    assert told["disk_bytes"] == 4 * 2 * 3000 * 32 * 32 and told["device_bytes"] == 0
    assert told["limit_bytes"] == limit and told["host_bytes"] <= limit


# --- options that speak of each other ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "known", "least"),
    [
        ({}, (100.0, 250.0), 250.0),
        ({}, None, 0.0),
        ({"min_size": 0.0}, (100.0, 250.0), 0.0),
        ({"min_size": 30.0}, None, 30.0),
        ({"geometry": "segsrgan"}, (100.0, 250.0), 0.0),
    ],
)
def test_islands_are_as_the_weights_say_unless_asked_or_the_originals(options, known, least):
    assert InferSettings(**FAST, **options).least_component(known) == least


def test_a_report_names_the_options_that_a_result_was_made_with():
    told = InferSettings(**FAST, window="hann", compile="off", budget=3.0, geometry="segsrgan").report()
    named = {"window": "hann", "compile": "off", "budget": 3.0, "geometry": "segsrgan", "precision": "auto"}
    assert told == FAST | named


def test_a_limit_of_memory_that_was_asked_for_stays():
    assert InferSettings(**FAST, max_memory=7).limited_to(9).max_memory == 7
    assert InferSettings(**FAST).limited_to(9).max_memory == 9


@pytest.mark.parametrize(
    ("options", "given", "own", "lines"),
    [
        ({}, (None, 0.8, "zero"), {"new_resolution": 0.8}, 1),
        ({}, ("m", 0.8, "zero"), {"new_resolution": 0.8, "mask": "m", "outside": "zero"}, 2),
        ({}, ("m", None, ""), {"mask": "m"}, 0),
        ({"outside": "keep"}, ("m", None, "zero"), {"mask": "m"}, 0),
        ({"new_resolution": 1.0}, (None, 0.8, ""), {}, 0),
        ({"new_resolution": "same"}, (None, 0.8, ""), {}, 0),
        ({"geometry": "segsrgan"}, ("m", 0.8, "zero"), {"mask": "m"}, 0),
        ({}, (None, None, "", "sagittal"), {"upright": "on"}, 1),
        ({"upright": "off"}, (None, None, "", "coronal"), {}, 0),
        ({"geometry": "segsrgan"}, (None, None, "", "coronal"), {}, 0),
        ({}, (None, None, "", "", "y"), {"flips": "y"}, 1),
        ({}, (None, None, "", "sagittal", "z"), {"upright": "on", "flips": "z"}, 2),
        ({"flips": "none"}, (None, None, "", "", "x"), {}, 0),
        ({"flips": "xz"}, (None, None, "", "", "x"), {}, 0),
        ({"geometry": "segsrgan"}, (None, None, "", "", "x"), {}, 0),
        ({"budget": 60.0}, (None, None, "", "", "x"), {}, 0),
    ],
)
def test_what_is_left_to_the_weights_is_told_line_by_line(options, given, own, lines):
    before = InferSettings(**FAST, **options)
    after, told = before.for_image(*given)
    assert after == replace(before, **own) and len(told) == lines
