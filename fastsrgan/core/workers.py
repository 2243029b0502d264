"""Array work on the cores of a CPU: jobs that are cut beforehand, each done by one thread alone.

torch and BLAS split every operation over all cores and wait for the last, spinning. Beside a training step that has the
cores too, one operation of a millisecond then takes a time slice of the system, and where the split falls shows in the
last bits. Jobs cut by the caller cost no waiting, and their bits are the same for any number of threads.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
os.register_at_fork(after_in_child=_pools.clear)  # threads do not follow into a forked process


def run(jobs: Iterable[Callable[[], object]]) -> None:
    """Call every job, on as many threads as torch has in the calling one; inside a job, torch and BLAS have one.

    Jobs are in inference mode, and know gradients, where the caller does. An exception of a job is raised when all
    before it have ended.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        for job in jobs:
            job()
        return
    call = functools.partial(_call, torch.is_inference_mode_enabled(), torch.is_grad_enabled())
    for _ in _pool(threads).map(call, jobs):
        pass


def _call(inference: bool, grad: bool, job: Callable[[], object]) -> None:
    """A thread of its own has torch's modes of its own: what the caller made in its mode can be written in it only."""
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        job()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="worker")
            ready = threading.Barrier(threads)
            for _ in pool.map(_alone, [ready] * threads):
                pass
            # The number that a thread sets is also what threads born later start with.
            torch.set_num_threads(threads)
            _pools[threads] = pool
    return _pools[threads]


def _alone(ready: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first question sets its number to the default
    torch.set_num_threads(1)
    ready.wait()
