"""Where a network looks: tile plans, the gathering of tiles into batches, their windows, and regions of interest.

A plan is a product grid: one ascending list of origins per axis, in voxels of the padded volume. Every voxel of the
volume lies in at least one tile; tiles are visited in C order of the grid, the last axis fastest. The weight of a
tile's voxels where tiles overlap is therefore a product of three 1-D windows. Tiles that do not touch the region where
results are wanted, a mask or the box around a head, are left out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsrgan.config import MIN_SIZE, SIZE_MULTIPLE
from fastsrgan.core.kernels import Argument, launch, op, reference_only, runs_kernels, scalar
from fastsrgan.errors import InputError, UsageError
from fastsrgan.infer.values import EVEN, WINDOWS, PerAxis, check_tile, per_axis
from fastsrgan.volume.head import tissue_box, tissue_level

PADDINGS = ("shift", "original")

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class TilePlan:
    """A product grid of equal tiles over a padded volume.

    Attributes
    ----------
    shape : (X, Y, Z) of the volume
    padded_shape : its shape after padding, what the origins refer to
    pad_before : voxels added in front of each axis
    patch : edge lengths of every tile
    origins : three ascending lists, tile origins along each axis
    mirror : padding repeats the volume mirrored at its faces; else it is zero
    window : weight of a tile's voxels where tiles overlap, a name in ``WINDOWS``
    """

    shape: Triple
    padded_shape: Triple
    pad_before: Triple
    patch: Triple
    origins: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    mirror: bool = True
    window: str = EVEN

    @property
    def grid(self) -> Triple:
        """Number of tiles along each axis."""
        return len(self.origins[0]), len(self.origins[1]), len(self.origins[2])

    def __len__(self) -> int:
        nx, ny, nz = self.grid
        return nx * ny * nz

    def __iter__(self) -> Iterator[Triple]:
        """Origins of the tiles in the order in which they are gathered and stitched."""
        return (self.origin(n) for n in range(len(self)))

    def index(self, n: int) -> Triple:
        """Tile number -> its place (ix, iy, iz) in the grid."""
        _, ny, nz = self.grid
        return n // (ny * nz), n // nz % ny, n % nz

    def origin(self, n: int) -> Triple:
        """Tile number -> its first voxel in the padded volume."""
        ix, iy, iz = self.index(n)
        return self.origins[0][ix], self.origins[1][iy], self.origins[2][iz]

    @property
    def crop(self) -> tuple[slice, slice, slice]:
        """The part of a padded array that is the volume."""
        x, y, z = (slice(b, b + n) for b, n in zip(self.pad_before, self.shape, strict=True))
        return x, y, z


def plan(
    shape_XYZ: Sequence[int],
    patch: PerAxis,
    step: int | Sequence[int],
    *,
    padding: str = "shift",
    multiple: int = SIZE_MULTIPLE,
    window: str = EVEN,
) -> TilePlan:
    """The tiles that cover a volume.

    Parameters
    ----------
    shape_XYZ : of the volume
    patch : edge of a tile in voxels, one for all axes or one per axis; None takes the whole axis as one tile
    step : distance between neighbouring tiles, at most the patch; one or one per axis, without effect where a single
        tile is enough
    padding : ``"shift"``: the last tile is moved back so that it ends with the volume; an axis shorter than the patch
        becomes one tile, mirrored up to the next ``multiple`` (at least 8), since instance norms see the whole tile.
        ``"original"``: zeros around the volume so that steps fit, ``step - (n - patch) % step`` of them, a whole step
        when they fitted already, the smaller half in front; with patch None up to a multiple of 4, plus 4 when it
        already is one, as in the original. An axis that this leaves shorter than the patch, where the original
        fails, is padded to the patch.
    multiple : a multiple of 4; a larger one gives volumes of many sizes tiles of few sizes
    window : of the tiles

    Raises
    ------
    UsageError : a patch that is no multiple of 4 or below 8, a step below 1 or above the patch (gaps).
    """
    if padding not in PADDINGS:
        raise UsageError("padding", f"{padding!r} is not allowed", f"one of {', '.join(PADDINGS)}")
    shape = per_axis("volume", shape_XYZ)
    if any(n is None or n < 1 for n in shape):
        raise UsageError("volume", f"of shape {tuple(shape_XYZ)} has no voxels", "each size must be at least 1")
    along = functools.partial(_axis_shift, multiple=multiple) if padding == "shift" else _axis_original
    axes = []
    for n, p, s in zip(shape, per_axis("patch", patch), per_axis("step", step), strict=True):
        check_tile(p, s)
        axes.append(along(n, p, s))
    before, padded, sizes, origins = zip(*axes, strict=True)
    return TilePlan(shape, padded, before, sizes, origins, padding == "shift", window)  # type: ignore[arg-type]


def pad(volume_XYZ: Tensor, plan: TilePlan) -> Tensor:
    """(X, Y, Z) -> the plan's padded shape, on the same device; the volume itself where nothing is added."""
    if plan.padded_shape == plan.shape:
        return volume_XYZ
    widths = [(b, total - n - b) for n, total, b in zip(plan.shape, plan.padded_shape, plan.pad_before, strict=True)]
    if not plan.mirror:
        return F.pad(volume_XYZ, [w for pair in reversed(widths) for w in pair])
    for axis, (n, (before, after)) in enumerate(zip(plan.shape, widths, strict=True)):
        if before or after:
            # Folding serves any width, also when more is added than the axis holds; torch's modes do not.
            folded = np.arange(-before, n + after) % (2 * n)
            index = torch.from_numpy(np.minimum(folded, 2 * n - 1 - folded)).to(volume_XYZ.device)
            volume_XYZ = volume_XYZ.index_select(axis, index)
    return volume_XYZ


def gather(volume_XYZ: Tensor, plan: TilePlan, indices: Sequence[int], out_N1XYZ: Tensor | None = None) -> Tensor:
    """Tiles ``indices`` of a padded volume: (len(indices), 1, *plan.patch) on the volume's device.

    They are written into the first rows of ``out_N1XYZ`` when given, in its dtype, and a view of those is returned.
    """
    if out_N1XYZ is None:
        out_N1XYZ = volume_XYZ.new_empty((len(indices), 1, *plan.patch))
    return _gather(out_N1XYZ[: len(indices)], volume_XYZ, plan, indices)


def view(volume_XYZ: Tensor, plan: TilePlan, indices: Sequence[int]) -> Tensor | None:
    """What ``gather`` gives, as a read-only look at a padded volume: no copy, overlapping tiles share their voxels.

    None where tiles do not lie at one distance from each other in memory (the last of a row is moved back, a batch goes
    over the end of a row), or the volume still has to be padded. One or two tiles always can be looked at.
    """
    if tuple(volume_XYZ.shape) != plan.padded_shape:
        return None
    stride = volume_XYZ.stride()
    places = [sum(o * s for o, s in zip(plan.origin(n), stride, strict=True)) for n in indices]
    steps = {after - before for before, after in itertools.pairwise(places)}
    if len(steps) > 1 or min(steps, default=0) < 0:
        return None
    apart = steps.pop() if steps else 0
    first = volume_XYZ.storage_offset() + places[0]
    return volume_XYZ.as_strided((len(indices), 1, *plan.patch), (apart, 0, *stride), first)


def look(volume_XYZ: Tensor, plan: TilePlan, indices: Sequence[int]) -> Tensor:
    """Tiles to read only: on a CPU without kernels a ``view`` where there is one, else a copy."""
    plain = volume_XYZ.device.type == "cpu" and not runs_kernels(volume_XYZ.device) and not reference_only()
    seen = view(volume_XYZ, plan, indices) if plain else None
    return gather(volume_XYZ, plan, indices) if seen is None else seen


def _gather_by_kernel(out_N1XYZ: Tensor, volume_XYZ: Tensor, plan: TilePlan, indices: Sequence[int]) -> Any:
    source, target = scalar(volume_XYZ.dtype), scalar(out_N1XYZ.dtype)
    if source is None or target in (None, "u8") or not out_N1XYZ.is_contiguous():
        return NotImplemented
    origins = torch.tensor([plan.origin(n) for n in indices], dtype=torch.int32).to(volume_XYZ.device)
    px, py, pz = plan.patch
    before = (0, 0, 0) if tuple(volume_XYZ.shape) == plan.padded_shape else plan.pad_before
    args: list[Argument] = [out_N1XYZ, volume_XYZ, *volume_XYZ.stride(), origins]
    args += [len(indices), px, py, pz, *volume_XYZ.shape, *before, int(plan.mirror)]
    launch("gather_tiles", (py * pz, px, len(indices)), args, SOURCE=source, TARGET=target)
    return out_N1XYZ


def _example(seed: int, device: torch.device) -> tuple[Tensor, Tensor, TilePlan, range]:
    some = torch.randn((5, 29, 37), generator=torch.Generator().manual_seed(seed)).to(device)
    tiles = plan(some.shape, (16, 12, 20), (1, 5, 7))
    return some.new_full((7, 1, *tiles.patch), torch.nan), some, tiles, range(3, 10)


@op("gather_tiles", launch=_gather_by_kernel, example=_example)
def _gather(out_N1XYZ: Tensor, volume_XYZ: Tensor, plan: TilePlan, indices: Sequence[int]) -> Tensor:
    """Fill ``out`` with tiles of a volume, padded or not. One that is not is padded here, but not by the kernel."""
    padded = volume_XYZ if tuple(volume_XYZ.shape) == plan.padded_shape else pad(volume_XYZ, plan)
    px, py, pz = plan.patch
    for row, n in enumerate(indices):
        x, y, z = plan.origin(n)
        out_N1XYZ[row, 0].copy_(padded[x : x + px, y : y + py, z : z + pz])
    return out_N1XYZ


def _axis_shift(n: int, patch: int | None, step: int, multiple: int) -> tuple[int, int, int, tuple[int, ...]]:
    """One axis -> (pad before, padded size, tile size, origins)."""
    if patch is None or n <= patch:
        size = max(MIN_SIZE, -(-n // multiple) * multiple)
        size = size if patch is None else min(size, patch)
        return (size - n) // 2, size, size, (0,)
    last = n - patch
    return 0, n, patch, (*range(0, last, step), last)


def _axis_original(n: int, patch: int | None, step: int) -> tuple[int, int, int, tuple[int, ...]]:
    """One axis -> (pad before, padded size, tile size, origins)."""
    if patch is None:
        size = max(MIN_SIZE, n + SIZE_MULTIPLE - n % SIZE_MULTIPLE)
        return (size - n) // 2, size, size, (0,)
    size = max(n + step - (n - patch) % step, patch)
    return (size - n) // 2, size, patch, tuple(range(0, size - patch + 1, step))


# --- windows --------------------------------------------------------------------------------------------------------

FLOOR = 1e-3  # of the peak: a voxel that only tile corners cover must keep digits


def window_of(name: str, n: int) -> np.ndarray:
    """The weights of ``n`` voxels along a tile's edge, (n,) float64, from 1e-3 to 1. Raises UsageError."""
    if name not in WINDOWS:
        raise UsageError("window", f"{name!r} is not allowed", f"one of {', '.join(WINDOWS)}")
    return np.array([max(WINDOWS[name]((2 * i + 1 - n) / n), FLOOR) for i in range(n)])


def weights(plan: TilePlan) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The pre-divided 1-D windows of a plan: for each axis one (patch,) float32 array per tile along it.

    At every voxel of the padded axis the float32 sum, in tile order, of the weights that cover it is exactly 1.
    Raises UsageError for an unknown window.
    """
    x, y, z = (
        _axis_weights(n, p, origins, window_of(plan.window, p))
        for n, p, origins in zip(plan.padded_shape, plan.patch, plan.origins, strict=True)
    )
    return x, y, z


def _axis_weights(n: int, patch: int, origins: tuple[int, ...], window: np.ndarray) -> list[np.ndarray]:
    total = np.zeros(n)
    for o in origins:
        total[o : o + patch] += window
    result, so_far = [], np.zeros(n, np.float32)
    for o, following in zip(origins, (*origins[1:], n), strict=True):
        here = slice(o, o + patch)
        w = (window / total[here]).astype(np.float32)
        # The last tile over a voxel gets what is missing to 1, so that ones in are ones out to the last bit.
        final = min(following - o, patch)
        w[:final] = 1 - so_far[o : o + final]
        so_far[here] += w
        result.append(w)
    return result


def raw_weights(plan: TilePlan) -> tuple[np.ndarray | None, ...]:
    """What every tile is multiplied with along x, y and z where the sum is divided at the end: (patch,) float64.

    None stands for ones: the constant window, and an axis that a single tile fills.
    """
    return tuple(
        None if plan.window == EVEN or p == n else window_of(plan.window, p)
        for p, n in zip(plan.patch, plan.padded_shape, strict=True)
    )


def window_sums(plan: TilePlan) -> tuple[Tensor, Tensor, Tensor]:
    """``raw_weights`` summed over the tiles of each axis, (X,), (Y,) and (Z,) float32; of a voxel, their product."""
    sums = []
    for n, p, origins, w in zip(plan.padded_shape, plan.patch, plan.origins, raw_weights(plan), strict=True):
        total = np.zeros(n)
        for o in origins:
            total[o : o + p] += 1 if w is None else w
        sums.append(torch.from_numpy(total.astype(np.float32)))
    return sums[0], sums[1], sums[2]


def divide_planes(planes_CnYZ: Tensor, x: int, sums: Sequence[Tensor]) -> None:
    """Divide planes ``x``, ``x`` + 1, ... by their ``window_sums``, in place: one pass."""
    along_x, along_y, along_z = sums
    in_plane = along_y[:, None] * along_z
    # Neighbouring planes lie in the same tiles mostly: one division for all of those.
    for value, alike in itertools.groupby(along_x[x : x + planes_CnYZ.shape[1]].tolist()):
        count = len(list(alike))
        planes_CnYZ[:, :count].div_(in_plane * value)
        planes_CnYZ = planes_CnYZ[:, count:]


# --- where results are wanted ---------------------------------------------------------------------------------------

MARGIN_MM = 10.0  # around a head


@dataclass(frozen=True)
class Region:
    """Voxels of a volume, by way of a mask on another grid.

    mask : (A, B, C) bool
    index : for each axis of the volume the place in the mask of every voxel, ascending
    """

    mask: np.ndarray
    index: tuple[np.ndarray, np.ndarray, np.ndarray]

    def planes(self, first: int, stop: int) -> Tensor:
        """(stop - first, Y, Z) bool."""
        x, y, z = self.index
        return torch.from_numpy(self.mask[x[first:stop]][:, y][:, :, z])

    def touches(self, first: Sequence[int], stop: Sequence[int]) -> bool:
        """Whether a block of voxels, which may reach over the volume's edges, holds one of the region."""
        cuts = []
        for index, a, b in zip(self.index, first, stop, strict=True):
            a, b = max(a, 0), min(b, len(index))
            if a >= b:
                return False
            cuts.append(slice(index[a], index[b - 1] + 1))
        return bool(self.mask[tuple(cuts)].any())


def from_mask(mask_XYZ: np.ndarray, index: Sequence[np.ndarray]) -> Region:
    """The voxels that a mask marks. Raises InputError when there is none."""
    mask = np.asarray(mask_XYZ) > 0
    if not mask.any():
        raise InputError("mask", "marks no voxel", "at least one voxel above 0")
    return Region(mask, (index[0], index[1], index[2]))


def from_box(low: Sequence[int], high: Sequence[int], index: Sequence[np.ndarray]) -> Region:
    """The voxels whose place lies within ``low`` ... ``high``, both included."""
    mask = np.zeros((3, 3, 3), bool)
    mask[1, 1, 1] = True
    inside = [(i >= a).astype(int) + (i > b) for i, a, b in zip(index, low, high, strict=True)]
    return Region(mask, (inside[0], inside[1], inside[2]))


def head_box(data_XYZ: np.ndarray, spacing_mm: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First and last voxel, per axis, of the box around a head: ``tissue_box`` and 10 mm more."""
    low, high = tissue_box(data_XYZ, tissue_level(data_XYZ))
    margins = [round(MARGIN_MM / spacing) for spacing in spacing_mm]
    return (
        tuple(max(0, a - margin) for a, margin in zip(low, margins, strict=True)),
        tuple(min(n - 1, b + margin) for n, b, margin in zip(data_XYZ.shape, high, margins, strict=True)),
    )
