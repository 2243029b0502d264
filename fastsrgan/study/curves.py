"""Dice and PSNR per epoch and the losses of a training run (paper figure 6), read from its log."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsrgan.core.files import is_special, parse_json, short_names
from fastsrgan.errors import InputError, UsageError
from fastsrgan.study.plots import GREY_LINE, Panel, PlotLine

LOG = "log.jsonl"
# Losses of the figure; the table has the epoch means of all of them.
SHOWN = {
    "generator": ("g_reconstruction", "g_adversarial", "g_loss"),
    "critic": ("d_wasserstein", "d_penalty", "d_loss"),
}
MOST = 2**53  # updates; whole numbers from there on are no longer told apart on an axis
LARGEST = 3.4e38  # of a 32-bit float: no loss is beyond it, and no axis can be drawn for what is
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
        raise InputError(path, "cannot be read", "name the folder of a training run") from error
    rows = [row for row in map(parse_json, lines) if _is_count(row.get("epoch")) and _is_count(row.get("update", 0))]
    updates = [r for r in rows if "update" in r]
    validations = [r for r in rows if isinstance(r.get("validation"), dict)]
    if not updates and not validations:
        raise InputError(path, "holds no line of a training run", "train for an update at least")
    return updates, validations


def curves(run: Path) -> dict[str, Any]:
    """``rows``: one per epoch with its validation scores and the means of its losses; ``best``: the epoch of highest
    Dice, whose weights the paper keeps; ``updates`` and the panels of the figure."""
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
    dice = [(row["Dice"], row["epoch"]) for row in rows if "Dice" in row]
    best = None if not dice else {"epoch": max(dice, key=lambda d: (d[0], -d[1]))[1], "Dice": max(dice)[0]}
    return {"rows": rows, "best": best, "updates": len(updates), "panels": _panels(rows, updates)}


# What is drawn of several runs: titles, and the columns of which the first that a run has is taken.
OVERLAID = (
    ("Dice", ("whole_Dice", "Dice", "Dice_label_1")),
    ("PSNR, dB", ("whole_PSNR", "PSNR")),
    ("SSIM", ("whole_SSIM", "SSIM")),
    ("reconstruction loss", ("g_reconstruction",)),
    ("Wasserstein estimate", ("d_wasserstein",)),
    ("gradient penalty", ("d_penalty",)),
)


def overlaid(runs: Sequence[Path]) -> dict[str, Any]:
    """Several runs: ``rows`` as of ``curves`` with the name of their run, ``runs`` (name, path, best, updates), and
    panels in which every run has a line of its own colour, the interpolation a grey one."""
    made = {name: curves(run) for name, run in zip(short_names(runs), runs, strict=True)}
    if len(made) < len(runs):
        raise UsageError("study curves", "a run is named twice", "name each run once")
    told = [
        {"name": name, "path": str(run), "best": one["best"], "updates": one["updates"]}
        for (name, one), run in zip(made.items(), runs, strict=True)
    ]
    panels = []
    for title, keys in OVERLAID:
        lines = []
        for number, (name, one) in enumerate(made.items()):
            key = next((k for k in keys if any(_is_number(row.get(k)) for row in one["rows"])), None)
            if key is not None:
                lines.append(PlotLine(name, *_xy(one["rows"], "epoch", key), number=number))
            base = f"spline_{key.removeprefix('whole_')}" if key and key.startswith("whole_") else ""
            x, y = _xy(one["rows"], "epoch", base)
            if x and number == 0:
                lines.append(PlotLine("interpolation", x, y, style="baseline", number=GREY_LINE))
        panels.append(Panel(title, "epoch", lines))
    rows = [{"run": name} | row for name, one in made.items() for row in one["rows"]]
    return {"rows": rows, "runs": told, "panels": [panels[:3], panels[3:]]}


def _panels(rows: list[dict[str, Any]], updates: list[dict[str, Any]]) -> list[list[Panel]]:
    panels = []
    for title, endings in (("Dice", ("Dice", "Dice_label_1")), ("PSNR, dB", ("PSNR",))):
        keys = dict.fromkeys(k for row in rows for k in row if k.endswith(endings))
        lines = [
            PlotLine(_called(key), *_xy(rows, "epoch", key), style="baseline", number=GREY_LINE)
            if key.startswith("spline_")
            else PlotLine(_called(key), *_xy(rows, "epoch", key), number=i)
            for i, key in enumerate(keys)
        ]
        panels.append(Panel(title, "epoch", lines))
    losses, number = [], 2
    for who, names in SHOWN.items():
        lines = []
        for name in names:
            x, y = _xy(updates, "update", name)
            if x:
                lines.append(PlotLine(name, x, y, number=number))
                number += 1
        losses.append(Panel(f"{who}, losses", "update", lines))
    return [panels, losses]


def _called(key: str) -> str:
    """Dice of patches, of whole volumes and of the spline share a colour with their PSNR."""
    who = {"whole": "whole volumes", "spline": "interpolation, whole volumes"}
    return who.get(key.split("_", 1)[0], "patches (paper figure 6)")


def _xy(rows: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    there = [r for r in rows if _is_number(r.get(y))]
    return [float(r[x]) for r in there], [float(r[y]) for r in there]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST
