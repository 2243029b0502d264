"""The original's ``interp=sitk``: decimation by whole factors, and SimpleITK's Expand with nine interpolators.

Both are linear and act on each axis alone, so they are written as one matrix per axis like the other operators
(``volume.resample``): SimpleITK is asked once per column for what it makes of a unit sample, and any volume is then
interpolated as fast as with the spline. Needs the extra ``sitk``.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from scipy import ndimage

from fastsrgan.config import SITK
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.volume.resample import FWHM

_WINDOWS = ("Hamming", "Cosine", "Welch", "Lanczos", "Blackman")  # of a sinc
# The original's names -> SimpleITK's interpolators.
INTERPOLATORS = {name: f"sitk{name}{'WindowedSinc' * (name in _WINDOWS)}" for name in SITK} | {"Spline": "sitkBSpline"}


def check_interpolator(name: str) -> str:
    """``name`` if it is one of the original's interpolators, else UsageError."""
    if name not in INTERPOLATORS:
        raise UsageError("interpolation type", f"{name!r} is not allowed", f"one of {', '.join(INTERPOLATORS)}")
    return name


def whole_factor(low_mm: float, high_mm: float) -> int:
    """The original's rounded ratio of two voxel sizes. Raises UsageError where it is 0, as Expand only enlarges."""
    factor = round(low_mm / high_mm)
    if factor < 1:
        reason = f"cannot make voxels of {high_mm:g} mm from {low_mm:g} mm"
        raise UsageError("interp sitk", reason, "it only enlarges, by whole factors: take interp scipy")
    return factor


@functools.lru_cache(maxsize=64)
def decimate_matrix(n: int, low_res_mm: float, factor: int) -> np.ndarray:
    """D of one axis: (ceil(n / factor), n). The original's blur, of sigma = resolution / 2.3548 in voxels, then every
    ``factor``-th voxel."""
    blurred = ndimage.gaussian_filter1d(np.eye(n), low_res_mm / FWHM, axis=0)[::factor]
    blurred.flags.writeable = False
    return blurred


@functools.lru_cache(maxsize=64)
def expand_matrix(n: int, factor: int, interpolation_type: str = "Spline") -> np.ndarray:
    """U of one axis: (n * factor, n), what ``sitk.Expand`` does to it.

    Raises UsageError for an unknown interpolator, ResourceError without SimpleITK.
    """
    sitk: Any = _library()
    expand = sitk.ExpandImageFilter()
    expand.SetInterpolator(getattr(sitk, INTERPOLATORS[check_interpolator(interpolation_type)]))
    expand.SetExpandFactors([1, factor])
    expand.SetNumberOfThreads(1)  # one line of voxels at a time: starting threads would take longer than the work
    matrix = np.empty((n * factor, n))
    for column, unit in enumerate(np.eye(n)):
        expanded = expand.Execute(sitk.GetImageFromArray(unit[:, None]))
        matrix[:, column] = sitk.GetArrayViewFromImage(expanded)[:, 0]
    matrix.flags.writeable = False
    return matrix


def _library() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise ResourceError("interp sitk", "needs SimpleITK", "pip install 'fastsrgan[sitk]'") from error
    return SimpleITK
