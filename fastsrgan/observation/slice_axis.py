"""Which anatomical directions the low resolution's three numbers are along, for every subject of a cohort alike.

A cohort is stored as its scanners and tools left it: one head RAS, another ASR. ``-n 1 1 3`` along stored axes would
make axial slices of the one and sagittal ones of the other. Here the numbers belong to directions of the body, and each
subject's stored axes get theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fastsrgan.observation.model import Draw
from fastsrgan.volume.geometry import WORLD_AXES, world_orientation

AUTO = "auto"
CHOICES = (AUTO, "S", "A", "R")
Axes = tuple[int, int, int]


def world_axes(affine_44: np.ndarray) -> Axes:
    """For each stored axis the world axis nearest to it: 0 right, 1 anterior, 2 superior."""
    stored = world_orientation(affine_44).axes
    first, second, third = (stored.index(axis) for axis in range(3))
    return first, second, third


def axes_across(direction: str) -> Axes:
    """The axes of two numbers in the plane and one through it: axial R, A, S; sagittal A, S, R; coronal S, R, A."""
    through = WORLD_AXES.index(direction)
    return (through + 1) % 3, (through + 2) % 3, through


def choose_axes(affines: Mapping[str, np.ndarray], choice: str) -> tuple[Axes, list[str]]:
    """The world axes of the three numbers, and the subjects whose stored axes lie in another order.

    ``choice`` is a direction, or "auto": the axes of most subjects, of the first in a tie, as they are stored.
    """
    orders = {name: world_axes(affine) for name, affine in affines.items()}
    axes = Counter(orders.values()).most_common(1)[0][0] if choice == AUTO else axes_across(choice)
    return axes, [name for name, order in orders.items() if order != axes]


def describe(axes: Axes, low_res: Sequence[Sequence[float]]) -> str:
    """'1 mm along R, 1 mm along A, 3 mm along S'."""
    ends = zip(low_res[0], low_res[-1], strict=True)
    sizes = [f"{low:g}" + f" to {high:g}" * (high != low) for low, high in ends]
    return ", ".join(f"{size} mm along {WORLD_AXES[axis]}" for size, axis in zip(sizes, axes, strict=True))


def on_stored_axes(values: Sequence[float], axes: Axes, affine_44: np.ndarray) -> tuple[float, float, float]:
    """Numbers along ``axes`` -> numbers along the stored axes of one subject."""
    along = dict(zip(axes, values, strict=True))
    first, second, third = (float(along[axis]) for axis in world_axes(affine_44))
    return first, second, third


def stored_draw(draw: Draw, axes: Axes | None, affine_44: np.ndarray) -> Draw:
    """A draw whose resolution is along the stored axes of one subject; as it is where ``axes`` is None."""
    return draw if axes is None else replace(draw, low_res=on_stored_axes(draw.low_res, axes, affine_44))
