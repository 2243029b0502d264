"""Instance norm, ReLU, padding and convolution with gradients written by hand, for the CPU (docs/decisions/002).

Of a norm and the convolution behind it only the norm's input is kept for the backward pass; its result is made again
there. The convolutions are objects with a plain ``forward`` and ``backward`` without autograd. float32 and float64,
(B, C, X, Y, Z).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsrgan.model.cpu import doubling, forms, spectral, winograd
from fastsrgan.model.cpu.normed import ALL, Normed, NormGradients
from fastsrgan.model.cpu.spectral import ImageParts, Sink, Where

HELD_BYTES = 2**25  # of a padded input at a time
PLAIN_STEM = 16  # outputs of a convolution from one channel that fill a vector unit


class Convolution(Protocol):
    """A convolution with its padding.

    ``forward`` returns the result and what ``backward`` takes instead of the input, or None. ``backward`` gets the
    input or that, hands the input's gradient to ``sink`` in one or more parts, and returns the weight's if wanted.
    """

    def forward(self, y: ImageParts, weight: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def backward(
        self, grad: Tensor, y: ImageParts, weight: Tensor, sink: Sink | None, wanted: bool
    ) -> Tensor | None: ...


class Reflected:
    """Any odd kernel and stride on reflected edges; large inputs a few samples at a time."""

    def __init__(self, stride: int = 1) -> None:
        self.stride = stride

    def forward(self, y: ImageParts, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = [doubling.convolve(_reflect(y[where], weight), weight, self.stride) for where in _samples(y, weight)]
        return parts[0] if len(parts) == 1 else torch.cat(parts), None

    def backward(self, grad: Tensor, y: ImageParts, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None:
        dw = None
        for where in _samples(y, weight):
            if wanted:
                part = self._gradient(grad[where[0]], _reflect(y[where], weight), weight, [False, True, False])[1]
                dw = part if dw is None else dw.add_(part)
            if sink is not None:
                like = grad.new_empty(_padded_shape(y, weight, where))  # its values are not read
                padded = self._gradient(grad[where[0]], like, weight, [True, False, False])[0]
                sink(where, spectral.fold_reflected(padded, weight.shape[-1] // 2))
        return dw

    def _gradient(self, grad: Tensor, padded: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            grad, padded, weight, None, [self.stride] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1, needs
        )


class Kernel3(Reflected):
    """3^3, stride 1: by Winograd's products where they pay. Forward and backward are of one form."""

    def forward(self, y: ImageParts, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return winograd.forward(y[ALL], weight) if self._form(y, weight) == "winograd" else super().forward(y, weight)

    def backward(self, grad: Tensor, y: ImageParts, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None:
        if len(y.shape) == 5:
            return super().backward(grad, y, weight, sink, wanted)
        dy, dw = winograd.backward(grad, y[ALL], weight, (sink is not None, wanted))  # y: values at the points
        if sink is not None and dy is not None:
            sink(ALL, dy)
        return dw

    def _form(self, y: ImageParts, weight: Tensor) -> str:
        fixed = "winograd" if winograd.pays(y.shape, weight) else "library"
        if not winograd.fits(y.shape, weight):
            return fixed
        if torch.is_inference_mode_enabled():
            return forms.choose("conv3 inference", y.shape, weight, fixed, self._passes)
        return forms.choose("conv3 training", y.shape, weight, fixed, self._steps)

    def _passes(self, x: Tensor, w: Tensor) -> forms.Calls:
        return {"winograd": lambda: winograd.forward(x, w), "library": lambda: Reflected.forward(self, x, w)}

    def _steps(self, x: Tensor, w: Tensor) -> forms.Calls:
        def fast() -> None:
            out, values = winograd.forward(x, w)
            winograd.backward(out, values, w, (True, True))

        def library() -> None:
            out, _ = Reflected.forward(self, x, w)
            Reflected.backward(self, out, x, w, _drop, True)

        return {"winograd": fast, "library": library}


class Kernel7(Reflected):
    """7^3: by spectra, but forward from one channel to many, which a plain convolution does as fast in less memory."""

    def forward(self, y: ImageParts, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs, inputs = weight.shape[:2]
        fixed = "library" if inputs == 1 and outputs >= PLAIN_STEM else "spectral"

        def trials(x: Tensor, w: Tensor) -> forms.Calls:
            return {"spectral": lambda: spectral.forward(x, w), "library": lambda: Reflected.forward(self, x, w)}

        plain = forms.choose("conv7 forward", y.shape, weight, fixed, trials) == "library"
        return super().forward(y, weight) if plain else (spectral.forward(y, weight), None)

    def backward(self, grad: Tensor, y: ImageParts, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None:
        part = None if sink is None else _drop

        def trials(x: Tensor, w: Tensor) -> forms.Calls:
            g = x.new_ones(len(x), len(w), *x.shape[2:])
            return {
                "spectral": lambda: spectral.backward(g, x, w, part, wanted),
                "library": lambda: Reflected.backward(self, g, x, w, part, wanted),
            }

        kind = f"conv7 gradient{' of the weight' if sink is None else ''}{'' if wanted else ' of the input'}"
        if forms.choose(kind, y.shape, weight, "spectral", trials) == "library":
            return super().backward(grad, y, weight, sink, wanted)
        return spectral.backward(grad, y, weight, sink, wanted)


class Doubling:
    """Nearest x2, then 3^3 on reflected edges."""

    def forward(self, y: ImageParts, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        def trials(x: Tensor, w: Tensor) -> forms.Calls:
            return {"folded": lambda: doubling.forward(x, w), "transposed": lambda: doubling.transposed_forward(x, w)}

        form = forms.choose("doubling forward", y.shape, weight, "folded", trials)
        return (doubling.forward if form == "folded" else doubling.transposed_forward)(y[ALL], weight), None

    def backward(self, grad: Tensor, y: ImageParts, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None:
        needs = sink is not None, wanted

        def trials(x: Tensor, w: Tensor) -> forms.Calls:
            g = x.new_ones(len(x), len(w), *(2 * n for n in x.shape[2:]))
            return {
                "folded": lambda: doubling.backward(g, x, w, needs),
                "transposed": lambda: doubling.transposed_backward(g, x, w, needs),
            }

        form = forms.choose("doubling gradient", y.shape, weight, "folded", trials)
        work = doubling.backward if form == "folded" else doubling.transposed_backward
        dy, dw = work(grad, y[ALL], weight, needs)
        if sink is not None and dy is not None:
            sink(ALL, dy)
        return dw


KERNEL3, KERNEL7, HALVING, DOUBLING = Kernel3(), Kernel7(), Reflected(2), Doubling()


def _drop(where: Where, part: Tensor) -> None:
    """A sink of gradients that are only timed."""


def _reflect(y: Tensor, weight: Tensor) -> Tensor:
    return F.pad(y, (weight.shape[-1] // 2,) * 6, mode="reflect")


def _padded_shape(y: ImageParts, weight: Tensor, where: Where) -> list[int]:
    more = weight.shape[-1] // 2 * 2
    return [len(range(y.shape[0])[where[0]]), y.shape[1], *(n + more for n in y.shape[2:])]


def _samples(y: ImageParts, weight: Tensor) -> Iterator[Where]:
    """All of y where it is small, else two samples or three at a time: torch convolves a lone small one slowly."""
    batch = y.shape[0]
    runs = 1 if math.prod(_padded_shape(y, weight, ALL)) * weight.element_size() <= HELD_BYTES else max(1, batch // 2)
    for run in range(runs):
        yield slice(batch * run // runs, batch * (run + 1) // runs), slice(None)


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
        gradients = NormGradients(Normed(ctx.relu, *ctx.saved_tensors))
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
        normed = Normed(True, *rest)
        gradients = NormGradients(normed)
        source = normed if kept is None else kept
        dw = ctx.convolution.backward(grad.contiguous(), source, weight, gradients, ctx.needs_input_grad[3])
        return *gradients.result(), dw, None, None, None
