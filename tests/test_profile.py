"""A slice profile is taken from the scan where its empty surroundings show it, and from nowhere else."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from nifti_files import rigid
from scipy.ndimage import gaussian_filter1d

from fastsrgan.infer.volume import infer_volume
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.volume.acquisition import Shown, assumed
from fastsrgan.volume.profile import shown
from fastsrgan.volume.resample import apply_axes, slice_profile_matrix


@functools.cache
def head() -> np.ndarray:
    """An ellipsoid with folds and empty air around it, as a stripped brain has."""
    x, y, z = np.meshgrid(*(np.linspace(-1.3, 1.3, n) for n in (56, 64, 72)), indexing="ij")
    made = 0.6 + 0.2 * np.sin(9 * x + 4 * y) * np.cos(8 * z) + 0.15 * np.sin(17 * y - 5 * z)
    return np.where(x**2 + (y / 1.1) ** 2 + z**2 < 1 + 0.05 * np.sin(9 * x) * np.sin(7 * y), made, 0).astype(np.float32)


def sliced(ratio: int, kind: str, width: float = 1.0) -> np.ndarray:
    """Slices of a profile that is not cut off: the sum over all voxels, not the package's matrices."""
    hr = head()
    n = hr.shape[2]
    off = np.arange(n)[None] - ((np.arange(n // ratio) + 0.5) * ratio - 0.5)[:, None]
    if kind == "gaussian":
        rows = np.exp(-0.5 * (off * 2.3548 / (width * ratio)) ** 2)
    else:
        half = width * ratio / 2
        rows = np.clip(np.minimum(off + 0.5, half) - np.maximum(off - 0.5, -half), 0, 1)
    return np.einsum("mz,xyz->xym", rows / rows.sum(1, keepdims=True), hr).astype(np.float32)


@pytest.mark.parametrize("ratio", [2, 3, 6])
@pytest.mark.parametrize("width", [0.8, 1.0, 1.2])
def test_a_gaussian_is_measured_by_its_tail(ratio, width):
    found = shown(sliced(ratio, "gaussian", width), 2)
    assert found is not None and found.profile == "gaussian"
    assert found.width == pytest.approx(width, abs=0.02)  # found: 0.01 at most


@pytest.mark.parametrize("ratio", [3, 6])
def test_a_box_is_seen_where_the_head_ends_from_one_slice_to_the_next(ratio):
    assert shown(sliced(ratio, "box"), 2) == Shown("box", 1.0)


@pytest.mark.parametrize("kind", ["box", "gaussian"])
def test_a_scan_less_its_mean_shows_what_the_scan_does(kind):
    """z-scores: air is the lowest value. In 16 bits, where moving rounds nothing."""
    whole = np.round(30_000 * sliced(3, kind)).astype(np.int16)
    assert shown(whole - np.int16(9000), 2) == shown(whole, 2) == Shown(kind, 1.0)
    assert shown(sliced(3, kind) - np.float32(0.5), 2) == Shown(kind, 1.0)


def test_a_gaussian_that_was_cut_off_or_rounded_is_seen():
    """As SciPy's filter does it, at four standard deviations; as the package's own degradation; in 16 bits."""
    hr, n = head(), 72
    blurred = gaussian_filter1d(hr, 3 / 2.3548, axis=2, mode="constant")[:, :, 1::3].astype(np.float32)
    own = apply_axes(hr, [None, None, slice_profile_matrix(n, n // 3, 3.0, 1.0, 0.0)])
    whole = np.round(30_000 * sliced(3, "gaussian")).astype(np.int16)
    assert [shown(scan, 2) for scan in (blurred, own, whole)] == [Shown("gaussian", 1.0)] * 3


def test_the_same_is_seen_however_the_scan_is_stored():
    for kind in ("gaussian", "box"):
        scan = sliced(3, kind)
        stored = (
            (scan[:, :, ::-1], 2),
            (scan.transpose(2, 0, 1), 0),
            (np.asfortranarray(scan.transpose(0, 2, 1)), 1),
            (1000 * scan, 2),
        )
        assert {shown(array, axis) for array, axis in stored} == {shown(scan, 2)}


def test_both_ends_of_the_head_are_looked_at():
    """A field of view that ends inside the head on one side leaves the other."""
    scan = sliced(3, "gaussian")
    assert shown(scan[:, :, 12:], 2) == shown(scan[:, :, :12], 2) == Shown("gaussian", 1.0)


@functools.cache
def no_profile() -> dict[str, np.ndarray]:
    """Scans that show none: what a scanner, a mask, few digits, a negative value or too few slices make of the ends."""
    smooth, box = sliced(3, "gaussian"), sliced(3, "box")
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, smooth.shape).astype(np.float32)
    rician = np.hypot(smooth + noise, rng.normal(0, 0.02, smooth.shape)).astype(np.float32)
    return {
        "clipped noise": np.clip(smooth + noise, 0, None),
        "rician noise": rician,
        "noise on a box": np.clip(box + noise, 0, None),
        "noise in a box alone": np.where(box > 0, np.maximum(box + noise, 1e-3), 0),
        "masked": np.where(smooth > 0.3, smooth, 0),
        "masked, with noise": np.where(smooth > 0.15, rician, 0),
        "a byte": np.round(200 * smooth).astype(np.uint8),
        "below zero": smooth - np.abs(noise) / 20,
        "not finite": np.where(smooth > 0.5, np.nan, smooth),
        "three slices": smooth[:, :, 10:13],
        "empty": np.zeros_like(smooth),
        "no air": smooth[25:45, 30:50, 10:16],
        "narrow": sliced(3, "gaussian", 0.5),
        "wide": sliced(3, "gaussian", 1.6),
    }


@pytest.mark.parametrize("name", sorted(no_profile()))
def test_nothing_is_seen_where_nothing_shows(name):
    assert shown(no_profile()[name], 2) is None


def test_a_scan_that_is_moved_below_zero_shows_what_it_showed():
    scan = sliced(3, "gaussian")
    for low in (1e-3, 0.05, 0.5, 2):
        assert shown((scan - low).astype(np.float32), 2) == shown(scan, 2) == Shown("gaussian", 1.0)


def test_what_a_scan_shows_is_taken_unless_something_else_is_told():
    gaussian, box = Shown("gaussian", 0.9), Shown("box", 1.0)
    taken = assumed("auto", None, 6.0, 2.0, gaussian)
    assert (taken.profile, taken.width_mm, taken.thickness_mm) == ("gaussian", pytest.approx(5.4), 6.0)
    assert taken.floor == assumed("gaussian", None, 6.0, 2.0).floor and taken.known == "shown by the scan"
    assert assumed("auto", None, 6.0, 2.0, box).profile == "box"
    assert assumed("auto", 5.6, 6.0, 2.0, gaussian).known == "shown by the scan"  # 5.4 is within a tenth
    told = assumed("auto", 4.0, 6.0, 2.0, gaussian)
    assert told == assumed("auto", 4.0, 6.0, 2.0) and told.known == "guessed"
    assert assumed("guess", None, 6.0, 2.0, gaussian) == assumed("auto", None, 6.0, 2.0)
    assert assumed("box", None, 6.0, 2.0, gaussian) == assumed("box", None, 6.0, 2.0)
    assert assumed("box", None, 6.0, 2.0).known == "named"


@pytest.mark.parametrize("kind", ["gaussian", "box"])
def test_infer_agrees_with_the_profile_that_the_scan_shows_and_says_where_it_comes_from(kind, caplog):
    caplog.set_level("INFO", logger="fastsrgan")
    scan, affine = sliced(3, kind), rigid((2.0, 2.0, 6.0))
    generator = build_generator(GeneratorSpec(kernel=1), seed=6).eval()
    fast = {"patch": 48, "step": 48, "device": "cpu"}
    done = infer_volume(scan, affine, generator, **fast)
    told = done.report["agree"]
    assert (told["profile"], told["profile_known"], told["width_mm"]) == (kind, "shown by the scan", 6.0)
    # Found: 0.003; that of a profile which is guessed is at least 0.03.
    assert told["weight"] < 0.03 and f"{kind} profile of 6 mm, shown by the scan)" in caplog.text
    named = infer_volume(scan, affine, generator, **fast, profile=kind)
    assert named.report["agree"]["profile_known"] == "named" and np.array_equal(named.sr, done.sr)
    # Stored otherwise it is the same scan.
    turned = infer_volume(scan.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]], generator, **fast)
    assert np.array_equal(turned.sr.transpose(1, 2, 0), done.sr)
    other = infer_volume(scan, affine, generator, **fast, slice_thickness=4.0).report["agree"]
    assert (other["profile"], other["profile_known"], other["thickness_mm"]) == ("gaussian", "guessed", 4.0)
    noisy = np.clip(scan + np.random.default_rng(0).normal(0, 0.02, scan.shape), 0, None).astype(np.float32)
    assert infer_volume(noisy, affine, generator, **fast).report["agree"]["profile_known"] == "guessed"
