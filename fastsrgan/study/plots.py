"""Figures of the studies: small panels of lines with error bars, as PNG and SVG.

Figures that the SegSRGAN paper reports, for orientation beside a study on other images.

Delannoy et al. 2020: dHCP newborns at 0.5 mm, 8 test subjects, slices of 3 mm, patches of 128; nothing of it was
measured with this software. "augmented" models were trained with contrast and noise augmentation.

Which lines each study draws, and the affine fit of time in step^-3 (paper section 3, figure 9).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import atomic_write
from fastsrgan.evaluate.figures import FIGURES
from fastsrgan.io.output_place import BY_STUDY
from fastsrgan.pictures.axes import axis_range
from fastsrgan.pictures.figure import as_written, new_figure
from fastsrgan.study.data import BASELINE

# Readable for the colour-blind, and in print (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#8a8a8a"
MARKERS = "osD^vP"
MOST_TICKS = 6  # measured places that get the ticks of the axis
STROKES = {"baseline": "--", "linear": "-."}  # of the lines that need no network
LEGEND_INCHES = (0.6, 0.063)  # of an entry beside its words, and of a letter of them
GREY_LINE = -1  # the number of a line that needs no colour of its own


@dataclass(frozen=True)
class PlotLine:
    """Values ``y`` at ``x``; ``sd`` draws error bars.

    style : "data" (coloured, by ``number``), "baseline" (dashed; one point becomes a level), "linear" (the best linear
        estimate: dashes and dots), "paper" (grey crosses) or "fit" (thin line without points)
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    sd: Sequence[float | None] = ()
    style: str = "data"
    number: int = 0


@dataclass(frozen=True)
class Panel:
    """One set of axes; a panel without lines says so."""

    title: str
    x: str
    lines: Sequence[PlotLine] = field(default_factory=tuple)
    log_x: bool = False
    log_y: bool = False  # where the values span a factor of ten
    figure: str = ""  # panels of one figure have one axis, so that they can be compared


def draw(base: str | os.PathLike, rows: Sequence[Sequence[Panel]], title: str, footer: str = "") -> list[Path]:
    """Write ``base``.png and ``base``.svg with panels in rows; the same figure gives the same bytes.

    Raises ResourceError when matplotlib is missing or a file cannot be written.
    """
    columns = max(len(row) for row in rows)
    figure = new_figure("figure", figsize=(3.5 * columns, 2.75 * len(rows) + 1.1), layout="constrained")
    import matplotlib

    axes = figure.subplots(len(rows), columns, squeeze=False)
    handles: dict[str, Any] = {}
    alike: dict[str, list[Any]] = {}
    for i, row in enumerate(rows):
        for j in range(columns):
            if j < len(row):
                handles |= _panel(axes[i, j], row[j])
                alike.setdefault(row[j].figure or str((i, j)), []).append(axes[i, j])
            else:
                axes[i, j].set_axis_off()
    for members in alike.values():
        _scale(members)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    # In the order of the lines, not of the panels that hold them.
    names = sorted(handles, key=lambda name: handles[name][0])
    if names:
        across = figure.get_figwidth() / (LEGEND_INCHES[0] + LEGEND_INCHES[1] * max(map(len, names)))
        ncols = min(4, len(names), max(1, int(across)))
        figure.set_figheight(figure.get_figheight() + 0.18 * (-(-len(names) // ncols) - 1))
        figure.legend(
            [handles[n][1] for n in names], names, loc="outside lower center", ncols=ncols, fontsize=8,
            frameon=False, title=footer or None, title_fontsize=8,
        )  # fmt: skip
    as_written(figure)
    paths = [Path(f"{base}.png"), Path(f"{base}.svg")]
    with matplotlib.rc_context({"svg.hashsalt": "fastsrgan", "svg.fonttype": "none"}):
        for path in paths:
            form = path.suffix[1:]
            with atomic_write(path) as temporary:
                made = {"Software": BY_STUDY} if form == "png" else {"Date": None, "Creator": BY_STUDY}
                figure.savefig(temporary, format=form, dpi=130, metadata=made)
    return paths


def _panel(axes: Any, panel: Panel) -> dict[str, tuple[int, Any]]:
    """Draw one panel; its legend entries with their place in the legend."""
    handles = {}
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel(panel.x, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for line in panel.lines:
        place = ["data", "fit", "baseline", "linear", "paper"].index(line.style) * 100 + line.number
        handles[line.name] = (place, _line(axes, line))
    if panel.log_x:
        axes.set_xscale("log")
    measured = sorted({x for line in panel.lines if line.style == "data" for x in line.x})
    if len(measured) <= MOST_TICKS and not panel.log_x:
        axes.set_xticks(measured, [f"{x:g}" for x in measured])
    elif all(float(x).is_integer() for x in measured) and not panel.log_x:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.log_y and _wide(panel):
        from matplotlib.ticker import LogFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.tick_params(which="minor", labelsize=7)
    if not panel.lines:
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=GREY, fontsize=9)
    return handles


def _scale(members: Sequence[Any]) -> None:
    """One range of values for axes of one figure, see ``axis_range``; logarithmic ones keep theirs."""
    drawn = [axes for axes in members if axes.has_data() and axes.get_yscale() == "linear"]
    if drawn:
        ends = [axes.get_ylim() for axes in drawn]
        low, high = axis_range(min(low for low, _ in ends), max(high for _, high in ends))
        for axes in drawn:
            axes.set_ylim(low, high)


def _wide(panel: Panel) -> bool:
    """Whether the values span a factor of ten; below, a logarithmic axis has hardly a tick."""
    values = [y for line in panel.lines for y in line.y if y > 0]
    return bool(values) and max(values) >= 10 * min(values)


def _line(axes: Any, line: PlotLine) -> Any:
    colour = GREY if line.number == GREY_LINE else COLOURS[line.number % len(COLOURS)]
    if line.style in STROKES and len(line.x) < 2:
        return axes.axhline(line.y[0], color=colour, linestyle=STROKES[line.style], linewidth=1.2)
    if line.style == "paper":
        return axes.plot(line.x, line.y, color=GREY, linestyle=":", marker="x", linewidth=1, markersize=5)[0]
    if line.style == "fit":
        return axes.plot(line.x, line.y, color=colour, linewidth=1, linestyle=":")[0]
    bars = [s or 0 for s in line.sd] if any(s is not None for s in line.sd) else None
    strokes, crowded = STROKES.get(line.style, "-"), len(line.x) > 40
    marker = None if line.style in STROKES or crowded else MARKERS[line.number % len(MARKERS)]
    return axes.errorbar(
        line.x, line.y, yerr=bars, color=colour, marker=marker, linestyle=strokes, markersize=4,
        linewidth=1.4, capsize=2.5, elinewidth=0.9,
    )  # fmt: skip


SOURCE = (
    "The paper's own data (Delannoy et al. 2020; dHCP newborns, 8 test subjects, 0.5 x 0.5 x 3 mm, patch 128): other "
    "images and other weights, a reference for the shape of the curves and not a target"
)
NOISY = "noisy (sigma 2)"
STEPS = (30, 80, 128)


def _rows(condition: str, model: str, **columns: tuple[float, ...]) -> list[dict[str, Any]]:
    return [
        {"condition": condition, "model": model, "step": step} | {name: values[i] for name, values in columns.items()}
        for i, step in enumerate(STEPS)
    ]


IMAGES = [
    *_rows("original", "image figures", psnr_db=(26.96, 25.85, 24.24), ssim=(0.73, 0.69, 0.65)),
    *_rows(NOISY, "image figures", psnr_db=(25.40, 24.45, 23.24), ssim=(0.49, 0.46, 0.44)),
]
SEGMENTATIONS = [
    *_rows("original", "plain", dice=(0.855, 0.831, 0.805), components=(8.6, 45.3, 104.3)),
    *_rows(NOISY, "plain", dice=(0.819, 0.785, 0.740), components=(26.6, 98.5, 193.1)),
    *_rows("original", "augmented", dice=(0.849, 0.827, 0.806), components=(5.7, 33.6, 61.7)),
    *_rows(NOISY, "augmented", dice=(0.836, 0.812, 0.790), components=(5.8, 33.5, 61.8)),
]
BASELINES = [
    {"condition": "original", "model": "baseline", "step": None, "psnr_db": 24.22, "ssim": 0.63, "dice": 0.735}
]
TIMES = [
    {"condition": "original", "model": "P100, about", "step": 10, "seconds": 600.0},
    {"condition": "original", "model": "P100, about", "step": 100, "seconds": 4.0},
]
# What is printed beside each study.
REFERENCE: dict[str, list[dict[str, Any]]] = {
    "steps": [*BASELINES, *IMAGES[:3], *SEGMENTATIONS[:3], *TIMES],
    "noise": [*BASELINES, *IMAGES, *SEGMENTATIONS[:6]],
    "augmentation": SEGMENTATIONS,
    "resolution": [],
    "curves": [],
}

TITLES = {
    "steps": "Quality and time against the step between tiles ({heads})",
    "noise": "Quality against noise ({heads})",
    "augmentation": "Models on images they were and were not trained for ({heads})",
    "resolution": "Quality against slice thickness ({heads})",
}
STEP_FIGURES = ("dice", "psnr_db", "ssim", "components", "hausdorff95_mm", "seconds")


def _heading(figure: str) -> str:
    return FIGURES[figure].named if figure in FIGURES else "seconds per volume"


def _lines(rows: list[dict[str, Any]], figure: str, x: str, by: Sequence[str]) -> list[PlotLine]:
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
            lines.append(PlotLine(name, at, means, sds, "baseline", bases.index(name) if len(bases) > 1 else GREY_LINE))
        else:
            lines.append(PlotLine(name, at, means, sds, "data", data.index(name)))
    return lines


def _step_panels(rows: list[dict[str, Any]], fit: list[dict[str, Any]]) -> list[list[Panel]]:
    noisy = len({row["condition"] for row in rows}) > 1
    by = ["condition", "model"] if noisy else ["model"]
    measured = [row["step"] for row in rows if row["step"]]
    panels = []
    for figure in STEP_FIGURES:
        lines = _lines(rows, figure, "step", by)
        # Far outside the steps that were measured the paper's points would squeeze the rest.
        quoted = [
            row for row in REFERENCE["steps"]
            if figure in row and row["step"] and min(measured) <= row["step"] <= 1.1 * max(measured)
        ]  # fmt: skip
        if figure == "seconds":
            lines += [_fit_line(told, i) for i, told in enumerate(fit)]
        elif len(quoted) > 1 and lines:
            lines.append(PlotLine("the paper, its own data", *_columns(quoted, figure), style="paper"))
        panels.append(Panel(_heading(figure), "step, voxels", lines, log_y=figure in ("seconds", "components")))
    return [panels[:3], panels[3:]]


def _columns(quoted: list[dict[str, Any]], figure: str) -> tuple[list[float], list[float]]:
    return [float(row["step"]) for row in quoted], [float(row[figure]) for row in quoted]


def _noise_panels(rows: list[dict[str, Any]], fit: list[dict[str, Any]]) -> list[list[Panel]]:
    percent = [row | {"noise": 100 * row["noise"]} for row in rows]
    x = "noise, % of the largest value"
    panels = [
        Panel(_heading(f), x, _lines(percent, f, "noise", ["model", "step"]), log_y=f == "components")
        for f in ("dice", "psnr_db", "ssim", "components")
    ]
    return [panels[:2], panels[2:]]


def _augmentation_panels(rows: list[dict[str, Any]], fit: list[dict[str, Any]]) -> list[list[Panel]]:
    grid = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        mine = [row for row in rows if row["condition"] == condition]
        lines = {f: _lines(mine, f, "step", ["model"]) for f in ("psnr_db", "ssim", "dice", "components")}
        grid.append(
            [Panel(f"{_heading(f)}, {condition}", "step, voxels", drawn, figure=f) for f, drawn in lines.items()]
        )
    return grid


def _resolution_panels(rows: list[dict[str, Any]], fit: list[dict[str, Any]]) -> list[list[Panel]]:
    sized = [row | {"thickness": max(row["low_res"])} for row in rows]
    panels = [
        Panel(_heading(f), "slice thickness, mm", _lines(sized, f, "thickness", ["model", "step"]))
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
    points say nothing about the form, and so are those of steps that gave fewer than three numbers of tiles, as of an
    image no larger than the patch.
    """
    groups: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for row in rows:
        if row["step"] and "seconds" in row["figures"]:
            tiles = row["figures"].get("tiles", {"mean": row["step"]})["mean"]
            point = (row["step"], row["figures"]["seconds"]["mean"], tiles)
            groups.setdefault((row["condition"], row["model"]), []).append(point)
    fits = []
    for (condition, model), points in groups.items():
        steps, seconds, tiles = np.array(points, float).T
        if len(np.unique(tiles)) < 3:
            continue
        slope, intercept = np.polyfit(steps**-3, seconds, 1)
        spread = float(((seconds - seconds.mean()) ** 2).sum())
        left = float(((intercept + slope * steps**-3 - seconds) ** 2).sum())
        fit = {"condition": condition, "model": model, "intercept_s": float(intercept), "slope_s": float(slope)}
        fits.append(fit | {"r2": 1 - left / spread if spread else None, "steps": [int(s) for s in steps]})
    return fits


def _fit_line(fit: dict[str, Any], number: int) -> PlotLine:
    steps = np.geomspace(min(fit["steps"]), max(fit["steps"]), 60)
    seconds = fit["intercept_s"] + fit["slope_s"] * steps**-3
    shown = seconds > 0  # the axis is logarithmic
    return PlotLine("affine in step^-3", steps[shown].tolist(), seconds[shown].tolist(), style="fit", number=number)
