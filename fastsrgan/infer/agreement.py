"""The last step of an inference: a result that agrees with its scan, and is empty where the scan is.

SR' = SR + D' (D D' + w)^-1 (scan - D SR), see ``volume.consistency``: in place, in the image's own intensities, over
the whole image whatever the region of interest. It comes when all planes are finished and have their name: what a run
that ended meanwhile leaves is not gone on with, so that no result is corrected twice.

Slabs lie along one axis in the processed orientation, so that the bits are the same in memory and in files.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastsrgan.errors import UsageError
from fastsrgan.infer.interpolated import nearest
from fastsrgan.infer.modes import Prepared
from fastsrgan.infer.settings import AUTO, OFF, InferSettings
from fastsrgan.volume.acquisition import Assumed, assumed, choose_weight, lacking_sd
from fastsrgan.volume.consistency import SLAB_BYTES, Observation, agree, observation, residual
from fastsrgan.volume.resample import slice_axis

log = logging.getLogger("fastsrgan")

EMPTY = 0.05  # share of voxels that are exactly 0, above which a scan is taken to be masked
NOTHING = 1000.0  # a weight that changes nothing worth the name
WHOLE = 1 << 62  # bytes of a slab that is never cut


@dataclass(frozen=True)
class Wanted:
    """What is to be done with a result, on processed axes.

    seen : how the scan sees it
    full : the same with the Gaussian as wide as the slices are thick, by which ``missing_sd`` judges
    believed : the profile of ``seen``; across : the axis across the slices
    weight : w; AUTO, to be chosen; None, the result is left as it is
    empty : whether exact zeros of the scan are kept; held_bytes : what all this takes on the host
    """

    seen: Observation
    full: Observation
    believed: Assumed
    across: int
    weight: str | float | None
    empty: bool
    held_bytes: int


def wanted(
    image: Prepared, scan_shape: Sequence[int], settings: InferSettings, interpolated_otherwise: bool = False
) -> Wanted | None:
    """What the settings ask for; None: nothing.

    scan_shape : stored axes; interpolated_otherwise : whether the scan came onto the new grid by another interpolator

    Raises UsageError where something is asked for explicitly that cannot be done.
    """
    original = image.geometry == "segsrgan" or interpolated_otherwise
    off = settings.agree == OFF or (settings.agree == AUTO and original)
    if off and not settings.save_residual:
        for name, value in (("profile", settings.profile), ("slice thickness", settings.slice_thickness)):
            if value != AUTO:
                raise UsageError(name, f"{value} has no use without agreement", "--agree auto, or leave it out")
        return None
    turn = image.turn
    old, new, shape = turn.permute(image.spacing), turn.permute(image.wanted), turn.permute(tuple(scan_shape))
    across = slice_axis(old)
    thickness = None if isinstance(settings.slice_thickness, str) else settings.slice_thickness
    believed = assumed(settings.profile, thickness, old[across])

    def seen_as(profile: str, thickness_mm: float | None) -> Observation | None:
        if interpolated_otherwise:
            return None
        return observation(
            shape, old, image.source.shape, new, geometry=image.geometry, thickness_mm=thickness_mm, profile=profile
        )

    seen, full = seen_as(believed.profile, believed.thickness_mm), seen_as("gaussian", thickness)
    if seen is None or full is None:
        what = "save residual" if off else "agree"
        reason = "how the scan sees a result on the original's grid is not known for these sizes"
        raise UsageError(what, reason, "--geometry physical, or leave it out")
    if settings.save_residual and any(matrix is not None for matrix in seen.align):
        raise UsageError("save residual", "the result is coarser than the scan", "a finer --new-resolution")
    held = 0
    if not off and not seen.is_identity:
        # A slab and what the products make of it, the residual; where slabs depend on one another, what is made of it.
        held = 6 * min(SLAB_BYTES, 4 * math.prod(image.source.shape)) + 8 * math.prod(shape)
        held += 0 if _free(seen) else 4 * (2 * math.prod(shape) + _half(seen, shape))
    held += 8 * math.prod(shape) if settings.save_residual else 0
    weight = None if off or seen.is_identity else settings.agree
    return Wanted(seen, full, believed, across, weight, not off and not original, held)


def finish(
    sr: np.ndarray, prob: np.ndarray, data: np.ndarray, image: Prepared, what: Wanted, keep_residual: bool, label: str
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Do it, in place; what the report says about it, and the residual on the scan's stored axes where it is kept.

    sr (X, Y, Z), prob (C, X, Y, Z), data (x, y, z) : stored axes
    """
    began = time.perf_counter()
    turned, scan = image.turn.apply(sr), image.turn.apply(data)
    told: dict[str, Any] = {"agree": None}
    if what.weight is not None:
        free = _free(what.seen)
        found = residual(turned, scan, what.seen, SLAB_BYTES, free[0] if free else 0)
        weight, noise = _weight(found, scan, what)
        size = _energy(scan)
        before = _percent(_energy(found), size)
        del found
        after = _percent(_agree(turned, scan, what.seen, weight, image.norm.floor), size)
        told["agree"] = {
            "weight": weight,
            "noise": noise,
            "profile": what.believed.profile,
            "thickness_mm": float(f"{what.believed.thickness_mm:.6g}"),
            "residual_percent": after,
            "residual_percent_without": before,
        }
        log.info(
            "%s: the result, acquired again, differs from the scan by %.2g %% (%.2g %% without agreement; "
            "weight %.3g, %s profile of %.3g mm)",
            label, after, before, weight, what.believed.profile, what.believed.thickness_mm,
        )  # fmt: skip
    if what.empty and (kept := _keep_empty(turned, image.turn.apply(prob), scan, image, what.seen)):
        told["voxels_kept_empty"] = kept
    left: np.ndarray | None = None
    if keep_residual:
        left = image.turn.undo(residual(turned, scan, what.seen, axis=0))
    if told["agree"] is not None:
        told["agree"]["seconds"] = time.perf_counter() - began
    return told, left


def _weight(left: np.ndarray, scan: np.ndarray, what: Wanted) -> tuple[float, float | None]:
    """w and the scan's noise. The noise over what the spline lacks, or over what the result lacks if that is less: the
    better a result is, and the more of what is left is noise, the less is to be gained from the scan."""
    if what.weight != AUTO:
        assert isinstance(what.weight, (int, float))
        return float(what.weight), None
    chosen = choose_weight(scan, what.full, what.across, what.believed.floor)
    if not chosen.noise or left.shape != scan.shape:
        return _rounded(chosen.w), chosen.noise
    lacking = lacking_sd(left, scan, what.seen, what.across)
    ratio = NOTHING if chosen.noise**2 >= NOTHING * lacking**2 else (chosen.noise / lacking) ** 2
    return _rounded(max(chosen.w, ratio)), chosen.noise


def _rounded(w: float) -> float:
    """To three digits: sums over voxels have other last bits with another layout of the array."""
    return float(f"{w:.3g}")


def _agree(sr: np.ndarray, scan: np.ndarray, seen: Observation, w: float, floor: float) -> float:
    """In place; the sum of squares of scan - D SR afterwards."""
    free = _free(seen)
    axis, slab = (free[0], WHOLE) if free else (0, SLAB_BYTES)
    cuts: Iterable[tuple[slice, ...]] = _slabs(sr, axis) if free else [(slice(None),)]
    left = 0.0
    for here in cuts:
        part, low = sr[here], scan[here]
        agree(part, low, seen, w, floor, slab, axis)
        left += _energy(residual(part, low, seen, slab, axis))
    return left


def _percent(left: float, whole: float) -> float:
    return 100 * math.sqrt(left / whole) if whole else 0.0


def _energy(array: np.ndarray) -> float:
    return sum(float(np.sum(np.square(plane, dtype=np.float64))) for plane in array)


def _free(seen: Observation) -> list[int]:
    """Axes on which a result has the scan's own voxels."""
    return [axis for axis in range(3) if seen.down[axis] is None and seen.align[axis] is None]


def _half(seen: Observation, shape: Sequence[int]) -> int:
    """Voxels of what ``agree`` has gone back with along all axes but the first."""
    return shape[0] * math.prod(m if d is None else d.shape[1] for m, d in zip(shape[1:], seen.down[1:], strict=True))


def _slabs(array: np.ndarray, axis: int) -> Iterator[tuple[slice, ...]]:
    n = array.shape[axis]
    step = max(1, SLAB_BYTES * n // (4 * array.size))
    for first in range(0, n, step):
        yield (*(slice(None),) * axis, slice(first, min(first + step, n)))


def _keep_empty(sr: np.ndarray, prob: np.ndarray, scan: np.ndarray, image: Prepared, seen: Observation) -> int:
    """SR and probabilities 0 where the scan is exactly 0, and along axes on which the result is finer its neighbours
    too; how many voxels that are. Nothing where few voxels are 0 or some are below: no mask makes such images."""
    empty = np.stack([plane == 0 for plane in scan])
    if np.count_nonzero(empty) <= EMPTY * empty.size or image.norm.floor < 0:
        return 0
    for axis, matrix in enumerate(seen.down):
        if matrix is not None:
            n = empty.shape[axis]
            places = np.arange(n)
            below, above = np.maximum(places - 1, 0), np.minimum(places + 1, n - 1)
            empty = empty & empty.take(below, axis) & empty.take(above, axis)
    old, new = image.turn.permute(image.spacing), image.turn.permute(image.wanted)
    x, y, z = nearest(scan.shape, old, sr.shape, new, image.geometry)
    kept = 0
    for place, at in enumerate(x):
        here = empty[at][np.ix_(y, z)]
        sr[place][here] = 0
        for channel in prob:
            channel[place][here] = 0
        kept += int(np.count_nonzero(here))
    return kept
