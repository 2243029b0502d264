"""The work of the end-to-end data benchmark: its sizes, and a synthetic cohort as NIfTI files and as a store."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.common import texture
from fastsrgan.convert import convert
from fastsrgan.data.subject import patch_origins, positive_box
from fastsrgan.io import nifti as images
from fastsrgan.volume.resample import modulo_size

MARGIN = 6  # voxels around the box of a cropped volume: further than the blur's Gaussian reaches at ratio 3
THRESHOLD = 500  # stored intensity above which a voxel belongs to the label
AIR = 0.0


class Patches(NamedTuple):
    """What every side delivers: x (B, 1, P, P, P) interpolated; y (B, 2, P, P, P) truth and label; float32."""

    x: Tensor
    y: Tensor


Epochs = Iterator[Iterator[Patches]]  # what a side is: epoch after epoch, each batch after batch


@dataclass(frozen=True)
class Work:
    """What every side has to do; plain values, so that a child process can be told.

    folder : of the cohort: ID.nii.gz, ID_label.nii.gz, store
    shape, patch, stride, batch : voxels per axis; edge and grid spacing of patches; patches per batch
    subjects : number of volumes; patches : patches of each of them in one epoch
    epochs : that are timed after the first one; limit : seconds after which no further one of them begins, beyond two
    workers : processes of the peers' loaders; threads : of torch in the main process
    step_ms : duration of the simulated training step
    low_res, contrast, noise, geometry : the degradation (fastsrgan.observation.model.Degradation)
    """

    folder: str
    shape: tuple[int, int, int]
    patch: int
    batch: int
    subjects: int
    patches: int = 0
    stride: int = 20
    epochs: int = 4
    limit: int = 12
    workers: int = 2
    threads: int = 2
    step_ms: int = 145
    low_res: tuple[float, float, float] = (1.0, 1.0, 3.0)
    contrast: float = 0.5
    noise: float = 0.03
    geometry: str = "physical"
    device: str = "cpu"
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """Ids of the subjects."""
        return [f"subject{i:03d}" for i in range(self.subjects)]

    def image(self, name: str) -> str:
        """Path of a subject's image."""
        return str(Path(self.folder, f"{name}.nii.gz"))

    def label(self, name: str) -> str:
        """Path of a subject's label."""
        return str(Path(self.folder, f"{name}_label.nii.gz"))

    @property
    def store(self) -> str:
        """Path of the store."""
        return str(Path(self.folder, "store.zarr"))

    @property
    def cut(self) -> tuple[slice, slice, slice]:
        """What of a volume is used: all of it in "physical" geometry, the original's crop in "segsrgan"."""
        if self.geometry == "physical":
            return (slice(None),) * 3
        return tuple(slice(0, modulo_size(n, r)) for n, r in zip(self.shape, self.low_res, strict=True))  # type: ignore[return-value]

    def origins(self, image_XYZ: np.ndarray) -> np.ndarray:
        """(n, 3) corners of a volume's patches: the grid over its positive voxels, as fastsrgan takes it."""
        image = image_XYZ[self.cut]
        return patch_origins(image.shape, self.patch, self.stride, positive_box(image))

    def part(self, image_XYZ: np.ndarray) -> tuple[slice, slice, slice]:
        """What is left of a volume that was cropped to its head: the box of its positive voxels with a margin, at least
        a patch wide, on whole voxels of the low resolution."""
        found = []
        for n, (low, high), r in zip(image_XYZ.shape, positive_box(image_XYZ), self.low_res, strict=True):
            low, high, step = max(0, low - MARGIN), min(n, high + MARGIN), round(r)
            low = min(low, max(0, n - self.patch)) // step * step
            high = min(n, max(high, low + self.patch))
            found.append(slice(low, min(n, low - (low - high) // step * step)))
        return tuple(found)  # type: ignore[return-value]


def head(shape: Sequence[int], seed: int, fill: float) -> np.ndarray:
    """(X, Y, Z) int16 in [100, 1000] inside an ellipsoid as wide as ``fill`` of each axis, 0 outside of it."""
    image = texture(shape, seed, air=False)
    axes = np.ogrid[tuple(slice(-1, 1, complex(0, n)) for n in shape)]
    image[sum(a**2 for a in axes) >= fill**2] = AIR
    return (image * 1000).astype(np.int16)


def make_cohort(work: Work, fill: float) -> tuple[int, dict[str, Any]]:
    """Write the files and convert them: patches per volume and epoch, and what the conversion took.

    All heads have the same outline, and so the same number of patches.
    """
    folder = Path(work.folder)
    counts = set()
    for i, name in enumerate(work.names):
        image = head(work.shape, work.seed + i, fill)
        images.save(work.image(name), image, np.eye(4))
        images.save(work.label(name), (image > THRESHOLD).astype(np.uint8), np.eye(4))
        counts.add(len(work.origins(image)))
    with open(folder / "cohort.csv", "w", newline="", encoding="utf8") as f:
        table = csv.writer(f)
        table.writerow(["HR_image", "Label_image", "Base"])
        table.writerows([work.image(name), work.label(name), "Train"] for name in work.names)
    began = time.perf_counter()
    done = convert(folder / "cohort.csv", work.store)
    seconds = time.perf_counter() - began
    (count,) = counts
    files = sum(Path(path).stat().st_size for name in work.names for path in (work.image(name), work.label(name)))
    return count, {
        "seconds_per_volume": seconds / work.subjects,
        "nifti_bytes_per_volume": files / work.subjects,
        "raw_bytes_per_volume": done["raw_bytes"] / work.subjects,
        "store_bytes_per_volume": done["stored_bytes"] / work.subjects,
    }


@dataclass
class Cohort:
    """Synthetic files and store, made when first asked for and gone with this object."""

    work: Work
    fill: float
    facts: dict[str, Any] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory | None = None

    def made(self, **changes: Any) -> Work:
        """The work on the cohort, with other settings where given."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fastsrgan-bench-")
            self.work = dataclasses.replace(self.work, folder=self._folder.name)
            count, self.facts = make_cohort(self.work, self.fill)
            self.work = dataclasses.replace(self.work, patches=count)
        return dataclasses.replace(self.work, **changes)


def cohort_of(args: argparse.Namespace) -> Cohort:
    """The cohort that the options ask for."""
    shape = (args.shape[0], args.shape[1], max(3, args.shape[2] - args.shape[2] % 3))
    work = Work(
        folder="",
        shape=shape,
        patch=args.patch,
        batch=args.batch[0],
        stride=args.stride,
        subjects=args.subjects,
        epochs=args.epochs,
        limit=args.limit,
        workers=args.workers or len(os.sched_getaffinity(0)),
        threads=args.threads,
        step_ms=args.step_ms,
        device=args.device,
    )
    return Cohort(work, args.fill / 100)


def batches(parts: Iterable[tuple[Tensor, Tensor, Tensor]], size: int) -> Iterator[Patches]:
    """(lr, hr, label) of any number of patches (N, 1, P, P, P) -> batches of ``size``, the last one of what is left."""
    left: list[tuple[Tensor, ...]] = []
    for part in parts:
        missing = size - sum(len(p[0]) for p in left)
        left.append(tuple(t[:missing] for t in part))
        if len(part[0]) < missing:
            continue
        yield joined(left)
        whole = missing + (len(part[0]) - missing) // size * size
        for i in range(missing, whole, size):
            yield as_patches(*(t[i : i + size] for t in part))
        left = [tuple(t[whole:] for t in part)]
    if sum(len(p[0]) for p in left):
        yield joined(left)


def joined(parts: Sequence[tuple[Tensor, ...]]) -> Patches:
    """One batch out of several parts."""
    return as_patches(*(torch.cat(ts) if len(ts) > 1 else ts[0] for ts in zip(*parts, strict=True)))


def as_patches(lr: Tensor, hr: Tensor, label: Tensor) -> Patches:
    """One batch in the form that a training step takes."""
    return Patches(lr.float(), torch.cat([hr.float(), label.float()], dim=1))


def forever(epoch: Any) -> Epochs:
    """Epoch after epoch of a function of its number, the first being 1."""
    return (epoch(number) for number in itertools.count(1))


# --- patches of one volume --------------------------------------------------------------------------------------------
