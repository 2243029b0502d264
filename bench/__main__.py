"""Command line of the benchmarks: a table, then one line of JSON, the last one printed.

    python -m bench step  --json bench/results/MACHINE/step.json
    python -m bench data  --threads 2
    python -m bench infer --quick
    python -m bench kernels --device cuda
    python -m bench report        # bench/results -> docs/benchmarks.md, roofline.md and figures of data-engine.md
    python -m bench project 1000  # what the measured figures mean for a cohort of 1,000 subjects
    python -m bench roofline      # what the device's ceilings allow, beside what was measured
    python -m bench traffic       # bytes that the compiled generator moves per patch on CUDA, counted without one
    python -m bench scale         # epoch, traffic and cost for N subjects on M devices; --check tries it on CPU ranks

Exit code 1 when a correctness gate failed: that row has no times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from fastsrgan.cli.console import HelpFormatter

PEAK_OF = "--peak-of"  # a child process that measures the memory of one side

Defaults = dict[str, tuple[Any, Any]]  # option -> (default, default with --quick)
OPTIONS: dict[str, Defaults] = {
    "step": {
        "kernel": ([16], [4]),
        "batch": ([4], [2]),
        "patch": (64, 16),
        "critic_kernel": (32, 4),
        "critic_iterations": (5, 2),
        "ranks": (None, None),
    },
    "data": {
        "shape": ([197, 233, 189], [48, 48, 48]),
        "patch": (64, 16),
        "batch": ([32], [8]),
        "stride": (20, 10),
        "fill": (75, 75),
        "subjects": (2, 2),
        "epochs": (4, 2),
        "limit": (12, 1),
        "rounds": (1, 1),
        "workers": (None, None),
        "visit": (None, None),
        "step_ms": (145, 2),
    },
    "layers": {"kernel": ([16], [4]), "batch": ([4], [2]), "patch": (64, 16)},
    "kernels": {"shape": ([197, 233, 189], [48, 48, 48]), "patch": (64, 32), "step": (32, 16), "batch": ([32], [8])},
    "infer": {
        "shape": (None, [44, 40, 48]),
        "patch": (64, 32),
        "step": (32, 16),
        "steps": ([64, 32, 16, 10], [24]),
        "kernel": ([8], [2]),
        "batch": ([2], [2]),
        "limit": (30, 1),
    },
}
HELP = {
    "kernel": "channels of the generator's first convolution",
    "batch": "patches or tiles at a time",
    "patch": "edge of a patch or tile in voxels",
    "critic_kernel": "channels of the critic's first convolution",
    "critic_iterations": "critic updates per generator update",
    "shape": "of the volume in voxels",
    "infer shape": "of the volume in voxels (160 160 160 for stitching, 96 112 112 for whole inference)",
    "ranks": "also the weak scaling of the iteration over so many processes",
    "step": "distance between tiles in voxels",
    "infer step": "distance between tiles in voxels where all peers and memory are measured",
    "steps": "more distances, where fastsrgan and, up to 64 tiles, MONAI are measured",
    "limit": "seconds that the rounds of a case may take, beyond two of them",
    "data limit": "seconds that the timed epochs of a side may take, beyond two of them",
    "stride": "distance between patches in voxels",
    "fill": "width of the synthetic heads in percent of the volume",
    "subjects": "volumes of the end-to-end rows",
    "epochs": "of an end-to-end side that are timed, after its first one",
    "rounds": "of all end-to-end sides, each a process that begins anew",
    "workers": "worker processes of the peers' loaders (all usable cores)",
    "visit": "also peers that take so many patches of a volume before it is made anew (no such rows)",
    "step_ms": "duration of the simulated training step in milliseconds",
}
BRIEF = {
    "step": "generator passes, critic and generator update, whole training iteration, weak scaling over ranks",
    "data": "degradation, patch gather, store read; files to batches end to end",
    "layers": "layers of the generator one by one",
    "kernels": "device operations against the copy ceiling",
    "infer": "sum alone, stitching alone, whole inference over a list of steps",
}
FROM_RESULTS = {  # command -> (module of bench/, what it does)
    "report": (
        "report",
        "bench/results -> docs/benchmarks.md, docs/roofline.md and the figures of docs/data-engine.md",
    ),
    "project": ("data_page", "what the measured figures mean for cohorts of other sizes"),
    "roofline": ("roofline", "floors from the device's ceilings, beside what was measured"),
    "traffic": ("traffic", "bytes that the compiled generator moves on CUDA, counted without one"),
    "scale": ("scale", "epoch, traffic and cost for N subjects on M devices; --check tries it on CPU ranks"),
}


def build_parser() -> argparse.ArgumentParser:
    """One command per benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, (_, brief) in FROM_RESULTS.items():
        commands.add_parser(name, help=brief)  # main hands their options on
    for bench, defaults in OPTIONS.items():
        p = commands.add_parser(bench, help=BRIEF[bench], description=BRIEF[bench])
        for name, (default, _) in defaults.items():
            several: dict[str, Any] = {"nargs": "+"} if isinstance(default, list) else {}
            several = {"nargs": 3, "metavar": tuple("XYZ")} if name == "shape" else {"metavar": "N"} | several
            words = HELP.get(f"{bench} {name}") or HELP[name]
            told = (
                "" if default is None else f" ({' '.join(map(str, default)) if isinstance(default, list) else default})"
            )
            p.add_argument(f"--{name.replace('_', '-')}", type=int, help=words + told, **several)
        if bench == "data":
            p.add_argument("--engine", action=argparse.BooleanOptionalAction, help="end-to-end rows (not with --quick)")
        if bench in ("data", "step", "infer"):
            drawn = {"data": "the end-to-end rows", "step": "every row", "infer": "time against step"}[bench]
            p.add_argument("--plot", metavar="FILE", help=f"also draw {drawn}, as PNG or SVG")
        p.add_argument("--quick", action="store_true", help="small sizes and two repeats: does it work, not how fast")
        p.add_argument("--repeats", type=int, metavar="N", help="of every side, taken in turns (5)")
        p.add_argument("--threads", type=int, metavar="N", help="for torch and BLAS (all usable cores)")
        whose = " of the end-to-end rows" if bench == "data" else ""
        p.add_argument("--device", default="cpu", help=f"cpu, cuda or cuda:n{whose} (cpu)")
        p.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT")
        p.add_argument(
            "--memory", action=argparse.BooleanOptionalAction, help="peak memory, a process per side (not with --quick)"
        )
        p.add_argument("--json", metavar="FILE", help="also write the JSON here")
        p.add_argument(PEAK_OF, nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options with their defaults filled in; ``argv`` is kept for the children."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, defaults in OPTIONS[args.bench].items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.quick])
    args.repeats = (2 if args.quick else 5) if args.repeats is None else args.repeats
    args.threads = len(os.sched_getaffinity(0)) if args.threads is None else args.threads
    args.memory = not args.quick if args.memory is None else args.memory
    if args.bench == "data" and args.engine is None:
        args.engine = not args.quick
    if args.bench == "data" and args.plot and not args.engine:
        parser.error("--plot draws the end-to-end rows: add --engine, which --quick leaves out")
    numbers = [v for name in OPTIONS[args.bench] for v in _flat(getattr(args, name))]
    if min([args.repeats, args.threads, *numbers]) < 1:
        parser.error("sizes, repeats and threads are numbers from 1 up")
    if args.bench == "layers" and args.patch % 4:
        parser.error(f"--patch {args.patch}: networks take multiples of 4")
    if args.bench in ("kernels", "data") and args.patch > min(args.shape):
        parser.error(f"--patch {args.patch} is larger than the volume, {' x '.join(map(str, args.shape))}")
    if getattr(args, "plot", None) and not args.plot.lower().endswith((".png", ".svg")):
        parser.error(f"--plot {args.plot}: a name that ends with .png or .svg")
    args.argv = list(argv)
    return args


def _flat(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def from_results(name: str, argv: Sequence[str]) -> int:
    """The commands that print what follows from measured figures; returns the exit code."""
    import importlib

    from fastsrgan.errors import FastsrganError

    try:
        print(importlib.import_module(f"bench.{FROM_RESULTS[name][0]}").main(argv))
    except FastsrganError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _main(argv: Sequence[str]) -> int:
    if argv and argv[0] in FROM_RESULTS:
        return from_results(argv[0], argv[1:])
    args = parse(argv)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(args.threads)  # read when NumPy and torch are first imported, below
    import importlib

    from bench import common
    from fastsrgan.core.files import output_file
    from fastsrgan.errors import FastsrganError

    try:
        for target in (args.json, getattr(args, "plot", None)):
            if target:
                output_file(target)  # not after an hour
        common.prepare(args)  # first: it knows whether the device is there
        cases = importlib.import_module(f"bench.{args.bench}").cases(args)
        if args.peak_of:
            name, side = args.peak_of
            case = next(c for c in cases if c.name == name)
            print(json.dumps({"peak_bytes": common.peak_of(case, side, args.device)}))
            return 0
        report = common.run(cases, args)
        if args.json:
            common.write_json(args.json, report)
        if getattr(args, "plot", None):
            drawing = {"data": "bench.plot", "step": "bench.plot_step", "infer": "bench.infer_plot"}[args.bench]
            importlib.import_module(drawing).plot(report, args.plot)
    except FastsrganError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # as the commands of fastsrgan end
        print("error: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(report))
    return 0 if all(row["passed"] for row in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
