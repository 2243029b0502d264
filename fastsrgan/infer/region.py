"""Where in a volume results are wanted: a mask, or the box around a head. Tiles that do not touch it are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsrgan.errors import InputError

LEVEL = 0.1  # of the brightest voxels: above it is tissue, below it air and its noise
SHARE = 0.002  # of a plane's voxels that must be tissue for the plane to belong to a head
MARGIN_MM = 10.0  # around it
SAMPLE = 10**6  # voxels that the brightness is found from


@dataclass(frozen=True)
class Region:
    """Voxels of a volume, by way of a mask on another grid.

    mask : (A, B, C) bool
    index : for each axis of the volume the place in the mask of every voxel, ascending
    """

    mask: np.ndarray
    index: tuple[np.ndarray, np.ndarray, np.ndarray]

    def planes(self, first: int, stop: int) -> Tensor:
        """(stop - first, Y, Z) bool."""
        x, y, z = self.index
        return torch.from_numpy(self.mask[x[first:stop]][:, y][:, :, z])

    def touches(self, first: Sequence[int], stop: Sequence[int]) -> bool:
        """Whether a block of voxels, which may reach over the volume's edges, holds one of the region."""
        cuts = []
        for index, a, b in zip(self.index, first, stop, strict=True):
            a, b = max(a, 0), min(b, len(index))
            if a >= b:
                return False
            cuts.append(slice(index[a], index[b - 1] + 1))
        return bool(self.mask[tuple(cuts)].any())


def from_mask(mask_XYZ: np.ndarray, index: Sequence[np.ndarray]) -> Region:
    """The voxels that a mask marks. Raises InputError when there is none."""
    mask = np.asarray(mask_XYZ) > 0
    if not mask.any():
        raise InputError("mask", "marks no voxel", "at least one voxel above 0")
    return Region(mask, (index[0], index[1], index[2]))


def from_box(low: Sequence[int], high: Sequence[int], index: Sequence[np.ndarray]) -> Region:
    """The voxels whose place lies within ``low`` ... ``high``, both included."""
    mask = np.zeros((3, 3, 3), bool)
    mask[1, 1, 1] = True
    inside = [(i >= a).astype(int) + (i > b) for i, a, b in zip(index, low, high, strict=True)]
    return Region(mask, (inside[0], inside[1], inside[2]))


def head_box(data_XYZ: np.ndarray, spacing_mm: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First and last voxel, per axis, of the box around a head: planes with tissue in them, and 10 mm more.

    Tissue is what exceeds a tenth of the brightest voxels (99.5th percentile of those above zero).
    """
    some = data_XYZ.reshape(-1)[:: max(1, data_XYZ.size // SAMPLE)] if data_XYZ.flags.c_contiguous else data_XYZ
    some = some[some > 0]
    level = LEVEL * float(np.percentile(some, 99.5)) if some.size else 0.0
    counts = [np.zeros(n) for n in data_XYZ.shape]
    for x, plane in enumerate(data_XYZ):
        tissue = plane > level
        counts[0][x] = tissue.sum()
        counts[1] += tissue.sum(1)
        counts[2] += tissue.sum(0)
    low, high = [], []
    for n, spacing, count in zip(data_XYZ.shape, spacing_mm, counts, strict=True):
        (planes,) = np.nonzero(count >= max(1, SHARE * data_XYZ.size / n))
        margin = round(MARGIN_MM / spacing)
        low.append(max(0, int(planes[0]) - margin) if planes.size else 0)
        high.append(min(n - 1, int(planes[-1]) + margin) if planes.size else n - 1)
    return tuple(low), tuple(high)
