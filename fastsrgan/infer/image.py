"""One image of a cohort in three stages that may run beside those of its neighbours: read, compute, write."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import read_json, write_json
from fastsrgan.core.progress import Progress
from fastsrgan.errors import InputError, ModelError, UsageError
from fastsrgan.infer.memory import Beside
from fastsrgan.infer.modes import Together
from fastsrgan.infer.planes import nearest
from fastsrgan.infer.settings import HEAD, InferSettings
from fastsrgan.infer.values import AUTO, OFF
from fastsrgan.infer.volume import InferResult, process
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.io.image_list import Image
from fastsrgan.model.networks import Generator
from fastsrgan.volume.components import segment
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.oddities import on_zeros, outliers

log = logging.getLogger("fastsrgan")

LONGEST_NAME = 255  # bytes that the file systems in use allow


@dataclass(frozen=True)
class ImageJob:
    """What holds for every volume of one call.

    model : of the record
    settings : ``mask`` is the path of an image, or "head"
    """

    out: Path
    generators: tuple[Generator, ...]
    model: dict
    settings: InferSettings
    provenance: dict
    progress: Progress
    resume: bool

    def outputs(self, image: Image) -> dict[str, Path]:
        """Every file of one image, by kind; the JSON is written last and stands for the whole."""
        kinds = (
            ["sr", "seg"] + ["mask"] * bool(self.generators[0].spec.mask_classes) + ["prob"] * self.settings.save_prob
        )
        kinds += ["residual"] * self.settings.save_residual
        files = {kind: self.out / f"{image.name}_{kind}.nii.gz" for kind in kinds}
        return (
            files
            | ({"png": self.out / f"{image.name}.png"} if self.settings.png else {})
            | {"json": self.record(image)}
        )

    def record(self, image: Image) -> Path:
        """The record of one image."""
        return self.out / f"{image.name}.json"

    def planes(self, image: Image) -> Path:
        """Where the planes of a result go that does not fit into memory."""
        target = self.record(image)
        return target.with_name(f".{target.stem}.planes")


@dataclass
class Loaded:
    """An image in memory; ``seconds`` grows from stage to stage."""

    image: Image
    volume: Volume
    mask: np.ndarray | str | None
    sha256: str
    seconds: float = 0.0
    result: InferResult | None = field(default=None, repr=False)


def load(image: Image, job: ImageJob) -> Loaded | None:
    """The first stage; None for an image that was finished before, where that is asked for.

    Raises as ``any_image.load_any``; UsageError for results that were made otherwise.
    """
    began = time.perf_counter()
    if job.resume and finished(image, job):
        log.info("%s: finished before, skipped", image.path)
        return None
    _check_places(image, job)
    asked = job.settings
    volume = any_image.load_any(image.path, series=asked.series, volume=asked.volume, max_voxels=asked.max_voxels)
    volume = replace(volume, warnings=(*volume.warnings, *outliers(volume.data)))
    for warning in volume.warnings:
        log.warning("%s: %s", image.path, warning)
    mask = asked.mask
    if mask not in (None, HEAD):
        inside = any_image.load_mask(mask, volume, max_voxels=asked.max_voxels)
        for warning in inside.warnings:
            log.warning("%s: %s", mask, warning)
        told = (*volume.warnings, *(f"mask: {warning}" for warning in inside.warnings))
        volume, mask = replace(volume, warnings=told), inside.data
    return Loaded(image, volume, mask, any_image.sha256(image.path, asked.series), time.perf_counter() - began)


def _check_places(image: Image, job: ImageJob) -> None:
    """Refuse an image whose results could not be written, before it is read."""
    for target in job.outputs(image).values():
        if len(os.fsencode(target.name)) > LONGEST_NAME:
            reason = f"the name of its result {target.name[:20]}...{target.name[-12:]} is too long for a disk"
            raise InputError(image.path, reason, f"rename the image: {LONGEST_NAME} bytes are the limit")
        if target.is_dir():
            raise UsageError(target, "is a folder where a result is to stand", "rename it, or choose another folder")


def compute(
    loaded: Loaded, job: ImageJob, label: str, beside: Beside | None = None, together: Together | None = None
) -> Loaded:
    """The second stage: the image through the model."""
    began = time.perf_counter()
    settings, said = _with_thickness(loaded, job.settings)
    try:
        loaded.result = process(
            loaded.volume.data,
            loaded.volume.affine,
            job.generators,
            settings,
            scratch=job.planes(loaded.image),
            beside=beside,
            together=together,
            progress=job.progress,
            label=label,
        )
    except InputError as error:
        raise InputError(loaded.image.path, error.reason, error.hint) from error
    except ModelError:
        shutil.rmtree(job.planes(loaded.image), ignore_errors=True)  # nothing that another run could go on with
        raise
    if loaded.result.report.get("agree"):
        loaded.result.report["agree"]["thickness_from"] = said
    loaded.seconds += time.perf_counter() - began
    return loaded


def _with_thickness(loaded: Loaded, settings: InferSettings) -> tuple[InferSettings, str]:
    """The settings for one image: its mask, and the slice thickness that its header states; and who stated it."""
    settings = replace(settings, mask=loaded.mask)
    if settings.slice_thickness != AUTO:
        return settings, "asked"
    if settings.geometry != "physical" or (settings.agree == OFF and not settings.save_residual):
        return settings, "spacing"
    found = any_image.slice_thickness(loaded.volume, loaded.image.path)
    if found is None:
        return settings, "spacing"
    if found.mm is None:
        warning = f"slice thickness not used, {found.source}"
        log.warning("%s: %s", loaded.image.path, warning)
        loaded.volume = replace(loaded.volume, warnings=(*loaded.volume.warnings, warning))
        return settings, "spacing"
    return replace(settings, slice_thickness=found.mm), found.source


def bytes_while_writing(loaded: Loaded, job: ImageJob) -> int:
    """What the last stage keeps in memory: the result where it is no file, the segmentation, and for a picture more."""
    result = loaded.result
    assert result is not None
    held = 0 if isinstance(result.sr, np.memmap) else result.sr.nbytes + result.prob.nbytes
    held += 0 if result.residual is None else result.residual.nbytes
    filtered, scaled = job.settings.largest_component or job.settings.min_size, job.settings.dtype == "input"
    labels = 1 + (len(result.prob) > 1) + 5 * bool(filtered) + 8 * scaled  # bytes a voxel
    return held + labels * result.sr.size + (loaded.volume.data.nbytes if job.settings.png else 0)


def write(loaded: Loaded, job: ImageJob) -> dict[str, Any]:
    """The last stage: images onto the disk, then the record that stands for them, which is returned."""
    began, image, result, outputs = time.perf_counter(), loaded.volume, loaded.result, job.outputs(loaded.image)
    settings = job.settings
    assert result is not None
    # The old record goes first: a kill between two files must not leave it standing beside new images.
    outputs["json"].unlink(missing_ok=True)
    code = image.meta.get("space_code", 1)
    voxel_mm3 = abs(float(np.linalg.det(result.affine[:3, :3])))
    seg, filtered = segment(
        result.prob[0], voxel_mm3, settings.threshold, settings.largest_component, settings.min_size
    )
    arrays = {"seg": seg, "prob": result.prob[0]}
    geometry, wanted = result.report["geometry"], result.report["new_resolution"]
    odd = on_zeros(seg, image.data, nearest(image.data.shape, image.spacing, seg.shape, wanted, geometry))
    if "mask" in outputs:
        arrays["mask"] = mask_values(job.model)[result.prob[1:].argmax(axis=0)]
    changed = settings.changed("segmentation")
    more: dict[str, Any] = {"segmentation": changed | filtered} if changed else {}
    if settings.dtype == "input":
        stored = more["sr_stored"] = _save_as_input(outputs["sr"], result, image, code)
        if clipped := stored.get("voxels_clipped"):
            beyond = f"{clipped} of {result.sr.size} voxels of the SR image lie beyond {stored['dtype']}"
            odd.append(f"{beyond} and were clipped: --dtype float32 keeps them")
    else:
        arrays = {"sr": result.sr, **arrays}
    if result.residual is not None:
        images.save(outputs["residual"], result.residual, image.affine, overwrite=True, code=code)
    for kind in (kind for kind in outputs if kind in arrays):
        images.save(outputs[kind], arrays[kind], result.affine, overwrite=True, code=code)
    if settings.png:
        _picture(outputs["png"], loaded, result, seg, settings.threshold)
    shutil.rmtree(job.planes(loaded.image), ignore_errors=True)
    for warning in odd:
        log.warning("%s: %s", loaded.image.path, warning)
    loaded.seconds += time.perf_counter() - began
    record = {
        "input": {
            "path": str(loaded.image.path.absolute()),
            "sha256": loaded.sha256,
            "series": settings.series,
            "volume": settings.volume,
            "shape": list(image.data.shape),
            "spacing_mm": list(image.spacing),
            **({"dicom": image.meta["dicom"]} if "dicom" in image.meta else {}),
        },
        "weights": job.model,
        **result.report,
        "threshold": settings.threshold,
        **more,
        "affine": result.affine,
        "outputs": names(outputs),
        "warnings": [*image.warnings, *result.report["warnings"], *odd],
        "seconds": loaded.seconds,
        "asked": settings.record(),
        "provenance": job.provenance,
    }
    write_json(outputs["json"], record)
    return record


def mask_values(model: dict[str, Any]) -> np.ndarray:
    """The value of each class in the mask image: for structures of a label map the first that they have there.

    ``evaluate --label-classes cortex=3,42`` then means the same in the mask and in the label map.
    """
    known = model.get("structures") or (model.get("averaged") or [{}])[0].get("structures")
    if not known:
        return np.arange(256, dtype=np.uint8)
    values = np.array([0, *(min(one["values"]) for one in known)])
    return values.astype(np.uint8 if values.max() < 256 else np.uint16)


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


def _picture(target: Path, loaded: Loaded, result: InferResult, seg: np.ndarray, threshold: float) -> None:
    """Image, SR, and the segmentation's outline on the SR."""
    from fastsrgan.pictures.figure import Column, planes_figure

    sr, low = Volume(result.sr, result.affine), loaded.volume
    columns = [
        Column(low, "Image", f"{_millimetres(low)}\nvoxels as acquired", nearest=True),
        Column(sr, "fastsrgan", _millimetres(sr), accent=True),
        Column(sr, "Segmentation", f"probability above {threshold:g}", accent=True, outlines=True),
    ]
    footer = f"patch {result.report['patch']}, step {result.report['step']}"
    masks = (Volume(seg, result.affine), None)
    planes_figure(
        target,
        columns,
        reference=sr,
        masks=masks,
        compared=low,
        title=loaded.image.name.encode("utf8", "replace").decode(),
        footer=footer,
    )


def _millimetres(volume: Volume) -> str:
    return " × ".join(f"{size:.3g}" for size in volume.spacing) + " mm"


def names(outputs: dict[str, Path]) -> dict[str, str]:
    """The files as text."""
    return {kind: str(path) for kind, path in outputs.items()}


# --- what is there already ----------------------------------------------------------------------------------------


def finished(image: Image, job: ImageJob) -> bool:
    """Whether this image was done with these weights and settings. Raises UsageError where it was done with others."""
    outputs = job.outputs(image)
    record = read_json(outputs["json"])
    try:
        differing = ["weights"] * (record["weights"]["sha256"] != job.model["sha256"])
        differing += ["volume"] * (record["input"]["volume"] != job.settings.volume)
        differing += job.settings.differing(record["asked"])
        differing += ["input"] * (record["input"]["sha256"] != any_image.sha256(image.path, job.settings.series))
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    if differing:
        known = dict.fromkeys(key if key.isidentifier() and len(key) < 40 else "setting" for key in differing)
        reason = f"was made with another {', '.join(known)}"
        raise UsageError(outputs["json"], reason, "--overwrite replaces it, or choose another folder")
    return all(target.exists() for target in outputs.values())
