"""What weights were made for: the structure that they segment and the images that they know.

It travels in a weight file's card as ``made_for``. The models of the package have theirs here, which is where their
ranges are kept; ``tools/publish_weights.py`` writes them into the files. Where a file says nothing, nothing is assumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import mapping
from fastsrgan.volume.geometry import PLANES

Range = tuple[float, float]

MADE_FOR = "made_for"  # of a card
CORTEX = re.compile(r"(?<![a-z])(neo)?cort(ex|ical)(?![a-z])", re.IGNORECASE)  # not what is subcortical
SIDES = "R"  # of ``mirrored``, a name in ``geometry.WORLD_AXES``
WORDS = {"outside": ("zero",), "mirrored": (SIDES,)}  # what such a field may say
NOT_SAID = "what they were made for is not said"
MOST_TEXT, MOST_STRUCTURES, MOST_LEGEND = 120, 64, 40


@dataclass(frozen=True)
class ContrastLook:
    """What images of a kind look like around a segmented cortex.

    fluid : "dark" or "bright" beside tissue
    enclosed : brightness of the white matter that the segmentation encloses, over the segmentation's
        (`evaluate.plausibility.enclosed`)
    """

    fluid: str
    enclosed: Range


# Ranges hold what tools/plausibility_figures.py measured, with room: `enclosed` of the true labels on sharp images.
CONTRASTS = {
    # 1.41 to 1.47; of what `adult` segments 1.32 to 1.49 (weights of T1 alone 1.37 to 1.43, in FLAIR 1.10 to 1.14)
    "T1": ContrastLook("dark", (1.25, 2.2)),
    "FLAIR": ContrastLook("dark", (0.5, 1.0)),  # 0.82 to 0.86; of what `adult` segments 0.90 to 0.97
    "T2": ContrastLook("bright", (0.4, 0.95)),  # 0.73 to 0.76; of what `adult` segments 0.74 to 0.75
    # 21 weeks 1.43, 34 weeks 1.16; as segmented 1.16 to 1.35, with stacks
    "T2 before myelination": ContrastLook("bright", (1.0, 1.8)),
}
CHOICES = {"contrasts": tuple(CONTRASTS), "slices": tuple(PLANES.values())}  # what may be named


@dataclass(frozen=True)
class Purpose:
    """What is known of it; empty text and None: not said.

    structures : (value in the segmentation, name)
    contrast : in words; contrasts : those of ``CONTRASTS`` that the weights were made for
    dice : of the figures on the card, the lowest and highest Dice of such a contrast
    ages, species, view : in words; ``view`` is the field of view
    head_mm : longest side of the box around the head (or of the brain where images are stripped)
    voxel_mm : finest voxel size of a scan; slice_ratio : coarsest over finest
    slices : the planes that thick slices of the training lay in, those of ``geometry.PLANES``
    mirrored : "R" where the mean of both sides is worth twice the time, training having shown left and right exchanged
    grid_mm : voxel size of the images that it learned from, where coarser scans are better taken to it
    outside : "zero" where brains alone were seen, so that all outside a brain mask is better set to zero
    island_mm3 : smallest component of a segmentation that is kept unless something else is asked for
    structure_ml : volume of the structure; structure_share : of the volume of all that is not air
    """

    structures: tuple[tuple[int, str], ...] = ()
    contrast: str = ""
    contrasts: tuple[str, ...] = ()
    dice: tuple[tuple[str, Range], ...] = ()
    ages: str = ""
    species: str = ""
    view: str = ""
    outside: str = ""
    slices: tuple[str, ...] = ()
    mirrored: str = ""
    grid_mm: Range | None = None
    head_mm: Range | None = None
    voxel_mm: Range | None = None
    slice_ratio: Range | None = None
    island_mm3: Range | None = None
    structure_ml: Range | None = None
    structure_share: Range | None = None

    @classmethod
    def of(cls, values: object) -> Purpose:
        """From the plain values of a card; what is not of its form counts as not said."""
        known = values if isinstance(values, Mapping) else {}
        found: dict[str, Any] = {}
        for f in fields(cls):
            value = known.get(f.name)
            if f.name == "structures":
                found[f.name] = _structures(value)
            elif f.name in CHOICES:
                given = value if isinstance(value, (list, tuple)) else ()
                found[f.name] = tuple(name for name in CHOICES[f.name] if name in given)
            elif f.name == "dice":
                told = value if isinstance(value, Mapping) else {}
                found[f.name] = tuple((name, ends) for name in CONTRASTS if (ends := _range(told.get(name))))
            elif f.default is None:
                found[f.name] = _range(value)
            else:
                found[f.name] = " ".join(value.split())[:MOST_TEXT] if isinstance(value, str) else ""
        for name, allowed in WORDS.items():
            found[name] = found[name] if found[name] in allowed else ""
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values without what is not said."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        if self.dice:
            values["dice"] = {name: list(ends) for name, ends in self.dice}
        if self.structures:
            values["structures"] = [{"value": value, "name": name} for value, name in self.structures]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def structure(self) -> str:
        """The names of the structures, "structure" where they are not said."""
        return ", ".join(name for _, name in self.structures) or "structure"

    @property
    def outlined(self) -> str:
        """The first of them, which is what a segmentation's outline shows, short enough for a legend."""
        name = self.structures[0][1] if self.structures else "segmentation"
        return name if len(name) <= MOST_LEGEND else f"{name[: MOST_LEGEND - 1]}…"

    @property
    def is_cortex(self) -> bool:
        """Whether the first of them, which the segmentation shows, is called a cortex."""
        return bool(self.structures and CORTEX.search(self.structures[0][1]))

    @property
    def piece_mm3(self) -> float | None:
        """Smallest component that counts where it is judged how whole a cortex is; None: of no cortex."""
        return (self.island_mm3[1] if self.island_mm3 else math.inf) if self.is_cortex else None

    def unknown(self, plane: str) -> str:
        """The plane of a scan's thick slices where the training's lay in others, else ""."""
        return plane if self.slices and plane not in self.slices else ""

    @property
    def knows_upright(self) -> bool:
        """Whether the training saw heads upright, as axial slices alone show them; True where nothing is said."""
        return not self.slices or PLANES["S"] in self.slices

    def line(self, segmented: str = "") -> str:
        """All of it in words; ``segmented``: what is segmented, where that is more than ``structure``."""
        parts = [self.contrast, self.ages, self.species, self.view]
        parts += [f"head {span(self.head_mm)} mm"] * bool(self.head_mm)
        parts += [f"voxels {span(self.voxel_mm)} mm"] * bool(self.voxel_mm)
        parts += [f"{' or '.join(self.slices)} slices"] * bool(self.slices)
        parts += [f"slice ratio {span(self.slice_ratio)}"] * bool(self.slice_ratio)
        told = ", ".join(part for part in parts if part)
        if not told and not self.structures:
            return NOT_SAID
        segmented = segmented or self.structure
        return f"{segmented}; made for {told}" if told else segmented


def span(of: Range | None) -> str:
    """A range as people say it."""
    if of is None:
        return ""
    return f"{of[0]:.4g}" if of[0] == of[1] else f"{of[0]:.4g} to {of[1]:.4g}"


def mask_names(weights: object) -> tuple[tuple[int, str], ...]:
    """Value in the mask image (the smallest of a structure's in the label map) and name of each of several structures,
    of a record's facts about weights; none for other mask classes, and what is not of its form is left out."""
    facts = mapping(weights)
    averaged = facts.get("averaged")
    known = facts.get("structures") or (mapping(averaged[0]).get("structures") if isinstance(averaged, list) else None)
    found = []
    for one in known if isinstance(known, list) else []:
        values, name = mapping(one).get("values"), mapping(one).get("name")
        if isinstance(values, list) and values and all(isinstance(v, int) for v in values) and isinstance(name, str):
            found.append((min(values), name))
    return tuple(found)


def mask_values(weights: object) -> np.ndarray:
    """The value of each class in the mask image: for structures of a label map the first that they have there.

    ``evaluate --label-classes cortex=3,42`` then means the same in the mask and in the label map.
    """
    known = mask_names(weights)
    if not known:
        return np.arange(256, dtype=np.uint8)
    values = np.array([0, *(value for value, _ in known)])
    return values.astype(np.uint8 if values.max() < 256 else np.uint16)


def common(purposes: list[Purpose]) -> Purpose:
    """Of weights that are averaged: what all of them say alike."""
    said = {f.name: {getattr(one, f.name) for one in purposes} for f in fields(Purpose)}
    return Purpose(**{name: values.pop() for name, values in said.items() if len(values) == 1})


IMAGES = ("contrast", "ages", "species", "view", "head_mm")  # what is said of images, the plainest first


def averaged_apart(names: Sequence[str], purposes: Sequence[Purpose]) -> str:
    """What to say where weights that are averaged were made for different images: which for what, and what to do; else
    nothing."""
    differing = [name for name in IMAGES if len({getattr(one, name) for one in purposes}) > 1]
    if not differing:
        return ""

    def said(one: Purpose, name: str) -> str:
        return getattr(one, name) if name != "head_mm" else f"head {span(one.head_mm)} mm" * bool(one.head_mm)

    words = [", ".join(filter(None, (said(one, name) for name in differing[:2]))) or NOT_SAID for one in purposes]
    which = " and ".join(f"{name} ({told})" for name, told in zip(names, words, strict=True))
    return f"weights made for different images were averaged, {which}: give -w only those made for images like this"


def _range(value: object) -> Range | None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < 1e9 for v in value)
    return (float(value[0]), float(value[1])) if good and value[0] <= value[1] else None


def _structures(value: object) -> tuple[tuple[int, str], ...]:
    found = []
    for one in value[:MOST_STRUCTURES] if isinstance(value, (list, tuple)) else ():
        number, name = (one.get("value"), one.get("name")) if isinstance(one, Mapping) else (None, None)
        if isinstance(number, int) and not isinstance(number, bool) and isinstance(name, str) and name.strip():
            found.append((number, " ".join(name.split())[:MOST_TEXT]))
    return tuple(found)


# --- the models of the package ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShippedModel:
    """A model of the package: its file, and what it was made for."""

    file: str
    purpose: Purpose

    @property
    def structure(self) -> str:
        """What it segments."""
        return self.purpose.structure


# Names that stand for a path wherever weights are asked for. The first is the default of `load_generator`. Ranges hold
# the values measured beside them by tools/plausibility_figures.py, with room.
MODELS = {
    "adult": ShippedModel(
        "segsrgan-k12-adult.safetensors",
        Purpose(
            structures=((1, "cortical grey matter"),),
            contrast="T1-, T2- or FLAIR-like contrast",
            contrasts=("T1", "FLAIR", "T2"),
            dice=(("T1", (0.78, 0.86)), ("FLAIR", (0.72, 0.80)), ("T2", (0.75, 0.83))),
            ages="adults",
            species="human",
            view="whole head or brain alone",
            head_mm=(140, 290),  # two whole heads 199 to 210, their brains alone 162 to 187
            voxel_mm=(0.7, 1.3),  # training: 1
            slice_ratio=(1.5, 6.5),  # training: 2 to 6
            slices=("axial",),  # others are segmented upright (docs/inference.md)
            # True cortex of a head: one component, and nine of at most 17. What `adult` segments beside its largest
            # component, pieces of up to 3548, is no cortex but for one of 400 (decision 026).
            island_mm3=(4000, 4000),
            structure_ml=(230, 800),  # labels of 12 heads 311 to 610
            structure_share=(0.06, 0.45),  # labels of two whole heads 0.158 to 0.177, their brains alone 0.311 to 0.355
        ),
    ),
    "perinatal": ShippedModel(
        "segsrgan-k12-perinatal.safetensors",
        Purpose(
            structures=((1, "cortical grey matter"),),
            contrast="T2-like contrast",
            contrasts=("T2 before myelination",),
            dice=(("T2 before myelination", (0.67, 0.81)),),
            ages="21 to 40 weeks of gestation",
            species="human",
            view="brain, stripped or with the head around it",
            outside="zero",
            grid_mm=(0.8, 0.8),
            head_mm=(50, 130),  # 12 atlas brains of 21 to 34 weeks 58 to 106; three real stacks in their masks 67 to 81
            voxel_mm=(0.5, 1.2),  # training: 0.5 to 1.1; real stacks 1.125
            slice_ratio=(2, 6.5),  # training: the same
            slices=("axial",),  # GA34, ratio 3, sagittal: Dice 0.78 upright, 0.44 in one pass (four stages)
            mirrored=SIDES,  # Dice +0.005 to +0.011; of `adult` 0 to +0.005, on heads that take long (decision 031)
            island_mm3=(200, 200),  # beside the largest up to 620, at most a quarter of a piece above 10 is cortex
            structure_ml=(4, 250),  # labels of 12 brains 6 to 56; 12 folded ones at 0.7 of an adult's size 105 to 210
            structure_share=(0.06, 0.35),  # labels of 12 brains 0.095 to 0.190
        ),
    ),
}


def weight_files(weights: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of a record's facts about weights: the one file, or all that were averaged."""
    several = weights.get("averaged")
    return [one for one in several if isinstance(one, dict)] if isinstance(several, list) else [weights]


def weights_called(weights: Mapping[str, Any]) -> str:
    """The weights of a record for people: a model of the package by its name, others by file; all that are averaged."""
    names = list(map(file_called, weight_files(weights)))
    return str(weights.get("name") or (names[0] if len(names) == 1 else f"mean of {' and '.join(names)}"))


def file_called(weights: Mapping[str, Any]) -> str:
    """One weight file of a record for people."""
    file = Path(str(weights.get("path"))).name
    return next((name for name, model in MODELS.items() if model.file == file), file)
