"""Scores weights on sharp images that are given as thick slices: `python tools/score_thick_slices.py CASES.json -w W`.

CASES.json: {"name": {"image": "x_T2w.nii.gz", "labels": "x_tissues.nii.gz", "structure": [5]}, ...}, paths relative to
it. Slices are axial (or as --plane says), 3 or 6 voxels apart and thick, their profile a Gaussian (FWHM of the
thickness) or a box; noise is a fraction of the scan's maximum. PSNR (maximum of the truth) is inside the head, above a
tenth of the 99.9th percentile; SSIM of the whole volume.

spline       cubic spline through the slices' centres
best linear  spline + D' (D D' + w)^-1 (scan - D spline) with the Gaussian profile and the best of eight w for each
             case: an oracle that no linear method which knows only profile and noise can beat
fastsrgan    `infer_volume` with the tiles that the command takes on a CPU, upright where it does that (--upright)
guess        the same where the scan does not show its slice profile, as no scanner's does: with `profile="guess"`

"sharpness" is the root mean square of differences across the slices inside the head, over the truth's.
"dice_interpolated" is that of the true label drawn on the slices and interpolated; "parts" are the components beside
the largest, before small ones are left out; "dice_at" is Dice where other probabilities than 0.5 decide. Writes a
JSON list for tools/publish_weights.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

import fastsrgan
from fastsrgan.core.files import write_json
from fastsrgan.core.system import provenance
from fastsrgan.evaluate import metrics
from fastsrgan.model import weights
from fastsrgan.model.purpose import Purpose
from fastsrgan.volume.acquisition import GUESS, SHOWN
from fastsrgan.volume.components import ISLAND_SHARE, segment
from fastsrgan.volume.consistency import LINEAR_WEIGHTS, Observation, agree, observation
from fastsrgan.volume.geometry import PLANES
from fastsrgan.volume.resample import apply_axes, slice_profile_matrix, spline_matrix

ACQUISITIONS = [(r, p, n) for r in (3, 6) for p, n in (("gaussian", 0.0), ("box", 0.0), ("gaussian", 0.03))]
MARGIN = 6  # voxels of air kept around the head
DECIDING = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # probabilities
TILES = {"patch": 128, "step": 64}


def load(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """(X, Y, Z) in RAS order, and its voxel size."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.squeeze(np.asarray(image.dataobj)).astype(np.float32), nib.affines.voxel_sizes(image.affine)


def agreed(image: np.ndarray, scan: np.ndarray, seen: Observation, w: float) -> np.ndarray:
    """A copy of the image that agrees with the scan."""
    made = image.copy()
    agree(made, scan, seen, w)
    return made


def score(name: str, case: dict, folder: Path, generator, island: float, through: int, options: dict) -> list[dict]:
    """The rows of one case; ``through``: the axis across the slices."""

    def along(matrix: np.ndarray, image: np.ndarray) -> np.ndarray:
        return apply_axes(image, [matrix if axis == through else None for axis in range(3)])

    whole, mm = load(folder / case["image"])
    whole = np.clip(whole / np.percentile(whole[whole > 0], 99.9), 0, 1.2)
    inside = np.argwhere(whole > 0.05)
    cut = tuple(
        slice(max(low - MARGIN, 0), high + MARGIN + 1) for low, high in zip(inside.min(0), inside.max(0), strict=True)
    )
    whole, structure = whole[cut], np.isin(load(folder / case["labels"])[0][cut], case["structure"])
    rows: list[dict] = []
    for ratio, profile, noise in ACQUISITIONS:
        n = whole.shape[through] // ratio * ratio
        truth, label = (np.take(a, range(n), through) for a in (whole, structure))
        down = slice_profile_matrix(n, n // ratio, float(ratio), 1.0, float(profile == "box"))
        up = spline_matrix(n // ratio, n, 1 / ratio)
        scan = along(down, truth)
        if noise:
            drawn = np.random.default_rng(0).normal(0, noise * scan.max(), scan.shape)
            scan = np.clip(scan + drawn, 0, None).astype(np.float32)
        low_mm = tuple(s * ratio if axis == through else s for axis, s in enumerate(mm))
        spline, head = along(up, scan), truth > 0.1
        seen = observation(scan.shape, low_mm, truth.shape, mm)
        assert seen is not None
        linear = max(metrics.psnr(agreed(spline, scan, seen, w), truth, mask=head) for w in LINEAR_WEIGHTS)
        affine, fine = np.diag([*low_mm, 1.0]), [float(s) for s in mm]
        settings = {"new_resolution": fine, "device": "cpu", **TILES, **options}
        result = fastsrgan.infer_volume(scan, affine, generator, **settings)
        guessed = result
        if result.report["agree"]["profile_known"] == SHOWN:
            guessed = fastsrgan.infer_volume(scan, affine, generator, **settings, profile=GUESS)
        voxel = float(np.prod(mm))
        segs = {p: segment(result.prob[0], voxel, p, min_mm3=island, share=ISLAND_SHARE)[0] > 0 for p in DECIDING}
        seg = segs[0.5]
        base = metrics.psnr(spline, truth, mask=head)
        drawn_label = along(up, along(down, label.astype(np.float32))) > 0.5
        row = {"case": name, "ratio": ratio, "profile": profile, "noise": noise, "spline_db": base}
        row |= {"linear_gain": linear - base, "sr_gain": metrics.psnr(result.sr, truth, mask=head) - base}
        row |= {"profile_known": result.report["agree"]["profile_known"]}
        row |= {"guess_gain": metrics.psnr(guessed.sr, truth, mask=head) - base}
        row["spline_ssim"] = metrics.ssim(spline, truth)
        row["ssim_gain"] = metrics.ssim(result.sr, truth) - row["spline_ssim"]
        row |= {"dice": metrics.dice(seg, label), "dice_interpolated": metrics.dice(drawn_label, label)}
        row |= {"spline_sharpness": sharpness(spline, truth, head, through)}
        row["sharpness"] = sharpness(result.sr, truth, head, through)
        row["components"] = int(ndimage.label(seg, np.ones((3, 3, 3)))[1])
        row["dice_at"] = {str(p): round(metrics.dice(s, label), 4) for p, s in segs.items()}
        row["parts"] = parts(result.prob[0] > 0.5, label, voxel)
        rows.append({k: round(float(v), 4) if isinstance(v, (float, np.floating)) else v for k, v in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def parts(seg: np.ndarray, label: np.ndarray, voxel_mm3: float) -> list[list[float]]:
    """[mm^3, share that lies in the label] of all components but the largest, without those below 50 mm^3."""
    numbered, count = ndimage.label(seg, np.ones((3, 3, 3)))
    sizes, inside = (np.bincount(numbered.ravel(), w, count + 1)[1:] for w in (None, label.ravel()))
    order = np.argsort(-sizes)[1:]
    mm3 = sizes * voxel_mm3
    return [[round(float(mm3[i]), 1), round(float(inside[i] / sizes[i]), 3)] for i in order if mm3[i] >= 50]


def sharpness(image: np.ndarray, truth: np.ndarray, head: np.ndarray, through: int) -> float:
    """Root mean square of the differences across the slices inside the head, over the truth's: below 1 is blurred."""
    head = np.moveaxis(head, through, 2)
    both = head[:, :, 1:] & head[:, :, :-1]
    steps = [
        float(np.sqrt(np.mean(np.diff(np.moveaxis(a, through, 2).astype(np.float64))[both] ** 2)))
        for a in (image, truth)
    ]
    return steps[0] / steps[1]


def main() -> None:
    """All cases, one after the other."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cases", type=Path)
    p.add_argument("-w", "--weights", default="perinatal")
    p.add_argument("--flips", default="auto", metavar="AXES", help="mean over mirror images, as infer --flips (auto)")
    p.add_argument("--plane", choices=PLANES.values(), default="axial", help="that slices lie in (axial)")
    p.add_argument("--upright", choices=("auto", "on", "off"), default="auto", help="as infer --upright (auto)")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    generator = fastsrgan.load_generator(args.weights)
    purpose = Purpose.of(weights.info(args.weights)["made_for"])
    island, through = purpose.island_mm3, "RAS".index(next(a for a, plane in PLANES.items() if plane == args.plane))
    auto = "on" if purpose.knows_upright and purpose.unknown(args.plane) else "off"
    upright = auto if args.upright == "auto" else args.upright
    flips = ("x" if purpose.mirrored else "none") if args.flips == "auto" else args.flips  # volumes are stored RAS
    options = {"flips": flips, "upright": upright}
    rows = []
    for name, case in json.loads(args.cases.read_text(encoding="utf8")).items():
        rows += score(name, case, args.cases.parent, generator, island[1] if island else 0.0, through, options)
    if args.json:
        write_json(args.json, rows)
    print(f"worst gain {min(r['sr_gain'] for r in rows):+.2f} dB, over best linear", end=" ")
    print(
        f"{min(r['sr_gain'] - r['linear_gain'] for r in rows):+.2f} dB, worst Dice {min(r['dice'] for r in rows):.3f}"
    )
    print(provenance())


if __name__ == "__main__":
    main()
