"""The command line: exit codes, one-line errors, both spellings of options, and every command run once."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench.__main__ import build_parser as bench_parser
from fastsrgan.cli import console
from fastsrgan.cli import infer as cli_infer
from fastsrgan.cli.main import build_parser, failed, main, normalised
from fastsrgan.cli.train import build_config
from fastsrgan.core.ranks import ALONE
from fastsrgan.infer import files as files_module
from fastsrgan.io import nifti as images
from fastsrgan.model import checkpoint, weights
from fastsrgan.model.networks import Critic, CriticSpec, GeneratorSpec, build_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A cohort of three tiny heads with its CSV, and weights."""
    path = tmp_path_factory.mktemp("cli")
    lines = ["HR_image,Label_image,Base"]
    for i, base in enumerate(("Train", "Train", "Test")):
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 26, 30)), indexing="ij"))
        r = np.sqrt((grid**2).sum(0))
        images.save(
            path / f"h{i}.nii.gz", np.where(r < 0.9, 500 + 300 * np.cos(8 * r + i), 0).astype(np.int16), np.eye(4)
        )
        images.save(path / f"l{i}.nii.gz", (r < 0.6).astype(np.uint8), np.eye(4))
        lines.append(f"h{i}.nii.gz,l{i}.nii.gz,{base}")
    (path / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    images.save(
        path / "scan.nii.gz", np.abs(np.sin(np.arange(20 * 22 * 9))).reshape(20, 22, 9), np.diag([1, 1, 3, 1.0])
    )
    generator = build_generator(GeneratorSpec(kernel=2), seed=1)
    weights.save_generator(path / "w.safetensors", generator, Critic(CriticSpec(kernel=2)))
    return path


def call(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["--quiet", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_convert_info_verify_train_infer_evaluate(folder, tmp_path, capsys):
    store = tmp_path / "cohort.zarr"
    code, out, _ = call(capsys, "convert", folder / "cohort.csv", store)
    assert code == 0 and "3 subjects" in out
    code, out, _ = call(capsys, "info", store, "--json")
    assert code == 0 and [r["split"] for r in json.loads(out)] == ["Train", "Train", "Test"]
    code, out, _ = call(capsys, "verify", store)
    assert code == 0 and "0 problems" in out
    small = ["-ps", 16, "--stride", 14, "-b", 2, "--kernel_gen", 2, "--kernel-dis", 2, "-e", 1, "--steps-per-epoch", 2]
    code, out, err = call(capsys, "train", store, "-o", tmp_path / "run", "-n", 1, 1, 3, *small, "--json")
    assert code == 0, err
    assert json.loads(out)["updates"] == 2
    code, out, _ = call(capsys, "verify", tmp_path / "run")
    assert code == 0 and "0 problems" in out
    words = ["infer", folder / "scan.nii.gz", "-o", tmp_path / "out", "-w", tmp_path / "run", "--patch", 16]
    code, out, err = call(capsys, *words, "--step", 12, "--save_prob")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "scan.json").read_text(encoding="utf8"))
    text = json.dumps(record)
    assert all(word in text for word in ('"patch": 16', '"step": 12', '"physical"', "sha256"))
    sr = images.load(tmp_path / "out" / "scan_sr.nii.gz")
    assert sr.data.shape == (20, 22, 27) and np.allclose(sr.spacing, 1)
    assert images.load(tmp_path / "out" / "scan_seg.nii.gz").meta["stored_dtype"] == "uint8"
    words = ["evaluate", "--sr", folder / "h0.nii.gz", "--hr", folder / "h1.nii.gz", "--seg", folder / "l0.nii.gz"]
    code, out, _ = call(capsys, *words, "--label", folder / "l1.nii.gz", "--json", tmp_path / "e.json")
    assert code == 0 and "psnr_db" in out
    scores = json.loads((tmp_path / "e.json").read_text(encoding="utf8"))
    assert scores["segmentation"]["dice"] == 1.0


def test_training_straight_from_the_originals_csv_and_options(folder, tmp_path, capsys):
    words = ["train", "-csv", folder / "cohort.csv", "-sf", tmp_path / "snap", "-n", 1, 1, 2, "-n", 1, 1, 4, "-ps", 16]
    words += ["-b", 2, "-e", 1, "--kernel_gen", 2, "--kernel_dis", 2, "--steps-per-epoch", 1, "-u_net", "True"]
    words += [
        "--number_of_disciminator_iteration",
        1,
        "-folder_training_data",
        tmp_path / "nothing",
        "-multi_gpu",
        "True",
    ]
    code, _, err = call(capsys, *words)
    assert code == 0, err
    assert (tmp_path / "snap" / "SegSRGAN_epoch_1").is_file() and not (tmp_path / "nothing").exists()
    code, out, _ = call(capsys, "weights", "info", tmp_path / "snap" / "SegSRGAN_epoch_1")
    assert code == 0 and json.loads(out)["generator"]["network"] == "unet"


def test_weights_import_and_export_round_trip(folder, tmp_path, capsys):
    assert call(capsys, "weights", "export", folder / "w.safetensors", tmp_path / "w.h5")[0] == 0
    assert call(capsys, "weights", "import", tmp_path / "w.h5", tmp_path / "back.safetensors")[0] == 0
    first, second = (weights.load_generator(p) for p in (folder / "w.safetensors", tmp_path / "back.safetensors"))
    assert all(
        np.array_equal(a.detach(), b.detach()) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["infer"], 2, "required"),
        (["nonsense"], 2, "invalid choice"),
        (["train", "x.zarr", "-o", "run", "-n", "1", "1", "3", "--bad-option"], 2, "unrecognized"),
        (["convert", "cohort.csv", "-o", "x.zarr"], 2, "fastsrgan convert: unrecognized arguments: -o "),
        (["--bad-option"], 2, "fastsrgan: unrecognized arguments: --bad-option (fastsrgan --help)"),
        (["train", "x.zarr", "-o", "run"], 2, "-n X Y Z"),
        (["train", "x.zarr", "-o", "run", "--config", "MISSPELT"], 4, "epohcs: unknown setting (did you mean epochs?)"),
        (["train", "-n", "1", "1", "3", "-o", "run"], 2, "data source"),
        (["train", "x.zarr", "-o", "run", "-n", "1", "1", "3", "-ps", "62"], 2, "try 60 or 64"),
        (["train", "x.zarr", "-o", "run", "-n", "1", "1", "3"], 3, "no such folder"),
        (["infer", "none.nii.gz", "-o", "out", "-w", "W"], 3, "none.nii.gz"),
        (["infer", "SCAN", "-o", "out", "-w", "none.safetensors"], 4, "none.safetensors"),
        (["infer", "SCAN", "-o", "out", "-w", "W", "--device", "cuda:7"], 5, "doctor"),
        (["infer", "SCAN", "-o", "SCAN", "-w", "W"], 5, "scan.nii.gz"),
        (["infer", "SCAN", "-o", "out", "-w", "W", "--patch", "63"], 2, "multiples of 4"),
        (["infer", "SCAN", "-o", "out", "-w", "W", "--new-resolution", "1", "2"], 2, "one or three"),
        (["infer", "SCAN", "-o", "out", "-w", "W", "--desc", "preproc"], 2, "--bids DIR"),
        (["evaluate", "--sr", "SCAN"], 2, "--hr"),
        (["convert", "none.csv", "store.zarr"], 3, "none.csv"),
        (["verify", "nothing.zarr"], 3, "no such folder"),
    ],
)
def test_errors_end_in_one_line_and_their_code(folder, tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "misspelt.yaml").write_text("epohcs: 3\n")
    named = {"SCAN": str(folder / "scan.nii.gz"), "W": str(folder / "w.safetensors"), "MISSPELT": "misspelt.yaml"}
    got, _, err = call(capsys, *(named.get(w, w) for w in words))
    assert (got, err.count("\n")) == (code, 1), err
    assert err.startswith("error: ") and message in err


def test_a_file_whose_name_begins_as_an_option_is_named_by_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x.nii.gz").touch()
    assert main(["infer", "-x.nii.gz", "-o", "out"]) == 2
    assert capsys.readouterr().err.endswith("unrecognized arguments: -x.nii.gz (./-x.nii.gz names the file)\n")
    assert main(["infer", "./-x.nii.gz", "-o", "out"]) == 3  # it is read, and empty


def test_options_are_the_same_with_dashes_and_underscores():
    assert normalised(["job_model", "--new_low_res", "a_b", "--base_path=x_y", "-1.5", "-is_conditional"]) == [
        "job-model", "--new-low-res", "a_b", "--base-path=x_y", "-1.5", "-is-conditional",
    ]  # fmt: skip


def test_names_behind_two_dashes_are_left_alone(folder, tmp_path, monkeypatch, capsys):
    """Became -x-y.nii.gz: no such file."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(folder / "scan.nii.gz", "-x_y.nii.gz")
    words = ["infer", "-o", "out_1", "-w", str(folder / "w.safetensors"), "--patch", "64", "--step", "64", "--"]
    assert main([*words, "-x_y.nii.gz"]) == 0, capsys.readouterr().err
    assert Path("out_1/-x_y_sr.nii.gz").is_file()
    assert main([*words[:3], "--", "--debug"]) == 3
    assert "Traceback" not in (told := capsys.readouterr().err) and "--debug: no such file" in told


def test_help_of_every_command_ends_with_an_example(capsys):
    parser = build_parser()
    commands = next(a for a in parser._actions if hasattr(a, "choices") and a.choices and "train" in a.choices).choices
    assert {"demo", "convert", "verify", "info", "train", "infer", "evaluate", "weights", "doctor"} <= set(commands)
    for name, command in commands.items():
        text = command.format_help()
        assert f"fastsrgan {name}" in text.split("example", 1)[1], name


def test_settings_come_from_file_then_preset_then_options(tmp_path):
    (tmp_path / "c.yaml").write_text("new_low_res: [[1, 1, 2]]\nbatch_size: 5\nkernel_gen: 4\n", encoding="utf8")
    words = [
        "train",
        "s.zarr",
        "-o",
        "r",
        "--config",
        str(tmp_path / "c.yaml"),
        "--preset",
        "paper",
        "--kernel-gen",
        "6",
    ]
    config = build_config(build_parser().parse_args(normalised(words)))
    assert (config.new_low_res, config.batch_size, config.kernel_gen, config.lambda_gp) == (((1, 1, 2),), 5, 6, 100.0)


@pytest.mark.fault(45)
def test_plain_output_has_no_control_codes(folder, tmp_path):
    command = [sys.executable, "-m", "fastsrgan", "convert", str(folder / "cohort.csv"), str(tmp_path / "s.zarr")]
    environment = {**os.environ, "LC_ALL": "C", "COLUMNS": "80", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr and b"\r" not in done.stderr


def test_a_table_wider_than_the_terminal_comes_in_blocks_of_columns(monkeypatch):
    rows = [{"subject": f"s{i}", **{f"figure {k}": 10 * i + k for k in range(9)}} for i in range(3)]
    monkeypatch.setenv("COLUMNS", "40")
    whole = console.table(rows)  # piped: a row is a line, whatever COLUMNS says
    assert len(whole.splitlines()) == 5 and max(map(len, whole.splitlines())) > 80
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    blocks = [block.splitlines() for block in console.table(rows).split("\n\n")]
    assert len(blocks) == 3 and all(len(line) <= 40 for block in blocks for line in block)
    found = [[re.split(" {2,}", line) for line in block] for block in blocks]
    assert all([line[0] for line in block] == ["subject", "-------", "s0", "s1", "s2"] for block in found)
    joined = [[found[0][i][0], *(cell for block in found for cell in block[i][1:])] for i in range(5)]
    assert joined == [re.split(" {2,}", line) for line in whole.splitlines()]
    # Figures need both names in every block: `whole` stands in six rows.
    for block in (block.splitlines() for block in console.table(rows, keys=2).split("\n\n")):
        assert [re.split(" {2,}", line)[:2] for line in block[2:]] == [["s0", "0"], ["s1", "10"], ["s2", "20"]]
    monkeypatch.setenv("COLUMNS", "120")
    assert console.table(rows) == whole


@pytest.mark.parametrize("width", [8, 20, 40, 60, 80])
def test_a_row_whose_names_leave_no_room_for_a_figure_has_a_line_for_each(monkeypatch, width):
    """Lines of tables of a study were broken or cut by a terminal of 40 columns."""
    names = ("condition", "model", "step")
    rows = [{"condition": "noise 0.05", "model": f"own-run-{i}", "step": "128", "PSNR dB": "31.82 ± 0.61",
             "Dice": "0.7207 ± 0.11"} for i in range(2)]  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    told = console.table(rows, keys=len(names))
    assert all(len(line) <= width or len(line.split()) == 1 for line in told.splitlines())
    words = told.replace(" ", "").replace("\n", "")
    assert all(words.count(value.replace(" ", "")) >= 1 for row in rows for value in row.values())
    if width == 40:
        assert told.split("\n\n")[1].splitlines() == [
            "condition  noise 0.05", "model      own-run-1", "step       128", "PSNR dB    31.82 ± 0.61",
            "Dice       0.7207 ± 0.11",
        ]  # fmt: skip


@pytest.mark.parametrize("columns", [80, 200])
def test_the_prose_of_every_help_keeps_to_the_terminal_and_commands_stay_whole(monkeypatch, columns):
    """Descriptions were one line, or broken at 120 columns, which 80 broke again inside of words."""
    monkeypatch.setenv("COLUMNS", str(columns))
    fastsrgan = build_parser()
    parsers = [fastsrgan, bench_parser()]
    parsers += next(a for a in fastsrgan._actions if isinstance(a, argparse._SubParsersAction)).choices.values()
    assert len(parsers) > 12
    for parser in parsers:
        lines = parser.format_help().splitlines()
        assert max(len(line) for line in lines if not line.startswith(" ")) <= columns, parser.prog
        written = [line for line in f"{parser.description}\n{parser.epilog or ''}".splitlines() if line.startswith(" ")]
        assert [line for line in written if line in lines] == written, parser.prog
        prose = " ".join(" ".join(lines).split())
        assert all(" ".join(part.split()) in prose for part in (parser.description or "").split("\n\n"))


def test_results_and_errors_are_broken_between_words_on_a_terminal_alone(monkeypatch, capsys):
    """Paths were cut at the eightieth column."""
    path = "out/sub-01_acq-axial_T2w_sr.nii.gz"
    text = f"done    scan.nii.gz  green  {path}  {path}  {path}"
    monkeypatch.setenv("COLUMNS", "80")
    console.say(text)
    console.error_line(text)
    piped = capsys.readouterr()
    assert piped.out == f"{text}\n" and piped.err == f"error: {text}\n"
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    console.say(text)
    console.error_line(text)
    for shown in capsys.readouterr():
        lines = shown.splitlines()
        assert (
            len(lines) > 1
            and all(len(line) <= 80 for line in lines)
            and shown.count(path) == 3
            and lines[1].startswith("  ")
        )


def test_debug_shows_the_traceback(folder, capsys):
    assert main(["--debug", "verify", "nothing.zarr"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.fault(35)
def test_what_torch_says_when_there_is_no_memory_is_one_line_with_5(capsys):
    told = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"
    assert failed(RuntimeError(told)) == 5 and failed(RuntimeError("another")) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: memory: not enough (") and "internal" in second


WRONG_PATHS = ("ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR", "ENOENT")


@pytest.mark.parametrize(
    ("name", "code"), [*((name, 3) for name in WRONG_PATHS), ("ENOSPC", 5), ("EACCES", 5), ("EIO", 5)]
)
def test_a_wrong_path_is_the_inputs_fault_and_any_other_error_of_the_system_the_surroundings(name, code, capsys):
    assert failed(OSError(getattr(errno, name), "what it says", "a/b")) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a/b: what it says") and ("its permissions)" in line) == (name == "EACCES")


@pytest.mark.parametrize(
    ("error", "told"), [(MemoryError(), "use a smaller patch"), (MemoryError("so big"), "(so big)")]
)
def test_a_lack_of_memory_is_one_of_the_surroundings(error, told, capsys):
    assert failed(error) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory: not enough (") and told in line


def test_damage_of_a_store_a_run_and_a_lone_snapshot_is_told_and_ends_with_3(tmp_path, monkeypatch, capsys):
    """The weights beside the snapshots are those of a run, which a lone snapshot has not."""
    store = SimpleNamespace(verify=lambda progress: ["a: broken", "b: gone"], subjects=["a", "b", "c"])
    monkeypatch.setattr("fastsrgan.store.reader.open_store", lambda path: store)
    assert call(capsys, "verify", tmp_path)[:2] == (3, f"a: broken\nb: gone\n{tmp_path}: 3 subjects, 2 problems\n")
    asked = []
    monkeypatch.setattr(checkpoint, "verify", lambda folder: asked.append(folder.name) or [f"{folder.name} bad"])
    monkeypatch.setattr(weights, "damaged", lambda run: ["weights bad"])
    lone = tmp_path / "lone"
    lone.mkdir()
    for name in (checkpoint.MANIFEST, checkpoint.MODEL):
        (lone / name).touch()
    assert call(capsys, "verify", lone)[:2] == (3, f"lone bad\n{lone}: 1 snapshot, 1 problem\n")
    monkeypatch.setattr(checkpoint, "folders", lambda run: [run / "step-1", run / "step-2"])
    told = f"step-1 bad\nstep-2 bad\nweights bad\n{tmp_path}: 2 snapshots, 3 problems\n"
    assert call(capsys, "verify", tmp_path)[:2] == (3, told) and asked == ["lone", "step-1", "step-2"]


def test_images_that_need_nothing_are_a_fault_where_all_do(monkeypatch, capsys):
    items = [{"input": name, "status": "skipped", "reason": f"{name}: is isotropic"} for name in ("a", "b")]
    for count, unneeded, code, told in (
        (2, 1, 0, ""),
        (2, 2, 2, "all 2 images have equal voxels along all axes"),
        (1, 1, 2, "a: is isotropic"),
        (1, 0, 0, ""),
    ):
        result = {"items": items[:count], "unneeded": unneeded}
        monkeypatch.setattr(files_module, "infer_files", lambda *args, result=result, **more: result)
        got, out, err = call(capsys, "infer", "a", "-o", "out")
        assert got == code and (err.startswith("error: ") and told in err if told else err == "")
        assert out.splitlines()[0] == "skipped a  is isotropic"


def test_ranks_that_have_no_image_left_wait_for_a_week(monkeypatch):
    asked = []
    monkeypatch.setattr("fastsrgan.core.ranks.from_environment", lambda *args: asked.append(args) or ALONE)
    monkeypatch.setattr(files_module, "infer_files", lambda *args, **more: {"items": [], "unneeded": 0})
    assert main(["--quiet", "infer", "a", "-o", "out"]) == 0
    ((device, patience),) = asked
    assert str(device) == "cpu" and patience is cli_infer.PATIENCE and patience.days == 7


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["infr"], "did you mean infer?"), (["infer", "x", "-o", "o", "--paches", "8"], "did you mean --patch?"),
        (["infer", "x", "-o", "o", "--paches=8"], "did you mean --patch?"), (["zzz"], "fastsrgan --help"),
        (["infer", "x", "-o", "o", "--zzzzzz"], "fastsrgan infer --help"),
        (["infer", "x", "-o", "o", "--window", "hanm"], "did you mean hann?"),
    ],
)  # fmt: skip
def test_the_nearest_word_is_told_where_one_is_near(capsys, words, hint):
    code, _, err = call(capsys, *words)
    assert code == 2 and err.endswith(f"({hint})\n")
