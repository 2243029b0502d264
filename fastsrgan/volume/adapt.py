"""What a network's detail is worth on one scan, found on that scan alone.

Within its slices a scan is sharp. Its result, cut into thick slices along an axis in the plane, makes a scan of which
the truth is known; what the network makes of that, against the truth, tells how much of each part of its detail to
take on the scan itself. SMORE (Zhao et al. 2021) and ECLARE (Remedios et al. 2025) train a network on such pairs; here
it is a linear least-squares problem of a few numbers, solved in a second on top of a trained network (decision 030).

With x the interpolated scan and r the network's image, the result before agreement with the scan is

    x + sum over places p, scales s and bands b of W_p (c_psb B_b S_s (r - x) + e_psb B_b S_s x)

W_p weighs voxels by the local gradient (flat, edge), S_s splits by in-plane scale, B_b by frequency across the slices;
each of the three sums to one, so with c = 1 and e = 0 it is r, as it is in air. Arrays are (X, Y, Z), Z across the
slices; "unit" is the intensity of bright tissue.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.draws import rng
from fastsrgan.volume.acquisition import GUESSED, TISSUE, Assumed, bright, noise_sd, sampled
from fastsrgan.volume.consistency import back_matrix
from fastsrgan.volume.resample import apply_axes, check_profile, slice_profile_matrix, spline_matrix

SCALES = (0.7, 1.5)  # standard deviations in voxels of the Gaussians between which the in-plane scales lie
DETAIL = (0.5, 1.0, 1.8, 2.8)  # knots of the bands of r - x, over the highest frequency that the slices hold
IMAGE = (0.0, 0.4, 0.8, 1.3)  # of those of x; its mean, in the first of them, is not touched
PLACES = (0.15, 0.85)  # quantiles of the local gradient's logarithm between which a voxel passes from flat to edge
SMOOTH = 1.2  # standard deviation in voxels of the Gaussian in the plane before gradient and air are judged
AIR = (0.025, 0.1)  # of the unit: from air to tissue
FAINT = 1e-4  # gradient, of the unit, below which it does not count
REACH = 6  # voxels in the plane that a voxel's result depends on, to each side
BOX_COUNTS = 2.0  # how often a line counts that is cut by a box where the profile is a guess: what that loses, it loses
# below the spline, where a Gaussian only gains less
RIDGE = 0.1  # how strongly the numbers are held at c = 1 and e = 0, over the size of what they multiply
LINES = 2000  # of a trial, that are looked at
AT_ONCE = 256  # lines of which the terms are in memory
SLAB = 1 << 21  # voxels, worked on at a time
BLOCK, SMALLEST = 128, 32  # edges in voxels of the block of a result that is tried
LEAST_RATIO = 1.5  # how much coarser the slices are than the planes: less hides too little to learn from
ACROSS = 2  # the axis across the slices
FEWEST = 4  # slices of a trial
TERMS = len(PLACES) * (len(SCALES) + 1) * (len(DETAIL) + len(IMAGE) - 1)  # numbers that are fitted


@dataclass(frozen=True)
class Trial:
    """A scan of which the truth is known, all (X, Y, Z) float32 with Z across its slices, in the same intensities.

    truth : what it was cut from; scan : (X, Y, z), the slices; start : their interpolation; result : the network's
    image; down : D, (z, Z), what a result is made to agree with, which need not be what the slices were cut by
    counts : (X, Y), how often each line counts
    """

    truth: Tensor
    scan: Tensor
    start: Tensor
    result: Tensor
    down: np.ndarray
    counts: Tensor


@dataclass(frozen=True)
class Fit:
    """The numbers c, then e, (places, scales, bands) each; and the gain over interpolation in dB on the trials, with
    them and without, after agreement with the trials' scans."""

    detail: np.ndarray
    image: np.ndarray
    gain_db: float
    gain_db_without: float


def applies(scan_mm: Sequence[float], voxel_mm: Sequence[float], across: int) -> bool:
    """Whether a result is finer than its scan across the slices, and there by ``LEAST_RATIO`` more than in the plane:
    what its planes show has to be finer than what the slices hide. Both sizes by processed axes."""
    finer = [max(low / high, 1.0) for low, high in zip(scan_mm, voxel_mm, strict=True)]
    return across == ACROSS and finer[ACROSS] >= LEAST_RATIO * max(finer[0], finer[1])


def held_bytes(shape_XYZ: Sequence[int]) -> int:
    """About what the trials of a result take, and the slabs afterwards: thirty float32 volumes of their size."""
    block = math.prod(min(BLOCK, n) for n in shape_XYZ)
    return 30 * 4 * max(block, min(SLAB, math.prod(shape_XYZ)))


def adapt(
    sr_XYZ: np.ndarray,
    scan_xyz: np.ndarray,
    start: Callable[[int, int], Tensor],
    network: Callable[[Tensor], Tensor],
    believed: Assumed,
    weight: float,
    spacing_mm: float,
    voxel_mm: float,
    largest: Sequence[int] = (BLOCK,) * 3,
    floor: float = -math.inf,
) -> dict[str, Any]:
    """Try the network on the scan itself, and adapt its image to what came out, in place; what a report says about it.

    The trials are one block of the image, cut into slices as thick as the scan's along one axis of its plane and then
    the other. Where the slice profile is a guess, one half of each is cut by a Gaussian and the other by a box, which
    counts twice; the network's images are made to agree with the guess, as that of the scan will be.

    Parameters
    ----------
    sr_XYZ : (X, Y, Z) float32, the network's image before agreement; scan_xyz : (X, Y, z), both of any strides
    start : (first, stop) -> planes of the interpolated scan along X
    network : interpolated image -> the network's, (X, Y, Z) float32 in the scan's intensities, at most ``largest``
    believed, weight : what the result will be made to agree with
    spacing_mm, voxel_mm : of the slices, and of the result across them
    floor : the least intensity there is
    """
    ratio = float(spacing_mm / voxel_mm)
    unit = bright([np.ascontiguousarray(part, np.float32) for part in sampled(scan_xyz, ACROSS)])
    here = _block(scan_xyz, sr_XYZ.shape, largest, TISSUE * unit)
    shape = tuple(part.stop - part.start for part in here)
    if min(shape) < SMALLEST or min(shape[:ACROSS]) < FEWEST * ratio or unit <= 0:
        reason = f"a block of {' x '.join(map(str, shape))} voxels is too small to be tried"
        return {"trials": 0, "reason": reason if unit > 0 else "the scan has no bright voxels"}
    truth = torch.from_numpy(np.array(sr_XYZ[here], np.float32, order="C"))
    noise = noise_sd(scan_xyz, ACROSS) or 0.0
    told = (believed.profile, believed.width_mm)
    cut_by, counts = [told, told], (1.0, 1.0)
    if believed.known == GUESSED:
        cut_by, counts = [("gaussian", believed.thickness_mm), ("box", believed.thickness_mm)], (1.0, BOX_COUNTS)
    trials = []
    for axis in (0, 1):
        turned = truth.transpose(axis, ACROSS).contiguous()
        n = turned.shape[ACROSS]
        first, second, down = (
            slice_profile_matrix(n, int(n / ratio + 1e-6), ratio, width / spacing_mm, check_profile(name))
            for name, width in (*cut_by, told)
        )
        halves = turned.tensor_split(2, 1 - axis)
        order = (0, 1) if axis else (1, 0)
        profiles = [(first, second)[i] for i in order]
        scan = torch.cat(
            [_cut(half, cut, noise, floor, axis) for half, cut in zip(halves, profiles, strict=True)], 1 - axis
        )
        x = scan @ _transposed(spline_matrix(len(down), n, 1 / ratio))
        each = [torch.full(half.shape[:ACROSS], counts[i]) for half, i in zip(halves, order, strict=True)]
        trials.append(Trial(turned, scan, x, network(x), down, torch.cat(each, 1 - axis)))
    fitted = fit(trials, ratio, weight, unit)
    block = start(here[0].start, here[0].stop)[:, here[1], here[2]].contiguous()
    adapt_(sr_XYZ, start, fitted, ratio, place_levels(block, unit), unit)
    return {"trials": len(trials), "gain_db": fitted.gain_db, "gain_db_without": fitted.gain_db_without}


def fit(trials: Sequence[Trial], ratio: float, w: float, unit: float) -> Fit:
    """The numbers that bring the results of all trials, made to agree with their scans, nearest to the truth.

    Parameters
    ----------
    ratio : spacing of slices over voxels; w : weight of ``consistency.agree``
    """
    square, product = np.zeros((TERMS, TERMS)), np.zeros(TERMS)
    missing = start_missing = 0.0
    for trial in trials:
        back = back_matrix(trial.down, w)
        lines = _lines(trial.truth > TISSUE * unit)
        scan, start, truth, result = (v[lines] for v in (trial.scan, trial.start, trial.truth, trial.result))
        n = truth.shape[1]
        free = _transposed(np.eye(n) - back @ trial.down)  # what agreement leaves of a term
        missed = truth - start - (scan - start @ _transposed(trial.down)) @ _transposed(back)
        air, *tissue = (v[lines] for v in places(trial.start, place_levels(trial.start, unit), unit))
        splits = [[v[lines] for v in scales(volume)] for volume in (trial.result - trial.start, trial.start)]
        matrices = [[_transposed(m) for m in made] for made in (bands(n, ratio, DETAIL), bands(n, ratio, IMAGE)[1:])]
        missed -= (air * (result - start)) @ free
        root = trial.counts[lines].sqrt()[:, None].double()
        for first in range(0, len(truth), AT_ONCE):
            here = slice(first, first + AT_ONCE)
            inside = truth[here] > TISSUE * unit
            weight = root[here].expand_as(inside)[inside]
            made = [
                ((place[here] * (part[here] @ m)) @ free)[inside]
                for parts, turned in zip(splits, matrices, strict=True)
                for place in tissue for part in parts for m in turned
            ]  # fmt: skip
            terms = torch.stack(made, 1) * weight[:, None]
            left = missed[here][inside] * weight
            square += (terms.T @ terms).numpy()
            product += (terms.T @ left).numpy()
            missing += float(left @ left)
            start_missing += float((((truth - start)[here][inside] * weight) ** 2).sum())
    prior = _prior()
    ridge = RIDGE * np.diag(np.diag(square) + np.finfo(float).tiny)
    # Three digits: sums over voxels have other last bits with another layout of the arrays.
    found = np.array([float(f"{c:.3g}") for c in np.linalg.solve(square + ridge, product + ridge @ prior)])

    def gain(numbers: np.ndarray) -> float:
        error = missing - 2 * numbers @ product + numbers @ square @ numbers
        return round(float(10 * np.log10(max(start_missing, 1e-30) / max(error, 1e-30))), 2)

    kinds = (len(PLACES), len(SCALES) + 1, -1)
    detail, image = np.split(found, [np.count_nonzero(prior)])
    return Fit(detail.reshape(kinds), image.reshape(kinds), gain(found), gain(prior))


def adapt_(
    sr_XYZ: np.ndarray,
    start: Callable[[int, int], Tensor],
    fitted: Fit,
    ratio: float,
    levels: tuple[float, float],
    unit: float,
) -> None:
    """The network's image ``sr_XYZ`` (X, Y, Z) float32, of any strides, becomes the adapted one, in place.

    start : (first, stop) -> planes of the interpolated scan along X; levels : ``place_levels`` of the scan
    """
    count, n = sr_XYZ.shape[0], sr_XYZ.shape[2]
    step = max(REACH, SLAB // (sr_XYZ.shape[1] * n))
    of_detail, of_image = (
        [[np.tensordot(c, np.stack(made), 1) for c in place] for place in numbers]
        for numbers, made in ((fitted.detail, bands(n, ratio, DETAIL)), (fitted.image, bands(n, ratio, IMAGE)[1:]))
    )
    before = np.empty((0, *sr_XYZ.shape[1:]), np.float32)  # planes in front of the slab, as the network gave them
    for first in range(0, count, step):
        stop = min(first + step, count)
        low, high = max(0, first - REACH), min(count, stop + REACH)
        x = start(low, high)
        network = torch.from_numpy(np.concatenate([before[len(before) - (first - low) :], sr_XYZ[first:high]]))
        before = np.array(sr_XYZ[max(0, stop - REACH) : stop])
        inner = slice(first - low, stop - low)
        detail, image = ([s[inner] for s in scales(v)] for v in (network - x, x))
        air, *tissue = places(x, levels, unit)
        made = x[inner] + air[inner] * (network - x)[inner]
        for weight, of_d, of_i in zip(tissue, of_detail, of_image, strict=True):
            parts = zip((*detail, *image), (*of_d, *of_i), strict=True)
            made += weight[inner] * sum(apply_axes(part, (None, None, matrix)) for part, matrix in parts)
        sr_XYZ[first:stop] = made.numpy()


def place_levels(start: Tensor, unit: float) -> tuple[float, float]:
    """The logarithms of the gradient between which a voxel passes from flat to edge, of an interpolated scan."""
    found = _log_gradient(_smooth(start, SMOOTH) / unit)[start > TISSUE * unit].double().numpy()
    low, high = np.quantile(found, PLACES) if found.size else (0.0, 1.0)
    low, high = float(f"{low:.3g}"), float(f"{high:.3g}")
    return low, max(high, low + 0.01)


def places(start: Tensor, levels: tuple[float, float], unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of air, flat and edge, of sum 1."""
    smooth = _smooth(start, SMOOTH) / unit
    tissue = ((smooth - AIR[0]) / (AIR[1] - AIR[0])).clamp_(0, 1)
    edge = tissue * ((_log_gradient(smooth) - levels[0]) / (levels[1] - levels[0])).clamp_(0, 1)
    return 1 - tissue, tissue - edge, edge


def scales(volume: Tensor) -> list[Tensor]:
    """What is finer in the plane than each Gaussian of ``SCALES``, one after the other, and the rest: of sum volume."""
    smooth = [volume, *(_smooth(volume, sd) for sd in SCALES)]
    return [a - b for a, b in itertools.pairwise(smooth)] + [smooth[-1]]


@functools.lru_cache(maxsize=64)
def bands(n: int, ratio: float, knots: tuple[float, ...]) -> list[np.ndarray]:
    """Matrices (n, n) that split a line by its frequency, of sum 1: triangles between the knots, in the cosines that
    the line is made of. Knots are over the highest frequency that slices ``ratio`` voxels apart hold."""
    k = np.arange(n)
    cosines = np.cos(np.pi * (k[None] + 0.5) * k[:, None] / n) * np.sqrt(2 / n)
    cosines[0] /= np.sqrt(2)
    at = np.array(knots) / ratio
    return [(cosines.T * np.interp(k / n, at, row)) @ cosines for row in np.eye(len(knots))]


def _block(scan: np.ndarray, shape: Sequence[int], largest: Sequence[int], level: float) -> tuple[slice, slice, slice]:
    """The middle of what is no air."""
    parts = []
    for axis, (n, m, most) in enumerate(zip(shape, scan.shape, largest, strict=True)):
        filled = np.array([np.count_nonzero(plane > level) for plane in np.moveaxis(scan, axis, 0)], float)
        middle = (float(filled @ np.arange(m)) / max(filled.sum(), 1.0) + 0.5) * n / m
        size = min(n, most)
        first = min(max(0, round(middle - size / 2)), n - size)
        parts.append(slice(first, first + size))
    return parts[0], parts[1], parts[2]


def _cut(truth: Tensor, profile: np.ndarray, noise: float, floor: float, number: int) -> Tensor:
    """(X, Y, Z) -> (X, Y, z) by the profile (z, Z). The truth has the scan's noise, of which slices keep a part: so
    much is added that they have it as well."""
    scan = truth @ _transposed(profile)
    added = noise * math.sqrt(max(0.0, 1 - float((profile**2).sum()) / len(profile)))
    if not added:
        return scan
    drawn = rng(0, "adapt", number).standard_normal(tuple(scan.shape), np.float32)
    return (scan + added * torch.from_numpy(drawn)).clamp_(min=floor)


def _transposed(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(matrix.T.astype(np.float32))


def _prior() -> np.ndarray:
    places_and_scales = len(PLACES) * (len(SCALES) + 1)
    return np.repeat([1.0, 0.0], [places_and_scales * len(DETAIL), places_and_scales * (len(IMAGE) - 1)])


def _lines(inside: Tensor) -> Tensor:
    """(X, Y) bool: at most about ``LINES`` lines that hold tissue, evenly taken, none at the block's rim, where the
    Gaussians lack their other side."""
    found = inside.any(2)
    for axis, edge in enumerate(found.shape):
        rim = min(REACH, edge // 4)
        found.narrow(axis, 0, rim).fill_(False)
        found.narrow(axis, edge - rim, rim).fill_(False)
    at = found.flatten().nonzero().flatten()
    taken = torch.zeros(found.numel(), dtype=torch.bool)
    taken[at[:: max(1, len(at) // LINES)]] = True
    return taken.view(found.shape)


def _log_gradient(smooth: Tensor) -> Tensor:
    """Within the plane."""
    squares = [torch.gradient(smooth, dim=axis)[0] ** 2 for axis in (0, 1)]
    return (squares[0] + squares[1] + FAINT**2).sqrt_().log_()


def _smooth(volume: Tensor, sd: float) -> Tensor:
    return apply_axes(volume, (_gaussian(volume.shape[0], sd), _gaussian(volume.shape[1], sd), None))


@functools.lru_cache(maxsize=64)
def _gaussian(n: int, sd: float) -> np.ndarray:
    """(n, n) of rows that sum to 1, three standard deviations to each side."""
    distance = np.arange(n)[:, None] - np.arange(n)[None]
    rows = np.where(np.abs(distance) <= int(3 * sd + 0.5), np.exp(-0.5 * (distance / sd) ** 2), 0.0)
    return rows / rows.sum(1, keepdims=True)
