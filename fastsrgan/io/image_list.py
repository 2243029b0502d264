"""Which images a user means: files, lists, DICOM folders, and folders full of image files; and what each is called."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsrgan.core.files import read_json, real, walk_files
from fastsrgan.errors import FastsrganError, UsageError, counted, one_line, some
from fastsrgan.io import any_image, bids, dicom, formats
from fastsrgan.io import nifti as images
from fastsrgan.io import tables as table
from fastsrgan.io.dicom_header import read_frames

log = logging.getLogger("fastsrgan")

LISTS = (".txt", *table.LIST_TABLES)
NAMED = 3  # images of a folder that are told by name
BESIDE = (".json", ".tsv", ".png", ".html", ".csv")  # what lies beside images and results


@dataclass(frozen=True)
class Image:
    """An image, and the name of its results below the output folder: its own, or sub/folder/name out of a folder.

    series : of a DICOM folder, the one that is meant
    """

    path: Path
    name: str
    series: str | None = None


def find_images(
    inputs: str | os.PathLike | Sequence[str | os.PathLike], out: str | os.PathLike, series: str | None = None
) -> list[Image]:
    """Images named directly, by lists, and in folders, in that order; those of a folder by name.

    A folder with an image file in it or below stands for all of them, whatever else it holds; results of an earlier
    call and hidden files are left out. Any other folder, and any for which a series is named, is a DICOM image.

    Raises UsageError for none, for two that would share their results, and for a series of what is no DICOM; InputError
    for a list that cannot be read.
    """
    found: list[Image] = []
    for item in map(Path, [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs):
        for path in table.read_list(item) if item.suffix.lower() in LISTS else [item]:
            inside = _inside(path, Path(out)) if series is None and os.path.isdir(path) else []
            any_image.refuse_series(path, series)
            found += inside or [Image(path, any_image.stem(path, series), series)]
    if not found:
        reason = "no image given"
        raise UsageError("input", reason, "name image files, folders of them, DICOM folders, or lists of these")
    by_name: dict[str, Path] = {}
    once: list[Image] = []
    clashes: list[tuple[Path, Path]] = []
    for image in _without_slices(found) if len(found) > 1 else found:
        other = by_name.setdefault(image.name, image.path)
        if other is image.path:
            once.append(image)
        elif real(other) == real(image.path):
            log.warning("%s: named more than once, taken once", image.path)
        else:
            clashes.append((image.path, other))
    if clashes:
        path, other = clashes[0]
        others = some([one_line(str(path)) for path, _ in clashes[1:]], NAMED)
        more = f", and so would {len(clashes) - 1} more: {others}" if others else ""
        hint = "outputs are named after the image: use one output folder for each"
        if not dicom.is_dicom(path):  # a folder of several DICOM series is no list of them
            hint += ", or name the folder that holds both"
        if path.parent == other.parent:
            hint = "their names differ in the ending alone: name the one that you mean, or rename one"
        raise UsageError(path, f"would write to the same files as {one_line(str(other))}{more}", hint)
    return once


def _without_slices(found: list[Image]) -> list[Image]:
    """Of DICOM slices that are named one by one, as ``series/*.dcm`` does, the first of each series: it stands for all
    of them."""
    first: dict[Hashable, Image] = {}
    keys = [_series_of(image) for image in found]
    kept = [i for i, key in zip(found, keys, strict=True) if key is None or first.setdefault(key, i) is i]
    for key, n in Counter(key for key in keys if key is not None).items():
        if n > 1:
            log.warning("%s: one image is made of its series, of which %d slices are named", first[key].path, n)
    return kept


def _series_of(image: Image) -> Hashable | None:
    """What is the same of all slices of a series in a folder; None for what is no such slice."""
    try:
        frames = [] if image.path.is_dir() or not dicom.is_dicom(image.path) else read_frames(image.path)
    except (FastsrganError, OSError, ValueError):
        return None  # reading it says what is wrong
    if len(frames) != 1:
        return None
    return image.path.parent, frames[0].uid, frames[0].series, frames[0].patient, image.series


def _inside(folder: Path, out: Path) -> list[Image]:
    """The images of a folder."""
    below, here = real(out), real(folder)
    files, others, again = _image_files(folder)
    paths = [p for p in files if below == here or below not in real(p).parents]
    names = [str(p.relative_to(folder).with_name(images.stem(p))) for p in paths]
    places = {path.parent for path in paths}
    results = {file for place in places for file in _results_in(place)}
    derived = {place for place in places if any(map(bids.is_own, [place, *place.absolute().parents][:4]))}
    found = [Image(p, n) for p, n in zip(paths, names, strict=True) if p not in results and p.parent not in derived]
    if found:
        taken = some([str(i.path.relative_to(folder)) for i in found], NAMED)
        old = len(paths) - len(found)
        more = f" ({counted(old, 'result')} of an earlier call left out)" if old else ""
        log.info("%s: %s: %s%s", folder, counted(len(found), "image"), taken, more)
        _tell_of_others(folder, [p for p in others if below == here or below not in real(p).parents], again)
    if paths and not found and not any(map(dicom.is_dicom, others)):  # results beside the slices they were made of
        raise UsageError(folder, "holds results only", "name the folder of the images")
    return found


def _image_files(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Image files in a folder and below, of a pair the header, links followed; the other files, of which none is an
    image's data; and folders that are there under another name too."""
    images_there: list[Path] = []
    others: list[Path] = []
    again: list[Path] = []
    data: set[str] = set()
    for path in walk_files(folder, again):
        if path.name.startswith("."):
            continue
        if images.is_image(path):
            first, *rest = _parts(path)
            images_there += [path] if first.name == path.name else []
            data.update(map(os.path.normpath, rest))
        else:
            others.append(path)
    return sorted(images_there), [path for path in others if os.path.normpath(path) not in data], again


def _tell_of_others(folder: Path, others: list[Path], again: list[Path]) -> None:
    """Name what is no image: dead links, and files that no command wrote or reads beside an image; and folders that
    were met ``again`` under another name and are passed over."""
    dead = [path for path in others if path.is_symlink() and not path.exists()]
    plain = [path for path in others if path not in dead and path.suffix.lower() not in BESIDE]
    leads, left = ("link leads nowhere", "links lead nowhere"), ("other file is left out", "other files are left out")
    once = ("folder was met under another name, taken once", "folders were met under other names, taken once")
    for paths, tell, words in ((dead, log.warning, leads), (plain, log.info, left), (again, log.info, once)):
        if paths:
            told = some([str(path.relative_to(folder)) for path in paths], NAMED)
            tell("%s: %s: %s", folder, counted(len(paths), *words), told)


def _parts(path: Path) -> tuple[Path, ...]:
    try:
        return formats.parts(path)
    except FastsrganError:
        return (path,)  # half of a pair: reading it says so


def _results_in(folder: Path) -> set[Path]:
    """The results that the records in a folder speak of."""
    found: set[Path] = set()
    for path in folder.glob("*.json"):
        record = read_json(path)
        try:
            if "provenance" in record and ("weights" in record or "made_with" in record):  # the latter of job-model
                found |= {path.with_name(Path(name).name) for name in record["outputs"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # somebody else's JSON, as BIDS has beside every image
    return found


def size_of(image: Image) -> int:
    """Bytes that an image takes in memory, before it is read; 0 where only reading tells what is wrong with it.

    Of DICOM files it is what they would take if none was compressed by more than half.
    """
    try:
        if dicom.is_dicom(image.path):
            files = image.path.rglob("*") if image.path.is_dir() else [image.path]
            return 4 * sum(file.stat().st_size for file in files if file.is_file())
        return 4 * formats.examine(image.path, images.MAX_VOXELS).voxels
    except (FastsrganError, OSError):
        return 0


def is_original(document: Any) -> bool:
    """Whether this is what ``job-model`` writes beside its results."""
    parts = [document.get(key) for key in ("made_with", "outputs")]
    named = isinstance(document.get("image"), str)
    return named and all(isinstance(part, dict) for part in parts) and isinstance(parts[1].get("SR"), str)


def image_folder(record: Path) -> Path:
    """Where the image of a record of ``job-model`` lies: two folders above, also of a path without them."""
    return Path(os.path.abspath(record)).parent.parent.parent
