"""Degraded volumes resident in memory, and the patches that are gathered from them.

The order of patches is a function of (seed, epoch, group) and a position, so resuming in mid-epoch needs the position
alone: nothing of the pool is saved.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.draws import rng
from fastsrgan.core.kernels import launch, op, scalar
from fastsrgan.errors import InputError, ModelError


@dataclass(frozen=True)
class Resident:
    """One subject, degraded for one epoch; arrays (X, Y, Z) in processed orientation.

    interpolated, hr : float32, float16 or bfloat16, divided by the low-resolution maximum
    label : uint8, 1 inside the structure; mask : uint8 classes, or None
    resolution : through-plane voxel size in mm (the conditional input)
    origins : (n, 3) int, corners of its patches in these arrays
    offset : voxel of the whole volume at which the arrays begin
    """

    subject: str
    interpolated: Tensor
    hr: Tensor
    label: Tensor
    mask: Tensor | None
    resolution: float
    origins: np.ndarray
    offset: tuple[int, int, int] = (0, 0, 0)

    @property
    def nbytes(self) -> int:
        """Memory that its volumes hold, that of storages which they share with others included."""
        return sum(
            t.untyped_storage().nbytes() for t in (self.interpolated, self.hr, self.label, self.mask) if t is not None
        )


@dataclass
class Batch:
    """x (B, 1, P, P, P); y (B, 2 + classes, P, P, P); res (B,); ids: "subject@i,j,k" of each patch."""

    x: Tensor
    y: Tensor
    res: Tensor
    ids: list[str]


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
        self.table = np.concatenate(
            [np.column_stack([np.full(len(r.origins), i), r.origins]) for i, r in enumerate(residents)]
        ).astype(np.int64)
        if not len(self.table):
            names = ", ".join(r.subject for r in residents)
            raise InputError("training patches", f"none found in {names}", "smaller patch_size, or check the masks")
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
            raise ModelError(
                "position in the epoch",
                f"saved for (seed, epoch, group, rank) {state.get('key')} with {state.get('patches')} patches, here "
                f"are {mine['key']} with {mine['patches']}",
                "resume with the run's own store and settings",
            )
        self.step = int(state["step"])

    def gather(self, indices: np.ndarray, flips: np.ndarray | None = None) -> Batch:
        """The patches at ``indices`` as one batch. Voxels outside a volume are zero.

        Index i + f * len(pool) stands for patch i mirrored along the axes in the bits of f (1, 2, 4: x, y, z).
        ``flips`` (B, 3) bool mirrors as well, in place of these bits.

        On the CPU the batch lies in memory that the pool uses again when nothing refers to it any longer.

        Raises InputError where mask classes are asked of a subject that has no mask.
        """
        p, n = self.patch, len(indices)
        bits, chosen = np.divmod(indices, len(self.table))
        if flips is None and bits.any():
            flips = bits[:, None] & np.array([1, 2, 4]) > 0
        rows = self.table[chosen]
        residents, origins = [self.residents[i] for i in rows[:, 0]], rows[:, 1:]
        device = self.residents[0].hr.device
        x = self._buffers.take((n, 1, p, p, p), device)
        y = self._buffers.take((n, 2 + self.mask_classes, p, p, p), device)
        _gather(x, y, residents, origins, flips)
        res = torch.tensor([r.resolution for r in residents], dtype=torch.float32)
        corners = [(r.subject, o + r.offset) for r, o in zip(residents, origins, strict=True)]
        ids = [f"{subject}@{i},{j},{k}" for subject, (i, j, k) in corners]
        return Batch(x, y, res.to(device), ids)


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


def _gather_by_kernel(
    x_B1PPP: Tensor, y_BCPPP: Tensor, residents: list[Resident], origins_B3: np.ndarray, flips_B3: np.ndarray | None
) -> Any:
    classes = y_BCPPP.shape[1] - 2
    images = {t.dtype for r in residents for t in (r.interpolated, r.hr)}
    labels = [t for r in residents for t in ((r.label, r.mask) if classes else (r.label,))]
    image = scalar(next(iter(images)))
    if len(images) != 1 or image in (None, "u8") or any(t is None or t.dtype != torch.uint8 for t in labels):
        return NotImplemented
    # The kernel knows one size per resident, and no strides.
    volumes = [(t, r.hr.shape) for r in residents for t in (r.interpolated, r.hr, r.label, r.mask) if t is not None]
    if not all(t.is_contiguous() and t.shape == shape for t, shape in volumes):
        return NotImplemented
    table = np.zeros((len(residents), 11), np.int64)  # the fields of kernels/gather_patches.cu
    for row, r in zip(table, residents, strict=True):
        row[:4] = [0 if t is None else t.data_ptr() for t in (r.interpolated, r.hr, r.label, r.mask)]
        row[4:7] = r.hr.shape
    table[:, 7:10] = origins_B3
    if flips_B3 is not None:
        table[:, 10] = np.asarray(flips_B3, bool) @ np.array([1, 2, 4])
    p = x_B1PPP.shape[-1]
    launch(
        "gather_patches",
        (p * p, p, len(table)),
        [x_B1PPP, y_BCPPP, torch.from_numpy(table).to(x_B1PPP.device), len(table), p, classes],
        IMAGE=image,
    )
    return x_B1PPP, y_BCPPP


def _example(seed: int, device: torch.device) -> tuple[Tensor, Tensor, list[Resident], np.ndarray, np.ndarray]:
    some, residents = np.random.default_rng(seed), []
    for name, shape in (("a", (9, 21, 17)), ("b", (16, 13, 30))):
        image, hr = (torch.from_numpy(some.random(shape, np.float32)).to(device) for _ in range(2))
        label, mask = (torch.from_numpy(some.integers(0, n, shape, np.uint8)).to(device) for n in (2, 3))
        residents.append(Resident(name, image, hr, label, mask, 3.0, np.zeros((0, 3), int)))
    chosen = [residents[i] for i in (0, 1, 1, 0, 1)]
    origins, flips = some.integers(-4, 10, (5, 3)), some.integers(0, 2, (5, 3)) > 0
    x, y = (torch.full((5, channels, 12, 12, 12), torch.nan, device=device) for channels in (1, 5))
    return x, y, chosen, origins, flips


@op("gather_patches", launch=_gather_by_kernel, example=_example)
def _gather(
    x_B1PPP: Tensor, y_BCPPP: Tensor, residents: list[Resident], origins_B3: np.ndarray, flips_B3: np.ndarray | None
) -> tuple[Tensor, Tensor]:
    """Fill network inputs and targets with one patch of each resident."""
    classes = y_BCPPP.shape[1] - 2
    for b, (r, origin) in enumerate(zip(residents, origins_B3, strict=True)):
        copy_patch(x_B1PPP[b, 0], r.interpolated, origin)
        copy_patch(y_BCPPP[b, 0], r.hr, origin)
        copy_patch(y_BCPPP[b, 1], r.label, origin)
        if classes:
            _one_hot(y_BCPPP[b, 2:], r, origin)
        if flips_B3 is not None and flips_B3[b].any():
            axes = [1 + int(d) for d in np.flatnonzero(flips_B3[b])]
            for patch in (x_B1PPP[b], y_BCPPP[b]):
                patch.copy_(patch.flip(axes))
    return x_B1PPP, y_BCPPP


def _one_hot(out_CPPP: Tensor, resident: Resident, origin: np.ndarray) -> None:
    if resident.mask is None:
        raise InputError(resident.subject, "has no mask", "fit_mask needs Mask_image for every subject")
    classes = torch.empty_like(out_CPPP[0], dtype=torch.uint8)
    copy_patch(classes, resident.mask, origin)
    for c, out in enumerate(out_CPPP):
        torch.eq(classes, c, out=out)


def copy_patch(out_PPP: Tensor, volume_XYZ: Tensor, origin: np.ndarray) -> None:
    """Copy the patch at ``origin`` into ``out``, converting its type; zeros where it hangs over an edge."""
    source, target, inside = [], [], True
    for o, p, n in zip(origin, out_PPP.shape, volume_XYZ.shape, strict=True):
        low, high = max(int(o), 0), min(int(o) + p, n)
        source.append(slice(low, high))
        target.append(slice(low - int(o), high - int(o)))
        inside &= high - low == p
    if not inside:
        out_PPP.zero_()
    out_PPP[tuple(target)].copy_(volume_XYZ[tuple(source)])
