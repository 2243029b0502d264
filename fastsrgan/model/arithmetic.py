"""How a device computes, and a test of its convolutions against float64 (docs/decisions/022).

Broken kernels exist: some cuDNN releases returned wrong 3-D convolutions for some sizes and types. Each convolution of
a small pass is compared with the same one in float64 from the same operands, where rounding is small and a wrong tap
shows.
"""

from __future__ import annotations

import functools
import logging
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsrgan.core.kernels import rounding
from fastsrgan.errors import ResourceError, UsageError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
log = logging.getLogger("fastsrgan")

TF32 = "tf32"
# ||difference|| / ||exact|| of one convolution, or of one of its gradients, against float64 from the same operands.
# Each limit is at most twice the worst that sound arithmetic gave on seeds 1 and 2 of the small step of
# train/precision.py, which tests/test_precision.py::test_the_limits_are_near_what_sound_arithmetic_gives measures:
# float32 2.1e-6 by oneDNN with AVX-512 and 1.7e-6 with AVX2, 1.3e-6 with every sum in one accumulator, product by
# product (2^-24 sqrt(n / 6) is 2.2e-6 for n = 8192 products); float16 1.1e-3 and bfloat16 8.5e-3 by torch's own loops,
# 1.7e-3 where the processor has bfloat16; TF32 by operands cut to 10 bits of mantissa, 2.2e-3. One tap of 27 left out:
# 0.09 and more.
KERNEL_LIMITS: dict[Any, float] = {torch.float32: 3.6e-6, torch.float16: 2.1e-3, torch.bfloat16: 1.7e-2, TF32: 3e-3}


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
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16))

    def flags(self) -> AbstractContextManager:
        """TF32 as this arithmetic has it, within; torch lets convolutions round to it by default."""
        return rounding(self.tf32)

    def arrange(self, network: torch.nn.Module) -> None:
        """Move a network's parameters to the device, in the layout that its convolutions then take over."""
        if self.channels_last:
            network.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        else:
            network.to(self.device)

    def __str__(self) -> str:
        return f"{self.name}{' with TF32' * self.tf32}, {'channels last' if self.channels_last else 'contiguous'}"


def device_name(device: torch.device) -> str:
    """The device as its maker names it, or its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def training_type(major: int, minor: int) -> str:
    """The precision that a CUDA device of a compute capability trains in."""
    return "bf16" if (major, minor) >= (8, 0) else "fp16" if (major, minor) >= (7, 0) else "fp32"


SLOW_CUDNN = range(90800, 91500)  # 9.8.0 up to 9.14.x, as torch.backends.cudnn.version() has them


def slow_cudnn(version: int | None) -> str | None:
    """What is to be said of a cuDNN release in which 3-D convolutions of half precision fall back to a slow path; None
    for the others."""
    if version is None or version not in SLOW_CUDNN:
        return None
    return (
        f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100} runs 3-D convolutions in bf16 and fp16 by a "
        "path that is several times slower: install 9.15 or later (pip install -U nvidia-cudnn-cu13, or -cu12)"
    )


class Kernels(TorchDispatchMode):
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
                    value = relative(got.double().cpu(), right)
                    self.off[name] = _worse(self.off.get(name, 0.0), value)
        return out


def _exact(value: Any) -> Any:
    return value.to("cpu", torch.float64) if isinstance(value, Tensor) else value


def _worse(a: float, b: float) -> float:
    return a if math.isnan(a) or a > b else b


def relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||, over all values together."""
    return float((found - exact).norm() / exact.norm().clamp_min(1e-300))


def limit_of(arithmetic: Arithmetic, limits: dict[Any, float]) -> float:
    """The one of its type, or of TF32."""
    return limits[TF32 if arithmetic.tf32 and arithmetic.dtype == torch.float32 else arithmetic.dtype]


def refuse(arithmetic: Arithmetic, off: dict[str, float], limits: dict[Any, float]) -> None:
    """ResourceError where a difference is beyond the limit of this arithmetic."""
    limit = limit_of(arithmetic, limits)
    wrong = {name: value for name, value in off.items() if not value <= limit}
    if not wrong:
        return
    differences = ", ".join(f"{name} are off by {value:.2g}" for name, value in wrong.items())
    cudnn = f"cuDNN {torch.backends.cudnn.version()}, " if arithmetic.device.type == "cuda" else ""
    hint = f"{cudnn}torch {torch.__version__}: try another release, --precision fp32 or --device cpu"
    what = f"{device_name(arithmetic.device)}, {arithmetic}"
    raise ResourceError(what, f"computes wrong convolutions: {differences}, {limit} allowed", hint)


def pick_precision(name: str, device: torch.device) -> str:
    """The precision that "auto" stands for on a device: fp16 on CUDA, else fp32. Says once what a CPU is slow at.

    fp16 is as fast as bf16 and closer to float32: SR by 2e-4 of the maximum instead of 1.5e-3.
    """
    if name == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if name not in TYPES:
        raise UsageError("precision", f"{name!r} is not allowed", f"auto, {', '.join(TYPES)}")
    if device.type == "cpu" and name != "fp32":
        _warn_once(f"{name} is slower than fp32 on a CPU, and less exact: take --precision auto")
    return name


def native(precision: str) -> bool:
    """Whether this CPU computes in a precision."""
    features: dict = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may not have it
    names = ("avx512_bf16", "amx_bf16", "bf16") if precision == "bf16" else ("avx512_fp16", "amx_fp16", "fp16")
    return precision == "fp32" or any(features.get(name) for name in names)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
