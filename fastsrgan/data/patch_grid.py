"""Where the training patches of a volume lie (paper section 2.3; the original's cropping methods)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def patch_origins(
    shape: tuple[int, ...], patch: int, stride: int, box: tuple[tuple[int, int], ...], mask: np.ndarray | None = None
) -> np.ndarray:
    """Corners of the training patches: (n, 3) int64.

    A grid of ``stride`` starts at the lower corner of ``box`` (per axis [low, high), the image's positive voxels) and
    ends with a patch that touches its upper side; boxes and volumes smaller than a patch give one position, which may
    be negative (the patch hangs over both edges and is filled with zeros). With ``mask`` only patches with more than
    half of their voxels inside are kept (the original's ``overlapping_with_mask``).
    """
    axes = []
    for n, (low, high) in zip(shape, box, strict=True):
        if high - low <= patch:
            axes.append([_lonely(n, patch, low, high)])
            continue
        last = high - patch
        axes.append(sorted({*range(low, last + 1, stride), last}))
    origins = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    if mask is None:
        return origins
    padded = np.pad(np.cumsum(np.cumsum(np.cumsum(mask > 0, 0), 1), 2), ((1, 0),) * 3)
    keep = [_count(padded, o, patch) > patch**3 / 2 for o in origins]
    return origins[np.asarray(keep, bool)]


def patch_region(shape: tuple[int, ...], patch: int, box: tuple[tuple[int, int], ...]) -> tuple[slice, slice, slice]:
    """The part of a volume in which all patches of ``patch_origins`` lie, whatever the stride and the mask."""
    region = []
    for n, (low, high) in zip(shape, box, strict=True):
        if high - low <= patch:
            low = _lonely(n, patch, low, high)
            high = low + patch
        region.append(slice(max(low, 0), min(high, n)))
    return tuple(region)  # type: ignore[return-value]


def _lonely(n: int, patch: int, low: int, high: int) -> int:
    """Where the only patch of an axis starts whose box is no larger than a patch."""
    middle = (low + high - patch) // 2
    return (n - patch) // 2 if n <= patch else min(max(middle, 0), n - patch)


def _count(table: np.ndarray, origin: np.ndarray, patch: int) -> int:
    """Mask voxels inside a patch, from the summed-volume table."""
    low = [max(int(o), 0) for o in origin]
    high = [min(int(o) + patch, n - 1) for o, n in zip(origin, table.shape, strict=True)]
    total = 0
    for corner in range(8):
        index = tuple(high[d] if corner >> d & 1 else low[d] for d in range(3))
        sign = 1 if corner.bit_count() % 2 else -1
        total += sign * int(table[index])
    return total


def positive_box(image_XYZ: np.ndarray | Tensor) -> tuple[tuple[int, int], ...]:
    """Per axis [low, high) of the voxels above zero; the whole volume when there is none.

    The original's slice lost the last plane of the box; it is kept here.
    """
    positive = (torch.as_tensor(image_XYZ) > 0).view(torch.uint8)
    plane = positive.amax(0)
    box = []
    for line in (positive.flatten(1).amax(1), plane.amax(1), plane.amax(0)):
        inside = line.nonzero().flatten().tolist()
        box.append((inside[0], inside[-1] + 1) if inside else (0, len(line)))
    return tuple(box)
