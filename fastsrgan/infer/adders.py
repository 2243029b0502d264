"""The ways in which tiles are added to a sum: flat, by rows and slabs, or by a kernel (see ``stitch``)."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.kernels import Argument, launch, reference_only, runs_kernels, scalar
from fastsrgan.infer.tiles import TilePlan
from fastsrgan.infer.windows import raw_weights, weights, window_sums

FLAT = 64  # tiles over one voxel, up to which a flat sum stays at rounding


class Sum(Protocol):
    """What an adder sees of a ``stitch.Stitcher``. No adder keeps it: the two would be freed by the garbage collector
    only, late, and a sum is large.
    """

    plan: TilePlan
    channels: int
    device: torch.device
    onto: Tensor | None
    memory: Tensor | None
    axes: tuple[Axis, ...]

    def target(self, i: int) -> Tensor:
        """Where the sum of slab ``i`` belongs."""

    def seen(self, i: int) -> int:
        """How many planes of slab ``i`` hold sums before it."""


class Axis:
    """The sum of equal pieces along one axis, each times its own factor.

    factors : one per piece, or None for ones
    """

    def __init__(self, size: int, dim: int, origins: tuple[int, ...], factors: list[Tensor] | None) -> None:
        self.size, self.dim, self.origins, self.factors = size, dim, origins, factors

    def add(self, total: Tensor, piece: Tensor, i: int) -> bool:
        """Add piece ``i``, in ascending order, to memory that need not be clear; True when it was the last one."""
        here, n, last = self.origins[i], piece.shape[self.dim], i == len(self.origins) - 1
        before = self.origins[i - 1] + n if i else 0
        if self.dim == 3:
            # Pieces of a few voxels are slow: the whole row is cleared, and every tile is added at its full width.
            if i == 0:
                total.zero_()
            self.put(total.narrow(3, here, n), piece, i, n)
            return last
        if here > before:
            total.narrow(self.dim, before, here - before).zero_()
        if last and here + n < self.size:
            total.narrow(self.dim, here + n, self.size - here - n).zero_()
        self.put(total.narrow(self.dim, here, n), piece, i, max(0, before - here))
        return last

    def put(self, target: Tensor, piece: Tensor, i: int, seen: int) -> None:
        """Add piece ``i`` to the first ``seen`` places of a target of its size, and write it into the others."""
        if seen:
            old, more = target.narrow(self.dim, 0, seen), piece.narrow(self.dim, 0, seen)
            if self.factors is None:
                old.add_(more)
            else:
                old.addcmul_(more, self.factors[i].narrow(self.dim, 0, seen))
        left = piece.shape[self.dim] - seen
        if left:
            new, more = target.narrow(self.dim, seen, left), piece.narrow(self.dim, seen, left)
            if self.factors is None:
                new.copy_(more)
            else:
                torch.mul(more, self.factors[i].narrow(self.dim, seen, left), out=new)


def axes_of(plan: TilePlan, window: str, raw: bool, device: torch.device) -> tuple[Axis, ...]:
    """x, y, z with the factors of their tiles."""
    result, once = [], raw_weights(plan, window)
    divided = weights(plan, window) if any(w is not None for w in once) and not raw else None
    for axis, (size, origins, w) in enumerate(zip(plan.padded_shape, plan.origins, once, strict=True)):
        place, factors = [1, 1, 1, 1], None
        place[1 + axis] = -1
        if w is not None:
            arrays = [w.astype(np.float32)] * len(origins) if divided is None else divided[axis]
            factors = [torch.from_numpy(a).to(device).view(place) for a in arrays]
        result.append(Axis(size, 1 + axis, origins, factors))
    return tuple(result)


def kind_of(plan: TilePlan, window: str, device: torch.device) -> type[Adder]:
    """What adds the tiles of a plan on a device."""
    if runs_kernels(device):
        return Kernel
    if window != "constant" or len(plan) == 1 or reference_only():
        return Nested
    along_x, *within = (float(s.max()) for s in window_sums(plan))
    if math.prod(within) > FLAT:
        return Nested
    return Flat if along_x * math.prod(within) <= FLAT else FlatSlabs


class Flat:
    """Tiles straight onto the result."""

    needs_memory, needs_zeros = True, True

    def __init__(self, stitcher: Sum) -> None:
        self.own: dict[int, Tensor] = {}

    def add(self, stitcher: Sum, tiles_NCXYZ: Tensor, i: int, start: int) -> None:
        """Tiles ``start``, ``start`` + 1, ... of slab ``i``."""
        self.onto(stitcher.target(i), stitcher.plan, tiles_NCXYZ, start)

    def onto(self, slab: Tensor, plan: TilePlan, tiles_NCXYZ: Tensor, start: int) -> None:
        """Add tiles of a slab to it."""
        for n, tile in enumerate(tiles_NCXYZ, start):
            j, k = divmod(n, plan.grid[2])
            slab.narrow(2, plan.origins[1][j], plan.patch[1]).narrow(3, plan.origins[2][k], plan.patch[2]).add_(tile)


class FlatSlabs(Flat):
    """Tiles onto a slab, slabs onto the result."""

    needs_zeros = False

    def __init__(self, stitcher: Sum) -> None:
        plan = stitcher.plan
        shape = (stitcher.channels, plan.patch[0], *plan.padded_shape[1:])
        self.own = {1: torch.empty(shape, device=stitcher.device)}

    def add(self, stitcher: Sum, tiles_NCXYZ: Tensor, i: int, start: int) -> None:
        """Tiles ``start``, ``start`` + 1, ... of slab ``i``."""
        plan, slab = stitcher.plan, self.own[1]
        if start == 0:
            slab.zero_()
        self.onto(slab, plan, tiles_NCXYZ, start)
        if start + len(tiles_NCXYZ) == plan.grid[1] * plan.grid[2]:
            stitcher.axes[0].put(stitcher.target(i), slab, i, stitcher.seen(i))


class _Sums:
    """Memory of a row and of a slab, where their sums are not the result itself.

    An axis that one tile fills has no sum of its own: what is summed along the axis before it is the sum along both.
    """

    needs_zeros = False

    def __init__(self, stitcher: Sum) -> None:
        plan, (px, py, _) = stitcher.plan, stitcher.plan.patch
        self.summed = [axis for axis in (2, 1, 0) if plan.patch[axis] < plan.padded_shape[axis]]
        if stitcher.onto is not None and 0 not in self.summed:
            self.summed.append(0)
        self.needs_memory = bool(self.summed)
        shapes = {2: (px, py, plan.padded_shape[2]), 1: (px, *plan.padded_shape[1:])}
        self.own = {
            axis: torch.empty((stitcher.channels, *shapes[axis]), device=stitcher.device) for axis in self.summed[:-1]
        }


class Nested(_Sums):
    """Rows, slabs, volume: each adds the finished sums of the one before."""

    def add(self, stitcher: Sum, tiles_NCXYZ: Tensor, i: int, start: int) -> None:
        """Tiles ``start``, ``start`` + 1, ... of slab ``i``."""
        for n, tile in enumerate(tiles_NCXYZ, start):
            piece, index = tile.float(), (i, *divmod(n, stitcher.plan.grid[2]))
            if not self.summed:
                stitcher.memory = piece
            for axis in self.summed:
                if axis == 0:
                    stitcher.axes[0].put(stitcher.target(i), piece, i, stitcher.seen(i))
                    break
                total = self.own[axis] if axis in self.own else stitcher.target(i)
                if not stitcher.axes[axis].add(total, piece, index[axis]):
                    break
                piece = total


class Kernel(_Sums):
    """kernels/overlap_add.cu: tables of the plan, and the sums between two calls."""

    def __init__(self, stitcher: Sum) -> None:
        super().__init__(stitcher)
        self.needs_memory = True
        plan, device = stitcher.plan, stitcher.device
        self.wx, self.wy, self.wz = (
            torch.ones((len(a.origins), p), device=device)
            if a.factors is None
            else torch.stack([w.reshape(-1) for w in a.factors])
            for a, p in zip(stitcher.axes, plan.patch, strict=True)
        )
        self.origins = [torch.tensor(plan.origins[axis], dtype=torch.int32, device=device) for axis in (1, 2)]
        self.spans = [_spans(plan, axis).to(device) for axis in (1, 2)]
        self.slab, self.row = self.own.get(1), self.own.get(2)
        # Only where a slab has several rows can one row be finished and the next begun by one launch.
        self.next_row = torch.empty_like(self.row) if self.row is not None and plan.grid[1] > 1 else self.row

    def add(self, stitcher: Sum, tiles_NCXYZ: Tensor, i: int, start: int) -> None:
        """Tiles ``start``, ``start`` + 1, ... of slab ``i``, as one launch."""
        if scalar(tiles_NCXYZ.dtype) is None:
            tiles_NCXYZ = tiles_NCXYZ.float()
        plan, stop = stitcher.plan, start + len(tiles_NCXYZ)
        (px, py, pz), (_, size_y, size_z), nz = plan.patch, plan.padded_shape, plan.grid[2]
        y_first, y_end = plan.origins[1][start // nz], plan.origins[1][(stop - 1) // nz] + py
        out = stitcher.target(i)
        # Where a slab or a row is the whole result, its sums wait in the result's own place.
        slab = out if self.slab is None else self.slab
        row, next_row = (out, out) if self.row is None else (self.row, self.next_row)
        args: list[Argument] = [out, out.stride(0), slab, row, next_row]
        args += [tiles_NCXYZ, *tiles_NCXYZ.stride(), self.wx[i], self.wy, self.wz]
        args += [*self.origins, *self.spans, nz, stitcher.channels, px, py, pz, size_y, size_z]
        args += [start, stop, y_first, y_end, stitcher.seen(i)]
        threads = (y_end - y_first) * size_z, px, stitcher.channels
        launch("overlap_add", threads, args, TILE=scalar(tiles_NCXYZ.dtype))
        self.row, self.next_row = self.next_row, self.row


Adder = Flat | Nested | Kernel


def _spans(plan: TilePlan, axis: int) -> Tensor:
    """(n, 2) int32: the first and the last tile that cover each voxel of an axis; none where the first is larger."""
    voxels, starts = np.arange(plan.padded_shape[axis]), np.asarray(plan.origins[axis])
    first = np.searchsorted(starts + plan.patch[axis], voxels, side="right")
    last = np.searchsorted(starts, voxels, side="right") - 1
    return torch.from_numpy(np.stack([first, last], axis=1).astype(np.int32))
