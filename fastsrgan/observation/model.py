"""From a high-resolution image to what a scanner with thick slices would have seen (paper eq. 1; decision 001).

Order of the original: blur and decimate, contrast power on both images, noise on the
low-resolution one, clip at 0, divide both by the low-resolution maximum, interpolate back to the high-resolution grid.
The extras keep it: each of ``ARTEFACTS`` has its stage, the profile's width is part of the blur, Rician noise takes the
place of Gaussian.
``draw`` makes the random parameters from a key, ``apply`` uses them and is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastsrgan.config import CHOICES, check_resolutions
from fastsrgan.core.draws import rng
from fastsrgan.core.threads import each_piece
from fastsrgan.errors import InputError, UsageError, shown
from fastsrgan.observation.artefacts import IMAGE, SCAN, SLICES, check_amounts, drawn
from fastsrgan.observation.slabs import Region, SharpImage, acquire, interpolate, plan, truth
from fastsrgan.volume.consistency import Observation
from fastsrgan.volume.intensity import add_noise, contrast_power, largest
from fastsrgan.volume.resample import (
    Matrix,
    Profile,
    check_geometry,
    check_profile,
    degrade_matrix,
    modulo_size,
    slice_axis,
    slice_width,
    upsample_matrix,
)
from fastsrgan.volume.resample_sitk import check_interpolator, decimate_matrix, expand_matrix, whole_factor


@dataclass(frozen=True)
class Degradation:
    """How images are degraded; ranges are drawn per subject and epoch.

    low_res : one triple of mm (fixed) or two (bounds, drawn uniformly per axis)
    contrast : c, the power is uniform in [1 - c, 1 + c]
    noise : standard deviation of the noise as a fraction of the low-resolution maximum
    noise_from : drawn uniformly from this to ``noise`` per subject and epoch; None: ``noise`` for all
    geometry : "physical" or "segsrgan"
    interp, interpolation_type : "scipy", or "sitk" and its interpolator; see ``degrade``
    artefacts : name in ``ARTEFACTS`` -> amount, 0 off
    rician : Rician instead of Gaussian noise
    profile : p, the slice profile's width over the voxel size is uniform in [1 - p, 1 + p]
    gap : g, slice thickness over the spacing of slices is uniform in [1 - g, 1], across the slices alone
    profile_box : b, the share of the box in the slice profile is uniform in [0, b], the rest is the Gaussian
    block_bytes : working memory above which a volume is degraded in slabs; None: whole
    """

    low_res: tuple[tuple[float, float, float], ...]
    contrast: float = 0.5
    noise: float = 0.03
    geometry: str = "physical"
    interp: str = "scipy"
    interpolation_type: str = "Spline"
    rician: bool = False
    profile: float = 0.0
    block_bytes: int | None = None
    gap: float = 0.0
    profile_box: float = 0.0
    artefacts: Mapping[str, float] = field(default_factory=dict)
    noise_from: float | None = None

    def __post_init__(self) -> None:
        check_geometry(self.geometry)
        check_interp(self.interp, self.interpolation_type, self.geometry)
        if hint := check_resolutions(self.low_res):
            raise UsageError("new_low_res", f"{shown(self.low_res)} is not allowed", hint)
        if not 0 <= self.contrast < 1 or not 0 <= (self.noise_from or 0) <= self.noise < 1:
            raise UsageError("degradation", f"contrast {self.contrast}, noise {self.noise}", "both in [0, 1)")
        for name in ("profile", "gap"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(name, f"{getattr(self, name)} is not allowed", "in [0, 1)")
        check_amounts(self.artefacts)
        check_profile(self.profile_box, self.geometry)
        if self.block_bytes is not None and not self.block_bytes > 0:
            raise UsageError("block_bytes", f"{self.block_bytes} is not allowed", "a number above zero, or None")

    def draw(self, seed: int, epoch: int, subject: str) -> Draw:
        """The parameters of one subject in one epoch; the same for any rank, device or resume point."""
        low, high = np.asarray(self.low_res[0]), np.asarray(self.low_res[-1])
        resolution = low + (high - low) * rng(seed, epoch, subject, "resolution").random(3)
        power = 1 + self.contrast * (2 * rng(seed, epoch, subject, "contrast").random() - 1)
        drawn = self._drawn(resolution, power, (seed, epoch, subject, "noise"))
        if self.noise_from is None:
            return drawn
        part = rng(seed, epoch, subject, "noise level").random()
        return replace(drawn, noise=self.noise_from + (self.noise - self.noise_from) * part)

    def apply(
        self,
        image_XYZ: np.ndarray,
        spacing_mm: tuple[float, float, float],
        draw: Draw,
        low_res_mm: tuple[float, float, float] | None = None,
        region: Region | None = None,
    ) -> Degraded:
        """Degrade one image as drawn: a pure function of its arguments.

        ``low_res_mm`` is ``draw.low_res`` in the axis order of ``image_XYZ``, where that is not the stored one;
        ``region`` as for ``degrade``.
        """
        given: dict[str, Any] = {name: getattr(draw, name) for name in ("power", "noise", "key", "rician", "width")}
        given |= {name: getattr(self, name) for name in ("geometry", "interp", "interpolation_type", "block_bytes")}
        given |= {"thickness_mm": (1 - draw.gap) * max(draw.low_res), "profile": draw.box, "region": region}
        given |= draw.artefacts
        low_res_mm = draw.low_res if low_res_mm is None else low_res_mm
        return degrade(image_XYZ, spacing_mm, low_res_mm, **given)

    def seen(
        self,
        shape: tuple[int, ...],
        spacing_mm: tuple[float, float, float],
        draw: Draw,
        low_res_mm: tuple[float, float, float],
    ) -> Observation | None:
        """How the scan of ``apply`` sees the image, artefacts aside; None in "segsrgan" geometry."""
        if self.geometry != "physical":
            return None
        across = slice_axis(low_res_mm)
        thickness = slice_width((1 - draw.gap) * max(draw.low_res), low_res_mm[across])
        widths = [draw.width * (thickness if axis == across else 1.0) for axis in range(3)]
        down = _down(shape, spacing_mm, low_res_mm, self.geometry, [], widths, check_profile(draw.box, self.geometry))
        return Observation(tuple(down))  # type: ignore[arg-type]

    def linspace(self, index: int, count: int) -> Draw:
        """The deterministic parameters of test subject ``index`` of ``count``: evenly spaced, as in the original."""
        t = index / (count - 1) if count > 1 else 0.5
        low, high = np.asarray(self.low_res[0]), np.asarray(self.low_res[-1])
        return self._drawn(low + (high - low) * t, 1 + self.contrast * (2 * t - 1), (0, "validation", index))

    def _drawn(self, resolution: np.ndarray, power: float, key: tuple[int | str, ...]) -> Draw:
        """The draw with its extras. Each is drawn under its own name, so none depends on which others are on."""
        width = 1 + self.profile * (2 * rng(*key, "profile").random() - 1)
        gap = self.gap * rng(*key, "gap").random()
        box = self.profile_box * rng(*key, "profile shape").random()
        low_res = tuple(float(r) for r in resolution)
        extras = (self.rician, width, gap, box, self.artefacts)
        return Draw(low_res, float(power), self.noise, key, *extras)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Draw:
    """One image's degradation: resolution in mm per stored axis, contrast power, noise fraction, and the extras.

    ``width`` is the slice profile's width over the voxel size, ``gap`` the part of the spacing of slices that their
    thickness leaves out, ``box`` the share of the box in the profile. What has one value per voxel, slice or
    control point (noise, artefacts) is named by ``key`` and made where it is used.
    """

    low_res: tuple[float, float, float]
    power: float = 1.0
    noise: float = 0.0
    key: tuple[int | str, ...] = (0,)
    rician: bool = False
    width: float = 1.0
    gap: float = 0.0
    box: float = 0.0
    artefacts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Degraded:
    """The images of the observation model, all float32 and divided by the maximum of the low-resolution one.

    Arrays, or tensors on the device of the tensor that was degraded.

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
    if interp not in CHOICES["interp"]:
        raise UsageError("interp", f"{interp!r} is not allowed", f"one of {', '.join(CHOICES['interp'])}")
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
    rician: bool = False,
    width: float = 1.0,
    thickness_mm: float | None = None,
    profile: Profile = "gaussian",
    block_bytes: int | None = None,
    region: Region | None = None,
    **artefacts: float,
) -> Degraded:
    """Simulate the acquisition of ``hr_XYZ`` at ``low_res_mm`` (paper eq. 1, 16, 17).

    Parameters
    ----------
    hr_XYZ : (X, Y, Z) image, any real dtype; a tensor is degraded on its device and tensors come back
    spacing_mm, low_res_mm : voxel sizes along its axes
    power : contrast power applied to both images
    noise : standard deviation of the noise, as a fraction of the low-resolution maximum
    key : names the random draws, an integer, text or a tuple that starts with the seed; None is 0
    geometry : "physical", or "segsrgan" for the original's numbers (crops to a multiple of the ratio)
    interp : "scipy" (cubic spline), or "sitk" in "segsrgan" geometry: ratios rounded, every k-th voxel kept, and
        SimpleITK's Expand with the interpolator ``interpolation_type`` (``resample_sitk.INTERPOLATORS``)
    rician : the noise of magnitude images instead of Gaussian noise
    width : full width at half maximum of the slice profile over the low-resolution voxel size, on every axis
    thickness_mm : of the slices, where it is not their spacing (gaps, or slices that overlap): the profile's width
        across the slices, the axis of the largest ``low_res_mm``, before it is multiplied by ``width``
    profile : "gaussian", "box", or the share of the box in a blend of both
    block_bytes : working memory, besides the image and the results, above which slabs are used; None: one slab
    region : slices of the high-resolution grid: ``interpolated`` and ``hr`` are made there alone. The low-resolution
        image is always whole, and the results are those of the whole volume to float32's rounding.
    artefacts : amounts of ``artefacts.ARTEFACTS`` by name, for example ``bias_field=0.3``

    Raises
    ------
    UsageError : an unknown artefact or amount, a low resolution finer than the image, a power or a thickness that is
    not positive, an unknown profile, or a box in "segsrgan" geometry, which knows the Gaussian alone;
    InputError : an image without a positive voxel; ResourceError : ``block_bytes`` below one slice.
    """
    if len(shape := np.shape(hr_XYZ)) != 3 or not len(spacing_mm) == len(low_res_mm) == 3:
        reason = f"an image of {len(shape)} axes, voxel sizes of {len(spacing_mm)} and {len(low_res_mm)}"
        raise UsageError("degrade", reason, "a volume, and two voxel sizes of three numbers")
    check_geometry(geometry)
    check_interp(interp, interpolation_type, geometry)
    box = check_profile(profile, geometry)
    # Slices lie across the thickest axis, the last of equals: where images are turned to.
    axis = slice_axis(low_res_mm)
    widths = [width * (slice_width(thickness_mm, low_res_mm[axis]) if d == axis else 1.0) for d in range(3)]
    if not power > 0:
        raise UsageError("contrast power", f"{power:g} is not allowed", "a number above zero")
    if not (noise >= 0 and math.isfinite(noise)):
        raise UsageError("noise", f"{noise:g} is not allowed", "a share of the maximum, 0 or above")
    seed, *rest = key if isinstance(key, tuple) else (0, *(() if key is None else (key,)))
    name: tuple[int | str, ...] = (int(seed), *rest)
    hr = hr_XYZ if isinstance(hr_XYZ, torch.Tensor) else np.asarray(hr_XYZ)
    if geometry == "segsrgan":
        sizes = zip(hr.shape, spacing_mm, low_res_mm, strict=True)
        hr = hr[tuple(slice(0, modulo_size(n, r / s)) for n, s, r in sizes)]
    factors = [whole_factor(r, s) for s, r in zip(spacing_mm, low_res_mm, strict=True)] if interp == "sitk" else []
    down = _down(hr.shape, spacing_mm, low_res_mm, geometry, factors, widths, box)
    matrix = down[axis]
    stages = drawn(name, artefacts, hr.shape[axis] if matrix is None else len(matrix))
    source = SharpImage(hr, axis, stages[IMAGE])
    slabs = plan(source, down, bool(stages[SLICES]), block_bytes)
    if slabs.planes == hr.shape[axis]:  # one slab: converted, and given its fields, once for both passes
        source = SharpImage(source.slab(0, hr.shape[axis]), axis)
    lr = acquire(source, down, slabs, stages[SLICES], spacing_mm)
    for artefact in stages[SCAN]:
        lr = artefact(lr, axis)
    imaginary = rng(int(seed), *rest, "imaginary") if rician else None
    unit, scale = _receive(lr, power, noise, rng(int(seed), *rest), imaginary)
    up = _up(tuple(lr.shape), hr.shape, spacing_mm, low_res_mm, geometry, factors, interpolation_type)
    parts = [lr, interpolate(lr, up, axis, slabs, region), truth(source, power, unit, slabs, region)]
    low, z, x = parts if isinstance(hr_XYZ, torch.Tensor) else [p.numpy() for p in parts]
    return Degraded(low, z, x, scale, tuple(float(r) for r in low_res_mm))  # type: ignore[arg-type]


def _receive(
    lr: torch.Tensor, power: float, noise: float, real: np.random.Generator, imaginary: np.random.Generator | None
) -> tuple[float, float]:
    """Contrast, noise, clip and division by the maximum, in place on the low-resolution image.

    Returns the number u that makes the truth of the same scale, (image / u) ** power, and the scale itself.
    """
    peak = largest(lr)
    _check_maximum(peak)
    # The power of intensities up to 1 keeps its precision, and (peak / peak) ** power is 1 to the bit.
    top = peak if power == 1 else 1.0
    if power != 1:
        contrast_power(lr, power, peak, out=lr)
    add_noise(lr, noise * top, real, imaginary)
    each_piece(lambda part: part.clamp_(min=0), lr)
    scale = largest(lr)
    _check_maximum(scale)
    each_piece(lambda part: part.div_(scale), lr)
    return (scale, scale) if power == 1 else (peak * scale ** (1 / power), peak**power * scale)


def _check_maximum(value: float) -> None:
    if not value > 0 or not np.isfinite(value):
        raise InputError("image", f"its low-resolution maximum is {value:g}", "at least one voxel must be above zero")


def _down(
    shape: tuple[int, ...],
    spacing_mm: tuple[float, float, float],
    low_res_mm: tuple[float, float, float],
    geometry: str,
    factors: list[int],
    widths: list[float],
    box: float,
) -> list[Matrix]:
    """Slice profile and decimation of each axis."""
    if factors:
        blurs = zip(shape, low_res_mm, factors, widths, strict=True)
        return [decimate_matrix(n, float(r * width), k) for n, r, k, width in blurs]
    sizes = zip(shape, spacing_mm, low_res_mm, widths, strict=True)
    return [degrade_matrix(n, s, r, geometry, width, box) for n, s, r, width in sizes]


def _up(
    low: tuple[int, ...],
    high: tuple[int, ...],
    spacing_mm: tuple[float, float, float],
    low_res_mm: tuple[float, float, float],
    geometry: str,
    factors: list[int],
    interpolation_type: str,
) -> list[Matrix]:
    """Interpolation of each axis back to the high-resolution grid."""
    if factors:
        return [expand_matrix(m, k, interpolation_type) for m, k in zip(low, factors, strict=True)]
    axes = zip(low, high, spacing_mm, low_res_mm, strict=True)
    turned = ((m, n, s / r if geometry == "segsrgan" or n != m else 1.0) for m, n, s, r in axes)
    return [upsample_matrix(m, n, ratio, geometry) for m, n, ratio in turned]
