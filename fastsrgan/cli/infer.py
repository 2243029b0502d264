"""``fastsrgan infer`` and ``weights``."""

from __future__ import annotations

import argparse
import datetime
import functools
import logging
from collections.abc import Callable
from typing import Any

from fastsrgan.cli.console import Need, add_checkpoint_option, chosen_weights, error_line, print_json, say, typed
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.signals import loading
from fastsrgan.core.system import tune_allocator
from fastsrgan.errors import MissingError, UsageError, one_line
from fastsrgan.infer.settings import InferSettings, add_options, basic_options, given_options

PATIENCE = datetime.timedelta(days=7)  # of ranks that are done for those that are not
EXAMPLES = """fastsrgan infer scan.nii.gz -o out --step 16
  fastsrgan infer scans/ -o out --resume                             # a folder, as far as it is not done
  fastsrgan infer scan.nii.gz -o out -w a.safetensors -w b.safetensors --flips x --largest-component --png
  torchrun --nproc-per-node 8 -m fastsrgan infer list.txt -o out     # the images of a list over 8 GPUs"""

NEEDS = (
    Need("outside", lambda a: a.mask, "is what lies outside --mask, and none is given", "--mask FILE"),
    Need("step budget", lambda a: a.patch is not None, "has no use with --patch none, the whole image in one tile"),
    Need("series", lambda a: not a.bids, "is of a DICOM folder, and a BIDS dataset holds none"),
)
WEIGHTS_NEEDS = (Need("target overwrite", lambda a: a.action != "info", "has no use: info writes nothing"),)


def add_parsers(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the commands; ``command(name, run, text, example)`` makes an empty one."""
    p = command("infer", _infer, "super-resolve and segment images", EXAMPLES)
    p.usage = "%(prog)s INPUT [INPUT ...] -o DIR [options]\n       %(prog)s --bids DATASET -o DIR [options]"
    text = "image files (NIfTI, MGH, NRRD, MetaImage), folders of them, DICOM, .txt, .csv or .tsv lists"
    p.add_argument("inputs", nargs="*", metavar="INPUT", help=text)
    text = "output folder; with --bids the derivatives dataset"
    p.add_argument("-o", "--out", required=True, metavar="DIR", help=text)
    text = (
        "auto (the default: adult or perinatal, by the size of each scan's head), adult (cortical grey "
        "matter of adult heads), perinatal (cortical grey matter of T2-like brains about birth), Keras HDF5, "
        "safetensors or run folder; several times: their mean"
    )
    p.add_argument("-w", "--weights", action="append", metavar="FILE", help=text)
    add_checkpoint_option(p)
    p.add_argument("--resume", action="store_true", help="skip what is finished")
    p.add_argument("--overwrite", action="store_true", help="replace existing results")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")
    for basic, title in ((True, "basic options"), (False, "advanced options (docs/inference.md)")):
        add_options(p.add_argument_group(title), *basic_options(basic))
    _add_bids(p.add_argument_group("images of a BIDS dataset"))
    p.set_defaults(needs=NEEDS)

    example = (
        "fastsrgan weights info perinatal\n"
        "  fastsrgan weights import SegSRGAN_epoch_200 model.safetensors\n"
        "  fastsrgan weights export run SegSRGAN_epoch_200"
    )
    p = command("weights", _weights, "look at, import and export weight files", example)
    text = (
        "info: what a file says of itself; import: the original's to safetensors; export: to "
        "the original's, but for networks with a scaled head (--scaled, --preset recommended, the shipped models)"
    )
    p.add_argument("action", choices=("info", "import", "export"), help=text)
    p.add_argument("source", metavar="FILE", help="adult, perinatal, Keras HDF5, safetensors or run folder")
    p.add_argument("target", nargs="?", metavar="OUT", help="safetensors (import) or Keras HDF5 (export)")
    add_checkpoint_option(p)
    p.add_argument("--overwrite", action="store_true", help="replace OUT")
    p.set_defaults(needs=WEIGHTS_NEEDS)


def _add_bids(p: argparse._ArgumentGroup) -> None:
    """What names the images of a dataset."""
    p.add_argument("--bids", metavar="DIR", help="in place of INPUT: images of a BIDS dataset, see --suffix")
    p.add_argument("--participant-label", nargs="+", default=(), metavar="LABEL", help="of the dataset (all)")
    p.add_argument("--session-label", nargs="+", default=(), metavar="LABEL", help="of the dataset (all)")
    text = "kinds of images of the dataset (T1w T2w FLAIR PDw UNIT1 T2starw T2star)"
    p.add_argument("--suffix", nargs="+", default=(), metavar="SUFFIX", help=text)
    text = "images of the dataset with this desc, such as preproc (without one)"
    p.add_argument("--desc", metavar="LABEL", help=text)


def _refuse_pairs(args: argparse.Namespace) -> None:
    """Raise UsageError for options that contradict each other."""
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite", "exclude each other", "give one of them")
    if args.bids and args.inputs:
        raise UsageError("--bids", f"excludes {args.inputs[0]}", "one of the two")
    if not args.bids and (args.participant_label or args.session_label or args.suffix or args.desc):
        raise UsageError("infer", "participants, sessions, suffixes and desc are of a dataset", "--bids DIR")
    if not args.bids and not args.inputs:
        raise MissingError("infer", "no image given", "image files, folders of them, DICOM, a list, or --bids DIR")


def _infer(args: argparse.Namespace, progress: Progress) -> int:
    options = given_options(args)
    InferSettings.of(options)  # what cannot be is said before anything is loaded
    _refuse_pairs(args)
    chosen = chosen_weights(args.weights, args.checkpoint)
    with loading():
        import torch

        from fastsrgan.core.ranks import from_environment, local_device, speaks
        from fastsrgan.infer.files import SomeFailed

    tune_allocator()
    if not speaks():
        logging.getLogger("fastsrgan").setLevel(logging.ERROR)
        progress = QUIET
    run, source = _source(args)
    code = 0
    try:
        # Ranks tell each other about the images; their devices do not talk.
        with from_environment(torch.device("cpu"), PATIENCE) as ranks:
            options |= typed(args, "overwrite resume") | {"device": local_device(args.device)}
            result = run(source, args.out, chosen, ranks=ranks, progress=progress, **options)
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
            light = item["plausibility"]["light"] if "plausibility" in item else ""
            text = outputs or (item.get("error") or item.get("reason", "")).removeprefix(f"{one_line(item['input'])}: ")
            say("  ".join(part for part in (f"{item['status']:7} {item['input']}", light, text) if part))
    if 0 < result["unneeded"] == len(result["items"]):
        # the reason of a single image; of several each has been named by a warning
        alone = result["items"][0]["reason"] if result["unneeded"] == 1 else ""
        reason = f"all {result['unneeded']} images have equal voxels along all axes: nothing was done"
        error_line(alone or str(UsageError("infer", reason, "--new-resolution same, or --new-resolution MM")))
        return UsageError.exit_code
    return code


def _source(args: argparse.Namespace) -> tuple[Callable[..., dict[str, Any]], Any]:
    """The function that does what was asked, and its first argument: images, or the root of a dataset."""
    if args.bids:
        with loading():
            from fastsrgan.infer.bids import infer_bids
            from fastsrgan.io.bids import SUFFIXES

        chosen = {"participants": args.participant_label, "sessions": args.session_label, "desc": args.desc}
        return functools.partial(infer_bids, **chosen, suffixes=args.suffix or SUFFIXES), args.bids
    from fastsrgan.infer.files import infer_files

    return infer_files, args.inputs


def _weights(args: argparse.Namespace, progress: Progress) -> int:
    if args.action != "info" and not args.target:
        raise UsageError("weights", f"{args.action} needs a target", f"fastsrgan weights {args.action} FILE OUT")
    with loading():
        from fastsrgan.model import weights

    (args.source,) = chosen_weights([args.source], args.checkpoint) or [args.source]
    if args.action == "info":
        print_json(weights.info(args.source))
        return 0
    action = weights.import_keras if args.action == "import" else weights.export_keras
    print(action(args.source, args.target, overwrite=args.overwrite))
    return 0
