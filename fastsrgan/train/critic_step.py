"""The critic's gradients of a WGAN-GP update without autograd (paper eq. 9, 10; docs/decisions/015).

The critic is piecewise linear. One forward pass over real, fake and interpolated patches fixes the slopes; one chain of
transposed convolutions gives the score's gradient with respect to every layer, down to the input for the interpolated
patches; the penalty's gradient with respect to that input gradient, pushed forward through the same slopes (without
biases), is what stands where a layer's input stands in an ordinary weight gradient. So each layer has one product

    dW_l = sum over samples of corr([a_real, a_fake, t_interp]_(l-1), [d_real, d_fake, d_interp]_l)

Exact almost everywhere, as double backward is (tests/test_critic_step.py: float64 <= 1e-12 of it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsrgan.losses import FLOOR, interpolate, widen
from fastsrgan.model.cpu import critic as critic_convs
from fastsrgan.model.cpu.critic import Direct
from fastsrgan.model.networks import Critic, with_resolution

CHUNK = 2  # patches of a batch at a time on a CPU: larger parts are no faster and take more memory


@torch.no_grad()
def critic_gradients(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    eps: Tensor,
    lambda_gp: float,
    res: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    scale: Tensor | float = 1.0,
    fast: bool | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Losses of a critic update, and the gradients of their total in the order of ``parameters(critic)``.

    Parameters
    ----------
    real, fake : (B, C, P, P, P)
    eps : (B,) or (B, C), the interpolation weight of ``real``
    lambda_gp : weight of the penalty; with 0 it is not computed and the interpolated patches are left out
    res : resolution in mm per sample or one for all, for conditional critics
    dtype : of the convolutions (default: that of the weights); losses, norms and results are float32 or wider
    scale : factor on every gradient, for types of little range
    fast : convolutions with fewer products than the library's (default: on the CPU in float32 and float64)

    Returns scalars total, wasserstein (mean D(fake) - mean D(real)) and penalty (weighted), and one tensor for each
    parameter, of its type. Raises ModelError when a conditional critic gets no ``res``.
    """
    batch, chunk = len(real), _chunk(real)
    dtype = dtype or critic.decision.dtype
    work = _Work(critic, real.shape[2], dtype, _fast(real, dtype) if fast is None else fast)
    for at in range(0, batch, chunk):
        part = slice(at, min(at + chunk, batch))
        kinds = [real[part], fake[part]]
        if lambda_gp:
            kinds.append(interpolate(real[part], fake[part], eps[part]))
        mm = res[part].repeat(len(kinds)) if res is not None and res.ndim else res
        work.add(_channels_last(critic, torch.cat(kinds), mm), batch, lambda_gp, scale)
    return work.losses(), work.gradients()


def parameters(critic: Critic) -> list[Tensor]:
    """The critic's parameters in the order of ``critic_gradients``."""
    return [*critic.convs, *critic.biases, critic.decision]


class _Score(torch.autograd.Function):
    """The critic's score, whose gradient with respect to the patches is found along with it."""

    @staticmethod
    def forward(ctx, x: Tensor, critic: Critic, res: Tensor | None, dtype: torch.dtype, fast: bool) -> Tensor:  # type: ignore[override]
        work = _Work(critic, x.shape[2], dtype, fast)
        patches = _channels_last(critic, x, res).to(dtype)
        scores, gradients = [], []
        for part in patches.split(_chunk(patches)):
            _, before, top = work.forward(part)
            scores.append((widen(top) * widen(work.decision)).flatten(1).sum(1, keepdim=True))
            _, gradient = work.backward(work.decision.expand_as(top), before, 0)
            gradients.append(gradient[..., : x.shape[1]].permute(0, 4, 1, 2, 3))
        ctx.save_for_backward(torch.cat(gradients).to(x.dtype))
        return torch.cat(scores)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return grad.view(-1, 1, 1, 1, 1).to(gradient.dtype) * gradient, None, None, None, None


def score(
    critic: Critic, x: Tensor, res: Tensor | None = None, *, dtype: torch.dtype | None = None, fast: bool | None = None
) -> Tensor:
    """``critic(x, res)``, (B, 1) in float32 or wider, differentiable in ``x`` (B, C, P, P, P) but not in the weights.

    ``dtype`` and ``fast`` as for ``critic_gradients``. Nothing of the critic is kept for the backward pass.
    """
    dtype = dtype or critic.decision.dtype
    return _Score.apply(x, critic, res, dtype, _fast(x, dtype) if fast is None else fast)


def _fast(x: Tensor, dtype: torch.dtype) -> bool:
    wide = dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and wide and not torch.compiler.is_compiling()


def _chunk(x: Tensor) -> int:
    return CHUNK if x.device.type == "cpu" else len(x)


def _channels_last(critic: Critic, x: Tensor, res: Tensor | None) -> Tensor:
    """(B, P, P, P, C), with the resolution channel where it belongs."""
    return with_resolution("critic", critic.spec, x, res).permute(0, 2, 3, 4, 1).contiguous()


class _Work:
    """The layers of one update, and the sums over its parts."""

    def __init__(self, critic: Critic, size: int, dtype: torch.dtype, fast: bool) -> None:
        self.slope, self.channels, self.dtype = critic.SLOPE, critic.spec.in_channels, dtype
        self.layers: list[Direct] = []
        for weight in critic.convs:
            self.layers.append(critic_convs.choose(weight.detach().to(dtype), size, fast))
            size = self.layers[-1].out
        self.biases = [b.detach().to(dtype) for b in critic.biases]
        self.decision = critic.decision.detach().to(dtype).permute(0, 2, 3, 4, 1)
        self.kinds = [p.dtype for p in parameters(critic)]
        self.bias_gradients = [torch.zeros_like(b, dtype=_wide(dtype)) for b in self.biases]
        self.decision_gradient = torch.zeros_like(self.decision, dtype=_wide(dtype))
        self.distance = self.penalty = self.decision_gradient.new_zeros(())

    def add(self, patches: Tensor, batch: int, lambda_gp: float, scale: Tensor | float) -> None:
        """One part of the batch: patches (3 n or 2 n, P, P, P, C) of ``batch`` samples."""
        n = len(patches) // (3 if lambda_gp else 2)
        lifted, before, top = self.forward(patches.to(self.dtype))
        signs = torch.ones(len(patches), device=patches.device, dtype=_wide(self.dtype))
        signs[:n], signs[n : 2 * n] = -1 / batch, 1 / batch
        scores = (widen(top) * widen(self.decision)).flatten(1).sum(1)
        self.distance = self.distance + (scores[: 2 * n] * signs[: 2 * n]).sum()
        weights = signs.clone()
        weights[: 2 * n] *= scale
        weights = weights.view(-1, 1, 1, 1, 1)
        self.decision_gradient += (weights * widen(top))[: 2 * n].sum(0, keepdim=True)
        deltas, gradient = self.backward((weights * widen(self.decision)).to(self.dtype), before, 2 * n)
        if lambda_gp:
            t = self.penalise(gradient, batch, lambda_gp) * scale
            self.tangent(t.to(self.dtype), lifted, before, deltas, 2 * n)
        for layer, a, d in zip(self.layers, lifted, deltas, strict=True):
            layer.add(a, d)

    def forward(self, a: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Lifted inputs and outputs before the LeakyReLU of every layer, and the last one's behind it."""
        lifted, before = [], []
        for layer, bias in zip(self.layers, self.biases, strict=True):
            lifted.append(layer.lift(a))
            before.append(layer.forward(lifted[-1], bias))
            a = F.leaky_relu(before[-1], self.slope)
        return lifted, before, a

    def backward(self, d: Tensor, before: list[Tensor], interpolated: int) -> tuple[list[Tensor], Tensor]:
        """Lifted gradients of every layer's output, and the interpolated patches' input gradient."""
        deltas: list[Tensor] = []
        for i, layer in reversed(list(enumerate(self.layers))):
            d = _slopes(d, before[i], self.slope)
            self.bias_gradients[i] += widen(d[:interpolated]).sum((0, 1, 2, 3))
            deltas.insert(0, layer.lift_gradient(d))
            if i:
                d = layer.input_gradient(d, deltas[0])
        first, n = self.layers[0], len(d) - interpolated
        d = first.input_gradient(d[interpolated:], deltas[0].narrow(first.samples, interpolated, n))
        return deltas, d

    def penalise(self, gradient: Tensor, batch: int, lambda_gp: float) -> Tensor:
        """Adds lambda / batch * (||g||_2 - 1)^2 and gives its gradient with respect to g (n, P, P, P, C).

        The resolution channel counts in neither.
        """
        g = widen(gradient[..., : self.channels])
        square = (g**2).flatten(1).sum(1)
        norm = square.clamp_min(FLOOR).sqrt()
        self.penalty = self.penalty + lambda_gp / batch * ((norm - 1) ** 2).sum()
        factor = torch.where(square > FLOOR, 2 * lambda_gp / batch * (norm - 1) / norm, 0)
        return F.pad(factor.view(-1, 1, 1, 1, 1) * g, (0, gradient.shape[-1] - self.channels))

    def tangent(
        self, t: Tensor, lifted: list[Tensor], before: list[Tensor], deltas: list[Tensor], interpolated: int
    ) -> None:
        """Pushes ``t`` forward; what it is in front of each layer takes the place of the interpolated patches."""
        for layer, a, z in zip(self.layers, lifted, before, strict=True):
            place = a.narrow(layer.samples, interpolated, len(t))
            layer.lift(t, place)
            t = _slopes(layer.forward(place), z[interpolated:], self.slope)
        self.decision_gradient += widen(t).sum(0, keepdim=True)

    def losses(self) -> dict[str, Tensor]:
        """total, wasserstein, penalty: scalars."""
        return {"total": self.distance + self.penalty, "wasserstein": self.distance, "penalty": self.penalty}

    def gradients(self) -> list[Tensor]:
        """In the order of ``parameters``."""
        decision = self.decision_gradient.permute(0, 4, 1, 2, 3).contiguous()
        found = [*(layer.gradient() for layer in self.layers), *self.bias_gradients, decision]
        return [g.to(kind) for g, kind in zip(found, self.kinds, strict=True)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slopes(d: Tensor, before: Tensor, slope: float) -> Tensor:
    """``d`` times the LeakyReLU's slope at ``before``."""
    return torch.ops.aten.leaky_relu_backward(d, before, slope, False)
