"""Where the intensities of a scan count from: one rule for its tissue, noise, profile, trials and pictures."""

from __future__ import annotations

import numpy as np
import pytest

from fastsrgan.pictures.planes import from_lowest
from fastsrgan.volume.acquisition import noise_sd
from fastsrgan.volume.acquisition import tissue_level as level_of_planes
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.head import lowest, tissue_level

RNG = np.random.default_rng(0)
SCAN = np.zeros((40, 40, 40))
SCAN[8:32, 8:32, 8:32] = RNG.uniform(300, 3500, (24, 24, 24))
PADDED = RNG.random(SCAN.shape) < 0.01
SOFT = np.where(PADDED, -32768 * RNG.uniform(0.8, 1, SCAN.shape), SCAN)  # as padding is after an interpolation


@pytest.mark.parametrize(
    "scan, zero",
    [
        (SCAN, 0),
        (SCAN + 500, 0),
        ((SCAN - 1000) / 600, -1000 / 600),
        (SCAN - 3400, -3400),  # a few voxels above 0
        (SCAN - 4000, -4000),
        (SCAN - 40000, -40000),  # of a span that is small beside it
        (np.where(PADDED, -90000, SCAN - 4000), -4000),
        (SCAN + RNG.normal(0, 175, SCAN.shape), 0),  # noise about 0
        (SCAN - 100, -100),  # no further below than noise is, and air is flat
        (SCAN - 100 + RNG.normal(0, 30, SCAN.shape), 0),  # air with noise
        (np.where(RNG.random(SCAN.shape) < 0.02, -100, SCAN), 0),  # a few, as of an interpolation
        (np.where(PADDED, -32768, SCAN), 0),
        (SOFT, 0),
        (np.where(PADDED, -1000, (SCAN - 1000) / 600), -1000 / 600),
        (np.where(SCAN > 0, SCAN, -1024), -1024),
        (np.full((4, 4, 4), -3.0), -3),
    ],
)
def test_intensities_count_from_0_or_from_the_lowest_that_is_one(scan, zero):
    assert lowest(scan) == pytest.approx(zero)


def moved(scan):
    return [(scan - low).astype(np.float32) for low in (0, 100, 1000, 4000)]


def test_tissue_and_noise_are_those_of_the_scan_that_is_moved_up():
    scan = SCAN + np.where(SCAN > 0, RNG.normal(0, 30, SCAN.shape), 0)
    found = [(v > tissue_level(v), v > level_of_planes(v, list(v)), noise_sd(v, 2)) for v in moved(scan)]
    for head, planes, noise in found[1:]:
        assert np.array_equal(head, found[0][0]) and np.array_equal(planes, found[0][1])
        assert noise == pytest.approx(found[0][2], rel=1e-5)  # found: 0


def test_pictures_of_it_are_the_same():
    black = [from_lowest({"sr": Volume(v, np.eye(4))})[0]["sr"].data for v in moved(SCAN)]
    assert all(np.abs(v - black[0]).max() < 1e-3 for v in black[1:])  # found: 0.00024, rounding
    assert np.array_equal(black[0], SCAN.astype(np.float32))
