"""Prove the GPU path on this machine, in at most 6 minutes, from the source tree alone.

    python tools/gpu_check.py --json $OUT/gpu_check.json       everything, the most important first
    python tools/gpu_check.py --only kernels step              what a short lease is worth spending on

Each part is a list of checks that end as passed, FAILED, or "not run" with the reason: a package that is missing, a
part that a device refuses, or time that is over is never a pass, and takes no other check with it. On CUDA each part
has a process of its own: an illegal access, after which a process can use its device no more, a crash or a call that
never returns costs that part alone. The report is written anew after every check, so one that is cut off still holds
what was found. Without a CUDA device, or with --device cpu, what a CPU can check is run and the rest is not run, for
want of one. Exit code 1 when a check failed.

Needs torch, NumPy and SciPy, and CuPy for the kernels; takes DALI and compute-sanitizer where they are installed. Only
the bench of the feed needs zarr and nibabel, as `fastsrgan train` and `infer` do. To a machine that has the former and
reaches no registry they travel as wheels, 6 MB for Python 3.12 (DALI's wheel has hundreds):

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux2014_x86_64 -d wheels zarr numcodecs msgspec donfig google-crc32c nibabel
    python -m pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=$PWD/site     # there
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # nothing needs to be installed

import torch  # noqa: E402

from fastsrgan.core.files import finite, read_json, write_json  # noqa: E402
from fastsrgan.core.system import pick_device, provenance  # noqa: E402
from fastsrgan.errors import FastsrganError  # noqa: E402
from tools import gpu_parts  # noqa: E402
from tools.gpu_parts import Check, Context  # noqa: E402

PACKAGES = ("torch", "numpy", "cupy-cuda13x", "cupy-cuda12x", "nvidia-dali-cuda130", "zarr", "triton")
STARTING, LEAVING = 8.0, 20.0  # seconds: of a part's process until it begins, and until it is ended by force
SYMBOLS = {True: "passed", False: "FAILED", None: "not run"}


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(gpu_parts.PARTS), metavar="PART", help="parts to run")
    parser.add_argument("--budget", type=float, default=330.0, metavar="S", help="seconds for all of it (330)")
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:n or cpu (cuda, where there is one)")
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


def run_part(name: str, context: Context, tell: Callable[[list[Check]], None] = lambda done: None) -> list[Check]:
    """All checks of a part until its time is up; ``tell`` gets them after each.

    What raises is a failed check, a refusal or a missing package one that was not run; the checks behind it go on.
    """
    done: list[Check] = []

    def add(check: Check) -> None:
        done.append(check)
        shown = {k: v for k, v in check.facts.items() if not isinstance(v, dict)}  # whole reports are for the JSON
        told = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        print(f"{SYMBOLS[check.passed]:8} {name}: {check.name}  {told}", flush=True)
        tell(done)

    planned = iter(gpu_parts.PARTS[name](context))
    while True:
        began = time.monotonic()
        check: Check | None = None
        if began > context.deadline:
            add(Check("the rest", None, {"reason": "not run: its share of the time is over"}))
            return done
        with found_out("unexpected error") as found:
            step = next(planned, None)
            if step is None:
                return done
            if isinstance(step, Check):
                check = step
            else:
                with found_out(step.name) as found:
                    check = step.call()
        check = check or found[0]
        check.facts.setdefault("seconds", round(time.monotonic() - began, 3))
        add(check)


@contextlib.contextmanager
def found_out(name: str) -> Iterator[list[Check]]:
    """A list that gets the check which an exception within is worth."""
    found: list[Check] = []
    try:
        yield found
    except (ModuleNotFoundError, FastsrganError) as error:
        found.append(Check(name, None, {"reason": f"not run: {error}"}))
    except Exception as error:  # whatever a driver or a library throws is a finding
        found.append(Check(name, False, {"reason": f"{type(error).__name__}: {error}"[:500]}))
        traceback.print_exc()


def run_alone(command: list[str], name: str, seconds: float, tell: Callable[[list[Check]], None]) -> list[Check]:
    """All checks of a part by a process that gets ``--json FILE`` too; ``tell`` gets what is in it, every second.

    A process that crashes, or does not end within ``seconds`` and ``LEAVING``, is one more check, which failed.
    """
    done: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "part.json"
        # A group and no session: what ends this process, as a lease does at its end, ends the part's too.
        process = subprocess.Popen([*command, "--json", str(report)], process_group=0)
        end, told = time.monotonic() + seconds + LEAVING, "did not come to its end"
        try:
            while time.monotonic() < end and process.returncode is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                    told = f"ended with {process.returncode}"
                if rows := read_json(report).get("parts", {}).get(name):
                    done = [Check(**row) for row in rows]
                    tell(done)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode not in (0, 1):
        done.append(Check("its process", False, {"reason": f"{told}: the checks behind the last one are lost"}))
        print(f"{SYMBOLS[False]:8} {name}: its process  {told}", flush=True)
    return done


def main(argv: list[str]) -> int:
    """Run the parts, print a line for each check and a summary, write the report."""
    args = parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: only what a CPU can check is run, and nothing of it says that the GPU path works")
        device = torch.device("cpu")
    if device.type == "cuda":
        device = pick_device(str(device))  # and is the current one from here on
    context = Context(device, args.budget, inside_sanitizer=args.inside_sanitizer)
    began = time.monotonic()
    names = [name for name in gpu_parts.PARTS if name in (args.only or gpu_parts.PARTS)]
    alone = device.type == "cuda" and len(names) > 1
    waiting = Check("all of it", None, {"reason": "not run: cut off before it began"})
    parts = {name: [waiting] for name in names}
    base = {
        "check": "gpu_check",
        "command": ["python", "tools/gpu_check.py", *argv],
        "device": str(device),
        "machine": machine(device),
        "provenance": provenance(),
    }

    def tell(name: str, done: list[Check]) -> None:
        parts[name] = [*done]
        if args.json:
            rows = {part: [vars(c) for c in checks] for part, checks in parts.items()}
            facts = {"seconds": round(time.monotonic() - began, 1), "count": count(parts), "parts": rows}
            write_json(args.json, finite(base | facts))

    if args.json:
        os.makedirs(os.path.dirname(os.path.abspath(args.json)), exist_ok=True)
    for i, name in enumerate(names):
        left = args.budget - (time.monotonic() - began)
        # A part may use what those before it left over, and leaves each one behind it some seconds.
        seconds = max(0.0, left - (8.0 + STARTING * alone) * (len(names) - i - 1))
        note = functools.partial(tell, name)
        if alone:
            command = [sys.executable, str(Path(__file__)), "--only", name, "--device", str(device)]
            seconds = max(1.0, seconds - STARTING)
            tell(name, run_alone([*command, "--budget", f"{seconds:.0f}"], name, seconds + STARTING, note))
            continue
        context.deadline = time.monotonic() + seconds
        tell(name, run_part(name, context, note))
    found = count(parts)
    seconds = round(time.monotonic() - began, 1)
    print(f"{', '.join(f'{n} {what}' for what, n in found.items())} in {seconds} s on {device}")
    return 1 if found["FAILED"] else 0


def count(parts: dict[str, list[Check]]) -> dict[str, int]:
    """How many checks passed, failed, were not run."""
    return {SYMBOLS[k]: sum(c.passed is k for checks in parts.values() for c in checks) for k in (True, False, None)}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
