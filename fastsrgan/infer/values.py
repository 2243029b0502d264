"""Single values of the options of an inference: a word of the command line -> a value, and what values are allowed.

Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastsrgan.config import AXES, MIN_SIZE, SIZE_MULTIPLE, SPACING_LIMITS
from fastsrgan.errors import UsageError, shown

PerAxis = int | None | Sequence[int | None]
Resolution = str | float | Sequence[float] | None
Step = str | int | Sequence[int]

NONE = "none"  # of ``flips``
# Of ``upright``; of ``agree`` AUTO and OFF; AUTO of ``slice_thickness`` and ``profile`` too.
AUTO, ON, OFF = "auto", "on", "off"


# --- text of the command line -------------------------------------------------------------------------------------


def word_or_number(*words: str, number: Callable[[str], Any] = float, told: str = "") -> Callable[[str], Any]:
    """A parser of one of some words, ``none`` being None, or of a number; ``told``: what a text is neither of."""

    def parse(text: str) -> Any:
        if (word := text.lower()) in words:
            return None if word == NONE else word
        try:
            return number(text)
        except ValueError as error:
            neither = told or f"{', '.join(words)} nor a number"
            raise argparse.ArgumentTypeError(f"{text!r} is neither {neither}") from error

    return parse


tile_edge = word_or_number(NONE, number=int, told="a number of voxels nor none")
step_size = word_or_number(AUTO, number=int, told="a number of voxels nor auto")
batch_size = word_or_number(AUTO, number=int, told="a number of tiles nor auto")
size = word_or_number("same", told="a size in mm nor same")


def _in_units(text: str, units: dict[str, float], what: str) -> float:
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def seconds(text: str) -> float:
    """``60``, ``60s``, ``2m`` or ``1h``."""
    return _in_units(text, {"": 1, "s": 1, "m": 60, "h": 3600}, "a time such as 60s, 2m or 1h")


def memory(text: str) -> int:
    """``8`` or ``8G`` for GiB, ``500M`` for MiB."""
    return int(_in_units(text, {"": 2**30, "g": 2**30, "m": 2**20}, "a size such as 8G or 500M"))


def voxels(text: str) -> int:
    """``1000`` or ``1e9``: how many, from 1 up."""
    try:
        number = int(float(text))
    except (ValueError, OverflowError):  # no number, NaN, infinite
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of voxels from 1 up")
    return number


# --- windows --------------------------------------------------------------------------------------------------------


def constant(u: float) -> float:
    """1: the paper's mean of all tiles over a voxel."""
    return 1.0


def gaussian(u: float) -> float:
    """exp(-u^2 / (2 sigma^2)) with sigma = 1/4 of half the edge, nnU-Net's."""
    return math.exp(-0.5 * (4 * u) ** 2)


def hann(u: float) -> float:
    """cos^2(pi u / 2): at a step of half the edge the windows of neighbours sum to 1 by themselves."""
    return math.cos(math.pi / 2 * u) ** 2


# A window maps the distance of a voxel from its tile's centre, in halves of the tile's edge and along one axis, to its
# weight, at most 1 and the same on both sides. Another one is another entry here.
EVEN = "constant"  # every voxel of a tile alike
WINDOWS: dict[str, Callable[[float], float]] = {EVEN: constant, "gaussian": gaussian, "hann": hann}


# --- checks ---------------------------------------------------------------------------------------------------------


def per_axis(what: str, value: PerAxis | Step) -> tuple:
    """One value for all axes, or three, as three. Raises UsageError."""
    if value is None or isinstance(value, numbers.Integral):
        value = (value,) * 3  # type: ignore[assignment]
    try:
        items = tuple(value)  # type: ignore[arg-type]
        whole = tuple(None if v is None else int(v) for v in items)
    except (TypeError, ValueError):
        items = whole = ()
    if len(whole) != 3 or any(v != number for v, number in zip(items, whole, strict=True)):
        raise UsageError(what, f"{value!r} is not allowed", "one whole number, or three")
    return whole


def check_tile(patch: int | None, step: int | None) -> None:
    """Raise UsageError for an edge of tiles that the networks do not take, and for a distance that leaves gaps."""
    if step is None or step < 1:
        raise UsageError("step", f"{step} is not allowed", "a number of voxels from 1 up")
    if patch is None:
        return
    if patch < MIN_SIZE or patch % SIZE_MULTIPLE:
        below = max(MIN_SIZE, patch // SIZE_MULTIPLE * SIZE_MULTIPLE)
        hint = f"multiples of {SIZE_MULTIPLE} from {MIN_SIZE} up; try {below} or {below + SIZE_MULTIPLE}"
        raise UsageError("patch", f"{patch} is not allowed", hint)
    if step > patch:
        raise UsageError("step", f"{step} is larger than the patch, {patch}", "gaps would be left; at most the patch")


def check_batch(batch: str | int) -> str | int:
    """``batch`` if it is auto or a number of tiles, else UsageError."""
    if batch != "auto" and (not isinstance(batch, int) or batch < 1):
        raise UsageError("batch", f"{batch!r} is not allowed", "auto, or a number of tiles from 1 up")
    return batch


def millimetres(new_resolution: Resolution) -> Literal["same"] | tuple[float, ...] | None:
    """``new_resolution`` as None, "same" or three sizes. Raises UsageError."""

    if new_resolution is None:
        return None
    if isinstance(new_resolution, str):
        if new_resolution == "same":
            return "same"
        hint = "millimetres (one or three numbers), or same"
        raise UsageError("new resolution", f"{new_resolution!r} is not allowed", hint)
    try:
        values = tuple(float(v) for v in new_resolution)  # type: ignore[union-attr]
    except TypeError:
        values = (float(new_resolution),)  # type: ignore[arg-type]
    except ValueError:  # a word among the numbers
        values = ()
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3 or not all(math.isfinite(v) and v > 0 for v in values):
        hint = "one or three positive millimetres"
        raise UsageError("new resolution", f"{shown(new_resolution)} is not allowed", hint)
    if not all(SPACING_LIMITS[0] <= v <= SPACING_LIMITS[1] for v in values):
        hint = "from {:g} to {:g} mm".format(*SPACING_LIMITS)
        raise UsageError("new resolution", f"{shown(new_resolution)} is no size of voxels", hint)
    return values


def flip_axes(flips: str) -> tuple[int, ...]:
    """ "none" and "auto" -> (), "x" -> (0,), "xyz" -> (0, 1, 2). Raises UsageError for anything else."""
    if flips in (NONE, AUTO):
        return ()
    if not flips or len(set(flips)) < len(flips) or not set(flips) <= set(AXES):
        hint = "auto, none, or the axes of the image to flip: x, y, z, xy, xz, yz or xyz"
        raise UsageError("flips", f"{flips!r} is not allowed", hint)
    return tuple(sorted(AXES.index(axis) for axis in flips))


def check_budget(value: float | None) -> None:
    """Raise UsageError for what is no number of seconds."""
    if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value) and value >= 0):
        raise UsageError("budget", f"{shown(value)} is not allowed", "seconds, 0 for the first level")


def check_max_memory(value: int | None) -> None:
    """Raise UsageError for less than a byte."""
    if value is not None and not (isinstance(value, numbers.Real) and value >= 1):
        raise UsageError("max memory", f"{value!r} is not allowed", "a number of bytes from 1 up")


def check_threshold(value: float) -> None:
    """Raise UsageError for what is no probability below 1."""
    if not 0 <= value < 1:
        raise UsageError("threshold", f"{value:g} is not allowed", "a probability from 0 up and below 1")


def check_min_size(value: float | None) -> None:
    """Raise UsageError for what is no volume in mm^3; None is left to the weights."""
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise UsageError("min size", f"{value:g} is not allowed", "cubic millimetres from 0 up")


def check_agree(value: str | float) -> None:
    """Raise UsageError for a weight that is neither a word of ``agree`` nor positive."""
    if value not in (AUTO, OFF) and (isinstance(value, str) or not 0 < value < math.inf):
        raise UsageError("agree", f"{value!r} is not allowed", "auto, off, or a weight above 0, such as 0.01")


def check_slice_thickness(value: str | float) -> None:
    """Raise UsageError for a thickness that is neither auto nor positive."""
    if value != AUTO and (isinstance(value, str) or not 0 < value < math.inf):
        raise UsageError("slice thickness", f"{value!r} is not allowed", "auto, or a number of mm above 0")
