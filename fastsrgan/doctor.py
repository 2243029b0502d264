"""What this machine offers and what of it fastsrgan will use: the facts behind ``fastsrgan doctor``.

Optional packages and CUDA are tried in a process of their own, so an installation that crashes, hangs or lacks a
library becomes a line of the report. The network is never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastsrgan._version import __version__
from fastsrgan.core.system import free_memory, total_memory
from fastsrgan.errors import brief, counted, human
from fastsrgan.model.arithmetic import native, pick_precision, slow_cudnn, training_type
from fastsrgan.model.cpu import forms

PACKAGES = ("torch", "numpy", "scipy", "nibabel", "zarr", "numcodecs", "safetensors", "h5py", "nilearn", "matplotlib")
SMALL_SHM = 64 * 2**20  # what Docker gives a container unless told otherwise
LITTLE_MEMORY = 4 * 2**30
PROBE_SECONDS = 60.0
NO_FACTS = {"name": None, "memory_bytes": None, "capability": None}  # of a device that does not answer

_TORCH_PROBE = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({"count": count, "cudnn": torch.backends.cudnn.version() if count else None}))
"""
# Of one device, in a process of its own: what a broken one leaves behind fails whatever follows in its process.
_DEVICE_PROBE = """
import json, torch
p = torch.cuda.get_device_properties({i})
assert float(torch.ones(8, device="cuda:{i}").sum()) == 8, "8 ones have another sum"
print(json.dumps(dict(name=p.name, memory_bytes=p.total_memory, capability=f"{{p.major}}.{{p.minor}}")))
"""
_CUPY_PROBE = """
import json, cupy
n = cupy.cuda.runtime.getDeviceCount()
print(json.dumps(bool(n and float(cupy.ones(8).sum()) == 8)))
"""
_DALI_PROBE = """
import json
from nvidia.dali import fn, pipeline
def run(device_id, device):
    pipe = pipeline.Pipeline(batch_size=1, num_threads=1, device_id=device_id)
    with pipe:
        pipe.set_outputs(fn.constant(fdata=1.0, shape=[8], device=device))
    pipe.build()
    pipe.run()
run(None, "cpu")
try:
    run(0, "gpu")
    print(json.dumps(True))
except RuntimeError:
    print(json.dumps(False))
"""


@dataclass(frozen=True)
class Part:
    """An optional package: what it is for, the distributions that bring it, and a program that tries it."""

    purpose: str
    distributions: tuple[str, ...]
    extra: str
    probe: str
    on_device: bool = False


OPTIONAL = {
    "cupy": Part("CUDA kernels", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "cuda13 or cuda12", _CUPY_PROBE, True),
    "dali": Part("data feed", ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "cuda13, dali", _DALI_PROBE, True),
    "tensorstore": Part("fast store reading", ("tensorstore",), "tensorstore", "import tensorstore; print('null')"),
    "s3fs": Part("stores on S3", ("s3fs",), "s3", "import s3fs; print('null')"),
    "pydicom": Part("DICOM input", ("pydicom",), "dicom", "import pydicom; print('null')"),
    "SimpleITK": Part(
        "NRRD, MetaImage, the original's interpolators", ("SimpleITK",), "sitk", "import SimpleITK; print('null')"
    ),
}


def diagnose() -> dict[str, Any]:
    """Everything ``describe`` shows, as plain values that JSON can hold.

    Keys: fastsrgan, python, platform, packages (name -> version or None), cpu, memory, shm (bytes, None without
    /dev/shm), gpu, optional (name -> version, sees_device, problem, purpose, extra), weights (list of name and bytes),
    layer_forms (modes, machine, file, layers timed on this machine), plan (what runs where), warnings (what a user
    should know or change).
    """
    facts: dict[str, Any] = {
        "fastsrgan": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "memory": {"total": total_memory(), "available": free_memory()},
        "shm": _shm(),
        "gpu": _gpu(),
        "optional": {name: _optional(part) for name, part in OPTIONAL.items()},
        "weights": _weights(),
        "layer_forms": forms.facts(),
    }
    facts["plan"] = plan(facts)
    facts["warnings"] = warnings(facts)
    return facts


def plan(facts: dict[str, Any]) -> dict[str, str]:
    """What ``--device auto`` does with these facts: where training, inference, stitching and the data feed run."""
    devices = facts["gpu"]["devices"]
    if devices and devices[0]["problem"]:
        return dict.fromkeys(("training", "inference", "stitching", "data feed"), "cuda:0, which cannot be used")
    kind = "cuda" if devices else "cpu"
    where = f"cuda ({devices[0]['name']})" if devices else f"cpu, {counted(facts['cpu']['torch_threads'], 'thread')}"
    form = ""
    if devices:
        kernels = facts["optional"]["cupy"]["sees_device"] and os.environ.get("FASTSRGAN_REFERENCE", "0") in ("", "0")
        form = " by CUDA kernels" if kernels else " by plain torch"
    training = "fp32"
    if devices:
        training = training_type(*(int(n) for n in str(devices[0]["capability"]).split(".")))
    return {
        "training": f"{training} on {where}",
        "inference": f"{pick_precision('auto', torch.device(kind))} on {where}",
        "stitching": f"float32 sums on {where}{form}",
        "data feed": f"a CPU thread reads and degrades ahead; volumes stay in the memory of {kind}",
    }


def warnings(facts: dict[str, Any]) -> list[str]:
    """What stands in the way of a good run, each with what to do about it."""
    found = list(_gpu_warnings(facts["gpu"], facts["packages"]["torch"]))
    missing = [name for name, version in facts["packages"].items() if version is None]
    if missing:
        found.append(f"not installed: {', '.join(missing)} (reinstall fastsrgan)")
    for name, part in facts["optional"].items():
        if part["problem"]:
            found.append(f"{name} {part['version']} is installed but unusable: {part['problem']}")
    cuda = {d for name in ("cupy", "dali") for d in facts["optional"][name]["distributions"] if d != "cupy"}
    if any("cuda12" in d for d in cuda) and any("cuda13" in d for d in cuda):
        found.append(f"extras cuda12 and cuda13 are both installed ({', '.join(sorted(cuda))}): uninstall one of them")
    if facts["shm"] is not None and facts["shm"] <= SMALL_SHM:
        found.append(f"/dev/shm has only {_size(facts['shm'])}: start the container with --shm-size=8g")
    if facts["memory"]["available"] is not None and facts["memory"]["available"] < LITTLE_MEMORY:
        found.append(f"{_size(facts['memory']['available'])} of memory are free: take small patches and batches")
    if not facts["weights"]:
        hint = "name a file with --weights, or reinstall fastsrgan"
        found.append(f"no weights are shipped with this installation: {hint}")
    return found


INDENT = 12  # letters before what a line of ``describe`` says


def describe(facts: dict[str, Any]) -> list[str]:
    """The lines of ``fastsrgan doctor`` for what ``diagnose`` returned."""
    cpu, memory, gpu = facts["cpu"], facts["memory"], facts["gpu"]
    threads = counted(cpu["torch_threads"], "thread")
    packages = [f"{name} {version or 'missing'}" for name, version in facts["packages"].items()]
    rows = [
        ("fastsrgan", f"{facts['fastsrgan']} on Python {facts['python']}, {facts['platform']}"),
        ("packages", "  ".join(packages[:5])),
        ("", "  ".join(packages[5:])),
        ("cpu", f"{cpu['model']}, {cpu['usable']} of {counted(cpu['count'], 'core')}, {threads} in torch"),
        ("", f"native bf16: {'yes' if cpu['bf16'] else 'no'}"),
        ("memory", f"{_size(memory['available'])} free of {_size(memory['total'])}"),
        ("/dev/shm", _size(facts["shm"]) if facts["shm"] is not None else "none"),
        ("gpu", f"NVIDIA driver {gpu['driver'] or 'not found'}, CUDA in torch {gpu['torch_cuda'] or 'none'}"),
    ]
    for i, device in enumerate(gpu["devices"]):
        if device["problem"]:
            rows.append(("", f"cuda:{i} cannot be used: {device['problem']}"))
            continue
        size, capability = _size(device["memory_bytes"]), f"capability {device['capability']}"
        rows.append(("", f"cuda:{i} {device['name']}, {size}, {capability}"))
    rows += [("optional" if i == 0 else "", line) for i, line in enumerate(_optional_lines(facts["optional"]))]
    shipped = ", ".join(f"{w['name']} ({w['bytes'] / 1e6:.1f} MB)" for w in facts["weights"])
    rows.append(("weights", shipped or "none shipped"))
    rows += [("layer forms" if i == 0 else "", line) for i, line in enumerate(_forms_lines(facts["layer_forms"]))]
    rows += [("runs" if i == 0 else "", f"{what}: {how}") for i, (what, how) in enumerate(facts["plan"].items())]
    lines = [f"{title:{INDENT}}{text}" for title, text in rows]
    return lines + [f"warning: {text}" for text in facts["warnings"]]


# --- looking ------------------------------------------------------------------------------------------------------


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    features: dict = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may not have it
    return {
        "model": features.get("cpu_name") or platform.processor() or platform.machine(),
        "count": os.cpu_count() or 1,
        "usable": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "bf16": native("bf16"),
    }


def _usable_cores() -> float:
    """Cores this process may run on: affinity, and a container's quota, which may be a fraction."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, int(quota) / int(period))
    return int(cores) if cores == int(cores) else round(cores, 2)


def _shm() -> int | None:
    try:
        place = os.statvfs("/dev/shm")
    except OSError:
        return None
    return place.f_frsize * place.f_blocks


def _gpu() -> dict[str, Any]:
    """Driver, torch's CUDA version, what went wrong, and the devices: each with what it is, and ``problem``, None where
    it computed something."""
    found: dict[str, Any] = {"driver": driver(), "torch_cuda": torch.version.cuda, "cudnn": None}
    found |= {"devices": [], "problem": None}
    if found["torch_cuda"] is not None:
        answer, found["problem"] = probe(_TORCH_PROBE)
        seen = answer or {"count": 0, "cudnn": None}
        found["cudnn"] = seen["cudnn"]
        with ThreadPoolExecutor(max(seen["count"], 1)) as pool:
            tried = pool.map(lambda i: probe(_DEVICE_PROBE.format(i=i)), range(seen["count"]))
            found["devices"] = [{**NO_FACTS, **(facts or {}), "problem": problem} for facts, problem in tried]
    return found


def driver() -> str | None:
    """Release of the NVIDIA driver, None without one."""
    if command := shutil.which("nvidia-smi"):
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
            if release := re.match(r"\d+\.[\d.]+", done.stdout):
                return release[0]
    release = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _read("/proc/driver/nvidia/version") or "")
    return release[0] if release else None


def _optional(part: Part) -> dict[str, Any]:
    installed = [d for d in part.distributions if _version(d) is not None]
    facts: dict[str, Any] = {
        "version": _version(installed[0]) if installed else None,
        "distributions": installed,
        "sees_device": None,
        "problem": None,
        "purpose": part.purpose,
        "extra": part.extra,
    }
    if installed:
        answer, facts["problem"] = probe(part.probe)
        if part.on_device:
            facts["sees_device"] = answer is True
    return facts


def probe(program: str, seconds: float = PROBE_SECONDS) -> tuple[Any, str | None]:
    """Run a Python program whose last line of output is JSON: (its value, None), or (None, what went wrong)."""
    command = [sys.executable, "-P", "-c", program]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer after {seconds:g} s"
    except OSError as error:
        return None, str(error)
    if done.returncode < 0:
        return None, f"crashed with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1].strip() if lines else f"ended with {done.returncode}"
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), None
    except (IndexError, ValueError):
        return None, f"unexpected answer {done.stdout.strip()[-80:]!r}"


def _weights() -> list[dict[str, Any]]:
    folder = Path(__file__).parent / "models"
    return [{"name": p.name, "bytes": p.stat().st_size} for p in sorted(folder.glob("*.safetensors"))]


# --- saying -------------------------------------------------------------------------------------------------------


def _gpu_warnings(gpu: dict[str, Any], torch_version: str | None) -> list[str]:
    if gpu["devices"]:
        working = [i for i, device in enumerate(gpu["devices"]) if not device["problem"]]
        hint = f"--device cuda:{working[0]}" if working else "--device cpu"
        broken = [f"cuda:{i} cannot be used: {d['problem']}" for i, d in enumerate(gpu["devices"]) if d["problem"]]
        slow = slow_cudnn(gpu["cudnn"]) if working else None
        return [f"{line} ({hint})" for line in broken] + ([slow] if slow else [])
    if gpu["problem"]:
        return [f"CUDA {gpu['torch_cuda']} of torch {torch_version} cannot be used: {gpu['problem']}"]
    if gpu["driver"] is None:
        return []
    if gpu["torch_cuda"] is None:
        return [
            f"NVIDIA driver {gpu['driver']} is there, but torch {torch_version} is a build for the CPU: "
            "run `make clean setup`, or install torch for CUDA"
        ]
    hint = "the driver may be too old for it, or CUDA_VISIBLE_DEVICES hides the GPU"
    return [f"NVIDIA driver {gpu['driver']} is there, but CUDA {gpu['torch_cuda']} of torch sees no GPU: {hint}"]


def _optional_lines(optional: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, part in optional.items():
        if part["version"] is None:
            state = f"not installed (extra {part['extra']})"
        elif part["problem"]:
            state = f"{part['version']}, unusable"
        else:
            state = part["version"] + {None: "", True: ", sees the GPU", False: ", sees no GPU"}[part["sees_device"]]
        lines.append(f"{name}: {state} - {part['purpose']}")
    return lines


def _forms_lines(found: dict[str, Any]) -> list[str]:
    where = found["file"] or "no folder to keep times in"
    modes = f"{found['training']} in training, {found['inference']} in inference ({forms.VARIABLE})"
    lines = [f"{modes}, {len(found['layers'])} timed on this machine, {where}"]
    for layer, row in found["layers"].items():
        times = ", ".join(f"{form} {brief(1e3 * seconds, 2)} ms" for form, seconds in row["seconds"].items())
        lines.append(f"{layer}: {row['form']} ({times})")
    return lines


def _size(n: int | None) -> str:
    return "unknown" if n is None else human(n)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf8", errors="replace")
    except OSError:
        return None
