"""The command line: parse, call one library function, print. ``-`` and ``_`` are alike in option names.

Exit codes: 0 ok, 1 internal, 2 usage, 3 bad input, 4 bad weights / checkpoint / store version / config, 5 resources,
6 some items of a batch failed (where none is done: the code of the first that failed), 130 after SIGINT, 143 after
SIGTERM and SIGUSR1. One line on standard error says what came and what to do.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import itertools
import logging
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastsrgan._version import __version__
from fastsrgan.cli.console import (
    HelpFormatter,
    add_label_options,
    error_line,
    open_console,
    print_json,
    refuse_idle,
    say,
    table,
    typed,
)
from fastsrgan.core.files import left_as_found, url_of
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.signals import SAID, Interrupts, Terminated, exit_code, loading, no_room
from fastsrgan.errors import (
    FastsrganError,
    InputError,
    MissingError,
    ResourceError,
    UsageError,
    alike,
    brief,
    counted,
    out_of_memory,
)
from fastsrgan.infer.settings import add_options

if TYPE_CHECKING:
    from fastsrgan.store.reader import Subject


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors, one line with a hint."""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Of ``--help`` and ``--version``: argparse would keep quiet about a disk that is full."""
        (file or sys.stderr).write(message)
        (file or sys.stderr).flush()

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        wrong = re.match(r"argument .*: invalid choice: '([^']*)' \(choose from (.*)\)$", message)
        near = close(wrong[1], re.findall(r"[\w-]+", wrong[2])) if wrong else None
        lacking = message.partition("required: ")[2].split(", ")
        own = any(str(action.metavar or action.dest) in lacking for action in self._get_positional_actions())
        kind = MissingError if own or (re.match(r"argument \S+: .*'", message) and not near) else UsageError
        raise kind(self.prog, message, f"did you mean {near}?" if near else f"{self.prog} --help")


def close(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one is nearest to, where one is near."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)


def taken(parser: argparse.ArgumentParser, words: Sequence[str], told: str) -> str:
    """What became of words behind an option that takes several, or may take one, where an argument is missing or, as
    ``told``, one of these is no value; empty where no such option took more than it needs."""
    wrong = re.search(r": .*?'([^']*)'", told)
    for place, word in enumerate(words):
        known = {id(a): a for name, a in parser._option_string_actions.items() if name.startswith(word)}
        action = parser._option_string_actions.get(word) or (known.popitem()[1] if len(known) == 1 else None)
        if not word.startswith("-") or action is None or action.nargs not in ("+", "*", "?"):
            continue
        values = [*itertools.takewhile(lambda w: not w.startswith("-") or w[1:2].isdigit(), words[place + 1 :])]
        more = values[:1] if action.nargs == "?" else values[1:]
        if more and (wrong is None or wrong[1] in more):
            named = wrong[1] if wrong else more[-1]
            return f"{word} takes {named} as a value too: arguments stand before such an option, or behind --"
    return ""


def build_parser() -> Parser:
    """All commands. Building them loads no library that takes time: their functions do, when they are run."""
    from fastsrgan.cli import evaluate as cli_evaluate
    from fastsrgan.cli import infer as cli_infer
    from fastsrgan.cli import job_model as cli_job
    from fastsrgan.cli import report as cli_report
    from fastsrgan.cli import study as cli_study
    from fastsrgan.cli import train as cli_train

    parser = Parser(
        prog="fastsrgan",
        description="Super-resolution and segmentation of brain MRI with one 3-D GAN (SegSRGAN), fast.",
        epilog="Each command has its own --help with an example. --debug shows tracebacks, --quiet hides progress and "
        "notes.",
    )
    parser.add_argument("--version", action="version", version=f"fastsrgan {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace, Progress], int], text: str, example: str) -> Parser:
        heading = "examples" if "\n" in example else "example"
        end = f"{heading}:\n  {example}"
        p = commands.add_parser(name, help=text, description=text, epilog=end, formatter_class=HelpFormatter)
        p.set_defaults(run=run)
        return p

    text = "the whole job on brains made of the MNI152 template, with a picture at the end"
    p = command("demo", _demo, text, "fastsrgan demo -o demo")
    p.add_argument("-o", "--out", default="demo", help="output folder (demo)")
    add_options(p, "device")
    p.add_argument("--seed", type=int, default=0, help="seed of the synthetic cohort (0)")
    text = "mm of the scan (1 1 3)"
    p.add_argument("--low-res", nargs=3, type=float, default=(1.0, 1.0, 3.0), metavar=("X", "Y", "Z"), help=text)
    p.add_argument("--overwrite", action="store_true", help="replace an earlier demo")

    example = (
        "fastsrgan convert cohort.csv cohort.zarr\n"
        "  fastsrgan convert cohort.csv cohort.zarr --label 3,42              # two values of a map are the structure\n"
        "  fastsrgan convert cohort.csv cohort.zarr --label cortex=3,42 white=2,41  # two structures\n"
        "  fastsrgan convert cohort.csv cohort.zarr --resume                  # after new rows, or a stop"
    )
    p = command("convert", _convert, "a CSV of images and labels -> a chunked Zarr store", example)
    text = (
        "columns HR_image, Label_image, Base (Train or Test), optional Mask_image, Label_classes, Tissue_image "
        "(a map of many structures that images are made of: no image and label are needed)"
    )
    p.add_argument("csv", metavar="CSV", help=text)
    p.add_argument("store", metavar="STORE", help="folder or URL of the store to make")
    p.add_argument("--workers", type=int, metavar="N", help="threads (one a core, at most 8)")
    text = "stored type of images; auto: integers as they are, other numbers as float32 (auto)"
    p.add_argument("--dtype", default="auto", choices=("auto", "int16", "float32"), help=text)
    p.add_argument("--base-path", metavar="DIR", help="prefix of the paths in the CSV")
    add_label_options(p, "are classes of their own, for `train --fit-mask True`; the first is the label", "--label")
    p.add_argument("--resume", action="store_true", help="keep what is finished and unchanged")
    p.add_argument("--overwrite", action="store_true", help="begin anew")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")

    text = "compare the files of a store, or the snapshots and weights of a run, with their checksums"
    p = command("verify", _verify, text, "fastsrgan verify cohort.zarr\n  fastsrgan verify run")
    p.add_argument("path", metavar="STORE|RUN", help="store of `convert`, run folder of `train`, or one snapshot of it")

    example = "fastsrgan info cohort.zarr\n  fastsrgan info s3://bucket/cohort.zarr --json"
    p = command("info", _info, "what a store holds", example)
    p.add_argument("store", metavar="STORE", help="folder or URL")
    p.add_argument("--json", action="store_true", help="print it as JSON")

    cli_train.add_parser(commands)
    cli_job.add_parser(commands)

    cli_infer.add_parsers(command)
    cli_evaluate.add_parser(command)
    cli_study.add_parser(command)
    cli_report.add_parser(command)

    p = command("doctor", _doctor, "devices, versions, and what will run where", "fastsrgan doctor")
    p.add_argument("--json", action="store_true", help="print it as JSON")
    return parser


def _demo(args: argparse.Namespace, progress: Progress) -> int:
    with loading():
        from fastsrgan.demo import run as demo

    given = typed(args, "device seed overwrite")
    result = demo.run(args.out, low_res_mm=tuple(args.low_res), progress=progress, **given)
    print(table(result["table"]))
    print(f"picture: {result['picture']}\nfigures: {result['json']}\npage: {result['page']}")
    print(f"total: {result['seconds']:.0f} s")
    return int(result.get("exit_code", 0))


def _convert(args: argparse.Namespace, progress: Progress) -> int:
    with loading():
        from fastsrgan.convert import convert

    given = typed(args, "workers dtype base_path label_classes label_names resume overwrite")
    result = convert(args.csv, args.store, progress=progress, **given)
    if args.json:
        print_json(result)
        return 0
    size = f"{counted(result['subjects'], 'subject')}, {result['stored_bytes'] / 1e6:.1f} MB"
    done = f"{result['converted']} converted, {result['kept']} kept, {result['seconds']:.1f} s"
    say(f"{result['store']}: {size}, {result['ratio']:.1f} x smaller than in memory; {done}")
    for line in alike(result["warnings"]):
        logging.getLogger("fastsrgan").warning("%s", line)
    return 0


def _verify(args: argparse.Namespace, progress: Progress) -> int:
    with loading():
        from fastsrgan.model import checkpoint, weights
        from fastsrgan.store.reader import open_store

    run = Path(args.path)
    lone = (run / checkpoint.MANIFEST).is_file() and (run / checkpoint.MODEL).is_file()
    if lone or checkpoint.folders(run) or (run / "config.yaml").is_file():
        found = checkpoint.folders(run) or ([run] if lone else [])
        problems = [line for snapshot in found for line in checkpoint.verify(snapshot)]
        problems += [] if lone else weights.damaged(run)
        problems += [] if found else [f"{run}: a run without snapshots, --resume has nothing to go on from"]
        what = counted(len(found), "snapshot")
    else:
        try:
            store = open_store(args.path)
        except InputError as error:
            raise InputError(error.what, error.reason, "name a store, a run or one of its snapshots") from None
        problems = store.verify(progress)
        what = counted(len(store.subjects), "subject")
    for line in problems:
        say(line)
    print(f"{args.path}: {what}, {counted(len(problems), 'problem')}")
    return 3 if problems else 0


def _label_of(subject: Subject) -> str:
    """What is the label, or each structure of the mask, and its share of the voxels; empty without a label."""
    attrs, counts = subject.attrs, subject.attrs.get("label_counts", {})
    held = attrs.get("mask_counts", {})
    parts = [(name, values, held.get(str(i), 0)) for i, (name, values) in enumerate(attrs.get("structures", ()), 1)]
    if not parts and counts:
        inside = sum(n for value, n in counts.items() if value != "0")
        parts = [(attrs.get("label_name", ""), attrs.get("label_classes", ()), inside)]
    told = [(f"{name}=" * bool(name) + ",".join(map(str, values)), n) for name, values, n in parts]
    return "; ".join(f"{what} {brief(100 * n / math.prod(subject.shape), 2)} %".strip() for what, n in told)


def _info(args: argparse.Namespace, progress: Progress) -> int:
    with loading():
        from fastsrgan.store.reader import open_store

    store = open_store(args.store)
    rows = [
        {
            "subject": s.id,
            "split": s.split,
            "shape": " x ".join(map(str, s.shape)),
            "spacing mm": " x ".join(f"{v:.3g}" for v in s.spacing),
            "label": _label_of(s),
            "arrays": ", ".join(f"{n} {a['dtype']}" for n, a in s.arrays.items()),
            "MB": round(s.stored_bytes / 1e6, 2),
            "ratio": round(s.raw_bytes / s.stored_bytes, 2),
        }
        for s in store.subjects
    ]
    if args.json:
        print_json(rows)
        return 0
    if rows:
        print(table(rows))
    size, raw = (sum(getattr(s, name) for s in store.subjects) for name in ("stored_bytes", "raw_bytes"))
    splits = ", ".join(f"{sum(s.split == name for s in store.subjects)} {name}" for name in ("Train", "Test"))
    ratio = f", {raw / size:.2f} x smaller than in memory" if size else ""
    state = "" if store.complete else "; the conversion has not ended: `fastsrgan convert --resume` goes on"
    say(f"{args.store}: {counted(len(rows), 'subject')} ({splits}), {size / 1e6:.2f} MB{ratio}{state}")
    return 0


def _doctor(args: argparse.Namespace, progress: Progress) -> int:
    with loading():
        from fastsrgan import doctor

    facts = doctor.diagnose()
    if args.json:
        print_json(facts)
    else:
        for line in doctor.describe(facts):
            say(line, doctor.INDENT)
    return 0


def _below(parser: Parser, command: str | None) -> Parser:
    """The parser of a command."""
    below = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    return below.get(command or "", parser)


def normalised(argv: Sequence[str]) -> list[str]:
    """Arguments with ``_`` as ``-`` in option names, so both spellings work.

    Values are left alone, and all that follows ``--``.
    """
    options = list(argv).index("--") if "--" in argv else len(argv)
    out = []
    for word in argv[:options]:
        if word.startswith("-") and len(word) > 2 and word[1:2] not in "0123456789.":
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        out.append(word)
    if out and not out[0].startswith("-"):
        out[0] = out[0].replace("_", "-")
    return [*out, *argv[options:]]


def at_home(word: str) -> str:
    """A word with ~ as the home folder where the shell left it alone, as in ``--out=~/x``; ./~ names a file."""
    if found := re.match(r"(-\w|--[\w-]+=|)(~.*)", word, re.DOTALL):
        return found[1] + os.path.expanduser(found[2])
    return word


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    words = [at_home(word) for word in normalised(sys.argv[1:] if argv is None else argv)]
    options = words.index("--") if "--" in words else len(words)
    flags = {flag: flag in words[:options] for flag in ("--debug", "--quiet")}
    words = [w for w in words[:options] if w not in flags] + words[options:]
    progress = QUIET
    signals = Interrupts()
    try:
        if "" in words:
            raise UsageError("the command line", "holds an empty word", "a variable of the shell that is not set?")
        parser = build_parser()
        args, unknown = parser.parse_known_args(words)
        if unknown:
            command = f"fastsrgan {args.command}" if args.command else "fastsrgan"
            known = _below(parser, args.command)._option_string_actions
            near = close(unknown[0].partition("=")[0], (name for name in known if name.startswith("--")))
            hint = f"did you mean {near}?" if near else f"{command} --help"
            if os.path.lexists(unknown[0]):  # a file whose name begins as options do
                hint = f"./{unknown[0]} names the file"
            raise UsageError(command, f"unrecognized arguments: {' '.join(unknown)}", hint)
        if args.command is None:
            parser.print_help()
            return 0
        progress = open_console(flags["--quiet"], flags["--debug"])
        refuse_idle(_below(parser, args.command), args)
        if getattr(args, "label_names", None) or getattr(args, "label_classes", None):
            with loading():
                from fastsrgan.io.labels import check_given, read_names, rejoined
            args.label_classes = args.label_classes and rejoined(args.label_classes)
            if args.label_names:  # read when a name is to be found, or never
                read_names(args.label_names)
            check_given(args.label_classes or (), args.label_names, args.command in ("convert", "study"))
        with signals, left_as_found(places(args)):
            return int(args.run(args, progress))
    except SystemExit as stop:  # argparse's --help and --version
        return int(stop.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        progress.finish()
        if flags["--debug"]:
            traceback.print_exc()
        if isinstance(error, MissingError) and (hint := taken(_below(build_parser(), words[0]), words, error.reason)):
            error = UsageError(error.what, error.reason, hint)
        return failed(error if isinstance(error, FastsrganError) else signals.raised or error)


def places(args: argparse.Namespace) -> list[str]:
    """Where a command writes, as far as it makes the folders for it."""
    files = [path for path in (getattr(args, name, None) for name in ("dice_file", "mse_file")) if path]
    named = [getattr(args, name, None) for name in ("out", "store", "snapshot_folder")]
    return [path for path in [*named, *map(os.path.dirname, files)] if path and not url_of(path)]


def failed(error: BaseException) -> int:
    """Say an error in one line; returns the exit code it stands for."""
    if isinstance(error, FastsrganError):
        error_line(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        number = error.signal if isinstance(error, Terminated) else signal.SIGINT
        error_line(SAID[number])
        return exit_code(number)
    smaller = "use a smaller patch, batch or volume"
    if isinstance(error, MemoryError):
        return failed(ResourceError("memory", "not enough", str(error) or smaller))
    if isinstance(error, ImportError) and out_of_memory(error):
        return failed(no_room())
    if isinstance(error, RuntimeError) and out_of_memory(error):  # torch's own, which has no type
        return failed(ResourceError("memory", "not enough", f"{smaller}, or raise the limit of the process"))
    if isinstance(error, OSError):
        told = (error.filename or "system", error.strerror or str(error))
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOENT):
            return failed(InputError(*told, "check the path"))
        denied = error.errno in (errno.EACCES, errno.EPERM)
        return failed(ResourceError(*told, f"check the path and its {'permissions' if denied else 'disk'}"))
    error_line(f"internal: {type(error).__name__}: {error} (please report it with the output of --debug)")
    return 1
