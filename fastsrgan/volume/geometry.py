"""Where voxels are: volumes with affines, resampled grids, and the orientation that arrays are processed in.

Arrays are indexed (i, j, k) as nibabel stores them; affines are 4 x 4, voxel index -> world millimetres, RAS+.
Nothing here reads files or interpolates intensities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WORLD_AXES = ("R", "A", "S")
PLANES = {"S": "axial", "A": "coronal", "R": "sagittal"}  # that a world axis goes through


@dataclass(frozen=True)
class Volume:
    """A 3-D image with its place in the world.

    Attributes
    ----------
    data : (X, Y, Z) array
    affine : (4, 4) float64, voxel index -> world mm (RAS+)
    warnings : what was odd about the file, in words a user understands
    meta : facts that a writer may want back (source path, stored dtype, ...)
    """

    data: np.ndarray
    affine: np.ndarray
    warnings: tuple[str, ...] = ()
    meta: dict = field(default_factory=dict)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along each array axis."""
        return spacing_of(self.affine)


def spacing_of(affine_44: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm along each array axis: the column norms of the affine's linear part."""
    norms = np.sqrt((np.asarray(affine_44, float)[:3, :3] ** 2).sum(axis=0))
    return float(norms[0]), float(norms[1]), float(norms[2])


def shear_of(affine_44: np.ndarray) -> float:
    """Largest |cosine| between two voxel axes: 0 for a rotation with zooms, above it the grid is sheared."""
    linear = np.asarray(affine_44, float)[:3, :3]
    unit = linear / np.sqrt((linear**2).sum(axis=0))
    gram = unit.T @ unit
    return float(np.abs(gram - np.eye(3)).max())


@dataclass(frozen=True)
class Orientation:
    """A permutation and flips of array axes that can be undone.

    Processed axis ``i`` is stored axis ``axes[i]``, reversed where ``flips[i]``.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """(..., X, Y, Z) stored -> (..., X', Y', Z') processed; a view."""
        lead = array.ndim - 3
        moved = array.transpose(*range(lead), *(lead + a for a in self.axes))
        return moved[(..., *(slice(None, None, -1) if f else slice(None) for f in self.flips))]

    def undo(self, array: np.ndarray) -> np.ndarray:
        """(..., X', Y', Z') processed -> (..., X, Y, Z) stored; a view."""
        lead = array.ndim - 3
        flipped = array[(..., *(slice(None, None, -1) if f else slice(None) for f in self.flips))]
        inverse = np.argsort(self.axes)
        return flipped.transpose(*range(lead), *(lead + int(a) for a in inverse))

    def permute(self, per_axis: tuple | list) -> tuple:
        """Per-axis values (shape, spacing, ...) in stored order -> processed order."""
        return tuple(per_axis[a] for a in self.axes)

    def affine(self, affine_44: np.ndarray, stored_shape: tuple[int, ...]) -> np.ndarray:
        """Affine of the processed array, given the affine and shape of the stored one."""
        step = np.zeros((4, 4))
        step[3, 3] = 1
        for i, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            step[axis, i] = -1 if flip else 1
            if flip:
                step[axis, 3] = stored_shape[axis] - 1
        return np.asarray(affine_44, float) @ step


def processing_orientation(affine_44: np.ndarray, spacing_mm: tuple[float, ...] | None = None) -> Orientation:
    """The orientation in which every array is processed.

    The through-plane (thickest) axis comes last, the others follow it cyclically in world order, every axis points
    to R, A or S: axial (R, A, S), sagittal (A, S, R), coronal (S, R, A). It depends on the world alone, so one head
    stored in two ways is processed as the same array.

    Parameters
    ----------
    affine_44 : of the stored array
    spacing_mm : sizes that decide which axis is thickest (stored order); default the affine's own. Axes within 1 %
        of the thickest count as equal and the one nearest to S, then A, is taken.
    """
    linear = np.asarray(affine_44, float)[:3, :3]
    sizes = np.asarray(spacing_of(affine_44) if spacing_mm is None else spacing_mm, float)
    cosines = linear / np.sqrt((linear**2).sum(axis=0))
    # Stored axis for each world axis: the assignment with the largest total |cosine| (6 candidates). At a tie (axes at
    # 45 degrees) the directions themselves decide, so that the choice depends on the world, not on the storage.
    candidates = [(sum(abs(cosines[w, p[w]]) for w in range(3)), p) for p in itertools.permutations(range(3))]
    most = max(total for total, _ in candidates)

    def directions(p: tuple[int, ...]) -> tuple[float, ...]:
        columns = [cosines[:, p[w]] * np.sign(cosines[w, p[w]]) for w in range(3)]
        return tuple(np.round(np.concatenate(columns), 6).tolist())

    best = max((p for total, p in candidates if total > most - 1e-6), key=directions)
    thick_world = max(w for w in range(3) if sizes[best[w]] >= 0.99 * sizes.max())
    order = [(thick_world + 1) % 3, (thick_world + 2) % 3, thick_world]
    axes = (best[order[0]], best[order[1]], best[order[2]])
    flips = tuple(bool(cosines[w, best[w]] < 0) for w in order)
    return Orientation(axes, flips)  # type: ignore[arg-type]


def world_orientation(affine_44: np.ndarray) -> Orientation:
    """The orientation with R, A and S in this order, whatever the voxels' sizes; its ``axes`` are their stored axes."""
    return processing_orientation(affine_44, (1.0, 1.0, 1.0))


def upright_axes(affine_44: np.ndarray, turn: Orientation) -> tuple[int, int, int] | None:
    """The processed axes that point to R, A and S, in this order; None where they are already in it."""
    stored = world_orientation(affine_44).axes
    r, a, s = (turn.axes.index(axis) for axis in stored)
    return None if (r, a, s) == (0, 1, 2) else (r, a, s)


def plane_across(affine_44: np.ndarray, spacing_mm: Sequence[float]) -> str:
    """The plane that thick slices lie in, of ``PLANES``: the one across the stored axis of the largest voxel size.

    Empty where that size is within 1 % of the next: such voxels have no one direction.
    """
    *_, next_mm, thickest_mm = sorted(spacing_mm)
    if thickest_mm <= 1.01 * next_mm:
        return ""
    world = world_orientation(affine_44).axes
    return PLANES[WORLD_AXES[world.index(list(spacing_mm).index(thickest_mm))]]


def grid_size(n: int, from_mm: float, to_mm: float) -> int:
    """Number of voxels of ``to_mm`` that cover ``n`` voxels of ``from_mm`` to within half a voxel; at least 1."""
    return max(1, math.floor(n * from_mm / to_mm + 0.5))


def centre_coordinates(n_out: int, n_in: int, ratio: float) -> np.ndarray:
    """Index coordinates in the input of each output voxel's centre, both grids sharing their centre.

    ``ratio`` is output voxel size over input voxel size. Returns (n_out,) float64.
    """
    return (np.arange(n_out) - (n_out - 1) / 2) * ratio + (n_in - 1) / 2


def resampled_affine(
    affine_44: np.ndarray, shape: tuple[int, ...], new_shape: tuple[int, ...], new_spacing_mm: tuple[float, ...]
) -> np.ndarray:
    """Affine of a centre-aligned grid of ``new_shape`` voxels of ``new_spacing_mm``, same axes directions."""
    old = spacing_of(affine_44)
    step = np.eye(4)
    for d in range(3):
        ratio = new_spacing_mm[d] / old[d]
        step[d, d] = ratio
        step[d, 3] = centre_coordinates(new_shape[d], shape[d], ratio)[0]
    return np.asarray(affine_44, float) @ step
