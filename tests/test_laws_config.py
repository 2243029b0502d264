"""Texts that are settings, what does not go together, and files of settings, each up to its limits."""

from __future__ import annotations

import pytest

from fastsrgan import config
from fastsrgan.config import TrainConfig, from_mapping, read_yaml
from fastsrgan.errors import ModelError, SettingsError

LOW = ((1.0, 1.0, 3.0),)


@pytest.mark.parametrize(
    ("text", "values"),
    [("", ()), ("3", (3,)), (" 42 , 3,42", (3, 42)), ("32767,1", (1, 32767))],
)
def test_values_of_a_label_are_whole_numbers_in_order_each_once(text, values):
    assert config.label_values(text) == values


@pytest.mark.parametrize("text", ["0", "32768", "3,", "3,,4", "-3", "x", "3.0", "9" * 30])
def test_what_is_no_value_of_a_label_is_refused(text):
    with pytest.raises(ModelError, match=r"config: structure: .*values from 1 to 32767"):
        config.label_values(text)
    with pytest.raises(SettingsError, match="structure"):
        TrainConfig(new_low_res=LOW, structure=text)


def test_gaussians_of_tissues_are_those_of_each_contrast_in_the_order_of_their_values():
    assert config.tissue_gaussians("") == ()
    assert config.tissue_gaussians("5:0.46:0.04, 1 : 1 : 0") == (((1, 1.0, 0.0), (5, 0.46, 0.04)),)
    assert config.tissue_gaussians("2:0.5:1/3:0.25:0.125") == (((2, 0.5, 1.0),), ((3, 0.25, 0.125),))


@pytest.mark.parametrize(
    "text", ["1:0:0.1", "1:1.01:0", "1:0.5:-0.1", "1:0.5:1.1", "1:0.5", "0:0.5:0.1", "1:x:0", "1:0.5:0/"]
)
def test_gaussians_that_cannot_be_are_refused(text):
    with pytest.raises(ModelError, match="config: tissue_means"):
        config.tissue_gaussians(text)
    with pytest.raises(SettingsError, match="tissue_means"):
        TrainConfig(new_low_res=LOW, tissue_means=text)


def test_amounts_are_named_once_and_from_zero_up():
    assert config.named_amounts("") == {} and config.named_amounts(" a : 0.5 ,b:0") == {"a": 0.5, "b": 0.0}
    for text in ("a", "a:x", "a:-0.1", "a:inf", "a:nan", "a:1,a:2", "1a:1", ":1", "a:1,"):
        with pytest.raises(ModelError, match="config: artefacts"):
            config.named_amounts(text)


def test_edges_of_patches_are_multiples_of_four_from_sixteen_up_and_the_nearest_are_named():
    assert [config.check_patch(edge) for edge in (16, 20, 1024)] == [""] * 3
    assert config.check_patch(12).endswith("try 16 or 20") and config.check_patch(63).endswith("try 60 or 64")
    assert [config.check_flips(axes) for axes in ("", "x", "zyx")] == [""] * 3
    assert all(config.check_flips(axes) for axes in ("xx", "w", "xyw"))
    good, wrong = (
        [((1.0, 1.0, 3.0),), LOW * 2],
        [(1.0, 1.0), (1.0,) * 4, (0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, float("inf")), (1.0, float("nan"), 1.0)],
    )
    wrong = [(), LOW * 3, *(pair for t in wrong for pair in ((t,), (t, *LOW), (*LOW, t)))]
    assert [config.check_resolutions(v) for v in good] == ["", ""] and all(config.check_resolutions(v) for v in wrong)
    assert config.triples([1, 1, 3], "x") == LOW and config.triples([[1, 1, 2], (1, 1, 4)], "x") == (
        (1, 1, 2),
        (1, 1, 4),
    )
    assert config.triples([], "x") == ()


@pytest.mark.parametrize(
    ("given", "names", "allowed"),
    [
        ({"profile_box": 0.5, "geometry": "segsrgan"}, ("profile_box",), {"profile_box": 0.0}),
        ({"synthetic": 0.5}, ("synthetic",), {"structure": "3"}),
        ({"synthetic": 0.5, "structure": "3", "fit_mask": True}, ("synthetic",), {"synthetic": 0.0}),
        (
            {"synthetic": 0.5, "structure": "3", "image_cropping_method": "overlapping_with_mask"}, ("synthetic",),
            {"image_cropping_method": "bounding_box"},
        ),
        ({"noise": 0.1, "noise_from": 0.11}, ("noise_from",), {"noise_from": 0.1}),
        ({"motion": 0.5, "artefacts": "motion:1"}, ("artefacts",), {"motion": 0.0}),
        ({"epochs": 3, "init_epoch": 4}, ("init_epoch",), {"init_epoch": 3}),
        ({"slice_axis": "S", "geometry": "segsrgan"}, ("slice_axis",), {"geometry": "physical"}),
        ({"interp": "sitk"}, ("interp",), {"geometry": "segsrgan"}),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_under_its_name_and_what_does_is_taken(given, names, allowed):
    with pytest.raises(SettingsError) as caught:
        TrainConfig(new_low_res=LOW, **given)
    assert tuple(name for name, _, _ in caught.value.faults) == names
    TrainConfig(new_low_res=LOW, **(given | allowed))


def test_a_run_that_continues_is_named_by_its_first_epoch():
    assert [TrainConfig(new_low_res=LOW, init_epoch=n).continues for n in (1, 2)] == ["", "from_epoch_2"]
    assert TrainConfig(new_low_res=LOW).physical and not TrainConfig(new_low_res=LOW, geometry="segsrgan").physical


def test_numbers_are_no_booleans_nor_the_reverse_and_as_large_as_the_machine_has_them():
    rows = config.SETTINGS
    assert rows["epochs"].plain(2**63 - 1, "f") == 2**63 - 1 and rows["lr_gen"].plain(1, "f") == 1.0
    assert rows["noise_from"].plain(None, "f") is None and rows["residual"].plain(False, "f") is False
    for name, value in (
        ("epochs", 2**63), ("epochs", True), ("epochs", 1.0), ("lr_gen", True), ("lr_gen", 10**301), ("lr_gen", None),
        ("residual", 1), ("flips", 3), ("epochs", None),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=f"^f: {name}: "):
            rows[name].plain(value, "f")


def test_names_may_have_dashes_and_a_preset_stands_behind_what_is_given():
    made = from_mapping({"new-low-res": [1, 1, 3], "preset": "paper", "beta1": 0.25})
    assert (made.beta1, made.batch_size, made.lambda_gp, made.preset) == (0.25, 32, 100.0, "paper")
    with pytest.raises(SettingsError, match=r"c: learning: unknown setting \(see docs/config.md\)"):
        from_mapping({"new_low_res": [1, 1, 3], "learning": 1}, "c")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &x [1]\nb: *x\n", "aliases are not taken"), ("epochs: 1\nepochs: 2\n", "epochs is there twice"),
        ("a: " + "[" * 8 + "]" * 8, "more than 8 deep"), ("[1, 2]", "holds no settings"),
        ("epochs: [1\n", "is not plain YAML"), ("# " + "x" * (1 << 17), "is too large for settings"),
    ],
)  # fmt: skip
def test_files_that_are_no_settings_are_refused(tmp_path, text, told):
    (tmp_path / "c.yaml").write_text(text, encoding="utf8")
    with pytest.raises(ModelError, match=told):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ModelError, match="is not a regular file"):
        read_yaml(tmp_path)


def test_a_file_of_settings_is_read_up_to_its_limits(tmp_path):
    """Its size, its depth, numbers without a point, and a mark at its beginning."""
    text = "lr_gen: 1e-4\nx: 2.5E3\ny: -1e2\na: " + "[" * 6 + "]" * 6 + "\n"
    text = "\ufeff" + text + "#" * ((1 << 17) - len(text) - 3)
    (tmp_path / "c.yaml").write_text(text, encoding="utf8")
    found = read_yaml(tmp_path / "c.yaml")
    assert (found["lr_gen"], found["x"], found["y"]) == (1e-4, 2500.0, -100.0) and found["a"] == [[[[[[]]]]]]
    for words in ("[1, 1, 3]", "[[1, 1, 2], [1, 1, 4]]"):
        (tmp_path / "c.yaml").write_text(f"new_low_res: {words}\n", encoding="utf8")
        assert config.from_yaml(tmp_path / "c.yaml").new_low_res in (LOW, ((1, 1, 2), (1, 1, 4)))
