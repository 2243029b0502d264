"""Evaluation of a pair: figures of one grid and of grids that differ, baselines made from the scan, files, pictures."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
from phantom import head
from scipy import ndimage

from fastsrgan.core.files import write_json
from fastsrgan.demo.run import acquire
from fastsrgan.errors import InputError
from fastsrgan.evaluate import grids, metrics
from fastsrgan.evaluate import metrics as metrics_module
from fastsrgan.evaluate import pair as evaluate
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.io.bids import RECORD
from fastsrgan.volume.geometry import Orientation, Volume
from fastsrgan.volume.resample import apply_axes, degrade_matrix, upsample_matrix

SHAPE = (22, 26, 18)


def _blobs(world_xyz: np.ndarray) -> np.ndarray:
    """A smooth, strictly positive image as a function of world millimetres (3, ...)."""
    x, y, z = world_xyz
    return 100 + 30 * np.sin(x / 5) + 25 * np.cos(y / 6 + 0.3) + 20 * np.sin(z / 4 + x / 9)


def _world(shape, affine):
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    return np.einsum("ij,jxyz->ixyz", affine[:3, :3], index) + affine[:3, 3].reshape(3, 1, 1, 1)


def _volume(shape=SHAPE, affine=None):
    affine = np.diag([1.0, 1, 1, 1]) if affine is None else np.asarray(affine, float)
    return Volume(_blobs(_world(shape, affine)).astype(np.float32), affine)


def _shifted(x):
    affine = np.eye(4)
    affine[0, 3] = x
    return affine


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    hr = _volume()
    label = Volume((hr.data > 110).astype(np.uint8), hr.affine)
    sr = Volume((hr.data + rng.normal(0, 3, SHAPE)).astype(np.float32), hr.affine)
    seg = Volume((sr.data > 110).astype(np.uint8), hr.affine)
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:16, 6:18, 6:12] = 1
    return {"sr": sr, "hr": hr, "seg": seg, "label": label, "mask": Volume(mask, hr.affine)}


@pytest.fixture
def files(tmp_path, pair):
    return {n: images.save(tmp_path / f"{n}.nii.gz", v.data, v.affine) for n, v in pair.items()}


def test_a_doubt_is_compared_with_the_error_inside_the_mask(pair):
    """Outside it the doubt is wrong by a factor of a hundred, which nothing of the result may tell."""
    inside = pair["mask"].data > 0
    doubt = np.abs(pair["sr"].data - pair["hr"].data) + np.float32(0.5)
    doubt[~inside] *= 100
    found = evaluate.evaluate_pair(**pair, doubt=Volume(doubt, pair["hr"].affine))["doubt"]
    assert found == metrics.calibration(pair["sr"].data, pair["hr"].data, doubt, inside)
    assert 0.5 < found["error_over_doubt"] < 1  # found: 0.88
    without = evaluate.evaluate_pair(pair["sr"], pair["hr"], doubt=Volume(doubt, pair["hr"].affine))["doubt"]
    assert without["error_over_doubt"] < 0.1  # found: 0.009


def test_one_grid_gives_the_metrics_themselves(pair):
    result = evaluate.evaluate_pair(**pair)
    sr, hr, mask = pair["sr"].data, pair["hr"].data, pair["mask"].data
    seg, label = pair["seg"].data, pair["label"].data
    assert list(result["image"]) == ["whole", "mask", "label"]
    for region, inside in {"whole": None, "mask": mask, "label": label}.items():
        assert result["image"][region] == {
            "psnr_db": metrics.psnr(sr, hr, inside),
            "psnr_range_db": pytest.approx(metrics.psnr(sr, hr, inside, data_range=float(hr.max() - hr.min()))),
            "ssim": metrics.ssim(sr, hr, inside),
            "ssim_uniform": metrics.ssim(sr, hr, inside, window=metrics.UNIFORM),
            "mae": metrics.mae(sr, hr, inside),
            "mse": metrics.mse(sr, hr, inside),
        }
    assert result["segmentation"] == {
        "dice": metrics.dice(seg, label),
        **metrics_module.surface_scores(seg, label, (1, 1, 1)),
        **metrics.components(seg, label),
        "structure_mae": metrics.mae(sr, hr, seg),
        "volume_ml": pytest.approx(seg.sum() / 1000),
        "label_components": metrics.connected_components(label),
        "label_volume_ml": pytest.approx(label.sum() / 1000),
    }
    assert result["notes"] == []


def test_results_are_json_and_every_figure_is_defined(pair):
    result = evaluate.evaluate_pair(**pair, baseline=pair["sr"], baseline_seg=pair["seg"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    told = {*result["image"]["whole"], *result["segmentation"]}
    for figure in told:
        assert figure in result["definitions"]
    assert "region mask" in result["definitions"]


def test_the_gain_is_the_difference_to_the_baseline(pair):
    worse = Volume(pair["sr"].data + np.float32(4), pair["sr"].affine)
    empty = Volume(np.zeros(SHAPE, np.uint8), pair["sr"].affine)
    result = evaluate.evaluate_pair(**pair, baseline=worse, baseline_seg=empty)
    own, base, gain = result["image"], result["baseline"]["image"], result["gain"]["image"]
    assert gain["mask"]["psnr_db"] == own["mask"]["psnr_db"] - base["mask"]["psnr_db"] > 0
    assert gain["whole"]["mae"] == own["whole"]["mae"] - base["whole"]["mae"] < 0
    assert result["gain"]["segmentation"]["dice"] == result["segmentation"]["dice"]
    assert "label_components" not in result["gain"]["segmentation"]


def test_a_baseline_segmentation_may_come_without_an_image(pair):
    result = evaluate.evaluate_pair(**pair, baseline_seg=pair["label"])
    assert result["baseline"] == {"segmentation": result["baseline"]["segmentation"]}
    assert result["baseline"]["segmentation"]["dice"] == 1


def test_identical_images_have_no_finite_psnr(pair):
    result = evaluate.evaluate_pair(pair["hr"], pair["hr"])
    assert result["image"]["whole"]["psnr_db"] is None
    assert result["image"]["whole"]["ssim"] == pytest.approx(1)
    assert "PSNR is infinite" in result["notes"][0]


def test_small_volumes_have_no_ssim_but_the_rest(pair):
    small = Volume(pair["hr"].data[:8, :8, :8], pair["hr"].affine)
    other = Volume(pair["sr"].data[:8, :8, :8], pair["hr"].affine)
    result = evaluate.evaluate_pair(other, small)
    assert result["image"]["whole"]["ssim"] is None
    assert result["image"]["whole"]["psnr_db"] > 20
    assert result["image"]["whole"]["ssim_uniform"] > 0  # its window is smaller
    assert "8 x 8 x 8" in result["notes"][0]


def test_other_intensity_units_are_noted(pair):
    result = evaluate.evaluate_pair(Volume(pair["sr"].data / 255, pair["sr"].affine), pair["hr"])
    assert any("units" in note for note in result["notes"])


STORED = {
    "flipped and permuted": np.array([[0, 0, -1, 21], [1, 0, 0, 0], [0, -1, 0, 17], [0, 0, 0, 1.0]]),
    "shifted by a fraction": np.array([[1, 0, 0, -0.37], [0, 1, 0, 0.21], [0, 0, 1, -0.4], [0, 0, 0, 1.0]]),
    "finer": np.array([[0.5, 0, 0, -0.25], [0, 0.5, 0, -0.25], [0, 0, 0.5, -0.25], [0, 0, 0, 1.0]]),
}
SIZES = {"flipped and permuted": (26, 18, 22), "shifted by a fraction": (23, 27, 19), "finer": (44, 52, 36)}


@pytest.mark.parametrize("case", STORED)
def test_another_grid_is_resampled_in_world_space(case, caplog):
    hr = _volume()
    sr = _volume(SIZES[case], STORED[case])
    label = Volume((hr.data > 110).astype(np.uint8), hr.affine)
    seg = Volume((sr.data > 110).astype(np.uint8), sr.affine)
    with caplog.at_level(logging.INFO, "fastsrgan"):
        result = evaluate.evaluate_pair(sr, hr, seg=seg, label=label)
    # A wrong axis, direction or half-voxel shift would cost far more than interpolation does.
    assert result["image"]["whole"]["mae"] < 0.5  # found: 0.056
    assert result["segmentation"]["dice"] > 0.93  # found: 0.96
    assert any("cubic spline" in note for note in result["notes"])
    assert any("nearest voxel" in note for note in result["notes"])
    assert "resampled" in caplog.text


@pytest.mark.parametrize("order", [1, 3])
def test_a_constant_image_is_constant_up_to_the_edge_of_its_field_of_view(order):
    """Also in the half voxel beyond the outermost centres, where thick slices have several voxels of the reference."""
    scan = Volume(np.full((6, 7, 5), 80.0, np.float32), np.diag([1.0, 1.0, 4.0, 1.0]))
    like = np.diag([0.5, 1.0, 1.0, 1.0])
    like[:3, 3] = -0.25, 0, -1.5  # centres of the reference's first voxels: its corner is the scan's
    moved = grids.onto_grid(scan, Volume(np.zeros((12, 7, 20), np.float32), like), order=order, notes=[])
    assert np.abs(moved.data - 80).max() < 1e-3  # found: 6.1e-5


def test_a_grid_stored_in_another_order_is_exact(pair):
    axes, flip = (2, 0, 1), np.s_[::-1, :, :]
    moved = {}
    for name in ("sr", "seg"):
        affine = np.zeros((4, 4))
        affine[list(axes), range(3)] = [-1, 1, 1]
        affine[:, 3] = [0, 0, 0, 1]
        affine[axes[0], 3] = SHAPE[axes[0]] - 1
        moved[name] = Volume(pair[name].data.transpose(axes)[flip], pair["hr"].affine @ affine)
    result = evaluate.evaluate_pair(**pair | moved)
    expected = evaluate.evaluate_pair(**pair)
    assert result["segmentation"] == expected["segmentation"]
    # Found: 0 (rounding)
    assert result["image"]["mask"]["mse"] == pytest.approx(expected["image"]["mask"]["mse"], rel=1e-6)


def test_what_lies_outside_the_field_of_view_is_zero_and_said():
    hr = _volume()
    affine = hr.affine.copy()
    affine[0, 3] = 11  # the right half only
    sr = _volume((11, 26, 18), affine)
    notes: list[str] = []
    moved = grids.onto_grid(sr, hr, name="SR", notes=notes)
    assert (moved.data[:11] == 0).all()
    np.testing.assert_allclose(moved.data[11:], hr.data[11:], rtol=1e-6)  # found: 0 (rounding)
    assert "50.0 %" in notes[0]


def test_half_a_voxel_of_border_belongs_to_the_field_of_view():
    hr = _volume((20, 20, 20))
    coarse = Volume(
        ndimage.zoom(hr.data, 0.5, order=1), np.diag([2, 2, 2, 1.0]) + np.array([[0, 0, 0, 0.5]] * 3 + [[0] * 4])
    )
    assert (grids.onto_grid(coarse, hr).data > 0).all()


def test_volumes_that_do_not_meet_are_refused(pair):
    with pytest.raises(InputError, match="SR: does not overlap"):
        evaluate.evaluate_pair(Volume(pair["sr"].data, _shifted(500)), Volume(pair["hr"].data, _shifted(-1)))


def test_a_segmentation_without_a_label_is_refused(pair):
    with pytest.raises(InputError, match="no label"):
        evaluate.evaluate_pair(pair["sr"], pair["hr"], seg=pair["seg"])


def test_tiny_differences_of_the_affine_are_one_grid(pair):
    affine = pair["sr"].affine + 1e-5
    affine[3] = [0, 0, 0, 1]
    assert grids.onto_grid(Volume(pair["sr"].data, affine), pair["hr"]).data is pair["sr"].data


def test_files_give_what_volumes_give(files, pair):
    result = evaluate.evaluate_files(files["sr"], files["hr"], files["seg"], files["label"], mask=files["mask"])
    expected = evaluate.evaluate_pair(**pair)
    assert result["image"]["mask"] == pytest.approx(expected["image"]["mask"])
    assert result["segmentation"] == pytest.approx(expected["segmentation"])
    assert result["files"]["seg"] == str(files["seg"])


def test_a_mask_is_what_infer_takes_for_one_whatever_its_numbers(files, pair, tmp_path):
    """Above zero is inside: `evaluate` refused fractions and numbers below 0 or above 255."""
    inside = pair["mask"].data > 0
    values = np.where(inside, np.float32(0.25), np.float32(-3))
    values[7, 7, 7] = 1000.5
    path = images.save(tmp_path / "m.nii.gz", values, pair["hr"].affine)
    assert np.array_equal(any_image.load_mask(path, pair["hr"]).data > 0, inside)
    plain = evaluate.evaluate_files(files["sr"], files["hr"], mask=files["mask"])["image"]["mask"]
    assert evaluate.evaluate_files(files["sr"], files["hr"], mask=path)["image"]["mask"] == plain
    volumes = {name: pair[name] for name in ("sr", "hr")}
    given = Volume(values, pair["hr"].affine)
    assert evaluate.evaluate_pair(**volumes, mask=given)["image"]["mask"] == pytest.approx(plain)
    none = images.save(tmp_path / "none.nii.gz", -np.ones_like(values), pair["hr"].affine)
    with pytest.raises(InputError, match="the mask marks no voxel"):
        evaluate.evaluate_files(files["sr"], files["hr"], mask=none)


@pytest.mark.parametrize("bids", [False, True])
def test_a_doubt_that_the_record_does_not_name_is_another_s(files, tmp_path, bids):
    names = ("a_desc-sr_T2w", "a_desc-doubt_T2w", "a_desc-sr_T2w") if bids else ("a_sr", "a_doubt", "a")
    sr, doubt, record = (tmp_path / f"{n}{e}" for n, e in zip(names, (".nii.gz", ".nii.gz", ".json"), strict=True))
    files["sr"].rename(sr)
    shutil.copy(files["hr"], doubt)

    def used(outputs):
        told = {} if outputs is None else {"outputs": {kind: f"elsewhere/{kind}.nii.gz" for kind in outputs}}
        write_json(record, {RECORD: told} if bids else told)
        return "doubt" in evaluate.evaluate_files(sr, files["hr"])["files"]

    assert used(("sr", "seg", "doubt")) and used(None) and not used(("sr", "seg"))
    record.unlink()
    assert "doubt" in evaluate.evaluate_files(sr, files["hr"])["files"]  # nothing is known: the name says it
    write_json(record, {"outputs": {"sr": "x"}})
    assert "doubt" in evaluate.evaluate_files(sr, files["hr"], doubt=doubt)["files"]  # asked for


def test_a_probability_map_is_thresholded(files, pair, tmp_path):
    soft = images.save(tmp_path / "prob.nii.gz", np.where(pair["seg"].data > 0, 0.7, 0.4).astype(np.float32), np.eye(4))
    result = evaluate.evaluate_files(files["sr"], files["hr"], soft, files["label"])
    assert result["segmentation"] == evaluate.evaluate_pair(**pair)["segmentation"]


def test_an_empty_segmentation_has_no_surface_distance_and_says_so(pair):
    empty = Volume(np.zeros(SHAPE, np.uint8), pair["hr"].affine)
    result = evaluate.evaluate_pair(pair["sr"], pair["hr"], seg=empty, label=pair["label"])
    assert result["segmentation"]["hausdorff95_mm"] is None and result["segmentation"]["dice"] == 0
    assert any("no surface distance" in note for note in result["notes"])


def test_distances_are_in_mm_of_an_anisotropic_grid(pair):
    affine = np.diag([0.5, 0.7, 3.0, 1])
    moved = {name: Volume(volume.data, affine) for name, volume in pair.items()}
    result = evaluate.evaluate_pair(**moved)["segmentation"]
    expected = metrics_module.surface_scores(pair["seg"].data, pair["label"].data, (0.5, 0.7, 3.0))
    assert {name: result[name] for name in expected} == expected


HEAD = (33, 30, 36)
RATIOS = [(1, 1, 3), (1, 2, 4), (3, 1, 1)]


def _acquired(low_res):
    """A head, its label, the scan with its spline, and the label map by the matrices of the observation model."""
    phantom = head(HEAD, (4.0, 4.0, 4.0))
    hr, label = Volume(phantom.data, phantom.affine), Volume(phantom.label, phantom.affine)
    scan, spline, _ = acquire(hr, label, tuple(4.0 * r for r in low_res))
    sizes = list(zip(HEAD, scan.data.shape, low_res, strict=True))
    drawn = apply_axes(label.data.astype(np.float32), [degrade_matrix(n, 1.0, r) for n, _, r in sizes]) > 0.5
    up = [None if m == n else upsample_matrix(m, n, 1.0 / r) for n, m, r in sizes]
    return hr, label, scan, spline, Volume(apply_axes(drawn.astype(np.float32), up), hr.affine)


@pytest.mark.parametrize("low_res", RATIOS)
def test_the_scans_baselines_are_the_networks_input_and_the_readers_label_map(low_res):
    hr, label, scan, spline, label_map = _acquired(low_res)
    result = evaluate.evaluate_pair(hr, hr, seg=label, label=label, lr=scan)
    expected = evaluate.evaluate_pair(spline, hr, seg=label_map, label=label)
    found = result["baseline"]
    # Found: 3.1e-8 (rounding)
    assert found["image"]["whole"]["psnr_db"] == pytest.approx(expected["image"]["whole"]["psnr_db"], abs=1e-6)
    # Found: 5.6e-9 (rounding)
    assert found["image"]["whole"]["ssim"] == pytest.approx(expected["image"]["whole"]["ssim"], abs=1e-6)
    assert found["segmentation"]["dice"] == pytest.approx(expected["segmentation"]["dice"], abs=0.01)  # found: 0
    assert result["gain"]["segmentation"]["dice"] == 1 - found["segmentation"]["dice"] > 0
    assert "cubic spline" in result["baselines"]["image"] and "table 2" in result["baselines"]["segmentation"]
    assert not any("grid differs" in note for note in result["notes"])  # a scan's always does


def test_a_scan_that_misses_a_part_of_the_truth_is_scored_where_it_is():
    hr, label, scan, *_ = _acquired((1, 1, 3))
    cut = Volume(np.ascontiguousarray(scan.data[:, :, :8]), scan.affine)
    result = evaluate.evaluate_pair(hr, hr, seg=label, label=label, lr=cut)
    (note,) = [n for n in result["notes"] if "field of view" in n]
    assert note.startswith("scored on the overlap") and note.endswith("baseline")
    near = Volume(hr.data[:, :, : 8 * 3], hr.affine)
    expected = evaluate.evaluate_pair(near, near, lr=cut)["baseline"]["image"]["whole"]
    # Found: 0 (rounding)
    assert result["baseline"]["image"]["whole"]["mse"] == pytest.approx(expected["mse"], rel=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_images_of_different_extent_are_scored_where_both_are(pair, turned, caplog):
    """Whatever lies outside the SR's field of view changes no figure: as if the truth had been cut to it."""
    pair = {n: Volume(v.data, _shifted(-2)) for n, v in pair.items()}
    part = (slice(3, None), slice(None, -4), slice(None))
    affine = _shifted(1)
    small = {n: Volume(np.ascontiguousarray(pair[n].data[part]), affine) for n in ("sr", "seg")}
    if turned:  # the overlap is no box
        spin = np.array([[0.94, -0.342, 0, 3], [0.342, 0.94, 0, -3], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        small = {n: Volume(pair[n].data, spin) for n in ("sr", "seg")}
    cut = pair | small
    with caplog.at_level(logging.INFO, "fastsrgan"):
        found = evaluate.evaluate_pair(**cut, subject="case 7")
    (note,) = [n for n in found["notes"] if "overlap" in n]
    assert f"case 7: {note}" in caplog.text
    # Segmentation and doubt reach as far as the SR does: nothing that is scored was set to 0.
    more = {"doubt": small["sr"], "structures": {"x": (small["seg"], pair["label"])}}
    assert not [n for n in evaluate.evaluate_pair(**cut, **more)["notes"] if "set to 0" in n]
    assert not [n for n in found["notes"] if "set to 0" in n]
    if not turned:
        fewer = Volume(np.ascontiguousarray(small["seg"].data[4:]), affine @ _shifted(4))
        told = [n for n in evaluate.evaluate_pair(**cut | {"seg": fewer})["notes"] if "set to 0" in n]
        share = 100 * 4 / small["seg"].data.shape[0]
        assert len(told) == 1 and told[0].startswith("segmentation: ")
        assert told[0].endswith(
            f"; {share:.1f} % of the part that is scored lies outside its field of view and was set to 0"
        )
    share = found["grid"]["overlap"]
    assert f"{100 * share:.1f} % of the truth" in note and 0.5 < share < 1  # found: 0.73 to 0.87
    # Another truth outside the overlap, of the same largest and smallest value, gives the same figures.
    seen = grids.field_of_view(small["sr"], pair["hr"])
    assert share == pytest.approx(seen.mean())
    other = pair["hr"].data.copy()
    other[~seen] = np.clip(other[~seen] * 0.5, pair["hr"].data.min(), pair["hr"].data.max())
    other[0, 0, 0], other[1, 0, 0] = pair["hr"].data.max(), pair["hr"].data.min()
    label = np.where(seen, pair["label"].data, 1 - pair["label"].data)
    changed = cut | {"hr": Volume(other, pair["hr"].affine), "label": Volume(label, pair["hr"].affine)}
    again = evaluate.evaluate_pair(**changed)
    assert not seen[0, 0, 0] and not seen[1, 0, 0]
    assert again["segmentation"] == found["segmentation"]
    for region, scores in found["image"].items():
        assert again["image"][region] == pytest.approx(scores, rel=1e-12), region  # found: 4.7e-15 (rounding)
    if not turned:
        alone = evaluate.evaluate_pair(
            **{n: Volume(np.ascontiguousarray(v.data[part]), affine) for n, v in pair.items()}
        )
        assert alone["segmentation"] == found["segmentation"]
        assert alone["image"]["mask"]["mse"] == pytest.approx(found["image"]["mask"]["mse"])
        # Found: 0 (rounding)
        assert alone["image"]["whole"]["ssim"] == pytest.approx(found["image"]["whole"]["ssim"], rel=1e-6)


def test_the_baselines_do_not_depend_on_how_the_scan_is_stored():
    hr, label, scan, *_ = _acquired((1, 1, 3))
    turn = Orientation((2, 0, 1), (True, False, True))
    stored = Volume(np.ascontiguousarray(turn.apply(scan.data)), turn.affine(scan.affine, scan.data.shape))
    plain, turned = (evaluate.evaluate_pair(hr, hr, seg=label, label=label, lr=s)["baseline"] for s in (scan, stored))
    assert turned["segmentation"] == plain["segmentation"]
    assert turned["image"]["whole"] == pytest.approx(plain["image"]["whole"], rel=1e-6)  # found: 0 (rounding)


def test_what_is_given_goes_before_what_is_made():
    hr, label, scan, *_ = _acquired((1, 1, 3))
    result = evaluate.evaluate_pair(hr, hr, seg=label, label=label, lr=scan, baseline=hr, baseline_seg=label)
    assert result["baselines"] == {"image": "as given", "segmentation": "as given"}
    assert result["baseline"]["segmentation"]["dice"] == 1


def test_a_scan_beside_the_label_is_refused():
    hr, label, scan, *_ = _acquired((1, 1, 3))
    away = Volume(scan.data, scan.affine + np.array([[0, 0, 0, 900]] * 3 + [[0] * 4]))
    with pytest.raises(InputError, match="does not overlap"):
        evaluate.evaluate_pair(hr, hr, label=label, lr=away)


def test_the_picture_of_errors_shows_both_differences(files, tmp_path):
    from matplotlib.image import imread

    names = ("sr", "hr")
    evaluate.evaluate_files(*(files[n] for n in names), baseline=files["sr"], png=tmp_path / "errors.png")
    four = imread(tmp_path / "errors.png")
    evaluate.evaluate_files(*(files[n] for n in names), png=tmp_path / "three.png")
    three = imread(tmp_path / "three.png")
    assert four.shape[1] > three.shape[1] and len(np.unique(four.reshape(-1, four.shape[2]), axis=0)) > 100
    evaluate.evaluate_files(*(files[n] for n in names), png=tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "three.png").read_bytes()


def test_images_wholly_below_zero_have_the_figures_of_those_moved_up(pair, tmp_path):
    """As training and inference move them: no figure knows where 0 is."""
    above = pair["hr"].data.min()
    lowest = Volume(pair["hr"].data - above, pair["hr"].affine)
    doubt = Volume(np.abs(pair["sr"].data - pair["hr"].data) + np.float32(1), lowest.affine)

    def at(shift):
        moved = {name: Volume(pair[name].data - above - np.float32(shift), lowest.affine) for name in ("sr", "hr")}
        base = Volume(moved["hr"].data + np.float32(2), lowest.affine)
        return evaluate.evaluate_pair(**(pair | moved), baseline=base, doubt=doubt)

    with_zero, below = at(0), at(900)
    assert below["notes"] == [
        "reference: no voxel is above 0: it, SR and baseline are moved up by 900 for PSNR and SSIM",
    ]
    figures = evaluate.flat(with_zero)
    assert evaluate.flat(below) == pytest.approx(figures, rel=1e-4)  # found: 6e-6, of rounded numbers
    assert figures["image.whole.psnr_db"] == pytest.approx(
        metrics.psnr(pair["sr"].data - above, pair["hr"].data - above), rel=1e-6
    )
    one = Volume(np.full(SHAPE, -5.0, np.float32), lowest.affine)
    with pytest.raises(InputError, match="its maximum is -5"):
        evaluate.evaluate_pair(pair["sr"], one)


def test_the_picture_of_errors_of_images_wholly_below_zero_is_that_of_those_moved_up(pair, tmp_path):
    for shift in (0, 900):
        for name in ("sr", "hr"):
            data = pair[name].data - pair["hr"].data.min() - np.float32(shift)
            images.save(tmp_path / f"{name}{shift}.nii.gz", data, pair["hr"].affine)
        files = [tmp_path / f"{name}{shift}.nii.gz" for name in ("sr", "hr")]
        evaluate.evaluate_files(*files, png=tmp_path / f"{shift}.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "900.png").read_bytes()


def test_a_reference_that_lost_its_header_is_refused_as_a_result_that_did(pair):
    """Figures of one array laid over itself elsewhere say nothing; whose header is lost, the error says."""
    away, here = Volume(pair["sr"].data, _shifted(3.0)), pair["hr"]
    for sr, hr, what in ((away, here, "reference"), (Volume(pair["sr"].data, np.eye(4)), away, "SR")):
        other = "SR" if what == "reference" else "reference"
        with pytest.raises(InputError) as error:
            evaluate.evaluate_pair(sr, hr)
        told = f"the {what} has the {other}'s array and no place of its own; as they stand they are up to 3 mm apart"
        assert error.value.reason.startswith(told)
        assert error.value.hint == (
            f"copy the {other}'s header to it, for example with fslcpgeom {other.upper()} {what.upper()}, do not "
            "resample"
        )
    assert not any("no place" in n for n in evaluate.evaluate_pair(pair["sr"], here)["notes"])
    placed = Volume(here.data, _shifted(-1.0))  # a place of its own, another one: scored where both are
    assert evaluate.evaluate_pair(away, placed)["grid"]["overlap"] < 1
    # The result of a scan whose header counts from the middle of its first slice, as of every third plane of a truth.
    for sr, hr, what, other in ((placed, here, "reference", "SR"), (here, placed, "SR", "reference")):
        told = evaluate.evaluate_pair(sr, hr)
        note = f"{what}: has the {other}'s array and no place of its own, they are up to 1 mm apart"
        assert any(line.startswith(note) for line in told["notes"]) and told["grid"]["overlap"] < 1
