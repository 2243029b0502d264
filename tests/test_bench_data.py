"""The end-to-end data benchmark: its watch over files and memory, its gates, its peers, and what is told of it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import cohort, common, data_engine, data_page, data_sides, data_stages, peers_data, summary
from bench import report as pages
from bench import watch as watch_module
from bench.__main__ import main, parse
from bench.cohort import Patches, Work
from bench.plot import plot
from bench.watch import FolderWatch, MemoryPeak, tree_cpu_seconds, tree_memory, written
from fastsrgan.errors import InputError
from fastsrgan.observation.model import Degradation

ROOT = Path(__file__).parent.parent
SHAPE = (30, 27, 33)  # a multiple of the ratio along z, as the bench makes it: all grids then agree
MIB = 2**20


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    work = Work(str(tmp_path_factory.mktemp("cohort")), SHAPE, patch=12, batch=5, subjects=2, stride=5)
    work = dataclasses.replace(work, workers=0, threads=1, epochs=1, step_ms=1)
    count, facts = cohort.make_cohort(work, fill=0.8)
    assert facts["store_bytes_per_volume"] > 0 and facts["raw_bytes_per_volume"] == np.prod(SHAPE) * 3
    return dataclasses.replace(work, patches=count)


@pytest.fixture(autouse=True)
def one_thread():
    before, environment = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    os.environ.clear()
    os.environ.update(environment)


def of_law(work: Work, side: str) -> Work:
    return dataclasses.replace(work, geometry="segsrgan" if side == "original" else "physical")


def needs(side: str) -> None:
    how = peers_data.missing(side)
    if how:
        pytest.skip(f"{side} is not installed: {how}")


PEERS = ["original", "torchio", "torchio, linear", "monai", "monai, trilinear"]
PEERS += [f"{name}, cropped" for name in PEERS[1:]]
LIMITS = {"original": data_engine.EXACT, "torchio": data_engine.LAW, "monai": data_engine.LAW}
LIMITS |= {f"{name}, cropped": data_engine.LAW for name in ("torchio", "monai")}


# --- the watch ----------------------------------------------------------------------------------------------------


def test_written_bytes_are_noticed_in_this_process_and_in_its_children(tmp_path):
    before = written()
    (tmp_path / "own").write_bytes(bytes(3 * MIB))
    own = written()
    assert 3 * MIB <= own["disk"] - before["disk"] < 4 * MIB and own["calls"] - before["calls"] >= 3 * MIB
    program = f"open({str(tmp_path / 'child')!r}, 'wb').write(bytes({5 * MIB}))"
    subprocess.run([sys.executable, "-S", "-c", program], check=True)
    assert 5 * MIB <= written()["disk"] - own["disk"] < 6 * MIB


def test_a_file_that_is_gone_again_was_still_written(tmp_path):
    before = written()["disk"]
    (tmp_path / "short").write_bytes(bytes(MIB))
    (tmp_path / "short").unlink()
    assert written()["disk"] - before >= MIB


def test_folder_watch_names_what_is_new_and_what_has_changed(tmp_path):
    (tmp_path / "old").write_text("1")
    (tmp_path / "kept").write_text("1")
    watch = FolderWatch([tmp_path])
    assert watch.changed() == {}
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "new").write_text("123")
    (tmp_path / "old").write_text("12")
    (tmp_path / "touched").write_text("1")
    other = FolderWatch([tmp_path / "below", tmp_path])
    assert {path.name: size for path, size in watch.changed().items()} == {"new": 3, "old": 2, "touched": 1}
    os.utime(tmp_path / "touched", (0, 0))
    (tmp_path / "kept").unlink()
    assert {path.name: size for path, size in other.changed().items()} == {"touched": 1}


@pytest.fixture
def accounts(tmp_path, monkeypatch):
    """Linux's accounts of process 7, its child 8 and that one's child 9; 10 is another's, 11 has ended meanwhile."""
    for pid, parent, pss in ((7, 1, 10), (8, 7, 200), (9, 8, 3000), (10, 1, 40000), (11, 7, None)):
        folder = tmp_path / f"proc/{pid}"
        folder.mkdir(parents=True)
        (folder / "stat").write_text(f"{pid} (a ) b) S {parent} 9 9 9", encoding="utf8")
        if pss is not None:
            (folder / "smaps_rollup").write_text(f"Rss:  9 kB\nPss:  {pss} kB\nPss_Anon:  5 kB\n", encoding="utf8")
            io = f"rchar: 1\nwchar: {2 * pss}\nread_bytes: 1\nwrite_bytes: {pss}\ncancelled_write_bytes: 1\n"
            (folder / "io").write_text(io, encoding="utf8")
    (tmp_path / "proc" / "self").mkdir()
    monkeypatch.setattr(watch_module, "Path", lambda path: tmp_path / path.removeprefix("/"))
    monkeypatch.setattr(watch_module.os, "getpid", lambda: 7)
    return tmp_path / "proc"


def test_what_a_tree_of_processes_takes_and_writes_is_the_sum_of_each_once(accounts):
    assert watch_module.descendants(7) == [8, 11, 9] or watch_module.descendants(7) == [11, 8, 9]
    assert tree_memory(7) == 3210 * 1024 and tree_memory(9) == 3000 * 1024
    assert written() == {"disk": 3210, "calls": 6420}
    (accounts / "7" / "io").unlink()
    with pytest.raises(FileNotFoundError):  # its own account: nothing must not look like nothing written
        written()


def test_the_peak_of_memory_is_the_most_of_all_looks(monkeypatch):
    seen, looks = iter([5, 3, 9, 4]), iter([False, False, False, True])
    monkeypatch.setattr(watch_module, "tree_memory", lambda pid: next(seen))
    peak = MemoryPeak(7, interval=0.25)
    waits = []
    peak._ended = SimpleNamespace(wait=lambda seconds: waits.append(seconds) or next(looks), set=lambda: None)
    with peak:
        peak._thread.join()
    assert peak.bytes == 9 and set(waits) == {0.25}


def test_memory_and_cpu_time_of_a_child_are_seen():
    program = (
        "import sys; a = bytearray(b'1') * (64 << 20); sum(range(3000000)); print(1, flush=True); sys.stdin.read(1)"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout and child.stdin
        child.stdout.readline()
        with MemoryPeak(os.getpid(), interval=0.01) as peak:
            pass
        assert tree_memory(child.pid) >= 64 * MIB
        assert peak.bytes >= tree_memory(child.pid)
        assert tree_cpu_seconds(child.pid) > 0
        child.stdin.write("x")


def test_the_time_of_children_that_have_ended_counts_as_that_of_their_parent(tmp_path):
    """Once it has waited for them: what loader processes did is not lost when they end."""
    work = "sum(range(20_000_000))"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', '{work}']); print(1, flush=True); "
    program += "sys.stdin.read(1)"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout and child.stdin
        child.stdout.readline()
        own = sum(int(v) for v in Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        assert tree_cpu_seconds(child.pid) > own / os.sysconf("SC_CLK_TCK") + 0.1  # found: 0.31 more
        child.stdin.write("x")


# --- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["torchio, cropped", "monai, cropped"])
def test_cropped_peers_make_the_same_of_the_head_alone_and_read_it_once(tmp_path, side):
    needs(side)
    work = Work(str(tmp_path), (48, 45, 51), patch=12, batch=5, subjects=1, stride=5, workers=0)
    work = dataclasses.replace(work, patches=cohort.make_cohort(work, fill=0.5)[0])
    image = peers_data.read(work.image(work.names[0]))
    part, box = peers_data.head_of(work), cohort.positive_box(image)
    for n, kept, (low, high) in zip(work.shape, part, box, strict=True):
        assert 0 <= low - kept.start <= cohort.MARGIN + 2 and 0 <= kept.stop - high <= cohort.MARGIN + 2
        assert kept.stop - kept.start < n
    assert part[2].start % 3 == part[2].stop % 3 == 0
    assert data_sides.LAWS[side](work, work.names[0])[0].shape == image[part].shape
    assert data_sides.gate(side, work) <= data_engine.LAW
    epochs = data_sides.stream(side, work)
    for _ in next(epochs):
        pass
    for path in tmp_path.glob("*.nii.gz"):
        path.unlink()
    assert sum(len(patches.x) for patches in next(epochs)) == work.patches


@pytest.mark.parametrize("side", PEERS)
def test_every_peer_makes_the_same_patches_as_we_do(work, side):
    needs(side)
    assert data_sides.gate(side, of_law(work, side)) <= LIMITS.get(side, data_engine.NEAR)


def test_the_originals_crop_is_ours(tmp_path):
    work = Work(str(tmp_path), (19, 22, 35), patch=9, batch=4, subjects=1, stride=4, geometry="segsrgan", workers=0)
    cohort.make_cohort(work, fill=0.9)
    assert data_sides.gate("original", work) <= data_engine.EXACT


def shifted(monkeypatch):
    right = Degradation.apply

    def apply(self, *a, **k):
        done = right(self, *a, **k)
        return dataclasses.replace(done, interpolated=np.roll(done.interpolated, 1, 2))

    monkeypatch.setattr(Degradation, "apply", apply)


def brighter(monkeypatch):
    right = Degradation.apply

    def apply(self, *a, **k):
        done = right(self, *a, **k)
        return dataclasses.replace(done, hr=done.hr * np.float32(1.01))

    monkeypatch.setattr(Degradation, "apply", apply)


def elsewhere(monkeypatch):
    right = Work.origins
    monkeypatch.setattr(Work, "origins", lambda self, image: right(self, image) - [1, 0, 0])


@pytest.mark.parametrize("fault", [shifted, brighter, elsewhere])
@pytest.mark.parametrize("side", ["original", "torchio", "monai", "torchio, cropped", "monai, cropped"])
def test_gates_see_what_is_wrong(work, monkeypatch, side, fault):
    needs(side)
    fault(monkeypatch)
    assert not data_sides.gate(side, of_law(work, side)) <= LIMITS[side]


def test_patches_whose_label_or_input_lies_elsewhere_are_refused(work):
    patches = next(next(data_sides.stream("original", of_law(work, "original"))))
    data_sides.check_patches(patches)
    moved = patches.y.clone()
    moved[:, 1] = moved[:, 1].roll(2, dims=-1)
    with pytest.raises(AssertionError, match="label"):
        data_sides.check_patches(Patches(patches.x, moved))
    with pytest.raises(AssertionError, match="input"):
        data_sides.check_patches(Patches(patches.x.flip(2, 3, 4), patches.y))


def test_a_failed_gate_gives_no_times_and_starts_no_process(work, monkeypatch):
    monkeypatch.setattr(data_engine, "run_side", lambda *a: pytest.fail("a process was started"))
    shifted(monkeypatch)
    made = cohort.Cohort(work, 0.8)
    monkeypatch.setattr(made, "made", lambda **changes: dataclasses.replace(work, **changes))
    case = data_engine.EndToEnd("end to end", "segsrgan", {"original": data_engine.EXACT}, made)
    row = case.measure(parse(["data", "--quick"]))
    assert row["passed"] is False and row["max_error"] > row["tolerance"]
    assert not any("second" in key for key in [*row, *row["peers"]["original"]])


# --- sides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side",
    [
        "fastsrgan",
        "original",
        *(f"{peer}{kind}" for peer in ("torchio", "monai") for kind in ("", " of 7 a visit", ", cropped")),
    ],
)
def test_every_side_gives_the_promised_patches(work, side):
    needs(side)
    epochs = data_sides.stream(side, of_law(work, side))
    each = 7 if "visit" in side else work.patches
    if side == "original":  # it drops what does not fill a batch
        each = 2 * work.patches // work.batch * work.batch / 2
    for _ in range(2):
        count = 0
        for patches in next(epochs):
            data_sides.check_patches(patches)
            assert patches.x.dtype == patches.y.dtype == torch.float32
            assert set(patches.y[:, 1].unique().tolist()) <= {0.0, 1.0}
            count += len(patches.x)
        assert count == 2 * each


def test_the_original_writes_all_before_the_first_batch_and_removes_it_afterwards(work, tmp_path, monkeypatch):
    monkeypatch.setattr(peers_data.tempfile, "tempdir", str(tmp_path))
    epoch = next(peers_data.original(of_law(work, "original")))
    watch = FolderWatch([tmp_path])
    next(epoch)
    files = watch.changed()
    batches = 2 * work.patches // work.batch
    assert len(files) == 2 * batches
    values = batches * work.batch * 3 * work.patch**3
    assert 0 <= sum(files.values()) - 8 * values < 300 * len(files)  # float64, and the files' headers
    for _ in epoch:
        pass
    assert not list(tmp_path.iterdir())


def test_the_original_draws_anew_in_each_epoch(work):
    epochs = peers_data.original(of_law(work, "original"))
    first, second = next(next(epochs)).x, next(next(epochs)).x
    assert first.shape == second.shape and not torch.equal(first, second)


@pytest.mark.parametrize("sizes", [(7, 3, 12, 1), (5, 5), (1, 1, 1), (23,), (4, 1, 30)])
def test_batches_keep_every_patch_and_its_order(sizes):
    numbers = torch.arange(float(sum(sizes))).reshape(-1, 1, 1, 1, 1)
    found = list(cohort.batches(((p, p + 100, p % 2) for p in numbers.split(list(sizes))), 5))
    assert all(len(p.x) == 5 for p in found[:-1]) and 1 <= len(found[-1].x) <= 5
    assert torch.equal(torch.cat([p.x for p in found]), numbers)
    assert torch.equal(torch.cat([p.y for p in found]), torch.cat([numbers + 100, numbers % 2], 1))


def test_a_side_writes_nothing_unless_it_does(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_sides.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = data_sides.measure("fastsrgan", work)
    assert done["disk_bytes"] == 0 and not done["files_left"]
    assert done["patches"] == done["cold_patches"] == 2 * work.patches and len(done["seconds"]) == work.epochs
    assert 0 < done["wait"]["share"] < 1
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"look": True}, {"look": False}]
    right = data_sides.fastsrgan

    def leaky(work):
        (tmp_path / "spill").write_bytes(bytes(MIB))
        return right(work)

    monkeypatch.setitem(data_sides.SIDES, "fastsrgan", leaky)
    done = data_sides.measure("fastsrgan", work, memory=False)
    assert done["disk_bytes"] >= MIB and list(done["files_left"].values()) == [MIB]


def test_epochs_are_timed_until_time_is_up(work, monkeypatch):
    """Two at least; then as many as begin in time, up to the number that was asked for."""
    told = {"seconds": 1.0, "patches": 1, "waited": 0.0, "steps": 1}
    monkeypatch.setattr(data_sides, "stream", lambda side, work: itertools.repeat([]))
    monkeypatch.setattr(data_sides, "consume", lambda epoch, work, step=0.0: told)
    monkeypatch.setattr(data_sides, "FolderWatch", lambda folders: SimpleNamespace(changed=dict))
    counts = {
        limit: len(data_sides.measure("fastsrgan", dataclasses.replace(work, epochs=4, limit=limit), False)["seconds"])
        for limit in (0, 2, 1000)
    }
    assert counts == {0: 2, 2: 3, 1000: 4}


def test_ratios_of_epochs_are_of_medians_first_epochs_and_any_two():
    def done(seconds: list[float], cold: float) -> dict:
        told = {"patches": 12, "cold_patches": 12, "cold_seconds": cold, "seconds": seconds, "cpu_seconds": seconds}
        told |= {"wait": {"share": 0.1, "waited": 1, "steps": 3}, "epochs": len(seconds) + 3, "files_left": {}}
        return told | {"disk_bytes": 70, "call_bytes": 0}

    rounds = {"fastsrgan": [done([1.0, 2.0, 3.0], 4.0)], "a": [done([10.0, 20.0], 6.0)]}
    row = data_engine.summary(rounds["fastsrgan"]) | {"peers": {"a": data_engine.summary(rounds["a"])}}
    row |= {key: {} for key in ("ratio_to", "ratio_range", "cpu_ratio_to", "cold_ratio_to")}
    data_engine.compare(row, "a", rounds)
    assert (row["repeats"], row["peers"]["a"]["repeats"]) == (3, 2)
    assert row["ratio_to"]["a"] == pytest.approx(7.5) and row["cold_ratio_to"]["a"] == pytest.approx(1.5)
    assert row["ratio_range"]["a"] == pytest.approx([10 / 3, 20])
    assert row["peers"]["a"]["disk_bytes_per_epoch"] == 14


def test_a_peer_that_is_not_installed_is_not_run(work, monkeypatch):
    find = peers_data.importlib.util.find_spec
    absent = lambda name: None if name in ("torchio", "monai") else find(name)  # noqa: E731
    monkeypatch.setattr(peers_data.importlib.util, "find_spec", absent)
    made = cohort.Cohort(work, 0.8)
    monkeypatch.setattr(made, "made", lambda **changes: dataclasses.replace(work, **changes))
    times = {"patches": 9, "cold_patches": 9, "cold_seconds": 2.0, "seconds": [1.0], "cpu_seconds": [1.0], "epochs": 3}
    times |= {"wait": {"share": 0.1, "waited": 0.1, "steps": 3}, "disk_bytes": 0, "call_bytes": 0, "files_left": {}}
    monkeypatch.setattr(data_engine, "run_side", lambda *a: times)
    case = data_engine.EndToEnd("end to end", "physical", {"torchio": 1.0, "monai": 1.0}, made)
    row = case.measure(parse(["data", "--quick"]))
    assert row["peers"] == {name: {"not_run": f"pip install {name}"} for name in ("torchio", "monai")}
    assert row["ratio_to"] == {} and row["patches_per_second"] == 9 and row["passed"]
    assert len(case.lines(row)) == 1


# --- the command --------------------------------------------------------------------------------------------------


def test_quick_runs_end_to_end(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "without_ratios", lambda row: None)
    small = ["--shape", *map(str, SHAPE), "--patch", "12", "--stride", "6", "--batch", "5", "--epochs", "2"]
    target, picture = tmp_path / "data.json", tmp_path / "data.png"
    told = ["--json", str(target), "--plot", str(picture), "--only", "12^3, segsrgan", "--memory"]
    assert main(["data", "--quick", "--engine", "--threads", "1", *small, *told]) == 0
    report = json.loads(target.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    (row,) = report["rows"]
    original = row["peers"]["original"]
    assert row["disk_bytes_per_epoch"] == row["files_left"] == 0
    assert original["disk_bytes_per_epoch"] >= original["patches_per_epoch"] * 3 * 12**3 * 8
    assert row["repeats"] == original["repeats"] == 2
    assert row["ratio_to"]["original"] == pytest.approx(row["patches_per_second"] / original["patches_per_second"])
    assert all(facts["peak_bytes"] > 0 for facts in (row, original)) and original["differences"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_stages_and_training_rows(work, monkeypatch):
    made = cohort.Cohort(work, 0.8)
    monkeypatch.setattr(made, "made", lambda **changes: dataclasses.replace(work, **changes))
    made.facts = {"seconds_per_volume": 1.0}
    work = dataclasses.replace(work, patch=16)  # the smallest that networks take
    stages, training, shuffle = data_stages.cases(made)
    args = parse(["data", "--quick", "--repeats", "2"])
    row = stages.measure(args)
    assert set(row["stages"]) == set(data_stages.STAGES) and all(s > 0 for s in row["stages"].values())
    assert row["seconds_min"] <= sum(row["stages"].values()) * 1.5 and row["convert"] == made.facts
    assert row["resident_bytes_per_voxel"] == 4 + 4 + 1  # of float32 images and a label without a mask
    row = training.measure(args)
    assert row["updates"] == row["repeats"] == 4
    assert 0 <= row["wait_share"] < 1 and row["first_wait_seconds"] > 0
    assert training.lines(row) and stages.lines(stages.measure(args))
    groups = shuffle.measure(args)["groups"]
    assert groups[1]["distinct"] == 1 and groups[40]["drift"] < groups[8]["drift"] < groups[1]["drift"]


# --- what is told -------------------------------------------------------------------------------------------------


@pytest.fixture
def report() -> dict:
    side = {"cold_patches_per_second": 5.0, "wait_share": 0.25, "patches_per_epoch": 100, "peak_bytes": 10**9}
    side |= {"repeats": 2, "wait_seconds_per_step": 0.025}
    row = {"name": "end to end, x", "geometry": "segsrgan", "batch": 10, "patches": 50, "subjects": 2, "patch": 64}
    row |= {
        "shape": [9, 8, 7],
        "workers": 2,
        "patches_per_second": 200.0,
        "disk_bytes_per_epoch": 0,
        "call_bytes_per_epoch": 0,
        **side,
    }
    row |= {"ratio_to": {"original": 40.0}, "ratio_range": {"original": [30, 50]}, "cpu_ratio_to": {}}
    row["peers"] = {"original": {**side, "patches_per_second": 5.0, "disk_bytes_per_epoch": 6.3e8}}
    convert = {"store_bytes_per_volume": 8e6, "seconds_per_volume": 0.5}
    stages = {"name": "one volume", "patches": 50, "stages": {"read": 0.1, "gather": 0.3}, "convert": convert}
    machine = {"usable_cores": 2, "cpu": "abacus", "load_average": [0.5, 1, 1]}
    settings = {"step_ms": 100}
    told = {"command": ["x"], "device": "cpu", "commit": "c"}
    return {"rows": [row, stages], "settings": settings, "machine": machine, **told}


def test_projection_is_proportional_to_the_measured_volume(report):
    lines = data_page.projection(report, [1, 1000]).splitlines()[2:]
    one, many = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    # 50 patches a volume at 200/s, 5 steps of 0.1 s and 0.025 s waiting, 8 MB a volume and epoch; the original 10 s and
    # 315 MB.
    assert one == ["1", "8 MB", "500 ms", "50", "250 ms", "625 ms", "12.8 MB/s", "10 s", "315 MB"]
    assert many == ["1,000", "8 GB", "8.33 min", "50,000", "4.17 min", "10.4 min", "12.8 MB/s", "2.78 h", "315 GB"]
    report["settings"]["quick"] = True
    with pytest.raises(InputError, match="--quick"):
        data_page.projection(report)


def test_marks_and_waits_are_told_with_what_they_hold_for(report):
    row = report["rows"][0]
    row["name"], row["ratio_range"] = "end to end, x", {"torchio": [10, 20], "torchio, cropped": [10, 20]}
    row["ratio_to"] = {"torchio": 15.0, "torchio, cropped": 12.0}
    row["peers"] = dict.fromkeys(row["ratio_to"], row["peers"]["original"])
    told = data_page.rates(report)
    assert "| torchio † |" in told and "| torchio, cropped |" in told and ".nii.gz" in told
    assert "| 15 x (10 to 20) | 1 x |" in told and "| 200 (n 2) |" in told
    row["repeats"] = 1
    assert "| 15 x | 1 x |" in data_page.rates(report)
    report["rows"].append({"name": "training run, x", "wait_share": 0.001, "seconds_median": 2.5, "peers": {}})
    goals = data_page.goals(report)
    assert "| waiting in a training run on this CPU, steps of 2.5 s | 1 % | 0.1 % | met |" in goals
    assert "| waiting at assumed steps of 100 ms (segsrgan) | 1 % | 25 % | missed by 25 x |" in goals
    assert "* torchio, cropped:" in data_page.differences(report) and "monai" not in data_page.differences(report)


def test_goals_say_by_how_much_they_are_missed(report):
    assert "| original | 100 x | 40 x | missed by 2.5 x |" in data_page.goals(report)
    assert (
        "| bytes written between store and step in an epoch, to pipes and memory too | 0 | 0 B | met |"
        in data_page.goals(report)
    )
    report["rows"][0]["ratio_to"]["original"] = 101.0
    report["rows"][0]["call_bytes_per_epoch"] = 2500
    assert (
        "| bytes written between store and step in an epoch, to pipes and memory too | 0 | 2.5 kB | missed |"
        in data_page.goals(report)
    )
    assert "| original | 100 x | 101 x | met |" in data_page.goals(report)


def test_marked_blocks_are_made_from_the_report_and_nothing_else_is_touched(report):
    text = "a\n<!-- bench:stages -->\nold\n<!-- end -->\nb\n<!-- bench:rates --><!-- end -->\n"
    once = data_page.filled(text, report)
    assert "old" not in once and "| read | 100 ms | 25 % |" in once and once.startswith("a\n") and "\nb\n" in once
    assert data_page.filled(once, report) == once
    changed = copy.deepcopy(report)
    changed["rows"][1]["stages"]["read"] = 0.2
    assert data_page.filled(once, changed) != once


def test_the_page_holds_the_figures_of_the_committed_report():
    page = (ROOT / "docs" / "data-engine.md").read_text(encoding="utf8")
    found = pages.machines(pages.load())
    report = found[summary.chosen(found)]["data"]
    assert data_page.filled(page, report) == page, "python -m bench report"
    assert set(re.findall(r"<!-- bench:(\w+) -->", page)) >= {"rates", "goals", "stages", "projection", "machine"}


def test_picture_needs_end_to_end_rows(report, tmp_path):
    plot(report, tmp_path / "a.svg")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    report["rows"] = report["rows"][1:]
    with pytest.raises(InputError, match="no end-to-end row"):
        plot(report, tmp_path / "b.svg")


def test_project_command_reads_a_report(report, tmp_path, capsys):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(report))
    assert main(["project", "7", "--json", str(path)]) == 0
    told = capsys.readouterr().out
    assert "| 7 | 56 MB |" in told and told.startswith(data_page.machine(report))  # of which machine it is
    for name, text in (("none.json", None), ("other.json", "[]")):
        (tmp_path / name).write_text(text) if text else None
        assert main(["project", "7", "--json", str(tmp_path / name)]) == 3
        assert capsys.readouterr().err.count("holds no report of a benchmark (`python -m bench data") == 1
