"""The checks of tools/gpu_check.py that concern training: the feed, the step, and its compiled form."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from bench.common import texture
from bench.step_pool import pool
from bench.step_ranks import on_ranks
from fastsrgan.config import TrainConfig
from fastsrgan.core.draws import rng
from fastsrgan.core.kernels import to_device
from fastsrgan.core.ranks import TorchRanks
from fastsrgan.core.system import pick_device
from fastsrgan.data.dali import DaliMover
from fastsrgan.data.pool import Pool
from fastsrgan.data.subject import move_by_thread
from fastsrgan.errors import FastsrganError
from fastsrgan.model import compiled as compiled_forms
from fastsrgan.model.arithmetic import slow_cudnn
from fastsrgan.observation.model import Degradation
from fastsrgan.train import precision
from fastsrgan.train.gan import Models
from tools.gpu_parts import Check, Context, Step

UPDATES = 30
FEED_TOLERANCE = 1e-5  # of the largest intensity: products on a GPU add in another order
# Of the first loss. In float32 a voxel at a ReLU's kink takes either slope, and Adam's first steps have the size of the
# learning rate however small a gradient is: curves part at that rate, not at that of rounding.
CURVE_TOLERANCE = {"fp32": 0.02, "bf16": 0.1, "fp16": 0.1}


def step(c: Context) -> Iterator[Check | Step]:
    """The default step against the oracle (plain layers, double backward), bf16 first: what "auto" trains in."""
    names = ("bf16", "fp32", "fp16") if c.cuda else ("fp32",)
    release = torch.backends.cudnn.version() if c.cuda else None
    slow = slow_cudnn(release) or ("" if c.cuda else "not run: no CUDA device")
    yield Check("cuDNN release", not slow if c.cuda else None, {"reason": slow} if slow else {"release": release})
    for name in names:
        yield Step(f"self-test {name}", functools.partial(_self_test, c, name))
    oracle: list[np.ndarray] = []

    def make_oracle() -> Check:
        plain = {"form": "reference", "penalty": "autograd", "joint_fakes": False, "precision": "fp32"}
        curve, facts = _curve(c, _config(c, compile="off", **plain))
        oracle.append(curve)
        return Check("oracle", bool(np.isfinite(curve).all()), facts)

    def losses(name: str) -> Check:
        curve, facts = _curve(c, _config(c, precision=name, compile="off"))
        check = f"losses {name}"
        if not oracle:
            return Check(check, None, {"reason": "not run: there is no oracle to compare with", **facts})
        error = _apart(curve, oracle[0])
        return Check(check, error <= CURVE_TOLERANCE[name], {"error": error, **facts})

    yield Step("oracle", make_oracle)
    for name in names:
        yield Step(f"losses {name}", functools.partial(losses, name))
    if c.cuda:
        yield Step("layouts", functools.partial(_layouts, c))
    else:
        yield Check("layouts", None, {"reason": "not run: no CUDA device"})


def _self_test(c: Context, name: str) -> Check:
    """Also with TF32 on in torch's defaults, as a user's session may have it: the test is of the run's own arithmetic.

    What the test refuses is a finding, not something that was not run.
    """
    try:
        found = precision.self_test(precision.choose(_config(c, precision=name), c.device))
    except FastsrganError as error:
        return Check(f"self-test {name}", False, {"reason": str(error)})
    return Check(f"self-test {name}", True, dict(found))


def _layouts(c: Context) -> Check:
    """Kernels that only turn activations from one layout into the other, in a step of the generator and the critic."""
    models, patches = _trainer(c, _config(c, compile="off"))
    _iterate(models, patches, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _iterate(models, patches, 1)
        c.sync()
    rows = [(e.key, e.count, e.self_device_time_total / 1e3) for e in profile.key_averages()]
    turned = [(n, t) for key, n, t in rows if "nchwToNhwc" in key or "nhwcToNchw" in key]
    total = sum(t for *_, t in rows)
    facts = {"turned": sum(n for n, _ in turned), "ms": sum(t for _, t in turned), "all_ms": total}
    longest = sorted(((key, t) for key, _, t in rows), key=lambda row: -row[1])[:40]
    return Check("no layout is turned", not turned, facts | {"kernels": dict(longest)})


def compile_(c: Context) -> Iterator[Check | Step]:
    """torch.compile and CUDA graphs against the eager step, with proof that graphs ran."""
    if not c.cuda:
        yield Check("compile", None, {"reason": "not run: no CUDA device; tests/test_compiled.py traces it on a CPU"})
        return

    def compiled(name: str) -> Check:
        eager, slow = _curve(c, _config(c, precision=name, compile="off"))
        torch._dynamo.utils.counters.clear()
        curve, fast = _curve(c, _config(c, precision=name, compile="on"))
        counted = dict(torch._dynamo.utils.counters["inductor"])
        models, patches = _trainer(c, _config(c, precision=name, compile="on"))
        for update in range(4):
            _iterate(models, patches, update)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            _iterate(models, patches, 5)
            c.sync()
        launches = sum(e.count for e in profile.key_averages() if "GraphLaunch" in e.key)
        error = _apart(curve, eager)
        facts = {"error": error, "cudagraph_skips": counted.get("cudagraph_skips", 0), "graph launches": launches}
        facts |= {"eager": slow, "compiled": fast, "counters": {k: v for k, v in counted.items() if "graph" in k}}
        passed = error <= CURVE_TOLERANCE[name] and not facts["cudagraph_skips"] and launches > 0
        return Check(f"compiled {name}", passed, facts)

    for name in ("bf16", "fp32"):
        yield Step(f"compiled {name}", functools.partial(compiled, name))
    yield Step("nine shapes", functools.partial(_nine_shapes, c))


def _nine_shapes(c: Context) -> Check:
    """More shapes than torch compiles for a function: the rest runs uncompiled, and the job goes on."""

    def square(x: torch.Tensor) -> torch.Tensor:
        return x * x + 1

    fast = compiled_forms.whole(square, c.device, strict=False)
    some = [torch.rand(n + 3, device=c.device) for n in range(9)]
    same = all(torch.equal(fast(x).clone(), square(x)) for x in some)
    return Check("nine shapes of a compiled function", same, {"shapes": len(some)})


def waits(c: Context) -> Iterator[Check | Step]:
    """An iteration under torch's own alarm for calls that make the host wait for the device."""
    if not c.cuda:
        yield Check("waits", None, {"reason": "not run: no CUDA device; tests/test_gpu_waits.py counts on a stand-in"})
        return

    def iteration() -> Check:
        models, patches = _trainer(c, _config(c, compile="off"))
        _iterate(models, patches, 0)
        c.sync()
        torch.cuda.set_sync_debug_mode("error")
        try:
            began = time.perf_counter()
            means = [_iterate(models, patches, update) for update in range(1, 4)]
            queued = time.perf_counter() - began
        finally:
            torch.cuda.set_sync_debug_mode("default")
        finite = all(np.isfinite(v) for pair in means for m in pair for v in m.values())
        c.sync()
        facts = {"queued_ms": 1e3 * queued / 3, "ms": 1e3 * (time.perf_counter() - began) / 3}
        return Check("nothing in an iteration waits", finite, facts)

    yield Step("nothing in an iteration waits", iteration)
    settings = {"benchmark": torch.backends.cudnn.benchmark, "current device": torch.cuda.current_device()}
    right = settings["benchmark"] and settings["current device"] == c.device.index
    yield Check("cudnn.benchmark is set, the device is the current one", bool(right), settings)


def feed(c: Context) -> Iterator[Check | Step]:
    """Volumes through each mover on the device against the same law called on the CPU, and how many a second."""
    image = texture((61, 47, 55))
    label = (image > 0.5).astype(np.uint8)
    extra = {"rician": True, "profile": 0.2, "artefacts": {"bias_field": 0.3}}
    laws = {
        "plain": Degradation(((1.0, 1.0, 3.2),), contrast=0.3, noise=0.02),
        "with extras": Degradation(((1.0, 1.0, 2.7),), contrast=0.3, noise=0.02, **extra),  # type: ignore[arg-type]
    }
    movers: dict[str, Callable[[], Any]] = {
        "threads": lambda: functools.partial(move_by_thread, device=c.device),
        "DALI": lambda: DaliMover(c.device, 2),
    }

    def same(engine: str, name: str, epoch: int) -> Check:
        law = laws[name]
        draw = law.draw(0, epoch, "texture")
        apply = functools.partial(law.apply, spacing_mm=(1.0, 1.0, 1.0), draw=draw, low_res_mm=draw.low_res)
        expected = apply(image)
        got = movers[engine]()(image, label, None, apply)
        c.sync()
        pairs = zip(got[:2], (expected.interpolated, expected.hr), strict=True)
        errors = [float(np.abs(g.float().cpu().numpy() - e).max() / e.max()) for g, e in pairs]
        where = all(t.device.type == c.device.type for t in got[:3])
        labels = torch.equal(got[2].cpu(), torch.from_numpy(label))
        facts = {"error": max(errors), "on the device": where, "label": labels}
        passed = max(errors) <= FEED_TOLERANCE and where and labels
        return Check(f"{engine} {name}, epoch {epoch}", passed, facts)

    def speed(engine: str) -> Check:
        law, large = laws["plain"], texture((160, 192, 160) if c.cuda else (48, 52, 40))
        inside = (large > 0.5).astype(np.uint8)
        move = movers[engine]()

        def one(epoch: int) -> None:
            draw = law.draw(0, epoch, "texture")
            apply = functools.partial(law.apply, spacing_mm=(1.0, 1.0, 1.0), draw=draw, low_res_mm=draw.low_res)
            with torch.cuda.stream(torch.cuda.Stream(c.device)) if c.cuda else contextlib.nullcontext():
                move(large, inside, None, apply)
                c.sync()

        with ThreadPoolExecutor(4) as crew:
            list(crew.map(one, range(4)))
            began = time.perf_counter()
            list(crew.map(one, range(4, 16)))
        return Check(f"{engine}, volumes a second", True, {"volumes/s": 12 / (time.perf_counter() - began)})

    for engine in movers:
        for name in laws:
            yield Step(f"{engine} {name}", functools.partial(same, engine, name, 1))
        yield Step(f"{engine}, volumes a second", functools.partial(speed, engine))


def ranks(c: Context) -> Iterator[Check | Step]:
    """Two processes on one device by gloo, each with patches of its own: the same weights to the bit afterwards.

    Compiled, gradients are under way while the graph of the next fakes runs: losses are those of the plain step.
    """
    plain: list[list[float]] = []

    def two(compile: str) -> Check:
        said = on_ranks([sys.executable, "-m", "tools.gpu_training", str(c.device), compile], 2, 1)
        rows = [json.loads(out.splitlines()[-1]) for out in said]
        same = rows[0]["weights"] == rows[1]["weights"] and rows[0]["patches"] != rows[1]["patches"]
        facts = {"iteration_ms": rows[0]["ms"], "device": rows[1]["device"]}
        if compile == "on":
            name = "two ranks, compiled"
            if not plain:
                return Check(name, None, {"reason": "not run: there are no plain losses to compare with", **facts})
            facts["error"] = _apart(np.array(rows[0]["patches"])[:, None], np.array(plain[0])[:, None])
            return Check(name, same and facts["error"] <= CURVE_TOLERANCE["fp32"], facts)
        plain.append(rows[0]["patches"])
        return Check("two ranks, the same weights", same, facts)

    yield Step("two ranks", functools.partial(two, "off"))
    if c.cuda:
        yield Step("two ranks, compiled", functools.partial(two, "on"))
    else:
        yield Check("two ranks, compiled", None, {"reason": "not run: no CUDA device"})


def one_rank(name: str, compile: str) -> dict[str, Any]:
    """What a process of ``ranks`` does: three iterations, then a hash of all weights."""
    device = pick_device(name)
    c = Context(device, 0.0)
    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with TorchRanks(number, world, world, device, backend="gloo") as both:
        config = _config(c, compile=compile, precision="fp32")
        models, patches = Models(config, 0, device, both), pool(config.patch_size, config.batch_size, str(device))
        times, read = [], []
        for update in range(3):
            began = time.perf_counter()
            read.append(dict(_iterate(models, patches, 100 * update + number)[1]))
            times.append(time.perf_counter() - began)
        digest = hashlib.sha256()
        for network in (models.generator, models.critic):
            for parameter in network.parameters():
                digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    told = {"weights": digest.hexdigest(), "patches": [r["reconstruction"] for r in read], "device": str(device)}
    return told | {"ms": 1e3 * min(times)}


def _config(c: Context, **changes: Any) -> TrainConfig:
    small = {"kernel_gen": 4, "kernel_dis": 4, "batch_size": 2, "patch_size": 16, "critic_iterations": 2}
    large = {"kernel_gen": 16, "kernel_dis": 32, "batch_size": 8, "patch_size": 64}
    return TrainConfig(new_low_res=((1.0, 1.0, 3.0),), **{**(large if c.cuda else small), **changes})


def _trainer(c: Context, config: TrainConfig) -> tuple[Models, Pool]:
    return Models(config, 0, c.device), pool(config.patch_size, config.batch_size, str(c.device))


def _iterate(models: Models, patches: Pool, update: int) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """An iteration as the loop queues it; what it gives is read when the caller looks."""
    config = models.config
    drawn = patches.critic_indices(update, config.batch_size, config.critic_iterations)
    batches = [patches.gather(i) for i in drawn]
    shape = (len(batches), *batches[0].y.shape[:2])
    eps = to_device(rng(update, "eps").random(shape, dtype=np.float32), models.device)
    critic = models.critic_updates(batches, list(eps))
    return critic, models.generator_update(patches.gather(drawn[0]), adversarial=True)


def _curve(c: Context, config: TrainConfig) -> tuple[np.ndarray, dict[str, Any]]:
    """Losses (updates, 3): reconstruction, Wasserstein, penalty; milliseconds of an iteration and peak memory."""
    models, patches = _trainer(c, config)
    rows, times = [], []
    if c.cuda:
        torch.cuda.reset_peak_memory_stats(c.device)
    for update in range(UPDATES if c.cuda else 5):
        began = time.perf_counter()
        critic, generator = _iterate(models, patches, update)
        rows.append([generator["reconstruction"], critic["wasserstein"], critic["penalty"]])
        times.append(time.perf_counter() - began)
    facts: dict[str, Any] = {"updates": len(rows), "iteration_ms": 1e3 * float(np.median(times[len(times) // 2 :]))}
    if c.cuda:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(c.device)
    return np.array(rows), facts


def _apart(curve: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of each loss over its largest value in the other curve; infinite where it is not finite."""
    if not np.isfinite(curve).all():
        return float("inf")
    return float((np.abs(curve - other).max(0) / np.abs(other).max(0)).max())


if __name__ == "__main__":
    print(json.dumps(one_rank(*sys.argv[1:])))
