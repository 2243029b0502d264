"""Records name files by whole paths without `..`, which mean the same wherever the record is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import TILES, call, make_work

from fastsrgan.core.places import recorded
from fastsrgan.io import tables
from fastsrgan.model.weights import recorded_as


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture
def linked(tmp_path, monkeypatch) -> Path:
    """here/link leads to there/deep; here and there hold files of one name."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there" / "deep")
    for name in ("here", "there"):
        (tmp_path / name / "a.txt").write_text(name)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "means"),
    [
        ("a.txt", "here/a.txt"), ("./a.txt", "here/a.txt"), ("../there/a.txt", "there/a.txt"),
        ("none/../a.txt", "here/a.txt"), ("link/b.txt", "here/link/b.txt"), ("link/../a.txt", "there/a.txt"),
        ("link/../../here/./a.txt", "here/a.txt"), ("link/sub/..", "here/link"), ("..", ""),
    ],
)  # fmt: skip
def test_a_path_is_whole_without_dots_and_keeps_its_links(linked, path, means):
    """Of link/../a.txt the text alone would name another file; a link that needs no resolving keeps its name."""
    assert recorded(path) == recorded(Path(path)) == str(linked / means)
    assert not os.path.exists(path) or os.path.samefile(path, recorded(path))


def test_above_the_root_is_the_root_and_urls_are_no_paths():
    assert recorded("/../../a") == "/a" and recorded("s3://bucket/../a.zarr") == "s3://bucket/../a.zarr"
    assert recorded("sub:1/../b.nii") == str(Path.cwd() / "b.nii"), "a colon makes no URL"


def test_a_link_to_itself_is_named_and_not_followed(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert recorded(tmp_path / "loop" / "a") == str(tmp_path / "loop" / "a")


def test_a_name_that_no_file_can_have_is_a_name(tmp_path):
    """Found as a fuzzed table: a cell of a thousand letters before /.. ended in OSError."""
    assert recorded(tmp_path / ("a" * 1000) / ".." / "b") == str(tmp_path / "b")
    assert recorded(tmp_path / "a\0" / ".." / "b") == str(tmp_path / "b")
    (tmp_path / "t.csv").write_text(f"image\n{'a' * 1000}/../b.nii\n", encoding="utf8")
    assert tables.read_list(tmp_path / "t.csv") == [tmp_path / "b.nii"]


def test_a_cell_of_a_table_is_the_file_that_the_system_finds(linked):
    """The text without its dots was another file, or none."""
    (linked / "here" / "t.txt").write_text("link/../a.txt\n")
    assert tables.read_list(linked / "here" / "t.txt") == [linked / "there" / "a.txt"]


def test_models_of_the_package_are_names(linked):
    assert recorded_as("perinatal") == "perinatal" and recorded_as("../w.h5") == str(linked / "w.h5")


def test_what_commands_write_names_whole_paths(work, tmp_path, capsys, monkeypatch):
    """Input, weights and folder of a result, files of an evaluation, sources and store of a training."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    up = os.path.relpath(work, place)
    assert ".." in up
    assert call(capsys, "infer", f"{up}/scan0.nii.gz", f"{up}/scan1.nii.gz", "-o", "../out",
                "-w", f"{up}/w.safetensors", *TILES)[0] == 0  # fmt: skip
    out = tmp_path / "out"
    record = json.loads((out / "scan0.json").read_text())
    assert record["input"]["path"] == str(work / "scan0.nii.gz")
    assert record["weights"]["path"] == str(work / "w.safetensors") and "file" not in record["weights"]
    summary = json.loads((out / "infer_summary.json").read_text())
    assert summary["out_dir"] == str(out) and summary["weights"] == record["weights"]
    assert [item["input"] for item in summary["items"]] == [str(work / f"scan{n}.nii.gz") for n in (0, 1)]
    sr = f"{place}/../out/scan0_sr.nii.gz"
    assert call(capsys, "evaluate", "--sr", sr, "--hr", sr, "--json", "../scores.json")[0] == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {row["files"]["hr"] for row in scores.get("subjects", [scores])} == {str(out / "scan0_sr.nii.gz")}
    made_of = json.dumps([p.read_text() for p in (tmp_path / "out").glob("*.json")])
    assert "/../" not in made_of
