"""Overlap-add of tiles in float32 (DESIGN D9): no weight volume; planes are final as soon as no later tile covers them.

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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsrgan.core.kernels import op
from fastsrgan.infer.adders import Adder, Flat, FlatSlabs, Kernel, Nested, axes_of, kind_of
from fastsrgan.infer.planes import shift_
from fastsrgan.infer.tiles import TilePlan
from fastsrgan.infer.tiles import plan as make_plan
from fastsrgan.infer.windows import WINDOWS as WINDOWS
from fastsrgan.infer.windows import check_window as check_window
from fastsrgan.infer.windows import divide_planes, window_sums
from fastsrgan.infer.windows import weights as weights

# (first plane, (C, n, Y, Z) planes that no later tile covers); they are the sum's own memory
Finished = Callable[[int, Tensor], None]


class Stitcher:
    """Takes the tiles of a plan in its order, in batches of any size, and gives the volume or its planes.

    Parameters
    ----------
    plan : of the tiles
    channels : of each tile
    window : name in ``WINDOWS``
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
        window: str = "constant",
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
        self.axes = axes_of(plan, window, onto is not None, self.device)
        self.sums: tuple[Tensor, ...] | None = None
        if window == "constant" and onto is None and len(plan) > 1:
            along_x, *within = window_sums(plan, window)
            self.sums = (along_x, *(s.to(self.device) for s in within))  # the first is looked at by the host
        # Allocated here and not on first use: who makes a Stitcher finds out whether the device has room for it.
        self.adder: Adder = kind_of(plan, window, self.device)(self)
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
    plan = make_plan((21, 19, 30), (12, 8, 16), (5, 3, 7))
    some = torch.randn(len(plan), 3, *plan.patch, generator=torch.Generator().manual_seed(seed))
    stitcher = Stitcher(plan, 3, "gaussian", device)
    for memory in (stitcher.memory, *stitcher.adder.own.values()):
        if memory is not None:
            memory.fill_(torch.nan)
    return stitcher, some.to(device)


# Not always the same bits: torch's addcmul fuses on some processors and devices, the kernel everywhere.
@op("overlap_add", launch=_add_by_kernel, example=_example, rtol=1e-6)
def _add(stitcher: Stitcher, tiles_NCXYZ: Tensor) -> Tensor | None:
    """Add the next tiles; the finished volume after the last one."""
    if isinstance(stitcher.adder, Kernel):
        assert stitcher.done == stitcher.first * stitcher.plan.grid[1] * stitcher.plan.grid[2], (
            "a sum is finished the way it was begun"
        )
        stitcher.adder = Nested(stitcher)
    return stitcher.take(tiles_NCXYZ)


def memory_of(
    plan: TilePlan, channels: int, window: str, device: torch.device | str, rolling: bool, onto: bool = False
) -> int:
    """Bytes that a ``Stitcher`` takes; with ``onto`` those of two such sums besides its own rows and slabs."""
    (px, py, pz), (size_x, size_y, size_z) = plan.patch, plan.padded_shape
    whole = channels * (px if rolling else size_x) * size_y * size_z * (2 if onto else 1)
    kind = kind_of(plan, window, torch.device(device))
    if issubclass(kind, Flat):
        return 4 * (whole + (channels * px * size_y * size_z if kind is FlatSlabs else 0))
    row = channels * px * py * size_z if pz < size_z and (py < size_y or px < size_x) else 0
    slab = channels * px * size_y * size_z if py < size_y and (px < size_x or onto) else 0
    return 4 * (whole + 2 * row + slab)


def overlap_add(tiles_NCXYZ: Tensor, plan: TilePlan, window: str = "constant") -> Tensor:
    """All tiles of a plan at once: (N, C, *patch) -> (C, *padded_shape) float32, the windowed mean of what overlaps."""
    stitcher = Stitcher(plan, tiles_NCXYZ.shape[1], window, tiles_NCXYZ.device)
    stitcher.add(tiles_NCXYZ)
    return stitcher.result()
