"""Where a command is told to put a file: never onto one that it reads, and of what stands there only onto its own kind.

A slip of ``--csv`` or ``-o`` could otherwise put a table in the place of a scan that exists once.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fastsrgan.core.files import ResultLock, output_file, read_json, real
from fastsrgan.errors import UsageError
from fastsrgan.io import nifti as images

PathLike = str | os.PathLike
# Files of these names hold what cannot be made again, even where they are empty.
DATA = (*images.SUFFIXES, ".dcm", ".h5", ".hdf5", ".safetensors", ".pt", ".pth")


def _begins(pattern: bytes) -> Callable[[Path], bool]:
    """Whether a file begins with a pattern, in letters of any size, or is empty."""

    def told(path: Path) -> bool:
        try:
            with open(path, "rb") as file:
                head = file.read(4096)
        except OSError:
            return False
        return not head or re.match(pattern, head, re.IGNORECASE | re.DOTALL) is not None

    return told


def _holds(*keys: str) -> Callable[[Path], bool]:
    """Whether a file is a JSON object with these keys, or empty."""
    return lambda path: os.path.isfile(path) and (os.path.getsize(path) == 0 or set(keys) <= set(read_json(path)))


# What pictures say that made them.
BY_EVALUATE, BY_STUDY = "fastsrgan evaluate", "fastsrgan study"

# What commands write -> whether a file that exists is one of these, or empty.
OWN: dict[str, Callable[[Path], bool]] = {
    "table of `fastsrgan evaluate`": _begins(rb"kind,subject"),
    "JSON of `fastsrgan evaluate`": _holds("definitions"),
    "picture of `fastsrgan evaluate`": _begins(rb"\x89png.{,200}" + BY_EVALUATE.encode()),
    "PNG picture of `fastsrgan study`": _begins(rb"\x89png.{,200}" + BY_STUDY.encode()),
    "HTML page": _begins(rb"<!doctype html|<html"),
    # Without an epoch there is one column, without a name; the original's tables begin alike.
    "Dice table of a training": _begins(rb',dice|""\r?\n'),
    "MSE table of a training": _begins(rb',mse|""\r?\n'),
    "Keras HDF5 file": _begins(rb"\x89hdf\r\n\x1a\n"),
    "table of `fastsrgan study`": _begins(rb"condition,[^\n]*model,step,n\b|(run,)?epoch,[^\n]*updates|\n\Z"),
    "page of `fastsrgan study`": _begins(rb"# [^\n]*\n\n!\["),
    "JSON of `fastsrgan study`": _holds("study", "provenance"),
    "SVG picture of `fastsrgan study`": _begins(rb"(<\?xml|<svg).{,2000}" + BY_STUDY.encode()),
}
TABLE, FIGURES, SCORED, PICTURE, PAGE, DICE, MSE, WEIGHTS, *_STUDY, DRAWING = OWN
STUDY = dict(zip(("csv", "md", "json", "png", "svg"), (*_STUDY, PICTURE, DRAWING), strict=True))  # of KIND.FORM


def check_place(path: PathLike, inputs: Iterable[PathLike], kind: str) -> Path:
    """Make sure, before any work, that a file of one of the kinds ``OWN`` may be written to ``path``.

    Raises UsageError for one of the ``inputs`` and for a file of another kind; and as ``core.files.output_file`` does.
    """
    keep_inputs(path, inputs)
    path = output_file(path)
    if os.path.lexists(path) and (path.name.lower().endswith(DATA) or not OWN[kind](path)):
        raise UsageError(path, f"exists already and is no {kind}, it is kept", "name another file, or remove this one")
    return path


@contextlib.contextmanager
def one_writer(files: Iterable[PathLike], folders: Iterable[PathLike] = (), by: str = "") -> Iterator[None]:
    """Hold what belongs together, files and folders filled by the command ``by``, against another process that would
    write one of them until this one has written all. Raises LockedFolder, a ResourceError, where one does."""
    places = [(real(path.parent) / path.name, path) for path in map(Path, files)]
    places += [(real(folder) / by, Path(folder)) for folder in folders]
    wanted = {place.with_suffix(""): (place, name) for place, name in places}  # a.csv and a.json have one lock
    with contextlib.ExitStack() as held:
        for place, name in wanted.values():
            held.enter_context(ResultLock(place, name=str(name)))
        yield


def keep_inputs(path: PathLike, inputs: Iterable[PathLike]) -> None:
    """Refuse a place that is one of the inputs, by whatever name. Raises UsageError."""
    if any(_same(path, source) for source in inputs):
        raise UsageError(path, "is an input and would be overwritten", "name another file")


def _same(one: PathLike, other: PathLike) -> bool:
    try:
        return os.path.isfile(one) and os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them is not there, so nothing of it is lost
        return False
