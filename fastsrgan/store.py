"""Volumes in one Zarr v3 store: the layout on disk and its reader (DESIGN D4). The writer is `fastsrgan.store_writer`.

Layout, ``ID`` being a subject::

    manifest.json            finished subjects only, replaced as a whole after each one; readers trust nothing else
    zarr.json                the root group
    ID/zarr.json             group, attributes as in the manifest
    ID/image/{zarr.json, c/0/0/0}    (X, Y, Z) integers as stored in the source, or float32; attributes scale, offset
    ID/label/...             (X, Y, Z) uint8, optional
    ID/mask/...              (X, Y, Z) uint8, optional

An array is one shard of 64^3 chunks (blosc-zstd with bit shuffle, crc32c). Every chunk is written, also a constant one,
so what is missing is lost and never means zeros. The manifest holds size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from fastsrgan.errors import FastsrganError, InputError
from fastsrgan.geometry import spacing_of
from fastsrgan.runtime import QUIET, Progress
from fastsrgan.store_files import Keys, read_manifest

ARRAYS = ("image", "label", "mask")
SHARD = "c/0/0/0"
CHUNK = 64
REPAIR = "`fastsrgan convert --resume` writes damaged subjects again"


@dataclass(frozen=True, eq=False)
class Subject:
    """What the manifest says of a finished subject.

    Attributes
    ----------
    split : "Train" or "Test"
    shape : (X, Y, Z) voxels
    spacing : mm per axis; affine : (4, 4) voxel index -> world mm
    attrs : source file and SHA-256, orientation, bounding box, intensity statistics, label counts, warnings
    arrays : name -> {"dtype", and for the image "scale", "offset"}: intensity = stored * scale + offset
    files : key below the subject -> (bytes, SHA-256)
    """

    id: str
    split: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    attrs: dict[str, Any]
    arrays: dict[str, dict[str, Any]]
    files: dict[str, tuple[int, str]] = field(repr=False)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along each array axis."""
        return spacing_of(self.affine)

    @property
    def has_label(self) -> bool:
        """Whether a label was converted with the image."""
        return "label" in self.arrays

    @property
    def has_mask(self) -> bool:
        """Whether a mask was converted with the image."""
        return "mask" in self.arrays

    @property
    def raw_bytes(self) -> int:
        """Size of the arrays in memory, as stored."""
        return int(np.prod(self.shape)) * sum(np.dtype(a["dtype"]).itemsize for a in self.arrays.values())

    @property
    def stored_bytes(self) -> int:
        """Size on disk."""
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True, eq=False)
class Sample:
    """One subject's arrays: image (X, Y, Z) float32, label and mask (X, Y, Z) uint8 or None."""

    id: str
    split: str
    image: np.ndarray
    label: np.ndarray | None
    mask: np.ndarray | None
    affine: np.ndarray
    spacing: tuple[float, float, float]


def open_store(url: str | os.PathLike) -> Store:
    """Open a store for reading: a folder or any URL that zarr opens (s3, gs, http, memory, ...).

    Raises InputError when there is no store, ModelError when it is of a newer format or its manifest is damaged.
    """
    return Store(url)


class Store:
    """The finished subjects of a store. Reading is safe from any number of threads and while a conversion goes on."""

    def __init__(self, url: str | os.PathLike) -> None:
        self._keys = Keys(url, read_only=True)
        self.url = self._keys.url
        self._zarr = _NothingMissing(self._keys.zarr, self.url, self._size_of)
        self.refresh()

    def refresh(self) -> None:
        """Look again at which subjects are finished."""
        manifest = read_manifest(self._keys)
        if manifest is None:
            raise InputError(self.url, "no fastsrgan store is here", "make one with `fastsrgan convert CSV STORE`")
        self.complete: bool = manifest["complete"]
        self.made_by: str = manifest["made_by"]
        self.settings: dict[str, Any] = manifest["settings"]
        self._root = manifest["root"]
        self._subjects = {name: subject_of(name, record) for name, record in manifest["subjects"].items()}

    @property
    def subjects(self) -> list[Subject]:
        """All finished subjects, ordered by id."""
        return [self._subjects[name] for name in sorted(self._subjects)]

    def subject(self, subject_id: str) -> Subject:
        """The subject of that id; InputError when there is none."""
        if subject_id not in self._subjects:
            raise InputError(self.url, f"has no subject {subject_id}", "`fastsrgan info STORE` lists them")
        return self._subjects[subject_id]

    def read(self, subject_id: str) -> Sample:
        """All arrays of a subject. Raises InputError naming subject, array and chunk where one is lost or damaged."""
        s = self.subject(subject_id)
        whole = (slice(None),) * 3
        arrays = {name: self.read_region(subject_id, name, whole) for name in s.arrays}
        return Sample(
            s.id, s.split, arrays["image"], arrays.get("label"), arrays.get("mask"), s.affine.copy(), s.spacing
        )

    def read_region(self, subject_id: str, array: str, slices: tuple[slice, slice, slice]) -> np.ndarray:
        """Part of an array, reading only the chunks it touches: float32 for the image, uint8 for label and mask."""
        s = self.subject(subject_id)
        if array not in s.arrays:
            raise InputError(self.url, f"subject {s.id} has no {array}", f"it has {', '.join(s.arrays)}")
        try:
            stored = np.asarray(self._array(s, array)[slices])
        except FastsrganError:
            raise
        except Exception as error:  # zarr, blosc and JSON each fail in their own ways on damaged bytes
            found = self._damage(s, array) or [f"{s.id}/{array}: {_words(error)}"]
            raise InputError(self.url, "; ".join(found[:3]), REPAIR) from error
        if array != "image":
            return stored
        return to_float32(stored, s.arrays["image"]["scale"], s.arrays["image"]["offset"])

    def verify(self, progress: Progress = QUIET) -> list[str]:
        """Compare every byte with the manifest: one line for each thing that is lost or damaged, none when whole."""
        found = []
        if self._root and hashlib.sha256(self._keys.get("zarr.json") or b"").hexdigest() != self._root[1]:
            found.append("zarr.json: missing or damaged")
        progress.start("verify", len(self._subjects), "subject")
        for s in self.subjects:
            for key, (_, digest) in s.files.items():
                data = self._keys.get(f"{s.id}/{key}")
                if data is not None and hashlib.sha256(data).hexdigest() == digest:
                    continue
                array = key.split("/")[0]
                if data is None:
                    found.append(f"{s.id}/{key}: missing")
                elif key.endswith(SHARD):
                    found += self._damage(s, array) or [f"{s.id}/{key}: not what was written"]
                else:
                    found.append(f"{s.id}/{key}: damaged")
            progress.advance(damaged=len(found))
        progress.finish()
        return found

    def _size_of(self, key: str) -> int | None:
        """Bytes that the manifest expects under a chunk's key."""
        subject_id, _, below = key.partition("/")
        subject = self._subjects.get(subject_id)
        return subject.files.get(below, (None, ""))[0] if subject else None

    def _array(self, s: Subject, name: str) -> zarr.Array:
        array = zarr.open_array(self._zarr, path=f"{s.id}/{name}", mode="r")
        if array.shape != s.shape or array.dtype != np.dtype(s.arrays[name]["dtype"]):
            raise ValueError(f"is {array.dtype} {array.shape}, the manifest says {s.arrays[name]['dtype']} {s.shape}")
        return array

    def _damage(self, s: Subject, name: str) -> list[str]:
        """Which chunks of an array cannot be decoded, by position in the grid of 64^3 chunks."""
        try:
            array = self._array(s, name)
            if len(self._keys.get(f"{s.id}/{name}/{SHARD}") or b"") != s.files[f"{name}/{SHARD}"][0]:
                return [f"{s.id}/{name}: its chunks are lost or cut short"]
        except Exception as error:
            return [f"{s.id}/{name}: {_words(error)}"]
        bad = []
        grid = [range(-(-n // CHUNK)) for n in s.shape]
        for position in itertools.product(*grid):
            try:
                array[tuple(slice(i * CHUNK, (i + 1) * CHUNK) for i in position)]
            except Exception as error:
                bad.append((position, _words(error)))
        if len(bad) > 1 and len(bad) == len(list(itertools.product(*grid))):
            return [f"{s.id}/{name}: no chunk can be read: {bad[0][1]}"]
        return [f"{s.id}/{name}: chunk {position} {words}" for position, words in bad]


class _NothingMissing(WrapperStore[ZarrStore]):
    """A store in which a lost or shortened chunk file is an error: zarr itself reads it as the fill value."""

    def __init__(self, store: ZarrStore, url: str, size_of: Callable[[str], int | None]) -> None:
        super().__init__(store)
        self._url, self._size_of = url, size_of
        self._seen: set[tuple[str, int]] = set()

    def with_read_only(self, read_only: bool = False) -> _NothingMissing:
        return _NothingMissing(self._store.with_read_only(read_only), self._url, self._size_of)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        found = await self._store.get(key, prototype, byte_range)
        if not key.endswith(f"/{SHARD}"):
            return found
        expected = self._size_of(key)
        if found is None or expected is None:
            raise InputError(self._url, f"{key}: missing", REPAIR)
        if byte_range is not None and (key, expected) in self._seen:
            return found
        size = len(found) if byte_range is None else await self._store.getsize(key)
        if size != expected:
            raise InputError(self._url, f"{key}: {size} bytes where {expected} were written", REPAIR)
        self._seen.add((key, expected))
        return found


def subject_of(name: str, record: dict[str, Any]) -> Subject:
    """A manifest's record of one subject as an object."""
    nx, ny, nz = record["shape"]
    files = {key: (int(size), str(digest)) for key, (size, digest) in record["files"].items()}
    affine = np.array(record["affine"], float)
    return Subject(name, record["split"], (nx, ny, nz), affine, record["attrs"], record["arrays"], files)


def to_float32(stored: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """Stored integers or floats -> intensities, float32: stored * scale + offset, computed in float64."""
    if scale == 1 and offset == 0:
        return stored.astype(np.float32, copy=False)
    if stored.flags.f_contiguous and not stored.flags.c_contiguous:
        return to_float32(stored.T, scale, offset).T
    out = np.empty(stored.shape, np.float32)
    for part, plane in zip(out, stored, strict=True):  # by plane: a float64 copy of a whole volume is not needed
        part[...] = plane * np.float64(scale) + offset
    return out


def _words(error: Exception) -> str:
    """An error of zarr or a codec in one short line."""
    text = error.reason if isinstance(error, FastsrganError) else str(error)
    if "checksum" in text:
        return "is damaged (crc32c)"
    return " ".join(text.split())[:160] or type(error).__name__
