"""What a long job tells about itself while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    pass


class Progress(Protocol):
    """What a long job tells about itself; the command line shows it, a library caller may ignore it."""

    def start(self, label: str, total: int, unit: str) -> None:
        """A new stretch of ``total`` units of work begins."""

    def advance(self, n: int = 1, **facts: Any) -> None:
        """``n`` more units are done; ``facts`` are live values worth showing (losses, rates)."""

    def finish(self) -> None:
        """The stretch ended, done or not."""


class _Quiet:
    def start(self, label: str, total: int, unit: str) -> None: ...

    def advance(self, n: int = 1, **facts: Any) -> None: ...

    def finish(self) -> None: ...


QUIET: Progress = _Quiet()
