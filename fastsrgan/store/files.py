"""What a store stands on, wherever it is: bytes by key, the manifest of whole subjects, and the writer's lock.

What a store's manifest and the metadata of its arrays may say, checked before anything is believed.

A digest says that a manifest is whole, not who wrote it. Names that lead out of the store, files that are none of a
subject's, sizes beyond all volumes and codecs that no fastsrgan writes are refused here, whoever made the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import urllib.parse
from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from zarr.abc.store import Store as ZarrStore
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from fastsrgan.core.files import (
    LOCK,
    FolderLock,
    atomic_write,
    is_special,
    judge_lock,
    lock_holder,
    lock_signature,
    sync_folder,
)
from fastsrgan.errors import FastsrganError, ModelError, ResourceError
from fastsrgan.store.remote import open_url
from fastsrgan.volume.geometry import spacing_of

log = logging.getLogger("fastsrgan")

FORMAT = 1
NEEDS = "0.1.0"  # the oldest fastsrgan that reads FORMAT
MANIFEST = "manifest.json"


class Keys:
    """Bytes by key below a folder or URL; a ``Path`` is a folder, whatever its name looks like.

    ``root`` is the folder, None for a URL; ``zarr`` is the place as zarr sees it. Raises UsageError for a URL that
    nothing here can open, and from every method ResourceError where object storage does not answer.
    """

    def __init__(self, url: str | os.PathLike, read_only: bool) -> None:
        self.url = os.fspath(url)
        self.root = url if isinstance(url, Path) else local_path(self.url)
        self.remote = open_url(self.url, read_only) if self.root is None else None
        self.zarr: ZarrStore = LocalStore(str(self.root), read_only=read_only) if self.remote is None else self.remote

    def why_none(self) -> str:
        """What stands where a store was expected."""
        if self.root is None or self.root.is_dir():
            return "no fastsrgan store is here"
        return "is a file, a store is a folder or a URL" if self.root.exists() else "no such folder"

    def get(self, key: str) -> bytes | None:
        """The bytes under a key, None where there are none."""
        return self.get_all([key])[0]

    def get_all(self, keys: list[str]) -> list[bytes | None]:
        """The bytes under several keys, None where there are none; behind a URL they are asked for at once."""
        if self.root is not None:
            return [self._read(self.root / key) for key in keys]
        found = sync(_together(self.zarr.get(key, default_buffer_prototype()) for key in keys))
        return [None if one is None else one.to_bytes() for one in found]

    def _read(self, path: Path) -> bytes | None:
        if is_special(path):  # a pipe, say: nothing that a writer makes, and reading it may never end
            return None
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            raise ResourceError(path, reason, "check the path and its permissions") from error

    def put(self, key: str, data: bytes) -> None:
        """Replace what is under a key as a whole: readers see the old bytes or the new ones."""
        if self.remote is not None:
            sync(self.remote.put(key, data))
            return
        with atomic_write(self.folder / key) as temporary:
            temporary.write_bytes(data)

    def put_all(self, data: dict[str, bytes]) -> None:
        """Write several keys that nobody reads yet; on return they survive a power cut."""
        if self.remote is not None:
            remote = self.remote
            sync(_together(remote.put(key, value) for key, value in data.items()))
            return
        for key, value in data.items():
            path = self.folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
        for folder in {parent for key in data for parent in (self.folder / key).parents}:
            if folder.is_relative_to(self.folder):
                sync_folder(folder)

    def create(self, key: str, data: bytes) -> bool:
        """Behind a URL: set what is under a key unless something is; False when it is."""
        assert self.remote is not None
        return sync(self.remote.create(key, data))

    def sizes(self, prefix: str) -> dict[str, int]:
        """key below the prefix -> number of bytes, for all there is."""
        if self.remote is not None:
            return sync(self.remote.sizes(prefix))
        top = self.folder / prefix
        return {p.relative_to(top).as_posix(): p.stat().st_size for p in top.rglob("*") if p.is_file()}

    def drop(self, prefix: str) -> None:
        """Remove everything below a prefix."""
        if self.remote is None:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.folder / prefix)
            return
        for key in self.sizes(prefix):
            self.drop_one(f"{prefix}/{key}".lstrip("/"))

    def drop_one(self, key: str) -> None:
        """Remove what is under a key, if anything."""
        if self.remote is not None:
            sync(self.remote.remove(key))
        else:
            (self.folder / key).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """What stands directly below the root, sorted."""
        if self.remote is not None:
            return sorted(name.rstrip("/") for name in sync(self.remote.names()))
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []

    @property
    def folder(self) -> Path:
        """The root where it is a folder."""
        assert self.root is not None
        return self.root


async def _together(requests: Iterable[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*requests)


def local_path(url: str) -> Path | None:
    """The folder that a path or a ``file://`` URL means, None for any other URL."""
    if url.startswith("file://"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    return None if "://" in url or "::" in url else Path(url)


def read_manifest(keys: Keys) -> dict[str, Any] | None:
    """The checked manifest, None where there is none. Raises ModelError: newer format, or damaged."""
    where, hint = f"{keys.url}/{MANIFEST}", "convert the images again with --overwrite"
    if keys.root is not None and (keys.root / MANIFEST).is_dir():
        raise ModelError(where, "is a folder where a file should be", "remove it, or convert into another folder")
    raw = keys.get(MANIFEST)
    if raw is None:
        return None
    try:
        manifest = json.loads(raw)
        newer = int(manifest["format"]) > FORMAT
        told = f"made by fastsrgan {manifest['made_by']!s:.40}, needs >= {manifest['needs']!s:.40}"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ModelError(where, "is damaged or of another program", hint) from error
    if newer:
        raise ModelError(keys.url, told, "pip install -U fastsrgan")
    try:
        if manifest.pop("digest", None) != _digest(manifest):
            raise ValueError("its digest does not fit")
        check_manifest(manifest)
    except (ValueError, RecursionError) as error:
        raise ModelError(where, f"is damaged: {error}", hint) from error
    return manifest


def write_manifest(keys: Keys, manifest: dict[str, Any]) -> int:
    """Replace the manifest and return its size. The bytes depend on its content alone."""
    text = json.dumps({**manifest, "digest": _digest(manifest)}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    keys.put(MANIFEST, text.encode())
    return len(text)


def _digest(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class WriteLock:
    """One writer of a store at a time, for as long as this object is not released.

    A folder is locked by its ``FolderLock``. Behind a URL the lock is an object that names its holder. S3 makes such an
    object for one of several writers only; where an older server cannot, two that start in the same moment are told
    apart by `check` at the latest.

    Raises ResourceError when the store is locked or its folder cannot be made.
    """

    def __init__(self, keys: Keys) -> None:
        self._keys, self._signature = keys, lock_signature()
        self._folder = FolderLock(keys.root, keys.url) if keys.root is not None else None
        if self._folder is None:
            self._take()

    def check(self) -> None:
        """Make sure that the lock behind a URL is still ours, before the manifest is replaced: ResourceError."""
        if self._keys.root is None and self._keys.get(LOCK) != self._signature:
            told = "was taken over by another conversion"
            raise ResourceError(self._keys.url, told, "let one finish, then run the other again with --resume")

    def release(self) -> None:
        """Remove the lock, and the folder where nothing else came into it."""
        if self._folder is not None:
            self._folder.release()
            return
        try:
            if self._keys.get(LOCK) == self._signature:
                self._keys.drop_one(LOCK)
        except FastsrganError as error:
            log.warning("the lock stays behind: %s", error)

    def _take(self) -> None:
        """Make the lock's object; one of a dead process of this host is removed first."""
        if self._keys.create(LOCK, self._signature):
            return
        raw = self._keys.get(LOCK)
        if raw == self._signature:  # made by an attempt whose answer got lost
            return
        judge_lock(self._keys.url, lock_holder(raw), held=False, by_process=True)
        self._keys.drop_one(LOCK)
        if not self._keys.create(LOCK, self._signature):
            judge_lock(self._keys.url, lock_holder(self._keys.get(LOCK)), held=True, by_process=True)


ARRAYS = ("image", "label", "mask", "tissues")
LABELS = {"label": {"uint8"}, "mask": {"uint8"}, "tissues": {"uint8", "uint16"}}
SPLITS = ("Train", "Test")
SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
META, SHARD, CHUNK = "zarr.json", "c/0/0/0", 64
MAX_VOXELS = 2**31
_TYPES = {"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_INNER = {"bytes", "blosc", "crc32c"}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, in words, where a manifest is not what a writer makes."""
    kinds = {"made_by": str, "needs": str, "settings": dict, "complete": bool, "subjects": dict}
    for name, kind in kinds.items():
        _demand(isinstance(manifest.get(name), kind), f"its {name} is missing or of another kind")
    root = manifest.get("root", "missing")
    _demand(root is None or _is_fingerprint(root), "its root is no fingerprint")
    for name, record in manifest["subjects"].items():
        _demand(bool(SUBJECT.fullmatch(name)) and len(name) <= 255, f"{name[:80]!r} is no subject id")
        _demand(isinstance(record, dict), f"{name} is no mapping")
        try:
            _check_subject(record)
        except (TypeError, KeyError, OverflowError, ValueError) as error:
            told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {str(error)[:80]}"
            raise ValueError(f"{name[:80]}: {told}") from error


def _check_subject(record: dict[str, Any]) -> None:
    _demand(record["split"] in SPLITS, "its split is neither Train nor Test")
    shape = record["shape"]
    _demand(isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape), "its shape")
    _demand(math.prod(shape) <= MAX_VOXELS, f"more than {MAX_VOXELS} voxels")
    affine = np.array(record["affine"], float)
    _demand(affine.shape == (4, 4) and bool(np.isfinite(affine).all()), "its affine is none")
    _demand(abs(np.linalg.det(affine[:3, :3])) > 0, "its affine is singular")
    spacing = np.array(record["spacing"], float)
    _demand(spacing.shape == (3,) and bool((np.isfinite(spacing) & (spacing > 0)).all()), "its spacing is none")
    _demand(np.allclose(spacing, spacing_of(affine), rtol=1e-3, atol=0), "its spacing is not that of its affine")
    _demand(isinstance(record["attrs"], dict), "its attributes are no mapping")
    arrays = record["arrays"]
    _demand(isinstance(arrays, dict) and set(arrays) <= set(ARRAYS), "its arrays")
    _demand("image" in arrays or "tissues" in arrays, "it has neither an image nor tissues")
    for name, array in arrays.items():
        allowed = LABELS.get(name, _TYPES)
        _demand(isinstance(array, dict) and array.get("dtype") in allowed, f"its {name} is of an unknown type")
    scaling = [arrays["image"][key] for key in ("scale", "offset")] if "image" in arrays else []
    _demand(all(type(v) in (int, float) and math.isfinite(v) for v in scaling), "its intensity scaling")
    wanted = {META, *(f"{name}/{end}" for name in arrays for end in (META, SHARD))}
    files = record["files"]
    _demand(isinstance(files, dict) and set(files) == wanted, "its files are not those of its arrays")
    _demand(all(_is_fingerprint(found) for found in files.values()), "its files have no fingerprints")


def check_array(meta: bytes, shape: tuple[int, int, int], dtype: str) -> None:
    """Raise ValueError where an array's metadata are not what a writer makes for this shape and type.

    Nothing else is handed to a library that decodes: no foreign codec, no size that the manifest does not know.
    """
    try:
        found = json.loads(meta)
        told = {key: found[key] for key in ("zarr_format", "node_type", "shape", "data_type")}
        grid, (shards,) = found["chunk_grid"], found["codecs"]
        inside = shards["configuration"]
        codecs = [codec["name"] for codec in inside["codecs"] + inside["index_codecs"]]
        cut = (grid["name"], grid["configuration"]["chunk_shape"], shards["name"], inside["chunk_shape"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("its metadata are not those of a fastsrgan store") from error
    same = {"zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": dtype}
    whole = [-(-n // CHUNK) * CHUNK for n in shape]
    fits = cut == ("regular", whole, "sharding_indexed", [CHUNK] * 3) and not found.get("storage_transformers")
    if told != same or not fits or not all(isinstance(c, str) and c in _INNER for c in codecs):
        raise ValueError("its metadata are not those that the manifest asks for")


def _is_fingerprint(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and type(value[0]) is int
        and value[0] >= 0
        and isinstance(value[1], str)
        and bool(_DIGEST.fullmatch(value[1]))
    )


def _demand(true: bool, told: str) -> None:
    if not true:
        raise ValueError(told)
