"""Kernels on the CPU: g++ compiles the text of a .cu behind kernels/host/cuda_on_host.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsrgan.core import kernels as backend

HEADERS = Path(__file__).parent.parent / "kernels" / "host"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]


def need(tool: str | None, what: str) -> None:
    """Go on only with a tool; without it the test is skipped, with ``what`` as the reason."""
    if not tool:
        pytest.skip(what)


_COMPILING = threading.Lock()  # callers on several threads would write one file at once


class Host:
    """Runs kernels on CPU tensors; takes the place of CuPy in ``backend.RUNNERS``.

    folder : where compiled kernels are kept
    backwards : the last thread runs first
    ran : (name, defines) of every kernel that was run
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.backwards = folder, False
        self.ran: list[tuple[str, dict[str, object]]] = []

    def __call__(
        self,
        name: str,
        grid: tuple[int, int, int],
        args: Sequence[backend.Argument],
        defines: dict[str, object],
    ) -> None:
        with _COMPILING:
            library = _load(self.folder, name, backend.define_options(defines))
        values = [self._value(a) for a in args]
        assert library.arguments() == len(values), f"{name} takes {library.arguments()} arguments, not {len(values)}"
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values))
        library.run((ctypes.c_uint * 3)(*grid), backend.BLOCK, pointers, int(self.backwards))
        self.ran.append((name, dict(defines)))

    @staticmethod
    def _value(argument: backend.Argument) -> ctypes.c_void_p | ctypes.c_longlong:
        if isinstance(argument, torch.Tensor):
            assert argument.device.type == "cpu"
            return ctypes.c_void_p(argument.data_ptr())
        return ctypes.c_void_p(None) if argument is None else ctypes.c_longlong(argument)


@functools.cache
def _load(folder: Path, name: str, options: tuple[str, ...]) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    need(compiler, "g++ is not installed: kernels cannot be run on the CPU")
    text = f'#include "cuda_on_host.h"\n{backend.kernel_source(name)}\nHOST_ENTRY({name})\n'
    defines = [o for o in options if o.startswith("-D")]
    stem = folder / hashlib.sha256(repr((text, defines)).encode()).hexdigest()[:16]
    stem.with_suffix(".cpp").write_text(text, encoding="utf8")
    command = [str(compiler), *FLAGS, *defines, f"-I{HEADERS}", str(stem.with_suffix(".cpp")), "-o", str(stem)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, f"{name} {defines}:\n{done.stderr}"
    return ctypes.CDLL(str(stem))


# --- comparing ----------------------------------------------------------------------------------------------------


def reference(call: Callable[[], Any]) -> Any:
    """The plain bodies' result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSRGAN_REFERENCE", "1")
        return call()


def fuses() -> bool:
    """Whether torch's addcmul rounds once here, as the kernel does: on processors with FMA and not elsewhere."""
    a = torch.full((8,), 1 + 2**-12)
    return bool((torch.full((8,), -1.0).addcmul_(a, a) != a * a - 1).all())


def equal_within(a: torch.Tensor, b: torch.Tensor, rtol: float = 0.0) -> bool:
    """Equal bits but for the sign of zeros, or equal within ``rtol`` of the largest value; NaN equals nothing."""
    return torch.equal(a, b) or bool(rtol and (a - b).abs().max() <= rtol * b.abs().max())


def exactness() -> float:
    """The ``rtol`` to ask of sums."""
    return 0.0 if fuses() else 1e-6  # found: 1.2e-7


def guarded(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A tensor of NaN within a larger one, and whether what surrounds it is untouched."""
    edge, n = 257, int(np.prod(shape))
    memory = torch.full((n + 2 * edge,), torch.nan, dtype=dtype)
    around = torch.cat([memory[:edge], memory[-edge:]])
    around.fill_(-3)
    memory[:edge], memory[-edge:] = -3, -3
    return memory[edge : edge + n].view(shape), lambda: torch.equal(torch.cat([memory[:edge], memory[-edge:]]), around)
