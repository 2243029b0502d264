"""The slice profile that a scan shows where the head ends in empty space.

Beyond the head a slice sees nothing but the tail of its own profile. Where a scan is exactly empty there, as scans are
that were simulated from images without a background, the values of the outermost slices are that tail: of a Gaussian
ln y falls as a parabola, a box is zero from one slice to the next. A scanner's noise hides both, and a mask that was
laid on afterwards cuts them off: such scans show nothing (docs/decisions/023-agreement.md).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy.special import log_ndtr

from fastsrgan.volume.acquisition import Shown, noise_sd, sampled, unit_above
from fastsrgan.volume.head import lowest
from fastsrgan.volume.resample import FWHM

COLUMNS = 10_000  # lines across the slices, evenly spaced, that are looked at
TAILS = 200  # of their ends, from which a width is found
FEWEST = 50  # ends, below which nothing is said
ROUNDED = 1e-30  # of the scan's largest value: what is smaller has lost digits
# Of three slices, the outermost over the third: below the first it is the profile's tail; between both it may be one
# that was cut off at four standard deviations, as SciPy's is, and only a width of one slice is believed.
FAR, NEAR = 1e-4, 1e-3
ALIKE = 0.08  # quartiles of the widths over their median, at most
SURE, ABOUT = 0.03, 0.1  # how near to one slice a width has to be: far out, and where tails are cut off or rounded
DEEP = 1e-12  # of the largest value: a file that holds as small ones has not rounded its tails
# Full widths at half maximum that are looked for, in slices (of narrower ones another width fits as well), and those
# that are believed: others were seen where rims of few, whole numbers are no tails.
WIDTHS, BELIEVED = (0.68, 1.4), (0.75, 1.25)
STEPS = np.linspace(FWHM / WIDTHS[1], FWHM / WIDTHS[0], 180)  # one slice in standard deviations, for each width
PLACES = np.linspace(-3.0, 16.0, 951)  # of the head's edge, in standard deviations of the profile
RIM = 0.02  # of the bright: what is brighter is the head
SUDDEN = 0.95  # share of the ends that a box leaves within one slice; found: 0.98 and above
PARTIAL = (0.2, 0.8)  # share of them whose last slice is less than half as bright as the next; found: 0.32 to 0.66
FAINT = 0.12  # at most this share is below a tenth of it; found: 0.07 at most, 0.6 and above of a rounded Gaussian
# Noise over the bright, at most; found: 0.004 to 0.009 of images with texture, 0.012 to 0.015 of scans.
NOISELESS = 0.01


def shown(scan_xyz: np.ndarray, across: int) -> Shown | None:
    """The profile that the ends of the head show; None where they show none.

    scan_xyz : (x, y, z) of any real dtype; across : the axis across the slices

    A Gaussian is measured (two parts in a hundred at width 1), of a box it is seen that it is none wider than the
    slices are apart.
    """
    ends = _ends(scan_xyz, across)
    if ends is None:
        return None
    deep = ends[:, 1].min() < DEEP
    width = _tail(ends, FAR if deep else NEAR)
    if width is not None and deep and BELIEVED[0] <= width <= BELIEVED[1]:
        return Shown("gaussian", 1.0 if abs(width - 1) <= SURE else float(f"{width:.2g}"))
    if width is not None and not deep and abs(width - 1) <= ABOUT:
        return Shown("gaussian", 1.0)
    return Shown("box", 1.0) if _sudden(ends, scan_xyz, across) else None


def _ends(scan_xyz: np.ndarray, across: int) -> np.ndarray | None:
    """(ends, 5): of every line and both its ends the last slice outside, nan where there is none, and the three from
    the first that is not empty on, float64, the brightest being 1; then how many slices it is to the head's rim. None
    where there is too little to see, or values below where the scan counts from (``head.lowest``)."""
    lines, low = np.moveaxis(scan_xyz, across, -1), lowest(scan_xyz)
    n = lines.shape[-1]
    step = max(1, math.ceil(math.sqrt(lines[..., 0].size / COLUMNS)))
    lines = np.ascontiguousarray(lines[::step, ::step]).reshape(-1, n).astype(np.float64) - low
    largest = float(lines.max(initial=0.0))
    if n < 4 or not largest or not np.isfinite(lines).all() or (lines < 0).any():
        return None
    lines /= largest
    level = RIM * float(np.percentile(lines, 99.9))
    found = []
    for towards in (lines, lines[:, ::-1]):
        first, rim = (towards > ROUNDED).argmax(1), (towards > level).argmax(1)
        kept = (towards > level).any(1) & (first + 2 < n)
        towards, first, rim = towards[kept], first[kept], rim[kept]
        rows = np.arange(len(first))
        outside = np.where(first > 0, towards[rows, np.maximum(first - 1, 0)], np.nan)
        found.append(np.stack([outside, *(towards[rows, first + i] for i in range(3)), rim - first], 1))
    ends = np.concatenate(found)
    return ends if len(ends) >= FEWEST else None


def _tail(ends: np.ndarray, below: float) -> float | None:
    """Full width at half maximum, in slices, of the Gaussian whose tail the ends are; None where they are none.

    The edge of the head is taken for a step, whose slices are 1 - Phi: two ratios of three slices give its place and
    the width. Far out nothing else of the head counts. ``below``: the outermost of them over the third, at most.
    """
    outer, middle, inner = ends[:, 1], ends[:, 2], ends[:, 3]
    far = (outer < below * inner) & (outer < middle) & (middle < inner)
    if np.count_nonzero(far) < FEWEST:
        return None
    chosen = np.flatnonzero(far)
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, TAILS).astype(int))]
    steep, flat = np.log(outer[chosen] / middle[chosen]), np.log(middle[chosen] / inner[chosen])
    off = np.empty((len(STEPS), len(chosen)))
    for row, (outer_, inner_) in zip(off, _steps_of_a_gaussian(), strict=True):
        row[:] = np.interp(np.interp(-steep, -outer_, PLACES), PLACES, inner_) - flat
    widths = FWHM / STEPS[np.abs(off).argmin(0)]
    low, width, high = np.percentile(widths, (25, 50, 75))
    return float(width) if high - low <= ALIKE * width else None


@functools.cache
def _steps_of_a_gaussian() -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each of ``STEPS``: ln of the third slice over the second, of the second over the first, at ``PLACES``."""
    found = []
    for h in STEPS:
        first, second, third = (log_ndtr(-(PLACES + i * h)) for i in range(3))
        found.append((third - second, second - first))
    return found


def _sudden(ends: np.ndarray, scan_xyz: np.ndarray, across: int) -> bool:
    """Whether the head ends from one slice to the next, with slices that it fills in part, where a Gaussian's tail
    would be seen."""
    outside, last, following, rim = ends[:, 0], ends[:, 1], ends[:, 2], ends[:, 4]
    if np.mean(rim <= 1) < SUDDEN or np.count_nonzero(outside == 0) < max(FEWEST, 0.8 * len(ends)):
        return False
    partial = last < 0.5 * following
    if not PARTIAL[0] <= np.mean(partial) <= PARTIAL[1] or np.mean(last < 0.1 * following) > FAINT:
        return False
    # What a Gaussian as wide as the slices are apart would leave in the slice outside, where the file could hold it.
    third, second = _steps_of_a_gaussian()[int(np.abs(STEPS - FWHM).argmin())]
    place = np.interp(-np.log(last[partial] / following[partial]), -second, PLACES)
    expected = last[partial] * np.exp(np.interp(place, PLACES, third))
    if np.mean(expected > 2 * _step(scan_xyz)) < 0.5:
        return False
    noise = noise_sd(scan_xyz, across)
    return noise is not None and noise <= NOISELESS * unit_above(lowest(scan_xyz), sampled(scan_xyz, across))


def _step(scan_xyz: np.ndarray) -> float:
    """How far apart numbers of the scan's type are, its largest value, from ``head.lowest`` on, being 1; 0 for floating
    point."""
    if np.issubdtype(scan_xyz.dtype, np.floating):
        return 0.0
    return 1 / max(1.0, float(np.max(scan_xyz)) - lowest(scan_xyz))
