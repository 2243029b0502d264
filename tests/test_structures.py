"""Several structures of one label map: a class each, from the table to the scores of their results."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cohort import SMALL, rows

from fastsrgan.cli.main import main
from fastsrgan.convert import convert
from fastsrgan.errors import InputError
from fastsrgan.evaluate.cohort import Choice, evaluate_folders
from fastsrgan.infer.files import infer_files
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.report.sections import scores_table
from fastsrgan.report.viewer import structure_names
from fastsrgan.store.reader import open_store
from fastsrgan.train.run import train

CHOSEN = ["cortex=3,42", "white=2041"]


@pytest.fixture
def table(tmp_path):
    """Three subjects whose label maps hold FreeSurfer-like numbers: cortex left and right, white matter, fluid."""
    lines = ["HR_image,Label_image,Base"]
    for i, base in enumerate(("Train", "Train", "Test")):
        x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 28, 30)), indexing="ij")
        r = np.sqrt(x**2 + y**2 + (1 + i / 10) * z**2)
        labels = np.select([r < 0.3, r < 0.5, r < 0.75], [24, 2041, np.where(x < 0, 3, 42)], 0)
        image = np.select([r < 0.3, r < 0.5, r < 0.75, r < 0.9], [100, 700, 400, 200], 0) + 20 * np.cos(20 * r)
        images.save(tmp_path / f"s{i}.nii.gz", np.where(r < 0.9, image, 0).astype(np.int16), np.eye(4))
        images.save(tmp_path / f"s{i}_label.nii.gz", labels.astype(np.int16), np.eye(4))
        lines.append(f"s{i}.nii.gz,s{i}_label.nii.gz,{base}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    return tmp_path / "cohort.csv"


def test_each_structure_is_a_class_and_the_first_is_the_label(table, tmp_path):
    store = tmp_path / "c.zarr"
    assert main(["convert", str(table), str(store), "--label", *CHOSEN, "--quiet"]) == 0
    subject = open_store(store).subjects[0]
    sample, truth = open_store(store).read(subject.id), images.load_label(tmp_path / "s0_label.nii.gz", largest=65535)
    assert subject.attrs["structures"] == [["cortex", [3, 42]], ["white", [2041]]]
    assert np.array_equal(sample.label > 0, np.isin(truth.data, (3, 42)))
    assert np.array_equal(sample.mask, np.isin(truth.data, (3, 42)) + 2 * (truth.data == 2041))
    assert convert(table, store, label_classes=CHOSEN, resume=True)["converted"] == 0
    assert convert(table, store, label_classes=CHOSEN[::-1], resume=True)["converted"] == 3  # another order is another


def test_one_choice_is_what_it_was(table, tmp_path):
    convert(table, tmp_path / "c.zarr", label_classes="3,42")
    (subject, *_) = open_store(tmp_path / "c.zarr").subjects
    assert "structures" not in subject.attrs and not subject.has_mask and subject.attrs["label_classes"] == [3, 42]


def test_what_cannot_be_is_refused(table, tmp_path):
    with pytest.raises(InputError, match="a and b both hold 42"):
        convert(table, tmp_path / "c.zarr", label_classes=["a=3,42", "b=42"])
    text = (
        table.read_text(encoding="utf8").replace("Base", "Base,Mask_image").replace("Train", "Train,s0_label.nii.gz", 1)
    )
    table.write_text(text, encoding="utf8")
    with pytest.raises(InputError, match="several structures"):
        convert(table, tmp_path / "c.zarr", label_classes=CHOSEN)


def test_subjects_with_other_structures_are_not_trained_together(table, tmp_path):
    text = (
        table.read_text(encoding="utf8").replace("Base", "Base,Label_classes").replace("Test", "Test,cortex=3|fluid=24")
    )
    table.write_text(text, encoding="utf8")
    convert(table, tmp_path / "c.zarr", label_classes=CHOSEN)
    with pytest.raises(InputError, match="other structures: s0, s1: cortex, white; s2: cortex, fluid"):
        train(tmp_path / "c.zarr", tmp_path / "run", SMALL.replace(fit_mask=True))


def test_a_dice_for_each_from_validation_to_evaluation(table, tmp_path):
    run, out, truth = tmp_path / "run", tmp_path / "out", tmp_path / "truth"
    options = ["-n", "1", "1", "3", "-b", "2", "-ps", "16", "--stride", "12", "--kernel-gen", "2", "--kernel-dis", "2"]
    options += ["--epoch", "1", "--steps-per-epoch", "2", "--lambda-adv", "0", "--feed-threads", "1", "--quiet"]
    assert main(["train", str(table), "-o", str(run), "--label", *CHOSEN, *options]) == 0
    (line,) = rows(run, "validation")
    assert {"Dice", "Dice_mask0", "Dice_cortex", "Dice_white"} <= set(line["validation"])
    told = weights.info(run)["card"]["structures"]
    assert told == [{"name": "cortex", "values": [3, 42]}, {"name": "white", "values": [2041]}]
    truth.mkdir()
    for ending in ("", "_label"):
        (tmp_path / f"s2{ending}.nii.gz").rename(truth / f"s2{ending}.nii.gz")
    infer_files([truth / "s2.nii.gz"], out, run, device="cpu", new_resolution=[1.0] * 3)
    mask = images.load_label(out / "s2_mask.nii.gz", largest=65535)
    assert set(mask.meta["values"]) <= {0, 3, 2041}
    record = json.loads((out / "s2.json").read_text(encoding="utf8"))
    assert record["weights"]["structures"] == told and record["weights"]["file"].endswith("best.safetensors")
    assert structure_names(record) == {3: "cortex", 2041: "white"}  # of the page's legend
    result = evaluate_folders(out, truth, choice=Choice(tuple(CHOSEN)))
    found = result["rows"][0]["structures"]
    label = images.load_label(truth / "s2_label.nii.gz", largest=65535).data
    for name, values in (("cortex", (3, 42)), ("white", (2041,))):
        a, b = np.isin(mask.data, values), np.isin(label, values)
        assert found[name]["dice"] == pytest.approx(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))
    page = str(scores_table(result["rows"][0], "/scores"))
    assert all(f">{name}</th>" in page and f"/scores/structures/{name}/dice" in page for name in found)
