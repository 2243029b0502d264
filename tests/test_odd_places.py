"""Paths, files and surroundings that nobody means: each ends in the one line, none hangs."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import dicom_files
import pytest
from commands import TILES, call, make_work, one_line

from fastsrgan import config
from fastsrgan.cli import main as cli
from fastsrgan.core import files as core_files
from fastsrgan.core.files import FolderLock, output_file, output_folder
from fastsrgan.errors import FastsrganError, InputError, ResourceError, UsageError
from fastsrgan.io import dicom_header, labels, tables
from fastsrgan.io import nifti as images
from fastsrgan.store.files import Keys
from fastsrgan.store.reader import open_store

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


def infer(work: Path, out: Path, *images: object) -> tuple[object, ...]:
    return ("infer", *images, "-o", out, "-w", work / "w.safetensors", *TILES)


PIPES = {
    "image": (3, "a.nii.gz", lambda work, pipe, out: infer(work, out, pipe)),
    "folder": (3, "in/a.nii.gz", lambda work, pipe, out: infer(work, out, pipe.parent)),
    "DICOM": (3, "a.dcm", lambda work, pipe, out: infer(work, out, pipe)),
    "list": (3, "a.txt", lambda work, pipe, out: infer(work, out, pipe)),
    "mask": (3, "a.nii.gz", lambda work, pipe, out: (*infer(work, out, work / "scan0.nii.gz"), "--mask", pipe)),
    "weights": (4, "w.h5", lambda work, pipe, out: ("infer", work / "scan0.nii.gz", "-o", out, "-w", pipe)),
    "table": (3, "a.csv", lambda work, pipe, out: ("convert", pipe, out)),
    "settings": (4, "c.yaml", lambda work, pipe, out: ("train", work / "cohort.zarr", "-o", out, "--config", pipe)),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", PIPES)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(work, tmp_path, capsys, kind):
    """Waited for a writer, for ever."""
    code, name, words = PIPES[kind]
    pipe = tmp_path / name
    pipe.parent.mkdir(exist_ok=True)
    os.mkfifo(pipe)
    found, _, told = call(capsys, *words(work, pipe, tmp_path / "out"))
    assert found == code
    one_line(told, str(pipe), "is not a regular file")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["manifest.json", "sub-0/image/c/0/0/0"])
def test_a_pipe_in_a_store_is_a_missing_file(work, tmp_path, capsys, name):
    store = tmp_path / "s.zarr"
    shutil.copytree(work / "cohort.zarr", store)
    (store / name).unlink()
    os.mkfifo(store / name)
    assert call(capsys, "verify", store)[0] == 3
    if "image" in name:
        opened = open_store(store, "zarr")
        for read in (lambda: opened.read("sub-0"), lambda: opened.read_region("sub-0", "image", (slice(0, 2),) * 3)):
            with pytest.raises(InputError, match="missing"):
                read()


def test_a_link_to_itself_is_no_image(work, tmp_path, capsys):
    """Was an internal error: RuntimeError of pathlib."""
    loop = tmp_path / "loop.nii.gz"
    loop.symlink_to(loop)
    code, _, told = call(capsys, *infer(work, tmp_path / "out", loop))
    assert code == 3
    one_line(told, str(loop), "symbolic links")


def test_an_empty_word_is_a_variable_that_is_not_set(work, tmp_path, capsys, monkeypatch):
    """``-o "$OUT"`` wrote into the current folder."""
    monkeypatch.chdir(tmp_path)
    code, _, told = call(capsys, *infer(work, Path("x"), work / "scan0.nii.gz"), "--mask", "")
    assert code == 2
    one_line(told, "empty word", "variable")
    assert list(tmp_path.iterdir()) == []


def test_bytes_in_a_name_that_are_no_text_reach_the_picture(work, tmp_path, capsysbinary):
    """Was an internal error: TypeError of matplotlib."""
    name = b"\xff\xfe.nii.gz".decode("utf8", "surrogateescape")
    try:
        shutil.copyfile(work / "scan0.nii.gz", tmp_path / name)
    except OSError:
        pytest.skip("this disk takes text for names only")
    code, out, told = call(capsysbinary, *infer(work, tmp_path / "out", tmp_path / name), "--png")
    assert code == 0 and b"\xff\xfe_sr.nii.gz" in out, told


@pytest.mark.parametrize(
    ("name", "shown"), [("a\nb", "a\\nb"), ("a\rb", "a\\rb"), ("a  b", "a  b"), ("a\u2028b", "a\\u2028b")]
)
def test_a_name_stays_in_its_line_and_keeps_its_blanks(work, tmp_path, capsys, monkeypatch, name, shown):
    """A line break in a name made two lines of a warning and of a result, and another name of an error; two blanks
    became one."""
    monkeypatch.chdir(tmp_path)
    scan = f"{name}.nii.gz"
    code, _, told = call(capsys, *infer(work, Path("out"), scan))
    assert code == 3
    one_line(told, f"error: {shown}.nii.gz: no such file")
    shutil.copyfile(work / "scan0.nii.gz", scan)
    Path("cut.nii.gz").write_bytes(Path(scan).read_bytes()[:-30])
    code, out, told = call(capsys, *infer(work, Path("out"), scan, "cut.nii.gz"))
    assert code == 6 and len(out.splitlines()) == 2 and f"done    {shown}.nii.gz" in out
    assert all(line.startswith(("warning: ", "error: ")) for line in told.splitlines())
    assert f"warning: {shown}.nii.gz: " in told
    Path(scan).write_bytes(b"no image")
    code, out, told = call(capsys, *infer(work, Path("out2"), scan, "cut.nii.gz"))
    assert code == 3 and out.splitlines()[0].startswith(f"failed  {shown}.nii.gz  is not a NIfTI image")
    assert f"2 of 2 volumes failed: {shown}, cut (" in told.splitlines()[-1]


def test_a_name_of_thousands_of_letters_is_shortened_in_the_message(work, tmp_path, capsys):
    code, _, told = call(capsys, *infer(work, tmp_path / "out", "a" * 5000 + ".nii.gz"))
    assert code in (3, 5) and len(told) < 1500
    one_line(told, " ... ")


def test_a_file_in_place_of_the_output_folder_is_named_as_what_it_is(work, tmp_path, capsys):
    code, _, told = call(capsys, *infer(work, work / "c.yaml", work / "scan0.nii.gz"))
    assert code == 5
    one_line(told, "is a file, a folder is needed")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_that_cannot_be_made_is_one_line_with_a_way_out():
    with pytest.raises(ResourceError, match=r"cannot be written here \(choose another folder"):
        core_files.output_folder("/proc/x")


def test_a_run_in_the_store_that_it_is_trained_on_is_refused(work, tmp_path, capsys):
    """Wrote its snapshots among the subjects."""
    store = tmp_path / "s.zarr"
    shutil.copytree(work / "cohort.zarr", store)
    before = sorted(store.rglob("*"))
    for out in (store, store / "run"):
        code, _, told = call(capsys, "train", store, "-o", out, "--config", work / "c.yaml")
        assert code == 2
        one_line(told, "lies in the store")
    assert [p for p in sorted(store.rglob("*")) if p.name != "run"] == before


def test_warnings_of_libraries_do_not_stand_around_the_one_line(work, tmp_path, capsys):
    """pydicom wrote one for each odd value, with the value, which may name a patient."""
    for path in dicom_files.write_series(tmp_path / "s", dicom_files.volume((5, 4, 3)), dicom_files.scanner_affine()):
        raw = path.read_bytes()
        path.write_bytes(
            raw.replace(b"1.2.3.4", b"Doe^J.4").replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0")
        )
    code, _, told = call(capsys, *infer(work, tmp_path / "out", tmp_path / "s"))
    assert code == 3
    one_line(told, str(tmp_path / "s"))


def test_warnings_of_libraries_are_shown_by_debug(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_doctor", lambda *_: warnings.warn("odd value", UserWarning, stacklevel=1) or 0)
    for flags, shown in (((), False), (("--debug",), True)):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)  # pytest has taken them back since an earlier test
            assert cli.main([*flags, "doctor"]) == 0
        assert ("odd value" in capsys.readouterr().err) is shown


@pytest.mark.fault(46)
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_no_home_no_language_and_a_folder_that_cannot_be_written(work, tmp_path):
    """In a process of its own: locale C, HOME gone, in a folder where root too writes nothing."""
    words = [
        sys.executable,
        "-m",
        "fastsrgan",
        "--quiet",
        *map(str, infer(work, tmp_path / "o", work / "scan0.nii.gz")),
    ]
    surroundings = {"LC_ALL": "C", "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(words, cwd="/proc", env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "o" / "scan0_sr.nii.gz").exists()


@pytest.mark.fault(43)
@pytest.mark.parametrize("kind", ["image", "weights"])
def test_a_url_in_place_of_a_path_is_told_as_one(work, tmp_path, capsys, kind):
    """Lost a slash and was no such file."""
    url = "https://example.org/a.nii.gz"
    words = infer(work, tmp_path / "o", url) if kind == "image" else infer(work, tmp_path / "o", work / "scan0.nii.gz")
    if kind == "weights":
        words = (*words[: words.index("-w") + 1], url)
    code, _, told = call(capsys, *words)
    assert code == {"image": 3, "weights": 4}[kind]
    one_line(told, f"error: {url}: is a URL", "download")


def test_what_stands_in_place_of_a_store_is_named(work, tmp_path, capsys):
    for place, words in (
        (work / "c.yaml", "is a file"),
        (tmp_path / "none", "no such folder"),
        (tmp_path, "no fastsrgan"),
    ):
        code, _, told = call(capsys, "info", place)
        assert code == 3
        one_line(told, words, "fastsrgan convert")


def test_a_file_system_that_connects_at_once_is_one_line(capsys, monkeypatch):
    """Was "system: Name or service not known"."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("fastsrgan.store.remote.FsspecStore.from_url", refused)
    code, _, told = call(capsys, "info", "ftp://host/store")
    assert code == 5
    one_line(told, "error: ftp://host/store: cannot be opened: Name or service not known", "check the URL")


def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    """Ended in a message of MKL."""
    gone = tmp_path / "gone"
    gone.mkdir()
    program = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from fastsrgan.__main__ import main; "
    program += "raise SystemExit(main())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    one_line(done.stderr, "current folder", "cd to another one")


PLACES = {"file/e.json": 5, "none/e.json": 5, "folder": 2, "https://host/e.json": 2}


@pytest.mark.fault(25)
@pytest.mark.parametrize("place", PLACES)
def test_files_that_could_not_be_written_are_refused_before_they_are_made(work, tmp_path, capsys, monkeypatch, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    scan, results = work / "scan0.nii.gz", tmp_path / "results"
    assert call(capsys, *infer(work, results, scan))[0] == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastsrgan.evaluate.pair.evaluate_files", lambda **_: pytest.fail("it was computed first"))
    monkeypatch.setattr("fastsrgan.report.page.single_page", lambda *_, **__: pytest.fail("it was drawn first"))
    for words in (("evaluate", "--sr", scan, "--hr", scan, "--json", place), ("report", results, "-o", place)):
        code, _, told = call(capsys, *words)
        assert code == PLACES[place], told
        one_line(told, f"error: {place}: ")


def test_a_link_to_itself_is_no_dataset(tmp_path, capsys):
    """Was an internal error: RuntimeError of pathlib."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for words in (
        ("infer", "--bids", loop, "-o", tmp_path / "o"),
        ("report", loop),
        ("evaluate", "--bids", loop, loop),
    ):
        code, _, told = call(capsys, *words)
        assert code in (2, 3, 5), told
        one_line(told, str(loop))


READERS = {
    "table": tables.read_table,
    "settings": config.read_yaml,
    "sum of an image": images.sha256,
    "image": images.load,
    "names": labels.read_names,
    "slice": dicom_header.read_frames,
    "part of a store": lambda path: Keys(path.parent, True).get(path.name),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_the_system_says_of_a_file_that_it_cannot_read_is_told_in_its_words(reader, tmp_path, monkeypatch):
    """Without its number, and without the path a second time."""
    path = tmp_path / "file"
    path.write_bytes(b"a,b,c,d")
    opened = open

    def broken(name, *args, **options):
        if Path(name) == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(name))
        return opened(name, *args, **options)

    monkeypatch.setattr("builtins.open", broken)
    monkeypatch.setattr("io.open", broken)
    with pytest.raises(FastsrganError) as error:
        READERS[reader](path)
    assert f"cannot be read: {os.strerror(errno.EIO)} (" in str(error.value)
    assert str(error.value).count(str(path)) == 1 and "\n" not in str(error.value)


def test_a_home_folder_that_the_shell_left_alone_is_meant(work, tmp_path, capsys, monkeypatch):
    """``--out=~/x`` reaches the command as it is typed; no folder is ever called ~, from a call of Python neither."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for option in ("--out=~/x", "-o~/y"):
        assert call(capsys, "infer", work / "scan0.nii.gz", option, "-w", work / "w.safetensors", *TILES)[0] == 0
    assert (home / "x" / "scan0.json").exists() and (home / "y" / "scan0.json").exists()
    shutil.copy(work / "scan0.nii.gz", home / "s.nii.gz")
    assert call(capsys, "infer", "~/s.nii.gz", "-o", "z", "-w", work / "w.safetensors", *TILES)[0] == 0
    for make in (output_folder, output_file, FolderLock):
        with pytest.raises(UsageError, match="~ is not taken for a home folder here"):
            make(Path("~") / "a")
    assert [p.name for p in here.iterdir()] == ["z"]


@pytest.mark.parametrize("words", [("convert", "cohort.csv"), ("train", "cohort.csv", "-n", "1", "1", "3", "-o")])
def test_a_file_in_place_of_the_folder_that_is_made_is_called_one(work, capsys, monkeypatch, words):
    """Not "its folder is missing": the folder is there."""
    monkeypatch.chdir(work)
    before = (work / "c.yaml").read_bytes()
    code, _, told = call(capsys, *words, "c.yaml")
    one_line(told, "c.yaml: is a file, a folder is needed")
    assert code == 5 and (work / "c.yaml").read_bytes() == before
