"""A picture of the end-to-end rows of a data report: bars, fastsrgan and its peers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.data_page import end_to_end, row_of, sides
from fastsrgan.core.files import atomic_write

OURS, THEIRS = "#1f77b4", "#b0b0b0"
STAGE_COLOURS = {"read": "#4c78a8", "degrade": "#f58518", "place": "#54a24b", "gather": "#b279a2"}


def plot(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the picture in the form that its suffix names. Raises InputError without end-to-end rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = end_to_end(report)
    bars = {
        f"{name}\n{geometry}" if name == "fastsrgan" else name: facts
        for geometry, row in rows.items()
        for name, facts in sides(row).items()
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    step = report["settings"]["step_ms"]
    panels: list[tuple[str, Callable[[dict[str, Any]], float], bool]] = [
        ("patches per second", lambda f: f["patches_per_second"], True),
        (f"waiting for data, % of the time, steps of {step} ms", lambda f: 100 * f["wait_share"], False),
        ("written to disk, MB per patch", lambda f: f["disk_bytes_per_epoch"] / f["patches_per_epoch"] / 1e6, False),
    ]
    for axis, (title, value, log) in zip(axes.flat, panels, strict=False):
        values = [value(facts) for facts in bars.values()]
        colours = [OURS if name.startswith("fastsrgan") else THEIRS for name in bars]
        axis.barh(list(bars), values, color=colours, log=log)
        axis.bar_label(axis.containers[0], [f" {v:,.0f}" if v >= 100 else f" {v:.3g}" for v in values], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
    draw_stages(axes.flat[3], row_of(report, "one volume"))
    m = report["machine"]
    figure.suptitle(f"python -m bench data, {m['usable_cores']} cores, {m['cpu']}, {report['device']}", fontsize=11)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130)


def draw_stages(axis: Any, row: dict[str, Any] | None) -> None:
    """One bar of a volume's seconds, stage after stage."""
    axis.set_title("fastsrgan, seconds of one volume", fontsize=10)
    if row is None:
        axis.set_axis_off()
        return
    left = 0.0
    for stage, seconds in row["stages"].items():
        axis.barh([""], [seconds], left=left, color=STAGE_COLOURS[stage], label=f"{stage} {seconds * 1e3:.0f} ms")
        left += seconds
    axis.legend(fontsize=8)
    axis.tick_params(labelsize=8)
