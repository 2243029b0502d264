"""Score a super-resolved image and its segmentation against the truth: one pair, files, or a cohort's table.

Results are plain dicts of finite numbers, texts and None, ready for JSON; ``definitions`` says what each figure means.
Volumes whose grids differ from the reference's are first resampled onto it in world space, and the result says so.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from fastsrgan import images, metrics, table
from fastsrgan.errors import FastsrganError, InputError
from fastsrgan.geometry import Volume
from fastsrgan.runtime import QUIET, Progress

log = logging.getLogger("fastsrgan")

IMAGE_COLUMNS = ("SR_image", "HR_image", "Seg_image", "Label_image", "Mask_image", "Baseline_image", "Baseline_seg")
SAME_GRID = 0.01  # of a voxel: corners closer than this are one grid
SCALE_FACTOR = 2.0  # mean intensities further apart than this get a note
REGIONS = {
    "whole": "every voxel of the reference's grid",
    "mask": "voxels where the mask is above 0.5",
    "label": "voxels where the label is above 0.5",
}


def evaluate_pair(
    sr: Volume,
    hr: Volume,
    *,
    seg: Volume | None = None,
    label: Volume | None = None,
    mask: Volume | None = None,
    baseline: Volume | None = None,
    baseline_seg: Volume | None = None,
) -> dict[str, Any]:
    """Compare ``sr`` (and ``seg``) with ``hr`` (and ``label``) on the grid of ``hr``.

    Parameters
    ----------
    sr, hr : image under test and reference, in the same intensity units; nothing is rescaled
    seg, label : segmentation (mask or probability map, thresholded at 0.5) and its truth
    mask : region to score besides the whole volume; a label is such a region too
    baseline, baseline_seg : another image and segmentation of the same subject, scored likewise, e.g. the spline's

    Returns ``image`` {region: {psnr_db, ssim, mae, mse}}; with ``seg`` also ``segmentation`` {dice, components,
    largest_component, false_components, false_component_voxels, volume_ml, label_components, label_volume_ml}; with a
    baseline ``baseline`` (the same two) and ``gain`` (value minus baseline); and ``grid``, ``notes``, ``definitions``.
    None stands for a figure that does not exist (infinite PSNR, SSIM of a region without a whole window).
    Raises InputError when volumes do not overlap, the reference has no positive voxel or a mask is empty.
    """
    if label is None and (seg is not None or baseline_seg is not None):
        raise InputError("segmentation", "there is no label to compare it with", "give --label too")
    notes = [f"reference: {warning}" for warning in hr.warnings]
    on: dict[str, np.ndarray] = {}
    for name, volume, order in (
        ("SR", sr, 3),
        ("baseline", baseline, 3),
        ("segmentation", seg, 0),
        ("baseline segmentation", baseline_seg, 0),
        ("label", label, 0),
        ("mask", mask, 0),
    ):
        if volume is not None:
            notes += [f"{name}: {warning}" for warning in volume.warnings]
            on[name] = onto_grid(volume, hr, order=order, name=name, notes=notes).data
    regions: dict[str, np.ndarray | None] = {"whole": None}
    regions |= {name: metrics.binary(on[name]) for name in ("mask", "label") if name in on}
    result: dict[str, Any] = _scores(on["SR"], on.get("segmentation"), on.get("label"), hr, regions, "SR", notes)
    if baseline is not None or baseline_seg is not None:
        base_seg = on.get("baseline segmentation")
        other = _scores(on.get("baseline"), base_seg, on.get("label"), hr, regions, "baseline", notes)
        result |= {"baseline": other, "gain": _difference(result, other)}
    result["grid"] = {"shape": list(hr.data.shape), "spacing_mm": [round(s, 6) for s in hr.spacing]}
    for note in notes:
        log.info(note)
    result["notes"] = notes
    result["definitions"] = metrics.DEFINITIONS | {f"region {name}": REGIONS[name] for name in regions}
    return result


def evaluate_files(
    sr: str | os.PathLike,
    hr: str | os.PathLike,
    seg: str | os.PathLike | None = None,
    label: str | os.PathLike | None = None,
    *,
    mask: str | os.PathLike | None = None,
    baseline: str | os.PathLike | None = None,
    baseline_seg: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """``evaluate_pair`` on image files; ``files`` in the result names them. Raises InputError as reading them does."""
    named = {"sr": sr, "hr": hr, "seg": seg, "label": label, "mask": mask}
    named |= {"baseline": baseline, "baseline_seg": baseline_seg}
    given = {name: Path(path) for name, path in named.items() if path is not None}
    volumes = {name: (images.load_label if name in ("label", "mask") else images.load)(p) for name, p in given.items()}
    result = evaluate_pair(volumes.pop("sr"), volumes.pop("hr"), **volumes)
    return {"files": {name: str(path) for name, path in given.items()}} | result


def evaluate_table(csv_path: str | os.PathLike, *, progress: Progress = QUIET) -> dict[str, Any]:
    """Evaluate every row of a table and sum up the cohort.

    The table has the columns ``SR_image`` and ``HR_image`` and any of ``Seg_image``, ``Label_image``, ``Mask_image``,
    ``Baseline_image``, ``Baseline_seg``; cells of the latter may be empty. Relative paths start at the table's folder.

    Returns ``rows`` (the dicts of ``evaluate_files`` with ``subject`` and ``line``), ``failed`` (line, subject, error
    of rows whose images could not be used) and ``summary`` {figure: {mean, sd, n}} over the other rows, figures named
    by their dotted path (``image.whole.psnr_db``); sd is the sample standard deviation (n - 1), None for one row.
    Raises InputError with every fault of the table at once, or when no row could be evaluated.
    """
    csv_path = Path(csv_path)
    rows = _read(csv_path)
    subjects = table.subject_ids([files["SR_image"] for _, files in rows])
    done: list[dict[str, Any]] = []
    failed: list[tuple[int, str, str]] = []
    progress.start("evaluate", len(rows), "subject")
    for (line, files), subject in zip(rows, subjects, strict=True):
        try:
            result = evaluate_files(
                files["SR_image"],
                files["HR_image"],
                files.get("Seg_image"),
                files.get("Label_image"),
                mask=files.get("Mask_image"),
                baseline=files.get("Baseline_image"),
                baseline_seg=files.get("Baseline_seg"),
            )
        except FastsrganError as error:
            log.warning("line %d, %s: %s", line, subject, error)
            failed.append((line, subject, str(error)))
        else:
            done.append({"subject": subject, "line": line} | result)
        progress.advance(1, subject=subject)
    progress.finish()
    if not done:
        raise table.table_error(csv_path, [(line, error) for line, _, error in failed])
    definitions = dict(metrics.DEFINITIONS)
    definitions["sd"] = "sample standard deviation over subjects (n - 1)"
    left_out = [{"line": line, "subject": subject, "error": error} for line, subject, error in failed]
    return {"rows": done, "failed": left_out, "summary": summarise(done), "definitions": definitions}


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation and count of every figure over the results that have it, by dotted path."""
    columns: dict[str, list[float]] = {}
    for result in results:
        for section in ("image", "segmentation", "baseline", "gain"):
            for name, value in _flat(result.get(section, {}), section):
                columns.setdefault(name, []).append(value)
    return {
        name: {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values),
        }
        for name, values in columns.items()
    }


def same_grid(volume: Volume, like: Volume) -> bool:
    """Whether two volumes have one shape and corners that lie within 0.01 voxel of each other."""
    if volume.data.shape != like.data.shape:
        return False
    corners = np.array(np.meshgrid(*((0, n - 1) for n in like.data.shape))).reshape(3, -1)
    apart = ((np.asarray(volume.affine) - np.asarray(like.affine))[:3] @ np.vstack([corners, np.ones(8)])) ** 2
    return bool(np.sqrt(apart.sum(0)).max() <= SAME_GRID * min(like.spacing))


def onto_grid(
    volume: Volume, like: Volume, *, order: int = 3, name: str = "volume", notes: list[str] | None = None
) -> Volume:
    """``volume`` on the grid of ``like``: itself where the grids are one, else resampled in world space.

    Order 3 is the cubic spline (images), 0 the nearest voxel (labels); nothing is smoothed. Voxels whose centre lies
    outside the volume's field of view become 0. What was done is appended to ``notes``, or logged without them.
    Raises InputError when the two do not overlap.
    """
    if same_grid(volume, like):
        return volume
    matrix = np.linalg.inv(volume.affine) @ like.affine
    inside = _inside(matrix, volume.data.shape, like.data.shape)
    share = float(inside.mean())
    if share == 0:
        raise InputError(name, "does not overlap the reference in world space", "check the affines of both files")
    data = np.asarray(volume.data, np.float32) if order else np.asarray(volume.data)
    moved = ndimage.affine_transform(
        data, matrix[:3, :3], matrix[:3, 3], like.data.shape, output=data.dtype, order=order, mode="nearest"
    )
    moved[~inside] = 0
    kind = "cubic spline" if order == 3 else "nearest voxel" if order == 0 else f"spline of order {order}"
    note = f"{name}: grid differs from the reference's, resampled onto it in world space ({kind})"
    if share < 1:
        note += f"; {100 * (1 - share):.1f} % of the reference lies outside its field of view and was set to 0"
    if notes is None:
        log.info(note)
    else:
        notes.append(note)
    return Volume(moved, like.affine, volume.warnings, volume.meta)


def _inside(matrix_44: np.ndarray, shape_in: tuple[int, ...], shape_out: tuple[int, ...]) -> np.ndarray:
    """(X, Y, Z) bool: output voxels whose centre lies in a voxel of the input."""
    i, j, k = np.ogrid[tuple(slice(n) for n in shape_out)]
    inside = np.ones(shape_out, bool)
    for d, n in enumerate(shape_in):
        a, b, c, origin = matrix_44[d]
        where = a * i + b * j + (c * k + origin)
        # Rounding must not push a centre that lies on the border out of it.
        inside &= (where >= -0.5 - 1e-6) & (where <= n - 0.5 + 1e-6)
    return inside


def _scores(
    sr: np.ndarray | None,
    seg: np.ndarray | None,
    label: np.ndarray | None,
    hr: Volume,
    regions: dict[str, np.ndarray | None],
    name: str,
    notes: list[str],
) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    if sr is not None:
        scores["image"] = _image_scores(sr, hr.data, regions, name, notes)
    if seg is not None and label is not None:
        voxel_ml = abs(float(np.linalg.det(np.asarray(hr.affine)[:3, :3]))) / 1000
        scores["segmentation"] = {
            "dice": metrics.dice(seg, label),
            **metrics.components(seg, label),
            "volume_ml": int(np.count_nonzero(metrics.binary(seg))) * voxel_ml,
            "label_components": metrics.connected_components(label),
            "label_volume_ml": int(np.count_nonzero(metrics.binary(label))) * voxel_ml,
        }
    return scores


def _image_scores(
    sr: np.ndarray, hr: np.ndarray, regions: dict[str, np.ndarray | None], name: str, notes: list[str]
) -> dict[str, dict[str, float | None]]:
    means = float(np.mean(sr, dtype=np.float64)), float(np.mean(hr, dtype=np.float64))
    if min(means) <= 0 or max(means) > SCALE_FACTOR * min(means):
        notes.append(f"{name}: mean intensity {means[0]:.4g}, the reference's {means[1]:.4g}: are the units the same?")
    try:
        similarity = metrics.ssim_regions(sr, hr, list(regions.values()))
    except InputError as error:
        similarity = [None] * len(regions)
        notes.append(f"{name}: no SSIM: {error.reason}")
    scores: dict[str, dict[str, float | None]] = {}
    for (region, inside), ssim in zip(regions.items(), similarity, strict=True):
        psnr: float | None = metrics.psnr(sr, hr, inside)
        if psnr == math.inf:
            psnr = None
            notes.append(f"{name}, {region}: identical to the reference, PSNR is infinite")
        mae, mse = metrics.mae(sr, hr, inside), metrics.mse(sr, hr, inside)
        scores[region] = {"psnr_db": psnr, "ssim": ssim, "mae": mae, "mse": mse}
    return scores


def _difference(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """result - other for every number that both hold, in the same tree."""
    gain: dict[str, Any] = {}
    for key in result.keys() & other.keys():
        a, b = result[key], other[key]
        if isinstance(a, dict):
            gain[key] = _difference(a, b)
        elif not key.startswith("label_"):
            gain[key] = None if a is None or b is None else a - b
    return {key: gain[key] for key in result if key in gain}


def _flat(tree: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}.{key}")
        elif value is not None:
            flat.append((f"{prefix}.{key}", float(value)))
    return flat


def _read(csv_path: Path) -> list[tuple[int, dict[str, Path]]]:
    """(line, {column: existing path}) of every row; all faults in one InputError."""
    records = table._records(table._text(csv_path), _delimiter)
    if not records:
        raise InputError(csv_path, "is empty", "its first line names the columns SR_image, HR_image, ...")
    header = [cell.strip() for cell in records[0][1]]
    faults = [(1, f"column {name} twice") for name in IMAGE_COLUMNS if header.count(name) > 1]
    faults += [(1, f"no column {name}{_meant(name, header)}") for name in IMAGE_COLUMNS[:2] if name not in header]
    if len(records) == 1:
        faults.append((1, "no row below the header"))
    rows: list[tuple[int, dict[str, Path]]] = []
    for line, cells in records[1:] if not faults else []:
        values = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        faults += [(line, f"{name} is empty") for name in IMAGE_COLUMNS[:2] if not values.get(name)]
        files = {name: table._locate(values[name], csv_path, None) for name in IMAGE_COLUMNS if values.get(name)}
        faults += [(line, f"{name} {values[name]}: no such file") for name, path in files.items() if not path.exists()]
        if "Seg_image" in files and "Label_image" not in files:
            faults.append((line, "Seg_image without Label_image"))
        rows.append((line, files))
    if faults:
        raise table.table_error(csv_path, faults)
    return rows


def _delimiter(header: str) -> str:
    return max(table.DELIMITERS, key=lambda d: len({cell.strip(' "') for cell in header.split(d)} & set(IMAGE_COLUMNS)))


def _meant(name: str, header: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), [cell.lower() for cell in header], 1)
    meant = [cell for cell in header if cell.lower() in near]
    return f", did you mean it by {meant[0]}?" if meant else ", found " + ", ".join(c or "(empty)" for c in header)
