"""What the command line needs before and while libraries are loaded: standard streams, signals, a lack of memory.

Imports nothing but the standard library and modules that do the same.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from fastsrgan.core.signals import AtOnce
from fastsrgan.errors import ResourceError

# What the system's loader and libraries say where there is no room for them; their errors have no type of their own.
_NO_ROOM = ("failed to map segment", "cannot allocate memory", "can't allocate memory", "bad_alloc")


class Lasting:
    """A stream for notes. Once nobody reads it any more they are dropped: that is no reason to end a job."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop; the number of letters."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if not isinstance(error, BlockingIOError):  # a reader that is slow may read on
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_streams() -> None:
    """Give closed standard streams a place that swallows all, so that no file of the job gets their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf8")  # noqa: SIM115  # to the end of the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf8")  # noqa: SIM115
    if not isinstance(sys.stderr, Lasting):
        sys.stderr = Lasting(sys.stderr)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around the imports of a command's libraries, which take seconds: a signal meanwhile ends the process at once.

    Raises ResourceError where the memory does not suffice for them.
    """
    with AtOnce():
        collected = gc.isenabled()
        gc.disable()  # hundreds of thousands of objects are made, none is given up: a tenth of the time was for nothing
        try:
            yield
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise no_room() from error
        finally:
            if collected:
                gc.enable()


def no_room() -> ResourceError:
    """The error of libraries that do not fit into memory."""
    hint = "end other programs, or raise ulimit -v or the job's limit"
    return ResourceError("memory", "not enough to load the libraries", hint)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made of, is about memory that was not to be had."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False
