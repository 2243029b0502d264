"""A few seconds of what ``make fuzz`` does for hours, and everything that it has found once."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import dicom_files
import fuzz_targets
import pytest
from fuzz_targets import TARGETS

from fastsrgan import config
from fastsrgan.errors import FastsrganError, InputError, ModelError
from fastsrgan.io import any_image
from fastsrgan.io import tables as table
from fastsrgan.model import checkpoint, weights
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model.networks import CriticSpec, GeneratorSpec, build_generator
from fastsrgan.store.files import Keys, read_manifest, write_manifest
from fastsrgan.store.reader import open_store
from fastsrgan.store.writer import create_store
from tools.fuzz_engines import Drawn, run_cases

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

    for case in run_cases(name, tmp_path, numbers()):
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
    path.write_text('HR_image,Label_image,Base\n"a\nb",l.nii,Train\n', encoding="utf8")
    with pytest.raises(InputError, match=r"HR_image a b: no such file") as caught:
        table.read_table(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("instead", [b"1.2.840.10008.9.9.9\0", b"1.2.840\\10008.1.2.1\0"])
def test_a_dicom_transfer_syntax_that_is_none(tmp_path, instead):
    """Found as `dicom` case 57, ended in ValueError; and two of them, found by atheris, in AttributeError."""
    syntax = b"1.2.840.10008.1.2.1\0"
    for path in dicom_files.write_series(tmp_path, dicom_files.volume((5, 4, 3)), dicom_files.scanner_affine()):
        raw = path.read_bytes()
        assert raw.count(syntax) == 1
        path.write_bytes(raw.replace(syntax, instead))
    with pytest.raises(FastsrganError) as caught:
        any_image.load_any(tmp_path)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_thousands_of_faults_stay_a_message_that_can_be_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "HR_image,Label_image,Base\n" + "".join(f"a{i}.nii,b{i}.nii,Trian\n" for i in range(5000)), encoding="utf8"
    )
    with pytest.raises(InputError, match=r"15000 faults: line 2: .* and \d{4,5} more") as caught:
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


def test_lists_within_lists_are_refused_before_they_take_time(tmp_path):
    """Found as a slow case: the reader looks far ahead at each opening bracket."""
    (tmp_path / "c.yaml").write_text("new_low_res: [[[[[[[[[1]]]]]]]]]", encoding="utf8")
    with pytest.raises(ModelError, match="more than 8 deep"):
        config.from_yaml(tmp_path / "c.yaml")


def test_a_dicom_value_of_an_unknown_kind(tmp_path):
    """Found as `dicom` case 179: ended in NotImplementedError, when the value was asked for."""
    for path in dicom_files.write_series(tmp_path, dicom_files.volume((5, 4, 3)), dicom_files.scanner_affine()):
        raw = path.read_bytes()
        assert raw.count(b"\x28\0\x02\0US") == 1
        path.write_bytes(raw.replace(b"\x28\0\x02\0US", b"\x28\0\x02\0\x55\xff"))
    with pytest.raises(InputError, match="is damaged: Unknown Value Representation"):
        any_image.load_any(tmp_path)


def test_pixels_beyond_the_frames_of_a_dicom_file_are_told(tmp_path):
    """Were dropped silently, with a warning of pydicom's on standard error."""
    for path in dicom_files.write_series(tmp_path, dicom_files.volume((5, 4, 3)), dicom_files.scanner_affine()):
        ds = dicom_files.read(path)
        ds.PixelData = ds.PixelData * 3
        ds.save_as(path)
    with pytest.warns(UserWarning, match="frames"):
        volume = any_image.load_any(tmp_path)
    assert any("pixels of 3 frames, its header describes 1" in told for told in volume.warnings)


@pytest.mark.parametrize("change", [{"format": [1]}, {"files": {"../../x": {}}}, {"files": {"9" * 400: {}}}])
def test_a_snapshot_manifest_of_odd_values(tmp_path, change):
    """Found as `run` case 125 and by atheris: TypeError, OSError; and a name that leads elsewhere was followed."""
    (tmp_path / checkpoint.MANIFEST).write_text(json.dumps({"files": {}} | change), encoding="utf8")
    with pytest.raises(ModelError, match="is no manifest"):
        checkpoint.manifest(tmp_path)
    assert len(checkpoint.verify(tmp_path)) == 1


def test_a_store_manifest_without_its_root(tmp_path):
    """Found by atheris: ended in KeyError."""
    with create_store(tmp_path / "s") as writer:
        writer.finish()
    keys = Keys(tmp_path / "s", read_only=False)
    manifest = read_manifest(keys)
    del manifest["root"]
    write_manifest(keys, manifest)
    with pytest.raises(ModelError, match="is damaged"):
        open_store(tmp_path / "s")


@pytest.mark.parametrize(("name", "value"), [("kernel", -1), ("kernel", -(2**63)), ("in_channels", 0)])
def test_a_critic_of_no_size(name, value):
    """Found by atheris: ended in RuntimeError of torch."""
    with pytest.raises(ModelError, match="1 or more"):
        CriticSpec(**{name: value})


def test_drawn_chance_is_what_the_bytes_say_and_goes_on_behind_them():
    drawn = Drawn(b"\x05\0\x07")
    assert [drawn.getrandbits(8) for _ in range(3)] == [5, 0, 7]
    first, second = ([chance.randrange(100) for _ in range(50)] for chance in (Drawn(b"a"), Drawn(b"a")))
    assert first == second and len(set(first)) > 10


def test_a_network_of_a_name_without_end_is_told_in_short(tmp_path):
    """Found by atheris: a message of 40,000 letters."""
    modelfile.write(tmp_path / "w.safetensors", build_generator(GeneratorSpec(kernel=1)))
    data = (tmp_path / "w.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["fastsrgan"])
    ours["generator"]["network"] = "p" + "A" * 50_000
    header["__metadata__"]["fastsrgan"] = json.dumps(ours)
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ModelError, match=r"unknown generator 'pAAA") as caught:
        weights.load_generator(tmp_path / "w.safetensors")
    assert len(str(caught.value)) < 1000


# What a file of a results folder was changed to, found as `records` cases 2 to 2528: each ended in a Python error.
RECORDS = {
    "an epoch that is a mapping": ("log.jsonl", {"epoch": {}, "update": 1}),
    "an update that is text": ("log.jsonl", {"epoch": 1, "update": "1"}),
    "a log without epochs": ("log.jsonl", {"update": 1}),
    "scores of an epoch that are a number": ("log.jsonl", {"epoch": 1, "validation": 5}),
    "files that are a number": ("scores.json", {"files": 5}),
    "notes that are a number": ("scores.json", {"notes": 5}),
    "a region that is none": ("scores.json", {"image": {"whole": 5}}),
    "rows that are a number": ("study.json", {"rows": 5}),
    "a fit that is a number": ("study.json", {"fit": 5}),
    "figures of an axis that is none": ("study.json", {"rows": [{"step": None, "figures": {"psnr": "x"}}] * 2}),
    "warnings that are a number": ("case.json", {"warnings": 5}),
    "a shape that is a number": ("case.json", {"shape": 5, "new_resolution": True}),
    "a name without end": ("case.json", {"outputs": {"sr": "case_sr.nii.gz", "seg": "a" * 500}}),
    "a setting with a line end": ("case.json", {"asked": {"\nbatch": 1}}),
    "lists without end": ("case.json", "[" * 100_000),
    "files whose names are no text": ("scores.json", {"files": {"sr": "\ud800.nii"}}),
    "a number without end": ("case.json", '{"a": ' + "9" * 5000 + "}"),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    fuzz_targets.records_prepare(folder)
    return folder


@pytest.mark.parametrize("what", RECORDS)
def test_records_scores_and_logs_that_others_changed_are_read_or_refused(records, what):
    name, change = RECORDS[what]
    case = records / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(records / "seed", case)
    path = case / name
    if isinstance(change, str):
        path.write_text(change, encoding="utf8")
    elif name == "log.jsonl":
        path.write_text(json.dumps(change) + "\n" + path.read_text(encoding="utf8"), encoding="utf8")
    else:
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf8")) | change), encoding="utf8")
    fuzz_targets.records_read(case)


def test_a_volume_that_a_record_names_is_a_number(records):
    """Found as `records` case 951, ended in TypeError."""
    case = records / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(records / "seed", case)
    record = json.loads((case / "case.json").read_text(encoding="utf8"))
    record["input"] |= {"volume": "0", "series": []}
    (case / "case.json").write_text(json.dumps(record), encoding="utf8")
    fuzz_targets.records_read(case)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("case/dataset_description.json", {"GeneratedBy": 5, "DatasetLinks": {"raw": [1]}}),
        ("case/dataset_description.json", {"GeneratedBy": [5], "DatasetLinks": True}),
        ("case/sub-01/anat/sub-01_desc-sr_T1w.json", {"Sources": 5, "fastsrgan": [1]}),
        ("case/sub-01/anat/sub-01_desc-sr_T1w.json", {"Sources": [{}, None], "fastsrgan": {"weights": 5, "asked": 5}}),
    ],
)
def test_datasets_that_others_changed_are_read_or_refused(tmp_path, name, change):
    """Found as `bids` cases 145 to 4315: ended in TypeError or AttributeError."""
    fuzz_targets.bids_prepare(tmp_path)
    path = tmp_path / "seed" / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf8")) | change), encoding="utf8")
    fuzz_targets.bids_read(tmp_path / "seed")
