"""The end-to-end rows of a data report as tables, what they mean for other cohorts, and a picture.

python -m bench project 40 1000 100000      # from bench/results, or from --json FILE
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.common import END_TO_END, amount, commit_of, is_quick, marked, other_work
from fastsrgan.core.files import atomic_write, read_json
from fastsrgan.errors import InputError

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("spread", "drift")  # of bench.shuffle.quality
BUDGETS = (4, 16, 64)  # GB of resident_memory
COHORTS = (40, 1000, 100_000)
MARK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
GOALS = {"original": 100.0, "torchio": 10.0, "monai": 10.0}  # patches/s over those of the peer


def end_to_end(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """geometry -> the row beside peers, for rows that passed. Raises InputError when there is none."""
    rows = {r["geometry"]: r for r in report["rows"] if r["name"].startswith(END_TO_END) and "patches_per_second" in r}
    if not rows:
        raise InputError(
            "bench data", "the report has no end-to-end row", "`python -m bench data --json FILE` makes one"
        )
    return rows


def row_of(report: dict[str, Any], start: str) -> dict[str, Any] | None:
    """The row whose name begins so."""
    return next((r for r in report["rows"] if r["name"].startswith(start)), None)


def sides(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> figures of every side that ran, fastsrgan first."""
    return {"fastsrgan": row, **{n: p for n, p in row["peers"].items() if "patches_per_second" in p}}


# --- numbers as text ----------------------------------------------------------------------------------------------


def rate(per_second: float) -> str:
    """Patches per second."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def duration(seconds: float) -> str:
    """A time with a fitting unit."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


# --- tables -------------------------------------------------------------------------------------------------------


def rates(report: dict[str, Any], notes: bool = True) -> str:
    """Every side of both laws; with ``notes`` what those do that are marked."""
    lines = []
    for geometry, row in end_to_end(report).items():
        for name, facts in sides(row).items():
            ratio = row["ratio_to"].get(name)
            low, high = row["ratio_range"].get(name, (0, 0))
            once = min(row["repeats"], facts["repeats"]) < 2
            cold = row["cold_patches_per_second"] / facts["cold_patches_per_second"]
            mark = " †" if other_work(name, row["name"]) else ""
            cpu = row["cpu_ratio_to"].get(name)
            lines.append(
                [
                    f"{name} ({geometry})" if name == "fastsrgan" else name + mark,
                    f"{rate(facts['patches_per_second'])} (n {facts['repeats']})",
                    rate(facts["cold_patches_per_second"]),
                    "" if ratio is None else f"{ratio:.3g} x" + ("" if once else f" ({low:.3g} to {high:.3g})"),
                    "" if ratio is None else f"{cold:.3g} x",
                    "" if cpu is None else f"{cpu:.3g} x",
                    f"{100 * facts['wait_share']:.1f} %",
                    amount(facts["disk_bytes_per_epoch"] / facts["patches_per_epoch"]),
                    amount(facts["peak_bytes"]) if "peak_bytes" in facts else "",
                ]
            )
        lines += [[name, f"not run: {p['not_run']}", *[""] * 7] for name, p in row["peers"].items() if "not_run" in p]
    step = report["settings"]["step_ms"]
    head = ["side", "patches/s", "first epoch", "fastsrgan is faster", "in the first epoch", "per CPU second"]
    told = "".join(f"\n{line}.\n" for line in marked(list(end_to_end(report).values()))) if notes else ""
    return table([*head, f"waits at {step} ms steps", "written per patch", "peak memory"], lines) + told


def goals(report: dict[str, Any]) -> str:
    """What was promised beside what was measured."""
    lines = []
    for row in end_to_end(report).values():
        for name, ratio in row["ratio_to"].items():
            goal = GOALS.get(name.partition(",")[0].partition(" of ")[0])
            if goal:
                met = "met" if ratio >= goal else f"missed by {goal / ratio:.2g} x"
                mark = " †" if other_work(name, row["name"]) else ""
                lines.append([name + mark, f"{goal:g} x", f"{ratio:.3g} x", met])
    ours = end_to_end(report).values()
    # Bytes for a disk, and whatever went through write(): files in memory, pipes, logs.
    written = max(max(row["disk_bytes_per_epoch"], row["call_bytes_per_epoch"]) for row in ours)
    what = "bytes written between store and step in an epoch, to pipes and memory too"
    lines.append([what, "0", amount(written), "missed" if written else "met"])
    training = row_of(report, "training run")
    waits = []
    if training:
        what = f"waiting in a training run on this CPU, steps of {duration(training['seconds_median'])}"
        waits.append((what, training["wait_share"]))
    for geometry, row in end_to_end(report).items():
        what = f"waiting at assumed steps of {report['settings']['step_ms']} ms ({geometry})"
        waits.append((what, row["wait_share"]))
    for what, share in waits:
        lines.append(
            [what, "1 %", f"{100 * share:.3g} %", "met" if share < 0.01 else f"missed by {share / 0.01:.2g} x"]
        )
    return table(["", "goal", "measured", ""], lines)


def stages(report: dict[str, Any]) -> str:
    """Where the time of one volume goes."""
    row = row_of(report, "one volume")
    if row is None:
        raise InputError("bench data", "the report has no row of stages", "run it without --only")
    total = sum(row["stages"].values())
    lines = [
        [stage, duration(s), f"{100 * s / total:.0f} %", f"{1e3 * s / row['patches']:.2g} ms"]
        for stage, s in row["stages"].items()
    ]
    return table(["stage", "a volume", "share", "a patch"], [*lines, ["all", duration(total), "", ""]])


def differences(report: dict[str, Any]) -> str:
    """What each peer of the report does not do as fastsrgan does."""
    from bench.peers_data import DIFFERENCES, parts

    there = {parts(name)[0] for row in end_to_end(report).values() for name in row["peers"]}
    # What a side is told "as" another one is told with it.
    there |= {name for name in DIFFERENCES if any(f"as {name}" in text for s in there for text in DIFFERENCES[s])}
    return "".join(f"* {name}: {'; '.join(found)}.\n" for name, found in DIFFERENCES.items() if name in there)


def projection(report: dict[str, Any], cohorts: Sequence[int] = COHORTS) -> str:
    """Storage, traffic and time of cohorts of other sizes, every figure proportional to the measured volume.

    Raises InputError for a report that has no such rows or was measured with --quick.
    """
    if is_quick(report):
        raise InputError("bench data", "measured with --quick, which says nothing of speed", "measure without --quick")
    rows, row = end_to_end(report), row_of(report, "one volume")
    if row is None:
        raise InputError("bench data", "the report has no row of stages", "run it without --only")
    ours = next(iter(rows.values()))
    batch, patches = ours["batch"], row["patches"]
    step, waited = report["settings"]["step_ms"] / 1e3, ours["wait_seconds_per_step"]
    original = rows.get("segsrgan", {}).get("peers", {}).get("original", {})
    lines = []
    for n in cohorts:
        epoch = n * patches / batch * (step + waited)
        lines.append(
            [
                f"{n:,}",
                amount(n * row["convert"]["store_bytes_per_volume"]),
                duration(n * row["convert"]["seconds_per_volume"]),
                f"{n * patches:,}",
                duration(n * patches / ours["patches_per_second"]),
                duration(epoch),
                amount(n * row["convert"]["store_bytes_per_volume"] / epoch) + "/s",
                duration(n * patches / original["patches_per_second"]) if original else "",
                amount(n * patches * original["disk_bytes_per_epoch"] / original["patches_per_epoch"])
                if original
                else "",
            ]
        )
    head = ["subjects", "store, and read per epoch", "conversion, once", "patches per epoch", "to make them here"]
    head += [f"epoch at {step * 1e3:.0f} + {waited * 1e3:.3g} ms waiting per {batch} patches", "network meanwhile"]
    return table([*head, "the original's preparation here", "and what it writes"], lines)


def memory(report: dict[str, Any]) -> str:
    """What resident volumes take, and how many subjects fit."""
    row = row_of(report, "one volume")
    if row is None:
        raise InputError("bench data", "the report has no row of stages", "run it without --only")
    voxels, per_voxel = math.prod(row["resident_shape"]), row["resident_bytes_per_voxel"]
    half = per_voxel - 4  # two images of two bytes less
    lines = []
    for name, size in (("fp32 (CPU)", per_voxel), ("fp16 (GPU)", half)):
        fits = [f"{int(budget * 1e9 // (2 * size * voxels))}" for budget in BUDGETS]
        lines.append([name, f"{size:.3g}", amount(size * voxels), *fits])
    kept = " x ".join(map(str, row["resident_shape"]))
    head = ["resident images", "bytes per voxel", f"{kept} voxels"]
    return table([*head, *(f"subjects in a group at {budget} GB" for budget in BUDGETS)], lines)


def shuffle(report: dict[str, Any]) -> str:
    """How well an epoch is mixed, by the number of resident subjects."""
    row = row_of(report, "shuffle")
    if row is None:
        raise InputError("bench data", "the report has no row of shuffles", "run it without --only")
    lines = [
        [
            f"{size} of {row['subjects']}",
            f"{q['distinct']:.1f}",
            f"{100 * q['same']:.1f} %",
            *(f"{q[k]:.2f}" for k in KINDS),
        ]
        for size, q in row["groups"].items()
    ]
    return table(["resident", "subjects in a batch", "pairs of one subject", *KINDS], lines)


BLOCKS = {
    "shuffle": shuffle,
    "memory": memory,
    "rates": rates,
    "goals": goals,
    "stages": stages,
    "projection": projection,
    "differences": differences,
    "machine": lambda report: machine(report),
}


def refresh(page: Path, report: dict[str, Any]) -> None:
    """Write the page's marked blocks anew, each between ``<!-- bench:NAME -->`` and ``<!-- end -->``."""
    text = filled(page.read_text(encoding="utf8"), report)
    with atomic_write(page) as temporary:
        temporary.write_text(text, encoding="utf8")


def filled(text: str, report: dict[str, Any]) -> str:
    """The page's text with all marked blocks made from the report."""

    def block(found: re.Match) -> str:
        return found[1] + BLOCKS[found[2]](report) + found[3]

    return MARK.sub(block, text)


def machine(report: dict[str, Any]) -> str:
    """What was measured, where and with which command."""
    m = report["machine"]
    row = next(iter(end_to_end(report).values()))
    size = " x ".join(map(str, row["shape"]))
    return (
        f"`{' '.join(report['command'])}`: {row['subjects']} volumes of {size} voxels, {row['patches']} patches of"
        f" {row['patch']}^3 of each in an epoch, batches of {row['batch']}, {row['workers']} workers for the peers, on"
        f" {m['usable_cores']} cores of an {m['cpu']}, no GPU; load average {m['load_average'][0]:.1f} at the end;"
        f" {commit_of(report)}.\n"
    )


def main(argv: Sequence[str]) -> str:
    """``python -m bench project``: the table of cohort sizes, of each report with what was measured and where."""
    text = "storage, traffic and time of cohorts of other sizes, every figure proportional to the measured volume"
    parser = argparse.ArgumentParser(prog="python -m bench project", description=text)
    sizes = f"subjects of the cohorts ({' '.join(map(str, COHORTS))})"
    parser.add_argument("subjects", nargs="*", type=int, default=list(COHORTS), metavar="N", help=sizes)
    parser.add_argument("--json", metavar="FILE", help="of `python -m bench data` (all in bench/results)")
    args = parser.parse_args(argv)
    paths = [Path(args.json)] if args.json else sorted(RESULTS.glob("*/data.json"))
    if min(args.subjects) < 1:
        parser.error("numbers of subjects from 1 up")
    tables = []
    for path in paths:
        report = read_json(path)
        if "rows" not in report:
            hint = "`python -m bench data --json FILE` makes one"
            raise InputError(path, "is not there, or holds no report of a benchmark", hint)
        table_of_sizes = projection(report, args.subjects)
        tables.append(f"{machine(report)}\n{table_of_sizes}")
    return "\n".join(tables)
