"""One low-resolution volume in, super-resolution and segmentation out (paper section 2.5).

normalise -> interpolate to the wanted grid -> dense overlapping tiles through the generator -> overlap-add -> undo
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.system import memory_of
from fastsrgan.errors import InputError, UsageError, shown
from fastsrgan.infer import anytime, modes, tiles
from fastsrgan.infer.anytime import by_levels
from fastsrgan.infer.memory import NEXT_IMAGE, RESULT_BEFORE, SLABS, Beside, MemoryPlan, TilingJob, plan_memory
from fastsrgan.infer.modes import Together, by_ranks, by_slabs, check_result, find_region, in_memory
from fastsrgan.infer.network import Averaged, TileNetwork, average, deviations, members
from fastsrgan.infer.planes import Interpolated, Prepared, Whole, coarser, masked, target_spacing
from fastsrgan.infer.settings import ZERO, InferSettings, takes_options
from fastsrgan.infer.sweep import GROUP_BATCHES, predict
from fastsrgan.infer.values import AUTO, NONE, ON, flip_axes
from fastsrgan.model.arithmetic import pick_precision
from fastsrgan.model.cpu import forms
from fastsrgan.volume import adapt
from fastsrgan.volume.geometry import (
    Orientation,
    processing_orientation,
    resampled_affine,
    spacing_of,
    upright_axes,
)
from fastsrgan.volume.intensity import normaliser

log = logging.getLogger("fastsrgan")

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
    residual : (x, y, z) float32, the scan minus the result acquired again, on the scan's grid, where it was asked for
    doubt : (X', Y', Z') float32, standard deviation that the error of ``sr`` is taken to have (``volume.doubt``), in
        the input's intensities, where it was asked for

    The arrays on the result's grid may be views of one another's memory; of a volume that was done by slabs they are
    maps of files.
    """

    sr: np.ndarray
    prob: np.ndarray
    affine: np.ndarray
    report: dict
    residual: np.ndarray | None = None
    doubt: np.ndarray | None = None


@takes_options(files=False)
def infer_volume(
    data_XYZ: np.ndarray,
    affine: np.ndarray,
    generator: nn.Module | Sequence[nn.Module],
    *,
    interpolate: Interpolate | None = None,
    scratch: str | os.PathLike | None = None,
    beside: Beside | None = None,
    together: Together | None = None,
    progress: Progress = QUIET,
    label: str = "infer",
    **options: Any,
) -> InferResult:
    """Super-resolve and segment one volume.

    Parameters
    ----------
    data_XYZ : (X, Y, Z) finite image as stored, at least one voxel above zero
    affine : (4, 4) voxel index -> world mm
    generator : ``G(x)``, or ``G(x, res)`` where ``G.spec.conditional``, (B, 1, x, y, z) -> (B, 2 + classes, x, y, z);
        it is moved to the device. Of several, the mean SR and the mean probabilities
    interpolate : takes the place of the cubic spline in "segsrgan" geometry (the original's other interpolators,
        see ``fastsrgan.compat.original``)
    scratch : a folder for the files of a result that does not fit into memory
    beside : what of other volumes is in memory meanwhile, see ``memory.Beside``
    together : the ranks that share this volume, ``scratch`` being on a disk that all of them see; every one of them
        gets the whole result. Their caller tells ``together`` of errors, see ``modes.Together``
    options : patch, step and the others of a volume that ``settings.InferSettings`` describes

    Raises
    ------
    UsageError, InputError, ResourceError : settings, data or memory that cannot work. ModelError : weights that give
        NaN or infinite voxels.
    """
    return process(
        data_XYZ, affine, generator, InferSettings.of(options, files=False), interpolate,
        scratch=scratch, beside=beside, together=together, progress=progress, label=label,
    )  # fmt: skip


def process(
    data_XYZ: np.ndarray,
    affine: np.ndarray,
    generator: nn.Module | Sequence[nn.Module],
    settings: InferSettings,
    interpolate: Interpolate | None = None,
    *,
    scratch: str | os.PathLike | None = None,
    beside: Beside | None = None,
    together: Together | None = None,
    progress: Progress = QUIET,
    label: str = "infer",
) -> InferResult:
    """``infer_volume`` with its options in one object."""
    data, affine = _checked(data_XYZ, affine)
    settings = settings.placed()
    with memory_of(torch.device(settings.device)):
        return _process(data, affine, generator, settings, interpolate, scratch, beside, together, progress, label)


def _process(
    data: np.ndarray,
    affine: np.ndarray,
    generator: nn.Module | Sequence[nn.Module],
    settings: InferSettings,
    interpolate: Interpolate | None,
    scratch: str | os.PathLike | None,
    beside: Beside | None,
    together: Together | None,
    progress: Progress,
    label: str,
) -> InferResult:
    began = time.perf_counter()
    where = torch.device(settings.device)
    settings = replace(settings, precision=pick_precision(settings.precision, where))
    alone = settings.outside == ZERO and isinstance(settings.mask, np.ndarray)
    shown = masked(data, settings.mask) if alone else data
    image = _prepared(shown, affine, settings, interpolate, _shifted(generator, settings.geometry))
    region, what_region = find_region(settings.mask, shown, image)
    image = replace(image, region=region)
    if alone and settings.physical:  # the network sees what is inside the mask, the result agrees with the whole scan
        whole = Interpolated(data, image.turn, image.norm, image.spacing, image.wanted, image.geometry)
        image = replace(image, beyond=whole)
    else:
        data = shown
    agreeing = modes.wanted(image, data, settings, interpolate is not None)
    doubted = agreeing is not None and agreeing.doubt
    upright = upright_axes(affine, image.turn) if settings.upright == ON and settings.physical else None
    network = _network(generator, settings, image, doubted, upright)
    if settings.in_levels and together:
        raise UsageError("budget", "ranks that share a volume would end at different steps", "a fixed --step")
    levels = _levels(image, settings, network.multiple)
    plan = levels[-1].plan
    can_stream = scratch is not None and (isinstance(image.source, Interpolated) or together is not None)
    # Ranks must not choose each for itself.
    with forms.job("fixed" if together else forms.wanted_mode()) as choices:
        memory = _memory(image, plan, network, settings, can_stream, beside, together, agreeing)
        log.info("%s: %s", label, memory.line)
        checked = {}
        if settings.precision_check:
            found = deviations(image.source, plan, network.generator, image.slice_mm, where, settings.precision)
            checked = {"precision_check": found}
        network.settle(memory.batch, plan)
        key = _fingerprint(data, plan, image, network, settings, choices.key()) if memory.mode == SLABS else ""
        if settings.in_levels:
            sr, prob, facts = by_levels(image, levels, network, settings.budget, progress, label)
            plan = levels[len(facts["levels"]) - 1].plan
        elif memory.mode == SLABS:  # of ranks that share a volume it always is
            assert scratch is not None
            by = functools.partial(by_ranks, together=together) if together else by_slabs
            sr, prob, facts = by(image, plan, network, Path(scratch), key, progress=progress, label=label)
        else:
            sr, prob, facts = in_memory(image, plan, network, progress, label)
    odd = check_result((sr, prob), data, settings.precision, label)
    told, left = _finished((sr, prob), data, image, agreeing, network, plan, together, label)
    odd += told.pop("warnings", []) + _idle(settings, agreeing, label)
    averaged = network.generator
    passes = {"flips": NONE if settings.flips == AUTO else settings.flips, "networks": len(members(averaged))}
    report = {
        **settings.report(),
        "new_resolution": list(image.wanted),
        "layer_forms": choices.record(),
        "region": {**(what_region or {}), "outside": ZERO} if alone else what_region,
        "shape": list(sr.shape),
        "tiles": len(plan),
        "tile": list(plan.patch),
        **({"intensity_shift": image.norm.shift} if image.norm.shift else {}),
        **({"intensity_scale": image.norm.scale} if image.norm.top else {}),
        "processed_axes": list(image.turn.axes),
        "memory": memory.to_dict(),
        **({"upright": list(upright)} if upright else {}),
        **(passes if isinstance(averaged, Averaged) else {}),
        **checked,
        **facts,
        **told,
        "seconds": time.perf_counter() - began,
        "warnings": coarser(image.spacing, image.wanted) + odd,
    }
    doubt, prob = (prob[-1], prob[:-1]) if doubted else (None, prob)
    return InferResult(sr, prob, _new_affine(affine, data.shape, sr.shape, image), report, left, doubt)


def _idle(settings: InferSettings, agreeing: modes.Wanted | None, label: str) -> list[str]:
    """A warning of options that say how a result agrees with a scan whose own voxels it has."""
    named = settings.of_agreement
    if agreeing is None or not agreeing.seen.is_identity or not named:
        return []
    warning = f"the result has the scan's own voxels and slices: {' and '.join(named)} not used"
    log.warning("%s: %s", label, warning)
    return [warning]


def _finished(
    done: tuple[np.ndarray, np.ndarray],
    data: np.ndarray,
    image: Prepared,
    agreeing: modes.Wanted | None,
    network: TileNetwork,
    plan: tiles.TilePlan,
    together: Together | None,
    label: str,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """``modes.finish``; of ranks that share a volume the first does it, for all."""
    told: dict[str, Any] = {"agree": None}
    left: np.ndarray | None = None
    if not (together and together.ranks.rank):
        image.put_beyond(image.turn.apply(done[0]))
        if agreeing:
            adapted = functools.partial(_adapted, image=image, what=agreeing, network=network, plan=plan, label=label)
            told, left = modes.finish(*done, data, image, agreeing, adapted, label)
        else:
            image.clear_outside(image.turn.apply(done[0]))
    if together:
        together.vote()
        told = together.ranks.gather(told)[0]
    return told, left


def _adapted(
    sr: np.ndarray,
    scan: np.ndarray,
    weight: float,
    *,
    image: Prepared,
    what: modes.Wanted,
    network: TileNetwork,
    plan: tiles.TilePlan,
    label: str,
) -> dict[str, Any]:
    """``adapt.adapt`` in place, with tiles like those of the result; what it tells."""
    steps = [max(1, edge // 2) for edge in plan.patch]

    around = image.beyond or image.source

    def apply(x: torch.Tensor) -> torch.Tensor:
        own = tiles.plan(x.shape, plan.patch, steps, multiple=network.multiple, window=plan.window)
        made, _ = predict(torch.from_numpy(image.norm.apply(x.numpy())), own, network)
        return torch.from_numpy(image.norm.invert(made[0].numpy()))

    def start(first: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(image.norm.invert(around.planes(first, stop).numpy()))

    old, new = (image.turn.permute(mm)[what.across] for mm in (image.spacing, image.wanted))
    largest = [min(adapt.BLOCK, 2 * edge) for edge in plan.patch]
    down = what.seen.down[what.across]
    assert down is not None  # slices are thicker than the result's planes: adapt.applies
    told = adapt.adapt(
        sr, image.shown(scan), start, apply, what.believed, down, weight, old, new, largest, image.norm.floor,
        network.device, image.share if image.beyond else None,
    )  # fmt: skip
    if told["trials"]:
        gains = told["gain_db_without"], told["gain_db"]
        line = "%s: tried on the scan's own slices, network and agreement gain %.2f dB over interpolation, %.2f if "
        log.info(line + "adapted", label, *gains)
    return told


def _prepared(
    data: np.ndarray, affine: np.ndarray, settings: InferSettings, interpolate: Interpolate | None, shifted: bool
) -> Prepared:
    geometry = settings.geometry
    original = geometry == "segsrgan"
    spacing = spacing_of(affine)
    wanted = target_spacing(spacing, data.shape, settings)
    turn = Orientation() if original else processing_orientation(affine)
    norm = normaliser(data, shifted=shifted, robust=not original)
    source: Interpolated | Whole
    if interpolate is None:
        source = Interpolated(data, turn, norm, spacing, wanted, geometry)
    elif original:
        z, wanted = interpolate(norm.apply(data), spacing, wanted)
        source = Whole(z)
    else:
        reason = "only the segsrgan geometry has others than the spline"
        raise UsageError("interpolation", reason, "--geometry segsrgan")
    return Prepared(source, turn, norm, spacing, wanted, geometry)


def _networks(generator: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """One network, or several. Raises UsageError for none and for what is none."""
    networks: list[Any] = list(generator) if isinstance(generator, (list, tuple)) else [generator]
    if not networks or not all(isinstance(network, nn.Module) for network in networks):
        came = "none given" if not networks else f"{shown(generator)} is no network"
        raise UsageError("generator", came, "one network, as load_generator gives it, or several to be averaged")
    return networks


def _shifted(generator: nn.Module | Sequence[nn.Module], geometry: str) -> bool:
    """Whether the networks were trained on images moved up from below 0. Raises UsageError where only some were."""
    networks = _networks(generator)
    found = {bool(getattr(getattr(network, "spec", None), "shifted", False)) for network in networks}
    if len(found) > 1 and geometry == "physical":
        reason = "some were trained with values below 0 kept, some with them cut: they see different images"
        raise UsageError("weights", reason, "average models that were trained alike")
    return found == {True} and geometry == "physical"


def _network(
    generator: nn.Module | Sequence[nn.Module],
    settings: InferSettings,
    image: Prepared,
    spread: bool,
    upright: tuple[int, int, int] | None,
) -> TileNetwork:
    """The generator, or the average that was asked for, on its device; ``spread`` : with that of its passes."""
    generators = _networks(generator)
    axes = [image.turn.axes.index(axis) for axis in flip_axes(settings.flips)]
    device = torch.device(settings.device)
    one = average(generators, axes, image.slice_mm, device, settings.compile, spread, upright)
    return TileNetwork(one, image.slice_mm, device, settings.precision, settings.compile, settings.batch)


def _memory(
    image: Prepared,
    plan: tiles.TilePlan,
    network: TileNetwork,
    settings: InferSettings,
    can_stream: bool,
    beside: Beside | None,
    together: Together | None,
    agreeing: modes.Wanted | None,
) -> MemoryPlan:
    """The plan; neighbours in memory as it says."""
    # Members of an average work one after the other: the largest one counts.
    parts = members(network.generator)
    largest = max(parts, key=lambda member: sum(p.numel() for p in member.parameters()))
    counted = TileNetwork(largest, image.slice_mm, network.device, settings.precision)
    batch = network.batch
    if together and batch == "auto":
        # A group of slabs is the least that a rank can do: here it is to be one slab.
        batch = min(counted.choose_batch(batch, plan), max(1, plan.grid[1] * plan.grid[2] // GROUP_BATCHES))
    channels = (counted.channels or 2) + bool(agreeing and agreeing.doubt)
    held = image.source.held_bytes if isinstance(image.source, Interpolated) else 0
    averaged = isinstance(network.generator, Averaged)
    after: dict[str, Any] = {"after": agreeing.held_bytes, "tried": bool(agreeing.adapt)} if agreeing else {}
    job = TilingJob(plan, channels, held, settings.in_levels, can_stream, together is not None, averaged, **after)
    memory = plan_memory(job, counted, batch, settings.max_memory, beside)
    if beside:
        beside.settle(memory.has(RESULT_BEFORE), memory.has(NEXT_IMAGE))
    return memory


def _levels(image: Prepared, settings: InferSettings, multiple: int) -> list[anytime.Level]:
    """The steps that may be reached; without a budget it is one. ``multiple``: of the edges of tiles."""
    shape = image.source.shape
    patch, step = _turned(settings.patch, image.turn), _turned(settings.step, image.turn)
    original = image.geometry == "segsrgan"
    more: dict[str, Any] = {"multiple": multiple, "window": settings.window}
    if not settings.in_levels:
        assert not isinstance(step, str)
        padding = "original" if original else "shift"
        return [anytime.Level((), tiles.plan(shape, patch, step, padding=padding, **more))]
    if original:
        raise UsageError("budget", "the segsrgan geometry pads differently for every step", "--geometry physical")
    return anytime.levels(shape, patch, step, **more)


def _new_affine(affine: np.ndarray, old: tuple[int, ...], new: tuple[int, ...], image: Prepared) -> np.ndarray:
    if image.geometry == "segsrgan":
        ratio = [b / a for a, b in zip(image.spacing, image.wanted, strict=True)]
        return affine @ np.diag([*ratio, 1.0])
    return resampled_affine(affine, old, new, image.wanted)


def _fingerprint(
    data: np.ndarray,
    plan: tiles.TilePlan,
    image: Prepared,
    network: TileNetwork,
    settings: InferSettings,
    layer_forms: list,
) -> str:
    """What a result depends on, in short."""
    mask = settings.mask
    what = (plan, image.wanted, settings.deciding(), settings.device, layer_forms, data.shape, data.dtype.str)
    digest = hashlib.blake2b(repr(what).encode(), digest_size=16)
    arrays = [data, *([np.asarray(mask)] if mask is not None and not isinstance(mask, str) else [])]
    for array in arrays:
        for plane in array:
            digest.update(np.ascontiguousarray(plane).data)
    digest.update(mask.encode() if isinstance(mask, str) else b"")
    for name, weight in sorted(network.generator.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checked(data_XYZ: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    data, affine = np.asarray(data_XYZ), np.asarray(affine, float)
    if data.ndim != 3 or 0 in data.shape:
        raise InputError("image", f"has the shape {data.shape}", "one volume of three dimensions")
    if data.dtype.kind not in "biuf":
        raise InputError("image", f"holds numbers of the type {data.dtype}", "real numbers")
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
        raise InputError("affine", "is not an invertible 4 x 4 matrix", "voxel to world in mm, as nibabel gives it")
    if not all(np.isfinite(plane).all() for plane in data):
        raise InputError("image", "holds values that are not finite", "replace them, as fastsrgan.io.nifti.load does")
    return data, affine


def _turned(value: Any, turn: Orientation) -> Any:
    """A per-axis setting in processed order."""
    return turn.permute(tuple(value)) if isinstance(value, (tuple, list)) and len(value) == 3 else value
