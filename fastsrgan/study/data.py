"""What a study is made on: heads with labels from a table, one image, or a small cohort made from the template.

Heads are degraded by the paper's observation model in units of the largest low-resolution value.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import url_of
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.data.settings_check import FEW, data_warnings
from fastsrgan.data.subject import positive_box
from fastsrgan.demo import template
from fastsrgan.demo.template import whole_slices
from fastsrgan.errors import InputError, UsageError, times
from fastsrgan.evaluate.figures import columns
from fastsrgan.evaluate.grids import reader_label_map
from fastsrgan.io import any_image, labels
from fastsrgan.io import nifti as images
from fastsrgan.io import tables as table
from fastsrgan.io.image_list import find_images
from fastsrgan.observation.model import degrade
from fastsrgan.store.files import MANIFEST
from fastsrgan.store.reader import Store, open_store
from fastsrgan.volume.geometry import Volume, grid_size, resampled_affine
from fastsrgan.volume.intensity import lifted
from fastsrgan.volume.resample import SAME

QUICK_BOX = (slice(54, 142), slice(64, 168), slice(60, 132))  # of the template: 88 x 104 x 72 mm of cortex
QUICK_SUBJECTS = 2
STRUCTURE = "structure "  # before the name of one, among a head's volumes


@dataclass(frozen=True)
class Condition:
    """How a head is acquired: mm along each stored axis, noise over the largest value, contrast power of both images.

    ``name`` is what tables and figures call it and has no part in the numbers.
    """

    name: str
    low_res: tuple[float, float, float]
    noise: float = 0.0
    power: float = 1.0

    def facts(self) -> dict[str, Any]:
        """What decides about the numbers."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


@dataclass(frozen=True)
class Head:
    """One subject's files; ``key`` is a hash of their bytes and of which values of the label are what.

    structures : of the label, the first is the one that is scored throughout; none: whatever is above 0
    store : the subject's arrays are read from it, ``image`` is its place
    """

    name: str
    image: Path
    label: Path | None
    mask: Path | None
    key: str
    structures: tuple[labels.Structure, ...] = ()
    store: Store | None = None

    def load(self) -> dict[str, Volume]:
        """``hr`` and, where there are such files, ``label`` and ``mask``; of several structures a label each under
        ``STRUCTURE`` and its name."""
        several = {STRUCTURE + one.name: one for one in self.structures} if len(self.structures) > 1 else {}
        if self.store is not None:
            sample = self.store.read(self.name)
            arrays = {"hr": sample.image, "label": sample.label, "mask": None if several else sample.mask}
            if sample.mask is not None:  # of several structures it holds their classes
                arrays |= {name: (sample.mask == i).astype(np.uint8) for i, name in enumerate(several, 1)}
            volumes = {name: Volume(array, sample.affine) for name, array in arrays.items() if array is not None}
            found_odd = data_warnings([self.store.subject(self.name)]).get(self.name, ())
            volumes["hr"] = replace(volumes["hr"], warnings=tuple(found_odd))
            if "label" in volumes:
                labels.refuse_many(np.unique(volumes["label"].data).tolist(), f"label of {self.name}")
            return volumes
        found = {"hr": images.load(self.image)}
        if self.label is not None:
            classes = self.structures[0].values if self.structures else None
            found["label"] = images.load_label(self.label, like=found["hr"], classes=classes)
        if self.mask is not None:
            found["mask"] = any_image.load_mask(self.mask, found["hr"])
        if self.label is not None:
            for name, one in several.items():
                found[name] = images.load_label(self.label, like=found["hr"], classes=one.values)
            labels.refuse_many(found["label"].meta["values"], str(self.label))
        return found


@dataclass(frozen=True)
class Case:
    """A head as acquired, on the head's grid but for ``scan``; all in units of the largest low-resolution value.

    label_map : the interpolated label map of a reader of the scan, float32, to be cut at 0.5 (paper table 2)
    structures : of several, name -> label, label map
    """

    scan: Volume
    hr: Volume
    spline: Volume
    label: Volume | None
    label_map: Volume | None
    mask: Volume | None
    structures: Mapping[str, tuple[Volume, Volume]] = field(default_factory=dict)


def find_heads(
    data: str | os.PathLike,
    split: str = "Test",
    limit: int | None = None,
    label_classes: str | Sequence[str] | None = None,
    label_names: str | os.PathLike | None = None,
) -> list[Head]:
    """Heads of a training table or store (rows of ``split``, or "all"), the one image that ``data`` names, or those of
    a folder.

    ``label_classes``, ``label_names``: as for ``convert``; a row's own ``Label_classes`` comes first. A store's labels
    were chosen when it was made.

    Raises InputError for a table or store that cannot be used or without such rows; UsageError for label classes and a
    store, and for label classes or another split of images alone.
    """
    path = Path(data)
    if url_of(str(data)) or (path / MANIFEST).is_file():
        labels.refuse_for_store(label_classes, label_names)
        return _stored_heads(open_store(data), split, limit)
    if images.is_image(path) or path.is_dir():
        for option, given in (("--label-classes", label_classes), ("--label-names", label_names)):
            if given:
                raise UsageError(option, "images alone have no label", "leave it out, or a table with Label_image")
        if split != "Test":
            raise UsageError("--split", "images alone have no Base", "leave it out, or a table")
    if images.is_image(path):
        return [_head(images.stem(path), path, None, None)]
    if path.is_dir():
        found_there = [image for image in find_images([path], path) if images.is_image(image.path)]
        if not found_there:
            raise InputError(path, "holds no image", "a table, an image, or a folder of high-resolution images")
        return [_head(image.name.replace("/", "-"), image.path, None, None) for image in found_there[:limit]]
    rows = [row for row in table.read_table(path, need_label=False) if split in ("all", row.base)]
    if not rows:
        raise InputError(path, f"has no rows of Base {split}", "--split Train, Test or all")
    found = []
    for row in rows[:limit]:
        chosen = labels.choices(row.classes, label_classes) if row.label else []
        known = labels.structures(chosen, row.label, label_names) if row.label else []
        labels.refuse_overlap(known)
        found.append(_head(row.subject, row.image, row.label, row.mask, tuple(known)))
    labels.refuse_lost((head.label, head.structures, None) for head in found if head.label)
    return found


def _stored_heads(store: Store, split: str, limit: int | None) -> list[Head]:
    """The subjects of a store that have an image of their own."""
    rows = [s for s in store.subjects if split in ("all", s.split) and s.has_image]
    if not rows:
        raise InputError(store.url, f"has no subjects of Base {split} with an image", "--split Train, Test or all")
    found = []
    for s in rows[:limit]:
        digest = hashlib.sha256("".join(sha for _, (_, sha) in sorted(s.files.items())).encode()).hexdigest()
        known = tuple(labels.Structure(name, frozenset(values)) for name, values in s.attrs.get("structures", ()))
        found.append(Head(s.id, Path(store.url), None, None, digest[:32], known, store))
    return found


def quick_heads(folder: Path, seed: int, progress: Progress = QUIET) -> list[Head]:
    """Two synthetic Test subjects of 88 x 104 x 72 voxels made from the template, beside one for training; those of an
    earlier call are taken."""
    csv = folder / "cohort.csv"
    if not csv.exists():
        cut = tuple(_cut(volume) for volume in template.mni152())
        made: dict[str, Any] = {"n_train": 1, "n_test": QUICK_SUBJECTS, "seed": seed, "crop": False, "sd_voxels": 2.5}
        template.make_cohort(folder, **made, template=cut, overwrite=True, progress=progress)  # type: ignore[arg-type]
    return find_heads(csv)


def odd_slices(hr: Volume, conditions: Sequence[Condition]) -> dict[Condition, list[str]]:
    """What is odd about the slices of each condition through a head, which is the box of what is above 0.

    Raises InputError, of whichever condition, where one slice is as thick as the head.
    """
    box = positive_box(lifted(hr.data))
    extent = [(stop - start) * own for (start, stop), own in zip(box, hr.spacing, strict=True)]
    told: dict[Condition, list[str]] = {}
    for one in conditions:
        few, thick_mm, there = min((mm / low, low, mm) for mm, low in zip(extent, one.low_res, strict=True))
        if few < 1:
            reason = f"the head is {there:.3g} mm there, less than one of them"
            raise InputError(f"slices of {thick_mm:g} mm", reason, "smaller --ratios or --low-res")
        told[one] = [f"slices of {thick_mm:g} mm: {few:.2g} of them lie in the head"] if few < FEW else []
        if all(low / own < 1 + SAME for low, own in zip(one.low_res, hr.spacing, strict=True)):
            told[one].append(f"{times(one.low_res)} mm are the head's own voxels: nothing is to be super-resolved")
    return told


def acquire(volumes: dict[str, Volume], condition: Condition, key: Sequence[int | str]) -> Case:
    """Degrade one head. Slices at its end that no whole low-resolution voxel covers are left out.

    ``key`` names the noise. Raises UsageError for a low resolution finer than the head.
    """
    cut = {name: whole_slices(volume, condition.low_res) for name, volume in volumes.items()}
    hr = cut["hr"]
    hr = replace(hr, data=lifted(hr.data))
    done = degrade(
        hr.data, hr.spacing, condition.low_res, power=condition.power, noise=condition.noise, key=(*key, "noise")
    )
    shape = tuple(grid_size(n, s, r) for n, s, r in zip(hr.data.shape, hr.spacing, condition.low_res, strict=True))
    scan = Volume(done.low_res, resampled_affine(hr.affine, hr.data.shape, shape, condition.low_res))
    label = cut.get("label")
    label_map = None if label is None else reader_label_map(label, scan, [])
    truth, spline = Volume(done.hr, hr.affine, hr.warnings), Volume(done.interpolated, hr.affine)
    parts = {name.removeprefix(STRUCTURE): volume for name, volume in cut.items() if name.startswith(STRUCTURE)}
    structures = {name: (volume, reader_label_map(volume, scan, [])) for name, volume in parts.items()}
    return Case(scan, truth, spline, label, label_map, cut.get("mask"), structures)


def thick(spacing: Sequence[float], ratio: float, axis: int) -> tuple[float, float, float]:
    """Voxel sizes of an acquisition whose slices along ``axis`` are ``ratio`` times as thick as the head's."""
    if axis not in (0, 1, 2) or not ratio >= 1:
        raise UsageError("resolution", f"ratio {ratio:g} along axis {axis}", "a ratio from 1 up, axis 0, 1 or 2")
    return tuple(float(s * ratio) if d == axis else float(s) for d, s in enumerate(spacing))  # type: ignore[return-value]


def spacing_of(head: Head) -> tuple[float, float, float]:
    """Voxel sizes of a head, stored axes."""
    return images.load(head.image).spacing if head.store is None else head.store.subject(head.name).spacing


def _head(
    name: str, image: Path, label: Path | None, mask: Path | None, known: tuple[labels.Structure, ...] = ()
) -> Head:
    digests = [any_image.sha256(path)[:16] for path in (image, label, mask) if path is not None]
    values = ["+".join(map(str, sorted(one.values))) for one in known]
    digests += values if len(known) == 1 else [f"{one.name}={v}" for one, v in zip(known, values, strict=True)]
    return Head(name, image, label, mask, "-".join(digests), known)


def _cut(volume: Volume) -> Volume:
    affine = np.array(volume.affine, float)
    affine[:3, 3] = (affine @ [*(s.start for s in QUICK_BOX), 1])[:3]
    return Volume(np.ascontiguousarray(volume.data[QUICK_BOX]), affine, volume.warnings, volume.meta)


BASELINE = "interpolation"  # the "model" of the baselines: cubic spline, interpolated label map
# Figures of a cell besides those of an evaluation: name -> heading, digits.
OWN = {"seconds": ("seconds", 2), "tiles": ("tiles", 0)}


def figure_paths() -> dict[str, str]:
    """Column of the tables -> number of a cell."""
    return {name: column.path for name, column in columns().items()} | {name: name for name in OWN}


DICE_OF = "dice_"  # before the name of a structure, in a column of the tables


def structure_paths(numbers: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The same of the Dice of each of several structures, as far as cells have them."""
    ends = ("structures.", ".dice")
    paths = dict.fromkeys(
        path for one in numbers for path in one if path.startswith(ends[0]) and path.endswith(ends[1])
    )
    return {DICE_OF + path.removeprefix(ends[0]).removesuffix(ends[1]): path for path in paths}
