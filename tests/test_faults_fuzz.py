"""A few seconds of what ``make fuzz`` does for hours, and everything that it has found once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import dicom_files
import pytest
from fuzz_targets import TARGETS

from fastsrgan import any_image, config, table
from fastsrgan.errors import FastsrganError, InputError, ModelError
from tools.fuzz import run_cases

# Of each target. The first cases come always; the time box ends a slow machine's run, and with it longer ones are asked
# for.
SECONDS, FEWEST, MOST = float(os.environ.get("FASTSRGAN_FUZZ_SECONDS", "1")), 4, 24


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_end_in_success_or_one_line(tmp_path, name):
    """The cases are the same in every run."""
    until, done = time.monotonic() + SECONDS, 0
    most = 10**9 if "FASTSRGAN_FUZZ_SECONDS" in os.environ else MOST

    def numbers():
        for number in range(most):
            if number >= FEWEST and time.monotonic() > until:
                return
            yield number

    for case in run_cases(name, tmp_path, numbers(), tmp_path):
        assert not case["error"], f"tools/fuzz.py --target {name} --case {case['case']}\n{case['trace']}"
        done += 1
    assert done >= FEWEST


# --- found ---------------------------------------------------------------------------------------------------------


def test_a_field_beyond_the_limit_of_the_csv_reader_is_told_with_its_line(tmp_path):
    """Ended in csv.Error."""
    path = tmp_path / "t.csv"
    path.write_text('HR_image,Label_image,Base\n"' + "a" * 200_000 + '",b.nii,Train\n', encoding="utf8")
    with pytest.raises(InputError, match=r"line 2: .*field larger than field limit.*quote"):
        table.read_table(path)


def test_a_path_longer_than_the_system_takes_is_no_such_file(tmp_path):
    """Ended in OSError."""
    path = tmp_path / "t.csv"
    path.write_text("HR_image,Label_image,Base\n" + "a" * 9000 + ".nii,b.nii,Train\n", encoding="utf8")
    with pytest.raises(InputError, match="no such file") as caught:
        table.read_table(path)
    assert len(str(caught.value)) < 2000


def test_a_line_end_inside_quotes_does_not_break_the_message(tmp_path):
    """Found as `table` case 18: an error of two lines."""
    path = tmp_path / "t.csv"
    path.write_text('HR_image,Label_image,Base\n"a\nb.nii",l.nii,Train\n', encoding="utf8")
    with pytest.raises(InputError, match=r"HR_image a b\.nii: no such file") as caught:
        table.read_table(path)
    assert "\n" not in str(caught.value)


def test_a_dicom_transfer_syntax_that_is_none(tmp_path):
    """Found as `dicom` case 57: ended in ValueError."""
    syntax = b"1.2.840.10008.1.2.1\0"
    for path in dicom_files.write_series(tmp_path, dicom_files.volume((5, 4, 3)), dicom_files.scanner_affine()):
        raw = path.read_bytes()
        assert raw.count(syntax) == 1
        path.write_bytes(raw.replace(syntax, b"1.2.840.10008.9.9.9\0"))
    with pytest.raises(FastsrganError) as caught:
        any_image.load_any(tmp_path)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_thousands_of_faults_stay_a_message_that_can_be_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("HR_image,Label_image,Base\n" + "a.nii,b.nii,Trian\n" * 5000, encoding="utf8")
    with pytest.raises(InputError, match=r"\d{5} faults: line 2: .* and \d{5} more") as caught:
        table.read_table(path)
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    "text",
    [
        "epochs: 2024-13-41",
        "- [" * 3000,
        "preset: [paper]",
        "new_low_res: {1: 2}",
        "new_low_res: [[1, 1, .inf]]",
        "noise: .nan",
        "lr_gen: 1" + "0" * 400,
        "epochs: 0x" + "f" * 9000,
        "? [1, 2]\n: 3",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    ],
)
def test_settings_that_no_yaml_reader_expects(tmp_path, text):
    """Ended in ValueError, RecursionError, TypeError, KeyError or OverflowError, or were taken."""
    path: Path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf8")
    with pytest.raises(ModelError) as caught:
        config.from_yaml(path)
    assert isinstance(caught.value, FastsrganError) and len(str(caught.value)) < 600


def test_numbers_with_an_exponent_and_no_point_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("new_low_res: [1, 1, 3]\nlr_gen: 1e-4\nlr_dis: 5E-5\n", encoding="utf8")
    read = config.from_yaml(tmp_path / "c.yaml")
    assert (read.lr_gen, read.lr_dis) == (1e-4, 5e-5)
