"""The tables that name a user's files: the original's training CSV and its list of images to apply a model to.

A training table has the columns ``HR_image``, ``Label_image``, ``Base`` (``Train`` or ``Test``, in any case) and, where
masks are used, ``Mask_image``, as in the original; ``Label_classes`` says which values of a label map are the structure
(`labels.structure`). Comma, semicolon and tab are taken as separators, a byte-order mark and
any line end are accepted; blank lines, a first line ``sep=;`` and ``#`` lines above the header are skipped, cells such
as ``n/a`` are empty, other columns are ignored and named.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsrgan.core.files import atomic_write, is_special, url_of
from fastsrgan.core.places import recorded
from fastsrgan.errors import FastsrganError, InputError, counted, some
from fastsrgan.io.formats import SUFFIXES
from fastsrgan.io.nifti_voxels import pointer_of, unreadable

log = logging.getLogger("fastsrgan")

SPLITS = ("Train", "Test")
COLUMNS = ("HR_image", "Label_image", "Base", "Mask_image", "Tissue_image", "Label_classes")
TABLE_WANTED = "a CSV file with the columns HR_image, Label_image and Base is expected, of a BIDS dataset too"
# What the first cell of a list says where it names no image, in any case.
HEADINGS = frozenset(("hr_image", "lr_image", "image", "images", "path", "paths", "file", "files", "filename"))
LIST_TABLES = (".csv", ".tsv")  # endings of lists that are tables
DELIMITERS = (",", ";", "\t")
_ENDINGS = "|".join(map(re.escape, SUFFIXES))
_SUFFIX = re.compile(rf"({_ENDINGS})$", re.IGNORECASE)
_FIRST_CELL = re.compile(rf"(?:{_ENDINGS})\"?\s*([,;\t])", re.IGNORECASE)
_SWALLOWED = re.compile(rf"[\r\n].*(?:{_ENDINGS})", re.IGNORECASE | re.DOTALL)
_RESERVED = {"zarr.json", "manifest.json", "c"}  # names with a meaning at the root of a Zarr store
_MAX_ID = 100
_NOTHING = frozenset(("n/a", "na", "nan", "<na>", "null"))  # as BIDS, R, pandas and others write an empty cell
_SPREADSHEET = re.compile(r"\s*\"?sep=(.)\"?[\s,;]*$", re.IGNORECASE)  # Excel's first line
_NEAR = 0.85  # of two names, the share of letters in common from which one is meant as the other
_BINARY = ((b"PK\x03\x04", "an Excel workbook or a zip archive"), (b"\x1f\x8b", "a gzip file"))
_MAX_BYTES = 1 << 26
_MAX_TOLD = 50  # faults in one message
_MAX_FAULT, _MAX_CELL = 600, 200  # characters of a fault, of a cell in it
_MAX_COLUMNS, _MAX_NAMED, _MAX_COLUMN = 200, 12, 40  # columns that are looked at, that are named, characters of one
# A number of a message that is no part of a name or a path.
NUMBER = re.compile(r"(?<![\w./-])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w/]|\.\w)")

Fault = tuple[int, str | FastsrganError]  # line, what is wrong there


@dataclass(frozen=True)
class TableRow:
    """One subject of a table: its line in the file, absolute paths, the split, and the name it has in a store.

    ``image`` is the map of tissues where the table names no image, and ``has_image`` False.
    """

    line: int
    image: Path
    label: Path | None
    mask: Path | None
    base: str
    subject: str
    tissues: Path | None = None
    has_image: bool = True
    classes: str = ""


def read_table(csv_path: str | os.PathLike, *, base_path: str | None = None, need_label: bool = True) -> list[TableRow]:
    """Read and check a training table; every fault of every row is collected first.

    Parameters
    ----------
    csv_path : the table
    base_path : text put before every path, as the original does; a missing ``/`` between the two is supplied, and an
        absolute path that exists stays as it is. Without it a relative path is looked for beside the table, then, as
        in the original, in the current folder.
    need_label : False accepts rows, or a whole table, without ``Label_image``

    Raises InputError naming all faults: missing or repeated columns, wrong ``Base``, empty cells, missing files,
    repeated images, and subjects that are both in Train and in Test.
    """
    csv_path = Path(csv_path)
    records = _records(csv_path, _text(csv_path, TABLE_WANTED), delimiter_for(COLUMNS))
    if not records:
        raise InputError(csv_path, "is empty", f"its first line names the columns {', '.join(COLUMNS[:3])}")
    heading, header = records[0]
    faults = _header_faults(heading, header, need_label)
    if faults:
        raise table_error(csv_path, faults)
    tell_unread(csv_path, header, COLUMNS)
    rows: list[TableRow] = []
    missing = 0
    for line, cells in records[1:]:
        if len(cells) > len(header):
            faults.append((line, too_many(cells, header)))
            continue
        values = dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=True))
        row, row_faults = _row(line, values, csv_path, base_path, need_label)
        faults += [(line, fault) for fault in row_faults]
        missing += sum("no such file" in fault for fault in row_faults)
        if row:
            rows.append(row)
    if len(records) == 1:
        faults.append((heading, "no row below the header"))
    faults += _repetitions(rows)
    if faults:
        where = f"{base_path} is put before every path" if base_path else f"paths start at {csv_path.absolute().parent}"
        raise table_error(csv_path, faults, f"{where}, see --base-path" if missing else None)
    ids = subject_ids([row.image for row in rows])
    return [dataclasses.replace(row, subject=name) for row, name in zip(rows, ids, strict=True)]


def read_list(path: str | os.PathLike, *, base_path: str | None = None) -> list[Path]:
    """Read a list of images: a column of a ``.csv`` or ``.tsv``, or a ``.txt`` with one path a line.

    ``#`` begins a comment, in tables above the first line alone. A first line of a table that is a heading (one of
    ``HEADINGS`` in any column, and no file of that name) is passed over, and its column of images is taken,
    ``HR_image`` before others; so is a first column that numbers the rows. Lines without an image, and images of other
    columns, are told.

    Repeated entries are dropped, the order is kept, and whether the files exist is left to the caller. Paths are found
    as in ``read_table``. Raises InputError when the list cannot be read or names nothing.
    """
    path = Path(path)
    text = _text(path)
    if path.suffix.lower() in LIST_TABLES:
        entries = _list_entries(path, _records(path, text, _list_delimiter), base_path)
    else:
        entries = [_unquoted(line.strip()) for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = dict.fromkeys(_locate(entry, path, base_path) for entry in entries if entry)
    if not found:
        raise InputError(path, "names no image", "one path a line")
    return list(found)


def _list_entries(path: Path, records: list[tuple[int, list[str]]], base_path: str | None) -> list[str]:
    """The column of images of a list, without its heading."""
    table = [cells for _, cells in records]
    header = table[0] if table else []
    if not _is_heading(header) or (header[0] and os.path.exists(_locate(header[0], path, base_path))):
        column = _image_column(path, table, base_path)
        entries = [cells[column] if column < len(cells) else "" for cells in table]
        titled = _is_title(entries, path, base_path)
        if titled:
            log.info("%s: its first line, %s, is taken for a heading", path, entries[0] or "an empty cell")
        _tell_of_list(path, records, column, titled)
        return entries[titled:]
    named = [k for k, cell in enumerate(header) if cell == COLUMNS[0] or cell.casefold() in HEADINGS]
    column = header.index(COLUMNS[0]) if COLUMNS[0] in header else named[0]
    _tell_of_list(path, records, column, True)
    return [cells[column] if column < len(cells) else "" for cells in table[1:]]


def _tell_of_list(path: Path, records: list[tuple[int, list[str]]], column: int, titled: bool) -> None:
    """What of a list is not taken: lines without an image, and images of other columns."""
    rows = records[titled:]
    empty = [str(line) for line, cells in rows if column >= len(cells) or not cells[column]]
    if empty:
        log.warning(
            "%s: %s: %s",
            path,
            counted(len(empty), "line names no image", "lines name no image"),
            some(empty, _MAX_NAMED),
        )
    more = {k for _, cells in rows for k, cell in enumerate(cells) if k != column and _SUFFIX.search(cell)}
    if more:
        header = records[0][1] if titled else []
        names = [header[k] if k < len(header) and header[k] else str(k + 1) for k in (column, *sorted(more))]
        others = some(names[1:], _MAX_NAMED)
        log.warning("%s: the images of column %s are taken, those of %s are not", path, names[0], others)


def _image_column(path: Path, table: list[list[str]], base_path: str | None) -> int:
    """The first column with images. Raises InputError where none has any."""

    def images_in(column: int) -> bool:
        cells = [cells[column] for cells in table if column < len(cells)]
        return any(_SUFFIX.search(cell) or (cell and os.path.exists(_locate(cell, path, base_path))) for cell in cells)

    columns = range(max(map(len, table), default=0))
    if any(map(any, table)) and not any(map(images_in, columns)):
        hint = f"a column of paths, called {COLUMNS[0]}, image, path or file"
        raise InputError(path, "no column holds image files, or folders that are there", hint)
    return next(filter(images_in, columns), 0)


def _is_title(entries: list[str], path: Path, base_path: str | None) -> bool:
    """Whether the first cell of a column is a name above images: what is none, and nothing that is there, where all
    others are image files."""
    first, others = next(iter(entries), ""), [entry for entry in entries[1:] if entry]
    if _SUFFIX.search(first) or (first and os.path.exists(_locate(first, path, base_path))):
        return False
    return bool(others) and all(map(_SUFFIX.search, others))


def _unquoted(line: str) -> str:
    """A path as it is copied with quotes around it, without them."""
    return line[1:-1] if len(line) > 2 and line[0] == line[-1] and line[0] in "\"'" else line


def _is_heading(cells: Sequence[str]) -> bool:
    """Whether a line names columns: one of them is called like a column of images, and none is an image."""
    named = any(cell == COLUMNS[0] or cell.casefold() in HEADINGS for cell in cells)
    return named and not any(_SUFFIX.search(cell) for cell in cells)


def table_error(path: os.PathLike, faults: Sequence[Fault], hint: str | None = None) -> InputError:
    """All faults of a table, in order of lines, as one error of one line; of equal ones the lines, and the fault once.

    The hint of a lone error, or of errors that are all alike, is that error's.
    """
    groups = _alike(faults)
    first = groups[0][0][1]
    alike = len(groups) == 1 and isinstance(first, FastsrganError)
    if isinstance(first, FastsrganError) and alike:
        hint = hint or first.hint
    count = f"{len(faults)} faults: " if len(faults) > 1 else ""
    told = count + _in_words(groups, hints=not alike)
    return InputError(path, told, hint or f"correct {'them' if len(faults) > 1 else 'it'} and run again")


def told_by_line(faults: Sequence[Fault]) -> str:
    """Faults of a table in order of lines, as part of one line of text: the first 50, equal ones once."""
    return _in_words(_alike(faults))


def _alike(faults: Sequence[Fault]) -> list[list[Fault]]:
    """Faults in order of lines, those of one reason together: of several files the same is wrong, but for one number
    that the reason may hold."""
    groups: dict[tuple[str, ...], list[Fault]] = {}
    for line, fault in sorted(faults, key=lambda fault: fault[0]):
        key: tuple[str, ...] = (str(fault),)
        if isinstance(fault, FastsrganError):
            column, (bare, count) = fault.what.partition(" ")[0], NUMBER.subn("\0", fault.reason)
            key = (column if column in COLUMNS else "", bare if count == 1 else fault.reason, fault.hint)
        groups.setdefault(key, []).append((line, fault))
    return list(groups.values())


def _in_words(groups: Sequence[Sequence[Fault]], hints: bool = True) -> str:
    told = []
    for group in groups[:_MAX_TOLD]:
        lines = list(dict.fromkeys(str(line) for line, _ in group))
        fault = group[0][1]
        text = str(fault)
        if isinstance(fault, FastsrganError):
            errors = [each for _, each in group if isinstance(each, FastsrganError)]
            names, reasons = ({getattr(each, part) for each in errors} for part in ("what", "reason"))
            reason = fault.reason
            if len(reasons) > 1:
                reason = NUMBER.sub(span([number for text in reasons for number in NUMBER.findall(text)]), reason)
            others = f" and {counted(len(names) - 1, 'other')}" if len(names) > 1 else ""
            text = f"{fault.what}{others}: {reason}" + f" ({fault.hint})" * hints
        number = f"{len(lines)} lines, " if len(lines) > _MAX_NAMED else "lines " if len(lines) > 1 else "line "
        told.append(f"{number}{some(lines, _MAX_NAMED)}: {' '.join(text.split())[:_MAX_FAULT]}")
    more = sum(map(len, groups[_MAX_TOLD:]))
    return "; ".join(told) + f"; and {more} more" * bool(more)


def span(numbers: Sequence[str]) -> str:
    """Smallest to largest, as they were written."""
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if float(low) == float(high) else f"{low} to {high}"


def subject_ids(images: list[Path]) -> list[str]:
    """A name for each image that is unique, whatever the case of its letters, and safe in paths and URLs.

    The name is the file name without its image ending (`formats.SUFFIXES`); accents are dropped and every run of
    characters outside ``A-Z a-z 0-9 . _ -`` becomes ``_``. Where two images would share a name, the names of their
    parent folders are put before it with ``-``, as many as it takes; what is still shared gets ``-2``, ``-3`` in order.
    """
    depth = [1] * len(images)
    while True:
        names = [_safe("-".join(_parts(image)[-d:])) for image, d in zip(images, depth, strict=True)]
        count = Counter(name.casefold() for name in names)
        deeper = [
            d + 1 if count[name.casefold()] > 1 and d < len(_parts(image)) else d
            for image, d, name in zip(images, depth, names, strict=True)
        ]
        if deeper == depth:
            break
        depth = deeper
    seen: set[str] = set()
    for i, name in enumerate(names):
        n = 1
        while names[i].casefold() in seen:
            n += 1
            names[i] = f"{name}-{n}"
        seen.add(names[i].casefold())
    return names


def _parts(image: Path) -> list[str]:
    folders = [part for part in image.parent.parts if part != image.anchor]
    return [*folders, _SUFFIX.sub("", image.name)]


def _safe(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", plain)[-_MAX_ID:].strip("._-") or "subject"
    return f"{name}_" if name.casefold() in _RESERVED else name


def _text(path: Path, wanted: str = "a CSV file or a list is expected") -> str:
    if is_special(path):
        raise InputError(path, "is not a regular file", wanted)
    try:
        if os.path.isfile(path) and path.stat().st_size > _MAX_BYTES:
            raise InputError(path, f"is no table: {path.stat().st_size} bytes", "a CSV file is expected")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(path, "no such file", "check the path") from None
    except (OSError, ValueError) as error:
        if os.path.isdir(path):
            raise InputError(path, "is a folder", wanted) from error
        raise unreadable(path, error) from error
    kind = next((what for magic, what in _BINARY if raw.startswith(magic)), None)
    if kind:
        raise InputError(path, f"is {kind}, not text", "save the table as `CSV UTF-8`")
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        raise InputError(path, "is not UTF-8 text", "save it as `CSV UTF-8`") from None
    if "\0" in text:
        raise InputError(path, "is not text", "a CSV file is expected")
    return text.lstrip("\ufeff")  # a second mark, of tools that put one before another's


def _records(path: Path, text: str, delimiter_of: Callable[[str], str]) -> list[tuple[int, list[str]]]:
    """(line number, cells) of every line that holds something, cells without blanks around them and without empty ones
    at the end; quotes may hide separators. Comments and a spreadsheet's ``sep=;`` above the first are passed over."""
    lines = text.splitlines(keepends=True)
    above, delimiter = 0, ""
    while above < len(lines) and (not (bare := lines[above].strip()) or bare[0] == "#" or _SPREADSHEET.match(bare)):
        found = _SPREADSHEET.match(bare)
        delimiter = found[1] if found else delimiter
        above += 1
    text, first = "".join(lines[above:]), lines[above].strip("\r\n") if above < len(lines) else ""
    delimiter = delimiter if delimiter and delimiter in first else delimiter_of(first)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    records, last, line = [], above + 1, above + 1
    try:
        for cells in reader:
            cells = ["" if cell.strip().casefold() in _NOTHING else cell.strip() for cell in cells]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                records.append((line, cells))
            last, line = line, reader.line_num + above + 1
    except csv.Error as error:
        raise table_error(path, [(line, f"cannot be read as fields: {error}")], "is a quote left open?") from error
    if fault := _open_quote(records, last, io.StringIO(text, newline="").readlines()[last - above - 1 :], delimiter):
        raise table_error(path, [fault], "close it; a quote inside a cell is doubled")
    return records


def _open_quote(
    records: Sequence[tuple[int, list[str]]], last: int, end: Sequence[str], delimiter: str
) -> Fault | None:
    """A quote that is never closed, in the row of line ``last`` with the text ``end``, or only in a row below: what
    lies between became one cell. A cell of several lines without an image in them is what its writer meant."""
    try:
        list(csv.reader(end, delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):
            return last, "a quote opens here and is never closed"
    rows = (line for line, cells in records if any(map(_SWALLOWED.search, cells)))
    return next(((line, "a quote opens here and closes in a row below") for line in rows), None)


def delimiter_for(columns: Iterable[str]) -> Callable[[str], str]:
    """Header -> the separator under which it names the most of some columns."""
    known = set(columns)
    return lambda header: max(DELIMITERS, key=lambda d: len({cell.strip(' "') for cell in header.split(d)} & known))


def _list_delimiter(line: str) -> str:
    """The first separator that follows a whole image name, or makes a heading of the line, else the most frequent."""
    match = _FIRST_CELL.search(line)
    if match:
        return match.group(1)
    found = (d for d in DELIMITERS if _is_heading([cell.strip(' "') for cell in line.split(d)]))
    return next(found, max(DELIMITERS, key=line.count))


def _header_faults(line: int, header: list[str], need_label: bool) -> list[Fault]:
    faults: list[Fault] = [(line, f"column {name} twice") for name in COLUMNS if header.count(name) > 1]
    for name in ("HR_image", "Label_image", "Base"):
        if name in header or (name == "Label_image" and not need_label):
            continue
        if name != "Base" and need_label and "Tissue_image" in header:
            continue
        faults.append((line, f"no column {name}, {instead(name, header)}"))
    return faults or misspelt(line, header, COLUMNS)


def misspelt(line: int, header: Sequence[str], known: Sequence[str]) -> list[Fault]:
    """A fault for each column that is meant as one of the ``known``, which the table lacks: it would not be read."""
    lower = {name.casefold(): name for name in known if name not in header}
    others = [cell for cell in header[:_MAX_COLUMNS] if cell and cell not in known and len(cell) <= _MAX_COLUMN]
    spelt = {cell: re.sub(r"[\s-]+", "_", cell.casefold()) for cell in others}
    near = [(cell, n) for cell in spelt for n in difflib.get_close_matches(spelt[cell], lower, 1, _NEAR)]
    return [(line, f"column {cell} is not read, rename it {lower[n]}") for cell, n in near]


def tell_unread(path: Path, header: Sequence[str], known: Sequence[str]) -> None:
    """Name the columns of a table that nothing reads."""
    others = [cell[:_MAX_COLUMN] for cell in header if cell and cell not in known]
    if others:
        log.info("%s: columns that are not read: %s", path, some(others, _MAX_NAMED))


def too_many(cells: Sequence[str], header: Sequence[str]) -> str:
    """The fault of a row that is longer than its header."""
    fields, columns = counted(len(cells), "field"), counted(len(header), "column")
    return f"{fields} under {columns}, put cells that hold a separator in quotes"


def instead(name: str, header: list[str], known: Collection[str] = COLUMNS) -> str:
    """What a table has in place of a column; those that are ``known`` stand for themselves."""
    cells = [cell[:_MAX_COLUMN] for cell in header[:_MAX_COLUMNS]]
    others = [cell.lower() for cell in cells if cell not in known]
    if len(header) == 1 and name in header[0]:
        return f"found {cells[0]}: comma, semicolon or tab separate columns"
    near = difflib.get_close_matches(name.lower(), others, 1)
    if near:
        return f"rename {next(cell for cell in cells if cell.lower() == near[0])}?"
    return "found " + some([cell[:_MAX_COLUMN] or "(empty)" for cell in header], _MAX_NAMED)


def _row(
    line: int, values: dict[str, str], csv_path: Path, base_path: str | None, need_label: bool
) -> tuple[TableRow | None, list[str]]:
    faults, paths = [], {}
    synthetic = bool(values.get("Tissue_image")) and need_label  # image and label are made of it (synthesis.py)
    for column in ("HR_image", "Label_image", "Mask_image", "Tissue_image"):
        text = values.get(column, "")
        if not text:
            if not synthetic and (column == "HR_image" or (column == "Label_image" and need_label)):
                faults.append(f"{column} is empty")
            continue
        paths[column] = _locate(text, csv_path, base_path)
        if url := url_of(text):
            told = "write the path alone" if url.startswith("file:") else "images are read from paths"
            faults.append(f"{column} {url[:_MAX_CELL]} is a URL, {told}")
        elif not os.path.exists(paths[column]):
            pointer = pointer_of(paths[column])
            told = f"{pointer[0]}, {pointer[1]}" if pointer else "no such file"
            faults.append(f"{column} {text[:_MAX_CELL]}: {told}")
    base = next((split for split in SPLITS if split.casefold() == values["Base"].casefold()), values["Base"])
    if base not in SPLITS:
        near = difflib.get_close_matches(base.capitalize(), SPLITS, 1)
        told = f"did you mean {near[0]}?" if near else "Train or Test is allowed"
        faults.append(f"Base is {base[:_MAX_CELL]!r}, {told}")
    label, mask, tissues = (paths.get(column) for column in ("Label_image", "Mask_image", "Tissue_image"))
    image = paths.get("HR_image") or (tissues if synthetic else None)
    if image is None:
        return None, faults
    classes = values.get("Label_classes", "")
    return TableRow(line, image, label, mask, base, "", tissues, "HR_image" in paths, classes), faults


def _locate(text: str, table: Path, base_path: str | None) -> Path:
    """The absolute path meant by a cell: the first candidate that exists, else the first; below ``base_path`` where
    that is a folder. A URL stays what it is."""
    if url_of(text):
        return Path(text)
    text = os.path.expanduser(text) if text.startswith("~") and not base_path else text
    if base_path:
        candidates = [Path(base_path + text), Path(base_path) / text.lstrip("/")]
        candidates += [Path(text)] if os.path.isabs(text) else []
    else:
        candidates = [table.absolute().parent / text, Path(text)]
    # One letter with an accent is one sign or two: tables and disks of other systems differ in that.
    spelt = [Path(unicodedata.normalize(form, str(c))) for form in ("NFC", "NFD") for c in candidates]
    spelt += [Path(str(c).replace("\\", "/")) for c in candidates]  # as a table of Windows has it
    meant = candidates[bool(base_path and os.path.isdir(base_path))]
    return Path(recorded(next((c for c in [*candidates, *spelt] if os.path.exists(c)), meant)))


def _repetitions(rows: list[TableRow]) -> list[tuple[int, str]]:
    """Images named twice, and subjects that would be trained on and tested on. One fault a row is enough."""
    faults: list[tuple[int, str]] = []
    first: dict[tuple[str, str], TableRow] = {}
    for row in (row for row in rows if row.base in SPLITS):
        keys = [("HR_image", os.path.realpath(row.image), row.image.name)]
        if row.label and row.label != row.image:
            keys.append(("Label_image", os.path.realpath(row.label), row.label.name))
        if person := _person(row.image):
            keys.append(("subject", os.path.join(*person), person[1]))
        told = []
        for kind, key, name in keys:
            before = first.setdefault((kind, key), row)
            if before.base != row.base:
                told.append(f"{kind} {name} is in {row.base}, and in {before.base} at line {before.line}")
            elif before is not row and kind == "HR_image":
                told.append(f"{kind} {name} is already named at line {before.line}")
        faults += [(row.line, text) for text in told[:1]]
    return faults


def _person(image: Path) -> tuple[str, str] | None:
    """(data set folder, ``sub-XX``) where the file name follows BIDS: all sessions of one person share it."""
    match = re.match(r"(sub-[A-Za-z0-9+]+)[_.]", image.name)
    if not match:
        return None
    folder = next((p.parent for p in image.parents if p.name == match.group(1)), image.parent)
    return os.path.realpath(folder), match.group(1)


def write_rows(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV with a column for every name in any of them, in the order in which they come; cells of none empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf8") as f:
        writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
