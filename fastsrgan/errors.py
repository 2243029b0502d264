"""The errors a user can cause or meet, and the exit code each one ends with.

One line reaches the terminal: ``error: WHAT: REASON (HINT)``. Codes are public interface (README, "Exit codes"):
1 internal (no error of these), 2 usage, 3 bad input, 4 bad weights / checkpoint / store version / config, 5 resources,
6 some items of a batch failed (where none is done: the code of the first that failed).

Values and sizes as they stand in messages.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST, LONGEST_REASON = 1000, 32_000  # letters of a name in a message, of all that is said of it


class FastsrganError(Exception):
    """Base of every expected failure.

    Parameters
    ----------
    what : the file, option or thing that is at fault
    reason : what came
    hint : what is allowed, or what to do
    """

    exit_code = 1

    def __init__(self, what: object, reason: str, hint: str) -> None:
        self.what, self.reason, self.hint = one_line(str(what)), reason, hint
        if len(self.what) > LONGEST:
            self.what = f"{self.what[: LONGEST // 2]} ... {self.what[-LONGEST // 4 :]}"
        told = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]} ..."
        super().__init__(f"{self.what}: {told} ({hint})")


class UsageError(FastsrganError):
    """A command line that cannot be run as it was typed."""

    exit_code = 2


class MissingError(UsageError):
    """A command line that lacks what it works on, which may stand behind an option that took it as a value."""


class InputError(FastsrganError):
    """An image, label or table that cannot be used."""

    exit_code = 3


class ModelError(FastsrganError):
    """Weights, a checkpoint, a store's version or a configuration that cannot be used."""

    exit_code = 4


class SettingsError(ModelError):
    """Settings that are not allowed: ``faults`` are their names, what came, and what is allowed."""

    def __init__(self, what: str, faults: Sequence[tuple[str, str, str]]) -> None:
        self.faults = list(faults)
        if len(self.faults) == 1:
            name, reason, hint = self.faults[0]
            super().__init__(f"{what}: {name}", reason, hint)
        else:
            told = "; ".join(f"{name}: {reason}, {hint}" for name, reason, hint in self.faults)
            super().__init__(what, f"{len(self.faults)} faults: {told}", "see docs/config.md")


class ResourceError(FastsrganError):
    """Memory, disk, a device or an output folder that is not to be had."""

    exit_code = 5


class PartialFailure(FastsrganError):
    """Some items of a batch failed; the others are done."""

    exit_code = 6


def batch_code(codes: Sequence[int], done: int) -> int:
    """The exit code of a batch of which items failed, with these codes: 6 where others are ``done``, else that of the
    first, as if it had been alone."""
    return PartialFailure.exit_code if done else codes[0]


def none_done(first: Exception | None, what: object, reason: str, hint: str) -> FastsrganError:
    """The error of a batch of which every item failed: of the class, and so the exit code, of the first; InputError
    where there was none."""
    kinds = (UsageError, InputError, ModelError, ResourceError)
    return next((kind for kind in kinds if isinstance(first, kind)), InputError)(what, reason, hint)


_BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def one_line(text: str) -> str:
    """A name as it stands in a line: line breaks, which names of files may hold, written as ``\\n``."""
    return _BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shown(value: Any) -> str:
    """A value as it stands in a message: short, whatever it holds; the numbers of an option as they are typed."""
    if isinstance(value, (tuple, list)) and 0 < len(value) < 7 and all(isinstance(v, (tuple, float)) for v in value):
        return (" and " if isinstance(value[0], tuple) else " ").join(map(shown, value))
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"


_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def human(n_bytes: int) -> str:
    """1536 -> '1.5 KiB'."""
    if n_bytes == 1:
        return "1 byte"
    size, unit = float(n_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.4g} {_UNITS[unit]}"


def brief(value: float, digits: int = 3) -> str:
    """A value to so many digits, without an exponent where it is large: 1234.5 -> '1234', 0.01234 -> '0.0123'."""
    return f"{value:.0f}" if 10**digits - 0.5 <= abs(value) < 1e7 else f"{value:.{digits}g}"


def lasting(seconds: float, digits: int = 1) -> str:
    """A time as people say it: 12 s, 4.5 min, 3.1 h; seconds below ten and minutes to so many digits."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.{digits}f} s"
    return f"{seconds / 60:.{digits}f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def counted(number: int, one: str, many: str = "") -> str:
    """(1, 'subject') -> '1 subject'; (3, 'subject') -> '3 subjects'; ``many`` where an s is not enough."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def some_of(number: int, of: int, one: str, singular: str, plural: str) -> str:
    """(1, 9, 'voxel', 'is', 'are') -> '1 of 9 voxels is'; the verb is that of the part."""
    return f"{number} of {counted(of, one)} {singular if number == 1 else plural}"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, as they stand in a message, and how many more there are: 'a, b and 3 more'."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def compared(a_bytes: int, b_bytes: int) -> tuple[str, str]:
    """Two sizes that differ, exactly where they are the same when rounded: ('56.59 KiB', '2 KiB')."""
    if human(a_bytes) != human(b_bytes):
        return human(a_bytes), human(b_bytes)
    return f"{a_bytes} bytes", f"{b_bytes} bytes"


def times(values: Sequence[float]) -> str:
    """(1, 2, 0.5) -> '1 x 2 x 0.5'."""
    return " x ".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in values)


# What the system's loader and libraries say where there is no room; their errors have no type of their own. The last
# two: cuDNN and cuBLAS, and torch where none of cuDNN's ways of a convolution found room for its workspace.
_NO_ROOM = (
    *("failed to map segment", "cannot allocate memory", "can't allocate memory", "bad_alloc", "out of memory"),
    *("_status_alloc_failed", "unable to find an engine to execute"),
)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made of, is about memory of the host or a device that was not to be had."""
    while error is not None:
        untyped = isinstance(error, (RuntimeError, ImportError, OSError))
        if isinstance(error, MemoryError) or (untyped and any(words in str(error).lower() for words in _NO_ROOM)):
            return True
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not loaded here
            return True
        error = error.__cause__ or error.__context__
    return False


def alike(warnings: Mapping[str, Sequence[str]], shown: int = 3) -> list[str]:
    """Warnings of subjects, equal ones once behind the names that they are about: ``a, b, c and 2 more: TEXT``."""
    about: dict[str, list[str]] = {}
    for subject, texts in warnings.items():
        for text in texts:
            about.setdefault(text, []).append(subject)
    return [f"{some(names, shown)}: {text}" for text, names in about.items()]
