"""Volumes in one Zarr v3 store: the layout on disk and its reader (decision 014). `fastsrgan.store.writer` writes.

Layout, ``ID`` being a subject::

    manifest.json            finished subjects only, replaced as a whole after each one; readers trust nothing else
    zarr.json                the root group
    ID/zarr.json             group, attributes as in the manifest
    ID/image/{zarr.json, c/0/0/0}    (X, Y, Z) integers as stored in the source, or float32; attributes scale, offset
    ID/label/...             (X, Y, Z) uint8, optional
    ID/mask/...              (X, Y, Z) uint8, optional
    ID/tissues/...           (X, Y, Z) uint8 or uint16, optional; a subject may have these and no image

An array is one shard of 64^3 chunks (blosc-zstd with bit shuffle, crc32c). Every chunk is written, also a constant one,
so what is missing is lost and never means zeros. The manifest holds size and SHA-256 of every file; an array that is
read whole is compared with them, in a folder and behind a URL: a reader gets what was listed, or an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.errors import FastsrganError, InputError, ResourceError
from fastsrgan.store.codec import (
    CHUNK,
    META,
    REPAIR,
    SHARD,
    NothingMissing,
    damaged_chunks,
    decode,
    decode_ranges,
    decode_region,
    in_words,
    pick_reader,
)
from fastsrgan.store.files import Keys, check_array, read_manifest
from fastsrgan.store.remote import fingerprint
from fastsrgan.volume.geometry import spacing_of

DAMAGED = "damaged"
_T = TypeVar("_T")


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
    def has_image(self) -> bool:
        """Whether there is an image; else one is made of the tissues at each visit (``observation.synthesis``)."""
        return "image" in self.arrays

    @property
    def has_tissues(self) -> bool:
        """Whether a map of many structures was converted with it."""
        return "tissues" in self.arrays

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
    """One subject's arrays, (X, Y, Z) or None: image float32, label and mask uint8, tissues uint8 or uint16."""

    id: str
    split: str
    image: np.ndarray | None
    label: np.ndarray | None
    mask: np.ndarray | None
    affine: np.ndarray
    spacing: tuple[float, float, float]
    tissues: np.ndarray | None = None


def open_store(url: str | os.PathLike, reader: str | None = None) -> Store:
    """Open a store for reading: a folder or any URL that zarr opens (s3, gs, http, memory, ...).

    ``reader`` is "zarr" or "tensorstore"; None takes FASTSRGAN_READER or what is installed (`fastsrgan.store.codec`).

    Raises InputError when there is no store, ModelError when it is of a newer format or its manifest is damaged,
    ResourceError when object storage does not answer; so do all methods (`fastsrgan.store.remote`).
    """
    return Store(url, reader)


class Store:
    """The finished subjects of a store. Reading is safe from any number of threads and while a conversion goes on."""

    def __init__(self, url: str | os.PathLike, reader: str | None = None) -> None:
        self._keys = Keys(url, read_only=True)
        self.url = self._keys.url
        self.reader = pick_reader(reader)
        self._ranges = NothingMissing(self._keys.zarr, self.url, self._listed)
        self.refresh()

    def refresh(self) -> None:
        """Look again at which subjects are finished."""
        manifest = read_manifest(self._keys)
        if manifest is None:
            raise InputError(self.url, self._keys.why_none(), "make one with `fastsrgan convert CSV STORE`")
        self.complete: bool = manifest["complete"]
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
        return self._as_listed(subject_id, self._sample)

    def read_region(self, subject_id: str, array: str, slices: tuple[slice, slice, slice]) -> np.ndarray:
        """Part of an array, reading only the chunks it touches: float32 for the image, whole numbers for the others."""

        def part(s: Subject) -> np.ndarray:
            if array not in s.arrays:
                raise InputError(self.url, f"subject {s.id} has no {array}", f"it has {', '.join(s.arrays)}")
            spans = [slice_.indices(n) for slice_, n in zip(slices, s.shape, strict=True)]
            if any(step < 1 for *_, step in spans):
                raise ValueError("a region's slices go forward")
            if spans == [(0, n, 1) for n in s.shape]:
                return self._whole(s, [array])[array]
            return self._intensities(s, array, self._part(s, array, spans))

        return self._as_listed(subject_id, part)

    def verify(self, progress: Progress = QUIET) -> list[str]:
        """Compare every byte with the manifest: one line for each thing that is lost, damaged or, in a folder, may not
        be read, none when whole."""
        data, found = self._readable([META]) if self._root else ([], [])
        if data and fingerprint(data[0] or b"") != self._root:
            found.append(f"{META}: missing or damaged")
        progress.start("verify", len(self._subjects), "subject")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="verify") as pool:
            pending = [pool.submit(self._verified, s) for s in self.subjects]
            try:
                for future in pending:
                    found += future.result()
                    progress.advance(damaged=len(found))
            finally:
                for future in pending:
                    future.cancel()
        progress.finish()
        return found

    def _as_listed(self, subject_id: str, work: Callable[[Subject], _T]) -> _T:
        """``work`` of a subject; once more where it fails because a conversion has written the subject anew."""
        s = self.subject(subject_id)
        try:
            return work(s)
        except InputError:
            manifest = read_manifest(self._keys)
            record = manifest["subjects"].get(subject_id) if manifest else None
            now = subject_of(subject_id, record) if record else s
            if now.files == s.files:
                raise
            self._subjects[subject_id] = now
            return work(now)

    def _sample(self, s: Subject) -> Sample:
        arrays = self._whole(s, list(s.arrays))
        image, label, mask, tissues = (arrays.get(name) for name in ("image", "label", "mask", "tissues"))
        return Sample(s.id, s.split, image, label, mask, s.affine.copy(), s.spacing, tissues)

    def _whole(self, s: Subject, names: list[str]) -> dict[str, np.ndarray]:
        """Whole arrays, all their files asked for at once and compared with the manifest."""
        data = self._files(s, names)
        arrays = {}
        for name, meta, shard in zip(names, data[::2], data[1::2], strict=True):
            found = self._faults(s, name, meta, shard)
            if found:
                raise InputError(self.url, "; ".join(found[:3]), REPAIR)
            try:
                check_array(meta or b"", s.shape, s.arrays[name]["dtype"])
                stored = decode(self.reader, {META: meta or b"", SHARD: shard or b""})
                if stored.shape != s.shape or stored.dtype != np.dtype(s.arrays[name]["dtype"]):
                    raise ValueError(f"is {stored.dtype} {stored.shape}, the manifest says otherwise")
            except MemoryError:
                raise
            except Exception as error:  # the files are as they were written: of another program or version
                raise InputError(self.url, f"{s.id}/{name}: {in_words(error)}", REPAIR) from error
            arrays[name] = self._intensities(s, name, stored)
        return arrays

    def _part(self, s: Subject, name: str, spans: list[tuple[int, int, int]]) -> np.ndarray:
        """Part of an array as stored; of the shard's bytes only the index and the chunks that are touched are read."""
        # Libraries differ in negative indices and steps: they get neither.
        region = tuple(slice(start, max(start, stop)) for start, stop, _ in spans)
        meta = self._keys.get(f"{s.id}/{name}/{META}")
        told = _fault(s, f"{name}/{META}", meta)
        if told:
            raise InputError(self.url, f"{s.id}/{name}/{META}: {told}", REPAIR)
        try:
            check_array(meta or b"", s.shape, s.arrays[name]["dtype"])
            if self.reader == "tensorstore" and self._keys.root is not None:
                folder = self._keys.root / s.id / name
                if (folder / SHARD).stat().st_size != s.files[f"{name}/{SHARD}"][0]:
                    raise ValueError("another size")
                found = decode_region(folder, region)
            else:
                found = decode_ranges(self._ranges, f"{s.id}/{name}", region)
        except (FastsrganError, MemoryError):
            raise
        except Exception as error:  # tensorstore, zarr, blosc and JSON each fail in their own ways on damaged bytes
            faults = self._faults(s, name, *self._files(s, [name]))
            told = "; ".join(faults[:3]) or f"{s.id}/{name}: {in_words(error)}"
            raise InputError(self.url, told, REPAIR) from error
        return found[tuple(slice(None, None, step) for *_, step in spans)]

    def _verified(self, s: Subject) -> list[str]:
        """What is wrong with a subject's files."""
        data, found = self._readable([f"{s.id}/{META}"])
        if data and (wrong := _fault(s, META, data[0])):
            found.append(f"{s.id}/{META}: {wrong}")
        for name in s.arrays:
            data, refused = self._readable([f"{s.id}/{name}/{end}" for end in (META, SHARD)])
            found += refused
            if data:
                found += self._faults(s, name, *data) or _schema_fault(s, name, data[0] or b"")
        return found

    def _readable(self, keys: list[str]) -> tuple[list[bytes | None], list[str]]:
        """What lies under some keys; of a folder that keeps one of them from us nothing, and a line for each such."""
        try:
            return self._keys.get_all(keys), []
        except ResourceError:
            if self._keys.root is None:  # all of a storage that does not answer is asked once
                raise
        refused = []
        for key in keys:
            try:
                self._keys.get(key)
            except ResourceError as error:
                refused.append(f"{key}: {error.reason}")
        return [], refused

    def _files(self, s: Subject, names: list[str]) -> list[bytes | None]:
        """META and SHARD of each array, in one go."""
        return self._keys.get_all([f"{s.id}/{name}/{end}" for name in names for end in (META, SHARD)])

    def _faults(self, s: Subject, name: str, meta: bytes | None, shard: bytes | None) -> list[str]:
        """What is wrong with an array's files, chunk by chunk where its shard holds other bytes than were written."""
        where = f"{s.id}/{name}"
        told, wrong = _fault(s, f"{name}/{META}", meta), _fault(s, f"{name}/{SHARD}", shard)
        found = [f"{where}/{META}: {told}"] if told else []
        if wrong == DAMAGED and not told:
            chunks = damaged_chunks({META: meta or b"", SHARD: shard or b""}, s.shape)
            return [f"{where}: {told}" for told in chunks] or [f"{where}/{SHARD}: not what was written"]
        return found + ([f"{where}/{SHARD}: {wrong}"] if wrong else [])

    def _intensities(self, s: Subject, name: str, stored: np.ndarray) -> np.ndarray:
        if name != "image":
            return stored
        return to_float32(stored, s.arrays["image"]["scale"], s.arrays["image"]["offset"])

    def _listed(self, key: str) -> tuple[int, int] | None:
        """Bytes that the manifest expects under a chunk file's key, and how many chunks are in it."""
        subject_id, _, below = key.partition("/")
        subject = self._subjects.get(subject_id)
        if subject is None or below not in subject.files:
            return None
        return subject.files[below][0], math.prod(-(-n // CHUNK) for n in subject.shape)


def _fault(s: Subject, key: str, data: bytes | None) -> str:
    """What is wrong with the bytes under a key of a subject, "" where they are what was written."""
    size, digest = s.files[key]
    if data is None:
        return "missing"
    if len(data) != size and key.endswith(SHARD):
        return f"{len(data)} bytes where {size} were written"
    return "" if fingerprint(data) == [size, digest] else DAMAGED


def _schema_fault(s: Subject, name: str, meta: bytes) -> list[str]:
    """What an array's metadata say that is not what the manifest says, though they are what was listed."""
    try:
        check_array(meta, s.shape, s.arrays[name]["dtype"])
    except ValueError as error:
        return [f"{s.id}/{name}/{META}: {error}"]
    return []


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
