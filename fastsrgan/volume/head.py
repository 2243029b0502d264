"""Where a head is in a scan: what is brighter than air, and the box around it."""

from __future__ import annotations

import numpy as np

LEVEL = 0.1  # of the brightest voxels: above it is tissue, below it air and its noise
MARK = 5.0  # times as far below 0 as tissue is above it, from which on a lowest value is no intensity
SHARE = 0.002  # of a plane's voxels that must be tissue for the plane to belong to a head
SAMPLE = 10**6  # voxels that the brightness is found from


def tissue_level(data_XYZ: np.ndarray) -> float:
    """What tissue exceeds: a tenth of the brightest voxels (99.5th percentile of those above zero).

    Intensities count from 0, or from the lowest where that is further below 0 than air and its noise (z-scores, images
    wholly below 0), but for a value so far below that it marks what is not there.
    """
    some = data_XYZ.reshape(-1)[:: max(1, data_XYZ.size // SAMPLE)] if data_XYZ.flags.c_contiguous else data_XYZ
    low, above = float(data_XYZ.min()), some[some > 0]
    bright = float(np.percentile(above, 99.5)) if above.size else 0.0
    if (not above.size and low < float(some.max())) or -MARK * bright < low < -LEVEL * bright:
        bright = float(np.percentile(some[some > low], 99.5)) if (some > low).any() else low
        return low + LEVEL * (bright - low)
    return LEVEL * bright


def tissue_box(data_XYZ: np.ndarray, level: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First and last voxel, per axis, of the planes with tissue in them; the whole image where there is none."""
    counts = [np.zeros(n) for n in data_XYZ.shape]
    for x, plane in enumerate(data_XYZ):
        tissue = plane > level
        counts[0][x] = tissue.sum()
        counts[1] += tissue.sum(1)
        counts[2] += tissue.sum(0)
    low, high = [], []
    for n, count in zip(data_XYZ.shape, counts, strict=True):
        (planes,) = np.nonzero(count >= max(1, SHARE * data_XYZ.size / n))
        low.append(int(planes[0]) if planes.size else 0)
        high.append(int(planes[-1]) if planes.size else n - 1)
    return tuple(low), tuple(high)
