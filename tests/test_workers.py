"""Jobs on the cores of a CPU: all done, one core each, errors told, and bits that no number of threads changes."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from fastsrgan.core import threads as core_threads
from fastsrgan.core.threads import run_each
from fastsrgan.observation.model import degrade


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_job_is_done_once_on_one_core_and_the_caller_keeps_its_cores(threads):
    seen: list[tuple[int, int, str]] = []

    def job(number: int) -> None:
        seen.append((number, torch.get_num_threads(), threading.current_thread().name))

    run_each(lambda n=n: job(n) for n in range(40))
    assert sorted(n for n, _, _ in seen) == list(range(40))
    assert {cores for _, cores, _ in seen} == {1}
    assert len({name for _, _, name in seen}) <= threads
    assert torch.get_num_threads() == threads
    born: list[int] = []
    thread = threading.Thread(target=lambda: born.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert born == [threads]


def test_jobs_of_jobs_are_done_and_errors_are_raised(threads):
    done: list[int] = []
    run_each(lambda: run_each(lambda n=n: done.append(n) for n in range(3)) for _ in range(5))
    assert sorted(done) == sorted([0, 1, 2] * 5)
    with pytest.raises(ZeroDivisionError):
        run_each(lambda: 1 // 0 for _ in range(5))
    run_each(lambda: done.clear() for _ in range(2))
    assert not done


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_jobs_are_in_the_mode_of_their_caller(threads, mode):
    """Slabs of a volume, interpolated in inference mode, ended in RuntimeError on more than one core."""
    with mode():
        out = torch.zeros(4, 3)
        wanted = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        seen: list[tuple[bool, bool]] = []
        run_each(lambda n=n: torch.mm(torch.ones(1, 3), torch.eye(3), out=out[n : n + 1]) for n in range(4))
        run_each(lambda: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled())) for _ in range(4))
        assert out.sum() == 12 and set(seen) == {wanted}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_workers_of_its_own():
    pools = dict(core_threads._pools)
    child = os.fork()
    if not child:
        os._exit(len(core_threads._pools))
    assert os.waitpid(child, 0)[1] == 0 and core_threads._pools == pools


def test_bits_do_not_depend_on_the_number_of_threads():
    hr = np.random.default_rng(0).random((67, 93, 71), dtype=np.float32) * 900
    settings = {"power": 1.3, "noise": 0.03, "rician": True, "bias_field": 0.3, "motion": 0.4, "key": 3}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            done = degrade(hr, (1, 1, 1), (1.2, 2, 3.3), **settings)
            results.append((done.low_res, done.interpolated, done.hr))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
