"""The command line: parse, call one library function, print. ``-`` and ``_`` are alike in option names.

Exit codes: 0 ok, 2 usage, 3 bad input, 4 bad weights / checkpoint / store version / config, 5 resources, 6 some items
of a batch failed, 130 and 143 after SIGINT and SIGTERM. One line on standard error says what came and what to do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastsrgan._version import __version__
from fastsrgan.console import error_line, open_console, table
from fastsrgan.errors import FastsrganError, PartialFailure, UsageError
from fastsrgan.runtime import Progress

RAW = argparse.RawDescriptionHelpFormatter


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UsageErrors, one line with a hint."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        raise UsageError(self.prog, message, f"{self.prog} --help")


def tile_edge(text: str) -> int | None:
    """``none`` or a number of voxels."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of voxels nor none") from error


def size(text: str) -> float | str:
    """``same`` or a number of millimetres."""
    if text.lower() == "same":
        return "same"
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a size in mm nor same") from error


def batch_size(text: str) -> int | str:
    """``auto`` or a number of tiles."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tiles nor auto") from error


def build_parser() -> Parser:
    """All commands. Heavy modules are imported by the commands that need them."""
    from fastsrgan import cli_train

    parser = Parser(
        prog="fastsrgan",
        description="Super-resolution and segmentation of brain MRI with one 3-D GAN (SegSRGAN), fast.",
        epilog="Each command has its own --help with an example. --debug shows tracebacks, --quiet hides progress.",
    )
    parser.add_argument("--version", action="version", version=f"fastsrgan {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace, Progress], int], text: str, example: str) -> Parser:
        p = commands.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}", formatter_class=RAW)
        p.set_defaults(run=run)
        return p

    p = command("demo", _demo, "the whole job on embedded real data, with a picture at the end", "fastsrgan demo -o demo")
    p.add_argument("-o", "--out", default="demo", help="output folder (demo)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    p.add_argument("--seed", type=int, default=0, help="seed of the synthetic cohort (0)")
    p.add_argument("--low-res", nargs=3, type=float, default=(1.0, 1.0, 3.0), metavar=("X", "Y", "Z"), help="mm (1 1 3)")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier demo")

    p = command("convert", _convert, "a CSV of images and labels -> a chunked Zarr store", "fastsrgan convert cohort.csv cohort.zarr")
    p.add_argument("csv", metavar="CSV", help="columns HR_image, Label_image, Base (Train or Test), optional Mask_image")
    p.add_argument("store", metavar="STORE", help="folder or URL")
    p.add_argument("--workers", type=int, help="threads (one a core)")
    p.add_argument("--dtype", default="auto", choices=("auto", "int16", "float32"), help="stored image type (auto)")
    p.add_argument("--base-path", help="prefix of the paths in the CSV")
    p.add_argument("--resume", action="store_true", help="keep what is finished and unchanged")
    p.add_argument("--overwrite", action="store_true", help="begin anew")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")

    p = command("verify", _verify, "checksums and schema of everything in a store or run", "fastsrgan verify cohort.zarr")
    p.add_argument("path", metavar="STORE|RUN")

    p = command("info", _info, "what a store holds", "fastsrgan info cohort.zarr")
    p.add_argument("store", metavar="STORE")
    p.add_argument("--json", action="store_true")

    cli_train.add_parser(commands)

    p = command("infer", _infer, "super-resolve and segment images", "fastsrgan infer scan.nii.gz -o out --step 16")
    p.add_argument("inputs", nargs="+", metavar="INPUT", help="NIfTI files, or .txt / .csv lists of them")
    p.add_argument("-o", "--out", required=True, metavar="DIR", help="output folder")
    p.add_argument("-w", "--weights", metavar="FILE", help="Keras HDF5, safetensors or run folder (the shipped model)")
    p.add_argument("--patch", type=tile_edge, default=128, help="tile edge in voxels, or none: the whole image (128)")
    p.add_argument("--step", type=int, default=30, help="voxels between tiles; smaller is better and slower (30)")
    p.add_argument("--new-resolution", nargs="+", type=size, metavar="MM", help="one size, three, or same (isotropic at the finest input spacing)")  # fmt: skip
    p.add_argument("--geometry", default="physical", choices=("physical", "segsrgan"), help="exact in mm, or the original's numbers")  # fmt: skip
    p.add_argument("--window", default="constant", choices=("constant", "gaussian"), help="weights inside a tile (constant)")
    p.add_argument("--batch", type=batch_size, default="auto", help="tiles per forward pass (auto)")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="(auto)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    p.add_argument("--save-prob", action="store_true", help="also write the probability map")
    p.add_argument("--volume", type=int, metavar="I", help="which volume of a 4-D image, from 0")
    p.add_argument("--max-voxels", type=float, default=2**31, metavar="N", help="refuse larger images")
    p.add_argument("--resume", action="store_true", help="skip what is finished")
    p.add_argument("--overwrite", action="store_true", help="replace existing results")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")

    p = command("evaluate", _evaluate, "compare results with the truth", "fastsrgan evaluate --sr out/a_sr.nii.gz --hr a.nii.gz --seg out/a_seg.nii.gz --label a_gm.nii.gz")  # fmt: skip
    for name in ("sr", "hr", "seg", "label", "mask", "baseline", "baseline-seg"):
        p.add_argument(f"--{name}", metavar="IMAGE")
    p.add_argument("--table", metavar="CSV", help="columns SR_image, HR_image, optional Seg_image, Label_image, Mask_image")
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to standard output")

    p = command("weights", _weights, "look at, import and export weight files", "fastsrgan weights import SegSRGAN_epoch_200 model.safetensors")  # fmt: skip
    p.add_argument("action", choices=("info", "import", "export"))
    p.add_argument("source", metavar="FILE")
    p.add_argument("target", nargs="?", metavar="OUT", help="safetensors (import) or Keras HDF5 (export)")
    p.add_argument("--overwrite", action="store_true")

    p = command("doctor", _doctor, "devices, versions, and what will run where", "fastsrgan doctor")
    p.add_argument("--json", action="store_true")
    return parser


def _demo(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan import demo

    result = demo.run(args.out, device=args.device, seed=args.seed, low_res_mm=tuple(args.low_res), overwrite=args.overwrite, progress=progress)  # fmt: skip
    print(table(result["table"]))
    print(f"picture: {result['picture']}\nfigures: {result['json']}\ntotal: {result['seconds']:.0f} s")
    return int(result.get("exit_code", 0))


def _convert(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan.convert import convert

    result = convert(
        args.csv,
        args.store,
        workers=args.workers,
        dtype=args.dtype,
        base_path=args.base_path,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=progress,
    )
    if args.json:
        _print_json(result)
        return 0
    ratio = f", {result['ratio']:.1f} x smaller than in memory" if result["ratio"] else ""
    print(f"{result['store']}: {result['subjects']} subjects, {result['stored_bytes'] / 1e6:.1f} MB{ratio}; {result['converted']} converted, {result['kept']} kept, {result['seconds']:.1f} s")  # fmt: skip
    for subject, warnings in result["warnings"].items():
        for text in warnings:
            print(f"warning: {subject}: {text}", file=sys.stderr)
    return 0


def _verify(args: argparse.Namespace, progress: Progress) -> int:
    from pathlib import Path

    from fastsrgan import checkpoint
    from fastsrgan.store import open_store

    run = Path(args.path)
    if checkpoint.snapshots(run) or (run / checkpoint.MANIFEST).is_file() and (run / checkpoint.MODEL).is_file():
        found = checkpoint.snapshots(run) or [run]
        problems = [line for snapshot in found for line in checkpoint.verify(snapshot)]
        what = f"{len(found)} snapshots"
    else:
        store = open_store(args.path)
        problems = store.verify(progress)
        what = f"{len(store.subjects)} subjects"
    for line in problems:
        print(line)
    print(f"{args.path}: {what}, {len(problems)} problems")
    return 3 if problems else 0


def _info(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan.store import open_store

    store = open_store(args.store)
    rows = [
        {
            "subject": s.id,
            "split": s.split,
            "shape": " x ".join(map(str, s.shape)),
            "spacing mm": " x ".join(f"{v:.3g}" for v in s.spacing),
            "arrays": ", ".join(f"{n} {a['dtype']}" for n, a in s.arrays.items()),
            "MB": round(s.stored_bytes / 1e6, 2),
            "ratio": round(s.raw_bytes / s.stored_bytes, 2),
        }
        for s in store.subjects
    ]
    if args.json:
        _print_json(rows)
    else:
        print(table(rows) if rows else f"{args.store}: no finished subjects")
    return 0


def _infer(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan.infer_files import SomeFailed, infer_files
    from fastsrgan.runtime import tune_allocator

    tune_allocator()
    resolution = args.new_resolution
    if resolution is not None:
        if len(resolution) not in (1, 3):
            raise UsageError("--new-resolution", f"{len(resolution)} sizes", "one, three, or same")
        resolution = resolution[0] if len(resolution) == 1 else resolution
    code = 0
    try:
        result = infer_files(
            args.inputs,
            args.out,
            args.weights,
            patch=args.patch,
            step=args.step,
            new_resolution=resolution,
            device=args.device,
            geometry=args.geometry,
            window=args.window,
            batch=args.batch,
            precision=args.precision,
            save_prob=args.save_prob,
            overwrite=args.overwrite,
            resume=args.resume,
            volume=args.volume,
            max_voxels=int(args.max_voxels),
            progress=progress,
        )
    except SomeFailed as error:
        error_line(str(error))
        result, code = error.summary, error.exit_code
    if args.json:
        _print_json(result)
    else:
        for item in result["items"]:
            outputs = "  ".join(str(p) for p in (item.get("outputs") or {}).values())
            print(f"{item['status']:8}{item['input']}  {outputs or item.get('error', '')}".rstrip())
    return code


def _evaluate(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan import evaluate
    from fastsrgan.runtime import write_json

    if bool(args.table) == bool(args.sr and args.hr):
        raise UsageError("evaluate", "give --sr and --hr, or --table", "fastsrgan evaluate --help")
    if args.table:
        result = evaluate.evaluate_table(args.table, progress=progress)
        rows = [{"figure": k, "mean": v["mean"], "sd": v["sd"], "n": v["n"]} for k, v in result["summary"].items()]
    else:
        result = evaluate.evaluate_files(
            args.sr, args.hr, args.seg, args.label, mask=args.mask, baseline=args.baseline, baseline_seg=args.baseline_seg
        )
        rows = figures(result)
    if args.json == "-":
        _print_json(result)
        return 0
    if args.json:
        write_json(args.json, result)
    print(table(rows))
    for note in result.get("notes", []):
        print(f"note: {note}", file=sys.stderr)
    failed = result.get("failed")
    if failed:
        raise PartialFailure(args.table, f"{len(failed)} rows could not be evaluated", "see the warnings")
    return 0


def figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of one pair as rows: region or segmentation, name, value, and the baseline's beside it."""
    base = result.get("baseline", {})
    rows = []
    for region, scores in result["image"].items():
        for name, value in scores.items():
            rows.append({"where": region, "figure": name, "value": value, "baseline": base.get("image", {}).get(region, {}).get(name)})  # fmt: skip
    for name, value in result.get("segmentation", {}).items():
        rows.append({"where": "segmentation", "figure": name, "value": value, "baseline": base.get("segmentation", {}).get(name)})  # fmt: skip
    return rows


def _weights(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan import weights

    if args.action == "info":
        _print_json(weights.info(args.source))
        return 0
    if not args.target:
        raise UsageError("weights", f"{args.action} needs a target", f"fastsrgan weights {args.action} FILE OUT")
    action = weights.import_keras if args.action == "import" else weights.export_keras
    print(action(args.source, args.target, overwrite=args.overwrite))
    return 0


def _doctor(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan import doctor

    facts = doctor.diagnose()
    if args.json:
        _print_json(facts)
    else:
        print("\n".join(doctor.describe(facts)))
    return 0


def _print_json(value: Any) -> None:
    from fastsrgan.runtime import finite

    print(json.dumps(finite(value), indent=2, ensure_ascii=False))


def normalised(argv: Sequence[str]) -> list[str]:
    """Arguments with ``_`` as ``-`` in option names, so both spellings work; values are left alone."""
    out = []
    for word in argv:
        if word.startswith("-") and len(word) > 2 and word[1:2] not in "0123456789.":
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        out.append(word)
    if out and not out[0].startswith("-"):
        out[0] = out[0].replace("_", "-")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    words = normalised(sys.argv[1:] if argv is None else argv)
    flags = {flag: flag in words for flag in ("--debug", "--quiet")}
    words = [w for w in words if w not in flags]
    progress = open_console(flags["--quiet"], flags["--debug"])
    try:
        parser = build_parser()
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help()
            return 0
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
        return failed(error)


def failed(error: BaseException) -> int:
    """Say an error in one line; returns the exit code it stands for."""
    if isinstance(error, FastsrganError):
        error_line(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        error_line("interrupted")
        return 130
    if isinstance(error, MemoryError):
        error_line(f"memory: not enough ({error or 'smaller patch, batch or volume'})")
        return 5
    if isinstance(error, OSError):
        error_line(f"{error.filename or 'system'}: {error.strerror or error}")
        return 5
    error_line(f"internal: {type(error).__name__}: {error} (please report it with the output of --debug)")
    return 1
