"""Files in, files out: outputs, provenance, lists, restart, and what happens when one of many is bad."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import litter
from nifti_files import rigid

from fastsrgan.core.files import temporary_name
from fastsrgan.errors import InputError, ModelError, PartialFailure, ResourceError, UsageError
from fastsrgan.infer import files as infer_files
from fastsrgan.infer.files import SUMMARY, portable
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator

FAST = {"patch": 16, "step": 12, "device": "cpu"}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save_generator(path, build_generator(GeneratorSpec(kernel=1), seed=6))
    return path


def scan(path, seed=0, affine=None):
    data = np.random.default_rng(seed).integers(0, 900, (14, 12, 6)).astype(np.int16)
    path.parent.mkdir(exist_ok=True)
    return images.save(path, data, rigid((1.0, 1.0, 2.5)) if affine is None else affine)


def run(*args, **settings):
    return infer_files.infer_files(*args, **{**FAST, **settings})


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_one_image_gives_its_outputs_in_the_right_place(tmp_path, model):
    path = scan(tmp_path / "sub-01_T2w.nii.gz")
    summary = run([path], tmp_path / "new" / "out", model, save_prob=True)
    out = tmp_path / "new" / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "sub-01_T2w.json",
        "sub-01_T2w_prob.nii.gz",
        "sub-01_T2w_seg.nii.gz",
        "sub-01_T2w_sr.nii.gz",
    ]
    assert (summary["done"], summary["skipped"], summary["failed"]) == (1, 0, 0)
    image = images.load(path)
    expected = infer_volume(image.data, image.affine, weights.load_generator(model), **FAST)
    sr, prob, seg = (images.load(out / f"sub-01_T2w_{kind}.nii.gz") for kind in ("sr", "prob", "seg"))
    assert np.array_equal(sr.data, expected.sr) and np.array_equal(prob.data, expected.prob[0])
    assert np.array_equal(seg.data, expected.prob[0] > 0.5)  # found: 0.027
    assert seg.meta["stored_dtype"] == "uint8" and sr.meta["stored_dtype"] == "float32"
    for volume in (sr, prob, seg):
        assert np.allclose(volume.affine, expected.affine, atol=1e-6)  # found: 3e-7


def test_one_path_is_one_input(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scan(tmp_path / "scan.nii.gz")
    for given in ("scan.nii.gz", tmp_path / "scan.nii.gz"):
        (item,) = run(given, tmp_path / "out", model, overwrite=True)["items"]
        assert item["stem"] == "scan"
    with pytest.raises(InputError, match=r"^gone\.mgz"):  # not the folder "." of its letters
        run("gone.mgz", tmp_path / "other", model)


def test_the_record_says_what_made_the_result(tmp_path, model):
    path = scan(tmp_path / "a.nii.gz")
    run([path], tmp_path / "out", model, window="gaussian", new_resolution=(1.0, 1.0, 1.25))
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["weights"] == {
        "path": str(model),
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "spec": GeneratorSpec(kernel=1).to_dict(),
    }
    assert record["input"]["path"] == str(path) and record["input"]["sha256"] == images.sha256(path)
    assert record["input"]["shape"] == [14, 12, 6]
    used = {"patch": 16, "step": 12, "window": "gaussian", "geometry": "physical", "precision": "fp32", "device": "cpu"}
    assert {key: record[key] for key in used} == used
    assert record["new_resolution"] == pytest.approx([1.0, 1.0, 1.25])
    assert (
        0 < record["seconds"] < 1e6
        and "hardly trained" in "".join(record["warnings"])
        and record["provenance"]["torch"] == torch.__version__
    )
    assert record["outputs"] == {"sr": "a_sr.nii.gz", "seg": "a_seg.nii.gz", "json": "a.json"}


@pytest.mark.fault(8)
def test_warnings_about_the_image_reach_the_record(tmp_path, model):
    data = np.ones((12, 12, 6), np.float32)
    data[3, 3, 3] = np.nan
    images.save(tmp_path / "a.nii", data, np.diag([1.0, 1, 2, 1]))
    summary = run([tmp_path / "a.nii"], tmp_path / "out", model)
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert "1 of 864 voxels" in record["warnings"][0] and summary["items"][0]["warnings"] == record["warnings"]
    assert np.isfinite(images.load(tmp_path / "out" / "a_sr.nii.gz").data).all()


def test_mask_classes_become_a_label_map(tmp_path):
    model = tmp_path / "model.safetensors"
    generator = build_generator(GeneratorSpec(kernel=2, mask_classes=3), seed=7)
    weights.save_generator(model, generator)
    path = scan(tmp_path / "a.nii.gz")
    run([path], tmp_path / "out", model)
    image = images.load(path)
    expected = infer_volume(image.data, image.affine, generator.eval(), **FAST).prob[1:].argmax(0)
    assert np.array_equal(images.load_label(tmp_path / "out" / "a_mask.nii.gz").data, expected)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv"])
def test_lists_and_files_may_be_mixed(tmp_path, model, suffix):
    paths = [scan(tmp_path / f"{name}.nii.gz", seed) for seed, name in enumerate("abc")]
    listing = tmp_path / f"list{suffix}"
    listing.write_text("a.nii.gz\nb.nii.gz\n")
    summary = run([listing, paths[2]], tmp_path / "out", model)
    assert [item["stem"] for item in summary["items"]] == ["a", "b", "c"] and summary["done"] == 3
    assert json.loads((tmp_path / "out" / SUMMARY).read_text()) == portable(summary, tmp_path / "out")


@pytest.mark.parametrize("place", ["out", "{tmp}/out"], ids=["relative", "absolute"])
def test_records_and_the_summary_name_files_from_their_own_folder_wherever_they_are_read(
    tmp_path, model, monkeypatch, place
):
    """Called from one folder, moved, read from another; the items that are returned are paths for the caller."""
    scan(tmp_path / "in" / "a.nii.gz")
    scan(tmp_path / "in" / "b.nii.gz", 1)
    (tmp_path / "in" / "sub").mkdir()
    (tmp_path / "in" / "b.nii.gz").rename(tmp_path / "in" / "sub" / "b.nii.gz")
    monkeypatch.chdir(tmp_path)
    summary = run(["in"], place.format(tmp=tmp_path), model, save_prob=True)
    assert all(Path(path).is_file() for item in summary["items"] for path in item["outputs"].values())
    monkeypatch.chdir("/")
    there = tmp_path / "archive" / "moved"
    there.parent.mkdir()
    (tmp_path / "out").rename(there)
    for record in (there / "a.json", there / "sub" / "b.json"):
        outputs = json.loads(record.read_text())["outputs"]
        assert set(outputs) == {"sr", "seg", "prob", "json"}
        assert all(not os.path.isabs(name) and (record.parent / name).is_file() for name in outputs.values())
    told = json.loads((there / SUMMARY).read_text())
    assert told["out_dir"] == str(tmp_path / "out")
    for item in told["items"]:
        assert Path(item["input"]).is_file() and os.path.isabs(item["input"])
        assert set(item["outputs"]) == {"sr", "seg", "prob", "json"}
        assert all((there / name).is_file() and not os.path.isabs(name) for name in item["outputs"].values())


@pytest.mark.fault(15)
def test_a_bad_volume_does_not_stop_the_rest(tmp_path, model):
    good = [scan(tmp_path / "a.nii.gz"), scan(tmp_path / "c.nii.gz", 1)]
    bad, missing = tmp_path / "b.nii.gz", tmp_path / "d.nii.gz"
    bad.write_bytes(good[0].read_bytes()[:200])
    empty = images.save(tmp_path / "e.nii.gz", np.zeros((8, 8, 8), np.uint8), np.diag([1.0, 1, 2, 1]))
    with pytest.raises(PartialFailure, match="3 of 5 volumes failed: b, d, e") as caught:
        run([good[0], bad, good[1], missing, empty], tmp_path / "out", model)
    summary = caught.value.summary
    assert [item["status"] for item in summary["items"]] == ["done", "failed", "done", "failed", "failed"]
    assert [item["exit_code"] for item in summary["items"] if item["status"] == "failed"] == [3, 3, 3]
    assert str(empty) in summary["items"][4]["error"] and "no such file" in summary["items"][3]["error"].lower()
    assert (tmp_path / "out" / "c_sr.nii.gz").exists() and not (tmp_path / "out" / "b_sr.nii.gz").exists()
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["failed"] == 3


def test_an_unforeseen_error_does_not_stop_the_rest_either(tmp_path, model, monkeypatch):
    paths = [scan(tmp_path / f"{name}.nii.gz") for name in "ab"]
    real = images.load

    def load(path, **settings):
        if path == paths[0]:
            raise ZeroDivisionError("a bug")
        return real(path, **settings)

    monkeypatch.setattr(images, "load", load)
    with pytest.raises(PartialFailure) as caught:
        run(paths, tmp_path / "out", model)
    assert [(i["status"], i.get("exit_code")) for i in caught.value.summary["items"]] == [("failed", 1), ("done", None)]


def test_the_only_image_raises_its_own_error(tmp_path, model, caplog):
    caplog.set_level("INFO", "fastsrgan")
    with pytest.raises(InputError, match="no such file"):
        run([tmp_path / "none.nii.gz"], tmp_path / "out", model)
    assert caplog.messages == [] and not (tmp_path / "out").exists()  # notes on tiles and devices are of no use
    images.save(tmp_path / "zero.nii.gz", np.zeros((8, 8, 8), np.uint8), np.diag([1.0, 1, 2, 1]))
    with pytest.raises(InputError, match=r"zero\.nii\.gz"):
        run([tmp_path / "zero.nii.gz"], tmp_path / "out", model)


# --- what is there already ----------------------------------------------------------------------------------------


@pytest.mark.fault(26)
def test_existing_results_are_kept_unless_told(tmp_path, model):
    path = scan(tmp_path / "a.nii.gz")
    out = tmp_path / "out"
    run([path], out, model)
    before = contents(out)
    with pytest.raises(UsageError, match="overwrite"):
        run([path], out, model)
    assert contents(out) == before
    run([path], out, model, overwrite=True, patch=8, step=8)
    after = contents(out)
    assert after["a_sr.nii.gz"] != before["a_sr.nii.gz"]
    assert json.loads(after["a.json"])["step"] == 8


@pytest.mark.fault(26)
def test_resume_does_what_is_missing_and_nothing_else(tmp_path, model):
    paths = [scan(tmp_path / f"{name}.nii.gz", seed) for seed, name in enumerate("abc")]
    out = tmp_path / "out"
    run(paths, out, model)
    before = contents(out)
    (out / "b.json").unlink()  # killed before the record was written
    (out / "b_sr.nii.gz").write_bytes(b"old")
    (out / "c_seg.nii.gz").unlink()
    summary = run(paths, out, model, resume=True)
    assert [item["status"] for item in summary["items"]] == ["skipped", "done", "done"]
    after = contents(out)
    assert {n: b for n, b in after.items() if n.endswith(".gz")} == {
        n: b for n, b in before.items() if n.endswith(".gz")
    }
    assert after["a.json"] == before["a.json"]


def test_no_record_ever_stands_beside_files_that_are_gone(tmp_path, model, monkeypatch):
    """A kill may come between any two files that are taken away: what a record names is there as long as it is."""
    path, out, unlink, taken = scan(tmp_path / "a.nii.gz"), tmp_path / "out", Path.unlink, []
    run([path], out, model, save_prob=True)
    assert (out / "a_prob.nii.gz").exists()

    def watched(self, missing_ok=False):
        unlink(self, missing_ok=missing_ok)
        taken.append(self.name)
        record = json.loads((out / "a.json").read_text()) if (out / "a.json").exists() else {"outputs": {}}
        assert all((out / name).exists() for name in record["outputs"].values()), self.name

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", watched)
        run([path], out, model, overwrite=True)
    assert {"a.json", "a_prob.nii.gz"} <= set(taken) and not (out / "a_prob.nii.gz").exists()


@pytest.mark.parametrize("change", ["step", "weights", "input"])
def test_resume_refuses_results_of_something_else(tmp_path, model, change):
    path = scan(tmp_path / "a.nii.gz")
    out = tmp_path / "out"
    run([path], out, model)
    settings = {}
    if change == "step":
        settings["step"] = 8
    elif change == "weights":
        weights.save_generator(model, build_generator(GeneratorSpec(kernel=1), seed=8))
    else:
        path.unlink()
        scan(path, seed=9)
    with pytest.raises(UsageError, match=f"another {change}"):
        run([path], out, model, resume=True, **settings)
    assert run([path], out, model, overwrite=True, **settings)["done"] == 1


def test_a_name_that_is_too_long_is_a_fault_of_its_image_alone(tmp_path, model):
    """Nothing was done of any."""
    with pytest.raises(PartialFailure, match="1 of 2 volumes failed"):
        run([tmp_path / ("n" * 254 + ".nii.gz"), scan(tmp_path / "a.nii.gz")], tmp_path / "out", model)
    assert (tmp_path / "out" / "a_sr.nii.gz").exists()


def test_what_a_killed_call_left_is_taken_away_when_it_is_resumed(tmp_path, model, monkeypatch):
    """Stayed for good."""
    path, out = scan(tmp_path / "a.nii.gz"), tmp_path / "out"
    run([path], out, model)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: dead.pid)
        temporary_name(out / "a_sr.nii.gz").write_bytes(b"half")
    before = contents(out)
    assert run([path], out, model, resume=True)["skipped"] == 1
    assert len(contents(out)) == len(before) - 1 and not litter(out)


# --- refused before any work --------------------------------------------------------------------------------------


def test_images_that_would_share_outputs_are_refused(tmp_path, model):
    paths = [scan(tmp_path / "1" / "a.nii.gz"), scan(tmp_path / "2" / "a.nii")]
    with pytest.raises(UsageError, match="same files"):
        run(paths, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_written_over(tmp_path, model):
    paths = [scan(tmp_path / "a.nii.gz"), scan(tmp_path / "a_sr.nii.gz")]
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="is an input"):
        run(paths, tmp_path, model, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.fault(25)
def test_settings_weights_and_folder_are_checked_before_any_image_is_read(tmp_path, model):
    missing = tmp_path / "none.nii.gz"
    with pytest.raises(UsageError, match="no image"):
        run([], tmp_path / "out", model)
    with pytest.raises(UsageError, match="patch"):
        run([missing], tmp_path / "out", model, patch=30)
    with pytest.raises(UsageError, match="batch"):
        run([missing], tmp_path / "out", model, batch=0)
    damaged = missing  # is there now
    damaged.write_bytes(b"no image")
    with pytest.raises(ModelError):
        run([damaged], tmp_path / "out", tmp_path / "none.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError):
        run([damaged], tmp_path / "file", model)


@pytest.mark.fault(9)
def test_the_world_of_the_image_is_kept(tmp_path, model):
    """The outputs say of their world what the input said (here MNI), so viewers overlay them."""
    images.save(tmp_path / "a.nii.gz", np.ones((8, 8, 8), np.uint8), np.diag([1.0, 1, 2, 1]), code=4)
    run([tmp_path / "a.nii.gz"], tmp_path / "out", model)
    assert images.load(tmp_path / "out" / "a_sr.nii.gz").meta["space_code"] == 4
