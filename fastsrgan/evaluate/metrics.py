"""Image and segmentation metrics on (X, Y, Z) arrays; ``figures.FIGURES`` defines each.

PSNR, SSIM, Dice and the number of connected components are the figures of the SegSRGAN paper (Delannoy et al. 2019,
section 3). Everything is summed in float64, slab by slab: no more than a few slabs are held besides the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from fastsrgan.errors import InputError, counted
from fastsrgan.volume.head import lowest

SSIM_SIGMA, SSIM_TRUNCATE, SSIM_K1, SSIM_K2 = 1.5, 3.5, 0.01, 0.03
SSIM_RADIUS = int(SSIM_TRUNCATE * SSIM_SIGMA + 0.5)  # 5: an 11 x 11 x 11 window
SEG_THRESHOLD = 0.5
_SLAB_VOXELS = 1 << 20

CALIBRATION = {
    "rank_correlation": "Spearman's, of the doubt and the absolute error",
    "error_over_doubt": "root mean square of the error over that of the doubt: 1 where both are as large",
    "doubt": "inside the mask, or where the reference is above a tenth of its 99.9th percentile; deciles are ten parts "
    "of equally many voxels, by rising doubt: root mean squares in each",
}
DECILES = 10


@dataclass(frozen=True)
class Window:
    """What an SSIM is averaged over: ``radius`` in voxels, Gaussian weights or equal ones, and the covariance's N - 1.

    ``sample`` divides variances by N - 1 of the N voxels of a window instead of N.
    """

    radius: int
    gaussian: bool
    sample: bool


GAUSSIAN = Window(SSIM_RADIUS, gaussian=True, sample=False)
UNIFORM = Window(3, gaussian=False, sample=True)


def mse(sr: np.ndarray, ref: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Mean squared difference of two (X, Y, Z) arrays, over the mask if one is given.

    Raises InputError for shapes that differ, an empty mask and voxels that are not finite.
    """
    return _mean_power(sr, ref, mask, 2)


def mae(sr: np.ndarray, ref: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Mean absolute difference of two (X, Y, Z) arrays, over the mask if one is given. Raises as ``mse``."""
    return _mean_power(sr, ref, mask, 1)


def psnr(sr: np.ndarray, ref: np.ndarray, mask: np.ndarray | None = None, data_range: float | None = None) -> float:
    """10 log10(R^2 / MSE) in dB; infinite for identical arrays.

    Parameters
    ----------
    sr, ref : (X, Y, Z), compared as they are: no rescaling
    mask : (X, Y, Z), voxels that are not 0 enter the mean squared error; default all
    data_range : R; default the maximum of the whole reference, inside the mask and outside (SegSRGAN paper, section 3)

    Raises InputError as ``mse``, and when the reference has no positive maximum.
    """
    scale = positive_range(ref, data_range)
    error = mse(sr, ref, mask)
    return math.inf if error == 0 else 10 * math.log10(scale**2 / error)


def ssim(
    sr: np.ndarray,
    ref: np.ndarray,
    mask: np.ndarray | None = None,
    data_range: float | None = None,
    window: Window = GAUSSIAN,
) -> float:
    """Mean structural similarity (Wang et al. 2004) with a 3-D Gaussian window, in float64.

    Equal to ``skimage.metrics.structural_similarity(ref, sr, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=R)`` on float64 arrays: windows of 11^3 voxels, the mean taken over the
    centres whose window lies inside the volume. With ``UNIFORM`` equal to scikit-image's defaults (windows of 7^3).

    Parameters
    ----------
    sr, ref : (X, Y, Z), at least a window along each axis
    mask : (X, Y, Z), window centres that are not 0 are averaged; default all. The windows reach outside the mask
    data_range : R; default the maximum of the whole reference

    Raises InputError for shapes that differ or are too small, no positive maximum, voxels that are not finite, or a
    mask without a voxel whose window lies inside the volume.
    """
    value = ssim_regions(sr, ref, [mask], data_range, window)[0]
    if value is None:
        reason = f"has no voxel that is {window.radius} or more voxels away from every border"
        raise InputError("mask", reason, "SSIM needs one")
    return value


def ssim_regions(
    sr: np.ndarray,
    ref: np.ndarray,
    masks: Sequence[np.ndarray | None],
    data_range: float | None = None,
    window: Window = GAUSSIAN,
) -> list[float | None]:
    """``ssim`` over several masks (None: the whole volume) for the price of one; None for a mask without a window."""
    for mask in masks:
        _same_shape(sr, ref, mask)
    scale = positive_range(ref, data_range)
    r = window.radius
    if min(ref.shape) < 2 * r + 1:
        raise InputError("SSIM", f"the volume is {_size(ref)} voxels", f"at least {2 * r + 1} per axis")
    sr, ref, masks = _rows_first(sr, ref, masks)
    totals, counts = [0.0] * len(masks), [0] * len(masks)
    rows = max(8, _SLAB_VOXELS // (ref.shape[1] * ref.shape[2]))
    for start in range(0, ref.shape[0] - 2 * r, rows):
        stop = min(start + rows, ref.shape[0] - 2 * r)
        # The window needs r more planes on both sides of the centres start + r .. stop + r.
        similarity = _ssim_map(sr[start : stop + 2 * r], ref[start : stop + 2 * r], scale, window)
        for i, mask in enumerate(masks):
            inside = similarity if mask is None else similarity[mask[start + r : stop + r, r:-r, r:-r] != 0]
            totals[i] += float(inside.sum())
            counts[i] += inside.size
    return [_finite(t / n) if n else None for t, n in zip(totals, counts, strict=True)]


def dice(seg: np.ndarray, label: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of the voxels above 0.5 (masks, integer labels or probabilities alike).

    1 when both are empty, 0 when one is. Raises InputError for shapes that differ.
    """
    _same_shape(seg, label)
    a, b = binary(seg), binary(label)
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 1.0 if total == 0 else 2 * int(np.count_nonzero(a & b)) / total


def calibration(
    sr: np.ndarray, ref: np.ndarray, doubt: np.ndarray, mask: np.ndarray | None = None, part: np.ndarray | None = None
) -> dict[str, Any]:
    """Whether the error of an image is where, and as large as, its doubt says.

    sr, ref, doubt : (X, Y, Z), doubt the standard deviation that the error is taken to have
    mask : where; None: where the reference is above a tenth of its 99.9th percentile, counted from ``head.lowest``
    part : the voxels that are compared at all; None: all

    Returns {rank_correlation, error_over_doubt, deciles: [{doubt, error}]}, see ``CALIBRATION``; None for what does not
    exist, as the rank correlation of a doubt that is the same everywhere.
    Raises InputError for shapes that differ, and where there are fewer than ten voxels.
    """
    _same_shape(sr, ref, doubt, mask, part)
    low = lowest(ref)
    inside = ref > low + 0.1 * (np.percentile(ref, 99.9) - low) if mask is None else mask
    inside = inside if part is None else inside & part
    error, doubt = np.abs(sr[inside].astype(np.float64) - ref[inside]), doubt[inside].astype(np.float64)
    if error.size < DECILES:
        raise InputError("doubt", f"{counted(error.size, 'voxel')} to compare with the error", "another mask")
    parts = np.array_split(np.argsort(doubt, kind="stable"), DECILES)
    ranks = np.corrcoef(_ranks(error), _ranks(doubt))[0, 1] if np.ptp(doubt) and np.ptp(error) else math.nan
    whole = _rms(doubt)
    return {
        "rank_correlation": float(ranks) if math.isfinite(ranks) else None,
        "error_over_doubt": _rms(error) / whole if whole else None,
        "deciles": [{"doubt": _rms(doubt[part]), "error": _rms(error[part])} for part in parts],
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks of equals."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _rms(values: np.ndarray) -> float:
    return math.sqrt(float(np.mean(values**2)))


def connected_components(seg: np.ndarray) -> int:
    """Number of 26-connected components of the voxels above 0.5 (SegSRGAN paper, figure 9)."""
    return int(components(seg)["components"])


def components(seg: np.ndarray, label: np.ndarray | None = None) -> dict[str, int]:
    """26-connected components of the voxels above 0.5 of a (X, Y, Z) array.

    Returns ``components`` (number) and ``largest_component`` (voxels, 0 when there is none); with a label also
    ``false_components`` (components that share no voxel with it) and ``false_component_voxels``.
    Raises InputError for shapes that differ.
    """
    numbered, number = ndimage.label(binary(seg), structure=np.ones((3,) * np.ndim(seg), bool))
    sizes = np.bincount(numbered.ravel(), minlength=number + 1)[1:]
    result = {"components": int(number), "largest_component": int(sizes.max(initial=0))}
    if label is not None:
        _same_shape(seg, label)
        touching = np.zeros(number + 1, bool)
        touching[numbered[binary(label)]] = True
        false = ~touching[1:]
        result["false_components"] = int(np.count_nonzero(false))
        result["false_component_voxels"] = int(sizes[false].sum())
    return result


def binary(seg: np.ndarray) -> np.ndarray:
    """Voxels above 0.5 as bool: a mask stays itself, a probability map is thresholded as in the paper."""
    seg = np.asarray(seg)
    return seg if seg.dtype == bool else seg > SEG_THRESHOLD


def _mean_power(sr: np.ndarray, ref: np.ndarray, mask: np.ndarray | None, power: int) -> float:
    _same_shape(sr, ref, mask)
    sr, ref, (mask,) = _rows_first(sr, ref, [mask])
    total, count = 0.0, 0
    for part in _slabs(ref.shape):
        difference = np.asarray(sr[part], np.float64) - ref[part]
        if mask is not None:
            difference = difference[mask[part] != 0]
        total += float(np.square(difference, out=difference).sum() if power == 2 else np.abs(difference).sum())
        count += difference.size
    if count == 0:
        raise InputError("mask", "has no voxels", "a region needs at least one")
    return _finite(total / count)


def _ssim_map(x: np.ndarray, y: np.ndarray, data_range: float, window: Window) -> np.ndarray:
    """SSIM at the centres whose window fits: (X, Y, Z) -> (X - 2 radius, ...) float64."""
    mean = _gaussian_mean if window.gaussian else _uniform_mean
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mean_x, mean_y, mean_xy = mean(x), mean(y), mean(x * y)
    # Only the sum of the two variances enters: four window means instead of five.
    mean_squares = mean(x * x + y * y)
    voxels = (2 * window.radius + 1) ** 3
    norm = voxels / (voxels - 1) if window.sample else 1.0
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    upper = (2 * product + c1) * (2 * norm * (mean_xy - product) + c2)
    return upper / ((squares + c1) * (norm * (mean_squares - squares) + c2))


def _uniform_mean(x: np.ndarray) -> np.ndarray:
    """Mean over each window that fits: every size shrinks by 2 radii."""
    r = UNIFORM.radius
    return ndimage.uniform_filter(x, 2 * r + 1)[r:-r, r:-r, r:-r]


def _gaussian_mean(x: np.ndarray) -> np.ndarray:
    """Gaussian-weighted mean over each window that fits: every size shrinks by 2 SSIM_RADIUS."""
    r = SSIM_RADIUS
    weights = np.exp(-0.5 * (np.arange(-r, r + 1) / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    n = x.shape[0] - 2 * r
    # Along the first axis whole planes are added: three times as fast as filtering strided lines.
    y = x[r : r + n] * weights[r]
    pair = np.empty_like(y)
    for d in range(1, r + 1):
        np.add(x[r - d : r - d + n], x[r + d : r + d + n], out=pair)
        pair *= weights[r + d]
        y += pair
    for axis in (1, 2):
        y = ndimage.correlate1d(y, weights, axis=axis, mode="reflect")
    return y[:, r:-r, r:-r]


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    rows = max(1, _SLAB_VOXELS // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)


def _rows_first(
    sr: np.ndarray, ref: np.ndarray, masks: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray | None]]:
    """Turn the axes around where the reference is stored first axis fastest, as NIfTI is: slabs are then contiguous."""
    if not np.isfortran(ref):
        return sr, ref, list(masks)
    return sr.T, ref.T, [None if mask is None else mask.T for mask in masks]


def _same_shape(first: np.ndarray, *others: np.ndarray | None) -> None:
    if np.ndim(first) != 3:
        raise InputError("metrics", f"an array has {np.ndim(first)} axes", "volumes have three")
    for other in others:
        if other is not None and np.shape(other) != np.shape(first):
            raise InputError("metrics", f"sizes differ: {_size(first)} and {_size(other)}", "resample one of them")


def _size(array: np.ndarray) -> str:
    return " x ".join(str(n) for n in np.shape(array))


def positive_range(ref: np.ndarray, data_range: float | None = None) -> float:
    """``data_range``, or the maximum of the reference. Raises InputError where it is not positive and finite."""
    if ref.size == 0:
        raise InputError("reference", "has no voxels", "a volume of at least one voxel")
    value = float(ref.max()) if data_range is None else float(data_range)
    if not value > 0 or not math.isfinite(value):
        reason = f"its maximum is {value:g}" if data_range is None else f"data_range is {value:g}"
        raise InputError("reference", reason, "PSNR and SSIM need a positive, finite range")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise InputError("metrics", "an image has voxels that are not finite", "replace NaN and infinities first")
    return value


def surface_scores(seg: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float]) -> dict[str, float | None]:
    """``hausdorff95_mm`` and ``surface_distance_mm`` of two (X, Y, Z) segmentations, thresholded at 0.5.

    ``spacing_mm`` is the voxel size along each axis; the axes are taken to be at right angles. Both figures are None
    where a segmentation is empty: there is no surface to be far from. Raises InputError for shapes that differ.
    """
    distances = surface_distances(seg, label, spacing_mm)
    if distances is None:
        return {"hausdorff95_mm": None, "surface_distance_mm": None}
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
        reason = f"sizes differ or are not three: {a.shape} and {b.shape}"
        raise InputError("surface distance", reason, "two masks of one 3-D grid")
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
