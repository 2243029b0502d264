"""Feed: damaged subjects are left out the same way by both engines; workers that die or hang end as a named error."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from feed_store import CPU, DRAWN, Pipeline, digest, make_feed, make_store

from fastsrgan.core import threads as crew
from fastsrgan.data import dali, feed
from fastsrgan.data.dali import DaliMover
from fastsrgan.data.subject import PatchRule, make_resident
from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.observation.model import Degradation, Degraded
from fastsrgan.store.reader import Store, open_store

SHAPES = [(21, 30, 17), (25, 19, 28), (18, 23, 22)]
PLAN = [(1, ["a", "b"]), (1, ["c"]), (2, ["b", "c", "a"])]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("faults"), SHAPES)


@pytest.fixture(params=["threads", "dali"])
def engine(request) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return request.param


class Faulty:
    """A store of which one subject's read does something else."""

    def __init__(self, store: Store, name: str, call) -> None:
        self.store, self.name, self.call = store, name, call

    def __getattr__(self, name: str):
        return getattr(self.store, name)

    def read(self, name: str):
        return self.call(self.store.read(name)) if name == self.name else self.store.read(name)


def raises(error: BaseException):
    def call(_sample):
        raise error

    return call


def damaged(store: Store, folder: Path) -> Store:
    """The same store with one byte of subject b's image changed."""
    source = Path(str(store.url).removeprefix("file://"))
    shutil.copytree(source, folder / "store")
    shard = folder / "store" / "b" / "image" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0xFF
    shard.write_bytes(bytes(data))
    return open_store(folder / "store")


# --- subjects -----------------------------------------------------------------------------------------------------


@pytest.mark.fault(29)
def test_a_damaged_chunk_leaves_the_subject_out(store, tmp_path, caplog, engine):
    bad = damaged(store, tmp_path)
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        made = make_feed(bad, engine=engine, threads=2)
        groups = list(made.groups(iter(PLAN)))
    assert [[r.subject for r in g] for g in groups] == [["a"], ["c"], ["c", "a"]]
    assert list(made.quarantined) == ["b"] and "b/image" in made.quarantined["b"]
    assert sum("subject b is left out" in r.message for r in caplog.records) == 1
    whole = make_feed(store)
    assert digest(groups[2][1]) == digest(whole.prepare(2, "a"))
    with pytest.raises(InputError, match=r"b/image.*damaged"):
        list(make_feed(bad, engine=engine, strict=True).groups(iter(PLAN)))


def test_an_image_that_cannot_be_degraded_is_named_and_the_pipeline_goes_on(store, engine):
    empty = Faulty(store, "b", lambda s: dataclasses.replace(s, image=np.zeros_like(s.image)))
    made = make_feed(empty, engine=engine)
    groups = list(made.groups(iter(PLAN)))
    assert [[r.subject for r in g] for g in groups] == [["a"], ["c"], ["c", "a"]]
    assert made.quarantined == {
        "b": "b: image: its low-resolution maximum is 0 (at least one voxel must be above zero)"
    }
    assert digest(groups[2][0]) == digest(make_feed(store).prepare(2, "c"))


def test_a_setting_that_does_not_fit_a_subject_ends_the_run(store, engine):
    fine = dataclasses.replace(DRAWN, low_res=((0.5, 0.5, 0.5),))
    with pytest.raises(UsageError, match=r"a: low resolution: 0\.5 mm is finer than the image's 1 mm"):
        list(make_feed(store, fine, engine=engine).groups(iter(PLAN)))


def test_missing_labels_and_masks_are_said_before_anything_is_degraded(store, engine):
    move = DaliMover(CPU) if engine == "dali" else None
    sample, draw = store.read("a"), DRAWN.draw(0, 1, "a")
    with pytest.raises(InputError, match="a: has no label"):
        make_resident(dataclasses.replace(sample, label=None), DRAWN, draw, PatchRule(8, 8), CPU, move=move)
    with pytest.raises(InputError, match="a: has no mask"):
        make_resident(sample, DRAWN, draw, PatchRule(8, 8, by_mask=True), CPU, move=move)


# --- workers ------------------------------------------------------------------------------------------------------


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SystemExit(3), "b: the worker that prepared it failed: SystemExit: 3"),
        (KeyError("shard"), "b: the worker that prepared it failed: KeyError: 'shard'"),
        (MemoryError(), "b: no memory to prepare it"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_worker_that_dies_is_an_error_with_the_subject(store, engine, error, message):
    made = make_feed(Faulty(store, "b", raises(error)), engine=engine)
    with pytest.raises(ResourceError, match=message) as found:
        list(made.groups(iter(PLAN)))
    assert found.value.__cause__ is error and not made.quarantined


@pytest.mark.fault(41)
def test_what_dies_within_the_law_is_an_error_with_the_subject(store, engine, monkeypatch):
    made = make_feed(store, engine=engine)
    monkeypatch.setattr(Degradation, "apply", lambda *_: 1 // 0)
    with pytest.raises(ResourceError, match="a: the worker that prepared it failed: ZeroDivisionError"):
        list(made.groups(iter(PLAN)))


@pytest.mark.fault(41)
@pytest.mark.parametrize("where", ["read", "law"])
def test_a_worker_that_hangs_is_an_error_with_the_subject(store, engine, monkeypatch, where):
    release, apply, submit = threading.Event(), Degradation.apply, crew.Crew.submit
    others = set(threading.enumerate())

    def hang(value):
        release.wait(200)
        return value

    def apply_or_hang(self, image, *rest):
        return apply(self, hang(image) if sorted(image.shape) == sorted(SHAPES[1]) else image, *rest)

    def impatient(self, what, call, _allowed):  # with one subject only, so that a slow machine is not taken for hung
        return submit(self, what, call, 0.5 if what == "b" else 200)

    if where == "law":
        monkeypatch.setattr(Degradation, "apply", apply_or_hang)
    monkeypatch.setattr(crew.Crew, "submit", impatient)
    monkeypatch.setattr(crew, "FAREWELL", 0.0)
    made = make_feed(Faulty(store, "b", hang) if where == "read" else store, engine=engine, threads=2)
    try:
        with pytest.raises(ResourceError, match=r"b: the worker that prepares it has not ended within 0\.5 s"):
            list(made.groups(iter(PLAN)))
    finally:
        release.set()
        for thread in set(threading.enumerate()) - others:  # or the next test's patches would reach this one's
            if thread.name.startswith("feed-"):
                thread.join(100)


def test_the_one_that_hangs_is_named_and_not_those_that_wait_for_it(monkeypatch):
    """One pipeline of DALI and two threads that want it."""
    monkeypatch.setattr(dali, "define", Pipeline)
    mover, taken, release, workers = DaliMover(CPU), threading.Event(), threading.Event(), crew.Crew(2)
    image = np.ones((2, 2, 2), np.float32)
    done = Degraded(image, image, image, 1.0, (1.0, 1.0, 1.0))

    def first() -> None:
        mover(image, image.astype(np.uint8), None, lambda _: taken.set() or (release.wait(200) and done))

    def second() -> None:
        mover(image, image.astype(np.uint8), None, lambda _: done)

    try:
        jobs = [workers.submit("hangs", first, 2.0)]
        assert taken.wait(200)
        jobs.append(workers.submit("waits", second, 0.5))
        with pytest.raises(ResourceError, match="hangs: the worker that prepares it has not ended within 2 s"):
            workers.result(jobs[1])
        release.set()
        workers.result(jobs[1])
    finally:
        release.set()
        workers.close()


def test_reading_from_object_storage_is_bounded_by_the_store_itself(store, monkeypatch):
    """It waits and tries again for longer than a worker may take otherwise."""
    began, release, workers = threading.Event(), threading.Event(), crew.Crew(1)

    def slow(sample):
        began.set()
        assert release.wait(200)
        return sample

    remote = Faulty(store, "b", slow)
    remote.url = "s3://bucket/store"
    made = make_feed(remote)
    try:
        job = workers.submit("b", lambda: made.prepare(1, "b"), 0.2)
        assert began.wait(200)
        threading.Timer(1.0, release.set).start()
        with contextlib.suppress(ResourceError):  # what comes after reading is watched again
            assert workers.result(job).subject == "b"
        assert release.is_set()
    finally:
        release.set()
        workers.close()


@pytest.mark.fault(41)
def test_patience_ends_before_half_a_minute_and_grows_with_the_volume(store, monkeypatch):
    assert feed.PATIENCE + crew.POLL + crew.FAREWELL < 30
    made, idle, allowed = make_feed(store), crew.Crew(0), []
    monkeypatch.setattr(idle, "submit", lambda what, call, seconds: allowed.append(seconds))
    for voxels in (1e6, 5e7, 2e8):
        monkeypatch.setattr(feed, "PATIENT_VOXELS", 5e7 * np.prod(SHAPES[0]) / voxels)
        made._submit(idle, 1, "a")
    assert np.allclose(allowed, [25, 25, 100])
    make_feed(store, patience=3.0)._submit(idle, 1, "a")  # at four times the voxels that it is for
    assert allowed[-1] == 12


def test_a_thread_that_hangs_does_not_keep_the_process(engine):
    """Nor does DALI, which waits for its pipelines at the end."""
    program = f"""
import threading
import numpy as np
import torch
from fastsrgan.core import threads as crew
from fastsrgan.errors import ResourceError
from fastsrgan.data.feed import pick_mover
crew.FAREWELL = 0.1
move = pick_mover({engine!r}, torch.device("cpu"))
ones = np.ones((3, 4, 5), np.float32)
workers = crew.Crew(1)
try:
    hang = lambda: move(ones, ones.astype(np.uint8), None, lambda _: threading.Event().wait())
    workers.result(workers.submit("sub-7", hang, 0.3))
except ResourceError as error:
    print(error.what)
workers.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and done.stdout.split() == ["sub-7"] and not done.stderr
