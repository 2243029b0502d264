"""Which series lie in a folder, and the one that is meant: judged one by one, with copies and losses told.

What is wrong with a series that is not wanted is no fault of the others; a file that may be a slice of the wanted one
and cannot be read is never passed over in silence.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fastsrgan.core.files import is_special, walk_files
from fastsrgan.errors import InputError, UsageError, counted, some
from fastsrgan.io import formats
from fastsrgan.io.dicom_header import (
    NO_DICOM,
    SUFFIXES,
    DamagedFile,
    Frame,
    begins_as_dicom,
    is_marked,
    pixels,
    read_frames,
    what_is_there,
)
from fastsrgan.io.nifti_header import FORMAT_BYTES, WAYS, other_format
from fastsrgan.io.nifti_voxels import no_such_file, open_stream, sha256_of

log = logging.getLogger("fastsrgan")

NAMED = 3  # files and series that a message names


@dataclass(frozen=True)
class Series:
    """The images of one series below a folder, as the headers order them.

    damaged : files of it that cannot be read; warnings : what is odd about its files; others : files beside it that
        are no DICOM images, for `tell_others`
    """

    uid: str
    number: str
    description: str
    frames: tuple[Frame, ...]
    damaged: tuple[DamagedFile, ...] = ()
    warnings: tuple[str, ...] = ()
    others: tuple[Path, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether any of its images has a place in the patient."""
        return not all(f.fault for f in self.frames)

    def __str__(self) -> str:
        rows, columns = self.frames[0].shape
        name = f" {self.description!r}" if self.description else ""
        bad = f", {len(self.damaged)} more cannot be read" if self.damaged else ""
        return f"{self.number or '?'}{name} ({counted(len(self.frames), 'image')} of {columns} x {rows}{bad})"

    def apart(self, root: Path) -> str:
        """The same with what tells it from another series of the same number: sub-folder, patient, date, UID."""
        first = self.frames[0]
        folder = os.path.relpath(first.path.parent, root)
        facts = [f"in {folder}"] * (folder != ".") + [f"patient {first.patient}"] * bool(first.patient)
        facts += [f"of {first.date}"] * bool(first.date) + [f"UID {self.uid or 'none'}"]
        return f"{self} {', '.join(facts)}"


@dataclass
class _Listing:
    """What lies in a folder: series, files that cannot be read and do not say of which, files that are no images; and
    series of which no volume can be made, where none was named."""

    series: list[Series]
    damaged: list[DamagedFile] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    unusable: list[Series] = field(default_factory=list)


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a path is a folder, or a file that is named or marked as DICOM."""
    path = Path(path)
    if os.path.isdir(path):
        return True
    if is_special(path):
        return False
    if path.name.lower().endswith(SUFFIXES):
        return True
    return is_marked(path)


def _look(path: str | os.PathLike) -> _Listing:
    """The image series of a folder and its subfolders, or the one that a file belongs to, by series number.

    Raises InputError where there is no image, and for a damaged file that is named itself; ResourceError without
    pydicom.
    """
    path = Path(path)
    if not path.exists():
        raise no_such_file(path)
    folder = path if path.is_dir() else path.parent
    own = None if path.is_dir() else read_frames(path, wanted=True)
    if own and len(own) > 1:
        return _Listing(_grouped(own, []))
    names = sorted(folder.iterdir()) if own else sorted(walk_files(folder))
    frames: list[Frame] = []
    broken: list[DamagedFile] = []
    others: list[Path] = []
    for name in names:
        try:
            more = read_frames(name)
        except DamagedFile as error:
            broken.append(error)
            continue
        frames += more
        others += [] if more else [name]
    kin = {(f.path.parent, _skeleton(f.path)) for f in frames}
    for name in [name for name in others if (name.parent, _skeleton(name)) in kin and not begins_as_dicom(name)]:
        others.remove(name)
        reason = "is no DICOM file, but named like the slices beside it" if _size(name) else "is empty (0 bytes)"
        broken.append(DamagedFile(name, reason, "copy or export the file again"))
    found = _grouped(frames, broken)
    known = {s.uid for s in found}
    for b in broken:  # what is left of a UID that was cut off may be the beginning of any
        b.uid = b.uid if b.whole or b.uid in known else ""
    if own:
        one = own[0]
        found = [s for s in found if (s.uid, s.number) == (one.uid, one.series)]
        found = [s for s in found if any(f.patient == one.patient for f in s.frames)]
    if not found:
        if broken:
            raise InputError(broken[0].what, broken[0].reason, broken[0].hint)
        there = what_is_there(names)
        others_there = any(name.name.lower().endswith(formats.SUFFIXES) for name in names)
        if path.is_dir() and there == NO_DICOM and not others_there:
            _refuse_other_images(path, names)
            raise InputError(path, "holds no image", f"a folder of DICOM slices, or of {formats.NAMES} files")
        raise InputError(path, there, "a folder of DICOM slices; name image files themselves")
    others = [name for name in others if path.is_dir() and name.is_file() and not name.name.startswith(".")]
    return _Listing(found, [b for b in broken if b.uid not in known], others)


def _refuse_other_images(path: Path, names: Sequence[Path]) -> None:
    """Raise InputError where files are images of a format that is not read, such as MINC, with what converts them."""
    for name in names:
        try:
            with open_stream(name) as stream:
                found = other_format(stream.read(FORMAT_BYTES))
        except (InputError, OSError):
            continue
        if found and found in WAYS:
            raise InputError(path, f"holds no image that is read: {name.name} is {found}", WAYS[found])


def tell_others(folder: str | os.PathLike, others: Sequence[Path]) -> None:
    """Name the files of a folder that are no DICOM images: once, by who reads the voxels."""
    if others:
        names = [str(name.relative_to(folder)) for name in others]
        what = counted(len(others), "file is no DICOM image", "files are no DICOM images")
        log.info("%s: %s and left out: %s", folder, what, some(names, NAMED))


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _skeleton(path: Path) -> str:
    """A file's name without its numbers: that of its neighbours in a series."""
    return re.sub(r"\d+", "#", path.name)


def select(path: str | os.PathLike, series: str | None = None) -> Series:
    """The series to use: the only one, or the one whose number, UID or description (a part of it) is ``series``.

    Raises UsageError listing the series where there are several and none, or more than one, was meant; InputError for
    files that cannot be read and may be slices of it.
    """
    look = _look(path)
    chosen = found = look.series
    if series is None:
        look.unusable = [s for s in found if not s.usable]
    else:
        wanted = str(series).strip()
        chosen = [s for s in found if wanted in (s.number, s.uid)]
        chosen = chosen or [s for s in found if wanted and wanted.casefold() == s.description.casefold()]
        chosen = chosen or [s for s in found if wanted and wanted.casefold() in s.description.casefold()]
    # Without any place, as screen shots, reports and segmentations: taken only where there is nothing else.
    chosen = [s for s in chosen if s.usable] or chosen
    if len(chosen) == 1:
        return _whole(path, chosen[0], look, series)
    if not chosen:
        told = "; ".join(map(str, found))
        raise UsageError("--series", f"{series!r} is none of {told}", "a number, a UID or part of a description")
    told = "; ".join(_names(chosen, Path(path)))
    what = f"holds {len(chosen)} series: {told}" if series is None else f"{series!r} fits {len(chosen)} series: {told}"
    by_number, by_uid = len({s.number for s in chosen}) == len(chosen), len({s.uid for s in chosen}) == len(chosen)
    ways = [f"choose one with --series {'NUMBER' if by_number else 'UID'}"] * (by_number or by_uid)
    if not by_number and (named := _folders_of(chosen, Path(path))):
        ways.append(f"name the sub-folders, each for a result of its own: {named}")
    raise UsageError(path, what, ", or ".join(ways) or "move the images of one of them to a folder of its own")


def _folders_of(chosen: Sequence[Series], root: Path) -> str:
    """The highest folders below ``root`` that hold one of the series each, as words of a call; nothing where there are
    none. Results are named after them."""
    places = [s.frames[0].path.parent.relative_to(root).parts for s in chosen]
    apart: set[tuple[str, ...]] = set()
    for depth in range(1, max(map(len, places)) + 1):
        above = {parts[:depth] for parts in places}
        if len(above) < len(places) or () in above:
            continue
        apart = apart or above
        if len({parts[-1] for parts in above}) == len(places):
            apart = above
            break
    else:
        if not apart:
            return ""
    alike = len({parts[-1] for parts in apart}) < len(apart)
    named = sorted(str(root.joinpath(*parts)) for parts in apart)
    words = " ".join(named[:NAMED]) + " ..." * (len(named) > NAMED)
    return words + " (with an output folder each: their names are alike)" * alike


def _names(found: Sequence[Series], root: Path) -> list[str]:
    """Each series in words, with more of them where its number does not tell it from the others."""
    same = Counter(s.number for s in found)
    return [s.apart(root) if same[s.number] > 1 else str(s) for s in found]


def _whole(path: str | os.PathLike, chosen: Series, look: _Listing, series: str | None) -> Series:
    """The series, if no file of it is lost. A file that does not say of which series it is may be one, unless the user
    named the series: then it is a warning."""
    lost = [*chosen.damaged, *(b for b in look.damaged if series is None and not b.uid)]
    if lost:
        files = some([f"{b.what} {b.reason}" for b in lost], NAMED)
        hint = "; ".join(dict.fromkeys(b.hint for b in lost[:NAMED])) + "; or move it out of the folder"
        if series is None and not chosen.damaged:
            hint += f"; --series {chosen.number or chosen.uid} leaves out what does not say of which series it is"
        raise InputError(path, f"a file that may be a slice of the series cannot be read: {files}", hint)
    whose = {True: "of another series", False: "it does not say of which series it is"}
    told = [f"{b.what} {b.reason}: left out, {whose[bool(b.uid)]}" for b in look.damaged]
    loose = [s for s in look.series if s is not chosen and s.uid in ("", chosen.uid) and not (s.uid and s.number)]
    if stray := list(dict.fromkeys(str(f.path) for s in loose for f in s.frames)):
        words = counted(
            len(stray), "file does not say of which series it is", "files do not say of which series they are"
        )
        told.append(f"{words}, left out: {some(stray, NAMED)}")
    left = [(s, s.frames[0]) for s in look.unusable if s is not chosen]
    told += [f"series {s} is left out, its {first.path.name} {first.fault}" for s, first in left]
    return replace(chosen, damaged=(), others=tuple(look.others), warnings=(*chosen.warnings, *told))


def sha256(path: str | os.PathLike, series: str | None = None) -> str:
    """SHA-256 over the files of a series, one after the other by name: another image, or one more, changes it."""
    return sha256_of(sorted({frame.path for frame in select(path, series).frames}))


def _grouped(frames: Sequence[Frame], damaged: Sequence[DamagedFile]) -> list[Series]:
    """Series by UID, and by number and patient where files of one UID have several, as some archives and anonymisers
    write them; copies of an image are left out."""
    patients: dict[tuple[str, str], set[str]] = defaultdict(set)
    for frame in frames:
        patients[frame.uid, frame.series].add(frame.patient)
    groups: dict[tuple[str, str, str], list[Frame]] = defaultdict(list)
    for frame in frames:
        several = len(patients[frame.uid, frame.series] - {""}) > 1  # a file may lack its patient
        groups[frame.uid, frame.series, frame.patient if several else ""].append(frame)
    found = []
    for (uid, number, _), group in groups.items():
        kept, copies = _without_copies(group)
        told: tuple[str, ...] = ()
        if copies:
            files = list(dict.fromkeys(str(f.path) for f in copies))
            what = counted(len(copies), "image is a copy", "images are copies")
            told = (f"{what} of others in the series and left out: {some(files, NAMED)}",)
        # Damage of a file whose number is lost counts for every series of its UID.
        lost = tuple(d for d in damaged if d.uid and d.uid == uid)
        found.append(Series(uid, number, kept[0].description, tuple(kept), lost, told))
    return sorted(found, key=lambda s: (not s.number.isdigit(), int(s.number) if s.number.isdigit() else 0, s.uid))


def _without_copies(frames: Sequence[Frame]) -> tuple[list[Frame], list[Frame]]:
    """(images, their copies): of one SOPInstanceUID, frame, place and voxels."""
    first: dict[tuple, Frame] = {}
    kept, copies = [], []
    for frame in frames:
        key = (frame.image_uid, frame.index, frame.position, frame.orientation, frame.shape, frame.slope, frame.inter)
        known = first.setdefault(key, frame)
        if known is frame or not frame.image_uid or known.path == frame.path or not _same_voxels(known, frame):
            kept.append(frame)
        else:
            copies.append(frame)
    return kept, copies


def _same_voxels(one: Frame, other: Frame) -> bool:
    try:
        if one.path.read_bytes() == other.path.read_bytes():
            return True
        return bool(np.array_equal(pixels(one.path, one.shape), pixels(other.path, other.shape)))
    except (OSError, InputError):
        return False
