"""What a network's image lacks on one scan, learned on that scan alone.

Within its slices a scan is sharp. Its result, cut into thick slices along an axis in the plane, makes a scan of which
the truth is known; from what the network makes of that, a small perceptron learns what the image lacks at a voxel,
given what lies around it, and says so for the scan itself. SMORE (Zhao et al. 2021) and ECLARE (Remedios et al. 2025)
train a network of their own on such pairs, from nothing; here it is what is left to a trained one (decision 030).

With x the interpolated scan, r the network's image, D the slices and B = D' (D D' + w)^-1, the image before agreement
with the scan is r + o, where the perceptron's answer o depends on

- x - L, r - L and L, in 3 x 3 voxels of the plane and 5 across it, with L = r + B (D x - D r) nearly the result;
- r - x and x in bands of frequency across the slices and of scale in the plane;
- x smoothed, and the logarithm of its gradient in the plane.

It is trained so that (1 - B D) o, what agreement leaves of it, is truth - L. Arrays are (X, Y, Z), Z across the slices;
"unit" is the intensity of bright tissue.
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
from torch.nn.functional import conv1d, pad, silu

from fastsrgan.core.draws import rng
from fastsrgan.core.kernels import unrounded
from fastsrgan.volume.acquisition import GUESSED, TISSUE, Assumed, noise_sd, sampled, unit_above
from fastsrgan.volume.consistency import back_matrix
from fastsrgan.volume.head import air, lowest
from fastsrgan.volume.resample import apply_axes, check_profile, slice_profile_matrix, spline_matrix

SCALES = (0.7, 1.5)  # standard deviations in voxels of the Gaussians between which the in-plane scales lie
DETAIL = (0.5, 1.0, 1.8, 2.8)  # knots of the bands of r - x, over the highest frequency that the slices hold
IMAGE = (0.0, 0.4, 0.8, 1.3)  # of those of x, of which the first, with its mean, is left out
SMOOTH = 1.2  # standard deviation in voxels of the Gaussian in the plane before gradient and air are judged
AIR = (0.025, 0.1)  # of the unit: from air, where the image stays the network's, to tissue
FAINT = 1e-4  # gradient, of the unit, below which it does not count
REACH = 6  # voxels in the plane that a voxel's answer depends on, to each side
NEAR, NEAR_ACROSS = 1, 2  # voxels to each side that are seen one by one
SEEN = 3 * (2 * NEAR + 1) ** 2  # lines that are: of x - L, r - L and L
BESIDES = (len(SCALES) + 1) * (len(DETAIL) + len(IMAGE) - 1) + 2  # inputs that a voxel has besides those
SHAPES = ((48, SEEN, 2 * NEAR_ACROSS + 1), (48, BESIDES, 1), (48, 48, 1), (1, 48, 1))  # of the perceptron's weights
FARTHEST = 6.0  # standard deviations from the mean that an input may lie
STEPS, BATCH, RATE = 600, 96, 1e-2  # of Adam, lines in each, and the first rate, which falls to 0 by a cosine
BOX_COUNTS = 2.0  # how often a line counts that is cut by a box where the profile is a guess: what that loses, it loses
# below the spline, where a Gaussian only gains less
LINES = 2000  # of a trial, that are looked at
KEPT_BACK, TILE = 5, 4  # one in so many squares of a trial, of so many voxels, is kept for telling what was gained
SLAB = 1 << 21  # voxels, worked on at a time
BLOCK, SMALLEST = 128, 32  # edges in voxels of the block of a result that is tried
LEAST_RATIO = 1.5  # how much coarser the slices are than the planes: less hides too little to learn from
ACROSS = 2  # the axis across the slices
FEWEST = 4  # slices of a trial


@dataclass(frozen=True)
class Trial:
    """A scan of which the truth is known, all (X, Y, Z) float32 with Z across its slices, in the same intensities.

    truth : what it was cut from; scan : (X, Y, z), the slices; start : their interpolation; result : the network's
    image; down : D, (z, Z), what a result is made to agree with, which need not be what the slices were cut by
    counts : (X, Y, Z) or (X, Y, 1), how often each voxel counts
    """

    truth: Tensor
    scan: Tensor
    start: Tensor
    result: Tensor
    down: np.ndarray
    counts: Tensor


@dataclass(frozen=True)
class Learned:
    """A perceptron, and what it gained.

    layers : weights of ``SHAPES``, then the biases of all but the first; scaling : mean and standard deviation of each
    line of the inputs in the trials, (2, SEEN, 1) and (2, BESIDES, 1); size : what an answer of 1 stands for, over the
    unit
    gain_db, gain_db_without : over interpolation, on lines that were kept back, after agreement, with it and without
    """

    layers: tuple[Tensor, ...]
    scaling: tuple[Tensor, Tensor]
    size: float
    gain_db: float = 0.0
    gain_db_without: float = 0.0

    def answer(self, near: Tensor, rest: Tensor) -> Tensor:
        """(lines, Z) over the unit, of ``Around.lines``."""
        return _perceptron(_scaled(near, self.scaling[0]), _scaled(rest, self.scaling[1]), self.layers) * self.size


class Around:
    """What lies around the voxels of an image.

    x, r : (X, Y, Z) the interpolated scan and the network's image; ratio : spacing of slices over voxels
    down : D, (z, Z); w : weight of ``consistency.agree``
    """

    def __init__(self, x: Tensor, r: Tensor, ratio: float, down: np.ndarray, w: float, unit: float) -> None:
        n = x.shape[ACROSS]
        own = np.linalg.pinv(spline_matrix(len(down), n, 1 / ratio))  # the slices of which x is the interpolation
        back = back_matrix(down, w)
        agreed = x @ _transposed(back @ own, x) + r @ _transposed(np.eye(n) - back @ down, x)
        edges = (NEAR_ACROSS,) * 2 + (NEAR,) * 4
        seen = ((x - agreed) / unit, (r - agreed) / unit, agreed / unit)
        self.near = [pad(v[None, None], edges, mode="replicate")[0, 0] for v in seen]
        knots = ((r - x, bands(n, ratio, DETAIL)), (x, bands(n, ratio, IMAGE)[1:]))
        self.bands = [(scales(v / unit), [_transposed(m, x) for m in made]) for v, made in knots]
        smooth = _smooth(x, SMOOTH) / unit
        self.more = (smooth, _log_gradient(smooth))
        self.tissue = ((smooth - AIR[0]) / (AIR[1] - AIR[0])).clamp_(0, 1)

    def lines(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """(lines, SEEN, Z and a rim), what is seen voxel by voxel, and (lines, BESIDES, Z)."""
        steps = range(2 * NEAR + 1)
        near = torch.stack([v[i + a, j + b] for v in self.near for a in steps for b in steps], 1)
        made = [part[i, j] @ m for parts, matrices in self.bands for part in parts for m in matrices]
        return near, torch.stack([*made, *(v[i, j] for v in self.more)], 1)


def applies(scan_mm: Sequence[float], voxel_mm: Sequence[float], across: int) -> bool:
    """Whether a result is finer than its scan across the slices, and there by ``LEAST_RATIO`` more than in the plane:
    what its planes show has to be finer than what the slices hide. Both sizes by processed axes."""
    finer = [max(low / high, 1.0) for low, high in zip(scan_mm, voxel_mm, strict=True)]
    return across == ACROSS and finer[ACROSS] >= LEAST_RATIO * max(finer[0], finer[1])


def held_bytes(shape_XYZ: Sequence[int]) -> int:
    """About what the trials of a result take, and the slabs afterwards: volumes and lines of float32."""
    block = [min(BLOCK, n) for n in shape_XYZ]
    volumes = 40 * max(math.prod(block), min(SLAB, math.prod(shape_XYZ)))
    lines = 4 * min(LINES, block[0] * block[1]) * (SEEN + BESIDES) + BATCH * 1000
    return 4 * (volumes + lines * max(block))


def adapt(
    sr_XYZ: np.ndarray,
    scan_xyz: np.ndarray,
    start: Callable[[int, int], Tensor],
    network: Callable[[Tensor], Tensor],
    believed: Assumed,
    down: np.ndarray,
    weight: float,
    spacing_mm: float,
    voxel_mm: float,
    largest: Sequence[int] = (BLOCK,) * 3,
    floor: float = -math.inf,
    device: torch.device | str = "cpu",
    share: Callable[[int, int], Tensor] | None = None,
) -> dict[str, Any]:
    """Try the network on the scan itself, and adapt its image to what came out, in place; what a report says about it.

    The trials are one block of the image, cut into slices as thick as the scan's along one axis of its plane and then
    the other. Where the slice profile is a guess, one half of each is cut by a Gaussian and the other by a box, which
    counts twice; the network's images are made to agree with the guess, as that of the scan will be. Where nothing is
    gained on the lines that were kept back, the image stays. Intensities count from ``head.lowest``.

    Parameters
    ----------
    sr_XYZ : (X, Y, Z) float32, the network's image before agreement; scan_xyz : (X, Y, z), both of any strides
    start : (first, stop) -> planes of the interpolated scan along X
    network : interpolated image -> the network's, (X, Y, Z) float32 in the scan's intensities, at most ``largest``
    believed, down, weight : what the result will be made to agree with, D across its slices (z, Z), and w
    spacing_mm, voxel_mm : of the slices, and of the result across them
    floor : the least intensity there is
    device : where it is learned and applied
    share : (first, stop) -> planes along X of how much the network's detail counts, 0 outside a mask beyond which it
        saw air; None: there is no mask. ``scan_xyz`` is what it saw, ``start`` of the whole scan
    """
    ratio = float(spacing_mm / voxel_mm)
    low = lowest(scan_xyz)
    unit = unit_above(low, sampled(scan_xyz, ACROSS))
    here = _block(scan_xyz, sr_XYZ.shape, largest, low + TISSUE * unit)
    shape = tuple(part.stop - part.start for part in here)
    if min(shape) < SMALLEST or min(shape[:ACROSS]) < FEWEST * ratio or unit <= 0:
        reason = f"a block of {' x '.join(map(str, shape))} voxels is too small to be tried"
        return {"trials": 0, "reason": reason if unit > 0 else "the scan has no bright voxels"}
    truth = torch.from_numpy(np.array(sr_XYZ[here], np.float32, order="C") - low)
    nothing = air(scan_xyz) - low
    counting = share(here[0].start, here[0].stop)[:, here[1], here[2]] if share else None
    noise = noise_sd(scan_xyz, ACROSS) or 0.0
    told = (believed.profile, believed.width_mm)
    cut_by, counts = [told, told], (1.0, 1.0)
    if believed.known == GUESSED:
        cut_by, counts = [("gaussian", believed.thickness_mm), ("box", believed.thickness_mm)], (1.0, BOX_COUNTS)
    trials = []
    for axis in (0, 1):
        turned = truth.transpose(axis, ACROSS).contiguous()
        n = turned.shape[ACROSS]
        first, second, own = (
            slice_profile_matrix(n, int(n / ratio + 1e-6), ratio, width / spacing_mm, check_profile(name))
            for name, width in (*cut_by, told)
        )
        halves = turned.tensor_split(2, 1 - axis)
        order = (0, 1) if axis else (1, 0)
        profiles = [(first, second)[i] for i in order]
        scan = torch.cat(
            [_cut(half, cut, noise, floor - low, axis) for half, cut in zip(halves, profiles, strict=True)],
            1 - axis,
        )
        up = _transposed(spline_matrix(len(own), n, 1 / ratio), scan)
        x = scan @ up
        each = [torch.full((*half.shape[:ACROSS], 1), counts[i]) for half, i in zip(halves, order, strict=True)]
        counted = torch.cat(each, 1 - axis)
        if counting is None:
            made = network(x + low) - low
        else:
            part = counting.transpose(axis, ACROSS).contiguous()
            counted = counted * (part > 0)
            seen = torch.where((part > 0).float() @ _transposed(own, scan) > 0.5, scan, nothing) @ up
            made = x + part * (network(seen + low) - low - seen)
        turned, scan, x, made, counted = (v.to(device) for v in (turned, scan, x, made, counted))
        trials.append(Trial(turned, scan, x, made, own, counted))
    with unrounded(torch.device(device)):
        learned = learn(trials, ratio, weight, unit)
        said = {"trials": len(trials), "gain_db": learned.gain_db, "gain_db_without": learned.gain_db_without}
        if not learned.gain_db > learned.gain_db_without:
            return said | {"reason": "nothing was gained on the trials, the image stays the network's"}
        if not low:
            adapt_(sr_XYZ, start, learned, ratio, down, weight, unit, share)
        else:  # two more passes, of what may be files
            sr_XYZ -= low
            adapt_(sr_XYZ, lambda first, stop: start(first, stop) - low, learned, ratio, down, weight, unit, share)
            sr_XYZ += low
    return said


def learn(trials: Sequence[Trial], ratio: float, w: float, unit: float) -> Learned:
    """Train a perceptron to bring the results of all trials, made to agree with their scans, nearest to the truth.

    Adam on the squares of what is left inside tissue, a trial at a time by turns, lines and mirrorings drawn anew. The
    activation is smooth: with kinks the last bits of an input decided about a hundredth of the image.

    Parameters
    ----------
    ratio : spacing of slices over voxels; w : weight of ``consistency.agree``
    """
    parts = [_part(trial, ratio, w, unit) for trial in trials]
    teaching = [part for part in parts if part.learned]
    if not teaching:
        return Learned((), (torch.empty(0), torch.empty(0)), 0.0)
    scaling = (_scaling([part.near for part in parts]), _scaling([part.rest for part in parts]))
    for part in parts:
        part.near, part.rest = _scaled(part.near, scaling[0]), _scaled(part.rest, scaling[1])
    total, voxels = (sum(float(v.sum()) for v in made) for made in zip(*map(_TrialLines.squares, parts), strict=True))
    size = math.sqrt(total / max(voxels, 1.0))
    with torch.inference_mode(False), torch.enable_grad():
        layers = [layer.to(scaling[0].device).requires_grad_() for layer in _first_layers()]
        optimiser = torch.optim.Adam(layers, RATE)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        for step in range(STEPS):
            draws = rng(0, "adapt", "step", step)
            part = teaching[step % len(teaching)]
            loss = part.loss(draws.integers(0, part.learned, BATCH), _mirrored(*draws.integers(0, 2, 2)), layers, size)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            falling.step()
    found = tuple(layer.detach() for layer in layers)
    start, without, with_it = np.maximum(sum(part.errors(found, size) for part in parts), 1e-30)
    gain, gain_without = (round(float(10 * np.log10(start / error)), 2) for error in (with_it, without))
    return Learned(found, scaling, size, gain, gain_without)


def adapt_(
    sr_XYZ: np.ndarray,
    start: Callable[[int, int], Tensor],
    learned: Learned,
    ratio: float,
    down: np.ndarray,
    w: float,
    unit: float,
    share: Callable[[int, int], Tensor] | None = None,
) -> None:
    """The network's image ``sr_XYZ`` (X, Y, Z) float32, of any strides, becomes the adapted one, in place.

    start : (first, stop) -> planes of the interpolated scan along X; down, w : what the result will agree with
    """
    count, n = sr_XYZ.shape[0], sr_XYZ.shape[2]
    step = max(REACH, SLAB // (sr_XYZ.shape[1] * n))
    device = learned.layers[0].device
    before = np.empty((0, *sr_XYZ.shape[1:]), np.float32)  # planes in front of the slab, as the network gave them
    for first in range(0, count, step):
        stop = min(first + step, count)
        low, high = max(0, first - REACH), min(count, stop + REACH)
        x = start(low, high).to(device)
        network = torch.from_numpy(np.concatenate([before[len(before) - (first - low) :], sr_XYZ[first:high]]))
        before = np.array(sr_XYZ[max(0, stop - REACH) : stop])
        around = Around(x, network.to(device), ratio, down, w, unit)
        if share:
            around.tissue *= share(low, high).to(device) > 0
        for i in range(first - low, stop - low):  # plane by plane: the products have the same shape in every slab
            j = around.tissue[i].amax(1).nonzero().flatten()
            if len(j):
                made = learned.answer(*around.lines(torch.full_like(j, i), j)) * around.tissue[i, j] * unit
                sr_XYZ[low + i, j.cpu().numpy()] += made.cpu().numpy()


@dataclass
class _TrialLines:
    """Lines of a trial, those that are kept back last.

    near, rest : ``Around.lines`` of them
    missed, start_missed : (lines, Z) over the unit, what the truth has beyond result and interpolation
    counted : how often a voxel counts; tissue : the weight of tissue, both (lines, Z)
    free : (Z, Z), what agreement leaves of an answer; learned : how many lines are learned from
    """

    near: Tensor
    rest: Tensor
    missed: Tensor
    start_missed: Tensor
    counted: Tensor
    tissue: Tensor
    free: Tensor
    learned: int

    def squares(self) -> tuple[Tensor, Tensor]:
        """Of what is missed, and how often each counts."""
        return self.counted * self.missed**2, self.counted

    def loss(self, drawn: np.ndarray, order: list[int], layers: Sequence[Tensor], size: float) -> Tensor:
        """The share that is left of what is missed on lines."""
        which = torch.from_numpy(drawn).to(self.near.device)
        near, rest, missed, counted, tissue = (
            v[which].clone() for v in (self.near, self.rest, self.missed, self.counted, self.tissue)
        )
        left = (_perceptron(near[:, order], rest, layers) * size * tissue) @ self.free.clone() - missed
        return (counted * left**2).sum() / (counted * missed**2).sum().clamp(min=1e-12)

    def errors(self, layers: Sequence[Tensor], size: float) -> np.ndarray:
        """Sums of squares on lines that were kept back: of interpolation, of the network's image, of the adapted."""
        back = slice(self.learned, None)
        made = _perceptron(self.near[back], self.rest[back], layers) * size * self.tissue[back]
        left = (self.start_missed[back], self.missed[back], self.missed[back] - made @ self.free)
        return np.array([float((self.counted[back] * v**2).sum()) for v in left])


def _part(trial: Trial, ratio: float, w: float, unit: float) -> _TrialLines:
    around = Around(trial.start, trial.result, ratio, trial.down, w, unit)
    i, j = _lines((trial.truth > TISSUE * unit) & (trial.counts > 0)).nonzero().T
    back = (i // TILE + 2 * (j // TILE)) % KEPT_BACK == 0
    i, j = (torch.cat([v[~back], v[back]]) for v in (i, j))
    matrix = back_matrix(trial.down, w)
    free = np.eye(trial.down.shape[1]) - matrix @ trial.down
    scan, start, truth, result = (v[i, j] for v in (trial.scan, trial.start, trial.truth, trial.result))
    missed = truth - result - (scan - result @ _transposed(trial.down, result)) @ _transposed(matrix, result)
    counted = (truth > TISSUE * unit) * trial.counts[i, j]
    near, rest = around.lines(i, j)
    return _TrialLines(
        near, rest, missed / unit, (truth - start) / unit, counted, around.tissue[i, j], _transposed(free, result),
        int((~back).sum()),
    )  # fmt: skip


def _first_layers() -> list[Tensor]:
    """Drawn within one over the root of the inputs; the last is 0: the image as it is."""
    fed = [shape[1] * shape[2] for shape in SHAPES]
    fed[:2] = [fed[0] + fed[1]] * 2
    layers = []
    for name, shapes in (("weight", SHAPES), ("bias", [shape[:1] for shape in SHAPES[1:]])):
        for number, shape in enumerate(shapes):
            bound = 1 / math.sqrt(fed[number - len(shapes)]) if shape[0] > 1 else 0.0
            drawn = rng(0, "adapt", name, number).uniform(-bound, bound, shape)
            layers.append(torch.from_numpy(drawn.astype(np.float32)))
    return layers


def _perceptron(near: Tensor, rest: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """(lines, SEEN, Z and a rim), (lines, BESIDES, Z) -> (lines, Z)."""
    first, besides, second, last, *biases = layers
    hidden = silu(conv1d(near, first) + conv1d(rest, besides, biases[0]))
    return conv1d(silu(conv1d(hidden, second, biases[1])), last, biases[2])[:, 0]


def _scaling(inputs: Sequence[Tensor]) -> Tensor:
    """(2, channels, 1): mean and standard deviation of (lines, channels, Z)."""
    lines = torch.cat([v[::7].transpose(0, 1).flatten(1) for v in inputs], 1)
    return torch.stack([lines.mean(1), lines.std(1).clamp_(min=1e-4)])[:, :, None]


def _scaled(inputs: Tensor, scaling: Tensor) -> Tensor:
    return ((inputs - scaling[0]) / scaling[1]).clamp_(-FARTHEST, FARTHEST)


def _mirrored(a: int, b: int) -> list[int]:
    """The lines of ``Around.lines`` in the order in which an image mirrored along X (a) or Y (b) has them."""
    order = np.arange(SEEN).reshape(3, 2 * NEAR + 1, 2 * NEAR + 1)
    return order[:, :: -1 if a else 1, :: -1 if b else 1].flatten().tolist()


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
    scan = truth @ _transposed(profile, truth)
    added = noise * math.sqrt(max(0.0, 1 - float((profile**2).sum()) / len(profile)))
    if not added:
        return scan
    drawn = rng(0, "adapt", number).standard_normal(tuple(scan.shape), np.float32)
    return (scan + added * torch.from_numpy(drawn).to(truth.device)).clamp_(min=floor)


def _transposed(matrix: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix.T, np.float32)).to(like.device)


def _lines(inside: Tensor) -> Tensor:
    """(X, Y) bool: at most about ``LINES`` lines that hold tissue, evenly taken, none at the block's rim, where the
    Gaussians lack their other side."""
    found = inside.any(2)
    for axis, edge in enumerate(found.shape):
        rim = min(REACH, edge // 4)
        found.narrow(axis, 0, rim).fill_(False)
        found.narrow(axis, edge - rim, rim).fill_(False)
    at = found.flatten().nonzero().flatten()
    taken = torch.zeros_like(found.flatten())
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
