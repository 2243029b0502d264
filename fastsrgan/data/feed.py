"""From the store to degraded volumes in memory: read, orient, degrade and place patches, ahead of the training step.

Subjects of an epoch come in a keyed order, dealt to the ranks, in groups that fit in memory; threads prepare the next
groups, across the ends of epochs, while one is trained on. Nothing is written to disk. ``fastsrgan.data.dali`` moves
the volumes where DALI is used (docs/decisions/012-dali-feed.md); both ways give the same bits on a CPU.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch

from fastsrgan.core.draws import rng
from fastsrgan.core.system import free_memory
from fastsrgan.core.threads import Crew, Job, unwatched
from fastsrgan.data import dali as dali_feed
from fastsrgan.data.pool import Resident
from fastsrgan.data.subject import Law, Moved, Mover, PatchRule, make_resident, move_by_thread
from fastsrgan.data.visit import Visits
from fastsrgan.errors import InputError, ResourceError, UsageError, counted
from fastsrgan.model.arithmetic import TYPES
from fastsrgan.observation.model import Degradation
from fastsrgan.observation.slice_axis import Axes, stored_draw
from fastsrgan.store.files import local_path
from fastsrgan.store.reader import Store, Subject

log = logging.getLogger("fastsrgan")

ENGINES = ("auto", "dali", "threads")
MOST_THREADS = 8  # of a feed: from there on memory bandwidth is the limit
PATIENCE = 25.0  # seconds that preparing a volume of up to PATIENT_VOXELS may take, in proportion for larger ones
PATIENT_VOXELS = 5e7
TRIALS = 3  # timed volumes of each mover, of which the best counts


# --- which subjects, when -----------------------------------------------------------------------------------------


def deal(subjects: list[str], seed: int, epoch: int, size: int, rank: int, world: int) -> list[list[str]]:
    """The groups of one rank in one epoch: at most ``size`` subjects each, equally many groups on every rank.

    All ranks deal the same keyed permutation like cards, so each subject comes once in the epoch; what a subject looks
    like depends on neither rank nor world. A group has as many subjects on every rank, or one more. With
    groups of one subject and a number that ``world`` does not divide, those left over wait for another epoch.

    Raises UsageError when there are more ranks than subjects.
    """
    if world > len(subjects):
        hint = "start at most as many processes as there are Train subjects"
        raise UsageError("training ranks", f"{world} processes for {counted(len(subjects), 'subject')}", hint)
    order = [subjects[i] for i in rng(seed, epoch, "subjects").permutation(len(subjects))]
    least = len(order) // world
    count = min(-(-len(order) // (world * size)), least)
    own = order[rank::world]
    if -(-len(own) // count) > size:
        own = own[:least]
    return [list(group) for group in np.array_split(np.asarray(own, object), count)]


def resident_limit(
    store: Store,
    subjects: list[str],
    budget_bytes: int | None = None,
    *,
    device: torch.device | None = None,
    precision: str = "auto",
    prefetch: int = 1,
    patch: int = 0,
    visits: Visits | None = None,
) -> int:
    """How many of the subjects may be resident at once: a group in use and ``prefetch`` groups being made fit.

    ``patch`` : edge of the patches, where residents are kept to the part in which these lie; 0: they are whole
    ``visits`` : made images may be larger than what they are made of

    The budget is 40 % of what is free now unless given: of the device's memory on CUDA, else of the machine's, shared
    by the ranks that run on it.
    """
    device = device or torch.device("cpu")
    if budget_bytes is None:
        budget_bytes = int(0.4 * share_of_memory(device))
    each = 2 * pick_dtype(precision, device).itemsize
    settings = (visits or Visits()).settings
    largest = max(
        resident_voxels(s, patch) * (each + 1 + s.has_mask) * (settings.growth if s.has_tissues else 1.0)
        for s in (store.subject(name) for name in subjects)
    )
    fitting = int(budget_bytes // ((1 + prefetch) * largest))
    if not fitting:
        told = "resident volumes need %.2f GB, %.2f GB are allowed: one subject at a time"
        log.warning(told, (1 + prefetch) * largest / 1e9, budget_bytes / 1e9)
    return max(1, min(len(subjects), fitting))


def resident_voxels(subject: Subject, patch: int) -> int:
    """Voxels of a subject that are kept, at most: all of them where ``patch`` is 0 or the store names no box."""
    # Of an image with values below 0 nothing is air.
    lowest = (subject.attrs.get("intensity") or {}).get("min", 0)
    box = subject.attrs.get("bounding_box") if patch and lowest >= 0 else None
    sizes = [high - low for low, high in box] if box else subject.shape
    return math.prod(max(size, min(patch, n)) for size, n in zip(sizes, subject.shape, strict=True))


def share_of_memory(device: torch.device) -> int:
    """Bytes that this process may count on: free on its CUDA device, or its share of what is free on the machine."""
    return free_memory(device) // (1 if device.type == "cuda" else local_ranks())


def local_ranks() -> int:
    """Processes of this run on this machine, as torchrun says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# --- settings -----------------------------------------------------------------------------------------------------


def pick_threads(threads: int = 0) -> int:
    """``threads``; 0 is one core less than this rank's share of the machine, at least 1 and at most 8."""
    if threads:
        return threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // local_ranks() - 1))


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of resident intensities. "auto" is fp16 on CUDA, 11 bits of a number up to about 1, and fp32 on a CPU."""
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    if precision not in TYPES:
        raise UsageError("pool_precision", f"{precision!r} is not allowed", f"auto or one of {', '.join(TYPES)}")
    return TYPES[precision]


def pick_mover(engine: str, device: torch.device, volumes: int = 1) -> Mover:
    """What degrades volumes and brings them to the device, ``volumes`` at a time.

    "auto": on a CPU threads, since DALI has nothing to move there and costs copies (docs/decisions/012-dali-feed.md).
    On CUDA devices where DALI is installed, the faster of the two on the run's own first volumes (``Measured``), else
    threads. Raises ResourceError when DALI is asked for and cannot be used.
    """
    if engine not in ENGINES:
        raise UsageError("feed", f"{engine!r} is not allowed", f"one of {', '.join(ENGINES)}")
    threads = functools.partial(move_by_thread, device=device)
    if engine == "threads" or (engine == "auto" and device.type == "cpu"):
        return threads
    try:
        dali = dali_feed.DaliMover(device, volumes)
    except ResourceError as error:
        if engine == "dali":
            raise
        log.info("%s: threads move the volumes", error)
        return threads
    return dali if engine == "dali" else Measured({"threads": threads, "dali": dali}, device)


class Measured:
    """Moves volumes by each of several movers in turn, then by the one that took least time per voxel.

    All of them call the same law on the same tensors, so what a volume becomes does not depend on the choice.
    """

    def __init__(self, movers: dict[str, Mover], device: torch.device) -> None:
        self.movers, self.device = movers, device
        self.chosen: str | None = None
        self._begun = dict.fromkeys(movers, 0)
        self._seconds: dict[str, list[float]] = {name: [] for name in movers}
        self._lock = threading.Lock()

    def __call__(self, image: np.ndarray, label: np.ndarray, mask: np.ndarray | None, law: Law) -> Moved:
        with self._lock:
            name = self.chosen or min(self._begun, key=lambda one: self._begun[one])
            self._begun[name] += 1
        if self.chosen:
            return self.movers[name](image, label, mask, law)
        began = time.perf_counter()
        moved = self.movers[name](image, label, mask, law)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self._judge(name, (time.perf_counter() - began) / image.size)
        return moved

    def _judge(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name].append(seconds)
            # The first volume of each also makes pipelines, tables and room in memory.
            if self.chosen or min(map(len, self._seconds.values())) <= TRIALS:
                return
            least = {one: min(times[1:]) for one, times in self._seconds.items()}
            self.chosen = min(least, key=lambda one: least[one])
        told = ", ".join(f"{one} {1e9 * value:.3g}" for one, value in least.items())
        log.info("feed: %s from here on (ns per voxel: %s)", self.chosen, told)


# --- the feed -----------------------------------------------------------------------------------------------------


class Feed:
    """Groups of residents, prepared ahead by threads.

    A subject that cannot be read is left out of the run with a warning (``strict``: raised).

    Parameters
    ----------
    rank, world : of the training processes; the plan given to ``groups`` is this rank's (``deal``)
    engine : "dali", "threads" or "auto" (``pick_mover``)
    threads : that read and degrade, 0 is automatic; prefetch : groups made ahead of the one in use
    precision : of resident intensities, "fp32", "fp16", "bf16" or "auto" (``pick_dtype``); labels are uint8
    patience : seconds that one volume may take before its worker counts as hung, more for very large ones
    visits : which visits show an image made of the subject's tissues
    axes : world axes that the low resolution's numbers are along; None: each subject's stored ones

    Attributes
    ----------
    first_wait : seconds until the first group was there, which nothing can hide
    waited : seconds that the caller waited for all groups after it
    quarantined : subject -> why it is left out
    """

    def __init__(
        self,
        store: Store,
        degradation: Degradation,
        rule: PatchRule,
        *,
        seed: int,
        device: torch.device,
        strict: bool = False,
        rank: int = 0,
        world: int = 1,
        engine: str = "auto",
        threads: int = 0,
        prefetch: int = 1,
        precision: str = "auto",
        patience: float = PATIENCE,
        visits: Visits | None = None,
        axes: Axes | None = None,
    ) -> None:
        if prefetch < 1:
            raise UsageError("prefetch", f"{prefetch} is not allowed", "1 or more groups")
        self.store, self.degradation, self.rule = store, degradation, rule
        self.seed, self.device, self.strict, self.axes = seed, device, strict, axes
        self.visits = visits or Visits()
        self.rank, self.world = rank, world
        self.threads, self.prefetch, self.patience = pick_threads(threads), prefetch, patience
        self.dtype = pick_dtype(precision, device)
        self.move = pick_mover(engine, device, self.threads)
        self.first_wait = self.waited = 0.0
        self.quarantined: dict[str, str] = {}
        self._cuda = device.type == "cuda"

    def prepare(self, epoch: int, subject: str) -> Resident:
        """One subject as it is in one epoch, in the memory of the device."""
        draw = self.degradation.draw(self.seed, epoch, subject)
        # A stream of this thread's own: what it queues waits neither for the training step nor for the volumes of other
        # threads, and holds none of them up. It is also on the right GPU, which a new thread does not know.
        with torch.cuda.stream(torch.cuda.Stream(self.device)) if self._cuda else contextlib.nullcontext():
            # Object storage bounds and repeats its requests itself, and names what it gave up (fastsrgan.store.remote).
            with unwatched() if local_path(self.store.url) is None else contextlib.nullcontext():
                stored = self.store.read(subject)
            sample = self.visits.of(stored, (self.seed, epoch, subject), self.device)
            law, rule, draw = self.degradation, self.rule, stored_draw(draw, self.axes, sample.affine)
            return make_resident(sample, law, draw, rule, self.device, dtype=self.dtype, move=self.move, crop=True)

    def groups(self, plan: Iterator[tuple[int, list[str]]]) -> Iterator[list[Resident]]:
        """Residents for each (epoch, subjects) of ``plan``, the next ``prefetch`` groups in work meanwhile.

        Raises ResourceError, naming the subject, when a worker fails or hangs.
        """
        crew, plan, first = Crew(self.threads), iter(plan), True
        ahead: collections.deque[list[tuple[str, Job[Resident]]]] = collections.deque()

        def look_ahead(groups: int) -> None:
            for epoch, group in itertools.islice(plan, groups - len(ahead)):
                ahead.append([(name, self._submit(crew, epoch, name)) for name in group])

        try:
            look_ahead(1 + self.prefetch)
            while ahead:
                residents = self._take(crew, ahead.popleft(), first)
                first = False
                look_ahead(self.prefetch)
                yield residents
                if self._cuda:
                    # What the caller queued may still read the group that is about to be freed.
                    torch.cuda.current_stream(self.device).synchronize()
                del residents
        finally:
            crew.close()

    def _submit(self, crew: Crew, epoch: int, name: str) -> Job[Resident]:
        voxels = 0.0
        with contextlib.suppress(InputError):  # a subject that the store does not have: reading it says so
            voxels = float(np.prod(self.store.subject(name).shape))
        allowed = self.patience * max(1.0, voxels / PATIENT_VOXELS)
        return crew.submit(name, functools.partial(self.prepare, epoch, name), allowed)

    def _take(self, crew: Crew, jobs: list[tuple[str, Job[Resident]]], first: bool) -> list[Resident]:
        began, residents = time.perf_counter(), []
        try:
            for name, job in jobs:
                if name in self.quarantined:
                    continue
                try:
                    residents.append(crew.result(job))
                except InputError as error:
                    if self.strict:
                        raise
                    self.quarantined[name] = str(error)
                    log.warning("subject %s is left out: %s", name, error)
            return residents
        finally:
            seconds = time.perf_counter() - began
            if first:
                self.first_wait += seconds
            else:
                self.waited += seconds
