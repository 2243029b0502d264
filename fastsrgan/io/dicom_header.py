"""What pydicom reads of a DICOM file, as plain values: one ``Frame`` for each slice, and decoded pixels.

Classic files hold one slice; enhanced multi-frame files (Enhanced MR, CT, PET) describe each frame in functional
groups. Files without the preamble of the standard, as scanners and archives also write them, and files packed by gzip
are read too. Patient and date of a series are for messages that tell series apart; they go into no record.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.errors import FastsrganError, InputError, ResourceError, counted
from fastsrgan.io.nifti_header import FORMAT_BYTES, WAYS, other_format
from fastsrgan.io.nifti_voxels import pointer_of

NO_DICOM = "holds no DICOM image"
HINT = "copy or export the file again"
CUT_OFF = "is cut off within its header"
_NAME_SLICES = "name a DICOM slice, a multi-frame file or a folder of slices"
_PREAMBLE = 132
_LONGEST_LINE = 120  # letters of what a library says
SUFFIXES = (".dcm", ".ima", ".dicom", ".dcm.gz", ".ima.gz", ".dicom.gz")
_MOST_UNPACKED = 1 << 32  # bytes of a gzip file
# The first element of a file without a preamble: of group 2 or 8, little endian.
_BARE = (b"\x02\x00", b"\x08\x00")
# SOP classes of images that may be slices, up to their last number: CR/CT/MR/US/NM/PET, legacy and enhanced ones.
_IMAGE_CLASSES = tuple(f"1.2.840.10008.5.1.4.1.1.{n}." for n in ("1", "2", "4", "6.1", "7", "12.1", "20", "128", "130"))
_SPECTRUM = "1.2.840.10008.5.1.4.1.1.4.2"  # has rows and columns, and no pixels
# Those that never are: what they show is no acquisition.
NOT_ACQUIRED = "not an acquisition"
_NO_ACQUISITION = {
    "1.2.840.10008.5.1.4.1.1.66.4": f"is a segmentation, {NOT_ACQUIRED}",
    "1.2.840.10008.5.1.4.1.1.66.7": f"is a segmentation, {NOT_ACQUIRED}",
    "1.2.840.10008.5.1.4.1.1.30": f"is a parametric map, {NOT_ACQUIRED}",
}
DIRECTION_TOLERANCE = 1e-3  # of unit vectors; a slice axis off the normal by more makes a sheared grid
# What tells images at the same place apart.
TRAITS = (
    *("EchoTime", "EchoNumbers", "ComplexImageComponent", "InversionTime", "EffectiveEchoTime"),
    *("TemporalPositionIdentifier", "TemporalPositionIndex", "DiffusionBValue", "DiffusionGradientOrientation"),
    *("AcquisitionNumber", "FrameAcquisitionNumber", "TriggerTime", "ImageType", "FrameType"),
)
_COMPONENTS = {name[:n].upper(): name for name in ("magnitude", "phase", "real", "imaginary") for n in (1, len(name))}
# Functional groups that hold what a frame needs.
_MACROS = (
    *("FrameContentSequence", "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence"),
    *("PixelValueTransformationSequence", "MREchoSequence", "MRDiffusionSequence", "MRImageFrameTypeSequence"),
    "DiffusionGradientDirectionSequence",
)
_TAGS = (
    *(*TRAITS, "SOPClassUID", "SOPInstanceUID", "PatientID", "StudyDate", "InstanceNumber", "Rows", "Columns"),
    *("NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "SeriesInstanceUID", "SeriesNumber"),
    *("SeriesDescription", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "ImagesInAcquisition"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
_BEHIND_UID = ("SeriesNumber", "InstanceNumber", "ImagePositionPatient", "Rows")


class DamagedFile(InputError):
    """A file that cannot be read, with as much as it still says of its series: ``uid``, empty where that is lost.

    whole : whether the UID stands before something else, so that nothing of it is cut off
    """

    uid = ""
    whole = False


class ColourPicture(InputError):
    """A screen shot or a coloured map, where an image of grey values is needed."""


class OtherFormat(InputError):
    """A file that is named as DICOM and is something else, or DICOM and no image."""


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
    image_uid : of the image (SOPInstanceUID), one and the same in copies; patient, date : what tells examinations apart
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
    image_uid: str = ""
    patient: str = ""
    date: str = ""

    @property
    def component(self) -> str:
        """What part of complex numbers it shows, "magnitude", "phase", "real" or "imaginary"; "" where none is said."""
        said = dict(zip(TRAITS, self.traits, strict=True))
        words = [said["ComplexImageComponent"]]
        for name in ("FrameType", "ImageType"):  # the first two say how it was made
            words += said[name].split("\\")[2:]
        return next((_COMPONENTS[word.upper()] for word in words if word.upper() in _COMPONENTS), "")


def read_frames(path: Path, wanted: bool = False) -> list[Frame]:
    """The slices in a file; none where it is no DICOM image (a report, a DICOMDIR, any other file).

    With ``wanted`` those are InputErrors; damaged files always are, of the class DamagedFile.
    """
    if pointer := pointer_of(path):
        if str(path).lower().endswith(SUFFIXES) or not path.suffix:
            raise DamagedFile(path, *pointer)
        return []
    if not path.is_file():
        return []
    try:
        head = _head(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise DamagedFile(path, reason, "check the path and its permissions") from error
    marked, bare = head[128:] == b"DICM", head[:2] in _BARE
    blank = not head[:128].strip(b"\0") and head[128:] in (b"", b"D", b"DI", b"DIC", bytes(4))
    if blank and str(path).lower().endswith(SUFFIXES) and not other_format(_head(path, FORMAT_BYTES)):
        reason = CUT_OFF if len(head) < _PREAMBLE else "holds zeros where DICOM begins"
        raise DamagedFile(path, reason if head else "is empty (0 bytes)", HINT)
    try:
        return _frames_of(path, marked, marked or bare, wanted)
    except (ColourPicture, OtherFormat):
        raise
    except FastsrganError as error:
        if wanted or isinstance(error, ResourceError):
            raise
        raise _damaged(path, error.reason) from error
    except Exception as error:  # pydicom reads a value when it is asked for, and raises many kinds
        raise _damaged(path, f"is damaged: {_line(error)}") from error


def is_marked(path: Path) -> bool:
    """Whether a file, packed or not, bears the mark of DICOM; not so where it cannot be read."""
    try:
        return _head(path)[128:] == b"DICM"
    except (OSError, ValueError, EOFError, zlib.error):
        return False


def begins_as_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does, with or without a preamble; not so where it cannot be read."""
    try:
        head = _head(path)
    except (OSError, EOFError, zlib.error):
        return False
    return head[128:] == b"DICM" or head[:2] in _BARE


def _head(path: Path, count: int = _PREAMBLE) -> bytes:
    """The bytes in which DICOM shows, unpacked where the file is packed by gzip, whatever its name."""
    with open(path, "rb") as file:
        head = file.read(count)
    if head[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as packed:
                head = packed.read(count)
        except (OSError, EOFError, zlib.error):
            if str(path).lower().endswith(SUFFIXES):
                raise  # another file that is damaged is no concern here
    return head


def _damaged(path: Path, reason: str) -> DamagedFile:
    """The error about a file, with the series that its first elements name, read one by one up to the damage."""
    from pydicom.filereader import dcmread

    found = DamagedFile(path, reason, HINT)
    try:
        tags = ["SeriesInstanceUID", *_BEHIND_UID]
        ds = dcmread(_opened(path), specific_tags=tags, stop_before_pixels=True, force=True)
        found.uid = str(ds.get("SeriesInstanceUID", "") or "")
        found.whole = any(name in ds for name in _BEHIND_UID)
    except Exception:  # the damage lies before it
        found.uid = ""
    return found


def _frames_of(path: Path, marked: bool, readable: bool, wanted: bool) -> list[Frame]:
    ds, whole = _header(path, force=not marked) if readable else (None, False)
    kind = "" if ds is None else str(ds.get("SOPClassUID") or ds.file_meta.get("MediaStorageSOPClassUID") or "")
    if ds is None or "Rows" not in ds or "Columns" not in ds or kind == _SPECTRUM:
        # Of a class that is cut off itself only the beginning is there.
        begun = kind.startswith(_IMAGE_CLASSES) or any(one.startswith(kind) for one in _IMAGE_CLASSES)
        if marked and ds is not None and begun and kind != _SPECTRUM:
            raise InputError(path, "has no Rows or no Columns, so no image" if whole else CUT_OFF, HINT)
        if wanted:
            if marked and ds is not None:
                raise OtherFormat(path, f"is a DICOM file without an image{_class_of(kind)}", _NAME_SLICES)
            if found := other_format(_head(path, FORMAT_BYTES)):
                raise OtherFormat(path, f"is not a DICOM file but {found}", WAYS.get(found, "convert it to .nii.gz"))
            raise InputError(path, NO_DICOM, _NAME_SLICES)
        return []
    if not marked and not ("SOPClassUID" in ds or "SeriesInstanceUID" in ds):
        return []  # another file that begins like one
    if not whole:  # whatever it seems to say of its frames, some of it is lost
        raise InputError(path, CUT_OFF, HINT)
    indexed = str(ds.get("PhotometricInterpretation", "")).strip().upper() == "PALETTE COLOR"  # numbers of colours
    if indexed or int(_number(path, ds, "SamplesPerPixel", 1)) != 1:
        if wanted:
            raise ColourPicture(path, "is a colour picture", "a grey-value series is needed")
        return []  # screen shots lie among the series
    return list(_frames(path, ds, _NO_ACQUISITION.get(kind, "")))


def _class_of(kind: str) -> str:
    """' (Basic Text SR Storage)': the name of a class where the standard has one."""
    from pydicom.uid import UID

    name = str(UID(kind).name)
    return f" ({name})" if name != kind else ""


def what_is_there(names: Sequence[Path]) -> str:
    """What files are of which none is an image."""
    for name in names:
        try:
            read_frames(name, wanted=True)
        except ColourPicture:
            return f"holds no DICOM image of grey values, only colour pictures as {name.name}"
        except OtherFormat as error:
            if name.name.lower().endswith(SUFFIXES):
                return f"{NO_DICOM}: {name.name} {error.reason} ({error.hint})"
        except InputError:
            continue
    return NO_DICOM


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
    ds = _dataset(path, force=True)  # its header was read: a preamble is not asked for again
    try:
        decoded = ds.pixel_array
    except MemoryError:
        hint = "end other programs, or take a machine with more"
        raise ResourceError(path, "not enough memory for its frames", hint) from None
    except Exception as error:  # pydicom and its decoders raise many kinds
        syntax = getattr(ds.file_meta, "TransferSyntaxUID", None)
        # A damaged UID names no syntax, and pydicom refuses to say whether it is one of compression.
        packed = syntax is not None and getattr(syntax, "is_transfer_syntax", False) and syntax.is_compressed
        if syntax is not None and packed and isinstance(error, (RuntimeError, NotImplementedError, ImportError)):
            hint = "pip install pylibjpeg[all], or decompress it with dcm2niix or gdcmconv"
            reason = f"its pixels are compressed ({syntax.name}) and no decoder is there"
            raise InputError(path, reason, hint) from error
        raise InputError(path, f"its pixels cannot be decoded: {_line(error)}", HINT) from error
    if decoded.shape[-2:] != shape:
        raise InputError(path, f"its pixels are {decoded.shape}, the header says {shape}", HINT)
    return decoded.reshape(-1, *shape)


def _header(path: Path, force: bool) -> tuple[Any, bool]:
    """What stands before the pixels, and whether they follow; a file that ends before them was cut off."""
    opened = _opened(path)
    with open(opened, "rb") if isinstance(opened, Path) else opened as file:
        ds = _dataset(path, file, stop_before_pixels=True, specific_tags=_TAGS, force=force)
        at, end = file.tell(), file.seek(0, io.SEEK_END)
    # Of a deflated file pydicom has read all, wherever it stopped in what was packed.
    return ds, at < end or ds.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1.99"


def _dataset(path: Path, source: Any = None, **options: Any) -> Any:
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ResourceError(path, "DICOM needs pydicom", "pip install 'fastsrgan[dicom]'") from error
    try:
        ds = dcmread(_opened(path) if source is None else source, **options)
    except ResourceError:
        raise
    except Exception as error:  # a damaged file can make any part of the parser fail
        raise InputError(path, f"is damaged: {_line(error)}", HINT) from error
    if "TransferSyntaxUID" not in ds.file_meta:  # without a preamble: pydicom found out how it is written
        from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

        implicit, little = ds.original_encoding
        plain = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else plain
    return ds


def _opened(path: Path) -> Any:
    """What pydicom reads: the path, or the unpacked bytes of a gzip file."""
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    with gzip.open(path) as packed:
        data = packed.read(_MOST_UNPACKED + 1)
    if len(data) > _MOST_UNPACKED:
        raise ResourceError(path, "unpacks to more than 4 GiB", "unpack it with gunzip if you trust it")
    return io.BytesIO(data)


def _line(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    short = line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE].rpartition(" ")[0] or line[:_LONGEST_LINE]
    return short + " ..." * (short != line) or type(error).__name__


def _frames(path: Path, ds: Any, fault: str) -> Iterator[Frame]:
    count = int(_number(path, ds, "NumberOfFrames", 1))
    groups = list(_sequence(ds, "PerFrameFunctionalGroupsSequence"))
    shared = next(iter(_sequence(ds, "SharedFunctionalGroupsSequence")), None)
    if count > 1 and len(groups) != count:
        told = f"has {counted(count, 'frame')} and places for {len(groups)}"
        fault, groups = fault or f"{told}: only enhanced images say where frames are", []
    if not groups:
        yield _frame(path, 0, ds, [ds], fault)
        return
    for index, group in enumerate(groups):
        # What a frame says of itself comes before what all frames share, and that before the top of the file.
        yield _frame(path, index, ds, [*_macros(group), *(_macros(shared) if shared is not None else []), ds], fault)


def _macros(group: Any) -> list[Any]:
    found = [item for name in _MACROS for item in list(_sequence(group, name))[:1]]
    # A gradient's direction lies one level deeper.
    return found + [item for one in found for item in list(_sequence(one, _MACROS[-1]))[:1]]


def _frame(path: Path, index: int, ds: Any, sources: list[Any], fault: str) -> Frame:
    def find(name: str) -> Any:
        return next((s for s in sources if name in s and s.get(name) is not None), ds)

    def number(name: str, default: float = 0.0) -> float:
        return _number(path, find(name), name, default)

    faults = [fault] if fault else []
    kinds = [str(t).upper() for t in _values(ds, "ImageType")]
    faults += [f"is a mosaic of slices ({name})" for name in ("MOSAIC", "VFRAME") if name in kinds]

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
        description=" ".join("\\".join(map(str, _values(ds, "SeriesDescription"))).split()),
        position=position,
        orientation=orientation,
        spacing=(row_mm, column_mm),
        shape=(int(_number(path, ds, "Rows", 0)), int(_number(path, ds, "Columns", 0))),
        slope=slope if slope else 1.0,
        inter=number("RescaleIntercept"),
        thickness=number("SliceThickness"),
        between=abs(number("SpacingBetweenSlices")),
        instance=int(_number(path, ds, "InstanceNumber", 0)),
        traits=tuple("\\".join(map(str, _values(find(n), n))) for n in TRAITS),
        expected=int(_number(path, ds, "ImagesInAcquisition", 0)),
        fault=faults[0] if faults else "",
        count=max(1, int(_number(path, ds, "NumberOfFrames", 1))),
        notes=tuple(notes),
        image_uid=str(ds.get("SOPInstanceUID", "") or ""),
        patient=str(ds.get("PatientID", "") or "").strip(),
        date=str(ds.get("StudyDate", "") or "").strip(),
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
