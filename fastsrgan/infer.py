"""One low-resolution volume in, super-resolution and segmentation out (paper section 2.5, DESIGN D12).

normalise -> interpolate to the wanted grid -> dense overlapping tiles through the generator -> overlap-add -> undo
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsrgan import tiles
from fastsrgan.engine import check_batch, check_precision, pick_precision, predict
from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.geometry import Orientation, grid_size, processing_orientation, resampled_affine, spacing_of
from fastsrgan.intensity import normaliser
from fastsrgan.resample import SAME, check_geometry, upsample_to
from fastsrgan.runtime import QUIET, Progress, pick_device
from fastsrgan.stitch import check_window

log = logging.getLogger("fastsrgan")

MAX_VOXELS = 2**31  # of the interpolated grid

Resolution = str | float | Sequence[float] | None  # see infer_volume
Spacing = tuple[float, float, float]
# (volume, its spacing, wanted spacing) -> (interpolated float32 volume, the spacing that it has)
Interpolate = Callable[[np.ndarray, Spacing, Spacing], tuple[np.ndarray, Spacing]]


@dataclass(frozen=True)
class InferResult:
    """What came out of one volume, on the stored axes.

    sr : (X', Y', Z') float32, in the input's intensity range
    prob : (1 + classes, X', Y', Z') float32 in [0, 1]: channel 0 the structure, then the mask classes
    affine : (4, 4) of both
    report : settings as they were used, sizes, times
    """

    sr: np.ndarray
    prob: np.ndarray
    affine: np.ndarray
    report: dict


def infer_volume(
    data_XYZ: np.ndarray,
    affine: np.ndarray,
    generator: nn.Module,
    *,
    patch: tiles.PerAxis = 128,
    step: int | Sequence[int] = 30,
    new_resolution: Resolution = None,
    device: str | torch.device = "auto",
    geometry: str = "physical",
    interpolate: Interpolate | None = None,
    window: str = "constant",
    batch: str | int = "auto",
    precision: str = "auto",
    progress: Progress = QUIET,
    label: str = "infer",
) -> InferResult:
    """Super-resolve and segment one volume.

    Parameters
    ----------
    data_XYZ : (X, Y, Z) finite image as stored, at least one voxel above zero
    affine : (4, 4) voxel index -> world mm
    generator : ``G(x)``, or ``G(x, res)`` where ``G.spec.conditional``, (B, 1, x, y, z) -> (B, 2 + classes, x, y, z);
        it is moved to the device
    patch, step : of the tiles in voxels of the new grid, one or one per stored axis; see ``tiles.plan``
    new_resolution : voxel size of the result in mm: None, isotropic at the finest of the input's; one number; one per
        stored axis; or "same", the input's own
    geometry : "physical" keeps every structure where it was, on any orientation; "segsrgan" gives the original's
        numbers and its affine (SEGSRGAN.md section 5)
    interpolate : takes the place of the cubic spline in "segsrgan" geometry (the original's other interpolators,
        see ``fastsrgan.compat``)
    window : weight of a tile's voxels where tiles overlap, "constant" (the paper) or "gaussian"
    batch : tiles per forward pass, "auto" by memory; halved when memory runs out
    precision : "auto" (fp32 on CPU, bf16 on CUDA), "fp32", "bf16" or "fp16"; sums are float32 always

    Raises
    ------
    UsageError, InputError, ResourceError : settings, data or memory that cannot work.
    """
    began = time.perf_counter()
    check_settings(patch, step, new_resolution, geometry, window, batch, precision)
    original = geometry == "segsrgan"
    data, affine = _checked(data_XYZ, affine)
    where = pick_device(str(device))
    precision = pick_precision(precision, where)
    spacing = spacing_of(affine)
    wanted = target_spacing(spacing, data.shape, new_resolution)
    turn = Orientation() if original else processing_orientation(affine)
    norm = normaliser(data)
    if interpolate is None:
        z = upsample_to(norm.apply(turn.apply(data)), turn.permute(spacing), turn.permute(wanted), geometry)
    elif original:
        z, wanted = interpolate(norm.apply(data), spacing, wanted)
    else:
        raise UsageError(
            "interpolation", "only the segsrgan geometry has others than the spline", "--geometry segsrgan"
        )
    plan = tiles.plan(z.shape, _turned(patch, turn), _turned(step, turn), padding="original" if original else "shift")
    out, facts = predict(
        torch.from_numpy(z),
        plan,
        generator,
        turn.permute(spacing)[2],
        device=where,
        precision=precision,
        window=window,
        batch=batch,
        progress=progress,
        label=label,
    )
    sr = np.ascontiguousarray(norm.invert(turn.undo(out[0].numpy())))
    prob = np.ascontiguousarray(turn.undo(out[1:].numpy()))
    if original:
        ratio = [new / old for new, old in zip(wanted, spacing, strict=True)]
        new_affine = affine @ np.diag([*ratio, 1.0])
    else:
        new_affine = resampled_affine(affine, data.shape, sr.shape, wanted)
    warnings = _coarser(spacing, wanted)
    settings = {
        "geometry": geometry,
        "new_resolution": list(wanted),
        "patch": patch,
        "step": step,
        "window": window,
        "precision": precision,
        "device": str(where),
    }
    sizes = {"shape": list(sr.shape), "tiles": len(plan), "tile": list(plan.patch), "processed_axes": list(turn.axes)}
    facts |= {"seconds": time.perf_counter() - began, "warnings": warnings}
    return InferResult(sr, prob, new_affine, {**settings, **sizes, **facts})


def check_settings(
    patch: tiles.PerAxis,
    step: int | Sequence[int],
    new_resolution: Resolution,
    geometry: str,
    window: str,
    batch: str | int,
    precision: str,
) -> None:
    """Raise UsageError for settings of ``infer_volume`` that no volume could be run with."""
    check_geometry(geometry)
    check_window(window)
    tiles.plan((1, 1, 1), patch, step)
    target_spacing((1, 1, 1), (1, 1, 1), new_resolution)
    check_batch(batch)
    check_precision(precision)


def target_spacing(
    spacing_mm: Sequence[float], shape: Sequence[int], new_resolution: Resolution
) -> tuple[float, float, float]:
    """The voxel size of the result in mm, stored axis order; see ``infer_volume``.

    An axis that already has the wanted size (within 1 % of the finest for None; within 0.1 % and with the same number
    of voxels otherwise) keeps its own, so it is not interpolated over rounding in a header.
    Raises UsageError for sizes that are not positive, ResourceError beyond 2^31 voxels.
    """
    own = tuple(float(s) for s in spacing_mm)
    if new_resolution is None:
        finest = min(own)
        wanted = tuple(s if s <= finest * (1 + SAME) else finest for s in own)
    elif isinstance(new_resolution, str):
        if new_resolution != "same":
            raise UsageError("new resolution", f"{new_resolution!r}", "millimetres (one or three numbers), or same")
        wanted = own
    else:
        asked = np.array(new_resolution, float).ravel().tolist()
        asked = asked * 3 if len(asked) == 1 else asked
        if len(asked) != 3 or not all(math.isfinite(r) and r > 0 for r in asked):
            raise UsageError("new resolution", f"{new_resolution}", "one or three positive millimetres")
        wanted = tuple(
            s if abs(r / s - 1) < 1e-3 and grid_size(n, s, r) == n else float(r)
            for r, s, n in zip(asked, own, shape, strict=True)
        )
    voxels = math.prod(n * s / w for n, s, w in zip(shape, own, wanted, strict=True))
    if voxels > MAX_VOXELS:
        sizes = " x ".join(f"{w:g}" for w in wanted)
        raise ResourceError("new resolution", f"{sizes} mm makes {voxels:.3g} voxels", "ask for a coarser resolution")
    return wanted  # type: ignore[return-value]


def _coarser(spacing_mm: Sequence[float], wanted_mm: Sequence[float]) -> list[str]:
    axes = [d for d in range(3) if wanted_mm[d] > spacing_mm[d] * (1 + SAME)]
    if not axes:
        return []
    told = f"the new resolution is coarser than the image along axis {', '.join(map(str, axes))}: details may alias"
    log.warning(told)
    return [told]


def _checked(data_XYZ: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    data, affine = np.asarray(data_XYZ), np.asarray(affine, float)
    if data.ndim != 3 or 0 in data.shape:
        raise InputError("image", f"has the shape {data.shape}", "one volume of three dimensions")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
        raise InputError("affine", "is not an invertible 4 x 4 matrix")
    if not np.isfinite(data).all():
        raise InputError("image", "holds values that are not finite", "replace them, as fastsrgan.images.load does")
    return data, affine


def _turned(value: Any, turn: Orientation) -> Any:
    """A per-axis setting in processed order."""
    return turn.permute(tuple(value)) if isinstance(value, (tuple, list)) and len(value) == 3 else value
