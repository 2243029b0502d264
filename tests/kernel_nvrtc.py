"""NVRTC from its wheel: CUDA text -> PTX or machine code, without a device, a driver or a toolkit."""

from __future__ import annotations

import ctypes
import functools
from importlib import metadata
from pathlib import Path

from kernel_host import need

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")


@functools.cache
def _library() -> ctypes.CDLL:
    files = next(filter(None, map(_files, PACKAGES)), [])
    path = next((p for p in files if p.name.startswith("libnvrtc.so")), None)
    need(str(path or ""), "nvidia-cuda-nvrtc is not installed (extra dev): kernels cannot be compiled for GPUs")
    for built_in in files:  # older releases look for it on the loader's path only, where a wheel does not put it
        if built_in.name.startswith("libnvrtc-builtins.so"):
            ctypes.CDLL(str(built_in), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _files(package: str) -> list[Path]:
    try:
        return [Path(str(f.locate())) for f in metadata.files(package) or []]
    except metadata.PackageNotFoundError:
        return []


def compile_for(source: str, name: str, architecture: str, options: tuple[str, ...]) -> bytes:
    """Compile for "sm_90" (machine code) or "compute_90" (PTX). A failure is an AssertionError with NVRTC's log."""
    nvrtc, program = _library(), ctypes.c_void_p()
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    flags = [o.encode() for o in (f"--gpu-architecture={architecture}", *options)]
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        said = _text(nvrtc, program, "ProgramLog").decode().strip("\0\n")
        assert not status, f"{name} for {architecture}: {nvrtc.nvrtcGetErrorString(status).decode()}\n{said}"
        assert not said, f"{name} for {architecture}: {said}"  # warnings
        return _text(nvrtc, program, "CUBIN" if architecture.startswith("sm_") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert not nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    assert not nvrtc[f"nvrtcGet{what}"](program, text)
    return text.raw
