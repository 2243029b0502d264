"""Several results as one sortable table with thumbnails; what lies far from the others is marked.

An outlier's modified z-score 0.6745 (x - median) / MAD is beyond 3.5 (Iglewicz and Hoaglin 1993), MAD the median
absolute deviation. Columns of fewer than 5 values, or whose MAD is 0, are not judged.
"""

from __future__ import annotations

import os
import statistics
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsrgan.core.files import finite
from fastsrgan.evaluate.cohort import told_once
from fastsrgan.evaluate.figures import ALONE, FIGURES, name_of
from fastsrgan.evaluate.grids import KNOWS, knows_truth
from fastsrgan.evaluate.pair import summarise
from fastsrgan.evaluate.plausibility import NO_PROOF
from fastsrgan.evaluate.wording import LIGHTS, light_of
from fastsrgan.model.purpose import Purpose, span
from fastsrgan.report import sections
from fastsrgan.report import viewer as stage
from fastsrgan.report.collect import Result
from fastsrgan.report.html import Html, el, join, number, pointer

FEWEST = 5
RECORDED = ("seconds", "device", "weights", "warnings", "plausibility")
FAR = 3.5
RULE = (
    "Marked: modified z-score 0.6745 (x − median) / MAD beyond ±3.5 (Iglewicz and Hoaglin 1993), in columns with at "
    "least 5 values and a MAD above 0."
)


@dataclass(frozen=True)
class Row:
    """One result of a cohort with its page, thumbnail (PNG) and what was measured."""

    result: Result
    page: str
    thumbnail: bytes | None
    measured: dict[str, Any]


def page_name(stem: str, target: Path) -> str:
    """The file of one result beside the cohort's."""
    name = "".join("_" if c in "/\\\0" else c for c in stem) + f"_{target.name}"
    return name if name != target.name else f"_{name}"


def page_names(stems: Sequence[str], target: Path) -> list[str]:
    """The files of several results, no two alike: p1/T2 and p1_T2 would share one."""
    names: list[str] = []
    for stem in stems:
        name, n = page_name(stem, target), 1
        while name in names:
            n += 1
            name = page_name(f"{stem}-{n}", target)
        names.append(name)
    return names


def facts(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures of the page: {"rows", "columns", "summary", "outliers"}; columns are JSON pointers inside a row."""
    plain = []
    for row in rows:
        record = {k: row.result.record.get(k) for k in RECORDED}
        found = {"stem": row.result.stem, "page": row.page, "record": record, "scores": row.result.scores}
        plain.append(finite(found | {"measured": row.measured}))
    scored = [row["scores"] for row in plain if row["scores"]]
    columns = [c for c in candidates(scored) if any(isinstance(at(row, c), (int, float)) for row in plain)]
    marked = {c: outliers([at(row, c) for row in plain]) for c in columns}
    return {"rows": plain, "columns": columns, "summary": summarise(scored), "outliers": marked}


def candidates(scored: Sequence[dict[str, Any]]) -> list[str]:
    """Columns in order: image figures in the narrowest region, the gain, the segmentation's with the baseline's Dice,
    what was measured, time."""
    found = []
    if scored:
        region = "mask" if all("mask" in s["image"] for s in scored) else "whole"
        first = {image: [k for k, f in FIGURES.items() if f.headline and f.image == image] for image in (True, False)}
        found = [pointer("scores", "image", region, key) for key in first[True]]
        found.append(pointer("scores", "gain", "image", region, first[True][0]))
        # Those with a short heading: the others are on each result's page, and no screen is wide enough for all.
        there = {key for s in scored for key in s.get("segmentation", {})}
        for key in [k for k, figure in FIGURES.items() if figure.short and not figure.image and k in there]:
            found.append(pointer("scores", "segmentation", key))
            if key == first[False][0]:
                found.append(pointer("scores", "baseline", "segmentation", key))
    found += [pointer("measured", k) for k in ALONE[:2] if pointer("scores", "segmentation", k) not in found]
    return [*found, pointer("record", "seconds")]


def outliers(values: Sequence[Any]) -> list[int]:
    """Indices of the values that are far from the others; see the module's text."""
    numbers = [(i, float(v)) for i, v in enumerate(values) if isinstance(v, (int, float))]
    if len(numbers) < FEWEST:
        return []
    middle = statistics.median(v for _, v in numbers)
    deviation = statistics.median(abs(v - middle) for _, v in numbers)
    if deviation == 0:
        return []
    return [i for i, v in numbers if abs(0.6745 * (v - middle) / deviation) > FAR]


def table(rows: Sequence[Row], known: dict[str, Any]) -> Html:
    """The section with the table; ``known`` of ``facts``."""
    columns = known["columns"]
    heads = [el("th", "", scope="col"), el("th", el("button", "result", type="button"), scope="col")]
    lit = [light_of(row.result.record) for row in rows]
    called = [sections.chosen_weights(row.result.record) for row in rows]
    several = len({name.partition(" (")[0] for name in called}) > 1
    heads += [el("th", el("button", "plausibility", type="button"), scope="col")] * any(lit)
    heads += [el("th", el("button", "weights", type="button"), scope="col")] * several
    heads += [el("th", el("button", title(c), type="button"), class_="n", scope="col") for c in columns]
    heads.append(el("th", el("button", "warnings", type="button"), class_="n", scope="col"))
    body = [_row(i, row, known, any(lit), called[i] if several else None) for i, row in enumerate(rows)]
    foot = None
    if known["summary"]:
        empty = [el("td", "")] * (any(lit) + several)
        means = [_mean(c, known) for c in columns]
        foot = el("tfoot", el("tr", el("td", ""), el("th", "mean ± sd", scope="row"), empty, means, el("td", "")))
    grid = el("table", el("thead", el("tr", heads)), el("tbody", body), foot, class_="cohort")
    said = [f"Segmented: {names}."] if (names := _structures(rows)) else []
    said += [] if several else [f"Weights: {called[0].partition(' (')[0]}."]
    said += [f"Green is {NO_PROOF}."] if any(lit) else []
    notes = [RULE] if len(rows) >= FEWEST else []
    notes += [f"{KNOWS[0].upper()}{KNOWS[1:]}."] if any(knows_truth(row.result.scores) for row in rows) else []
    below = [el("p", note, class_="faint") for note in notes]
    scroll = el("div", grid, class_="scroll", tabindex=0)
    return sections.card("Results", el("p", " ".join(said)) if said else None, scroll, below)


def notes(rows: Sequence[Row]) -> list[str]:
    """What was odd about the results and their evaluation, every kind once; the page of each has its own."""
    told = []
    for result in (row.result for row in rows):
        own = [*result.record.get("warnings", []), *(result.scores or {}).get("notes", [])]
        told.append({"subject": result.stem, "notes": list(map(str, own))})
    return told_once(told)


def _structures(rows: Sequence[Row]) -> str:
    """What is segmented, as far as the records say it."""
    records = (row.result.record for row in rows)
    told = [sections.segmented(one) for one in records if Purpose.of(one.get("made_for")).structures]
    return "; ".join(dict.fromkeys(told))


def title(column: str) -> str:
    """Heading of a column."""
    parts = column.split("/")[1:]
    name, figure = name_of(parts[-1]), FIGURES.get(parts[-1])
    if figure is not None and figure.short:
        name = f"{figure.short}, {figure.unit}" if figure.unit else figure.short
    name = "time, s" if parts[-1] == "seconds" else name
    before = next((f"{word} " for word in ("gain", "baseline") if word in parts), "")
    return before + name + (" in mask" if "mask" in parts else "")


def at(tree: Any, path: str) -> Any:
    """The value at a JSON pointer, None where there is none."""
    for key in path.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        elif isinstance(tree, dict):
            tree = tree.get(key)
        else:
            return None
    return tree


def measured_tiles(measured: dict[str, Any], path: str, record: Mapping[str, Any]) -> list[Html]:
    """Key figures of a result without a truth, the volume with the range that the weights of its record expect."""
    expected = span(Purpose.of(record.get("made_for")).structure_ml)
    items = []
    for key in (key for key in ALONE if key in measured):
        told = el("small", f"expected: {expected}") if expected and key == "volume_ml" else None
        value = el("b", number(measured[key], path + pointer(key)))
        items.append(el("li", el("span", name_of(key)), value, el("small", "segmentation"), told))
    return items


def _light(row: Row) -> Html:
    """The light with its reasons below; sorted by how bad it is."""
    found = light_of(row.result.record)
    if found is None:
        return el("td", el("span", "–", class_="none"))
    light, reasons = found
    below = el("small", reasons, class_="faint", title=reasons) if reasons else None
    return el("td", sections.light_word(light), below, class_="light", data_sort=LIGHTS.index(light))


def _row(index: int, row: Row, known: dict[str, Any], lit: bool, weights: str | None) -> Html:
    plain = known["rows"][index]
    href = "./" + urllib.parse.quote(os.fsencode(row.page))  # names of files are bytes
    image = stage.png(row.thumbnail, "") if row.thumbnail else None
    cells = [el("td", el("a", image, href=href, tabindex=-1, aria_hidden="true"))]
    cells.append(el("th", el("a", row.result.stem, href=href), scope="row"))
    if lit:
        cells.append(_light(row))
    if weights is not None:
        cells.append(el("td", weights))
    for column in known["columns"]:
        far = "n outlier" if index in known["outliers"][column] else "n"
        value = at(plain, column)
        shown = number(value if isinstance(value, (int, float)) else None, pointer("rows", index) + column)
        cells.append(el("td", shown, class_=far))
    cells.append(el("td", str(len(row.result.record.get("warnings", []))), class_="n"))
    return el("tr", cells)


def _mean(column: str, known: dict[str, Any]) -> Html:
    key = ".".join(column.split("/")[2:])
    one = known["summary"].get(key) if column.startswith("/scores/") else None
    if one is None:
        return el("td", "", class_="n")
    path = pointer("summary", key)
    sd = join(" ±\u00a0", number(one["sd"], path + "/sd", digits=2)) if one["sd"] is not None else None
    return el("td", number(one["mean"], path + "/mean"), sd, class_="n")
