"""A run's settings against what the store says of every subject, before the first update: all faults in one list.

Subjects rotate through memory, so that a fault of one would end a run in the middle of an epoch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastsrgan.core.files import mapping
from fastsrgan.data.subject import PatchRule, patch_origins, positive_box
from fastsrgan.errors import InputError, UsageError, counted, some
from fastsrgan.observation.model import Degradation
from fastsrgan.observation.slice_axis import Axes, describe, on_stored_axes
from fastsrgan.store.reader import Store, Subject
from fastsrgan.volume.geometry import PLANES, WORLD_AXES, Orientation, processing_orientation
from fastsrgan.volume.intensity import lifted
from fastsrgan.volume.resample import SAME

LABELS = "--label"  # what warnings about the choice of all label maps begin with
FEW = 4  # slices through a head, below which a setting is told: little of it is left
SHOWN = 20  # subjects that a message names for one fault


@dataclass(frozen=True)
class _Fault:
    """What is wrong, in words that other subjects share; what of this one; and what to do."""

    kind: str
    detail: str
    hint: str


def refuse_faults(
    store: Store,
    law: Degradation,
    rule: PatchRule,
    axes: Axes | None,
    structure: Sequence[int] = (),
    fit_mask: bool = False,
    share: float = 0.0,
) -> None:
    """Raise InputError that names every subject with which this run could not go on, fault by fault; UsageError for a
    structure where no subject has tissues.

    structure : values of the tissues that are the label; fit_mask : whether the masks are learned; share : of the
        visits that show an image made of tissues
    """
    if structure and not any(subject.has_tissues for subject in store.subjects):
        reason = "no subject has tissues, of which images are made"
        raise UsageError("structure", reason, "Tissue_image, or leave it out")
    found: list[tuple[str, _Fault]] = []
    for subject in store.subjects:
        own = _faults(store, subject, law, rule, axes, bool(structure), fit_mask)
        found += [(subject.id, fault) for fault in own + _lost_structure(subject, structure, share)]
    if not found:
        return
    told = []
    for kind in dict.fromkeys(fault.kind for _, fault in found):
        names = [name + (f" ({f.detail})" if f.detail else "") for name, f in found if f.kind == kind]
        told.append(f"{kind}: {some(names, SHOWN)}")
    count = f"{len(found)} faults: " if len(found) > 1 and len(told) > 1 else ""
    raise InputError(store.url, count + "; ".join(told), "; ".join(dict.fromkeys(fault.hint for _, fault in found)))


def small_subjects(store: Store, rule: PatchRule) -> list[str]:
    """A line for each subject that is smaller than a patch, which zeros then fill."""
    small = [s for s in store.subjects if min(s.shape) < rule.patch]
    sizes = {s.id: " x ".join(map(str, s.shape)) for s in small}
    return [f"{name}: {size} voxels are smaller than a patch of {rule.patch}" for name, size in sizes.items()]


def full_subjects(store: Store, law: Degradation, axes: Axes | None) -> list[str]:
    """A line where subjects are as coarse as the coarsest scan that may be drawn: nothing of them is to be restored."""
    coarsest = _coarsest(law)
    pairs = {s.id: zip(_stored(coarsest, s, axes), s.spacing, strict=True) for s in store.subjects}
    names = [name for name, sizes in pairs.items() if all(low / own < 1 + SAME for low, own in sizes)]
    size = " x ".join(f"{low:g}" for low in coarsest)
    told = f"{size} mm (-n) are their own voxels, so nothing is to be super-resolved: {some(names, SHOWN)}"
    return [f"{len(names)} of {counted(len(store.subjects), 'subject')}: {told}"] if names else []


def few_slices(store: Store, law: Degradation, axes: Axes | None) -> list[str]:
    """A line where the coarsest scan that may be drawn has fewer than ``FEW`` slices through the heads of subjects."""
    found = [(s.id, n, low) for s in store.subjects for n, low in [min(_slices(s, law, axes))] if n < FEW]
    if not found:
        return []
    names = [f"{name} ({n:.2g})" for name, n, _ in found]
    told = f"{found[0][2]:g} mm (-n) leave fewer than {FEW} slices of a head: {some(names, SHOWN)}"
    return [f"{len(found)} of {len(store.subjects)} subjects: {told}"]


def odd_sizes(store: Store, law: Degradation, rule: PatchRule, axes: Axes | None) -> list[str]:
    """What the low resolution and the patches are odd for, a line each."""
    more = full_subjects(store, law, axes) + few_slices(store, law, axes)
    return small_subjects(store, rule) + more + thick_order(law, axes)


def thick_order(law: Degradation, axes: Axes | None) -> list[str]:
    """A line where the largest of the low resolution's numbers is not the last, which is the one through the slices."""
    sizes = [(low + high) / 2 for low, high in zip(law.low_res[0], law.low_res[-1], strict=True)]
    if axes is None or max(sizes) < sizes[2] * (1 + SAME):
        return []
    thick = WORLD_AXES[axes[sizes.index(max(sizes))]]
    told = f"the last number of -n is through the slices, and it is not the largest: {describe(axes, law.low_res)} are"
    return [f"{told} {PLANES[thick]} thick slices; name the largest last, and --slice-axis where others are meant"]


def structures(store: Store) -> list[tuple[str, list[int]]]:
    """Name and label values of each structure that `convert` made a class of; empty where there are not several.

    Raises InputError where subjects have others.
    """
    kinds: dict[str, list[str]] = {}
    for s in store.subjects:
        kinds.setdefault(json.dumps(s.attrs.get("structures") or []), []).append(s.id)
    if len(kinds) > 1:
        named = {k: ", ".join(n for n, _ in json.loads(k)) or "one" for k in kinds}
        told = "; ".join(f"{', '.join(ids[:3])}: {named[k]}" for k, ids in kinds.items())
        raise InputError(store.url, f"its subjects hold other structures: {told}", "convert all with the same --label")
    return [(str(name), list(values)) for kind in kinds for name, values in json.loads(kind)]


def data_warnings(subjects: Iterable[Subject]) -> dict[str, list[str]]:
    """What the conversion noted about each subject's files, images that seem to be there twice, and chosen
    values that no label map holds."""
    found: dict[str, list[str]] = {}
    alike: dict[str, Subject] = {}  # what images of the same voxels share, however their files are packed
    held: dict[int, list[bool]] = {}  # chosen value -> whether it occurs, of each map that it was chosen of
    for s in subjects:
        texts = s.attrs.get("warnings")
        found |= {s.id: [str(text) for text in texts]} if isinstance(texts, list) and texts else {}
        if s.attrs.get("intensity"):
            facts = json.dumps([list(s.shape), s.attrs.get("bounding_box"), s.attrs["intensity"]], sort_keys=True)
            if (twin := alike.setdefault(facts, s)) is not s:
                what = ": it counts twice" if twin.split == s.split else ", and one is in Train and one in Test"
                found.setdefault(s.id, []).append(f"image: the same voxels as {twin.id}, it seems{what}")
        chosen = [*s.attrs.get("label_classes", ()), *(v for _, some in s.attrs.get("structures", ()) for v in some)]
        for value in set(chosen):
            held.setdefault(value, []).append(value not in s.attrs.get("label_absent", ()))
    told = [
        f"{v} occurs {'not in the label map' if len(there) == 1 else f'in none of the {len(there)} label maps'}"
        for v, there in sorted(held.items())
        if not any(there)
    ]
    return found | ({LABELS: told} if told else {})


def _faults(
    store: Store, subject: Subject, law: Degradation, rule: PatchRule, axes: Axes | None, named: bool, fit_mask: bool
) -> list[_Fault]:
    found = []
    if not (subject.has_label or subject.has_tissues):
        found.append(_Fault("without a label", "", "training needs Label_image or Tissue_image for every subject"))
    elif subject.has_tissues and not (subject.has_image and subject.has_label) and not named:
        hint = "--structure 3,42 names the values of the tissues that are the label"
        found.append(_Fault("tissues in place of an image or a label, and no structure is named", "", hint))
    values = sorted(set(mapping(subject.attrs.get("label_counts"))) - {"0", "1"}, key=int)
    if values:
        hint = (
            "make each label 1 inside the structure and 0 outside, or choose with --label-classes; then convert again"
        )
        found.append(_Fault("labels hold other values than 0 and 1", f"also {', '.join(values[:5])}", hint))
    if subject.has_image and subject.attrs.get("bounding_box") is None and law.geometry != "physical":
        hint = "--geometry physical moves them up, or add a number to the voxels"
        found.append(_Fault("images without a voxel above 0", "", hint))
    if _too_coarse(subject, law, axes):
        asked, own = (" x ".join(f"{s:g}" for s in sizes) for sizes in (_finest(law), subject.spacing))
        hint = "ask for the same or coarser with -n, or leave them out"
        found.append(_Fault(f"coarser than the low resolution of {asked} mm", f"{own} mm", hint))
    few, thick = min(_slices(subject, law, axes))
    if few < 1:
        kind = f"no thicker than one slice of {thick:g} mm (-n)"
        found.append(_Fault(kind, f"{few * thick:.3g} mm", "ask for slices of which several lie in a head"))
    why = "overlapping_with_mask" if rule.by_mask else "fit_mask"
    if not subject.has_image and (fit_mask or rule.by_mask):
        hint = f"{why} needs HR_image and Mask_image for every subject"
        found.append(_Fault("images that are made of tissues have no mask", "", hint))
    elif not subject.has_mask and (fit_mask or rule.by_mask):
        found.append(_Fault("without a mask", "", f"{why} needs Mask_image for every subject"))
    elif rule.by_mask and not _has_patch(store, subject, law, rule, axes):
        kind = f"without a patch of {rule.patch} voxels of which more than half lie in the mask"
        found.append(_Fault(kind, "", "a smaller patch_size or stride, larger masks, or -icm bounding_box"))
    return found


def _lost_structure(subject: Subject, structure: Sequence[int], share: float) -> list[_Fault]:
    """Tissues that are to be the label and hold nothing of the structure."""
    counts = mapping(subject.attrs.get("tissues_counts"))
    needed = subject.has_tissues and (share > 0 or not (subject.has_image and subject.has_label))
    if not (structure and counts and needed) or any(str(value) in counts for value in structure):
        return []
    held = sorted((value for value in counts if value != "0"), key=int)
    kind = f"tissues hold none of the structure's values {', '.join(map(str, structure))}"
    return [_Fault(kind, f"they hold {some(held) or 'nothing'}", "name values of the tissues with --structure")]


def _finest(law: Degradation) -> list[float]:
    """The smallest voxel sizes that may be drawn."""
    return [min(sizes) for sizes in zip(*law.low_res, strict=True)]


def _coarsest(law: Degradation) -> list[float]:
    """The largest."""
    return [max(sizes) for sizes in zip(*law.low_res, strict=True)]


def _stored(values: Sequence[float], subject: Subject, axes: Axes | None) -> tuple[float, ...]:
    return tuple(values) if axes is None else on_stored_axes(values, axes, subject.affine)


def _slices(subject: Subject, law: Degradation, axes: Axes | None) -> list[tuple[float, float]]:
    """(how many lie in the head, their thickness in mm) of the thickest slices that may be drawn, by stored axis. The
    head is the box of what is above 0, the image where the store does not say it."""
    coarsest = _coarsest(law)
    lowest = mapping(subject.attrs.get("intensity")).get("min", 0)  # of an image with values below 0 nothing is air
    box = (subject.attrs.get("bounding_box") if lowest >= 0 else None) or [(0, n) for n in subject.shape]
    extent = [(stop - start) * own for (start, stop), own in zip(box, subject.spacing, strict=True)]
    return [(mm / low, low) for mm, low in zip(extent, _stored(coarsest, subject, axes), strict=True)]


def _too_coarse(subject: Subject, law: Degradation, axes: Axes | None) -> bool:
    """The image's voxels against the finest that is drawn."""
    pairs = list(zip(_stored(_finest(law), subject, axes), subject.spacing, strict=True))
    if law.interp == "sitk":
        return any(round(low / own) < 1 for low, own in pairs)
    return any(low / own < 1 - SAME for low, own in pairs)


def _has_patch(store: Store, subject: Subject, law: Degradation, rule: PatchRule, axes: Axes | None) -> bool:
    """Whether a patch can be taken; also True of a subject that cannot be read, which is left out with a warning."""
    counts = mapping(subject.attrs.get("mask_counts"))
    inside = sum(int(n) for value, n in counts.items() if value != "0")
    if counts and inside <= rule.patch**3 / 2:
        return False
    try:
        sample: Any = store.read(subject.id)
    except InputError:
        return True
    turn = Orientation()
    if law.geometry == "physical":
        middle = [(low + high) / 2 for low, high in zip(law.low_res[0], law.low_res[-1], strict=True)]
        turn = processing_orientation(sample.affine, _stored(middle, subject, axes))
    image, mask = np.ascontiguousarray(turn.apply(sample.image)), turn.apply(sample.mask)
    box = positive_box(lifted(image) if law.geometry == "physical" else image)
    return bool(len(patch_origins(image.shape, rule.patch, rule.stride, box, mask)))
