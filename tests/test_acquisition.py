"""What a scan tells about its acquisition: its noise, the weight that follows, and which profile fits."""

from __future__ import annotations

import functools

import numpy as np
import phantom
import pytest
import torch

from fastsrgan.data.pool import Slices
from fastsrgan.errors import UsageError
from fastsrgan.volume import acquisition
from fastsrgan.volume.acquisition import (
    LARGEST,
    NOISE_UNKNOWN,
    PROFILE_GUESSED,
    PROFILE_KNOWN,
    assumed,
    choose_weight,
    lacking_sd,
    missing_sd,
    noise_sd,
    sampled,
)
from fastsrgan.volume.consistency import agreed, observation, patch_agreement
from fastsrgan.volume.resample import apply_axes

MM, THICK = (2.0, 2.0, 2.0), (2.0, 2.0, 6.0)


@functools.lru_cache
def truth() -> np.ndarray:
    return phantom.head((80, 96, 72), MM).data / 200


def acquire(profile: str = "gaussian", noise: float = 0.0, seed: int = 0):
    """The head as thick slices, how they were made, and the spline through them."""
    hr = truth()
    seen = observation((80, 96, 24), THICK, hr.shape, MM, profile=profile)
    scan = seen.forward(hr)
    scan = np.clip(scan + noise * np.random.default_rng(seed).normal(size=scan.shape), 0, None).astype(np.float32)
    return scan, seen, apply_axes(scan, seen.up)


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.06])
def test_noise_is_found_in_tissue_whatever_the_air_holds(noise):
    clean, _, _ = acquire()
    scan, _, _ = acquire(noise=noise)
    # The phantom's own detail counts as noise where there is little: measured 1.13, 1.04 and 1.01 of the truth.
    # Found: 1.01 to 1.13 of it; what tissue adds is 0.001
    assert 0.97 * noise < noise_sd(scan, 2) < 1.03 * noise + 0.002
    # Found: 0 (rounding)
    assert noise_sd(np.where(clean > 0, scan, 0), 2) == pytest.approx(noise_sd(scan, 2), rel=1e-6)  # masked air
    rng = np.random.default_rng(1)
    rician = np.hypot(clean + noise * rng.normal(size=clean.shape), noise * rng.normal(size=clean.shape))
    assert noise_sd(rician, 2) == pytest.approx(noise_sd(scan, 2), rel=0.05)  # found: 0.0073


def test_noise_alone_is_measured_exactly_and_scales_with_the_image():
    flat = 5 + np.random.default_rng(0).normal(size=(100, 100, 20))
    assert noise_sd(flat, 2) == pytest.approx(1, rel=0.01)  # found: 0.0037
    assert noise_sd(flat.transpose(2, 0, 1), 0) == pytest.approx(noise_sd(flat, 2), rel=1e-6)  # found: 0 (rounding)
    assert noise_sd(1000 * flat, 2) == pytest.approx(1000 * noise_sd(flat, 2), rel=1e-6)  # found: 1.9e-8 (rounding)


def test_of_what_a_result_lacks_its_own_noise_is_taken_off_and_not_the_scans():
    scan, seen, _ = acquire(noise=0.03)
    rng, level = np.random.default_rng(1), 1 / np.sqrt((seen.down[2] ** 2).sum() / len(seen.down[2]))
    steps = np.broadcast_to(0.02 * (-1.0) ** np.arange(24), scan.shape).astype(np.float32)  # nothing fine in the plane
    assert lacking_sd(steps, scan, seen, 2) == pytest.approx(0.02 * level, rel=1e-6)  # found: 1.3e-8
    noise = (0.02 * rng.normal(size=scan.shape)).astype(np.float32)
    assert lacking_sd(noise, scan, seen, 2) < 0.004 * level  # found: 0.0018
    assert lacking_sd(steps + noise, scan, seen, 2) == pytest.approx(0.02 * level, rel=0.05)  # found: 0.0059


@pytest.mark.parametrize(("n", "expected"), [(1, [0]), (20, range(20)), (32, range(32)), (311, range(0, 311, 10))])
def test_planes_are_looked_at_from_the_first_to_the_last_evenly(n, expected):
    """At most 32 of them, across every axis."""
    for axis in range(3):
        volume = np.broadcast_to(
            np.arange(n).reshape([-1 if d == axis else 1 for d in range(3)]), [n if d == axis else 2 for d in range(3)]
        )
        assert [int(plane[0, 0]) for plane in sampled(volume, axis)] == list(expected)


def test_bright_is_the_brightest_thousandth():
    """Of every second voxel of the planes that are given, together; the unit is counted from where the scan begins."""
    planes = [np.arange(10_000.0).reshape(100, 100), np.zeros((100, 100))]
    some = np.concatenate([plane[::2, ::2].ravel() for plane in planes])
    assert (
        acquisition.unit_above(0.0, planes) == pytest.approx(np.percentile(some, 99.9))
        and np.percentile(some, 99.9) > 9800
    )
    assert acquisition.unit_above(50.0, planes) == pytest.approx(np.percentile(some, 99.9) - 50)


def test_too_little_tissue_says_nothing_and_nothing_but_noise_yields_all(monkeypatch):
    assert noise_sd(np.random.default_rng(0).random((6, 40, 9)), 2) is None
    assert noise_sd(np.zeros((40, 40, 9)), 2) is None
    few = 10 + np.random.default_rng(0).random((12, 12, 13))  # four squares of tissue in each slice
    assert noise_sd(few[..., :12], 2) is None and noise_sd(few, 2) is not None  # 48 and 52
    scan, seen = np.ones((6, 7, 9)), observation((6, 7, 9), (1, 1, 3), (6, 7, 27), (1, 1, 1))
    assert choose_weight(scan, seen, 2).w == NOISE_UNKNOWN and choose_weight(scan, seen, 2).noise is None
    assert choose_weight(scan, seen, 2, floor=0.5).w == 0.5
    scan, seen = (
        100 + np.random.default_rng(0).normal(size=(40, 40, 9)),
        observation((40, 40, 9), (1, 1, 3), (40, 40, 27), (1, 1, 1)),
    )
    for lacks in (missing_sd, lambda *args: 0.1, lambda *args: 0.0):  # noise alone; a tenth of it; nothing
        monkeypatch.setattr(acquisition, "missing_sd", lacks)
        assert choose_weight(scan, seen, 2).noise > 0.9 and choose_weight(scan, seen, 2).w == LARGEST  # found: 1.02


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_what_the_spline_lacks_is_judged_to_within_a_factor_of_two(noise):
    scan, seen, _ = acquire(noise=noise)
    error = np.std((apply_axes(acquire()[0], seen.up) - truth())[truth() > 0.1])
    assert 0.5 * error < missing_sd(scan, seen, noise) < 2 * error  # found: 0.84 of it


@pytest.mark.parametrize("profile", ["gaussian", "box"])
def test_the_weight_gains_wherever_the_best_one_gains_and_never_loses(profile):
    lost = []
    for noise in (0.0, 0.01, 0.03, 0.06):
        scan, seen, spline = acquire(profile, noise)
        nominal = acquire()[1]
        inside = truth() > 0.1

        def error(w, scan=scan, seen=seen, spline=spline, inside=inside):
            image = spline if w is None else agreed(torch.from_numpy(spline), torch.from_numpy(scan), seen, w).numpy()
            return 10 * np.log10(np.mean((image - truth())[inside] ** 2))

        chosen = choose_weight(scan, nominal, 2).w
        assert PROFILE_KNOWN <= chosen <= LARGEST
        best = min(error(w) for w in (0.001, 0.01, 0.1, 0.3, 1.0, 3.0))
        assert error(chosen) < error(None) + 0.1  # found: -0.3 dB at most
        lost.append(error(chosen) - best)
    assert max(lost) < 0.35, lost  # dB; measured 0.005, 0.06, 0.31, 0.12 for the Gaussian


@pytest.mark.parametrize("profile", ["gaussian", "box"])
def test_an_unknown_profile_never_loses_against_the_spline(profile):
    scan, _, spline = acquire(profile)
    guess = assumed("auto", None, 6.0, 1.0)
    seen = observation(scan.shape, THICK, truth().shape, MM, thickness_mm=guess.width_mm, profile=guess.profile)
    assert guess.floor == PROFILE_GUESSED
    done = agreed(torch.from_numpy(spline), torch.from_numpy(scan), seen, guess.floor).numpy()
    inside = truth() > 0.1
    assert np.mean((done - truth())[inside] ** 2) < np.mean((spline - truth())[inside] ** 2)


def test_the_guess_widens_with_the_ratio_of_thickness_and_voxel():
    widths = [assumed("auto", 3.0 * voxel, 9.0, voxel).width_mm / (3.0 * voxel) for voxel in (0.5, 1.0, 2.0)]
    assert widths == pytest.approx([0.8] * 3)  # of the thickness, not of the spacing or of millimetres
    guesses = [assumed("auto", None, ratio * 0.7, 0.7).width_mm / (ratio * 0.7) for ratio in (1.5, 3, 4.5, 6, 8)]
    assert guesses == pytest.approx([0.8, 0.8, 0.85, 0.9, 0.9])


def test_training_guesses_as_inference_does():
    for ratio in (2.0, 4.5, 6.5):
        matrices = Slices(90, round(90 / ratio), ratio, 0.03).of(10, 48, False)
        width = assumed("auto", None, ratio, 1.0).width_mm / ratio
        assert np.array_equal(matrices, patch_agreement(10, 48, 90, round(90 / ratio), ratio, width, 0.03))


def test_a_named_profile_is_taken_as_it_is():
    assert (assumed("box", 4.0, 6.0, 1.0).width_mm, assumed("box", 4.0, 6.0, 1.0).floor) == (4.0, PROFILE_KNOWN)
    assert assumed("gaussian", None, 6.0, 1.0).width_mm == 6.0 and assumed("auto", 5.0, 6.0, 1.0).thickness_mm == 5.0
    with pytest.raises(UsageError, match="gaussian, box"):
        assumed("sinc", None, 6.0, 1.0)
    with pytest.raises(UsageError, match="slice thickness"):
        assumed("auto", 0.0, 6.0, 1.0)


def test_the_weight_that_is_expected_is_the_one_that_was_found_at_two_ratios():
    """At 3 % noise 4 to 6 at ratio 3 and 1 to 2 at ratio 6 (decision 023); never below that of a guessed profile."""
    assert 4 < acquisition.expected_weight(0.03, 3) < 6 and 1 < acquisition.expected_weight(0.03, 6) < 2
    assert acquisition.expected_weight(0.03, 3) == 4.94 and acquisition.expected_weight(0.06, 3) == 19.8
    assert acquisition.expected_weight(0.0, 3) == acquisition.expected_weight(0.001, 3) == PROFILE_GUESSED


def test_a_spacing_is_the_thickness_that_is_not_said():
    """Thicker slices than they are apart are taken as they are."""
    guess = assumed("auto", None, 6.0, 2.0)
    assert (guess.profile, guess.width_mm, guess.thickness_mm) == ("gaussian", pytest.approx(4.8), 6.0)
    assert assumed("auto", 9.0, 6.0, 3.0).width_mm == pytest.approx(7.2)
    assert assumed("box", 9.0, 6.0, 3.0).width_mm == assumed("gaussian", 9.0, 6.0, 3.0).thickness_mm == 9.0


def test_without_noise_the_weight_is_the_smallest_and_what_is_missing_is_told():
    flat = np.full((40, 40, 9), 100.0)
    flat += np.linspace(0, 50, 9)  # nothing within the slices
    seen = observation((40, 40, 9), (1, 1, 3), (40, 40, 27), (1, 1, 1))
    found = choose_weight(flat, seen, 2, floor=0.25)
    assert found.w == 0.25 and found.noise == 0 and found.missing > 0.1  # found: 0.6


def test_weights_at_their_ends_are_those_of_the_decision():
    """Decision 023: with a named profile and with a guessed one, where the noise cannot be told, and the largest."""
    assert [assumed(profile, None, 6.0, 1.0).floor for profile in ("auto", "gaussian", "box")] == [0.03, 0.003, 0.003]
    little, seen = np.ones((6, 7, 9)), observation((6, 7, 9), (1, 1, 3), (6, 7, 27), (1, 1, 1))
    assert choose_weight(little, seen, 2).w == 0.1
    noise, seen = np.full((40, 40, 9), 100.0), observation((40, 40, 9), (1, 1, 3), (40, 40, 27), (1, 1, 1))
    assert choose_weight(noise, seen, 2).w == 0.003
    noise += np.random.default_rng(0).normal(size=noise.shape)
    assert choose_weight(noise, seen, 2).w == 10.0


def test_what_is_missing_is_judged_without_the_noise_and_inside_tissue_alone():
    (clean, seen, _), (noisy, _, _) = acquire(), acquire(noise=0.06)
    judged = [missing_sd(scan, seen, noise) for scan, noise in ((clean, 0.0), (noisy, 0.06), (noisy, 0.0))]
    # Found: 0.026, 1.11
    assert judged[1] == pytest.approx(judged[0], rel=0.05) and judged[2] > 1.08 * judged[0]
    left = np.where(clean > 0.1, np.float32(0.01), np.float32(0))
    dirty = np.where(clean < 0.01, np.float32(5), left)  # what a result holds in air
    assert lacking_sd(dirty, clean, seen, 2) == lacking_sd(left, clean, seen, 2) > 0.02  # found: 0.021
