"""The training step: the explicit penalty equals double backward, weight gradients included."""

from __future__ import annotations

import pytest
import torch

from fastsrgan.losses import charbonnier, interpolate, soft_dice
from fastsrgan.model.networks import Critic, CriticSpec, Generator, GeneratorSpec
from fastsrgan.train.objectives import critic_loss, generator_loss, scores_and_input_gradient


def pair(batch: int, channels: int, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    shape = (batch, channels, patch, patch, patch)
    return torch.rand(shape, generator=rng, dtype=torch.double), torch.rand(shape, generator=rng, dtype=torch.double)


@pytest.mark.parametrize(
    ("patch", "channels", "conditional"), [(16, 2, False), (20, 2, True), (24, 4, False), (36, 2, False)]
)
def test_explicit_penalty_equals_double_backward(patch, channels, conditional):
    critic = Critic(CriticSpec(kernel=3, patch=patch, in_channels=channels, conditional=conditional), seed=3).double()
    with torch.no_grad():
        for bias in critic.biases:
            bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    real, fake = pair(2, channels, patch)
    res = torch.tensor([2.0, 3.0], dtype=torch.double)
    for eps in (torch.tensor([0.3, 0.8]).double(), torch.rand(2, channels, dtype=torch.double)):
        results = {}
        for form in ("explicit", "autograd"):
            terms = critic_loss(critic, real, fake, eps, 10.0, res, penalty=form)
            results[form] = (terms, torch.autograd.grad(terms["total"], list(critic.parameters()), allow_unused=True))
        for name in ("total", "wasserstein", "penalty"):
            a, b = (results[f][0][name] for f in ("explicit", "autograd"))
            assert abs(a - b) <= 1e-12 * abs(b)  # found: 0 (rounding)
        largest = max(g.abs().max() for g in results["autograd"][1] if g is not None)
        for a, b in zip(results["explicit"][1], results["autograd"][1], strict=True):
            assert (a - b).abs().max() <= 1e-12 * largest  # found: 1e-15 (rounding)


def test_input_gradient_equals_autograd_on_odd_sizes():
    critic = Critic(CriticSpec(kernel=2, patch=44), seed=0).double()
    x = torch.rand(3, 2, 44, 44, 44, dtype=torch.double, requires_grad=True)
    scores, gradient = scores_and_input_gradient(critic, x, tail=2)
    (expected,) = torch.autograd.grad(critic(x)[1:].sum(), x)
    assert torch.allclose(scores, critic(x), atol=1e-14)  # found: 0 (rounding)
    assert (gradient - expected[1:]).abs().max() <= 1e-14  # found: 0 (rounding)


def test_penalty_is_zero_where_the_gradient_norm_is_one():
    # A critic whose score is w . x: its gradient is w everywhere, and the penalty weight * (||w|| - 1)^2.
    critic = Critic(CriticSpec(kernel=2, patch=16), seed=0).double()
    real, fake = pair(2, 2, 16)
    _, gradient = scores_and_input_gradient(critic, interpolate(real, fake, torch.full((2,), 0.5).double()), tail=2)
    norm = gradient.flatten(1).norm(dim=1)
    terms = critic_loss(critic, real, fake, torch.full((2,), 0.5).double(), 7.0)
    # Found: 0 (rounding)
    assert terms["penalty"].item() == pytest.approx(7 * ((norm - 1) ** 2).mean().item(), rel=1e-12)


def test_generator_loss_adds_its_parts_and_skips_the_critic_when_asked():
    generator, critic = Generator(GeneratorSpec(kernel=2)), Critic(CriticSpec(kernel=2, patch=16))
    x, y = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 16, 16, 16)
    terms = generator_loss(generator, critic, x, y, lambda_rec=2.0, lambda_adv=0.5)
    pred = generator(x)
    assert torch.allclose(terms["reconstruction"], charbonnier(pred, y))
    assert torch.allclose(terms["adversarial"], -critic(pred).mean())
    assert torch.allclose(terms["total"], 2 * terms["reconstruction"] + 0.5 * terms["adversarial"])
    alone = generator_loss(generator, critic, x, y, lambda_adv=0.0, reconstruction="dice")
    assert torch.allclose(alone["total"], soft_dice(pred[:, 1:], y[:, 1:]) + charbonnier(pred[:, :1], y[:, :1]))
    assert alone["adversarial"] == 0
