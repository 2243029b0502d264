"""What an inference will take, and where, before it starts: in memory, by slabs, or not at all.

Everything follows from shapes; what the network takes is counted on one tile (``network``). Measured peaks stay
between half the plan and the plan (tests/test_memory_plan.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastsrgan.core.system import free_memory
from fastsrgan.errors import ResourceError, human
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import BLOCK
from fastsrgan.infer.stitch import memory_of
from fastsrgan.infer.sweep import GROUP_BATCHES

LIBRARIES = 24 * 2**20  # of code, threads and buffers that torch takes with its first convolution
SHARE = 0.9  # of the free memory, when no limit is asked for
SMALLER = (128, 96, 64, 48, 32, 24, 16)  # patches that a refusal may recommend

MEMORY, SLABS = "memory", "slabs"


@dataclass(frozen=True)
class TilingJob:
    """What the plan depends on.

    plan : of the tiles; channels : of the result
    held : bytes kept of the image besides the image
    levels : whether levels of denser tiles are summed (``anytime``)
    can_stream : whether there is a place for results that do not fit into memory
    split : whether this process does a part of the planes only, which always go to files
    averaged : whether a tile's result is a mean over several passes
    after : bytes on the host that the last step takes when there are no more tiles
    tried : whether that step runs the network once more
    """

    plan: tiles.TilePlan
    channels: int
    held: int = 0
    levels: bool = False
    can_stream: bool = False
    split: bool = False
    averaged: bool = False
    after: int = 0
    tried: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for and where they lie ("host", "device", "disk"); the image itself is not counted."""

    mode: str
    rows: tuple[tuple[str, str, int], ...]
    batch: int
    limit: int

    def total(self, where: str) -> int:
        """Bytes on the host, the device or the disk."""
        return sum(size for _, place, size in self.rows if place == where)

    def has(self, what: str) -> bool:
        """Whether there is room for it."""
        return any(name == what for name, _, _ in self.rows)

    @property
    def line(self) -> str:
        """One line for a log."""
        places = []
        for where in ("device", "host", "disk"):
            if self.total(where):
                parts = ", ".join(f"{what} {human(size)}" for what, place, size in self.rows if place == where and size)
                places.append(f"{human(self.total(where))} on the {where} ({parts})")
        way = "in memory" if self.mode == MEMORY else "by slabs, the result in files"
        return f"memory beside the image: {'; '.join(places)}; limit {human(self.limit)}: {way}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        rows = [{"what": what, "where": where, "bytes": size} for what, where, size in self.rows]
        totals = {f"{where}_bytes": self.total(where) for where in ("host", "device", "disk")}
        return {"mode": self.mode, "limit_bytes": self.limit, **totals, "rows": rows}


class Beside(Protocol):
    """What else of a cohort could be in memory while a volume is worked on: its neighbours in the list.

    result : bytes of the result before it, which is being written
    image : bytes of the image behind it, which is not read yet; 0 where only reading tells; None: there is none
    """

    result: int
    image: int | None

    def settle(self, result: bool, image: bool) -> None:
        """Told before the first tile which of them there is room for; makes sure that the others are not there."""


RESULT_BEFORE, NEXT_IMAGE = "result before", "next image"


def plan_memory(
    job: TilingJob, network: TileNetwork, batch: str | int, limit: int | None = None, beside: Beside | None = None
) -> MemoryPlan:
    """Choose how a volume is done and with which batch: as if it was alone, then its neighbours are let in where there
    is room, so that they change no result.

    limit : bytes on the host beside the image; None takes nine tenths of what is free

    Raises
    ------
    ResourceError : neither way fits; says what would.
    """
    given = limit
    if limit is None:
        limit = int(SHARE * (free_memory() + (beside.result if beside else 0)))
    ways = [MEMORY] * (not job.split) + [SLABS] * (job.can_stream and not job.levels)
    plans = [_fitted(job, network, batch, way, limit) for way in ways]
    for made in plans:
        if made.total("host") <= limit:
            return made if beside is None else _with(made, beside)
    least = min(plans, key=lambda made: made.total("host")).total("host")
    available = f"the limit is {human(limit)}" if given is not None else f"{human(limit)} are free"
    advice = _advice(job, network, limit)
    if given is not None:
        free = "" if least <= SHARE * free_memory() else f", more than the {human(free_memory())} that are free"
        advice = f"--max-memory {-(-least >> 20)}M{free}; or {advice}"
    raise ResourceError("memory", f"this image needs {human(least)}, {available}", advice)


def _with(made: MemoryPlan, beside: Beside) -> MemoryPlan:
    """The plan with those neighbours that fit."""
    for what, size in ((RESULT_BEFORE, beside.result or None), (NEXT_IMAGE, beside.image)):
        if size is not None and made.total("host") + size <= made.limit:
            made = replace(made, rows=(*made.rows, (what, "host", size)))
    return made


def _fitted(job: TilingJob, network: TileNetwork, batch: str | int, mode: str, limit: int) -> MemoryPlan:
    """The largest batch that fits, down to one tile."""
    size = network.choose_batch(batch, job.plan)
    while True:
        made = MemoryPlan(mode, _rows(job, network, size, mode), size, limit)
        if made.total("host") <= limit or size == 1:
            return made
        size //= 2


def _rows(job: TilingJob, network: TileNetwork, batch: int, mode: str) -> tuple[tuple[str, str, int], ...]:
    plan, channels = job.plan, job.channels
    on_device = network.device.type != "cpu"
    work = "device" if on_device else "host"
    voxels = math.prod(plan.shape)
    plane, padded_plane = math.prod(plan.shape[1:]), math.prod(plan.padded_shape[1:])
    slabs = max(1, -(-GROUP_BATCHES * batch // (plan.grid[1] * plan.grid[2])))
    origins = plan.origins[0]
    reach = max(
        origins[min(i + slabs, len(origins)) - 1] + plan.patch[0] - origins[i] for i in range(0, len(origins), slabs)
    )
    rolling = mode == SLABS or on_device
    window = 4 * reach * padded_plane if rolling or plan.padded_shape != plan.shape else 0
    tile = 4 * math.prod(plan.patch)
    rows = [
        ("image", "host", job.held + 4 * (voxels if mode == MEMORY else 3 * BLOCK * plane)),
        ("planes", work, window),
        ("sums", work, memory_of(plan, channels, network.device, rolling, job.levels)),
        ("network", work, network.bytes_of(plan.patch, batch) + batch * tile * (1 + channels)),
    ]
    if job.averaged:
        rows.append(("means", work, batch * tile * (1 + 2 * channels)))
    if mode == SLABS:
        rows += [
            ("finished planes", "host", 4 * channels * plan.patch[0] * plane),
            ("result", "disk", 4 * channels * voxels),
        ]
    elif rolling:
        rows.append(("result", "host", 4 * channels * voxels))
    idle = ("planes",) if job.tried else ("planes", "network", "means")
    free_again = sum(size for what, where, size in rows if where == "host" and what in idle)
    if job.after > free_again:  # else it finds room where the tiles were
        rows.append(("agreement", "host", job.after - free_again))
    rows.append(("libraries", "host", LIBRARIES))
    return tuple((what, where, int(size)) for what, where, size in rows)


def _advice(job: TilingJob, network: TileNetwork, limit: int) -> str:
    """What would fit: a smaller patch, or nothing."""
    way = SLABS if job.can_stream and not job.levels else MEMORY
    by_slabs = sum(size for _, where, size in _rows(job, network, 1, SLABS) if where == "host")
    if way == MEMORY and by_slabs <= limit and not job.split:
        change = "without --budget" if job.levels else "with scratch, a folder for its files"
        return f"by slabs it needs {human(by_slabs)}: {change}"
    smallest = ""
    for patch in SMALLER:
        if patch >= max(job.plan.patch):
            continue
        plan = tiles.plan(job.plan.shape, patch, patch, window=job.plan.window)
        rows = _rows(replace(job, plan=plan), network, 1, way)
        needed = sum(size for _, where, size in rows if where == "host")
        if needed <= limit:
            return f"--patch {patch} needs {human(needed)}"
        smallest = f"; --patch {patch} still needs {human(needed)}"
    return f"a machine with more memory, or a coarser --new-resolution{smallest}"
