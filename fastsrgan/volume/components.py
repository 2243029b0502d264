"""A segmentation out of probabilities: a threshold and, where asked for, filters of its 26-connected components."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from fastsrgan.errors import UsageError

THRESHOLD = 0.5  # of the probability, above which a voxel belongs to the structure (paper, section 2.5)
AROUND = np.ones((3, 3, 3), bool)  # voxels that share a corner belong together


@dataclass(frozen=True)
class Filters:
    """How a probability map becomes a segmentation.

    threshold : voxels above it belong to the structure, from 0 up and below 1
    largest : keep the largest component alone; of two of one size the first in memory
    min_mm3 : leave out components of less volume

    Raises UsageError for values that make no sense.
    """

    threshold: float = THRESHOLD
    largest: bool = False
    min_mm3: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise UsageError("threshold", f"{self.threshold:g} is not allowed", "a probability from 0 up and below 1")
        if not (math.isfinite(self.min_mm3) and self.min_mm3 >= 0):
            raise UsageError("min size", f"{self.min_mm3:g} is not allowed", "cubic millimetres from 0 up")

    @property
    def asked(self) -> dict[str, Any]:
        """What differs from the default, by name."""
        values = {"threshold": self.threshold, "largest_component": self.largest, "min_size_mm3": self.min_mm3}
        return {k: v for (k, v), default in zip(values.items(), (THRESHOLD, False, 0.0), strict=True) if v != default}


def segment(prob_XYZ: np.ndarray, voxel_mm3: float, filters: Filters) -> tuple[np.ndarray, dict[str, int]]:
    """(X, Y, Z) probabilities -> uint8, 1 in the structure; and what the filters left out, empty without filters.

    The components' numbers take 4 bytes a voxel, where a filter is on.
    """
    seg = prob_XYZ > filters.threshold
    if not (filters.largest or filters.min_mm3):
        return seg.astype(np.uint8), {}
    numbered, count = ndimage.label(seg, structure=AROUND)
    sizes = np.bincount(numbered.reshape(-1), minlength=count + 1)
    sizes[0] = 0
    kept = sizes * voxel_mm3 >= filters.min_mm3
    kept[0] = False
    if filters.largest and kept.any():
        largest = int(np.argmax(np.where(kept, sizes, 0)))
        kept[:] = False
        kept[largest] = True
    told = {"components": int(count), "components_kept": int(kept.sum())}
    told["voxels_left_out"] = int(sizes.sum() - sizes[kept].sum())
    return kept[numbered].astype(np.uint8), told
