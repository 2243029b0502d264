"""The observation model and the interpolation as one small matrix per axis (decision 001; paper eq. 1, 16, 17).

Blur, decimation and spline interpolation are linear and separable: Theta = D_x (x) D_y (x) D_z, and the way back is
U_x (x) U_y (x) U_z. The matrices are built once per (size, resolution) in float64 and applied as float32 products.

Two families:
``physical``  voxel centres are mapped in millimetres, both grids share their centre. Row m of D is the slice profile
              centred on voxel m: a Gaussian or a box whose full width at half maximum is the slice thickness, the
              low-resolution voxel size unless there are gaps; an axis that is not decimated is not blurred. U is the
              cubic B-spline through the samples. Edges reflect.
``segsrgan``  what the original computes, built by calling SciPy on the identity: Gaussian of sigma =
              resolution / 2.3548 in voxels on every axis, corner-aligned ``zoom`` of order 0 down and of order 3 up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy import linalg

from fastsrgan.config import CHOICES
from fastsrgan.core.kernels import to_device
from fastsrgan.core.threads import run_each
from fastsrgan.errors import UsageError
from fastsrgan.volume.geometry import centre_coordinates, grid_size

PROFILES = ("gaussian", "box")
FWHM = 2 * math.sqrt(2 * math.log(2))  # full width at half maximum of a unit Gaussian
TRUNCATE = 4.0  # the slice profile ends at four standard deviations, as SciPy's filter does
SAME = 0.01  # resolutions within 1 % count as equal: the axis is left alone
NARROWEST = 0.1  # voxels, smallest sigma of a slice profile: below, it is the nearest voxel alone
NEGLIGIBLE = 1e-9  # weights, far below a float32's last bit: spline weights fall by 0.268 per sample and never end

Matrix = np.ndarray | None  # None stands for the identity
Profile = str | float  # one of PROFILES, or the share of the box in a blend of both


def check_geometry(name: str) -> str:
    """``name`` if it is a known family, else UsageError."""
    if name not in CHOICES["geometry"]:
        raise UsageError("geometry", f"{name!r} is not allowed", f"one of {', '.join(CHOICES['geometry'])}")
    return name


def check_profile(profile: Profile, geometry: str = "physical") -> float:
    """The share of the box in a slice profile: 0 for "gaussian", 1 for "box", a number in [0, 1] for itself.

    Raises UsageError for anything else, and for a box in the segsrgan geometry, which knows the Gaussian alone.
    """
    share = {"gaussian": 0.0, "box": 1.0}.get(profile) if isinstance(profile, str) else float(profile)
    if share is None or not 0 <= share <= 1:
        reason = f"{profile!r} is not allowed"
        raise UsageError("profile", reason, f"one of {', '.join(PROFILES)}, or a share in [0, 1]")
    if share and geometry == "segsrgan":
        raise UsageError("profile", "the segsrgan geometry knows the Gaussian alone", "--geometry physical")
    return share


def slice_axis(spacing_mm: Sequence[float]) -> int:
    """The axis across the slices: the one of the largest spacing, the last of equals."""
    return max(range(3), key=lambda d: (spacing_mm[d], d))


def slice_width(thickness_mm: float | None, spacing_mm: float) -> float:
    """Slice thickness over the spacing of slices. Raises UsageError for a thickness that is no positive number."""
    if thickness_mm is None:
        return 1.0
    if not 0 < thickness_mm < math.inf:
        raise UsageError("slice thickness", f"{thickness_mm:g} mm is not allowed", "a number of mm above zero")
    return thickness_mm / spacing_mm


def _reflect(index: np.ndarray, n: int) -> np.ndarray:
    """Fold any integer index into 0..n-1, the edge voxel repeated (SciPy's mode ``reflect``)."""
    folded = index % (2 * n)
    return np.where(folded < n, folded, 2 * n - 1 - folded)


def _scatter_rows(columns: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """(M, K) reflected column indices and weights -> dense (M, n)."""
    matrix = np.zeros((columns.shape[0], n))
    np.add.at(matrix, (np.arange(columns.shape[0])[:, None], _reflect(columns, n)), weights)
    return matrix


@functools.lru_cache(maxsize=256)
def slice_profile_matrix(n_in: int, n_out: int, ratio: float, width: float = 1.0, box: float = 0.0) -> np.ndarray:
    """Physical D of one axis: (n_out, n_in), rows sum to 1. ``ratio`` is low over high resolution voxel size.

    ``width`` is the profile's full width at half maximum over the low-resolution voxel size, below 1 where slices have
    gaps. ``box`` is the share of the box in the profile, the rest is the Gaussian: 0 and 1 are the pure shapes. A voxel
    counts in the box by the length of it that lies inside.
    """
    sigma = max(ratio * width / FWHM, NARROWEST)
    reach = int(TRUNCATE * sigma + 0.5) + 1
    centres = centre_coordinates(n_out, n_in, ratio)
    columns = np.floor(centres + 0.5).astype(int)[:, None] + np.arange(-reach, reach + 1)
    distance = columns - centres[:, None]
    weights = np.where(np.abs(distance) <= TRUNCATE * sigma + 0.5, np.exp(-0.5 * (distance / sigma) ** 2), 0.0)
    weights /= weights.sum(1, keepdims=True)
    if box:
        half = sigma * FWHM / 2
        inside = np.clip(np.minimum(distance + 0.5, half) - np.maximum(distance - 0.5, -half), 0, None)
        weights = (1 - box) * weights + box * inside / inside.sum(1, keepdims=True)
    return _frozen(_scatter_rows(columns, weights, n_in))


@functools.lru_cache(maxsize=256)
def spline_matrix(n_in: int, n_out: int, ratio: float) -> np.ndarray:
    """Physical U of one axis: (n_out, n_in), cubic B-spline interpolation at the output's voxel centres.

    ``ratio`` is output over input voxel size; rows sum to 1 and the samples are interpolated exactly.
    """
    columns, weights = bspline_taps(centre_coordinates(n_out, n_in, ratio))
    return _frozen(_on_samples(_scatter_rows(columns, weights, n_in)))


def bspline_taps(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Control points and weights, (n, 4) each, of the cubic B-spline at ``x``, counted from the first point."""
    left = np.floor(x)
    t = x - left
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    return left.astype(int)[:, None] + np.arange(-1, 3), weights


def _on_samples(basis_MN: np.ndarray) -> np.ndarray:
    """(M, n): values at the coefficients of the cubic B-spline that reflects at the edges -> values at its samples.

    Solved exactly; SciPy's recursive filter is off by 1e-4 on axes of five voxels. Not a matrix product: the last bits
    of those depend on the number of BLAS threads.
    """
    n = basis_MN.shape[1]
    if n == 1:
        return basis_MN
    bands = np.full((3, n), 1 / 6)
    bands[1] = 4 / 6
    bands[1, [0, -1]] = 5 / 6  # the reflected neighbour is the edge voxel itself
    return np.ascontiguousarray(linalg.solve_banded((1, 1), bands, basis_MN.T).T)  # the system is symmetric


@functools.lru_cache(maxsize=64)
def spline_coefficients(n: int) -> np.ndarray:
    """(n, n): samples -> coefficients of the cubic B-spline that reflects at the edges."""
    return _frozen(_on_samples(np.eye(n)))


@functools.lru_cache(maxsize=256)
def _scipy_degrade_matrix(n: int, resolution: float, factor: float) -> np.ndarray:
    from scipy import ndimage

    blurred = ndimage.gaussian_filter1d(np.eye(n), resolution / FWHM, axis=0)
    return _frozen(ndimage.zoom(blurred, (1 / factor, 1), order=0))


@functools.lru_cache(maxsize=256)
def _scipy_zoom_matrix(n: int, zoom: float) -> np.ndarray:
    from scipy import ndimage

    return _frozen(ndimage.zoom(np.eye(n), (zoom, 1), order=3))


def _frozen(matrix: np.ndarray) -> np.ndarray:
    matrix.flags.writeable = False  # cached and shared
    return matrix


def modulo_size(n: int, factor: float) -> int:
    """The original's crop: the largest size, at most n, left after taking off ``fmod(n, factor)``."""
    return int(n - math.fmod(n, factor))


def degrade_matrix(
    n: int,
    spacing_mm: float,
    low_res_mm: float,
    geometry: str = "physical",
    width: float = 1.0,
    profile: Profile = "gaussian",
) -> Matrix:
    """D of one axis of ``n`` voxels: (m, n), or None where nothing changes.

    ``width`` is the slice profile's full width at half maximum over the low-resolution voxel size: slice thickness over
    the spacing of slices. ``profile`` is its shape, see ``check_profile``.
    Raises UsageError when the low resolution is finer than the image, or for a profile that does not exist.
    """
    box = check_profile(profile, geometry)
    ratio = low_res_mm / spacing_mm
    if ratio < 1 - SAME:
        reason = f"{low_res_mm:g} mm is finer than the image's {spacing_mm:g} mm"
        raise UsageError("low resolution", reason, "ask for the same or coarser")
    if geometry == "segsrgan":
        return _scipy_degrade_matrix(n, float(low_res_mm * width), float(ratio))
    if ratio < 1 + SAME:
        return None
    return slice_profile_matrix(n, grid_size(n, spacing_mm, low_res_mm), float(ratio), float(width), box)


def upsample_matrix(n_in: int, n_out: int, ratio: float, geometry: str = "physical") -> Matrix:
    """U of one axis: (n_out, n_in), or None where nothing changes.

    ``ratio`` is output over input voxel size (0.5 doubles the grid). The ``segsrgan`` family takes its output size
    from SciPy's ``zoom``: round(n_in / ratio).
    """
    if geometry == "segsrgan":
        return None if ratio == 1 else _scipy_zoom_matrix(n_in, 1 / ratio)
    if n_in == n_out and abs(ratio - 1) < 1e-6:
        return None
    return spline_matrix(n_in, n_out, float(ratio))


def mean_matrix(n: int, m: int, reach: float) -> np.ndarray:
    """(n, m) float32: for n voxels the mean, within ``reach`` of them to each side, of m voxels that fill the same
    length. What lies beyond the ends does not count."""
    size, edges = n / m, np.arange(m + 1) * (n / m)
    centres = np.arange(n)[:, None] + 0.5
    overlap = np.minimum(centres + reach, edges[1:]) - np.maximum(centres - reach, edges[:-1])
    overlap = overlap.clip(0, size)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def apply_axes(array, matrices: Sequence[Matrix], dtype: torch.dtype = torch.float32):
    """Apply one matrix per axis to (..., X, Y, Z): NumPy in, NumPy out; torch in, torch out on its device.

    ``dtype`` is that of the products and of the result. The matrix that shrinks most goes first, so later ones are
    small.
    """
    is_numpy = isinstance(array, np.ndarray)
    if is_numpy:
        array = torch.from_numpy(np.require(array, str(dtype).removeprefix("torch."), ["C", "W"]))
    x = array.to(dtype)
    jobs = [(d, m) for d, m in enumerate(matrices) if m is not None]
    for axis, matrix in sorted(jobs, key=lambda job: job[1].shape[0] / job[1].shape[1]):
        banded = x.device.type == "cpu" and not x.requires_grad and dtype == torch.float32
        x = (_apply_bands if banded else _apply_whole)(x, matrix, axis - 3)
    return x.numpy() if is_numpy else x


def _apply_whole(x: torch.Tensor, matrix: np.ndarray, axis: int) -> torch.Tensor:
    if x.dtype == torch.float32 and x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32":
        # TF32 is for the networks alone. The switch is one for all threads, so it is not turned; float64 knows no TF32.
        return _apply_whole(x.double(), matrix, axis).float()
    weights = to_device(matrix.copy(), x.device).to(x.dtype)
    if axis == -1:
        return x @ weights.T
    if axis == -2:
        return weights @ x
    flat = x.reshape(*x.shape[:-3], x.shape[-3], -1)
    return (weights @ flat).reshape(*x.shape[:-3], matrix.shape[0], *x.shape[-2:])


def support(rows: np.ndarray) -> slice:
    """The columns, first to last, in which any of these rows of an operator has a weight that counts."""
    used = np.flatnonzero((np.abs(rows) > NEGLIGIBLE).any(0))
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1)


def _apply_bands(x: torch.Tensor, matrix: np.ndarray, axis: int) -> torch.Tensor:
    """The product on a CPU, a few rows of the operator at a time: its weights lie in a band, and a tile of the volume
    stays in the cache while all rows use it. The bits do not depend on the number of threads."""
    step = 32 if axis == -1 else 16
    cuts = [slice(r, min(r + step, len(matrix))) for r in range(0, len(matrix), step)]
    places = [(r, support(matrix[r])) for r in cuts]
    bands = [(r, c, torch.from_numpy(matrix[r, c].astype(np.float32))) for r, c in places]
    shape = list(x.shape)
    shape[axis] = len(matrix)
    out = torch.empty(shape)
    jobs = {-1: _line_jobs, -2: _plane_jobs, -3: _volume_jobs}[axis](x, out, bands)
    run_each(jobs)
    return out


Band = tuple[slice, slice, torch.Tensor]  # rows, their columns, weights
Jobs = Iterator[Callable[[], None]]


def _line_jobs(x: torch.Tensor, out: torch.Tensor, bands: list[Band]) -> Jobs:
    """Along the last axis, 2048 lines at a time."""
    lines, made = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    turned = [(r, c, w.T.contiguous()) for r, c, w in bands]

    def job(first: int) -> None:
        for start in range(first, min(first + 8192, len(lines)), 2048):
            here = slice(start, start + 2048)
            for rows, columns, w in turned:
                torch.mm(lines[here, columns], w, out=made[here, rows])

    return (functools.partial(job, first) for first in range(0, len(lines), 8192))


def _plane_jobs(x: torch.Tensor, out: torch.Tensor, bands: list[Band]) -> Jobs:
    """Along the last but one axis, 16 planes at a time."""
    planes, made = x.reshape(-1, *x.shape[-2:]), out.view(-1, *out.shape[-2:])

    def job(first: int) -> None:
        here = slice(first, first + 16)
        for rows, columns, w in bands:
            made[here, rows] = w @ planes[here, columns]

    return (functools.partial(job, first) for first in range(0, len(planes), 16))


def _volume_jobs(x: torch.Tensor, out: torch.Tensor, bands: list[Band]) -> Jobs:
    """Along the last but two axis, 8192 columns at a time."""
    size = x.shape[-2] * x.shape[-1]
    volumes, made = x.reshape(-1, x.shape[-3], size), out.view(-1, out.shape[-3], size)

    def job(volume: int, first: int) -> None:
        here = slice(first, first + 8192)
        for rows, columns, w in bands:
            torch.mm(w, volumes[volume, columns, here], out=made[volume, rows, here])

    return (functools.partial(job, v, first) for v in range(len(volumes)) for first in range(0, size, 8192))
