"""A procedural head: nested ellipsoids with folds, defined in world millimetres, so that any grid can sample it.

``sample`` gives intensity and cortex fraction at points; ``head`` samples a grid. The same place has the same value
whatever the spacing or orientation of the grid, which makes the phantom a truth for resampling and geometry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# (intensity, centre mm, semi-axes mm, edge width mm, depth of folds mm); later shells replace earlier ones.
SKIN, SKULL, FLUID, GREY, WHITE = 160.0, 30.0, 45.0, 110.0, 190.0
SHELLS = (
    (SKIN, (0, 0, 0), (70, 88, 62), 1.0, 0.0),
    (SKULL, (0, 0, 0), (65, 83, 57), 1.0, 0.0),
    (FLUID, (0, 0, 2), (59, 77, 51), 1.0, 0.0),
    (GREY, (0, 0, 2), (56, 74, 48), 1.0, 2.0),
    (WHITE, (0, 0, 2), (48, 66, 40), 1.0, 5.0),
    (FLUID, (-9, 4, 6), (5, 22, 7), 1.0, 0.0),
    (FLUID, (9, 4, 6), (5, 22, 7), 1.0, 0.0),
    (GREY, (-20, -2, 0), (8, 14, 9), 1.0, 0.0),
    (GREY, (20, -6, 0), (8, 14, 9), 1.0, 0.0),  # not the mirror image: a flip shows
)


@dataclass(frozen=True)
class Phantom:
    """A sampled head.

    data : (X, Y, Z) float32 in [0, 200], background 0
    label : (X, Y, Z) uint8, 1 where grey matter fills more than half
    affine : (4, 4) voxel index -> world mm
    spacing : voxel size in mm per array axis
    """

    data: np.ndarray
    label: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, float, float]


def inside(points_mm: np.ndarray, centre, radii, width: float, folds: float) -> np.ndarray:
    """Fraction of a soft ellipsoid at (..., 3) points: 1 inside, 0 outside, a ramp of about ``width`` mm between."""
    centred = points_mm - np.asarray(centre, float)
    x, y, z = np.moveaxis(centred, -1, 0)
    length = np.sqrt((centred**2).sum(-1))
    level = np.sqrt(((centred / np.asarray(radii, float)) ** 2).sum(-1))
    # Distance to the surface along the ray from the centre, in mm: exact for spheres.
    distance = length * (1 / np.maximum(level, 1e-9) - 1)
    waves = np.sin(0.35 * x + 0.9) * np.sin(0.31 * y - 0.4) * np.sin(0.37 * z + 0.2)
    # Folds live near the surface only: far from it they would make islands.
    distance = distance + folds * waves * np.exp(-((distance / 15) ** 2))
    return 0.5 * (1 + np.tanh(2 * np.clip(distance, -50, 50) / width))


def sample(points_mm: np.ndarray, edge: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Intensity and grey-matter fraction at (..., 3) world points, float64; ``edge`` widens or sharpens all borders."""
    intensity = np.zeros(points_mm.shape[:-1])
    grey = np.zeros_like(intensity)
    for value, centre, radii, width, folds in SHELLS:
        f = inside(points_mm, centre, radii, width * edge, folds)
        intensity += f * (value - intensity)
        grey += f * (float(value == GREY) - grey)
    return intensity, grey


def centred_affine(shape, spacing) -> np.ndarray:
    """Axis-aligned RAS affine that puts the middle of the grid at world 0."""
    affine = np.diag([*map(float, spacing), 1.0])
    affine[:3, 3] = -0.5 * (np.asarray(shape) - 1) * np.asarray(spacing, float)
    return affine


def head(shape=(40, 48, 36), spacing=(4.0, 4.0, 4.0), affine=None, edge: float | None = None) -> Phantom:
    """Sample the head on a grid; arrays are read-only.

    Parameters
    ----------
    shape : sizes (X, Y, Z); 160 x 192 x 144 mm hold the whole head
    spacing : mm, used when ``affine`` is None
    affine : (4, 4), any orientation
    edge : border width in mm, by default the largest voxel size, about what a scanner shows
    """
    affine = centred_affine(shape, spacing) if affine is None else np.asarray(affine, float)
    size = np.sqrt((affine[:3, :3] ** 2).sum(0))
    world = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    intensity, grey = sample(world, float(size.max()) if edge is None else edge)
    data, label = intensity.astype(np.float32), (grey > 0.5).astype(np.uint8)
    data[data < 0.5] = 0
    for array in (data, label, affine):
        array.setflags(write=False)
    return Phantom(data, label, affine, (float(size[0]), float(size[1]), float(size[2])))
