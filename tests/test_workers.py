"""Jobs on the cores of a CPU: all done, one core each, errors told, and bits that no number of threads changes."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsrgan.core import threads as core_threads
from fastsrgan.core.threads import CACHED, Job, each_piece, one_thread, run_each, unwatched
from fastsrgan.errors import InputError
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


def test_one_thread_ends_where_it_was_even_after_an_error(threads):
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        _ = 1 // 0
    assert torch.get_num_threads() == threads


def test_each_piece_is_short_and_every_value_is_in_one_of_them(threads):
    size = 16 * CACHED * 2 + CACHED + 5
    counts, other, lengths = torch.zeros(size), torch.arange(float(size)), []

    def visit(piece: torch.Tensor, beside: torch.Tensor) -> None:
        piece += 1
        beside -= 1
        lengths.append((len(piece), len(beside)))

    each_piece(visit, counts.view(-1, 1), other)
    assert (counts == 1).all() and torch.equal(other, torch.arange(float(size)) - 1)
    assert sorted(set(lengths)) == [(5, 5), (CACHED, CACHED)] and len(lengths) == 34


def test_the_clock_of_a_job_stands_still_while_it_waits_and_counts_all_else(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(core_threads, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def call() -> float:
        now[0] += 3
        with unwatched():
            assert job.began is None
            now[0] += 50
        now[0] += 2
        assert job.began is not None and not job.done.is_set()
        return now[0] - job.began

    job = Job("a", call, 9.0)
    job.run()
    began = job.began
    with unwatched():  # of no job
        assert job.began == began
    assert job.done.is_set() and job.take() == 5.0 and job.take() is None


def test_an_error_of_our_own_is_raised_as_it_is():
    error = InputError("a", "is damaged", "copy it again")

    def call() -> None:
        raise error

    job: Job[None] = Job("b", call, 9.0)
    job.run()
    with pytest.raises(InputError) as found:
        job.take()
    assert found.value is error
