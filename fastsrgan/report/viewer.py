"""The viewer of one result: its packed volumes, panes and controls, and the picture that stands in for it."""

from __future__ import annotations

import base64
import colorsys
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import mapping
from fastsrgan.errors import FastsrganError
from fastsrgan.evaluate.grids import onto_grid
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.io.nifti_header import NotNifti
from fastsrgan.pictures.figure import TITLES, result_figure
from fastsrgan.pictures.planes import OBJECT, PLANES, brightness, change_in, cuts, inside_of, largest_change, slices_of
from fastsrgan.report.collect import Result
from fastsrgan.report.html import Html, data_block, el, join, shown
from fastsrgan.report.volumes import DIFFERENCES, Packed
from fastsrgan.volume.consistency import agree, best_linear, observation
from fastsrgan.volume.geometry import Volume, resampled_affine, world_orientation
from fastsrgan.volume.placement import same_grid

log = logging.getLogger("fastsrgan")

PICTURE_WIDTH = 1500
# What can be laid over the SR.
OVER = {"seg": "Segmentation", "linear": "Best linear", "mask": "Structures", "change": "SR − spline", "doubt": "Doubt"}
MOST_VALUES = 85  # of a mask image: viewer.js takes three of 256 levels for each
PROBABLE = 0.5  # probability from which on a voxel is taken as segmented where the record has no segmentation
WORDS = {"sr": "SR", "spline": "spline", "truth": "truth"}


@dataclass(frozen=True)
class View:
    """Where a page opens: a place in world mm (R, A, S), a plane by its name, and the scan's slices.

    changed : whether the place is that of the largest change between SR and spline
    through, slice_mm : world axis across the slices and their distance; None and 0 where no edge is thick
    """

    at_mm: tuple[float, float, float]
    plane: str = "axial"
    changed: bool = False
    through: int | None = None
    slice_mm: float = 0.0

    @property
    def across(self) -> int:
        """The world axis that the plane cuts."""
        return next(axis for name, axis, _, _ in PLANES if name == self.plane)


def open_at(sr: Volume, others: Mapping[str, Volume]) -> View:
    """The place of largest change between SR and spline inside the segmentation, the label or the head, in the plane
    across the slices where more changes; the middle of the head, axial, where there is no spline."""
    at = None
    spline = others.get("spline")
    if spline is not None:
        inside = onto_grid(inside_of(sr, others.get("seg"), others.get("label")), sr, order=0, notes=[])
        at = largest_change(sr, spline, inside)
    planes = cuts(Volume(np.where(sr.data > OBJECT * brightness(sr), sr.data, 0), sr.affine), at)
    place = {cut.axis: cut.at for cut in planes}
    thick = slices_of(others["low"]) if "low" in others else None
    middle = (place[0], place[1], place[2])
    if thick is None or spline is None:
        return View(middle, changed=at is not None)
    across = [cut for cut in planes if cut.axis != thick[0]]
    chosen = max(across, key=lambda cut: change_in(cut, (sr, spline), inside))
    return View(middle, chosen.name, at is not None, *thick)


def load_images(result: Result, warnings: list[str]) -> tuple[Volume | None, dict[str, Volume]]:
    """The super-resolved image and, as far as they are there, low, truth, seg, label, doubt and mask.

    What is missing, unreadable or no longer the same is said in ``warnings`` and kept as ``result.unseen``.
    """
    series, which = (result.record["input"].get(key) for key in ("series", "volume"))
    series, which = series if isinstance(series, str) else None, which if isinstance(which, int) else None

    result.unseen = []

    def tell(kind: str, text: str) -> None:
        warnings.append(text)
        result.unseen.append((kind, text))

    def read(kind: str, name: str) -> Volume | None:
        path = result.files.get(kind)
        if path is None:
            if kind in ("sr", "seg", "input") or isinstance(result.record["outputs"].get(kind), str):
                tell(kind, f"{name} is no longer there and is not shown")
            return None
        if kind == "input" and not os.access(path, os.R_OK):
            tell(kind, f"{name} {path} may not be read, by its permissions, and is not shown")
            return None
        if kind == "input" and not _unchanged(path, series, result.record["input"].get("sha256")):
            tell(kind, f"{name} {path} is not the file that the result was made of, and is not shown")
            return None
        try:
            if kind == "input":
                return any_image.load_any(path, series=series, volume=which)
            if kind == "mask":
                volume = images.load_label(path, largest=65535)
                if len(set(volume.meta["values"]) - {0}) > MOST_VALUES:
                    tell("colours", f"{name} is not shown: {path} holds more than {MOST_VALUES} values")  # is whole
                    return None
                return volume
            if kind == "label":
                return images.load_label(path, classes=_scored_values(result.scores))
            if kind == "seg" and result.probable:
                volume = images.load(path)
                return replace(volume, data=(volume.data > PROBABLE).astype(np.uint8))
            return images.load_label(path) if kind == "seg" else images.load(path)
        except NotNifti:  # what such a file begins with is nothing for a page that is passed on
            tell(kind, f"{name} is not shown: {path} is not a NIfTI image")
            return None
        except FastsrganError as error:
            tell(kind, f"{name} is not shown: {error}")
            return None

    sr = read("sr", "the super-resolved image")
    names = {"low": ("input", "the input"), "truth": ("hr", "the truth")}
    names |= {"seg": ("seg", "the segmentation"), "label": ("label", "the label")}
    names |= {"doubt": ("doubt", "the doubt"), "mask": ("mask", "the map of structures")}
    others = {name: volume for name, what in names.items() if (volume := read(*what)) is not None}
    return sr, others


def _scored_values(scores: Mapping[str, Any] | None) -> list[int] | None:
    """Which values of the label map are the structure that is shown; None where it is the whole map."""
    first = next(iter(mapping((scores or {}).get("label_classes")).values()), None)
    return [value for value in first if isinstance(value, int)] if isinstance(first, list) else None


def linear_estimate(
    record: Mapping[str, Any], low: Volume, sr: Volume, spline: Volume, truth: Volume | None
) -> tuple[Volume, str] | None:
    """The best linear estimate on the grid of ``sr``, and what it is in one line.

    With a truth the weight is the best by it, of Gaussian slices; without one weight and slices are the record's. None
    where the record names none, and for a result that is not on the grid that `infer` makes of the scan.
    """
    told = mapping(record.get("agree"))
    width, profile, w = (told.get(key) for key in ("width_mm", "profile", "weight"))
    width = told.get("thickness_mm") if width is None else width  # its name in older records
    grid = resampled_affine(low.affine, low.data.shape, sr.data.shape, sr.spacing)
    if record.get("geometry") != "physical" or not same_grid(Volume(sr.data, grid), sr):
        return None
    known = isinstance(w, (int, float)) and 0 < w < math.inf and isinstance(width, (int, float))
    if truth is None and not (known and isinstance(profile, str)):
        return None
    asked: dict[str, Any] = {} if truth is not None else {"thickness_mm": width, "profile": profile}
    try:
        seen = observation(low.data.shape, low.spacing, sr.data.shape, sr.spacing, **asked)
        if seen is None or seen.is_identity:
            return None
        if truth is not None:
            there = onto_grid(truth, sr, notes=[], as_placed=True).data
            made = best_linear(spline.data, low.data, there, seen)
            weight = "w the best of eight and infinity by the truth"
        else:
            made, weight = np.array(spline.data, np.float32), f"w = {w:.3g} as the record chose"
            agree(made, low.data, seen, float(w), floor=0.0)  # type: ignore[arg-type]
    except FastsrganError:  # of a record that says what cannot be, or a truth elsewhere
        return None
    formula = "spline + D′(DD′ + w)⁻¹(scan − D spline), D the acquisition"
    return Volume(made, sr.affine), f"Best linear, without a network: {formula}, {weight}."


def _unchanged(path: Path, series: str | None, sha256: object) -> bool:
    """Whether an image has the checksum that the record knows. The path is the record's: nothing else is told of it."""
    try:
        return any_image.sha256(path, series) == sha256
    except FastsrganError:
        return False


def viewer_card(
    packed: Packed,
    view: View,
    spacing: tuple[float, float, float] | None,
    whole_mb: float,
    names: Mapping[int, str] | None = None,
    linear: str = "",
) -> Html:
    """The section with the panes and their controls.

    whole_mb : the size of a page that shows all voxels
    names : of the values of the mask image, as far as they are known
    linear : what the best linear estimate is
    """
    panes = pane_list(packed, spacing)
    wiping = "spline" in packed.blobs
    main = [_pane(p, over=wiping and p["id"] == "sr") for p in panes if p["id"] in ("spline", "sr")]
    divider = el("div", id="divider", class_="divider", aria_hidden="true")
    side = [_pane(p) for p in panes if p["id"] not in ("spline", "sr")]
    few = "panes few" if len(side) < 3 else "panes"
    stage = el("div", main, divider, id="stage", class_="stage wipe" if wiping else "stage")
    kinds = ("←→↑↓", ("Page Up", "Page Down"), "+-")
    arrows, pages, zooms = ([join(el("kbd", key), " ") for key in keys] for keys in kinds)
    helped = join(
        *("Click or drag in an image to move all of them. In an image: ", arrows, "move, "),
        *(pages, "change the slice, ", zooms, "zoom; the wheel too, once the image has been clicked."),
        " Radiological: the patient's left is on the right.",
    )
    return el(
        "section",
        el("h2", "Images"),
        el("p", _opened(view), class_="faint"),
        el("div", stage, side, id="panes", class_=few),
        _scale(packed) if wiping else None,
        _doubt_scale(packed) if "doubt" in packed.blobs else None,
        _legend(packed.values, names or {}) if packed.values else None,
        _controls(packed, view, wiping),
        el("p", linear, class_="faint") if linear else None,
        el("p", helped, class_="faint help"),
        el("p", _said(packed, whole_mb), " ", el("span", id="renderer"), class_="faint"),
        el("noscript", el("p", "Without JavaScript only the picture below is shown.")),
        id="viewer",
        class_="card",
    )


def _opened(view: View) -> str:
    """Where the page opens, in words."""
    place = "at the largest change between SR and spline" if view.changed else "in the middle of the head"
    if view.through is None:
        return f"Opened {place}."
    axes = ("right-left", "front-back", "head-foot")
    return f"Opened {place}, across the slices: they are {view.slice_mm:.3g} mm apart, {axes[view.through]}."


def _said(packed: Packed, whole_mb: float) -> str:
    """What is done to the voxels for the page."""
    size, box, kept = (" × ".join(map(str, s)) for s in (packed.full_shape, packed.head, packed.shape))
    grey = f"255 grey levels from 0 to {packed.top:.6g}, turned to the axes R, A, S"
    if not packed.is_part:
        cropped = f", cropped to the head from {size}" * (kept != size)
        return f"Shown at full resolution: {kept} voxels{cropped}; {grey}."
    thin = [d for d in range(3) if packed.shape[d] < packed.head[d]]
    part = "a slab" if len(thin) == 1 else "a block"
    return (
        f"Shown at full resolution: {part} of {kept} voxels around the place where the page opens, of {box} in the box "
        f"of the head and {size} in the image; {grey}. --max-mb {whole_mb:.0f} shows all."
    )


def pane_list(packed: Packed, spacing: tuple[float, float, float] | None) -> list[dict[str, Any]]:
    """What each pane shows: {"id", "base", "layers", "nearest", "title", "caption"}.

    ``base`` is a volume or a difference (``DIFFERENCES``); ``layers`` lie over it, of the SR's the one that is chosen.
    """
    masks = [name for name in ("seg", "label") if name in packed.blobs]
    there = set(packed.blobs) | {n for n, pair in DIFFERENCES.items() if set(pair) <= set(packed.blobs)}
    size = " × ".join(f"{s:.4g}" for s in spacing) + " mm, voxels as acquired" if spacing else ""
    named = {name: f"{WORDS[a]} − {WORDS[b]}" for name, (a, b) in DIFFERENCES.items()}
    panes = [("low", "low", TITLES["low"], size), ("spline", "spline", TITLES["spline"], "of the scan")]
    panes += [("linear", "linear", TITLES["linear"], "without a network")]
    panes += [("sr", "sr", TITLES["sr"], "super-resolved"), ("seg", "sr", TITLES["seg"], "")]
    panes += [("change", "change", "Difference", named["change"]), ("doubt", "doubt", "Doubt", "of the SR")]
    panes += [("truth", "truth", TITLES["truth"], "")]
    panes += [("error", "error", "Error", named["error"])]
    panes += [("spline_error", "spline_error", "Error of the spline", named["spline_error"])]
    layers = {"seg": masks, "sr": [name for name in OVER if name in there]}
    found = [
        {"id": name, "base": base, "layers": layers.get(name, []), "title": title, "caption": caption}
        for name, base, title, caption in panes
        if base in there and (name != "seg" or masks)
    ]
    return [one | {"nearest": one["id"] == "low"} for one in found]


def viewer_data(packed: Packed, view: View, low: Volume | None) -> Html:
    """The data blocks that viewer.js reads."""
    place = np.linalg.inv(packed.affine) @ [*view.at_mm, 1]
    start = [int(np.clip(round(float(v)), 0, n - 1)) for v, n in zip(place, packed.shape, strict=False)]
    plan = {
        "shape": packed.shape,
        "spacing": packed.spacing,
        "affine": packed.affine.tolist(),
        "start": start,
        "plane": view.plane,
        "slices": _slices(packed, view, low),
        "limit": packed.limit,
        "volumes": [{"name": name, "minus": other} for name, (other, _) in packed.blobs.items()],
        "differences": {n: pair for n, pair in DIFFERENCES.items() if set(pair) <= set(packed.blobs)},
        "panes": pane_list(packed, low.spacing if low is not None else None),
    }
    if packed.values:
        plan["colours"] = [colour_of(i) for i in range(len(packed.values))]
    kind = "application/octet-stream"
    blocks = [el("script", Html(text), type=kind, id=f"volume-{name}") for name, (_, text) in packed.blobs.items()]
    return join(data_block("plan", plan), blocks)


def _slices(packed: Packed, view: View, low: Volume | None) -> dict[str, Any] | None:
    """The scan's slices on the page's grid: number of a slice = row . (i, j, k, 1), along the axis across them."""
    if low is None or view.through is None:
        return None
    stored = world_orientation(low.affine).axes[view.through]
    row = (np.linalg.inv(low.affine) @ packed.affine)[stored]
    return {"axis": view.through, "mm": view.slice_mm, "row": row.tolist(), "count": low.data.shape[stored]}


def picture(sr: Volume, others: Mapping[str, Volume], words: Mapping[str, Any]) -> bytes:
    """The same images as one PNG: planes across the slices and a detail of each; ``words`` as of `picture_words`."""
    with tempfile.TemporaryDirectory(prefix="fastsrgan-") as folder:
        path = Path(folder) / "picture.png"
        result_figure(path, {"sr": sr, **others}, width_px=PICTURE_WIDTH, **words)
        return path.read_bytes()


def png(data: bytes, alt: str, **attributes: object) -> Html:
    """A picture inside the page."""
    return el("img", src="data:image/png;base64," + base64.b64encode(data).decode(), alt=alt, **attributes)


def _pane(pane: dict[str, Any], over: bool = False) -> Html:
    label = f"{pane['title']}: arrow keys move, Page Up and Page Down change the slice"
    canvas = el("canvas", id=f"canvas-{pane['id']}", tabindex=0, role="img", aria_label=label)
    caption = el("figcaption", pane["title"], el("small", pane["caption"]) if pane["caption"] else None)
    if pane["id"] == "seg":
        keys = [join(el("span", class_=f"key {m}"), {"seg": "fastsrgan ", "label": "truth"}[m]) for m in pane["layers"]]
        caption = el("figcaption", pane["title"], el("small", keys))
    return el("figure", caption, el("div", canvas, class_="holder"), class_="pane over" if over else "pane")


def _choice(name: str, values: list[tuple[str, str]], chosen: str = "") -> Html:
    options = []
    for value, text in values:
        button = el("input", type="radio", name=name, value=value, checked=value == (chosen or values[0][0]))
        options.append(el("label", button, text))
    return el("fieldset", options, class_="choice", aria_label=name)


def _scale(packed: Packed) -> Html:
    """What the colours of the differences mean, in the image's units."""
    end = shown(packed.limit * packed.top / 255, 3)
    return el(
        "p",
        el("span", "Differences: first image darker"),
        el("span", f"−{end}", class_="end"),
        el("span", class_="signed", role="img", aria_label="blue over black to red"),
        el("span", f"+{end}", class_="end"),
        el("span", "brighter; in units of the image, the same in every pane"),
        class_="scale faint",
    )


def _doubt_scale(packed: Packed) -> Html:
    """What the colours of the doubt mean, in the image's units."""
    return el(
        "p",
        el("span", "Doubt: 0"),
        el("span", class_="heat", role="img", aria_label="black over purple to yellow"),
        el("span", shown(packed.doubt_top, 3), class_="end"),
        el("span", "and more; the standard deviation that the error of SR is taken to have, in units of the image"),
        class_="scale faint",
    )


def colour_of(index: int) -> tuple[int, int, int]:
    """RGB of a structure: hues far apart one after the other, the first away from those of the masks."""
    parts = colorsys.hls_to_rgb((0.9 + 0.381966 * index) % 1, 0.62 if index % 2 else 0.5, 0.8)
    return tuple(round(255 * part) for part in parts)  # type: ignore[return-value]


def _legend(values: Sequence[int], names: Mapping[int, str]) -> Html:
    """The structures' names beside their colours."""
    items = []
    for i, value in enumerate(values):
        rect = el("rect", width=12, height=12, rx=3, fill="#{:02x}{:02x}{:02x}".format(*colour_of(i)))
        key = el("svg", rect, width=12, height=12, class_="key", aria_hidden="true")
        items.append(el("li", key, names.get(value, f"class {value}")))
    return el("ul", el("li", "Structures:"), items, class_="legend", id="structures")


def _controls(packed: Packed, view: View, wiping: bool) -> Html:
    def slider(name: str, text: str, low: float, high: float, at: float, step: float = 1) -> Html:
        return el("label", text, el("input", type="range", id=name, min=low, max=high, value=at, step=step))

    planes = [(name, name.capitalize()) for name, *_ in PLANES]
    layouts = [("wipe", "Wipe"), ("side", "Side by side")]
    layers = [("none", "None")]
    layers += [(n, words) for n, words in OVER.items() if n in packed.blobs or (n == "change" and wiping)]
    marks = el("input", type="checkbox", id="marks", checked=True)
    bar = el("span", class_="key slice", aria_hidden="true")
    start = el("button", "largest change" if view.changed else "back", type="button", id="start")
    return el(
        "div",
        el("div", el("span", "Plane"), _choice("plane", planes, view.plane), class_="row"),
        el("div", el("span", "Layout"), _choice("layout", layouts), class_="row") if wiping else None,
        slider("wipe", "Spline | SR", 0, 100, 50) if wiping else None,
        el("div", el("span", "Over the SR"), _choice("layer", layers), class_="row wide") if len(layers) > 1 else None,
        slider("overlay", "Opacity", 0, 100, 50) if len(layers) > 1 else None,
        slider("slice", "Slice", 0, packed.shape[2] - 1, 0),
        slider("zoom", "Zoom", 1, 8, 1, 0.05),
        el("label", "Crosshair", el("input", type="checkbox", id="cross", checked=True)),
        el("label", "Slice marks", el("span", marks, bar, f"one slice, {view.slice_mm:.3g} mm", class_="marked"))
        if view.through is not None
        else None,
        el("div", el("span", "Place"), el("span", el("output", id="place"), " ", start), class_="row wide"),
        class_="controls",
    )
