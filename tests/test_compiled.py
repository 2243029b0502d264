"""torch.compile takes each part of a step whole, with unchanged results; it is off, on or refused as asked.

The backend is aot_eager: tracing, functions of one's own and the joint backward graph as on a GPU, without a compiler.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from golden_steps import CONFIG, batch, double
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.infer import network as tile_network
from fastsrgan.infer.volume import infer_volume
from fastsrgan.model import compiled as jobs
from fastsrgan.model import networks
from fastsrgan.model.compiled import INDUCTOR, MOST, CompiledJob, whole
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.train import precision
from fastsrgan.train.critic_step import critic_gradients
from fastsrgan.train.gan import Models, compiled, wanted
from fastsrgan.train.objectives import critic_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


SMALL = CONFIG.replace(compile="off", patch_size=16)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(networks, "N_BLOCKS", 1)  # all are alike, and tracing takes its time
    monkeypatch.setattr(precision, "_expected", precision._expected.__wrapped__)  # of this network, and not kept
    tile_network._sizes.clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def traced(m: Models) -> Models:
    """Its three functions compiled with a backend that runs everywhere."""
    on = functools.partial(compiled, config=m.config.replace(compile="on"), device=CPU, backend="aot_eager")
    m._fakes, m._generator_terms = on(m._forward), on(m._generator_loss)
    m._critic_terms, m._explicit_terms = on(critic_gradients), on(critic_loss)
    m.static = True
    return m


def test_the_explicit_penalty_is_one_graph():
    config = SMALL.replace(penalty="explicit")
    plain, whole = (double(Models(config, 0, CPU)) for _ in range(2))
    traced(whole)
    b, eps = batch(1, config)
    fake = b.y.flip(0)
    # Found: 0
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


def test_who_is_compiled():
    def config(how, penalty="auto"):
        return CONFIG.replace(compile=how, penalty=penalty)

    assert wanted(config("auto"), CUDA) and not wanted(config("auto"), CPU)
    assert wanted(config("on"), CPU) and not wanted(config("off"), CUDA)
    assert not wanted(config("auto", "autograd"), CUDA)
    with pytest.raises(ResourceError, match="double backward cannot be compiled"):
        wanted(config("on", "autograd"), CUDA)

    def function() -> None: ...

    assert compiled(function, config("off"), CUDA) is function
    assert compiled(function, config("auto"), CPU) is function


@pytest.mark.parametrize(
    ("accumulate", "device", "options"),
    [(1, CUDA, INDUCTOR | {"triton.cudagraphs": True}), (2, CUDA, INDUCTOR), (1, CPU, None)],
)
def test_graphs_are_for_cuda_and_for_gradients_that_do_not_add_up(monkeypatch, accumulate, device, options):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.update(options) or function)
    compiled(lambda: None, CONFIG.replace(compile="on", accumulate=accumulate), device)
    assert asked == {"fullgraph": True, "dynamic": False, "backend": "inductor", "options": options}
    known = torch._inductor.config.get_config_copy()
    assert all(name in known for name in options or ()), "torch refuses names that it does not know"


def told(caplog) -> int:
    """Lines of ours; torch logs its own."""
    return sum(record.name == "fastsrgan" for record in caplog.records)


def breaks(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x + 1


def test_a_compiler_that_fails_ends_the_run_or_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr("fastsrgan.train.gan.wanted", lambda config, device: True)
    strict = compiled(breaks, CONFIG.replace(compile="on"), CPU, "eager")
    with pytest.raises(ResourceError, match=r"--compile on: compiling failed: .*--compile off"):
        strict(torch.ones(1))
    loose = compiled(breaks, CONFIG.replace(compile="auto"), CPU, "eager")
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert [float(loose(torch.ones(1))) for _ in range(3)] == [2.0] * 3
    assert caplog.text.count("it runs uncompiled") == 1


def test_further_shapes_than_are_compiled_for_run_as_they_are(caplog):
    """Instead of the error of torch's limit on recompilation, which ends a run."""
    fast = whole(lambda x, more: x * 2 + more, CPU, strict=True, backend="eager")
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        for n in (*range(2, 14), *range(2, 14)):
            assert torch.equal(fast(torch.ones(n), 1.0), torch.full((n,), 3.0))
    assert counters["stats"]["unique_graphs"] == MOST
    assert caplog.text.count("what differs runs uncompiled") == 1


def test_what_is_compiled_anew_is_of_another_kind():
    """All that torch would compile anew for: what a call is counted by has to tell it apart."""
    x = torch.zeros(2, 4, 6)
    plain = [x, torch.zeros(2, 4, 5), x.double(), x.mT.contiguous().mT, torch.zeros(2, 4, 6, requires_grad=True)]
    plain += [[x, x], {"a": x}, {"b": x}, 1, 1.5, 2, None, True, "1", build_generator(GeneratorSpec(kernel=1))]
    plain += [build_generator(GeneratorSpec(kernel=2)), build_generator(GeneratorSpec(kernel=1)).double()]
    kinds = [repr(jobs._kind(value)) for value in plain]
    assert len(set(kinds)) == len(kinds) and repr(jobs._kind(x + 1)) == kinds[0]
    contexts = [contextlib.nullcontext, torch.no_grad, torch.inference_mode]
    contexts += [functools.partial(torch.autocast, "cpu", dtype) for dtype in (torch.bfloat16, torch.float16)]
    modes = []
    for context in contexts:
        with context():
            modes.append(jobs._modes())
    assert len(set(modes)) == len(modes)


def test_functions_of_a_job_share_its_compilations():
    """Networks count by what they are made of; a job that is not given is a function's own."""
    job = CompiledJob()
    first, second = (
        whole(f, CPU, True, "eager", job=job) for f in (lambda x: x + 1, lambda net, x: x * 2 + 0 * net.head.sum())
    )
    first(torch.ones(2)), first(torch.ones(3))
    for kernel, seed in ((1, 0), (1, 1), (2, 0)):
        second(build_generator(GeneratorSpec(kernel=kernel), seed=seed), torch.ones(2))
    assert len(job.kinds) == counters["stats"]["unique_graphs"] == MOST
    assert second(build_generator(GeneratorSpec(kernel=3)), torch.ones(2)).tolist() == [2, 2]
    assert first(torch.ones(4)).tolist() == [2] * 4 and len(job.kinds) == MOST
    assert whole(lambda x: x - 1, CPU, True, "eager")(torch.ones(2)).tolist() == [0, 0]
    assert counters["stats"]["unique_graphs"] == MOST + 1


class Counted:
    """In place of torch.compile: functions run as they are; what it would compile anew is counted, over all of them."""

    def __init__(self, monkeypatch) -> None:
        self.kinds, self.calls = set(), 0
        monkeypatch.setattr(torch, "compile", self.compile)

    def compile(self, function, **options):
        def fast(*args, **more):
            self.calls += 1
            self.kinds.add((function.__name__, self.what(args), self.what(tuple(sorted(more.items())))))
            return function(*args, **more)

        return fast

    def what(self, value):
        if isinstance(value, torch.nn.Module):
            return tuple(p.shape for p in value.parameters())
        if isinstance(value, torch.Tensor):
            return value.shape, value.stride(), value.dtype, value.requires_grad
        return tuple(map(self.what, value)) if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("more", [{}, {"penalty_every": 2}, {"accumulate": 2}, {"joint_fakes": False}], ids=str)
def test_a_training_compiles_four_times_at_most(monkeypatch, caplog, more):
    """Warm-up, critic updates with and without penalty, a pool's uneven batches; only the warm-up may go without."""
    counted = Counted(monkeypatch)
    config = SMALL.replace(batch_size=6, lambda_adv=1e-3, **more)
    plain, m = (double(Models(config.replace(compile=how), 0, CPU)) for how in ("off", "on"))
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        for i, n in enumerate((6, 5, 4)):
            made = batch(i, config.replace(batch_size=n))[0]
            # Found: 1.2e-16
            assert m.generator_update(made, False) == pytest.approx(plain.generator_update(made, False), rel=1e-12)
        warm = counted.calls
        for i, n in enumerate((6, 5, 4)):
            drawn = [batch(10 * i + j, config) for j in range(3)]
            m.critic_updates([b for b, _ in drawn], [e for _, e in drawn])
            m.generator_update(batch(i, config.replace(batch_size=n))[0], True)
    assert 3 <= len(counted.kinds) <= MOST and "uncompiled" not in caplog.text
    parts = config.accumulate
    assert warm == (0 if "penalty_every" in more else 3 * parts)
    assert counted.calls - warm > 3 * (3 + 1) * parts, "all critic and generator updates, and their fakes"


@pytest.mark.parametrize("error", [torch._dynamo.exc.FailOnRecompileLimitHit("8 reached"), ValueError("in a pass"),
                                   RuntimeError("nvcc\nline 2"), ImportError("triton")], ids=repr)  # fmt: skip
def test_any_failure_of_the_compiler_falls_back(caplog, error):
    def fails(gm, inputs):
        raise error

    loose = whole(lambda x: x + 1, CPU, strict=False, backend=fails)
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert [float(loose(torch.ones(1))) for _ in range(3)] == [2.0] * 3
    assert caplog.text.count("it runs uncompiled") == 1 and told(caplog) == 1 and "line 2" not in caplog.text
    with pytest.raises(ResourceError, match="compiling failed"):
        whole(lambda x: x + 2, CPU, strict=True, backend=fails)(torch.ones(1))


def test_the_recompile_limit_itself_falls_back(caplog):
    """One that torch raises after calls that went well."""
    guarded = whole(lambda x: x + 1, CPU, strict=False, backend="eager")
    assert float(guarded(torch.ones(1))) == 2

    def fails(x):
        raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile_limit reached")

    guarded.fast = fails
    assert float(guarded(torch.ones(1))) == 2 and "it runs uncompiled" in caplog.text


def test_memory_and_the_functions_own_errors_are_not_the_compilers():
    def full(gm, inputs):
        return lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))

    with pytest.raises(torch.OutOfMemoryError):
        whole(lambda x: x + 1, CPU, strict=False, backend=full)(torch.ones(1))
    guarded = whole(lambda x: x.view(7), CPU, strict=False, backend="eager")
    with pytest.raises(RuntimeError, match="shape"):
        guarded(torch.ones(3))


def test_a_backward_pass_that_cannot_be_compiled_is_found_in_the_forward_call(caplog):
    def fails(gm, inputs):
        raise RuntimeError("no backward")

    backend = aot_autograd(fw_compiler=lambda gm, inputs: make_boxed_func(gm.forward), bw_compiler=fails)
    loose = whole(lambda x: (x * x).sum(), CPU, strict=False, backend=backend)
    x = torch.full((3,), 2.0, requires_grad=True)
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        loose(x).backward()
    assert x.grad.tolist() == [4.0] * 3 and "no backward" in caplog.text


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_part_of_a_step_is_one_graph_with_the_same_result(accumulate):
    """Of all sizes that a pool of 16 patches gives in steps of at most 6, and groups of other sizes.

    A Dice term is one of each micro-batch, which are not cut alike: where there are several, it is left out.
    """
    dice = 0.1 if accumulate == 1 else 0.0
    config = SMALL.replace(batch_size=6, accumulate=accumulate, dice_weight=dice, generator_chunk=4)
    plain, static = (double(Models(config, 0, CPU)) for _ in range(2))
    traced(static)
    for i, n in enumerate((6, 5, 4, 2)):
        made = [batch(i, config.replace(batch_size=n))[0] for _ in range(2)]
        critic = [list(given) for given in zip(*(batch(10 * j + i, config) for j in (1, 2)), strict=True)]
        rows = [
            (m.critic_updates(*critic), m.generator_update(b, True)) for m, b in zip((plain, static), made, strict=True)
        ]
        for a, b in zip(*rows, strict=True):
            assert a == pytest.approx(b, rel=1e-10)  # found: 1.1e-12
    for a, b in zip(plain.generator.parameters(), static.generator.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-10  # found: 3.8e-12, of Adam's first steps
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3 <= MOST, "fakes, critic, generator: later iterations find them done"


def test_training_compiles_on_cuda_after_the_compiled_self_test(monkeypatch, caplog):
    """The device is this one; what is asked of it is what a CUDA device is asked."""
    asked, failing = [], False

    def self_test(arithmetic, compiled=False):
        asked.append(compiled)
        if compiled and failing:
            raise ResourceError("card", "generator gradients are off by 1\nmore", "--compile off")

    class Stop(Exception): ...

    def stopped(function, config, device, job):
        asked.append(config.compile)
        raise Stop

    monkeypatch.setattr(precision, "self_test", self_test)
    monkeypatch.setattr("fastsrgan.train.gan.compiled", stopped)
    monkeypatch.setattr(precision, "choose", lambda config, device, *kept: precision.Arithmetic(CUDA, torch.bfloat16))
    for fails, setting, wanted_setting in ((False, "auto", "auto"), (True, "auto", "off"), (False, "on", "on")):
        asked.clear()
        failing = fails
        with pytest.raises(Stop), caplog.at_level(logging.WARNING, "fastsrgan"):
            Models(SMALL.replace(compile=setting), 0, CUDA)
        assert asked == [False, True, wanted_setting]
    assert caplog.text.count("everything runs uncompiled") == 1 and told(caplog) == 1
    failing = True
    with pytest.raises(ResourceError, match="off by 1"):
        Models(SMALL.replace(compile="on"), 0, CUDA)


def test_the_compiled_self_test_measures_what_was_compiled(monkeypatch, caplog):
    """A step and a pass by a compiler that is right, and by one that is wrong."""

    def right(function, device, strict, backend="aot_eager", graphs=True):
        return whole(function, device, strict, "aot_eager")

    def wrong(function, device, strict, backend=None, graphs=True):
        def other(*args, **options):
            out = function(*args, **options)
            return (out[0], [g.flip(0) for g in out[1]]) if isinstance(out, tuple) else out * 1.5

        return other

    arithmetic = precision.Arithmetic(CPU, torch.bfloat16)
    monkeypatch.setattr(precision, "whole", right)
    off = precision.self_test.__wrapped__(arithmetic, compiled=True)
    assert all(0 < off[n] <= precision.NETWORK_LIMITS[n][torch.bfloat16] for n in ("generator", "critic"))
    monkeypatch.setattr(precision, "whole", wrong)
    with pytest.raises(ResourceError, match="gradients are off by"):
        precision.self_test.__wrapped__(arithmetic, compiled=True)

    monkeypatch.setattr(tile_network.compiled, "whole", right)
    assert tile_network.compiled_test.__wrapped__(CPU, torch.bfloat16, False)
    monkeypatch.setattr(tile_network.compiled, "whole", wrong)
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert not tile_network.compiled_test.__wrapped__(CPU, torch.bfloat16, False)
    assert "a compiled pass is off by" in caplog.text and told(caplog) == 1
    with pytest.raises(ResourceError, match="a compiled pass is off by"):
        tile_network.compiled_test.__wrapped__(CPU, torch.bfloat16, True)


# --- tiles ------------------------------------------------------------------------------------------------------------


class Replayed:
    """A compiled function as a CUDA graph gives its results: always in the same memory."""

    def __init__(self, fast) -> None:
        self.fast, self.memory, self.batches, self.more, self.strides = fast, None, [], [], []

    def __call__(self, generator, tiles, *more):
        self.batches.append(len(tiles))
        self.strides.append((tiles.stride(), id(generator)))
        self.more += more
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
    monkeypatch.setattr(tile_network, "native", lambda name: name != "fp16")  # checked: what some processors have
    generator = build_generator(spec).eval()
    plain = infer_volume(IMAGE, np.eye(4), generator, **TILES, **more)
    done = infer_volume(IMAGE, np.eye(4), generator, **TILES, **more, compile="on")
    # Found: 3.8e-6 of the 900, 1.5e-6
    assert np.abs(done.sr - plain.sr).max() <= 900 * 2e-5 and np.abs(done.prob - plain.prob).max() <= 2e-5
    assert len(made) == 1 and not counters["graph_break"]
    assert set(made[0].batches) == {4}
    assert counters["stats"]["unique_graphs"] == (1 if "flips" not in more else len(set(made[0].strides)))


def test_tiles_that_wait_are_not_written_over(monkeypatch):
    """Volumes of several shapes, tiles of several constant values between those that wait, one memory for results."""
    made = []

    def fast(device, strict):
        made.append(Replayed(tile_network.head))
        return made[-1]

    monkeypatch.setattr(tile_network, "fast_head", functools.cache(fast))
    generator = build_generator(GeneratorSpec(kernel=2)).eval()
    draw = np.random.default_rng(1)
    for shape, patch in (((24, 20, 44), 8), ((20, 24, 40), 12), ((44, 20, 24), 8)):
        image = draw.random(shape, np.float32) * 900
        for n, at in enumerate(range(patch, shape[2] - patch, 2 * patch)):  # tiles of one value, others between
            image[:, :, at : at + patch] = 100 * (n + 1)
        options = {"patch": patch, "step": patch, "device": "cpu", "batch": 3}
        plain = infer_volume(image, np.eye(4), generator, **options)
        done = infer_volume(image, np.eye(4), generator, **options, compile="on")
        # Found: 0
        assert np.abs(done.sr - plain.sr).max() <= 900 * 1e-6 and np.abs(done.prob - plain.prob).max() <= 1e-6
    assert set(made[0].batches) == {3}


def test_a_cohort_keeps_the_batch_of_its_first_volume(monkeypatch):
    """The automatic batch follows free memory, which differs from volume to volume."""
    made = []

    def fast(device, strict):
        made.append(Replayed(tile_network.head))
        return made[-1]

    monkeypatch.setattr(tile_network, "fast_head", functools.cache(fast))
    right, sizes = tile_network.TileNetwork._wanted, itertools.cycle([4, 7, 2])
    monkeypatch.setattr(
        tile_network.TileNetwork,
        "_wanted",
        lambda self, batch, plan: next(sizes) if batch == "auto" else right(self, batch, plan),
    )
    generator = build_generator(GeneratorSpec(kernel=1, conditional=True)).eval()
    for spacing in (1.0, 2.0, 3.0):
        infer_volume(IMAGE, np.diag([1, 1, spacing, 1]), generator, **{**TILES, "batch": "auto"}, compile="on")
    assert set(made[0].batches) == {4} and len(made[0].more) >= 2
    assert all(isinstance(mm, torch.Tensor) for mm in made[0].more), "a number would be compiled in"


def test_volumes_of_many_sizes_compile_four_times_at_most(monkeypatch, caplog):
    """As on CUDA: axes shorter than a tile are mirrored up to few sizes. What is beyond four runs as it is."""
    counted = Counted(monkeypatch)
    monkeypatch.setattr(tile_network, "fast_head", functools.cache(tile_network.fast_head.__wrapped__))
    monkeypatch.setitem(tile_network.MULTIPLES, "cpu", tile_network.MULTIPLES["cuda"])
    draw = np.random.default_rng(3)
    options = {"patch": 40, "step": 40, "device": "cpu", "batch": 1}
    networks = [build_generator(GeneratorSpec(kernel=k)).eval() for k in (1, 2)]

    def done(network, shape) -> list[int]:
        image = draw.random(shape, np.float32) * 900
        result = infer_volume(image, np.eye(4), network, **options, compile="on")
        assert result.sr.shape == shape and np.isfinite(result.sr).all()
        return result.report["tile"]

    with caplog.at_level(logging.WARNING, "fastsrgan"):
        shapes = [(9, 12, 13), (14, 17, 18), (21, 22, 25), (26, 29, 30), (24, 32, 11)]
        assert all(done(networks[0], shape) == [32, 32, 32] for shape in shapes)
        assert counted.calls == len(shapes) and len(counted.kinds) == 1
        assert done(networks[0], (33, 20, 41)) == [40, 32, 40]  # no larger than the patch that was asked for
        done(networks[1], (20, 20, 20)), done(networks[1], (34, 20, 20))
        assert len(counted.kinds) == MOST and "uncompiled" not in caplog.text
        done(networks[1], (20, 34, 20))
    assert len(counted.kinds) == MOST and caplog.text.count("what differs runs uncompiled") == 1


def test_tiles_on_a_cpu_are_of_the_sizes_that_they_were(monkeypatch):
    """Compiled or not."""
    Counted(monkeypatch)
    network = build_generator(GeneratorSpec(kernel=1)).eval()
    for compile in ("off", "on"):
        assert infer_volume(IMAGE, np.eye(4), network, **{**TILES, "patch": 40}, compile=compile).report["tile"] == [
            24,
            20,
            28,
        ]


def test_compile_is_checked_and_stays_off_on_a_cpu(monkeypatch):
    monkeypatch.setattr(tile_network, "fast_head", lambda device, strict: pytest.fail("compiled without being asked"))
    infer_volume(IMAGE, np.eye(4), build_generator(GeneratorSpec(kernel=1)), **TILES)
    with pytest.raises(UsageError, match="compile: 'fast'"):
        infer_volume(IMAGE, np.eye(4), build_generator(GeneratorSpec(kernel=1)), **TILES, compile="fast")


def test_a_lack_of_memory_in_a_self_test_is_no_reason_to_go_on_uncompiled(caplog):
    def fails(error):
        def test():
            raise error

        return test

    assert jobs.proven(lambda: None, strict=True)
    assert not jobs.proven(fails(ValueError("wrong")), strict=False) and "self-test failed" in caplog.text
    for error, strict in ((ValueError("wrong"), True), (torch.OutOfMemoryError("CUDA out of memory."), False)):
        with pytest.raises(type(error)):
            jobs.proven(fails(error), strict)
