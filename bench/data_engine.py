"""End to end from files to batches: fastsrgan beside TorchIO, MONAI and the original's preparation on disk.

First every peer's volumes are compared with ours. Then each side works in a process of its own, one after the other in
each round: an epoch that begins with nothing in memory, epochs that are timed, and two with a pause for a simulated
training step after each batch: in the first of them the memory of all its processes is looked at, the second counts (of
the original, which makes nothing ahead, one is both).

What is compared as equal work are peers that crop their volumes to the head and keep them in memory (", cropped"), as a
careful user would; those that read and make whole volumes in every epoch stand beside them, marked.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import data_page, data_sides, data_stages, peers_data
from bench.cohort import Cohort, Work, cohort_of
from bench.common import ROOT
from bench.data_sides import OURS
from bench.watch import MemoryPeak

# Found: results/epyc-zen3-2cores/data.json, of two volumes.
EXACT = 5e-6  # of the largest value: the original's numbers; found: 4.8e-7
LAW = 5e-3  # root mean square: the same observation model in other transforms; found: 5.6e-5, wider: edges differ
NEAR = 0.1  # linear interpolation in place of the spline; found: 0.018


@dataclass(frozen=True)
class EndToEnd:
    """One degradation law, ours beside the peers that know it."""

    name: str
    geometry: str
    peers: dict[str, float]  # name -> tolerance
    cohort: Cohort

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """The row: gates, then every side in turns."""
        work = self.cohort.made(geometry=self.geometry)
        here = {peer: limit for peer, limit in self.peers.items() if peers_data.missing(peer) is None}
        errors = {peer: data_sides.gate(peer, work) for peer in here}
        told = (
            "geometry",
            "shape",
            "patch",
            "stride",
            "batch",
            "subjects",
            "patches",
            "workers",
            "low_res",
            "contrast",
            "noise",
        )
        row: dict[str, Any] = {"name": self.name, **{k: v for k, v in dataclasses.asdict(work).items() if k in told}}
        row["passed"] = all(errors[peer] <= limit for peer, limit in here.items())
        # The figures of the peer that comes nearest to its limit.
        worst = max(here, key=lambda peer: errors[peer] / here[peer], default=None)
        row["max_error"], row["tolerance"] = (errors[worst], here[worst]) if worst else (0.0, 0.0)
        row["peers"] = {
            peer: {
                "max_error": errors[peer],
                "tolerance": limit,
                "differences": peers_data.DIFFERENCES[peers_data.parts(peer)[0]],
            }
            for peer, limit in here.items()
        }
        row["peers"] |= {peer: {"not_run": peers_data.missing(peer)} for peer in self.peers if peer not in here}
        if not row["passed"]:
            return row
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in (OURS, *here)}
        for _ in range(args.rounds):
            for side in rounds:
                rounds[side].append(run_side(side, work, args.memory))
        row |= summary(rounds[OURS])
        row |= {key: {} for key in ("ratio_to", "ratio_range", "cpu_ratio_to", "cold_ratio_to")}
        for peer in here:
            row["peers"][peer] |= summary(rounds[peer])
            compare(row, peer, rounds)
        return row

    def lines(self, row: Mapping[str, Any]) -> list[str]:
        """A line for each side."""
        return [
            f"{name:<22}{facts['patches_per_second']:9.1f} patches/s, at first {facts['cold_patches_per_second']:.1f}"
            f"; waits {100 * facts['wait_share']:.1f} %; {facts['disk_bytes_per_epoch'] / 1e6:.1f} MB written an epoch"
            for name, facts in data_page.sides(row).items()
        ]


def compare(row: dict[str, Any], peer: str, rounds: dict[str, list[dict[str, Any]]]) -> None:
    """Our patches per second over a peer's, in first epochs too; per second of CPU time; and how little or much with
    any epoch of ours beside any of the peer's, which are not measured in turns."""
    facts = row["peers"][peer]
    row["ratio_to"][peer] = row["patches_per_second"] / facts["patches_per_second"]
    if row["patches_per_cpu_second"] and facts["patches_per_cpu_second"]:
        row["cpu_ratio_to"][peer] = row["patches_per_cpu_second"] / facts["patches_per_cpu_second"]
    row["cold_ratio_to"][peer] = row["cold_patches_per_second"] / facts["cold_patches_per_second"]
    own, theirs = (
        [done["patches"] / seconds for done in rounds[side] for seconds in done["seconds"]] for side in (OURS, peer)
    )
    row["ratio_range"][peer] = [min(own) / max(theirs), max(own) / min(theirs)]


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one side over all rounds."""
    seconds = [s for done in rounds for s in done["seconds"]]
    cpu = statistics.median(s for done in rounds for s in done["cpu_seconds"])
    patches = rounds[0]["patches"]
    facts = {
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "cpu_seconds_median": cpu,
        "repeats": len(seconds),
        "patches_per_epoch": patches,
        "patches_per_second": patches / statistics.median(seconds),
        "patches_per_cpu_second": patches / cpu if cpu else None,
        "cold_patches_per_second": statistics.median(d["cold_patches"] / d["cold_seconds"] for d in rounds),
        "wait_share": statistics.median(d["wait"]["share"] for d in rounds),
        "wait_seconds_per_step": statistics.median(d["wait"]["waited"] / max(1, d["wait"]["steps"]) for d in rounds),
        "disk_bytes_per_epoch": max(d["disk_bytes"] / d["epochs"] for d in rounds),
        "call_bytes_per_epoch": max(d["call_bytes"] / d["epochs"] for d in rounds),
        "files_left": sum(len(d["files_left"]) for d in rounds),
    }
    if "peak_bytes" in rounds[0]:
        facts["peak_bytes"] = max(d["peak_bytes"] for d in rounds)
    return facts


def run_side(side: str, work: Work, memory: bool) -> dict[str, Any]:
    """A side in a process of its own, in an empty folder of its own. Raises RuntimeError with what it said."""
    with tempfile.TemporaryDirectory(prefix="fastsrgan-side-") as folder:
        for name in ("tmp", "cwd"):
            Path(folder, name).mkdir()
        environment = {**os.environ, "TMPDIR": str(Path(folder, "tmp")), "PYTHONPATH": str(ROOT)}
        told = json.dumps({**dataclasses.asdict(work), "memory": memory})
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "bench.data_sides", side, told],
            cwd=Path(folder, "cwd"),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=open(Path(folder, "said"), "w", encoding="utf8"),  # noqa: SIM115, closed with the process
            text=True,
        )
        assert process.stdout is not None
        result: dict[str, Any] = {}
        with contextlib.ExitStack() as looking:
            peak = MemoryPeak(process.pid)
            for line in process.stdout:
                told_back = json.loads(line) if line.startswith("{") else {}
                if told_back.get("look"):
                    looking.enter_context(peak)
                elif "look" in told_back:
                    looking.close()
                elif "seconds" in told_back:
                    result = told_back
            looking.close()
        if process.wait() or not result:
            said = Path(folder, "said").read_text(encoding="utf8")
            raise RuntimeError(f"{side}: {said.strip()[-2000:]}")
    if memory:
        result["peak_bytes"] = max(0, peak.bytes - result["base_bytes"])
    return result


def cases(args: argparse.Namespace) -> list[Any]:
    """End to end beside the peers of each law, then fastsrgan's stages and a training run."""
    cohort = cohort_of(args)
    what = f"end to end, {args.subjects} volumes, patches of {args.patch}^3"
    physical = {"torchio, cropped": LAW, "monai, cropped": LAW}
    if not args.quick:
        physical |= {"torchio, linear, cropped": NEAR, "monai, trilinear, cropped": NEAR, "torchio": LAW, "monai": LAW}
    if args.visit:
        physical |= {f"{peer} of {args.visit} a visit": LAW for peer in ("torchio", "monai")}
    return [
        EndToEnd(f"{what}, physical", "physical", physical, cohort),
        EndToEnd(f"{what}, segsrgan", "segsrgan", {"original": EXACT}, cohort),
        *data_stages.cases(cohort),
    ]
