"""One volume over the ranks of a machine: each does a range of planes, into files that all of them have mapped.

A rank begins at the group of slabs that its first plane needs, as a run that goes on after a kill does, and ends with
its last plane: the same groups, the same batches, the same bytes as one process. The price are the tiles that reach
over a seam, which both sides compute: up to a patch of planes at each seam. Ranges are chosen so that the slowest rank
has as few slabs as possible; where a volume not much longer than a patch gains little, a warning says so.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from fastsrgan.core.progress import Progress
from fastsrgan.core.ranks import Ranks
from fastsrgan.errors import FastsrganError, ResourceError, UsageError
from fastsrgan.infer import tiles
from fastsrgan.infer.engine import stream
from fastsrgan.infer.interpolated import Results
from fastsrgan.infer.modes import Done, Prepared, result_shapes
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Unfinished
from fastsrgan.infer.settings import InferSettings
from fastsrgan.infer.sweep import Sweep

log = logging.getLogger("fastsrgan")


@dataclass(frozen=True)
class Share:
    """Planes ``first`` ... ``stop`` of a volume, and the ``slabs`` of tiles that are computed for them."""

    first: int
    stop: int
    slabs: int


class Together:
    """What all ranks do with one volume: every rank calls ``vote`` as often as the others, whatever goes wrong on it.

    There are four votes: before and after the files are made, after the tiles, and after the last step on the whole.
    One who failed tells the others in the vote that it has not reached; they raise ResourceError with its reason.
    """

    def __init__(self, ranks: Ranks) -> None:
        if ranks.local_world != ranks.world:
            raise UsageError(
                "--split-volume", "the ranks are on several machines", "one machine, or whole volumes each"
            )
        if ranks.world == 1:
            raise UsageError("--split-volume", "one process has nobody to share with", "torchrun --nproc-per-node N")
        self.ranks, self.left = ranks, 4

    def vote(self, value: int = 0, error: BaseException | None = None) -> int:
        """Wait for all ranks; the smallest of their values. ResourceError where another one failed and this did not."""
        self.left -= 1
        own = None if error is None else f"{type(error).__name__}: {error}"
        if isinstance(error, FastsrganError):
            own = str(error)
        told = self.ranks.gather([own, value])
        failed = [(r, text) for r, (text, _) in enumerate(told) if text]
        if failed:
            self.left = 0
            if error is None:
                rank, text = failed[0]
                raise ResourceError(f"rank {rank}", text, "the other ranks ended with it")
        return min(number for _, number in told)

    def failed(self, error: BaseException) -> None:
        """Tell the others, unless they know."""
        if self.left:
            self.vote(error=error)


def shares(sweep: Sweep, world: int) -> list[Share]:
    """The planes of each rank: contiguous, all of them, with the smallest possible number of slabs for the one with
    most; ranks for which none are left have no planes."""
    origins, n, before = sweep.plan.origins[0], sweep.plan.shape[0], sweep.plan.pad_before[0]
    for most in range(1, len(origins) + 1):
        found: list[Share] = []
        at = 0
        while at < n and len(found) < world:
            first = sweep.restart(at)
            last = min(first + most, len(origins))
            stop = n if last == len(origins) else min(n, max(0, origins[last] - before))
            if stop <= at:
                break
            found.append(Share(at, stop, last - first))
            at = stop
        if at == n:
            return found + [Share(n, n, 0)] * (world - len(found))
    raise AssertionError("one rank can do all slabs")


class _Enough(Exception):
    """All planes of this rank are written."""


def by_ranks(
    image: Prepared,
    plan: tiles.TilePlan,
    network: TileNetwork,
    settings: InferSettings,
    folder: Path,
    key: str,
    together: Together,
    progress: Progress,
    label: str,
) -> Done:
    """This rank's planes into files in ``folder``; afterwards the whole result, mapped, on every rank.

    Raises ResourceError where another rank failed.
    """
    ranks, began = together.ranks, time.perf_counter()
    # One batch on all ranks: with less memory on one of them they would round differently.
    assert isinstance(settings.batch, int)  # of the memory plan
    batch = network.choose_batch(together.vote(settings.batch), plan)
    parts = shares(Sweep(image.source, plan, network), ranks.world)
    mine, per_slab = parts[ranks.rank], plan.grid[1] * plan.grid[2]
    files = None
    if ranks.rank == 0:
        _tell(parts, plan, label)
        files = Unfinished(folder, f"{key} split", result_shapes(image, plan, network), plan.shape[0])
    together.vote()
    arrays = files.arrays if files else _mapped(folder)
    sink = Results(arrays["sr"], arrays["prob"], image.turn, image.norm)

    def write(first: int, planes: Tensor) -> None:
        sink(first, planes[:, : mine.stop - first])
        if first + planes.shape[1] >= mine.stop:
            raise _Enough

    shown = _Part(progress, mine.slabs * per_slab)
    try:
        if mine.first < mine.stop:
            stream(
                image.source, plan, network, write, replace(settings, batch=batch),
                region=image.region, done=mine.first, progress=shown, label=label,
            )  # fmt: skip
    except _Enough:
        pass
    seconds = time.perf_counter() - began
    together.vote()
    if files is not None:
        files.note(plan.shape[0])
        arrays = files.finish()
    computed = sum(part.slabs for part in parts)
    facts = {
        "batch": network.size,
        "tile_seconds": seconds,
        "tiles_per_second": computed * per_slab / seconds,
        "split": {
            "ranks": ranks.world,
            "planes": [[part.first, part.stop] for part in parts],
            "tiles": [part.slabs * per_slab for part in parts],
            "tiles_computed_twice": computed * per_slab - len(plan),
        },
    }
    return arrays["sr"], arrays["prob"], facts


def _mapped(folder: Path) -> dict[str, np.ndarray]:
    """What rank 0 made."""
    partial = Unfinished.partial_of(folder)
    return {name: np.load(partial / f"{name}.npy", mmap_mode="r+") for name in ("sr", "prob")}


def _tell(parts: list[Share], plan: tiles.TilePlan, label: str) -> None:
    whole, most = plan.grid[0], max(part.slabs for part in parts)
    counts = ", ".join(str(part.slabs) for part in parts)
    text = "%s: %d slabs of tiles over %d ranks, %s each with those at the seams: %.2g x one process at best"
    log.info(text, label, whole, len(parts), counts, whole / most)
    if whole / most < 1 + 0.25 * (len(parts) - 1):
        log.warning(
            "%s: too short for its patch to be worth splitting; several volumes at once are better dealt", label
        )


class _Part:
    """Progress of a part: another number of tiles than the whole plan has."""

    def __init__(self, shown: Progress, total: int) -> None:
        self.shown, self.total = shown, total
        self.advance, self.finish = shown.advance, shown.finish

    def start(self, label: str, total: int, unit: str) -> None:
        """``total`` is that of the part."""
        self.shown.start(label, self.total, unit)
