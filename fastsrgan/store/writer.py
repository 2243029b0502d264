"""Writing a store: one writer at a time, subjects in any number of threads, each of them whole or not listed.

The bytes of a store depend on its subjects alone, not on their order, the number of threads or interruptions.

How a volume's values are stored, and what is noted about them: pure functions of arrays.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan._version import __version__
from fastsrgan.core.files import LOCK, finite, mapping, need_space, parse_json, write_error
from fastsrgan.errors import FastsrganError, InputError, ModelError, ResourceError, UsageError, counted
from fastsrgan.store.codec import CHUNK, encoded, group_bytes
from fastsrgan.store.files import (
    FORMAT,
    LABELS,
    MANIFEST,
    NEEDS,
    SPLITS,
    Keys,
    WriteLock,
    read_manifest,
    write_manifest,
)
from fastsrgan.store.files import SUBJECT as _ID
from fastsrgan.store.reader import Subject, subject_of, to_float32
from fastsrgan.store.remote import fingerprint
from fastsrgan.volume.geometry import spacing_of

MARK = {"fastsrgan_format": FORMAT}  # among the attributes of every group that is ours
_LAYOUT = re.compile(r"zarr\.json|(image|label|mask|tissues)(/zarr\.json|/c/\d+/\d+/\d+)|(.*/)?[^/]*\.partial")
_TEMPORARY = re.compile(r"\.(manifest|zarr)\.tmp-.*|zarr\.[0-9a-f]+\.partial")
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
        raise UsageError("--resume and --overwrite", "exclude each other", "give one of them")
    return StoreWriter(Keys(url, read_only=False), overwrite, resume, settings or {})


class StoreWriter:
    """Takes whole subjects; use it as a context, so that the lock goes away whatever happens."""

    def __init__(self, keys: Keys, overwrite: bool, resume: bool, settings: dict[str, Any]) -> None:
        self._keys, self.url = keys, keys.url
        self._guard = threading.Lock()
        self._prepared = False
        self._there: set[str] = set()  # names below the root, so that a new one costs no listing
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
        """Whether every file of a listed subject holds what was written; behind a URL only sizes are compared.

        Raises ResourceError where a folder of it may not be read.
        """
        self._demand(subject_id, os.R_OK | os.X_OK, "cannot be read")
        files = self._manifest["subjects"][subject_id]["files"]
        sizes = self._keys.sizes(subject_id)
        if any(sizes.get(key) != size for key, (size, _) in files.items()):
            return False
        if self._keys.root is None:
            return True
        return all(fingerprint(self._keys.get(f"{subject_id}/{key}") or b"") == files[key] for key in files)

    def need_space(self, n_bytes: int) -> None:
        """Refuse to begin what the disk cannot hold: ResourceError; nothing is known of the room behind a URL."""
        if self._keys.root is not None:
            need_space(self._keys.root, n_bytes)

    def write(
        self,
        subject_id: str,
        split: str,
        image_stored: np.ndarray | None,
        scale: float,
        offset: float,
        label: np.ndarray | None,
        mask: np.ndarray | None,
        affine: np.ndarray,
        attrs: dict[str, Any],
        tissues: np.ndarray | None = None,
    ) -> Subject:
        """Write a subject and list it; one of that id is replaced. Safe from several threads.

        Parameters
        ----------
        image_stored : (X, Y, Z) integers or floats (kept as float32); intensity = stored * scale + offset. None: there
            are tissues, of which images are made
        label, mask : (X, Y, Z) uint8 or None; tissues : (X, Y, Z) uint8 or uint16 or None
        affine : (4, 4) voxel index -> world mm
        attrs : plain values

        Raises InputError for arrays or an id that cannot be stored, ResourceError when the disk is full; then nothing
        of the subject stays.
        """
        arrays = _checked(subject_id, split, image_stored, {"label": label, "mask": mask, "tissues": tissues})
        described = {"image": {"scale": float(scale), "offset": float(offset)}}
        record: dict[str, Any] = {
            "split": split,
            "shape": list(next(iter(arrays.values())).shape),
            "spacing": list(spacing_of(affine)),
            "affine": np.asarray(affine, float).tolist(),
            "attrs": finite(attrs),
            "arrays": {name: {"dtype": a.dtype.name, **described.get(name, {})} for name, a in arrays.items()},
        }
        self.need_space(sum(a.nbytes for a in arrays.values()) + 2 * CHUNK**3)  # before anything is created
        self._prepare()  # first: another thread's would take away the folders that are looked at
        self._demand(subject_id, os.R_OK | os.W_OK | os.X_OK, "cannot be replaced")  # it is still listed, and whole
        self._unlist(subject_id)
        try:
            if subject_id in self._there:
                self._keys.drop(subject_id)
            self._there.add(subject_id)
            files = encoded(MARK | record, arrays)
            self._keys.put_all({f"{subject_id}/{key}": data for key, data in files.items()})
            record["files"] = {key: fingerprint(data) for key, data in files.items()}
        except BaseException as error:
            with contextlib.suppress(OSError, FastsrganError):
                self._keys.drop(subject_id)
            if isinstance(error, OSError):
                raise write_error(error, self.url) from error
            raise
        with self._guard:
            self._manifest["subjects"][subject_id] = record
            self._publish()
        return subject_of(subject_id, record)

    def finish(self, complete: bool = True) -> None:
        """List everything and note whether the store is complete; remove what interrupted runs left."""
        self._prepare()
        keep = {MANIFEST, LOCK, "zarr.json", *self._manifest["subjects"]}
        for name in self._keys.names():
            if name not in keep and self._is_ours(name):
                self._remove(name)
        with self._guard:
            self._manifest["complete"] = complete
            self._publish(always=True)

    def close(self) -> None:
        """Give the lock back. What was begun and holds no subject is taken away before."""
        with contextlib.suppress(OSError, FastsrganError):
            if self._prepared and not self._manifest["subjects"] and not self._manifest["complete"]:
                self._clear()
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
        if overwrite:
            for subject_id in found["subjects"]:  # before any of them is gone
                self._demand(subject_id, os.R_OK | os.W_OK | os.X_OK, "cannot be replaced")
        if overwrite or not found["subjects"]:
            return fresh
        if not resume:
            count = counted(len(found["subjects"]), "subject")
            raise UsageError(self.url, f"exists, with {count}", "--resume goes on with it, --overwrite begins anew")
        if found["settings"] != settings:
            told = ", ".join(f"{k} {found['settings'].get(k)}, not {v}" for k, v in settings.items())
            raise UsageError(self.url, f"was made with {told}", "use the same settings, or --overwrite")
        return found

    def _demand(self, subject_id: str, rights: int, reason: str) -> None:
        """ResourceError for a folder of a subject that lacks rights (``os.access``); behind a URL none is known."""
        top = self._keys.root and self._keys.root / subject_id
        if not top or not top.is_dir():
            return
        for folder in (top, *(Path(where) for where, *_ in os.walk(top))):
            if not os.access(folder, rights):
                raise ResourceError(folder, reason, "check its permissions, or convert into another folder")

    def _prepare(self) -> None:
        """Before the first write: clear what is to be replaced, then an empty manifest and the root group."""
        with self._guard:
            if self._prepared:
                return
            try:
                if not self._manifest["subjects"]:
                    self._clear()
                root = group_bytes(MARK)
                if self._keys.get("zarr.json") != root:
                    self._keys.put("zarr.json", root)
                self._manifest["root"] = fingerprint(root)
                self._there = set(self._keys.names())
                self._publish(always=True)
            except OSError as error:
                raise write_error(error, self.url) from error
            self._prepared = True

    def _clear(self) -> None:
        """Remove an earlier store, its manifest first; what no writer made stays."""
        self._keys.drop_one(MANIFEST)
        for name in self._keys.names():
            if name != LOCK and self._is_ours(name):
                self._remove(name)

    def _is_ours(self, name: str) -> bool:
        """Whether something at the root was put there by a writer and holds nothing else."""
        if self._keys.root is not None:
            return _is_leftover(self._keys.root / name)
        if name == "zarr.json":
            return _is_marked(self._keys.get(name))
        below = list(self._keys.sizes(name)) if _ID.fullmatch(name) else []
        return bool(below) and _is_layout(below, self._keys.get(f"{name}/zarr.json"))

    def _remove(self, name: str) -> None:
        is_file = name == "zarr.json" if self._keys.root is None else not (self._keys.root / name).is_dir()
        if is_file:
            self._keys.drop_one(name)
        else:
            self._keys.drop(name)

    def _unlist(self, subject_id: str) -> None:
        """Before its files change, a subject leaves the manifest: readers never see it half-written."""
        with self._guard:
            if self._manifest["subjects"].pop(subject_id, None) is not None:
                self._manifest["complete"] = False
                self._publish(always=True)

    def _publish(self, always: bool = False) -> None:
        """Replace the manifest. A large one at most a tenth of the time; what is not listed yet is listed soon."""
        if not always and time.monotonic() - self._written_at < 10 * self._write_seconds:
            return
        self._lock.check()
        began = time.monotonic()
        size = write_manifest(self._keys, self._manifest)
        self._written_at = time.monotonic()
        self._write_seconds = self._written_at - began if size > _LARGE else 0.0


def _checked(
    subject_id: str, split: str, image: np.ndarray | None, others: dict[str, np.ndarray | None]
) -> dict[str, np.ndarray]:
    """The arrays by name, in the types that are stored. Raises InputError for what no store may hold."""
    if not _ID.fullmatch(subject_id) or subject_id in (MANIFEST, "zarr.json"):
        raise InputError(subject_id, "is no subject id", "letters, digits, dot, - and _, the first a letter or digit")
    if split not in SPLITS:
        raise InputError(subject_id, f"its split is {split!r}", " or ".join(SPLITS))
    first, what = (image, "image") if image is not None else (others["tissues"], "map of tissues")
    if first is None:
        raise InputError(subject_id, "has neither an image nor tissues", "one of them is needed")
    if first.ndim != 3 or 0 in first.shape:
        raise InputError(subject_id, f"its {what} has shape {first.shape}", "three axes, none empty")
    arrays = {}
    if image is not None:
        kept = image.dtype.kind in "iu"
        arrays["image"] = image.astype(image.dtype.newbyteorder("=") if kept else np.float32, copy=False)
        if not kept and not np.isfinite(arrays["image"]).all():
            raise InputError(subject_id, "its image is not finite", "replace NaN and infinities")
    for name, array in others.items():
        if array is None:
            continue
        if array.shape != first.shape or array.dtype.name not in LABELS[name]:
            told = f"its {name} is {array.dtype} {array.shape}, its {what} {first.shape}"
            raise InputError(subject_id, told, f"{' or '.join(sorted(LABELS[name]))} on the {what}'s grid for a {name}")
        arrays[name] = array
    return arrays


def _is_leftover(entry: Path) -> bool:
    """Whether something at the root of a folder was put there by a writer and holds nothing else."""
    group = entry / "zarr.json"
    if not entry.is_dir() or entry.is_symlink():
        marked = entry.name == "zarr.json" and _is_marked(_bytes_of(entry))
        return bool(_TEMPORARY.fullmatch(entry.name)) or marked
    below = [p.relative_to(entry).as_posix() for p in entry.rglob("*") if not p.is_dir() or p.is_symlink()]
    return bool(_ID.fullmatch(entry.name)) and _is_layout(below, _bytes_of(group) if group.exists() else None)


def _is_layout(below: list[str], group: bytes | None) -> bool:
    """Whether keys below a name are those of a subject, and its group, where there is one, is ours."""
    return all(_LAYOUT.fullmatch(key) for key in below) and (group is None or _is_marked(group))


def _is_marked(group: bytes | None) -> bool:
    return MARK.keys() <= mapping(parse_json(group or b"").get("attributes")).keys()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


DTYPES = ("auto", "int16", "float32")
PERCENTILES = {"p1": 0.01, "p99": 0.99, "p99.9": 0.999}


def encode(
    stored: np.ndarray, scale: float, offset: float, dtype: str
) -> tuple[np.ndarray, float, float, dict[str, Any]]:
    """Bring stored values into the type asked for; intensity = stored * scale + offset before and after.

    Returns (stored, scale, offset, facts); facts hold the step and the largest error where values were quantised.
    int16: integers whose range fits stay exact, all else is rounded to 65 536 levels between its extremes; where these
    lie on both sides of 0, or one is 0, intensity 0 stays exactly 0, so that background stays background.
    """
    if dtype == "float32":
        return to_float32(stored, scale, offset), 1.0, 0.0, {}
    if dtype == "auto" or stored.dtype in (np.int16, np.int8, np.uint8):
        return stored, scale, offset, {}
    if stored.dtype.kind in "iu":
        least, most = int(stored.min()), int(stored.max())
        if most - least <= 65535:
            shift = 0 if least >= -32768 and most <= 32767 else least + 32768
            shifted = (stored - stored.dtype.type(least)).astype(np.int32) + (least - shift)
            return shifted.astype(np.int16), scale, offset + shift * scale, {}
    values = to_float32(stored, scale, offset)
    low, high = float(values.min()), float(values.max())
    around_zero = low <= 0 <= high
    step = (high - low) / (65534 if around_zero else 65535) or abs(low) / 32768 or 1.0
    offset = (round(low / step) + 32768) * step if around_zero else low + 32768 * step
    levels = np.empty_like(values, dtype=np.int16)
    error = 0.0
    for part, level in zip(values.T, levels.T, strict=True):  # by slice: float64 of a whole volume is not needed
        level[...] = np.clip(np.rint((part - np.float64(offset)) / step), -32768, 32767)
        back = to_float32(level, step, offset)
        error = max(error, float(np.abs(back.astype(np.float64) - part).max()))
    return levels, step, offset, {"quantisation": {"step": step, "max_error": error}}


def describe(stored: np.ndarray, scale: float, offset: float) -> dict[str, Any]:
    """Bounding box of intensity > 0 as (start, stop) per axis, None when there is none; and robust statistics.

    A percentile q is the smallest intensity with at least q of all voxels at or below it.
    """
    values = stored if scale == 1 and offset == 0 else to_float32(stored, scale, offset)
    inside = np.greater(values, 0)
    plane = np.any(inside, axis=2)
    lines = (np.any(plane, axis=1), np.any(plane, axis=0), np.any(inside, axis=(0, 1)))
    hits = [np.flatnonzero(line) for line in lines]
    box = [(int(hit[0]), int(hit[-1]) + 1) for hit in hits] if plane.any() else None
    n = values.size
    ranks = [max(0, int(np.ceil(q * n)) - 1) for q in PERCENTILES.values()]
    flat = values.ravel(order="K")
    if flat.dtype.kind in "iu" and flat.dtype.itemsize <= 2:
        low = int(flat.min())
        counts = np.bincount(flat.astype(np.int32) - low)
        found = [low + int(np.searchsorted(np.cumsum(counts), rank, side="right")) for rank in ranks]
    else:
        found = np.partition(flat, ranks)[ranks].tolist()
    extremes = {"min": float(flat.min()), "max": float(flat.max()), "mean": float(flat.mean(dtype=np.float64))}
    robust = {name: float(value) for name, value in zip(PERCENTILES, found, strict=True)}
    return {"bounding_box": box, "intensity": extremes | robust}
