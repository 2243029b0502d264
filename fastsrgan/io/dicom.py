"""DICOM series in: a folder of slices or a multi-frame file as one volume in RAS+ world coordinates.

Geometry comes from Image Position (Patient) and Image Orientation (Patient) alone. The array is stored as dcm2niix
stores it: first axis along the columns, second against the rows (bottom to top), third along row x column, so files
and affines are those of a conversion by dcm2niix. What cannot be placed exactly is an InputError, never a guess: gaps,
slices that are there twice, several orientations, tilted stacks, magnitudes beside phases. Series: `dicom_series`.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.errors import InputError, ResourceError, counted
from fastsrgan.io.dicom_header import DIRECTION_TOLERANCE, HINT, NOT_ACQUIRED, TRAITS, Frame, check_axes, pixels
from fastsrgan.io.dicom_header import SUFFIXES as SUFFIXES
from fastsrgan.io.dicom_series import NAMED, Series, select, tell_others
from fastsrgan.io.dicom_series import is_dicom as is_dicom
from fastsrgan.io.dicom_series import sha256 as sha256
from fastsrgan.io.formats import LPS_TO_RAS
from fastsrgan.io.nifti_header import LARGER, odd_range
from fastsrgan.io.nifti_header import check_axes as check_affine
from fastsrgan.volume.geometry import Volume

MAX_VOXELS = 2**31
SPACING_TOLERANCE = 0.01  # of the slice spacing
ROUNDING_MM = 0.01  # headers hold decimal text
# What the slices of one volume have in common.
CONTRAST = ("EchoTime", "EffectiveEchoTime", "InversionTime", "DiffusionBValue", "ImageType", "FrameType")
CONVERT = "convert it with dcm2niix, and give the NIfTI file"
# dcm2niix writes a corrected image beside the one with the fault.
TILTED = "convert it with dcm2niix, and give the file NAME_Tilt_1.nii, which it corrects"
UNEVEN = "convert it with dcm2niix, and give the file NAME_Eq_1.nii, whose slices it makes even"


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
    writes. ``meta`` holds the keys of ``images.load``; series (its number), description, series_uid;
    slice_thickness_mm and slice_distance_mm (None where the header has no thickness); ``dicom``, what of it a record
    keeps. No name or number of a patient.

    Raises
    ------
    InputError : damaged, compressed in an unknown way, colour, or no evenly spaced stack of slices
    UsageError : several series or volumes and none chosen. ResourceError : pydicom or memory missing.
    """
    chosen = select(path, series)
    tell_others(path, chosen.others)
    stacks, numbered = _volumes(path, chosen)
    picked = _pick(path, stacks, volume)
    frames = stacks[picked]
    mixed = _mixed(path, chosen, frames)
    affine, warnings = _grid(path, frames, len(chosen.frames))
    check_affine(Path(path), affine, warnings.append)
    warnings = [*chosen.warnings, *([numbered] if numbered else []), *mixed, *warnings]
    warnings += dict.fromkeys(note for frame in frames for note in frame.notes)
    rows, columns = frames[0].shape
    shape = (columns, rows, len(frames))
    if np.prod(shape, dtype=float) > max_voxels:
        reason = f"{columns} x {rows} x {len(frames)} voxels are more than the limit of {max_voxels}"
        raise InputError(path, reason, LARGER)
    try:
        data = np.empty(shape, dtype, order="F")
    except MemoryError:
        reason = f"not enough memory for {columns} x {rows} x {len(frames)} voxels"
        raise ResourceError(path, reason, "end other programs, or take a machine with more") from None
    stored = _fill(data, frames, warnings)
    scaled = len({(f.slope, f.inter) for f in frames}) > 1
    if scaled and stored.kind in "iu":
        slopes = [f.slope for f in frames]
        warnings.append(
            f"the slices have scalings of their own (RescaleSlope {min(slopes):g} to {max(slopes):g}): no integer type "
            "holds them, kept as 32-bit floats"
        )
        stored = np.dtype(np.float32)
    low, high = float(data.min()), float(data.max())
    warnings += odd_range(low, high)
    meta = {
        "path": str(path),
        "format": "DICOM",
        "series": chosen.number,
        "description": chosen.description,
        "series_uid": chosen.uid,
        "stored_dtype": stored.name,
        "stored_shape": shape,
        "volumes": len(stacks),
        "volume": picked,
        "slope": 1.0 if scaled else frames[0].slope,
        "inter": 0.0 if scaled else frames[0].inter,
        "slice_thickness_mm": frames[0].thickness or None,
        "slice_distance_mm": float(np.linalg.norm(affine[:3, 2])),
        "units": "mm",
        "orientation": "patient",
        "space_code": 1,
        "nan_count": 0,
        "min": low,
        "max": high,
    }
    kept = ("series", "description", "series_uid", "volume", "volumes", "slice_thickness_mm", "slice_distance_mm")
    meta["dicom"] = {key: meta[key] for key in kept}
    return Volume(data, affine, tuple(warnings), meta)


def _pick(path: str | os.PathLike, stacks: list[list[Frame]], volume: int | None) -> int:
    count = len(stacks)
    if volume is None and count == 1:
        return 0
    if volume is None or not 0 <= volume < count:
        which = _differences(stacks)
        none = "" if volume is None else f"; there is no volume {volume}"
        reason = f"holds {counted(count, 'volume')}{which}{none}"
        way = f"infer takes --volume, 0 to {count - 1}, for its image; else name one volume that dcm2niix made"
        raise InputError(path, reason, way)
    return volume


def _differences(stacks: list[list[Frame]]) -> str:
    """': 0 ImageType ORIGINAL\\PRIMARY\\M, 1 ...': what tells the volumes apart, as far as a line takes it."""
    found = [[{frame.traits[k] for frame in stack} for stack in stacks] for k in range(len(TRAITS))]
    values = [[one.pop() if len(one) == 1 else "" for one in column] for column in found]  # what all slices share
    telling = [k for k, column in enumerate(values) if len(set(column)) > 1 and all(column)]
    if not telling:
        return ", told apart by the order of their images alone"
    some = range(min(len(stacks), 8))
    shown = [f"{v} {', '.join(f'{TRAITS[k]} {values[k][v]}' for k in telling[:NAMED])}" for v in some]
    return f": {'; '.join(shown)}" + "; ..." * (len(stacks) > 8)


def _mixed(path: str | os.PathLike, series: Series, frames: list[Frame]) -> list[str]:
    """Warnings about slices of one volume that show different things. InputError where their values cannot be compared:
    magnitudes beside phases."""
    parts = Counter(f.component for f in frames if f.component)
    if len(parts) > 1:
        (most, n), (other, m) = parts.most_common(2)
        odd = next(f for f in frames if f.component == other).path.name
        reason = f"series {series} is of several kinds: {counted(n, 'slice')} of {most}, {m} of {other}, such as {odd}"
        raise InputError(path, reason, f"{CONVERT} of one kind, or move the slices of the other out of the folder")
    warnings = []
    for k in (TRAITS.index(name) for name in CONTRAST):
        values = Counter(f.traits[k] for f in frames if f.traits[k])
        if len(values) > 1 and not _nearly_equal(values):
            (most, n), (other, m) = values.most_common(2)
            odd = next(f for f in frames if f.traits[k] == other).path.name
            told = f"{TRAITS[k]} {most} for {n}, {other} for {m}, such as {odd}"
            warnings.append(f"its slices differ, one image is made of them: {told}")
    return warnings


def _nearly_equal(values: Iterable[str]) -> bool:
    """Whether they are numbers that differ by what is rounded off."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    return max(numbers) - min(numbers) <= SPACING_TOLERANCE * max(map(abs, numbers))


def _volumes(path: str | os.PathLike, series: Series) -> tuple[list[list[Frame]], str]:
    """The slices of each volume in order along row x column, and a warning. InputError where that is not certain."""
    frames = series.frames
    bad = min((f for f in frames if f.fault), key=lambda f: f.path != Path(path), default=None)  # the named file first
    if bad:
        way = "name the series that it was made of" if NOT_ACQUIRED in bad.fault else CONVERT
        raise InputError(bad.path, bad.fault, way)
    for frame in frames:  # before anything is measured along their normal
        check_axes(frame)
    apart = _spread([f.orientation for f in frames]) > DIRECTION_TOLERANCE
    if apart or len({f.shape for f in frames}) > 1 or _spread([f.spacing for f in frames]) > ROUNDING_MM:
        what = "orientations" if apart else "image sizes"
        kinds = Counter((tuple(np.round(f.orientation, 2)), f.shape) for f in frames)
        odd = min(frames, key=lambda f: kinds[tuple(np.round(f.orientation, 2)), f.shape]).path.name
        hint = f"choose another --series, or move images such as {odd}, unlike most, out of the folder"
        raise InputError(path, f"series {series} holds several {what}, as localisers do", hint)
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
        return [[p[0] for p in places]], ""
    if min(map(len, places)) == repeats:
        for keys in _keys(len(frames[0].traits)):
            stacks = _split(places, keys)
            if len(stacks) == repeats and all(len(s) == len(places) for s in stacks):
                return sorted(stacks, key=lambda s: min((f.instance, f.index) for f in s)), ""
        if numbered := _by_number(places, repeats):
            return numbered
    twice = next(p for p in places if len(p) > 1)
    names = ", ".join(dict.fromkeys(str(f.path) for f in twice[:NAMED]))
    reason = f"a slice is there {len(twice)} times, at {along[id(twice[0])]:.4g} mm along its normal: {names}"
    counts = Counter(map(len, places))
    if len(counts) > 1:
        reason += f"; {counts[repeats]} of {len(places)} places have {repeats} images, others fewer"
    hint = "if it is a series of volumes, convert it with dcm2niix and give the NIfTI file; else keep one acquisition"
    if len(folders := dict.fromkeys(str(f.path.parent) for f in twice)) > 1:  # as of two patients under one UID
        hint = f"name one of the folders, such as {next(iter(folders))}, if they hold an acquisition each; {hint}"
    raise InputError(path, reason, hint)


def _keys(count: int) -> list[tuple[int, ...]]:
    """Traits that may tell volumes apart: one, all together, two."""
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return [*((k,) for k in range(count)), tuple(range(count)), *pairs]


def _split(places: list[list[Frame]], keys: tuple[int, ...]) -> list[list[Frame]]:
    """One stack for each combination of the values of some traits."""
    groups: dict[Any, dict[int, Frame]] = defaultdict(dict)
    for number, place in enumerate(places):
        for f in place:
            groups[tuple(f.traits[key] for key in keys)][number] = f
    return [list(g.values()) for g in groups.values()]


def _by_number(places: list[list[Frame]], repeats: int) -> tuple[list[list[Frame]], str] | None:
    """Volumes that only InstanceNumber tells apart: numbered volume by volume, or place by place, as scanners do."""
    place_of = {id(f): k for k, place in enumerate(places) for f in place}
    order = sorted((f for place in places for f in place), key=lambda f: (f.instance, f.index))
    if len({(f.instance, f.index) for f in order}) < len(order):
        return None
    size = len(places)
    runs = [order[v * size : (v + 1) * size] for v in range(repeats)]
    if all(len({place_of[id(f)] for f in run}) == size for run in runs):
        how = "volume by volume"
        stacks = [sorted(run, key=lambda f: place_of[id(f)]) for run in runs]
    elif all(len({place_of[id(f)] for f in order[k * repeats : (k + 1) * repeats]}) == 1 for k in range(size)):
        how = "place by place"
        stacks = [[place[v] for place in places] for v in range(repeats)]
    else:
        return None
    return stacks, f"nothing but the numbers of its images tells the {repeats} volumes apart: taken {how}"


def _spread(rows: list) -> float:
    return float(np.ptp(np.array(rows, float), axis=0).max())


def _normal(frame: Frame) -> np.ndarray:
    return np.cross(frame.orientation[:3], frame.orientation[3:])


def _grid(path: str | os.PathLike, frames: list[Frame], images: int) -> tuple[np.ndarray, list[str]]:
    """Affine (RAS+) of an evenly spaced stack, and warnings; InputError for any other. ``images``: of the series."""
    first, warnings = frames[0], []
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    positions = np.array([f.position for f in frames])
    if len(frames) == 1:
        if not (spacing := first.between or first.thickness):
            raise InputError(first.path, "is a single slice without a thickness", "give the folder of its series")
        step = _normal(first) * spacing
    else:
        steps = np.diff(positions @ _normal(first))
        step = (positions[-1] - positions[0]) / (len(frames) - 1)
        rounded = _rounding(frames)
        _check_even(path, positions @ _normal(first), steps, rounded)
        length = float(np.linalg.norm(step))
        sideways = float(np.abs(positions - positions[0] - np.outer(np.arange(len(frames)), step)).max())
        tilt = float(np.linalg.norm(step - _normal(first) * (step @ _normal(first)))) / length
        tilted = tilt > DIRECTION_TOLERANCE and tilt * length * (len(frames) - 1) > 2 * rounded
        if tilted or sideways > max(2 * rounded, SPACING_TOLERANCE * length):
            angle = np.degrees(np.arcsin(min(tilt, 1.0)))
            raise InputError(path, f"its slices are shifted sideways ({angle:.2g} degrees, gantry tilt)", TILTED)
        if first.between and abs(length - first.between) > max(2 * ROUNDING_MM, SPACING_TOLERANCE * first.between):
            told = f"{length:.4g} mm apart, their header says {first.between:.4g} mm"
            warnings.append(f"the slices are {told}: the positions are used")
        gap = length - first.thickness
        if first.thickness > 0 and abs(gap) > max(2 * ROUNDING_MM, SPACING_TOLERANCE * length):
            kind = f"gaps of {gap:.3g} mm" if gap > 0 else f"an overlap of {-gap:.3g} mm"
            warnings.append(f"the slices are {first.thickness:.4g} mm thick and {length:.4g} mm apart, {kind}")
    # Some scanners count the images of all volumes of a series here.
    if first.expected and first.expected > images:
        warnings.append(f"the header speaks of {counted(first.expected, 'image')}, {counted(images, 'is', 'are')} here")
    rows = first.shape[0]
    affine = np.eye(4)
    affine[:3, 0] = row * first.spacing[1]
    affine[:3, 1] = -column * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = positions[0] + column * first.spacing[0] * (rows - 1)
    return LPS_TO_RAS @ affine, warnings


def _rounding(frames: list[Frame]) -> float:
    """How far the positions of slices may be rounded off, in mm: half of their last digit where all of them have one
    digit behind the point, as some exports and anonymisers write them; else ``ROUNDING_MM``."""
    digits = max(len(repr(value).partition(".")[2].rstrip("0")) for frame in frames for value in frame.position)
    return 0.05 if digits == 1 else ROUNDING_MM


def _check_even(path: str | os.PathLike, along: np.ndarray, steps: np.ndarray, rounded: float) -> None:
    step = float(np.median(steps))
    allowed = max(2 * rounded, SPACING_TOLERANCE * step)
    wrong = np.flatnonzero(np.abs(steps - step) > allowed)
    if not len(wrong):
        return
    here = int(wrong[np.argmax(steps[wrong])])
    missing = round(steps[here] / step) - 1
    where = f"between {along[here]:.5g} and {along[here + 1]:.5g} mm along their normal"
    if missing >= 1 and abs(steps[here] - (missing + 1) * step) <= allowed * (missing + 1):
        raise InputError(path, f"slices are missing: {missing} {where}", "export the whole series again")
    low, high = f"{steps.min():.5g}", f"{steps.max():.5g}"
    raise InputError(path, f"its slices are unevenly spaced: {low} to {high} mm, the widest {where}", UNEVEN)


def _fill(data_XYZ: np.ndarray, frames: list[Frame], warnings: list[str]) -> np.dtype:
    """Decode every slice into place; returns the stored type and adds what is odd to ``warnings``."""
    by_file: dict[Path, list[int]] = defaultdict(list)
    for k, frame in enumerate(frames):
        by_file[frame.path].append(k)
    stored = np.dtype(np.int16)
    for file, slices in by_file.items():
        first = frames[slices[0]]
        decoded = pixels(file, first.shape)
        stored, held = decoded.dtype, counted(len(decoded), "frame")
        if len(decoded) > first.count:
            told = f"{file.name} has pixels of {held}, its header describes {first.count}"
            warnings.append(f"{told}: the others are left out")
        for k in slices:
            f = frames[k]
            if f.index >= len(decoded):
                raise InputError(file, f"truncated: {held}, the header describes more", HINT)
            data_XYZ[:, :, k] = decoded[f.index][::-1].T
            if f.slope != 1 or f.inter != 0:
                data_XYZ[:, :, k] *= data_XYZ.dtype.type(f.slope)
                data_XYZ[:, :, k] += data_XYZ.dtype.type(f.inter)
    return stored
