"""``python -m bench report``: bench/results/*/*.json -> docs/benchmarks.md, nothing of which is written by hand, and
the figures and picture of docs/data-engine.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import data_page, infer_page, infer_plot, plot_step, roofline, scale, step, summary
from bench.common import END_TO_END, NAIVE, NOTES, is_quick, marked, other_work
from bench.data_page import RESULTS
from bench.plot import plot
from fastsrgan.core.files import atomic_write
from fastsrgan.errors import InputError, brief

ROOT = Path(__file__).resolve().parent.parent
ENGINE, PICTURE = ROOT / "docs" / "data-engine.md", ROOT / "docs" / "images" / "data-engine.png"
STEP, STEP_REPORT = ROOT / "docs" / "images" / "step.png", "step.json"
SUMMARY = ROOT / "docs" / "images" / "benchmarks.png"
STEPS = ROOT / "docs" / "images" / "infer-steps.png"
PAGE = ROOT / "docs" / "benchmarks.md"
ROOFLINE = ROOT / "docs" / "roofline.md"
HEAD = """
## How this was measured

Made by `python -m bench report` from the files in `bench/results/`; run the commands below to repeat them on your
machine. Results are compared first, and a case that exceeds its gate has no times. The sides get the same inputs and do
the same work but for those marked †. They take turns in one process, but for the rows end to end, whose sides run one
after the other, each in a process of its own, and the rows of several ranks: all rounds on one rank, then all on
several. Times are medians of n rounds (end to end: epochs), with the smallest and largest in brackets; what was
measured once has no range. A commit with -dirty: the files of that commit with changes that were not committed when it
was measured, so the commit alone does not give the code that was measured. Behind a processor's name stand its family,
model and stepping (AMD's 25/17 is a Zen 4), which older files do not have; AVX2 or AVX-512 is what torch made use of: a
virtual machine may not offer all that its processor has.
"""
QUICK = "**Measured with --quick: whether the sides work, no comparison.**\n"
# Names that the code had when a result was measured, and has now.
RENAMED = {"nii.gz, fastsrgan.images": "nii.gz, fastsrgan.io.nifti"}


def load() -> list[tuple[Path, dict[str, Any]]]:
    """All results of `python -m bench`, ordered by machine and bench; other tools keep theirs beside them."""
    found = [(path, json.loads(path.read_text(encoding="utf8"))) for path in sorted(RESULTS.glob("*/*.json"))]
    return [(path, report) for path, report in found if isinstance(report, dict) and "bench" in report]


def seconds(value: float) -> str:
    """A time with a fitting unit."""
    return f"{brief(value)} s" if value >= 0.9995 else f"{brief(value * 1e3)} ms"


def times(facts: dict[str, Any]) -> str:
    """Median, spread and number of rounds of one side."""
    n = facts["repeats"]
    spread = f"{seconds(facts['seconds_min'])} to {seconds(facts['seconds_max'])}, " if n > 1 else ""
    return f"{seconds(facts['seconds_median'])} ({spread}n {n})"


def memory(facts: dict[str, Any]) -> str:
    """Peak memory where it was measured."""
    return f"{facts['peak_bytes'] / 2**20:.0f} MiB" if facts.get("peak_bytes") else ""


def section(path: Path, report: dict[str, Any]) -> list[str]:
    """One result file as Markdown."""
    m = report["machine"]
    lines = [f"\n## {report['bench']}, {path.parent.name}\n", f"`{' '.join(report['command'])}`\n"]
    made = f"torch {m['torch']}, commit {report['commit']}"
    load = f"load average {m['load_average'][0]:.1f}, " if m.get("load_average") else ""
    simd = f"{m['simd']}, " if m.get("simd") else ""
    lines.append(f"{m['cpu']}, {simd}{m['threads']} threads, {load}device {report['device']}, {made}\n")
    quick = is_quick(report)
    lines += [QUICK] if quick else []
    lines += [f"{NAIVE}.\n"] if any(peer.startswith("naive") for row in report["rows"] for peer in row["peers"]) else []
    lines += [
        "| case | side | time | ratio to fastsrgan | peak memory | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        if not row["passed"]:
            lines.append(
                f"| {row['name']} | | no times: difference {row['max_error']} | | | above {row['tolerance']} |"
            )
            continue
        lines.append(f"| {row['name']} | fastsrgan | {times(row)} | | {memory(row)} | {row['max_error']:.1e} |")
        for peer, facts in row["peers"].items():
            if "not_run" in facts:
                lines.append(f"| | {peer} | not run: {facts['not_run']} | | | |")
            else:
                ratio = f"{row['ratio_to'][peer]:.2f} x" if peer in row["ratio_to"] and not quick else ""
                name = RENAMED.get(peer, peer) + (infer_page.MARK if other_work(peer, row["name"]) else "")
                lines.append(f"| | {name} | {times(facts)} | {ratio} | {memory(facts)} | {facts['max_error']:.1e} |")
    if path.name == STEP_REPORT:
        lines += ["", f"![time and memory of every side](images/{STEP.name})"]
    if any(row["name"].startswith(END_TO_END) and "patches_per_second" in row for row in report["rows"]) and not quick:
        lines += [
            "",
            "End to end (docs/data-engine.md says what the columns are):\n",
            data_page.rates(report, notes=False).rstrip(),
        ]
    if report["bench"] == "infer" and (tables := infer_page.markdown(report)):
        lines += ["", f"![seconds against step](images/{STEPS.name})", "", tables]
    notes = [f"* {line}" for line in (*marked(report["rows"]), *_notes(report))]
    return [*lines, "", *notes] if notes else lines


def _notes(report: dict[str, Any]) -> list[str]:
    """Of training steps: cases that missed an earlier gate and were run again with a wider one, and why."""
    told = []
    for row in report["rows"] if report["bench"] == "step" else ():
        for start, (earlier, missed, why) in step.WIDENED.items():
            if row["name"].startswith(start) and row["tolerance"] > earlier:
                told.append(
                    f"{row['name']}: missed its earlier gate of {earlier:g} with {missed:g} and was run again with "
                    f"{row['tolerance']:g} (this run: {row['max_error']:.1e}): {why}"
                )
    return told


def scaled(path: Path, report: dict[str, Any]) -> list[str]:
    """A checked prediction of epochs as Markdown, and what the same model says of other cohorts."""
    m = report["machine"]
    lines = [f"\n## scale, {path.parent.name}\n", f"`{' '.join(report['command'])}`\n"]
    load = f"load average {m['load_average'][0]:.1f}, " if m.get("load_average") else ""
    lines.append(f"{m['cpu']}, ranks of one thread, {load}torch {m['torch']}, commit {report['commit']}\n")
    if is_quick(report):
        lines.append(QUICK)
    else:
        lines += ["Epochs as predicted from one update, one volume and weak scaling, and as then run:\n"]
        lines.append(scale.section(report))
    try:
        figures = scale.measured(path.parent)
    except InputError:
        return lines
    lines.append("What the same sums say of this machine's own step and data figures (`python -m bench scale`):\n")
    lines.append(scale.prediction_table(figures, (40, 1000, 100_000), (1, 8, 64), 0.0))
    return [*lines, "## Epochs on an accelerator, by arithmetic\n", scale.assumed(figures, path.parent.name)]


def machines(reports: list[tuple[Path, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Folder of a machine -> name of a bench -> its report; without variants and what was measured quickly."""
    found: dict[str, dict[str, Any]] = {}
    for path, report in reports:
        if path.name == f"{report['bench']}.json" and not is_quick(report):
            found.setdefault(path.parent.name, {})[report["bench"]] = report
    return found


def opening(found: dict[str, dict[str, Any]]) -> list[str]:
    """Five sentences of one machine, then a picture and a table of all; the picture is drawn here."""
    if not found:
        return []
    name = summary.chosen(found)
    summary.plot(found, SUMMARY)
    return [
        f"\nMeasured on {_processor(found[name])} ({name}):\n",
        *(f"{i}. {text}" for i, text in enumerate(summary.sentences(found[name]), 1)),
        f"\n![What the other sides take, in units of fastsrgan's time and memory](images/{SUMMARY.name})",
        f"\nOn every machine ({'; '.join(f'{name}: {_processor(on)}' for name, on in found.items())}):\n",
        *summary.comparison(found),
    ]


def _processor(reports: dict[str, Any]) -> str:
    """Name and instructions of the processor of a machine."""
    machine = next(iter(reports.values()))["machine"]
    return ", ".join(machine[key] for key in ("cpu", "simd") if machine.get(key))


def main(argv: Sequence[str] = ()) -> Path:
    """``python -m bench report``: write the pages and pictures; returns the first page."""
    argparse.ArgumentParser(prog="python -m bench report", description=__doc__).parse_args(argv)
    reports = load()
    found = machines(reports)
    lines = ["# Benchmarks", *opening(found), HEAD]
    for path, report in reports:
        lines += scaled(path, report) if report["bench"] == "scale" else section(path, report)
    lines += ["\n## What the words mean\n", *(f"* {note}" for note in NOTES)]
    with atomic_write(PAGE) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf8")
    with atomic_write(ROOFLINE) as temporary:
        temporary.write_text(roofline.page(), encoding="utf8")
    slow = [(path, report) for path, report in reports if not is_quick(report)]
    slow.sort(key=lambda one: one[0].parent.name != summary.chosen(found))  # pictures are of the machine that opens
    drawn = [report for path, report in slow if path.name == "infer.json" and infer_page.markdown(report)]
    if drawn:
        infer_plot.plot(drawn[0], STEPS)
    measured = [report for path, report in slow if path.name == STEP_REPORT]
    if measured:
        plot_step.plot(measured[0], STEP)
    data = [report for path, report in slow if path.name == "data.json"]
    if data and ENGINE.is_file():
        data_page.refresh(ENGINE, data[0])
        plot(data[0], PICTURE)
    return PAGE
