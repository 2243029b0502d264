"""BIDS in, BIDS out: the images of a dataset through a model into a derivatives dataset, and its evaluation.

For sub-01/anat/sub-01_T1w.nii.gz the derivatives hold ``sub-01_desc-sr_T1w`` (the image),
``sub-01_desc-cortexT1w_dseg`` (the segmentation, with a table of its labels) and, where asked for,
``sub-01_desc-cortexT1w_probseg``; with mask classes, as of several structures, ``sub-01_desc-maskT1w_dseg``, all of
them in one image with a table of their names. The suffix of the source is part of
``desc``, since segmentations of a T1w and of a T2w image would otherwise share one name.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import shutil
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fastsrgan._version import __version__
from fastsrgan.core.files import (
    FolderLock,
    LockedFolder,
    ResultLock,
    atomic_write,
    left_as_found,
    mapping,
    output_folder,
    read_json,
    real,
    write_json,
)
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.ranks import ALONE, Ranks
from fastsrgan.errors import InputError, UsageError, counted
from fastsrgan.evaluate.choice import ModelChoice
from fastsrgan.evaluate.cohort import AS_IT_IS, Choice, Item, evaluate_items, low_resolution
from fastsrgan.evaluate.pair import Keep
from fastsrgan.infer.files import STATUSES, SomeFailed, failure, infer_files
from fastsrgan.infer.image import look_at
from fastsrgan.infer.settings import InferSettings, takes_options
from fastsrgan.io import nifti as images
from fastsrgan.io.bids import (
    DESCRIPTION,
    RECORD,
    SUFFIXES,
    BidsImage,
    check_derivatives,
    description,
    find_bids,
    is_own,
    parse,
    sidecar,
    stated,
)
from fastsrgan.io.image_list import Image
from fastsrgan.model.purpose import Purpose, mask_names

log = logging.getLogger("fastsrgan")

STAGE = ".fastsrgan"  # in the derivatives: results on their way to their names
# Without a slash at the end: the BIDS validator compares names of folders that have none.
IGNORED = (STAGE, "figures", "*.html")  # the last are pages of `fastsrgan report`
LINK = "raw"  # short name of the source dataset
README = (
    "Super-resolution and segmentation by fastsrgan. desc-sr: the image on a finer grid; desc-cortex: the structure "
    "that the model was trained to segment. Each JSON names the source and holds weights, settings and versions.\n"
)


@takes_options(files=True)
def infer_bids(
    dataset: str | os.PathLike,
    out_dir: str | os.PathLike,
    weights: Any = None,
    *,
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    suffixes: Sequence[str] = SUFFIXES,
    desc: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    ranks: Ranks = ALONE,
    progress: Progress = QUIET,
    **options: Any,
) -> dict[str, Any]:
    """Apply a model to the anatomical images of a BIDS dataset and write a derivatives dataset.

    Parameters
    ----------
    dataset : root of the dataset
    out_dir : of the derivatives; an existing dataset of another kind is refused
    participants, sessions, suffixes : which images; none: all
    desc : of images that are derivatives themselves, such as "preproc"
    overwrite, resume : what to do with derivatives that are there: replace them, or leave those images out
    weights, ranks, progress, options : of ``infer_files``

    Returns the summary of ``infer_files`` with the names in the dataset. Raises what that raises, and SomeFailed after
    every other image is done and in its place; InputError for a dataset that cannot be used.
    """
    root, out, settings = Path(dataset), Path(out_dir), InferSettings.of(options)
    listed = find_bids(root, participants, sessions, suffixes, desc)
    said = read_json(out / DESCRIPTION)
    if real(out) == real(root) or (said and said.get("DatasetType") != "derivative"):
        raise UsageError(out, "is a dataset of its own", "give the derivatives their own folder")
    done = [image for image in listed if (out / image.derived("sr")).exists()]
    if done and not (overwrite or resume):
        reason = f"{len(done)} of {len(listed)} derivatives exist and are kept, the first is {done[0].derived('sr')}"
        raise UsageError(out, reason, "--overwrite, --resume or another folder")
    if done and not overwrite:
        _check_same(out, done, ModelChoice(weights), settings.placed())
    todo = listed if overwrite else [image for image in listed if image not in done]
    items = [{"input": str(i.path), "stem": images.stem(i.path), "status": "skipped"} for i in listed if i not in todo]
    with left_as_found([out]), contextlib.ExitStack() as held:
        stage = output_folder(out) / _stage(out, ranks, held)
        summary: dict[str, Any] = {"out_dir": str(out), "items": []}
        if todo:
            try:
                paths = [image.path for image in todo]
                # What a killed run left on the stage is good if it was made with these settings; else it says so.
                how: dict[str, Any] = {"overwrite": overwrite, "resume": not overwrite}
                summary = infer_files(paths, stage, weights, **how, ranks=ranks, progress=progress, **options)
            except SomeFailed as error:
                summary = error.summary
            except InputError as error:
                if len(listed) == 1 or len(todo) > 1:
                    raise
                item = {"input": str(todo[0].path), "stem": images.stem(todo[0].path), "status": "failed"}
                summary["items"] = [failure(item, error)]
        by_path = {str(image.path): image for image in todo}
        for item in summary["items"]:
            if item["status"] in ("done", "skipped"):
                try:
                    moved = _place(item, by_path[item["input"]], root, out, overwrite) if ranks.rank == 0 else {}
                    item |= {"status": "done", "outputs": moved}
                except (LockedFolder, UsageError) as error:  # another call has it: nothing to go on with
                    for path in map(Path, item["outputs"].values()):
                        path.unlink(missing_ok=True)
                    item |= failure({"status": "failed", "outputs": {}}, error)
        summary["items"] = sorted([*items, *summary["items"]], key=lambda item: item["input"])
        counts = Counter(item["status"] for item in summary["items"])
        summary |= {"out_dir": str(out)} | {status: counts[status] for status in STATUSES}
        if ranks.rank == 0:
            _finish(root, out, stage)
        if summary["failed"]:  # the stage and its summary file are gone
            bad = ", ".join(item["stem"] for item in summary["items"] if item["status"] == "failed")
            reason = f"{summary['failed']} of {counted(len(summary['items']), 'volume')} failed: {bad}"
            raise SomeFailed(out, reason, "see the errors above", summary)
        return summary


def _stage(out: Path, ranks: Ranks, held: contextlib.ExitStack) -> str:
    """The folder of this call in the derivatives, locked until ``held`` is closed: the first that no other call uses,
    as those of other participants do. What a killed call left in it is gone on with."""
    names, chosen = (f"{STAGE}-{n}" if n > 1 else STAGE for n in itertools.count(1)), ""
    while not ranks.rank and not chosen:
        name = next(names)
        try:
            held.callback(FolderLock(out / name, elsewhere=True).release)
        except LockedFolder:
            continue
        chosen = name
    return str(ranks.gather(chosen)[0])


def _check_same(out: Path, done: Sequence[BidsImage], models: ModelChoice, settings: InferSettings) -> None:
    """Raise UsageError where derivatives were made of another image, or with other weights or settings."""
    for image in done:
        target = sidecar(out / image.derived("sr"))
        record = mapping(read_json(target).get(RECORD))
        seen = functools.partial(look_at, Image(image.path, image.path.name), settings)
        same = "sha256" in mapping(record.get("weights")) and models.made(record, seen)
        differing = ["weights"] * (not same)
        differing += ["image"] * (mapping(record.get("input")).get("sha256") != images.sha256(image.path))
        differing += settings.differing(mapping(record.get("asked")))
        if differing:
            reason = f"was made with another {', '.join(differing)}"
            raise UsageError(target, reason, "--overwrite replaces it, or choose another folder")


def _place(item: dict[str, Any], image: BidsImage, root: Path, out: Path, replace: bool) -> dict[str, str]:
    """Move one image's results to their names, sidecars beside them; the SR image, which stands for all, comes last.

    Raises ResourceError where another call does so at this moment; UsageError where one did, unless told to replace.
    """
    sr = out / image.derived("sr")
    sr.parent.mkdir(parents=True, exist_ok=True)
    with ResultLock(sidecar(sr)):
        if sr.exists() and not replace:
            raise UsageError(sr, "was written by another call meanwhile and is kept", "--resume, or another folder")
        return _moved(item, image, root, out)


def _moved(item: dict[str, Any], image: BidsImage, root: Path, out: Path) -> dict[str, str]:
    staged = {kind: Path(path) for kind, path in item["outputs"].items()}
    record = read_json(staged["json"])
    source = f"bids:{LINK}:{image.path.relative_to(root).as_posix()}"
    common: dict[str, Any] = {"Sources": [source], "SpatialReference": "orig"}
    # A raw image has its skull unless its own JSON says otherwise.
    stripped = bool(stated(image.path, "SkullStripped")[0])
    structures = Purpose.of(record.get("made_for")).structures or ((1, "structure"),)
    structure = ", ".join(name for _, name in structures)
    several = ", ".join(name for _, name in mask_names(record["weights"]))
    told_mask = f"Segmentation of {several}" if several else "Likeliest mask class"
    told_doubt = "Standard deviation that the error of the super-resolution image is taken to have"
    told_residual = "The image minus the super-resolution image acquired again"
    cortex, head = f"cortex{image.suffix}", {"SkullStripped": stripped}
    what: dict[str, tuple[PurePosixPath, dict[str, Any]]] = {
        "seg": (image.derived(cortex, "dseg"), {"Description": f"Segmentation of {structure}"}),
        "prob": (image.derived(cortex, "probseg"), {"Description": f"Probability of {structure}"}),
        "mask": (image.derived(f"mask{image.suffix}", "dseg"), {"Description": told_mask}),
        "doubt": (image.derived("doubt"), {"Description": told_doubt, **head}),
        "residual": (image.derived("residual"), {"Description": told_residual, **head}),
        "sr": (image.derived("sr"), {"Description": "Super-resolution image", **head, RECORD: record}),
    }
    figure = out / image.folder.parent / "figures" / image.derived("sr", end=".png").name
    of_record = sidecar(out / what["sr"][0])
    targets = {kind: out / name for kind, (name, _) in what.items()} | {"png": figure, "json": of_record}
    named = {kind: os.path.relpath(target, of_record.parent) for kind, target in targets.items() if kind in staged}
    record["outputs"] = named  # they stood for the files of the stage
    placed = {}
    for kind, (name, meta) in what.items():
        target = out / name
        if kind not in staged:  # that of a result that is replaced would be taken for one of the new
            for stale in (target, sidecar(target), sidecar(target).with_suffix(".tsv")):
                stale.unlink(missing_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(sidecar(target), common | meta)
        if name.name.endswith("_dseg.nii.gz"):
            known = structures if kind == "seg" else mask_names(record["weights"])
            _write_labels(sidecar(target).with_suffix(".tsv"), known, staged[kind])
        os.replace(staged[kind], target)
        placed[kind] = str(target)
    if "png" not in staged:
        figure.unlink(missing_ok=True)
    else:
        figure.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged["png"], figure)
        placed["png"] = str(figure)
    staged["json"].unlink(missing_ok=True)
    return placed


def _write_labels(path: Path, known: Sequence[tuple[int, str]], image: Path) -> None:
    """index and name of each value of a segmentation; of classes without a name their numbers."""
    values = () if known else range(1, int(images.load_label(image).data.max()) + 1)
    names = ((0, "background"), *(known or ((value, f"class {value}") for value in values)))
    with atomic_write(path) as temporary:
        lines = ["index\tname", *(f"{index}\t{name}" for index, name in names)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf8")


def _finish(root: Path, out: Path, stage: Path) -> None:
    """What the dataset says of itself; the stage goes when nothing is left on it."""
    raw = os.path.relpath(real(root), real(out))
    write_json(out / DESCRIPTION, description("fastsrgan derivatives", __version__, {LINK: Path(raw).as_posix()}))
    if not (out / "README").exists():
        with atomic_write(out / "README") as temporary:
            temporary.write_text(README, encoding="utf8")
    _ignore(out / ".bidsignore")
    if not any(stage.glob("*.nii*")):
        shutil.rmtree(stage, ignore_errors=True)
    for fault in check_derivatives(out):
        log.warning("%s: %s", out, fault)


def _ignore(path: Path) -> None:
    """Lines for a validator to pass over what is no BIDS; those that are there are kept."""
    there = path.read_text(encoding="utf8", errors="surrogateescape").splitlines() if path.exists() else []
    missing = [line for line in IGNORED if line not in there]
    if missing:
        with atomic_write(path) as temporary:
            temporary.write_text("\n".join([*there, *missing]) + "\n", encoding="utf8", errors="surrogateescape")


def evaluate_bids(
    derivatives: str | os.PathLike,
    truth: str | os.PathLike,
    *,
    png: str | os.PathLike | None = None,
    choice: Choice = AS_IT_IS,
    keep: Keep | None = None,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Evaluate what ``infer_bids`` made against a dataset of the same names.

    The truth of sub-01_desc-sr_T1w is sub-01_T1w of that dataset; its label sub-01_dseg or sub-01_desc-X_dseg there or
    in one of its ``derivatives/``. The source that the sidecar names makes the baselines. Returns and raises as
    ``evaluate.cohort.evaluate_items``.
    """
    out, root = Path(derivatives), Path(truth)
    if not root.is_dir():
        raise InputError(root, "is no folder", "evaluate --bids DERIVATIVES DATASET")
    if is_own(root) and not is_own(out):
        reason = "holds results of fastsrgan, and is named where the truth is"
        raise InputError(root, reason, "first the results, then the truth: evaluate --bids DERIVATIVES DATASET")
    # A result, this one or another, is no truth, wherever it lies.
    own = {real(made) for made in (root / "derivatives").glob("*") if is_own(made)} | {real(out)}
    items = [_item(image, root, len(choice.classes) > 1, own) for image in find_bids(out, desc="sr")]
    left = _without_result(root, items)
    return evaluate_items(out, items, png=png, choice=choice, keep=keep, progress=progress, left=left, truth=root)


def _without_result(root: Path, items: Sequence[Item]) -> list[str]:
    """Images of a dataset, of the suffixes that were restored, of which there is no result."""
    used = {real(item.files["hr"]) for item in items if "hr" in item.files}
    kinds = {item.subject.rpartition("_")[2] for item in items}
    found = map(parse, sorted([*root.glob("sub-*/anat/*"), *root.glob("sub-*/ses-*/anat/*")]))
    lone = [image for image in found if image and image.suffix in kinds and "desc" not in dict(image.entities)]
    return [i.path.relative_to(root).as_posix() for i in lone if real(i.path) not in used]


def _item(image: BidsImage, root: Path, several: bool, own: Container[Path]) -> Item:
    kept = "_".join(f"{key}-{value}" for key, value in image.entities if key != "desc")
    subject = f"{kept}_{image.suffix}"
    files = {"sr": image.path}
    names = [f"{subject}{end}" for end in (".nii.gz", ".nii")]
    hr = next((p for name in names if (p := root / image.folder / name).exists()), None)
    if hr is None:
        return Item(subject, files, fault=f"no {image.folder / names[0]} in {root}")
    files["hr"] = hr
    patterns = [f"{kept}_dseg.nii*", f"{kept}_desc-*{image.suffix}_dseg.nii*", f"{kept}_desc-*_dseg.nii*"]
    datasets = [root, *sorted((root / "derivatives").glob("*"))]
    places = [dataset / image.folder for dataset in datasets if real(dataset) not in own]
    label = next((p for place in places for pattern in patterns for p in sorted(place.glob(pattern))), None)
    seg, mask = (image.path.with_name(image.derived(f"{n}{image.suffix}", "dseg").name) for n in ("cortex", "mask"))
    seg = mask if several and mask.exists() else seg  # the segmentation is the first structure alone
    if label is not None:
        files |= {"label": label} | ({"seg": seg} if seg.exists() else {})
    low, unused = low_resolution(read_json(sidecar(image.path)).get(RECORD, {}))
    return Item(subject, files | ({} if low is None else {"lr": low}), segmented=seg.exists(), unused=unused)
