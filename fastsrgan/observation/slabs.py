"""The passes of degradation over a volume, whole or in slabs across its thickest axis (decision 001).

Two passes, because the maximum and the noise of the low-resolution image are global: ``acquire`` makes that image,
``interpolate`` and ``truth`` make what is on the high-resolution grid. A slab of low-resolution slices reads the planes
under its slice profiles, no more; every slab of the interpolation sees the whole low-resolution image. The halo is
therefore exact, and slabs differ from the whole volume by the rounding of float32 alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastsrgan.errors import ResourceError
from fastsrgan.observation.artefacts import Drawn
from fastsrgan.volume.intensity import contrast_power
from fastsrgan.volume.resample import Matrix, apply_axes, support

Region = tuple[slice, slice, slice]  # of the high-resolution grid, without steps


@dataclass(frozen=True)
class SharpImage:
    """An image that is read in slabs across ``axis``.

    image : (X, Y, Z) array of any real dtype (also memory-mapped), or a tensor on any device
    fields : artefacts of the image itself
    """

    image: Any
    axis: int
    fields: Sequence[Drawn] = ()

    def slab(self, start: int, stop: int) -> torch.Tensor:
        """Planes start..stop as contiguous float32, the fields applied; may share memory with the image."""
        part = self.image[(slice(None),) * self.axis + (slice(start, stop),)]
        if not isinstance(part, torch.Tensor):
            part = torch.from_numpy(np.require(part, np.float32, ["C", "W"]))
        part = part.to(torch.float32).contiguous()
        for field in self.fields:
            part = field(part, self.image.shape, self.axis, start)
        return part


@dataclass(frozen=True)
class Slabs:
    """How many low-resolution slices and high-resolution planes are made at a time."""

    slices: int
    planes: int


def plan(source: SharpImage, down: list[Matrix], moving: bool, budget: int | None) -> Slabs:
    """Slabs whose working memory stays below ``budget`` bytes; None is one slab.

    Working memory is what is needed besides the image and the three results. Raises ResourceError for a budget below
    one slice.
    """
    n, matrix = source.image.shape[source.axis], down[source.axis]
    m = n if matrix is None else len(matrix)
    if budget is None:
        return Slabs(m, n)
    plane = 4 * math.prod(source.image.shape) // n
    reach = 1 if matrix is None else max(support(row[None]).stop - support(row[None]).start for row in matrix)
    copies = 2 + bool(source.fields)  # as float32, its product with the first operator, a field
    per_slice = plane * (copies * n / m + 2 + 4 * moving)
    halo = plane * copies * (reach + 1)
    if budget < (least := halo + per_slice):
        reason = f"{budget / 1e9:.3g} GB cannot hold one slice of this volume and its neighbours"
        raise ResourceError("block memory", reason, f"--block-memory {1.01 * least / 1e9:.3g} or more")
    slices = int((budget - halo) / per_slice)
    return Slabs(min(m, slices), min(n, budget // ((copies + 1) * plane)))


def acquire(
    source: SharpImage,
    down: list[Matrix],
    slabs: Slabs,
    artefacts: Sequence[Drawn] = (),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> torch.Tensor:
    """The image through the operators ``down``: (x, y, z) float32, in memory of its own.

    With ``artefacts`` of slices, these are formed first, then changed, and decimation within them comes last.
    """
    axis, matrix = source.axis, down[source.axis]
    shape = [n if d is None else len(d) for n, d in zip(source.image.shape, down, strict=True)]

    def slices(first: int, last: int) -> torch.Tensor:
        rows = None if matrix is None else matrix[first:last]
        read = slice(first, last) if rows is None else support(rows)
        slab = source.slab(read.start, read.stop)
        across: list[Matrix] = [None] * 3
        across[axis] = None if rows is None else rows[:, read]
        within = [None if d == axis else m for d, m in enumerate(down)]
        if not artefacts:
            within[axis] = across[axis]
            done = apply_axes(slab, within)
            return done.clone() if done.data_ptr() == slab.data_ptr() else done
        stack = apply_axes(slab, across)
        for artefact in artefacts:
            stack = artefact.rows(first, last)(stack, spacing_mm, axis)
        return apply_axes(stack, within)

    return _gather(slices, shape, axis, slabs.slices)


def interpolate(
    low_res: torch.Tensor, up: list[Matrix], axis: int, slabs: Slabs, region: Region | None = None
) -> torch.Tensor:
    """The low-resolution image through the operators ``up``: (X, Y, Z) float32, or ``region`` of it."""
    if region is not None:
        low_res = low_res[tuple(r if u is None else slice(None) for r, u in zip(region, up, strict=True))]
        up = [None if u is None else u[r] for r, u in zip(region, up, strict=True)]
    shape = [n if u is None else len(u) for n, u in zip(low_res.shape, up, strict=True)]
    matrix = up[axis]

    def planes(first: int, last: int) -> torch.Tensor:
        rows = None if matrix is None else matrix[first:last]
        seen = slice(first, last) if rows is None else support(rows)
        here = [(None if rows is None else rows[:, seen]) if d == axis else u for d, u in enumerate(up)]
        return apply_axes(low_res.narrow(axis, seen.start, seen.stop - seen.start), here)

    return _gather(planes, shape, axis, slabs.planes)


def truth(source: SharpImage, power: float, unit: float, slabs: Slabs, region: Region | None = None) -> torch.Tensor:
    """The image after the contrast power, max(image / unit, 0) ** power: (X, Y, Z) float32, or ``region`` of it."""
    region = region or (slice(0, None),) * 3
    starts, stops, _ = zip(*(r.indices(n) for r, n in zip(region, source.image.shape, strict=True)), strict=True)
    shape = [stop - start for start, stop in zip(starts, stops, strict=True)]
    within = tuple(slice(None) if d == source.axis else r for d, r in enumerate(region))

    def planes(first: int, last: int) -> torch.Tensor:
        begin = starts[source.axis]
        return contrast_power(source.slab(begin + first, begin + last)[within].contiguous(), power, unit)

    return _gather(planes, shape, source.axis, slabs.planes)


def _gather(make: Callable[[int, int], torch.Tensor], shape: Sequence[int], axis: int, step: int) -> torch.Tensor:
    """``make(first, last)`` of every slab along ``axis``, put together. Nothing of a slab outlives it."""
    if step >= shape[axis]:
        return make(0, shape[axis])
    out = torch.empty(0)
    for first in range(0, shape[axis], step):
        count = min(step, shape[axis] - first)
        part = make(first, first + count)
        if not first:
            out = torch.empty(tuple(shape), device=part.device)
        out.narrow(axis, first, count).copy_(part)
        del part
    return out
