"""The generator's layers for CUDA: channels innermost throughout, as few passes over memory as a compiler can make.

Arrays are (B, C, X, Y, Z) whose memory is (B, X, Y, Z, C). torch's reflect and replicate padding return the other
layout on CUDA, so every pad would undo what the convolutions want, and their gradients add with atomics. Here an index
gathers the padded voxels, and its gradient gathers what was padded from each voxel; norm, ReLU and padding are one
function of the norm's input, which is all that it keeps. Inductor makes two passes of it forward (statistics; the rest)
and three backward (the gradient; sums; the rest); ``python -m bench traffic`` counts the bytes. All of it runs on a CPU
too, where tests/test_gpu_forms.py and test_layers_forms.py hold it to the plain forms, but no layer of a CPU takes it.
None of it has run on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsrgan.model.cpu.doubling import transposed_weight
from fastsrgan.model.cpu.normed import NORM_EPS
from fastsrgan.model.cpu.rearranged import once

AXES = (1, 2, 3)  # of space, in memory
ALIGNED = 8  # channels that a tensor core reads at once in half precision


class Padding(NamedTuple):
    """width : voxels on each side of the three axes; repeated : the edge voxel again and again, else mirrored at it"""

    width: int
    repeated: bool = False


class Layer(NamedTuple):
    """A convolution (padded input, weight) -> output behind its padding."""

    padding: Padding
    convolve: Callable[[Tensor, Tensor], Tensor]


def inner(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (B, X, Y, Z, C), contiguous: a view of what this module makes."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def outer(x: Tensor) -> Tensor:
    """The inverse view."""
    return x.permute(0, 4, 1, 2, 3)


# --- padding --------------------------------------------------------------------------------------------------------


def gather(x: Tensor, padding: Padding) -> Tensor:
    """(B, X, Y, Z, C) -> padded, in one pass."""
    if not padding.width:
        return x
    index: list[Tensor | None] = [None]
    for axis in AXES:
        n = x.shape[axis]
        at = torch.arange(-padding.width, n + padding.width, device=x.device)
        at = at.clamp(0, n - 1) if padding.repeated else n - 1 - (n - 1 - at.abs()).abs()
        index.append(at.view(-1, *(1,) * (len(AXES) - axis)))
    return torch.ops.aten._unsafe_index(x, index).contiguous()


def fold(g: Tensor, padding: Padding) -> Tensor:
    """The transpose of ``gather``: each voxel takes the gradients of all voxels that were padded from it."""
    w = padding.width
    if not w:
        return g
    if torch.compiler.is_compiling():
        return _fold_at_once(g, padding)
    g = g.clone()
    for axis in AXES:
        n = g.shape[axis] - 2 * w
        for side in (0, 1):
            rim = g.narrow(axis, side * (n + w), w)
            if padding.repeated:
                rim, first = rim.sum(axis, keepdim=True), w + side * (n - 1)
            else:
                rim, first = rim.flip(axis), w + 1 if side == 0 else n - 1
            g.narrow(axis, first, rim.shape[axis]).add_(rim)
        g = g.narrow(axis, w, n)
    return g


def _fold_at_once(g: Tensor, padding: Padding) -> Tensor:
    """``fold`` without a result between: a sum of gathers, of which a compiler makes one pass.

    Along an axis a voxel is padded to one side at most, but where that has few voxels: 8 gathers, or up to 27.
    """
    w = padding.width
    places = []
    for axis in AXES:
        n = g.shape[axis] - 2 * w
        at = torch.arange(n, device=g.device)
        low, high = (
            (at == 0, at == n - 1) if padding.repeated else ((at > 0) & (at <= w), (at >= n - 1 - w) & (at < n - 1))
        )
        mirrored = (at, at + 2 * w) if padding.repeated else (w - at, 2 * (n - 1) + w - at)
        both = [(m.clamp(0, n - 1 + 2 * w), where) for m, where in zip(mirrored, (low, high), strict=True)]
        if n > (1 if padding.repeated else 2 * w + 1):
            both = [(torch.where(low, both[0][0], both[1][0]), low | high)]
        shape = (-1, *(1,) * (len(AXES) - axis))
        places.append([(i.view(shape), None if m is None else m.view(*shape, 1)) for i, m in ((at + w, None), *both)])
    total = None
    for combination in itertools.product(*places):
        part = torch.ops.aten._unsafe_index(g, [None, *(index for index, _ in combination)])
        masks = [mask for _, mask in combination if mask is not None]
        if masks:
            part = torch.where(functools.reduce(torch.logical_and, masks), part, 0)
        total = part if total is None else total + part
    assert total is not None
    return total


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, padding: Padding) -> Tensor:  # type: ignore[override]
        ctx.padding = padding
        return outer(gather(inner(x), padding))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return outer(fold(inner(grad), ctx.padding)), None


def pad(x: Tensor, padding: Padding) -> Tensor:
    """(B, C, X, Y, Z) padded, with channels innermost."""
    return _Pad.apply(x, padding)


# --- instance norm, ReLU, padding -----------------------------------------------------------------------------------


class _NormPad(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, flat: Tensor | None, padding: Padding
    ) -> Tensor:
        v = inner(x)
        wide = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
        var, mean = torch.var_mean(wide, AXES, unbiased=False, keepdim=True)
        std = var.sqrt()
        constant = std == 0 if flat is None else (std == 0) | flat
        rstd = torch.where(constant, 0, 1 / (std + NORM_EPS))
        gain = rstd * scale.to(wide.dtype)
        bias = shift.to(wide.dtype) - mean * gain
        ctx.relu, ctx.padding = relu, padding
        ctx.save_for_backward(x, mean, std, rstd, gain, bias)
        padded = gather(v, padding)
        y = torch.addcmul(bias, padded.to(wide.dtype), gain)
        return outer((y.relu() if relu else y).to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, mean, std, rstd, gain, bias = ctx.saved_tensors
        # g stays in the type of the activations: a compiler writes it between its two passes.
        v, g = inner(x).to(mean.dtype), fold(inner(grad), ctx.padding)
        if ctx.relu:
            g = torch.where(torch.addcmul(bias, v, gain) > 0, g, 0)
        n = math.prod(v.shape[1:4])
        v = v - mean
        g_sum, gx_sum = g.sum(AXES, keepdim=True, dtype=mean.dtype), (g * v).sum(AXES, keepdim=True)
        pull = torch.where(std > 0, rstd * gx_sum / (n * std), 0)
        dx = gain * (g - g_sum / n - v * pull)
        return outer(dx.to(x.dtype)), (gx_sum * rstd).sum(0).flatten(), g_sum.sum(0).flatten(), None, None, None


def norm_pad(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, flat: Tensor | None, padding: Padding) -> Tensor:
    """Instance norm as ``layers.InstanceNorm`` has it, ReLU if asked, padding; one function for autograd.

    Only x and numbers of each channel are kept for the backward pass. ``flat``: (B, 1, 1, 1, 1) bool.
    """
    return _NormPad.apply(x, scale, shift, relu, flat, padding)


# --- convolutions behind their padding ------------------------------------------------------------------------------


def same(padded: Tensor, weight: Tensor) -> Tensor:
    """3^3, size kept."""
    return F.conv3d(padded, weight)


def halving(padded: Tensor, weight: Tensor) -> Tensor:
    """3^3 with stride 2."""
    return F.conv3d(padded, weight, stride=2)


def doubling(padded: Tensor, weight: Tensor) -> Tensor:
    """Nearest x2 and 3^3 as one transposed convolution (cpu/doubling.py)."""
    return F.conv_transpose3d(padded, _transposed(weight), stride=2, padding=3)


@once
def _transposed(weight: Tensor) -> Tensor:
    # A convolution's result has its channels innermost where its weight has: a compiler does not see it in the input.
    return transposed_weight(weight).contiguous(memory_format=torch.channels_last_3d)


def seven(padded: Tensor, weight: Tensor) -> Tensor:
    """7^3 on even sizes, as one convolution of stride (2, 4, 4): each of its outputs holds a block of 32 voxels.

    A product with 2 columns, the generator's head, leaves tensor cores idle; with 64 they are full. The kernel grows to
    (8, 10, 10), 2.3 times the taps. Where 4 does not divide a size the stride is 2 there. The stem has as many columns
    as it needs but a single input channel: from few channels the blocks are of the input too, of 2^3, so that 8 lie
    innermost.
    """
    sizes = [n - 6 for n in padded.shape[2:]]
    if weight.shape[1] * 8 <= 2 * ALIGNED:
        return _merge(F.conv3d(_split(padded), _split_taps(weight)), (2, 2, 2))
    stride = (2, 4 if sizes[1] % 4 == 0 else 2, 4 if sizes[2] % 4 == 0 else 2)
    return _merge(F.conv3d(padded, _dense(weight, stride), stride=stride), stride)


@once
def _dense(weight: Tensor, block: tuple[int, int, int]) -> Tensor:
    """(O, I, k, k, k) -> (block voxels x O, I, k + bx - 1, ...): the same taps for each voxel of a block of outputs."""
    bx, by, bz = block
    rows = [
        F.pad(weight, (z, bz - 1 - z, y, by - 1 - y, x, bx - 1 - x))
        for x in range(bx) for y in range(by) for z in range(bz)
    ]  # fmt: skip
    return torch.cat(rows).contiguous(memory_format=torch.channels_last_3d)


def _merge(y: Tensor, block: tuple[int, int, int]) -> Tensor:
    """(B, block voxels x O, X, Y, Z) -> (B, O, bx X, by Y, bz Z), channels innermost."""
    v = inner(y)
    b, nx, ny, nz, channels = v.shape
    bx, by, bz = block
    v = v.view(b, nx, ny, nz, bx, by, bz, channels // math.prod(block)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return outer(v.reshape(b, bx * nx, by * ny, bz * nz, -1))


def _split(x: Tensor) -> Tensor:
    """(B, C, 2X, 2Y, 2Z) -> (B, 8 C, X, Y, Z), channels innermost: each 2^3 block of voxels becomes channels."""
    v = inner(x)
    b, nx, ny, nz, c = v.shape
    v = v.view(b, nx // 2, 2, ny // 2, 2, nz // 2, 2, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return outer(v.reshape(b, nx // 2, ny // 2, nz // 2, 8 * c))


@once
def _split_taps(weight: Tensor) -> Tensor:
    """(O, I, 7, 7, 7) -> (8 O, 8 I, 4, 4, 4): 2^3 outputs from 2^3 blocks of the input, as ``_split`` has them."""
    weight = _dense(weight, (2, 2, 2))
    o, i, k = weight.shape[:3]
    taps = weight.reshape(o, i, k // 2, 2, k // 2, 2, k // 2, 2).permute(0, 3, 5, 7, 1, 2, 4, 6)
    taps = taps.reshape(o, 8 * i, k // 2, k // 2, k // 2)
    return taps.contiguous(memory_format=torch.channels_last_3d)


SAME, HALVING = Layer(Padding(1), same), Layer(Padding(1), halving)
DOUBLING, SEVEN = Layer(Padding(1, True), doubling), Layer(Padding(3), seven)
