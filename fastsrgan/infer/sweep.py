"""All tiles of a volume through a network on a device, stitched: in memory or by slabs.

Tiles go group by group; a group is a few whole slabs. Of a group it is known beforehand which tiles hold one value
only, and which lie outside the region of interest: those cost no pass through the network. Batches never cross the end
of a group, so the same tiles share a batch whether a volume is done in one go, by slabs, or after a kill: the same
bits.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.errors import ResourceError, out_of_memory
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Held, Sink, Source, Whole
from fastsrgan.infer.stitch import Stitcher
from fastsrgan.infer.tiles import Region

log = logging.getLogger("fastsrgan")

GROUP_BATCHES = 8  # batches that a group of slabs should fill
CONSTANTS = 4  # distinct values whose tiles are kept

NETWORK, CONSTANT, OUTSIDE = "network", "constant", "outside"


class SweepStopped(Exception):
    """The one who watches a sweep wants no more of it."""


class TileRun(NamedTuple):
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
        self.progress.start(label, len(self.plan), "tile")
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
                self.progress.advance(len(tiles_NCXYZ), **self.watch())

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
                if self.network.compiled:  # what waits lies where the pass of a tile of one value would write
                    batch = batch.clone()
                tile = self._constant(run.value, part) if run.kind == CONSTANT else self._nothing(part)
                yield tile.expand(left, -1, -1, -1, -1), run.kind
                continue
            while left:
                if not len(batch):
                    batch = next(batches)
                some, batch = batch[:left], batch[left:]
                left -= len(some)
                yield some, NETWORK

    def _runs(self, volume_XYZ: Tensor, part: tiles.TilePlan, x: int) -> list[TileRun]:
        """The tiles of a group by kind; its first plane is plane ``x`` of the padded volume."""
        starts = [torch.tensor(o, device=volume_XYZ.device) for o in part.origins]
        corners = []
        for ix, iy, iz in (starts, [o + p - 1 for o, p in zip(starts, part.patch, strict=True)]):
            corners.append(volume_XYZ[ix][:, iy][:, :, iz].flatten().tolist())
        runs: list[TileRun] = []
        for n, (value, other) in enumerate(zip(*corners, strict=True)):
            if self.region is not None and not self._inside(part, n, x):
                run = TileRun(OUTSIDE, [n])
            elif value == other and _is_constant(volume_XYZ, part, n):
                run = TileRun(CONSTANT, [n], value)
            else:
                run = TileRun(NETWORK, [n])
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
        channels = self.network.channels or self._constant(0.0, part).shape[1]
        return torch.zeros((1, 1, 1, 1, 1), device=self.network.device).expand(1, channels, *part.patch)


def _is_constant(volume_XYZ: Tensor, part: tiles.TilePlan, n: int) -> bool:
    x, y, z = part.origin(n)
    px, py, pz = part.patch
    low, high = torch.aminmax(volume_XYZ[x : x + px, y : y + py, z : z + pz])
    return bool(low == high)


# --- one volume -----------------------------------------------------------------------------------------------------


def predict(
    volume_XYZ: Tensor,
    plan: tiles.TilePlan,
    network: TileNetwork,
    *,
    region: Region | None = None,
    progress: Progress = QUIET,
    label: str = "infer",
) -> tuple[Tensor, dict]:
    """Apply a network to a normalised volume, densely.

    Parameters
    ----------
    volume_XYZ : (X, Y, Z) float32 on the CPU, of the plan's shape
    region : where results are wanted; elsewhere channel 0 is the volume and the others are 0

    Returns
    -------
    (C, X, Y, Z) float32 on the CPU, SR first, then probabilities in [0, 1]; and facts: batch, tile_seconds,
    tiles_per_second, and how many tiles went through the network, held one value, or lay outside the region.

    Raises
    ------
    UsageError : an impossible batch. ResourceError : no memory for a single tile.
    """
    out: list[Tensor] = []

    def keep(first: int, planes: Tensor) -> None:
        if not out:
            out.append(torch.empty((planes.shape[0], *plan.shape)))
        out[0][:, first : first + planes.shape[1]] = planes

    if network.device.type != "cpu":
        facts = stream(Whole(volume_XYZ), plan, network, keep, region=region, progress=progress, label=label)
        return out[0], facts
    network.choose_batch(network.batch, plan)
    sweep = Sweep(Whole(volume_XYZ), plan, network, region=region, progress=progress)
    made: list[Stitcher] = []

    def stitcher(channels: int) -> Stitcher:
        made.append(Stitcher(plan, channels, finished=finisher(sweep, lambda first, planes: None)))
        return made[0]

    with sweep.timed(label):
        sweep.run(stitcher)
    return made[0].result()[(slice(None), *plan.crop)], sweep.facts


def stream(
    source: Source,
    plan: tiles.TilePlan,
    network: TileNetwork,
    sink: Sink,
    *,
    region: Region | None = None,
    done: int = 0,
    progress: Progress = QUIET,
    label: str = "infer",
) -> dict:
    """``predict`` by slabs: planes go to ``sink`` as soon as they are final, and only those of a slab are in memory.

    done : planes that the sink has from a run before this one, with the same batch
    """
    network.choose_batch(network.batch, plan)
    sweep = Sweep(source, plan, network, region=region, progress=progress)
    written = [done]

    def write(first: int, planes: Tensor) -> None:
        if first + planes.shape[1] > written[0]:
            sink(max(first, written[0]), planes[:, max(0, written[0] - first) :].cpu())
            written[0] = first + planes.shape[1]

    places = sum_devices(network.device)
    with sweep.timed(label):
        for n, place in enumerate(places):
            first = sweep.restart(written[0])

            def stitcher(channels: int, place: torch.device = place, first: int = first) -> Stitcher:
                finished = finisher(sweep, write)
                return Stitcher(plan, channels, place, finished=finished, rolling=True, first=first)

            try:
                sweep.run(stitcher, first)
                break
            except (ResourceError, RuntimeError) as error:
                if not out_of_memory(error) or n == len(places) - 1:
                    raise
            log.warning("out of memory on %s: the result is summed on the CPU, which is slower", place)
            torch.cuda.empty_cache()
    return sweep.facts


def sum_devices(device: torch.device) -> list[torch.device]:
    """Where sums may be kept, the first choice first."""
    return [device] if device.type == "cpu" else [device, torch.device("cpu")]


def finisher(sweep: Sweep, sink: Sink) -> Callable[[int, Tensor], None]:
    """What is done with final sums: crop, subtract from the volume, clamp, fill what lies outside; in place."""
    plan, region, held = sweep.plan, sweep.region, sweep.held

    def finish(x: int, planes: Tensor) -> None:
        before, after = plan.crop[0].start, plan.crop[0].stop
        first, stop = max(x, before), min(x + planes.shape[1], after)
        if first >= stop:
            return
        out = planes[:, first - x : stop - x, plan.crop[1], plan.crop[2]]
        volume = held.inner(first - before, stop - before).to(out.device)
        if sweep.network.residual:
            torch.sub(volume, out[0], out=out[0])
        out[1:].clamp_(0, 1)  # means of probabilities, exceeded by rounding only
        if region is not None:
            outside = ~region.planes(first - before, stop - before).to(out.device)
            out[0][outside] = volume[outside]
            out[1:].masked_fill_(outside, 0)
        sink(first - before, out)

    return finish
