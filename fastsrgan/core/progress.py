"""What a long job tells about itself while it runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Protocol

log = logging.getLogger("fastsrgan")


class Progress(Protocol):
    """What a long job tells about itself; the command line shows it, a library caller may ignore it."""

    def start(self, label: str, total: int, unit: str) -> None:
        """A new stretch of ``total`` units of work begins; ``unit`` is the word for one ("tile")."""

    def advance(self, n: int = 1, **facts: Any) -> None:
        """``n`` more units are done; ``facts`` are live values worth showing (losses). Units per second are no such
        value: who shows the count knows them."""

    def finish(self) -> None:
        """The stretch ended, done or not."""

    def tell(self, group: str, text: str, **facts: Any) -> None:
        """A result in between: ``text`` for a terminal; for a pipe ``facts`` in full, behind ``group``."""


class _Quiet:
    def start(self, *words: Any, **facts: Any) -> None: ...

    advance = finish = tell = start


QUIET: Progress = _Quiet()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings only: volumes that are a small part of the work do not each tell how they are done."""
    before = log.level
    log.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(before)
