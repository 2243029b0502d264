"""From a high-resolution image to what a scanner with thick slices would have seen (paper eq. 1; DESIGN D1-D3).

Order of the original (SEGSRGAN.md section 1): blur and decimate, contrast power on both images, noise on the
low-resolution one, clip at 0, divide both by the low-resolution maximum, interpolate back to the high-resolution grid.
``draw`` makes the random parameters from a key, ``degrade`` applies them and is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastsrgan.errors import InputError, UsageError
from fastsrgan.intensity import add_noise, contrast_power
from fastsrgan.resample import Matrix, apply_axes, check_geometry, degrade_matrix, modulo_size, upsample_matrix
from fastsrgan.resample_sitk import check_interpolator, decimate_matrix, expand_matrix, whole_factor
from fastsrgan.runtime import rng

INTERPS = ("scipy", "sitk")


@dataclass(frozen=True)
class Degradation:
    """How images are degraded; ranges are drawn per subject and epoch.

    low_res : one triple of mm (fixed) or two (bounds, drawn uniformly per axis)
    contrast : c, the power is uniform in [1 - c, 1 + c]
    noise : standard deviation of the noise as a fraction of the low-resolution maximum
    geometry : "physical" or "segsrgan"
    interp, interpolation_type : "scipy", or "sitk" and its interpolator; see ``degrade``
    """

    low_res: tuple[tuple[float, float, float], ...]
    contrast: float = 0.5
    noise: float = 0.03
    geometry: str = "physical"
    interp: str = "scipy"
    interpolation_type: str = "Spline"

    def __post_init__(self) -> None:
        check_geometry(self.geometry)
        check_interp(self.interp, self.interpolation_type, self.geometry)
        if len(self.low_res) not in (1, 2) or any(len(t) != 3 or min(t) <= 0 for t in self.low_res):
            raise UsageError("new_low_res", f"{self.low_res}", "one or two triples of positive millimetres")
        if not 0 <= self.contrast < 1 or not 0 <= self.noise < 1:
            raise UsageError("degradation", f"contrast {self.contrast}, noise {self.noise}", "both in [0, 1)")

    def draw(self, seed: int, epoch: int, subject: str) -> Draw:
        """The parameters of one subject in one epoch; the same for any rank, device or resume point."""
        key = (epoch, subject)
        low, high = np.asarray(self.low_res[0]), np.asarray(self.low_res[-1])
        resolution = low + (high - low) * rng(seed, *key, "resolution").random(3)
        power = 1 + self.contrast * (2 * rng(seed, *key, "contrast").random() - 1)
        return Draw(tuple(float(r) for r in resolution), float(power), self.noise, (seed, *key, "noise"))  # type: ignore[arg-type]

    def linspace(self, index: int, count: int) -> Draw:
        """The deterministic parameters of test subject ``index`` of ``count``: evenly spaced, as in the original."""
        t = index / (count - 1) if count > 1 else 0.5
        low, high = np.asarray(self.low_res[0]), np.asarray(self.low_res[-1])
        resolution = low + (high - low) * t
        power = 1 + self.contrast * (2 * t - 1)
        return Draw(tuple(float(r) for r in resolution), float(power), self.noise, (0, "validation", index))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Draw:
    """One image's degradation: resolution in mm per stored axis, contrast power, noise fraction, noise key."""

    low_res: tuple[float, float, float]
    power: float = 1.0
    noise: float = 0.0
    key: tuple[int | str, ...] = (0,)


@dataclass(frozen=True)
class Degraded:
    """The images of the observation model, all float32 and divided by the maximum of the low-resolution one.

    low_res : (x, y, z) what the scanner saw, in [0, 1]
    interpolated : (X, Y, Z) its cubic-spline interpolation, the network's input
    hr : (X', Y', Z') the truth; of the shape of ``interpolated`` in "physical" geometry
    scale : the number they were divided by
    low_res_mm : the resolution that was applied
    """

    low_res: np.ndarray
    interpolated: np.ndarray
    hr: np.ndarray
    scale: float
    low_res_mm: tuple[float, float, float]


def check_interp(interp: str, interpolation_type: str, geometry: str) -> None:
    """Raise UsageError for an interpolation that does not exist in this geometry."""
    if interp not in INTERPS:
        raise UsageError("interp", f"{interp!r}", f"one of {', '.join(INTERPS)}")
    check_interpolator(interpolation_type)
    if interp == "sitk" and geometry != "segsrgan":
        raise UsageError("interp sitk", f"is unknown in {geometry} geometry", "--geometry segsrgan")


def degrade(
    hr_XYZ: np.ndarray,
    spacing_mm: tuple[float, float, float],
    low_res_mm: tuple[float, float, float],
    *,
    power: float = 1.0,
    noise: float = 0.0,
    key: int | str | tuple[int | str, ...] | None = None,
    geometry: str = "physical",
    interp: str = "scipy",
    interpolation_type: str = "Spline",
) -> Degraded:
    """Simulate the acquisition of ``hr_XYZ`` at ``low_res_mm`` (paper eq. 1, 16, 17).

    Parameters
    ----------
    hr_XYZ : (X, Y, Z) image, any real dtype
    spacing_mm, low_res_mm : voxel sizes along its axes
    power : contrast power applied to both images
    noise : standard deviation of the Gaussian noise, as a fraction of the low-resolution maximum
    key : names the noise draw, an integer, text or a tuple that starts with the seed; None is 0
    geometry : "physical", or "segsrgan" for the original's numbers (crops to a multiple of the ratio)
    interp : "scipy" (cubic spline), or "sitk" in "segsrgan" geometry: ratios rounded, every k-th voxel kept, and
        SimpleITK's Expand with the interpolator ``interpolation_type`` (``resample_sitk.INTERPOLATORS``)

    Raises
    ------
    UsageError : a low resolution finer than the image; InputError : an image without a positive voxel.
    """
    check_geometry(geometry)
    check_interp(interp, interpolation_type, geometry)
    hr = np.asarray(hr_XYZ, np.float32)
    if geometry == "segsrgan":
        hr = hr[
            tuple(slice(0, modulo_size(n, r / s)) for n, s, r in zip(hr.shape, spacing_mm, low_res_mm, strict=True))
        ]
    down = [degrade_matrix(n, s, r, geometry) for n, s, r in zip(hr.shape, spacing_mm, low_res_mm, strict=True)]
    factors = [whole_factor(r, s) for s, r in zip(spacing_mm, low_res_mm, strict=True)] if interp == "sitk" else []
    if factors:
        down = [decimate_matrix(n, float(r), k) for n, r, k in zip(hr.shape, low_res_mm, factors, strict=True)]
    lr = contrast_power(apply_axes(hr, down), power)
    hr = contrast_power(hr, power)
    if noise:
        seed, *rest = key if isinstance(key, tuple) else (0, *(() if key is None else (key,)))
        lr = add_noise(lr, noise * float(lr.max()), rng(int(seed), *rest))
    lr = np.maximum(lr, 0)
    scale = float(lr.max())
    if not scale > 0 or not np.isfinite(scale):
        raise InputError("image", f"its low-resolution maximum is {scale:g}", "at least one voxel must be above zero")
    lr = lr / np.float32(scale)
    up: list[Matrix] = []
    if factors:
        up = [expand_matrix(m, k, interpolation_type) for m, k in zip(lr.shape, factors, strict=True)]
    else:
        for n, m, s, r in zip(hr.shape, lr.shape, spacing_mm, low_res_mm, strict=True):
            ratio = s / r if geometry == "segsrgan" or n != m else 1.0
            up.append(upsample_matrix(m, n, ratio, geometry))
    return Degraded(lr, apply_axes(lr, up), hr / np.float32(scale), scale, tuple(float(r) for r in low_res_mm))  # type: ignore[arg-type]
