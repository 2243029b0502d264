"""Volumes that are seen a few planes at a time: sources, what is held of them, and results that survive a kill.

Planes lie along the first axis, the one along which slabs of tiles follow each other. Memory is that of a slab,
whatever the length of the volume along that axis. The usual source is a stored image that is oriented, normalised and
interpolated: each plane is made when it is asked for, in blocks that lie at fixed places, so that a plane has the same
bits in memory, by slabs and after a restart.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.files import atomic_write, disk_error, mapping, need_space, read_json, sync_folder
from fastsrgan.errors import InputError, ResourceError, times
from fastsrgan.infer import tiles
from fastsrgan.infer.settings import InferSettings
from fastsrgan.infer.tiles import Region, Triple
from fastsrgan.infer.values import millimetres
from fastsrgan.volume.consistency import Observation
from fastsrgan.volume.geometry import Orientation, centre_coordinates, grid_size
from fastsrgan.volume.head import air
from fastsrgan.volume.intensity import Normaliser
from fastsrgan.volume.resample import SAME, apply_axes, mean_matrix, upsample_matrix

log = logging.getLogger("fastsrgan")

# (first plane, (C, n, Y, Z) float32 on the CPU): called in ascending order, every plane once
Sink = Callable[[int, Tensor], None]


class Source(Protocol):
    """A volume that gives planes."""

    shape: tiles.Triple

    def planes(self, first: int, stop: int) -> Tensor:
        """(stop - first, Y, Z) float32 on the CPU; the same bits for a plane whatever it is asked with."""


class Whole:
    """A volume in memory, or mapped into it."""

    def __init__(self, volume_XYZ: Tensor | np.ndarray) -> None:
        self.volume = torch.as_tensor(volume_XYZ)
        x, y, z = self.volume.shape
        self.shape = (x, y, z)

    def planes(self, first: int, stop: int) -> Tensor:
        """A view where the volume is float32."""
        return self.volume[first:stop].float()


def shift_(memory: Tensor, dim: int, keep: int, step: int) -> None:
    """Move places ``step`` ... ``step + keep`` of a dimension to its front, within the same memory."""
    for a in range(0, keep, step):  # in pieces, since what is read and what is written must not overlap
        n = min(step, keep - a)
        memory.narrow(dim, a, n).copy_(memory.narrow(dim, a + step, n))


class Held:
    """The planes of a padded volume that tiles are being cut from, on a device.

    A volume that is in memory, needs no padding and no other device is looked at where it is; of others a few planes
    are kept, and each is loaded once.
    """

    def __init__(self, source: Source, plan: tiles.TilePlan, device: torch.device | str = "cpu") -> None:
        self.source, self.plan, self.device = source, plan, torch.device(device)
        at_hand = isinstance(source, Whole) and plan.padded_shape == plan.shape and self.device.type == "cpu"
        self.whole = source.volume if at_hand and source.volume.dtype == torch.float32 else None  # type: ignore[attr-defined]
        self.memory: Tensor | None = None
        self.first = self.stop = 0

    def planes(self, first: int, stop: int) -> Tensor:
        """(stop - first, Y, Z) of the padded volume. Planes before the last ``first`` would be loaded again."""
        if first < self.first:
            self.first = self.stop = first
        if self.whole is not None:
            self.first, self.stop = first, stop
            return self.whole[first:stop]
        known = min(max(0, self.stop - first), stop - first)
        if self.memory is None or len(self.memory) < stop - first:
            larger = torch.empty((stop - first, *self.plan.padded_shape[1:]), device=self.device)
            if known and self.memory is not None:
                larger[:known] = self.memory[first - self.first : self.stop - self.first]
            self.memory = larger
        elif known and first > self.first:
            shift_(self.memory, 0, known, first - self.first)
        self._load(first + known, stop, self.memory[known : stop - first])
        self.first, self.stop = first, stop
        return self.memory[: stop - first]

    def inner(self, first: int, stop: int) -> Tensor:
        """Planes of the volume itself, without padding, out of those that are held."""
        before, (_, y, z) = self.plan.pad_before[0], self.plan.crop
        a, b = first + before - self.first, stop + before - self.first
        memory = self.whole[self.first : self.stop] if self.whole is not None else self.memory
        assert memory is not None and a >= 0 and b <= self.stop - self.first, "planes that are no longer held"
        return memory[a:b, y, z]

    def _load(self, first: int, stop: int, out: Tensor) -> None:
        """Padded planes ``first`` ... ``stop`` from the source."""
        plan, n = self.plan, self.plan.shape[0]
        index = np.arange(first, stop) - plan.pad_before[0]
        if plan.mirror:
            folded = index % (2 * n)
            index = np.minimum(folded, 2 * n - 1 - folded)
        real = (index >= 0) & (index < n)
        if not real.all():
            out.zero_()
        at = 0
        while at < len(index):
            run = at + 1
            while run < len(index) and real[run] == real[at] and index[run] == index[run - 1] + 1:
                run += 1
            if real[at]:
                some = self.source.planes(int(index[at]), int(index[run - 1]) + 1)
                shape, padded = ((len(some), *sizes[1:]) for sizes in (plan.shape, plan.padded_shape))
                before = (0, *plan.pad_before[1:])
                out[at:run] = tiles.pad(some, replace(plan, shape=shape, padded_shape=padded, pad_before=before))
            at = run


# --- results that survive a kill ----------------------------------------------------------------------------------

JOURNAL = "journal.json"


class Unfinished:
    """Arrays in files that grow by planes, and a journal of how far they are.

    They lie in a hidden folder beside ``folder`` that takes its name when the last plane is written. What was
    finished by a run that was killed is kept, if it was made with the same ``key``.

    Attributes
    ----------
    arrays : name -> memory map
    done : planes that are finished
    facts : what the run that began noted, plain values
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        key: str,
        shapes: dict[str, Sequence[int]],
        planes: int,
        facts: dict | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.partial = self.partial_of(self.folder)
        self.key, self.done, self.facts = key, 0, dict(facts or {})
        self.arrays: dict[str, Any] = {}  # memory maps
        try:
            if self._resumed(shapes, planes):
                log.info("%s: going on behind plane %d", self.folder, self.done)
                return
            shutil.rmtree(self.partial, ignore_errors=True)
            sizes = [4 * math.prod(shape) for shape in shapes.values()]
            need_space(self.folder, sum(sizes) + max(sizes))  # the image that is made of them lies beside them
            self.partial.mkdir(parents=True)
            self.arrays = {name: self._create(name, shape) for name, shape in shapes.items()}
        except OSError as error:
            raise disk_error(error, self.folder) from error
        self.note(0)

    @staticmethod
    def partial_of(folder: str | os.PathLike) -> Path:
        """Where the arrays of ``folder`` lie until they are finished."""
        return Path(folder).with_name(f".{Path(folder).name}.partial")

    def note(self, done: int) -> None:
        """``done`` planes are finished: first the planes reach the disk, then the journal says so."""
        try:
            for array in self.arrays.values():
                array.flush()
        except OSError as error:
            raise disk_error(error, self.folder) from error
        with atomic_write(self.partial / JOURNAL) as temporary:
            record = {"key": self.key, "done": done, "facts": self.facts}
            temporary.write_text(json.dumps(record) + "\n", encoding="utf8")
        self.done = done

    def finish(self) -> dict[str, np.ndarray]:
        """Rename into place; the arrays, mapped from there."""
        self.note(self.done)
        self.arrays.clear()
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self.partial, self.folder)
            sync_folder(self.folder.parent)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        return {path.stem: np.load(path, mmap_mode="r+") for path in sorted(self.folder.glob("*.npy"))}

    def _resumed(self, shapes: dict[str, Sequence[int]], planes: int) -> bool:
        """Go on where a run before this one stopped, where it was this run's work and its files are whole."""
        journal = read_json(self.partial / JOURNAL)
        if journal.get("key") != self.key:
            return False
        done, facts = journal.get("done"), mapping(journal.get("facts"))
        known = isinstance(done, int) and done in range(planes + 1) and facts.keys() == self.facts.keys()
        if not known or not all(self._is_whole(name, shape) for name, shape in shapes.items()):
            log.warning("%s: what an earlier run left is damaged, it is made anew", self.folder)
            return False
        self.done, self.facts = journal["done"], facts
        self.arrays = {name: np.load(self._file(name), mmap_mode="r+") for name in shapes}
        return True

    def _is_whole(self, name: str, shape: Sequence[int]) -> bool:
        """Whether an array's file is as it was created. Mapped for reading: for writing, a short file would grow."""
        try:
            array = np.load(self._file(name), mmap_mode="r")
        except Exception:  # of a damaged header NumPy raises many kinds
            return False
        return array.shape == tuple(shape) and array.dtype == np.float32 and bool(array.flags.c_contiguous)

    def _create(self, name: str, shape: Sequence[int]) -> np.ndarray:
        array = np.lib.format.open_memmap(self._file(name), "w+", np.float32, tuple(shape))
        with open(self._file(name), "r+b") as file:
            # Blocks are taken now: a disk that fills up under a memory map would end the process by a signal.
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return array

    def _file(self, name: str) -> Path:
        return self.partial / f"{name}.npy"


# --- the grid that tiles are cut from, and the way back -------------------------------------------------------------

BLOCK = 16  # planes made at a time
RIM = 6  # voxels inside a mask over which the network's detail comes to count, see decision 032
MAX_VOXELS = 2**31  # of the grid
EMPTY = 0.05  # share of voxels that are exactly 0 (or the lowest value below), above which a scan is taken to be masked
FAR = 1.25  # times the voxels that a network learned from
GROWTH = 200  # times the image's voxels, unasked: 10 mm slices of 0.2 mm pixels give 50


class Interpolated:
    """A ``Source``: the cubic spline through a stored image, on another grid.

    Parameters
    ----------
    data_XYZ : as stored; looked at where it is, unless its first processed axis is interpolated
    turn : stored -> processed axes
    norm : what a network sees
    spacing, wanted : voxel sizes in mm, stored axis order
    geometry : family of ``resample``
    """

    def __init__(
        self,
        data_XYZ: np.ndarray,
        turn: Orientation,
        norm: Normaliser,
        spacing: Sequence[float],
        wanted: Sequence[float],
        geometry: str,
    ) -> None:
        self.data, self.norm = turn.apply(data_XYZ), norm
        old, new = turn.permute(tuple(spacing)), turn.permute(tuple(wanted))
        sizes = [grid_size(n, a, b) for n, a, b in zip(self.data.shape, old, new, strict=True)]
        self.matrices = [
            upsample_matrix(n, size, b / a, geometry)
            for n, size, a, b in zip(self.data.shape, sizes, old, new, strict=True)
        ]
        x, y, z = (n if m is None else len(m) for n, m in zip(self.data.shape, self.matrices, strict=True))
        self.shape: Triple = (x, y, z)
        self._low: np.ndarray | None = None
        self._block: tuple[int, Tensor] | None = None

    @property
    def held_bytes(self) -> int:
        """What is kept of the image besides the image: all of it in float32, where planes mix."""
        return 4 * self.data.size if self.matrices[0] is not None else 0

    def planes(self, first: int, stop: int) -> Tensor:
        """(stop - first, Y, Z) float32."""
        out = torch.empty((stop - first, *self.shape[1:]))
        for block in range(first // BLOCK, -(-stop // BLOCK)):
            start = block * BLOCK
            made = self._made(block)
            a, b = max(first, start), min(stop, start + len(made))
            out[a - first : b - first] = made[a - start : b - start]
        return out

    def _made(self, block: int) -> Tensor:
        if self._block is None or self._block[0] != block:
            self._block = None  # before the next one is made
            self._block = block, torch.from_numpy(self._make(slice(block * BLOCK, (block + 1) * BLOCK)))
        return self._block[1]

    def _make(self, rows: slice) -> np.ndarray:
        along_x, along_y, along_z = self.matrices
        if along_x is None:
            return apply_axes(self.norm.apply(self.data[rows]), (None, along_y, along_z))
        if self._low is None:
            self._low = np.empty(self.data.shape, np.float32)
            for x in range(0, len(self._low), BLOCK):
                self._low[x : x + BLOCK] = self.norm.apply(self.data[x : x + BLOCK])
        return apply_axes(self._low, (along_x[rows], along_y, along_z))


def nearest(
    shape: Sequence[int], old: Sequence[float], size: Sequence[int], new: Sequence[float], geometry: str
) -> list[np.ndarray]:
    """For each axis the nearest voxel of an image of ``shape`` and ``old`` mm to every voxel of the new grid."""
    places = []
    for n, a, m, b in zip(shape, old, size, new, strict=True):
        at = np.linspace(0, n - 1, m) if geometry == "segsrgan" else centre_coordinates(m, n, b / a)
        places.append(np.clip(np.floor(at + 0.5), 0, n - 1).astype(int))
    return places


class Results:
    """A sink that undoes orientation and scale: SR and probabilities on the stored axes.

    sr : (X, Y, Z), prob : (C - 1, X, Y, Z) float32, on stored axes; arrays or memory maps that planes are written into
    """

    def __init__(self, sr: np.ndarray, prob: np.ndarray, turn: Orientation, norm: Normaliser) -> None:
        self.sr, self.prob, self.norm = turn.apply(sr), turn.apply(prob), norm

    def __call__(self, first: int, planes_CnYZ: Tensor) -> None:
        for n in range(planes_CnYZ.shape[1]):
            self.sr[first + n] = self.norm.invert(planes_CnYZ[0, n].numpy())
            self.prob[:, first + n] = planes_CnYZ[1:, n].numpy()


# SR (X, Y, Z) and probabilities (C - 1, X, Y, Z) on stored axes, and how it went
Done = tuple[np.ndarray, np.ndarray, dict]


@dataclass(frozen=True)
class Prepared:
    """An image ready for tiles, and the way back.

    source : what tiles are cut from, processed axes
    spacing, wanted : voxel sizes of the image and of the result in mm, stored axis order
    region : where results are wanted, on the grid of the source; None: everywhere
    beyond : the whole scan on the grid of the source, where that has nothing outside the region; else None
    """

    source: Interpolated | Whole
    turn: Orientation
    norm: Normaliser
    spacing: tuple[float, float, float]
    wanted: tuple[float, float, float]
    geometry: str
    region: Region | None = None
    beyond: Interpolated | None = None

    @property
    def inside(self) -> np.ndarray | None:
        """Of a scan with a ``beyond`` which voxels the network saw, processed axes."""
        return self.region.mask if self.beyond and self.region else None

    def shown(self, scan_xyz: np.ndarray) -> np.ndarray:
        """What the network saw of a scan on processed axes, in the scan's intensities."""
        return scan_xyz if self.inside is None else masked(scan_xyz, self.inside)

    def only_inside(self, left_xyz: np.ndarray, seen: Observation) -> np.ndarray:
        """What ``consistency.residual`` found, 0 where the network saw nothing."""
        if self.region is None or self.inside is None:
            return left_xyz
        own = [range(n) for n in left_xyz.shape]
        places = [a if m is None else b for a, m, b in zip(own, seen.align, self.region.index, strict=True)]
        return np.where(self.inside[np.ix_(*places)], left_xyz, left_xyz.dtype.type(0))

    def put_beyond(self, sr_XYZ: np.ndarray) -> None:
        """The whole scan's interpolation in place of the masked one's, in place, processed axes: the network's detail
        stays, but the edge that the mask made goes, with which no slice that reaches over it could agree. Near that
        edge, which the network took for the head's, its detail counts less (decision 032)."""
        for here in blocks(len(sr_XYZ)) if self.beyond else ():
            both = (source.planes(here.start, here.stop).numpy() for source in (self.beyond, self.source))  # type: ignore
            whole, seen = map(self.norm.invert, both)
            detail = self.share(here.start, here.stop).numpy() * (sr_XYZ[here] - seen)
            sr_XYZ[here] = np.maximum(whole + detail, self.norm.floor)

    def share(self, first: int, stop: int) -> Tensor:
        """Planes of how much the network's detail counts, (stop - first, Y, Z) float32: 0 outside the mask, from 0 at
        its rim to 1 ``RIM`` voxels inside, linear along an edge that is flat."""
        assert self.inside is not None
        x, y, z = (mean_matrix(n, m, RIM) for n, m in zip(self.source.shape, self.inside.shape, strict=True))
        within = apply_axes(self.inside.astype(np.float32), (x[first:stop], y, z))
        return torch.from_numpy(np.clip(2 * within - 1, 0, 1))

    def clear_outside(self, sr_XYZ: np.ndarray, doubt_XYZ: np.ndarray | None = None) -> None:
        """Outside the region what air is, in place, where the network saw nothing there; no doubt either."""
        if self.beyond is None or self.region is None:
            return
        value = air(self.beyond.data)
        for here in blocks(len(sr_XYZ)):
            outside = ~self.region.planes(here.start, here.stop).numpy()
            sr_XYZ[here][outside] = value
            if doubt_XYZ is not None:
                doubt_XYZ[here][outside] = 0

    @property
    def slice_mm(self) -> float:
        """Size of the image's voxels through the plane."""
        return self.turn.permute(self.spacing)[2]

    def whole(self) -> Tensor:
        """(X, Y, Z) float32, processed axes."""
        return self.source.planes(0, self.source.shape[0])

    def stored(self, out_CXYZ: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Undo scale and orientation, in place; views of one array."""
        with torch.inference_mode():
            self.norm.invert_(out_CXYZ[0])
        out = self.turn.undo(out_CXYZ.numpy())
        return out[0], out[1:]


def target_spacing(
    spacing_mm: Sequence[float], shape: Sequence[int], settings: InferSettings
) -> tuple[float, float, float]:
    """The voxel size of the result in mm, stored axis order; see ``settings``.

    An axis that already has the wanted size (within 1 % of the finest for None; within 0.1 % and with the same number
    of voxels otherwise) keeps its own, so it is not interpolated over rounding in a header.
    Raises UsageError as ``values.millimetres``, ResourceError beyond 2^31 voxels, InputError where nothing was
    asked for and the image's own sizes would make it more than 200 times as large.
    """
    own, sizes = tuple(float(s) for s in spacing_mm), millimetres(settings.new_resolution)
    if sizes is None:
        finest = min(own)
        wanted = tuple(s if s <= finest * (1 + SAME) else finest for s in own)
    elif sizes == "same":
        wanted = own
    else:
        wanted = tuple(
            s if abs(r / s - 1) < 1e-3 and grid_size(n, s, r) == n else float(r)
            for r, s, n in zip(sizes, own, shape, strict=True)
        )
    voxels = math.prod(n * s / w for n, s, w in zip(shape, own, wanted, strict=True))
    if voxels > MAX_VOXELS:
        reason = f"{times(wanted)} mm makes {voxels:.3g} voxels"
        raise ResourceError("new resolution", reason, "ask for a coarser resolution")
    if sizes is None and voxels > GROWTH * math.prod(shape):
        made = f"{min(own):g} mm along all axes makes {voxels:.3g} voxels of {math.prod(shape)}"
        hint = "correct the header, or say --new-resolution MM if the sizes are right"
        raise InputError("image", f"voxels of {times(own)} mm: {made}", hint)
    return wanted  # type: ignore[return-value]


def own_grid(spacing_mm: Sequence[float], grid_mm: float | None) -> float | None:
    """The voxel size that a network was trained on, where a scan's finest is more than a quarter larger; else None.

    A cortex that is thinner than the network has ever seen, in voxels, is not segmented (decision 025).
    """
    return grid_mm if grid_mm is not None and min(spacing_mm) > FAR * grid_mm else None


def blocks(count: int) -> Iterator[slice]:
    """Planes, some at a time."""
    return (slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK))


def masked(data_XYZ: np.ndarray, mask_XYZ: np.ndarray) -> np.ndarray:
    """A copy of the scan in which all outside the mask is what air is: 0, or the lowest value where that is below.

    Raises InputError for a mask of another size.
    """
    mask = np.asarray(mask_XYZ)
    if mask.shape != data_XYZ.shape:
        raise wrong_mask(mask, data_XYZ)
    return np.where(mask > 0, data_XYZ, data_XYZ.dtype.type(air(data_XYZ)))


def wrong_mask(mask: np.ndarray, data_XYZ: np.ndarray) -> InputError:
    """For a mask of another size than its scan."""
    reason = f"has the shape {np.shape(mask)}, the image {data_XYZ.shape}"
    return InputError("mask", reason, "a mask on the grid of the image")


def is_isotropic(spacing_mm: Sequence[float]) -> bool:
    """Whether ``target_spacing``, unasked, is the image's own."""
    return max(spacing_mm) <= min(spacing_mm) * (1 + SAME)


def coarser(spacing_mm: Sequence[float], wanted_mm: Sequence[float]) -> list[str]:
    """A warning, logged and given back, where the result has larger voxels than the image."""
    axes = [d for d in range(3) if wanted_mm[d] > spacing_mm[d] * (1 + SAME)]
    if not axes:
        return []
    warning = f"the new resolution is coarser than the image along axis {', '.join(map(str, axes))}: details may alias"
    log.warning(warning)
    return [warning]


def keep_empty(sr: np.ndarray, prob: np.ndarray, scan: np.ndarray, image: Prepared, seen: Observation) -> int:
    """SR as the scan and probabilities 0 where the scan is exactly 0, and along axes on which the result is finer its
    neighbours too; how many voxels that are. Where values lie below 0 the lowest takes the place of 0, as of a masked
    scan that was standardised. Nothing where few voxels have that value: no mask makes such images."""
    least = min(image.norm.floor, 0.0)
    empty = np.stack([plane == least for plane in scan])
    if np.count_nonzero(empty) <= EMPTY * empty.size:
        return 0
    for axis, matrix in enumerate(seen.down):
        if matrix is not None:
            n = empty.shape[axis]
            places = np.arange(n)
            below, above = np.maximum(places - 1, 0), np.minimum(places + 1, n - 1)
            empty = empty & empty.take(below, axis) & empty.take(above, axis)
    old, new = image.turn.permute(image.spacing), image.turn.permute(image.wanted)
    x, y, z = nearest(scan.shape, old, sr.shape, new, image.geometry)
    kept = 0
    for place, at in enumerate(x):
        here = empty[at][np.ix_(y, z)]
        sr[place][here] = least
        for channel in prob:
            channel[place][here] = 0
        kept += int(np.count_nonzero(here))
    return kept
