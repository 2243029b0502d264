"""SIGINT and SIGTERM, from the first moment of a command to its last.

Imports nothing but the standard library: ``__main__`` needs it before the libraries are loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped: by SIGTERM"}


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a job as Ctrl-C does: what is half done is taken away on the way out."""


class _Handlers:
    """While it is open the two signals call ``_stop``. Ignored signals stay so: a job behind nohup was started so."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Any:
        if threading.current_thread() is threading.main_thread():
            for number in SAID:
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
        os._exit(128 + number)


class Interrupts(_Handlers):
    """SIGINT raises KeyboardInterrupt and SIGTERM Terminated; the second of them ends the process at once.

    At once means without cleaning up: temporary files may stay, nothing half-written has its final name.

    Attributes
    ----------
    raised : what was raised, for whoever meets another error that it was turned into on its way
    """

    def __init__(self) -> None:
        super().__init__()
        self.raised: KeyboardInterrupt | None = None

    def _stop(self, number: int, _frame: object) -> None:
        if self.raised is not None:
            os._exit(128 + number)
        self.raised = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        raise self.raised
