"""A result that agrees with its scan: SR' = SR + D' (D D' + w)^-1 (y - D SR).

y is the scan, D how it was acquired: one matrix per axis (``volume.resample``). Of all images that would give the
scan, SR' is the one nearest to SR (w = 0); with w, the noise's variance over the variance of what is missing in SR, it
is the best linear estimate. D D' is a Kronecker product of one small symmetric matrix per axis, D D' = V L V' on each:
rotate the residual by V' on every axis, divide by the product of the eigenvalues plus w, and go back by D' V. All of it
are plain products, exact for any ratio and any number of thick axes, on any device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsrgan.errors import InputError
from fastsrgan.volume.resample import (
    NEGLIGIBLE,
    SAME,
    Matrix,
    Profile,
    apply_axes,
    check_geometry,
    check_profile,
    degrade_matrix,
    slice_axis,
    slice_profile_matrix,
    slice_width,
    spline_matrix,
    upsample_matrix,
)

LINEAR_WEIGHTS = (1e-3, 1e-2, 3e-2, 0.1, 0.2, 0.3, 0.5, 1.0)  # of the best linear estimate
SLAB_BYTES = 1 << 24  # of the result, worked on at a time
NO_SLICES = 1.2  # ratio below which a patch's scan is not found from its interpolation

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Observation:
    """How a scan sees an image on the grid of a result.

    down : D of each axis, (scan's voxels, result's voxels), None for the identity
    align : what puts the scan on the grid that ``down`` ends at, (scan's voxels there, scan's voxels): None but on axes
        along which the result is not finer than the scan and its voxels lie elsewhere
    up : U of each axis, (result's voxels, scan's voxels), the interpolation that a network's input is made by
    """

    down: tuple[Matrix, Matrix, Matrix]
    align: tuple[Matrix, Matrix, Matrix] = (None, None, None)
    up: tuple[Matrix, Matrix, Matrix] = (None, None, None)

    def __post_init__(self) -> None:
        spectra: list[tuple[Matrix, Matrix, Matrix]] = []
        for matrix in self.down:
            if matrix is None:
                spectra.append((None, None, None))
            else:
                values, vectors = np.linalg.eigh(matrix @ matrix.T)
                spectra.append((np.maximum(values, 0), vectors.T.copy(), matrix.T @ vectors))
        object.__setattr__(self, "spectra", tuple(spectra))

    @property
    def free(self) -> list[int]:
        """Axes on which D is the identity, and slabs of an image do not depend on one another."""
        return [axis for axis in range(3) if self.down[axis] is None]

    @property
    def is_identity(self) -> bool:
        """Whether the result has the scan's own voxels, so that nothing is left to agree on but the scan itself."""
        return len(self.free) == 3

    def eigenvalues(self, like: Tensor) -> Tensor:
        """Of D D', a (x, y, z) array that broadcasts against a residual; on the device and of the type of ``like``."""
        product = np.ones((1, 1, 1))
        for axis, (values, _, _) in enumerate(self.spectra):  # type: ignore[attr-defined]
            if values is not None:
                product = product * values.reshape([-1 if d == axis else 1 for d in range(3)])
        return torch.from_numpy(product).to(like)

    def forward(self, image: Any) -> Any:
        """D image: (..., X, Y, Z) -> (..., x, y, z), what the scanner would see of it."""
        return through(image, self.down)

    def solve(self, residual: Tensor, w: float) -> Tensor:
        """V' (D D' + w)^-1 residual: (..., x, y, z), to be taken back by ``spread``."""
        turned = through(residual, [spectrum[1] for spectrum in self.spectra])  # type: ignore[attr-defined]
        return turned / (self.eigenvalues(turned) + w)

    @property
    def spread(self) -> tuple[Matrix, Matrix, Matrix]:
        """D' V of each axis, (result's voxels, scan's voxels)."""
        x, y, z = (spectrum[2] for spectrum in self.spectra)  # type: ignore[attr-defined]
        return x, y, z


def observation(
    scan_shape: Sequence[int],
    scan_mm: Sequence[float],
    shape: Sequence[int],
    voxel_mm: Sequence[float],
    *,
    geometry: str = "physical",
    thickness_mm: float | None = None,
    profile: Profile = "gaussian",
) -> Observation | None:
    """How a scan of ``scan_mm`` voxels sees a result of ``voxel_mm`` voxels on the grid that ``infer`` makes.

    Parameters
    ----------
    scan_shape, scan_mm, shape, voxel_mm : of the scan and of the result, one axis order
    geometry : "physical", both grids share their centre, or "segsrgan", the original's
    thickness_mm : slice thickness, along the axis across the slices (``resample.slice_axis``); None: their spacing
    profile : shape of the slice profile, see ``resample.check_profile``

    Returns
    -------
    None where it is not known: in the segsrgan geometry, for sizes that the original's decimation does not give back.
    Raises UsageError for a geometry, profile or thickness that is not allowed.
    """
    check_geometry(geometry)
    share = check_profile(profile, geometry)
    across = slice_axis(scan_mm)
    width = slice_width(thickness_mm, scan_mm[across])
    down: list[Matrix] = []
    align: list[Matrix] = []
    up: list[Matrix] = []
    for axis, (m, low, n, high) in enumerate(zip(scan_shape, scan_mm, shape, voxel_mm, strict=True)):
        ratio, wide = low / high, width if axis == across else 1.0
        up.append(upsample_matrix(m, n, high / low, geometry))
        if ratio < 1 + SAME and (geometry == "physical" or ratio < 1 - SAME):
            # The network's input is the scan itself, moved onto these voxels where they are others.
            down.append(None)
            same = n == m and abs(ratio - 1) < SAME
            align.append(None if same else up[-1])
            continue
        align.append(None)
        if geometry == "physical":
            down.append(slice_profile_matrix(n, m, float(ratio), float(wide), share))
            continue
        matrix = degrade_matrix(n, high, low, geometry, wide)
        if matrix is None or len(matrix) != m:
            return None
        down.append(matrix)
    return Observation(tuple(down), tuple(align), tuple(up))  # type: ignore[arg-type]


def agreed(sr: Tensor, scan: Tensor, seen: Observation, w: float) -> Tensor:
    """SR + D' (D D' + w)^-1 (scan - D SR), a new tensor that gradients flow through.

    Parameters
    ----------
    sr : (..., X, Y, Z) float32 or float64
    scan : (..., x, y, z) of the same intensities, device and type
    w : variance of the noise over that of what is missing in ``sr``; 0 only where D D' can be inverted
    """
    return sr + _correction(through(scan, seen.align) - seen.forward(sr), seen, w)


def agree(
    sr_XYZ,
    scan_xyz,
    seen: Observation,
    w: float,
    floor: float = -math.inf,
    slab_bytes: int = SLAB_BYTES,
    axis: int | None = None,
) -> None:
    """Make a result agree with its scan, in place: SR += D' (D D' + w)^-1 (scan - D SR), then not below ``floor``.

    Parameters
    ----------
    sr_XYZ : (X, Y, Z) float32 or float64, NumPy (also a memory map, of any strides) or torch on any device
    scan_xyz : (x, y, z) of any real dtype, in the same intensities and axis order
    slab_bytes : of the result, worked on at a time. Along an axis on which D is the identity slabs do not depend on one
        another and memory is that of a slab; without such an axis an array of the scan's size is kept besides.
    axis : along which the slabs lie; None: such an axis, the one whose planes are farthest apart in memory

    Raises InputError for shapes that do not fit.
    """
    _check_shapes(sr_XYZ.shape, scan_xyz.shape, seen)
    if axis is None:
        axis = max(seen.free or range(3), key=lambda d: _strides(sr_XYZ)[d])
    if axis in seen.free:
        for first, last, here in cuts(sr_XYZ, axis, slab_bytes):
            sr = as_tensor(sr_XYZ[here])
            left = _aligned(scan_xyz, seen, axis, first, last, sr) - seen.forward(sr)
            _store(sr_XYZ, here, sr + _correction(left, seen, w), floor)
        return
    spread = seen.spread
    left = _difference(sr_XYZ, scan_xyz, seen, axis, slab_bytes)
    half = through(seen.solve(left, w), _replaced(spread, axis, None))
    for first, last, here in cuts(sr_XYZ, axis, slab_bytes):
        rows = _replaced((None,) * 3, axis, spread[axis][first:last])  # type: ignore[index]
        _store(sr_XYZ, here, as_tensor(sr_XYZ[here]) + through(half, rows), floor)


def best_linear(spline_XYZ: np.ndarray, scan_xyz: np.ndarray, truth_XYZ: np.ndarray, seen: Observation) -> np.ndarray:
    """spline + D' (D D' + w)^-1 (scan - D spline), not below 0, with the best of ``LINEAR_WEIGHTS``: (X, Y, Z).

    The weight is chosen by the truth: what a network has to be better than. Where noise makes every weight worse than
    the spline, which is the limit of large ones, it is the spline, not below 0 as well. All of one scale; raises
    InputError as ``agree``.
    """
    best = np.maximum(spline_XYZ, 0)
    least = float(np.square(best - truth_XYZ, dtype=np.float64).sum())
    for w in LINEAR_WEIGHTS:
        made = spline_XYZ.copy()
        agree(made, scan_xyz, seen, w, floor=0.0)
        error = float(np.square(made - truth_XYZ, dtype=np.float64).sum())
        best, least = (made, error) if error < least else (best, least)
    return best


def residual(sr_XYZ, scan_xyz, seen: Observation, slab_bytes: int = SLAB_BYTES, axis: int | None = None) -> np.ndarray:
    """What the scan says and the result, acquired again, does not: scan - D SR, (x, y, z) float32.

    Along axes on which the result is not finer than the scan, its voxels are the result's.
    """
    _check_shapes(sr_XYZ.shape, scan_xyz.shape, seen)
    if axis is None:
        axis = max(range(3), key=lambda d: _strides(sr_XYZ)[d])
    return _difference(sr_XYZ, scan_xyz, seen, axis, slab_bytes).float().cpu().numpy()


def back_matrix(down: np.ndarray, w: float) -> np.ndarray:
    """D' (D D' + w)^-1 of one axis, (n, m) float64: takes what a scan says beyond a result to its voxels."""
    return np.linalg.solve(down @ down.T + w * np.eye(len(down)), down).T


def consistent_start_matrix(up: np.ndarray, down: np.ndarray, w: float) -> np.ndarray:
    """U + D' (D D' + w)^-1 (1 - D U) of one axis: (n, m) float64, an interpolation that agrees with its samples.

    Parameters
    ----------
    up : U, (n, m), the interpolation of m voxels onto n; down : D, (m, n), how they were acquired

    With w = 0, D times it is the identity. Of several axes the product agrees as well, as
    (D1 x D2)(U1 x U2) is the identity.
    """
    back = back_matrix(down, w)
    return up + back @ (np.eye(len(down)) - down @ up)


@functools.lru_cache(maxsize=1024)
def patch_agreement(first: int, patch: int, n: int, m: int, ratio: float, width: float, w: float) -> np.ndarray:
    """The correction of ``agree`` on a patch along the axis across the slices: (2, patch, patch) float32, C and E.

    The result r of a patch whose interpolated scan is x becomes r + C x - E r, with E = D'(DD' + w)^-1 D and C the same
    of the scan that x interpolates: so x itself becomes the best linear estimate for this w.

    Parameters
    ----------
    first, patch : first voxel of the patch, which may hang over both ends, and its edge
    n, m : voxels of the volume and of its scan along the axis; ratio : of their sizes
    width : full width at half maximum of the Gaussian slice profile over the spacing of slices

    Only slices whose profile lies in the patch count: near its ends less is corrected, and without any nothing.
    """
    out = np.zeros((2, patch, patch), np.float32)
    low, high = max(first, 0), min(first + patch, n)
    if high <= low or ratio <= NO_SLICES:
        return out
    down = slice_profile_matrix(n, m, ratio, width)
    inside = np.flatnonzero(down[:, low:high].sum(1) > 1 - NEGLIGIBLE)
    down = down[inside, low:high]
    up = spline_matrix(m, n, 1 / ratio)[low:high]
    near = np.flatnonzero(np.abs(up).max(0) > NEGLIGIBLE)
    seen = np.linalg.pinv(up[:, near], rcond=1e-6)[np.searchsorted(near, inside)]  # the scan, of its interpolation
    back = back_matrix(down, w)
    here = slice(low - first, high - first)
    out[0, here, here], out[1, here, here] = back @ seen, back @ down
    return out


# --- arrays of any kind, by slabs ---------------------------------------------------------------------------------


def through(image: Any, matrices: Sequence[Matrix]) -> Any:
    """``apply_axes`` in the type that the image has; float32 for any that is not float64."""
    double = image.dtype in (torch.float64, np.float64)
    return apply_axes(image, matrices, torch.float64 if double else torch.float32)


def as_tensor(part: Any, like: Tensor | None = None) -> Tensor:
    """A float32 or float64 tensor of part of an array, on the device and of the type of ``like``."""
    if not isinstance(part, Tensor):
        dtype = part.dtype if part.dtype in (np.float32, np.float64) else np.float32
        part = torch.from_numpy(np.require(part, dtype, ["C", "W"]))
    return part if like is None else part.to(like)


def _strides(array: Any) -> tuple[int, ...]:
    strides = array.stride() if isinstance(array, Tensor) else array.strides
    return tuple(abs(s) for s in strides)


def cuts(array: Any, axis: int, slab_bytes: int) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
    """First and last plane along ``axis`` of each slab, and where it is. They lie at fixed places."""
    n = array.shape[axis]
    step = max(1, int(slab_bytes * n // (8 * math.prod(array.shape))))
    for first in range(0, n, step):
        last = min(first + step, n)
        yield first, last, (*(slice(None),) * axis, slice(first, last))


def _aligned(scan_xyz: Any, seen: Observation, axis: int, first: int, last: int, like: Tensor) -> Tensor:
    """Planes ``first`` to ``last`` of the scan along an axis on which D is the identity, on the result's voxels."""
    rows = seen.align[axis]
    if rows is None:
        scan_xyz = scan_xyz[(*(slice(None),) * axis, slice(first, last))]
        return through(as_tensor(scan_xyz, like), seen.align)
    return through(as_tensor(scan_xyz, like), _replaced(seen.align, axis, rows[first:last]))


def _difference(sr_XYZ: Any, scan_xyz: Any, seen: Observation, axis: int, slab_bytes: int) -> Tensor:
    """scan - D SR in the type and on the device of SR, by slabs along ``axis``."""
    left: Tensor | None = None
    matrix = seen.down[axis]
    for first, last, here in cuts(sr_XYZ, axis, slab_bytes):
        sr = as_tensor(sr_XYZ[here])
        if left is None:
            left = through(as_tensor(scan_xyz, sr).clone(), seen.align)
        if matrix is None:
            left[here] -= seen.forward(sr)
        else:
            left -= through(sr, _replaced(seen.down, axis, matrix[:, first:last]))
    assert left is not None
    return left


def _correction(residual: Tensor, seen: Observation, w: float) -> Tensor:
    return through(seen.solve(residual, w), seen.spread)


def _replaced(matrices: Sequence[Matrix], axis: int, matrix: Matrix) -> list[Matrix]:
    return [matrix if d == axis else m for d, m in enumerate(matrices)]


def _store(array: Any, here: tuple[slice, ...], value: Tensor, floor: float) -> None:
    value = value.clamp(min=floor)
    array[here] = value if isinstance(array, Tensor) else value.numpy()


def _check_shapes(shape: Sequence[int], scan: Sequence[int], seen: Observation) -> None:
    for n, m, down, align in zip(shape, scan, seen.down, seen.align, strict=True):
        high, low = (n, n) if down is None else (down.shape[1], len(down))
        if n != high or m != (low if align is None else align.shape[1]):
            reason = f"of {tuple(shape)} voxels does not belong to a scan of {tuple(scan)}"
            raise InputError("result", reason, "the scan it was made of")
