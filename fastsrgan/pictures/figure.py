"""One picture of a result: three planes of every image side by side, with a detail and the segmentation's outline.

All panels are drawn at one scale in mm and in one intensity window; nothing is sharpened or smoothed but by the
display's interpolation between pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import ndimage

from fastsrgan.core.files import atomic_write
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.pictures.planes import ENDS, Cut, brightness, cuts, detail
from fastsrgan.volume.geometry import Volume

CONVENTIONS = ("radiological", "neurological")
DETAIL_OF = "sagittal"
DETAIL_ZOOM = 3.0
DETAIL_ASPECT = 0.72  # height over width
FONT = "DejaVu Sans"  # comes with matplotlib: the picture looks the same everywhere
# In pixels of a picture 2000 wide.
PAGE_MARGIN, GAP, GUTTER, TITLE, HEADER, FOOTER = 30, 12, 46, 74, 138, 64


@dataclass(frozen=True)
class Theme:
    """Colours of the page, its texts, the two outlines and the frame of the detail."""

    page: str
    text: str
    faint: str
    accent: str
    seg: str = "#22d3ee"
    truth: str = "#fbbf24"
    frame: str = "#f4f4f5"


DARK = Theme(page="#000000", text="#f4f4f5", faint="#a8a8b0", accent="#22d3ee")
LIGHT = Theme(page="#ffffff", text="#18181b", faint="#52525b", accent="#0e7490")


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


def demo_figure(
    path: str | os.PathLike,
    *,
    low_res: Volume,
    spline: Volume,
    sr: Volume,
    truth: Volume,
    seg: Volume | None = None,
    label: Volume | None = None,
    captions: Mapping[str, str] | None = None,
    **options: Any,
) -> Path:
    """Write the demo's PNG: low resolution, cubic spline, SR, truth, and with ``seg`` the outlines over the SR.

    Parameters
    ----------
    low_res, spline, sr, truth : images in one intensity unit, each on its own grid
    seg, label : segmentation and its truth, masks or probabilities (outlined at 0.5)
    captions : text above ``spline``, ``sr`` and ``seg``, see ``evaluate.figures.captions``
    options : title, footer, at_mm, convention, theme, width_px of ``planes``, which also says what is raised
    """
    words = {"spline": "", "sr": "", "seg": ""} | dict(captions or {})
    columns = [
        Column(low_res, "Low resolution", f"{_spacing(low_res)}\nvoxels as acquired", nearest=True),
        Column(spline, "Cubic spline", words["spline"]),
        Column(sr, "fastsrgan", words["sr"], accent=True),
        Column(truth, "Truth", f"{_spacing(truth)}\nhigh resolution"),
    ]
    if seg is not None:
        columns.append(Column(sr, "Segmentation", words["seg"], accent=True, outlines=True))
    return planes_figure(path, columns, reference=truth, masks=(seg, label), compared=spline, **options)


def planes_figure(path: str | os.PathLike, columns: Sequence[Column], **options: Any) -> Path:
    """Write what ``planes`` draws as PNG. Options and errors are its own; ResourceError where it cannot be written."""
    return _drawn(columns, **options).write(Path(path))


def planes(columns: Sequence[Column], **options: Any) -> Any:
    """A matplotlib Figure with one column per image and one row per plane, the last row enlarging a part of one.

    Parameters
    ----------
    reference : decides the planes, the pixel size, the extent and the intensity window (0 to the 99.9th percentile of
        what is above 0)
    masks : segmentation and label, outlined at 0.5 over the columns that ask for it
    compared : the detail is where this image differs most from the reference (inside the label, if there is one);
        default where the reference varies most
    title, footer : text above and below, may be empty
    at_mm : world position (R, A, S) of the three planes; default near the reference's centre
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
    compared: Volume | None = None,
    title: str = "",
    footer: str = "",
    at_mm: Sequence[float] | None = None,
    convention: str = "radiological",
    theme: Theme = DARK,
    width_px: int = 2000,
) -> _Page:
    if convention not in CONVENTIONS:
        raise UsageError("convention", f"{convention!r} is not allowed", f"one of {', '.join(CONVENTIONS)}")
    rows = cuts(reference, at_mm)
    widest = max(cut.size[0] for cut in rows)
    source = next(cut for cut in rows if cut.name == DETAIL_OF)
    width = widest / DETAIL_ZOOM
    zoomed = detail(source, width, width * DETAIL_ASPECT, reference, compared, masks[1])
    page = _Page([*rows, zoomed], widest, len(columns), bool(title), theme, convention == "radiological", width_px)
    page.texts(columns, title, footer, masks)
    for i, column in enumerate(columns):
        for j, cut in enumerate(page.rows):
            axes = page.panel(i, j)
            smooth = "nearest" if column.nearest else "bicubic"
            image = cut.sample(column.volume, column.nearest)
            axes.imshow(
                image,
                "gray",
                vmin=0,
                vmax=brightness(reference),
                extent=cut.extent,
                origin="lower",
                interpolation=smooth,
            )
            if column.outlines:
                _outline(axes, cut, masks, theme, page.px(2.4 if cut is zoomed else 1.3))
            if cut is source:
                page.frame(axes, zoomed)
            page.finish(axes, cut, letters=i == 0)
    return page


class _Page:
    """Where everything is on the picture; lengths in pixels, from its top left corner."""

    def __init__(
        self, rows: list[Cut], widest_mm: float, columns: int, titled: bool, theme: Theme, mirrored: bool, width_px: int
    ) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ResourceError("picture", "matplotlib is not installed", "pip install matplotlib") from error
        self.rows, self.theme, self.mirrored, self.width, self.unit = rows, theme, mirrored, width_px, width_px / 2000
        room = width_px - self.px(2 * PAGE_MARGIN + GUTTER + (columns - 1) * GAP)
        self.column = room / columns
        self.scale = self.column / widest_mm  # pixels per mm
        self.zoom = self.column / rows[-1].size[0]
        self.top = self.px(HEADER + PAGE_MARGIN + (TITLE if titled else 0))
        self.heights = [cut.size[1] * (self.zoom if cut is rows[-1] else self.scale) for cut in rows]
        self.height = self.top + sum(self.heights) + self.px((len(rows) - 1) * GAP + FOOTER + PAGE_MARGIN)
        self.figure = Figure(figsize=(width_px / 100, self.height / 100), dpi=100, facecolor=theme.page)
        FigureCanvasAgg(self.figure)

    def px(self, length: float) -> float:
        """A length given for a picture 2000 pixels wide."""
        return length * self.unit

    def panel(self, column: int, row: int) -> Any:
        """Axes for one image."""
        bottom = self.height - self._top(row) - self.heights[row]
        box = (
            self._left(column) / self.width,
            bottom / self.height,
            self.column / self.width,
            self.heights[row] / self.height,
        )
        return self.figure.add_axes(box, facecolor="#000000")

    def finish(self, axes, cut: Cut, letters: bool) -> None:
        """Limits, direction of the right-left axis, and the letters at its ends."""
        left, right, bottom, top = cut.extent
        mirrored = self.mirrored and cut.right == 0
        axes.set(xlim=(right, left) if mirrored else (left, right), ylim=(bottom, top), aspect="auto")
        axes.set_axis_off()
        if letters and cut is not self.rows[-1]:
            ends = ENDS[cut.right][::-1] if mirrored else ENDS[cut.right]
            for x, text, side in ((0.02, ends[0], "left"), (0.98, ends[1], "right")):
                place = {"transform": axes.transAxes, "ha": side, "va": "top"}
                axes.text(x, 0.96, text, color=DARK.faint, **place, **self._font(24))

    def frame(self, axes, part: Cut) -> None:
        """Show where the detail is taken from."""
        from matplotlib.patches import Rectangle

        left, _, bottom, _ = part.extent
        axes.add_patch(Rectangle((left, bottom), *part.size, fill=False, ec=self.theme.frame, lw=self.px(1.4) * 0.72))

    def texts(self, columns: Sequence[Column], title: str, footer: str, masks) -> None:
        """Title, captions of columns and rows, legend and footer."""
        theme, x0 = self.theme, self.px(PAGE_MARGIN + GUTTER)
        if title:
            self._text(x0, self.px(PAGE_MARGIN), title, 38, theme.text, va="top", weight="bold")
        head = self.top - self.px(HEADER)
        for i, column in enumerate(columns):
            middle = self._left(i) + self.column / 2
            colour = theme.accent if column.accent else theme.text
            self._text(middle, head, column.title, 34, colour, ha="center", va="top", weight="bold")
            self._text(
                middle, head + self.px(52), column.caption, 24, theme.faint, ha="center", va="top", linespacing=1.35
            )
        for j, cut in enumerate(self.rows):
            zoomed = cut is self.rows[-1]
            name = f"detail × {self.zoom / self.scale:.0f}" if zoomed else cut.name
            middle = self._top(j) + self.heights[j] / 2
            x = self.px(PAGE_MARGIN + GUTTER * 0.35)
            self._text(x, middle, name, 24, theme.faint, ha="center", va="center", rotation=90)
        side = (
            "radiological: patient's left on the right" if self.mirrored else "neurological: patient's left on the left"
        )
        y = self.height - self.px(PAGE_MARGIN)
        self._text(x0, y, f"{footer} · {side}" if footer else side, 22, theme.faint, va="bottom")
        if any(column.outlines for column in columns):
            self._legend(y, masks)

    def _legend(self, y: float, masks) -> None:
        from matplotlib.lines import Line2D

        entries = [("segmentation", self.theme.seg, masks[0]), ("truth", self.theme.truth, masks[1])]
        lines = [
            Line2D([], [], color=c, lw=self.px(5) * 0.72, label=name) for name, c, mask in entries if mask is not None
        ]
        if lines:
            self.figure.legend(
                handles=lines,
                loc="lower right",
                bbox_to_anchor=(1 - self.px(PAGE_MARGIN) / self.width, 1 - y / self.height),
                ncols=2,
                frameon=False,
                labelcolor=self.theme.faint,
                prop={"family": FONT, "size": self.px(22) * 0.72},
                borderpad=0,
                borderaxespad=0,
                handlelength=1.4,
            )

    def write(self, path: Path) -> Path:
        """Save atomically; the same picture gives the same bytes."""
        with atomic_write(path) as temporary:
            self.figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
        return path

    def _left(self, column: int) -> float:
        return self.px(PAGE_MARGIN + GUTTER) + column * (self.column + self.px(GAP))

    def _top(self, row: int) -> float:
        return self.top + sum(self.heights[:row]) + row * self.px(GAP)

    def _font(self, size: float) -> dict[str, Any]:
        return {"family": FONT, "fontsize": self.px(size) * 0.72}

    def _text(self, x: float, y: float, text: str, size: float, colour: str, **options: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, color=colour, **self._font(size), **options)


def _outline(axes, cut: Cut, masks: tuple[Volume | None, Volume | None], theme: Theme, width_px: float) -> None:
    """The label below and the segmentation on top: where they agree only one line is seen."""
    for mask, colour in ((masks[1], theme.truth), (masks[0], theme.seg)):
        if mask is None:
            continue
        # Rounds the corners of voxels; one voxel alone keeps its outline (its peak stays above 0.5).
        values = ndimage.gaussian_filter(cut.sample(mask, nearest=True), 0.5)
        if (values > 0.5).any() and not (values > 0.5).all():
            axes.contour(cut.u, cut.v, values, levels=[0.5], colors=[colour], linewidths=[max(width_px, 1.0) * 0.72])


def _spacing(volume: Volume) -> str:
    sizes = [f"{s:.3g}" for s in volume.spacing]
    return " × ".join(sizes) + " mm"
