"""torch.compile takes each part of a step whole, with unchanged results; it is off, on or refused as asked.

The backend is aot_eager: tracing, functions of one's own and the joint backward graph as on a GPU, without a compiler.
"""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from golden_steps import CONFIG, batch, double
from torch._dynamo.utils import counters

from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.infer import network as tile_network
from fastsrgan.infer.volume import infer_volume
from fastsrgan.model import compiled as compiled_module
from fastsrgan.model import networks
from fastsrgan.model.compiled import compiled, wanted, whole
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.train.critic_step import critic_gradients
from fastsrgan.train.gan import Models
from fastsrgan.train.objectives import critic_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


SMALL = CONFIG.replace(compile="off", patch_size=16)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(networks, "N_BLOCKS", 1)  # all are alike, and tracing takes its time
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def traced(m: Models) -> Models:
    """Its three functions compiled with a backend that runs everywhere."""
    on = functools.partial(compiled, config=m.config.replace(compile="on"), device=CPU, backend="aot_eager")
    m._fakes, m._generator_terms = on(m._forward), on(m._generator_loss)
    m._critic_terms, m._explicit_terms = on(critic_gradients), on(critic_loss)
    return m


def test_every_part_of_a_step_is_one_graph_with_the_same_result():
    config = SMALL.replace(dice_weight=0.1)
    plain, whole = (double(Models(config, 0, CPU)) for _ in range(2))
    traced(whole)
    for i in range(2):
        drawn = [batch(s, config) for s in (10 * i + 1, 10 * i + 2)]
        rows = [
            (
                m.critic_updates([b for b, _ in drawn], [e for _, e in drawn]),
                m.generator_update(batch(i, config)[0], True),
            )
            for m in (plain, whole)
        ]
        for a, b in zip(*rows, strict=True):
            assert a == pytest.approx(b, rel=1e-9)
    assert not counters["graph_break"]
    # Fakes, critic, generator; the second iteration finds all of them done.
    assert counters["stats"]["unique_graphs"] == 3


def test_the_explicit_penalty_is_one_graph():
    config = SMALL.replace(penalty="explicit")
    plain, whole = (double(Models(config, 0, CPU)) for _ in range(2))
    traced(whole)
    b, eps = batch(1, config)
    fake = b.y.flip(0)
    assert whole.critic_update(b, fake, eps) == pytest.approx(plain.critic_update(b, fake, eps), rel=1e-12)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_half_precision_is_one_graph_too():
    config = SMALL.replace(precision="bf16")
    m = traced(Models(config, 0, CPU))
    b, eps = batch(1, config)
    b.x, b.y, b.res, eps = b.x.float(), b.y.float(), b.res.float(), eps.float()
    assert m.critic_update(b, m.generate(b), eps)["gradient"] > 0
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


# --- the switch ---------------------------------------------------------------------------------------------------


def test_who_is_compiled(monkeypatch):
    def config(how, penalty="auto"):
        return CONFIG.replace(compile=how, penalty=penalty)

    assert not wanted(config("auto"), CUDA) and not wanted(config("auto"), CPU)
    monkeypatch.setattr(compiled_module, "SEEN_RIGHT", {(9, 0)})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert wanted(config("auto"), CUDA) and not wanted(config("auto"), CPU)
    assert wanted(config("on"), CPU) and not wanted(config("off"), CUDA)
    assert not wanted(config("auto", "autograd"), CUDA)
    with pytest.raises(ResourceError, match="double backward cannot be compiled"):
        wanted(config("on", "autograd"), CUDA)

    def function() -> None: ...

    assert compiled(function, config("off"), CUDA) is function
    assert compiled(function, config("auto"), CPU) is function


@pytest.mark.parametrize(
    ("accumulate", "device", "mode"), [(1, CUDA, "reduce-overhead"), (2, CUDA, None), (1, CPU, None)]
)
def test_graphs_are_for_cuda_and_for_gradients_that_do_not_add_up(monkeypatch, accumulate, device, mode):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.update(options) or function)
    compiled(lambda: None, CONFIG.replace(compile="on", accumulate=accumulate), device)
    assert asked == {"fullgraph": True, "dynamic": False, "backend": "inductor", "mode": mode}


def breaks(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x + 1


def test_a_compiler_that_fails_ends_the_run_or_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr("fastsrgan.model.compiled.wanted", lambda config, device: True)
    strict = compiled(breaks, CONFIG.replace(compile="on"), CPU, "eager")
    with pytest.raises(ResourceError, match=r"--compile on: compiling failed: .*--compile off"):
        strict(torch.ones(1))
    loose = compiled(breaks, CONFIG.replace(compile="auto"), CPU, "eager")
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert [float(loose(torch.ones(1))) for _ in range(3)] == [2.0] * 3
    assert caplog.text.count("it runs uncompiled") == 1


# --- tiles ------------------------------------------------------------------------------------------------------------


class Replayed:
    """A compiled function as a CUDA graph gives its results: always in the same memory."""

    def __init__(self, fast) -> None:
        self.fast, self.memory, self.batches = fast, None, []

    def __call__(self, generator, tiles, *more):
        self.batches.append(len(tiles))
        out = self.fast(generator, tiles, *more)
        if self.memory is None or self.memory.shape != out.shape:
            self.memory = torch.empty_like(out)
        return self.memory.copy_(out)


IMAGE = np.random.default_rng(0).random((24, 20, 28), np.float32) * 900
IMAGE[:, :, 16:] = 0  # tiles of one value, too
TILES = {"patch": 16, "step": 8, "device": "cpu", "batch": 4}


@pytest.mark.parametrize(
    ("spec", "more"),
    [
        (GeneratorSpec(kernel=2), {}),
        (GeneratorSpec(kernel=2, scaled=True, mask_classes=2), {"window": "gaussian"}),
        (GeneratorSpec("unet", kernel=2), {"budget": 1e3}),
        (GeneratorSpec(kernel=2, conditional=True), {"flips": "x", "precision_check": True}),
    ],
    ids=("plain", "scaled", "unet-budget", "conditional-flips"),
)
def test_compiled_tiles_are_one_graph_of_one_size_with_the_same_result(monkeypatch, spec, more):
    made = []

    def fast(device, strict):
        made.append(Replayed(whole(tile_network.head, device, strict, "aot_eager")))
        return made[-1]

    monkeypatch.setattr(tile_network, "fast_head", functools.cache(fast))
    generator = build_generator(spec).eval()
    plain = infer_volume(IMAGE, np.eye(4), generator, **TILES, **more)
    done = infer_volume(IMAGE, np.eye(4), generator, **TILES, **more, compile="on")
    assert np.abs(done.sr - plain.sr).max() <= 900 * 2e-5 and np.abs(done.prob - plain.prob).max() <= 2e-5
    assert len(made) == 1 and not counters["graph_break"]
    if "flips" not in more:  # an average calls its members with what it gets
        assert set(made[0].batches) == {4}
        assert counters["stats"]["unique_graphs"] == 1


def test_compile_is_checked_and_stays_off_where_nothing_was_seen_right(monkeypatch):
    monkeypatch.setattr(tile_network, "fast_head", lambda device, strict: pytest.fail("compiled without being asked"))
    infer_volume(IMAGE, np.eye(4), build_generator(GeneratorSpec(kernel=1)), **TILES)
    with pytest.raises(UsageError, match="compile: 'fast'"):
        infer_volume(IMAGE, np.eye(4), build_generator(GeneratorSpec(kernel=1)), **TILES, compile="fast")
