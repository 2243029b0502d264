"""The image inside a mask whose surroundings are in the scan: `python tools/masked_brains.py ATLAS -w perinatal`.

ATLAS is that of tools/perinatal_volumes.py; the brains are those that it holds out. A dark skull, a scalp and textured
tissue are put around each, the whole is cut into Gaussian slices four voxels apart and thick with noise of 1 % of the
maximum, and `fastsrgan infer --mask` is given it twice: with a mask of the brain and its fluid, and with one that
leaves the fluid outside, as brain extraction does. The mask is drawn on the scan's voxels.

One line of JSON for each: PSNR in dB of the whole scan's cubic spline and of the result, inside the mask, inside its
outermost four voxels (rim) and in the rest (deep); how far the result is from the scan, in percent.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
from perinatal_volumes import CORTEX, FLUID, texture
from scipy import ndimage
from score_thick_slices import load

from fastsrgan.core.files import write_json
from fastsrgan.core.system import provenance
from fastsrgan.evaluate import metrics
from fastsrgan.volume.resample import apply_axes, slice_profile_matrix, spline_matrix

RATIO, NOISE, AIR, RIM = 4, 0.01, 24, 4


def surrounded(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(X, Y, Z): 2.4 mm of skull, 2.4 mm of scalp and tissue around a brain, all of intensities up to 1.2."""
    away = ndimage.distance_transform_edt(~inside)
    tissue = 0.75 + 0.12 * texture(np.random.default_rng(1), list(image.shape), 2.0)
    around = np.where(away < 3, 0.12, np.where(away < 6, 0.45, tissue.clip(0, 1.2)))
    return np.where(inside, image, around).astype(np.float32)


def main() -> None:
    """Both brains with both masks."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("atlas", type=Path)
    p.add_argument("-w", "--weights", required=True)
    p.add_argument("--brains", nargs="+", default=["GA34_operated", "GA25_notoperated"], metavar="NAME")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    rows = []
    for brain in args.brains:
        image, mm = load(args.atlas / f"{brain}_T2w.nii.gz")
        labels = np.rint(load(args.atlas / f"{brain}_tissues.nii.gz")[0]).astype(np.uint8)
        image = np.clip(image / np.percentile(image[image > 0], 99.9), 0, 1.2)
        cut = tuple(slice(max(a.min() - AIR, 0), a.max() + AIR + 1) for a in np.nonzero(labels))
        image, labels = image[cut], labels[cut]
        n = image.shape[2] // RATIO * RATIO
        truth = surrounded(image, (labels > 0) | (image > 0.05))[:, :, :n]
        labels = labels[:, :, :n]
        scan = apply_axes(truth, (None, None, slice_profile_matrix(n, n // RATIO, float(RATIO), 1.0, 0.0)))
        noise = np.random.default_rng(0).normal(0, NOISE * scan.max(), scan.shape)
        scan = np.clip(scan + noise, 0, None).astype(np.float32)
        spline = apply_axes(scan, (None, None, spline_matrix(n // RATIO, n, 1 / RATIO)))
        for told, brain_voxels in (("brain and fluid", labels > 0), ("brain", (labels > 0) & (labels != FLUID))):
            mask = brain_voxels.reshape(*labels.shape[:2], -1, RATIO).mean(3) > 0.5
            with tempfile.TemporaryDirectory() as name:
                affine = np.diag([mm[0], mm[1], mm[2] * RATIO, 1.0])
                for stem, data in (("scan", scan), ("mask", mask.astype(np.uint8))):
                    nib.save(nib.Nifti1Image(data, affine), f"{name}/{stem}.nii.gz")
                words = [f"{name}/scan.nii.gz", "-o", f"{name}/out", "--mask", f"{name}/mask.nii.gz"]
                words += ["-w", args.weights, "--new-resolution", *(str(float(size)) for size in mm)]
                subprocess.run(
                    [sys.executable, "-m", "fastsrgan", "--quiet", "infer", *words],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
                record = json.loads(Path(f"{name}/out/scan.json").read_text())
                sr, seg = (load(Path(f"{name}/out/scan_{kind}.nii.gz"))[0] for kind in ("sr", "seg"))
            inside = np.repeat(mask, RATIO, 2)
            rim = inside & ~ndimage.binary_erosion(inside, iterations=RIM, border_value=1)
            row: dict = {"brain": brain, "given": told}
            for place, where in (("mask", inside), ("rim", rim), ("deep", inside & ~rim)):
                row[place] = [round(metrics.psnr(made, truth, where), 2) for made in (spline, sr)]
            row |= {
                "dice": round(metrics.dice(seg > 0, labels == CORTEX), 3),
                "residual_percent": round(record["agree"]["residual_percent"], 2),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.json:
        write_json(args.json, rows)
    print(provenance())


if __name__ == "__main__":
    main()
