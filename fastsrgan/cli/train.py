"""``fastsrgan train``: every option of the original's training script, and fastsrgan's own."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsrgan import config as settings
from fastsrgan.cli.console import (
    HelpFormatter,
    Need,
    add_checkpoint_option,
    add_label_options,
    boolean,
    chosen_weights,
    say,
    typed,
)
from fastsrgan.core.files import output_folder
from fastsrgan.core.progress import Progress
from fastsrgan.core.signals import loading, named
from fastsrgan.errors import (
    FastsrganError,
    InputError,
    MissingError,
    ModelError,
    PartialFailure,
    SettingsError,
    UsageError,
    counted,
)
from fastsrgan.infer.settings import add_options

if TYPE_CHECKING:
    from fastsrgan.io.tables import TableRow

log = logging.getLogger("fastsrgan")

EXAMPLE = """examples:
  fastsrgan train cohort.zarr -o run -n 1 1 3 --preset recommended
  fastsrgan train cohort.zarr -o tuned -w perinatal -n 0.8 0.8 3 -n 0.8 0.8 5    # go on from weights
  fastsrgan train cohort.csv -o run -n 0.5 0.5 2 -n 0.5 0.5 4 --batch-size 8 --epoch 50
  fastsrgan train cohort.zarr -o run --resume
  fastsrgan train -csv cohort.csv -sf snapshots -n 0.5 0.5 3 --u_net_generator True     # the original's options

A CSV has the columns HR_image, Label_image, Base (Train or Test) and, for masks, Mask_image, for maps of many
structures Tissue_image: a row with tissues needs neither image nor label (--structure)."""


def is_table(source: str) -> bool:
    """Whether the data are a table of files, by the ending of its name."""
    return source.lower().endswith((".csv", ".tsv", ".txt"))


NONE = "none"  # typed for no value, which is None or an empty text
UNET = settings.CHOICES["network"]  # the first two are the original's, without and with
NEEDS = (
    Need("base_path", lambda a: is_table(a.source or a.csv or ".csv"), "is of a table, a store has no paths"),
    Need("u_net", lambda a: (a.network or UNET[a.u_net]) == UNET[a.u_net], "contradicts --network", "one of the two"),
    Need(
        "tissue_means synthetic_free synthetic_invert synthetic_strip",
        lambda a: a.structure or a.config or a.resume,
        "is of images that are made of tissues, and no --structure is given",
        "--structure 3,42",
    ),
    Need(
        "interpolation_type", lambda a: a.interp == "sitk" or a.config or a.resume, "is of --interp sitk", refused=False
    ),
    Need("zero_head", lambda a: not (a.weights and a.zero_head) or a.resume, "is for a run without -w", refused=False),
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Define the command."""
    p = commands.add_parser(
        "train",
        help="train a generator and critic",
        description="train a generator and critic on a store or table; what a run writes and says: docs/training.md",
        usage="%(prog)s STORE|CSV -o RUN -n X Y Z [-n X Y Z] [options]",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    text = "store of `fastsrgan convert`, or a table of files, .csv, .tsv or .txt"
    p.add_argument("source", nargs="?", metavar="STORE|CSV", help=text)
    p.add_argument("-csv", "--csv", metavar="CSV", help="table of files (the original's way to name the data)")
    p.add_argument("-o", "--out", metavar="RUN", help="run folder (the one of -sf)")
    p.add_argument("--config", metavar="YAML", help="settings file; options on the command line win")
    text = (
        "start from these weights: adult, perinatal, Keras HDF5, safetensors or run folder; the options of the "
        "network are then theirs"
    )
    p.add_argument("-w", "--weights", metavar="FILE", help=text)
    add_checkpoint_option(p)
    p.add_argument("--resume", action="store_true", help="continue the run in RUN")
    text = "stop at a subject that cannot be read instead of leaving it out"
    p.add_argument("--strict", action="store_true", help=text)
    add_label_options(p, "are learned together, with a Dice each", "--label", of="of a table's label maps")
    add_options(p, "device")
    p.add_argument("--json", action="store_true", help="print the summary as JSON")
    for group in (settings.BASIC, settings.ADVANCED):
        text = "defaults: the original code's but for --geometry, unless --preset says others"
        options = p.add_argument_group(f"{group} settings", text)
        for row in settings.SETTINGS.values():
            if row.group == group:
                add_setting(options, row)
    add_original(p)
    p.set_defaults(run=run, needs=NEEDS)


def add_setting(group: argparse._ArgumentGroup, row: settings.Setting) -> None:
    """The option of a setting; its value is None where it is not given."""
    form: dict[str, Any] = {"type": parser_of(row), "metavar": row.metavar or {int: "N", float: "F"}.get(row.kind)}
    if row.choices:
        form = {"choices": row.choices}
    elif row.kind is bool:
        form = {"type": boolean, "metavar": "True|False"}
    elif row.kind is tuple:
        form = {"type": float, "nargs": 3, "action": "append", "metavar": ("X", "Y", "Z")}
    default = "" if row.default == () else f" ({NONE if row.default == '' else row.text(row.default)})"
    group.add_argument(*row.flags, dest=row.name, help=f"{row.help}{default}".replace("%", "%%"), **form)


def parser_of(row: settings.Setting) -> Callable[[str], Any]:
    """A word of the command line -> a value of a setting; ``none`` stands where the setting may have none."""

    def parse(word: str) -> Any:
        return NONE if word.lower() == NONE and (row.optional or row.default == "") else row.kind(word)

    parse.__name__ = row.kind.__name__  # for argparse, which tells it
    return parse


def add_original(p: argparse.ArgumentParser) -> None:
    """What the original's script also takes."""
    group = p.add_argument_group("options of the original")
    text = "train the U-Net variant: --network unet (False)"
    group.add_argument("-u-net", "-u", "--u-net-generator", dest="u_net", type=boolean, metavar="True|False", help=text)
    text = "also write SegSRGAN_epoch_N (Keras HDF5) here; not with --scaled True, as in --preset recommended"
    group.add_argument("-sf", "--snapshot-folder", metavar="DIR", help=text)
    group.add_argument("-dice", "--dice-file", metavar="CSV", help="Dice per epoch (RUN/dice.csv)")
    group.add_argument("-mse", "--mse-file", metavar="CSV", help="MSE per epoch (RUN/mse.csv)")
    text = "prefix of the paths in the CSV"
    group.add_argument("-begining-path", "--base-path", dest="base_path", metavar="DIR", help=text)
    text = "accepted; nothing is written there"
    group.add_argument("-folder-training-data", "--folder-training-data", metavar="DIR", help=text)
    text = "accepted; says how to start one process per GPU"
    group.add_argument("-multi-gpu", "--multi-gpu", type=boolean, metavar="True|False", help=text)


def build_config(args: argparse.Namespace) -> settings.TrainConfig:
    """Settings from --config, then --preset, then the options that were given."""
    file = args.config
    if not file and args.resume and (kept := Path(args.out or args.snapshot_folder or ".") / "config.yaml").is_file():
        file = str(kept)
    values = settings.read_yaml(file) if file else {}
    if file != args.config and args.preset not in (None, values.get("preset", "code")):
        reason = "a run that is resumed has a value for every setting"
        raise UsageError("--preset", reason, "give the settings that are to change, or begin another run")
    if args.u_net is not None:
        values["network"] = UNET[args.u_net]
    typed = {name: getattr(args, name) for name in settings.SETTINGS if getattr(args, name) is not None}
    empty = {name: None if row.optional else "" for name, row in settings.SETTINGS.items() if not row.choices}
    typed |= {name: empty[name] for name, value in typed.items() if value == NONE and name in empty}
    read = set(values) - set(typed)
    values |= typed
    if args.interp == "sitk" and "geometry" not in values:
        values["geometry"] = "segsrgan"
    if args.label_classes and len(args.label_classes) > 1:
        values.setdefault("fit_mask", True)
    given = bool(values.get("new_low_res"))
    # A misspelt setting is told first: it may be the one that is missing.
    try:
        made = values if given else values | {"new_low_res": [1, 1, 1]}
        config = settings.from_mapping(made, file or "settings")
    except SettingsError as error:
        if any(name in read or name not in settings.SETTINGS for name, _, _ in error.faults):
            raise
        flags = [(settings.SETTINGS[name].flags[-1], reason, typed_hint(hint)) for name, reason, hint in error.faults]
        several = SettingsError("train", flags)
        told = flags[0] if len(flags) == 1 else (several.what, several.reason, several.hint)
        raise UsageError(*told) from error
    if not given and args.resume:
        reason = "no snapshot in this folder"
        raise ModelError(args.out or args.snapshot_folder, reason, "leave --resume out to begin a run")
    if not given:
        raise UsageError("train", "no low resolution was given", "-n X Y Z in mm, for example -n 1 1 3")
    if args.weights and not args.resume:
        return settings.from_mapping(values | network_of(args.weights, values), file or "settings")
    return config


def typed_hint(hint: str) -> str:
    """A hint as the command line takes it: "structure: 3,42" of a settings file is ``--structure 3,42``."""
    return re.sub(
        r"\b(\w+): (?=\S)",
        lambda m: f"{settings.SETTINGS[m[1]].flags[-1]} " if m[1] in settings.SETTINGS else m[0],
        hint,
    )


def network_of(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the network that a weights file holds. Raises ModelError where another one is asked for."""
    with loading():
        from fastsrgan.model.weights import read_spec
        from fastsrgan.train.gan import settings_of

    spec, critic = read_spec(path)
    held = settings_of(spec)
    others = [name for name, value in held.items() if given.get(name, value) != value]
    if others:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        both = [f"{name} {held[name]}, and --{name.replace('_', '-')} {given[name]}" for name in others]
        asked = "; ".join(f"{text} is asked for" for text in both)
        raise ModelError(path, f"its network has {asked}", f"leave {options} out, or begin without these weights")
    log.info("%s: the network is that of the weights: %s", path, ", ".join(f"{k} {v}" for k, v in held.items()))
    return held | {name: value for name, value in settings_of(critic).items() if name not in given}


def run(args: argparse.Namespace, progress: Progress) -> int:
    """Convert a CSV once if need be, then train."""
    source = args.source or args.csv
    if not source or (args.source and args.csv):
        raise MissingError("train", "one data source is needed", "STORE, CSV, or -csv CSV")
    if not (args.out or args.snapshot_folder):
        raise UsageError("train", "no run folder was given", "-o RUN (or -sf DIR as in the original)")
    if not is_table(source):
        with loading():
            from fastsrgan.io.labels import refuse_for_store

        refuse_for_store(args.label_classes, args.label_names)
    for chosen in chosen_weights([args.weights] if args.weights else None, args.checkpoint) or ():
        args.weights = chosen
    config = build_config(args)
    if config.continues and not args.weights and not args.resume:
        reason = "above 1 continues an earlier training, but no weights were given"
        raise UsageError("--init-epoch", reason, "-w FILE (or --resume)")
    with loading():
        from fastsrgan.core.ranks import launched, speaks
        from fastsrgan.train.loop import BEST_BY
        from fastsrgan.train.run import check_places, refuse_run, train

    if args.folder_training_data:
        log.info("--folder_training_data is not needed: patches are made in memory, nothing is written")
    if not speaks():
        log.setLevel(logging.WARNING)
    if args.multi_gpu and not launched():
        log.info("--multi_gpu: one process per GPU trains, torchrun --nproc-per-node GPUS -m fastsrgan train ...")
    folder = run_folder(args, config)
    read = [path for path in (source, args.config, args.label_names, not args.resume and args.weights) if path]
    check_places(folder, config, read, args.snapshot_folder, args.dice_file, args.mse_file, resume=args.resume)
    if is_table(source):
        if launched():
            reason = "ranks share a store, not a table"
            raise UsageError(source, reason, "fastsrgan convert it first, then name the store")
        if not args.resume:
            refuse_run(folder)  # its data would be replaced
        source = convert_table(source, args, folder, progress)
    given = typed(args, "device resume strict snapshot_folder dice_file mse_file")
    result = train(source, folder, config, start_weights=args.weights, progress=progress, **given)
    if not speaks():
        return int(result["exit_code"])
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        none = "no weights before the first epoch's end"
        lines = [f"last weights: {result['weights']}" if result["weights"] else none]
        if result["best_epoch"] is not None:
            facts = {"score": result["best"], "dice": result["best_dice"], "named": result["dice_is"]}
            value = BEST_BY[result["best_by"]].format(**facts)
            lines.append(f"best: epoch {result['best_epoch']}, {value} on the Test subjects")
            lines.append(f"best weights: {result['best_weights']}")
        done = result["updates"] - (result["resumed_at"] or 0)
        some = "" if result["resumed_at"] is None else f"{done} of "
        for line in [f"{some}{counted(result['updates'], 'update')} in {result['seconds']:.0f} s", *lines]:
            say(line)
        if result["stopped"]:
            print(f"stopped by {named(result['stopped'])}; continue with --resume")
    return int(result["exit_code"])


def run_folder(args: argparse.Namespace, config: settings.TrainConfig) -> str:
    """-o RUN; without it -sf DIR, or, where DIR holds a run that init_epoch continues as in the original, a folder
    below it."""
    from fastsrgan.model import checkpoint

    if args.out or args.resume or not config.continues or not checkpoint.snapshots(Path(args.snapshot_folder)):
        return args.out or args.snapshot_folder
    folder = str(Path(args.snapshot_folder) / config.continues)
    log.info("%s holds a run: this one, from its weights on, is kept in %s", args.snapshot_folder, folder)
    return folder


def convert_table(table: str, args: argparse.Namespace, folder: str, progress: Progress) -> str:
    """RUN/data.zarr of a CSV, made once; a second call or --resume finds it while the table names the same files.

    The one of -sf DIR serves every run below it. A run that is resumed keeps its choice of label classes: UsageError
    where another one is given.
    """
    with loading():
        from fastsrgan.convert import convert
        from fastsrgan.io.tables import read_table
        from fastsrgan.model.checkpoint import snapshots
        from fastsrgan.store.files import MANIFEST
        from fastsrgan.store.reader import open_store

    choice, names = args.label_classes, args.label_names
    store = output_folder(args.out or args.snapshot_folder) / "data.zarr"
    # Before its manifest there is nothing to read: `convert` goes on, or says which process writes it.
    complete = (store / MANIFEST).exists() and open_store(store).complete
    if complete:
        held = files_in(store)
        if args.resume and not choice:
            choice, names = choice_kept(table, args.base_path, held), None
        asked = files_named(table, args.base_path, choice, names)
        if held == asked:
            log.info("%s holds the converted volumes of an earlier call", store)
            return str(store)
        if args.resume and any(held.get(files, classes) != classes for files, classes in asked.items()):
            reason = "other label classes than those of the run that is resumed"
            raise UsageError("--label", reason, "leave --label out, or begin a run in another folder")
        if Path(folder) != store.parent and snapshots(store.parent):
            store, complete = output_folder(folder) / "data.zarr", False  # the other is that of a run
        else:
            log.info("%s names other files or label classes than before: converted anew", table)
    if not any(row.base == "Train" for row in read_table(table, base_path=args.base_path)):
        raise InputError(table, "has no Train subjects", "give rows with Base = Train")
    resume = store.exists() and not complete
    given: dict[str, Any] = {"base_path": args.base_path, "label_classes": choice, "label_names": names}
    given |= {"resume": resume, "overwrite": complete, "binary": True}
    try:
        result = convert(table, store, progress=progress, **given)
    except PartialFailure as error:  # nothing of a run is there yet that --resume could go on with
        raise PartialFailure(error.what, error.reason, "correct them and run the same command again") from error
    except FastsrganError:
        with contextlib.suppress(OSError):  # nothing is left of a call that began nothing
            store.parent.rmdir()
        raise
    log.info("%s: %s, %d converted", store, counted(result["subjects"], "subject"), result["converted"])
    return str(store)


Files = dict[frozenset[str], list]  # split and files of a subject -> its structures: [name, values], or values of one


def files_named(
    table: str, base_path: str | None, label_classes: Sequence[str] | None = None, label_names: str | None = None
) -> Files:
    """Split, files and label classes of each row of a table."""
    from fastsrgan.io.labels import choices, structures
    from fastsrgan.io.tables import read_table

    found: Files = {}
    for row in read_table(table, base_path=base_path):
        chosen = structures(choices(row.classes, label_classes), row.label, label_names) if row.label else []
        classes: list = [[one.name, sorted(one.values)] for one in chosen]
        found[files_of(row)] = classes if len(chosen) > 1 else classes[0][1] if chosen else []
    return found


def files_of(row: TableRow) -> frozenset[str]:
    """Split and files of a row."""
    return frozenset([row.base, *(str(path) for path in (row.image, row.label, row.mask, row.tissues) if path)])


def files_in(store: Path) -> Files:
    """Split, source files and label classes of each subject of a store, as ``files_named``."""
    from fastsrgan.store.reader import open_store

    return {
        frozenset([s.split, *(file["path"] for file in s.attrs.get("source", {}).values())]): s.attrs.get("structures")
        or s.attrs.get("label_classes", [])
        for s in open_store(store).subjects
    }


def choice_kept(table: str, base_path: str | None, held: Files) -> list[str]:
    """The label classes that a store was made with, from those of a row that names none itself."""
    from fastsrgan.io.tables import read_table

    rows = [row for row in read_table(table, base_path=base_path) if row.label and not row.classes]
    classes: list = next((held[files_of(row)] for row in rows if files_of(row) in held), [])
    if classes and isinstance(classes[0], list):
        return [f"{name}={','.join(map(str, values))}" for name, values in classes]
    return [",".join(map(str, classes))] if classes else []
