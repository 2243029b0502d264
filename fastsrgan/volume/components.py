"""A segmentation out of probabilities: a threshold and, where asked for, filters of its 26-connected components."""

from __future__ import annotations

import numpy as np

AROUND = np.ones((3, 3, 3), bool)  # voxels that share a corner belong together
# What weights call an island is less of the largest component than this, or a small field of view would lose all.
ISLAND_SHARE = 0.01


def segment(
    prob_XYZ: np.ndarray,
    voxel_mm3: float,
    threshold: float,
    largest_component: bool = False,
    min_mm3: float = 0.0,
    share: float | None = None,
    judged_mm3: float | None = None,
) -> tuple[np.ndarray, dict[str, float]]:
    """(X, Y, Z) probabilities -> uint8, 1 in the structure; and what the filters left out, empty without filters and
    ``judged_mm3``.

    share : with it, no component of at least this part of the largest is left out for ``min_mm3``

    judged_mm3 : with it, ``two_largest_share`` is told: that of the two largest components, before all but the largest
        are left out, in the volume of those that are large enough: of a structure in two halves that may touch, how
        whole it is. Large enough is what is not left out for ``min_mm3`` and has this size or ``ISLAND_SHARE`` of the
        largest

    The components' numbers take 4 bytes a voxel, where there is a filter or pieces are judged.
    """
    seg = prob_XYZ > threshold
    if not (largest_component or min_mm3) and judged_mm3 is None:
        return seg.astype(np.uint8), {}
    from scipy import ndimage

    numbered, count = ndimage.label(seg, structure=AROUND)
    sizes = np.bincount(numbered.reshape(-1), minlength=count + 1)
    sizes[0] = 0
    least = min_mm3 if share is None else min(min_mm3, share * float(sizes.max()) * voxel_mm3)
    kept = sizes * voxel_mm3 >= least
    kept[0] = False
    large = min(judged_mm3 or 0.0, ISLAND_SHARE * float(sizes.max()) * voxel_mm3)
    pieces = np.sort(sizes[kept & (sizes * voxel_mm3 >= large)])
    if largest_component and kept.any():
        largest = int(np.argmax(np.where(kept, sizes, 0)))
        kept[:] = False
        kept[largest] = True
    told: dict[str, float] = {"components": int(count), "components_kept": int(kept.sum())}
    if judged_mm3 is not None and len(pieces):
        told["two_largest_share"] = float(f"{pieces[-2:].sum() / pieces.sum():.4g}")
    told |= {"min_size_mm3": round(least, 3)} if min_mm3 else {}
    told["voxels_left_out"] = int(sizes.sum() - sizes[kept].sum())
    return kept[numbered].astype(np.uint8), told
