"""``fastsrgan evaluate``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from fastsrgan.cli.console import Need, add_label_options, print_json, say, table
from fastsrgan.core.files import left_as_found, output_folder, write_json
from fastsrgan.core.progress import Progress
from fastsrgan.core.signals import loading
from fastsrgan.errors import MissingError, PartialFailure, ResourceError, UsageError, counted

PAIR = ("sr", "hr", "seg", "label", "mask", "lr", "baseline", "baseline_seg", "doubt")
NEEDS = (
    Need("seg baseline_seg", lambda a: a.label, "there is no label to compare it with", "--label IMAGE"),
    Need("label_names", lambda a: a.label_classes or a.table, "has no use without --label-classes"),
)


def add_parser(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Define the command; ``command(name, run, text, example)`` makes an empty one."""
    example = (
        "fastsrgan evaluate --sr out/a_sr.nii.gz --hr a.nii.gz --seg out/a_seg.nii.gz --label gm.nii.gz --lr lr.nii.gz"
        "\n  fastsrgan evaluate out truth --csv scores.csv --png pictures"
        "\n  fastsrgan evaluate --table pairs.csv --json scores.json"
        "\n  fastsrgan evaluate out other truth --png pictures"
    )
    p = command("evaluate", _evaluate, "compare results with the truth", example)
    text = (
        "a folder of `infer` and one of truths: STEM_sr beside STEM or STEM_hr, STEM_label, STEM_mask; two "
        "folders of results are compared"
    )
    p.add_argument("folders", nargs="*", metavar="RESULTS [RESULTS] TRUTH", help=text)
    helps = {
        "sr": "super-resolved image, the result",
        "hr": "high-resolution image, the truth",
        "seg": "segmentation of the result",
        "label": "its truth",
        "mask": "region to score besides the whole image: where it is above zero",
        "lr": "the low-resolution image: its spline is the baseline where no --baseline is given, with --label its "
        "interpolated label map the one where no --baseline-seg is",
        "baseline": "another image of the subject to compare with",
        "baseline_seg": "another segmentation to compare with",
        "doubt": "what `infer --uncertainty` wrote: is the error larger where it is? (found beside the result)",
    }
    for name in PAIR:
        p.add_argument(f"--{name.replace('_', '-')}", metavar="IMAGE", help=helps[name])
    text = (
        "columns SR_image, HR_image, optional Seg_image, Label_image, Label_classes, Mask_image, LR_image, "
        "Baseline_image, Baseline_seg"
    )
    p.add_argument("--table", metavar="CSV", help=text)
    add_label_options(p, "are scored one by one")
    p.add_argument("--bids", action="store_true", help="the two folders are a derivatives dataset and a BIDS dataset")
    text = "one line per subject, but for a pair then mean, sd and n; an earlier one is replaced"
    p.add_argument("--csv", metavar="FILE", help=text)
    p.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to standard output")
    text = "picture of the errors: a file for a pair, a folder for several; of a comparison Bland and Altman's"
    p.add_argument("--png", metavar="PATH", help=text)
    p.set_defaults(needs=NEEDS)


def _evaluate(args: argparse.Namespace, progress: Progress) -> int:
    pair = _form(args)
    with loading():
        from fastsrgan.io.output_place import one_writer

    with left_as_found([args.png] if args.png and not pair else []):
        files, folders = _places(args, [*pair.values(), *([args.table] if args.table else [])])
        with one_writer(files, folders, "evaluate"):
            kept: list[str] = []
            try:
                result = _run(args, pair, progress, lambda result: kept.extend(_keep(args, result)))
            except ResourceError as error:
                raise ResourceError(error.what, error.reason + "; ".join(["", *kept]), error.hint) from error
    if result.get("failed"):
        names = ", ".join(
            f"{f['subject']} ({f['error']})" if f["error"].startswith("only in ") else f["subject"]
            for f in result["failed"]
        )
        raise PartialFailure("evaluate", f"{len(result['failed'])} not evaluated: {names}", "see the warnings")
    return 0


def _keep(args: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    """Write and print the figures; where they are, for the error of a picture behind them."""
    if args.json not in (None, "-"):
        write_json(args.json, result)
    if args.csv:
        from fastsrgan.evaluate.cohort import write_csv

        write_csv(args.csv, result)
    if args.json == "-":
        print_json(result)
    elif "comparison" in result:
        say(order(result))
        print(table(beside(result)), table(comparison(result), keys=2), f"p: {result['test']}", sep="\n\n")
        for note in result["notes"]:
            say(f"note: {note}")
    elif "rows" in result:
        print(table(subjects(result)), table(cohort_figures(result), keys=2), sep="\n\n")
    else:
        print(table(figures(result), keys=2))
        if "doubt" in result:
            rows = enumerate(result["doubt"]["deciles"], 1)
            print("", table([{"decile": n} | {k: plain(v) for k, v in row.items()} for n, row in rows]), sep="\n")
    if args.json != "-" and (line := about_baseline(result)):
        print()
        say(line)
    files = [name for name in (args.csv, args.json) if name not in (None, "-")]
    return ["the figures are " + (f"kept in {' and '.join(files)}" if files else "printed above")]


def about_baseline(result: dict[str, Any]) -> str:
    """A line where a baseline's segmentation was made of the true label; else nothing."""
    from fastsrgan.evaluate.grids import KNOWS, knows_truth

    return KNOWS if any(map(knows_truth, result.get("rows", [result]))) else ""


def _form(args: argparse.Namespace) -> dict[str, str]:
    """The files of a pair; none where a table or folders are given. Raises UsageError for no or more than one form."""
    pair = {name: getattr(args, name) for name in PAIR if getattr(args, name)}
    if pair and (args.table or args.folders):
        named = ", ".join(f"--{name.replace('_', '-')}" for name in pair)
        reason = f"of a pair, and {'a table is' if args.table else 'folders are'} given"
        raise UsageError(named, reason, "columns of a table, or files of folders that are named alike, say it there")
    forms = [bool(pair), bool(args.table), bool(args.folders)]
    if sum(forms) != 1 or (pair and not {"sr", "hr"} <= set(pair)):
        reason = "give --sr and --hr, or --table, or two or three folders"
        raise MissingError("evaluate", reason, "fastsrgan evaluate --help")
    if args.folders and len(args.folders) not in (2, 3):
        raise MissingError("evaluate", counted(len(args.folders), "folder"), "RESULTS TRUTH, or RESULTS RESULTS TRUTH")
    if args.bids and len(args.folders) != 2:
        raise UsageError("--bids", "two folders are needed", "fastsrgan evaluate --bids DERIVATIVES DATASET")
    return pair


def _run(
    args: argparse.Namespace, pair: dict[str, str], progress: Progress, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The one form that was asked for; ``keep`` takes the figures before there are pictures."""
    if pair:
        with loading():
            from fastsrgan.evaluate.pair import evaluate_files

        more: dict[str, Any] = {**pair, "png": args.png, "keep": keep}
        return evaluate_files(**more, label_classes=args.label_classes or (), label_names=args.label_names)
    with loading():
        from fastsrgan.evaluate import cohort as evaluate_cohort

    more = {"png": args.png, "keep": keep, "progress": progress}
    more["choice"] = evaluate_cohort.Choice(args.label_classes or (), args.label_names)
    if args.table:
        return evaluate_cohort.evaluate_table(args.table, **more)
    if args.bids:
        with loading():
            from fastsrgan.infer.bids import evaluate_bids

        return evaluate_bids(*args.folders, **more)
    if len(args.folders) == 3:
        with loading():
            from fastsrgan.evaluate.compare import compare_folders

        return compare_folders(*args.folders, **more)
    return evaluate_cohort.evaluate_folders(*args.folders, **more)


def _places(args: argparse.Namespace, inputs: list[str]) -> tuple[list[str], list[str]]:
    """The files that are asked for, and the folders that are filled. Before the work, not after it: each can be written
    to, and holds nothing that is to be kept."""
    with loading():
        from fastsrgan.io import output_place

    kinds = {"csv": output_place.TABLE, "json": output_place.FIGURES, "png": output_place.SCORED}
    taken: dict[str, str] = {}
    files, folders = [], []
    for option, kind in kinds.items():
        target = getattr(args, option)
        if target in (None, "-"):
            continue
        if (other := taken.setdefault(os.path.realpath(target), option)) != option:
            raise UsageError(f"--{option}", f"{target} is the file of --{other} too", "a file for each")
        if option == "png" and not args.sr:  # pictures of a cohort fill a folder
            output_folder(target)
            folders.append(target)
        else:
            output_place.check_place(target, inputs, kind)
            files.append(target)
    return files, folders


def figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of one pair as rows: region or segmentation, name, value; baseline and difference beside."""
    base, gain = result.get("baseline", {}), result.get("gain", {})
    groups: list[tuple[str, tuple[str, ...]]] = [(region, ("image", region)) for region in result["image"]]
    groups += [("doubt", ("doubt",)), ("segmentation", ("segmentation",))]
    groups += [(name, ("structures", name)) for name in result.get("structures", {})]
    rows = []
    for where, path in groups:
        scores, other, more = (_at(tree, path) for tree in (result, base, gain))
        for key, value in scores.items():
            if isinstance(value, list):
                continue
            row = {"where": where, "figure": key, "value": plain(value)}
            told = {"baseline": plain(other.get(key)), "difference": plain(more.get(key))}
            rows.append(row | (told | {"better": better(key, more.get(key), value)} if base else {}))
    return rows


def cohort_figures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean +- sd of every figure of a cohort, the baseline's and the difference beside it."""
    told = result["summary"]
    rows = []
    for name, values in told.items():
        section, _, rest = name.partition(".")
        if section not in ("image", "doubt", "segmentation", "structures"):
            continue
        where, _, figure = rest.rpartition(".")
        row = {"where": where or section, "figure": figure, "value": spread(values)}
        if any(key.startswith("baseline.") for key in told):
            gain = told.get(f"gain.{name}")
            row |= {"baseline": spread(told.get(f"baseline.{name}")), "difference": spread(gain)}
            row |= {"better": better(figure, gain and gain["mean"], values["mean"])}
        rows.append(row | {"n": values["n"]})
    return rows


def subjects(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One line per subject with the figures most looked at, the baseline's of those that have a better and a worse
    beside them; the last line is mean +- sd."""
    from fastsrgan.evaluate.figures import columns
    from fastsrgan.evaluate.pair import flat

    shown = []
    for column in columns().values():
        shown.append((column.heading, column.path))
        if column.figure.better:
            shown.append((f"baseline {column.heading}", f"baseline.{column.path}"))
    there = [(head, name) for head, name in shown if name in result["summary"]]
    rows = []
    for row in result["rows"]:
        values = flat(row)
        rows.append({"subject": row["subject"]} | {head: values.get(name) for head, name in there})
    return [*rows, {"subject": "mean ± sd"} | {head: spread(result["summary"][name]) for head, name in there}]


def beside(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One line per subject: the figures most looked at of the first result, the second, and their difference, in the
    order that ``order`` says."""
    from fastsrgan.evaluate.figures import columns

    there = [(c.heading, c.path) for c in columns().values() if c.path in result["comparison"]]
    rows = []
    for row in result["rows"]:
        line = {"subject": row["subject"]}
        for head, name in there:
            first, second, apart = (row["figures"].get(f"{k}.{name}") for k in ("first", "second", "difference"))
            line[head] = f"{plain(first)} {plain(second)} ({'+' if (apart or 0) > 0 else ''}{plain(apart, 3)})"
        rows.append(line)
    return rows


def order(result: dict[str, Any]) -> str:
    """What the three numbers of ``beside`` are."""
    first, second = result["names"]
    return f"of each subject: {first}, {second} (the difference, {second} minus {first}, as in the table below)"


def comparison(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of the two results, the difference, its limits of agreement, and the paired test's p."""
    from fastsrgan.evaluate.figures import FIGURES

    rows = []
    for name, told in result["comparison"].items():
        _, _, rest = name.partition(".")
        where, _, figure = rest.rpartition(".")
        if FIGURES[figure].of_label:
            continue
        gain, ends = told["difference"]["mean"], told["limits"]
        row = {"where": where or "segmentation", "figure": figure}
        row |= {label: spread(told[k]) for label, k in zip(result["names"], ("first", "second"), strict=True)}
        row |= {"difference": spread(told["difference"]), "better": better(figure, gain, told["second"]["mean"])}
        row |= {"limits": None if ends is None else f"{plain(ends[0], 3)} to {plain(ends[1], 3)}"}
        rows.append(row | {"p": None if told["p"] is None else f"{told['p']:.3g}", "n": told["difference"]["n"]})
    return rows


def spread(values: dict[str, Any] | None) -> str | None:
    """``26.96 ± 0.41`` of a mean and a standard deviation."""
    if values is None:
        return None
    return f"{plain(values['mean'])}" + ("" if values["sd"] is None else f" ± {plain(values['sd'], 2)}")


def plain(value: float | None, digits: int = 4) -> str | int | None:
    """A figure of so many significant digits, without an exponent where it is large."""
    if value is None or isinstance(value, int):
        return value
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def better(figure: str, gain: float | None, value: float) -> str | None:
    """Whether ``value`` is better by its difference ``gain`` to the other; None of figures that have no better, and
    ``equal`` where no digit that is printed of the two differs: rounding is no gain and no loss."""
    from fastsrgan.evaluate.figures import FIGURES

    sign = FIGURES[figure].better if figure in FIGURES else 0
    if not sign or gain is None:
        return None
    return "equal" if plain(float(value)) == plain(float(value - gain)) else "yes" if gain * sign > 0 else "no"


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        tree = tree.get(key, {})
    return tree
