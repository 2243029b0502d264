"""Where a head is in a scan: what is brighter than air, and the box around it."""

from __future__ import annotations

import numpy as np

LEVEL = 0.1  # of the brightest voxels: above it is tissue, below it air and its noise
TIMES = 5.0  # times as far from all others as those span, from which on a value is an outlier
MARK = 5.0  # times as far below 0 as tissue is above it, from which on a lowest value is no intensity
MANY = 0.05  # of all voxels; found: 0.02 of air with noise of 5 % about 0, 0.8 of heads less their mean
SHARE = 0.002  # of a plane's voxels that must be tissue for the plane to belong to a head
SAMPLE = 10**6  # voxels that brightness and padding are found from


def tissue_level(data_XYZ: np.ndarray) -> float:
    """What tissue exceeds: a tenth of the brightest voxels (99.5th percentile of those above ``lowest``), counted from
    there."""
    low, some = lowest(data_XYZ), _sample(data_XYZ)
    above = some[some > low]
    return low + LEVEL * (float(np.percentile(above, 99.5)) - low) if above.size else low


def lowest(data_XYZ: np.ndarray) -> float:
    """Where the intensities of a scan count from: 0, or the lowest where many are it (air without noise) or are further
    below 0 than air and its noise are (z-scores, images wholly below 0).

    A value that marks what is not there is no intensity: one that lies ``TIMES`` as far below all others as those
    span, or ``MARK`` times as far below 0 as tissue is above it, unless most others are below 0 too.
    """
    low = float(data_XYZ.min())
    if low >= 0:
        return 0.0
    some = _sample(data_XYZ)
    others = some[some > low]
    if not others.size:
        return low
    rest = float(others.min())
    if low < rest - TIMES * (float(others.max()) - rest):
        low, some = rest, others
    above = some[some > 0]
    if not above.size:
        return low
    bright, share = float(np.percentile(above, 99.5)), MANY
    if low < -MARK * bright:
        some, share = some[some > low + LEVEL * (float(above.max()) - low)], 0.5
    elif np.count_nonzero(some == low) > MANY * some.size:
        return low
    many = np.count_nonzero(some < -LEVEL * bright) > share * some.size
    return low if low < 0 and many else 0.0


def _sample(data_XYZ: np.ndarray) -> np.ndarray:
    return data_XYZ.reshape(-1)[:: max(1, data_XYZ.size // SAMPLE)] if data_XYZ.flags.c_contiguous else data_XYZ


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


def air(data_XYZ: np.ndarray) -> float:
    """What stands in an image where there is nothing: 0, or its lowest value where that is below."""
    return min(float(data_XYZ.min()), 0.0)
