"""Planes cut through volumes in world space (mm, RAS+), whatever each volume's orientation and voxel size.

Sample panels of a training run, RUN/panels/epoch-0001.png: one picture per validation, for the report.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from fastsrgan.core.files import atomic_write, output_folder
from fastsrgan.errors import InputError
from fastsrgan.volume.geometry import Volume

# Name, world axis cut through, world axis to the right, world axis upwards.
PLANES = (("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2))
ENDS = (("L", "R"), ("P", "A"), ("I", "S"))  # low and high end of each world axis
MARGIN_MM = 3.0
OBJECT = 0.05  # of the reference's brightness: what is above it decides the extent
FILLED = 0.97  # of what can be had: share of object in the detail
LATERAL = 0.1  # of the object's width: the sagittal plane keeps off the cleft between the hemispheres


@dataclass(frozen=True)
class Cut:
    """A plane in the world: its place on the axis it cuts, and the pixel centres along the two others, in mm."""

    name: str
    axis: int
    at: float
    right: int
    up: int
    u: np.ndarray
    v: np.ndarray

    @property
    def pitch(self) -> float:
        """Distance of two pixels in mm."""
        return float(self.u[1] - self.u[0])

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom and top edge of the pixels in mm."""
        half = self.pitch / 2
        return float(self.u[0]) - half, float(self.u[-1]) + half, float(self.v[0]) - half, float(self.v[-1]) + half

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in mm."""
        return len(self.u) * self.pitch, len(self.v) * self.pitch

    def sample(self, volume: Volume, nearest: bool = False) -> np.ndarray:
        """(len(v), len(u)) float32 values of a volume in this plane, 0 outside its field of view.

        Linear between voxels, or the nearest voxel. On a grid that the plane follows these are the voxels themselves.
        """
        u, v = np.meshgrid(self.u, self.v)
        world = np.empty((4, u.size))
        world[self.axis], world[self.right], world[self.up], world[3] = self.at, u.ravel(), v.ravel(), 1
        voxel = (np.linalg.inv(volume.affine) @ world)[:3]
        limit = np.array(volume.data.shape)[:, None] - 0.5
        inside = np.all((voxel > -0.5 - 1e-6) & (voxel < limit + 1e-6), axis=0)
        order = 0 if nearest else 1
        data = volume.data if volume.data.dtype != bool else volume.data.astype(np.uint8)
        values = ndimage.map_coordinates(data, voxel, np.float32, order=order, mode="nearest", prefilter=False)
        return np.where(inside, values, 0).reshape(u.shape)

    def part(self, columns: slice, rows: slice) -> Cut:
        """A rectangle of this plane."""
        return replace(self, u=self.u[columns], v=self.v[rows])


def cuts(reference: Volume, at_mm: Sequence[float] | None = None) -> list[Cut]:
    """Axial, coronal and sagittal plane through ``at_mm`` (R, A, S) that show the whole object, equally wide.

    Pixels have the reference's smallest voxel size and sit on its voxel centres where its axes follow the world's.
    Default place: the centre of intensity, the sagittal plane a tenth of the width beside it.
    Raises InputError when the reference holds nothing above 0.
    """
    level = OBJECT * brightness(reference)
    bright = reference.data > level
    box = ndimage.find_objects(bright.astype(np.uint8))[0]
    corners = np.stack(np.meshgrid(*((s.start - 0.5, s.stop - 0.5) for s in box), indexing="ij")).reshape(3, -1)
    world = (reference.affine @ np.vstack([corners, np.ones(8)]))[:3]
    low, high = world.min(1) - MARGIN_MM, world.max(1) + MARGIN_MM
    if at_mm is None:
        centre = (reference.affine @ [*ndimage.center_of_mass(bright), 1])[:3]
        centre[0] += LATERAL * (high[0] - low[0])
    else:
        centre = np.asarray(at_mm, float)
    # On a voxel centre, so that a reference along the world's axes is shown without interpolation.
    voxel = np.rint(np.linalg.inv(reference.affine) @ [*centre, 1])
    centre = (reference.affine @ voxel)[:3]
    pitch = min(reference.spacing)
    first = np.minimum(np.ceil((low - centre) / pitch), -1).astype(int)
    last = np.maximum(np.floor((high - centre) / pitch), 1).astype(int)
    widest = max(int(last[u] - first[u]) for _, _, u, _ in PLANES)
    planes = []
    for name, axis, u, v in PLANES:
        before = (widest - int(last[u] - first[u])) // 2
        right = centre[u] + pitch * (np.arange(widest + 1) + first[u] - before)
        upwards = centre[v] + pitch * np.arange(first[v], last[v] + 1)
        planes.append(Cut(name, axis, float(centre[axis]), u, v, right, upwards))
    return planes


def detail(
    cut: Cut,
    width_mm: float,
    height_mm: float,
    reference: Volume,
    compared: Volume | None = None,
    within: Volume | None = None,
) -> Cut:
    """The rectangle of a plane where ``compared`` differs most from the reference (sum of squares); without it, where
    the reference varies most. It lies inside the object as far as it can: the sharp rim against the background would
    win otherwise. ``within``: only differences inside this mask count. Never larger than the plane."""
    rows = min(len(cut.v), max(2, round(height_mm / cut.pitch)))
    columns = min(len(cut.u), max(2, round(width_mm / cut.pitch)))
    there = cut.sample(reference)
    energy = (there - (ndimage.gaussian_filter(there, 2) if compared is None else cut.sample(compared))) ** 2
    if within is not None:
        energy = energy * (cut.sample(within, nearest=True) > 0.5)
    filled = _box_sums(there > OBJECT * brightness(reference), rows, columns)
    scores = np.where(filled >= FILLED * filled.max(), _box_sums(energy, rows, columns), -1)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    return cut.part(slice(column, column + columns), slice(row, row + rows))


def _box_sums(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Sums over every rectangle of (rows, columns) that fits: (V, U) -> (V - rows + 1, U - columns + 1)."""
    total = np.pad(values.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return total[rows:, columns:] - total[:-rows, columns:] - total[rows:, :-columns] + total[:-rows, :-columns]


def brightness(reference: Volume) -> float:
    """The 99.9th percentile of what is above 0: white in a picture. Raises InputError when nothing is."""
    positive = reference.data[reference.data > 0]
    if positive.size == 0:
        raise InputError("picture", "the reference image holds nothing above 0", "is it the right image?")
    return float(np.percentile(positive, 99.9))


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
