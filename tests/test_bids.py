"""BIDS: images found, names and sidecars of the derivatives, resume, evaluation; the check finds each fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from phantom import head

from fastsrgan.cli.main import main
from fastsrgan.core.files import read_json, write_json
from fastsrgan.errors import InputError, UsageError
from fastsrgan.evaluate.cohort import Choice, Item
from fastsrgan.infer import bids as bids_module
from fastsrgan.infer.bids import STAGE, evaluate_bids, infer_bids
from fastsrgan.infer.files import SomeFailed, infer_files
from fastsrgan.io import nifti as images
from fastsrgan.io.bids import SUFFIXES, check_derivatives, description, find_bids, parse, sidecar, stated
from fastsrgan.model import weights
from fastsrgan.model.networks import Critic, CriticSpec, GeneratorSpec, build_generator

SHAPE = (20, 24, 9)
NAMES = (
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_T2w.nii.gz",
    "sub-02/ses-a/anat/sub-02_ses-a_acq-thick_run-1_T2w.nii",
    "sub-02/ses-b/anat/sub-02_ses-b_T2w.nii.gz",
)
QUICK = {"patch": 16, "step": 16, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "w.safetensors"
    weights.save_generator(path, build_generator(GeneratorSpec(kernel=2), seed=1), Critic(CriticSpec(kernel=2)))
    return path


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "raw")


def make_dataset(root):
    """Four images of two participants, and files that are none of the wanted ones."""
    for i, name in enumerate(NAMES):
        phantom = head(SHAPE, (8.0, 8.0, 16.0))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        images.save(root / name, phantom.data + np.float32(i), phantom.affine)
    for name in (
        "sub-01/anat/sub-01_desc-old_T1w.nii.gz",
        "sub-01/anat/notes.nii.gz",
        "sub-01/anat/sub-01_T1map.nii.gz",
    ):
        shutil.copy(root / NAMES[0], root / name)
    write_json(root / "sub-01/anat/sub-01_T2w.json", {"SkullStripped": True})
    write_json(root / "dataset_description.json", {"Name": "raw", "BIDSVersion": "1.10.0"})
    return root


def _names(found):
    return [image.path.name for image in found]


def test_the_help_names_every_suffix_that_is_taken(capsys):
    assert main(["infer", "--help"]) == 0
    assert f"images of the dataset ({' '.join(SUFFIXES)})" in " ".join(capsys.readouterr().out.split())


def test_images_are_found_by_participant_session_and_suffix(dataset):
    assert _names(find_bids(dataset)) == [name.rsplit("/", 1)[1] for name in NAMES]
    assert _names(find_bids(dataset, ["sub-01"], suffixes=("T2w",))) == ["sub-01_T2w.nii.gz"]
    assert _names(find_bids(dataset, ["02"], ["b"])) == ["sub-02_ses-b_T2w.nii.gz"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"participants": ["01", "07"]}, "no participant 07 .there are 01, 02."),
        ({"sessions": ["z"]}, "session z"),
        ({"suffixes": ["PDw"]}, "no PDw image"),
    ],
)
def test_what_is_not_there_is_named(dataset, asked, told):
    with pytest.raises(InputError, match=told):
        find_bids(dataset, **asked)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no folder sub-"):
        find_bids(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        find_bids(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "entities"),
    [
        ("sub-01_T1w.nii.gz", "sub"),
        ("sub-a1_ses-2_acq-x_run-03_T2w.nii", "sub ses acq run"),
        ("sub-a+b_acq-x+y_T2w.nii", "sub acq"),  # BIDS 1.10: labels may hold +
        ("sub-01_T1w.json", None),
        ("sub-0_1_T1w.nii.gz", None),
        ("01_T1w.nii.gz", None),
        ("sub-01_T1w_brain.nii.gz", None),
    ],
)
def test_names_are_read(tmp_path, name, entities):
    image = parse(tmp_path / name)
    assert (image and " ".join(key for key, _ in image.entities)) == entities


@pytest.fixture
def derivatives(dataset, model, tmp_path):
    out = tmp_path / "deriv"
    return out, infer_bids(dataset, out, model, save_prob=True, png=True, **QUICK)


def test_derivatives_are_infers_results_under_valid_names(dataset, model, derivatives, tmp_path):
    out, summary = derivatives
    assert (summary["done"], summary["failed"]) == (4, 0) and not (out / STAGE).exists()
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*.nii.gz"))
    stems = ["sub-01/anat/sub-01", "sub-01/anat/sub-01", "sub-02/ses-a/anat/sub-02_ses-a_acq-thick_run-1"]
    stems += ["sub-02/ses-b/anat/sub-02_ses-b"]
    expected = []
    for stem, suffix in zip(stems, ("T1w", "T2w", "T2w", "T2w"), strict=True):
        kinds = (f"desc-sr_{suffix}", f"desc-cortex{suffix}_dseg", f"desc-cortex{suffix}_probseg")
        expected += [f"{stem}_{kind}.nii.gz" for kind in kinds]
    assert files == sorted(expected)
    assert check_derivatives(out) == []
    infer_files([dataset / NAMES[1]], tmp_path / "plain", model, **QUICK)
    for plain, derived in (("sr", "desc-sr_T2w"), ("seg", "desc-cortexT2w_dseg")):
        a, b = tmp_path / "plain" / f"sub-01_T2w_{plain}.nii.gz", out / f"sub-01/anat/sub-01_{derived}.nii.gz"
        assert a.read_bytes() == b.read_bytes()
    assert (out / "sub-02/ses-b/figures/sub-02_ses-b_desc-sr_T2w.png").stat().st_size > 1000


def test_sidecars_name_source_settings_and_skull(dataset, model, derivatives):
    out, _ = derivatives
    meta = {s: read_json(out / f"sub-01/anat/sub-01_desc-sr_{s}.json") for s in ("T1w", "T2w")}
    assert meta["T1w"]["Sources"] == ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"]
    assert [m["SkullStripped"] for m in meta.values()] == [False, True]
    record = meta["T1w"]["FastsrganRecord"]
    assert record["weights"]["sha256"] == weights.info(model)["sha256"] and record["asked"]["step"] == 16
    said = read_json(out / "dataset_description.json")
    assert said["DatasetType"] == "derivative" and said["GeneratedBy"][0]["Name"] == "fastsrgan"
    assert (out / said["DatasetLinks"]["raw"]).resolve() == dataset.resolve()
    table = (out / "sub-01/anat/sub-01_desc-cortexT1w_dseg.tsv").read_text()
    assert table.splitlines() == ["index\tname", "0\tbackground", "1\tstructure"]


def test_the_record_in_a_sidecar_names_the_files_of_the_dataset_from_its_own_place(derivatives):
    """Not those of the stage, which are gone."""
    _, summary = derivatives
    for item in summary["items"]:
        target = sidecar(Path(item["outputs"]["sr"]))
        outputs = read_json(target)["FastsrganRecord"]["outputs"]
        assert set(outputs) == {"sr", "seg", "prob", "png", "json"} and outputs["json"] == target.name
        assert all((target.parent / name).is_file() for name in outputs.values())
        assert outputs["sr"] == Path(item["outputs"]["sr"]).name and outputs["png"].startswith("../figures/")


def test_what_is_done_is_kept_resumed_or_replaced(dataset, model, tmp_path):
    out = tmp_path / "deriv"
    infer_bids(dataset, out, model, participants=["01"], **QUICK)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.nii.gz")}
    with pytest.raises(UsageError, match="2 of 4 derivatives exist"):
        infer_bids(dataset, out, model, **QUICK)
    summary = infer_bids(dataset, out, model, resume=True, **QUICK)
    assert (summary["done"], summary["skipped"]) == (2, 2)
    assert before.items() <= {p: p.stat().st_mtime_ns for p in out.rglob("*.nii.gz")}.items()
    with pytest.raises(UsageError, match="another step"):
        infer_bids(dataset, out, model, resume=True, **QUICK | {"step": 12})
    # Options that a record leaves out where they are the default count as any other, as for `infer_files`.
    for name, other in {"compile": "off", "flips": "x", "threshold": 0.4, "min_size": 2.0}.items():
        with pytest.raises(UsageError, match=f"another {name}"):
            infer_bids(dataset, out, model, resume=True, **QUICK | {name: other})
    summary = infer_bids(dataset, out, model, overwrite=True, participants=["sub-01"], **QUICK)
    assert summary["done"] == 2
    assert all(p.stat().st_mtime_ns > t for p, t in before.items())
    assert check_derivatives(out) == []


def test_what_a_replaced_result_held_besides_does_not_stand_beside_the_new_one(dataset, model, derivatives):
    out, _ = derivatives
    infer_bids(dataset, out, model, overwrite=True, participants=["01"], **QUICK)
    for kind in ("*probseg*", "figures/*.png"):
        assert not list((out / "sub-01").rglob(kind)) and len(list((out / "sub-02").rglob(kind))) >= 2
    assert len(list((out / "sub-01").rglob("*desc-sr_*.nii.gz"))) == 2 and check_derivatives(out) == []


@pytest.mark.fault(15)
def test_a_damaged_image_costs_itself_only_and_can_be_made_up(dataset, model, tmp_path):
    out, bad = tmp_path / "deriv", dataset / NAMES[3]
    whole = bad.read_bytes()
    bad.write_bytes(whole[:300])
    for again in (False, True):
        with pytest.raises(SomeFailed, match=r"1 of 4 volumes failed: .* \(see the errors above\)") as caught:
            infer_bids(dataset, out, model, resume=again, **QUICK)
        assert caught.value.what == str(out) and caught.value.summary["failed"] == 1
        assert caught.value.summary["skipped" if again else "done"] == 3
    assert len(list(out.rglob("*_desc-sr_*.nii.gz"))) == 3 and check_derivatives(out) == []
    bad.write_bytes(whole)
    assert infer_bids(dataset, out, model, resume=True, **QUICK)["done"] == 1


def test_derivatives_do_not_go_into_another_dataset(dataset, model):
    with pytest.raises(UsageError, match="dataset of its own"):
        infer_bids(dataset, dataset, model, **QUICK)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda out: (out / "dataset_description.json").unlink(), "no GeneratedBy"),
        (lambda out: _described(out, DatasetType=None), "DatasetType is not derivative"),
        (lambda out: _described(out, DatasetType="raw"), "DatasetType is not derivative"),
        (lambda out: next(out.rglob("*desc-sr_T1w.json")).unlink(), "no Sources"),
        (lambda out: next(out.rglob("*_dseg.tsv")).unlink(), "no table of its labels"),
        (lambda out: _rename(out, "sub-01_desc-sr_T1w", "sub-01_desc-sr_acq-x_T1w"), "out of order"),
        (lambda out: _rename(out, "sub-01_desc-sr_T1w", "sub-03_desc-sr_T1w"), "does not lie in sub-03/anat"),
        (lambda out: _rename(out, "sub-01_desc-sr_T1w", "sub-01_kind-sr_T1w"), "unknown entity kind"),
        (lambda out: _rename(out, "sub-01_desc-sr_T1w", "sub-01_desc-sr_brain"), "suffix brain"),
        (lambda out: shutil.rmtree(out.parent / "raw" / "sub-01"), "is not there"),
    ],
)
def test_the_check_finds_what_is_wrong(dataset, model, tmp_path, damage, told):
    out = tmp_path / "deriv"
    infer_bids(dataset, out, model, participants=["01"], suffixes=("T1w",), **QUICK)
    assert check_derivatives(out) == []
    damage(out)
    assert any(told in fault for fault in check_derivatives(out))


def _described(out, **changes):
    path = out / "dataset_description.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))


def _rename(out, old, new):
    for path in list(out.rglob(f"{old}.*")):
        path.rename(path.with_name(path.name.replace(old, new)))


def test_derivatives_are_evaluated_against_a_dataset_of_truths(dataset, model, tmp_path):
    out, truth = tmp_path / "deriv", tmp_path / "truth"
    infer_bids(dataset, out, model, participants=["01"], **QUICK)
    phantom = head((20, 24, 18), (8.0, 8.0, 8.0))
    anat = truth / "derivatives" / "manual" / "sub-01" / "anat"
    for folder in (truth / "sub-01" / "anat", anat):
        folder.mkdir(parents=True)
    images.save(truth / "sub-01/anat/sub-01_T2w.nii.gz", phantom.data, phantom.affine)
    images.save(anat / "sub-01_desc-gm_dseg.nii.gz", phantom.label, phantom.affine)
    result = evaluate_bids(out, truth)
    assert [row["subject"] for row in result["rows"]] == ["sub-01_T2w"]
    assert [f["subject"] for f in result["failed"]] == ["sub-01_T1w"]
    row = result["rows"][0]
    assert "dice" in row["segmentation"] and "cubic spline" in row["baselines"]["image"]
    assert row["files"]["lr"] == str((dataset / NAMES[1]).absolute())
    assert result["without_result"] == []
    images.save(truth / "sub-01/anat/sub-01_run-2_T2w.nii.gz", phantom.data, phantom.affine)
    images.save(truth / "sub-01/anat/sub-01_desc-x_T2w.nii.gz", phantom.data, phantom.affine)
    assert evaluate_bids(out, truth)["without_result"] == ["sub-01/anat/sub-01_run-2_T2w.nii.gz"]
    # A result is no truth, where BIDS has derivatives too: neither the one that is evaluated nor another.
    made = shutil.copytree(out, truth / "derivatives" / "fastsrgan")
    assert evaluate_bids(out, truth)["rows"][0]["files"]["label"] == row["files"]["label"]
    shutil.rmtree(truth / "derivatives" / "manual")
    assert ["segmentation" in evaluate_bids(of, truth)["rows"][0] for of in (out, made)] == [False, False]


def test_folders_that_were_exchanged_are_called_that(dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dataset_description.json").write_text(json.dumps({"GeneratedBy": [{"Name": "fastsrgan"}]}))
    with pytest.raises(
        InputError, match=r"out: holds results .* where the truth is \(first the results, then the truth"
    ):
        evaluate_bids(dataset, out)


@pytest.mark.parametrize("made", [False, True])
def test_truths_that_are_no_folder_are_refused_before_any_result_is_looked_at(tmp_path, made):
    truth = tmp_path / "truth"
    if made:
        truth.touch()
    with pytest.raises(InputError, match=r"truth: is no folder .*evaluate --bids DERIVATIVES DATASET"):
        evaluate_bids(tmp_path / "none", truth)


def test_truth_and_label_of_a_derivative_are_the_first_in_their_order_and_the_segmentation_is_what_is_asked(
    tmp_path, monkeypatch
):
    """Of the dataset itself, of the image's own contrast, then of any; the classes of several where there are some."""
    monkeypatch.setattr(bids_module, "evaluate_items", lambda out, items, **more: items)
    out, truth = tmp_path / "out" / "sub-1" / "anat", tmp_path / "truth"
    names = ["sub-1_acq-x_dseg.nii", "sub-1_acq-x_desc-zT1w_dseg.nii.gz", "sub-1_acq-x_desc-a_dseg.nii.gz"]
    places = [truth / "sub-1" / "anat", *(truth / "derivatives" / name / "sub-1" / "anat" for name in "ab")]
    for folder in (out, *places):
        folder.mkdir(parents=True)
    for name in ("desc-sr", "desc-cortexT1w_dseg", "desc-maskT1w_dseg"):
        (out / f"sub-1_acq-x_{name if 'dseg' in name else name + '_T1w'}.nii.gz").touch()
    (tmp_path / "out" / "dataset_description.json").write_text('{"Name": "a", "BIDSVersion": "1.9.0"}')
    images_of = [places[0] / f"sub-1_acq-x_T1w.nii{end}" for end in (".gz", "")]
    labels = [place / name for place in places for name in names]
    for path in (*images_of, *labels):
        path.touch()

    def item(*classes: str):
        (found,) = evaluate_bids(tmp_path / "out", truth, choice=Choice(classes))
        assert found.subject == "sub-1_acq-x_T1w"
        return found

    assert item("a=1", "b=2").files["seg"].name == "sub-1_acq-x_desc-maskT1w_dseg.nii.gz"
    assert item("1").files["seg"].name == "sub-1_acq-x_desc-cortexT1w_dseg.nii.gz"
    (out / "sub-1_acq-x_desc-maskT1w_dseg.nii.gz").unlink()
    for classes in (("1",), ("a=1", "b=2")):
        assert item(*classes).files["seg"].name == "sub-1_acq-x_desc-cortexT1w_dseg.nii.gz"
    for label in labels:
        assert item().files["label"] == label
        label.unlink()
    assert set(item().files) == {"sr", "hr"} and item().files["hr"] == images_of[0]
    images_of[0].unlink()
    assert item().files["hr"] == images_of[1]
    images_of[1].unlink()
    assert item().fault == f"no sub-1/anat/sub-1_acq-x_T1w.nii.gz in {truth}"


def test_lines_of_others_that_a_validator_passes_over_are_kept(tmp_path):
    path = tmp_path / ".bidsignore"
    for text in ("", "mine\n.fastsrgan\n", "figures\nmine"):
        path.write_text(text, encoding="utf8")
        for _ in range(2):
            bids_module._ignore(path)
            lines = path.read_text(encoding="utf8").splitlines()
            kept = text.splitlines()
            assert lines == [*kept, *(line for line in (".fastsrgan", "figures", "*.html") if line not in kept)]


def test_the_commands(dataset, model, tmp_path, capsys):
    out = tmp_path / "deriv"
    words = ["infer", "--bids", dataset, "--participant-label", "01", "--suffix", "T2w", "-o", out, "-w", model]
    words += ["--patch", 16, "--step", 16, "--device", "cpu"]
    assert main(["--quiet", *map(str, words)]) == 0
    assert "sub-01_desc-sr_T2w.nii.gz" in capsys.readouterr().out
    assert main(["--quiet", "evaluate", "--bids", str(out), str(dataset), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["subject"] == "sub-01_T2w"
    assert main(["--quiet", "infer", "--bids", str(dataset), "x.nii.gz", "-o", str(out)]) == 2
    assert "one of the two" in capsys.readouterr().err
    assert main(["--quiet", "infer", "-o", str(out)]) == 2


def test_the_sidecar_of_an_image(tmp_path):
    assert sidecar(tmp_path / "a_T1w.nii.gz").name == sidecar(tmp_path / "a_T1w.nii").name == "a_T1w.json"


@pytest.mark.parametrize(
    ("jsons", "said"),
    [
        ({"T2w": 2.0}, (2.0, "T2w.json")),
        ({"T2w": 2.0, "acq-thick_T2w": 2.5}, (2.5, "acq-thick_T2w.json")),
        ({"T2w": 2.0, "sub-02/sub-02_T2w": 3.0}, (3.0, "sub-02_T2w.json")),
        (
            {"T2w": 2.0, "sub-02/ses-a/anat/sub-02_ses-a_acq-thick_run-1_T2w": 4.0},
            (4.0, "sub-02_ses-a_acq-thick_run-1_T2w.json"),
        ),
        (
            {"T1w": 2.0, "acq-thin_T2w": 2.0, "sub-01/sub-01_T2w": 2.0, "notT2w": 2.0},
            (None, "sub-02_ses-a_acq-thick_run-1_T2w.json"),
        ),
    ],
)
def test_an_image_inherits_what_the_json_files_above_it_say(dataset, jsons, said):
    """BIDS, "The Inheritance Principle": the nearest that speaks of a field counts."""
    for name, value in jsons.items():
        write_json(dataset / f"{name}.json", {"SliceThickness": value})
    value, file = stated(dataset / NAMES[2], "SliceThickness")
    assert (value, file.name) == said


def test_outside_a_dataset_nothing_is_inherited(dataset):
    write_json(dataset / "T2w.json", {"SliceThickness": 2.0})
    (dataset / "dataset_description.json").unlink()
    assert stated(dataset / NAMES[2], "SliceThickness")[0] is None


def test_a_session_that_is_not_there_is_refused(dataset):
    """Was passed over where another of the named sessions was there."""
    with pytest.raises(InputError, match="no session zz"):
        find_bids(dataset, sessions=["a", "zz"])


def test_phase_images_and_images_beside_anat_are_left_out_and_named(dataset, caplog):
    for name in ("anat/sub-01_part-phase_T1w.nii.gz", "sub-01_T2w.nii.gz", "anat/old/sub-01_FLAIR.nii.gz"):
        (dataset / "sub-01" / name).parent.mkdir(exist_ok=True)
        shutil.copy(dataset / NAMES[0], dataset / "sub-01" / name)
    shutil.copy(dataset / NAMES[0], dataset / "sub-01/anat/sub-01_part-mag_T1w.nii.gz")
    (dataset / "sub-01/anat/notes.nii.gz").unlink()
    with caplog.at_level("INFO", logger="fastsrgan"):
        found = set(_names(find_bids(dataset, participants=["01"])))
    assert "sub-01_part-mag_T1w.nii.gz" in found
    assert not {"sub-01_part-phase_T1w.nii.gz", "sub-01_FLAIR.nii.gz"} & found
    for told in ("sub-01_part-phase_T1w.nii.gz (part phase", "sub-01_T2w.nii.gz (in sub-01)", "(in sub-01/anat/old)"):
        assert told in caplog.text


# As in the schema of BIDS.
ORDER = (
    "sub",
    "ses",
    "sample",
    "task",
    "tracksys",
    "acq",
    "nuc",
    "voi",
    "ce",
    "trc",
    "stain",
    "rec",
    "dir",
    "run",
    "mod",
)
ORDER += (
    "echo",
    "flip",
    "inv",
    "mt",
    "part",
    "proc",
    "hemi",
    "space",
    "split",
    "recording",
    "chunk",
    "seg",
    "res",
    "den",
)
ORDER += ("label", "desc")


def listed(root, stem, suffix="T1w", sources=("bids:raw:a",), **more):
    """An image of a derivatives dataset with its sidecar."""
    folder = root / "sub-1" / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}_{suffix}.nii.gz"
    path.touch()
    meta = {"Sources": list(sources), "SpatialReference": "orig", "SkullStripped": True} | more
    write_json(sidecar(path), {key: value for key, value in meta.items() if value is not None})
    return path


@pytest.fixture
def made(tmp_path):
    """A derivatives dataset without a fault."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a").touch()
    root = tmp_path / "d"
    root.mkdir()
    links = {"raw": "../raw", "web": "https://host/raw", "file": f"file://{tmp_path}/raw"}
    said = {"Name": "d", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "x"}]}
    write_json(root / "dataset_description.json", said | {"DatasetLinks": links})
    listed(root, "sub-1_" + "_".join(f"{key}-1" for key in ORDER[2:]))
    assert check_derivatives(root) == []
    return root


def test_every_two_neighbours_of_the_entities_have_their_order(made):
    for k in range(2, len(ORDER) - 1):
        path = listed(made, f"sub-1_{ORDER[k + 1]}-1_{ORDER[k]}-1")
        (fault,) = check_derivatives(made)
        assert fault.endswith(": entities twice or out of order")
        path.unlink()
    listed(made, "sub-1_acq-1_acq-1")
    assert len(check_derivatives(made)) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *(({key: None}, [f"its JSON has no {key}"]) for key in ("SpatialReference", "SkullStripped")),
        ({"Sources": "bids:raw:a"}, []),
        ({"Sources": ["bids:raw:a", "bids:raw:b"]}, ["source bids:raw:b is not there"]),
        ({"Sources": ["bids:other:a"]}, ["source bids:other:a is not there"]),
        ({"Sources": ["raw/a"]}, ["source raw/a is not there"]),
        ({"Sources": ["bids:web:b", "bids:file:a", "bids::dataset_description.json"]}, []),
        (
            {"Sources": ["bids:file:b", "bids::raw"]},
            ["source bids:file:b is not there", "source bids::raw is not there"],
        ),
    ],
)
def test_sidecars_name_sources_that_are_there(made, change, told):
    path = listed(made, "sub-1_acq-2", **change)
    assert check_derivatives(made) == [f"{path.relative_to(made)}: {fault}" for fault in told]


def test_segmentations_need_a_table_and_no_word_of_the_skull(made):
    path = listed(made, "sub-1_desc-x", "dseg", SkullStripped=None)
    assert check_derivatives(made) == [f"{path.relative_to(made)}: no table of its labels beside it"]
    sidecar(path).with_suffix(".tsv").touch()
    listed(made, "sub-1_desc-x", "probseg", SkullStripped=None)
    assert check_derivatives(made) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"Name": ""}, "no Name"),
        ({"BIDSVersion": None}, "no BIDSVersion"),
        ({"GeneratedBy": [{"Name": "x"}, {"Version": "1"}]}, "GeneratedBy without a Name"),
        ({"GeneratedBy": {"Name": "x"}}, "GeneratedBy without a Name"),
    ],
)
def test_a_description_has_its_fields(made, changes, told):
    _described(made, **changes)
    assert check_derivatives(made) == [f"dataset_description.json: {told}"]


def test_the_description_of_derivatives_is_what_the_rules_ask_for():
    assert description("mine", "1.2", {"raw": "../raw", "b": "https://host/b"}) == {
        "Name": "mine",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "fastsrgan", "Version": "1.2"}],
        "SourceDatasets": [{"URL": "../raw"}, {"URL": "https://host/b"}],
        "DatasetLinks": {"raw": "../raw", "b": "https://host/b"},
    }


def test_what_is_made_of_an_image_keeps_its_entities_and_has_its_own_desc(tmp_path):
    image = parse(tmp_path / "sub-1_ses-a_run-2_desc-old_T2w.nii.gz")
    assert str(image.derived("sr")) == "sub-1/ses-a/anat/sub-1_ses-a_run-2_desc-sr_T2w.nii.gz"
    assert str(image.derived("x", "dseg", ".tsv")) == "sub-1/ses-a/anat/sub-1_ses-a_run-2_desc-x_dseg.tsv"


def bare(root, *names):
    """Files of a dataset that nobody opens."""
    for name in names:
        path = root / "/".join(part for part in name.split("_") if part[:4] in ("sub-", "ses-")) / "anat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.mark.parametrize("used", range(3))
def test_an_image_without_a_result_is_told_with_and_without_sessions(tmp_path, used):
    names = ["sub-1_T1w.nii", "sub-2_ses-a_T1w.nii", "sub-2_ses-b_T1w.nii.gz"]
    root = bare(tmp_path, *names)
    there = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.nii*"))]
    assert len(there) == 3
    item = Item(names[used].partition(".")[0], {"hr": root / there[used]})
    assert bids_module._without_result(root, [item]) == [name for name in there if name != there[used]]


def test_participants_and_sessions_are_known_with_and_without_their_prefix(tmp_path):
    root = bare(tmp_path, "sub-1_ses-a_T1w.nii", "sub-1_ses-b_T1w.nii", "sub-2_ses-a_T1w.nii.gz", "sub-2_T1w.nii")
    for sessions in (["a"], ["ses-a"]):
        assert _names(find_bids(root, sessions=sessions)) == ["sub-1_ses-a_T1w.nii", "sub-2_ses-a_T1w.nii.gz"]
    assert _names(find_bids(root, ["sub-2"], ["ses-a", "b"])) == ["sub-2_ses-a_T1w.nii.gz"]
    assert _names(find_bids(root, ["2"])) == ["sub-2_T1w.nii", "sub-2_ses-a_T1w.nii.gz"]
    with pytest.raises(InputError, match="no session c"):
        find_bids(root, ["1"], ["c"], ["T1w"])


def test_of_many_participants_and_images_the_first_are_named(tmp_path, caplog):
    root = bare(tmp_path, *(f"sub-{k:02d}_T1w.nii" for k in range(11)))
    with pytest.raises(InputError) as error:
        find_bids(root, ["x"])
    assert error.value.hint == "there are " + ", ".join(f"{k:02d}" for k in range(10)) + " and 1 more"
    bare(root, *(f"sub-00_run-{k}_bold.nii" for k in range(6)), "sub-00_dseg.nii")
    (root / "sub-00" / "anat" / ".sub-00_T2w.nii").touch()
    with caplog.at_level("INFO", "fastsrgan"):
        assert len(find_bids(root)) == 11
    assert "6 images are not taken: " in caplog.text and caplog.text.strip().endswith("(suffix bold) and 1 more")
    assert caplog.text.count("suffix bold") == 5
    bare(root, "sub-00_desc-x_T1w.nii", "sub-00_desc-x_dseg.nii")
    with pytest.raises(
        InputError, match=r"no T1w image of participants 00 and desc y; 10 are not taken: .*\(no desc\)"
    ):
        find_bids(root, ["00"], suffixes=["T1w"], desc="y")
    assert _names(find_bids(root, suffixes=["dseg"], desc="x")) == ["sub-00_desc-x_dseg.nii"]


def test_images_come_by_their_path_whether_they_lie_in_sessions_or_not(tmp_path):
    names = (
        "sub-1_ses-b_T1w.nii",
        "sub-1_ses-a_T2w.nii",
        "sub-1_ses-a_T1w.nii",
        "sub-2_T1w.nii",
        "sub-3_ses-a_T1w.nii",
    )
    assert _names(find_bids(bare(tmp_path, *names))) == [names[k] for k in (2, 1, 0, 3, 4)]


def test_an_image_in_the_folder_of_another_participant_or_session_is_left_out_and_named(tmp_path, caplog):
    """Its results went to a participant that the dataset has not; with a participant named it was dropped unsaid."""
    root = bare(tmp_path, "sub-1_ses-a_T1w.nii", "sub-2_T1w.nii")
    for odd in ("sub-1/ses-a/anat/sub-1_ses-b_T1w.nii", "sub-2/anat/sub-1_T1w.nii", "sub-2/anat/scan.nii"):
        (root / odd).touch()
    for asked, left in (([], 3), (["1"], 1), (["2"], 2)):
        caplog.clear()
        with caplog.at_level("INFO", "fastsrgan"):
            found = _names(find_bids(root, asked))
        wanted = [f"sub-{k}" for k in asked or "12"]
        assert found == [n for n in ("sub-1_ses-a_T1w.nii", "sub-2_T1w.nii") if n[:5] in wanted]
        verb = "image is" if left == 1 else "images are"
        assert f"{left} {verb} not taken" in caplog.text
        assert ("sub-1_T1w.nii (lies in sub-2/anat)" in caplog.text) == ("sub-2" in wanted)
        assert ("scan.nii (no BIDS name" in caplog.text) == ("sub-2" in wanted)
