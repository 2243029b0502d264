"""What a store's manifest and the metadata of its arrays may say, checked before anything is believed.

A digest says that a manifest is whole, not who wrote it. Names that lead out of the store, files that are none of a
subject's, sizes beyond all volumes and codecs that no fastsrgan writes are refused here, whoever made the store.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np

from fastsrgan.volume.geometry import spacing_of

ARRAYS = ("image", "label", "mask", "tissues")
LABELS = {"label": {"uint8"}, "mask": {"uint8"}, "tissues": {"uint8", "uint16"}}
SPLITS = ("Train", "Test")
SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
META, SHARD, CHUNK = "zarr.json", "c/0/0/0", 64
MAX_VOXELS = 2**31
_TYPES = {"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_INNER = {"bytes", "blosc", "crc32c"}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, in words, where a manifest is not what a writer makes."""
    kinds = {"made_by": str, "needs": str, "settings": dict, "complete": bool, "subjects": dict}
    for name, kind in kinds.items():
        _demand(isinstance(manifest.get(name), kind), f"its {name} is missing or of another kind")
    root = manifest.get("root", "missing")
    _demand(root is None or _is_fingerprint(root), "its root is no fingerprint")
    for name, record in manifest["subjects"].items():
        _demand(bool(SUBJECT.fullmatch(name)) and len(name) <= 255, f"{name[:80]!r} is no subject id")
        _demand(isinstance(record, dict), f"{name} is no mapping")
        try:
            _check_subject(record)
        except (TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"{name[:80]}: {type(error).__name__} {str(error)[:80]}") from error
        except ValueError as error:
            raise ValueError(f"{name[:80]}: {error}") from error


def _check_subject(record: dict[str, Any]) -> None:
    _demand(record["split"] in SPLITS, "its split is neither Train nor Test")
    shape = record["shape"]
    _demand(isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape), "its shape")
    _demand(math.prod(shape) <= MAX_VOXELS, f"more than {MAX_VOXELS} voxels")
    affine = np.array(record["affine"], float)
    _demand(affine.shape == (4, 4) and bool(np.isfinite(affine).all()), "its affine is none")
    _demand(abs(np.linalg.det(affine[:3, :3])) > 0, "its affine is singular")
    spacing = np.array(record["spacing"], float)
    _demand(spacing.shape == (3,) and bool((np.isfinite(spacing) & (spacing > 0)).all()), "its spacing is none")
    _demand(np.allclose(spacing, spacing_of(affine), rtol=1e-3, atol=0), "its spacing is not that of its affine")
    _demand(isinstance(record["attrs"], dict), "its attributes are no mapping")
    arrays = record["arrays"]
    _demand(isinstance(arrays, dict) and set(arrays) <= set(ARRAYS), "its arrays")
    _demand("image" in arrays or "tissues" in arrays, "it has neither an image nor tissues")
    for name, array in arrays.items():
        allowed = LABELS.get(name, _TYPES)
        _demand(isinstance(array, dict) and array.get("dtype") in allowed, f"its {name} is of an unknown type")
    scaling = [arrays["image"][key] for key in ("scale", "offset")] if "image" in arrays else []
    _demand(all(type(v) in (int, float) and math.isfinite(v) for v in scaling), "its intensity scaling")
    wanted = {META, *(f"{name}/{end}" for name in arrays for end in (META, SHARD))}
    files = record["files"]
    _demand(isinstance(files, dict) and set(files) == wanted, "its files are not those of its arrays")
    _demand(all(_is_fingerprint(found) for found in files.values()), "its files have no fingerprints")


def check_array(meta: bytes, shape: tuple[int, int, int], dtype: str) -> None:
    """Raise ValueError where an array's metadata are not what a writer makes for this shape and type.

    Nothing else is handed to a library that decodes: no foreign codec, no size that the manifest does not know.
    """
    try:
        found = json.loads(meta)
        told = {key: found[key] for key in ("zarr_format", "node_type", "shape", "data_type")}
        grid, (shards,) = found["chunk_grid"], found["codecs"]
        inside = shards["configuration"]
        codecs = [codec["name"] for codec in inside["codecs"] + inside["index_codecs"]]
        cut = (grid["name"], grid["configuration"]["chunk_shape"], shards["name"], inside["chunk_shape"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("its metadata are not those of a fastsrgan store") from error
    same = {"zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": dtype}
    whole = [-(-n // CHUNK) * CHUNK for n in shape]
    fits = cut == ("regular", whole, "sharding_indexed", [CHUNK] * 3) and not found.get("storage_transformers")
    if told != same or not fits or not all(isinstance(c, str) and c in _INNER for c in codecs):
        raise ValueError("its metadata are not those that the manifest asks for")


def _is_fingerprint(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and type(value[0]) is int
        and value[0] >= 0
        and isinstance(value[1], str)
        and bool(_DIGEST.fullmatch(value[1]))
    )


def _demand(true: bool, told: str) -> None:
    if not true:
        raise ValueError(told)
