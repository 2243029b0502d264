"""The ways of doing one volume: in memory, by slabs into files, over the ranks of a machine (see also ``anytime``).

Over ranks, each does a range of planes, into files that all of them have mapped. A rank begins at the group of slabs
that its first plane needs, as a run that goes on after a kill does, and ends with its last plane: the same groups, the
same batches, the same bytes as one process. The price are the tiles that reach over a seam, which both sides compute:
up to a patch of planes at each seam. Ranges are chosen so that the slowest rank has as few slabs as possible; where a
volume not much longer than a patch gains little, a warning says so.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.ranks import Ranks
from fastsrgan.errors import FastsrganError, ModelError, ResourceError, UsageError, brief, counted
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Done, Prepared, Results, Unfinished, keep_empty, nearest, wrong_mask
from fastsrgan.infer.settings import HEAD, InferSettings
from fastsrgan.infer.sweep import Sweep, predict, stream
from fastsrgan.infer.tiles import Region, from_box, from_mask, head_box
from fastsrgan.infer.values import AUTO, OFF
from fastsrgan.volume import adapt
from fastsrgan.volume.acquisition import Assumed, assumed, choose_weight, lacking_sd, rounded
from fastsrgan.volume.consistency import SLAB_BYTES, Observation, agree, cuts, observation, residual
from fastsrgan.volume.doubt import doubt_, summary
from fastsrgan.volume.head import air
from fastsrgan.volume.profile import shown
from fastsrgan.volume.resample import slice_axis

log = logging.getLogger("fastsrgan")

BRIGHTER = 10  # times as bright as the image: no tissue is


def in_memory(
    image: Prepared,
    plan: tiles.TilePlan,
    network: TileNetwork,
    progress: Progress = QUIET,
    label: str = "infer",
) -> Done:
    """``sweep.predict``."""
    out, facts = predict(image.whole(), plan, network, region=image.region, progress=progress, label=label)
    return *image.stored(out), facts


def by_slabs(
    image: Prepared,
    plan: tiles.TilePlan,
    network: TileNetwork,
    folder: Path,
    key: str,
    progress: Progress = QUIET,
    label: str = "infer",
) -> Done:
    """``sweep.stream`` into files in ``folder``; goes on where a killed run with the same ``key`` ended."""
    files = Unfinished(folder, key, result_shapes(image, plan, network), plan.shape[0], {"batch": network.batch})
    begun_at = files.done

    def write(first: int, planes: Tensor) -> None:
        Results(files.arrays["sr"], files.arrays["prob"], image.turn, image.norm)(first, planes)
        files.note(first + planes.shape[1])

    # The batch of the run that began: other batches would round otherwise.
    network.batch = files.facts["batch"]
    more: dict[str, Any] = {"region": image.region, "done": files.done, "progress": progress, "label": label}
    facts = stream(image.source, plan, network, write, **more)
    arrays = files.finish()
    return arrays["sr"], arrays["prob"], facts | {"begun_at_plane": begun_at}


def result_shapes(image: Prepared, plan: tiles.TilePlan, network: TileNetwork) -> dict[str, Sequence[int]]:
    """Of SR and probabilities, stored axes."""
    shape = [0, 0, 0]
    for axis, n in zip(image.turn.axes, plan.shape, strict=True):
        shape[axis] = n
    channels = network.channels or network.probe(plan.patch).channels
    return {"sr": shape, "prob": (channels - 1, *shape)}


def find_region(
    mask: np.ndarray | str | None, data_XYZ: np.ndarray, image: Prepared
) -> tuple[Region | None, dict | None]:
    """Where results are wanted, on the grid that tiles are cut from, and what the report says about it.

    Raises UsageError for an unknown name, InputError for a mask of another size or without a voxel.
    """
    if mask is None:
        return None, None
    turn = image.turn
    old, new = turn.permute(image.spacing), turn.permute(image.wanted)
    index = nearest(turn.permute(data_XYZ.shape), old, image.source.shape, new, image.geometry)
    if isinstance(mask, str):
        if mask != HEAD:
            raise UsageError("mask", f"{mask!r} is not allowed", f"an array, or {HEAD}")
        low, high = head_box(turn.apply(data_XYZ), old)
        return from_box(low, high, index), {"kind": "box, processed axes", "first": list(low), "last": list(high)}
    if np.shape(mask) != data_XYZ.shape:
        raise wrong_mask(mask, data_XYZ)
    region = from_mask(turn.apply(np.asarray(mask)), index)
    return region, {"kind": "mask", "voxels": int(np.count_nonzero(region.mask))}


def check_result(done: tuple[np.ndarray, np.ndarray], data_XYZ: np.ndarray, precision: str, label: str) -> list[str]:
    """Warnings about a result that no image has: one value everywhere, or far brighter than the image it is made of.

    Raises ModelError where a voxel is NaN or infinite: weights that are finite may still give that.
    """
    low, high = np.inf, -np.inf
    for number, volume in enumerate((done[0], *done[1])):
        for plane in volume.transpose(np.argsort(volume.strides)[::-1]):  # as it lies in memory
            least, most = float(plane.min()), float(plane.max())  # of a plane with NaN both are
            if not (np.isfinite(least) and np.isfinite(most)):
                other = "" if precision == "fp32" else "--precision fp32, or "
                reason = "give voxels that are NaN or infinite: they are damaged, or their training diverged"
                raise ModelError("weights", reason, f"{other}other weights")
            low, high = (min(low, least), max(high, most)) if number == 0 else (low, high)
    brightest, floor = max(float(plane.max()) for plane in data_XYZ), min(0.0, float(data_XYZ.min()))
    warnings = []
    if low == high and data_XYZ.min() < brightest:
        warnings.append(f"every voxel of the SR image is {low:g}: the weights may be damaged, try others")
    if high - floor > BRIGHTER * (brightest - floor):
        told = f"the SR image reaches {high:.4g}, the image {brightest:.4g}"
        warnings.append(f"{told}: the weights may be damaged, try others")
    for warning in warnings:
        log.warning("%s: %s", label, warning)
    return warnings


# --- over ranks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Planes ``first`` ... ``stop`` of a volume, and the ``slabs`` of tiles that are computed for them."""

    first: int
    stop: int
    slabs: int


class Together:
    """What all ranks do with one volume: every rank calls ``vote`` as often as the others, whatever goes wrong on it.

    There are four votes: before and after the files are made, after the tiles, and after the last step on the whole.
    One who failed tells the others in the vote that it has not reached; they raise ResourceError with its reason.
    """

    def __init__(self, ranks: Ranks) -> None:
        if ranks.local_world != ranks.world:
            reason = "the ranks are on several machines"
            raise UsageError("--split-volume", reason, "one machine, or whole volumes each")
        if ranks.world == 1:
            raise UsageError("--split-volume", "one process has nobody to share with", "torchrun --nproc-per-node N")
        self.ranks, self.left = ranks, 4

    def vote(self, value: int = 0, error: BaseException | None = None) -> int:
        """Wait for all ranks; the smallest of their values. ResourceError where another one failed and this did not."""
        self.left -= 1
        kind = "" if error is None or isinstance(error, FastsrganError) else f"{type(error).__name__}: "
        own = None if error is None else f"{kind}{error}"
        reports = self.ranks.gather([own, value])
        failed = [(r, text) for r, (text, _) in enumerate(reports) if text]
        if failed:
            self.left = 0
            if error is None:
                rank, text = failed[0]
                raise ResourceError(f"rank {rank}", text, "the other ranks ended with it")
        return min(number for _, number in reports)

    def failed(self, error: BaseException) -> None:
        """Tell the others, unless they know."""
        if self.left:
            self.vote(error=error)


def shares(sweep: Sweep, world: int) -> list[Share]:
    """The planes of each rank: contiguous, all of them, with the smallest possible number of slabs for the one with
    most; ranks for which none are left have no planes."""
    origins, n, before = sweep.plan.origins[0], sweep.plan.shape[0], sweep.plan.pad_before[0]
    for most in range(1, len(origins) + 1):
        result: list[Share] = []
        at = 0
        while at < n and len(result) < world:
            first = sweep.restart(at)
            last = min(first + most, len(origins))
            stop = n if last == len(origins) else min(n, max(0, origins[last] - before))
            if stop <= at:
                break
            result.append(Share(at, stop, last - first))
            at = stop
        if at == n:
            return result + [Share(n, n, 0)] * (world - len(result))
    raise AssertionError("one rank can do all slabs")


class _Enough(Exception):
    """All planes of this rank are written."""


def by_ranks(
    image: Prepared,
    plan: tiles.TilePlan,
    network: TileNetwork,
    folder: Path,
    key: str,
    together: Together,
    progress: Progress,
    label: str,
) -> Done:
    """This rank's planes into files in ``folder``; afterwards the whole result, mapped, on every rank.

    Raises ResourceError where another rank failed.
    """
    ranks, began = together.ranks, time.perf_counter()
    # One batch on all ranks: with less memory on one of them they would round differently.
    assert isinstance(network.batch, int)  # of the memory plan
    network.batch = together.vote(network.batch)
    network.choose_batch(network.batch, plan)
    parts = shares(Sweep(image.source, plan, network), ranks.world)
    mine, per_slab = parts[ranks.rank], plan.grid[1] * plan.grid[2]
    files = None
    if ranks.rank == 0:
        _tell(parts, plan, label)
        files = Unfinished(folder, f"{key} split", result_shapes(image, plan, network), plan.shape[0])
    together.vote()
    arrays = files.arrays if files else _mapped(folder)
    sink = Results(arrays["sr"], arrays["prob"], image.turn, image.norm)

    shown = _ShareOfProgress(progress, mine.slabs * per_slab)

    def write(first: int, planes: Tensor) -> None:
        sink(first, planes[:, : mine.stop - first])
        if first + planes.shape[1] >= mine.stop:
            shown.complete()
            raise _Enough

    with contextlib.suppress(_Enough):
        if mine.first < mine.stop:
            more: dict[str, Any] = {"region": image.region, "done": mine.first, "progress": shown, "label": label}
            stream(image.source, plan, network, write, **more)
    seconds = time.perf_counter() - began
    together.vote()
    if files is not None:
        files.note(plan.shape[0])
        arrays = files.finish()
    computed = sum(part.slabs for part in parts)
    facts = {
        "batch": network.size,
        "tile_seconds": seconds,
        "tiles_per_second": computed * per_slab / seconds,
        "split": {
            "ranks": ranks.world,
            "planes": [[part.first, part.stop] for part in parts],
            "tiles": [part.slabs * per_slab for part in parts],
            "tiles_computed_twice": computed * per_slab - len(plan),
        },
    }
    return arrays["sr"], arrays["prob"], facts


def _mapped(folder: Path) -> dict[str, np.ndarray]:
    """What rank 0 made."""
    partial = Unfinished.partial_of(folder)
    return {name: np.load(partial / f"{name}.npy", mmap_mode="r+") for name in ("sr", "prob")}


def _tell(parts: list[Share], plan: tiles.TilePlan, label: str) -> None:
    whole, most = plan.grid[0], max(part.slabs for part in parts)
    counts = ", ".join(str(part.slabs) for part in parts)
    text = "%s: %s of tiles over %d ranks, %s each with those at the seams: %.2g x one process at best"
    log.info(text, label, counted(whole, "slab"), len(parts), counts, whole / most)
    if whole / most < 1 + 0.25 * (len(parts) - 1):
        log.warning(
            "%s: too short for its patch to be worth splitting; several volumes at once are better dealt", label
        )


class _ShareOfProgress:
    """Progress of a part: another number of tiles than the whole plan has."""

    def __init__(self, shown: Progress, total: int) -> None:
        self.shown, self.total, self.done = shown, total, 0
        self.finish = shown.finish

    def advance(self, n: int = 1, **facts: Any) -> None:
        """Of the part."""
        self.done += n
        self.shown.advance(n, **facts)

    def complete(self) -> None:
        """The last planes of the part are written before the tiles that made them are counted."""
        self.advance(self.total - self.done)

    def start(self, label: str, total: int, unit: str) -> None:
        """``total`` is that of the part."""
        self.shown.start(label, self.total, unit)

    def tell(self, group: str, text: str, **facts: Any) -> None:
        """As it is."""
        self.shown.tell(group, text, **facts)


# --- agreement with the scan ----------------------------------------------------------------------------------------
#
# SR' = SR + D' (D D' + w)^-1 (scan - D SR), see ``volume.consistency``: in place, in the image's own intensities, over
# the whole image whatever the region of interest. It comes when all planes are finished and have their name: what a run
# that ended meanwhile leaves is not gone on with, so that no result is corrected twice.
#
# Slabs lie along one axis in the processed orientation, so that the bits are the same in memory and in files.

NOTHING = 1000.0  # a weight that changes nothing worth the name
WHOLE = 1 << 62  # bytes of a slab that is never cut


@dataclass(frozen=True)
class Wanted:
    """What is to be done with a result, on processed axes.

    seen : how the scan sees it
    full : the same with the Gaussian as wide as the slices are thick, by which ``missing_sd`` judges
    believed : the profile of ``seen``; across : the axis across the slices
    weight : w; AUTO, to be chosen; None, the result is left as it is
    empty : whether exact zeros of the scan are kept; held_bytes : what all this takes on the host
    doubt : whether the last channel of the probabilities is the variance of the network's passes, to become the doubt
    residual : whether what the result does not explain of the scan is kept
    adapt : whether the network's image is adapted to the scan first
    """

    seen: Observation
    full: Observation
    believed: Assumed
    across: int
    weight: str | float | None
    empty: bool
    held_bytes: int
    doubt: bool
    residual: bool
    adapt: bool


def wanted(
    image: Prepared, data: np.ndarray, settings: InferSettings, interpolated_otherwise: bool = False
) -> Wanted | None:
    """What the settings ask for; None: nothing.

    data (x, y, z) : stored axes; interpolated_otherwise : whether another interpolator put the scan on the new grid

    Raises UsageError where something is asked for explicitly that cannot be done.
    """
    original = image.geometry == "segsrgan" or interpolated_otherwise
    off = settings.agree == OFF or (settings.agree == AUTO and original)
    doubt, kept = settings.uncertainty, settings.save_residual
    if interpolated_otherwise and doubt:
        raise UsageError("uncertainty", "told of the spline alone, the scan was interpolated otherwise", "leave it out")
    if off and not kept:
        for name, value in (("profile", settings.profile), ("slice thickness", settings.slice_thickness)):
            if value != AUTO:
                raise UsageError(name, f"{value} has no use without agreement", "--agree auto, or leave it out")
        return None
    turn = image.turn
    old, new, shape = turn.permute(image.spacing), turn.permute(image.wanted), turn.permute(data.shape)
    across, thickness = slice_axis(old), settings.thickness_mm
    look = settings.profile == AUTO and not original and old[across] > new[across]
    visible = shown(turn.apply(data), across) if look else None
    believed = assumed(settings.profile, thickness, old[across], new[across], visible)

    def seen_as(profile: str, thickness_mm: float | None) -> Observation | None:
        if interpolated_otherwise:
            return None
        return observation(
            shape, old, image.source.shape, new, geometry=image.geometry, thickness_mm=thickness_mm, profile=profile
        )

    seen, full = seen_as(believed.profile, believed.width_mm), seen_as("gaussian", thickness)
    if seen is None or full is None:
        what = "save residual" if off else "agree"
        reason = "how the scan sees a result on the original's grid is not known for these sizes"
        raise UsageError(what, reason, "--geometry physical, or leave it out")
    if kept and any(matrix is not None for matrix in seen.align):
        raise UsageError("save residual", "the result is coarser than the scan", "a finer --new-resolution")
    held = 0
    if not off and not seen.is_identity:
        # A slab and what the products make of it, the residual; where slabs depend on one another, what is made of it.
        held = 6 * min(SLAB_BYTES, 4 * math.prod(image.source.shape)) + 8 * math.prod(shape)
        held += 12 * math.prod(shape) + image.beyond.held_bytes if image.beyond else 0
        held += 0 if _free(seen) else 4 * (2 * math.prod(shape) + _half(seen, shape))
        if doubt and not seen.free:
            held += 5 * 4 * math.prod(image.source.shape)  # no axis that slabs could lie along
    held += 8 * math.prod(shape) if kept else 0
    weight = None if off or seen.is_identity else settings.agree
    adapting = settings.adapt == AUTO and weight is not None and not original
    adapting = adapting and adapt.applies(old, new, across)
    held += adapt.held_bytes(image.source.shape) if adapting else 0
    return Wanted(seen, full, believed, across, weight, not off and not original, held, doubt, kept, adapting)


def finish(
    sr: np.ndarray,
    prob: np.ndarray,
    data: np.ndarray,
    image: Prepared,
    what: Wanted,
    adapted: Callable[[np.ndarray, np.ndarray, float], dict[str, Any]],
    label: str,
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Do it, in place; what the report says about it, and the residual on the scan's stored axes where it is kept.

    sr (X, Y, Z), prob (C, X, Y, Z), data (x, y, z) : stored axes
    adapted : (sr, scan, weight), processed axes -> what is told; adapts ``sr`` in place
    """
    began = time.perf_counter()
    turned, scan = image.turn.apply(sr), image.turn.apply(data)
    told: dict[str, Any] = {"agree": None}
    if what.weight is not None:
        shown = image.shown(scan)
        found = _left(turned, scan, what, image)
        weight, noise = _weight(found, scan, shown, what)
        size = _energy(shown, air(scan))  # where values go below 0, what lies above the lowest
        before = own = _percent(_energy(found), size)
        del found
        if what.adapt:
            learning = time.perf_counter()
            told["adapt"] = adapted(turned, scan, weight)
            told["adapt"]["seconds"] = time.perf_counter() - learning
            before = _percent(_energy(_left(turned, scan, what, image)), size)
        _agree(turned, scan, what.seen, weight, image.norm.floor)
        after = _percent(_energy(_left(turned, scan, what, image)), size)
        told["agree"] = {
            "weight": weight, "noise": noise, **what.believed.record(),
            "residual_percent": after, "residual_percent_without": before, "residual_percent_network": own,
        }  # fmt: skip
        more = f", {brief(own, 2)} % the network's own image" * what.adapt
        log.info(
            "%s: the result, acquired again, differs from the scan by %s %% (%s %% without agreement%s; weight "
            "%.3g, %s)", label, brief(after, 2), brief(before, 2), more, weight, what.believed,
        )  # fmt: skip
    doubt = image.turn.apply(prob[-1])
    if what.doubt:
        told["doubt"] = doubt_(doubt, turned, scan, what.full, what.across, image.norm.scale)
        if what.seen.is_identity:
            told["warnings"] = ["the result has the scan's own voxels, which leave nothing open: the doubt is 0"]
            log.warning("%s: %s", label, told["warnings"][0])
    left: np.ndarray | None = image.turn.undo(_left(turned, scan, what, image)) if what.residual else None
    image.clear_outside(turned, doubt if what.doubt else None)
    if what.empty and (kept := keep_empty(turned, image.turn.apply(prob), scan, image, what.seen)):
        told["voxels_kept_empty"] = kept
    if what.doubt:
        told["doubt"] |= (inside := summary(doubt, turned))
        line = "%s: doubt inside the head: %s on average, 95 %% below %s, where the image is %s on average"
        log.info(line, label, *(brief(inside[key]) for key in ("mean", "p95", "image_mean")))
    if told["agree"] is not None:
        told["agree"]["seconds"] = time.perf_counter() - began - told.get("adapt", {}).get("seconds", 0)
    return told, left


def _left(sr: np.ndarray, scan: np.ndarray, what: Wanted, image: Prepared) -> np.ndarray:
    """scan - D SR, 0 where the network saw nothing; on the result's voxels where they are not finer."""
    free = _free(what.seen)
    return image.only_inside(residual(sr, scan, what.seen, SLAB_BYTES, free[0] if free else 0), what.seen)


def _weight(left: np.ndarray, scan: np.ndarray, shown: np.ndarray, what: Wanted) -> tuple[float, float | None]:
    """w and the scan's noise. The noise over what the spline lacks, or over what the result lacks if that is less: the
    better a result is, and the more of what is left is noise, the less is to be gained from the scan."""
    if what.weight != AUTO:
        assert isinstance(what.weight, (int, float))
        return float(what.weight), None
    chosen = choose_weight(scan, what.full, what.across, what.believed.floor)
    if not chosen.noise or left.shape != scan.shape:
        return rounded(chosen.w), chosen.noise
    lacking = lacking_sd(left, shown, what.seen, what.across)
    ratio = NOTHING if chosen.noise**2 >= NOTHING * lacking**2 else (chosen.noise / lacking) ** 2
    return rounded(max(chosen.w, ratio)), chosen.noise


def _agree(sr: np.ndarray, scan: np.ndarray, seen: Observation, w: float, floor: float) -> None:
    """In place, by slabs that lie along one axis in the processed orientation."""
    free = _free(seen)
    if not free:
        return agree(sr, scan, seen, w, floor, SLAB_BYTES, 0)
    for *_, here in cuts(sr, free[0], 2 * SLAB_BYTES):
        agree(sr[here], scan[here], seen, w, floor, WHOLE, free[0])


def _percent(left: float, whole: float) -> float:
    return 100 * math.sqrt(left / whole) if whole else 0.0


def _energy(array: np.ndarray, zero: float = 0.0) -> float:
    return sum(float(np.sum(np.square(plane - zero if zero else plane, dtype=np.float64))) for plane in array)


def _free(seen: Observation) -> list[int]:
    """Axes on which a result has the scan's own voxels."""
    return [axis for axis in seen.free if seen.align[axis] is None]


def _half(seen: Observation, shape: Sequence[int]) -> int:
    """Voxels of what ``agree`` has gone back with along all axes but the first."""
    return shape[0] * math.prod(m if d is None else d.shape[1] for m, d in zip(shape[1:], seen.down[1:], strict=True))
