"""``fastsrgan report``: one self-contained HTML file about a result, a demo, a training run, or a cohort of results.

A page needs no network and no server: styles, scripts and volumes are inside, and its content security policy allows
nothing else (scripts and styles by their hash, pictures as data). Everything that comes from files is escaped text.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import shlex
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsrgan._version import __version__
from fastsrgan.core.files import atomic_write, finite, short_names
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.errors import InputError, PartialFailure, UsageError, alike, counted, some, some_of
from fastsrgan.evaluate.figures import alone
from fastsrgan.evaluate.grids import inside_mask, onto_grid
from fastsrgan.evaluate.pair import evaluate_pair, structure_pairs
from fastsrgan.evaluate.wording import picture_words
from fastsrgan.io import any_image, labels
from fastsrgan.io import nifti as images
from fastsrgan.io.output_place import PAGE, check_place, one_writer
from fastsrgan.model.purpose import mask_names
from fastsrgan.pictures.planes import from_lowest
from fastsrgan.report import cohort, curves, sections
from fastsrgan.report import viewer as stage
from fastsrgan.report.collect import Found, Result, find
from fastsrgan.report.html import Html, data_block, el, join, number, pointer, source_hash
from fastsrgan.report.volumes import Packed, images_of, pack, plane_png
from fastsrgan.volume.geometry import Volume

log = logging.getLogger("fastsrgan")

MOST_MB = 30.0
MOST_ALLOWED_MB = 1e6
NAME = "report.html"
COMPARISON = "comparison.html"
VIEWER = ("niivue.umd.js", "viewer.js")  # scripts of a page with volumes
LEAST_BYTES = 200_000  # left for the volumes, below which a limit makes no sense
INSIDE = "The network saw the scan inside the mask alone; what is made of the scan is shown there."
WORDS_BYTES = 2_000  # by which a page's words may grow when a part of the volumes is shown


class NotShown(PartialFailure):
    """Images of results could not be shown; ``written`` is what `report` would have returned."""

    def __init__(self, written: list[Path], lost: Sequence[str], of: int) -> None:
        reason = f"{some_of(len(lost), of, 'result', 'is', 'are')} not shown whole: {some(lost)}"
        super().__init__(written[0], reason, "see the warnings; the pages hold the rest")
        self.written = written


def report(
    path: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    scores: str | os.PathLike | None = None,
    studies: Sequence[str | os.PathLike] = (),
    hr: str | os.PathLike | None = None,
    label: str | os.PathLike | None = None,
    mask: str | os.PathLike | None = None,
    max_mb: float = MOST_MB,
    overwrite: bool = False,
    label_classes: str | Sequence[str] | None = None,
    label_names: str | os.PathLike | None = None,
    progress: Progress = QUIET,
) -> list[Path]:
    """Write the page of a folder of results, a demo, a training run, or of one result's JSON.

    Parameters
    ----------
    path : a folder that ``infer``, ``demo`` or ``train`` wrote, or one ``STEM.json`` or image of a result in it
    out : the page, default ``report.html`` in that folder; for several results it is the cohort's table and every
        result gets ``STEM_report.html`` beside it
    scores : JSON of ``evaluate`` (a pair's or a table's); without it the folder's own
    studies : JSON files of ``study``, shown beside those of the folder
    hr, label, mask : truth of a single result, evaluated here as with ``evaluate --lr`` and the input
    label_classes, label_names : which values of the label are the structure, see `labels.structure`; of several each
        has its scores, and of the result its map of structures is taken
    max_mb : largest page in MB (10^6 bytes); of volumes that are too large for it a slab or block is shown
    overwrite : replace pages that are there; what is no page is kept

    Returns the files, the first one to open. Raises InputError, UsageError or ResourceError, before anything is written
    where a page exists, there is nothing to report, or another process writes pages of several results there; and
    NotShown, when all is written, where an image that a record names is gone or cannot be read.
    """
    if not 0 < max_mb <= MOST_ALLOWED_MB:
        raise UsageError("--max-mb", f"{max_mb:g} is not allowed", f"a size in MB above 0, at most {MOST_ALLOWED_MB:g}")
    if (label or mask) and not hr:
        raise UsageError("--label and --mask", "need --hr", "the truth that the image is compared with")
    if label_classes and not label:
        raise UsageError("--label-classes", "no label is given", "--label IMAGE, or leave it out")
    if hr and scores:
        raise UsageError("--hr", "excludes --scores", "one of the two")
    found = find(path, scores, studies)
    if hr and len(found.results) != 1:
        raise UsageError("--hr", f"one truth for {len(found.results)} results", "--scores with the JSON of evaluate")
    if max_mb != MOST_MB and not found.results:
        raise UsageError("--max-mb", "is of a result's page, and there is no result", "leave it out")
    target = Path(out) if out is not None else found.folder / NAME
    many = len(found.results) > 1
    names = cohort.page_names([r.stem for r in found.results], target) if many else []
    given = [p for p in (path, scores, hr, label, mask, *studies) if p is not None]
    inputs = [*given, *(file for result in found.results for file in result.files.values())]
    pages = [check_place(place, inputs, PAGE) for place in [target, *(target.parent / n for n in names)]]
    standing = [p for p in pages if p.exists()]
    if standing and not overwrite:
        raise UsageError(standing[0], "exists already and is kept", "--overwrite, or another -o FILE.html")
    if hr:
        chosen = labels.structures(labels.choices("", label_classes), label, label_names) if label else []
        labels.refuse_lost([(Path(label), chosen, None)] if label else [])
        _score(found.results[0], Path(hr), Path(label) if label else None, Path(mask) if mask else None, chosen)
    limit = int(max_mb * 1e6)
    progress.start("report", max(len(found.results), 1) + many, "page")
    if not many:
        _write(target, single_page(found, limit)[0])
        progress.advance(1)
    else:
        with one_writer((), [target.parent], "report"):
            rows = []
            for result, name in zip(found.results, names, strict=True):
                page, thumbnail, measured = single_page(_alone(found, result), limit, back=target.name)
                _write(target.parent / name, page)
                rows.append(cohort.Row(result, name, thumbnail, measured))
                progress.advance(1, page=name)
            _write(target, cohort_page(found, rows))
            progress.advance(1)
    progress.finish()
    for line in alike({result.stem: [text for _, text in result.unseen] for result in found.results}):
        log.warning("%s", line)
    written = [target, *(target.parent / name for name in names)]
    if lost := [result.stem for result in found.results if result.lost]:
        raise NotShown(written, lost, len(found.results))
    return written


def runs_report(
    runs: Sequence[str | os.PathLike], out: str | os.PathLike | None = None, *, overwrite: bool = False
) -> list[Path]:
    """Write one page on which the curves of several training runs are laid over each other.

    ``out`` is ``comparison.html`` in the first run's folder by default. Raises UsageError where a folder is no training
    run or named twice, or a page is there already.
    """
    folders = [Path(run) for run in runs]
    for folder in folders:
        if not (folder / "log.jsonl").is_file():
            named = shlex.join(map(str, folders)) if len(folders) == 2 else "RESULTS RESULTS"
            hint = f"`fastsrgan evaluate {named} TRUTH` compares two folders of results"
            raise UsageError(folder, "is no training run, and only runs are laid over each other", hint)
    names = short_names(folders)
    if len(set(names)) < len(names):
        raise UsageError("report", "a run is named twice", "name each run once")
    target = check_place(Path(out) if out is not None else folders[0] / COMPARISON, folders, PAGE)
    if target.exists() and not overwrite:
        raise UsageError(target, "exists already and is kept", "--overwrite, or another -o FILE.html")
    read = [finite(curves.read_run(folder)) for folder in folders]
    facts: dict[str, Any] = {"results": [], "run": None, "demo": None, "studies": [], "runs": read}
    found = Found(folders[0], " and ".join(names))
    _write(target, assemble(found, facts, join(curves.runs_card(read, names))))
    return [target]


def single_page(found: Found, limit: int, back: str | None = None) -> tuple[str, bytes | None, dict[str, Any]]:
    """A page about at most one result: (the page, its thumbnail as PNG, what was measured for it)."""
    facts: dict[str, Any] = {"results": [], "run": None, "demo": None, "studies": finite(found.studies)}
    result = found.results[0] if found.results else None
    warnings: list[str] = []
    sr: Volume | None = None
    others: dict[str, Volume] = {}
    measured: dict[str, Any] = {}
    if result is not None:
        sr, others = stage.load_images(result, warnings)
        if "seg" in others:
            measured = alone(others["seg"])
        shown_facts = {"stem": result.stem, "record": finite(result.record), "scores": finite(result.scores)}
        facts["results"].append(shown_facts | {"measured": measured})
        warnings = [*result.record.get("warnings", []), *(result.scores or {}).get("notes", []), *warnings]
    if found.run is not None:
        facts["run"] = finite(curves.read_run(found.run))
    if found.demo is not None:
        facts["demo"] = finite({k: v for k, v in found.demo.items() if k != "scores"})
    panels = curves.sample_panels(found.run) if found.run is not None else []
    after = _after(facts, panels, found)
    if sr is None:
        body = join(_before(facts, warnings), after)
        return assemble(found, facts, body, back=back), None, measured
    low, shown, told = others.get("low"), others, ""
    if low is not None and result is not None:
        spline = onto_grid(low, sr, name="the spline of the input", notes=[])
        cut = inside_mask(result.record, spline, sr)
        shown = others | {"spline": cut}
        if linear := stage.linear_estimate(result.record, low, sr, spline, others.get("truth")):
            shown["linear"], told = inside_mask(result.record, linear[0], sr), linear[1]
        told = " ".join(filter(None, (told, INSIDE if cut is not spline else "")))
    moved, lowest = from_lowest({"sr": sr} | shown)
    sr, shown = moved.pop("sr"), moved
    if lowest:
        told = " ".join(filter(None, (told, f"Values lie below 0: grey levels count from the lowest, {lowest:g}.")))
    view = stage.open_at(sr, shown)
    alt = "Planes of every image side by side, with a detail and the outline of the segmentation"
    words = picture_words(result.record, sr.affine) if result is not None else {}
    still = sections.card("The same as a picture", stage.png(stage.picture(sr, shown, words), alt))
    images_ = images_of(sr, shown)

    def page(packed: Packed, rest: int = 0) -> str:
        mb = math.ceil((rest + packed.all_bytes) / 1e6)
        names = dict(mask_names(result.record.get("weights"))) if result is not None else {}
        card = stage.viewer_card(packed, view, low.spacing if low is not None else None, mb, names, told)
        body = join(_before(facts, warnings), card, still, after)
        return assemble(found, facts, body, stage.viewer_data(packed, view, low), back, scripts=VIEWER)

    # Without the volumes first: what is left of the limit is theirs. A part is said in more words than the whole.
    rest = len(page(images_.part(images_.all, packing=False)).encode()) + WORDS_BYTES
    room = limit - rest
    if room < LEAST_BYTES:
        reason = f"{limit / 1e6:g} MB is too little: the page takes {rest / 1e6:.1f} MB without its volumes"
        raise UsageError("--max-mb", reason, f"{math.ceil((rest + LEAST_BYTES) / 1e6)} or more")
    packed = pack(images_, room, view.at_mm, view.across)
    whole = images_.arrays
    middle = whole["sr"].shape[2] // 2
    thumbnail = plane_png(whole["sr"][:, :, middle], whole["seg"][:, :, middle] if "seg" in whole else None)
    return page(packed, rest), thumbnail, measured


def cohort_page(found: Found, rows: Sequence[cohort.Row]) -> str:
    """The table of several results."""
    facts = cohort.facts(rows) | {"studies": finite(found.studies)}
    studies = [sections.study_card(study, i) for i, study in enumerate(facts["studies"])]
    body = join(cohort.table(rows, facts), sections.warnings_card(cohort.notes(rows)), studies)
    return assemble(found, facts, body, scripts=["cohort.js"])


def assemble(
    found: Found,
    facts: dict[str, Any],
    body: Html,
    data: str = "",
    back: str | None = None,
    *,
    scripts: Sequence[str] = (),
) -> str:
    """The whole file. Scripts and styles are allowed by their hash; nothing may be loaded."""
    sources, style = [asset(name) for name in scripts], asset("page.css")
    allowed = " ".join(map(source_hash, sources)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src {source_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    title = facts["results"][0]["stem"] if len(facts.get("results", [])) == 1 and not facts.get("demo") else found.title
    kind = _kind(facts)
    head = [el("p", el("a", "← all results", href=back)) if back else None, el("h1", title), _subtitle(facts, kind)]
    told = f"Made by fastsrgan {__version__}. Not for diagnosis. This file holds all it shows and contacts no network."
    return string.Template(asset("page.html")).substitute(
        policy=join(Html(policy.replace('"', "&quot;"))),
        title=join(f"{title} · fastsrgan {kind}"),
        style=style,
        header=join(head),
        body=body,
        footer=el("p", told),
        data=join(data_block("facts", facts), Html(data)),
        scripts="\n".join(f"<script>{source}</script>" for source in sources),
    )


@functools.cache
def asset(name: str) -> str:
    """A file of this package as text."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf8")


def _kind(facts: dict[str, Any]) -> str:
    """What a page is about."""
    if "rows" in facts:
        return "cohort"
    if "runs" in facts:
        return "training runs"
    order = (("demo", facts["demo"]), ("result", facts["results"]), ("training run", facts["run"]), ("study", True))
    return next(name for name, there in order if there)


def _alone(found: Found, result: Result) -> Found:
    return replace(found, results=[result], run=None, demo=None, studies=[], title=result.stem)


def _write(path: Path, page: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf8")


def _score(
    result: Result, hr: Path, label: Path | None, mask: Path | None, chosen: Sequence[labels.Structure] = ()
) -> None:
    """Evaluate against a truth as `evaluate --lr` does: the baselines are the whole scan's, masked or not."""
    warnings: list[str] = []
    truth = images.load(hr)
    result.files["hr"] = hr
    if label is not None:
        result.files["label"] = label
    sr, others = stage.load_images(result, warnings)
    if sr is None:
        reason = "its super-resolved image cannot be read"
        raise InputError(result.stem, reason, "; ".join(warnings) or "infer it again")
    more = {}
    if label is not None and chosen:
        others["label"] = images.load_label(label, classes=chosen[0].values)
        seg = result.files.get("mask", result.files.get("seg"))
        more = structure_pairs(seg, label, chosen) if seg is not None else {}
        others |= {"seg": more[chosen[0].name][0]} if more else {}
    given: dict[str, Any] = {"label": others.get("label"), "lr": others.get("low")}
    given["seg"] = others.get("seg") if label is not None else None
    given["mask"] = any_image.load_mask(mask, None) if mask is not None else None
    result.scores = evaluate_pair(sr, truth, **given, structures=more)
    if chosen:
        result.scores["label_classes"] = {one.name: sorted(one.values) for one in chosen}


def _before(facts: dict[str, Any], warnings: list[str]) -> Html:
    """What stands above the viewer: the key figures and the warnings."""
    parts: list[object] = []
    if facts["results"]:
        one, at = facts["results"][0], pointer("results", 0)
        tiles = sections.tiles(one["scores"], at + "/scores") if one["scores"] else []
        if one["measured"] and not one["scores"]:
            tiles = cohort.measured_tiles(one["measured"], at + "/measured", one["record"])
        tiles += sections.doubt_tiles(one["record"], at + "/record")
        parts.append(el("ul", tiles, class_="tiles") if tiles else None)
        parts.append(sections.trust_line(one["record"]))
    return join(parts, sections.warnings_card(warnings))


def _after(facts: dict[str, Any], panels: list[tuple[str, bytes]], found: Found) -> Html:
    """What stands below the viewer: figures, studies, training, provenance."""
    parts: list[object] = []
    if facts["results"]:
        one, at = facts["results"][0], pointer("results", 0)
        if one["scores"]:
            parts.append(sections.card("Figures", sections.scores_table(one["scores"], at + "/scores")))
    parts += [sections.study_card(study, i) for i, study in enumerate(facts["studies"])]
    if facts["run"]:
        parts.append(curves.run_card(facts["run"], panels))
    if facts["results"]:
        parts.append(sections.provenance_card(facts["results"][0]["record"], pointer("results", 0, "record")))
    if facts["demo"]:
        taken = facts["demo"].get("seconds") or {}
        rows = [(k, join(number(v, pointer("demo", "seconds", k)), " s")) for k, v in taken.items()]
        parts.append(sections.card("Time of the demo's stages", sections.facts_table(rows)))
    return join(parts)


def _subtitle(facts: dict[str, Any], kind: str) -> Html:
    words = {
        "demo": "The demo's unseen test subject, and the short training run before it.",
        "cohort": f"{counted(len(facts.get('rows', [])), 'result')}.",
        "training run": "Training run.",
        "training runs": f"{len(facts.get('runs', []))} training runs, their curves laid over each other.",
        "study": "A study of the paper on own data.",
        "result": "Super-resolution and segmentation of one image.",
    }
    return el("p", words[kind], class_="faint")
