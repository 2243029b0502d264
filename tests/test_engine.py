"""Tiles through a generator: identity, batches, memory, precision, networks of any make."""

import io
import logging

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from fastsrgan.cli.console import PlainProgress
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.sweep import predict
from fastsrgan.model import arithmetic as arithmetics
from fastsrgan.model.networks import GeneratorSpec, build_generator

VOLUME = torch.rand(21, 30, 18, generator=torch.Generator().manual_seed(0))
PLAN = tiles.plan(VOLUME.shape, 16, 6)


class Foreign(nn.Module):
    """A generator that is known by its outputs only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Cramped(Foreign):
    """Has memory for ``room`` tiles at a time."""

    def __init__(self, inner: nn.Module, room: int, error: RuntimeError) -> None:
        super().__init__(inner)
        self.room, self.error, self.sizes = room, error, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise self.error
        return self.inner(x)


@pytest.fixture(scope="module")
def generator():
    return build_generator(GeneratorSpec(kernel=2), seed=1).eval()


def identity(**spec) -> nn.Module:
    generator = build_generator(GeneratorSpec(kernel=1, **spec))
    nn.init.zeros_(generator.head)
    return generator


@pytest.mark.parametrize("padding", tiles.PADDINGS)
@pytest.mark.parametrize("window", ["constant", "gaussian"])
@pytest.mark.parametrize("patch", [None, 8, (16, 64, 12)])
def test_a_zero_head_gives_the_volume_to_the_last_bit(patch, window, padding):
    plan = tiles.plan(VOLUME.shape, patch, 7, padding=padding, window=window)
    out, _ = predict(VOLUME, plan, TileNetwork(identity(), 1.0))
    assert torch.equal(out[0], VOLUME)
    assert (out[1] == 0.5).all()


def test_an_identity_of_foreign_make_gives_the_volume(generator):
    class Same(nn.Module):
        def forward(self, x):
            return torch.cat([x, x], 1)

    out, _ = predict(VOLUME, PLAN, TileNetwork(Same(), 1.0))
    assert out.shape == (2, *VOLUME.shape)
    assert (out - VOLUME).abs().max() < 3e-7  # found: 2.4e-7, two units in the last place of 1


@pytest.mark.parametrize("spec", [{}, {"residual": False}, {"mask_classes": 3}, {"network": "unet"}])
def test_stitching_the_head_equals_stitching_the_output(spec):
    """Fused subtraction, sigmoid and softmax against the plain forward pass, tile by tile."""
    generator = build_generator(GeneratorSpec(kernel=2, **spec), seed=2).eval()
    fused, _ = predict(VOLUME, PLAN, TileNetwork(generator, 1.0))
    plain, _ = predict(VOLUME, PLAN, TileNetwork(Foreign(generator), 1.0))
    assert fused.shape[0] == generator.spec.out_channels
    assert torch.allclose(fused, plain, rtol=0, atol=2e-6)  # found: 4.8e-7
    if spec.get("mask_classes"):
        assert torch.allclose(fused[2:].sum(0), torch.ones(VOLUME.shape), rtol=0, atol=1e-6)  # found: 1.2e-7


def test_a_subclass_with_its_own_forward_is_not_taken_apart():
    class Halved(type(identity())):
        def forward(self, x, res=None):
            return 0.5 * super().forward(x, res)

    halved = Halved(GeneratorSpec(kernel=1))
    nn.init.zeros_(halved.head)
    out, _ = predict(VOLUME, PLAN, TileNetwork(halved, 1.0))
    # Found: 1.2e-7
    assert torch.allclose(out[0], 0.5 * VOLUME, atol=1e-6) and torch.allclose(out[1], torch.tensor(0.25))


def test_dense_tiles_give_the_plain_average(generator):
    """Against the definition: every tile predicted alone, float64 sums, divided by the count."""
    total, count = np.zeros((2, *VOLUME.shape)), np.zeros(VOLUME.shape)
    for origin in PLAN:
        at = tuple(slice(o, o + p) for o, p in zip(origin, PLAN.patch, strict=True))
        with torch.inference_mode():
            total[(slice(None), *at)] += generator(VOLUME[at][None, None])[0].numpy()
        count[at] += 1
    out, facts = predict(VOLUME, PLAN, TileNetwork(generator, 1.0))
    # Found: 8.2e-6. A lone tile may be convolved by another form than two at once: twice that is allowed.
    assert np.abs(out.numpy() - total / count).max() < 1.6e-5
    assert facts["tiles_per_second"] > 0


def test_batch_sizes_agree_and_reruns_are_bit_identical(generator):
    reference, facts = predict(VOLUME, PLAN, TileNetwork(generator, 1.0, batch=1))
    assert facts["batch"] == 1
    for batch in (3, 1000, "auto"):
        out, _ = predict(VOLUME, PLAN, TileNetwork(generator, 1.0, batch=batch))
        assert torch.allclose(out, reference, rtol=0, atol=1.6e-5)  # found: 8.2e-6, as above
        again, _ = predict(VOLUME, PLAN, TileNetwork(generator, 1.0, batch=batch))
        assert torch.equal(out, again)


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_running_out_of_memory_halves_the_batch(generator, caplog, error):
    cramped = Cramped(generator, 2, error)
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        out, facts = predict(VOLUME, PLAN, TileNetwork(cramped, 1.0, batch=8))
    assert cramped.sizes[:3] == [8, 4, 2] and max(cramped.sizes[3:]) == 2 and facts["batch"] == 2
    assert [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()] == [
        f"out of memory on cpu: going on with {n} tiles at a time" for n in (4, 2)
    ]
    reference, _ = predict(VOLUME, PLAN, TileNetwork(generator, 1.0, batch=2))
    assert torch.allclose(out, reference, rtol=0, atol=1.6e-5)  # found: 8.2e-6, as above


def test_of_a_short_batch_without_room_half_is_tried_and_not_half_of_a_full_one(generator):
    cramped = Cramped(generator, 2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"))
    network = TileNetwork(cramped, 1.0)
    assert network.choose_batch(16, PLAN) == 16
    found = list(network.outputs(VOLUME, PLAN, range(5)))
    assert cramped.sizes == [5, 2, 2, 1] and [len(tiles) for tiles in found] == [2, 2, 1] and network.size == 2


@pytest.mark.fault(33)
def test_no_memory_for_one_tile_ends_with_a_hint(generator):
    cramped = Cramped(generator, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ResourceError, match="one tile of 16 x 16 x 16 voxels"):
        predict(VOLUME, PLAN, TileNetwork(cramped, 1.0, batch=4))


def test_other_errors_of_a_network_are_not_swallowed(generator):
    with pytest.raises(RuntimeError, match="shapes differ"):
        predict(VOLUME, PLAN, TileNetwork(Cramped(generator, 0, RuntimeError("shapes differ")), 1.0))


@pytest.mark.parametrize("batch", [0, -1, "many", 1.5])
def test_an_impossible_batch_is_refused(generator, batch):
    with pytest.raises(UsageError, match="batch"):
        predict(VOLUME, PLAN, TileNetwork(generator, 1.0, batch=batch))


def test_the_resolution_reaches_conditional_networks_only():
    seen = []

    class Conditional(nn.Module):
        spec = GeneratorSpec(conditional=True)

        def forward(self, x, res):
            seen.append(res)
            return torch.cat([x, x], 1)

    predict(VOLUME, PLAN, TileNetwork(Conditional(), 3.3))
    assert set(seen) == {3.3}
    conditional = build_generator(GeneratorSpec(kernel=2, conditional=True), seed=3)
    fused, _ = predict(VOLUME, PLAN, TileNetwork(conditional, 3.3))
    alone = conditional(VOLUME[:16, :16, :16][None, None], 3.3)[0]
    first, _ = predict(VOLUME[:16, :16, :16], tiles.plan((16, 16, 16), 16, 16), TileNetwork(conditional, 3.3))
    assert fused.shape == (2, *VOLUME.shape) and torch.allclose(first, alone, atol=2e-6)  # found: 0 (rounding)


def test_half_precision_touches_the_head_only(generator, caplog):
    """bf16 keeps 8 bits: the head deviates by that, a volume of large values not at all."""
    arithmetics._warn_once.cache_clear()
    small = VOLUME[:16, :16, :16]
    plan = tiles.plan(small.shape, 16, 16)
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        for _ in range(2):
            precision = arithmetics.pick_precision("bf16", torch.device("cpu"))
            out, _ = predict(small, plan, TileNetwork(generator, 1.0, precision=precision))
    assert sum("bf16 is slower than fp32 on a CPU" in r.getMessage() for r in caplog.records) == 1
    reference, _ = predict(small, plan, TileNetwork(generator, 1.0))
    assert 0 < (out - reference).abs().max() < 0.05 * reference.abs().max()  # found: 0.031
    shifted, _ = predict(small + 1000, plan, TileNetwork(identity(), 1.0, precision="bf16"))
    assert torch.equal(shifted[0], small + 1000)


def test_precision_follows_the_device():
    assert arithmetics.pick_precision("auto", torch.device("cpu")) == "fp32"
    assert arithmetics.pick_precision("auto", torch.device("cuda")) == "fp16"
    with pytest.raises(UsageError, match="precision"):
        arithmetics.pick_precision("int8", torch.device("cpu"))


def test_progress_counts_tiles_and_finishes_also_after_an_error(generator):
    class Recorder:
        def __init__(self):
            self.events, self.done = [], 0

        def start(self, label, total, unit):
            self.events.append((label, total, unit))

        def advance(self, n=1, **facts):
            assert facts == {}  # how many a second is known to who counts
            self.done += n

        def finish(self):
            self.events.append("finish")

    recorder = Recorder()
    predict(VOLUME, PLAN, TileNetwork(generator, 1.0, batch=5), progress=recorder, label="a.nii.gz")
    assert recorder.events == [("a.nii.gz", len(PLAN), "tile"), "finish"] and recorder.done == len(PLAN)
    pipe = io.StringIO()
    predict(VOLUME, PLAN, TileNetwork(generator, 1.0, batch=5), progress=PlainProgress(Console(file=pipe, width=200)))
    assert [line.count("/s") for line in pipe.getvalue().splitlines()] == [1], "the rate was told twice"
    with pytest.raises(RuntimeError):
        predict(VOLUME, PLAN, TileNetwork(Cramped(generator, 0, RuntimeError("no")), 1.0), progress=recorder)
    assert recorder.events[-1] == "finish"


def test_the_generator_comes_back_as_it_was(generator):
    generator.train()
    try:
        before = {name: p.clone() for name, p in generator.state_dict().items()}
        predict(VOLUME, PLAN, TileNetwork(generator, 1.0))
        assert generator.training
        assert all(torch.equal(p, before[name]) for name, p in generator.state_dict().items())
        assert all(p.requires_grad for p in generator.parameters())
    finally:
        generator.eval()
