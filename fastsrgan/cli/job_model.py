"""``fastsrgan job-model``: the original's application script, option by option."""

from __future__ import annotations

import argparse
from typing import Any

from fastsrgan.cli.console import HelpFormatter, Need, boolean, error_line, print_json, say, typed
from fastsrgan.config import CHOICES
from fastsrgan.core.progress import Progress
from fastsrgan.core.signals import loading
from fastsrgan.core.system import tune_allocator
from fastsrgan.errors import UsageError
from fastsrgan.infer.settings import add_options

NEEDS = (Need("interpolation_type", lambda a: a.interp == "sitk", "is of --interp sitk", refused=False),)
EXAMPLE = """examples:
  fastsrgan job-model --path list.csv --patch 128 --step 64 --result_folder_name mine --weights_path SegSRGAN_epoch_200
  fastsrgan job-model --path list.csv --patch "64,128" --step "32 64,64 128" --result_folder_name mine \\
      --weights_path SegSRGAN_epoch_200 --new_low_res 0.5,0.5,0.5

The CSV has no header; its first column names image files of any format that infer reads, or DICOM folders. Results are
put beside each image: Result_with_mine/patch_128_step_64/{SR,Cortex}_patch_128_step_64.nii.gz, of a model with a mask
Mask_patch_128_step_64.nii.gz too. The first image of a folder gets these names, others have their own name put behind.
--patch None takes the whole image at once."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Define the command."""
    text = "apply a model as SegSRGAN's job_model.py does: its options, files and numbers"
    p = commands.add_parser("job-model", help=text, description=text, epilog=EXAMPLE, formatter_class=HelpFormatter)
    p.add_argument("-p", "--path", required=True, metavar="CSV", help="list of images, no header, first column")
    p.add_argument("-dp", "--debut-path", default="", metavar="BASE", help="put before the CSV's path and its entries")
    # The original's README writes the steps without quotes: several words are put together again.
    text = 'tile edges, "64,128"; None: the whole image (128)'
    p.add_argument("-pa", "--patch", nargs="+", default=["128"], metavar="P", help=text)
    p.add_argument("-s", "--step", nargs="+", default=["64"], metavar="S", help='steps of each, "32 64,64 128" (64)')
    p.add_argument("-rf", "--result-folder-name", required=True, metavar="NAME", help="results go to Result_with_NAME")
    p.add_argument("-wp", "--weights-path", metavar="FILE", help="Keras HDF5, safetensors or run (adult)")
    text = "several tiles at once, as memory takes, or one after the other (what is faster)"
    p.add_argument("-bb", "--by-batch", type=boolean, metavar="True|False", help=text)
    text = "mm of the results, near to that with -int sitk (0.5,0.5,0.5)"
    p.add_argument("-n", "--new-low-res", default="0.5,0.5,0.5", metavar="X,Y,Z", help=text)
    p.add_argument("-int", "--interp", choices=CHOICES["interp"], default="scipy", help="interpolation (scipy)")
    kinds = CHOICES["interpolation_type"]
    text = f"interpolator of --interp sitk, one of {', '.join(kinds)} (Spline)"
    p.add_argument("-it", "--interpolation-type", choices=kinds, default="Spline", metavar="KIND", help=text)
    own = p.add_argument_group("fastsrgan's own")
    text = "exact in mm, or the original's numbers (segsrgan)"
    own.add_argument("--geometry", choices=CHOICES["geometry"], default="segsrgan", help=text)
    text = "series of the DICOM folders: number, UID or part of its description"
    own.add_argument("--series", metavar="N", help=text)
    add_options(own, "device")
    text = "arithmetic of the networks (fp32)"
    own.add_argument("--precision", default="fp32", choices=CHOICES["precision"], help=text)
    own.add_argument("--overwrite", action="store_true", help="make anew what is there")
    own.add_argument("--json", action="store_true", help="print the summary as JSON")
    p.set_defaults(run=run, needs=NEEDS)


def resolution(text: str) -> tuple[float, ...]:
    """``"0.5,0.5,0.5"`` -> three numbers. Raises UsageError."""
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise UsageError("--new-low-res", f"{text!r} is not allowed", "three sizes in mm, 0.5,0.5,0.5")
    return values


def patches(text: str) -> list[int | None]:
    """``"64,128"`` -> [64, 128]; ``None`` stands for the whole image. Raises UsageError."""
    return [None if word.strip().lower() == "none" else _whole("--patch", word) for word in text.split(",")]


def steps(text: str) -> list[list[int]]:
    """``"32 64,64 128"`` -> [[32, 64], [64, 128]]: the steps of each patch size. Raises UsageError."""
    groups = [[_whole("--step", word) for word in group.split()] for group in text.split(",")]
    if not all(groups):
        raise UsageError("--step", f"{text!r} is not allowed", 'steps for each patch size, "32 64,64 128"')
    return groups


def _whole(option: str, word: str) -> int:
    try:
        return int(word)
    except ValueError:
        hint = '"64,128" or None' if option == "--patch" else '"32 64,64 128"'
        raise UsageError(option, f"{word.strip()!r} is no whole number", hint) from None


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``job.job_model`` that a command line stands for. Raises UsageError."""
    same = "weights_path result_folder_name by_batch interp interpolation_type geometry series device precision"
    tiles = {"patch": patches(" ".join(args.patch)), "step": steps(" ".join(args.step))}  # which the shell cut apart
    told = {"table": args.path, "base_path": args.debut_path, "new_resolution": resolution(args.new_low_res)}
    return {**told, **tiles, **typed(args, f"{same} overwrite")}


def run(args: argparse.Namespace, progress: Progress) -> int:
    """Process the list and say what became of each result."""
    options = arguments(args)
    with loading():
        from fastsrgan.compat import job_model as job

    tune_allocator()
    code = 0
    try:
        result = job.job_model(**options, progress=progress)
    except job.SomeFailed as error:
        error_line(str(error))
        result, code = error.summary, error.exit_code
    if args.json:
        print_json(result)
        return code
    for item in result["items"]:
        told = "  ".join(str(p) for p in (item.get("outputs") or {}).values()) or item.get("error", "")
        size = "whole image" if item["patch"] is None else f"patch {item['patch']} step {item['step']}"
        say(f"{item['status']:8}{item['input']}  {size}  {told}".rstrip())
    return code
