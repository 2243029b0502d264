"""The demo on a small stand-in cohort: every stage runs, the figures agree with each other, the picture is one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from commands import call, one_line

from fastsrgan.demo import run as demo
from fastsrgan.demo import template
from fastsrgan.demo.template import TemplateCohort, TemplateSubject
from fastsrgan.errors import UsageError
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
    assert abs(ours["PSNR dB"] - spline["PSNR dB"]) < 3  # two dozen tiny steps from the spline
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
