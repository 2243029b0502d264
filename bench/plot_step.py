"""A picture of a step report: time and peak memory of every side, one row of panels per case."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastsrgan.core.files import atomic_write
from fastsrgan.errors import InputError

OURS, THEIRS = "#1f77b4", "#b0b0b0"


def plot(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the picture in the form that its suffix names. Raises InputError when no row has times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if "seconds_median" in row]
    if not rows:
        raise InputError(path, "no row has times to draw", "measure the steps first: python -m bench step")
    figure = Figure(figsize=(12, 2.4 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (left, right) in zip(rows, figure.subplots(len(rows), 2, squeeze=False), strict=True):
        sides = {"fastsrgan": row, **{k: v for k, v in row["peers"].items() if "seconds_median" in v}}
        bars(left, f"{row['name']}: ms", {k: 1e3 * v["seconds_median"] for k, v in sides.items()})
        bars(right, "peak memory, MB", {k: v["peak_bytes"] / 1e6 for k, v in sides.items() if "peak_bytes" in v})
    m = report["machine"]
    figure.suptitle(f"python -m bench step, {m['threads']} threads, {m['cpu']}, {report['device']}", fontsize=11)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130)


def bars(axis: Any, title: str, values: dict[str, float]) -> None:
    """One bar per side, longest last."""
    axis.set_title(title, fontsize=9)
    if not values:
        axis.set_axis_off()
        return
    axis.barh(list(values), list(values.values()), color=[OURS if k == "fastsrgan" else THEIRS for k in values])
    axis.bar_label(axis.containers[0], [f" {v:.4g}" if v < 1000 else f" {v:,.0f}" for v in values.values()], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.tick_params(labelsize=8)
