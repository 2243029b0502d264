"""Dice of a model on brains that look otherwise: `python tools/changed_brains.py ATLAS -w perinatal [-w OTHER]`.

ATLAS is that of tools/perinatal_volumes.py; the brains are those that it holds out. Each is changed (its contrast, its
sharpness, the fluid around it), cut into Gaussian slices three voxels apart and thick, and segmented; the truth stays.
What other atlases, scanners and brain extractions are like is not known by this, but what a model leans on shows.

One line of JSON for each brain and change: Dice, the volume over the true one, and Dice without the outermost voxels of
the image (those beside its zeros), of each model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from perinatal_volumes import CORTEX, FLUID, smooth_field
from scipy import ndimage
from score_thick_slices import MARGIN, TILES, load

import fastsrgan
from fastsrgan.core.files import write_json
from fastsrgan.core.system import provenance
from fastsrgan.evaluate import metrics
from fastsrgan.model import weights
from fastsrgan.model.purpose import Purpose
from fastsrgan.volume.resample import apply_axes, slice_profile_matrix

WHITE, RATIO = 1, 3
AIR = 0.02  # of the maximum


def changed(image: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The image and what becomes of it; 0 stays 0."""
    yield "as it is", image
    for power in (0.6, 1.6):
        yield f"intensities to the power of {power:g}", image**power
    yield "bias field", image * np.exp(0.35 * smooth_field(np.random.default_rng(0), list(image.shape), 3, 0.5)[0])
    yield "smoother by 0.7 voxels", ndimage.gaussian_filter(image, 0.7)
    sharper = np.clip(2 * image - ndimage.gaussian_filter(image, 0.8), 0, 1.3)
    yield "sharper", np.where(image > 0, sharper, 0)
    means = {tissue: float(image[labels == tissue].mean()) for tissue in (WHITE, CORTEX)}
    for name, wanted in {
        "white matter and cortex alike": {WHITE: 0.62, CORTEX: 0.57},
        "dark cortex": {WHITE: 0.75, CORTEX: 0.40},
    }.items():
        shift = sum((labels == tissue) * (value - means[tissue]) for tissue, value in wanted.items())
        moved = np.clip(image + ndimage.gaussian_filter(np.asarray(shift, np.float32), 0.6), 0.01, 1.3)
        yield name, np.where(image > 0, moved, 0)
    yield "outer fluid at 60 %", np.where(labels == FLUID, 0.6 * image, image)
    yield "without outer fluid", np.where((labels == FLUID) | (labels == 0), 0, image)


def main() -> None:
    """All brains, one after the other."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("atlas", type=Path)
    p.add_argument("-w", "--weights", action="append", required=True)
    p.add_argument("--brains", nargs="+", default=["GA34_operated", "GA25_notoperated"], metavar="NAME")
    p.add_argument("--only", nargs="+", metavar="CHANGE", help="these changes alone, e.g. 'without outer fluid'")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    networks = {name: fastsrgan.load_generator(name) for name in args.weights}
    flips = {name: "x" if Purpose.of(weights.info(name)["made_for"]).mirrored else "none" for name in networks}
    rows = []
    for brain in args.brains:
        image, mm = load(args.atlas / f"{brain}_T2w.nii.gz")
        labels = np.rint(load(args.atlas / f"{brain}_tissues.nii.gz")[0]).astype(np.uint8)
        image = np.clip(image / np.percentile(image[image > 0], 99.9), 0, 1.2)
        inside = np.argwhere(image > 0.05)
        cut = [slice(max(a - MARGIN, 0), b + MARGIN + 1) for a, b in zip(inside.min(0), inside.max(0), strict=True)]
        cut[2] = slice(cut[2].start, cut[2].start + (image[tuple(cut)].shape[2] // RATIO) * RATIO)
        image, labels = image[tuple(cut)], labels[tuple(cut)]
        down = slice_profile_matrix(image.shape[2], image.shape[2] // RATIO, float(RATIO), 1.0, 0.0)
        truth, affine = labels == CORTEX, np.diag([mm[0], mm[1], mm[2] * RATIO, 1.0])
        for change, seen in changed(image, labels):
            if args.only and change not in args.only:
                continue
            scan = apply_axes(seen.astype(np.float32), [None, None, down])
            row: dict = {"brain": brain, "change": change}
            for name, network in networks.items():
                done = fastsrgan.infer_volume(
                    scan, affine, network, new_resolution=[float(size) for size in mm], device="cpu", adapt="off",
                    flips=flips[name], **TILES,
                )  # fmt: skip
                seg, inner = done.prob[0] > 0.5, ndimage.binary_erosion(seen > AIR)
                row[name] = [
                    round(metrics.dice(seg, truth), 3),
                    round(float(seg.sum() / truth.sum()), 2),
                    round(metrics.dice(seg & inner, truth), 3),
                ]
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.json:
        write_json(args.json, rows)
    print(provenance())


if __name__ == "__main__":
    main()
