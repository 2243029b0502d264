"""The critic's convolution in its forms: each equals conv3d and its autograd, on sizes that divide nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastsrgan.model.cpu import critic
from fastsrgan.model.cpu.critic import ALIGNED, FEW, TAPS, WIDE, Aligned, Columns, Direct, Winograd, choose
from fastsrgan.model.networks import same_pad

FORMS = (Direct, Columns, Winograd)
ALL = [(f, c) for f in FORMS for c in ((2, 5), (FEW, 3), (7, 6), (WIDE, 3))] + [(Aligned, c) for c in ((2, 5), (7, 6))]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize(("form", "channels"), ALL)
@pytest.mark.parametrize("size", [3, 4, 5, 8, 10, 13, 16])
def test_forms_equal_the_plain_convolution_and_its_gradients(poisoned, form, size, channels):
    inputs, outputs = channels
    weight = draw(1, outputs, inputs, 4, 4, 4).requires_grad_()
    x, bias = draw(2, 3, size, size, size, inputs).requires_grad_(), draw(3, outputs)
    expected = F.conv3d(same_pad(x.permute(0, 4, 1, 2, 3)), weight, bias, stride=2).permute(0, 2, 3, 4, 1)
    d = draw(4, *expected.shape)
    dx, dw = torch.autograd.grad(expected, (x, weight), d)

    conv = form(weight.detach(), size)
    lifted, lifted_d = conv.lift(x.detach()), conv.lift_gradient(d)
    # Two more samples whose place is then taken, as the tangents take that of the interpolated patches.
    more = conv.lift(draw(5, 5, size, size, size, inputs))
    conv.lift(x.detach(), more.narrow(conv.samples, 2, 3))
    assert torch.equal(more.narrow(conv.samples, 2, 3), lifted)
    conv.add(lifted, lifted_d)
    conv.add(lifted, lifted_d)
    for found, wanted in (
        (conv.forward(lifted, bias), expected),
        (conv.forward(more.narrow(conv.samples, 2, 3), bias), expected),
        (conv.input_gradient(d, lifted_d), dx),
        (conv.gradient(), 2 * dw),
    ):
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 1e-13 * wanted.abs().max() * inputs  # found: 1.4e-15 (rounding)


def test_few_channels_are_filled_up_where_tensor_cores_multiply(monkeypatch):
    """And nowhere else: not on a CPU, not in float32."""
    half = torch.zeros(8, 2, 4, 4, 4, dtype=torch.bfloat16)
    assert type(choose(half, 16, False)) is Direct
    monkeypatch.setattr(critic, "for_tensor_cores", lambda weight: weight.dtype == torch.bfloat16)
    first = choose(half, 16, False)
    assert type(first) is Aligned and first.lift(half.new_zeros(1, 16, 16, 16, 2)).shape[-1] == ALIGNED
    assert (
        type(choose(half.float(), 16, False)) is Direct
        and type(choose(half.repeat(1, 4, 1, 1, 1), 16, False)) is Direct
    )


def test_float32_stays_within_a_few_times_a_plain_convolutions_rounding():
    x, weight = draw(1, 2, 16, 16, 16, WIDE), draw(2, 32, WIDE, 4, 4, 4)
    exact = Direct(weight, 16)
    expected = exact.forward(exact.lift(x))
    errors = {}
    for form in FORMS:
        conv = form(weight.float(), 16)
        errors[form] = float((conv.forward(conv.lift(x.float())) - expected).norm())
    assert max(errors.values()) <= 4 * errors[Direct]


def test_the_form_follows_from_channels_and_size():
    few, many = torch.zeros(8, FEW, 4, 4, 4), torch.zeros(8, 8, 4, 4, 4)
    assert type(choose(few, 64, True)) is Direct
    assert type(choose(many, TAPS, True)) is Columns
    assert type(choose(many, TAPS + 1, True)) is Winograd
    assert all(type(choose(w, n, False)) is Direct for w in (few, many) for n in (3, 64))
