"""Intensities: the normalisation that a network sees and its inverse, contrast, noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fastsrgan.core.threads import CACHED, each_piece
from fastsrgan.errors import InputError
from fastsrgan.volume.head import TIMES
from fastsrgan.volume.noise import standard_normal

KNEE, BEND = 1.25, 0.1  # of the scale: from where on, and how soon, what is brighter is compressed
BRIGHTEST = 1e-4  # share of the voxels that may be outliers


@dataclass(frozen=True)
class Normaliser:
    """(data - shift) divided by a positive number, and back.

    Of an image with outliers the number is the maximum of all other voxels, and what exceeds k = ``KNEE`` then goes
    through k + b log(1 + (x - k) / b), b = ``BEND``, whose slope at k is 1: exactly invertible, and what a network
    makes of the rest hardly depends on how bright the outliers are. Between 1 and ``TIMES`` the scan has no voxel.

    scale : the number, the maximum of the low-resolution image (paper section 3.2) after the shift
    floor : smallest value that a result may take after the way back, the minimum of that image
    shift : the minimum of an image with values below 0 for a network that was trained so (``lifted``); else 0
    top : largest value divided by the scale, which a result may not exceed, of an image with outliers; else 0
    """

    scale: float
    floor: float
    shift: float = 0.0
    top: float = 0.0

    def apply(self, data: np.ndarray) -> np.ndarray:
        """(data - shift) / scale, float32, compressed where there are outliers."""
        if self.shift:
            data = data - np.float32(self.shift)
        divided = (data / self.scale).astype(np.float32)
        if self.top:
            above = divided > KNEE
            divided[above] = KNEE + BEND * np.log1p((divided[above] - KNEE) / BEND)
        return divided

    def invert(self, data: np.ndarray) -> np.ndarray:
        """data * scale + shift, clamped from below at the input's minimum: (X, Y, Z) float32."""
        if self.top:
            data = np.minimum(data, np.float32(KNEE + BEND * math.log1p((self.top - KNEE) / BEND)))
            above = data > KNEE
            data[above] = KNEE + BEND * np.expm1((data[above] - KNEE) / BEND)
        back = data * np.float32(self.scale)
        return np.maximum(back + np.float32(self.shift) if self.shift else back, np.float32(self.floor))

    def invert_(self, sr: torch.Tensor) -> None:
        """The same in place, of a tensor."""
        if self.top:
            for plane in sr:
                plane.copy_(torch.from_numpy(self.invert(plane.numpy())))
            return
        sr.mul_(self.scale)
        if self.shift:
            sr.add_(self.shift)
        sr.clamp_(min=self.floor)


def normaliser(data_XYZ: np.ndarray, shifted: bool = False, robust: bool = False) -> Normaliser:
    """The normaliser of a low-resolution image; ``shifted`` as the network's spec has it; ``robust`` against outliers.

    Raises InputError when no voxel is above zero (with ``shifted``: above the others).
    """
    largest, floor = float(np.max(data_XYZ)), float(np.min(data_XYZ))
    shift = min(0.0, floor) if shifted else 0.0
    scale = largest - shift
    if not scale > 0 or not np.isfinite(scale):
        hint = "at least one voxel must be above zero"
        if not shifted and floor < largest:
            hint += "; its network knows no values below: subtract the image's minimum first"
        raise InputError("image", f"its largest value is {largest:g}", hint)
    found = outliers(data_XYZ) if robust else None
    if found and found.rest > shift:
        return Normaliser(found.rest - shift, floor, shift, scale / (found.rest - shift))
    return Normaliser(scale, floor, shift)


@dataclass(frozen=True)
class Outliers:
    """``count`` voxels are up to ``times`` as bright as all others, of which the brightest is ``rest``."""

    count: int
    times: float
    rest: float


def outliers(data_XYZ: np.ndarray) -> Outliers | None:
    """Whether the brightest 0.01 % of the voxels exceed five times the rest, intensities counted from 0 or, where some
    are negative, from the lowest one."""
    zero, top = min(0.0, float(data_XYZ.min())), float(data_XYZ.max())
    limit = zero + (top - zero) / TIMES
    bright, rest = 0, zero
    for plane in data_XYZ:
        above = plane > limit
        bright += int(np.count_nonzero(above))
        rest = max(rest, float(np.max(plane, where=~above, initial=zero)))
    if not 0 < bright <= max(1, math.floor(BRIGHTEST * data_XYZ.size)) or rest <= zero:
        return None
    return Outliers(bright, (top - zero) / (rest - zero), rest)


def lifted(data_XYZ: np.ndarray) -> np.ndarray:
    """An image without values below 0: itself, or where it has some (z-scores, Hounsfield units) moved up by its
    minimum. What `Normaliser` does in inference, training does by this before anything else."""
    low = float(np.min(data_XYZ))
    return data_XYZ if low >= 0 else data_XYZ - np.float32(low)


def largest(data: torch.Tensor) -> float:
    """The maximum of a contiguous tensor, NaN if it holds one."""
    found: list[torch.Tensor] = []
    each_piece(lambda part: found.append(part.max()), data)
    return float(torch.stack(found).max())


def contrast_power(
    data: torch.Tensor, power: float, unit: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """max(data / unit, 0) ** power, float32: the paper's contrast augmentation. At power 1 it is data / unit.

    ``out`` takes the result and may be ``data``; both are contiguous. The power is exp(power log x), many times as fast
    as NumPy's and within 2e-7 of it where data / unit is at most 1.
    """
    out = torch.empty_like(data) if out is None else out

    # Zeros go through the logarithm as a small number: infinities and results below float32's normal range take ten
    # times as long. They come out as 2^-100 or, below power 1, more, and are set back to zero.
    lowest = 2.0 ** (-100 / max(power, 1.0))

    def piece(source: torch.Tensor, result: torch.Tensor) -> None:
        torch.div(source, unit, out=result)
        if power != 1:
            result.clamp_(min=lowest).log_().mul_(power).exp_()
            torch.nn.functional.threshold_(result, 1.07 * lowest**power, 0.0)  # type: ignore[attr-defined]

    each_piece(piece, data, out)
    return out


def add_noise(
    data: torch.Tensor, std: float, rng: np.random.Generator, imaginary: np.random.Generator | None = None
) -> torch.Tensor:
    """Add N(0, std^2) in place, float32, one draw per voxel in C order: keyed by ``rng`` alone, on any device.

    With a second generator for the ``imaginary`` channel the result is Rician, as in the magnitude images that
    scanners store: sqrt((data + n1)^2 + n2^2) (Gudbjartsson and Patz, MRM 1995).
    """
    if std == 0:
        return data
    flat = data.view(-1)
    on_cpu = data.device.type == "cpu"
    # On a CPU in pieces that stay in the cache, in order: the draws are one stream. Elsewhere by one kernel.
    step, draw = (CACHED, standard_normal.body) if on_cpu else (len(flat), standard_normal)
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        part += draw(torch.empty_like(part), rng).mul_(std)
        if imaginary is not None:
            torch.hypot(part, draw(torch.empty_like(part), imaginary).mul_(std), out=part)
    return data
