"""One picture of a result: planes of every image side by side, with a detail and the segmentation's outline.

The planes lie across the slices of the scan, where its thickness is seen, and go through the place where SR and spline
differ most inside the segmentation or the head; the detail is where they differ most in such a plane. All panels are
drawn at one scale in mm and in one intensity window; nothing is sharpened or smoothed but by the display's
interpolation between pixels.
"""

from __future__ import annotations

import functools
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from fastsrgan.core.files import atomic_write
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.pictures.planes import (
    ENDS,
    Cut,
    change_in,
    cuts,
    detail,
    inside_of,
    largest_change,
    slice_edges,
    slices_of,
    white,
)
from fastsrgan.volume.geometry import Volume

SIDES = {
    "radiological": "radiological: patient's left on the right",
    "neurological": "neurological: patient's left on the left",
}
DETAIL_OF = "sagittal"  # where nothing says in which plane more changes
DETAIL_ZOOM = 3.0
DETAIL_ASPECT = 0.72  # height over width
MARK = "#facc15"  # of the slice
FONT = "DejaVu Sans"  # comes with matplotlib: the picture looks the same everywhere
# In pixels of a picture 2000 wide.
LEGEND = 220  # its width but for the name of the structure
LETTER = 0.57  # mean width of a letter over its size
BOLDER = 1.2  # of bold ones over others
PAGE_MARGIN, GAP, GUTTER, TITLE, HEADER, FOOTER, STATUS = 30, 12, 46, 74, 138, 64, 38
STRIP = 40  # beside the panels, for slices
LINE = 30  # of the lines below, from one to the next
SMALL = 22  # their size
UNITS, JOINED = "%|mm|mL|dB", "\u00a0"
ABSENT = "□"  # in place of what the font has no form for, which Matplotlib would warn of
# Colours of the page, its texts, the two outlines (what is pointed at has the segmentation's), the detail's frame.
PAGE, TEXT, FAINT, SEG, TRUTH, FRAME = "#000000", "#f4f4f5", "#a8a8b0", "#22d3ee", "#fbbf24", "#f4f4f5"
LIGHTS = {"green": "#4ade80", "yellow": "#fbbf24", "red": "#f87171"}


@dataclass(frozen=True)
class Column:
    """One image of the picture.

    volume : what is shown
    title, caption : text above it; the caption may have several lines
    nearest : show the voxels as they are instead of smoothly interpolated
    accent : set the title in the accent colour
    outlines : draw the outlines of the picture's masks over it
    """

    volume: Volume
    title: str
    caption: str = ""
    nearest: bool = False
    accent: bool = False
    outlines: bool = False


# Image -> title of its column, in the order of the columns; "seg" is the SR with the outlines.
TITLES = {
    "low": "Low resolution",
    "spline": "Cubic spline",
    "linear": "Best linear",
    "sr": "fastsrgan",
    "truth": "Truth",
    "seg": "Segmentation",
}


def result_columns(volumes: Mapping[str, Volume], captions: Mapping[str, str] | None = None) -> list[Column]:
    """The columns of a result's picture for those of ``TITLES`` that are there; "sr" always is.

    ``captions`` stand under the titles (see ``evaluate.figures.captions``); low resolution, SR and truth say their
    voxel size where none is given.
    """
    known = {name: _spacing(volumes[name]) for name in ("low", "sr", "truth") if name in volumes}
    known |= {"low": f"{known['low']}\nvoxels as acquired"} if "low" in known else {}
    words = known | {name: text for name, text in (captions or {}).items() if text}
    made = []
    for name, title in ((name, title) for name, title in TITLES.items() if name in volumes):
        ways = {"nearest": name == "low", "accent": name in ("sr", "seg"), "outlines": name == "seg"}
        made.append(Column(volumes["sr" if name == "seg" else name], title, words.get(name, ""), **ways))
    return made


def result_options(volumes: Mapping[str, Volume]) -> dict[str, Any]:
    """Options of ``planes`` for the same volumes, of which "label" is the truth of "seg"."""
    changed = (volumes["sr"], volumes["spline"]) if "spline" in volumes else None
    return {
        "reference": volumes.get("truth", volumes["sr"]),
        "masks": (volumes.get("seg"), volumes.get("label")),
        "changed": changed,
        "scan": volumes.get("low"),
    }


def result_figure(
    path: str | os.PathLike, volumes: Mapping[str, Volume], captions: Mapping[str, str] | None = None, **options: Any
) -> Path:
    """Write a result's PNG: scan, spline, best linear estimate, SR, truth and segmentation, as far as they are there.

    ``volumes`` as for ``result_columns``, in one intensity unit, each on its own grid; further options and what is
    raised as in ``planes``.
    """
    return planes_figure(path, result_columns(volumes, captions), **{**result_options(volumes), **options})


def planes_figure(path: str | os.PathLike, columns: Sequence[Column], **options: Any) -> Path:
    """Write what ``planes`` draws as PNG. Options and errors are its own; ResourceError where it cannot be written."""
    return _drawn(columns, **options).write(Path(path))


def planes(columns: Sequence[Column], **options: Any) -> Any:
    """A matplotlib Figure with one column per image and one row per plane, the last row enlarging a part of one.

    Parameters
    ----------
    reference : decides the pixel size, the extent and, with the masks, the intensity window (0 to ``white``)
    masks : segmentation and label, outlined at 0.5 over the columns that ask for it
    changed : two images, SR and spline: the planes go through the place where they differ most inside the segmentation,
        the label, or the head, without the rim (``inside_of``), and the detail is where they do in one of the planes;
        default the reference's centre, and where the reference varies most
    scan : where its slices are thick only the planes across them are drawn; one is marked beside its column, the first
    title, footer : text above and below, may be empty; what is too long for a line below goes on in the next
    structure : what the segmentation is of, for the legend
    status : a traffic light ("green", "yellow", "red"), and text that stands in its colour above the footer, whole
    at_mm : world position (R, A, S) of the planes instead
    convention : "radiological" (the patient's left on the right) or "neurological"
    width_px : width of the picture; everything scales with it

    Raises InputError for a reference without positive voxels, UsageError for an unknown convention, ResourceError when
    matplotlib is missing.
    """
    return _drawn(columns, **options).figure


def _drawn(
    columns: Sequence[Column],
    *,
    reference: Volume,
    masks: tuple[Volume | None, Volume | None] = (None, None),
    changed: tuple[Volume, Volume] | None = None,
    scan: Volume | None = None,
    title: str = "",
    footer: str = "",
    structure: str = "segmentation",
    status: tuple[str, str] | None = None,
    at_mm: Sequence[float] | None = None,
    convention: str = "radiological",
    width_px: int = 2000,
) -> _Page:
    if convention not in SIDES:
        raise UsageError("convention", f"{convention!r} is not allowed", f"one of {', '.join(SIDES)}")
    inside = None if changed is None else inside_of(changed[0], *masks)
    if at_mm is None and changed is not None and inside is not None:
        at_mm = largest_change(*changed, inside)
        where = "planes through the largest change" if at_mm else ""
        footer = " · ".join(filter(None, (footer, where)))
    thick = None if scan is None else slices_of(scan)
    rows = [cut for cut in cuts(reference, at_mm) if thick is None or cut.axis != thick[0]]
    widest = max(cut.size[0] for cut in rows)
    width = widest / DETAIL_ZOOM
    parts = {cut.name: detail(cut, width, width * DETAIL_ASPECT, reference, changed, inside) for cut in rows}
    source = next((cut for cut in rows if cut.name == DETAIL_OF), rows[-1])
    if changed is not None:
        source = max(rows, key=lambda cut: change_in(parts[cut.name], changed, inside))
    zoomed = parts[source.name]
    outlined = any(column.outlines for column in columns)
    marked = thick[0] if thick is not None and columns[0].nearest and columns[0].volume is scan else None
    strips = (STRIP * any(cut.up == marked for cut in rows), STRIP * any(cut.right == marked for cut in rows))
    taken = strips[0] + (LEGEND + SMALL * LETTER * len(structure) if outlined else 0)
    below = _Below.of(footer, SIDES[convention], status, taken, strips[0])
    page = _Page([*rows, zoomed], widest, len(columns), title, below, convention == "radiological", width_px, strips)
    page.texts(columns, title)
    if outlined:
        page.legend(masks, structure)
    top = white(reference, *masks)
    for i, column in enumerate(columns):
        for j, cut in enumerate(page.rows):
            axes = page.panel(i, j)
            image = cut.sample(column.volume, column.nearest)
            place = {"extent": cut.extent, "origin": "lower", "vmin": 0, "vmax": top}
            axes.imshow(image, "gray", interpolation="nearest" if column.nearest else "bicubic", **place)
            if column.outlines:
                _outline(axes, cut, masks, page.px(2.4 if cut is zoomed else 1.3))
            if cut is source:
                page.frame(axes, zoomed)
            if i == 0 and marked is not None and scan is not None and thick is not None:
                page.slice(axes, cut, scan, *thick)
            page.finish(axes, cut, letters=i == 0)
    as_written(page.figure)
    return page


def new_figure(what: str = "picture", **options: Any) -> Any:
    """A matplotlib Figure that needs no display. Raises ResourceError, about ``what``, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResourceError(what, "matplotlib is not installed", "pip install matplotlib") from error
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def as_written(figure: Any) -> None:
    """Make every text of a matplotlib Figure stand as it was given: a name with two dollar signs is no formula, and
    what the font has no form for is a box, without a warning on the terminal."""
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
        if (words := text.get_text()) and not words.isascii():
            text.set_text("".join(c if c == "\n" or _has_form(c) else ABSENT for c in words))


@functools.cache
def _has_form(letter: str) -> bool:
    from matplotlib.font_manager import findfont, get_font

    return bool(get_font(findfont(FONT)).get_char_index(ord(letter)))


@dataclass(frozen=True)
class _Below:
    """The lines below the panels: those of the traffic light in its colour, then the footer's."""

    light: str
    status: list[str]
    footer: list[str]

    @classmethod
    def of(cls, footer: str, side: str, status: tuple[str, str] | None, taken: float, strip: int = 0) -> _Below:
        """Broken between words to the width of the page without the strip, of the footer without all that is taken."""
        light, words = status or ("", "")
        room = 2000 - 2 * PAGE_MARGIN - GUTTER
        return cls(
            light, cls._lines(words, room - strip), cls._lines(f"{footer} · {side}" if footer else side, room - taken)
        )

    @staticmethod
    def _lines(text: str, room: float) -> list[str]:
        whole = re.sub(f"(?<=[0-9]) (?=(?:{UNITS})(?![a-z]))", JOINED, text)  # a number stands beside its unit
        lines = textwrap.wrap(whole, max(int(room / (SMALL * LETTER)), 20), break_on_hyphens=False)
        return [line.replace(JOINED, " ") for line in lines]

    @property
    def height(self) -> int:
        """Beyond a footer of one line."""
        light = STATUS + LINE * (len(self.status) - 1) if self.status else 0
        return light + LINE * (len(self.footer) - 1)


class _Page:
    """Where everything is on the picture; lengths in pixels, from its top left corner. ``strips``: left of the panels
    and below each, for what is said of slices."""

    def __init__(
        self,
        rows: list[Cut],
        widest_mm: float,
        columns: int,
        title: str,
        below: _Below,
        mirrored: bool,
        width_px: int,
        strips: tuple[int, int] = (0, 0),
    ) -> None:
        self.rows, self.mirrored, self.width, self.unit = rows, mirrored, width_px, width_px / 2000
        self.below, self.gap = below, GAP + strips[1]
        self.x0 = self.px(PAGE_MARGIN + GUTTER + strips[0])
        room = width_px - self.x0 - self.px(PAGE_MARGIN + (columns - 1) * GAP)
        self.column = room / columns
        self.scale = self.column / widest_mm  # pixels per mm
        self.zoom = self.column / rows[-1].size[0]
        self.top = self.px(HEADER + PAGE_MARGIN + TITLE * bool(title))
        self.heights = [cut.size[1] * (self.zoom if cut is rows[-1] else self.scale) for cut in rows]
        gaps = (len(rows) - 1) * self.gap + strips[1] + FOOTER + below.height + PAGE_MARGIN
        self.height = self.top + sum(self.heights) + self.px(gaps)
        self.figure = new_figure(figsize=(width_px / 100, self.height / 100), dpi=100, facecolor=PAGE)

    def px(self, length: float) -> float:
        """A length given for a picture 2000 pixels wide."""
        return length * self.unit

    def panel(self, column: int, row: int) -> Any:
        """Axes for one image."""
        height, bottom = self.heights[row], self.height - self._top(row) - self.heights[row]
        across, upwards = (self._left(column), self.column), (bottom, height)
        (x, width), (y, tall) = (n / self.width for n in across), (n / self.height for n in upwards)
        return self.figure.add_axes((x, y, width, tall), facecolor="#000000")

    def finish(self, axes, cut: Cut, letters: bool) -> None:
        """Limits, direction of the right-left axis, and the letters at its ends."""
        left, right, bottom, top = cut.extent
        mirrored = self.mirrored and cut.right == 0
        axes.set(xlim=(right, left) if mirrored else (left, right), ylim=(bottom, top), aspect="auto")
        axes.set_axis_off()
        if letters and cut is not self.rows[-1]:
            ends = ENDS[cut.right][::-1] if mirrored else ENDS[cut.right]
            for x, text, side in ((0.05, ends[0], "left"), (0.95, ends[1], "right")):
                place = {"transform": axes.transAxes, "ha": side, "va": "top"}
                axes.text(x, 0.96, text, color=FAINT, **place, **self._font(24))

    def frame(self, axes, part: Cut) -> None:
        """Show where the detail is taken from."""
        from matplotlib.patches import Rectangle

        left, _, bottom, _ = part.extent
        axes.add_patch(Rectangle((left, bottom), *part.size, fill=False, ec=FRAME, lw=self.px(1.4) * 0.72))

    def slice(self, axes, cut: Cut, scan: Volume, through: int, thickness_mm: float) -> None:
        """Beside or below a plane a bar as long as one slice is thick, at its place, and the borders of the others.

        A plane along the slices has none. Nothing lies on the image: words on tissue cannot be read.
        """
        if through not in (cut.right, cut.up):
            return
        across = through == cut.right
        at = [0.0, 0.0, 0.0]
        left, right, bottom, top = cut.extent
        low, high = (left, right) if across else (bottom, top)
        at[cut.axis] = cut.at
        # The edge that is on the left, or the lower one.
        flipped = not across and self.mirrored and cut.right == 0
        edge = bottom if across else right if flipped else left
        outwards = self.unit / (self.zoom if cut is self.rows[-1] else self.scale) * (1 if flipped else -1)
        at[cut.up if across else cut.right] = edge
        borders = slice_edges(scan, through, at, low, high)
        if len(borders) < 2:
            return
        chosen = (len(borders) - 1) // 2
        pair = borders[chosen : chosen + 2]
        marker = {"marker": "|" if across else "_", "ls": "", "ms": self.px(10) * 0.72, "mew": 0.8}
        bar = {"lw": self.px(5) * 0.72, "solid_capstyle": "butt"}
        for line, colour, how in ((borders, FAINT, marker), (pair, MARK, bar)):
            x = np.full(len(line), edge + 8 * outwards)
            axes.plot(*((line, x) if across else (x, line)), color=colour, clip_on=False, **how)
        middle, beside = float(pair.mean()), edge + 15 * outwards
        place = {"ha": "center", "va": "top"} if across else {"ha": "right", "va": "center", "rotation": 90}
        at_text = (middle, beside) if across else (beside, middle)
        axes.text(*at_text, f"slice {thickness_mm:.3g} mm", color=MARK, **place, **self._font(SMALL))

    def texts(self, columns: Sequence[Column], title: str) -> None:
        """Title, captions of columns and rows, the light's lines and the footer."""
        x0 = self.x0
        if title:
            size = self._fitting(38, [title], (self.width - x0 - self.px(PAGE_MARGIN)) / BOLDER)
            self._text(x0, self.px(PAGE_MARGIN), title, size, TEXT, va="top", weight="bold")
        head = self.top - self.px(HEADER)
        caption = self._fitting(24, (line for c in columns for line in c.caption.splitlines()), self.column)
        for i, column in enumerate(columns):
            middle = self._left(i) + self.column / 2
            colour = SEG if column.accent else TEXT
            place = {"ha": "center", "va": "top"}
            self._text(middle, head, column.title, 34, colour, weight="bold", **place)
            self._text(middle, head + self.px(52), column.caption, caption, FAINT, linespacing=1.35, **place)
        for j, cut in enumerate(self.rows):
            zoomed = cut is self.rows[-1]
            name = f"detail × {self.zoom / self.scale:.0f}" if zoomed else cut.name
            middle = self._top(j) + self.heights[j] / 2
            x = self.px(PAGE_MARGIN + GUTTER * 0.35)
            self._text(x, middle, name, 24, FAINT, ha="center", va="center", rotation=90)
        y = self.height - self.px(PAGE_MARGIN)
        for i, line in enumerate(reversed(self.below.footer)):
            self._text(x0, y - i * self.px(LINE), line, SMALL, FAINT, va="bottom")
        y -= self.px(STATUS + LINE * (len(self.below.footer) - 1))
        for i, line in enumerate(reversed(self.below.status)):
            self._text(x0, y - i * self.px(LINE), line, SMALL, LIGHTS[self.below.light], va="bottom")

    def _fitting(self, size: float, lines: Iterable[str], room: float) -> float:
        """The size of text, at most ``size``, at which its longest line fits into so many pixels."""
        longest = max((len(line) for line in lines), default=0)
        return min(size, room / (self.px(1) * LETTER * max(longest, 1)))

    def legend(self, masks: tuple[Volume | None, Volume | None], structure: str) -> None:
        """What the outlines are of, at the right of the footer."""
        from matplotlib.lines import Line2D

        y = self.height - self.px(PAGE_MARGIN)
        entries = [(structure, SEG, masks[0]), ("truth", TRUTH, masks[1])]
        width = self.px(5) * 0.72
        lines = [Line2D([], [], color=c, lw=width, label=name) for name, c, mask in entries if mask is not None]
        corner = (1 - self.px(PAGE_MARGIN) / self.width, 1 - y / self.height)
        if lines:
            self.figure.legend(
                handles=lines, loc="lower right", bbox_to_anchor=corner, ncols=2, frameon=False, labelcolor=FAINT,
                prop={"family": FONT, "size": self.px(SMALL) * 0.72}, borderpad=0, borderaxespad=0, handlelength=1.4,
            )  # fmt: skip

    def write(self, path: Path) -> Path:
        """Save atomically; the same picture gives the same bytes."""
        with atomic_write(path) as temporary:
            self.figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
        return path

    def _left(self, column: int) -> float:
        return self.x0 + column * (self.column + self.px(GAP))

    def _top(self, row: int) -> float:
        return self.top + sum(self.heights[:row]) + row * self.px(self.gap)

    def _font(self, size: float) -> dict[str, Any]:
        return {"family": FONT, "fontsize": self.px(size) * 0.72}

    def _text(self, x: float, y: float, text: str, size: float, colour: str, **options: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, color=colour, **self._font(size), **options)


def _outline(axes, cut: Cut, masks: tuple[Volume | None, Volume | None], width_px: float) -> None:
    """The label below and the segmentation on top: where they agree only one line is seen."""
    for mask, colour in ((masks[1], TRUTH), (masks[0], SEG)):
        if mask is None:
            continue
        # Rounds the corners of voxels; one voxel alone keeps its outline (its peak stays above 0.5).
        values = ndimage.gaussian_filter(cut.sample(mask, nearest=True), 0.5)
        if (values > 0.5).any() and not (values > 0.5).all():
            axes.contour(cut.u, cut.v, values, levels=[0.5], colors=[colour], linewidths=[max(width_px, 1.0) * 0.72])


def _spacing(volume: Volume) -> str:
    sizes = [f"{s:.4g}" for s in volume.spacing]
    return " × ".join(sizes) + " mm"
