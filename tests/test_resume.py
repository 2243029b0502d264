"""A run that was killed or stopped anywhere, and resumed, ends with the bits of one that was not."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import socket
import stat
import time
from pathlib import Path

import pytest
import torch
from cohort import SMALL, losses, make_store, rows
from processes import ended, outcome, start

from fastsrgan.cli.main import main
from fastsrgan.config import TrainConfig
from fastsrgan.core.files import LOCK
from fastsrgan.errors import InputError, ModelError, ResourceError
from fastsrgan.model import checkpoint, weights
from fastsrgan.pictures.planes import find_panels
from fastsrgan.train import loop, snapshots
from fastsrgan.train import run as run_module
from fastsrgan.train.gan import Models
from fastsrgan.train.logs import RunLog
from fastsrgan.train.run import train

# Everything on that has a state or a place: moving average, schedule and warm-up, flips, accumulation, lazy penalty,
# groups of one subject, resolutions that differ by epoch.
EVERYTHING = SMALL.replace(
    new_low_res=((1.0, 1.0, 2.0), (1.0, 1.0, 4.0)),
    epochs=4,
    batch_size=4,
    accumulate=2,
    steps_per_epoch=4,
    resident_subjects=1,
    ema=0.5,
    flips="xyz",
    lr_schedule="cosine",
    lr_end=0.1,
    lr_warmup=4,
    penalty_every=3,
    patience=9,
    best_by="psnr",
    keep_checkpoints=3,
)
log = logging.getLogger(__name__)
LONG = bool(os.environ.get("FASTSRGAN_LONG_TESTS"))
KILLS = 20 if LONG else 3


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes of these tests have: bits are compared, and torch's sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> tuple[Path, float]:
    """The unbroken run, and the seconds that it took."""
    out = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    run_to_the_end(store, out / "run", EVERYTHING, out)
    return out / "run", time.monotonic() - began


def training(store: Path, run: Path, config: TrainConfig) -> int:
    return train(store, run, config, resume=bool(checkpoint.snapshots(run)))["updates"]


def run_to_the_end(store: Path, run: Path, config: TrainConfig, out: Path) -> None:
    process = start(training, store, run, config, out=out / "found.json")
    assert ended(process) == 0, outcome(out / "found.json")


def assert_the_same(run: Path, whole: Path) -> None:
    """Weights, moving average, optimisers, position, tables and log: every bit."""
    assert losses(run) == losses(whole)
    for name in ("dice.csv", "mse.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    panels = [[(epoch, path.read_bytes()) for epoch, path in find_panels(folder)] for folder in (run, whole)]
    assert panels[0] == panels[1] and panels[0]
    states = []
    for folder in (run, whole):
        snapshot = checkpoint.newest(folder)
        states.append(torch.load(snapshot / "state.pt", weights_only=True))
        assert snapshot.name == checkpoint.newest(whole).name
    assert (checkpoint.newest(run) / checkpoint.MODEL).read_bytes() == (
        checkpoint.newest(whole) / checkpoint.MODEL
    ).read_bytes()
    assert_equal_trees(states[0], states[1])


def assert_equal_trees(a, b, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal_trees(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_trees(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.fault(22)
def test_kill_9_at_random_moments_and_resume_gives_the_same_bits(store, whole, tmp_path):
    expected, seconds = whole
    ends = {r["epoch"]: r["update"] for r in rows(expected)}.values()  # the last update of each epoch
    moments, kills = random.Random(), 0
    log.info("an unbroken run takes %.2f s", seconds)
    for attempt in range(2 * KILLS):
        run = tmp_path / f"run-{attempt}"
        # Killed up to three times in one run, at any moment from its first import to its last file.
        for _ in range(3):
            process = start(training, store, run, EVERYTHING, out=tmp_path / "found.json")
            moment, began = moments.uniform(0, seconds), time.monotonic()
            process.join(moment)
            if not process.is_alive():
                seconds = min(seconds, time.monotonic() - began)  # the machine has less else to do than it had
                break
            process.kill()
            process.join()
            kills += 1
            reached = max([r["update"] for r in rows(run)], default=0) if (run / "log.jsonl").exists() else 0
            found = checkpoint.snapshots(run)
            assert not any(checkpoint.verify(s) for s in found)
            kept = int(found[-1].name[5:]) if found else 0
            # An epoch ends with a snapshot, which is there before the next update is logged.
            assert kept >= max((e for e in ends if e < reached), default=0), "more was lost than since the snapshot"
            log.info("kill %d after %.2f s at update %d: snapshot of update %d", kills, moment, reached, kept)
            if kills >= KILLS:
                break
        run_to_the_end(store, run, EVERYTHING, tmp_path)
        assert_the_same(run, expected)
        shutil.rmtree(run)
        if kills >= KILLS:
            return
    raise AssertionError(f"only {kills} of {KILLS} kills hit a living process")


@pytest.mark.fault(37)
@pytest.mark.parametrize(("number", "stop_at"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 6)])
def test_a_signal_in_mid_epoch_leaves_a_snapshot_that_goes_on(store, whole, tmp_path, monkeypatch, stop_at, number):
    count, original = iter(range(1, 1000)), Models.generator_update

    def counted(self, *args):
        values = original(self, *args)
        if next(count) == stop_at:
            signal.raise_signal(number)
        return values

    monkeypatch.setattr(Models, "generator_update", counted)
    result = train(store, tmp_path / "run", EVERYTHING)
    assert result["exit_code"] == 143 and result["updates"] == stop_at == len(rows(tmp_path / "run"))
    assert result["weights"] is None if stop_at == 1 else Path(result["weights"]).exists()
    monkeypatch.undo()
    tell, shares = loop.tell, []
    monkeypatch.setattr(loop, "tell", lambda run, *row: [tell(run, *row), shares.append((run.began_at, row[-1].done))])
    train(store, tmp_path / "run", EVERYTHING, resume=True)
    assert_the_same(tmp_path / "run", whole[0])
    # The time that is left is told by what this call has done: its first update is as large a part as its second.
    (began, first), (_, second), *_ = shares
    assert first - began == pytest.approx(second - first, rel=1e-12)  # found: 0


def die_at(event: int) -> None:
    """End this process as by SIGKILL at its ``event``-th look at the disk from now on."""
    count = iter(range(1, 10_000))

    def dying(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            if next(count) == event:
                if name == "fsync" and not stat.S_ISDIR(os.fstat(args[0]).st_mode):
                    # The disk does not have all of it yet.
                    os.truncate(f"/proc/self/fd/{args[0]}", os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, call)

    for module, name in ((os, "fsync"), (os, "replace"), (os, "open"), (checkpoint, "sha256"), (shutil, "rmtree")):
        dying(module, name)


def write_snapshot(run: Path, step: int) -> None:
    data = {name: (lambda p, n=name: p.write_bytes(n.encode() * 9999 * step)) for name in ("a.bin", "b.bin")}
    checkpoint.write(run, step, data, {})
    checkpoint.prune(run, 2)


def killed_writers(folder: Path) -> list[tuple[int, int]]:
    """(signal that ended the writer of snapshot 3, step of the newest snapshot then), until one is not killed."""
    found: list[tuple[int, int]] = []
    while not found or found[-1][0]:
        run = folder / str(len(found))
        for step in (1, 2):
            write_snapshot(run, step)
        child = os.fork()
        if not child:
            die_at(len(found) + 1)
            write_snapshot(run, 3)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        newest = checkpoint.newest(run)
        assert not checkpoint.verify(newest)
        found.append((status, int(newest.name[5:])))
    return found


@pytest.mark.fault(21)
def test_killed_at_every_moment_of_writing_a_snapshot_the_one_before_stays(tmp_path):
    assert ended(start(killed_writers, tmp_path, out=tmp_path / "found.json")) == 0, outcome(tmp_path / "found.json")
    *killed, last = outcome(tmp_path / "found.json")["value"]
    assert last == [0, 3] and all(status == signal.SIGKILL for status, _ in killed)
    newest = [step for _, step in killed]
    assert newest == sorted(newest) and newest.count(2) >= 6 and newest.count(3) >= 1  # both sides of the rename


def test_the_last_line_tells_the_updates_of_its_own_seconds(store, tmp_path, capsys):
    words = ["train", str(store), "-o", str(tmp_path / "run"), "-n", "1", "1", "3", "-ps", "16", "-b", "2", "--quiet"]
    words += ["--kernel-gen", "2", "--lambda-adv", "0", "--steps-per-epoch", "1", "--layer-forms", "fixed"]
    assert main([*words, "-e", "1"]) == 0 and "\n1 update in " in "\n" + capsys.readouterr().out
    assert main([*words, "-e", "3", "--resume"]) == 0 and "\n2 of 3 updates in " in "\n" + capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf8"))["resumed_at"] == 1
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main([*(w for w in words if w != "--quiet"), "-e", "1", "-b", "1", "--resume"]) == 0
    err = capsys.readouterr().err
    assert "past epoch 1, the last: nothing is left to do" in err and "begins anew" not in err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_folder_without_a_run_is_told_so_also_without_a_low_resolution(store, tmp_path, capsys):
    assert main(["train", str(store), "-o", str(tmp_path / "new"), "--resume", "--quiet"]) == 4
    assert "no snapshot in this folder (leave --resume out to begin a run)" in capsys.readouterr().err


@pytest.mark.fault(23)
def test_a_damaged_newest_snapshot_falls_back_to_the_one_before(store, whole, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    last = checkpoint.snapshots(run)[-1]
    data = bytearray((last / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (last / "state.pt").write_bytes(bytes(data))
    train(store, run, EVERYTHING, resume=True)
    assert "taking the snapshot before it" in caplog.text
    assert_the_same(run, whole[0])


def test_other_settings_or_data_are_said_and_the_epoch_begins_anew(store, whole, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    changed = EVERYTHING.replace(epochs=5, batch_size=2, accumulate=1, lr_gen=1e-5, best_by="dice")
    result = train(store, run, changed, resume=True)
    assert result["epochs"] == 5 and result["best"] <= 1  # a Dice is not compared with a PSNR
    assert "batch_size 4 -> 2" in caplog.text and "lr_gen 0.0001 -> 1e-05" in caplog.text
    assert "another batch_size: epoch 5 begins anew" in caplog.text
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf8").splitlines()]
    (row,) = [row for row in lines if "changed" in row]
    updates = [line["update"] for line in lines[: lines.index(row)] if "update" in line]
    assert row["epoch"] == 5 and row["behind_update"] == updates[-1] < result["updates"]
    assert row["changed"]["batch_size"] == [4, 2] and row["changed"]["lr_gen"] == [1e-4, 1e-5]
    other = make_store(tmp_path, train=3)
    caplog.clear()
    train(other, run, changed.replace(epochs=6), resume=True)
    assert "another data: epoch 6 begins anew" in caplog.text
    assert "goes on with the new ones: epochs 5 -> 6\n" in caplog.text  # which the cosine follows; nothing else differs


def test_the_log_says_once_what_a_resume_from_one_snapshot_changed(store, tmp_path):
    """Also where a call before it changed more and ended before its first snapshot; and config.yaml keeps what acts
    only where a run begins."""
    small = SMALL.replace(epochs=1, steps_per_epoch=1, critic_iterations=1)
    run = tmp_path / "run"
    train(store, run, small)
    run_log = RunLog(run)
    run_log.changed(2, 1, {"lr_gen": [1e-4, 1.0], "lr_dis": [1e-4, 1.0]})
    later = small.replace(epochs=2, lr_gen=1e-5)
    train(store, run, later, resume=True)
    train(store, run, later.replace(epochs=3, init_epoch=2), resume=True)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf8").splitlines()]
    told = [(row["behind_update"], row["changed"]) for row in rows if "changed" in row]
    assert told == [(1, {"lr_gen": [1e-4, 1e-5]})]
    assert "init_epoch: 1\n" in (run / "config.yaml").read_text(encoding="utf8")


def test_a_critic_that_does_not_fit_the_patches_is_refused_before_the_first_step(store, tmp_path):
    """Its layers follow from the patch: 20 voxels take one more than 16; 20 and 24 take the same."""
    small = SMALL.replace(epochs=1, steps_per_epoch=1, critic_iterations=1)
    run = tmp_path / "run"
    train(store, run, small)
    before = (run / "log.jsonl").read_bytes()
    for changes in ({"patch_size": 20}, {"kernel_dis": 3}):
        with pytest.raises(
            ModelError, match=r"kernel 2 for patch 16, .*--patch-size 16 --kernel-dis 2, or .* -w .*run\)"
        ):
            train(store, run, small.replace(epochs=2, **changes), resume=True)
    told = r"its network has other settings: kernel_gen 2, not 4, residual True, not False \(give the same kernel_gen"
    with pytest.raises(ModelError, match=told):
        train(store, run, small.replace(epochs=2, kernel_gen=4, residual=False), resume=True)
    assert (run / "log.jsonl").read_bytes() == before and len(checkpoint.snapshots(run)) == 1
    train(store, tmp_path / "other", small.replace(patch_size=20))
    larger = small.replace(epochs=2, patch_size=24)
    assert train(store, tmp_path / "other", larger, resume=True)["updates"] == 2
    assert weights.read_spec(checkpoint.newest(tmp_path / "other"))[1].patch == 24


@pytest.mark.fault(29)
def test_a_start_without_a_patch_leaves_no_run_and_what_was_left_out_is_tried_again(store, tmp_path, monkeypatch):
    small, run, away = SMALL.replace(steps_per_epoch=1, critic_iterations=1), tmp_path / "run", tmp_path / "away"
    copy = tmp_path / "cohort.zarr"
    shutil.copytree(store, copy)
    away.mkdir()
    shards = [copy / f"sub-{i}" / "image" / "c" for i in range(2)]
    for i, shard in enumerate(shards):
        shutil.move(shard, away / str(i))
    for _ in range(2):
        with pytest.raises(InputError, match="none of its 2 Train subjects gave a patch"):
            train(copy, run, small)
    assert {p.name for p in run.iterdir()} == {"config.yaml", "data.json"}
    # A stop before the first update does leave a snapshot, from which all subjects are tried again, in both epochs.
    monkeypatch.setattr(loop, "stopped", lambda run, stop: run.position.epoch == 2)
    train(copy, run, small)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.snapshots(run)] == ["step-00000000"]
    for i, shard in enumerate(shards):
        shutil.move(away / str(i), shard)
    done = train(copy, run, small, resume=True)
    assert done["updates"] == 2 and not done["left_out"]


def test_a_damaged_table_of_epochs_is_made_anew(store, tmp_path, caplog):
    small = SMALL.replace(epochs=1, steps_per_epoch=1, critic_iterations=1)
    run = tmp_path / "run"
    train(store, run, small)
    (run / "dice.csv").write_bytes(bytes(range(256)))
    (run / "mse.csv").write_text(
        ",MSE\n²,1\n" + "9" * 5000 + ",1\n1,0.5\n", encoding="utf8"
    )  # digits that are no epoch
    train(store, run, small.replace(epochs=2), resume=True)
    assert caplog.text.count("dice.csv is damaged and is made anew; log.jsonl has") == 1
    indices = [[line.split(",")[0] for line in (run / n).read_text().splitlines()] for n in ("dice.csv", "mse.csv")]
    assert indices == [["", "2"], ["", "1", "2"]] and len(rows(run, "validation")) == 2


@pytest.mark.fault(37)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_loop_ends_a_training_with_143_and_without_its_lock(
    store, tmp_path, monkeypatch, capsys, number
):
    """SIGUSR1 killed it with 138, as no one looked after it, and its lock stayed."""
    before, run, locked = signal.getsignal(number), tmp_path / "run", []

    def prepare(*_: object) -> None:
        locked.append((run / LOCK).exists())
        signal.raise_signal(number)

    monkeypatch.setattr(run_module, "prepare", prepare)
    signal.signal(number, lambda *_: pytest.fail("the command does not look after it"))
    try:
        code = main(["--quiet", "train", str(store), "-o", str(run), "-n", "1", "1", "3", "--device", "cpu"])
    finally:
        signal.signal(number, before)
    assert (code, capsys.readouterr().err) == (143, f"error: stopped: by {number.name}\n")
    assert locked == [True] and not (run / LOCK).exists() and not (run / "summary.json").exists()


@pytest.mark.fault(27)
def test_one_training_at_a_time_writes_to_a_run_folder(store, tmp_path, monkeypatch, caplog):
    small, run = SMALL.replace(epochs=1, steps_per_epoch=2, critic_iterations=1), tmp_path / "run::1"
    original, refused = Models.generator_update, []

    def tried(self, *args):
        with pytest.raises(ResourceError) as caught:
            train(store, run, small, resume=True)
        refused.append(str(caught.value))
        signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(Models, "generator_update", tried)
    assert train(store, run, small)["exit_code"] == 143 and not (run / LOCK).exists()
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert refused == [f"{run}: is being written by {holder} (wait until it ends)"]
    monkeypatch.undo()
    (run / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere"}), encoding="utf8")
    with pytest.raises(ResourceError, match=r"locked by process 1 on elsewhere \(if that run is over, delete .*lock\)"):
        train(store, run, small, resume=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the same job on another machine, after its first one failed
    assert train(store, run, small, resume=True)["updates"] == 2
    assert "did not end properly, its lock is taken over" in caplog.text and not (run / LOCK).exists()


@pytest.mark.fault(22)
def test_a_run_killed_before_its_first_snapshot_starts_again_under_resume(store, tmp_path, monkeypatch, caplog):
    small, run = SMALL.replace(epochs=1, steps_per_epoch=1, critic_iterations=1), tmp_path / "run"
    with pytest.raises(ModelError, match=r"no snapshot in this folder \(leave --resume out to begin a run\)"):
        train(store, run, small, resume=True)
    monkeypatch.setattr(loop, "save", lambda run: pytest.fail("killed"))
    monkeypatch.setattr(loop, "write_weights", lambda *given: None)
    with pytest.raises(pytest.fail.Exception):
        train(store, run, small)
    monkeypatch.undo()
    (run / checkpoint.FOLDER).mkdir()
    assert train(store, run, small, resume=True)["updates"] == 1 == len(rows(run))
    assert caplog.text.count("no snapshot yet, the run starts from the beginning with new weights") == 1
    shutil.rmtree(run / checkpoint.FOLDER)
    weights_before = (run / checkpoint.MODEL).read_bytes()
    with pytest.raises(
        ModelError, match=r"only weights \(leave --resume out .* replaces them, .*-w .*model.safetensors"
    ):
        train(store, run, small, resume=True)
    assert (run / checkpoint.MODEL).read_bytes() == weights_before


def test_a_resumed_run_keeps_the_precision_and_the_layer_forms_of_its_snapshot(store, tmp_path, caplog, monkeypatch):
    run, auto = tmp_path / "run", SMALL.replace(precision="auto", epochs=1)
    train(store, run, auto.replace(precision="bf16", layer_forms="measured"))
    path = checkpoint.newest(run) / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    assert manifest["arithmetic"] == {"precision": "bf16", "layer_forms": {"mode": "measured", "forms": {}}}
    manifest["arithmetic"]["layer_forms"]["forms"] = {"conv3 training 64>64 16x16x16": "winograd"}
    path.write_text(json.dumps(manifest))  # as on a machine where this was timed
    with caplog.at_level(logging.INFO, "fastsrgan"):
        train(store, run, auto.replace(epochs=2), resume=True)
    assert "going on in bf16, layer forms measured, 1 of them as in the snapshot" in caplog.text
    assert "settings differ" not in caplog.text
    assert checkpoint.manifest(checkpoint.newest(run))["arithmetic"] == manifest["arithmetic"]
    caplog.clear()
    with caplog.at_level(logging.INFO, "fastsrgan"):
        train(store, run, auto.replace(epochs=3, precision="fp32", layer_forms="fixed"), resume=True)
    assert "settings differ" in caplog.text, "what is asked for wins, and that is said"
    found = checkpoint.manifest(checkpoint.newest(run))["arithmetic"]
    assert found == {"precision": "fp32", "layer_forms": {"mode": "fixed", "forms": {}}}


def test_a_snapshot_that_records_no_arithmetic_goes_on_in_the_fixed_forms(store, tmp_path, monkeypatch):
    run, auto = tmp_path / "run", SMALL.replace(precision="auto", epochs=1)
    train(store, run, auto)
    path = checkpoint.newest(run) / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    for damage in ({}, {"arithmetic": 3}, {"arithmetic": {"precision": "int4", "layer_forms": []}}):
        del manifest["arithmetic"]
        path.write_text(json.dumps({**manifest, **damage}))
        manifest["arithmetic"] = None
        assert snapshots.kept_arithmetic(run) == (None, "fixed", {})
    monkeypatch.setenv("FASTSRGAN_FORMS", "measured")
    train(store, run, auto.replace(epochs=2), resume=True)
    found = checkpoint.manifest(checkpoint.newest(run))["arithmetic"]
    assert found == {"precision": "fp32", "layer_forms": {"mode": "fixed", "forms": {}}}
