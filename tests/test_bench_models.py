"""Roofline and scale: sums that follow from shapes and measured figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench import flops, roofline, scale, summary, uncompiled
from bench import report as page
from bench.__main__ import main
from fastsrgan.errors import InputError, UsageError

FIGURES = scale.Figures(step_seconds=2.0, batch=8, patches=100, volume_seconds=3.0, store_bytes=5e6, threads=2)


def test_an_epoch_is_the_longer_of_updates_and_volumes():
    alone = scale.predict(FIGURES, 6, 1)
    assert alone == scale.predict(dataclasses.replace(FIGURES, message_seconds=1.0), 6, 1)  # nobody to wait for
    two = [scale.predict(dataclasses.replace(FIGURES, message_seconds=s), 6, 2) for s in (0.0, 1.0)]
    assert two[1]["step_seconds"] - two[0]["step_seconds"] == pytest.approx(two[0]["updates"], rel=1e-12)
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
    settings = {"kernel": [2], "critic_kernel": 2, "patch": 16, "critic_iterations": 5}
    report = {"rows": [row], "settings": settings, "device": "x", "command": ["y"]}
    (folder / "step.json").write_text(json.dumps({**report, "machine": {"cpu": "z", "threads": 1}}), encoding="utf8")
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    page = roofline.page()
    floor = 2 * flops.iteration(flops.generator(2, 16), flops.critic(2, 16), 5).flop / 1e9
    assert f"({3 / floor:.2g} x)" in page and f"({6 / floor:.2g} x)" in page
    (folder / "step.json").write_text(json.dumps({**report, "rows": []}), encoding="utf8")
    with pytest.raises(InputError, match="no ceilings"):
        roofline.page()


def test_a_quick_check_predicts_and_runs_one_and_two_ranks(tmp_path, capsys):
    path = tmp_path / "scale.json"
    assert main(["scale", "--check", "--quick", "--repeats", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text(encoding="utf8"))
    assert [row["ranks"] for row in report["rows"]] == [1, 2]
    assert all(row["predicted"] > 0 and row["measured"] > 0 for row in report["rows"])
    assert report["rows"][0]["updates"] == 2 * report["rows"][1]["updates"]
    assert "| predicted |" in capsys.readouterr().out.replace("updates of an epoch | ", "")


# --- the page's opening ---------------------------------------------------------------------------------------------


def side(seconds: float, **more) -> dict:
    return {"seconds_median": seconds, "seconds_min": seconds, "seconds_max": seconds, "max_error": 0.0, **more}


@pytest.fixture
def reports() -> dict:
    """Results of one machine whose every figure is another number."""
    machine = {"cpu": "abacus", "threads": 2, "torch": "t", "load_average": [0.25, 0, 0]}
    common = {"machine": machine, "device": "cpu", "commit": "c", "command": ["x"], "settings": {"quick": False}}

    def row(name, ours, peers, **more):
        told = {"name": name, "passed": True, "tolerance": 1.0, "peers": peers, **side(ours), **more}
        return told | {"ratio_to": {k: v["seconds_median"] / ours for k, v in peers.items()}}

    mib = 2**20
    step_row = row(
        "iteration of 5 + 1, k 16 and 32, batch 4, 64^3", 3.0, {"naive": side(21.0, peak_bytes=901 * mib)},
        peak_bytes=301 * mib, critic_updates=5, kernel=16, kernel_dis=32, batch=4, patch=64,
    )  # fmt: skip
    peers = {summary.PLAIN: side(26.0, peak_bytes=503 * mib), summary.OWN: side(6.5), "nnU-Net style": side(9.0)}
    infer_row = row(
        "whole inference", 5.0, peers, peak_bytes=101 * mib, shape=[9, 8, 7], kernel=8, patch=64, step=32,
    )  # fmt: skip
    feed = row("end to end, x", 1.0, {"torchio": side(31.0), "monai": side(17.0), "monai, trilinear": side(2.0)})
    feed |= {"patches_per_second": 77.0, "patch": 48}
    critic = row("critic update, k 32", 1.0, {}) | {"tolerance": 0.01, "max_error": 6e-4}
    return {
        "step": {"bench": "step", "rows": [critic, step_row], **common},
        "infer": {"bench": "infer", "rows": [infer_row], **common},
        "data": {"bench": "data", "rows": [feed], **common},
    }


def test_the_page_opens_with_the_figures_of_the_results(reports):
    told = summary.sentences(reports)
    assert len(told) == 5
    assert "3 s against 21 s" in told[0] and "7.00 times" in told[0] and "plain PyTorch" in told[0]
    assert "5 s against 26 s with MONAI" in told[1] and "5.20 times" in told[1]
    assert "a factor of 4.00 is the network and one of 1.30 gathering" in told[1]  # 26 / 6.5 and 6.5 / 5
    assert "77 patches of 48^3" in told[2] and "31 times TorchIO and 17 times MONAI" in told[2]
    assert "301 MiB in an iteration (901 MiB" in told[3] and "101 MiB in whole inference (503 MiB" in told[3]
    assert "data, infer, step" in told[4]
    reports["infer"]["device"] = "NVIDIA H200"
    assert "Not yet run on a GPU: data, step." in summary.sentences(reports)[4]
    assert all(summary.NOT_MEASURED in text for text in summary.sentences({})[:4])
    for report in reports.values():  # a gate that failed leaves no times
        for one in report["rows"]:
            del one["seconds_median"]
    assert all(summary.NOT_MEASURED in text for text in summary.sentences(reports)[:4])


def test_the_opening_picture_has_each_ratio_under_its_name(reports, monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_bytes(b""))[1])
    summary.plot([("here", reports)], tmp_path / "a.png")
    (axes,) = drawn[0].axes
    ends = {
        tick.get_text(): bar.get_x() + bar.get_width()
        for tick, bar in zip(axes.get_yticklabels(), axes.patches, strict=True)
    }
    assert ends == pytest.approx(
        {
            "iteration of training: plain PyTorch": 7,
            "whole inference: MONAI, plain network": 5.2,
            "whole inference: MONAI, fastsrgan's network": 1.3,
            "feed: TorchIO, equal work": 31,
            "feed: MONAI, equal work": 17,
            "memory of an iteration: plain PyTorch": 901 / 301,
            "memory of inference: MONAI": 503 / 101,
        }
    )


def test_sections_mark_other_work_wider_gates_and_quick_runs(reports):
    told = "\n".join(page.section(Path("m/infer.json"), reports["infer"]))
    assert "| nnU-Net style † |" in told and "† nnU-Net style: sums tiles" in told and f"| {summary.PLAIN} |" in told
    assert "1.80 x" in told and "load average 0.2" in told
    step_page = "\n".join(page.section(Path("m/step.json"), reports["step"]))
    assert "missed its earlier gate of 0.005 with 0.0061 and was run again with 0.01 (this run: 6.0e-04)" in step_page
    assert "†" not in step_page
    reports["infer"]["settings"]["quick"] = True
    quick = "\n".join(page.section(Path("m/infer.json"), reports["infer"]))
    assert "--quick" in quick and "1.80 x" not in quick


def test_the_cost_stands_where_there_is_a_price():
    for price in (0.0, 2.5):
        head, _, line = scale.prediction_table(FIGURES, (40,), (1,), price).splitlines()
        assert ("cost" in head) == (price > 0) and head.count("|") == line.count("|")


def test_the_committed_page_opens_with_the_committed_results():
    text = (page.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf8")
    machines: dict = {}
    for path, report in page.load():
        if path.name == f"{report['bench']}.json":
            machines.setdefault(path.parent.name, {})[report["bench"]] = report
    for found in machines.values():
        for i, sentence in enumerate(summary.sentences(found), 1):
            assert f"{i}. {sentence}\n" in text, "python -m bench report"
    assert "fastsrgan.runtime" not in text and "fastsrgan.images" not in text
