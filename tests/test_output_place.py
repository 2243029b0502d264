"""Places for figures and pages: never an input, and of files that are there only an earlier one of the same kind."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import call, one_line
from nifti_files import HEAD, rigid, write
from report_results import make_run

from fastsrgan.cli import train
from fastsrgan.config import TrainConfig
from fastsrgan.core.files import write_json
from fastsrgan.errors import UsageError
from fastsrgan.io import output_place
from fastsrgan.io.tables import write_rows
from fastsrgan.study import run as study
from fastsrgan.study import tables
from fastsrgan.train.logs import RunLog
from fastsrgan.train.run import check_places

PHOTO = bytes.fromhex("89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55")  # a PNG's first bytes
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


@pytest.mark.fault(26)
@pytest.mark.parametrize("same", ["--csv", "--png"])
def test_two_kinds_of_figures_do_not_share_a_file(place, capsys, same):
    """The JSON took the place of the table, without a word."""
    code, out, err = call(capsys, "evaluate", *PAIR, same, "s", "--json", "./s")
    assert (code, out) == (2, "") and not Path("s").exists()
    one_line(err, "is the file of --", "a file for each")


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
    ("words", "taken"),
    [
        ([*PAIR, "--png", "p/x.png"], "x.png"),
        (["out", "truth", "--png", "p"], "x.png"),
        (["out", "other", "truth", "--png", "p"], "bland-altman.png"),
    ],
)
def test_a_picture_of_somebody_else_is_kept(place, capsys, words, taken):
    """That of ``infer --png`` has the name that ``evaluate --png`` gives its own."""
    shutil.copytree("out", "other")
    path = Path("p", taken)
    path.parent.mkdir()
    for foreign in (PHOTO, b"my notes"):
        path.write_bytes(foreign)
        before = contents(place)
        code, _, err = call(capsys, "evaluate", *words)
        assert code == 2
        one_line(err, f"error: {path}: {OTHER}")
        assert contents(place) == before
    path.unlink()
    assert [call(capsys, "evaluate", *words)[0] for _ in range(2)] == [0, 0]  # what it made it replaces
    assert path.read_bytes()[:4] == PHOTO[:4]


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


@pytest.mark.fault(26)
def test_a_study_replaces_its_own_files_only(tmp_path, capsys):
    """The table, page, JSON and pictures of a study; a foreign file in the place of any of them is kept."""
    run, out = make_run(tmp_path / "run", updates=3), tmp_path / "st"
    words = ("study", "curves", run, "-o", out)
    assert call(capsys, *words)[0] == 0
    for path in out.glob("curves.*"):
        made = path.read_bytes()
        for foreign in (b"name,age\nmine,7\n", *({".png": [PHOTO], ".svg": [b"<svg/>"]}.get(path.suffix, []))):
            path.write_bytes(foreign)
            before = contents(tmp_path)
            code, _, err = call(capsys, *words)
            assert code == 2
            one_line(err, f"error: {path}: {OTHER}")
            assert contents(tmp_path) == before
        path.write_bytes(made)
    assert sorted(path.suffix for path in out.glob("curves.*")) == [".csv", ".json", ".md", ".png", ".svg"]
    assert call(capsys, *words)[0] == 0


def test_the_tables_of_every_study_are_told_from_others(tmp_path):
    told, table = output_place.OWN[output_place.STUDY["csv"]], tmp_path / "t.csv"
    row = {"condition": "a", "low_res": (1, 1, 3), "noise": 0.0, "model": "m", "step": 20, "n": 1, "figures": {}}
    for rows in ([], [row], [{"epoch": 1, "Dice": 0.5, "updates": 2}], [{"run": "a", "epoch": 1, "updates": 2}]):
        write_rows(table, tables.csv_rows(rows))
        assert told(table), table.read_text(encoding="utf8")
    for text in ("epoch,mine\n1,2\n", "condition,age\na,2\n", "run,km\n"):
        table.write_text(text, encoding="utf8")
        assert not told(table), text


# Options whose place is taken -> code and what is told.
TRAININGS = [
    (("-mse", "t.csv"), 2, INPUT),
    (("-dice", "link.csv"), 2, INPUT),
    (("-dice", "mine.csv"), 2, OTHER),
    (("-mse", "d.csv"), 2, OTHER),
    (("-dice", "truth/x.nii.gz"), 2, OTHER),
    (("-sf", "mine"), 2, OTHER),
    (("-dice", "out"), 2, "is a folder"),
    (("-dice", "mine.csv/d.csv"), 5, "is a file, a folder is needed"),
    (("-sf", "mine.csv"), 5, "is a file, a folder is needed"),
]


@pytest.mark.fault(25, 26)
@pytest.mark.parametrize(("words", "code", "told"), TRAININGS)
def test_a_training_replaces_its_own_files_only(place, capsys, monkeypatch, words, code, told):
    """-mse T.csv made an end of the training table; all is told before the table is converted."""
    monkeypatch.setattr(train, "convert_table", lambda *_: pytest.fail("a table was converted"))
    Path("link.csv").hardlink_to("t.csv")
    Path("mine.csv").write_text("name,age\nmine,7\n", encoding="utf8")
    Path("d.csv").write_text(",Dice\n1,0.5\n", encoding="utf8")
    Path("mine").mkdir()
    Path("mine/SegSRGAN_epoch_2").write_text("notes", encoding="utf8")
    before = contents(place)
    found, out, err = call(capsys, "train", "t.csv", "-o", "r", "-n", 1, 1, 3, "-e", 3, *words)
    assert (found, out) == (code, "")
    named = {"mine": "mine/SegSRGAN_epoch_2", "mine.csv/d.csv": "mine.csv"}.get(words[1], words[1])
    one_line(err, f"error: {named}: {told}")
    assert contents(place) == before


@pytest.mark.fault(26)
def test_what_trainings_wrote_is_replaced(place):
    """Tables of a run and of the original, and files of weights; a snapshot of an epoch that is not run stays."""
    weights = place / "s" / "SegSRGAN_epoch_2"
    weights.parent.mkdir()
    check = partial(check_places, place / "r", TrainConfig(new_low_res=((1, 1, 3),), epochs=3))
    run = RunLog(place / "r")
    for told in ({}, {"Dice": 0.5, "MSE": 1.0}, {"Dice_label_1": 0.5, "Dice_mask0": 0.5, "MSE": 1.0}):
        run.epoch(1, told)
        check(["t.csv"], weights.parent, run.dice_file, run.mse_file, resume=False)
    run.begin(0)  # nothing is left in them
    assert run.dice_file.read_bytes() == b'""\r\n'
    weights.write_bytes(b"\x89HDF\r\n\x1a\n, and so on")
    (weights.parent / "SegSRGAN_epoch_4").write_text("notes", encoding="utf8")
    check(["t.csv"], weights.parent, run.dice_file, run.mse_file, resume=False)
    with pytest.raises(UsageError, match=INPUT):
        check(["t.csv", weights], weights.parent, None, None, resume=False)
    with pytest.raises(UsageError, match="table of Dice too"):
        check(["t.csv"], None, place / "both.csv", place / "s" / ".." / "both.csv", resume=False)
    (place / "r" / "config.yaml").write_text("epochs: 3\n", encoding="utf8")
    with pytest.raises(UsageError, match=INPUT):
        check(["t.csv", place / "r" / "config.yaml"], None, None, None, resume=False)
    check(["t.csv", place / "r" / "config.yaml"], None, None, None, resume=True)
    run.dice_file.write_bytes(bytes(range(256)))
    check([], None, None, None, resume=True)  # damaged in its own folder: made anew
    with pytest.raises(UsageError, match=OTHER):
        check([], None, None, None, resume=False)


def contents(folder: Path) -> dict[Path, bytes]:
    """The files below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


IMAGES = (".nii.gz", ".nii", ".hdr.gz", ".img.gz", ".hdr", ".img", ".mgh.gz", ".mgz", ".mgh", ".nrrd", ".nhdr")
HELD = (*IMAGES, ".mha", ".mhd", ".dcm", ".h5", ".hdf5", ".safetensors", ".pt", ".pth")


@pytest.mark.fault(26)
@pytest.mark.parametrize("ending", HELD)
def test_a_file_that_is_named_like_data_is_kept_even_if_it_is_empty(tmp_path, ending):
    path = tmp_path / f"a{ending.upper() if ending == '.pt' else ending}"
    path.touch()
    with pytest.raises(UsageError, match=OTHER):
        output_place.check_place(path, [], output_place.TABLE)
    path.unlink()
    assert output_place.check_place(path, [], output_place.TABLE) == path


MARK = b"\x89PNG" + bytes(50)
KINDS = {
    "TABLE": (b"kind,subject,a\n", b"subject,kind\n"),
    "FIGURES": (b'{"definitions": {}}', b'{"study": 1}'),
    "SCORED": (MARK + b"fastsrgan evaluate", MARK + b"fastsrgan study"),
    "PICTURE": (MARK + b"fastsrgan study", MARK + b"fastsrgan evaluate"),
    "PAGE": (b"<!DOCTYPE html>", b"<svg>"),
    "DICE": (b",Dice\n", b",MSE\n"),
    "MSE": (b",MSE_label\n", b",Dice\n"),
    "WEIGHTS": (b"\x89HDF\r\n\x1a\n.", b"HDF"),
    "DRAWING": (b"<?xml?><svg>fastsrgan study", b"<svg>fastsrgan evaluate"),
    "csv": (b"\n", b"\n\n"),
    "md": (b"# a\n\n![x]", b"# a\n\ntext"),
    "json": (b'{"study": 1, "provenance": {}}', b'{"study": 1}'),
    "png": (MARK + b"fastsrgan study", MARK),
    "svg": (b"<svg>fastsrgan study", b"<html>fastsrgan study"),
}


@pytest.mark.fault(26)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_replaces_its_own_and_no_other(tmp_path, kind):
    own, foreign = KINDS[kind]
    name, path = getattr(output_place, kind, output_place.STUDY.get(kind)), tmp_path / "x"
    for content in (own, b""):
        path.write_bytes(content)
        assert output_place.check_place(path, [tmp_path / "in"], name) == path
    path.write_bytes(foreign)
    with pytest.raises(UsageError, match=f"exists already and is no {name}, it is kept"):
        output_place.check_place(path, [], name)
    path.write_bytes(own)
    with pytest.raises(UsageError, match=INPUT):
        output_place.check_place(path, [tmp_path / "in", path], name)
