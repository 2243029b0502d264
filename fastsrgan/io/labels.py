"""Which values of a label map are the structure: by number, or by the name that a lookup table gives them.

A choice is written ``3,42``, ``Left-Cerebral-Cortex,Right-Cerebral-Cortex`` or ``cortex=3,42``; numbers and names may
be mixed; ``+``, ``;`` and blanks separate too, in a cell of a CSV. Lookup tables: FreeSurfer's (index name R G B A),
ITK-SNAP's (index R G B A ... "name"), and BIDS's ``dseg.tsv`` (columns index and name), which is found beside its map,
or above it where a dataset has one for several (`bids.sidecars`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastsrgan.core.files import is_special
from fastsrgan.errors import InputError, UsageError, counted, some
from fastsrgan.io import nifti as images
from fastsrgan.io.bids import sidecars
from fastsrgan.io.nifti_voxels import unreadable

CHOOSE = (
    "choose what counts as the structure with --label-classes, for example --label-classes 3,42 for FreeSurfer's cortex"
)
SHOWN = 12  # values, names that a message lists
_MOST_BYTES = 1 << 22
_NOTHING = frozenset(("n/a", "nan", "<na>"))  # an empty cell; NA may be a structure
_SNAP = re.compile(r'\s*(\d+)\s.*"(.*)"\s*$')
# Index and name in words, the colours behind it left out.
_WORDS = re.compile(r"\s*\d+\s+(\S.*?)(?:\s+\d+){0,4}\s*$")
_LINE = re.compile(r"\s*(\d+)(?:\s+([^\s,]+)|\s*[,;]\s*\"?([^,;\"]+))")


@dataclass(frozen=True)
class Structure:
    """A structure of a label map: its name and the values that are it."""

    name: str
    values: frozenset[int]

    @property
    def called(self) -> str:
        """The name where it says more than the values."""
        return "" if re.fullmatch(r"[\d,;+\s]*", self.name) else self.name


def structure(text: str, label: str | os.PathLike, table: str | os.PathLike | None = None) -> Structure:
    """What a choice means for one label map.

    Parameters
    ----------
    text : the choice; label : the map's file, beside which a ``.tsv`` of names may lie
    table : lookup table of names, in place of that one

    Raises UsageError for a choice that is empty, holds several or has a name that no table knows; InputError for a
    table that cannot be read.
    """
    text, name, listed, words = _parts(text)
    if all(word.isdigit() for word in words):
        return Structure(name or text, frozenset(map(int, words)))
    path = _beside(label) if table is None else Path(table)
    if path is None:
        hint = (
            "give the values, or a lookup table with --label-names FILE (FreeSurfer's, ITK-SNAP's or a BIDS dseg.tsv)"
        )
        raise UsageError("--label-classes", f"{text!r} is a name, and no table says which value it is", hint)
    names = read_names(path)
    words = _names_among(listed, names)
    values = [[int(word)] if word.isdigit() else _values(word, names, path) for word in words]
    if any(0 in some for some in values):
        raise _background(text)
    return Structure(name or text, frozenset().union(*values))


def check_given(texts: Sequence[str], table: str | os.PathLike | None = None, apart: bool = False) -> None:
    """Raise UsageError for what can be right for no label map, once and not for every subject: as `structures` of
    numbers, and of names where a table knows them; with ``apart`` as `refuse_overlap` too."""
    known = [text for text in texts if all(word.isdigit() for word in _parts(text)[3]) or table is not None]
    found = structures(known, "", table)
    if apart:
        refuse_overlap(found)


def rejoined(words: Sequence[str]) -> list[str]:
    """Choices as they were meant where the shell cut a list behind its comma: 3, 42 is 3,42 and no two structures."""
    whole: list[str] = []
    for word in words:
        if whole and (whole[-1].endswith((",", ";", "+")) or word.startswith((",", ";", "+"))):
            whole[-1] += word
        else:
            whole.append(word)
    return whole


def _parts(text: str) -> tuple[str, str, str, list[str]]:
    """A choice, the name in front of it, what it lists, and the words of that. Raises UsageError for what is none."""
    text = re.sub(r"(?<![\w.])(\d+)\.0+(?![\w.])", r"\1", text).strip()  # as pandas writes 3 beside empty cells
    name, listed = map(str.strip, text.split("=", 1)) if "=" in text else ("", text)
    if "=" in listed:
        hint = "one choice for each; in a table's cell A=1|B=2"
        raise UsageError("--label-classes", f"{text!r} names several structures", hint)
    words = [word for word in re.split(r"[,;+\s]+", listed) if word]
    if "=" in text and not name:
        raise UsageError("--label-classes", f"{text!r} has no name before =", "NAME=3,42, or the values alone")
    if nothing := [word for word in (name, *words) if word.casefold() in _NOTHING]:
        reason = f"{nothing[0]} stands for an empty cell and names no structure"
        raise UsageError("--label-classes", reason, "NAME=3,42, or the values alone")
    if not words:
        reason = f"{text!r} names no class"
        raise UsageError("--label-classes", reason, "values such as 3,42, or names of a lookup table")
    if odd := [word for word in words if re.fullmatch(r"[-\u2212]\d+|-?\d*\.\d+", word)]:
        raise UsageError("--label-classes", f"{odd[0]} is no value of a label", "whole numbers from 1 up, or names")
    if any(word.isdigit() and not int(word) for word in words):
        raise _background(text)
    return text, name, listed, words


def _background(text: str) -> UsageError:
    reason = f"{text!r} takes the value 0, which is what lies outside of all structures"
    return UsageError("--label-classes", reason, "values from 1 up; give the structure another number if it is 0")


def structures(
    texts: Sequence[str], label: str | os.PathLike, table: str | os.PathLike | None = None
) -> list[Structure]:
    """``structure`` of each choice. Raises UsageError also where two would have one name."""
    found = [structure(text, label, table) for text in texts]
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        raise UsageError("--label-classes", f"{' '.join(texts)} names a structure twice", "NAME=3,42 gives it a name")
    return found


def choices(row: str, given: str | Sequence[str] | None) -> list[str]:
    """The choices of a table's row: its own ``Label_classes``, several with ``|`` between, else the given ones."""
    listed = [part.strip() for part in row.split("|")] if row else [given] if isinstance(given, str) else given or ()
    return [text for text in listed if text]


def refuse_for_store(given: str | Sequence[str] | None, table: str | os.PathLike | None = None) -> None:
    """Raise UsageError where a choice or a lookup table is given for a store, whose labels are what they are."""
    if given or table:
        reason = "the labels of a store were chosen by `fastsrgan convert --label-classes`"
        hint = "leave it out, or name the table, or `fastsrgan convert` it with these classes"
        raise UsageError("--label-classes" if given else "--label-names", reason, hint)


def refuse_overlap(chosen: Sequence[Structure]) -> None:
    """Raise UsageError where two structures share a value: a voxel has one class."""
    for i, one in enumerate(chosen):
        for other in chosen[i + 1 :]:
            if shared := one.values & other.values:
                reason = f"{one.name} and {other.name} both hold {', '.join(map(str, sorted(shared)))}"
                raise UsageError("--label", reason, "give each value to one structure")


def read_names(path: str | os.PathLike) -> dict[str, list[int]]:
    """Name -> values of a lookup table: several where both sides have one name. Raises InputError for what is none."""
    path = Path(path)
    try:
        if is_special(path) or path.stat().st_size > _MOST_BYTES:
            raise InputError(path, "is no lookup table", "lines of a value and a name")
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except FileNotFoundError:
        raise InputError(path, "no such file", "check the path") from None
    except OSError as error:
        raise unreadable(path, error) from error
    rows = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    header = [cell.strip().lower() for cell in rows[0].split("\t")] if rows else []
    names: dict[str, list[int]] = {}
    if {"index", "name"} <= set(header):
        at, called = header.index("index"), header.index("name")
        for row in rows[1:]:
            cells = row.split("\t")
            if len(cells) > max(at, called) and cells[at].strip().isdigit():
                names.setdefault(cells[called].strip(), []).append(int(cells[at]))
        names = {name: values for name, values in names.items() if name.casefold() not in _NOTHING}
    else:
        for row in rows:
            if match := _SNAP.match(row) or _LINE.match(row):
                spelt = [(match[2] or match[3]).strip()]
                if match.re is _LINE and match[2] and (words := _WORDS.match(row)):
                    spelt.append(" ".join(words[1].split()))
                for name in dict.fromkeys(spelt):
                    names.setdefault(name, []).append(int(match[1]))
    if not names:
        raise InputError(path, "holds no names of label values", "lines of a value and a name, or a BIDS dseg.tsv")
    return names


def way_out(values: Sequence[int]) -> str:
    """What to do about a label that holds other values than 0 and 1: a value that is alone need not be chosen from."""
    inside = [value for value in values if value]
    return CHOOSE if len(inside) > 1 else f"--label-classes {inside[0]} takes that value for the structure"


def refuse_many(values: Sequence[int], what: str | os.PathLike) -> None:
    """Raise InputError for a label map of several structures of which none was chosen."""
    if sum(map(bool, values)) > 1:
        raise InputError(what, f"holds several structures, the values {_shown(values)}", CHOOSE)


def _shown(values: Sequence[int]) -> str:
    inside = [value for value in values if value]
    return some([str(value) for value in inside], SHOWN)


def refuse_lost(maps: Iterable[tuple[Path, Sequence[Structure], Collection[int] | None]]) -> None:
    """Raise InputError for a structure that none of the label maps holds of which it was chosen: a slip, more likely
    than a fact.

    maps : of each its file, the structures, and ``absent`` of `load_label` where it was read before. They are read
        until each structure was found; one that is empty, or cannot be read, which is told elsewhere, proves nothing.
    """
    searched: dict[Structure, list[Path]] = {}
    found: set[str] = set()
    for path, chosen, absent in maps:
        for one in chosen:
            if one.name not in found and _is_absent(path, one, absent):
                searched.setdefault(one, []).append(path)
            else:
                found.add(one.name)
    for one, path in [(one, path) for one, paths in searched.items() if one.name not in found for path in paths]:
        if (values := np.unique(images.load(path).data).astype(int)).any():
            named = f"{one.called}, {_shown(sorted(one.values))}" if one.called else one.name
            more = len(searched[one]) - 1
            others = f", nor {'does' if more == 1 else 'do'} {counted(more, 'other label map')}" if more else ""
            hint = f"it holds {_shown(values.tolist())}: choose of that with --label-classes"
            raise InputError(path, f"holds nothing of {named}{others}", hint)


def _is_absent(path: Path, one: Structure, absent: Collection[int] | None) -> bool:
    if absent is None:
        try:
            absent = images.load_label(path, classes=one.values).meta["absent"]
        except InputError:
            return False
    return one.values <= set(absent)


def _names_among(listed: str, names: dict[str, list[int]]) -> list[str]:
    """The words of a choice: all of it, a part between commas, or a part between blanks, whichever is a name first."""
    known = {name.casefold() for name in names}
    if listed.casefold() in known:
        return [listed]
    parts = [part.strip() for part in re.split(r"[,;+]", listed)]
    return [word for part in parts for word in ([part] if part.casefold() in known else part.split())]


def _values(word: str, names: dict[str, list[int]], path: Path) -> list[int]:
    if found := [value for name, values in names.items() if name.casefold() == word.casefold() for value in values]:
        return found
    near = difflib.get_close_matches(word, names, 3, 0.5) or list(names)[:SHOWN]
    raise UsageError("--label-classes", f"{word!r} is no name in {path}", f"there are {', '.join(near)}")


def _beside(label: str | os.PathLike) -> Path | None:
    """The table of names beside a label map, or above it, as BIDS has it."""
    return next((table for table in sidecars(Path(label), ".tsv") if table.is_file()), None)
