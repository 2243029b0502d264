"""The machine: devices, memory that is free or was not to be had, types of numbers, versions.

Loads torch only where a function needs it, so that what stands at the start of a command can import it.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fastsrgan.errors import ResourceError

if TYPE_CHECKING:
    import torch


log = logging.getLogger("fastsrgan")


def pick_device(name: str = "auto") -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:n`` -> device. Asking for CUDA where there is none is a ResourceError."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        log.info("no CUDA device: running on the CPU")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ResourceError("--device", f"{name!r} is no device", "auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ResourceError(
                "--device", f"{name} asked, {count} CUDA devices seen", "--device cpu, or see `fastsrgan doctor`"
            )
    elif device.type != "cpu":
        raise ResourceError("--device", f"{name!r} is not supported", "auto, cpu, cuda or cuda:0")
    return device


def tune_allocator() -> bool:
    """Tell glibc to keep freed memory instead of returning it to the system at every step.

    Large activations are otherwise mapped, zeroed and unmapped anew at each use. Returns False where the C library has
    no ``mallopt``. Call once, at start, in a process
    that trains or infers on the CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))


def provenance() -> dict[str, str | None]:
    """Versions of what computed a result, the platform and the source commit where it is known."""
    facts: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("fastsrgan", "torch", "numpy", "scipy", "zarr", "nibabel"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    facts["commit"] = source_commit()
    return facts


def source_commit() -> str | None:
    """The git commit of the checkout the package runs from, or None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


# What the system's loader and libraries say where there is no room for them; their errors have no type of their own.
_NO_ROOM = ("failed to map segment", "cannot allocate memory", "can't allocate memory", "bad_alloc")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was made of, is about memory that was not to be had."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False
