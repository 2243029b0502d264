"""Several structures of one label map: a class each, from the table to the scores of their results."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from cohort import SMALL, rows

from fastsrgan.cli.main import main
from fastsrgan.convert import convert
from fastsrgan.data.feed import Feed
from fastsrgan.data.subject import PatchRule
from fastsrgan.data.visit import Visits
from fastsrgan.errors import InputError
from fastsrgan.evaluate.cohort import Choice, evaluate_folders, evaluate_table
from fastsrgan.evaluate.pair import evaluate_files
from fastsrgan.infer.bids import evaluate_bids, infer_bids
from fastsrgan.infer.files import infer_files
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.io.bids import check_derivatives
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.model.purpose import mask_names
from fastsrgan.observation.model import Degradation, degrade
from fastsrgan.report.page import report
from fastsrgan.report.sections import scores_table
from fastsrgan.store.reader import open_store
from fastsrgan.study import run as study
from fastsrgan.study.data import Condition, acquire, find_heads
from fastsrgan.train.loop import whole_line
from fastsrgan.train.run import train
from fastsrgan.train.snapshots import made_for
from fastsrgan.train.validate import validate_whole
from fastsrgan.volume.geometry import resampled_affine

CHOSEN = ["cortex=3,42", "white=2041"]
PAIR = ["--sr", "s0.nii.gz", "--hr", "s0.nii.gz", "--label", "s0_label.nii.gz"]


def header_text(path):
    """The description in a NIfTI header: 80 bytes from byte 148."""
    return gzip.decompress(path.read_bytes())[148:228].rstrip(b"\0").decode()


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


def test_another_second_structure_is_converted_anew(table, tmp_path):
    """The same number of structures, the same first one, the same names: other values of the second."""
    table.write_text("\n".join(table.read_text(encoding="utf8").splitlines()[:2]) + "\n", encoding="utf8")
    store = tmp_path / "c.zarr"
    convert(table, store, label_classes=CHOSEN, workers=1)
    summary = convert(table, store, label_classes=[CHOSEN[0], "white=24"], resume=True, workers=1)
    assert (summary["converted"], summary["kept"]) == (1, 0)
    assert open_store(store).subjects[0].attrs["structures"] == [["cortex", [3, 42]], ["white", [24]]]


def test_one_choice_is_what_it_was(table, tmp_path):
    convert(table, tmp_path / "c.zarr", label_classes="3,42")
    (subject, *_) = open_store(tmp_path / "c.zarr").subjects
    assert "structures" not in subject.attrs and not subject.has_mask and subject.attrs["label_classes"] == [3, 42]


@pytest.mark.parametrize(("chosen", "told"), [(["c=3,42"], "c=3,42 %s %%"), (["42,3"], "3,42 %s %%"),
    (CHOSEN, "cortex=3,42 %s %%; white=2041 %s %%")])  # fmt: skip
def test_info_says_what_the_label_is_and_how_much_of_it_there_is(table, tmp_path, capsys, chosen, told):
    assert main(["convert", str(table), str(tmp_path / "c.zarr"), "--label", *chosen, "--quiet"]) == 0
    assert main(["info", str(tmp_path / "c.zarr"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.partition("\n")[2])
    truth = images.load_label(tmp_path / "s0_label.nii.gz", largest=65535).data
    shares = [f"{100 * np.isin(truth, values).mean():.2g}" for values in ((3, 42), (2041,))]
    assert rows[0]["label"] == told % tuple(shares[: told.count("%s")])


@pytest.mark.parametrize(
    ("chosen", "name"), [("cortex=3,42", "cortex"), ("3,42", "label 3, 42"), (CHOSEN, "cortex"), ("white", "white")]
)
def test_weights_call_the_structure_by_the_name_that_it_was_given(table, tmp_path, chosen, name):
    (tmp_path / "lut.txt").write_text("2041 white\n", encoding="utf8")
    store = convert(table, tmp_path / "c.zarr", label_classes=chosen, label_names=tmp_path / "lut.txt")["store"]
    feed = SimpleNamespace(
        store=open_store(store), visits=Visits(), degradation=Degradation(SMALL.new_low_res), axes=None
    )
    assert made_for(feed).structures == ((1, name),)


@pytest.mark.parametrize(
    ("words", "of"),
    [
        (["convert", "cohort.csv", "c.zarr", "--label", "99"], "99, nor do 2 other label maps"),
        (["train", "cohort.csv", "-o", "run", "-n", "1", "1", "2", "--label", "a=3", "b=98,99"], "b, 98, 99, nor do 2"),
        (["study", "steps", "cohort.csv", "-o", "st", "--label", "99"], "99 (it holds"),
        (["evaluate", "--table", "pairs.csv", "--label-classes", "99"], "99, nor does 1 other label map"),
        (["evaluate", *PAIR, "--label-classes", "99"], "99 (it holds"),
    ],
)
def test_a_structure_that_no_label_map_of_a_call_holds_is_an_error_that_names_what_they_hold(
    table, tmp_path, monkeypatch, capsys, words, of
):
    monkeypatch.chdir(tmp_path)
    lines = ["SR_image,HR_image,Label_image", *(f"s{i}.nii.gz,s{i}.nii.gz,s{i}_label.nii.gz" for i in (0, 1))]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([*words, "--quiet"]) == 3
    error = capsys.readouterr().err
    assert f"_label.nii.gz: holds nothing of {of}" in error
    assert "(it holds 3, 24, 42, 2041: choose of that with --label-classes)" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_structure_that_one_label_map_of_several_lacks_is_noted_and_counts_1_where_the_result_lacks_it_too(
    table, tmp_path
):
    label = images.load_label(tmp_path / "s1_label.nii.gz", largest=65535).data
    images.save(tmp_path / "s1_label.nii.gz", np.where(label == 24, 0, label), np.eye(4), overwrite=True)
    lines = ["SR_image,HR_image,Seg_image,Label_image"]
    lines += [f"s{i}.nii.gz,s{i}.nii.gz,s{i}_label.nii.gz,s{i}_label.nii.gz" for i in (0, 1)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    result = evaluate_table(tmp_path / "pairs.csv", choice=Choice(["24"]))
    assert [row["segmentation"]["dice"] for row in result["rows"]] == [1, 1]
    assert any("Dice counts 1" in note for note in result["rows"][1]["notes"])
    assert not any("Dice counts 1" in note for note in result["rows"][0]["notes"])
    found = convert(table, tmp_path / "c.zarr", label_classes="24")["warnings"]
    assert found == {"s1": ["label: the label holds none of the values 24: it is empty"]}
    images.save(tmp_path / "s0_label.nii.gz", np.zeros_like(label), np.eye(4), overwrite=True)
    assert evaluate_files(*[tmp_path / "s0.nii.gz"] * 2, label=tmp_path / "s0_label.nii.gz", label_classes=["24"])


@pytest.mark.parametrize("chosen", (["3,99"], ["cortex=3,42", "white=2041,99"]))
def test_a_chosen_value_that_no_map_holds_is_told_by_convert_and_by_the_run(table, tmp_path, capsys, caplog, chosen):
    told = "99 occurs in none of the 3 label maps"
    convert(table, tmp_path / "c.zarr", label_classes=chosen)
    with caplog.at_level("WARNING", logger="fastsrgan"):
        config = SMALL.replace(epochs=1, steps_per_epoch=1, lambda_adv=0.0, fit_mask=len(chosen) > 1)
        found = train(tmp_path / "c.zarr", tmp_path / "run", config)
    assert f"--label: {told}" in caplog.text and found["data_warnings"] == {"--label": [told]}
    assert f"--label: {told}" in (report(tmp_path / "run")[0]).read_text(encoding="utf8")
    assert main(["convert", str(table), str(tmp_path / "d.zarr"), "--label", *chosen, "--quiet"]) == 0
    assert f"warning: --label: {told}\n" in capsys.readouterr().err


def test_a_chosen_value_that_one_map_holds_is_not_told(table, tmp_path):
    text = table.read_text(encoding="utf8").replace("Base", "Base,Label_classes").replace("Test", "Test,3+24")
    table.write_text(text, encoding="utf8")
    label = images.load_label(tmp_path / "s0_label.nii.gz", largest=65535)
    images.save(tmp_path / "s0_label.nii.gz", np.where(label.data == 42, 3, label.data), np.eye(4), overwrite=True)
    assert convert(table, tmp_path / "c.zarr", label_classes="3,42")["warnings"] == {}
    assert open_store(tmp_path / "c.zarr").subjects[0].attrs["label_absent"] == [42]


def test_what_cannot_be_is_refused(table, tmp_path):
    with pytest.raises(InputError, match="a and b both hold 42"):
        convert(table, tmp_path / "c.zarr", label_classes=["a=3,42", "b=42"])
    text = (
        table.read_text(encoding="utf8").replace("Base", "Base,Mask_image").replace("Train", "Train,s0_label.nii.gz", 1)
    )
    table.write_text(text, encoding="utf8")
    with pytest.raises(InputError, match="several structures"):
        convert(table, tmp_path / "c.zarr", label_classes=CHOSEN)


@pytest.mark.parametrize(
    "given", (["--label-classes", "3,42"], ["--label-classes", *CHOSEN], ["--label-names", "lut.txt"])
)
@pytest.mark.parametrize("command", ("train", "study"))
def test_labels_of_a_store_are_not_chosen_again(table, tmp_path, capsys, monkeypatch, command, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lut.txt").write_text("3 cortex\n", encoding="utf8")
    store, out = tmp_path / "c.zarr", tmp_path / "out"
    convert(table, store, label_classes="3,42")
    words = ["train", str(store), "-n", "1", "1", "3"] if command == "train" else ["study", "steps", str(store)]
    assert main([*words, "-o", str(out), *given, "--quiet"]) == 2
    option = "--label-names" if given[0] == "--label-names" else "--label-classes"
    assert f"error: {option}: the labels of a store were chosen by `fastsrgan convert" in capsys.readouterr().err
    assert not (out / "config.yaml").exists() and not list(out.glob("*.json"))


def test_a_run_keeps_the_classes_of_its_table(table, tmp_path, capsys):
    run, manifest = tmp_path / "run", tmp_path / "run" / "data.zarr" / "manifest.json"
    again = ["train", str(table), "-o", str(run), "--device", "cpu", "--quiet"]
    small = ["-n", "1", "1", "3", "-b", "2", "-ps", "16", "--kernel-gen", "2", "--kernel-dis", "2", "--epoch", "1"]
    small += ["--steps-per-epoch", "1", "--lambda-adv", "0", "--feed-threads", "1"]
    assert main([*again, *small, "--label", *CHOSEN]) == 0
    before = manifest.read_bytes()
    assert main([*again, *small, "--label", "3"]) == 2 and "already holds a run" in capsys.readouterr().err
    assert main([*again, "--resume", "--label", "3"]) == 2
    assert "error: --label: other label classes than those of the run that is resumed" in capsys.readouterr().err
    for more in ([], ["--label", *CHOSEN]):
        assert main([*again, "--resume", "--epoch", "2", *more]) == 0
    assert manifest.read_bytes() == before
    for ending in ("", "_label"):  # a new subject has the classes of the others
        shutil.copyfile(tmp_path / f"s1{ending}.nii.gz", tmp_path / f"s3{ending}.nii.gz")
    table.write_text(table.read_text(encoding="utf8") + "s3.nii.gz,s3_label.nii.gz,Train\n", encoding="utf8")
    assert main([*again, "--resume", "--epoch", "3"]) == 0
    found = [s.attrs["structures"] for s in open_store(run / "data.zarr").subjects]
    assert found == [[["cortex", [3, 42]], ["white", [2041]]]] * 4


def test_a_table_whose_labels_training_does_not_take_is_refused_before_it_is_converted(table, tmp_path, capsys):
    for path in tmp_path.glob("*_label.nii.gz"):
        label = images.load_label(path, largest=65535).data
        images.save(path, np.where(label == 2041, 2, label).astype(np.int16), np.eye(4), overwrite=True)
    assert main(["train", str(table), "-o", str(tmp_path / "run"), "-n", "1", "1", "3", "--quiet"]) == 3
    err = capsys.readouterr().err
    assert "the label holds other values than 0 and 1, also 2, 3, 24, 42" in err and "--label-classes 3,42" in err
    assert not (tmp_path / "run").exists()
    assert convert(table, tmp_path / "c.zarr")["converted"] == 3  # whose labels may be chosen elsewhere


def test_subjects_with_other_structures_are_not_trained_together(table, tmp_path):
    text = (
        table.read_text(encoding="utf8").replace("Base", "Base,Label_classes").replace("Test", "Test,cortex=3|fluid=24")
    )
    table.write_text(text, encoding="utf8")
    convert(table, tmp_path / "c.zarr", label_classes=CHOSEN)
    with pytest.raises(InputError, match="other structures: s0, s1: cortex, white; s2: cortex, fluid"):
        train(tmp_path / "c.zarr", tmp_path / "run", SMALL.replace(fit_mask=True))


def test_a_dice_for_each_from_validation_to_evaluation(table, tmp_path, capsys):
    run, out, truth = tmp_path / "run", tmp_path / "out", tmp_path / "truth"
    options = ["-n", "1", "1", "3", "-b", "2", "-ps", "16", "--stride", "12", "--kernel-gen", "2", "--kernel-dis", "2"]
    options += ["--epoch", "1", "--steps-per-epoch", "2", "--lambda-adv", "0", "--feed-threads", "1", "--quiet"]
    assert main(["train", str(table), "-o", str(run), "--label", *CHOSEN, *options]) == 0
    assert "(mean Dice of 2 structures 0." in capsys.readouterr().out
    (line,) = rows(run, "validation")
    assert {"Dice", "Dice_mask0", "Dice_cortex", "Dice_white"} <= set(line["validation"])
    told = weights.info(run)["card"]["structures"]
    assert told == [{"name": "cortex", "values": [3, 42]}, {"name": "white", "values": [2041]}]
    truth.mkdir()
    for ending in ("", "_label"):
        (tmp_path / f"s2{ending}.nii.gz").rename(truth / f"s2{ending}.nii.gz")
    infer_files([truth / "s2.nii.gz"], out, run, device="cpu", new_resolution=[1.0] * 3, save_prob=True)
    mask = images.load_label(out / "s2_mask.nii.gz", largest=65535)
    assert set(mask.meta["values"]) <= {0, 3, 2041}
    record = json.loads((out / "s2.json").read_text(encoding="utf8"))
    assert record["weights"]["structures"] == told and record["weights"]["file"].endswith("best.safetensors")
    assert dict(mask_names(record["weights"])) == {3: "cortex", 2041: "white"}  # of the page's legend
    several = [{"value": 3, "name": "cortex"}, {"value": 2041, "name": "white"}]
    assert record["structures"] == [{"value": 1, "name": "cortex"}] and record["mask_structures"] == several
    assert header_text(out / "s2_mask.nii.gz") == "fastsrgan: 3 cortex, 2041 white"
    assert (
        header_text(out / "s2_seg.nii.gz") == "fastsrgan: cortex" and header_text(out / "s2_sr.nii.gz") == "fastsrgan"
    )
    assert header_text(out / "s2_prob.nii.gz") == "fastsrgan: probability of cortex"
    intents = {
        kind: nib.load(out / f"s2_{kind}.nii.gz").header.get_intent()[2] for kind in ("sr", "seg", "prob", "mask")
    }
    assert intents == {"sr": "", "seg": "cortex", "prob": "", "mask": ""}
    result = evaluate_folders(out, truth, choice=Choice(tuple(CHOSEN)))
    found = result["rows"][0]["structures"]
    label = images.load_label(truth / "s2_label.nii.gz", largest=65535).data
    for name, values in (("cortex", (3, 42)), ("white", (2041,))):
        a, b = np.isin(mask.data, values), np.isin(label, values)
        assert found[name]["dice"] == pytest.approx(2 * (a & b).sum() / max(a.sum() + b.sum(), 1))
    page = str(scores_table(result["rows"][0], "/scores"))
    assert all(f">{name}</th>" in page and f"/scores/structures/{name}/dice" in page for name in found)
    true = ["--hr", str(truth / "s2.nii.gz"), "--label", str(truth / "s2_label.nii.gz"), "--label-classes", *CHOSEN]
    assert main(["report", str(out), *true, "--quiet"]) == 0
    page = (out / "report.html").read_text(encoding="utf8")
    assert "the label is not shown" not in page
    assert "Segmented: cortex (mask image also: white); made for" in page
    told = json.loads(re.search(r'id="facts">(.*?)</script>', page)[1])["results"][0]["scores"]
    assert told["structures"] == found and told["segmentation"] == found["cortex"]


def test_whole_volumes_of_a_validation_have_the_dice_of_each_that_evaluate_gives(table, tmp_path):
    convert(table, tmp_path / "c.zarr", label_classes=CHOSEN)
    store = open_store(tmp_path / "c.zarr")
    law = Degradation(SMALL.new_low_res, SMALL.contrast_max, SMALL.noise, SMALL.geometry)
    feed = Feed(store, law, PatchRule(16, 12), seed=0, device=torch.device("cpu"), threads=1)
    generator = build_generator(GeneratorSpec(kernel=2, mask_classes=3), seed=3).eval()
    scores = validate_whole(generator, feed, ["s2"], structures=["cortex", "white"])
    told = [{"name": "cortex", "values": [3, 42]}, {"name": "white", "values": [2041]}]
    weights.save_generator(tmp_path / "w.safetensors", generator, card={"structures": told})
    sample = store.read("s2")
    done = degrade(sample.image, sample.spacing, (1.0, 1.0, 3.0))
    affine = resampled_affine(sample.affine, sample.image.shape, done.low_res.shape, (1.0, 1.0, 3.0))
    images.save(tmp_path / "x.nii.gz", done.low_res * np.float32(done.scale), affine)
    out = tmp_path / "out"
    infer_files([tmp_path / "x.nii.gz"], out, tmp_path / "w.safetensors", new_resolution=[1.0] * 3, device="cpu")
    files = (out / "x_sr.nii.gz", tmp_path / "s2.nii.gz", out / "x_mask.nii.gz", tmp_path / "s2_label.nii.gz")
    found = evaluate_files(*files, label_classes=CHOSEN)["structures"]
    assert {scores[f"whole_Dice_{name}"] for name in found} - {0.0, scores["whole_Dice"]}
    for name, one in found.items():
        assert scores[f"whole_Dice_{name}"] == pytest.approx(one["dice"], abs=1e-3)  # found: 0
    line = whole_line(1, scores)
    assert f"Dice_cortex {scores['whole_Dice_cortex']:.4g}" in line and "Dice_white" in line


def test_a_result_that_holds_one_of_several_structures_is_a_map_of_them(table, tmp_path):
    label, white = tmp_path / "s0_label.nii.gz", tmp_path / "white.nii.gz"
    images.save(
        white, np.where(images.load_label(label, largest=65535).data == 2041, 2041, 0).astype(np.int16), np.eye(4)
    )
    found = evaluate_files(tmp_path / "s0.nii.gz", tmp_path / "s0.nii.gz", white, label, label_classes=CHOSEN)
    assert found["structures"]["white"]["dice"] == 1
    assert found["structures"]["cortex"]["dice"] == found["segmentation"]["dice"] == 0
    assert any(note.startswith("segmentation: its only value, 2041, counts as that struc") for note in found["notes"])


def test_a_result_of_one_structure_that_is_scored_as_several_is_told(table, tmp_path):
    """Its 1 stood for a value of the label map, with a Dice of 0 and no word about it."""
    label, one = tmp_path / "s0_label.nii.gz", tmp_path / "one.nii.gz"
    images.save(one, (images.load_label(label, largest=65535).data == 3).astype(np.uint8), np.eye(4))
    files = (tmp_path / "s0.nii.gz", tmp_path / "s0.nii.gz", one, label)
    notes = evaluate_files(*files, label_classes=CHOSEN)["notes"]
    (told,) = [note for note in notes if "only value" in note]
    assert told.startswith("segmentation: its only value, 1, is none of the label's values, and is compared with all")
    assert not any("only value" in note for note in evaluate_files(*files, label_classes=["3"])["notes"])


@pytest.fixture
def model(tmp_path):
    """Weights that know the two structures, and have learned neither."""
    spec = GeneratorSpec(kernel=1, mask_classes=3)
    told = [{"name": "cortex", "values": [42, 3]}, {"name": "white", "values": [2041]}]
    return weights.save_generator(tmp_path / "w.safetensors", build_generator(spec, seed=2), card={"structures": told})


def test_derivatives_hold_all_structures_in_one_image_with_their_names(table, model, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    (raw / "sub-01" / "anat").mkdir(parents=True)
    (raw / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    for name, given in (("T1w", "s0"), ("dseg", "s0_label")):
        shutil.copyfile(tmp_path / f"{given}.nii.gz", raw / "sub-01" / "anat" / f"sub-01_{name}.nii.gz")
    infer_bids(raw, out, model, device="cpu", new_resolution=[1.0] * 3)
    base = out / "sub-01" / "anat" / "sub-01_desc-maskT1w_dseg"
    assert base.with_suffix(".tsv").read_text().splitlines() == [
        "index\tname", "0\tbackground", "3\tcortex", "2041\twhite"
    ]  # fmt: skip
    made = images.load_label(base.with_suffix(".nii.gz"), largest=65535)
    assert set(made.meta["values"]) <= {0, 3, 2041} and max(made.meta["values"]) > 0
    assert json.loads(base.with_suffix(".json").read_text())["Description"] == "Segmentation of cortex, white"
    assert check_derivatives(out) == []
    truth = images.load_label(raw / "sub-01" / "anat" / "sub-01_dseg.nii.gz", largest=65535).data
    found = evaluate_bids(out, raw, choice=Choice(tuple(CHOSEN)))["rows"][0]["structures"]
    for name, values in (("cortex", (3, 42)), ("white", (2041,))):
        a, b = np.isin(made.data, values), np.isin(truth, values)
        assert found[name]["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_a_study_has_a_dice_for_each_of_table_and_store(table, model, tmp_path):
    asked = study.Settings(patch=16, steps=(16,), ratios=(3.0,), noise=(0.0,), label_classes=CHOSEN, device="cpu")
    facts = study.run("steps", table, tmp_path / "a", [model], asked)
    by_model = {row["model"]: row["figures"] for row in facts["rows"]}
    (head,) = find_heads(table, label_classes=CHOSEN)
    case = acquire(head.load(), Condition("x", (1.0, 1.0, 3.0)), (0, head.key))
    done = infer_volume(case.scan.data, case.scan.affine, weights.load_generator(model), patch=16, step=16,
                        new_resolution=[1.0] * 3, device="cpu")  # fmt: skip
    truth = images.load_label(tmp_path / "s2_label.nii.gz", largest=65535).data[:, :, : case.hr.data.shape[2]]
    for number, (name, values) in enumerate((("cortex", (3, 42)), ("white", (2041,))), 1):
        a, b = done.prob[1:].argmax(axis=0) == number, np.isin(truth, values)
        wanted = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert by_model["w"][f"dice_{name}"]["mean"] == pytest.approx(wanted)
        assert 0.5 < by_model["interpolation"][f"dice_{name}"]["mean"] < 1  # found: 0.88 to 0.9
    assert by_model["interpolation"]["dice_cortex"]["mean"] == by_model["interpolation"]["dice"]["mean"]
    heading = (tmp_path / "a" / "steps.md").read_text(encoding="utf8")
    assert "| Dice cortex | Dice white |" in heading
    convert(table, tmp_path / "c.zarr", label_classes=CHOSEN)
    asked = replace(asked, label_classes=None)
    again = study.run("steps", tmp_path / "c.zarr", tmp_path / "b", [model], asked)
    stored = {row["model"]: row["figures"] for row in again["rows"]}
    for who in by_model:
        own = {k: v["mean"] for k, v in stored[who].items() if k != "seconds"}
        assert own == pytest.approx({k: v["mean"] for k, v in by_model[who].items() if k != "seconds"})


def test_weights_that_know_one_structure_have_no_dice_of_others(table, tmp_path):
    plain = weights.save_generator(tmp_path / "w.safetensors", build_generator(GeneratorSpec(kernel=1), seed=2))
    asked = study.Settings(patch=16, steps=(16,), ratios=(3.0,), noise=(0.0,), label_classes=CHOSEN, device="cpu")
    rows = study.run("steps", table, tmp_path / "a", [plain], asked)["rows"]
    assert {row["model"]: "dice_white" in row["figures"] for row in rows} == {"interpolation": True, "w": False}
