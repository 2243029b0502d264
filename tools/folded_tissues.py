"""Tissue maps of folded brains as small as newborns': `python tools/folded_tissues.py MAP_labels.nii.gz [...] -o DIR`.

MAP is a label map of FreeSurfer's numbers on a grid of 1 mm (SynthSeg's training maps, Billot et al. 2023, Apache-2.0).
DIR gets NAME_tissues.nii.gz in the numbers of tools/perinatal_volumes.py (1 white matter, 2 ventricles, 3 cerebellum,
4 outer fluid, 5 cortex, 6 deep grey matter with hippocampus and amygdala, 7 brainstem), each voxel called 0.8 mm: four
fifths of an adult brain is about one at term. The atlas that the perinatal weights learned from ends at 34 weeks,
before most folds are there. Fluid stays within 2.5 to 6 voxels of the brain, by the map; what is outside the brain
becomes 0.

--images ATLAS, that of tools/perinatal_volumes.py: also an image of each map, every tissue about its mean in the
atlas's brains, with the fluid around it and without, and CASES.json for tools/score_thick_slices.py.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from perinatal_volumes import CORTEX, FLUID, FULL, HELD_OUT, VOXEL_MM, read_atlas, texture
from scipy import ndimage

from fastsrgan.core.files import atomic_write

OUTSIDE = 500  # labels from here on are not of the brain
MEMBERS = {
    1: (2, 25, 30, 41, 57, 62, 85),
    2: (4, 5, 14, 15, 43, 44, 72),
    3: (7, 8, 46, 47),
    4: (24,),
    5: (3, 42),
    7: (16,),
}
DEEP_GREY = 6  # every other number below OUTSIDE


def tissues(labels_XYZ: np.ndarray, name: str) -> np.ndarray:
    """(X, Y, Z) of the eight numbers, cut to the brain and a margin."""
    made = np.where((labels_XYZ > 0) & (labels_XYZ < OUTSIDE), DEEP_GREY, 0).astype(np.uint8)
    for tissue, members in MEMBERS.items():
        made[np.isin(labels_XYZ, members)] = tissue
    brain = (made > 0) & (made != FLUID)
    width = np.random.default_rng(zlib.crc32(name.encode())).uniform(2.5, 6)
    made[(made == FLUID) & (ndimage.distance_transform_edt(~brain) > width)] = 0
    inside = np.argwhere(made > 0)
    return made[tuple(slice(max(low - 2, 0), high + 3) for low, high in zip(inside.min(0), inside.max(0), strict=True))]


def image(labels_XYZ: np.ndarray, means: np.ndarray, sds: np.ndarray, name: str) -> np.ndarray:
    """(X, Y, Z), intensity 1 for the brightest of an atlas; rough by half of the atlas's spread within a tissue."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    of_mean, of_sd = (np.concatenate([[0], v]).astype(np.float32) for v in (means, sds))
    made = of_mean[labels_XYZ] + 0.5 * of_sd[labels_XYZ] * texture(draw, list(labels_XYZ.shape), 0.7)
    return np.where(labels_XYZ > 0, np.maximum(ndimage.gaussian_filter(made, 0.6), 0.01), 0)


def write(path: Path, array: np.ndarray) -> None:
    """With voxels of 0.8 mm."""
    with atomic_write(path) as temporary:
        nib.save(nib.Nifti1Image(array, np.diag([VOXEL_MM, VOXEL_MM, VOXEL_MM, 1.0])), temporary)


def main() -> None:
    """One map after the other."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("maps", nargs="+", type=Path)
    p.add_argument("-o", "--out", type=Path, required=True)
    p.add_argument("--images", type=Path, metavar="ATLAS")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    means, sds = read_atlas(args.images, HELD_OUT)[1:] if args.images else (None, None)
    cases = {}
    for path in args.maps:
        name = path.name.split("_")[0].split(".")[0]
        made = tissues(np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj).astype(np.int32), name)
        write(args.out / f"{name}_tissues.nii.gz", made)
        print(name, made.shape, flush=True)
        if means is None or sds is None:
            continue
        whole = image(made, means, sds, name)
        for what, seen in (("", whole), ("stripped", np.where(made == FLUID, 0, whole))):
            file = f"{name}{what}_T2w.nii.gz"
            write(args.out / file, np.round(seen * FULL).astype(np.int16))
            cases[f"folded {name} {what}".strip()] = {
                "image": file, "labels": f"{name}_tissues.nii.gz", "structure": [CORTEX]
            }  # fmt: skip
    if cases:
        (args.out / "CASES.json").write_text(json.dumps(cases, indent=1), encoding="utf8")


if __name__ == "__main__":
    main()
