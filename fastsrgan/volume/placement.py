"""Whether two arrays lie on one grid, for every command: what rounding makes of headers, and what a lost header is.

Headers hold an affine in 32-bit numbers, as a quaternion or as decimal text, and every tool rounds it anew: 1.000005 mm
in place of 1, a direction cosine off by 1e-4, a qform tilted by up to 0.1 degrees (float32 quaternions near 180 degrees
are off by 1e-3). Such a difference turns or stretches a grid a little and leaves some voxel of it where it was; a grid
that is really another one is shifted everywhere, or turned by more.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

import numpy as np

from fastsrgan.errors import InputError, brief, times
from fastsrgan.volume.geometry import Orientation, Volume, spacing_of, world_orientation

SHIFT_TOLERANCE = 0.03  # voxels that even the nearest place of two grids may be apart
TURN_TOLERANCE = 2e-3  # of a voxel per voxel (radians): between the axes
LARGEST_TOLERANCE = 0.5  # voxels at the farthest place: from there on another voxel would be the nearest
SLIGHT = 0.1  # of an array's shortest extent: what is less apart, as by thick slices, is no header that was lost
EXACT = 0.01  # voxels; grids that are taken for one and lie further apart are told
REORIENTED = "axes are stored in another order than the image's: reoriented onto it"
NO_PLACE = ("pixdim", "none")  # ``meta["orientation"]`` of files that do not say where they lie


@dataclass(frozen=True)
class Difference:
    """How far two affines place the voxels of one array from each other, in mm.

    largest : at ``voxel``, a corner; least : at the corner, edge, face or body centre where it is smallest
    turn : largest change of an axis per voxel, in voxels; size : the smallest voxel size
    """

    largest: float
    voxel: tuple[int, int, int]
    least: float
    turn: float
    size: float

    @property
    def same(self) -> bool:
        """Whether it is what the rounding of headers makes."""
        small = self.least <= SHIFT_TOLERANCE * self.size and self.largest <= LARGEST_TOLERANCE * self.size
        return small and self.turn <= TURN_TOLERANCE

    def __str__(self) -> str:
        return f"up to {brief(self.largest)} mm apart, most at voxel {self.voxel}"


def difference(a_44: np.ndarray, b_44: np.ndarray, shape: tuple[int, ...]) -> Difference:
    """The difference of two affines over an array of this shape."""
    delta = np.asarray(a_44, float) - np.asarray(b_44, float)
    ends = [sorted({0, (n - 1) / 2, n - 1}) for n in shape]
    places = np.array(list(itertools.product(*ends)))
    apart = np.linalg.norm(places @ delta[:3, :3].T + delta[:3, 3], axis=1)
    far = places[int(apart.argmax())]
    size = min(spacing_of(b_44))
    # An axis of one voxel leads nowhere.
    columns = np.linalg.norm(delta[:3, :3], axis=0) / np.array(spacing_of(b_44)) * (np.array(shape) > 1)
    voxel = (int(far[0]), int(far[1]), int(far[2]))
    return Difference(float(apart.max()), voxel, float(apart.min()), float(columns.max()), size)


def grid_distance(a_44: np.ndarray, b_44: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance between where two affines place a corner voxel of a grid, in their unit."""
    return difference(a_44, b_44, shape).largest


def same_grid(volume: Volume, like: Volume) -> bool:
    """Whether two volumes have one shape and, but for the rounding of headers, one affine."""
    if tuple(volume.data.shape) != tuple(like.data.shape):
        return False
    return difference(volume.affine, like.affine, like.data.shape).same


def axis_codes(affine_44: np.ndarray) -> str:
    """Where each array axis points, nearest of R L A P S I: "RAS" for an array in world order."""
    world = world_orientation(affine_44)
    codes = [""] * 3
    for axis, flip, ahead, back in zip(world.axes, world.flips, "RAS", "LPI", strict=True):
        codes[axis] = back if flip else ahead
    return "".join(codes)


def describe_grid(shape: tuple[int, ...], affine_44: np.ndarray) -> str:
    """'10 x 12 x 8 voxels of 1 x 1 x 3 mm, axes RAS, first voxel at (-5, -6, -12) mm'."""
    origin = ", ".join(f"{v:.5g}" for v in np.asarray(affine_44)[:3, 3] + 0.0)
    sizes = tuple(float(s) for s in spacing_of(affine_44))
    axes = axis_codes(affine_44)
    return f"{times(tuple(shape))} voxels of {times(sizes)} mm, axes {axes}, first voxel at ({origin}) mm"


def orientation_onto(
    shape: tuple[int, ...],
    affine_44: np.ndarray,
    like: Volume,
    what: str | os.PathLike,
    kind: str,
    orientation: str = "",
) -> tuple[Orientation, tuple[str, ...]]:
    """The exact turn of axes that puts an array of this shape and place onto the grid of ``like``, and warnings.

    ``orientation`` is the array's ``meta["orientation"]``. Raises InputError about ``what``, a label or a mask as
    ``kind`` says, whose voxels lie elsewhere.
    """
    relative = np.linalg.solve(np.asarray(like.affine, float)[:3, :3], affine_44[:3, :3])
    axes = tuple(int(a) for a in np.abs(relative).argmax(axis=1))
    apart = difference(affine_44, like.affine, shape) if tuple(shape) == tuple(like.data.shape) else None
    if sorted(axes) == [0, 1, 2]:
        turn = Orientation(axes, tuple(bool(relative[i, a] < 0) for i, a in enumerate(axes)))  # type: ignore[arg-type]
        if turn.permute(shape) == tuple(like.data.shape):
            apart = difference(turn.affine(affine_44, shape), like.affine, like.data.shape)
            if apart.same:
                told = [] if turn == Orientation() else [f"the {kind}'s {REORIENTED}"]
                if apart.largest > EXACT * apart.size:
                    told.append(f"the {kind}'s grid and the image's are {apart}: taken as one, as headers are rounded")
                return turn, tuple(told)
    away = "" if apart is None else f", {apart}"
    mine, its = describe_grid(shape, affine_44), describe_grid(like.data.shape, like.affine)
    reason = f"the {kind}'s grid is not the image's{away}: {kind} {mine}; image {its}"
    raise InputError(what, reason, _way_out(shape, affine_44, like, kind, orientation))


def _way_out(shape: tuple[int, ...], affine_44: np.ndarray, like: Volume, kind: str, orientation: str) -> str:
    same = tuple(shape) == tuple(like.data.shape)
    if placeless(affine_44, orientation) and same:
        return f"the {kind} has the image's array and no place of its own: {copy_header(kind)}"
    if placeless(like.affine, like.meta.get("orientation", "")) and same:
        return f"the image has the {kind}'s array and no place of its own: {copy_header('image', kind)}"
    turned = tuple(shape) == tuple(like.data.shape)[::-1] and not same
    if turned and placeless(affine_44, orientation):
        return f"the {kind} has the image's array with its axes reversed: transpose it, then {copy_header(kind)}"
    resample = f"resample the {kind} onto the image with nearest neighbour"
    if turned:  # under the image's header, as of an array that SimpleITK gave NumPy
        return f"{resample}; if it is the image's array with its axes reversed, transpose it, then {copy_header(kind)}"
    return f"{resample}; if it was drawn on this very array, {copy_header(kind)}" if same else resample


def copy_header(kind: str, of: str = "image") -> str:
    """How to give an array the place of its image, or of another that was drawn on it."""
    source, target = (name.split()[0].upper() for name in (of, kind))
    return f"copy the {of}'s header to it, for example with fslcpgeom {source} {target}, do not resample"


def placeless(affine_44: np.ndarray, orientation: str = "") -> bool:
    """Whether a header says nothing of where its array lies: no form, or the identity that libraries write then."""
    if orientation in NO_PLACE:
        return True
    affine = np.asarray(affine_44, float)
    plain = [np.diag([1.0, 1.0, 1.0, 1.0]), np.diag([-1.0, -1.0, 1.0, 1.0]), np.diag([-1.0, 1.0, 1.0, 1.0])]
    return any(np.allclose(affine, eye, atol=1e-6) for eye in plain)


def refuse_placeless(volume: Volume, like: Volume, name: str) -> str:
    """Raise InputError where a volume on another grid has the array of ``like``, the reference, and one of the two no
    place of its own: resampling would put it into the wrong one.

    Returns a note where the grids are less than ``SLIGHT`` apart, as those of a truth that begins at 0 and of the
    result of a scan whose first thick slice has its middle there: both headers may be right.
    """
    if tuple(volume.data.shape) != tuple(like.data.shape) or same_grid(volume, like):
        return ""
    apart = difference(volume.affine, like.affine, like.data.shape)
    slight = apart.largest < SLIGHT * min(n * mm for n, mm in zip(like.data.shape, like.spacing, strict=True))
    for lost, kind, other in ((volume, name, "reference"), (like, "reference", name)):
        if placeless(lost.affine, lost.meta.get("orientation", "")):
            if slight:
                return (
                    f"{kind}: has the {other}'s array and no place of its own, they are {apart}: was its header lost?"
                )
            reason = f"the {kind} has the {other}'s array and no place of its own; as they stand they are {apart}"
            raise InputError(lost.meta.get("path", kind), reason, copy_header(kind, other))
    return ""
