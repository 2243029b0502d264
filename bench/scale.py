"""What measured figures predict for N subjects on M devices: time of an epoch, traffic to the store, cost.

    python -m bench scale --check --json bench/results/MACHINE/scale.json
    python -m bench scale --subjects 1000 --devices 8 --step-ms 145 --batch 16 --price 2.5
    python -m bench scale --hours 1 10 100 --subjects 40 --devices 1         # how far a run comes

An epoch is the longer of two things that run side by side: the updates, and making the volumes ahead of them. Every
device does patches / (devices x batch) updates; an update on several takes that on one divided by the weak-scaling
efficiency. Volumes are dealt to the devices, each made by its feed threads. An epoch reads every subject of the store
once, whatever the number of devices. ``--check`` measures the parts on this machine, predicts epochs on one and two
ranks of one thread, runs them, and tells both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common import amount, is_quick
from bench.data_page import RESULTS, duration, table
from fastsrgan.cli.console import HelpFormatter
from fastsrgan.errors import InputError, UsageError, counted
from fastsrgan.model.networks import CriticSpec, GeneratorSpec, parameter_shapes

EPOCHS = 3  # of a checked run
RANKS = (1, 2)
LINK = 450e9  # bytes per second in each direction between H100s: assumed, no source, not run


@dataclass(frozen=True)
class Figures:
    """step_seconds : of one update at ``batch`` patches on one device; efficiency : of weak scaling

    patches : of a subject in an epoch; volume_seconds : to read, degrade and place a subject, one thread;
    store_bytes : of a subject; threads : feed threads of a device
    message_seconds : that an update on several devices waits for the gradients of the others, where not measured
    """

    step_seconds: float
    batch: int
    patches: int
    volume_seconds: float
    store_bytes: float
    threads: int = 2
    efficiency: float = 1.0
    message_seconds: float = 0.0


def message_bytes(kernel: int, kernel_dis: int, critics: int) -> int:
    """Of the gradients of one iteration, float32: the generator's once, the critic's in each of its updates."""
    sizes = [
        sum(math.prod(shape) for shape in parameter_shapes(spec).values())
        for spec in (GeneratorSpec(kernel=kernel), CriticSpec(kernel=kernel_dis))
    ]
    return 4 * (sizes[0] + critics * sizes[1])


def sent(size: float, devices: int, link: float) -> float:
    """Seconds of a ring's all-reduce of ``size`` bytes at ``link`` bytes per second in each direction."""
    return 2 * (devices - 1) / devices * size / link


def predict(f: Figures, subjects: int, devices: int, price: float = 0.0) -> dict[str, float]:
    """Seconds of an epoch and its parts, bytes and bytes per second from the store, cost at ``price`` an hour each.

    Raises UsageError for more devices than subjects.
    """
    if devices > subjects:
        raise UsageError("--devices", f"{devices} for {counted(subjects, 'subject')}", "at most one device per subject")
    own = -(-subjects // devices)  # the fullest rank, for which the others wait
    updates = -(-own * f.patches // f.batch)
    one = f.step_seconds / f.efficiency + f.message_seconds if devices > 1 else f.step_seconds
    stepping = updates * one
    making = own * f.volume_seconds / f.threads
    seconds = max(stepping, making)
    moved = subjects * f.store_bytes
    return {
        "subjects": subjects,
        "devices": devices,
        "updates": updates,
        "step_seconds": stepping,
        "volume_seconds": making,
        "epoch_seconds": seconds,
        "bytes": moved,
        "bytes_per_second": moved / seconds,
        "cost": price * devices * seconds / 3600,
    }


def prediction_table(f: Figures, subjects: Sequence[int], devices: Sequence[int], price: float) -> str:
    """Markdown, a line for each cohort and number of devices; with the cost where there is a price."""
    lines = []
    for n in subjects:
        for m in devices:
            if m > n:
                continue
            p = predict(f, n, m, price)
            bound = "updates" if p["step_seconds"] >= p["volume_seconds"] else "volumes"
            cells = [f"{n:,}", str(m), f"{p['updates']:,.0f}", duration(p["epoch_seconds"]), bound]
            cost = [f"{p['cost']:.4g}"] if price else []
            lines.append([*cells, amount(p["bytes"]), f"{amount(p['bytes_per_second'])}/s", *cost])
    head = ["subjects", "devices", "updates", "epoch", "bound by", "read per epoch", "network"]
    head += ["cost of an epoch"] if price else []
    return table(head, lines)


def assumed(f: Figures, machine: str, price: float = 0.0) -> str:
    """The same for the accelerator of docs/roofline.md, which nobody measured, with what that assumes of a device and
    of the machine beside it."""
    from bench import roofline, uncompiled

    top = roofline.Ceilings(*roofline.H100)
    size = message_bytes(16, 32, 5)
    messages = sent(size, 8, LINK)
    kinds = {
        "at the floor": roofline.phase_counts(16, 32, 64, 5, 2)["iteration"],
        "uncompiled at best": uncompiled.phases(16, 32, 64, 5, torch.bfloat16)["iteration"],
    }
    lines = [
        "No accelerator was measured. Assumed are",
        "",
        f"* ceilings of {top.matmul / 1e12:g} TFLOP/s (bfloat16) and {top.copy / 1e12:g} TB/s, which docs/roofline.md"
        " assumes for an H100, and that an update takes what they allow, with nothing in between",
        "* the paper's networks (k 16 and 32, five critic updates each), patches of 64^3, 16 of them for a device",
        f"* volumes at the pace of one thread of {machine}, {duration(f.volume_seconds)} each, by eight threads a"
        " device, which do not disturb one another; a store that is as fast as it is asked to be",
        f"* {amount(size)} of gradients an update in a ring at {amount(LINK)}/s in each direction, without latency,"
        " none of them hidden behind other work; no other loss by scaling",
        "",
    ]
    for name, one in kinds.items():
        seconds = top.floor(one.times(16))
        there = dataclasses.replace(
            f, step_seconds=seconds, batch=16, threads=8, efficiency=1.0, message_seconds=messages
        )
        told = (
            f"An update of 16 patches in {duration(seconds)}, {name} (by arithmetic, docs/roofline.md), on 8 devices "
        )
        told += f"{duration(messages)} more for {amount(size)} of gradients at {amount(LINK)}/s in each direction:\n"
        lines.append(told)
        lines.append(prediction_table(there, (1000, 100_000), (1, 8), price))
    return "\n".join(lines)


def reached(
    f: Figures, subjects: Sequence[int], devices: Sequence[int], hours: Sequence[float]
) -> list[dict[str, Any]]:
    """Updates, epochs and patches of a run after so many hours, a row for each cohort and number of devices."""
    rows = []
    for n in subjects:
        for m in (m for m in devices if m <= n):
            p = predict(f, n, m)
            for h in hours:
                epochs = 3600 * h / p["epoch_seconds"]
                row = {"subjects": n, "devices": m, "hours": h, "updates": epochs * p["updates"], "epochs": epochs}
                rows.append(row | {"patches": epochs * n * f.patches})
    return rows


def reached_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of ``reached``."""
    cells = [[f"{r['subjects']:,}", str(r["devices"]), f"{r['hours']:g}"] for r in rows]
    counts = [
        [f"{r[name]:,.0f}" if r[name] >= 10 else f"{r[name]:.2g}" for name in ("updates", "epochs", "patches")]
        for r in rows
    ]
    head = ["subjects", "devices", "hours", "updates", "epochs", "patches seen"]
    return table(head, [a + b for a, b in zip(cells, counts, strict=True)])


# --- the check ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Small enough for a CPU: the law is the same."""

    shape: tuple[int, int, int] = (90, 81, 72)
    subjects: int = 6
    patch: int = 32
    stride: int = 20
    batch: int = 4
    kernel: int = 4
    kernel_dis: int = 4
    critics: int = 2

    @classmethod
    def quick(cls) -> Check:
        """Seconds instead of minutes."""
        return cls((40, 36, 33), 2, 16, 10, 2, 2, 2, 1)


def checked(c: Check, repeats: int) -> dict[str, Any]:
    """Measure the parts, predict, run, compare: the rows of the report."""
    from bench.cohort import Cohort, Work

    work = Work("", c.shape, c.patch, c.batch, c.subjects, stride=c.stride, threads=1)
    cohort = Cohort(work, 0.75)
    made = cohort.made()
    steps = {world: step_seconds(c, world, repeats) for world in RANKS}
    stored = cohort.facts["store_bytes_per_volume"]
    figures = Figures(steps[1], c.batch, made.patches, volume_seconds(made), stored, 1, efficiency=steps[1] / steps[2])
    rows = []
    for world in RANKS:
        measured = epoch_seconds(c, made.store, world)
        own = predict(figures, c.subjects, world)
        rows.append(
            {"ranks": world, "predicted": own["epoch_seconds"], "measured": measured, "updates": own["updates"]}
        )
    return {"figures": dataclasses.asdict(figures), "step_seconds": {str(k): v for k, v in steps.items()}, "rows": rows}


def volume_seconds(work: Any) -> float:
    """Median seconds to read, degrade and place a subject, on one thread."""
    import torch

    from fastsrgan.data.subject import PatchRule, make_resident
    from fastsrgan.observation.model import Degradation
    from fastsrgan.store.reader import open_store

    torch.set_num_threads(1)
    store, law = open_store(work.store), Degradation((work.low_res,), work.contrast, work.noise, work.geometry)
    rule, device = PatchRule(work.patch, work.stride), torch.device("cpu")
    found = []
    for name in (work.names[0], *work.names):  # once to warm up
        began = time.perf_counter()
        make_resident(store.read(name), law, law.draw(0, 1, name), rule, device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def step_seconds(c: Check, world: int, repeats: int) -> float:
    """Median seconds of an update, the batch per rank the same."""
    from bench.step_ranks import on_ranks

    options = {"kernel": c.kernel, "kernel_dis": c.kernel_dis, "batch": c.batch, "patch": c.patch}
    options |= {"critic_updates": c.critics, "threads": 1, "repeats": repeats, "device": "cpu"}
    said = on_ranks([sys.executable, "-m", "bench.step_ranks", json.dumps(options)], world, 1)
    return statistics.median(s for out in said for s in json.loads(out.splitlines()[-1])["seconds"])


def epoch_seconds(c: Check, store: str, world: int) -> float:
    """Wall clock of an epoch of `fastsrgan train`, its snapshot included, the wait for the first volume not."""
    from bench.step_ranks import on_ranks
    from fastsrgan.config import TrainConfig

    config = TrainConfig(
        new_low_res=((1.0, 1.0, 3.0),),
        epochs=EPOCHS,
        batch_size=c.batch * world,
        patch_size=c.patch,
        stride=c.stride,
        critic_iterations=c.critics,
        kernel_gen=c.kernel,
        kernel_dis=c.kernel_dis,
        feed_threads=1,
    )
    with tempfile.TemporaryDirectory(prefix="fastsrgan-bench-") as folder:
        settings = Path(folder, "config.yaml")
        settings.write_text(config.to_yaml(), encoding="utf8")
        run = Path(folder, "run")
        command = [sys.executable, "-m", "fastsrgan", "train", store, "-o", str(run), "--config", str(settings)]
        on_ranks(command, world, 1)
        summary = json.loads((run / "summary.json").read_text(encoding="utf8"))
    return (summary["seconds"] - summary["first_wait_seconds"]) / EPOCHS


# --- command line -------------------------------------------------------------------------------------------------


def measured(folder: Path) -> Figures:
    """Those of a machine's reports of ``bench step`` and ``bench data``. Raises InputError where a row is missing."""
    found: dict[str, Any] = {}
    for bench in ("step", "data"):
        path = folder / f"{bench}.json"
        if not path.is_file():
            raise InputError(path, "is missing", f"`python -m bench {bench} --json {path}` makes it")
        found[bench] = json.loads(path.read_text(encoding="utf8"))
        if is_quick(found[bench]):
            raise InputError(path, "measured with --quick, which says nothing of speed", "measure without --quick")
    step = next(
        (r for r in found["step"]["rows"] if r["name"].startswith("iteration of") and "seconds_median" in r), None
    )
    volume = next((r for r in found["data"]["rows"] if r["name"].startswith("one volume")), None)
    if step is None or volume is None:
        raise InputError(folder, "has no iteration or no row of stages", "run the benches without --only")
    scaling = next((r for r in found["step"]["rows"] if "weak_scaling_efficiency" in r), None)
    return Figures(
        step["seconds_median"],
        step["batch"],
        volume["patches"],
        sum(s for stage, s in volume["stages"].items() if stage != "gather"),
        volume["convert"]["store_bytes_per_volume"],
        efficiency=scaling["weak_scaling_efficiency"] if scaling else 1.0,
    )


def with_options(f: Figures, args: argparse.Namespace) -> Figures:
    """Figures of another machine where the options name them."""
    given = {"batch": args.batch, "threads": args.threads, "efficiency": args.efficiency, "patches": args.patches}
    given["step_seconds"] = None if args.step_ms is None else args.step_ms / 1e3
    given["volume_seconds"] = None if args.volume_ms is None else args.volume_ms / 1e3
    return dataclasses.replace(f, **{k: v for k, v in given.items() if v is not None})


def taken(f: Figures, machine: str) -> str:
    """What a table is made of, for a reader who did not choose it."""
    return (
        f"Of {machine} and the options: an update of {f.batch} patches takes {duration(f.step_seconds)} on one device, "
        f"a volume of {f.patches} patches {duration(f.volume_seconds)} on one of {f.threads} threads"
    )


def refuse_nonsense(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one line for numbers that mean nothing, and for options that would be ignored."""
    counts = [*args.subjects, *args.devices, args.repeats, args.batch, args.patches, args.threads]
    if min(n for n in counts if n is not None) < 1:
        parser.error("subjects, devices, repeats, batch, patches and threads are numbers from 1 up")
    if not all(0 < n < math.inf for n in (args.step_ms, args.volume_ms, *(args.hours or ())) if n is not None):
        parser.error("times are finite and above 0")
    if args.efficiency is not None and not 0 < args.efficiency <= 1:
        parser.error("--efficiency is above 0 and at most 1")
    if not 0 <= args.price < math.inf:
        parser.error("--price is finite and not below 0")
    if min(args.devices) > max(args.subjects):
        parser.error("more --devices than --subjects: at most one device per subject")
    if args.price and (args.hours or args.check):
        parser.error("--price is told of epochs, without --hours and --check")
    if args.hours and args.check:
        parser.error("--hours or --check, not both")
    if args.json and not (args.hours or args.check):
        parser.error("--json writes what --check or --hours found: give one of them")
    if args.quick and not args.check:
        parser.error("--quick belongs to --check")


def section(report: Mapping[str, Any]) -> str:
    """A checked prediction as Markdown."""
    lines = [
        [
            str(r["ranks"]),
            f"{r['updates']:.0f}",
            duration(r["predicted"]),
            duration(r["measured"]),
            f"{r['measured'] / r['predicted'] - 1:+.0%}",
        ]
        for r in report["rows"]
    ]
    return table(["ranks", "updates of an epoch", "predicted", "measured", "difference"], lines)


def main(argv: Sequence[str]) -> str:
    """``python -m bench scale``."""
    from bench.common import machine
    from fastsrgan.core.files import write_json
    from fastsrgan.core.system import measured_on

    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--subjects", type=int, nargs="+", default=[40, 1000, 100_000], metavar="N", help="of the store"
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64], metavar="M", help="of the job")
    parser.add_argument("--hours", type=float, nargs="+", metavar="H", help="how far a run comes in so many hours")
    parser.add_argument("--price", type=float, default=0.0, help="of a device for an hour, in any currency")
    parser.add_argument("--machine", metavar="NAME", help="folder of bench/results that the figures come from")
    parser.add_argument("--step-ms", type=float, help="of an update of one device, where it is not that machine's")
    parser.add_argument("--volume-ms", type=float, help="to make a volume on one thread, likewise")
    words = {"batch": "patches of an update of one device", "patches": "of a subject in an epoch"}
    for name, text in (words | {"threads": "of a device that make volumes"}).items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--efficiency", type=float, help="of weak scaling, 0 to 1")
    parser.add_argument("--check", action="store_true", help="measure, predict and run epochs on 1 and 2 CPU ranks")
    parser.add_argument("--quick", action="store_true", help="the check in seconds: does it work, not how well")
    parser.add_argument("--repeats", type=int, default=9, help="of what --check measures (9)")
    parser.add_argument("--json", metavar="FILE", help="write what was checked, or the rows of --hours, here")
    args = parser.parse_args(argv)
    refuse_nonsense(parser, args)
    if args.check:
        report = checked(Check.quick() if args.quick else Check(), args.repeats)
        report |= {"bench": "scale", "command": ["python", "-m", "bench", "scale", *argv]}
        report |= {"settings": {"quick": args.quick, "repeats": args.repeats}}
        report |= measured_on() | {"machine": machine(args.quick), "device": "cpu"}
        if args.json:
            write_json(args.json, report)
        return section(report)
    folders = sorted(p for p in RESULTS.iterdir() if p.is_dir())
    chosen = [p for p in folders if args.machine in (None, p.name)]
    if not chosen:
        raise UsageError("--machine", f"{args.machine} is not in bench/results", ", ".join(p.name for p in folders))
    figures = with_options(measured(chosen[0]), args)
    if args.hours:
        rows = reached(figures, args.subjects, args.devices, args.hours)
        if args.json:
            report = {"bench": "scale", "figures": dataclasses.asdict(figures), "from": chosen[0].name, "hours": rows}
            write_json(args.json, report | {"command": ["python", "-m", "bench", "scale", *argv]})
        return f"{taken(figures, chosen[0].name)}\n\n{reached_table(rows)}"
    return f"{taken(figures, chosen[0].name)}\n\n{prediction_table(figures, args.subjects, args.devices, args.price)}"
