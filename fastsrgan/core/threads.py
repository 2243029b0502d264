"""Threads that work ahead of the one who needs the results, and a watch over those that hang.

Threads, not processes: reading, decompression and products all release the interpreter lock, arrays come back without
a copy, and /dev/shm is not needed. They are daemons, so one that hangs cannot keep the process from ending.

Array work on the cores of a CPU: jobs that are cut beforehand, each done by one thread alone.

torch and BLAS split every operation over all cores and wait for the last, spinning. Beside a training step that has the
cores too, one operation of a millisecond then takes a time slice of the system, and where the split falls shows in the
last bits. Jobs cut by the caller cost no waiting, and their bits are the same for any number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from fastsrgan.errors import FastsrganError, ResourceError, out_of_memory

T = TypeVar("T")

POLL = 1.0  # seconds between two looks at the threads while waiting
CACHED = 24576  # voxels worked on at a time by one core; torch splits operations from 32768 on
FAREWELL = 3.0  # seconds that closing a crew waits for what its threads are about


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operations in this Python thread run on one core.

    The last bits of a matrix product depend on how many threads share it. What must be the same on every machine and
    for any number of ranks is computed by one.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_mine = threading.local()  # the job of each thread


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """The clock of this thread's job stands still: it waits for another job, or for what is bounded elsewhere."""
    job: Job | None = getattr(_mine, "job", None)
    spent = 0.0
    if job is not None and job.began is not None:
        spent, job.began = time.monotonic() - job.began, None
    try:
        yield
    finally:
        if job is not None:
            job.began = time.monotonic() - spent


class Job(Generic[T]):
    """A call that a crew makes: ``what`` it is about, and for how many seconds it may run."""

    def __init__(self, what: str, call: Callable[[], T], allowed: float) -> None:
        self.what, self.allowed = what, allowed
        self.began: float | None = None
        self.done = threading.Event()
        self._call: Callable[[], T] | None = call
        self._outcome: tuple[T | None, BaseException | None] = (None, None)

    def run(self) -> None:
        """Make the call and keep what it returned or raised."""
        assert self._call is not None
        _mine.job, self.began = self, time.monotonic()
        try:
            self._outcome = (self._call(), None)
        except BaseException as error:  # also SystemExit, which would end a thread without a word
            self._outcome = (None, error)
        finally:
            self._call = _mine.job = None
            self.done.set()

    def take(self) -> T:
        """The result, once; raises what the call raised: other than a FastsrganError it is named as a ResourceError."""
        result, error = self._outcome
        self._outcome = (None, None)
        if error is None:
            return result  # type: ignore[return-value]
        if isinstance(error, FastsrganError):
            raise error
        if out_of_memory(error):
            reason = "no memory to prepare it"
            raise ResourceError(self.what, reason, "lower resident_memory, prefetch or feed_threads") from error
        words = " ".join(str(error).split())[:200]
        reason = f"the worker that prepared it failed: {type(error).__name__}{': ' * bool(words)}{words}"
        raise ResourceError(self.what, reason, "--debug shows where") from error


class Crew:
    """``threads`` daemon threads that take jobs in the order in which they were submitted."""

    def __init__(self, threads: int, name: str = "feed") -> None:
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._running: dict[int, Job] = {}
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int) -> None:
        while (job := self._queue.get()) is not None:
            self._running[number] = job
            job.run()
            del self._running[number], job  # keeps no result alive

    def submit(self, what: str, call: Callable[[], T], allowed: float = float("inf")) -> Job[T]:
        """Queue a call that may run for ``allowed`` seconds."""
        job = Job(what, call, allowed)
        self._queue.put(job)
        return job

    def result(self, job: Job[T]) -> T:
        """Wait for a job. Raises what ``Job.take`` raises, and ResourceError when any job runs longer than it may."""
        while not job.done.wait(min(POLL, job.allowed / 4)):
            now = time.monotonic()
            for other in list(self._running.values()):
                began = other.began
                if began is not None and now - began > other.allowed and not other.done.is_set():
                    reason = f"the worker that prepares it has not ended within {other.allowed:g} s"
                    hint = "is the store's disk or network stuck? --resume goes on from the last snapshot"
                    raise ResourceError(other.what, reason, hint)
        return job.take()

    def close(self) -> None:
        """Forget the jobs that have not begun; wait a little for the ones that have.

        A thread within native code when the interpreter ends can take the process down, a thread that hangs cannot.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + FAREWELL
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


_pools: dict[int, ThreadPoolExecutor] = {}
_making = threading.Lock()
os.register_at_fork(after_in_child=_pools.clear)  # threads do not follow into a forked process


def run_each(jobs: Iterable[Callable[[], object]]) -> None:
    """Call every job, on as many threads as torch has in the calling one; inside a job, torch and BLAS have one.

    Jobs are in inference mode, and know gradients, where the caller does. An exception of a job is raised when all
    before it have ended.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        for job in jobs:
            job()
        return
    call = functools.partial(_in_modes, torch.is_inference_mode_enabled(), torch.is_grad_enabled())
    for _ in _pool(threads).map(call, jobs):
        pass


def each_piece(function: Callable[..., object], *tensors: torch.Tensor) -> None:
    """Call ``function`` with flat views of contiguous tensors of one size: on a CPU with pieces short enough to stay in
    the cache from one operation to the next, on all cores, in any order; on an accelerator with the whole."""
    flat = [t.view(-1) for t in tensors]
    if flat[0].device.type != "cpu":
        function(*flat)
        return

    def job(first: int) -> None:
        for start in range(first, min(first + 16 * CACHED, len(flat[0])), CACHED):
            function(*(f[start : start + CACHED] for f in flat))

    run_each(functools.partial(job, first) for first in range(0, len(flat[0]), 16 * CACHED))


def _in_modes(inference: bool, grad: bool, job: Callable[[], object]) -> None:
    """A thread of its own has torch's modes of its own: what the caller made in its mode can be written in it only."""
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        job()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _making:
        if threads not in _pools:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="worker")
            ready = threading.Barrier(threads)
            for _ in pool.map(_on_one_core, [ready] * threads):
                pass
            # The number that a thread sets is also what threads born later start with.
            torch.set_num_threads(threads)
            _pools[threads] = pool
    return _pools[threads]


def _on_one_core(ready: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first question sets its number to the default
    torch.set_num_threads(1)
    ready.wait()
