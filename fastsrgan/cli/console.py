"""What the commands show on a terminal: progress with throughput and time left, notes and warnings, one error line."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import math
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastsrgan.core.files import finite
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.signals import loading
from fastsrgan.errors import UsageError, brief, counted, lasting, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

WIDE, BAR_COLUMNS = 100, 54  # width of a terminal for the long bar; what stands beside the name of a stretch
GAP = "  "  # between columns of a table
PLAIN_SECONDS = 10.0  # between two lines where there is no terminal
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Need(NamedTuple):
    """What options need beside them. A command has a list of them, ``set_defaults(needs=...)``.

    options : names, with blanks between
    met : whether they have a use, of the parsed words
    reason, hint : of the UsageError for one that is given in vain; ``refused`` False: of a warning
    """

    options: str
    met: Callable[[argparse.Namespace], Any]
    reason: str
    hint: str = "leave it out"
    refused: bool = True


class HelpFormatter(argparse.HelpFormatter):
    """Paragraphs broken to the width of the terminal, but for those with indented lines, of commands to copy."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(
            part if "\n " in part else super(HelpFormatter, self)._fill_text(part, width, indent) for part in parts
        )


def refuse_idle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raise UsageError for the first option, of another value than its default, that would do nothing beside the
    others; warn where its ``Need`` says so."""
    actions = {action.dest: action for action in parser._actions}
    for need in getattr(args, "needs", ()):
        for action in map(actions.__getitem__, need.options.split()):
            value = getattr(args, action.dest)
            if value == action.default or need.met(args):
                continue
            names = action.option_strings or [str(action.metavar)]
            usual = f"--{action.dest.replace('_', '-')}"
            named = usual if usual in names else names[-1]
            if need.refused:
                raise UsageError(named, need.reason, need.hint)
            logging.getLogger("fastsrgan").warning("%s %s: it is not used", named, need.reason)


def typed(args: argparse.Namespace, names: str) -> dict[str, Any]:
    """The values of options by their names, with blanks between, as keywords of the function that takes them."""
    return {name: getattr(args, name) for name in names.split()}


def boolean(text: str) -> bool:
    """The original's booleans: True / False, also yes / no, 1 / 0."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def add_label_options(
    parser: argparse.ArgumentParser, several: str = "", *names: str, of: str = "of a label map", rows: bool = True
) -> None:
    """``--label-classes``, also under other names, and ``--label-names``, alike wherever a label enters.

    several : what is done with more than one structure, where they are taken
    of : whose values they are; rows : whether they may come from a table, whose rows can choose too
    """
    text = f"which values {of} are the structure: 3,42 or names of a lookup table"
    text += " (a row's own Label_classes comes first)" * rows
    more: dict[str, Any] = {"nargs": "+"} if several else {}
    text += f"; several, as cortex=3,42 white=2,41, {several}" if several else ""
    parser.add_argument("--label-classes", *names, metavar="VALUES", help=text, **more)
    text = "lookup table of FreeSurfer, ITK-SNAP or BIDS (dseg.tsv); a .tsv of its own name beside it is found"
    parser.add_argument("--label-names", metavar="FILE", help=text)


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``, wherever ``-w`` takes a run folder."""
    text = (
        "which weights of a run folder: of its best validation, of its newest snapshot, or of the snapshot after "
        "N updates (best; last where there is no best)"
    )
    parser.add_argument("--checkpoint", metavar="best|last|N", help=text)


def chosen_weights(paths: Sequence[str] | None, which: str | None) -> list[str] | None:
    """The paths of ``-w``, each run folder among them replaced by the file that ``--checkpoint`` names.

    Raises UsageError where it is given without a run folder; ModelError where there are no such weights.
    """
    if which is None:
        return None if paths is None else list(paths)
    if not paths:
        raise UsageError("--checkpoint", "no run folder was given", "-w RUN")
    with loading():
        from fastsrgan.model.weights import of_run
    return [str(of_run(path, which)) for path in paths]


def shown(facts: dict[str, Any], width: int) -> str:
    """Live values in a few characters, "rec 0.0213  W -0.41"; no line ends between a name and its value."""
    cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {plain(str(v))}" for k, v in facts.items())
    held = "  ".join(cell.replace(" ", "\u00a0") for cell in cells)
    return textwrap.fill(held, width, break_on_hyphens=False).replace("\u00a0", " ")


def fields(facts: dict[str, Any], digits: int = 4) -> str:
    """Values for programs: ``rec=0.0213 run="18 min left"``."""
    cells = [(k, f"{v:.{digits}g}" if isinstance(v, float) else plain(str(v))) for k, v in facts.items()]
    quoted = ((k.replace(" ", "_"), f'"{v}"' if re.search(r'[\s="]', v) else v) for k, v in cells)
    return " ".join(f"{k}={v}" for k, v in quoted)


class TerminalProgress:
    """A bar on a terminal, the live values in lines of their own below it: nothing is cut where it is narrow."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: RichProgress | None = None
        self.facts: dict[str, Any] = {}

    def start(self, label: str, total: int, unit: str) -> None:
        """Show a bar for ``total`` units."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        self.finish()
        self.facts = {}
        name, width = plain(label), self.console.width
        above = len(name) > width - BAR_COLUMNS  # a long name has a line of its own
        progress = self

        class Bar(RichProgress):
            def get_renderables(self) -> Iterator[Any]:
                if above:
                    yield Text(name)
                yield self.make_tasks_table(self.tasks)
                if progress.facts:
                    yield Text(shown(progress.facts, self.console.width))

        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(24 if width >= WIDE else 8),
            MofNCompleteColumn(),
            # The time left, in the end that taken, by the rate beside it: rich's own forgets what took above 30 s.
            TextColumn("{task.fields[unit]}  {task.fields[rate]} [progress.remaining]{task.fields[left]}"),
            console=self.console,
            refresh_per_second=4,
        )
        self.began = time.perf_counter()
        shown_name, unit = "" if above else name, units(total, unit)
        self.task = self.bar.add_task(shown_name, total=total, unit=unit, rate="", left="-:--:--")
        self.bar.start()

    def advance(self, n: int = 1, **facts: Any) -> None:
        """Move on by ``n``."""
        if self.bar is None:
            return
        task = self.bar.tasks[0]
        done, taken = task.completed + n, max(time.perf_counter() - self.began, 1e-9)
        left = taken if done >= (task.total or 0) else taken * ((task.total or 0) - done) / max(done, 1e-9)
        clock = str(datetime.timedelta(seconds=round(left)))
        self.facts = facts or self.facts
        self.bar.update(self.task, advance=n, rate=pace(done / taken), left=clock)

    def finish(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def tell(self, group: str, text: str, **facts: Any) -> None:
        """A line above the bar."""
        held = re.sub(r" (?=-?\d)", "\u00a0", plain(text))  # no line ends between a name and its number
        lines = textwrap.fill(held, self.console.width, subsequent_indent="  ").replace("\u00a0", " ")
        self.console.print(lines, markup=False, highlight=False, soft_wrap=True)


def units(total: int, one: str) -> str:
    """What is counted up to ``total``: 1 of 1 tile, 1 of 3 tiles."""
    return counted(total, one).partition(" ")[2]


def pace(rate: float) -> str:
    """How many in a second, or how long each takes: 12.3 -> '12.3/s', 0.008 -> '125 s each'."""
    return f"{1 / rate:.3g} s each" if 0 < rate < 0.1 else f"{brief(rate)}/s"


class PlainProgress:
    """Lines without control codes, for pipes, logs and batch systems."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.label = ""

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin counting."""
        self.label, self.total, self.unit, self.done = plain(label), total, units(total, unit), 0
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

    def tell(self, group: str, text: str, **facts: Any) -> None:
        """``group: name=value ...`` in one line."""
        self._print(f"{group}: {fields(facts, 6)}")

    def _print(self, text: str) -> None:
        self.console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> None:
        self.last_line = time.perf_counter()
        rate = self.done / max(self.last_line - self.began, 1e-9)
        left = f"  {lasting((self.total - self.done) / rate, 0)} left" if self.done < self.total and rate else ""
        self._print(f"{self.label}: {self.done}/{self.total} {self.unit}  {pace(rate)}{left}  {fields(self.facts)}")


class _Handler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        word = {"INFO": "note", "WARNING": "warning"}.get(record.levelname, record.levelname.lower())
        # Ours are of one line, whatever names they hold; warnings of libraries have several.
        told = record.getMessage().rstrip()
        text = f"{word}: " + "\n".join(map(plain, [told] if record.name == "fastsrgan" else told.splitlines()))
        if self.console.is_terminal:
            text = "\n".join(broken(line, self.console.width) for line in text.splitlines())
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


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


def broken(text: str, width: int, indent: int = 2) -> str:
    """A line for a terminal, broken between words, so that no path is cut that would fit; in pipes lines stay lines."""
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def error_line(text: str) -> None:
    """The one line that ends a failed command."""
    # Blanks stay as they are, names may hold several; what a library said may have lines.
    line = f"error: {plain(' '.join(filter(None, map(str.strip, text.splitlines()))))}"
    width = shutil.get_terminal_size().columns
    sys.stderr.write(f"{broken(line, width) if sys.stderr.isatty() else line}\n")
    sys.stderr.flush()


def say(text: str, indent: int = 2) -> None:
    """A line of a result on standard output: on a terminal broken between words, the rest ``indent`` letters in, and
    without control letters, elsewhere names are as they are, but for line breaks."""
    shown = plain(text) if sys.stdout.isatty() else one_line(text)
    lines = broken(shown, shutil.get_terminal_size().columns, indent) if sys.stdout.isatty() else shown
    sys.stdout.write(f"{lines}\n")


def table(rows: list[dict[str, Any]], columns: list[str] | None = None, keys: int = 1) -> str:
    """Rows as aligned plain text; what is wider than a terminal in blocks of columns, each with the first ``keys``,
    which say what a row is. Where these and one column more are wider, a row has a line for each of its columns."""
    columns = columns or list(rows[0])
    cells = [[_cell(r.get(c)) for c in columns] for r in rows]
    widths = [max(len(c), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    first = list(range(keys))
    taken = sum(widths[:keys]) + (keys - 1) * len(GAP)
    if max([taken, *(taken + len(GAP) + width for width in widths[keys:])]) > room:
        names = max(map(len, columns))
        lists = [[f"{c.ljust(names)}{GAP}{cell}" for c, cell in zip(columns, row, strict=True)] for row in cells]
        return "\n\n".join("\n".join(broken(line, int(room), names + len(GAP)) for line in one) for one in lists)
    blocks, used = [[*first]], taken
    for i, width in list(enumerate(widths))[keys:]:
        used += len(GAP) + width
        if used > room and len(blocks[-1]) > keys:
            blocks.append([*first])
            used = taken + len(GAP) + width
        blocks[-1].append(i)
    lines = [columns, ["-" * w for w in widths], *cells]
    made = [[GAP.join(line[i].ljust(widths[i]) for i in block).rstrip() for line in lines] for block in blocks]
    return "\n\n".join(map("\n".join, made))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else plain(str(value))


def print_json(value: Any) -> None:
    """Plain JSON on standard output."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False))
