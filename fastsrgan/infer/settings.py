"""What may be asked of an inference, checked before any image is read; the voxel size of a result."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from fastsrgan.config import CHOICES
from fastsrgan.errors import InputError, ResourceError, UsageError, times
from fastsrgan.infer import anytime, tiles
from fastsrgan.infer.averaged import NONE, flip_axes
from fastsrgan.infer.network import check_batch
from fastsrgan.infer.windows import check_window
from fastsrgan.io.nifti_header import SPACING_LIMITS
from fastsrgan.model.precision import check_precision
from fastsrgan.volume.geometry import grid_size
from fastsrgan.volume.resample import SAME, check_geometry

log = logging.getLogger("fastsrgan")

MAX_VOXELS = 2**31  # of the interpolated grid
GROWTH = 200  # times the image's voxels, unasked: 10 mm slices of 0.2 mm pixels give 50

Resolution = str | float | Sequence[float] | None  # see infer.infer_volume
Step = str | int | Sequence[int]


def check_settings(
    patch: tiles.PerAxis,
    step: Step,
    new_resolution: Resolution,
    geometry: str,
    window: str,
    batch: str | int,
    precision: str,
    budget: float | None = None,
    max_memory: int | None = None,
    flips: str = NONE,
    compile: str = "auto",
) -> None:
    """Raise UsageError for settings of ``infer.infer_volume`` that no volume could be run with."""
    check_geometry(geometry)
    check_window(window)
    if isinstance(step, str):
        anytime.levels((1, 1, 1), patch, step)
    else:
        tiles.plan((1, 1, 1), patch, step)
    target_spacing((1, 1, 1), (1, 1, 1), new_resolution)
    check_batch(batch)
    check_precision(precision)
    flip_axes(flips)
    if compile not in CHOICES["compile"]:
        raise UsageError("compile", f"{compile!r} is not allowed", ", ".join(CHOICES["compile"]))
    if budget is not None and not (math.isfinite(budget) and budget >= 0):
        raise UsageError("budget", f"{budget} is not allowed", "seconds, 0 for the first level")
    if max_memory is not None and max_memory < 1:
        raise UsageError("max memory", f"{max_memory} is not allowed", "a number of bytes from 1 up")


def target_spacing(
    spacing_mm: Sequence[float], shape: Sequence[int], new_resolution: Resolution
) -> tuple[float, float, float]:
    """The voxel size of the result in mm, stored axis order; see ``infer.infer_volume``.

    An axis that already has the wanted size (within 1 % of the finest for None; within 0.1 % and with the same number
    of voxels otherwise) keeps its own, so it is not interpolated over rounding in a header.
    Raises UsageError for sizes that are not positive, ResourceError beyond 2^31 voxels, InputError where nothing was
    asked for and the image's own sizes would make it more than 200 times as large.
    """
    own = tuple(float(s) for s in spacing_mm)
    if new_resolution is None:
        finest = min(own)
        wanted = tuple(s if s <= finest * (1 + SAME) else finest for s in own)
    elif isinstance(new_resolution, str):
        if new_resolution != "same":
            raise UsageError(
                "new resolution", f"{new_resolution!r} is not allowed", "millimetres (one or three numbers), or same"
            )
        wanted = own
    else:
        asked = np.array(new_resolution, float).ravel().tolist()
        asked = asked * 3 if len(asked) == 1 else asked
        if len(asked) != 3 or not all(math.isfinite(r) and r > 0 for r in asked):
            raise UsageError("new resolution", f"{new_resolution} is not allowed", "one or three positive millimetres")
        if not all(SPACING_LIMITS[0] <= r <= SPACING_LIMITS[1] for r in asked):
            hint = "from {:g} to {:g} mm".format(*SPACING_LIMITS)
            raise UsageError("new resolution", f"{new_resolution} is no size of voxels", hint)
        wanted = tuple(
            s if abs(r / s - 1) < 1e-3 and grid_size(n, s, r) == n else float(r)
            for r, s, n in zip(asked, own, shape, strict=True)
        )
    voxels = math.prod(n * s / w for n, s, w in zip(shape, own, wanted, strict=True))
    if voxels > MAX_VOXELS:
        sizes = " x ".join(f"{w:g}" for w in wanted)
        raise ResourceError("new resolution", f"{sizes} mm makes {voxels:.3g} voxels", "ask for a coarser resolution")
    if new_resolution is None and voxels > GROWTH * math.prod(shape):
        reason = (
            f"voxels of {times(own)} mm: {min(own):g} mm along all axes makes {voxels:.3g} voxels of {math.prod(shape)}"
        )
        raise InputError("image", reason, "correct the header, or say --new-resolution MM if the sizes are right")
    return wanted  # type: ignore[return-value]


def coarser(spacing_mm: Sequence[float], wanted_mm: Sequence[float]) -> list[str]:
    """A warning, logged and given back, where the result has larger voxels than the image."""
    axes = [d for d in range(3) if wanted_mm[d] > spacing_mm[d] * (1 + SAME)]
    if not axes:
        return []
    told = f"the new resolution is coarser than the image along axis {', '.join(map(str, axes))}: details may alias"
    log.warning(told)
    return [told]
