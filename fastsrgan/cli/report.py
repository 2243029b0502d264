"""``fastsrgan report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from fastsrgan.cli.console import Need, add_label_options, typed
from fastsrgan.core.progress import Progress
from fastsrgan.core.signals import loading
from fastsrgan.errors import counted

ONE_PAGE = "scores study hr label mask label_classes label_names max_mb"  # options of a single page
NEEDS = (
    Need(ONE_PAGE, lambda a: len(a.path) == 1, "has no use where several runs are laid over each other"),
    Need("label_classes", lambda a: a.label, "no label is given", "--label IMAGE, or leave it out"),
    Need("label_names", lambda a: a.label_classes, "has no use without --label-classes"),
)


def add_parser(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command."""
    example = (
        "fastsrgan report out\n"
        "  fastsrgan report run                                               # curves and panels of a training\n"
        "  fastsrgan report out --scores evaluate.json -o out/cohort.html"
    )
    text = "HTML with viewer, figures and provenance, a page per result; works offline"
    p = command("report", run, text, example)
    text = (
        "folder of results, demo, study or training run, or one result: its JSON or an image of it; several training "
        "runs are laid over each other"
    )
    p.add_argument("path", nargs="+", metavar="DIR|RUN|JSON", help=text)
    text = "the page (report.html in that folder; of several runs comparison.html in the first)"
    p.add_argument("-o", "--out", metavar="FILE", help=text)
    p.add_argument("--scores", metavar="JSON", help="what `fastsrgan evaluate --json FILE` wrote (the folder's own)")
    p.add_argument("--study", nargs="+", default=(), metavar="JSON", help="what `fastsrgan study` wrote, to show too")
    for name, text in (("hr", "true image of a single result"), ("label", "its label"), ("mask", "region to score")):
        p.add_argument(f"--{name}", metavar="IMAGE", help=text)
    add_label_options(p, "have their scores each", rows=False)
    text = "largest page of one result; of larger volumes a slab (30)"
    p.add_argument("--max-mb", type=float, default=30.0, metavar="MB", help=text)
    p.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    p.add_argument("--json", action="store_true", help="print the files as JSON")
    p.set_defaults(needs=NEEDS)


def run(args: argparse.Namespace, progress: Progress) -> int:
    """Write the page and say where it is."""
    with loading():
        from fastsrgan.report.page import NotShown, report, runs_report

    if len(args.path) > 1:
        return _tell(runs_report(args.path, args.out, overwrite=args.overwrite), args.json)
    given = typed(args, "scores hr label mask label_classes label_names max_mb overwrite")
    try:
        return _tell(report(args.path[0], args.out, studies=args.study, progress=progress, **given), args.json)
    except NotShown as error:
        _tell(error.written, args.json)
        raise


def _tell(written: list[Path], as_json: bool) -> int:
    if as_json:
        print(json.dumps([str(path) for path in written], indent=2))
        return 0
    print(written[0])
    if len(written) > 1:
        print(f"and {counted(len(written) - 1, 'page')} of single results beside it")
    return 0
