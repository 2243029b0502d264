"""A picture of a report of dense inference: time against step (the paper's figure 7), stitching alone, peak memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from bench.infer_page import OURS, affine_fit, against_step, rows_of, sides
from bench.plot_step import bars
from fastsrgan.core.files import atomic_write
from fastsrgan.errors import InputError

COLOUR = "black"


def plot(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the picture in the form that its suffix names. Raises InputError when no row has times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any("seconds_median" in row for row in report["rows"] if "kind" in row):
        raise InputError(path, "no row has times to draw", "measure without --limit first")
    figure = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    draw_steps(axes[0, 0], report, "whole inference", fits=True)
    draw_steps(axes[0, 1], report, "stitching alone")
    row = max(rows_of(report, "whole inference"), key=lambda r: len(r["peers"]), default=None)
    found = sides(row) if row else {}
    title = f"whole inference, step {row['step']}" if row else ""
    bars(axes[1, 0], f"{title}: s", {k: v["seconds_median"] for k, v in found.items()})
    memory = {k: v["peak_bytes"] / 2**20 for k, v in found.items() if "peak_bytes" in v}
    bars(axes[1, 1], f"{title}: peak memory, MiB", memory)
    m = report["machine"]
    figure.suptitle(f"python -m bench infer, {m['threads']} threads, {m['cpu']}, {report['device']}", fontsize=11)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130)


def draw_steps(axis: Any, report: dict[str, Any], kind: str, fits: bool = False) -> None:
    """Seconds against step, both logarithmic; with the affine fit in step^-3 where asked."""
    lines = against_step(report, kind)
    rows = rows_of(report, kind)
    axis.set_title(f"{kind}, {' x '.join(map(str, rows[0]['shape']))}" if rows else kind, fontsize=10)
    if not rows:
        axis.set_axis_off()
        return
    for name, points in lines.items():
        if len(points) < 2:
            continue
        colour = COLOUR if name == OURS else None
        (line,) = axis.plot(list(points), list(points.values()), "o", label=name, color=colour)
        fit = affine_fit(points) if fits else None
        x = np.geomspace(min(points), max(points), 100)
        if fit is not None and (fit(x) > 0).all():
            label = f"{fit.base:.2g} + {fit.scale:.2g} / step$^3$, R$^2$ {fit.r2:.3f}"
            axis.plot(x, fit(x), color=line.get_color(), linewidth=1, label=label)
        else:
            axis.plot(list(points), list(points.values()), color=line.get_color(), linewidth=1, alpha=0.5)
    axis.set(xscale="log", yscale="log", xlabel="step, voxels", ylabel="s")
    axis.set_xticks([row["step"] for row in rows], [str(row["step"]) for row in rows])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    axis.tick_params(labelsize=8)
