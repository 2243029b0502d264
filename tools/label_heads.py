"""Heads of chosen contrast made of label maps, with CASES.json for `tools/score_thick_slices.py`.

    python tools/label_heads.py MAP_labels.nii.gz [...] -o FOLDER      # FreeSurfer's numbers, 500 and above outside
    python tools/label_heads.py --means                                # for `fastsrgan train --tissue-means`

Each map gives a T1-like head, whole and stripped, a FLAIR-like whole one and a T2-like stripped one, not deformed; what
is outside the brain has means of its own. The structure is the cerebral cortex. These are the images that
docs/decisions/026-adult-weights.md scores; the training draws its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np

from fastsrgan.core.draws import rng
from fastsrgan.observation.synthesis import _LEFT, _TISSUES, Synthesis, synthesise

CORTEX = [3, 42]
# White matter, grey matter, deep grey matter, fluid, in parts of full scale.
CONTRASTS = {
    "T1": (0.78, 0.52, 0.60, 0.15),
    "FLAIR": (0.48, 0.62, 0.56, 0.12),
    "T2": (0.35, 0.52, 0.42, 0.95),
}
KINDS = (("T1", 0), ("T1", 1), ("FLAIR", 0), ("T2", 1))  # contrast; whether stripped
SPREAD = {"T1": (0.05, 0.05, 0.06, 0.06), "FLAIR": (0.04, 0.04, 0.05, 0.05), "T2": (0.05, 0.05, 0.06, 0.05)}
SHARES = ("T1", "T1", "FLAIR", "T2")  # of the visits in training


def tissue(value: int) -> int | None:
    """Which of the four a label belongs to."""
    return next((i for i, members in enumerate(_TISSUES) if _LEFT.get(value, value) in members), None)


def means() -> str:
    """What the adult weights were trained with: contrasts with / between, T1 twice."""
    values = sorted({v for members in _TISSUES for v in members} | set(_LEFT))
    known = [(v, t) for v in values if (t := tissue(v)) is not None and v < 100]
    return "/".join(",".join(f"{v}:{CONTRASTS[name][t]}:{SPREAD[name][t]}" for v, t in known) for name in SHARES)


def image(labels_XYZ: np.ndarray, name: str, contrast: str, stripped: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (int16) and labels of one head."""
    draw = rng(5, name, "surroundings")
    levels = []
    for value in (int(v) for v in np.unique(labels_XYZ) if v):
        kind = tissue(value)
        levels.append((value, CONTRASTS[contrast][kind] if kind is not None else float(draw.uniform(0.1, 0.8)), 0.02))
    settings = Synthesis(
        means=(tuple(levels),), free=0, invert=0, scaling=(1, 1), warp=0, shear=0, rotation=0, strip=stripped,
        bias_field=0.15, blur=(0.5, 0.6), texture=(0.02, 0.03),
    )  # fmt: skip
    made, labels = synthesise(labels_XYZ, (1.0, 1.0, 1.0), (9, name, contrast), settings)
    full = made.numpy() / float(made.max())
    return np.clip(2000 * full, 0, None).astype(np.int16), labels.numpy().astype(np.int16)


def main() -> None:
    """Write the heads, or the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", nargs="*", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--means", action="store_true", help="print them and end")
    args = parser.parse_args()
    if args.means:
        print(means())
        return
    if not args.maps or args.out is None:
        parser.error("label maps and -o FOLDER are needed")
    args.out.mkdir(parents=True, exist_ok=True)
    cases = {}
    for path in args.maps:
        stem = path.name.split("_")[0].split(".")[0]
        read = nib.as_closest_canonical(nib.load(path))
        labels = np.asarray(read.dataobj).astype(np.int16)
        for contrast, stripped in KINDS:
            name = f"{stem} {contrast}{' stripped' * stripped}"
            file = name.replace(" ", "-")
            for ending, array in zip(("", "_labels"), image(labels, stem, contrast, stripped), strict=True):
                nib.save(nib.Nifti1Image(array, np.eye(4)), args.out / f"{file}{ending}.nii.gz")
            cases[name] = {"image": f"{file}.nii.gz", "labels": f"{file}_labels.nii.gz", "structure": CORTEX}
    (args.out / "CASES.json").write_text(json.dumps(cases, indent=1), encoding="utf8")
    print(args.out / "CASES.json")


if __name__ == "__main__":
    main()
