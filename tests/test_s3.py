"""Stores behind s3:// (moto's server on loopback): all commands, training, one writer and many readers.

FASTSRGAN_KILLS is the number of conversions to s3:// that are killed (2; the full check is 20).
"""

import json
import logging
import os
import random
import socket
import threading
import time
import uuid

import fault_proxy
import numpy as np
import pytest
from fault_proxy import BUCKET, objects
from processes import CONTEXT, Flag, Post
from test_convert import cohort, head
from test_store import StoreContract, make, put

from fastsrgan.cli.main import main
from fastsrgan.config import TrainConfig
from fastsrgan.convert import convert
from fastsrgan.core.files import LOCK
from fastsrgan.errors import FastsrganError, InputError, ResourceError
from fastsrgan.store import files as store_files
from fastsrgan.store.reader import open_store
from fastsrgan.store.writer import create_store
from fastsrgan.train.run import train

SHARD = "c/0/0/0"


@pytest.fixture(scope="module")
def proxy():
    with fault_proxy.running() as proxy:
        yield proxy


@pytest.fixture
def url(proxy):
    proxy.fine()
    yield f"s3://{BUCKET}/{uuid.uuid4().hex}/store"
    proxy.fine()


class TestS3(StoreContract):
    @pytest.fixture
    def url(self, proxy):
        proxy.fine()
        return f"s3://{BUCKET}/{uuid.uuid4().hex}/store"

    test_readers_see_whole_subjects_only = None  # across processes below
    test_what_cannot_be_stored = None  # nothing comes to the place

    # Values and sizes are the codec's concern, whatever the place is.
    @pytest.mark.parametrize(("dtype", "order"), [(">i2", "F"), ("f4", "C")])
    def test_what_is_written_is_read(self, url, dtype, order):
        super().test_what_is_written_is_read(url, dtype, order)

    @pytest.mark.parametrize("shape", [(7, 130, 66)])
    def test_any_size(self, url, shape):
        super().test_any_size(url, shape)


# --- the commands -------------------------------------------------------------------------------------------------


def test_convert_info_verify_and_train(url, tmp_path, capsys):
    table = cohort(tmp_path, 3, shape=(22, 18, 19))
    assert main(["--quiet", "convert", str(table), url]) == 0
    assert main(["--quiet", "convert", str(table), url, "--resume"]) == 0
    assert "0 converted, 3 kept" in capsys.readouterr().out
    convert(table, tmp_path / "store")
    assert objects(url) == objects(tmp_path / "store")
    assert main(["info", url, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(r["subject"], r["split"]) for r in rows] == [("s0", "Train"), ("s1", "Train"), ("s2", "Test")]
    assert main(["--quiet", "verify", url]) == 0 and "0 problems" in capsys.readouterr().out
    config = TrainConfig(
        new_low_res=((1.0, 1.25, 6.0),),
        **{"patch_size": 16, "stride": 3, "batch_size": 2, "epochs": 1, "steps_per_epoch": 2, "critic_iterations": 1},
        **{"kernel_gen": 2, "kernel_dis": 2},
    )
    weights = []
    for place, run in ((tmp_path / "store", "local"), (url, "remote")):
        assert train(place, tmp_path / run, config, device="cpu")["updates"] == 2
        weights.append((tmp_path / run / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    keys = store_files.Keys(url, read_only=False)
    keys.put("s1/label/zarr.json", b"{}")
    keys.drop_one(f"s2/image/{SHARD}")
    assert main(["--quiet", "verify", url]) == 3
    out = capsys.readouterr().out.splitlines()
    assert out[:-1] == ["s1/label/zarr.json: damaged", f"s2/image/{SHARD}: missing"]


def test_a_subject_is_read_with_one_request_an_object(url, proxy):
    make(url, "a", mask=True)
    store = open_store(url)
    proxy.fail("", 0)
    store.read("a")
    expected = [f"a/{name}/{end}" for name in ("image", "label", "mask") for end in ("zarr.json", SHARD)]
    assert sorted(path.split("/store/")[1] for _, path, _ in proxy.requests) == sorted(expected)
    assert {method for method, _, _ in proxy.requests} == {"GET"}


# --- one writer, many readers -------------------------------------------------------------------------------------


@pytest.mark.fault(27)
def test_one_of_many_writers_gets_the_lock(url):
    won, lost = [], []
    together = threading.Barrier(4)

    def start():
        together.wait()
        try:
            won.append(create_store(url))
        except ResourceError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert (
        len(won) == 1 and all(f"is being written by process {os.getpid()}" in text for text in lost) and len(lost) == 3
    )
    put(won[0], "a")
    won[0].finish()
    won[0].close()
    assert LOCK not in objects(url) and open_store(url).verify() == []


def test_a_writer_whose_lock_was_taken_lists_nothing_more(url, caplog):
    keys = store_files.Keys(url, read_only=False)
    other = {"pid": 2**22 + 1, "host": socket.gethostname()}
    with create_store(url) as writer:
        put(writer, "a")
        keys.put(LOCK, json.dumps(other).encode())
        with pytest.raises(ResourceError, match="taken over"):
            put(writer, "b", 1)
    assert [s.id for s in open_store(url).subjects] == ["a"] and json.loads(keys.get(LOCK)) == other
    with caplog.at_level(logging.WARNING, "fastsrgan"), create_store(url, resume=True) as writer:
        assert "did not end properly, its lock is taken over" in caplog.text
        put(writer, "b", 1)
        writer.finish()
    assert open_store(url).verify() == []


def _watch(environment, url, ready, stop, seen):
    """Read all the time; what was seen goes into ``seen``: ids of whole subjects, or words on what was wrong."""
    os.environ.update(environment)  # a process that was forked early knows nothing of the server
    ready.set()
    while not stop.is_set():
        try:
            store = open_store(url)
        except InputError:
            continue
        for s in store.subjects:
            sample = store.read(s.id)
            right = np.array_equal(sample.image, head(int(s.id[1:]))) and np.array_equal(
                sample.label, sample.image > 500
            )
            seen.put(s.id if right else f"{s.id} is wrong")


@pytest.mark.fault(28)
def test_another_process_sees_whole_subjects_only(url, proxy, tmp_path):
    ready, stop, seen = Flag(), Flag(), Post()
    process = CONTEXT.Process(target=_watch, args=(fault_proxy.environment(proxy.url), url, ready, stop, seen))
    process.start()
    assert ready.wait()
    convert(cohort(tmp_path, 5), url, workers=2)
    found, names = set(), {f"s{i}" for i in range(5)}
    while found != names and process.is_alive():
        found.add(seen.get())
    stop.set()
    while process.is_alive():
        time.sleep(0.05)
        while not seen.empty():
            found.add(seen.get())
    process.join()
    assert found == names and process.exitcode == 0


def _convert_quietly(environment, table, url, begun):
    os.environ.update(environment)
    begun.set()
    try:
        convert(table, url, resume=True, workers=2)
    except FastsrganError:
        os._exit(9)


@pytest.mark.fault(20)
def test_killed_at_random_moments_and_resumed(url, proxy, tmp_path):
    table = cohort(tmp_path, 3)
    began = time.monotonic()
    convert(table, tmp_path / "clean")
    convert(table, url)
    seconds = time.monotonic() - began
    environment, chance = fault_proxy.environment(proxy.url), random.Random(7)
    keys = store_files.Keys(url, read_only=False)
    keys.drop("")
    killed = 0
    attempts = int(os.environ.get("FASTSRGAN_KILLS", "2"))
    for attempt in range(10 * attempts):
        if attempt >= attempts and killed:
            break  # more attempts only where each came too late, as on a machine whose load has gone
        begun = Flag()
        process = CONTEXT.Process(target=_convert_quietly, args=(environment, table, url, begun))
        process.start()
        assert begun.wait()
        process.join(chance.uniform(0.1, 1.0) * seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        killed += process.exitcode == -9
        if keys.get("manifest.json"):
            store = open_store(url)
            assert store.verify() == []
            if store.complete:
                keys.drop("")
    assert killed
    convert(table, url, resume=True)
    assert objects(url) == objects(tmp_path / "clean")
