"""Places for figures and pages: never an input, and of files that are there only an earlier one of the same kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import call, one_line
from nifti_files import HEAD, rigid, write
from report_results import make_run

from fastsrgan.core.files import write_json
from fastsrgan.errors import UsageError
from fastsrgan.study import run as study

INPUT, OTHER = "is an input and would be overwritten", "exists already and is no"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """``out/x_sr.nii.gz`` with its record and ``truth/x.nii.gz``, and a table of both."""
    for name in ("out", "truth"):
        (tmp_path / name).mkdir()
    write(tmp_path / "truth/x.nii.gz", HEAD, rigid((1.0, 1, 3)))
    write(tmp_path / "out/x_sr.nii.gz", np.roll(HEAD, 1, 0), rigid((1.0, 1, 3)))
    record = {"input": {"path": "truth/x.nii.gz"}, "outputs": {"sr": "out/x_sr.nii.gz"}, "weights": {}}
    write_json(tmp_path / "out/x.json", record)
    (tmp_path / "t.csv").write_text("SR_image,HR_image\nout/x_sr.nii.gz,truth/x.nii.gz\n", encoding="utf8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAIR = ("--sr", "out/x_sr.nii.gz", "--hr", "truth/x.nii.gz")
REFUSED = [
    ((*PAIR, "--csv", "truth/x.nii.gz"), INPUT),
    ((*PAIR, "--json", "out/x_sr.nii.gz"), INPUT),
    ((*PAIR, "--png", "truth/../truth/x.nii.gz"), INPUT),
    ((*PAIR, "--csv", "link.csv"), INPUT),
    ((*PAIR, "--csv", "t.csv"), OTHER),
    ((*PAIR, "--json", "out/x.json"), OTHER),
    ((*PAIR, "--png", "t.csv"), OTHER),
    ((*PAIR, "--csv", "empty.nii.gz"), OTHER),
    (("--table", "t.csv", "--csv", "t.csv"), INPUT),
    (("--table", "t.csv", "--json", "truth/x.nii.gz"), OTHER),
    (("out", "truth", "--csv", "truth/x.nii.gz"), OTHER),
]


@pytest.mark.fault(26)
@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_figures_do_not_take_the_place_of_images(place, capsys, words, told):
    """A slip of --csv put the table in the place of the scan."""
    Path("link.csv").hardlink_to("truth/x.nii.gz")
    Path("empty.nii.gz").touch()
    before = contents(place)
    code, out, err = call(capsys, "evaluate", *words)
    assert (code, out) == (2, "")
    one_line(err, f"error: {words[-1]}: {told}")
    assert contents(place) == before


def test_earlier_figures_are_replaced(place, capsys):
    words = ("evaluate", *PAIR, "--csv", "s.csv", "--json", "s.json", "--png", "s.png")
    for name in ("s.csv", "s.json", "s.png"):  # as mktemp leaves them
        Path(name).touch()
    assert call(capsys, *words)[0] == 0
    first = contents(place)
    assert all(first[Path(name)] for name in ("s.csv", "s.json", "s.png"))
    shutil.copyfile("truth/x.nii.gz", "out/x_sr.nii.gz")
    assert call(capsys, *words)[0] == 0
    assert all(contents(place)[Path(name)] != first[Path(name)] for name in ("s.csv", "s.json", "s.png"))


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("out/x_sr.nii.gz", INPUT),
        ("truth/x.nii.gz", INPUT),
        ("out/x.json", INPUT),
        ("other.nii.gz", OTHER),
        ("t.csv", OTHER),
    ],
)
def test_a_page_takes_the_place_of_a_page_only(place, capsys, target, told):
    shutil.copyfile("truth/x.nii.gz", "other.nii.gz")
    before = contents(place)
    code, out, err = call(capsys, "report", "out/x.json", "--hr", "truth/x.nii.gz", "-o", target, "--overwrite")
    assert (code, out) == (2, "")
    one_line(err, f"error: {target}: {told}")
    assert contents(place) == before


def test_a_study_does_not_take_the_place_of_its_table(tmp_path):
    run = make_run(tmp_path / "run", updates=3)
    log = (run / "log.jsonl").rename(run / "curves.json")
    before = log.read_bytes()
    with pytest.raises(UsageError, match=INPUT):
        study.run("curves", log, run)
    assert log.read_bytes() == before


def contents(folder: Path) -> dict[Path, bytes]:
    """The files below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
