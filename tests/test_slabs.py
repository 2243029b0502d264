"""Inference into files: as in memory, to the bit, whatever the orientation; after a kill at any moment too."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import damage
import numpy as np
import pytest
from processes import ended, outcome, start

from fastsrgan.errors import ResourceError
from fastsrgan.infer import planes as slabs
from fastsrgan.infer import volume as infer
from fastsrgan.infer.memory import SLABS, plan_memory
from fastsrgan.infer.volume import infer_volume
from fastsrgan.model.cpu import forms
from fastsrgan.model.networks import GeneratorSpec, build_generator

SETTINGS = {"patch": 16, "step": (5, 9, 9), "device": "cpu", "batch": 2}
SPACINGS = [(1.0, 1.0, 3.0), (2.0, 1.0, 1.0), (1.0, 1.0, 1.0)]


def image(shape=(30, 22, 19)) -> np.ndarray:
    return np.random.default_rng(0).random(shape, np.float32) * 700


@pytest.fixture(scope="module")
def generator():
    return build_generator(GeneratorSpec(kernel=1), seed=5).eval()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here survives a power cut: what is written need not reach the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(np.memmap, "flush", lambda self: None)


@pytest.fixture
def by_slabs(monkeypatch):
    """Every volume is taken to be too large for memory."""

    def planned(job, *args):
        assert job.can_stream
        return replace(plan_memory(job, *args), mode=SLABS)

    monkeypatch.setattr(infer, "plan_memory", planned)


@pytest.mark.fault(35)
@pytest.mark.parametrize("geometry", ["physical", "segsrgan"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_files_hold_what_memory_would(generator, monkeypatch, tmp_path, spacing, geometry):
    """Every processed axis is a slab axis once; voxels are turned, flipped and interpolated a few planes at a time."""
    turned = np.array([[0, -1, 0, 5], [0, 0, 1, -3], [1, 0, 0, 9], [0, 0, 0, 1.0]]) @ np.diag([*spacing, 1])
    options = {**SETTINGS, "geometry": geometry, "mask": "head"}
    data = image((18, 22, 13))
    expected = infer_volume(data, turned, generator, **options)
    monkeypatch.setattr(infer, "plan_memory", lambda job, *args: replace(plan_memory(job, *args), mode=SLABS))
    done = infer_volume(data, turned, generator, **options, scratch=tmp_path / "result")
    assert isinstance(done.sr, np.memmap) and isinstance(done.prob, np.memmap)
    assert np.array_equal(done.sr, expected.sr) and np.array_equal(done.prob, expected.prob)
    assert np.array_equal(done.affine, expected.affine)
    assert done.report["begun_at_plane"] == 0
    assert sorted(p.name for p in (tmp_path / "result").iterdir()) == ["journal.json", "prob.npy", "sr.npy"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_that_was_stopped_goes_on(generator, by_slabs, monkeypatch, tmp_path, kept):
    """Planes that the journal does not know are made again; another image does not take what is there for its own."""
    data, affine = image((60, 20, 18)), np.eye(4)
    expected = infer_volume(data, affine, generator, **SETTINGS, scratch=tmp_path / "whole")
    note, calls = slabs.Unfinished.note, []

    def dies(self, done):
        calls.append(done)
        if len(calls) == 4:
            if kept:
                note(self, done)
            self.arrays["sr"][:, :, :] = np.where(np.arange(60)[:, None, None] < calls[-2 + kept], self.arrays["sr"], 9)
            raise Killed
        note(self, done)

    monkeypatch.setattr(slabs.Unfinished, "note", dies)
    with pytest.raises(Killed):
        infer_volume(data, affine, generator, **SETTINGS, scratch=tmp_path / "result")
    assert not (tmp_path / "result").exists()
    other = infer_volume(image((60, 20, 18)) + 1, affine, generator, **SETTINGS, scratch=tmp_path / "other")
    assert other.report["begun_at_plane"] == 0
    done = infer_volume(data, affine, generator, **{**SETTINGS, "batch": 5}, scratch=tmp_path / "result")
    assert done.report["begun_at_plane"] == calls[3 if kept else 2] > 0
    assert np.array_equal(done.sr, expected.sr) and np.array_equal(done.prob, expected.prob)
    assert done.report["batch"] == 2, "that of the run that began: another would round otherwise"


def test_the_layer_forms_are_recorded_and_others_begin_anew(generator, by_slabs, monkeypatch, tmp_path):
    """Other forms round otherwise: their planes do not belong into one result."""
    monkeypatch.setattr(forms, "LEAST_WORK", 0)
    monkeypatch.setenv("FASTSRGAN_CACHE", str(tmp_path / "cache"))
    data, note = image((40, 18, 16)), slabs.Unfinished.note

    def dies(self, done):
        note(self, done)
        if done:
            raise Killed

    def run(mode):
        monkeypatch.setenv("FASTSRGAN_FORMS", mode)
        return infer_volume(data, np.eye(4), generator, **SETTINGS, scratch=tmp_path / "result").report

    with monkeypatch.context() as stopped, pytest.raises(Killed):
        stopped.setattr(slabs.Unfinished, "note", dies)
        run("fixed")
    partial = slabs.Unfinished.partial_of(tmp_path / "result")
    shutil.copytree(partial, tmp_path / "kept")
    report = run("fixed")
    assert report["begun_at_plane"] > 0
    assert report["layer_forms"]["mode"] == "fixed" and set(report["layer_forms"]["forms"].values()) > {"folded"}
    (tmp_path / "kept").rename(partial)
    report = run("measured")
    assert (report["begun_at_plane"], report["layer_forms"]["mode"]) == (0, "measured")


def test_another_image_begins_anew(generator, by_slabs, tmp_path):
    partial = slabs.Unfinished(tmp_path / "result", "some other work", {"sr": (30, 22, 19)}, 30)
    partial.note(9)
    done = infer_volume(image(), np.eye(4), generator, **SETTINGS, scratch=tmp_path / "result")
    assert done.report["begun_at_plane"] == 0


def killed(notes: int, scratch: Path) -> None:
    """Inference by slabs in a process of its own that is killed when it would note what is done the next time."""
    infer.plan_memory = lambda job, *args: replace(plan_memory(job, *args), mode=SLABS)
    note, left = slabs.Unfinished.note, [notes]

    def counted(self, done):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        note(self, done)

    slabs.Unfinished.note = counted
    os.fsync = lambda file: None
    np.memmap.flush = lambda self: None
    network = build_generator(GeneratorSpec(kernel=1), seed=5).eval()
    infer_volume(image((60, 20, 18)), np.eye(4), network, **SETTINGS, scratch=scratch)


@pytest.mark.fault(22)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_after_kills_the_bytes_are_those_of_an_unbroken_run(generator, by_slabs, tmp_path):
    begun = []
    for notes in (3, 2):
        out = tmp_path / "told.json"
        assert ended(start(killed, notes, tmp_path / "result", out=out)) == -signal.SIGKILL, outcome(out)
        begun.append(json.loads((tmp_path / ".result.partial" / slabs.JOURNAL).read_text())["done"])
    assert 0 < begun[0] < begun[1] < 60
    data = image((60, 20, 18))
    got = infer_volume(data, np.eye(4), generator, **SETTINGS, scratch=tmp_path / "result")
    whole = infer_volume(data, np.eye(4), generator, **SETTINGS, scratch=tmp_path / "whole")
    assert got.report["begun_at_plane"] == begun[1] and whole.report["begun_at_plane"] == 0
    for name in ("sr.npy", "prob.npy"):
        assert (tmp_path / "result" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.fault(24)
@pytest.mark.parametrize("where", ["posix_fallocate", "replace"])
def test_a_full_disk_is_one_line(monkeypatch, tmp_path, where):
    """Before the first tile, since blocks are taken beforehand; and at the last rename."""

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = slabs.Unfinished(tmp_path / "a", "key", {"sr": (4, 4, 4)}, 4)
    monkeypatch.setattr(slabs.os, where, full)
    with pytest.raises(ResourceError, match="no space left"):
        if where == "replace":
            files.finish()
        else:
            slabs.Unfinished(tmp_path / "b", "key", {"sr": (4, 4, 4)}, 4)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_damaged_journal_begins_anew(tmp_path):
    files = slabs.Unfinished(tmp_path / "a", "key", {"sr": (4, 4, 4)}, 4, {"batch": 3})
    files.note(2)
    again = slabs.Unfinished(tmp_path / "a", "key", {"sr": (4, 4, 4)}, 4, {"batch": 9})
    assert (again.done, again.facts) == (2, {"batch": 3})
    (tmp_path / ".a.partial" / slabs.JOURNAL).write_text("{")
    assert slabs.Unfinished(tmp_path / "a", "key", {"sr": (4, 4, 4)}, 4).done == 0


DAMAGE = {
    "a short file": lambda folder: damage.cut(folder / "sr.npy", -40),
    "an empty file": lambda folder: (folder / "sr.npy").write_bytes(b""),
    "a header that is none": lambda folder: damage.flip(folder / "sr.npy", 12),
    "another order": lambda folder: np.save(folder / "sr.npy", np.asfortranarray(np.ones((4, 5, 6), np.float32))),
    "no file": lambda folder: (folder / "sr.npy").unlink(),
    "more planes than there are": lambda folder: _journal(folder, done=999),
    "fewer than none": lambda folder: _journal(folder, done=-3),
    "planes without end": lambda folder: _journal(folder, done=float("inf")),
    "facts that are none": lambda folder: _journal(folder, facts=5),
    "other facts": lambda folder: _journal(folder, facts={}),
}


def _journal(folder, **changes):
    path = folder / slabs.JOURNAL
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.fault(22)
@pytest.mark.parametrize("what", DAMAGE)
def test_what_an_earlier_run_left_damaged_is_made_anew(tmp_path, what):
    """A short file was mapped, grown with zeros, and taken for whole."""
    files = slabs.Unfinished(tmp_path / "a", "key", {"sr": (4, 5, 6)}, 4, {"batch": 3})
    files.arrays["sr"][:] = 7
    files.note(2)
    again = slabs.Unfinished(tmp_path / "a", "key", {"sr": (4, 5, 6)}, 4, {"batch": 9})
    assert (again.done, again.facts) == (2, {"batch": 3}) and (again.arrays["sr"] == 7).all()
    del files, again
    DAMAGE[what](tmp_path / ".a.partial")
    anew = slabs.Unfinished(tmp_path / "a", "key", {"sr": (4, 5, 6)}, 4, {"batch": 9})
    assert (anew.done, anew.facts) == (0, {"batch": 9}) and (anew.arrays["sr"] == 0).all()
