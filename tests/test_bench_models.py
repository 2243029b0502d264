"""Roofline and scale: sums that follow from shapes and measured figures."""

from __future__ import annotations

import json

import pytest

from bench import flops, roofline, scale
from bench.__main__ import main
from fastsrgan.errors import InputError, UsageError

FIGURES = scale.Figures(step_seconds=2.0, batch=8, patches=100, volume_seconds=3.0, store_bytes=5e6, threads=2)


def test_an_epoch_is_the_longer_of_updates_and_volumes():
    alone = scale.predict(FIGURES, 6, 1)
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


def test_the_floor_is_the_tighter_ceiling():
    top = roofline.Ceilings(matmul=100.0, copy=10.0)
    assert top.floor(flops.Count(1000, 10)) == 10 and top.bound(flops.Count(1000, 10)) == "products"
    assert top.floor(flops.Count(10, 1000)) == 100 and top.bound(flops.Count(10, 1000)) == "memory"


def test_floors_of_another_device_from_the_command_line(capsys):
    assert main(["roofline", "--matmul", "1e12", "--copy", "1e9", "--batch", "1"]) == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("| iteration"))
    count = flops.iteration(flops.generator(16, 64), flops.critic(32, 64), 5)
    assert f"{count.flop / 1e9:.4g}" in line and "memory" in line


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
