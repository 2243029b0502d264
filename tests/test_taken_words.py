"""Words that an option took as values although they were meant as arguments: the error says so, in every command."""

from __future__ import annotations

import pytest
from commands import call, one_line

from fastsrgan.cli.main import _below, build_parser, taken

PARSER = build_parser()
COMMANDS = (
    "convert",
    "train",
    "infer",
    "weights",
    "evaluate",
    "study",
    "report",
    "job-model",
    "info",
    "verify",
    "demo",
)
GREEDY = [
    (command, name, action.nargs)
    for command in COMMANDS
    for action in _below(PARSER, command)._actions
    for name in action.option_strings
    if action.nargs in ("+", "*", "?")
]


def test_there_are_options_of_several_values():
    found = {(command, name) for command, name, _ in GREEDY}
    assert {("convert", "--label"), ("study", "-w"), ("report", "--study"), ("evaluate", "--json")} <= found


@pytest.mark.parametrize(("command", "name", "nargs"), GREEDY)
def test_every_option_of_several_values_says_what_it_took(command, name, nargs):
    parser = _below(PARSER, command)
    values = ["1"] * (nargs == "+")
    hint = taken(parser, [command, name, *values, "cohort.csv"], "no data")
    assert hint == f"{name} takes cohort.csv as a value too: arguments stand before such an option, or behind --"
    for free in ([*values, "--", "cohort.csv"], [*values], [*values, "-o", "out"]):
        assert taken(parser, [command, name, *free], "no data") == ""


WORDS = [
    ("convert", "c.csv", "--label", "3,42", "s.zarr"),
    ("convert", "c.csv", "--label_classes", "3,42", "s.zarr"),
    ("convert", "c.csv", "--label-cl", "3,42", "s.zarr"),
    ("train", "-o", "run", "--label", "3,42", "s.zarr"),
    ("infer", "-o", "out", "--new-resolution", "1", "1", "1", "s.zarr"),
    ("evaluate", "--label-classes", "3,42", "s.zarr"),
    ("evaluate", "out", "--label-classes", "3,42", "s.zarr"),
    ("evaluate", "--json", "s.zarr", "truth"),
    ("study", "steps", "--steps", "2", "s.zarr"),
    ("study", "steps", "-w", "w.safetensors", "s.zarr"),
    ("study", "-w", "w.safetensors", "s.zarr"),
    ("report", "--study", "steps.json", "s.zarr"),
]


@pytest.mark.parametrize("words", WORDS)
def test_the_error_of_what_is_missing_says_which_option_took_it(words, capsys):
    code, _, told = call(capsys, *words)
    one_line(told, "takes s.zarr as a value too", "behind --")
    assert code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("convert", "c.csv"), "fastsrgan convert --help"),
        (("infer", "--bids", "d", "--suffix", "T1w", "T2w"), "fastsrgan infer --help"),
        (("study", "steps", "--steps", "x", "3", "a.nii"), "invalid int value: 'x' (fastsrgan study --help)"),
        (("study", "stepps", "--steps", "2", "3", "a.nii"), "did you mean steps?"),
        (("evaluate", "--label-classes", "3,42"), "give --sr and --hr"),
    ],
)
def test_other_faults_keep_their_own_hint(words, said, capsys):
    code, _, told = call(capsys, *words)
    one_line(told, said)
    assert code == 2 and "as a value too" not in told
