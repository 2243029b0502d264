"""Weights re-arranged once within an inference, at every call outside of it."""

import pytest
import torch

from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.sweep import predict
from fastsrgan.model import layers
from fastsrgan.model.cpu import doubling, rearranged, winograd
from fastsrgan.model.networks import GeneratorSpec, build_generator


@pytest.fixture
def calls(monkeypatch):
    """How often weights were re-arranged, by function."""
    found = {}
    for module, name in (
        (winograd, "_weight_values"),
        (doubling, "_kernel"),
        (layers, "_block_weight"),
        (doubling, "transposed_weight"),
    ):
        plain = getattr(module, name).__wrapped__

        def counted(weight, *more, plain=plain, name=name):
            found[name] = found.get(name, 0) + 1
            return plain(weight, *more)

        monkeypatch.setattr(module, name, rearranged.once(counted))
    return found


def test_an_inference_rearranges_each_weight_once(calls):
    generator = build_generator(GeneratorSpec(kernel=8), seed=1)
    volume = torch.rand(16, 16, 40, generator=torch.Generator().manual_seed(0))
    plan = tiles.plan(volume.shape, 16, 12)
    expected = torch.stack([generator.raw(volume[None, None, :, :, :16])[0, 0]])
    before = dict(calls)
    calls.clear()
    out, _ = predict(volume, plan, TileNetwork(generator, 1.0, batch=1))
    assert before and calls == before, "three batches cost what one pass costs"
    alone, _ = predict(volume[..., :16], tiles.plan((16, 16, 16), 16, 16), TileNetwork(generator, 1.0, batch=1))
    assert torch.allclose(alone[0], volume[..., :16] - expected[0], atol=1e-5)  # found: 0 (rounding)
    generator.head.data.mul_(0.5)
    changed, _ = predict(volume, plan, TileNetwork(generator, 1.0, batch=1))
    assert (changed - out).abs().max() > 1e-3, "the next inference sees new weights"  # found: 1.6


def test_what_is_kept_belongs_to_weight_values_and_shape():
    seen = []

    @rearranged.once
    def twice(weight, times=2):
        seen.append(times)
        return weight * times

    weight, other = torch.ones(2, 3), torch.zeros(2, 3)
    with torch.no_grad(), rearranged.held():
        assert twice(weight) is twice(weight) and twice(weight, 3)[0, 0] == 3
        assert twice(weight.t()).shape == (3, 2) and twice(other).sum() == 0
        assert seen == [2, 3, 2, 2]
        with rearranged.held():
            twice(weight)
        twice(weight)
        assert len(seen) == 5
    twice(weight)
    assert len(seen) == 6
    with rearranged.held():
        trained = torch.ones(2, requires_grad=True)
        twice(trained).sum().backward()
        assert trained.grad is not None and torch.equal(trained.grad, torch.full((2,), 2.0))
