"""Forms of layers: fixed or timed once, kept in a file that nothing can spoil, the same again after a resume."""

from __future__ import annotations

import contextlib
import json
import logging
import os

import pytest
import torch

from fastsrgan import doctor
from fastsrgan.config import TrainConfig
from fastsrgan.core.ranks import ALONE
from fastsrgan.errors import UsageError
from fastsrgan.model.cpu import critic as critic_convs
from fastsrgan.model.cpu import forms, fused
from fastsrgan.train.run import keep_arithmetic

WEIGHT = torch.ones(64, 64, 3, 3, 3)
SHAPE = (2, 64, 16, 16, 16)
LAYER = "conv3 training 64>64 16x16x16"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, a quiet machine, and what is known forgotten."""
    monkeypatch.setenv("FASTSRGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(forms, "UNDISTURBED", 0.0)
    monkeypatch.setattr(forms, "_tables", {})
    return tmp_path / "cache" / "forms.json"


@pytest.fixture
def times(monkeypatch):
    """What timing finds; the list counts how often it was done."""
    asked = []

    def timed(shape, weight, fixed, trials):
        asked.append(fixed)
        return {"library": 2.0, "winograd": 1.0}, False

    monkeypatch.setattr(forms, "_time", timed)
    return asked


def choose(fixed: str = "library") -> str:
    return forms.choose("conv3 training", SHAPE, WEIGHT, fixed, lambda x, w: {})


def forget() -> None:
    """As a new process."""
    forms._tables.clear()


# --- choice -------------------------------------------------------------------------------------------------------


def test_fixed_takes_the_rule_and_measured_the_faster_form(cache, times):
    with forms.job("fixed"):
        assert choose() == "library" and choose("winograd") == "winograd" and not times
    with forms.job("measured") as choices:
        assert choose() == choose() == "winograd" and len(times) == 1
    assert choices.record() == {"mode": "measured", "forms": {LAYER: "winograd"}}
    with forms.job("fixed", choices.record()["forms"]):
        assert choose() == "winograd", "kept from a snapshot"
    assert list(json.loads(cache.read_text())["machines"][forms.machine()]) == [LAYER] and len(times) == 1


def test_the_fixed_rule_of_a_3_3_3_layer_follows_from_channels_and_size(monkeypatch):
    """Winograd's products from 48 channels on, where whole tiles of four voxels are at most half as many again; they
    may be timed from 16 on, apart for passes and for steps."""
    asked = []
    monkeypatch.setattr(forms, "choose", lambda kind, shape, weight, fixed, trials: asked.append(kind) or fixed)

    def form(inputs: int, outputs: int, size: int) -> str:
        return fused.KERNEL3._form(torch.empty(1, inputs, size, size, size), torch.empty(outputs, inputs, 3, 3, 3))

    channels = [form(*few, 16) for few in ((48, 48), (47, 48), (48, 47), (64, 64))]
    assert channels == ["winograd", "library", "library", "winograd"]
    assert [n for n in range(12, 21) if form(48, 48, n) == "winograd"] == [12, 14, 15, 16, 18, 19, 20]
    asked.clear()
    assert {form(15, 64, 16), form(64, 15, 16), form(48, 48, 13)} == {"library"} and not asked
    with torch.inference_mode():
        assert form(16, 16, 16) == "library"
    assert form(16, 16, 16) == "library" and asked == ["conv3 inference", "conv3 training"]


def test_a_tie_is_the_rules():
    assert forms.faster({"a": 1.0, "b": 1.1}, "b") == "b"
    assert forms.faster({"a": 1.0, "b": 1.3}, "b") == "a"


@pytest.mark.parametrize(
    ("weight", "shape"), [(WEIGHT.double(), SHAPE), (WEIGHT[:2, :2], (1, 2, 8, 8, 8))], ids=["float64", "small"]
)
def test_what_is_not_worth_it_is_never_timed(cache, times, weight, shape):
    with forms.job("measured"):
        assert forms.choose("conv3 training", shape, weight, "library", lambda x, w: {}) == "library"
    assert not times


def test_the_variable_and_the_setting(monkeypatch):
    monkeypatch.setenv("FASTSRGAN_FORMS", "measured")
    assert (forms.wanted_mode(), forms.wanted_mode("fixed")) == ("measured", "fixed")
    monkeypatch.delenv("FASTSRGAN_FORMS")
    assert (forms.wanted_mode(), forms.wanted_mode("auto", "measured")) == ("fixed", "measured")
    monkeypatch.setenv("FASTSRGAN_FORMS", "fastest")
    with pytest.raises(UsageError, match="'fastest' is not allowed"):
        forms.wanted_mode()


def test_a_training_measures_and_other_work_does_not_unless_told(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTSRGAN_FORMS")
    monkeypatch.setattr(forms, "_current", None)
    assert forms.current().mode == "fixed"
    config = TrainConfig(new_low_res=((1.0, 1.0, 3.0),))
    for setting, mode in (("auto", "measured"), ("fixed", "fixed")):
        with contextlib.ExitStack() as held:
            keep_arithmetic(held, tmp_path, config.replace(layer_forms=setting), torch.device("cpu"), ALONE, False)
            assert forms.current().mode == mode
    assert forms.current().mode == "fixed"


def test_a_busy_machine_and_a_spent_budget_leave_the_rule(cache, times, monkeypatch):
    monkeypatch.setattr(forms, "_time", lambda *a: ({"library": 2.0, "winograd": 1.0}, True))
    with forms.job("measured") as choices:
        assert choose() == "library" and choices.left == 1 and not cache.exists()
    with forms.job("measured") as choices:
        choices.seconds = forms.BUDGET + 1
        assert choose() == "library" and choices.left == 1
    assert "1 left at the fixed form" in choices.line()


def test_a_job_keeps_a_form_whatever_the_file_says_later(cache, times):
    with forms.job("measured"):
        assert choose() == "winograd"
        forms.table_of_machine()[LAYER]["seconds"] = {"library": 0.1, "winograd": 1.0}
        assert choose() == "winograd"


def test_the_key_of_a_result_tells_the_forms_it_was_made_with(cache, times, monkeypatch):
    with forms.job("fixed") as fixed:
        choose()
    with forms.job("measured") as measured:
        before = measured.key()
        choose()
        after = measured.key()
    with forms.job("fixed", {LAYER: "winograd"}) as kept:
        choose()
    keys = [fixed.key(), before, after, kept.key()]
    assert fixed.key() == ["fixed"] and all(a != b for i, a in enumerate(keys) for b in keys[:i])
    forget()
    with forms.job("measured") as again:
        assert again.key() == after, "a restart finds the times in the file"
    monkeypatch.setattr(forms, "machine", lambda: "another")
    with forms.job("measured") as elsewhere:
        assert elsewhere.key() not in keys


# --- the file -----------------------------------------------------------------------------------------------------


def test_times_are_kept_for_this_machine_only(cache, times, monkeypatch):
    with forms.job("measured"):
        choose()
    assert list(json.loads(cache.read_text())["machines"]) == [forms.machine()]
    assert [p.name for p in cache.parent.iterdir()] == ["forms.json"], "no temporary file is left"
    forget()
    with forms.job("measured"):
        assert choose() == "winograd" and len(times) == 1
    for change in ("another processor", "another torch"):
        monkeypatch.setattr(forms, "machine", lambda change=change: change)
        with forms.job("measured"):
            choose()
    assert len(times) == 3 and len(json.loads(cache.read_text())["machines"]) == 3


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        '{"version": 1}',
        '{"version": 0, "machines": {"M": {"L": {"seconds": {"library": 9.0, "winograd": 1.0}}}}}',
        '{"version": 1, "machines": {"M": 3}}',
        '{"version": 1, "machines": {"M": {"L": []}}}',
        '{"version": 1, "machines": {"M": {"L": {"seconds": {"library": -1.0}}}}}',
        '{"version": 1, "machines": {"M": {"L": {"seconds": {"library": NaN}}}}}',
        '{"version": 1, "machines": {"M": {"L": {"seconds": {"other": 1.0}}}}}',
        b"\xff\xfe\x00".decode("latin1"),
    ],
)
def test_a_damaged_file_is_measured_again(cache, times, text):
    cache.parent.mkdir()
    cache.write_text(text.replace('"M"', json.dumps(forms.machine())).replace('"L"', f'"{LAYER}"'), encoding="latin1")
    with forms.job("measured"):
        assert choose() == "winograd" and len(times) == 1
    forget()
    with forms.job("measured"):
        assert choose() == "winograd" and len(times) == 1, "it was not mended"


@pytest.mark.parametrize("place", ["a file in place of the folder", "a folder in place of the file", "nowhere"])
def test_without_a_place_it_is_done_without(cache, times, monkeypatch, place):
    if place.startswith("a file"):
        cache.parent.write_text("no folder")
    elif place.startswith("a folder"):
        (cache / "in the way").mkdir(parents=True)
    else:
        monkeypatch.setattr(forms, "cache_file", lambda: None)
    with forms.job("measured"):
        assert choose() == choose() == "winograd" and len(times) == 1


def test_where_the_file_is(monkeypatch):
    monkeypatch.delenv("FASTSRGAN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(os.sep, "c"))
    assert str(forms.cache_file()) == os.path.join(os.sep, "c", "fastsrgan", "forms.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", os.path.join(os.sep, "h"))
    assert str(forms.cache_file()) == os.path.join(os.sep, "h", ".cache", "fastsrgan", "forms.json")


def test_one_line_is_logged_and_the_doctor_shows_the_times(cache, times, caplog):
    with caplog.at_level(logging.INFO, "fastsrgan"), forms.job("measured") as choices:
        choose()
        choices.tell()
        choices.tell()
    assert len(caplog.records) == 1 and f"({LAYER}: winograd)" in caplog.text
    found = forms.facts()
    assert found["layers"][LAYER]["form"] == "winograd" and found["file"] == str(cache)
    lines = doctor._forms_lines(found)
    assert lines[1] == f"{LAYER}: winograd (library 2000 ms, winograd 1000 ms)"


# --- the layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("infer", [False, True])
def test_real_timing_leaves_results_random_numbers_and_counts_alone(cache, monkeypatch, infer):
    """Every convolution and the critic's layers, each of their forms; 16 channels so that all have a choice."""
    monkeypatch.setattr(forms, "LEAST_WORK", 0)
    monkeypatch.setattr(forms, "SECONDS", 0.0)
    draw = torch.Generator().manual_seed(1)
    cases = [(fused.KERNEL3, (16, 16), 3), (fused.KERNEL7, (2, 4), 7), (fused.DOUBLING, (4, 4), 3)]
    for convolution, channels, taps in cases:
        x = torch.rand((2, channels[1], 8, 8, 8), generator=draw)
        w = (torch.rand((*channels, *(taps,) * 3), generator=draw) - 0.5).requires_grad_(not infer)
        x.requires_grad_(not infer)

        def run(convolution=convolution, x=x, w=w):
            y = fused.Conv.apply(x, w, convolution)
            return [y] if infer else [y, *torch.autograd.grad(y.square().sum(), [x, w])]

        with torch.inference_mode(infer):
            with forms.job("fixed"):
                expected = run()
            state = torch.get_rng_state()
            with forms.job("measured") as choices:
                run()
            assert torch.equal(torch.get_rng_state(), state)
            assert choices.timed >= 1 and set(choices.used) <= set(forms.table_of_machine())
            names = {form for row in forms.table_of_machine().values() for form in row["seconds"]}
            for form in names:
                with forms.job("fixed", dict.fromkeys(choices.used, form)):
                    for got, wanted in zip(run(), expected, strict=True):
                        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max(), form  # found: 2e-6


def test_the_critics_layers_have_a_choice(cache, monkeypatch):
    monkeypatch.setattr(forms, "LEAST_WORK", 0)
    for size, fixed in ((4, "columns"), (8, "winograd")):
        with forms.job("measured"):
            critic_convs.choose(torch.rand(8, 8, 4, 4, 4), size, True)
        row = forms.table_of_machine()[f"critic layer 8>8 {size}x{size}x{size}"]
        assert set(row["seconds"]) == {fixed, "direct"}
        forget()
        cache.unlink()
    assert type(critic_convs.choose(torch.rand(8, 8, 4, 4, 4), 8, False)) is critic_convs.Direct


def test_times_that_were_kept_before_stay_beside_new_ones(cache):
    """Also those that another process has written since the file was read."""
    rows = {layer: {"seconds": {"library": 1.0}, "fixed": "library"} for layer in "ab"}
    for layer, row in rows.items():
        assert forms.save({layer: row})
    forms._tables.clear()
    assert forms.table_of_machine() == rows
