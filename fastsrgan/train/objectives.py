"""One training iteration of SegSRGAN: critic updates with gradient penalty, then a generator update (paper eq. 9-12).

The gradient penalty comes in three forms that agree to rounding (tests/test_step.py): ``autograd``, the plain double
backward of losses.gradient_penalty, ``explicit``: the critic is piecewise linear, so its input gradient is a chain
of transposed convolutions with LeakyReLU masks, written as a forward graph whose one ordinary backward gives all weight
gradients (decision 005), and ``manual``, which needs no autograd at all (critic_step.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsrgan.losses import (
    RECONSTRUCTION,
    gradient_penalty,
    interpolate,
    mean_of_samples,
    norm_penalty,
    soft_dice,
    wasserstein,
    widen,
)
from fastsrgan.model.networks import Critic, Generator, same_pad, with_resolution


def scores_and_input_gradient(critic: Critic, x: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """Scores of a batch, and the gradient of the last ``tail`` samples' scores with respect to their input.

    ``x`` is (B, C, P, P, P) with the resolution channel already appended where the critic is conditional. Returns
    (B, 1) and (tail, C, P, P, P), both differentiable in the critic's weights. Exact almost everywhere, as autograd is.
    """
    masks, sizes = [], []
    y = x
    for weight, bias in zip(critic.convs, critic.biases, strict=True):
        sizes.append(y.shape[2:])
        before = F.conv3d(same_pad(y), weight, bias, stride=2)
        masks.append(before.detach()[-tail:] > 0)
        y = F.leaky_relu(before, critic.SLOPE)
    scores = F.conv3d(y, critic.decision).flatten(1)
    g = critic.decision.expand(tail, -1, -1, -1, -1)
    for weight, mask, size in zip(reversed(list(critic.convs)), reversed(masks), reversed(sizes), strict=True):
        g = torch.where(mask, g, critic.SLOPE * g)
        g = F.conv_transpose3d(g, weight, stride=2)[..., 1 : 1 + size[0], 1 : 1 + size[1], 1 : 1 + size[2]]
    return scores, g


def critic_loss(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    eps: Tensor,
    lambda_gp: float,
    res: Tensor | None = None,
    penalty: str = "explicit",
) -> dict[str, Tensor]:
    """What a critic update minimises (paper eq. 9, 10), ready for ``total.backward()``.

    Parameters
    ----------
    real, fake : (B, C, P, P, P); ``fake`` carries no graph
    eps : (B,) or (B, C), the interpolation weight of ``real``
    res : resolution in mm per sample, for conditional critics
    lambda_gp : weight of the penalty; with 0 it is not computed
    penalty : "explicit" (one batch of 3 B, one backward) or "autograd" (the oracle)

    Returns scalars: total, wasserstein (mean D(fake) - mean D(real)), penalty (weighted).
    """
    if penalty == "autograd" or not lambda_gp:
        condition = (res,) if critic.spec.conditional else ()
        distance = wasserstein(critic(real, *condition), critic(fake, *condition))
        if not lambda_gp:
            return {"total": distance, "wasserstein": distance, "penalty": torch.zeros_like(distance)}
        gp = gradient_penalty(critic, real, fake, eps, lambda_gp, res if critic.spec.conditional else None)
        return {"total": distance + gp, "wasserstein": distance, "penalty": gp}
    n = real.shape[0]
    batch = torch.cat([real, fake, interpolate(real, fake, eps)])
    batch = with_resolution("critic", critic.spec, batch, res.repeat(3) if res is not None and res.ndim else res)
    scores, gradient = scores_and_input_gradient(critic, batch, tail=n)
    distance = wasserstein(scores[:n], scores[n : 2 * n])
    gp = norm_penalty(gradient[:, : real.shape[1]], lambda_gp)  # the resolution channel does not count
    return {"total": distance + gp, "wasserstein": distance, "penalty": gp}


def agreed_patches(pred: Tensor, x: Tensor, agree: Tensor | None) -> Tensor:
    """``pred`` (B, C, P, P, P) with an image that agrees with the scan of which ``x`` (B, 1, P, P, P) is the
    interpolation: channel 0 becomes SR + C x - E SR along the last axis (not in the paper; decision 029).

    ``agree`` (B, 2, P, P): C and E of ``consistency.patch_agreement``; None: ``pred`` as it is. The gradient of what
    the scan says is gone: a loss behind this layer pays for what the scan cannot say.
    """
    if agree is None:
        return pred
    sr, change = widen(pred[:, :1]), agree.to(torch.promote_types(pred.dtype, torch.float32))
    with torch.autocast(pred.device.type, enabled=False):  # a difference of close numbers
        given, seen = (torch.einsum("bczk,bcxyk->bcxyz", change[:, i : i + 1], v) for i, v in ((0, widen(x)), (1, sr)))
    return torch.cat([(sr + given - seen).to(pred.dtype), pred[:, 1:]], 1)


def generator_loss(
    generator: Generator,
    critic: Critic,
    x: Tensor,
    y: Tensor,
    *,
    lambda_rec: float = 1.0,
    lambda_adv: float = 1e-3,
    reconstruction: str = "charbonnier",
    dice_weight: float = 0.0,
    res: Tensor | None = None,
    score: Callable[[Critic, Tensor, Tensor | None], Tensor] = Critic.__call__,
    weights: Tensor | None = None,
    agree: Tensor | None = None,
) -> dict[str, Tensor]:
    """What the generator update minimises (paper eq. 11, 12): scalars total and its parts, unweighted.

    ``x`` (B, 1, P, P, P) interpolated input, ``y`` (B, C, P, P, P) truth. The parts are adversarial, reconstruction
    and, with a ``dice_weight`` (not in the paper), dice of all channels behind the image. With ``lambda_adv`` 0 the
    critic is not run. ``score``: critic_step.score or the plain critic. ``weights`` (B,), of sum
    1: of the samples in all means, equal by default; those of weight 0 only fill the batch up. ``agree``: as for
    ``agreed_patches``, which comes before all terms.
    """
    pred = agreed_patches(generator(x, res), x, agree)
    rec = RECONSTRUCTION[reconstruction](pred, y, weights)
    terms = {"adversarial": torch.zeros_like(rec), "reconstruction": rec}
    total = lambda_rec * rec
    if lambda_adv:
        terms["adversarial"] = -mean_of_samples(widen(score(critic, pred, res)), weights)
        total = total + lambda_adv * terms["adversarial"]
    if dice_weight:
        terms["dice"] = soft_dice(pred[:, 1:], y[:, 1:], weights)
        total = total + dice_weight * terms["dice"]
    return {"total": total, **terms}
