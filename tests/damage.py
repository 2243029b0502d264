"""Faults that several tests make: damaged and lying images, weights that lead elsewhere, pickles that run code."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import h5py
from nifti_files import header_of, rigid

from fastsrgan.model import checkpoint

MIB = 1 << 20
GOLDEN = Path(__file__).parent / "golden" / "weights_residual_mask3.h5"
LAYER = "G/G_gen_conv2/kernel:0"


def cut(path: Path, keep: int) -> None:
    """Keep the first bytes of a file, or with a negative number leave so many out."""
    path.write_bytes(path.read_bytes()[:keep])


def flip(path: Path, at: int) -> None:
    """Change one byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x55
    path.write_bytes(raw)


def claims_64_tib(path: Path) -> None:
    """A header of enormous sizes, and next to nothing behind it."""
    block = header_of((1, 1, 1), "i2", rigid(), dim=(slice(1, 4), (32767, 32767, 32767)))
    path.write_bytes(gzip.compress(block + bytes(100), mtime=0))


def bomb(path: Path) -> None:
    """0.7 MB that are 675 MB."""
    piece = gzip.compress(bytes(15 * MIB), 9, mtime=0)
    path.write_bytes(gzip.compress(header_of((704, 704, 714), "i2", rigid()) + bytes(4), mtime=0) + piece * 45)


def keras_with(path: Path, kind: str) -> None:
    """The golden weights with one layer that is "a link" to another file, "4 TiB" large, or of "another shape"."""
    shutil.copyfile(GOLDEN, path)
    with h5py.File(path, "r+") as file:
        del file[LAYER]
        if kind == "a link":
            file[LAYER] = h5py.ExternalLink("/etc/passwd", "/x")
        else:
            last = 2**40 // 54 if kind == "4 TiB" else 9
            file.create_dataset(LAYER, shape=(3, 3, 3, 2, last), dtype="f4")


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def strange_state(run: Path, canary: Path) -> None:
    """The optimisers' state of a run becomes a pickle; the snapshot's manifest fits it."""
    snapshot = checkpoint.newest(run)
    with zipfile.ZipFile(snapshot / "state.pt", "w") as archive:
        archive.writestr("state/data.pkl", pickle.dumps({"models": Canary(canary)}))
        archive.writestr("state/version", "3")
    relisted(snapshot, "state.pt")


def relisted(snapshot: Path, name: str) -> None:
    """The manifest of a snapshot lists a file as it is now."""
    listed = checkpoint.manifest(snapshot)
    size, digest = (snapshot / name).stat().st_size, checkpoint.sha256(snapshot / name)
    listed["files"][name] = {"bytes": size, "sha256": digest}
    (snapshot / checkpoint.MANIFEST).write_text(json.dumps(listed), encoding="utf8")
