"""Trees of results that other commands wrote, beside their images, and what of a folder is the truth."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from result_pair import make_pair

from fastsrgan.core.files import write_json
from fastsrgan.errors import InputError
from fastsrgan.evaluate import cohort as evaluate_cohort
from fastsrgan.evaluate import pair as evaluate
from fastsrgan.io import nifti as images


@pytest.fixture
def files(tmp_path):
    return make_pair(tmp_path)


@pytest.fixture
def originals(files, tmp_path):
    """Trees of ``job-model`` beside their images, of three images in two folders, and the truths in like folders."""
    volumes = {name: images.load(path).data for name, path in files.items()}
    seg = volumes["seg"].astype(np.float64)
    for n, (folder, stem, tag) in enumerate((("s1", "a_lr", ""), ("s2", "b", ""), ("s2", "c", "_c"))):
        (tmp_path / "truth" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        low = images.save(
            tmp_path / "data" / folder / f"{stem}.nii.gz", volumes["hr"][:, :, ::2], np.diag([1, 1, 2, 1.0])
        )
        for size in ("patch_16_step_8", "patch_16_step_16"):
            place = low.parent / "Result_with_x" / size
            place.mkdir(parents=True, exist_ok=True)
            names = {kind: f"{kind}_{size}{tag}.nii.gz" for kind in ("SR", "Cortex")}
            images.save(place / names["SR"], volumes["sr"] + np.float32(n), np.eye(4))
            images.save(place / names["Cortex"], 0.9 * seg, np.eye(4))
            record = {"image": low.name, "sha256": images.sha256(low), "made_with": {}, "outputs": names}
            write_json(place / f"fastsrgan{tag}.json", record)
        images.save(tmp_path / "truth" / folder / f"{stem[0]}_hr.nii", volumes["hr"], np.eye(4))
        images.save(tmp_path / "truth" / folder / f"{stem[0]}_label.nii", volumes["label"].astype(np.uint8), np.eye(4))
    return tmp_path / "data", tmp_path / "truth"


def test_results_of_job_model_are_matched_by_the_images_they_lie_beside(originals, files, caplog):
    data, truth = originals
    told = evaluate_cohort.evaluate_folders(data, truth)
    expected = evaluate.evaluate_files(files["sr"], files["hr"], files["seg"], files["label"])
    rows = {row["subject"]: row for row in told["rows"]}
    assert not told["failed"] and sorted(rows) == sorted(
        f"{folder}/Result_with_x/{size}/{stem}"
        for folder, stem in (("s1", "a_lr"), ("s2", "b"), ("s2", "c"))
        for size in ("patch_16_step_8", "patch_16_step_16")
    )
    first = rows["s1/Result_with_x/patch_16_step_8/a_lr"]
    assert first["image"]["whole"]["mse"] == expected["image"]["whole"]["mse"]
    assert first["segmentation"] == pytest.approx(expected["segmentation"])
    assert first["baselines"]["image"].startswith("cubic spline")
    assert "is the truth of" not in caplog.text  # several results of one image


def test_one_folder_of_job_model_is_read_from_wherever_it_is_named(originals, tmp_path, monkeypatch):
    data, truth = originals
    place = data / "s2" / "Result_with_x" / "patch_16_step_8"
    monkeypatch.chdir(place)
    told = evaluate_cohort.evaluate_folders(".", truth / "s2")
    assert [(row["subject"], "baseline" in row) for row in told["rows"]] == [("b", True), ("c", True)]
    (place / "fastsrgan.json").unlink(), (place / "fastsrgan_c.json").unlink()
    with pytest.raises(InputError, match="SR_ images without the record of `job-model`"):
        evaluate_cohort.evaluate_folders(".", truth)


def test_the_truth_is_not_the_scan_where_both_lie_in_one_folder(files, tmp_path):
    """The scan bears the very name; where nothing else is there, as of a result on its scan's grid, it is told."""
    out, data = tmp_path / "out", tmp_path / "data"
    out.mkdir(), data.mkdir()
    low = images.save(data / "a.nii.gz", images.load(files["hr"]).data[:, :, ::2], np.diag([1, 1, 2, 1.0]))
    images.save(out / "a_sr.nii.gz", images.load(files["sr"]).data, np.eye(4))
    write_json(out / "a.json", {"input": {"path": low, "sha256": images.sha256(low)}})
    shutil.copy(files["hr"], data / "a_hr.nii.gz")
    (row,) = evaluate_cohort.evaluate_folders(out, data)["rows"]
    assert row["files"]["hr"].endswith("a_hr.nii.gz") and not any("very image" in note for note in row["notes"])
    (data / "a_hr.nii.gz").unlink()
    (row,) = evaluate_cohort.evaluate_folders(out, data)["rows"]
    assert row["files"]["hr"] == str(low) and any(
        "is the very image that the SR was made of" in n for n in row["notes"]
    )
