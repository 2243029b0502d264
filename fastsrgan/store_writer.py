"""Writing a store: one writer at a time, subjects in any number of threads, each of them whole or not listed.

The bytes of a store depend on its subjects alone, not on their order, the number of threads or interruptions.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from fastsrgan._version import __version__
from fastsrgan.errors import InputError, ModelError, UsageError
from fastsrgan.geometry import spacing_of
from fastsrgan.runtime import finite
from fastsrgan.store import CHUNK, SHARD, Subject, subject_of
from fastsrgan.store_files import (
    FORMAT,
    LOCK,
    MANIFEST,
    NEEDS,
    Keys,
    WriteLock,
    need_space,
    read_manifest,
    write_error,
    write_manifest,
)

SPLITS = ("Train", "Test")
MARK = {"fastsrgan_format": FORMAT}  # among the attributes of every group that is ours
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LAYOUT = re.compile(r"zarr\.json|(image|label|mask)(/zarr\.json|/c/\d+/\d+/\d+)|(.*/)?[^/]*\.partial")
_TEMPORARY = re.compile(r"\.manifest\.tmp-.*|zarr\.[0-9a-f]+\.partial")
_LARGE = 1 << 20  # bytes of manifest above which it is not replaced after every subject


def create_store(
    url: str | os.PathLike, *, overwrite: bool = False, resume: bool = False, settings: dict[str, Any] | None = None
) -> StoreWriter:
    """Open a store for writing and lock it. Nothing is created, changed or removed before the first write.

    Parameters
    ----------
    overwrite : begin anew; only what a fastsrgan store consists of is removed
    resume : go on with what is there; finished subjects are kept
    settings : how values are stored; going on with other settings is refused

    Raises UsageError when something is there and neither is given, or it is no store; ResourceError when another
    process writes to it or the folder cannot be written; ModelError when it is of a newer format or its manifest is
    damaged (and not to be overwritten).
    """
    if overwrite and resume:
        raise UsageError("--resume", "and --overwrite exclude each other", "give one of them")
    return StoreWriter(Keys(url, read_only=False), overwrite, resume, settings or {})


class StoreWriter:
    """Takes whole subjects; use it as a context, so that the lock goes away whatever happens."""

    def __init__(self, keys: Keys, overwrite: bool, resume: bool, settings: dict[str, Any]) -> None:
        self._keys, self.url = keys, keys.url
        self._guard = threading.Lock()
        self._prepared = False
        self._replaced: list[str] = []
        self._written_at, self._write_seconds = 0.0, 0.0
        self._lock = WriteLock(keys)
        try:
            self._manifest = self._look(overwrite, resume, settings)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def finished(self) -> dict[str, Subject]:
        """The subjects that are listed."""
        with self._guard:
            return {name: subject_of(name, record) for name, record in self._manifest["subjects"].items()}

    def intact(self, subject_id: str) -> bool:
        """Whether every file of a listed subject holds what was written; behind a URL only sizes are compared."""
        for key, written in self._manifest["subjects"][subject_id]["files"].items():
            full = f"{subject_id}/{key}"
            if self._keys.size(full) != written[0]:
                return False
            if self._keys.root is not None and _fingerprint(self._keys.get(full) or b"") != written:
                return False
        return True

    def need_space(self, n_bytes: int) -> None:
        """Refuse to begin what the disk cannot hold: ResourceError."""
        need_space(self._keys, n_bytes)

    def write(
        self,
        subject_id: str,
        split: str,
        image_stored: np.ndarray,
        scale: float,
        offset: float,
        label: np.ndarray | None,
        mask: np.ndarray | None,
        affine: np.ndarray,
        attrs: dict[str, Any],
    ) -> Subject:
        """Write a subject and list it; one of that id is replaced. Safe from several threads.

        Parameters
        ----------
        image_stored : (X, Y, Z) integers or floats (kept as float32); intensity = stored * scale + offset
        label, mask : (X, Y, Z) uint8 or None
        affine : (4, 4) voxel index -> world mm
        attrs : plain values

        Raises InputError for arrays or an id that cannot be stored, ResourceError when the disk is full; then nothing
        of the subject stays.
        """
        arrays = _checked(subject_id, split, image_stored, label, mask)
        described = {"image": {"scale": float(scale), "offset": float(offset)}}
        record: dict[str, Any] = {
            "split": split,
            "shape": list(image_stored.shape),
            "spacing": list(spacing_of(affine)),
            "affine": np.asarray(affine, float).tolist(),
            "attrs": finite(attrs),
            "arrays": {name: {"dtype": a.dtype.name, **described.get(name, {})} for name, a in arrays.items()},
        }
        self._prepare()
        self.need_space(sum(a.nbytes for a in arrays.values()) + 2 * CHUNK**3)
        self._unlist(subject_id)
        try:
            self._keys.drop(subject_id)
            zarr.create_group(self._keys.zarr, path=subject_id, attributes=MARK | record)
            for name, array in arrays.items():
                self._write_array(f"{subject_id}/{name}", array, described.get(name, {}))
            record["files"] = self._seal(subject_id, arrays)
        except OSError as error:
            self._discard(subject_id)
            raise write_error(error, self.url) from error
        except BaseException:
            self._discard(subject_id)
            raise
        with self._guard:
            self._manifest["subjects"][subject_id] = record
            self._publish()
        return subject_of(subject_id, record)

    def finish(self, complete: bool = True) -> None:
        """List everything and note whether the store is complete; remove what interrupted runs left."""
        self._prepare()
        if self._keys.root is not None:
            keep = {MANIFEST, LOCK, "zarr.json", *self._manifest["subjects"]}
            for name in self._keys.names():
                if name not in keep and self._is_ours(name):
                    _remove(self._keys.root / name)
        with self._guard:
            self._manifest["complete"] = complete
            self._publish(always=True)

    def close(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def _look(self, overwrite: bool, resume: bool, settings: dict[str, Any]) -> dict[str, Any]:
        """The manifest to go on with. Refuses what must not be touched."""
        fresh = {"format": FORMAT, "needs": NEEDS, "made_by": __version__, "settings": settings}
        fresh |= {"complete": False, "root": None, "subjects": {}}
        try:
            found = read_manifest(self._keys)
        except ModelError:
            if not overwrite:
                raise
            found = None
        if found is None:
            strange = [name for name in self._keys.names() if name not in (LOCK, MANIFEST) and not self._is_ours(name)]
            if strange:
                reason = f"exists and is no fastsrgan store (it holds {strange[0]})"
                raise UsageError(self.url, reason, "choose another folder")
            return fresh
        self._replaced = list(found["subjects"])
        if overwrite or not found["subjects"]:
            return fresh
        if not resume:
            count = f"{len(found['subjects'])} subjects"
            raise UsageError(self.url, f"exists, with {count}", "--resume goes on with it, --overwrite begins anew")
        if found["settings"] != settings:
            told = ", ".join(f"{k} {found['settings'].get(k)}, not {v}" for k, v in settings.items())
            raise UsageError(self.url, f"was made with {told}", "use the same settings, or --overwrite")
        return found

    def _prepare(self) -> None:
        """Before the first write: clear what is to be replaced, then an empty manifest and the root group."""
        with self._guard:
            if self._prepared:
                return
            try:
                if not self._manifest["subjects"]:
                    self._clear()
                root = self._keys.get("zarr.json")
                if root is None or _fingerprint(root) != self._manifest["root"]:
                    self._keys.drop_one("zarr.json")
                    zarr.create_group(self._keys.zarr, attributes=MARK)
                    self._manifest["root"] = _fingerprint(self._keys.get("zarr.json") or b"")
                self._publish(always=True)
            except OSError as error:
                raise write_error(error, self.url) from error
            self._prepared = True

    def _clear(self) -> None:
        """Remove an earlier store, its manifest first; what no writer made stays."""
        self._keys.drop_one(MANIFEST)
        if self._keys.root is None:
            for name in self._replaced:
                self._keys.drop(name)
            self._keys.drop_one("zarr.json")
            return
        for name in self._keys.names():
            if name != LOCK and self._is_ours(name):
                _remove(self._keys.root / name)

    def _is_ours(self, name: str) -> bool:
        root = self._keys.root
        return name == "zarr.json" if root is None else _is_leftover(root / name)

    def _write_array(self, path: str, array: np.ndarray, attributes: dict[str, Any]) -> None:
        created = zarr.create_array(
            self._keys.zarr,
            name=path,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(CHUNK,) * 3,
            shards=tuple(-(-n // CHUNK) * CHUNK for n in array.shape),
            compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()],
            fill_value=0,
            attributes=attributes,
            dimension_names=("x", "y", "z"),
            config={"write_empty_chunks": True},
        )
        created[...] = array

    def _seal(self, subject_id: str, arrays: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Sizes and SHA-256 of the files of a subject, after they have reached the disk."""
        self._keys.settle(subject_id)
        files = {}
        for key in ["zarr.json", *(f"{name}/{end}" for name in arrays for end in ("zarr.json", SHARD))]:
            data = self._keys.get(f"{subject_id}/{key}")
            if data is None:
                raise OSError(errno.EIO, "was written and is not there", key)
            files[key] = _fingerprint(data)
        return files

    def _unlist(self, subject_id: str) -> None:
        """Before its files change, a subject leaves the manifest: readers never see it half-written."""
        with self._guard:
            if self._manifest["subjects"].pop(subject_id, None) is not None:
                self._manifest["complete"] = False
                self._publish(always=True)

    def _discard(self, subject_id: str) -> None:
        with contextlib.suppress(OSError):
            self._keys.drop(subject_id)

    def _publish(self, always: bool = False) -> None:
        """Replace the manifest. A large one at most a tenth of the time; what is not listed yet is listed soon."""
        if not always and time.monotonic() - self._written_at < 10 * self._write_seconds:
            return
        began = time.monotonic()
        size = write_manifest(self._keys, self._manifest)
        self._written_at = time.monotonic()
        self._write_seconds = self._written_at - began if size > _LARGE else 0.0


def _checked(
    subject_id: str, split: str, image: np.ndarray, label: np.ndarray | None, mask: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The arrays by name, in the types that are stored. Raises InputError for what no store may hold."""
    if not _ID.fullmatch(subject_id) or subject_id in (MANIFEST, "zarr.json"):
        raise InputError(subject_id, "is no subject id", "letters, digits, dot, - and _, the first a letter or digit")
    if split not in SPLITS:
        raise InputError(subject_id, f"its split is {split!r}", " or ".join(SPLITS))
    if image.ndim != 3 or 0 in image.shape:
        raise InputError(subject_id, f"its image has shape {image.shape}", "three axes, none empty")
    kept = image.dtype.kind in "iu"
    arrays = {"image": image.astype(image.dtype.newbyteorder("=") if kept else np.float32, copy=False)}
    for name, array in (("label", label), ("mask", mask)):
        if array is None:
            continue
        if array.shape != image.shape or array.dtype != np.uint8:
            told = f"its {name} is {array.dtype} {array.shape}, its image {image.shape}"
            raise InputError(subject_id, told, f"uint8 on the image's grid for a {name}")
        arrays[name] = array
    if not kept and not np.isfinite(arrays["image"]).all():
        raise InputError(subject_id, "its image is not finite", "replace NaN and infinities")
    return arrays


def _fingerprint(data: bytes) -> list[Any]:
    return [len(data), hashlib.sha256(data).hexdigest()]


def _is_leftover(entry: Path) -> bool:
    """Whether something at the root of a store was put there by a writer and holds nothing else."""
    if not entry.is_dir() or entry.is_symlink():
        return bool(_TEMPORARY.fullmatch(entry.name)) or (entry.name == "zarr.json" and _is_marked(entry))
    if not _ID.fullmatch(entry.name):
        return False
    below = [p.relative_to(entry).as_posix() for p in entry.rglob("*") if not p.is_dir() or p.is_symlink()]
    group = entry / "zarr.json"
    return all(_LAYOUT.fullmatch(name) for name in below) and (not group.exists() or _is_marked(group))


def _is_marked(group: Path) -> bool:
    try:
        return bool(MARK.keys() <= json.loads(group.read_bytes())["attributes"].keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry)
    else:
        entry.unlink()
