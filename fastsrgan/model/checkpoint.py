"""Snapshots of a run: folders that are complete, checksummed, and renamed into place last.

RUN/checkpoints/step-00000120/ holds the files of one snapshot and ``manifest.json`` with the size and SHA-256 of each.
A snapshot without a manifest, or whose files differ from it, does not count. What the files mean is the caller's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastsrgan.core.files import disk_error, sync_folder, temporary_name
from fastsrgan.errors import ModelError

log = logging.getLogger("fastsrgan")

FOLDER, MANIFEST, MODEL = "checkpoints", "manifest.json", "model.safetensors"
FORMAT = 1
MAX_MANIFEST = 2**20
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")  # of a snapshot: no other folder's
_NAME = re.compile(r"(step|epoch)-(\d{1,12})")


def write(run: Path, step: int, writers: dict[str, Callable[[Path], object]], facts: dict[str, Any]) -> Path:
    """Write one snapshot of ``run``.

    Parameters
    ----------
    step : generator updates done, names the folder
    writers : file name -> function that writes it at the path it is given
    facts : plain values added to the manifest

    Raises
    ------
    ResourceError : no space, folder missing or read-only. What stood before is untouched.
    """
    final = run / FOLDER / f"step-{step:08d}"
    temporary = temporary_name(final)
    try:
        temporary.mkdir(parents=True)
        files = {}
        for name, writer in writers.items():
            path = temporary / name
            writer(path)
            with open(path, "rb") as f:
                os.fsync(f.fileno())
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest = {"format": FORMAT, "step": step, **facts, "files": files}
        with open(temporary / MANIFEST, "w", encoding="utf8") as f:
            json.dump(manifest, f, indent=2)
            f.flush()
            os.fsync(f.fileno())
        if final.exists():  # the same step again: a resumed run that redid the work since
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(final.parent)
    except OSError as error:
        raise disk_error(error, final) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class NewerFormatError(ModelError):
    """A snapshot that is whole, for a later fastsrgan."""


def manifest(snapshot: Path) -> dict[str, Any]:
    """The manifest of a snapshot. Raises ModelError when it is missing or absurd, NewerFormatError when it is newer."""
    path = snapshot / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise ModelError(path, "too large for a manifest", "the snapshot is damaged; use another one")
        values = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(path, "cannot be read", "the snapshot is incomplete or damaged") from error
    known = isinstance(values, dict) and isinstance(values.get("files"), dict)
    known = known and all(_FILE.fullmatch(name) for name in values["files"])
    if not known or not isinstance(values.get("format", FORMAT), int):
        raise ModelError(path, "is no manifest of a snapshot", "the snapshot is damaged; use another one")
    if values.get("format", FORMAT) > FORMAT:
        reason = f"snapshot format {values['format']}"
        raise NewerFormatError(path, reason, f"this fastsrgan reads up to {FORMAT}: upgrade it")
    return values


def verified(snapshot: Path, name: str) -> Path:
    """Path of a snapshot's file whose size and SHA-256 are as the manifest says; ModelError where they are not."""
    entry = manifest(snapshot)["files"].get(name)
    path = snapshot / name
    if not isinstance(entry, dict) or not path.is_file():
        raise ModelError(path, "missing", "the snapshot is incomplete")
    if path.stat().st_size != entry.get("bytes") or sha256(path) != entry.get("sha256"):
        raise ModelError(path, "differs from its SHA-256 in the manifest", "damaged or changed; use another snapshot")
    return path


def verify(snapshot: Path) -> list[str]:
    """Every problem of a snapshot, a newer format too, one line each; empty when all files are as written."""
    try:
        return _damage(snapshot)
    except NewerFormatError as error:
        return [str(error)]


def _damage(snapshot: Path) -> list[str]:
    try:
        names = list(manifest(snapshot)["files"])
    except NewerFormatError:
        raise
    except ModelError as error:
        return [str(error)]
    return refusals(verified, ((snapshot, name) for name in names))


def refusals(check: Callable[..., object], calls: Iterable[tuple]) -> list[str]:
    """What ModelErrors say of calls of a check with these arguments, and which files may not be read."""
    told = []
    for call in calls:
        try:
            check(*call)
        except ModelError as error:
            told.append(str(error))
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            told.append(str(ModelError(error.filename or call[0], reason, "check the path and its permissions")))
    return told


def folders(run: Path) -> list[Path]:
    """Snapshot folders of a run folder or its ``checkpoints``, oldest first, also those whose manifest is lost.

    What is older than every folder with a manifest is what a removal left (`prune`), and does not count.
    """
    for parent in (run / FOLDER, run):
        if not parent.is_dir():
            continue
        named = [(int(m[2]), p) for p in parent.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
        if named:
            found = [p for _, p in sorted(named)]
            return found[next((i for i, p in enumerate(found) if (p / MANIFEST).is_file()), 0) :]
    return []


def snapshots(run: Path) -> list[Path]:
    """Snapshot folders with a manifest, oldest first. ``run`` is a run folder or its ``checkpoints``."""
    return [p for p in folders(run) if (p / MANIFEST).is_file()]


def newest(run: Path) -> Path:
    """The newest undamaged snapshot; a damaged one is passed over with a warning. ModelError when there is none.

    One of a newer format is no damage: to go on from an older one would replace it. Raises NewerFormatError.
    """
    found = folders(run)
    for left, snapshot in reversed(list(enumerate(found))):
        problems = _damage(snapshot)
        if not problems:
            return snapshot
        log.warning("%s%s", problems[0], ": taking the snapshot before it" if left else "")
    if found:
        hint = f"its weights may be: -w {run / MODEL}" if (run / MODEL).is_file() else "copy the run again"
        raise ModelError(run, f"no snapshot of {len(found)} is whole", hint)
    raise ModelError(run, "no snapshot in this folder", "a run folder of `fastsrgan train`, or a weight file")


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` snapshots."""
    for snapshot in snapshots(run)[:-keep]:
        # The manifest goes first: a removal that is interrupted leaves no snapshot that looks whole.
        (snapshot / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(snapshot, ignore_errors=True)
