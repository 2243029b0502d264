"""Instance norm, ReLU, padding and convolution with gradients written by hand, for the CPU (docs/decisions/002).

Of a norm and the convolution behind it only the norm's input is kept for the backward pass; its result is made again
there. Norms work through memory in blocks that a cache holds. The convolutions are objects with a plain ``forward`` and
``backward`` without autograd. float32 and float64, (B, C, X, Y, Z).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsrgan import doubling, spectral, winograd
from fastsrgan.spectral import Sink, Source, Where

NORM_EPS = 1e-7  # added to the standard deviation, outside the root, as the original does (SEGSRGAN.md section 2)
BLOCK = 2**20  # voxels of a block of channels
HELD_BYTES = 2**25  # of a padded input at a time
PLAIN_STEM = 16  # outputs of a convolution from one channel that fill a vector unit
ALL: Where = (slice(None), slice(None))


class Convolution(Protocol):
    """A convolution with its padding.

    ``forward`` returns the result and what ``backward`` takes instead of the input, or None. ``backward`` gets the
    input or that, hands the input's gradient to ``sink`` in one or more parts, and returns the weight's if wanted.
    """

    def forward(self, y: Source, weight: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def backward(self, grad: Tensor, y: Source, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None: ...


class Reflected:
    """Any odd kernel and stride on reflected edges; large inputs a few samples at a time."""

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride

    def forward(self, y: Source, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = [doubling.convolve(_reflect(y[where], weight), weight, self.stride) for where in _samples(y, weight)]
        return parts[0] if len(parts) == 1 else torch.cat(parts), None

    def backward(self, grad: Tensor, y: Source, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None:
        dw = None
        for where in _samples(y, weight):
            if wanted:
                part = self._gradient(grad[where[0]], _reflect(y[where], weight), weight, [False, True, False])[1]
                dw = part if dw is None else dw.add_(part)
            if sink is not None:
                like = grad.new_empty(1).expand(_padded_shape(y, weight, where))  # of its shape alone
                padded = self._gradient(grad[where[0]], like, weight, [True, False, False])[0]
                sink(where, spectral.fold_reflected(padded, weight.shape[-1] // 2))
        return dw

    def _gradient(self, grad: Tensor, padded: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            grad, padded, weight, None, [self.stride] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1, needs
        )


class Kernel3(Reflected):
    """3^3, stride 1: by Winograd's products where they pay."""

    def forward(self, y: Source, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return winograd.forward(y[ALL], weight) if winograd.pays(y.shape, weight) else super().forward(y, weight)

    def backward(self, grad: Tensor, y: Source, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None:
        if not winograd.pays(grad.shape, weight):
            return super().backward(grad, y, weight, sink, wanted)
        dy, dw = winograd.backward(grad, y[ALL], weight, (sink is not None, wanted))
        if sink is not None and dy is not None:
            sink(ALL, dy)
        return dw


class Kernel7(Reflected):
    """7^3: by spectra, but forward from one channel to many, which a plain convolution does as fast with less memory."""

    def forward(self, y: Source, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs, inputs = weight.shape[:2]
        plain = inputs == 1 and outputs >= PLAIN_STEM
        return super().forward(y, weight) if plain else (spectral.forward(y, weight), None)

    def backward(self, grad: Tensor, y: Source, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None:
        return spectral.backward(grad, y, weight, sink, wanted)


class Doubling:
    """Nearest x2, then 3^3 on reflected edges."""

    def forward(self, y: Source, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return doubling.forward(y[ALL], weight), None

    def backward(self, grad: Tensor, y: Source, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None:
        dy, dw = doubling.backward(grad, y[ALL], weight, (sink is not None, wanted))
        if sink is not None and dy is not None:
            sink(ALL, dy)
        return dw


KERNEL3, KERNEL7, HALVING, DOUBLING = Kernel3(), Kernel7(), Reflected(2), Doubling()


def _reflect(y: Tensor, weight: Tensor) -> Tensor:
    return F.pad(y, (weight.shape[-1] // 2,) * 6, mode="reflect")


def _padded_shape(y: Source, weight: Tensor, where: Where) -> list[int]:
    more = weight.shape[-1] // 2 * 2
    return [len(range(y.shape[0])[where[0]]), y.shape[1], *(n + more for n in y.shape[2:])]


def _samples(y: Source, weight: Tensor) -> Iterator[Where]:
    """All of y where it is small, else two samples or three at a time: torch convolves a lone small one slowly."""
    batch = y.shape[0]
    runs = 1 if math.prod(_padded_shape(y, weight, ALL)) * weight.element_size() <= HELD_BYTES else max(1, batch // 2)
    for run in range(runs):
        yield slice(batch * run // runs, batch * (run + 1) // runs), slice(None)


# --- norm ---------------------------------------------------------------------------------------------------------


class Normed:
    """What an instance norm and its ReLU make of x, as a source of it; numbers of each channel are (B, C).

    rstd : 1 / (std + eps), 0 where the channel is constant
    """

    def __init__(self, x: Tensor, mean: Tensor, std: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor, relu: bool):
        self.x, self.mean, self.std, self.rstd, self.relu = x, mean, std, rstd, relu
        self.scale, self.shift = scale.expand_as(std), shift.expand_as(std)
        self._last: tuple[Where, Tensor] | None = None

    @classmethod
    def measure(cls, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, flat: Tensor | None) -> Normed:
        """``flat`` (B, 1, 1, 1, 1) names samples that are constant but for rounding."""
        mean, std = x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
        for where, _ in _blocks(x, ALL):
            lines = _lines(x[where])
            n, size = lines.shape[1:]
            # Of torch's reductions the group norm's is the fastest that does not lose the digits of a large mean.
            _, m, inverse = torch.native_group_norm(lines, None, None, 1, n, size, n, 0.0)
            mean[where], std[where] = m.view_as(mean[where]), (1 / inverse).view_as(std[where])
        constant = std == 0 if flat is None else (std == 0) | flat.view(-1, 1)
        return cls(x, mean, std, torch.where(constant, 0, 1 / (std + NORM_EPS)), scale, shift, relu)

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    def __getitem__(self, where: Where) -> Tensor:
        out = self.write(where, torch.empty_like(self.x[where]))
        self._last = (where, out)
        return out

    def write(self, where: Where, out: Tensor) -> Tensor:
        """That part into ``out``, which may be the same part of x: then nothing can be asked for any more."""
        for inner, outer in _blocks(out, where):
            self._block(outer, out[inner])
        return out

    def _block(self, where: Where, out: Tensor) -> None:
        gain = (self.rstd[where] * self.scale[where]).flatten()
        bias = torch.addcmul(self.shift[where].flatten(), self.mean[where].flatten(), gain, value=-1)
        zero, one, none = torch.zeros_like(gain), torch.ones_like(gain), gain.new_empty(0)
        lines = _lines(out)
        # A batch norm of known statistics is x * gain + bias in one pass, as no other operation of torch is.
        torch.native_batch_norm(_lines(self.x[where]), gain, bias, zero, one, False, 0.0, 0.0, out=(lines, none, none))
        if self.relu:
            lines.relu_()

    def taken(self, where: Where) -> Tensor:
        """The same part as was asked for last, without making it again."""
        last, self._last = self._last, None
        return last[1] if last is not None and last[0] == where else self[where]


class _NormGradients:
    """Takes the gradient of a norm's result in parts: gradients of x, and of scale and shift for each sample."""

    def __init__(self, normed: Normed) -> None:
        self.normed = normed
        self.dx: Tensor | None = None
        self.dscale, self.dshift = torch.empty_like(normed.std), torch.empty_like(normed.std)
        # A batch norm's gradient has rstd^2 where ours has rstd / std, because of where epsilon stands.
        n = normed
        self.inner = torch.where(n.std > 0, (n.rstd / n.std).sqrt(), 0)
        known = self.inner > 0
        self.gain = torch.where(known, n.rstd * n.scale / self.inner, 0)
        self.outer = torch.where(known, n.rstd / self.inner, 0)

    def __call__(self, where: Where, grad: Tensor) -> None:
        if self.dx is None:
            self.dx = torch.empty_like(self.normed.x)
        y = self.normed.taken(where) if self.normed.relu else None
        for inner, outer in _blocks(self.normed.x[where], where):
            self._block(outer, grad[inner], None if y is None else y[inner], self.dx[outer])

    def _block(self, where: Where, grad: Tensor, y: Tensor | None, to: Tensor) -> None:
        n = self.normed
        if y is not None:
            # y is not needed any more; the gradient may be a view, or another's.
            grad = torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=y)
        dx, dscale, dshift = torch.ops.aten.native_batch_norm_backward(
            *(_lines(grad.contiguous()), _lines(n.x[where]), self.gain[where].flatten(), None, None),
            *(n.mean[where].flatten(), self.inner[where].flatten(), True, 0.0, [True, True, True]),
        )
        to.copy_(dx.view_as(to))
        self.dscale[where] = dscale.view_as(self.dscale[where]) * self.outer[where]
        self.dshift[where] = dshift.view_as(self.dshift[where])

    def result(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return self.dx, self.dscale.sum(0), self.dshift.sum(0)


def _blocks(part: Tensor, where: Where) -> Iterator[tuple[Where, Where]]:
    """Contiguous runs of channels with about BLOCK voxels of the part at ``where``: places in it, and in the whole."""
    batch, channels = part.shape[:2]
    voxels = part[0, 0].numel()
    samples = max(1, BLOCK // (channels * voxels))
    few = channels if samples > 1 else max(1, BLOCK // voxels)
    b0, c0 = where[0].start or 0, where[1].start or 0
    for b in range(0, batch, samples):
        for c in range(0, channels, few):
            inner = slice(b, min(b + samples, batch)), slice(c, min(c + few, channels))
            yield inner, (slice(b0 + inner[0].start, b0 + inner[0].stop), slice(c0 + c, c0 + inner[1].stop))


def _lines(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) contiguous -> (1, B * C, voxels)."""
    return x.view(1, x.shape[0] * x.shape[1], -1)


# --- autograd -----------------------------------------------------------------------------------------------------


class Norm(torch.autograd.Function):
    """Instance norm and, if asked, ReLU; see layers.InstanceNorm."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, flat: Tensor | None) -> Tensor:  # type: ignore[override]
        normed = Normed.measure(x.contiguous(), scale, shift, relu, flat)
        ctx.relu = relu
        ctx.save_for_backward(normed.x, normed.mean, normed.std, normed.rstd, scale, shift)
        return normed.write(ALL, torch.empty_like(normed.x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        gradients = _NormGradients(Normed(*ctx.saved_tensors, ctx.relu))
        gradients(ALL, grad)
        return *gradients.result(), None, None


class Conv(torch.autograd.Function):
    """A convolution alone."""

    @staticmethod
    def forward(ctx, y: Tensor, weight: Tensor, convolution: Convolution) -> Tensor:  # type: ignore[override]
        out, kept = convolution.forward(y, weight)
        ctx.convolution, ctx.shape = convolution, y.shape
        ctx.save_for_backward(y if kept is None else kept, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        kept, weight = ctx.saved_tensors
        needed, wanted = ctx.needs_input_grad[:2]
        dy: list[Tensor] = []

        def sink(where: Where, part: Tensor) -> None:
            if where == ALL:
                dy.append(part.contiguous())
                return
            if not dy:
                dy.append(grad.new_empty(ctx.shape))
            dy[0][where] = part

        dw = ctx.convolution.backward(grad.contiguous(), kept, weight, sink if needed else None, wanted)
        return dy[0] if dy else None, dw, None


class NormConv(torch.autograd.Function):
    """Norm, ReLU and convolution: the norm's result lives only while the convolution works.

    ``reuse``: without gradients, the norm's result may be written over x.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        convolution: Convolution,
        flat: Tensor | None,
        reuse: bool,
    ) -> Tensor:
        normed = Normed.measure(x.contiguous(), scale, shift, True, flat)
        out, kept = convolution.forward(normed.write(ALL, normed.x) if reuse else normed, weight)
        ctx.convolution = convolution
        ctx.save_for_backward(weight, kept, normed.x, normed.mean, normed.std, normed.rstd, scale, shift)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        weight, kept, *rest = ctx.saved_tensors
        normed = Normed(*rest, True)
        gradients = _NormGradients(normed)
        source = normed if kept is None else kept
        dw = ctx.convolution.backward(grad.contiguous(), source, weight, gradients, ctx.needs_input_grad[3])
        return *gradients.result(), dw, None, None, None
