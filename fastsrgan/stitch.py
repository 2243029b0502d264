"""Overlap-add of tiles as plain float32 sums (DESIGN D9): no weight volume, no final division.

Tiles form a product grid, so the sum of their windows is a product of three 1-D sums. Each 1-D window is divided by its
axis' sum beforehand; what is left is

    out[x, y, z] = sum_i wx_i[x] ( sum_j wy_j[y] ( sum_k wz_k[z] tile_ijk[x, y, z] ) )

added in exactly this nesting: first a row of tiles along z, then the rows of a slab along y, then the slabs. At a
coverage of c tiles per axis a voxel goes through chains of c additions instead of c^3. A flat float32 sum drifts by up
to c^3 half-units in the last place (3e-5 at 13^3); this one stays at rounding, and ones come out as ones. Each level
needs one 1-D factor only, and the row being summed stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsrgan.backend import Argument, launch, op, runs_kernels, scalar
from fastsrgan.errors import UsageError
from fastsrgan.tiles import TilePlan
from fastsrgan.tiles import plan as make_plan

GAUSSIAN_SIGMA = 1 / 8  # of the patch
GAUSSIAN_FLOOR = 1e-3  # of the peak: a voxel that only tile corners cover must keep digits


def _constant(n: int) -> np.ndarray:
    return np.ones(n)


def _gaussian(n: int) -> np.ndarray:
    distance = np.arange(n) - (n - 1) / 2
    return np.maximum(np.exp(-0.5 * (distance / (n * GAUSSIAN_SIGMA)) ** 2), GAUSSIAN_FLOOR)


# A window maps a tile's edge length to that many positive float64 weights, symmetric about the centre.
WINDOWS: dict[str, Callable[[int], np.ndarray]] = {"constant": _constant, "gaussian": _gaussian}


def check_window(name: str) -> str:
    """``name`` if it is a known window, else UsageError."""
    if name not in WINDOWS:
        raise UsageError("window", f"{name!r}", f"one of {', '.join(WINDOWS)}")
    return name


def weights(plan: TilePlan, window: str = "constant") -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The pre-divided 1-D windows of a plan: for each axis one (patch,) float32 array per tile along it.

    At every voxel of the padded axis the float32 sum, in tile order, of the weights that cover it is exactly 1.
    Raises UsageError for an unknown window.
    """
    shape_of = WINDOWS[check_window(window)]
    x, y, z = (
        _axis_weights(n, p, origins, shape_of(p))
        for n, p, origins in zip(plan.padded_shape, plan.patch, plan.origins, strict=True)
    )
    return x, y, z


def _axis_weights(n: int, patch: int, origins: tuple[int, ...], window: np.ndarray) -> list[np.ndarray]:
    total = np.zeros(n)
    for o in origins:
        total[o : o + patch] += window
    result, so_far = [], np.zeros(n, np.float32)
    for o, following in zip(origins, (*origins[1:], n), strict=True):
        here = slice(o, o + patch)
        w = (window / total[here]).astype(np.float32)
        # The last tile over a voxel gets what is missing to 1, so that ones in are ones out to the last bit.
        final = min(following - o, patch)
        w[:final] = 1 - so_far[o : o + final]
        so_far[here] += w
        result.append(w)
    return result


class _Level:
    """The sum along one axis: equal pieces at ``origins`` of ``dim`` make one larger piece."""

    def __init__(self, shape: tuple[int, ...], dim: int, origins: tuple[int, ...], factors: list[Tensor]) -> None:
        self.dim, self.origins, self.factors = dim, origins, factors
        # One piece has the weight 1 everywhere and is its own sum.
        self.total = torch.empty(shape, device=factors[0].device) if len(origins) > 1 else None

    def add(self, piece: Tensor, i: int) -> Tensor | None:
        """Add piece ``i``, in ascending order; the sum when it was the last one, else None."""
        if self.total is None:
            return piece
        if i == 0:
            self.total.zero_()
        self.total.narrow(self.dim, self.origins[i], piece.shape[self.dim]).addcmul_(piece, self.factors[i])
        return self.total if i == len(self.origins) - 1 else None


class Stitcher:
    """Takes the tiles of a plan in its order, in batches of any size, and gives the volume.

    Parameters
    ----------
    plan : of the tiles
    channels : of each tile
    window : name in ``WINDOWS``
    device : where tiles arrive and sums are kept

    Memory: float32, at most (channels, *padded_shape), a slab (channels, patch x, Y, Z) and a row (channels, patch x,
    patch y, Z), two rows where a kernel adds. Reruns are bit-identical, and batch sizes do not change the result.
    """

    def __init__(
        self, plan: TilePlan, channels: int, window: str = "constant", device: torch.device | str = "cpu"
    ) -> None:
        self.plan, self.device, self.done = plan, torch.device(device), 0
        self._out: Tensor | None = None
        self._levels = []
        shape, windows = [channels, *plan.patch], weights(plan, window)
        for axis in (2, 1, 0):
            shape[1 + axis] = plan.padded_shape[axis]
            place = [1, 1, 1]
            place[axis] = -1
            factors = [torch.from_numpy(w).to(device).view(place) for w in windows[axis]]
            self._levels.append(_Level(tuple(shape), 1 + axis, plan.origins[axis], factors))
        # Allocated here and not on first use: who makes a Stitcher finds out whether the device has room for it.
        self._kernel = _KernelSums(plan, channels, self._levels) if runs_kernels(self.device) else None

    def add(self, tiles_NCXYZ: Tensor) -> None:
        """The next N tiles, (N, channels, *patch) of any floating dtype; sums are float32 whatever it is."""
        _add(self, tiles_NCXYZ)

    def result(self) -> Tensor:
        """(channels, *padded_shape) float32, once every tile was added."""
        assert self._out is not None and self.done == len(self.plan), (
            f"{self.done} of {len(self.plan)} tiles were added"
        )
        return self._out


class _KernelSums:
    """What kernels/overlap_add.cu needs besides the tiles: tables of the plan, and the sums between two calls.

    levels : of a Stitcher, z y x; their memory is used for the kernel's sums, which mean the same
    """

    def __init__(self, plan: TilePlan, channels: int, levels: list[_Level]) -> None:
        self.plan, self.channels, self.device = plan, channels, levels[0].factors[0].device
        self.wz, self.wy, self.wx = (torch.stack([w.view(-1) for w in level.factors]) for level in levels)
        self.origins = [torch.tensor(plan.origins[axis], dtype=torch.int32, device=self.device) for axis in (1, 2)]
        self.spans = [_spans(plan, axis).to(self.device) for axis in (1, 2)]
        row, slab, out = (level.total for level in levels)
        # An axis of one tile has no sum of its own: what is summed along the axis before it is the sum along both.
        whole = next((t for t in (out, slab, row) if t is not None), None)
        self.out = torch.empty((channels, *plan.padded_shape), device=self.device) if whole is None else whole
        self.slab, self.row = slab, row
        # Only where a slab has several rows can one row be finished and the next begun by one launch.
        self.next_row = row if row is None or slab is None else torch.empty_like(row)

    def add(self, tiles_NCXYZ: Tensor, done: int) -> None:
        """Tiles ``done``, ``done`` + 1, ...: one launch per slab that they touch."""
        _, ny, nz = self.plan.grid
        while len(tiles_NCXYZ):
            ix, start = divmod(done, ny * nz)
            count = min(len(tiles_NCXYZ), ny * nz - start)
            self._launch(tiles_NCXYZ[:count], ix, start, start + count)
            tiles_NCXYZ, done = tiles_NCXYZ[count:], done + count

    def _launch(self, tiles_NCXYZ: Tensor, ix: int, start: int, stop: int) -> None:
        """Tiles ``start`` to ``stop`` of slab ``ix``, as one launch."""
        (px, py, pz), (_, size_y, size_z) = self.plan.patch, self.plan.padded_shape
        nx, ny, nz = self.plan.grid
        origins_x, origins_y, _ = self.plan.origins
        here = origins_x[ix]
        seen = origins_x[ix - 1] + px - here if ix else 0
        y_first, y_end = origins_y[start // nz], origins_y[(stop - 1) // nz] + py
        out = self.out.narrow(1, here, px)
        args: list[Argument] = [out, out.stride(0), self.slab, self.row, self.next_row]
        args += [tiles_NCXYZ, *tiles_NCXYZ.stride(), self.wx[ix], self.wy, self.wz]
        args += [*self.origins, *self.spans, nx, ny, nz, self.channels, px, py, pz, size_y, size_z]
        args += [start, stop, y_first, y_end, seen]
        threads = (y_end - y_first) * size_z, px, self.channels
        launch("overlap_add", threads, args, TILE=scalar(tiles_NCXYZ.dtype))
        self.row, self.next_row = self.next_row, self.row


def _spans(plan: TilePlan, axis: int) -> Tensor:
    """(n, 2) int32: the first and the last tile that cover each voxel of an axis."""
    voxels, starts = np.arange(plan.padded_shape[axis]), np.asarray(plan.origins[axis])
    first = np.searchsorted(starts + plan.patch[axis], voxels, side="right")
    last = np.searchsorted(starts, voxels, side="right") - 1
    return torch.from_numpy(np.stack([first, last], axis=1).astype(np.int32))


def _add_by_kernel(stitcher: Stitcher, tiles_NCXYZ: Tensor) -> Any:
    sums = stitcher._kernel
    if sums is None:  # made while the choice was another: a sum is finished the way it was begun
        return NotImplemented
    if scalar(tiles_NCXYZ.dtype) is None:
        tiles_NCXYZ = tiles_NCXYZ.float()
    sums.add(tiles_NCXYZ, stitcher.done)
    stitcher.done += len(tiles_NCXYZ)
    if stitcher.done == len(stitcher.plan):
        stitcher._out = sums.out
    return stitcher._out


def _example(seed: int, device: torch.device) -> tuple[Stitcher, Tensor]:
    plan = make_plan((21, 19, 30), (12, 8, 16), (5, 3, 7))
    some = torch.randn(len(plan), 3, *plan.patch, generator=torch.Generator().manual_seed(seed))
    stitcher = Stitcher(plan, 3, "gaussian", device)
    for level in stitcher._levels:
        if level.total is not None:
            level.total.fill_(torch.nan)
    return stitcher, some.to(device)


# Not always the same bits: torch's addcmul fuses on some processors and devices, the kernel everywhere.
@op("overlap_add", launch=_add_by_kernel, example=_example, rtol=1e-6)
def _add(stitcher: Stitcher, tiles_NCXYZ: Tensor) -> Tensor | None:
    """Add the next tiles; the finished volume after the last one."""
    if stitcher._kernel is not None:
        assert not stitcher.done, "a sum is finished the way it was begun"
        stitcher._kernel = None
    for tile in tiles_NCXYZ:
        piece = tile.float()
        for level, i in zip(stitcher._levels, reversed(stitcher.plan.index(stitcher.done)), strict=True):
            total = level.add(piece, i)
            if total is None:
                break
            piece = total
        else:
            stitcher._out = piece
        stitcher.done += 1
    return stitcher._out


def overlap_add(tiles_NCXYZ: Tensor, plan: TilePlan, window: str = "constant") -> Tensor:
    """All tiles of a plan at once: (N, C, *patch) -> (C, *padded_shape) float32, the windowed mean of what overlaps."""
    stitcher = Stitcher(plan, tiles_NCXYZ.shape[1], window, tiles_NCXYZ.device)
    stitcher.add(tiles_NCXYZ)
    return stitcher.result()
