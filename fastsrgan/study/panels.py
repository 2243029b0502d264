"""Which lines each study draws, and the affine fit of time in step^-3 (paper section 3, figure 9)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastsrgan.study.cells import BASELINE
from fastsrgan.study.paper import REFERENCE
from fastsrgan.study.plots import GREY_LINE, Line, Panel

TITLES = {
    "steps": "Quality and time against the step between tiles ({heads}, mean and sd)",
    "noise": "Quality against noise ({heads}, mean and sd)",
    "augmentation": "Models on images they were and were not trained for ({heads}, mean and sd)",
    "resolution": "Quality against slice thickness ({heads}, mean and sd)",
}
HEADINGS = {
    "dice": "Dice",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "components": "connected components",
    "hausdorff95_mm": "Hausdorff 95, mm",
    "seconds": "seconds per volume",
}


def _lines(rows: list[dict[str, Any]], figure: str, x: str, by: Sequence[str]) -> list[Line]:
    """One line per value of the columns ``by``; rows of the baseline become dashed lines, grey where there is one."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        columns = [c for c in by if not (row["model"] == BASELINE and c == "step")]
        name = ", ".join(f"step {row[c]}" if c == "step" else str(row[c]) for c in columns)
        series.setdefault(name, []).append(row)
    bases = [name for name, members in series.items() if members[0]["model"] == BASELINE]
    data = [name for name in series if name not in bases]
    lines = []
    for name, members in series.items():
        there = [row for row in members if figure in row["figures"]]
        if not there:
            continue
        at = [float(row[x]) if row[x] is not None else 0.0 for row in there]
        told = [row["figures"][figure] for row in there]
        means, sds = [t["mean"] for t in told], [t["sd"] for t in told]
        if name in bases:
            lines.append(Line(name, at, means, sds, "baseline", bases.index(name) if len(bases) > 1 else GREY_LINE))
        else:
            lines.append(Line(name, at, means, sds, "data", data.index(name)))
    return lines


def _step_panels(rows: list[dict[str, Any]], fit: list[dict[str, Any]]) -> list[list[Panel]]:
    noisy = len({row["condition"] for row in rows}) > 1
    by = ["condition", "model"] if noisy else ["model"]
    measured = [row["step"] for row in rows if row["step"]]
    panels = []
    for figure, heading in HEADINGS.items():
        lines = _lines(rows, figure, "step", by)
        # Far outside the steps that were measured the paper's points would squeeze the rest.
        quoted = [
            row for row in REFERENCE["steps"]
            if figure in row and row["step"] and min(measured) <= row["step"] <= 1.1 * max(measured)
        ]  # fmt: skip
        if figure == "seconds":
            lines += [_fit_line(told, i) for i, told in enumerate(fit)]
        elif len(quoted) > 1 and lines:
            lines.append(Line("the paper, its own data", *_columns(quoted, figure), style="paper"))
        panels.append(Panel(heading, "step, voxels", lines, log_y=figure in ("seconds", "components")))
    return [panels[:3], panels[3:]]


def _columns(quoted: list[dict[str, Any]], figure: str) -> tuple[list[float], list[float]]:
    return [float(row["step"]) for row in quoted], [float(row[figure]) for row in quoted]


def _noise_panels(rows: list[dict[str, Any]], fit: list[dict[str, Any]]) -> list[list[Panel]]:
    percent = [row | {"noise": 100 * row["noise"]} for row in rows]
    x = "noise, % of the largest value"
    panels = [
        Panel(HEADINGS[f], x, _lines(percent, f, "noise", ["model", "step"]), log_y=f == "components")
        for f in ("dice", "psnr_db", "ssim", "components")
    ]
    return [panels[:2], panels[2:]]


def _augmentation_panels(rows: list[dict[str, Any]], fit: list[dict[str, Any]]) -> list[list[Panel]]:
    grid = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        mine = [row for row in rows if row["condition"] == condition]
        grid.append(
            [
                Panel(f"{HEADINGS[f]}, {condition}", "step, voxels", _lines(mine, f, "step", ["model"]))
                for f in ("psnr_db", "ssim", "dice", "components")
            ]
        )
    return grid


def _resolution_panels(rows: list[dict[str, Any]], fit: list[dict[str, Any]]) -> list[list[Panel]]:
    sized = [row | {"thickness": max(row["low_res"])} for row in rows]
    panels = [
        Panel(HEADINGS[f], "slice thickness, mm", _lines(sized, f, "thickness", ["model", "step"]))
        for f in ("psnr_db", "ssim", "dice", "hausdorff95_mm")
    ]
    return [panels[:2], panels[2:]]


# (rows, fits of ``time_fit``) -> panels in rows
PANELS: dict[str, Callable[[list[dict[str, Any]], list[dict[str, Any]]], list[list[Panel]]]] = {
    "steps": _step_panels,
    "noise": _noise_panels,
    "augmentation": _augmentation_panels,
    "resolution": _resolution_panels,
}


def time_fit(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """seconds = intercept + slope / step^3 by least squares over the means, for each condition and model.

    ``r2`` is the share of the variance that the fit explains; fits of fewer than three steps are left out, since two
    points say nothing about the form.
    """
    groups: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row["step"] and "seconds" in row["figures"]:
            point = (row["step"], row["figures"]["seconds"]["mean"])
            groups.setdefault((row["condition"], row["model"]), []).append(point)
    fits = []
    for (condition, model), points in groups.items():
        if len(points) < 3:
            continue
        steps, seconds = np.array(points, float).T
        slope, intercept = np.polyfit(steps**-3, seconds, 1)
        spread = float(((seconds - seconds.mean()) ** 2).sum())
        left = float(((intercept + slope * steps**-3 - seconds) ** 2).sum())
        fit = {"condition": condition, "model": model, "intercept_s": float(intercept), "slope_s": float(slope)}
        fits.append(fit | {"r2": 1 - left / spread if spread else None, "steps": [int(s) for s in steps]})
    return fits


def _fit_line(fit: dict[str, Any], number: int) -> Line:
    steps = np.geomspace(min(fit["steps"]), max(fit["steps"]), 60)
    seconds = fit["intercept_s"] + fit["slope_s"] * steps**-3
    shown = seconds > 0  # the axis is logarithmic
    return Line("affine in step^-3", steps[shown].tolist(), seconds[shown].tolist(), style="fit", number=number)
