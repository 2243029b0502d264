"""What a study leaves behind: KIND.json, KIND.csv, KIND.md and the figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsrgan.core.files import atomic_write, write_json
from fastsrgan.errors import brief, counted
from fastsrgan.evaluate.figures import columns, mean_dice
from fastsrgan.io.tables import write_rows
from fastsrgan.study.data import DICE_OF, OWN
from fastsrgan.study.plots import Panel, draw

# A reader would take its Dice, which can be above a network's, for that of a method.
INTERPOLATION = (
    "interpolation: cubic spline of the scan; for the segmentation the true label at the scan's resolution,\n"
    "interpolated back (paper table 2), which knows the answer that the network has to find"
)


def write_study(folder: Path, facts: dict[str, Any], panels: Sequence[Sequence[Panel]], title: str) -> dict[str, Any]:
    """Write the files of one study; ``facts`` with their paths under ``files``."""
    kind = facts["study"]
    base = folder / kind
    rows = csv_rows(facts["rows"])
    write_rows(base.with_suffix(".csv"), rows)
    based = any(line.style == "baseline" for row in panels for panel in row for line in panel.lines)
    words = INTERPOLATION.partition(";")[0] if kind == "curves" else INTERPOLATION
    pictures = draw(base, panels, title, footer=words if based else "")
    facts = facts | {"files": {path.suffix[1:]: str(path) for path in pictures}}
    facts["files"] |= {form: str(base.with_suffix(f".{form}")) for form in ("csv", "md", "json")}
    with atomic_write(base.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(facts, title), encoding="utf8")
    write_json(base.with_suffix(".json"), facts)
    return facts


def csv_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a column each for mean and sd of every figure (``aggregate``), or as they are (``curves``)."""
    flat = []
    for row in rows:
        if "figures" not in row:
            flat.append(dict(row))
            continue
        line = {key: value for key, value in row.items() if key != "figures"}
        line["low_res"] = " x ".join(f"{r:g}" for r in row["low_res"])
        for name, told in row["figures"].items():
            line |= {f"{name}_mean": told["mean"], f"{name}_sd": told["sd"]}
        flat.append(line)
    return flat


def headings() -> dict[str, tuple[str, int]]:
    """Heading of a column of the tables and digits after the point."""
    return {name: (column.heading, column.figure.digits) for name, column in columns().items()} | OWN


def shown_rows(facts: dict[str, Any]) -> list[dict[str, str]]:
    """The table as a reader wants it: ``mean ± sd`` in one cell; what never changes is left out."""
    rows = facts["rows"]
    if facts["study"] == "curves":
        return [{key: _number(value) for key, value in row.items()} for row in rows]
    known = headings()
    found = dict.fromkeys(name for row in rows for name in row["figures"])
    more = {n: (f"Dice {n.removeprefix(DICE_OF)}", known["dice"][1]) for n in found if n not in known}
    figures = {name: head for name, head in (known | more).items() if name in found}
    shown = []
    for row in rows:
        step = "-" if row["step"] is None else str(row["step"])
        line = {"condition": row["condition"], "model": row["model"], "step": step}
        for name, (heading, digits) in figures.items():
            line[heading] = _spread(row["figures"].get(name), digits)
        shown.append(line | {"n": str(row["n"])})
    return shown


# Of the scores of patches and of whole volumes: before the heading; PSNR, the spline's, the best linear's, SSIM.
DECISIVE = (
    ("", "PSNR", "PSNR_spline", "PSNR_linear", "SSIM"),
    ("whole ", "whole_PSNR", "spline_PSNR", "linear_PSNR", "whole_SSIM"),
)


def decisive_rows(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Of training curves the columns that decide, for a terminal; the files have all."""
    done: Counter[str] = Counter()
    rows = []
    for row in facts["rows"]:
        done[run := row.get("run", "")] += row["updates"]
        line = ({"run": run} if run else {}) | {"epoch": str(row["epoch"]), "update": str(done[run])}
        line |= {"lr factor": _number(row["lr_factor"])} if "lr_factor" in row else {}
        for part, psnr, spline, linear, ssim in DECISIVE:
            line |= {f"{part}PSNR": f"{row[psnr]:.2f}"} if psnr in row else {}
            others = {f"{part}over spline": spline, f"{part}over linear": linear}
            line |= {head: f"{row[psnr] - row[key]:+.2f}" for head, key in others.items() if psnr in row and key in row}
            line |= {f"{part}SSIM": f"{row[ssim]:.3f}"} if ssim in row else {}
            dice = mean_dice(row, part.replace(" ", "_"))
            line |= {} if dice is None else {f"{part}Dice": f"{dice:.3f}"}
        rows.append(line)
    return rows


def best_lines(facts: dict[str, Any]) -> list[str]:
    """Which epochs of training curves were best, a line for each run."""
    lines = []
    for run in facts.get("runs", [facts]):
        mine = [row for row in facts["rows"] if row.get("run") == run.get("name")]
        key = next((key for _, key, *_ in DECISIVE if any(key in row for row in mine)), "")
        top = max((row for row in mine if key in row), key=lambda row: row[key], default=None)
        told = [f" Best {key.replace('_', ' ')} {top[key]:.2f} at epoch {top['epoch']}."] if top else []
        name = f"{run['name']}:" if "runs" in facts else ""
        lines.append(f"{name}{''.join(told)}{_best(run['best'])}".strip())
    return [line for line in lines if line]


def paper_rows(facts: dict[str, Any]) -> list[dict[str, str]]:
    """The paper's figures for this study under the same headings; empty where it has none."""
    rows = facts["paper"]["rows"]
    figures = {name: head for name, (head, _) in headings().items() if any(name in row for row in rows)}
    shown = [
        {"condition": row["condition"], "model": row["model"], "step": str(row["step"] or "-")}
        | {heading: _number(row.get(name)) for name, heading in figures.items()}
        for row in rows
    ]
    return [row for i, row in enumerate(shown) if row not in shown[:i]]  # two of its tables share some


def fit_text(fit: dict[str, Any]) -> str:
    """The fit of one condition and model as a sentence."""
    r2 = "" if fit["r2"] is None else f", R² {fit['r2']:.3f}"
    formula = f"seconds = {fit['intercept_s']:.3g} + {brief(fit['slope_s'], 4)} / step³{r2}"
    return f"{fit['condition']}, {fit['model']}: {formula}"


def markdown(facts: dict[str, Any], title: str) -> str:
    """The study as a page."""
    kind = facts["study"]
    parts = [f"# {title}", f"![{title}]({kind}.png)", _table(shown_rows(facts))]
    if "runs" in facts:
        for run in facts["runs"]:
            parts.append(f"{run['name']}: {run['path']}, {counted(run['updates'], 'update')}.{_best(run['best'])}")
    elif kind == "curves":
        parts.append(f"Run: {facts['run']}.{_best(facts['best'])}")
    else:
        low = {" x ".join(f"{r:g}" for r in row["low_res"]) for row in facts["rows"]}
        models = "; ".join(f"{m['name']} (SHA-256 {m['sha256'][:12]})" for m in facts["models"])
        patch = "the whole image" if facts["settings"]["whole"] else f"{facts['settings']['patch']} voxels"
        shown = "mean ± sample standard deviation over heads" if len(facts["heads"]) > 1 else "those of the one head"
        parts.append(
            f"Heads: {len(facts['heads'])} of {facts['data']}. Acquired at {', '.join(sorted(low))} mm."
            f" Models: {models}. Patch {patch}. Values are {shown}; PSNR and SSIM"
            f" over the whole image. {' '.join(INTERPOLATION.splitlines()).capitalize()}."
            " Heads are cut to whole slices first, unlike in validation and `evaluate`, whose figures differ a little."
        )
        parts += [facts["note"]] if facts.get("note") else []
        parts += [f"Left out: {f['subject']}: {f['error']}" for f in facts["failed"]]
        parts += [f"Note: {note}" for note in facts.get("notes", ())]
    parts += [f"Fit, {fit_text(fit)}." for fit in facts.get("fit", [])]
    quoted = paper_rows(facts)
    if quoted:
        parts += ["## The paper's own data", facts["paper"]["source"] + ".", _table(quoted)]
    return "\n\n".join(parts) + "\n"


def _best(best: dict[str, Any] | None) -> str:
    return f" Best {best['dice_is']} {best['Dice']:.4f} at epoch {best['epoch']}." if best else ""


def _table(rows: Sequence[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.get(name, "-") for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _spread(told: dict[str, Any] | None, digits: int) -> str:
    if told is None:
        return "-"
    mean = f"{told['mean']:.{digits}f}"
    return mean if told["sd"] is None or not digits else f"{mean} ± {told['sd']:.{digits}f}"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
