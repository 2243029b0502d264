"""Figures under their names: in evaluations, tables of the command line, pages, pictures and studies."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_results import make_known

from fastsrgan.cli.evaluate import beside, better, cohort_figures, comparison, order
from fastsrgan.cli.evaluate import figures as figure_rows
from fastsrgan.evaluate import cohort, compare, metrics, pair
from fastsrgan.evaluate.figures import FIGURES, Compared, columns, scores
from fastsrgan.evaluate.grids import READER, SPLINE
from fastsrgan.evaluate.plausibility import GREEN, RED, YELLOW, Look, choose, judge, measure
from fastsrgan.evaluate.wording import picture_words
from fastsrgan.model.purpose import MODELS
from fastsrgan.pictures import error_map as error_map_module
from fastsrgan.pictures.figure import Column, planes
from fastsrgan.pictures.planes import cuts, white
from fastsrgan.report import cohort as cohort_page
from fastsrgan.report import curves, page, sections, viewer, volumes
from fastsrgan.report.collect import find
from fastsrgan.report.html import Line, line_chart, shown
from fastsrgan.study import curves as study_curves
from fastsrgan.study import plots, tables
from fastsrgan.study import run as study_run
from fastsrgan.study.run import DEFAULTS
from fastsrgan.volume.geometry import Volume

# --- evaluation -------------------------------------------------------------------------------------------------------


def images_of(noise: float, wrong: int, stray: int) -> Compared:
    """A ball and its label beside a result with so much noise, so many voxels of its rim lost and strays far away."""
    grid = np.stack(np.meshgrid(*(np.arange(24.0),) * 3, indexing="ij")) - 11.5
    label = (np.square(grid).sum(0) < 64).astype(np.uint8)
    hr = Volume((100 + 60 * label + 10 * np.sin(grid[0])).astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0]))
    seg = label.copy()
    seg[: 4 + wrong] = 0
    for n in range(stray):
        seg[1 + 3 * n : 3 + 3 * n, 1:2, 1:2] = 1
    error = np.random.default_rng(0).normal(0, noise, hr.data.shape)
    sr = (hr.data + error).astype(np.float32)
    return Compared(hr, {"whole": None}, sr, seg, label)


def test_what_is_better_of_a_figure_is_what_the_better_result_has():
    """Of every figure that has a direction, on the command line too."""
    good, bad = (scores(images_of(*how)) for how in ((2.0, 1, 1), (9.0, 5, 3)))
    flat = [{**one["image"]["whole"], **one["segmentation"]} for one in (good, bad)]
    for name, figure in FIGURES.items():
        apart = flat[0][name] - flat[1][name]
        if figure.better:
            assert apart * figure.better > 0 and better(name, apart, flat[0][name]) == "yes", name
            assert better(name, -apart, flat[1][name]) == "no", name
    assert {name for name, figure in FIGURES.items() if not figure.better} == {
        "components", "largest_component", "volume_ml", "label_components", "label_volume_ml",
    }  # fmt: skip


def turned(volume: Volume) -> Volume:
    """The same array, turned by 20 degrees: it shares a part with the reference that is no box."""
    spin = np.array([[0.94, -0.342, 0, 5], [0.342, 0.94, 0, -3], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    return Volume(volume.data, volume.affine @ spin, volume.warnings, volume.meta)


def test_ranges_are_those_of_the_whole_reference_and_structures_are_scored_where_the_images_are():
    """Largest and smallest value lie outside of the part that the images share."""
    one = images_of(3.0, 2, 2)
    hr = Volume(one.hr.data.copy(), one.hr.affine)
    hr.data[0, 0, 0], hr.data[0, 0, 1] = 900, -300
    sr, seg, label = (Volume(data, hr.affine) for data in (one.sr, one.seg, one.label))
    found = pair.evaluate_pair(turned(sr), hr, seg=seg, label=label, structures={"x": (seg, label)}, subject=None)
    assert found["grid"]["overlap"] < 0.9 and found["structures"]["x"] == found["segmentation"]  # found: 0.877
    shift = np.eye(4)
    shift[0, 3] = 4
    cut = Volume(np.ascontiguousarray(one.sr[4:]), hr.affine @ shift)
    whole = pair.evaluate_pair(cut, hr, subject=None)["image"]["whole"]
    assert whole["psnr_db"] == pytest.approx(10 * np.log10(900**2 / whole["mse"]))
    assert whole["psnr_range_db"] == pytest.approx(10 * np.log10(1200**2 / whole["mse"]))


def test_a_doubt_of_another_grid_is_linear_between_its_voxels_and_judged_where_the_head_is():
    """That is above a tenth of the reference's 99.9th percentile."""
    some = np.random.default_rng(2)
    hr = Volume(np.full((16, 14, 12), 1000, np.float32), np.eye(4))
    hr.data[:4], hr.data[4:8] = 50, 150
    sr = Volume(hr.data + some.normal(0, 5, hr.data.shape).astype(np.float32), hr.affine)
    shift = np.eye(4)
    shift[0, 3] = -0.5  # voxels of the doubt lie half way between those of the reference
    ramp = np.broadcast_to(np.arange(17, dtype=np.float32)[:, None, None] + 3, (17, 14, 12)).copy()
    found = pair.evaluate_pair(sr, hr, doubt=Volume(ramp, shift), subject=None)["doubt"]
    exact = np.broadcast_to(np.arange(16)[:, None, None] + 3.5, hr.data.shape)
    wanted = metrics.calibration(sr.data, hr.data, exact, hr.data > 100)
    assert found["error_over_doubt"] == pytest.approx(wanted["error_over_doubt"], rel=1e-6)  # found: 0 (rounding)
    # Found: 0 (rounding)
    assert [d["doubt"] for d in found["deciles"]] == pytest.approx([d["doubt"] for d in wanted["deciles"]], rel=1e-6)


def test_a_doubt_is_judged_in_a_head_that_fills_a_twentieth_of_the_image():
    """Whose air is not quite dark, and does not count."""
    some = np.random.default_rng(3)
    ref = np.full((20, 20, 20), 5, np.float32)
    ref[:10, :10, :4] = 1000
    sr = ref + some.normal(0, 5, ref.shape).astype(np.float32)
    doubt = some.uniform(1, 9, ref.shape).astype(np.float32)
    assert metrics.calibration(sr, ref, doubt) == metrics.calibration(sr, ref, doubt, ref == 1000)


@pytest.mark.parametrize("region", ["mask", "label"])
def test_a_region_that_reaches_beyond_what_the_images_share_ends_there(region):
    """One that is everywhere has the figures of the whole."""
    one = images_of(3.0, 2, 2)
    sr, everywhere = (Volume(data, one.hr.affine) for data in (one.sr, np.ones_like(one.label)))
    found = pair.evaluate_pair(turned(sr), one.hr, **{region: everywhere}, subject=None)
    assert found["grid"]["overlap"] < 0.9 and found["image"][region] == found["image"]["whole"]  # found: 0.877


def test_other_units_are_noted_of_each_image_under_its_own_name():
    """From twice the reference's mean intensity on, or half of it."""
    hr = Volume(np.full((12, 12, 12), 100, np.float32), np.eye(4))

    def noted(sr: float, baseline: float) -> list[str]:
        others = (Volume(hr.data * np.float32(factor), hr.affine) for factor in (sr, baseline))
        told = pair.evaluate_pair(next(others), hr, baseline=next(others), subject=None)
        return [note.partition(":")[0] for note in told["notes"] if "are the units the same?" in note]

    assert noted(1.9, 0.55) == [] and noted(2.1, 0.55) == ["SR"]
    assert noted(1.9, 0.45) == ["baseline"] and noted(0.45, 2.1) == ["SR", "baseline"]


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("hr", ["a_lr", "a_lr_hr", "a_lr_HR", "a", "a_hr", "a_HR"]),
        ("label", ["a_lr_label", "a_lr_seg", "a_lr_dseg", "a_lr_gm", "a_label", "a_seg", "a_dseg", "a_gm"]),
        ("mask", ["a_lr_mask", "a_mask"]),
    ],
)
def test_of_several_truths_the_first_in_the_order_that_is_told_is_taken(tmp_path, what, names):
    for name in [*names, "b_label", "b", "b_mask"]:
        (tmp_path / f"{name}.nii.gz").touch()
    result = "a_lr", Path("a_lr"), tmp_path / "out" / "a_lr_sr.nii.gz", None, {}, tmp_path, Path()
    for name in names:
        taken = tmp_path / f"{name}.nii.gz"
        assert cohort._match(*result).files[what] == taken
        taken.unlink()
    assert what not in cohort._match(*result).files


def test_each_panel_of_a_comparison_has_the_figure_of_its_heading(monkeypatch, tmp_path):
    def result(folder, truth, **_):
        shift = 1.0 if Path(folder).name == "one" else 10.0
        found = [{"image": {"whole": {"psnr_db": shift + n, "ssim": shift / 100 + n}}, "notes": [], "subject": f"s{n}",
                  "segmentation": {"dice": shift / 20 + n, "volume_ml": 100 * shift + n}} for n in (0, 1)]  # fmt: skip
        return {"rows": found, "failed": [], "definitions": {}, "without_result": []}

    drawn = []
    monkeypatch.setattr(compare, "evaluate_folders", result)
    monkeypatch.setattr("fastsrgan.pictures.bland_altman.bland_altman", lambda *args: drawn.append(args))
    compare.compare_folders(tmp_path / "one", tmp_path / "other", tmp_path / "truth", png=tmp_path / "png")
    ((target, panels, names),) = drawn
    assert target == tmp_path / "png" / "bland-altman.png" and names == ("one", "other")
    assert [(heading, *map(list, values)) for heading, *values in panels] == [
        ("PSNR, dB", [1, 2], [10, 11]),
        ("SSIM", [0.01, 1.01], [0.1, 1.1]),
        ("Dice", [0.05, 1.05], [0.5, 1.5]),
        ("volume of the segmentation, mL", [100, 101], [1000, 1001]),
    ]


def of(mean: float, sd: float | None = None) -> dict:
    return {"mean": mean, "sd": sd, "n": 3}


def test_the_tables_of_the_command_line_have_every_figure_under_its_head():
    path = "image.whole.psnr_db"
    told = {"first": of(1, 0.1), "second": of(3, 0.2), "difference": of(2, 0.3), "limits": [1.5, 2.5], "p": 0.04}
    row = {"subject": "s", "figures": {f"first.{path}": 1.0, f"second.{path}": 3.0, f"difference.{path}": 2.0}}
    result = {"names": ["one", "other"], "comparison": {path: told}, "rows": [row]}
    (line,) = comparison(result)
    assert line == {
        "where": "whole", "figure": "psnr_db", "one": "1 ± 0.1", "other": "3 ± 0.2", "difference": "2 ± 0.3",
        "better": "yes", "limits": "1.5 to 2.5", "p": "0.04", "n": 3,
    }  # fmt: skip
    assert beside(result) == [{"subject": "s", "PSNR dB": "1 3 (+2)"}]
    assert order(result).startswith("of each subject: one, other (the difference, other minus one")
    for second, word in ((1 + 1e-9, "equal"), (1.0004, "equal"), (1.002, "yes"), (0.998, "no")):  # of four digits
        told = {"first": of(1.0), "second": of(second), "difference": of(second - 1), "limits": None, "p": 0.01}
        assert comparison(result | {"comparison": {path: told}})[0]["better"] == word, second
    (line,) = cohort_figures({"summary": {path: of(9, 1), f"baseline.{path}": of(4, 2), f"gain.{path}": of(5, 3)}})
    assert line == {
        "where": "whole", "figure": "psnr_db", "value": "9 ± 1", "baseline": "4 ± 2", "difference": "5 ± 3",
        "better": "yes", "n": 3,
    }  # fmt: skip
    one = {"image": {"whole": {"psnr_db": 9.0}}}
    one |= {"baseline": {"image": {"whole": {"psnr_db": 4.0}}}, "gain": {"image": {"whole": {"psnr_db": 5.0}}}}
    (line,) = figure_rows(one)
    assert (line["value"], line["baseline"], line["difference"], line["better"]) == ("9", "4", "5", "yes")


# --- the traffic light ------------------------------------------------------------------------------------------------

ADULT = MODELS["adult"].purpose
GROWN = Look(180.0, 3500.0, 0, -0.4, 1.0, 4.0, 0.0)


@pytest.mark.parametrize(
    ("name", "slack"),
    [("head_mm", 1.1), ("voxel_mm", 2.0), ("slice_ratio", 2.0), ("structure_ml", 1.5), ("structure_share", 1.5)],
)
@pytest.mark.parametrize("end", [0, 1])
def test_beyond_the_weights_range_is_yellow_up_to_a_factor_and_red_from_there(name, slack, end):
    wanted = getattr(ADULT, name)

    def light(value: float) -> str:
        look, ml = GROWN, 600.0
        if name == "structure_ml":
            ml = value
            look = Look(180.0, ml / 0.2, 0, -0.4, 1.0, 4.0, 0.0)
        elif name == "structure_share":
            look = Look(180.0, ml / value, 0, -0.4, 1.0, 4.0, 0.0)
        else:
            look = Look(**{**GROWN.to_dict(), name: value})
        seg = np.zeros((12, 12, 12), np.uint8)
        seg[4:8, 4:8, 4:8] = 1
        return judge(look, seg, 1000 * ml / 64, ADULT).light

    away = [wanted[1] * f if end else wanted[0] / f for f in (0.98, 1.02, 0.98 * slack, 1.02 * slack)]
    assert [light(value) for value in away] == [GREEN, YELLOW, YELLOW, RED]


def test_ct_and_heads_of_no_model_are_told_from_their_limits_on():
    seg = np.zeros((12, 12, 12), np.uint8)
    seg[4:8, 4:8, 4:8] = 1
    lights = [judge(Look(180.0, 3500.0, 0, -0.4, 1.0, 4.0, low), seg, 9375.0, ADULT).light for low in (-499, -501)]
    assert lights == [GREEN, RED]
    longest = max(model.purpose.head_mm[1] for model in MODELS.values())
    said = [choose(Look(longest * f, 3500.0, 0, -0.4, 1.0, 4.0, 0.0))[1] for f in (1.2, 1.3)]
    assert ["fits no model" in text for text in said] == [False, True]


def test_where_a_head_ends_and_fluid_begins_is_told_from_their_limits_on():
    """Two borders full of tissue are a neck, three are no head; a tail of a fifth of the range is fluid."""
    assert [Look(180.0, 3500.0, n, -0.4, 1.0, 4.0, 0.0).is_head for n in (0, 2, 3)] == [True, True, False]
    seg = np.zeros((12, 12, 12), np.uint8)
    seg[4:8, 4:8, 4:8] = 1
    looks = (Look(180.0, 3500.0, 0, fluid, 1.0, 4.0, 0.0) for fluid in (0.19, 0.21))
    known = replace(ADULT, contrasts=("T1",))
    assert [judge(look, seg, 9375.0, known).light for look in looks] == [GREEN, RED]
    data = np.zeros((20, 20, 20), np.float32)
    data[4:16, 4:16, 4:16] = 100
    for share, filled in ((0.45, 0), (0.55, 1)):
        data[0] = 0
        data[0, : round(20 * share)] = 100
        assert measure(data, (1.0, 1.0, 1.0)).filled == filled


def test_averaged_weights_are_called_alike_on_a_page_and_in_a_picture():
    """One said their names and the other how many files there were."""
    several = {"averaged": [{"path": "perinatal"}, {"path": "a/own.safetensors"}]}
    for facts, name in ((several, "mean of perinatal and own.safetensors"), ({"path": "runs/last"}, "last")):
        assert sections.chosen_weights({"weights": facts}) == name
        assert picture_words({"weights": facts})["footer"] == f"weights {name}"
    for name, shipped in MODELS.items():
        facts = {"path": f"/models/{shipped.file}", "name": name, "chosen": "auto: why"}
        assert sections.chosen_weights({"weights": facts}) == f"{name} (auto: why)"


def test_a_volume_without_a_truth_stands_beside_what_the_weights_expect():
    made = {"made_for": MODELS["perinatal"].purpose.to_dict()}
    measured = {"volume_ml": 10.2, "components": 37}
    volume, components = map(str, cohort_page.measured_tiles(measured, "/m", made))
    assert "expected: 4 to 250<" in volume and "expected" not in components
    assert "expected" not in "".join(map(str, cohort_page.measured_tiles(measured, "/m", {})))


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_lines_of_a_run_have_the_values_of_their_names(monkeypatch):
    """What is no network's is dashed; of a mask's classes there is no line, of structures by name there is."""
    charts = {}
    monkeypatch.setattr(curves, "line_chart", lambda title, lines, *labels: charts.update({title: lines}))
    names = [key for _, keys in curves.SCORES for key in keys if key != "Dice_label_1"] + ["Dice_cortex", "Dice_mask_1"]
    names.append("whole_Dice_cortex")
    scored = {name: float(n) for n, name in enumerate(names)}
    losses = {name: [100.0 + n] for n, name in enumerate(k for _, keys, _ in curves.CHARTS for k in keys)}
    facts = {"validation": [{"epoch": 1} | scored], "at": [1], "curves": losses, "summary": None, "config": ""}
    curves.run_card(facts | {"updates_per_point": 1, "unreadable_lines": 0, "warnings": []}, [])
    shown = {title: {line.name: (line.y[0], line.dashed) for line in lines} for title, lines in charts.items()}

    def of_images(name: str) -> dict:
        return {
            "patches": (scored[name], False), "interpolation, patches": (scored[f"{name}_spline"], True),
            "whole volumes": (scored[f"whole_{name}"], False),
            "interpolation, whole volumes": (scored[f"spline_{name}"], True),
        }  # fmt: skip

    linear = {"best linear estimate, patches": (scored["PSNR_linear"], True)}
    linear |= {"best linear estimate, whole volumes": (scored["linear_PSNR"], True)}
    dice = {"patches": (scored["Dice"], False), "whole volumes": (scored["whole_Dice"], False)}
    dice |= {"interpolation, whole volumes": (scored["spline_Dice"], True)}
    assert shown["Dice on the test subjects, segmentation of the first structure"] == dice
    each = {
        "cortex, patches": (scored["Dice_cortex"], False),
        "cortex, whole volumes": (scored["whole_Dice_cortex"], False),
    }
    assert shown["Dice of each structure on the test subjects"] == each
    assert shown["PSNR on the test subjects, dB"] == of_images("PSNR") | linear
    assert shown["SSIM on the test subjects"] == of_images("SSIM")
    lost = {name: (values[0], False) for name, values in losses.items()}
    assert shown["Gradient norms"] == {"generator": lost["g_gradient"], "critic": lost["d_gradient"]}
    parts = {
        "adversarial loss, before its weight": lost["g_adversarial"],
        "Dice loss, before its weight": lost["g_dice"],
    }
    assert shown["Generator"] == {"total": lost["g_total"]} | parts
    assert shown["Critic"] == {"Wasserstein estimate": lost["d_wasserstein"], "gradient penalty": lost["d_penalty"]}


def test_ticks_of_a_chart_are_told_apart_and_those_of_epochs_are_whole():
    """Four ticks of a mean squared error read 0.0023745 or 0.0023746, and an axis of three epochs had 1.5."""
    page = line_chart("t", [Line("a", [1, 2, 3], [0.00237443, 0.00237454, 0.00237462])], "epoch")
    ticks = re.findall(r'class="tick (end|middle)">([^<]+)<', page)
    across, up = ([text for kind, text in ticks if kind == which] for which in ("middle", "end"))
    assert across == ["1", "2", "3", "epoch"] and len(up) == len(set(up)) > 2
    x1 = float(re.search(r'<line x1="([0-9.]+)"', page)[1])
    assert x1 - 7 - 6.5 * max(map(len, up)) >= 0, "no tick begins outside of the picture, which cut the 0 of 0.00237"
    half = line_chart("t", [Line("a", [0.5, 1], [1, 2])], "share")
    assert ">0.6<" in half
    assert ">7<" in line_chart("t", [Line("a", [7], [0.5])], "epoch"), "a whole number of one epoch"


def test_a_point_of_a_binned_curve_lies_at_the_mean_of_its_updates(tmp_path):
    lines = [json.dumps({"update": n, "g_total": float(n % 3)}) for n in range(1, 602)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="utf8")
    found = curves.read_run(tmp_path)
    assert found["updates_per_point"] == 3 and found["at"][:2] == [2, 5] and found["at"][-1] == 601
    assert found["curves"]["g_total"][:2] == [1, 1] and len(found["at"]) == 201


def test_a_point_of_a_binned_curve_is_the_mean_of_the_updates_that_have_the_value(tmp_path):
    """A penalty of every second update, and one that was not finite: what is not there does not count as 0."""
    rows = [
        {"update": n, "g_total": None if n == 5 else 6.0} | ({"d_penalty": 4.0} if n % 2 else {}) for n in range(1, 602)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    found = curves.read_run(tmp_path)
    assert found["updates_per_point"] == 3
    assert set(found["curves"]["d_penalty"]) == {4.0} and set(found["curves"]["g_total"]) == {6.0}


def numbers(html: str) -> dict[str, str]:
    """JSON pointer -> value of every figure of a piece of a page, in its order."""
    return {path: value for value, path in re.findall(r'<data value="([^"]*)" data-path="([^"]*)"', html)}


def test_every_number_of_a_page_is_the_one_at_its_place():
    known = {"summary": {"image.whole.psnr_db": of(30.25, 1.5)}}
    told = numbers(cohort_page._mean("/scores/image/whole/psnr_db", known))
    assert told == {"/summary/image.whole.psnr_db/mean": "30.25", "/summary/image.whole.psnr_db/sd": "1.5"}
    fit = {"condition": "c", "model": "m", "intercept_s": 0.5, "slope_s": 64000.0, "r2": 0.75}
    html = sections._fit(fit, "/x")
    assert list(numbers(html).items()) == [("/x/intercept_s", "0.5"), ("/x/slope_s", "64000.0"), ("/x/r2", "0.75")]
    agree = {"residual_percent": 1.5, "residual_percent_without": 4.5}
    told = numbers(sections._agreement(agree, "/a"))
    assert list(told.items()) == [("/a/residual_percent", "1.5"), ("/a/residual_percent_without", "4.5")]
    told = numbers(sections._agreement(agree | {"residual_percent_network": 2.5}, "/a"))
    assert list(told.items())[2:] == [("/a/residual_percent_network", "2.5")]
    same = sections._agreement(agree | {"residual_percent_network": 4.5}, "/a")
    assert len(numbers(same)) == 2 and "network" not in same, "not adapted: they are one"
    assert "network" not in sections._agreement({"residual_percent": 1.5}, "/a")


def test_tiles_are_of_the_region_that_they_name():
    image = {region: {"psnr_db": value} for region, value in (("whole", 20.5), ("mask", 30.5), ("label", 40.5))}
    base = {"image": {region: {"psnr_db": 1.5 + one["psnr_db"]} for region, one in image.items()}}
    for regions, value, where in (
        (("whole", "label"), "20.5", "whole image"),
        (tuple(image), "30.5", "inside the mask"),
    ):
        (tile,) = sections.tiles({"image": {r: image[r] for r in regions}, "baseline": base}, "")
        region = "mask" if "mask" in regions else "whole"
        assert f"<small>{where}</small>" in tile
        expected = {f"/image/{region}/psnr_db": value}
        assert numbers(tile) == expected | {f"/baseline/image/{region}/psnr_db": str(float(value) + 1.5)}


def test_a_tile_says_where_the_segmentation_s_baseline_knows_the_truth():
    """A Dice of 0.66 stood beside a baseline of 0.78 that was drawn from the true label."""
    figures = {"image": {"whole": {"psnr_db": 20.5}}, "segmentation": {"dice": 0.5}}
    scores = figures | {"baseline": figures, "baselines": {"image": SPLINE, "segmentation": READER}}
    image, seg = sections.tiles(scores, "")[:2]
    assert "knows the truth" not in image and "baseline, which knows the truth: " in seg
    assert "it knows the truth." in sections._baselines(scores)
    other = scores | {"baselines": {"image": SPLINE, "segmentation": "another method"}}
    assert "knows" not in "".join(sections.tiles(other, "")) and "knows" not in sections._baselines(other)


def test_the_facts_of_a_result_stand_beside_their_names():
    record = {
        "input": {"path": "scan.nii", "sha256": "aa", "shape": [1, 2, 3], "spacing_mm": [1.0, 1.5, 3.0]},
        "weights": {"path": "w.safetensors", "sha256": "bb", "spec": {"kernel": 7}},
        "shape": [4, 5, 6], "new_resolution": [0.5, 0.75, 1.25], "geometry": "physical", "device": "cpu",
        "precision": "fp32", "threshold": 0.25, "seconds": 12.5, "asked": {"step": 9}, "provenance": {"torch": "2"},
        "tiles": 11, "tile": [16, 20, 24], "window": "hann", "batch": 3,
    }  # fmt: skip
    html = sections.provenance_card(record, "/r")
    rows = dict(re.findall(r'<th scope="row">([^<]*)</th><td>(.*?)</td>', html))
    plain = {name: re.sub("<[^>]*>", "", cell) for name, cell in rows.items()}
    assert plain == {
        "input": "scan.nii", "input SHA-256": "aa", "input grid": "1 × 2 × 3 voxels of 1 × 1.5 × 3 mm",
        "result grid": "4 × 5 × 6 voxels of 0.5 × 0.75 × 1.25 mm", "weights": "w.safetensors", "weights SHA-256": "bb",
        "network": "kernel 7", "geometry": "physical", "options": "step 9", "threshold": "0.25", "precision": "fp32",
        "tiles": "tiles 11, tile 16 × 20 × 24, window hann, batch 3", "device": "cpu", "time": "12.5 s",
        "versions": "torch 2",
    }  # fmt: skip


@pytest.fixture
def packed():
    """A block of 9 x 11 x 13 voxels of 1000 in air, stored at x = 8, y = 9, z = 10 of a volume of 2 mm."""
    data = np.zeros((30, 32, 34), np.float32)
    data[8:17, 9:20, 10:23] = 1000
    affine = np.array([[2.0, 0, 0, -7], [0, 2, 0, 5], [0, 0, 2, 3], [0, 0, 0, 1]])
    sr = Volume(data, affine)
    spline = Volume(data * np.where(np.arange(34) % 2, np.float32(0.8), np.float32(0.4)), affine)
    return volumes.images_of(sr, {"spline": spline, "truth": Volume(data * np.float32(0.9), affine)}), sr


def test_a_page_is_cut_four_voxels_around_the_head_and_opens_where_it_says(packed):
    made, sr = packed
    part = made.part(made.all)
    assert part.shape == (9 + 8, 11 + 8, 13 + 8) and part.full_shape == (30, 32, 34) and part.top == 1000
    assert np.allclose(part.affine[:3, 3], (sr.affine @ [4, 5, 6, 1])[:3])
    at = tuple((part.affine @ [3, 7, 11, 1])[:3])
    html = viewer.viewer_data(part, viewer.View(at, "coronal"), None)
    plan = json.loads(re.search(r'id="plan">(.*?)</script>', html)[1])
    assert plan["start"] == [3, 7, 11] and plan["plane"] == "coronal" and plan["spacing"] == [2, 2, 2]


def test_the_colours_of_differences_are_explained_where_there_are_any(packed):
    _, sr = packed
    for others, told in (({"spline": Volume(sr.data * np.float32(0.8), sr.affine)}, True), ({}, False)):
        made = volumes.images_of(sr, others)
        card = viewer.viewer_card(made.part(made.all), viewer.View((0, 0, 0)), None, 1.0)
        assert ("Differences: first image darker" in str(card)) == told


def test_colours_of_differences_end_at_the_largest_of_them_and_the_scale_says_so_in_units_of_the_image(packed):
    made, _ = packed
    part = made.part(made.all)
    assert part.limit == 255 - round(0.4 * 255)  # of SR and spline; SR and truth are 25 levels apart, spline 128
    end = f"{part.limit * 1000 / 255:.3g}"
    text = re.sub("<[^>]*>", " ", viewer._scale(part))
    assert f"−{end} " in text and f"+{end} " in text and float(end) == 600


def test_colours_of_differences_in_a_few_voxels_end_at_theirs(packed):
    """Voxels without a difference, nearly all of them, do not count."""
    sr = packed[1]
    other = sr.data.copy()
    other[12, 14, 12:16] = 400
    made = volumes.images_of(sr, {"truth": Volume(other, sr.affine)})
    assert made.part(made.all).limit == 255 - round(0.4 * 255)


def test_the_thumbnail_of_a_result_is_its_middle_axial_plane_with_its_own_segmentation(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(page, "plane_png", lambda *args: drawn.append(args) or b"png")
    monkeypatch.setattr(page.stage, "picture", lambda *args: b"png")
    made = []
    plain = page.images_of
    monkeypatch.setattr(page, "images_of", lambda *args: made.append(plain(*args)) or made[0])
    _, thumbnail, _ = page.single_page(find(make_known(tmp_path)), 10**8)
    ((sr, seg),) = drawn
    middle = made[0].arrays["sr"].shape[2] // 2
    assert thumbnail == b"png" and np.array_equal(sr, made[0].arrays["sr"][:, :, middle])
    assert np.array_equal(seg, made[0].arrays["seg"][:, :, middle]) and seg.any() and not seg.all()


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_ends_of_every_plane_have_their_letters_and_the_detail_its_scale():
    data = np.random.default_rng(0).random((24, 30, 20)).astype(np.float32) + 1
    volume = Volume(data, np.eye(4))
    drawn = planes([Column(volume, "x")], reference=volume, width_px=300)
    letters = [[text.get_text() for text in axes.texts] for axes in drawn.axes]
    assert letters == [["R", "L"], ["R", "L"], ["P", "A"], []]  # axial, coronal, sagittal, detail
    rows = sorted((text for text in drawn.texts if text.get_rotation() == 90), key=lambda text: -text.get_position()[1])
    assert [text.get_text() for text in rows] == ["axial", "coronal", "sagittal", "detail × 3"]
    middles = [(axes.get_position().y0 + axes.get_position().y1) / 2 for axes in drawn.axes]
    assert [text.get_position()[1] for text in rows] == pytest.approx(middles)


def test_a_map_of_errors_has_its_sides_and_its_colours_end_at_the_largest_differences(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b""))[1])
    some = np.random.default_rng(1)
    hr = Volume(some.random((12, 14, 10)).astype(np.float32) + 1, np.eye(4))
    sr = Volume(hr.data + some.normal(0, 0.1, hr.data.shape).astype(np.float32), np.eye(4))
    error_map_module.error_map(tmp_path / "a.png", sr, hr)
    axes = drawn[0].axes
    for row in range(2):  # axial, coronal: right and left
        first = axes[3 * row]
        assert {text.get_text(): text.get_position()[0] for text in first.texts} == {"R": 0.02, "L": 0.98}
        assert first.get_xlim()[0] > first.get_xlim()[1]
    apart = np.concatenate([np.abs(cut.sample(sr) - cut.sample(hr)).ravel() for cut in cuts(hr)])
    ((low, high),) = {axes[3 * row + 2].images[0].get_clim() for row in range(3)}
    assert low == -high and high == pytest.approx(np.percentile(apart, 99.5), rel=0.02)  # found: 0.011, between ranks


# --- studies ----------------------------------------------------------------------------------------------------------


def test_the_papers_figures_and_steps_are_the_papers():
    """Delannoy et al. 2020: section 3 and figure 7 (PSNR, SSIM), tables 3 to 6 (Dice, components)."""

    def table(rows, name):
        return [row[name] for row in rows]

    assert table(plots.IMAGES, "psnr_db") == [26.96, 25.85, 24.24, 25.40, 24.45, 23.24]
    assert table(plots.IMAGES, "ssim") == [0.73, 0.69, 0.65, 0.49, 0.46, 0.44]
    dice = [0.855, 0.831, 0.805, 0.819, 0.785, 0.740, 0.849, 0.827, 0.806, 0.836, 0.812, 0.790]
    assert table(plots.SEGMENTATIONS, "dice") == dice
    pieces = [8.6, 45.3, 104.3, 26.6, 98.5, 193.1, 5.7, 33.6, 61.7, 5.8, 33.5, 61.8]
    assert table(plots.SEGMENTATIONS, "components") == pieces
    assert [(row["condition"], row["step"]) for row in plots.IMAGES] == [
        (condition, step) for condition in ("original", plots.NOISY) for step in (30, 80, 128)
    ]
    (base,) = plots.BASELINES
    assert (base["psnr_db"], base["ssim"], base["dice"]) == (24.22, 0.63, 0.735)
    assert [(row["step"], row["seconds"]) for row in plots.TIMES] == [(10, 600), (100, 4)]
    assert DEFAULTS["steps"]["steps"] == (20, 30, 50, 80, 128) and DEFAULTS["noise"]["steps"] == (30, 80, 128)
    assert DEFAULTS["noise"]["noise"] == (0.0, 0.01, 0.02, 0.03, 0.05) and DEFAULTS["augmentation"]["noise"] == (0.03,)
    assert DEFAULTS["resolution"]["ratios"] == (2, 3, 4, 6) and {d["patch"] for d in DEFAULTS.values()} == {128}


def test_lines_of_a_studys_curves_are_called_what_they_are():
    names = {
        "Dice": "patches (paper figure 6)", "PSNR": "patches (paper figure 6)",
        "whole_PSNR": "whole volumes", "spline_PSNR": "interpolation, whole volumes",
        "linear_PSNR": "best linear estimate, whole volumes", "PSNR_spline": "interpolation, patches",
        "PSNR_linear": "best linear estimate, patches",
    }  # fmt: skip
    assert {key: study_curves._called(key) for key in names} == names


def test_scores_of_one_kind_have_one_colour_in_all_panels_of_a_run_and_their_baselines_too():
    """The legend has one entry for both panels: whole volumes were orange in one and pink in the other."""
    scored = dict.fromkeys(("Dice", "PSNR", "PSNR_spline", "PSNR_linear", "whole_PSNR", "spline_PSNR"), 0.5)
    scored |= dict.fromkeys(("linear_PSNR", "whole_Dice", "spline_Dice"), 0.5)
    looks: dict[str, set] = {}
    for panel in study_curves._panels([{"epoch": 1} | scored], [])[0]:
        for line in panel.lines:
            looks.setdefault(line.name, set()).add((line.style, line.number))
    assert all(len(found) == 1 for found in looks.values()) and len(looks) == 6
    assert len(set.union(*looks.values())) == 6, "no two lines look alike"


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_legend_of_long_names_lies_inside_its_figure(monkeypatch, tmp_path, columns):
    from matplotlib.figure import Figure

    found = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **k: (found.append(self), save(self, path, **k))[1])
    names = [f"best linear estimate, whole volumes {i}" for i in range(8)]
    panel = plots.Panel("one", "x", [plots.PlotLine(name, (1, 2), (3, 4), number=i) for i, name in enumerate(names)])
    plots.draw(tmp_path / "p", [[panel] * columns], "t")
    box, page = found[0].legends[0].get_window_extent(), found[0].bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1 and page.y0 <= box.y0 < box.y1 <= page.y1


def test_the_legend_of_a_study_goes_by_the_kind_of_line_and_then_by_its_number(monkeypatch, tmp_path):
    """Data, fits, baselines and the paper, whatever they are called and whichever panel holds them."""
    from matplotlib.figure import Figure

    found = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (found.append(self), path.write_bytes(b""))[1])
    kinds = [("z", "data", 0), ("b", "data", 1), ("y", "fit", 0), ("c", "baseline", 0), ("a", "paper", 0)]
    lines = [plots.PlotLine(name, (1, 2), (3, 4), style=style, number=number) for name, style, number in kinds]
    panels = [plots.Panel("one", "x", lines[::-2]), plots.Panel("two", "x", lines[1::2])]
    plots.draw(tmp_path / "p", [panels], "t")
    (legend,) = found[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["z", "b", "y", "c", "a"]


def test_every_model_and_step_of_a_study_has_a_line_of_its_own_and_the_baseline_one():
    """Whatever step its rows name: it has none."""

    def row(model, step, noise, mean):
        return {"model": model, "step": step, "noise": noise, "figures": {"dice": {"mean": mean, "sd": 0.25}}}

    rows = [row("a", 32, 0, 1), row("a", 64, 0, 2), row("b", 32, 0, 3), row(plots.BASELINE, None, 0, 4)]
    rows += [row("a", 32, 1, 5), row(plots.BASELINE, None, 1, 6)]
    lines = plots._lines(rows, "dice", "noise", ["model", "step"])
    assert {line.name: (line.x, line.y, line.style) for line in lines} == {
        "a, step 32": ([0, 1], [1, 5], "data"), "a, step 64": ([0], [2], "data"), "b, step 32": ([0], [3], "data"),
        plots.BASELINE: ([0, 1], [4, 6], "baseline"),
    }  # fmt: skip
    assert [line.number for line in lines] == [0, 1, 2, plots.GREY_LINE]


def test_noise_is_drawn_in_percent_and_thickness_in_mm():
    def row(noise, low):
        figures = {"dice": {"mean": noise + low, "sd": None, "n": 1}}
        return {"noise": noise, "low_res": [1, 1, low], "model": "m", "step": 9, "condition": "c", "figures": figures}

    rows = [row(noise, low) for noise, low in ((0.0, 2), (0.02, 3), (0.05, 6))]
    for kind, places, words in (("noise", [0, 2, 5], "%"), ("resolution", [2, 3, 6], "mm")):
        panel = next(p for line in plots.PANELS[kind](rows, []) for p in line if p.title.startswith("Dice"))
        (line,) = panel.lines
        assert line.x == pytest.approx(places) and words in panel.x and line.y == [2, 3.02, 6.05]


def known_rows(**more) -> list[dict]:
    figures = {"psnr_db": {"mean": 26.125, "sd": 0.5, "n": 2}, "seconds": {"mean": 12.5, "sd": 1.5, "n": 2}}
    row = {"condition": "original", "low_res": [1.0, 1.0, 3.0], "noise": 0.0, "power": 1.0, "model": "m", "step": 30}
    return [row | {"n": 2, "figures": figures} | more]


def test_the_tables_of_a_study_have_mean_and_deviation_in_their_columns():
    fit = {"condition": "c", "model": "m", "intercept_s": 0.5, "slope_s": 64000.0, "r2": 0.75}
    facts = {"study": "steps", "rows": known_rows(), "fit": [fit], "heads": ["a", "b"], "data": "d.csv", "failed": [],
             "models": [{"name": "m", "sha256": "0123456789abcdef"}], "settings": {"whole": False, "patch": 128},
             "paper": {"rows": plots.REFERENCE["steps"], "source": plots.SOURCE}}  # fmt: skip
    (line,) = tables.csv_rows(facts["rows"])
    assert line == {
        "condition": "original", "low_res": "1 x 1 x 3", "noise": 0.0, "power": 1.0, "model": "m", "step": 30, "n": 2,
        "psnr_db_mean": 26.125, "psnr_db_sd": 0.5, "seconds_mean": 12.5, "seconds_sd": 1.5,
    }  # fmt: skip
    (line,) = tables.shown_rows(facts)
    told = {"PSNR dB": "26.12 ± 0.50", "seconds": "12.50 ± 1.50"}
    assert line == {"condition": "original", "model": "m", "step": "30"} | told | {"n": "2"}
    assert tables.fit_text(fit) == "c, m: seconds = 0.5 + 64000 / step³, R² 0.750"
    words = tables.markdown(facts, "title")
    assert "Heads: 2 of d.csv. Acquired at 1 x 1 x 3 mm. Models: m (SHA-256 0123456789ab). Patch 128 voxels." in words
    quoted = tables.paper_rows(facts)
    assert quoted[1] == {
        "condition": "original", "model": "image figures", "step": "30", "PSNR dB": "26.96", "SSIM": "0.73",
        "Dice": "-", "components": "-", "seconds": "-",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more", "name", "place"),
    [
        ("steps", {}, "m", 30), ("noise", {"noise": 0.02}, "m, step 30", 0.02),
        ("resolution", {"low_res": [1.0, 4.0, 3.0]}, "m, step 30", 4.0),
    ],
)  # fmt: skip
def test_a_study_on_a_page_is_drawn_along_its_own_axis_and_told_under_its_heads(monkeypatch, kind, more, name, place):
    charts = {}
    monkeypatch.setattr(
        sections,
        "line_chart",
        lambda title, lines, *labels: charts.update({title: (lines, labels)}) or sections.Html(""),
    )
    far = {"steps": {"step": 60}, "noise": {"noise": 0.09}, "resolution": {"low_res": [1.0, 1.0, 9.0]}}[kind]
    seven, twenty = ({"figures": {"psnr_db": {"mean": mean, "sd": None, "n": 1}}} for mean in (7.0, 20.0))
    rows = [*known_rows(**more), *known_rows(**(more | far | seven))]
    rows += known_rows(**(more | twenty | {"model": sections.INTERPOLATION, "step": None}))
    html = str(sections.study_card({"study": kind, "rows": rows}, 3))
    lines, labels = charts["PSNR, dB"]
    drawn = {line.name: (list(line.x), list(line.y), line.dashed) for line in lines}
    assert drawn[name] == ([place, {"steps": 60, "noise": 0.09, "resolution": 9.0}[kind]], [26.125, 7.0], False)
    level = ([30, 60], [20.0, 20.0], True) if kind == "steps" else ([place], [20.0], True)
    assert drawn[sections.INTERPOLATION] == level and labels == (
        sections.AXES[{"steps": "step", "noise": "noise", "resolution": "thickness"}[kind]],
    )
    heads = re.findall(r'<th scope="col">([^<]*)</th>', html)
    cells = re.findall(r"<td>(.*?)</td>", html)[: len(heads)]
    told = [re.findall(r'data-path="/studies/3/rows/0/([^"]*)"', cell) for cell in cells]
    by_head = dict(zip(heads, told, strict=True))
    assert by_head["PSNR, dB"] == ["figures/psnr_db/mean", "figures/psnr_db/sd"] and by_head["n"] == ["n"]
    assert by_head["seconds"] == ["figures/seconds/mean", "figures/seconds/sd"] and by_head["step"] == ["step"]


def test_ticks_and_colours_of_a_chart_are_those_of_its_values_and_lines():
    lines = [Line("a", [0, 4, 10], [2.0, 4.0, 3.0]), Line("b", [0, 10], [3.0, 2.0])]
    drawn = line_chart("t", lines, "epoch", "loss")
    at = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="2.6" class="dot s(\d)"', drawn)
    points = [(float(x), float(y), int(c)) for x, y, c in at]
    heights = {float(v): float(y) - 4 for y, v in re.findall(r'y="([\d.]+)" class="tick end">([\d.]+)<', drawn)}
    places = {
        float(v): float(x) for x, v in re.findall(r'x="([\d.]+)" y="[\d.]+" class="tick middle">([\d.]+)<', drawn)
    }
    expected = [(x, y, c) for c, line in enumerate(lines) for x, y in zip(line.x, line.y, strict=True)]
    assert len(points) == len(expected) == 5
    for (px, py, pc), (x, y, c) in zip(points, expected, strict=True):
        assert px == pytest.approx(places[x]) and py == pytest.approx(heights[y]) and pc == c
    assert re.findall(r'class="swatch s(\d)"></span>(\w)<', drawn) == [("0", "a"), ("1", "b")]
    assert re.search(r'y="244" class="tick middle">epoch<', drawn) and re.search(r'rotate\(-90\)"[^>]*>loss<', drawn)


def test_the_lines_below_a_cohorts_csv_hold_the_statistic_that_they_name(tmp_path):
    row = {"subject": "s", "image": {"whole": {"psnr_db": 30.0}}, "notes": []}
    summary = {"image.whole.psnr_db": {"mean": 31.0, "sd": 2.0, "n": 5}}
    cohort.write_csv(tmp_path / "c.csv", {"rows": [row], "summary": summary})
    assert (tmp_path / "c.csv").read_text(encoding="utf8").splitlines() == [
        "kind,subject,image.whole.psnr_db", "subject,s,30.0", "mean,,31.0", "sd,,2.0", "n,,5",
    ]  # fmt: skip


def test_the_model_to_compare_with_is_tuned_without_augmentation_and_from_the_shipped_one(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(study_run, "convert", lambda *args, **more: None)
    monkeypatch.setattr(study_run.weights, "template_weights", lambda: tmp_path / "start")
    monkeypatch.setattr(
        study_run, "short_training", lambda *args, **more: asked.append((args, more)) or {"stopped": None}
    )
    made = study_run._tuned(tmp_path / "c", study_run.Settings(device="cpu", seed=5), study_run.QUIET)
    ((store, folder, start, low_res, device, _), more) = asked[0]
    assert (store, folder, start) == (tmp_path / "c" / "train.zarr", made.parent, tmp_path / "start")
    assert low_res == (1.0, 1.0, 3.0) and device == "cpu" and more["seed"] == 5
    assert (more["contrast_max"], more["ema"]) == (0.0, 0.0) and more["epochs"] * more["steps_per_epoch"] == 4


def test_where_a_page_opens_and_what_it_shows_of_the_image_is_told_in_words(packed):
    made, _ = packed
    for axis, words in enumerate(("right-left", "front-back", "head-foot")):
        told = viewer._opened(viewer.View((0, 0, 0), changed=True, through=axis, slice_mm=4.5))
        assert (
            told
            == f"Opened at the largest change between SR and spline, across the slices: they are 4.5 mm apart, {words}."
        )
    assert viewer._opened(viewer.View((0, 0, 0))) == "Opened in the middle of the head."
    assert "17 × 19 × 21 voxels, cropped to the head from 30 × 32 × 34; 255 grey" in viewer._said(
        made.part(made.all), 3
    )
    uncut = replace(made.part(made.all), full_shape=(17, 19, 21))
    assert "full resolution: 17 × 19 × 21 voxels; 255 grey" in viewer._said(uncut, 3)
    slab, block = (
        made.part((slice(0, 17), slice(0, 19), slice(3, 9))),
        made.part((slice(2, 9), slice(0, 5), slice(3, 9))),
    )
    told = [viewer._said(part, 12.4) for part in (slab, block)]
    assert "a slab of 17 × 19 × 6 voxels" in told[0] and "a block of 7 × 5 × 6 voxels" in told[1]
    for text in told:
        assert "of 17 × 19 × 21 in the box of the head and 30 × 32 × 34 in the image" in text
        assert text.endswith("--max-mb 12 shows all.") and "from 0 to 1000" in text


def test_planes_show_the_object_and_three_millimetres_around_it_and_keep_off_the_cleft():
    """The sagittal one lies a tenth of the width beside the centre; values below a twentieth are air."""
    data = np.full((80, 60, 50), 4, np.float32)  # of 100: air
    data[20:60, 10:50, 15:35] = 100
    axial, coronal, sagittal = cuts(Volume(data, np.eye(4)))
    assert (axial.v[0], axial.v[-1]) == (7, 52) and (coronal.v[0], coronal.v[-1]) == (12, 37)
    assert (axial.u[0], axial.u[-1]) == (17, 62) == (coronal.u[0], coronal.u[-1])
    assert (axial.at, coronal.at) == (
        pytest.approx(24.5, abs=0.51),
        pytest.approx(29.5, abs=0.51),
    )  # found: 0.5, half a voxel
    assert sagittal.at == pytest.approx(39.5 + 0.1 * 46, abs=0.51)  # found: 0.1, on a voxel's centre


def test_numbers_are_shown_as_people_read_them():
    told = {31.25: "31.25", 0.96171: "0.9617", 1484329: "1\u202f484\u202f329", 12345.6: "12\u202f346", -0.5: "-0.5"}
    assert {value: shown(value) for value in told} == told
    assert [shown(value, 2, signed=True) for value in (0.0963, -0.0963, 0.0)] == ["+0.096", "-0.096", "0"]


def test_every_figure_is_called_and_rounded_as_its_table_says():
    """Counts of voxels are whole; means of counts of components have a tenth."""
    told = {name: (figure.named, figure.text(-1234.56789)) for name, figure in FIGURES.items()}
    assert told == {
        "psnr_db": ("PSNR, dB", "-1234.57 dB"),
        "psnr_range_db": ("PSNR over the value range, dB", "-1234.57 dB"),
        "ssim": ("SSIM", "-1234.5679"),
        "ssim_uniform": ("SSIM, uniform window", "-1234.5679"),
        "mae": ("mean absolute error", "-1234.5679"),
        "mse": ("mean squared error", "-1234.5679"),
        "dice": ("Dice", "-1234.5679"),
        "hausdorff95_mm": ("95 % Hausdorff distance, mm", "-1234.57 mm"),
        "surface_distance_mm": ("mean surface distance, mm", "-1234.568 mm"),
        "components": ("components", "-1234.6"),
        "largest_component": ("largest component, voxels", "-1235 voxels"),
        "false_components": ("false components", "-1234.6"),
        "false_component_voxels": ("voxels in false components", "-1235"),
        "structure_mae": ("mean absolute error in the segmented structure", "-1234.5679"),
        "volume_ml": ("volume, mL", "-1234.57 mL"),
        "label_components": ("components of the label", "-1234.6"),
        "label_volume_ml": ("volume of the label, mL", "-1234.57 mL"),
    }


def test_columns_of_tables_have_the_figure_of_their_heading():
    found = {name: (column.heading, column.path, column.figure.digits) for name, column in columns().items()}
    assert found == {
        "psnr_db": ("PSNR dB", "image.whole.psnr_db", 2), "ssim": ("SSIM", "image.whole.ssim", 4),
        "psnr_mask_db": ("PSNR mask dB", "image.mask.psnr_db", 2), "ssim_mask": ("SSIM mask", "image.mask.ssim", 4),
        "dice": ("Dice", "segmentation.dice", 4), "hausdorff95_mm": ("HD95 mm", "segmentation.hausdorff95_mm", 2),
        "surface_distance_mm": ("ASSD mm", "segmentation.surface_distance_mm", 3),
        "components": ("components", "segmentation.components", 1),
    }  # fmt: skip
    titles = {
        "/scores/image/mask/psnr_db": "PSNR, dB in mask", "/scores/gain/image/whole/psnr_db": "gain PSNR, dB",
        "/record/seconds": "time, s", "/measured/volume_ml": "volume, mL",
        "/scores/baseline/segmentation/dice": "baseline Dice", "/scores/segmentation/hausdorff95_mm": "HD95, mm",
    }  # fmt: skip
    assert {path: cohort_page.title(path) for path in titles} == titles
    scored = [{"image": {region: {} for region in regions}, "segmentation": {"dice": 1, "false_components": 2}}
              for regions in (("whole", "mask"), ("whole",))]  # fmt: skip
    for some, region in ((scored[:1], "mask"), (scored, "whole")):
        assert cohort_page.candidates(some) == [
            f"/scores/image/{region}/psnr_db", f"/scores/image/{region}/ssim", f"/scores/gain/image/{region}/psnr_db",
            "/scores/segmentation/dice", "/scores/baseline/segmentation/dice", "/measured/volume_ml",
            "/measured/components", "/record/seconds",
        ]  # fmt: skip


def test_the_legend_of_a_chart_has_the_colour_that_each_line_was_given():
    """As of a baseline, whose colour is that of its series in every chart of the page."""
    lines = [Line("a", [0, 1], [1.0, 2.0], number=4), Line("b", [0, 1], [2.0, 1.0]), Line("c", [0], [1.0], number=7)]
    drawn = line_chart("t", lines, "epoch")
    assert re.findall(r'class="swatch s(\d)"></span>(\w)<', drawn) == [("4", "a"), ("1", "b"), ("1", "c")]
    assert re.findall(r'class="dot s(\d)"', drawn) == ["4", "4", "1", "1", "1"]


def test_a_few_voxels_of_any_brightness_do_not_move_where_a_doubt_is_judged():
    """The head is what is above a tenth of the reference's 99.9th percentile, not of its brightest voxel."""
    some = np.random.default_rng(4)
    ref = np.full((20, 20, 20), 5, np.float32)
    ref[:10, :10, :10] = some.uniform(200, 1000, (10, 10, 10))
    sr = ref + some.normal(0, 5, ref.shape).astype(np.float32)
    doubt = some.uniform(1, 9, ref.shape).astype(np.float32)
    head = ref > 100
    sr[3, 3, 3] += 1e5
    ref[3, 3, 3] += 1e5
    assert metrics.calibration(sr, ref, doubt) == metrics.calibration(sr, ref, doubt, head)


def test_white_is_the_brightest_around_the_structure_and_not_the_fat_of_the_head():
    """In pictures and on the page alike; without a segmentation, or with one of another grid, of the whole image."""
    affine = np.diag([2.0, 2, 2, 1])
    data = np.full((20, 22, 24), 100, np.float32)
    data[:, :, 18:] = 900  # fat
    seg = np.zeros(data.shape, np.uint8)
    seg[4:10, 4:10, 4:10] = 1
    data[5, 5, 4:8] = 300  # 4 of the 216 voxels around it
    sr, mask, elsewhere = (Volume(a, m) for a, m in ((data, affine), (seg, affine), (seg, affine + 0.5 * np.eye(4))))
    assert white(sr, mask) == white(sr, None, mask) == 300
    assert white(sr, Volume(0 * seg, affine), mask) == 300
    assert white(sr) == white(sr, elsewhere) == white(sr, Volume(0 * seg, affine)) == 900
    empty = Volume(np.where(seg > 0, 0, data) * (np.indices(data.shape)[2] >= 12), affine)
    assert white(empty, mask) == 900  # nothing above 0 there
    drawn = planes([Column(sr, "x", outlines=True)], reference=sr, masks=(mask, None), width_px=200)
    assert {a.images[0].get_clim() for a in drawn.axes} == {(0, 300)}
    assert volumes.images_of(sr, {"seg": mask}).top == 300 and volumes.images_of(sr, {}).top == 900
