"""Data before the training step: degradation of a volume, gathering of patches, reading from the store."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from bench import data_engine
from bench.common import Case, OwnWay, Sides, texture
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.data.subject import patch_origins
from fastsrgan.io import nifti as images
from fastsrgan.observation.model import degrade
from fastsrgan.store.reader import Store, open_store
from fastsrgan.store.writer import create_store
from fastsrgan.volume import resample
from fastsrgan.volume.resample import FWHM

FACTOR = 3
SPACING, LOW_RES = (1.0, 1.0, 1.0), (1.0, 1.0, float(FACTOR))
TOLERANCE = 5e-6  # of the largest intensity; found: 4.8e-7 (results/epyc-zen3-2cores/data.json)
STRIDE = 20  # of the patch grid, the default of `fastsrgan train`


def cases(args: argparse.Namespace) -> list[Case | OwnWay]:
    """Degradation in both geometries, patch gather, store read; then the end-to-end rows."""
    nx, ny, nz = args.shape
    # A multiple of the factor: voxel centres of both grids then coincide, which SciPy's decimation by slicing needs.
    shape = (nx, ny, max(FACTOR, nz - nz % FACTOR))
    facts = {"shape": list(shape), "factor": FACTOR}
    voxels = ("voxels", float(np.prod(shape)))
    found: list[Case | OwnWay] = []
    for geometry in ("physical", "segsrgan"):
        for cold in (False, True):
            what = "a resolution not seen before" if cold else "matrices at hand"
            sides = _degrade_sides(shape, geometry, cold)
            title = f"degrade, {geometry}, {what}"
            # What it takes at most does not depend on what was at hand.
            found.append(Case(title, {**facts, "geometry": geometry}, sides, TOLERANCE, voxels, memory=not cold))
    batch = args.batch[0]
    patch = {"shape": list(shape), "patch": args.patch, "batch": batch}
    gather = _gather_sides(shape, args.patch, batch)
    found.append(Case(f"patch gather, {batch} of {args.patch}^3", patch, gather, 0.0, ("patches", float(batch))))
    facts = {"shape": list(args.shape), "files": "warm: the operating system has them in memory"}
    sides = functools.partial(_read_sides, tuple(args.shape))
    found.append(Case("store read, int16 image and label", facts, sides, 0.0, ("volumes", 1.0)))
    return [*found, *(data_engine.cases(args) if args.engine else ())]


# --- degradation --------------------------------------------------------------------------------------------------


def _degrade_sides(shape: tuple[int, int, int], geometry: str, cold: bool) -> Callable[[], Sides]:
    def build() -> Sides:
        hr = texture(shape)
        theirs = scipy_physical if geometry == "physical" else scipy_segsrgan

        def ours() -> list[np.ndarray]:
            if cold:
                forget_matrices()
            done = degrade(hr, SPACING, LOW_RES, geometry=geometry)
            return [done.low_res, done.interpolated, done.hr]

        return {"fastsrgan": ours, "scipy": lambda: theirs(hr)}

    return build


def forget_matrices() -> None:
    """Empty every cache of operators, as a resolution drawn anew finds them."""
    for name in vars(resample):
        clear = getattr(getattr(resample, name), "cache_clear", None)
        if clear is not None:
            clear()


def scipy_physical(hr: np.ndarray) -> list[np.ndarray]:
    """Slice profile along z, every third voxel from the second on, cubic spline back at the voxels' centres."""
    blurred = ndimage.gaussian_filter1d(hr, FACTOR / FWHM, axis=2)
    lr = np.maximum(blurred[:, :, FACTOR // 2 :: FACTOR], 0)
    scale = lr.max()
    lr = lr / scale
    offset = [0, 0, -(FACTOR // 2) / FACTOR]
    back = ndimage.affine_transform(lr, [1, 1, 1 / FACTOR], offset, hr.shape, order=3, mode="reflect")
    return [lr, back, hr / scale]


def scipy_segsrgan(hr: np.ndarray) -> list[np.ndarray]:
    """What the original does: Gaussian on every axis, zoom of order 0 down, zoom of order 3 up."""
    blurred = ndimage.gaussian_filter(hr, [r / FWHM for r in LOW_RES])
    lr = np.maximum(ndimage.zoom(blurred, (1, 1, 1 / FACTOR), order=0), 0)
    scale = lr.max()
    lr = lr / scale
    return [lr, ndimage.zoom(lr, (1, 1, FACTOR), order=3), hr / scale]


# --- patches ------------------------------------------------------------------------------------------------------


def _gather_sides(shape: tuple[int, int, int], patch: int, batch: int) -> Callable[[], Sides]:
    def build() -> Sides:
        hr = texture(shape)
        interpolated, label = np.roll(hr, 1, 2), (hr > 0.5).astype(np.uint8)
        origins = patch_origins(shape, patch, STRIDE, tuple((0, n) for n in shape))
        z, x, s = (torch.from_numpy(a) for a in (interpolated, hr, label))
        pool = Pool([Resident("texture", z, x, s, None, float(FACTOR), origins)], patch)
        indices = pool.order()[np.arange(batch) % len(pool)]

        def ours() -> list[torch.Tensor]:
            done = pool.gather(indices)
            return [done.x, done.y]

        def theirs() -> list[torch.Tensor]:
            x, y = [], []
            for i, j, k in origins[indices]:
                cut = (slice(i, i + patch), slice(j, j + patch), slice(k, k + patch))
                x.append(interpolated[cut][None])
                y.append(np.stack([hr[cut], label[cut].astype(np.float32)]))
            return [torch.from_numpy(np.stack(x)), torch.from_numpy(np.stack(y))]

        return {"fastsrgan": ours, "numpy slices and stack": theirs}

    return build


# --- store --------------------------------------------------------------------------------------------------------


def _read_sides(shape: tuple[int, ...]) -> Sides:
    folder = tempfile.TemporaryDirectory(prefix="fastsrgan-bench-")
    root = Path(folder.name)
    # As a scanner stores it: integers with noise in the last bits, also outside the head.
    noise = np.random.default_rng(0).integers(0, 16, shape)
    image = (texture(shape) * 1000).astype(np.int16) + noise.astype(np.int16)
    label = (image > 500).astype(np.uint8)
    with create_store(root / "store") as writer:
        writer.write("texture", "Train", image, 1.0, 0.0, label, None, np.eye(4), {})
        writer.finish()
    paths = [images.save(root / f"{name}.nii.gz", a, np.eye(4)) for name, a in (("image", image), ("label", label))]
    store, by_zarr = open_store(root / "store"), open_store(root / "store", "zarr")

    # Each side holds the folder: one may be all that is kept of them.
    def ours(_: Any = folder, store: Store = store) -> list[np.ndarray]:
        sample = store.read("texture")
        return [sample.image, sample.label]  # type: ignore[list-item]

    def plain(_: Any = folder) -> list[np.ndarray]:
        loaded = [np.asanyarray(nib.load(p).dataobj) for p in paths]  # type: ignore[attr-defined]
        return [loaded[0].astype(np.float32), loaded[1]]

    def checked(_: Any = folder) -> list[np.ndarray]:
        return [images.load(paths[0]).data, images.load_label(paths[1]).data]

    sides = {"fastsrgan": ours, "nii.gz, nibabel": plain, "nii.gz, fastsrgan.io.nifti": checked}
    if store.reader != by_zarr.reader:
        sides[f"{by_zarr.reader} for {store.reader}"] = lambda: ours(store=by_zarr)
    return sides
