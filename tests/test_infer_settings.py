"""The rows of the options of an inference: what follows from them agrees, whatever option is added."""

import argparse
import dataclasses
import inspect

import numpy as np
import pytest

from fastsrgan.cli.main import build_parser
from fastsrgan.core.files import finite
from fastsrgan.errors import UsageError
from fastsrgan.infer import bids, values
from fastsrgan.infer import files as infer_files
from fastsrgan.infer import volume as infer
from fastsrgan.infer.settings import ALWAYS, CHANGED, InferSettings, given_options, options
from fastsrgan.io import nifti as images
from fastsrgan.model.arithmetic import TYPES

# Another allowed value of every option.
OTHER = {
    "patch": 64,
    "step": 16,
    "budget": 3.0,
    "new_resolution": (1.0, 1.0, 2.0),
    "geometry": "segsrgan",
    "window": "gaussian",
    "batch": 3,
    "precision": "bf16",
    "compile": "off",
    "precision_check": True,
    "device": "cpu",
    "max_memory": 2**30,
    "mask": "mask.nii",
    "outside": "zero",
    "flips": "xz",
    "upright": "on",
    "agree": 0.5,
    "adapt": "off",
    "uncertainty": True,
    "slice_thickness": 2.5,
    "profile": "box",
    "threshold": 0.25,
    "largest_component": True,
    "min_size": 5.0,
    "dtype": "input",
    "save_prob": True,
    "save_residual": True,
    "png": True,
    "split_volume": True,
    "series": "2",
    "volume": 1,
    "max_voxels": 10**6,
}
DEFAULTS = {f.name: f.default for f in dataclasses.fields(InferSettings)}


def parsed(*words: str) -> dict:
    return given_options(build_parser().parse_args(["infer", "a.nii", "-o", "out", *words]))


def test_every_option_has_another_value_here():
    assert OTHER.keys() == options().keys()


@pytest.mark.parametrize("name", OTHER)
def test_a_resumed_run_compares_what_decides_about_a_result_and_nothing_else(name):
    row, changed = options()[name], InferSettings(**{name: OTHER[name]})
    recorded = row.recorded in (ALWAYS, CHANGED)
    for one, two in ((InferSettings(), changed), (changed, InferSettings())):
        differing = two.differing(finite(one.record()))
        assert differing == [row.record_as or name] * (row.decides and recorded)
    assert InferSettings(**{name: OTHER[name]}).differing(finite(changed.record())) == []
    # What is compared elsewhere is so by name, in ``infer_job.finished``.
    assert recorded or not row.decides or name in ("series", "volume")
    # A run by slabs goes on only where the voxels would be the same.
    goes_on = InferSettings().deciding() == changed.deciding()
    assert goes_on == (row.of_files or not row.decides or name == "mask")


def test_a_record_of_something_else_is_no_match():
    assert "patch" in InferSettings().differing({})
    assert InferSettings().differing(InferSettings().record() | {"a later option": 1}) == ["a later option"]


@pytest.mark.parametrize("function", [infer.infer_volume, infer_files.infer_files, bids.infer_bids])
def test_the_public_functions_name_the_options_with_their_defaults(function):
    files = function is not infer.infer_volume
    parameters = inspect.signature(function).parameters
    named = {name: parameters[name].default for name in options(files)}
    assert named == {name: DEFAULTS[name] for name in options(files)}
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_keywords_that_are_none_are_refused_as_pythons_own(tmp_path):
    image = np.ones((8, 8, 8)), np.eye(4), None
    for wrong in ({"stepp": 3}, {"threshold": 0.5}):
        with pytest.raises(TypeError, match="unexpected keyword"):
            infer.infer_volume(*image, **wrong)
    with pytest.raises(TypeError, match="unexpected keyword"):
        infer_files.infer_files([tmp_path / "a.nii"], tmp_path / "out", stepp=3)


def test_the_command_line_and_the_functions_have_the_same_defaults():
    assert InferSettings(**parsed()) == InferSettings(step=None), "the command line's step is the device's"
    words = ["--patch", "none", "--step", "16", "--new-resolution", "0.5", "--max-memory", "2G", "--budget", "1m"]
    words += ["--check-precision", "--min-size", "3", "--save_prob".replace("_", "-")]
    changed = {"patch": None, "step": 16, "new_resolution": 0.5, "max_memory": 2**31, "budget": 60.0}
    changed |= {"precision_check": True, "min_size": 3.0, "save_prob": True}
    assert parsed(*words) == DEFAULTS | changed
    assert parsed("--new-resolution", "1", "1", "2")["new_resolution"] == [1.0, 1.0, 2.0]
    assert parsed("--crop-to-head")["mask"] == "head" and parsed("--mask", "m.nii")["mask"] == "m.nii"
    with pytest.raises(UsageError, match="--mask: excludes --crop-to-head"):
        parsed("--mask", "m.nii", "--crop-to-head")


@pytest.mark.parametrize(
    ("device", "given", "step"),
    [
        ("cuda:0", {}, 30),
        ("cpu", {}, 64),
        ("cpu", {"patch": 32}, 16),
        ("cuda", {"patch": 32}, 16),
        ("cpu", {"patch": (128, 128, 64)}, (64, 64, 32)),
        ("cuda:1", {"patch": (128, 128, 48)}, (30, 30, 24)),
        ("cpu", {"patch": None}, 64),
        ("cpu", {"geometry": "segsrgan"}, 30),
        ("cpu", {"budget": 60}, 30),
        ("cpu", {"step": 20}, 20),
        ("cpu", {"step": "auto"}, "auto"),
    ],
)
def test_the_step_that_is_not_given_is_the_papers_on_cuda_and_half_the_patch_on_a_cpu(device, given, step):
    settings = InferSettings(**{"step": None, **given}).on(device)
    assert (settings.step, settings.device) == (step, device)
    assert InferSettings().on(device).step == 30, "the functions' default is the paper's on any device"


def test_rows_agree_with_what_acts_on_them():
    rows = options()
    assert rows["precision"].choices == ("auto", *TYPES)
    assert DEFAULTS["max_voxels"] == images.MAX_VOXELS


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch": 30},
        {"patch": (16, 16)},
        {"step": 0},
        {"step": 129},
        {"step": "dense"},
        {"patch": None, "step": 0},
        {"geometry": "itk"},
        {"window": "welch"},
        {"batch": 0},
        {"batch": "many"},
        {"precision": "int8"},
        {"compile": "fast"},
        {"budget": -1},
        {"max_memory": 0},
        {"flips": "xx"},
        {"new_resolution": "fine"},
        {"new_resolution": (1, 1)},
        {"new_resolution": -1},
        {"new_resolution": (1, 1, "same")},
        {"new_resolution": float("nan")},
        {"threshold": 1.0},
        {"threshold": float("nan")},
        {"min_size": -1},
        {"min_size": float("inf")},
        {"dtype": "int8"},
    ],
    ids=str,
)
def test_values_that_no_volume_could_be_run_with_are_refused(wrong):
    with pytest.raises(UsageError):
        InferSettings(**wrong)


def test_values_at_the_end_of_what_is_allowed_are_taken():
    for right in (
        *({"patch": 8, "step": 8}, {"patch": 20, "step": 1}, {"batch": 1}, {"budget": 0}, {"max_memory": 1}),
        *({"threshold": 0}, {"threshold": 0.999}, {"min_size": 0}, {"agree": 1e-9}, {"agree": "off"}),
        *({"slice_thickness": 0.01}, {"slice_thickness": "auto"}, {"new_resolution": "same"}),
        *({"new_resolution": values.SPACING_LIMITS[0]}, {"new_resolution": (1, 1, values.SPACING_LIMITS[1])}),
    ):
        InferSettings(**right)
    low, high = values.SPACING_LIMITS
    for wrong in (
        *({"patch": 4, "step": 4}, {"patch": 18, "step": 4}, {"patch": 16, "step": 17}, {"agree": 0}),
        *({"agree": float("inf")}, {"agree": "on"}, {"slice_thickness": 0.0}, {"slice_thickness": "thick"}),
        *({"new_resolution": low * 0.99}, {"new_resolution": high * 1.01}, {"budget": float("nan")}),
    ):
        with pytest.raises(UsageError):
            InferSettings(**wrong)
    with pytest.raises(UsageError, match="try 16 or 20"):
        values.check_tile(18, 4)
    with pytest.raises(UsageError, match="try 8 or 12"):
        values.check_tile(3, 4)


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (values.tile_edge, {"none": None, "NONE": None, "64": 64}),
        (values.batch_size, {"auto": "auto", "3": 3}),
        (values.voxels, {"1e9": 10**9, "1": 1}),
        (values.size, {"same": "same", "SAME": "same", "0.5": 0.5}),
        (values.word_or_number("auto", "off"), {"auto": "auto", "OFF": "off", "0.01": 0.01}),
    ],
)
def test_words_and_numbers_of_the_command_line(parse, words):
    assert {word: parse(word) for word in words} == words
    for wrong in ("some", "", "0.5" if parse is values.tile_edge else "x1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is n"):
            parse(wrong)
    if parse is values.voxels:
        for wrong in ("0", "0.9", "-1", "nan", "inf"):
            with pytest.raises(argparse.ArgumentTypeError, match="is not a number of voxels"):
                parse(wrong)


def test_help_shows_the_basic_options_first_and_every_option_once(capsys):
    (infer,) = (a.choices["infer"] for a in build_parser()._actions if hasattr(a, "choices") and a.choices)
    groups = {g.title.partition(" ")[0]: [a.dest for a in g._group_actions] for g in infer._action_groups}
    assert list(groups)[-3:] == ["basic", "advanced", "images"]
    assert sorted(n for g in ("basic", "advanced") for n in groups[g] if n in options()) == sorted(options())
    assert {"patch", "mask", "uncertainty", "png", "device"} <= set(groups["basic"]) and len(groups["basic"]) <= 15
    assert groups["images"] == ["bids", "participant_label", "session_label", "suffix", "desc"]
    text = infer.format_help()
    assert text.index("basic options") < text.index("advanced options") < text.index("images of a BIDS dataset")
    assert "usage: fastsrgan infer INPUT [INPUT ...] -o DIR [options]" in text
