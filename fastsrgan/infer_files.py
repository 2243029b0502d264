"""Files in, files out: a list of images through one model, with provenance, restart and a summary."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan import any_image, images, runtime, table, tiles
from fastsrgan import weights as weight_files
from fastsrgan.errors import FastsrganError, InputError, PartialFailure, UsageError
from fastsrgan.infer import InferResult, Resolution, Step, check_settings, infer_volume
from fastsrgan.infer_ways import HEAD
from fastsrgan.networks import Generator
from fastsrgan.runtime import QUIET, Progress

log = logging.getLogger("fastsrgan")

THRESHOLD = 0.5  # of the probability, above which a voxel belongs to the structure
LISTS = (".txt", ".csv")
SUMMARY = "infer_summary.json"


class SomeFailed(PartialFailure):
    """Some volumes of a list failed; ``summary`` is what ``infer_files`` would have returned."""

    summary: dict


@dataclass(frozen=True)
class _Job:
    """What holds for every volume of one call."""

    out: Path
    generator: Generator
    model: dict
    asked: dict
    save_prob: bool
    series: str | None
    volume: int | None
    max_voxels: int
    max_memory: int | None
    precision_check: bool
    provenance: dict
    progress: Progress

    def outputs(self, path: Path) -> dict[str, Path]:
        """Every file of one image, by kind; the JSON is written last and stands for the whole."""
        stem = any_image.stem(path, self.series)
        kinds = ["sr", "seg"] + ["mask"] * bool(self.generator.spec.mask_classes) + ["prob"] * self.save_prob
        return {kind: self.out / f"{stem}_{kind}.nii.gz" for kind in kinds} | {"json": self.out / f"{stem}.json"}


def infer_files(
    inputs: Sequence[str | os.PathLike],
    out_dir: str | os.PathLike,
    weights: str | os.PathLike | None = None,
    *,
    patch: tiles.PerAxis = 128,
    step: Step = 30,
    new_resolution: Resolution = None,
    device: str = "auto",
    geometry: str = "physical",
    window: str = "constant",
    batch: str | int = "auto",
    precision: str = "auto",
    budget: float | None = None,
    mask: str | os.PathLike | None = None,
    max_memory: int | None = None,
    precision_check: bool = False,
    save_prob: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    series: str | None = None,
    volume: int | None = None,
    max_voxels: int = images.MAX_VOXELS,
    progress: Progress = QUIET,
) -> dict:
    """Super-resolve and segment images.

    For an image ``STEM.nii.gz`` the folder gets ``STEM_sr.nii.gz`` (float32), ``STEM_seg.nii.gz`` (uint8, 1 where the
    probability is above 0.5), with mask classes ``STEM_mask.nii.gz`` (uint8, the likeliest class), with ``save_prob``
    ``STEM_prob.nii.gz`` (float32), and last ``STEM.json``: the weights, settings and versions that made them.

    Parameters
    ----------
    inputs : NIfTI files, DICOM folders or files, and .txt or .csv lists of them
    weights : any weight file (``fastsrgan.weights.load_generator``); None takes the model shipped with the package
    patch ... precision_check : see ``infer.infer_volume``; ``mask`` is the file of an image's mask, or "head". What
        does not fit into ``max_memory`` bytes is done by slabs into files beside the result, taken away at the end
    overwrite, resume : what to do with results that are there: replace them; or keep those that are complete and were
        made of the same image with the same weights and settings. Without either, they are refused before any work.
    series : which series of a DICOM folder, see ``dicom.select``; the results' names then end in ``_series-N``
    volume, max_voxels : see ``images.load``

    Returns
    -------
    {"out_dir", "weights", "done", "skipped", "failed", "items": [{"input", "stem", "status", "outputs", ...}]}; for
    more than one image also written to ``infer_summary.json``.

    Raises
    ------
    UsageError, ModelError, ResourceError : before any work. SomeFailed (with the summary), after every other volume is
    done, when a volume failed; its own error when there is only one.
    """
    check_settings(patch, step, new_resolution, geometry, window, batch, precision, budget, max_memory)
    paths = _expanded(inputs, series)
    if mask is not None and str(mask) != HEAD and len(paths) > 1:
        raise UsageError("mask", f"one file for {len(paths)} images", f"{HEAD}, or one image at a time")
    where = runtime.pick_device(device)
    out = runtime.output_folder(out_dir)
    source = weight_files.default_weights() if weights is None else Path(weights)
    facts = weight_files.info(source)
    model = {"path": str(source), "sha256": facts["sha256"], "spec": facts["generator"]}
    asked = {"patch": patch, "step": step, "new_resolution": new_resolution, "geometry": geometry, "window": window}
    asked |= {"batch": batch, "precision": precision, "device": str(where)}
    asked |= {"budget": budget, "mask": None if mask is None else str(mask)}
    job = _Job(
        out,
        weight_files.load_generator(source),
        model,
        asked,
        save_prob,
        series,
        volume,
        max_voxels,
        max_memory,
        precision_check,
        runtime.provenance(),
        progress,
    )
    _check_outputs(paths, job, overwrite or resume)
    items = [_one(path, job, resume, alone=len(paths) == 1) for path in paths]
    counts = Counter(item["status"] for item in items)
    summary: dict[str, Any] = {"out_dir": str(out), "weights": model}
    summary |= {status: counts[status] for status in ("done", "skipped", "failed")} | {"items": items}
    if len(paths) > 1:
        runtime.write_json(out / SUMMARY, summary)
    if counts["failed"]:
        names = ", ".join(item["stem"] for item in items if item["status"] == "failed")
        failure = SomeFailed(out, f"{counts['failed']} of {len(items)} volumes failed: {names}", f"see {SUMMARY}")
        failure.summary = summary
        raise failure
    return summary


def _expanded(inputs: Sequence[str | os.PathLike], series: str | None) -> list[Path]:
    """Images named directly and by lists. Raises UsageError for none, or two that would share their outputs."""
    paths: list[Path] = []
    for item in map(Path, inputs):
        paths += table.read_list(item) if item.suffix.lower() in LISTS else [item]
    if not paths:
        raise UsageError("input", "no image given", "name NIfTI files or DICOM folders, or a .txt or .csv list of them")
    by_stem: dict[str, Path] = {}
    for path in paths:
        other = by_stem.setdefault(any_image.stem(path, series), path)
        if other is not path:
            reason = f"would write to the same files as {other}"
            raise UsageError(path, reason, "outputs are named after the image: use one output folder for each")
    return paths


def _check_outputs(paths: list[Path], job: _Job, replace: bool) -> None:
    """Before any work: nothing that exists is written over unasked, and no input ever."""
    inputs = {path.resolve() for path in paths}
    standing = []
    for path in paths:
        for target in job.outputs(path).values():
            if target.resolve() in inputs:
                raise UsageError(target, "is an input and would be overwritten", "choose another output folder")
            standing += [target] if target.exists() else []
    if standing and not replace:
        more = f" and {len(standing) - 1} more files" if len(standing) > 1 else ""
        raise UsageError(
            f"{standing[0]}{more}", "exists already and is kept", "--overwrite, --resume or another folder"
        )


def _one(path: Path, job: _Job, resume: bool, alone: bool) -> dict[str, Any]:
    """One image -> its item of the summary. An error is recorded, or raised where the image is the only one."""
    stem = any_image.stem(path, job.series)
    item: dict[str, Any] = {"input": str(path), "stem": stem, "status": "done"}
    try:
        if resume and _finished(path, job):
            log.info("%s: finished before, skipped", path)
            return item | {"status": "skipped", "outputs": _names(job.outputs(path))}
        record = _infer(path, job)
        return item | {key: record[key] for key in ("outputs", "seconds", "warnings")}
    except Exception as error:
        if alone:
            raise
        # Whatever it was, the volumes behind it are still wanted; what is not a user's fault keeps its traceback.
        log.error("%s", error, exc_info=not isinstance(error, FastsrganError))
        code = error.exit_code if isinstance(error, FastsrganError) else FastsrganError.exit_code
        return item | {"status": "failed", "error": str(error) or type(error).__name__, "exit_code": code}


def _infer(path: Path, job: _Job) -> dict[str, Any]:
    """One image through the model and onto the disk; the record that was written beside it."""
    began = time.perf_counter()
    image = any_image.load_any(path, series=job.series, volume=job.volume, max_voxels=job.max_voxels)
    for warning in image.warnings:
        log.warning("%s: %s", path, warning)
    outputs = job.outputs(path)
    planes = job.out / f".{any_image.stem(path, job.series)}.planes"  # of a volume too large for memory
    try:
        result = infer_volume(
            image.data,
            image.affine,
            job.generator,
            max_memory=job.max_memory,
            scratch=planes,
            precision_check=job.precision_check,
            progress=job.progress,
            label=path.name,
            **{**job.asked, "mask": _mask(job)},
        )
    except InputError as error:
        raise InputError(path, error.reason, error.hint) from error
    _write(outputs, result, image.meta.get("space_code", 1))
    shutil.rmtree(planes, ignore_errors=True)
    record = {
        "input": {
            "path": str(path.absolute()),
            "sha256": any_image.sha256(path, job.series),
            "series": job.series,
            "volume": job.volume,
            "shape": list(image.data.shape),
            "spacing_mm": list(image.spacing),
        },
        "weights": job.model,
        **result.report,
        "threshold": THRESHOLD,
        "affine": result.affine,
        "outputs": _names(outputs),
        "warnings": [*image.warnings, *result.report["warnings"]],
        "seconds": time.perf_counter() - began,
        "asked": job.asked,
        "provenance": job.provenance,
    }
    runtime.write_json(outputs["json"], record)
    return record


def _mask(job: _Job) -> np.ndarray | str | None:
    name = job.asked["mask"]
    return name if name in (None, HEAD) else any_image.load_any(Path(name), max_voxels=job.max_voxels).data


def _write(outputs: dict[str, Path], result: InferResult, code: int) -> None:
    # The old record goes first: a kill between two files must not leave it standing beside new images.
    outputs["json"].unlink(missing_ok=True)
    arrays = {"sr": result.sr, "seg": (result.prob[0] > THRESHOLD).astype(np.uint8), "prob": result.prob[0]}
    if "mask" in outputs:
        arrays["mask"] = result.prob[1:].argmax(axis=0).astype(np.uint8)
    for kind, target in outputs.items():
        if kind != "json":
            images.save(target, arrays[kind], result.affine, overwrite=True, code=code)


def _names(outputs: dict[str, Path]) -> dict[str, str]:
    return {kind: str(path) for kind, path in outputs.items()}


def _finished(path: Path, job: _Job) -> bool:
    """Whether this image was done with these weights and settings. Raises UsageError where it was done with others."""
    outputs = job.outputs(path)
    try:
        record = json.loads(outputs["json"].read_text(encoding="utf8"))
    except (OSError, ValueError):
        return False
    now = {"weights": job.model["sha256"], "volume": job.volume, **_decisive(runtime.finite(job.asked))}
    try:
        then = {
            "weights": record["weights"]["sha256"],
            "volume": record["input"]["volume"],
            **_decisive(record["asked"]),
        }
        same_image = record["input"]["sha256"] == any_image.sha256(path, job.series)
    except (KeyError, TypeError):
        return False
    differing = [key for key in now if now[key] != then.get(key)] + ["input"] * (not same_image)
    if differing:
        reason = f"was made with another {', '.join(differing)}"
        raise UsageError(outputs["json"], reason, "--overwrite replaces it, or choose another folder")
    return all(target.exists() for target in outputs.values())


def _decisive(asked: dict) -> dict:
    """The settings that change a result; a restart may run on another device."""
    return {key: value for key, value in asked.items() if key not in ("batch", "device")}
