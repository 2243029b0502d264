"""What a figure of this project must have behind it.

A case is one piece of work done by several sides: fastsrgan first, then its peers, all in this process and on the same
inputs. First every side runs once, which warms it up, and its result is compared with ours: beyond the stated
tolerance there are no times. Then the sides take turns, so that whatever else the machine does meets them alike;
medians are reported with the smallest and largest time. Peak memory is measured in a process per side.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from scipy import ndimage

from fastsrgan.cli.console import say
from fastsrgan.core.draws import rng
from fastsrgan.core.files import finite, write_json
from fastsrgan.core.system import measured_on, pick_device, provenance, tune_allocator
from fastsrgan.errors import UsageError, brief, counted

__all__ = ["Case", "Sides", "peak_of", "prepare", "run", "texture", "write_json"]

ROOT = Path(__file__).resolve().parent.parent
NOTES = [
    "seconds: wall clock of one call; min and max over the repeats are the spread",
    "cpu_seconds_median: CPU time of all threads; far below seconds times threads in use, others had the machine",
    "ratio_to: the peer's median over ours; ratio_range: smallest and largest ratio of one round; end to end: of any"
    " epoch of ours and any of the peer's",
    "max_error: largest difference from any peer or the known truth, relative to the other array's largest magnitude;"
    " of gradients: Euclidean norm of the difference relative to the norm, the worst tensor",
    "peak_bytes: growth of the process (CUDA: of torch's memory) during one call, inputs and parameters not counted",
    "core.system.tune_allocator, a part of fastsrgan, is on for all sides: it cannot be taken back in a process",
    "float32 without TF32 on all sides",
]

NAIVE = (
    "Naive: the same networks, losses and updates in plain eager PyTorch, as one would carefully write them from the "
    "paper (`bench/naive.py`), contiguous in memory unless channels last is said"
)

# Sides that do other work than ours, by the beginning of their names, and what is other.
OTHER_WORK = {
    "nnU-Net style": "sums tiles and weights in half precision, which loses small weights: some voxels become others",
    "torchio, linear": "interpolates linearly, not by a cubic spline",
    "monai, trilinear": "interpolates linearly, not by a cubic spline",
    "torchio of ": "takes a part of a volume's patches each time that it is degraded, fastsrgan all",
    "monai of ": "takes a part of a volume's patches each time that it is degraded, fastsrgan all",
}
END_TO_END, CROPPED = "end to end", ", cropped"
AIR_TOO = (
    "reads .nii.gz and interpolates whole volumes in each epoch, and takes patches from the air too; fastsrgan reads a"
    " store that was converted before and interpolates the head's box"
)


def other_work(side: str, case: str = "") -> list[str]:
    """What a side of a case does otherwise, so that its ratio compares no equal work; else nothing."""
    found = [text for start, text in OTHER_WORK.items() if side.startswith(start)]
    whole = side.startswith(("torchio", "monai")) and not side.endswith(CROPPED)
    return [*found, AIR_TOO] if whole and case.startswith(END_TO_END) else found


def marked(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the sides marked † do otherwise, a line for each difference."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for peer in row["peers"]:
            for text in other_work(peer, row["name"]):
                found.setdefault(text, {})[peer] = None
    return [f"† {'; '.join(peers)}: {text}" for text, peers in found.items()]


Sides = Mapping[str, Callable[[], Sequence[Any]]]


class Turn(NamedTuple):
    """One timed call: wall clock, and CPU time of all threads of the process."""

    seconds: float
    cpu_seconds: float


TRUTH = "truth"  # a side that is compared with, but is no peer: what the result has to be by law


@dataclass(frozen=True)
class Case:
    """One comparison.

    name : unique within a benchmark
    facts : sizes and settings, plain values for the JSON
    build : makes the inputs and returns side -> call, ours first; a call does the work once and returns arrays
    tolerance : what ``max_error`` may be
    l2 : compare each array by the Euclidean norm of the difference instead of its largest element
    amount : (what, how many) one call does, for a rate
    missing : peers that cannot run here and what would make them
    memory : whether peak memory says something about this case
    """

    name: str
    facts: dict[str, Any]
    build: Callable[[], Sides]
    tolerance: float
    amount: tuple[str, float] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    memory: bool = True
    l2: bool = False


@runtime_checkable
class OwnWay(Protocol):
    """A case that does not fit one call per side and measures itself; its row has the form of all rows."""

    name: str

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """The row."""

    def lines(self, row: Mapping[str, Any]) -> Sequence[str]:
        """What is printed of it besides the times."""


def prepare(args: argparse.Namespace) -> None:
    """Threads, allocator and float32 arithmetic, the same for all sides. Raises ResourceError for a missing device."""
    pick_device(args.device)
    torch.set_num_threads(args.threads)
    tune_allocator()
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def run(cases: Sequence[Case | OwnWay], args: argparse.Namespace) -> dict[str, Any]:
    """All cases; prints one line for each side and returns the report. Raises UsageError when ``--only`` fits none."""
    chosen = [case for case in cases if not args.only or args.only in case.name]
    if not chosen:
        raise UsageError("--only", f"no case has {args.only!r} in its name", "; ".join(case.name for case in cases))
    before = list(os.getloadavg())
    if told := busy(before[0], len(os.sched_getaffinity(0))):
        print(told, file=sys.stderr, flush=True)
    rows = []
    for case in chosen:
        rows.append(case.measure(args) if isinstance(case, OwnWay) else measure(case, args))
        if args.quick:
            without_ratios(rows[-1])
        print_row(rows[-1])
        if isinstance(case, OwnWay) and rows[-1]["passed"]:
            for line in case.lines(rows[-1]):
                _tell(f"    {line}")
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "plot", "peak_of", "argv", "bench")}
    return finite(
        {
            "bench": args.bench,
            **measured_on(),
            "machine": {**machine(args.quick), "load_average_before": before},
            "device": device_name(args.device),
            "settings": settings,
            "command": ["python", "-m", "bench", *args.argv],
            "notes": NOTES,
            "rows": rows,
        }
    )


def busy(load: float, cores: int) -> str:
    """A warning where others have half of the cores or more before anything is measured, else nothing; ``load`` : the
    average number of processes that ran in the last minute."""
    if load < cores / 2:
        return ""
    return (
        f"warning: the machine is busy, load average {load:.1f} on {counted(cores, 'core')} before the first case: "
        "times and ratios are those of what is left of it"
    )


def is_quick(report: Mapping[str, Any]) -> bool:
    """Whether a report was measured with --quick, so that its times are no comparison."""
    return bool(report.get("settings", {}).get("quick"))


def commit_of(report: Mapping[str, Any]) -> str:
    """What code was measured, in words."""
    commit = str(report["commit"])
    changed = " with changes that were not committed" if commit.endswith("-dirty") else ""
    return f"commit {commit.removesuffix('-dirty')}{changed}"


def without_ratios(row: dict[str, Any]) -> None:
    """Forget what a row compares: times of --quick say whether the sides work, not how fast they are."""
    for key in ("ratio_to", "ratio_range", "cpu_ratio_to", "cold_ratio_to"):
        if key in row:
            row[key] = {}
    for facts in (row, *row["peers"].values()):
        for key in ("of_copy_ceiling", "of_matmul_ceiling", "weak_scaling_efficiency"):
            facts.pop(key, None)


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one case: gate first, then times, then memory."""
    sides = case.build()
    ours, *others = sides
    results = {name: list(call()) for name, call in sides.items()}
    errors = {name: largest_difference(results[ours], results[name], case.l2) for name in others}
    del results
    peers = [name for name in others if name != TRUTH]
    sides = {name: call for name, call in sides.items() if name != TRUTH}
    worst = max(errors.values(), key=lambda e: math.inf if math.isnan(e) else e)
    row: dict[str, Any] = {"name": case.name, **case.facts, "tolerance": case.tolerance, "max_error": worst}
    row["passed"] = bool(worst <= case.tolerance)  # False for NaN
    row["peers"] = {peer: {"max_error": errors[peer]} for peer in peers}
    row["peers"] |= {peer: {"not_run": how} for peer, how in case.missing.items()}
    if not row["passed"]:
        return row
    turns = take_turns(sides, args.repeats, args.device)
    row |= spread(turns[ours])
    if case.amount:
        row[f"{case.amount[0]}_per_second"] = case.amount[1] / row["seconds_median"]
    row["ratio_to"], row["ratio_range"] = {}, {}
    for peer in peers:
        row["peers"][peer] |= spread(turns[peer])
        row["ratio_to"][peer] = row["peers"][peer]["seconds_median"] / row["seconds_median"]
        rounds = [theirs.seconds / own.seconds for theirs, own in zip(turns[peer], turns[ours], strict=True)]
        row["ratio_range"][peer] = [min(rounds), max(rounds)]
    if args.memory and case.memory:
        del sides
        row["peak_bytes"] = peak_in_child(case.name, ours, args)
        for peer in peers:
            row["peers"][peer]["peak_bytes"] = peak_in_child(case.name, peer, args)
    return row


def largest_difference(ours: Sequence[Any], theirs: Sequence[Any], l2: bool = False) -> float:
    """Over pairs of arrays: the largest |a - b| relative to the largest |b|; infinite where shapes or counts differ.

    ``l2``: ||a - b|| relative to ||b||.
    """
    if len(ours) != len(theirs):
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = (torch.as_tensor(v).detach().double().cpu() for v in (a, b))
        if a.shape != b.shape:
            return math.inf
        size = torch.linalg.vector_norm if l2 else _largest
        error = float(size(a - b)) / max(float(size(b)), 1e-30)
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def _largest(a: torch.Tensor) -> torch.Tensor:
    return a.abs().max()


def take_turns(sides: Sides, repeats: int, device: str) -> dict[str, list[Turn]]:
    """Every call timed, rounds of all sides one after the other."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            synchronise(device)
            began, cpu = time.perf_counter(), time.process_time()
            call()
            synchronise(device)
            turns[name].append(Turn(time.perf_counter() - began, time.process_time() - cpu))
    return turns


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def spread(turns: Sequence[Turn]) -> dict[str, Any]:
    """Median, smallest and largest of the repeats."""
    seconds = [turn.seconds for turn in turns]
    return {
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "cpu_seconds_median": statistics.median(turn.cpu_seconds for turn in turns),
        "repeats": len(turns),
    }


# --- memory -------------------------------------------------------------------------------------------------------


def peak_in_child(case: str, side: str, args: argparse.Namespace) -> int:
    """Peak memory of one side, from a process of its own."""
    command = [sys.executable, "-m", "bench", *args.argv, "--threads", str(args.threads), "--peak-of", case, side]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def peak_of(case: Case, side: str, device: str) -> int:
    """Bytes by which this process grows at most while ``side`` works once, inputs being there already."""
    call = case.build()[side]
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # What building left on the heap would be used again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS; ru_maxrss never does
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"no {name} in /proc/self/status: peak memory is measured on Linux only"
    return int(found[1]) * 1024


# --- the machine --------------------------------------------------------------------------------------------------


def machine(quick: bool = False) -> dict[str, Any]:
    """What the figures were measured on, with what it does at best: copies and float32 matrix products."""
    versions = provenance()
    return {
        **measured_on()["machine"],
        "usable_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": list(os.getloadavg()),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        **{k: v for k, v in versions.items() if k != "commit"},
        **ceilings(quick),
    }


def device_name(device: str) -> str:
    """ "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def ceilings(quick: bool) -> dict[str, float]:
    """Best of five: bytes read and written per second by a large CPU copy, FLOP/s of a CPU matrix product."""
    n = 2**20 if quick else 2**26
    edge = 128 if quick else 2048
    a, m = torch.ones(n), torch.ones(edge, edge)
    b = torch.empty_like(a)
    best = take_turns({"copy": lambda: [b.copy_(a)], "matmul": lambda: [m @ m]}, 5, "cpu")
    copy, matmul = (min(turn.seconds for turn in best[name]) for name in ("copy", "matmul"))
    return {"copy_bytes_per_second": 8 * n / copy, "matmul_flop_per_second": 2 * edge**3 / matmul}


# --- inputs and output --------------------------------------------------------------------------------------------


def texture(shape: Sequence[int], seed: int = 0, air: bool = True) -> np.ndarray:
    """Smooth noise in [0.1, 1], float32, maximum 1; ``air``: only in an ellipsoid, as a head has it, zero outside."""
    noise = ndimage.gaussian_filter(rng(seed, "texture").standard_normal(tuple(shape), dtype=np.float32), 1.5)
    noise = (noise - noise.min()) / (noise.max() - noise.min())
    image = (0.1 + 0.9 * noise).astype(np.float32)
    if air:
        axes = np.ogrid[tuple(slice(-1, 1, complex(0, n)) for n in shape)]
        image[sum(a**2 for a in axes) >= 0.95] = 0
    return image / image.max()


def amount(n_bytes: float) -> str:
    """Bytes with a fitting unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"


def print_row(row: Mapping[str, Any]) -> None:
    """One line for us, one for each peer."""
    gate = f"error {row['max_error']:.1e} <= {row['tolerance']:g}"
    if not row["passed"]:
        _tell(f"{row['name']}: GATE FAILED, {gate.replace('<=', 'is not <=')}: no times")
        return
    _tell(f"{row['name']}  ({gate})")
    rates = {k.removesuffix("_per_second").replace("_", " "): v for k, v in row.items() if k.endswith("_per_second")}
    counts = {what: brief(value, 4) if value < 1e4 else f"{value:,.0f}" for what, value in rates.items()}
    sizes = (amount(value) if what == "bytes" else f"{counts[what]} {what}" for what, value in rates.items())
    rate = "".join(f"  {size}/s" for size in sizes)
    width = max(24, *(len(name) + 2 for name in row["peers"])) if row["peers"] else 24
    _tell(f"  {'fastsrgan':<{width}}{_times(row)}{rate}")
    for peer, facts in row["peers"].items():
        if "not_run" in facts:
            _tell(f"  {peer:<{width}}not run: {facts['not_run']}")
            continue
        told = ""
        if peer in row["ratio_to"]:
            low, high = row["ratio_range"][peer]
            told = f"  {row['ratio_to'][peer]:.2f} x ours ({low:.2f} to {high:.2f})"
        other = "; ".join(other_work(peer, row["name"]))
        _tell(f"  {peer:<{width}}{_times(facts)}{told}{f'  other work: {other}' if other else ''}")


def _tell(line: str) -> None:
    """A line, on a terminal broken between words; at once, also in a pipe."""
    say(line, 8)
    sys.stdout.flush()


def _times(facts: Mapping[str, Any]) -> str:
    median, low, high = (facts[f"seconds_{k}"] * 1e3 for k in ("median", "min", "max"))
    memory = f"  {facts['peak_bytes'] / 2**20:7.0f} MiB" if "peak_bytes" in facts else ""
    return f"{median:10.2f} ms ({low:.2f} to {high:.2f}){memory}"
