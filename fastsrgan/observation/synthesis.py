"""An image of any contrast from a label map, with the label that belongs to it.

The generative model of SynthSeg and SynthSR (Billot et al., MedIA 2023; Iglesias et al., NeuroImage 2021): one Gaussian
per structure, its mean and standard deviation drawn anew at each visit, a smooth deformation, partial volume at the
edges, a bias field. ``draw_*`` makes parameters from a key, the rest is deterministic: the same key gives the same
image on any rank and at any resume point. Lengths are in mm, means and standard deviations in parts of full scale.

Label values follow FreeSurfer where ``Synthesis`` has no means of its own: left and right structures share one
Gaussian, structures of one tissue have similar ones, and values from 500 on lie outside the skull's inside.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.draws import rng
from fastsrgan.core.threads import CACHED
from fastsrgan.errors import InputError, UsageError
from fastsrgan.observation.artefacts import apply_bias, draw_bias
from fastsrgan.volume.resample import FWHM, apply_axes, bspline_taps, slice_profile_matrix, support

OUTER_FLUID = 24  # around the brain, in FreeSurfer's numbers
EXTRACEREBRAL = 500  # this label and those above: skin, fat, bone, muscle, eyes, vessels
SURROUND = 255  # the class of what is kept around a stripped brain though it has no label
MOST_CLASSES = 254
COARSE = 4  # voxels, steps in which the size of a deformed map is found
INJECTIVE = 0.4  # of the control points' distance: cubic B-splines of smaller shifts cannot fold (Choi and Lee 2000)

# FreeSurfer numbers of the right side, and their partners on the left.
_LEFT = {41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 57: 25, 58: 26}
_LEFT |= {60: 28, 62: 30, 163: 136, 164: 137}
_TISSUES = (
    (2, 7, 16, 28, 85),  # white matter
    (3, 8, 17, 18, 26),  # grey matter
    (10, 11, 12, 13, 136, 137),  # deep grey matter
    (4, 5, 14, 15, 24, 72),  # fluid
)

Triple = tuple[float, float, float]
Means = tuple[tuple[int, float, float], ...]  # label, mean and sd of its mean


@dataclass(frozen=True)
class Synthesis:
    """How images are made from label maps; ranges are drawn uniformly per visit.

    means : contrasts, each (label, mean, sd) of its labels: one is drawn per visit (given twice it counts twice), and
        in it the mean of a label from N(mean, sd^2), in parts of full scale. Empty: one mean for each tissue, uniform
        in ``contrast``, and structures of one tissue differ by ``scatter``
    free : share of the visits in which every structure has a mean of its own, uniform in ``contrast``
    invert : share of the visits in which bright and dark are exchanged
    contrast : range of a mean
    scatter : standard deviation of a structure's mean about its tissue's
    texture : range of a structure's standard deviation inside
    rotation : largest angle about each axis in degrees; shear : largest
    scaling : range of the scale along each axis
    warp : largest shift of the control points, in parts of what keeps the deformation invertible
    warp_mm : range of the distance between control points
    bias_field : largest log amplitude of a smooth multiplicative field
    blur : range of the sigma of partial volume, in voxels
    strip : share of the visits in which a head loses all that is not brain, to exact zero
    rim : largest width in voxels of what such a brain, or one without surroundings, keeps around it
    """

    means: tuple[Means, ...] = ()
    free: float = 0.25
    invert: float = 0.2
    contrast: tuple[float, float] = (0.05, 1.0)
    scatter: float = 0.04
    texture: tuple[float, float] = (0.005, 0.04)
    rotation: float = 15.0
    scaling: tuple[float, float] = (0.8, 1.25)
    shear: float = 0.1
    warp: float = 0.8
    warp_mm: tuple[float, float] = (16.0, 40.0)
    bias_field: float = 0.3
    blur: tuple[float, float] = (0.4, 0.8)
    strip: float = 0.5
    rim: int = 2

    def __post_init__(self) -> None:
        for name in ("free", "invert", "strip", "warp"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(name, f"{getattr(self, name)} is not allowed", "a share from 0 to 1")
        for name in ("contrast", "texture", "scaling", "warp_mm", "blur"):
            low, high = getattr(self, name)
            if not (low > 0 if name in ("scaling", "warp_mm") else low >= 0) or not low <= high < np.inf:
                raise UsageError(name, f"{low:g} to {high:g} is not allowed", "two numbers above zero, lowest first")
        for name in ("scatter", "rotation", "shear", "bias_field", "rim"):
            if not 0 <= getattr(self, name) < np.inf:
                raise UsageError(name, f"{getattr(self, name)} is not allowed", "0 or above")
        if self.shear >= 0.5:
            raise UsageError("shear", f"{self.shear:g} is not allowed", "below 0.5")

    @property
    def growth(self) -> float:
        """How many times as large as the map, in voxels, an image may be: all scales at their largest."""
        return max(1.0, self.scaling[1]) ** 3


@dataclass(frozen=True)
class Shape:
    """A deformation, from where a voxel of the result lies to where it comes from: p = A (x + u(x)), in mm from the
    middle of the map. It cannot fold: u cannot, and A is invertible.

    affine_33 : A; warp_3KKK : shifts of the control points of u, (3, k, k, k) mm; distance_mm : between them
    """

    affine_33: np.ndarray
    warp_3KKK: np.ndarray
    distance_mm: float


@dataclass(frozen=True)
class DrawnLook:
    """Intensities of one visit: mean and sd of each label value, the rim's, and whether all but the brain goes
    (``tight``: outer fluid too, except in the rim).

    ``grain`` are the parts of white, smooth and smoother noise in a structure's texture (their squares sum to 1).
    """

    mean: dict[int, float]
    sd: dict[int, float]
    surround: tuple[float, float]
    strip: bool
    tight: bool
    rim: int
    blur: float
    grain: tuple[float, float, float]


def synthesise(
    labels_XYZ: np.ndarray | Tensor,
    spacing_mm: Triple,
    key: tuple[int | str, ...],
    settings: Synthesis | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Make an image and its label map.

    Parameters
    ----------
    labels_XYZ : (X, Y, Z) whole numbers from 0, at most 254 values; a tensor is used where it lies
    spacing_mm : voxel size along its axes
    key : names the draws; starts with the seed
    settings : ranges of the draws (default ``Synthesis()``)
    device : where the work is done (default: the tensor's, else the CPU)

    Returns
    -------
    image, labels : tensors of one shape on that device, (X', Y', Z'): float32 from 0 to about 1, and int16. The shape
    is that of what is seen, not the one given: the deformed brain always fits, the rest of a head as far as the
    larger of both reaches. Where a head is stripped the image is exactly 0 outside the brain and its rim.

    Raises
    ------
    InputError : no label above 0, negative or too many values.
    """
    settings = settings or Synthesis()
    classes, values = _classes(labels_XYZ, device)
    look = draw_look(key, values, settings)
    shape = draw_shape(key, tuple(classes.shape), spacing_mm, settings)
    brain = [0 < v < EXTRACEREBRAL for v in values]
    if not any(brain):
        raise InputError("label map", f"has no label from 1 to {EXTRACEREBRAL - 1}", "give FreeSurfer or tissue labels")
    head = any(v >= EXTRACEREBRAL for v in values)
    stripped, full, origin = look.strip or not head, tuple(classes.shape), (0, 0, 0)
    core = [b and not (head and look.tight and v == OUTER_FLUID) for b, v in zip(brain, values, strict=True)]
    if stripped and any(core):  # nothing far from the brain is seen: the work is cut to it
        mask = _look_up(_table(core, torch.uint8, classes.device), classes)
        near = tuple(slice(max(0, b.start - 8), b.stop + 8) for b in _box(mask))
        classes, mask, origin = classes[near].contiguous(), mask[near], tuple(b.start for b in near)
        intensities = _intensities(key, classes, values, look)
        kept = _grown(mask, look.rim + (head and look.tight))
        # What has no label near the brain is kept, as a cautious mask keeps it.
        classes = torch.where(kept > 0, classes if head else torch.where(mask > 0, classes, SURROUND), 0)
    else:
        intensities = _intensities(key, classes, values, look)
    # A whole voxel, so that without deformation every voxel comes from one.
    middle = [float((n - 1) // 2 - o) for n, o in zip(full, origin, strict=True)]
    frame = _frame(classes, shape, middle, spacing_mm, brain, None if stripped else full)
    image, seen = _deform(intensities, classes, shape, middle, spacing_mm, frame)
    if settings.bias_field:
        points = draw_bias((*key, "synthesis"), settings.bias_field)
        image = apply_bias(image, points, tuple(image.shape))
    image.abs_()  # a magnitude
    if stripped:
        image.mul_(seen > 0)
    return image, _look_up(_table(values, torch.int16, image.device), seen)


# --- draws --------------------------------------------------------------------------------------------------------


def draw_look(key: tuple[int | str, ...], values: list[int], settings: Synthesis) -> DrawnLook:
    """Intensities of one visit for these label values. Every value has draws of its own: none depends on the others."""
    s = settings

    def some(*purpose: int | str) -> np.random.Generator:
        return rng(*key, "synthesis", *purpose)

    chances = some("chances").random(4)
    contrast = s.means[some("which contrast").integers(len(s.means))] if s.means else ()
    given = {label: (mean, sd) for label, mean, sd in contrast}
    free, inverted = chances[0] < s.free, chances[1] < s.invert
    mean, sd = {}, {}
    for value in values:
        if value == 0:
            continue
        name = _LEFT.get(value, value) if value not in given else value
        own = some("structure", name)
        uniform, normal, spread = own.uniform(*s.contrast), own.standard_normal(), own.uniform(*s.texture)
        tissue = next((i for i, members in enumerate(_TISSUES) if name in members), None)
        if value in given and not free:
            level = given[value][0] + given[value][1] * normal
        elif given or free or tissue is None:
            level = uniform
        else:
            level = some("tissue", tissue).uniform(*s.contrast) + s.scatter * normal
        mean[value] = float(np.clip(level, *s.contrast))
        sd[value] = float(spread)
    if inverted:
        brain = [mean[v] for v in mean if v < EXTRACEREBRAL] or [0.0]
        ends = min(brain) + max(brain)
        mean |= {v: float(np.clip(ends - mean[v], *s.contrast)) for v in mean if v < EXTRACEREBRAL}
    air = some("air")
    # Scanners differ: half of them write zero where there is no signal.
    mean[0], sd[0] = 0.0, 0.0 if air.random() < 0.5 else float(air.uniform(0, 0.02))
    around = some("surround")
    grain = some("grain").dirichlet((1.0, 2.0, 2.0)) ** 0.5
    return DrawnLook(
        mean,
        sd,
        (float(around.uniform(*s.contrast)), float(around.uniform(*s.texture))),
        bool(chances[2] < s.strip),
        bool(chances[3] < 0.5),
        int(some("rim").integers(s.rim + 1)),
        round(20 * some("blur").uniform(*s.blur)) / 20,  # steps of 0.05: few operators to keep
        tuple(float(g) for g in grain),  # type: ignore[arg-type]
    )


def draw_shape(
    key: tuple[int | str, ...], shape_XYZ: tuple[int, ...], spacing_mm: Triple, settings: Synthesis
) -> Shape:
    """The deformation of one visit: rotation after scaling and shear, all after a smooth warp."""
    s, some = settings, rng(*key, "synthesis", "shape")
    angles = np.deg2rad(s.rotation) * some.uniform(-1, 1, 3)
    least, most = np.log(s.scaling)
    scales = np.exp(some.uniform(least, most, 3))
    shears = s.shear * some.uniform(-1, 1, 3)
    forward = np.eye(3)
    for axis, angle in enumerate(angles):
        one, other = [d for d in range(3) if d != axis]
        turn = np.eye(3)
        turn[[one, other], [one, other]] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        forward = turn @ forward
    slant = np.eye(3)
    slant[0, 1], slant[0, 2], slant[1, 2] = shears
    forward = forward @ slant @ np.diag(scales)
    distance = float(np.exp(some.uniform(*np.log(s.warp_mm))))
    strength = s.warp * some.random() * INJECTIVE * distance
    # The widest result: every corner of the map, scaled, turned and shifted.
    reach = np.linalg.norm(np.multiply(shape_XYZ, spacing_mm)) / 2 * max(1.0, *scales) * (1 + s.shear) + 2 * distance
    count = 2 * int(np.ceil(reach / distance)) + 3
    points = strength * rng(*key, "synthesis", "warp").uniform(-1, 1, (3, count, count, count))
    return Shape(np.linalg.inv(forward), points, distance)


def measured_means(images: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> Means:
    """(label, mean, sd) over subjects of each structure's mean: one contrast of ``Synthesis.means``.

    images, labels : (X, Y, Z) of each subject. An image counts in parts of the largest mean of its structures.
    """
    rows: dict[int, list[float]] = {}
    for image, map_ in zip(images, labels, strict=True):
        flat = np.asarray(map_).ravel()
        counts = np.bincount(flat)
        sums = np.bincount(flat, np.asarray(image, np.float64).ravel())
        means = {int(v): float(sums[v] / counts[v]) for v in np.flatnonzero(counts) if v}
        top = max(means.values(), default=1.0)
        for value, mean in means.items():
            rows.setdefault(value, []).append(mean / top)
    return tuple((value, float(np.mean(found)), float(np.std(found))) for value, found in sorted(rows.items()))


# --- intensities --------------------------------------------------------------------------------------------------


def _intensities(key: tuple[int | str, ...], classes: Tensor, values: list[int], look: DrawnLook) -> Tensor:
    """mean[label] + sd[label] * texture, blurred by the partial volume: (X, Y, Z) float32 on the map's grid."""
    gaussians = [(look.mean[v], look.sd[v]) for v in values]
    if not any(v >= EXTRACEREBRAL for v in values):  # the map ends at the brain, what it measures does not
        gaussians[0] = look.surround
    means, sds = (_table(list(one), torch.float32, classes.device) for one in zip(*gaussians, strict=True))
    image = _look_up(sds, classes).mul_(_texture(key, tuple(classes.shape), look.grain, classes.device))
    image += _look_up(means, classes)
    return apply_axes(image, [slice_profile_matrix(n, n, 1.0, look.blur * FWHM) for n in image.shape])


def _texture(
    key: tuple[int | str, ...], shape: tuple[int, ...], grain: tuple[float, float, float], device: torch.device
) -> Tensor:
    """Noise of unit variance on three scales: voxels, and cubic B-splines of N(0, 1) every 2 and 5 voxels."""
    some = rng(*key, "synthesis", "texture")
    total = torch.from_numpy(some.standard_normal(shape, np.float32)).to(device).mul_(grain[0])
    for step, part in ((2, grain[1]), (5, grain[2])):
        matrices = [_even_spline(n, step, n // step + 5) for n in shape]
        points = torch.from_numpy(some.standard_normal([n // step + 5 for n in shape], np.float32)).to(device)
        total += apply_axes(points, [part ** (1 / 3) * m / _strength(step) for m in matrices])
    return total


@functools.lru_cache(maxsize=8)
def _strength(step: int) -> float:
    """Root mean square of a B-spline of white noise along one axis, knots every ``step`` voxels."""
    return float(np.sqrt((_even_spline(60 * step, step, 65) ** 2).sum(1).mean()))


@functools.lru_cache(maxsize=256)
def _even_spline(n: int, step: int, count: int) -> np.ndarray:
    return _spline(np.arange(n) - (n - 1) / 2, float(step), count)


def _spline(voxels: np.ndarray, distance: float, count: int) -> np.ndarray:
    """(n, count) cubic B-splines at voxels counted from the middle control point, which lie ``distance`` apart."""
    columns, weights = bspline_taps(voxels / distance + (count - 1) / 2)
    basis = np.zeros((len(voxels), count))
    np.add.at(basis, (np.arange(len(voxels))[:, None], np.clip(columns, 0, count - 1)), weights)
    return basis


# --- the deformation ----------------------------------------------------------------------------------------------

Frame = list[tuple[int, int]]  # first voxel, counted from the middle of the map, and size of the result, per axis


def _frame(
    classes: Tensor,
    shape: Shape,
    middle: list[float],
    spacing_mm: Triple,
    brain: list[bool],
    most: tuple[int, ...] | None,
) -> Frame:
    """Where the result has to reach so that what is deformed is seen; ``most``: except the brain, no further than that.

    Found by deforming every fourth voxel along each axis, or every one of a map that is thin.

    Raises InputError where nothing of the map meets a voxel of the result.
    """
    step = COARSE if min(classes.shape) >= 8 * COARSE else 1
    forward, spread = np.linalg.inv(shape.affine_33), np.abs(shape.warp_3KKK).max((1, 2, 3))
    sides = [(-m * s, (n - 1 - m) * s) for m, n, s in zip(middle, classes.shape, spacing_mm, strict=True)]
    corners = np.stack(np.meshgrid(*sides), -1).reshape(-1, 3) @ forward.T
    low, high = (corners.min(0) - spread) / spacing_mm, (corners.max(0) + spread) / spacing_mm
    loose = [(int(np.floor(a)), int(np.ceil((b - a) / step)) + 2) for a, b in zip(low, high, strict=True)]
    seen = torch.empty([size for _, size in loose], dtype=torch.uint8, device=classes.device)
    for planes, at in _sources(shape, middle, spacing_mm, loose, classes.device, step):
        within = torch.ones(at[0].shape, dtype=torch.bool, device=classes.device)
        index = torch.zeros(at[0].shape, dtype=torch.int32, device=classes.device)
        for d in range(3):
            nearest = at[d].add_(0.5).floor_()
            within &= (nearest >= 0) & (nearest < classes.shape[d])
            index += nearest.clamp_(0, classes.shape[d] - 1).to(torch.int32) * classes.stride(d)
        seen[planes] = torch.index_select(classes.view(-1), 0, index.view(-1)).view(index.shape) * within
    wanted = _table(brain, torch.uint8, classes.device)
    wanted[SURROUND] = 1
    inside = _look_up(wanted, seen)
    if not inside.any():
        raise InputError("label map", "is too small to be deformed", "leave it out")
    frame = []
    for d, (inner, outer) in enumerate(zip(_box(inside), _box(seen > 0), strict=True)):
        first, last = (loose[d][0] + step * n for n in (outer.start - 1, outer.stop))
        least, largest = (loose[d][0] + step * n for n in (inner.start - 1, inner.stop))
        if most is not None and last - first + 1 > most[d]:
            size = max(most[d], largest - least + 1)
            first = max(first, min(least, max(largest - size + 1, -(size // 2))))
            last = min(last, first + size - 1)
        frame.append((first, last - first + 1))
    return frame


def _sources(
    shape: Shape, middle: list[float], spacing_mm: Triple, frame: Frame, device: torch.device, step: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """Where the voxels of a result come from, in voxels of the map: planes of the result, and (3, x, Y, Z) coordinates.

    In pieces that stay in a CPU's cache. ``step`` : every so many voxels only; sizes in ``frame`` count these.
    """
    sizes = [size for _, size in frame]
    count = shape.warp_3KKK.shape[1]
    matrices = [
        _spline(np.arange(size) * step + first, shape.distance_mm / mm, count)
        for (first, size), mm in zip(frame, spacing_mm, strict=True)
    ]
    # A cubic B-spline whose control points are a linear function is that function: no arithmetic for the affine part.
    knots = shape.distance_mm * (np.indices((count,) * 3) - (count - 1) / 2) + shape.warp_3KKK
    pull = shape.affine_33 / np.asarray(spacing_mm)[:, None]  # mm to voxels of the map
    points = np.tensordot(pull, knots, 1) + np.reshape(middle, (3, 1, 1, 1))
    plane = apply_axes(torch.from_numpy(points).to(device, torch.float32), [None, *matrices[1:]]).flatten(2)
    along = torch.from_numpy(matrices[0].astype(np.float32)).to(device)
    thick = sizes[0] if device.type != "cpu" else max(1, CACHED // (sizes[1] * sizes[2]))
    for start in range(0, sizes[0], thick):
        planes = slice(start, min(start + thick, sizes[0]))
        used = support(matrices[0][planes])
        at = (along[planes, used] @ plane[:, used]).view(3, -1, *sizes[1:])
        yield planes, at


def _deform(
    image: Tensor, classes: Tensor, shape: Shape, middle: list[float], spacing_mm: Triple, frame: Frame
) -> tuple[Tensor, Tensor]:
    """Linear interpolation of the image, and the nearest class."""
    sizes = [size for _, size in frame]
    # One voxel of air all around, which is also what lies outside the map.
    padded, inside = (torch.nn.functional.pad(volume, [1] * 6) for volume in (image, classes))
    flat, flat_classes, strides = padded.view(-1), inside.view(-1), padded.stride()
    out = torch.empty(sizes, device=image.device)
    seen = torch.empty(sizes, dtype=torch.uint8, device=image.device)
    for planes, at in _sources(shape, middle, spacing_mm, frame, image.device):
        base = torch.zeros(at[0].shape, dtype=torch.int32, device=image.device)
        nearest = torch.zeros_like(base)
        for d in range(3):
            at[d].add_(1).clamp_(0, padded.shape[d] - 1.001)
            left = at[d].to(torch.int32)
            nearest.add_((at[d] + 0.5).to(torch.int32), alpha=strides[d])
            base.add_(left, alpha=strides[d])
            at[d] -= left
        torch.index_select(flat_classes, 0, nearest.view(-1), out=seen[planes].view(-1))
        _linear(flat, strides, base.view(-1), at.view(3, -1), out[planes].view(-1))
    return out, seen


def _linear(flat: Tensor, strides: tuple[int, ...], base: Tensor, parts: Tensor, out: Tensor) -> None:
    """Trilinear interpolation: eight gathers, seven mixtures."""
    rows = []
    for i in (0, strides[0]):
        lines = []
        for j in (0, strides[1]):
            near, far = (torch.index_select(flat[i + j + k :], 0, base) for k in (0, 1))
            lines.append(near.lerp_(far, parts[2]))
        rows.append(lines[0].lerp_(lines[1], parts[1]))
    torch.lerp(rows[0], rows[1], parts[0], out=out)


# --- label maps ---------------------------------------------------------------------------------------------------


def _classes(labels_XYZ: np.ndarray | Tensor, device: torch.device | str | None) -> tuple[Tensor, list[int]]:
    """Classes 0, 1, ... as uint8, and the label value of each; class 0 is label 0, whether it occurs or not."""
    if isinstance(labels_XYZ, Tensor):
        labels = labels_XYZ.to(device or labels_XYZ.device)
    else:
        array = np.ascontiguousarray(labels_XYZ)
        if array.dtype == np.uint16:  # torch does little with this type
            array = array.astype(np.int32)
        labels = torch.from_numpy(array).to(device or "cpu")
    if labels.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) or labels.ndim != 3:
        raise InputError("label map", f"is {labels.ndim}-D of {labels.dtype}", "three dimensions of whole numbers")
    if not labels.numel() or int(labels.min()) < 0 or int(labels.max()) > 32767:
        raise InputError("label map", "is empty or holds values outside 0 to 32767", "give FreeSurfer or tissue labels")
    counts = torch.bincount(labels.reshape(-1).to(torch.int32 if labels.device.type == "cpu" else torch.int64))
    counts[0] = 1
    values = torch.nonzero(counts).view(-1)
    if len(values) > MOST_CLASSES + 1:
        raise InputError("label map", f"holds {len(values)} values", f"at most {MOST_CLASSES}: is it an image?")
    table = torch.zeros(len(counts), dtype=torch.uint8, device=labels.device)
    table[values] = torch.arange(len(values), dtype=torch.uint8, device=labels.device)
    return _look_up(table, labels), values.tolist()


def _table(entries: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One entry for each class, 0 for those that are not in use."""
    table = torch.zeros(256, dtype=dtype)
    table[: len(entries)] = torch.tensor(entries, dtype=dtype)
    return table.to(device)


def _look_up(table: Tensor, index_XYZ: Tensor) -> Tensor:
    """table[index] of a volume of small whole numbers."""
    return torch.index_select(table, 0, index_XYZ.reshape(-1).to(torch.int32)).view(index_XYZ.shape)


def _box(mask: Tensor) -> tuple[slice, ...]:
    """Where a mask of 0 and 1 has ones, along each axis."""
    found = []
    for d in range(3):
        others = [a for a in range(3) if a != d]
        used = torch.nonzero(mask.amax(others)).view(-1)
        found.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(found)


def _grown(mask: Tensor, voxels: int) -> Tensor:
    """A mask and what lies within so many steps along the axes (6 neighbours)."""
    for _ in range(voxels):
        grown = mask.clone()
        for d in range(3):
            n = mask.shape[d] - 1
            grown.narrow(d, 0, n).logical_or_(mask.narrow(d, 1, n))
            grown.narrow(d, 1, n).logical_or_(mask.narrow(d, 0, n))
        mask = grown
    return mask
