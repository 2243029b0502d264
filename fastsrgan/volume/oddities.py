"""What makes a result doubtful although nothing failed: voxels that outshine a scan, a segmentation of nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastsrgan.errors import brief, some_of
from fastsrgan.volume.head import TIMES
from fastsrgan.volume.intensity import outliers

SHARE = 0.5  # of a segmentation that lies on exact zeros, from which on that is told


def odd_intensities(data_XYZ: np.ndarray, compressed: bool) -> list[str]:
    """``outshone`` and ``padded``."""
    return [*outshone(data_XYZ, compressed), *padded(data_XYZ)]


def padded(data_XYZ: np.ndarray) -> list[str]:
    """A warning about voxels of one value below 0 that lies ``TIMES`` as far below all others as those span."""
    low, top = float(data_XYZ.min()), float(data_XYZ.max())
    if not low < min(0.0, top):
        return []
    rest = min(float(np.min(plane, where=plane > low, initial=top)) for plane in data_XYZ)
    if not low < rest - TIMES * (top - rest):
        return []
    count = int(np.count_nonzero(data_XYZ == low))
    told = f"{some_of(count, data_XYZ.size, 'voxel', 'is', 'are')} {low:g}, far below all others ({rest:g} to {top:g})"
    return [f"{told}: beside them the rest is one grey to the network; set them to {max(rest, 0.0):g}"]


def outshone(data_XYZ: np.ndarray, compressed: bool) -> list[str]:
    """A warning about ``intensity.outliers``; ``compressed``: whether the network sees them so."""
    found = outliers(data_XYZ)
    if found is None:
        return []
    seen = "the network sees them compressed, and the rest as it would be without them"
    if not compressed:
        seen = "the image is divided by its maximum, so that the rest is dark to the network; clip them if they are no "
        seen += "tissue"
    some = some_of(found.count, data_XYZ.size, "voxel", "is", "are")
    return [f"{some} up to {brief(found.times)} times as bright as all others: {seen}"]


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
