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
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsrgan.config import TrainConfig
from fastsrgan.errors import ResourceError
from fastsrgan.model.networks import Critic, CriticSpec, Generator, GeneratorSpec
from fastsrgan.train.critic_step import critic_gradients, parameters
from fastsrgan.train.objectives import critic_loss, generator_loss

log = logging.getLogger("fastsrgan")

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TF32 = "tf32"
# Each limit is at most twice the worst that sound arithmetic gave on seeds 1 and 2 of ``_gradients``, by the library's
# convolutions of an EPYC Zen 3 with AVX2 (float32; bfloat16 and float16 emulated; TF32 by operands rounded to 10 bits
# of mantissa): tests/test_precision.py::test_the_limits_are_near_what_sound_arithmetic_gives measures it.
#
# ||difference|| / ||exact|| of one convolution, or of one of its gradients, against float64 from the same operands.
# Worst: float32 1.5e-6, float16 1.1e-3, bfloat16 8.5e-3, TF32 6.0e-3. One tap of 27 left out: 0.09 and more.
KERNEL_LIMITS: dict[Any, float] = {torch.float32: 3e-6, torch.float16: 2.1e-3, torch.bfloat16: 1.6e-2, TF32: 1.1e-2}
# The same of all gradients of a network together: rounding adds up over the layers and through 17 norms, so this sees
# coarse faults only. Worst, likewise: generator 7.0e-6, 0.078, 0.247, 0.078; critic 5.5e-7, 0.047, 0.099, 0.047.
NETWORK_LIMITS: dict[str, dict[Any, float]] = {
    "generator": {torch.float32: 1.3e-5, torch.float16: 0.15, torch.bfloat16: 0.48, TF32: 0.15},
    "critic": {torch.float32: 1.1e-6, torch.float16: 0.09, torch.bfloat16: 0.19, TF32: 0.09},
}


@dataclass(frozen=True)
class Arithmetic:
    """How a device computes.

    dtype : of convolutions; the rest is float32
    channels_last : activations with channels as their innermost axis
    tf32 : float32 products of CUDA devices with 10 bits of mantissa
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    tf32: bool = False

    @property
    def proven(self) -> bool:
        """Whether this is the arithmetic that every other one is measured by."""
        return self.device.type == "cpu" and self.dtype == torch.float32

    @property
    def name(self) -> str:
        """Its name in settings."""
        return next(k for k, v in TYPES.items() if v == self.dtype)

    @property
    def scaled(self) -> bool:
        """Whether losses need a scale, for want of range."""
        return self.dtype == torch.float16

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def flags(self) -> Iterator[None]:
        """TF32 as this arithmetic has it, within; torch lets convolutions round to it by default."""
        convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
        before = convolutions.allow_tf32, products.allow_tf32
        convolutions.allow_tf32 = products.allow_tf32 = self.tf32
        try:
            yield
        finally:
            convolutions.allow_tf32, products.allow_tf32 = before

    def arrange(self, network: torch.nn.Module) -> None:
        """Move a network's parameters to the device, in the layout that its convolutions then take over."""
        if self.channels_last:
            network.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        else:
            network.to(self.device)

    def __str__(self) -> str:
        return f"{self.name}{' with TF32' * self.tf32}, {'channels last' if self.channels_last else 'contiguous'}"


def choose(config: TrainConfig, device: torch.device) -> Arithmetic:
    """What ``precision``, ``tf32`` and ``layout`` mean on this device.

    Raises ResourceError when a type was asked for that the device cannot compute with.
    """
    cuda = device.type == "cuda"
    dtype = TYPES[config.precision] if config.precision != "auto" else _best(device)
    if dtype == torch.float16 and not cuda:
        raise ResourceError("--precision", "fp16 is for CUDA devices", "fp32, or bf16")
    if dtype == torch.bfloat16 and cuda and torch.cuda.get_device_capability(device) < (8, 0):
        raise ResourceError("--precision", f"{_name(device)} has no bf16", "auto, fp32 or fp16")
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


def training_type(major: int, minor: int) -> str:
    """The precision that a CUDA device of a compute capability trains in."""
    return "bf16" if (major, minor) >= (8, 0) else "fp16" if (major, minor) >= (7, 0) else "fp32"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@functools.cache
def self_test(arithmetic: Arithmetic) -> dict[str, float]:
    """A training step of a small generator and critic against float64 on the CPU, with TF32 as the run will have it.

    Every convolution and every gradient of one is compared with the same from its own operands, where rounding is small
    and one wrong tap shows; the gradients of both networks with those of the plain forms. Once per process and choice.
    Some cuDNN releases return wrong 3-D convolutions for some sizes and types.

    Returns the relative differences: "generator" and "critic" gradients, and the worst of each kernel. Raises
    ResourceError when one is beyond what rounding explains, or when the device fails.
    """
    kernels = _Kernels()
    try:
        with arithmetic.flags():
            found = {name: g.double().cpu() for name, g in _gradients(arithmetic, kernels).items()}
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        reason = f"a small training step failed: {str(error).splitlines()[0]}"
        raise ResourceError(_name(arithmetic.device), reason, "see `fastsrgan doctor`, or --device cpu") from error
    off = {name: _relative(found[name], g) for name, g in _expected().items()}
    for name, value in off.items():
        _refuse(arithmetic, {f"{name} gradients": value}, NETWORK_LIMITS[name])
    _refuse(arithmetic, kernels.off, KERNEL_LIMITS)
    log.debug("self-test of %s: %s, %s", arithmetic, off, kernels.off)
    return {**off, **kernels.off}


@functools.cache
def inference_test(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """``self_test`` of a forward pass alone, for inference: the worst kernel. Raises ResourceError likewise."""
    arithmetic = Arithmetic(device, dtype)
    kernels = _Kernels()
    generator = Generator(GeneratorSpec(kernel=8), seed=1).to(device)
    x = torch.rand((1, 1, 16, 16, 16), generator=torch.Generator().manual_seed(3)).to(device)
    try:
        with torch.no_grad(), arithmetic.flags(), arithmetic.autocast(), kernels:
            generator.raw(x)
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        reason = f"a small forward pass failed: {str(error).splitlines()[0]}"
        raise ResourceError(_name(device), reason, "see `fastsrgan doctor`, or --device cpu") from error
    _refuse(arithmetic, kernels.off, KERNEL_LIMITS)
    return kernels.off


def _refuse(arithmetic: Arithmetic, off: dict[str, float], limits: dict[Any, float]) -> None:
    """ResourceError where a difference is beyond the limit of this arithmetic."""
    limit = limits[TF32 if arithmetic.tf32 and arithmetic.dtype == torch.float32 else arithmetic.dtype]
    wrong = {name: value for name, value in off.items() if not value <= limit}
    if not wrong:
        return
    differences = ", ".join(f"{name} are off by {value:.2g}" for name, value in wrong.items())
    cudnn = f"cuDNN {torch.backends.cudnn.version()}, " if arithmetic.device.type == "cuda" else ""
    hint = f"{cudnn}torch {torch.__version__}: try another release, --precision fp32 or --device cpu"
    what = f"{_name(arithmetic.device)}, {arithmetic}"
    raise ResourceError(what, f"computes wrong convolutions: {differences}, {limit} allowed", hint)


class _Kernels(TorchDispatchMode):
    """Compares what convolutions give with float64 on the CPU from the same operands.

    off : "convolutions", "input gradients", "weight gradients" -> largest ||difference|| / ||exact||
    """

    def __init__(self) -> None:
        super().__init__()
        self.off: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = {
            torch.ops.aten.convolution.default: ("convolutions",),
            torch.ops.aten.convolution_backward.default: ("input gradients", "weight gradients"),
        }.get(func)
        if names:
            with torch.autocast("cpu", enabled=False):
                exact = func(*(_exact(a) for a in args), **(kwargs or {}))
            both = zip(names, *((v,) if isinstance(v, Tensor) else v for v in (out, exact)), strict=False)
            for name, got, right in both:
                if right is not None:
                    value = _relative(got.double().cpu(), right)
                    self.off[name] = _worse(self.off.get(name, 0.0), value)
        return out


def _exact(value: Any) -> Any:
    return value.to("cpu", torch.float64) if isinstance(value, Tensor) else value


def _worse(a: float, b: float) -> float:
    return a if math.isnan(a) or a > b else b


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp_min(1e-300))


@functools.cache
def _expected() -> dict[str, Tensor]:
    """The gradients by the plain forms in float64."""
    return _gradients(Arithmetic(torch.device("cpu"), torch.float64))


def _gradients(
    arithmetic: Arithmetic, kernels: AbstractContextManager | None = None, seed: int = 1
) -> dict[str, Tensor]:
    """All gradients of a generator and of a critic update, each as one vector, the same step for every choice.

    The networks' work is done within ``kernels``.
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
    with kernels or contextlib.nullcontext():
        if plain:
            terms = critic_loss(critic, y, fake, eps, 10.0, penalty="autograd")
            of_critic = list(torch.autograd.grad(terms["total"], parameters(critic)))
            loss = generator_loss(generator, critic, x, y, lambda_adv=0.1)["total"]
        else:
            _, of_critic = critic_gradients(critic, y, fake, eps, 10.0, dtype=arithmetic.dtype)
            with arithmetic.autocast():
                loss = generator_loss(generator, critic, x, y, lambda_adv=0.1)["total"]
        of_generator = torch.autograd.grad(loss * 2**10, list(generator.parameters()))
    joined = {"generator": [g * 2.0**-10 for g in of_generator], "critic": of_critic}
    return {name: torch.cat([g.flatten() for g in gradients]) for name, gradients in joined.items()}
