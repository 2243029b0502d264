"""Cohorts: folders as input, neighbours read and written meanwhile, images dealt to ranks, volumes split over ranks."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nifti_files import rigid
from processes import ended, on_ranks, outcome, start_ranks

from fastsrgan.core.ranks import from_environment
from fastsrgan.errors import PartialFailure, ResourceError, UsageError
from fastsrgan.infer import files, modes
from fastsrgan.infer import files as infer_files
from fastsrgan.infer.files import SUMMARY
from fastsrgan.infer.modes import shares
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Whole
from fastsrgan.infer.sweep import Sweep
from fastsrgan.infer.tiles import plan
from fastsrgan.io import image_list
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator

FAST = {"patch": 16, "step": 12, "device": "cpu"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    weights.save_generator(path, build_generator(GeneratorSpec(kernel=1), seed=6))
    return path


def scan(path, seed=0, shape=(14, 12, 6)):
    path.parent.mkdir(exist_ok=True, parents=True)
    data = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    return images.save(path, data, rigid((1.0, 1.0, 2.5)))


@pytest.fixture
def folder(tmp_path):
    """Three scans of different sizes."""
    for seed, name in enumerate("abc"):
        scan(tmp_path / "scans" / f"{name}.nii.gz", seed, (14 + 4 * seed, 12, 6))
    return tmp_path / "scans"


def run(*args, **settings):
    return infer_files.infer_files(*args, **{**FAST, **settings})


def results(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.nii.gz"))}


@pytest.fixture
def one_by_one(folder, model, tmp_path):
    """What single calls give."""
    for path in sorted(folder.iterdir()):
        run([path], tmp_path / "single", model)
    return results(tmp_path / "single")


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_is_all_its_nifti_files(tmp_path, model, caplog):
    """Subfolders are kept, so equal names do not clash; what is no image, hidden, or a result is left out."""
    for place in ("sub-1/T2w.nii.gz", "sub-2/T2w.nii.gz", ".trash/x.nii.gz"):
        scan(tmp_path / "in" / place)
    (tmp_path / "in" / "notes.md").write_text("")
    (tmp_path / "in" / "p.hdr").write_bytes(b"")
    (tmp_path / "in" / "p.img").write_bytes(b"")
    out = tmp_path / "in" / "out"
    with caplog.at_level(logging.INFO, "fastsrgan"):
        names = [i.name for i in image_list.find_images([tmp_path / "in"], out)]
    assert names == ["p", "sub-1/T2w", "sub-2/T2w"] and "3 images: p.hdr, sub-1/T2w.nii.gz" in caplog.text
    for half in ("hdr", "img"):
        (tmp_path / "in" / f"p.{half}").unlink()
    assert run([tmp_path / "in"], out, model)["done"] == 2
    assert (out / "sub-2" / "T2w_sr.nii.gz").exists() and (out / "sub-1" / "T2w.json").exists()
    again = run([tmp_path / "in"], out, model, resume=True)
    assert again["skipped"] == 2 and len(again["items"]) == 2, "results are no images"
    place = tmp_path / "in" / "sub-1"
    run([place], place, model)
    assert [i.name for i in image_list.find_images([place], place)] == ["T2w"]
    (place / "T2w.nii.gz").unlink()
    with pytest.raises(UsageError, match="holds results only"):
        image_list.find_images([place], tmp_path / "x")


# --- one ahead, one behind ----------------------------------------------------------------------------------------


def test_a_cohort_gives_the_bytes_of_single_calls(folder, model, tmp_path, one_by_one, caplog):
    with caplog.at_level(logging.INFO, "fastsrgan"):
        summary = run([folder], tmp_path / "out", model)
    assert results(tmp_path / "out") == one_by_one and summary["done"] == 3
    lines = [r.getMessage() for r in caplog.records if " of 3 images" in r.getMessage()]
    assert [line[:13] for line in lines] == [f"{n} of 3 images" for n in (1, 2, 3)] and "left" in lines[0]
    rows = json.loads((tmp_path / "out" / "a.json").read_text())["memory"]["rows"]
    assert {"what": "next image", "where": "host", "bytes": 4 * 18 * 12 * 6} in rows


def test_neighbours_are_read_and_written_while_the_network_works(folder, model, tmp_path, monkeypatch):
    """b is read while a is computed, a is written while b is: one after the other, this would wait for ever."""
    read_b, computing_b, wrote_a = threading.Event(), threading.Event(), threading.Event()
    load, compute, write = files.load, files.compute, files.write

    def loading(image, job):
        found = load(image, job)
        if image.name == "b":
            read_b.set()
        return found

    def infer_volume(loaded, job, *args, **more):
        if loaded.image.name == "b":
            computing_b.set()
            assert wrote_a.wait(240), "a is written meanwhile"
        done = compute(loaded, job, *args, **more)
        assert loaded.image.name != "a" or read_b.wait(240), "b is read before a is left"
        return done

    def writing(loaded, job):
        if loaded.image.name == "a":
            assert computing_b.wait(240), "b is computed meanwhile"
        record = write(loaded, job)
        wrote_a.set()
        return record

    for name, function in (("load", loading), ("compute", infer_volume), ("write", writing)):
        monkeypatch.setattr(files, name, function)
    assert run([folder], tmp_path / "out", model)["done"] == 3


def test_without_room_images_follow_each_other(folder, model, tmp_path, one_by_one, monkeypatch, caplog):
    """Neighbours that do not fit are not there, and change nothing."""
    monkeypatch.setattr(files, "size_of", lambda image: 2**50)
    monkeypatch.setattr(files, "bytes_while_writing", lambda loaded, job: 2**50)
    with caplog.at_level(logging.INFO, "fastsrgan"):
        run([folder], tmp_path / "out", model)
    assert results(tmp_path / "out") == one_by_one
    assert "no room for the next image" in caplog.text
    rows = json.loads((tmp_path / "out" / "b.json").read_text())["memory"]["rows"]
    assert not {"next image", "result before"} & {row["what"] for row in rows}


def test_an_image_whose_size_only_reading_tells_is_read_ahead_and_no_line_gives_it_bytes(
    folder, model, tmp_path, caplog
):
    (folder / "b.nii.gz").write_bytes((folder / "b.nii.gz").read_bytes()[:100])  # no whole header
    with caplog.at_level(logging.INFO, "fastsrgan"), pytest.raises(PartialFailure):
        run([folder], tmp_path / "out", model)
    (line,) = [r.getMessage() for r in caplog.records if "a.nii.gz: memory beside" in r.getMessage()]
    assert "next image" not in line and " byte" not in line and "no room" not in caplog.text
    rows = json.loads((tmp_path / "out" / "a.json").read_text())["memory"]["rows"]
    assert {"what": "next image", "where": "host", "bytes": 0} in rows


def test_an_error_while_reading_or_writing_is_its_own_image_s(folder, model, tmp_path, one_by_one, monkeypatch):
    (folder / "b.nii.gz").write_bytes((folder / "b.nii.gz").read_bytes()[:300])
    save = images.save

    def full(path, *args, **more):
        if path.name == "a_seg.nii.gz":
            raise ResourceError(path, "no space left on the disk", "free space")
        return save(path, *args, **more)

    monkeypatch.setattr(images, "save", full)
    with pytest.raises(PartialFailure, match="2 of 3 volumes failed: a, b") as caught:
        run([folder], tmp_path / "out", model)
    found = [(item["status"], item.get("exit_code")) for item in caught.value.summary["items"]]
    assert found == [("failed", 5), ("failed", 3), ("done", None)]
    assert not (tmp_path / "out" / "a.json").exists()
    assert {k: v for k, v in results(tmp_path / "out").items() if k[0] == "c"}.items() <= one_by_one.items()


# --- ranks --------------------------------------------------------------------------------------------------------


def on_rank(inputs, out, model, dies: str = "", **settings) -> dict:
    """``infer_files`` as a rank; rank 1 is killed, or fails, when it computes."""
    compute = files.compute

    def computed(loaded, job, *args, **more):
        mark = Path(out) / ".dying"
        if dies and os.environ["RANK"] == "1":
            mark.touch()
            if dies == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no memory on rank 1")
        while dies == "kill" and not mark.exists():
            time.sleep(0.01)
        return compute(loaded, job, *args, **more)

    files.compute = computed
    try:
        with from_environment(CPU) as ranks:
            return infer_files.infer_files(inputs, out, model, **{**FAST, **settings}, ranks=ranks)
    except infer_files.SomeFailed as error:
        return error.summary | {"exit_code": error.exit_code}


def test_ranks_share_the_images_of_a_list(folder, model, tmp_path, one_by_one):
    """Each image once; one file tells of all; a bad one is told by both, which end alike."""
    (folder / "d.nii.gz").write_bytes(b"no image")
    found = on_ranks(on_rank, 2, [folder], tmp_path / "out", model, out=tmp_path / "ranks")
    assert found[0] == found[1] and found[0]["exit_code"] == 6
    assert [item["status"] for item in found[0]["items"]] == ["done", "done", "done", "failed"]
    assert results(tmp_path / "out") == one_by_one
    told = json.loads((tmp_path / "out" / SUMMARY).read_text())
    assert told["items"] == files.portable(found[0], tmp_path / "out")["items"] and told["failed"] == 1


def test_ranks_take_the_largest_images_first(monkeypatch):
    """What is begun last is short, so that no rank waits long for another; a single process keeps the list's order."""
    monkeypatch.setattr(files, "size_of", lambda image: image)
    assert files.Deal([3, 9, 5, 9], SimpleNamespace(store=object())).order == [1, 3, 2, 0]
    assert files.Deal([3, 9, 5, 9], SimpleNamespace(store=None)).order == [0, 1, 2, 3]


def test_the_images_of_a_rank_that_died_are_not_done(folder, model, tmp_path):
    """The largest image is one of the first two: rank 1 dies with the one that it took."""
    out = tmp_path / "out"
    processes = start_ranks(on_rank, 2, [folder], out, model, "kill", out=tmp_path / "ranks")
    codes = [ended(p) for p in processes]
    assert codes == [0, -signal.SIGKILL]
    summary = outcome(tmp_path / "ranks" / "0.json")["value"]
    lost = [item for item in summary["items"] if item["status"] == "failed"]
    assert summary["exit_code"] == 6 and len(lost) >= 1 and "ended before it was done" in lost[0]["error"]
    assert all((out / f"{item['stem']}.json").exists() == (item["status"] == "done") for item in summary["items"])
    assert json.loads((out / SUMMARY).read_text())["failed"] == len(lost)


# --- one volume over the ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("shape", "patch", "step", "batch"), [
    ((61, 20, 17), 16, 5, 1), ((61, 20, 17), 16, 16, 4), ((9, 20, 17), 16, 5, 1), ((200, 16, 16), 16, 3, 2),
])  # fmt: skip
def test_shares_are_all_planes_once(world, shape, patch, step, batch):
    """Without gaps; each rank computes at least the slabs that reach into its planes."""
    network = TileNetwork(torch.nn.Identity(), 1.0)
    network.size = batch
    sweep = Sweep(Whole(torch.zeros(shape)), plan(shape, patch, step), network)
    parts = shares(sweep, world)
    assert len(parts) == world and parts[0].first == 0 and parts[-1].stop == shape[0]
    assert all(a.stop == b.first for a, b in itertools.pairwise(parts))
    origins = sweep.plan.origins[0]
    for part in (part for part in parts if part.first < part.stop):
        needed = [i for i, o in enumerate(origins) if o < part.stop and o + patch > part.first]
        assert part.slabs >= len(needed)
    assert all((part.slabs == 0) == (part.first == part.stop) for part in parts)
    if world == 1:
        assert parts[0].slabs == len(origins)


def test_a_volume_split_over_ranks_has_the_bytes_of_one_process(model, tmp_path):
    """Slabs along the first processed axis; the seam lies within tiles."""
    path = scan(tmp_path / "a.nii.gz", shape=(70, 20, 8))
    settings = {"step": (5, 9, 9), "batch": 2, "window": "gaussian", "mask": "head"}
    run([path], tmp_path / "one", model, **settings)
    whole = results(tmp_path / "one")
    arguments = dict(settings, split_volume=True)
    found = on_ranks(split, 2, [path], tmp_path / "two", model, arguments, out=tmp_path / "ranks")
    assert found[0]["done"] == 1 and results(tmp_path / "two") == whole
    record = json.loads((tmp_path / "two" / "a.json").read_text())
    (first, stop), (second, end) = record["split"]["planes"]
    assert (first, end) == (0, 70) and 0 < stop == second < 70
    computed = sum(record["split"]["tiles"])
    assert record["split"]["tiles_computed_twice"] == computed - record["tiles"] > 0
    assert record["tiles_per_second"] * record["tile_seconds"] == pytest.approx(computed)
    assert 0 < record["tile_seconds"] <= record["seconds"]
    assert max(record["split"]["tiles"]) < record["tiles"]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["a.json", "a_seg.nii.gz", "a_sr.nii.gz"]


def test_progress_of_a_part_ends_with_all_of_its_tiles():
    """What ends a part is the writing of its last planes, before the tiles that made them are counted: 1/2."""
    told: list[tuple] = []
    shown = SimpleNamespace(
        start=lambda *words: told.append(words), advance=lambda n, **facts: told.append((n,)), finish=lambda: None
    )
    part = modes._ShareOfProgress(shown, 6)
    part.start("a", 20, "tile")
    part.advance(4, seconds=1.0)
    part.complete()
    part.complete()
    assert told == [("a", 6, "tile"), (4,), (2,), (0,)]


def split(inputs, out, model, settings) -> dict:
    return on_rank(inputs, out, model, **settings)


def test_a_rank_that_fails_at_a_shared_volume_hangs_nobody(model, tmp_path):
    paths = [scan(tmp_path / f"{name}.nii.gz") for name in "ab"]
    found = on_ranks(failing_split, 2, paths, tmp_path / "out", model, out=tmp_path / "ranks")
    assert [item["status"] for item in found[0]["items"]] == ["failed", "failed"] and found[0]["exit_code"] == 5
    assert "rank 1" in found[0]["items"][0]["error"] and "no memory" in found[0]["items"][0]["error"]


def failing_split(inputs, out, model) -> dict:
    return on_rank(inputs, out, model, "error", split_volume=True)


def test_ranks_of_one_machine_share_its_memory(folder, model, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def job(out, models, settings, *rest):
        raise Seen(settings.max_memory)

    monkeypatch.setattr(files, "ImageJob", job)
    monkeypatch.setattr(files, "free_memory", lambda: 12 << 30)
    ranks = files.Ranks()
    ranks.world = ranks.local_world = 3
    with pytest.raises(Seen) as seen:
        files.infer_files([folder], tmp_path / "out", model, ranks=ranks, **FAST)
    assert seen.value.args[0] == pytest.approx(files.SHARE * (4 << 30), abs=1)  # found: 0.4, of whole bytes
