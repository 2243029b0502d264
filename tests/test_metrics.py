"""Metrics: equal to scikit-image and SciPy on random data, exact on cases worked out by hand, clear when refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from fastsrgan.errors import InputError
from fastsrgan.evaluate import metrics

SHAPES = [(11, 11, 11), (13, 29, 17), (40, 12, 23)]


def _pair(shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    ref = ndimage.gaussian_filter(rng.random(shape), 1) * 900
    return (ref + rng.normal(0, 20, shape)).astype(dtype), ref.astype(dtype)


@pytest.fixture(params=[1, 1 << 20], ids=["small slabs", "one slab"])
def slabs(request, monkeypatch):
    monkeypatch.setattr(metrics, "_SLAB_VOXELS", request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_is_scikit_images_with_the_references_maximum(shape, slabs):
    sr, ref = _pair(shape)
    # Found: 8.1e-9 (rounding)
    assert metrics.psnr(sr, ref) == pytest.approx(peak_signal_noise_ratio(ref, sr, data_range=ref.max()), abs=1e-6)
    assert metrics.psnr(sr, ref, data_range=10) == pytest.approx(
        peak_signal_noise_ratio(ref, sr, data_range=10),
        abs=1e-6,  # found: 8.1e-9 (rounding)
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, np.uint8])
@pytest.mark.parametrize("shape", SHAPES)
def test_ssim_is_scikit_images(shape, dtype, slabs):
    sr, ref = _pair(shape, dtype)
    expected = structural_similarity(
        ref.astype(float),
        sr.astype(float),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=float(ref.max()),
    )
    assert metrics.ssim(sr, ref) == pytest.approx(expected, abs=1e-12)  # found: 2.4e-14 (rounding)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("shape", [(7, 8, 9), *SHAPES])
def test_uniform_ssim_is_scikit_images_default(shape, dtype, slabs):
    sr, ref = _pair(shape, dtype)
    expected = structural_similarity(ref.astype(float), sr.astype(float), data_range=float(ref.max()))
    # Found: 7.5e-15 (rounding)
    assert metrics.ssim(sr, ref, window=metrics.UNIFORM) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_and_ssim_are_monais(shape):
    monai = pytest.importorskip("monai.metrics", reason="MONAI is not installed")
    sr, ref = _pair(shape, np.float64)
    as_batch = [torch.from_numpy(np.ascontiguousarray(a))[None, None] for a in (sr, ref)]
    top = float(ref.max())
    ssim = monai.SSIMMetric(3, data_range=top, kernel_type="gaussian", win_size=11, kernel_sigma=1.5)(*as_batch)
    # MONAI computes in float32, where the variances cancel.
    assert metrics.ssim(sr, ref) == pytest.approx(float(ssim), abs=2e-4)  # found: 7.1e-5
    # Found: 3.6e-15 (rounding)
    assert metrics.psnr(sr, ref) == pytest.approx(float(monai.PSNRMetric(top)(*as_batch)), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_dice_is_monais(shape):
    monai = pytest.importorskip("monai.metrics", reason="MONAI is not installed")
    seg, label = (a > 450 for a in _pair(shape))
    one_hot = [torch.from_numpy(np.stack([~m, m])[None].astype(np.float32)) for m in (seg, label)]
    assert metrics.dice(seg, label) == pytest.approx(float(monai.DiceMetric(include_background=False)(*one_hot)))


def test_ssim_of_views_is_that_of_copies():
    sr, ref = _pair((13, 29, 17))
    # Found: 1.2e-15 (rounding)
    assert metrics.ssim(sr.T[::-1], ref.T[::-1]) == pytest.approx(metrics.ssim(sr, ref), abs=1e-12)


def test_ssim_inside_a_mask_is_the_mean_of_the_map_there(slabs):
    sr, ref = _pair((30, 21, 19), np.float64)
    mask = np.zeros(ref.shape, np.uint8)
    mask[8:30, 2:9, 6:12] = 7
    _, full = structural_similarity(
        ref, sr, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=ref.max(), full=True
    )
    inside = np.zeros(ref.shape, bool)
    inside[5:-5, 5:-5, 5:-5] = mask[5:-5, 5:-5, 5:-5] != 0
    assert metrics.ssim(sr, ref, mask) == pytest.approx(full[inside].mean(), abs=1e-12)  # found: 6.7e-16 (rounding)


def test_errors_are_numpys_inside_and_outside_a_mask(slabs):
    sr, ref = _pair((13, 29, 17))
    mask = np.random.default_rng(1).random(ref.shape) > 0.7
    difference = sr.astype(float) - ref
    assert metrics.mse(sr, ref) == pytest.approx((difference**2).mean())
    assert metrics.mae(sr, ref) == pytest.approx(np.abs(difference).mean())
    assert metrics.mse(sr, ref, mask) == pytest.approx((difference[mask] ** 2).mean())
    # The range stays that of the whole reference.
    assert metrics.psnr(sr, ref, mask) == pytest.approx(
        10 * math.log10(ref.max() ** 2 / (difference[mask] ** 2).mean())
    )


def test_unsigned_images_do_not_wrap_around():
    a, b = np.full((3, 3, 3), 1, np.uint8), np.full((3, 3, 3), 3, np.uint8)
    assert metrics.mse(a, b) == 4
    assert metrics.mae(a, b) == 2


def test_identical_images_are_perfect():
    _, ref = _pair((12, 12, 12))
    assert metrics.psnr(ref, ref) == math.inf
    assert metrics.ssim(ref, ref) == pytest.approx(1, abs=1e-12)  # found: 0 (rounding)
    assert metrics.mse(ref, ref) == 0


def test_constant_images_have_the_ssim_of_their_means():
    a, b = np.full((11, 11, 11), 2.0), np.full((11, 11, 11), 4.0)
    c1 = (0.01 * 4) ** 2
    assert metrics.ssim(a, b) == pytest.approx((2 * 8 + c1) / (4 + 16 + c1), rel=1e-12)  # found: 2.5e-13
    assert metrics.ssim(b, b) == 1


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_dice_counts_voxels(dtype):
    seg, label = np.zeros((4, 4, 4), dtype), np.zeros((4, 4, 4), dtype)
    seg[:2], label[1:2] = 1, 1
    assert metrics.dice(seg, label) == 2 * 16 / (32 + 16)
    assert metrics.dice(label, label) == 1
    assert metrics.dice(seg, 1 - seg if dtype is not bool else ~seg) == 0


def test_dice_thresholds_probabilities_at_a_half():
    probability, label = np.array([0.2, 0.5, 0.51, 0.9]).reshape(1, 1, 4), np.array([0, 0, 1, 1]).reshape(1, 1, 4)
    assert metrics.dice(probability, label) == 1


def test_dice_of_empty_segmentations():
    empty, full = np.zeros((3, 3, 3), np.uint8), np.ones((3, 3, 3), np.uint8)
    assert metrics.dice(empty, empty) == 1
    assert metrics.dice(empty, full) == metrics.dice(full, empty) == 0


def test_components_are_scipys_with_26_neighbours():
    seg = np.random.default_rng(2).random((20, 21, 22)) > 0.95
    label = np.random.default_rng(3).random(seg.shape) > 0.9
    numbered, number = ndimage.label(seg, np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(seg, numbered, range(1, number + 1))
    false = [i for i in range(1, number + 1) if not (label & (numbered == i)).any()]
    assert metrics.connected_components(seg) == number < ndimage.label(seg)[1]
    assert metrics.components(seg, label) == {
        "components": number,
        "largest_component": sizes.max(),
        "false_components": len(false),
        "false_component_voxels": sum(sizes[i - 1] for i in false),
    }


def test_voxels_that_share_a_corner_are_one_component():
    seg = np.zeros((4, 4, 4), np.uint8)
    seg[0, 0, 0] = seg[1, 1, 1] = seg[3, 3, 3] = 1
    assert metrics.components(seg) == {"components": 2, "largest_component": 2}


def test_nothing_has_no_components():
    empty = np.zeros((3, 4, 5))
    assert metrics.connected_components(empty) == 0
    assert metrics.components(empty, empty) == {
        "components": 0,
        "largest_component": 0,
        "false_components": 0,
        "false_component_voxels": 0,
    }


@pytest.mark.parametrize(
    "metric", [metrics.mse, metrics.mae, metrics.psnr, metrics.ssim, metrics.dice, metrics.components]
)
def test_shapes_that_differ_are_refused_with_both_sizes(metric):
    with pytest.raises(InputError, match="12 x 12 x 12 and 12 x 12 x 13"):
        metric(np.ones((12, 12, 12)), np.ones((12, 12, 13)))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(InputError, match="sizes differ"):
        metrics.psnr(np.ones((12,) * 3), np.ones((12,) * 3), np.ones((1, 12, 12)))


@pytest.mark.parametrize("metric", [metrics.mse, metrics.psnr, metrics.ssim])
def test_an_empty_mask_is_refused(metric):
    with pytest.raises(InputError, match=r"mask: has no voxel"):
        metric(np.ones((12,) * 3), np.ones((12,) * 3), np.zeros((12,) * 3))


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
@pytest.mark.parametrize("value", [0, -3, np.nan])
def test_a_reference_without_a_positive_maximum_is_refused(metric, value):
    with pytest.raises(InputError, match="positive"):
        metric(np.ones((12,) * 3), np.full((12,) * 3, value))
    with pytest.raises(InputError, match="data_range"):
        metric(np.ones((12,) * 3), np.ones((12,) * 3), data_range=value)


@pytest.mark.parametrize("metric", [metrics.mse, metrics.mae, metrics.psnr, metrics.ssim])
def test_voxels_that_are_not_finite_are_refused(metric):
    sr = np.ones((12,) * 3)
    sr[6, 6, 6] = np.nan
    with pytest.raises(InputError, match="not finite"):
        metric(sr, np.ones((12,) * 3))


def test_ssim_needs_a_window():
    with pytest.raises(InputError, match="at least 11"):
        metrics.ssim(np.ones((10, 30, 30)), np.ones((10, 30, 30)))
