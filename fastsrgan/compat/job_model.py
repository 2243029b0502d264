"""A list of images, patch sizes and steps -> the original's output tree (its ``job_model.py``).

Beside an image, ``Result_with_NAME/patch_P_step_S/`` gets ``SR_patch_P_step_S.nii.gz``, ``Cortex_...`` and, from a
model with a mask head, ``Mask_...``; patch None makes ``patch_None/SR_whole_image.nii.gz``.

Several images in one folder share this place, where the original processed only the first. The first image of the
list gets the original's names; every other has its own name put behind: ``SR_patch_64_step_32_sub-01_T2w.nii.gz``.
A small ``fastsrgan.json`` (``fastsrgan_sub-01_T2w.json``) beside the results says whose they are and what made them. It
keeps names with their image in later calls, whatever else is listed then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsrgan.compat import original as compat
from fastsrgan.core import system
from fastsrgan.core.files import ResultLock, disk_error, finite, mapping, read_json, write_json
from fastsrgan.core.places import recorded
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.system import pick_device
from fastsrgan.errors import InputError, ResourceError, UsageError, counted
from fastsrgan.infer.files import SomeFailed, failure
from fastsrgan.infer.settings import InferSettings
from fastsrgan.io import any_image
from fastsrgan.io.tables import read_list
from fastsrgan.model import weights
from fastsrgan.model.networks import Generator
from fastsrgan.volume.geometry import Volume

log = logging.getLogger("fastsrgan")

RECORD = "fastsrgan"


@dataclass(frozen=True)
class Task:
    """One result: an image, and the tiles that it is made with; ``first`` in its folder in this call."""

    image: Path
    patch: int | None
    step: int
    folder: Path
    first: bool

    def name(self, kind: str, tag: str = "") -> str:
        """SR_patch_64_step_32.nii.gz, SR_whole_image.nii.gz, with a tag before the ending."""
        size = "whole_image" if self.patch is None else f"patch_{self.patch}_step_{self.step}"
        return f"{kind}_{size}{tag and '_' + tag}.nii.gz"

    def record(self, tag: str) -> Path:
        """The file that says whose the results are."""
        return self.folder / f"{RECORD}{tag and '_' + tag}.json"


@dataclass(frozen=True)
class _Setup:
    """What holds for every task of one call."""

    generator: Generator
    made_with: dict
    settings: dict
    by_batch: bool | None
    series: str | None
    overwrite: bool
    progress: Progress
    hashes: dict[Path, str] = field(default_factory=dict)

    def name(self, image: Path) -> str:
        """An image's name among those of its folder: the file's, with the series where a DICOM folder has several."""
        stem = any_image.stem(image, self.series)
        return image.name if stem == any_image.stem(image) else stem

    @property
    def kinds(self) -> list[str]:
        return ["SR", "Cortex"] + ["Mask"] * bool(self.generator.spec.mask_classes)


def plan(
    paths: Sequence[Path], patch_sizes: Sequence[int | None], step_groups: Sequence[Sequence[int]], name: str
) -> list[Task]:
    """Every result to make, images in order, each with every patch size and its steps in ascending order.

    Raises UsageError where patch sizes and groups of steps do not match, or a step leaves gaps.
    """
    if len(patch_sizes) != len(step_groups):
        reason = f"{counted(len(patch_sizes), 'patch size')} and {counted(len(step_groups), 'group')} of steps"
        raise UsageError("--patch and --step", reason, 'as many of each: --patch "64,128" --step "32 64,64 128"')
    if not name or os.sep in name:
        reason = f"{name!r} is not allowed"
        raise UsageError("--result_folder_name", reason, "a name, the folder is called Result_with_NAME")
    tasks: dict[tuple[Path, Path], Task] = {}
    seen: set[Path] = set()
    for image in paths:
        parent = Path(recorded(image)).parent
        for patch, group in zip(patch_sizes, step_groups, strict=True):
            for step in sorted(set(group)):
                size = "patch_None" if patch is None else f"patch_{patch}_step_{step}"
                folder = parent / f"Result_with_{name}" / size
                tasks.setdefault((image, folder), Task(image, patch, step, folder, parent not in seen))
        seen.add(parent)
    return list(tasks.values())


def job_model(
    table: str | os.PathLike,
    weights_path: str | os.PathLike | None = None,
    *,
    patch: Sequence[int | None] = (128,),
    step: Sequence[Sequence[int]] = ((64,),),
    result_folder_name: str = "fastsrgan",
    new_resolution: Sequence[float] = (0.5, 0.5, 0.5),
    base_path: str = "",
    by_batch: bool | None = None,
    interp: str = "scipy",
    interpolation_type: str = "Spline",
    geometry: str = "segsrgan",
    series: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    overwrite: bool = False,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Apply a model to every image of a list, with every patch size and step.

    Parameters
    ----------
    table : CSV without a header, images in the first column, or a text file; they are processed in sorted order
    weights_path : any weights; None takes the model shipped with the package
    patch, step : tile sizes (None: the whole image), and for each the steps
    base_path : put before the path of the table and of every image (the original's ``-dp``)
    by_batch, interp, interpolation_type, geometry, series, device, precision : see ``compat.segmentation``; by_batch
        None lets the engine choose
    overwrite : make results anew that are there. Otherwise those that are complete are kept.

    Returns
    -------
    {"weights", "done", "skipped", "failed", "items": [{"input", "patch", "step", "status", "outputs", ...}]}

    Raises
    ------
    UsageError, InputError, ModelError, ResourceError : before any work. SomeFailed (with the summary) at the end when
    some results could not be made; the error itself when there is only one to make.
    """
    interpolate = compat.interpolation(interp, interpolation_type, 3, geometry)
    for size, group in zip(patch, step, strict=False):
        for value in group:
            tiles: dict[str, Any] = {"patch": size, "step": 1 if size is None else value}
            InferSettings(new_resolution=new_resolution, geometry=geometry, precision=precision, **tiles)
    joined = Path(base_path, table) if base_path and Path(base_path, table).exists() else Path(table)
    listed = sorted(read_list(joined, base_path=base_path or None), key=str)
    for path in listed:
        any_image.refuse_series(path, series)
    if base_path and not os.path.isdir(base_path) and not any(map(os.path.lexists, listed)):
        reason = f"none of its images is there, the first would be {listed[0]}: {base_path!r} stands before every entry"
        raise InputError(joined, reason, "-dp is a folder, or what the paths of all images begin with")
    tasks = plan(listed, patch, step, result_folder_name)
    where = pick_device(device)
    source = weights.default_weights() if weights_path is None else Path(weights_path)
    facts = weights.info(source)
    settings: dict[str, Any] = {"new_resolution": list(new_resolution), "geometry": geometry, "precision": precision}
    made_with = {"weights": facts["sha256"], "interp": interp, "interpolation_type": interpolation_type, **settings}
    settings |= {"interpolate": interpolate, "device": str(where)}
    setup = _Setup(weights.load_generator(source), made_with, settings, by_batch, series, overwrite, progress)
    if weights_path is None and geometry == "segsrgan":
        log.warning("the shipped model was trained in physical geometry: --geometry physical suits it")
    items = _run(tasks, setup)
    counts = Counter(item["status"] for item in items)
    summary: dict[str, Any] = {"weights": {"path": weights.recorded_as(source), "sha256": facts["sha256"]}}
    summary |= {status: counts[status] for status in ("done", "skipped", "failed")} | {"items": items}
    if counts["failed"]:
        bad = next(item for item in items if item["status"] == "failed")
        told = f"{counts['failed']} of {len(items)} results failed, the first: {bad['error']}"
        raise SomeFailed(table, told, "correct them and run again: what is done is kept", summary)
    return summary


def _run(tasks: list[Task], setup: _Setup) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    loaded: tuple[Path, Volume] | None = None
    for task in tasks:
        item: dict[str, Any] = {"input": recorded(task.image), "patch": task.patch, "step": task.step}
        item["status"] = "done"
        try:
            tag = _claim(task, setup)
            with contextlib.ExitStack() as held:
                if tag is not None:
                    held.enter_context(ResultLock(task.record(tag)))
                if tag is None or _finished(task, tag, setup):  # looked at again: others may have made it meanwhile
                    log.info("%s: there before, kept", task.folder)
                    items.append(item | {"status": "skipped"})
                    continue
                try:
                    if loaded is None or loaded[0] != task.image:
                        loaded = (task.image, any_image.load_any(task.image, series=setup.series))
                    items.append(item | _one(task, tag, loaded[1], setup))
                except BaseException:
                    held.close()  # the lock lies in the folder, which goes where it is empty
                    _release(task, tag, setup)
                    raise
        except Exception as error:
            if len(tasks) == 1:
                raise
            items.append(failure(item | {"status": "failed"}, error))
    return items


def _one(task: Task, tag: str, image: Volume, setup: _Setup) -> dict[str, Any]:
    began = time.perf_counter()
    tiles: dict[str, Any] = {"patch": task.patch, "step": 1 if task.patch is None else task.step}
    tiles |= {"by_batch": setup.by_batch, "label": f"{task.image.name} {task.folder.name}", "progress": setup.progress}
    result = compat.apply(image, setup.generator, **tiles, **setup.settings)
    outputs = {kind: task.folder / task.name(kind, tag) for kind in setup.kinds}
    write_json(task.record(tag), {"image": setup.name(task.image)})  # of an earlier result it would stand for this one
    compat.write(outputs, result, image)
    record = _identity(task, setup)
    record |= {"outputs": {kind: path.name for kind, path in outputs.items()}, "report": result.report}
    record |= {"warnings": list(image.warnings), "provenance": system.provenance()}
    write_json(task.record(tag), record)
    seconds = time.perf_counter() - began
    return {"outputs": {k: str(p) for k, p in outputs.items()}, "seconds": seconds, "warnings": list(image.warnings)}


def _identity(task: Task, setup: _Setup) -> dict[str, Any]:
    """What a result is of, and what it was made with."""
    sha = setup.hashes.get(task.image) or any_image.sha256(task.image, setup.series)
    setup.hashes[task.image] = sha
    return {"image": setup.name(task.image), "sha256": sha, "made_with": setup.made_with}


def _claim(task: Task, setup: _Setup) -> str | None:
    """Reserve a name for the results of a task: its tag. None where they are there already.

    Raises UsageError where they are there but were made of or with something else.
    """
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, task.folder) from error
    name = setup.name(task.image)
    own = [any_image.stem(task.image, setup.series), name]
    tags = [tag for tag in own if _owner(task, tag) == name]  # a name that it had before
    if not tags:
        recorded = task.record("").exists()
        foreign = not recorded and any((task.folder / task.name(kind)).exists() for kind in setup.kinds)
        if foreign and task.first and not setup.overwrite:
            return None  # of the original, which made the first image of a folder
        tags = ["", *own] if recorded or task.first else own
    for tag in tags:
        _reserve(task, tag, name)
        if _owner(task, tag) in (name, None):
            return None if _finished(task, tag, setup) else tag
    raise ResourceError(task.folder, f"all names for {name} are taken", "another --result_folder_name")


def _read(task: Task, tag: str) -> dict[str, Any]:
    """The record of a tag; empty where there is none, or one that a killed process left unfinished."""
    return read_json(task.record(tag))


def _owner(task: Task, tag: str) -> str | None:
    return _read(task, tag).get("image")


def _reserve(task: Task, tag: str, name: str) -> None:
    """Write the image's name into the record of a tag, unless there is one: of two processes one succeeds."""
    path = task.record(tag)
    try:
        with open(path, "x", encoding="utf8") as file:
            json.dump({"image": name}, file)
    except FileExistsError:
        pass
    except OSError as error:
        raise disk_error(error, path) from error


def _finished(task: Task, tag: str, setup: _Setup) -> bool:
    record = _read(task, tag)
    if setup.overwrite or "outputs" not in record:
        return False
    now = finite(_identity(task, setup))
    then = mapping(record.get("made_with"))
    differing = [key for key, value in now["made_with"].items() if then.get(key) != value]
    differing += ["image"] * (record.get("sha256") != now["sha256"])
    if differing:
        reason = f"was made with another {', '.join(differing)}"
        raise UsageError(task.record(tag), reason, "--overwrite, or another --result_folder_name")
    return all((task.folder / task.name(kind, tag)).exists() for kind in setup.kinds)


def _release(task: Task, tag: str, setup: _Setup) -> None:
    """Give a name back whose results could not be made; an empty folder is removed, as by the original. Where an image
    of them is there the name is kept: without its record it would be taken for a whole result of the original."""
    with contextlib.suppress(OSError):
        some = any((task.folder / task.name(kind, tag)).exists() for kind in setup.kinds)
        if "outputs" not in _read(task, tag) and not some:
            task.record(tag).unlink()
            task.folder.rmdir()
            task.folder.parent.rmdir()
