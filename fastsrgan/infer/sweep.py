"""The tiles of a plan through a network and into a sum, group by group.

A group is a few whole slabs. Of a group it is known beforehand which tiles hold one value only, and which lie outside
the region of interest: those cost no pass through the network. Batches never cross the end of a group, so the same
tiles share a batch whether a volume is done in one go, by slabs, or after a kill: the same bits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Held, Source
from fastsrgan.infer.region import Region
from fastsrgan.infer.stitch import Stitcher

GROUP_BATCHES = 8  # batches that a group of slabs should fill
CONSTANTS = 4  # distinct values whose tiles are kept

NETWORK, CONSTANT, OUTSIDE = "network", "constant", "outside"


class Stopped(Exception):
    """The one who watches a sweep wants no more of it."""


class Run(NamedTuple):
    """Consecutive tiles that are treated alike: through the network, of one value, or left out."""

    kind: str
    indices: list[int]
    value: float = 0.0


class Sweep:
    """The tiles of a plan, which may leave gaps.

    Parameters
    ----------
    source : the volume
    network : with its batch ``size`` chosen; the size decides how tiles are grouped
    region : tiles that do not touch it are zero
    watch : called after every batch; gives more to show beside the rate, or raises Stopped
    clock : seconds

    Attributes
    ----------
    counts : tiles so far by kind
    known : value -> what a tile of that value becomes
    """

    def __init__(
        self,
        source: Source,
        plan: tiles.TilePlan,
        network: TileNetwork,
        *,
        region: Region | None = None,
        progress: Progress = QUIET,
        watch: Callable[[], dict] = dict,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.plan, self.network, self.region = plan, network, region
        self.progress, self.watch, self.clock = progress, watch, clock
        self.held = Held(source, plan, network.device)
        self.slabs = max(1, -(-GROUP_BATCHES * network.size // (plan.grid[1] * plan.grid[2])))
        self.counts = {NETWORK: 0, CONSTANT: 0, OUTSIDE: 0}
        self.began, self.seconds = clock(), 0.0
        self.known: dict[float, Tensor] = {}

    @property
    def done(self) -> int:
        """Tiles so far."""
        return sum(self.counts.values())

    @property
    def facts(self) -> dict:
        """Batch, seconds, tiles per second, and how many tiles were of which kind."""
        kinds = {f"tiles_{kind}": n for kind, n in self.counts.items()}
        rate = {"tile_seconds": self.seconds, "tiles_per_second": self.done / max(self.seconds, 1e-9)}
        return {"batch": self.network.size, **rate, **kinds}

    @contextlib.contextmanager
    def timed(self, label: str) -> Iterator[None]:
        """Around ``run``: the network ready, progress shown, time taken."""
        self.progress.start(label, len(self.plan), "tiles")
        self.began = self.clock()
        try:
            with self.network.working():
                yield
        finally:
            self.seconds = self.clock() - self.began
            self.progress.finish()

    def restart(self, plane: int) -> int:
        """Forget what was counted; the first slab of the group that plane ``plane`` of the volume cannot do without."""
        self.counts = dict.fromkeys(self.counts, 0)
        wanted = plane + self.plan.pad_before[0]
        needed = [i for i, o in enumerate(self.plan.origins[0]) if o + self.plan.patch[0] > wanted]
        return (needed[0] if needed else len(self.plan.origins[0])) // self.slabs * self.slabs

    def run(self, stitcher: Callable[[int], Stitcher], first: int = 0) -> None:
        """All tiles from slab ``first`` on, the first one of a group; ``stitcher`` is called with the channels."""
        origins, made = self.plan.origins[0], None
        for begin in range(first, len(origins), self.slabs):
            group = origins[begin : begin + self.slabs]
            volume = self.held.planes(group[0], group[-1] + self.plan.patch[0])
            for tiles_NCXYZ, kind in self._group(volume, group):
                made = made or stitcher(tiles_NCXYZ.shape[1])
                made.add(tiles_NCXYZ.to(made.device))
                self.counts[kind] += len(tiles_NCXYZ)
                rate = self.done / max(self.clock() - self.began, 1e-9)
                self.progress.advance(len(tiles_NCXYZ), **{"tiles/s": rate} | self.watch())

    def _group(self, volume_XYZ: Tensor, origins: tuple[int, ...]) -> Iterator[tuple[Tensor, str]]:
        """What the tiles of a few slabs become, in order."""
        plan, shape = self.plan, (volume_XYZ.shape[0], volume_XYZ.shape[1], volume_XYZ.shape[2])
        places = (tuple(o - origins[0] for o in origins), plan.origins[1], plan.origins[2])
        part = replace(plan, shape=shape, padded_shape=shape, pad_before=(0, 0, 0), origins=places)
        runs = self._runs(volume_XYZ, part, origins[0])
        batches = self.network.outputs(volume_XYZ, part, [n for r in runs if r.kind == NETWORK for n in r.indices])
        batch = volume_XYZ.new_empty(0)
        for run in runs:
            left = len(run.indices)
            if run.kind != NETWORK:
                tile = self._constant(run.value, part) if run.kind == CONSTANT else self._nothing(part)
                yield tile.expand(left, -1, -1, -1, -1), run.kind
                continue
            while left:
                if not len(batch):
                    batch = next(batches)
                some, batch = batch[:left], batch[left:]
                left -= len(some)
                yield some, NETWORK

    def _runs(self, volume_XYZ: Tensor, part: tiles.TilePlan, x: int) -> list[Run]:
        """The tiles of a group by kind; its first plane is plane ``x`` of the padded volume."""
        starts = [torch.tensor(o, device=volume_XYZ.device) for o in part.origins]
        corners = []
        for ix, iy, iz in (starts, [o + p - 1 for o, p in zip(starts, part.patch, strict=True)]):
            corners.append(volume_XYZ[ix][:, iy][:, :, iz].flatten().tolist())
        runs: list[Run] = []
        for n, (value, other) in enumerate(zip(*corners, strict=True)):
            if self.region is not None and not self._inside(part, n, x):
                run = Run(OUTSIDE, [n])
            elif value == other and _is_constant(volume_XYZ, part, n):
                run = Run(CONSTANT, [n], value)
            else:
                run = Run(NETWORK, [n])
            if runs and runs[-1][::2] == run[::2]:
                runs[-1].indices.append(n)
            else:
                runs.append(run)
        return runs

    def _inside(self, part: tiles.TilePlan, n: int, x: int) -> bool:
        assert self.region is not None
        shifts = (x - self.plan.pad_before[0], -self.plan.pad_before[1], -self.plan.pad_before[2])
        first = [o + shift for o, shift in zip(part.origin(n), shifts, strict=True)]
        return self.region.touches(first, [a + p for a, p in zip(first, part.patch, strict=True)])

    def _constant(self, value: float, part: tiles.TilePlan) -> Tensor:
        """(1, C, *patch): what a tile of one value becomes, computed once."""
        if value not in self.known:
            whole = replace(part, shape=part.patch, padded_shape=part.patch, origins=((0,), (0,), (0,)))
            tile = torch.full(part.patch, value, device=self.network.device)
            if len(self.known) == CONSTANTS:
                self.known.pop(next(iter(self.known)))
            self.known[value] = next(self.network.outputs(tile, whole, [0])).clone()
        return self.known[value]

    def _nothing(self, part: tiles.TilePlan) -> Tensor:
        channels = self.network.channels
        if channels is None:
            channels = self._constant(0.0, part).shape[1]
        return torch.zeros((1, 1, 1, 1, 1), device=self.network.device).expand(1, channels, *part.patch)


def _is_constant(volume_XYZ: Tensor, part: tiles.TilePlan, n: int) -> bool:
    x, y, z = part.origin(n)
    px, py, pz = part.patch
    low, high = torch.aminmax(volume_XYZ[x : x + px, y : y + py, z : z + pz])
    return bool(low == high)
