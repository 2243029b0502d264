"""Many subjects against their truth: a table, or a folder of results beside a folder of truths; CSV and summary.

Every form ends in the same dict: ``rows`` (what ``evaluate.evaluate_files`` says of each subject), ``failed`` and
``summary`` (mean, sample standard deviation and count of every figure by its dotted path).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsrgan.core.files import output_folder, read_json, real, walk_files
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.errors import FastsrganError, InputError, UsageError, counted, none_done, some
from fastsrgan.evaluate.figures import definitions
from fastsrgan.evaluate.metrics import CALIBRATION
from fastsrgan.evaluate.pair import Keep, draw_errors, evaluate_files, flat, summarise
from fastsrgan.io import labels
from fastsrgan.io import nifti as images
from fastsrgan.io import tables as table
from fastsrgan.io.bids import SUFFIXES
from fastsrgan.io.image_list import image_folder, is_original
from fastsrgan.io.nifti_voxels import pointer_of
from fastsrgan.io.output_place import SCORED, check_place

log = logging.getLogger("fastsrgan")

# Column of a table -> argument of ``evaluate_files``.
COLUMNS = {
    "SR_image": "sr",
    "HR_image": "hr",
    "Seg_image": "seg",
    "Label_image": "label",
    "Mask_image": "mask",
    "LR_image": "lr",
    "Baseline_image": "baseline",
    "Baseline_seg": "baseline_seg",
}
CLASSES = "Label_classes"  # column with the choice of `labels.structure` of a row
REQUIRED = ("SR_image", "HR_image")
# Endings of a truth folder's files, the first that exists is taken. STEM is that of the result STEM_sr.nii.gz.
TRUTH = ("", "_hr", "_HR")
LABEL = ("_label", "_seg", "_dseg", "_gm")
MASK = ("_mask",)
CHANGED, GONE, CLOSED = "was changed since", "is not there", "may not be read"  # why an input makes no baseline
_LOW = re.compile(r"_(lr|LR)$")
_MODALITY = re.compile(rf"_({'|'.join(SUFFIXES)})$")


@dataclass(frozen=True)
class Item:
    """One subject: its name, the files as arguments of ``evaluate_files``, and the line of the table, if there is one.

    ``fault`` is set where the files could not be found; ``classes`` where it says itself what of its label is scored;
    ``segmented`` where the result has a segmentation, whether there is a label to score it by or not; ``unused`` : the
    input that the result's record names, where it cannot make a baseline, and why (``CHANGED``, ``GONE``, ``CLOSED``).
    """

    subject: str
    files: dict[str, Path]
    line: int | None = None
    fault: str | None = None
    classes: tuple[str, ...] = ()
    segmented: bool = False
    unused: tuple[str, str] | None = None


@dataclass(frozen=True)
class Choice:
    """Which values of the labels are scored, where an item does not say so itself; see ``evaluate_files``."""

    classes: Sequence[str] = ()
    names: str | os.PathLike | None = None


AS_IT_IS = Choice()


def evaluate_table(
    csv_path: str | os.PathLike,
    *,
    png: str | os.PathLike | None = None,
    choice: Choice = AS_IT_IS,
    keep: Keep | None = None,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Evaluate every row of a table and sum up the cohort.

    The table has the columns ``SR_image`` and ``HR_image`` and any of ``Seg_image``, ``Label_image``, ``Mask_image``,
    ``LR_image``, ``Baseline_image``, ``Baseline_seg``, ``Label_classes``; cells of the latter may be empty. Relative
    paths start at the table's folder. ``png`` is a folder for pictures (``draw_errors``), before which ``keep`` is
    called with the result.

    Raises InputError with every fault of the table at once, or when no row could be evaluated. Returns as
    ``evaluate_items``, with ``line`` in each row.
    """
    csv_path = Path(csv_path)
    rows = _read(csv_path)
    subjects = table.subject_ids([files["SR_image"] for _, files, _ in rows])
    items = [
        Item(subject, {COLUMNS[name]: path for name, path in files.items()}, line, classes=classes)
        for (line, files, classes), subject in zip(rows, subjects, strict=True)
    ]
    return evaluate_items(csv_path, items, png=png, choice=choice, keep=keep, progress=progress)


def evaluate_folders(
    results: str | os.PathLike,
    truth: str | os.PathLike,
    *,
    png: str | os.PathLike | None = None,
    choice: Choice = AS_IT_IS,
    keep: Keep | None = None,
    progress: Progress = QUIET,
    beside: str = "",
) -> dict[str, Any]:
    """Evaluate a folder of ``fastsrgan infer`` against a folder of truths, matched by the stem of the files' names.

    For a result ``STEM_sr.nii.gz`` (with ``STEM_seg.nii.gz``) the truth is ``STEM`` or ``STEM_hr``, the label
    ``STEM_label``, ``STEM_seg``, ``STEM_dseg`` or ``STEM_gm``, the mask ``STEM_mask``, with any image ending; ``_lr``
    at the end of STEM is dropped, and ``sub-01_T1w`` or another suffix of BIDS also takes ``sub-01_dseg`` and
    ``sub-01_label-X`` as its label. A segmentation without a label is told.
    Results in subfolders have their truths in the same subfolder, if there is one. The low-resolution image that
    ``STEM.json`` names makes the baselines if it is unchanged, and is the truth where nothing else is. Results of
    ``job-model`` are found by their records; STEM is that of their image, two folders above. A result without truth is
    in ``failed``, truths without a result in a note. Raises InputError when nothing could be evaluated; returns as
    ``evaluate_items``.
    """
    results, truth = Path(results), Path(truth)
    for folder in (results, truth):
        if not folder.is_dir():
            raise InputError(folder, "is no folder", "evaluate RESULTS TRUTH, or --sr and --hr for one pair")
    found = sorted(p for p in _images(walk_files(results)) if images.stem(p).endswith("_sr"))
    if not found and any("desc-sr" in path.name for path in _images(walk_files(results))):
        raise InputError(results, "is a dataset of BIDS derivatives", "fastsrgan evaluate --bids DERIVATIVES DATASET")
    several = len(choice.classes) > 1
    items = [_of_infer(path, results, truth, several) for path in found]
    items += [_of_job_model(path, results, truth, several) for path in _originals(results)]
    if not items and any(path.name.startswith("SR_") for path in _images(walk_files(results))):
        reason = "holds SR_ images without the record of `job-model`, so of what they are is not known"
        raise InputError(results, reason, "list the files in a --table")
    if not items:
        reason = "holds no STEM_sr.nii.gz"
        raise InputError(results, reason, "name an output folder of `fastsrgan infer` or `job-model`")
    left = _without_result(truth, results, items)
    return evaluate_items(
        results, items, png=png, choice=choice, keep=keep, progress=progress, beside=beside, left=left, truth=truth
    )


def _without_result(truth: Path, results: Path, items: Sequence[Item]) -> list[str]:
    """Images of a folder of truths that belong to no result: no label and no mask by their names, used for no subject,
    and no results themselves."""
    used = {real(path) for item in items for path in item.files.values()}
    left = []
    for path in _images(walk_files(truth)):
        there, name = real(path), images.stem(path)
        named_part = name.endswith((*LABEL, *MASK)) or "_label-" in name
        if not named_part and there not in used and real(results) not in there.parents:
            left.append(path.relative_to(truth).as_posix())
    return left


def told_left(left: Sequence[str], where: str | os.PathLike) -> list[str]:
    """A note about truths without a result, if there are any."""
    return [f"{counted(len(left), 'image')} of {where} without a result: {some(left)}"] if left else []


def told_unused(items: Sequence[Item], why: str) -> list[str]:
    """A note about results whose input makes no baseline for this reason, if there are any."""
    found = [(item.subject, item.unused[0]) for item in items if item.unused and item.unused[1] == why]
    if not found:
        return []
    which = f"its input {found[0][1]}" if len(found) == 1 else f"the input of {counted(len(found), 'result')}"
    return [f"{some([subject for subject, _ in found])}: {which} {why}, no baseline"]


def told_shared(items: Sequence[Item]) -> list[str]:
    """A note about each truth that several results of folders were matched with, by name: of one image they may be
    several results, or results of several images that are called alike."""
    matched: dict[str, list[Item]] = {}
    for item in items:
        if item.line is None and "hr" in item.files:
            matched.setdefault(os.path.realpath(item.files["hr"]), []).append(item)
    told = []
    for shared in (group for group in matched.values() if len(group) > 1):
        names = [item.subject for item in shared]
        if all("lr" in one.files for one in shared) and len({real(one.files["lr"]) for one in shared}) == 1:
            continue  # of one image, as with several steps
        way = "if they are of other images, name the folders of truths as those of results"
        told.append(f"{shared[0].files['hr']} is the truth of {len(names)} results: {some(names)}; {way}")
    return told


def _images(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if images.is_image(p) and not p.name.startswith("."))


def _originals(results: Path) -> list[Path]:
    """Records of ``job-model`` below a folder."""
    return [p for p in walk_files(results) if p.suffix == ".json" and is_original(read_json(p))]


def _of_job_model(path: Path, results: Path, truth: Path, several: bool) -> Item:
    """A result of ``job-model``, by its record: Result_with_NAME/patch_P_step_S/ lies beside its image."""
    record, folder = read_json(path), image_folder(path)
    files = {kind: path.with_name(Path(str(name)).name) for kind, name in record["outputs"].items()}
    seg = files.get("Mask") if several and "Mask" in files else files.get("Cortex")
    source = {"input": {"path": folder / Path(record["image"]).name, "sha256": record.get("sha256")}}
    root = Path(os.path.abspath(results))
    below = folder.relative_to(root) if root in (folder, *folder.parents) else Path()
    stem = images.stem(Path(record["image"]))
    return _match(stem, path.parent.relative_to(results) / stem, files["SR"], seg, source, truth, below)


def _of_infer(sr: Path, results: Path, truth: Path, several: bool) -> Item:
    stem, below = images.stem(sr).removesuffix("_sr"), sr.parent.relative_to(results)
    seg = sr.with_name(sr.name.replace("_sr.", "_seg.", 1)) if sr.name.count("_sr.") == 1 else None
    if several and seg is not None and (classes := sr.with_name(sr.name.replace("_sr.", "_mask.", 1))).exists():
        seg = classes  # of a model of several structures: its segmentation is the first alone
    return _match(stem, below / stem, sr, seg, read_json(sr.with_name(f"{stem}.json")), truth, below)


def _match(
    stem: str, subject: Path, sr: Path, seg: Path | None, record: dict[str, Any], truths: Path, below: Path
) -> Item:
    """A result with what belongs to it by the name ``stem`` of its image.

    A cohort that was a tree has its truths in the same tree, in the folder ``below``, or all in one folder.
    """
    truth = truths / below if (truths / below).is_dir() else truths
    known = {images.stem(p): p for p in _images(truth.iterdir())}
    bases = list(dict.fromkeys([stem, _LOW.sub("", stem)]))
    files = {"sr": sr}
    low, unused = low_resolution(record)
    names = {"hr": [b + e for b in bases for e in TRUTH], "mask": [b + e for b in bases for e in MASK]}
    names["label"] = [b + e for b in bases for e in LABEL]
    for base in bases:
        plain = _MODALITY.sub("", base)
        if plain != base:
            names["label"] += [f"{plain}_dseg", *(n for n in known if n.startswith(f"{plain}_label-"))]
            names["mask"].append(f"{plain}_mask")
    for what, candidates in names.items():
        there = [known[name] for name in candidates if name in known and known[name] != sr]
        # Its own input is the truth of a result where no other image is, as of one that was segmented as it is.
        hit = next((path for path in there if low is None or real(path) != real(low)), there[0] if there else None)
        files |= {} if hit is None else {what: hit}
    segmented = seg is not None and seg.exists()
    if seg is not None and segmented and "label" in files:
        files["seg"] = seg
    if low is not None:
        files["lr"] = low
    wanted = ", ".join(names["hr"])
    fault = None if "hr" in files else f"no truth in {truth}: looked for {wanted}"
    return Item(subject.as_posix(), files, fault=fault, segmented=segmented, unused=unused)


def low_resolution(record: dict[str, Any]) -> tuple[Path | None, tuple[str, str] | None]:
    """The image that a result's record names as its input; where it is gone, closed or was changed since None, and
    ``Item.unused``."""
    try:
        path, digest = Path(record["input"]["path"]), record["input"]["sha256"]
    except (KeyError, TypeError):
        return None, None
    if not os.path.isfile(path):  # also DICOM folders, whose grid may be another after conversion
        return None, (str(path), GONE)
    if not os.access(path, os.R_OK):
        return None, (str(path), CLOSED)
    if images.sha256(path) != digest:
        return None, (str(path), CHANGED)
    return path, None


def evaluate_items(
    what: str | os.PathLike,
    items: Sequence[Item],
    *,
    png: str | os.PathLike | None = None,
    choice: Choice = AS_IT_IS,
    keep: Keep | None = None,
    progress: Progress = QUIET,
    beside: str = "",
    left: Sequence[str] = (),
    truth: str | os.PathLike = "the truths",
) -> dict[str, Any]:
    """Evaluate subjects one by one; ``what`` names their source in messages; ``beside``: what they are called
    beside others, with whose notes theirs are told by the caller; ``left``: images of ``truth`` that no result belongs
    to; ``keep`` is called with the result before pictures are drawn.

    Returns ``rows`` (the dicts of ``evaluate_files`` with ``subject``), ``failed`` (subject, error), ``notes`` (those
    of the rows, as ``told_once``, one about ``left``, ``told_shared`` and ``told_unused``), ``without_result``
    (``left``) and ``summary`` {figure: {mean, sd, n}} over the rows, figures named by their dotted path
    (``image.whole.psnr_db``); sd is the sample standard deviation (n - 1), None for one row.

    Raises an error of the kind of the first when no subject could be evaluated, and UsageError, before any work, where
    ``png`` holds a file of a picture's name that is none of
    ``evaluate``'s, or where label classes are chosen and there is no label.
    """
    bare = [item.subject for item in items if item.segmented and "label" not in item.files and not item.fault]
    if bare and not beside:
        log.info("no label was found for the segmentation of %s: no Dice", some(bare))
    if choice.classes and not any("label" in item.files for item in items):
        raise UsageError("--label-classes", f"no label was found for the results in {what}", "leave it out")
    labels.refuse_lost(_chosen(items, choice))
    shared = told_shared(items) + told_unused(items, CHANGED) + told_unused(items, CLOSED)
    for line in () if beside else shared:
        log.warning(line)
    pictures: dict[str, Path] = {}
    if png is not None:
        folder = output_folder(png)
        names = {item.subject: f"{item.subject.replace('/', '_')}.png" for item in items}
        pictures = {subject: check_place(folder / name, (), SCORED) for subject, name in names.items()}
    done: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    faults: list[table.Fault] = []
    reasons: Counter[str] = Counter()
    first: FastsrganError | None = None
    progress.start(f"evaluate {beside}".rstrip(), len(items), "subject")
    for item in items:
        named: dict[str, Any] = {"subject": item.subject} | ({} if item.line is None else {"line": item.line})
        try:
            if item.fault:
                hint = "name it so, or list the files in a --table"
                raise InputError(item.files.get("sr", item.subject), item.fault, hint)
            classes = (item.classes or choice.classes) if "label" in item.files else ()
            more: dict[str, Any] = {"label_classes": classes, "label_names": choice.names}
            done.append(named | evaluate_files(**item.files, **more, subject=None, alone=False))  # type: ignore[arg-type]
        except FastsrganError as error:
            if str(error) not in reasons:
                log.warning("%s%s: %s", "" if item.line is None else f"line {item.line}, ", item.subject, error)
            reasons[str(error)] += 1
            failed.append(named | {"error": str(error)})
            first = first or error
            faults += [] if item.line is None else [(item.line, error)]
        progress.advance(1, subject=item.subject)
    progress.finish()
    for reason, times in reasons.items():
        if times > 1:
            log.warning("%s: the same of %s", reason, counted(times - 1, "more subject"))
    if not done:
        if len(faults) == len(failed):
            raise table.table_error(Path(what), faults)
        raise none_done(first, what, "no subject could be evaluated", failed[0]["error"])
    notes = told_once(done) + told_left(left, truth) + told_unused(items, GONE)
    for line in () if beside else notes:
        log.info(line)
    notes += shared
    meaning = definitions() | {"sd": "sample standard deviation over subjects (n - 1)"}
    meaning |= CALIBRATION if any("doubt" in row for row in done) else {}
    said = {"notes": notes, "without_result": list(left), "definitions": meaning}
    result = {"rows": done, "failed": failed, "summary": summarise(done), **said}
    if keep is not None:
        keep(result)
    if png is not None:
        rows = {row["subject"]: row for row in done}
        drawn = [item for item in items if item.subject in rows]
        progress.start("draw", len(drawn), "picture")
        for item in drawn:
            draw_errors(pictures[item.subject], item.files, rows[item.subject])
            progress.advance(1, subject=item.subject)
        progress.finish()
    return result


def _chosen(items: Sequence[Item], choice: Choice) -> Iterator[tuple[Path, Sequence[labels.Structure], None]]:
    """The labels and what of them is scored; where that cannot be said, it is told with the subject."""
    for item in items:
        with contextlib.suppress(FastsrganError):
            if "label" in item.files and (classes := item.classes or choice.classes):
                yield item.files["label"], labels.structures(classes, item.files["label"], choice.names), None


def told_once(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every kind of note once, after the subjects that it is about: of those that differ in numbers alone, the range of
    each number."""
    about: dict[str, list[tuple[str, list[str]]]] = {}
    for row in rows:
        for note in row["notes"]:
            about.setdefault(table.NUMBER.sub("\0", note), []).append((row["subject"], table.NUMBER.findall(note)))
    lines = []
    for kind, found in about.items():
        subjects = list(dict.fromkeys(subject for subject, _ in found))
        spans = map(table.span, zip(*(numbers for _, numbers in found), strict=True))
        first, *rest = kind.split("\0")
        text = first + "".join(number + part for number, part in zip(spans, rest, strict=True))
        lines.append(f"{some(subjects)}: {text}")
    return lines


def write_csv(path: str | os.PathLike, result: dict[str, Any]) -> None:
    """One line per subject and, for a cohort, one each for mean, sd and n; the first column says which it is.

    ``result`` is that of one pair or of a cohort. Columns: ``kind`` (subject, mean, sd, n), ``subject``, then every
    figure by its dotted path. Cells without a figure are empty. A comparison's (``compare``) figures are those of both
    results and their difference.
    """
    lines: list[dict[str, Any]] = []
    for row in result.get("rows", [result]):
        name = row.get("subject") or images.stem(row["files"]["sr"])
        lines.append({"kind": "subject", "subject": name} | (row["figures"] if "figures" in row else flat(row)))
    for statistic in ("mean", "sd", "n") if "summary" in result else ():
        values = {name: told[statistic] for name, told in result["summary"].items()}
        lines.append({"kind": statistic, "subject": ""} | values)
    table.write_rows(path, lines)


def _read(csv_path: Path) -> list[tuple[int, dict[str, Path], tuple[str, ...]]]:
    """(line, {column: existing path}, label classes) of every row; all faults in one InputError."""
    records = table._records(csv_path, table._text(csv_path), table.delimiter_for(COLUMNS))
    if not records:
        raise InputError(csv_path, "is empty", "its first line names the columns SR_image, HR_image, ...")
    (heading, header), known = records[0], (*COLUMNS, CLASSES)
    faults: list[table.Fault] = [(heading, f"column {name} twice") for name in COLUMNS if header.count(name) > 1]
    lacking = [name for name in REQUIRED if name not in header]
    faults += [(heading, f"no column {name}, {table.instead(name, header, known)}") for name in lacking]
    faults = faults or table.misspelt(heading, header, known)
    if len(records) == 1:
        faults.append((heading, "no row below the header"))
    rows: list[tuple[int, dict[str, Path], tuple[str, ...]]] = []
    lines: dict[tuple[frozenset[tuple[str, Path]], tuple[str, ...]], int] = {}  # of what each row scores
    for line, cells in records[1:] if not faults else []:
        if len(cells) > len(header):
            faults.append((line, table.too_many(cells, header)))
            continue
        values = dict(zip(header, cells, strict=False))
        faults += [(line, f"{name} is empty") for name in REQUIRED if not values.get(name)]
        files = {name: table._locate(values[name], csv_path, None) for name in COLUMNS if values.get(name)}
        lost = {name: pointer_of(path) for name, path in files.items() if not os.path.exists(path)}
        for name, told in lost.items():
            faults.append((line, f"{name} {values[name]}: {told[0] if told else 'no such file'}"))
        if "Seg_image" in files and "Label_image" not in files:
            faults.append((line, "Seg_image without Label_image"))
        classes = tuple(labels.choices(values.get(CLASSES, ""), None))
        twin = lines.setdefault((frozenset(files.items()), classes), line)
        if twin != line:
            faults.append((line, f"the same files as at line {twin}, which would count twice"))
        rows.append((line, files, classes))
    if faults:
        raise table.table_error(csv_path, faults)
    table.tell_unread(csv_path, header, known)
    return rows
