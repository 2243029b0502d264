"""The voxels behind a checked header, in bounded memory: files as byte streams, gzip read to its last trailer.

Python's gzip module checks as much, but reads in pieces of 8 KiB and cannot tell what was left behind the last member.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastsrgan.core.files import url_of
from fastsrgan.errors import InputError, compared, counted, human, times

CHUNK_BYTES = 1 << 22
DEFLATE_LIMIT = 1032  # no deflate stream expands further (zlib, "technical details")
_USUAL_OFFSETS = (0, 352, 544)  # of the voxels: alone in their file, behind the headers of NIfTI-1 and NIfTI-2
COPY_AGAIN = "copy or download the file again"
EXPANSION_LIMIT = 500  # a sparse label map reaches 350
EXPANSION_FREE = 256 << 20  # below this size anything that gzip can hold is accepted
_PIECE = 1 << 16
_LONGEST_POINTER = 1024  # bytes of a file that stands for another


class PlainStream:
    """An uncompressed file. ``size`` is the file's, in bytes; ``trailing`` is 0."""

    packed = False
    trailing = 0

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def read(self, n: int) -> bytes:
        """``n`` bytes, fewer only at the end."""
        return self.file.read(n)

    def skip(self, n: int) -> int:
        """Moves ``n`` bytes on; returns how many there were."""
        here = self.file.tell()
        self.file.seek(min(here + n, self.size))
        return self.file.tell() - here


class GzipStream(PlainStream):
    """A gzip file of one or more members, read unpacked. zlib compares the CRC and the length in each trailer.

    ``size`` is the packed file's. Raises InputError where the data are damaged or stop before their end mark.
    ``trailing`` counts bytes behind the last member that are no zero padding, once the end was reached, and ``end`` is
    where that is in the file.
    """

    packed = True
    form, wbits = "gzip", 31
    end = 0

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        super().__init__(file, path, size)
        self._member = zlib.decompressobj(self.wbits)
        self._pending = b""
        self._ended = False

    def read(self, n: int) -> bytes:
        parts, got = [], 0
        while got < n and not self._ended:
            self._pending = self._pending or self.file.read(_PIECE)
            if not self._pending:
                raise InputError(self.path, f"truncated: the {self.form} data stop before their end mark", COPY_AGAIN)
            try:
                parts.append(self._member.decompress(self._pending, n - got))
            except zlib.error as error:
                summed = "data check" in str(error) or "length check" in str(error)
                reason = f"damaged: the {self.form} {'checksum is wrong' if summed else 'data are broken'}"
                raise InputError(self.path, reason, COPY_AGAIN) from error
            got += len(parts[-1])
            self._pending = self._member.unconsumed_tail
            if self._member.eof:
                self._next_member()
        return b"".join(parts)

    def skip(self, n: int) -> int:
        done = 0
        while done < n:
            got = len(self.read(min(CHUNK_BYTES, n - done)))
            if not got:
                break
            done += got
        return done

    def _next_member(self) -> None:
        rest = self._member.unused_data
        if len(rest) < 2:
            rest += self.file.read(_PIECE)
        if self.form == "gzip" and rest[:2] == b"\x1f\x8b":
            self._member, self._pending = zlib.decompressobj(self.wbits), rest
            return
        self._ended, self.end = True, self.file.tell() - len(rest)
        if rest.strip(b"\0"):
            self.trailing = len(rest) + self.size - self.file.tell()


class ZlibStream(GzipStream):
    """One zlib stream, with the sum of zlib's own form, or one gzip member: MetaIO reads no second."""

    form, wbits = "zlib", 47


def pointer_of(path: str | os.PathLike) -> tuple[str, str] | None:
    """(what a path is, what to do) where it stands for a file that was not fetched: git annex, git LFS, a dead link."""
    try:
        link = os.readlink(os.fspath(path)) if os.path.islink(path) and not os.path.exists(path) else ""
        head = b""
        if not link and os.path.isfile(path) and os.path.getsize(path) < _LONGEST_POINTER:
            head = Path(path).read_bytes()
    except (OSError, ValueError):
        return None
    if "annex" in link or head.lstrip(b"./").startswith((b"annex/objects/", b"git/annex/objects/")):
        return "its content was not fetched: a pointer of git annex", f"datalad get or git annex get {path}"
    if head.startswith(b"version https://git-lfs"):
        return "its content was not fetched: a pointer of git LFS", f"git lfs pull --include {Path(path).name}"
    if link:
        return f"is a link to {link}, where nothing is", "mend the link, or name the file itself"
    return None


def ignored(n_bytes: int, behind: str) -> str:
    """What is said of bytes that nothing needs."""
    return counted(n_bytes, f"byte behind {behind} was ignored", f"bytes behind {behind} were ignored")


def no_such_file(path: Path) -> InputError:
    """For a path where nothing is."""
    if url := url_of(path):
        local = url.lower().startswith("file:")
        hint = f"write the path alone, /{url[5:].lstrip('/')}" if local else "download it first"
        return InputError(url, "is a URL, images are read from paths", hint)
    if pointer := pointer_of(path):
        return InputError(path, *pointer)
    if str(path).startswith("~"):
        return InputError(path, "no such file", "~ is not the home folder within quotes: write the whole path")
    if set(path.name) & set("*?[") and path.parent.is_dir():
        return InputError(path, "no such file", "the shell fills in patterns without quotes; or name the folder")
    name = path.name.lower()
    with suppress(OSError, ValueError):  # packed, unpacked or in other letters; another subject's is no such name
        if near := [n for n in os.listdir(path.parent) if n.lower().removesuffix(".gz") == name.removesuffix(".gz")]:
            return InputError(path, "no such file", f"did you mean {min(near)}?")
    return InputError(path, "no such file", "check the path")


def unreadable(path: Path, error: Exception) -> InputError:
    """For a file that the system does not give."""
    reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return InputError(path, reason, "check the path and its permissions")


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 over the bytes of files, one after the other. Raises InputError for one that cannot be read."""
    digest = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as stream:
                while block := stream.read(CHUNK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise unreadable(path, error) from error
    return digest.hexdigest()


@contextmanager
def open_stream(path: Path) -> Iterator[PlainStream]:
    """Opens a regular, non-empty file; gzip is told by its content, not by its name.

    Raises InputError for what is missing, a folder, special, empty or not readable, also while it is being read.
    """
    if "\0" in str(path):
        raise InputError(repr(str(path)), "is not a file name", "check the path")
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise InputError(path, "is a folder, not an image", "name an image file; dcm2niix makes one of DICOM")
        if not stat.S_ISREG(info.st_mode):
            raise InputError(path, "is not a regular file", "give one .nii or .nii.gz file")
        if info.st_size == 0:
            raise InputError(path, "is empty (0 bytes)", COPY_AGAIN)
        if pointer := pointer_of(path):
            raise InputError(path, *pointer)
        with open(path, "rb") as file:
            kind = GzipStream if file.read(2) == b"\x1f\x8b" else PlainStream
            file.seek(0)
            yield kind(file, path, info.st_size)
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise unreadable(path, error) from error


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file whose header was found sane and whose declared size its bytes can hold.

    Attributes
    ----------
    path, voxel_path : header and voxels; the same file unless a .hdr / .img pair
    shape : (X, Y, Z) as stored
    volumes : how many of them; more than 1 for a 4-D image
    dtype : of the stored voxels, with their byte order
    offset : of the first voxel in ``voxel_path``, bytes
    slope, inter : intensity = stored * slope + inter; 1 and 0 when the header sets none
    affine : (4, 4) voxel index -> world mm
    warnings : grows while voxels are read
    meta : facts for provenance and for writers
    """

    path: Path
    voxel_path: Path
    shape: tuple[int, int, int]
    volumes: int
    dtype: np.dtype
    offset: int
    slope: float
    inter: float
    affine: np.ndarray
    warnings: list[str]
    meta: dict

    @property
    def voxels(self) -> int:
        """Voxels of one volume."""
        return math.prod(self.shape)

    @property
    def volume_bytes(self) -> int:
        return self.voxels * self.dtype.itemsize

    @property
    def declared_bytes(self) -> int:
        return self.offset + self.volumes * self.volume_bytes

    @property
    def slice_bytes(self) -> int:
        """Bytes of the smallest face: what one count too many or too few in a dimension changes at least."""
        return self.volume_bytes // max(self.shape)

    def pick(self, volume: int | None) -> int:
        """Check a volume index against the file; None means the only volume there is."""
        if volume is None and self.volumes > 1:
            reason = f"is a 4-D image with {self.volumes} volumes and one is needed"
            hint = f"infer takes --volume, 0 to {self.volumes - 1}, for its image; else split it into files of one"
            raise InputError(self.path, reason, hint)
        if not 0 <= (volume or 0) < self.volumes:
            allowed = "0" if self.volumes == 1 else f"0 to {self.volumes - 1}"
            raise InputError(self.path, f"has no volume {volume}", f"--volume can be {allowed}")
        return volume or 0

    def chunks(self, volume: int = 0) -> Iterator[np.ndarray]:
        """One volume's stored values in file order (first axis fastest): 1-D arrays, native byte order, read-only.

        The file is read to its end, so that a wrong checksum or length is an InputError even behind the last voxel.
        """
        item, start = self.dtype.itemsize, self.offset + volume * self.volume_bytes
        with open_stream(self.voxel_path) as stream:
            self._skip(stream, 0, start)
            for at in range(0, self.volume_bytes, CHUNK_BYTES):
                want = min(CHUNK_BYTES, self.volume_bytes - at)
                raw = stream.read(want)
                if len(raw) < want:
                    self._short(start + at + len(raw))
                chunk = np.frombuffer(raw, self.dtype, want // item)
                yield chunk if self.dtype.isnative else chunk.byteswap().view(self.dtype.newbyteorder("="))
            if stream.packed:  # a plain file's size was compared by check_size
                behind = start + self.volume_bytes
                self._skip(stream, behind, self.declared_bytes - behind)
                self._rest(stream)
                if stream.trailing:
                    self.warnings.append(ignored(stream.trailing, "the gzip data"))

    def _rest(self, stream: PlainStream) -> None:
        """Read on behind the last voxel, to the checksum."""
        self._surplus(len(stream.read(self.slice_bytes)))

    def scale(self, chunk: np.ndarray, out: np.ndarray) -> None:
        """Stored values -> intensities in ``out``; what overflows its type ends as infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.slope == 1 and self.inter == 0:
                out[...] = chunk
                return
            # In float64 until the one rounding to the result's type, as nibabel's get_fdata.
            scaled = chunk.astype(np.float64)
            scaled *= self.slope
            scaled += self.inter
            out[...] = scaled

    def check_size(self) -> None:
        """Compare what the header declares with what the file can hold, before a voxel is unpacked."""
        declared = self.declared_bytes
        voxels = f"{times(self.shape)} voxels" + (f" in {self.volumes} volumes" if self.volumes > 1 else "")
        if self.offset not in _USUAL_OFFSETS:
            voxels += f" from byte {self.offset if self.offset < 10**15 else f'{self.offset:.3g}'} on"
        says = f"the header declares {voxels}, {human(declared)}"
        with open_stream(self.voxel_path) as stream:
            size, packed = stream.size, stream.packed
        if not packed:
            if declared > size:
                wanted, there = compared(declared, size)
                reason = f"truncated: the header declares {voxels}, {wanted}, the file has {there}"
                raise InputError(self.voxel_path, reason, COPY_AGAIN)
            self._surplus(size - declared)
        elif declared > size * DEFLATE_LIMIT:
            reason = f"truncated: {says}, which a gzip file of {human(size)} cannot hold"
            raise InputError(self.voxel_path, reason, COPY_AGAIN)
        elif declared > EXPANSION_FREE and declared > size * EXPANSION_LIMIT:
            reason = f"refused as a gzip bomb: {says}, {declared // size} times the file's {human(size)}"
            raise InputError(self.voxel_path, reason, "if you trust it, unpack it with gunzip and give the .nii")

    def _skip(self, stream: PlainStream, here: int, n: int) -> None:
        done = stream.skip(n)
        if done < n:
            self._short(here + done)

    def _short(self, have: int) -> None:
        wanted, there = compared(self.declared_bytes, have)
        reason = f"truncated: the header declares {wanted}, the file holds {there}"
        raise InputError(self.voxel_path, reason, COPY_AGAIN)

    def _surplus(self, n: int) -> None:
        """Bytes behind the last voxel: a few are padding, a slice or more means that a dimension is wrong."""
        if n >= self.slice_bytes:
            reason = f"holds more data than the {times(self.shape)} voxels that its header declares"
            raise InputError(self.voxel_path, reason, "its dimensions are damaged: export the image again")
        if n > 0:
            self.warnings.append(ignored(n, "the last voxel"))


def write_voxels(stream: BinaryIO | gzip.GzipFile, data: np.ndarray, stored: np.dtype) -> None:
    """Write (X, Y, Z) or (X, Y, Z, volumes) in file order, a few slices at a time.

    Integer types: rounded to the nearest and clipped to the type's range; ValueError for what is not finite.
    """
    for block in np.moveaxis(data, 3, 0) if data.ndim == 4 else (data,):
        step = max(1, CHUNK_BYTES // (block.shape[0] * block.shape[1] * stored.itemsize))
        for k in range(0, block.shape[2], step):
            stream.write(_cast(block[:, :, k : k + step], stored).tobytes(order="F"))


def _cast(slab: np.ndarray, stored: np.dtype) -> np.ndarray:
    if stored.kind not in "iu" or slab.dtype.kind == "b":
        return slab.astype(stored, copy=False)
    low, high = np.iinfo(stored).min, np.iinfo(stored).max
    if slab.dtype.kind in "iu":
        held = np.iinfo(slab.dtype)
        return np.clip(slab, max(low, held.min), min(high, held.max)).astype(stored)
    if not np.isfinite(slab).all():
        raise ValueError("voxels that are not finite cannot be stored as integers")
    # The largest 64-bit integers are no float64: converted from the float below, then set.
    rounded = np.rint(slab.astype(np.float64, copy=False))
    whole = np.clip(rounded, low, np.nextafter(high + 1.0, 0)).astype(stored)
    whole[rounded >= high] = high
    return whole
