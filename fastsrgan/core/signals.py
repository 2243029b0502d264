"""SIGINT, SIGTERM and SIGUSR1, from the first moment of a command to its last.

Imports nothing but the standard library: ``__main__`` needs it before the libraries are loaded.

What the command line needs before and while libraries are loaded: standard streams, signals, a lack of memory.

Imports nothing but the standard library and modules that do the same.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from fastsrgan.errors import ResourceError, out_of_memory

AGAIN = 0.05  # seconds until a signal comes again
SAID = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "stopped: by SIGTERM",
    signal.SIGUSR1: "stopped: by SIGUSR1",  # of a batch system, before its time limit
}


def named(number: int) -> str:
    """2 -> "SIGINT (Ctrl-C)", 15 -> "SIGTERM"."""
    return signal.Signals(number).name + " (Ctrl-C)" * (number == signal.SIGINT)


def exit_code(number: int) -> int:
    """What a process owes that a signal stopped: 130 after SIGINT, else 143."""
    return 130 if number == signal.SIGINT else 143


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1, which end a job as Ctrl-C does: what is half done is taken away on the way out."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


def stopped_by(number: int) -> KeyboardInterrupt:
    """What ends a command that a signal stopped."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


class _Handlers:
    """While it is open ``SIGNALS`` call ``_stop``. Ignored ones stay so: a job behind a shell's & was started so."""

    SIGNALS: tuple[signal.Signals, ...] = tuple(SAID)

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Any:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: object) -> None:
        raise NotImplementedError


class AtOnce(_Handlers):
    """Ends the process with its one line where there is nothing to clean up: before the work, and behind it.

    An exception would not do: libraries that are being loaded swallow it or turn it into another.
    """

    def _stop(self, number: int, _frame: object) -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(2, f"error: {SAID[signal.Signals(number)]}\n".encode())
        os._exit(exit_code(number))


class Interrupts(_Handlers):
    """SIGINT raises KeyboardInterrupt, SIGTERM and SIGUSR1 Terminated; the second of them ends the process at once.

    At once means without cleaning up: temporary files may stay, nothing half-written has its final name. Where Python
    drops what is raised, as in the callback of a weak reference, the signal comes again.

    Attributes
    ----------
    raised : what was raised, for whoever meets another error that it was turned into on its way
    """

    def __init__(self) -> None:
        super().__init__()
        self.raised: KeyboardInterrupt | None = None
        self._again: threading.Timer | None = None

    def __enter__(self) -> Any:
        self._told = sys.unraisablehook
        sys.unraisablehook = self._dropped
        return super().__enter__()

    def __exit__(self, *more: object) -> None:
        sys.unraisablehook = self._told
        if self._again:
            self._again.cancel()
        super().__exit__(*more)

    def _dropped(self, what: Any) -> None:
        if self.raised is None or what.exc_value is not self.raised:
            self._told(what)
            return
        number = self.raised.signal if isinstance(self.raised, Terminated) else signal.SIGINT
        self.raised = None
        self._again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))  # not from here: it would be dropped too
        self._again.daemon = True
        self._again.start()

    def _stop(self, number: int, _frame: object) -> None:
        if self.raised is not None:
            os._exit(exit_code(number))
        self.raised = stopped_by(number)
        raise self.raised


class StopRequest(_Handlers):
    """SIGINT, SIGTERM and SIGUSR1 as a flag that a loop looks at between two steps.

    A second SIGINT, ``again_after`` seconds or more behind the first, stops at once. ``code`` is the exit code the
    process owes.
    """

    def __init__(self, again_after: float = 0.0) -> None:
        super().__init__()
        self.signal: int | None = None
        self.again_after = again_after
        self._noted_at = 0.0

    def _stop(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            if now - self._noted_at >= self.again_after:
                raise KeyboardInterrupt
            return
        self.signal, self._noted_at = number, now

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def code(self) -> int:
        """Exit code after this request; 0 when there was none."""
        return 0 if self.signal is None else exit_code(self.signal)


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


class Named(Lasting):
    """A stream for results, whose errors say which stream it was."""

    def _drop(self, error: OSError) -> None:
        raise OSError(error.errno, error.strerror, "standard output") from error


def open_streams() -> None:
    """Give closed standard streams a place that swallows all, so that no file of the job gets their numbers."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf8")  # noqa: SIM115  # to the end of the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf8")  # noqa: SIM115
    if not isinstance(sys.stderr, Lasting):
        sys.stderr = Lasting(sys.stderr)
    if not isinstance(sys.stdout, Named):
        sys.stdout = Named(sys.stdout)


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
