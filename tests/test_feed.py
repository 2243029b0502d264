"""Feed: DALI and threads give the same bits, on any number of cores and ranks; prefetch, memory and waiting."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import logging
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from feed_store import CPU, DRAWN, RULE, SHAPES, Pipeline, digest, epochs_of_rank, make_feed, make_store, names
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_ranks

from fastsrgan.core import system
from fastsrgan.core.threads import Crew, one_thread
from fastsrgan.data import dali as dali_feed
from fastsrgan.data import feed
from fastsrgan.data.feed import deal, pick_dtype, pick_mover, pick_threads, resident_limit
from fastsrgan.data.subject import PatchRule, make_resident, move_by_thread
from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.model.arithmetic import TYPES
from fastsrgan.observation.model import Degradation, Degraded
from fastsrgan.store.reader import Store

DEGRADATIONS = {
    "fixed": Degradation(((1.0, 1.0, 3.0),)),
    "drawn": DRAWN,
    "sagittal": Degradation(((3.0, 1.0, 1.0),), noise=0.0),
    "extras": Degradation(((1.0, 1.0, 3.0),), rician=True, profile=0.2, artefacts={"bias_field": 0.3, "motion": 1.0}),
    "blocks": Degradation(((1.0, 1.0, 3.0),), block_bytes=400_000),
    "segsrgan": Degradation(((1.0, 1.0, 2.6),), geometry="segsrgan"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("feed"))


@pytest.fixture
def dali() -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")


# --- DALI ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(DEGRADATIONS))
def test_dali_and_threads_give_the_same_bits(store, dali, kind):
    """Several subjects and epochs, odd sizes, extras off and on, any number of threads."""
    plan = [(e, g) for e in (1, 2) for g in deal(names(store), 3, e, 2, 0, 1)]
    found = {}
    for engine, threads in (("threads", 1), ("dali", 3)):
        made = make_feed(store, DEGRADATIONS[kind], engine=engine, threads=threads)
        found[engine, threads] = [[(r.subject, digest(r)) for r in group] for group in made.groups(iter(plan))]
    assert all(value == found["threads", 1] for value in found.values())
    assert [[name for name, _ in group] for group in found["dali", 3]] == [group for _, group in plan]
    firsts = dict(pair for group in found["dali", 3][:3] for pair in group)
    assert not set(firsts.values()) & {bits for group in found["dali", 3][3:] for _, bits in group}


def test_volumes_leave_dali_without_a_copy_and_stay(store, dali):
    mover, outputs = dali_feed.DaliMover(CPU), []
    pipeline = mover._idle.queue[-1][0]
    run = pipeline.run
    pipeline.run = lambda: outputs.append(run()) or outputs[-1]
    sample, d = store.read("e"), DEGRADATIONS["fixed"]
    resident = make_resident(sample, d, d.draw(0, 1, "e"), RULE, CPU, move=mover)
    theirs = [np.asarray(out[0]) for out in outputs[0]]
    for mine, its in zip((resident.interpolated, resident.hr, resident.label), theirs, strict=False):
        assert mine.data_ptr() == its.ctypes.data
    before = resident.hr[3, 4, 5].item()
    resident.hr[3, 4, 5] = 77
    assert theirs[1][3, 4, 5] == 77
    resident.hr[3, 4, 5] = before
    bits = digest(resident)
    del theirs, outputs[:]
    for epoch in range(2, 8):  # as many volumes as DALI could have buffers
        make_resident(sample, d, d.draw(0, epoch, "e"), RULE, CPU, move=mover)
    assert digest(resident) == bits


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["threads", "dali"])
@pytest.mark.parametrize("kind", ["drawn", "extras"])
def test_a_gpu_gets_the_same_volumes(store, dali, engine, kind):
    """Sums in another order, so the last bits differ; labels and places of patches do not."""
    device = torch.device("cuda", torch.cuda.current_device())
    plan = [(e, g) for e in (1, 2) for g in deal(names(store), 3, e, 2, 0, 1)]
    expected = make_feed(store, DEGRADATIONS[kind])
    made = make_feed(store, DEGRADATIONS[kind], engine=engine, device=device, precision="fp32", threads=3)
    for (epoch, _), group in zip(plan, made.groups(iter(plan)), strict=True):
        for r in group:
            exact = expected.prepare(epoch, r.subject)
            assert r.hr.device == r.label.device == device
            for got, want in ((r.hr, exact.hr), (r.interpolated, exact.interpolated)):
                assert (got.cpu() - want).abs().max() <= 2e-5  # not measured: needs a CUDA device
            assert torch.equal(r.label.cpu(), exact.label) and np.array_equal(r.origins, exact.origins)


def test_a_pipeline_goes_with_its_feed(store, dali):
    made = make_feed(store, engine="dali")
    made.prepare(1, "a")
    gone = weakref.ref(made.move._idle.queue[-1][0])
    del made
    gc.collect()
    assert gone() is None


def broken(monkeypatch, error: Exception) -> None:
    def absent(name: str, real=importlib.import_module):
        if name.startswith("nvidia.dali"):
            raise error
        return real(name)

    monkeypatch.setattr(dali_feed.importlib, "import_module", absent)


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'nvidia.dali'"), RuntimeError("old driver")])
def test_dali_that_is_asked_for_and_cannot_be_used_is_an_error(monkeypatch, caplog, error):
    broken(monkeypatch, error)
    with pytest.raises(ResourceError, match=r"DALI: cannot be used here: .* \(pip install 'fastsrgan\[cuda13\]'"):
        pick_mover("dali", CPU)
    assert pick_mover("auto", CPU).func is move_by_thread and not caplog.records
    if not torch.cuda.is_available():
        with caplog.at_level(logging.INFO, "fastsrgan"):
            assert pick_mover("auto", torch.device("cuda")).func is move_by_thread
        assert "threads move the volumes" in caplog.text


def test_engines(dali):
    assert pick_mover("auto", CPU).func is pick_mover("threads", CPU).func is move_by_thread
    assert isinstance(pick_mover("dali", CPU), dali_feed.DaliMover)
    with pytest.raises(UsageError, match="feed: 'dalli'"):
        pick_mover("dalli", CPU)


def test_several_volumes_go_through_dali_at_a_time(monkeypatch):
    """Three laws that wait for each other: with one volume at a time they would wait for ever."""
    monkeypatch.setattr(dali_feed, "define", Pipeline)
    mover, together = dali_feed.DaliMover(CPU, 3), threading.Barrier(3)

    def law(image):
        together.wait(100)
        return Degraded(image, image + 1, image + 2, 1.0, (1.0, 1.0, 1.0))

    def move(value: int) -> tuple:
        image = np.full((3, 4, 5), value, np.float32)
        return mover(image, image.astype(np.uint8), None, law)

    with ThreadPoolExecutor(3) as crew:
        moved = list(crew.map(move, range(6)))
    assert [(float(z.mean()), float(x.mean()), int(label.max())) for z, x, label, _ in moved] == [
        (v + 1, v + 2, v) for v in range(6)
    ]
    assert len([p for p in mover._idle.queue if p is not None]) == 3 and not mover.busy


def test_no_worker_turns_a_switch_that_is_one_for_all_threads(monkeypatch):
    """The precision of products is global: a worker that turned it would change the step that runs meanwhile."""
    monkeypatch.setattr(dali_feed, "define", Pipeline)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: pytest.fail("turned by a worker"))
    image = np.ones((4, 4, 4), np.float32)
    seen = []

    def law(array):
        seen.append(torch.get_float32_matmul_precision())
        return Degraded(array, array, array, 1.0, (1.0, 1.0, 1.0))

    dali_feed.DaliMover(CPU)(image, image.astype(np.uint8), None, law)
    assert seen == [torch.get_float32_matmul_precision()]


@pytest.mark.parametrize("faster", ["threads", "dali"])
def test_auto_on_a_gpu_takes_what_was_faster_on_the_first_volumes(monkeypatch, faster):
    moved, clock = [], [0.0]

    def mover(name: str):
        def move(image, label, mask, law):
            moved.append(name)
            lucky = name != faster and moved.count(name) == 1  # the first volume of each says nothing
            clock[0] += 1.0 if name == faster else 0.5 if lucky else 2.0
            return law(image)

        return move

    monkeypatch.setattr(feed.time, "perf_counter", lambda: clock[0])
    both = feed.Measured({name: mover(name) for name in ("threads", "dali")}, CPU)
    image = np.zeros((2, 3, 4), np.float32)
    results = [both(image, image, None, lambda array: array) for _ in range(12)]
    assert len(results) == 12 and both.chosen == faster
    assert Counter(moved[:8]) == {"threads": 4, "dali": 4} and set(moved[8:]) == {faster}


# --- bits ---------------------------------------------------------------------------------------------------------


def test_residents_do_not_depend_on_the_number_of_cores(store):
    """Products shared by three threads differ from those of one in the last bits at just these sizes."""
    d, found, before = DEGRADATIONS["fixed"], set(), torch.get_num_threads()
    try:
        for cores in (1, 2, 3, 4, 7):
            torch.set_num_threads(cores)
            found.add(digest(make_resident(store.read("e"), d, d.draw(0, 1, "e"), RULE, CPU)))
            assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_one_thread_is_for_the_thread_that_asks():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside, go, seen = threading.Event(), threading.Event(), []

        def other() -> None:
            with one_thread():
                seen.append(torch.get_num_threads())
                inside.set()
                go.wait(240)
            seen.append(torch.get_num_threads())

        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(240) and torch.get_num_threads() == 3
        go.set()
        thread.join()
        assert seen == [1, 3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_subjects_have_the_same_bits_on_any_number_of_ranks(store, tmp_path, world):
    """Real processes, each with another number of cores to use."""
    folder = str(store.url).removeprefix("file://").removesuffix("/store")
    alone = epochs_of_rank(folder, 0, 1, 5)
    expected = [dict(pair for group in epoch for pair in group) for epoch in alone]
    found = [json.loads(json.dumps(f)) for f in on_ranks(rank_of_environment, world, folder, 2, out=tmp_path)]
    for epoch in (0, 1):
        pairs = [tuple(pair) for rank in found for group in rank[epoch] for pair in group]
        assert len({name for name, _ in pairs}) == len(pairs)
        assert dict(pairs) == expected[epoch]
        assert len({len(rank[epoch]) for rank in found}) == 1


def rank_of_environment(folder: str, size: int) -> list:
    """In a rank's process."""
    import os

    return epochs_of_rank(folder, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), size)


# --- dealing ------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 9), st.integers(0, 3))
def test_subjects_are_dealt_once_in_groups_that_all_ranks_have(count, size, world, seed):
    subjects = [f"s{i}" for i in range(count)]
    if world > count:
        with pytest.raises(UsageError, match=f"{world} processes for {count} subject"):
            deal(subjects, seed, 1, size, 0, world)
        return
    ranks = [deal(subjects, seed, 1, size, rank, world) for rank in range(world)]
    dealt = Counter(name for rank in ranks for group in rank for name in group)
    assert set(dealt.values()) == {1} and set(dealt) <= set(subjects)
    # Only groups of one subject can leave some out, since they cannot take one more.
    assert len(dealt) == count if size > 1 or count % world == 0 else len(dealt) == count - count % world
    assert len({len(rank) for rank in ranks}) == 1
    for groups in zip(*ranks, strict=True):
        sizes = [len(group) for group in groups]
        assert min(sizes) >= 1 and max(sizes) <= size and max(sizes) - min(sizes) <= 1
    assert ranks[0] == deal(subjects, seed, 1, size, 0, world)


def test_every_epoch_has_an_order_of_its_own_and_the_ranks_share_it():
    subjects = [f"s{i}" for i in range(11)]
    groups = deal(subjects, 0, 1, 4, 0, 1)
    assert sorted(n for g in groups for n in g) == sorted(subjects) and max(map(len, groups)) <= 4
    assert groups == deal(subjects, 0, 1, 4, 0, 1) != deal(subjects, 0, 2, 4, 0, 1)
    order = [n for g in groups for n in g]
    assert [n for g in deal(subjects, 0, 1, 4, 1, 3) for n in g] == order[1::3]


# --- settings -----------------------------------------------------------------------------------------------------


def test_threads_leave_a_core_and_share_the_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, ranks, expected in ((1, 1, 1), (2, 1, 1), (6, 1, 5), (64, 1, 8), (64, 8, 7), (4, 4, 1)):
        monkeypatch.setattr(feed.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert pick_threads() == expected and pick_threads(3) == 3


def test_intensities_are_halves_on_cuda_and_floats_on_a_cpu():
    assert pick_dtype("auto", CPU) == torch.float32 and pick_dtype("auto", torch.device("cuda")) == torch.float16
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    with pytest.raises(UsageError, match="pool_precision"):
        pick_dtype("fp8", CPU)


@pytest.mark.parametrize("engine", ["threads", "dali"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_residents_in_another_precision_and_what_they_weigh(store, dali, engine, precision):
    dtype = TYPES[precision]
    exact = make_feed(store).prepare(1, "b")
    made = make_feed(store, engine=engine, precision=precision).prepare(1, "b")
    assert made.interpolated.dtype == made.hr.dtype == dtype and made.label.dtype == torch.uint8
    assert torch.equal(made.hr, exact.hr.to(dtype)) and torch.equal(made.interpolated, exact.interpolated.to(dtype))
    assert torch.equal(made.label, exact.label) and torch.equal(made.mask, exact.mask)
    assert np.array_equal(made.origins, exact.origins)
    kept = feed.resident_voxels(store.subject("b"), RULE.patch)
    assert made.nbytes == kept * (2 * dtype.itemsize + 2) and kept < np.prod(SHAPES[1])
    assert feed.resident_voxels(store.subject("b"), 0) == np.prod(SHAPES[1])
    assert feed.resident_voxels(store.subject("b"), 1000) == np.prod(SHAPES[1])
    below = dataclasses.replace(store.subject("b"), attrs=store.subject("b").attrs | {"intensity": {"min": -1.0}})
    assert feed.resident_voxels(below, RULE.patch) == np.prod(SHAPES[1])  # lifted, nothing of it is air


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_the_limit_counts_the_bytes_of_all_groups_that_live(store, caplog, precision, prefetch):
    budget, options = 10_000_000, {"precision": precision, "prefetch": prefetch, "patch": RULE.patch}
    size = resident_limit(store, names(store), budget, **options)
    made = make_feed(store, precision=precision)
    largest = max(made.prepare(1, name).nbytes for name in names(store))
    for name in names(store):  # each to the byte, masks too
        two = (1 + prefetch) * made.prepare(1, name).nbytes
        for allowed in (two, two - 1):
            caplog.clear()
            assert resident_limit(store, [name], allowed, **options) == 1
            assert ("one subject at a time" in caplog.text) == (allowed < two)
    caplog.clear()
    # One byte more per voxel where the largest volume has no mask but a smaller one has would be too careful.
    assert size == min(5, budget // ((1 + prefetch) * largest)) > 0
    assert resident_limit(store, names(store), 10**12, **options) == 5 and not caplog.records
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert resident_limit(store, names(store), 1000, **options) == 1
    assert "one subject at a time" in caplog.text


def test_the_automatic_budget_is_shared_by_the_ranks_of_a_machine(store, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = feed.share_of_memory(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert 0 < feed.share_of_memory(CPU) < whole / 16


def test_the_automatic_budget_stays_within_the_limit_of_a_container(store, monkeypatch):
    largest = max(feed.resident_voxels(store.subject(name), 0) for name in names(store)) * (2 * 4 + 2)
    limit = int(2 * 3 * largest / 0.4)  # of which 40 % hold three groups of one subject, twice
    text = {"/sys/fs/cgroup/memory.max": str(limit + 10**9), "/sys/fs/cgroup/memory.current": str(10**9)}
    monkeypatch.setattr(system, "_lines", lambda path: text.get(path, "").splitlines())
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert feed.share_of_memory(CPU) == limit
    assert resident_limit(store, names(store), prefetch=2) == 2


# --- ahead of the step --------------------------------------------------------------------------------------------


class Recorded:
    """A store that tells what is read, and holds reads back until a gate is opened."""

    def __init__(self, store: Store) -> None:
        self.store, self.read_names, self.gates = store, [], {}

    def __getattr__(self, name: str):
        return getattr(self.store, name)

    def read(self, name: str):
        self.read_names.append(name)
        if name in self.gates:
            assert self.gates[name].wait(240)
        return self.store.read(name)


def eventually(condition) -> bool:
    for _ in range(2000):
        if condition():
            return True
        threading.Event().wait(0.01)
    return False


@pytest.mark.parametrize("prefetch", [1, 2])
def test_as_many_groups_are_made_ahead_as_asked_also_across_epochs(store, prefetch):
    recorded = Recorded(store)
    made = make_feed(recorded, prefetch=prefetch, threads=3)
    plan = [(e, [name]) for e in (1, 2) for name in "abc"]
    alive: list[weakref.ref] = []
    groups = made.groups(iter(plan))
    for done in range(1, len(plan) + 1):
        residents = next(groups)
        alive.append(weakref.ref(residents[0]))
        # The next ones are read while this one is in use, the third with an epoch's end before it; no others are.
        expected = min(len(plan), done + prefetch)
        assert eventually(lambda: len(recorded.read_names) >= expected)  # noqa: B023
        # Several threads read at once: which of them is first to say so does not matter.
        assert sorted(recorded.read_names) == sorted([name for _, [name] in plan][:expected])
        assert sum(r() is not None for r in alive) <= 2
        del residents
    assert next(groups, None) is None
    assert all(r() is None for r in alive)


def test_waiting_is_counted_and_the_first_group_apart(store):
    recorded = Recorded(store)
    made = make_feed(recorded)
    recorded.gates["b"] = threading.Event()
    groups = made.groups(iter([(1, ["a"]), (1, ["b"]), (1, ["c"])]))
    next(groups)
    assert made.first_wait > 0 and made.waited == 0
    timer = threading.Timer(0.3, recorded.gates["b"].set)
    timer.start()
    first = made.first_wait
    next(groups)
    assert made.waited > 0.2 and made.first_wait == first  # found: 0.37
    assert eventually(lambda: recorded.read_names == ["a", "b", "c"])
    list(groups)
    timer.join()


def test_an_abandoned_plan_leaves_no_thread_and_reads_no_more(store):
    recorded, others = Recorded(store), set(threading.enumerate())
    made = make_feed(recorded, threads=2)
    groups = made.groups(iter([(e, ["a"]) for e in range(50)]))
    next(groups)
    groups.close()
    mine = [t for t in set(threading.enumerate()) - others if t.name.startswith("feed-")]
    assert eventually(lambda: not any(t.is_alive() for t in mine))
    assert len(recorded.read_names) <= 2


def test_a_crew_runs_jobs_in_their_order_and_keeps_no_result():
    crew, ran = Crew(1), []
    jobs = [crew.submit(str(i), lambda i=i: ran.append(i) or np.zeros(i)) for i in range(5)]
    results = [crew.result(job) for job in jobs]
    assert ran == list(range(5)) and [len(r) for r in results] == ran
    gone = weakref.ref(results[4])
    del results
    assert gone() is None
    crew.close()


def test_prefetch_of_nothing_is_refused(store):
    with pytest.raises(UsageError, match="prefetch"):
        make_feed(store, prefetch=0)


def test_a_subject_that_is_not_in_the_store_is_left_out(store):
    made = make_feed(store)
    assert [r.subject for r in next(made.groups(iter([(1, ["a", "zz"])])))] == ["a"] and "zz" in made.quarantined
    with pytest.raises(InputError, match="zz"):
        next(make_feed(store, strict=True).groups(iter([(1, ["zz"])])))
    assert isinstance(RULE, PatchRule)
