"""HTML made of elements whose text is always escaped; what is not ``Html`` is text, whoever wrote it.

Line charts as inline SVG: colours come from the page's style sheet, so they follow light and dark.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastsrgan.pictures.axes import axis_range

VOID = {"br", "img", "input", "meta"}
# Controls that HTML forbids, and halves of surrogate pairs, which file names may hold and UTF-8 cannot.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class Html(str):
    """Markup; only ``el``, ``join`` and this package's own files make it."""


def text(value: object) -> Html:
    """Any value as text, escaped for elements and for quoted attributes."""
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", str(value))))


def el(tag: str, *children: object, **attributes: object) -> Html:
    """``el("a", "x", href="y", class_="z", data_path="p")``: children that are no Html are escaped, None is left out.

    A trailing underscore of an attribute's name is dropped, others become ``-``; True gives a bare attribute.
    """
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.removesuffix("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{text(value)}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if tag in VOID else f"{opening}{join(*children)}</{tag}>")


def join(*children: object) -> Html:
    """Elements and texts one after the other; lists are taken apart, None is left out."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(*child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else text(child))
    return Html("".join(parts))


def scrolled(head: object, rows: object, **attributes: object) -> Html:
    """A table of one row of headings and rows, which scrolls where it is wider than the page."""
    return el("div", el("table", el("thead", head), el("tbody", rows), **attributes), class_="scroll")


def data_block(identifier: str, value: Any) -> Html:
    """JSON inside a page: nothing in it can end the element, and any string survives, halves of surrogates too."""
    plain = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for sign in "<>&":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" id="{text(identifier)}">{plain}</script>')


def source_hash(source: str) -> str:
    """What a content security policy calls an inline script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def pointer(*keys: object) -> str:
    """JSON pointer (RFC 6901) to a place in the page's facts."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def number(value: Any, path: str, *, digits: int = 4, signed: bool = False) -> Html:
    """A figure of the facts: rounded to ``digits`` significant ones, with its full value and its place in the facts."""
    if value is None:
        return el("span", "–", class_="none", data_path=path)
    return el("data", shown(value, digits, signed), value=json.dumps(value), data_path=path)


def shown(value: float, digits: int = 4, signed: bool = False) -> str:
    """A number as people read it: 31.25, 0.9617, 1 484 329, +0.096; large ones without digits after the point."""
    sign = "+" if signed and value > 0 else ""
    if isinstance(value, int) or abs(value) >= 10**digits:
        return sign + f"{round(value):,}".replace(",", "\u202f")
    return sign + f"{value:.{digits}g}"


WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 70, 12, 14, 40
LETTER = 6.7  # pixels of a digit at an axis
COLOURS = 6  # of the style sheet; further lines begin again
MARKED = 40  # a line of at most so many points shows them


@dataclass(frozen=True)
class Line:
    """A named series; points whose y is None are gaps. ``number`` is its colour, that of its place by default."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False
    number: int | None = None


def line_chart(title: str, lines: Sequence[Line], x_label: str, y_label: str = "", *, named: bool = False) -> Html:
    """A figure with its caption, a legend where there are several lines or they are ``named`` in any case, and axes at
    round numbers."""
    lines = [line for line in lines if any(y is not None for y in line.y)]
    if not lines:
        return Html("")
    xs = [x for line in lines for x, y in zip(line.x, line.y, strict=True) if y is not None]
    ys = [y for line in lines for y in line.y if y is not None]
    y_range = axis_range(min(ys), max(ys))
    x_range = (min(xs), max(xs)) if min(xs) < max(xs) else axis_range(xs[0], xs[0])
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(*y_range)
    if all(float(x).is_integer() for x in xs):  # epochs, updates
        x_ticks = [x for x in x_ticks if float(x).is_integer()] or x_ticks
    digits = next((d for d in range(5, 12) if len({shown(v, d) for v in y_ticks}) == len(y_ticks)), 12)
    marks = [(value, shown(value, digits)) for value in y_ticks]
    left = max(LEFT, round((28 if y_label else 10) + LETTER * max(len(told) for _, told in marks)))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return left + across * (WIDTH - left - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(at, left, x_ticks, marks, x_range, y_range, x_label, y_label)]
    numbers = [i if line.number is None else line.number for i, line in enumerate(lines)]
    parts += [_line(line, i, at) for i, line in zip(numbers, lines, strict=True)]
    told = el("title", f"{title}: {', '.join(line.name for line in lines)} against {x_label}")
    drawing = el("svg", told, parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", class_="chart")
    legend = [
        el("li", el("span", class_=f"swatch s{i % COLOURS}"), line.name) for i, line in zip(numbers, lines, strict=True)
    ]
    keys = el("ul", legend, class_="legend") if named or len(lines) > 1 else None
    return el("figure", el("figcaption", title), keys, drawing, class_="plot")


def _line(line: Line, index: int, at) -> Html:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append(at(x, y))
    index %= COLOURS
    kind = f"line s{index}" + (f" dashed d{index % 2}" if line.dashed else "")
    few = sum(map(len, runs)) <= MARKED and not line.dashed
    paths, dots = [], []
    for run in runs:
        if len(run) > 1:
            paths.append(el("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in run), class_=kind))
        for x, y in run if few or len(run) == 1 else ():
            dots.append(el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.6, class_=f"dot s{index}"))
    return join(paths, dots)


def _axes(at, left: int, x_ticks, marks, x_range, y_range, x_label: str, y_label: str) -> Html:
    parts = []
    for value, told in marks:
        _, y = at(x_range[0], value)
        parts.append(el("line", x1=left, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(el("text", told, x=left - 7, y=f"{y + 4:.1f}", class_="tick end"))
    for value in x_ticks:
        x, y = at(value, y_range[0])
        parts.append(el("text", shown(value, 5), x=f"{x:.1f}", y=f"{y + 16:.1f}", class_="tick middle"))
    middle = left + (WIDTH - left - RIGHT) / 2
    parts.append(el("text", x_label, x=middle, y=HEIGHT - 6, class_="tick middle"))
    if y_label:
        turned = f"translate(13 {(HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)"
        parts.append(el("text", y_label, transform=turned, class_="tick middle"))
    return join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers inside [low, high], at most six; the number itself where the two are one."""
    if not low < high:
        return [low]
    size = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(size * f for f in (1, 2, 2.5, 5, 10) if (high - low) / (size * f) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]
