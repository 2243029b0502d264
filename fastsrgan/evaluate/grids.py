"""One grid for volumes that are to be compared: resampling in world space, and what interpolation alone achieves.

Nothing here needs the two grids to be aligned; what is outside a volume's field of view is said and becomes 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import ndimage

from fastsrgan.core.files import mapping
from fastsrgan.errors import InputError
from fastsrgan.evaluate.wording import ZERO
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.head import air
from fastsrgan.volume.placement import EXACT, difference, refuse_placeless, same_grid
from fastsrgan.volume.resample import FWHM, SAME

log = logging.getLogger("fastsrgan")

SPLINE = "cubic spline of the low-resolution image"
READER = (
    "interpolated label map (paper table 2): the label averaged over the low-resolution voxels and cut at 0.5 there, "
    "as a reader of that image would draw it, then interpolated back by the cubic spline and cut at 0.5 again"
)
NO_AIR = 1e-4  # of a result's brightest: less is what rounding to a file's integers leaves of air
KNOWS = "the baseline's segmentation is the true label at the scan's resolution, interpolated: it knows the truth"


def knows_truth(scores: Mapping[str, Any] | None) -> bool:
    """Whether the baseline's segmentation in scores was made of the true label (``READER``): then ``KNOWS`` holds."""
    return mapping((scores or {}).get("baselines")).get("segmentation") == READER


def inside_mask(record: Mapping[str, Any], volume: Volume, sr: Volume) -> Volume:
    """What was made of a scan, on the grid of its result, as far as the result goes: air where that is, if the record
    says that all outside a mask was left out.

    The mask is no part of a result. It shows in the SR, which is air alone outside it; holes are filled.
    """
    if mapping(record.get("region")).get("outside") != ZERO:
        return volume
    nothing = air(sr.data)
    there = np.abs(sr.data - nothing) > NO_AIR * (float(sr.data.max()) - nothing)
    return replace(
        volume, data=np.where(ndimage.binary_fill_holes(there), volume.data, volume.data.dtype.type(nothing))
    )


def onto_grid(
    volume: Volume,
    like: Volume,
    *,
    order: int = 3,
    name: str = "volume",
    notes: list[str] | None = None,
    scored: np.ndarray | None = None,
    as_placed: bool = False,
) -> Volume:
    """``volume`` on the grid of ``like``: itself where the grids are one, else resampled in world space.

    Order 3 is the cubic spline (images), 0 the nearest voxel (labels); nothing is smoothed. Voxels whose centre lies
    outside the volume's field of view become 0. What was done is appended to ``notes``, or logged without them; where
    only a part ``scored`` (X, Y, Z) of the grid counts, what is missing there alone is told.
    Raises InputError when the two do not overlap, and, but with ``as_placed``, as `refuse_placeless` does.
    """
    if same_grid(volume, like):
        apart = difference(volume.affine, like.affine, like.data.shape)
        if notes is not None and apart.largest > EXACT * apart.size:
            notes.append(f"{name}: grid and the reference's are {apart}: taken as one, as headers are rounded")
        return volume
    told = [] if as_placed else list(filter(None, [refuse_placeless(volume, like, name)]))
    matrix = np.linalg.inv(volume.affine) @ like.affine
    inside = _inside(matrix, volume.data.shape, like.data.shape)
    share = float(inside.mean())
    if share == 0:
        what = volume.meta.get("path", name)
        raise InputError(what, "does not overlap the reference in world space", "check the affines of both files")
    # Edges reflect, as in the interpolation that a network's input is made by (resample.py).
    mode = "reflect" if order else "nearest"
    data = np.asarray(volume.data, np.float32) if order else np.asarray(volume.data)
    moved = ndimage.affine_transform(
        data, matrix[:3, :3], matrix[:3, 3], like.data.shape, output=data.dtype, order=order, mode=mode
    )
    moved[~inside] = 0
    kind = "cubic spline" if order == 3 else "nearest voxel" if order == 0 else f"spline of order {order}"
    note = f"{name}: grid differs from the reference's, resampled onto it in world space ({kind})"
    share = share if scored is None else float(inside[scored].mean())
    if share < 1:
        of = "the reference" if scored is None else "the part that is scored"
        note += f"; {100 * (1 - share):.1f} % of {of} lies outside its field of view and was set to 0"
    for line in (note, *told):
        if notes is None:
            log.info(line)
        else:
            notes.append(line)
    return Volume(moved, like.affine, volume.warnings, volume.meta)


def field_of_view(volume: Volume, like: Volume) -> np.ndarray | None:
    """(X, Y, Z) bool: voxels of ``like`` whose centre lies in a voxel of ``volume``; None where all do."""
    if same_grid(volume, like):
        return None
    inside = _inside(np.linalg.inv(volume.affine) @ like.affine, volume.data.shape, like.data.shape)
    return None if inside.all() else inside


def _inside(matrix_44: np.ndarray, shape_in: tuple[int, ...], shape_out: tuple[int, ...]) -> np.ndarray:
    """(X, Y, Z) bool: output voxels whose centre lies in a voxel of the input."""
    i, j, k = np.ogrid[tuple(slice(n) for n in shape_out)]
    inside = np.ones(shape_out, bool)
    for d, n in enumerate(shape_in):
        a, b, c, origin = matrix_44[d]
        where = a * i + b * j + (c * k + origin)
        # Rounding must not push a centre that lies on the border out of it.
        inside &= (where >= -0.5 - 1e-6) & (where <= n - 0.5 + 1e-6)
    return inside


def drawn_label(label: Volume, low_res: Volume) -> Volume:
    """The segmentation a reader of the low-resolution image would draw: bool, on that image's grid.

    The label (mask or probabilities) is averaged by the slice profile of ``resample``, a Gaussian whose full width at
    half maximum is the low-resolution voxel, and cut at 0.5. Between grids that are turned against each other the
    profile lies along the label's axes. Raises InputError when the two do not overlap.
    """
    matrix = np.linalg.inv(label.affine) @ low_res.affine
    inside = _inside(matrix, label.data.shape, low_res.data.shape)
    if not inside.any():
        raise InputError("low-resolution image", "does not overlap the label in world space", "check both affines")
    size = np.abs(matrix[:3, :3]).max(axis=1)  # of a low-resolution voxel along each label axis, in label voxels
    sigma = np.where(size < 1 + SAME, 0, size / FWHM)
    blurred = ndimage.gaussian_filter(np.asarray(label.data, np.float32), sigma)
    averaged = ndimage.affine_transform(
        blurred, matrix[:3, :3], matrix[:3, 3], low_res.data.shape, order=3, mode="reflect", output=np.float32
    )
    return Volume((averaged > 0.5) & inside, low_res.affine)


def reader_label_map(label: Volume, low_res: Volume, notes: list[str], scored: np.ndarray | None = None) -> Volume:
    """What ``drawn_label`` becomes when it is interpolated back: float32 on the label's grid, to be cut at 0.5.
    ``notes``, ``scored``: as for ``onto_grid``."""
    drawn = drawn_label(label, low_res)
    as_numbers = Volume(drawn.data.astype(np.float32), drawn.affine)
    return onto_grid(as_numbers, label, order=3, name="interpolated label map", notes=notes, scored=scored)
