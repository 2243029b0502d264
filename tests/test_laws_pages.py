"""Pages hold each fact at its place: what is refused, warned of, scored, drawn and told of results and runs."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cohort import SMALL
from PIL import Image
from report_results import make_known

from fastsrgan.config import SETTINGS
from fastsrgan.core.files import write_json
from fastsrgan.errors import UsageError
from fastsrgan.evaluate.grids import inside_mask, onto_grid
from fastsrgan.evaluate.plausibility import NO_PROOF
from fastsrgan.infer.volume import InferResult
from fastsrgan.io import nifti as images
from fastsrgan.model.purpose import MODELS, Purpose
from fastsrgan.pictures import planes
from fastsrgan.pictures.planes import png
from fastsrgan.report import cohort, curves, page, sections, show, viewer, volumes
from fastsrgan.report.collect import Found, Result, find
from fastsrgan.volume.geometry import Volume


def plain(html: object) -> str:
    """The words of a piece of a page."""
    return re.sub("<[^>]*>", "", str(html))


def pointers(html: object) -> list[str]:
    return re.findall(r'data-path="([^"]*)"', str(html))


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without the picture, which takes most of their time."""
    monkeypatch.setattr(page.stage, "picture", lambda sr, others, words: words.get("structure", "").encode())


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"mask": "m.nii"}, "need --hr"), ({"label": "l.nii"}, "need --hr"),
        ({"label_classes": "3", "hr": "h.nii"}, "--label-classes: no label"),
        ({"hr": "h.nii", "scores": "s.json"}, "--hr: excludes --scores"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_anything_is_read(tmp_path, asked, told):
    with pytest.raises(UsageError, match=told):
        page.report(tmp_path / "nowhere", **asked)


def run_of(folder: Path, text: str = "", **summary) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"epoch": 1, "update": 1, "seconds": 0.5}\n' + text, encoding="utf8")
    if summary:
        write_json(folder / "summary.json", summary)
    return folder


def test_runs_are_compared_in_the_folder_of_the_first(tmp_path):
    one, two = run_of(tmp_path / "one", updates=1), run_of(tmp_path / "two", updates=2)
    assert page.runs_report([one, two]) == [one / "comparison.html"]
    text = (one / "comparison.html").read_text(encoding="utf8")
    assert "<h1>one and two</h1>" in text and "2 training runs, their curves laid over each other." in text
    with pytest.raises(UsageError, match="exists already"):
        page.runs_report([one, two])
    assert page.runs_report([one, two], overwrite=True) == [one / "comparison.html"]


def test_folders_of_results_are_sent_to_the_command_that_compares_them(tmp_path):
    a, b = tmp_path / "out a", tmp_path / "b"
    with pytest.raises(UsageError) as error:
        page.runs_report([a, b])
    assert error.value.hint == f"`fastsrgan evaluate '{a}' {b} TRUTH` compares two folders of results"
    with pytest.raises(UsageError, match="evaluate RESULTS RESULTS TRUTH"):
        page.runs_report([a, b, b])


class Counted:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.total, self.done, self.ended = 0, 0, 0

    def start(self, label: str, total: int, unit: str) -> None:
        self.total = total

    def advance(self, units: int, **facts: object) -> None:
        self.done += units

    def finish(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("count", [1, 3])
def test_every_result_has_its_page_and_several_a_table_and_each_counts_once(monkeypatch, tmp_path, count):
    """Pages of several lie beside the table, under their names, and lead back to it; none of them has a study."""
    results = [Result(f"s{n}", {}, {}) for n in range(count)]
    study = {"study": "x"}
    monkeypatch.setattr(page, "find", lambda *args: Found(tmp_path, "t", results, tmp_path, {}, [study]))
    asked, tables = [], []
    monkeypatch.setattr(page, "single_page", lambda *args, **more: asked.append((args, more)) or ("one", b"", {"a": 1}))
    monkeypatch.setattr(page, "cohort_page", lambda found, rows: tables.append((found, rows)) or "table")
    progress, several = Counted(), count > 1
    if not several:
        (tmp_path / "s0_out.html").write_text("a page that is not written now is in nobody's way")
    written = page.report(tmp_path, tmp_path / "out.html", max_mb=2.5, progress=progress)
    assert (progress.total, progress.done, progress.ended) == (count + several, count + several, 1)
    assert [path.name for path in written] == ["out.html", *(f"s{n}_out.html" for n in range(count) if several)]
    assert [path.read_text(encoding="utf8") for path in written] == ["table"] * several + ["one"] * count
    assert [limit for (_, limit), _ in asked] == [2_500_000] * count
    for n, ((found, _), more) in enumerate(asked):
        assert found.results == [results[n]] and more.get("back") == ("out.html" if several else None)
        assert (found.title, found.run, found.studies) == ((f"s{n}", None, []) if several else ("t", tmp_path, [study]))
    if several:
        assert [(row.result, row.page, row.thumbnail, row.measured) for row in tables[0][1]] == [
            (result, f"{result.stem}_out.html", b"", {"a": 1}) for result in results
        ]
        (tmp_path / "s1_out.html").unlink()
        (tmp_path / "out.html").unlink()
        with pytest.raises(UsageError, match=r"s0_out\.html: exists already"):
            page.report(tmp_path, tmp_path / "out.html")
        assert not (tmp_path / "out.html").exists()


def test_a_truth_of_several_structures_is_scored_for_each_from_the_results_map(monkeypatch, tmp_path):
    path = make_known(tmp_path)
    truth = images.save(tmp_path / "hr.nii.gz", np.full((40, 44, 36), 401, np.float32), np.eye(4))
    label = path.parent / "scan_mask.nii.gz"
    asked = []
    structures = page.labels.structures
    monkeypatch.setattr(page.labels, "structures", lambda *args: asked.append(args) or structures(*args))
    result = find(path).results[0]
    chosen = structures(["x=41", "y=3,90"], label, None)
    page._score(result, truth, label, None, chosen)
    scores = result.scores
    assert scores is not None and scores["label_classes"] == {"x": [41], "y": [3, 90]}
    assert scores["structures"]["x"]["dice"] == scores["structures"]["y"]["dice"] == scores["segmentation"]["dice"] == 1
    assert result.files["label"] == label and result.files["hr"] == truth and "mask" not in scores["image"]
    assert scores["baselines"]["image"].startswith("cubic spline")
    page._score(result, truth, None, label)
    assert result.scores is not None and "segmentation" not in result.scores and "mask" in result.scores["image"]
    monkeypatch.setattr(page, "_score", lambda *args: asked.append(args))
    monkeypatch.setattr(page, "single_page", lambda *args, **more: ("", b"", {}))
    (tmp_path / "lut.txt").write_text("41 white\n", encoding="utf8")
    words = {
        "hr": truth,
        "label": label,
        "label_classes": ["white"],
        "label_names": tmp_path / "lut.txt",
        "mask": label,
    }
    page.report(path, tmp_path / "o.html", **words)
    (_, one, two), (_, *files, named) = asked[-2:]
    assert (one, two) == (label, tmp_path / "lut.txt") and files == [truth, label, label]
    assert [structure.values for structure in named] == [{41}]


def test_each_kind_of_page_says_what_it_is(tmp_path):
    none = {"results": [], "run": None, "demo": None, "studies": []}
    kinds = {
        "demo": (none | {"demo": {"seconds": {}}, "results": [{"stem": "x"}], "run": {}}, "unseen test subject"),
        "result": (none | {"results": [{"stem": "x"}], "run": {"x": 1}}, "Super-resolution and segmentation of one"),
        "training run": (none | {"run": {"x": 1}}, "Training run."),
        "study": (none, "A study of the paper on own data."),
        "cohort": ({"rows": [{}, {}, {}]}, "3 results."),
        "training runs": (none | {"runs": [{}, {}]}, "2 training runs"),
    }
    found = Found(tmp_path, "the title")
    for kind, (facts, words) in kinds.items():
        text = page.assemble(found, facts, page.Html(""), "", "../all.html")
        assert words in text and f"fastsrgan {kind}</title>" in text
        assert ("<h1>x</h1>" if kind == "result" else "<h1>the title</h1>") in text
        assert '<a href="../all.html">' in text


# --- a result ---------------------------------------------------------------------------------------------------------


def test_a_page_has_the_warnings_of_record_scores_and_files_each_once(undrawn, tmp_path):
    path = make_known(tmp_path)
    record = json.loads(path.read_text(encoding="utf8"))
    made_for = MODELS["perinatal"].purpose.to_dict()
    verdict = {"light": "green", "reasons": []}
    write_json(path, record | {"warnings": ["of the record", "of both"], "made_for": made_for, "plausibility": verdict})
    (path.parent / "scan_seg.nii.gz").unlink()
    found = find(path)
    found.results[0].scores = {"image": {}, "notes": ["of both", "of the scores"]}
    html, _, measured = page.single_page(found, 10**8)
    card = re.search(r"<h2>Warnings and notes</h2><ul>(.*?)</ul>", html)[1]
    told = re.findall("<li>(.*?)</li>", card)
    assert told[:3] == ["of the record", "of both", "of the scores"] and "segmentation is no longer there" in told[3]
    assert measured == {} and len(told) == 4
    assert f"Plausibility ● green: the scan and the result look like what the weights were made for: {NO_PROOF}" in (
        plain(html)
    )
    outlined = Purpose.of(made_for).outlined
    picture = re.search('The same as a picture</h2><img src="data:image/png;base64,([^"]*)"', html)[1]
    assert base64.b64decode(picture).decode() == outlined


def test_key_figures_are_the_scores_where_there_are_any_and_else_what_was_measured():
    record = {"doubt": {"mean": 4.5, "p95": 9.5}}
    one = {"record": record, "measured": {"volume_ml": 12.5, "components": 3, "largest_component": 7}, "scores": None}
    html = page._before({"results": [one]}, [])
    assert pointers(html) == [
        *(f"/results/0/measured/{key}" for key in ("volume_ml", "components", "largest_component")),
        "/results/0/record/doubt/mean", "/results/0/record/doubt/p95",
    ]  # fmt: skip
    html = page._before({"results": [one | {"scores": {"image": {"whole": {"psnr_db": 30.5}}}}]}, [])
    assert pointers(html)[0] == "/results/0/scores/image/whole/psnr_db" and "measured" not in str(html)


def test_a_demo_tells_the_seconds_of_each_stage():
    facts = {"results": [], "studies": [], "run": None, "demo": {"seconds": {"train": 12.5, "infer": 3.25}}}
    html = page._after(facts, [], Found(Path(), ""))
    assert "train12.5 s" in plain(html) and "infer3.25 s" in plain(html)
    assert pointers(html) == ["/demo/seconds/train", "/demo/seconds/infer"]


def test_of_a_volume_too_large_the_part_around_the_opening_is_shown_and_the_size_of_the_whole_page_is_told(
    undrawn, monkeypatch, tmp_path
):
    asked = []
    whole = 2_700_000

    def pack(images_: volumes.Images, room: int, *where: object) -> volumes.Packed:
        asked.append((room, *where))
        return images_.part((slice(2, 9), slice(3, 9), slice(4, 9)), packing=False, all_bytes=whole)

    monkeypatch.setattr(page, "pack", pack)
    view = viewer.View((30.0, 100.0, 20.0), "coronal")
    monkeypatch.setattr(page.stage, "open_at", lambda sr, others: view)
    html = page.single_page(find(make_known(tmp_path)), 4_000_000)[0]
    ((room, *where),) = asked
    assert where == [view.at_mm, 1]
    rest = 4_000_000 - room  # of the page without its volumes
    assert 0 <= rest - len(html.encode()) <= page.WORDS_BYTES + 100
    (told,) = re.findall(r"--max-mb (\d+) shows all", html)
    assert (int(told) - 1) * 10**6 < rest + whole <= int(told) * 10**6


def test_a_table_of_scores_has_regions_segmentation_and_structures_and_signs_the_difference_alone():
    scores = {"image": {"whole": {"mae": 3.5}, "odd": 7}, "segmentation": {"dice": 0.5},
              "structures": {"cortex": {"dice": 0.75, "text": "x", "hausdorff95_mm": None}}}  # fmt: skip
    scores["baseline"] = {"image": {"whole": {"mae": 4.5}}, "structures": {"cortex": {"dice": 0.25}}}
    scores["gain"] = {"image": {"whole": {"mae": 1.5}}, "structures": {"cortex": {"dice": 0.125}}}
    html = str(sections.scores_table(scores, "/s"))
    rows = [
        [plain(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in html.split("</tr>")[1:-1]
    ]
    assert rows == [
        ["whole image"], ["mean absolute error", "4.5", "3.5", "+1.5"], ["segmentation"], ["Dice", "", "0.5", ""],
        ["cortex"], ["Dice", "0.25", "0.75", "+0.125"], ["95 % Hausdorff distance, mm", "", "–", ""],
    ]  # fmt: skip
    assert "/s/gain/structures/cortex/dice" in pointers(html) and "/s/structures/cortex/hausdorff95_mm" in pointers(
        html
    )


def test_weights_are_called_by_their_model_or_file_all_of_them_and_the_reason():
    shipped = {"path": f"somewhere/{MODELS['adult'].file}", "sha256": "a1", "spec": {"kernel": 12}}
    own = {"path": "x/own.safetensors", "sha256": "b2", "spec": None}

    def called(**weights) -> str:
        return sections.chosen_weights({"weights": weights})

    assert called(**shipped) == "adult" and called(**own) == "own.safetensors"
    assert called(**shipped, chosen="auto: long") == "adult (auto: long)" and called(**own, name="mine") == "mine"
    assert called(averaged=[shipped, own]) == "mean of adult and own.safetensors"
    rows = [(name, plain(value) if value else value) for name, value in sections._weights({"averaged": [shipped, own]})]
    assert rows == [
        ("weights 1 of 2, averaged", shipped["path"]), ("weights SHA-256", "a1"), ("network", "kernel 12"),
        ("weights 2 of 2, averaged", own["path"]), ("weights SHA-256", "b2"), ("network", None),
    ]  # fmt: skip


def test_what_is_segmented_names_the_further_structures_where_there_is_a_map_of_them():
    structures = [{"name": "cortex", "values": [3, 42]}, {"name": "white", "values": [41]}]
    record = {"weights": {"path": "w", "structures": structures}, "outputs": {"mask": "m.nii"}}
    record["made_for"] = MODELS["adult"].purpose.to_dict()
    own = sections.segmented(record | {"outputs": {}})
    assert sections.segmented(record) == own + " (mask image also: cortex, white)"
    assert sections.segmented(record | {"weights": {"path": "w"}}) == own == MODELS["adult"].purpose.structure
    named = [*structures, {"name": MODELS["adult"].purpose.structures[0][1], "values": [7]}]
    assert sections.segmented(record | {"weights": {"path": "w", "structures": named}}) == sections.segmented(record)


def test_values_of_settings_are_told_but_for_none_and_trees():
    assert sections._settings({"a": 1, "b": None, "c": [1, 2], "d": {"x": 1}, "e": 0, "f": False}) == (
        "a 1, c 1 × 2, e 0, f False"
    )
    rows = [("a", None), ("b", ""), ("c", 0), ("d", "x")]
    assert re.findall(r'<th scope="row">(\w)</th><td>(\w)</td>', str(sections.facts_table(rows))) == [
        ("c", "0"), ("d", "x")
    ]  # fmt: skip


# --- studies ----------------------------------------------------------------------------------------------------------


def test_conditions_of_a_step_curve_have_lines_of_their_own_and_dashed_ones_come_last(monkeypatch):
    charts = {}
    monkeypatch.setattr(
        sections, "line_chart", lambda title, lines, x: charts.update({title: lines}) or sections.Html("")
    )

    def row(condition, model, step, mean):
        return {"condition": condition, "model": model, "step": step, "figures": {"dice": {"mean": mean}}}

    base = [row(c, sections.INTERPOLATION, None, n) for n, c in enumerate(("clean", "noisy"))]
    rows = [row(c, m, s, s + n) for n, (c, m) in enumerate((("clean", "a"), ("noisy", "a"))) for s in (32, 16)]
    sections.study_card({"study": "steps", "rows": base + rows}, 0)
    lines = [(line.name, list(line.x), list(line.y), line.dashed) for line in charts["Dice"]]
    assert lines[:2] == [("clean, a", [16, 32], [16, 32], False), ("noisy, a", [16, 32], [17, 33], False)]
    assert [(y, dashed) for _, _, y, dashed in lines[2:]] == [([0, 0], True), ([1, 1], True)]
    rows = [one | {"noise": noise} for noise in (0, 1) for one in (base[0], rows[0])]
    sections.study_card({"study": "noise", "rows": rows}, 0)
    assert [line.dashed for line in charts["Dice"]] == [False, True]


def test_a_study_of_one_place_has_no_curve_and_other_studies_are_tables():
    figures = {"dice": {"mean": 0.5, "sd": None}}
    rows = [{"model": m, "step": 16, "figures": figures} for m in "ab"]
    for study, heading in (("steps", "Step curve"), ("augmentation", "Study: augmentation")):
        html = str(sections.study_card({"study": study, "rows": rows}, 2))
        assert f"<h2>{heading}</h2>" in html and "<svg" not in html
        assert pointers(html)[:2] == ["/studies/2/rows/0/step", "/studies/2/rows/0/figures/dice/mean"]
    flat = str(sections.study_card({"study": "x", "rows": [{"a": 1.5, "b": [1, 2]}, {"a": None}]}, 0))
    assert "1 × 2" in flat and pointers(flat) == ["/studies/0/rows/0/a", "/studies/0/rows/1/a", "/studies/0/rows/1/b"]


# --- cohorts ----------------------------------------------------------------------------------------------------------


def cohort_of(count: int, **more) -> list[cohort.Row]:
    rows = []
    for n in range(count):
        record = {"weights": {"path": f"w{n % 2}"}, "seconds": 10.0 + n + 90 * (n == 5), "warnings": ["x"] * n}
        record |= {"plausibility": {"light": "green", "reasons": []}, **more}
        scores = {"image": {"whole": {"psnr_db": 20.0 + n}}, "segmentation": {}, "definitions": {}}
        rows.append(
            cohort.Row(Result(f"s{n}", record, {}, scores), f"s {n}#.html", png(np.zeros((2, 2), np.uint8)), {})
        )
    return rows


@pytest.mark.parametrize("light", [True, False])
def test_every_line_of_a_cohorts_table_has_a_cell_below_each_head(light):
    rows = cohort_of(6, **({} if light else {"plausibility": None}))
    html = str(cohort.table(rows, cohort.facts(rows)))
    head, *body = (re.findall(r"<t[hd].*?</t[hd]>", line) for line in html.split("</tr>")[:-1])
    assert {len(line) for line in body} == {len(head)} and len(body) == 7
    heads = [plain(cell) for cell in head]
    assert heads == ["", "result", *["plausibility"] * light, "weights", "PSNR, dB", "time, s", "warnings"]
    last = [plain(cell) for cell in body[-1]]
    assert last[heads.index("PSNR, dB")].startswith("22.5") and last[1] == "mean ± sd"
    assert [plain(line[-1]) for line in body[:6]] == ["0", "1", "2", "3", "4", "5"]
    assert [plain(line[heads.index("weights")]) for line in body[:6]] == ["w0", "w1"] * 3
    marked = [[plain(cell) for cell in line if "outlier" in cell] for line in body]
    assert marked == [[]] * 5 + [["105"], []]
    assert 'href="./s%203%23.html"' in html and "Iglewicz" in html and ("Green is" in html) == light
    few = rows[:5]
    assert "Iglewicz" in str(cohort.table(few, cohort.facts(few)))
    assert "Iglewicz" not in str(cohort.table(rows[:4], cohort.facts(rows[:4])))


def test_a_cohort_shows_the_studies_of_its_folder_too(tmp_path):
    rows = cohort_of(2)
    study = {"study": "x", "rows": [{"a": 1.5}]}
    html = page.cohort_page(Found(tmp_path, "t", [r.result for r in rows], studies=[study]), rows)
    assert "Study: x" in html and html.index("<h2>Results") < html.index("Study: x")
    assert "/studies/0/rows/0/a" in pointers(html)


def test_a_cohorts_page_tells_every_kind_of_warning_once_with_its_results(tmp_path):
    rows = cohort_of(3, warnings=["odd"])
    for n, row in enumerate(rows):
        row.result.scores["notes"] = [f"{n} voxels <differ>"]
    html = page.cohort_page(Found(tmp_path, "t", [r.result for r in rows]), rows)
    assert cohort.notes(rows) == ["s0, s1, s2: odd", "s0, s1, s2: 0 to 2 voxels <differ>"]
    assert html.count("voxels &lt;differ&gt;</li>") == 1 and "<li>s0, s1, s2: 0 to 2 voxels" in html
    assert "Warnings and notes" not in page.cohort_page(Found(tmp_path, "t"), cohort_of(1))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_what_was_noted_in_a_run_is_told(tmp_path):
    log = '{"epoch": 3, "validation": {"PSNR": 20.5, "Dice": 0.5}, "warning": "it collapsed"}\n{"epo\n[1]\n'
    run = run_of(tmp_path / "run", log)
    write_json(run / "data.json", {"warnings": {"s1": ["thin", "dark"], "s2": "no list"}})
    facts = curves.read_run(run)
    assert facts["warnings"] == ["epoch 3: it collapsed"] and facts["data_warnings"] == ["s1: thin", "s1: dark"]
    words = plain(html := curves.run_card(facts, []))
    assert "epoch 3: it collapsed" in words and "2 warnings about the data" in words and "s1: dark" in words
    assert "2 lines of the log could not be read." in words and "A point is" not in words
    assert "The run has no summary: it has not ended, or was killed." in words and "start weights" not in words
    assert pointers(html)[-3:] == [f"/run/validation/0/{key}" for key in ("epoch", "PSNR", "Dice")]
    write_json(run / "summary.json", {"updates": 5, "stopped": None, "parts": {}, "ended": True})
    (run / "config.yaml").write_text("epochs: 7\n", encoding="utf8")
    words = plain(curves.run_card(curves.read_run(run), []))
    assert "has no summary" not in words and "start weightsnew" in words and "epochs: 7" in words
    assert "endedTrue" in words and "parts" not in words and "updates5" in words


def test_a_run_without_one_update_is_told_all_the_same(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"epoch": 1, "validation": {"PSNR": 20.5}}\n', encoding="utf8")
    facts = curves.read_run(tmp_path)
    assert len(facts["validation"]) == 1 and not any(any(values) for values in facts["curves"].values())
    assert "The run has no summary" in plain(curves.run_card(facts, []))


def test_the_charts_of_several_runs_have_their_axes_and_units(monkeypatch):
    charts = {}
    monkeypatch.setattr(curves, "line_chart", lambda title, lines, *labels, **_: charts.update({title: labels}))
    none = {"validation": [{"epoch": 1, "PSNR": 1.0}], "at": [1], "summary": None, "config": ""}
    losses = {"g_reconstruction": [1.0], "g_gradient": [1.0], "d_gradient": [2.0], "seconds": [0.5]}
    curves.runs_card([none | {"curves": losses}] * 2, ["a", "b"])
    together = dict(charts)
    charts.clear()
    curves.run_card(none | {"curves": losses, "updates_per_point": 1, "unreadable_lines": 0, "warnings": []}, [])
    for found in (together, charts):
        assert found["PSNR on the test subjects, dB"] == ("epoch",)
        assert found["Reconstruction"] == ("update", "reconstruction loss")
        assert found["Time of an update"] == ("update", "s")
    assert together["Gradient norms: generator"] == ("update", "norm") == together["Gradient norms: critic"]


def test_a_chart_names_the_loss_that_it_draws(monkeypatch):
    """Of a run with a Dice loss in its sum it said Charbonnier, and an added Dice loss was in no chart."""
    charts = {}

    def kept(title, lines, *labels, **_):
        charts[title] = lines, labels[1:]

    monkeypatch.setattr(curves, "line_chart", kept)
    losses = {"g_reconstruction": [1.0], "g_total": [3.0], "g_dice": [2.0]}
    run = {"validation": [], "at": [1], "summary": None, "updates_per_point": 1, "unreadable_lines": 0, "warnings": []}
    texts = [SMALL.replace(reconstruction_loss=loss).to_yaml() for loss in ("charbonnier", "dice")]
    runs = [run | {"curves": losses, "config": text} for text in texts]
    for one, said in zip(runs, ("Charbonnier loss", "Charbonnier + Dice loss"), strict=True):
        curves.run_card(one, [])
        assert charts["Reconstruction"][1] == (said,)
        names = {line.name: line.y[0] for line in charts["Generator"][0]}
        assert names == {"total": 3.0, "Dice loss, before its weight": 2.0}
        curves.runs_card([one, one], ["a", "b"])
        assert charts["Reconstruction"][1] == (said,)
    curves.runs_card(runs, ["a", "b"])
    assert charts["Reconstruction"][1] == ("reconstruction loss",)
    changed = {"behind": 7, "settings": {"reconstruction_loss": ["charbonnier", "dice"]}}
    both = "Charbonnier loss, behind update 7 Charbonnier + Dice loss"
    charts.clear()
    curves.run_card(runs[1] | {"changed": [changed]}, [])
    assert charts[f"Reconstruction: {both}"][1] == ("reconstruction loss",)  # an axis has no room for it
    curves.runs_card([runs[1], runs[1] | {"changed": [changed]}], ["a", "b"])
    assert charts["Reconstruction"][1] == ("reconstruction loss",)
    choices = SETTINGS["reconstruction_loss"].choices
    assert set(curves.LOSSES) == set(choices)


def test_settings_of_runs_that_are_alike_are_told_as_none():
    facts = {"validation": [], "at": [], "curves": {}, "summary": {"updates": 1}, "config": "epochs: 7\nema: 0\n"}
    alike = plain(curves.runs_card([facts, facts], ["a", "b"]))
    assert alike.endswith("Settings that differNone.")
    other = plain(curves.runs_card([facts, facts | {"config": "epochs: 9\nema: 0\nmore: 1\n"}], ["a", "b"]))
    assert other.endswith("Settings that differabepochs: last epoch79more–1")


def test_a_summary_says_its_entries_with_units_and_settings_by_their_meaning():
    entries = {
        "seconds": 61.5,
        "data_wait_seconds": 2.5,
        "best_by": "both",
        "batch_size": 8,
        "new_one": 3,
        "ranks": None,
    }
    facts = {"validation": [], "at": [], "curves": {}, "config": "", "summary": entries, "updates_per_point": 1}
    facts |= {"unreadable_lines": 0, "warnings": []}
    for words in (plain(curves.run_card(facts, [])), plain(curves.runs_card([facts, facts], ["a", "b"]))):
        assert "time61.5 s" in words and "of it waiting for data2.5 s" in words
        assert f"best_by: {SETTINGS['best_by'].help}both" in words and "new one3" in words
        assert f"batch_size: {SETTINGS['batch_size'].help}8" in words and "_seconds" not in words


def test_rows_of_a_summary_keep_their_order_and_a_time_says_since_when():
    """ "which is the" stood far below "its Dice", and a run that was never resumed had a time since its last resume."""
    facts = {"validation": [], "at": [], "curves": {}, "config": "", "updates_per_point": 1, "unreadable_lines": 0}
    facts |= {"warnings": []}
    plainer = {"updates": 3, "seconds": 8.0, "best_dice": 0.5, "dice_is": "Dice", "device": "cpu"}
    resumed = {
        "updates": 3,
        "resumed_at": 2,
        "seconds": 2.0,
        "best_dice": 0.25,
        "dice_is": "mean Dice",
        "device": "cpu",
    }
    runs = [facts | {"summary": one} for one in (plainer, resumed)]
    assert "updates3time8 sits Dice0.5devicecpu" in plain(curves.run_card(runs[0], []))
    said = (
        "updates3resumed behind update2time, of a resumed run since then2 sits Dice0.25which is themean Dicedevicecpu"
    )
    assert said in plain(curves.run_card(runs[1], []))
    words = plain(curves.runs_card(runs, ["a", "b"]))
    assert "time, of a resumed run since then8 s2 sits Dice0.50.25which is theDicemean Dicedevicecpucpu" in words


def test_a_page_says_which_settings_a_run_was_resumed_with():
    """Its config.yaml has the last alone."""
    facts = {"validation": [], "at": [], "curves": {}, "config": "lr_gen: 3\nema: 0\n", "updates_per_point": 1}
    facts |= {"unreadable_lines": 0, "warnings": [], "summary": {"updates": 9}}
    changed = [
        {"behind": 2, "settings": {"lr_gen": [1, 2]}},
        {"behind": 5, "settings": {"lr_gen": [2, 3], "ema": [1, 0]}},
    ]
    words = plain(curves.run_card(facts | {"changed": changed}, []))
    assert "settings behind update 2lr_gen 1 -&gt; 2settings behind update 5lr_gen 2 -&gt; 3, ema 1 -&gt; 0" in words
    words = plain(curves.runs_card([facts | {"changed": changed}, facts], ["a", "b"]))
    assert "3 (up to update 2: 1) (up to update 5: 2)3" in words and "0 (up to update 5: 1)0" in words


@pytest.mark.parametrize("count", (1, 2))
def test_each_line_of_several_runs_is_named_also_where_it_is_alone(count):
    """Of runs of which one has structures or a critic the chart had a line of a colour, and no name."""
    facts = {"validation": [{"epoch": 1, "PSNR": 1.0}], "at": [1], "curves": {}, "summary": None, "config": ""}
    other = facts | {"validation": [{"epoch": 1, "SSIM": 0.5}], "curves": {"d_penalty": [1.0]}}
    page = str(curves.runs_card([facts, other][:count], ["first run", "second run"][:count]))
    figures = re.findall(r"<figure.*?</figure>", page, re.S)
    assert len(figures) == (1, 3)[count - 1]
    for figure in figures:
        assert len(re.findall(r'class="(?:line|dot) ', figure)) == len(re.findall(r'class="swatch ', figure))


def test_of_each_picture_of_tensorboard_the_newest_is_shown(monkeypatch, tmp_path):
    (tmp_path / "tensorboard").mkdir()
    pictures = {"a": [(1, curves.SIGNATURE + b"1"), (9, curves.SIGNATURE + b"9")], "b": [(2, b"no picture")]}
    events = SimpleNamespace(
        Reload=lambda: None,
        Tags=lambda: {"images": list(pictures)},
        Images=lambda tag: [SimpleNamespace(step=s, encoded_image_string=data) for s, data in pictures[tag]],
    )
    reader = SimpleNamespace(EventAccumulator=lambda *args, **more: events)
    monkeypatch.setattr(curves.importlib, "import_module", lambda name: reader)
    assert curves.sample_panels(tmp_path) == [("a, update 9", curves.SIGNATURE + b"9")]


# --- volumes of a page ------------------------------------------------------------------------------------------------


def known(tmp_path: Path) -> tuple[Result, Volume, dict[str, Volume]]:
    result = find(make_known(tmp_path)).results[0]
    sr, others = viewer.load_images(result, [])
    assert sr is not None
    return result, sr, others


@pytest.mark.parametrize("turned", [False, True])
def test_the_slices_of_the_scan_are_numbered_on_the_pages_grid(tmp_path, turned):
    """Also of a scan whose stored axes are in another order, with another number of slices along each."""
    _, sr, others = known(tmp_path)
    low = others["low"]
    if turned:
        affine = low.affine[:, [2, 0, 1, 3]]
        low = Volume(np.ascontiguousarray(low.data.transpose(2, 0, 1)), affine)
    images_ = volumes.images_of(sr, {})
    part = images_.part((slice(5, 30), slice(6, 40), slice(4, 33)))
    view = viewer.View((0, 0, 0), through=2, slice_mm=3.0)
    found = viewer._slices(part, view, low)
    assert found["axis"] == 2 and found["mm"] == 3.0 and found["count"] == 12
    at = part.affine @ [2, 3, 7, 1]  # slice 0 lies at 1 mm, they are 3 mm apart
    assert np.dot(found["row"], [2, 3, 7, 1]) == pytest.approx((at[2] - 1) / 3)
    assert viewer._slices(part, viewer.View((0, 0, 0)), low) is None and viewer._slices(part, view, None) is None


def test_panes_beside_the_stage_are_wide_where_they_are_few_and_the_stage_wipes_where_there_is_a_spline(tmp_path):
    _, sr, others = known(tmp_path)
    spline = Volume(sr.data * np.float32(0.5), sr.affine)
    more = {"spline": spline, "low": others["low"], "truth": sr, "seg": others["seg"]}
    for shown, classes in (({}, ("panes few", "stage")), (more, ("panes", "stage wipe"))):
        made = volumes.images_of(sr, shown)
        html = str(viewer.viewer_card(made.part(made.all), viewer.View((0, 0, 0)), None, 1.0, linear="how it is made"))
        assert re.findall(r'id="(?:panes|stage)" class="([^"]*)"', html) == list(classes)
        assert "how it is made" in html and ("Differences: " in html) == bool(shown)


def test_controls_begin_where_the_page_does_and_end_with_the_slices(tmp_path):
    _, sr, others = known(tmp_path)
    spline = Volume(sr.data * np.float32(0.5), sr.affine)
    made = volumes.images_of(sr, {"spline": spline, "doubt": others["doubt"]})
    part = made.part(made.all)
    html = str(viewer._controls(part, viewer.View((0, 0, 0), "sagittal", changed=True, through=1), True))
    assert re.findall(r'name="(\w+)" value="(\w+)" checked', html) == [
        ("plane", "sagittal"), ("layout", "wipe"), ("layer", "none"),
    ]  # fmt: skip
    assert re.findall(r'name="layer" value="(\w+)"', html) == ["none", "change", "doubt"]
    sliders = {name: limits for name, *limits in re.findall(r'id="(\w+)" min="(.*?)" max="(.*?)" value="(.*?)"', html)}
    assert sliders["slice"] == ["0", str(part.shape[2] - 1), "0"] and sliders["zoom"] == ["1", "8", "1"]
    assert sliders["wipe"] == sliders["overlay"] == ["0", "100", "50"]
    assert "Slice marks" in html and ">largest change<" in html
    assert "Slice marks" not in str(viewer._controls(part, viewer.View((0, 0, 0), changed=True), True))
    html = str(viewer._controls(part, viewer.View((0, 0, 0)), False))
    assert "Slice marks" not in html and ">back<" in html and 'id="wipe"' not in html and 'value="change"' not in html


def test_a_page_opens_in_the_plane_across_the_slices_in_which_more_changes():
    """At the change inside the segmentation, or the label where there is none."""
    data = np.full((40, 40, 40), 100, np.float32)
    sr = Volume(data, np.eye(4))
    low = Volume(data[:, :, ::4].copy(), np.diag([1.0, 1, 4, 1]))
    spline = Volume(data.copy(), np.eye(4))
    spline.data[20, 8:32, 20] += 50  # a line from front to back: a sagittal plane sees all of it
    spline.data[20, 20, 20] += 20
    spline.data[30, 30, 30] += 500  # outside the masks
    inside = np.zeros((40, 40, 40), np.uint8)
    inside[12:28, 4:36, 12:28] = 1
    for name in ("seg", "label"):
        found = viewer.open_at(sr, {"low": low, "spline": spline, name: Volume(inside, np.eye(4))})
        assert found == viewer.View((20, 20, 20), "sagittal", True, 2, 4.0) and found.across == 0
    other = {"low": low, "spline": Volume(spline.data.transpose(1, 0, 2).copy(), np.eye(4))}
    assert viewer.open_at(sr, other | {"seg": Volume(inside.transpose(1, 0, 2), np.eye(4))}).plane == "coronal"
    assert viewer.open_at(sr, {"low": low}).through is None


@pytest.mark.parametrize("air", [0, -50])
def test_holes_of_what_a_mask_kept_are_the_scans(air):
    """A dark place within it, such as fluid, is no place outside; nor is what a file's integers make of air."""
    data = np.full((12, 12, 12), 200, np.float32)
    spline = Volume(data, np.eye(4))
    sr = np.full_like(data, air)
    sr[0, 0, 0] = air + 0.01
    sr[3:9, 3:9, 3:9] = 200
    sr[5:7, 5:7, 5:7] = 0
    seen = inside_mask({"region": {"outside": "zero"}}, spline, Volume(sr, np.eye(4))).data
    assert (seen[3:9, 3:9, 3:9] == 200).all() and (seen == air).sum() == 12**3 - 6**3
    assert inside_mask({"region": {"outside": "scan"}}, spline, Volume(sr, np.eye(4))) is spline


def test_a_record_of_an_older_version_has_its_slices_under_the_older_name(tmp_path):
    """Both names give the same estimate; of a record that cannot be there is none."""
    _, sr, others = known(tmp_path)
    bright = np.broadcast_to(200 * (np.arange(12) % 3 == 0), others["low"].data.shape)
    low = Volume(bright.astype(np.float32), others["low"].affine)
    spline = onto_grid(low, sr, notes=[])
    told = {"profile": "gaussian", "weight": 0.5}
    made = [
        viewer.linear_estimate({"geometry": "physical", "agree": told | {name: 3.0}}, low, sr, spline, None)
        for name in ("width_mm", "thickness_mm")
    ]
    assert made[0] is not None and made[1] is not None and np.array_equal(made[0][0].data, made[1][0].data)
    assert made[0][0].data.min() == 0 and not np.array_equal(made[0][0].data, spline.data)
    for wrong in ({"weight": 0}, {"weight": float("inf")}, {"profile": None}, {"profile": "none such"}):
        agree = told | {"width_mm": 3.0} | wrong
        record = {"geometry": "physical", "agree": agree}
        assert viewer.linear_estimate(record, low, sr, spline, None) is None, wrong


def test_thumbnails_are_radiological_and_have_the_rim_of_the_segmentation_in_cyan():
    grey = np.arange(30, dtype=np.uint8).reshape(5, 6)
    mask = np.zeros((5, 6), np.uint8)
    mask[1:4, 1:5] = 1
    pixels = np.asarray(Image.open(io.BytesIO(volumes.plane_png(grey))).convert("RGB"))
    assert np.array_equal(pixels[..., 0], grey[::-1, ::-1].T) and (pixels == pixels[..., :1]).all()
    outlined = np.asarray(Image.open(io.BytesIO(volumes.plane_png(grey, mask))).convert("RGB"))
    cyan = (outlined == (34, 211, 238)).all(2)
    rim = np.zeros((5, 6), bool)
    rim[1:4, 1:5] = True
    rim[2, 2:4] = False
    assert np.array_equal(cyan, rim[::-1, ::-1].T) and np.array_equal(outlined[~cyan], pixels[~cyan])


def test_images_are_cubic_between_their_voxels_and_masks_and_scan_as_they_are():
    some = np.random.default_rng(1)
    sr = Volume(some.uniform(100, 1000, (16, 16, 16)).astype(np.float32), np.eye(4))
    shift = np.diag([2.0, 2, 2, 1])
    shift[:3, 3] = 0.25
    coarse = Volume(some.uniform(100, 1000, (8, 8, 8)).astype(np.float32), shift)
    masks = Volume((coarse.data > 500).astype(np.uint8), shift)
    made = volumes.images_of(sr, {"truth": coarse, "low": coarse, "label": masks})
    top = made.top
    for name, order in (("truth", 3), ("low", 0)):
        exact = np.clip(onto_grid(coarse, sr, order=order, notes=[]).data * 255 / top, 0, 255)
        assert np.abs(made.arrays[name] - exact).max() <= 0.51  # found: 0.5, rounding
    assert np.array_equal(made.arrays["label"], onto_grid(masks, sr, order=0, notes=[]).data)


@pytest.mark.parametrize("name", sorted(volumes.MASKS))
def test_a_voxel_is_of_a_mask_above_a_half_and_so_where_a_picture_looks(name):
    data = np.zeros((12, 12, 12), np.float32)
    data[3:9, 3:9, 3:9] = 0.5
    sr = Volume(np.arange(12**3, dtype=np.float32).reshape(data.shape) + 1, np.eye(4))
    half, more = Volume(data, np.eye(4)), Volume(np.nextafter(data, np.float32(1)), np.eye(4))
    drawn = [volumes.images_of(sr, {name: mask}).arrays[name] for mask in (half, more)]
    assert [int(one.sum()) for one in drawn] == [0, 6**3]
    assert np.array_equal(planes.inside_of(sr, half).data, planes.inside_of(sr).data)
    assert not planes.inside_of(sr, more).data[data == 0].any() and planes.inside_of(sr, more).data.any()
    other, (cut, *_) = Volume(sr.data + 1, np.eye(4)), planes.cuts(sr)
    assert [planes.change_in(cut, (sr, other), mask) > 0 for mask in (half, more)] == [False, True]


def test_the_scale_of_a_doubt_is_that_of_where_there_is_any():
    sr = Volume(np.full((10, 10, 10), 500, np.float32), np.eye(4))
    doubt = np.zeros((10, 10, 10), np.float32)
    doubt[4, 4, 3:6] = 8
    made = volumes.images_of(sr, {"doubt": Volume(doubt, np.eye(4))})
    assert made.doubt_top == 8 and made.arrays["doubt"].max() == 255 and np.count_nonzero(made.arrays["doubt"]) == 3
    assert volumes.images_of(sr, {"doubt": Volume(0 * doubt, np.eye(4))}).doubt_top == 1


def test_no_page_of_a_result_has_the_name_of_the_table():
    assert cohort.page_name("a", Path("x/a_report.html")) == "a_a_report.html"
    assert cohort.page_name("", Path("_report.html")) == "__report.html"
    assert cohort.page_names(["a", "a"], Path("r.html")) == ["a_r.html", "a-2_r.html"]


def test_a_part_fills_what_it_is_given_also_where_the_first_guess_is_far_too_small():
    """Around a place where little is, beside one that is full of noise."""
    data = np.full((60, 40, 40), 500, np.float32)
    data[:30] = np.random.default_rng(0).integers(100, 1000, (30, 40, 40))
    made = volumes.images_of(Volume(data, np.eye(4)), {})
    most = made.part(made.all).size // 2
    assert made.part((slice(30, 60), slice(0, 40), slice(0, 40))).size < 0.1 * most  # found: 0.006
    packed = volumes.pack(made, most, (45.0, 20.0, 20.0), 0)
    assert 0.8 * most < packed.size <= most and packed.shape[1:] == (40, 40)  # found: 0.90


@pytest.mark.parametrize("count", [viewer.MOST_VALUES, viewer.MOST_VALUES + 1])
def test_a_map_of_structures_is_shown_up_to_its_number_of_colours(tmp_path, count):
    result, sr, _ = known(tmp_path)
    mask = np.zeros(sr.data.shape, np.int16)
    mask.ravel()[:count] = np.arange(1, count + 1)
    result.files["mask"] = images.save(tmp_path / "mask.nii.gz", mask, np.eye(4))
    warnings: list[str] = []
    shown = "mask" in viewer.load_images(result, warnings)[1]
    assert shown == (count == viewer.MOST_VALUES) == (not warnings)
    assert shown or ("the map of structures is not shown: " in warnings[0] and "more than 85 values" in warnings[0])


def test_of_the_images_that_are_gone_those_are_told_that_a_result_has(tmp_path):
    """SR, segmentation and input always; of the others what the record names; truth and label need not be."""
    names = {"sr": "the super-resolved image", "input": "the input", "seg": "the segmentation"}
    names |= {"doubt": "the doubt", "mask": "the map of structures"}
    told = {what: f"{name} is no longer there and is not shown" for what, name in names.items()}
    result, _, _ = known(tmp_path)
    result.files.clear()
    for outputs in (("sr", "seg", "doubt", "mask"), ("sr", "seg", "mask"), ("sr",)):
        result.record["outputs"] = {"doubt": None} | dict.fromkeys(outputs, "gone")
        warnings: list[str] = []
        assert viewer.load_images(result, warnings) == (None, {})
        assert warnings == [text for what, text in told.items() if what in {"sr", "input", "seg", *outputs}]


def test_a_label_is_shown_by_the_values_that_were_scored(tmp_path):
    result, _, _ = known(tmp_path)
    result.files["label"] = result.files["mask"]
    result.scores = {"label_classes": {"x": [41, 90], "y": [3]}}
    label = viewer.load_images(result, [])[1]["label"]
    whole = images.load_label(result.files["mask"], largest=65535).data
    assert np.array_equal(label.data > 0, np.isin(whole, (41, 90))) and label.data.any()


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_draws_what_is_given_before_what_is_found_and_the_first_structure(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(show, "planes", lambda columns, **more: drawn.append((columns, more)))
    path = make_known(tmp_path)
    own = Volume(np.full((40, 44, 36), 77, np.float32), np.eye(4))
    show.show(path, truth=(own.data, own.affine), width_px=300, title="t")
    columns, more = drawn.pop()
    assert [c.title for c in columns] == ["Low resolution", "Cubic spline", "fastsrgan", "Truth", "Segmentation"]
    assert more["reference"].data.max() == 77 and more["width_px"] == 300 and more["title"] == "t"
    show.show(path, image=Volume(own.data[:, :, ::3] * 2, np.diag([1.0, 1, 3, 1])))
    columns, more = drawn.pop()
    assert columns[0].volume.data.max() == 154 and more["width_px"] == 1000 and more["scan"] is columns[0].volume
    assert np.median(columns[1].volume.data) == pytest.approx(154)
    prob = np.zeros((2, 40, 44, 36), np.float32)
    prob[0, 3:9] = 1
    show.show(InferResult(own.data, prob, own.affine, {}), label=Volume(prob[1], own.affine))
    columns, more = drawn.pop()
    assert np.array_equal(more["masks"][0].data, prob[0]) and np.array_equal(more["masks"][1].data, prob[1])
    show.show(own, at_mm=(1, 2, 3))
    columns, more = drawn.pop()
    assert [c.title for c in columns] == ["Image"] and more["reference"] is own and more["at_mm"] == (1, 2, 3)
