"""Signals, terminals, memory, devices, no network, odd places: the commands in processes of their own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import SETTINGS, TILES, Command, call, command, litter, make_work, one_line
from damage import bomb, claims_64_tib
from nifti_files import HEAD, write

from fastsrgan.io import nifti as images
from fastsrgan.store.reader import open_store


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


# --- signals, terminals, surroundings -----------------------------------------------------------------------------


def infer_words(work: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("infer", work / "scan0.nii.gz", "-o", tmp_path / "out", "-w", work / "w.safetensors", *TILES)


def two(work: Path, tmp_path: Path) -> tuple[object, ...]:
    """Two images, the first of which is written while the second is computed."""
    return ("infer", work / "scan0.nii.gz", work / "scan1.nii.gz", *infer_words(work, tmp_path)[2:])


def assert_whole_and_no_litter(out: Path) -> None:
    """No temporary file, and what has its final name is whole."""
    assert not litter(out)
    for path in out.glob("*.nii.gz"):
        images.load(path)


@pytest.mark.fault(38)
def test_ctrl_c_on_a_terminal_ends_with_130_and_nothing_half_written(work, tmp_path):
    running = Command(tmp_path / "told", *two(work, tmp_path), stdin="tty", hold="slow")
    running.wait_for()
    running.key(b"\x03")
    found = running.end()
    assert found.code == 130 and found.errors == ["error: interrupted"], found
    assert "Traceback" not in found.err
    assert_whole_and_no_litter(tmp_path / "out")


@pytest.mark.fault(38)
def test_a_second_ctrl_c_does_not_wait_for_the_cleaning_up(work, tmp_path):
    running = Command(tmp_path / "told", *two(work, tmp_path), stdin="tty", hold="stuck")
    running.wait_for()
    running.keys_until_it_ends(b"\x03")
    found = running.end()
    assert found.code == 130 and "Traceback" not in found.err, found
    assert not list((tmp_path / "out").glob("[!.]*"))  # nothing under its final name


@pytest.mark.fault(37, 38)
def test_sigterm_ends_a_batch_job_with_143_and_nothing_half_written(work, tmp_path):
    running = Command(tmp_path / "told", *two(work, tmp_path), hold="slow")
    running.wait_for()
    running.send(signal.SIGTERM)
    found = running.end()
    assert found.code == 143 and found.errors == ["error: stopped: by SIGTERM"], found
    assert_whole_and_no_litter(tmp_path / "out")


@pytest.mark.fault(43)
def test_every_command_works_without_a_network_and_asks_for_none(work, tmp_path):
    store, run, out = tmp_path / "s.zarr", tmp_path / "run", tmp_path / "out"
    commands = (
        ("convert", work / "cohort.csv", store),
        ("verify", store),
        ("train", store, "-o", run, "--config", work / "c.yaml"),
        ("infer", work / "scan0.nii.gz", "-o", out, "-w", run, *TILES),
        ("evaluate", "--sr", out / "scan0_sr.nii.gz", "--hr", out / "scan0_sr.nii.gz"),
        ("weights", "info", run),
    )
    for i, words in enumerate(commands):
        found = command(tmp_path / f"told{i}", *words, offline=True)
        assert found.code == 0 and found.asked == [], (words, found)


@pytest.mark.fault(45)
def test_no_standard_input_no_terminal_no_colour(work, tmp_path):
    """Plain lines without control codes, whatever is missing."""
    quiet = {"NO_COLOR": "1", "COLUMNS": "80", "TERM": "dumb"}
    found = command(tmp_path / "a", *infer_words(work, tmp_path), stdin="closed", environment=quiet)
    assert found.code == 0, found
    assert "\x1b" not in found.out + found.err and "\r" not in found.out + found.err
    assert found.out.startswith("done ") and all(line.strip() for line in found.err.splitlines())
    found = command(tmp_path / "b", "infer", tmp_path / "none.nii", "-o", tmp_path / "o", stdin="closed")
    assert found.code == 3 and found.errors == [found.err.splitlines()[-1]]
    found = command(tmp_path / "c", *infer_words(work, tmp_path), "--overwrite", stdin="tty", environment=quiet)
    assert found.code == 0 and "\x1b[3" not in found.err, found  # no colours on a terminal that wants none


@pytest.mark.fault(45)
@pytest.mark.parametrize("kind", ["closed", "dead"])
def test_standard_streams_that_are_closed_or_that_nobody_reads_change_no_exit_code(work, tmp_path, kind):
    """Ended in an internal error behind the work, or at the first note before it."""
    found = command(tmp_path / "a", *infer_words(work, tmp_path), streams={2: kind})
    assert found.code == 0 and found.out.startswith("done ") and not found.err, found
    both = {1: "closed", 2: kind}
    found = command(tmp_path / "b", *infer_words(work, tmp_path), "--overwrite", streams=both)
    assert found.code == 0 and not found.out + found.err, found
    assert_whole_and_no_litter(tmp_path / "out")
    for words, code in ((("infer", tmp_path / "none.nii", "-o", tmp_path / "o"), 3), (("infer",), 2)):
        assert command(tmp_path / "c", *words, streams={2: kind}).code == code
    found = command(tmp_path / "d", "--help", streams={1: "closed"})
    assert found.code == 0 and not found.err, found


@pytest.mark.fault(24, 45)
@pytest.mark.parametrize("words", [("--help",), ("infer", "--help"), ("--version",), ("doctor",), ()])
def test_standard_output_on_a_full_disk_is_an_error_that_names_it(tmp_path, words):
    """Help and version ended with 0: argparse swallows it."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastsrgan", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    one_line(done.stderr, "standard output: No space left on device")
    assert done.returncode == 5


@pytest.mark.fault(46)
def test_paths_with_blanks_and_umlauts_and_another_clock_give_the_same_bytes(work, tmp_path, monkeypatch):
    """In a process whose locale is C and Turkish, see also test_train.py."""
    folder = tmp_path / "mit Ümlaut und blank 'quote' %s"
    folder.mkdir()
    for name in ("scan0.nii.gz", "w.safetensors"):
        shutil.copyfile(work / name, folder / name)
    here = command(tmp_path / "a", *infer_words(work, tmp_path))
    strange = {"LC_ALL": "C", "LANG": "tr_TR.UTF-8", "LANGUAGE": "tr", "TZ": "Pacific/Kiritimati"}
    words = ("infer", "scan0.nii.gz", "-o", "out put", "-w", "w.safetensors", *TILES)
    there = command(tmp_path / "b", *words, cwd=folder, environment=strange)
    assert (here.code, there.code) == (0, 0), there
    for name in ("scan0_sr.nii.gz", "scan0_seg.nii.gz"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "out put" / name).read_bytes()


@pytest.mark.fault(3, 4)
def test_lying_headers_cost_no_memory(work, tmp_path):
    """The largest resident memory of the whole command, libraries included."""
    for i, (spoil, most) in enumerate(((claims_64_tib, 1.5), (bomb, 3.5))):
        scan = tmp_path / f"lie{i}.nii.gz"
        spoil(scan)
        words = ("infer", scan, "-o", tmp_path / "out", "-w", work / "w.safetensors")
        found = command(tmp_path / f"told{i}", *words, limits={"RLIMIT_DATA": 3 << 30})
        assert found.code == 3 and 0 < found.peak < most * 2**30, found


@pytest.mark.fault(35)
def test_memory_is_planned_before_it_is_taken(work, tmp_path, capsys):
    words = ("infer", work / "scan0.nii.gz", "-o", tmp_path / "out", "-w", work / "w.safetensors")
    code, _, told = call(capsys, *words, "--max-memory", "0.1M")
    assert code == 5
    one_line(told, "this image needs", "the limit is")
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.fault(42)
def test_a_device_that_is_not_there_is_named_and_auto_says_what_it_takes(work, tmp_path, monkeypatch):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    found = command(tmp_path / "a", *infer_words(work, tmp_path), "--device", "cuda:3", environment=hidden)
    assert found.code == 5 and "fastsrgan doctor" in found.errors[-1]
    found = command(tmp_path / "b", *infer_words(work, tmp_path), environment=hidden)
    assert found.code == 0 and found.err.count("running on the CPU") == 1, found


@pytest.mark.fault(5)
def test_the_warning_of_a_conversion_reaches_the_store(tmp_path, capsys):
    data = HEAD.astype(np.float32)
    data[0, 0, 0] = np.nan
    write(tmp_path / "a.nii.gz", data)
    write(tmp_path / "l.nii.gz", (HEAD > 450).astype(np.uint8))
    (tmp_path / "t.csv").write_text("HR_image,Label_image,Base\na.nii.gz,l.nii.gz,Train\n", encoding="utf8")
    code, _, told = call(capsys, "convert", tmp_path / "t.csv", tmp_path / "s.zarr")
    assert code == 0 and "1 of 210 voxels is NaN or infinite" in told
    store = open_store(tmp_path / "s.zarr")
    assert "1 of 210 voxels" in store.subjects[0].attrs["warnings"][0]
    assert np.isfinite(store.read("a").image).all()


@pytest.mark.fault(10, 12)
def test_a_sheared_small_volume_can_be_trained_on_and_named_in_the_store(tmp_path, capsys):
    sheared = np.array([[1.0, 0.2, 0, 3], [0, 1, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
    images.save(tmp_path / "a.nii.gz", HEAD, sheared)
    images.save(tmp_path / "l.nii.gz", (HEAD > 450).astype(np.uint8), sheared)
    (tmp_path / "t.csv").write_text("HR_image,Label_image,Base\na.nii.gz,l.nii.gz,Train\n", encoding="utf8")
    assert call(capsys, "convert", tmp_path / "t.csv", tmp_path / "s.zarr")[0] == 0
    config = SETTINGS.replace(new_low_res=((1.1, 1.1, 3.5),))
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf8")
    code, _, told = call(capsys, "train", tmp_path / "s.zarr", "-o", tmp_path / "run", "--config", tmp_path / "c.yaml")
    assert code == 0, told
