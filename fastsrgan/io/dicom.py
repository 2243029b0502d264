"""DICOM series in: a folder of slices or a multi-frame file as one volume in RAS+ world coordinates.

Geometry comes from Image Position (Patient) and Image Orientation (Patient) alone. The array is stored as dcm2niix
stores it: first axis along the columns, second against the rows (bottom to top), third along row x column, so files
and affines are those of a conversion by dcm2niix. What cannot be placed exactly is an InputError, never a guess: gaps,
repeated slices, several orientations, tilted stacks.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import is_special
from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.io.dicom_header import DIRECTION_TOLERANCE, Frame, check_axes, pixels, read_frames, what_is_there
from fastsrgan.io.nifti_voxels import no_such_file
from fastsrgan.volume.geometry import Volume

MAX_VOXELS = 2**31
SPACING_TOLERANCE = 0.01  # of the slice spacing
ROUNDING_MM = 0.01  # headers hold decimal text
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
CONVERT = "convert it with dcm2niix, and give the NIfTI file"


@dataclass(frozen=True)
class Series:
    """The images of one series below a folder, as the headers order them."""

    uid: str
    number: str
    description: str
    frames: tuple[Frame, ...]

    def __str__(self) -> str:
        rows, columns = self.frames[0].shape
        name = f" {self.description!r}" if self.description else ""
        return f"{self.number or '?'}{name} ({len(self.frames)} images of {columns} x {rows})"


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a path is a folder, or a file that is named or marked as DICOM."""
    path = Path(path)
    if os.path.isdir(path):
        return True
    if is_special(path):
        return False
    if path.suffix.lower() in (".dcm", ".ima", ".dicom"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False


def series_of(path: str | os.PathLike) -> list[Series]:
    """The image series of a folder and its subfolders, or the one that a file belongs to, by series number.

    Raises InputError for a damaged DICOM file and where there is no image; ResourceError without pydicom.
    """
    path = Path(path)
    if not path.exists():
        raise no_such_file(path)
    folder = path if path.is_dir() else path.parent
    own = None if path.is_dir() else read_frames(path, wanted=True)
    if own and len(own) > 1:
        return _grouped(own)
    names = sorted(folder.iterdir()) if own else sorted(Path(p, n) for p, _, files in os.walk(folder) for n in files)
    found = _grouped([frame for name in names for frame in read_frames(name)])
    if own:
        found = [s for s in found if s.uid == own[0].uid]
    if not found:
        raise InputError(path, what_is_there(names), "a folder of DICOM slices; name NIfTI files themselves")
    # Series without any place, screen shots and reports as images, are offered only where there is nothing else.
    return [s for s in found if not all(f.fault for f in s.frames)] or found


def select(path: str | os.PathLike, series: str | None = None) -> Series:
    """The series to use: the only one, or the one whose number, UID or description (a part of it) is ``series``.

    Raises UsageError listing the series where there are several and none, or more than one, was meant.
    """
    found = series_of(path)
    if series is None:
        chosen = found
    else:
        wanted = str(series).strip()
        chosen = [s for s in found if wanted in (s.number, s.uid)]
        chosen = chosen or [s for s in found if wanted and wanted.casefold() in s.description.casefold()]
    if len(chosen) == 1:
        return chosen[0]
    told = "; ".join(map(str, found))
    if not chosen:
        raise UsageError("--series", f"{series!r} is none of {told}", "a number, a UID or part of a description")
    reason = f"holds {len(found)} series: {told}" if series is None else f"{series!r} fits {len(chosen)} series: {told}"
    raise UsageError(path, reason, "choose one with --series NUMBER")


def load(
    path: str | os.PathLike,
    *,
    series: str | None = None,
    volume: int | None = None,
    max_voxels: int = MAX_VOXELS,
    dtype=np.float32,
) -> Volume:
    """Read one volume of a DICOM folder or file.

    Parameters
    ----------
    path : folder, searched with its subfolders; a multi-frame file; or one slice, which stands for its series in
        that folder
    series : which one, where the folder holds several; see ``select``
    volume : which volume of a series that repeats its slices (echoes, times, directions), from 0
    max_voxels : limit for one volume
    dtype : floating type of the result

    Returns
    -------
    Volume with (X, Y, Z) intensities, rescale slope and intercept of each slice applied, and the affine that dcm2niix
    writes. ``meta`` holds the keys of ``images.load``, no name or number of a patient.

    Raises
    ------
    InputError : damaged, compressed in an unknown way, colour, or no evenly spaced stack of slices
    UsageError : several series or volumes and none chosen. ResourceError : pydicom or memory missing.
    """
    chosen = select(path, series)
    stacks = _volumes(path, chosen)
    frames = stacks[_pick(path, len(stacks), volume)]
    affine, warnings = _grid(path, frames)
    warnings += dict.fromkeys(note for frame in frames for note in frame.notes)
    rows, columns = frames[0].shape
    shape = (columns, rows, len(frames))
    if np.prod(shape, dtype=float) > max_voxels:
        reason = f"{columns} x {rows} x {len(frames)} voxels are more than the limit of {max_voxels}"
        raise InputError(path, reason, "raise it with --max-voxels")
    try:
        data = np.empty(shape, dtype, order="F")
    except MemoryError:
        raise ResourceError(
            path,
            f"not enough memory for {columns} x {rows} x {len(frames)} voxels",
            "end other programs, or take a machine with more",
        ) from None
    stored = _fill(data, frames, warnings)
    low, high = float(data.min()), float(data.max())
    if low == high:
        warnings.append(f"the image is constant: every voxel is {low:g}")
    elif low < 0:
        warnings.append(f"intensities are negative, down to {low:g}")
    meta = {
        "path": str(path),
        "format": "DICOM",
        "series": chosen.number,
        "stored_dtype": stored.name,
        "stored_shape": shape,
        "volumes": len(stacks),
        "volume": volume or 0,
        "slope": frames[0].slope,
        "inter": frames[0].inter,
        "units": "mm",
        "orientation": "patient",
        "space_code": 1,
        "nan_count": 0,
        "min": low,
        "max": high,
    }
    return Volume(data, affine, tuple(warnings), meta)


def sha256(path: str | os.PathLike, series: str | None = None) -> str:
    """SHA-256 over the files of a series, one after the other by name: another image, or one more, changes it."""
    digest = hashlib.sha256()
    for file in sorted({frame.path for frame in select(path, series).frames}):
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise InputError(
                file, f"cannot be read: {error.strerror or error}", "check the path and its permissions"
            ) from error
    return digest.hexdigest()


def _grouped(frames: Sequence[Frame]) -> list[Series]:
    groups: dict[str, list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[frame.uid].append(frame)
    found = [Series(uid, f[0].series, f[0].description, tuple(f)) for uid, f in groups.items()]
    return sorted(found, key=lambda s: (not s.number.isdigit(), int(s.number) if s.number.isdigit() else 0, s.uid))


def _pick(path: str | os.PathLike, count: int, volume: int | None) -> int:
    if volume is None and count == 1:
        return 0
    if volume is None or not 0 <= volume < count:
        reason = f"holds {count} volumes" + ("" if volume is None else f", there is no volume {volume}")
        raise InputError(path, reason, f"choose one with --volume 0 to {count - 1}")
    return volume


def _volumes(path: str | os.PathLike, series: Series) -> list[list[Frame]]:
    """The slices of each volume in order along row x column. Raises InputError where that is not certain."""
    frames = series.frames
    bad = next((f for f in frames if f.fault), None)
    if bad:
        raise InputError(bad.path, bad.fault, CONVERT)
    for frame in frames:  # before anything is measured along their normal
        check_axes(frame)
    apart = _spread([f.orientation for f in frames]) > DIRECTION_TOLERANCE
    if apart or len({f.shape for f in frames}) > 1 or _spread([f.spacing for f in frames]) > ROUNDING_MM:
        what = "orientations" if apart else "image sizes"
        raise InputError(path, f"series {series} holds several {what}, as localisers do", "choose another --series")
    normal = _normal(frames[0])
    along = {id(f): float(np.dot(normal, f.position)) for f in frames}
    places: list[list[Frame]] = []
    for f in sorted(frames, key=lambda f: (along[id(f)], f.instance, f.index)):
        if places and along[id(f)] - along[id(places[-1][0])] < ROUNDING_MM:
            places[-1].append(f)
        else:
            places.append([f])
    repeats = max(map(len, places))
    if repeats == 1:
        return [[p[0] for p in places]]
    if min(map(len, places)) == repeats:
        for key in range(len(frames[0].traits) + 1):
            stacks = _split(places, key)
            if len(stacks) == repeats and all(len(s) == len(places) for s in stacks):
                return sorted(stacks, key=lambda s: min((f.instance, f.index) for f in s))
    twice = next(p for p in places if len(p) > 1)
    names = ", ".join(dict.fromkeys(f.path.name for f in twice[:3]))
    reason = f"a slice is there {len(twice)} times, at {along[id(twice[0])]:.4g} mm along its normal: {names}"
    raise InputError(path, reason, "remove the copies, or the images that belong to another acquisition")


def _split(places: list[list[Frame]], key: int) -> list[list[Frame]]:
    """One stack per value of a trait (of all traits together, for the index behind the last one)."""
    groups: dict[Any, dict[int, Frame]] = defaultdict(dict)
    for number, place in enumerate(places):
        for f in place:
            groups[f.traits if key == len(f.traits) else f.traits[key]][number] = f
    return [list(g.values()) for g in groups.values()]


def _spread(rows: list) -> float:
    return float(np.ptp(np.array(rows, float), axis=0).max())


def _normal(frame: Frame) -> np.ndarray:
    return np.cross(frame.orientation[:3], frame.orientation[3:])


def _grid(path: str | os.PathLike, frames: list[Frame]) -> tuple[np.ndarray, list[str]]:
    """Affine (RAS+) of an evenly spaced stack, and warnings; InputError for any other."""
    first, warnings = frames[0], []
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    positions = np.array([f.position for f in frames])
    if len(frames) == 1:
        step = _normal(first) * _lone_spacing(first)
    else:
        steps = np.diff(positions @ _normal(first))
        step = (positions[-1] - positions[0]) / (len(frames) - 1)
        _check_even(path, positions @ _normal(first), steps)
        length = float(np.linalg.norm(step))
        sideways = float(np.abs(positions - positions[0] - np.outer(np.arange(len(frames)), step)).max())
        tilt = float(np.linalg.norm(step - _normal(first) * (step @ _normal(first)))) / length
        if tilt > DIRECTION_TOLERANCE or sideways > max(2 * ROUNDING_MM, SPACING_TOLERANCE * length):
            angle = np.degrees(np.arcsin(min(tilt, 1.0)))
            raise InputError(path, f"its slices are shifted sideways ({angle:.2g} degrees, gantry tilt)", CONVERT)
        if first.between and abs(length - first.between) > max(2 * ROUNDING_MM, SPACING_TOLERANCE * first.between):
            told = f"{length:.4g} mm apart, their header says {first.between:.4g} mm"
            warnings.append(f"the slices are {told}: the positions are used")
    if first.expected and first.expected > len(frames):
        warnings.append(f"the header speaks of {first.expected} images, {len(frames)} are here")
    rows = first.shape[0]
    affine = np.eye(4)
    affine[:3, 0] = row * first.spacing[1]
    affine[:3, 1] = -column * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0] + column * first.spacing[0] * (rows - 1)
    return LPS_TO_RAS @ affine, warnings


def _lone_spacing(frame: Frame) -> float:
    spacing = frame.between or frame.thickness
    if not spacing:
        raise InputError(frame.path, "is a single slice without a thickness", "give the folder of its series")
    return spacing


def _check_even(path: str | os.PathLike, along: np.ndarray, steps: np.ndarray) -> None:
    step = float(np.median(steps))
    allowed = max(2 * ROUNDING_MM, SPACING_TOLERANCE * step)
    wrong = np.flatnonzero(np.abs(steps - step) > allowed)
    if not len(wrong):
        return
    here = int(wrong[np.argmax(steps[wrong])])
    missing = round(steps[here] / step) - 1
    where = f"between {along[here]:.5g} and {along[here + 1]:.5g} mm along their normal"
    if missing >= 1 and abs(steps[here] - (missing + 1) * step) <= allowed * (missing + 1):
        raise InputError(path, f"slices are missing: {missing} {where}", "export the whole series again")
    low, high = f"{steps.min():.5g}", f"{steps.max():.5g}"
    raise InputError(path, f"its slices are unevenly spaced: {low} to {high} mm, the widest {where}", CONVERT)


def _fill(data_XYZ: np.ndarray, frames: list[Frame], warnings: list[str]) -> np.dtype:
    """Decode every slice into place; returns the stored type and adds what is odd to ``warnings``."""
    by_file: dict[Path, list[int]] = defaultdict(list)
    for k, frame in enumerate(frames):
        by_file[frame.path].append(k)
    stored = np.dtype(np.int16)
    for file, slices in by_file.items():
        decoded = pixels(file, frames[slices[0]].shape)
        stored = decoded.dtype
        if len(decoded) > frames[slices[0]].count:
            told = f"{file.name} has pixels of {len(decoded)} frames, its header describes {frames[slices[0]].count}"
            warnings.append(f"{told}: the others are left out")
        for k in slices:
            f = frames[k]
            if f.index >= len(decoded):
                raise InputError(
                    file,
                    f"truncated: {len(decoded)} frames, the header describes more",
                    "copy or export the file again",
                )
            data_XYZ[:, :, k] = decoded[f.index][::-1].T
            if f.slope != 1 or f.inter != 0:
                data_XYZ[:, :, k] *= data_XYZ.dtype.type(f.slope)
                data_XYZ[:, :, k] += data_XYZ.dtype.type(f.inter)
    return stored
