"""How far a result may be from the truth: an estimate of the standard deviation of its error, voxel by voxel.

A voxel of the scan is a weighted mean of voxels of the result, a row of D. The scan determines that mean, not how the
values lie about it. Their variance D SR^2 - (D SR)^2, brought back onto the result's voxels, is W: 0 where the result
is flat or has the scan's own voxels, large at edges that thick slices average away. How much of W an interpolation gets
wrong, r^2, differs from image to image, and the scan tells it: along the axes that it resolves, its voxels are averaged
to such slices and interpolated again. With the mean V of W inside tissue, the variance S of the network's passes (over
mirror images and networks) and the variance n^2 of the scan's noise,

    doubt^2 = a^2 r^2 V (W / V)^p + s^2 u S + n^2

where u is the share of the result's voxels that the scan has no value for. tools/doubt_rule.py measures a, p and s
(docs/decisions/028-doubt.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastsrgan.volume.acquisition import noise_sd, rounded, sampled, tissue_level
from fastsrgan.volume.consistency import SLAB_BYTES, Observation, as_tensor, consistent_start_matrix, cuts, through
from fastsrgan.volume.resample import apply_axes, slice_profile_matrix, spline_matrix

SLICES = 4  # that an axis has to hold for anything to be measured along it
START = 0.03  # weight with which the interpolation there is made to agree
HIDDEN = 0.9  # share of the error there above which noise hides the rest
LACKING = 0.6  # r where it cannot be told: in the middle of what was measured


@dataclass(frozen=True)
class Rule:
    """a, p and s of the rule."""

    detail: float = 1.09
    power: float = 0.70
    spread: float = 1.05


RULE = Rule()


def lacking(scan_xyz: np.ndarray, seen: Observation, across: int, noise: float) -> float | None:
    """r: what an interpolation of thick slices lacks, over the square root of W, measured inside a scan.

    Along each axis on which the scan has the result's own voxels (if there is none, on which it has them at its own
    scale) its tissue is averaged to slices of as many voxels as ``across``, with a Gaussian profile, and interpolated
    by the spline that agrees with them. Noise is taken off as if it was white. None where the scan is too small or
    noise hides the rest.
    """
    down = seen.down[across]
    if down is None:
        return None
    ratio = down.shape[1] / len(down)
    level = tissue_level(scan_xyz, sampled(scan_xyz, across))
    errors = variances = by_noise = 0.0
    for axis in seen.free or range(3):
        n = scan_xyz.shape[axis]
        m = int(n / ratio)
        if m < SLICES:
            continue
        low = slice_profile_matrix(n, m, float(n / m))
        again = consistent_start_matrix(spline_matrix(m, n, m / n), low, START) @ low
        other = next(d for d in (across, 0, 1) if d != axis)
        part = np.stack(sampled(scan_xyz, other), other)
        made = apply_axes(part, [again if d == axis else None for d in range(3)])
        lows = [low if d == axis else None for d in range(3)]
        inside = part > level
        if not inside.any():
            continue
        errors += float(np.mean((part - made)[inside] ** 2, dtype=np.float64))
        variances += float(np.mean(variance_in_profiles(made, lows)[inside], dtype=np.float64))
        by_noise += noise**2 * float(((np.eye(n) - again) ** 2).sum()) / n
        # The noise that the interpolation keeps is a part of the variance of its values.
        kept = again @ again.T
        of_noise = _back(low) @ (low @ np.diag(kept) - np.einsum("mi,ij,mj->m", low, kept, low))
        variances -= noise**2 * float(of_noise.mean())
    if errors <= 0 or variances <= 0 or by_noise > HIDDEN * errors:
        return None
    return math.sqrt((errors - by_noise) / variances)


def variance_in_profiles(image, down):
    """W: (X, Y, Z) -> the same, the variance of an image within the profiles of a scan's voxels.

    down : D of each axis, (m, n) of rows that sum to 1, None for the identity; without any the result is 0. A voxel has
    the mean of the profiles that it lies in, by its weight in them.
    """
    low = through(image, down)
    variance = through(image * image, down) - low * low
    return through(variance.clip(min=0), [None if d is None else _back(d) for d in down])


def _back(down: np.ndarray) -> np.ndarray:
    """D', its rows made to sum to 1."""
    total = down.sum(0)
    return (down / np.where(total > 0, total, 1)).T


def doubt_(
    map_XYZ: np.ndarray,
    sr_XYZ: np.ndarray,
    scan_xyz: np.ndarray,
    seen: Observation,
    across: int,
    scale: float = 1.0,
    rule: Rule | None = None,
    slab_bytes: int = SLAB_BYTES,
) -> dict[str, float | None]:
    """The rule, in place.

    Parameters
    ----------
    map_XYZ : (X, Y, Z) float32 or float64, the variance S of the network's passes in units of ``scale``^2; afterwards
        the doubt, in the scan's intensities
    sr_XYZ, scan_xyz : the result and its scan, axis orders and intensities as for ``consistency.agree``
    seen : how the scan sees the result
    across : axis across the slices
    rule : None: ``RULE``
    slab_bytes : of the result, worked on at a time along an axis on which D is the identity; all of it at once where
        there is no such axis

    Returns what the rule took besides: "noise" and "lacking" (r), None where they could not be told.
    """
    rule = RULE if rule is None else rule
    if seen.is_identity:
        map_XYZ[...] = 0
        return {"noise": None, "lacking": None}
    axis, slab_bytes = (seen.free[0], slab_bytes) if seen.free else (0, 1 << 62)
    noise = noise_sd(scan_xyz, across)
    lack = lacking(scan_xyz, seen, across, noise or 0.0)
    r = rounded(LACKING if lack is None else lack)
    typical = rounded(_typical(sr_XYZ, seen, axis, slab_bytes))
    share = 1 - math.prod(1.0 if d is None else len(d) / d.shape[1] for d in seen.down)
    for _, _, here in cuts(sr_XYZ, axis, slab_bytes):
        total = as_tensor(map_XYZ[here]) * (rule.spread**2 * share * scale**2)
        if typical > 0:
            detail = (variance_in_profiles(as_tensor(sr_XYZ[here]), seen.down) / typical) ** rule.power
            total += detail * ((rule.detail * r) ** 2 * typical)
        map_XYZ[here] = (total + rounded(noise or 0.0) ** 2).sqrt().numpy()
    return {"noise": noise, "lacking": lack}


def summary(doubt_XYZ: np.ndarray, sr_XYZ: np.ndarray) -> dict[str, float]:
    """Mean and 95th percentile (to a thousandth of the largest) of the doubt inside the head, and the result's mean
    there, which is their scale: where the result is above a tenth of its 99.9th percentile."""
    level = tissue_level(sr_XYZ, sampled(sr_XYZ, 0))
    top = max(float(plane.max()) for plane in doubt_XYZ) or 1.0
    counts, total, image = np.zeros(1000, int), 0.0, 0.0
    for doubt, sr in zip(doubt_XYZ, sr_XYZ, strict=True):
        head = sr > level
        inside = doubt[head]
        total += float(inside.sum(dtype=np.float64))
        image += float(sr[head].sum(dtype=np.float64))
        counts += np.histogram(inside, len(counts), (0, top))[0]
    voxels = int(counts.sum())
    below = np.searchsorted(np.cumsum(counts), 0.95 * voxels)
    p95 = top * float(below + 1) / len(counts) if total else 0.0
    return {"mean": total / max(voxels, 1), "p95": p95, "image_mean": image / max(voxels, 1)}


def _typical(sr_XYZ: np.ndarray, seen: Observation, axis: int, slab_bytes: int) -> float:
    """V: the mean of W inside tissue."""
    level = tissue_level(sr_XYZ, sampled(sr_XYZ, axis))
    total, voxels = 0.0, 0
    for _, _, here in cuts(sr_XYZ, axis, slab_bytes):
        part = as_tensor(sr_XYZ[here])
        inside = part > level
        total += float(variance_in_profiles(part, seen.down)[inside].double().sum())
        voxels += int(inside.sum())
    return total / max(voxels, 1)
