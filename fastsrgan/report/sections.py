"""The parts of a page as HTML. Every figure shown carries its place in the page's facts (a JSON pointer)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastsrgan.core.files import mapping
from fastsrgan.evaluate.figures import FIGURES, name_of
from fastsrgan.evaluate.grids import KNOWS, knows_truth
from fastsrgan.evaluate.plausibility import NO_PROOF
from fastsrgan.evaluate.wording import light_of, passes, unchecked_line
from fastsrgan.model.purpose import Purpose, mask_names, weight_files, weights_called
from fastsrgan.report.html import Html, Line, el, join, line_chart, number, pointer, scrolled

INTERPOLATION = "interpolation"  # what studies call the baseline
AXES = {"step": "step, voxels", "noise": "noise over the largest value", "thickness": "slice thickness, mm"}
REGIONS = {"whole": "whole image", "mask": "inside the mask", "label": "inside the label"}


def card(title: str, *children: object, **attributes: object) -> Html:
    """A section with its heading."""
    attributes = {"class_": "card"} | attributes
    return el("section", el("h2", title), *children, **attributes)


def tiles(scores: Mapping[str, Any], at: str) -> list[Html]:
    """The most telling figures: PSNR and SSIM (inside the mask where there is one), Dice, components."""
    regions = scores.get("image", {})
    region = "mask" if "mask" in regions else "whole"
    first = {name: figure for name, figure in FIGURES.items() if figure.headline}
    items = []
    for name, figure in first.items():
        keys: tuple[str, ...] = ("image", region, name) if figure.image else ("segmentation", name)
        value, base = _get(scores, keys), _get(scores.get("baseline", {}), keys)
        if not _is_number(value):
            continue
        where = REGIONS[region] if keys[0] == "image" else "segmentation"
        said = "baseline, which knows the truth: " if keys[0] != "image" and knows_truth(scores) else "baseline: "
        other = el("small", said, number(base, at + pointer("baseline", *keys))) if _is_number(base) else None
        shown = el("b", number(value, at + pointer(*keys)))
        items.append(el("li", el("span", name_of(keys[-1])), shown, el("small", where), other))
    return items


def doubt_tiles(record: Mapping[str, Any], at: str) -> list[Html]:
    """Mean and 95th percentile of the doubt, and the image's mean as their scale, as the record has them."""
    told = record.get("doubt")
    mean, most, scale = (_get(told, (key,)) for key in ("mean", "p95", "image_mean"))
    if not _is_number(mean):
        return []
    path = at + "/doubt"
    below = el("small", "95 % of it below: ", number(most, path + "/p95")) if _is_number(most) else None
    where = ["mean inside the head, in units of the image"]
    if _is_number(scale):  # records of earlier versions do not have it
        where += [", which is ", number(scale, path + "/image_mean"), " on average there"]
    return [el("li", el("span", "doubt"), el("b", number(mean, path + "/mean")), el("small", *where), below)]


def scores_table(scores: Mapping[str, Any], at: str) -> Html:
    """All figures beside the baseline's and the gain."""
    base, gain = scores.get("baseline", {}), scores.get("gain", {})
    groups: list[tuple[str, tuple[str, ...]]] = [
        (REGIONS.get(region, region), ("image", region))
        for region, figures in scores.get("image", {}).items()
        if isinstance(figures, dict)
    ]
    if isinstance(scores.get("segmentation"), dict):
        groups.append(("segmentation", ("segmentation",)))
    if isinstance(scores.get("structures"), dict):
        groups += [(str(name), ("structures", name)) for name in scores["structures"]]
    rows = []
    for title, keys in groups:
        rows.append(el("tr", el("th", title, colspan=4, scope="rowgroup"), class_="region"))
        for key, value in (_get(scores, keys) or {}).items():
            if value is not None and not _is_number(value):
                continue
            path = pointer(*keys, key)
            cells = [el("td", number(value, at + path), class_="n")]
            for name, tree in (("baseline", base), ("gain", gain)):
                other, place = _get(tree, (*keys, key)), at + pointer(name) + path
                shown = number(other, place, signed=name == "gain") if _is_number(other) else ""
                cells.append(el("td", shown, class_="n"))
            rows.append(el("tr", el("th", name_of(key), scope="row"), cells[1], cells[0], cells[2]))
    heads = [el("th", "figure", scope="col")]
    heads += [el("th", name, class_="n", scope="col") for name in ("baseline", "fastsrgan", "difference")]
    known = scores.get("definitions")
    words = el("details", el("summary", "What the figures mean"), definitions(known)) if known else None
    return join(scrolled(el("tr", heads), rows), _baselines(scores) if base else None, words)


def _baselines(scores: Mapping[str, Any]) -> Html:
    """What the baselines are, as evaluation told; scores of elsewhere may not."""
    said = scores.get("baselines")
    told = [f"{what}: {text}" for what, text in said.items()] if isinstance(said, dict) else []
    words = "; ".join(told) or "the image and segmentation that the result was compared with"
    more = f" {KNOWS[0].upper()}{KNOWS[1:]}." if knows_truth(scores) else ""
    return el("p", f"Baseline: {words}.{more}", class_="faint")


def definitions(words: Mapping[str, Any]) -> Html:
    """A list of words and what they mean."""
    return el("dl", [join(el("dt", name_of(str(k))), el("dd", v)) for k, v in words.items()], class_="words")


def warnings_card(lines: Sequence[object]) -> Html | None:
    """What the user should know before trusting the images."""
    if not lines:
        return None
    items = [el("li", line) for line in dict.fromkeys(map(str, lines))]
    return card("Warnings and notes", el("ul", items), class_="card warnings")


def light_word(light: str) -> Html:
    """The word in its colour."""
    return el("b", f"● {light}", class_=f"light-{light}")


def trust_line(record: Mapping[str, Any]) -> Html | None:
    """What is segmented, and whether the scan looks like what the weights were made for; None of older records."""
    found = light_of(record)
    if found is None:
        return None
    light, words = found
    purpose = Purpose.of(record.get("made_for"))
    words = words or f"the scan and the result look like what the weights were made for: {NO_PROOF}"
    if left := unchecked_line(mapping(record.get("plausibility")).get("unchecked")):
        words += f". {left}"
    made = f"Segmented: {purpose.line(segmented(record))}. Weights: {chosen_weights(record)}."
    return el("p", "Plausibility ", light_word(light), f": {words}. {made}", class_="trust")


def segmented(record: Mapping[str, Any]) -> str:
    """What the segmentation of a result holds, and which further structures its mask image."""
    purpose = Purpose.of(record.get("made_for"))
    own = {name for _, name in purpose.structures}
    others = [name for _, name in mask_names(record.get("weights")) if name not in own]
    others = others if "mask" in mapping(record.get("outputs")) else []
    return purpose.structure + f" (mask image also: {', '.join(others)})" * bool(others)


def chosen_weights(record: Mapping[str, Any]) -> str:
    """The weights of a result for people, and why they were chosen."""
    weights = record["weights"]
    return weights_called(weights) + (f" ({weights['chosen']})" if weights.get("chosen") else "")


def facts_table(rows: Sequence[tuple[object, object]]) -> Html:
    """Names and values; rows without a value are left out."""
    kept = [el("tr", el("th", name, scope="row"), el("td", value)) for name, value in rows if value not in (None, "")]
    return el("table", el("tbody", kept), class_="facts")


def provenance_card(record: Mapping[str, Any], at: str) -> Html:
    """Where a result comes from: image, weights, settings, device, time, versions; then the whole record."""
    source, weights = record["input"], record["weights"]
    asked = record.get("asked") or {}
    seconds = record.get("seconds")
    rows: list[tuple[str, object]] = [
        ("input", el("code", source.get("path"))),
        ("input SHA-256", el("code", source.get("sha256"))),
        ("input grid", _grid(source.get("shape"), source.get("spacing_mm"))),
        ("result grid", _grid(record.get("shape"), record.get("new_resolution"))),
        *_weights(weights),
        ("geometry", record.get("geometry")),
        ("options", _settings(asked)),
        ("tiles", _settings({k: record[k] for k in ("tiles", "tile", "window", "batch") if k in record})),
        ("passes", "; ".join(passes(record))),
        ("tried on the scan's own slices", _adapted(record.get("adapt"), at + "/adapt")),
        ("agreement with the scan", _agreement(record.get("agree"), at + "/agree")),
        ("threshold", number(record["threshold"], at + "/threshold") if _is_number(record.get("threshold")) else None),
        ("precision", record.get("precision")),
        ("device", record.get("device")),
        ("time", join(number(seconds, at + "/seconds"), " s") if _is_number(seconds) else None),
        ("versions", _settings(record.get("provenance"))),
    ]
    return card("Provenance", facts_table(rows), raw("The whole record (JSON)", record))


def _adapted(adapt: Any, at: str) -> Html | None:
    """What network and agreement gained on slices cut from the result; None where it was not tried."""
    if not isinstance(adapt, Mapping) or not all(_is_number(adapt.get(k)) for k in ("gain_db", "gain_db_without")):
        return None
    gained, without = (number(adapt[key], f"{at}/{key}") for key in ("gain_db", "gain_db_without"))
    return join(
        "network and agreement gain ", gained, " dB over interpolation, adapted to the scan (", without, " dB before)"
    )


def _agreement(agree: Any, at: str) -> Html | None:
    """How far the result, acquired again, is from the scan; None where it was not made to agree."""
    if not isinstance(agree, Mapping) or not _is_number(agree.get("residual_percent")):
        return None
    told = [("residual_percent", "acquired again, it differs by ", " %")]
    told.append(("residual_percent_without", "; ", " % without agreement"))
    # Another image where it was adapted to the scan.
    if agree.get("residual_percent_network") != agree.get("residual_percent_without"):
        told.append(("residual_percent_network", "; ", " % the network's own image"))
    known = [(key, *words) for key, *words in told if _is_number(agree.get(key))]
    return join([(before, number(agree[key], f"{at}/{key}"), after) for key, before, after in known])


def _weights(weights: Mapping[str, Any]) -> list[tuple[str, object]]:
    files = weight_files(weights)
    rows: list[tuple[str, object]] = []
    for i, one in enumerate(files):
        which = f" {i + 1} of {len(files)}, averaged" if len(files) > 1 else ""
        rows.append((f"weights{which}", el("code", one.get("path"))))
        rows.append(("weights SHA-256", el("code", one.get("sha256"))))
        rows.append(("network", _settings(one.get("spec"))))
    return rows


def raw(title: str, value: object) -> Html:
    """A JSON value to look into."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return el("details", el("summary", title), el("pre", text, tabindex=0))


def study_card(study: Mapping[str, Any], index: int) -> Html | None:
    """A study's table, and where it goes along an axis (steps, noise) its curves; ``study`` lies at /studies/INDEX."""
    rows = [row for row in study.get("rows") or [] if isinstance(row, dict)]
    if not rows:
        return None
    spread = all(isinstance(row.get("figures"), dict) for row in rows)
    names = list(dict.fromkeys(k for row in rows for k in (row["figures"] if spread else row)))
    told = [k for k in ("condition", "model", "step", "noise", "n") if spread and any(k in row for row in rows)]
    body = []
    for i, row in enumerate(rows):
        at = pointer("studies", index, "rows", i)
        cells = [_cell(row.get(key), at + pointer(key)) for key in told]
        for key in names:
            place = at + pointer("figures", key) if spread else at
            cells.append(_spread(row["figures"].get(key), place) if spread else _cell(row.get(key), at + pointer(key)))
        body.append(el("tr", cells))
    head = el("tr", [el("th", name_of(key), scope="col") for key in [*told, *names]])
    along = {"steps": "step", "noise": "noise", "resolution": "thickness"}.get(str(study.get("study")))
    if along == "thickness":
        rows = [row | {"thickness": max(row["low_res"], default=None)} for row in rows if _numbers(row.get("low_res"))]
    plots = [p for key in names if spread and along and (p := _study_plot(rows, along, key))]
    grid = scrolled(head, body, class_="study")
    fits = [f for f in study.get("fit") or [] if isinstance(f, dict)]
    lines = [_fit(fit, pointer("studies", index, "fit", i)) for i, fit in enumerate(fits)]
    title = "Step curve" if along == "step" else f"Study: {study.get('study')}"
    return card(title, el("div", plots, class_="plots") if plots else None, grid, lines)


def _study_plot(rows: Sequence[Mapping[str, Any]], along: str, figure: str) -> Html | None:
    """One figure of a study: a line for every condition and model, dashed where it does not depend on the axis."""
    apart = "model" if along == "step" else "step"
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        mean = _get(row["figures"].get(figure), ("mean",))
        if not _is_number(mean):
            continue
        name = str(row.get("model"))
        if along == "step" and len({r.get("condition") for r in rows}) > 1:
            name = f"{row.get('condition')}, {name}"
        elif apart == "step" and row.get("step") is not None:
            name = f"{name}, step {row['step']}"
        if _is_number(row.get(along)):
            points.setdefault(name, []).append((float(row[along]), float(mean or 0)))
    ends = [x for line in points.values() for x, _ in line]
    if len(set(ends)) < 2:
        return None
    lines = []
    for name, line in points.items():
        line.sort()
        lines.append(Line(name, [x for x, _ in line], [y for _, y in line], dashed=name == INTERPOLATION))
    for row in rows:  # interpolation has no step
        mean = _get(row["figures"].get(figure), ("mean",))
        if along == "step" and row.get("step") is None and _is_number(mean):
            lines.append(Line(str(row.get("model")), [min(ends), max(ends)], [mean, mean], dashed=True))
    lines.sort(key=lambda line: line.dashed)
    return line_chart(name_of(figure), lines, AXES[along])


def _fit(fit: Mapping[str, Any], at: str) -> Html:
    """The line of time against step^-3 (paper figure 9)."""
    who = ", ".join(str(fit[key]) for key in ("condition", "model") if fit.get(key))
    terms = [number(fit[key], at + pointer(key)) for key in ("intercept_s", "slope_s") if _is_number(fit.get(key))]
    if len(terms) < 2:
        return el("p", f"Fit: {_settings(fit)}", class_="faint")
    r2 = join(", R² ", number(fit["r2"], at + "/r2")) if _is_number(fit.get("r2")) else None
    return el("p", f"Fit, {who}: seconds = ", terms[0], " + ", terms[1], " / step³", r2, class_="faint")


def _spread(told: Any, path: str) -> Html:
    if not isinstance(told, dict) or not _is_number(told.get("mean")):
        return el("td", el("span", "–", class_="none"))
    sd = join(" ± ", number(told["sd"], path + "/sd", digits=2)) if _is_number(told.get("sd")) else None
    return el("td", number(told["mean"], path + "/mean"), sd)


def _cell(value: object, path: str) -> Html:
    if _is_number(value) or value is None:
        return el("td", number(value, path))
    return el("td", " × ".join(map(str, value)) if isinstance(value, list) else str(value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(v) for v in value)


def _get(tree: Any, keys: Sequence[object]) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _grid(shape: Any, spacing: Any) -> str | None:
    if not isinstance(shape, list) or not isinstance(spacing, list):
        return None
    parts = [" × ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in p) for p in (shape, spacing)]
    return f"{parts[0]} voxels of {parts[1]} mm"


def _settings(values: Any) -> str | None:
    if not isinstance(values, dict):
        return None
    told = (
        f"{k} {' × '.join(map(str, v)) if isinstance(v, list) else v}"
        for k, v in values.items()
        if v is not None and not isinstance(v, dict)
    )
    return ", ".join(told)
