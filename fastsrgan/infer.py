"""One low-resolution volume in, super-resolution and segmentation out (paper section 2.5, DESIGN D12).

normalise -> interpolate to the wanted grid -> dense overlapping tiles through the generator -> overlap-add -> undo
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsrgan import anytime, tiles
from fastsrgan.deviation import deviations
from fastsrgan.engine import check_batch, check_precision, pick_precision
from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.geometry import Orientation, grid_size, processing_orientation, resampled_affine, spacing_of
from fastsrgan.infer_ways import How, Prepared, by_slabs, find_region, in_memory, within
from fastsrgan.intensity import normaliser
from fastsrgan.interpolated import Interpolated
from fastsrgan.memory_plan import SLABS, Job, plan_memory
from fastsrgan.resample import SAME, check_geometry
from fastsrgan.runtime import QUIET, Progress, pick_device
from fastsrgan.slabs import Whole
from fastsrgan.windows import check_window

log = logging.getLogger("fastsrgan")

MAX_VOXELS = 2**31  # of the interpolated grid
BUDGET = 60.0  # seconds that step "auto" takes when none are given

Resolution = str | float | Sequence[float] | None  # see infer_volume
Step = str | int | Sequence[int]
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

    Both arrays may be views of one another's memory; of a volume that was done by slabs they are maps of files.
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
    step: Step = 30,
    new_resolution: Resolution = None,
    device: str | torch.device = "auto",
    geometry: str = "physical",
    interpolate: Interpolate | None = None,
    window: str = "constant",
    batch: str | int = "auto",
    precision: str = "auto",
    budget: float | None = None,
    mask: np.ndarray | str | None = None,
    max_memory: int | None = None,
    scratch: str | os.PathLike | None = None,
    precision_check: bool = False,
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
    patch, step : of the tiles in voxels of the new grid, one or one per stored axis; see ``tiles.plan``. Step "auto":
        as dense as the budget allows
    new_resolution : voxel size of the result in mm: None, isotropic at the finest of the input's; one number; one per
        stored axis; or "same", the input's own
    geometry : "physical" keeps every structure where it was, on any orientation; "segsrgan" gives the original's
        numbers and its affine (SEGSRGAN.md section 5)
    interpolate : takes the place of the cubic spline in "segsrgan" geometry (the original's other interpolators,
        see ``fastsrgan.compat``)
    window : weight of a tile's voxels where tiles overlap, "constant" (the paper) or "gaussian"
    batch : tiles per forward pass, "auto" by memory; halved when memory runs out
    precision : "auto" (fp32 on CPU, bf16 on CUDA), "fp32", "bf16" or "fp16"; sums are float32 always
    budget : seconds for the tiles: ever denser steps, each twice as dense, down to ``step``, as long as they fit;
        see ``anytime``
    mask : (X, Y, Z), above zero where results are wanted, or "head": the box around what is brighter than air.
        Elsewhere SR is the interpolated image and the probabilities are 0; tiles that do not touch it are not computed
    max_memory : bytes on the host beside the image; None takes what is free. What does not fit is done by slabs into
        ``scratch``, a folder for the result's files, or refused. A run that was killed goes on at its last slab.
    precision_check : measure what the precision costs on a few tiles, for the report

    Raises
    ------
    UsageError, InputError, ResourceError : settings, data or memory that cannot work.
    """
    began = time.perf_counter()
    check_settings(patch, step, new_resolution, geometry, window, batch, precision, budget, max_memory)
    data, affine = _checked(data_XYZ, affine)
    where = pick_device(str(device))
    precision = pick_precision(precision, where)
    image = _prepared(data, affine, new_resolution, geometry, interpolate)
    region, told = find_region(mask, data, image)
    how = How(generator, where, precision, window, region, progress, label)
    by_levels = step == "auto" or budget is not None
    levels = _levels(image, patch, step, by_levels)
    plan = levels[-1].plan
    network = how.network(image)
    held = image.source.held_bytes if isinstance(image.source, Interpolated) else 0
    can_stream = scratch is not None and isinstance(image.source, Interpolated)
    job = Job(plan, network.channels or 2, window, held, by_levels, can_stream)
    memory = plan_memory(job, network, batch, max_memory)
    log.info("%s: %s", label, memory.line)
    checked = {}
    if precision_check:
        checked = {"precision_check": deviations(image.source, plan, generator, image.slice_mm, where, precision)}
    if by_levels:
        sr, prob, facts = within(image, levels, how, memory.batch, BUDGET if budget is None else budget)
        plan = levels[len(facts["levels"]) - 1].plan
    elif memory.mode == SLABS:
        key = _fingerprint(data, mask, generator, [plan, geometry, image.wanted, window, precision, str(where)])
        assert scratch is not None
        sr, prob, facts = by_slabs(image, plan, how, memory.batch, Path(scratch), key)
    else:
        sr, prob, facts = in_memory(image, plan, how, memory.batch)
    report = {
        "geometry": geometry,
        "new_resolution": list(image.wanted),
        "patch": patch,
        "step": step,
        "window": window,
        "precision": precision,
        "device": str(where),
        "budget": budget,
        "region": told,
        "shape": list(sr.shape),
        "tiles": len(plan),
        "tile": list(plan.patch),
        "processed_axes": list(image.turn.axes),
        "memory": memory.to_dict(),
        **checked,
        **facts,
        "seconds": time.perf_counter() - began,
        "warnings": _coarser(image.spacing, image.wanted),
    }
    return InferResult(sr, prob, _new_affine(affine, data.shape, sr.shape, image), report)


def _prepared(
    data: np.ndarray, affine: np.ndarray, new_resolution: Resolution, geometry: str, interpolate: Interpolate | None
) -> Prepared:
    original = geometry == "segsrgan"
    spacing = spacing_of(affine)
    wanted = target_spacing(spacing, data.shape, new_resolution)
    turn = Orientation() if original else processing_orientation(affine)
    norm = normaliser(data)
    source: Interpolated | Whole
    if interpolate is None:
        source = Interpolated(data, turn, norm, spacing, wanted, geometry)
    elif original:
        z, wanted = interpolate(norm.apply(data), spacing, wanted)
        source = Whole(z)
    else:
        raise UsageError(
            "interpolation", "only the segsrgan geometry has others than the spline", "--geometry segsrgan"
        )
    return Prepared(source, turn, norm, spacing, wanted, geometry)


def _levels(image: Prepared, patch: tiles.PerAxis, step: Step, by_levels: bool) -> list[anytime.Level]:
    """The steps that may be reached; without a budget it is one."""
    shape, patch, step = image.source.shape, _turned(patch, image.turn), _turned(step, image.turn)
    original = image.geometry == "segsrgan"
    if not by_levels:
        assert not isinstance(step, str)
        return [anytime.Level((), tiles.plan(shape, patch, step, padding="original" if original else "shift"))]
    if original:
        raise UsageError("budget", "the segsrgan geometry pads differently for every step", "--geometry physical")
    return anytime.levels(shape, patch, step)


def _new_affine(affine: np.ndarray, old: tuple[int, ...], new: tuple[int, ...], image: Prepared) -> np.ndarray:
    if image.geometry == "segsrgan":
        ratio = [b / a for a, b in zip(image.spacing, image.wanted, strict=True)]
        return affine @ np.diag([*ratio, 1.0])
    return resampled_affine(affine, old, new, image.wanted)


def _fingerprint(data: np.ndarray, mask: Any, generator: nn.Module, settings: list) -> str:
    """What a result depends on, in short."""
    digest = hashlib.blake2b(repr((settings, data.shape, data.dtype.str)).encode(), digest_size=16)
    arrays = [data, *([np.asarray(mask)] if mask is not None and not isinstance(mask, str) else [])]
    for array in arrays:
        for plane in array:
            digest.update(np.ascontiguousarray(plane).data)
    digest.update(mask.encode() if isinstance(mask, str) else b"")
    for name, weight in sorted(generator.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
) -> None:
    """Raise UsageError for settings of ``infer_volume`` that no volume could be run with."""
    check_geometry(geometry)
    check_window(window)
    if isinstance(step, str):
        anytime.levels((1, 1, 1), patch, step)
    else:
        tiles.plan((1, 1, 1), patch, step)
    target_spacing((1, 1, 1), (1, 1, 1), new_resolution)
    check_batch(batch)
    check_precision(precision)
    if budget is not None and not (math.isfinite(budget) and budget >= 0):
        raise UsageError("budget", f"{budget}", "seconds, 0 for the first level")
    if max_memory is not None and max_memory < 1:
        raise UsageError("max memory", f"{max_memory}", "a number of bytes from 1 up")


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
    if not all(np.isfinite(plane).all() for plane in data):
        raise InputError("image", "holds values that are not finite", "replace them, as fastsrgan.images.load does")
    return data, affine


def _turned(value: Any, turn: Orientation) -> Any:
    """A per-axis setting in processed order."""
    return turn.permute(tuple(value)) if isinstance(value, (tuple, list)) and len(value) == 3 else value
