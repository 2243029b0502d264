"""7^3 convolutions on reflected edges as products of spectra (convolution theorem).

Of 343 products per voxel and pair of channels four remain, and one transform per channel. Taps and spectra meet in
partial DFTs, one small matrix per axis. A few channels of one sample are transformed at a time: spectra are never held
together, and the image can be made where it is needed (``ImageParts``). Exact; the rounding is an FFT's, below that of
the plain sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = 7
PAD = TAPS // 2
HELD_BYTES = 2**25  # spectra at a time: what a last-level cache holds
INFERENCE_BYTES = 2**23  # the same in inference, where it is most of the memory and costs little time

Where = tuple[slice, slice]  # samples, channels
Sink = Callable[[Where, Tensor], None]  # takes the gradient of a part of a source, once for each part


class ImageParts(Protocol):
    """(B, C, X, Y, Z) of which parts can be had: a tensor, or what makes them."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, where: Where, /) -> Tensor: ...


def forward(image: ImageParts, weight: Tensor) -> Tensor:
    """(B, I, X, Y, Z), (O, I, 7, 7, 7) -> (B, O, X, Y, Z)."""
    plan = _Plan.of(image.shape, weight)
    samples, taps = range(image.shape[0]), plan.partial(weight, 1)
    out = weight.new_empty(len(samples), len(weight), *plan.voxels)
    if plan.many_outputs:
        few = [plan.padded(image[_one(b), :]) for b in samples]
        for group in plan.groups:
            spread = plan.spread(taps[group], 1)
            for b in samples:
                out[b, group] = plan.inverse(_mix(few[b], spread), plan.voxels)
        return out
    total: list[Tensor | None] = [None for _ in samples]
    for group in plan.groups:
        spread = plan.spread(taps[:, group], 1)
        for b in samples:
            total[b] = _mix(plan.padded(image[_one(b), group]), spread, total[b])
    for b, spectra in enumerate(total):
        assert spectra is not None
        out[b] = plan.inverse(spectra, plan.voxels)
    return out


def backward(grad: Tensor, image: ImageParts, weight: Tensor, sink: Sink | None, wanted: bool) -> Tensor | None:
    """The weight's gradient if wanted; that of the image goes to ``sink``, if there is one, in parts."""
    plan = _Plan.of(image.shape, weight)
    dw = torch.empty_like(weight) if wanted else None
    (_few_inputs if plan.many_outputs else _few_outputs)(plan, grad, image, weight, sink, dw)
    return dw


def _few_outputs(
    plan: _Plan, grad: Tensor, image: ImageParts, weight: Tensor, sink: Sink | None, dw: Tensor | None
) -> None:
    gradients = [plan.transform(g) for g in grad]
    conjugate = [g.conj().resolve_conj() for g in gradients]
    taps = plan.partial(weight.transpose(0, 1), -1)
    for group in plan.groups:
        spread = None if sink is None else plan.spread(taps[group], -1)
        products = None
        for b in range(len(grad)):
            if dw is not None:
                products = _pair(conjugate[b], plan.padded(image[_one(b), group]), products)
            if sink is not None and spread is not None:
                sink((_one(b), group), plan.folded(_mix(gradients[b], spread))[None])
        if dw is not None and products is not None:
            dw[:, group] = plan.collect(products, 1)


def _few_inputs(
    plan: _Plan, grad: Tensor, image: ImageParts, weight: Tensor, sink: Sink | None, dw: Tensor | None
) -> None:
    conjugate = (
        [plan.padded(image[_one(b), :]).conj().resolve_conj() for b in range(len(grad))] if dw is not None else []
    )
    taps = plan.partial(weight.transpose(0, 1), -1)
    total: list[Tensor | None] = [None for _ in grad]
    for group in plan.groups:
        spread = None if sink is None else plan.spread(taps[:, group], -1)
        products = None
        for b in range(len(grad)):
            gradients = plan.transform(grad[b, group])
            if dw is not None:
                products = _pair(gradients, conjugate[b], products)
            if spread is not None:
                total[b] = _mix(gradients, spread, total[b])
        if dw is not None and products is not None:
            dw[group] = plan.collect(products, -1)
    for b, spectra in enumerate(total):
        if sink is not None and spectra is not None:
            sink((_one(b), slice(None)), plan.folded(spectra)[None])


def fold_reflected(padded: Tensor, width: int) -> Tensor:
    """The transpose of reflect-padding: (..., X + 2 w, ...), which is used up, -> a view (..., X, Y, Z) of it."""
    for d in (-3, -2, -1):
        n = padded.shape[d] - 2 * width
        inner = padded.narrow(d, width, n)
        inner.narrow(d, 1, width).add_(padded.narrow(d, 0, width).flip(d))
        inner.narrow(d, n - 1 - width, width).add_(padded.narrow(d, n + width, width).flip(d))
        padded = inner
    return padded


def _one(sample: int) -> slice:
    return slice(sample, sample + 1)


def _mix(spectra: Tensor, taps: Tensor, total: Tensor | None = None) -> Tensor:
    """Sum over I of (I, ...) times (O, I, ...), added to ``total``: (O, ...)."""
    if total is None:
        total = taps.new_zeros(taps.shape[0], *taps.shape[2:])
    for o in range(len(taps)):
        for i in range(len(spectra)):
            total[o].addcmul_(spectra[i], taps[o, i])
    return total


def _pair(gradients: Tensor, spectra: Tensor, total: Tensor | None) -> Tensor:
    """(O, ...) times (I, ...), added to ``total``: (O, I, ...)."""
    if total is None:
        return gradients[:, None] * spectra
    for o in range(len(gradients)):
        for i in range(len(spectra)):
            total[o, i].addcmul_(gradients[o], spectra[i])
    return total


class _Plan(NamedTuple):
    """Sizes of the transforms, the matrices between taps and spectra, and which channels go together.

    voxels : (X, Y, Z) of the image; sizes : of a transform, at least 6 more
    to_spectrum : per axis (N', 7), exp(2 pi i k t / N), half of the frequencies on the last axis
    many_outputs : more outputs than inputs; groups : of the channels of the larger side
    """

    voxels: list[int]
    sizes: list[int]
    to_spectrum: list[Tensor]
    many_outputs: bool
    groups: list[slice]

    @classmethod
    def of(cls, shape: torch.Size, weight: Tensor) -> _Plan:
        voxels = list(shape[2:])
        sizes = [good_size(n + 2 * PAD) for n in voxels]
        matrices = [_exponentials(n, weight.dtype)[: n if d < 2 else n // 2 + 1] for d, n in enumerate(sizes)]
        few, many = sorted(weight.shape[:2])
        held = (1 + few) * math.prod(len(m) for m in matrices) * 2 * weight.element_size()
        most = INFERENCE_BYTES if torch.is_inference_mode_enabled() else HELD_BYTES
        count = -(-many // max(1, most // held))
        size = -(-many // count)
        groups = [slice(first, first + size) for first in range(0, many, size)]
        return cls(voxels, sizes, matrices, len(weight) == many and few < many, groups)

    def transform(self, x: Tensor) -> Tensor:
        """(C, X, Y, Z) with zeros behind -> spectra."""
        return torch.fft.rfftn(x, self.sizes, dim=(1, 2, 3))

    def padded(self, x: Tensor) -> Tensor:
        """(1, C, X, Y, Z), its edges reflected -> spectra (C, ...)."""
        return self.transform(F.pad(x, (PAD,) * 6, mode="reflect")[0])

    def inverse(self, spectra: Tensor, wanted: list[int]) -> Tensor:
        """Spectra -> the first ``wanted`` voxels of each axis."""
        planes = torch.fft.ifftn(spectra, dim=(1, 2))[:, : wanted[0], : wanted[1]]
        return torch.fft.irfft(planes, self.sizes[2])[..., : wanted[2]]

    def folded(self, spectra: Tensor) -> Tensor:
        """Spectra of the gradient of ``padded`` -> that of its argument (C, X, Y, Z)."""
        return fold_reflected(self.inverse(spectra, [n + 2 * PAD for n in self.voxels]), PAD)

    def partial(self, weight: Tensor, sign: int) -> Tensor:
        """(O, I, 7, 7, 7) -> (O, I, 7, Y', Z'): all of the DFT but the first axis. sign -1 convolves instead."""
        _, ey, ez = self._matrices(sign)
        return ey @ (weight.to(ez.dtype) @ ez.t())

    def spread(self, partial: Tensor, sign: int) -> Tensor:
        """(O, I, 7, Y', Z') -> (O, I, X', Y', Z')."""
        return (self._matrices(sign)[0] @ partial.flatten(3)).unflatten(3, partial.shape[3:])

    def collect(self, spectra: Tensor, sign: int) -> Tensor:
        """(O, I, X', Y', Z') -> (O, I, 7, 7, 7): the first voxels of the inverse transform."""
        ex, ey, ez = self._matrices(sign)
        half = spectra.new_full((len(ez), 1), 2.0)
        half[0] = 1
        if self.sizes[2] % 2 == 0:
            half[-1] = 1
        x = (ex.t() @ spectra.flatten(3)).unflatten(3, spectra.shape[3:])
        return (ey.t() @ x @ (ez * half / math.prod(self.sizes))).real

    def _matrices(self, sign: int) -> list[Tensor]:
        return self.to_spectrum if sign > 0 else [m.conj().resolve_conj() for m in self.to_spectrum]


def good_size(n: int) -> int:
    """The next even number with prime factors up to 7."""
    n += n % 2
    while True:
        rest = n
        for p in (2, 3, 5, 7):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 2


@functools.cache
def _exponentials(n: int, dtype: torch.dtype) -> Tensor:
    """(n, 7): exp(2 pi i k t / n)."""
    angle = (torch.arange(n)[:, None] * torch.arange(TAPS) % n).double() * (2 * math.pi / n)
    return torch.complex(angle.cos(), angle.sin()).to(torch.complex128 if dtype == torch.float64 else torch.complex64)
