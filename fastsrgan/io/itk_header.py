"""The text of NRRD and MetaImage headers: its fields, the data files that it names, and what their readers would pass
over or tell in lines of their own."""

from __future__ import annotations

import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from fastsrgan.errors import InputError, counted, human, times
from fastsrgan.io.nifti_voxels import COPY_AGAIN, open_stream, pointer_of

EXPORT_AGAIN = "export the image again"
SIDE_BY_SIDE = "keep the header and its data file side by side"
LONGEST_TEXT = 1 << 16  # bytes in which the text of a header is looked for
MOST_FILES = 1 << 16  # that a header may name
_FIELD = re.compile(rb"\s*(\w[\w ]*?)\s*(?::(?!=)|=)\s*(.*?)\s*$")  # not NRRD's key:=value
_PATTERN = re.compile(r"(\S*?)%(0?\d{0,3})[du](\S*)((?:\s+-?\d+){2,4})")
_NEEDED = ("NDims", "DimSize", "ElementType", "ElementDataFile")  # without them MetaIO tells its own lines
_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}


@dataclass(frozen=True)
class ItkHeader:
    """The text of a header.

    path : of the header; fields : names in small letters without blanks, in their order; end : the byte behind it
    files : the data files that it names, none where the voxels stand in the file itself
    several : whether they are named by a list or a pattern
    """

    path: Path
    fields: dict[bytes, bytes]
    end: int
    files: tuple[Path, ...]
    several: bool


def read_header(path: Path) -> ItkHeader:
    """Read it, and look at the data files that it names.

    Raises InputError for files that are not there, not regular, or not below the header's folder; for a header that is
    packed as a whole, and for a MetaImage header that its reader cannot parse, or of whose slices some have no file.
    """
    fields: dict[bytes, bytes] = {}
    with open_stream(path) as stream:
        if stream.packed:
            raise InputError(path, "is packed with gzip as a whole", f"gunzip it, its name ends in {path.suffix}")
        first = line = stream.file.readline(LONGEST_TEXT)
        nrrd = first.startswith(b"NRRD")
        while line and (line.strip() or not nrrd) and b"elementdatafile" not in fields and len(fields) < MOST_FILES:
            if found := _FIELD.match(line):
                fields.setdefault(found[1].lower().replace(b" ", b""), found[2])
            if fields.get(b"datafile", b"").upper().startswith(b"LIST"):
                break  # the names follow
            line = b"" if b"elementdatafile" in fields else stream.file.readline(LONGEST_TEXT)
        end = stream.file.tell()
        if not nrrd:
            _parsable(path, fields)
        named = os.fsdecode(fields.get(b"elementdatafile", fields.get(b"datafile", b"LOCAL")))
        listed = named.upper().startswith("LIST")
        names = stream.file.read(LONGEST_TEXT).split(b"\n") if listed else []
    several = listed or "%" in named
    if listed:
        files = [os.fsdecode(name.strip()) for name in names if name.strip()]
    elif several:
        files = _counted(path, named)
    else:
        files = [] if named.upper().startswith("LOCAL") else [named]
    header = ItkHeader(path, fields, end, tuple(_part(path, name) for name in files), several)
    if several and not nrrd:
        _whole(header, named)
    return header


def number(text: bytes | None) -> int:
    """A whole number of a header; 0 where there is none."""
    return int(text) if text and re.fullmatch(rb"-?\d{1,18}", text) else 0


def is_true(text: bytes | None) -> bool:
    """Whether a field of a MetaImage header says so, as MetaIO reads it."""
    return text is not None and text.startswith((b"T", b"t", b"1"))


def _parsable(path: Path, fields: dict[bytes, bytes]) -> None:
    missing = [name for name in _NEEDED if name.lower().encode() not in fields]
    if missing:
        raise InputError(path, f"its header has no {' and no '.join(missing)}", EXPORT_AGAIN)
    dims = number(fields[b"ndims"])
    sizes = fields[b"dimsize"].split()
    if not 1 <= dims <= 10 or len(sizes) != dims or not all(0 < number(size) < 1 << 31 for size in sizes):
        told = b" ".join(sizes).decode("ascii", "replace")[:40]
        said = fields[b"ndims"].decode("ascii", "replace")[:10]
        raise InputError(path, f"its header declares impossible dimensions: NDims {said}, DimSize {told}", EXPORT_AGAIN)
    order = list(fields)
    early = [name for name in (b"dimsize", b"transformmatrix", b"offset", b"elementspacing") if name in fields]
    if any(order.index(name) < order.index(b"ndims") for name in early):
        raise InputError(path, "its header has fields of dimensions in front of NDims", EXPORT_AGAIN)


def _counted(path: Path, named: str) -> list[str]:
    """The names that a pattern such as ``slice%03d.raw 1 12 1`` stands for."""
    found = _PATTERN.fullmatch(named)
    numbers = [int(word) for word in found[4].split()] if found else []
    step = numbers[2] if len(numbers) > 2 else 1
    names = range(numbers[0], numbers[1] + (1 if step > 0 else -1), step) if numbers and step else range(0)
    if found is None or not 0 < len(names) <= MOST_FILES:
        raise InputError(path, f"names its data files by {named[:60]!r}, which is no pattern", EXPORT_AGAIN)
    return [f"{found[1]}{format(i, found[2] + 'd')}{found[3]}" for i in names]


def _part(path: Path, name: str) -> Path:
    """A data file, which lies in the header's folder or below it: a header of a stranger names no other file."""
    part = path.with_name(name) if name and os.sep not in name and name not in (".", "..") else path.parent / name
    folder = os.path.abspath(path.parent)
    if os.path.commonpath([folder, os.path.abspath(part)]) != folder:
        raise InputError(path, f"names a data file outside its own folder, {name}", SIDE_BY_SIDE)
    if pointer := pointer_of(part):
        raise InputError(part, *pointer)
    try:
        mode = part.stat().st_mode
    except (OSError, ValueError):
        raise InputError(part, "no such file", SIDE_BY_SIDE) from None
    if not stat.S_ISREG(mode):
        raise InputError(part, "is not a regular file", SIDE_BY_SIDE)
    return part


def _whole(header: ItkHeader, named: str) -> None:
    """Refuse a MetaImage of which some slices have no file, or a file that ends early: MetaIO leaves them empty."""
    sizes = [number(size) for size in header.fields[b"dimsize"].split()]
    if named.upper().startswith("LIST") and named[4:].strip() not in ("", "2"):
        raise InputError(header.path, "its voxels lie in files of several slices each", EXPORT_AGAIN)
    if len(header.files) != (slices := math.prod(sizes[2:])):
        told = f"names {counted(len(header.files), 'data file')} for {counted(slices, 'slice')}"
        raise InputError(header.path, told, COPY_AGAIN)
    kind = header.fields[b"elementtype"].decode("ascii", "replace").upper().removeprefix("MET_").removeprefix("U")
    skipped = max(0, number(header.fields.get(b"headersize")))
    wanted = math.prod(sizes[:2]) * _BYTES.get(kind, 1)
    for part in header.files:
        if (held := part.stat().st_size - skipped) < wanted and is_true(header.fields.get(b"binarydata", b"T")):
            told = f"truncated: the header declares a slice of {times(sizes[:2])}, {human(wanted)}"
            raise InputError(part, f"{told}, the file holds {human(max(0, held))}", COPY_AGAIN)
