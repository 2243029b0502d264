"""A Bland-Altman picture: of two results' figures the difference against the mean, subject by subject."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsrgan.core.files import atomic_write
from fastsrgan.io.output_place import BY_EVALUATE
from fastsrgan.pictures.axes import MINUS, axis_range
from fastsrgan.pictures.figure import as_written, new_figure

POINT, LINE = "#0072b2", "#595959"
LIMITS = 1.96  # sample standard deviations
WORDS = 0.06  # of a panel's height, between two lines with words


def bland_altman(
    path: str | os.PathLike, panels: Sequence[tuple[str, Sequence[float], Sequence[float]]], names: tuple[str, str]
) -> Path:
    """Write a PNG with a panel for each (heading, figures of the first result, of the second): a point per subject.

    The lines are the mean difference (second minus first) and, for two subjects or more, the limits of agreement, 1.96
    sample standard deviations beside it (Bland and Altman 1986). Raises ResourceError when it cannot be written.
    """
    columns = min(2, max(len(panels), 1))
    rows = -(-max(len(panels), 1) // columns)
    figure = new_figure(figsize=(5.2 * columns, 3.6 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (heading, first, second) in zip(axes, panels, strict=False):
        a, b = np.asarray(first, float), np.asarray(second, float)
        apart = b - a
        panel.scatter((a + b) / 2, apart, s=22, color=POINT, zorder=3)
        panel.axhline(0, color="#c8c8c8", linewidth=0.8)
        mean = float(apart.mean())
        lines, half = [("mean", mean, "-")], 0.0
        if len(apart) > 1:
            half = LIMITS * float(apart.std(ddof=1))
            lines += [("+1.96 sd", mean + half, "--"), ("-1.96 sd", mean - half, "--")]
        for _, at, style in lines:
            panel.axhline(at, color=LINE, linewidth=1.1, linestyle=style)
        panel.margins(0.12)
        bottom, top = panel.get_ylim()
        bottom, top = axis_range(bottom, top, float(np.abs([a, b]).max()))
        panel.set_ylim(bottom, top)
        words = [(f"{name} {at:+.3g}", at) for name, at, _ in lines]
        if len(lines) > 1 and half < WORDS * (top - bottom):  # they would lie on one another
            words = [(f"mean ± 1.96 sd\n{mean:+.3g} ± {half:.3g}", mean)]
        for said, at in words:
            panel.annotate(
                said.replace("-", MINUS), (1.0, at), xycoords=("axes fraction", "data"), xytext=(3, 0),
                textcoords="offset points", fontsize=8, va="center", color=LINE,
            )  # fmt: skip
        panel.set_title(heading, fontsize=10)
        panel.set_xlabel("mean of the two", fontsize=9)
        panel.set_ylabel("difference", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)  # of numbers of six digits more would run into one another
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    figure.suptitle(f"{names[1]} minus {names[0]}", fontsize=11)
    as_written(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": BY_EVALUATE})
    return Path(path)
