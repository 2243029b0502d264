"""The table of training settings: every row is whole, and command line, checks, documentation and resume follow it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cohort import SMALL, make_store

import fastsrgan
from fastsrgan.cli import main as cli
from fastsrgan.cli import train as cli_train
from fastsrgan.config import (
    ADVANCED,
    ANEW,
    BASIC,
    FREE,
    JUDGED,
    KEPT,
    MATCH,
    NEW,
    PRESETS,
    RESUMED,
    SETTINGS,
    START,
    Setting,
    TrainConfig,
    from_mapping,
    setting,
)
from fastsrgan.core.ranks import ALONE
from fastsrgan.errors import ModelError, UsageError
from fastsrgan.model import checkpoint, safetensors
from fastsrgan.train import run as run_module
from fastsrgan.train import snapshots
from fastsrgan.train.gan import Models
from fastsrgan.train.run import train
from fastsrgan.train.state import Position
from tools import settings_page

ROOT = Path(__file__).parent.parent
ROWS = pytest.mark.parametrize("row", SETTINGS.values(), ids=list(SETTINGS))
LOW = [[1, 1, 3]]
STOOD = Position(2, 1, 3, 5, 40, 7, 0.5, 1, 0.4, stale=2, resident=3, left=["a", "b"], before=0.25)
# What a setting needs beside it, and texts that some setting takes.
BESIDE = {"interp": {"geometry": "segsrgan"}, "synthetic": {"structure": "3"}, "noise_from": {"noise": 0.5}}
TEXTS = ("xy", "3,42", "5:0.46:0.04", "gibbs:0.3")


def another(row: Setting, default: object) -> object:
    """An allowed value of a setting that is not its default."""
    if row.kind is bool:
        return not default
    if row.kind is tuple:
        return ((2.0, 2.0, 4.0),)
    tried = [choice for choice in row.choices if choice != "auto"] or (
        TEXTS if row.kind is str else map(row.kind, (3, 32, 0.25, 0.75))
    )
    return next(value for value in tried if value != default and not row.hint(value))


@pytest.fixture(scope="module")
def parser():
    return cli.build_parser()


def typed(parser, *words: str) -> TrainConfig:
    return cli_train.build_config(parser.parse_args(cli.normalised(["train", "c.zarr", "-o", "run", *words])))


def actions(parser):
    """The parser of ``train``."""
    return next(a for a in parser._actions if a.dest == "command").choices["train"]


# --- the rows -------------------------------------------------------------------------------------------------------


@ROWS
def test_a_row_is_whole(row, parser):
    assert row.help and row.help == row.help.strip() and not row.help.endswith(".")
    assert row.resume in RESUMED and row.group in (BASIC, ADVANCED)
    assert row.kind in (int, float, bool, str, tuple)
    assert row.default == () or not row.hint(row.default), "the default is allowed"
    assert row.default is None or type(row.default) is row.kind
    assert (row.default is None) <= row.optional
    assert set(row.presets) <= set(PRESETS) and not any(map(row.hint, row.presets.values()))
    # Free text has a name in the help and a check.
    assert row.kind is not str or row.choices or (row.metavar and row.check)
    option = next(a for a in actions(parser)._actions if a.dest == row.name)
    assert tuple(option.option_strings) == row.flags and row.help in option.help.replace("%%", "%")
    assert f"\n| `{row.name}` |" in settings_page.PAGE.read_text(encoding="utf8")


def test_the_page_is_made_of_the_rows():
    told = settings_page.PAGE.read_text(encoding="utf8")
    assert told == settings_page.page(), "run python tools/settings_page.py"
    assert settings_page.main(["--check"]) == 0
    assert told.count("\n| `") == len(SETTINGS)


def test_help_shows_the_basic_settings_first(parser):
    groups = {g.title.partition(" ")[0]: [a.dest for a in g._group_actions] for g in actions(parser)._action_groups}
    assert list(groups).index(BASIC) < list(groups).index(ADVANCED)
    for name in (BASIC, ADVANCED):
        assert groups[name] == [row.name for row in SETTINGS.values() if row.group == name]
    assert len(groups[BASIC]) <= 30 and {"new_low_res", "epochs", "batch_size", "preset"} <= set(groups[BASIC])


@ROWS
def test_a_value_is_typed_or_read_from_a_file_and_recorded(row, parser, tmp_path):
    value = another(row, row.default)
    beside = BESIDE.get(row.name, {})
    listed = [list(t) for t in value] if row.kind is tuple else value
    config = from_mapping({"new_low_res": LOW, **beside, row.name: listed})
    assert getattr(config, row.name) == value and type(getattr(config, row.name)) is row.kind
    (tmp_path / "c.yaml").write_text(config.to_yaml(), encoding="utf8")
    assert typed(parser, "--config", str(tmp_path / "c.yaml")) == config
    others = [word for name, one in beside.items() for word in (SETTINGS[name].flags[-1], str(one))]
    others += [] if row.kind is tuple else ["-n", "1", "1", "3"]
    for flag in row.flags:
        words = map(str, value[0]) if row.kind is tuple else [str(value)]
        assert typed(parser, *others, flag, *words) == config, flag


@ROWS
def test_bounds_are_kept(row):
    step = 1 if row.kind is int else 1e-6
    inside = [(row.low, 0), (row.high, 0), (row.above, step), (row.below, -step)]
    outside = [(row.low, -step), (row.high, step), (row.above, 0), (row.below, 0)]
    for bound, away in inside:
        assert bound is None or row.check or not row.hint(row.kind(bound + away)), bound
    for value in (bound + away for bound, away in outside if bound is not None):
        with pytest.raises(ModelError, match=rf"^config: {row.name}: .* is not allowed") as caught:
            SMALL.replace(**{row.name: row.kind(value)})
        assert caught.value.hint
    for value in [float("nan"), float("inf")] if row.kind is float else []:
        with pytest.raises(ModelError, match="a finite number"):
            SMALL.replace(**{row.name: value})
    if row.choices:
        with pytest.raises(ModelError, match=f"one of {', '.join(row.choices)}"):
            SMALL.replace(**{row.name: "nothing like it"})


def test_an_unknown_fact_of_a_row_is_an_error():
    with pytest.raises(TypeError, match="lowest"):
        setting(0, "help", FREE, lowest=0)


def test_no_value_is_typed_as_none(parser, tmp_path):
    """For every setting that may have none: beside a preset or a file, which say another."""
    tried = [row for row in SETTINGS.values() if row.optional or (row.kind is str and not row.choices)]
    assert {"steps_per_epoch", "noise_from", "resident_subjects", "flips", "structure"} <= {row.name for row in tried}
    for row in tried:
        given = SMALL.replace(**BESIDE.get(row.name, {}), **{row.name: another(row, row.default)})
        (tmp_path / "c.yaml").write_text(given.to_yaml(), encoding="utf8")
        made = typed(parser, "--config", str(tmp_path / "c.yaml"), row.flags[-1], "none")
        assert made == given.replace(**{row.name: None if row.optional else ""})
    action = next(a for a in actions(parser)._actions if a.dest == "flips")
    assert action.help.endswith("(none)")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--batch-size 0", "--batch-size"),
        ("-e 0", "--epochs"),
        ("-ps 18", "--patch-size"),
        ("--flips xx", "--flips"),
        ("--noise 0.1 --noise-from 0.2", "--noise-from"),
        ("--synthetic 0.5", "--synthetic"),
    ],
)
def test_a_typed_value_that_is_not_allowed_is_a_usage_error_and_one_of_a_file_is_not(parser, tmp_path, words, option):
    with pytest.raises(UsageError, match=f"^{option}: "):
        typed(parser, "-n", "1", "1", "3", *words.split())
    name = option[2:].replace("-", "_")
    (tmp_path / "c.yaml").write_text(f"new_low_res: [1, 1, 3]\n{name}: {'xx' if name == 'flips' else -9}\n")
    with pytest.raises(ModelError, match=rf"c\.yaml: {name}: "):
        typed(parser, "--config", str(tmp_path / "c.yaml"), "--lr-gen", "0.1")


# --- resume ---------------------------------------------------------------------------------------------------------


def other_config(row: Setting) -> tuple[TrainConfig, TrainConfig]:
    """Settings of a snapshot, and of the run that goes on with another value of ``row``."""
    # Small enough to compute, many epochs so that the first one may be another.
    then = SMALL.replace(epochs=4, precision="fp32", **BESIDE.get(row.name, {}))
    return then, then.replace(**{row.name: another(row, getattr(then, row.name))})


@ROWS
def test_a_resumed_run_does_with_another_value_what_the_row_says(row, tmp_path, monkeypatch, caplog):
    then, now = other_config(row)
    assert snapshots.changes(then, now) == {row.name: row.resume}
    (tmp_path / "config.yaml").write_text(then.to_yaml(), encoding="utf8")
    monkeypatch.setattr(snapshots, "data_identity", lambda store: "data")
    run = SimpleNamespace(config=now, last_epoch=now.epochs, store=None, ranks=SimpleNamespace(world=1))
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        at = snapshots.placed(run, dataclasses.replace(STOOD), tmp_path, "data")
    assert (f"{row.name} {getattr(then, row.name)} -> " in caplog.text) == (row.resume in (NEW, KEPT, ANEW))
    assert (f"another {row.name}: epoch 2 begins anew" in caplog.text) == (row.resume == ANEW)
    judged = dict.fromkeys(("best", "best_epoch", "best_dice")) | {"stale": 0}
    anew = dict.fromkeys(("group", "step", "steps", "epoch_updates", "before"), 0) | {"resident": None, "left": None}
    assert at == dataclasses.replace(STOOD, **{JUDGED: judged, ANEW: anew}.get(row.resume, {}))
    assert (f"not in this one: {row.name}" in caplog.text) == (row.resume == START)
    assert bool(caplog.records) == (row.resume in (NEW, KEPT, ANEW, START))
    assert run.config == (then if row.resume == START else now), "what is recorded"
    if row.resume == KEPT:
        caplog.clear()
        run.config = then.replace(**{row.name: "auto"})
        snapshots.placed(run, Position(), tmp_path, "data")
        assert not caplog.records


@pytest.mark.parametrize(("schedule", "told"), [("constant", FREE), ("linear", NEW), ("cosine", NEW)])
def test_more_epochs_are_said_where_they_change_the_rates(schedule, told):
    then = SMALL.replace(epochs=4, lr_schedule=schedule)
    assert snapshots.changes(then, then.replace(epochs=6)) == {"epochs": told}


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--synthetic 0.3", "(--structure 3,42)"),
        ("--slice-axis S --geometry segsrgan", "(--geometry physical)"),
        ("--interp sitk --geometry physical", "(--geometry segsrgan)"),
        ("--profile-box 1 --geometry segsrgan", "(0, or --geometry physical)"),
    ],
)
def test_a_hint_about_options_can_be_typed(parser, words, hint):
    with pytest.raises(UsageError) as told:
        typed(parser, "-n", "1", "1", "3", *words.split())
    assert str(told.value).endswith(hint)


def test_a_preset_alone_changes_no_run_that_is_resumed(parser, tmp_path):
    """Its record has a value for every setting, which a preset does not replace."""
    (tmp_path / "config.yaml").write_text(SMALL.to_yaml(), encoding="utf8")
    words = ["train", "c.zarr", "-o", str(tmp_path), "--resume"]
    assert cli.main([*words, "--preset", "recommended"]) == 2
    assert cli_train.build_config(parser.parse_args([*words, "--preset", "code"])) == SMALL


def test_weights_to_begin_with_are_told_to_be_unused_where_a_snapshot_is(tmp_path, caplog):
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    for given, told in ((None, 0), ("adult", 1)):
        with caplog.at_level(logging.WARNING, "fastsrgan"):
            assert run_module.has_snapshot(ALONE, tmp_path, SMALL, given)
        assert len(caplog.records) == told
    assert "the run has a snapshot, -w adult is not used" in caplog.text


def test_another_network_is_refused(tmp_path):
    """Every row that says so, in a real run folder, which is left as it was."""
    store = make_store(tmp_path, masks=True)
    then = SMALL.replace(epochs=1, steps_per_epoch=1, critic_iterations=1)
    train(store, tmp_path / "run", then)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    for row in SETTINGS.values():
        if row.resume == MATCH:
            value = another(row, getattr(then, row.name))
            with pytest.raises(ModelError):
                train(store, tmp_path / "run", then.replace(epochs=2, **{row.name: value}), resume=True)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_a_resumed_run_takes_other_rates_and_decays():
    then, now = (Models(config, 0, torch.device("cpu")) for config in (SMALL, SMALL.replace(beta1=0.25, lr_gen=0.5)))
    now.load_state(then.state())
    now.set_rates(1.0)
    assert now.optimiser_g.adam.param_groups[0]["betas"] == (0.25, SMALL.beta2)
    assert now.optimiser_g.adam.param_groups[0]["lr"] == 0.5


def test_a_resumed_run_may_begin_and_end_a_moving_average(tmp_path):
    store = make_store(tmp_path, train=1)
    then = SMALL.replace(epochs=1, steps_per_epoch=1, critic_iterations=1)
    train(store, tmp_path / "run", then)
    for epochs, ema in ((2, 0.5), (3, 0.75), (4, 0.0)):
        now = then.replace(epochs=epochs, ema=ema)
        assert train(store, tmp_path / "run", now, resume=True)["updates"] == epochs
        header = safetensors.read_header(checkpoint.newest(tmp_path / "run") / checkpoint.MODEL)
        assert bool(header.ema) == (ema > 0)


# --- one place ------------------------------------------------------------------------------------------------------


def test_no_other_module_lists_settings():
    """Lists, tuples, sets and dictionaries with more than four names of settings that inference does not share."""
    shared = set(inspect.signature(fastsrgan.infer_volume).parameters)
    names = set(SETTINGS) - shared
    found = []
    for path in sorted((ROOT / "fastsrgan").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            listed = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            named = {item.value for item in listed if isinstance(item, ast.Constant)} & names
            if len(named) > 4:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {sorted(named)}")
    assert not found, "\n".join(found)
