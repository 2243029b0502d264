"""Image files in (every format of `formats.FORMATS`), NIfTI out.

Arrays keep the file's axis order (X, Y, Z) and its memory order (first axis fastest).

Reading checks before it allocates (`fastsrgan.io.formats`) and goes through the file once, in pieces: the peak is the
returned array and a few MiB. What is odd about a file but usable ends in ``Volume.warnings``, everything else in an
InputError.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from fastsrgan.core.files import atomic_write, output_file
from fastsrgan.errors import InputError, ResourceError, UsageError, human, some_of, times
from fastsrgan.io.formats import SUFFIXES, examine, parts
from fastsrgan.io.nifti_header import SHEAR_TOLERANCE, invertible, odd_range
from fastsrgan.io.nifti_voxels import NiftiFile, sha256_of, write_voxels
from fastsrgan.volume.geometry import Orientation, Volume, shear_of, spacing_of
from fastsrgan.volume.placement import orientation_onto

PathLike = str | os.PathLike

MAX_VOXELS = 2**31
LABEL_INTENT = 1002  # NIFTI_INTENT_LABEL
# No intensity is meant beyond it, and its square still is a 32-bit float: tools mark with the largest numbers of a type
# what is not there.
MOST = 1e18
_INTEGER_TOLERANCE = 1e-3  # of a label value, for labels stored as scaled integers


def load(path: PathLike, *, volume: int | None = None, max_voxels: int = MAX_VOXELS, dtype=np.float32) -> Volume:
    """Read an image: NIfTI-1 or NIfTI-2 (.nii, .nii.gz, a .hdr / .img pair), or another of `formats.FORMATS`.

    Parameters
    ----------
    volume : which volume of a 4-D image, from 0; not needed when there is one
    max_voxels : limit for one volume, against headers that lie
    dtype : floating type of the result

    Returns
    -------
    Volume with (X, Y, Z) intensities, scaling applied; NaN and infinite voxels are 0 and counted. ``meta`` holds
    path, format, byte_order, stored_dtype, stored_shape, volumes, volume, slope, inter, units (as in the file; the
    affine is in mm), orientation (sform, qform or pixdim), space_code, nan_count, min and max.

    Raises
    ------
    InputError : not an image, damaged, truncated, or not one 3-D volume of real numbers
    ResourceError : not enough memory, or the package that reads the format is missing
    """
    file = examine(path, max_voxels)
    index = file.pick(volume)
    data, tally = _read(file, index, dtype)
    return _volume(file, index, data, tally, 1.0, 0.0)


def load_stored(path: PathLike) -> tuple[np.ndarray, float, float, Volume]:
    """Read an image without widening integers, for the store.

    Returns
    -------
    (stored, slope, inter, volume) : intensity = stored * slope + inter. ``stored`` is (X, Y, Z): integers of the
    file's own type, or float32 with slope 1 and inter 0, cleaned as in `load`. ``volume.data`` is ``stored`` itself,
    so not scaled; ``volume.meta`` min and max are intensities.

    Raises as `load`.
    """
    file = examine(path, MAX_VOXELS)
    index = file.pick(None)
    integer = file.dtype.kind in "iu"
    data, tally = _read(file, index, file.dtype.newbyteorder("=") if integer else np.float32, scaled=not integer)
    slope, inter = (file.slope, file.inter) if integer else (1.0, 0.0)
    if max(abs(tally.low * slope + inter), abs(tally.high * slope + inter)) > float(np.finfo(np.float32).max):
        reason = f"its intensity scaling overflows (slope {slope:g}, intercept {inter:g})"
        raise InputError(path, reason, "correct scl_slope and scl_inter in its header")
    return data, slope, inter, _volume(file, index, data, tally, slope, inter)


def load_label(
    path: PathLike,
    like: Volume | None = None,
    *,
    largest: int = 255,
    classes: Collection[int] | None = None,
    kind: str = "label",
) -> Volume:
    """Read a label map: whole numbers from 0 to ``largest``, on the grid of ``like``.

    Parameters
    ----------
    like : the image it belongs to. A label on the same grid in another axis order or direction is reoriented exactly
        (with a warning); one that lies elsewhere by more than headers are rounded (`placement`) is refused.
    largest : at most 65535
    classes : the values that are the structure, of a map whose numbers may be of any size: 1 there, 0 elsewhere
    kind : what messages call it; of a "label" alone they name ``--label-classes``

    Returns
    -------
    Volume with uint8 data, uint16 where ``largest`` is above 255; ``meta["values"]`` lists what occurs in it, and
    ``meta["absent"]`` those of the classes that the file holds nowhere.

    Raises
    ------
    InputError : as `load`; a fraction, NaN, a value out of range; another grid
    """
    file = examine(path, MAX_VOXELS)
    index = file.pick(None)
    said = file.meta["orientation"]
    placed = None if like is None else orientation_onto(file.shape, file.affine, like, file.path, kind, said)
    data = _allocate(file, np.uint8 if largest <= 255 or classes is not None else np.uint16)
    counts, absent = np.zeros(largest + 1, np.int64), set(classes or ())
    for part, chunk in _pieces(data, file, index):
        part[...] = _label_values(file, chunk, largest, classes, absent, kind)
        counts += np.bincount(part, minlength=largest + 1)
    present = np.flatnonzero(counts).tolist()
    if present == [0] and classes is not None:
        file.warnings.append(f"the label holds none of the values {', '.join(map(str, sorted(classes)))}: it is empty")
    elif present == [0]:
        file.warnings.append(f"the {kind} is empty: every voxel is 0")
    elif kind == "label" and 0 not in present and (classes is not None or len(present) == 1):
        file.warnings.append("the label covers every voxel: nothing lies outside the structure")
    affine = file.affine
    if like is not None and placed is not None:
        affine, (turn, told) = np.array(like.affine, float), placed
        data = data if turn == Orientation() else np.asfortranarray(turn.apply(data))
        file.warnings.extend(told)
    meta = {**file.meta, "volume": index, "values": present, "absent": sorted(absent)}
    return Volume(data, affine, tuple(file.warnings), meta)


def save(
    path: PathLike,
    data: np.ndarray,
    affine_44: np.ndarray,
    *,
    dtype=None,
    overwrite: bool = False,
    description: str = "fastsrgan",
    code: int = 1,
    scaling: tuple[float, float] = (1.0, 0.0),
    intent: str = "",
) -> Path:
    """Write a NIfTI image, whole or not at all; NIfTI-2 where a dimension exceeds NIfTI-1.

    Parameters
    ----------
    path : ends in .nii or .nii.gz
    data : (X, Y, Z), or (X, Y, Z, volumes)
    affine_44 : voxel index -> world in mm; becomes sform and, unless it is sheared, qform
    dtype : stored type, default the array's own. Integers are rounded to the nearest and clipped to their range.
    overwrite : replace an existing file
    code : what the world is (NIfTI xform code): 1 scanner, 2 aligned, 3 Talairach, 4 MNI, 5 template
    scaling : slope and intercept of the header; what is stored is (data - intercept) / slope
    intent : name of the structure of a segmentation, which gives the image the intent of labels; 15 characters fit

    Raises
    ------
    UsageError : the file exists, or another ending
    ResourceError : no folder, no permission, no space
    """
    target = check_output(path, overwrite=overwrite)
    data = np.asarray(data)
    affine = np.asarray(affine_44, float)
    if data.ndim not in (3, 4) or not data.size or data.dtype.kind not in "biuf":
        raise ValueError(f"{data.dtype} data of shape {data.shape} are no image")
    if affine.shape != (4, 4) or not invertible(affine):
        raise ValueError(f"{affine.tolist()} is no affine")
    stored = _storable(np.dtype(data.dtype if dtype is None else dtype))
    header = _header(data.shape, affine, stored, description, code)
    if intent:
        header["intent_code"], header["intent_name"] = LABEL_INTENT, intent.encode("ascii", "replace")[:15]
    if scaling != (1, 0):
        header["scl_slope"], header["scl_inter"] = scaling
        # The header holds them in float32: what is read back is scaled with those.
        data = (data - np.float64(header["scl_inter"])) / np.float64(header["scl_slope"])
    block = header.binaryblock + b"\0\0\0\0"  # no extensions
    with atomic_write(target) as temporary, open(temporary, "wb") as raw:
        if target.name.lower().endswith(".gz"):
            # No name and no time in the gzip header: the same image gives the same bytes.
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed:
                packed.write(block)
                write_voxels(packed, data, stored)
        else:
            raw.write(block)
            write_voxels(raw, data, stored)
    return target


def check_output(path: PathLike, *, overwrite: bool = False) -> Path:
    """Find out before any work that an image can be written to ``path``: its ending, folder and what is there.

    Raises UsageError or ResourceError as `save`.
    """
    target = Path(path)
    if not target.name.lower().endswith((".nii", ".nii.gz")):
        raise UsageError(target, "is not the name of an image to write", "end it in .nii or .nii.gz")
    output_file(target)
    if target.exists() and not overwrite:
        raise UsageError(target, "exists already and is kept", "--overwrite replaces it")
    return target


def is_image(path: PathLike) -> bool:
    """Whether a path is named like an image and is no folder; it need not exist."""
    return str(path).lower().endswith(SUFFIXES) and not os.path.isdir(path)


def stem(path: PathLike) -> str:
    """The file's name without an image ending: sub-01_T2w for a/sub-01_T2w.nii.gz."""
    name = Path(path).name
    ending = next((s for s in SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(ending)]


def sha256(path: PathLike) -> str:
    """SHA-256 of a file's bytes, as sha256sum prints it; of all its files one after the other where it has several."""
    return sha256_of(parts(path))


# Reading, in pieces


@dataclass
class _VoxelTally:
    """What the voxels were like, in the unit of the array that is cleaned."""

    bad: int = 0
    beyond: int = 0  # of the bad ones: finite in the file, but above ``MOST``, as they are or by its scaling
    low: float = np.inf
    high: float = -np.inf

    def clean(self, part: np.ndarray, chunk: np.ndarray) -> None:
        """Set voxels that are no intensities to 0, in place, and count. ``chunk`` is what they were in the file."""
        if part.dtype.kind == "f":
            usable = np.abs(part) <= MOST
            bad = part.size - int(np.count_nonzero(usable))
            if bad:
                self.bad += bad
                self.beyond += int(np.count_nonzero(np.isfinite(chunk[~usable])))
                part[~usable] = 0
        self.low = min(self.low, float(part.min()))
        self.high = max(self.high, float(part.max()))


def _allocate(file: NiftiFile, dtype) -> np.ndarray:
    try:
        return np.empty(file.shape, dtype, order="F")
    except MemoryError:
        need = human(file.voxels * np.dtype(dtype).itemsize)
        hint = "end other programs, or take a machine with more; `fastsrgan doctor` tells what is free"
        raise ResourceError(file.path, f"not enough memory for {times(file.shape)} voxels, {need}", hint) from None


def _read(file: NiftiFile, index: int, dtype, scaled: bool = True) -> tuple[np.ndarray, _VoxelTally]:
    """One volume, its scaling applied where it is to be, and what its voxels were like."""
    data, tally = _allocate(file, dtype), _VoxelTally()
    for part, chunk in _pieces(data, file, index):
        if scaled:
            file.scale(chunk, part)
        else:
            part[...] = chunk
        tally.clean(part, chunk)
    return data, tally


def _pieces(data: np.ndarray, file: NiftiFile, index: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of (1-D view into ``data``, the stored values that belong there)."""
    flat, at = data.reshape(-1, order="F"), 0
    for chunk in file.chunks(index):
        yield flat[at : at + chunk.size], chunk
        at += chunk.size


def _volume(file: NiftiFile, index: int, data: np.ndarray, tally: _VoxelTally, slope: float, inter: float) -> Volume:
    beyond = f"beyond {MOST:g}, which no intensity is"
    if tally.bad == data.size:
        what = beyond if tally.beyond else "NaN or infinite"
        raise InputError(file.path, f"every voxel is {what}", "export the image again")
    low, high = sorted((tally.low * slope + inter, tally.high * slope + inter))
    if nan := tally.bad - tally.beyond:
        file.warnings.append(f"{some_of(nan, data.size, 'voxel', 'is', 'are')} NaN or infinite: read as 0")
    if tally.beyond:
        file.warnings.append(f"{some_of(tally.beyond, data.size, 'voxel', 'is', 'are')} {beyond}: read as 0")
    file.warnings.extend(odd_range(low, high))
    meta = {**file.meta, "volume": index, "nan_count": tally.bad, "min": low, "max": high}
    return Volume(data, file.affine, tuple(file.warnings), meta)


def _label_values(
    file: NiftiFile, chunk: np.ndarray, largest: int, classes: Collection[int] | None, absent: set[int], kind: str
) -> np.ndarray:
    """Stored values -> whole numbers in 0 .. largest, or 1 where they are one of the classes; or InputError.

    What occurs of ``absent`` is taken out of it.
    """
    if file.slope != 1 or file.inter != 0:
        with np.errstate(over="ignore", invalid="ignore"):
            chunk = chunk * np.float64(file.slope) + file.inter
    if chunk.dtype.kind == "f":
        if not np.isfinite(chunk).all():
            hint = "set them to 0, for example with fslmaths IN -nan OUT"
            raise InputError(file.path, f"the {kind} holds NaN or infinite voxels", hint)
        whole = np.rint(chunk)
        off = np.abs(chunk - whole) > _INTEGER_TOLERANCE
        if off.any():
            hint = "whole numbers are needed: resample with nearest neighbour, cut probabilities at 0.5"
            raise InputError(file.path, f"the {kind} holds fractions such as {chunk[off][0]:.6g}", hint)
        chunk = whole
    if classes is not None:
        absent -= {value for value in absent if (chunk == value).any()}
        return np.isin(chunk, np.array(sorted(classes)))
    outside = (chunk < 0) | (chunk > largest)
    if outside.any():
        ways = {"label": "choose the structure with --label-classes", "mask": "make it 1 inside and 0 outside"}
        value = chunk[outside][0]
        way = ways.get(kind, "give its structures other numbers")
        if kind == "label" and value < 0:  # no choice can name it
            way = "give what is below 0 another number, or choose other values with --label-classes"
        raise InputError(file.path, f"the {kind} holds the value {value:.10g}", f"0 to {largest} are allowed: {way}")
    return chunk


# Writing


def _storable(dtype: np.dtype) -> np.dtype:
    return np.dtype({"b1": "<u1", "f2": "<f4"}.get(dtype.str[1:], dtype.newbyteorder("<")))


def _header(shape, affine: np.ndarray, stored: np.dtype, description: str, code: int) -> nib.Nifti1Header:
    header = nib.Nifti2Header(endianness="<") if max(shape) > 32767 else nib.Nifti1Header(endianness="<")
    header.set_data_dtype(stored)
    header.set_data_shape(shape)
    header.set_zooms((*spacing_of(affine), *(1.0,) * (len(shape) - 3)))
    header.set_xyzt_units("mm")
    header.set_sform(affine, code)
    # A qform cannot hold a shear: without its code readers do not meet two different answers.
    header.set_qform(affine, 0 if shear_of(affine) > SHEAR_TOLERANCE else code, strip_shears=True)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4
    header["descrip"] = description.encode("ascii", "replace")[:79]
    return header
