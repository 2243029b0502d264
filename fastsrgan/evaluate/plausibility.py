"""Whether a scan and its segmentation look like what the weights were made for: a traffic light with reasons.

``measure`` looks at the scan, ``choose`` picks a model of the package by it, ``judge`` compares with what the weights
say (`model.purpose`). Arrays only, the scan on about ``SAMPLE`` voxels. It finds images of another kind; a segmentation
that is wrong on an image of the right kind it finds only by its volume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from fastsrgan.core.files import mapping
from fastsrgan.errors import brief, counted
from fastsrgan.model.purpose import (
    CONTRASTS,
    MODELS,
    NOT_SAID,
    ContrastLook,
    Purpose,
    Range,
    ShippedModel,
    mask_names,
    span,
)
from fastsrgan.volume.geometry import plane_across
from fastsrgan.volume.head import tissue_box, tissue_level

GREEN, YELLOW, RED = "green", "yellow", "red"
NO_PROOF = "no proof that the segmentation is right, look at the pictures"  # what green is
MASK = "--mask FILE, an image of where the brain is, leaves out the rest"  # offered where more than a brain is seen
SAMPLE = 2 * 10**6  # voxels that are looked at
CORE = 0.7  # of the half axes of the head's box: the ellipsoid that contrast is judged in

# --- thresholds, each with what was measured ------------------------------------------------------------------------
#
# By tools/plausibility_figures.py. perinatal: 12 atlas brains of 21 to 34 weeks as thick slices of ratio 3 and 6,
# without noise and with 3 %; stacks: three real fetal stacks, whole and in their masks; adult: two heads of
# tools/label_heads.py (T1 and FLAIR whole, T1 and T2 stripped), of the same slices and noise.

FILLED = 0.5  # tissue in a border plane; fullest and third fullest of whole stacks 1 and 0.96; of brains 0.18 and 0.004
MOST_FILLED = 2  # border planes of a head, whose neck fills one; whole stacks 6, brains 0
REACH = 0.085  # of the segmentation's longest side: half the width of the gaps that count as enclosed; adults 14 mm
APART, DEEPER, FINE = 0.2, 0.3, 5.0  # of it: from the segmentation, from the rim of what is enclosed; voxels in it
ROUGH = 0.65  # the best Dice of a contrast below which its segmentations are never green; T1 0.84, T2 0.79, FLAIR 0.75
LOST = 0.3  # Dice of own weights below which it is red; 9 updates 0.07 (noise), 373 0.29 (docs/training.md)
FEWEST = 100  # enclosed voxels, below which nothing is said
FLUID_SKEW = 0.2  # perinatal -0.15 to 0.37, stacks 0.17 to 0.34, adult T2 0.46 to 0.62, T1 -0.45 to -0.26, FLAIR -0.50
# Different values in the head's core (of at most COUNTED voxels), below which it is a mask, a label map or an image
# that was rounded away: masks 1, tissue maps 8, label maps 20 to 24; stacks 477 to 713, brains from 2204 on.
FEW_VALUES, COUNTED = 32, 10**5
CT = -500.0  # intensities of CT begin at -1000; z-scores of MRI at about -5
BORDER = 0.01  # of the segmentation, in the image's border planes
# Percent of the scan that the network's image, acquired again, does not give back before it is made to agree, yellow
# and red. Shipped weights: brains 1.6 to 2.9, with 3, 10 and 20 % noise up to 4.4, 10.8 and 18.1; stacks 9.3 to 10.3.
# Own weights of 4 updates, with which the image was noise: 58 and 70.
MISFIT = (25.0, 50.0)
# Share of the two largest pieces in a segmented cortex, whose halves may touch, of what is kept, yellow and red.
# perinatal, 12 brains of ratio 3 and, with 3 % of noise, 6: 1 (24 scans, 1 or 2 pieces); adult: 1 (the 24 scans of its
# card, 1 piece each); stacks in their masks 0.83 (with gaps), 1 and 1, whole 0.58 to 0.78; phantoms 0.66, 0.83, 0.94.
WHOLE = (0.95, 0.7)
# How far beyond the range of the weights is yellow, as a factor; what is further is red.
SLACK = {"head_mm": 1.1, "voxel_mm": 2.0, "slice_ratio": 2.0, "structure_ml": 1.5, "structure_share": 1.5}
SLACK["enclosed"] = 1.05
CHECKED = {
    "head_mm": "size of the head",
    "contrasts": "contrast",
    "voxel_mm": "voxel size",
    "slice_ratio": "slice ratio",
    "slices": "direction of the slices",
    "structure_ml": "volume of the structure",
    "structure_share": "its share of the head",
}
PIECES, FIT = "pieces", "fit to the scan"
# Why something was not looked at.
NO_RANGE = "the weights do not say what to expect"
NO_CORTEX = "the weights do not say that they segment a cortex (convert --label cortex=3,42 names a structure)"
NO_FIT = "the network's image was not acquired again (--agree off, or nothing to agree on)"
UNDECIDED = 1.25  # a head beyond this factor of all models' ranges chooses none of them


@dataclass(frozen=True)
class Look:
    """What a scan is like.

    head_mm : longest side of the box around what is brighter than air, 0 where nothing is
    head_ml : volume of what is brighter than air
    filled : border planes of the image that are more than half tissue
    fluid : (q98 + q2 - 2 q50) / (q98 - q2) of intensities in the head's core: above 0 where the tail is bright
    voxel_mm, slice_ratio : finest size, coarsest over finest
    lowest : intensity
    slices : the plane of thick slices (axial, coronal, sagittal); empty where voxels are isotropic or nothing says how
        the array lies
    values : different intensities in the head's core, counted up to ``FEW_VALUES``; 0 where none was looked at
    """

    head_mm: float
    head_ml: float
    filled: int
    fluid: float
    voxel_mm: float
    slice_ratio: float
    lowest: float
    slices: str = ""
    values: int = 0

    @property
    def is_head(self) -> bool:
        """Whether there is tissue with air around it."""
        return self.head_mm > 0 and self.filled <= MOST_FILLED

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)

    @classmethod
    def of(cls, record: object) -> Look | None:
        """From a record; None where it holds none."""
        known = record if isinstance(record, Mapping) else {}
        values: dict[str, Any] = {f.name: known.get(f.name) for f in fields(cls)}
        slices, different = values.pop("slices"), values.pop("values")
        if not all(isinstance(v, (int, float)) for v in values.values()):
            return None
        values |= {"filled": int(values["filled"]), "slices": slices if isinstance(slices, str) else ""}
        values["values"] = different if isinstance(different, int) else 0
        return cls(**values)


def measure(
    data_XYZ: np.ndarray,
    spacing_mm: Sequence[float],
    mask_XYZ: np.ndarray | None = None,
    affine_44: np.ndarray | None = None,
) -> Look:
    """What a scan is like, inside a mask where there is one. ``data_XYZ`` is finite, axes as stored; without
    ``affine_44`` it is not said which way the slices lie."""
    every = max(1, math.ceil((data_XYZ.size / SAMPLE) ** (1 / 3)))
    thin = tuple(slice(None, None, min(every, max(1, n // 32))) for n in data_XYZ.shape)
    some = np.asarray(data_XYZ[thin], np.float32)
    if mask_XYZ is not None:
        outside = min(np.float32(0), some.min())  # no brighter than air
        some = np.where(np.asarray(mask_XYZ)[thin] > 0, some, outside)
    spacing = [size * (part.step or 1) for size, part in zip(spacing_mm, thin, strict=True)]
    level = tissue_level(some)
    tissue = some > level
    low, high = tissue_box(some, level)
    sides = [(b - a + 1) * size for a, b, size in zip(low, high, spacing, strict=True)]
    there = bool(tissue.any())
    finest = min(spacing_mm)
    filled = sum(_tissue_in(data_XYZ, mask_XYZ, axis, end, level) > FILLED for axis in range(3) for end in (0, -1))
    core = some[tissue & _ellipsoid(some.shape, low, high)]
    # To four digits, as a record keeps them: a resumed call decides by the record.
    return Look(
        head_mm=_digits(max(sides) if there else 0.0),
        head_ml=_digits(np.count_nonzero(tissue) * math.prod(spacing) / 1000),
        filled=filled,
        fluid=_digits(_skew(core)),
        voxel_mm=_digits(finest),
        slice_ratio=_digits(max(spacing_mm) / finest),
        lowest=_digits(float(some.min())),
        slices="" if affine_44 is None else plane_across(affine_44, spacing_mm),
        values=min(FEW_VALUES, len(np.unique(core[:: max(1, core.size // COUNTED)]))),
    )


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _tissue_in(data_XYZ: np.ndarray, mask_XYZ: np.ndarray | None, axis: int, end: int, level: float) -> float:
    """Share of tissue in a border plane."""
    plane = data_XYZ.take(end, axis) > level
    if mask_XYZ is not None:
        plane = plane & (np.asarray(mask_XYZ).take(end, axis) > 0)
    return float(np.mean(plane))


def _ellipsoid(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> np.ndarray:
    """(X, Y, Z) bool: the core of a box."""
    square: Any = 0.0
    for axis, (n, a, b) in enumerate(zip(shape, low, high, strict=True)):
        half = max(0.5 * CORE * (b - a + 1), 0.5)
        along = ((np.arange(n) - 0.5 * (a + b)) / half) ** 2
        square = square + along.reshape([-1 if axis == d else 1 for d in range(3)])
    return square <= 1


def _skew(values: np.ndarray) -> float:
    if values.size < 2:
        return 0.0
    low, middle, high = np.percentile(values, [2, 50, 98])
    return float((low + high - 2 * middle) / (high - low)) if high > low else 0.0


def enclosed(image_XYZ: np.ndarray, seg_XYZ: np.ndarray, spacing_mm: Sequence[float]) -> float | None:
    """Brightness of what a segmentation encloses over its own, medians: in T1 white matter is brighter than the cortex
    around it, in FLAIR and T2 darker, before myelination brighter again. None where nothing is enclosed.

    Enclosed is what a box of ``REACH`` cannot reach from outside (a closing), away from the segmentation and from the
    rim. Fluid in furrows and ventricles is too little to count.
    """
    from scipy import ndimage  # here: a quarter of a second that the first tile need not wait for

    some = seg_XYZ[:: (every := max(1, min(seg_XYZ.shape) // 64)), ::every, ::every] > 0
    places = np.argwhere(some)
    if not len(places):
        return None
    reach = REACH * float(((np.ptp(places, axis=0) + 1) * every * np.asarray(spacing_mm)).max())
    thin = tuple(slice(None, None, max(1, round(reach / FINE / size))) for size in spacing_mm)
    seg, image = np.asarray(seg_XYZ[thin]) > 0, np.asarray(image_XYZ[thin], np.float32)
    steps = [reach / (size * part.step) for size, part in zip(spacing_mm, thin, strict=True)]  # voxels

    def sizes(share: float) -> list[int]:
        return [2 * round(share * n) + 1 for n in steps]

    pad = [math.ceil((1 + DEEPER) * n) + 1 for n in steps]
    wide = ndimage.maximum_filter(np.pad(seg, [(n, n) for n in pad]), sizes(1))
    closed = ndimage.minimum_filter(wide, sizes(1 + DEEPER))[tuple(slice(n, -n) for n in pad)]
    deep = closed & ~ndimage.maximum_filter(seg, sizes(APART))
    if np.count_nonzero(deep) < FEWEST:
        return None
    own = float(np.median(image[seg]))
    return _digits(float(np.median(image[deep])) / own) if own > 0 else None


# --- which model ---------------------------------------------------------------------------------------------------


def choose(look: Look, models: Mapping[str, ShippedModel] = MODELS) -> tuple[str, str]:
    """The model of the package whose range of head sizes holds, or is nearest to, the scan's; and why.

    Contrast does not choose: T1 of some heads and T2 of noisy ones measure alike. Where no head is seen, or one that
    fits none, it is the first model.
    """
    first, name = next(iter(models)), "no head is seen in the image"
    if not look.is_head:
        return first, f"{name}, so its size cannot choose"
    away = {name: _beyond(look.head_mm, model.purpose.head_mm) for name, model in models.items()}
    best = min(away, key=lambda name: away[name])
    size = f"head {look.head_mm:.0f} mm long"
    return (best, size) if away[best] <= UNDECIDED else (first, f"{size}, which fits no model")


def own_dice(cards: Sequence[object]) -> float | None:
    """Of the cards of weights, the lowest Dice (of several structures the mean) that a training saw on its own Test
    subjects; None where none says it."""
    found = []
    for card in map(mapping, cards):
        named = [card.get(f"Dice_{name}") for _, name in mask_names(card)]
        told = [value for value in named or (card.get("Dice", card.get("Dice_label_1")),) if isinstance(value, float)]
        found += [sum(told) / len(told)] if told else []
    return min(found, default=None)


def _beyond(value: float, wanted: Range | None) -> float:
    """How far a value lies outside a range, as a factor; 1 inside."""
    if wanted is None or wanted[0] <= value <= wanted[1]:
        return 1.0
    if value <= 0:
        return math.inf
    return wanted[0] / value if value < wanted[0] else value / wanted[1]


# --- the traffic light ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A light, and in words what speaks against green, the worst first.

    checked : what the weights say enough about to be looked at
    unchecked : what was not looked at -> why
    enclosed : see the function of this name
    """

    light: str
    reasons: tuple[str, ...]
    checked: tuple[str, ...] = ()
    enclosed: float | None = None
    unchecked: Mapping[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """The light and the reasons; of a green one what was checked, what was not, and that it is no proof."""
        left = f"not looked at: {', '.join(self.unchecked)}; " if self.unchecked else ""
        expected = f"as expected in {', '.join(self.checked)}; {left}{NO_PROOF}"
        return f"{self.light}: {'; '.join(self.reasons) or expected}"

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        plain = {"light": self.light, "reasons": list(self.reasons), "checked": list(self.checked)}
        return plain | {"unchecked": dict(self.unchecked), "enclosed": self.enclosed}


def judge(
    look: Look,
    seg_XYZ: np.ndarray,
    voxel_mm3: float,
    purpose: Purpose,
    masked: bool = False,
    within: float | None = None,
    misfit: float | None = None,
    apart: str = "",
    whole_share: float | None = None,
    own_dice: float | None = None,
    upright: bool = False,
) -> Verdict:
    """Compare a scan and its segmentation (above 0 in the structure) with what the weights were made for.

    ``masked`` : whether a mask was given, which is offered otherwise where it may help
    ``within`` : what ``enclosed`` measured in the result
    ``misfit`` : per cent by which the network's own image, acquired again, differs from the scan; None: not measured
    ``whole_share`` : of the two largest pieces of the segmentation in all that were kept (`volume.components`); None:
        not known
    ``own_dice`` : of the weights on the Test subjects of their own training; None: not known
    ``upright`` : whether the head was segmented upright, so that the direction of the slices does not matter to weights
        that know it so
    ``apart`` : what to say of weights that were averaged though made for different images (`purpose.averaged_apart`)
    """
    upright = upright and purpose.knows_upright
    told = {name: words for name, words in CHECKED.items() if not (upright and name == "slices")}
    purpose = replace(purpose, slices=()) if upright else purpose
    found = [*_of_image(look, purpose, masked), *_of_contrast(look, purpose, within)]
    found += [*_of_segmentation(look, seg_XYZ, voxel_mm3, purpose, masked)]
    checked = tuple(words for name, words in told.items() if getattr(purpose, name))
    if apart or not checked:
        found.append((YELLOW, apart or f"of the weights {NOT_SAID}"))
    unchecked = {words: NO_RANGE for name, words in told.items() if not getattr(purpose, name)}
    if not purpose.is_cortex:
        unchecked[PIECES] = NO_CORTEX
    elif whole_share is not None:
        checked += (PIECES,)
        found += _of_pieces(whole_share, purpose)
    if own_dice is not None:
        checked += ("Dice of the weights' own training",)
        found += _of_own_dice(own_dice)
    if misfit is None:
        unchecked[FIT] = NO_FIT
    else:
        checked += (FIT,)
        found += _of_misfit(misfit)
    found.sort(key=lambda one: one[0] != RED)
    light = found[0][0] if found else GREEN
    return Verdict(light, tuple(_offered_once([reason for _, reason in found])), checked, within, unchecked)


Finding = tuple[str, str]


def _offered_once(reasons: Sequence[str]) -> list[str]:
    """Reasons of which the first that a mask would help offers it."""
    first = next((i for i, reason in enumerate(reasons) if MASK in reason), 0)
    return [reason if i == first else reason.replace(f" ({MASK})", "") for i, reason in enumerate(reasons)]


def _of_misfit(percent: float) -> list[Finding]:
    """Of a network that does not give the scan back: its image is of something else, or noise."""
    if percent <= MISFIT[0]:
        return []
    reason = f"the network's image, acquired again, differs from the scan by {percent:.0f} %"
    return [(RED if percent > MISFIT[1] else YELLOW, f"{reason}: these weights do not fit it, or are hardly trained")]


def _of_own_dice(dice: float) -> list[Finding]:
    """Of weights that do not segment the images that they were validated on."""
    if dice >= ROUGH:
        return []
    reason = f"Dice of these weights on the Test subjects of their own training is {dice:.2f}"
    return [(RED if dice < LOST else YELLOW, f"{reason}: the segmentation is {'lost' if dice < LOST else 'rough'}")]


def _of_pieces(share: float, purpose: Purpose) -> list[Finding]:
    """Of a cortex, which is whole but for the gap between its halves."""
    if share >= WHOLE[0]:
        return []
    reason = f"{purpose.structure} is in pieces: the two largest are {100 * share:.0f} % of it"
    return [(RED if share < WHOLE[1] else YELLOW, f"{reason}, expected {100 * WHOLE[0]:.0f} % or more")]


def _of_image(look: Look, purpose: Purpose, masked: bool) -> list[Finding]:
    found: list[Finding] = []
    if 0 < look.values < FEW_VALUES:
        count = counted(look.values, "different value")
        found.append((RED, f"the head has {count}, as a mask, a label map or an image that was rounded has"))
    if purpose.contrast and look.lowest <= CT:
        found.append((RED, f"intensities go down to {look.lowest:.0f}, as in CT; made for {purpose.contrast}"))
    if purpose.head_mm and not look.is_head:
        where = f"tissue fills {look.filled} of the 6 borders" if look.head_mm else "nothing is brighter than air"
        help_ = "" if masked or not look.head_mm else f" ({MASK})"
        found.append((RED, f"no head with air around it is seen, {where}{help_}"))
    elif (light := _light("head_mm", look.head_mm, purpose.head_mm)) and purpose.head_mm:
        fits = [name for name, model in MODELS.items() if _beyond(look.head_mm, model.purpose.head_mm) == 1]
        more = f" (--weights {fits[0]} is made for it)" if fits else ""
        more = more or f" ({MASK})" * (not masked and look.head_mm > purpose.head_mm[1])
        found.append(
            (light, f"the head is {brief(look.head_mm, 4)} mm long, made for {span(purpose.head_mm)} mm{more}")
        )
    if light := _light("voxel_mm", look.voxel_mm, purpose.voxel_mm):
        found.append((light, f"voxels of {look.voxel_mm:.3g} mm, made for {span(purpose.voxel_mm)} mm"))
    if light := _light("slice_ratio", look.slice_ratio, purpose.slice_ratio):
        found.append(
            (light, f"slices {brief(look.slice_ratio)} times the voxel size, made for {span(purpose.slice_ratio)}")
        )
    if purpose.unknown(look.slices):
        known = " or ".join(purpose.slices)
        found.append((YELLOW, f"{look.slices} slices, made for {known} ones: the segmentation can miss much"))
    return found


def _of_contrast(look: Look, purpose: Purpose, within: float | None) -> list[Finding]:
    """Nothing where the scan is like one of the contrasts that the weights know."""
    if not purpose.contrasts or not look.is_head:
        return []
    fluid = "bright" if look.fluid > FLUID_SKEW else "dark" if look.fluid < -FLUID_SKEW else ""
    lights = {name: _as_contrast(one, fluid, within) for name, one in CONTRASTS.items()}
    best = min((lights[name] for name in purpose.contrasts), key=("", YELLOW, RED).index)
    if not best:
        return _of_rough([name for name in purpose.contrasts if not lights[name]], purpose)
    like = " or ".join(name for name, light in lights.items() if not light and name not in purpose.contrasts)
    seen = [f"the {fluid} tail of intensities"] * bool(fluid)
    if within is not None:
        seen.append(f"{within:.2f} times the structure's brightness inside it")
    words = f" as in {like} images" if like else " as in no contrast that is known"
    return [(best, f"{' and '.join(seen)}{words}; made for {purpose.contrast or ', '.join(purpose.contrasts)}")]


def _of_rough(alike: Sequence[str], purpose: Purpose) -> list[Finding]:
    """Of a contrast that is known, where nothing but one with poor figures comes into question."""
    known = dict(purpose.dice)
    if not alike or not all(name in known and known[name][1] < ROUGH for name in alike):
        return []
    low, high = known[alike[0]]
    figures = f"Dice {low:.2f} to {high:.2f} on their card"
    return [(YELLOW, f"{' or '.join(alike)}-like: the segmentation of these weights is rough there, {figures}")]


def _as_contrast(known: ContrastLook, fluid: str, within: float | None) -> str:
    """The light of a scan, were it of this contrast."""
    if fluid and fluid != known.fluid:
        return RED
    return "" if within is None else _light("enclosed", within, known.enclosed)


def _of_segmentation(
    look: Look, seg_XYZ: np.ndarray, voxel_mm3: float, purpose: Purpose, masked: bool
) -> list[Finding]:
    inside = int(np.count_nonzero(seg_XYZ))
    if not inside:
        return [(RED if purpose.structure_ml else YELLOW, "nothing was segmented")]
    found: list[Finding] = []
    ml = inside * voxel_mm3 / 1000
    if (light := _light("structure_ml", ml, purpose.structure_ml)) and purpose.structure_ml:
        found.append((light, f"{purpose.structure} of {brief(ml)} mL, expected {span(purpose.structure_ml)} mL"))
    share = ml / look.head_ml if look.head_ml else math.inf
    if (light := _light("structure_share", share, purpose.structure_share)) and purpose.structure_share:
        low, high = (100 * value for value in purpose.structure_share)
        words = f"{purpose.structure} is {brief(100 * share)} % of the head, expected {low:.0f} to {high:.0f} %"
        found.append((light, words + f" ({MASK})" * (not masked and 100 * share < low)))
    border = sum(int(np.count_nonzero(seg_XYZ.take(end, axis))) for axis in range(3) for end in (0, -1))
    if purpose.structure_ml and border > BORDER * inside:
        found.append((YELLOW, f"{brief(100 * border / inside, 2)} % of the segmentation lies on the image's border"))
    return found


def _light(what: str, value: float, wanted: Range | None) -> str:
    """Empty inside the range."""
    away = _beyond(value, wanted)
    return "" if away <= 1.001 else YELLOW if away <= SLACK[what] else RED
