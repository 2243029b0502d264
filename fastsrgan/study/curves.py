"""Dice and PSNR per epoch and the losses of a training run (paper figure 6), read from its log."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastsrgan.core.files import is_special, parse_json, short_names
from fastsrgan.core.places import recorded
from fastsrgan.errors import InputError, UsageError
from fastsrgan.evaluate.figures import dice_name, dices_of_structures, mean_dice, structure_line
from fastsrgan.study.plots import GREY_LINE, Panel, PlotLine

LOG = "log.jsonl"
# Losses of the figure; the table has the epoch means of all of them.
SHOWN = {
    "generator": ("g_reconstruction", "g_adversarial", "g_loss"),
    "critic": ("d_wasserstein", "d_penalty", "d_loss"),
}
ALIKE = 1e-3  # of what the interpolation scores: rounding on another machine, no other scans
MOST = 2**53  # updates; whole numbers from there on are no longer told apart on an axis
LARGEST = 3.4e38  # of a 32-bit float: no loss is beyond it, and no axis can be drawn for what is
OLD_NAMES = {"rate": "lr_factor"}  # logs of earlier versions; what the learning rates are multiplied by
NOT_LOSSES = {"epoch", "update", "seconds", "data_wait_seconds", "patches_per_second", "memory_bytes"}


def read_log(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(updates, validations) of RUN/log.jsonl, as logged; a last line that was being written is left out.

    Raises InputError when there is no log, or neither an update nor a validation in it.
    """
    path = run / LOG if run.is_dir() else run
    if is_special(path):
        raise InputError(path, "is not a regular file", "name the folder of a training run")
    try:
        lines = path.read_text(encoding="utf8", errors="replace").splitlines()
    except OSError as error:
        reason = "cannot be read" if path.exists() else "no such file or folder"
        raise InputError(path, reason, "name the folder of a training run") from error
    rows = [row for row in map(parse_json, lines) if _is_count(row.get("epoch")) and _is_count(row.get("update", 0))]
    updates = [{OLD_NAMES.get(k, k): v for k, v in r.items()} for r in rows if "update" in r]
    validations = [r for r in rows if isinstance(r.get("validation"), dict)]
    if not updates and not validations:
        raise InputError(path, "holds no line of a training run", "train for an update at least")
    return updates, validations


def curves(run: Path) -> dict[str, Any]:
    """``rows``: one per epoch with its validation scores and the means of its losses; ``best``: the epoch of highest
    Dice (``dice_is``: of several structures their mean), whose weights the paper keeps; ``updates`` and the panels of
    the figure."""
    updates, validations = read_log(run)
    epochs = sorted({r["epoch"] for r in updates} | {r["epoch"] for r in validations})
    scores = {r["epoch"]: r["validation"] for r in validations}
    names = [k for k in dict.fromkeys(k for r in updates for k in r) if k not in NOT_LOSSES]
    rows = []
    for epoch in epochs:
        row: dict[str, Any] = {"epoch": epoch} | {k: v for k, v in scores.get(epoch, {}).items() if _is_number(v)}
        mine = [r for r in updates if r["epoch"] == epoch]
        for name in names:
            values = [float(r[name]) for r in mine if _is_number(r.get(name))]
            if values:
                row[name] = statistics.fmean(values)
        rows.append(row | {"updates": len(mine)})
    told = [(mean_dice(row), -row["epoch"], dice_name(len(dices_of_structures(row)))) for row in rows]
    value, epoch, named = max((one for one in told if one[0] is not None), default=(None, 0, ""))
    best = None if value is None else {"epoch": -epoch, "Dice": value, "dice_is": named}
    return {"rows": rows, "best": best, "updates": len(updates), "panels": _panels(rows, updates)}


# What is drawn of several runs. Of scores their names, and of whole volumes and of patches the columns, of which a run
# has one, and that of the interpolation: of two runs the same is compared, the first that all of them have.
SCORES = (
    ("Dice", ("whole_Dice",), "spline_Dice", ("Dice", "Dice_label_1"), ""),
    ("PSNR, dB", ("whole_PSNR",), "spline_PSNR", ("PSNR",), "PSNR_spline"),
    ("SSIM", ("whole_SSIM",), "spline_SSIM", ("SSIM",), "SSIM_spline"),
)
LOSSES = (
    ("reconstruction loss", "g_reconstruction"),
    ("Wasserstein estimate", "d_wasserstein"),
    ("gradient penalty", "d_penalty"),
)


def overlaid(runs: Sequence[Path]) -> dict[str, Any]:
    """Several runs: ``rows`` as of ``curves`` with the name of their run, ``runs`` (name, path, best, updates), and
    panels in which every run has a line of its own colour, the interpolation a grey one where it is the same for all.
    """
    made = {name: curves(run) for name, run in zip(short_names(runs), runs, strict=True)}
    if len(made) < len(runs):
        raise UsageError("study curves", "a run is named twice", "name each run once")
    told = [
        {"name": name, "path": recorded(run), "best": one["best"], "updates": one["updates"]}
        for (name, one), run in zip(made.items(), runs, strict=True)
    ]
    shown = {name: [_of_all(row) for row in one["rows"]] for name, one in made.items()}
    named = list(dict.fromkeys(one["best"]["dice_is"] for one in made.values() if one["best"]))
    panels = []
    for title, whole, of_whole, patches, of_patches in SCORES:
        kinds = (("whole volumes", whole, of_whole), ("patches", patches, of_patches))
        lines = {kind: _lines(shown, keys) for kind, keys, _ in kinds}
        # Scores of whole volumes are higher than those of patches, which have noise: never both in one panel.
        kind = next((kind for kind in lines if len(lines[kind]) == len(runs)), max(lines, key=lambda k: len(lines[k])))
        base = next(of for name, _, of in kinds if name == kind)
        title = " / ".join(named) if title == "Dice" and named else title
        title += f", {kind}" * bool(lines[kind])
        panels.append(Panel(title, "epoch", lines[kind] + _interpolation(shown, base) * bool(lines[kind])))
    panels += [Panel(title, "epoch", _lines(shown, (key,))) for title, key in LOSSES]
    rows = [{"run": name} | row for name, one in made.items() for row in one["rows"]]
    return {"rows": rows, "runs": told, "panels": _rows_of(panels)}


def _lines(shown: dict[str, list[dict[str, Any]]], keys: Sequence[str]) -> list[PlotLine]:
    """Of every run the first of the columns that it has, where it has one."""
    lines = []
    for number, (name, rows) in enumerate(shown.items()):
        points = next((xy for key in keys if (xy := _xy(rows, "epoch", key))[0]), None)
        lines += [PlotLine(name, *points, number=number)] if points else []
    return lines


def _interpolation(shown: dict[str, list[dict[str, Any]]], key: str) -> list[PlotLine]:
    """A line where it is the same for all runs that have it: with other resolutions it is another."""
    found = [xy for rows in shown.values() if (xy := _xy(rows, "epoch", key))[0]]
    levels = [statistics.fmean(y) for _, y in found]
    if not levels or max(levels) - min(levels) > ALIKE * max(map(abs, levels)):
        return []
    return [PlotLine("interpolation", *found[0], style="baseline", number=GREY_LINE)]


def _of_all(row: dict[str, Any]) -> dict[str, Any]:
    """A row in which the Dice of several structures is their mean, and the interpolation of the first is left out."""
    if not dices_of_structures(row):
        return row
    return {k: v for k, v in row.items() if k != "spline_Dice"} | {
        f"{part}Dice": mean_dice(row, part) for part in ("whole_", "") if dices_of_structures(row, part)
    }


def _panels(rows: list[dict[str, Any]], updates: list[dict[str, Any]]) -> list[list[Panel]]:
    known = dict.fromkeys(k for row in rows for k in row)
    each = [PlotLine(name, *_xy(rows, "epoch", k), number=i) for i, (k, name) in enumerate(_structures(known))]
    first = "Dice, segmentation of the first structure" if each else "Dice"
    panels = []
    for title, endings in ((first, ("Dice", "Dice_label_1")), ("PSNR, dB", ("PSNR", "PSNR_spline", "PSNR_linear"))):
        keys = [k for k in known if k.endswith(endings) and not structure_line(k)]
        lines = [PlotLine(_called(key), *_xy(rows, "epoch", key), **_drawn(key)) for key in keys]
        panels.append(Panel(title, "epoch", lines))
    panels += [Panel("Dice of each structure", "epoch", each)] * bool(each)
    losses, number = [], 2
    for who, names in SHOWN.items():
        lines = []
        for name in names:
            x, y = _xy(updates, "update", name)
            if x:
                lines.append(PlotLine(name, x, y, number=number))
                number += 1
        if lines:  # none of the critic in a training without one
            losses.append(Panel(f"{who}, losses", "update", lines))
    return [panels, losses] if losses else [panels]


def _rows_of(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Scores, and below them the losses that there are: without a critic it has none."""
    losses = [panel for panel in panels[3:] if panel.lines]
    return [list(panels[:3]), losses] if losses else [list(panels[:3])]


def _structures(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Column and name of the Dice of each of several structures."""
    return [(key, name) for key in keys if (name := structure_line(key))]


def _called(key: str) -> str:
    """Dice of patches, of whole volumes and of the spline are called as their PSNR."""
    who = {"whole": "whole volumes", "spline": "interpolation, whole volumes"}
    who |= {"linear": "best linear estimate, whole volumes"}
    patches = {"PSNR_spline": "interpolation, patches", "PSNR_linear": "best linear estimate, patches"}
    return patches[key] if key in patches else who.get(key.split("_", 1)[0], "patches (paper figure 6)")


def _drawn(key: str) -> dict[str, Any]:
    """Patches in one colour, whole volumes in another; what needs no network in the same, by its dashes."""
    style = "baseline" if "spline" in key else "linear" if "linear" in key else "data"
    return {"style": style, "number": int(key.startswith(("whole_", "spline_", "linear_")))}


def _xy(rows: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    there = [r for r in rows if _is_number(r.get(y))]
    return [float(r[x]) for r in there], [float(r[y]) for r in there]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST
