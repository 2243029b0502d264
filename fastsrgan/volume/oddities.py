"""What makes a result doubtful although nothing failed: voxels that outshine a scan, a segmentation of nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BRIGHTEST = 1e-4  # share of the voxels that may be outliers
TIMES = 5.0  # as bright as all others, from which on they are told
SHARE = 0.5  # of a segmentation that lies on exact zeros, from which on that is told


def outliers(data_XYZ: np.ndarray) -> list[str]:
    """A warning where the brightest 0.01 % of the voxels exceed five times the rest, intensities counted from 0 or,
    where some are negative, from the lowest one: the network sees the image divided by its maximum."""
    zero, top = min(0.0, float(data_XYZ.min())), float(data_XYZ.max())
    limit = zero + (top - zero) / TIMES
    bright, rest = 0, zero
    for plane in data_XYZ:
        above = plane > limit
        bright += int(np.count_nonzero(above))
        rest = max(rest, float(np.max(plane, where=~above, initial=zero)))
    if not 0 < bright <= max(1, math.floor(BRIGHTEST * data_XYZ.size)) or rest <= zero:
        return []
    times = (top - zero) / (rest - zero)
    return [
        f"{bright} of {data_XYZ.size} voxels are up to {times:.3g} times as bright as all others: the image is divided "
        "by its maximum, so that the rest is dark to the network; clip them if they are no tissue"
    ]


def on_zeros(seg_XYZ: np.ndarray, data_XYZ: np.ndarray, index: Sequence[np.ndarray]) -> list[str]:
    """A warning where more than half of a segmentation lies where the image is exactly 0.

    ``index`` : for each axis the image's voxel at every voxel of the segmentation
    """
    x, y, z = index
    total = empty = 0
    for plane, at in zip(seg_XYZ, x, strict=True):
        inside = plane > 0
        total += (count := int(np.count_nonzero(inside)))
        if count:
            empty += int(np.count_nonzero(inside & (data_XYZ[at][np.ix_(y, z)] == 0)))
    if total == 0 or empty <= SHARE * total:
        return []
    return [
        f"{100 * empty / total:.0f} % of the segmentation lies where the image is exactly 0 (masked or padded), where "
        "no tissue is: do not trust it; --mask keeps results inside a mask"
    ]
