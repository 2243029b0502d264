"""The measurements of a study, one file each: what is finished is kept and never measured twice.

A cell is one head under one condition through one model at one step (or through interpolation alone). Its file is
named by a hash of all that decides about its numbers: the head's files, the weights, the settings and the device.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import finite, output_folder, read_json, write_json
from fastsrgan.core.progress import QUIET, Progress, quiet
from fastsrgan.core.system import pick_device
from fastsrgan.errors import FastsrganError, none_done, some_of
from fastsrgan.evaluate.pair import evaluate_pair, flat, moments
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io.labels import Structure
from fastsrgan.model import weights as weight_files
from fastsrgan.model.networks import Generator
from fastsrgan.study.data import (
    BASELINE,
    OWN,
    Case,
    Condition,
    Head,
    acquire,
    figure_paths,
    odd_slices,
    structure_paths,
)
from fastsrgan.volume.geometry import Volume

log = logging.getLogger("fastsrgan")

VERSION = 3  # of what a cell holds and how it is measured
FOLDER = "cells"


@dataclass(frozen=True)
class StudyModel:
    """A generator under the name that tables give it.

    classes : of a mask head that knows several structures of a label: (name, values) of each class, in their order
    """

    name: str
    path: Path
    sha256: str
    generator: Generator
    classes: tuple[tuple[str, frozenset[int]], ...] = ()

    @classmethod
    def load(cls, path: Path, name: str | None = None) -> StudyModel:
        """The generator of a weight file or run folder. Raises ModelError."""
        facts = weight_files.info(path)
        known = (facts["card"] or {}).get("structures") or ()
        classes = tuple((one["name"], frozenset(one["values"])) for one in known)
        return cls(name or path.stem, path, facts["sha256"], weight_files.load_generator(path), classes)

    def class_of(self, structure: Structure) -> int | None:
        """The class of the mask head that is a structure of a label map, by its name or by its values."""
        same = (i for i, (name, values) in enumerate(self.classes, 1) if name == structure.name)
        alike = (i for i, (name, values) in enumerate(self.classes, 1) if values == structure.values)
        return next(same, None) or next(alike, None)


@dataclass(frozen=True)
class Engine:
    """How volumes go through the networks, and the seed of the noise."""

    patch: int | None = 128
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0
    adapt: str = "auto"


Job = tuple[StudyModel | None, int | None]  # a model and the step of its tiles; (None, None): interpolation


def run_cells(
    out: Path,
    heads: Sequence[Head],
    models: Sequence[StudyModel],
    conditions: Sequence[Condition],
    steps: Sequence[int],
    engine: Engine,
    progress: Progress = QUIET,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Measure every cell that is not there yet, into ``out``/cells.

    Returns the cells (``subject``, ``condition``, ``model``, ``step``, ``scores`` by dotted path, ``seconds``,
    ``tiles``, ``notes``) in the order of conditions, models, steps and heads, and the heads that failed with their
    errors. Raises an error of the kind of the first when all of them failed, InputError without any.
    """
    folder = output_folder(out / FOLDER)
    with quiet():
        engine = replace(engine, device=str(pick_device(engine.device)))
    jobs: list[Job] = [(None, None), *((m, s) for m in models for s in steps)]
    cells: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    first: FastsrganError | None = None
    asked = [(head, condition, job) for head in heads for condition in conditions for job in jobs]
    left = sum(not _is_there(folder, *one, engine) for one in asked)
    if left < len(asked):  # they take no time: a pace with them would be none
        log.info("%s", some_of(len(asked) - left, len(asked), "cell", "is measured already", "are measured already"))
    if left:
        progress.start("study", left, "cell")
    for head in heads:
        try:
            cells += _of_head(folder, head, conditions, jobs, engine, progress)
        except FastsrganError as error:
            log.warning("%s: %s", head.name, error)
            failed.append({"subject": head.name, "error": str(error)})
            first = first or error
    progress.finish()
    if not cells:
        hint = failed[0]["error"] if failed else "name one image at least"
        raise none_done(first, out, "no head could be used", hint)
    order = [(c.name, BASELINE if m is None else m.name, s) for c in conditions for m, s in jobs]
    cells.sort(key=lambda cell: order.index((cell["condition"], cell["model"], cell["step"])))
    return cells, failed


def _of_head(
    folder: Path, head: Head, conditions: Sequence[Condition], jobs: Sequence[Job], engine: Engine, progress: Progress
) -> list[dict[str, Any]]:
    cells, volumes = [], None
    odd: Mapping[Condition, list[str]] = {}
    for condition in conditions:
        case: Case | None = None
        for model, step in jobs:
            path, facts = _place(folder, head, condition, (model, step), engine)
            cell = _read(path)
            if cell is None:
                if case is None:
                    if volumes is None:
                        volumes = head.load()
                        odd = odd_slices(volumes["hr"], conditions)
                    case = acquire(volumes, condition, (engine.seed, head.key))
                with quiet():
                    known = head.structures if case.structures else ()
                    measured = _through(case, model, step, engine, known) if model else _interpolation(case)
                measured["notes"] = [*odd[condition], *measured["notes"]]
                cell = {"facts": facts} | finite(measured)
                write_json(path, cell)
                progress.advance(1, subject=head.name)
            # Names are not part of what is kept: they may be others this time.
            named = {"subject": head.name, "condition": condition.name, "model": model.name if model else BASELINE}
            cells.append(named | {"step": step} | cell)
    return cells


def _is_there(folder: Path, *asked: Any) -> bool:
    """Whether a measurement was made before; of a head that cannot be read no, which is said when its turn comes."""
    try:
        return _read(_place(folder, *asked)[0]) is not None
    except FastsrganError:
        return False


def _place(folder: Path, head: Head, condition: Condition, job: Job, engine: Engine) -> tuple[Path, dict[str, Any]]:
    """The file of a measurement, and all that it depends on, of which its name is a hash."""
    model, step = job
    facts = {"version": VERSION, "head": head.key, "condition": condition.facts(), "seed": engine.seed}
    facts |= {"weights": model and model.sha256, "step": step}
    facts |= {name: getattr(engine, name) if model else None for name in ("patch", "precision", "adapt", "device")}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()
    return folder / f"{digest}.json", facts


def _interpolation(case: Case) -> dict[str, Any]:
    return _scored(case, case.spline, case.label_map, {name: drawn for name, (_, drawn) in case.structures.items()})


def _through(
    case: Case, model: StudyModel, step: int | None, engine: Engine, structures: Sequence[Structure]
) -> dict[str, Any]:
    asked: dict[str, Any] = {name: getattr(engine, name) for name in ("patch", "device", "precision", "adapt")}
    asked |= {"step": step, "new_resolution": list(case.hr.spacing)}
    done = infer_volume(case.scan.data, case.scan.affine, model.generator, **asked)
    seg = Volume((done.prob[0] > 0.5).astype(np.uint8), done.affine)
    found = {one.name: number for one in structures if (number := model.class_of(one)) is not None}
    likeliest = done.prob[1:].argmax(axis=0) if found else np.zeros(0)
    more = {name: Volume(np.equal(likeliest, number).astype(np.uint8), done.affine) for name, number in found.items()}
    timed = {"seconds": done.report["seconds"], "tiles": done.report["tiles"], "device": done.report["device"]}
    return _scored(case, Volume(done.sr, done.affine), seg, more) | timed


def _scored(case: Case, image: Volume, seg: Volume | None, more: Mapping[str, Volume]) -> dict[str, Any]:
    pairs = {name: (made, case.structures[name][0]) for name, made in more.items()}
    own = seg if case.label else None
    result = evaluate_pair(image, case.hr, seg=own, label=case.label, mask=case.mask, structures=pairs)
    return {"scores": flat(result), "notes": result["notes"]}


def aggregate(cells: Sequence[dict[str, Any]], conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """One row per condition, model and step: its ``figures`` {name: {mean, sd, n}} over the heads that have them."""
    acquired = {c.name: c.facts() for c in conditions}
    groups: dict[tuple[str, str, int | None], list[dict[str, float]]] = {}
    for cell in cells:
        numbers = cell["scores"] | {name: cell[name] for name in OWN if name in cell}
        groups.setdefault((cell["condition"], cell["model"], cell["step"]), []).append(numbers)
    rows = []
    for (condition, model, step), numbers in groups.items():
        figures = {}
        for name, path in (figure_paths() | structure_paths(numbers)).items():
            values = [float(n[path]) for n in numbers if path in n]
            if values:
                figures[name] = moments(values)
        row: dict[str, Any] = {"condition": condition} | acquired[condition] | {"model": model, "step": step}
        rows.append(row | {"n": len(numbers), "figures": figures})
    return rows


def _read(path: Path) -> dict[str, Any] | None:
    """A finished cell; None where there is none or it cannot be read."""
    cell = read_json(path)
    return cell if "scores" in cell else None
