"""What a report of dense inference says in figures: time against step with its fit, sides, ceilings; as Markdown."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bench.common import other_work

OURS = "fastsrgan"
MARK = " †"  # of sides that do other work
KINDS = ("sum alone", "stitching alone", "whole inference")


class Fit(NamedTuple):
    """seconds = base + scale / step^3; r2: share of the variance that it explains."""

    base: float
    scale: float
    r2: float

    def __call__(self, step: Any) -> Any:
        return self.base + self.scale / np.asarray(step, float) ** 3


def affine_fit(points: dict[int, float]) -> Fit | None:
    """Least squares over step -> seconds; None with fewer than three steps, which any curve would fit."""
    if len(points) < 3:
        return None
    steps, seconds = np.array(list(points), float), np.array(list(points.values()))
    a = np.stack([np.ones_like(steps), steps**-3], axis=1)
    (base, scale), *_ = np.linalg.lstsq(a, seconds, rcond=None)
    left, spread = seconds - a @ (base, scale), seconds - seconds.mean()
    return Fit(float(base), float(scale), float(1 - (left @ left) / max(float(spread @ spread), 1e-30)))


def rows_of(report: dict[str, Any], kind: str, window: str = "constant") -> list[dict[str, Any]]:
    """Rows with times, the largest step first; of whole inference those of the first kernel."""
    rows = [r for r in report["rows"] if r.get("kind") == kind and r["window"] == window and "seconds_median" in r]
    kernel = rows[0].get("kernel") if rows else None
    return sorted((r for r in rows if r.get("kernel") == kernel), key=lambda r: -r["step"])


def sides(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every side that ran, ours first."""
    return {OURS: row} | {name: facts for name, facts in row["peers"].items() if "seconds_median" in facts}


def against_step(report: dict[str, Any], kind: str) -> dict[str, dict[int, float]]:
    """side -> step -> seconds."""
    found: dict[str, dict[int, float]] = {}
    for row in rows_of(report, kind):
        for name, facts in sides(row).items():
            found.setdefault(name, {})[row["step"]] = facts["seconds_median"]
    return found


def markdown(report: dict[str, Any]) -> str:
    """Tables of steps and of the share of the ceiling; empty for reports that have none of these rows."""
    lines: list[str] = []
    for window in ("constant", "gaussian"):
        for kind in KINDS:
            if rows := rows_of(report, kind, window):
                lines += ["", *_table(kind, window, rows)]
    for name, points in against_step(report, "whole inference").items():
        if fit := affine_fit(points):
            lines += ["", f"{name}: {fit.base:.3g} s + {brief_of(fit.scale)} s / step^3 (R2 {fit.r2:.3f})."]
    return "\n".join(lines[1:])


def brief_of(value: float, digits: int = 3) -> str:
    """A number without an exponent where it is large: 10708.3 -> '10,708'."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def _table(kind: str, window: str, rows: list[dict[str, Any]]) -> list[str]:
    size = " x ".join(map(str, rows[0]["shape"]))
    more = {"sum alone": "of the copy ceiling", "whole inference": "outside the network"}.get(kind)
    head = ["step", "tiles", "side", "time", "tiles/s", "ratio", "error to float64", *([more] if more else [])]
    lines = [f"{kind.capitalize()}, {window}, {size}, patch {rows[0]['patch']}:", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        for name, facts in sides(row).items():
            first = name == OURS
            cells = [str(row["step"]), str(row["tiles"])] if first else ["", ""]
            mark = MARK if other_work(name) else ""
            cells += [name + mark, f"{facts['seconds_median']:.3g} s", brief_of(facts["tiles_per_second"], 4)]
            ratio = row["ratio_to"].get(name)
            cells += ["" if ratio is None else f"{ratio:.2f} x", f"{facts['error_to_float64']:.1e}"]
            if more:
                share = facts.get("outside_network" if kind == "whole inference" else "of_copy_ceiling")
                cells.append("" if share is None else f"{100 * share:.1f} %")
            lines.append("| " + " | ".join(cells) + " |")
    return lines
