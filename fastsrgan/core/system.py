"""The machine: devices, memory that is free or was not to be had, types of numbers, versions.

Loads torch only where a function needs it, so that what stands at the start of a command can import it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastsrgan.core.processor import processor
from fastsrgan.errors import ResourceError, UsageError, out_of_memory

if TYPE_CHECKING:
    import torch

log = logging.getLogger("fastsrgan")


def pick_device(name: str = "auto") -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:n`` -> device. UsageError for others, ResourceError where CUDA is absent or
    refuses.

    A CUDA device becomes the current one of this process, before anything opens a context: a rank whose work named no
    device would otherwise open one on GPU 0 too, and take its memory.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return _current(torch.device("cuda"))
        log.info("no CUDA device: running on the CPU")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError("--device", f"{name!r} is no device", "auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            reason = f"{name} asked, {count} CUDA devices seen"
            raise ResourceError("--device", reason, "--device cpu, or see `fastsrgan doctor`")
        return _current(device)
    elif device.type != "cpu":
        raise UsageError("--device", f"{name!r} is not supported", "auto, cpu, cuda or cuda:0")
    return device


def _current(device: torch.device) -> torch.device:
    import torch

    try:
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
    except RuntimeError as error:  # another process has it for itself, its memory is full, the driver refuses it
        reason = f"cannot be used: {str(error).splitlines()[0]}"
        raise ResourceError(str(device), reason, "see `fastsrgan doctor`, or --device cpu") from error
    return device


@contextlib.contextmanager
def memory_of(device: torch.device) -> Iterator[None]:
    """Within, memory that a CUDA device lacks is a ResourceError that names it, in place of torch's own error."""
    try:
        yield
    except RuntimeError as error:
        if device.type != "cuda" or not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0].partition(" Including")[0].rstrip(".")
        hint = "end what else is on it (nvidia-smi shows it), a smaller patch or batch, or --device cpu"
        raise ResourceError(str(device), reason, hint) from error


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


def measured_on() -> dict[str, Any]:
    """Where a figure was measured: the source commit, with ``-dirty`` behind it where there were changes that it does
    not hold, and the machine's processor and cores."""
    return {"commit": source_commit(), "machine": {"cpu": processor(), "cores": os.cpu_count()}}


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
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


# --- memory -------------------------------------------------------------------------------------------------------


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process may still take: on a CUDA device, or on the host.

    The host's are what the machine has free, within the limits of the control groups (v1 and v2, of containers and of
    batch jobs) and of the process itself (``ulimit -v``, ``-d``).
    """
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.empty_cache()  # else what torch keeps of the volume before would count as taken
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    free += [1024 * n for n in (_kilobytes("/proc/meminfo", "MemAvailable"),) if n is not None]
    free += [max(0, most - used) for most, used in _group_limits()]
    for what, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, taken = resource.getrlimit(what)[0], _kilobytes("/proc/self/status", field)
        if soft != resource.RLIM_INFINITY and taken is not None:
            free.append(max(0, soft - 1024 * taken))
    return min(free)


def total_memory() -> int:
    """Bytes of the host that this process could have were nothing else on it: the machine's, or its groups' limit."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(most for most, _ in _group_limits())])


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each control group that has a limit: of a container, and of the job within."""
    own = {"": ["/"], "memory": ["/"]}
    for line in _lines("/proc/self/cgroup"):
        _, controllers, place = (line.split(":", 2) + ["", ""])[:3]
        for kind in {"", "memory"} & set(controllers.split(",")):
            own[kind] += [str(folder) for folder in (PurePosixPath(place), *PurePosixPath(place).parents)]
    for kind, top, limit, usage in (
        ("", "/sys/fs/cgroup", "memory.max", "memory.current"),
        ("memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for place in dict.fromkeys(own[kind]):
            folder = f"{top}{place}".rstrip("/")
            most, used = (_number(f"{folder}/{name}") for name in (limit, usage))
            if most is not None and used is not None and most < 2**60:  # v1 writes "none" as a number near 2^63
                yield most, used


def _kilobytes(path: str, field: str) -> int | None:
    words = [line.split() for line in _lines(path) if line.startswith(f"{field}:")]
    return int(words[0][1]) if words else None


def _lines(path: str) -> Sequence[str]:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ()


def _number(path: str) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None
