"""One subject in memory: oriented, degraded, on the device, with the places of its patches.

Where the training patches of a volume lie (paper section 2.3; the original's cropping methods).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastsrgan.config import TrainConfig
from fastsrgan.core.kernels import to_device
from fastsrgan.core.threads import one_thread
from fastsrgan.data.pool import Resident, Slices
from fastsrgan.errors import FastsrganError, InputError, UsageError
from fastsrgan.observation.model import Degradation, Degraded, Draw
from fastsrgan.observation.slabs import Region
from fastsrgan.volume.acquisition import expected_weight
from fastsrgan.volume.geometry import Orientation, grid_size, processing_orientation
from fastsrgan.volume.intensity import lifted
from fastsrgan.volume.resample import SAME, modulo_size

if TYPE_CHECKING:  # patches of an array are cut where no store can be read
    from fastsrgan.store.reader import Sample

Triple = tuple[float, float, float]
Moved = tuple[Tensor, Tensor, Tensor, Tensor | None]
Law = Callable[[Any], Degraded]  # an array, or a tensor on its device
Mover = Callable[[np.ndarray, np.ndarray, np.ndarray | None, Law], Moved]


@dataclass(frozen=True)
class PatchRule:
    """Which patches are taken: edge, grid stride, and whether the mask decides (``overlapping_with_mask``).

    agree : whether results of patches are made to agree with the scan
    """

    patch: int
    stride: int
    by_mask: bool = False
    agree: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> PatchRule:
        """That of a run. Raises UsageError where its patches could not agree with a scan."""
        if config.agree and not config.physical:
            raise UsageError("agree", "the original's geometry has no slices to agree with", "--geometry physical")
        by_mask = config.image_cropping_method == "overlapping_with_mask"
        return cls(config.patch_size, config.stride, by_mask, config.agree)


def move_by_thread(
    image: np.ndarray, label: np.ndarray, mask: np.ndarray | None, law: Law, *, device: torch.device
) -> Moved:
    """Bring to the device and degrade there: interpolated, hr, label, mask. All is queued on the current stream, copies
    from pinned memory."""
    if device.type == "cpu":
        with one_thread():
            done = law(image)
    else:
        done = law(to_device(image, device))
    arrays = (done.interpolated, done.hr, label, mask)
    return tuple(_there(a, device) for a in arrays)  # type: ignore[return-value]


def _there(array: np.ndarray | Tensor | None, device: torch.device) -> Tensor | None:
    if array is None or isinstance(array, Tensor):
        return array
    return to_device(np.ascontiguousarray(array), device)


def make_resident(
    sample: Sample,
    degradation: Degradation,
    draw: Draw,
    rule: PatchRule,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    move: Mover | None = None,
    crop: bool = False,
) -> Resident:
    """Degrade one subject and place its patches. The same bits on any CPU with any number of cores.

    Parameters
    ----------
    draw : parameters, in the stored axis order
    dtype : of the resident intensities
    move : what degrades and brings the volumes to the device (default ``move_by_thread``)
    crop : make and keep only the part of the volume in which patches lie: air around a head costs nothing

    Raises
    ------
    InputError : no label, no mask where one is needed, or an image that cannot be degraded.
    """
    if sample.image is None:
        raise InputError(sample.id, "has neither an image nor tissues", "training needs one of them")
    if sample.label is None:
        raise InputError(sample.id, "has no label", "training needs Label_image or Tissue_image for every subject")
    if rule.by_mask and sample.mask is None:
        raise InputError(sample.id, "has no mask", "overlapping_with_mask needs Mask_image for every subject")
    turn = Orientation()
    if degradation.geometry == "physical":
        turn = processing_orientation(sample.affine, draw.low_res)
    spacing, low_res = turn.permute(sample.spacing), turn.permute(draw.low_res)
    image, label = np.ascontiguousarray(turn.apply(sample.image)), np.ascontiguousarray(turn.apply(sample.label))
    mask = None if sample.mask is None else np.ascontiguousarray(turn.apply(sample.mask))
    if degradation.geometry == "physical":  # the other keeps the original's numbers, which cut values below 0
        image = lifted(image)
    region = part_with_patches(image, rule, degradation, spacing, low_res) if crop else None
    if region is not None:
        label, mask = label[region], None if mask is None else mask[region]
    try:
        moved = (move or functools.partial(move_by_thread, device=device))(
            image,
            np.ascontiguousarray(label),
            None if mask is None else np.ascontiguousarray(mask),
            lambda data: degradation.apply(data, spacing, draw, low_res, region),
        )
    except FastsrganError as error:
        raise type(error)(f"{sample.id}: {error.what}", error.reason, error.hint) from error
    shape = label.shape if region is not None else used_shape(image, degradation, spacing, low_res)
    # SciPy's zoom may return another size than the image's at fractional ratios: what all arrays share is used.
    cut = tuple(slice(0, min(a, b)) for a, b in zip(shape, moved[0].shape, strict=True))
    interpolated, hr, label_, mask_ = (None if t is None else t[cut].contiguous() for t in moved)
    assert interpolated is not None and hr is not None and label_ is not None
    inside = mask[cut] if rule.by_mask and mask is not None else None
    box = positive_box(hr) if region is None else tuple((0, n) for n in hr.shape)  # the region is the box
    origins = patch_origins(tuple(hr.shape), rule.patch, rule.stride, box, inside)
    arrays = interpolated.to(dtype), hr.to(dtype), label_, mask_
    offset = (0, 0, 0) if region is None else tuple(r.start for r in region)
    slices = slices_of(image.shape, spacing, low_res, draw.noise) if rule.agree else None
    kept = Resident(sample.id, *arrays, float(low_res[2]), origins, offset, slices)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # before DALI takes the memory of what was converted back
    return kept


def slices_of(shape: tuple[int, ...], spacing: Triple, low_res: Triple, noise: float) -> Slices | None:
    """How ``infer --agree auto`` would let the result of a volume agree with its scan: along the last axis, with a
    weight that follows from the noise; None where the planes of the slices are coarsened too."""
    ratio, *plane = (low_res[d] / spacing[d] for d in (2, 0, 1))
    if max(plane) > 1 + SAME:
        return None
    return Slices(shape[2], grid_size(shape[2], spacing[2], low_res[2]), ratio, expected_weight(noise, ratio))


def used_shape(image: np.ndarray, degradation: Degradation, spacing: Triple, low_res: Triple) -> tuple[int, ...]:
    """The size of the image, or that of the part which the original keeps."""
    if degradation.geometry != "segsrgan":
        return image.shape
    return tuple(modulo_size(n, r / s) for n, s, r in zip(image.shape, spacing, low_res, strict=True))


def part_with_patches(
    image: np.ndarray, rule: PatchRule, degradation: Degradation, spacing: Triple, low_res: Triple
) -> Region | None:
    """Where the patches of an image lie. None: keep all, since the original's ratio changes the sizes."""
    ratios = [r / s for s, r in zip(spacing, low_res, strict=True)]
    if degradation.geometry == "segsrgan" and any(abs(r - round(r)) > 1e-9 for r in ratios):
        return None
    shape = used_shape(image, degradation, spacing, low_res)
    return patch_region(shape, rule.patch, positive_box(image[tuple(slice(0, n) for n in shape)]))


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
