"""Losses of SegSRGAN: Charbonnier (paper eq. 12), soft Dice, and the WGAN-GP terms (eq. 9-11).

Arrays are (B, C, X, Y, Z): channel 0 the image, channel 1 the segmentation, further channels mask classes.
All are computed in float32 or better whatever the precision of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

NU = 1e-3  # Charbonnier's smoothing
DICE_SMOOTH = 1.0
FLOOR = 1e-30  # of a squared gradient norm: below it the penalty has no gradient


def widen(x: Tensor) -> Tensor:
    """float32 for half precision, everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def charbonnier(pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of sqrt((pred - target)^2 + nu^2) over batch, channels and space, nu = 1e-3: scalar.

    The segmentation channel is a channel like any other, as in the original. ``weights`` (B,), of sum 1: of the samples
    in the mean, equal by default.
    """
    return mean_of_samples(torch.sqrt((widen(pred) - widen(target)) ** 2 + NU**2), weights)


def mean_of_samples(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of everything, or the sum over samples of ``weights`` (B,) times the mean of each: scalar."""
    return values.mean() if weights is None else (values.flatten(1).mean(1) * weights).sum()


def soft_dice(pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - mean over channels of (2 sum(y p) + 1) / (sum y + sum p + 1), sums over batch and space: scalar.

    Samples whose ``weights`` (B,) are 0 are left out.
    """
    p, y = widen(pred), widen(target)
    if weights is not None:
        seen = (weights > 0).view(-1, *(1,) * (p.ndim - 1))
        p, y = p * seen, y * seen
    dims = (0, 2, 3, 4)
    score = (2 * (p * y).sum(dims) + DICE_SMOOTH) / (p.sum(dims) + y.sum(dims) + DICE_SMOOTH)
    return 1 - score.mean()


def dice_charbonnier(pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Soft Dice of every channel behind the image, plus Charbonnier of the image channel: scalar; weights as there."""
    return soft_dice(pred[:, 1:], target[:, 1:], weights) + charbonnier(pred[:, :1], target[:, :1], weights)


RECONSTRUCTION = {"charbonnier": charbonnier, "dice": dice_charbonnier}


def interpolate(real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """eps real + (1 - eps) fake; ``eps`` of shape (B,) (paper eq. 10) or (B, C) (the original's code)."""
    eps = eps.reshape(*eps.shape, *(1,) * (real.ndim - eps.ndim))
    return eps * real + (1 - eps) * fake


def gradient_penalty(critic, real: Tensor, fake: Tensor, eps: Tensor, weight: float = 10.0, res=None) -> Tensor:
    """weight * mean over samples of (||grad_x critic(x)||_2 - 1)^2 at x = eps real + (1 - eps) fake: scalar.

    The plain double-backward form, the oracle of every faster one. ``eps``: (B,) or (B, C). The norm is over all
    channels of the sample (not the resolution channel).
    """
    x = interpolate(real, fake, eps).detach().requires_grad_(True)
    score = critic(x) if res is None else critic(x, res)
    (grad,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return norm_penalty(grad, weight)


def norm_penalty(gradient: Tensor, weight: float) -> Tensor:
    """weight * mean over samples of (||gradient||_2 - 1)^2, the norm over everything behind the first axis: scalar."""
    # Not torch.norm: its float32 sum over a patch is 1e-5 off on a CPU. The floor keeps the gradient finite at 0.
    norm = (widen(gradient) ** 2).flatten(1).sum(1).clamp_min(FLOOR).sqrt()
    return weight * ((norm - 1) ** 2).mean()


def wasserstein(score_real: Tensor, score_fake: Tensor) -> Tensor:
    """mean D(fake) - mean D(real), which the critic minimises: scalar."""
    return widen(score_fake).mean() - widen(score_real).mean()
