"""What an inference says and leaves behind: every figure of a record, every file's place and world, every caption."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nifti_files import rigid

from fastsrgan.core.files import read_json, write_json
from fastsrgan.errors import ModelError, UsageError
from fastsrgan.evaluate.choice import load_weights
from fastsrgan.evaluate.plausibility import Verdict
from fastsrgan.infer import anytime, bids, files, memory, modes, planes, tiles
from fastsrgan.infer import image as image_module
from fastsrgan.infer import network as network_module
from fastsrgan.infer import volume as volume_module
from fastsrgan.infer.image import _listed
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Whole, nearest, own_grid
from fastsrgan.infer.settings import InferSettings, options
from fastsrgan.infer.stitch import Stitcher
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.io.bids import SUFFIXES, find_bids, parse, sidecar
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.model.purpose import Purpose, mask_names, mask_values
from fastsrgan.volume.consistency import Observation
from fastsrgan.volume.geometry import Orientation, Volume

FAST = {"patch": 16, "step": 12, "device": "cpu"}
SHAPE, MM = (14, 12, 6), (1.0, 1.0, 2.5)
WAYS = (memory.MEMORY, memory.SLABS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    return weights.save_generator(path, build_generator(GeneratorSpec(kernel=1), seed=6))


def some(dtype=np.int16, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 900, SHAPE).astype(dtype)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_result_is_compared_with_the_range_of_its_scan():
    """From the lowest value on where that is below 0; of a scan of one value a result of one value is no wonder."""

    def told(data, low, high):
        sr = np.linspace(low, high, data.size, dtype=np.float32).reshape(data.shape)
        return modes.check_result((sr, np.zeros((1, *data.shape), np.float32)), data, "fp32", "x")

    data = np.linspace(-1000, 10, 60, dtype=np.float32).reshape(3, 4, 5)
    assert told(data, -1000, 900) == [] and "reaches 9200, the image 10:" in told(data, -1000, 9200)[0]
    assert "every voxel of the SR image is 5" in told(data, 5, 5)[0]
    assert told(np.full_like(data, 7), 7, 7) == []


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", ["sr", "prob"])
def test_one_voxel_without_a_finite_value_is_an_error_of_the_weights(where, value):
    found = {"sr": np.zeros((3, 4, 5), np.float32), "prob": np.zeros((2, 3, 4, 5), np.float32)}
    found[where][..., 1, 2, 3] = value
    with pytest.raises(ModelError, match="NaN or infinite"):
        modes.check_result((found["sr"], found["prob"]), np.ones((3, 4, 5), np.float32), "fp32", "x")


def test_a_volume_that_is_too_short_to_be_split_is_told(caplog):
    parts = [modes.Share(0, 10, 6), modes.Share(10, 20, 5)]
    for slabs, wanted in ((7, 1), (8, 0)):  # 1.17 and 1.33 times one process
        caplog.clear()
        modes._tell(parts, SimpleNamespace(grid=(slabs, 1, 1)), "x")
        assert len([r for r in caplog.records if r.levelname == "WARNING"]) == wanted


def test_what_the_last_step_takes_is_planned():
    """Beside what agreement takes: the residual in the plan's float32 and as it is made; a doubt only where no slabs
    can be cut."""
    scan = some(np.float32)

    def held(**more):
        settings = InferSettings(**FAST, **more)
        image = volume_module._prepared(scan, rigid(MM), settings, None, False)
        return modes.wanted(image, scan, settings).held_bytes, math.prod(image.source.shape)

    (plain, _), (fine, voxels) = held(), held(new_resolution=0.5)
    assert plain > 0 and held(uncertainty=True)[0] == plain and held(save_residual=True)[0] == plain + 8 * scan.size
    assert held(new_resolution=0.5, uncertainty=True)[0] == fine + 20 * voxels


@pytest.mark.parametrize(
    ("more", "bytes_"),
    [
        ({}, 8000 + 1000),
        ({"dtype": "input"}, 8000 + 9000),
        ({"largest_component": True}, 8000 + 6000),
        ({"min_size": 2.0}, 8000 + 6000),
        ({"png": True}, 8000 + 1000 + 12 * 500 + 10 * 1000),
    ],
)
def test_what_is_in_memory_while_a_result_is_written(more, bytes_):
    """SR and probabilities of 1000 voxels in float32, a byte for the segmentation, and what each option adds."""
    sr, prob = np.zeros((10, 10, 10), np.float32), np.zeros((1, 10, 10, 10), np.float32)
    result = SimpleNamespace(sr=sr, prob=prob, doubt=None, residual=None)
    low = Volume(np.zeros((10, 10, 5), np.float32), np.eye(4))
    loaded = SimpleNamespace(result=result, volume=low, model=SimpleNamespace(purpose=Purpose()), mask=None)
    job = SimpleNamespace(settings=InferSettings(**FAST, **more))
    assert image_module.bytes_while_writing(loaded, job) == bytes_
    result.doubt, result.residual = sr, low.data
    assert image_module.bytes_while_writing(loaded, job) == bytes_ + 4000 + 2000
    loaded.mask = low.data > 0  # the picture's spline is that of a copy, cut out
    assert image_module.bytes_while_writing(loaded, job) == bytes_ + 4000 + 2000 + 4 * 500 * ("png" in more)
    loaded.mask = None
    result.prob = np.zeros((3, 10, 10, 10), np.float32)
    assert image_module.bytes_while_writing(loaded, job) == bytes_ + 4000 + 2000 + 8000 + 1000


def test_a_record_has_the_scans_voxels_and_the_time_of_all_three_stages(tmp_path, model, monkeypatch):
    turns = iter(range(100))
    monkeypatch.setattr(image_module, "time", SimpleNamespace(perf_counter=lambda: float(next(turns))))
    path = images.save(tmp_path / "a.nii.gz", some(), rigid(MM))
    files.infer_files([path], tmp_path / "out", model, **FAST)
    record = read_json(tmp_path / "out" / "a.json")
    assert record["input"]["spacing_mm"] == pytest.approx(MM) and record["input"]["shape"] == list(SHAPE)
    assert record["shape"] == [14, 12, 15] and record["new_resolution"] == pytest.approx([1, 1, 1])
    assert record["seconds"] == 3.0  # a second each for reading, computing and writing


def test_a_cohort_tells_the_time_that_is_left_over_all_ranks(monkeypatch, caplog):
    caplog.set_level("INFO", logger="fastsrgan")
    monkeypatch.setattr(files, "time", SimpleNamespace(perf_counter=lambda: 120.0))
    items = [{"status": "done"}] * 3 + [{"status": "failed"}]
    files.tell_progress(items, 4, 12, 2, 100.0, 2)  # two images in 20 s on this rank, another one beside it
    files.tell_progress(items, 12, 12, 2, 100.0, 2)
    files.tell_progress(items, 3, 4, 2, 100.0, 1, 112.0)  # written 8 s ago, while the next was computed: 6 s each
    files.tell_progress(items, 2, 4, 2, 100.0, 1, 112.0)
    assert [r.message for r in caplog.records] == [
        "4 of 12 images, 1 failed, 5.0 s each, 40 s left",
        "12 of 12 images, 1 failed in 20 s",
        "3 of 4 images, 1 failed, 6.0 s each",  # not "0.0 s left": the other one takes longer than expected
        "2 of 4 images, 1 failed, 6.0 s each, 4.0 s left",
    ]
    told = {2.34: "2.3 s", 9.6: "10 s", 99: "99 s", 270: "4.5 min", 5970: "99.5 min", 11160: "3.1 h"}
    assert {seconds: files.lasting(seconds) for seconds in told} == told


def test_times_and_densities_are_those_that_the_help_tells():
    step = options()["step"].help
    assert f"or {anytime.BUDGET:g}s;" in step
    densest = anytime.levels((200, 200, 200), 128, "auto")[-1].step
    assert densest == (8, 8, 8)  # a sixteenth of the patch
    assert [level.step[0] for level in anytime.levels((200, 200, 200), 128, "auto")] == [64, 32, 16, 8]


def test_a_scan_counts_as_masked_from_a_twentieth_of_exact_zeros_on():
    same = SimpleNamespace(
        norm=SimpleNamespace(floor=0.0), turn=Orientation(), spacing=(1, 1, 1), wanted=(1, 1, 1), geometry="physical"
    )
    for zeros, kept in ((49, 0), (51, 51)):
        scan, sr, prob = np.ones((10, 10, 10)), np.ones((10, 10, 10)), np.ones((2, 10, 10, 10))
        scan.reshape(-1)[:zeros] = 0
        assert planes.keep_empty(sr, prob, scan, same, Observation((None,) * 3)) == kept
        assert np.count_nonzero(sr == 0) == kept and np.count_nonzero(prob == 0) == 2 * kept


# --- weights and structures -------------------------------------------------------------------------------------------


def test_averaged_weights_are_known_by_all_of_their_files(tmp_path):
    """So that a resumed call with another second or third model is refused; structures have to be the same."""

    def saved(seed, **more):
        generator = build_generator(GeneratorSpec(kernel=1), seed=seed)
        return weights.save_generator(tmp_path / f"{seed}.safetensors", generator, **more)

    a, b, c = (saved(seed) for seed in (1, 2, 3))
    chosen = ([a], [a, b], [b, a], [a, c], [a, b, c])
    assert len({load_weights(sources).facts["sha256"] for sources in chosen}) == len(chosen)
    other = saved(4, card={"structures": [{"name": "cortex", "values": [3]}]})
    with pytest.raises(ModelError, match="of other structures"):
        load_weights([a, other])


def test_the_value_of_a_structure_is_the_smallest_that_it_has_in_the_label_map():
    facts = {"structures": [{"name": "cortex", "values": [42, 3]}, {"name": "white", "values": [300]}]}
    for told in (facts, {"averaged": [facts, facts]}):
        assert mask_names(told) == ((3, "cortex"), (300, "white"))
        assert mask_values(told)[[0, 1, 2]].tolist() == [0, 3, 300]
    assert mask_names({}) == () and mask_values({})[[0, 1, 200]].tolist() == [0, 1, 200]


def test_a_header_names_as_many_structures_as_it_has_room_for():
    assert _listed("fastsrgan: ", []) == "fastsrgan" and _listed("a: ", ["1 b", "2 c"]) == "a: 1 b, 2 c"
    assert _listed("a: ", ["x" * 70, "ä" * 4]) == "a: " + "x" * 70 + ", " + "ä" * 4  # 79 bytes of ASCII and the end
    assert _listed("a: ", ["x" * 70, "y" * 5]) == "a: " + "x" * 70 + ", ..."
    many = _listed("fastsrgan: ", [f"{i} part {i}" for i in range(40)])
    assert many == "fastsrgan: " + ", ".join(f"{i} part {i}" for i in range(6)) + ", ..." and len(many) < 80


def test_the_networks_own_grid_is_for_scans_a_quarter_coarser():
    grids = {mm: own_grid((mm, mm, 4.0), 0.8) for mm in (0.5, 0.8, 0.99, 1.01, 2.0)}
    assert grids == {0.5: None, 0.8: None, 0.99: None, 1.01: 0.8, 2.0: 0.8}
    assert own_grid((2.0, 2.0, 2.0), None) is None


# --- tiles ------------------------------------------------------------------------------------------------------------


def test_a_small_tile_is_never_alone_on_a_cpu():
    """Alone, torch convolves it without oneDNN; a large one is, so that memory holds it."""
    network = TileNetwork(torch.nn.Identity(), 1.0)
    edges = (32, 64, 80, 92, 96, 128)
    counts = [network._wanted("auto", tiles.plan((300, 300, 300), edge, edge)) for edge in edges]
    assert counts == [16, 2, 2, 2, 1, 1]


def test_a_batch_on_a_gpu_takes_six_tenths_of_what_is_free_and_at_most_32_tiles(monkeypatch):
    network = TileNetwork(torch.nn.Identity(), 1.0)
    network.device = torch.device("cuda")
    monkeypatch.setattr(network, "bytes_of", lambda patch, count=1: 100)
    counts = []
    for free in (50, 1000, 5000, 10**6):
        monkeypatch.setattr(network_module, "free_memory", lambda device, free=free: free)
        counts.append(network._wanted("auto", tiles.plan((64, 64, 64), 64, 64)))
    assert counts == [1, 6, 30, 32] and network._wanted(7, None) == 7


@pytest.mark.parametrize(
    ("more", "source"),
    [
        ({}, ""),
        ({"slice_thickness": 2.0}, "asked"),
        ({"agree": "off"}, "spacing"),
        ({"geometry": "segsrgan"}, "spacing"),
        ({"agree": "off", "save_residual": True}, ""),
        ({"agree": "off", "slice_thickness": 2.0}, "asked"),
    ],
)
def test_a_header_is_asked_for_the_thickness_where_that_has_a_use(more, source):
    assert InferSettings(**FAST, **more).thickness_from == source


def test_what_is_written_of_an_image_is_what_was_asked_for():
    every = {"save_prob": True, "save_residual": True, "png": True, "uncertainty": True}
    assert InferSettings(**FAST).kinds(0) == ["sr", "seg"] and InferSettings(**FAST).kinds(2) == ["sr", "seg", "mask"]
    kinds = {name: set(InferSettings(**FAST, **{name: True}).kinds(0)) - {"sr", "seg"} for name in every}
    assert kinds == {
        "save_prob": {"prob"},
        "save_residual": {"residual"},
        "png": {"png"},
        "uncertainty": {"prob", "doubt"},
    }
    kept = InferSettings(**FAST, dtype="input")
    assert [kept.sr_bytes(kind, size) for kind, size in (("i", 2), ("u", 1), ("f", 8))] == [2, 1, 4]
    assert InferSettings(**FAST).sr_bytes("i", 2) == 4


def test_a_precision_is_judged_by_the_tiles_with_most_contrast():
    volume = torch.zeros(128, 16, 16)
    for n, size in ((1, 0.5), (3, 0.2), (4, 1.0), (6, 0.7), (7, 0.1), (5, 0.3)):
        volume[16 * n + 3, 5, 6] = size
    found = network_module._tiles(Whole(volume), tiles.plan(volume.shape, 16, 16))
    assert found.amax((1, 2, 3, 4)).tolist() == pytest.approx([0.5, 1.0, 0.3, 0.7])  # in the order of the volume


def test_a_memory_plan_counts_every_array_once_in_memory_and_by_slabs():
    """40 x 24 x 20 voxels, tiles of 16 at steps of 8, two at a time, SR and two classes, a mean over passes."""
    plan = tiles.plan((40, 24, 20), 16, 8)
    network = SimpleNamespace(device=torch.device("cpu"), bytes_of=lambda patch, count: 1000 * count)
    job = memory.TilingJob(plan, 3, held=700, averaged=True, after=10**9)
    voxels, plane, tile = 40 * 24 * 20, 24 * 20, 4 * 16**3
    shared = {"network": ("host", 2000 + 2 * tile * 4), "means": ("host", 2 * tile * 7)}
    sums = {rolling: memory.memory_of(plan, 3, "cpu", rolling) for rolling in (False, True)}
    found = {way: {what: row for what, *row in map(list, memory._rows(job, network, 2, way))} for way in WAYS}
    freed = sum(size for _, size in shared.values())
    assert {what: tuple(row) for what, row in found[memory.MEMORY].items()} == shared | {
        "image": ("host", 700 + 4 * voxels), "planes": ("host", 0), "sums": ("host", sums[False]),
        "agreement": ("host", 10**9 - freed), "libraries": ("host", 24 * 2**20),
    }  # fmt: skip
    window = 4 * 40 * plane  # four slabs of four tiles are a group: all planes
    assert {what: tuple(row) for what, row in found[memory.SLABS].items()} == shared | {
        "image": ("host", 700 + 4 * 3 * 16 * plane), "planes": ("host", window), "sums": ("host", sums[True]),
        "finished planes": ("host", 4 * 3 * 16 * plane), "result": ("disk", 4 * 3 * voxels),
        "agreement": ("host", 10**9 - freed - window), "libraries": ("host", 24 * 2**20),
    }  # fmt: skip


@pytest.mark.parametrize(("batch", "planes"), [(1, 16 + 8), (2, 40), (16, 40)])
def test_planes_that_are_held_are_those_that_the_slabs_of_a_group_see(batch, planes):
    """Of four slabs of four tiles, at steps of 8: two, or all, are a group of eight batches."""
    plan = tiles.plan((40, 24, 20), 16, 8)
    assert plan.grid == (4, 2, 2) and memory.GROUP_BATCHES == 8
    network = SimpleNamespace(device=torch.device("cpu"), bytes_of=lambda patch, count: 1000 * count)
    rows = memory._rows(memory.TilingJob(plan, 3, held=0, averaged=False, after=0), network, batch, memory.SLABS)
    assert {what: size for what, _, size in rows}["planes"] == 4 * planes * 24 * 20


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize(
    ("step", "window", "kind"), [(12, "constant", "Flat"), (3, "constant", "FlatSlabs"), (8, "gaussian", "Nested")]
)
def test_what_a_sum_is_planned_to_take_is_what_it_takes(step, window, kind, rolling):
    """But for the second row of a kernel, which a CPU does without."""
    plan = tiles.plan((40, 30, 37), 16, step, window=window)
    stitcher = Stitcher(plan, 3, rolling=rolling)
    taken = sum(array.nbytes for array in (stitcher.memory, *stitcher.adder.own.values()))
    row = 4 * 3 * 16 * 16 * 37 if kind == "Nested" else 0
    assert type(stitcher.adder).__name__ == kind and memory.memory_of(plan, 3, "cpu", rolling) == taken + row


def test_what_a_network_needs_grows_with_the_voxels_that_its_convolutions_see():
    """An axis has six more than the tile; a quarter more is held than is alive; weights once."""
    counted = network_module.Needs((58, 26, 10), 1600, 2, fixed=7)
    assert counted.of((58, 26, 10)) == 7 + 2000 and counted.of((122, 58, 26), 3) == 7 + 3 * 2000 * 2 * 2 * 2


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "more"), [(np.int16, {"dtype": "input"}), (np.float32, {"dtype": "input"}), (np.int16, {})]
)
def test_every_image_of_a_result_has_the_world_of_the_scan(tmp_path, model, stored, more):
    """Whatever the type that SR is stored in; the residual on the scan's own grid."""
    path = images.save(tmp_path / "a.nii", some(stored), rigid(MM), code=4)
    options_ = {"save_prob": True, "save_residual": True, "uncertainty": True, **more}
    files.infer_files([path], tmp_path / "out", model, **FAST, **options_)
    written = {p.name.split("_")[1].split(".")[0]: images.load(p) for p in (tmp_path / "out").glob("*.nii.gz")}
    assert set(written) == {"sr", "seg", "prob", "doubt", "residual"}
    assert {kind: volume.meta["space_code"] for kind, volume in written.items()} == dict.fromkeys(written, 4)
    for kind, volume in written.items():
        assert volume.data.shape == (SHAPE if kind == "residual" else (14, 12, 15))
        assert volume.spacing == pytest.approx(MM if kind == "residual" else (1, 1, 1))


def test_volumes_and_lengths_of_a_segmentation_are_those_of_the_results_grid(tmp_path, model, monkeypatch):
    """Where the scan's voxels are 2.5 times as large."""
    seen: dict[str, Any] = {}

    def spy(name, at):
        plain = getattr(image_module, name)
        monkeypatch.setattr(image_module, name, lambda *args: seen.update({name: args[at]}) or plain(*args))

    for name, at in (("segment", 1), ("enclosed", 2), ("judge", 2), ("on_zeros", 2)):
        spy(name, at)
    monkeypatch.setattr(image_module.purposes, "common", lambda purposes: Purpose(contrasts=("T1",)))
    path = images.save(tmp_path / "a.nii.gz", some(), rigid(MM))
    files.infer_files([path], tmp_path / "out", model, **FAST)
    assert seen["segment"] == seen["judge"] == pytest.approx(1.0) and seen["enclosed"] == pytest.approx((1, 1, 1))
    mm, fine = images.load(path).spacing, read_json(tmp_path / "out" / "a.json")["new_resolution"]
    expected = nearest(SHAPE, mm, (14, 12, 15), fine, "physical")  # of every voxel of the result the scan's
    assert all(map(np.array_equal, seen["on_zeros"], expected))


def test_the_picture_names_the_patch_the_step_and_the_threshold(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        "fastsrgan.pictures.figure.result_figure", lambda *args, **more: drawn.append((args, more)), raising=True
    )
    sr, low = np.ones((4, 4, 6), np.float32), Volume(np.ones((4, 4, 3), np.float32), np.diag([1.0, 1, 2, 1]))
    result = SimpleNamespace(sr=sr, affine=np.eye(4), report={"region": None})
    purpose = Purpose(structures=((1, "cortex"), (2, "white matter")))
    loaded = SimpleNamespace(volume=low, image=SimpleNamespace(name="case"), mask=None)
    record = {"weights": {"path": "w"}, "patch": 16, "step": 12, "threshold": 0.35, "made_for": purpose.to_dict()}
    record["plausibility"] = Verdict("red", ("worst", "other")).to_dict()
    image_module._picture(tmp_path / "a.png", loaded, result, sr > 0, record)
    ((target, volumes), more) = drawn[0]
    assert target == tmp_path / "a.png" and more.pop("captions")["seg"] == "probability above 0.35"
    assert more == {
        "title": "case", "footer": "weights w, patch 16, step 12", "structure": "cortex",
        "status": ("red", "plausibility red: worst; other"),
    }  # fmt: skip
    assert volumes["low"] is low and volumes["sr"].data is sr and volumes["seg"].data.all()


def test_slices_that_overlap_are_no_reason_to_leave_an_isotropic_scan_alone(tmp_path):
    volume = Volume(np.ones((4, 4, 4), np.float32), np.eye(4), (), {})
    assert [image_module._overlapping(volume, tmp_path / "a.nii", mm) for mm in (1.0, 1.005, 1.05, None)] == [
        False, False, True, False,
    ]  # fmt: skip
    write_json(tmp_path / "a.json", {"SliceThickness": 1.3})
    assert image_module._overlapping(volume, tmp_path / "a.nii", None)


def test_a_header_is_believed_up_to_slices_that_overlap_by_half(tmp_path):
    volume = Volume(np.ones((4, 4, 4), np.float32), np.diag([1.0, 1, 3, 1]), (), {})

    def told(**said):
        write_json(tmp_path / "a.json", said)
        return any_image.slice_thickness(volume, tmp_path / "a.nii").mm

    assert [told(SliceThickness=mm) for mm in (0.2, 0.4, 5.9, 6.1)] == [None, 0.4, 5.9, None]
    assert [told(SliceThickness=3, SpacingBetweenSlices=mm) for mm in (2.95, 3.05, 3.1)] == [3, 3, None]


def test_every_derivative_has_its_own_place_and_says_whether_the_skull_is_there(tmp_path):
    """Read back from the dataset: what was staged as one kind lies under the name of that kind alone."""
    raw, out, stage = (tmp_path / name for name in ("raw", "out", "stage"))
    for folder in (raw / "sub-01" / "anat", out, stage):
        folder.mkdir(parents=True)
    (raw / "sub-01/anat/sub-01_T2w.nii.gz").write_bytes(b"")
    write_json(raw / "sub-01/anat/sub-01_T2w.json", {"SkullStripped": True})
    kinds = ("seg", "prob", "mask", "doubt", "residual", "sr", "png")
    for kind in kinds:
        (stage / kind).write_bytes(kind.encode())
    known = [{"name": "cortex", "values": [3]}, {"name": "white", "values": [41]}]
    write_json(stage / "json", {"weights": {"structures": known}, "made_for": {}})
    (image,) = find_bids(raw)
    item = {"outputs": {kind: str(stage / kind) for kind in (*kinds, "json")}}
    placed = bids._place(item, image, raw, out, False)
    assert {kind: Path(path).read_bytes().decode() for kind, path in placed.items()} == {kind: kind for kind in kinds}
    names = {kind: Path(path).name.removeprefix("sub-01_").partition(".")[0] for kind, path in placed.items()}
    assert names == {
        "seg": "desc-cortexT2w_dseg", "prob": "desc-cortexT2w_probseg", "mask": "desc-maskT2w_dseg",
        "doubt": "desc-doubt_T2w", "residual": "desc-residual_T2w", "sr": "desc-sr_T2w", "png": "desc-sr_T2w",
    }  # fmt: skip
    words = {"seg": "Segmentation", "prob": "Probability", "mask": "Segmentation of cortex, white"}
    words |= {"doubt": "Standard deviation", "residual": "minus", "sr": "Super-resolution image"}
    for kind, word in words.items():
        told = read_json(sidecar(Path(placed[kind])))
        assert word in told["Description"] and told["Sources"] == ["bids:raw:sub-01/anat/sub-01_T2w.nii.gz"]
        suffix = parse(Path(placed[kind])).suffix
        assert told.get("SkullStripped") is (True if suffix in SUFFIXES else None), kind
    tables = {kind: sidecar(Path(placed[kind])).with_suffix(".tsv").read_text() for kind in ("seg", "mask")}
    assert tables == {
        "seg": "index\tname\n0\tbackground\n1\tstructure\n",
        "mask": "index\tname\n0\tbackground\n3\tcortex\n41\twhite\n",
    }
    assert not list(stage.iterdir())


@pytest.mark.parametrize(
    "said, stripped", [({"SkullStripped": True}, True), ({"SkullStripped": False}, False), ({}, False)]
)
def test_a_derivative_has_lost_its_skull_where_its_source_says_so_alone(tmp_path, said, stripped):
    """A field that is there and says no is no yes, and a raw image that says nothing has its skull."""
    raw, out, stage = (tmp_path / name for name in ("raw", "out", "stage"))
    for folder in (raw / "sub-01" / "anat", out, stage):
        folder.mkdir(parents=True)
    (raw / "sub-01/anat/sub-01_T2w.nii.gz").write_bytes(b"")
    write_json(raw / "sub-01/anat/sub-01_T2w.json", {"EchoTime": 0.1} | said)
    (stage / "sr").write_bytes(b"")
    write_json(stage / "json", {"weights": {}, "made_for": {}})
    (image,) = find_bids(raw)
    placed = bids._place({"outputs": {kind: str(stage / kind) for kind in ("sr", "json")}}, image, raw, out, False)
    assert read_json(sidecar(Path(placed["sr"])))["SkullStripped"] is stripped


def test_a_resumed_call_wants_the_same_volume_of_a_series(tmp_path, model):
    job = SimpleNamespace(
        outputs=lambda image: {"json": tmp_path / "a.json"},
        models=SimpleNamespace(made=lambda record, look: True),
        settings=replace(InferSettings(**FAST), volume=1),
    )
    path = images.save(tmp_path / "a.nii", some(), rigid(MM))
    image = SimpleNamespace(path=path, series=None)
    record = {"input": {"volume": 1, "sha256": images.sha256(path)}, "asked": job.settings.record()}
    write_json(tmp_path / "a.json", record)
    assert image_module.finished(image, job)
    for change, what in (({"volume": 0}, "volume"), ({"sha256": "0"}, "input")):
        write_json(tmp_path / "a.json", record | {"input": record["input"] | change})
        with pytest.raises(UsageError, match=f"another {what}"):
            image_module.finished(image, job)


def test_no_table_of_a_replaced_result_stands_beside_the_new_one(tmp_path):
    """A result without classes takes the place of one with: neither their image nor its sidecar nor its table stays."""
    raw, out, stage = (tmp_path / name for name in ("raw", "out", "stage"))
    for folder in (raw / "sub-01" / "anat", out, stage):
        folder.mkdir(parents=True)
    (raw / "sub-01/anat/sub-01_T1w.nii.gz").write_bytes(b"")
    (image,) = find_bids(raw)
    for kinds in (("seg", "mask", "sr"), ("seg", "sr")):
        for kind in kinds:
            (stage / kind).write_bytes(b"")
        known = [{"name": "cortex", "values": [3]}, {"name": "white", "values": [41]}]
        write_json(stage / "json", {"weights": {"structures": known}, "made_for": {}})
        bids._place({"outputs": {kind: str(stage / kind) for kind in (*kinds, "json")}}, image, raw, out, True)
        left = {path.name for path in out.rglob("*") if path.is_file()}
        expected = {"sub-01_desc-cortexT1w_dseg", "sub-01_desc-maskT1w_dseg"} if "mask" in kinds else set()
        expected |= {"sub-01_desc-cortexT1w_dseg"}
        assert left == {"sub-01_desc-sr_T1w.nii.gz", "sub-01_desc-sr_T1w.json"} | {
            f"{stem}.{end}" for stem in expected for end in ("nii.gz", "json", "tsv")
        }
