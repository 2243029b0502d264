"""What a user may name as an image: a file of one of `formats.FORMATS`, a DICOM folder, a DICOM file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple, TypeGuard

from fastsrgan.core.files import read_json
from fastsrgan.errors import InputError, UsageError, shown
from fastsrgan.io import bids, dicom
from fastsrgan.io import nifti as images
from fastsrgan.io.nifti_voxels import pointer_of
from fastsrgan.volume import placement
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.resample import SAME, slice_axis

THICKNESS = (0.1, 2.0)  # over the spacing of slices: from thin slices with gaps to ones that overlap by half
SPACING_SAME = 0.02  # relative: a sidecar's spacing of slices and the image's own


def load_any(
    path: str | os.PathLike,
    *,
    series: str | None = None,
    volume: int | None = None,
    max_voxels: int = images.MAX_VOXELS,
) -> Volume:
    """One volume of any readable kind, told by what the path is: ``dicom.load`` or ``images.load``.

    Raises what those raise, InputError where nothing is, and UsageError for a series of a file that is no DICOM.
    """
    if dicom.is_dicom(path):
        return dicom.load(path, series=series, volume=volume, max_voxels=max_voxels)
    refuse_series(path, series)
    return images.load(path, volume=volume, max_voxels=max_voxels)


def refuse_series(path: str | os.PathLike, series: str | None) -> None:
    """Raise UsageError for a series of a file that is there and no DICOM."""
    if series is not None and os.path.lexists(path) and not dicom.is_dicom(path):
        raise UsageError(path, "is no DICOM input and has no series", "leave --series out")


def load_mask(path: str | os.PathLike, like: Volume | None, *, max_voxels: int = images.MAX_VOXELS) -> Volume:
    """The mask of an image, on the image's array (``like`` None: on its own): where it is above zero is inside.

    One on the same grid in another axis order or direction is reoriented exactly, with a warning. Raises as `load_any`;
    InputError for a mask on another grid, or without a voxel above zero.
    """
    mask = load_any(path, max_voxels=max_voxels)
    if not any((plane > 0).any() for plane in mask.data):
        raise InputError(path, "the mask marks no voxel", "at least one voxel above 0")
    if like is None:
        return mask
    said = mask.meta.get("orientation", "")
    turn, told = placement.orientation_onto(mask.data.shape, mask.affine, like, path, "mask", said)
    return Volume(turn.apply(mask.data), like.affine, (*mask.warnings, *told), mask.meta)


class Thickness(NamedTuple):
    """Slice thickness in mm, and who says so: "DICOM", or a sidecar's file name. ``mm`` None: why that is not used."""

    mm: float | None
    source: str


def slice_thickness(image: Volume, path: str | os.PathLike) -> Thickness | None:
    """The slice thickness that a scan's header states: of DICOM, or of the JSON beside a NIfTI file as BIDS has it
    (SliceThickness, in mm; in a dataset also of those above it); None where nothing is said.

    It is not used where it cannot be that of the thickest axis: no number above 0, out of proportion to the spacing, or
    beside another SpacingBetweenSlices, as after resampling; nor where a JSON cannot be read.
    """
    thickest = slice_axis(image.spacing)
    spacing = image.spacing[thickest]
    if image.meta.get("format") == "DICOM":
        if image.spacing[2] * (1 + SAME) < spacing:  # finer across the slices than within them
            return None
        said, apart, source = image.meta.get("slice_thickness_mm"), image.meta.get("slice_distance_mm"), "DICOM"
    else:
        for file in bids.sidecars(Path(path)):
            if os.path.lexists(file) and not read_json(file):
                told = "; ".join(pointer_of(file) or ("is no JSON object with fields",))
                return Thickness(None, f"{file.name}: {told}")
        said, file = bids.stated(Path(path), "SliceThickness")
        (apart, _), source = bids.stated(Path(path), "SpacingBetweenSlices"), file.name
    if said is None:
        return None
    if not _is_size(said):
        return Thickness(None, f"{source}: SliceThickness {shown(said)} is no size in mm")
    if _is_size(apart) and abs(apart / spacing - 1) > SPACING_SAME:
        return Thickness(None, f"{source}: slices {apart:g} mm apart, the image's are {spacing:g}: resampled")
    if not THICKNESS[0] <= said / spacing <= THICKNESS[1]:
        return Thickness(None, f"{source}: slices of {said:g} mm, {spacing:g} apart, are not believed")
    return Thickness(float(said), source)


def odd_thickness(image: Volume, asked_mm: float | None) -> str:
    """A warning about a slice thickness that was asked for and would not be believed of a header, else nothing."""
    spacing = max(image.spacing)
    if asked_mm is None or THICKNESS[0] <= asked_mm / spacing <= THICKNESS[1]:
        return ""
    return f"--slice-thickness {asked_mm:g} mm is used, of slices {spacing:g} mm apart: is that what is meant?"


def _is_size(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def stem(path: str | os.PathLike, series: str | None = None) -> str:
    """The name that results get: the file's or folder's, with ``_series-N`` where a series was asked for."""
    path = Path(path)
    if not dicom.is_dicom(path):
        return images.stem(path)
    name = Path(os.path.abspath(path)).name
    if not path.is_dir():  # of a name that is a UID the last number is no ending
        name = next((name[: -len(s)] for s in (*dicom.SUFFIXES, ".gz") if name.lower().endswith(s)), name)
    return name if series is None else f"{name}_series-{re.sub('[^A-Za-z0-9.-]+', '_', str(series).strip())}"


def sha256(path: str | os.PathLike, series: str | None = None) -> str:
    """SHA-256 of an image's file, of the two halves of a pair, or of all files of a DICOM series."""
    return dicom.sha256(path, series) if dicom.is_dicom(path) else images.sha256(path)
