"""Snapshots: complete or absent, checksummed, the newest good one is taken, old ones go."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from processes import Post, ended, outcome, start

from fastsrgan.errors import ModelError, ResourceError
from fastsrgan.model import checkpoint


def write(run, step, text="x" * 5000):
    return checkpoint.write(
        run, step, {"a.bin": lambda p: p.write_text(text + str(step), encoding="utf8")}, {"epoch": 1}
    )


def test_a_snapshot_says_what_it_holds_and_is_found_again(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.snapshots(tmp_path)] == ["step-00000002", "step-00000009", "step-00000010"]
    newest = checkpoint.newest(tmp_path)
    assert newest.name == "step-00000010" and checkpoint.manifest(newest)["epoch"] == 1
    assert checkpoint.verified(newest, "a.bin").read_text(encoding="utf8").endswith("10")
    assert checkpoint.snapshots(tmp_path / "checkpoints") == checkpoint.snapshots(tmp_path)


@pytest.mark.fault(23)
@pytest.mark.parametrize("fault", ["flip", "shorten", "remove", "manifest", "no manifest"])
def test_every_damage_is_named_and_the_snapshot_before_is_taken(tmp_path, caplog, fault):
    write(tmp_path, 1)
    last = write(tmp_path, 2)
    file, manifest = last / "a.bin", last / checkpoint.MANIFEST
    if fault == "flip":
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(bytes(data))
    elif fault == "shorten":
        file.write_bytes(file.read_bytes()[:-1])
    elif fault == "remove":
        file.unlink()
    elif fault == "manifest":
        manifest.write_text("{", encoding="utf8")
    else:
        manifest.unlink()
    assert checkpoint.verify(last)
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    assert "taking the snapshot before it" in caplog.text


def test_what_a_removal_left_is_no_snapshot_that_lost_its_manifest(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    for step in (1, 3):
        (tmp_path / "checkpoints" / f"step-0000000{step}" / checkpoint.MANIFEST).unlink()
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step-00000002", "step-00000003"]
    assert [p.name for p in checkpoint.snapshots(tmp_path)] == ["step-00000002"]


def test_nothing_good_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no snapshot"):
        checkpoint.newest(tmp_path)
    (write(tmp_path, 1) / "a.bin").unlink()
    with pytest.raises(ModelError, match="no snapshot of 1 is whole"):
        checkpoint.newest(tmp_path)


@pytest.mark.fault(32)
def test_a_newer_format_is_refused(tmp_path):
    path = write(tmp_path, 1) / checkpoint.MANIFEST
    values = json.loads(path.read_text(encoding="utf8"))
    path.write_text(json.dumps({**values, "format": 99}), encoding="utf8")
    with pytest.raises(ModelError, match="format 99"):
        checkpoint.manifest(path.parent)
    write(tmp_path, 0)  # to go on from an older one would replace what a newer fastsrgan wrote
    with pytest.raises(ModelError, match=r"format 99.*upgrade it"):
        checkpoint.newest(tmp_path)
    assert "format 99" in checkpoint.verify(path.parent)[0]


@pytest.mark.fault(24)
def test_a_failing_writer_leaves_the_old_snapshot_of_that_step(tmp_path):
    write(tmp_path, 1)

    def fails(path):
        path.write_text("half", encoding="utf8")
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="no space left"):
        checkpoint.write(tmp_path, 1, {"a.bin": fails}, {})
    assert not checkpoint.verify(checkpoint.newest(tmp_path))
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_the_same_step_written_again_is_the_later_one(tmp_path):
    """As a run that was resumed before it and came to it anew leaves it."""
    write(tmp_path, 1, "first")
    write(tmp_path, 1, "second")
    (snapshot,) = checkpoint.snapshots(tmp_path)
    assert checkpoint.verified(snapshot, "a.bin").read_text(encoding="utf8") == "second1"


def test_prune_keeps_the_newest(tmp_path):
    for step in range(5):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.snapshots(tmp_path)] == ["step-00000003", "step-00000004"]


def write_for_ever(run: Path, written: Post) -> None:
    data = b"x" * 3_000_000
    for step in range(10_000):
        checkpoint.write(run, step, {n: (lambda p: p.write_bytes(data)) for n in ("a.bin", "b.bin")}, {})
        checkpoint.prune(run, 2)
        written.put(step)


@pytest.mark.fault(21)
def test_sigkill_while_writing_leaves_whole_snapshots_only(tmp_path):
    run, written = tmp_path / "run", Post()
    process = start(write_for_ever, run, written, out=tmp_path / "told.json")
    for _ in range(3):
        last = written.get()
    time.sleep(0.05)
    process.kill()
    assert ended(process) == -signal.SIGKILL, outcome(tmp_path / "told.json")
    while not written.empty():
        last = written.get()
    newest = checkpoint.newest(run)
    assert int(newest.name[5:]) >= last and not checkpoint.verify(newest)


@pytest.mark.fault(23)
def test_a_file_that_may_not_be_read_is_listed_and_the_others_are_looked_at(tmp_path, monkeypatch):
    for step in (1, 2):
        last = checkpoint.write(
            tmp_path, step, {name: lambda p: p.write_bytes(b"x") for name in ("a.bin", "b.bin")}, {}
        )
    hashed = checkpoint.sha256

    def denied(path):
        if path.name == "a.bin":
            raise PermissionError(13, "Permission denied", str(path))
        return hashed(path)

    monkeypatch.setattr(checkpoint, "sha256", denied)
    (last / "b.bin").write_bytes(b"y")
    first, second = checkpoint.verify(last)
    assert first == f"{last / 'a.bin'}: cannot be read: Permission denied (check the path and its permissions)"
    assert second.startswith(f"{last / 'b.bin'}: differs from its SHA-256")
