"""``fastsrgan demo``: the main job on brains made of an embedded real one, from cohort to picture.

Synthetic subjects are made from the one real template that nilearn's wheel carries (template.py); the test subject has
no part in training. Everything goes through the commands' own functions.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.convert import convert
from fastsrgan.core.files import output_folder, write_json
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.system import peak_memory, pick_device, provenance, tune_allocator
from fastsrgan.demo.template import TemplateSubject, Triple, make_cohort, whole_slices
from fastsrgan.errors import UsageError, times
from fastsrgan.evaluate.figures import captions, columns
from fastsrgan.evaluate.grids import READER, SPLINE, reader_label_map
from fastsrgan.evaluate.pair import evaluate_pair, flat
from fastsrgan.infer.files import infer_files
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.observation.model import degrade
from fastsrgan.pictures.figure import result_figure
from fastsrgan.report.page import report
from fastsrgan.train.run import short_training
from fastsrgan.volume.acquisition import choose_weight
from fastsrgan.volume.consistency import agree, observation
from fastsrgan.volume.geometry import Volume, grid_size, resampled_affine
from fastsrgan.volume.resample import slice_axis

log = logging.getLogger("fastsrgan")
PATCH, STEP = 128, 30  # the paper's
FIGURES = "demo.json"
LOW_RES_MM = (1.0, 20.0)  # least and most of an acquisition


def run(
    out: str | os.PathLike = "demo",
    *,
    device: str = "auto",
    seed: int = 0,
    low_res_mm: Triple = (1.0, 1.0, 3.0),
    overwrite: bool = False,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Cohort -> store -> short training from the shipped weights -> dense-overlap inference -> figures and picture.

    Parameters
    ----------
    out : folder for everything that is made
    low_res_mm : resolution of the test subject's acquisition, stored axes
    seed : of the synthetic cohort

    Returns
    -------
    dict : ``table`` (rows: spline, fastsrgan), ``picture``, ``json``, ``page`` (HTML), ``seconds``

    Raises UsageError for a resolution that the head cannot have, and when ``out`` holds a demo and ``overwrite`` is not
    given; errors of the stages as they are.
    """
    began = time.perf_counter()
    low, high = LOW_RES_MM
    if len(low_res_mm) != 3 or not all(low <= size <= high for size in low_res_mm):
        told = f"{times(low_res_mm)} mm is not allowed"
        raise UsageError("--low-res", told, f"three sizes from {low:g} mm, those of the demo's head, to {high:g} mm")
    pick_device(device)
    tune_allocator()
    start = weights.template_weights()
    folder = fresh_folder(Path(out), overwrite)
    stage = Stages()
    drawn: dict[str, Any] = {"n_train": 2, "n_test": 1, "seed": seed, "sd_voxels": 2.5}
    cohort = stage("cohort", lambda: make_cohort(folder / "cohort", progress=progress, **drawn))
    store = folder / "cohort.zarr"
    stage("convert", lambda: convert(cohort.csv, store, progress=progress))
    trained = stage("train", lambda: short_training(store, folder / "run", start, low_res_mm, device, progress))
    if trained["stopped"]:
        stopped = {"table": [{"stopped": "training"}], "picture": None, "json": None, "page": None, "seconds": 0.0}
        return {**stopped, "exit_code": trained["exit_code"]}
    scores, picture = restore(folder, cohort.of("Test")[0], trained["weights"], low_res_mm, device, stage, progress)
    rows = [row("cubic spline", scores["baseline"]), row("best linear", scores["linear"]), row("fastsrgan", scores)]
    total = time.perf_counter() - began
    facts = {
        "table": rows,
        "scores": scores,
        "seconds": {**stage.seconds, "total": round(total, 1)},
        "low_res_mm": low_res_mm,
        "peak_memory_bytes": peak_memory(),
        "training": trained,
        "start_weights": start.name,
        "provenance": provenance(),
    }
    write_json(folder / FIGURES, facts)
    (page, *_) = stage("report", lambda: report(folder, progress=progress))
    made = {"picture": str(picture), "json": str(folder / FIGURES), "page": str(page)}
    return {"table": rows, **made, "seconds": total}


class Stages:
    """Runs the stages of the demo, names each in the log and keeps its ``seconds``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of ``call``."""
        log.info("%s", name)
        began = time.perf_counter()
        result = call()
        self.seconds[name] = round(time.perf_counter() - began, 1)
        return result


def restore(
    folder: Path,
    test: TemplateSubject,
    trained: str,
    low_res_mm: Triple,
    device: str,
    stage: Stages,
    progress: Progress,
) -> tuple[dict[str, Any], Path]:
    """Acquire the test subject, infer, evaluate and draw: the scores of ``evaluate_pair`` and the picture's path."""
    hr, label = (whole_slices(v, low_res_mm) for v in (images.load(test.image), images.load_label(test.label)))
    scan, spline, label_map = acquire(hr, label, low_res_mm)
    scan_path = images.save(folder / "scan.nii.gz", scan.data, scan.affine)
    asked: dict[str, Any] = {"patch": PATCH, "step": STEP, "new_resolution": list(hr.spacing), "device": device}
    asked["profile"] = "gaussian"  # that of acquire(), which best_linear() knows as well
    infer = stage("infer", lambda: infer_files([scan_path], folder / "out", trained, progress=progress, **asked))
    files = infer["items"][0]["outputs"]
    sr, seg = images.load(files["sr"]), images.load(files["seg"])
    linear = best_linear(scan, spline)
    others: dict[str, Any] = {
        "seg": seg,
        "label": label,
        "mask": brain(hr),
        "baseline": spline,
        "baseline_seg": label_map,
    }
    scores = stage("evaluate", lambda: evaluate_pair(sr, hr, **others))
    scores["baselines"] = {"image": SPLINE, "segmentation": READER}  # what acquire() made
    plain = evaluate_pair(linear, hr, mask=brain(hr), baseline=spline)
    scores["linear"] = {key: plain[key] for key in ("image", "gain")}
    volumes = {"low": scan, "spline": spline, "linear": linear, "sr": sr, "truth": hr, "seg": seg, "label": label}
    picture = stage("picture", lambda: draw(folder / "demo.png", volumes, scores, low_res_mm))
    return scores, picture


def best_linear(scan: Volume, spline: Volume) -> Volume:
    """The spline made to agree with the scan, by the weight that the scan itself gives: the best linear estimate.

    What can be had without a network; on the grid of ``spline``, which ``acquire`` made.
    """
    seen = observation(scan.data.shape, scan.spacing, spline.data.shape, spline.spacing)
    assert seen is not None
    made = np.array(spline.data, np.float32)
    agree(made, scan.data, seen, choose_weight(scan.data, seen, slice_axis(scan.spacing)).w, floor=0.0)
    return Volume(made, spline.affine)


def fresh_folder(folder: Path, overwrite: bool) -> Path:
    """A demo folder with nothing but its mark, the file of the figures, which is there from the beginning on.

    Only what an earlier demo made is ever removed: the names are those that anyone's scan and results have.
    """
    made = ["cohort", "cohort.zarr", "run", "out", "scan.nii.gz", "demo.png", "report.html"]
    there = [folder / name for name in made if (folder / name).exists()]
    if there and not (folder / FIGURES).is_file():
        reason = f"is there already, and without {FIGURES} in the folder no demo made it"
        raise UsageError(there[0], reason, "-o DIR goes elsewhere")
    if (folder / FIGURES).exists() and not overwrite:
        raise UsageError(folder, "holds an earlier demo", "--overwrite replaces it, -o DIR goes elsewhere")
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(output_folder(folder) / FIGURES, {"begun": provenance()})
    return folder


def acquire(hr: Volume, label: Volume, low_res_mm: Triple) -> tuple[Volume, Volume, Volume]:
    """The scan of a subject at ``low_res_mm``, and what interpolation alone makes of it.

    Returns the low-resolution image in the units of ``hr``; its cubic-spline interpolation on the grid of ``hr``; and
    the label map of a reader of the scan (``reader_label_map``).
    """
    done = degrade(hr.data, hr.spacing, low_res_mm)
    shape = tuple(grid_size(n, s, r) for n, s, r in zip(hr.data.shape, hr.spacing, low_res_mm, strict=True))
    scan = Volume(done.low_res * np.float32(done.scale), resampled_affine(hr.affine, hr.data.shape, shape, low_res_mm))
    spline = Volume(done.interpolated * np.float32(done.scale), hr.affine)
    return scan, spline, reader_label_map(label, scan, [])


def brain(hr: Volume) -> Volume:
    """Where the skull-stripped subject is above zero."""
    return Volume((hr.data > 0).astype(np.uint8), hr.affine)


def row(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    """One line of the demo's table."""
    numbers = flat(scores)
    shown = {c.heading.replace("mask", "brain"): numbers.get(c.path) for c in columns().values() if c.figure.headline}
    return {"method": name} | shown


def draw(path: Path, volumes: dict[str, Volume], scores: dict[str, Any], low_res_mm: Triple) -> Path:
    """The picture of the demo."""
    title = f"{' x '.join(f'{r:g}' for r in low_res_mm)} mm scan of an unseen subject"
    made = "Synthetic subject made from the MNI152 template; shipped weights, a short training run"
    return result_figure(path, volumes, captions(scores), title=title, footer=f"{made}; slice profile known")
