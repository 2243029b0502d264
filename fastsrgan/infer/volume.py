"""One low-resolution volume in, super-resolution and segmentation out (paper section 2.5, DESIGN D12).

normalise -> interpolate to the wanted grid -> dense overlapping tiles through the generator -> overlap-add -> undo
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsrgan.core.runtime import QUIET, Progress, pick_device
from fastsrgan.errors import InputError, UsageError
from fastsrgan.infer import anytime, tiles
from fastsrgan.infer.averaged import NONE, Averaged, average, flip_axes, members
from fastsrgan.infer.deviation import deviations
from fastsrgan.infer.engine import pick_precision
from fastsrgan.infer.interpolated import Interpolated
from fastsrgan.infer.memory import NEXT_IMAGE, RESULT_BEFORE, SLABS, Beside, Job, MemoryPlan, plan_memory
from fastsrgan.infer.modes import How, Prepared, by_slabs, find_region, in_memory, looked_at, within
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Whole
from fastsrgan.infer.settings import Resolution as Resolution
from fastsrgan.infer.settings import Step as Step
from fastsrgan.infer.settings import check_settings as check_settings
from fastsrgan.infer.settings import coarser
from fastsrgan.infer.settings import target_spacing as target_spacing
from fastsrgan.infer.split import Together, by_ranks
from fastsrgan.infer.sweep import GROUP_BATCHES
from fastsrgan.model.cpu import forms
from fastsrgan.volume.geometry import Orientation, processing_orientation, resampled_affine, spacing_of
from fastsrgan.volume.intensity import normaliser

log = logging.getLogger("fastsrgan")

BUDGET = 60.0  # seconds that step "auto" takes when none are given

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
    generator: nn.Module | Sequence[nn.Module],
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
    compile: str = "auto",
    budget: float | None = None,
    mask: np.ndarray | str | None = None,
    max_memory: int | None = None,
    scratch: str | os.PathLike | None = None,
    precision_check: bool = False,
    flips: str = NONE,
    beside: Beside | None = None,
    together: Together | None = None,
    progress: Progress = QUIET,
    label: str = "infer",
) -> InferResult:
    """Super-resolve and segment one volume.

    Parameters
    ----------
    data_XYZ : (X, Y, Z) finite image as stored, at least one voxel above zero
    affine : (4, 4) voxel index -> world mm
    generator : ``G(x)``, or ``G(x, res)`` where ``G.spec.conditional``, (B, 1, x, y, z) -> (B, 2 + classes, x, y, z);
        it is moved to the device. Of several, the mean SR and the mean probabilities
    patch, step : of the tiles in voxels of the new grid, one or one per stored axis; see ``tiles.plan``. Step "auto":
        as dense as the budget allows
    new_resolution : voxel size of the result in mm: None, isotropic at the finest of the input's; one number; one per
        stored axis; or "same", the input's own
    geometry : "physical" keeps every structure where it was, on any orientation; "segsrgan" gives the original's
        numbers and its affine (SEGSRGAN.md section 5)
    interpolate : takes the place of the cubic spline in "segsrgan" geometry (the original's other interpolators,
        see ``fastsrgan.compat.original``)
    window : weight of a tile's voxels where tiles overlap, "constant" (the paper) or "gaussian"
    batch : tiles per forward pass, "auto" by memory; halved when memory runs out
    precision : "auto" (fp32 on CPU, fp16 on CUDA), "fp32", "bf16" or "fp16"; sums are float32 always
    compile : "on": the network through torch.compile, on CUDA as one graph; "off"; "auto": on CUDA devices where it was
        seen right (``compiled.SEEN_RIGHT``)
    budget : seconds for the tiles: ever denser steps, each twice as dense, down to ``step``, as long as they fit;
        see ``anytime``
    mask : (X, Y, Z), above zero where results are wanted, or "head": the box around what is brighter than air.
        Elsewhere SR is the interpolated image and the probabilities are 0; tiles that do not touch it are not computed
    max_memory : bytes on the host beside the image; None takes what is free. What does not fit is done by slabs into
        ``scratch``, a folder for the result's files, or refused. A run that was killed goes on at its last slab.
    precision_check : measure what the precision costs on a few tiles, for the report
    flips : "none", or axes of the image such as "x" or "xyz": the mean over all mirror images of each tile
    beside : what of other volumes is in memory meanwhile, see ``memory_plan.Beside``
    together : the ranks that share this volume, ``scratch`` being on a disk that all of them see; every one of them
        gets the whole result. Their caller tells ``together`` of errors, see ``split.Together``

    Raises
    ------
    UsageError, InputError, ResourceError : settings, data or memory that cannot work. ModelError : weights that give
        NaN or infinite voxels.
    """
    began = time.perf_counter()
    check_settings(patch, step, new_resolution, geometry, window, batch, precision, budget, max_memory, flips, compile)
    data, affine = _checked(data_XYZ, affine)
    where = pick_device(str(device))
    precision = pick_precision(precision, where)
    image = _prepared(data, affine, new_resolution, geometry, interpolate)
    region, told = find_region(mask, data, image)
    generator = _one_network(generator, flips, image, where, compile)
    how = How(generator, where, precision, window, region, progress, label, compile)
    by_levels = step == "auto" or budget is not None
    if by_levels and together:
        raise UsageError("budget", "ranks that share a volume would end at different steps", "a fixed --step")
    levels = _levels(image, patch, step, by_levels)
    plan = levels[-1].plan
    can_stream = scratch is not None and (isinstance(image.source, Interpolated) or together is not None)
    # Ranks must not choose each for itself.
    with forms.job("fixed" if together else forms.wanted_mode()) as choices:
        memory = _memory(image, plan, how, batch, by_levels, can_stream, max_memory, beside, together)
        checked = {}
        if precision_check:
            checked = {"precision_check": deviations(image.source, plan, generator, image.slice_mm, where, precision)}
        key = ""
        if memory.mode == SLABS:
            settings = [plan, geometry, image.wanted, window, precision, compile, str(where), flips, choices.key()]
            key = _fingerprint(data, mask, generator, settings)
        if by_levels:
            sr, prob, facts = within(image, levels, how, memory.batch, BUDGET if budget is None else budget)
            plan = levels[len(facts["levels"]) - 1].plan
        elif together:
            assert scratch is not None
            sr, prob, facts = by_ranks(image, plan, how, memory.batch, Path(scratch), key, together)
        elif memory.mode == SLABS:
            assert scratch is not None
            sr, prob, facts = by_slabs(image, plan, how, memory.batch, Path(scratch), key)
        else:
            sr, prob, facts = in_memory(image, plan, how, memory.batch)
    odd = looked_at((sr, prob), data, precision, label)
    averaged = {"flips": flips, "networks": len(members(generator))} if isinstance(generator, Averaged) else {}
    report = {
        "geometry": geometry,
        "new_resolution": list(image.wanted),
        "patch": patch,
        "step": step,
        "window": window,
        "precision": precision,
        "compile": compile,
        "layer_forms": choices.record(),
        "device": str(where),
        "budget": budget,
        "region": told,
        "shape": list(sr.shape),
        "tiles": len(plan),
        "tile": list(plan.patch),
        "processed_axes": list(image.turn.axes),
        "memory": memory.to_dict(),
        **averaged,
        **checked,
        **facts,
        "seconds": time.perf_counter() - began,
        "warnings": coarser(image.spacing, image.wanted) + odd,
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


def _one_network(
    generator: nn.Module | Sequence[nn.Module], flips: str, image: Prepared, where: torch.device, compile: str
) -> nn.Module:
    """The generator, or the average that was asked for."""
    generators = [generator] if isinstance(generator, nn.Module) else list(generator)
    if not generators:
        raise UsageError("generator", "none given", "one network, or several to be averaged")
    axes = [image.turn.axes.index(axis) for axis in flip_axes(flips)]
    return average(generators, axes, image.slice_mm, where, compile)


def _memory(
    image: Prepared,
    plan: tiles.TilePlan,
    how: How,
    batch: str | int,
    by_levels: bool,
    can_stream: bool,
    max_memory: int | None,
    beside: Beside | None,
    together: Together | None,
) -> MemoryPlan:
    """The plan, told; neighbours in memory as it says."""
    # Members of an average work one after the other: the largest one counts.
    parts = members(how.generator)
    largest = max(parts, key=lambda member: sum(p.numel() for p in member.parameters()))
    network = TileNetwork(largest, image.slice_mm, how.device, how.precision)
    if together and batch == "auto":
        # A group of slabs is the least that a rank can do: here it is to be one slab.
        batch = min(network.choose_batch(batch, plan), max(1, plan.grid[1] * plan.grid[2] // GROUP_BATCHES))
    job = Job(
        plan,
        network.channels or 2,
        how.window,
        image.source.held_bytes if isinstance(image.source, Interpolated) else 0,
        by_levels,
        can_stream,
        together is not None,
        isinstance(how.generator, Averaged),
    )
    memory = plan_memory(job, network, batch, max_memory, beside)
    if beside:
        beside.settle(memory.has(RESULT_BEFORE), memory.has(NEXT_IMAGE))
    log.info("%s: %s", how.label, memory.line)
    return memory


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


def _checked(data_XYZ: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    data, affine = np.asarray(data_XYZ), np.asarray(affine, float)
    if data.ndim != 3 or 0 in data.shape:
        raise InputError("image", f"has the shape {data.shape}", "one volume of three dimensions")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
        raise InputError("affine", "is not an invertible 4 x 4 matrix", "voxel to world in mm, as nibabel gives it")
    if not all(np.isfinite(plane).all() for plane in data):
        raise InputError("image", "holds values that are not finite", "replace them, as fastsrgan.io.nifti.load does")
    return data, affine


def _turned(value: Any, turn: Orientation) -> Any:
    """A per-axis setting in processed order."""
    return turn.permute(tuple(value)) if isinstance(value, (tuple, list)) and len(value) == 3 else value
