"""Cohorts: tables whose faults are told at once, folders matched by name, mean and sd, CSV, the command itself."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
from result_pair import SHAPE, make_pair

from fastsrgan.cli.evaluate import better, plain, spread
from fastsrgan.cli.main import main
from fastsrgan.core.files import short_names, write_json
from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.evaluate import cohort as evaluate_cohort
from fastsrgan.evaluate import compare
from fastsrgan.evaluate import pair as evaluate
from fastsrgan.io import nifti as images
from fastsrgan.pictures.bland_altman import bland_altman

BESIDE = ("PSNR dB", "SSIM", "Dice", "HD95 mm", "ASSD mm")  # figures with a better: the baseline's stands beside


@pytest.fixture
def files(tmp_path):
    return make_pair(tmp_path)


def _table(path, rows, header="SR_image,HR_image,Seg_image,Label_image"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return path


def test_a_table_has_rows_and_a_summary(files, tmp_path):
    images.save(tmp_path / "sr2.nii.gz", images.load(files["sr"]).data + np.float32(2), np.eye(4))
    csv = _table(tmp_path / "t.csv", ["sr.nii.gz;hr.nii.gz;seg.nii.gz;label.nii.gz", "sr2.nii.gz;hr.nii.gz;;"])
    csv.write_text(csv.read_text("utf-8-sig").replace(",", ";"), "utf-8")
    result = evaluate_cohort.evaluate_table(csv)
    assert [row["subject"] for row in result["rows"]] == ["sr", "sr2"]
    values = [row["image"]["whole"]["psnr_db"] for row in result["rows"]]
    told = result["summary"]["image.whole.psnr_db"]
    assert told == {"mean": pytest.approx(np.mean(values)), "sd": pytest.approx(np.std(values, ddof=1)), "n": 2}
    assert result["summary"]["segmentation.dice"] == {
        "mean": result["rows"][0]["segmentation"]["dice"],
        "sd": None,
        "n": 1,
    }
    json.dumps(result, allow_nan=False)


def test_a_damaged_image_costs_its_row_only(files, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(files["sr"].read_bytes()[:500])
    csv = _table(tmp_path / "t.csv", ["bad.nii.gz,hr.nii.gz,,", "sr.nii.gz,hr.nii.gz,,"])
    result = evaluate_cohort.evaluate_table(csv)
    assert len(result["rows"]) == 1
    assert result["failed"][0]["line"] == 2
    assert "bad.nii.gz" in result["failed"][0]["error"]
    csv.write_text("SR_image,HR_image\nbad.nii.gz,hr.nii.gz\n")
    with pytest.raises(InputError, match="line 2"):
        evaluate_cohort.evaluate_table(csv)


def test_all_faults_of_a_table_are_told_at_once(files, tmp_path):
    rows = ["none.nii.gz,hr.nii.gz,,", ",hr.nii.gz,,", "sr.nii.gz,hr.nii.gz,seg.nii.gz,"]
    with pytest.raises(InputError) as caught:
        evaluate_cohort.evaluate_table(_table(tmp_path / "t.csv", rows))
    for part in ("3 faults", "line 2: SR_image none.nii.gz: no such file", "line 3: SR_image is empty", "line 4: Seg"):
        assert part in str(caught.value)


def test_files_that_a_table_names_twice_are_a_fault_and_another_label_of_them_is_not(files, tmp_path):
    rows = ["sr.nii.gz,hr.nii.gz,,", "sr.nii.gz,hr.nii.gz,seg.nii.gz,label.nii.gz", "./sr.nii.gz,hr.nii.gz,,"]
    with pytest.raises(InputError, match="line 4: the same files as at line 2, which would count twice"):
        evaluate_cohort.evaluate_table(_table(tmp_path / "t.csv", rows))
    assert len(evaluate_cohort.evaluate_table(_table(tmp_path / "t.csv", rows[:2]))["rows"]) == 2


def test_a_path_longer_than_the_system_takes_is_no_such_file(tmp_path):
    """Found by `table` of the fuzzer, ended in OSError."""
    (tmp_path / "t.csv").write_text(f"SR_image,HR_image\n{'a' * 9000}.nii,b.nii\n", encoding="utf8")
    with pytest.raises(InputError, match="no such file") as caught:
        evaluate_cohort.evaluate_table(tmp_path / "t.csv")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("SR_image,HR_image\n", "no row"),
        ("SR_imgae,HR_image\na,b\n", "no column SR_image, rename SR_imgae\\?"),
        ("a,b\n1,2\n", "found a, b"),
        ("SR_image,HR_image,SR_image\na,b,c\n", "twice"),
    ],
)
def test_headers_that_are_wrong_are_named(tmp_path, text, told):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        evaluate_cohort.evaluate_table(path)


@pytest.fixture
def folders(files, tmp_path):
    """Results of three subjects named in three ways; the truth of the last is missing."""
    out, truth = tmp_path / "out", tmp_path / "truth"
    out.mkdir(), truth.mkdir()
    volumes = {name: images.load(path).data for name, path in files.items()}
    for i, (stem, hr, label) in enumerate(
        [
            ("a", "a", "a_label"),
            ("b_lr", "b_hr", "b_gm"),
            ("sub-01_T1w", "sub-01_T1w", "sub-01_label-GM"),
            ("c", "", ""),
        ]
    ):
        images.save(out / f"{stem}_sr.nii.gz", volumes["sr"] + np.float32(i), np.eye(4))
        images.save(out / f"{stem}_seg.nii.gz", volumes["seg"].astype(np.uint8), np.eye(4))
        if hr:
            images.save(truth / f"{hr}.nii", volumes["hr"], np.eye(4))
            images.save(truth / f"{label}.nii.gz", volumes["label"].astype(np.uint8), np.eye(4))
    low = images.save(tmp_path / "b_lr.nii.gz", volumes["hr"][:, :, ::2], np.diag([1, 1, 2, 1.0]))
    write_json(out / "b_lr.json", {"input": {"path": low, "sha256": images.sha256(low)}})
    return out, truth


def test_folders_are_matched_by_stem(folders):
    out, truth = folders
    result = evaluate_cohort.evaluate_folders(out, truth)
    assert [row["subject"] for row in result["rows"]] == ["a", "b_lr", "sub-01_T1w"]
    for row, label in zip(result["rows"], ("a_label", "b_gm", "sub-01_label-GM"), strict=True):
        assert row["files"]["label"].endswith(f"{label}.nii.gz") and "dice" in row["segmentation"]
    assert [f["subject"] for f in result["failed"]] == ["c"] and "looked for c, c_hr" in result["failed"][0]["error"]
    assert ["baseline" in row for row in result["rows"]] == [False, True, False]
    pair = {k: v for k, v in result["rows"][0].items() if k != "subject"}
    assert pair == evaluate.evaluate_files(**pair["files"])


def test_trees_are_matched_by_their_folders(folders, tmp_path):
    out, truth = folders
    (out / "site" / "x").mkdir(parents=True), (truth / "site" / "x").mkdir(parents=True)
    for folder, name in ((out, "a_sr.nii.gz"), (truth, "a.nii")):
        (folder / name).rename(folder / "site" / "x" / name)
    result = evaluate_cohort.evaluate_folders(out, truth, png=tmp_path / "p")
    assert [row["subject"] for row in result["rows"]] == ["b_lr", "site/x/a", "sub-01_T1w"]
    assert (tmp_path / "p" / "site_x_a.png").exists()


def test_a_scan_that_was_changed_since_makes_no_baseline(folders, caplog):
    out, truth = folders
    said = json.loads((out / "b_lr.json").read_text())
    write_json(out / "b_lr.json", {"input": said["input"] | {"sha256": "0"}})
    result = evaluate_cohort.evaluate_folders(out, truth)
    assert not any("baseline" in row for row in result["rows"]) and "was changed since" in caplog.text


@pytest.mark.fault(15, 25)
def test_a_scan_that_may_not_be_read_makes_no_baseline_and_stops_nothing(folders, caplog, monkeypatch):
    """It ended the evaluation of all others."""
    out, truth = folders
    scan = json.loads((out / "b_lr.json").read_text())["input"]["path"]
    access, read = os.access, evaluate_cohort.images.sha256
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != scan and access(path, mode))

    def refused(path):
        if str(path) == scan:
            raise InputError(path, "cannot be read: Permission denied", "check the path and its permissions")
        return read(path)

    monkeypatch.setattr(evaluate_cohort.images, "sha256", refused)
    result = evaluate_cohort.evaluate_folders(out, truth)
    assert len(result["rows"]) == 3 and not any("baseline" in row for row in result["rows"])
    assert f"b_lr: its input {scan} may not be read, no baseline" in caplog.text


def test_folders_that_cannot_be_used_say_why(folders, tmp_path):
    out, truth = folders
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no folder"):
        evaluate_cohort.evaluate_folders(out, tmp_path / "none")
    with pytest.raises(InputError, match="holds no STEM_sr"):
        evaluate_cohort.evaluate_folders(tmp_path / "empty", truth)
    with pytest.raises(InputError, match="no truth in"):
        evaluate_cohort.evaluate_folders(out, tmp_path / "empty")


def test_classes_of_labels_that_are_not_there_are_refused(folders, tmp_path, capsys):
    results, truth = folders
    for label in truth.glob("*.nii.gz"):  # the images are .nii
        label.unlink()
    shutil.copytree(results, tmp_path / "other")
    for form in ((results, truth), (results, tmp_path / "other", truth)):
        assert main(["--quiet", "evaluate", *map(str, form), "--label-classes", "3"]) == 2
        assert "--label-classes: no label was found" in capsys.readouterr().err


def test_the_command_writes_csv_json_and_pictures_and_ends_in_6(folders, tmp_path, capsys):
    out, truth = folders
    words = [
        "evaluate",
        out,
        truth,
        "--csv",
        tmp_path / "s.csv",
        "--json",
        tmp_path / "s.json",
        "--png",
        tmp_path / "p",
    ]
    assert main(["--quiet", *map(str, words)]) == 6
    told = capsys.readouterr()
    assert "mean ± sd" in told.out and "1 not evaluated: c" in told.err
    heads = told.out.splitlines()[0]
    assert all(f"  {name}  baseline {name}  " in re.sub(" {2,}", "  ", heads) for name in BESIDE)
    assert told.out.count("the true label at the scan's resolution, interpolated: it knows the truth") == 1
    result = json.loads((tmp_path / "s.json").read_text(encoding="utf8"))
    with open(tmp_path / "s.csv", newline="", encoding="utf8") as f:
        lines = list(csv.DictReader(f))
    assert [line["kind"] for line in lines] == ["subject"] * 3 + ["mean", "sd", "n"]
    for line, row in zip(lines, result["rows"], strict=False):
        assert line["subject"] == row["subject"]
        assert float(line["image.whole.ssim"]) == row["image"]["whole"]["ssim"]
    assert float(lines[3]["segmentation.dice"]) == result["summary"]["segmentation.dice"]["mean"]
    assert lines[0]["gain.image.whole.psnr_db"] == "" != lines[1]["gain.image.whole.psnr_db"]
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["a.png", "b_lr.png", "sub-01_T1w.png"]


@pytest.mark.fault(24)
@pytest.mark.parametrize("form", ["folders", "pair", "comparison"])
def test_a_picture_that_cannot_be_written_costs_no_figures(folders, tmp_path, capsys, monkeypatch, form):
    """As on a disk that is full: they stand in their files before the first is drawn, and the error says so."""
    from fastsrgan.pictures import bland_altman, error_map

    def full(path, *rest):
        raise ResourceError(path, "no space left on the disk", "free space")

    monkeypatch.setattr(error_map, "error_map", full)
    monkeypatch.setattr(bland_altman, "bland_altman", full)
    out, truth = folders
    shutil.copytree(out, tmp_path / "other")
    image = next(out.glob("*_sr.nii.gz"))
    what = {"folders": [out, truth], "pair": ["--sr", image, "--hr", image]}.get(form, [out, tmp_path / "other", truth])
    where = ["--csv", tmp_path / "s.csv", "--json", tmp_path / "s.json", "--png", tmp_path / "p"]
    assert main(["--quiet", "evaluate", *map(str, [*what, *where])]) == 5
    told = capsys.readouterr()
    assert f"disk; the figures are kept in {tmp_path / 's.csv'} and {tmp_path / 's.json'} (free" in told.err
    assert "ssim" in told.out and "ssim" in (tmp_path / "s.csv").read_text(encoding="utf8")
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf8"))


@pytest.mark.parametrize(
    ("figure", "gain", "word"),
    [
        ("psnr_range_db", 0.3, "yes"),
        ("dice", -0.1, "no"),
        ("mae", -1, "yes"),
        ("hausdorff95_mm", 2.7, "no"),
        ("false_components", 7, "no"),
        ("components", 3, None),
        ("largest_component", 9, None),
        ("ssim", 0.0, "equal"),
        ("mse", 1e-5, "equal"),
        ("mae", -1e-9, "equal"),
        ("components", 0, None),
        ("ssim", None, None),
    ],
)
def test_a_difference_says_whether_it_is_one_for_the_better(figure, gain, word):
    """And that there is none where no digit shows it."""
    assert better(figure, gain, 30) == word


def test_figures_are_shown_without_exponents():
    assert [plain(v) for v in (0.000123456, 23.456, 296140.4, 7, None)] == ["0.0001235", "23.46", "296140", 7, None]
    assert spread({"mean": 296140.4, "sd": 2501.3}) == "296140 ± 2501"


def test_the_table_names_baseline_and_difference(files, capsys):
    words = ("--sr", files["sr"], "--hr", files["hr"], "--baseline", files["sr"])
    assert main(["--quiet", "evaluate", *map(str, words)]) == 0
    heads, _, first, *_ = capsys.readouterr().out.splitlines()
    assert heads.split() == ["where", "figure", "value", "baseline", "difference", "better"]
    value, baseline, difference, verdict = first.split()[2:]
    assert value == baseline and (difference, verdict) == ("0", "equal")
    words = (*words, "--seg", files["label"], "--label", files["label"], "--baseline-seg", files["label"])
    assert main(["--quiet", "evaluate", *map(str, words)]) == 0
    assert "knows the truth" not in capsys.readouterr().out, "a baseline that was given may not"


def test_one_pair_as_csv(files, tmp_path):
    result = evaluate.evaluate_files(files["sr"], files["hr"])
    evaluate_cohort.write_csv(tmp_path / "one.csv", result)
    header, line = (tmp_path / "one.csv").read_text().splitlines()
    assert header.startswith("kind,subject,image.whole.psnr_db") and line.startswith("subject,sr,")


def test_a_note_of_a_cohort_is_told_once_with_its_subjects(folders, caplog):
    """Was told for every subject, without its name."""
    out, truth = folders
    for stem, size in (("a", 1.01), ("b_lr", 1.03)):
        sr = images.load(out / f"{stem}_sr.nii.gz").data
        images.save(out / f"{stem}_sr.nii.gz", 9 * size * sr, np.diag([1, 1, size, 1]), overwrite=True)
    with caplog.at_level("INFO", "fastsrgan"):
        result = evaluate_cohort.evaluate_folders(out, truth)
    assert [any("grid differs" in note for note in row["notes"]) for row in result["rows"]] == [True, True, False]
    told = [r.message for r in caplog.records if "SR: grid differs" in r.message]
    assert len(told) == 1 and told[0].startswith("a, b_lr: SR: grid differs")
    assert result["notes"] == [r.message for r in caplog.records if r.message in result["notes"]]
    (line,) = [line for line in result["notes"] if "are the units the same?" in line]
    own = [note for row in result["rows"] for note in row["notes"] if "are the units the same?" in note]
    sizes = sorted((note.split("mean intensity ")[1].split(",")[0] for note in own), key=float)
    assert len(sizes) == 2 and line.startswith(f"a, b_lr: SR: mean intensity {sizes[0]} to {sizes[1]}, the ref")


@pytest.fixture
def two(tmp_path):
    """Two folders of results of six subjects and their truth; the second is better by a known amount, of one less."""
    rng = np.random.default_rng(3)
    first, second, truth = (tmp_path / name for name in ("one", "other", "truth"))
    for folder in (first, second, truth):
        folder.mkdir()
    for i in range(7):
        hr = (100 + 30 * rng.random(SHAPE)).astype(np.float32)
        label = (hr > 115).astype(np.uint8)
        noise = rng.normal(0, 2 + 0.2 * i, SHAPE).astype(np.float32)
        images.save(truth / f"s{i}.nii.gz", hr, np.eye(4))
        images.save(truth / f"s{i}_label.nii.gz", label, np.eye(4))
        for folder, scale in ((first, 1.0), (second, 0.5)):
            images.save(folder / f"s{i}_sr.nii.gz", hr + np.float32(scale) * noise, np.eye(4))
            images.save(folder / f"s{i}_seg.nii.gz", (hr + scale * noise > 115).astype(np.uint8), np.eye(4))
    (second / "s6_sr.nii.gz").unlink()
    return first, second, truth


def test_two_results_are_compared_subject_by_subject(two, tmp_path, capsys):
    from scipy.stats import wilcoxon

    words = ["evaluate", *two, "--json", tmp_path / "c.json", "--csv", tmp_path / "c.csv", "--png", tmp_path / "p"]
    assert main(["--quiet", *map(str, words)]) == 6  # s6 is in one of the two only
    told = capsys.readouterr()
    result = json.loads((tmp_path / "c.json").read_text(encoding="utf8"))
    assert result["names"] == ["one", "other"] and [r["subject"] for r in result["rows"]] == [f"s{i}" for i in range(6)]
    assert result["failed"] == [{"subject": "s6", "error": "only in one"}]
    assert "warning: s6: only in one" in told.err and "1 not evaluated: s6 (only in one)" in told.err
    alone = [evaluate_cohort.evaluate_folders(folder, two[2]) for folder in two[:2]]
    figure = "image.whole.psnr_db"
    values = np.array([[r["image"]["whole"]["psnr_db"] for r in a["rows"] if r["subject"] != "s6"] for a in alone])
    for i, row in enumerate(result["rows"]):
        assert row["figures"][f"first.{figure}"] == pytest.approx(values[0, i])
        assert row["figures"][f"difference.{figure}"] == pytest.approx(values[1, i] - values[0, i])
        # Found: 3.9e-7
        assert row["figures"][f"difference.{figure}"] == pytest.approx(20 * np.log10(2), abs=2e-6)  # half the noise
    one = result["comparison"][figure]
    apart = values[1] - values[0]
    assert one["p"] == pytest.approx(wilcoxon(apart).pvalue) == pytest.approx(2 / 2**6)
    assert one["limits"] == pytest.approx(
        [apart.mean() - 1.96 * apart.std(ddof=1), apart.mean() + 1.96 * apart.std(ddof=1)]
    )
    assert one["difference"]["n"] == 6 and "Wilcoxon" in result["test"] and result["test"] in told.out
    assert "s0" in told.out and "other" in told.out and (tmp_path / "p" / "bland-altman.png").is_file()
    with open(tmp_path / "c.csv", newline="", encoding="utf8") as f:
        lines = list(csv.DictReader(f))
    assert [line["kind"] for line in lines] == ["subject"] * 6 + ["mean", "sd", "n"]
    assert float(lines[2][f"second.{figure}"]) == pytest.approx(values[1, 2])


def test_notes_of_a_comparison_name_folder_and_subject_once_and_only_of_what_is_compared(two, capsys):
    first, second, _ = two
    for folder, stem in ((first, "s0"), (second, "s0"), (second, "s1"), (first, "s6")):
        sr = images.load(folder / f"{stem}_sr.nii.gz").data
        images.save(folder / f"{stem}_sr.nii.gz", sr, np.diag([1, 1, 1.01, 1]), overwrite=True)
    assert main(["evaluate", *map(str, two)]) == 6
    told = capsys.readouterr()
    (both, other) = [line for line in told.out.splitlines() if line.startswith("note: ") and "grid differs" in line]
    assert both.startswith("note: one: s0: SR: grid") and other.startswith("note: other: s0, s1: SR: grid")
    assert "grid differs" not in told.err
    result = compare.compare_folders(*two)
    assert [note for note in result["notes"] if "s6" in note] == []


def test_limits_of_agreement_are_the_mean_and_twice_the_sample_deviation_of_unequal_differences():
    """Second minus first, 1.96 times the root of the squares' sum over n - 1, by hand."""
    told = compare.compared([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 4.0, 9.0])  # 1, 2, 1 and 5 apart
    sd = ((1.25**2 + 0.25**2 + 1.25**2 + 2.75**2) / 3) ** 0.5
    assert told["limits"] == pytest.approx([2.25 - 1.96 * sd, 2.25 + 1.96 * sd], rel=1e-12)  # found: 0 (rounding)
    assert told["difference"] == pytest.approx({"mean": 2.25, "sd": sd, "n": 4}, rel=1e-12)  # found: 0 (rounding)
    assert compare.compared([1.0], [2.0])["limits"] is None


def test_a_test_that_cannot_show_a_difference_says_so(two):
    first, second, truth = two
    for folder in (first, second):
        for i in range(4, 7):
            (folder / f"s{i}_sr.nii.gz").unlink(missing_ok=True)
    result = compare.compare_folders(first, second, truth)
    (note,) = [n for n in result["notes"] if "smallest p" in n]
    assert note.startswith("with 4 subjects the smallest p of the test is 0.125")
    assert result["comparison"]["image.whole.mse"]["p"] == 0.125
    assert compare.compared([1, 2], [1, 2])["p"] == 1 and compare.compared([1], [2])["p"] is None
    with pytest.raises(UsageError, match="one folder"):
        compare.compare_folders(first, first, truth)


def test_results_of_one_name_are_told_apart():
    assert short_names(["a/out", "b/out"]) == ["a/out", "b/out"]
    assert short_names(["x/a", "y/b"]) == ["a", "b"] and short_names(["x/a", "x/a"]) == ["a", "a"]


def test_the_bland_altman_picture_holds_each_subjects_difference(monkeypatch, tmp_path):
    """Points, lines and titles of every panel, taken from the figure that is written."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b""))[1])
    panels = [("PSNR, dB", [30.0, 31, 33], [31.0, 31.5, 35]), ("Dice", [0.5, 0.6, 0.7], [0.4, 0.6, 0.65])]
    bland_altman(tmp_path / "b.png", panels, ("one", "other"))
    (figure,) = drawn
    assert figure.get_suptitle() == "other minus one"
    for axes, (heading, first, second) in zip(figure.axes, panels, strict=True):
        a, b = np.array(first), np.array(second)
        np.testing.assert_allclose(axes.collections[0].get_offsets(), np.stack([(a + b) / 2, b - a], 1))
        assert axes.get_title() == heading
        heights = [line.get_ydata()[0] for line in axes.lines]
        mean, sd = (b - a).mean(), (b - a).std(ddof=1)
        assert heights == pytest.approx([0, mean, mean + 1.96 * sd, mean - 1.96 * sd])
        assert [t.get_text().split()[0] for t in axes.texts] == ["mean", "+1.96", "−1.96"]
        assert "-" not in "".join(t.get_text() for t in axes.texts)  # one kind of minus, that of the axes


def test_words_and_numbers_of_a_bland_altman_picture_do_not_lie_on_one_another(monkeypatch, tmp_path):
    """Of two results whose segmentations are the same, and of figures that differ in the fifth digit."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b""))[1])
    close = [0.96721, 0.96755]
    bland_altman(tmp_path / "b.png", [("SSIM", close, [0.9704, 0.9703]), ("Dice", close, close)], ("one", "other"))
    (figure,) = drawn
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        shown = [t for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
        boxes = [t.get_window_extent() for t in shown]
        assert len(boxes) > 1 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert [t.get_text() for t in figure.axes[1].texts] == ["mean ± 1.96 sd\n+0 ± 0"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "two or three folders"),
        (["one"], "1 folder "),
        (["a", "b", "c", "d"], "4 folders"),
        (["a", "b", "c", "--bids"], "two folders are needed"),
        (["--sr", "a.nii"], "--sr and --hr"),
        (["a", "b", "--table", "t.csv"], "two or three folders"),
        (["a", "b", "--label", "l.nii", "--mask", "m.nii"], "--label, --mask: of a pair, and folders are given"),
        (["--table", "t.csv", "--sr", "a.nii"], "--sr: of a pair, and a table is given"),
        (["--bids", "--table", "t.csv"], "two folders are needed"),
    ],
)
def test_forms_that_exclude_each_other_are_told(words, told, capsys):
    assert main(["--quiet", "evaluate", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_place_for_the_figures_that_is_not_there_is_told_before_the_table_is_read(capsys):
    assert main(["--quiet", "evaluate", "--table", "t.csv", "--csv", "no/where.csv"]) == 5
    assert "no/where.csv: its folder is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "row", "told"),
    [
        (
            "SR_image,HR_image,seg_image,Label_image",
            "sr,hr,seg,label",
            "column seg_image is not read, rename it Seg_image",
        ),
        ("SR_image,HR_image,Label_image,Label_classes", "sr,hr,label,3,42", "line 2: 5 fields under 4 columns"),
    ],
)
def test_no_column_and_no_cell_of_a_table_is_lost(tmp_path, header, row, told):
    """Segmentations in a column that was nearly named, and the second of two values, were dropped without a word."""
    (tmp_path / "t.csv").write_text(f"{header}\n{row}\n", encoding="utf8")
    with pytest.raises(InputError, match=told):
        evaluate_cohort.evaluate_table(tmp_path / "t.csv")


def test_a_segmentation_for_which_no_label_is_found_is_told(folders, caplog):
    """Its Dice was missing without a word."""
    out, truth = folders
    (truth / "a_label.nii.gz").rename(truth / "a_Cortex.nii.gz")
    (truth / "sub-01_T1w.nii").rename(truth / "sub-01_FLAIR.nii")
    (truth / "sub-01_label-GM.nii.gz").rename(truth / "sub-01_dseg.nii.gz")
    for kind in ("sr", "seg"):
        (out / f"sub-01_T1w_{kind}.nii.gz").rename(out / f"sub-01_FLAIR_{kind}.nii.gz")
    with caplog.at_level("INFO", logger="fastsrgan"):
        rows = evaluate_cohort.evaluate_folders(out, truth)["rows"]
    assert [row["subject"] for row in rows if "segmentation" in row] == ["b_lr", "sub-01_FLAIR"]
    assert "no label was found for the segmentation of a: no Dice" in caplog.text


def test_truths_without_a_result_are_told(folders, caplog, capsys):
    """A cohort of which some results are missing had the mean of the others, and nobody was told."""
    out, truth = folders
    assert evaluate_cohort.evaluate_folders(out, truth)["without_result"] == []
    hr = images.load(truth / "a.nii").data
    (truth / "x").mkdir()
    for name in ("d_hr.nii.gz", "d_label.nii.gz", "x/e.nii", "d_mask.nii", ".f.nii", "sub-02_label-GM.nii"):
        images.save(truth / name, hr, np.eye(4))
    (truth / "notes.txt").write_text("none")
    with caplog.at_level("INFO", "fastsrgan"):
        result = evaluate_cohort.evaluate_folders(out, truth)
    assert result["without_result"] == ["d_hr.nii.gz", "x/e.nii"]
    (note,) = [note for note in result["notes"] if "without a result" in note]
    assert note == f"2 images of {truth} without a result: d_hr.nii.gz, x/e.nii" and note in caplog.messages
    shutil.copytree(out, truth / "out")  # results below the truths are none of them
    assert evaluate_cohort.evaluate_folders(truth / "out", truth)["without_result"] == result["without_result"]


def test_a_comparison_tells_the_truths_that_neither_has_a_result_of(two):
    first, second, truth = two
    assert not [note for note in compare.compare_folders(*two)["notes"] if "without a result" in note]
    (first / "s5_sr.nii.gz").unlink(), (second / "s5_sr.nii.gz").unlink()
    notes = compare.compare_folders(*two)["notes"]
    assert f"1 image of {truth} without a result: s5.nii.gz" in notes


def test_a_truth_that_several_results_share_is_told(tmp_path, caplog):
    """Of two subjects whose images are called alike, both were scored against one's truth without a word."""
    for place in ("out/a/t2_sr", "out/b/t2_sr", "flat/t2", "deep/a/t2", "deep/b/t2"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        images.save(tmp_path / f"{place}.nii.gz", np.random.default_rng(len(place)).random((9, 9, 9)), np.eye(4))
    told = "flat/t2.nii.gz is the truth of 2 results: a/t2, b/t2; if they are of other images"
    result = evaluate_cohort.evaluate_folders(tmp_path / "out", tmp_path / "flat")
    assert told in result["notes"][-1] and told in caplog.text and len(result["rows"]) == 2
    caplog.clear()
    result = evaluate_cohort.evaluate_folders(tmp_path / "out", tmp_path / "deep")
    assert not any("is the truth of" in line for line in [*result["notes"], *caplog.messages])
