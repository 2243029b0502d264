"""``python -m bench report``: bench/results/*/*.json -> docs/benchmarks.md, nothing of which is written by hand, and
the figures and picture of docs/data-engine.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import data_page, infer_page, infer_plot, plot_step, roofline, scale
from bench.data_page import RESULTS
from bench.plot import plot
from fastsrgan.core.files import atomic_write
from fastsrgan.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
ENGINE, PICTURE = ROOT / "docs" / "data-engine.md", ROOT / "docs" / "images" / "data-engine.png"
STEP, STEP_REPORT = ROOT / "docs" / "images" / "step.png", "step.json"
STEPS = ROOT / "docs" / "images" / "infer-steps.png"
PAGE = ROOT / "docs" / "benchmarks.md"
ROOFLINE = ROOT / "docs" / "roofline.md"
HEAD = """# Benchmarks

Made by `python -m bench report` from the files in `bench/results/`; run the commands below to repeat them on your
machine. In every case the sides do the same work on the same inputs in one process and take turns; results are
compared first, and a case that exceeds its tolerance has no times. Times are medians, with the smallest and largest in
brackets.
"""
NO_GPU = "**No result on this page was measured on a GPU: none has been run on one yet.**\n"


def load() -> list[tuple[Path, dict[str, Any]]]:
    """All results of `python -m bench`, ordered by machine and bench; other tools keep theirs beside them."""
    found = [(path, json.loads(path.read_text(encoding="utf8"))) for path in sorted(RESULTS.glob("*/*.json"))]
    return [(path, report) for path, report in found if isinstance(report, dict) and "bench" in report]


def seconds(value: float) -> str:
    """A time with a fitting unit."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def times(facts: dict[str, Any]) -> str:
    """Median and spread of one side."""
    return f"{seconds(facts['seconds_median'])} ({seconds(facts['seconds_min'])} to {seconds(facts['seconds_max'])})"


def memory(facts: dict[str, Any]) -> str:
    """Peak memory where it was measured."""
    return f"{facts['peak_bytes'] / 2**20:.0f} MiB" if facts.get("peak_bytes") else ""


def section(path: Path, report: dict[str, Any]) -> list[str]:
    """One result file as Markdown."""
    m = report["machine"]
    lines = [f"\n## {report['bench']}, {path.parent.name}\n", f"`{' '.join(report['command'])}`\n"]
    made = f"torch {m['torch']}, commit {report['commit']}"
    lines.append(f"{m['cpu']}, {m['threads']} threads, device {report['device']}, {made}\n")
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
                ratio = f"{row['ratio_to'][peer]:.2f} x"
                lines.append(f"| | {peer} | {times(facts)} | {ratio} | {memory(facts)} | {facts['max_error']:.1e} |")
    if path.name == STEP_REPORT:
        lines += ["", f"![time and memory of every side](images/{STEP.name})"]
    if any(row["name"].startswith("end to end") for row in report["rows"]):
        lines += ["", "End to end (docs/data-engine.md says what the columns are):\n", data_page.rates(report).rstrip()]
    if report["bench"] == "infer" and (tables := infer_page.markdown(report)):
        lines += ["", f"![seconds against step](images/{STEPS.name})", "", tables]
    return [*lines, "", *(f"* {note}" for note in report["notes"])]


def scaled(path: Path, report: dict[str, Any]) -> list[str]:
    """A checked prediction of epochs as Markdown, and what the same model says of other cohorts."""
    m = report["machine"]
    lines = [f"\n## scale, {path.parent.name}\n", f"`{' '.join(report['command'])}`\n"]
    lines.append(f"{m['cpu']}, ranks of one thread, torch {m['torch']}, commit {report['commit']}\n")
    lines += ["Epochs as predicted from one update, one volume and weak scaling, and as then run:\n"]
    lines.append(scale.section(report))
    try:
        figures = scale.measured(path.parent)
    except InputError:
        return lines
    lines.append("What the same sums say of this machine's own step and data figures (`python -m bench scale`):\n")
    lines.append(scale.prediction_table(figures, (40, 1000, 100_000), (1, 8, 64), 0.0))
    return [*lines, scale.assumed(figures)]


def main() -> Path:
    """Write the page."""
    reports = load()
    lines = [HEAD]
    if not any("cuda" in report["device"].lower() or "nvidia" in report["device"].lower() for _, report in reports):
        lines.append(NO_GPU)
    for path, report in reports:
        lines += scaled(path, report) if report["bench"] == "scale" else section(path, report)
    with atomic_write(PAGE) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf8")
    with atomic_write(ROOFLINE) as temporary:
        temporary.write_text(roofline.page(), encoding="utf8")
    drawn = [report for path, report in reports if path.name == "infer.json" and infer_page.markdown(report)]
    if drawn:
        infer_plot.plot(drawn[0], STEPS)
    steps = [report for path, report in reports if path.name == STEP_REPORT]
    if steps:
        plot_step.plot(steps[0], STEP)
    data = [report for path, report in reports if path.name == "data.json"]
    if data and ENGINE.is_file():
        data_page.refresh(ENGINE, data[0])
        plot(data[0], PICTURE)
    return PAGE
