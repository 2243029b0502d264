"""Distances in mm between the surfaces of two segmentations (``DEFINITIONS``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from fastsrgan.errors import InputError
from fastsrgan.evaluate.metrics import binary

DEFINITIONS = {
    "hausdorff95_mm": "the larger of the two directed 95th percentiles (linear between ranks) of the distances from "
    "each surface voxel of one segmentation to the nearest surface voxel of the other, in mm (as in MONAI, undirected)",
    "surface_distance_mm": "average symmetric surface distance: mean of those distances over the surface voxels of "
    "both segmentations together, in mm",
}
FIGURES = tuple(DEFINITIONS)
SURFACE = "a surface voxel is one of the segmentation with a face neighbour outside it, or outside the volume"


def surface_scores(seg: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float]) -> dict[str, float | None]:
    """``hausdorff95_mm`` and ``surface_distance_mm`` of two (X, Y, Z) segmentations, thresholded at 0.5.

    ``spacing_mm`` is the voxel size along each axis; the axes are taken to be at right angles. Both figures are None
    where a segmentation is empty: there is no surface to be far from. Raises InputError for shapes that differ.
    """
    distances = surface_distances(seg, label, spacing_mm)
    if distances is None:
        return dict.fromkeys(FIGURES)
    return {
        "hausdorff95_mm": float(max(np.percentile(d, 95) for d in distances)),
        "surface_distance_mm": float(np.concatenate(distances).mean()),
    }


def surface_distances(
    seg: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Distances in mm from every surface voxel of ``seg`` to the surface of ``label``, and the other way round.

    None where one of the two is empty. Arguments and errors as for ``surface_scores``.
    """
    a, b = binary(seg), binary(label)
    if a.shape != b.shape or a.ndim != 3:
        raise InputError(
            "surface distance", f"sizes differ or are not three: {a.shape} and {b.shape}", "two masks of one 3-D grid"
        )
    if not a.any() or not b.any():
        return None
    # Whatever is nearest lies in the box around both: the distance transforms need no more.
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]
    a, b = surface(a[box]), surface(b[box])
    return _from_to(a, b, spacing_mm), _from_to(b, a, spacing_mm)


def surface(mask: np.ndarray) -> np.ndarray:
    """The voxels of a bool mask that have a face neighbour outside it or outside the array."""
    return mask & ~ndimage.binary_erosion(mask)


def _from_to(a: np.ndarray, b: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    return ndimage.distance_transform_edt(~b, sampling=[float(s) for s in spacing_mm])[a]
