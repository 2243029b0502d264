"""Where voxels are: one head in 48 storages, exact undoing, grids that keep their centre, blobs that stay in place."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import OBLIQUE, rigid
from scipy.ndimage import map_coordinates

from fastsrgan.volume.geometry import (
    Orientation,
    Volume,
    centre_coordinates,
    grid_size,
    processing_orientation,
    resampled_affine,
    shear_of,
    spacing_of,
)

STORAGES = [
    Orientation(axes, flips)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((False, True), repeat=3)
]
HEAD = np.random.default_rng(0).standard_normal((6, 5, 4))
quick = settings(max_examples=60, deadline=None)
turns = st.tuples(*[st.floats(-3.1, 3.1)] * 3)
spacings = st.tuples(*[st.floats(0.3, 6)] * 3)
orientations = st.sampled_from(STORAGES)


def world(affine, index):
    return affine[:3, :3] @ np.asarray(index, float) + affine[:3, 3]


# Orientation


@quick
@given(orientations, st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 2))
def test_undo_is_the_exact_inverse_with_any_leading_axes(turn, shape, lead):
    array = np.random.default_rng(1).standard_normal((2, 3)[:lead] + shape)
    np.testing.assert_array_equal(turn.undo(turn.apply(array)), array)
    np.testing.assert_array_equal(turn.apply(turn.undo(array)), array)
    assert np.shares_memory(turn.apply(array), array)
    assert turn.apply(array).shape[lead:] == turn.permute(shape)


@quick
@given(orientations, st.tuples(*[st.integers(0, 3)] * 3))
def test_an_oriented_affine_places_each_voxel_where_it_was(turn, index):
    marked = np.zeros(HEAD.shape)
    marked[index] = 1
    moved = np.argwhere(turn.apply(marked))[0]
    affine = turn.affine(OBLIQUE, HEAD.shape)
    np.testing.assert_allclose(world(affine, moved), world(OBLIQUE, index), atol=1e-12)  # found: 3.6e-15 (rounding)
    np.testing.assert_allclose(spacing_of(affine), turn.permute(spacing_of(OBLIQUE)))


@settings(max_examples=20, deadline=None)
@given(spacings, turns)
def test_one_head_in_all_48_storages_is_processed_as_one_array(spacing, turn):
    affine = rigid(spacing, turn)
    first = processing_orientation(affine)
    expected, place = first.apply(HEAD), first.affine(affine, HEAD.shape)
    for storage in STORAGES:
        stored, stored_affine = storage.apply(HEAD), storage.affine(affine, HEAD.shape)
        orientation = processing_orientation(stored_affine)
        np.testing.assert_array_equal(orientation.apply(stored), expected)
        # Found: 7.1e-15 (rounding)
        np.testing.assert_allclose(orientation.affine(stored_affine, stored.shape), place, atol=1e-12)
        np.testing.assert_array_equal(orientation.undo(orientation.apply(stored)), stored)


def assert_processed_as_one_array(spacing, turn) -> None:
    """However a head is stored, it is processed as one array."""
    affine = rigid(spacing, turn)
    expected = processing_orientation(affine).apply(HEAD)
    for storage in STORAGES:
        stored = processing_orientation(storage.affine(affine, HEAD.shape)).apply(storage.apply(HEAD))
        np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 1, 3), (2, 0.5, 2), (1, 1.005, 1), (0.9, 0.9, 0.9)])
@pytest.mark.parametrize("turn", [(0, 0, 0), (0.2, -0.1, 0.3)])
def test_equal_sizes_are_processed_as_one_array_too(spacing, turn):
    assert_processed_as_one_array(spacing, turn)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1, 1, 3), (3, 1, 1)])
@pytest.mark.parametrize("turn", [(np.pi / 4, 0, 0), (0, np.pi / 4, 0), (0, 0, np.pi / 4), (np.pi / 4, np.pi / 4, 0)])
def test_a_head_between_two_directions_is_processed_as_one_array_too(spacing, turn):
    """At 45 degrees two axes are as near: what decides is the world, not the storage."""
    assert_processed_as_one_array(spacing, turn)


@quick
@given(spacings, turns, orientations)
def test_processed_axes_point_to_r_a_or_s_right_handed_with_the_thickest_last(spacing, turn, storage):
    stored = storage.affine(rigid(spacing, turn), HEAD.shape)
    affine = processing_orientation(stored).affine(stored, storage.permute(HEAD.shape))
    assert np.linalg.det(affine) > 0
    assert affine_sizes(affine)[2] >= 0.99 * max(spacing)  # found: 1


def affine_sizes(affine):
    return np.linalg.norm(affine[:3, :3], axis=0)


@pytest.mark.parametrize(("thick", "names"), [(2, "RAS"), (0, "ASR"), (1, "SRA")])
def test_axial_sagittal_and_coronal_slices_become_ras_asr_sra(thick, names):
    spacing = [1.0, 1.0, 1.0]
    spacing[thick] = 4.0
    for storage in STORAGES:
        stored = storage.affine(np.diag([*spacing, 1.0]), HEAD.shape)
        affine = processing_orientation(stored).affine(stored, storage.permute(HEAD.shape))
        directions = affine[:3, :3] / affine_sizes(affine)
        np.testing.assert_array_equal(directions, np.eye(3)[:, ["RAS".index(n) for n in names]])


@pytest.mark.parametrize(
    ("spacing", "last"),
    [((1, 1, 1), 2), ((1, 1, 0.991), 2), ((1, 1, 0.989), 1), ((1, 0.989, 0.989), 0), ((1, 0.991, 0.9), 1)],
)
def test_of_axes_within_a_hundredth_of_the_thickest_the_one_nearest_to_s_comes_last(spacing, last):
    assert processing_orientation(np.diag([*spacing, 1.0])).axes[2] == last


def test_the_thickest_axis_can_be_told_from_outside():
    low_res = (1.0, 5.0, 1.0)
    assert processing_orientation(np.eye(4), low_res) == processing_orientation(np.diag([1, 5, 1, 1]))


# Sizes and affines


@quick
@given(spacings, turns, orientations)
def test_spacing_and_shear_of_rigid_affines(spacing, turn, storage):
    affine = storage.affine(rigid(spacing, turn), HEAD.shape)
    assert spacing_of(affine) == pytest.approx(storage.permute(spacing))
    assert Volume(HEAD, affine).spacing == spacing_of(affine)
    assert shear_of(affine) < 1e-12  # found: 3.3e-16 (rounding)


def test_shear_is_the_largest_cosine_between_axes():
    affine = np.eye(4)
    affine[:3, 1] = [np.sin(0.1), np.cos(0.1), 0]
    assert shear_of(affine) == pytest.approx(np.sin(0.1))
    affine[0, 1] *= -1
    assert shear_of(affine) == pytest.approx(np.sin(0.1))


@given(st.integers(1, 600), st.floats(0.2, 6), st.floats(0.2, 6))
def test_a_grid_covers_the_field_of_view_to_half_a_voxel(n, from_mm, to_mm):
    size = grid_size(n, from_mm, to_mm)
    assert size >= 1
    if n * from_mm >= to_mm / 2:
        assert abs(size * to_mm - n * from_mm) <= to_mm / 2 * (1 + 1e-12)  # rounding; found: 1.1e-13, of halves


@given(st.integers(0, 300), st.sampled_from([(1.0, 2.0), (0.5, 1.0), (0.75, 1.5), (1.0, 4.0), (0.25, 2.0)]))
def test_half_a_voxel_that_is_left_over_gets_a_voxel_of_its_own(whole, sizes):
    from_mm, to_mm = sizes  # after an even number of whole ones as after an odd one: what is seen at the ends is kept
    assert grid_size(round((whole + 0.5) * to_mm / from_mm), from_mm, to_mm) == whole + 1


def test_203_slices_of_half_a_millimetre_to_3_mm_and_back_are_34_and_204():
    low = grid_size(203, 0.5, 3.0)
    assert (low, grid_size(low, 3.0, 0.5)) == (34, 204)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 20))
def test_centre_coordinates_share_the_centre_and_step_by_the_ratio(n_out, n_in, ratio):
    at = centre_coordinates(n_out, n_in, ratio)
    assert at.mean() == pytest.approx((n_in - 1) / 2, abs=1e-12 * n_out * ratio + 1e-12)  # found: 1.1e-13 at most
    np.testing.assert_allclose(np.diff(at), ratio, rtol=2e-12)  # found: 3.4e-13


@quick
@given(spacings, turns, spacings, orientations)
def test_a_resampled_grid_keeps_its_centre_directions_and_new_spacing(spacing, turn, new_spacing, storage):
    affine = storage.affine(rigid(spacing, turn), HEAD.shape)
    shape = storage.permute(HEAD.shape)
    new_shape = tuple(grid_size(n, a, b) for n, a, b in zip(shape, spacing_of(affine), new_spacing, strict=True))
    new = resampled_affine(affine, shape, new_shape, new_spacing)
    centre, new_centre = ((np.array(s) - 1) / 2 for s in (shape, new_shape))
    np.testing.assert_allclose(world(new, new_centre), world(affine, centre), atol=1e-12)  # found: 7.1e-15 (rounding)
    np.testing.assert_allclose(spacing_of(new), new_spacing)
    # Found: 2.2e-16 (rounding)
    np.testing.assert_allclose(new[:3, :3] / affine_sizes(new), affine[:3, :3] / affine_sizes(affine), atol=1e-12)
    back = resampled_affine(new, new_shape, shape, spacing_of(affine))
    np.testing.assert_allclose(back, affine, atol=1e-12)  # found: 7.1e-15 (rounding)


@pytest.mark.parametrize("storage", STORAGES[::5])
@pytest.mark.parametrize("affine", [rigid((0.9, 1.1, 3.0)), OBLIQUE, np.diag([1.0, 1.0, 2.5, 1.0])])
def test_a_blob_keeps_its_place_when_resampled_in_the_processed_orientation(affine, storage):
    shape = (22, 20, 12)
    centre_mm = world(affine, (11.3, 9.2, 5.6))
    axes = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    distance = axes @ affine[:3, :3].T + affine[:3, 3] - centre_mm
    blob = np.exp(-(distance**2).sum(-1) / (2 * 4.0**2))
    stored, stored_affine = storage.apply(blob), storage.affine(affine, shape)

    turn = processing_orientation(stored_affine)
    processed, place = turn.apply(stored), turn.affine(stored_affine, stored.shape)
    new_spacing = (0.8, 0.7, 0.75)
    new_shape = tuple(map(grid_size, processed.shape, spacing_of(place), new_spacing))
    ratios = [n / o for n, o in zip(new_spacing, spacing_of(place), strict=True)]
    grid = map(centre_coordinates, new_shape, processed.shape, ratios)
    fine = map_coordinates(processed, np.meshgrid(*grid, indexing="ij"), order=3, mode="nearest")
    fine_affine = resampled_affine(place, processed.shape, new_shape, new_spacing)

    mass = np.clip(fine - 0.3, 0, None)  # the part of the blob that lies inside the field of view
    index = [np.average(c, weights=mass) for c in np.indices(fine.shape)]
    assert np.linalg.norm(world(fine_affine, index) - centre_mm) < 0.01 * min(new_spacing)  # found: 0.002
