"""Intensities: the normalisation that a network sees and its inverse, contrast, noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsrgan.errors import InputError


@dataclass(frozen=True)
class Normaliser:
    """Division by a positive number, and back.

    scale : the number, the maximum of the low-resolution image (SEGSRGAN.md sections 1 and 5)
    floor : smallest value that a result may take after the way back, the minimum of that image
    """

    scale: float
    floor: float

    def apply(self, data):
        """data / scale, float32."""
        return (data / self.scale).astype(np.float32) if isinstance(data, np.ndarray) else data / self.scale

    def invert(self, data: np.ndarray) -> np.ndarray:
        """data * scale, clamped from below at the input's minimum: (X, Y, Z) float32."""
        return np.maximum(data * np.float32(self.scale), np.float32(self.floor))


def normaliser(data_XYZ: np.ndarray, what: object = "image") -> Normaliser:
    """The normaliser of a low-resolution image. Raises InputError when no voxel is above zero."""
    scale, floor = float(np.max(data_XYZ)), float(np.min(data_XYZ))
    if not scale > 0 or not np.isfinite(scale):
        raise InputError(what, f"its largest value is {scale:g}", "at least one voxel must be above zero")
    return Normaliser(scale, floor)


def contrast_power(data: np.ndarray, power: float) -> np.ndarray:
    """max(data, 0) ** power, float32: the paper's contrast augmentation. The identity at power 1."""
    if power == 1.0:
        return data
    return np.power(np.maximum(data, 0), np.float32(power), dtype=np.float32)


def add_noise(data: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    """data + N(0, std^2), float32, one draw per voxel in C order: keyed by ``rng`` alone."""
    if std == 0:
        return data
    noise = rng.standard_normal(data.shape, dtype=np.float32)
    noise *= np.float32(std)
    noise += data
    return noise
