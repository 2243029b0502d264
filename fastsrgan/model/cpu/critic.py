"""The critic's convolution (4^3 taps, stride 2, padding "same") and its two adjoints, in exact forms.

A convolution is bilinear: ``forward`` multiplies what ``lift`` makes of the input with the weights, ``input_gradient``
and ``add`` multiply the same two lifted arrays with the lifted gradient. Activations are (B, X, Y, Z, C), channels
last: every step of a lift then moves runs of at least C values. Which form runs where: ``choose``; figures:
docs/decisions/015. All agree with F.conv3d and its autograd (tests/test_critic_convs.py).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsrgan.model.cpu import forms

FEW = 4  # input channels up to which the input gradient goes by 2^3 blocks
PART = 2**20  # elements that a lift takes at a time, to stay in the cache
WIDE = 64  # input channels from which folding tiles costs less than the products that it saves
TAPS, STRIDE = 4, 2
ALIGNED = 8  # input channels that tensor cores read at once in half precision


def _channels_first(a: Tensor) -> Tensor:
    return a.permute(0, 4, 1, 2, 3)


def _channels_last(a: Tensor) -> Tensor:
    return a.permute(0, 2, 3, 4, 1).contiguous()


class Direct:
    """The library's convolution and its adjoints: any device and type; compiles without graph breaks.

    Parameters
    ----------
    weight : (O, I, 4, 4, 4), detached; its type is the type of the arithmetic
    size : edge of the input, X = Y = Z
    """

    samples = 0  # axis of the samples in a lifted input and in a lifted gradient

    def __init__(self, weight: Tensor, size: int) -> None:
        self.weight, self.size = weight, size
        self.out = (size + 1) // 2
        self.total: Tensor | None = None  # of weight gradients, in the form that they come in

    def lift(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, X, X, X, I), of even size: "same" puts the surplus zero of an odd size at the end."""
        a = F.pad(a, (0, 0, *(0, self.size % 2) * 3)) if self.size % 2 else a
        return a if out is None else out.copy_(a)

    def forward(self, lifted: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, M, M, M, O) with M half the size, rounded up."""
        return _channels_last(F.conv3d(_channels_first(lifted), self.weight, bias, stride=STRIDE, padding=1))

    def lift_gradient(self, d: Tensor) -> Tensor:
        """What ``input_gradient`` and ``add`` want of the gradient (B, M, M, M, O) of the output."""
        return d

    def input_gradient(self, d: Tensor, lifted_d: Tensor) -> Tensor:
        """(B, X, X, X, I) of a gradient and the same lifted."""
        d, n = _channels_first(d), self.size
        if self.weight.shape[1] > FEW:
            dx = F.conv_transpose3d(d, self.weight, stride=STRIDE, padding=1)
            return _channels_last(dx)[:, :n, :n, :n]
        # Padded by one, the input falls into 2^3 blocks of which each output sees 2^3: few channels become many.
        o, i = self.weight.shape[:2]
        blocks = self.weight.reshape(o, i, 2, 2, 2, 2, 2, 2).permute(3, 5, 7, 1, 0, 2, 4, 6).reshape(8 * i, o, 2, 2, 2)
        y = _channels_last(F.conv3d(d, blocks.flip(2, 3, 4), padding=1))
        b, m = y.shape[:2]
        y = y.view(b, m, m, m, 2, 2, 2, i).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, 2 * m, 2 * m, 2 * m, i)
        return y[:, 1 : 1 + n, 1 : 1 + n, 1 : 1 + n]

    def add(self, lifted: Tensor, lifted_d: Tensor) -> None:
        """Adds the weight gradient of a lifted input and a lifted gradient to what was added before."""
        step = (STRIDE,) * 3
        _, gradient, _ = torch.ops.aten.convolution_backward(
            *(_channels_first(lifted_d), _channels_first(lifted), self._like(), None),
            *(step, (1,) * 3, (1,) * 3, False, (0,) * 3, 1, (False, True, False)),
        )
        self.total = gradient if self.total is None else self.total + gradient

    def gradient(self) -> Tensor:
        """The sum of what was added: (O, I, 4, 4, 4)."""
        return self._total()

    def _like(self) -> Tensor:
        """Of the shape and layout of the weight gradient; its values are not read."""
        return self.weight

    def _total(self) -> Tensor:
        assert self.total is not None, "nothing was added"
        return self.total


class Aligned(Direct):
    """Zeros fill a few input channels up to ``ALIGNED``: tensor cores read no fewer at once in half precision."""

    def lift(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, X, X, X, ALIGNED), of even size."""
        return super().lift(F.pad(a, (0, ALIGNED - a.shape[-1])), out)

    def forward(self, lifted: Tensor, bias: Tensor | None = None) -> Tensor:
        weight = F.pad(self.weight, (0,) * 6 + (0, ALIGNED - self.weight.shape[1]))
        return _channels_last(F.conv3d(_channels_first(lifted), weight, bias, stride=STRIDE, padding=1))

    def gradient(self) -> Tensor:
        return self._total()[:, : self.weight.shape[1]]

    def _like(self) -> Tensor:
        return self.weight.new_empty(len(self.weight), ALIGNED, *self.weight.shape[2:])


class Columns(Direct):
    """Patches of the input as rows of a matrix: for the last layers, whose few outputs leave a convolution idle."""

    def lift(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, M^3, 64 I)."""
        p = F.pad(a, (0, 0, *(1, 1 + self.size % 2) * 3))
        for axis in (1, 2, 3):
            p = p.unfold(axis, TAPS, STRIDE)
        p = p.flatten(4).flatten(1, 3)
        return p if out is None else out.copy_(p)

    def forward(self, lifted: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(lifted, self.weight.flatten(1), bias)
        return y.unflatten(1, (self.out,) * 3)

    def lift_gradient(self, d: Tensor) -> Tensor:
        """(B, M^3, O)."""
        return d.flatten(1, 3)

    def input_gradient(self, d: Tensor, lifted_d: Tensor) -> Tensor:
        columns = lifted_d @ self.weight.flatten(1)
        b, i, m, n = len(columns), self.weight.shape[1], self.out, self.size
        columns = columns.view(b, m, m, m, i, TAPS, TAPS, TAPS)
        dx = columns.new_zeros(b, *(2 * m + 2,) * 3, i)
        span = 2 * m
        for x in range(TAPS):
            for y in range(TAPS):
                for z in range(TAPS):
                    part = dx[:, x : x + span : 2, y : y + span : 2, z : z + span : 2]
                    part += columns[..., x, y, z]
        return dx[:, 1 : 1 + n, 1 : 1 + n, 1 : 1 + n]

    def add(self, lifted: Tensor, lifted_d: Tensor) -> None:
        a, d = lifted.flatten(0, 1), lifted_d.flatten(0, 1).t()
        self.total = d @ a if self.total is None else self.total.addmm_(d, a)

    def gradient(self) -> Tensor:
        return self._total().view(self.weight.shape)


class Winograd(Direct):
    """F(2, 2) per axis: two outputs of a two-tap filter from three products instead of four, 27 instead of 64 in 3-D.

    With stride 2 the even and the odd input voxels see two taps each. For inputs p0 p1 p2, taps g0 g1:
    y0 = m0 + m1, y1 = m1 + m2 with m0 = (p0 - p1) g0, m1 = p1 (g0 + g1), m2 = (p2 - p1) g1. The products of all tiles
    are 27 matrix products over input channels and parities. Both adjoints follow by transposition, and use the same
    lifted arrays (Winograd 1980; Lavin & Gray 2016 for convolutions).
    """

    samples = 1

    def __init__(self, weight: Tensor, size: int) -> None:
        super().__init__(weight, size)
        self.tiles = (self.out + 1) // 2
        o, i = weight.shape[:2]
        w = weight.reshape(o, i, 64).transpose(1, 2).contiguous().view(o, 2, 2, 2, 2, 2, 2, i)
        for axis in (1, 3, 5):  # taps 2 j + q of x, y, z: j becomes three factors, in front
            w = _sums(w, axis)
        self.lifted = w.view(27, o, 8 * i)

    def lift(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """(27, B, tiles^3, 8 I)."""
        n, k, channels = self.size, self.tiles, a.shape[4]
        out = a.new_empty(27, len(a), k**3, 8 * channels) if out is None else out
        place = out.view(3, 3, 3, len(a), k, k, k, 2, 2, 2, channels).permute(0, 1, 2, 3, 4, 7, 5, 8, 6, 9, 10)
        part = max(1, PART // a[0].numel())
        for at in range(0, len(a), part):
            some = a[at : at + part]
            u = a.new_zeros(len(some), *(4 * k + 2,) * 3, channels)
            u[:, 1 : 1 + n, 1 : 1 + n, 1 : 1 + n] = some
            for axis in (1, 4):  # (3, B, K, 2, Y, Z, C), then (3, 3, B, K, 2, K, 2, Z, C)
                u = _differences(u, axis)
            _differences(u, 7, place.narrow(3, at, len(some)))
        return out

    def forward(self, lifted: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.bmm(lifted.flatten(1, 2), self.lifted.transpose(1, 2))
        if bias is not None:
            y[13] += bias  # m1 of all three axes goes into every output once
        y = y.view(3, 3, 3, lifted.shape[1], *(self.tiles,) * 3, -1)
        for axis in (6, 4, 2):  # z, y, x
            y = _pairs(y, axis)
        y = y.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        m = self.out
        return y if m % 2 == 0 else y[:, :m, :m, :m].contiguous()

    def lift_gradient(self, d: Tensor) -> Tensor:
        """(27, B, tiles^3, O)."""
        k = self.tiles
        if self.out % 2:
            d = F.pad(d, (0, 0, *(0, 1) * 3))
        u = d.view(len(d), k, 2, k, 2, k, 2, -1)
        for axis in (2, 4, 6):
            u = _sums(u, axis)
        return u.reshape(27, len(d), k**3, -1)

    def input_gradient(self, d: Tensor, lifted_d: Tensor) -> Tensor:
        if self.weight.shape[1] < WIDE:
            return super().input_gradient(d, lifted_d)
        m = torch.bmm(lifted_d.flatten(1, 2), self.lifted)
        k, n = self.tiles, self.size
        m = m.view(3, 3, 3, lifted_d.shape[1], k, k, k, 2, 2, 2, -1).permute(0, 1, 2, 3, 4, 7, 5, 8, 6, 9, 10)
        for axis in (7, 4, 1):
            m = _overlap(m, axis)
        return m[:, 1 : 1 + n, 1 : 1 + n, 1 : 1 + n]

    def add(self, lifted: Tensor, lifted_d: Tensor) -> None:
        a, d = lifted.flatten(1, 2), lifted_d.flatten(1, 2).transpose(1, 2)
        self.total = torch.bmm(d, a) if self.total is None else self.total.baddbmm_(d, a)

    def gradient(self) -> Tensor:
        o, i = self.weight.shape[:2]
        g = self._total().view(3, 3, 3, o, 2, 2, 2, i)
        for axis in (5, 3, 1):
            g = _pairs(g, axis)
        return g.view(o, 64, i).transpose(1, 2).reshape(self.weight.shape)


def _differences(p: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
    """(.., 4 K + 2, ..) -> (3, .., K, 2, ..): p0 - p1, p1, p2 - p1 of the windows of 6, both parities."""
    windows = p.unfold(axis, 6, 4).movedim(-1, axis + 1)
    a, b, c = (windows.narrow(axis + 1, at, 2) for at in (0, 2, 4))
    out = p.new_empty(3, *a.shape) if out is None else out
    torch.sub(a, b, out=out[0])
    out[1].copy_(b)
    torch.sub(c, b, out=out[2])
    return out


def _overlap(m: Tensor, axis: int) -> Tensor:
    """(3, .., K, 2, ..) -> (.., 4 K + 2, ..), the adjoint of ``_differences``; ``axis`` is K's in the result."""
    shape = [*m.shape[1 : 1 + axis], 4 * m.shape[1 + axis] + 2, *m.shape[3 + axis :]]
    p = m.new_empty(shape)
    tiles, k = p.narrow(axis, 0, shape[axis] - 2).unflatten(axis, (-1, 4)), m.shape[1 + axis]
    edge, middle = tiles.narrow(axis + 1, 0, 2), tiles.narrow(axis + 1, 2, 2)
    edge.narrow(axis, 0, 1).copy_(m[0].narrow(axis, 0, 1))
    torch.add(m[0].narrow(axis, 1, k - 1), m[2].narrow(axis, 0, k - 1), out=edge.narrow(axis, 1, k - 1))
    p.narrow(axis, shape[axis] - 2, 2).copy_(m[2].select(axis, k - 1))
    torch.sub(m[1], m[0], out=middle).sub_(m[2])
    return p


def _sums(g: Tensor, axis: int) -> Tensor:
    """(.., 2, ..) -> (3, .., ..): g0, g0 + g1, g1."""
    a, b = g.unbind(axis)
    out = g.new_empty(3, *a.shape)
    out[0].copy_(a)
    torch.add(a, b, out=out[1])
    out[2].copy_(b)
    return out


def _pairs(m: Tensor, axis: int) -> Tensor:
    """(3, .., ..) -> (.., 2, ..), the adjoint of ``_sums``; ``axis`` is that of 2 in the result."""
    out = m.new_empty(*m.shape[1 : 1 + axis], 2, *m.shape[1 + axis :])
    torch.add(m[0], m[1], out=out.select(axis, 0))
    torch.add(m[1], m[2], out=out.select(axis, 1))
    return out


def choose(weight: Tensor, size: int, fast: bool, samples: int = 2) -> Direct:
    """The form of one layer for ``samples`` patches of edge ``size`` at a time; not ``fast``: the library's."""
    if not fast and weight.shape[1] < ALIGNED and for_tensor_cores(weight):
        return Aligned(weight, size)
    if not fast or weight.shape[1] <= FEW:
        return Direct(weight, size)
    shape = (samples, weight.shape[1], size, size, size)
    fixed = "columns" if size <= TAPS else "winograd"

    def trials(x: Tensor, w: Tensor) -> forms.Calls:
        # Patches are cubes, whatever larger ones are timed as.
        a, names = x.permute(0, 2, 3, 4, 1).contiguous(), (fixed, "direct")
        return {name: functools.partial(_step, FORMS[name](w, x.shape[2]), a) for name in names}

    return FORMS[forms.choose("critic layer", shape, weight, fixed, trials)](weight, size)


def for_tensor_cores(weight: Tensor) -> bool:
    """Whether a layer's products are in half precision on CUDA."""
    return weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16)


FORMS: dict[str, type[Direct]] = {"direct": Direct, "columns": Columns, "winograd": Winograd}


def _step(layer: Direct, a: Tensor) -> None:
    """What an update asks of a layer."""
    lifted = layer.lift(a)
    d = layer.forward(lifted)
    lifted_d = layer.lift_gradient(d)
    layer.input_gradient(d, lifted_d)
    layer.add(lifted, lifted_d)
