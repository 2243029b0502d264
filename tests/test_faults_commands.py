"""Faults around the commands: what is there already, full disks, damaged stores, files of strangers.

Each command ends with its documented code and one line, and leaves nothing half-written.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from commands import SETTINGS, TILES, call, command, litter, make_work, one_line
from damage import Canary, flip, keras_with, strange_state
from nifti_files import HEAD, rigid, write
from processes import CONTEXT, Flag

from fastsrgan.core.files import FolderLock
from fastsrgan.errors import FastsrganError
from fastsrgan.infer import image
from fastsrgan.infer.bids import infer_bids
from fastsrgan.infer.files import infer_files
from fastsrgan.model import checkpoint, weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.store.files import MANIFEST, Keys, read_manifest, write_manifest
from fastsrgan.store.reader import open_store
from fastsrgan.store.remote import fingerprint
from fastsrgan.store.writer import create_store
from fastsrgan.study import run as study
from fastsrgan.train.run import train


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("work"))


# --- batches, and what is there already ---------------------------------------------------------------------------


@pytest.mark.fault(15)
def test_one_bad_image_costs_only_itself_and_the_summary_says_so(work, tmp_path, capsys):
    scans = [tmp_path / f"s{i}.nii.gz" for i in range(3)]
    for i, scan in enumerate(scans):
        shutil.copyfile(work / f"scan{i}.nii.gz", scan)
    scans[1].write_bytes(scans[1].read_bytes()[:-30])
    code, out, told = call(capsys, "infer", *scans, "-o", tmp_path / "out", "-w", work / "w.safetensors", *TILES)
    assert code == 6 and told.splitlines()[-1].startswith("error: ") and "1 of 3 volumes failed: s1" in told
    assert [line.split()[0] for line in out.splitlines()] == ["done", "failed", "done"]
    summary = json.loads((tmp_path / "out" / "infer_summary.json").read_text(encoding="utf8"))
    assert [item["status"] for item in summary["items"]] == ["done", "failed", "done"]
    assert "truncated" in summary["items"][1]["error"] and summary["items"][1]["exit_code"] == 3
    assert not list((tmp_path / "out").glob("s1*")) and (tmp_path / "out" / "s2_seg.nii.gz").exists()


@pytest.mark.fault(15)
@pytest.mark.parametrize("command", ["infer", "job-model", "evaluate", "convert", "study"])
def test_a_batch_of_which_nothing_is_done_ends_as_its_first_item_would_alone(work, tmp_path, capsys, command):
    """`infer` and `job-model` ended with 6, the others are done, where none was; the others with 3."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.nii.gz").write_bytes((work / "scan0.nii.gz").read_bytes()[:-30])
    one, two = ([str(tmp_path / f"{name}.nii.gz") for name in names] for names in ("a", "ab"))
    table = tmp_path / "t.csv"

    def words(images: list[str]) -> tuple[object, ...]:
        head = {"evaluate": "SR_image,HR_image\n", "job-model": ""}.get(command, "HR_image,Label_image,Base\n")
        row = {"evaluate": "{0},{0}\n", "job-model": "{0}\n"}.get(command, "{0},{1},Test\n")
        label = tmp_path / "label.nii.gz"
        write(label, np.ones(HEAD.shape, np.uint8), rigid((1.0, 1, 3)))
        table.write_text(head + "".join(row.format(i, label) for i in images), encoding="utf8")
        weights = work / "w.safetensors"
        return {
            "infer": ("infer", *images, "-o", tmp_path / "out", "-w", weights, *TILES),
            "job-model": ("job-model", "-p", table, "-rf", "x", "-wp", weights),
            "evaluate": ("evaluate", "--table", table),
            "convert": ("convert", table, tmp_path / "s.zarr"),
            "study": ("study", "steps", table, "-w", weights, "-o", tmp_path / "study", "--patch", 16, "--steps", 16),
        }[command]

    assert call(capsys, *words(one))[0] == call(capsys, *words(two))[0] == 3


@pytest.mark.fault(15, 26)
def test_a_batch_that_was_made_otherwise_ends_with_2_and_one_that_goes_on_with_6(work, tmp_path, capsys):
    scans = [work / "scan0.nii.gz", work / "scan1.nii.gz"]
    words = ("infer", *scans, "-o", tmp_path, "-w", work / "w.safetensors", *TILES)
    assert call(capsys, *words)[0] == 0
    code, _, told = call(capsys, *words, "--resume", "--threshold", 0.3)
    assert code == 2 and told.count("was made with another threshold") == 2
    (tmp_path / "scan1.json").unlink()
    code, out, _ = call(capsys, words[0], *scans, tmp_path / "none.nii.gz", *words[3:], "--resume")
    assert code == 6 and [line.split()[0] for line in out.splitlines()] == ["skipped", "done", "failed"]
    (tmp_path / "scan1.json").unlink()
    words = ("infer", scans[0], tmp_path / "none.nii.gz", "-o", tmp_path, "-w", work / "w.safetensors", *TILES)
    code, out, _ = call(capsys, *words, "--resume")  # what was done before is done
    assert code == 6 and [line.split()[0] for line in out.splitlines()] == ["skipped", "failed"]


@pytest.mark.fault(22)
@pytest.mark.parametrize("kind", ["sr", "seg"])
def test_a_result_that_was_cut_off_later_is_made_anew_by_resume(work, tmp_path, capsys, kind):
    """Three bytes, left of a result by a copy that broke off, were taken for finished."""
    words = ("infer", work / "scan0.nii.gz", "-o", tmp_path, "-w", work / "w.safetensors", *TILES, "--resume")
    assert call(capsys, *words)[0] == 0
    target = tmp_path / f"scan0_{kind}.nii.gz"
    good = target.read_bytes()
    target.write_bytes(good[:-3])
    code, out, _ = call(capsys, *words)
    assert code == 0 and out.startswith("done") and target.read_bytes() == good
    assert call(capsys, *words)[1].startswith("skipped")


@pytest.mark.fault(26)
def test_what_another_call_wrote_meanwhile_is_kept(work, tmp_path, capsys, monkeypatch):
    """Of two calls into one folder the later one wrote over the results of the first, unasked: where the file system
    knows no locks, too."""
    monkeypatch.setattr("fastsrgan.core.files._flock", lambda descriptor: True)
    words = ("infer", work / "scan0.nii.gz", "-o", tmp_path / "out", "-w", work / "w.safetensors", *TILES)
    compute, before = image.process, {}

    def beside(*args, **more):
        monkeypatch.setattr(image, "process", compute)
        code, _, told = call(capsys, *words, "--threshold", 0.3)
        assert code == 0, told
        before.update({path: path.read_bytes() for path in (tmp_path / "out").iterdir()})
        return compute(*args, **more)

    monkeypatch.setattr(image, "process", beside)
    code, _, told = call(capsys, *words)
    assert code == 2 and len(before) == 3
    assert "scan0.json: was written by another call meanwhile and is kept" in told.splitlines()[-1]
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert call(capsys, *words, "--overwrite")[0] == 0


@pytest.mark.fault(26)
def test_what_is_there_is_kept_unless_told(work, tmp_path, capsys):
    words = ("infer", work / "scan0.nii.gz", "-o", tmp_path / "out", "-w", work / "w.safetensors", *TILES)
    assert call(capsys, *words)[0] == 0
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()}
    code, _, told = call(capsys, *words)
    assert code == 2
    one_line(told, "exists already and is kept", "--overwrite, --resume")
    code, out, _ = call(capsys, *words, "--resume")
    assert code == 0 and out.startswith("skipped")
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()}
    assert call(capsys, *words, "--overwrite")[0] == 0
    code, _, told = call(capsys, "convert", work / "cohort.csv", work / "cohort.zarr")
    assert code == 2
    one_line(told, "--resume goes on with it, --overwrite begins anew")


@pytest.mark.fault(25)
def test_folders_that_cannot_be_written_are_said_before_any_work(work, tmp_path, capsys):
    """A file stands in place of the folder, which also stops root."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf8")
    model = work / "w.safetensors"
    commands = (
        ("infer", work / "scan0.nii.gz", "-o", blocked, "-w", model),
        ("infer", work / "scan0.nii.gz", "-o", blocked / "below", "-w", model),
        ("convert", work / "cohort.csv", blocked),
        ("convert", work / "cohort.csv", blocked / "store.zarr"),
        ("train", work / "cohort.zarr", "-o", blocked, "--config", work / "c.yaml"),
        ("weights", "export", model, blocked / "w.h5"),
        ("demo", "-o", blocked),
    )
    for words in commands:
        code, out, told = call(capsys, *words)
        assert code in (2, 5) and not out, (words, told)
        one_line(told, str(blocked))
    assert blocked.read_text(encoding="utf8") == "in the way"


@pytest.mark.fault(25)
@pytest.mark.parametrize("command_line", ["settings", "weights", "folder", "table", "label", "original"])
def test_a_refused_command_leaves_none_of_the_folders_that_it_made(work, tmp_path, capsys, command_line):
    broken = tmp_path / "nan.safetensors"
    network = build_generator(GeneratorSpec(kernel=1)).eval()
    network.head.data[...] = np.nan
    weights.save_generator(broken, network)
    (tmp_path / "empty").mkdir()
    (tmp_path / "stays").mkdir()
    out = tmp_path / "stays" / "new" / "deep"
    train = ("train", work / "cohort.zarr", "--config", work / "c.yaml")
    beside = ("-sf", tmp_path / "sf" / "a", "-dice", tmp_path / "dice" / "d.csv", "-mse", tmp_path / "mse" / "m.csv")
    words = {
        "settings": (*train, "-o", out, "--fit-mask", "True", "--synthetic", "0"),
        "weights": (*train, "-o", out, "-w", broken),
        "folder": ("infer", tmp_path / "empty", "-o", out),
        "table": ("study", "steps", tmp_path / "none.csv", "-o", out),
        "label": ("convert", work / "cohort.csv", out, "--label", "cortex"),
        "original": (*train, "-o", out, "-n", "0.1", "1", "3", *beside),
    }[command_line]
    before = sorted(tmp_path.rglob("*"))
    code, _, told = call(capsys, *words)
    assert code in (3, 4) and told.splitlines()[-1].startswith("error: "), told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.fault(25)
@pytest.mark.parametrize("called", ["train", "weights", "taken", "bids", "study"])
def test_a_call_from_python_that_is_refused_leaves_no_folder_either(work, tmp_path, called):
    """A place that was there stays, as do folders that hold something."""
    out, beside = tmp_path / "new" / "deep", tmp_path / "sf" / "a"
    scans, raw = tmp_path / "scans" / "below", tmp_path / "raw" / "sub-01" / "anat"
    for folder, name in ((scans, "s.nii.gz"), (raw, "sub-01_T1w.nii.gz")):
        folder.mkdir(parents=True)
        shutil.copyfile(work / "scan0.nii.gz", folder / name)
    (tmp_path / "raw" / "dataset_description.json").write_text('{"Name": "n", "BIDSVersion": "1.8.0"}')
    shutil.copyfile(work / "scan0.nii.gz", tmp_path / "scans" / "t.nii.gz")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "t_sr.nii.gz").write_bytes(b"an older result")
    config = SETTINGS.replace(fit_mask=True)
    tables = {"snapshot_folder": beside, "dice_file": tmp_path / "dice" / "d.csv", "mse_file": tmp_path / "m" / "m.csv"}
    call_ = {
        "train": lambda: train(work / "cohort.zarr", out, config, device="cpu", **tables),
        "weights": lambda: infer_files(tmp_path / "scans", out, tmp_path / "none.safetensors"),
        "taken": lambda: infer_files(tmp_path / "scans", tmp_path / "kept", work / "w.safetensors"),
        "bids": lambda: infer_bids(tmp_path / "raw", out, tmp_path / "none.safetensors"),
        "study": lambda: study.run("steps", tmp_path / "none.csv", out, [work / "w.safetensors"]),
    }[called]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FastsrganError):
        call_()
    assert sorted(tmp_path.rglob("*")) == before


# --- full disks ---------------------------------------------------------------------------------------------------


@pytest.mark.fault(24)
def test_a_disk_that_fills_up_ends_inference_and_the_old_result_stays(work, tmp_path):
    """The system refuses files beyond a size, as a full disk does in the middle of one."""
    large = write(tmp_path / "large.nii.gz", np.random.default_rng(0).random((40, 40, 9)).astype(np.float32), rigid())
    words = ("infer", large, "-o", tmp_path / "out", "-w", work / "w.safetensors", "--patch", "16", "--step", "16")
    out = tmp_path / "out"
    out.mkdir()
    (out / "large_sr.nii.gz").write_bytes(b"an older result")
    found = command(tmp_path / "told", *words, "--overwrite", limits={"RLIMIT_FSIZE": 20_000})
    assert found.code == 5, found
    one_line(found.errors[-1] + "\n", "larger than the limit on the size of a file", "ulimit -f")
    assert (out / "large_sr.nii.gz").read_bytes() == b"an older result" and not litter(out)


@pytest.mark.fault(24)
def test_a_disk_that_fills_up_ends_a_conversion_and_what_is_listed_is_whole(work, tmp_path):
    store = tmp_path / "s.zarr"
    found = command(tmp_path / "told", "convert", work / "cohort.csv", store, limits={"RLIMIT_FSIZE": 5000})
    assert found.code == 5 and "limit on the size of a file" in found.errors[-1], found
    assert not litter(store) and not (store / ".fastsrgan.lock").exists()
    if (store / MANIFEST).exists():
        assert open_store(store).verify() == []


@pytest.mark.fault(24)
def test_a_disk_that_fills_up_ends_training_and_the_last_snapshot_stays(work, tmp_path):
    words = ("train", work / "cohort.zarr", "-o", tmp_path / "run", "--config", work / "c.yaml")
    assert command(tmp_path / "first", *words).code == 0
    before = checkpoint.newest(tmp_path / "run")
    found = command(tmp_path / "told", *words, "--resume", "--epoch", 2, limits={"RLIMIT_FSIZE": 30_000})
    assert found.code == 5 and "limit on the size of a file" in found.errors[-1], found
    assert checkpoint.newest(tmp_path / "run") == before and not litter(tmp_path / "run")
    assert command(tmp_path / "again", *words, "--resume", "--epoch", 2).code == 0


# --- stores -------------------------------------------------------------------------------------------------------


def _convert_slowly(store: Path, held, let_go) -> None:
    with create_store(store, resume=True):
        held.set()
        let_go.wait()


@pytest.mark.fault(27)
def test_a_second_conversion_says_who_writes_and_a_dead_ones_lock_is_no_obstacle(work, tmp_path, capsys):
    store = tmp_path / "s.zarr"
    held, let_go = Flag(), Flag()
    process = CONTEXT.Process(target=_convert_slowly, args=(store, held, let_go))
    process.start()
    assert held.wait()
    words = ("convert", work / "cohort.csv", store)
    code, _, told = call(capsys, *words)
    assert code == 5
    one_line(told, f"is being written by process {process.pid}", "wait until it ends")
    process.kill()
    process.join()
    assert call(capsys, *words)[0] == 0 and open_store(store).complete


@pytest.mark.fault(27)
def test_a_training_on_a_table_says_who_writes_its_store_and_goes_on_after_a_kill(work, tmp_path, capsys):
    """It said that no store was there, of one that is being begun, and of one that a kill had left without its
    manifest, which no second call could mend."""
    run = tmp_path / "run"
    words = ("train", work / "cohort.csv", "-o", run, "--config", work / "c.yaml")
    (run / "data.zarr").mkdir(parents=True)
    lock = FolderLock(run / "data.zarr")
    code, _, told = call(capsys, *words)
    assert code == 5
    one_line(told, f"data.zarr: is being written by process {os.getpid()}", "wait until it ends")
    lock.release()
    assert (run / "data.zarr").is_dir() and call(capsys, *words)[0] == 0
    assert open_store(run / "data.zarr").complete


@pytest.mark.fault(29, 30)
def test_verify_lists_every_damaged_and_missing_chunk(work, tmp_path, capsys):
    store = tmp_path / "s.zarr"
    shutil.copytree(work / "cohort.zarr", store)
    shard = store / "sub-0/image/c/0/0/0"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 3] ^= 1
    shard.write_bytes(raw)
    (store / "sub-1/label/c/0/0/0").unlink()
    code, out, _ = call(capsys, "verify", store)
    assert code == 3 and "2 problems" in out
    assert "sub-0/image: chunk (0, 0, 0)" in out and "sub-1/label/c/0/0/0: missing" in out
    words = ("train", store, "-o", tmp_path / "run", "--config", work / "c.yaml", "--strict")
    code, _, told = call(capsys, *words)
    assert code == 3 and "sub-" in told and "convert --resume" in told
    code, _, told = call(capsys, "convert", work / "cohort.csv", store, "--resume")
    assert code == 0 and call(capsys, "verify", store)[0] == 0


@pytest.mark.fault(23)
def test_verify_names_snapshots_that_lost_their_manifest_and_runs_without_snapshots(tmp_path, capsys):
    run = tmp_path / "run"
    checkpoint.write(run, 1, {"a": lambda path: path.write_bytes(b"1")}, {})
    lost = checkpoint.write(run, 2, {"a": lambda path: path.write_bytes(b"2")}, {}) / checkpoint.MANIFEST
    (run / "config.yaml").write_text("epochs: 2\n", encoding="utf8")
    assert call(capsys, "verify", run)[0] == 0
    lost.unlink()
    code, out, _ = call(capsys, "verify", run)
    assert code == 3 and "2 snapshots, 1 problem\n" in out and f"{lost}: cannot be read" in out
    shutil.rmtree(run / checkpoint.FOLDER)
    code, out, _ = call(capsys, "verify", run)
    assert code == 3 and "a run without snapshots" in out and "0 snapshots, 1 problem\n" in out


@pytest.mark.fault(16)
@pytest.mark.parametrize("at", [-5, 700])
def test_a_changed_byte_in_weights_is_named_by_verify_and_refused(work, tmp_path, capsys, at):
    run, best = tmp_path / "run", tmp_path / "run" / "best.safetensors"
    checkpoint.write(run, 1, {"a": lambda path: path.write_bytes(b"1")}, {})
    network = build_generator(GeneratorSpec(kernel=1), seed=1).eval()
    weights.save_generator(best, network, card={"data": "x" * 900, "sum": "0" * 64})
    assert call(capsys, "verify", run)[0] == 0
    weights.load_generator(best)
    flip(best, at)  # in a weight, which stays a number, and in the card
    code, out, _ = call(capsys, "verify", run)
    assert code == 3 and "1 problem\n" in out and f"{best}: differs from the SHA-256" in out
    code, _, told = call(capsys, "infer", work / "scan0.nii.gz", "-o", tmp_path / "out", "-w", best, *TILES)
    assert code == 4
    one_line(told, str(best), "differs from the SHA-256 that was written into it")


@pytest.mark.fault(29)
def test_verify_names_arrays_that_are_not_what_the_manifest_says_though_their_sums_are(work, tmp_path, capsys):
    store = tmp_path / "s.zarr"
    shutil.copytree(work / "cohort.zarr", store)
    keys = Keys(store, read_only=False)
    manifest = read_manifest(keys)
    changes = {"sub-0": {"shape": [24, 28, 31]}, "sub-1": {"node_type": "group"}, "sub-2": {"codecs": []}}
    for name, change in changes.items():
        meta = store / name / "image" / "zarr.json"
        meta.write_text(json.dumps(json.loads(meta.read_text(encoding="utf8")) | change), encoding="utf8")
        manifest["subjects"][name]["files"]["image/zarr.json"] = fingerprint(meta.read_bytes())
    manifest["subjects"]["sub-2"]["arrays"]["image"]["dtype"] = "float32"
    write_manifest(keys, manifest)
    code, out, _ = call(capsys, "verify", store)
    assert code == 3 and "3 subjects, 3 problems" in out
    assert all(f"{name}/image/zarr.json: its metadata are not those" in out for name in changes)


@pytest.mark.fault(32)
def test_a_store_of_a_newer_version_names_what_it_needs(work, tmp_path, capsys):
    store = tmp_path / "s.zarr"
    shutil.copytree(work / "cohort.zarr", store)
    manifest = json.loads((store / MANIFEST).read_text(encoding="utf8"))
    (store / MANIFEST).write_text(json.dumps({**manifest, "format": 2, "made_by": "9.1", "needs": "9.0"}))
    for words in (("info", store), ("verify", store), ("train", store, "-o", tmp_path / "r", "-n", 1, 1, 3)):
        code, _, told = call(capsys, *words)
        assert code == 4
        one_line(told, "made by fastsrgan 9.1, needs >= 9.0", "pip install -U fastsrgan")


ESCAPES = {
    "a name outside": lambda m: m["subjects"].update({"../outside": m["subjects"]["sub-0"]}),
    "an absolute name": lambda m: m["subjects"].update({"/etc": m["subjects"]["sub-0"]}),
    "a file outside": lambda m: m["subjects"]["sub-0"]["files"].update({"../../x": [1, "0" * 64]}),
    "an array outside": lambda m: m["subjects"]["sub-0"]["arrays"].update({"../x": {"dtype": "uint8"}}),
    "tebibytes": lambda m: m["subjects"]["sub-0"].update(shape=[2**20, 2**20, 2**20]),
    "no affine": lambda m: m["subjects"]["sub-0"].update(affine=[[0.0] * 4] * 4),
    "a spacing of zero": lambda m: m["subjects"]["sub-0"].update(spacing=[1.0, 1.0, 0.0]),
    "another spacing than the affine's": lambda m: m["subjects"]["sub-0"].update(spacing=[1.0, 1.0, 1.01]),
    "objects": lambda m: m["subjects"]["sub-0"]["arrays"]["image"].update(dtype="object"),
}


@pytest.mark.fault(29)
@pytest.mark.parametrize("escape", ESCAPES)
def test_a_strangers_manifest_leads_nowhere(work, tmp_path, capsys, escape):
    """Its digest fits: only what a writer makes is believed, and nothing outside is read or removed."""
    store = tmp_path / "s.zarr"
    shutil.copytree(work / "cohort.zarr", store)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    keys = Keys(store, read_only=False)
    manifest = read_manifest(keys)
    ESCAPES[escape](manifest)
    write_manifest(keys, manifest)
    for words in (("info", store), ("verify", store), ("convert", work / "cohort.csv", store, "--resume")):
        code, _, told = call(capsys, *words)
        assert code == 4, told
        one_line(told, "is damaged", "--overwrite")
    assert (tmp_path / "outside" / "file").exists()


# --- weights and settings of strangers ----------------------------------------------------------------------------


@pytest.mark.fault(16, 17, 18)
@pytest.mark.parametrize("kind", ["truncated", "NaN", "pickle", "torch", "a link", "4 TiB", "text"])
def test_bad_weights_end_every_command_with_4_before_any_work(work, tmp_path, capsys, kind):
    path, canary = tmp_path / "w.h5", tmp_path / "canary"
    good = (work / "w.safetensors").read_bytes()
    if kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "NaN":
        network = build_generator(GeneratorSpec(kernel=1)).eval()
        network.head.data[...] = np.nan
        weights.save_generator(path, network)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Canary(canary)))
    elif kind == "torch":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Canary(canary)))
    elif kind == "text":
        path.write_text("no weights", encoding="utf8")
    else:
        keras_with(path, kind)
    scan = work / "scan0.nii.gz"
    for words in (
        ("infer", scan, "-o", tmp_path / "out", "-w", path),
        ("train", work / "cohort.zarr", "-o", tmp_path / "run", "--config", work / "c.yaml", "-w", path),
        ("weights", "export", path, tmp_path / "x.h5"),
    ):
        code, out, told = call(capsys, *words)
        assert code == 4 and not out, (words, told)
        one_line(told, str(path))
    assert not canary.exists() and not (tmp_path / "x.h5").exists()
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.fault(17)
def test_a_strangers_snapshot_runs_nothing(work, tmp_path, capsys):
    """Its manifest fits its files; the optimisers' state is a pickle that would make a folder."""
    run, canary = tmp_path / "run", tmp_path / "canary"
    words = ("train", work / "cohort.zarr", "-o", run, "--config", work / "c.yaml")
    assert call(capsys, *words)[0] == 0
    strange_state(run, canary)
    code, _, told = call(capsys, *words, "--resume", "--epoch", 2)
    assert code == 4
    one_line(told, "state.pt", "more than tensors", "-w")
    assert not canary.exists()


@pytest.mark.fault(19)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.system ['touch canary']", "not plain YAML"),
        ("batchsize: 3", "did you mean batch_size"),
        ("batch_size: 3\nbatch_size: 4", "twice"),
        ("a: &a [1]\nb: [*a, *a]", "aliases"),
        ("noise: .nan", "finite"),
        ("epochs: 2024-13-41", "not plain YAML"),
        ("patch_size: " + "[" * 5000, "not plain YAML"),
        ("preset: [paper]", "code, paper"),
        ("kernel_gen: 100000", "at most 1024"),
        ("lr_gen: 0x" + "f" * 9000, "is not a number"),
    ],
)
def test_settings_that_run_code_or_mean_nothing_end_with_4(work, tmp_path, capsys, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text, encoding="utf8")
    code, _, told = call(capsys, "train", work / "cohort.zarr", "-o", "run", "-n", 1, 1, 3, "--config", "c.yaml")
    assert code == 4
    one_line(told, words)
    assert len(told) < 500 and not (tmp_path / "canary").exists() and not (tmp_path / "run").exists()


@pytest.mark.fault(19)
def test_a_damaged_settings_file_of_a_resumed_run_is_named(work, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("epochz: 3", encoding="utf8")
    code, _, told = call(capsys, "train", work / "cohort.zarr", "-o", tmp_path / "run", "--resume")
    assert code == 4
    one_line(told, f"error: {tmp_path / 'run' / 'config.yaml'}: epochz: unknown setting (did you mean epochs?)")


@pytest.mark.fault(24)
def test_training_asks_for_room_before_the_first_update(work, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 1000))
    code, _, told = call(capsys, "train", work / "cohort.zarr", "-o", tmp_path / "run", "--config", work / "c.yaml")
    assert code == 5
    one_line(told, "no space left on the disk: needs", "1000 bytes free")
    assert not (tmp_path / "run" / "log.jsonl").exists()
