"""Nearest x2, then a 3^3 convolution on reflected edges, with an eighth of the products.

With taps a, b, c on one axis, the doubled grid gives y[2i] = a x[i-1] + b x[i] + c x[i] and
y[2i+1] = a x[i] + b x[i] + c x[i+1]: sums of u[i] = b x[i] and of v[i] = a x[i] + c x[i+1],

    y[2i] = u[i] + v[i-1],  y[2i+1] = u[i] + v[i].

Three products per coarse voxel and axis: 27 in three dimensions, where the doubled grid has 216 and phase convolutions
64. Reflecting the doubled grid by one voxel repeats the coarse edge voxel. On the last axis u and v are the
outputs of one convolution, since two channels of output are better than one for a vector unit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsrgan.model.cpu.rearranged import once

U, V = 0, 1


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """(B, I, X, Y, Z), (O, I, 3, 3, 3) -> (B, O, 2X, 2Y, 2Z)."""
    out = x.new_empty(x.shape[0], len(weight), *(2 * n for n in x.shape[2:]))  # before what does not outlive the call
    padded = _pad(x)

    def lines(i: int, j: int) -> Tensor:
        u, v = convolve(padded, _kernel(weight, i, j)).chunk(2, dim=1)
        return _interleave(u[..., :-1], v, 4)

    def plane(i: int) -> Tensor:
        return _interleave(_inner(lines(i, U), 3), lines(i, V), 3)

    return _interleave(_inner(plane(U), 2), plane(V), 2, out)


def backward(grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight, those of ``needs``; the first is a view."""
    padded, dp = _pad(x), None
    dw = torch.empty_like(weight) if needs[1] else None
    for i in (U, V):
        plane = _separate(grad, 2, i)
        for j in (U, V):
            g = _last(_separate(plane, 3, j))
            dpart, dkernel, _ = torch.ops.aten.convolution_backward(
                *(g, padded, _kernel(weight, i, j), None, [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1), [*needs, False]
            )
            if needs[0]:
                dp = dpart if dp is None else dp.add_(dpart)
            if dw is not None:
                _into(dw, i, j, dkernel)
    return None if dp is None else _fold(dp), dw


def transposed_forward(x: Tensor, weight: Tensor) -> Tensor:
    """The same as one transposed convolution of the library: 64 products per coarse voxel instead of 27, one pass."""
    return F.conv_transpose3d(_pad(x), transposed_weight(weight), stride=2, padding=3)


def transposed_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the weight by the library, those of ``needs``; the first is a view."""
    dp, dw, _ = torch.ops.aten.convolution_backward(
        *(grad, _pad(x), transposed_weight(weight), None, [2] * 3, [3] * 3, [1] * 3, True, [0] * 3, 1), [*needs, False]
    )
    if needs[1]:
        dw = dw.transpose(0, 1)
        for d in (2, 3, 4):  # the transpose of ``transposed_weight``
            c, bc, ab, a = dw.unbind(d)
            dw = torch.stack([a + ab, ab + bc, bc + c], d)
    return _fold(dp) if needs[0] else None, dw if needs[1] else None


@once
def transposed_weight(weight: Tensor) -> Tensor:
    """(O, I, 3, 3, 3) -> (I, O, 4, 4, 4) of the stride-2 transposed convolution equal to nearest x2 + conv 3^3."""
    for d in (2, 3, 4):
        a, b, c = weight.unbind(d)
        weight = torch.stack([c, b + c, a + b, a], d)
    return weight.transpose(0, 1)


def convolve(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """conv3d without padding or bias; torch leaves a lone small image to a loop, oneDNN takes it when told to."""
    if len(x) == 1 and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(x, weight, None, [0] * 3, [stride] * 3, [1] * 3, 1)
    return F.conv3d(x, weight, stride=stride)


def _interleave(u: Tensor, v: Tensor, d: int, out: Tensor | None = None) -> Tensor:
    """n of u and n + 1 of v, from v[-1] on -> 2 n on axis d."""
    n = u.shape[d]
    if out is None:
        out = u.new_empty([*u.shape[:d], 2 * n, *u.shape[d + 1 :]])
    for phase in (0, 1):
        torch.add(u, v.narrow(d, phase, n), out=_every_second(out, d, phase))
    return out


def _pool(grad: Tensor, d: int, kind: int, out: Tensor) -> None:
    """The transpose of ``_interleave``: the gradient of u, or of v."""
    n = grad.shape[d] // 2
    even, odd = _every_second(grad, d, 0), _every_second(grad, d, 1)
    if kind == U:
        torch.add(even, odd, out=out)
        return
    torch.add(even.narrow(d, 1, n - 1), odd.narrow(d, 0, n - 1), out=out.narrow(d, 1, n - 1))
    out.select(d, 0).copy_(even.select(d, 0))
    out.select(d, n).copy_(odd.select(d, n - 1))


def _separate(grad: Tensor, d: int, kind: int) -> Tensor:
    """The transpose of ``_interleave(_inner(u), v)`` on axis d: the gradient of u, 0 at its ends, or of v."""
    n = grad.shape[d] // 2
    out = grad.new_empty([*grad.shape[:d], n + (2 if kind == U else 1), *grad.shape[d + 1 :]])
    if kind == U:
        out.select(d, 0).zero_()
        out.select(d, n + 1).zero_()
    _pool(grad, d, kind, _inner(out, d) if kind == U else out)
    return out


def _last(grad: Tensor) -> Tensor:
    """(B, O, ..., 2 Z) -> (B, 2 O, ..., Z + 1): u, 0 at its end, and v of the last axis."""
    b, o, x, y, z = grad.shape
    both = grad.new_empty(b, 2 * o, x, y, z // 2 + 1)
    u, v = both.chunk(2, dim=1)
    u[..., -1] = 0
    _pool(grad, 4, U, u[..., :-1])
    _pool(grad, 4, V, v)
    return both


def _inner(x: Tensor, d: int) -> Tensor:
    return x.narrow(d, 1, x.shape[d] - 2)


def _every_second(x: Tensor, d: int, first: int) -> Tensor:
    return x[(slice(None),) * d + (slice(first, None, 2),)]


def _pad(x: Tensor) -> Tensor:
    return F.pad(x, (1,) * 6, mode="replicate")


def _fold(padded: Tensor) -> Tensor:
    """The transpose of ``_pad``; uses its input up."""
    for d in (2, 3, 4):
        n = padded.shape[d] - 2
        padded.select(d, 1).add_(padded.select(d, 0))
        padded.select(d, n).add_(padded.select(d, n + 1))
        padded = padded.narrow(d, 1, n)
    return padded


def _taps(kind: int) -> slice:
    return slice(1, 2) if kind == U else slice(0, 3, 2)


@once
def _kernel(weight: Tensor, i: int, j: int) -> Tensor:
    """(2 O, I, 1 or 2, 1 or 2, 2): u and v of the last axis, of kinds i and j on the others."""
    part = weight[:, :, _taps(i), _taps(j)]
    return torch.cat([F.pad(part[..., _taps(U)], (1, 0)), part[..., _taps(V)]])


def _into(dw: Tensor, i: int, j: int, gradient: Tensor) -> None:
    """The transpose of ``_kernel``; each of its taps belongs to one kind."""
    u, v = gradient.chunk(2)
    part = dw[:, :, _taps(i), _taps(j)]
    part[..., _taps(U)] = u[..., 1:]
    part[..., _taps(V)] = v
