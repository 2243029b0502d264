"""Inference within a time budget: ever denser tiles, each level keeping what the levels before it computed.

The steps are nested (64, 32, 16), so the tiles of a level are the tiles of the level before and new ones, and the new
ones are up to three product grids: new places along x with all along y and z, old x with new y, old x and y with new z.
Windows are not divided beforehand: windowed tiles are summed as they come, and the sum is divided by the 1-D window
sums of the last finished level. No tile is kept; the result is that of a plain run at that step, to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.errors import out_of_memory
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Done, Prepared, Whole
from fastsrgan.infer.stitch import Stitcher
from fastsrgan.infer.sweep import Sweep, SweepStopped, finisher, sum_devices
from fastsrgan.infer.tiles import Region, divide_planes, window_sums
from fastsrgan.infer.values import Step, per_axis

BUDGET = 60.0  # seconds that step "auto" takes when none are given
LEVELS = 4  # of "auto": half the patch, a quarter, an eighth, a sixteenth
SLACK = 1.1  # of the budget, what a level that was begun may take before it is given up
SETTLED = 8  # tiles of a level after which its own rate counts
PLANES = 32  # finished at a time

Clock = Callable[[], float]


class Level(NamedTuple):
    """A step per axis and the tiles that it makes."""

    step: tuple[int, ...]
    plan: tiles.TilePlan


def levels(shape: Sequence[int], patch: tiles.PerAxis, step: Step, **more: Any) -> list[Level]:
    """Nested steps, the coarsest first: the wanted step, doubled as long as tiles still overlap by half.

    ``"auto"`` ends at a sixteenth of the patch. ``more`` (multiple, window), and raises UsageError, as ``tiles.plan``.
    """
    edges = tiles.plan(shape, patch, 1, **more).patch
    steps = tuple(max(1, p // 2**LEVELS) for p in edges) if step == "auto" else per_axis("step", step)
    result = [Level(steps, tiles.plan(shape, patch, steps, **more))]
    while any(2 * s <= p // 2 for s, p in zip(steps, edges, strict=True)):
        steps = tuple(2 * s if 2 * s <= p // 2 else s for s, p in zip(steps, edges, strict=True))
        plan = tiles.plan(shape, patch, steps, **more)
        if len(plan) < len(result[0].plan):
            result.insert(0, Level(steps, plan))
    return result


def new_tiles(plan: tiles.TilePlan, before: tiles.TilePlan | None) -> list[tiles.TilePlan]:
    """What a plan adds to a coarser one, as product grids that share no tile."""
    if before is None:
        return [plan]
    assert all(set(old) <= set(new) for old, new in zip(before.origins, plan.origins, strict=True))
    (x, y, _), (_, all_y, all_z) = before.origins, plan.origins
    pairs = zip(before.origins, plan.origins, strict=True)
    nx, ny, nz = (tuple(o for o in new if o not in set(old)) for old, new in pairs)
    grids = [(nx, all_y, all_z), (x, ny, all_z), (x, y, nz)]
    return [replace(plan, origins=grid) for grid in grids if all(grid)]


def refine(
    volume_XYZ: Tensor,
    steps: Sequence[Level],
    network: TileNetwork,
    budget: float | None = None,
    *,
    region: Region | None = None,
    progress: Progress = QUIET,
    label: str = "infer",
    clock: Clock = time.perf_counter,
) -> tuple[Tensor, dict]:
    """``sweep.predict`` at the densest level that fits a budget of seconds; the first level is done in any case.

    A level is begun only where the tiles so far say that it will end in time, and given up when it turns out that it
    ends more than a tenth too late; the result is then that of the level before.

    steps : as ``levels`` gives them
    budget : seconds; None: ``BUDGET``

    Returns
    -------
    As ``sweep.predict``; facts also hold "levels", the step, tiles and seconds of each level that was
    finished, and "level_given_up".
    """
    network.choose_batch(network.batch, steps[-1].plan)
    seconds = BUDGET if budget is None else budget
    work = _Levels(network, Whole(volume_XYZ), seconds, region, progress, label, clock)
    with network.working():
        for n, level in enumerate(steps):
            if not work.level(level, n, len(steps)):
                break
        out = work.result()
    return out, work.facts


def by_levels(
    image: Prepared,
    steps: Sequence[Level],
    network: TileNetwork,
    budget: float | None,
    progress: Progress = QUIET,
    label: str = "infer",
) -> Done:
    """``refine`` of an image."""
    out, facts = refine(image.whole(), steps, network, budget, region=image.region, progress=progress, label=label)
    return *image.stored(out), facts


class _Levels:
    """The sum over all finished levels, and beside it that of the level that is being worked on."""

    def __init__(
        self,
        network: TileNetwork,
        source: Whole,
        budget: float,
        region: Region | None,
        progress: Progress,
        label: str,
        clock: Clock,
    ) -> None:
        self.network, self.source, self.budget, self.region = network, source, budget, region
        self.progress, self.label, self.clock = progress, label, clock
        self.began, self.tiles, self.done = clock(), 0, []  # type: ignore[var-annotated]
        self.plan: tiles.TilePlan | None = None
        self.total: Tensor | None = None
        self.fresh: Tensor | None = None
        self.known: dict[float, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.given_up = False

    def level(self, level: Level, n: int, of: int) -> bool:
        """Work on a level; False where it does not fit, and nothing of it counts."""
        grids = new_tiles(level.plan, self.plan)
        count, start, before = sum(map(len, grids)), self.clock(), self.tiles
        if self.plan is not None:
            rate = self.tiles / max(start - self.began, 1e-9)
            if start - self.began + count / rate > self.budget:
                return False

        def watch() -> dict:
            now, mine = self.clock(), self.tiles + sweep.done - before
            seconds = now - start if mine >= SETTLED else now - self.began
            rate = (mine if mine >= SETTLED else self.tiles + sweep.done) / max(seconds, 1e-9)
            left = (count - mine) / rate
            if self.plan is not None and now - self.began + left > SLACK * self.budget:
                raise SweepStopped
            return {"level": f"{n + 1}/{of}", "eta": f"{left:.0f} s"}

        self.progress.start(f"{self.label}, level {n + 1}", count, "tile")
        try:
            for grid in grids:
                sweep = Sweep(
                    self.source, grid, self.network, region=self.region, progress=self.progress, watch=watch,
                    clock=self.clock,
                )  # fmt: skip
                sweep.known = self.known
                sweep.run(lambda channels, grid=grid: self._stitcher(grid, channels))  # type: ignore[misc]
                self.tiles += sweep.done
                self.counts = {kind: self.counts.get(kind, 0) + c for kind, c in sweep.counts.items()}
        except SweepStopped:
            self.given_up = True
            return False
        finally:
            self.progress.finish()
        self._keep(level, count, self.clock() - start)
        return True

    def _stitcher(self, grid: tiles.TilePlan, channels: int) -> Stitcher:
        if self.fresh is None:
            self.fresh = _zeros((channels, *grid.padded_shape), self.network.device)
        return Stitcher(grid, channels, self.fresh.device, onto=self.fresh)

    def _keep(self, level: Level, count: int, seconds: float) -> None:
        assert self.fresh is not None
        if self.total is None:
            self.total, self.fresh = self.fresh, None
        else:
            self.total += self.fresh
            self.fresh.zero_()
        facts = {"step": list(level.step), "tiles": len(level.plan), "new_tiles": count, "seconds": seconds}
        self.done.append(facts)
        self.plan = level.plan

    def result(self) -> Tensor:
        """The finished levels' mean, made in place."""
        assert self.plan is not None and self.total is not None
        self.fresh = None
        sums = [s.to(self.total.device) for s in window_sums(self.plan)]
        sweep = Sweep(self.source, self.plan, self.network, region=self.region)
        finish = finisher(sweep, lambda first, planes: None)
        for x in range(0, self.plan.padded_shape[0], PLANES):
            planes = self.total[:, x : x + PLANES]
            sweep.held.planes(x, x + planes.shape[1])
            divide_planes(planes, x, sums)
            finish(x, planes)
        return self.total[(slice(None), *self.plan.crop)].cpu()

    @property
    def facts(self) -> dict:
        """As a sweep's, and the levels."""
        seconds = self.clock() - self.began
        kinds = {f"tiles_{kind}": n for kind, n in self.counts.items()}
        rate = {"tile_seconds": seconds, "tiles_per_second": self.tiles / max(seconds, 1e-9)}
        levels = {"levels": self.done, "level_given_up": self.given_up}
        return {"batch": self.network.size, **rate, **kinds, **levels}


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device, or on the host when the device has no room."""
    *firsts, last = sum_devices(device)
    for place in firsts:
        try:
            return torch.zeros(shape, device=place)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
    return torch.zeros(shape, device=last)
