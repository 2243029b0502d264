"""Stores: what a backend has to keep (StoreContract), and what happens to damaged, locked, full and foreign folders."""

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import json
import logging
import os
import resource
import signal
import socket
import threading
import time
import uuid
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from processes import CONTEXT, Flag
from zarr.core.sync import sync

from fastsrgan.core import files as core_files
from fastsrgan.core.files import LOCK, temporary_name
from fastsrgan.errors import InputError, ModelError, ResourceError, UsageError
from fastsrgan.store import files as store_files
from fastsrgan.store import remote as store_remote
from fastsrgan.store import writer as store_writer
from fastsrgan.store.codec import REPAIR
from fastsrgan.store.reader import open_store
from fastsrgan.store.remote import Limits
from fastsrgan.store.writer import create_store

OBLIQUE = np.array([[0.9, -0.2, 0.1, -30.0], [0.25, 1.1, -0.3, 12.5], [-0.1, 0.35, 2.9, 7.0], [0, 0, 0, 1]])
ATTRS = {"source": {"image": {"path": "/a.nii", "sha256": "0" * 64}}, "warnings": ["é"], "bad": float("nan")}


def volume(seed=0, shape=(9, 8, 7), dtype=np.int16):
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return random.normal(0, 300, shape).astype(dtype)
    top = min(3000, np.iinfo(dtype).max)
    return random.integers(max(-200, np.iinfo(dtype).min), top, shape).astype(dtype)


def put(writer, name, seed=0, split="Train", label=True, mask=False, image=None, scale=1.0, offset=0.0, attrs=None):
    image = volume(seed) if image is None else image
    extra = [(image > np.median(image)).astype(np.uint8) * v if on else None for v, on in ((1, label), (3, mask))]
    return writer.write(name, split, image, scale, offset, *extra, OBLIQUE, ATTRS if attrs is None else attrs)


def make(url, *names, **options):
    with create_store(url) as writer:
        for i, name in enumerate(names):
            put(writer, name, i, **options)
        writer.finish()
    return open_store(url)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class StoreContract:
    """What every place for a store has to keep. A backend subclasses this with a ``url`` fixture: an empty place."""

    @pytest.fixture
    def url(self):
        raise NotImplementedError

    @pytest.mark.parametrize("dtype", ["i2", "u1", "u2", ">i4", "u4", "i8", "f4", "f8", ">i2"])
    @pytest.mark.parametrize("order", "CF")
    def test_what_is_written_is_read(self, url, dtype, order):
        image = np.asarray(volume(1, (5, 67, 3), dtype), order=order)
        make(url, "a", image=image, scale=0.1, offset=-7.25, mask=True)
        sample = open_store(url).read("a")
        kept = image if image.dtype.kind in "iu" else image.astype(np.float32)
        assert sample.image.dtype == np.float32
        np.testing.assert_array_equal(sample.image, (kept.astype(float) * 0.1 - 7.25).astype(np.float32))
        np.testing.assert_array_equal(sample.label, image > np.median(image))
        np.testing.assert_array_equal(sample.mask, 3 * (image > np.median(image)))
        np.testing.assert_array_equal(sample.affine, OBLIQUE)
        assert sample.label.dtype == sample.mask.dtype == np.uint8
        assert (sample.id, sample.split) == ("a", "Train")
        store = open_store(url)
        store.read("a").affine[:] = 0  # a sample is its reader's own
        np.testing.assert_array_equal(store.subject("a").affine, OBLIQUE)

    @pytest.mark.parametrize("shape", [(1, 1, 1), (64, 64, 64), (65, 63, 2), (7, 130, 66)])
    def test_any_size(self, url, shape):
        image = volume(2, shape)
        np.testing.assert_array_equal(make(url, "a", image=image).read("a").image, image)

    def test_what_is_constant_is_written_too(self, url):
        zeros = np.zeros((70, 5, 5), np.int16)
        store = make(url, "a", image=zeros)
        assert not store.read("a").image.any() and store.verify() == []

    def test_regions(self, url):
        image = volume(3, (70, 20, 66))
        store = make(url, "a", image=image, scale=0.5)
        for s in itertools.product(
            [slice(0, 70), slice(60, 69), slice(69, 70)], [slice(3, 3), slice(5, 20)], [slice(None)]
        ):
            np.testing.assert_array_equal(store.read_region("a", "image", s), (image[s] * 0.5).astype(np.float32))
            np.testing.assert_array_equal(store.read_region("a", "label", s), image[s] > np.median(image))
        with pytest.raises(InputError, match="no mask"):
            store.read_region("a", "mask", (slice(1),) * 3)
        with pytest.raises(InputError, match="no subject b"):
            store.read("b")

    def test_the_list_of_subjects(self, url):
        with create_store(url, settings={"dtype": "auto"}) as writer:
            put(writer, "b", 1, "Test", label=False)
            put(writer, "a", 2, mask=True)
            writer.finish()
        store = open_store(url)
        a, b = store.subjects
        assert (a.id, a.split, a.has_label, a.has_mask) == ("a", "Train", True, True)
        assert (b.id, b.split, b.has_label, b.has_mask) == ("b", "Test", False, False)
        assert a.shape == (9, 8, 7) and a.raw_bytes == 9 * 8 * 7 * 4 and a.stored_bytes > 0
        np.testing.assert_allclose(a.spacing, np.sqrt((OBLIQUE[:3, :3] ** 2).sum(0)))
        assert a.attrs == {**ATTRS, "bad": None}
        assert store.complete and store.settings == {"dtype": "auto"}
        assert store.read("b").label is None and store.read("b").mask is None

    def test_an_existing_store_is_kept(self, url):
        make(url, "a")
        with pytest.raises(UsageError, match=r"exists, with 1 subject .--resume"):
            create_store(url)
        with pytest.raises(UsageError, match=r"^--resume and --overwrite: exclude each other"):
            create_store(url, resume=True, overwrite=True)
        with pytest.raises(UsageError, match="dtype None, not int16"):
            create_store(url, resume=True, settings={"dtype": "int16"})
        assert open_store(url).verify() == []

    def test_resume_keeps_and_adds(self, url):
        make(url, "a")
        with create_store(url, resume=True) as writer:
            assert list(writer.finished) == ["a"] and writer.intact("a")
            put(writer, "b", 5)
            writer.finish()
        store = open_store(url)
        assert [s.id for s in store.subjects] == ["a", "b"] and store.verify() == []
        np.testing.assert_array_equal(store.read("a").image, volume(0))

    def test_overwrite_begins_anew_with_the_first_write(self, url):
        make(url, "a", "b")
        with create_store(url, overwrite=True):
            pass
        assert [s.id for s in open_store(url).subjects] == ["a", "b"]
        with create_store(url, overwrite=True) as writer:
            put(writer, "c", 9)
            writer.finish()
        store = open_store(url)
        assert [s.id for s in store.subjects] == ["c"] and store.verify() == []
        with pytest.raises(InputError, match="no subject a"):
            store.read("a")

    def test_an_interrupted_conversion_lists_whole_subjects(self, url):
        class Stop(Exception):
            pass

        with contextlib.suppress(Stop), create_store(url) as writer:
            put(writer, "a")
            put(writer, "b", 1)
            raise Stop
        store = open_store(url)
        assert [s.id for s in store.subjects] == ["a", "b"] and not store.complete and store.verify() == []

    def test_replacing_a_subject(self, url):
        make(url, "a", "b")
        with create_store(url, resume=True) as writer:
            put(writer, "a", 7, "Test", label=False)
            writer.finish()
        store = open_store(url)
        assert store.read("a").split == "Test" and store.read("a").label is None and store.verify() == []
        np.testing.assert_array_equal(store.read("a").image, volume(7))

    @pytest.mark.fault(28)
    def test_readers_see_whole_subjects_only(self, url):
        names = [f"s{i}" for i in range(8)]
        stop, seen, problems = threading.Event(), set(), []

        def reader():
            while not stop.is_set():
                try:
                    store = open_store(url)
                except InputError:  # before the first manifest
                    continue
                for s in store.subjects:
                    seen.add(s.id)
                    if not np.array_equal(store.read(s.id).image, volume(int(s.id[1:]))):
                        problems.append(s.id)

        threads = [threading.Thread(target=reader) for _ in range(2)]
        with create_store(url) as writer:
            for t in threads:
                t.start()
            for i, name in enumerate(names):
                put(writer, name, i)
            writer.finish()
        while not seen >= set(names) and all(t.is_alive() for t in threads):
            time.sleep(0.01)
        stop.set()
        for t in threads:
            t.join()
        assert not problems and seen == set(names)  # a reader that met an error ended before it saw all

    @pytest.mark.fault(30)
    def test_a_lost_or_shortened_chunk_is_never_zeros(self, url):
        make(url, "a", "b")
        keys = store_files.Keys(url, read_only=False)
        shard = keys.get("b/label/c/0/0/0")
        keys.drop_one("a/image/c/0/0/0")
        keys.put("b/label/c/0/0/0", shard[:-60])
        store = open_store(url)
        for region in ((slice(None),) * 3, (slice(2),) * 3):
            with pytest.raises(InputError, match=r"a/image/c/0/0/0: missing .*--resume"):
                store.read_region("a", "image", region)
            with pytest.raises(InputError, match="b/label"):
                store.read_region("b", "label", region)
        assert [line.split(":")[0] for line in store.verify()] == ["a/image/c/0/0/0", "b/label/c/0/0/0"]
        with create_store(url, resume=True) as writer:
            assert not writer.intact("a") and not writer.intact("b")

    @pytest.mark.fault(29)
    def test_damaged_chunks_are_named_and_the_others_are_read(self, url):
        image = volume(5, (70, 70, 70))
        make(url, "a", image=image, label=False)
        keys = store_files.Keys(url, read_only=False)
        shard = bytearray(keys.get("a/image/c/0/0/0"))
        index = np.frombuffer(shard[-8 * 16 - 4 : -4], "<u8").reshape(2, 2, 2, 2)
        told = []
        for position in ((0, 1, 1), (1, 0, 1)):
            shard[int(index[(*position, 0)]) + 30] ^= 1
            keys.put("a/image/c/0/0/0", bytes(shard))
            told.append(f"a/image: chunk {position} is damaged (crc32c)")
            store = open_store(url)
            assert store.verify() == told
            for region in ((slice(None),) * 3, (slice(0, 70), slice(69, 70), slice(64, 65))):
                with pytest.raises(InputError) as caught:
                    store.read_region("a", "image", region)
                assert str(caught.value) == f"{url}: {'; '.join(told)} ({REPAIR})"
            left = (slice(0, 64),) * 3
            np.testing.assert_array_equal(store.read_region("a", "image", left), image[left])

    @pytest.mark.fault(29)
    def test_what_may_not_be_read_ends_a_check_of_a_storage_and_is_listed_of_a_folder(self, url, monkeypatch):
        """Of a folder the others are looked at all the same; a storage that does not answer is not asked for each."""
        make(url, "a", "b", "c")
        store = open_store(url)
        denied = {"zarr.json", "a/image/c/0/0/0", "b/zarr.json", "b/label/zarr.json", "b/label/c/0/0/0"}
        read = store_files.Keys.get_all

        def get_all(keys, names):
            if bad := denied & set(names):
                raise ResourceError(min(bad), "cannot be read: Permission denied", "check it")
            return read(keys, names)

        monkeypatch.setattr(store_files.Keys, "get_all", get_all)
        if store._keys.root is None:
            with pytest.raises(ResourceError, match="Permission denied"):
                store.verify()
            return
        (store._keys.root / "c/image/c/0/0/0").unlink()
        told = store.verify()
        assert set(told) == {f"{key}: cannot be read: Permission denied" for key in denied} | {
            "c/image/c/0/0/0: missing"
        }
        assert len(told) == len(set(told))

    @pytest.mark.fault(32)
    def test_a_newer_format_is_refused(self, url):
        make(url, "a")
        keys = store_files.Keys(url, read_only=False)
        manifest = json.loads(keys.get("manifest.json"))
        manifest |= {"format": 2, "made_by": "9.1.0", "needs": "9.0.0", "subjects": "in another form"}
        keys.put("manifest.json", json.dumps(manifest).encode())
        for action in (lambda: open_store(url), lambda: create_store(url, resume=True), lambda: create_store(url)):
            with pytest.raises(ModelError, match=r"made by fastsrgan 9\.1\.0, needs >= 9\.0\.0"):
                action()

    def test_no_store(self, url):
        with pytest.raises(InputError, match=r"no fastsrgan store is here|no such folder"):
            open_store(url)

    def test_what_cannot_be_stored(self, url):
        with create_store(url) as writer:
            for name in ("../a", "a/b", "", ".a", "a\n", "manifest.json", "zarr.json", "é"):
                with pytest.raises(InputError, match="no subject id"):
                    put(writer, name)
            image, label = volume(), np.zeros((9, 8, 7), np.uint8)
            for bad in (
                ("a", "Train", image, 1, 0, label[1:], None),
                ("a", "Train", image, 1, 0, label.astype(int), None),
                ("a", "Train", image, 1, 0, None, label.astype(bool)),
                ("a", "Validation", image, 1, 0, None, None),
                ("a", "Train", image[0], 1, 0, None, None),
                ("a", "Train", image[:0], 1, 0, None, None),
                ("a", "Train", np.full((2, 2, 2), np.nan), 1, 0, None, None),
            ):
                with pytest.raises(InputError):
                    writer.write(*bad, OBLIQUE, {})
            writer.finish()
        assert open_store(url).subjects == []


class TestFolder(StoreContract):
    @pytest.fixture
    def url(self, tmp_path):
        return str(tmp_path / "deep" / "store")


class TestFolderReadByZarr(TestFolder):
    @pytest.fixture(autouse=True)
    def reader(self, monkeypatch):
        monkeypatch.setenv("FASTSRGAN_READER", "zarr")


class TestMemoryUrl(StoreContract):
    @pytest.fixture
    def url(self):
        return f"memory://{uuid.uuid4().hex}/store"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def test_a_record_that_no_writer_makes_is_refused_in_words(folder):
    """Whatever signed it: sizes, places, types and files that a reader would trip over."""
    make(folder, "a")
    manifest = store_files.read_manifest(store_files.Keys(folder, read_only=True))
    store_files.check_manifest(manifest)
    flat, files = np.diag([1.0, 1.0, 0.0, 1.0]), manifest["subjects"]["a"]["files"]
    wrong = {
        "its split": {"split": "train"},
        "voxels": {"shape": [2**16, 2**15, 2]},
        "its affine is none": {"affine": [[1.0, 0, 0, 0]] * 3},
        "is singular": {"affine": flat.tolist()},
        "its spacing is none": {"spacing": [1.0, 1.0, -1.0]},
        "not that of its affine": {"spacing": [2 * mm for mm in manifest["subjects"]["a"]["spacing"]]},
        "its attributes": {"attrs": []},
        "its arrays": {"arrays": {"picture": {"dtype": "uint8"}}},
        "neither an image nor tissues": {"arrays": {"label": {"dtype": "uint8"}}},
        "its image is of an unknown type": {"arrays": {"image": {"dtype": "complex64", "scale": 1, "offset": 0}}},
        "its label is of an unknown type": {
            "arrays": {"image": {"dtype": "int16", "scale": 1, "offset": 0}, "label": {"dtype": "int16"}}
        },
        "its intensity scaling": {"arrays": {"image": {"dtype": "int16", "scale": float("inf"), "offset": 0}}},
        "not those of its arrays": {"files": {}},
        "no fingerprints": {"files": {key: [1, "0"] for key in files}},
    }
    shapes = [5, 0, 3], [5, -4, 3], [5, 4], [5, 4, 3, 2], [5.0, 4, 3], [True, 4, 3], ["5", 4, 3], "543", 5, None
    spacings = [1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, float("nan")], [1.0, 1.0, float("inf")]
    matrices = np.full((4, 4), np.nan).tolist(), np.eye(3).tolist()
    scalings = ({"scale": True}, {"scale": "1"}, {"offset": float("nan")}, {"offset": None})
    image = {"dtype": "int16", "scale": 1, "offset": 0}
    more = [("its shape", {"shape": shape}) for shape in shapes]
    more += [("its spacing is none", {"spacing": spacing}) for spacing in spacings]
    more += [("its affine is none", {"affine": matrix}) for matrix in matrices]
    more += [("its intensity scaling", {"arrays": {"image": image | one}}) for one in scalings]
    more += [("its label is of an unknown type", {"arrays": {"image": image, "label": one}}) for one in ("uint8", {})]
    more += [
        ("its arrays", {"arrays": ["image"]}),
        ("no fingerprints", {"files": {key: [1.5, "0" * 64] for key in files}}),
    ]
    for words, change in [*wrong.items(), *more]:
        record = manifest["subjects"]["a"] | change
        with pytest.raises(ValueError, match=f"a: .*{words}"):
            store_files.check_manifest(manifest | {"subjects": {"a": record}})


def test_an_unknown_url_is_a_usage_error():
    with pytest.raises(UsageError, match="no URL that can be opened"):
        open_store("nowhere://x")


def test_a_file_url_is_a_folder(tmp_path):
    make((tmp_path / "a b").as_uri(), "x")
    assert open_store(tmp_path / "a b").verify() == [] and open_store((tmp_path / "a b").as_uri()).read("x")


def test_bytes_depend_on_the_subjects_alone(tmp_path):
    names = [f"s{i}" for i in range(6)]
    make(tmp_path / "one", *names)
    with create_store(tmp_path / "two") as writer:
        threads = [threading.Thread(target=put, args=(writer, n, i)) for i, n in reversed(list(enumerate(names)))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        writer.finish()
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_layout_is_plain_zarr(folder):
    image = volume(4, (70, 10, 10))
    make(folder, "a", image=image, scale=2.0)
    array = zarr.open_group(folder, mode="r")["a/image"]
    np.testing.assert_array_equal(array[...], image)
    assert array.attrs["scale"] == 2.0 and array.chunks == (64, 64, 64) and array.shards == (128, 64, 64)
    assert sorted(tree(folder)) == [
        *("a/image/c/0/0/0", "a/image/zarr.json", "a/label/c/0/0/0", "a/label/zarr.json", "a/zarr.json"),
        *("manifest.json", "zarr.json"),
    ]
    assert zarr.open_group(folder / "a", mode="r").attrs["affine"] == OBLIQUE.tolist()


@pytest.mark.fault(29)
def test_every_flipped_byte_is_found_and_none_is_read_as_data(folder):
    make(folder, "a", "b", image=volume(0, (20, 9, 8)))
    expected = open_store(folder).read("a")
    files = {key: data for key, data in tree(folder).items() if not key.startswith("b/")}
    for nth, (key, data) in enumerate(files.items()):
        for at in range(7 * nth, len(data), 100):
            (folder / key).write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            if key == "manifest.json":
                with pytest.raises(ModelError, match=r"manifest\.json"):
                    open_store(folder)
                continue
            store = open_store(folder)
            found = store.verify()
            assert len(found) == 1 and found[0].startswith(key.split("/c/")[0].split("/zarr.json")[0]), (key, at, found)
            try:
                sample = store.read("a")
            except InputError as error:
                assert key.startswith("a/") and ": a/" in str(error)
            else:
                np.testing.assert_array_equal(sample.image, expected.image)
                np.testing.assert_array_equal(sample.label, expected.label)
        (folder / key).write_bytes(data)
    assert open_store(folder).verify() == []


@pytest.mark.fault(30)
def test_a_chunk_missing_inside_a_shard_is_found(folder):
    make(folder, "a", image=volume(5, (70, 5, 5)), label=False)
    zarr.open_array(folder / "a/image", mode="r+")[64:] = 0  # zarr drops chunks that hold only the fill value
    store = open_store(folder)
    assert len(store.verify()) == 1
    for region in ((slice(None),) * 3, (slice(66, 68), slice(2), slice(2))):
        with pytest.raises(InputError, match="a/image"):
            store.read_region("a", "image", region)


def test_a_swapped_file_is_found(folder):
    make(folder, "a", "b", image=volume(3))
    one, other = folder / "a/label/zarr.json", folder / "a/image/zarr.json"
    text = one.read_bytes()
    one.write_bytes(other.read_bytes())
    assert open_store(folder).verify() == ["a/label/zarr.json: damaged"]
    with pytest.raises(InputError, match="a/label"):
        open_store(folder).read("a")
    one.write_bytes(text)
    (folder / "a").rename(folder / "gone")
    assert len(open_store(folder).verify()) == 5


def test_foreign_folders_are_refused_and_left_alone(folder, tmp_path):
    for name, inside in (
        ("photos", "cat.jpg"),
        ("web", "manifest.json"),
        ("zarr", "zarr.json"),
        ("deep", "image/c/0/0/1"),
    ):
        place = tmp_path / name
        (place / inside).parent.mkdir(parents=True)
        (place / inside).write_text("{}")
        before = tree(place)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            if name == "web" and "overwrite" in options:
                continue
            with pytest.raises((UsageError, ModelError)):
                create_store(place, **options)
            assert tree(place) == before
    zarr.create_group(tmp_path / "other/image")
    before = tree(tmp_path / "other")
    with pytest.raises(UsageError, match="no fastsrgan store"):
        create_store(tmp_path / "other", overwrite=True)
    assert tree(tmp_path / "other") == before


def test_a_url_that_holds_something_else_is_refused():
    url = f"memory://{uuid.uuid4().hex}"
    keys = store_files.Keys(url, read_only=False)
    keys.put("thesis/chapter1.tex", b"x")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match="it holds thesis"):
            create_store(url, **options)
    assert keys.get("thesis/chapter1.tex") == b"x" and keys.names() == ["thesis"]


def test_overwriting_and_finishing_spare_what_is_not_ours(folder):
    make(folder, "a")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("keep")
    (folder / "a.lst").write_text("keep")
    with create_store(folder, overwrite=True) as writer:
        put(writer, "b")
        writer.finish()
    assert (folder / "notes/mine.txt").exists() and (folder / "a.lst").exists() and not (folder / "a").exists()


def test_what_a_killed_run_leaves_is_removed_at_the_end(folder):
    make(folder, "a")
    clean = tree(folder)
    (folder / ".manifest.tmp-1-abc.json").write_text("half")
    (folder / ".zarr.tmp-1-abc.json").write_text("half")
    (folder / "zarr.0123abcd.partial").write_text("half")
    (folder / "b/image/c/0/0").mkdir(parents=True)
    (folder / "b/image/c/0/0/0.0123.partial").write_text("half")
    (folder / "c").mkdir()
    with create_store(folder, resume=True) as writer:
        writer.finish()
    assert tree(folder) == clean and not (folder / "c").exists() and not (folder / "b").exists()


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json"])
def test_a_run_that_was_killed_at_its_first_file_is_no_foreign_folder(folder, name):
    """What atomic_write had begun under a name of its own is all that is there."""
    folder.mkdir()
    half = temporary_name(folder / name)
    half.write_bytes(b"half")
    with create_store(folder, resume=True) as writer:
        put(writer, "a")
        writer.finish()
    assert not half.exists() and open_store(folder).complete
    (folder / "manifest.json").unlink()
    (folder / half.name.replace("tmp", "temp")).write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="is no fastsrgan store"):
        create_store(folder, resume=True)


def test_a_lost_root_group_is_made_again(folder):
    make(folder, "a")
    clean = tree(folder)
    (folder / "zarr.json").unlink()
    with create_store(folder, resume=True) as writer:
        writer.finish()
    assert tree(folder) == clean


def test_an_empty_store_needs_no_option(folder):
    make(folder)
    store = make(folder, "a", attrs={})
    assert [s.id for s in store.subjects] == ["a"]


def test_nothing_is_made_before_the_first_write(folder):
    with create_store(folder):
        pass
    assert not folder.exists()


@pytest.mark.fault(25)
def test_a_file_or_no_permission_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError):
        create_store(tmp_path / "file")
    with pytest.raises(ResourceError):
        create_store(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="is a file, a store is a folder"):
        open_store(tmp_path / "file")


def _hold(folder, ready):
    writer = create_store(folder)
    put(writer, "a")
    ready.set()
    signal.pause()


@pytest.mark.fault(27)
def test_a_second_writer_is_refused_and_a_dead_ones_lock_is_taken_over(folder, caplog):
    ready = Flag()
    process = CONTEXT.Process(target=_hold, args=(folder, ready))
    process.start()
    assert ready.wait()
    with pytest.raises(ResourceError, match=f"is being written by process {process.pid} on {socket.gethostname()}"):
        create_store(folder, resume=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (folder / LOCK).exists()
    with caplog.at_level(logging.WARNING, "fastsrgan"), create_store(folder, resume=True) as writer:
        assert f"process {process.pid} on {socket.gethostname()} did not end properly" in caplog.text
        assert list(writer.finished) == ["a"]
        with pytest.raises(ResourceError, match="is being written by process"):
            create_store(folder, resume=True)
    assert not (folder / LOCK).exists()


@pytest.mark.fault(27)
def test_a_lock_from_another_host_is_respected(folder):
    make(folder, "a")
    (folder / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(ResourceError, match=f"locked by process 1 on elsewhere .*delete .*{LOCK}"):
        create_store(folder, resume=True)
    assert (folder / LOCK).exists()
    (folder / LOCK).write_text("")
    create_store(folder, resume=True).close()


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EAGAIN", "EIO", "EBADF"])
def test_only_a_file_system_that_knows_no_locks_is_trusted(folder, caplog, monkeypatch, name):
    """A lock that another has is one; any other failure is told."""

    def flock(descriptor, how):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(core_files.fcntl, "flock", flock)
    core_files._tell_no_locks.cache_clear()  # it is told once
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        if name in ("ENOLCK", "EOPNOTSUPP", "ENOSYS"):
            create_store(folder).close()
            assert "take care that only one process writes" in caplog.text and not (folder / LOCK).exists()
            return
        with pytest.raises(ResourceError) as error:
            create_store(folder)
    assert ("is being written by" if name == "EAGAIN" else os.strerror(getattr(errno, name)).lower()) in str(
        error.value
    ).lower()
    assert "knows no locks" not in caplog.text


def test_a_lock_behind_a_url(caplog):
    url = f"memory://{uuid.uuid4().hex}/store"
    with create_store(url), pytest.raises(ResourceError, match="is being written by process"):
        create_store(url)
    keys = store_files.Keys(url, read_only=False)
    assert keys.get(LOCK) is None
    keys.put(LOCK, json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}).encode())
    with create_store(url):
        assert "did not end properly" in caplog.text


@pytest.mark.parametrize("refusal", [TypeError("mode"), NotImplementedError(), OSError(errno.ENOSYS, "NotImplemented")])
def test_a_lock_where_nothing_is_exclusive(monkeypatch, refusal):
    """As with servers that know no conditional writes: who comes later is refused, who was replaced ends."""
    plain = MemoryFileSystem.pipe_file

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if mode != "overwrite":
            raise refusal
        plain(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    url = f"memory://{uuid.uuid4().hex}/store"
    with create_store(url) as writer:
        with pytest.raises(ResourceError, match="is being written by process"):
            create_store(url)
        put(writer, "a")
        store_files.Keys(url, read_only=False).put(LOCK, b"{}")
        with pytest.raises(ResourceError, match="taken over by another"):
            put(writer, "b")
    assert [s.id for s in open_store(url).subjects] == ["a"]
    assert store_files.Keys(url, read_only=True).get(LOCK) == b"{}"  # it is not ours to remove


@pytest.mark.fault(24)
def test_the_disk_is_asked_before_writing(folder, monkeypatch):
    make(folder, "a")
    before = tree(folder)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store_files.shutil, "disk_usage", lambda _: usage(9, 9, 300_000))
    with create_store(folder, resume=True) as writer:
        for name in ("b", "a"):
            with pytest.raises(ResourceError, match=r"no space left on the disk: needs .* KiB, 293 KiB free"):
                put(writer, name)
    assert {**tree(folder), "manifest.json": b""} == {**before, "manifest.json": b""}
    assert [s.id for s in open_store(folder).subjects] == ["a"]


@pytest.mark.fault(24)
def test_a_disk_that_fills_up_leaves_the_finished_subjects(folder):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(-(2**15), 2**15, (60, 60, 60)).astype(np.int16)
    with create_store(folder) as writer:
        put(writer, "a")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # a write beyond fails, as on a full disk
        try:
            with pytest.raises(ResourceError, match="the size of a file"):
                put(writer, "b", image=noise)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    store = open_store(folder)
    assert [s.id for s in store.subjects] == ["a"] and store.verify() == []
    assert sorted(p.name for p in folder.iterdir()) == ["a", "manifest.json", "zarr.json"]


def test_a_large_manifest_is_replaced_less_often_and_ends_complete(folder, monkeypatch):
    monkeypatch.setattr(store_writer, "_LARGE", 0)
    clock = itertools.count()  # every look at the clock is one second later than the one before
    monkeypatch.setattr(store_writer, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    listed = []
    with create_store(folder) as writer:
        for i in range(30):
            put(writer, f"s{i}")
            listed.append(len(open_store(folder).subjects))
        writer.finish()
    assert 0 < len(set(listed)) - 1 < 15 and listed == sorted(listed)
    store = open_store(folder)
    assert len(store.subjects) == 30 and store.complete and store.verify() == []


@pytest.mark.fault(27)
@pytest.mark.parametrize("raw", [b"[" * 10**5, b'{"pid": 1e999, "host": "x"}', b'{"pid": "1", "host": "x"}', b"5", b""])
def test_a_lock_that_nobody_wrote_is_taken_over(folder, raw):
    """Ended in RecursionError or OverflowError."""
    make(folder, "a")
    (folder / LOCK).write_bytes(raw)
    with create_store(folder, resume=True) as writer:
        assert set(writer.finished) == {"a"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *(
            ({name: None}, f"its {name} is missing")
            for name in ("made_by", "needs", "settings", "complete", "subjects")
        ),
        ({"complete": 1}, "its complete is missing or of another kind"),
        *(({"root": root}, "its root is no fingerprint") for root in ("x", [1], [-1, "0" * 64], [1, "A" * 64])),
        ({"subjects": {"a" * 256: {}}}, "is no subject id"),
        ({"subjects": {"../a": {}}}, "is no subject id"),
        ({"subjects": {"a": 5}}, "a is no mapping"),
    ],
)
def test_a_manifest_that_no_writer_makes_is_refused_in_words(folder, change, told):
    make(folder, "a")
    manifest = store_files.read_manifest(store_files.Keys(folder, read_only=True))
    with pytest.raises(ValueError, match=told):
        store_files.check_manifest(manifest | change)
    store_files.check_manifest(manifest | {"root": None, "subjects": {}})
    store_files.check_manifest(manifest | {"subjects": {"a" * 255: manifest["subjects"]["a"]}})


def test_the_largest_volume_of_a_store_is_two_to_the_31(folder):
    make(folder, "a")
    manifest = store_files.read_manifest(store_files.Keys(folder, read_only=True))
    for shape, fits in (([2**16, 2**15, 1], True), ([2**16, 2**15 + 1, 1], False)):
        record = manifest["subjects"]["a"] | {"shape": shape}
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="voxels"):
            store_files.check_manifest(manifest | {"subjects": {"a": record}})
    for spacing, fits in ((1.0005, True), (1.002, False)):
        mm = [spacing * size for size in manifest["subjects"]["a"]["spacing"]]
        record = manifest["subjects"]["a"] | {"spacing": mm}
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="not that of its affine"):
            store_files.check_manifest(manifest | {"subjects": {"a": record}})


def test_a_reader_of_before_gets_what_is_listed_now_and_forgets_nothing_else(folder):
    make(folder, "a", "b")
    before = [open_store(folder) for _ in range(3)]
    with create_store(folder, resume=True) as writer:
        put(writer, "a", 7, label=False)
        put(writer, "c", 8)
        writer.finish()
    np.testing.assert_array_equal(before[0].read("a").image, volume(7))
    part = (slice(2, 5), slice(None), slice(1, 2))
    np.testing.assert_array_equal(before[1].read_region("a", "image", part), volume(7)[part])
    with pytest.raises(InputError, match="no subject c"):
        before[1].read("c")
    before[2].refresh()
    assert [s.id for s in before[2].subjects] == ["a", "b", "c"] and before[2].read("a").label is None
    (folder / "b/image/c/0/0/0").unlink()  # lost, not written anew
    with pytest.raises(InputError, match="b/image/c/0/0/0: missing"):
        before[0].read("b")


def test_tissues_alone_are_a_subject_and_types_are_kept(folder):
    some = np.arange(9 * 8 * 7).reshape(9, 8, 7)
    with create_store(folder) as writer:
        for name, dtype in (("a", np.uint8), ("b", np.uint16)):
            writer.write(name, "Train", None, 1, 0, None, None, OBLIQUE, {}, (some % 200).astype(dtype))
        for bad in (some.astype(np.int16), some[1:].astype(np.uint8)):
            with pytest.raises(InputError, match=r"its tissues is .*uint16 or uint8 on the image's grid for a tissues"):
                writer.write("c", "Train", volume(), 1, 0, None, None, OBLIQUE, {}, bad)
        with pytest.raises(InputError, match="neither an image nor tissues"):
            writer.write("c", "Train", None, 1, 0, some.astype(np.uint8), None, OBLIQUE, {})
        writer.finish()
    store = open_store(folder)
    for name, dtype in (("a", np.uint8), ("b", np.uint16)):
        sample, subject = store.read(name), store.subject(name)
        assert sample.image is None and sample.tissues.dtype == dtype and np.array_equal(sample.tissues, some % 200)
        assert (subject.has_image, subject.has_label, subject.has_mask, subject.has_tissues) == (
            False,
            False,
            False,
            True,
        )
        region = store.read_region(name, "tissues", (slice(1, 3),) * 3)
        assert region.dtype == dtype and np.array_equal(region, (some % 200)[1:3, 1:3, 1:3])


def test_a_check_tells_how_far_it_is(folder):
    class Told:
        def __init__(self):
            self.lines = []

        def start(self, *words):
            self.lines.append(words)

        def advance(self, n=1, **facts):
            self.lines.append((n, facts))

        def finish(self):
            self.lines.append("end")

    store = make(folder, "a", "b")
    (folder / "a/label/c/0/0/0").unlink()
    told = Told()
    assert len(store.verify(told)) == 1
    assert told.lines == [("verify", 2, "subject"), (1, {"damaged": 1}), (1, {"damaged": 1}), "end"]


def test_room_for_the_arrays_and_two_chunks_is_asked_for(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(store_writer, "need_space", lambda keys, n: asked.append(n))
    with create_store(folder) as writer:
        put(writer, "a", mask=True)  # int16, uint8, uint8
    assert asked == [9 * 8 * 7 * 4 + 2 * 64**3]


# --- object storage that fails, without a network ---------------------------------------------------------------------


def tried(*outcomes, done="read", limits=None, remote=None):
    """(the outcome or error, attempts) of a request that meets these one after the other, the last for ever."""
    remote = remote or store_files.Keys(f"memory://{uuid.uuid4().hex}/s", read_only=False).remote
    remote.limits = limits or Limits(2, 30.0, 0.0)
    calls = []

    async def attempt():
        calls.append(outcome := outcomes[min(len(calls), len(outcomes) - 1)])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    try:
        return sync(remote._patiently(done, "a/b", attempt)), len(calls)
    except Exception as error:
        return error, len(calls)


def test_a_request_is_tried_as_often_as_is_allowed_and_a_refusal_once():
    reset = OSError(104, "Connection reset")
    assert tried(reset, reset, 7) == (7, 3) and tried(7) == (7, 1)
    error, count = tried(reset)
    assert count == 3 and isinstance(error, ResourceError) and error.exit_code == 5
    assert error.what.endswith("/s/a/b") and error.reason.startswith(
        "cannot be read: Connection reset; 3 attempts in 0 s"
    )
    assert "FASTSRGAN_STORE_RETRIES" in error.hint
    error, count = tried(reset, limits=Limits(0, 30.0, 0.0))
    assert count == 1 and error.reason == "cannot be read: Connection reset"
    error, count = tried(PermissionError(13, "Permission denied"), done="listed")
    assert count == 1 and error.reason == "cannot be listed: Permission denied" and "credentials" in error.hint
    for name in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"):
        error, count = tried(type(name, (Exception,), {})("none"), done="written")
        assert count == 1 and "credentials" in error.hint
    error, count = tried(FileNotFoundError(2, "No such bucket"), done="written")
    assert count == 1 and error.hint == "does the bucket exist?"
    error, count = tried(FileNotFoundError(2, "none"))
    assert count == 1 and isinstance(error, FileNotFoundError)  # an answer


def test_after_one_that_was_given_up_others_are_tried_once_for_a_while():
    remote = store_files.Keys(f"memory://{uuid.uuid4().hex}/s", read_only=False).remote
    reset, limits = OSError(104, "Connection reset"), Limits(2, 30.0, 0.0)
    assert [tried(reset, limits=limits, remote=remote)[1] for _ in range(3)] == [3, 1, 1]
    remote._down_until -= 31
    assert tried(reset, limits=limits, remote=remote)[1] == 3


def test_the_limits_are_those_of_the_environment(monkeypatch):
    assert Limits() == Limits(retries=6, timeout=30.0, backoff=0.25)
    for name in ("RETRIES", "TIMEOUT", "BACKOFF"):
        monkeypatch.delenv(f"FASTSRGAN_STORE_{name}", raising=False)
    assert Limits.from_environment() == Limits()
    for name, text, value in (("RETRIES", "0", 0), ("TIMEOUT", "0.001", 0.001), ("BACKOFF", "0", 0.0)):
        with monkeypatch.context() as patched:
            patched.setenv(f"FASTSRGAN_STORE_{name}", text)
            assert Limits.from_environment() == dataclasses.replace(Limits(), **{name.lower(): value})
    monkeypatch.setenv("FASTSRGAN_STORE_TIMEOUT", "0.0005")
    with pytest.raises(UsageError, match=r"'0.0005' is not allowed .a number from 0.001 up, or unset it"):
        Limits.from_environment()


def test_s3_is_told_our_timeouts_one_attempt_and_the_endpoint(monkeypatch):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    found = store_remote._options("s3", Limits(5, 7.0, 1.0))
    assert {"connect_timeout": 7.0, "read_timeout": 7.0, "retries": {"total_max_attempts": 1}}.items() <= found[
        "config_kwargs"
    ].items()
    assert (found["max_concurrency"], found["use_listings_cache"]) == (1, False) and "endpoint_url" not in found
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
    assert store_remote._options("s3a", Limits())["endpoint_url"] == "http://all"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3")
    assert store_remote._options("s3", Limits())["endpoint_url"] == "http://s3"
    assert store_remote._options("memory", Limits()) == store_remote._options("https", Limits()) == {}


def test_a_request_without_an_end_is_cut_and_told():
    remote = store_files.Keys(f"memory://{uuid.uuid4().hex}/s", read_only=False).remote
    remote.limits = Limits(1, 0.002, 0.0)
    with pytest.raises(ResourceError, match=r"cannot be read: no end to the request .timeout.; 2 attempts"):
        sync(remote._patiently("read", "a", lambda: asyncio.sleep(3)))


def test_a_key_is_replaced_as_a_whole_or_not_at_all(folder, monkeypatch):
    keys = store_files.Keys(folder, read_only=False)
    folder.mkdir()
    keys.put("a", b"old")

    def half(path, data):
        path.open("wb").write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises((OSError, ResourceError)):
        keys.put("a", b"new")
    assert tree(folder) == {"a": b"old"}


def test_a_subject_is_on_the_disk_before_the_manifest_names_it(folder, monkeypatch):
    """Its files and every folder down to them; a power cut after the manifest leaves whole subjects."""
    synced, folders, real = [], [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), real(number))
    )
    monkeypatch.setattr(store_files, "sync_folder", folders.append)
    make(folder, "a")
    files = [str(path) for path in folder.rglob("a/**/*") if path.is_file()]
    last = max(synced.index(path) for path in files)
    assert len(files) == 5 and any("manifest" in path for path in synced[last + 1 :])
    assert {path for path in (folder, *folder.rglob("*")) if path.is_dir()} <= set(folders)


def test_a_subject_that_could_not_be_replaced_is_listed_no_more_and_leaves_nothing(folder, monkeypatch):
    make(folder, "a", "b")

    real = store_files.Keys.put_all

    def full(self, data):
        real(self, dict(list(data.items())[:2]))
        raise OSError(28, "No space left on device")

    with create_store(folder, resume=True) as writer, monkeypatch.context() as patched:
        patched.setattr(store_files.Keys, "put_all", full)
        with pytest.raises(ResourceError, match="no space left"):
            put(writer, "a", 5)
        assert list(writer.finished) == ["b"]
    store = open_store(folder)
    assert [s.id for s in store.subjects] == ["b"] and not store.complete and not (folder / "a").exists()


def test_what_a_write_gives_back_is_what_the_store_lists(folder):
    with create_store(folder) as writer:
        given = put(writer, "a", split="Test", scale=2.0, offset=1.0)
        writer.finish()
    (listed,) = open_store(folder).subjects
    for name in ("id", "split", "shape", "attrs", "arrays", "files", "spacing", "raw_bytes", "stored_bytes"):
        assert getattr(given, name) == getattr(listed, name), name
    assert given.arrays["image"] == {"dtype": "int16", "scale": 2.0, "offset": 1.0}


def test_replaced_subjects_are_not_looked_at_while_another_thread_takes_them_away(tmp_path, monkeypatch):
    """What `os.access` says of a folder that is just gone was told as missing permissions, now and then."""
    folder = tmp_path / "s.zarr"
    make(folder, "a", "b")
    with create_store(folder, overwrite=True) as writer:
        monkeypatch.setattr(store_writer.os, "walk", lambda *_: pytest.fail("looked at while it may be taken away"))
        put(writer, "b", seed=3)
        put(writer, "a", seed=4)
        monkeypatch.undo()
    assert sorted(subject.id for subject in open_store(folder).subjects) == ["a", "b"]
