"""Pages of the benchmarks are what the committed results give; predictions are made of what was measured."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import common, data_page, roofline, scale
from bench import report as page
from bench.__main__ import main
from fastsrgan.errors import InputError

COMMITTED = page.load()
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", [path for path, _ in COMMITTED], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_section_of_the_page_is_made_of_its_results(monkeypatch, path):
    """Each line as it is made now: a figure, unit, head or mark that changes shows here."""
    monkeypatch.setattr(scale, "assumed", lambda figures, machine: "")  # counted on tensors without memory, for long
    report = dict(COMMITTED)[path]
    made = page.scaled(path, report) if report["bench"] == "scale" else page.section(path, report)
    assert "\n".join(made).strip() in page.PAGE.read_text(encoding="utf8"), "python -m bench report"


def test_the_roofline_is_made_of_its_results(monkeypatch):
    written = page.ROOFLINE.read_text(encoding="utf8")
    first, _, rest = written.partition("| phase | GFLOP | GB | bound by |")
    table = "| phase | GFLOP | GB | bound by |" + rest[: rest.index("\n\n")] + "\n"
    monkeypatch.setattr(roofline, "assumed", lambda: table)
    assert first and roofline.page() == written, "python -m bench report"


def test_floors_are_of_the_batch_and_what_is_left_is_the_time_over_the_floor(monkeypatch):
    counts = {"generator forward,": roofline.Count(4e9, 8e6), "critic update": roofline.Count(1e9, 9e9)}
    ours = {name: roofline.Count(2 * one.flop, 3 * one.bytes) for name, one in counts.items()}
    monkeypatch.setattr(roofline, "phase_counts", lambda *sizes: counts if sizes == (2, 3, 16, 4, 2) else {})
    monkeypatch.setattr("bench.uncompiled.phases", lambda *args: ours)
    lines = roofline.floors(roofline.Ceilings(1e9, 1e9), 2, 3, 16, 5, 4, "bf16").splitlines()
    assert lines[0] == (
        "| phase | GFLOP | GB | bound by | floor | GFLOP as run | GB uncompiled | bound by | at best | left |"
    )
    assert lines[2] == "| generator forward | 20 | 0.04 | products | 20 s | 40 | 0.12 | products | 40 s | 2 x |"
    assert lines[3] == "| critic update | 5 | 45 | memory | 45 s | 10 | 135 | memory | 2.25 min | 3 x |"


def test_ceilings_are_those_of_the_rows_before_the_machines():
    own = {"matmul_flop_per_second": 3.0, "copy_bytes_per_second": 4.0}
    machine = {"matmul_flop_per_second": 1.0, "copy_bytes_per_second": 2.0}
    report = {"bench": "step", "rows": [{"ceilings": {"x": 1}}, {"ceilings": own}], "machine": machine, "device": "cpu"}
    assert roofline.ceilings(report) == (3.0, 4.0) and roofline.ceilings(report | {"rows": [{}]}) == (1.0, 2.0)
    with pytest.raises(InputError, match="bench step: the report has no ceilings"):
        roofline.ceilings(report | {"rows": [], "device": "NVIDIA"})


FIGURES = scale.Figures(2.0, 8, 100, 3.0, 5e6, 2)


def test_a_prediction_says_what_bounds_it_and_leaves_out_more_devices_than_subjects():
    lines = scale.prediction_table(FIGURES, (1000, 2), (1, 8), 3.6).splitlines()
    assert (
        lines[0] == "| subjects | devices | updates | epoch | bound by | read per epoch | network | cost of an epoch |"
    )
    assert [line.split(" | ")[0:2] for line in lines[2:]] == [["| 1,000", "1"], ["| 1,000", "8"], ["| 2", "1"]]
    assert lines[2] == "| 1,000 | 1 | 12,500 | 6.94 h | updates | 5 GB | 200 kB/s | 25 |"
    slow = scale.prediction_table(dataclasses.replace(FIGURES, volume_seconds=900.0), (2,), (1,), 0.0).splitlines()
    assert slow[2] == "| 2 | 1 | 25 | 15 min | volumes | 10 MB | 11.1 kB/s |"


def test_what_hours_reach_is_told_with_whole_numbers_where_they_are_large():
    rows = [{"subjects": 1000, "devices": 8, "hours": 0.5, "updates": 12345.6, "epochs": 9.87, "patches": 10.0}]
    assert scale.reached_table(rows).splitlines()[2] == "| 1,000 | 8 | 0.5 | 12,346 | 9.9 | 10 |"


def test_a_check_predicts_from_its_own_parts_what_it_then_measures(monkeypatch):
    made = SimpleNamespace(patches=50, store="s.zarr")
    asked = []
    facts = {"store_bytes_per_volume": 7e6}
    cohort = SimpleNamespace(made=lambda: made, facts=facts)
    monkeypatch.setattr("bench.cohort.Cohort", lambda work, share: asked.append(work) or cohort)
    monkeypatch.setattr(scale, "step_seconds", lambda c, world, repeats: {1: 2.0, 2: 2.5}[world])
    monkeypatch.setattr(scale, "volume_seconds", lambda work: 4.0)
    monkeypatch.setattr(scale, "epoch_seconds", lambda c, store, world: {1: 99.0, 2: 55.0}[world])
    check = scale.Check(subjects=6, batch=4)
    report = scale.checked(check, 3)
    figures = scale.Figures(2.0, 4, 50, 4.0, 7e6, 1, efficiency=0.8)
    assert report["figures"] == dataclasses.asdict(figures) and report["step_seconds"] == {"1": 2.0, "2": 2.5}
    predicted = [scale.predict(figures, 6, world) for world in (1, 2)]
    assert report["rows"] == [
        {"ranks": world, "predicted": one["epoch_seconds"], "measured": took, "updates": one["updates"]}
        for world, one, took in zip((1, 2), predicted, (99.0, 55.0), strict=True)
    ]
    assert (asked[0].shape, asked[0].patch, asked[0].batch, asked[0].subjects) == (check.shape, 32, 4, 6)
    lines = scale.section(report).splitlines()
    one = predicted[0]["epoch_seconds"]
    assert lines[2].startswith(f"| 1 | 75 | {data_page.duration(one)} | 99 s") and f"{99 / one - 1:+.0%}" in lines[2]


def test_an_epoch_is_a_run_without_its_first_wait_over_its_epochs(monkeypatch):
    asked = []

    def on_ranks(command, world, threads):
        run, settings = (Path(command[command.index(word) + 1]) for word in ("-o", "--config"))
        asked.append((command[command.index("train") + 1], world, threads, settings.read_text(encoding="utf8")))
        run.mkdir()
        (run / "summary.json").write_text(json.dumps({"seconds": 35.0, "first_wait_seconds": 5.0}), encoding="utf8")

    monkeypatch.setattr("bench.step_ranks.on_ranks", on_ranks)
    assert scale.epoch_seconds(scale.Check(batch=4, stride=7, critics=3), "s.zarr", 2) == 10.0
    ((store, world, threads, text),) = asked
    assert (store, world, threads) == ("s.zarr", 2, 1)
    for line in ("batch_size: 8", "epochs: 3", "stride: 7", "critic_iterations: 3", "kernel_gen: 4", "feed_threads: 1"):
        assert f"\n{line}\n" in f"\n{text}", line


def test_a_step_of_several_ranks_is_the_median_over_all_of_them(monkeypatch):
    asked = []
    said = [json.dumps({"seconds": values}) for values in ([1.0, 2.0], [3.0, 9.0, 10.0])]

    def on_ranks(command, world, threads):
        asked.append((json.loads(command[-1]), world, threads))
        return [f"words\n{text}" for text in said]

    monkeypatch.setattr("bench.step_ranks.on_ranks", on_ranks)
    check = scale.Check(kernel=3, kernel_dis=5, critics=4)
    assert scale.step_seconds(check, 2, 7) == 3.0
    options = {"kernel": 3, "kernel_dis": 5, "batch": 4, "patch": 32, "critic_updates": 4, "threads": 1, "repeats": 7}
    assert asked == [(options | {"device": "cpu"}, 2, 1)]


# --- what stands in a report ------------------------------------------------------------------------------------------


def test_other_work_is_marked_by_side_and_case_and_told_once():
    assert common.other_work("nnU-Net style") and not common.other_work("monai") and not common.other_work("naive")
    assert common.other_work("monai", "end to end, 3 volumes") == [common.AIR_TOO]
    assert common.other_work("monai, cropped", "end to end, 3 volumes") == []
    assert common.other_work("monai, trilinear, cropped", "end to end") == [common.OTHER_WORK["monai, trilinear"]]
    rows = [{"name": "end to end", "peers": {"monai": {}, "torchio": {}, "monai, cropped": {}}}] * 2
    assert common.marked(rows) == [f"† monai; torchio: {common.AIR_TOO}"]


def test_of_a_quick_row_all_comparisons_are_forgotten_and_its_times_stay():
    facts = {"seconds_median": 1.0, "of_copy_ceiling": 0.5, "of_matmul_ceiling": 0.5, "weak_scaling_efficiency": 0.9}
    row = dict(facts) | {key: {"p": 2.0} for key in ("ratio_to", "ratio_range", "cpu_ratio_to", "cold_ratio_to")}
    row["peers"] = {"p": dict(facts)}
    common.without_ratios(row)
    empty = {key: {} for key in ("ratio_to", "ratio_range", "cpu_ratio_to", "cold_ratio_to")}
    assert row == {"seconds_median": 1.0, "peers": {"p": {"seconds_median": 1.0}}} | empty


def test_a_report_names_its_code_and_settings(monkeypatch):
    monkeypatch.setattr(common, "machine", lambda quick: {"quick": quick})
    monkeypatch.setattr(common, "measure", lambda case, args: {"name": case.name, "passed": False, "peers": {},
                                                              "max_error": 1.0, "tolerance": 0.5})  # fmt: skip
    args = SimpleNamespace(
        only="b", quick=False, device="cpu", bench="x", argv=["x", "--only", "b"], json=None, threads=3
    )
    case = [common.Case(name, {}, dict, 0.5) for name in ("a", "ab", "c")]
    report = common.run(case, args)
    assert [row["name"] for row in report["rows"]] == ["ab"] and report["device"] == "cpu"
    assert report["command"] == ["python", "-m", "bench", "x", "--only", "b"]
    assert len(report["machine"].pop("load_average_before")) == 3 and report["machine"] == {"quick": False}
    assert report["settings"] == {"only": "b", "quick": False, "device": "cpu", "threads": 3}
    assert common.commit_of({"commit": "ab-dirty"}) == "commit ab with changes that were not committed"
    assert common.commit_of({"commit": "ab"}) == "commit ab"
    quick = [common.is_quick(r) for r in ({}, {"settings": {"quick": False}}, {"settings": {"quick": True}})]
    assert quick == [False, False, True]


@pytest.mark.parametrize("name", ["benchmarks", "roofline", "data-engine"])
def test_no_number_of_a_page_is_a_power_of_ten(name):
    """Beside 7,508 tiles a second stood 1.071e+04."""
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf8")
    assert not re.findall(r"\d[eE]\+0*[1-9]\d*", text)
    assert [page.seconds(s) for s in (0.9996, 0.9994, 1234.5)] == ["1 s", "999 ms", "1234 s"]


def test_the_sides_of_a_row_stand_below_each_other(capsys):
    """One of a long name was shifted to the right."""
    facts = {"seconds_median": 0.5, "seconds_min": 0.25, "seconds_max": 1.0}
    row = {"name": "step", "max_error": 0.0, "tolerance": 1.0, "passed": True, "ratio_to": {}, **facts}
    common.print_row(row | {"peers": {"by hand, library convolutions": facts, "naive": facts}})
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len({line.index(" ms (") for line in lines}) == 1


def test_a_bench_that_is_interrupted_says_so_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(common, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["step", "--quick"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
