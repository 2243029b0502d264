"""A table of images and labels -> a store: all is checked first, then volumes are written in parallel.

Threads suffice: unpacking, hashing, compressing and NumPy run outside Python's lock.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastsrgan.core.places import recorded
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.data.settings_check import data_warnings
from fastsrgan.errors import FastsrganError, InputError, PartialFailure, UsageError, counted, some
from fastsrgan.io import labels
from fastsrgan.io import nifti as images
from fastsrgan.io.formats import examine
from fastsrgan.io.nifti_voxels import NiftiFile
from fastsrgan.io.tables import Fault, TableRow, read_table, table_error, told_by_line
from fastsrgan.store.reader import Subject, to_float32
from fastsrgan.store.writer import DTYPES, StoreWriter, create_store, describe, encode
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.oddities import odd_intensities
from fastsrgan.volume.placement import axis_codes

log = logging.getLogger("fastsrgan")

_COLUMNS = {"image": "HR_image", "label": "Label_image", "mask": "Mask_image", "tissues": "Tissue_image"}
LARGEST = {"label": 255, "mask": 255, "tissues": 32767}  # of their values
_KINDS = {"label": "label", "mask": "mask", "tissues": "label map"}  # as messages call them
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class _Conversion:
    """A row that was found good: SHA-256 of each of its files, the image's voxels and stored type.

    Without an image, those of the tissues.
    chosen : structures of the label, the first is what is learned; none: it is taken as it is
    absent : values of the choice, of all structures together, that the label map holds nowhere
    """

    row: TableRow
    sources: dict[str, dict[str, str]]
    voxels: int
    dtype: np.dtype
    chosen: tuple[labels.Structure, ...] = ()
    absent: tuple[int, ...] = ()

    @property
    def classes(self) -> list[int] | None:
        """The values of the label that are the structure; None: it is taken as it is."""
        return sorted(self.chosen[0].values) if self.chosen else None

    @property
    def structures(self) -> tuple[labels.Structure, ...]:
        """Those of several; the mask holds 1, 2, ... where they are."""
        return self.chosen if len(self.chosen) > 1 else ()

    def bytes_below(self) -> int:
        """About what the row takes on disk: not more than in memory, nor than the packed source files."""
        raw = self.voxels * (self.dtype.itemsize + len(self.sources) - 1)
        return min(raw, sum(os.path.getsize(source["path"]) for source in self.sources.values()))


def convert(
    csv: str | os.PathLike,
    store_url: str | os.PathLike,
    *,
    workers: int | None = None,
    dtype: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    base_path: str | None = None,
    label_classes: str | Sequence[str] | None = None,
    label_names: str | os.PathLike | None = None,
    binary: bool = False,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Convert the rows of a training table into a store. The same table gives the same bytes, however it was reached.

    Parameters
    ----------
    csv : see `fastsrgan.io.tables.read_table`, also for ``base_path``
    workers : threads; default one a core, at most 8
    dtype : "auto" keeps integers as stored and makes floats float32; "int16" quantises floats with an exact zero and
        records the largest error; "float32" applies the scaling of integers
    resume : keep subjects that are finished, undamaged and whose files have not changed
    overwrite : begin anew; an existing store stays until the first new volume is ready
    label_classes, label_names : which values of the labels are the structure, and a lookup table of names, see
        `labels.structure`; a row's own ``Label_classes`` comes first. The store then holds 1 for them and 0 elsewhere.
        Of several structures the first is the label, and the mask holds 1, 2, ... for each, for ``fit_mask``
    binary : refuse a label of other values than 0 and 1 of which nothing was chosen, which training does not take

    Returns
    -------
    Counts (``subjects`` listed, ``converted``, ``kept``), ``raw_bytes`` and ``stored_bytes`` of the whole store,
    ``ratio``, ``seconds``, ``volumes_per_s``, ``mb_per_s`` (of what was converted) and ``warnings`` per subject.

    Raises
    ------
    UsageError : the store exists and neither ``resume`` nor ``overwrite`` is given, or other settings
    InputError : every fault of the table, the headers and the labels, before anything is written; or no row is good
    PartialFailure : images that turned out damaged; all others are in the store
    ResourceError : no space, or another conversion writes to the store
    """
    if dtype not in DTYPES:
        raise UsageError("--dtype", f"{dtype!r} is unknown", f"one of {', '.join(DTYPES)}")
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise UsageError("--workers", f"{workers} threads", "1 or more")
    with create_store(store_url, overwrite=overwrite, resume=resume, settings={"dtype": dtype}) as writer:
        rows = read_table(csv, base_path=base_path)
        if label_names is not None and not label_classes and not any(row.classes for row in rows):
            reason = "has no use: neither --label-classes nor the column Label_classes names a structure"
            raise UsageError("--label-names", reason, "leave it out, or choose with one of them")
        before = writer.finished
        inspect = functools.partial(_inspect, choice=(label_classes, label_names), binary=binary)
        jobs = _check(csv, rows, before, workers, progress, inspect)
        todo, kept = _divide(jobs, before, writer, workers)
        writer.need_space(sum(job.bytes_below() for job in todo))
        began = time.monotonic()
        done, failed = _run(todo, writer, dtype, workers, progress)
        seconds = time.monotonic() - began
        if failed and not done and not kept:
            raise table_error(Path(csv), [(job.row.line, error) for job, error in failed])
        writer.finish(complete=not failed)
        listed = dict(sorted(writer.finished.items()))  # as training lists them, whatever was ready first
    _strangers(store_url, listed, jobs)
    if failed:
        told = told_by_line([(job.row.line, error) for job, error in failed])
        reason = f"{len(failed)} of {len(jobs)} subjects failed, the others are in {store_url}: {told}"
        raise PartialFailure(csv, reason, "correct them and run again with --resume")
    return _summary(store_url, listed, done, kept, seconds)


def _check(
    csv: str | os.PathLike,
    rows: list[TableRow],
    before: dict[str, Subject],
    workers: int,
    progress: Progress,
    inspect: Callable[[TableRow], tuple[_Conversion | None, list[Fault]]],
) -> list[_Conversion]:
    """Look at every header, label and mask, hash every file; one error for all faults."""
    jobs: list[_Conversion] = []
    faults: list[Fault] = []
    progress.start("check", len(rows), "subject")
    with contextlib.closing(_parallel(inspect, rows, workers)) as results:
        for _, (job, found) in results:
            faults += found
            jobs += [job] if job else []
            progress.advance(faults=len(faults))
    progress.finish()
    jobs.sort(key=lambda job: job.row.line)
    faults += _conflicts(jobs, before)
    if faults:
        raise table_error(Path(csv), faults)
    labels.refuse_lost((job.row.label, job.chosen, job.absent) for job in jobs if job.row.label)
    return jobs


def _conflicts(jobs: list[_Conversion], before: dict[str, Subject]) -> list[Fault]:
    """One image in both splits under two names, in the table or in the store; a name that the store has otherwise."""
    faults: list[Fault] = []
    named = {job.row.subject for job in jobs}
    kept = [s for s in before.values() if s.id not in named and "source" in s.attrs]
    first = {_main(s.attrs["source"])["sha256"]: (s.split, f"subject {s.id} in the store") for s in kept}
    for job in jobs:
        row, image = job.row, _main(job.sources)
        split, twin = first.setdefault(image["sha256"], (row.base, f"{row.image.name} at line {row.line}"))
        if split != row.base:
            told = f"{row.image.name} holds the same image as {twin}, one is in Train and one in Test"
            faults.append((row.line, told))
        known = _main(before[row.subject].attrs.get("source", {}), image) if row.subject in before else image
        if known["sha256"] != image["sha256"] and known["path"] != image["path"]:
            faults.append((row.line, f"subject {row.subject} is in the store already, made from {known['path']}"))
    return faults


def _main(sources: dict[str, dict[str, str]], other: dict[str, str] | None = None) -> dict[str, str]:
    """The file that a subject is known by: its image, or its tissues where it has none."""
    return sources.get("image") or sources.get("tissues") or other or {}


def _inspect(
    row: TableRow, choice: tuple[str | Sequence[str] | None, str | os.PathLike | None], binary: bool = False
) -> tuple[_Conversion | None, list[Fault]]:
    faults: list[Fault] = []
    sources = {}
    absent: tuple[int, ...] = ()
    structures: list[labels.Structure] = []
    like: Volume | None = None
    header = None
    own = row.image if row.has_image else None
    for name, path in (("image", own), ("tissues", row.tissues), ("label", row.label), ("mask", row.mask)):
        if path is None:
            continue
        try:
            found = _one_volume(path)
            if header is None:
                header = found
                like = Volume(np.broadcast_to(np.uint8(0), header.shape), header.affine, (), header.meta)
            if name != "image":
                chosen = labels.choices(row.classes, choice[0]) if name == "label" else []
                structures = labels.structures(chosen, path, choice[1]) if chosen else structures
                labels.refuse_overlap(structures)
                if len(structures) > 1 and row.mask is not None:
                    reason = (
                        "and several structures of a label are not taken together: both would be the mask's classes"
                    )
                    raise InputError(row.mask, reason, "leave Mask_image empty, or choose one structure")
                values = frozenset().union(*(one.values for one in structures)) if chosen else None
                read = images.load_label(path, like, largest=LARGEST[name], classes=values, kind=_KINDS[name])
                absent = tuple(read.meta["absent"]) or absent
                if binary and name == "label" and not chosen and (others := set(read.meta["values"]) - {0, 1}):
                    held = ", ".join(map(str, sorted(others)[: labels.SHOWN]))
                    way = labels.way_out(read.meta["values"])
                    raise InputError(path, f"the label holds other values than 0 and 1, also {held}", way)
            sources[name] = {"path": recorded(path), "sha256": images.sha256(path)}
        except FastsrganError as error:
            what, reason = error.what, error.reason
            if isinstance(error, UsageError):  # of an option, about this file
                what, reason = str(path), f"{error.what}: {error.reason}"
            faults.append((row.line, InputError(f"{_COLUMNS[name]} {what}", reason, error.hint)))
    if faults or header is None:
        return None, faults
    return _Conversion(row, sources, header.voxels, header.dtype, tuple(structures), absent), []


def _listed(structures: Sequence[labels.Structure]) -> list[list[Any]]:
    """[name, values] of each, as the manifest keeps them."""
    return [[one.name, sorted(one.values)] for one in structures]


def classes_of(label: Path, like: Volume, structures: Sequence[labels.Structure]) -> np.ndarray:
    """(X, Y, Z) uint8: 1, 2, ... where the first, second, ... structure is, 0 elsewhere. Raises as `load_label`."""
    classes = np.zeros(like.data.shape, np.uint8)
    for number, one in enumerate(structures, 1):
        classes[images.load_label(label, like, classes=one.values).data > 0] = number
    return classes


def _one_volume(path: Path) -> NiftiFile:
    """A header that was looked at. Raises InputError also for a series: a table cannot choose a volume of it."""
    header = examine(path, images.MAX_VOXELS)
    if header.volumes > 1:
        reason = f"is a 4-D image with {header.volumes} volumes and one is needed"
        raise InputError(path, reason, "split the series into one file a volume and name one")
    return header


def _divide(
    jobs: list[_Conversion], before: dict[str, Subject], writer: StoreWriter, workers: int
) -> tuple[list[_Conversion], list[_Conversion]]:
    """(to convert, to keep): kept is what is listed, from these very files, and undamaged."""
    todo, kept = [], []
    listed = [job for job in jobs if job.row.subject in before]
    whole = _parallel(lambda job: writer.intact(job.row.subject), listed, workers)
    intact = {job.row.subject: undamaged for job, undamaged in whole}
    for job in jobs:
        known = before.get(job.row.subject)
        if known is None:
            todo.append(job)
            continue
        hashes = {name: source["sha256"] for name, source in known.attrs.get("source", {}).items()}
        chosen = known.attrs.get("label_classes") == job.classes
        chosen &= known.attrs.get("structures", []) == _listed(job.structures)
        same = chosen and known.split == job.row.base and hashes == {n: s["sha256"] for n, s in job.sources.items()}
        if same and intact[job.row.subject]:
            kept.append(job)
            continue
        why = "is damaged in the store" if same else "has changed files, another split or other label classes"
        log.warning("%s %s: converted again", job.row.subject, why)
        todo.append(job)
    return todo, kept


def _run(
    jobs: list[_Conversion], writer: StoreWriter, dtype: str, workers: int, progress: Progress
) -> tuple[list[Subject], list[tuple[_Conversion, FastsrganError]]]:
    """Convert; an image that cannot be used is set aside, anything else that fails stops all."""
    done: list[Subject] = []
    failed: list[tuple[_Conversion, FastsrganError]] = []

    def one(job: _Conversion) -> Subject | InputError:
        try:
            return _convert(job, writer, dtype)
        except InputError as error:
            return error

    began, raw = time.monotonic(), 0
    progress.start("convert", len(jobs), "volume")
    try:
        with contextlib.closing(_parallel(one, jobs, workers)) as results:
            for job, result in results:
                if isinstance(result, InputError):
                    failed.append((job, result))
                else:
                    done.append(result)
                    raw += result.raw_bytes
                pace = raw / 1e6 / max(time.monotonic() - began, 1e-9)
                progress.advance(mb_per_s=pace, failed=len(failed))
    except BaseException:
        with contextlib.suppress(OSError, FastsrganError):
            writer.finish(complete=False)
        raise
    finally:
        progress.finish()
    failed.sort(key=lambda pair: pair[0].row.line)
    return done, failed


def _parallel(function: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Generator[tuple[_T, _R], None, None]:
    """(item, result) as they are ready. The first exception, or an interrupt, drops what has not begun."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        futures: dict[Future[_R], _T] = {pool.submit(function, item): item for item in items}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _convert(job: _Conversion, writer: StoreWriter, dtype: str) -> Subject:
    row = job.row
    if row.has_image:
        stored, scale, offset, volume = images.load_stored(row.image)
        stored, scale, offset, quantised = encode(stored, scale, offset, dtype)
    else:
        volume = images.load_label(row.image, largest=LARGEST["tissues"])
        stored, scale, offset, quantised = volume.data, 1.0, 0.0, {}
    facts = describe(stored, scale, offset)
    if not row.has_image:
        del facts["intensity"]
    attrs: dict[str, Any] = {
        "source": job.sources,
        "source_dtype": volume.meta["stored_dtype"],
        "orientation": axis_codes(volume.affine),
        **facts,
        **quantised,
    }
    warnings = [*volume.warnings, *odd_intensities(to_float32(stored, scale, offset), compressed=False)]
    if attrs["bounding_box"] is None and stored.min() == stored.max():  # training moves others up by their minimum
        raise InputError(row.image, "no voxel is above 0", "there is nothing to learn from it")
    others: dict[str, np.ndarray | None] = {"label": None, "mask": None, "tissues": None}
    for name, path in (("label", row.label), ("mask", row.mask), ("tissues", row.tissues)):
        if path is not None:
            taken = job.classes if name == "label" else None
            other = images.load_label(path, volume, largest=LARGEST[name], classes=taken, kind=_KINDS[name])
            others[name] = other.data
            counts = np.bincount(other.data.ravel(order="K"))
            attrs[f"{name}_counts"] = {str(value): int(counts[value]) for value in np.flatnonzero(counts)}
            warnings += [f"{name}: {text}" for text in other.warnings]
    if job.structures and row.label is not None:
        others["mask"] = classes = classes_of(row.label, volume, job.structures)
        counts = np.bincount(classes.ravel(order="K"), minlength=len(job.structures) + 1)
        attrs["mask_counts"] = {str(value): int(n) for value, n in enumerate(counts)}
        attrs["structures"] = _listed(job.structures)
        absent = [one.name for one, n in zip(job.structures, counts[1:], strict=True) if not n]
        warnings += [f"label: holds nothing of {', '.join(absent)}"] if absent else []
    if job.chosen:
        attrs["label_classes"] = job.classes
        attrs |= {"label_absent": list(job.absent)} if job.absent else {}
        attrs |= {"label_name": job.chosen[0].called} if job.chosen[0].called else {}
    values = list(attrs.get("label_counts", {}))
    if set(values) - {"0", "1"}:  # classes of --fit-mask are the mask's
        held = ", ".join(values[:10]) + (f" and {counted(len(values) - 10, 'more value')}" if len(values) > 10 else "")
        way = labels.way_out([int(value) for value in values])
        warnings.append(f"label: holds {held}; training wants 1 in the structure and 0 outside: {way}")
    attrs["warnings"] = warnings
    image, (label, mask, tissues) = stored if row.has_image else None, others.values()
    if tissues is not None and tissues.max() <= 255:
        tissues = tissues.astype(np.uint8)
    return writer.write(row.subject, row.base, image, scale, offset, label, mask, volume.affine, attrs, tissues)


def _strangers(store_url: str | os.PathLike, listed: dict[str, Subject], jobs: list[_Conversion]) -> None:
    others = sorted(set(listed) - {job.row.subject for job in jobs})
    if others:
        what = counted(len(others), "subject is not in this table and was", "subjects are not in this table and were")
        log.warning("%s: %s kept (%s)", store_url, what, some(others))


def _summary(
    store_url: str | os.PathLike,
    listed: dict[str, Subject],
    done: list[Subject],
    kept: list[_Conversion],
    seconds: float,
) -> dict[str, Any]:
    raw, size = (sum(getattr(s, name) for s in listed.values()) for name in ("raw_bytes", "stored_bytes"))
    new = sum(s.raw_bytes for s in done)
    return {
        "store": os.fspath(store_url),
        "subjects": len(listed),
        "converted": len(done),
        "kept": len(kept),
        "raw_bytes": raw,
        "stored_bytes": size,
        "ratio": raw / max(size, 1),
        "seconds": seconds,
        "volumes_per_s": len(done) / seconds if seconds else None,
        "mb_per_s": new / 1e6 / seconds if seconds else None,
        "warnings": data_warnings(listed.values()),
    }
