"""The observation model and the interpolation as one small matrix per axis (DESIGN D1; paper eq. 1, 16, 17).

Blur, decimation and spline interpolation are linear and separable: Theta = D_x (x) D_y (x) D_z, and the way back is
U_x (x) U_y (x) U_z. The matrices are built once per (size, resolution) in float64 and applied as float32 products.

Two families:
``physical``  voxel centres are mapped in millimetres, both grids share their centre. Row m of D is the slice profile,
              a Gaussian whose full width at half maximum is the low-resolution voxel size, centred on voxel m; an axis
              that is not decimated is not blurred. U is the cubic B-spline through the samples. Edges reflect.
``segsrgan``  what the original computes, built by calling SciPy on the identity: Gaussian of sigma =
              resolution / 2.3548 in voxels on every axis, corner-aligned ``zoom`` of order 0 down and of order 3 up.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from scipy import linalg, ndimage

from fastsrgan.errors import UsageError
from fastsrgan.geometry import centre_coordinates, grid_size

GEOMETRIES = ("physical", "segsrgan")
FWHM = 2 * math.sqrt(2 * math.log(2))  # full width at half maximum of a unit Gaussian
TRUNCATE = 4.0  # the slice profile ends at four standard deviations, as SciPy's filter does
SAME = 0.01  # resolutions within 1 % count as equal: the axis is left alone

Matrix = np.ndarray | None  # None stands for the identity


def check_geometry(name: str) -> str:
    """``name`` if it is a known family, else UsageError."""
    if name not in GEOMETRIES:
        raise UsageError("geometry", f"{name!r}", f"one of {', '.join(GEOMETRIES)}")
    return name


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
def slice_profile_matrix(n_in: int, n_out: int, ratio: float) -> np.ndarray:
    """Physical D of one axis: (n_out, n_in), rows sum to 1. ``ratio`` is low over high resolution voxel size."""
    sigma = ratio / FWHM
    reach = int(TRUNCATE * sigma + 0.5) + 1
    centres = centre_coordinates(n_out, n_in, ratio)
    columns = np.floor(centres + 0.5).astype(int)[:, None] + np.arange(-reach, reach + 1)
    distance = columns - centres[:, None]
    weights = np.where(np.abs(distance) <= TRUNCATE * sigma + 0.5, np.exp(-0.5 * (distance / sigma) ** 2), 0.0)
    return _frozen(_scatter_rows(columns, weights / weights.sum(1, keepdims=True), n_in))


@functools.lru_cache(maxsize=256)
def spline_matrix(n_in: int, n_out: int, ratio: float) -> np.ndarray:
    """Physical U of one axis: (n_out, n_in), cubic B-spline interpolation at the output's voxel centres.

    ``ratio`` is output over input voxel size; rows sum to 1 and the samples are interpolated exactly.
    """
    x = centre_coordinates(n_out, n_in, ratio)
    left = np.floor(x)
    t = x - left
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    basis = _scatter_rows(left.astype(int)[:, None] + np.arange(-1, 3), weights, n_in)
    return _frozen(basis @ _spline_coefficients(n_in))


def _spline_coefficients(n: int) -> np.ndarray:
    """(n, n): samples -> coefficients of the cubic B-spline that reflects at the edges.

    Solved exactly; SciPy's recursive filter is off by 1e-4 on axes of five voxels.
    """
    if n == 1:
        return np.eye(1)
    bands = np.full((3, n), 1 / 6)
    bands[1] = 4 / 6
    bands[1, [0, -1]] = 5 / 6  # the reflected neighbour is the edge voxel itself
    return linalg.solve_banded((1, 1), bands, np.eye(n))


@functools.lru_cache(maxsize=256)
def _scipy_degrade_matrix(n: int, resolution: float, factor: float) -> np.ndarray:
    blurred = ndimage.gaussian_filter1d(np.eye(n), resolution / FWHM, axis=0)
    return _frozen(ndimage.zoom(blurred, (1 / factor, 1), order=0))


@functools.lru_cache(maxsize=256)
def _scipy_zoom_matrix(n: int, zoom: float) -> np.ndarray:
    return _frozen(ndimage.zoom(np.eye(n), (zoom, 1), order=3))


def _frozen(matrix: np.ndarray) -> np.ndarray:
    matrix.flags.writeable = False  # cached and shared
    return matrix


def modulo_size(n: int, factor: float) -> int:
    """The original's crop: the largest size, at most n, left after taking off ``fmod(n, factor)``."""
    return int(n - math.fmod(n, factor))


def degrade_matrix(n: int, spacing_mm: float, low_res_mm: float, geometry: str = "physical") -> Matrix:
    """D of one axis of ``n`` voxels: (m, n), or None where nothing changes.

    Raises UsageError when the low resolution is finer than the image.
    """
    ratio = low_res_mm / spacing_mm
    if ratio < 1 - SAME:
        raise UsageError(
            "low resolution",
            f"{low_res_mm:g} mm is finer than the image's {spacing_mm:g} mm",
            "ask for the same or coarser",
        )
    if geometry == "segsrgan":
        return _scipy_degrade_matrix(n, float(low_res_mm), float(ratio))
    if ratio < 1 + SAME:
        return None
    return slice_profile_matrix(n, grid_size(n, spacing_mm, low_res_mm), float(ratio))


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


def apply_axes(array, matrices: tuple[Matrix, Matrix, Matrix] | list[Matrix]):
    """Apply one matrix per axis to (..., X, Y, Z): NumPy in, NumPy out; torch in, torch out on its device. float32.

    The matrix that shrinks most goes first, so later products are small.
    """
    is_numpy = isinstance(array, np.ndarray)
    x = torch.from_numpy(np.ascontiguousarray(array, np.float32)) if is_numpy else array.float()
    jobs = [(d, m) for d, m in enumerate(matrices) if m is not None]
    for axis, matrix in sorted(jobs, key=lambda job: job[1].shape[0] / job[1].shape[1]):
        x = _apply_axis(x, torch.from_numpy(matrix.astype(np.float32)).to(x.device), axis - 3)
    return x.numpy() if is_numpy else x


def _apply_axis(x: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    if axis == -1:
        return x @ matrix.T
    if axis == -2:
        return matrix @ x
    flat = x.reshape(*x.shape[:-3], x.shape[-3], -1)
    return (matrix @ flat).reshape(*x.shape[:-3], matrix.shape[0], *x.shape[-2:])


def upsample_to(data_XYZ, spacing_mm, new_spacing_mm, geometry: str = "physical"):
    """Cubic-spline interpolation of a volume from one voxel size to another.

    Parameters
    ----------
    data_XYZ : (X, Y, Z) array or tensor
    spacing_mm, new_spacing_mm : 3 sizes each, array axis order
    geometry : "physical" (centre-aligned, sizes from ``geometry.grid_size``) or "segsrgan" (SciPy's ``zoom``)

    Returns
    -------
    (X', Y', Z') float32. Works in both directions; no blur is applied when coarsening.
    """
    check_geometry(geometry)
    matrices = []
    for n, old, new in zip(data_XYZ.shape, spacing_mm, new_spacing_mm, strict=True):
        n_out = grid_size(n, old, new)
        matrices.append(upsample_matrix(n, n_out, new / old, geometry))
    return apply_axes(data_XYZ, matrices)
