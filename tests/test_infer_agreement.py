"""The last step of an inference: SR, acquired again, is the scan; exact zeros stay; nothing else is touched."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from nifti_files import rigid

from fastsrgan.cli.main import main
from fastsrgan.compat.original import interpolation
from fastsrgan.errors import UsageError
from fastsrgan.infer import modes
from fastsrgan.infer import volume as infer
from fastsrgan.infer.memory import SLABS, plan_memory
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.volume.consistency import observation, residual
from fastsrgan.volume.geometry import Orientation, Volume

FAST = {"patch": 16, "step": 12, "device": "cpu"}
SHAPE, MM = (18, 14, 8), (1.0, 1.0, 3.0)
AFFINE = rigid(MM)


@pytest.fixture(scope="module")
def generator(near_the_spline):
    return near_the_spline


@pytest.fixture
def scan():
    """Smooth, all of it well above the lowest voxel: only in the column of that one the result is clipped."""
    x, y, z = np.meshgrid(*(np.linspace(0, 3, n) for n in SHAPE), indexing="ij")
    data = (500 + 100 * np.sin(x) * np.cos(y) + 50 * np.sin(2 * z)).astype(np.float32)
    data[0, 0, 0] = 20
    return data


def seen(shape=(18, 14, 24), **profile):
    return observation(SHAPE, MM, shape, (1, 1, 1), **profile)


@pytest.mark.parametrize(("profile", "thickness"), [("gaussian", 3.0), ("box", 3.0), ("gaussian", 2.0)])
def test_with_a_small_weight_the_result_acquired_again_is_the_scan(generator, scan, profile, thickness, caplog):
    caplog.set_level("INFO", logger="fastsrgan")
    options = {"profile": profile, "slice_thickness": thickness, "agree": 1e-5}
    done = infer_volume(scan, AFFINE, generator, **FAST, **options)
    d = seen(profile=profile, thickness_mm=thickness)
    alone = infer_volume(scan, AFFINE, generator, **FAST, agree="off")
    # D mixes voxels along z alone.
    # Found: 4.9e-4, 12
    assert np.abs(residual(done.sr, scan, d)[1:]).max() < 0.002 < 1 < np.abs(residual(alone.sr, scan, d)[1:]).max()
    assert np.array_equal(done.prob, alone.prob)
    told = done.report["agree"]
    assert (told["weight"], told["profile"], told["width_mm"]) == (1e-5, profile, thickness)
    percent = f"{told['residual_percent']:.2g} % ({told['residual_percent_without']:.2g} % without agreement"
    assert f"the result, acquired again, differs from the scan by {percent}" in caplog.text
    rms = [100 * np.sqrt(np.mean(residual(r.sr, scan, d) ** 2) / np.mean(scan**2)) for r in (done, alone)]
    # Found: 9e-8 (rounding)
    assert [told["residual_percent"], told["residual_percent_without"]] == pytest.approx(rms, rel=1e-6)
    assert alone.report["agree"] is None


def test_how_far_a_result_is_from_the_scan_does_not_depend_on_where_its_zero_is(generator, scan):
    """Below 0 intensities count from the lowest: an image moved far down would else agree with anything."""
    knows = copy.deepcopy(generator)
    knows.spec = replace(generator.spec, shifted=True)
    told = [
        infer_volume(scan - np.float32(low), AFFINE, knows, **FAST, agree=0.05, profile="box").report["agree"]
        for low in (20, 1000)
    ]
    for name in ("residual_percent", "residual_percent_without", "residual_percent_network"):
        assert told[1][name] == pytest.approx(told[0][name], rel=1e-4) and told[0][name] > 0.01, name  # found: 1.7e-6


def test_auto_takes_a_narrow_profile_and_a_weight_that_grows_with_the_noise(generator):
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(0, 6, n) for n in (40, 40, 16)), indexing="ij")
    clean = (500 + 100 * np.sin(x) * np.cos(y) + 50 * np.sin(3 * z)).astype(np.float32)
    found = []
    for noise in (0, 10, 60):
        data = (clean + noise * rng.normal(size=clean.shape)).astype(np.float32)
        found.append(infer_volume(data, AFFINE, generator, **FAST).report["agree"])
    assert found[0]["weight"] == 0.03 and (found[0]["width_mm"], found[0]["thickness_mm"]) == (2.4, 3.0)
    assert found[0]["weight"] < found[1]["weight"] <= found[2]["weight"] and found[2]["weight"] >= 0.5  # found: 27
    assert found[2]["noise"] == pytest.approx(60, rel=0.15)  # found: 0.018


@pytest.mark.parametrize("share", [0.5, 0.1, 0.03, 0.0])
def test_the_weight_is_the_noise_over_what_the_result_lacks_where_the_spline_lacks_more(generator, monkeypatch, share):
    """The better a result is, the less it has to gain from the scan; a result worse than the spline changes nothing."""
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(0, 6, n) for n in (40, 40, 16)), indexing="ij")
    data = (500 + 100 * np.sin(x) * np.cos(y) + 50 * np.sin(9 * z) + 5 * rng.normal(size=x.shape)).astype(np.float32)
    found, judged = [], []
    for lacks in (1e6, share):
        monkeypatch.setattr(modes, "lacking_sd", lambda left, *more, lacks=lacks: judged.append(left) or lacks * 5)
        found.append(infer_volume(data, AFFINE, generator, **FAST).report["agree"])
    spline, result = found
    bound = 1000 if share == 0 else min(1000, (result["noise"] / (5 * share)) ** 2)
    assert spline["weight"] < 3 and result["weight"] == float(f"{max(spline['weight'], bound):.3g}")
    assert result["noise"] == spline["noise"] and all(left.shape == data.shape for left in judged)


@pytest.mark.parametrize("thickness", ["auto", 2.0])
@pytest.mark.parametrize("profile", ["auto", "box", "gaussian"])
def test_what_is_missing_is_judged_by_the_gaussian_as_wide_as_the_slices_are_thick(
    generator, scan, monkeypatch, profile, thickness
):
    """Whatever profile the result is made to agree with: a narrower one would find that less is missing."""
    judged, real = [], modes.choose_weight
    monkeypatch.setattr(modes, "choose_weight", lambda *given: judged.append(given[1]) or real(*given))
    infer_volume(scan, AFFINE, generator, **FAST, profile=profile, slice_thickness=thickness)
    (by,) = judged
    expected = seen(profile="gaussian", thickness_mm=None if thickness == "auto" else thickness)
    assert [matrix is None for matrix in by.down] == [True, True, False]
    assert np.abs(by.down[2] - expected.down[2]).max() < 1e-12  # found: 6.7e-16


@pytest.mark.parametrize("resolution", [None, "same"])
def test_a_result_on_the_scan_s_grid_is_left_alone(generator, scan, resolution):
    affine = np.eye(4) if resolution is None else AFFINE
    options = {**FAST, "new_resolution": resolution}
    one, off = (infer_volume(scan, affine, generator, **options, agree=w) for w in (1e-3, "off"))
    assert np.array_equal(one.sr, off.sr) and one.report["agree"] is None


def test_the_original_s_geometry_is_left_alone_unless_asked(generator, scan):
    options = {**FAST, "geometry": "segsrgan", "new_resolution": 1.0}
    auto, off = (infer_volume(scan, AFFINE, generator, **options, agree=w) for w in ("auto", "off"))
    assert np.array_equal(auto.sr, off.sr) and auto.report["agree"] is None
    assert infer_volume(scan, AFFINE, generator, **options, agree=0.1).report["agree"]["weight"] == 0.1
    with pytest.raises(UsageError, match="agree: how the scan sees"):
        infer_volume(scan, AFFINE, generator, **options, interpolate=interpolation("scipy", spline_order=1), agree=0.1)
    for more in ({"profile": "box"}, {"slice_thickness": 2.0}):
        with pytest.raises(UsageError, match="no use without agreement"):
            infer_volume(scan, AFFINE, generator, **options, **more)


@pytest.mark.parametrize("wrong", [{"agree": 0}, {"agree": -1.0}, {"agree": "on"}, {"agree": np.inf}, {"profile": "x"}])
def test_nonsense_is_refused(generator, scan, wrong):
    with pytest.raises(UsageError):
        infer_volume(scan, AFFINE, generator, **FAST, **wrong)


@pytest.mark.parametrize("resolution", [None, 0.8])
def test_by_slabs_it_is_the_same_to_the_bit(generator, scan, monkeypatch, tmp_path, resolution):
    monkeypatch.setattr(modes, "SLAB_BYTES", 4 * 18 * 14 * 5)
    turned = np.array([[0, -1, 0, 5], [0, 0, 1, -3], [1, 0, 0, 9], [0, 0, 0, 1.0]]) @ AFFINE
    options = {**FAST, "new_resolution": resolution}
    whole = infer_volume(scan, turned, generator, **options)
    monkeypatch.setattr(infer, "plan_memory", lambda job, *args: replace(plan_memory(job, *args), mode=SLABS))
    done = infer_volume(scan, turned, generator, **options, scratch=tmp_path / "s")
    assert isinstance(done.sr, np.memmap) and np.array_equal(done.sr, whole.sr)
    monkeypatch.setattr(modes, "SLAB_BYTES", 1 << 24)
    uncut = infer_volume(scan, turned, generator, **options, scratch=tmp_path / "s")
    assert np.allclose(uncut.sr, whole.sr, rtol=1e-6)  # found: 2.2e-7


def test_a_run_that_ends_meanwhile_is_not_corrected_twice(generator, scan, monkeypatch, tmp_path):
    expected = infer_volume(scan, AFFINE, generator, **FAST)
    monkeypatch.setattr(infer, "plan_memory", lambda job, *args: replace(plan_memory(job, *args), mode=SLABS))
    real = modes.agree

    def dies(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(modes, "agree", dies)
    with pytest.raises(KeyboardInterrupt):
        infer_volume(scan, AFFINE, generator, **FAST, scratch=tmp_path / "s")
    monkeypatch.setattr(modes, "agree", real)
    again = infer_volume(scan, AFFINE, generator, **FAST, scratch=tmp_path / "s")
    assert np.array_equal(again.sr, expected.sr)


@pytest.mark.parametrize("stored", [Orientation((2, 0, 1), (True, False, True)), Orientation((1, 0, 2))], ids=str)
def test_a_scan_stored_otherwise_gives_the_same_in_the_world(generator, scan, stored):
    scan[:, :3] = 0
    plain = infer_volume(scan, AFFINE, generator, **FAST)
    moved = infer_volume(stored.apply(scan), stored.affine(AFFINE, SHAPE), generator, **FAST)
    assert np.array_equal(moved.sr, stored.apply(plain.sr)) and np.array_equal(moved.prob, stored.apply(plain.prob))
    assert moved.report["voxels_kept_empty"] == plain.report["voxels_kept_empty"] > 0


@pytest.mark.parametrize("size", [(2, 2, 1), (2, 2, 3), (1, 2, 1), (2, 1, 1), (1.5, 1.5, 1)], ids=str)
def test_a_result_that_is_coarser_in_the_planes_agrees_as_well(generator, scan, size):
    """On no axis, or on one, it has the scan's own voxels; where on none it ended with an error about their number."""
    done = infer_volume(scan, AFFINE, generator, **FAST, new_resolution=list(size))
    told = done.report["agree"]
    assert done.sr.shape == tuple(round(n * mm / new) for n, mm, new in zip(SHAPE, MM, size, strict=True))
    if size[2] < MM[2]:
        assert told["residual_percent"] < told["residual_percent_without"]


def test_exact_zeros_stay_zero_and_are_not_segmented(generator, scan):
    scan[:6, :, :] = 0
    scan[10, :, 4] = 0  # its neighbours across the slices are tissue
    done = infer_volume(scan, AFFINE, generator, **FAST)
    assert not done.sr[:6].any() and not done.prob[:, :6].any() and (done.prob[:, 6:] > 0).all()
    assert done.report["voxels_kept_empty"] == 6 * 14 * 24
    off = infer_volume(scan, AFFINE, generator, **FAST, agree="off")
    assert off.sr[:6].any() and off.prob[:, :6].all()
    few = scan.copy()
    few[few == 0] = 400
    few[0, 0] = 0  # less than one voxel in twenty
    assert "voxels_kept_empty" not in infer_volume(few, AFFINE, generator, **FAST).report
    below = scan.copy()
    below[17, :7] = -5
    assert "voxels_kept_empty" not in infer_volume(below, AFFINE, generator, **FAST).report


def test_a_masked_scan_that_was_standardised_keeps_what_it_has_around_it(generator, scan):
    """(x - mean) / sd of the whole image leaves another constant than 0 outside a mask."""
    scan[:6] = 0
    plain = infer_volume(scan, AFFINE, generator, **FAST)
    moved = ((scan - 150) / 64).astype(np.float32)
    done = infer_volume(moved, AFFINE, generator, **FAST)
    assert (done.sr[:6] == moved.min()).all() and not done.prob[:, :6].any() and (done.prob[:, 6:] > 0).all()
    assert done.report["voxels_kept_empty"] == plain.report["voxels_kept_empty"] > 0


def test_a_result_is_empty_only_behind_slices_whose_neighbours_on_both_sides_are_empty(generator, scan):
    scan[:6] = 0
    scan[10:, :, 2:5] = 0
    prob = infer_volume(scan, AFFINE, generator, **FAST).prob[:, 10:]
    assert not prob[..., 9:12].any()  # the middle one of three empty slices
    assert (prob[..., :9] > 0).all() and (prob[..., 12:] > 0).all()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, generator, scan):
    weights.save_generator(tmp_path / "w.safetensors", generator)
    images.save(tmp_path / "a.nii.gz", scan, AFFINE)
    return tmp_path


def call(files, *words):
    first = [files / "a.nii.gz", "-o", files / "out", "-w", files / "w.safetensors", "--patch", 16, "--step", 12]
    code = main(["--quiet", "infer", *map(str, [*first, *words])])
    return json.loads((files / "out" / "a.json").read_text()) if code == 0 else code


def test_the_record_the_residual_and_what_a_resumed_call_compares(files, scan):
    record = call(files, "--agree", "0.01", "--profile", "box", "--slice-thickness", "2.5", "--save-residual")
    told = record["agree"]
    assert told["profile"] == "box" and told["thickness_mm"] == 2.5 and told["thickness_from"] == "asked"
    assert 0 < told["residual_percent"] < told["residual_percent_without"]
    assert (
        told["seconds"] > 0 < record["tile_seconds"] and told["seconds"] + record["tile_seconds"] <= record["seconds"]
    )
    left = images.load(files / "out" / record["outputs"]["residual"])
    sr = images.load(files / "out" / record["outputs"]["sr"]).data
    assert np.allclose(left.affine, AFFINE, atol=1e-6)  # found: 4e-8 (rounding)
    assert np.allclose(left.data, residual(sr, scan, seen(profile="box", thickness_mm=2.5)), atol=2e-4)  # found: 6.1e-5
    assert call(files, "--agree", "0.01", "--profile", "box", "--slice-thickness", "2.5", "--resume") == record
    for other in (["0.02", "box", "2.5"], ["0.01", "gaussian", "2.5"], ["0.01", "box", "2"]):
        words = zip(("--agree", "--profile", "--slice-thickness"), other, strict=True)
        assert call(files, *(word for pair in words for word in pair), "--resume") == 2


@pytest.mark.parametrize(("thickness", "odd"), [(50, True), (0.2, True), (6, False), (0.5, False)])
def test_a_thickness_that_no_header_would_be_believed_is_used_with_a_warning(files, thickness, odd):
    """50 in place of 5.0: slices 3 mm apart."""
    record = call(files, "--slice-thickness", thickness)
    told = [text for text in record["warnings"] if text.startswith(f"--slice-thickness {thickness:g} mm is used")]
    assert bool(told) == odd and record["agree"]["thickness_mm"] == thickness


def test_the_thickness_of_a_sidecar_is_used_and_recorded(files):
    (files / "a.json").write_text(json.dumps({"SliceThickness": 2.5, "SpacingBetweenSlices": 3.0}))
    told = call(files, "--profile", "gaussian")["agree"]
    assert told["thickness_mm"] == 2.5 and told["thickness_from"] == "a.json"
    told = call(files, "--overwrite")["agree"]
    assert (told["width_mm"], told["thickness_mm"]) == (2.0, 2.5) and told["profile"] == "gaussian"  # 0.8 of it
    (files / "a.json").write_text(json.dumps({"SliceThickness": 2.5, "SpacingBetweenSlices": 5.0}))
    record = call(files, "--overwrite")
    assert record["agree"]["thickness_from"] == "spacing" and "resampled" in record["warnings"][0]


@pytest.mark.parametrize(
    ("spacing", "meta", "expected"),
    [
        (MM, {"slice_thickness_mm": 2.0, "slice_distance_mm": 3.0}, 2.0),
        (MM, {"slice_thickness_mm": None, "slice_distance_mm": 3.0}, None),
        ((3.0, 1.0, 1.0), {"slice_thickness_mm": 1.0, "slice_distance_mm": 1.0}, None),
    ],
)
def test_the_thickness_of_dicom(spacing, meta, expected):
    volume = Volume(np.ones(SHAPE), np.diag([*spacing, 1]), (), {"format": "DICOM", **meta})
    found = any_image.slice_thickness(volume, "series")
    assert (found and found.mm) == expected


@pytest.mark.parametrize(
    "text", ['{"SliceThickness": "2.5"}', '{"SliceThickness": 0}', '{"SliceThickness": 2.5,}', "[]", ""]
)
def test_a_sidecar_that_cannot_be_used_is_told(tmp_path, text):
    """Was passed over in silence, and the slices taken to be as thick as they are apart."""
    (tmp_path / "a.json").write_text(text, encoding="utf8")
    found = any_image.slice_thickness(Volume(np.ones(SHAPE), AFFINE), tmp_path / "a.nii.gz")
    assert found is not None and found.mm is None and found.source.startswith("a.json: ")


def test_a_sidecar_that_was_not_fetched_says_how_to_fetch_it(tmp_path):
    (tmp_path / "a.json").symlink_to(".git/annex/objects/a/b")
    found = any_image.slice_thickness(Volume(np.ones(SHAPE), AFFINE), tmp_path / "a.nii.gz")
    assert found is not None and found.mm is None and "git annex get" in found.source
