"""What the commands show on a terminal: progress with throughput and time left, notes and warnings, one error line."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from fastsrgan.core.files import finite
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.signals import loading

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def boolean(text: str) -> bool:
    """The original's booleans: True / False, also yes / no, 1 / 0."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def add_label_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """``--label-classes`` and ``--label-names``, alike wherever a label enters."""
    text = "which values of a label map are the structure: 3,42 or names of a lookup table"
    more: dict[str, Any] = {"nargs": "+"} if several else {}
    text += "; several, as cortex=3,42 white=2,41, are scored one by one" if several else ""
    parser.add_argument("--label-classes", metavar="VALUES", help=text, **more)
    parser.add_argument(
        "--label-names",
        metavar="FILE",
        help="lookup table of FreeSurfer, ITK-SNAP or BIDS (dseg.tsv); one beside the label is found",
    )


def shown(facts: dict[str, Any]) -> str:
    """Live values in a few characters: "rec 0.0213  W -0.41"."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {plain(str(v))}" for k, v in facts.items())


class TerminalProgress:
    """A bar on a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: RichProgress | None = None
        self.facts: dict[str, Any] = {}

    def start(self, label: str, total: int, unit: str) -> None:
        """Show a bar for ``total`` units."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.finish()
        self.facts = {}
        self.bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  {task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self.console,
            refresh_per_second=4,
        )
        self.began = time.perf_counter()
        self.task = self.bar.add_task(plain(label), total=total, unit=unit, rate="", facts="")
        self.bar.start()

    def advance(self, n: int = 1, **facts: Any) -> None:
        """Move on by ``n``."""
        if self.bar is None:
            return
        task = self.bar.tasks[0]
        rate = (task.completed + n) / max(time.perf_counter() - self.began, 1e-9)
        self.facts = facts or self.facts
        self.bar.update(self.task, advance=n, rate=f"{rate:.3g}/s", facts=shown(self.facts))

    def finish(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class PlainProgress:
    """Lines without control codes, for pipes, logs and batch systems."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.label = ""

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin counting."""
        self.label, self.total, self.unit, self.done = plain(label), total, unit, 0
        self.began = self.last_line = time.perf_counter()
        self.facts: dict[str, Any] = {}

    def advance(self, n: int = 1, **facts: Any) -> None:
        """Count; say so now and then."""
        self.done += n
        self.facts = facts or self.facts
        if time.perf_counter() - self.last_line >= PLAIN_SECONDS and self.done < self.total:
            self._line()

    def finish(self) -> None:
        """Say the last count."""
        if self.label:
            self._line()
        self.label = ""

    def _line(self) -> None:
        self.last_line = time.perf_counter()
        rate = self.done / max(self.last_line - self.began, 1e-9)
        left = f"  {(self.total - self.done) / rate:.0f} s left" if self.done < self.total and rate else ""
        text = f"{self.label}: {self.done}/{self.total} {self.unit}  {rate:.3g}/s{left}  {shown(self.facts)}"
        self.console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)


class _Handler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        word = {"INFO": "note", "WARNING": "warning"}.get(record.levelname, record.levelname.lower())
        text = "\n".join(map(plain, record.getMessage().rstrip().splitlines()))  # warnings of libraries have several
        self.console.print(f"{word}: {text}", markup=False, highlight=False, soft_wrap=True)


def open_console(quiet: bool, debug: bool) -> Progress:
    """Set up logging on standard error and return the progress display that fits it."""
    with loading():
        from rich.console import Console

    with contextlib.suppress(AttributeError, ValueError):  # not a stream of Python's own
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # names of files are bytes
    console = Console(stderr=True)
    logger = logging.getLogger("fastsrgan")
    logger.handlers[:] = [_Handler(console)]
    logger.propagate = False
    _other_warnings(debug, logger.handlers[0])
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    if quiet:
        return QUIET
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)


def _other_warnings(debug: bool, handler: logging.Handler) -> None:
    """Warnings of libraries, which speak to programmers: of pydicom about each odd value, say. Shown by --debug.

    What they mean for a user is said in words of our own.
    """
    logging.captureWarnings(True)
    for name in ("py.warnings", "nibabel.global", "pydicom"):
        theirs = logging.getLogger(name)
        theirs.handlers[:] = [handler] if debug else [logging.NullHandler()]
        theirs.propagate = False


def plain(text: str) -> str:
    """Text without what moves a terminal's cursor, colours it or turns its letters: names of files may hold that."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def error_line(text: str) -> None:
    """The one line that ends a failed command."""
    sys.stderr.write(f"error: {plain(' '.join(text.split()))}\n")
    sys.stderr.flush()


def say(text: str) -> None:
    """A line of a result on standard output: on a terminal without control letters, elsewhere names are as they are."""
    sys.stdout.write(f"{plain(text) if sys.stdout.isatty() else text}\n")


def table(rows: list[dict[str, Any]], columns: list[str] | None = None) -> str:
    """Rows as aligned plain text."""
    columns = columns or list(rows[0])
    cells = [[_cell(r.get(c)) for c in columns] for r in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    lines = [[c.ljust(w) for c, w in zip(columns, widths, strict=True)], ["-" * w for w in widths]]
    lines += [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in cells]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))


def print_json(value: Any) -> None:
    """Plain JSON on standard output."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False))
