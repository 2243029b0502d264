"""``fastsrgan infer`` and ``weights``."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import logging
import math
from collections.abc import Callable
from typing import Any

from fastsrgan.cli.console import error_line, say
from fastsrgan.core.files import finite
from fastsrgan.core.progress import Progress
from fastsrgan.errors import UsageError

PATIENCE = datetime.timedelta(days=7)  # of ranks that are done for those that are not
EXAMPLES = """fastsrgan infer scan.nii.gz -o out --step 16
  fastsrgan infer scans/ -o out --resume                             # a folder, as far as it is not done
  fastsrgan infer scan.nii.gz -o out -w a.safetensors -w b.safetensors --flips xyz --largest-component --png
  torchrun --nproc-per-node 8 -m fastsrgan infer list.txt -o out     # the images of a list over 8 GPUs"""


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
        value = float(number) * units[unit]
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from error
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def seconds(text: str) -> float:
    """``60``, ``60s``, ``2m`` or ``1h``."""
    return _in_units(text, {"": 1, "s": 1, "m": 60, "h": 3600}, "a time such as 60s, 2m or 1h")


def memory(text: str) -> int:
    """``8`` or ``8G`` for GiB, ``500M`` for MiB."""
    return int(_in_units(text, {"": 2**30, "g": 2**30, "m": 2**20}, "a size such as 8G or 500M"))


def voxels(text: str) -> int:
    """``1000`` or ``1e9``: how many, from 1 up."""
    try:
        number = int(float(text))
    except (ValueError, OverflowError):  # no number, NaN, infinite
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of voxels from 1 up")
    return number


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


def _add_outputs(p: argparse.ArgumentParser) -> None:
    """What is made of a prediction, and what becomes of results that are there."""
    p.add_argument(
        "--flips", default="none", metavar="AXES", help="mean over mirror images of each tile: x, xy, xyz, ... (none)"
    )
    p.add_argument("--threshold", type=float, default=0.5, help="probability that makes the segmentation (0.5)")
    p.add_argument("--largest-component", action="store_true", help="keep the segmentation's largest component alone")
    p.add_argument(
        "--min-size", type=float, default=0.0, metavar="MM3", help="leave out components of less cubic millimetres"
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "input"),
        help="of the SR image; input: rounded to the type and scaling of the image it was made of",
    )
    p.add_argument("--save-prob", action="store_true", help="also write the probability map")
    p.add_argument("--png", action="store_true", help="also draw image, SR and segmentation side by side")
    p.add_argument(
        "--split-volume", action="store_true", help="under torchrun: each image over all ranks, not one image for each"
    )
    p.add_argument(
        "--series", metavar="N", help="which series of a DICOM folder: number, UID or part of its description"
    )
    p.add_argument("--volume", type=int, metavar="I", help="which volume of a 4-D image, from 0")
    p.add_argument("--max-voxels", type=voxels, default=2**31, metavar="N", help="refuse larger images")
    p.add_argument("--resume", action="store_true", help="skip what is finished")
    p.add_argument("--overwrite", action="store_true", help="replace existing results")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands; ``command(name, run, text, example)`` makes an empty one."""
    p = command("infer", _infer, "super-resolve and segment images", EXAMPLES)
    p.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="NIfTI files, folders of them, DICOM folders, .txt / .csv lists"
    )
    p.add_argument("--bids", metavar="DIR", help="in place of INPUT: the T1w and T2w images of a BIDS dataset")
    p.add_argument("--participant-label", nargs="+", default=(), metavar="LABEL", help="of the dataset (all)")
    p.add_argument("--session-label", nargs="+", default=(), metavar="LABEL", help="of the dataset (all)")
    p.add_argument("--suffix", nargs="+", default=(), choices=("T1w", "T2w"), help="images of the dataset (both)")
    p.add_argument(
        "-o", "--out", required=True, metavar="DIR", help="output folder; with --bids the derivatives dataset"
    )
    p.add_argument(
        "-w",
        "--weights",
        action="append",
        metavar="FILE",
        help="Keras HDF5, safetensors or run folder (the shipped model); several times: their mean",
    )
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
    p.add_argument(
        "--compile",
        default="auto",
        choices=("auto", "on", "off"),
        help="the network by torch.compile, on CUDA as one graph (auto)",
    )
    p.add_argument("--check-precision", action="store_true", help="report what the precision costs, on a few tiles")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    p.add_argument("--max-memory", type=memory, metavar="G", help="of the host, beside the image; more goes by slabs")
    p.add_argument("--mask", metavar="FILE", help="compute only where this image is above zero")
    p.add_argument("--crop-to-head", action="store_true", help="compute only in the box around what is not air")
    _add_outputs(p)

    example = "fastsrgan weights import SegSRGAN_epoch_200 model.safetensors"
    p = command("weights", _weights, "look at, import and export weight files", example)
    p.add_argument("action", choices=("info", "import", "export"))
    p.add_argument("source", metavar="FILE")
    p.add_argument("target", nargs="?", metavar="OUT", help="safetensors (import) or Keras HDF5 (export)")
    p.add_argument("--overwrite", action="store_true")


def _refuse_pairs(args: argparse.Namespace) -> None:
    """Raise UsageError for options that contradict each other."""
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite", "exclude each other", "give one of them")
    if args.mask and args.crop_to_head:
        raise UsageError("--mask", "excludes --crop-to-head", "one of the two")


def _infer(args: argparse.Namespace, progress: Progress) -> int:
    import torch

    from fastsrgan.core.progress import QUIET
    from fastsrgan.core.ranks import from_environment, local_device, speaks
    from fastsrgan.core.system import tune_allocator
    from fastsrgan.infer.files import SomeFailed

    tune_allocator()
    if not speaks():
        logging.getLogger("fastsrgan").setLevel(logging.ERROR)
        progress = QUIET
    resolution = args.new_resolution
    if resolution is not None:
        if len(resolution) not in (1, 3):
            raise UsageError("--new-resolution", f"{len(resolution)} sizes", "one, three, or same")
        resolution = resolution[0] if len(resolution) == 1 else resolution
    _refuse_pairs(args)
    run, source = _source(args)
    code = 0
    try:
        # Ranks tell each other about the images; their devices do not talk.
        with from_environment(torch.device("cpu"), PATIENCE) as ranks:
            result = run(
                source,
                args.out,
                args.weights,
                patch=args.patch,
                step=args.step,
                new_resolution=resolution,
                device=local_device(args.device),
                geometry=args.geometry,
                window=args.window,
                batch=args.batch,
                precision=args.precision,
                compile=args.compile,
                budget=args.budget,
                mask="head" if args.crop_to_head else args.mask,
                max_memory=args.max_memory,
                precision_check=args.check_precision,
                flips=args.flips,
                threshold=args.threshold,
                largest_component=args.largest_component,
                min_size=args.min_size,
                dtype=args.dtype,
                save_prob=args.save_prob,
                png=args.png,
                overwrite=args.overwrite,
                resume=args.resume,
                series=args.series,
                volume=args.volume,
                max_voxels=args.max_voxels,
                ranks=ranks,
                split_volume=args.split_volume,
                progress=progress,
            )
    except SomeFailed as error:
        if speaks():
            error_line(str(error))
        result, code = error.summary, error.exit_code
    if not speaks():
        return code
    if args.json:
        print_json(result)
    else:
        for item in result["items"]:
            outputs = "  ".join(str(p) for p in (item.get("outputs") or {}).values())
            say(f"{item['status']:8}{item['input']}  {outputs or item.get('error', '')}".rstrip())
    return code


def _source(args: argparse.Namespace) -> tuple[Callable[..., dict[str, Any]], Any]:
    """The function that does what was asked, and its first argument: images, or the root of a dataset."""
    if args.bids and args.inputs:
        raise UsageError("--bids", f"and {args.inputs[0]}", "one of the two")
    if args.bids:
        from fastsrgan.infer.bids import SUFFIXES, infer_bids

        chosen = {"participants": args.participant_label, "sessions": args.session_label}
        return functools.partial(infer_bids, **chosen, suffixes=args.suffix or SUFFIXES), args.bids
    if args.participant_label or args.session_label or args.suffix:
        raise UsageError("infer", "participants, sessions and suffixes are of a dataset", "--bids DIR")
    if not args.inputs:
        raise UsageError("infer", "no image given", "NIfTI files, folders of them, or --bids DIR")
    from fastsrgan.infer.files import infer_files

    return infer_files, args.inputs


def _weights(args: argparse.Namespace, progress: Progress) -> int:
    from fastsrgan.model import weights

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
