"""Both readers, zarr and tensorstore, give the same arrays and the same errors; which one reads is said once."""

import asyncio
import functools
import http.server
import importlib.util
import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import make, put, tree, volume
from zarr.core.buffer import default_buffer_prototype

from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.store import codec as store_codec
from fastsrgan.store import files as store_files
from fastsrgan.store import reader as store_module
from fastsrgan.store.codec import META, encoded, pick_reader
from fastsrgan.store.files import check_array
from fastsrgan.store.reader import open_store
from fastsrgan.store.remote import fingerprint
from fastsrgan.store.writer import create_store

READERS = ("zarr", "tensorstore")
INSTALLED = importlib.util.find_spec("tensorstore") is not None
both = pytest.mark.skipif(not INSTALLED, reason="tensorstore is not installed")


def outcome(read):
    """What a reader gives: arrays, or the error as a user sees it."""
    try:
        found = read()
    except InputError as error:
        return str(error)
    return found


def equal_outcomes(one, other) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one == other
    pairs = [(one, other)] if isinstance(one, np.ndarray) else [(getattr(one, n), getattr(other, n)) for n in NAMES]
    return all(
        a is b is None or (a.dtype == b.dtype and a.flags.c_contiguous == b.flags.c_contiguous and np.array_equal(a, b))
        for a, b in pairs
    )


NAMES = ("image", "label", "mask")


@both
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (64, 64, 64), (65, 7, 129)])
def test_whole_arrays(tmp_path, dtype, shape):
    image = volume(1, shape, dtype)
    make(tmp_path / "store", "a", image=image, scale=0.37, offset=-3.0, mask=True)
    one, other = (open_store(tmp_path / "store", reader).read("a") for reader in READERS)
    assert equal_outcomes(one, other)
    kept = image if image.dtype.kind in "iu" else image.astype(np.float32)
    np.testing.assert_array_equal(other.image, (kept.astype(float) * 0.37 - 3).astype(np.float32))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """(store by reader, image) of 70 x 5 x 131 voxels."""
    folder = tmp_path_factory.mktemp("odd") / "store"
    image = volume(2, (70, 5, 131))
    make(folder, "a", image=image, scale=2.0, mask=True)
    return {reader: open_store(folder, reader) for reader in READERS[: 1 + INSTALLED]}, image


ends = st.one_of(st.none(), st.integers(-150, 150))
slices = st.builds(slice, ends, ends, st.one_of(st.none(), st.integers(1, 3)))


@both
@settings(max_examples=40, deadline=None)
@given(region=st.tuples(slices, slices, slices), name=st.sampled_from(NAMES))
def test_regions(odd, region, name):
    stores, image = odd
    one, other = (stores[reader].read_region("a", name, region) for reader in READERS)
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)
    if name == "image":
        np.testing.assert_array_equal(one, image[region].astype(np.float32) * 2)


def test_metadata_of_another_array_are_refused_before_anything_is_decoded():
    array = np.zeros((70, 5, 3), np.int16)
    meta = encoded({"arrays": {"image": {"dtype": "int16"}}}, {"image": array})[f"image/{META}"]
    check_array(meta, array.shape, "int16")
    changes = [("shape", [70, 5, 4]), ("data_type", "uint16"), ("zarr_format", 2), ("node_type", "group")]
    changes += [("storage_transformers", [{"name": "other"}]), ("codecs", []), ("chunk_grid", {"name": "regular"})]
    for key, value in changes:
        with pytest.raises(ValueError, match="metadata"):
            check_array(json.dumps(json.loads(meta) | {key: value}).encode(), array.shape, "int16")
    for shape, dtype in (((70, 5, 4), "int16"), ((70, 5, 3), "float32")):
        with pytest.raises(ValueError, match="metadata"):
            check_array(meta, shape, dtype)
    foreign = meta.replace(b'"blosc"', b'"zfpy"')
    assert foreign != meta
    with pytest.raises(ValueError, match="metadata"):
        check_array(foreign, array.shape, "int16")


@pytest.mark.parametrize("reader", [READERS[0], pytest.param(READERS[1], marks=both)])
@pytest.mark.parametrize("change", [{"data_type": "uint16"}, {"storage_transformers": [{"name": "other"}]}])
def test_metadata_that_a_manifest_vouches_for_are_compared_too_whatever_is_read(tmp_path, monkeypatch, reader, change):
    """Whole arrays, parts of them and the check: no library sees a codec that no writer takes."""
    store = make(tmp_path / "store", "a", image=volume(7, (70, 5, 6)), label=False)
    meta = tmp_path / "store" / "a/image" / META
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    keys = store_files.Keys(tmp_path / "store", read_only=False)
    manifest = store_files.read_manifest(keys)
    manifest["subjects"]["a"]["files"][f"image/{META}"] = fingerprint(meta.read_bytes())
    store_files.write_manifest(keys, manifest)
    for name in ("decode", "decode_region", "decode_ranges"):
        monkeypatch.setattr(store_module, name, lambda *_: pytest.fail("was decoded"))
    store = open_store(tmp_path / "store", reader)
    whole, part = np.s_[0:70, 0:5, 0:6], np.s_[1:3, 0:5, 0:6]
    for read in (store.read, *(lambda a, r=region: store.read_region(a, "image", r) for region in (whole, part))):
        with pytest.raises(InputError, match="its metadata are not those that the manifest asks for"):
            read("a")
    (fault,) = store.verify()
    assert fault == f"a/image/{META}: its metadata are not those that the manifest asks for"


def test_for_zarr_a_chunk_file_that_is_not_there_or_is_none_of_the_store_is_missing(tmp_path):
    store = make(tmp_path / "store", "a", "b", image=volume(7, (7, 5, 6)), label=False)
    shards = [f"{name}/image/c/0/0/0" for name in "ab"]
    (tmp_path / "store" / shards[0]).unlink()
    del store._subjects["b"]
    for key in shards:
        with pytest.raises(InputError, match=f"{key}: missing"):
            asyncio.run(store._ranges.get(key, default_buffer_prototype()))


def test_a_region_that_goes_backward(odd):
    with pytest.raises(ValueError, match="go forward"):
        odd[0]["zarr"].read_region("a", "image", (slice(9, 2, -1), slice(None), slice(None)))


def test_a_lack_of_memory_is_no_damage(odd, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(store_module, "decode", full)
    with pytest.raises(MemoryError):
        odd[0]["zarr"].read("a")


@both
def test_damage(tmp_path):
    """Every kind of damage at many places: the same arrays or the same words from both, for a whole and for a part."""
    folder = tmp_path / "store"
    make(folder, "a", image=volume(3, (66, 9, 8)))
    files = {key: data for key, data in tree(folder).items() if key.startswith("a/") and key != "a/zarr.json"}
    kinds = {"read": 0, "refused": 0}
    for key, data in files.items():
        path = folder / key
        flips = [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in range(3, len(data), len(data) // 7)]
        for broken in (*flips, data[: len(data) // 2], data + b"\0", b"", b"{}", bytes(len(data))):
            path.write_bytes(broken)
            assert_both_readers_agree_on_damage(folder, kinds)
        path.unlink()
        assert_both_readers_agree_on_damage(folder, kinds)
        path.write_bytes(data)
    assert kinds["refused"] > 20 and kinds["read"] > 20  # other arrays, and parts beside the damage, are still read


def assert_both_readers_agree_on_damage(folder: Path, kinds: dict[str, int]) -> None:
    one, other = (outcome(functools.partial(open_store(folder, reader).read, "a")) for reader in READERS)
    assert equal_outcomes(one, other) and isinstance(one, str) and ": a/" in one
    for name in NAMES[:2]:
        part = (slice(64, 66), slice(None), slice(2, 3))
        reads = [functools.partial(open_store(folder, reader).read_region, "a", name, part) for reader in READERS]
        one, other = map(outcome, reads)
        assert equal_outcomes(one, other), (name, one, other)
        kinds["refused" if isinstance(one, str) else "read"] += 1


@pytest.mark.fault(30)
@pytest.mark.parametrize("reader", [READERS[0], pytest.param(READERS[1], marks=both)])
def test_a_chunk_that_is_missing_is_an_error_in_every_reader(tmp_path, reader):
    """Lost files, shards that end too early, and sound shards of the right size whose index says that one is gone."""
    folder = tmp_path / "store"
    image = volume(6, (70, 5, 6))
    make(folder, "a", image=image, label=False)
    path = folder / "a/image/c/0/0/0"
    whole = path.read_bytes()
    chunks = 2
    index = whole[-(16 * chunks + 4) : -4]
    gone = index[:16] + b"\xff" * 16
    lost = whole[: -(16 * chunks + 4)] + gone + crc32c(gone).to_bytes(4, "little")
    regions = [np.s_[66:68, 0:2, 0:2], np.s_[0:70:2, 0:5, 0:6], np.s_[0:70, 0:5, 0:6]]
    for damaged in (None, whole[:-60], lost):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        for region in regions:
            with pytest.raises(InputError, match="a/image"):
                open_store(folder, reader).read_region("a", "image", region)
        with pytest.raises(InputError, match="a/image"):
            open_store(folder, reader).read("a")
        path.write_bytes(whole)
    for region in regions:
        np.testing.assert_array_equal(open_store(folder, reader).read_region("a", "image", region), image[region])


@pytest.mark.fault(30)
@pytest.mark.parametrize("reader", [READERS[0], pytest.param(READERS[1], marks=both)])
def test_nothing_is_read_of_a_shard_of_another_size(tmp_path, reader):
    """Also where its index is sound and the chunk that is asked for is whole: another one may be lost."""
    folder = tmp_path / "store"
    make(folder, "a", image=volume(6, (70, 5, 6)), label=False)
    path = folder / "a/image/c/0/0/0"
    whole = path.read_bytes()
    index = np.frombuffer(whole[-(16 * 2 + 4) : -4], "<u8").reshape(2, 2)
    chunk, last = index[:, 0].argsort()  # the one whose bytes come first, and the one behind it
    end = int(index[last].sum())
    part = np.s_[0:2, 0:2, 0:2] if chunk == 0 else np.s_[66:68, 0:2, 0:2]
    open_store(folder, reader).read_region("a", "image", part)
    for damaged in (whole[: end - 9] + whole[end:], whole[:end] + b"\0" + whole[end:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{len(damaged)} bytes where {len(whole)} were written"):
            open_store(folder, reader).read_region("a", "image", part)


@pytest.mark.fault(30)
@pytest.mark.parametrize("reader", [READERS[0], pytest.param(READERS[1], marks=both)])
def test_a_shard_of_another_size_is_refused_at_every_read(tmp_path, reader):
    """Not at the first alone: a sound shard of another subject, copied here, holds sound chunks of other voxels."""
    folder = tmp_path / "store"
    images = [volume(seed, (70, 5, 6)) for seed in (0, 1)]
    with create_store(folder) as writer:
        put(writer, "a", image=images[0], label=False)
        put(writer, "b", image=images[1] // 64, label=False)  # of fewer bytes
        writer.finish()
    other = (folder / "b/image/c/0/0/0").read_bytes()
    assert len(other) < (folder / "a/image/c/0/0/0").stat().st_size
    (folder / "a/image/c/0/0/0").write_bytes(other)
    store, part = open_store(folder, reader), np.s_[0:2, 0:2, 0:2]
    for _ in range(3):
        with pytest.raises(InputError, match=f"{len(other)} bytes where"):
            store.read_region("a", "image", part)
    np.testing.assert_array_equal(store.read_region("b", "image", part), images[1][part] // 64)


def crc32c(data: bytes) -> int:
    """The checksum of an index, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@both
def test_many_threads_share_a_store(odd):
    stores, _ = odd
    for store in stores.values():
        expected, wrong = store.read("a"), []

        def loop(store=store, expected=expected, wrong=wrong):
            wrong.extend(1 for _ in range(4) if not equal_outcomes(store.read("a"), expected))

        threads = [threading.Thread(target=loop) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong


def test_a_subject_written_anew_is_read_as_it_is_now(tmp_path):
    store = make(tmp_path / "store", "a", "b")
    with create_store(tmp_path / "store", resume=True) as writer:
        put(writer, "a", 9, "Test", label=False)
        writer.finish()
        sample = store.read("a")
        assert sample.split == "Test" and sample.label is None
        np.testing.assert_array_equal(sample.image, volume(9))
        np.testing.assert_array_equal(store.read("b").image, volume(1))


def test_a_file_of_another_store_is_not_taken_for_ours(tmp_path):
    """Same size, sound checksums, other voxels: the manifest's SHA-256 tells."""
    noise = [np.random.default_rng(i).integers(-(2**15), 2**15, (64, 64, 64)).astype(np.int16) for i in range(2)]
    store = make(tmp_path / "one", "a", image=noise[0], label=False)
    make(tmp_path / "two", "a", image=noise[1], label=False)
    shard = "a/image/c/0/0/0"
    other = (tmp_path / "two" / shard).read_bytes()
    assert len(other) == (tmp_path / "one" / shard).stat().st_size
    (tmp_path / "one" / shard).write_bytes(other)
    with pytest.raises(InputError, match="not what was written"):
        store.read("a")
    assert store.verify() == [f"{shard}: not what was written"]


# --- which reader -------------------------------------------------------------------------------------------------


def test_the_reader_is_chosen_and_told_once(monkeypatch, caplog):
    monkeypatch.setattr(store_codec, "_named_readers", set())
    monkeypatch.setattr(store_codec.importlib.util, "find_spec", lambda name: object())
    with caplog.at_level(logging.INFO, "fastsrgan"):
        assert [pick_reader(), pick_reader("zarr"), pick_reader(), pick_reader("zarr")] == ["tensorstore", "zarr"] * 2
    assert [r.message for r in caplog.records] == ["stores are read with tensorstore", "stores are read with zarr"]
    monkeypatch.setenv("FASTSRGAN_READER", "zarr")
    assert pick_reader() == "zarr" and pick_reader("tensorstore") == "tensorstore"
    monkeypatch.setenv("FASTSRGAN_READER", "fast")
    with pytest.raises(UsageError, match=r"FASTSRGAN_READER: 'fast' is no reader .auto, zarr or tensorstore"):
        pick_reader()


def test_without_tensorstore_zarr_reads(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(store_codec, "_named_readers", set())
    monkeypatch.setattr(store_codec.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "fastsrgan"):
        store = make(tmp_path / "store", "a")
    np.testing.assert_array_equal(store.read("a").image, volume(0))
    assert store.reader == "zarr" and "tensorstore, which is faster, is not installed" in caplog.text
    monkeypatch.setenv("FASTSRGAN_READER", "tensorstore")
    with pytest.raises(ResourceError, match=r"tensorstore is not installed .pip install 'fastsrgan\[tensorstore\]'"):
        open_store(tmp_path / "store")


# --- stores on a web server ---------------------------------------------------------------------------------------


class _Files(http.server.SimpleHTTPRequestHandler):
    """Knows no ranges: it sends whole files."""

    def log_message(self, *args):
        pass


def test_a_store_on_a_web_server_is_read_only(tmp_path):
    pytest.importorskip("aiohttp", reason="http:// needs aiohttp, which comes with fastsrgan[s3]")
    image = volume(4, (70, 9, 8))
    make(tmp_path / "store", "a", image=image)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Files, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        store = open_store(f"{url}/store")
        np.testing.assert_array_equal(store.read("a").image, image)
        part = (slice(65, 69), slice(2, 9), slice(7))
        np.testing.assert_array_equal(store.read_region("a", "image", part), image[part])
        assert store.verify() == []
        with pytest.raises(InputError, match="no fastsrgan store"):
            open_store(f"{url}/other")
        with pytest.raises(UsageError, match="can only be read"):
            create_store(f"{url}/new")
        (tmp_path / "store/a/image/c/0/0/0").unlink()
        for region in (part, (slice(None),) * 3):
            with pytest.raises(InputError, match="a/image/c/0/0/0: missing"):
                store.read_region("a", "image", region)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("chunk_grid", "name"), "rectangular"),
        (("chunk_grid", "configuration", "chunk_shape"), [64, 64, 64]),
        (("codecs", 0, "name"), "other"),
        (("codecs", 0, "configuration", "chunk_shape"), [32, 64, 64]),
        (("codecs", 0, "configuration", "codecs", 0, "name"), "pickle"),
        (("codecs", 0, "configuration", "index_codecs", 0, "name"), "pickle"),
        (("codecs", 0, "configuration", "index_codecs", 0, "name"), 5),
    ],
)
def test_every_part_of_the_metadata_is_compared(place, value):
    array = np.zeros((70, 5, 3), np.int16)
    found = json.loads(encoded({"arrays": {"image": {"dtype": "int16"}}}, {"image": array})[f"image/{META}"])
    part = found
    for key in place[:-1]:
        part = part[key]
    assert part[place[-1]] != value
    part[place[-1]] = value
    with pytest.raises(ValueError, match="metadata"):
        check_array(json.dumps(found).encode(), array.shape, "int16")
