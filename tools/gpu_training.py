"""The checks of tools/gpu_check.py that concern training: the feed, the step, and its compiled form."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.common import texture
from bench.step_pool import pool
from fastsrgan.config import TrainConfig
from fastsrgan.data.dali import DaliMover
from fastsrgan.data.pool import Batch
from fastsrgan.errors import FastsrganError
from fastsrgan.observation.model import Degradation
from fastsrgan.train import precision
from fastsrgan.train.gan import Models
from tools.gpu_parts import Check, Context

UPDATES = 30
FEED_TOLERANCE = 1e-5  # of the largest intensity: products on a GPU add in another order
# Of the first loss. In float32 a voxel at a ReLU's kink takes either slope, and Adam's first steps have the size of the
# learning rate however small a gradient is: curves part at that rate, not at that of rounding.
CURVE_TOLERANCE = {"fp32": 0.02, "bf16": 0.1, "fp16": 0.1}


def feed(c: Context) -> Iterator[Check]:
    """Volumes that come through DALI's pipeline on the device against the same law called on the CPU."""
    image = texture((61, 47, 55))
    label = (image > 0.5).astype(np.uint8)
    plain = Degradation(((1.0, 1.0, 3.2),), contrast=0.3, noise=0.02)
    extras = Degradation(
        ((1.0, 1.0, 2.7),), contrast=0.3, noise=0.02, rician=True, profile=0.2, artefacts={"bias_field": 0.3}
    )
    try:
        move = DaliMover(c.device)
    except FastsrganError as error:
        yield Check("DALI", None, {"reason": str(error)})
        return
    for name, law in (("plain", plain), ("with extras", extras)):
        for epoch in (1, 2):
            draw = law.draw(0, epoch, "texture")
            apply = functools.partial(law.apply, spacing_mm=(1.0, 1.0, 1.0), draw=draw, low_res_mm=draw.low_res)
            expected = apply(image)
            got = move(image, label, None, apply)
            c.sync()
            pairs = zip(got[:2], (expected.interpolated, expected.hr), strict=True)
            errors = [float(np.abs(g.float().cpu().numpy() - e).max() / e.max()) for g, e in pairs]
            where = all(t.device.type == c.device.type for t in got[:3])
            same = torch.equal(got[2].cpu(), torch.from_numpy(label))
            facts = {"error": max(errors), "on the device": where, "label": same}
            yield Check(f"DALI {name}, epoch {epoch}", max(errors) <= FEED_TOLERANCE and where and same, facts)


def step(c: Context) -> Iterator[Check]:
    """The default step against the oracle (plain layers, double backward), in every arithmetic of the device."""
    for name in ("fp32", "bf16", "fp16") if c.cuda else ("fp32",):
        try:
            found = precision.self_test(precision.choose(_config(c, precision=name), c.device))
        except FastsrganError as error:
            yield Check(f"self-test {name}", False, {"reason": str(error)})
            continue
        yield Check(f"self-test {name}", True, dict(found))
    oracle, facts = _curve(c, _config(c, form="reference", penalty="autograd", joint_fakes=False, precision="fp32"))
    yield Check(f"oracle, {UPDATES} updates", bool(np.isfinite(oracle).all()), facts)
    for name in ("fp32", "bf16", "fp16") if c.cuda else ("fp32",):
        curve, facts = _curve(c, _config(c, precision=name))
        error = _apart(curve, oracle)
        yield Check(f"losses {name}, {UPDATES} updates", error <= CURVE_TOLERANCE[name], {"error": error, **facts})


def compile_(c: Context) -> Iterator[Check]:
    """torch.compile and CUDA graphs against the eager step."""
    if not c.cuda:
        yield Check("compile", None, {"reason": "needs a CUDA device; tests/test_compiled.py traces it on a CPU"})
        return
    for name in ("fp32", "bf16"):
        eager, slow = _curve(c, _config(c, precision=name, compile="off"))
        curve, fast = _curve(c, _config(c, precision=name, compile="on"))
        error = _apart(curve, eager)
        facts = {"error": error, "eager": slow, "compiled": fast}
        yield Check(f"compiled {name}, {UPDATES} updates", error <= CURVE_TOLERANCE[name], facts)


def _config(c: Context, **changes: Any) -> TrainConfig:
    small = {"kernel_gen": 4, "kernel_dis": 4, "batch_size": 2, "patch_size": 16, "critic_iterations": 2}
    large = {"kernel_gen": 16, "kernel_dis": 32, "batch_size": 8, "patch_size": 64}
    return TrainConfig(new_low_res=((1.0, 1.0, 3.0),), **{**(large if c.cuda else small), **changes})


def _curve(c: Context, config: TrainConfig) -> tuple[np.ndarray, dict[str, Any]]:
    """Losses (updates, 3): reconstruction, Wasserstein, penalty; milliseconds of an iteration and peak memory."""
    models = Models(config, 0, c.device)
    patches = pool(config.patch_size, config.batch_size, str(c.device))
    rows, times = [], []
    if c.cuda:
        torch.cuda.reset_peak_memory_stats(c.device)
    for update in range(UPDATES if c.cuda else 5):
        c.sync()
        began = time.perf_counter()
        drawn = patches.critic_indices(update, config.batch_size, config.critic_iterations)
        batches = [_copy(patches.gather(i)) for i in drawn]
        draw = torch.Generator().manual_seed(update)
        eps = [torch.rand(b.y.shape[:2], generator=draw).to(c.device) for b in batches]
        critic = models.critic_updates(batches, eps)
        generator = models.generator_update(patches.gather(drawn[0]), adversarial=True)
        c.sync()
        times.append(time.perf_counter() - began)
        rows.append([generator["reconstruction"], critic["wasserstein"], critic["penalty"]])
    facts: dict[str, Any] = {"iteration_ms": 1e3 * float(np.median(times[len(times) // 2 :]))}
    if c.cuda:
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(c.device)
    return np.array(rows), facts


def _copy(batch: Batch) -> Batch:
    """A batch of its own: the pool may use its buffers again."""
    return Batch(batch.x.clone(), batch.y.clone(), batch.res.clone(), batch.ids)


def _apart(curve: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of each loss over its largest value in the other curve; infinite where it is not finite."""
    if not np.isfinite(curve).all():
        return float("inf")
    return float((np.abs(curve - other).max(0) / np.abs(other).max(0)).max())
