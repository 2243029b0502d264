"""Volumes made small enough for a page: one grid along the world's axes, cropped to the head, 8 bits, packed.

Every image of a page is brought onto the super-resolved image's grid, its axes turned to R, A, S (exactly), and cut to
the box of what is brighter than air. Grey values are rounded to 255 levels between 0 and one common maximum; a large
volume is averaged over blocks of voxels until it fits. The page says all of this.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from fastsrgan.errors import ResourceError
from fastsrgan.evaluate.grids import onto_grid
from fastsrgan.pictures.planes import OBJECT, brightness, png
from fastsrgan.volume.geometry import Volume, processing_orientation
from fastsrgan.volume.placement import same_grid

MARGIN = 4  # voxels around the head
LEVELS = 255
MASKS = ("seg", "label")
NEAREST = ("low", *MASKS)  # shown as the voxels are
WORST = 8  # voxels a block may have along an axis before the page gives up


@dataclass(frozen=True)
class Packed:
    """The volumes of a page.

    shape, affine : of the grid they share, R A S voxels -> world mm
    block : voxels of the super-resolved image that one shown voxel is the mean of, per axis
    full_shape : of the super-resolved image, in R A S order
    top : intensity that is shown as 255
    blobs : name -> (what it is the difference to, or None; base64 of the gzip of the differences)
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing: tuple[float, float, float]
    block: int
    full_shape: tuple[int, int, int]
    top: float
    blobs: dict[str, tuple[str | None, str]]

    @property
    def size(self) -> int:
        """Bytes that the volumes take in a page."""
        return sum(len(text) for _, text in self.blobs.values())


def pack(sr: Volume, others: Mapping[str, Volume], most: int) -> Packed:
    """Bring images onto one grid and pack them into ``most`` bytes of text.

    Parameters
    ----------
    sr : decides grid, crop and brightness
    others : by name; "low", "seg" and "label" are shown voxel by voxel, all others are interpolated by a cubic spline
    most : bytes for all of them together

    Raises InputError when an image does not overlap ``sr`` or that holds nothing above 0, ResourceError when blocks of
    8 x 8 x 8 voxels are still too much.
    """
    upright = _upright(sr)
    top = brightness(sr)
    box = _box(upright.data, top)
    shift = np.eye(4)
    shift[:3, 3] = [s.start for s in box]
    cut = Volume(upright.data[box], upright.affine @ shift)
    images = {"sr": cut.data} | {name: _onto(v, sr, cut, box, name) for name, v in others.items()}
    packed = _packed(images, cut, upright.data.shape, top, 1)
    while packed.size > most:
        if packed.block == WORST:
            reason = f"{packed.size / 1e6:.1f} MB of voxels for {most / 1e6:.1f} MB"
            raise ResourceError("report", reason, "a larger --max-mb")
        packed = _packed(images, cut, upright.data.shape, top, packed.block + 1)
    return packed


def unpack(packed: Packed) -> dict[str, np.ndarray]:
    """The (X, Y, Z) uint8 volumes, as the page gets them."""
    volumes: dict[str, np.ndarray] = {}
    for name, (other, text) in packed.blobs.items():
        flat = np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8)
        if other is None:
            rows = np.cumsum(flat.reshape(-1, packed.shape[0]), axis=1, dtype=np.uint8)
            volumes[name] = rows.reshape(packed.shape[::-1]).transpose()
        else:
            volumes[name] = flat.reshape(packed.shape[::-1]).transpose() + volumes[other]
    return volumes


def plane_png(values: np.ndarray, outline: np.ndarray | None = None) -> bytes:
    """An (X, Y) uint8 plane as PNG, first axis to the left (radiological) and second upwards, a mask's rim in cyan."""
    grey = np.ascontiguousarray(values[::-1, ::-1].T)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    if outline is not None:
        mask = np.ascontiguousarray(outline[::-1, ::-1].T) > 0
        rgb[mask & ~ndimage.binary_erosion(mask)] = (34, 211, 238)
    return png(rgb)


def _upright(volume: Volume) -> Volume:
    turn = processing_orientation(volume.affine, (1.0, 1.0, 1.0))
    return Volume(turn.apply(volume.data), turn.affine(volume.affine, volume.data.shape), volume.warnings, volume.meta)


def _box(data: np.ndarray, top: float) -> tuple[slice, slice, slice]:
    found = ndimage.find_objects((data > OBJECT * top).astype(np.uint8))[0]
    parts = [slice(max(s.start - MARGIN, 0), min(s.stop + MARGIN, n)) for s, n in zip(found, data.shape, strict=True)]
    return parts[0], parts[1], parts[2]


def _onto(volume: Volume, sr: Volume, cut: Volume, box: tuple[slice, slice, slice], name: str) -> np.ndarray:
    if same_grid(volume, sr):
        return _upright(Volume(volume.data, sr.affine)).data[box]
    notes: list[str] = []  # how it was resampled is said once, for all of them
    return onto_grid(volume, cut, order=0 if name in NEAREST else 3, name=name, notes=notes).data


def _packed(images: Mapping[str, np.ndarray], cut: Volume, full: tuple[int, ...], top: float, block: int) -> Packed:
    volumes = {name: _reduced(data, name, top, block) for name, data in images.items()}
    names = sorted(volumes, key=lambda name: (name != "spline", name != "sr", name))
    blobs: dict[str, tuple[str | None, str]] = {}
    for name in names:
        flat = volumes[name].transpose(2, 1, 0)  # first axis fastest, as in NIfTI
        forms: list[tuple[str | None, np.ndarray]] = [(None, np.diff(flat, axis=2, prepend=np.uint8(0)))]
        if name not in NEAREST and "spline" in blobs:
            forms.append(("spline", flat - volumes["spline"].transpose(2, 1, 0)))
        coded = [(other, gzip.compress(np.ascontiguousarray(form).tobytes(), 6, mtime=0)) for other, form in forms]
        other, data = min(coded, key=lambda pair: len(pair[1]))
        blobs[name] = (other, base64.b64encode(data).decode())
    affine = np.array(cut.affine, float)
    affine[:3, 3] += affine[:3, :3] @ np.full(3, (block - 1) / 2)
    affine[:3, :3] *= block
    shape = volumes["sr"].shape
    spacing = (cut.spacing[0] * block, cut.spacing[1] * block, cut.spacing[2] * block)
    return Packed((shape[0], shape[1], shape[2]), affine, spacing, block, (full[0], full[1], full[2]), top, blobs)


def _reduced(data: np.ndarray, name: str, top: float, block: int) -> np.ndarray:
    values = data.astype(np.float32)
    if block > 1:
        # Voxels that fill no whole block are left out, but never a whole axis.
        kept = [max(n // block, 1) * block for n in values.shape]
        short = [(0, max(k - n, 0)) for n, k in zip(values.shape, kept, strict=True)]
        values = np.pad(values, short, mode="edge")[: kept[0], : kept[1], : kept[2]]
        split = values.reshape(kept[0] // block, block, kept[1] // block, block, kept[2] // block, block)
        values = split.mean((1, 3, 5))
    if name in MASKS:
        return (values > 0.5).astype(np.uint8) if block == 1 else (values >= 0.5).astype(np.uint8)
    return np.clip(np.rint(values * (LEVELS / top)), 0, LEVELS).astype(np.uint8)
