"""What is written beyond the plain SR and segmentation: filters, stored types, pictures; each told in the record."""

import json

import numpy as np
import pytest
from nifti_files import rigid
from PIL import Image as Picture

from fastsrgan.cli.main import main
from fastsrgan.errors import UsageError
from fastsrgan.infer.files import infer_files
from fastsrgan.infer.settings import InferSettings
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.model.purpose import Purpose
from fastsrgan.volume.components import ISLAND_SHARE, segment

FAST = {"patch": 16, "step": 12, "device": "cpu"}


def saved(path, seed=6, **spec):
    generator = build_generator(GeneratorSpec(kernel=1, **spec), seed=seed)
    weights.save_generator(path, generator)
    return path


@pytest.fixture
def model(tmp_path):
    return saved(tmp_path / "model.safetensors")


# --- filters ------------------------------------------------------------------------------------------------------


def blobs():
    """Components of 27, 9 and 1 voxels; the second is two bars that share a corner."""
    prob = np.zeros((13, 11, 9))
    prob[1:4, 1:4, 1:4] = 0.9
    prob[7:11, 6, 5] = prob[11, 7, 6:] = 0.8
    prob[11, 8, 6], prob[11, 8, 7] = 0.7, 0.6
    prob[1, 9, 1] = 0.55
    return prob


def test_a_probability_at_the_threshold_is_outside():
    seg, told = segment(np.array([[[0.0, 0.5, np.nextafter(0.5, 1), 1.0]]]), 1.0, 0.5)
    assert seg.tolist() == [[[0, 0, 1, 1]]] and seg.dtype == np.uint8 and told == {}


def test_the_largest_component_stays():
    seg, told = segment(blobs(), 1.0, 0.5, largest_component=True)
    assert seg.dtype == np.uint8 and seg.sum() == 27 and seg[1:4, 1:4, 1:4].all()
    assert told == {"components": 3, "components_kept": 1, "voxels_left_out": 10}


def test_how_whole_a_segmentation_is_counts_pieces_that_are_large_enough_before_one_alone_is_kept():
    """Components of 27, 9, 9 and 1 voxels; with nothing to leave out, those below a hundredth of the largest, or below
    what is asked for, do not count."""
    prob = blobs()
    prob[7:11, 2, 1] = prob[11, 3, 2:7] = 0.8
    for options, share in (({"min_mm3": 0.5}, 36 / 46), ({"min_mm3": 2}, 36 / 45), ({"min_mm3": 10}, 1.0)):
        for alone in (False, True):
            told = segment(prob, 1.0, 0.5, largest_component=alone, judged_mm3=0, **options)[1]
            assert told["two_largest_share"] == pytest.approx(share, abs=5e-5)  # four digits
    assert "two_largest_share" not in segment(prob, 1.0, 0.99, min_mm3=2, judged_mm3=0)[1], "nothing is left"
    assert "two_largest_share" not in segment(prob, 1.0, 0.5, min_mm3=2)[1], "nobody asked"
    large = np.zeros((40, 12, 12))
    large[:12, :, :11] = large[14:38, :11, :10] = 0.9  # 1584 and 2640 voxels
    large[39, 0, 0], large[39, 2:4, 0] = 0.9, 0.9  # of 1 and 2 voxels
    large[39, 9:12, 0:9] = 0.9  # of 27
    whole = float(np.count_nonzero(large[:38]))
    for mm3, counted in ((0, whole + 1 + 2 + 27), (2, whole + 2 + 27), (np.inf, whole + 27)):
        told = segment(large, 1.0, 0.5, judged_mm3=mm3)
        assert told[1]["two_largest_share"] == pytest.approx(whole / counted, abs=5e-5)
        assert told[0].sum() == np.count_nonzero(large) and told[1]["voxels_left_out"] == 0


@pytest.mark.parametrize(("mm3", "left"), [(0.4, 37), (0.5, 37), (0.51, 36), (4.5, 36), (4.6, 27), (13.6, 0)])
def test_small_components_go_by_their_volume(mm3, left):
    """Voxels of half a cubic millimetre; a component of the very size stays."""
    seg, told = segment(blobs(), 0.5, 0.5, min_mm3=mm3)
    assert seg.sum() == left == 37 - told["voxels_left_out"] and told["components"] == 3
    assert told["min_size_mm3"] == mm3


@pytest.mark.parametrize(
    ("share", "limit", "left"),
    [(0.5, 5.0, 27), (0.3, 0.3 * 13.5, 36), (1 / 27, 0.5, 37), (0.038, 0.513, 36), (1, 5, 27)],
)
def test_a_part_of_the_largest_component_is_no_island(share, limit, left):
    """Components of 13.5, 4.5 and 0.5 mm^3; islands are those below 5 mm^3, unless they are much of what there is."""
    seg, told = segment(blobs(), 0.5, 0.5, min_mm3=5.0, share=share)
    assert seg.sum() == left and told["min_size_mm3"] == pytest.approx(limit)
    assert segment(blobs(), 0.5, 0.95, min_mm3=5.0, share=share)[0].sum() == 0


def test_filters_look_at_what_the_threshold_leaves():
    assert segment(blobs(), 1.0, 0.85)[0].sum() == 27
    assert segment(blobs(), 1.0, 0.65, min_mm3=2)[0].sum() == 27 + 8
    for empty in ((0.95, True), (0.5, True, 99)):
        assert segment(blobs(), 1.0, *empty)[0].sum() == 0
    plain, told = segment(blobs(), 1.0, 0.5)
    # Found: 0
    assert np.array_equal(plain, blobs() > 0.5) and told == {} and InferSettings().changed("segmentation") == {}
    for wrong in ({"threshold": 1.0}, {"threshold": np.nan}, {"min_size": -1}, {"min_size": np.inf}):
        with pytest.raises(UsageError):
            InferSettings(**wrong)


# --- stored types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scaling"), [("int16", (1.0, 0.0)), ("uint8", (0.25, -3.0)), ("float32", (1.0, 0.0))]
)
def test_sr_in_the_type_of_the_image_is_the_image_where_nothing_changes_it(tmp_path, dtype, scaling):
    """The same stored numbers and scaling, through a network that changes nothing."""
    generator = build_generator(GeneratorSpec(kernel=1))
    generator.head.data.zero_()
    weights.save_generator(tmp_path / "same.safetensors", generator)
    stored = np.random.default_rng(0).integers(0, 256, (14, 12, 6)).astype(dtype)
    data = stored * scaling[0] + scaling[1]
    path = images.save(tmp_path / "a.nii", data, np.eye(4), dtype=np.dtype(dtype), scaling=scaling)
    infer_files([path], tmp_path / "out", tmp_path / "same.safetensors", **FAST, new_resolution="same", dtype="input")
    back = images.load(tmp_path / "out" / "a_sr.nii.gz")
    assert np.allclose(back.data, data, atol=1e-4) and back.meta["stored_dtype"] == dtype  # found: 0
    assert (back.meta["slope"], back.meta["inter"]) == scaling
    told = json.loads((tmp_path / "out" / "a.json").read_text())
    assert told["sr_stored"]["dtype"] == dtype and told["sr_stored"].get("voxels_clipped", 0) == 0
    if dtype != "float32":
        assert np.array_equal(back.data, data.astype(np.float32)), "to the last stored number"


def test_what_does_not_fit_the_type_is_clipped(tmp_path):
    data = np.array([-5.0, 0.2, 10.6, 63.7, 200.0]).reshape(5, 1, 1)
    images.save(tmp_path / "a.nii", data, np.eye(4), dtype=np.uint8, scaling=(0.25, 0.0))
    assert images.load(tmp_path / "a.nii").data.ravel().tolist() == [0.0, 0.25, 10.5, 63.75, 63.75]


# --- through files and the command line ---------------------------------------------------------------------------


def test_every_option_reaches_the_files(tmp_path, model, capsys):
    other = saved(tmp_path / "other.safetensors", seed=7)
    data = np.random.default_rng(1).integers(0, 900, (14, 12, 6)).astype(np.int16)
    images.save(tmp_path / "a.nii.gz", data, rigid((1.0, 1.0, 2.5)))
    words = ["infer", tmp_path / "a.nii.gz", "-o", tmp_path / "out", "--patch", 16, "--step", 12, "--device", "cpu"]
    words += ["-w", model, "-w", other, "--flips", "x", "--threshold", 0.45, "--min-size", 3, "--largest-component"]
    assert main(["--quiet", *map(str, [*words, "--dtype", "input", "--png"])]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert [one["path"] for one in record["weights"]["averaged"]] == [str(model), str(other)]
    assert record["asked"]["flips"] == record["flips"] == "x" and record["networks"] == 2
    asked = {"threshold": 0.45, "largest_component": True, "min_size_mm3": 3.0}
    assert record["threshold"] == 0.45 and asked.items() <= record["segmentation"].items()
    assert record["segmentation"]["components_kept"] == 1 and record["asked"].items() >= asked.items()
    assert record["sr_stored"]["dtype"] == "int16"
    with Picture.open(tmp_path / "out" / record["outputs"]["png"]) as picture:
        assert picture.format == "PNG" and picture.width == 2000
    assert main(["--quiet", *map(str, [*words, "--dtype", "input", "--png", "--resume"])]) == 0
    assert "skipped" in capsys.readouterr().out
    assert main(["--quiet", *map(str, [*words, "--resume"])]) == 2, "made with another dtype"
    assert "another dtype" in capsys.readouterr().err


def test_options_that_make_no_sense_are_refused_before_any_work(tmp_path, model):
    for wrong in ({"threshold": 2}, {"min_size": -1}, {"dtype": "int8"}, {"flips": "t"}, {"split_volume": True}):
        with pytest.raises(UsageError):
            infer_files([tmp_path / "none.nii"], tmp_path / "out", model, **FAST, **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("asked", "least"), [((), 0.3), (("--min-size", "0"), 0.0), (("--min-size", "8"), 8.0)])
def test_weights_say_how_small_a_component_may_be(tmp_path, model, monkeypatch, asked, least):
    """Unless the command says it; the record tells what was left out, the original's geometry leaves nothing out."""
    monkeypatch.setattr("fastsrgan.infer.image.segment", lambda prob, *more: seen.append(more) or segment(prob, *more))
    purpose = Purpose(structures=((1, "cortex"),), island_mm3=(0.3, 0.3))  # below a hundredth of the largest here
    monkeypatch.setattr("fastsrgan.infer.image.purposes.common", lambda purposes: purpose)
    data = np.random.default_rng(1).integers(0, 900, (14, 12, 6)).astype(np.int16)
    images.save(tmp_path / "a.nii.gz", data, rigid((1.0, 1.0, 2.5)))
    words = ["--quiet", "infer", tmp_path / "a.nii.gz", "--patch", 16, "--step", 12, "--device", "cpu", "-w", model]
    for geometry, wanted in (("physical", least), ("segsrgan", float(asked[1]) if asked else 0.0)):
        seen: list[tuple] = []
        out = tmp_path / geometry
        assert main([*map(str, [*words, "-o", out, *asked, "--geometry", geometry])]) == 0
        assert seen[0][-3:] == (wanted, None if asked else ISLAND_SHARE, 0.3), "a cortex is judged in any case"
        record = json.loads((out / "a.json").read_text())
        told = record.get("segmentation", {})
        assert told.get("min_size_mm3", 0.0) == wanted and 0 < told["two_largest_share"] <= 1
        assert "pieces" in record["plausibility"]["checked"]
