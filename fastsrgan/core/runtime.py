"""What every long job needs around its work: keyed randomness, atomic files, devices, progress, provenance."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastsrgan.core.temporary import remove_abandoned, temporary_name
from fastsrgan.core.units import human
from fastsrgan.errors import InputError, ResourceError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

log = logging.getLogger("fastsrgan")

MOST_JSON = 64 * 2**20  # bytes of a JSON file that is read
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits))


# --- randomness ---------------------------------------------------------------------------------------------------


def rng(seed: int, *key: int | str) -> np.random.Generator:
    """A counter-based generator that depends on (seed, key) alone: the same bits on any rank, device or resume point.

    ``rng(seed, epoch, subject, "noise")`` names a draw by what it is for, so no draw depends on the ones before it.
    """
    import numpy as np

    text = json.dumps([int(seed), *key]).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))


# --- files --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it is synced and renamed, on failure removed.

    Raises ResourceError when the folder is missing or not writable, the disk is full, or ``path`` is a device or pipe.
    """
    path = Path(path)
    if is_special(path):  # renaming a file onto it would put the file in place of a pipe, or of /dev/null
        raise ResourceError(path, "is not a regular file", "name a file")
    temporary = temporary_name(path)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # a disk that cannot be written to says so for what is not there too
                temporary.unlink(missing_ok=True)


def disk_error(error: OSError, path: Path) -> Exception:
    """The ResourceError that says what an operating-system error means for a user; other errors unchanged."""
    if error.errno == errno.EFBIG:
        hint = "raise it, ulimit -f tells it, or choose a disk of another format"
        return ResourceError(path, "no space left: larger than the limit on the size of a file", hint)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(existing_parent(path)).free
        return ResourceError(
            path, f"no space left on the disk, {human(free)} free", "free space or choose another folder"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return ResourceError(path, "cannot be written", "check the permissions or choose another folder")
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EINVAL):
        return ResourceError(path, f"cannot be written: {(error.strerror or '').lower()}", "choose another folder")
    if error.errno == errno.EISDIR:
        return ResourceError(path, "is a folder", "name a file")
    if error.errno == errno.ENOENT and path.parent.is_dir():
        return ResourceError(path, "cannot be written here", "choose another folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST) or (error.errno == errno.ENOENT and not path.parent.is_dir()):
        return ResourceError(path, "its folder is missing or is a file", "create the folder or choose another one")
    return error


def existing_parent(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    path = Path(path).absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def need_space(path: str | os.PathLike, needed: int) -> None:
    """Refuse to begin what the disk of ``path`` cannot hold, ``needed`` bytes. Raises ResourceError."""
    free = shutil.disk_usage(existing_parent(Path(path))).free
    if free < needed:
        told = f"no space left on the disk: needs {human(needed)}, {human(free)} free"
        raise ResourceError(path, told, "free space or choose another folder")


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_folder(path: str | os.PathLike) -> Path:
    """Create ``path`` if need be and make sure that a file can be written there, before any work starts.

    Raises ResourceError, and UsageError for a URL.
    """
    if url := url_of(path):
        raise UsageError(url, "is a URL, this is written to a folder", "name a folder")
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(path / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        if os.path.exists(path) and not os.path.isdir(path):
            raise ResourceError(path, "is a file, a folder is needed", "choose another output folder") from error
        raise disk_error(error, path) from error
    return path


def output_file(path: str | os.PathLike) -> Path:
    """Make sure that a file can be written in its folder, before any work starts.

    What killed processes left of it under temporary names is taken away.
    Raises UsageError for a folder, a device, a pipe or a URL, ResourceError where the folder is missing or cannot be
    written.
    """
    path = Path(path)
    if url := url_of(path):
        raise UsageError(url, "is a URL, this is written to a file", "name a file")
    if os.path.isdir(path):
        raise UsageError(path, "is a folder", f"name a file, {path / 'NAME'}")
    if is_special(path):
        raise UsageError(path, "is not a regular file", "name a file")
    folder = path.absolute().parent
    if not os.path.isdir(folder):
        reason = "its folder is a file" if os.path.exists(folder) else "its folder is missing"
        raise ResourceError(path, reason, "create the folder or choose another one")
    output_folder(folder)
    remove_abandoned(folder, [path.name])
    return path


def is_special(path: str | os.PathLike) -> bool:
    """Whether a path is a pipe, a device or a socket, of which reading may never end; False for what is not there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def url_of(path: str | os.PathLike) -> str | None:
    """The URL that a path was before it was taken for a path, which leaves one slash of two; None where it was none."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+:)(?:/+(.*))?$", os.fspath(path))
    if found and os.path.isdir(found[1]):  # a folder of such a name
        return None
    return f"{found[1]}//{found[2] or ''}" if found else None


def real(path: str | os.PathLike) -> Path:
    """A path without links. Unlike ``Path.resolve`` it does not fail at a link to itself."""
    return Path(os.path.realpath(path))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null, since JSON has none."""
    with atomic_write(path) as temporary:
        text = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf8", errors="surrogateescape")  # bytes of file names as they are


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or none that can be read."""
    try:
        if is_special(path) or os.path.getsize(path) > MOST_JSON:
            return {}
        return parse_json(Path(path).read_bytes().decode("utf-8-sig", "surrogateescape"))  # as write_json writes
    except (OSError, ValueError):
        return {}


def mapping(value: Any) -> dict[str, Any]:
    """A value that should be a JSON object; empty where it is none."""
    return value if isinstance(value, dict) else {}


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is; empty where it is none, whatever it is."""
    try:
        value = _DECODER.decode(text if isinstance(text, str) else text.decode("utf8"))
    except (ValueError, RecursionError):
        return {}
    return mapping(value)


def finite(value: Any) -> Any:
    """``value`` with NumPy numbers made plain, paths made text, and non-finite floats made None, recursively."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, os.PathLike):
        return str(value)
    if hasattr(value, "tolist"):  # arrays and numbers of NumPy, which is not loaded for others
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- devices ------------------------------------------------------------------------------------------------------


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


# --- progress -----------------------------------------------------------------------------------------------------


class Progress(Protocol):
    """What a long job tells about itself; the command line shows it, a library caller may ignore it."""

    def start(self, label: str, total: int, unit: str) -> None:
        """A new stretch of ``total`` units of work begins."""

    def advance(self, n: int = 1, **facts: Any) -> None:
        """``n`` more units are done; ``facts`` are live values worth showing (losses, rates)."""

    def finish(self) -> None:
        """The stretch ended, done or not."""


class _Quiet:
    def start(self, label: str, total: int, unit: str) -> None: ...

    def advance(self, n: int = 1, **facts: Any) -> None: ...

    def finish(self) -> None: ...


QUIET: Progress = _Quiet()


# --- provenance ---------------------------------------------------------------------------------------------------


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


def walk_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Every file below a folder, by name, folders that are links included; each real folder once, no hidden ones.

    A link that leads nowhere is a path too: reading it says so. Raises InputError for a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        reason = f"cannot be listed: {error.strerror or error}"
        raise InputError(error.filename or folder, reason, "check its permissions, or move it away") from error

    seen: set[str] = set()
    for where, below, names in os.walk(os.fspath(folder), onerror=refuse, followlinks=True):
        place = os.path.realpath(where)
        if place in seen:
            below[:] = []
            continue
        seen.add(place)
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names))
