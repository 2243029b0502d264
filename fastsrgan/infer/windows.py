"""The weight of a tile's voxels where tiles overlap: three 1-D windows, since tiles form a product grid (DESIGN D9)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastsrgan.errors import UsageError
from fastsrgan.infer.tiles import TilePlan

GAUSSIAN_SIGMA = 1 / 8  # of the patch
GAUSSIAN_FLOOR = 1e-3  # of the peak: a voxel that only tile corners cover must keep digits


def _constant(n: int) -> np.ndarray:
    return np.ones(n)


def _gaussian(n: int) -> np.ndarray:
    distance = np.arange(n) - (n - 1) / 2
    return np.maximum(np.exp(-0.5 * (distance / (n * GAUSSIAN_SIGMA)) ** 2), GAUSSIAN_FLOOR)


# A window maps a tile's edge length to that many positive float64 weights, symmetric about the centre.
WINDOWS: dict[str, Callable[[int], np.ndarray]] = {"constant": _constant, "gaussian": _gaussian}


def check_window(name: str) -> str:
    """``name`` if it is a known window, else UsageError."""
    if name not in WINDOWS:
        raise UsageError("window", f"{name!r} is not allowed", f"one of {', '.join(WINDOWS)}")
    return name


def weights(plan: TilePlan, window: str = "constant") -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The pre-divided 1-D windows of a plan: for each axis one (patch,) float32 array per tile along it.

    At every voxel of the padded axis the float32 sum, in tile order, of the weights that cover it is exactly 1.
    Raises UsageError for an unknown window.
    """
    shape_of = WINDOWS[check_window(window)]
    x, y, z = (
        _axis_weights(n, p, origins, shape_of(p))
        for n, p, origins in zip(plan.padded_shape, plan.patch, plan.origins, strict=True)
    )
    return x, y, z


def _axis_weights(n: int, patch: int, origins: tuple[int, ...], window: np.ndarray) -> list[np.ndarray]:
    total = np.zeros(n)
    for o in origins:
        total[o : o + patch] += window
    result, so_far = [], np.zeros(n, np.float32)
    for o, following in zip(origins, (*origins[1:], n), strict=True):
        here = slice(o, o + patch)
        w = (window / total[here]).astype(np.float32)
        # The last tile over a voxel gets what is missing to 1, so that ones in are ones out to the last bit.
        final = min(following - o, patch)
        w[:final] = 1 - so_far[o : o + final]
        so_far[here] += w
        result.append(w)
    return result


def raw_weights(plan: TilePlan, window: str = "constant") -> tuple[np.ndarray | None, ...]:
    """What every tile is multiplied with along x, y and z where the sum is divided at the end: (patch,) float64.

    None stands for ones: the constant window, and an axis that a single tile fills.
    """
    shape_of = WINDOWS[check_window(window)]
    return tuple(
        None if window == "constant" or p == n else shape_of(p)
        for p, n in zip(plan.patch, plan.padded_shape, strict=True)
    )


def window_sums(plan: TilePlan, window: str = "constant") -> tuple[Tensor, Tensor, Tensor]:
    """``raw_weights`` summed over the tiles of each axis, (X,), (Y,) and (Z,) float32; of a voxel, their product."""
    sums = []
    for n, p, origins, w in zip(plan.padded_shape, plan.patch, plan.origins, raw_weights(plan, window), strict=True):
        total = np.zeros(n)
        for o in origins:
            total[o : o + p] += 1 if w is None else w
        sums.append(torch.from_numpy(total.astype(np.float32)))
    return sums[0], sums[1], sums[2]


def divide_planes(planes_CnYZ: Tensor, x: int, sums: Sequence[Tensor]) -> None:
    """Divide planes ``x``, ``x`` + 1, ... by their ``window_sums``, in place: one pass."""
    along_x, along_y, along_z = sums
    within = along_y[:, None] * along_z
    # Neighbouring planes lie in the same tiles mostly: one division for all of those.
    for value, alike in itertools.groupby(along_x[x : x + planes_CnYZ.shape[1]].tolist()):
        count = len(list(alike))
        planes_CnYZ[:, :count].div_(within * value)
        planes_CnYZ = planes_CnYZ[:, count:]
