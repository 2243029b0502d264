"""Types and memory layout of a training step, chosen by what the device can do (DESIGN D11), and a test of them.

CUDA from sm_80 on computes in bfloat16, from sm_70 on in float16 with loss scaling, older devices and CPUs without
native bfloat16 in float32. Weights, gradient norms, losses, the gradient penalty and norm statistics are float32 in
every case. What concerns CUDA here has run on no GPU yet; the choices are tested on faked capabilities.
"""

from __future__ import annotations

import functools
import logging
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastsrgan.config import TrainConfig
from fastsrgan.critic_step import critic_gradients, parameters
from fastsrgan.errors import ResourceError
from fastsrgan.networks import Critic, CriticSpec, Generator, GeneratorSpec
from fastsrgan.step import critic_loss, generator_loss

log = logging.getLogger("fastsrgan")

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NATIVE = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of x86 and ARM processors that multiply bfloat16
# ||difference|| / ||oracle|| of all gradients of a network together, in the self-test. A few times what a sound device
# shows on random weights, where instance norms on few voxels amplify rounding; a wrong kernel is off by more than one.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.2, torch.bfloat16: 0.5}
TF32_TOLERANCE = 0.1


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
    def scaled(self) -> bool:
        """Whether losses need a scale, for want of range."""
        return self.dtype == torch.float16

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def arrange(self, network: torch.nn.Module) -> None:
        """Move a network's parameters to the device, in the layout that its convolutions then take over."""
        if self.channels_last:
            network.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        else:
            network.to(self.device)

    def __str__(self) -> str:
        name = next(k for k, v in TYPES.items() if v == self.dtype)
        return f"{name}{' with TF32' * self.tf32}, {'channels last' if self.channels_last else 'contiguous'}"


def choose(config: TrainConfig, device: torch.device) -> Arithmetic:
    """What ``precision``, ``tf32`` and ``layout`` mean on this device.

    Raises ResourceError when a type was asked for that the device cannot compute with.
    """
    cuda = device.type == "cuda"
    dtype = TYPES[config.precision] if config.precision != "auto" else _best(device)
    if dtype == torch.float16 and not cuda:
        raise ResourceError("--precision", "fp16 is for CUDA devices", "auto, fp32 or bf16")
    if dtype == torch.bfloat16 and cuda and torch.cuda.get_device_capability(device) < (8, 0):
        raise ResourceError("--precision", f"{_name(device)} has no bf16", "auto, fp32 or fp16")
    if dtype == torch.bfloat16 and not cuda and not native_bfloat16():
        log.warning("--precision bf16: this CPU has no native bfloat16 and emulates it, at a fraction of fp32's speed")
    if config.layout == "channels_last" and not cuda:
        log.warning("--layout channels_last is for CUDA devices; on the CPU each layer's form has its own")
    return Arithmetic(device, dtype, cuda and config.layout != "contiguous", config.tf32 and cuda)


def _best(device: torch.device) -> torch.dtype:
    if device.type != "cuda":
        return torch.bfloat16 if native_bfloat16() else torch.float32
    capability = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32


def native_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 itself; False where that is not told."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and not NATIVE.isdisjoint(found[1].split())


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@functools.cache
def self_test(arithmetic: Arithmetic) -> dict[str, float]:
    """Compare the gradients of a small generator and critic with those of the plain forms in float64 on the CPU.

    Once per process and choice. Some cuDNN releases return wrong 3-D convolutions for some sizes and types.

    Returns the relative differences. Raises ResourceError when one is beyond what rounding explains, or when the
    device fails.
    """
    try:
        found = {name: g.double().cpu() for name, g in _gradients(arithmetic).items()}
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        reason = f"a small training step failed: {str(error).splitlines()[0]}"
        raise ResourceError(_name(arithmetic.device), reason, "see `fastsrgan doctor`, or --device cpu") from error
    expected = _gradients(Arithmetic(torch.device("cpu"), torch.float64))
    off = {name: float((found[name] - g).norm() / g.norm()) for name, g in expected.items()}
    limit = TF32_TOLERANCE if arithmetic.tf32 and arithmetic.dtype == torch.float32 else TOLERANCE[arithmetic.dtype]
    wrong = {name: value for name, value in off.items() if not value <= limit}
    if wrong:
        told = ", ".join(f"{name} gradients are off by {value:.2g}" for name, value in wrong.items())
        cudnn = f"cuDNN {torch.backends.cudnn.version()}, " if arithmetic.device.type == "cuda" else ""
        hint = f"{cudnn}torch {torch.__version__}: try another release, --precision fp32 or --device cpu"
        what = f"{_name(arithmetic.device)}, {arithmetic}"
        raise ResourceError(what, f"computes wrong convolutions: {told}, {limit} allowed", hint)
    log.debug("self-test of %s: %s", arithmetic, off)
    return off


def _gradients(arithmetic: Arithmetic) -> dict[str, Tensor]:
    """All gradients of a generator and of a critic update, each as one vector, the same step for every choice."""
    plain = arithmetic.dtype == torch.float64
    kind = torch.float64 if plain else torch.float32
    generator = Generator(GeneratorSpec(kernel=8), "reference" if plain else "fast", seed=1).to(kind)
    critic = Critic(CriticSpec(kernel=8, patch=16), seed=2).to(kind)
    arithmetic.arrange(generator)
    arithmetic.arrange(critic)
    draw = torch.Generator().manual_seed(3)
    y, fake = torch.rand((2, 2, 2, 16, 16, 16), generator=draw).to(arithmetic.device, kind)
    x = y[:, :1] + 0.1 * fake[:, :1]
    eps = torch.tensor([[0.3, 0.8], [0.6, 0.1]], device=arithmetic.device, dtype=kind)
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
