"""A segmentation out of probabilities: a threshold and, where asked for, filters of its 26-connected components."""

from __future__ import annotations

import numpy as np

from fastsrgan.infer.settings import InferSettings

AROUND = np.ones((3, 3, 3), bool)  # voxels that share a corner belong together


def segment(prob_XYZ: np.ndarray, voxel_mm3: float, settings: InferSettings) -> tuple[np.ndarray, dict[str, int]]:
    """(X, Y, Z) probabilities -> uint8, 1 in the structure; and what the filters left out, empty without filters.

    The components' numbers take 4 bytes a voxel, where a filter is on.
    """
    seg = prob_XYZ > settings.threshold
    if not (settings.largest_component or settings.min_size):
        return seg.astype(np.uint8), {}
    from scipy import ndimage

    numbered, count = ndimage.label(seg, structure=AROUND)
    sizes = np.bincount(numbered.reshape(-1), minlength=count + 1)
    sizes[0] = 0
    kept = sizes * voxel_mm3 >= settings.min_size
    kept[0] = False
    if settings.largest_component and kept.any():
        largest = int(np.argmax(np.where(kept, sizes, 0)))
        kept[:] = False
        kept[largest] = True
    told = {"components": int(count), "components_kept": int(kept.sum())}
    told["voxels_left_out"] = int(sizes.sum() - sizes[kept].sum())
    return kept[numbered].astype(np.uint8), told
