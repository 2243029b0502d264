"""Which images a user means: files, lists, DICOM folders, and folders full of NIfTI files; and what each is called."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsrgan.core.files import read_json, real
from fastsrgan.errors import FastsrganError, UsageError
from fastsrgan.io import any_image, dicom
from fastsrgan.io import nifti as images
from fastsrgan.io import nifti_header as nifti_check
from fastsrgan.io import tables as table

log = logging.getLogger("fastsrgan")

LISTS = (".txt", ".csv")
NAMED = 3  # images of a folder that are told by name


@dataclass(frozen=True)
class Image:
    """An image, and the name of its results below the output folder: its own, or sub/folder/name out of a folder."""

    path: Path
    name: str


def find_images(inputs: Sequence[str | os.PathLike], out: str | os.PathLike, series: str | None = None) -> list[Image]:
    """Images named directly, by lists, and in folders, in that order; those of a folder by name.

    A folder with a NIfTI file in it or below stands for all of them, whatever else it holds; results of an earlier
    call and hidden files are left out. Any other folder, and any for which a series is named, is a DICOM image.

    Raises UsageError for none, or two that would share their results; InputError for a list that cannot be read.
    """
    found: list[Image] = []
    for item in map(Path, inputs):
        for path in table.read_list(item) if item.suffix.lower() in LISTS else [item]:
            inside = _inside(path, Path(out)) if series is None and os.path.isdir(path) else []
            found += inside or [Image(path, any_image.stem(path, series))]
    if not found:
        raise UsageError(
            "input", "no image given", "name NIfTI files, folders of them, DICOM folders, or lists of these"
        )
    by_name: dict[str, Path] = {}
    for image in found:
        other = by_name.setdefault(image.name, image.path)
        if other is not image.path:
            reason = f"would write to the same files as {other}"
            raise UsageError(image.path, reason, "outputs are named after the image: use one output folder for each")
    return found


def _inside(folder: Path, out: Path) -> list[Image]:
    """The images of a folder."""
    below, here = real(out), real(folder)
    paths = [p for p in _niftis(folder) if below == here or below not in real(p).parents]
    names = [str(p.relative_to(folder).with_name(images.stem(p))) for p in paths]
    results = {file for place in {path.parent for path in paths} for file in _results_in(place)}
    found = [Image(p, n) for p, n in zip(paths, names, strict=True) if p not in results]
    if paths:
        some = ", ".join(str(i.path.relative_to(folder)) for i in found[:NAMED])
        more = (
            f", ... ({len(paths) - len(found)} results of an earlier call left out)" if len(found) < len(paths) else ""
        )
        log.info("%s: %d NIfTI images: %s%s", folder, len(found), some, more or ", ..." * (len(found) > NAMED))
    if paths and not found:
        raise UsageError(folder, "holds results only", "name the folder of the images")
    return found


def _niftis(folder: Path) -> list[Path]:
    """NIfTI files in a folder and below, of a pair the header."""
    found = []
    for where, below, names in os.walk(folder, followlinks=False):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            path = Path(where) / name
            if not name.startswith(".") and images.is_image(path) and _first_half(path):
                found.append(path)
    return sorted(found)


def _first_half(path: Path) -> bool:
    try:
        return nifti_check.halves(path)[0].name == path.name
    except FastsrganError:
        return True  # half of a pair: reading it says so


def _results_in(folder: Path) -> set[Path]:
    """The results that the records in a folder speak of."""
    found: set[Path] = set()
    for path in folder.glob("*.json"):
        record = read_json(path)
        try:
            if "provenance" in record and "weights" in record:
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
        return 4 * nifti_check.examine(image.path, images.MAX_VOXELS).voxels
    except (FastsrganError, OSError):
        return 0
