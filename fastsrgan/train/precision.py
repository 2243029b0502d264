"""Types and memory layout of a training step, by the kind of device, and a test of them (docs/decisions/022).

CPUs compute in float32 unless another type is asked for: bfloat16 was slower on every one that was measured, with its
own instructions for it or without. CUDA from sm_80 on computes in bfloat16, from sm_70 on in float16 with loss scaling,
older devices in float32. Weights, gradient norms, losses, the gradient penalty and norm statistics are float32 in every
case. What concerns CUDA here has run on no GPU yet; the choices are tested on faked capabilities.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastsrgan.config import TrainConfig
from fastsrgan.errors import ResourceError
from fastsrgan.model.arithmetic import (
    KERNEL_LIMITS,
    TF32,
    TYPES,
    Arithmetic,
    Kernels,
    device_name,
    limit_of,
    refuse,
    relative,
    slow_cudnn,
    training_type,
)
from fastsrgan.model.compiled import whole
from fastsrgan.model.networks import Critic, CriticSpec, Generator, GeneratorSpec
from fastsrgan.train.critic_step import critic_gradients, parameters
from fastsrgan.train.objectives import critic_loss, generator_loss

log = logging.getLogger("fastsrgan")

# As KERNEL_LIMITS, of all gradients of a network together: rounding adds up over the layers and through 17 norms, so
# this sees coarse faults only. Worst: generator 4.5e-6, 0.050, 0.167, 0.051; critic 7.7e-7, 0.039, 0.122, 0.039.
NETWORK_LIMITS: dict[str, dict[Any, float]] = {
    "generator": {torch.float32: 9e-6, torch.float16: 0.1, torch.bfloat16: 0.33, TF32: 0.1},
    "critic": {torch.float32: 1.4e-6, torch.float16: 0.077, torch.bfloat16: 0.24, TF32: 0.078},
}


SEEDS = 1, 2, 3  # of the values of a small step, each one tried where the one before is off
REPLAYS = 3  # of a compiled step: the first compiles, the second records graphs, the third replays them


def goes_on_in(config: TrainConfig, kept: str | None) -> str:
    """The precision of a run: that of the snapshot it goes on from (``kept``) where the settings leave it open."""
    return kept or "auto" if config.precision == "auto" else config.precision


def choose(config: TrainConfig, device: torch.device, kept: str | None = None) -> Arithmetic:
    """What ``precision`` (see ``goes_on_in``), ``tf32`` and ``layout`` mean on this device.

    Raises ResourceError when a type was asked for that the device cannot compute with.
    """
    cuda, name = device.type == "cuda", goes_on_in(config, kept)
    dtype = TYPES[name] if name != "auto" else _best(device)
    if dtype == torch.float16 and not cuda:
        raise ResourceError("--precision", "fp16 is for CUDA devices", "fp32, or bf16")
    if dtype == torch.bfloat16 and cuda and torch.cuda.get_device_capability(device) < (8, 0):
        raise ResourceError("--precision", f"{device_name(device)} has no bf16", "auto, fp32 or fp16")
    if dtype == torch.bfloat16 and not cuda:
        log.warning("%s", SLOW)
    if config.layout == "channels_last" and not cuda:
        log.warning("--layout channels_last is for CUDA devices; on the CPU each layer's form has its own")
    return Arithmetic(device, dtype, cuda and config.layout != "contiguous", config.tf32 and cuda)


SLOW = "bf16 is slower than fp32 on every CPU that was measured, and less exact: --precision auto takes fp32 there"


def _best(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    return TYPES[training_type(*torch.cuda.get_device_capability(device))]


@functools.cache
def self_test(arithmetic: Arithmetic, compiled: bool = False) -> dict[str, float]:
    """A training step of a small generator and critic against float64 on the CPU, with TF32 as the run will have it.

    Every convolution and every gradient of one is compared with the same from its own operands, where rounding is small
    and one wrong tap shows; the gradients of both networks with those of the plain forms. Once per process and choice.
    Some cuDNN releases return wrong 3-D convolutions for some sizes and types. ``compiled``: the step's functions by
    torch.compile, whose convolutions cannot be seen one by one; of the last of ``REPLAYS`` steps, which on CUDA is the
    first that graphs alone compute.

    Where gradients of a network are off beyond their limit, the step is done again on other values: rounding alone may
    change the sign of what a LeakyReLU is given, and with it gradients by 1e-3 of them (2 of 72 steps in float32: 12
    draws by six sets of sound CPU kernels); a wrong kernel is wrong on all values.

    Returns the relative differences: "generator" and "critic" gradients, and the worst of each kernel. Raises
    ResourceError when one is beyond what rounding explains, or when the device fails.
    """
    kernels = Kernels()
    off: dict[str, float] = {}
    try:
        for seed in SEEDS:
            with arithmetic.flags():
                found = _gradients(arithmetic, None if compiled else kernels, seed, compiled)
            off = {name: relative(found[name].double().cpu(), g) for name, g in _expected(seed).items()}
            if all(value <= limit_of(arithmetic, NETWORK_LIMITS[name]) for name, value in off.items()):
                break
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        reason = f"a small training step failed: {str(error).splitlines()[0]}"
        hint = "see `fastsrgan doctor`, or --device cpu"
        raise ResourceError(device_name(arithmetic.device), reason, hint) from error
    for name, value in off.items():
        refuse(arithmetic, {f"{name} gradients": value}, NETWORK_LIMITS[name])
    refuse(arithmetic, kernels.off, KERNEL_LIMITS)
    log.debug("self-test of %s: %s, %s", arithmetic, off, kernels.off)
    slow = slow_cudnn(torch.backends.cudnn.version()) if arithmetic.device.type == "cuda" else None
    if slow and arithmetic.dtype != torch.float32:
        log.warning("%s", slow)
    return {**off, **kernels.off}


@functools.cache
def _expected(seed: int) -> dict[str, Tensor]:
    """The gradients by the plain forms in float64."""
    return _gradients(Arithmetic(torch.device("cpu"), torch.float64), None, seed)


def _gradients(
    arithmetic: Arithmetic, kernels: AbstractContextManager | None = None, seed: int = 1, compiled: bool = False
) -> dict[str, Tensor]:
    """All gradients of a generator and of a critic update, each as one vector, the same step for every choice.

    The generator's are 2^10 times as large, for those that half precision would lose. The networks' work is done within
    ``kernels``; ``compiled``: by compiled functions, several times.
    """
    plain = arithmetic.dtype == torch.float64
    kind = torch.float64 if plain else torch.float32
    generator = Generator(GeneratorSpec(kernel=8), "reference" if plain else "fast", seed=seed).to(kind)
    critic = Critic(CriticSpec(kernel=8, patch=16), seed=seed + 1).to(kind)
    arithmetic.arrange(generator)
    arithmetic.arrange(critic)
    draw = torch.Generator().manual_seed(seed + 2)
    y, fake = torch.rand((2, 2, 2, 16, 16, 16), generator=draw).to(arithmetic.device, kind)
    x = y[:, :1] + 0.1 * fake[:, :1]
    eps = torch.tensor([[0.3, 0.8], [0.6, 0.1]], device=arithmetic.device, dtype=kind)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with arithmetic.autocast():
            return generator_loss(generator, critic, x, y, lambda_adv=0.1)["total"]

    by_hand: Callable = critic_gradients
    if compiled:
        by_hand, loss_of = (whole(f, arithmetic.device, strict=True) for f in (by_hand, loss_of))
    of_critic: list[Tensor] = []
    of_generator: tuple[Tensor, ...] = ()
    for _ in range(REPLAYS if compiled else 1):
        with kernels or contextlib.nullcontext():
            if plain:
                terms = critic_loss(critic, y, fake, eps, 10.0, penalty="autograd")
                of_critic = list(torch.autograd.grad(terms["total"], parameters(critic)))
            else:
                _, of_critic = by_hand(critic, y, fake, eps, 10.0, dtype=arithmetic.dtype)
                of_critic = [g.clone() for g in of_critic]  # a graph's results are written over by the next one
            of_generator = torch.autograd.grad(loss_of(x, y) * 2**10, list(generator.parameters()))
    joined = {"generator": of_generator, "critic": of_critic}
    return {name: torch.cat([g.flatten() for g in gradients]) for name, gradients in joined.items()}
