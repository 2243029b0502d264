"""The paper's studies on a user's own images and models: table, figure, JSON; finished cells are kept.

``steps`` (figures 7-9), ``noise`` (figure 10, tables 3-4), ``augmentation`` (figures 11-14, tables 5-6), ``resolution``
(quality against slice thickness) and ``curves`` (figure 6).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastsrgan.convert import convert
from fastsrgan.core.files import left_as_found, output_folder
from fastsrgan.core.places import recorded
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.signals import stopped_by
from fastsrgan.core.system import provenance
from fastsrgan.errors import MissingError, UsageError, times
from fastsrgan.evaluate.cohort import told_once
from fastsrgan.evaluate.figures import definitions
from fastsrgan.infer.settings import InferSettings
from fastsrgan.io.output_place import STUDY, check_place, one_writer
from fastsrgan.model import weights
from fastsrgan.study import curves as study_curves
from fastsrgan.study.cells import Engine, StudyModel, aggregate, run_cells
from fastsrgan.study.data import Condition, Head, find_heads, quick_heads, spacing_of, thick
from fastsrgan.study.plots import PANELS, REFERENCE, SOURCE, TITLES, Panel, time_fit
from fastsrgan.study.tables import write_study
from fastsrgan.train.run import short_training

log = logging.getLogger("fastsrgan")

KINDS = ("steps", "noise", "augmentation", "resolution", "curves")
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Settings:
    """What a study goes through; None takes the study's default (``DEFAULTS``, or ``QUICK``).

    steps : between tiles of ``patch`` voxels (None: the whole image)
    adapt : to each scan, as ``--adapt`` of inference; "off" leaves that out, nine tenths of the time of a small one
    low_res : mm along the stored axes; None: the head's own, ``ratio`` times as thick along ``axis``
    noise : standard deviations over the largest value
    ratios : slice thickness over the head's voxel size
    split, subjects : which rows of the table, and how many at most
    label_classes, label_names : which values of the labels are the structure, see ``labels.structure``; of several
        the first is scored throughout, and every one has its Dice
    """

    patch: int | None = None
    whole: bool = False
    steps: tuple[int, ...] | None = None
    adapt: str | None = None
    low_res: Triple | None = None
    noise: tuple[float, ...] | None = None
    ratios: tuple[float, ...] | None = None
    axis: int = 2
    split: str = "Test"
    subjects: int | None = None
    label_classes: str | Sequence[str] | None = None
    label_names: str | os.PathLike | None = None
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0


# What --ratios, --low-res and --noise may be at most. Thicker slices than these hold the whole of any head.
MOST_RATIO, MOST_MM, MOST_NOISE = 1000.0, 1000.0, 1000.0
TUNED = "4 updates more"  # of what is compared where no models are given
TUNED_NOTE = (
    f"The model `{TUNED}` is the other one after four updates: it shows the study, and says nothing of augmentation."
)
PAPER_STEPS = (30, 80, 128)
# What is taken where a setting is None, by the kind of study.
_ALL: dict[str, Any] = {"patch": 128, "adapt": "auto", "steps": PAPER_STEPS, "noise": (0.0,), "ratios": (3.0,)}
DEFAULTS: dict[str, dict[str, Any]] = {
    "steps": _ALL | {"steps": (20, 30, 50, 80, 128)},
    "noise": _ALL | {"noise": (0.0, 0.01, 0.02, 0.03, 0.05)},
    "augmentation": _ALL | {"noise": (0.03,)},
    "resolution": _ALL | {"steps": (30,), "ratios": (2.0, 3.0, 4.0, 6.0)},
}
_QUICK: dict[str, Any] = {"patch": 48, "adapt": "off", "steps": (24, 48), "subjects": 2}
QUICK: dict[str, dict[str, Any]] = {
    "steps": _QUICK | {"steps": (12, 16, 24, 32, 48)},
    "noise": _QUICK | {"noise": (0.0, 0.02, 0.05)},
    "augmentation": _QUICK,
    "resolution": _QUICK | {"steps": (24,), "ratios": (2.0, 3.0, 4.0)},
}


def run(
    kind: str,
    data: str | os.PathLike | Sequence[str | os.PathLike] | None,
    out: str | os.PathLike,
    models: Sequence[str | os.PathLike] = (),
    settings: Settings | None = None,
    *,
    quick: bool = False,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Make one study in the folder ``out``: KIND.csv, KIND.md, KIND.json, KIND.png, KIND.svg and the cells.

    Parameters
    ----------
    kind : one of ``KINDS``
    data : a training table (HR_image, Label_image, Base) or store, one high-resolution image, or for ``curves`` a run
        folder, or several, whose curves are laid over each other; None with ``quick`` makes two small synthetic
        subjects
    models : weight files or run folders; none takes the shipped model. ``augmentation`` compares two or more
    quick : small patches, few steps and subjects

    Returns what KIND.json holds, with ``files``. A cell that is in ``out`` already is not measured again.
    Raises UsageError for settings that cannot work, InputError for data, ModelError for weights, LockedFolder where
    another process makes a study in ``out``.
    """
    if kind not in KINDS:
        raise UsageError("study", f"{kind!r} is not allowed", f"one of {', '.join(KINDS)}")
    several = [] if data is None or isinstance(data, (str, os.PathLike)) else list(data)
    if len(several) == 1:
        data, several = several[0], []
    if several and kind != "curves":
        raise UsageError(f"study {kind}", f"{len(several)} places of data", "one table, image or folder")
    if data is None and (kind == "curves" or not quick):
        what = "a run folder" if kind == "curves" else "a table or an image, or --quick"
        raise MissingError("study", "no data given", what)
    if kind == "augmentation" and len(models) < 2 and (models or data is not None):
        raise UsageError("study augmentation", "one model", "--weights WITH WITHOUT: two or more to compare")
    began = time.perf_counter()
    asked = _filled(kind, settings or Settings(), quick)
    read: list[Any] = [*several, *models]
    read += [] if several or data is None else [data]
    for form, sort in STUDY.items():
        target = Path(out) / f"{kind}.{form}"
        if os.path.lexists(target):  # a folder that is missing is made later, once the data were read
            check_place(target, read, sort)
    read_first = _read_curves(data, several) if kind == "curves" else None  # nothing is left of a log that is none
    with left_as_found([out]):
        folder = output_folder(out)
        with one_writer((), [folder], "study"):
            facts, panels, title = read_first or _measured(kind, data, folder, models, asked, quick, progress)
            facts["paper"] = {"source": SOURCE, "rows": REFERENCE[kind]}
            facts |= {"seconds": time.perf_counter() - began, "provenance": provenance()}
            return write_study(folder, facts, panels, title)


Made = tuple[dict[str, Any], list[list[Panel]], str]  # what KIND.json holds, the figure, its title


def _read_curves(data: Any, several: Sequence[str | os.PathLike]) -> Made:
    """The curves of a run, or of several laid over each other."""
    if several:
        made = study_curves.overlaid([Path(run) for run in several])
        title = f"Training curves of {', '.join(run['name'] for run in made['runs'])}"
        panels = made.pop("panels")
        return {"study": "curves"} | made, panels, title
    made = study_curves.curves(Path(data))
    panels = made.pop("panels")
    return {"study": "curves", "run": str(data)} | made, panels, f"Training curves of {Path(data).name}"


def _measured(
    kind: str,
    data: Any,
    folder: Path,
    models: Sequence[str | os.PathLike],
    asked: Settings,
    quick: bool,
    progress: Progress,
) -> Made:
    cohort = folder / f"cohort-{asked.seed}"
    if data is None:
        heads = quick_heads(cohort, asked.seed, progress)[: asked.subjects]
    else:
        heads = find_heads(data, asked.split, asked.subjects, asked.label_classes, asked.label_names)
    if kind == "augmentation" and data is None and not models:
        paths = [weights.template_weights(), _tuned(cohort, asked, progress)]
        loaded = [StudyModel.load(paths[0], "shipped"), StudyModel.load(paths[1], TUNED)]
    else:
        own = (weights.template_weights, "shipped") if data is None else (weights.default_weights, weights.DEFAULT)
        loaded = _models(models, *own)
    conditions = _conditions(kind, heads[0], asked)
    assert asked.steps is not None and asked.adapt is not None
    engine = Engine(None if asked.whole else asked.patch, asked.device, asked.precision, asked.seed, asked.adapt)
    cells, failed = run_cells(folder, heads, loaded, conditions, asked.steps, engine, progress)
    notes = told_once(cells)
    for line in notes:
        log.info(line)
    rows = aggregate(cells, conditions)
    fit = time_fit(rows) if kind == "steps" else []
    facts = {
        "study": kind,
        "quick": quick,
        "data": "synthetic subjects made from the MNI152 template" if data is None else recorded(data),
        "heads": [head.name for head in heads],
        **({"note": TUNED_NOTE} if TUNED in (model.name for model in loaded) else {}),
        "models": [{"name": m.name, "path": weights.recorded_as(m.path), "sha256": m.sha256} for m in loaded],
        "settings": asdict(asked),
        "rows": rows,
        **({"fit": fit} if kind == "steps" else {}),
        "cells": cells,
        "failed": failed,
        "notes": notes,
        "definitions": definitions(),
    }
    n = len(heads) - len(failed)
    return facts, PANELS[kind](rows, fit), TITLES[kind].format(heads=f"{n} heads, mean and sd" if n > 1 else "1 head")


def _filled(kind: str, settings: Settings, quick: bool) -> Settings:
    """The settings with the study's defaults where nothing was asked."""
    if kind == "curves":
        return settings
    defaults = DEFAULTS[kind] | (QUICK[kind] if quick else {})
    given = asdict(settings)
    filled = replace(settings, **{name: value for name, value in defaults.items() if given[name] is None})
    if not filled.steps or min(filled.steps) < 1 or not _between(filled.noise, 0, MOST_NOISE):
        told = f"steps {filled.steps}, noise {filled.noise}"
        raise UsageError("study", told, f"steps from 1 up, noise from 0 up to {MOST_NOISE:g}")
    if not _between(filled.ratios, 1, MOST_RATIO):
        told = f"{', '.join(f'{ratio:g}' for ratio in filled.ratios or ())} is not allowed"
        raise UsageError("--ratios", told, f"ratios from 1 to {MOST_RATIO:g}")
    if filled.low_res is not None and not (_between(filled.low_res, 0, MOST_MM) and min(filled.low_res) > 0):
        told = f"{times(filled.low_res)} mm is not allowed"
        raise UsageError("--low-res", told, f"three sizes above 0, up to {MOST_MM:g} mm")
    if filled.subjects is not None and filled.subjects < 1:
        raise UsageError("--subjects", f"{filled.subjects} is not allowed", "a number from 1 up")
    for step in filled.steps:
        patch = None if filled.whole else filled.patch
        InferSettings(patch=patch, step=step, precision=filled.precision)
    return replace(filled, steps=tuple(sorted(set(filled.steps)))[: 1 if filled.whole else None])


def _between(values: Sequence[float] | None, low: float, high: float) -> bool:
    """Whether all of some numbers lie in a range, in which NaN never does."""
    return all(low <= value <= high for value in values or ())


def _conditions(kind: str, head: Head, asked: Settings) -> list[Condition]:
    """What the heads go through; the voxel sizes are those of the first head."""
    spacing = spacing_of(head)
    assert asked.ratios is not None and asked.noise is not None
    low_res = asked.low_res or thick(spacing, asked.ratios[0], asked.axis)
    if kind == "resolution":
        sizes = [thick(spacing, ratio, asked.axis) for ratio in sorted(set(asked.ratios))]
        return [Condition(f"{low[asked.axis]:g} mm", low, asked.noise[0]) for low in sizes]
    if kind == "augmentation":
        noise = max(asked.noise)
        return [
            Condition("original", low_res),
            Condition(f"noise {100 * noise:g} %", low_res, noise),
            Condition("squared contrast", low_res, power=2.0),
            Condition("square-root contrast", low_res, power=0.5),
        ]
    levels = sorted(set(asked.noise))
    return [Condition("original" if n == 0 else f"noise {100 * n:g} %", low_res, n) for n in levels]


def _models(paths: Sequence[str | os.PathLike], default: Callable[[], Path], name: str) -> list[StudyModel]:
    if not paths:
        return [StudyModel.load(default(), name)]
    if len({os.path.realpath(p) for p in paths}) < len(paths):  # its rows would count twice
        raise UsageError("--weights", "a model is named twice", "name each model once")
    names = [Path(p).stem for p in paths]
    alike = len(set(names)) < len(names)
    return [StudyModel.load(Path(p), str(Path(p)) if alike else None) for p in paths]


def _tuned(cohort: Path, asked: Settings, progress: Progress) -> Path:
    """The shipped model after a few updates without contrast or noise augmentation: something to compare it with."""
    made = cohort / "tuned" / "model.safetensors"
    if made.exists():
        return made
    store, start = cohort / "train.zarr", weights.template_weights()
    convert(cohort / "cohort.csv", store, overwrite=True, progress=progress)
    shutil.rmtree(made.parent, ignore_errors=True)  # of a run that was stopped
    done = short_training(
        store,
        made.parent,
        start,
        (1.0, 1.0, 3.0),
        asked.device,
        progress,
        epochs=1,
        steps_per_epoch=4,
        critic_iterations=1,
        validate_every=1000,
        batch_size=2,
        patch_size=36,
        kernel_dis=4,
        ema=0.0,
        contrast_max=0.0,
        seed=asked.seed,
    )
    if done["stopped"]:
        raise stopped_by(done["stopped"])
    return made
