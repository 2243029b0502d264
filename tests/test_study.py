"""Studies: a cell is what evaluate says of infer, finished cells are kept, tables and figures hold the rows."""

from __future__ import annotations

import csv
import json
import logging
import math
import shutil
import signal
from dataclasses import asdict, replace
from types import SimpleNamespace

import dicom_files
import numpy as np
import pytest
from commands import call, one_line
from phantom import head

from fastsrgan.cli import study as cli_study
from fastsrgan.cli.main import failed, main
from fastsrgan.convert import convert
from fastsrgan.core.progress import QUIET
from fastsrgan.errors import InputError, UsageError
from fastsrgan.evaluate.pair import evaluate_pair, flat
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import Critic, CriticSpec, GeneratorSpec, build_generator
from fastsrgan.study import cells as study_cells
from fastsrgan.study import data as data_module
from fastsrgan.study import plots
from fastsrgan.study import plots as study_figure
from fastsrgan.study import run as study
from fastsrgan.study import tables as study_output
from fastsrgan.study.data import Condition, acquire, find_heads, spacing_of, thick
from fastsrgan.study.plots import PANELS, time_fit
from fastsrgan.study.tables import csv_rows, markdown, paper_rows, shown_rows
from fastsrgan.volume.geometry import Volume

SHAPE = (21, 26, 24)
SMALL = {"patch": 16, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two small heads in a table, one Train and one Test, and two tiny models."""
    path = tmp_path_factory.mktemp("study")
    lines = ["HR_image,Label_image,Base"]
    for name, base, edge in (("a", "Test", 7.0), ("b", "Train", 8.0), ("c", "Test", 10.0)):
        phantom = head(SHAPE, (7.0, 7.0, 7.0), edge=edge)
        images.save(path / f"{name}.nii.gz", phantom.data, phantom.affine)
        images.save(path / f"{name}_gm.nii.gz", phantom.label, phantom.affine)
        lines.append(f"{name}.nii.gz,{name}_gm.nii.gz,{base}")
    (path / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    for seed, name in enumerate(("with", "without")):
        generator = build_generator(GeneratorSpec(kernel=2), seed=seed)
        weights.save_generator(path / f"{name}.safetensors", generator, Critic(CriticSpec(kernel=2)))
    return path


class Counting(type(QUIET)):
    """A display that keeps what it is told to count."""

    def __init__(self) -> None:
        self.totals, self.done = [], 0

    def start(self, label: str, total: int, unit: str) -> None:
        self.totals.append(total)

    def advance(self, n: int = 1, **facts: object) -> None:
        self.done += n


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take longer than all else here, and other tests draw them."""
    monkeypatch.setattr(
        study_output, "draw", lambda base, *_, **__: [base.with_suffix(".png"), base.with_suffix(".svg")]
    )


@pytest.fixture(scope="module")
def steps(folder):
    """A study of steps, made once."""
    settings = study.Settings(**SMALL, steps=(16, 8, 12), noise=(0.0, 0.1))
    out = folder / "steps"
    return study.run("steps", folder / "cohort.csv", out, [folder / "with.safetensors"], settings)


def test_a_cell_is_what_evaluate_says_of_infer(folder, steps):
    low_res = (7.0, 7.0, 21.0)
    subject = find_heads(folder / "cohort.csv")[0]
    case = acquire(subject.load(), Condition("noisy", low_res, 0.1), (0, subject.key))
    done = infer_volume(
        case.scan.data,
        case.scan.affine,
        weights.load_generator(folder / "with.safetensors"),
        patch=16,
        step=12,
        new_resolution=list(case.hr.spacing),
        device="cpu",
        precision="fp32",
    )
    seg = Volume((done.prob[0] > 0.5).astype(np.uint8), done.affine)
    expected = flat(evaluate_pair(Volume(done.sr, done.affine), case.hr, seg=seg, label=case.label))
    found = next(
        c
        for c in steps["cells"]
        if (c["subject"], c["condition"], c["model"], c["step"]) == (subject.name, "noise 10 %", "with", 12)
    )
    assert found["scores"] == pytest.approx(expected, rel=1e-6)  # found: 0 (rounding)
    assert found["tiles"] == done.report["tiles"] and 0 < found["seconds"] < 1e6


def test_rows_are_means_over_the_test_heads_in_order(steps):
    rows = steps["rows"]
    keys = [(row["condition"], row["model"], row["step"]) for row in rows]
    models = [(data_module.BASELINE, None), ("with", 8), ("with", 12), ("with", 16)]
    assert keys == [(condition, *model) for condition in ("original", "noise 10 %") for model in models]
    row = rows[2]
    values = [
        c["scores"]["image.whole.ssim"] for c in steps["cells"] if c["step"] == 12 and c["condition"] == "original"
    ]
    assert len(values) == 2 == row["n"]
    told = row["figures"]["ssim"]
    assert told["mean"] == pytest.approx(np.mean(values)) and told["sd"] == pytest.approx(np.std(values, ddof=1))


def test_noise_costs_quality_and_the_baseline_shows_it(steps):
    psnr = {(r["condition"], r["model"]): r["figures"]["psnr_db"]["mean"] for r in steps["rows"] if r["step"] is None}
    assert psnr["original", "interpolation"] > psnr["noise 10 %", "interpolation"] + 1


def test_finished_cells_are_kept_and_others_are_not(folder, steps, monkeypatch, undrawn, caplog):
    caplog.set_level(logging.INFO, logger="fastsrgan")
    measured = []
    true_one = study_cells._through

    def counted(case, model, step, engine, structures):
        measured.append(step)
        return true_one(case, model, step, engine, structures)

    monkeypatch.setattr(study_cells, "_through", counted)
    again = [folder / "cohort.csv", folder / "steps", [folder / "with.safetensors"]]
    bar = Counting()
    same = study.run("steps", *again, study.Settings(**SMALL, steps=(8, 12, 16), noise=(0.0, 0.1)), progress=bar)
    assert measured == [] and same["rows"] == steps["rows"] and bar.totals == [] and bar.done == 0
    study.run("steps", *again, study.Settings(**SMALL, steps=(8, 10), noise=(0.0,)), progress=bar)
    assert measured == [10, 10]
    assert bar.totals == [2] and bar.done == 2  # cells that are there have no pace, and no part in the time left
    assert "4 of 6 cells are measured already" in caplog.text
    damaged = next(
        path
        for path in (folder / "steps" / "cells").glob("*.json")
        if json.loads(path.read_text(encoding="utf8"))["facts"]["step"] == 10
    )
    damaged.write_text("{", encoding="utf8")
    study.run("steps", *again, study.Settings(**SMALL, steps=(8, 10), noise=(0.0,)))
    assert measured == [10, 10, 10]
    other = study.run(
        "steps", again[0], again[1], [folder / "without.safetensors"], study.Settings(**SMALL, steps=(10,))
    )
    assert measured == [10, 10, 10, 10, 10] and {m["name"] for m in other["models"]} == {"without"}


def test_every_head_and_seed_has_noise_of_its_own_the_same_in_every_condition():
    """The key names it: two heads alike are not acquired with one noise, and a study made again is the same."""
    phantom = head(SHAPE, (7.0, 7.0, 7.0))
    hr = {"hr": Volume(phantom.data, phantom.affine)}
    noisy = Condition("noisy", (7.0, 7.0, 21.0), 0.1)
    clean = acquire(hr, Condition("clean", (7.0, 7.0, 21.0)), (0, "a"))
    keys = ((0, "a"), (0, "b"), (1, "a"), (0, "a"))
    cases = [acquire(hr, noisy, key) for key in keys]
    noise = [c.scan.data.ravel() * float(clean.hr.data.max() / c.hr.data.max()) for c in cases]
    noise = [n - clean.scan.data.ravel() for n in noise]
    bright = clean.scan.data.ravel() > 0.4  # far from where it is cut at zero
    assert np.array_equal(noise[0], noise[3])
    alike = np.corrcoef([n[bright] for n in noise[:3]]) - np.eye(3)
    assert np.abs(alike).max() < 0.2  # found: 0.045
    assert all(0.05 < n[bright].std() < 0.15 for n in noise)  # found: 0.095 to 0.1


def test_a_condition_does_what_its_name_says(monkeypatch):
    monkeypatch.setattr(study, "spacing_of", lambda head: (1.0, 1.0, 1.0))
    asked = study._filled("augmentation", study.Settings(), False)
    made = {c.name: (c.power, c.noise) for c in study._conditions("augmentation", None, asked)}
    contrasts = {"squared contrast": (2.0, 0.0), "square-root contrast": (0.5, 0.0)}
    assert made == {"original": (1.0, 0.0), "noise 3 %": (1.0, 0.03)} | contrasts


def test_of_several_noises_augmentation_takes_the_largest_and_resolution_the_first(monkeypatch):
    monkeypatch.setattr(study, "spacing_of", lambda head: (1.0, 1.0, 1.0))
    asked = study._filled("augmentation", study.Settings(noise=(0.02, 0.05, 0.01)), False)
    assert max(c.noise for c in study._conditions("augmentation", None, asked)) == 0.05
    assert {c.noise for c in study._conditions("resolution", None, asked)} == {0.02}


def test_what_is_written_holds_the_rows(folder, steps):
    files = steps["files"]
    study.write_study(folder / "steps", steps, PANELS["steps"](steps["rows"], steps["fit"]), "title")
    said = json.loads((folder / "steps" / "steps.json").read_text(encoding="utf8"))
    assert said["rows"] == json.loads(json.dumps(steps["rows"]))
    with open(files["csv"], newline="", encoding="utf8") as f:
        lines = list(csv.DictReader(f))
    assert [float(line["dice_mean"]) for line in lines] == [r["figures"]["dice"]["mean"] for r in steps["rows"]]
    assert lines[0]["low_res"] == "7 x 7 x 21"
    page = (folder / "steps" / "steps.md").read_text(encoding="utf8")
    assert "Delannoy" in page and "0.855" in page and "The paper's own data" in page
    assert "knows the answer that the network has to find" in page, "its Dice may be above that of a network"
    drawing = (folder / "steps" / "steps.svg").read_text(encoding="utf8")
    assert drawing.startswith("<?xml") and "knows the answer" in drawing


def test_the_same_rows_give_the_same_figures(folder, steps):
    panels = PANELS["steps"](steps["rows"], steps["fit"])
    study.write_study(folder / "steps", steps, panels, "title")
    before = {form: (folder / "steps" / f"steps.{form}").read_bytes() for form in ("png", "svg")}
    study.write_study(folder / "steps", steps, panels, "title")
    assert before == {form: (folder / "steps" / f"steps.{form}").read_bytes() for form in ("png", "svg")}


def test_a_logarithmic_axis_needs_a_factor_of_ten_and_ticks_are_the_measured_steps():
    from matplotlib.figure import Figure

    for values, scale in (([3.0, 20.0], "linear"), ([2.0, 20.0], "log"), ([0.0, 0.0], "linear")):
        axes = Figure().subplots()
        study_figure._panel(
            axes, study_figure.Panel("t", "step", [study_figure.PlotLine("a", [12, 48], values)], log_y=True)
        )
        assert axes.get_yscale() == scale
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["12", "48"]
    axes = Figure().subplots()
    study_figure._panel(axes, study_figure.Panel("t", "update", [study_figure.PlotLine("a", range(1, 19), range(18))]))
    assert all(float(x).is_integer() for x in axes.get_xticks())


def test_the_fit_finds_an_affine_law():
    rows = [
        {"condition": "original", "model": "m", "step": s, "figures": {"seconds": {"mean": 2.5 + 9e4 / s**3}}}
        for s in (10, 20, 30, 60)
    ]
    (fit,) = time_fit(rows)
    assert (fit["intercept_s"], fit["slope_s"], fit["r2"]) == pytest.approx((2.5, 9e4, 1.0))
    assert time_fit(rows[:2]) == []


@pytest.mark.parametrize(
    ("kind", "settings", "conditions"),
    [
        ("noise", {"steps": (16,), "noise": (0.0, 0.2)}, ["original", "noise 20 %"]),
        ("resolution", {"steps": (16,), "ratios": (3.0, 2.0)}, ["14 mm", "21 mm"]),
        (
            "augmentation",
            {"steps": (16,), "noise": (0.1,)},
            ["original", "noise 10 %", "squared contrast", "square-root contrast"],
        ),
    ],
)
def test_each_study_has_its_conditions_and_panels(folder, kind, settings, conditions, undrawn):
    models = [folder / "with.safetensors", folder / "without.safetensors"]
    asked = study.Settings(**SMALL, **settings, subjects=1)
    made = study.run(kind, folder / "cohort.csv", folder / kind, models, asked)
    assert list(dict.fromkeys(row["condition"] for row in made["rows"])) == conditions
    assert {row["model"] for row in made["rows"]} == {"interpolation", "with", "without"}
    panels = [panel for row in PANELS[kind](made["rows"], []) for panel in row]
    drawn = {(tuple(line.x), tuple(line.y)) for panel in panels for line in panel.lines}
    assert drawn
    dice = {row["figures"]["dice"]["mean"] for row in made["rows"]}
    assert dice <= {y for panel in panels if "Dice" in panel.title for line in panel.lines for y in line.y}
    assert len(shown_rows(made)) == len(made["rows"])
    if kind == "resolution":
        base = [r["figures"]["psnr_db"]["mean"] for r in made["rows"] if r["model"] == "interpolation"]
        assert base[0] > base[1]  # thicker slices lose more


def test_a_store_is_studied_as_its_table_is(folder, tmp_path):
    convert(folder / "cohort.csv", tmp_path / "c.zarr")
    of_table, of_store = find_heads(folder / "cohort.csv", "all"), find_heads(tmp_path / "c.zarr", "all")
    assert {one.name for one in of_store} == {one.name for one in of_table}
    for first in of_table:
        twin = next(one for one in of_store if one.name == first.name)
        volumes, others = first.load(), twin.load()
        assert set(volumes) == set(others) and spacing_of(first) == pytest.approx(spacing_of(twin))
        for name, volume in volumes.items():
            np.testing.assert_allclose(others[name].data, volume.data, rtol=1e-6)  # found: 0 (rounding)
            np.testing.assert_allclose(others[name].affine, volume.affine)
    assert len({one.key for one in of_store}) == len(of_store)
    with pytest.raises(UsageError, match="were chosen by"):
        find_heads(tmp_path / "c.zarr", label_classes="3,42")
    with pytest.raises(InputError, match="no subjects of Base Test"):
        convert_train_only(folder, tmp_path)


def convert_train_only(folder, tmp_path):
    """The heads of a store that has no Test subject."""
    text = (folder / "cohort.csv").read_text(encoding="utf8").replace("Test", "Train")
    (folder / "train_only.csv").write_text(text, encoding="utf8")
    convert(folder / "train_only.csv", tmp_path / "t.zarr")
    return find_heads(tmp_path / "t.zarr")


def test_contrast_is_changed_in_both_images(folder):
    subject = find_heads(folder / "cohort.csv")[0]
    plain, squared = (
        acquire(subject.load(), Condition("", (7.0, 7.0, 21.0), power=p), (0, subject.key)) for p in (1.0, 2.0)
    )
    ratio = squared.scan.data[plain.scan.data > 0.2] / plain.scan.data[plain.scan.data > 0.2] ** 2
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)  # found: 2.4e-7
    inside = plain.hr.data > 0.2
    ratio = squared.hr.data[inside] / plain.hr.data[inside] ** 2
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)  # found: 3e-7


def test_the_papers_figures_are_labelled_and_never_mixed_with_rows(steps):
    assert "own data" in plots.SOURCE and "not a target" in plots.SOURCE
    assert steps["paper"]["rows"] and not any("figures" in row for row in steps["paper"]["rows"])
    assert {row["Dice"] for row in paper_rows(steps)} >= {"0.855", "0.831", "0.805", "-"}
    assert paper_rows({"paper": {"rows": []}}) == []


@pytest.mark.parametrize("given", [{"label_classes": "3"}, {"label_names": "t.tsv"}, {"split": "all"}])
def test_images_alone_have_no_labels_and_no_split(folder, given):
    for data in (find_heads(folder / "cohort.csv")[0].image, folder):
        with pytest.raises(UsageError, match="images alone have no"):
            find_heads(data, **given)


def test_a_whole_image_has_no_steps(folder, undrawn, tmp_path):
    asked = study.Settings(whole=True, device="cpu", precision="fp32")
    facts = study.run("steps", folder / "a.nii.gz", tmp_path, [folder / "with.safetensors"], asked)
    assert [row["model"] for row in facts["rows"]] == ["interpolation", "with"]


def test_one_image_without_a_label_has_image_figures_only(folder, undrawn):
    asked = study.Settings(**SMALL, steps=(16,))
    made = study.run("steps", folder / "a.nii.gz", folder / "one", [folder / "with.safetensors"], asked)
    figures = made["rows"][1]["figures"]
    assert "psnr_db" in figures and "dice" not in figures and made["rows"][1]["n"] == 1
    assert "Dice" not in markdown(made, "t").split("own data")[0]


def test_a_damaged_head_costs_itself_only(folder, tmp_path, undrawn):
    (tmp_path / "bad.nii.gz").write_bytes((folder / "a.nii.gz").read_bytes()[:400])
    for name in ("c.nii.gz", "c_gm.nii.gz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    table = tmp_path / "t.csv"
    table.write_text("HR_image,Label_image,Base\nc.nii.gz,c_gm.nii.gz,Test\nbad.nii.gz,c_gm.nii.gz,Test\n")
    asked = study.Settings(**SMALL, steps=(16,))
    made = study.run("steps", table, tmp_path / "out", [folder / "with.safetensors"], asked)
    assert [f["subject"] for f in made["failed"]] == ["bad"] and made["rows"][0]["n"] == 1


@pytest.mark.parametrize("stored", [False, True])
def test_what_is_odd_about_a_heads_files_is_told_and_kept(folder, tmp_path, undrawn, caplog, stored):
    """Of a table and of the store that was made of it."""
    odd = images.load(folder / "a.nii.gz")
    odd.data[1, 1, 1] = np.nan
    images.save(tmp_path / "a.nii.gz", odd.data, odd.affine)
    table = data = tmp_path / "t.csv"
    table.write_text(f"HR_image,Label_image,Base\na.nii.gz,{folder / 'a_gm.nii.gz'},Test\n", encoding="utf8")
    if stored:
        data = tmp_path / "store"
        convert(table, data)
    with caplog.at_level("INFO", "fastsrgan"):
        asked = study.Settings(**SMALL, steps=(16,))
        made = study.run("steps", data, tmp_path / "out", [folder / "with.safetensors"], asked)
    (note,) = [line for line in made["notes"] if "NaN" in line]
    assert note == f"a: reference: 1 of {odd.data.size} voxels is NaN or infinite: read as 0"
    assert note in caplog.messages and f"Note: {note}" in (tmp_path / "out/steps.md").read_text(encoding="utf8")


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("resolution", {"ratios": (1.0,)}, "7 x 7 x 7 mm are the head's own voxels: nothing is to be super-resolved"),
        ("resolution", {"ratios": (6.0,)}, "slices of 42 mm: 3.3 of them lie in the head"),
        ("steps", {"low_res": (7.0, 7.0, 42.0)}, "slices of 42 mm: 3.3 of them lie in the head"),
        ("steps", {"low_res": (7.0, 7.0, 14.0)}, None),
    ],
)
def test_slices_that_leave_little_or_nothing_to_restore_are_told(folder, tmp_path, undrawn, caplog, kind, given, said):
    with caplog.at_level("INFO", "fastsrgan"):
        asked = study.Settings(**SMALL, steps=(16,), **given)
        made = study.run(kind, folder / "a.nii.gz", tmp_path / "out", [folder / "with.safetensors"], asked)
    odd = [line for line in made["notes"] if "the head" in line]
    assert odd == ([f"a: {said}"] if said else []) and set(odd) <= set(caplog.messages)


def test_slices_as_thick_as_a_head_are_refused_before_anything_is_measured(folder, tmp_path, capsys):
    """Of a study over several, too: the head is what is above 0, and its air is none of it."""
    image = images.load(folder / "a.nii.gz")
    image.data[:, :, 12:] = 0
    thin = images.save(tmp_path / "thin.nii.gz", image.data, image.affine)
    asked = ["--patch", "16", "--device", "cpu", "-w", str(folder / "with.safetensors"), "-o", str(tmp_path / "out")]
    code = main(["study", "resolution", str(thin), *asked, "--steps", "16", "--ratios", "2", "12", "--quiet"])
    told = capsys.readouterr().err
    assert code == 3 and "slices of 84 mm: the head is 7" in told and "less than one of them" in told
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_model_that_is_named_twice_is_refused(folder, tmp_path):
    """Its rows would count each head twice."""
    model = folder / "with.safetensors"
    other = tmp_path / "link.safetensors"
    other.symlink_to(model)
    for twin in (model, other):
        with pytest.raises(UsageError, match="a model is named twice"):
            asked = study.Settings(**SMALL, steps=(16,))
            study.run("augmentation", folder / "cohort.csv", tmp_path / "out", [model, twin], asked)
    assert not (tmp_path / "out").exists()


def test_the_papers_figures_stand_once_each(steps):
    told = [tuple(row.items()) for row in paper_rows(steps)]
    assert len(told) > 3 and len(set(told)) == len(told)


@pytest.mark.parametrize(
    ("kind", "data", "settings", "message"),
    [
        ("nonsense", "cohort.csv", {}, "one of steps"),
        ("steps", None, {}, "--quick"),
        ("steps", "cohort.csv", {"steps": (0,)}, "from 1 up"),
        ("steps", "cohort.csv", {"steps": (12, 20)}, "step"),
        ("steps", "cohort.csv", {"noise": (-0.1,)}, "from 0 up"),
        ("resolution", "cohort.csv", {"steps": (16,), "ratios": (0.5,)}, "ratio"),
        ("steps", "cohort.csv", {"steps": (16,), "noise": (math.nan,)}, "noise"),
        ("steps", "cohort.csv", {"steps": (16,), "ratios": (math.nan,)}, "ratio"),
        ("resolution", "cohort.csv", {"steps": (16,), "ratios": (1e9,)}, "from 1 to 1000"),
        ("steps", "cohort.csv", {"steps": (16,), "low_res": (0.0, 1, 1)}, "--low-res: 0 x 1 x 1 mm"),
        ("steps", "cohort.csv", {"steps": (16,), "low_res": (math.nan, 1, 1)}, "--low-res"),
        ("steps", "cohort.csv", {"steps": (16,), "low_res": (math.inf, 1, 1)}, "--low-res"),
        ("steps", "cohort.csv", {"steps": (16,), "subjects": 0}, "--subjects"),
        ("steps", "cohort.csv", {"steps": (16,), "subjects": -1}, "--subjects"),
        ("augmentation", "cohort.csv", {"steps": (16,)}, "two or more"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(folder, tmp_path, kind, data, settings, message):
    source = folder / data if data else None
    with pytest.raises(UsageError, match=message):
        study.run(kind, source, tmp_path, [folder / "with.safetensors"], study.Settings(**SMALL | settings))
    assert not list(tmp_path.glob("cells/*"))
    if kind == "augmentation":
        with pytest.raises(UsageError, match=message):  # nor is a model read that is alone
            study.run(kind, source, tmp_path, [tmp_path / "none"], study.Settings(**SMALL | settings))


def test_a_table_without_test_rows_says_which_there_are(folder, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text(f"HR_image,Label_image,Base\n{folder / 'a.nii.gz'},{folder / 'a_gm.nii.gz'},Train\n")
    with pytest.raises(InputError, match="no rows of Base Test"):
        find_heads(table)


def test_ratios_are_of_one_axis():
    assert thick((0.5, 0.5, 0.7), 3, 2) == (0.5, 0.5, pytest.approx(2.1))
    assert thick((1, 1, 1), 4, 0) == (4, 1, 1)


# --- curves -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """The log of a run of three epochs; its last line was being written."""
    lines = []
    for epoch in (1, 2, 3):
        for i in range(2):
            update = 2 * epoch - 1 + i
            facts = {"g_reconstruction": 1 / update, "d_wasserstein": float(update), "patches_per_second": 9.0}
            lines.append({"epoch": epoch, "update": update, "seconds": 1.0, "data_wait_seconds": 0.1, **facts})
        scores = {"Dice": [0.5, 0.8, 0.7][epoch - 1], "MSE": 0.1, "PSNR": 20.0 + epoch}
        lines.append({"epoch": epoch, "validation": scores | ({"whole_Dice": 0.6} if epoch == 2 else {})})
    text = "\n".join(map(json.dumps, lines)) + '\n{"epoch": 4, "upda'
    (tmp_path / "log.jsonl").write_text(text, encoding="utf8")
    return tmp_path


def test_curves_are_the_logs_values(run, tmp_path):
    made = study.run("curves", run, tmp_path / "curves")
    assert [row["Dice"] for row in made["rows"]] == [0.5, 0.8, 0.7]
    assert made["rows"][0]["g_reconstruction"] == pytest.approx((1 + 1 / 2) / 2)
    assert made["best"] == {"epoch": 2, "Dice": 0.8, "dice_is": "Dice"}
    assert csv_rows(made["rows"])[1]["whole_Dice"] == 0.6
    assert "epoch 2" in (tmp_path / "curves" / "curves.md").read_text(encoding="utf8")
    assert (tmp_path / "curves" / "curves.png").stat().st_size > 1000


def test_of_epochs_with_the_same_dice_the_first_is_the_best(run, tmp_path):
    """As training keeps the weights of an epoch only where it is better than all before."""
    text = (run / "log.jsonl").read_text(encoding="utf8").replace('"Dice": 0.7', '"Dice": 0.8')
    (run / "log.jsonl").write_text(text, encoding="utf8")
    assert study.run("curves", run, tmp_path / "curves")["best"]["epoch"] == 2


def test_the_curves_of_several_runs_are_laid_over_each_other(run, tmp_path, monkeypatch, capsys):
    """Every run's own values under its own name, and in the picture a colour for each."""
    other = tmp_path / "other"
    other.mkdir()
    text = (run / "log.jsonl").read_text(encoding="utf8").replace('"Dice": 0.8', '"Dice": 0.9')
    (other / "log.jsonl").write_text(text, encoding="utf8")
    drawn = {}
    draw = study_output.draw
    monkeypatch.setattr(
        study_output, "draw", lambda base, rows, *a, **k: (drawn.setdefault("rows", rows), draw(base, rows, *a, **k))[1]
    )
    made = study.run("curves", [run, other], tmp_path / "curves")
    names = [told["name"] for told in made["runs"]]
    assert len(set(names)) == 2 and names[1] == "other"
    alone = [study.run("curves", r, tmp_path / f"alone{i}")["rows"] for i, r in enumerate((run, other))]
    assert made["rows"] == [{"run": n} | row for n, rows in zip(names, alone, strict=True) for row in rows]
    assert [told["best"]["Dice"] for told in made["runs"]] == [0.8, 0.9]
    panels = {p.title: p for row in drawn["rows"] for p in row}
    lines = [line for line in panels["Dice, whole volumes"].lines if line.style == "data"]
    assert [(line.name, line.number) for line in lines] == [(names[0], 0), (names[1], 1)]
    for line, rows in zip(lines, alone, strict=True):
        assert list(line.y) == [row["whole_Dice"] for row in rows if "whole_Dice" in row]
    text = (tmp_path / "curves" / "curves.md").read_text(encoding="utf8")
    assert "other:" in text and "0.9000 at epoch 2" in text
    assert main(["--quiet", "study", "curves", str(run), str(run), "-o", str(tmp_path / "x")]) == 2
    assert "named twice" in capsys.readouterr().err
    assert main(["--quiet", "study", "steps", str(run), str(run), "-o", str(tmp_path / "x")]) == 2


def test_of_several_structures_the_mean_counts_and_each_has_its_line(run, tmp_path, monkeypatch):
    """The first structure's Dice was called the run's, and no other was drawn."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf8").splitlines()[:-1]]
    for row in rows:
        if "validation" in row:
            first, other = {1: (0.9, 0.1), 2: (0.6, 0.8), 3: (0.7, 0.5)}[row["epoch"]]
            more = {"Dice_cortex": first, "Dice_white": other, "Dice_mask0": 1.0, "spline_Dice": 0.75}
            row["validation"] |= more | {"whole_Dice_cortex": 0.5, "whole_Dice_white": 0.75, "whole_Dice": 0.25}
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    drawn = []
    monkeypatch.setattr(study_output, "draw", lambda base, rows, *a, **k: drawn.append(rows) or [])
    made = study.run("curves", run, tmp_path / "curves")
    assert made["best"] == {"epoch": 2, "Dice": pytest.approx(0.7), "dice_is": "mean Dice of 2 structures"}
    text = (tmp_path / "curves" / "curves.md").read_text(encoding="utf8")
    assert "Best mean Dice of 2 structures 0.7000 at epoch 2." in text
    panels = {p.title: {line.name: list(line.y) for line in p.lines} for row in drawn[0] for p in row}
    assert panels["Dice, segmentation of the first structure"] == {
        "patches (paper figure 6)": [0.5, 0.8, 0.7], "whole volumes": [0.25] * 3,
        "interpolation, whole volumes": [0.75] * 3,
    }  # fmt: skip
    assert panels["Dice of each structure"] == {
        "cortex, patches": [0.9, 0.6, 0.7], "white, patches": [0.1, 0.8, 0.5],
        "cortex, whole volumes": [0.5] * 3, "white, whole volumes": [0.75] * 3,
    }  # fmt: skip
    both = study.run("curves", [run, tmp_path / "copy"], tmp_path / "both")
    panels = {p.title: [list(line.y) for line in p.lines] for row in drawn[1] for p in row}
    assert panels["mean Dice of 2 structures, whole volumes"] == [[0.625] * 3] * 2, (
        "no interpolation of one of them beside it"
    )
    assert [told["best"]["dice_is"] for told in both["runs"]] == ["mean Dice of 2 structures"] * 2


@pytest.mark.fault(37)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_while_it_trains_ends_with_that_signals_code(tmp_path, monkeypatch, number):
    for name in ("convert", "short_training"):
        monkeypatch.setattr(study, name, lambda *_, **__: {"stopped": number})
    monkeypatch.setattr(study.weights, "template_weights", lambda: tmp_path)
    with pytest.raises(KeyboardInterrupt) as stopped:
        study._tuned(tmp_path, SimpleNamespace(device="cpu", seed=0), study.QUIET)
    assert failed(stopped.value) == 128 + number


def test_a_folder_without_a_log_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match="no line of a training run"):
        study.run("curves", tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="no such file or folder"):
        study.run("curves", tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize(
    "line",
    [
        '{"epoch": 1, "validation": [1]}',
        '{"epoch": 1, "loss": 3}',
        '{"epoch": true, "update": 1}',
        '{"epoch": 1, "update": -1}',
        '{"epoch": 999999999999999999999999, "update": 1}',
    ],
)
def test_a_log_whose_lines_are_damaged_is_refused_and_leaves_nothing(tmp_path, capsys, line):
    """Lines without an update or a validation were an internal error, behind half of the files."""
    (tmp_path / "log.jsonl").write_text(line + "\n", encoding="utf8")
    code, out, told = call(capsys, "study", "curves", tmp_path, "-o", tmp_path / "out")
    assert (code, out) == (3, "") and not (tmp_path / "out").exists()
    one_line(told, "log.jsonl: holds no line of a training run")


def test_damaged_lines_of_a_log_are_passed_over(run, tmp_path, undrawn):
    before = study.run("curves", run, tmp_path / "before")["rows"]
    more = ['{"epoch": 9, "validation": [1]}', '{"epoch": 1e400, "update": 9}', '{"epoch": 1, "update": -3, "d": 1}']
    with open(run / "log.jsonl", "a", encoding="utf8") as log:
        log.write("\n" + "\n".join(more))
    assert study.run("curves", run, tmp_path / "after")["rows"] == before


def test_figures_that_no_axis_can_show_are_left_out(tmp_path):
    lines = '{"epoch": 1, "update": 1, "g_loss": 1e308}\n{"epoch": 1, "update": 2, "g_loss": 2.0}\n'
    (tmp_path / "log.jsonl").write_text(lines, encoding="utf8")
    (row,) = study.run("curves", tmp_path, tmp_path / "out")["rows"]
    assert row == {"epoch": 1, "g_loss": 2.0, "updates": 2}


def test_the_command_prints_the_table_and_the_paper_beside_it(folder, run, capsys, undrawn):
    assert main(["--quiet", "study", "curves", str(run), "-o", str(run / "out")]) == 0
    assert "0.8" in capsys.readouterr().out
    words = ["study", "steps", folder / "a.nii.gz", "-o", folder / "cli", "-w", folder / "with.safetensors"]
    words += ["--patch", "8", "--steps", "3", "5", "8", "--device", "cpu"]  # three numbers of tiles
    assert main(["--quiet", *map(str, words)]) == 0
    out = capsys.readouterr().out
    assert "fit: original, with: seconds =" in out and "paper's own data" in out and "steps.png" in out
    assert main(["--quiet", "study", "steps"]) == 2
    assert "--quick" in capsys.readouterr().err


def test_every_option_of_the_command_reaches_the_study(monkeypatch, tmp_path, capsys):
    """With a value other than its default, so that one that is left out is seen."""
    seen = []

    def run(kind, data, out, models, settings, **more):
        seen.append((kind, data, out, tuple(models), settings, more))
        return {"study": kind}

    monkeypatch.setattr(study, "run", run)
    (tmp_path / "t.txt").write_text("3 cortex\n", encoding="utf8")
    monkeypatch.chdir(tmp_path)
    words = "c.csv --patch 32 --steps 8 16 --noise 0 0.1 --split all --subjects 3 --label-classes 3,42"
    words += " --label-names t.txt --device cpu --precision bf16 --seed 7 --quick --json -w a b -o out"
    assert main(["study", "noise", *words.split(), "--low-res", "1", "2", "3"]) == 0
    assert (
        main(["study", "resolution", *words.split(), "--ratios", "2", "5", "--axis", "1"]) == 0
    )  # excluded by the other
    one, other = (made[4] for made in seen)
    assert (one.low_res, other.low_res, one.ratios, one.axis) == ((1.0, 2.0, 3.0), None, None, 2)
    kind, data, out, models, settings, more = seen[1]
    assert (kind, list(data), out, models) == ("resolution", ["c.csv"], "out", ("a", "b")) and more["quick"]
    settings = replace(settings, low_res=one.low_res)
    wanted = study.Settings(
        patch=32, steps=(8, 16), low_res=(1.0, 2.0, 3.0), noise=(0.0, 0.1), ratios=(2.0, 5.0), axis=1, split="all",
        subjects=3, label_classes=settings.label_classes, label_names="t.txt", device="cpu", precision="bf16", seed=7,
    )  # fmt: skip
    assert settings == wanted and list(settings.label_classes) == ["3,42"]
    left = {name for name, value in asdict(wanted).items() if value == asdict(study.Settings())[name]}
    assert left == {"whole", "adapt"}  # the one excludes --patch, the other is left to the kind of study


def test_rows_of_a_study_say_what_they_are_of_in_every_block(monkeypatch):
    """On 80 columns the second block had the condition alone: which model a row was of had to be counted."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    figures = {f"figure {i}": "12.34 ± 0.56" for i in range(6)}
    rows = [{"condition": "original", "model": name, "step": "48", **figures} for name in ("interpolation", "plain")]
    blocks = cli_study._aligned(rows).split("\n\n")
    assert len(blocks) > 1 and all(max(map(len, block.splitlines())) <= 80 for block in blocks)
    for block in blocks:
        assert [line.split()[:3] for line in block.splitlines()[2:]] == [
            ["original", "interpolation", "48"], ["original", "plain", "48"]
        ]  # fmt: skip
    scores = {f"figure {i}": "12.34" for i in range(9)}
    curves = cli_study._aligned([{"run": "other", "epoch": "1", **scores}]).split("\n\n")
    assert len(curves) > 1 and all(block.splitlines()[0].split()[:2] == ["run", "epoch"] for block in curves)
    epochs = cli_study._aligned([{"epoch": "1", "PSNR": "20"}])
    assert epochs.splitlines()[0].split() == ["epoch", "PSNR"]


def test_of_one_head_no_sd_is_promised_and_what_compares_nothing_says_so():
    row = {"condition": "original", "model": "m", "step": 8, "low_res": [1, 1, 3], "n": 1, "figures": {}}
    facts = {"study": "steps", "heads": ["a"], "data": "d", "rows": [row], "models": [], "failed": [], "paper": {}}
    facts |= {"settings": {"whole": True}, "note": study.TUNED_NOTE}
    facts["paper"] = {"source": "s", "rows": []}
    one = markdown(facts, "t")
    assert "Values are those of the one head" in one and study.TUNED_NOTE in one
    two = markdown(facts | {"heads": ["a", "b"], "note": ""}, "t")
    assert "Values are mean ± sample standard deviation over heads" in two and "says nothing" not in two


def test_a_mask_may_be_a_folder_of_dicom_whose_every_slice_counts(tmp_path):
    """It could not be read, and a slice that changed left finished cells in place."""
    series = dicom_files.write_series(tmp_path / "mask", dicom_files.volume((5, 4, 3)), dicom_files.scanner_affine())
    images.save(tmp_path / "a.nii.gz", np.ones((5, 4, 3), np.float32), np.eye(4))
    before = [data_module._head("a", tmp_path / "a.nii.gz", None, mask).key for mask in (tmp_path / "mask", series[0])]
    series[-1].write_bytes(series[-1].read_bytes() + b"\0\0")
    after = [data_module._head("a", tmp_path / "a.nii.gz", None, mask).key for mask in (tmp_path / "mask", series[0])]
    assert all(one != other for one, other in zip(before, after, strict=True))
