"""What a user may name as an image: a file of one of `formats.FORMATS`, a DICOM folder, a DICOM file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastsrgan.errors import InputError, UsageError
from fastsrgan.io import dicom
from fastsrgan.io import nifti as images
from fastsrgan.volume import placement
from fastsrgan.volume.geometry import Volume


def load_any(
    path: str | os.PathLike,
    *,
    series: str | None = None,
    volume: int | None = None,
    max_voxels: int = images.MAX_VOXELS,
) -> Volume:
    """One volume of any readable kind, told by what the path is: ``dicom.load`` or ``images.load``.

    Raises what those raise, and UsageError for a series of a file that is no DICOM.
    """
    if dicom.is_dicom(path):
        return dicom.load(path, series=series, volume=volume, max_voxels=max_voxels)
    if series is not None:
        raise UsageError(path, "is no DICOM input and has no series", "leave --series out")
    return images.load(path, volume=volume, max_voxels=max_voxels)


def load_mask(path: str | os.PathLike, like: Volume, *, max_voxels: int = images.MAX_VOXELS) -> Volume:
    """The mask of an image, on the image's array: where it is above zero is inside.

    One on the same grid in another axis order or direction is reoriented exactly, with a warning. Raises as `load_any`;
    InputError for a mask on another grid, or without a voxel above zero.
    """
    mask = load_any(path, max_voxels=max_voxels)
    said = mask.meta.get("orientation", "")
    turn, told = placement.orientation_onto(mask.data.shape, mask.affine, like, path, "mask", said)
    if not any((plane > 0).any() for plane in mask.data):
        raise InputError(path, "the mask marks no voxel", "at least one voxel above 0")
    return Volume(turn.apply(mask.data), like.affine, (*mask.warnings, *told), mask.meta)


def stem(path: str | os.PathLike, series: str | None = None) -> str:
    """The name that results get: the file's or folder's, with ``_series-N`` where a series was asked for."""
    path = Path(path)
    if not dicom.is_dicom(path):
        return images.stem(path)
    name = Path(os.path.abspath(path)).name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem
    return name if series is None else f"{name}_series-{re.sub('[^A-Za-z0-9.-]+', '_', str(series).strip())}"


def sha256(path: str | os.PathLike, series: str | None = None) -> str:
    """SHA-256 of an image's file, of the two halves of a pair, or of all files of a DICOM series."""
    return dicom.sha256(path, series) if dicom.is_dicom(path) else images.sha256(path)
