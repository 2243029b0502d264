"""What an evaluation reads, compares and says, whether a scan is like its weights, and where pictures look."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastsrgan.core.files import write_json
from fastsrgan.errors import InputError, UsageError
from fastsrgan.evaluate import cohort, compare, grids, pair, plausibility
from fastsrgan.evaluate.figures import FIGURES, REGIONS, captions, name_of
from fastsrgan.evaluate.plausibility import GREEN, RED, YELLOW, Look
from fastsrgan.io import nifti as images
from fastsrgan.model.purpose import MODELS
from fastsrgan.pictures import bland_altman, error_map, figure, planes
from fastsrgan.volume.geometry import Volume

# --- cohorts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """Arguments of ``evaluate_files``, which is not called."""
    found: list[dict] = []

    def files(**given):
        found.append(given)
        return {"image": {"whole": {"mae": float(len(found))}}, "notes": ["n"], "files": {"sr": str(given["sr"])}}

    monkeypatch.setattr(cohort, "evaluate_files", files)
    return found


@pytest.fixture
def drawn(monkeypatch) -> list[Path]:
    """Where pictures would be drawn."""
    found: list[Path] = []
    monkeypatch.setattr(cohort, "draw_errors", lambda png, files, row: found.append(Path(png)))
    return found


def test_every_column_of_a_table_reaches_the_evaluation_and_a_row_chooses_its_own_classes(asked, drawn, tmp_path):
    names = [*cohort.COLUMNS, cohort.CLASSES]
    for name in names:
        (tmp_path / f"{name}.nii").write_bytes(b"")
    (tmp_path / "other.nii").write_bytes(b"")
    every = [*(f"{name}.nii" for name in cohort.COLUMNS), "own=1"]
    few = ["other.nii", "HR_image.nii", "", "Label_image.nii", *[""] * 5]
    bare = ["Mask_image.nii", "HR_image.nii", *[""] * 7]
    lines = "\n".join(map(",".join, (names, every, few, bare)))
    (tmp_path / "t.csv").write_text(lines + "\n", encoding="utf8")
    choice = cohort.Choice(("3",), "names.txt")
    made = cohort.evaluate_table(tmp_path / "t.csv", png=tmp_path / "png", choice=choice)
    first, second, third = asked
    others = ("label_classes", "label_names", "subject", "alone")
    assert {k: Path(v).stem for k, v in first.items() if k not in others} == {
        "sr": "SR_image", "hr": "HR_image", "seg": "Seg_image", "label": "Label_image", "mask": "Mask_image",
        "lr": "LR_image", "baseline": "Baseline_image", "baseline_seg": "Baseline_seg",
    }  # fmt: skip
    assert [tuple(one["label_classes"]) for one in asked] == [("own=1",), ("3",), ()]
    assert {one["label_names"] for one in asked} == {"names.txt"} and {one["subject"] for one in asked} == {None}
    assert drawn == [tmp_path / "png" / f"{r['subject']}.png" for r in made["rows"]]
    assert (
        [row["line"] for row in made["rows"]] == [2, 3, 4] and "label" not in third and set(second) & {"seg"} == set()
    )
    assert made["summary"]["image.whole.mae"] == {"mean": 2.0, "sd": 1.0, "n": 3}


def test_a_row_that_fails_is_told_with_its_line_and_a_cohort_of_such_rows_is_refused(monkeypatch, tmp_path, caplog):
    def files(sr, **_):
        if Path(sr).stem == "bad":
            raise InputError("x", "y", "z")
        return {"image": {}, "notes": []}

    monkeypatch.setattr(cohort, "evaluate_files", files)
    items = [cohort.Item(n, {"sr": Path(f"{n}.nii")}, line) for line, n in ((2, "bad"), (3, "good"))]
    made = cohort.evaluate_items("t", items)
    assert made["failed"] == [{"subject": "bad", "line": 2, "error": "x: y (z)"}]
    assert [row["subject"] for row in made["rows"]] == ["good"]
    assert "line 2, bad: x: y (z)" in caplog.text
    with pytest.raises(InputError, match="t: line 2: x: y"):
        cohort.evaluate_items("t", items[:1])
    lost = cohort.Item("lost", {"sr": Path("l.nii")}, fault="no truth")
    with pytest.raises(InputError, match=r"f: no subject could be evaluated \(l.nii: no truth"):
        cohort.evaluate_items("f", [lost])


def test_names_of_pictures_have_no_folder_and_a_strangers_file_is_kept(asked, drawn, tmp_path):
    item = cohort.Item("p/a", {"sr": Path("a.nii")})
    cohort.evaluate_items("t", [item], png=tmp_path)
    assert drawn == [tmp_path / "p_a.png"]
    (tmp_path / "p_a.png").write_bytes(b"mine")
    with pytest.raises(UsageError):
        cohort.evaluate_items("t", [item], png=tmp_path)
    assert len(asked) == 1


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_results_are_found_with_what_belongs_to_them(asked, tmp_path):
    """Of several structures the map of them; the truth of a tree in the same tree, else in the one folder."""
    out = touched(
        tmp_path / "out", "b_LR_sr.nii.gz", "p/a_sr.nii.gz", "p/a_seg.nii.gz", "p/a_mask.nii.gz", ".x_sr.nii.gz"
    )
    touched(out, "b_LR_seg.nii.gz")
    truth = touched(
        tmp_path / "truth", "p/a.nii.gz", "a.nii.gz", "a_label.nii.gz", "p/a_gm.nii", "b_HR.nii", "b_mask.nii"
    )
    cohort.evaluate_folders(out, truth)
    several = cohort.Choice(("x=1", "y=2"))
    cohort.evaluate_folders(out, truth, choice=several)
    cohort.evaluate_folders(out, truth, choice=cohort.Choice(("1",)))
    named = [{k: str(v.relative_to(tmp_path)) for k, v in one.items() if isinstance(v, Path)} for one in asked]
    b = {"sr": "out/b_LR_sr.nii.gz", "hr": "truth/b_HR.nii", "mask": "truth/b_mask.nii"}
    a = {"sr": "out/p/a_sr.nii.gz", "hr": "truth/p/a.nii.gz", "label": "truth/p/a_gm.nii", "seg": "out/p/a_seg.nii.gz"}
    assert named == [b, a, b, a | {"seg": "out/p/a_mask.nii.gz"}, b, a]
    for folders, told in (((out, tmp_path / "none"), "is no folder"), ((truth, out), "holds no STEM_sr")):
        with pytest.raises(InputError, match=told):
            cohort.evaluate_folders(*folders)
    assert [item.subject for item in [cohort._of_infer(out / "p" / "a_sr.nii.gz", out, truth, False)]] == ["p/a"]


def test_the_scan_of_a_record_is_taken_where_it_is_unchanged(tmp_path):
    scan = touched(tmp_path, "scan.nii") / "scan.nii"
    scan.write_bytes(b"some")
    record = {"input": {"path": str(scan), "sha256": images.sha256(scan)}}
    assert cohort.low_resolution(record) == (scan, None)
    changed = {"input": record["input"] | {"sha256": "0"}}
    assert cohort.low_resolution(changed) == (None, (str(scan), cohort.CHANGED))
    gone = {"input": record["input"] | {"path": str(tmp_path)}}
    assert cohort.low_resolution(gone) == (None, (str(tmp_path), cohort.GONE))
    for said in ({}, {"input": None}, {"input": {"path": 3}}):
        assert cohort.low_resolution(said) == (None, None)


def test_inputs_that_make_no_baseline_are_one_line_for_each_reason(asked, caplog):
    """Was a line for each subject."""
    reasons = [cohort.CHANGED] * 6 + [cohort.GONE] + [None] * 2
    items = [
        cohort.Item(f"s{n}", {"sr": Path("sr"), "hr": Path(f"hr{n}")}, unused=why and (f"{n}.nii", why))
        for n, why in enumerate(reasons)
    ]
    lines = [
        "s0, s1, s2, s3, s4 and 1 more: the input of 6 results was changed since, no baseline",
        "s6: its input 6.nii is not there, no baseline",
    ]
    with caplog.at_level(logging.INFO, "fastsrgan"):
        notes = cohort.evaluate_items("x", items)["notes"]
    assert [note for note in sorted(notes) if "no baseline" in note] == lines
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "no baseline" in r.getMessage()]
    assert said == [("WARNING", lines[0]), ("INFO", lines[1])]
    caplog.clear()
    cohort.evaluate_items("x", items, beside="other")
    assert not caplog.records


def test_a_note_names_five_subjects_at_most():
    rows = [{"subject": f"s{n}", "notes": ["one", *["few"] * (n < 5)]} for n in range(6)]
    assert cohort.told_once(rows) == ["s0, s1, s2, s3, s4 and 1 more: one", "s0, s1, s2, s3, s4: few"]


@pytest.mark.parametrize(("count", "more"), [(1, ""), (5, ""), (6, " and 1 more"), (7, " and 2 more")])
def test_segmentations_without_a_label_are_counted_and_five_named(asked, caplog, count, more):
    """Not those that have one, have none to score, or cannot be scored at all."""
    sr = {"sr": Path("sr"), "hr": Path("hr")}
    items = [cohort.Item(f"s{n}", sr, segmented=True) for n in range(count)]
    items += [cohort.Item("labelled", sr | {"label": Path("l")}, segmented=True), cohort.Item("plain", sr)]
    items.append(cohort.Item("lost", {"sr": Path("sr")}, fault="no truth", segmented=True))
    with caplog.at_level(logging.INFO, "fastsrgan"):
        cohort.evaluate_items("x", items)
    named = ", ".join(f"s{n}" for n in range(min(count, 5)))
    (told,) = [r.getMessage() for r in caplog.records if "no Dice" in r.getMessage()]
    assert told == f"no label was found for the segmentation of {named}{more}: no Dice"


def test_notes_that_differ_in_numbers_alone_are_one_with_the_range_of_each():
    """Was a line for each subject; numbers of names and paths are no values, and say that the notes are others."""
    said = "scored on the overlap, {} % of {} voxels, {} mm (sub-01_T1w, a/3/x 5.nii)"
    values = [("71.4", 9, "-1e-05"), ("8", 10, "0.5"), ("65.25", 9, "0")]
    rows = [{"subject": f"s{n}", "notes": [said.format(*v)]} for n, v in enumerate(values * 7)]
    rows += [{"subject": "x", "notes": ["T1 3 a", "T2 3 a"]}, {"subject": "y", "notes": ["T1 3 a", "T1 4 b"]}]
    assert cohort.told_once(rows) == [
        "s0, s1, s2, s3, s4 and 16 more: " + said.format("8 to 71.4", "9 to 10", "-1e-05 to 0.5"),
        "x, y: T1 3 a", "x: T2 3 a", "y: T1 4 b",
    ]  # fmt: skip
    assert all(row["notes"] == [said.format(*v)] for row, v in zip(rows, values * 7, strict=False))  # its own


# --- two results ------------------------------------------------------------------------------------------------------


def test_a_comparison_tells_who_is_missing_where_and_what_its_test_can_show(monkeypatch, tmp_path):
    """Figures are those that every subject has in both; p can be below 0.05 from six subjects on."""
    seen = []

    def folders(folder, truth, **more):
        seen.append((folder, truth, more))
        first = str(folder) == "one"
        names = [f"s{n}" for n in range(count + 1)][: None if first else -1] + ["x"] * (not first)
        rows = [{"subject": s, "notes": [], "image": {"whole": {"mae": 1.0 + n * (not first), "ssim": 0.5}},
                 "gain": {"image": {"whole": {"mae": 9.0}}}} for n, s in enumerate(names)]  # fmt: skip
        del rows[1]["image"]["whole"]["ssim"]
        return {
            "rows": rows,
            "failed": [{"subject": "f", "error": "e"}] * first,
            "definitions": {},
            "without_result": [],
        }

    monkeypatch.setattr(compare, "evaluate_folders", folders)
    choice = cohort.Choice(("3",))
    for count in (5, 6):
        made = compare.compare_folders("one", "two", "t", choice=choice)
        assert made["failed"] == [
            {"subject": "f", "error": "one: e"}, {"subject": f"s{count}", "error": "only in one"},
            {"subject": "x", "error": "only in two"},
        ]  # fmt: skip
        assert set(made["comparison"]) == {"image.whole.mae"} and len(made["rows"]) == count
        assert made["comparison"]["image.whole.mae"]["difference"]["n"] == count
        assert made["summary"]["first.image.whole.ssim"]["n"] == count - 1
        assert len(made["notes"]) == (count == 5) and ("0.0625" in "".join(made["notes"])) == (count == 5)
    assert [(str(f), t) for f, t, _ in seen[:2]] == [("one", "t"), ("two", "t")]
    assert all(more["choice"] == choice for _, _, more in seen) and [more["beside"] for *_, more in seen[:2]] == [
        "one",
        "two",
    ]
    with pytest.raises(UsageError, match="are one folder"):
        compare.compare_folders(tmp_path / "a", tmp_path / "b" / ".." / "a", "t")


def test_of_one_subject_there_are_no_limits_and_of_equal_figures_nothing_is_shown():
    one = compare.compared([1.0], [3.0])
    assert (one["limits"], one["p"], one["difference"]) == (None, None, {"mean": 2.0, "sd": None, "n": 1})
    same = compare.compared([1.0, 2.0], [1.0, 2.0])
    assert (same["p"], same["limits"]) == (1.0, [0.0, 0.0])


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def blobs() -> dict[str, Volume]:
    some = np.random.default_rng(0)
    hr = (100 + 30 * some.random((14, 16, 12))).astype(np.float32)
    sr = (hr + some.normal(0, 3, hr.shape)).astype(np.float32)
    arrays = {"sr": sr, "hr": hr, "seg": (sr > 115).astype(np.uint8), "label": (hr > 115).astype(np.uint8)}
    return {name: Volume(data, np.eye(4)) for name, data in arrays.items()}


def test_warnings_of_each_image_are_noted_under_its_name_once(blobs, caplog):
    warned = {name: replace(volume, warnings=(f"odd {name}",)) for name, volume in blobs.items()}
    with caplog.at_level(logging.INFO, "fastsrgan"):
        made = pair.evaluate_pair(**warned, baseline=warned["hr"], subject="me")
    assert made["notes"][:5] == [
        "reference: odd hr", "SR: odd sr", "baseline: odd hr", "segmentation: odd seg", "label: odd label"
    ]  # fmt: skip
    assert [r.getMessage() for r in caplog.records] == [f"me: {note}" for note in made["notes"]]
    assert made["baselines"] == {"image": "as given"}
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastsrgan"):
        pair.evaluate_pair(**warned, subject=None)
    assert caplog.records == []


def test_images_are_cubic_between_their_voxels_a_doubt_linear_and_masks_the_nearest(blobs, monkeypatch):
    """All on the grid of the truth, each by its own name."""
    seen, exact = {}, pair.onto_grid

    def spied(volume, like, *, order, name, **more):
        assert like is blobs["hr"]
        seen.setdefault(name, []).append((order, id(volume)))
        return exact(volume, like, order=order, name=name, **more)

    judged = []
    monkeypatch.setattr(pair, "onto_grid", spied)
    monkeypatch.setattr(pair.metrics, "calibration", lambda *given: judged.append(given) or {})
    given = {name: Volume(blobs["hr"].data.copy(), np.eye(4)) for name in ("baseline", "doubt")}
    given |= {name: Volume(blobs["label"].data.copy(), np.eye(4)) for name in ("baseline_seg", "mask")}
    further = tuple(Volume(blobs["label"].data.copy(), np.eye(4)) for _ in range(2))
    pair.evaluate_pair(**blobs, **given, structures={"white": further}, subject=None)
    wanted = {"SR": (3, blobs["sr"]), "baseline": (3, given["baseline"]), "doubt": (1, given["doubt"])}
    wanted |= {"segmentation": (0, blobs["seg"]), "baseline segmentation": (0, given["baseline_seg"])}
    wanted |= {"label": (0, blobs["label"]), "mask": (0, given["mask"])}
    wanted |= {"white segmentation": (0, further[0]), "white label": (0, further[1])}
    assert seen == {name: [(order, id(volume))] for name, (order, volume) in wanted.items()}
    ((sr, hr, doubt, where, part),) = judged  # where a mask says, if there is one
    assert np.array_equal(where, given["mask"].data > 0) and part is None
    assert all(map(np.array_equal, (sr, hr, doubt), (v.data for v in (blobs["sr"], blobs["hr"], given["doubt"]))))


def test_gains_are_values_minus_the_baselines_and_none_of_the_label_alone(blobs):
    worse = Volume(blobs["sr"].data + np.float32(2), np.eye(4))
    made = pair.evaluate_pair(**blobs, baseline=worse, baseline_seg=blobs["label"], subject=None)
    assert made["gain"]["segmentation"]["dice"] == pytest.approx(made["segmentation"]["dice"] - 1)
    for name, value in made["gain"]["image"]["label"].items():
        assert value == made["image"]["label"][name] - made["baseline"]["image"]["label"][name], name
    assert not {"label_components", "label_volume_ml"} & set(made["gain"]["segmentation"])
    assert made["baselines"] == {"image": "as given", "segmentation": "as given"}
    assert list(made)[:4] == ["image", "segmentation", "baseline", "gain"]
    assert made["grid"] == {"shape": [14, 16, 12], "spacing_mm": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)), ids=str)
def test_baselines_are_those_given_else_made_of_the_scan_and_each_is_called_what_it_is(blobs, given):
    """Image and segmentation each for itself; without any there is neither baseline nor gain."""
    image, seg, scan = given
    low = Volume(blobs["hr"].data[:, :, 1::2], np.diag([1.0, 1, 2, 1]) + np.eye(4, k=1) * [[0], [0], [1], [0]])
    more = {"baseline": blobs["hr"]} if image else {}
    more |= ({"baseline_seg": blobs["label"]} if seg else {}) | ({"lr": low} if scan else {})
    made = pair.evaluate_pair(**blobs, **more, subject=None)
    expected = {"image": "as given" if image else pair.SPLINE} if image or scan else {}
    expected |= {"segmentation": "as given" if seg else pair.READER} if seg or scan else {}
    assert made.get("baselines", {}) == expected
    assert set(made.get("baseline", {})) == set(made.get("gain", {})) == set(expected)


def test_a_picture_of_errors_is_given_each_image_and_its_words(blobs, tmp_path, monkeypatch):
    """The baseline before the scan, under its own name."""
    files = {n: images.save(tmp_path / f"{n}.nii.gz", v.data, v.affine) for n, v in blobs.items()}
    low = images.save(tmp_path / "low.nii.gz", blobs["hr"].data[:, :, ::2], np.diag([1.0, 1, 2, 1]))
    other = images.save(tmp_path / "other.nii.gz", blobs["hr"].data + np.float32(1), np.eye(4))
    drawn = []
    monkeypatch.setattr(error_map, "error_map", lambda *args: drawn.append(args))
    for more in ({"lr": low}, {"lr": low, "baseline": other}, {}):
        made = pair.evaluate_files(**files, **more, png=tmp_path / "p.png", subject=None)
        path, sr, hr, third, name, (first, second) = drawn.pop()
        assert path == tmp_path / "p.png" and np.array_equal(sr.data, blobs["sr"].data)
        assert np.array_equal(hr.data, blobs["hr"].data) and f"PSNR {made['image']['whole']['psnr_db']:.2f} dB" in first
        assert name == ("spline" if more and "baseline" not in more else "baseline")
        assert (third is None) == (not more) == (second == "")
        if more:
            assert f"{made['baseline']['image']['whole']['psnr_db']:.2f} dB" in second
            assert (third.data.min() == pytest.approx(blobs["hr"].data.min() + 1)) == ("baseline" in more)
        assert set(made["files"]) == set(files) | set(more)


def test_a_map_of_structures_is_cut_down_to_the_one_that_is_scored(tmp_path):
    data = np.zeros((9, 9, 9), np.uint8)
    data[:3], data[3:6] = 3, 41
    path = images.save(tmp_path / "m.nii.gz", data, np.eye(4))
    one = pair.labels.Structure("x", frozenset({41}))
    assert np.array_equal(pair._read("seg", path, one).data, data == 41)
    with pytest.raises(InputError):
        pair._read("seg", path, None)
    single = images.save(tmp_path / "s.nii.gz", np.where(data == 3, data, 0), np.eye(4))
    assert np.array_equal(pair._read("seg", single, one).data, np.where(data == 3, 3, 0))  # a mask of any value
    assert not pair._read("seg", single, one, frozenset({3, 41})).data.any()  # a map that holds none of it
    prob = images.save(tmp_path / "p.nii.gz", np.linspace(0, 1, 729, dtype=np.float32).reshape(9, 9, 9), np.eye(4))
    assert pair._read("seg", prob, one).data.dtype.kind == "f"
    assert np.array_equal(pair._read("label", path, one).data > 0, data == 41)
    assert np.array_equal(pair._read("mask", path, one).data > 0, data > 0)


def test_the_doubt_beside_a_result_is_found_under_both_kinds_of_names(tmp_path):
    for sr, doubt in (("a_sr.nii.gz", "a_doubt.nii.gz"), ("b_desc-sr_T1w.nii.gz", "b_desc-doubt_T1w.nii.gz")):
        assert pair._beside(tmp_path / sr) is None
        (tmp_path / doubt).write_bytes(b"")
        assert pair._beside(tmp_path / sr) == tmp_path / doubt
    write_json(tmp_path / "a.json", {"outputs": {"sr": "a_sr.nii.gz"}})
    assert pair._beside(tmp_path / "a_sr.nii.gz") is None
    write_json(tmp_path / "a.json", {"outputs": {"sr": "a_sr.nii.gz", "doubt": "a_doubt.nii.gz"}})
    assert pair._beside(tmp_path / "a_sr.nii.gz") is not None


def test_what_a_region_is_is_told_and_of_an_overlap_that_it_is_one(blobs):
    whole = pair.evaluate_pair(**blobs, mask=blobs["label"], subject=None)["definitions"]
    assert {name for name in whole if name.startswith("region ")} == {"region whole", "region mask", "region label"}
    assert whole["region whole"] == REGIONS["whole"] and "error_over_doubt" not in whole
    place, shift = np.eye(4), np.eye(4)
    place[0, 3], shift[0, 3] = -1, 3
    part = pair.evaluate_pair(Volume(blobs["sr"].data, shift), Volume(blobs["hr"].data, place), subject=None)
    assert "lies in all images" in part["definitions"]["region whole"] and part["grid"]["overlap"] == 10 / 14
    assert any(
        "scored on the overlap, 71.4 % of the truth's voxels" in n and n.endswith("of SR") for n in part["notes"]
    )
    empty = pair.evaluate_pair(**blobs | {"label": Volume(0 * blobs["label"].data, np.eye(4))}, subject=None)
    assert "label" not in empty["image"] and "the label is empty on the reference's grid" in " ".join(empty["notes"])


def test_names_of_figures_and_columns_are_those_of_people():
    names = {
        "psnr_db": "PSNR, dB", "psnr_mask_db": "PSNR inside the mask, dB", "ssim_mask": "SSIM inside the mask",
        "volume_ml": "volume, mL", "other_key": "other key", "hausdorff95_mm": "95 % Hausdorff distance, mm",
    }  # fmt: skip
    assert {key: name_of(key) for key in names} == names
    assert FIGURES["psnr_db"].text(1.234, signed=True) == "+1.23 dB" and FIGURES["dice"].text(0.5) == "0.5000"
    said = captions({
        "image": {"whole": {"psnr_db": 26.958, "ssim": 0.5, "mae": 3.0}},
        "segmentation": {"dice": 0.75, "components": 3},
        "baseline": {"image": {"whole": {"psnr_db": 25.0}}, "segmentation": {"dice": 0.5}},
        "gain": {"image": {"whole": {"psnr_db": 1.958}}},
    })  # fmt: skip
    assert said == {
        "linear": "", "sr": "PSNR 26.96 dB  (+1.96 dB)\nSSIM 0.5000", "spline": "PSNR 25.00 dB",
        "seg": "Dice 0.7500\ninterpolated labels: Dice 0.5000",
    }  # fmt: skip


def test_a_volume_of_another_grid_says_how_it_was_resampled_and_what_it_misses():
    volume = Volume(np.ones((4, 4, 4), np.float32), np.diag([2.0, 2, 2, 1]))
    like = Volume(np.ones((8, 8, 10), np.float32), np.eye(4) + np.array([[0, 0, 0, -0.5]] * 3 + [[0] * 4]))
    for order, words in ((3, "cubic spline"), (0, "nearest voxel"), (1, "spline of order 1")):
        notes: list[str] = []
        made = grids.onto_grid(volume, like, order=order, name="x", notes=notes).data
        (note,) = notes
        assert note == (
            f"x: grid differs from the reference's, resampled onto it in world space ({words}); 20.0 % of the "
            "reference lies outside its field of view and was set to 0"
        )
        assert not made[:, :, 8:].any() and np.allclose(made[:, :, :8], 1, atol=1e-4)  # found: 2.5e-5
        notes.clear()
        scored = np.zeros(like.data.shape, bool)
        scored[:, :, 7:9] = True
        grids.onto_grid(volume, like, order=order, name="x", notes=notes, scored=scored)
        assert "50.0 % of the part that is scored" in notes[0]
    notes.clear()
    grids.onto_grid(volume, like, notes=notes, scored=made > 0.5)
    assert "lies outside" not in notes[0]


# --- whether a scan is like its weights -------------------------------------------------------------------------------

ADULT = MODELS["adult"].purpose
GROWN = Look(180.0, 3500.0, 0, -0.4, 1.0, 4.0, 0.0)


def block(n: int = 12) -> np.ndarray:
    seg = np.zeros((n, n, n), np.uint8)
    seg[4:8, 4:8, 4:8] = 1
    return seg


def test_reasons_come_the_worst_first_and_the_light_is_that_of_the_first():
    look = replace(GROWN, voxel_mm=ADULT.voxel_mm[1] * 1.5, lowest=-900.0)
    found = plausibility.judge(look, block(), 9375.0, ADULT, misfit=30.0)
    assert found.light == RED and found.reasons[0].startswith("intensities go down to -900, as in CT")
    assert "voxels of" in found.reasons[1] and "differs from the scan by 30 %" in found.reasons[2]
    assert found.line() == f"red: {'; '.join(found.reasons)}"
    found = plausibility.judge(replace(look, lowest=0.0), block(), 9375.0, ADULT, misfit=60.0)
    assert "differs from the scan by 60 %" in found.reasons[0] and "voxels of" in found.reasons[1]
    good = plausibility.judge(GROWN, block(), 9375.0, ADULT, within=None, misfit=25.0)
    assert (good.light, good.reasons) == (GREEN, ()) and good.checked[-1] == "fit to the scan"
    assert good.line() == f"green: as expected in {', '.join(good.checked)}; {plausibility.NO_PROOF}"
    lights = [plausibility.judge(GROWN, block(), 9375.0, ADULT, misfit=m).light for m in (25.1, 50.0, 50.1)]
    assert lights == [YELLOW, YELLOW, RED]


def test_a_mask_is_offered_where_there_is_none_and_something_is_seen():
    body = replace(GROWN, filled=5)
    for look, masked, offered, words in (
        (body, False, True, "tissue fills 5 of the 6 borders"), (body, True, False, "tissue fills 5"),
        (replace(GROWN, head_mm=0.0), False, False, "nothing is brighter than air"),
    ):  # fmt: skip
        reason = plausibility.judge(look, block(), 9375.0, ADULT, masked=masked).reasons[0]
        assert words in reason and ("--mask FILE" in reason) == offered


def test_a_head_of_another_size_is_told_which_weights_are_made_for_it():
    small = MODELS["perinatal"].purpose.head_mm
    reasons = plausibility.judge(replace(GROWN, head_mm=small[0]), block(), 9375.0, ADULT).reasons
    assert "(--weights perinatal is made for it)" in reasons[0] and f"{small[0]:.0f} mm long" in reasons[0]
    lost = plausibility.judge(replace(GROWN, head_mm=900.0), block(), 9375.0, ADULT).reasons
    assert "--weights" not in lost[0]


def test_a_segmentation_on_the_border_is_told_from_a_hundredth_of_it_on():
    seg = np.zeros((12, 12, 12), np.uint8)
    seg[2:10, 2:10, 2:10] = 1  # 512 voxels
    for count, told in ((5, False), (6, True)):
        some = seg.copy()
        some[0, 1 : 1 + count, 3] = 1
        reasons = plausibility.judge(GROWN, some, 600_000 / np.count_nonzero(some), ADULT).reasons
        assert (["on the image's border" in r for r in reasons] == [True]) == told
    assert plausibility.judge(GROWN, 0 * seg, 1.0, ADULT).reasons == ("nothing was segmented",)


def test_a_look_has_its_numbers_in_mm_and_ml_whatever_the_thickness():
    data = np.zeros((40, 50, 20), np.float32)
    data[10:30, 5:45, 4:16] = 100
    look = plausibility.measure(data, (1.0, 1.5, 4.0))
    assert (look.head_mm, look.voxel_mm, look.slice_ratio, look.lowest, look.filled) == (60.0, 1.0, 4.0, 0.0, 0)
    assert look.head_ml == pytest.approx(20 * 40 * 12 * 6 / 1000)
    mask = np.zeros(data.shape, np.uint8)
    mask[10:20, 5:15, 4:16] = 1
    masked = plausibility.measure(data, (1.0, 1.5, 4.0), mask)
    assert masked.head_mm == 48 and masked.head_ml == pytest.approx(10 * 10 * 12 * 6 / 1000)
    full = np.full(data.shape, 100, np.float32)
    full[:, :, 0] = 0
    assert plausibility.measure(full, (1.0, 1.5, 4.0)).filled == 5


# --- where pictures look ----------------------------------------------------------------------------------------------


def test_slices_are_thick_from_a_quarter_more_than_the_middle_edge_on():
    def of(*sizes: float):
        return planes.slices_of(Volume(np.zeros((4, 4, 4), np.float32), np.diag([*sizes, 1.0])))

    assert of(1, 1, 1.25) == (2, 1.25) and of(1, 1, 1.24) is None and of(1, 2, 2) is None
    assert of(1, 3, 2) == (1, 3.0) and of(4, 1, 1) == (0, 4.0)


def test_borders_of_slices_lie_half_way_between_them_within_the_ends():
    scan = Volume(
        np.zeros((5, 5, 4), np.float32), np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, -3, 9], [0, 0, 0, 1]])
    )
    assert planes.slice_edges(scan, 2, (0, 0, 0), -99, 99).tolist() == [-1.5, 1.5, 4.5, 7.5, 10.5]
    assert planes.slice_edges(scan, 2, (0, 0, 0), 1.5, 8).tolist() == [1.5, 4.5, 7.5]
    assert planes.slice_edges(scan, 2, (0, 0, 0), 8, 1.5).tolist() == [1.5, 4.5, 7.5]


def test_panels_are_in_the_order_of_their_epochs_and_those_from_one_on_are_forgotten(tmp_path):
    for epoch in (9999, 10000, 2, 10):
        planes.write_panel(tmp_path, epoch, np.array([[-1.0, 0.5], [2.0, np.nan]]))
    (tmp_path / "panels" / "other.png").write_bytes(b"")
    assert [epoch for epoch, _ in planes.find_panels(tmp_path)] == [2, 10, 9999, 10000]
    planes.cut_panels(tmp_path, 10)
    assert [epoch for epoch, _ in planes.find_panels(tmp_path)] == [2]
    from PIL import Image

    shown = np.asarray(Image.open(tmp_path / "panels" / "epoch-0002.png"))
    assert shown.shape == (800, 800) and shown[::400, ::400].tolist() == [[0, 128], [255, 0]]


def test_what_counts_is_the_first_mask_that_holds_anything_without_its_rim():
    data = np.zeros((40, 40, 40), np.float32)
    data[4:36, 4:36, 4:36] = 100
    ref = Volume(data, np.eye(4))
    mask = (data > 0).astype(np.uint8)
    empty, full = Volume(0 * mask, np.eye(4)), Volume(mask, np.eye(4))
    small = np.zeros_like(mask)
    small[10:20, 10:20, 10:20] = 1
    assert np.array_equal(planes.inside_of(ref, None, empty, Volume(small, np.eye(4)), full).data, small > 0)

    def edge(found: Volume) -> int:
        return int(np.flatnonzero(found.data[:, 20, 20])[0])

    head, masked = edge(planes.inside_of(ref, empty)), edge(planes.inside_of(ref, full))
    assert 4 + 8 <= head <= 4 + 10 and 4 + 4 <= masked <= 4 + 6
    thin = np.zeros_like(mask)
    thin[4, 4:36, 4:36] = 1
    assert np.array_equal(planes.inside_of(ref, Volume(thin, np.eye(4))).data, thin > 0)  # nothing else is there


def test_a_detail_lies_inside_the_object_though_more_changes_at_its_rim():
    data = np.zeros((40, 40, 40), np.float32)
    data[8:32, 8:32, 8:32] = 100
    a, b = Volume(data, np.eye(4)), Volume(data.copy(), np.eye(4))
    b.data[7, 7:33], b.data[20, 20, 20] = 90, 60
    axial = planes.cuts(a, (20, 20, 20))[0]
    part = planes.detail(axial, 10, 8, a, (a, b))
    assert (len(part.u), len(part.v)) == (10, 8)
    assert part.u[0] >= 8 and part.u[-1] <= 31 and part.v[0] >= 8 and part.v[-1] <= 31 and part.sample(b).min() == 60
    within = Volume((np.arange(40) > 25).astype(np.uint8)[:, None, None] * np.ones(data.shape, np.uint8), np.eye(4))
    b.data[28, 28, 20] = 99
    assert planes.detail(axial, 10, 8, a, (a, b), within).sample(b).min() == 99


def test_a_change_in_a_plane_counts_inside_the_mask_alone():
    a = Volume(np.zeros((12, 12, 12), np.float32), np.eye(4))
    b = Volume(a.data.copy(), np.eye(4))
    b.data[5, 5, 5], b.data[2, 2, 5] = 3, -10
    mask = Volume((np.arange(12) > 3).astype(np.uint8)[:, None, None] * np.ones((12, 12, 12), np.uint8), np.eye(4))
    box = Volume(np.full((12, 12, 12), 9, np.float32), np.eye(4))
    axial = planes.cuts(box, (5, 5, 5))[0]
    assert planes.change_in(axial, (a, b), mask) == 9 and planes.change_in(axial, (a, b)) == 109
    assert planes.change_in(planes.cuts(box, (5, 5, 6))[0], (a, b)) == 0


def test_columns_of_a_result_have_their_voxel_sizes_or_the_words_that_are_given():
    one = Volume(np.ones((4, 4, 4), np.float32), np.diag([0.5, 0.75, 3.0, 1]))
    columns = figure.result_columns(dict.fromkeys(figure.TITLES, one), {"sr": "good", "truth": ""})
    size = "0.5 × 0.75 × 3 mm"
    assert [(c.title, c.caption) for c in columns] == [
        ("Low resolution", f"{size}\nvoxels as acquired"), ("Cubic spline", ""), ("Best linear", ""),
        ("fastsrgan", "good"), ("Truth", size), ("Segmentation", ""),
    ]  # fmt: skip
    assert [c.nearest for c in columns] == [True, *[False] * 5] and [c.outlines for c in columns] == [False] * 5 + [
        True
    ]
    assert [c.accent for c in columns] == [False, False, False, True, False, True]
    other = Volume(one.data, np.eye(4))
    options = figure.result_options({"sr": one, "truth": other, "low": other})
    assert options["reference"] is other and options["changed"] is None and options["scan"] is other
    assert figure.result_options({"sr": one, "spline": other}) == {
        "reference": one, "masks": (None, None), "changed": (one, other), "scan": None
    }  # fmt: skip


def test_a_picture_says_its_convention_and_that_it_goes_through_the_largest_change():
    data = np.random.default_rng(0).random((24, 24, 24)).astype(np.float32) + 1
    sr, spline = Volume(data, np.eye(4)), Volume(data.copy(), np.eye(4))
    spline.data[12, 12, 12] += 5
    whole = Volume(np.ones(data.shape, np.uint8), np.eye(4))
    more = {"reference": sr, "width_px": 200, "masks": (whole, None)}
    told = []
    for options in (
        {"changed": (sr, spline)},
        {"changed": (sr, spline), "at_mm": (1, 2, 3)},
        {"convention": "neurological"},
    ):
        drawn = figure.planes([figure.Column(sr, "x")], **more, footer="f", **options)
        told.append(next(t.get_text() for t in drawn.texts if t.get_text().startswith("f · ")))
    side = "radiological: patient's left on the right"
    assert told == [
        f"f · planes through the largest change · {side}", f"f · {side}",
        "f · neurological: patient's left on the left",
    ]  # fmt: skip


def test_the_frame_of_the_detail_is_where_more_changes_and_letters_stand_at_the_first_column():
    data = np.random.default_rng(0).random((24, 24, 24)).astype(np.float32) + 1
    sr, spline = Volume(data, np.eye(4)), Volume(data.copy(), np.eye(4))
    spline.data[12, 4:20, 12] += 5  # along front to back: seen whole in the axial and the sagittal plane
    spline.data[12, 12, 6:18] += 5  # and head to foot: both in the sagittal one
    whole = Volume(np.ones(data.shape, np.uint8), np.eye(4))
    columns = [figure.Column(sr, "x"), figure.Column(sr, "y", nearest=True)]
    drawn = figure.planes(columns, reference=sr, width_px=300, changed=(sr, spline), masks=(whole, None))
    axes = drawn.axes
    assert [len(a.patches) for a in axes] == [0, 0, 1, 0] * 2 and [len(a.texts) for a in axes] == [2, 2, 2, 0] + [0] * 4
    assert [a.images[0].get_interpolation() for a in axes] == ["bicubic"] * 4 + ["nearest"] * 4
    assert {a.images[0].get_clim() for a in axes} == {(0, planes.brightness(sr))}
    frame, detail = axes[2].patches[0], axes[3].images[0].get_extent()
    corner = frame.get_x(), frame.get_x() + frame.get_width(), frame.get_y(), frame.get_y() + frame.get_height()
    assert corner == pytest.approx(detail)


def test_the_detail_of_a_picture_is_where_more_changes_inside_the_mask():
    data = np.random.default_rng(0).random((24, 24, 24)).astype(np.float32) + 1
    sr, spline = Volume(data, np.eye(4)), Volume(data.copy(), np.eye(4))
    spline.data[12, 12, 6:18] += 2
    spline.data[12, 6:18, 12] += 2  # both in the sagittal plane
    spline.data[12, 2:4, 2:4] += 500
    mask = Volume(np.zeros(data.shape, np.uint8), np.eye(4))
    mask.data[6:18, 6:18, 6:18] = 1
    more = {"changed": (sr, spline), "masks": (mask, None), "at_mm": (12, 12, 12), "width_px": 300}
    axes = figure.planes([figure.Column(sr, "x")], reference=sr, **more).axes
    left, right, bottom, top = axes[3].images[0].get_extent()
    assert len(axes[2].patches) == 1 and left < 12 < right and bottom < 12 < top


def test_text_is_as_large_as_its_line_allows():
    below = figure._Below.of("", "", None, 0)
    page = figure._Page(planes.cuts(Volume(np.ones((9, 9, 9), np.float32), np.eye(4))), 9, 1, "", below, True, 1000)
    assert page._fitting(24, ["x" * 10], 1e6) == 24 and page._fitting(24, [], 10) <= 24
    assert page._fitting(24, ["x", "x" * 100], 500) == pytest.approx(500 / (0.5 * figure.LETTER * 100))


def test_a_map_of_errors_shows_both_differences_under_their_titles(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b""))[1])
    hr = Volume(np.full((12, 14, 10), 100, np.float32), np.eye(4))
    sr, base = Volume(hr.data + 2, np.eye(4)), Volume(hr.data - 7, np.eye(4))
    error_map.error_map(tmp_path / "a.png", sr, hr, base, "spline", ("of SR (-1 dB)", "of it"))
    axes = drawn[0].axes[:12]
    assert [a.get_title() for a in axes[:4]] == ["SR", "truth", "SR − truth\nof SR (−1 dB)", "spline − truth\nof it"]
    assert [a.get_ylabel() for a in axes[::4]] == ["axial", "coronal", "sagittal"]
    middle = [a.images[0].get_array()[5, 5] for a in axes]
    assert middle == [102, 100, 2, -7] * 3
    assert axes[0].images[0].get_clim() == (0, 100) and axes[2].images[0].get_clim() == (-7, 7)
    assert not any(a.get_frame_on() or len(a.get_xticks()) or len(a.get_yticks()) for a in axes)


def test_a_single_subject_has_no_limits_in_its_picture_and_empty_places_no_axes(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b""))[1])
    panels = [(name, [1.0], [3.0]) for name in "abc"]
    assert bland_altman.bland_altman(tmp_path / "b.png", panels, ("one", "two")) == tmp_path / "b.png"
    axes = drawn[0].axes
    assert [len(a.lines) for a in axes] == [2, 2, 2, 0] and [a.axison for a in axes] == [True, True, True, False]
    assert [t.get_text() for t in axes[0].texts] == ["mean +2"]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("mean of the two", "difference")
