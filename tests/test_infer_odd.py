"""Masks of another orientation or place, finite weights that give nonsense, voxel sizes that cannot be meant."""

import nibabel as nib
import numpy as np
import pytest
import torch
from nifti_files import HEAD, rigid, write

from fastsrgan.core.files import read_json
from fastsrgan.errors import InputError, ModelError, PartialFailure, UsageError
from fastsrgan.infer import files as infer_files
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.volume.intensity import normaliser

FAST = {"patch": 16, "step": 12, "device": "cpu"}
SHAPE, AFFINE = (14, 12, 6), rigid((1.0, 1.0, 2.5))


@pytest.fixture
def generator():
    return build_generator(GeneratorSpec(kernel=1), seed=6)


@pytest.fixture
def model(tmp_path, generator):
    path = tmp_path / "model.safetensors"
    weights.save_generator(path, generator)
    return path


@pytest.fixture
def scan(tmp_path):
    data = np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.int16)
    return images.save(tmp_path / "a.nii.gz", data, AFFINE)


def half(path, turned=False, shift=0.0):
    """A mask of the first half along x; ``turned``: the same voxels in the world, stored the other way round."""
    data = np.zeros(SHAPE, np.uint8)
    data[: SHAPE[0] // 2] = 1
    affine = AFFINE.copy()
    if turned:
        data = data[::-1].transpose(2, 1, 0)
        affine[:3, 3] += (SHAPE[0] - 1) * affine[:3, 0]
        affine = affine @ np.array([[0, 0, -1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    affine[:3, 3] += shift
    return images.save(path, data, affine)


@pytest.mark.fault(9)
def test_a_mask_stored_the_other_way_round_is_the_same_place(tmp_path, scan, model):
    """Was taken voxel by voxel: the segmentation stood on the other side of the head."""
    masks = {"as": half(tmp_path / "m.nii.gz"), "turned": half(tmp_path / "t.nii.gz", turned=True)}
    for name, mask in masks.items():
        infer_files.infer_files([scan], tmp_path / name, model, mask=mask, save_prob=True, **FAST)
    first, second = (images.load(tmp_path / name / "a_prob.nii.gz").data for name in masks)
    assert np.array_equal(first, second) and (first[: SHAPE[0] // 2] > 0).all() and not first[SHAPE[0] // 2 + 1 :].any()
    told = {name: read_json(tmp_path / name / "a.json")["warnings"] for name in masks}
    told = {name: [w for w in found if "plausibility" not in w] for name, found in told.items()}
    assert not told["as"] and "mask: the mask's axes are stored in another order" in told["turned"][0]


@pytest.mark.fault(13)
def test_a_mask_of_another_place_or_of_nothing_is_refused_by_its_own_name(tmp_path, scan, model):
    away = half(tmp_path / "away.nii.gz", shift=5.0)
    small = images.save(tmp_path / "small.nii.gz", np.ones((13, 12, 6), np.uint8), AFFINE)
    empty = images.save(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    for mask, reason in ((away, "grid is not the image's, up to"), (small, "grid"), (empty, "marks no voxel")):
        with pytest.raises(InputError, match=f"{mask.name}: the mask.*{reason}|{mask.name}: .*{reason}"):
            infer_files.infer_files([scan], tmp_path / "out", model, mask=mask, **FAST)
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(26)
def test_a_mask_is_not_written_over(tmp_path, scan, model):
    out = tmp_path / "out"
    infer_files.infer_files([scan], out, model, **FAST)
    before = (out / "a_seg.nii.gz").read_bytes()
    with pytest.raises(UsageError, match="is an input and would be overwritten"):
        infer_files.infer_files([scan], out, model, mask=out / "a_seg.nii.gz", overwrite=True, **FAST)
    assert (out / "a_seg.nii.gz").read_bytes() == before


@pytest.mark.fault(16)
@pytest.mark.parametrize("way", ["in memory", "by slabs"])
def test_finite_weights_that_give_nan_end_with_4_and_leave_nothing(tmp_path, generator, way, caplog):
    caplog.set_level("INFO", logger="fastsrgan")
    big = images.save(tmp_path / "big.nii.gz", np.random.default_rng(1).random((160, 40, 40), np.float32), np.eye(4))
    limit = 27 * 2**20 if way == "by slabs" else None
    with torch.no_grad():
        for weight in generator.parameters():
            weight.mul_(1e30)
    weights.save_generator(tmp_path / "wild.safetensors", generator)
    with pytest.raises(ModelError, match=r"NaN or infinite.*other weights"):
        infer_files.infer_files(
            [big], tmp_path / "out", tmp_path / "wild.safetensors", max_memory=limit, new_resolution="same", **FAST
        )
    assert way in caplog.text and not (tmp_path / "out").exists()


@pytest.mark.fault(16)
def test_results_that_no_image_has_are_told(generator):
    data = np.random.default_rng(2).random(SHAPE, np.float32) * 100
    assert infer_volume(data, AFFINE, generator, **FAST).report["warnings"] == []
    with torch.no_grad():
        generator.head.mul_(1e4)
    (told,) = infer_volume(data, AFFINE, generator, **FAST).report["warnings"]
    assert "reaches" in told and "weights may be damaged" in told

    class Nothing(torch.nn.Module):
        spec = generator.spec

        def forward(self, x):
            return torch.cat([torch.zeros_like(x), torch.zeros_like(x)], 1)

    (told,) = infer_volume(data, AFFINE, Nothing(), **FAST).report["warnings"]
    assert "every voxel of the SR image is 0" in told


@pytest.mark.fault(11)
def test_a_voxel_size_that_would_make_the_result_huge_is_refused_unless_asked_for(tmp_path, model):
    data = np.random.default_rng(3).random((8, 6, 6), np.float32)
    odd = images.save(tmp_path / "odd.nii.gz", data, np.diag([0.01, 1, 3, 1]))
    with pytest.raises(InputError, match=r"odd.nii.gz: voxels of 0.01 x 1 x 3 mm.*--new-resolution"):
        infer_files.infer_files([odd], tmp_path / "out", model, **FAST)
    thick = images.save(tmp_path / "thick.nii.gz", data, np.diag([0.2, 0.2, 10, 1]))
    infer_files.infer_files([thick], tmp_path / "out", model, **FAST)
    infer_files.infer_files([odd], tmp_path / "asked", model, new_resolution=1.0, **FAST)
    assert images.load(tmp_path / "asked" / "odd_sr.nii.gz").data.shape[1:] == (6, 18)


@pytest.mark.fault(15)
def test_a_name_that_no_disk_takes_costs_only_its_own_image(tmp_path, scan, model):
    long = scan.rename(tmp_path / f"{'n' * 247}.nii.gz")
    other = images.save(tmp_path / "b.nii.gz", np.ones(SHAPE, np.int16), AFFINE)
    with pytest.raises(PartialFailure, match="2 of 3 volumes failed"):
        infer_files.infer_files([long, tmp_path / f"{'m' * 300}.nii.gz", other], tmp_path / "out", model, **FAST)
    summary = read_json(tmp_path / "out" / infer_files.SUMMARY)
    assert [item["status"] for item in summary["items"]] == ["failed", "failed", "done"]
    assert "too long for a disk" in summary["items"][0]["error"]


@pytest.mark.fault(15)
def test_a_name_counts_by_its_bytes_and_is_refused_before_the_image_is_read(tmp_path, scan, model, monkeypatch):
    """Letters with accents take two: a name of half as many letters is as long."""
    long = scan.rename(tmp_path / ("ü" * 123 + ".nii.gz"))
    monkeypatch.setattr("fastsrgan.infer.image.read", lambda *_: pytest.fail("read before its name was judged"))
    with pytest.raises(InputError, match="too long for a disk"):
        infer_files.infer_files([long], tmp_path / "out", model, **FAST)


@pytest.mark.fault(25)
def test_a_folder_where_a_result_is_to_stand_is_said_before_the_work(tmp_path, scan, model):
    (tmp_path / "out" / "a_seg.nii.gz").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"a_seg\.nii\.gz: is a folder where a result is to stand"):
        infer_files.infer_files([scan], tmp_path / "out", model, overwrite=True, **FAST)


def test_what_a_replaced_result_held_besides_does_not_stand_beside_the_new_one(tmp_path, scan, model):
    """Its doubt would be found "beside the result" and scored as the new result's. Files of others stay."""
    out = tmp_path / "out"
    infer_files.infer_files([scan], out, model, save_prob=True, uncertainty=True, **FAST)
    (out / "a_notes.nii.gz").write_bytes(b"mine")
    assert {"a_prob.nii.gz", "a_doubt.nii.gz"} <= {path.name for path in out.iterdir()}
    infer_files.infer_files([scan], out, model, overwrite=True, **FAST)
    kept = {"a_sr.nii.gz", "a_seg.nii.gz", "a.json", "a_notes.nii.gz"}
    assert {path.name for path in out.iterdir()} == kept
    # More of the same result: what it held stays, and stays named.
    infer_files.infer_files([scan], out, model, resume=True, save_prob=True, **FAST)
    infer_files.infer_files([scan], out, model, resume=True, png=True, **FAST)
    assert {path.name for path in out.iterdir()} == kept | {"a_prob.nii.gz", "a.png"}
    assert set(read_json(out / "a.json")["outputs"]) == {"sr", "seg", "json", "prob", "png"}


@pytest.mark.parametrize("asked", ({"agree": 0.01}, {"profile": "box"}, {}, {"agree": "off"}))
def test_options_of_agreement_are_told_where_there_is_nothing_to_agree_on(tmp_path, generator, asked):
    data = np.random.default_rng(0).integers(1, 900, SHAPE).astype(np.float32)
    options = FAST | {"new_resolution": (1.0, 1.0, 2.5)} | asked
    told = infer_volume(data, AFFINE, generator, **options).report["warnings"]
    named = [name for name in ("agree", "profile") if name in asked and asked[name] != "off"]
    assert [w for w in told if "not used" in w] == [
        f"the result has the scan's own voxels and slices: {name} not used" for name in named
    ]


def test_an_image_that_is_named_twice_is_taken_once(tmp_path, scan, model, caplog):
    (tmp_path / "again.txt").write_text(f"{scan}\n", encoding="utf8")
    summary = infer_files.infer_files([scan, tmp_path / "again.txt"], tmp_path / "out", model, **FAST)
    assert summary["done"] == len(summary["items"]) == 1 and "named more than once, taken once" in caplog.text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"data_XYZ": np.ones(SHAPE, complex)}, "numbers of the type complex128"),
        ({"generator": "adult"}, "'adult' is no network"),
        ({"generator": []}, "generator: none given"),
        ({"budget": "20s"}, "budget: '20s' is not allowed"),
        ({"max_memory": "8G"}, "max memory: '8G' is not allowed"),
    ],
)
def test_what_no_volume_can_be_run_with_is_said_in_the_packages_own_errors(generator, given, told):
    usual = {"data_XYZ": np.ones(SHAPE, np.float32), "affine": AFFINE, "generator": generator}
    with pytest.raises((InputError, UsageError), match=told):
        infer_volume(**usual | FAST | given)


def test_what_is_odd_about_a_header_is_told_of_an_image_that_is_left_alone_too(tmp_path, model, caplog):
    """Voxels that a header does not give are 1 mm each: that it does not was kept for images that are processed."""
    raw = nib.Nifti1Image(np.arange(1, 1001, dtype=np.float32).reshape(10, 10, 10), None)
    nib.save(raw, tmp_path / "a.nii")
    assert infer_files.infer_files([tmp_path / "a.nii"], tmp_path / "out", model, **FAST)["unneeded"] == 1
    assert caplog.text.count("no orientation (sform and qform codes are 0)") == 1
    caplog.clear()
    infer_files.infer_files([tmp_path / "a.nii"], tmp_path / "o", model, new_resolution="same", **FAST)
    assert caplog.text.count("no orientation (sform and qform codes are 0)") == 1


def test_a_form_that_cannot_be_used_is_not_said_to_be_unset(tmp_path, caplog):
    affine = rigid((1.0, 1, 3))
    for name, fields, said in (
        ("unset", {"sform_code": 0}, "sform and qform codes are 0"),
        ("unusable", {"srow_x": (0, np.inf)}, "neither form is usable"),
    ):
        told = images.load(write(tmp_path / f"{name}.nii", HEAD, affine, **fields)).warnings
        assert [line for line in told if line.startswith(f"no orientation ({said})")], told


def test_values_that_a_network_does_not_know_are_said_to_be_so():
    """Where all lie below 0, a network that was not trained on images moved up cannot take them: what to do is told."""
    below = np.arange(-8.0, 0).reshape(2, 2, 2)
    with pytest.raises(InputError) as caught:
        normaliser(below)
    assert "subtract the image's minimum first" in caught.value.hint
    assert normaliser(below, shifted=True).scale == 7
    with pytest.raises(InputError) as caught:
        normaliser(np.zeros((2, 2, 2)))
    assert caught.value.hint == "at least one voxel must be above zero"
