"""Figures of the studies: small panels of lines with error bars, as PNG and SVG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsrgan.core.runtime import atomic_write
from fastsrgan.errors import ResourceError

# Readable for the colour-blind, and in print (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#8a8a8a"
MARKERS = "osD^vP"
MOST_TICKS = 6  # measured places that get the ticks of the axis
GREY_LINE = -1  # the number of a line that needs no colour of its own


@dataclass(frozen=True)
class Line:
    """Values ``y`` at ``x``; ``sd`` draws error bars.

    style : "data" (coloured, by ``number``), "baseline" (dashed; one point becomes a level), "paper" (grey crosses) or
        "fit" (thin line without points)
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
    lines: Sequence[Line] = field(default_factory=tuple)
    log_x: bool = False
    log_y: bool = False  # where the values span a factor of ten


def draw(base: str | os.PathLike, rows: Sequence[Sequence[Panel]], title: str, footer: str = "") -> list[Path]:
    """Write ``base``.png and ``base``.svg with panels in rows; the same figure gives the same bytes.

    Raises ResourceError when matplotlib is missing or a file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResourceError("figure", "matplotlib is not installed", "pip install matplotlib") from error
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(3.5 * columns, 2.75 * len(rows) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    handles: dict[str, Any] = {}
    for i, row in enumerate(rows):
        for j in range(columns):
            if j < len(row):
                handles |= _panel(axes[i, j], row[j])
            else:
                axes[i, j].set_axis_off()
    figure.suptitle(title, fontsize=12, fontweight="bold")
    # In the order of the lines, not of the panels that hold them.
    names = sorted(handles, key=lambda name: handles[name][0])
    if names:
        figure.legend(
            [handles[n][1] for n in names], names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8,
            frameon=False, title=footer or None, title_fontsize=8,
        )  # fmt: skip
    paths = [Path(f"{base}.png"), Path(f"{base}.svg")]
    with matplotlib.rc_context({"svg.hashsalt": "fastsrgan", "svg.fonttype": "none"}):
        for path in paths:
            form = path.suffix[1:]
            with atomic_write(path) as temporary:
                nothing = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
                figure.savefig(temporary, format=form, dpi=130, metadata=nothing)
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
        place = ["data", "fit", "baseline", "paper"].index(line.style) * 100 + line.number
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


def _wide(panel: Panel) -> bool:
    """Whether the values span a factor of ten; below, a logarithmic axis has hardly a tick."""
    values = [y for line in panel.lines for y in line.y if y > 0]
    return bool(values) and max(values) >= 10 * min(values)


def _line(axes: Any, line: Line) -> Any:
    colour = GREY if line.number == GREY_LINE else COLOURS[line.number % len(COLOURS)]
    if line.style == "baseline" and len(line.x) < 2:
        return axes.axhline(line.y[0], color=colour, linestyle="--", linewidth=1.2)
    if line.style == "paper":
        return axes.plot(line.x, line.y, color=GREY, linestyle=":", marker="x", linewidth=1, markersize=5)[0]
    if line.style == "fit":
        return axes.plot(line.x, line.y, color=colour, linewidth=1, linestyle=":")[0]
    bars = [s or 0 for s in line.sd] if any(s is not None for s in line.sd) else None
    dashed, crowded = line.style == "baseline", len(line.x) > 40
    marker = None if dashed or crowded else MARKERS[line.number % len(MARKERS)]
    return axes.errorbar(
        line.x, line.y, yerr=bars, color=colour, marker=marker, linestyle="--" if dashed else "-", markersize=4,
        linewidth=1.4, capsize=2.5, elinewidth=0.9,
    )  # fmt: skip
