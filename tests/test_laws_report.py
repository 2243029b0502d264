"""What a report finds in folders: which files are a result's, whose scores are whose; and the lines of its charts."""

from __future__ import annotations

import json
import logging
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fastsrgan.errors import InputError, UsageError
from fastsrgan.io.bids import RECORD
from fastsrgan.pictures import bland_altman
from fastsrgan.pictures.axes import LEAST, axis_range
from fastsrgan.report.collect import find, is_record, is_scores, is_study
from fastsrgan.report.html import COLOURS, HEIGHT, MARKED, WIDTH, Line, el, line_chart, ticks
from fastsrgan.study import plots

WEIGHTS = {"path": "w"}


def put(path: Path, value: Any = "") -> Path:
    """A file of JSON, or with any text where an image has to be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf8")
    return path


def record(source: str = "scan.nii.gz", **outputs: str) -> dict[str, Any]:
    return {"input": {"path": source}, "outputs": {"sr": "a_sr.nii.gz"} | outputs, "weights": WEIGHTS}


def scored(psnr: float, **more: Any) -> dict[str, Any]:
    return {"image": {"whole": {"psnr_db": psnr}}} | more


def named(found: Any) -> dict[str, Any]:
    """Stem -> PSNR of its scores."""
    return {r.stem: r.scores and r.scores["image"]["whole"]["psnr_db"] for r in found.results}


# --- files ------------------------------------------------------------------------------------------------------------


def test_outputs_lie_beside_the_record_and_the_scan_where_it_is_nearest(tmp_path):
    """Wherever they were when they were written: folders move."""
    out = tmp_path / "all" / "out"
    far = put(tmp_path / "far" / "scan.nii.gz")
    put(out / "a.json", record(str(far), seg="/gone/a_seg.nii.gz", doubt=str(far), png="a.png", prob="a_sr.nii.gz"))
    for kind in ("sr", "seg"):
        put(out / f"a_{kind}.nii.gz")
    assert find(out).results[0].files == {
        "sr": out / "a_sr.nii.gz", "seg": out / "a_seg.nii.gz", "input": far,
    }  # fmt: skip
    above = put(tmp_path / "all" / "scan.nii.gz")
    assert find(out).results[0].files["input"] == above
    beside = put(out / "scan.nii.gz")
    assert find(out).results[0].files["input"] == beside


def test_results_are_told_by_their_place_below_the_folder_in_order(tmp_path):
    for name in ("b/x", "a", "b/c/x"):
        put(tmp_path / f"{name}.json", record())
    for nothing in ("store/zarr.json", "store/deep/x.json", "run/log.jsonl", "run/x.json", ".hidden/x.json"):
        put(tmp_path / nothing, record())
    found = find(tmp_path)
    assert [r.stem for r in found.results] == ["a", "b/c/x", "b/x"]
    assert (found.folder, found.title, found.run, found.demo) == (tmp_path, tmp_path.name, None, None)
    one = find(tmp_path / "b" / "x.json")
    assert [r.stem for r in one.results] == ["x"] and (one.folder, one.title) == (tmp_path / "b", "x")
    put(tmp_path / "log.jsonl")  # of a run its own files alone
    assert [r.stem for r in find(tmp_path).results] == ["a"] and find(tmp_path).run == tmp_path
    assert find(tmp_path / "a.json").run is None


@pytest.mark.parametrize("end", [".nii.gz", ".nii"])
def test_images_of_derivatives_have_their_own_names(tmp_path, end):
    anat = tmp_path / "sub-1" / "anat"
    put(anat / "sub-1_desc-sr_T1w.json", {"Sources": ["x"], RECORD: record()})
    made = {"sr": anat / f"sub-1_desc-sr_T1w{end}"}
    for kind, name in (("seg", "cortexT1w_dseg"), ("mask", "maskT1w_dseg"), ("doubt", "doubt_T1w")):
        made[kind] = anat / f"sub-1_desc-{name}.nii.gz"
    for path in made.values():
        put(path)
    put(anat / "sub-1_desc-sr_T1w.nii")  # the packed one is taken where both are there
    (result,) = find(tmp_path).results
    assert result.files == made and result.stem == "sub-1/anat/sub-1_desc-sr_T1w"
    made["doubt"].unlink()
    assert "doubt" not in find(tmp_path).results[0].files


# --- scores -----------------------------------------------------------------------------------------------------------


def cohort(folder: Path) -> Path:
    for name in ("a", "b"):
        put(folder / f"{name}.json", record(sr=f"{name}_sr.nii.gz"))
        put(folder / f"{name}_sr.nii.gz")
    return folder


def test_scores_are_of_the_image_that_they_name_and_of_no_other_of_its_name(tmp_path):
    out = cohort(tmp_path / "out")
    rows = [scored(1, files={"sr": str(out / "b_sr.nii.gz")}), scored(2, files={"sr": "/gone/a_sr.nii.gz"})]
    put(out / "scores.json", {"definitions": {"psnr_db": "words"}, "rows": [*rows, {"failed": 1}, 5]})
    found = find(out)
    assert named(found) == {"a": 2, "b": 1} and found.results[0].scores["definitions"] == {"psnr_db": "words"}
    other = put(tmp_path / "other" / "a_sr.nii.gz")  # is there, so it is meant
    rows[1]["files"]["sr"] = str(other)
    put(out / "scores.json", {"definitions": {}, "rows": rows})
    assert named(find(out)) == {"a": None, "b": 1}


def test_of_several_rows_of_one_name_the_subjects_decides(tmp_path):
    for place in ("p", "q"):
        put(tmp_path / place / "a.json", record())
    rows = [scored(n, subject=f"{place}/a", files={"sr": "a_sr.nii.gz"}) for n, place in ((3, "q"), (4, "p"))]
    scores = put(tmp_path / "s" / "scores.json", {"definitions": {}, "rows": rows})
    assert named(find(tmp_path, scores)) == {"p/a": 4, "q/a": 3}
    put(scores, {"definitions": {}, "rows": [row | {"subject": "p/a"} for row in rows]})
    with pytest.raises(UsageError, match=r"scores a_sr\.nii\.gz 2 times"):
        find(tmp_path, scores)


def test_scores_without_names_are_of_the_only_result(tmp_path):
    put(tmp_path / "a.json", record())
    put(tmp_path / "scores.json", {"definitions": {}} | scored(7))
    assert named(find(tmp_path)) == {"a": 7}
    given = put(tmp_path / "given" / "s.json", {"definitions": {}} | scored(8))
    assert named(find(tmp_path / "a.json", given)) == {"a": 8}
    put(given, {"definitions": {}} | scored(8, files={"sr": "z_sr.nii.gz"}))
    with pytest.raises(UsageError, match="scores none of these results"):
        find(tmp_path / "a.json", given)
    with pytest.raises(UsageError, match=r"scores a_sr\.nii\.gz a second time"):
        put(tmp_path / "more.json", {"definitions": {}} | scored(7))
        find(tmp_path)
    assert named(find(cohort(tmp_path / "out"))) == {"a": None, "b": None}
    put(tmp_path / "out" / "scores.json", {"definitions": {}} | scored(7))
    assert named(find(tmp_path / "out")) == {"a": None, "b": None}
    put(tmp_path / "other" / "s.json", {"definitions": {}} | scored(8, files={"sr": "z_sr.nii.gz"}))
    with pytest.raises(UsageError, match="scores none of these results"):
        find(tmp_path / "out", tmp_path / "other" / "s.json")


def test_the_truth_lies_where_it_was_named_or_beside_the_scores(tmp_path):
    put(tmp_path / "out" / "a.json", record())
    place = tmp_path / "scores"
    hr, label = put(place / "hr.nii.gz"), put(tmp_path / "truth" / "label.nii.gz")
    files = {"sr": "a_sr.nii.gz", "hr": "hr.nii.gz", "label": str(label), "mask": str(label)}
    put(place / "s.json", {"definitions": {}} | scored(1, files=files))
    assert find(tmp_path / "out", place / "s.json").results[0].files == {"hr": hr, "label": label}


def test_of_scores_and_records_only_what_is_of_its_kind_is_taken(tmp_path):
    put(tmp_path / "a.json", record() | {"warnings": "no list", "asked": {"step": 3}, "provenance": []})
    wrong = scored(1, notes={}, gain=[], baseline={"image": {}}) | {"image": {"whole": {"psnr_db": 1}, "mask": 3}}
    put(tmp_path / "scores.json", {"definitions": {}} | wrong)
    (result,) = find(tmp_path).results
    assert set(result.record) == {"input", "outputs", "weights", "asked"}
    assert result.scores == {"definitions": {}, "image": {"whole": {"psnr_db": 1}}, "baseline": {"image": {}}}


# --- kinds, damage ----------------------------------------------------------------------------------------------------


def test_files_are_told_by_what_they_hold():
    assert is_record(record()) and not any(
        is_record(record() | wrong) for wrong in ({"input": 1}, {"weights": None}, {"outputs": {"seg": "x"}})
    )
    both = {"definitions": {}, "image": {}, "rows": []}
    for key, wrong in (("image", []), ("rows", {})):
        assert is_scores({k: v for k, v in both.items() if k != key}) and is_scores(both | {key: wrong})
    assert not is_scores(both | {"definitions": 1}) and not is_scores({"definitions": {}})
    assert is_study({"study": "steps"}) and not is_study({"study": 1})


def test_damage_is_named_up_to_three_files(tmp_path, caplog):
    for n in range(4):
        put(tmp_path / f"{n}.json", "{")
    put(tmp_path / "empty.json", " {} ")
    with pytest.raises(InputError, match=r"damaged or no JSON object: 0\.json, 1\.json, 2\.json and 1 more "):
        find(tmp_path)
    (tmp_path / "3.json").unlink()
    with pytest.raises(InputError, match=r"object: 0\.json, 1\.json, 2\.json \("):
        find(tmp_path)
    study = put(tmp_path / "s" / "steps.json", {"study": "steps", "rows": 5, "fit": []})
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        found = find(tmp_path)
    assert found.studies == [{"study": "steps", "fit": []}]
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / f'{n}.json'}: is damaged or no JSON object, left out" for n in range(3)
    ]
    assert find(study, studies=[study]).studies == [{"study": "steps", "fit": []}]


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_a_demo_is_its_test_subject_with_its_truth_and_its_run(tmp_path):
    put(tmp_path / "demo.json", {"scores": scored(9)})
    put(tmp_path / "out" / "a.json", record())
    put(tmp_path / "out" / "b.json", {"other": 1})
    table = "HR_image,Label_image,Base\nt.nii.gz,u.nii.gz,Train\nh.nii.gz,l.nii.gz,Test\nx.nii.gz,y.nii.gz,Test\n"
    put(tmp_path / "cohort" / "cohort.csv", table)
    for name in "tuhlxy":
        put(tmp_path / "cohort" / f"{name}.nii.gz")
    found = find(tmp_path)
    (result,) = found.results
    assert named(found) == {"a": 9} and found.run is None and found.demo == {"scores": scored(9)}
    assert {kind: path.name for kind, path in result.files.items()} == {"hr": "h.nii.gz", "label": "l.nii.gz"}
    put(tmp_path / "run" / "log.jsonl")
    assert find(tmp_path).run == tmp_path / "run"
    put(tmp_path / "out" / "c.json", record())
    with pytest.raises(InputError, match="its demo holds 2 results"):
        find(tmp_path)


# --- charts -----------------------------------------------------------------------------------------------------------


def drawn(*lines: Line) -> tuple[list[str], list[tuple[str, int]]]:
    """Classes of the dots, and class and number of points of each line."""
    html = line_chart("t", lines, "x")
    paths = re.findall(r'<polyline points="([^"]*)" class="([^"]*)"', html)
    return re.findall(r'<circle [^>]*class="([^"]*)"', html), [(kind, len(at.split())) for at, kind in paths]


def test_lines_break_at_gaps_and_few_points_are_marked():
    """A point between two gaps would not be seen without its mark."""
    few, many = list(range(MARKED)), list(range(MARKED + 1))
    assert drawn(Line("a", few, few)) == (["dot s0"] * MARKED, [("line s0", MARKED)])
    assert drawn(Line("a", many, many)) == ([], [("line s0", MARKED + 1)])
    assert drawn(Line("a", few, few, dashed=True)) == ([], [("line s0 dashed d0", MARKED)])
    gaps = [1.0, 2.0, None, 3.0, None, 4.0, 5.0, 6.0]
    assert drawn(Line("a", range(8), gaps, dashed=True)) == (
        ["dot s0"],
        [("line s0 dashed d0", 2), ("line s0 dashed d0", 3)],
    )
    left_out, own = Line("a", [0, 1], [None, None]), Line("b", [0, 1], [1, 2], number=COLOURS + 2)
    assert drawn(left_out, own, Line("c", [0, 1], [1, 2]))[1] == [("line s2", 2), ("line s1", 2)]


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_chart_of_one_value_has_it_in_the_middle(value):
    html = line_chart("t", [Line("a", [5], [value])], "x")
    ((x, y),) = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', html)
    assert (float(x), float(y)) == ((70 + WIDTH - 12) / 2, (14 + HEIGHT - 40) / 2)


def test_ticks_are_round_numbers_inside_and_at_most_six():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1] and ticks(0, 1.25) == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert ticks(-7, 13) == [-5, 0, 5, 10] and ticks(0.001, 0.0451) == [0.01, 0.02, 0.03, 0.04] and ticks(2, 1) == [2]


def test_attributes_that_are_nothing_are_left_out():
    assert el("input", checked=False, value=None, hidden=True, class_="a", data_path=0) == (
        '<input hidden class="a" data-path="0">'
    )


# --- the ends of an axis ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [35.2, 0.81, 0.998, -0.02, 4e-5])
@pytest.mark.parametrize("share", [0.0, 1e-4, 5e-3, 0.5])
def test_a_change_looks_as_large_as_it_is_beside_the_values(start, share):
    """A Dice of 0.8100 and 0.8101 was a cliff over the whole height of its chart."""
    low, high = sorted((start, start * (1 - share)))
    bottom, top = axis_range(low, high)
    assert bottom <= low <= high <= top
    assert (high - low) / (top - bottom) == pytest.approx(min(1, share / LEAST), abs=1e-9)
    assert low < 0 or high > 1 or low == high or top <= 1, "no axis of a share ends above 1"


def test_every_chart_takes_the_ends_of_its_axis_from_the_size_of_its_values():
    from matplotlib.figure import Figure

    flat = [0.8100, 0.8101]
    page = line_chart("t", [Line("a", [1, 2], flat)], "epoch")
    (one, two) = (float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', page))
    assert 0 < one - two < 0.02 * HEIGHT  # found: 0.0048
    axes = Figure().subplots()
    plots._panel(axes, plots.Panel("t", "epoch", [plots.PlotLine("a", [1, 2], flat)]))
    plots._scale([axes])
    low, high = axes.get_ylim()
    assert low < flat[0] < flat[1] < high and high - low == pytest.approx(LEAST * flat[1], rel=1e-4)


def test_panels_of_one_figure_have_one_axis_and_others_their_own(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: drawn.append([a.get_ylim() for a in self.axes]))
    monkeypatch.setattr(plots, "atomic_write", lambda path: nullcontext(path))
    lines = [[plots.PlotLine("a", [1, 2], [low, low + 1])] for low in (1, 5, 9, 13)]
    panels = [
        plots.Panel("t", "x", line, figure=figure) for line, figure in zip(lines, ("", "f", "f", ""), strict=True)
    ]
    plots.draw(tmp_path / "p", [panels[:2], panels[2:]], "t")
    one, two, three, four = drawn[0]
    assert two == three and two[0] < 5 < 10 < two[1] and one[1] < 3 and four[0] > 12


def test_two_results_that_hardly_differ_look_so(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: drawn.append(self.axes[0].get_ylim()))
    monkeypatch.setattr(bland_altman, "atomic_write", lambda path: nullcontext(path))
    bland_altman.bland_altman(tmp_path / "p.png", [("PSNR, dB", [30, 31], [30.001, 31.002])], ("a", "b"))
    ((low, high),) = drawn
    assert high - low == pytest.approx(LEAST * 31.002)
