"""Clinical extras: each is off by default, keyed under its own name, and does what its law says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fastsrgan.core.draws import rng
from fastsrgan.errors import UsageError
from fastsrgan.observation.artefacts import (
    ARTEFACTS,
    apply_bias,
    apply_motion,
    apply_truncation,
    bernstein_matrix,
    check_amounts,
    draw_bias,
    draw_motion,
    draw_truncation,
    drawn,
    truncation_matrix,
)
from fastsrgan.observation.model import Degradation, degrade
from fastsrgan.volume.geometry import centre_coordinates, grid_size
from fastsrgan.volume.intensity import add_noise
from fastsrgan.volume.resample import FWHM, degrade_matrix, slice_profile_matrix

AMOUNTS = {"bias_field": 0.3, "motion": 0.7, "gibbs": 0.5}
ALL = {"artefacts": AMOUNTS, "rician": True, "profile": 0.2, "gap": 0.4, "profile_box": 0.9}
SPACING, LOW = (1.0, 0.9, 0.8), (1.0, 0.9, 2.3)


def head(shape=(19, 23, 31), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32) * 900


def images(done) -> list[np.ndarray]:
    return [done.low_res, done.interpolated, done.hr]


# --- draws --------------------------------------------------------------------------------------------------------


def test_everything_is_off_by_default():
    plain, off = (
        Degradation((LOW,)),
        Degradation((LOW,), rician=False, profile=0, artefacts=dict.fromkeys(ARTEFACTS, 0.0)),
    )
    draw = plain.draw(3, 1, "sub-1")
    assert (draw.artefacts, draw.rician, draw.width) == ({}, False, 1)
    assert plain.linspace(1, 3).width == 1
    assert dataclasses.replace(off.draw(3, 1, "sub-1"), artefacts={}) == draw
    assert not any(drawn(draw.key, off.artefacts, 9).values())
    by_hand = degrade(head(), SPACING, LOW, power=draw.power, noise=draw.noise, key=draw.key)
    for a, b in zip(images(plain.apply(head(), SPACING, draw)), images(by_hand), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("name", ALL)
def test_one_extra_changes_no_draw_of_another(name):
    every, fewer = Degradation((LOW,), **ALL), Degradation((LOW,), **{**ALL, name: type(ALL[name])()})
    fields = {"profile": "width", "profile_box": "box"}
    for draws in ([d.draw(5, 2, "sub-1") for d in (every, fewer)], [d.linspace(1, 4) for d in (every, fewer)]):
        same = dataclasses.replace(draws[1], **{fields.get(name, name): getattr(draws[0], fields.get(name, name))})
        assert same == draws[0] and draws[0] != draws[1]


def test_draws_depend_on_the_key_alone():
    setting = Degradation((LOW,), **ALL)
    draws = [setting.draw(3, epoch, f"sub-{s}") for epoch in range(60) for s in range(5)]
    assert draws == [setting.draw(3, epoch, f"sub-{s}") for epoch in range(60) for s in range(5)]
    widths = np.array([d.width for d in draws])
    # Found: 0.8, 1.2
    assert 0.8 <= widths.min() < 0.81 and 1.19 < widths.max() <= 1.2 and len(set(widths)) == len(draws)
    gaps, boxes = (np.array([getattr(d, name) for d in draws]) for name in ("gap", "box"))
    # Found: 0.0023, 0.4, 0.013, 0.9
    assert 0 <= gaps.min() < 0.01 and 0.39 < gaps.max() <= 0.4 and 0 <= boxes.min() < 0.02 and 0.89 < boxes.max() <= 0.9
    assert abs(np.corrcoef([widths, gaps, boxes]) - np.eye(3)).max() < 0.2  # none is another in disguise; found: 0.074
    a, b = (images(setting.apply(head(), SPACING, setting.draw(3, 1, "sub-1"))) for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    other = setting.apply(head(), SPACING, setting.draw(3, 2, "sub-1"))
    assert not np.array_equal(a[0], other.low_res)
    key = (7, 1, "sub-1", "noise")
    names = [draw_bias(key, 1.0).ravel()[:3], draw_motion(key, 3, 1.0)[0], rng(*key).random(3)]
    assert len({tuple(n) for n in names}) == 3


@pytest.mark.parametrize(
    "bad",
    [
        {"artefacts": {"bias_field": -0.1}},
        {"artefacts": {"bias_field": 5.1}},
        {"profile": 1.0},
        {"artefacts": {"motion": -1}},
        {"artefacts": {"motion": float("nan")}},
        {"artefacts": {"motion": float("inf")}},
        {"artefacts": {"gibs": 0.1}},
        {"block_bytes": 0},
        {"gap": 1.0},
    ],
)
def test_nonsense_is_refused(bad):
    name = next(iter(bad))
    with pytest.raises(UsageError, match=name if name != "artefacts" else next(iter(bad[name]))):
        Degradation((LOW,), **bad)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_amounts_are_allowed_up_to_their_limit(name):
    below = ARTEFACTS[name].below
    largest = below if np.isfinite(below) else 1e9
    check_amounts({name: 0.0})
    check_amounts({name: largest})
    for amount in (-1e-9, np.nextafter(below, np.inf)):
        with pytest.raises(UsageError, match=name):
            check_amounts({name: float(amount)})


# --- bias field ---------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.tuples(*[st.integers(2, 40)] * 3), st.floats(0.01, 1), st.integers(0, 99))
def test_bias_field_is_bounded_and_smooth(shape, largest, seed):
    log = np.log(apply_bias(torch.ones(shape), draw_bias((seed, "x"), largest), shape).numpy())
    assert np.abs(log).max() <= largest + 1e-6  # found: 0.85 of it
    for axis, n in enumerate(shape):
        # A cubic's slope is at most 3 times the largest step between its control points, here 2 times the bound.
        assert np.abs(np.diff(log, axis=axis)).max() <= 6 * largest / n + 1e-5  # found: 0.85 of it


def test_bias_field_uses_its_range_and_covers_the_volume():
    points = draw_bias((1, "x"), 0.4)
    log = np.log(apply_bias(torch.ones(60, 61, 62), points, (60, 61, 62)).numpy())
    assert log.max() - log.min() > 0.4  # found: 0.55
    assert log[0, 0, 0] == pytest.approx(points[0, 0, 0], abs=0.08)  # half a voxel from the corner; found: 0.014
    assert log[-1, 0, -1] == pytest.approx(points[-1, 0, -1], abs=0.08)  # found: 0.033
    expected = np.einsum("xa,yb,zc,abc->xyz", *(bernstein_matrix(n) for n in log.shape), points)
    assert np.abs(log - expected).max() < 1e-6  # found: 1.1e-7


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mirrored_control_points_give_the_mirrored_field(axis):
    """The field is that of the voxels' centres: neither end of an axis is nearer to its control points."""
    shape, points = (7, 10, 13), draw_bias((1, "x"), 0.4)
    field, turned = (apply_bias(torch.ones(shape), p, shape) for p in (points, np.flip(points, axis).copy()))
    assert (turned - field.flip(axis)).abs().max() < 1e-6  # found: 1.2e-7


def test_part_of_a_field_is_that_part():
    image, points = torch.from_numpy(head()), draw_bias((1, "x"), 0.4)
    for axis in range(3):
        whole = apply_bias(image, points, image.shape)
        part = apply_bias(image.narrow(axis, 5, 9).contiguous(), points, image.shape, axis, 5)
        assert (part / whole.narrow(axis, 5, 9) - 1).abs().max() < 1e-6  # found: 2.4e-7


@pytest.mark.parametrize("geometry", ["physical", "segsrgan"])
def test_bias_field_is_on_the_truth_and_on_what_the_scanner_saw(geometry):
    hr = head((20, 24, 30))
    points = draw_bias((0, "k"), 0.5)
    biased = hr * np.exp(np.einsum("xa,yb,zc,abc->xyz", *(bernstein_matrix(n) for n in hr.shape), points))
    args = ((1.0, 1.0, 1.0), (1.0, 1.0, 3.0))
    done = degrade(hr, *args, power=1.2, bias_field=0.5, key="k", geometry=geometry)
    expected = degrade(biased, *args, power=1.2, key="k", geometry=geometry)
    for a, b in zip(images(done), images(expected), strict=True):
        assert np.abs(a - b).max() < 2e-6  # found: 3.6e-7


# --- Rician noise -------------------------------------------------------------------------------------------------


def test_rician_noise_has_the_moments_of_magnitude_images():
    hr = np.zeros((60, 60, 40), np.float32)
    hr[30:] = 100
    done = degrade(hr, (1, 1, 1), (1, 1, 1), noise=0.05, rician=True, key=3)
    seen, sd = done.low_res * done.scale, 5.0
    air, tissue = seen[:30], seen[30:]
    assert air.min() > 0 and air.mean() == pytest.approx(sd * np.sqrt(np.pi / 2), rel=0.01)  # found: 0.0027
    assert air.std() == pytest.approx(sd * np.sqrt(2 - np.pi / 2), rel=0.01)  # found: 0.0034
    assert tissue.std() == pytest.approx(sd, rel=0.005)  # Gaussian where the signal is strong; found: 6.7e-4
    assert (tissue.astype(float) ** 2).mean() == pytest.approx(100**2 + 2 * sd**2, rel=2e-5)  # found: 3.5e-6
    assert np.abs(done.hr * done.scale - hr).max() < 1e-4  # found: 0


def test_rician_noise_is_the_formula_on_the_same_bits_as_gaussian_noise():
    x = np.random.default_rng(0).random((70, 60, 50)).astype(np.float32)  # more than one piece
    n1, n2 = (rng(1, name).standard_normal(x.shape, dtype=np.float32) * np.float32(0.1) for name in ("a", "b"))
    done = add_noise(torch.from_numpy(x.copy()), 0.1, rng(1, "a"), rng(1, "b")).numpy()
    assert np.abs(done - np.hypot(x + n1, n2)).max() < 2e-7  # found: 0 (rounding)
    assert np.array_equal(add_noise(torch.from_numpy(x.copy()), 0.1, rng(1, "a")).numpy(), x + n1)


def test_no_noise_is_no_noise_for_both():
    a, b = (degrade(head(), SPACING, LOW, rician=r) for r in (False, True))
    assert all(np.array_equal(x, y) for x, y in zip(images(a), images(b), strict=True))


# --- slice profile ------------------------------------------------------------------------------------------------


@given(st.integers(30, 80), st.floats(2.5, 6), st.floats(0.7, 1.5))
def test_width_is_the_profile_s_full_width_at_half_maximum(n, ratio, width):
    m = grid_size(n, 1, ratio)
    matrix = slice_profile_matrix(n, m, ratio, width)
    assert np.abs(matrix.sum(1) - 1).max() < 1e-12  # found: 4.4e-16 (rounding)
    for row, centre in zip(matrix, centre_coordinates(m, n, ratio), strict=True):
        if 4 * ratio * width / FWHM + 1 < centre < n - 2 - 4 * ratio * width / FWHM:
            spread = np.sqrt((row * (np.arange(n) - centre) ** 2).sum())
            assert spread == pytest.approx(ratio * width / FWHM, rel=0.005)  # found: 4.7e-4


def test_width_one_is_the_plain_profile_and_a_narrow_one_picks_voxels():
    assert np.array_equal(slice_profile_matrix(40, 13, 3.1, 1.0), slice_profile_matrix(40, 13, 3.1))
    narrow = slice_profile_matrix(39, 13, 3.0, 0.001)
    assert np.abs(narrow - np.eye(39)[1::3]).max() < 1e-9  # found: 0 (rounding)
    assert np.isfinite(slice_profile_matrix(40, 16, 2.5, 0.01)).all()


@given(st.integers(20, 60), st.floats(1.1, 6), st.floats(0.4, 1.3))
def test_a_box_weighs_each_voxel_by_the_length_of_it_that_lies_inside(n, ratio, width):
    m = grid_size(n, 1, ratio)
    matrix = slice_profile_matrix(n, m, ratio, width, 1.0)
    assert np.abs(matrix.sum(1) - 1).max() < 1e-12  # found: 3.3e-16 (rounding)
    fine = 1000  # parts per voxel
    parts = (np.arange(n * fine) + 0.5) / fine - 0.5
    for row, centre in zip(matrix, centre_coordinates(m, n, ratio), strict=True):
        if ratio * width / 2 < centre < n - 1 - ratio * width / 2:  # away from the reflecting edges
            inside = np.abs(parts - centre) < ratio * width / 2
            # Found: 1.4e-3, of the fine grid that stands for the integral.
            assert np.abs(inside.reshape(n, fine).mean(1) / (ratio * width) - row).max() < 3e-3
    half = slice_profile_matrix(n, m, ratio, width, 0.25)
    # Found: 2.2e-16 (rounding)
    assert np.allclose(half, 0.75 * slice_profile_matrix(n, m, ratio, width) + 0.25 * matrix, atol=1e-14)


def test_slices_that_touch_share_the_whole_image_and_gaps_leave_some_of_it_out():
    touching = degrade_matrix(30, 1.0, 3.0, profile="box")
    assert np.allclose(touching.sum(0), 1 / 3) and np.allclose(touching[:, 1::3], np.eye(10) / 3)
    apart = degrade_matrix(30, 1.0, 3.0, width=1 / 3, profile="box")
    assert np.allclose(apart, np.eye(30)[1::3])


def test_thickness_is_in_mm_and_across_the_slices_alone():
    hr = head((20, 24, 30))
    plain = degrade(hr, (1, 1, 1), (1, 2, 3))
    assert np.array_equal(degrade(hr, (1, 1, 1), (1, 2, 3), thickness_mm=3).low_res, plain.low_res)
    thin = degrade(hr, (1, 1, 1), (1, 2, 3), thickness_mm=1.8, profile="box")
    down = degrade_matrix(24, 1, 2, profile="box"), degrade_matrix(30, 1, 3, width=0.6, profile="box")
    expected = np.einsum("bj,ck,ijk->ibc", *down, hr.astype(float))
    assert np.abs(thin.low_res * thin.scale - expected).max() < 1e-3  # of intensities of hundreds; found: 1e-4
    setting = Degradation(((1, 2, 3),), gap=0.5, profile_box=1.0)
    draw = setting.draw(1, 1, "sub-1")
    by_hand = degrade(
        hr, (1, 1, 1), (1, 2, 3), power=draw.power, noise=draw.noise, key=draw.key,
        thickness_mm=3 * (1 - draw.gap), profile=draw.box,
    )  # fmt: skip
    assert draw.gap and draw.box and np.array_equal(setting.apply(hr, (1, 1, 1), draw).low_res, by_hand.low_res)
    for low in ((3, 1, 2), (2, 3, 1)):  # on whichever stored axis the slices are
        gaps = Degradation((low,), 0.0, 0.0, gap=0.5)
        thin, some = gaps.draw(1, 1, "sub-1"), head((12, 12, 12))
        by_hand = degrade(some, (1, 1, 1), low, key=thin.key, thickness_mm=3 * (1 - thin.gap))
        assert np.array_equal(gaps.apply(some, (1, 1, 1), thin).low_res, by_hand.low_res)
    for bad in (
        {"thickness_mm": -1.0},
        {"profile": "hann"},
        {"profile": 1.5},
        {"profile": "box", "geometry": "segsrgan"},
    ):
        with pytest.raises(UsageError, match=r"thickness|profile"):
            degrade(hr, (1, 1, 1), (1, 2, 3), **bad)


@pytest.mark.parametrize("geometry", ["physical", "segsrgan"])
def test_width_blurs_what_the_scanner_saw_and_leaves_the_truth(geometry):
    hr = head((20, 24, 30))
    sharp, plain, soft = (degrade(hr, (1, 1, 1), (1, 1, 3), width=w, geometry=geometry) for w in (0.7, 1.0, 1.4))
    stds = [(d.low_res * d.scale).std() for d in (sharp, plain, soft)]
    assert stds[0] > 1.1 * stds[1] > 1.2 * stds[2]  # found: 1.06 and 1.05 of them
    for other in (sharp, soft):
        assert np.abs(other.hr * other.scale - plain.hr * plain.scale).max() < 1e-3  # found: 1.2e-4
    assert np.array_equal(degrade(hr, (1, 1, 1), (1, 1, 3), geometry=geometry).low_res, plain.low_res)
    assert degrade_matrix(40, 0.5, 0.5, width=1.3) is None  # an axis that is not decimated is not blurred


# --- motion between slices ----------------------------------------------------------------------------------------


def blob(shape, centre, sd=3.0) -> np.ndarray:
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return np.exp(-0.5 * sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) / sd**2).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_motion_carries_a_blob_to_where_the_pose_says(axis):
    in_plane = [d for d in range(3) if d != axis]
    shape, spacing = [47, 53, 49], (0.9, 1.3, 0.7)
    shape[axis] = 3
    centre = [n / 2 + 4.3 for n in shape]
    centre[axis] = 1.0
    still = np.repeat(np.take(blob(shape, centre), [1], axis), 3, axis)
    poses = np.array([[0.0, 0.0, 0.0], [1.7, -2.2, 0.0], [0.6, 0.4, 15.0]])
    before = still.copy()
    moved = apply_motion(torch.from_numpy(still), poses, spacing, axis).numpy()
    assert np.array_equal(still, before)
    assert np.array_equal(np.take(moved, 0, axis), np.take(still, 0, axis))
    size = np.array([shape[d] for d in in_plane])
    step = np.array([spacing[d] for d in in_plane])
    for m, (t1, t2, degrees) in enumerate(poses):
        found = np.array(ndimage.center_of_mass(np.take(moved, m, axis)))
        start = (np.array([centre[d] for d in in_plane]) - (size - 1) / 2) * step  # mm from the slice's centre
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        goal = np.array([[c, -s], [s, c]]) @ start + (t1, t2)
        assert np.abs((found - (size - 1) / 2) * step - goal).max() < 3e-5  # mm; found: 3.6e-6


def test_motion_is_the_spline_that_scipy_computes():
    stack, pose = head((33, 38, 2)), np.array([1.3, -2.6, 4.0])
    moved = apply_motion(torch.from_numpy(stack), np.stack([pose, 0 * pose]), (1.0, 1.0, 5.0)).numpy()
    c, s = np.cos(np.deg2rad(4)), np.sin(np.deg2rad(4))
    back, centre = np.array([[c, s], [-s, c]]), np.array([16, 18.5])
    offset = centre - back @ (centre + pose[:2])
    expected = ndimage.affine_transform(stack[..., 0].astype(float), back, offset, order=3, mode="reflect")
    assert np.abs(moved[..., 0] - expected).max() < 900 * 3e-5  # found: 4.8e-6
    assert np.array_equal(moved[..., 1], stack[..., 1])


def test_motion_by_whole_voxels_moves_voxels():
    stack = torch.from_numpy(head((12, 14, 2)))
    moved = apply_motion(stack, np.array([[2.0, 0, 0], [0, -3 * 0.5, 0]]), (1.0, 0.5, 4.0))
    assert (moved[2:, :, 0] - stack[:-2, :, 0]).abs().max() < 900 * 1e-5  # found: 1.9e-6
    assert (moved[:, :-3, 1] - stack[:, 3:, 1]).abs().max() < 900 * 1e-5  # found: 1.5e-6


def test_poses_have_the_asked_spread_and_no_mean():
    poses = draw_motion((1, "x"), 4000, 0.8)
    assert np.abs(poses.mean(0)).max() < 1e-12  # found: 3.9e-17 (rounding)
    assert poses.std(0) == pytest.approx([0.8] * 3, rel=0.05)  # found: 0.0099
    assert np.abs(np.corrcoef(poses.T) - np.eye(3)).max() < 0.06  # found: 0.026
    assert not draw_motion((1, "x"), 1, 0.8).any()


def test_motion_moves_each_slice_as_drawn_and_leaves_the_truth():
    hr = blob((48, 44, 36), (24, 22, 17.5), 6.0) * 500
    still = degrade(hr, (1, 1, 1), (1, 1, 3), key=4)
    moved = degrade(hr, (1, 1, 1), (1, 1, 3), key=4, motion=0.9)
    assert np.abs(moved.hr * moved.scale - still.hr * still.scale).max() < 3e-4  # found: 3.1e-5
    poses = draw_motion((0, 4), 12, 0.9)
    for m in range(3, 9):
        where = [np.array(ndimage.center_of_mass(d.low_res[..., m])) for d in (still, moved)]
        assert np.abs(where[1] - where[0] - poses[m, :2]).max() < 0.03  # found: 0.0084


def test_motion_comes_before_decimation_within_slices():
    hr = blob((48, 44, 36), (26, 20, 17.5), 5.0)
    still = degrade(hr, (1, 1, 1), (2, 2, 4), key=1)
    moved = degrade(hr, (1, 1, 1), (2, 2, 4), key=1, motion=1.5)
    poses = draw_motion((0, 1), 9, 1.5)
    centre = (np.array([48, 44]) - 1) / 2
    for m in (3, 4, 5):
        before, after = (np.array(ndimage.center_of_mass(d.low_res[..., m])) * 2 + 0.5 for d in (still, moved))
        angle = np.deg2rad(poses[m, 2])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        assert np.abs(turn @ (before - centre) + poses[m, :2] + centre - after).max() < 0.01  # found: 0.002


# --- Gibbs ringing ------------------------------------------------------------------------------------------------


@given(st.integers(2, 70), st.floats(0, 0.9))
def test_truncation_is_the_low_pass_of_the_discrete_fourier_transform(n, share):
    matrix = truncation_matrix(n, share)
    frequencies = np.rint(np.abs(np.fft.fftfreq(n) * n))
    kept = np.floor((1 - share) * n / 2)
    expected = np.fft.ifft(np.fft.fft(np.eye(n), axis=0) * (frequencies <= kept)[:, None], axis=0).real
    assert np.abs((np.eye(n) if matrix is None else matrix) - expected).max() < 1e-12  # found: 2.8e-15 (rounding)
    if matrix is not None:
        assert np.abs(matrix @ matrix - matrix).max() < 1e-12  # once cut, cut; found: 2.2e-15 (rounding)
        assert np.abs(matrix.sum(1) - 1).max() < 1e-12  # what is constant stays; found: 4.9e-15 (rounding)


@pytest.mark.parametrize("share", [0.8, 0.9])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_edge_rings_by_the_wilbraham_gibbs_constant_in_the_plane_alone(axis, share):
    shape = [512, 512, 512]
    shape[axis], shape[(axis + 1) % 3] = 2, 3
    image = torch.ones(shape)
    edged = image.narrow((axis + 2) % 3, 128, 256)
    edged += 1
    seen = apply_truncation(image, share, axis)
    assert float(seen.max()) == pytest.approx(2 + 0.0895, abs=0.01)  # found: 0.0018
    assert float(seen.min()) == pytest.approx(1 - 0.0895, abs=0.01)  # found: 0.0018
    through = torch.ones(8, 8, 8)
    through.narrow(axis, 2, 3).add_(1)
    assert (apply_truncation(through, share, axis) - through).abs().max() < 1e-5  # found: 0 (rounding)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_ringing_around_nothing_is_a_magnitude(axis):
    """A bright block in air: where the low pass falls below zero its magnitude is seen, as in a scanner's images."""
    shape = [24, 20, 22]
    image = torch.zeros(shape)
    image[8:13, 7:12, 9:14] = 1
    expected = image.double()
    for d in (d for d in range(3) if d != axis):
        low_pass = torch.from_numpy(truncation_matrix(shape[d], 0.6))
        expected = torch.tensordot(low_pass, expected, ([1], [d])).movedim(0, d)
    assert expected.min() < -0.03  # found: -0.073 and below
    seen = apply_truncation(image, 0.6, axis)
    assert (seen - expected.abs()).abs().max() < 1e-6  # found: 1.8e-7


def test_truncation_is_drawn_from_its_key_and_leaves_the_truth():
    shares = np.array([draw_truncation((0, str(i)), 0.6) for i in range(400)])
    assert 0 <= shares.min() < 0.02 and 0.58 < shares.max() <= 0.6  # found: 5.4e-4, 0.6
    assert draw_truncation((0, "1"), 0.6) == shares[1]
    hr = head((20, 24, 30))
    plain, cut = (degrade(hr, (1, 1, 1), (1, 1, 3), key=2, gibbs=g) for g in (0.0, 0.6))
    assert np.abs(cut.hr * cut.scale - plain.hr * plain.scale).max() < 1e-3  # found: 1.2e-4
    expected = apply_truncation(torch.from_numpy(plain.low_res * plain.scale), draw_truncation((0, 2), 0.6)).numpy()
    assert np.abs(cut.low_res * cut.scale - expected).max() < 1e-3  # found: 1.2e-4
    assert np.abs(cut.low_res - plain.low_res).max() > 0.01  # found: 0.56
