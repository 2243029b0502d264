"""Overlap-add of tiles in float32: no weight volume; planes are final as soon as no later tile covers them.

Tiles form a product grid, so the sum of their windows is a product of three 1-D sums. What is added is

    out[x, y, z] = sum_i wx_i[x] ( sum_j wy_j[y] ( sum_k wz_k[z] tile_ijk[x, y, z] ) )

The constant window adds tiles as they are and divides finished planes by the number of tiles over each voxel, three
whole numbers' product. Other windows are divided by their 1-D sums beforehand. Either way ones in are ones out exactly.

The sum is nested as written: a row of tiles along z, the rows of a slab along y, the slabs. At a coverage of c tiles
per axis a voxel goes through chains of c additions instead of c^3; a flat float32 sum drifts by up to c^3 half-units in
the last place (3e-5 at 13^3). Where few tiles overlap that does not matter, and a CPU adds them straight to the result,
or, where few tiles of a slab overlap, to the slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.kernels import Argument, launch, op, reference_only, runs_kernels, scalar
from fastsrgan.infer.planes import shift_
from fastsrgan.infer.tiles import TilePlan, divide_planes, raw_weights, weights, window_sums
from fastsrgan.infer.tiles import plan as make_plan
from fastsrgan.infer.values import EVEN

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


def axes_of(plan: TilePlan, raw: bool, device: torch.device) -> tuple[Axis, ...]:
    """x, y, z with the factors of their tiles."""
    result, once = [], raw_weights(plan)
    divided = weights(plan) if any(w is not None for w in once) and not raw else None
    for axis, (size, origins, w) in enumerate(zip(plan.padded_shape, plan.origins, once, strict=True)):
        place, factors = [1, 1, 1, 1], None
        place[1 + axis] = -1
        if w is not None:
            arrays = [w.astype(np.float32)] * len(origins) if divided is None else divided[axis]
            factors = [torch.from_numpy(a).to(device).view(place) for a in arrays]
        result.append(Axis(size, 1 + axis, origins, factors))
    return tuple(result)


def kind_of(plan: TilePlan, device: torch.device) -> type[Adder]:
    """What adds the tiles of a plan on a device."""
    if runs_kernels(device):
        return Kernel
    if plan.window != EVEN or len(plan) == 1 or reference_only():
        return Nested
    along_x, *in_plane = (float(s.max()) for s in window_sums(plan))
    if math.prod(in_plane) > FLAT:
        return Nested
    return Flat if along_x * math.prod(in_plane) <= FLAT else FlatSlabs


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


# --- the sum --------------------------------------------------------------------------------------------------------

# (first plane, (C, n, Y, Z) planes that no later tile covers); they are the sum's own memory
Finished = Callable[[int, Tensor], None]


class Stitcher:
    """Takes the tiles of a plan in its order, in batches of any size, and gives the volume or its planes.

    Parameters
    ----------
    plan : of the tiles
    channels : of each tile
    device : where tiles arrive and sums are kept
    finished : called with planes as soon as they are final, in ascending order; it may change them in place
    rolling : keep no more than the planes of one slab; ``finished`` alone sees the result
    onto : (channels, *padded_shape) to which the windowed tiles are added instead, undivided. The plan may then leave
        gaps; several plans that share no tile give the sum over all of them.
    first : slab to begin with; planes that earlier ones cover come out wrong

    Memory: float32, at most (channels, *padded_shape), or the planes (channels, patch x, Y, Z) of it when rolling;
    unless the sum is flat also a slab of that size and a row (channels, patch x, patch y, Z), two rows where a kernel
    adds. Reruns are bit-identical; neither batch sizes nor ``rolling`` change the result.
    """

    def __init__(
        self,
        plan: TilePlan,
        channels: int,
        device: torch.device | str = "cpu",
        *,
        finished: Finished | None = None,
        rolling: bool = False,
        onto: Tensor | None = None,
        first: int = 0,
    ) -> None:
        self.plan, self.channels, self.device = plan, channels, torch.device(device)
        self.finished, self.rolling, self.onto, self.first = finished, rolling, onto, first
        self.done = first * plan.grid[1] * plan.grid[2]
        self.axes = axes_of(plan, onto is not None, self.device)
        self.sums: tuple[Tensor, ...] | None = None
        if plan.window == EVEN and onto is None and len(plan) > 1:
            along_x, *in_plane = window_sums(plan)
            self.sums = (along_x, *(s.to(self.device) for s in in_plane))  # the first is looked at by the host
        # Allocated here and not on first use: who makes a Stitcher finds out whether the device has room for it.
        self.adder: Adder = kind_of(plan, self.device)(self)
        self.memory = onto
        if onto is None and self.adder.needs_memory:
            planes = plan.patch[0] if rolling else plan.padded_shape[0]
            self.memory = torch.empty((channels, planes, *plan.padded_shape[1:]), device=self.device)

    def add(self, tiles_NCXYZ: Tensor) -> None:
        """The next N tiles, (N, channels, *patch) of any floating dtype; sums are float32 whatever it is."""
        _add(self, tiles_NCXYZ)

    def result(self) -> Tensor:
        """(channels, *padded_shape) float32, once every tile was added."""
        assert self.done == len(self.plan), f"{self.done} of {len(self.plan)} tiles were added"
        assert self.memory is not None and not self.rolling, "the planes went to ``finished``"
        return self.memory

    def take(self, tiles_NCXYZ: Tensor) -> Tensor | None:
        """Add the next tiles slab by slab; gives the volume after the last one."""
        per_slab = self.plan.grid[1] * self.plan.grid[2]
        while len(tiles_NCXYZ):
            i, start = divmod(self.done, per_slab)
            count = min(len(tiles_NCXYZ), per_slab - start)
            if start == 0:
                self._open(i)
            self.adder.add(self, tiles_NCXYZ[:count], i, start)
            self.done += count
            tiles_NCXYZ = tiles_NCXYZ[count:]
            if start + count == per_slab and self.onto is None:
                self._close(i)
        return self.memory if self.done == len(self.plan) else None

    def target(self, i: int) -> Tensor:
        """(channels, patch x, Y, Z): where the sum of slab ``i`` belongs."""
        assert self.memory is not None
        return self.memory if self.rolling else self.memory.narrow(1, self.plan.origins[0][i], self.plan.patch[0])

    def seen(self, i: int) -> int:
        """How many planes of slab ``i`` hold sums before it."""
        origins, px = self.plan.origins[0], self.plan.patch[0]
        if self.onto is not None:
            return px
        return max(0, origins[i - 1] + px - origins[i]) if i > self.first else 0

    def _open(self, i: int) -> None:
        """Before the first tile of a slab: sums that are not final move to the front, new planes are cleared."""
        px, seen = self.plan.patch[0], self.seen(i)
        if self.rolling and seen:
            shift_(self.target(i), 1, seen, px - seen)
        if self.adder.needs_zeros and seen < px:
            self.target(i).narrow(1, seen, px - seen).zero_()

    def _close(self, i: int) -> None:
        """After the last tile of a slab: the planes before the next one are final."""
        origins = self.plan.origins[0]
        n = self.plan.patch[0] if i == len(origins) - 1 else origins[i + 1] - origins[i]
        planes = self.target(i).narrow(1, 0, n)
        if self.sums is not None:
            divide_planes(planes, origins[i], self.sums)
        if self.finished is not None:
            self.finished(origins[i], planes)


def _add_by_kernel(stitcher: Stitcher, tiles_NCXYZ: Tensor) -> Any:
    if not isinstance(stitcher.adder, Kernel):  # made while the choice was another: a sum ends the way it began
        return NotImplemented
    return stitcher.take(tiles_NCXYZ)


def _example(seed: int, device: torch.device) -> tuple[Stitcher, Tensor]:
    plan = make_plan((21, 19, 30), (12, 8, 16), (5, 3, 7), window="gaussian")
    some = torch.randn(len(plan), 3, *plan.patch, generator=torch.Generator().manual_seed(seed))
    stitcher = Stitcher(plan, 3, device)
    for memory in (stitcher.memory, *stitcher.adder.own.values()):
        if memory is not None:
            memory.fill_(torch.nan)
    return stitcher, some.to(device)


# Not always the same bits: torch's addcmul fuses on some processors and devices, the kernel everywhere. Found: 1.2e-7
# where it does not (ATEN_CPU_CAPABILITY=default), else 0.
@op("overlap_add", launch=_add_by_kernel, example=_example, rtol=1e-6)
def _add(stitcher: Stitcher, tiles_NCXYZ: Tensor) -> Tensor | None:
    """Add the next tiles; the finished volume after the last one."""
    if isinstance(stitcher.adder, Kernel):
        assert stitcher.done == stitcher.first * stitcher.plan.grid[1] * stitcher.plan.grid[2], (
            "a sum is finished the way it was begun"
        )
        stitcher.adder = Nested(stitcher)
    return stitcher.take(tiles_NCXYZ)


def memory_of(plan: TilePlan, channels: int, device: torch.device | str, rolling: bool, onto: bool = False) -> int:
    """Bytes that a ``Stitcher`` takes; with ``onto`` those of two such sums besides its own rows and slabs."""
    (px, py, pz), (size_x, size_y, size_z) = plan.patch, plan.padded_shape
    whole = channels * (px if rolling else size_x) * size_y * size_z * (2 if onto else 1)
    kind = kind_of(plan, torch.device(device))
    if issubclass(kind, Flat):
        return 4 * (whole + (channels * px * size_y * size_z if kind is FlatSlabs else 0))
    row = channels * px * py * size_z if pz < size_z and (py < size_y or px < size_x) else 0
    slab = channels * px * size_y * size_z if py < size_y and (px < size_x or onto) else 0
    return 4 * (whole + 2 * row + slab)


def overlap_add(tiles_NCXYZ: Tensor, plan: TilePlan) -> Tensor:
    """All tiles of a plan at once: (N, C, *patch) -> (C, *padded_shape) float32, the windowed mean of what overlaps."""
    stitcher = Stitcher(plan, tiles_NCXYZ.shape[1], tiles_NCXYZ.device)
    stitcher.add(tiles_NCXYZ)
    return stitcher.result()
