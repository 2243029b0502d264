"""What a scan tells about its own acquisition: its noise, how much a result has to yield to it, its slice profile.

Nothing here knows more than the scan: the noise is that of its finest detail within the slices, what a result may lack
is judged by how far the spline through the scan, acquired again, is from the scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastsrgan.volume.consistency import Observation
from fastsrgan.volume.head import lowest
from fastsrgan.volume.resample import apply_axes, check_profile, slice_width

TISSUE = 0.1  # of the 99.9th percentile: what is brighter is no air
SAMPLED = 32  # slices or planes, evenly spaced, that are looked at
WINDOW = 5  # voxels in the plane, of the local energy
CALM = 0.2  # quantile of the local energies that is taken for noise alone
CALM_OF_NOISE = 0.770  # that quantile where there is noise alone, over the noise: simulated, see test_acquisition.py
FEWEST = 50  # squares inside tissue, below which nothing is said about the noise

PROFILE_KNOWN = 0.003  # smallest weight with a profile that was named
PROFILE_GUESSED = 0.03  # and with one that is guessed
NOISE_UNKNOWN = 0.1  # the weight where the noise cannot be told
LARGEST = 10.0  # weights above this change nothing
# What a result lacks at ratio 1, in parts of the scan's maximum, grows with the ratio: with 3 % noise w was 4 to 6 at
# ratio 3 and 1 to 2 at ratio 6 (decision 023).
MISSING_OF_A_RESULT = 0.0045
# Where no profile was named: the ratios of thickness to the result's voxels between which the Gaussian that is taken
# widens, and its width over the thickness there, see ``guessed_width``.
GUESS_RATIOS, GUESS_WIDTHS = (3.0, 6.0), (0.8, 0.9)

AUTO, GUESS = "auto", "guess"
NAMED, SHOWN, GUESSED = "named", "shown by the scan", "guessed"  # where a profile comes from
AS_THICK = 0.1  # of the thickness that is told: how near to it the width has to be that a scan shows


@dataclass(frozen=True)
class Shown:
    """A slice profile that a scan shows: "gaussian" or "box"; its full width at half maximum over the spacing."""

    profile: str
    width: float


def noise_sd(scan_xyz: np.ndarray, across: int, left_xyz: np.ndarray | None = None) -> float | None:
    """Standard deviation of a scan's noise, in its own intensities; None where too little tissue is seen.

    The diagonal second difference within the slices, [1 -2 1] along one axis and along the other, takes away all that
    is smooth. Its energy is averaged over squares of 5 x 5 voxels inside tissue; a fifth of them, the calmest,
    are taken to hold noise alone. Tissue, not air: magnitude images, filtered and masked air have other noise there.
    Noise that is smooth, as after interpolation within the slices, is underestimated.

    Parameters
    ----------
    scan_xyz : (x, y, z) of any real dtype
    across : axis across the slices
    left_xyz : (x, y, z), measured in place of the scan, within the scan's tissue
    """
    slices = sampled(scan_xyz, across)
    tissue = tissue_level(scan_xyz, slices)
    measured = slices if left_xyz is None else sampled(left_xyz, across)
    energies = []
    for plane, noisy in zip(slices, measured, strict=True):
        if min(plane.shape) < WINDOW + 2:
            return None
        detail = _second_difference(_second_difference(noisy).T).T / 6
        darkest = _windows(plane[1:-1, 1:-1]).min((1, 3))
        energies.append((_windows(detail) ** 2).mean((1, 3))[darkest > tissue])
    calm = np.concatenate(energies)
    if calm.size < FEWEST:
        return None
    return math.sqrt(max(0.0, float(np.quantile(calm, CALM)))) / CALM_OF_NOISE


def missing_sd(scan_xyz: np.ndarray, seen: Observation, noise: float) -> float:
    """Standard deviation per voxel of what the spline through the scan lacks, in the scan's intensities.

    What the spline, acquired again, lacks against the scan has the variance m + g: m that of the missing detail times
    the mean eigenvalue of D D', g that of the noise times the share that 1 - D U lets through. Inside tissue.

    ``seen`` is best with the Gaussian as wide as the slices are thick, whatever profile a result is made to agree with:
    it comes nearest to the spline's true error, and a narrower one would find that less is missing.
    """
    again = [None if d is None or u is None else d @ u for d, u in zip(seen.down, seen.up, strict=True)]
    eigenvalue = through = kept = 1.0
    for down, matrix in zip(seen.down, again, strict=True):
        if matrix is not None and down is not None:
            eigenvalue *= float((down**2).sum()) / len(down)
            through *= float(np.trace(matrix)) / len(matrix)
            kept *= float((matrix**2).sum()) / len(matrix)
    axis = min(seen.free, default=0)
    planes = sampled(scan_xyz, axis) if seen.free else list(scan_xyz.astype(np.float32, copy=False))
    part = np.ascontiguousarray(np.stack(planes, axis))
    left = part - apply_axes(part, again)
    inside = part > tissue_level(scan_xyz, [part])
    energy = float(np.mean(left[inside] ** 2, dtype=np.float64)) if inside.any() else 0.0
    return math.sqrt(max(0.0, energy - (1 - 2 * through + kept) * noise**2) / eigenvalue)


def lacking_sd(left_xyz: np.ndarray, scan_xyz: np.ndarray, seen: Observation, across: int) -> float:
    """Standard deviation per voxel of what a result lacks, in the scan's intensities: as ``missing_sd``, of any result.

    The variance of ``left``, scan - D SR, inside tissue, less that of the noise that is in it, over the mean eigenvalue
    of D D'. How much of the scan's noise a result has kept is not known, so the noise is that of the finest detail of
    ``left`` itself. 0 where noise explains all that is left.
    """
    level = tissue_level(scan_xyz, sampled(scan_xyz, across))
    total, voxels = 0.0, 0
    for left, plane in zip(np.moveaxis(left_xyz, across, 0), np.moveaxis(scan_xyz, across, 0), strict=True):
        inside = np.ascontiguousarray(plane) > level
        total += float(np.sum(np.ascontiguousarray(left)[inside] ** 2, dtype=np.float64))
        voxels += int(np.count_nonzero(inside))
    noise = noise_sd(scan_xyz, across, left_xyz) or 0.0
    eigenvalue = math.prod(float((d**2).sum()) / len(d) for d in seen.down if d is not None)
    return math.sqrt(max(0.0, total / max(voxels, 1) - noise**2) / eigenvalue)


@dataclass(frozen=True)
class Assumed:
    """What a result is made to agree with.

    profile : shape of the slice profile; width_mm : its full width at half maximum; floor : smallest weight
    thickness_mm : of the slices
    known : where the profile comes from: NAMED, SHOWN or GUESSED
    """

    profile: str
    width_mm: float
    thickness_mm: float
    floor: float
    known: str

    def __str__(self) -> str:
        return f"{self.profile} profile of {self.width_mm:.3g} mm, {self.known}"

    def record(self) -> dict[str, Any]:
        widths = {key: float(f"{getattr(self, key):.6g}") for key in ("width_mm", "thickness_mm")}
        return {"profile": self.profile, "profile_known": self.known, **widths}


def guessed_width(ratio: float) -> float:
    """Full width at half maximum of the Gaussian that is taken where nothing is known, over the slices' thickness.

    A profile wider than the scan's makes results worse than they were, a narrower one only leaves some of the gain, and
    of a box the Gaussian of its own width is wider. The thicker the slices, the less a wrong one costs: 0.8 up to a
    ratio of 3, 0.9 from 6 on (measured: decision 023).

    ratio : thickness of the slices over the result's voxels across them
    """
    return float(np.interp(ratio, GUESS_RATIOS, GUESS_WIDTHS))


def assumed(
    profile: str, thickness_mm: float | None, spacing_mm: float, voxel_mm: float, shown: Shown | None = None
) -> Assumed:
    """The slice profile to work with.

    thickness_mm : of the slices, None is their spacing, without gaps; voxel_mm : of the result across the slices
    shown : the profile that the scan shows, if it shows one (``volume.profile``)

    For "auto" it is what the scan shows, unless a thickness is told that is another. Where nothing is known, and for
    "guess", it is a Gaussian of ``guessed_width``, and the weight is larger.
    """
    thickness = slice_width(thickness_mm, spacing_mm) * spacing_mm
    if profile not in (AUTO, GUESS):
        check_profile(profile)
        return Assumed(profile, thickness, thickness, PROFILE_KNOWN, NAMED)
    if profile == AUTO and shown is not None:
        width = shown.width * spacing_mm
        if thickness_mm is None or abs(width - thickness) <= AS_THICK * thickness:
            return Assumed(shown.profile, width, thickness, PROFILE_KNOWN, SHOWN)
    return Assumed("gaussian", guessed_width(thickness / voxel_mm) * thickness, thickness, PROFILE_GUESSED, GUESSED)


@dataclass(frozen=True)
class Weight:
    """How much a result yields to the scan: w of ``consistency.agree``, and where it comes from.

    noise : standard deviation of the scan's noise, None where it cannot be told
    missing : standard deviation of what the spline lacks; both in the scan's intensities
    """

    w: float
    noise: float | None
    missing: float | None


def choose_weight(scan_xyz: np.ndarray, seen: Observation, across: int, floor: float = PROFILE_KNOWN) -> Weight:
    """w = (noise / what is missing)^2, at least ``floor``: the best linear estimate, were what is missing white.

    ``seen`` as for ``missing_sd``, ``across`` as for ``noise_sd``. Where the noise cannot be told it is 0.1, or
    ``floor`` if that is larger.
    """
    noise = noise_sd(scan_xyz, across)
    if noise is None:
        return Weight(max(floor, NOISE_UNKNOWN), None, None)
    missing = missing_sd(scan_xyz, seen, noise)
    w = LARGEST if noise**2 >= LARGEST * missing**2 else (noise / missing) ** 2
    return Weight(max(floor, w) if noise else floor, noise, missing)


def expected_weight(noise: float, ratio: float) -> float:
    """About the w that is chosen for a result on a scan whose noise is known, in parts of its maximum, with a profile
    that is guessed; ``ratio``: spacing of the slices over the result's voxels. To three digits."""
    return rounded(max(PROFILE_GUESSED, (noise / (MISSING_OF_A_RESULT * ratio)) ** 2))


def rounded(value: float) -> float:
    """To three digits: sums over voxels have other last bits with another layout of the array."""
    return float(f"{value:.3g}")


def sampled(array: np.ndarray, axis: int) -> list[np.ndarray]:
    """At most ``SAMPLED`` planes across an axis, evenly spaced, contiguous float32."""
    n = array.shape[axis]
    places = np.unique(np.linspace(0, n - 1, min(n, SAMPLED)).round().astype(int))
    return [np.ascontiguousarray(array[(*(slice(None),) * axis, index)], np.float32) for index in places]


def unit_above(low: float, parts: Sequence[np.ndarray]) -> float:
    """How far the 99.9th percentile of some planes is above where their scan's intensities count from
    (``head.lowest``)."""
    return float(np.percentile(np.concatenate([part[::2, ::2].ravel() for part in parts]), 99.9)) - low


def tissue_level(scan_xyz: np.ndarray, parts: Sequence[np.ndarray]) -> float:
    """What is brighter than air in a scan, of which ``parts`` are some planes: ``TISSUE`` of the unit above where its
    intensities count from."""
    low = lowest(scan_xyz)
    return low + TISSUE * unit_above(low, parts)


def _windows(plane: np.ndarray) -> np.ndarray:
    """(a, WINDOW, b, WINDOW): a plane cut into squares."""
    a, b = (n // WINDOW for n in plane.shape)
    return plane[: a * WINDOW, : b * WINDOW].reshape(a, WINDOW, b, WINDOW)


def _second_difference(plane: np.ndarray) -> np.ndarray:
    return plane[2:] - 2 * plane[1:-1] + plane[:-2]
