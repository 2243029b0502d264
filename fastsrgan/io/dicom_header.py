"""What pydicom reads of a DICOM file, as plain values: one ``Frame`` for each slice, and decoded pixels.

Classic files hold one slice; enhanced multi-frame files (Enhanced MR, CT, PET) describe each frame in functional
groups. Nothing that names a patient is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.errors import FastsrganError, InputError, ResourceError

HINT = "copy or export the file again"
_PREAMBLE = 132
DIRECTION_TOLERANCE = 1e-3  # of unit vectors; a slice axis off the normal by more makes a sheared grid
# What tells images at the same place apart.
_TRAITS = (
    "EchoTime",
    "EffectiveEchoTime",
    "TemporalPositionIdentifier",
    "TemporalPositionIndex",
    "DiffusionBValue",
    "AcquisitionNumber",
    "FrameAcquisitionNumber",
    "TriggerTime",
    "ImageType",
    "FrameType",
)
# Functional groups that hold what a frame needs.
_MACROS = (
    "FrameContentSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
    "MREchoSequence",
    "MRDiffusionSequence",
    "MRImageFrameTypeSequence",
)
_TAGS = (
    *_TRAITS,
    "InstanceNumber",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "RescaleSlope",
    "RescaleIntercept",
    "ImagesInAcquisition",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


class ColourPicture(InputError):
    """A screen shot or a coloured map, where an image of grey values is needed."""


@dataclass(frozen=True)
class Frame:
    """One slice.

    path, index, count : its file, its number in there from 0, and how many the header describes
    position, orientation : of the patient coordinate system (LPS, mm): centre of the first pixel; directions of
        increasing column index, then of increasing row index
    spacing : (between rows, between columns), mm; shape : (rows, columns)
    slope, inter : intensity = stored * slope + inter
    thickness, between : slice thickness and distance of slice centres as the header has them, 0 where it has not
    instance : its number in the series; traits : what tells volumes at the same places apart
    expected : images in the acquisition, 0 where unknown
    fault : why it cannot be part of a volume, or empty; notes : what is odd about its intensities
    """

    path: Path
    index: int
    uid: str
    series: str
    description: str
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    shape: tuple[int, int]
    slope: float
    inter: float
    thickness: float
    between: float
    instance: int
    traits: tuple[str, ...]
    expected: int
    fault: str = ""
    count: int = 1
    notes: tuple[str, ...] = ()


def read_frames(path: Path, wanted: bool = False) -> list[Frame]:
    """The slices in a file; none where it is no DICOM image (a report, a DICOMDIR, any other file).

    With ``wanted`` those are InputErrors; damaged files always are.
    """
    if not path.is_file():
        return []
    try:
        with open(path, "rb") as file:
            marked = file.read(_PREAMBLE)[128:] == b"DICM"
    except OSError as error:
        raise InputError(
            path, f"cannot be read: {error.strerror or error}", "check the path and its permissions"
        ) from error
    try:
        return _frames_of(path, marked, wanted)
    except FastsrganError:
        raise
    except Exception as error:  # pydicom reads a value when it is asked for, and raises many kinds
        raise InputError(path, f"is damaged: {_line(error)}", HINT) from error


def _frames_of(path: Path, marked: bool, wanted: bool) -> list[Frame]:
    ds = _dataset(path, stop_before_pixels=True, specific_tags=_TAGS) if marked else None
    if ds is None or "Rows" not in ds or "Columns" not in ds:
        if wanted:
            raise InputError(path, "holds no DICOM image", "a DICOM slice, a multi-frame file or a folder of slices")
        return []
    if int(_number(path, ds, "SamplesPerPixel", 1)) != 1:
        if wanted:
            raise ColourPicture(path, "is a colour picture", "a grey-value series is needed")
        return []  # screen shots lie among the series
    return list(_frames(path, ds))


def what_is_there(names: Sequence[Path]) -> str:
    """What files are of which none is an image."""
    for name in names:
        try:
            read_frames(name, wanted=True)
        except ColourPicture:
            return f"holds no DICOM image of grey values, only colour pictures as {name.name}"
        except InputError:
            continue
    return "holds no DICOM image"


def check_axes(frame: Frame) -> None:
    """Make sure that a slice's axes are directions and its pixels have a size. Raises InputError naming what is not."""
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    off = max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column))
    values: tuple[float, ...] = frame.spacing
    if min(values) <= 0:
        what, wanted = "PixelSpacing", "two sizes above 0"
    elif off > DIRECTION_TOLERANCE:
        what, values, wanted = "ImageOrientationPatient", frame.orientation, "two directions at right angles"
    else:
        return
    told = ", ".join(f"{value:g}" for value in values)
    raise InputError(frame.path, f"its {what} ({told}) is impossible, {wanted} are needed", "export the series again")


def pixels(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Stored values of a file: (frames, rows, columns). Raises InputError for damage and unknown compression."""
    ds = _dataset(path)
    try:
        decoded = ds.pixel_array
    except MemoryError:
        raise ResourceError(
            path, "not enough memory for its frames", "end other programs, or take a machine with more"
        ) from None
    except Exception as error:  # pydicom and its decoders raise many kinds
        syntax = getattr(ds.file_meta, "TransferSyntaxUID", None)
        # A damaged UID names no syntax, and pydicom refuses to say whether it is one of compression.
        packed = syntax is not None and getattr(syntax, "is_transfer_syntax", False) and syntax.is_compressed
        if syntax is not None and packed and isinstance(error, (RuntimeError, NotImplementedError, ImportError)):
            hint = "pip install pylibjpeg[all], or decompress it with dcm2niix or gdcmconv"
            raise InputError(
                path, f"its pixels are compressed ({syntax.name}) and no decoder is there", hint
            ) from error
        raise InputError(path, f"its pixels cannot be decoded: {_line(error)}", HINT) from error
    if decoded.shape[-2:] != shape:
        raise InputError(path, f"its pixels are {decoded.shape}, the header says {shape}", HINT)
    return decoded.reshape(-1, *shape)


def _dataset(path: Path, **options: Any) -> Any:
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ResourceError(path, "DICOM needs pydicom", "pip install 'fastsrgan[dicom]'") from error
    try:
        return dcmread(path, **options)
    except Exception as error:  # a damaged file can make any part of the parser fail
        raise InputError(path, f"is damaged: {_line(error)}", HINT) from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def _frames(path: Path, ds: Any) -> Iterator[Frame]:
    count = int(_number(path, ds, "NumberOfFrames", 1))
    groups = list(_sequence(ds, "PerFrameFunctionalGroupsSequence"))
    shared = next(iter(_sequence(ds, "SharedFunctionalGroupsSequence")), None)
    if count > 1 and len(groups) != count:
        reason = f"has {count} frames and places for {len(groups)}"
        raise InputError(path, reason, "only enhanced multi-frame images say where their frames are")
    if not groups:
        yield _frame(path, 0, ds, [ds])
        return
    for index, group in enumerate(groups):
        # What a frame says of itself comes before what all frames share, and that before the top of the file.
        yield _frame(path, index, ds, [*_macros(group), *(_macros(shared) if shared is not None else []), ds])


def _macros(group: Any) -> list[Any]:
    return [item for name in _MACROS for item in list(_sequence(group, name))[:1]]


def _frame(path: Path, index: int, ds: Any, sources: list[Any]) -> Frame:
    def find(name: str) -> Any:
        return next((s for s in sources if name in s and s.get(name) is not None), ds)

    def number(name: str, default: float = 0.0) -> float:
        return _number(path, find(name), name, default)

    faults = ["is a mosaic of slices"] if "MOSAIC" in [str(t).upper() for t in _values(ds, "ImageType")] else []

    def numbers(name: str, count: int) -> tuple[float, ...]:
        try:
            values = tuple(float(v) for v in _values(find(name), name))
        except (TypeError, ValueError):
            values = ()
        if len(values) != count or not all(map(math.isfinite, values)):
            faults.append(f"has no usable {name}, so no place in the patient")
            return (0.0,) * count
        return values

    row_mm, column_mm = numbers("PixelSpacing", 2)
    position, orientation = numbers("ImagePositionPatient", 3), numbers("ImageOrientationPatient", 6)
    slope = number("RescaleSlope", 1.0)
    notes = [] if slope else ["the RescaleSlope is 0: ignored, intensities are not scaled by it"]
    if str(ds.get("PhotometricInterpretation", "")).strip().upper() == "MONOCHROME1":
        notes.append("the PhotometricInterpretation is MONOCHROME1, low values are bright: kept so, not inverted")
    return Frame(
        path=path,
        index=index,
        uid=str(ds.get("SeriesInstanceUID", "")),
        series=str(ds.get("SeriesNumber", "") or ""),
        description=str(ds.get("SeriesDescription", "") or "").strip(),
        position=position,
        orientation=orientation,
        spacing=(row_mm, column_mm),
        shape=(int(_number(path, ds, "Rows", 0)), int(_number(path, ds, "Columns", 0))),
        slope=slope if slope else 1.0,
        inter=number("RescaleIntercept"),
        thickness=number("SliceThickness"),
        between=abs(number("SpacingBetweenSlices")),
        instance=int(_number(path, ds, "InstanceNumber", 0)),
        traits=tuple("\\".join(map(str, _values(find(n), n))) for n in _TRAITS),
        expected=int(_number(path, ds, "ImagesInAcquisition", 0)),
        fault=faults[0] if faults else "",
        count=max(1, int(_number(path, ds, "NumberOfFrames", 1))),
        notes=tuple(notes),
    )


def _sequence(ds: Any, name: str) -> Any:
    value = ds.get(name)
    return value if value is not None else ()


def _values(ds: Any, name: str) -> list[Any]:
    value = ds.get(name)
    if value is None or value == "":
        return []
    return list(value) if np.iterable(value) and not isinstance(value, (str, bytes)) else [value]


def _number(path: Path, ds: Any, name: str, default: float) -> float:
    value = ds.get(name)
    if value is None or value == "":
        return default
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise InputError(path, f"its {name} {value!s:.40} is no number", HINT)
    return found
