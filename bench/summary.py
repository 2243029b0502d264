"""The benchmarks in five sentences and one picture, made of the results of one machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.data_page import duration, rate
from fastsrgan.core.files import atomic_write

OURS, MEMORY = "#1f77b4", "#b279a2"
PLAIN, OWN = "monai, plain network", "monai, fastsrgan's network"
NOT_MEASURED = "has not been measured on this machine"
Reports = Mapping[str, Mapping[str, Any]]  # name of the bench -> its report


def sentences(reports: Reports) -> list[str]:
    """Iteration, inference, feed, memory, and what has never run on a GPU."""
    return [_iteration(reports), _inference(reports), _feed(reports), _memory(reports), _gpu(reports)]


def bars(reports: Reports) -> list[tuple[str, float, bool]]:
    """(what, how many times of ours the peer takes, whether it is memory) of what was measured."""
    found: list[tuple[str, float, bool]] = []
    step, whole, feed = iteration(reports), inference(reports), end_to_end(reports)
    if step:
        found.append(("iteration of training: plain PyTorch", step["ratio_to"]["naive"], False))
    if whole:
        found.append(("whole inference: MONAI, plain network", whole["ratio_to"][PLAIN], False))
        found.append(("whole inference: MONAI, fastsrgan's network", whole["ratio_to"][OWN], False))
    if feed:
        found += [(f"feed: {name}, equal work", feed["ratio_to"][key], False) for name, key in _feeds(feed)]
    for what, row, peer in (("an iteration: plain PyTorch", step, "naive"), ("inference: MONAI", whole, PLAIN)):
        if row and row.get("peak_bytes") and row["peers"][peer].get("peak_bytes"):
            found.append((f"memory of {what}", row["peers"][peer]["peak_bytes"] / row["peak_bytes"], True))
    return found


def plot(machines: Sequence[tuple[str, Reports]], path: str | os.PathLike) -> None:
    """Write the picture: for each machine what the peers take, in units of what fastsrgan takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = [(name, found) for name, reports in machines if (found := bars(reports))]
    figure = Figure(figsize=(9, 0.8 + sum(0.42 * len(found) + 0.5 for _, found in made)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(made), 1), 1, squeeze=False, height_ratios=[len(f) for _, f in made] or [1])
    for axes, (name, found) in zip(panels[:, 0], made, strict=False):
        names, values, of_memory = zip(*found, strict=True)
        axes.set_xscale("log")
        axes.barh(names, [v - 1 for v in values], left=1, color=[MEMORY if m else OURS for m in of_memory])
        axes.bar_label(axes.containers[0], [f" {v:.3g} x" for v in values], fontsize=9)
        axes.axvline(1, color="#404040", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlim(min(0.8, *values), 2.5 * max(values))
        axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.tick_params(labelsize=9)
        axes.minorticks_off()
        axes.set_title(name, fontsize=10)
    figure.supxlabel("what the other side takes: times fastsrgan's seconds (blue), bytes (violet)", fontsize=9)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


# --- the rows -----------------------------------------------------------------------------------------------------


def iteration(reports: Reports) -> Mapping[str, Any] | None:
    """The iteration on one rank, where it has times."""
    return _row(reports, "step", lambda r: r["name"].startswith("iteration of") and "naive" in r.get("ratio_to", {}))


def inference(reports: Reports) -> Mapping[str, Any] | None:
    """Whole inference with MONAI around both networks."""
    return _row(reports, "infer", lambda r: {PLAIN, OWN} <= set(r.get("ratio_to", {})))


def end_to_end(reports: Reports) -> Mapping[str, Any] | None:
    """The feed beside TorchIO and MONAI that do the same."""
    wanted = {"torchio", "monai"}
    return _row(reports, "data", lambda r: r["name"].startswith("end to end") and wanted & set(r.get("ratio_to", {})))


def _row(reports: Reports, bench: str, fits: Any) -> Mapping[str, Any] | None:
    rows = reports.get(bench, {}).get("rows", [])
    return next((row for row in rows if "seconds_median" in row and fits(row)), None)


def _feeds(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, key) for name, key in (("TorchIO", "torchio"), ("MONAI", "monai")) if key in row["ratio_to"]]


# --- the sentences ------------------------------------------------------------------------------------------------


def _iteration(reports: Reports) -> str:
    row = iteration(reports)
    if row is None:
        return f"An iteration of training beside plain PyTorch {NOT_MEASURED}."
    ours, plain = duration(row["seconds_median"]), duration(row["peers"]["naive"]["seconds_median"])
    return (
        f"An iteration of training ({row['critic_updates']} updates of the critic and one of the generator, k "
        f"{row['kernel']} and {row['kernel_dis']}, {row['batch']} patches of {row['patch']}^3) takes {ours} against "
        f"{plain} in plain PyTorch, which is {row['ratio_to']['naive']:.2f} times as long."
    )


def _inference(reports: Reports) -> str:
    row = inference(reports)
    if row is None:
        return f"Whole inference beside MONAI {NOT_MEASURED}."
    plain, own = row["ratio_to"][PLAIN], row["ratio_to"][OWN]
    size = " x ".join(map(str, row["shape"]))
    return (
        f"Whole inference of {size} voxels (k {row['kernel']}, patch {row['patch']}, step {row['step']}) takes "
        f"{duration(row['seconds_median'])} against {duration(row['peers'][PLAIN]['seconds_median'])} with MONAI's "
        f"sliding window, {plain:.2f} times as long, of which a factor of {plain / own:.2f} is the network and "
        f"one of {own:.2f} gathering and stitching around it."
    )


def _feed(reports: Reports) -> str:
    row = end_to_end(reports)
    if row is None:
        return f"The feed beside TorchIO and MONAI {NOT_MEASURED}."
    ratios = " and ".join(f"{row['ratio_to'][key]:.3g} times {name}" for name, key in _feeds(row))
    return (
        f"The feed makes {rate(row['patches_per_second'])} patches of {row['patch']}^3 a second, {ratios} doing equal "
        "work: the same volumes, the same blur, a cubic spline, every patch of an epoch."
    )


def _memory(reports: Reports) -> str:
    told = []
    for what, row, peer, name in (
        ("an iteration", iteration(reports), "naive", "plain PyTorch"),
        ("whole inference", inference(reports), PLAIN, "MONAI"),
    ):
        if row and row.get("peak_bytes") and row["peers"][peer].get("peak_bytes"):
            ours, theirs = (n / 2**20 for n in (row["peak_bytes"], row["peers"][peer]["peak_bytes"]))
            told.append(f"{ours:.0f} MiB in {what} ({theirs:.0f} MiB with {name})")
    if not told:
        return f"Peak memory {NOT_MEASURED}."
    return f"Memory beyond inputs and parameters peaks at {' and at '.join(told)}."


def _gpu(reports: Reports) -> str:
    never = sorted(name for name, report in reports.items() if not on_gpu(report))
    if not never:
        return "All of it has run on a GPU."
    return f"Not yet run on a GPU: {', '.join(never)}. How fast they are there is not known."


def on_gpu(report: Mapping[str, Any]) -> bool:
    """Whether a report was measured on a CUDA device."""
    device = str(report.get("device", "")).lower()
    return "cuda" in device or "nvidia" in device
