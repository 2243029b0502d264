"""What the commands of training say: a terminal of 80 columns, a pipe that a program reads, weights to go on from."""

from __future__ import annotations

import argparse
import ast
import datetime
import io
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cohort import SMALL
from rich.console import Console
from spies import NOTHING_TRAINED

from fastsrgan.cli import console as console_module
from fastsrgan.cli.console import PlainProgress, TerminalProgress, pace
from fastsrgan.cli.main import build_parser, main, normalised
from fastsrgan.cli.train import build_config, is_table
from fastsrgan.config import PRESETS, from_mapping
from fastsrgan.core import progress as progress_module
from fastsrgan.errors import ModelError, UsageError, lasting, some_of
from fastsrgan.model import weights
from fastsrgan.model.networks import Critic, CriticSpec, GeneratorSpec, build_generator
from fastsrgan.observation.model import Degradation
from fastsrgan.train import run as run_module

FACTS = {"rec": 0.021312, "W": -0.41, "gp": 0.0312, "patches/s": 12.34, "|G|": 1.234, "|D|": 0.5}
FACTS |= {"wait": "0.3%", "GB": 2.615, "run": "18 min left"}
LINE = "epoch 200 PSNR 26.61 spline 26.00 linear 26.40 SSIM 0.900 spline 0.876 Dice 0.583 best 187"


@pytest.mark.parametrize("label", ["training epoch 200/200", f"infer: {'a' * 60}.nii.gz"])
@pytest.mark.parametrize("width", [80, 60, 160])
def test_nothing_is_cut_on_a_narrow_terminal(label, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False)
    progress = TerminalProgress(console)
    progress.start(label, 12345, "update")
    progress.advance(1, **FACTS)
    progress.tell("validation", LINE)
    progress.finish()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in (label if len(label) <= width else label[:width], "1/12345", "rec 0.02131", "|D| 0.5", "18 min left"):
        assert word in re.sub(r"\s+", " ", text), word
    assert LINE in re.sub(r"\s+", " ", text)
    for cell in ("rec 0.02131", "|D| 0.5", "wait 0.3%", "GB 2.615", "run 18 min left"):  # a value beside its name
        assert any(cell in line for line in text.splitlines()), cell
    cells = re.findall(r"[A-Za-z]+ [\d.]+", LINE)
    assert len(cells) == 8 and all(any(cell in line for line in text.splitlines()) for cell in cells)


@pytest.mark.parametrize(
    ("rate", "told"), [(0.0, "0/s"), (0.00837, "119 s each"), (0.099, "10.1 s each"), (0.1, "0.1/s"), (12.34, "12.3/s")]
)
def test_what_takes_long_says_how_long(rate, told):
    assert pace(rate) == told


def test_a_line_ends_before_a_name_and_not_between_a_name_and_its_number():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, legacy_windows=False)
    TerminalProgress(console).tell("validation", LINE.replace("best", "Dice_cortex 0.512 Dice_white 0.598 best"))
    first, second = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    assert first.endswith("spline 0.876") and second == "  Dice 0.583 Dice_cortex 0.512 Dice_white 0.598 best 187"


def test_notes_are_broken_between_words_on_a_terminal_alone():
    words = "made for T2-like contrast, 21 to 40 weeks of gestation, human, brain, stripped or with the head around it"
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=40, force_terminal=terminal, legacy_windows=False)
        console_module._Handler(console).emit(logging.makeLogRecord({"msg": words, "levelname": "INFO"}))
        lines = console.file.getvalue().splitlines()
        assert " ".join(map(str.strip, lines)) == f"note: {words}"
        assert (max(map(len, lines)) <= 40 and len(lines) > 2) if terminal else len(lines) == 1


def test_a_pipe_gets_groups_of_lines_with_fields():
    console = Console(file=io.StringIO(), width=80)
    progress = PlainProgress(console)
    progress.start("training epoch 1/2", 4, "update")
    progress.advance(4, **FACTS)
    progress.finish()
    progress.tell("validation", LINE, epoch=1, PSNR=26.6123456, Dice_cortex=0.5, best=None)
    training, validation = console.file.getvalue().splitlines()
    assert training.startswith("training epoch 1/2: 4/4 updates") and 'run="18 min left"' in training
    assert validation == "validation: epoch=1 PSNR=26.6123 Dice_cortex=0.5 best=None"


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but where it is moved."""
    now = SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(console_module, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def test_a_pipe_is_told_every_ten_seconds_how_fast_it_goes_and_what_is_left(clock):
    console = Console(file=io.StringIO(), width=20)
    progress = PlainProgress(console)
    progress.start("epoch\x1b 1", 10, "update")
    for _ in range(3):
        clock.seconds += 4
        progress.advance(2, rec=0.5)
    clock.seconds += 9
    progress.advance(1)  # too soon; the facts that were told last stay
    clock.seconds += 1
    progress.advance(1)
    clock.seconds += 30
    progress.advance(2, rec=0.25)  # the end is told by finish
    progress.finish()
    progress.finish()
    progress.start("epoch 2", 4, "update")
    progress.advance(1)
    progress.finish()
    assert console.file.getvalue().splitlines() == [
        "epoch\\x1b 1: 6/10 updates  0.5/s  8 s left  rec=0.5",
        "epoch\\x1b 1: 8/10 updates  0.364/s  6 s left  rec=0.5",
        "epoch\\x1b 1: 10/10 updates  0.192/s  rec=0.25", "epoch 2: 1/4 updates  1e+09/s  0 s left",
    ]  # fmt: skip


def test_a_bar_tells_the_rate_of_all_that_is_done_and_keeps_its_facts(clock):
    progress = TerminalProgress(Console(file=io.StringIO(), width=80, force_terminal=True, legacy_windows=False))
    progress.advance(5)  # of nothing that was begun
    progress.start("epoch 1", 12, "update")
    clock.seconds += 4
    progress.advance(2, rec=0.5)
    clock.seconds += 4
    progress.advance(4)
    task = progress.bar.tasks[0]
    assert (task.completed, task.total, task.fields["rate"]) == (6, 12, "0.75/s") and progress.facts == {"rec": 0.5}
    progress.start("epoch 2", 3, "update")
    assert progress.facts == {} and progress.bar.tasks[0].completed == 0
    progress.finish()
    assert progress.bar is None


@pytest.mark.parametrize("each", [0.5, 48.0, 900.0])
def test_the_time_that_is_left_is_said_however_long_each_takes(clock, each):
    """Where one took longer than 30 s, as tiles and cells of a study on a CPU, a terminal had `-:--:--` to the end."""
    screen = Console(file=io.StringIO(), width=80, force_terminal=True, legacy_windows=False)
    terminal, piped = TerminalProgress(screen), PlainProgress(Console(file=io.StringIO(), width=80))
    for progress in (terminal, piped):
        progress.start("study", 10, "cell")
    for _ in range(4):
        clock.seconds += each
        terminal.advance()
        piped.advance()
    piped.finish()
    assert f"  {lasting(6 * each, 0)} left" in piped.console.file.getvalue()
    shown = terminal.bar.tasks[0].fields
    assert (shown["rate"], shown["left"]) == (pace(1 / each), str(datetime.timedelta(seconds=6 * each)))
    for _ in range(6):
        clock.seconds += each
        terminal.advance()
    assert terminal.bar.tasks[0].fields["left"] == str(datetime.timedelta(seconds=10 * each))  # what all of it took
    terminal.finish()


def test_times_that_are_left_have_no_fractions_but_of_an_hour():
    times = (0, 8.4, 45.4, 99, 101, 1100, 5990, 7500)
    assert [lasting(s, 0) for s in times] == [*("0 s", "8 s", "45 s", "99 s", "2 min", "18 min", "100 min", "2.1 h")]


def test_fields_are_told_apart_by_blanks_and_a_terminal_has_four_digits():
    """Names of structures may hold blanks: a name in front of a plain number kept them."""
    facts = {"Dice_white matter": 2.61512345, "in all": "18 min", "is": "a=b", "n": 7, "name": "x\x1by"}
    assert console_module.fields(facts) == 'Dice_white_matter=2.615 in_all="18 min" is="a=b" n=7 name=x\\x1by'
    assert console_module.fields({"a": 1.23456789}, 6) == "a=1.23457"
    assert (
        console_module.shown({"rec": 0.0213456, "n": 12345678, "x": "a\x07"}, 80) == "rec 0.02135  n 12345678  x a\\x07"
    )


@pytest.mark.parametrize(
    ("quiet", "debug", "level"),
    [(False, False, logging.INFO), (True, False, logging.WARNING), (False, True, logging.DEBUG)],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_says_what_was_asked_for_in_the_form_of_its_stream(monkeypatch, quiet, debug, level, terminal):
    """Warnings of libraries, which speak to programmers, with --debug alone."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    ours, theirs = logging.getLogger("fastsrgan"), logging.getLogger("pydicom")
    kept = [(log, log.handlers[:], log.propagate, log.level) for log in (ours, theirs)]
    monkeypatch.setattr(sys, "stderr", stream)
    for name in ("NO_COLOR", "TERM", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    try:
        made = console_module.open_console(quiet, debug)
        assert ours.level == level and not ours.propagate and not theirs.propagate
        for log in (ours, theirs):
            for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
                log.log(number, "%s\x1b %d", log.name, number)
    finally:
        logging.captureWarnings(False)
        for log, handlers, propagate, before in kept:
            log.handlers[:], log.propagate = handlers, propagate
            log.setLevel(before)
    kind = TerminalProgress if terminal else PlainProgress
    assert made is progress_module.QUIET if quiet else isinstance(made, kind)
    words = {logging.DEBUG: "debug", logging.INFO: "note", logging.WARNING: "warning", logging.ERROR: "error"}
    told = [f"{word}: fastsrgan\\x1b {number}" for number, word in words.items() if number >= level]
    told += [f"{words[n]}: pydicom\\x1b {n}" for n in (logging.WARNING, logging.ERROR) if debug]
    assert stream.getvalue().splitlines() == told


def test_parts_of_a_work_are_quiet_and_the_level_is_what_it_was_afterwards():
    log = progress_module.log
    before = log.level
    try:
        for level, inside in ((logging.DEBUG, logging.WARNING), (logging.ERROR, logging.ERROR)):
            log.setLevel(level)
            with pytest.raises(ZeroDivisionError), progress_module.quiet():
                assert log.level == inside
                _ = 1 // 0
            assert log.level == level
    finally:
        log.setLevel(before)


def test_a_table_of_files_is_told_from_a_store_by_its_ending():
    assert all(map(is_table, ("a.csv", "b.TSV", "c.txt"))) and not is_table("a.zarr")


def test_the_originals_booleans():
    for value, words in ((True, "True true YES 1"), (False, "False FALSE no 0")):
        assert [console_module.boolean(word) for word in words.split()] == [value] * 4
    with pytest.raises(argparse.ArgumentTypeError, match="'2' is neither True nor False"):
        console_module.boolean("2")


def test_a_table_is_aligned_and_cells_hold_four_digits_and_no_control_letters():
    rows = [{"name": "a\x1b", "x": 0.123456, "more": 1}, {"name": "bb", "x": None}]
    assert console_module.table(rows).splitlines() == [
        "name   x       more", "-----  ------  ----", "a\\x1b  0.1235  1", "bb     -       -",
    ]  # fmt: skip
    assert console_module.table(rows, ["x"]).splitlines() == ["x", "------", "0.1235", "-"]


@pytest.mark.parametrize("terminal", [True, False])
def test_names_are_as_they_are_but_on_a_terminal_and_an_error_is_one_line(monkeypatch, terminal):
    out, err = io.StringIO(), io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    name = "a\x1b[2J\u202eb\udcff.nii"
    console_module.say(name)
    console_module.error_line(f"{name}  b:\n  is  \n damaged")
    held = "a\\x1b[2J\\u202eb\\udcff.nii"
    assert out.getvalue() == f"{held if terminal else name}\n"
    assert err.getvalue() == f"error: {held}  b: is damaged\n"


def test_a_checkpoint_is_that_of_every_run_folder_and_without_one_paths_are_as_typed(monkeypatch):
    monkeypatch.setattr(weights, "of_run", lambda path, which: f"{path}/{which}")
    assert console_module.chosen_weights(["a", "b"], "last") == ["a/last", "b/last"]
    assert console_module.chosen_weights(("a",), None) == ["a"] and console_module.chosen_weights(None, None) is None
    for nothing in (None, ()):
        with pytest.raises(UsageError, match="no run folder was given"):
            console_module.chosen_weights(nothing, "best")


BEST = {"best_epoch": 5, "best_by": "dice", "best": 0.75, "best_dice": 0.5, "dice_is": "Dice", "best_weights": "b"}
TOLD = "last weights: w\nbest: epoch 5, Dice 0.7500 on the Test subjects\nbest weights: b\n"


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ({"updates": 3, "seconds": 2.4}, "3 updates in 2 s\nno weights before the first epoch's end\n"),
        ({"updates": 3, "weights": "w"} | BEST, f"3 updates in 0 s\n{TOLD}"),
        (
            {"updates": 12, "resumed_at": 4, "weights": "w", "stopped": 15, "exit_code": 143} | BEST,
            f"8 of 12 updates in 0 s\n{TOLD}stopped by SIGTERM; continue with --resume\n",
        ),
        (
            {"updates": 1, "stopped": 2, "exit_code": 130},
            "1 update in 0 s\nno weights before the first epoch's end\n"
            "stopped by SIGINT (Ctrl-C); continue with --resume\n",
        ),
    ],
)
def test_the_last_lines_of_a_training_are_of_this_call(monkeypatch, tmp_path, capsys, result, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "train", lambda *args, **more: NOTHING_TRAINED | result)
    words = ["--quiet", "train", "c.zarr", "-o", "run", "-n", "1", "1", "3"]
    assert main(words) == result.get("exit_code", 0)
    assert capsys.readouterr().out == told


# --- weights to go on from ------------------------------------------------------------------------------------------


def typed(*words):
    return build_config(
        build_parser().parse_args(normalised(["train", "c.zarr", "-o", "r", "-n", "1", "1", "3", *words]))
    )


@pytest.fixture
def held(tmp_path):
    spec = GeneratorSpec("unet", 3, residual=False, mask_classes=2, scaled=False)
    critic = Critic(CriticSpec(5, 16, spec.out_channels))
    return str(weights.save_generator(tmp_path / "w.safetensors", build_generator(spec), critic))


def test_the_network_is_that_of_the_weights(held):
    config = typed("-w", held, "--preset", "recommended")
    assert (config.network, config.kernel_gen, config.residual, config.scaled) == ("unet", 3, False, False)
    assert config.fit_mask and config.kernel_dis == 5 and config.ema == 0.999  # the rest is the preset's
    assert typed("-w", held, "--kernel-gen", "3", "--kernel-dis", "7").kernel_dis == 7
    assert typed("-w", "adult").scaled and typed("-w", "perinatal").kernel_gen == 12


@pytest.mark.parametrize("option", [("--kernel-gen", "4"), ("--network", "plain"), ("--fit-mask", "False")])
def test_another_network_is_refused_by_both_names(held, option):
    with pytest.raises(ModelError, match=rf"{option[0]} {option[1]} is asked for") as error:
        typed("-w", held, *option)
    assert error.value.what == held


def test_all_that_the_weights_do_not_fit_is_told_at_once(held):
    reason = (
        "its network has kernel_gen 3, and --kernel-gen 4 is asked for; residual False, and --residual True is asked"
    )
    with pytest.raises(ModelError, match=reason) as error:
        typed("-w", held, "--kernel-gen", "4", "--residual", "True")
    assert error.value.hint == "leave --kernel-gen, --residual out, or begin without these weights"


def test_faults_of_settings_are_told_before_weights_are_looked_for():
    with pytest.raises(UsageError, match=r"2 faults: --batch-size: 0 .*; --patch-size: 33 "):
        typed("-w", "nothere.safetensors", "-b", "0", "-ps", "33")


# --- the recipe -----------------------------------------------------------------------------------------------------


def test_the_recommended_settings_are_settings_and_options_win():
    config = typed("--preset", "recommended", "--lambda-rec", "5")
    for name, value in PRESETS["recommended"].items():
        assert getattr(config, name) == (5.0 if name == "lambda_rec" else value), name
    assert from_mapping(SMALL.to_dict() | {"preset": "recommended"}).scaled is False  # what a file says wins too
    assert config.scaled and config.zero_head and config.lambda_adv == 0


def test_noise_is_the_same_in_all_images_or_drawn_up_to_it():
    fixed = Degradation(((1.0, 1.0, 3.0),), noise=0.04)
    drawn = Degradation(((1.0, 1.0, 3.0),), noise=0.04, noise_from=0.01)
    names = [f"s{i}" for i in range(200)]
    assert {fixed.draw(0, 1, name).noise for name in names} == {0.04}
    levels = [drawn.draw(0, 1, name).noise for name in names]
    assert 0.01 <= min(levels) < 0.012 and 0.038 < max(levels) <= 0.04 and len(set(levels)) == 200  # found: 0.01, 0.04
    assert drawn.draw(0, 1, "s1") == drawn.draw(0, 1, "s1") and drawn.linspace(0, 3).noise == 0.04


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "word"), [(0, "volumes"), (1, "volume"), (3, "volumes")])
def test_progress_counts_in_the_right_word(clock, total, word):
    """``3/3 volume``, ``1/1 tiles`` stood there."""
    plain_one = PlainProgress(Console(file=io.StringIO(), width=500))
    terminal = TerminalProgress(Console(file=io.StringIO(), width=80, force_terminal=True, legacy_windows=False))
    for progress in (plain_one, terminal):
        progress.start("convert", total, "volume")
        progress.advance(1)
    assert terminal.bar.tasks[0].fields["unit"] == word
    plain_one.finish()
    assert plain_one.console.file.getvalue().startswith(f"convert: 1/{total} {word}  ")
    terminal.finish()


def test_every_stretch_of_progress_names_one_of_what_it_counts():
    """The displays make the many of it: a name of many would stand beside one."""
    root, named = Path(progress_module.__file__).parent.parent, []
    for path in root.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf8"))) if isinstance(node, ast.Call)):
            if (
                getattr(call.func, "attr", "") == "start"
                and len(call.args) == 3
                and isinstance(call.args[2], ast.Constant)
            ):
                named.append(call.args[2].value)
    assert {"volume", "subject", "tile", "update", "page", "cell", "picture"} == set(named), (
        "no other word, and none of many"
    )


def test_the_verb_is_that_of_the_part():
    assert some_of(1, 210, "voxel", "is", "are") == "1 of 210 voxels is"
    assert some_of(2, 210, "voxel", "is", "are") == "2 of 210 voxels are"
    assert some_of(1, 1, "chunk", "is", "are") == "1 of 1 chunk is"
