"""One side of the end-to-end data benchmark in a process of its own: fastsrgan itself, the comparison of a peer's
volumes with ours, and the measuring of whichever side it is.

    python -m bench.data_sides SIDE WORK      # WORK: the fields of cohort.Work as JSON; the last line is the result
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import peers_data as peers
from bench.cohort import Epochs, Patches, Work, as_patches
from bench.watch import FolderWatch, tree_cpu_seconds, tree_memory, written
from fastsrgan.core.system import pick_device, tune_allocator
from fastsrgan.data.feed import Feed, deal, resident_limit
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.data.subject import PatchRule
from fastsrgan.observation.model import Degradation
from fastsrgan.store.reader import open_store

OURS = "fastsrgan"
SIDES: dict[str, Callable[[Work], Epochs]] = {
    "original": peers.original,
    "torchio": peers.torchio,
    "torchio, linear": functools.partial(peers.torchio, interpolation="linear"),
    "monai": peers.monai,
    "monai, trilinear": functools.partial(peers.monai, interpolation="linear"),
}
SIDES |= {f"{name}, cropped": functools.partial(SIDES[name], cropped=True) for name in list(SIDES)[1:]}
LAWS: dict[str, Callable[[Work, str], peers.Law]] = {
    "original": peers.original_law,
    "torchio": functools.partial(peers.torchio_law, interpolation="bspline"),
    "torchio, linear": functools.partial(peers.torchio_law, interpolation="linear"),
    "monai": functools.partial(peers.monai_law, interpolation="spline"),
    "monai, trilinear": functools.partial(peers.monai_law, interpolation="linear"),
}
LAWS |= {f"{name}, cropped": functools.partial(LAWS[name], cropped=True) for name in list(LAWS)[1:]}
SAME = 1e-3  # what a peer's truth may differ from ours: the largest low-resolution value divides both
EXTRA_EPOCHS = (
    3  # the first one, and two with simulated steps; the original, which makes nothing ahead, has one of them
)


# --- fastsrgan ----------------------------------------------------------------------------------------------------


def make_feed(work: Work) -> Feed:
    """The feed as `fastsrgan train --feed-threads N` builds it, N being the workers that the peers have."""
    degradation = Degradation((work.low_res,), work.contrast, work.noise, work.geometry)
    rule = PatchRule(work.patch, work.stride)
    device = pick_device(work.device)
    return Feed(open_store(work.store), degradation, rule, seed=work.seed, device=device, threads=work.workers)


def make_pool(work: Work, residents: list[Resident], epoch: int = 1, group: int = 0) -> Pool:
    """A pool of one group as `fastsrgan train` builds it."""
    return Pool(residents, work.patch, seed=work.seed, epoch=epoch, group=group)


def fastsrgan(work: Work) -> Epochs:
    """Store -> feed -> pool -> gather, the generator's pass of each epoch."""
    feed = make_feed(work)
    size = resident_limit(feed.store, work.names, device=feed.device)
    last = work.epochs + EXTRA_EPOCHS + 1  # the last one is only made ahead, beside the one before as beside any other
    plan = [(e, group) for e in range(1, last + 1) for group in deal(work.names, work.seed, e, size, 0, 1)]
    groups = feed.groups(iter(plan))

    def epoch(number: int, count: int) -> Iterator[Patches]:
        for group in range(count):
            pool = make_pool(work, next(groups), number, group)
            for indices in pool.generator_batches(work.batch):
                batch = pool.gather(indices)
                yield Patches(batch.x, batch.y)

    for number, parts in itertools.groupby(plan, key=lambda p: p[0]):
        yield epoch(number, len(list(parts)))


SIDES[OURS] = fastsrgan


def stream(side: str, work: Work) -> Epochs:
    """The epochs of a side; "PEER of N a visit" takes N patches each time that a volume is made."""
    name, visit = peers.parts(side)
    return SIDES[name](dataclasses.replace(work, patches=min(visit, work.patches)) if visit else work)


# --- comparison ---------------------------------------------------------------------------------------------------


def gate(side: str, work: Work) -> float:
    """How far a peer's patches of one volume are from ours with contrast and noise off; infinite when their truth or
    labels are not of the same place.

    "original": largest difference, relative to the largest value. Others: root mean square of the difference between
    the interpolated images, relative to that of ours.
    """
    plain, name = dataclasses.replace(work, contrast=0.0, noise=0.0), work.names[0]
    pool = make_pool(plain, [make_feed(plain).prepare(1, name)])
    volumes = [torch.from_numpy(np.ascontiguousarray(v)) for v in LAWS[peers.parts(side)[0]](plain, name)]
    origins, p = plain.origins(volumes[1].numpy()), work.patch
    if len(origins) != len(pool):
        return math.inf
    largest, square, power = 0.0, 0.0, 0.0
    for first in range(0, len(pool), work.batch):
        chosen = np.arange(first, min(first + work.batch, len(pool)))
        ours = pool.gather(chosen)
        cuts = [torch.stack([v[i : i + p, j : j + p, k : k + p] for i, j, k in origins[chosen]]) for v in volumes]
        theirs = as_patches(*(cut[:, None] for cut in cuts))
        if side == "original":
            largest = max(largest, _largest(ours.x, theirs.x), _largest(ours.y, theirs.y))
        elif not _largest(ours.y, theirs.y) <= SAME:
            return math.inf
        square += float((ours.x.cpu() - theirs.x).square().sum())
        power += float(ours.x.square().sum())
    return largest if side == "original" else math.sqrt(square / power)


def _largest(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        return math.inf
    error = float((ours.cpu() - theirs).abs().max() / theirs.abs().max())
    return math.inf if math.isnan(error) else error


def check_patches(patches: Patches) -> None:
    """Raise when a batch's label does not lie on its image, or an input is not like its truth.

    The label is where the truth is above a threshold, whatever the contrast, so the two are separable in each patch.
    """
    x, (hr, label) = patches.x[:, 0], patches.y.unbind(1)
    for i in range(len(x)):
        inside = label[i] > 0.5
        if inside.any() and not inside.all() and hr[i][inside].min() < hr[i][~inside].max():
            raise AssertionError(f"patch {i}: label and image are not of one place")
        if inside.any() and torch.corrcoef(torch.stack([x[i].flatten(), hr[i].flatten()]))[0, 1] < 0.5:
            raise AssertionError(f"patch {i}: input and truth are not of one place")


# --- measuring ----------------------------------------------------------------------------------------------------


def consume(epoch: Iterator[Patches], work: Work, step_seconds: float = 0.0) -> dict[str, Any]:
    """Take every batch of an epoch, with a pause for the simulated step after each."""
    count, steps, waited = 0, 0, 0.0
    began = asked = time.perf_counter()
    for patches in epoch:
        waited += time.perf_counter() - asked
        n = len(patches.x)
        if n > work.batch or patches.x.shape != (n, 1, *(work.patch,) * 3) or patches.y.shape[:2] != (n, 2):
            raise AssertionError(f"batches are {tuple(patches.x.shape)} and {tuple(patches.y.shape)}")
        count, steps = count + n, steps + 1
        if step_seconds:
            time.sleep(step_seconds)
        del patches
        asked = time.perf_counter()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return {"patches": count, "seconds": time.perf_counter() - began, "waited": waited, "steps": steps}


def forget_files(work: Work) -> None:
    """Ask the operating system to drop what it keeps of the inputs in memory, as before a first epoch."""
    paths = [Path(p) for name in work.names for p in (work.image(name), work.label(name))]
    for path in [*paths, *(p for p in Path(work.store).rglob("*") if p.is_file())]:
        descriptor = os.open(path, os.O_RDONLY)
        os.read(descriptor, 1)  # now, not counted: the first read of a new file dirties a page, for its access time
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(side: str, work: Work, memory: bool = True) -> dict[str, Any]:
    """All epochs of a side: times, bytes written and waiting; in the first epoch with simulated steps a parent may look
    at memory.

    The first epoch begins with nothing in memory and includes building the loaders; ``seconds`` are those after it:
    two, and as many more up to ``work.epochs`` as begin before ``work.limit`` seconds are over.
    """
    torch.set_num_threads(work.threads)
    tune_allocator()
    if package := peers.NEEDS.get(peers.parts(side)[0]):
        __import__(package)
    gc.collect()
    base = tree_memory(os.getpid())
    forget_files(work)
    watch, before = FolderWatch({tempfile.gettempdir(), os.getcwd()}), written()
    began = time.perf_counter()
    epochs = stream(side, work)
    cold = consume(_checked(next(epochs)), work)
    cold_seconds = time.perf_counter() - began
    steady, cpu = [], []
    for done in range(work.epochs):
        if done >= 2 and sum(epoch["seconds"] for epoch in steady) > work.limit:
            break
        cpu.append(tree_cpu_seconds(os.getpid()))
        steady.append(consume(next(epochs), work))
        cpu[-1] = tree_cpu_seconds(os.getpid()) - cpu[-1]
    # What is made ahead is made during the epoch before, so that one has the simulated steps too.
    looks = (memory,) if side == "original" else (memory, False)
    for look in looks:
        if look:
            print(json.dumps({"look": True}), flush=True)
        wait = consume(next(epochs), work, work.step_ms / 1e3)
        if look:
            print(json.dumps({"look": False}), flush=True)
    after, left = written(), watch.changed()
    return {
        "patches": steady[0]["patches"],
        "cold_seconds": cold_seconds,
        "cold_patches": cold["patches"],
        "seconds": [epoch["seconds"] for epoch in steady],
        "cpu_seconds": cpu,
        "wait": {**wait, "share": wait["waited"] / max(wait["seconds"], 1e-9)},
        "disk_bytes": after["disk"] - before["disk"],
        "call_bytes": after["calls"] - before["calls"],
        "files_left": {str(path): size for path, size in left.items()},
        "epochs": 1 + len(steady) + len(looks),
        "base_bytes": base,
    }


def _checked(epoch: Iterator[Patches]) -> Iterator[Patches]:
    for number, patches in enumerate(epoch):
        if number == 0:
            check_patches(patches)
        yield patches


def main() -> int:
    """The command line of a child."""
    side, told = sys.argv[1:]
    facts = json.loads(told)
    memory = facts.pop("memory")
    facts = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
    print(json.dumps(measure(side, Work(**facts), memory)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
