"""What a benchmark times: the work that is named, once, and nothing else; and the median is the median."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import (
    cohort,
    common,
    data_engine,
    data_page,
    data_sides,
    data_stages,
    flops,
    infer,
    infer_page,
    infer_plot,
    kernels,
    naive,
    peers_data,
    plot,
    plot_step,
    report,
    roofline,
    scale,
    step,
    step_ranks,
    watch,
)
from bench.__main__ import parse
from bench.peers_infer import PEERS
from fastsrgan.infer import tiles

QUICK = [
    "--quick",
    "--kernel",
    "2",
    "--batch",
    "2",
    "--patch",
    "16",
    "--critic-kernel",
    "2",
    "--critic-iterations",
    "2",
]
LARGE = 1000  # elements: what counts as an array and not as a number


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but where it is moved."""
    now = SimpleNamespace(seconds=100.0, cpu=7.0)
    monkeypatch.setattr(common.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(common.time, "process_time", lambda: now.cpu)
    return now


@pytest.mark.parametrize("seconds", [[3, 1, 2], [9, 1, 2, 4], [5], [1, 1, 1, 50, 60]])
def test_the_median_is_the_median(seconds):
    found = common.spread([common.Turn(float(s), 10.0 - s) for s in seconds])
    assert found["seconds_median"] == statistics.median(seconds) == np.median(seconds)
    assert (found["seconds_min"], found["seconds_max"]) == (min(seconds), max(seconds))
    assert found["cpu_seconds_median"] == np.median([10.0 - s for s in seconds])
    assert found["repeats"] == len(seconds)


def test_a_row_has_the_time_of_the_calls_alone_once_a_round_and_its_ratios_are_of_medians(clock):
    """Building, the first call of the gate and the comparison cost time that no row has."""
    calls: Counter[str] = Counter()
    taken = {"fastsrgan": [50.0, 1.0, 2.0, 30.0], "peer": [60.0, 8.0, 4.0, 3.0], common.TRUTH: [70.0]}

    def side(name):
        def call():
            clock.seconds += taken[name][calls[name]]
            clock.cpu += 0.5 * taken[name][calls[name]]
            calls[name] += 1
            return [np.ones(3)]

        return call

    def build():
        clock.seconds += 1000
        return {name: side(name) for name in taken}

    args = SimpleNamespace(repeats=3, device="cpu", memory=False)
    row = common.measure(common.Case("some", {}, build, 1e-6, ("patches", 6.0)), args)
    assert calls == {"fastsrgan": 4, "peer": 4, common.TRUTH: 1}
    assert (row["seconds_median"], row["seconds_min"], row["seconds_max"]) == (2.0, 1.0, 30.0)
    assert row["peers"]["peer"]["seconds_median"] == 4.0 and row["cpu_seconds_median"] == 1.0
    assert row["ratio_to"] == {"peer": 2.0} and row["patches_per_second"] == 3.0
    assert row["ratio_range"] == {"peer": [0.1, 8.0]}


def test_rounds_of_inference_have_the_time_of_the_calls_alone(clock):
    case = infer.Dense("some", {}, lambda c: {}, "cpu")
    taken = iter([1.0, 5.0, 3.0, 6.0])

    def call():
        clock.seconds += next(taken)
        case.clock(lambda: setattr(clock, "seconds", clock.seconds + 0.25))()
        return []

    turns, inside = case._rounds({"a": call, "b": call}, SimpleNamespace(repeats=2, limit=1e9))
    assert {name: [t.seconds for t in found] for name, found in turns.items()} == {"a": [1.25, 3.25], "b": [5.25, 6.25]}
    assert inside == {"a": [0.25, 0.25], "b": [0.25, 0.25]}


@pytest.fixture
def counted(monkeypatch) -> Counter[str]:
    """Passes and steps of the plain side."""
    found: Counter[str] = Counter()

    def counting(owner, name, what):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: found.update([what]) or plain(*a, **k))

    counting(naive.NaiveGenerator, "forward", "generator")
    counting(naive.NaiveCritic, "forward", "critic")
    counting(torch.Tensor, "backward", "backward")
    counting(torch.autograd, "grad", "grad")
    counting(torch.optim.Adam, "step", "adam")
    return found


UPDATE = Counter(critic=3, grad=1, backward=1, adam=1)
GENERATOR = Counter(generator=1, critic=1, backward=1, adam=1)
WORK = {
    "generator forward,": Counter(generator=1),
    "generator forward + backward": Counter(generator=1, backward=1),
    "critic update": UPDATE,
    "generator update": GENERATOR,
    "iteration of 2 + 1": UPDATE + UPDATE + Counter(generator=2) + GENERATOR,
}


class Conversions(TorchDispatchMode):
    """Counts arrays that are made in another type, or copied as they are, by what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_to_copy", "aten::clone") and args[0].numel() > LARGE:
            self.found.append(f"{func} of {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", WORK)
def test_the_plain_side_does_the_named_work_once_and_converts_nothing(counted, row):
    """One timed call: the paper's passes, the penalty's gradient, one backward pass and one step for each update."""
    case = next(c for c in step.cases(parse(["step", *QUICK])) if c.name.startswith(row))
    call = case.build()["naive"]
    call()
    counted.clear()
    with Conversions() as mode:
        call()
    assert counted == WORK[row]
    assert not mode.found


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if "constant" in peer.windows and not peer.gpu])
def test_peers_of_inference_see_each_tile_once_and_convert_nothing_but_by_their_own_law(name):
    plan = tiles.plan((20, 20, 20), 16, 4)
    if why := PEERS[name].not_run(plan):
        pytest.skip(why)
    seen = []

    def network(x):
        seen.append(len(x))
        return x

    volume = torch.rand(plan.shape)
    with Conversions() as mode:
        PEERS[name].loop(volume, plan, network, 2, "constant")
    assert sum(seen) == len(plan) == 8
    # MONAI and TorchIO copy by their own code, which is what is timed; neither volume nor tiles change their type.
    assert not [
        text for text in mode.found if "_to_copy" in text and str(plan.patch) not in text
    ]  # the window's weights


def test_every_side_of_a_row_has_its_inputs_before_it_is_timed(monkeypatch):
    """Pools, networks and random patches are made by ``build``: a call makes none."""
    made = []
    for owner, name in itertools.product((step,), ("pool", "models", "build_generator")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, plain=plain, name=name: made.append(name) or plain(*a))
    for case in step.cases(parse(["step", *QUICK])):
        if not case.name.startswith(("generator forward,", "critic update")):
            continue
        sides = case.build()
        made.clear()
        for call in sides.values():
            call()
        assert not made, case.name


# --- what follows from the times --------------------------------------------------------------------------------------


def round_of(cold, seconds, cpu, share, disk, peak):
    wait = {"share": share, "waited": 10 * share, "steps": 4}
    return {
        "patches": 60, "cold_patches": 12, "cold_seconds": cold, "seconds": seconds, "cpu_seconds": cpu, "wait": wait,
        "epochs": 5, "disk_bytes": disk, "call_bytes": 2 * disk, "files_left": dict.fromkeys(range(disk)),
        "peak_bytes": peak,
    }  # fmt: skip


def test_the_figures_of_a_feed_are_medians_over_all_rounds_and_the_most_that_was_written():
    ours = [round_of(1, [2.0, 6.0], [1.0, 2.0], 0.1, 5, 70), round_of(3, [3.0, 4.0], [3.0, 4.0], 0.5, 1, 90)]
    ours.append(round_of(4, [5.0, 50.0], [30.0, 40.0], 0.2, 0, 80))
    told = data_engine.summary(ours)
    assert told == {
        "seconds_median": 4.5, "seconds_min": 2, "seconds_max": 50, "cpu_seconds_median": 3.5, "repeats": 6,
        "patches_per_epoch": 60, "patches_per_second": 60 / 4.5, "patches_per_cpu_second": 60 / 3.5,
        "cold_patches_per_second": 4.0, "wait_share": 0.2, "wait_seconds_per_step": 0.5, "disk_bytes_per_epoch": 1.0,
        "call_bytes_per_epoch": 2.0, "files_left": 6, "peak_bytes": 90,
    }  # fmt: skip
    slow = [{**one, "seconds": [4 * s for s in one["seconds"]], "cpu_seconds": [14.0, 14.0]} for one in ours]
    slow[1]["seconds"] = [3.0, 40.0]
    row = told | {"ratio_to": {}, "ratio_range": {}, "cpu_ratio_to": {}, "cold_ratio_to": {}}
    row["peers"] = {"x": data_engine.summary(slow)}
    data_engine.compare(row, "x", {data_engine.OURS: ours, "x": slow})
    assert row["ratio_to"]["x"] == 22 / 4.5  # how many times our patches per second are the peer's
    # Any epoch of ours beside any of the peer's: our slowest and its fastest, our fastest and its slowest.
    assert row["ratio_range"]["x"] == pytest.approx([3 / 50, 200 / 2]) and row["cpu_ratio_to"]["x"] == 14 / 3.5
    assert row["cold_ratio_to"]["x"] == 1


def test_the_cpu_time_of_a_feed_is_that_of_its_processes_and_of_those_that_have_ended(monkeypatch, tmp_path):
    """User and system time, both of the same of ended children, and nothing else of Linux's account (man proc)."""
    for pid, parent, times in ((7, 1, "1 20 300 4000"), (8, 7, "50000 0 0 600000"), (9, 1, "7 7 7 7")):
        (tmp_path / f"proc/{pid}").mkdir(parents=True)
        text = f"{pid} (a ) b) S {parent} 9 9 9 9 9 9 9 9 9 {times} 20 0 1 0 9 9 9"
        (tmp_path / f"proc/{pid}/stat").write_text(text, encoding="utf8")
    monkeypatch.setattr(watch, "Path", lambda path: tmp_path / path.removeprefix("/"))
    monkeypatch.setattr(watch.os, "sysconf", {"SC_CLK_TCK": 1000}.get)
    assert watch.tree_cpu_seconds(7) == 654.321


def test_the_stages_of_a_volume_are_counted_once_each(monkeypatch):
    now = SimpleNamespace(seconds=0.0)

    def takes(seconds, result=None):
        return lambda *args: setattr(now, "seconds", now.seconds + seconds) or result

    class Feed:
        store = SimpleNamespace(read=takes(2.0))

        def prepare(self, epoch, name):
            self.store.read(name)
            data_stages.Degradation.apply(None)
            takes(5.0)()
            return "resident"

    monkeypatch.setattr(data_stages, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(data_stages.Degradation, "apply", takes(3.0))
    monkeypatch.setattr(data_stages, "make_feed", lambda work: Feed())
    pool = SimpleNamespace(generator_batches=lambda batch: [0, 1], gather=takes(3.5))
    monkeypatch.setattr(data_stages, "make_pool", lambda *args: pool)
    work = SimpleNamespace(names=["a"], batch=4, device="cpu")
    assert data_stages.one_volume(work, 1) == ({"read": 2.0, "degrade": 3.0, "place": 5.0, "gather": 7.0}, "resident")


def test_the_waiting_of_a_training_is_a_share_of_its_steps(monkeypatch):
    def train(store, run, config, device):
        run.mkdir()
        lines = [{"update": n, "seconds": s} for n, s in enumerate((1.0, 2.0, 7.0))] + [
            {"validation": {}, "seconds": 9}
        ]
        (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf8")
        return {"updates": 3, "seconds": 100.0, "data_wait_seconds": 0.5, "first_wait_seconds": 4.0}

    monkeypatch.setattr(data_stages, "train", train)
    work = SimpleNamespace(low_res=(1.0, 1.0, 3.0), patch=16, store="s")
    row = data_stages.Training("t", SimpleNamespace(made=lambda: work)).measure(
        SimpleNamespace(quick=True, device="cpu")
    )
    assert (row["wait_share"], row["seconds_median"], row["run_seconds"]) == (0.05, 2.0, 100.0)
    assert (row["updates"], row["data_wait_seconds"], row["first_wait_seconds"]) == (3, 0.5, 4.0)


def test_of_inference_the_share_outside_the_network_and_ratios_are_of_the_right_side():
    row = {"tiles": 12, "kind": infer.WHOLE, "peers": {"peer": {}, infer.CEILING: {}}}
    taken = {"ours": [2.0, 3.0, 10.0], "peer": [9.0, 6.0, 20.0], infer.CEILING: [1.5, 0.5, 3.0]}
    turns = {name: [common.Turn(s, s) for s in seconds] for name, seconds in taken.items()}
    inside = {"ours": [1.5, 2.0, 6.0], "peer": [8.1, 3.0, 10.0], infer.CEILING: [0.0, 0.0, 0.0]}
    infer._note_times(row, "ours", turns, inside)
    assert row["seconds_median"] == 3 and row["tiles_per_second"] == 4 and row["outside_network"] == 1 - 2 / 3
    assert row["peers"]["peer"]["outside_network"] == 0.5 and row["peers"]["peer"]["tiles_per_second"] == 12 / 9
    assert row["ratio_to"] == {"peer": 3.0, infer.CEILING: 0.5} and row["of_copy_ceiling"] == 0.5
    assert row["ratio_range"]["peer"] == [2.0, 4.5]


def test_bytes_of_a_row_are_what_its_work_reads_and_writes_once():
    args = parse(["infer", *["--quick", "--shape", "24", "20", "25", "--patch", "16", "--step", "12"]])
    plan = tiles.plan((24, 20, 25), 16, 12)
    tile, volume = 16**3, 24 * 20 * 25
    case = infer._sum_case(args, 12, "constant")
    assert case.facts["bytes"] == 2 * 4 * (len(plan) * tile + volume) and case.facts["tiles"] == len(plan) == 8
    args = parse(
        ["kernels", *["--quick", "--shape", "24", "20", "25", "--patch", "16", "--step", "12", "--batch", "3"]]
    )
    sizes = {case.name: case.facts["bytes"] for case in kernels.cases(args)}
    assert sizes == {
        "overlap_add": 2 * 4 * (8 * tile + volume),
        "gather_tiles": 4 * (volume + 8 * tile),
        "gather_patches": 3 * tile * (4 + 4 + 1 + 4 + 4 + 4),  # two images and a label; input, truth, label
        "degradation products": 4 * (2 * volume + 2 * 24 * 20 * 9),
    }
    assert {case.amount[1] for case in kernels.cases(args)} == set(map(float, sizes.values()))


def test_each_side_of_a_step_is_held_against_the_ceilings_with_its_own_time(monkeypatch):
    plain = {"passed": True, "seconds_median": 2.0, "peers": {"a": {"seconds_median": 8.0}, "b": {"not_run": "x"}}}
    monkeypatch.setattr(common, "measure", lambda case, args: {**plain, "peers": dict(plain["peers"])})
    top = {"matmul_flop_per_second": 100.0, "copy_bytes_per_second": 10.0}
    monkeypatch.setattr(step, "ceilings", lambda device, quick: top)
    case = step.Work("w", {}, dict, 1.0, count=flops.Count(40.0, 16.0))
    row = case.measure(SimpleNamespace(device="cpu", quick=True))
    assert (row["of_matmul_ceiling"], row["of_copy_ceiling"]) == (0.2, 0.8)
    assert (row["peers"]["a"]["of_matmul_ceiling"], row["peers"]["a"]["of_copy_ceiling"]) == (0.05, 0.2)
    assert row["peers"]["b"] == {"not_run": "x"} and (row["flop"], row["least_bytes"]) == (40, 16)


def test_the_ceilings_of_a_step_are_the_best_copy_and_product(monkeypatch):
    times = {"copy": [4.0, 2.0], "float32": [0.5, 0.25]}
    monkeypatch.setattr(
        common, "take_turns", lambda calls, *_: {k: [common.Turn(s, s) for s in times[k]] for k in calls}
    )
    top = step.ceilings.__wrapped__("cpu", True)
    assert top["copy_bytes_per_second"] == 2 * 4 * 2**20 / 2  # read and written
    assert top["matmul_flop_per_second"] == top["float32_flop_per_second"] == 2 * 128**3 / 0.25


def test_weak_scaling_is_the_time_of_one_rank_over_that_of_all(monkeypatch):
    taken = {1: [2.0, 3.0, 9.0], 4: [6.0, 5.0, 4.0]}
    monkeypatch.setattr(
        step_ranks.Scaling, "launch", lambda self, n: [{"seconds": taken[n], "weights": "w"}] * n
    )  # fmt: skip
    row = step_ranks.Scaling("s", {"batch": 8, "ranks": 4}, None).measure(SimpleNamespace(ranks=4))
    assert row["weak_scaling_efficiency"] == row["ratio_to"]["one rank"] == 3 / 5
    assert row["patches_per_second"] == 4 * 8 / 5 and row["ratio_range"]["one rank"] == [2 / 6, 9 / 4]
    assert (row["seconds_median"], row["peers"]["one rank"]["seconds_median"]) == (5, 3)


def test_figures_of_a_prediction_are_those_of_the_reports_and_options_come_in_milliseconds(tmp_path):
    rows = [{"name": "iteration on 2 ranks", "weak_scaling_efficiency": 0.75}]
    rows.append({"name": "iteration of 5 + 1", "seconds_median": 2.5, "batch": 4})
    volume = {"name": "one volume, stage by stage", "patches": 90, "convert": {"store_bytes_per_volume": 7e6}}
    volume["stages"] = {"read": 1.0, "degrade": 0.5, "place": 0.25, "gather": 64.0}
    for name, made in (("step", rows), ("data", [volume])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": made}), encoding="utf8")
    found = scale.measured(tmp_path)
    assert found == scale.Figures(2.5, 4, 90, 1.75, 7e6, efficiency=0.75)  # patches are gathered beside the steps
    given = dict.fromkeys(("batch", "threads", "efficiency", "patches", "step_ms", "volume_ms"))
    assert scale.with_options(found, SimpleNamespace(**given)) == found
    asked = SimpleNamespace(batch=16, threads=3, efficiency=0.5, patches=70, step_ms=145, volume_ms=40)
    assert scale.with_options(found, asked) == scale.Figures(0.145, 16, 70, 0.04, 7e6, 3, 0.5)


def test_a_layer_that_occurs_often_is_counted_as_often_in_all_columns():
    """Twelve convolutions of the blocks: twelve times the time and the floor, forward and training."""
    name = "norm, 3^3 of a block"
    side = {"plain": {"seconds_median": 3.0}}
    rows = [{"name": f"{name}, k 2{end}", "passed": True, "seconds_median": s, "peers": side}
            for end, s in ((", forward", 2.0), (", forward + backward", 5.0))]  # fmt: skip
    made = {"rows": rows, "settings": {"kernel": [2], "batch": [3], "patch": 16}}
    top = roofline.Ceilings(1e6, 1e30)
    floor = 12 * 3 * roofline.layer_counts(2, 16)[name].flop / 1e6
    line = roofline.layer_table(made, top).splitlines()[2]
    for seconds, least in ((24, floor), (36, floor), (60, 3 * floor)):  # backward: of weights and of the input
        assert f"{seconds} s ({seconds / least:.2g} x)" in line
    assert f"{name}, 12 of them" in line


def test_a_line_of_a_row_has_median_least_and_most_and_how_often_ours_that_is(capsys):
    ours = {"seconds_median": 0.002, "seconds_min": 0.001, "seconds_max": 0.003, "peak_bytes": 5 * 2**20}
    theirs = {"seconds_median": 0.008, "seconds_min": 0.007, "seconds_max": 0.009}
    row = {"name": "n", "max_error": 1e-7, "tolerance": 1e-5, "passed": True, "tiles_per_second": 4.0, **ours}
    common.print_row(row | {"peers": {"p": theirs}, "ratio_to": {"p": 4.0}, "ratio_range": {"p": [3.5, 4.5]}})
    _, mine, peer = capsys.readouterr().out.splitlines()
    assert mine.split() == ["fastsrgan", "2.00", "ms", "(1.00", "to", "3.00)", "5", "MiB", "4", "tiles/s"]
    assert peer.split() == ["p", "8.00", "ms", "(7.00", "to", "9.00)", "4.00", "x", "ours", "(3.50", "to", "4.50)"]


def test_bytes_in_a_second_have_a_unit_and_no_rate_an_exponent(capsys):
    """3.084e+09 bytes/s: how many is that?"""
    row = {"name": "n", "max_error": 0.0, "tolerance": 1.0, "passed": True, "peers": {}}
    row |= dict.fromkeys(("seconds_median", "seconds_min", "seconds_max"), 0.5)
    for facts in ({"bytes_per_second": 3.084e9}, {"tiles_per_second": 10708.3}, {"voxels_per_second": 2.405e7}):
        common.print_row(row | facts)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("  3.08 GB/s") and lines[3].endswith("  10,708 tiles/s")
    assert lines[5].endswith("  24,050,000 voxels/s")


def test_lines_of_a_row_keep_to_a_terminal(capsys, monkeypatch):
    """On 80 columns words were broken in their middle."""
    row = {
        "name": "whole inference, gaussian, k 2, 44 x 40 x 48, patch 32 step 16",
        "max_error": 2.6e-6,
        "tolerance": 1e-5,
    }
    row |= dict.fromkeys(("seconds_median", "seconds_min", "seconds_max"), 0.5)
    row |= {"passed": True, "peers": {"monai, fastsrgan's network": {"not_run": "not installed; " * 6}}}
    common.print_row(row)
    whole = capsys.readouterr().out
    assert len(whole.splitlines()) == 3 and max(map(len, whole.splitlines())) > 80, "piped: a side is a line"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    common.print_row(row)
    broken = capsys.readouterr().out
    assert max(map(len, broken.splitlines())) <= 80 and broken.split() == whole.split()


def test_in_half_precision_both_images_of_a_resident_are_half_as_large():
    row = {"name": "one volume", "resident_shape": [100, 100, 100], "resident_bytes_per_voxel": 9}
    single, half = data_page.memory({"rows": [row]}).splitlines()[2:]
    assert [cell.strip() for cell in single.split("|")[2:-1]] == ["9", "9 MB", "222", "888", "3555"]
    assert [cell.strip() for cell in half.split("|")[2:-1]] == ["5", "5 MB", "400", "1600", "6400"]


def test_units_of_the_pages_are_those_of_the_numbers():
    times = {0.0005: "0.5 ms", 1.5: "1.5 s", 119: "119 s", 120: "2 min", 7200: "2 h", 172800: "2 days"}
    assert {seconds: data_page.duration(seconds) for seconds in times} == times
    sizes = {999: "999 B", 1000: "1 kB", 2.5e6: "2.5 MB", 2.5e9: "2.5 GB", 5e12: "5 TB"}
    assert {size: common.amount(size) for size in sizes} == sizes
    assert {n: data_page.rate(n) for n in (1234.6, 99.0, 2.5)} == {1234.6: "1,235", 99.0: "99", 2.5: "2.5"}
    three = {"seconds_median": 2.0, "seconds_min": 0.25, "seconds_max": 30.0, "repeats": 3}
    assert report.times(three) == "2 s (250 ms to 30 s, n 3)"
    assert report.memory({"peak_bytes": 300 * 2**20}) == "300 MiB" and report.memory({}) == ""


def test_the_tables_of_inference_and_feed_have_every_figure_under_its_head():
    def under(text: str) -> list[dict[str, str]]:
        lines = [
            [c.strip() for c in line.strip()[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")
        ]
        return [dict(zip(lines[0], line + [""] * 9, strict=False)) for line in lines[2:]]

    peer = {"seconds_median": 6.0, "tiles_per_second": 2.0, "error_to_float64": 3e-7, "outside_network": 0.125}
    row = {"step": 32, "tiles": 12, "shape": [4, 5, 6], "patch": 64, "seconds_median": 2.0, "tiles_per_second": 6.0,
           "error_to_float64": 1e-7, "outside_network": 0.25, "peers": {"p": peer}, "ratio_to": {"p": 3.0}}  # fmt: skip
    ours, theirs = under("\n".join(infer_page._table(infer.WHOLE, "constant", [row])))
    share = "outside the network"
    assert ours == {"step": "32", "tiles": "12", "side": "fastsrgan", "time": "2 s", "tiles/s": "6", "ratio": "",
                    "error to float64": "1.0e-07", share: "25.0 %"}  # fmt: skip
    assert [theirs[k] for k in ("side", "time", "tiles/s", "ratio", share)] == ["p", "6 s", "2", "3.00 x", "12.5 %"]

    def side(n: float) -> dict:
        return {"patches_per_second": n, "cold_patches_per_second": n / 2, "wait_share": n / 100, "peak_bytes": n * 1e6,
                "disk_bytes_per_epoch": 1e3 * n, "patches_per_epoch": 10, "repeats": 4}  # fmt: skip

    row = {
        "name": "end to end",
        "geometry": "physical",
        "peers": {"p": side(8.0)},
        "ratio_to": {"p": 5.0},
        **side(40.0),
    }
    row |= {"ratio_range": {"p": [4.0, 6.0]}, "cpu_ratio_to": {"p": 7.0}}
    ours, theirs = under(data_page.rates({"rows": [row], "settings": {"step_ms": 145}}))
    assert (
        list(ours.values())[:3] == ["fastsrgan (physical)", "40 (n 4)", "20"]
        and ours["waits at 145 ms steps"] == "40.0 %"
    )
    assert theirs == {"side": "p", "patches/s": "8 (n 4)", "first epoch": "4", "fastsrgan is faster": "5 x (4 to 6)",
                      "in the first epoch": "5 x", "per CPU second": "7 x",
                      "waits at 145 ms steps": "8.0 %", "written per patch": "800 B",
                      "peak memory": "8 MB"}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Figures in the place of files."""
    from matplotlib.figure import Figure

    found: list = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (found.append(self), path.write_bytes(b""))[1])
    return found


def bars_of(axes) -> dict[str, float]:
    """Name -> length of each bar of a panel."""
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    return {name: patch.get_width() for name, patch in zip(names, axes.patches, strict=True)}


MACHINE = {"cpu": "abacus", "threads": 2, "usable_cores": 2}


def test_the_pictures_of_the_benchmarks_have_each_figure_under_its_name(drawn, tmp_path):
    def side(seconds, peak, **more):
        return {"seconds_median": seconds, "peak_bytes": peak, **more}

    made = {"machine": MACHINE, "device": "cpu", "settings": {"step_ms": 145}}
    row = {"name": "a step", **side(0.5, 3e6), "peers": {"naive": side(2.0, 8e6), "other": {"not_run": "x"}}}
    plot_step.plot(made | {"rows": [row]}, tmp_path / "a.png")
    left, right = drawn[0].axes
    assert bars_of(left) == {"fastsrgan": 500, "naive": 2000} and left.get_title() == "a step: ms"
    assert bars_of(right) == {"fastsrgan": 3, "naive": 8} and right.get_title() == "peak memory, MB"

    def fed(rate, share, written):
        return {
            "patches_per_second": rate,
            "wait_share": share,
            "disk_bytes_per_epoch": written,
            "patches_per_epoch": 4,
        }

    row = {"name": "end to end", "geometry": "physical", **fed(40.0, 0.25, 8e6), "peers": {"p": fed(8.0, 0.5, 64e6)}}
    stages = {"name": "one volume", "stages": {"read": 1.0, "degrade": 2.0, "place": 0.5, "gather": 4.0}}
    plot.plot(made | {"rows": [row, stages]}, tmp_path / "b.png")
    rates, waits, written, parts = drawn[1].axes
    assert bars_of(rates) == {"fastsrgan\nphysical": 40, "p": 8} and rates.get_title() == "patches per second"
    assert bars_of(waits) == {"fastsrgan\nphysical": 25, "p": 50} and "% of the time" in waits.get_title()
    assert bars_of(written) == {"fastsrgan\nphysical": 2, "p": 16} and "MB per patch" in written.get_title()
    assert [(patch.get_x(), patch.get_width()) for patch in parts.patches] == [(0, 1), (1, 2), (3, 0.5), (3.5, 4)]
    words = [text.get_text() for text in parts.get_legend().get_texts()]
    assert words == ["read 1000 ms", "degrade 2000 ms", "place 500 ms", "gather 4000 ms"]

    def whole(step, ours, theirs):
        told = {"kind": infer.WHOLE, "window": "constant", "shape": [4, 5, 6], "step": step, "name": str(step)}
        return told | side(ours, 2**20 * step, kernel=8, peers={"p": side(theirs, 2**21 * step)})

    rows = [whole(step, 2 + 8000 / step**3, 3 + 80000 / step**3) for step in (40, 20, 10)]
    infer_plot.plot(made | {"rows": rows}, tmp_path / "c.png")
    steps, _, seconds, memory = drawn[2].axes
    lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in steps.lines}
    assert lines["fastsrgan"] == {40: 2.125, 20: 3, 10: 10} and lines["p"] == {40: 4.25, 20: 13, 10: 83}
    assert {"2 + 8e+03 / step$^3$, R$^2$ 1.000", "3 + 8e+04 / step$^3$, R$^2$ 1.000"} < set(lines)
    assert bars_of(seconds) == {"fastsrgan": 2.125, "p": 4.25} and bars_of(memory) == {"fastsrgan": 40, "p": 80}


def test_from_two_steps_on_a_side_has_its_line():
    from matplotlib.figure import Figure

    def row(step, seconds, peer=None):
        told = {"kind": infer.WHOLE, "window": "constant", "shape": [4, 5, 6], "step": step, "name": str(step)}
        peers = {} if peer is None else {"p": {"seconds_median": peer}}
        return {**told, "seconds_median": seconds, "peers": peers}

    axes = Figure().subplots()
    infer_plot.draw_steps(axes, {"rows": [row(20, 3.0, 9.0), row(10, 10.0)]}, infer.WHOLE)
    drawn = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn["fastsrgan"] == {20: 3, 10: 10} and "p" not in drawn


def test_the_gate_of_a_feed_tells_the_peer_that_is_nearest_to_its_own_limit(monkeypatch):
    """And every side has its turn in every round, ours first."""
    errors = {"torchio": 2e-3, "torchio, linear": 0.09, "monai": 1e-3}
    monkeypatch.setattr(data_engine.data_sides, "gate", lambda peer, work: errors[peer])
    monkeypatch.setattr(data_engine.peers_data, "missing", lambda peer: None)
    turns = []
    monkeypatch.setattr(
        data_engine, "run_side", lambda side, *_: turns.append(side) or round_of(1, [2.0], [1.0], 0, 0, 1)
    )
    work = cohort.Work("", (9, 9, 9), 3, 2, 1)
    made = SimpleNamespace(made=lambda **more: dataclasses.replace(work, **more))
    peers = {"torchio": 5e-3, "torchio, linear": 0.1, "monai": 5e-3}
    case = data_engine.EndToEnd("n", "segsrgan", peers, made)
    row = case.measure(SimpleNamespace(rounds=2, memory=False))
    assert (row["max_error"], row["tolerance"], row["geometry"]) == (0.09, 0.1, "segsrgan")
    assert turns == [data_engine.OURS, *peers] * 2 and row["passed"]
    assert {name: facts["max_error"] for name, facts in row["peers"].items()} == errors
    errors["monai"] = 6e-3
    row = case.measure(SimpleNamespace(rounds=2, memory=False))
    assert not row["passed"] and row["max_error"] == 6e-3 and "ratio_to" not in row and len(turns) == 8


def test_what_a_cohort_took_is_told_for_one_of_its_volumes(monkeypatch, tmp_path):
    work = cohort.Work(str(tmp_path), (20, 20, 20), 8, 2, 2, stride=6)
    monkeypatch.setattr(cohort, "convert", lambda csv, store: {"raw_bytes": 600, "stored_bytes": 200})
    monkeypatch.setattr(cohort, "time", SimpleNamespace(perf_counter=iter([5.0, 9.0]).__next__))
    count, told = cohort.make_cohort(work, 0.75)
    size = sum((tmp_path / f"{name}{end}.nii.gz").stat().st_size for name in work.names for end in ("", "_label"))
    assert told == {"seconds_per_volume": 2, "nifti_bytes_per_volume": size / 2, "raw_bytes_per_volume": 300,
                    "store_bytes_per_volume": 100}  # fmt: skip
    assert count == len(work.origins(cohort.head(work.shape, 0, 0.75))) > 1


def test_arrays_of_other_shapes_are_infinitely_far_apart():
    """Also where they would broadcast against each other."""
    one = torch.ones(2, 1, 3)
    assert data_sides._largest(one, one) == 0
    assert data_sides._largest(one, torch.ones(2, 4, 3)) == data_sides._largest(torch.ones(3), one) == math.inf


def test_an_input_that_has_nothing_to_do_with_its_truth_is_refused():
    some = torch.Generator().manual_seed(0)
    hr = torch.rand(2, 8, 8, 8, generator=some)
    truth = torch.stack([hr, (hr > 0.5).float()], 1)
    data_sides.check_patches(cohort.Patches(hr[:, None] * 0.9, truth))
    for x in (torch.rand(hr.shape, generator=some), hr + 3 * torch.rand(hr.shape, generator=some)):
        with pytest.raises(AssertionError, match="input"):
            data_sides.check_patches(cohort.Patches(x[:, None], truth))


@pytest.mark.parametrize(("patches", "batch", "files"), [(6, 4, 3), (6, 5, 2), (3, 6, 1), (2, 7, 0)])
def test_the_original_writes_every_whole_batch_of_a_cohort(monkeypatch, tmp_path, patches, batch, files):
    """Also the last one, which leaves nothing over."""
    monkeypatch.setattr(peers_data, "original_patches", lambda work, *_: [np.zeros((patches, k)) for k in (1, 2)])
    work = cohort.Work("", (9, 9, 9), 3, batch, 2)
    written = peers_data._write_mini_batches(work, 1, tmp_path)
    assert len(written) == files == len(list(tmp_path.glob("data_*")))
    assert all(np.load(path).shape == (batch, k) for pair in written for path, k in zip(pair, (1, 2), strict=True))


def test_a_peer_is_held_to_the_law_unless_it_interpolates_linearly(monkeypatch):
    monkeypatch.setattr(data_engine, "cohort_of", lambda args: None)
    monkeypatch.setattr(data_engine.data_stages, "cases", lambda made: [])
    physical, original = data_engine.cases(SimpleNamespace(subjects=2, patch=8, quick=False, visit=3))
    for peer, limit in physical.peers.items():
        assert limit == (data_engine.NEAR if "linear" in peer else data_engine.LAW), peer
    assert original.peers == {"original": data_engine.EXACT} and data_engine.EXACT < data_engine.LAW < data_engine.NEAR


@pytest.mark.parametrize("deviation", [1e-5, 1e-3, 1.0])
def test_the_naive_norm_is_the_papers_also_where_there_is_little_contrast(deviation):
    """Its epsilon is outside the root, at 1e-7 a hundredth of the least of these."""
    x = torch.randn(2, 3, 8, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * deviation
    found = naive.norm(3).double()(x)
    expected = (x - x.mean((2, 3, 4), keepdim=True)) / (x.std((2, 3, 4), unbiased=False, keepdim=True) + 1e-7)
    assert float((found - expected).norm() / expected.norm()) < 0.011  # found: 0.00999


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_peer_whose_result_is_no_number_fails_its_row_beside_any_other(order):
    results = {"a": torch.ones(3), "b": torch.full((3,), math.nan)}
    sides = {"fastsrgan": lambda: [torch.ones(3)]} | {name: lambda name=name: [results[name]] for name in order}
    row = common.measure(common.Case("n", {}, lambda: sides, tolerance=1.0), SimpleNamespace())
    assert not row["passed"] and math.isnan(row["max_error"]) and "seconds_median" not in row
