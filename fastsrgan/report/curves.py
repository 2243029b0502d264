"""A training run as a section: losses, validation, what a step cost, sample panels, settings."""

from __future__ import annotations

import base64
import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsrgan.config import SETTINGS
from fastsrgan.core.files import mapping, parse_json, read_json, real
from fastsrgan.core.signals import SAID, named
from fastsrgan.errors import counted
from fastsrgan.evaluate.figures import structure_line
from fastsrgan.pictures.planes import find_panels
from fastsrgan.report.html import Html, Line, el, join, line_chart, number, pointer, scrolled
from fastsrgan.report.sections import card, facts_table, raw

log = logging.getLogger("fastsrgan")

PANELS = 4
START, BEGAN = "start_weights", "start weights"  # in a summary, and on a page
SIGNATURE = b"\x89PNG"
BINS = 300  # points of a curve; longer runs show means over several updates
COLUMNS = "interpolated input, SR, truth, segmentation, label"
RECONSTRUCTION = "reconstruction loss"  # where the settings do not say which
LOSS_NAME = "reconstruction_loss"
LOSS = re.compile(rf"^{LOSS_NAME}: *(\w+)", re.M)  # in config.yaml
BEHIND = "behind update"
LOSSES = {"charbonnier": "Charbonnier loss", "dice": "Charbonnier + Dice loss"}  # of --reconstruction-loss
CHARTS = (
    ("Reconstruction", ("g_reconstruction",), RECONSTRUCTION),
    ("Generator", ("g_total", "g_adversarial", "g_dice"), "loss"),
    ("Critic", ("d_wasserstein", "d_penalty"), "loss"),
    ("Gradient norms", ("g_gradient", "d_gradient"), "norm"),
    ("Time of an update", ("seconds",), "s"),
)
SIGNALS = tuple(SAID)
STRUCTURES = "Dice of each structure on the test subjects"  # a line for every one
SCORES = (
    ("Dice on the test subjects", ("Dice", "Dice_label_1", "whole_Dice", "spline_Dice")),
    (STRUCTURES, ()),
    (
        "PSNR on the test subjects, dB",
        ("PSNR", "PSNR_spline", "PSNR_linear", "whole_PSNR", "spline_PSNR", "linear_PSNR"),
    ),
    ("SSIM on the test subjects", ("SSIM", "SSIM_spline", "whole_SSIM", "spline_SSIM")),
    ("Mean squared error on the test subjects", ("MSE",)),
)
# What a chart calls the columns of the log.
LINES = {
    **dict.fromkeys(("Dice", "Dice_label_1", "PSNR", "SSIM", "MSE"), "patches"),
    **dict.fromkeys(("PSNR_spline", "SSIM_spline"), "interpolation, patches"),
    **{"PSNR_linear": "best linear estimate, patches", "linear_PSNR": "best linear estimate, whole volumes"},
    **dict.fromkeys(("whole_Dice", "whole_PSNR", "whole_SSIM"), "whole volumes"),
    **dict.fromkeys(("spline_Dice", "spline_PSNR", "spline_SSIM"), "interpolation, whole volumes"),
    "g_total": "total",
    "g_gradient": "generator",
    "g_adversarial": "adversarial loss, before its weight",
    "g_dice": "Dice loss, before its weight",
    "d_wasserstein": "Wasserstein estimate",
    "d_penalty": "gradient penalty",
    "d_gradient": "critic",
}
# What a page calls the entries of a summary, and their units; settings are called by their meaning in docs/config.md.
SUMMARY = {
    "epochs": ("epochs trained", ""),
    "updates": ("updates", ""),
    "resumed_at": ("resumed behind update", ""),
    "seconds": ("time", " s"),
    "data_wait_seconds": ("of it waiting for data", " s"),
    "first_wait_seconds": ("wait for the first data", " s"),
    "best": ("best score", ""),
    "best_epoch": ("epoch of the best score", ""),
    "best_dice": ("its Dice", ""),
    "dice_is": ("which is the", ""),
    "ended_early": ("ended by patience behind epoch", ""),
    "weights": ("last weights", ""),
    "best_weights": ("best weights", ""),
    "ranks": ("processes", ""),
    "device": ("device", ""),
    "stopped": ("stopped by", ""),
    "exit_code": ("exit code", ""),
}
SAME = {"Dice_label_1": "Dice"}  # the label's Dice, as a run with mask classes calls it: of several runs one chart


def read_run(run: Path) -> dict[str, Any]:
    """The facts of a run folder: summary, settings, curves binned to at most 300 points, validations, log faults."""
    rows, faults = [], 0
    for line in (run / "log.jsonl").read_text(encoding="utf8", errors="replace").splitlines():
        row = parse_json(line)
        faults += not row
        rows += [row] if row else []
    updates = [row for row in rows if isinstance(row.get("update"), int)]
    scores = [row for row in rows if isinstance(row.get("validation"), dict) and isinstance(row.get("epoch"), int)]
    width = -(-len(updates) // BINS) or 1
    names = dict.fromkeys(k for _, keys, _ in CHARTS for k in keys)
    curves: dict[str, list[float | None]] = {name: [] for name in names}
    at = []
    for start in range(0, len(updates), width):
        part = updates[start : start + width]
        at.append(sum(row["update"] for row in part) / len(part))
        for name, curve in curves.items():
            values = [row[name] for row in part if isinstance(row.get(name), (int, float))]
            curve.append(sum(values) / len(values) if values else None)
    summary = read_json(run / "summary.json")
    wrong = [f"epoch {row['epoch']}: {row['warning']}" for row in scores if isinstance(row.get("warning"), str)]
    # A summary of another number of updates is of an earlier part of the run.
    if updates and summary.get("updates") == updates[-1]["update"] and isinstance(summary.get("warnings"), list):
        wrong += [line for line in summary["warnings"] if isinstance(line, str) and line not in wrong]
    return {
        "folder": real(run).name,
        "summary": summary or None,
        "data_warnings": _warnings(run),
        "config": _text(run / "config.yaml"),
        "changed": _changes(rows),
        "updates": len(updates),
        "updates_per_point": width,
        "at": at,
        "curves": {name: curve for name, curve in curves.items() if any(v is not None for v in curve)},
        "warnings": wrong,
        "validation": [{"epoch": row["epoch"], **row["validation"]} for row in scores],
        "unreadable_lines": faults,
    }


def _changes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where a run was resumed with other settings: [{behind: update, settings: {name: [before, now]}}]."""
    found = []
    for row in rows:
        behind, changed = row.get("behind_update"), mapping(row.get("changed"))
        pairs = {k: v for k, v in changed.items() if isinstance(v, list) and len(v) == 2}
        if isinstance(behind, int) and pairs:
            found.append({"behind": behind, "settings": pairs})
    return found


def _resumes(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ``_changes`` found; nothing of facts of earlier versions."""
    return facts.get("changed") or []


def runs_card(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> Html:
    """Several runs laid over each other; facts of ``read_run`` lie at /runs/INDEX: a line of its own for each."""
    plots, scored = [], [v for facts in runs for v in facts["validation"]]
    for title, known in SCORES:
        found = _columns(title, known, scored)
        own = list(dict.fromkeys(SAME.get(k, k) for k in found if not _of_baseline(k)))
        for key in own:
            values_of = [[_plain(_first(v, key)) for v in facts["validation"]] for facts in runs]
            lines = [
                Line(name, [v["epoch"] for v in facts["validation"]], values, number=i)
                for i, (name, facts, values) in enumerate(zip(names, runs, values_of, strict=True))
                if any(value is not None for value in values)
            ]
            whose = f": {_line_name(key)}" * (len(own) > 1 or title == STRUCTURES)
            plots.append(line_chart(_titled(title, scored) + whose, lines, "epoch", named=True))
    for title, columns, unit in CHARTS:
        for column in columns:
            lines = [
                Line(name, facts["at"], facts["curves"][column], number=i)
                for i, (name, facts) in enumerate(zip(names, runs, strict=True))
                if column in facts["curves"]
            ]
            named = f"{title}: {LINES[column]}" if column in LINES else title
            losses = {_loss(facts) for facts in runs}
            drawn = _unit(unit, losses.pop() if len(losses) == 1 else "")
            plots.append(line_chart(named, lines, "update", drawn, named=True))
    told = [f["summary"] or {} for f in runs]
    entries = _entries(told)
    rows = []
    for key in entries:
        places = [pointer("runs", i, "summary", key) for i in range(len(told))]
        cells = [el("td", _entered(key, one.get(key), at)) for one, at in zip(told, places, strict=True)]
        rows.append(el("tr", el("th", _entry(key, told), scope="row"), cells))
    began = [_began_with(one) for one in told]
    if len(set(began)) < len({_began_with(one, checksum=True) for one in told}):  # files of one name
        began = [_began_with(one, checksum=True) for one in told]
    rows.append(el("tr", el("th", BEGAN, scope="row"), [el("td", one) for one in began]))
    changed = _changed(runs, began, names) or el("p", "None.", class_="faint")
    summary = join(el("h3", "Summary"), scrolled(_named(names), rows))
    drawn = el("div", [p for p in plots if p], class_="plots")
    return card("Training runs", drawn, summary, el("h3", "Settings that differ"), changed)


def _named(names: Sequence[str]) -> Html:
    """The headings of a table with a column for each run."""
    return el("tr", el("th", ""), [el("th", name, scope="col") for name in names])


def _changed(runs: Sequence[Mapping[str, Any]], began: Sequence[str], names: Sequence[str]) -> Html | None:
    """What the runs began with and the lines of config.yaml, where they are not the same in all runs all along."""
    settings = [
        {BEGAN: one} | dict(line.split(":", 1) for line in facts["config"].splitlines() if ":" in line)
        for facts, one in zip(runs, began, strict=True)
    ]
    for facts, known in zip(runs, settings, strict=True):
        for one in _resumes(facts):
            for name, (before, _) in one["settings"].items():
                known[name] = f"{known.get(name, '–')} (up to update {one['behind']}: {before})"
    keys = [k for k in dict.fromkeys(k for s in settings for k in s) if len({s.get(k) for s in settings}) > 1]
    if not keys:
        return None
    rows = []
    for key in keys:
        cells = [el("td", known.get(key, "–").strip()) for known in settings]
        rows.append(el("tr", el("th", _setting(key.strip()), scope="row"), cells))
    return scrolled(_named(names), rows)


def _began_with(summary: Mapping[str, Any], checksum: bool = False) -> str:
    """The weights that a run began with: as they were named, the file where that is another name, its checksum."""
    start = summary.get(START)
    if not isinstance(start, Mapping):
        return str(start or "new") if summary else "–"
    name, file = str(start.get("path")), Path(str(start.get("file"))).name
    words = [file] * (Path(name).name != file) + [f"SHA-256 {str(start.get('sha256'))[:8]}"] * checksum
    return f"{name} ({', '.join(words)})" if words else name


def _warnings(run: Path) -> list[str]:
    """What was noted about the subjects' files, from the run's record of its data."""
    found = mapping(read_json(run / "data.json").get("warnings"))
    return [f"{name}: {text}" for name, texts in found.items() if isinstance(texts, list) for text in texts]


def run_card(facts: dict[str, Any], panels: list[tuple[str, bytes]]) -> Html:
    """The section; ``facts`` of ``read_run`` lie at /run."""
    summary, validation = facts["summary"] or {}, facts["validation"]
    plots = []
    for title, known in SCORES:
        keys, epochs = _columns(title, known, validation), [v["epoch"] for v in validation]
        values = {key: [_plain(v.get(key)) for v in validation] for key in keys}
        lines = [Line(_line_name(key), epochs, values[key], _of_baseline(key)) for key in keys]
        plots.append(line_chart(_titled(title, validation), lines, "epoch"))
    for title, names, unit in CHARTS:
        drawn = [name for name in names if name in facts["curves"]]
        lines = [Line(LINES.get(name, name), facts["at"], facts["curves"][name]) for name in drawn]
        loss = _loss(facts) if unit == RECONSTRUCTION else ""
        many = BEHIND in loss  # too long for an axis
        plots.append(line_chart(f"{title}: {loss}" if many else title, lines, "update", _unit(unit, loss)))
    width = facts["updates_per_point"]
    notes = [f"A point is the mean of {width} updates." if width > 1 else None]
    if facts["unreadable_lines"]:
        notes.append(f"{counted(facts['unreadable_lines'], 'line')} of the log could not be read.")
    if not summary:
        notes.append("The run has no summary: it has not ended, or was killed.")
    entries = [(key, pointer("run", "summary", key)) for key in _entries([summary])]
    rows = [(_entry(key, [summary]), _entered(key, summary[key], at)) for key, at in entries]
    rows += [(BEGAN, _began_with(summary))] if summary else []
    rows += [(f"settings {BEHIND} {one['behind']}", _said(one["settings"])) for one in _resumes(facts)]
    head = facts_table(rows)
    noted = facts.get("data_warnings") or []
    told = el("ul", [el("li", line) for line in noted])
    about = el("details", el("summary", f"{counted(len(noted), 'warning')} about the data"), told)
    table = el("details", el("summary", "Validations as a table"), _table(validation)) if validation else None
    wrong = [el("li", line) for line in facts["warnings"]]
    return card(
        "Training",
        el("ul", wrong, class_="warnings") if wrong else None,
        el("p", " ".join(filter(None, notes)), class_="faint") if any(notes) else None,
        el("div", [p for p in plots if p], class_="plots"),
        about if noted else None,
        table,
        _samples(panels),
        el("h3", "Summary"),
        head,
        raw("Settings (config.yaml)", facts["config"]) if facts["config"] else None,
    )


def _loss(facts: Mapping[str, Any]) -> str:
    """The reconstruction loss of a run, of a resumed one all that it had; "" where its settings do not say."""
    found = LOSS.search(facts["config"])
    if found is None:
        return ""
    changes = [(one["behind"], *one["settings"][LOSS_NAME]) for one in _resumes(facts) if LOSS_NAME in one["settings"]]
    kinds = [changes[0][1], *(now for _, _, now in changes)] if changes else [found[1]]
    names = [LOSSES.get(str(kind), str(kind)) for kind in kinds]
    return ", ".join([names[0], *(f"{BEHIND} {at} {name}" for (at, *_), name in zip(changes, names[1:], strict=True))])


def _unit(unit: str, loss: str) -> str:
    """What a chart draws, of the reconstruction the loss by its name where that is one."""
    return loss if unit == RECONSTRUCTION and loss and BEHIND not in loss else unit


def _columns(title: str, known: Sequence[str], validation: Sequence[dict[str, Any]]) -> list[str]:
    """Of a chart's columns those that validations have."""
    found = dict.fromkeys(k for v in validation for k in v)
    return [k for k in found if structure_line(k)] if title == STRUCTURES else [k for k in known if k in found]


def _titled(title: str, validation: Sequence[dict[str, Any]]) -> str:
    """A chart's title; of several structures the segmentation is the first's."""
    first = title.startswith("Dice on") and any(structure_line(k) for v in validation for k in v)
    return f"{title}, segmentation of the first structure" if first else title


def _line_name(key: str) -> str:
    return LINES.get(key) or structure_line(key) or key


def _first(validation: Mapping[str, Any], key: str) -> Any:
    """A score by its name, else by another that ``SAME`` has for it."""
    return next((validation[k] for k in (key, *(k for k, v in SAME.items() if v == key)) if k in validation), None)


def _of_baseline(key: str) -> bool:
    return "spline" in key or "linear" in key


def sample_panels(run: Path) -> list[tuple[str, bytes]]:
    """(caption, PNG) of a run's sample panels: at most four, evenly from the first to the last validation.

    Runs of earlier versions have none; theirs are read from what they wrote for TensorBoard.
    """
    there = find_panels(run)
    if not there:
        return _events(run / "tensorboard")
    last = len(there) - 1
    shown = sorted({round(i * last / (PANELS - 1)) for i in range(PANELS)})
    told = [(f"epoch {epoch}", path.read_bytes()) for epoch, path in (there[i] for i in shown)]
    return [(name, data) for name, data in told if data.startswith(SIGNATURE)]


def _events(folder: Path) -> list[tuple[str, bytes]]:
    """(caption, PNG) of the newest sample of each picture in TensorBoard's files; none without the package."""
    if not folder.is_dir():
        return []
    try:
        reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    except ImportError:
        log.warning("%s: its sample panels are left out, tensorboard is not installed", folder)
        return []
    events = reader.EventAccumulator(str(folder), size_guidance={"images": 1, "scalars": 1, "tensors": 1})
    events.Reload()
    found = []
    for tag in events.Tags()["images"]:
        image = events.Images(tag)[-1]
        if image.encoded_image_string.startswith(SIGNATURE):
            found.append((f"{tag}, update {image.step}", image.encoded_image_string))
    return found


def _samples(panels: list[tuple[str, bytes]]) -> Html | None:
    if not panels:
        return None
    told = f"The middle slices of the same test patch along each axis. Left to right: {COLUMNS}."
    figures = el("div", [_panel(name, data) for name, data in panels], class_="samples")
    return join(el("h3", "Samples"), el("p", told, class_="faint"), figures)


def _panel(name: str, data: bytes) -> Html:
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    image = el("img", src=source, alt=f"{name}: {COLUMNS}")
    return el("figure", el("figcaption", name), image, class_="sample")


def _table(validation: list[dict[str, Any]]) -> Html:
    keys = list(dict.fromkeys(k for row in validation for k in row))
    head = el("tr", [el("th", k, scope="col") for k in keys])
    rows = []
    for i, row in enumerate(validation):
        rows.append(el("tr", [el("td", _value(row.get(k), pointer("run", "validation", i, k))) for k in keys]))
    return scrolled(head, rows)


def _entries(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The entries of summaries that have a row, in one order whatever a summary lacks; "its Dice" needs no word more
    where there is one Dice in all."""
    there = [k for one in summaries for k, v in one.items() if not isinstance(v, (dict, list, type(None)))]
    plain = {one.get("dice_is") for one in summaries if one.get("dice_is")} == {"Dice"}
    keys = [k for k in dict.fromkeys(there) if k != START and not (k == "dice_is" and plain)]
    return [k for k in SUMMARY if k in keys] + [k for k in keys if k not in SUMMARY]


def _entry(key: str, summaries: Sequence[Mapping[str, Any]]) -> object:
    """What an entry of some summaries is."""
    if key == "seconds" and any(one.get("resumed_at") is not None for one in summaries):
        return "time, of a resumed run since then"
    return SUMMARY[key][0] if key in SUMMARY else _setting(key)


def _said(changed: Mapping[str, Sequence[Any]]) -> Html:
    """Settings that a resumed run went on with: 'dice_weight 1.0 -> 0.0'."""
    return join(", ".join(f"{name} {before} -> {now}" for name, (before, now) in changed.items()))


def _entered(key: str, value: Any, path: str) -> object:
    """Its value with its unit."""
    said = join(named(value)) if key == "stopped" and value in SIGNALS else _value(value, path)
    return said if said is None else join(said, SUMMARY.get(key, ("", ""))[1])


def _setting(key: str) -> object:
    """A setting by its name and meaning, another word as it is."""
    return join(el("code", key), ": ", SETTINGS[key].help) if key in SETTINGS else key.replace("_", " ")


def _value(value: Any, path: str) -> object:
    if isinstance(value, (bool, str)):
        return join(str(value))
    return number(value, path) if isinstance(value, (int, float)) else None


def _plain(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf8", errors="replace")
    except OSError:
        return ""
