"""The grid that tiles are cut from, made out of a stored image a few planes at a time, and the way back.

Oriented, normalised, interpolated: each plane is made when it is asked for, in blocks that lie at fixed places, so that
a plane has the same bits in memory, by slabs and after a restart.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastsrgan.errors import InputError, ResourceError, times
from fastsrgan.infer.settings import Resolution, millimetres
from fastsrgan.infer.tiles import Triple
from fastsrgan.volume.geometry import Orientation, centre_coordinates, grid_size
from fastsrgan.volume.intensity import Normaliser
from fastsrgan.volume.resample import SAME, apply_axes, upsample_matrix

log = logging.getLogger("fastsrgan")

BLOCK = 16  # planes made at a time
MAX_VOXELS = 2**31  # of the grid
GROWTH = 200  # times the image's voxels, unasked: 10 mm slices of 0.2 mm pixels give 50


class Interpolated:
    """A ``slabs.Source``: the cubic spline through a stored image, on another grid.

    Parameters
    ----------
    data_XYZ : as stored; looked at where it is, unless its first processed axis is interpolated
    turn : stored -> processed axes
    norm : what a network sees
    spacing, wanted : voxel sizes in mm, stored axis order
    geometry : family of ``resample``
    """

    def __init__(
        self,
        data_XYZ: np.ndarray,
        turn: Orientation,
        norm: Normaliser,
        spacing: Sequence[float],
        wanted: Sequence[float],
        geometry: str,
    ) -> None:
        self.data, self.norm = turn.apply(data_XYZ), norm
        old, new = turn.permute(tuple(spacing)), turn.permute(tuple(wanted))
        sizes = [grid_size(n, a, b) for n, a, b in zip(self.data.shape, old, new, strict=True)]
        self.matrices = [
            upsample_matrix(n, size, b / a, geometry)
            for n, size, a, b in zip(self.data.shape, sizes, old, new, strict=True)
        ]
        x, y, z = (n if m is None else len(m) for n, m in zip(self.data.shape, self.matrices, strict=True))
        self.shape: Triple = (x, y, z)
        self._low: np.ndarray | None = None
        self._block: tuple[int, Tensor] | None = None

    @property
    def held_bytes(self) -> int:
        """What is kept of the image besides the image: all of it in float32, where planes mix."""
        return 4 * self.data.size if self.matrices[0] is not None else 0

    def planes(self, first: int, stop: int) -> Tensor:
        """(stop - first, Y, Z) float32."""
        out = torch.empty((stop - first, *self.shape[1:]))
        for block in range(first // BLOCK, -(-stop // BLOCK)):
            start = block * BLOCK
            made = self._made(block)
            a, b = max(first, start), min(stop, start + len(made))
            out[a - first : b - first] = made[a - start : b - start]
        return out

    def _made(self, block: int) -> Tensor:
        if self._block is None or self._block[0] != block:
            self._block = None  # before the next one is made
            self._block = block, torch.from_numpy(self._make(slice(block * BLOCK, (block + 1) * BLOCK)))
        return self._block[1]

    def _make(self, rows: slice) -> np.ndarray:
        along_x, along_y, along_z = self.matrices
        if along_x is None:
            return apply_axes(self.norm.apply(self.data[rows]), (None, along_y, along_z))
        if self._low is None:
            self._low = np.empty(self.data.shape, np.float32)
            for x in range(0, len(self._low), BLOCK):
                self._low[x : x + BLOCK] = self.norm.apply(self.data[x : x + BLOCK])
        return apply_axes(self._low, (along_x[rows], along_y, along_z))


def nearest(
    shape: Sequence[int], old: Sequence[float], size: Sequence[int], new: Sequence[float], geometry: str
) -> list[np.ndarray]:
    """For each axis the nearest voxel of an image of ``shape`` and ``old`` mm to every voxel of the new grid."""
    places = []
    for n, a, m, b in zip(shape, old, size, new, strict=True):
        at = np.linspace(0, n - 1, m) if geometry == "segsrgan" else centre_coordinates(m, n, b / a)
        places.append(np.clip(np.floor(at + 0.5), 0, n - 1).astype(int))
    return places


class Results:
    """A sink that undoes orientation and scale: SR and probabilities on the stored axes.

    sr : (X, Y, Z), prob : (C - 1, X, Y, Z) float32, on stored axes; arrays or memory maps that planes are written into
    """

    def __init__(self, sr: np.ndarray, prob: np.ndarray, turn: Orientation, norm: Normaliser) -> None:
        self.sr, self.prob, self.norm = turn.apply(sr), turn.apply(prob), norm

    def __call__(self, first: int, planes_CnYZ: Tensor) -> None:
        for n in range(planes_CnYZ.shape[1]):
            self.sr[first + n] = self.norm.invert(planes_CnYZ[0, n].numpy())
            self.prob[:, first + n] = planes_CnYZ[1:, n].numpy()


def target_spacing(
    spacing_mm: Sequence[float], shape: Sequence[int], new_resolution: Resolution
) -> tuple[float, float, float]:
    """The voxel size of the result in mm, stored axis order; see ``infer_settings``.

    An axis that already has the wanted size (within 1 % of the finest for None; within 0.1 % and with the same number
    of voxels otherwise) keeps its own, so it is not interpolated over rounding in a header.
    Raises UsageError as ``infer_settings.millimetres``, ResourceError beyond 2^31 voxels, InputError where nothing was
    asked for and the image's own sizes would make it more than 200 times as large.
    """
    own, sizes = tuple(float(s) for s in spacing_mm), millimetres(new_resolution)
    if sizes is None:
        finest = min(own)
        wanted = tuple(s if s <= finest * (1 + SAME) else finest for s in own)
    elif sizes == "same":
        wanted = own
    else:
        wanted = tuple(
            s if abs(r / s - 1) < 1e-3 and grid_size(n, s, r) == n else float(r)
            for r, s, n in zip(sizes, own, shape, strict=True)
        )
    voxels = math.prod(n * s / w for n, s, w in zip(shape, own, wanted, strict=True))
    if voxels > MAX_VOXELS:
        reason = f"{times(wanted)} mm makes {voxels:.3g} voxels"
        raise ResourceError("new resolution", reason, "ask for a coarser resolution")
    if sizes is None and voxels > GROWTH * math.prod(shape):
        reason = (
            f"voxels of {times(own)} mm: {min(own):g} mm along all axes makes {voxels:.3g} voxels of {math.prod(shape)}"
        )
        raise InputError("image", reason, "correct the header, or say --new-resolution MM if the sizes are right")
    return wanted  # type: ignore[return-value]


def coarser(spacing_mm: Sequence[float], wanted_mm: Sequence[float]) -> list[str]:
    """A warning, logged and given back, where the result has larger voxels than the image."""
    axes = [d for d in range(3) if wanted_mm[d] > spacing_mm[d] * (1 + SAME)]
    if not axes:
        return []
    warning = f"the new resolution is coarser than the image along axis {', '.join(map(str, axes))}: details may alias"
    log.warning(warning)
    return [warning]
