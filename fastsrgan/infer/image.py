"""One image of a cohort in three stages that may run beside those of its neighbours: read, compute, write."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.config import AXES
from fastsrgan.core.files import ResultLock, mapping, read_json, sizes, unlocks_where_it_fails, whole, write_json
from fastsrgan.core.places import recorded
from fastsrgan.core.progress import Progress
from fastsrgan.errors import InputError, ModelError, UsageError, some_of, times
from fastsrgan.evaluate.choice import Model, ModelChoice
from fastsrgan.evaluate.plausibility import RED, Look, enclosed, judge, measure
from fastsrgan.evaluate.wording import picture_words
from fastsrgan.infer.memory import Beside
from fastsrgan.infer.modes import Together
from fastsrgan.infer.planes import Unfinished, is_isotropic, nearest, own_grid
from fastsrgan.infer.settings import InferSettings
from fastsrgan.infer.volume import InferResult, process
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.io.image_list import Image
from fastsrgan.model import purpose as purposes
from fastsrgan.model.purpose import mask_names
from fastsrgan.volume.components import ISLAND_SHARE, segment
from fastsrgan.volume.geometry import Volume, spacing_of, world_orientation
from fastsrgan.volume.oddities import odd_intensities, on_zeros

log = logging.getLogger("fastsrgan")

DESCRIPTION = 80  # bytes of a NIfTI header with the end
LONGEST_NAME = 255  # bytes that the file systems in use allow


class Isotropic(UsageError):
    """An image whose voxels have the result's size already: nothing is done unless it is asked for."""


@dataclass(frozen=True)
class ImageJob:
    """What holds for every volume of one call.

    models : the weights
    settings : ``mask`` is the path of an image, or "head"; replace : what stands there, else it is kept
    """

    out: Path
    models: ModelChoice
    settings: InferSettings
    provenance: dict
    progress: Progress
    resume: bool
    replace: bool = True

    def outputs(self, image: Image) -> dict[str, Path]:
        """Every file of one image, by kind; the JSON is written last and stands for the whole."""
        ends = {kind: f"_{kind}.nii.gz" for kind in self.settings.kinds(self.models.mask_classes)}
        ends |= {"png": ".png"} if "png" in ends else {}
        return {kind: self.out / f"{image.name}{end}" for kind, end in ends.items()} | {"json": self.record(image)}

    def record(self, image: Image) -> Path:
        """The record of one image."""
        return self.out / f"{image.name}.json"

    def planes(self, image: Image) -> Path:
        """Where the planes of a result go that does not fit into memory."""
        target = self.record(image)
        return target.with_name(f".{target.stem}.planes")


@dataclass
class Loaded:
    """An image in memory.

    look : what it is like; chosen : name of the model and why, both empty where weights were named
    seconds : grows from stage to stage
    lock : keeps other processes from writing this result, from the second stage on
    """

    image: Image
    volume: Volume
    mask: np.ndarray | None
    sha256: str
    look: Look
    model: Model
    chosen: tuple[str, str]
    seconds: float = 0.0
    result: InferResult | None = field(default=None, repr=False)
    lock: ResultLock | None = field(default=None, repr=False)


def load(image: Image, job: ImageJob) -> Loaded | None:
    """The first stage; None for an image that was finished before, where that is asked for.

    Raises as ``any_image.load_any``; UsageError for results that were made otherwise; Isotropic.
    """
    began = time.perf_counter()
    if job.resume and finished(image, job):
        log.info("%s: finished before, skipped", image.path)
        return None
    _check_places(image, job)
    asked = job.settings
    volume = read(image, asked)
    for warning in volume.warnings:  # before the voxels are judged by their sizes, which one may be about
        log.warning("%s: %s", image.path, warning)
    done = asked.grid_is_open and is_isotropic(volume.spacing)
    if done and not _overlapping(volume, image.path, asked.thickness_mm):
        reason = f"voxels of {times(volume.spacing)} mm: there is nothing to super-resolve, nothing was done"
        hint = "--new-resolution same segments it as it is, --new-resolution MM makes finer voxels"
        raise Isotropic(image.path, reason, hint)
    for warning in (odd := odd_intensities(volume.data, asked.physical)):
        log.warning("%s: %s", image.path, warning)
    volume = replace(volume, warnings=(*volume.warnings, *odd))
    mask: np.ndarray | None = None
    if asked.mask_file is not None:
        inside = any_image.load_mask(asked.mask_file, volume, max_voxels=asked.max_voxels)
        for warning in inside.warnings:
            log.warning("%s: %s", asked.mask_file, warning)
        told = (*volume.warnings, *(f"mask: {warning}" for warning in inside.warnings))
        volume, mask = replace(volume, warnings=told), inside.data
    look = measure(volume.data, volume.spacing, mask, volume.affine)
    model, name, why = job.models.of(look)
    if name:
        log.info("%s: weights: %s (%s; --weights chooses otherwise)", image.path.name, name, why)
        job.models.introduce(name)
    digest = any_image.sha256(image.path, image.series)
    return Loaded(image, volume, mask, digest, look, model, (name, why), time.perf_counter() - began)


def _overlapping(volume: Volume, path: Path, asked_mm: float | None) -> bool:
    """Whether slices are thicker than they are apart, as it was asked for or as the header states: equal voxels, but a
    blurred scan."""
    if asked_mm is None:
        stated = any_image.slice_thickness(volume, path)
        asked_mm = stated.mm if stated is not None and stated.mm is not None else 0.0
    return asked_mm > 1.01 * max(volume.spacing)


def read(image: Image, asked: InferSettings) -> Volume:
    """The volume that is meant. Raises as ``any_image.load_any``."""
    return any_image.load_any(image.path, series=image.series, volume=asked.volume, max_voxels=asked.max_voxels)


def look_at(image: Image, asked: InferSettings) -> Look:
    """What ``load`` sees in an image, where a record does not hold it."""
    volume = read(image, asked)
    inside = None
    if asked.mask_file is not None:
        inside = any_image.load_mask(asked.mask_file, volume, max_voxels=asked.max_voxels).data
    return measure(volume.data, volume.spacing, inside, volume.affine)


def _check_places(image: Image, job: ImageJob) -> None:
    """Refuse an image whose results could not be written, before it is read."""
    for target in job.outputs(image).values():
        if len(os.fsencode(target.name)) > LONGEST_NAME:
            reason = f"the name of its result {target.name[:20]}...{target.name[-12:]} is too long for a disk"
            raise InputError(image.path, reason, f"rename the image: {LONGEST_NAME} bytes are the limit")
        if target.is_dir():
            raise UsageError(target, "is a folder where a result is to stand", "rename it, or choose another folder")


@unlocks_where_it_fails
def compute(
    loaded: Loaded, job: ImageJob, label: str, beside: Beside | None = None, together: Together | None = None
) -> Loaded:
    """The second stage: the image through the model. ResourceError where another process makes the same result."""
    began = time.perf_counter()
    if together is None or not together.ranks.rank:
        loaded.lock = ResultLock(job.record(loaded.image), loaded)
        _check_kept(job, loaded.image)
    settings, said = _with_thickness(loaded, _as_made(loaded, job.settings))
    try:
        loaded.result = process(
            loaded.volume.data, loaded.volume.affine, loaded.model.generators, settings, beside=beside,
            scratch=job.planes(loaded.image), together=together, progress=job.progress, label=label,
        )  # fmt: skip
    except Exception as error:
        planes, left = job.planes(loaded.image), loaded.lock is not None  # without the lock they are another call's
        if left and isinstance(error, ModelError):
            shutil.rmtree(planes, ignore_errors=True)  # nothing that another run could go on with
        if left and together is not None:
            shutil.rmtree(Unfinished.partial_of(planes), ignore_errors=True)
        if isinstance(error, InputError):
            raise InputError(loaded.image.path, error.reason, error.hint) from error
        raise
    if loaded.result.report.get("agree"):
        loaded.result.report["agree"]["thickness_from"] = said
    loaded.seconds += time.perf_counter() - began
    return loaded


def _as_made(loaded: Loaded, settings: InferSettings) -> InferSettings:
    """The settings for one image: its mask, and what is left to the weights."""
    purpose, name = loaded.model.purpose, loaded.image.path.name
    grid = own_grid(loaded.volume.spacing, purpose.grid_mm and purpose.grid_mm[1])
    sides = purpose.mirrored and AXES[world_orientation(loaded.volume.affine).axes[0]]
    unknown = purpose.unknown(loaded.look.slices) if purpose.knows_upright else ""
    settings, lines = settings.for_image(loaded.mask, grid, purpose.outside, unknown, sides)
    for line in lines:
        log.info("%s: %s", name, line)
    return settings


def _with_thickness(loaded: Loaded, settings: InferSettings) -> tuple[InferSettings, str]:
    """The settings with the slice thickness that the image's header states; and who stated it."""
    if source := settings.thickness_from:
        warning = any_image.odd_thickness(loaded.volume, settings.thickness_mm)
    else:
        found, source = any_image.slice_thickness(loaded.volume, loaded.image.path), "spacing"
        if found is not None and found.mm is not None:
            return replace(settings, slice_thickness=found.mm), found.source
        warning = f"slice thickness not used, {found.source}" if found is not None else ""
    if warning:
        log.warning("%s: %s", loaded.image.path, warning)
        loaded.volume = replace(loaded.volume, warnings=(*loaded.volume.warnings, warning))
    return settings, source


def bytes_while_writing(loaded: Loaded, job: ImageJob) -> int:
    """What the last stage keeps in memory: the result where it is no file, the segmentation, and for a picture more."""
    result = loaded.result
    assert result is not None
    held = 0 if isinstance(result.sr, np.memmap) else result.sr.nbytes + result.prob.nbytes
    held += 0 if result.doubt is None or held == 0 else result.doubt.nbytes
    held += 0 if result.residual is None else result.residual.nbytes
    purpose = loaded.model.purpose
    filtered = job.settings.largest_component or job.settings.least_component(purpose.island_mm3) or purpose.is_cortex
    labels = 1 + (len(result.prob) > 1) + 5 * bool(filtered) + 8 * (job.settings.dtype == "input")  # bytes a voxel
    # The picture: the spline's coefficients and itself, which voxels lie in the scan, and differences.
    low, copies = loaded.volume.data, 1 + (loaded.mask is not None)
    drawn = copies * low.nbytes + 8 * low.size + 10 * result.sr.size if job.settings.png else 0
    return held + labels * result.sr.size + drawn


@unlocks_where_it_fails
def write(loaded: Loaded, job: ImageJob) -> dict[str, Any]:
    """The last stage: images onto the disk, then the record that stands for them, which is returned."""
    began, image, result, outputs = time.perf_counter(), loaded.volume, loaded.result, job.outputs(loaded.image)
    settings = job.settings
    assert result is not None
    _check_kept(job, loaded.image)
    kept = _clear(outputs, job)
    purpose, code = loaded.model.purpose, image.meta.get("space_code", 1)
    voxel_mm3 = abs(float(np.linalg.det(result.affine[:3, :3])))
    least = settings.least_component(purpose.island_mm3)
    share = ISLAND_SHARE if settings.min_size is None else None
    filters = settings.largest_component, least, share, purpose.piece_mm3
    seg, filtered = segment(result.prob[0], voxel_mm3, settings.threshold, *filters)
    within = enclosed(result.sr, seg, spacing_of(result.affine)) if purpose.contrasts else None
    misfit = (result.report.get("agree") or {}).get("residual_percent_network")
    verdict = judge(
        loaded.look, seg, voxel_mm3, purpose, loaded.mask is not None, within, misfit, loaded.model.apart,
        filtered.get("two_largest_share"), loaded.model.dice, "upright" in result.report,
    )  # fmt: skip
    arrays = {"seg": seg, "prob": result.prob[0]} | ({} if result.doubt is None else {"doubt": result.doubt})
    geometry, wanted = result.report["geometry"], result.report["new_resolution"]
    odd = on_zeros(seg, image.data, nearest(image.data.shape, image.spacing, seg.shape, wanted, geometry))
    if "mask" in outputs:
        arrays["mask"] = purposes.mask_values(loaded.model.facts)[result.prob[1:].argmax(axis=0)]
    changed = settings.changed("segmentation") | filtered
    more: dict[str, Any] = {"segmentation": changed} if changed else {}
    if settings.dtype == "input":
        stored = more["sr_stored"] = _save_as_input(outputs["sr"], result, image, code)
        if clipped := stored.get("voxels_clipped"):
            beyond = some_of(
                clipped, result.sr.size, "voxel", "of the SR image lies beyond", "of the SR image lie beyond"
            )
            odd.append(f"{beyond} {stored['dtype']}, clipped to it: --dtype float32 keeps them")
    else:
        arrays = {"sr": result.sr, **arrays}
    if result.residual is not None:
        images.save(outputs["residual"], result.residual, image.affine, overwrite=True, code=code)
    about = {"seg": f"fastsrgan: {purpose.structure}", "prob": f"fastsrgan: probability of {purpose.structure}"}
    named = mask_names(loaded.model.facts) if "mask" in outputs else ()
    about["mask"] = _listed("fastsrgan: ", [f"{value} {name}" for value, name in named])
    for kind in (kind for kind in outputs if kind in arrays):
        intent = purpose.structure if kind == "seg" else ""
        texts: dict[str, Any] = {"description": about.get(kind, "fastsrgan"), "intent": intent}
        images.save(outputs[kind], arrays[kind], result.affine, overwrite=True, code=code, **texts)
    name, why = loaded.chosen
    facts = {
        "weights": loaded.model.facts | ({"name": name, "chosen": f"auto: {why}"} if name else {}),
        "structures": [{"value": value, "name": text} for value, text in purpose.structures],
        **({"mask_structures": [{"value": value, "name": text} for value, text in named]} if named else {}),
        "made_for": purpose.to_dict(),
        "plausibility": verdict.to_dict() | {"scan": loaded.look.to_dict()},
        **result.report,
        "threshold": settings.threshold,
        **more,
        "affine": result.affine,
    }
    if settings.png:
        _picture(outputs["png"], loaded, result, seg, facts)
    shutil.rmtree(job.planes(loaded.image), ignore_errors=True)
    for warning in odd:
        log.warning("%s: %s", loaded.image.path, warning)
    (log.warning if verdict.light == RED else log.info)("%s: plausibility %s", loaded.image.path, verdict.line())
    odd += [f"plausibility {verdict.line()}"] * (verdict.light == RED)
    loaded.seconds += time.perf_counter() - began
    source = {
        "path": recorded(loaded.image.path), "sha256": loaded.sha256, "series": loaded.image.series,
        "volume": settings.volume, "shape": list(image.data.shape), "spacing_mm": list(image.spacing),
    }  # fmt: skip
    record = {
        "input": source | ({"dicom": image.meta["dicom"]} if "dicom" in image.meta else {}),
        **facts,
        "outputs": {kind: path.name for kind, path in (outputs | kept).items()},  # all of them beside the record
        "file_bytes": sizes(outputs | kept),
        "warnings": [*image.warnings, *result.report["warnings"], *odd],
        "seconds": loaded.seconds,
        "asked": settings.record(),
        "provenance": job.provenance,
    }
    write_json(outputs["json"], record)
    if loaded.lock is not None:
        loaded.lock.release()
    return record


def _check_kept(job: ImageJob, image: Image) -> None:
    """Raise UsageError where the result came to be since the call began, and is not to be replaced."""
    if not job.replace and (record := job.record(image)).exists():
        raise UsageError(record, "was written by another call meanwhile and is kept", "--resume, or another folder")


def _clear(outputs: dict[str, Path], job: ImageJob) -> dict[str, Path]:
    """Away with the record that stands there, and with what it names beside itself and is not written anew.

    A doubt or a picture of a replaced result would be taken for one of the new. Where --resume makes more of the same
    result they are of this one: they stay, and are returned. The record goes first: a kill between two files must not
    leave it standing beside new images.
    """
    record = outputs["json"]
    known = read_json(record)
    made = known.get("outputs")
    beside = {k: record.with_name(Path(str(name)).name) for k, name in made.items()} if isinstance(made, dict) else {}
    own = {k: path for k, path in beside.items() if path.name.startswith((f"{record.stem}.", f"{record.stem}_"))}
    others = {k: path for k, path in own.items() if path not in outputs.values() and path.exists()}
    same = job.resume and isinstance(known.get("asked"), dict) and not job.settings.differing(known["asked"])
    record.unlink(missing_ok=True)
    for path in () if same else others.values():
        path.unlink()
    return others if same else {}


def _listed(start: str, items: Sequence[str]) -> str:
    """What a NIfTI header has room for; "..." for items that do not fit."""
    text = start + ", ".join(items)
    fits = len(text) < DESCRIPTION  # a byte for each character: `images.save` writes ASCII
    return text.removesuffix(": ") if fits else f"{text[: DESCRIPTION - 6].rsplit(',', 1)[0]}, ..."


def _save_as_input(target: Path, result: InferResult, image: Volume, code: int) -> dict[str, Any]:
    """SR in the type and scaling of the image it was made of; what became of it."""
    dtype = np.dtype(image.meta["stored_dtype"])
    if dtype.kind not in "iu":
        images.save(target, result.sr, result.affine, overwrite=True, code=code)
        return {"dtype": "float32"}
    slope, inter = float(image.meta["slope"]), float(image.meta["inter"])
    images.save(target, result.sr, result.affine, dtype=dtype, scaling=(slope, inter), overwrite=True, code=code)
    half = abs(slope) / 2  # what rounds to the last number of the type is not clipped
    low, high = sorted((np.iinfo(dtype).min * slope + inter, np.iinfo(dtype).max * slope + inter))
    clipped = sum(int(np.count_nonzero((plane < low - half) | (plane > high + half))) for plane in result.sr)
    return {"dtype": dtype.name, "slope": slope, "inter": inter, "voxels_clipped": clipped}


def _picture(target: Path, loaded: Loaded, result: InferResult, seg: np.ndarray, record: Mapping[str, Any]) -> None:
    """Scan, its cubic spline, SR, and the segmentation's outline on the SR; below the traffic light and the weights.

    record : what is known of it before its files are written
    """
    from fastsrgan.evaluate.grids import inside_mask, onto_grid
    from fastsrgan.pictures.figure import result_figure
    from fastsrgan.pictures.planes import from_lowest

    sr, low = Volume(result.sr, result.affine), loaded.volume
    spline = inside_mask(result.report, onto_grid(low, sr, name="the spline of the input", notes=[]), sr)
    volumes = {"low": low, "spline": spline, "sr": sr, "seg": Volume(seg, result.affine)}
    title = loaded.image.name.encode("utf8", "replace").decode()
    result_figure(target, from_lowest(volumes)[0], title=title, **picture_words(record, result.affine))


def names(outputs: dict[str, Path]) -> dict[str, str]:
    """The files as text."""
    return {kind: str(path) for kind, path in outputs.items()}


# --- what is there already ----------------------------------------------------------------------------------------


def finished(image: Image, job: ImageJob) -> bool:
    """Whether this image was done with these weights and settings. Raises UsageError where it was done with others."""
    outputs = job.outputs(image)
    record = read_json(outputs["json"])
    try:
        differing = ["weights"] * (not job.models.made(record, lambda: look_at(image, job.settings)))
        differing += ["volume"] * (record["input"]["volume"] != job.settings.volume)
        differing += job.settings.differing(record["asked"])
        differing += ["input"] * (record["input"]["sha256"] != any_image.sha256(image.path, image.series))
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    if differing:
        known = dict.fromkeys(key if key.isidentifier() and len(key) < 40 else "setting" for key in differing)
        reason = f"was made with another {', '.join(known)}"
        raise UsageError(outputs["json"], reason, "--overwrite replaces it, or choose another folder")
    return whole(outputs, mapping(record.get("file_bytes")))
