"""The one place that chooses between plain torch and a CUDA kernel, and the only one that knows CuPy.

An ``@op`` is a function whose body is the reference: plain torch, right on every device, and what runs on a CPU. On a
CUDA device its launcher runs ``kernels/<name>.cu`` instead. ``FASTSRGAN_REFERENCE=1`` runs the bodies everywhere, the
first thing to try when a result looks wrong.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("fastsrgan")

BLOCK = 256  # threads of a block, along x
MAX_GRID = (2**31 - 1, 65535, 65535)  # blocks, what CUDA takes; kernels stride over what y and z leave

# Kernels write each fused multiply-add as fmaf. Nothing else may be contracted, so that every rounding is the one that
# the text shows: the same bits as on the host, where torch's addcmul fuses too.
OPTIONS = ("--std=c++17", "--fmad=false")

# Inside a wheel, and beside the package in a source tree.
KERNEL_FOLDERS = [Path(__file__).parent.parent / "kernels", Path(__file__).parent.parent.parent / "kernels"]

SCALARS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.uint8: "u8"}

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
Argument = Tensor | int | None


class KernelUnavailable(Exception):
    """No kernel can be had: its text is missing, or CuPy cannot compile it here. The reference is used instead."""


# --- text ---------------------------------------------------------------------------------------------------------


def kernel_source(name: str) -> str:
    """The text of ``kernels/<name>.cu`` with its own includes (``#include "x.cuh"``) put in place.

    Raises KernelUnavailable where this installation has no such file.
    """
    return re.sub(
        r'^#include "(\w+\.cuh)"$', lambda found: _read(found[1]).rstrip(), _read(f"{name}.cu"), flags=re.MULTILINE
    )


def _read(file: str) -> str:
    for folder in KERNEL_FOLDERS:
        if (folder / file).is_file():
            return (folder / file).read_text(encoding="utf8")
    raise KernelUnavailable(f"kernels/{file} is not part of this installation")


def define_options(defines: dict[str, object]) -> tuple[str, ...]:
    """The compiler options that every kernel gets, and its defines: ``TILE="f16"`` is ``-DTILE=f16``."""
    return (*OPTIONS, *(f"-D{key}={value}" for key, value in sorted({"BLOCK": BLOCK, **defines}.items())))


# --- memory ---------------------------------------------------------------------------------------------------------


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device. On a CPU it shares the array's memory. On CUDA it goes through pinned memory, and nobody
    waits for the copy but what is queued behind it on the current stream; torch keeps the pinned memory until then."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


# --- CuPy ---------------------------------------------------------------------------------------------------------


@functools.cache
def _cupy_problem() -> str | None:
    """Why CuPy cannot be used, None when it can."""
    try:
        cupy = importlib.import_module("cupy")
        if cupy.cuda.runtime.getDeviceCount() < 1:
            return "it sees no device"
    except Exception as error:  # a broken installation raises anything: it must not take the run with it
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def cupy_available() -> bool:
    """CuPy can be imported and sees a device. Tried once per process."""
    return _cupy_problem() is None


def kernel(name: str, **defines: object) -> Any:
    """``kernels/<name>.cu``, compiled for CuPy's current device, once per device and defines: a ``cupy.RawKernel``.

    Raises KernelUnavailable when it cannot be compiled.
    """
    cupy = importlib.import_module("cupy")
    return _compiled(cupy.cuda.Device().id, name, define_options(defines))


@functools.cache
def _compiled(device: int, name: str, options: tuple[str, ...]) -> Any:
    source = kernel_source(name)
    try:
        module = importlib.import_module("cupy").RawModule(code=source, options=options, backend="nvrtc")
        return module.get_function(name)  # compiles
    except Exception as error:  # NVRTC's errors, a missing NVRTC, an unwritable cache
        raise KernelUnavailable(f"{name} cannot be compiled: {type(error).__name__}: {error}") from error


def _run_cupy(name: str, grid: tuple[int, int, int], args: Sequence[Argument], defines: dict[str, object]) -> None:
    """Queue a kernel on torch's current stream, so that it runs between torch's own kernels without waiting.

    Tensors go as their addresses: CuPy holds and copies none of them, and knows not all of their types.
    """
    cupy, device = importlib.import_module("cupy"), _device(args)
    # CuPy takes a stream to be the current device's, which in a thread may be another than the tensors'.
    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(torch.cuda.current_stream(device)):
        values = (a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in args)
        kernel(name, **defines)(grid, (BLOCK, 1, 1), tuple(map(np.int64, values)))


# --- the choice ---------------------------------------------------------------------------------------------------

Runner = Callable[[str, tuple[int, int, int], Sequence[Argument], dict[str, object]], None]

# What runs a kernel's text on a type of device. The tests add the CPU, where g++ compiles it (kernels/host).
RUNNERS: dict[str, Runner] = {"cuda": _run_cupy}


def reference_only() -> bool:
    """FASTSRGAN_REFERENCE asks for the plain bodies on every device."""
    return os.environ.get("FASTSRGAN_REFERENCE", "0") not in ("", "0")


def unrounded(device: torch.device) -> contextlib.AbstractContextManager:
    """Within, float32 convolutions and products are not rounded to TF32, as torch lets convolutions be on CUDA by
    default."""
    return contextlib.nullcontext() if device.type != "cuda" else rounding(False)


@contextlib.contextmanager
def rounding(tf32: bool) -> Iterator[None]:
    """float32 convolutions and products of CUDA devices with TF32 or without, within."""
    before, old = [place.fp32_precision for place in _places()], []
    switches: tuple[Any, Any] = torch.backends.cudnn, torch.backends.cuda.matmul
    for switch in switches:
        with contextlib.suppress(RuntimeError):  # torch reads it to nobody where a session has set the new name
            old.append((switch, switch.allow_tf32))
    set_rounding(tf32)
    try:
        yield
    finally:
        for switch, was in old:
            switch.allow_tf32 = was
        for place, precision in zip(_places(), before, strict=True):
            place.fp32_precision = precision


def set_rounding(tf32: bool) -> None:
    """From here on. By the names of torch 2.9, since a session may have set those, and by the old ones too, which torch
    compares with them."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    for place in _places():
        place.fp32_precision = "tf32" if tf32 else "ieee"


def _places() -> tuple[Any, Any]:
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, torch.backends.cuda.matmul


def runs_kernels(device: torch.device) -> bool:
    """Whether operations on this device run kernels; says once in the log why a CUDA device does not."""
    if device.type not in RUNNERS:
        return False
    if reference_only():
        _say_once("FASTSRGAN_REFERENCE is set: plain torch runs instead of the kernels")
        return False
    if device.type == "cuda" and not cupy_available():
        _say_once(
            f"no CuPy ({_cupy_problem()}): tiles and patches are moved by plain torch, which is slower "
            "(pip install 'fastsrgan[cuda13]', or cuda12)"
        )
        return False
    return True


def launch(name: str, threads: tuple[int, int, int], args: Sequence[Argument], **defines: object) -> None:
    """Run a kernel over at least ``threads`` threads.

    Parameters
    ----------
    name : of the file in kernels/ and of the function in it
    threads : along x in blocks of ``BLOCK``, along y and z in blocks of one; more than CUDA's limit of blocks along y
        and z are left to the kernel, which strides by ``gridDim``
    args : in the kernel's order: tensors (all on one device) as pointers, numbers as 64-bit integers, None as null
    defines : macros of the kernel
    """
    blocks = (-(-threads[0] // BLOCK), threads[1], threads[2])
    if all(blocks):
        x, y, z = (min(b, most) for b, most in zip(blocks, MAX_GRID, strict=True))
        assert len({a.device for a in args if isinstance(a, Tensor)}) == 1, f"{name} got memory of several devices"
        RUNNERS[_device(args).type](name, (x, y, z), args, defines)


class Op(Generic[P, R]):
    """A function with a kernel: the body on CPUs, the launcher on devices that run kernels.

    Attributes
    ----------
    name : of the kernel
    body : the reference
    launch : same arguments, same result by the kernel; NotImplemented for arguments that the kernel does not take
    example : (seed, device) -> small, odd arguments with poisoned outputs, for parity tests and benchmarks
    rtol : how far the two may differ, relative to the largest value; 0 means equal bits
    broken : the kernel was found to be unavailable
    """

    def __init__(
        self, name: str, body: Callable[P, R], launch: Callable[P, Any], example: Callable[..., tuple], rtol: float
    ) -> None:
        self.name, self.body, self.launch, self.example, self.rtol = name, body, launch, example, rtol
        self.broken = False
        functools.update_wrapper(self, body)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self.broken and runs_kernels(_device(args)):
            try:
                result = self.launch(*args, **kwargs)
            except KernelUnavailable as error:
                self.broken = True
                _say_once(f"{error}: plain torch runs instead, which is slower")
            else:
                if result is not NotImplemented:
                    return result
        return self.body(*args, **kwargs)


OPS: dict[str, Op] = {}


def op(
    name: str, *, launch: Callable[P, Any], example: Callable[[int, torch.device], tuple], rtol: float = 0.0
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorate a reference with its launcher, and enter it into ``OPS``. Its first tensor argument names the device."""

    def register(body: Callable[P, R]) -> Op[P, R]:
        assert name not in OPS, f"two operations are called {name}"
        OPS[name] = made = Op(name, body, launch, example, rtol)
        return made

    return register


def scalar(dtype: torch.dtype) -> str | None:
    """The kernels' name of an element type, None for one that they do not take."""
    return SCALARS.get(dtype)


def _device(args: Sequence[object]) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)
