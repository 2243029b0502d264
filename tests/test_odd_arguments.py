"""Every place of every command that takes a path, given everything that it is not: one clear line, no litter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from commands import call, litter, make_work

from fastsrgan.core.files import is_special

INFER = ("--patch", "16", "--step", "16")
MODEL = ("-w", "w.safetensors")
BINARY = bytes(range(256)) * 50
MADE = ("out", "new.zarr", "new_run", "new.h5", "new.safetensors", "page.html")  # by commands that could do it
THINGS = (
    *("none.nii.gz", "empty.nii.gz", "empty.csv", "empty.json", "binary", "binary.nii", "deep.json", "emptydir"),
    *("scan0.nii.gz", "cohort.csv", "cohort.zarr", "run", "res", "w.safetensors", "https://127.0.0.1:9/a.nii.gz"),
    *("zz://x", ".", "pipe", "-", "a\nb", "\x1b[31m", "x" * 300, "scan0.nii.gz/below", " "),
)
FORMS = (
    ("infer", "X", "-o", "out", *MODEL, *INFER),
    ("infer", "scan0.nii.gz", "-o", "out", "-w", "X", *INFER),
    ("infer", "scan0.nii.gz", "-o", "X", *MODEL, *INFER),
    ("infer", "scan0.nii.gz", "-o", "out", *MODEL, *INFER, "--mask", "X"),
    ("infer", "--bids", "X", "-o", "out", *MODEL),
    ("convert", "X", "new.zarr"),
    ("convert", "cohort.csv", "X"),
    ("verify", "X"),
    ("info", "X"),
    ("train", "X", "-o", "new_run", "--config", "c.yaml"),
    ("train", "cohort.zarr", "-o", "X", "--config", "c.yaml"),
    ("train", "cohort.zarr", "-o", "new_run", "--config", "X"),
    ("train", "cohort.zarr", "-o", "new_run", "--config", "c.yaml", "-w", "X"),
    ("evaluate", "--sr", "X", "--hr", "scan0.nii.gz"),
    ("evaluate", "--table", "X"),
    ("evaluate", "X", "X"),
    ("evaluate", "--sr", "scan0.nii.gz", "--hr", "scan0.nii.gz", "--json", "X"),
    ("report", "X", "-o", "page.html"),
    ("report", "res", "-o", "X"),
    ("report", "res/scan0.json", "--scores", "X", "-o", "page.html"),
    ("report", "res/scan0.json", "--hr", "X", "-o", "page.html"),
    ("weights", "info", "X"),
    ("weights", "export", "X", "new.h5"),
    ("weights", "export", "w.safetensors", "X"),
    ("study", "curves", "X", "-o", "out"),
    ("study", "steps", "X", "-o", "out", *MODEL, "--steps", "16"),
    ("job-model", "-p", "X", *MODEL, "-pf", "16", "-sf", "16", "-rf", "r"),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = make_work(tmp_path_factory.mktemp("work"))
    for name in ("empty.nii.gz", "empty.csv", "empty.json"):
        (folder / name).touch()
    for name in ("binary", "binary.nii"):
        (folder / name).write_bytes(BINARY)
    (folder / "deep.json").write_text("[" * 99_999, encoding="utf8")
    (folder / "emptydir").mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(work) -> Path:
    """With results and a run."""
    from fastsrgan.cli.main import main

    before = Path.cwd()
    os.chdir(work)
    assert main(["--quiet", "infer", "scan0.nii.gz", "-o", "res", *MODEL, *INFER]) == 0
    assert main(["--quiet", "train", "cohort.zarr", "-o", "run", "--config", "c.yaml"]) == 0
    os.chdir(before)
    return work


@pytest.mark.timeout(300)
@pytest.mark.fault(14, 16, 19, 25)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(form[:9]).replace("/", "-"))
def test_one_clear_line_whatever_is_named(finished, tmp_path, capsys, monkeypatch, form):
    place = fresh(finished, tmp_path / "work")
    monkeypatch.chdir(place)
    monkeypatch.setenv("FASTSRGAN_STORE_RETRIES", "0")
    before = standing(place)
    for thing in THINGS:
        words = [thing if word == "X" else word for word in form]
        code, _, told = call(capsys, *words)
        assert not litter(place) and is_special(place / "pipe"), words
        if code == 0:  # some of them are what is asked for
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(place)
            monkeypatch.chdir(fresh(finished, place))
            continue
        lines = [line for line in told.splitlines() if not line.startswith(("warning: ", "note: "))]
        assert code in (2, 3, 4, 5, 6), (words, told)
        assert lines and all(line.startswith("error: ") and line.endswith(")") for line in lines), (words, told)
        assert "internal" not in told and ".tmp-" not in told and "\x1b" not in told, (words, told)
        for name in MADE:
            shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink(missing_ok=True)
        assert standing(place) == before, words


def fresh(finished: Path, place: Path) -> Path:
    """A copy of the work, with a pipe in it."""
    shutil.copytree(finished, place)
    os.mkfifo(place / "pipe")
    return place


def standing(folder: Path) -> set[str]:
    """Everything in a folder and below."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
