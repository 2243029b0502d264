"""The viewer of one result: its packed volumes, panes and controls, and the picture that stands in for it."""

from __future__ import annotations

import base64
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.errors import FastsrganError
from fastsrgan.evaluate.pair import onto_grid
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.io.nifti_header import NotNifti
from fastsrgan.pictures.figure import Column, planes_figure
from fastsrgan.pictures.planes import brightness, cuts
from fastsrgan.report.collect import Result
from fastsrgan.report.html import Html, data_block, el, join
from fastsrgan.report.volumes import Packed, unpack
from fastsrgan.volume.geometry import Volume

log = logging.getLogger("fastsrgan")

ERROR_GAIN = 4
PICTURE_WIDTH = 1500


def load_images(result: Result, warnings: list[str]) -> tuple[Volume | None, dict[str, Volume]]:
    """The super-resolved image and what is shown beside it: low, spline, truth, seg, label, as far as they are there.

    What is missing, unreadable or no longer the same is said in ``warnings``.
    """
    series, which = (result.record["input"].get(key) for key in ("series", "volume"))
    series, which = series if isinstance(series, str) else None, which if isinstance(which, int) else None

    def read(kind: str, name: str) -> Volume | None:
        path = result.files.get(kind)
        if path is None:
            if kind in ("sr", "seg", "input"):
                warnings.append(f"{name} is no longer there and is not shown")
            return None
        if kind == "input" and not _unchanged(path, series, result.record["input"].get("sha256")):
            warnings.append(f"{name} {path} is not the file that the result was made of, and is not shown")
            return None
        try:
            if kind == "input":
                return any_image.load_any(path, series=series, volume=which)
            return images.load_label(path) if kind in ("seg", "label") else images.load(path)
        except NotNifti:  # what such a file begins with is nothing for a page that is passed on
            warnings.append(f"{name} is not shown: {path} is not a NIfTI image")
            return None
        except FastsrganError as error:
            warnings.append(f"{name} is not shown: {error}")
            return None

    sr = read("sr", "the super-resolved image")
    names = {"low": ("input", "the input"), "truth": ("hr", "the truth")}
    names |= {"seg": ("seg", "the segmentation"), "label": ("label", "the label")}
    others = {name: volume for name, what in names.items() if (volume := read(*what)) is not None}
    return sr, others


def _unchanged(path: Path, series: str | None, sha256: object) -> bool:
    """Whether an image has the checksum that the record knows. The path is the record's: nothing else is told of it."""
    try:
        return any_image.sha256(path, series) == sha256
    except FastsrganError:
        return False


def viewer_card(packed: Packed, spacing: tuple[float, float, float] | None) -> Html:
    """The section with the panes and their controls."""
    panes = pane_list(packed, spacing)
    wiping = "spline" in packed.blobs
    main = [_pane(p, over=wiping and p["id"] == "sr") for p in panes if p["id"] in ("spline", "sr")]
    divider = el("div", id="divider", class_="divider", aria_hidden="true")
    side = [_pane(p) for p in panes if p["id"] not in ("spline", "sr")]
    few = "panes few" if len(side) < 3 else "panes"
    stage = el("div", main, divider, id="stage", class_="stage wipe" if wiping else "stage")
    grey = f"255 grey levels from 0 to {packed.top:.6g}"
    size = " × ".join(map(str, packed.full_shape))
    kept = " × ".join(map(str, packed.shape))
    told = f"Shown: {kept} voxels, cropped to the head from {size}, {grey}, turned to the axes R, A, S."
    if packed.block > 1:
        told += f" Each shown voxel is the mean of {packed.block} × {packed.block} × {packed.block}."
    helped = join(
        "Click or drag in an image to move all of them. In an image: ",
        [join(el("kbd", k), " ") for k in ("←", "→", "↑", "↓")],
        "move, ",
        el("kbd", "Page Up"),
        " ",
        el("kbd", "Page Down"),
        " change the slice, ",
        el("kbd", "+"),
        " ",
        el("kbd", "-"),
        " zoom; the wheel too, once the image has been clicked. Radiological: the patient's left is on the right.",
    )
    return el(
        "section",
        el("h2", "Images"),
        el("div", stage, side, id="panes", class_=few),
        _controls(packed, wiping),
        el("p", helped, class_="faint help"),
        el("p", told, " ", el("span", id="renderer"), class_="faint"),
        el("noscript", el("p", "Without JavaScript only the picture below is shown.")),
        id="viewer",
        class_="card",
    )


def pane_list(packed: Packed, spacing: tuple[float, float, float] | None) -> list[dict[str, Any]]:
    """What each pane shows: {"id", "base", "masks", "nearest", "colours", "title", "caption"}."""
    masks = [name for name in ("seg", "label") if name in packed.blobs]
    size = " × ".join(f"{s:.3g}" for s in spacing) + " mm, voxels as acquired" if spacing else ""
    panes = [("low", "low", "Low resolution", size), ("spline", "spline", "Cubic spline", "of the scan")]
    panes += [("sr", "sr", "fastsrgan", "super-resolved"), ("seg", "sr", "Segmentation", "")]
    panes += [
        ("truth", "truth", "Truth", "high resolution"),
        ("error", "error", "Error", f"|SR - truth| × {ERROR_GAIN}"),
    ]
    there = set(packed.blobs) | ({"error"} if "truth" in packed.blobs else set())
    return [
        {
            "id": name,
            "base": base,
            "masks": masks if name == "seg" else [],
            "nearest": name == "low",
            "colours": "hot" if name == "error" else "gray",
            "title": title,
            "caption": caption,
        }
        for name, base, title, caption in panes
        if base in there and (name != "seg" or masks)
    ]


def viewer_data(packed: Packed, sr: Volume, spacing: tuple[float, float, float] | None) -> Html:
    """The data blocks that viewer.js reads."""
    place = np.linalg.inv(packed.affine) @ [*_start(sr), 1]
    start = [int(np.clip(round(float(v)), 0, n - 1)) for v, n in zip(place, packed.shape, strict=False)]
    plan = {
        "shape": packed.shape,
        "spacing": packed.spacing,
        "affine": packed.affine.tolist(),
        "start": start,
        "error_gain": ERROR_GAIN,
        "volumes": [{"name": name, "minus": other} for name, (other, _) in packed.blobs.items()],
        "panes": pane_list(packed, spacing),
    }
    blocks = [
        el("script", Html(text), type="application/octet-stream", id=f"volume-{name}")
        for name, (_, text) in packed.blobs.items()
    ]
    return join(data_block("plan", plan), blocks)


def picture(sr: Volume, others: dict[str, Volume], packed: Packed) -> bytes:
    """The same images as one PNG: three planes and a detail of each."""
    spline = None
    if "spline" in packed.blobs:
        data = unpack(packed)["spline"] * np.float32(packed.top / 255)
        spline = Volume(data, packed.affine) if packed.block == 1 else onto_grid(others["low"], sr, notes=[])
    columns = []
    if "low" in others:
        size = " × ".join(f"{s:.3g}" for s in others["low"].spacing)
        columns.append(Column(others["low"], "Low resolution", f"{size} mm", nearest=True))
    if spline is not None:
        columns.append(Column(spline, "Cubic spline"))
    columns.append(Column(sr, "fastsrgan", accent=True))
    if "truth" in others:
        columns.append(Column(others["truth"], "Truth"))
    if "seg" in others:
        columns.append(Column(sr, "Segmentation", accent=True, outlines=True))
    masks = (others.get("seg"), others.get("label"))
    with tempfile.TemporaryDirectory(prefix="fastsrgan-") as folder:
        path = Path(folder) / "picture.png"
        reference = others.get("truth", sr)
        planes_figure(path, columns, reference=reference, masks=masks, compared=spline, width_px=PICTURE_WIDTH)
        return path.read_bytes()


def png(data: bytes, alt: str, **attributes: object) -> Html:
    """A picture inside the page."""
    return el("img", src="data:image/png;base64," + base64.b64encode(data).decode(), alt=alt, **attributes)


def _start(sr: Volume) -> list[float]:
    """World mm of the first view: the planes of the picture."""
    axial, coronal, sagittal = cuts(Volume(np.where(sr.data > 0.05 * brightness(sr), sr.data, 0), sr.affine))
    return [sagittal.at, coronal.at, axial.at]


def _pane(pane: dict[str, Any], over: bool = False) -> Html:
    label = f"{pane['title']}: arrow keys move, Page Up and Page Down change the slice"
    canvas = el("canvas", id=f"canvas-{pane['id']}", tabindex=0, role="img", aria_label=label)
    caption = el("figcaption", pane["title"], el("small", pane["caption"]) if pane["caption"] else None)
    if pane["masks"]:
        keys = [join(el("span", class_=f"key {m}"), {"seg": "fastsrgan ", "label": "truth"}[m]) for m in pane["masks"]]
        caption = el("figcaption", pane["title"], el("small", keys))
    return el("figure", caption, el("div", canvas, class_="holder"), class_="pane over" if over else "pane")


def _choice(name: str, values: list[tuple[str, str]]) -> Html:
    options = [
        el("label", el("input", type="radio", name=name, value=value, checked=i == 0), text)
        for i, (value, text) in enumerate(values)
    ]
    return el("fieldset", options, class_="choice", aria_label=name)


def _controls(packed: Packed, wiping: bool) -> Html:
    def slider(name: str, text: str, low: float, high: float, at: float, step: float = 1) -> Html:
        return el("label", text, el("input", type="range", id=name, min=low, max=high, value=at, step=step))

    planes = [("axial", "Axial"), ("coronal", "Coronal"), ("sagittal", "Sagittal")]
    layouts = [("wipe", "Wipe"), ("side", "Side by side")]
    masks = any(name in packed.blobs for name in ("seg", "label"))
    return el(
        "div",
        el("div", el("span", "Plane"), _choice("plane", planes), class_="row"),
        el("div", el("span", "Layout"), _choice("layout", layouts), class_="row") if wiping else None,
        slider("wipe", "Spline | SR", 0, 100, 50) if wiping else None,
        slider("slice", "Slice", 0, packed.shape[2] - 1, 0),
        slider("zoom", "Zoom", 1, 8, 1, 0.05),
        slider("overlay", "Overlay", 0, 100, 35) if masks else None,
        el("label", "Crosshair", el("input", type="checkbox", id="cross", checked=True)),
        el("div", el("span", "Place"), el("output", id="place"), class_="row"),
        class_="controls",
    )
