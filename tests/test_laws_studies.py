"""Studies: what decides about a cell, which heads and conditions they have, what they draw, write and say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from phantom import head

from fastsrgan.cli.main import main
from fastsrgan.errors import InputError, UsageError
from fastsrgan.io import nifti as images
from fastsrgan.io.labels import Structure
from fastsrgan.study import cells, curves, data, plots, run, tables
from fastsrgan.study.data import BASELINE, Condition, Head
from fastsrgan.volume.geometry import Volume

# --- cells ------------------------------------------------------------------------------------------------------------

ENGINE = cells.Engine(16, "cpu", "fp32", 3)


def measured(folder: Path, monkeypatch, *, heads=("a",), conditions=None, models=("m",), steps=(8,), **engine):
    """(cells, what was measured) of heads and models that are names alone, with such an engine."""
    found = []
    volumes = {"hr": Volume(np.ones((12, 12, 12), np.float32), np.eye(4))}

    def made_up():
        return {"scores": {}, "notes": []}

    monkeypatch.setattr(cells, "pick_device", lambda asked: asked)
    monkeypatch.setattr(cells, "acquire", lambda volumes, condition, key: SimpleNamespace(structures={}, key=key))
    monkeypatch.setattr(cells, "_interpolation", lambda case: found.append(("base", case.key)) or made_up())
    monkeypatch.setattr(
        cells, "_through", lambda case, model, step, *_: found.append((model.sha256, step)) or made_up()
    )
    made, _ = cells.run_cells(
        folder,
        [SimpleNamespace(name=name.upper(), key=name, load=lambda: volumes, structures=()) for name in heads],
        [SimpleNamespace(name=name.title(), sha256=name) for name in models],
        conditions or [Condition("c", (1.0, 1.0, 3.0))],
        steps,
        replace(ENGINE, **engine),
    )
    return made, found


@pytest.mark.parametrize(
    ("other", "anew"),
    [
        ({"heads": ("b",)}, 2), ({"models": ("n",)}, 1), ({"steps": (9,)}, 1), ({"device": "cuda"}, 1), ({}, 0),
        ({"patch": 24}, 1), ({"precision": "bf16"}, 1), ({"adapt": "off"}, 1), ({"seed": 4}, 2),
        ({"conditions": [Condition("c", (1.0, 1.0, 4.0))]}, 2),
        ({"conditions": [Condition("c", (1.0, 1.0, 3.0), 0.1)]}, 2),
        ({"conditions": [Condition("c", (1.0, 1.0, 3.0), power=2.0)]}, 2),
        ({"conditions": [Condition("another name", (1.0, 1.0, 3.0))]}, 0),
    ],
)  # fmt: skip
def test_a_cell_is_measured_anew_where_anything_that_decides_about_it_is_another(tmp_path, monkeypatch, other, anew):
    """Of a baseline neither weights, step, patch, precision, adaptation nor device do. What was measured is kept."""
    assert [len(measured(tmp_path, monkeypatch, **more)[1]) for more in ({}, other, other, {})] == [2, anew, 0, 0]


def test_cells_come_in_the_order_of_conditions_models_and_steps_under_the_names_of_this_time(tmp_path, monkeypatch):
    conditions = [Condition(name, (1.0, 1.0, 3.0), n / 10) for n, name in enumerate(("z", "b"))]
    made, found = measured(
        tmp_path, monkeypatch, heads=("b", "a"), conditions=conditions, models=("y", "x"), steps=(9, 8)
    )
    models = [(BASELINE, None), ("Y", 9), ("Y", 8), ("X", 9), ("X", 8)]
    assert [(c["condition"], c["model"], c["step"], c["subject"]) for c in made] == [
        (condition, *model, name) for condition in "zb" for model in models for name in "BA"
    ]
    assert [key for what, key in found if what == "base"] == [(3, "b"), (3, "b"), (3, "a"), (3, "a")]


class BadKey(SimpleNamespace):
    """A head whose file cannot be read, which its checksum shows first."""

    def __init__(self, name):
        super().__init__(name=name)

    @property
    def key(self):
        raise InputError("x", "y", "z")


def test_a_head_that_fails_is_told_and_a_study_without_any_is_refused(tmp_path, monkeypatch):
    def of_head(folder, one, *rest):
        if one.name == "bad":
            raise InputError("x", "y", "z")
        return [{"condition": "c", "model": BASELINE, "step": None}]

    monkeypatch.setattr(cells, "_of_head", of_head)
    heads = [BadKey("bad"), SimpleNamespace(name="good", key="k")]
    conditions = [Condition("c", (1.0, 1.0, 3.0))]
    made, failed = cells.run_cells(tmp_path, heads, [], conditions, [8], ENGINE)
    assert len(made) == 1 and failed == [{"subject": "bad", "error": "x: y (z)"}]
    with pytest.raises(InputError, match="no head could be used"):
        cells.run_cells(tmp_path, heads[:1], [], conditions, [8], ENGINE)


def test_the_class_of_a_structure_goes_by_its_name_and_then_by_its_values():
    classes = (("one", frozenset({3})), ("two", frozenset({4})), ("three", frozenset({5})))
    model = cells.StudyModel("m", Path(), "0", None, classes)  # type: ignore[arg-type]
    found = [model.class_of(Structure(name, frozenset(v))) for name, v in (("two", {3}), ("x", {5}), ("x", {9}))]
    assert found == [2, 3, None]


def test_rows_have_a_figure_of_the_heads_that_have_it():
    conditions = [Condition("c", (1.0, 2.0, 3.0), 0.25, 2.0)]
    path, dice = "image.whole.psnr_db", "structures.white.dice"
    made = [
        {"condition": "c", "model": "m", "step": 8, "scores": {path: 10.0, dice: 0.5}, "seconds": 2.0, "tiles": 8},
        {"condition": "c", "model": "m", "step": 8, "scores": {path: 14.0}, "seconds": 4.0, "tiles": 8},
        {"condition": "c", "model": BASELINE, "step": None, "scores": {path: 1.0}},
    ]
    rows = cells.aggregate(made, conditions)
    sd = pytest.approx(8**0.5)
    assert rows[0] == {
        "condition": "c", "low_res": (1.0, 2.0, 3.0), "noise": 0.25, "power": 2.0, "model": "m", "step": 8, "n": 2,
        "figures": {
            "psnr_db": {"mean": 12.0, "sd": sd, "n": 2}, "seconds": {"mean": 3.0, "sd": pytest.approx(2**0.5), "n": 2},
            "tiles": {"mean": 8.0, "sd": 0.0, "n": 2}, "dice_white": {"mean": 0.5, "sd": None, "n": 1},
        },
    }  # fmt: skip
    assert rows[1]["figures"] == {"psnr_db": {"mean": 1.0, "sd": None, "n": 1}} and rows[1]["n"] == 1


def test_a_cell_has_the_figures_inside_its_mask_and_of_a_label_its_segmentation():
    phantom = head((21, 26, 24), (7.0, 7.0, 7.0))
    whole = {"hr": Volume(phantom.data, phantom.affine), "label": Volume(phantom.label, phantom.affine)}
    inside = np.zeros(phantom.data.shape, np.uint8)
    inside[5:15, 5:20, 5:18] = 1
    volumes = whole | {"mask": Volume(inside, phantom.affine), data.STRUCTURE + "x": whole["label"]}
    case = data.acquire(volumes, Condition("", (7.0, 7.0, 21.0)), (0, "a"))
    found = cells._interpolation(case)["scores"]
    assert {"image.mask.psnr_db", "segmentation.dice", "structures.x.dice"} <= set(found)
    assert found["segmentation.dice"] == found["structures.x.dice"] and "baseline.image.whole.mae" not in found
    plain = cells._interpolation(data.acquire({"hr": whole["hr"]}, Condition("", (7.0, 7.0, 21.0)), (0, "a")))["scores"]
    assert {name.partition(".")[0] for name in plain} == {"image"} and "image.mask.psnr_db" not in plain


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    for n, name in enumerate("abde"):
        value = np.full((4, 5, 6), n + 1, np.float32)
        images.save(folder / f"{name}.nii.gz", value, np.diag([1.0, 2, 3, 1]))
        images.save(folder / f"{name}_l.nii.gz", (value > 0).astype(np.uint8) * (n + 3), np.diag([1.0, 2, 3, 1]))
    return folder


def test_heads_are_the_rows_of_a_split_up_to_a_number(files, tmp_path):
    rows = ["HR_image,Label_image,Mask_image,Base"]
    rows += [
        f"{files / n}.nii.gz,{files / n}_l.nii.gz,,{s}" for n, s in zip("abde", ("Test", "Train") * 2, strict=True)
    ]
    (table := tmp_path / "t.csv").write_text("\n".join(rows) + "\n", encoding="utf8")

    def names(*asked) -> list[str]:
        return [one.name for one in data.find_heads(table, *asked)]

    assert names() == ["a", "d"] == names("Test") and names("Train") == ["b", "e"]
    assert names("all") == list("abde") and names("all", 3) == list("abd") and names("Test", 1) == ["a"]
    assert [one.name for one in data.find_heads(files, limit=2)] == ["a", "a_l"]
    (one,) = data.find_heads(files / "b.nii.gz")
    assert (one.name, one.label, one.mask) == ("b", None, None)
    assert data.spacing_of(one) == (1, 2, 3)
    assert [s.values for s in data.find_heads(table, "all", 1, "3")[0].structures] == [{3}]


def test_the_key_of_a_head_holds_all_of_its_files_and_the_values_of_its_label(files):
    a, b = files / "a.nii.gz", files / "b.nii.gz"
    label, other = files / "a_l.nii.gz", files / "b_l.nii.gz"
    one, two = Structure("x", frozenset({3, 42})), Structure("y", frozenset({4}))
    keys = [
        data._head("n", *given).key
        for given in (
            (a, None, None), (b, None, None), (a, label, None), (a, other, None), (a, label, label), (a, label, other),
            (a, label, None, (one,)), (a, label, None, (two,)), (a, label, None, (one, two)),
            (a, label, None, (two, one)), (a, label, None, (Structure("z", one.values), two)),
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert data._head("another", a, label, None).key == keys[2]
    assert data._head("n", a, label, None, (Structure("z", one.values),)).key == keys[6]


def test_several_structures_are_a_label_each(files, tmp_path):
    label = np.zeros((4, 5, 6), np.uint8)
    label[1], label[2] = 3, 41
    path = images.save(tmp_path / "l.nii.gz", label, np.diag([1.0, 2, 3, 1]))
    both = (Structure("x", frozenset({3, 42})), Structure("y", frozenset({41})))
    found = Head("n", files / "a.nii.gz", path, path, "k", both).load()
    assert set(found) == {"hr", "label", "mask", "structure x", "structure y"}
    for name, value in (("label", 3), ("structure x", 3), ("structure y", 41)):
        assert np.array_equal(found[name].data > 0, label == value), name
    assert np.array_equal(found["mask"].data > 0, label > 0)
    assert set(Head("n", files / "a.nii.gz", path, None, "k", both[:1]).load()) == {"hr", "label"}


def test_a_part_of_the_template_stays_where_it_is():
    affine = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    whole = Volume(np.arange(160 * 180 * 140, dtype=np.int32).reshape(160, 180, 140), affine)
    part = data._cut(whole)
    first = [s.start for s in data.QUICK_BOX]
    assert part.data.shape == (88, 104, 72) and np.allclose(part.affine @ [0, 0, 0, 1], affine @ [*first, 1])
    assert part.data[3, 4, 5] == whole.data[first[0] + 3, first[1] + 4, first[2] + 5]


def test_the_synthetic_subjects_are_made_once_for_each_folder(monkeypatch, tmp_path):
    asked = []

    def make_cohort(folder: Path, **more) -> None:
        asked.append((folder, more))
        (folder / "cohort.csv").write_text("", encoding="utf8")

    whole = Volume(np.zeros((160, 180, 140), np.uint8), np.eye(4))
    monkeypatch.setattr(data.template, "mni152", lambda: (whole, whole))
    monkeypatch.setattr(data.template, "make_cohort", make_cohort)
    monkeypatch.setattr(data, "find_heads", lambda csv: [csv])
    assert data.quick_heads(tmp_path, 7) == [tmp_path / "cohort.csv"] == data.quick_heads(tmp_path, 8)
    ((folder, more),) = asked
    assert folder == tmp_path and (more["n_train"], more["n_test"], more["seed"], more["crop"]) == (1, 2, 7, False)
    assert [volume.data.shape for volume in more["template"]] == [(88, 104, 72)] * 2


def test_a_model_is_called_by_its_file_and_knows_the_classes_of_its_card(monkeypatch):
    card = {"structures": [{"name": "x", "values": [3, 42]}, {"name": "y", "values": [41]}]}
    facts = {"a/b.safetensors": {"card": card, "sha256": "s"}, "c.h5": {"card": None, "sha256": "t"}}
    monkeypatch.setattr(cells.weight_files, "info", lambda path: facts[str(path)])
    monkeypatch.setattr(cells.weight_files, "load_generator", lambda path: f"network of {path}")
    one, other = cells.StudyModel.load(Path("a/b.safetensors")), cells.StudyModel.load(Path("c.h5"), "named")
    assert (one.name, one.sha256, str(one.generator)) == ("b", "s", "network of a/b.safetensors")
    assert one.classes == (("x", {3, 42}), ("y", {41})) and (other.name, other.classes) == ("named", ())


def test_a_head_is_acquired_along_its_thick_axis_and_cut_to_whole_slices():
    phantom = head((21, 26, 23), (7.0, 7.0, 7.0))
    volumes = {"hr": Volume(phantom.data, phantom.affine), "label": Volume(phantom.label, phantom.affine)}
    case = data.acquire(volumes, Condition("", (7.0, 7.0, 21.0)), (0, "a"))
    assert case.scan.data.shape == (21, 26, 7) and case.hr.data.shape == (21, 26, 21) == case.label.data.shape
    assert case.spline.data.shape == case.label_map.data.shape == case.hr.data.shape
    assert np.allclose(case.scan.affine @ [0, 0, 0, 1], phantom.affine @ [0, 0, 1, 1]) and case.mask is None
    assert case.scan.data.max() == pytest.approx(1)


# --- settings and conditions ------------------------------------------------------------------------------------------


def test_what_is_asked_stands_before_the_studys_own_and_steps_are_sorted():
    asked = run._filled("noise", run.Settings(steps=(48, 24, 48), noise=(0.5,)), False)
    assert (asked.steps, asked.noise, asked.patch, asked.ratios, asked.subjects) == (
        (24, 48),
        (0.5,),
        128,
        (3.0,),
        None,
    )
    quick = run._filled("noise", run.Settings(), True)
    assert (quick.steps, quick.noise, quick.patch, quick.subjects) == ((24, 48), (0.0, 0.02, 0.05), 48, 2)
    adapted = {(quick, run._filled(kind, run.Settings(), quick).adapt) for kind in run.DEFAULTS for quick in (0, 1)}
    assert adapted == {(0, "auto"), (1, "off")}, "of a cell of --quick 1.1 s without adaptation, 16.6 s with it"
    assert run._filled("steps", run.Settings(whole=True), False).steps == (20,)
    assert run._filled("steps", run.Settings(subjects=1), True).subjects == 1
    limits = {"noise": (0.0, 1000.0), "ratios": (1.0, 1000.0), "low_res": (1.0, 2.0, 1000.0)}
    run._filled("steps", run.Settings(**limits, steps=(1,)), False)
    for name, values in (("noise", (1000.5,)), ("ratios", (1000.5,)), ("ratios", (0.99,)), ("low_res", (1, 1, 1001.0))):
        with pytest.raises(UsageError):
            run._filled("steps", run.Settings(**{name: values}), False)


def test_conditions_are_sorted_named_by_their_numbers_and_of_the_asked_axis(monkeypatch):
    monkeypatch.setattr(run, "spacing_of", lambda one: (0.5, 0.75, 1.0))

    def made(kind, **asked) -> list[Condition]:
        return run._conditions(kind, None, run._filled(kind, run.Settings(**asked), False))  # type: ignore[arg-type]

    assert made("noise", noise=(0.05, 0.0, 0.05), axis=1) == [
        Condition("original", (0.5, 2.25, 1.0)), Condition("noise 5 %", (0.5, 2.25, 1.0), 0.05)
    ]  # fmt: skip
    assert made("resolution", ratios=(4.0, 2.0, 4.0), axis=0, noise=(0.1, 0.2)) == [
        Condition("1 mm", (1.0, 0.75, 1.0), 0.1), Condition("2 mm", (2.0, 0.75, 1.0), 0.1)
    ]  # fmt: skip
    assert [c.low_res for c in made("steps", low_res=(1.0, 2.0, 3.0))] == [(1.0, 2.0, 3.0)]
    for ratio, axis in ((0.9, 2), (2, 3)):
        with pytest.raises(UsageError, match="ratio"):
            data.thick((1, 1, 1), ratio, axis)


def test_models_of_one_name_are_called_by_their_paths(monkeypatch):
    monkeypatch.setattr(run.StudyModel, "load", staticmethod(lambda path, name=None: (str(path), name)))
    assert run._models(["x/a.pt", "y/b.pt"], Path, "m") == [("x/a.pt", None), ("y/b.pt", None)]
    assert run._models(["x/a.pt", "y/a.h5"], Path, "m") == [("x/a.pt", "x/a.pt"), ("y/a.h5", "y/a.h5")]
    assert run._models([], lambda: Path("own"), "m") == [("own", "m")]


@pytest.mark.parametrize(("whole", "data_given"), [(False, True), (True, False)])
def test_a_study_measures_what_it_was_asked_and_says_what_it_did(monkeypatch, tmp_path, whole, data_given):
    asked = []
    heads = [SimpleNamespace(name=name) for name in "abc"]
    monkeypatch.setattr(run, "find_heads", lambda *args: asked.append(args) or heads)
    monkeypatch.setattr(run, "quick_heads", lambda *args: asked.append(args[:2]) or heads)
    monkeypatch.setattr(run, "spacing_of", lambda one: (1.0, 1.0, 1.0))
    for name in ("template_weights", "default_weights"):
        monkeypatch.setattr(run.weights, name, lambda name=name: Path(name))
    models = SimpleNamespace(load=lambda path, name=None: SimpleNamespace(name=name or "m", path=path, sha256="s"))
    monkeypatch.setattr(run, "StudyModel", models)

    def run_cells(folder, heads, models, conditions, steps, engine, progress):
        asked.append((folder, [h.name for h in heads], [m.name for m in models], tuple(steps), engine))
        made = {"subject": "a", "condition": conditions[0].name, "model": "shipped", "step": 8, "scores": {}}
        return [made | {"seconds": 1.0, "notes": ["odd"]}], [{"subject": "b", "error": "e"}]

    monkeypatch.setattr(run, "run_cells", run_cells)
    written = []
    monkeypatch.setattr(run, "write_study", lambda *args: written.append(args) or args[1])
    more = {"split": "all", "label_classes": "3", "label_names": "t"} if data_given else {}
    settings = run.Settings(
        patch=32, whole=whole, steps=(8,), subjects=2, device="cpu", precision="fp32", seed=7, **more
    )
    facts = run.run("steps", "d.csv" if data_given else None, tmp_path, [], settings, quick=not data_given)
    names = list("abc") if data_given else list("ab")
    assert asked[0] == (("d.csv", "all", 2, "3", "t") if data_given else (tmp_path / "cohort-7", 7))
    engine = cells.Engine(None if whole else 32, "cpu", "fp32", 7, "auto" if data_given else "off")
    assert asked[1] == (tmp_path, names, ["adult" if data_given else "shipped"], (8,), engine), "as -w calls it"
    assert Path(facts["models"][0]["path"]) == Path.cwd() / ("default_weights" if data_given else "template_weights")
    assert facts["notes"] == ["a: odd"], "what is odd about a head is not lost"
    assert facts["heads"] == names and facts["quick"] == (not data_given) and 0 <= facts["seconds"] < 1e6
    assert (
        facts["paper"] == {"source": plots.SOURCE, "rows": plots.REFERENCE["steps"]} and "torch" in facts["provenance"]
    )
    ((folder, _, panels, title),) = written
    assert folder == tmp_path and len(panels) == 2 and ("(1 head)", "(2 heads, mean and sd)")[len(names) - 2] in title


# --- what is drawn ----------------------------------------------------------------------------------------------------


def row(model, step, condition="original", **figures) -> dict:
    told = {name: {"mean": mean, "sd": None, "n": 1} for name, mean in figures.items()}
    return {"condition": condition, "model": model, "step": step, "noise": 0.0, "low_res": [1, 1, 3], "figures": told}


def test_a_step_curve_has_the_papers_points_where_it_was_measured_and_the_fit_of_time():
    rows = [row("m", s, dice=0.5, seconds=2.0, components=3.0) for s in (30, 80)] + [row(BASELINE, None, dice=0.25)]
    fit = [{"intercept_s": -1.0, "slope_s": 60**3.0, "steps": [30, 80]}]
    panels = {p.title: p for line in plots._step_panels(rows, fit) for p in line}
    dice = {line.style: line for line in panels["Dice"].lines}
    assert dice["paper"].x == [30.0, 80.0] and dice["paper"].y == [0.855, 0.831]  # 128 is far outside
    assert [line.style for line in panels["PSNR, dB"].lines] == []
    (line, fitted) = panels["seconds per volume"].lines
    assert line.style == "data" and fitted.style == "fit" and panels["seconds per volume"].log_y
    assert min(fitted.y) > 0 and min(fitted.x) >= 30 and max(fitted.x) == pytest.approx(60, rel=0.02)  # found: 0.0014
    assert [p.log_y for p in panels.values()] == [False, False, False, True, False, True]
    far = [row("m", s, dice=0.5) for s in (10, 20)]
    assert [line.style for line in plots._step_panels(far, [])[0][0].lines] == ["data"]
    two = rows + [row("m", 30, "noisy", dice=0.1)]
    names = [line.name for line in plots._step_panels(two, [])[0][0].lines]
    assert names[:3] == ["original, m", f"original, {BASELINE}", "noisy, m"]


def test_augmentation_has_a_row_of_panels_for_each_condition():
    rows = [row(m, s, c, dice=n + s, ssim=0.5) for n, c in ((0, "one"), (100, "two")) for m in "ab" for s in (1, 2)]
    grid = plots._augmentation_panels(rows, [])
    assert [[p.title for p in line] for line in grid] == [
        [f"{f}, {c}" for f in ("PSNR, dB", "SSIM", "Dice", "components")] for c in ("one", "two")
    ]
    assert [line.y for line in grid[1][2].lines] == [[101, 102]] * 2 and grid[1][0].lines == []
    shared = [[p.figure for p in line] for line in grid]
    assert shared[0] == shared[1] and len(set(shared[0])) == 4, "the conditions of a figure have one axis"


def test_time_is_fitted_for_each_condition_and_model_over_three_steps_or_more():
    rows = [row(m, s, c, seconds=n + 1e3 / s**3) for n, (m, c) in enumerate((("a", "x"), ("b", "x"), ("a", "y")))
            for s in (8, 10, 20)]  # fmt: skip
    rows += [row("c", s, seconds=1.0) for s in (8, 16)] + [row(BASELINE, None, seconds=9.0), row("d", 8, dice=1.0)]
    fits = plots.time_fit(rows)
    assert [(f["model"], f["condition"], round(f["intercept_s"], 6)) for f in fits] == [
        ("a", "x", 0), ("b", "x", 1), ("a", "y", 2)
    ]  # fmt: skip
    assert all(f["slope_s"] == pytest.approx(1e3) and f["steps"] == [8, 10, 20] for f in fits)
    same = [row("a", s, seconds=1e3 / s**3, tiles=float(max(1, 12 // s))) for s in (8, 10, 20, 30)]
    assert plots.time_fit(same) == [], "of one tile whatever the step: what differs is not the step's doing"
    (flat,) = plots.time_fit([row("a", s, seconds=3.0) for s in (8, 10, 20)])
    assert flat["r2"] is None
    (bent,) = plots.time_fit([row("a", s, seconds=t) for s, t in ((1, 4.0), (2, 1.0), (4, 2.0))])
    x, y = np.array([1, 1 / 8, 1 / 64]), np.array([4.0, 1, 2])
    assert bent["r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_lines_are_drawn_in_the_way_of_their_kind():
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    level = plots._line(axes, plots.PlotLine("b", [30], [0.5], style="baseline", number=plots.GREY_LINE))
    assert list(level.get_ydata()) == [0.5, 0.5] and level.get_linestyle() == "--" and level.get_color() == plots.GREY
    for style, strokes in plots.STROKES.items():  # of one value a level, of several the line through them
        several = plots._line(axes, plots.PlotLine("b", [1, 2], [3, 4], [None, None], style=style, number=1))[0]
        assert several.get_xydata().tolist() == [[1, 3], [2, 4]] and several.get_linestyle() == strokes
        assert several.get_marker() in (None, "None", "") and several.get_color() == plots.COLOURS[1]
    fit = plots._line(axes, plots.PlotLine("f", [1, 2], [3, 4], style="fit", number=1))
    assert fit.get_color() == plots.COLOURS[1] and fit.get_linestyle() == ":"
    paper = plots._line(axes, plots.PlotLine("p", [1, 2], [3, 4], style="paper", number=1))
    assert paper.get_color() == plots.GREY and paper.get_marker() == "x"
    line, _, bars = plots._line(axes, plots.PlotLine("d", [1, 2], [3, 4], [0.5, None], number=8))
    assert to_hex(line.get_color()) == plots.COLOURS[2] and line.get_marker() == plots.MARKERS[2]
    (segments,) = bars
    assert [abs(s[1, 1] - s[0, 1]) for s in segments.get_segments()] == [1.0, 0.0]
    assert not plots._line(axes, plots.PlotLine("d", [1, 2], [3, 4], [None, None]))[2]
    crowded = plots._line(axes, plots.PlotLine("d", range(41), range(41)))[0]
    sparse = plots._line(axes, plots.PlotLine("d", range(40), range(40)))[0]
    assert crowded.get_marker() in (None, "None", "") and sparse.get_marker() == "o"


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_page_of_a_study_says_what_was_left_out_and_how_large_the_patch_was(tmp_path, monkeypatch):
    facts = {"study": "noise", "rows": [row("m", 30, dice=0.5, dice_white=0.25, tiles=8.0) | {"n": 1}],
             "heads": ["a", "b"], "data": "d.csv", "failed": [{"subject": "b", "error": "e"}], "models": [],
             "settings": {"whole": True, "patch": 48}, "paper": {"rows": [], "source": "s"}}  # fmt: skip
    words = tables.markdown(facts, "title")
    assert "Patch the whole image." in words and "Left out: b: e" in words and "own data" not in words
    assert "| condition | model | step | Dice | tiles | Dice white | n |" in words
    assert "| original | m | 30 | 0.5000 | 8 | 0.2500 | 1 |" in words
    drawn = []
    monkeypatch.setattr(tables, "draw", lambda base, rows, title, footer: drawn.append(footer) or [])
    base = plots.PlotLine("x", [1], [1], style="baseline")
    tables.write_study(tmp_path, facts, [[plots.Panel("t", "x", [base])]], "title")
    tables.write_study(tmp_path, facts, [[plots.Panel("t", "x", [plots.PlotLine("x", [1], [1])])]], "title")
    curves = {"study": "curves", "rows": [], "run": "r", "best": None, "paper": facts["paper"]}
    tables.write_study(tmp_path, curves, [[plots.Panel("t", "x", [base])]], "title")
    assert drawn == [tables.INTERPOLATION, "", "interpolation: cubic spline of the scan"], "curves have no other Dice"
    written = json.loads((tmp_path / "noise.json").read_text(encoding="utf8"))
    assert written["files"] == {form: str(tmp_path / f"noise.{form}") for form in ("csv", "md", "json")}


def test_means_have_their_deviation_where_there_is_one_and_digits():
    told = {"mean": 12.3456, "sd": 1.5}
    assert tables._spread(told, 2) == "12.35 ± 1.50" and tables._spread(told, 0) == "12"
    assert tables._spread(told | {"sd": None}, 2) == "12.35" and tables._spread(None, 2) == "-"
    assert [tables._number(v) for v in (None, 1.23456, 7, "x")] == ["-", "1.235", "7", "x"]


# --- curves -----------------------------------------------------------------------------------------------------------


def log(folder: Path, *rows: dict) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    return folder


def test_of_several_runs_a_panel_compares_one_score_and_says_of_what(tmp_path):
    """Whole volumes have no noise and patches have: a run with the former looked better by 2.7 dB than one without."""
    scores = {"whole_PSNR": 30.0, "spline_PSNR": 25.0, "PSNR": 20.0, "Dice": 0.5}
    one = log(tmp_path / "one", {"epoch": 1, "validation": scores | {"whole_Dice": 0.7}},
              {"epoch": 1, "update": 1, "d_penalty": 2.0})  # fmt: skip
    other = log(tmp_path / "other", {"epoch": 2, "validation": {"PSNR": 9.0, "whole_PSNR": 21.0, "Dice_label_1": 0.6,
                                                      "spline_PSNR": 25.001}})  # fmt: skip
    made = curves.overlaid([one, other])
    panels = {p.title: [(line.name, line.y, line.number) for line in p.lines] for r in made["panels"] for p in r}
    assert panels["PSNR, dB, whole volumes"] == [
        ("one", [30.0], 0), ("other", [21.0], 1), ("interpolation", [25.0], plots.GREY_LINE),
    ]  # fmt: skip
    assert panels["Dice, patches"] == [("one", [0.5], 0), ("other", [0.6], 1)], "one label under two names"
    assert panels["gradient penalty"] == [("one", [2.0], 0)] and panels["SSIM"] == []
    titles = [["Dice, patches", "PSNR, dB, whole volumes", "SSIM"], ["gradient penalty"]]
    assert [[p.title for p in r] for r in made["panels"]] == titles
    assert [told["updates"] for told in made["runs"]] == [1, 0]


def test_of_several_runs_the_interpolation_has_a_line_where_it_is_the_same_for_all(tmp_path):
    def drawn(*scores: dict) -> dict:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        runs = [log(folder / f"{i}", {"epoch": 1, "validation": one}) for i, one in enumerate(scores)]
        panels = [p for r in curves.overlaid(runs)["panels"] for p in r]
        return {p.title: [(line.name, line.y) for line in p.lines] for p in panels if p.lines}

    patches = {"PSNR": 30.0, "PSNR_spline": 28.0}
    one_of_them = drawn(patches | {"whole_PSNR": 40.0, "spline_PSNR": 35.0}, {"PSNR": 31.0, "PSNR_spline": 28.0})
    assert one_of_them == {"PSNR, dB, patches": [("0", [30.0]), ("1", [31.0]), ("interpolation", [28.0])]}
    other_scans = drawn(patches, {"PSNR": 31.0, "PSNR_spline": 26.0})
    assert other_scans == {"PSNR, dB, patches": [("0", [30.0]), ("1", [31.0])]}
    alone = drawn({"whole_SSIM": 0.9}, {"whole_SSIM": 0.8, "SSIM": 0.5}, {"SSIM": 0.6})
    assert alone == {"SSIM, whole volumes": [("0", [0.9]), ("1", [0.8])]}, "most of them have it"


def rows_of_training(epochs: int) -> list[dict]:
    """A log as long trainings write it: 23 scores and losses."""
    found = []
    for e in range(1, epochs + 1):
        losses = {f"{who}_{name}": 1.0 for who in "gd" for name in ("loss", "gradient", "skipped", "penalty", "more")}
        found.append({"epoch": e, "update": e, "lr_factor": 0.5, **losses})
        found.append({"epoch": e, "update": e, "lr_factor": 0.25, **losses})
        scores = {"PSNR": 26.0 + e, "PSNR_spline": 26.5, "PSNR_linear": 27.25, "SSIM": 0.9125, "SSIM_spline": 0.5}
        scores |= {"Dice": 0.5 + 0.125 * (e == 2), "MSE": 0.1, "Seg_share": 0.1, "Label_share": 0.1}
        whole = {"whole_PSNR": 30.0, "spline_PSNR": 29.0, "whole_SSIM": 0.75, "whole_Dice": 0.25}
        found += [{"epoch": e, "validation": scores | (whole if e == 2 else {})}] * (e > 1)
    return found


def test_a_terminal_shows_the_columns_of_a_training_that_decide_and_the_files_have_all(tmp_path, monkeypatch, capsys):
    run_folder = log(tmp_path / "one", *rows_of_training(3))
    made = run.run("curves", run_folder, tmp_path / "out")
    assert tables.decisive_rows(made) == [
        {"epoch": "1", "update": "2", "lr factor": "0.375"},
        {"epoch": "2", "update": "4", "lr factor": "0.375", "PSNR": "28.00", "over spline": "+1.50",
         "over linear": "+0.75", "SSIM": "0.912", "Dice": "0.625", "whole PSNR": "30.00", "whole over spline": "+1.00",
         "whole SSIM": "0.750", "whole Dice": "0.250"},
        {"epoch": "3", "update": "6", "lr factor": "0.375", "PSNR": "29.00", "over spline": "+2.50",
         "over linear": "+1.75", "SSIM": "0.912", "Dice": "0.500"},
    ]  # fmt: skip
    assert tables.best_lines(made) == ["Best PSNR 29.00 at epoch 3. Best Dice 0.6250 at epoch 2."]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--quiet", "study", "curves", str(run_folder), "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out.partition("\npng:")[0].splitlines()
    assert max(map(len, told)) <= 80 and told[-1] == "Best PSNR 29.00 at epoch 3. Best Dice 0.6250 at epoch 2."
    assert told[0].split("  ")[0] == "epoch" and "g_penalty" not in " ".join(told)
    header = (tmp_path / "out" / "curves.csv").read_text(encoding="utf8").splitlines()[0].split(",")
    assert {"g_penalty", "Seg_share", "whole_SSIM", "SSIM_spline"} <= set(header)
    assert set(header) == {k for row in json.loads((tmp_path / "out" / "curves.json").read_text())["rows"] for k in row}


def test_the_factor_of_the_learning_rates_is_called_so_whatever_the_log_called_it(tmp_path):
    """Logs of earlier versions have it as "rate"; it has no unit, and no learning rate is that large."""
    old = [{"rate" if key == "lr_factor" else key: value for key, value in row.items()} for row in rows_of_training(2)]
    made = [run.run("curves", log(tmp_path / name, *rows), tmp_path / f"out-{name}")
            for name, rows in (("old", old), ("new", rows_of_training(2)))]  # fmt: skip
    assert made[0]["rows"] == made[1]["rows"] and made[0]["rows"][0]["lr_factor"] == 0.375
    for name in ("old", "new"):
        for kind in ("csv", "md"):
            text = (tmp_path / f"out-{name}" / f"curves.{kind}").read_text(encoding="utf8")
            head = next(line for line in text.splitlines() if "epoch" in line and "updates" in line)
            columns = [cell.strip() for cell in head.replace("|", ",").split(",")]
            assert "lr_factor" in columns and "rate" not in columns, kind


def test_rows_of_several_runs_say_whose_they_are_and_their_updates_are_their_own(tmp_path):
    made = curves.overlaid([log(tmp_path / name, *rows_of_training(2)) for name in ("a", "b")])
    shown = tables.decisive_rows(made)
    assert [" ".join(row[k] for k in ("run", "epoch", "update")) for row in shown] == [
        "a 1 2",
        "a 2 4",
        "b 1 2",
        "b 2 4",
    ]
    assert tables.best_lines(made) == [f"{n}: Best PSNR 28.00 at epoch 2. Best Dice 0.6250 at epoch 2." for n in "ab"]
    assert tables.best_lines({"rows": [{"epoch": 1, "updates": 1}], "best": None}) == []
    masked = {"epoch": 1, "updates": 1, "Dice_cortex": 0.25, "Dice_white": 0.75, "Dice": 0.1, "whole_PSNR": 30.0}
    assert tables.decisive_rows({"rows": [masked]})[0]["Dice"] == "0.500"
    assert tables.best_lines({"rows": [masked], "best": None}) == ["Best whole PSNR 30.00 at epoch 1."]


def test_the_losses_of_a_run_have_colours_of_their_own_and_its_table_no_times(tmp_path):
    rows = [{"epoch": e, "update": e, "seconds": 9.0, "memory_bytes": 5, "g_loss": float(e), "d_loss": 2.0 * e,
             "g_reconstruction": 1.0} for e in (10, 3)]  # fmt: skip
    made = curves.curves(log(tmp_path / "one", *rows))
    assert made["rows"] == [
        {"epoch": e, "g_loss": e, "d_loss": 2 * e, "g_reconstruction": 1, "updates": 1} for e in (3, 10)
    ]
    generator, critic = made["panels"][1]
    assert [(line.name, line.number) for line in generator.lines] == [("g_reconstruction", 2), ("g_loss", 3)]
    assert [(line.name, line.number, line.y) for line in critic.lines] == [("d_loss", 4, [20, 6])]
    assert made["best"] is None and made["updates"] == 2
