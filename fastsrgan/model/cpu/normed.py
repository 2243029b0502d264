"""Instance norm with ReLU and its gradients on the CPU, through memory in blocks that a cache holds.

float32 and float64, contiguous (B, C, X, Y, Z). Why these operations of torch: docs/decisions/002.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastsrgan.model.cpu.spectral import Where

NORM_EPS = 1e-7  # added to the standard deviation, outside the root, as the original does
BLOCK = 2**20  # voxels of a block of channels
ALL: Where = (slice(None), slice(None))


class Normed:
    """What an instance norm and its ReLU make of x, as a source of it; numbers of each channel are (B, C).

    rstd : 1 / (std + eps), 0 where the channel is constant
    """

    def __init__(self, relu: bool, x: Tensor, mean: Tensor, std: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor):
        self.relu, self.x, self.mean, self.std, self.rstd = relu, x, mean, std, rstd
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
        return cls(relu, x, mean, std, torch.where(constant, 0, 1 / (std + NORM_EPS)), scale, shift)

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
        return last[1] if last is not None and last[0] == where else self.write(where, torch.empty_like(self.x[where]))


class NormGradients:
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
