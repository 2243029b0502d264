"""``fastsrgan study``."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

from fastsrgan.cli.console import (
    Need,
    add_checkpoint_option,
    add_label_options,
    chosen_weights,
    print_json,
    say,
    table,
    typed,
)
from fastsrgan.core.progress import Progress
from fastsrgan.core.signals import loading
from fastsrgan.core.system import tune_allocator
from fastsrgan.errors import PartialFailure, counted
from fastsrgan.infer.settings import add_options
from fastsrgan.infer.values import tile_edge

KINDS = ("steps", "noise", "augmentation", "resolution", "curves")
MEASURED = (
    "weights checkpoint quick patch steps low_res noise ratios axis split label_classes label_names subjects device "
    "precision seed"
)
NEEDS = (
    Need(MEASURED, lambda a: a.kind != "curves", "has no use: curves are read from the log of a run"),
    Need("split label_classes label_names", lambda a: a.data or not a.quick, "has no use: --quick makes its own data"),
    Need("subjects", lambda a: a.data or not a.quick or a.subjects <= 2, "--quick makes two subjects", "1, 2, or data"),
    Need("low_res", lambda a: a.kind != "resolution", "is what this study varies", "--ratios, the slices' thickness"),
    Need("ratios axis", lambda a: not a.low_res, "has no use beside --low-res"),
    Need("ratios", lambda a: a.kind == "resolution" or len(a.ratios) == 1, "only resolution takes several", "one"),
    Need("steps", lambda a: a.patch is not None, "has no use with --patch none, the whole image in one tile"),
)


def add_parser(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command; ``command(name, run, text, example)`` makes an empty one."""
    example = (
        "fastsrgan study steps --quick\n"
        "  fastsrgan study steps cohort.csv --weights run --patch 128 --steps 20 30 50 80 128\n"
        "  fastsrgan study resolution cohort.zarr -w perinatal --ratios 2 3 4 6\n"
        "  fastsrgan study augmentation cohort.csv --weights with without -o augmentation\n"
        "  fastsrgan study curves run other-run"
    )
    p = command("study", _study, "the paper's tables and figures on your own images and models", example)
    text = (
        "quality and time against the step, noise robustness, models on changed contrast, quality against slice "
        "thickness, training curves"
    )
    p.add_argument("kind", choices=KINDS, help=text)
    text = (
        "training table or store (its Test rows), one high-resolution image or a folder of them, for curves a run "
        "folder or several; left out with --quick: two small synthetic subjects"
    )
    p.add_argument("data", nargs="*", help=text)
    text = "output folder (study-KIND); finished measurements in it are kept"
    p.add_argument("-o", "--out", metavar="DIR", help=text)
    text = (
        "models: adult (the default; of --quick without data weights that know its heads), perinatal, weight "
        "files or run folders; augmentation compares two or more"
    )
    p.add_argument("-w", "--weights", nargs="+", default=(), metavar="FILE", help=text)
    add_checkpoint_option(p)
    text = (
        "tiles of 48 voxels, few steps, two subjects, unless options say otherwise; not adapted to each scan, "
        "which takes most of the time"
    )
    p.add_argument("--quick", action="store_true", help=text)
    text = "tile edge in voxels, or none: the whole image in one tile (128, with --quick 48)"
    p.add_argument("--patch", type=tile_edge, default=0, metavar="N", help=text)
    text = (
        "voxels between tiles (steps: 20 30 50 80 128, noise and "
        "augmentation: 30 80 128, resolution: 30; less with --quick)"
    )
    p.add_argument("--steps", nargs="+", type=int, metavar="N", help=text)
    text = "mm of the acquisition, stored axes (not of resolution: --ratios)"
    p.add_argument("--low-res", nargs=3, type=float, metavar=("X", "Y", "Z"), help=text)
    text = (
        "standard deviations over the largest value (noise: 0 0.01 0.02 0.03 0.05, with --quick 0 0.02 0.05; "
        "augmentation, which takes the largest: 0.03; steps and resolution, which takes the first: 0)"
    )
    p.add_argument("--noise", nargs="+", type=float, metavar="F", help=text)
    text = "slice thickness over the head's voxel size (resolution: 2 3 4 6, with --quick 2 3 4; else one: 3)"
    p.add_argument("--ratios", nargs="+", type=float, metavar="R", help=text)
    p.add_argument("--axis", type=int, default=2, choices=(0, 1, 2), help="stored axis of the thick slices (2)")
    p.add_argument("--split", default="Test", choices=("Test", "Train", "all"), help="rows of the table (Test)")
    add_label_options(p, "have a Dice each", "--label", of="of a table's label maps")
    p.add_argument("--subjects", type=int, metavar="N", help="at most so many of them")
    add_options(p, "device", "precision")
    p.add_argument("--seed", type=int, default=0, help="of the noise and the synthetic subjects (0)")
    p.add_argument("--json", action="store_true", help="print what KIND.json holds")
    p.set_defaults(needs=NEEDS)


def _study(args: argparse.Namespace, progress: Progress) -> int:
    with loading():
        from fastsrgan.study import run as study
        from fastsrgan.study.tables import INTERPOLATION, best_lines, decisive_rows, fit_text, paper_rows, shown_rows

    tune_allocator()
    given = typed(args, "axis split subjects label_classes label_names device precision seed")
    lists = typed(args, "steps low_res noise ratios")
    given |= {name: None if values is None else tuple(values) for name, values in lists.items()}
    settings = study.Settings(patch=args.patch or None, whole=args.patch is None, **given)
    out, chosen = args.out or f"study-{args.kind}", chosen_weights(args.weights, args.checkpoint) or ()
    facts = study.run(args.kind, args.data or None, out, chosen, settings, quick=args.quick, progress=progress)
    if args.json:
        print_json(facts)
    else:
        curves = args.kind == "curves"
        print(_aligned(decisive_rows(facts) if curves else shown_rows(facts)))
        for line in best_lines(facts) if curves else ():
            say(line)
        if not curves and any(row.get("model") == "interpolation" for row in shown_rows(facts)):
            say(" ".join(INTERPOLATION.splitlines()))
        if facts.get("note"):
            say(facts["note"])
        for fit in facts.get("fit", []):
            say(f"fit: {fit_text(fit)}")
        if quoted := paper_rows(facts):
            print()
            say(f"{facts['paper']['source']}:")
            print(_aligned(quoted))
        print("\n" + "\n".join(f"{name}: {path}" for name, path in facts["files"].items()))
    if facts.get("failed"):
        raise PartialFailure(out, f"{counted(len(facts['failed']), 'head')} could not be used", "see the warnings")
    return 0


def _aligned(rows: list[dict[str, str]]) -> str:
    """A table whose rows may have different columns; what a row is of stands in every block of a narrow terminal."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    keys = len(list(itertools.takewhile(lambda name: name in ("condition", "model", "step", "run", "epoch"), columns)))
    return table(rows, columns, max(keys, 1))
