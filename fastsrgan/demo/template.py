"""Real data without a download: the MNI152 template that nilearn's wheel carries, and a cohort made from it.

The template is the ICBM 2009a non-linear symmetric average of 152 adults (McGill University), T1-weighted, 1 mm,
skull-stripped, with maps of grey- and white-matter probability. The cohort's subjects are synthetic: smooth
deformations and contrast changes of that one real template, drawn from a seed.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.interpolate import make_interp_spline

from fastsrgan.core import draws
from fastsrgan.core.files import atomic_write, output_folder, write_json
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.io import nifti as images
from fastsrgan.volume.geometry import Volume

MAPS = ("t1", "gm", "wm")
NOTICE = (
    "MNI ICBM152 2009a non-linear symmetric template, (c) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, "
    "Montreal Neurological Institute, McGill University"
)
LABEL_THRESHOLD = 0.5  # grey-matter probability
IMAGE_MAXIMUM = 1000  # of the int16 images
MARGIN = 8  # voxels of background kept around the brain
_SLAB_VOXELS = 1 << 19


def mni152() -> tuple[Volume, Volume, Volume]:
    """T1 image, grey-matter and white-matter probability in [0, 1]: three (197, 233, 189) float32 volumes, 1 mm, RAS.

    The T1 keeps its stored intensities (0 to 255; 0 outside the brain). Raises ResourceError without nilearn.
    """
    folder = _nilearn_data()
    paths = [folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in MAPS]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        reason = f"this nilearn does not carry {', '.join(missing)}"
        raise ResourceError("MNI152 template", reason, "pip install 'nilearn>=0.8.1'")
    t1, grey, white = (images.load(p) for p in paths)
    grey, white = (Volume(v.data / np.float32(255), v.affine, v.warnings, v.meta) for v in (grey, white))
    return t1, grey, white


def _nilearn_data() -> Path:
    # find_spec looks the package up without running it: importing nilearn takes seconds.
    spec = importlib.util.find_spec("nilearn")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise ResourceError("MNI152 template", "nilearn, which carries it, is not installed", "pip install nilearn")
    return Path(places[0]) / "datasets" / "data"


@dataclass(frozen=True)
class Contrast:
    """image -> max (image / max)^power (1 + grey_gain G + white_gain W), G and W the tissue probabilities."""

    power: float
    grey_gain: float
    white_gain: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Contrast:
        """Power in [0.8, 1.25] (uniform in its logarithm), tissue gains in [-0.08, 0.08]."""
        power = float(np.exp(rng.uniform(np.log(0.8), np.log(1.25))))
        return cls(power, *(float(g) for g in rng.uniform(-0.08, 0.08, 2)))

    def apply(self, image: np.ndarray, grey: np.ndarray, white: np.ndarray) -> np.ndarray:
        """(X, Y, Z) image >= 0 and probabilities in [0, 1] -> (X, Y, Z) float32, background 0 where it was 0."""
        top = float(image.max())
        mixed = (np.asarray(image, np.float32) / top) ** np.float32(self.power)
        return top * mixed * (1 + np.float32(self.grey_gain) * grey + np.float32(self.white_gain) * white)


def displacement(
    shape: tuple[int, int, int], rng: np.random.Generator, sd_voxels: float = 4.0, grid: int = 7
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw a smooth displacement field as control values (3, g, g, g) and interpolation matrices [(n, g)] per axis.

    The control points span the volume from its first to its last voxel; between them the field is the natural cubic
    spline. Each component is normal with standard deviation ``sd_voxels`` at the control points. Raises UsageError for
    a grid below 4 or a negative standard deviation.
    """
    if grid < 4 or not sd_voxels >= 0:
        raise UsageError("deformation", f"grid {grid}, sd_voxels {sd_voxels}", "grid >= 4, sd_voxels >= 0")
    control = rng.normal(0.0, 1.0, (3, grid, grid, grid)) * sd_voxels
    # Natural ends: other end conditions swing so far in the outer cells that the field folds there.
    spline = make_interp_spline(np.arange(grid), np.eye(grid), k=3, bc_type="natural")
    return control, [spline(np.linspace(0, grid - 1, n)) for n in shape]


def deform(
    arrays: Sequence[np.ndarray],
    rng: np.random.Generator,
    sd_voxels: float = 4.0,
    grid: int = 7,
    orders: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """Move several (X, Y, Z) arrays of one grid by the same smooth random displacement.

    out(x) = array(x + u(x)) with u of ``displacement``; spline order 3 for the first array and 1 for the others unless
    ``orders`` names them; 0 where x + u(x) leaves the volume. Label maps are to be thresholded after, not before.
    Returns float32 arrays of the same shape.
    """
    shape = arrays[0].shape
    orders = [3, *[1] * (len(arrays) - 1)] if orders is None else list(orders)
    if any(a.shape != shape for a in arrays) or len(orders) != len(arrays):
        raise UsageError("deformation", "arrays of several shapes, or not one order each", "one shape, one order each")
    control, (wx, wy, wz) = displacement(shape, rng, sd_voxels, grid)
    control = np.einsum("cabd,yb,zd->cayz", control, wy, wz, optimize=True)
    sources = [
        ndimage.spline_filter(a, order, np.float64, mode="mirror") if order > 1 else np.ascontiguousarray(a, np.float32)
        for a, order in zip(arrays, orders, strict=True)
    ]
    out = [np.empty(shape, np.float32) for _ in arrays]
    rows = max(1, _SLAB_VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        part = slice(start, min(start + rows, shape[0]))
        where = np.einsum("xa,cayz->cxyz", wx[part], control, optimize=True)
        for axis in range(3):
            index = np.arange(part.start, part.stop) if axis == 0 else np.arange(shape[axis])
            where[axis] += np.expand_dims(index, [d for d in range(3) if d != axis])
        for source, order, result in zip(sources, orders, out, strict=True):
            ndimage.map_coordinates(source, where, result[part], order=order, mode="constant", prefilter=False)
    return out


@dataclass(frozen=True)
class TemplateSubject:
    """One synthetic subject on disk: int16 image, uint8 label, and "Train" or "Test"."""

    name: str
    base: str
    image: Path
    label: Path


@dataclass(frozen=True)
class TemplateCohort:
    """The table (the original's CSV: HR_image, Label_image, Base) and the subjects it lists, in its order."""

    csv: Path
    subjects: tuple[TemplateSubject, ...]

    def of(self, base: str) -> tuple[TemplateSubject, ...]:
        """The subjects of "Train" or of "Test"."""
        return tuple(s for s in self.subjects if s.base == base)


def make_cohort(
    out_dir: str | Path,
    n_train: int = 3,
    n_test: int = 1,
    seed: int = 0,
    crop: bool = True,
    *,
    sd_voxels: float = 4.0,
    template: tuple[Volume, Volume, Volume] | None = None,
    overwrite: bool = False,
    progress: Progress = QUIET,
) -> TemplateCohort:
    """Write a cohort of synthetic subjects made from one real template: the same seed gives the same bytes.

    Each subject is the template with a contrast of its own (``Contrast``) under a smooth deformation of its own
    (``deform``). ``<name>_T1w.nii.gz`` is int16 with maximum 1000, ``<name>_label-GM.nii.gz`` uint8, 1 where the
    deformed grey-matter probability exceeds 0.5; ``cohort.csv`` names them by paths relative to itself and
    ``cohort.json`` holds what was drawn. A subject is either Train or Test.

    Parameters
    ----------
    crop : keep the brain's bounding box and 8 voxels around it (161 x 197 x 163 of 197 x 233 x 189)
    sd_voxels : standard deviation of the displacement at the 7^3 control points
    template : T1, grey and white volumes of one grid; default ``mni152()``
    overwrite : replace files of the same names

    Raises ResourceError without nilearn or a writable folder, UsageError for negative counts.
    """
    if n_train < 0 or n_test < 0 or n_train + n_test == 0:
        raise UsageError("cohort", f"{n_train} training and {n_test} test subjects", "at least one subject")
    out = output_folder(out_dir)
    t1, grey, white = template or mni152()
    if crop:
        t1, grey, white = _crop_to_brain(t1, grey, white)
    subjects, drawn = [], {}
    progress.start("demo cohort", n_train + n_test, "subject")
    for i in range(n_train + n_test):
        name = f"sub-{i + 1:02d}"
        # Draws are named by the subject alone: a larger cohort of the same seed begins with the same subjects.
        contrast = Contrast.draw(draws.rng(seed, "cohort", name, "contrast"))
        bend = draws.rng(seed, "cohort", name, "deformation")
        image, label = synthesise(t1, grey, white, contrast, bend, sd_voxels)
        base = "Train" if i < n_train else "Test"
        subject = TemplateSubject(name, base, out / f"{name}_T1w.nii.gz", out / f"{name}_label-GM.nii.gz")
        images.save(subject.image, image, t1.affine, overwrite=overwrite, description="fastsrgan synthetic subject")
        images.save(subject.label, label, t1.affine, overwrite=overwrite, description="fastsrgan grey matter")
        subjects.append(subject)
        drawn[name] = {"base": base, "contrast": asdict(contrast), "label_voxels": int(label.sum())}
        progress.advance(1, subject=name)
    progress.finish()
    table = _write_table(out / "cohort.csv", subjects)
    facts = {"template": NOTICE, "seed": seed, "sd_voxels": sd_voxels, "shape": t1.data.shape, "subjects": drawn}
    write_json(out / "cohort.json", facts)
    return TemplateCohort(table, tuple(subjects))


def synthesise(
    t1: Volume, grey: Volume, white: Volume, contrast: Contrast, rng: np.random.Generator, sd_voxels: float = 4.0
) -> tuple[np.ndarray, np.ndarray]:
    """One subject: (X, Y, Z) int16 image with maximum 1000, 0 outside the brain, and (X, Y, Z) uint8 label."""
    toned = contrast.apply(t1.data, grey.data, white.data)
    brain = (t1.data > 0).astype(np.float32)
    image, probability, inside = deform([toned, grey.data, brain], rng, sd_voxels, orders=[3, 1, 0])
    # The spline rings at the cut edge of a skull-stripped brain; outside stays 0 as a skull-stripper leaves it.
    image = np.where(inside > 0, np.maximum(image, 0), 0)
    top = float(image.max())
    scaled = np.rint(image * (IMAGE_MAXIMUM / top)) if top > 0 else image
    return scaled.astype(np.int16), (probability > LABEL_THRESHOLD).astype(np.uint8)


def _crop_to_brain(*volumes: Volume) -> tuple[Volume, ...]:
    first = volumes[0]
    inside = np.argwhere(first.data > 0)
    low = np.maximum(inside.min(0) - MARGIN, 0)
    high = np.minimum(inside.max(0) + 1 + MARGIN, first.data.shape)
    affine = np.array(first.affine, float)
    affine[:3, 3] = (affine @ [*low, 1])[:3]
    part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return tuple(Volume(np.ascontiguousarray(v.data[part]), affine, v.warnings, v.meta) for v in volumes)


def _write_table(path: Path, subjects: Sequence[TemplateSubject]) -> Path:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["HR_image", "Label_image", "Base"])
        writer.writerows([s.image.name, s.label.name, s.base] for s in subjects)
    return path


Triple = tuple[float, float, float]


def whole_slices(volume: Volume, low_res_mm: Triple) -> Volume:
    """The volume without the last voxels that no whole low-resolution voxel covers, so that both grids end together."""
    keep = []
    for n, s, r in zip(volume.data.shape, volume.spacing, low_res_mm, strict=True):
        fits = [m for m in range(n, max(n - 32, 0), -1) if abs(m * s / r - round(m * s / r)) < 1e-6]
        keep.append(slice(0, fits[0] if fits else n))
    return replace(volume, data=np.ascontiguousarray(volume.data[tuple(keep)]))
