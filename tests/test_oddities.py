"""Results that are doubtful although nothing failed: told as warnings, in the log and in the record."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from phantom import head

from fastsrgan.infer.image import _save_as_input
from fastsrgan.infer.volume import InferResult
from fastsrgan.io import nifti as images
from fastsrgan.model.weights import load_generator
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.intensity import normaliser, outliers
from fastsrgan.volume.oddities import odd_intensities, on_zeros, outshone


def scan(shape=(40, 40, 20), seed=0):
    return np.random.default_rng(seed).uniform(10, 1000, shape).astype(np.float32)


@pytest.mark.parametrize(("times", "told"), ((1, False), (4, False), (6, True), (100, True)))
def test_a_few_voxels_that_outshine_the_rest_are_told(times, told):
    data = scan()
    data[3, 4, 5:7] = data.max() * times
    found = outshone(data, compressed=True)
    assert bool(found) == told
    if told:
        assert "compressed" in found[0] and "divided by its maximum" in outshone(data, compressed=False)[0]
        assert f"2 of {data.size} voxels are up to {times:.3g} times as bright" in found[0]


@pytest.mark.parametrize(("value", "told"), [(-32768, True), (-6000, True), (-4000, False), (-2000, False), (0, False)])
@pytest.mark.parametrize("lowest", [0.0, -20.0])
def test_padding_far_below_all_others_is_told(value, lowest, told):
    """A result of it had no segmentation, and nothing said why: -32768 leaves tissue 3 % of the scale."""
    data = scan() + np.float32(lowest)
    data[0, :5] = value
    found = odd_intensities(data, compressed=True)
    assert bool(found) == told
    if told:
        rest, top = data[data > value].min(), data.max()
        assert found[0].startswith(f"100 of {data.size} voxels are {value}, far below all others ({rest:g} to {top:g})")
        assert found[0].endswith(f"set them to {max(rest, 0):g}")


def test_a_constant_and_an_image_of_two_values_have_no_padding():
    for low in (-5.0, 5.0):
        assert not odd_intensities(np.full((3, 3, 3), low, np.float32), compressed=True)
    two = np.full((3, 3, 3), -1000, np.float32)
    two[1] = 1
    assert "set them to 1" in odd_intensities(two, compressed=True)[0]


def test_many_bright_voxels_are_tissue_and_a_mask_is_no_scan():
    data = scan()
    data.reshape(-1)[: data.size // 1000] = 10 * data.max()  # 0.1 %, as vessels are
    assert outliers(data) is None
    mask = np.zeros((40, 40, 20), np.float32)
    mask[1, 1, 1] = 1
    assert outliers(mask) is None and outliers(np.zeros((3, 3, 3), np.float32)) is None


@pytest.mark.parametrize("shift", (0.0, -1024.0))
def test_negative_values_count_from_the_lowest(shift):
    data = scan() + shift
    assert outliers(data) is None
    data[0, 0, 0] = 20_000
    found = outliers(data)
    assert found is not None and found.count == 1


def test_what_is_an_outlier_of_an_image_with_negative_values_is_counted_from_the_lowest():
    """A voxel at 1500 is 3.1 times as far from the lowest as the rest, though the rest is all below 0."""
    data = np.random.default_rng(0).uniform(-1000, -200, (20, 20, 20)).astype(np.float32)
    data[0, 0, 0] = 1500
    assert outliers(data) is None
    data[0, 0, 0] = 4000
    found = outliers(data)
    # Found: 9.4e-5
    assert found is not None and found.count == 1 and found.times == pytest.approx(5000 / 800, rel=5e-4)


@pytest.mark.parametrize("shifted", (False, True))
def test_outliers_are_compressed_and_come_back_exactly(shifted):
    data = scan() - 50 * shifted
    plain = normaliser(data, shifted=shifted, robust=True)
    assert plain == normaliser(data, shifted=shifted), "an image without outliers is normalised as ever"
    odd = data.copy()
    odd[3, 4, 5:7] = (10 * data.max(), 40 * data.max())
    norm = normaliser(odd, shifted=shifted, robust=True)
    seen = norm.apply(odd)
    assert norm.scale == pytest.approx(plain.scale, rel=1e-6)  # found: 0 (rounding)
    # Found: 1.69 to 1.70, 1.84 to 1.85
    assert 1.5 < seen[3, 4, 5] < seen[3, 4, 6] < 2 and np.partition(seen.ravel(), -3)[-3] <= 1
    back = norm.invert(seen)
    np.testing.assert_allclose(back, odd, rtol=5e-6, atol=1e-3)  # found: 0.071 of it
    tensor = torch.from_numpy(seen.copy())
    norm.invert_(tensor)
    assert np.array_equal(tensor.numpy(), back)
    made = np.linspace(-1, 2, 24, dtype=np.float32).reshape(2, 3, 4)  # a result may lie beyond the scan
    place = torch.from_numpy(made.copy())
    plain.invert_(place)
    np.testing.assert_allclose(place.numpy(), plain.invert(made), rtol=1e-6)  # found: 0
    assert plain.invert(made).min() == pytest.approx(data.min())
    # Found: 3.1e-7
    assert norm.invert(np.float32([[50.0]])) == pytest.approx(odd.max(), rel=1e-6), "never brighter than the scan"


def test_outliers_above_an_image_of_values_below_zero_leave_a_scale():
    """Hounsfield units of air, and one bright voxel: for a network that was not shifted nothing else is seen."""
    data = np.linspace(-1000, -900, 27000).reshape(30, 30, 30)
    data[3, 4, 5] = 50.0
    assert normaliser(data, robust=True).scale == 50
    assert normaliser(data, shifted=True, robust=True).scale == 100  # of the others


def test_what_outliers_do_to_a_result_stays_where_they_are():
    from fastsrgan.infer.volume import infer_volume

    generator, affine = load_generator("perinatal"), np.diag([1.0, 1, 3, 1])
    data = head((32, 32, 12), (5.0, 6.0, 11.0)).data.copy()

    def result(times):
        odd = data.copy()
        odd[16, 16, 6] *= times
        return infer_volume(odd, affine, generator, patch=36, step=36, device="cpu", agree="off")

    plain = result(1)
    away = np.ones(plain.sr.shape, bool)
    away[10:23, 10:23, 10:29] = False
    for times in (10, 100):
        odd = result(times)
        assert "intensity_scale" in odd.report and "intensity_scale" not in plain.report
        assert np.sqrt(np.mean((odd.sr - plain.sr)[away] ** 2)) < 0.005 * data.max()  # found: 8.9e-4
        assert np.abs(odd.prob - plain.prob)[0][away].mean() < 0.01  # found: 0.002


@pytest.mark.parametrize(("inside", "told"), ((2, True), (6, True), (9, False), (20, False)))
def test_a_segmentation_mostly_on_exact_zeros_is_told(inside, told):
    """Planes of tissue up to ``inside`` of 16, each voxel of the image being two of the segmentation along x."""
    data = scan((8, 10, 10))
    data[inside // 2 :] = 0
    seg = np.ones((16, 10, 10), np.uint8)
    index = [np.arange(16) // 2, np.arange(10), np.arange(10)]
    found = on_zeros(seg, data, index)
    assert bool(found) == told
    if told:
        assert found[0].startswith(f"{100 * (1 - inside / 16):.0f} % of the segmentation")
    assert on_zeros(np.zeros_like(seg), data, index) == []


def test_voxels_that_a_type_cannot_hold_are_counted(tmp_path):
    data = np.full((4, 4, 4), 60_000, np.float32)
    data[0, 0, 0] = 180_000
    image = Volume(data, np.eye(4), (), {"stored_dtype": "uint16", "slope": 1.0, "inter": 0.0})
    result = InferResult(data, data[None], np.eye(4), {})
    assert _save_as_input(tmp_path / "a.nii.gz", result, image, 1)["voxels_clipped"] == 1


def test_what_rounds_to_the_last_number_of_a_type_is_not_counted_as_clipped(tmp_path):
    data = np.full((4, 4, 4), 100, np.float32)
    data[0, 0] = -0.4, 65535.4, -0.6, 65535.6
    image = Volume(data, np.eye(4), (), {"stored_dtype": "uint16", "slope": 1.0, "inter": 0.0})
    result = InferResult(data, data[None], np.eye(4), {})
    assert _save_as_input(tmp_path / "a.nii.gz", result, image, 1)["voxels_clipped"] == 2
    halves = Volume(data, np.eye(4), (), {"stored_dtype": "uint16", "slope": 0.5, "inter": -2.0})
    assert _save_as_input(tmp_path / "b.nii.gz", result, halves, 1)["voxels_clipped"] == 2  # -2 to 32765.5


def test_clipped_voxels_are_those_beyond_the_type_where_intensities_fall_as_numbers_rise(tmp_path):
    data = np.full((4, 4, 4), -100, np.float32)
    data[0, 0] = 0.4, -65535.4, 0.6, -65535.6
    image = Volume(data, np.eye(4), (), {"stored_dtype": "uint16", "slope": -1.0, "inter": 0.0})
    result = InferResult(data, data[None], np.eye(4), {})
    assert _save_as_input(tmp_path / "a.nii.gz", result, image, 1)["voxels_clipped"] == 2
    found = images.load(tmp_path / "a.nii.gz").data
    assert np.array_equal(found[0, 0], [0, -65535, 0, -65535]) and (found[1:] == -100).all()


def test_the_record_of_infer_carries_them(tmp_path, caplog):
    from fastsrgan.infer.files import infer_files

    data = np.rint(scan((20, 20, 8)))
    data[4, 4, 4] = 60_000
    affine = np.diag([1.0, 1, 3, 1])
    nib.save(nib.Nifti1Image(data.astype(np.uint16), affine), tmp_path / "a.nii.gz")
    infer_files([tmp_path / "a.nii.gz"], tmp_path / "o", patch=16, step=16, device="cpu")
    warnings = json.loads((tmp_path / "o" / "a.json").read_text())["warnings"]
    assert any("times as bright as all others" in text for text in warnings)
    assert "times as bright as all others" in caplog.text
    assert images.load(tmp_path / "o" / "a_sr.nii.gz").data.shape[2] == 24
