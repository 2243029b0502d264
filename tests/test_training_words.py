"""What the commands of training say: a terminal of 80 columns, a pipe that a program reads, weights to go on from."""

from __future__ import annotations

import io
import logging
import re

import pytest
from cohort import SMALL
from rich.console import Console

from fastsrgan.cli import console as console_module
from fastsrgan.cli.console import PlainProgress, TerminalProgress
from fastsrgan.cli.main import build_parser, normalised
from fastsrgan.cli.train import build_config
from fastsrgan.config import PRESETS, from_mapping
from fastsrgan.errors import ModelError, UsageError
from fastsrgan.model import weights
from fastsrgan.model.networks import Critic, CriticSpec, GeneratorSpec, build_generator
from fastsrgan.observation.model import Degradation

FACTS = {"rec": 0.021312, "W": -0.41, "gp": 0.0312, "patches/s": 12.34, "|G|": 1.234, "|D|": 0.5}
FACTS |= {"wait": "0.3%", "GB": 2.615, "run": "18 min left"}
LINE = "epoch 200 PSNR 26.61 spline 26.00 linear 26.40 SSIM 0.900 Dice 0.583 best 187"


@pytest.mark.parametrize("label", ["training epoch 200/200", f"infer: {'a' * 60}.nii.gz"])
@pytest.mark.parametrize("width", [80, 60, 160])
def test_nothing_is_cut_on_a_narrow_terminal(label, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, legacy_windows=False)
    progress = TerminalProgress(console)
    progress.start(label, 12345, "updates")
    progress.advance(1, **FACTS)
    progress.tell("validation", LINE)
    progress.finish()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in (label if len(label) <= width else label[:width], "1/12345", "rec 0.02131", "|D| 0.5", "18 min left"):
        assert word in re.sub(r"\s+", " ", text), word
    assert width < 80 or LINE in text


def test_a_line_ends_before_a_name_and_not_between_a_name_and_its_number():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, legacy_windows=False)
    TerminalProgress(console).tell("validation", LINE.replace("best", "Dice_cortex 0.512 Dice_white 0.598 best"))
    first, second = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    assert first.endswith("Dice 0.583") and second == "  Dice_cortex 0.512 Dice_white 0.598 best 187"


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
    progress.start("training epoch 1/2", 4, "updates")
    progress.advance(4, **FACTS)
    progress.finish()
    progress.tell("validation", LINE, epoch=1, PSNR=26.6123456, Dice_cortex=0.5, best=None)
    training, validation = console.file.getvalue().splitlines()
    assert training.startswith("training epoch 1/2: 4/4 updates") and 'run="18 min left"' in training
    assert validation == "validation: epoch=1 PSNR=26.6123 Dice_cortex=0.5 best=None"


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
    assert typed("-w", "adult").scaled and typed("-w", "perinatal").kernel_gen == 8


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
