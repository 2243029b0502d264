"""Score a super-resolved image and its segmentation against the truth: volumes or files. Cohorts: cohort.py.

Results are plain dicts of finite numbers, texts and None, ready for JSON; ``definitions`` says what each figure means.
Volumes whose grids differ from the reference's are first resampled onto it in world space, and scores are those of the
part that SR, baseline and reference share; the result says both.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from fastsrgan.core.files import mapping, read_json, real
from fastsrgan.core.places import recorded
from fastsrgan.errors import InputError, UsageError
from fastsrgan.evaluate import metrics
from fastsrgan.evaluate.figures import FIGURES, REGIONS, Compared, captions, definitions, scores
from fastsrgan.evaluate.grids import READER, SPLINE, field_of_view, onto_grid, reader_label_map
from fastsrgan.io import any_image, labels
from fastsrgan.io import nifti as images
from fastsrgan.io.bids import RECORD
from fastsrgan.volume.geometry import Volume

log = logging.getLogger("fastsrgan")

Keep = Callable[[dict[str, Any]], object]  # what is done with a result before pictures are drawn

SECTIONS = ("image", "doubt", "segmentation", "structures", "baseline", "gain")
SCALE_FACTOR = 2.0  # mean intensities further apart than this get a note


def evaluate_pair(
    sr: Volume,
    hr: Volume,
    *,
    seg: Volume | None = None,
    label: Volume | None = None,
    mask: Volume | None = None,
    lr: Volume | None = None,
    baseline: Volume | None = None,
    baseline_seg: Volume | None = None,
    doubt: Volume | None = None,
    structures: Mapping[str, tuple[Volume, Volume]] | None = None,
    subject: str | None = "",
) -> dict[str, Any]:
    """Compare ``sr`` (and ``seg``) with ``hr`` (and ``label``) on the grid of ``hr``.

    Parameters
    ----------
    sr, hr : image under test and reference, in the same intensity units; nothing is rescaled
    seg, label : segmentation (mask or probability map, thresholded at 0.5) and its truth
    mask : region to score besides the whole volume, where it is above zero; a label is such a region too
    lr : the low-resolution image that ``sr`` was made from: its cubic spline, and with a label the interpolated label
        map (paper table 2), are the baselines where no others are given
    baseline, baseline_seg : another image and segmentation of the same subject, scored likewise
    doubt : the standard deviation that the error of ``sr`` is taken to have: ``doubt`` says whether it is so
    structures : segmentation and label of further structures by name, for scores in ``structures``
    subject : named before each note in the log; None: nothing is logged

    A label of several values is refused: which of them is the structure is to be chosen (`labels`).

    Returns ``image`` {region: {figure: value}}; with ``seg`` also ``segmentation`` {figure: value}, the figures being
    those of ``FIGURES``; with ``doubt`` also ``doubt``, see ``metrics.calibration``; with a baseline ``baseline`` (the
    same two), ``gain`` (value minus baseline) and ``baselines`` (what they are); and ``grid``, ``notes``,
    ``definitions``. Where SR or baseline do not cover the reference, all figures are those of the overlap, and ``grid``
    has its share ``overlap`` of the reference's voxels. None stands for a figure that does not exist (infinite PSNR,
    SSIM of a region without a whole window, distance to an empty segmentation).
    Raises InputError when volumes do not overlap, as `refuse_placeless` does, and where the reference holds 0 or one
    value below alone or a mask is empty.
    """
    _check_labels(label, seg, baseline_seg)
    notes = [f"reference: {warning}" for warning in hr.warnings]
    what = {"image": "as given"} if baseline is not None else {}
    what |= {"segmentation": "as given"} if baseline_seg is not None else {}
    if lr is not None and baseline is None:
        baseline, what["image"] = lr, SPLINE
    given = {"SR": sr, "baseline": baseline, "doubt": doubt, "segmentation": seg}
    given |= {"baseline segmentation": baseline_seg, "label": label, "mask": mask}
    on, part, box = _on_reference(given, hr, lr, notes)
    if lr is not None and label is not None and baseline_seg is None:
        made: list[str] = []
        on["baseline segmentation"] = reader_label_map(Volume(on["label"], hr.affine), lr, made, part).data
        notes += _surprises(made) if baseline is not lr else []
        what["segmentation"] = READER
    hr, ends = _above_zero(hr, on, notes)
    grid: dict[str, Any] = {"shape": list(hr.data.shape), "spacing_mm": [round(s, 6) for s in hr.spacing]}
    if part is not None:
        grid["overlap"] = float(part.mean())
        hr, part = _cut_to_overlap(hr, on, part, box)
    regions = _regions(on, part, notes)
    more: dict[str, Any] = {"notes": notes, "ends": ends, "part": part}
    _note_scale(on["SR"], hr.data, "SR", notes)
    result = scores(Compared(hr, regions, on["SR"], on.get("segmentation"), on.get("label"), "SR", **more))
    if "doubt" in on:
        result["doubt"] = metrics.calibration(on["SR"], hr.data, on["doubt"], regions.get("mask"), part)
    if structures:
        result["structures"] = {
            name: _structure(pair, Compared(hr, {}, on["SR"], name=name, **more)) for name, pair in structures.items()
        }
    if what:
        if "baseline" in on:
            _note_scale(on["baseline"], hr.data, "baseline", notes)
        base_seg = on.get("baseline segmentation")
        other = scores(Compared(hr, regions, on.get("baseline"), base_seg, on.get("label"), "baseline", **more))
        result |= {"baseline": other, "gain": _difference(result, other), "baselines": what}
    result |= {"grid": grid, "notes": list(dict.fromkeys(notes)), "definitions": _defined(on, regions, grid)}
    for note in result["notes"] if subject is not None else ():
        log.info("%s%s", f"{subject}: " if subject else "", note)
    return result


# --- the steps of `evaluate_pair`, in their order; each adds to ``notes`` what it found ------------------------------


def _check_labels(label: Volume | None, *segmentations: Volume | None) -> None:
    """InputError for a segmentation without a label, and for a label of several values."""
    if label is None and any(seg is not None for seg in segmentations):
        raise InputError("segmentation", "there is no label to compare it with", "give --label too")
    if label is not None:
        labels.refuse_many(_values(label), label.meta.get("path", "label"))


# How images are brought onto the reference's grid: order of the interpolation.
ORDERS = {"SR": 3, "baseline": 3, "doubt": 1, "segmentation": 0, "baseline segmentation": 0, "label": 0, "mask": 0}


def _on_reference(
    given: Mapping[str, Volume | None], hr: Volume, lr: Volume | None, notes: list[str]
) -> tuple[dict[str, np.ndarray], np.ndarray | None, tuple[slice, ...]]:
    """The images on the reference's grid, which of its voxels all images cover (None: all of them), and their box."""
    on: dict[str, np.ndarray] = {}
    part: np.ndarray | None = None
    box: tuple[slice, ...] = ()
    for name, order in ORDERS.items():
        if (volume := given[name]) is not None:
            notes += [f"{name}: {warning}" for warning in volume.warnings]
            made: list[str] = []
            on[name] = onto_grid(volume, hr, order=order, name=name, notes=made, scored=part).data
            # What lies outside the two images is not scored; a scan's grid always differs.
            scored = [m.split("; ")[0] for m in made] if name in ("SR", "baseline") else made
            notes += scored if volume is not lr else []
        if name == "baseline":  # from here on it is known what is scored
            part, box = _overlap(hr, {"SR": given["SR"], "baseline": volume}, notes)
    return on, part, box


def _above_zero(hr: Volume, on: dict[str, np.ndarray], notes: list[str]) -> tuple[Volume, tuple[float, float]]:
    """The reference and its ends, lowest and highest; one wholly below 0 moved up by its minimum, and the images of
    ``on`` with it, as training and inference do."""
    top, low = float(hr.data.max()), float(hr.data.min())
    if not low < top <= 0:
        return hr, (low, top)
    notes.append(f"reference: no voxel is above 0: it, SR and baseline are moved up by {-low:.4g} for PSNR and SSIM")
    on |= {name: on[name] - np.float32(low) for name in ("SR", "baseline") if name in on}
    return replace(hr, data=hr.data - np.float32(low)), (0.0, top - low)


def _cut_to_overlap(
    hr: Volume, on: dict[str, np.ndarray], part: np.ndarray, box: tuple[slice, ...]
) -> tuple[Volume, np.ndarray | None]:
    """The reference in the box of what is scored, and which voxels of it are (None: all); ``on`` is cut likewise, and
    its masks are empty outside."""
    on |= {name: data[box] for name, data in on.items()}
    inside = part[box]
    if inside.all():
        return _cropped(hr, box), None
    for name in ("segmentation", "baseline segmentation", "label", "mask"):
        if name in on:
            on[name] = on[name] * inside
    return _cropped(hr, box), inside


def _regions(on: Mapping[str, np.ndarray], part: np.ndarray | None, notes: list[str]) -> dict[str, np.ndarray | None]:
    """Where figures are taken: the whole, and inside the mask and the label where they are given and hold a voxel."""
    regions: dict[str, np.ndarray | None] = {"whole": part}
    regions |= {"mask": on["mask"] > 0} if "mask" in on else {}
    regions |= {"label": metrics.binary(on["label"])} if "label" in on else {}
    if "label" in regions and not np.any(regions["label"]):
        notes.append("the label is empty on the reference's grid: no figures in its region")
        del regions["label"]
    return regions


def _defined(on: Mapping[str, np.ndarray], regions: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, str]:
    """What the figures and regions of a result mean."""
    found = definitions() | (metrics.CALIBRATION if "doubt" in on else {})
    found |= {f"region {name}": REGIONS[name] for name in regions}
    whole = {"region whole": "every voxel of the reference's grid that lies in all images"}
    return found | (whole if "overlap" in grid else {})


def _values(label: Volume) -> list[int]:
    """The whole numbers that a label holds; none of a probability map."""
    if label.data.dtype.kind == "f":
        return []
    return label.meta.get("values") or np.unique(label.data).tolist()


def _overlap(
    hr: Volume, others: Mapping[str, Volume | None], notes: list[str]
) -> tuple[np.ndarray | None, tuple[slice, ...]]:
    """The reference's voxels that lie in the field of view of all others, None for all, and their box.

    Raises InputError where there is none.
    """
    seen = {name: field_of_view(v, hr) for name, v in others.items() if v is not None}
    parts = {name: part for name, part in seen.items() if part is not None}
    if not parts:
        return None, ()
    part = np.logical_and.reduce(list(parts.values()))
    if not part.any():
        reason = f"{' and '.join(parts)} and the truth have no voxel in common"
        raise InputError("evaluate", reason, "check the affines")
    notes.append(
        f"scored on the overlap, {100 * part.mean():.1f} % of the truth's voxels: the rest lies outside the field of "
        f"view of {' and '.join(parts)}"
    )
    return part, ndimage.find_objects(part.astype(np.uint8))[0]


def _cropped(volume: Volume, box: tuple[slice, ...]) -> Volume:
    shift = np.eye(4)
    shift[:3, 3] = [s.start for s in box]
    return Volume(volume.data[box], np.asarray(volume.affine, float) @ shift, volume.warnings, volume.meta)


def _structure(pair: tuple[Volume, Volume], compared: Compared) -> dict[str, Any]:
    """Scores of one of several structures."""
    for volume, kind in zip(pair, ("seg", "label"), strict=True):
        name = f"{compared.name} {'segmentation' if kind == 'seg' else kind}"
        data = onto_grid(volume, compared.hr, order=0, name=name, notes=compared.notes, scored=compared.part).data
        setattr(compared, kind, data if compared.part is None else data * compared.part)
    return scores(compared)["segmentation"]


def _surprises(notes: list[str]) -> list[str]:
    """What is to be said of baselines made from the scan: its grid always differs, that it misses a part does not."""
    return [note for note in notes if "outside its field of view" in note]


def evaluate_files(
    sr: str | os.PathLike,
    hr: str | os.PathLike,
    seg: str | os.PathLike | None = None,
    label: str | os.PathLike | None = None,
    *,
    mask: str | os.PathLike | None = None,
    lr: str | os.PathLike | None = None,
    baseline: str | os.PathLike | None = None,
    baseline_seg: str | os.PathLike | None = None,
    doubt: str | os.PathLike | None = None,
    png: str | os.PathLike | None = None,
    label_classes: Sequence[str] = (),
    label_names: str | os.PathLike | None = None,
    subject: str | None = "",
    alone: bool = True,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """``evaluate_pair`` on image files; ``files`` in the result names them. ``subject`` is the SR's stem by default.

    ``label_classes`` says which values of the label, and of a segmentation that is a map of several values too, are the
    structure, see `labels.structure`; of several, the first is the ``segmentation`` and every one has its scores in
    ``structures``. ``label_names`` is a lookup table of names.

    ``doubt`` is found where ``infer`` wrote it beside ``sr``. ``png`` takes a picture of where SR (and the baseline)
    differ from the reference, see ``draw_errors``; before it is drawn ``keep`` is called with the result. Raises
    InputError as reading the files does, and, ``alone``, for a structure of which the label holds nothing; of one
    subject of several that is a note.
    """
    named = {"sr": sr, "hr": hr, "seg": seg, "label": label, "mask": mask, "lr": lr}
    named |= {"baseline": baseline, "baseline_seg": baseline_seg, "doubt": doubt or _beside(Path(sr))}
    given = {name: Path(path) for name, path in named.items() if path is not None}
    chosen = labels.structures(label_classes, given["label"], label_names) if label_classes and "label" in given else []
    if label_classes and not chosen:
        raise UsageError("--label-classes", "there is no label to choose from", "give --label too")
    if chosen and alone:
        labels.refuse_lost([(given["label"], chosen, None)])
    first = chosen[0] if chosen else None
    volumes = {name: _read(name, path, first) for name, path in given.items()}
    more = structure_pairs(given["seg"], given["label"], chosen) if "seg" in given else {}
    if more:
        volumes["seg"] = more[chosen[0].name][0]
    if "lr" in given and real(given["lr"]) == real(given["hr"]):
        warning = "is the very image that the SR was made of: PSNR and SSIM say nothing of a super-resolution"
        volumes["hr"] = replace(volumes["hr"], warnings=(*volumes["hr"].warnings, warning))
    result = evaluate_pair(**volumes, structures=more, subject=images.stem(given["sr"]) if subject == "" else subject)
    if chosen:
        result["label_classes"] = {c.name: sorted(c.values) for c in chosen}
    result = {"files": {name: recorded(path) for name, path in given.items()}} | result
    if keep is not None:
        keep(result)
    if png is not None:
        draw_errors(png, given, result)
    return result


def draw_errors(png: str | os.PathLike, files: Mapping[str, Path], result: Mapping[str, Any]) -> None:
    """A picture of where SR (and baseline, or scan) of a pair of files differ from the reference, see ``error_map``."""
    from fastsrgan.pictures.error_map import error_map

    hr = images.load(files["hr"])
    other = files.get("baseline", files.get("lr"))
    shown = None if other is None else onto_grid(images.load(other), hr, notes=[])
    words = captions(result)
    name = "baseline" if result.get("baselines", {}).get("image", "as given") == "as given" else "spline"
    error_map(png, onto_grid(images.load(files["sr"]), hr, notes=[]), hr, shown, name, (words["sr"], words["spline"]))


def structure_pairs(seg: Path, label: Path, chosen: Sequence[labels.Structure]) -> dict[str, tuple[Volume, Volume]]:
    """Name -> segmentation and label of each of several structures, 1 inside; empty where there are not several.

    A segmentation that holds values of theirs alone is a map of them, also where it holds only one.
    """
    known = frozenset().union(*(one.values for one in chosen)) if len(chosen) > 1 else frozenset()
    return {one.name: (_read("seg", seg, one, known), _read("label", label, one)) for one in chosen if known}


def _beside(sr: Path) -> Path | None:
    """The doubt that ``infer`` wrote with a result; one that the result's record does not name is another's."""
    if not sr.name:
        return None
    told = read_json(sr.with_name(f"{images.stem(sr).removesuffix('_sr')}.json"))
    outputs = mapping(mapping(told.get(RECORD, told)).get("outputs"))
    for own, other in (("_sr.", "_doubt."), ("_desc-sr_", "_desc-doubt_")):
        if sr.name.count(own) == 1 and (there := sr.with_name(sr.name.replace(own, other))).is_file():
            if "doubt" in outputs or not outputs:
                return there
            log.info("%s: the record of %s does not name it, not used", there, sr.name)
    return None


def _read(name: str, path: Path, chosen: labels.Structure | None, known: frozenset[int] = frozenset()) -> Volume:
    """One of the files of a pair. A segmentation that is a map of several values, or of ``known`` ones alone, is cut
    down to the structure too."""
    if name == "mask":
        return any_image.load_mask(path, None)
    if name == "label":
        return images.load_label(path, classes=chosen.values if chosen else None)
    volume = images.load(path)
    if name not in ("seg", "baseline_seg"):
        return volume
    values = np.unique(volume.data)
    if known and np.count_nonzero(values) == 1:
        volume = replace(volume, warnings=(*volume.warnings, _one_alone(float(values[values != 0][0]), known)))
    several = np.count_nonzero(values) > 1 or (bool(known) and set(values[values != 0].tolist()) <= known)
    if np.array_equal(values, np.rint(values)) and several:
        labels.refuse_many([] if chosen else values.astype(int).tolist(), path)
        data = np.isin(volume.data, sorted(chosen.values)) if chosen else volume.data
        return Volume(data.astype(np.uint8), volume.affine, volume.warnings, volume.meta)
    return volume


def _one_alone(value: float, known: frozenset[int]) -> str:
    """Of a segmentation of one value, where several structures are asked for: what it is taken for may be wrong."""
    taken = "counts as that structure" if value in known else "is none of the label's values, and is compared with all"
    return f"its only value, {value:g}, {taken}; of a result of one structure choose that one alone (--label-classes)"


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation and count of every figure over the results that have it, by dotted path."""
    columns: dict[str, list[float]] = {}
    for result in results:
        for name, value in flat(result).items():
            columns.setdefault(name, []).append(value)
    return {name: moments(values) for name, values in columns.items()}


def moments(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and count."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def flat(result: dict[str, Any]) -> dict[str, float]:
    """Every number of a result of ``evaluate_pair`` by its dotted path."""
    found: dict[str, float] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}.{key}")
            elif isinstance(value, (int, float)):
                found[f"{prefix}.{key}"] = float(value)

    for section in SECTIONS:
        walk(result.get(section, {}), section)
    return found


def _note_scale(image: np.ndarray, hr: np.ndarray, name: str, notes: list[str]) -> None:
    means = float(np.mean(image, dtype=np.float64)), float(np.mean(hr, dtype=np.float64))
    small, large = sorted(map(abs, means))
    if means[0] * means[1] <= 0 or large > SCALE_FACTOR * small:
        notes.append(f"{name}: mean intensity {means[0]:.4g}, the reference's {means[1]:.4g}: are the units the same?")


def _difference(result: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """result - other for every number that both hold, in the same tree."""
    gain: dict[str, Any] = {}
    for key in result.keys() & other.keys():
        a, b = result[key], other[key]
        if isinstance(a, dict):
            gain[key] = _difference(a, b)
        elif not FIGURES[key].of_label:
            gain[key] = None if a is None or b is None else a - b
    return {key: gain[key] for key in result if key in gain}
