"""What a study is made on: heads with labels from a table, one image, or a small cohort made from the template.

Heads are degraded by the paper's observation model in units of the largest low-resolution value.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.demo import template
from fastsrgan.demo.template import whole_slices
from fastsrgan.errors import InputError, UsageError
from fastsrgan.evaluate.figures import columns
from fastsrgan.evaluate.grids import reader_label_map
from fastsrgan.io import labels
from fastsrgan.io import nifti as images
from fastsrgan.io import tables as table
from fastsrgan.io.image_list import find_images
from fastsrgan.observation.model import degrade
from fastsrgan.volume.geometry import Volume, grid_size, resampled_affine
from fastsrgan.volume.intensity import lifted

QUICK_BOX = (slice(54, 142), slice(64, 168), slice(60, 132))  # of the template: 88 x 104 x 72 mm of cortex
QUICK_SUBJECTS = 2


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
    """One subject's files; ``key`` is a hash of their bytes, ``classes`` are the label's values of the structure."""

    name: str
    image: Path
    label: Path | None
    mask: Path | None
    key: str
    classes: frozenset[int] | None = None

    def load(self) -> dict[str, Volume]:
        """``hr`` and, where there are such files, ``label`` and ``mask``."""
        found = {"hr": images.load(self.image)}
        for name, path in (("label", self.label), ("mask", self.mask)):
            if path is not None:
                classes = self.classes if name == "label" else None
                found[name] = images.load_label(path, like=found["hr"], classes=classes)
        if "label" in found:
            labels.refuse_many(found["label"].meta["values"], str(self.label))
        return found


@dataclass(frozen=True)
class Case:
    """A head as acquired, on the head's grid but for ``scan``; all in units of the largest low-resolution value.

    label_map : the interpolated label map of a reader of the scan, float32, to be cut at 0.5 (paper table 2)
    """

    scan: Volume
    hr: Volume
    spline: Volume
    label: Volume | None
    label_map: Volume | None
    mask: Volume | None


def find_heads(
    data: str | os.PathLike,
    split: str = "Test",
    limit: int | None = None,
    label_classes: str | None = None,
    label_names: str | os.PathLike | None = None,
) -> list[Head]:
    """Heads of a training table (rows of ``split``, or "all"), the one image that ``data`` names, or those of a folder.

    ``label_classes``, ``label_names``: as for ``convert``; a row's own ``Label_classes`` comes first.

    Raises InputError for a table that cannot be used or without such rows.
    """
    path = Path(data)
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
        chosen = row.classes or label_classes
        values = labels.structure(chosen, row.label, label_names).values if chosen and row.label else None
        found.append(_head(row.subject, row.image, row.label, row.mask, values))
    return found


def quick_heads(folder: Path, seed: int, progress: Progress = QUIET) -> list[Head]:
    """Two synthetic Test subjects of 88 x 104 x 72 voxels made from the template, beside one for training; those of an
    earlier call are taken."""
    csv = folder / "cohort.csv"
    if not csv.exists():
        cut = tuple(_cut(volume) for volume in template.mni152())
        template.make_cohort(
            folder,
            n_train=1,
            n_test=QUICK_SUBJECTS,
            seed=seed,
            crop=False,
            sd_voxels=2.5,
            template=cut,  # type: ignore[arg-type]
            overwrite=True,
            progress=progress,
        )
    return find_heads(csv)


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
    truth, spline = Volume(done.hr, hr.affine), Volume(done.interpolated, hr.affine)
    return Case(scan, truth, spline, label, label_map, cut.get("mask"))


def thick(spacing: Sequence[float], ratio: float, axis: int) -> tuple[float, float, float]:
    """Voxel sizes of an acquisition whose slices along ``axis`` are ``ratio`` times as thick as the head's."""
    if axis not in (0, 1, 2) or not ratio >= 1:
        raise UsageError("resolution", f"ratio {ratio:g} along axis {axis}", "a ratio from 1 up, axis 0, 1 or 2")
    return tuple(float(s * ratio) if d == axis else float(s) for d, s in enumerate(spacing))  # type: ignore[return-value]


def spacing_of(head: Head) -> tuple[float, float, float]:
    """Voxel sizes of a head, stored axes."""
    return images.load(head.image).spacing


def _head(name: str, image: Path, label: Path | None, mask: Path | None, classes: frozenset[int] | None = None) -> Head:
    digests = [images.sha256(path) for path in (image, label, mask) if path is not None]
    digests += [] if classes is None else ["+".join(map(str, sorted(classes)))]
    return Head(name, image, label, mask, "-".join(digest[:16] for digest in digests), classes)


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
