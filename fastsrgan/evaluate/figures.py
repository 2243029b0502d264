"""The figures of an evaluation: one entry of ``FIGURES`` each, for ``evaluate``, studies, reports, pictures and docs.

An entry says how a figure is computed, what it is called, in what unit, with how many digits, whether more or less of
it is better, and what exactly it means. A new figure is another entry here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from fastsrgan.errors import InputError
from fastsrgan.evaluate import metrics
from fastsrgan.volume.geometry import Volume, shear_of

HIGHER, LOWER = 1, -1  # of ``better``
SHEARED = 1e-3  # cosine between voxel axes from which distances in mm are noted as approximate
SURFACE = "a surface voxel is one of the segmentation with a face neighbour outside it, or outside the volume"


@dataclass
class Compared:
    """An image and a segmentation beside their truth, on one grid. What several figures need is computed once.

    hr : the reference; sr, seg, label : (X, Y, Z) arrays of its shape, or None
    regions : name -> (X, Y, Z) bool, None for the whole volume
    ends : smallest and largest value of the whole reference, of which ``hr`` may be a part; default those of ``hr``
    part : voxels that lie in every image's field of view, None for all: SSIM counts where a whole window does
    name : what it is called in ``notes``, which say why a figure does not exist or is not exact
    """

    hr: Volume
    regions: Mapping[str, np.ndarray | None]
    sr: np.ndarray | None = None
    seg: np.ndarray | None = None
    label: np.ndarray | None = None
    name: str = ""
    notes: list[str] = field(default_factory=list)
    ends: tuple[float, float] | None = None
    part: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.ends is None:
            self.ends = float(self.hr.data.min()), float(self.hr.data.max())

    @property
    def top(self) -> float:
        """The largest value of the whole reference."""
        return self.ends[1]  # type: ignore[index]

    def mse(self, region: str) -> float:
        """Mean squared difference in a region."""
        return self._squares[region]

    @functools.cached_property
    def _squares(self) -> dict[str, float]:
        return {name: metrics.mse(self.sr, self.hr.data, inside) for name, inside in self.regions.items()}  # type: ignore[arg-type]

    def psnr(self, region: str, value_range: float) -> float | None:
        """PSNR in dB; None, and a note, for identical arrays."""
        error = self.mse(region)
        if error == 0:
            note = f"{self.name}, {region}: identical to the reference, PSNR is infinite"
            self.notes += [] if note in self.notes else [note]
        metrics.positive_range(np.array(self.ends))
        return None if error == 0 or value_range == 0 else 10 * math.log10(value_range**2 / error)

    def similarity(self, region: str, window: metrics.Window) -> float | None:
        """SSIM; None, and a note, for volumes smaller than a window."""
        if window not in self._similarities:
            wanted = list(self.regions.values())
            if self.part is not None:
                whole = ndimage.minimum_filter(self.part, 2 * window.radius + 1)
                wanted = [whole if inside is None else inside & whole for inside in wanted]
            try:
                found = metrics.ssim_regions(self.sr, self.hr.data, wanted, self.top, window)  # type: ignore[arg-type]
            except InputError as error:
                found = [None] * len(wanted)
                self.notes.append(f"{self.name}: no SSIM in windows of {2 * window.radius + 1} voxels: {error.reason}")
            self._similarities[window] = dict(zip(self.regions, found, strict=True))
        return self._similarities[window][region]

    @functools.cached_property
    def _similarities(self) -> dict[metrics.Window, dict[str, float | None]]:
        return {}

    @functools.cached_property
    def components(self) -> dict[str, int]:
        """Of the segmentation, see ``metrics.components``."""
        return metrics.components(self.seg, self.label)  # type: ignore[arg-type]

    @functools.cached_property
    def surfaces(self) -> dict[str, float | None]:
        """See ``metrics.surface_scores``."""
        scores = metrics.surface_scores(self.seg, self.label, self.hr.spacing)  # type: ignore[arg-type]
        if None in scores.values():
            both = not any(metrics.binary(mask).any() for mask in (self.seg, self.label) if mask is not None)
            empty = "and the label are empty, Dice counts 1 and" if both else "or the label is empty,"
            self.notes.append(f"{self.name}: the segmentation {empty} there is no surface distance")
        elif shear_of(self.hr.affine) > SHEARED:
            reason = "the reference's voxel axes are not at right angles, distances in mm are approximate"
            self.notes.append(f"{self.name}: {reason}")
        return scores

    def millilitres(self, mask: np.ndarray | None) -> float:
        """Volume of a mask."""
        voxel_ml = abs(float(np.linalg.det(np.asarray(self.hr.affine)[:3, :3]))) / 1000
        return int(np.count_nonzero(metrics.binary(mask))) * voxel_ml  # type: ignore[arg-type]

    def structure_mae(self) -> float | None:
        """Mean absolute difference of the images over the voxels that are segmented; None without an image or voxel."""
        inside = metrics.binary(self.seg)  # type: ignore[arg-type]
        return metrics.mae(self.sr, self.hr.data, inside) if self.sr is not None and inside.any() else None


@dataclass(frozen=True)
class Figure:
    """An entry.

    label, unit : what it is called where there is room, and its unit, "" for none
    definition : one sentence
    of : computes it; of an image (``Compared``, region), of a segmentation (``Compared``); None: it does not exist here
    image : a figure of images, one for each region; else of a segmentation
    digits : after the point, in tables and pictures
    better : ``HIGHER``, ``LOWER``, or 0 where neither is better
    short : heading in tables of many subjects and of studies; "": it is not in these
    headline : one of the few that reports and pictures show first
    of_label : belongs to the label alone, the same for every result
    """

    label: str
    definition: str
    of: Callable[..., float | None]
    image: bool = False
    unit: str = ""
    digits: int = 4
    better: int = 0
    short: str = ""
    headline: bool = False
    of_label: bool = False

    @property
    def named(self) -> str:
        """'PSNR, dB'."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: float, signed: bool = False) -> str:
        """'26.96 dB'."""
        return f"{value:{'+' if signed else ''}.{self.digits}f} {self.unit}".strip()


FIGURES: dict[str, Figure] = {
    "psnr_db": Figure(
        "PSNR",
        "10 log10(R^2 / MSE) in dB; R = maximum of the whole reference (as in the SegSRGAN paper); where no voxel "
        "of it is above 0 all images are first moved up by its minimum",
        lambda c, region: c.psnr(region, c.top),
        image=True, unit="dB", digits=2, better=HIGHER, short="PSNR", headline=True,
    ),
    "psnr_range_db": Figure(
        "PSNR over the value range",
        "the same with R = maximum - minimum of the whole reference (the other common data range)",
        lambda c, region: c.psnr(region, c.top - c.ends[0]),
        image=True, unit="dB", digits=2, better=HIGHER,
    ),
    "ssim": Figure(
        "SSIM",
        "mean over voxels of the 3-D structural similarity (Wang et al. 2004): Gaussian window, sigma 1.5 voxels, "
        "radius 5, population covariance, K1 0.01, K2 0.03, range = maximum of the whole reference; the outer 5 voxels "
        "on each side are not averaged (as in scikit-image with Gaussian weights, and in MONAI)",
        lambda c, region: c.similarity(region, metrics.GAUSSIAN),
        image=True, better=HIGHER, short="SSIM", headline=True,
    ),
    "ssim_uniform": Figure(
        "SSIM, uniform window",
        "the same with scikit-image's defaults: mean over 7 x 7 x 7 voxels, sample covariance; the outer 3 voxels on "
        "each side are not averaged",
        lambda c, region: c.similarity(region, metrics.UNIFORM),
        image=True, better=HIGHER,
    ),
    "mae": Figure(
        "mean absolute error",
        "mean absolute difference, in units of the reference",
        lambda c, region: metrics.mae(c.sr, c.hr.data, c.regions[region]),
        image=True, better=LOWER,
    ),
    "mse": Figure(
        "mean squared error",
        "mean squared difference, in squared units of the reference",
        Compared.mse,
        image=True, better=LOWER,
    ),
    "dice": Figure(
        "Dice",
        "2 |A and B| / (|A| + |B|) of the voxels above 0.5; 1 when both are empty",
        lambda c: metrics.dice(c.seg, c.label),
        better=HIGHER, short="Dice", headline=True,
    ),
    "hausdorff95_mm": Figure(
        "95 % Hausdorff distance",
        "the larger of the two directed 95th percentiles (linear between ranks) of the distances from each surface "
        "voxel of one segmentation to the nearest surface voxel of the other, in mm (as in MONAI, undirected)",
        lambda c: c.surfaces["hausdorff95_mm"],
        unit="mm", digits=2, better=LOWER, short="HD95",
    ),
    "surface_distance_mm": Figure(
        "mean surface distance",
        "average symmetric surface distance: mean of those distances over the surface voxels of both segmentations "
        "together, in mm",
        lambda c: c.surfaces["surface_distance_mm"],
        unit="mm", digits=3, better=LOWER, short="ASSD",
    ),
    "components": Figure(
        "components",
        "number of 26-connected components of the voxels above 0.5",
        lambda c: c.components["components"],
        digits=1, short="components", headline=True,
    ),
    "largest_component": Figure(
        "largest component",
        "voxels of the largest of them",
        lambda c: c.components["largest_component"],
        unit="voxels", digits=0,
    ),
    "false_components": Figure(
        "false components",
        "components without a voxel in common with the label",
        lambda c: c.components["false_components"],
        digits=1, better=LOWER,
    ),
    "false_component_voxels": Figure(
        "voxels in false components",
        "voxels of those components",
        lambda c: c.components["false_component_voxels"],
        digits=0, better=LOWER,
    ),
    "structure_mae": Figure(
        "mean absolute error in the segmented structure",
        "mean absolute difference of the images over the segmentation's own voxels, in units of the reference; mae of "
        "the region label is that over the label's",
        Compared.structure_mae,
        better=LOWER,
    ),
    "volume_ml": Figure(
        "volume",
        "volume of the voxels above 0.5, in mL",
        lambda c: c.millilitres(c.seg),
        unit="mL", digits=2,
    ),
    "label_components": Figure(
        "components of the label",
        "number of 26-connected components of the label",
        lambda c: metrics.connected_components(c.label),
        digits=1, of_label=True,
    ),
    "label_volume_ml": Figure(
        "volume of the label",
        "volume of the label, in mL",
        lambda c: c.millilitres(c.label),
        unit="mL", digits=2, of_label=True,
    ),
}  # fmt: skip
REGIONS = {
    "whole": "every voxel of the reference's grid",
    "mask": "voxels where the mask is above 0.5",
    "label": "voxels where the label is above 0.5",
}


def scores(compared: Compared) -> dict[str, Any]:
    """``image`` {region: {figure: value}} where there is an image, ``segmentation`` {figure: value} where there is a
    segmentation with its label."""
    result: dict[str, Any] = {}
    if compared.sr is not None:
        result["image"] = {
            region: {name: figure.of(compared, region) for name, figure in FIGURES.items() if figure.image}
            for region in compared.regions
        }
    if compared.seg is not None and compared.label is not None:
        result["segmentation"] = {name: figure.of(compared) for name, figure in FIGURES.items() if not figure.image}
    return result


ALONE = ("volume_ml", "components", "largest_component")  # of a segmentation without a truth, as reports order them


def alone(seg: Volume) -> dict[str, float]:
    """The figures ``ALONE`` of a segmentation."""
    compared = Compared(seg, {}, seg=seg.data)
    return {name: FIGURES[name].of(compared) for name in ALONE}  # type: ignore[misc]


def definitions() -> dict[str, str]:
    """What every figure means, in one sentence each."""
    return {name: figure.definition for name, figure in FIGURES.items()} | {"surface voxel": SURFACE}


@dataclass(frozen=True)
class TableColumn:
    """A figure in tables with a line per subject or condition, and its dotted path in a result."""

    figure: Figure
    path: str
    inside: str = ""

    @property
    def heading(self) -> str:
        """'PSNR mask dB'."""
        return " ".join(word for word in (self.figure.short, self.inside, self.figure.unit) if word)


def columns() -> dict[str, TableColumn]:
    """Those of every figure with a short name: of the whole image, inside the mask, of the segmentation."""
    short = {name: figure for name, figure in FIGURES.items() if figure.short}
    images = {name: figure for name, figure in short.items() if figure.image}
    found = {name: TableColumn(figure, f"image.whole.{name}") for name, figure in images.items()}
    for name, figure in images.items():
        stem = name.removesuffix(f"_{figure.unit.lower()}")
        found[f"{stem}_mask{name.removeprefix(stem)}"] = TableColumn(figure, f"image.mask.{name}", "mask")
    return found | {n: TableColumn(figure, f"segmentation.{n}") for n, figure in short.items() if n not in images}


def name_of(key: str) -> str:
    """A figure's or a column's name for people; keys of neither as they are, without underscores."""
    if key in FIGURES:
        return FIGURES[key].named
    column = columns().get(key)
    if column is None:
        return key.replace("_", " ")
    return f"{column.figure.label} inside the mask" + (f", {column.figure.unit}" if column.figure.unit else "")


def said(values: Mapping[str, Any], image: bool, gains: Mapping[str, Any] | None = None) -> list[str]:
    """The headline figures of an image or a segmentation that have a direction: 'PSNR 26.96 dB  (+0.41 dB)'."""
    lines = []
    for name, figure in FIGURES.items():
        value, gain = values.get(name), (gains or {}).get(name)
        if figure.headline and figure.better and figure.image == image and value is not None:
            more = "" if gain is None else f"  ({figure.text(gain, signed=True)})"
            lines.append(f"{figure.label} {figure.text(value)}{more}")
    return lines


def captions(result: Mapping[str, Any]) -> dict[str, str]:
    """What pictures say of a result of ``evaluate_pair``: ``sr``, its baseline ``spline``, ``seg``, and ``linear``, the
    best linear estimate, where its ``image`` and ``gain`` are in ``result["linear"]``."""
    base, gain = result.get("baseline", {}), result.get("gain", {})
    image, other, gains = (tree.get("image", {}).get("whole", {}) for tree in (result, base, gain))
    labels = [f"interpolated labels: {text}" for text in said(base.get("segmentation", {}), False)]
    linear = [result.get("linear", {}).get(k, {}) for k in ("image", "gain")]
    return {
        "linear": "\n".join(said(linear[0].get("whole", {}), True, linear[1].get("image", {}).get("whole", {}))),
        "sr": "\n".join(said(image, True, gains)),
        "spline": "\n".join(said(other, True)),
        "seg": "\n".join([*said(result.get("segmentation", {}), False), *labels]),
    }


# --- scores of a training run, by their names in its log -------------------------------------------------------------


def structure_line(key: str) -> str:
    """'cortex, whole volumes' of ``whole_Dice_cortex``, the Dice of one of several structures; "" of other scores."""
    name = key.removeprefix("whole_")
    if not name.startswith("Dice_") or name.startswith(("Dice_mask", "Dice_label")):  # classes of a Mask_image
        return ""
    return f"{name.removeprefix('Dice_')}, {'whole volumes' if key.startswith('whole_') else 'patches'}"


def dices_of_structures(scores: Mapping[str, float], part: str = "") -> list[float]:
    """The Dice of each of several structures of a label map, of patches or (``part`` "whole_") of whole volumes; the
    classes of a Mask_image do not count."""
    return [v for k, v in scores.items() if k.startswith(f"{part}Dice_") and structure_line(k)]


def mean_dice(scores: Mapping[str, float], part: str = "") -> float | None:
    """Mean Dice of several structures, or that of the label; ``part`` as of ``dices_of_structures``."""
    named = dices_of_structures(scores, part)
    return float(np.mean(named)) if named else scores.get(f"{part}Dice", scores.get(f"{part}Dice_label_1"))


def dice_name(structures: int) -> str:
    """What ``mean_dice`` is of."""
    return f"mean Dice of {structures} structures" if structures else "Dice"
