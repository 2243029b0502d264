"""``fastsrgan train``: every option of the original's training script, and fastsrgan's own."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from fastsrgan import config as settings
from fastsrgan.cli.console import add_label_options
from fastsrgan.core.runtime import Progress, output_folder
from fastsrgan.core.startup import loading
from fastsrgan.errors import UsageError

log = logging.getLogger("fastsrgan")

# The original's option names (SEGSRGAN.md section 4) -> setting, type.
ORIGINAL: dict[str, tuple[tuple[str, ...], str, type]] = {
    "epochs": (("-e", "--epoch", "--epochs"), "last epoch", int),
    "batch_size": (("-b", "--batch-size"), "patches per update", int),
    "snapshot": (("-s", "--snapshot"), "epochs between snapshots", int),
    "init_epoch": (("-i", "--init-epoch"), "first epoch (epoch - init_epoch + 1 are run)", int),
    "kernel_gen": (("--kernel-gen",), "channels of the generator's first convolution", int),
    "kernel_dis": (("--kernel-dis",), "channels of the critic's first convolution", int),
    "lr_gen": (("--lrgen", "--lr-gen"), "learning rate of the generator", float),
    "lr_dis": (("--lrdis", "--lr-dis"), "learning rate of the critic", float),
    "lambda_rec": (("--lambrec", "--lambda-rec"), "weight of the reconstruction loss", float),
    "lambda_adv": (("--lambadv", "--lambda-adv"), "weight of the adversarial loss; 0 trains without a critic", float),
    "lambda_gp": (("--lambgp", "--lambda-gp"), "weight of the gradient penalty", float),
    "critic_iterations": (
        ("--number-of-disciminator-iteration", "--number-of-discriminator-iteration", "--critic-iterations"),
        "critic updates per generator update",
        int,
    ),
    "patch_size": (("-ps", "--patch-size"), "edge of the training patches", int),
    "contrast_max": (("-contrast-max", "--contrast-max"), "contrast power is uniform in [1 - c, 1 + c]", float),
    "noise": (("-percent-val-max", "--percent-val-max", "--noise"), "noise std over the LR maximum", float),
}
OWN: dict[str, tuple[tuple[str, ...], str, type]] = {
    "stride": (("--stride",), "grid spacing of the training patches", int),
    "steps_per_epoch": (("--steps-per-epoch",), "end each epoch after so many updates", int),
    "seed": (("--seed",), "seed of every random number", int),
    "ema": (("--ema",), "decay of an averaged generator, which is then validated and shipped; 0 off", float),
    "head_rate": (("--head-rate",), "learning rate of the generator's head over lrgen", float),
    "clip_norm": (("--clip-norm",), "largest gradient norm of the generator; 0 off", float),
    "warmup_epochs": (("--warmup-epochs",), "epochs before the adversarial term starts", int),
    "validate_every": (("--validate-every",), "epochs between validations", int),
    "keep_checkpoints": (("--keep-checkpoints",), "snapshots kept for --resume", int),
    "resident_subjects": (("--resident-subjects",), "subjects in memory at once", int),
    "resident_memory": (("--resident-memory",), "GB for the volumes in memory", float),
    "block_memory": (("--block-memory",), "GB above which a volume is degraded in blocks", float),
    "prefetch": (("--prefetch",), "groups of subjects made ahead", int),
    "feed_threads": (("--feed-threads",), "threads of the feed; 0 auto", int),
    "bias_field": (("--bias-field",), "largest log amplitude of a smooth bias field", float),
    "profile": (("--profile",), "relative spread of the slice profile's width", float),
    "profile_box": (("--profile-box",), "largest share of a box in the slice profile, the rest a Gaussian", float),
    "gap": (("--gap",), "largest gap between slices over their spacing", float),
    "motion": (("--motion",), "sd in mm and degrees of motion between slices", float),
    "flips": (("--flips",), "axes along which patches are mirrored at random, for example xy", str),
    "accumulate": (("--accumulate",), "micro-batches per update", int),
    "generator_chunk": (("--generator-chunk",), "patches per generator pass without gradients; 0 auto", int),
    "lr_warmup": (("--lr-warmup",), "updates of linear warm-up", int),
    "lr_end": (("--lr-end",), "last learning rate as a fraction of the first", float),
    "patience": (("--patience",), "validations without a better score before training stops; 0 off", int),
    "whole_every": (("--whole-every",), "epochs between validations on whole volumes; 0 off", int),
    "penalty_every": (("--penalty-every",), "critic updates between gradient penalties", int),
    "dice_weight": (("--dice-weight",), "weight of an added soft Dice term", float),
    "synthetic": (("--synthetic",), "share of the visits that show an image made of the subject's tissues", float),
    "structure": (("--structure",), "values of the tissues that are the label, for example 3,42", str),
    "tissue_means": (("--tissue-means",), "means of made images, VALUE:MEAN:SD,...; empty: any contrast", str),
    "synthetic_free": (("--synthetic-free",), "share of made images with a mean for each structure", float),
    "synthetic_invert": (("--synthetic-invert",), "share of made images with bright and dark exchanged", float),
    "synthetic_strip": (("--synthetic-strip",), "share of made heads that show the brain alone", float),
}
METAVARS = {"flips": "AXES", "structure": "VALUES", "tissue_means": "MEANS"}
CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "image_cropping_method": (("-icm", "--image-cropping-method"), "where patches are taken"),
    "reconstruction_loss": (("-rl", "--reconstruction-loss"), "reconstruction loss"),
    "slice_axis": (("--slice-axis",), "direction through the slices of -n; auto: as most subjects are stored"),
    "geometry": (("--geometry",), "observation model: exact in mm, or the original's numbers"),
    "interp": (("-int", "--interp"), "interpolation of the original's numbers; sitk implies --geometry segsrgan"),
    "interpolation_type": (("-it", "--interpolation-type"), "interpolator of --interp sitk"),
    "form": (("--form",), "network layers: exact fast forms or the plain ones"),
    "layer_forms": (("--layer-forms",), "fast forms on a CPU: timed for this machine, or the same everywhere"),
    "penalty": (("--penalty",), "critic update: by hand, with an explicit penalty graph, or double backward"),
    "feed": (("--feed",), "what moves volumes from the store"),
    "pool_precision": (("--pool-precision",), "type of the resident intensities"),
    "precision": (("--precision",), "arithmetic of the networks"),
    "layout": (("--layout",), "memory layout of the activations"),
    "compile": (("--compile",), "torch.compile and CUDA graphs"),
    "lr_schedule": (("--lr-schedule",), "learning rate over the run"),
    "best_by": (("--best-by",), "validation score that chooses best.safetensors"),
}
FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    "conditional": (("-is-conditional", "--is-conditional"), "resolution as a second input"),
    "residual": (("-is-residual", "--is-residual"), "output = input - head"),
    "fit_mask": (("-fm", "--fit-mask"), "also learn the classes of Mask_image"),
    "scaled": (("--scaled",), "SR head in units of the patch's in-plane gradient: intensity-equivariant"),
    "zero_head": (("--zero-head",), "start the SR head at zero: training starts at the spline"),
    "rician": (("--rician",), "Rician instead of Gaussian noise"),
    "joint_fakes": (("--joint-fakes",), "one generator pass for all critic updates of an iteration"),
    "tf32": (("--tf32",), "TF32 in float32 products of CUDA devices"),
    "auto_batch": (("--auto-batch",), "lower the batch size before the first update until it fits"),
    "tensorboard": (("--tensorboard",), "write RUN/tensorboard"),
}

EXAMPLE = """examples:
  fastsrgan train cohort.zarr -o run -n 1 1 3
  fastsrgan train cohort.csv -o run -n 0.5 0.5 2 -n 0.5 0.5 4 --batch-size 8 --epoch 50
  fastsrgan train cohort.zarr -o run --resume
  fastsrgan train -csv cohort.csv -sf snapshots -n 0.5 0.5 3 --u_net_generator True     # the original's options

A CSV has the columns HR_image, Label_image, Base (Train or Test) and, for masks, Mask_image, for maps of many
structures Tissue_image: a row with tissues needs neither image nor label (--structure)."""


def boolean(text: str) -> bool:
    """The original's booleans: True / False, also yes / no, 1 / 0."""
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Define the command."""
    p = commands.add_parser(
        "train",
        help="train a generator and critic",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("source", nargs="?", metavar="STORE|CSV", help="store of `fastsrgan convert`, or a table of files")
    p.add_argument("-csv", "--csv", metavar="CSV", help="table of files (the original's way to name the data)")
    p.add_argument("-o", "--out", metavar="RUN", help="run folder")
    p.add_argument(
        "-n",
        "--new-low-res",
        nargs=3,
        type=float,
        action="append",
        metavar=("X", "Y", "Z"),
        help="low-resolution mm; twice: bounds",
    )
    p.add_argument("--config", metavar="YAML", help="settings file; options on the command line win")
    p.add_argument("--preset", choices=sorted(settings.PRESETS), help="defaults of the paper or of its code")
    p.add_argument("-w", "--weights", metavar="FILE", help="start from these weights (Keras HDF5, safetensors, run)")
    p.add_argument("--resume", action="store_true", help="continue the run in RUN")
    p.add_argument(
        "--strict", action="store_true", help="stop at a subject that cannot be read instead of leaving it out"
    )
    add_label_options(p)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")
    group = p.add_argument_group("settings (defaults: the original code's)")
    defaults = settings.TrainConfig(new_low_res=((1, 1, 1),))
    for name, (flags, text, kind) in {**ORIGINAL, **OWN}.items():
        group.add_argument(
            *flags,
            dest=name,
            type=kind,
            metavar=METAVARS.get(name, {int: "N", float: "F"}.get(kind)),
            help=f"{text} ({getattr(defaults, name)})",
        )
    for name, (flags, text) in CHOICES.items():
        group.add_argument(
            *flags, dest=name, choices=settings.CHOICES[name], help=f"{text} ({getattr(defaults, name)})"
        )
    for name, (flags, text) in FLAGS.items():
        group.add_argument(
            *flags, dest=name, type=boolean, metavar="True|False", help=f"{text} ({getattr(defaults, name)})"
        )
    group.add_argument(
        "-u-net",
        "-u",
        "--u-net-generator",
        dest="u_net",
        type=boolean,
        metavar="True|False",
        help="train the U-Net variant (False)",
    )
    _add_original_files(p)
    p.set_defaults(run=run)


def _add_original_files(p: argparse.ArgumentParser) -> None:
    """What the original's scripts also give."""
    files = p.add_argument_group("files of the original")
    files.add_argument("-sf", "--snapshot-folder", metavar="DIR", help="also write SegSRGAN_epoch_N (Keras HDF5) here")
    files.add_argument("-dice", "--dice-file", metavar="CSV", help="Dice per epoch (RUN/dice.csv)")
    files.add_argument("-mse", "--mse-file", metavar="CSV", help="MSE per epoch (RUN/mse.csv)")
    files.add_argument(
        "-begining-path", "--base-path", dest="base_path", metavar="DIR", help="prefix of the paths in the CSV"
    )
    files.add_argument(
        "-folder-training-data", "--folder-training-data", metavar="DIR", help="accepted; nothing is written there"
    )
    files.add_argument(
        "-multi-gpu",
        "--multi-gpu",
        type=boolean,
        metavar="True|False",
        help="accepted; says how to start one process per GPU",
    )


def build_config(args: argparse.Namespace) -> settings.TrainConfig:
    """Settings from --config, then --preset, then the options that were given."""
    values: dict[str, Any] = {}
    if args.config:
        values = settings.read_yaml(args.config)
    elif args.resume and (Path(args.out or args.snapshot_folder or ".") / "config.yaml").is_file():
        values = settings.read_yaml(Path(args.out or args.snapshot_folder) / "config.yaml")
    if args.preset:
        values["preset"] = args.preset
    for name in [*ORIGINAL, *OWN, *CHOICES, *FLAGS]:
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    if args.u_net is not None:
        values["network"] = "unet" if args.u_net else "plain"
    if args.new_low_res:
        values["new_low_res"] = args.new_low_res
    if args.interp == "sitk" and "geometry" not in values:
        values["geometry"] = "segsrgan"
    given = bool(values.get("new_low_res"))
    # A misspelt setting is told first: it may be the one that is missing.
    config = settings.from_mapping(values if given else values | {"new_low_res": [1, 1, 1]}, args.config or "settings")
    if not given:
        raise UsageError("train", "no low resolution was given", "-n X Y Z in mm, for example -n 1 1 3")
    return config


def run(args: argparse.Namespace, progress: Progress) -> int:
    """Convert a CSV once if need be, then train."""
    source = args.source or args.csv
    if not source or (args.source and args.csv):
        raise UsageError("train", "one data source is needed", "STORE, CSV, or -csv CSV")
    if not (args.out or args.snapshot_folder):
        raise UsageError("train", "no run folder was given", "-o RUN (or -sf DIR as in the original)")
    config = build_config(args)
    if config.init_epoch > 1 and not args.weights and not args.resume:
        reason = f"{config.init_epoch} continues an earlier training, but no weights were given"
        raise UsageError("--init-epoch", reason, "-w FILE (or --resume)")
    with loading():
        from fastsrgan.core.ranks import launched, speaks
        from fastsrgan.train.run import train

    if args.folder_training_data:
        log.info("--folder_training_data is not needed: patches are made in memory, nothing is written")
    if not speaks():
        log.setLevel(logging.WARNING)
    if args.multi_gpu and not launched():
        log.info("--multi_gpu: one process per GPU trains, torchrun --nproc-per-node GPUS -m fastsrgan train ...")
    if str(source).lower().endswith((".csv", ".txt")):
        if launched():
            raise UsageError(
                source, "ranks share a store, not a table", "fastsrgan convert it first, then name the store"
            )
        source = convert_table(source, args, progress)
    result = train(
        source,
        run_folder(args, config),
        config,
        device=args.device,
        start_weights=args.weights,
        resume=args.resume,
        strict=args.strict,
        snapshot_folder=args.snapshot_folder,
        dice_file=args.dice_file,
        mse_file=args.mse_file,
        progress=progress,
    )
    if not speaks():
        return int(result["exit_code"])
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        dice = "" if result["best_dice"] is None else f", best Dice on the Test subjects {result['best_dice']:.4f}"
        print(f"{result['updates']} updates in {result['seconds']:.0f} s{dice}; weights: {result['weights']}")
        if result["stopped"]:
            print(f"stopped by signal {result['stopped']}; continue with --resume")
    return int(result["exit_code"])


def run_folder(args: argparse.Namespace, config: settings.TrainConfig) -> str:
    """-o RUN; without it -sf DIR, or, where DIR holds a run that init_epoch continues as in the original, a folder
    below it."""
    from fastsrgan.model import checkpoint

    if args.out or args.resume or config.init_epoch == 1 or not checkpoint.snapshots(Path(args.snapshot_folder)):
        return args.out or args.snapshot_folder
    folder = str(Path(args.snapshot_folder) / f"from_epoch_{config.init_epoch}")
    log.info("%s holds a run: this one, from its weights on, is kept in %s", args.snapshot_folder, folder)
    return folder


def convert_table(table: str, args: argparse.Namespace, progress: Progress) -> str:
    """RUN/data.zarr of a CSV, made once; a second call or --resume finds it while the table names the same files."""
    with loading():
        from fastsrgan.convert import convert
        from fastsrgan.store.reader import open_store

    store = output_folder(args.out or args.snapshot_folder) / "data.zarr"
    complete = store.exists() and open_store(store).complete
    if complete and files_in(store) == files_named(table, args.base_path, args.label_classes, args.label_names):
        log.info("%s holds the converted volumes of an earlier call", store)
        return str(store)
    if complete:
        log.info("%s names other files than before: converted anew", table)
    resume = store.exists() and not complete
    result = convert(
        table,
        store,
        resume=resume,
        overwrite=complete,
        base_path=args.base_path,
        label_classes=args.label_classes,
        label_names=args.label_names,
        progress=progress,
    )
    log.info("%s: %d subjects, %d converted", store, result["subjects"], result["converted"])
    return str(store)


def files_named(
    table: str, base_path: str | None, label_classes: str | None = None, label_names: str | None = None
) -> set[frozenset[str]]:
    """Split, files and label classes of each row of a table."""
    from fastsrgan.io.labels import structure
    from fastsrgan.io.tables import read_table

    found = set()
    for row in read_table(table, base_path=base_path):
        chosen = row.classes or label_classes
        classes = sorted(structure(chosen, row.label, label_names).values) if chosen and row.label else None
        files = (str(path) for path in (row.image, row.label, row.mask, row.tissues) if path)
        found.add(frozenset([row.base, f"classes {classes}", *files]))
    return found


def files_in(store: Path) -> set[frozenset[str]]:
    """Split and source files of each subject of a store, as ``files_named``."""
    from fastsrgan.store.reader import open_store

    subjects = open_store(store).subjects
    return {
        frozenset([s.split, f"classes {s.attrs.get('label_classes')}"])
        | {file["path"] for file in s.attrs.get("source", {}).values()}
        for s in subjects
    }
