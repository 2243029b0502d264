"""The observation operators: laws of both families, and equality with SciPy where SciPy is the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from fastsrgan.errors import UsageError
from fastsrgan.volume.geometry import centre_coordinates, grid_size
from fastsrgan.volume.resample import (
    FWHM,
    _reflect,
    apply_axes,
    check_profile,
    degrade_matrix,
    modulo_size,
    slice_profile_matrix,
    slice_width,
    spline_matrix,
    upsample_matrix,
)

sizes = st.integers(2, 61)
ratios = st.floats(1.05, 7)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_an_axis_is_mirrored_again_and_again_with_the_edge_repeated(n):
    """Slices may be thicker than a short axis is long."""
    assert np.array_equal(_reflect(np.arange(-7 * n, 8 * n), n), np.pad(np.arange(n), 7 * n, mode="symmetric"))


@given(sizes, ratios)
def test_slice_profile_and_spline_keep_constants(n, ratio):
    m = grid_size(n, 1, ratio)
    assert np.abs(slice_profile_matrix(n, m, ratio).sum(1) - 1).max() < 1e-12  # found: 4.4e-16 (rounding)
    assert np.abs(spline_matrix(m, n, 1 / ratio).sum(1) - 1).max() < 1e-12  # found: 4.4e-16 (rounding)


@given(sizes, st.floats(1.6, 7))  # below, one voxel is coarser than the Gaussian and its sampled moments differ
def test_slice_profile_is_a_gaussian_of_the_slice_thickness(n, ratio):
    m = grid_size(n, 1, ratio)
    matrix = slice_profile_matrix(n, m, ratio)
    reach = 4 * ratio / FWHM + 1
    for row, centre in zip(matrix, centre_coordinates(m, n, ratio), strict=True):
        if reach < centre < n - 1 - reach:  # away from the reflecting edges
            first = (row * np.arange(n)).sum()
            assert first == pytest.approx(centre, abs=5e-3)  # found: 6.1e-4
            # Truncated at four standard deviations and sampled at the voxels, the width is what was asked for.
            spread = np.sqrt((row * (np.arange(n) - first) ** 2).sum())
            assert spread == pytest.approx(ratio / FWHM, rel=0.01)  # found: 0.002


@given(sizes)
def test_spline_interpolates_its_samples_and_is_the_identity_at_ratio_one(n):
    assert np.abs(spline_matrix(n, n, 1.0) - np.eye(n)).max() < 1e-12  # found: 1.1e-16 (rounding)
    # At odd ratios every third output centre is an input centre.
    matrix = spline_matrix(n, 3 * n, 1 / 3)
    assert np.abs(matrix[1::3] - np.eye(n)).max() < 1e-12  # found: 1.1e-16 (rounding)


def test_spline_matrix_equals_scipy_at_the_same_coordinates():
    x = np.random.default_rng(0).random(23)
    for n_out, ratio in ((69, 1 / 3), (50, 0.45), (11, 2.1)):
        where = centre_coordinates(n_out, 23, ratio)
        expected = ndimage.map_coordinates(x, where[None], order=3, mode="reflect")
        assert np.abs(spline_matrix(23, n_out, ratio) @ x - expected).max() < 1e-12  # found: 3.3e-16 (rounding)


@pytest.mark.parametrize("low", [3.0, 2.7, 6.1])
def test_segsrgan_family_equals_scipy_in_three_dimensions(low):
    data = np.random.default_rng(1).random((24, 26, modulo_size(60, low)))
    low_res = (1.0, 1.0, low)
    blurred = ndimage.gaussian_filter(data, [r / FWHM for r in low_res])
    expected = ndimage.zoom(blurred, [1 / r for r in low_res], order=0)
    down = [degrade_matrix(n, 1.0, r, "segsrgan") for n, r in zip(data.shape, low_res, strict=True)]
    lr = apply_axes(data, down)
    assert lr.shape == expected.shape and np.abs(lr - expected).max() < 1e-6  # found: 2.4e-7
    up = [upsample_matrix(n, 0, 1 / r, "segsrgan") for n, r in zip(lr.shape, low_res, strict=True)]
    assert np.abs(apply_axes(lr, up) - ndimage.zoom(lr, low_res, order=3)).max() < 2e-6  # found: 2.4e-7


def test_an_axis_that_is_not_decimated_is_left_alone():
    assert degrade_matrix(40, 0.5, 0.5) is None
    assert degrade_matrix(40, 0.5, 0.503) is None and degrade_matrix(40, 0.5, 0.508) is not None  # within 1 %
    assert degrade_matrix(40, 0.5, 0.497) is None
    with pytest.raises(UsageError, match="finer"):
        degrade_matrix(40, 0.5, 0.492)
    assert degrade_matrix(40, 0.5, 0.5, "segsrgan") is not None  # the original blurs it all the same


def test_a_finer_low_resolution_is_refused():
    with pytest.raises(UsageError, match="finer"):
        degrade_matrix(40, 1.0, 0.5)


@given(st.integers(2, 400), st.floats(0.3, 2), st.floats(0.3, 7))
def test_both_grids_cover_the_same_field_of_view_to_half_a_voxel(n, from_mm, to_mm):
    m = grid_size(n, from_mm, to_mm)
    assert m == 1 or abs(m * to_mm - n * from_mm) <= 0.5 * to_mm + 3e-12  # rounding; found: 3.1e-13, of halves
    where = centre_coordinates(m, n, to_mm / from_mm)
    assert where.mean() == pytest.approx((n - 1) / 2)


def test_apply_axes_is_the_product_of_the_three_matrices_in_any_backend():
    rng = np.random.default_rng(2)
    data = rng.random((7, 9, 11)).astype(np.float32)
    matrices = [rng.random((5, 7)), rng.random((12, 9)), rng.random((3, 11))]
    expected = np.einsum("ai,bj,ck,ijk->abc", *matrices, data)
    assert np.abs(apply_axes(data, matrices) / expected - 1).max() < 1e-6  # found: 1.3e-7
    tensor = apply_axes(torch.from_numpy(data)[None], matrices)
    assert tensor.shape == (1, 5, 12, 3) and np.abs(tensor[0].numpy() / expected - 1).max() < 1e-6  # found: 1.3e-7
    assert np.array_equal(apply_axes(data, [None, None, None]), data)


def test_203_slices_to_3_mm_and_back():
    data = np.random.default_rng(3).random((8, 8, 203)).astype(np.float32)
    coarse = apply_axes(data, [None, None, upsample_matrix(203, grid_size(203, 0.5, 3.0), 6.0)])
    back = upsample_matrix(coarse.shape[2], grid_size(coarse.shape[2], 3.0, 0.5), 1 / 6)
    fine = apply_axes(coarse, [None, None, back])
    assert coarse.shape == (8, 8, 34) and abs(fine.shape[2] * 0.5 - 203 * 0.5) <= 1.5  # found: 0.5


def test_a_profile_is_a_shape_or_a_share_of_the_box():
    for profile, share in (("gaussian", 0.0), ("box", 1.0), (0.25, 0.25), (0, 0.0), (1, 1.0)):
        assert check_profile(profile) == share
    for wrong in ("sinc", -0.01, 1.01, float("nan")):
        with pytest.raises(UsageError, match=r"is not allowed \(one of gaussian, box, or a share"):
            check_profile(wrong)
    assert check_profile("gaussian", "segsrgan") == check_profile(0.0, "segsrgan") == 0
    for wrong in ("box", 0.01):
        with pytest.raises(UsageError, match="knows the Gaussian alone"):
            check_profile(wrong, "segsrgan")


def test_a_thickness_is_told_in_spacings():
    assert (slice_width(None, 3.0), slice_width(1.5, 3.0), slice_width(6.0, 3.0)) == (1.0, 0.5, 2.0)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="slice thickness"):
            slice_width(wrong, 3.0)


def test_a_slice_much_thinner_than_a_voxel_is_the_nearest_voxel_alone():
    matrix = slice_profile_matrix(9, 3, 3.0, 1e-3)
    assert np.abs(matrix - np.eye(9)[1::3]).max() < 1e-6  # found: 0 (rounding)


def test_a_blend_is_its_share_of_the_box_and_the_rest_the_gaussian():
    for width in (0.5, 1.0):
        gaussian, box = (slice_profile_matrix(30, 10, 3.0, width, share) for share in (0.0, 1.0))
        # Found: 1.1e-16 (rounding)
        assert np.abs(slice_profile_matrix(30, 10, 3.0, width, 0.25) - (0.75 * gaussian + 0.25 * box)).max() < 1e-12
    # A box of three voxels' thickness counts each of them alike, of one and a half the middle one and quarters.
    assert np.allclose(slice_profile_matrix(30, 10, 3.0, 1.0, 1.0)[4, 11:17], [0, 1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert np.allclose(slice_profile_matrix(30, 10, 3.0, 0.5, 1.0)[4, 11:17], [0, 1 / 6, 2 / 3, 1 / 6, 0, 0])


def test_operators_are_shared_and_cannot_be_changed():
    for make in (
        lambda: slice_profile_matrix(12, 4, 3.0),
        lambda: spline_matrix(4, 12, 1 / 3),
        lambda: degrade_matrix(12, 1.0, 3.0, "segsrgan"),
        lambda: upsample_matrix(4, 12, 1 / 3, "segsrgan"),
    ):
        assert make() is make()
        with pytest.raises(ValueError, match="read-only"):
            make()[0, 0] = 1


def test_an_axis_stays_as_it_is_where_size_and_ratio_are_the_same():
    assert upsample_matrix(10, 10, 1.0) is None and upsample_matrix(10, 10, 1.0, "segsrgan") is None
    for n_out, ratio in ((10, 0.95), (11, 1.0)):
        assert upsample_matrix(10, n_out, ratio).shape == (n_out, 10)


def test_the_originals_profile_is_as_wide_as_the_slices_are_thick():
    thin, thick = degrade_matrix(12, 1.0, 3.0, "segsrgan", 0.5), degrade_matrix(12, 1.0, 3.0, "segsrgan")
    expected = ndimage.zoom(ndimage.gaussian_filter1d(np.eye(12), 1.5 / FWHM, axis=0), (1 / 3, 1), order=0)
    assert np.array_equal(thin, expected) and not np.allclose(thin, thick)
