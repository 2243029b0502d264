"""The file formats that images are read from: one entry of ``FORMATS`` each, for every command.

An entry says how its files are named, how messages call it, which files an image consists of and what reads the header.
What comes back is a `NiftiFile`, whose voxels `nifti.load` reads in pieces, so that sizes, scaling, labels, damage and
warnings are treated alike. DICOM, whose images are folders, is read by `dicom.load`; results are written as NIfTI.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.errors import InputError, ResourceError, human, times
from fastsrgan.io import nifti_header as nifti_check
from fastsrgan.io.itk_header import EXPORT_AGAIN, LONGEST_TEXT, ItkHeader, is_true, number, read_header
from fastsrgan.io.nifti_header import FORMAT_BYTES, halves, invertible
from fastsrgan.io.nifti_voxels import (
    CHUNK_BYTES,
    COPY_AGAIN,
    DEFLATE_LIMIT,
    EXPANSION_FREE,
    EXPANSION_LIMIT,
    GzipStream,
    NiftiFile,
    PlainStream,
    ZlibStream,
    ignored,
    open_stream,
)

UNPACK_NRRD = "save it with gzip, as by `unu save -f nrrd -e gzip -i FILE -o NEW`, or as .nii.gz"
NAME_LIST = "say in its header which axis is that of the volumes: `kinds: list domain domain domain`, in their order"
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Format:
    """One file format.

    name : as messages call it; suffixes : of its files, in small letters, longest first
    examine : (path, most voxels of one volume) -> the checked header, see `nifti_check.examine`
    parts : path -> the files that the image consists of, the header first
    """

    name: str
    suffixes: tuple[str, ...]
    examine: Callable[[Path, int], NiftiFile]
    parts: Callable[[Path], tuple[Path, ...]]


def format_of(path: str | os.PathLike) -> Format:
    """The format that a file's name says; NIfTI, whose reader tells what it finds, where the name says nothing."""
    name = str(path).lower()
    return next((f for f in FORMATS if name.endswith(f.suffixes)), FORMATS[0])


def examine(path: str | os.PathLike, max_voxels: int) -> NiftiFile:
    """Read and check a header, whatever the format: see `nifti_check.examine`.

    Raises InputError; ResourceError where the package that reads the format is not installed.
    """
    return format_of(path).examine(Path(path), max_voxels)


def parts(path: str | os.PathLike) -> tuple[Path, ...]:
    """The files that an image consists of, the header first. Raises InputError for half of a pair."""
    return format_of(path).parts(Path(path))


def _turned(sizes: str) -> str:
    return f"the voxel size is negative ({sizes}): such an axis is taken the other way round"


def _sane_place(path: Path, affine_44: np.ndarray, warnings: list[str]) -> np.ndarray:
    if not invertible(affine_44):
        raise InputError(path, "its orientation is unusable (singular, huge or not finite)", EXPORT_AGAIN)
    nifti_check.check_axes(path, affine_44, warnings.append)
    return affine_44


# --- FreeSurfer's MGH (surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat) ------------------------------------

_MGH_HEADER, _MGH_OFFSET = 90, 284  # bytes: of the fields that are used, of all before the voxels
_MGH_TYPES = {0: ">u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}
_MGH_NO_PLACE = (1, 1, 1, -1, 0, 0, 0, 0, 1, 0, -1, 0, 0, 0, 0)  # as nibabel: coronal slices around the origin


class MghFile(NiftiFile):
    """An .mgh or .mgz file; behind the voxels stand scan parameters and tags of any length."""

    def _surplus(self, n: int) -> None:
        pass

    def _rest(self, stream: PlainStream) -> None:
        _read_to_end(stream)


def _read_to_end(stream: PlainStream, voxel_bytes: int = 0) -> int:
    """Unpack a stream to its checksum, in pieces; how many bytes came. Raises InputError for damage and for a bomb."""
    most = max(EXPANSION_FREE, stream.size * EXPANSION_LIMIT, voxel_bytes)
    if (n := stream.skip(most + 1)) > most:
        raise InputError(stream.path, f"refused as a bomb: it unpacks to more than {human(most)}", EXPORT_AGAIN)
    return n


def examine_mgh(path: Path, max_voxels: int) -> NiftiFile:
    """Header of an .mgh or .mgz file; the affine is the one that nibabel and FreeSurfer (vox2ras) give."""
    with open_stream(path) as stream:
        head = stream.read(FORMAT_BYTES)
    if head[:4] != struct.pack(">i", 1):
        raise nifti_check.not_this(path, "a FreeSurfer MGH file", head)
    if len(head) < _MGH_HEADER:
        told = f"truncated: {len(head)} bytes where the header alone needs {_MGH_HEADER}"
        raise InputError(path, told, COPY_AGAIN)
    head = head[:_MGH_HEADER]
    *sizes, kind, _, placed = struct.unpack(">6ih", head[4:30])
    if min(sizes) < 1:
        raise InputError(path, f"its header declares impossible dimensions {sizes}", COPY_AGAIN)
    if kind not in _MGH_TYPES:
        raise InputError(path, f"has voxels of the unknown type {kind}", "mri_convert -odt float writes another")
    warnings = []
    fields: tuple[float, ...] = struct.unpack(">15f", head[30:])
    if placed != 1:
        fields = _MGH_NO_PLACE
        warnings.append("no orientation (goodRASFlag is 0): taken as nibabel does, coronal slices of 1 mm")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(fields[3:12], (3, 3)).T * fields[:3]
    affine[:3, 3] = np.array(fields[12:]) - affine[:3, :3] @ (np.array(sizes[:3]) / 2)
    _sane_place(path, affine, warnings)
    if min(fields[:3]) < 0:
        warnings.append(_turned(times(fields[:3])))
    dtype, shape = np.dtype(_MGH_TYPES[kind]), (sizes[0], sizes[1], sizes[2])
    meta = nifti_check.meta_of(path, "MGH", dtype, shape, sizes[3])
    meta |= {"orientation": "vox2ras"} if placed == 1 else {}
    file = MghFile(path, path, shape, sizes[3], dtype, _MGH_OFFSET, 1.0, 0.0, affine, warnings, meta)
    file.check_size()
    return nifti_check.within_limit(file, max_voxels)


# --- NRRD and MetaImage, which SimpleITK reads ---------------------------------------------------------------------

_ITK_MARKS = {"NRRD": (b"NRRD",), "MetaImage": (b"ObjectType", b"Comment", b"NDims")}
_ITK_READERS = {"NRRD": "NrrdImageIO", "MetaImage": "MetaImageIO"}
_ITK_TYPES = {f"{kind}{8 * n}": f"{code}{n}" for kind, code in (("UInt", "u"), ("Int", "i")) for n in (1, 2, 4, 8)}
_ITK_TYPES |= {"Float32": "f4", "Float64": "f8"}
_BODY_SPACE = re.compile(rb"^space:\s*(right|left|[rl][ap]s)", re.MULTILINE | re.IGNORECASE)


class ItkFile(NiftiFile):
    """A file whose voxels SimpleITK reads; its header was read before, so the size is known."""

    def chunks(self, volume: int = 0) -> Iterator[np.ndarray]:
        """One volume's values in file order, in pieces. The whole file is in memory meanwhile, besides the result."""
        self._check_packed()
        sitk = _sitk(self.path)
        try:
            image = _itk_reader(sitk, self.path, self.meta["format"]).Execute()
        except MemoryError:
            reason = f"not enough memory for {human(self.declared_bytes)}"
            raise ResourceError(self.path, reason, "write it as .nii.gz") from None
        except RuntimeError as error:
            raise InputError(self.path, f"is damaged: {_itk_line(error)}", COPY_AGAIN) from error
        array = sitk.GetArrayViewFromImage(image)  # slowest axis first; volumes of a list come last, as components
        listed = image.GetDimension() == 3 and self.volumes > 1
        values = np.ravel(array[..., volume]) if listed else array.reshape(self.volumes, -1)[volume]
        step = CHUNK_BYTES // self.dtype.itemsize
        for at in range(0, self.voxels, step):
            yield values[at : at + step]

    def _check_packed(self) -> None:
        """Unpack packed voxels to their checksum: SimpleITK hands over what it got of damaged ones.

        Raises InputError for damage, for fewer bytes than declared, and where the voxels cannot be found.
        """
        header = read_header(self.path)
        fields, at = header.fields, header.end
        zipped = fields.get(b"encoding", b"").lower() in (b"gzip", b"gz")
        if not (zipped or is_true(fields.get(b"compresseddata"))):
            self._check_plain(header)
            return
        path = header.files[0] if header.files else self.path
        if not header.files and b"encoding" not in fields and number(fields.get(b"compresseddatasize")) < 1:
            # MetaIO then unpacks nothing, and gives what lay in the memory.
            raise InputError(self.path, "its voxels are packed and CompressedDataSize is missing", EXPORT_AGAIN)
        if header.several or fields.get(b"lineskip", b"0") != b"0":
            raise InputError(self.path, "its packed voxels lie in several files or behind lines", EXPORT_AGAIN)
        with open_stream(path) as opened:
            at = max(0, number(fields.get(b"headersize"))) or (at if path == self.path else 0)
            opened.file.seek(at)
            stream = (GzipStream if zipped else ZlibStream)(opened.file, path, opened.size)
            if (n := _read_to_end(stream, self.declared_bytes)) < self.declared_bytes:
                self._short(n)
        if n > self.declared_bytes:
            self.warnings.append(ignored(n - self.declared_bytes, "the last voxel"))
        if 0 < (declared := number(fields.get(b"compresseddatasize"))) < stream.end - at:
            told = f"the header declares {declared} packed bytes, there are {stream.end - at}"
            raise InputError(self.path, f"damaged: {told}", COPY_AGAIN)
        if stream.trailing:
            self.warnings.append(ignored(stream.trailing, f"the {stream.form} data"))

    def _check_plain(self, header: ItkHeader) -> None:
        """Refuse what ends early: MetaIO would say so on standard error, in lines of its own."""
        fields = header.fields
        told = {key: fields.get(key, b"0") != b"0" for key in (b"lineskip", b"byteskip")}
        text = fields.get(b"encoding", b"raw").lower() != b"raw" or not is_true(fields.get(b"binarydata", b"T"))
        path = header.files[0] if header.files else self.path
        if text and b"encoding" not in fields and not header.several:
            self._check_text(path, header.end if path == self.path else 0)
        if header.several or text or any(told.values()):
            return
        skipped = number(fields.get(b"headersize")) or (header.end if path == self.path else 0)
        if (held := path.stat().st_size - max(0, skipped)) < self.declared_bytes:
            replace(self, voxel_path=path)._short(held)

    def _check_text(self, path: Path, at: int) -> None:
        """Of a MetaImage that writes its voxels as text: one number each."""
        with open_stream(path) as opened:
            opened.file.seek(at)
            found = sum(len(line.split()) for line in opened.file)
        if found < (wanted := self.voxels * self.volumes):
            raise InputError(path, f"truncated: {wanted} voxels are declared, the file holds {found}", COPY_AGAIN)


def _itk(name: str) -> Callable[[Path, int], NiftiFile]:
    """``examine`` of a format of SimpleITK. Its world is LPS+; that of the affine is RAS+."""

    def examine_itk(path: Path, max_voxels: int) -> NiftiFile:
        with open_stream(path) as stream:
            text = stream.read(LONGEST_TEXT)
        if not text.lstrip().startswith(_ITK_MARKS[name]):
            raise nifti_check.not_this(path, f"{'an' if name == 'NRRD' else 'a'} {name} file", text)
        header = read_header(path)
        fields = header.fields
        sitk = _sitk(path)
        reader = _itk_reader(sitk, path, name)
        try:
            reader.ReadImageInformation()
        except RuntimeError as error:
            told = _itk_line(error)
            hint = NAME_LIST if "number of domain axes" in told else EXPORT_AGAIN
            raise InputError(path, f"its header cannot be used: {told}", hint) from error
        if fields.get(b"encoding", b"").strip().lower() in (b"bzip2", b"bz2"):
            raise InputError(path, "its voxels are packed with bzip2, which is not read", UNPACK_NRRD)
        dims, sizes = reader.GetDimension(), reader.GetSize()
        if dims not in (3, 4) or min(sizes) < 1:
            raise InputError(path, f"is a {dims}-D image of {times(sizes)}", "a 3-D volume is needed")
        blank = [word.lower() in (b"nan", b"none") for word in fields.get(b"spacings", b"").split()]
        if dims == 4 and any(blank[:3]):  # taken for lengths in mm its volumes would be slices of a nonsense image
            told = f"its axis {blank.index(True)} has no voxel size, and nothing says what it is"
            raise InputError(path, told, NAME_LIST)
        count, listed = reader.GetNumberOfComponents(), _is_list(reader) and dims == 3
        kinds = [(f"sitk{each}{kind}", code) for kind, code in _ITK_TYPES.items() for each in ("", "Vector")]
        kind = next((code for name, code in kinds if reader.GetPixelID() == getattr(sitk, name)), None)
        if (count > 1 and not listed) or kind is None:
            told = "has vectors, colours or complex numbers in each voxel"
            raise InputError(path, told, "save one component as a 3-D image")
        if not listed and dims == 3 and b"nan" in fields.get(b"spacedirections", b"").lower():  # ITK takes it for 1 mm
            raise InputError(path, "an axis of its space directions is no number (nan)", EXPORT_AGAIN)
        shape, dtype = (sizes[0], sizes[1], sizes[2]), np.dtype(kind)
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(reader.GetDirection(), (dims, dims))[:3, :3] * np.array(reader.GetSpacing()[:3])
        affine[:3, 3] = reader.GetOrigin()[:3]
        warnings: list[str] = []
        affine = _sane_place(path, LPS_TO_RAS @ affine, warnings)
        size_text = fields.get(b"elementspacing", fields.get(b"spacings", b"")).split()
        if any(word.startswith(b"-") for word in size_text):  # ITK has put the sign into the direction
            warnings.append(_turned(" x ".join(word.decode("ascii", "replace") for word in size_text)))
        scale = [fields.get(f"elementtointensityfunction{word}".encode()) for word in ("slope", "offset")]
        if scale[0] not in (None, b"1") or scale[1] not in (None, b"0"):
            told = ", ".join((word or b"none").decode("ascii", "replace") for word in scale)
            warnings.append(f"its intensity scaling (slope, offset: {told}) is not applied, as ITK does not")
        placed = name != "NRRD" or re.search(rb"^space( dimension)?:", text, re.MULTILINE | re.IGNORECASE)
        if not placed:
            warnings.append("no orientation (no space field): axes taken as left, posterior, superior")
        elif name == "NRRD" and not _BODY_SPACE.search(text):
            warnings.append("its space names no directions of the body: axes taken as left, posterior, superior")
        volumes = count * math.prod(sizes[3:])
        meta = nifti_check.meta_of(path, name, dtype, shape, volumes) | ({"orientation": "patient"} if placed else {})
        file = ItkFile(path, path, shape, volumes, dtype, 0, 1.0, 0.0, affine, warnings, meta)
        held = sum(part.stat().st_size for part in header.files or (path,))
        if file.declared_bytes > held * DEFLATE_LIMIT:
            told = f"truncated: {times(sizes)} voxels are declared, {human(file.declared_bytes)}"
            raise InputError(path, f"{told}, which {human(held)} cannot hold", COPY_AGAIN)
        return nifti_check.within_limit(file, max_voxels)

    return examine_itk


def _is_list(reader: Any) -> bool:
    """Whether the components that ITK sees in each voxel are the volumes of a list: an axis of an NRRD of that kind,
    wherever it stands, as of diffusion images and sequences of 3D Slicer."""
    key = "NRRD_kinds[pixel]"
    return bool(reader.HasMetaDataKey(key)) and reader.GetMetaData(key).strip() == "list"


def _itk_parts(path: Path) -> tuple[Path, ...]:
    """The header and the data files that it names."""
    return (path, *read_header(path).files)


def _sitk(path: Path) -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        reason = "NRRD and MetaImage files need SimpleITK"
        raise ResourceError(path, reason, "pip install 'fastsrgan[sitk]', or convert it to .nii.gz") from error
    return SimpleITK


def _itk_reader(sitk: Any, path: Path, name: str) -> Any:
    try:
        str(path).encode("utf8")
    except UnicodeEncodeError as error:  # SimpleITK would end the process
        reason = "its name holds bytes that are no UTF-8, which SimpleITK cannot open"
        raise InputError(path, reason, "rename it") from error
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_ITK_READERS[name])
    reader.SetFileName(str(path))
    with contextlib.suppress(AttributeError):
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return reader


def _itk_line(error: Exception) -> str:
    """What ITK says, without where in its sources."""
    lines = [line.split("ERROR:")[-1].strip() for line in str(error).splitlines() if line.strip()]
    last = re.sub(r"^\w*\(0x[0-9a-f]+\):\s*", "", lines[-1] if lines else type(error).__name__)
    # Of a file that ends early MetaIO tells the system's last error, which there is none.
    return "its voxels end before their number" if last.startswith("Reason: ") else last[:160]


FORMATS = (
    Format("NIfTI", nifti_check.ENDINGS, nifti_check.examine, lambda path: tuple(dict.fromkeys(halves(path)))),
    Format("FreeSurfer MGH", (".mgh.gz", ".mgz", ".mgh"), examine_mgh, lambda path: (path,)),
    Format("NRRD", (".nrrd", ".nhdr"), _itk("NRRD"), _itk_parts),
    Format("MetaImage", (".mha", ".mhd"), _itk("MetaImage"), _itk_parts),
)
SUFFIXES = tuple(suffix for each in FORMATS for suffix in each.suffixes)
NAMES = ", ".join(each.name for each in FORMATS[:-1]) + f" or {FORMATS[-1].name}"
