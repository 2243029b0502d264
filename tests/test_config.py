"""Settings: every nonsense is refused with what came and what is allowed; YAML round trips and is safe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastsrgan.config import CHOICES, TrainConfig, from_mapping, from_yaml
from fastsrgan.errors import ModelError, SettingsError

LOW = [[1, 1, 3]]


def test_defaults_are_the_original_codes():
    c = from_mapping({"new_low_res": LOW})
    assert (c.epochs, c.batch_size, c.kernel_gen, c.kernel_dis, c.lambda_gp, c.critic_iterations) == (
        200,
        16,
        16,
        32,
        10,
        5,
    )
    assert (c.lr_gen, c.lr_dis, c.lambda_rec, c.lambda_adv, c.patch_size) == (1e-4, 1e-4, 1.0, 1e-3, 64)
    assert (c.contrast_max, c.noise, c.eps_per_channel, c.beta1, c.stride) == (0.5, 0.03, True, 0.5, 20)


def test_presets_and_what_is_given_wins():
    paper = from_mapping({"new_low_res": LOW, "preset": "paper"})
    assert (paper.batch_size, paper.lambda_gp, paper.eps_per_channel, paper.preset) == (32, 100.0, False, "paper")
    assert from_mapping({"new_low_res": LOW, "preset": "paper", "batch_size": 4}).batch_size == 4


def test_yaml_round_trip(tmp_path):
    config = TrainConfig(new_low_res=((0.5, 0.5, 2.0), (0.5, 0.5, 4.0)), ema=0.9, steps_per_epoch=7)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf8")
    assert from_yaml(path) == config


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 4}, "did you mean batch_size"),
        ({"patch_size": 62}, "try 60 or 64"),
        ({"patch_size": "64"}, "'64' is not a whole number"),
        ({"batch_size": True}, "not a whole number"),
        ({"batch_size": 0}, "above zero"),
        ({"lambda_gp": -1}, "zero or above"),
        ({"ema": 1.0}, "below 1"),
        ({"profile_box": 1.5}, "profile_box: 1.5 is not allowed .at most 1"),
        ({"profile_box": 0.5, "geometry": "segsrgan"}, "profile_box: segsrgan geometry has no box .0, or"),
        ({"gap": 1.0}, "gap: 1 is not allowed .below 1"),
        ({"bias_field": 1000}, "bias_field: 1000 is not allowed .at most 5"),
        ({"flips": "xyzx"}, "'xyzx' is not allowed .*each once"),
        ({"geometry": "scipy"}, "physical, segsrgan"),
        ({"new_low_res": [1, 1]}, "new_low_res: 1 1 is not allowed .*triples"),
        ({"new_low_res": [[0.5, 1, 3], [1, 1, -3]]}, "new_low_res: 0.5 1 3 and 1 1 -3 is not allowed .*triples"),
        ({"new_low_res": "3"}, "triples"),
        ({"preset": "best"}, "code, paper"),
    ],
)
def test_nonsense_is_refused_in_one_line(values, message):
    with pytest.raises(ModelError, match=message) as caught:
        from_mapping({"new_low_res": LOW, **values})
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


@pytest.mark.fault(19)
def test_all_faults_of_the_settings_are_told_at_once():
    wrong = {"batch_size": 0, "epochs": "many", "lr_gen": -1, "batchsize": 4, "flips": "q", "noise_from": 0.5}
    with pytest.raises(SettingsError, match=r"^c\.yaml: 6 faults: ") as caught:
        from_mapping({"new_low_res": LOW, **wrong}, "c.yaml")
    assert {name for name, _, _ in caught.value.faults} == set(wrong)
    assert all(f"{name}: " in str(caught.value) for name in wrong)
    assert "batch_size: 0 is not allowed, a number above zero" in str(caught.value)


def test_a_value_that_is_not_allowed_brings_no_second_fault():
    for wrong in (
        {"epochs": 0},
        {"synthetic": 2.0},
        {"noise_from": 2.0},
        {"artefacts": "gibbs"},
        {"new_low_res": 3},
        {"geometry": "x"},
    ):
        with pytest.raises(SettingsError) as caught:
            from_mapping({"new_low_res": LOW, "profile_box": 0.5, "slice_axis": "S", **wrong})
        assert [name for name, _, _ in caught.value.faults] == list(wrong)


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch canary']", "epochs: [1", "- 1\n- 2\n", "epochs: !!python/name:os.system"],
)
def test_yaml_that_builds_objects_or_is_broken_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text, encoding="utf8")
    with pytest.raises(ModelError):
        from_yaml(tmp_path / "c.yaml")
    assert not (tmp_path / "canary").exists()


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        from_yaml(tmp_path / "none.yaml")


# --- properties ---------------------------------------------------------------------------------------------------

FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
numbers = st.one_of(st.integers(), st.floats(), st.integers(-3, 300), st.floats(0, 2))
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
allowed = st.one_of([st.tuples(st.just(name), st.sampled_from(values)) for name, values in CHOICES.items()])
settings = st.one_of(st.tuples(st.sampled_from(sorted(FIELDS)), plain), allowed, st.tuples(st.text(max_size=20), plain))


@pytest.mark.fault(19)
@given(st.lists(settings, max_size=6).map(dict))
def test_any_settings_are_a_configuration_that_reads_back_or_one_clear_line(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("settings") / "c.yaml"
    try:
        path.write_text(yaml.safe_dump(values), encoding="utf8", errors="surrogatepass")
        config = from_yaml(path)
    except ModelError as error:
        told = str(error)
        assert "\n" not in told and len(told) < 2000 and told.startswith(f"{path}: ") and error.exit_code == 4
        return
    assert all(getattr(config, name) is not None or FIELDS[name].default is None for name in FIELDS)
    again = path.with_name("again.yaml")
    again.write_text(config.to_yaml(), encoding="utf8")
    assert from_yaml(again) == config


@given(st.text(max_size=200))
def test_any_text_is_settings_or_one_clear_line(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("settings") / "c.yaml"
    path.write_bytes(text.encode("utf8", "surrogatepass"))
    try:
        from_yaml(path)
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


def test_a_missing_line_is_what_the_preset_says_and_null_is_none():
    values = {"new_low_res": LOW, "preset": "recommended"}
    assert from_mapping(values).noise_from == 0 and from_mapping(values | {"noise_from": None}).noise_from is None
    page = (Path(__file__).parents[1] / "docs" / "config.md").read_text(encoding="utf8").replace("\n", " ")
    assert "`none` is `null` in a file, or no line at all where the preset has no value of its own." in page
