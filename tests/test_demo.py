"""The demo on a small stand-in cohort: every stage runs, the figures agree with each other, the picture is one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import call, one_line
from scipy import ndimage

from fastsrgan.core.progress import QUIET
from fastsrgan.demo import run as demo
from fastsrgan.demo import template
from fastsrgan.demo.template import TemplateCohort, TemplateSubject
from fastsrgan.errors import UsageError
from fastsrgan.evaluate import grids
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.volume.geometry import Volume


def small_cohort(folder: Path, **_: object) -> TemplateCohort:
    folder.mkdir(parents=True)
    subjects, lines = [], ["HR_image,Label_image,Base"]
    for i, base in enumerate(("Train", "Train", "Test")):
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (52, 56, 55)), indexing="ij"))
        r = np.sqrt((grid**2).sum(0))
        image, label = folder / f"s{i}.nii.gz", folder / f"s{i}_gm.nii.gz"
        images.save(image, np.where(r < 0.9, 500 + 300 * np.cos(7 * r + i), 0).astype(np.int16), np.eye(4))
        images.save(label, (r < 0.6).astype(np.uint8), np.eye(4))
        subjects.append(TemplateSubject(f"s{i}", base, image, label))
        lines.append(f"{image.name},{label.name},{base}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    return TemplateCohort(folder / "cohort.csv", tuple(subjects))


def test_demo_runs_and_its_figures_agree(tmp_path, monkeypatch):
    model = tmp_path / "model.safetensors"
    generator = build_generator(GeneratorSpec(kernel=2))
    generator.head.data[0] = 0  # starts at the spline, as the shipped weights did
    weights.save_generator(model, generator)
    monkeypatch.setattr(demo, "make_cohort", small_cohort)
    monkeypatch.setattr(demo.weights, "template_weights", lambda: model)
    result = demo.run(tmp_path / "out", device="cpu")
    spline, linear, ours = result["table"]
    written = json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf8"))
    assert written["table"] == [spline, linear, ours]
    assert written["scores"]["image"]["whole"]["psnr_db"] == ours["PSNR dB"]
    gained = ours["PSNR dB"] - spline["PSNR dB"]  # nearly the spline by the network, the rest is learned on the scan
    assert 0 < gained < 5  # found: 3.56
    assert spline["Dice"] > 0.8  # found: 0.97
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert result["page"] == str(tmp_path / "out" / "report.html") and Path(result["page"]).is_file()
    assert written["training"]["updates"] == 4  # 8 patches a subject, batches of 4, two epochs
    with pytest.raises(UsageError, match="--overwrite"):
        demo.run(tmp_path / "out", device="cpu")
    demo.fresh_folder(tmp_path / "out", True)
    # A second demo would end at the page that the first one left.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["demo.json"]


def test_what_no_demo_made_is_never_removed(tmp_path, capsys):
    """The demo's names are those of the manual: a run, its results and the scan of a user."""
    for name in ("run", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    (tmp_path / "scan.nii.gz").touch()
    for more in ((), ("--overwrite",)):
        code, _, told = call(capsys, "demo", "-o", tmp_path, *more)
        assert code == 2
        one_line(told, "no demo made it", "-o DIR goes elsewhere")
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "out", "kept", "scan.nii.gz"}
    stopped = demo.fresh_folder(tmp_path / "demo", False)  # one that was stopped at once has its mark
    (stopped / "run").mkdir()
    with pytest.raises(UsageError, match="holds an earlier demo"):
        demo.fresh_folder(stopped, False)
    assert not (demo.fresh_folder(stopped, True) / "run").exists()


@pytest.mark.parametrize("low_res", [(math.nan, 1, 1), (0.0, 1, 1), (1, -1, 3), (1, 1, math.inf), (1, 1, 1e9)])
def test_a_resolution_that_cannot_be_is_refused_before_anything(tmp_path, capsys, low_res):
    """Was an error after the training, with half a demo left behind."""
    code, _, told = call(capsys, "demo", "-o", tmp_path / "demo", "--low-res", *low_res)
    assert code == 2 and not (tmp_path / "demo").exists()
    one_line(told, "--low-res", "is not allowed")


def test_whole_slices_end_where_the_scan_ends():
    volume = Volume(np.zeros((20, 21, 31)), np.diag([1, 1, 0.5, 1]))
    assert template.whole_slices(volume, (1.0, 2.0, 3.0)).data.shape == (20, 20, 30)


def test_the_label_baseline_is_a_map_drawn_on_the_scan():
    rng = np.random.default_rng(0)
    hr = Volume(rng.random((12, 12, 12)).astype(np.float32) + 1, np.eye(4))
    label = Volume((rng.random((12, 12, 12)) > 0.5).astype(np.uint8), np.eye(4))
    scan, spline, drawn = demo.acquire(hr, label, (1.0, 1.0, 3.0))
    assert scan.data.shape == (12, 12, 4) and spline.data.shape == drawn.data.shape == (12, 12, 12)
    assert np.allclose(scan.spacing, (1, 1, 3)) and scan.affine[2, 3] == pytest.approx(1.0)
    # At the centres of the slices the interpolation returns the binary drawing.
    assert np.allclose(np.unique(np.round(drawn.data[:, :, 1::3], 4)), [0, 1])


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Every stage writes down what it is given; the networks' result is the truth itself."""
    given: dict[str, list] = {}

    def spy(name, answer=None):
        def stage(*args, **more):
            given[name] = [*args, more]
            return answer(*args, **more) if callable(answer) else answer

        return stage

    def infer(paths, out, *_, **__):
        out.mkdir()
        made = {kind: images.save(out / f"{kind}.nii.gz", np.ones((6, 6, 6)), np.eye(4)) for kind in ("sr", "seg")}
        return {"items": [{"outputs": made}]}

    scores = {"image": {"a": 1}, "gain": {"b": 2}, "segmentation": {}, "baseline": {"image": {}}}
    trained = {"stopped": None, "weights": "trained", "exit_code": 0}
    monkeypatch.setattr(demo, "make_cohort", spy("cohort", small_cohort))
    monkeypatch.setattr(demo, "convert", spy("convert"))
    monkeypatch.setattr(demo, "short_training", spy("train", trained))
    monkeypatch.setattr(demo, "infer_files", spy("infer", infer))
    monkeypatch.setattr(
        demo, "evaluate_pair", lambda *a, **k: given.setdefault("evaluate", []).append((a, k)) or scores
    )
    monkeypatch.setattr(demo, "result_figure", spy("draw", lambda path, *_, **__: path))
    monkeypatch.setattr(demo, "report", spy("report", lambda folder, **_: [folder / "report.html"]))
    monkeypatch.setattr(demo.weights, "template_weights", lambda: tmp_path / "start.safetensors")
    return given, trained


def test_every_stage_gets_what_the_demo_was_asked_for(stages, tmp_path):
    given, _ = stages
    out, low, progress = tmp_path / "out", (1.0, 1.0, 5.0), QUIET
    made = demo.run(out, device="cpu", seed=7, low_res_mm=low, progress=progress)
    assert given["cohort"] == [
        out / "cohort", {"n_train": 2, "n_test": 1, "seed": 7, "sd_voxels": 2.5, "progress": progress},
    ]  # fmt: skip
    assert given["convert"] == [out / "cohort" / "cohort.csv", out / "cohort.zarr", {"progress": progress}]
    assert given["train"] == [
        out / "cohort.zarr", out / "run", tmp_path / "start.safetensors", low, "cpu", progress, {},
    ]  # fmt: skip
    assert given["infer"] == [
        [out / "scan.nii.gz"], out / "out", "trained",
        {"patch": 128, "step": 30, "new_resolution": [1.0, 1.0, 1.0], "profile": "gaussian", "device": "cpu",
         "progress": progress},
    ]  # fmt: skip
    hr, label = images.load(out / "cohort" / "s2.nii.gz"), images.load_label(out / "cohort" / "s2_gm.nii.gz")
    scan, spline, drawn = demo.acquire(hr, label, low)
    stored = images.load(out / "scan.nii.gz")
    assert np.array_equal(stored.data, scan.data) and np.allclose(stored.affine, scan.affine)
    (ours, more), (linear, plain) = given["evaluate"]
    assert np.array_equal(ours[0].data, np.ones((6, 6, 6))) and np.array_equal(more["seg"].data, np.ones((6, 6, 6)))
    for one in (ours, linear):
        assert np.array_equal(one[1].data, hr.data)
    assert np.array_equal(linear[0].data, demo.best_linear(scan, spline).data)
    wanted = {"label": label.data, "mask": hr.data > 0, "baseline": spline.data, "baseline_seg": drawn.data}
    assert set(more) == {"seg", *wanted} and set(plain) == {"mask", "baseline"}
    assert all(np.array_equal(more[name].data, data) for name, data in wanted.items())
    assert all(np.array_equal(plain[name].data, wanted[name]) for name in plain)
    path, volumes, _, words = given["draw"]
    assert (path, words["title"]) == (out / "demo.png", "1 x 1 x 5 mm scan of an unseen subject")
    assert "Synthetic subject made from the MNI152 template" in words["footer"]
    shown = {"low": scan, "spline": spline, "linear": linear[0], "sr": ours[0], "truth": hr, "label": label}
    assert set(volumes) == {*shown, "seg"} and all(np.array_equal(volumes[k].data, v.data) for k, v in shown.items())
    written = json.loads((out / "demo.json").read_text(encoding="utf8"))
    assert [row["method"] for row in written["table"]] == ["cubic spline", "best linear", "fastsrgan"]
    assert written["low_res_mm"] == list(low) and written["start_weights"] == "start.safetensors"
    assert written["scores"]["linear"] == {"image": {"a": 1}, "gain": {"b": 2}}
    assert grids.knows_truth(written["scores"]), "the page says of its baseline's Dice that it knows the truth"
    assert " ".join(written["seconds"]) == "cohort convert train infer evaluate picture total"
    assert all(0 <= seconds < 1e6 for seconds in (*written["seconds"].values(), made["seconds"]))
    assert written["peak_memory_bytes"] > 0 and written["training"]["weights"] == "trained"
    assert made.pop("seconds") >= 0 and made == {
        "table": written["table"], "picture": str(out / "demo.png"), "json": str(out / "demo.json"),
        "page": str(out / "report.html"),
    }  # fmt: skip


def test_a_stage_says_its_name_has_its_result_and_its_own_seconds(monkeypatch, caplog):
    now = iter([100.0, 103.25, 200.0, 207.04])
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    stage = demo.Stages()
    with caplog.at_level("INFO", "fastsrgan"):
        assert [stage("one", lambda: "first"), stage("other", lambda: "second")] == ["first", "second"]
    assert stage.seconds == {"one": 3.2, "other": 7.0} and caplog.messages == ["one", "other"]


def test_a_training_that_was_stopped_ends_the_demo_with_its_code(stages, tmp_path):
    given, trained = stages
    trained |= {"stopped": "SIGTERM", "exit_code": 143}
    made = demo.run(tmp_path / "out", device="cpu")
    assert made["exit_code"] == 143 and made["picture"] is made["json"] is made["page"] is None
    assert made["table"] == [{"stopped": "training"}] and "infer" not in given and "report" not in given


@pytest.mark.parametrize("size", [1.0, 20.0, 0.99, 20.5])
def test_the_resolution_of_the_demo_has_two_ends(monkeypatch, tmp_path, size):
    def begun(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(demo, "make_cohort", begun)
    monkeypatch.setattr(demo.weights, "template_weights", lambda: tmp_path / "w")
    fits = 1 <= size <= 20
    with pytest.raises(ZeroDivisionError if fits else UsageError):
        demo.run(tmp_path / "out", device="cpu", low_res_mm=(1.0, size, 1.0))


def test_a_second_demo_takes_the_place_of_all_that_the_first_made_and_of_nothing_else(tmp_path):
    made = ["cohort", "cohort.zarr", "run", "out", "scan.nii.gz", "demo.png", "report.html"]
    (tmp_path / "mine.txt").touch()
    assert demo.fresh_folder(tmp_path, False) == tmp_path
    for name in made:
        path = tmp_path / name
        path.mkdir() if "." not in name or name == "cohort.zarr" else path.touch()
        with pytest.raises(UsageError, match="holds an earlier demo"):
            demo.fresh_folder(tmp_path, False)
        demo.fresh_folder(tmp_path, True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json", "mine.txt"], name


def test_the_best_linear_estimate_of_the_demo_agrees_with_the_scan_and_leaves_the_spline_as_it_was():
    rng = np.random.default_rng(1)
    hr = Volume(ndimage.gaussian_filter(rng.random((15, 15, 15)), 1).astype(np.float32) * 900, np.eye(4))
    scan, spline, _ = demo.acquire(hr, Volume((hr.data > 450).astype(np.uint8), np.eye(4)), (1.0, 1.0, 3.0))
    before = spline.data.copy()
    linear = demo.best_linear(scan, spline)
    assert np.array_equal(spline.data, before) and np.array_equal(linear.affine, spline.affine)
    assert ((linear.data - hr.data) ** 2).mean() < 0.9 * ((before - hr.data) ** 2).mean()  # found: 0.87 of it
    assert linear.data.min() >= 0
    assert 0.9 < scan.data.mean() / hr.data.mean() < 1.1  # in the units of the truth; found: 1


def test_whole_slices_keep_what_fits_and_the_place_of_the_first_voxel():
    data = np.arange(8 * 9 * 10, dtype=np.float32).reshape(8, 9, 10)
    volume = Volume(data, np.diag([1.0, 1, 1, 1]), ("odd",), {"a": 1})
    cut = template.whole_slices(volume, (1.5, 4.0, 2.5))
    assert cut.data.shape == (6, 8, 10) and np.array_equal(cut.data, data[:6, :8])
    assert np.array_equal(cut.affine, volume.affine) and (cut.warnings, cut.meta) == (("odd",), {"a": 1})


def test_the_columns_of_the_demos_table_are_the_headline_figures():
    scores = {"image": {"whole": {"psnr_db": 30.0}, "mask": {"psnr_db": 25.0}}, "segmentation": {"dice": 0.9}}
    row = demo.row("mine", scores)
    assert row["method"] == "mine" and (row["PSNR dB"], row["PSNR brain dB"], row["Dice"]) == (30.0, 25.0, 0.9)
    assert all("mask" not in heading for heading in row) and row["SSIM"] is None
