"""What clinical scans add to thick slices, one entry of ``ARTEFACTS`` each: a bias field, motion, Gibbs ringing.

Each is a pair: ``draw_*`` makes the parameters from a key, ``apply_*`` uses them and is deterministic. What is one
number lives with what it changes: Rician noise in ``intensity.add_noise``, the width of the slice profile in
``resample.degrade_matrix``. Decision 013 says what each models and what it leaves out. A new artefact is another entry.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastsrgan.core.draws import rng
from fastsrgan.core.threads import each_piece, run_each
from fastsrgan.errors import UsageError
from fastsrgan.volume.resample import Matrix, apply_axes, spline_coefficients

KNOTS = 4  # control points per axis of a bias field: cubic along each axis
Key = tuple[int | str, ...]


# --- bias field ---------------------------------------------------------------------------------------------------


def draw_bias(key: Key, largest: float) -> np.ndarray:
    """Control points of a log field: (4, 4, 4) uniform in [-largest, largest]."""
    return largest * rng(*key, "bias").uniform(-1, 1, (KNOTS,) * 3)


@functools.lru_cache(maxsize=64)
def bernstein_matrix(n: int) -> np.ndarray:
    """(n, 4) cubic Bernstein polynomials at the voxel centres of an axis. Weights are positive and rows sum to 1, so a
    field never leaves the range of its control points."""
    t = (np.arange(n) + 0.5) / n
    return np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)


def apply_bias(
    slab: torch.Tensor, points: np.ndarray, shape: tuple[int, ...], axis: int = 2, start: int = 0
) -> torch.Tensor:
    """Multiply part of an image by its field, exp of the tensor-product cubic with these control points.

    Parameters
    ----------
    slab : (x, y, z) contiguous float32, ``start`` and what follows along ``axis`` of an image of this ``shape``
    points : (4, 4, 4) of ``draw_bias``

    Returns
    -------
    A new tensor: the coils weigh the head before slices are formed, so truth and acquisition both carry the field and
    a network has no reason to remove it.
    """
    matrices = [bernstein_matrix(n) for n in shape]
    matrices[axis] = matrices[axis][start : start + slab.shape[axis]]
    field = apply_axes(torch.from_numpy(points).to(slab.device, torch.float32), matrices)
    each_piece(lambda weight, source: weight.exp_().mul_(source), field, slab)
    return field


# --- motion between slices ----------------------------------------------------------------------------------------


def draw_motion(key: Key, slices: int, sd: float) -> np.ndarray:
    """(slices, 3) pose of the head during each slice: two translations in mm, one rotation in degrees, all N(0, sd^2)
    and less their mean, so that the stack as a whole stays where the truth is."""
    poses = sd * rng(*key, "motion").standard_normal((slices, 3))
    return poses - poses.mean(0)


def apply_motion(
    stack: torch.Tensor, poses: np.ndarray, spacing_mm: tuple[float, float, float], axis: int = 2
) -> torch.Tensor:
    """What slices show when the head moved in their plane: voxel p of slice m takes the value at R^-1 (p - t).

    Parameters
    ----------
    stack : (x, y, z) float32, its slices across ``axis``, spacing in mm along the array's axes
    poses : (slices, 3) translations along the two in-plane axes in array order, rotation about the slice's centre from
        the first towards the second

    Returns
    -------
    A new tensor, cubic B-spline, edges reflect. Slices with a pose of zero are unchanged. Through-plane motion and
    motion while a slice is acquired are not modelled.
    """
    plane = [d for d in range(3) if d != axis]
    images = stack.movedim(axis, 0).clone(memory_format=torch.contiguous_format)
    knots = apply_axes(images, [None, *(spline_coefficients(n) for n in images.shape[1:])])

    def job(m: int) -> None:
        images[m] = _move_slice(knots[m], [spacing_mm[d] for d in plane], poses[m])

    run_each(functools.partial(job, int(m)) for m in np.flatnonzero(np.abs(poses).any(1)))
    return images.movedim(0, axis).contiguous()


def _move_slice(knots: torch.Tensor, spacing: list[float], pose: np.ndarray) -> torch.Tensor:
    """(x, y) the spline with these coefficients where the voxels of the moved slice came from."""
    angle = np.deg2rad(pose[2])
    c, s = float(np.cos(angle)), float(np.sin(angle))
    centre = [(n - 1) / 2 for n in knots.shape]
    x, y = (
        (torch.arange(n, device=knots.device, dtype=torch.float32) - mid) * step - float(t)
        for n, mid, step, t in zip(knots.shape, centre, spacing, pose[:2], strict=True)
    )
    taps_x = _taps((c * x[:, None] + s * y) / spacing[0] + centre[0], knots.shape[0])
    taps_y = _taps((c * y - s * x[:, None]) / spacing[1] + centre[1], knots.shape[1])
    # The weights of a cubic B-spline are positive, so its 4 x 4 taps are 2 x 2 linear interpolations (Sigg and
    # Hadwiger, GPU Gems 2, chapter 20).
    result = torch.zeros_like(knots)
    for weight_x, at_x in taps_x:
        for weight_y, at_y in taps_y:
            seen = torch.nn.functional.grid_sample(
                knots[None, None], torch.stack([at_y, at_x], -1)[None], padding_mode="reflection", align_corners=False
            )
            result += seen[0, 0].mul_(weight_x).mul_(weight_y)
    return result


def _taps(at: torch.Tensor, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two (weight, where) per sample: the pairs of B-spline taps to the left and right of index ``at``; ``where`` in
    torch's coordinates, -1 to 1 from edge to edge of ``n`` voxels."""
    left = at.floor()
    t = at - left
    right = t**3 / 6
    both = right + (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6
    outer = (1 - t) ** 3 / 6
    pairs = [(1 - both, left - outer / (1 - both)), (both, left + 1 + right / both)]
    return [(weight, (2 * where + 1) / n - 1) for weight, where in pairs]


# --- Gibbs ringing ------------------------------------------------------------------------------------------------


def draw_truncation(key: Key, largest: float) -> float:
    """Share of the spatial frequencies along each axis of the slices that is not acquired: uniform in [0, largest]."""
    return largest * rng(*key, "gibbs").random()


@functools.lru_cache(maxsize=64)
def truncation_matrix(n: int, share: float) -> Matrix:
    """(n, n) the periodic low pass that keeps the lowest frequencies, all but ``share`` of them; None keeps them all.

    A projection, symmetric and circulant: the Dirichlet kernel, whose lobes are the ringing beside an edge.
    """
    kept = math.floor((1 - share) * n / 2)
    if kept >= n // 2:
        return None
    at = np.arange(n)
    kernel = (1 + 2 * np.cos(2 * np.pi * np.outer(at, np.arange(1, kept + 1)) / n).sum(1)) / n
    return kernel[(at[:, None] - at) % n]


def apply_truncation(low_res: torch.Tensor, share: float, axis: int = 2) -> torch.Tensor:
    """Slices as reconstructed from a k-space that is cut off in their plane and filled with zeros, their magnitude.

    Parameters
    ----------
    low_res : (x, y, z) float32, its slices across ``axis``
    share : of ``draw_truncation``

    Returns
    -------
    A new tensor. Edges ring by 9 % of their height (the Wilbraham-Gibbs constant) at any ``share``, which sets how wide
    the lobes are. Ringing through the plane is not modelled: 2-D slices have none.
    """
    matrices = [None if d == axis else truncation_matrix(n, share) for d, n in enumerate(low_res.shape)]
    return apply_axes(low_res, matrices).abs().contiguous()


# --- the registry -------------------------------------------------------------------------------------------------

IMAGE, SLICES, SCAN = "image", "slices", "scan"


@dataclass(frozen=True)
class Artefact:
    """An entry.

    stage : what it changes, and with what ``apply`` is called behind the part and the parameters:
        ``IMAGE``, planes of the high-resolution image before all else, so that the truth carries it too:
        (shape of the whole, axis, first plane along it);
        ``SLICES``, slices once they are formed, before decimation within them; parameters have a row for each slice:
        (spacing in mm, axis across the slices);
        ``SCAN``, the whole low-resolution image before contrast and noise: (axis across the slices)
    draw : (key, amount, number of slices) -> parameters, a function of the key alone
    amount : what its amount means, for documentation
    below : amounts are from 0, which is off, up to this
    """

    stage: str
    draw: Callable[[Key, float, int], Any]
    apply: Callable[..., torch.Tensor]
    amount: str
    below: float = math.inf


ARTEFACTS: dict[str, Artefact] = {
    "bias_field": Artefact(
        IMAGE,
        lambda key, amount, slices: draw_bias(key, amount),
        apply_bias,
        "largest log amplitude of a smooth bias field",
        below=5,
    ),
    "motion": Artefact(
        SLICES,
        lambda key, amount, slices: draw_motion(key, slices, amount),
        apply_motion,
        "sd in mm and degrees of motion between slices",
    ),
    "gibbs": Artefact(
        SCAN,
        lambda key, amount, slices: draw_truncation(key, amount),
        apply_truncation,
        "largest share of the spatial frequencies in the plane that is not acquired, which makes edges ring",
        below=0.9,
    ),
}


@dataclass(frozen=True)
class Drawn:
    """An artefact with its parameters."""

    artefact: Artefact
    parameters: Any

    def __call__(self, part: torch.Tensor, *where: Any) -> torch.Tensor:
        return self.artefact.apply(part, self.parameters, *where)

    def rows(self, first: int, last: int) -> Drawn:
        """Of some slices."""
        return Drawn(self.artefact, self.parameters[first:last])


def check_amounts(amounts: Mapping[str, float]) -> None:
    """Raise UsageError for an artefact that does not exist and an amount that is not allowed."""
    for name, amount in amounts.items():
        if name not in ARTEFACTS:
            raise UsageError("artefacts", f"{name!r} is not known", f"one of {', '.join(ARTEFACTS)}")
        below = ARTEFACTS[name].below
        if not 0 <= amount <= below or amount == math.inf:
            hint = "0 or above" if below == math.inf else f"from 0 up to {below:g}"
            raise UsageError(name, f"{amount} is not allowed", hint)


def drawn(key: Key, amounts: Mapping[str, float], slices: int) -> dict[str, list[Drawn]]:
    """Stage -> the artefacts of it that are on, in the order of ``ARTEFACTS``; each is drawn under its own name, so
    none depends on which others are on. Raises as ``check_amounts``."""
    check_amounts(amounts)
    stages: dict[str, list[Drawn]] = {IMAGE: [], SLICES: [], SCAN: []}
    for name, artefact in ARTEFACTS.items():
        if amounts.get(name):
            stages[artefact.stage].append(Drawn(artefact, artefact.draw(key, amounts[name], slices)))
    return stages
