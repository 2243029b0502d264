"""Roofline and scale: sums that follow from shapes and measured figures."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from processes import modules_on_ranks

from bench import flops, roofline, scale, step_pool, summary, uncompiled
from bench import layers as bench_layers
from bench import report as page
from bench.__main__ import main, parse
from bench.data_page import duration
from fastsrgan.errors import InputError, UsageError
from fastsrgan.model import layers
from fastsrgan.model.networks import GeneratorSpec, build_generator

FIGURES = scale.Figures(step_seconds=2.0, batch=8, patches=100, volume_seconds=3.0, store_bytes=5e6, threads=2)


def test_an_epoch_is_the_longer_of_updates_and_volumes():
    alone = scale.predict(FIGURES, 6, 1)
    assert alone == scale.predict(dataclasses.replace(FIGURES, message_seconds=1.0), 6, 1)  # nobody to wait for
    two = [scale.predict(dataclasses.replace(FIGURES, message_seconds=s), 6, 2) for s in (0.0, 1.0)]
    assert two[1]["step_seconds"] - two[0]["step_seconds"] == pytest.approx(two[0]["updates"], rel=1e-12)  # found: 0
    assert scale.sent(80.0, 8, 10.0) == 14.0  # seven eighths out and seven eighths in
    assert alone["updates"] == 75 and alone["epoch_seconds"] == alone["step_seconds"] == 150
    assert alone["volume_seconds"] == 6 * 3 / 2 and alone["bytes"] == 30e6 and alone["bytes_per_second"] == 30e6 / 150
    slow = scale.predict(scale.Figures(0.001, 8, 100, 3.0, 5e6, 1), 6, 1)
    assert slow["epoch_seconds"] == slow["volume_seconds"] == 18


def test_devices_share_the_subjects_and_lose_what_weak_scaling_loses():
    eight = scale.predict(scale.Figures(2.0, 8, 100, 3.0, 5e6, 2, efficiency=0.5), 17, 8, price=3.6)
    assert eight["updates"] == -(-3 * 100 // 8)  # the rank with three subjects
    assert eight["epoch_seconds"] == eight["updates"] * 4.0
    assert eight["bytes"] == 17 * 5e6  # each subject once, whatever the number of devices
    assert eight["cost"] == pytest.approx(8 * 3.6 * eight["epoch_seconds"] / 3600)
    with pytest.raises(UsageError, match="3 for 2 subjects"):
        scale.predict(FIGURES, 2, 3)


def test_what_hours_reach_follows_from_the_time_of_an_epoch():
    rows = scale.reached(FIGURES, [6, 2], [1, 3], [1.0, 10.0])
    assert [(r["subjects"], r["devices"], r["hours"]) for r in rows] == [
        *((n, m, h) for n, m in ((6, 1), (6, 3), (2, 1)) for h in (1.0, 10.0))
    ]
    epoch = scale.predict(FIGURES, 6, 1)["epoch_seconds"]
    assert rows[0]["epochs"] == pytest.approx(3600 / epoch) and rows[1]["updates"] == pytest.approx(
        10 * rows[0]["updates"]
    )
    assert rows[0]["patches"] == pytest.approx(rows[0]["epochs"] * 6 * 100)
    assert "| 6 | 1 | 10 |" in scale.reached_table(rows)


def test_counts_of_the_roofline_are_those_of_the_networks():
    counts = roofline.layer_counts(16, 64)
    total = sum((c.times(roofline.REPEATED.get(name, 1)) for name, c in counts.items()), flops.NOTHING)
    assert total == flops.forward(flops.generator(16, 64))
    phases = roofline.phase_counts(16, 32, 64, 5)
    assert phases["iteration"].flop > 5 * phases["critic update"].flop


def test_bytes_are_those_of_the_type():
    """Half as many in half precision, the products the same; float32 where nothing is said."""
    for four, two in (
        (flops.generator(16, 64), flops.generator(16, 64, 2)),
        (flops.critic(32, 64), flops.critic(32, 64, element=2)),
    ):
        assert [c.flop for c in four] == [c.flop for c in two]
        assert [c.bytes for c in four] == [2 * c.bytes for c in two]
    assert flops.conv(3, 5, 8, 3) == flops.Count(2 * 15 * 27 * 512, 4 * (3 * 512 + 5 * 512 + 15 * 27))
    half, single = (roofline.phase_counts(16, 32, 64, 5, size)["iteration"] for size in (2, 4))
    assert half.flop == single.flop and 2 * half.bytes == single.bytes


def test_uncompiled_counts_what_operations_read_and_write():
    x = torch.empty((4, 8), device=uncompiled.META, dtype=torch.bfloat16)
    assert uncompiled.counted(lambda: x + x).bytes == 3 * 64
    assert uncompiled.counted(lambda: x.view(8, 4).T[1:]).bytes == 0, "views move nothing"
    assert uncompiled.counted(lambda: x.copy_(x.float())).bytes == 64 + 128 + 128 + 64
    product = uncompiled.counted(lambda: x @ x.T)
    assert product.flop == 2 * 4 * 4 * 8 and product.bytes == 64 + 64 + 32
    small = uncompiled.phases(2, 2, 16, 5, torch.bfloat16)
    floor = roofline.phase_counts(2, 2, 16, 5, 2)
    assert all(small[name].bytes > floor[name].bytes for name in floor)
    assert small["iteration"].flop > 5 * small["critic update"].flop
    double = uncompiled.phases(2, 2, 16, 5, torch.float32)["generator forward,"]
    assert 1.4 < double.bytes / small["generator forward,"].bytes <= 2  # found: 1.5


def test_the_floor_is_the_tighter_ceiling():
    top = roofline.Ceilings(matmul=100.0, copy=10.0)
    assert top.floor(flops.Count(1000, 10)) == 10 and top.bound(flops.Count(1000, 10)) == "products"
    assert top.floor(flops.Count(10, 1000)) == 100 and top.bound(flops.Count(10, 1000)) == "memory"


def test_floors_of_another_device_from_the_command_line(capsys):
    assert main(["roofline", "--matmul", "1e12", "--copy", "1e9", "--batch", "1"]) == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("| iteration"))
    count = flops.iteration(flops.generator(16, 64, 2), flops.critic(32, 64, element=2), 5)
    assert f"{count.bytes / 1e9:.3g}" in line and f"{count.flop / 1e9:.4g}" in line and "memory" in line


def test_a_step_report_becomes_a_table_of_floors(tmp_path, monkeypatch):
    """From a made-up report: every ratio in the page is time over floor."""
    folder = tmp_path / "here"
    folder.mkdir()
    side = {"seconds_median": 6.0}
    row = {"name": "iteration of 5 + 1, k 2 and 2", "batch": 2, "seconds_median": 3.0, "peers": {"naive": side}}
    row |= {"ceilings": {"matmul_flop_per_second": 1e9, "copy_bytes_per_second": 1e30}}
    settings = {"kernel": [2], "critic_kernel": 2, "patch": 16, "critic_iterations": 5, "batch": [2]}
    report = {
        "bench": "step",
        "rows": [row],
        "settings": settings,
        "device": "x",
        "command": ["y"],
        "commit": "e-dirty",
    }
    (folder / "step.json").write_text(json.dumps({**report, "machine": {"cpu": "z", "threads": 1}}), encoding="utf8")
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    page = roofline.page()
    floor = 2 * flops.iteration(flops.generator(2, 16), flops.critic(2, 16), 5).flop / 1e9
    assert f"({3 / floor:.2g} x)" in page and f"({6 / floor:.2g} x)" in page and "| not run |" in page
    assert "commit e with changes that were not committed" in page
    # Layers were another run, with ceilings of its own: a thousandth of those of the step.
    machine = {"cpu": "z", "threads": 1, "matmul_flop_per_second": 1e6, "copy_bytes_per_second": 1e30}
    layer = {"passed": True, "peers": {"plain": side}, "seconds_median": 9.0}
    layers = [{"name": f"stem 7^3, 1 -> 2, {passes}", **layer} for passes in ("forward", "forward + backward")]
    other = {**report, "bench": "layers", "rows": layers, "machine": machine, "device": "cpu"}
    (folder / "layers.json").write_text(json.dumps(other), encoding="utf8")
    seconds = 2 * flops.generator(2, 16)[0].flop / 1e6
    assert f"{duration(9)} ({9 / seconds:.2g} x)" in roofline.page()
    other["settings"] = {**settings, "quick": True}
    (folder / "layers.json").write_text(json.dumps(other), encoding="utf8")
    assert "Layers of the generator" not in roofline.page()
    (folder / "step.json").write_text(json.dumps({**report, "rows": []}), encoding="utf8")
    with pytest.raises(InputError, match="no ceilings"):
        roofline.page()


def test_a_quick_check_predicts_and_runs_one_and_two_ranks(tmp_path, capsys, monkeypatch):
    """Its commands run forked; that each is started as a program of its own is held by test_bench.py."""
    path, commands = tmp_path / "scale.json", []

    def forked(command, world, threads):
        commands.append((command[:3], world, threads))
        return modules_on_ranks(command, world, tmp_path / str(len(commands)))

    monkeypatch.setattr("bench.step_ranks.on_ranks", forked)
    assert main(["scale", "--check", "--quick", "--repeats", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text(encoding="utf8"))
    programs = [[sys.executable, "-m", name] for name in ("bench.step_ranks", "fastsrgan")]
    assert commands == [(program, world, 1) for program in programs for world in (1, 2)]
    assert [row["ranks"] for row in report["rows"]] == [1, 2]
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in report["rows"])
    assert report["rows"][0]["updates"] == 2 * report["rows"][1]["updates"]
    assert "--quick" in (told := "\n".join(page.scaled(path, report))) and "| predicted |" not in told
    assert "| predicted |" in capsys.readouterr().out.replace("updates of an epoch | ", "")


# --- the page's opening ---------------------------------------------------------------------------------------------


def side(seconds: float, **more) -> dict:
    times = {"seconds_median": seconds, "seconds_min": seconds, "seconds_max": seconds, "repeats": 3}
    return {**times, "max_error": 0.0, **more}


@pytest.fixture
def reports() -> dict:
    """Results of one machine whose every figure is another number."""
    machine = {"cpu": "abacus", "threads": 2, "torch": "t", "load_average": [0.25, 0, 0]}
    common = {"machine": machine, "device": "cpu", "commit": "c", "command": ["x"], "settings": {"quick": False}}

    def row(name, ours, peers, **more):
        told = {"name": name, "passed": True, "tolerance": 1.0, "peers": peers, **side(ours), **more}
        ratios = {k: v["seconds_median"] / ours for k, v in peers.items()}
        return told | {"ratio_to": ratios, "ratio_range": {k: [r - 0.5, r + 1] for k, r in ratios.items()}}

    mib = 2**20
    step_row = row(
        "iteration of 5 + 1, k 16 and 32, batch 4, 64^3", 3.0, {"naive": side(21.0, peak_bytes=901 * mib)},
        peak_bytes=301 * mib, critic_updates=5, kernel=16, kernel_dis=32, batch=4, patch=64,
    )  # fmt: skip
    peers = {summary.PLAIN: side(26.0, peak_bytes=503 * mib), "nnU-Net style": side(9.0)}
    peers[summary.OWN] = side(6.5, outside_network=0.04, peak_bytes=303 * mib)
    infer_row = row(
        "whole inference", 5.0, peers, peak_bytes=101 * mib, shape=[9, 8, 7], kernel=8, patch=64, step=32,
        outside_network=0.03,
    )  # fmt: skip
    # Of the first epoch each takes four times as long as we do.
    feeds = {"torchio, cropped": 31.0, "monai, cropped": 17.0, "monai": 90.0, "monai, trilinear": 2.0}
    feed = row("end to end, x", 1.0, {k: side(v, cold_patches_per_second=5.0) for k, v in feeds.items()})
    feed |= {"patches_per_second": 77.0, "patch": 48, "cold_patches_per_second": 20.0}
    volume = row("one volume", 1.0, {}, shape=[10, 10, 10], resident_shape=[5, 5, 5])
    critic = row("critic update, k 32", 1.0, {}) | {"tolerance": 0.01, "max_error": 6e-4}
    return {
        "step": {"bench": "step", "rows": [critic, step_row], **common},
        "infer": {"bench": "infer", "rows": [infer_row], **common},
        "data": {"bench": "data", "rows": [feed, volume], **common},
    }


def test_the_page_opens_with_the_figures_of_the_results(reports):
    told = summary.sentences(reports)
    assert len(told) == 5
    whose = "takes 3 s; in plain eager PyTorch, contiguous, it takes 21 s, 7 times (6.5 to 8, n 3) as long"
    assert whose in told[0]  # the longer time stands beside the side that takes it
    assert "takes 5 s; with MONAI" in told[1] and "it takes 26 s, 5.2 times (4.7 to 6.2, n 3) as long" in told[1]
    assert "no measurable difference: MONAI takes 1.3 times (0.8 to 2.3, n 3)" in told[1]
    assert "3.0 and 4.0 % of the time outside the network" in told[1]
    assert "77 patches of 48^3" in told[2] and "31 times (30.5 to 32, n 3) what TorchIO" in told[2]
    assert "17 times (16.5 to 18, n 3) what MONAI" in told[2] and "4 and 4 times" in told[2]
    assert "not equal" not in told[2] and "cropped to the head" in told[2]
    assert "301 MiB in an iteration (901 with plain" in told[3]
    assert "101 MiB in whole inference (503 with MONAI, plain network; 303 with MONAI, fastsrgan's network)" in told[3]
    assert "data, infer, step" in told[4]
    reports["infer"]["device"] = "NVIDIA H200"
    assert "Not yet run on a GPU: data, step." in summary.sentences(reports)[4]
    assert all(summary.NOT_MEASURED in text for text in summary.sentences({})[:4])
    for report in reports.values():  # a gate that failed leaves no times
        for one in report["rows"]:
            del one["seconds_median"]
    assert all(summary.NOT_MEASURED in text for text in summary.sentences(reports)[:4])


def test_pages_say_what_naive_is_before_they_use_it():
    for path in (page.PAGE, page.ROOFLINE):
        text = path.read_text(encoding="utf8").lower()
        assert text.index("naive: the same networks") < text.index("| naive")


def test_a_difference_is_told_where_the_range_leaves_one_out(reports):
    reports["infer"]["rows"][0]["ratio_range"][summary.OWN] = [1.01, 1.5]
    assert "MONAI takes 1.3 times (1.01 to 1.5, n 3) as long" in summary.sentences(reports)[1]
    reports["infer"]["rows"][0]["peers"][summary.OWN]["repeats"] = 1  # one round shows no difference
    assert "no measurable difference: MONAI takes 1.3 times (measured once)" in summary.sentences(reports)[1]


def test_work_that_is_not_equal_is_told_as_that(reports):
    row = reports["data"]["rows"][0]
    for key in ("peers", "ratio_to", "ratio_range"):
        row[key] = {name: v for name, v in row[key].items() if "cropped" not in name}
    told = summary.sentences(reports)[2]
    assert "equal work" not in told and "The work is not equal" in told and ".nii.gz" in told
    assert "90 times" in told and "12% of the voxels" in told  # 5^3 of 10^3
    assert [bar.what for bar in summary.bars(reports) if "feed" in bar.what] == [
        "feed: MONAI, whole volumes, other work"
    ]


def test_channels_last_is_told_where_it_was_measured(reports):
    for name, key, plain in (("step", "naive", "naive, channels last"), ("infer", summary.PLAIN, summary.LAST)):
        (row,) = (r for r in reports[name]["rows"] if key in r["ratio_to"])
        for part in ("peers", "ratio_to", "ratio_range"):
            row[part][plain] = row[part][key]
    told = summary.sentences(reports)
    assert "contiguous, it takes 21 s" in told[0]
    assert ", and in plain eager PyTorch, channels last, it takes 21 s" in told[0]
    assert ", and around the same with channels last, it takes 26 s" in told[1]
    names = [bar.what for bar in summary.bars(reports)]
    assert len(names) == len(set(names)) == 8 + 4


def test_what_was_measured_once_has_no_range(reports):
    assert page.times(side(2.0)) == "2 s (2 s to 2 s, n 3)" and page.times(side(2.0, repeats=1)) == "2 s (n 1)"


def test_the_opening_picture_has_each_ratio_under_its_name(reports, monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b""))[1])
    summary.plot({"here": reports, "there": {"step": faster(reports["step"])}}, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    here, there = axes.containers
    ends = {
        tick.get_text(): bar.get_x() + bar.get_width() for tick, bar in zip(axes.get_yticklabels(), here, strict=True)
    }
    assert ends == pytest.approx(
        {
            "iteration of training: plain eager PyTorch, contiguous": 7,
            "whole inference: MONAI, plain network": 5.2,
            "whole inference: MONAI, fastsrgan's network": 1.3,
            "feed: TorchIO, equal work": 31,
            "feed: MONAI, equal work": 17,
            "memory of an iteration: plain eager PyTorch, contiguous": 901 / 301,
            "memory of whole inference: MONAI, plain network": 503 / 101,
            "memory of whole inference: MONAI, fastsrgan's network": 303 / 101,
        }
    )
    told = [text.get_text().strip() for text in axes.texts]
    assert told[2] == "1.3 x (0.8 to 2.3)" and told[7] == "3 x"
    assert [bar.get_x() + bar.get_width() for bar in there] == pytest.approx([14, 901 / 301])
    assert [round(bar.get_y() + bar.get_height() / 2) for bar in there] == [0, 5]  # beside the same of the other
    assert told[8:] == ["14 x (6.5 to 8)", "2.99 x"]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["here", "there"]


def faster(report: dict) -> dict:
    """The same with every ratio twice as large."""
    rows = [{**row, "ratio_to": {k: 2 * v for k, v in row["ratio_to"].items()}} for row in report["rows"]]
    return {**report, "rows": rows}


def test_every_machine_has_its_column_and_the_fullest_opens_the_page(reports):
    machines = {"full": reports, "part": {"step": faster(reports["step"])}}
    assert summary.chosen(machines) == "full" and summary.chosen({**machines, "later": reports}) == "later"
    head, _, first, *others = summary.comparison(machines)
    assert head == "| what the other side takes | full | part |"
    assert first == "| iteration of training: plain eager PyTorch, contiguous | 7 x (6.5 to 8) | 14 x (6.5 to 8) |"
    assert [line.count("not measured") for line in others] == [1, 1, 1, 1, 0, 1, 1]


def test_sections_mark_other_work_wider_gates_and_quick_runs(reports):
    told = "\n".join(page.section(Path("m/infer.json"), reports["infer"]))
    assert "| nnU-Net style † |" in told and "† nnU-Net style: sums tiles" in told and f"| {summary.PLAIN} |" in told
    assert "1.80 x" in told and "load average 0.2" in told
    step_page = "\n".join(page.section(Path("m/step.json"), reports["step"]))
    assert "* naive: measured before" not in step_page
    assert "missed its earlier gate of 0.005 with 0.0061 and was run again with 0.01 (this run: 6.0e-04)" in step_page
    assert "†" not in step_page
    reports["infer"]["settings"]["quick"] = True
    quick = "\n".join(page.section(Path("m/infer.json"), reports["infer"]))
    assert "--quick" in quick and "1.80 x" not in quick


@pytest.mark.parametrize(
    "argv",
    [
        ["--batch", "0"],
        ["--patches", "0"],
        ["--threads", "0"],
        ["--price", "-3"],
        ["--price", "nan"],
        ["--efficiency", "7"],
        ["--efficiency", "0"],
        ["--step-ms", "0"],
        ["--volume-ms", "-1"],
        ["--hours", "0"],
        ["--subjects", "4", "--devices", "8"],
        ["--price", "2", "--hours", "1"],
        ["--hours", "1", "--check"],
        ["--json", "x.json"],
        ["--quick"],
    ],
)
def test_scale_refuses_what_means_nothing_or_would_be_ignored(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["scale", *argv])
    assert stopped.value.code == 2 and argv[0] in capsys.readouterr().err.replace(
        "times", "--step-ms --volume-ms --hours"
    )


def test_assumptions_about_an_accelerator_stand_above_its_epochs():
    told = scale.assumed(FIGURES, "abacus")
    assert told.startswith("No accelerator was measured")
    for fact in ("700 TFLOP/s", "2.9 TB/s", "450 GB/s", "3 s each", "abacus", "eight threads a"):
        assert fact in told, fact


@pytest.mark.parametrize("quick", ["step", "data"])
def test_quick_figures_predict_nothing(tmp_path, quick):
    for name in ("step", "data"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [], "settings": {"quick": name == quick}}))
    with pytest.raises(InputError, match=f"{quick}.json.*--quick"):
        scale.measured(tmp_path)


@pytest.mark.parametrize("more", [[], ["--hours", "1"]])
def test_a_prediction_says_what_it_is_made_of(capsys, more):
    """5 hours an epoch, of which machine?"""
    assert main(["scale", "--subjects", "9", "--devices", "3", "--step-ms", "2500", "--batch", "7", *more]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    folder = min(p.name for p in scale.RESULTS.iterdir() if p.is_dir())
    assert f"Of {folder} " in first and "an update of 7 patches takes 2.5 s on" in first


def test_the_cost_stands_where_there_is_a_price():
    for price in (0.0, 2.5):
        head, _, line = scale.prediction_table(FIGURES, (40,), (1,), price).splitlines()
        assert ("cost" in head) == (price > 0) and head.count("|") == line.count("|")


def test_the_committed_page_opens_with_the_committed_results():
    text = (page.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf8")
    found = page.machines(page.load())
    for i, sentence in enumerate(summary.sentences(found[summary.chosen(found)]), 1):
        assert f"{i}. {sentence}\n" in text, "python -m bench report"
    assert "\n".join(summary.comparison(found)) in text, "python -m bench report"
    assert "fastsrgan.runtime" not in text and "fastsrgan.images" not in text


def test_the_layers_that_are_timed_are_the_generators_own(monkeypatch):
    """In its order, with its channels and sizes; each once, forward and forward + backward."""
    names = {"conv7_reflect", "halving_conv", "conv3_reflect", "upsample_conv"}
    named = {getattr(layers, name): name for name in names}
    network, seen = build_generator(GeneratorSpec(kernel=3), "reference"), []
    plain = layers.norm_conv

    def norm_conv(x, norm, weight, convolution, *more):
        seen.append((named[convolution], weight.shape[1], weight.shape[0], weight.shape[2], x.shape[-1], True))
        return plain(x, norm, weight, convolution, *more)

    monkeypatch.setattr(layers, "norm_conv", norm_conv)
    monkeypatch.setattr("fastsrgan.model.networks.norm_conv", norm_conv, raising=False)
    with torch.no_grad():
        network(torch.rand(1, 1, 16, 16, 16))
    first = network.up1  # which has no norm in front of it there, and is timed with one like the others
    seen = [*seen[:-2], ("upsample_conv", first.shape[1], first.shape[0], first.shape[2], 4, True), *seen[-2:]]
    args = parse(["layers", "--quick", "--kernel", "3", "--batch", "2", "--patch", "16"])
    timed = []
    for case, (name, layer) in zip(bench_layers.cases(args)[::2], bench_layers.LAYERS.items(), strict=True):
        facts = case.facts
        form = named[layer.convolution], facts["inputs"], facts["outputs"], layer.kernel, facts["size"], layer.norm
        timed.append(form)
        assert case.name == f"{name}, {form[1]} -> {form[2]} channels, {form[4]}^3, batch 2, forward"
        assert (facts["kernel"], facts["batch"], case.amount) == (3, 2, ("samples", 2.0))
    assert timed[0] == ("conv7_reflect", 1, 3, 7, 16, False) and timed[1:] == list(dict.fromkeys(seen))
    assert [case.tolerance for case in bench_layers.cases(args)[:2]] == [1e-5, 1e-3]


def test_a_layers_gradient_is_for_all_that_a_training_learns_and_the_sides_are_what_they_are_called(monkeypatch):
    args = parse(["layers", "--quick", "--kernel", "2", "--batch", "1", "--patch", "8"])
    made = {case.name.split(",")[0] + case.name[-8:]: case for case in bench_layers.cases(args)}
    asked = []
    plain = layers.norm_conv
    monkeypatch.setattr(
        layers, "norm_conv", lambda *args: asked.append((args[4], layers.by_hand(args[0]))) or plain(*args)
    )
    for name, gradients in (("stem 7^3backward", 1), ("normbackward", 4)):
        sides = made[name].build()
        assert {side: len(call()) for side, call in sides.items()} == dict.fromkeys(sides, gradients)
    assert asked == [("fast", True), ("fast", False), ("reference", True)]
    (out,) = made["norm forward"].build()["fastsrgan"]()
    assert not out.requires_grad and out.shape == (1, 2, 8, 8, 8)


def test_patches_of_a_timed_step_are_those_of_one_degraded_volume():
    pool = step_pool.pool(16, 70, "cpu")
    (resident,) = pool.residents
    assert len(pool) == 70 and resident.hr.shape == (32, 32, 32) and resident.resolution == 3.0
    assert abs(float(resident.label.float().mean()) - 0.5) < 0.01  # found: 0
    assert bool(resident.hr[resident.label > 0].min() > resident.hr[resident.label == 0].max())
    apart = (resident.hr - resident.interpolated).abs().mean(), resident.hr.diff(dim=2).abs().mean()
    assert apart[0] > 0 and bool((resident.hr > 0).all())
    done = step_pool.degrade(step_pool.texture((32, 32, 32), air=False), (1.0, 1.0, 1.0), (1.0, 1.0, 3.0))
    assert torch.equal(resident.interpolated, torch.from_numpy(done.interpolated))
    assert torch.equal(resident.hr, torch.from_numpy(done.hr))
    assert [len(step_pool.pool(16, batch, "cpu")) for batch in (2, 27, 28)] == [27, 27, 28]
