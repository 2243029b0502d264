"""Volumes made small enough for a page: one grid along the world's axes, cropped to the head, 8 bits, packed.

Every image of a page is brought onto the super-resolved image's grid, its axes turned to R, A, S (exactly), and cut to
the box of what is brighter than air. Grey values are rounded to 255 levels between 0 and one common maximum. No voxels
are averaged: of a volume too large for its page a slab or block is shown. The page says all of this.
"""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from fastsrgan.errors import ResourceError
from fastsrgan.evaluate.grids import onto_grid
from fastsrgan.pictures.planes import OBJECT, brightness, png, white
from fastsrgan.volume.geometry import Volume, spacing_of, world_orientation
from fastsrgan.volume.placement import same_grid

MARGIN = 4  # voxels around the head
LEVELS = 255
MASKS = ("seg", "label")
NEAREST = ("low", "mask", *MASKS)  # shown as the voxels are
THINNEST = 24  # voxels that a slab keeps across; below, a block is cut
SMALLEST = 8  # voxels along an axis of a block before the page gives up
TRIES = 6
FULL = 0.85  # of the bytes at hand: what a part should fill
DIFFERENCES = {"change": ("sr", "spline"), "error": ("sr", "truth"), "spline_error": ("spline", "truth")}
CLIP = 99.5  # percentile of the differences, and of the doubt, at which their colours end
LEAST_LIMIT = 4.0  # grey levels


@dataclass(frozen=True)
class Packed:
    """The volumes of a page.

    shape, affine : of the grid they share, R A S voxels -> world mm
    head : voxels of the head's box, of which ``shape`` is a part or all
    full_shape : of the super-resolved image, in R A S order
    top : intensity that is shown as 255
    limit : grey levels at which the colours of differences end
    all_bytes : what the whole box would take in a page
    blobs : name -> (what it is the difference to, or None; base64 of the gzip of the differences)
    doubt_top : doubt in units of the image that is shown as 255, 0 where there is none
    values : values of the mask image that are shown as 1, 2, ...
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    spacing: tuple[float, float, float]
    head: tuple[int, int, int]
    full_shape: tuple[int, int, int]
    top: float
    limit: float
    all_bytes: int
    blobs: dict[str, tuple[str | None, str]]
    doubt_top: float = 0.0
    values: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Bytes that the volumes take in a page."""
        return sum(len(text) for _, text in self.blobs.values())

    @property
    def is_part(self) -> bool:
        """Whether a slab or block is shown."""
        return self.shape != self.head


@dataclass(frozen=True)
class Images:
    """Volumes of a page before they are packed: (X, Y, Z) uint8 on the grid of the head's box, R A S."""

    arrays: dict[str, np.ndarray]
    affine: np.ndarray
    full_shape: tuple[int, int, int]
    top: float
    limit: float
    doubt_top: float = 0.0
    values: tuple[int, ...] = ()

    def part(self, box: tuple[slice, slice, slice], packing: bool = True, all_bytes: int = 0) -> Packed:
        """A box of them as a page has it; without ``packing`` a page without voxels, to see what it takes."""
        shift = np.eye(4)
        shift[:3, 3] = [s.start for s in box]
        arrays = {name: data[box] for name, data in self.arrays.items()}
        affine, shape = self.affine @ shift, arrays["sr"].shape
        blobs: dict[str, tuple[str | None, str]] = dict.fromkeys(_order(arrays), (None, ""))
        if packing:
            blobs = _coded(arrays)
        head = self.arrays["sr"].shape
        grid = (shape, affine, spacing_of(affine), head, self.full_shape)
        return Packed(*grid, self.top, self.limit, all_bytes, blobs, self.doubt_top, self.values)

    @property
    def all(self) -> tuple[slice, slice, slice]:
        """The whole box."""
        x, y, z = map(slice, (0, 0, 0), self.arrays["sr"].shape)
        return x, y, z


def images_of(sr: Volume, others: Mapping[str, Volume]) -> Images:
    """Bring images onto one grid.

    sr : decides grid, crop and brightness
    others : by name; "low", "seg", "label" and "mask" are shown voxel by voxel, all others are interpolated by a cubic
        spline. "mask" has a value for each structure (at most 255 of them), "doubt" a scale of its own.

    Raises InputError when an image does not overlap ``sr`` or that holds nothing above 0.
    """
    upright = _upright(sr)
    top = white(sr, others.get("seg"))
    box = _box(upright.data, brightness(sr))
    shift = np.eye(4)
    shift[:3, 3] = [s.start for s in box]
    cut = Volume(upright.data[box], upright.affine @ shift)
    arrays = {"sr": _levels(cut.data, "sr", top)}
    doubt_top, values = 0.0, np.zeros(0, int)
    for name, volume in others.items():
        data = _onto(volume, sr, cut, box, name)
        if name == "mask":
            values = np.unique(data[data > 0]).astype(int)
            arrays[name] = np.where(data > 0, np.searchsorted(values, data) + 1, 0).astype(np.uint8)
        elif name == "doubt":
            doubt_top = float(np.percentile(data[data > 0], CLIP)) if (data > 0).any() else 1.0
            arrays[name] = _levels(data, name, doubt_top)
        else:
            arrays[name] = _levels(data, name, top)
    full = upright.data.shape
    shape = (full[0], full[1], full[2])
    return Images(arrays, cut.affine, shape, top, _limit(arrays), doubt_top, tuple(values.tolist()))


def pack(
    images: Images, most: int, at_mm: Sequence[float] | None = None, across: int = 2, all_bytes: int = 0
) -> Packed:
    """Pack images into ``most`` bytes of text: all voxels of the head, or a slab around ``at_mm`` (R, A, S).

    The slab is thin along the world axis ``across``, so that the plane across that axis is shown whole; where a slab of
    24 voxels is too much, a block is cut. ``all_bytes`` is what all voxels take, where it is known.
    Raises ResourceError when a block of 8 x 8 x 8 voxels is still too much.
    """
    whole = images.part(images.all) if not all_bytes else None
    if whole is not None:
        all_bytes = whole.size
        if all_bytes <= most:
            return replace(whole, all_bytes=all_bytes)
    shape = images.arrays["sr"].shape
    at = [n // 2 for n in shape]
    if at_mm is not None:
        place = np.linalg.inv(images.affine) @ [*at_mm, 1.0]
        at = [int(np.clip(round(float(v)), 0, n - 1)) for v, n in zip(place, shape, strict=False)]
    share, best, least = most / all_bytes, None, 0
    fits, breaks = 0.0, math.inf  # shares of which a part was small enough, and too large
    for _ in range(TRIES):
        box = _around(shape, share, at, across)
        packed = images.part(box, all_bytes=all_bytes)
        least = packed.size
        if packed.size <= most and (best is None or packed.size > best.size):
            best = packed
        if best is not None and best.size >= FULL * most:
            break
        if packed.size > most and max(packed.shape) <= SMALLEST:
            break
        fits, breaks = (max(fits, share), breaks) if packed.size <= most else (fits, min(breaks, share))
        share *= min(max(0.95 * most / packed.size, 0.1), 4.0)
        if not fits < share < breaks:  # bytes are not spread evenly
            share = (fits + breaks) / 2
    if best is None:
        reason = f"{least / 1e6:.1f} MB of voxels for {most / 1e6:.1f} MB"
        raise ResourceError("report", reason, "a larger --max-mb")
    return best


def _around(shape: Sequence[int], share: float, at: Sequence[int], across: int) -> tuple[slice, slice, slice]:
    """The box of about ``share`` of a volume's voxels around a place: a slab, or a block where that were too thin."""
    thick = round(shape[across] * share)
    if thick >= min(THINNEST, shape[across]):
        sizes = [min(thick, n) if d == across else n for d, n in enumerate(shape)]
    else:
        sizes = [max(min(n, SMALLEST), round(n * min(1.0, share ** (1 / 3)))) for n in shape]
    starts = [min(max(a - s // 2, 0), n - s) for a, s, n in zip(at, sizes, shape, strict=True)]
    x, y, z = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return x, y, z


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
    turn = world_orientation(volume.affine)
    return Volume(turn.apply(volume.data), turn.affine(volume.affine, volume.data.shape), volume.warnings, volume.meta)


def _box(data: np.ndarray, top: float) -> tuple[slice, slice, slice]:
    found = ndimage.find_objects((data > OBJECT * top).astype(np.uint8))[0]
    parts = [slice(max(s.start - MARGIN, 0), min(s.stop + MARGIN, n)) for s, n in zip(found, data.shape, strict=True)]
    return parts[0], parts[1], parts[2]


def _onto(volume: Volume, sr: Volume, cut: Volume, box: tuple[slice, slice, slice], name: str) -> np.ndarray:
    if same_grid(volume, sr):
        return _upright(Volume(volume.data, sr.affine)).data[box]
    notes: list[str] = []  # how it was resampled is said once, for all of them
    # A truth without a place of its own, of earlier scores, lies where its header has it.
    return onto_grid(volume, cut, order=0 if name in NEAREST else 3, name=name, notes=notes, as_placed=True).data


def _order(names: Iterable[str]) -> list[str]:
    """Others are coded as differences to the spline, which comes first."""
    return sorted(names, key=lambda name: (name != "spline", name != "sr", name))


def _coded(volumes: Mapping[str, np.ndarray]) -> dict[str, tuple[str | None, str]]:
    blobs: dict[str, tuple[str | None, str]] = {}
    for name in _order(volumes):
        flat = volumes[name].transpose(2, 1, 0)  # first axis fastest, as in NIfTI
        forms: list[tuple[str | None, np.ndarray]] = [(None, np.diff(flat, axis=2, prepend=np.uint8(0)))]
        if name not in NEAREST and "spline" in blobs:
            forms.append(("spline", flat - volumes["spline"].transpose(2, 1, 0)))
        coded = [(other, gzip.compress(np.ascontiguousarray(form).tobytes(), 6, mtime=0)) for other, form in forms]
        other, data = min(coded, key=lambda pair: len(pair[1]))
        blobs[name] = (other, base64.b64encode(data).decode())
    return blobs


def _levels(data: np.ndarray, name: str, top: float) -> np.ndarray:
    if name in MASKS:
        return (data > 0.5).astype(np.uint8)
    return np.clip(np.rint(data.astype(np.float32) * np.float32(LEVELS / top)), 0, LEVELS).astype(np.uint8)


def _limit(arrays: Mapping[str, np.ndarray]) -> float:
    """The grey levels at which the colours of all differences end: their 99.5th percentile where they are not 0."""
    found = [LEAST_LIMIT]
    for first, second in DIFFERENCES.values():
        if first in arrays and second in arrays:
            apart = np.abs(np.subtract(arrays[first], arrays[second], dtype=np.int16))
            apart = apart[apart > 0]
            found.append(float(np.percentile(apart, CLIP)) if apart.size else 0.0)
    return max(found)
