"""A picture of where a result differs from the truth: three planes, the images and their signed differences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import atomic_write
from fastsrgan.io.output_place import BY_EVALUATE
from fastsrgan.pictures.axes import MINUS
from fastsrgan.pictures.figure import as_written, new_figure
from fastsrgan.pictures.planes import brightness, cuts, from_lowest
from fastsrgan.volume.geometry import Volume

CLIP = 99.5  # percentile of the largest absolute differences at which the colours end
COLOURS = "RdBu_r"
WIDTH = 2.6  # inches of one column


def error_map(
    path: str | os.PathLike,
    sr: Volume,
    hr: Volume,
    baseline: Volume | None = None,
    name: str = "baseline",
    captions: Sequence[str] = ("", ""),
) -> Path:
    """Write a PNG: SR, truth, SR - truth and, with a baseline, baseline - truth, in three planes at one scale in mm.

    Parameters
    ----------
    sr, hr, baseline : images in one intensity unit, each on its own grid; between voxels they are shown linear
    name : what the baseline is called
    captions : text below the titles of the differences of SR and of the baseline

    Red is where an image is brighter than the truth, blue where it is darker, white where they agree; both differences
    share one scale, which ends at the 99.5th percentile of the largest. Black is where the truth's intensities
    count from (``head.lowest``). Raises InputError for a truth that is 0 everywhere, ResourceError when the file cannot
    be written.
    """
    given = {"truth": hr, "sr": sr} | ({} if baseline is None else {"baseline": baseline})
    shown_as, _ = from_lowest(given, "truth")
    sr, hr, baseline = shown_as["sr"], shown_as["truth"], shown_as.get("baseline")
    planes, top = cuts(hr), brightness(hr)
    columns = _columns(sr, hr, baseline, name, captions)
    samples = [{v: cut.sample(image) for _, image, v in columns} for cut in planes]
    apart = [np.abs(s[v] - s["truth"]) for s in samples for _, _, v in columns if v != "truth"]
    limit = max(float(np.percentile(np.concatenate([a.ravel() for a in apart]), CLIP)), 1e-9 * top)
    heights = [cut.size[1] / cut.size[0] for cut in planes]
    figure = new_figure(figsize=(WIDTH * len(columns) + 0.9, WIDTH * sum(heights) + 1.0), layout="constrained")
    axes = figure.subplots(len(planes), len(columns), squeeze=False, height_ratios=heights)
    shown: Any = None
    for row, (cut, sampled) in enumerate(zip(planes, samples, strict=True)):
        for column, (title, _, what) in enumerate(columns):
            apart_from_truth = f" {MINUS} truth" in title
            panel = axes[row, column]
            left, right, bottom, up = cut.extent
            place: dict[str, Any] = {"extent": cut.extent, "origin": "lower", "interpolation": "nearest"}
            if apart_from_truth:
                difference = sampled[what] - sampled["truth"]
                shown = panel.imshow(difference, COLOURS, vmin=-limit, vmax=limit, **place)
            else:
                panel.imshow(sampled[what], "gray", vmin=0, vmax=top, **place)
            # Radiological, as the other pictures: the patient's left is on the right.
            panel.set(xlim=(right, left) if cut.right == 0 else (left, right), ylim=(bottom, up), xticks=[], yticks=[])
            panel.set_frame_on(False)
            if column == 0 and cut.right == 0:
                where = {"transform": panel.transAxes, "ha": "center", "va": "top"}
                for side, x in (("R", 0.02), ("L", 0.98)):
                    panel.text(x, 0.97, side, color="#cccccc", fontsize=8, **where)
            if row == 0:
                panel.set_title(title, fontsize=9)
            if column == 0:
                panel.set_ylabel(cut.name, fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.5, label="difference, image units", extend="both")
    as_written(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": BY_EVALUATE})
    return Path(path)


def _columns(
    sr: Volume, hr: Volume, baseline: Volume | None, name: str, captions: Sequence[str]
) -> list[tuple[str, Volume, str]]:
    """(title, image, what) of each column; one with " − truth" in its title shows the difference."""
    of_sr, of_baseline = (text.replace("-", MINUS) for text in captions)
    columns = [("SR", sr, "SR"), ("truth", hr, "truth"), (f"SR {MINUS} truth\n{of_sr}", sr, "SR")]
    if baseline is not None:
        columns.append((f"{name} {MINUS} truth\n{of_baseline}", baseline, "baseline"))
    return columns
