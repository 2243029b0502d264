"""An option that would do nothing beside the others is refused in one line before any work, or a warning says so."""

from __future__ import annotations

import argparse
import logging

import pytest
from commands import one_line

from fastsrgan.cli import main as cli
from fastsrgan.cli.console import refuse_idle

PARSER = cli.build_parser()
COMMANDS = next(a for a in PARSER._actions if isinstance(a, argparse._SubParsersAction)).choices

# What is typed, the option that is idle there, and words that give it a use, in place of what stands before "|".
CURVES = "study curves run"
REFUSED = [
    *(
        (f"{CURVES} | {option}", option.split()[0], "study noise c.csv")
        for option in (
            *(
                "--weights adult",
                "--checkpoint last",
                "--quick",
                "--patch none",
                "--patch 64",
                "--steps 8",
                "--low-res 1 1 3",
            ),
            *("--noise 0", "--ratios 3", "--axis 1", "--split all", "--label-classes 3", "--label-names t.tsv"),
            *("--subjects 1", "--device cpu", "--precision fp32", "--seed 1"),
        )
    ),
    *(
        ("study steps --quick | " + option, option.split()[0], "study steps c.csv --quick")
        for option in ("--label-classes 3", "--label-names t.tsv", "--split Train", "--subjects 5")
    ),
    ("study resolution c.csv | --low-res 1 1 3", "--low-res", "study noise c.csv"),
    ("study steps c.csv --low-res 1 1 3 | --ratios 3", "--ratios", "study steps c.csv"),
    ("study steps c.csv --low-res 1 1 3 | --axis 1", "--axis", "study steps c.csv"),
    ("study steps c.csv | --ratios 3 5", "--ratios", "study resolution c.csv"),
    ("study steps c.csv --patch none | --steps 8 16", "--steps", "study steps c.csv"),
    *(
        ("report a b | " + option, option.split()[0], f"report a{beside}")
        for option, beside in (
            *(("--scores s.json", ""), ("--study s.json", ""), ("--hr h.nii", ""), ("--label l.nii", "")),
            *(("--mask m.nii", ""), ("--max-mb 2", ""), ("--label-classes 3", " --label l.nii")),
            ("--label-names t.tsv", " --label l.nii --label-classes cortex"),
        )
    ),
    ("report a | --label-classes 3", "--label-classes", "report a --hr h.nii --label l.nii"),
    (
        "report a --hr h.nii --label l.nii | --label-names t.tsv",
        "--label-names",
        "report a --label l --label-classes x",
    ),
    ("evaluate --sr a.nii --hr b.nii | --seg c.nii", "--seg", "evaluate --sr a.nii --hr b.nii --label l.nii"),
    ("evaluate --sr a --hr b | --baseline-seg c.nii", "--baseline-seg", "evaluate --sr a.nii --hr b.nii --label l.nii"),
    ("evaluate out truth | --label-names t.tsv", "--label-names", "evaluate --table pairs.csv"),
    ("infer a.nii -o o | --outside zero", "--outside", "infer a.nii -o o --mask m.nii"),
    ("infer a.nii -o o --crop-to-head | --outside zero", "--outside", "infer a.nii -o o --mask m.nii"),
    ("infer a.nii -o o --patch none | --step 5", "--step", "infer a.nii -o o"),
    ("infer a.nii -o o --patch none | --step auto", "--step", "infer a.nii -o o"),
    ("infer a.nii -o o --patch none | --budget 5s", "--budget", "infer a.nii -o o"),
    ("infer --bids d -o o | --series 5", "--series", "infer d -o o"),
    ("weights info adult | out.txt", "OUT", "weights import adult"),
    ("weights info adult | --overwrite", "--overwrite", "weights import adult out.txt"),
    ("train c.zarr -o r -n 1 1 3 | --base-path b", "--base-path", "train c.csv -o r -n 1 1 3"),
    ("train c.zarr -o r -n 1 1 3 --network plain | -u True", "--u-net-generator", "train c.csv -o r --network unet"),
    ("train c.zarr -o r -n 1 1 3 --network unet | -u False", "--u-net-generator", "train c.csv -o r"),
    *(
        ("train c.zarr -o r -n 1 1 3 | " + option, option.split()[0], "train c.zarr -o r --structure 3")
        for option in (
            "--tissue-means 5:0.46:0.04",
            "--synthetic-free 0",
            "--synthetic-invert 0",
            "--synthetic-strip 0",
        )
    ),
]
WARNED = [
    ("job-model -p t.csv -rf n | -it Lanczos", "--interpolation-type", "job-model -p t.csv -rf n -int sitk"),
    ("train c.zarr -o r | -it Lanczos", "--interpolation-type", "train c.zarr -o r -int sitk"),
    ("train c.zarr -o r -w adult | --zero-head True", "--zero-head", "train c.zarr -o r"),
]


def checked(words: str) -> None:
    args = PARSER.parse_args(cli.normalised(words.split()))
    refuse_idle(COMMANDS[args.command], args)


@pytest.mark.parametrize(("words", "option", "useful"), REFUSED)
def test_an_option_without_a_use_is_refused_before_any_work(words, option, useful, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    beside, given = words.split("|")
    assert cli.main(["--quiet", *(beside + given).split()]) == 2
    one_line(capsys.readouterr().err, f"error: {option}: ")
    assert not list(tmp_path.iterdir())
    checked(useful + given)
    checked(beside)


@pytest.mark.parametrize(("words", "option", "useful"), WARNED)
def test_an_option_without_a_use_is_told(words, option, useful, caplog):
    beside, given = words.split("|")
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        checked(beside + given)
        assert [r.getMessage().partition(" ")[0] for r in caplog.records] == [option]
        caplog.clear()
        checked(useful + given)
        checked(beside)
    assert not caplog.records


def test_every_need_of_a_command_stands_here():
    for rows, refused in ((REFUSED, True), (WARNED, False)):
        tried: dict[str, set[str]] = {}
        for words, _, _ in rows:
            beside, given = words.split("|")
            plain, args = (PARSER.parse_args(cli.normalised(w.split())) for w in (beside, beside + given))
            changed = {name for name in vars(args) if getattr(args, name) != getattr(plain, name)}
            tried.setdefault(args.command, set()).update(changed)
        for name, command in COMMANDS.items():
            needs = [need for need in command._defaults.get("needs", ()) if need.refused == refused]
            assert {option for need in needs for option in need.options.split()} == tried.get(name, set()), name


@pytest.mark.parametrize(
    "words",
    ["convert c.csv c.zarr", "train c.csv -o r -n 1 1 3", "study steps c.csv", "evaluate --table p.csv", "report a"],
)
def test_a_table_of_names_is_looked_at_wherever_it_is_given(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = ["--label", "l.nii", "--label-classes", "3"] if words == "report a" else []
    assert cli.main(["--quiet", *words.split(), *more, "--label-names", "gone.tsv"]) == 3
    one_line(capsys.readouterr().err, "error: gone.tsv: no such file")
    assert not list(tmp_path.iterdir())
