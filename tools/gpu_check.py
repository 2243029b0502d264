"""Prove the GPU path on this machine, in minutes, from the source tree alone.

    python tools/gpu_check.py                          everything, below 9 minutes on one GPU
    python tools/gpu_check.py --only kernels step      what a short lease is worth spending on
    python tools/gpu_check.py --json bench/results/h100/gpu_check.json

Each part is a list of checks that end as passed, FAILED, or "not run" with the reason: a package that is missing is
never a pass. Without a CUDA device the parts that can run on a CPU do, and the first line says so. Exit code 1 when a
check failed. Needs torch, NumPy, SciPy, safetensors, h5py and PyYAML; takes CuPy, DALI, zarr and compute-sanitizer
where they are installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # nothing needs to be installed

import torch  # noqa: E402

from fastsrgan.core.files import finite, write_json  # noqa: E402
from fastsrgan.core.system import provenance  # noqa: E402
from tools import gpu_parts  # noqa: E402
from tools.gpu_parts import Check, Context  # noqa: E402

PACKAGES = ("torch", "numpy", "cupy-cuda13x", "cupy-cuda12x", "nvidia-dali-cuda130", "zarr", "triton")
SYMBOLS = {True: "passed", False: "FAILED", None: "not run"}


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(gpu_parts.PARTS), metavar="PART", help="parts to run")
    parser.add_argument("--budget", type=float, default=90.0, metavar="S", help="seconds for each part (90)")
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:n or cpu (cuda)")
    parser.add_argument("--inside-sanitizer", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def machine(device: torch.device) -> dict[str, Any]:
    """What ran: device, driver, versions."""
    found: dict[str, Any] = {"python": platform.python_version(), "packages": {}}
    for name in PACKAGES:
        try:
            found["packages"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found["packages"][name] = None
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {"device": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver()}
    return found


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def run_part(name: str, context: Context) -> list[Check]:
    """All checks of a part until its time is up; what raises is a failed check, a missing package one not run."""
    done: list[Check] = []
    context.deadline = time.monotonic() + context.budget
    checks: Iterator[Check] = gpu_parts.PARTS[name](context)
    while True:
        began = time.monotonic()
        try:
            check = next(checks)
        except StopIteration:
            return done
        except ModuleNotFoundError as error:
            check = Check("imports", None, {"reason": str(error)})
        except Exception as error:  # whatever a driver or a library throws is a finding, and the other parts go on
            check = Check("unexpected error", False, {"reason": f"{type(error).__name__}: {error}"})
            traceback.print_exc()
        check.facts.setdefault("seconds", round(time.monotonic() - began, 3))
        done.append(check)
        shown = {k: v for k, v in check.facts.items() if not isinstance(v, dict)}  # whole reports are for the JSON
        told = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        print(f"{SYMBOLS[check.passed]:8} {name}: {check.name}  {told}", flush=True)
        if time.monotonic() > context.deadline:
            late = Check("the rest", None, {"reason": f"the part's {context.budget:.0f} s are over"})
            print(f"{SYMBOLS[None]:8} {name}: {late.name}  {late.facts['reason']}", flush=True)
            return [*done, late]


def main(argv: list[str]) -> int:
    """Run the parts, print a line for each check and a summary, write the report."""
    args = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: only what a CPU can check is run, and nothing of it says that the GPU path works")
        device = torch.device("cpu")
    context = Context(device, args.budget, inside_sanitizer=args.inside_sanitizer)
    began = time.monotonic()
    parts = {name: run_part(name, context) for name in args.only or gpu_parts.PARTS}
    every = [check for checks in parts.values() for check in checks]
    count = {SYMBOLS[kind]: sum(c.passed is kind for c in every) for kind in (True, False, None)}
    seconds = round(time.monotonic() - began, 1)
    print(f"{', '.join(f'{n} {what}' for what, n in count.items())} in {seconds} s on {device}")
    if args.json:
        report = {
            "check": "gpu_check",
            "command": ["python", "tools/gpu_check.py", *argv],
            "device": str(device),
            "machine": machine(device),
            "provenance": provenance(),
            "seconds": seconds,
            "count": count,
            "parts": {name: [vars(c) for c in checks] for name, checks in parts.items()},
        }
        os.makedirs(os.path.dirname(os.path.abspath(args.json)), exist_ok=True)
        write_json(args.json, finite(report))
    return 1 if count["FAILED"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
