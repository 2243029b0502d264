"""Sample panels of a training run, RUN/panels/epoch-0001.png: one picture per validation, for the report."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np

from fastsrgan.core.runtime import atomic_write, output_folder

FOLDER = "panels"
_NAME = re.compile(r"epoch-(\d+)\.png")


def write_panel(run: Path, epoch: int, sheet_HW: np.ndarray) -> Path:
    """Write a grey picture, values in [0, 1], as the panel of an epoch; one that is there is replaced."""
    path = output_folder(run / FOLDER) / f"epoch-{epoch:04d}.png"
    grey = np.rint(np.clip(np.nan_to_num(sheet_HW), 0, 1) * 255).astype(np.uint8)
    with atomic_write(path) as temporary:
        temporary.write_bytes(png(grey))
    return path


def find_panels(run: Path) -> list[tuple[int, Path]]:
    """(epoch, file) of a run's panels, first to last."""
    found = [(match, path) for path in (run / FOLDER).glob("*.png") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def cut_panels(run: Path, epoch: int) -> None:
    """Forget the panels from an epoch on, which a resumed run makes again."""
    for at, path in find_panels(run):
        if at >= epoch:
            path.unlink(missing_ok=True)


def png(pixels: np.ndarray) -> bytes:
    """(H, W) grey or (H, W, 3) colour pixels, uint8, as a PNG file."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = pixels.shape[:2]
    # Every row begins with its filter: 0, none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
