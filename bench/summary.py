"""The benchmarks in five sentences of one machine, and one table and picture of all."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import AIR_TOO, CROPPED, END_TO_END
from bench.data_page import duration, rate
from fastsrgan.core.files import atomic_write

TIMES = (
    "#1f77b4",
    "#e6842a",
    "#54a24b",
    "#b279a2",
)  # a colour for each machine, again from the first where they are more
PLAIN, LAST, OWN = "monai, plain network", "monai, plain network, channels last", "monai, fastsrgan's network"
NOT_MEASURED = "has not been measured on this machine"
Row = Mapping[str, Any]
Reports = Mapping[str, Mapping[str, Any]]  # name of the bench -> its report


def sentences(reports: Reports) -> list[str]:
    """Iteration, inference, feed, memory, and what has never run on a GPU."""
    return [_iteration(reports), _inference(reports), _feed(reports), _memory(reports), _gpu(reports)]


class Bar(NamedTuple):
    """ratio : how many times of ours the peer takes; range : smallest and largest of it, None where measured once"""

    what: str
    ratio: float
    range: tuple[float, float] | None = None
    memory: bool = False


def bars(reports: Reports) -> list[Bar]:
    """What was measured beside a peer."""
    found = []
    step, whole, feed = iteration(reports), inference(reports), end_to_end(reports)
    if step:
        found += [_bar(f"iteration of training: {text}", step, key) for key, text in _plain(step)]
    if whole:
        found += [_bar(f"whole inference: {_around(key)}", whole, key) for key in _networks(whole)]
    if feed:
        found += [_bar(f"feed: {name}, {text}", feed, key) for name, key, text in _feeds(feed)]
    for what, row, peer, name in _memories(step, whole):
        ratio = row["peers"][peer]["peak_bytes"] / row["peak_bytes"]
        found.append(Bar(f"memory of {what}: {name}", ratio, memory=True))
    return found


def _bar(what: str, row: Row, peer: str) -> Bar:
    return Bar(what, row["ratio_to"][peer], _range(row, peer))


def _range(row: Row, peer: str) -> tuple[float, float] | None:
    """Smallest and largest ratio; None where either side was measured once."""
    if min(row["repeats"], row["peers"][peer]["repeats"]) < 2:
        return None
    low, high = row["ratio_range"][peer]
    return low, high


def chosen(machines: Mapping[str, Reports]) -> str:
    """The machine whose sentences open the page: the one with most benches, of several the one with most ratios, the
    last."""
    return max(reversed(machines), key=lambda name: (len(machines[name]), len(bars(machines[name]))))


def _spread(bar: Bar) -> str:
    if bar.range:
        return f" ({bar.range[0]:.3g} to {bar.range[1]:.3g})"
    return "" if bar.memory else " (measured once)"


def _rows(machines: Mapping[str, Reports]) -> list[tuple[str, dict[str, Bar]]]:
    """(what is compared, machine -> what it showed), in the order of the machine with most, then what others add."""
    found = {name: {bar.what: bar for bar in bars(reports)} for name, reports in machines.items()}
    order = dict.fromkeys(what for name in sorted(found, key=lambda n: -len(found[n])) for what in found[name])
    times_first = sorted(order, key=lambda what: what.startswith("memory"))  # keeps the order otherwise
    return [(what, {name: named[what] for name, named in found.items() if what in named}) for what in times_first]


def comparison(machines: Mapping[str, Reports]) -> list[str]:
    """The ratios of all machines beside each other, as lines of Markdown."""
    lines = [f"| what the other side takes | {' | '.join(machines)} |", f"|---{'|---' * len(machines)}|"]
    for what, on in _rows(machines):
        cells = [f"{on[name].ratio:.3g} x{_spread(on[name])}" if name in on else "not measured" for name in machines]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def plot(machines: Mapping[str, Reports], path: str | os.PathLike) -> None:
    """Write the picture: what the peers take, in units of what fastsrgan takes, a colour for each machine."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, names = _rows(machines), [name for name in machines if bars(machines[name])]
    figure = Figure(figsize=(10, 1.3 + 0.19 * len(rows) * (len(names) + 0.6)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    thick, ends = 1 / (len(names) + 0.6), [1.0]
    for i, name in enumerate(names):
        mine = [(at, on[name]) for at, (_, on) in enumerate(rows) if name in on]
        places = [at + (i - (len(names) - 1) / 2) * thick for at, _ in mine]
        colour = TIMES[i % len(TIMES)]
        axes.barh(places, [bar.ratio - 1 for _, bar in mine], thick, left=1, color=colour, label=name)
        for place, (_, bar) in zip(places, mine, strict=True):
            low, high = bar.range or (bar.ratio, bar.ratio)
            ends += [low, high]
            axes.plot(
                [low, high], [place] * 2, color="#404040", linewidth=1, marker="|", markersize=5 if bar.range else 0
            )
            axes.text(max(high, 1), place, f"  {bar.ratio:.3g} x{_spread(bar)}", va="center", fontsize=8)
    axes.axvline(1, color="#404040", linewidth=1)
    axes.set_yticks(range(len(rows)), [what for what, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(min(0.8, *ends), 3 * max(ends))
    axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.tick_params(labelsize=9)
    axes.minorticks_off()
    if names:
        figure.legend(loc="outside upper center", ncols=len(names), fontsize=9, frameon=False)
    figure.supxlabel("what the other side takes, in times of fastsrgan's seconds or bytes; line: range", fontsize=9)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


# --- the rows -----------------------------------------------------------------------------------------------------


def iteration(reports: Reports) -> Row | None:
    """The iteration on one rank, where it has times."""
    return _row(reports, "step", lambda r: r["name"].startswith("iteration of") and "naive" in r.get("ratio_to", {}))


def inference(reports: Reports) -> Row | None:
    """Whole inference with MONAI around both networks."""
    return _row(reports, "infer", lambda r: {PLAIN, OWN} <= set(r.get("ratio_to", {})))


def end_to_end(reports: Reports) -> Row | None:
    """The feed beside TorchIO and MONAI."""
    return _row(reports, "data", lambda r: r["name"].startswith(END_TO_END) and _feeds(r))


def _row(reports: Reports, bench: str, fits: Any) -> Row | None:
    rows = reports.get(bench, {}).get("rows", [])
    return next((row for row in rows if "seconds_median" in row and fits(row)), None)


def _feeds(row: Row) -> list[tuple[str, str, str]]:
    """(name, key, what is compared): sides that do equal work where the row has them, else those that are told of."""
    ratios = row.get("ratio_to", {})
    for ending, text in ((CROPPED, "equal work"), ("", "whole volumes, other work")):
        found = [(n, f"{n.lower()}{ending}", text) for n in ("TorchIO", "MONAI") if f"{n.lower()}{ending}" in ratios]
        if found:
            return found
    return []


def _plain(row: Row) -> list[tuple[str, str]]:
    """(key, name) of the sides in plain PyTorch."""
    names = {"naive": "plain eager PyTorch, contiguous"}
    names["naive, channels last"] = "plain eager PyTorch, channels last"
    return [(key, name) for key, name in names.items() if key in row["ratio_to"]]


def _networks(row: Row) -> list[str]:
    """What MONAI was measured around."""
    return [key for key in (PLAIN, LAST, OWN) if key in row["ratio_to"]]


def _around(peer: str) -> str:
    """ "monai, plain network" -> "MONAI, plain network"."""
    return peer.replace("monai", "MONAI")


def _named(row: Row, peer: str, text: str) -> str:
    """What a peer is, its seconds and its ratio."""
    return f"{text}, it takes {duration(row['peers'][peer]['seconds_median'])}, {_times(row, peer)} as long"


def _memories(step: Row | None, whole: Row | None) -> list[tuple[str, Row, str, str]]:
    """(what, row, key of the peer, its name) wherever both took memory that was measured."""
    asked = [("an iteration", step, key, name) for key, name in (_plain(step) if step else [])]
    asked += [("whole inference", whole, key, _around(key)) for key in (_networks(whole) if whole else [])]
    return [
        (what, row, peer, name)
        for what, row, peer, name in asked
        if row and row.get("peak_bytes") and row["peers"][peer].get("peak_bytes")
    ]


# --- the sentences ------------------------------------------------------------------------------------------------


def _iteration(reports: Reports) -> str:
    row = iteration(reports)
    if row is None:
        return f"An iteration of training beside plain PyTorch {NOT_MEASURED}."
    ours = duration(row["seconds_median"])
    plain = ", and ".join(_named(row, key, f"in {name}") for key, name in _plain(row))
    return (
        f"An iteration of training ({row['critic_updates']} updates of the critic and one of the generator, k "
        f"{row['kernel']} and {row['kernel_dis']}, {row['batch']} patches of {row['patch']}^3) takes {ours}; "
        f"{plain}."
    )


def _times(row: Row, peer: str) -> str:
    """The ratio, with its range and the number of rounds where there are several."""
    found = _range(row, peer)
    n = min(row["repeats"], row["peers"][peer]["repeats"])
    spread = f"{found[0]:.3g} to {found[1]:.3g}, n {n}" if found else "measured once"
    return f"{row['ratio_to'][peer]:.3g} times ({spread})"


def _inference(reports: Reports) -> str:
    row = inference(reports)
    if row is None:
        return f"Whole inference beside MONAI {NOT_MEASURED}."
    size = " x ".join(map(str, row["shape"]))
    own = _range(row, OWN)
    if own is None or own[0] <= 1 <= own[1]:
        around = f"there is no measurable difference: MONAI takes {_times(row, OWN)} as long"
    else:
        around = f"MONAI takes {_times(row, OWN)} as long"
    texts = {PLAIN: "with MONAI's sliding window around the network in plain eager PyTorch, contiguous"}
    texts[LAST] = "around the same with channels last"
    plain = ", and ".join(_named(row, key, text) for key, text in texts.items() if key in row["ratio_to"])
    shares = [side.get("outside_network") for side in (row, row["peers"][OWN])]
    if None not in shares:
        around += f", with {100 * shares[0]:.1f} and {100 * shares[1]:.1f} % of the time outside the network"
    return (
        f"Whole inference of {size} voxels (k {row['kernel']}, patch {row['patch']}, step {row['step']}) takes "
        f"{duration(row['seconds_median'])}; {plain}. Around the same network {around}."
    )


def _feed(reports: Reports) -> str:
    row = end_to_end(reports)
    if row is None:
        return f"The feed beside TorchIO and MONAI {NOT_MEASURED}."
    feeds = _feeds(row)
    ratios = " and ".join(f"{_times(row, key)} what {name} makes" for name, key, _ in feeds)
    first = [row["cold_patches_per_second"] / row["peers"][key]["cold_patches_per_second"] for _, key, _ in feeds]
    at_first = " and ".join(f"{ratio:.3g}" for ratio in first)
    told = (
        f"The feed makes {rate(row['patches_per_second'])} patches of {row['patch']}^3 a second, {ratios}; in the "
        f"first epoch, which begins with nothing in memory, {at_first} times. "
    )
    if feeds[0][2] == "equal work":
        return told + (
            "All make the same blur, a cubic spline and every patch of an epoch; the peers keep the volumes in memory, "
            "cropped to the head, and fastsrgan reads its store."
        )
    return told + f"The work is not equal: each of them {AIR_TOO}{_kept(reports)}."


def _kept(reports: Reports) -> str:
    """How much of a volume the box of its head is."""
    row = _row(reports, "data", lambda r: "resident_shape" in r)
    return f", {math.prod(row['resident_shape']) / math.prod(row['shape']):.0%} of the voxels" if row else ""


def _memory(reports: Reports) -> str:
    found: dict[str, tuple[float, list[str]]] = {}
    for what, row, peer, name in _memories(iteration(reports), inference(reports)):
        ours, theirs = (n / 2**20 for n in (row["peak_bytes"], row["peers"][peer]["peak_bytes"]))
        found.setdefault(what, (ours, []))[1].append(f"{theirs:.0f} with {name}")
    if not found:
        return f"Peak memory {NOT_MEASURED}."
    told = " and at ".join(f"{ours:.0f} MiB in {what} ({'; '.join(others)})" for what, (ours, others) in found.items())
    return f"Memory beyond inputs and parameters peaks at {told}."


def _gpu(reports: Reports) -> str:
    never = sorted(name for name, report in reports.items() if not on_gpu(report))
    if not never:
        return "All of it has run on a GPU."
    return f"Not yet run on a GPU: {', '.join(never)}. How fast they are there is not known."


def on_gpu(report: Row) -> bool:
    """Whether a report was measured on a CUDA device."""
    device = str(report.get("device", "")).lower()
    return "cuda" in device or "nvidia" in device
