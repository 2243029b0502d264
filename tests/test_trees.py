"""What one command wrote another reads, in trees, BIDS datasets and behind links; what a walk leaves out is named."""

import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest
from report_results import make_model, make_scan, make_truth

import fastsrgan
from fastsrgan.cli.main import main
from fastsrgan.core.files import walk_files
from fastsrgan.errors import InputError, UsageError
from fastsrgan.evaluate.cohort import evaluate_folders
from fastsrgan.infer.bids import infer_bids
from fastsrgan.infer.files import infer_files
from fastsrgan.io import nifti as images
from fastsrgan.io.bids import find_bids
from fastsrgan.io.image_list import find_images
from fastsrgan.io.tables import read_list, read_table
from fastsrgan.report.cohort import page_names
from fastsrgan.report.collect import find
from fastsrgan.study.data import find_heads

PLACES = ("p1/T2", "p2/T2", "top")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A cohort of two patients whose images have one name, and an image on top, through a model."""
    folder = tmp_path_factory.mktemp("tree")
    model = make_model(folder)
    make_truth(folder, "t")
    for k, place in enumerate(PLACES):
        path = folder / "in" / f"{place}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_scan(path, edge=7 + k)
        target = folder / "truth" / path.relative_to(folder / "in").parent
        target.mkdir(parents=True, exist_ok=True)
        for end in ("", "_label"):
            (target / f"{path.name.removesuffix('.nii.gz')}{end}.nii.gz").write_bytes(
                (folder / f"t{end}.nii.gz").read_bytes()
            )
    infer_files([folder / "in"], folder / "out", model, patch=32, step=32, device="cpu")
    return folder


def test_a_report_holds_every_result_of_a_tree(tree, tmp_path):
    found = find(tree / "out")
    assert [result.stem for result in found.results] == list(PLACES)
    for result in found.results:
        sr = images.load(result.files["sr"])
        assert result.files["sr"].parent.name in (Path(result.stem).parent.name, "out") and sr.data.size
        assert {"sr", "seg", "input"} <= set(result.files)
    assert main(["report", str(tree / "out"), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    links = set(re.findall(r'href="\./([^"]+)"', page))
    assert len(links) == 3 and all((tmp_path / link).is_file() for link in links)


def test_scores_of_a_tree_find_their_results_also_when_it_was_moved(tree, tmp_path):
    scores = evaluate_folders(tree / "out", tree / "truth")
    assert [row["subject"] for row in scores["rows"]] == list(PLACES) and not scores["failed"]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    found = find(tree / "out", tmp_path / "scores.json")
    assert [r.scores["subject"] for r in found.results] == list(PLACES)
    moved = json.loads((tmp_path / "scores.json").read_text().replace(str(tree), "/elsewhere"))
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    assert [r.scores["subject"] for r in find(tree / "out", tmp_path / "moved.json").results] == list(PLACES)


def test_runs_and_stores_below_a_tree_are_no_results(tree, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")
    record = json.loads((tree / "out" / "top.json").read_text())
    (tmp_path / "run" / "top.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="holds no result"):
        find(tmp_path)


def test_a_study_takes_the_images_of_a_tree_and_leaves_results(tree, tmp_path):
    (tmp_path / "all").mkdir()
    for name in ("in", "out"):
        (tmp_path / "all" / name).symlink_to(tree / name)
    assert [head.name for head in find_heads(tree / "in")] == ["p1-T2", "p2-T2", "top"]
    assert [head.name for head in find_heads(tmp_path / "all")] == ["in-p1-T2", "in-p2-T2", "in-top"]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        find_heads(tmp_path / "none")


def test_pages_of_results_never_share_a_name():
    names = page_names(["p1/T2", "p1_T2", "p1_T2-2"], Path("report.html"))
    assert len(set(names)) == 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("bids")
    make_model(root)
    for name in ("sub-01_FLAIR", "sub-01_T1w", "sub-01_desc-preproc_T1w", "sub-01_T1map", "sub-01_UNIT1"):
        path = root / "data" / "sub-01" / "anat" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_scan(path)
    for place in ("sub-02", "sub-03/anat"):  # as archives keep them: links to whole subjects and to their folders
        target = root / "store" / place
        (target if place.endswith("anat") else target / "anat").mkdir(parents=True)
        make_scan((target if place.endswith("anat") else target / "anat") / f"{place[:6]}_PDw.nii.gz")
    (root / "data" / "sub-02").symlink_to(root / "store" / "sub-02")
    (root / "data" / "sub-03").mkdir()
    (root / "data" / "sub-03" / "anat").symlink_to(root / "store" / "sub-03" / "anat")
    return root


def test_every_contrast_of_a_dataset_is_taken_and_the_rest_named(dataset, caplog):
    with caplog.at_level(logging.INFO, "fastsrgan"):
        found = [image.path.name.removesuffix(".nii.gz") for image in find_bids(dataset / "data")]
    assert found == ["sub-01_FLAIR", "sub-01_T1w", "sub-01_UNIT1", "sub-02_PDw", "sub-03_PDw"]
    assert "2 images are not taken" in caplog.text and "sub-01_T1map.nii.gz (suffix T1map)" in caplog.text
    assert "sub-01_desc-preproc_T1w.nii.gz (--desc preproc takes it)" in caplog.text
    assert [i.path.name for i in find_bids(dataset / "data", desc="preproc")] == ["sub-01_desc-preproc_T1w.nii.gz"]
    with pytest.raises(InputError, match=r"no bold image; 7 are not taken"):
        find_bids(dataset / "data", suffixes=["bold"])


def test_a_report_and_scores_of_bids_derivatives(dataset, tmp_path):
    infer_bids(dataset / "data", tmp_path / "d", dataset / "model.safetensors", patch=32, step=32, device="cpu",
               suffixes=["PDw", "FLAIR"])  # fmt: skip
    found = find(tmp_path / "d")
    assert [Path(r.stem).name for r in found.results] == [
        "sub-01_desc-sr_FLAIR", "sub-02_desc-sr_PDw", "sub-03_desc-sr_PDw"
    ]  # fmt: skip
    for result in found.results:
        assert images.load(result.files["sr"]).data.shape == images.load_label(result.files["seg"]).data.shape
        assert result.record["warnings"] is not None and result.files["input"].is_file()
    sidecar = tmp_path / "d" / "sub-02" / "anat" / "sub-02_desc-sr_PDw.json"
    assert len(fastsrgan.show(sidecar, width_px=300).axes) > 3
    with pytest.raises(InputError, match="evaluate --bids"):
        evaluate_folders(tmp_path / "d", dataset / "data")


# --- links and lists ----------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path):
    for n in (1, 2):
        (tmp_path / "real" / f"s{n}").mkdir(parents=True)
        make_scan(tmp_path / "real" / f"s{n}" / "T1.nii.gz")
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "s1").symlink_to(tmp_path / "real" / "s1")
    (flat / "s2").symlink_to(tmp_path / "real" / "s2")
    (flat / "round").symlink_to(flat)
    return flat


def test_linked_folders_are_followed_each_once(linked, tmp_path):
    assert [i.name for i in find_images([linked], tmp_path / "o")] == ["s1/T1", "s2/T1"]
    assert [p.relative_to(linked).as_posix() for p in walk_files(linked)] == ["s1/T1.nii.gz", "s2/T1.nii.gz"]


def test_a_folder_that_cannot_be_listed_is_an_error(linked, tmp_path, monkeypatch):
    scan = os.scandir

    def locked(path):
        if os.fspath(path).endswith("s2"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(InputError, match=r"s2: cannot be listed: Permission denied"):
        find_images([linked], tmp_path / "o")


def test_what_is_no_image_is_named(linked, tmp_path, caplog):
    (linked / "gone").symlink_to(tmp_path / "nowhere")
    (linked / "notes.docx").write_text("x")
    (linked / "s1" / "x.dcm").write_text("x")
    with caplog.at_level(logging.INFO, "fastsrgan"):
        find_images([linked], tmp_path / "o")
    assert "1 link leads nowhere: gone" in caplog.text
    assert "2 other files are left out: notes.docx, s1/x.dcm" in caplog.text


def test_a_dead_link_to_an_image_is_an_item_that_says_so(linked, tmp_path):
    (linked / "lost.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    assert "lost" in [i.name for i in find_images([linked], tmp_path / "o")]
    with pytest.raises(InputError, match=r"is a link to .*nowhere.nii.gz, where nothing is"):
        images.load(linked / "lost.nii.gz")


def test_pointers_of_annex_and_lfs_say_how_to_fetch(tmp_path):
    (tmp_path / "a.nii.gz").symlink_to("../.git/annex/objects/Xx/SHA256E-s1--0/SHA256E-s1--0.nii.gz")
    (tmp_path / "b.nii.gz").write_text("/annex/objects/SHA256E-s1234--0123.nii.gz\n")
    (tmp_path / "c.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    for name, way in (("a", "git annex get"), ("b", "git annex get"), ("c", "git lfs pull")):
        with pytest.raises(InputError, match=r"its content was not fetched") as error:
            images.load(tmp_path / f"{name}.nii.gz")
        assert way in error.value.hint
    (tmp_path / "t.csv").write_text("HR_image,Label_image,Base\na.nii.gz,a.nii.gz,Train\n")
    with pytest.raises(InputError, match=r"HR_image a\.nii\.gz: its content was not fetched"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "text",
    (
        ",path\n0,a.nii.gz\n1,b.nii.gz\n",
        "subject,path\ns1,a.nii.gz\ns2,b.nii.gz\n",
        "id;age;Image\n1;30;a.nii.gz\n2;31;b.nii.gz\n",
        ",0\n0,a.nii.gz\n1,b.nii.gz\n",
        "path\na.nii.gz\nb.nii.gz\n",
        "a.nii.gz,image\nb.nii.gz,image\n",
        "age,sex,T1\n30,f,a.nii.gz\n31,m,b.nii.gz\n",
        "participant_id;scan\nsub-1;a.nii.gz\nsub-2;b.nii.gz\n",
        "a.nii.gz\nb.nii.gz\n",
    ),
)
def test_the_column_of_images_is_found(tmp_path, text):
    (tmp_path / "l.csv").write_text(text)
    found = read_list(tmp_path / "l.csv")
    assert [p.name for p in found] == ["a.nii.gz", "b.nii.gz"]


def test_the_home_folder_is_known_in_lists_and_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "l.txt").write_text("~/data/a.nii.gz\n")
    assert read_list(tmp_path / "l.txt") == [tmp_path / "data" / "a.nii.gz"]


def test_two_images_of_one_name_are_told_with_their_paths(tmp_path):
    for n in (1, 2):
        (tmp_path / f"p{n}").mkdir()
        make_scan(tmp_path / f"p{n}" / "T2.nii.gz")
    both = [tmp_path / f"p{n}" / "T2.nii.gz" for n in (1, 2)]
    with pytest.raises(UsageError) as error:
        find_images(both, tmp_path / "o")
    assert str(both[0]) in str(error.value) and str(both[1]) in str(error.value)
    assert np.array_equal(images.load(both[0]).data, images.load(both[1]).data)


def test_hidden_files_are_neither_images_nor_named(tmp_path, caplog):
    """Whatever hides them: a dot, or the dot and underscore of another system's attributes."""
    (tmp_path / "in" / "below").mkdir(parents=True)
    for name in ("a.nii.gz", ".b.nii.gz", "._a.nii.gz", "below/.c.nii"):
        make_scan(tmp_path / "in" / name)
    (tmp_path / "in" / ".notes.txt").write_text("x")
    with caplog.at_level("INFO", logger="fastsrgan"):
        assert [image.name for image in find_images(tmp_path / "in", tmp_path / "out")] == ["a"]
    assert "notes" not in caplog.text


@pytest.mark.parametrize("text", ['"{0}/a b.nii.gz"\n', "'a b.nii.gz'\n", "a b.nii.gz\n"])
def test_quotes_around_a_path_of_a_list_are_no_part_of_it(tmp_path, text):
    (tmp_path / "list.txt").write_text(text.format(tmp_path), encoding="utf8")
    assert read_list(tmp_path / "list.txt") == [tmp_path / "a b.nii.gz"]


@pytest.mark.parametrize(("written", "there"), [("u\u0308", "\u00fc"), ("\u00fc", "u\u0308")])
def test_a_letter_with_an_accent_is_one_however_it_is_spelt(tmp_path, written, there):
    """Tables of one system name files of another."""
    (tmp_path / f"{there}.nii.gz").touch()
    (tmp_path / "list.txt").write_text(f"{written}.nii.gz\n", encoding="utf8")
    assert read_list(tmp_path / "list.txt") == [tmp_path / f"{there}.nii.gz"]


def test_a_folder_goes_by_its_own_name_beside_a_link_to_it(tmp_path):
    """Results were named after the link where its name came first."""
    for name in ("b/s1", "c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "T1.nii.gz").touch()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b" / "s0").symlink_to("../c")
    again = []
    found = [p.relative_to(tmp_path).as_posix() for p in walk_files(tmp_path, again)]
    assert found == ["b/s1/T1.nii.gz", "c/T1.nii.gz"]
    assert again == [tmp_path / "a", tmp_path / "b" / "s0"]
