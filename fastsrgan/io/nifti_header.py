"""What a NIfTI header says, checked before anything is allocated: size, type, scaling, units, place in the world.

Header fields are interpreted by nibabel; formats: NIfTI-1 and NIfTI-2 (nifti1.h, nifti2.h).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from fastsrgan.config import SPACING_LIMITS
from fastsrgan.errors import InputError, brief, times
from fastsrgan.io.nifti_voxels import COPY_AGAIN, NiftiFile, open_stream
from fastsrgan.volume.geometry import shear_of, spacing_of
from fastsrgan.volume.placement import grid_distance

ORIGIN_TOLERANCE = 0.05  # voxels between the origins of sform and qform
TURN_TOLERANCE = 2e-3  # radians between their axes; float32 quaternions near 180 degrees are off by up to 1e-3
HUGE = 1e15  # no coordinate is meant beyond it, and its square still is a float
SHEAR_TOLERANCE = 1e-3
SPACING_USUAL = (5e-3, 50.0)  # mm
LARGER = "infer takes more with --max-voxels; other commands need it cut or resampled"

_STORED = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_COMPLEX = ("complex voxels", "save the magnitude as an image of its own")
_REFUSED = {
    1: ("1-bit voxels", "save it as 8-bit integers"),
    32: _COMPLEX,
    128: ("RGB voxels", "save one grey channel"),
    1536: ("128-bit float voxels", "save it as 32-bit float"),
    1792: _COMPLEX,
    2048: _COMPLEX,
    2304: ("RGBA voxels", "save one grey channel"),
}
_UNITS = {0: (1.0, "unknown"), 1: (1e3, "metre"), 2: (1.0, "mm"), 3: (1e-3, "micrometre")}
FORMAT_BYTES = 540  # of a file in which any format shows
_OTHER_FORMATS = (
    (128, b"DICM", "a DICOM file"),
    (0, b"NRRD", "an NRRD file"),
    (0, b"\x00\x00\x00\x01\x00\x00", "a FreeSurfer MGH file"),
    (0, b"\x89HDF", "an HDF5 or MINC file"),
    (344, b"n+1\0", "a NIfTI image"),
    (4, b"n+2\0", "a NIfTI image"),
    (0, b"CDF", "a NetCDF or MINC file"),
    (0, b"ObjectType", "a MetaImage header"),
    (0, b"NDims", "a MetaImage header"),
    (0, b"# === DATA DESCRIPTION FILE", "a Philips PAR file"),
    (0, b"\ntype", "an AFNI header"),
    (0, b"MATRIX7", "an ECAT file"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"II*\x00", "a TIFF picture"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x1f\x8b", "a gzip file within a gzip file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"\xfd7zXZ", "an xz file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file"),
)
WAYS = {  # out of a file under a wrong name, or of a format that is not read
    "a DICOM file": "infer and job-model read it as NAME.dcm or by its folder; else convert it with dcm2niix",
    "a NIfTI image": "end its name in .nii, or in .nii.gz if it is packed",
    "an NRRD file": "end its name in .nrrd",
    "a FreeSurfer MGH file": "end its name in .mgh, or in .mgz if it is packed",
    "a MetaImage header": "end its name in .mha, or in .mhd if its data lie in another file",
    "an HDF5 or MINC file": "mnc2nii or mri_convert makes NIfTI of MINC",
    "a NetCDF or MINC file": "mnc2nii or mri_convert makes NIfTI of MINC",
    "a Philips PAR file": "dcm2niix makes NIfTI of PAR and REC",
    "an AFNI header": "3dAFNItoNIFTI makes NIfTI of HEAD and BRIK",
    "an ECAT file": "mri_convert makes NIfTI of it",
    "a zip archive": "unpack it with unzip, and name the image in it; save a table of a spreadsheet as .csv",
    "a tar archive": "unpack it with tar -xf, and name the image in it",
    "a gzip file within a gzip file": "unpack it once with gunzip",
    "a bzip2 file": "unpack it with bunzip2",
    "an xz file": "unpack it with unxz",
    "a zstd file": "unpack it with unzstd",
}
_DATA_FILES = {(".brik", ".brik.gz"): "an AFNI header", (".rec",): "a Philips PAR file"}  # which have no mark

ENDINGS = (".nii.gz", ".nii", ".hdr.gz", ".img.gz", ".hdr", ".img")  # of NIfTI, the longest first

Warn = Callable[[str], object]


class NotNifti(InputError):
    """A file that is something else, with its first bytes in the reason: for who named it, and for nobody else."""


def examine(path: str | os.PathLike, max_voxels: int) -> NiftiFile:
    """Read and check a header: dimensions, type, scaling, units, orientation, declared against actual size.

    Raises InputError. Needs little memory and time whatever the header claims.
    """
    head_path, voxel_path = halves(Path(path))
    header, version = _read_header(head_path, voxel_path)
    shape, volumes = _dimensions(head_path, header)
    warnings: list[str] = []
    warn = warnings.append
    dtype, slope, inter = _voxel_type(head_path, header, warn)
    offset = _offset(head_path, header, head_path == voxel_path, warn)
    affine, place = _place(head_path, header, shape, warn)
    meta = meta_of(path, version, dtype, shape, volumes) | {"slope": slope, "inter": inter, **place}
    meta["byte_order"] = "big" if header.endianness == ">" else "little"  # also of single bytes
    fields = (head_path, voxel_path, shape, volumes, dtype, offset, slope, inter, affine, warnings, meta)
    file = NiftiFile(*fields)
    file.check_size()
    return within_limit(file, max_voxels)


def within_limit(file: NiftiFile, max_voxels: int) -> NiftiFile:
    """The file. Raises InputError where a volume of it has more voxels."""
    if file.voxels > max_voxels:
        reason = f"{times(file.shape)} voxels are more than the limit of {max_voxels}"
        raise InputError(file.path, reason, LARGER)
    return file


def meta_of(path: str | os.PathLike, name: str, dtype: np.dtype, shape: tuple[int, ...], volumes: int) -> dict:
    """What `NiftiFile.meta` holds of a file without scaling in the scanner's world, in mm."""
    return {
        "path": str(path),
        "format": name,
        "byte_order": "big" if dtype.str[0] == ">" else "little",
        "stored_dtype": dtype.newbyteorder("=").name,
        "stored_shape": shape,
        "volumes": volumes,
        "slope": 1.0,
        "inter": 0.0,
        "units": "mm",
        "orientation": "none",
        "space_code": 1,
    }


def odd_range(low: float, high: float) -> list[str]:
    """A warning where intensities from ``low`` to ``high`` are all one, or negative."""
    if low == high:
        return [f"the image is constant: every voxel is {low:g}"]
    return [f"intensities are negative, down to {low:g}"] if low < 0 else []


def halves(path: Path) -> tuple[Path, Path]:
    """Header file and voxel file: one and the same, or the halves of a .hdr / .img pair."""
    gz = path.name[-3:] if path.name.lower().endswith(".gz") else ""
    base, ext = os.path.splitext(path.name.removesuffix(gz))
    other = {".hdr": ".img", ".img": ".hdr", ".HDR": ".IMG", ".IMG": ".HDR"}.get(ext)
    if other is None:
        return path, path
    candidates = [path.with_name(base + other + tail) for tail in dict.fromkeys((gz, "", ".gz"))]
    partner = next((c for c in candidates if os.path.isfile(c)), None)
    if partner is None and os.path.isfile(path):
        raise InputError(path, f"its other half {candidates[0].name} is missing", "keep .hdr and .img side by side")
    partner = partner or path
    return (path, partner) if ext.lower() == ".hdr" else (partner, path)


def _read_header(path: Path, voxel_path: Path) -> tuple[nib.Nifti1Header, str]:
    with open_stream(path) as stream:
        head = stream.read(FORMAT_BYTES)
    order = next((o for o in "<>" if head[:4] in (struct.pack(o + "i", 348), struct.pack(o + "i", 540))), None)
    if order is None:
        if not other_format(head):
            raise NotNifti(path, f"is not a NIfTI image: it begins with {head[:12]!r}", _way_of_unknown(path, head))
        raise not_this(path, "a NIfTI image", head)
    size = struct.unpack(order + "i", head[:4])[0]
    if len(head) < size:
        raise InputError(path, f"truncated: {len(head)} bytes where the header alone needs {size}", COPY_AGAIN)
    magic = head[344:348] if size == 348 else head[4:8]
    if size == 348 and magic not in (b"n+1\0", b"ni1\0"):
        reason = "has no NIfTI mark: damaged, or an Analyze 7.5 file whose left and right are unknown"
        raise InputError(path, reason, "export it as NIfTI from where it came")
    if size == 540 and (magic not in (b"n+2\0", b"ni2\0") or head[8:12] != b"\r\n\x1a\n"):
        raise InputError(path, "its NIfTI-2 mark is damaged", COPY_AGAIN)
    if (magic[1:2] == b"+") != (path == voxel_path):
        where = "in a separate .img file" if path == voxel_path else "behind the header in the same file"
        raise InputError(path, f"its header says that the voxels are {where}", "rename it: .nii or .hdr and .img")
    if size == 348:
        return nib.Nifti1Header(head[:348], order, check=False), "NIfTI-1"
    return nib.Nifti2Header(head, order, check=False), "NIfTI-2"


def other_format(head: bytes) -> str:
    """What the first bytes of a file, unpacked, show it to be; nothing where they are unknown."""
    return next((what for at, magic, what in _OTHER_FORMATS if head[at : at + len(magic)] == magic), "")


def _way_of_unknown(path: Path, head: bytes) -> str:
    """What to do about a file whose first bytes show no known format: text under a name that says no image is most
    likely a list of images, under one that `infer` does not take for a list, or within another list."""
    if path.name.lower().endswith(ENDINGS):
        return "a .nii or .nii.gz file"
    for endings, kind in _DATA_FILES.items():
        if path.name.lower().endswith(endings):
            return WAYS[kind]
    if head.decode("utf-8", "ignore").replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return (
            "a list of images ends in .txt, .csv or .tsv and is named to infer itself, not in another list; "
            "convert any other file to .nii.gz"
        )
    return "NIfTI, FreeSurfer MGH, NRRD, MetaImage and DICOM are read: convert it to .nii.gz first"


def not_this(path: Path, expected: str, head: bytes) -> InputError:
    """For a file whose name says what its first bytes deny."""
    if not (found := other_format(head)):
        return InputError(path, f"is not {expected}: it begins with {head[:12]!r}", COPY_AGAIN)
    return InputError(path, f"is not {expected} but {found}", WAYS.get(found, "convert it to .nii.gz first"))


def _dimensions(path: Path, header: nib.Nifti1Header) -> tuple[tuple[int, int, int], int]:
    dim = [int(v) for v in header["dim"]]
    sizes = dim[1 : dim[0] + 1]
    if not 1 <= dim[0] <= 7 or min(sizes) < 1:
        raise InputError(path, f"its header declares impossible dimensions {dim}", COPY_AGAIN)
    if dim[0] < 3:
        raise InputError(path, f"is a {dim[0]}-D image of {times(sizes)}", "a 3-D volume is needed")
    if math.prod(sizes[4:]) > 1:
        reason = f"is a {dim[0]}-D image of {times(sizes)}, vectors or channels"
        raise InputError(path, reason, "save one component as a 3-D image")
    return (sizes[0], sizes[1], sizes[2]), math.prod(sizes[3:])


def _voxel_type(path: Path, header: nib.Nifti1Header, warn: Warn) -> tuple[np.dtype, float, float]:
    code = int(header["datatype"])
    if code not in _STORED:
        what, hint = _REFUSED.get(code, (f"voxels of the unknown type {code}", "save it as 16-bit integers or float"))
        raise InputError(path, f"has {what}", hint)
    dtype = np.dtype(header.endianness + _STORED[code])
    if int(header["bitpix"]) != dtype.itemsize * 8:
        warn(f"bitpix is {int(header['bitpix'])} but the type is {dtype.name}: the type is used")
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):  # the format's way to say "not scaled", and nibabel's
        if math.isnan(slope) and math.isfinite(inter) and inter != 0:  # not nibabel's, which has no intercept then
            warn(f"the intensity scaling has no slope (NaN): its intercept {inter:g} is ignored too")
        return dtype, 1.0, 0.0
    if not math.isfinite(slope) or not math.isfinite(inter):
        raise InputError(path, f"its intensity scaling is not finite (slope {slope}, intercept {inter})", COPY_AGAIN)
    return dtype, slope, inter


def _offset(path: Path, header: nib.Nifti1Header, single: bool, warn: Warn) -> int:
    given, least = float(header["vox_offset"]), (int(header["sizeof_hdr"]) + 4 if single else 0)
    if single and given == 0:
        warn(f"the voxel offset is 0: {least} is used")
        return least
    if not math.isfinite(given) or given != int(given) or given < least:
        raise InputError(path, f"its voxel offset {given:g} is impossible", f"at least {least} is")
    return int(header["vox_offset"])


def _place(path: Path, header: nib.Nifti1Header, shape: tuple[int, ...], warn: Warn) -> tuple[np.ndarray, dict]:
    """The affine in mm and where it came from; says in a warning what was chosen where there was a choice."""
    units = int(header["xyzt_units"]) & 7
    factor, unit = _UNITS.get(units, (1.0, "unknown"))
    affine, origin, code = _choose_form(path, header, shape, warn)
    affine = np.diag([factor, factor, factor, 1.0]) @ affine
    if factor != 1:
        warn(f"sizes are in {unit}s: converted, voxels are {times(spacing_of(affine))} mm")
    elif units not in _UNITS:
        warn(f"the unit code {units} is unknown: mm is used")
    check_axes(path, affine, warn)
    return affine, {"units": unit, "orientation": origin, "space_code": code if 1 <= code <= 5 else 2}


def check_axes(path: Path, affine_44: np.ndarray, warn: Warn) -> None:
    """Tell a shear and unusual voxel sizes of any format's affine in mm. Raises InputError for impossible sizes."""
    spacing = spacing_of(affine_44)
    if not all(SPACING_LIMITS[0] <= s <= SPACING_LIMITS[1] for s in spacing):
        raise InputError(path, f"its voxel size {times(spacing)} mm is impossible", "correct the header")
    if not all(SPACING_USUAL[0] <= s <= SPACING_USUAL[1] for s in spacing):
        warn(f"the voxel size {times(spacing)} mm is unusual: check the units")
    shear = shear_of(affine_44)
    if shear > SHEAR_TOLERANCE:
        warn(f"the affine is sheared by {math.degrees(math.asin(min(1.0, shear))):.2g} degrees: kept as it is")


def _choose_form(path: Path, header: nib.Nifti1Header, shape: tuple[int, ...], warn: Warn):
    """sform, then qform, then voxel sizes alone, as nibabel prefers them -> (affine, which, its code)."""
    codes = {"sform": int(header["sform_code"]), "qform": int(header["qform_code"])}
    pixdim = np.array(header["pixdim"][1:4], float)
    forms = {"sform": np.array(header.get_sform(), float), "qform": _qform(header, np.abs(pixdim))}
    usable = {name: codes[name] > 0 and invertible(forms[name]) for name in forms}
    chosen = next((name for name in forms if usable[name]), None)
    for name in forms:
        if codes[name] > 0 and not usable[name]:
            warn(f"the {name} is unusable (singular, huge or not finite): {chosen or 'the voxel size alone'} is used")
    bad = not ((np.abs(pixdim) < HUGE) & (pixdim != 0)).all()
    if chosen is None and bad:
        reason = f"has no orientation and an impossible voxel size {times(pixdim.tolist())}"
        raise InputError(path, reason, "set pixdim or the sform in its header")
    if bad:
        warn(f"pixdim is {times(pixdim.tolist())}: ignored, the {chosen} gives the voxel size")
    elif (pixdim < 0).any() and chosen != "sform":
        warn(f"pixdim is negative ({times(pixdim.tolist())}): its absolute value is used")
    if chosen is None:
        why = "neither form is usable" if any(code > 0 for code in codes.values()) else "sform and qform codes are 0"
        warn(f"no orientation ({why}): axes taken as right, anterior, superior")
        return np.diag([*np.abs(pixdim), 1.0]), "pixdim", 1
    affine = forms[chosen]
    if codes[chosen] > 5:
        warn(f"the {chosen} code {codes[chosen]} is unknown: taken as 2, aligned to another image")
    if chosen == "sform":
        size = np.array(spacing_of(affine))
        if usable["qform"] and _conflict(affine, forms["qform"], shape):
            apart = grid_distance(affine, forms["qform"], shape)
            apart *= _UNITS.get(int(header["xyzt_units"]) & 7, (1.0, ""))[0]
            warn(f"sform and qform place voxels up to {brief(apart)} mm apart: the sform is used")
        elif not bad and not np.allclose(np.abs(pixdim), size, rtol=0.01):
            both = f"pixdim is {times(pixdim.tolist())}, the sform's voxel size {times(size.tolist())}"
            warn(f"{both}: the sform is used")
    return affine, chosen, codes[chosen]


def _qform(header: nib.Nifti1Header, pixdim: np.ndarray) -> np.ndarray:
    """The qform with the format's own leniency (qfac 0 is 1, sizes positive); not finite where it has none."""
    lenient = header.copy()
    lenient["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    lenient["pixdim"][1:4] = pixdim
    try:
        with np.errstate(all="ignore"):
            return np.array(lenient.get_qform(), float)
    except (ValueError, nib.spatialimages.HeaderDataError):
        return np.full((4, 4), np.nan)


def _conflict(sform: np.ndarray, qform: np.ndarray, shape: tuple[int, ...]) -> bool:
    size = np.array(spacing_of(sform))
    shift = np.zeros((4, 4))
    shift[:3, 3] = (sform - qform)[:3, 3]
    far_origin = np.linalg.norm(shift[:3, 3]) > ORIGIN_TOLERANCE * size.min()
    turned = grid_distance(sform, qform + shift, shape) > TURN_TOLERANCE * np.linalg.norm(size * shape)
    return bool(far_origin or turned)


def invertible(affine: np.ndarray) -> bool:
    """Whether an affine is finite and its axes span the space (volume of the unit axes above 1e-3)."""
    linear = affine[:3, :3]
    if not (np.abs(affine) < HUGE).all():
        return False
    norms = np.sqrt((linear**2).sum(axis=0))
    return bool((norms > 0).all() and abs(np.linalg.det(linear / norms)) > 1e-3)
