"""The critic update without autograd equals double backward: losses and every weight gradient."""

from __future__ import annotations

import pytest
import torch

from fastsrgan.errors import ModelError
from fastsrgan.model.networks import Critic, CriticSpec, init_normal
from fastsrgan.train import critic_step
from fastsrgan.train.critic_step import critic_gradients, parameters, score
from fastsrgan.train.objectives import critic_loss

CASES = [(16, 2, False, 1), (20, 2, True, 3), (24, 4, False, 2), (28, 3, True, 5), (36, 2, False, 2), (44, 2, False, 1)]


def make(patch: int, channels: int, conditional: bool, kernel: int = 3, dtype: torch.dtype = torch.double) -> Critic:
    critic = Critic(CriticSpec(kernel, patch, channels, conditional), seed=3).to(dtype)
    with torch.no_grad():
        for bias in critic.biases:
            bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return critic


def patches(batch: int, channels: int, patch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    pair = torch.rand((2, batch, channels, patch, patch, patch), generator=rng, dtype=torch.double)
    return pair[0], pair[1], torch.rand(batch, generator=rng, dtype=torch.double) * 3 + 0.5


def worst(found: list[torch.Tensor], expected) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("patch", "channels", "conditional", "batch"), CASES)
def test_losses_and_gradients_equal_double_backward(poisoned, patch, channels, conditional, batch, fast):
    critic = make(patch, channels, conditional)
    real, fake, res = patches(batch, channels, patch)
    for shape in ((batch,), (batch, channels)):
        eps = torch.rand(shape, generator=torch.Generator().manual_seed(4), dtype=torch.double)
        for weight in (10.0, 0.0):
            expected = critic_loss(critic, real, fake, eps, weight, res, penalty="autograd")
            gradients = torch.autograd.grad(expected["total"], parameters(critic))
            terms, found = critic_gradients(critic, real, fake, eps, weight, res, fast=fast)
            for name, value in expected.items():
                assert abs(terms[name] - value) <= 1e-12 * (abs(value) + 1e-3)  # found: 3e-14 (rounding)
            assert [g.dtype for g in found] == [torch.double] * len(found)
            assert worst(found, gradients) <= 1e-12  # found: 6.6e-15 (rounding)


def test_parts_of_a_batch_add_up(monkeypatch):
    critic = make(20, 2, False)
    real, fake, _ = patches(5, 2, 20)
    eps = torch.rand(5, 2, generator=torch.Generator().manual_seed(4), dtype=torch.double)
    whole = critic_gradients(critic, real, fake, eps, 10.0)
    monkeypatch.setattr(critic_step, "CHUNK", 2)
    parts = critic_gradients(critic, real, fake, eps, 10.0)
    assert worst(parts[1], whole[1]) <= 1e-13  # found: 0 (rounding)
    assert parts[0]["total"] == pytest.approx(whole[0]["total"].item(), rel=1e-13)  # found: 0 (rounding)
    scaled = critic_gradients(critic, real, fake, eps, 10.0, scale=torch.tensor(64.0))
    assert worst([g / 64 for g in scaled[1]], whole[1]) <= 1e-13  # found: 0 (rounding)


@pytest.mark.parametrize("fast", [True, False])
def test_a_critic_without_slope_anywhere_has_no_penalty_gradient(fast):
    critic = make(16, 2, False)
    with torch.no_grad():
        critic.decision.zero_()
    real, fake, _ = patches(2, 2, 16)
    terms, found = critic_gradients(critic, real, fake, torch.full((2,), 0.5).double(), 7.0, fast=fast)
    assert terms["penalty"].item() == pytest.approx(7.0)
    assert all(bool(g.isfinite().all()) for g in found)
    assert all(float(g.abs().max()) == 0 for g in found[:-1])


@pytest.mark.parametrize("patch", [20, 36])
def test_float32_is_as_close_to_float64_as_autograd_is(patch):
    critic = make(patch, 2, False, kernel=16)
    real, fake, _ = patches(2, 2, patch)
    eps = torch.tensor([[0.3, 0.8], [0.6, 0.1]]).double()
    expected = critic_loss(critic, real, fake, eps, 10.0, penalty="autograd")
    exact = torch.autograd.grad(expected["total"], parameters(critic))
    critic.float()
    terms, found = critic_gradients(critic, real.float(), fake.float(), eps.float(), 10.0)
    assert worst(found, exact) <= 1e-4  # a voxel within rounding of a kink takes either slope; found: 1.1e-6
    assert terms["total"].item() == pytest.approx(expected["total"].item(), rel=1e-6)  # found: 1.3e-7


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.15), (torch.float16, 0.016)])
def test_half_precision_is_that_of_the_convolutions_alone(dtype, limit):
    """Of five critics the median, all gradients together (measured 0.076 and 0.008): one of the last layers' few voxels
    within rounding of its kink takes either slope, and moves every gradient of that critic."""
    real, fake, res = patches(2, 2, 16)
    real, fake = real.float(), fake.float()
    eps, off = torch.tensor([0.3, 0.8]), []
    for seed in range(5):
        critic = make(16, 2, True, kernel=4, dtype=torch.float32)
        init_normal(critic, 2.0, seed)
        terms, exact = critic_gradients(critic, real, fake, eps, 10.0, res)
        near, found = critic_gradients(critic, real, fake, eps, 10.0, res, dtype=dtype, scale=8.0)
        assert {t.dtype for t in near.values()} == {g.dtype for g in found} == {torch.float32}
        assert near["penalty"].item() == pytest.approx(terms["penalty"].item(), rel=0.05)  # found: 0.035
        together = [torch.cat([g.flatten() for g in gradients]) for gradients in (found, exact)]
        off.append(worst([together[0] / 8], [together[1]]))
    assert sorted(off)[2] <= limit, off


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("patch", "channels", "conditional", "batch"), CASES[:4])
def test_score_equals_the_critic_and_its_input_gradient(patch, channels, conditional, batch, fast):
    critic = make(patch, channels, conditional)
    x, _, res = patches(batch, channels, patch)
    x.requires_grad_()
    weights = torch.arange(1.0, batch + 1).double()[:, None]
    plain, own = critic(x, res), score(critic, x, res, fast=fast)
    assert (plain - own).abs().max() <= 1e-13  # found: 1.3e-15 (rounding)
    (expected,) = torch.autograd.grad((weights * plain).sum(), x)
    (found,) = torch.autograd.grad((weights * own).sum(), x)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()  # found: 6e-16 (rounding)


def test_a_conditional_critic_needs_a_resolution():
    critic = make(16, 2, True)
    real, fake, _ = patches(1, 2, 16)
    with pytest.raises(ModelError, match="resolution"):
        critic_gradients(critic, real, fake, torch.ones(1).double(), 10.0)
    with pytest.raises(ModelError, match="resolution"):
        score(critic, real)
    one, _ = critic_gradients(critic, real, fake, torch.ones(1).double(), 10.0, torch.tensor(3.0).double())
    assert bool(one["total"].isfinite())
