"""3^3 convolutions of stride 1 on reflected edges with an eighth of the products: Winograd's F(4, 3) along each axis.

Four outputs of a three-tap filter are a cubic polynomial times a quadratic one, transposed: six products of values at
six points do what twelve products of taps do (Lavin & Gray 2016), 216 instead of 1728 for 4^3 voxels. Tiles, reflection
and values at the points are one small matrix per axis; six matrix products bring a volume there and back, a batched
one does the convolution. All of it is linear and exact; how much rounding grows depends on the points: with
0, +-0.7, +-1.4 and infinity float32 stays within 4 x of a plain convolution's rounding (tests/test_layers_forms.py),
with the usual 0, +-1, +-2 it would be 20 x.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsrgan.model.cpu.rearranged import once

TILE = 4  # outputs per tile and axis
POINTS = (0.0, 0.7, -0.7, 1.4, -1.4)  # and infinity
VALUES = len(POINTS) + 1
MIN_CHANNELS = 48
LEAST_CHANNELS = 16
MAX_WASTED = 1.5  # voxels of tiles per voxel
# Tiles per axis behind one matrix, there and back: that of a whole axis would be mostly zeros, that of one too small.
SPREAD, GATHER = 2, 4


class _Block(NamedTuple):
    """One matrix (values, stop - start): values of a few tiles from the voxels start to stop."""

    start: int
    stop: int
    matrix: Tensor


def pays(shape: torch.Size, weight: Tensor) -> bool:
    """Whether the products saved outweigh the passes over memory, for an image of ``shape``: the fixed rule."""
    return fits(shape, weight) and min(weight.shape[:2]) >= MIN_CHANNELS


def fits(shape: torch.Size, weight: Tensor) -> bool:
    """Whether it may pay on some machine."""
    wasted = math.prod(-(-n // TILE) * TILE / n for n in shape[2:])
    return min(weight.shape[:2]) >= LEAST_CHANNELS and wasted <= MAX_WASTED


def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, I, X, Y, Z), (O, I, 3, 3, 3) -> (B, O, X, Y, Z), and x at the points, (216, tiles, I), for ``backward``."""
    there, back = _axes(x, SPREAD), _axes(x, GATHER)
    # What outlives the call comes first: behind what does not, it would leave holes in memory.
    values = x.new_empty(VALUES**3, x.shape[0] * math.prod(-(-n // TILE) for n in x.shape[2:]), x.shape[1])
    out = x.new_empty(x.shape[0], len(weight), *x.shape[2:])
    _group(_spread(x, [a.inputs for a in there]), there, values)
    products = torch.bmm(values, _weight_values(weight).transpose(1, 2))
    _gather(_ungroup(products, back, x.shape[0]), [a.outputs for a in back], out)
    return out, values


def backward(
    grad: Tensor, values: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight, those of ``needs``: each step of ``forward`` transposed."""
    there, back = _axes(grad, SPREAD), _axes(grad, GATHER)
    dx = grad.new_empty(grad.shape[0], weight.shape[1], *grad.shape[2:]) if needs[0] else None
    g = _group(_spread(grad, [a.outputs for a in there]), there, grad.new_empty(*values.shape[:2], len(weight)))
    dw = None
    if needs[1]:
        products = torch.bmm(g.transpose(1, 2), values).view(*(VALUES,) * 3, *weight.shape[:2])
        dw = _gather(products, [_taps(grad.dtype)] * 3, torch.empty_like(weight))
    if dx is not None:
        products = torch.bmm(g, _weight_values(weight))
        _gather(_ungroup(products, back, grad.shape[0]), [a.inputs for a in back], dx)
    return dx, dw


class _TileAxis(NamedTuple):
    """What brings an axis to the points (``inputs``) and, transposed, back (``outputs``)."""

    inputs: list[_Block]
    outputs: list[_Block]
    tiles: int  # per block


def _toom() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (6, 4), G (6, 3), B (6, 6): y = A^T [(G w) (B x)] correlates 6 voxels with 3 taps; rows equally long."""

    def powers(count: int) -> np.ndarray:
        return np.array([[p**j for j in range(count)] for p in POINTS] + [[0.0] * (count - 1) + [1.0]])

    a, g, b = powers(TILE), powers(VALUES - TILE + 1), np.linalg.inv(powers(VALUES)).T
    lengths = [np.linalg.norm(m, axis=1, keepdims=True) for m in (a, g, b)]
    common = np.cbrt(lengths[0] * lengths[1] * lengths[2])
    a, g = a * common / lengths[0], g * common / lengths[1]
    return a, g, b * common / lengths[2]


@functools.cache
def _taps(dtype: torch.dtype) -> list[_Block]:
    return [_Block(0, 3, torch.from_numpy(_toom()[1]).to(dtype))]


def _axes(x: Tensor, tiles: int) -> list[_TileAxis]:
    return [_axis(n, x.dtype, tiles) for n in x.shape[2:]]


@functools.cache
def _axis(n: int, dtype: torch.dtype, wanted: int) -> _TileAxis:
    """The matrices of an axis of n voxels, edges reflected, about ``wanted`` tiles to a block."""
    a, _, b = _toom()
    total = -(-n // TILE)
    tiles = min((d for d in range(total, 0, -1) if total % d == 0), key=lambda d: abs(d - wanted))
    inputs, outputs = [], []
    for block in range(total // tiles):
        into, out = np.zeros((VALUES, tiles, n)), np.zeros((VALUES, tiles, n))
        for tile in range(tiles):
            first = (block * tiles + tile) * TILE
            for i in range(VALUES):
                at = abs(first + i - 1)
                at = 2 * (n - 1) - at if at >= n else at
                if at >= 0:  # else no output needs it
                    into[:, tile, at] += b[:, i]
            for i in range(min(TILE, n - first)):
                out[:, tile, first + i] = a[:, i]
        inputs.append(_cut(into, dtype))
        outputs.append(_cut(out, dtype))
    return _TileAxis(inputs, outputs, tiles)


def _cut(matrix: np.ndarray, dtype: torch.dtype) -> _Block:
    """Without the columns of zeros before and behind."""
    matrix = matrix.reshape(-1, matrix.shape[-1])
    (used,) = np.nonzero(matrix.any(0))
    start, stop = int(used[0]), int(used[-1]) + 1
    return _Block(start, stop, torch.from_numpy(np.ascontiguousarray(matrix[:, start:stop])).to(dtype))


@once
def _weight_values(weight: Tensor) -> Tensor:
    """(O, I, 3, 3, 3) -> (216, O, I)."""
    return _spread(weight, [_taps(weight.dtype)] * 3).view(VALUES**3, *weight.shape[:2])


def _spread(x: Tensor, axes: list[list[_Block]]) -> Tensor:
    """(a, b, X, Y, Z) -> (X', Y', Z', a, b): axis by axis, each product turning the last one to the front."""
    a, b = x.shape[:2]
    sizes = list(x.shape[2:])
    for d, blocks in reversed(list(enumerate(axes))):
        lines = x.reshape(-1, sizes[d])
        sizes[d] = sum(len(block.matrix) for block in blocks)
        x = x.new_empty(sizes[d], len(lines))
        for row, block in zip(_rows(x, blocks), blocks, strict=True):
            torch.mm(block.matrix, lines[:, block.start : block.stop].t(), out=row)
    return x.view(*sizes, a, b)


def _gather(x: Tensor, axes: list[list[_Block]], out: Tensor) -> Tensor:
    """The transpose of ``_spread``: (X', Y', Z', a, b) -> ``out`` (a, b, X, Y, Z)."""
    for d, blocks in enumerate(axes):
        values = x.reshape(sum(len(block.matrix) for block in blocks), -1)
        x = out.view(-1, out.shape[-1]) if d == 2 else x.new_empty(values.shape[1], blocks[-1].stop)
        if len(blocks) == 1:
            torch.mm(values.t(), blocks[0].matrix, out=x)
            continue
        x.zero_()
        for row, block in zip(_rows(values, blocks), blocks, strict=True):
            x[:, block.start : block.stop].addmm_(row.t(), block.matrix)  # neighbours may overlap
    return out


def _rows(x: Tensor, blocks: list[_Block]) -> tuple[Tensor, ...]:
    return x.split([len(block.matrix) for block in blocks])


def _group(x: Tensor, axes: list[_TileAxis], out: Tensor) -> Tensor:
    """(X', Y', Z', b, c) -> ``out`` (216, tiles, c): what belongs to one point together."""
    shape = [n for a in axes for n in (len(a.inputs), VALUES, a.tiles)]
    x = x.view(*shape, *x.shape[3:]).permute(1, 4, 7, 0, 2, 3, 5, 6, 8, 9, 10)
    out.view(x.shape).copy_(x)
    return out


def _ungroup(x: Tensor, axes: list[_TileAxis], batch: int) -> Tensor:
    """The inverse of ``_group``."""
    tiles = [n for a in axes for n in (len(a.inputs), a.tiles)]
    x = x.view(*(VALUES,) * 3, *tiles, batch, x.shape[-1]).permute(3, 0, 4, 5, 1, 6, 7, 2, 8, 9, 10)
    return x.reshape(*(len(a.inputs) * VALUES * a.tiles for a in axes), *x.shape[-2:])
