"""One subject in memory: oriented, degraded, on the device, with the places of its patches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsrgan.crew import one_thread
from fastsrgan.degrade import Degradation, Degraded, Draw
from fastsrgan.errors import FastsrganError, InputError
from fastsrgan.geometry import Orientation, processing_orientation
from fastsrgan.pool import Resident, patch_origins, positive_box
from fastsrgan.resample import modulo_size
from fastsrgan.store import Sample

Moved = tuple[Tensor, Tensor, Tensor, Tensor | None]
Law = Callable[[Any], Degraded]  # an array, or a tensor on its device
Mover = Callable[[np.ndarray, np.ndarray, np.ndarray | None, Law], Moved]


@dataclass(frozen=True)
class PatchRule:
    """Which patches are taken: edge, grid stride, and whether the mask decides (``overlapping_with_mask``)."""

    patch: int
    stride: int
    by_mask: bool = False


def move_by_thread(
    image: np.ndarray, label: np.ndarray, mask: np.ndarray | None, law: Law, *, device: torch.device
) -> Moved:
    """Degrade on the CPU and copy to the device: interpolated, hr, label, mask."""
    with one_thread():
        done = law(image)
    arrays = (done.interpolated, done.hr, label, mask)
    return tuple(None if a is None else torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays)  # type: ignore[return-value]


def make_resident(
    sample: Sample,
    degradation: Degradation,
    draw: Draw,
    rule: PatchRule,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    move: Mover | None = None,
) -> Resident:
    """Degrade one subject and place its patches. The same bits on any CPU with any number of cores.

    Parameters
    ----------
    draw : parameters, in the stored axis order
    dtype : of the resident intensities
    move : what degrades and brings the volumes to the device (default ``move_by_thread``)

    Raises
    ------
    InputError : no label, no mask where one is needed, or an image that cannot be degraded.
    """
    if sample.label is None:
        raise InputError(sample.id, "has no label", "training needs Label_image for every subject")
    if rule.by_mask and sample.mask is None:
        raise InputError(sample.id, "has no mask", "overlapping_with_mask needs Mask_image for every subject")
    turn = Orientation()
    if degradation.geometry == "physical":
        turn = processing_orientation(sample.affine, draw.low_res)
    spacing, low_res = turn.permute(sample.spacing), turn.permute(draw.low_res)
    image, label = np.ascontiguousarray(turn.apply(sample.image)), np.ascontiguousarray(turn.apply(sample.label))
    mask = None if sample.mask is None else np.ascontiguousarray(turn.apply(sample.mask))
    try:
        moved = (move or functools.partial(move_by_thread, device=device))(
            image, label, mask, lambda data: degradation.apply(data, spacing, draw, low_res)
        )
    except FastsrganError as error:
        raise type(error)(f"{sample.id}: {error.what}", error.reason, error.hint) from error
    shape = image.shape
    if degradation.geometry == "segsrgan":
        shape = tuple(modulo_size(n, r / s) for n, s, r in zip(shape, spacing, low_res, strict=True))
    # SciPy's zoom may return another size than the image's at fractional ratios: what all arrays share is used.
    cut = tuple(slice(0, min(a, b)) for a, b in zip(shape, moved[0].shape, strict=True))
    interpolated, hr, label_, mask_ = (None if t is None else t[cut].contiguous() for t in moved)
    assert interpolated is not None and hr is not None and label_ is not None
    inside = mask[cut] if rule.by_mask and mask is not None else None
    origins = patch_origins(tuple(hr.shape), rule.patch, rule.stride, positive_box(hr), inside)
    kept = Resident(sample.id, interpolated.to(dtype), hr.to(dtype), label_, mask_, float(low_res[2]), origins)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # before DALI takes the memory of what was converted back
    return kept
