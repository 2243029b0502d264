"""A real head with an approximate cortex, as CASES.json for `tools/score_thick_slices.py`.

    apt-get download mricron-data && dpkg -x mricron-data_*.deb .
    python tools/real_head.py usr/share/mricron/templates -o FOLDER

ch2 is the mean of 27 T1 scans of one man (Holmes et al. 1998), 1 mm, in no set that fastsrgan's adult weights were
trained on. Nobody drew its cortex: it is what a mixture of three Gaussians calls grey in the stripped brain (ch2bet),
at most NEAR_MM from a cortical region of the AAL atlas, which was drawn on this head (Tzourio-Mazoyer et al. 2002), and
more than OFF_MM from its hippocampus, amygdala, deep nuclei and cerebellum. Such a truth is right to a voxel or so: its
Dice compares weights and tells whether a segmentation is of the cortex at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from fastsrgan.core.files import write_json

CORTICAL = range(1, 91)  # regions of AAL, 91 to 116 are the cerebellum
APART = (37, 38, 41, 42, *range(71, 79))  # hippocampus, amygdala, caudate, putamen, pallidum, thalamus
NEAR_MM, OFF_MM = 3, 1
ROUNDS = 100


def grey(values: np.ndarray) -> np.ndarray:
    """(N,) bool: the middle one of three Gaussians, fitted by expectation maximisation to the counts of grey levels."""
    levels, counts = np.unique(np.round(values), return_counts=True)
    mean, deviation, weight = np.percentile(values, [10, 45, 80]), np.full(3, values.std() / 3), np.full(3, 1 / 3)
    for _ in range(ROUNDS):
        share = weight * np.exp(-0.5 * ((levels[:, None] - mean) / deviation) ** 2) / deviation
        share /= share.sum(1, keepdims=True)
        n = counts @ share
        mean = (counts * levels) @ share / n
        deviation = np.sqrt((counts[:, None] * share * (levels[:, None] - mean) ** 2).sum(0) / n)
        weight = n / n.sum()
    middle = share.argmax(1) == np.argsort(mean)[1]
    return middle[np.searchsorted(levels, np.round(values))]


def main() -> None:
    """Read, mark, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("templates", type=Path, help="folder of ch2.nii.gz, ch2bet.nii.gz and aal.nii.gz")
    p.add_argument("-o", "--output", type=Path, required=True)
    args = p.parse_args()
    head, brain, atlas = (nib.load(args.templates / f"{name}.nii.gz") for name in ("ch2", "ch2bet", "aal"))
    levels, regions = np.asarray(brain.dataobj, np.float32), np.asarray(atlas.dataobj)
    cortical = np.isin(regions, CORTICAL) & ~np.isin(regions, APART)
    near = ndimage.distance_transform_edt(~cortical) <= NEAR_MM
    clear = ndimage.distance_transform_edt(cortical | (regions == 0)) > OFF_MM
    cortex = np.zeros(levels.shape, np.uint8)
    cortex[levels > 0] = grey(levels[levels > 0])
    cortex &= near & clear
    args.output.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(cortex, head.affine), args.output / "ch2_cortex.nii.gz")
    cases = {}
    for name, image in (("ch2 T1", head), ("ch2 T1 stripped", brain)):
        file = f"{name.replace(' ', '-')}.nii.gz"
        nib.save(image, args.output / file)
        cases[name] = {"image": file, "labels": "ch2_cortex.nii.gz", "structure": [1]}
    write_json(args.output / "CASES.json", cases)
    print(args.output / "CASES.json")


if __name__ == "__main__":
    main()
