"""Arrays as the bytes of a store's files and back. The layout is told in `fastsrgan.store.reader`.

Encoding is zarr-python's; decoding is tensorstore's where it is installed, else zarr-python's, and both give the same
arrays. tensorstore decodes chunks in threads of its own, which do not survive a fork: processes that read must be
started by spawn or forkserver.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.storage import MemoryStore, WrapperStore

from fastsrgan.core.files import is_special
from fastsrgan.errors import FastsrganError, InputError, ResourceError, UsageError, some_of

log = logging.getLogger("fastsrgan")

META, SHARD = "zarr.json", "c/0/0/0"
CHUNK = 64
ENTRY, CHECKSUM = 16, 4  # bytes of a chunk's place and size in the index of a shard, and of what ends it
VARIABLE = "FASTSRGAN_READER"
REPAIR = "`fastsrgan convert --resume` writes damaged subjects again"
Files = dict[str, bytes]  # META and SHARD of one array
_named_readers: set[str] = set()


def encoded(attributes: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """key below a subject -> bytes: its group with attributes, and two files for each (X, Y, Z) array.

    What ``attributes["arrays"]`` says of an array beside its type becomes that array's attributes.
    """
    files = {META: group_bytes(attributes)}
    for name, array in arrays.items():
        contents: dict[str, Buffer] = {}
        created = zarr.create_array(
            MemoryStore(contents),
            shape=array.shape,
            dtype=array.dtype,
            chunks=(CHUNK,) * 3,
            shards=tuple(-(-n // CHUNK) * CHUNK for n in array.shape),
            compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()],
            fill_value=0,
            attributes={key: value for key, value in attributes["arrays"][name].items() if key != "dtype"},
            dimension_names=("x", "y", "z"),
            config={"write_empty_chunks": True},
        )
        created[...] = array
        files |= {f"{name}/{key}": contents[key].to_bytes() for key in (META, SHARD)}
    return files


def group_bytes(attributes: dict[str, Any]) -> bytes:
    """META of a group."""
    contents: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(contents), attributes=attributes)
    return contents[META].to_bytes()


def pick_reader(name: str | None = None) -> str:
    """Which library reads: the one asked for here or by FASTSRGAN_READER, else tensorstore where it is installed.

    Raises UsageError for another name, ResourceError when tensorstore is asked for and missing.
    """
    name = name or os.environ.get(VARIABLE) or "auto"
    if name not in ("auto", "zarr", "tensorstore"):
        raise UsageError(VARIABLE, f"{name!r} is no reader", "auto, zarr or tensorstore")
    installed = importlib.util.find_spec("tensorstore") is not None
    if name == "tensorstore" and not installed:
        raise ResourceError(VARIABLE, "tensorstore is not installed", "pip install 'fastsrgan[tensorstore]'")
    found = "tensorstore" if installed and name != "zarr" else "zarr"
    if found not in _named_readers:
        _named_readers.add(found)
        slower = "" if installed or name == "zarr" else ": tensorstore, which is faster, is not installed"
        log.info("stores are read with %s%s", found, slower)
    return found


def decode(reader: str, files: Files) -> np.ndarray:
    """A whole array, (X, Y, Z) as stored, from its files. Raises whatever the library raises on damaged bytes."""
    if reader == "zarr":
        return np.asarray(_memory_array(files)[...])
    whole = tuple(slice(0, n) for n in json.loads(files[META])["shape"])
    return _read_tensorstore({"driver": "memory"}, whole, files)


def decode_region(folder: Path, region: tuple[slice, ...]) -> np.ndarray:
    """Part of an array in a folder with tensorstore; slices have start and stop within the array, and step 1."""
    return _read_tensorstore({"driver": "file", "path": f"{folder.absolute()}/"}, region, None)


def decode_ranges(store: NothingMissing, path: str, region: tuple[slice, ...]) -> np.ndarray:
    """Part of an array in any store with zarr, by ranges of its shard; slices as for `decode_region`."""
    return np.asarray(zarr.open_array(store, path=path, mode="r", zarr_format=3)[region])


def damaged_chunks(files: Files, shape: tuple[int, int, int]) -> list[str]:
    """What is wrong with an array's files: one line for each chunk that cannot be decoded, by its place in the grid."""
    try:
        array = _memory_array(files)
        if array.shape != shape:
            raise ValueError(f"is {array.shape}, the manifest says {shape}")
    except Exception as error:  # JSON and zarr each fail in their own ways
        return [in_words(error)]
    grid = list(itertools.product(*(range(-(-n // CHUNK)) for n in shape)))
    bad = []
    for position in grid:
        try:
            array[tuple(slice(i * CHUNK, (i + 1) * CHUNK) for i in position)]
        except Exception as error:
            bad.append((position, in_words(error)))
    told = {told for _, told in bad}
    if len(bad) == len(grid) > 1 == len(told):  # as when the index at the end of the shard is damaged
        return [f"each of its {len(grid)} chunks {told.pop()}"]
    return [f"chunk {position} {told}" for position, told in bad]


def in_words(error: Exception) -> str:
    """An error of zarr, tensorstore or a codec in one short line."""
    text = error.reason if isinstance(error, FastsrganError) else str(error)
    if "checksum" in text:
        return "is damaged (crc32c)"
    return " ".join(text.split())[:160] or type(error).__name__


def _memory_array(files: Files) -> zarr.Array:
    store = MemoryStore({key: cpu.Buffer.from_bytes(data) for key, data in files.items()})
    return zarr.open_array(store, mode="r", zarr_format=3)


def _read_tensorstore(place: dict[str, str], region: tuple[slice, ...], files: Files | None) -> np.ndarray:
    import tensorstore

    context = tensorstore.Context()  # its memory driver is this context's own
    if files is not None:
        keys = tensorstore.KvStore.open(place, context=context).result()
        for key, data in files.items():
            keys[key] = data
    # What is missing is lost: never the fill value.
    spec = {"driver": "zarr3", "kvstore": place, "fill_missing_data_reads": False}
    array = tensorstore.open(spec, context=context, read=True).result()
    return np.ascontiguousarray(array[region].read().result())


class NothingMissing(WrapperStore[Store]):
    """A store in which a lost or shortened chunk file, or a chunk lost in it, is an error: zarr itself reads the fill
    value. ``listed`` : key -> bytes of the file and how many chunks it holds."""

    def __init__(self, store: Store, url: str, listed: Callable[[str], tuple[int, int] | None]) -> None:
        super().__init__(store)
        self._url, self._listed = url, listed
        self._seen: set[tuple[str, int]] = set()

    def with_read_only(self, read_only: bool = False) -> NothingMissing:
        return NothingMissing(self._store.with_read_only(read_only), self._url, self._listed)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        root = getattr(self._store, "root", None)
        special = root is not None and is_special(Path(root) / key)
        found = None if special else await self._store.get(key, prototype, byte_range)
        if not key.endswith(f"/{SHARD}"):
            return found
        listed = self._listed(key)
        if found is None or listed is None:
            raise InputError(self._url, f"{key}: missing", REPAIR)
        expected, chunks = listed
        if byte_range is not None and len(found) == expected:  # an HTTP server that knows no ranges sent all
            found = found[_as_slice(byte_range, expected)]
        if byte_range is None or isinstance(byte_range, SuffixByteRequest):  # the index is at the end
            self._check_index(key, found.to_bytes(), chunks)
        if byte_range is not None and (key, expected) in self._seen:
            return found
        size = len(found) if byte_range is None else await self._store.getsize(key)
        if size != expected:
            raise InputError(self._url, f"{key}: {size} bytes where {expected} were written", REPAIR)
        self._seen.add((key, expected))
        return found

    def _check_index(self, key: str, data: bytes, chunks: int) -> None:
        """InputError where the index, place and size of each chunk and a checksum, says that one is not there."""
        index = data[-(CHECKSUM + ENTRY * chunks) : -CHECKSUM]
        lost = [n for n in range(len(index) // ENTRY) if index[n * ENTRY : (n + 1) * ENTRY] == b"\xff" * ENTRY]
        if lost:
            raise InputError(self._url, f"{key}: {some_of(len(lost), chunks, 'chunk', 'is', 'are')} missing", REPAIR)


def _as_slice(wanted: ByteRequest, size: int) -> slice:
    if isinstance(wanted, RangeByteRequest):
        return slice(wanted.start, wanted.end)
    return slice(wanted.offset if isinstance(wanted, OffsetByteRequest) else max(0, size - wanted.suffix), size)
