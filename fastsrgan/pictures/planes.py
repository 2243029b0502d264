"""Planes cut through volumes in world space (mm, RAS+), whatever each volume's orientation and voxel size.

Where to look: across the slices of the scan, at the place where two images of it differ most.

Sample panels of a training run, RUN/panels/epoch-0001.png: one picture per validation, for the report.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from fastsrgan.core.files import atomic_write, output_folder
from fastsrgan.errors import InputError
from fastsrgan.volume.geometry import Volume, world_orientation
from fastsrgan.volume.head import lowest
from fastsrgan.volume.placement import same_grid

# Name, world axis cut through, world axis to the right, world axis upwards.
PLANES = (("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2))
ENDS = (("L", "R"), ("P", "A"), ("I", "S"))  # low and high end of each world axis
MARGIN_MM = 3.0
OBJECT = 0.05  # of the reference's brightness: what is above it decides the extent
FILLED = 0.97  # of what can be had: share of object in the detail
LATERAL = 0.1  # of the object's width: the sagittal plane keeps off the cleft between the hemispheres
THICK = 1.25  # slices are thick from so many times the next smaller voxel edge on
BLOCK_MM = 4.0  # differences are summed over blocks of about this edge, and three of them along each axis
FINE_MM = 2.0  # about the edge of the blocks in which the depth below the rim is measured
RIM_MM = 8.0  # of a head without a mask that does not count: skin, bone and the border to the air
# The same of a mask: a stripped brain ends sharply, and its rim changes most. 37 % (25 weeks) to 95 % of cortex stays.
EDGE_MM = 4.0


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


def slices_of(scan: Volume) -> tuple[int, float] | None:
    """(world axis nearest to the direction across the slices, mm from slice to slice); None where no edge is thick."""
    sizes = scan.spacing
    axis = max(range(3), key=lambda d: sizes[d])
    if sizes[axis] < THICK * float(np.median(sizes)):
        return None
    return world_orientation(scan.affine).axes.index(axis), sizes[axis]


def slice_edges(scan: Volume, through: int, at_mm: Sequence[float], low: float, high: float) -> np.ndarray:
    """Where the borders of a scan's slices lie between ``low`` and ``high`` on the world axis ``through``, in mm.

    Along the line through ``at_mm`` (R, A, S), for slices that are turned against the world too; (N,) ascending.
    """
    stored = world_orientation(scan.affine).axes[through]
    row = np.linalg.inv(scan.affine)[stored]
    start = np.array([*at_mm, 1.0])
    start[through] = 0
    place, slope = float(row @ start), float(row[through])  # slice number = place + slope * mm
    edges = (np.arange(scan.data.shape[stored] + 1) - 0.5 - place) / slope
    return np.sort(edges[(edges >= min(low, high)) & (edges <= max(low, high))])


def inside_of(reference: Volume, *masks: Volume | None) -> Volume:
    """The first of some masks (cut at 0.5) that is not empty, or the head of ``reference``, without the rim.

    The head is what is brighter than air, holes filled. ``RIM_MM`` of it, the skin, most of the skull, and the border
    to the air, change most and say least; of a mask on the same grid what lies within ``EDGE_MM`` does not count,
    unless nothing else is there. bool, on the grid of the mask or of ``reference``.
    """
    for mask in masks:
        if mask is not None and (mask.data > 0.5).any():
            inside = mask.data > 0.5
            deep = inside & _without_rim(reference, EDGE_MM) if same_grid(mask, reference) else inside
            return Volume(deep if deep.any() else inside, mask.affine)
    return Volume(_without_rim(reference, RIM_MM), reference.affine)


def _without_rim(reference: Volume, mm: float) -> np.ndarray:
    """(X, Y, Z) bool: the head without its outer millimetres, in blocks; all of it where nothing is left."""
    edge = _block(reference, FINE_MM)
    full = _blocks(reference.data > OBJECT * brightness(reference), edge) > 0.5 * np.prod(edge)
    full = ndimage.binary_fill_holes(np.pad(full, 1))
    sizes = np.multiply(edge, reference.spacing)
    kept = ndimage.distance_transform_edt(full, sizes) > mm + 0.5 * sizes.mean()  # from centre to centre of blocks
    return _repeated((kept if kept.any() else full)[1:-1, 1:-1, 1:-1], edge, reference.data.shape)


def largest_change(first: Volume, second: Volume, inside: Volume) -> tuple[float, float, float] | None:
    """World mm (R, A, S) of where two images of one grid differ most inside a mask: of the cube of about 12 mm in which
    the sum of squares is largest, that voxel. None where the three have other grids, or the images are the same there.
    """
    if not (same_grid(first, second) and same_grid(first, inside)):
        return None
    edge = _block(first)
    energy = _blocks(np.square(np.subtract(first.data, second.data, dtype=np.float32)) * inside.data, edge)
    sums = ndimage.uniform_filter(energy, 3, mode="constant")
    if not sums.max() > 0:
        return None
    best = [int(i) for i in np.unravel_index(int(sums.argmax()), sums.shape)]
    cube = tuple(slice(max(b - 1, 0), b + 2) for b in best)
    centre = np.array(ndimage.center_of_mass(energy[cube])) + [c.start for c in cube]
    voxel = (centre + 0.5) * edge - 0.5
    box = tuple(slice(c.start * n, c.stop * n) for c, n in zip(cube, edge, strict=True))
    apart = np.abs(np.subtract(first.data[box], second.data[box], dtype=np.float32)) * inside.data[box]
    there = np.argwhere(apart >= apart.max()) + [b.start for b in box]  # of several, the nearest to the middle
    nearest = there[np.square((there - voxel) * first.spacing).sum(1).argmin()]
    r, a, s = (first.affine @ [*nearest, 1])[:3]
    return float(r), float(a), float(s)


def change_in(cut: Cut, changed: tuple[Volume, Volume], inside: Volume | None = None) -> float:
    """Sum of the squared difference of two images over a plane's pixels, inside a mask."""
    apart = cut.sample(changed[0]) - cut.sample(changed[1])
    return float(np.square(apart if inside is None else apart * (cut.sample(inside, nearest=True) > 0.5)).sum())


def _block(volume: Volume, mm: float = BLOCK_MM) -> tuple[int, int, int]:
    x, y, z = (min(max(1, round(mm / s)), n) for s, n in zip(volume.spacing, volume.data.shape, strict=True))
    return x, y, z  # none larger than the volume: voxel sizes of micrometres are stated, too


def _blocks(values: np.ndarray, edge: tuple[int, int, int]) -> np.ndarray:
    """Sums over blocks of (X, Y, Z) voxels, the last ones smaller: float64."""
    summed = values
    for axis, n in enumerate(edge):
        summed = np.add.reduceat(summed, np.arange(0, values.shape[axis], n), axis=axis, dtype=np.float64)
    return summed


def _repeated(blocks: np.ndarray, edge: tuple[int, int, int], shape: Sequence[int]) -> np.ndarray:
    """Each block's value in all of its voxels: (X, Y, Z) of ``shape``, the inverse of ``_blocks``' cut."""
    for axis, n in enumerate(edge):
        blocks = np.repeat(blocks, n, axis=axis)
    return blocks[tuple(slice(n) for n in shape)]


def detail(
    cut: Cut,
    width_mm: float,
    height_mm: float,
    reference: Volume,
    changed: tuple[Volume, Volume] | None = None,
    within: Volume | None = None,
) -> Cut:
    """The rectangle of a plane where two images differ most (sum of squares); without them, where the reference varies
    most. It lies inside the object as far as it can: the sharp rim against the background would win otherwise.
    ``within``: only differences inside this mask count. Never larger than the plane."""
    rows = min(len(cut.v), max(2, round(height_mm / cut.pitch)))
    columns = min(len(cut.u), max(2, round(width_mm / cut.pitch)))
    there = cut.sample(reference)
    if changed is None:
        energy = (there - ndimage.gaussian_filter(there, 2)) ** 2
    else:
        energy = (cut.sample(changed[0]) - cut.sample(changed[1])) ** 2
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


def white(reference: Volume, *masks: Volume | None) -> float:
    """The grey level that is drawn white: the 99.9th percentile of what is above 0, in the blocks of about ``BLOCK_MM``
    that touch the first mask which is not empty (cut at 0.5) and on ``reference``'s grid; without such a mask, of all.

    Fat around a brain may be twice as bright as all that a person looks for in it. Raises InputError when nothing is
    above 0.
    """
    for mask in masks:
        if mask is not None and same_grid(mask, reference) and (mask.data > 0.5).any():
            edge = _block(reference)
            near = _repeated(_blocks(mask.data > 0.5, edge) > 0, edge, reference.data.shape)
            if (reference.data[near] > 0).any():
                return _bright(reference.data[near])
    return brightness(reference)


def brightness(reference: Volume) -> float:
    """The 99.9th percentile of what is above 0. Raises InputError when nothing is."""
    if not (reference.data > 0).any():
        raise InputError("picture", "the reference image holds nothing above 0", "is it the right image?")
    return _bright(reference.data)


def _bright(values: np.ndarray) -> float:
    return float(np.percentile(values[values > 0], 99.9))


INTENSITIES = ("sr", "low", "spline", "linear", "truth", "baseline")


def from_lowest(volumes: Mapping[str, Volume], first: str = "sr") -> tuple[dict[str, Volume], float]:
    """Images as pictures can show them, whose black is 0, and what was subtracted for it: where the intensities of the
    ``first`` image count from (``head.lowest``). Those of ``INTENSITIES`` are moved alike."""
    low = lowest(volumes[first].data)
    if not low:
        return dict(volumes), 0.0
    return {
        name: replace(v, data=v.data - np.float32(low)) if name in INTENSITIES else v for name, v in volumes.items()
    }, low


FOLDER = "panels"
WIDE = 800  # pixels
_NAME = re.compile(r"epoch-(\d+)\.png")


def write_panel(run: Path, epoch: int, sheet_HW: np.ndarray) -> Path:
    """Write a grey picture, values in [0, 1], as the panel of an epoch; one that is there is replaced. Of small patches
    every pixel is drawn several times, up to a width of ``WIDE``: 16 voxels are too small to look at."""
    path = output_folder(run / FOLDER) / f"epoch-{epoch:04d}.png"
    grey = np.rint(np.clip(np.nan_to_num(sheet_HW), 0, 1) * 255).astype(np.uint8)
    times = max(1, WIDE // grey.shape[1])
    grey = grey.repeat(times, axis=0).repeat(times, axis=1)
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
