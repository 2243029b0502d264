"""Files in, files out: images through one model, with provenance, restart and a summary."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsrgan.core import system
from fastsrgan.core.files import output_folder, remove_abandoned, write_json
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.ranks import ALONE, Ranks
from fastsrgan.core.system import free_memory, pick_device
from fastsrgan.errors import ModelError, PartialFailure, UsageError
from fastsrgan.infer.cohort import Cohort, together
from fastsrgan.infer.image import Job, compute, load, names, write
from fastsrgan.infer.memory import SHARE
from fastsrgan.infer.room import need_room
from fastsrgan.infer.settings import HEAD, InferSettings, takes_options
from fastsrgan.io.image_list import Image, find_images
from fastsrgan.model import weights as weight_files
from fastsrgan.model.networks import Generator

log = logging.getLogger("fastsrgan")

SUMMARY = "infer_summary.json"
PathLike = str | os.PathLike


class SomeFailed(PartialFailure):
    """Some volumes of a list failed; ``summary`` is what ``infer_files`` would have returned."""

    summary: dict


@takes_options(files=True)
def infer_files(
    inputs: Sequence[PathLike],
    out_dir: PathLike,
    weights: PathLike | Sequence[PathLike] | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    ranks: Ranks = ALONE,
    progress: Progress = QUIET,
    **options: Any,
) -> dict:
    """Super-resolve and segment images.

    For an image ``STEM.nii.gz`` the folder gets ``STEM_sr.nii.gz``, ``STEM_seg.nii.gz`` (uint8, 1 where the
    probability is above the threshold), with mask classes ``STEM_mask.nii.gz`` (uint8, the likeliest class), with
    ``save_prob`` ``STEM_prob.nii.gz`` (float32), with ``png`` ``STEM.png``, and last ``STEM.json``: the weights,
    settings and versions that made them. Images of a folder keep their subfolders. The next image is read and the one
    before written while one is computed, where memory allows.

    Parameters
    ----------
    inputs : NIfTI files, folders of them, DICOM folders or files, and .txt or .csv lists; see ``image_list``
    weights : any weight file (``fastsrgan.load_generator``); several give the mean of their SR and of their
        probabilities; None takes the model shipped with the package
    overwrite, resume : what to do with results that are there: replace them; or keep those that are complete and were
        made of the same image with the same weights and settings. Without either, they are refused before any work.
    ranks : of a torchrun job that this process is one of. Each image is done by one of them, the largest first, or by
        all of them where volumes are split. Every rank returns the same, rank 0 writes it.
    options : patch, step and all others that ``infer_settings.InferSettings`` describes. What does not fit into memory
        is done by slabs into files beside the result, taken away at the end

    Returns
    -------
    {"out_dir", "weights", "done", "skipped", "failed", "items": [{"input", "stem", "status", "outputs", ...}]}; for
    more than one image also written to ``infer_summary.json``.

    Raises
    ------
    UsageError, ModelError, ResourceError : before any work. SomeFailed (with the summary), after every other volume is
    done, when a volume failed; its own error when there is only one.
    """
    settings = InferSettings.of(options)
    if settings.split_volume and ranks.world == 1:
        raise UsageError("--split-volume", "needs several processes", "torchrun --nproc-per-node N -m fastsrgan infer")
    found = find_images(inputs, out_dir, settings.series)
    if settings.mask is not None and str(settings.mask) != HEAD and len(found) > 1:
        raise UsageError("mask", f"one file for {len(found)} images", f"{HEAD}, or one image at a time")
    chosen = settings.step is None
    settings = settings.on(str(pick_device(settings.device)))
    if chosen and settings.patch is not None:
        log.info("tiles of %s voxels, %s apart: --patch and --step choose others", settings.patch, settings.step)
    out = output_folder(out_dir)
    generators, model = _models(weights)
    if settings.max_memory is None and ranks.local_world > 1:
        settings = replace(settings, max_memory=int(SHARE * free_memory() / ranks.local_world))
    job = Job(out, generators, model, settings, system.provenance(), progress, resume)
    _check_outputs(found, job, overwrite or resume)
    if ranks.rank == 0:
        need_room(found, job)
    ranks.agree("images", [image.name for image in found])  # nobody writes before all have looked
    if ranks.world == len(found) == 1:
        items, lost = [_alone(found[0], job)], False
    elif settings.split_volume:
        items, lost = together(job, found, ranks), False
    else:
        cohort = Cohort(job, found, ranks)
        items, lost = cohort.run(), cohort.lost
    counts = Counter(item["status"] for item in items)
    summary: dict[str, Any] = {"out_dir": str(out), "weights": model}
    summary |= {status: counts[status] for status in ("done", "skipped", "failed")} | {"items": items}
    if len(found) > 1 and ranks.rank == 0:
        write_json(out / SUMMARY, summary)
    # Behind the file, since torchrun ends all ranks as soon as one of them ends with a failure.
    summary = summary if lost else ranks.gather(summary)[0]
    if summary["failed"]:
        raise _some_failed(out, summary)
    return summary


def _some_failed(out: Path, summary: dict[str, Any]) -> SomeFailed:
    items = summary["items"]
    bad = ", ".join(item["stem"] for item in items if item["status"] == "failed")
    hint = f"see {SUMMARY}" if len(items) > 1 else "see the error above"
    failure = SomeFailed(out, f"{summary['failed']} of {len(items)} volumes failed: {bad}", hint)
    failure.summary = summary
    return failure


def _models(weights: PathLike | Sequence[PathLike] | None) -> tuple[tuple[Generator, ...], dict[str, Any]]:
    """The generators, and what the record says of their files."""
    if weights is None:
        weights = weight_files.default_weights()
    sources = [weights] if isinstance(weights, (str, os.PathLike)) else list(weights)
    if not sources:
        raise UsageError("weights", "none given", "a weight file, or leave it out for the shipped model")
    facts = [weight_files.info(source) for source in sources]
    told = [
        {"path": str(source), "sha256": fact["sha256"], "spec": fact["generator"]}
        for source, fact in zip(sources, facts, strict=True)
    ]
    generators = tuple(weight_files.load_generator(source) for source in sources)
    classes = {generator.spec.mask_classes for generator in generators}
    if len(classes) > 1:
        reason = f"of {' and '.join(map(str, sorted(classes)))} mask classes cannot be averaged"
        raise ModelError("weights", reason, "name models of the same classes")
    if len(told) == 1:
        return generators, told[0]
    together = hashlib.sha256("".join(one["sha256"] for one in told).encode()).hexdigest()
    return generators, {"sha256": together, "averaged": told}


def _alone(image: Image, job: Job) -> dict[str, Any]:
    """The only image: its errors are the call's."""
    item = {"input": str(image.path), "stem": image.name}
    loaded = load(image, job)
    if loaded is None:
        return item | {"status": "skipped", "outputs": names(job.outputs(image))}
    record = write(compute(loaded, job, image.path.name), job)
    return item | {"status": "done"} | {key: record[key] for key in ("outputs", "seconds", "warnings")}


def _check_outputs(found: Sequence[Image], job: Job, replace: bool) -> None:
    """Before any work: folders are there, nothing that exists is written over unasked, and no input ever."""
    inputs = {os.path.realpath(image.path) for image in found}
    inputs |= {os.path.realpath(mask) for mask in [job.settings.mask] if mask not in (None, HEAD)}
    for folder in {job.record(image).parent for image in found} - {job.out}:
        output_folder(folder)
    standing = []
    folders: dict[Path, list[str]] = {}
    for image in found:
        for target in job.outputs(image).values():
            folders.setdefault(target.parent, []).append(target.name)
            if os.path.realpath(target) in inputs:
                raise UsageError(target, "is an input and would be overwritten", "choose another output folder")
            standing += [target] if os.path.exists(target) else []  # False for a name that is too long
    if standing and not replace:
        more = f" and {len(standing) - 1} more files" if len(standing) > 1 else ""
        raise UsageError(
            f"{standing[0]}{more}", "exists already and is kept", "--overwrite, --resume or another folder"
        )
    for folder, names_there in folders.items():
        remove_abandoned(folder, names_there)
