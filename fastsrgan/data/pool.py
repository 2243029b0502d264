"""Degraded volumes resident in memory, and the patches that are gathered from them.

The order of patches is a function of (seed, epoch, group) and a position, so resuming in mid-epoch needs the position
alone: nothing of the pool is saved.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.draws import rng
from fastsrgan.core.kernels import Argument, launch, op, scalar, to_device
from fastsrgan.errors import InputError, ModelError
from fastsrgan.volume.acquisition import guessed_width
from fastsrgan.volume.consistency import patch_agreement


@dataclass(frozen=True)
class Slices:
    """Arguments of ``consistency.patch_agreement`` that a whole volume shares: voxels of it and of its scan across the
    slices, the ratio of their sizes, and the weight."""

    n: int
    m: int
    ratio: float
    weight: float

    def of(self, first: int, patch: int, mirrored: bool) -> np.ndarray:
        """C and E of one patch, (2, P, P) float32."""
        found = patch_agreement(first, patch, self.n, self.m, self.ratio, guessed_width(self.ratio), self.weight)
        return found[:, ::-1, ::-1] if mirrored else found


@dataclass(frozen=True)
class Resident:
    """One subject, degraded for one epoch; arrays (X, Y, Z) in processed orientation.

    interpolated, hr : float32, float16 or bfloat16, divided by the low-resolution maximum
    label : uint8, 1 inside the structure; mask : uint8 classes, or None
    resolution : through-plane voxel size in mm (the conditional input)
    origins : (n, 3) int, corners of its patches in these arrays
    offset : voxel of the whole volume at which the arrays begin
    slices : how the scan sees the whole volume, where patches are made to agree with it
    """

    subject: str
    interpolated: Tensor
    hr: Tensor
    label: Tensor
    mask: Tensor | None
    resolution: float
    origins: np.ndarray
    offset: tuple[int, int, int] = (0, 0, 0)
    slices: Slices | None = None

    @property
    def nbytes(self) -> int:
        """Memory that its volumes hold, that of storages which they share with others included."""
        volumes = (self.interpolated, self.hr, self.label, self.mask)
        return sum(t.untyped_storage().nbytes() for t in volumes if t is not None)


@dataclass
class Batch:
    """x (B, 1, P, P, P); y (B, 2 + classes, P, P, P); res (B,); ids: "subject@i,j,k" of each patch.

    agree : (B, 2, P, P), C and E of ``consistency.patch_agreement`` for each patch; None where nothing has to agree
    """

    x: Tensor
    y: Tensor
    res: Tensor
    ids: list[str]
    agree: Tensor | None = None


class Pool:
    """The residents of one group of subjects, with keyed draws of batches.

    Every draw is a function of (seed, epoch, group, rank) and a step, so ``state`` is a position and nothing else.

    Parameters
    ----------
    residents : degraded subjects
    patch : edge of a patch in voxels
    mask_classes : one-hot channels appended to the target (0: none)
    seed, epoch, group, rank : the key of every draw
    flips : axes of the residents' arrays ("x" to "xyz") along which patches are mirrored at random, each with
        probability 1/2

    Attributes
    ----------
    table : (n, 4) int64, subject and corner of each patch
    step : generator batches handed out, or skipped by ``load_state``
    """

    def __init__(
        self,
        residents: list[Resident],
        patch: int,
        *,
        mask_classes: int = 0,
        seed: int = 0,
        epoch: int = 1,
        group: int = 0,
        rank: int = 0,
        flips: str = "",
    ) -> None:
        self.residents, self.patch, self.mask_classes = residents, patch, mask_classes
        self.key = (seed, epoch, group, rank)
        self.flips = sum(1 << "xyz".index(axis) for axis in set(flips))
        self.step = 0
        rows = [np.column_stack([np.full(len(r.origins), i), r.origins]) for i, r in enumerate(residents)]
        self.table = np.concatenate(rows).astype(np.int64)
        if not len(self.table):
            names = ", ".join(r.subject for r in residents)
            raise InputError("training patches", f"none found in {names}", "smaller patch_size, or check the masks")
        self.patches = Patches(residents, self.table)
        self._buffers = Buffers()

    def __len__(self) -> int:
        """Number of patches."""
        return len(self.table)

    def order(self) -> np.ndarray:
        """The generator's pass: every patch once, subjects mixed, keyed."""
        return rng(*self.key, "order").permutation(len(self.table))

    def steps(self, batch: int) -> int:
        """Batches of the generator's pass."""
        return -(-len(self.table) // batch)

    def generator_batches(self, batch: int, first: int | None = None, steps: int | None = None) -> Iterator[np.ndarray]:
        """Index batches of the generator's pass, from batch ``first`` or where the pool stands.

        Every patch comes exactly once. Where ``batch`` does not divide their number, the batches are as even as
        possible: their sizes differ by at most one and none is larger than ``batch``, so no update has a few patches.

        ``steps``, where it is not ``self.steps(batch)``, is what the ranks of a run agreed on: with more, the same
        patches are spread over more and smaller batches (at least one patch each); with fewer, the last are left out.
        """
        steps = min(steps or self.steps(batch), len(self))
        parts = np.array_split(self.order()[: steps * batch], steps)
        self.step = self.step if first is None else first
        while self.step < len(parts):
            indices = self._mirrored(parts[self.step], "flips", self.step)
            self.step += 1
            yield indices

    def critic_indices(self, step: int, batch: int, iterations: int) -> np.ndarray:
        """Uniform draws for the critic updates of one step: (iterations, batch)."""
        drawn = rng(*self.key, "critic", step).integers(len(self.table), size=(iterations, batch))
        return self._mirrored(drawn, "critic flips", step)

    def _mirrored(self, indices: np.ndarray, *key: int | str) -> np.ndarray:
        """``indices`` with keyed mirrors written into them; see ``gather``."""
        if not self.flips:
            return indices
        bits = rng(*self.key, *key).integers(8, size=indices.shape) & self.flips
        return indices + bits * len(self.table)

    def state(self) -> dict[str, Any]:
        """Where the generator's pass stands: plain values for a snapshot."""
        return {"key": list(self.key), "patches": len(self.table), "step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises ModelError when that was another group, or had other patches."""
        mine = self.state()
        if any(state.get(name) != mine[name] for name in ("key", "patches")):
            then = f"{state.get('key')} with {state.get('patches')} patches"
            reason = f"saved for (seed, epoch, group, rank) {then}, here are {mine['key']} with {mine['patches']}"
            raise ModelError("position in the epoch", reason, "resume with the run's own store and settings")
        self.step = int(state["step"])

    def gather(self, indices: np.ndarray, flips: np.ndarray | None = None) -> Batch:
        """The patches at ``indices`` as one batch. Voxels outside a volume are zero.

        Index i + f * len(pool) stands for patch i mirrored along the axes in the bits of f (1, 2, 4: x, y, z).
        ``flips`` (B, 3) bool mirrors as well, in place of these bits.

        On the CPU the batch lies in memory that the pool uses again when nothing refers to it any longer.

        Raises InputError where mask classes are asked of a subject that has no mask.
        """
        p, n = self.patch, len(indices)
        if flips is not None:
            indices = indices % len(self.table) + np.asarray(flips, bool) @ np.array([1, 2, 4]) * len(self.table)
        # On a CUDA device nothing here waits: the table of patches lies there, the indices come from pinned memory.
        at = to_device(np.ascontiguousarray(indices, np.int64), self.patches.device)
        x = self._buffers.take((n, 1, p, p, p), self.patches.device)
        y = self._buffers.take((n, 2 + self.mask_classes, p, p, p), self.patches.device)
        _gather(x, y, self.patches, indices, at)
        res = self.patches.resolutions.index_select(0, at % len(self.table))
        rows = self.table[indices % len(self.table)]
        corners = [(self.residents[i], o) for i, o in zip(rows[:, 0], rows[:, 1:], strict=True)]
        ids = [f"{r.subject}@{','.join(map(str, o + r.offset))}" for r, o in corners]
        return Batch(x, y, res, ids, self._agreement(corners, indices))

    def _agreement(self, corners: list[tuple[Resident, np.ndarray]], indices: np.ndarray) -> Tensor | None:
        if all(r.slices is None for r in self.residents):
            return None
        p, mirrored = self.patch, indices // len(self.table) & 4
        nothing = np.zeros((2, p, p), np.float32)
        found = [
            nothing if r.slices is None else r.slices.of(int(o[2] + r.offset[2]), p, bool(turned))
            for (r, o), turned in zip(corners, mirrored, strict=True)
        ]
        return to_device(np.stack(found), self.patches.device)


class Patches:
    """The patches of some residents: where they lie, for the host and for the device.

    residents : degraded subjects; table : (n, 4) int64, subject and corner of each patch
    """

    def __init__(self, residents: list[Resident], table: np.ndarray) -> None:
        self.residents, self.table = residents, table
        self.device = residents[0].hr.device

    @functools.cached_property
    def resolutions(self) -> Tensor:
        """(n,) float32 through-plane voxel size in mm of each patch, on the device."""
        mm = np.array([r.resolution for r in self.residents], np.float32)
        return to_device(mm[self.table[:, 0]], self.device)

    @functools.cached_property
    def rows(self) -> Tensor:
        """(n, 10) int64 on the device, the fields of kernels/gather_patches.cu: four addresses, sizes, corner."""
        one = np.zeros((len(self.residents), 7), np.int64)
        for row, r in zip(one, self.residents, strict=True):
            row[:4] = [0 if t is None else t.data_ptr() for t in (r.interpolated, r.hr, r.label, r.mask)]
            row[4:] = r.hr.shape
        return to_device(np.concatenate([one[self.table[:, 0]], self.table[:, 1:]], axis=1), self.device)

    @functools.cached_property
    def image(self) -> str | None:
        """The kernel's name of the type of all intensities; None where it does not take these volumes: it knows one
        size per resident, and no strides."""
        images = {t.dtype for r in self.residents for t in (r.interpolated, r.hr)}
        classes = {t.dtype for r in self.residents for t in (r.label, r.mask) if t is not None}
        volumes = [(t, r.hr.shape) for r in self.residents for t in (r.interpolated, r.hr, r.label, r.mask)]
        plain = all(t is None or (t.is_contiguous() and t.shape == shape) for t, shape in volumes)
        found = scalar(next(iter(images)))
        return found if len(images) == 1 and found != "u8" and classes == {torch.uint8} and plain else None


class Buffers:
    """Memory of batches on the CPU, used again once no tensor refers to it: fresh pages cost more than the copies.

    A tensor made from a NumPy array keeps that very array object as long as its storage lives, whoever holds it: a
    caller, a view, autograd. So the death of the array object tells that the memory is free. CUDA tensors come from
    torch's own cache.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """An uninitialised float32 tensor."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=torch.float32, device=device)
        size = math.prod(shape)
        for i, memory in enumerate(self._free):
            if size <= memory.size < 2 * size:
                del self._free[i]
                break
        else:
            memory = torch.empty(size).numpy()  # aligned as torch likes it
        lent = memory[:size].reshape(shape)
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent)


def _gather_by_kernel(x_B1PPP: Tensor, y_BCPPP: Tensor, patches: Patches, indices_B: np.ndarray, at_B: Tensor) -> Any:
    classes, count, p = y_BCPPP.shape[1] - 2, len(patches.table), x_B1PPP.shape[-1]
    if patches.image is None or (classes and any(r.mask is None for r in patches.residents)):
        return NotImplemented
    args: list[Argument] = [x_B1PPP, y_BCPPP, patches.rows, at_B, count, len(at_B), p, classes]
    launch("gather_patches", (p * p, p, len(at_B)), args, IMAGE=patches.image)
    return x_B1PPP, y_BCPPP


def _example(seed: int, device: torch.device) -> tuple[Tensor, Tensor, Patches, np.ndarray, Tensor]:
    some, residents = np.random.default_rng(seed), []
    for name, shape in (("a", (9, 21, 17)), ("b", (16, 13, 30))):
        image, hr = (torch.from_numpy(some.random(shape, np.float32)).to(device) for _ in range(2))
        label, mask = (torch.from_numpy(some.integers(0, n, shape, np.uint8)).to(device) for n in (2, 3))
        residents.append(Resident(name, image, hr, label, mask, 3.0, np.zeros((0, 3), int)))
    table = np.column_stack([[0, 1, 1, 0, 1], some.integers(-4, 10, (5, 3))])
    indices = some.permutation(5) + 5 * some.integers(0, 8, 5)
    x, y = (torch.full((5, channels, 12, 12, 12), torch.nan, device=device) for channels in (1, 5))
    return x, y, Patches(residents, table), indices, torch.from_numpy(indices).to(device)


@op("gather_patches", launch=_gather_by_kernel, example=_example)
def _gather(
    x_B1PPP: Tensor, y_BCPPP: Tensor, patches: Patches, indices_B: np.ndarray, at_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill network inputs and targets with a patch for each index (``Pool.gather``); ``at_B``: these on the device."""
    classes, count = y_BCPPP.shape[1] - 2, len(patches.table)
    for b, index in enumerate(indices_B):
        number, *origin = patches.table[index % count]
        r = patches.residents[number]
        copy_patch(x_B1PPP[b, 0], r.interpolated, origin)
        copy_patch(y_BCPPP[b, 0], r.hr, origin)
        copy_patch(y_BCPPP[b, 1], r.label, origin)
        if classes:
            _one_hot(y_BCPPP[b, 2:], r, origin)
        axes = [1 + d for d in range(3) if index // count >> d & 1]
        if axes:
            for patch in (x_B1PPP[b], y_BCPPP[b]):
                patch.copy_(patch.flip(axes))
    return x_B1PPP, y_BCPPP


def _one_hot(out_CPPP: Tensor, resident: Resident, origin: Sequence[int]) -> None:
    if resident.mask is None:
        raise InputError(resident.subject, "has no mask", "fit_mask needs Mask_image for every subject")
    classes = torch.empty_like(out_CPPP[0], dtype=torch.uint8)
    copy_patch(classes, resident.mask, origin)
    for c, out in enumerate(out_CPPP):
        torch.eq(classes, c, out=out)


def copy_patch(out_PPP: Tensor, volume_XYZ: Tensor, origin: Sequence[int] | np.ndarray) -> None:
    """Copy the patch at ``origin`` into ``out``, converting its type; zeros where it hangs over an edge."""
    source, target, inside, outside = [], [], True, False
    for o, p, n in zip(origin, out_PPP.shape, volume_XYZ.shape, strict=True):
        low, high = max(int(o), 0), min(int(o) + p, n)
        source.append(slice(low, high))
        target.append(slice(low - int(o), high - int(o)))
        inside &= high - low == p
        outside |= high <= low
    if not inside:
        out_PPP.zero_()
    if not outside:
        out_PPP[tuple(target)].copy_(volume_XYZ[tuple(source)])
