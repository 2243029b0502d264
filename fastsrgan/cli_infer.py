"""``fastsrgan infer``, ``evaluate`` and ``weights``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from fastsrgan.console import error_line, table
from fastsrgan.errors import PartialFailure, UsageError
from fastsrgan.runtime import Progress, finite


def tile_edge(text: str) -> int | None:
    """``none`` or a number of voxels."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of voxels nor none") from error


def step_size(text: str) -> int | str:
    """``auto`` or a number of voxels."""
    if text.lower() == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of voxels nor auto") from error


def _in_units(text: str, units: dict[str, float], what: str) -> float:
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    try:
        return float(number) * units[unit]
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from error


def seconds(text: str) -> float:
    """``60``, ``60s``, ``2m`` or ``1h``."""
    return _in_units(text, {"": 1, "s": 1, "m": 60, "h": 3600}, "a time such as 60s, 2m or 1h")


def memory(text: str) -> int:
    """``8`` or ``8G`` for GiB, ``500M`` for MiB."""
    return int(_in_units(text, {"": 2**30, "g": 2**30, "m": 2**20}, "a size such as 8G or 500M"))


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


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands; ``command(name, run, text, example)`` makes an empty one."""
    p = command("infer", _infer, "super-resolve and segment images", "fastsrgan infer scan.nii.gz -o out --step 16")
    p.add_argument("inputs", nargs="+", metavar="INPUT", help="NIfTI files, DICOM folders, .txt / .csv lists")
    p.add_argument("-o", "--out", required=True, metavar="DIR", help="output folder")
    p.add_argument("-w", "--weights", metavar="FILE", help="Keras HDF5, safetensors or run folder (the shipped model)")
    p.add_argument("--patch", type=tile_edge, default=128, help="tile edge in voxels, or none: the whole image (128)")
    p.add_argument(
        "--step", type=step_size, default=30, help="voxels between tiles, or auto; smaller is better and slower (30)"
    )
    p.add_argument(
        "--budget", type=seconds, metavar="TIME", help="60s, 2m: the densest steps down to --step that fit this time"
    )
    p.add_argument(
        "--new-resolution",
        nargs="+",
        type=size,
        metavar="MM",
        help="one size, three, or same (default: isotropic at the finest)",
    )
    p.add_argument(
        "--geometry",
        default="physical",
        choices=("physical", "segsrgan"),
        help="exact in mm, or the original's numbers",
    )
    p.add_argument(
        "--window", default="constant", choices=("constant", "gaussian"), help="weights inside a tile (constant)"
    )
    p.add_argument("--batch", type=batch_size, default="auto", help="tiles per forward pass (auto)")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="(auto)")
    p.add_argument("--check-precision", action="store_true", help="report what the precision costs, on a few tiles")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    p.add_argument("--max-memory", type=memory, metavar="G", help="of the host, beside the image; more goes by slabs")
    p.add_argument("--mask", metavar="FILE", help="compute only where this image is above zero")
    p.add_argument("--crop-to-head", action="store_true", help="compute only in the box around what is not air")
    p.add_argument("--save-prob", action="store_true", help="also write the probability map")
    p.add_argument(
        "--series", metavar="N", help="which series of a DICOM folder: number, UID or part of its description"
    )
    p.add_argument("--volume", type=int, metavar="I", help="which volume of a 4-D image, from 0")
    p.add_argument("--max-voxels", type=float, default=2**31, metavar="N", help="refuse larger images")
    p.add_argument("--resume", action="store_true", help="skip what is finished")
    p.add_argument("--overwrite", action="store_true", help="replace existing results")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")

    example = "fastsrgan evaluate --sr out/a_sr.nii.gz --hr a.nii.gz --seg out/a_seg.nii.gz --label a_gm.nii.gz"
    p = command("evaluate", _evaluate, "compare results with the truth", example)
    for name in ("sr", "hr", "seg", "label", "mask", "baseline", "baseline-seg"):
        p.add_argument(f"--{name}", metavar="IMAGE")
    p.add_argument(
        "--table", metavar="CSV", help="columns SR_image, HR_image, optional Seg_image, Label_image, Mask_image"
    )
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to standard output")

    example = "fastsrgan weights import SegSRGAN_epoch_200 model.safetensors"
    p = command("weights", _weights, "look at, import and export weight files", example)
    p.add_argument("action", choices=("info", "import", "export"))
    p.add_argument("source", metavar="FILE")
    p.add_argument("target", nargs="?", metavar="OUT", help="safetensors (import) or Keras HDF5 (export)")
    p.add_argument("--overwrite", action="store_true")


def _infer(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan.infer_files import SomeFailed, infer_files
    from fastsrgan.runtime import tune_allocator

    tune_allocator()
    resolution = args.new_resolution
    if resolution is not None:
        if len(resolution) not in (1, 3):
            raise UsageError("--new-resolution", f"{len(resolution)} sizes", "one, three, or same")
        resolution = resolution[0] if len(resolution) == 1 else resolution
    if args.mask and args.crop_to_head:
        raise UsageError("--mask", "excludes --crop-to-head", "one of the two")
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
            budget=args.budget,
            mask="head" if args.crop_to_head else args.mask,
            max_memory=args.max_memory,
            precision_check=args.check_precision,
            save_prob=args.save_prob,
            overwrite=args.overwrite,
            resume=args.resume,
            series=args.series,
            volume=args.volume,
            max_voxels=int(args.max_voxels),
            progress=progress,
        )
    except SomeFailed as error:
        error_line(str(error))
        result, code = error.summary, error.exit_code
    if args.json:
        print_json(result)
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
            args.sr,
            args.hr,
            args.seg,
            args.label,
            mask=args.mask,
            baseline=args.baseline,
            baseline_seg=args.baseline_seg,
        )
        rows = figures(result)
    if args.json == "-":
        print_json(result)
        return 0
    if args.json:
        write_json(args.json, result)
    print(table(rows))
    failed = result.get("failed")
    if failed:
        raise PartialFailure(args.table, f"{len(failed)} rows could not be evaluated", "see the warnings")
    return 0


def figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of one pair as rows: region or segmentation, name, value, and the baseline's beside it."""
    base = result.get("baseline", {})
    rows = []
    groups = [(region, scores, base.get("image", {}).get(region, {})) for region, scores in result["image"].items()]
    groups.append(("segmentation", result.get("segmentation", {}), base.get("segmentation", {})))
    for where, scores, other in groups:
        rows += [{"where": where, "figure": k, "value": v, "baseline": other.get(k)} for k, v in scores.items()]
    return rows


def _weights(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan import weights

    if args.action == "info":
        print_json(weights.info(args.source))
        return 0
    if not args.target:
        raise UsageError("weights", f"{args.action} needs a target", f"fastsrgan weights {args.action} FILE OUT")
    action = weights.import_keras if args.action == "import" else weights.export_keras
    print(action(args.source, args.target, overwrite=args.overwrite))
    return 0


def print_json(value: Any) -> None:
    """Plain JSON on standard output."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False))
