"""The result that agrees with its scan: the laws of the projection, for every geometry, kind of array and slab."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsrgan.errors import InputError, UsageError
from fastsrgan.volume import consistency
from fastsrgan.volume.consistency import Observation, agree, agreed, consistent_start_matrix, observation, residual
from fastsrgan.volume.geometry import grid_size
from fastsrgan.volume.resample import degrade_matrix, modulo_size, slice_profile_matrix, upsample_matrix

CASES = {  # scan's voxels, its voxel size, the result's voxel size, thickness, profile
    "one thick axis": ((6, 7, 9), (1, 1, 3), (1, 1, 1), None, "gaussian"),
    "no whole ratio": ((6, 7, 9), (0.8, 0.8, 2.9), (0.8, 0.8, 0.7), None, "gaussian"),
    "gaps": ((6, 7, 9), (1, 1, 4), (1, 1, 1), 2.5, "box"),
    "two thick axes": ((6, 5, 8), (1, 2.2, 3), (1, 1, 1), None, "box"),
    "three thick axes": ((5, 4, 6), (1.5, 2, 3.1), (1, 1, 0.9), 2.8, "gaussian"),
    "coarser within the plane": ((9, 8, 6), (0.7, 1, 3), (1, 1, 1), None, "gaussian"),
    "thick axis first": ((9, 7, 6), (3, 1, 1), (1, 1, 1), None, 0.5),
}


def case(name: str, geometry: str = "physical"):
    scan_shape, scan_mm, mm, thickness, profile = CASES[name]
    shape = tuple(grid_size(m, a, b) for m, a, b in zip(scan_shape, scan_mm, mm, strict=True))
    seen = observation(scan_shape, scan_mm, shape, mm, geometry=geometry, thickness_mm=thickness, profile=profile)
    assert seen is not None
    rng = np.random.default_rng(0)
    return seen, rng.normal(size=shape), rng.normal(size=scan_shape)


def dense(matrices, sizes) -> np.ndarray:
    x, y, z = (np.eye(n) if m is None else m for m, n in zip(matrices, sizes, strict=True))
    return np.kron(np.kron(x, y), z)


def through(matrices, array):
    return np.einsum(
        "ai,bj,ck,ijk->abc", *(np.eye(n) if m is None else m for m, n in zip(matrices, array.shape, strict=True)), array
    )


def agreeing(sr, scan, seen, w, **options):
    done = sr.copy()
    agree(done, scan, seen, w, **options)
    return done


@pytest.mark.parametrize("name", CASES)
def test_agreement_is_the_dense_formula(name):
    seen, sr, scan = case(name)
    down, align = dense(seen.down, sr.shape), dense(seen.align, scan.shape)
    for w in (1e-3, 0.2):
        step = down.T @ np.linalg.solve(down @ down.T + w * np.eye(len(down)), align @ scan.ravel() - down @ sr.ravel())
        # Found: 2e-14 (rounding)
        assert np.abs(agreeing(sr, scan, seen, w) - (sr.ravel() + step).reshape(sr.shape)).max() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_without_noise_the_result_acquired_again_is_the_scan_and_a_second_time_changes_nothing(name):
    seen, sr, scan = case(name)
    once = agreeing(sr, scan, seen, 0.0)
    assert np.abs(through(seen.down, once) - through(seen.align, scan)).max() < 1e-12  # found: 6e-15 (rounding)
    # Found: 5.8e-15, 2.8
    assert np.abs(residual(once, scan, seen)).max() < 1e-12 and np.abs(residual(sr, scan, seen)).max() > 1
    assert np.abs(agreeing(once, scan, seen, 0.0) - once).max() < 1e-12  # found: 1.5e-14 (rounding)


@pytest.mark.parametrize("name", CASES)
def test_slabs_equal_the_whole_in_every_layout_and_ones_stay_ones(name):
    seen, sr, scan = case(name)
    whole = agreeing(sr, scan, seen, 0.1, slab_bytes=1 << 30)
    assert np.abs(agreeing(sr, scan, seen, 0.1, slab_bytes=1) - whole).max() < 1e-12  # found: 1.3e-15 (rounding)
    turned = np.asfortranarray(sr)[:, ::-1][:, ::-1]  # strides in another order, as memory maps of a turned volume
    agree(turned, scan, seen, 0.1, slab_bytes=700)
    assert np.abs(turned - whole).max() < 1e-12  # found: 1.3e-15 (rounding)
    assert np.abs(residual(sr, scan, seen, slab_bytes=1) - residual(sr, scan, seen)).max() < 1e-6  # found: 0 (rounding)
    # Found: 3.3e-16 (rounding)
    assert np.abs(agreeing(np.ones_like(sr), np.ones_like(scan), seen, 0.1) - 1).max() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_numpy_and_torch_float32_and_integers_give_the_same_numbers(name):
    seen, sr, scan = case(name)
    scan = np.round(100 * scan).astype(np.int16)
    expected = agreeing(100 * sr, scan.astype(float), seen, 0.05)
    single = agreeing((100 * sr).astype(np.float32), scan, seen, 0.05, slab_bytes=900)
    assert single.dtype == np.float32 and np.abs(single - expected).max() < 2e-6 * 300  # found: 2.1e-7 * 300
    tensor = torch.from_numpy(100 * sr)
    agree(tensor, torch.from_numpy(scan), seen, 0.05)
    assert np.abs(tensor.numpy() - expected).max() < 1e-10  # found: 0 (rounding)
    batch = torch.from_numpy(np.stack([100 * sr, sr]))
    scans = torch.from_numpy(np.stack([scan.astype(float), scan / 100]))
    # Found: 1.8e-15 (rounding)
    assert np.abs(agreed(batch, scans, seen, 0.05)[1].numpy() - expected / 100).max() < 1e-12


@pytest.mark.parametrize("name", ["one thick axis", "three thick axes"])
def test_the_correction_is_self_adjoint_and_gradients_are_exact(name):
    seen, sr, scan = case(name)
    rng = np.random.default_rng(1)
    a, b = (torch.from_numpy(rng.normal(size=sr.shape)) for _ in range(2))
    nothing = torch.zeros(scan.shape, dtype=torch.float64)
    forth, back = agreed(a, nothing, seen, 0.1), agreed(b, nothing, seen, 0.1)
    assert float((forth * b).sum()) == pytest.approx(float((a * back).sum()), rel=1e-12)  # found: 1.9e-16 (rounding)
    a.requires_grad_()
    (agreed(a, nothing, seen, 0.1) * b).sum().backward()
    # Found: 6.7e-16 (rounding)
    assert torch.allclose(a.grad, back, atol=1e-12)  # the derivative of a self-adjoint map is the map


def test_the_nearest_image_is_taken():
    seen, sr, scan = case("two thick axes")
    step = agreeing(sr, scan, seen, 0.0) - sr
    rng = np.random.default_rng(2)
    free = rng.normal(size=sr.shape)
    free -= agreeing(np.zeros_like(sr), through(seen.down, free), seen, 0.0)  # what the scan does not see
    assert np.abs(through(seen.down, free)).max() < 1e-12  # found: 1e-15 (rounding)
    assert abs((step * free).sum()) < 1e-12 * np.linalg.norm(step) * np.linalg.norm(free)  # found: 9.9e-18 (rounding)


def test_noise_is_weighed_as_the_best_linear_estimate_says():
    # x with variance 1 per voxel, noise with variance w: no other weight has a smaller error.
    seen, _, scan = case("one thick axis")
    rng = np.random.default_rng(3)
    errors = dict.fromkeys((0.003, 0.03, 0.1, 0.3, 3.0), 0.0)
    for _ in range(40):
        x = rng.normal(size=(6, 7, 27))
        y = through(seen.down, x) + np.sqrt(0.1) * rng.normal(size=scan.shape)
        for w in errors:
            errors[w] += ((agreeing(np.zeros_like(x), y, seen, w) - x) ** 2).sum()
    assert min(errors, key=errors.get) == 0.1


def test_the_best_linear_estimate_is_never_worse_than_the_spline():
    seen, _, scan = case("one thick axis")
    rng = np.random.default_rng(4)
    truth = (5 + rng.random((6, 7, 27))).astype(np.float32)
    spline = truth + np.float32(0.05)
    clean = through(seen.down, truth).astype(np.float32)
    noisy = (clean + 3 * rng.normal(size=scan.shape)).astype(np.float32)
    assert np.array_equal(consistency.best_linear(spline, noisy, truth, seen), spline)
    # Found: 0.0016
    assert ((consistency.best_linear(spline, clean, truth, seen) - truth) ** 2).sum() < 0.005 * truth.size * 0.05**2


def test_the_spline_is_compared_as_it_is_scored_not_below_zero():
    """Its overshoots below zero do not make a noisy estimate better than it."""
    seen, *_ = case("one thick axis")
    rng = np.random.default_rng(5)
    truth = np.zeros((6, 7, 27), np.float32)
    truth[:, :, 13:] = 5
    spline = np.where(truth > 0, truth + 0.05, -1).astype(np.float32)
    noisy = (through(seen.down, truth) + 0.5 * rng.normal(size=through(seen.down, truth).shape)).astype(np.float32)
    some = spline.copy()
    agree(some, noisy, seen, 1.0, floor=0.0)
    errors = [((image - truth) ** 2).sum() for image in (np.maximum(spline, 0), some, spline)]
    assert errors[0] < errors[1] < errors[2]
    assert np.array_equal(consistency.best_linear(spline, noisy, truth, seen), np.maximum(spline, 0))


@pytest.mark.parametrize("name", CASES)
def test_the_floor_holds(name):
    seen, sr, scan = case(name)
    free, bound = agreeing(sr, scan, seen, 0.1), agreeing(sr, scan, seen, 0.1, floor=-0.5)
    assert np.array_equal(bound, np.maximum(free, -0.5)) and (free < -0.5).any()


@pytest.mark.parametrize("low", [2.7, 3.0])
def test_the_original_s_operator_where_its_sizes_fit(low):
    n = modulo_size(60, low)
    down = [degrade_matrix(k, 1.0, r, "segsrgan") for k, r in ((8, 1.0), (9, 1.0), (n, low))]
    m = len(down[2])
    seen = observation((8, 9, m), (1, 1, low), (8, 9, n), (1, 1, 1), geometry="segsrgan")
    assert seen is not None and all(np.array_equal(a, b) for a, b in zip(seen.down, down, strict=True))
    assert observation((8, 9, m), (1, 1, low), (8, 9, n + 9), (1, 1, 1), geometry="segsrgan") is None
    thin = observation((8, 9, m), (1, 1, low), (8, 9, n), (1, 1, 1), geometry="segsrgan", thickness_mm=0.6 * low)
    down[2] = degrade_matrix(n, 1.0, low, "segsrgan", 0.6)
    assert thin is not None and all(np.array_equal(a, b) for a, b in zip(thin.down, down, strict=True))


def test_the_best_linear_estimate_is_not_below_zero():
    seen, truth, scan = case("one thick axis")
    spline = np.full(truth.shape, 0.1, np.float32)
    made = consistency.best_linear(spline, np.full(scan.shape, -1.0), np.full(truth.shape, -1.0), seen)
    assert made.min() == made.max() == 0 and (spline == np.float32(0.1)).all()


def test_the_observation_is_the_model_that_degrades():
    from fastsrgan.observation.model import degrade

    hr = np.random.default_rng(0).random((8, 9, 31)).astype(np.float32)
    done = degrade(hr, (1, 1, 1), (1, 1, 3.2), thickness_mm=2.0, profile="box")
    seen = observation(done.low_res.shape, (1, 1, 3.2), hr.shape, (1, 1, 1), thickness_mm=2.0, profile="box")
    assert np.abs(residual(done.hr, done.low_res, seen)).max() < 1e-6  # found: 1.2e-7
    other = observation(done.low_res.shape, (1, 1, 3.2), hr.shape, (1, 1, 1), profile="box")
    assert np.abs(residual(done.hr, done.low_res, other)).max() > 1e-3  # found: 0.24


@settings(max_examples=30)
@given(st.integers(2, 40), st.floats(1.05, 6), st.sampled_from(["gaussian", "box"]), st.floats(0.5, 1.0))
def test_a_consistent_start_gives_the_scan_back_and_keeps_constants(n, ratio, profile, width):
    down = degrade_matrix(n, 1.0, ratio, width=width, profile=profile)
    up = upsample_matrix(len(down), n, 1 / ratio)
    start = consistent_start_matrix(up, down, 0.0)
    assert np.abs(down @ start - np.eye(len(down))).max() < 1e-12  # found: 3e-16
    assert np.abs(start.sum(1) - 1).max() < 1e-12  # found: 8e-16
    sr, scan = up @ np.arange(len(down)), np.arange(len(down), dtype=float)
    seen = Observation((None, None, down))
    by_agree = agreeing(sr[None, None], scan[None, None], seen, 0.01)[0, 0]
    assert np.abs(consistent_start_matrix(up, down, 0.01) @ scan - by_agree).max() < 1e-11 * n  # found: 2e-14


def test_slabs_leave_memory_at_a_few_planes(monkeypatch):
    seen, _, _ = case("one thick axis")
    sizes = []
    plain = consistency.through
    monkeypatch.setattr(consistency, "through", lambda x, m: (sizes.append(x.numel()), plain(x, m))[1])
    sr, scan = np.zeros((6, 7, 27), np.float32), np.zeros((6, 7, 9), np.float32)
    agree(sr, scan, seen, 0.1, slab_bytes=4 * 2 * sr[0].size)
    assert max(sizes) <= sr[0].size


def test_what_does_not_fit_is_refused():
    seen, sr, scan = case("one thick axis")
    with pytest.raises(InputError, match="does not belong"):
        agree(sr, scan[:, :, :-1], seen, 0.1)
    with pytest.raises(UsageError, match="slice thickness"):
        observation((6, 7, 9), (1, 1, 3), (6, 7, 27), (1, 1, 1), thickness_mm=0)
    with pytest.raises(UsageError, match="gaussian, box"):
        observation((6, 7, 9), (1, 1, 3), (6, 7, 27), (1, 1, 1), profile="sinc")
    with pytest.raises(UsageError, match="Gaussian alone"):
        observation((6, 7, 9), (1, 1, 3), (6, 7, 27), (1, 1, 1), profile="box", geometry="segsrgan")


def test_the_thickness_is_that_of_the_slices_and_of_no_other_axis():
    seen = observation((6, 5, 8), (1, 2.2, 3), (6, 11, 24), (1, 1, 1), thickness_mm=1.5)
    expected = None, slice_profile_matrix(11, 5, 2.2), slice_profile_matrix(24, 8, 3.0, 0.5)
    assert seen.down[0] is None and all(map(np.array_equal, seen.down[1:], expected[1:]))


def test_an_axis_with_another_number_of_voxels_is_brought_onto_them_however_near_its_size_is():
    seen = observation((200, 6, 6), (1, 1, 3), (199, 6, 18), (1.005, 1, 1))
    assert seen.align[0].shape == (199, 200) and seen.align[1:] == (None, None) and seen.down[:2] == (None, None)
    near = observation((50, 6, 6), (1, 1, 3), (50, 6, 18), (1.005, 1, 1))
    assert near.align == (None, None, None) and not near.is_identity
    assert observation((6, 6, 6), (1, 1, 1), (6, 6, 6), (1, 1, 1)).is_identity
