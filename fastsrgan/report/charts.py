"""Line charts as inline SVG: colours come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastsrgan.report.html import Html, el, join, shown

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 70, 12, 14, 40
COLOURS = 6  # of the style sheet; further lines begin again
MARKED = 40  # a line of at most so many points shows them


@dataclass(frozen=True)
class Line:
    """A named series; points whose y is None are gaps."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str = "") -> Html:
    """A figure with its caption, a legend where there are several lines, and axes at round numbers."""
    lines = [line for line in lines if any(y is not None for y in line.y)]
    if not lines:
        return Html("")
    xs = [x for line in lines for x, y in zip(line.x, line.y, strict=True) if y is not None]
    ys = [y for line in lines for y in line.y if y is not None]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_range, y_range = _range(xs, []), _range(ys, y_ticks)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(at, x_ticks, y_ticks, x_range, y_range, x_label, y_label)]
    parts += [_line(line, i, at) for i, line in enumerate(lines)]
    drawing = el(
        "svg",
        el("title", f"{title}: {', '.join(line.name for line in lines)} against {x_label}"),
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
    )
    legend = [el("li", el("span", class_=f"swatch s{i % COLOURS}"), line.name) for i, line in enumerate(lines)]
    keys = el("ul", legend, class_="legend") if len(lines) > 1 else None
    return el("figure", el("figcaption", title), keys, drawing, class_="plot")


def _line(line: Line, index: int, at) -> Html:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append(at(x, y))
    index %= COLOURS
    kind = f"line s{index}" + (" dashed" if line.dashed else "")
    paths = [
        el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in run), class_=kind) for run in runs if len(run) > 1
    ]
    few = sum(map(len, runs)) <= MARKED and not line.dashed
    dots = [
        el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, class_=f"dot s{index}")
        for run in runs
        for x, y in run
        if few or len(run) == 1
    ]
    return join(paths, dots)


def _axes(at, x_ticks, y_ticks, x_range, y_range, x_label: str, y_label: str) -> Html:
    parts = []
    for value in y_ticks:
        _, y = at(x_range[0], value)
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(el("text", shown(value, 5), x=LEFT - 7, y=f"{y + 4:.1f}", class_="tick end"))
    for value in x_ticks:
        x, y = at(value, y_range[0])
        parts.append(el("text", shown(value, 5), x=f"{x:.1f}", y=f"{y + 16:.1f}", class_="tick middle"))
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(el("text", x_label, x=middle, y=HEIGHT - 6, class_="tick middle"))
    if y_label:
        parts.append(
            el(
                "text",
                y_label,
                transform=f"translate(13 {(HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)",
                class_="tick middle",
            )
        )
    return join(parts)


def _range(values: Sequence[float], marks: Sequence[float]) -> tuple[float, float]:
    low, high = min([*values, *marks]), max([*values, *marks])
    if low == high:
        half = abs(low) / 2 or 1.0
        return low - half, high + half
    return low, high


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers inside [low, high], at most ``most`` and one; the number itself where the two are one."""
    if not low < high:
        return [low]
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * f for f in (1, 2, 2.5, 5, 10) if (high - low) / (size * f) <= most)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]
