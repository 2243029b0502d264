"""What a folder holds: results of ``infer``, scores of ``evaluate``, studies, the demo, a training run.

Folders are looked through with all below them, as ``infer`` keeps the sub-folders of what it was given, and BIDS
derivatives are taken by their sidecars. Files are told by what they hold, not by their names. Such a file may be a
stranger's, and the page is passed on: a result's images are looked for in the folder of its record alone, the input
elsewhere too, where only an image of the recorded checksum is shown (``stage.load_images``), the truth where it is
named like an image.
"""

from __future__ import annotations

import codecs
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsrgan.core.files import is_special, mapping, read_json, real, walk_files
from fastsrgan.errors import InputError, UsageError, some
from fastsrgan.io import nifti as images
from fastsrgan.io import tables as table
from fastsrgan.io.bids import RECORD, parse
from fastsrgan.io.image_list import image_folder, is_original

log = logging.getLogger("fastsrgan")

KINDS = ("sr", "seg", "doubt", "mask")
NAMED = 3  # damaged files that are told by name
HINT = "a folder that `fastsrgan infer`, `job-model` or `train` wrote"
# What other parts rely on, where it is there at all; what a file has of another kind is passed over.
PARTS = {"warnings": list, "asked": dict, "provenance": dict}
SCORES = {"files": dict, "notes": list, "segmentation": dict, "gain": dict, "baseline": dict}
STUDY = {"rows": list, "fit": list}


@dataclass
class Result:
    """One super-resolved image: its record and where that lies, its files (sr, seg, doubt, mask, input, hr, label) and
    its scores.

    probable : whether ``seg`` is stored as a probability, as by the original
    unseen : what could not be shown, by kind of image, and why; of the last `viewer.load_images`
    """

    stem: str
    record: dict[str, Any]
    files: dict[str, Path]
    scores: dict[str, Any] | None = None
    folder: Path = field(default_factory=Path)
    probable: bool = False
    unseen: list[tuple[str, str]] = field(default_factory=list)

    @property
    def lost(self) -> bool:
        """Whether an image that the record names as made is among them."""
        return any(isinstance(self.record["outputs"].get(kind), str) for kind, _ in self.unseen)


@dataclass
class Found:
    """Everything of one page or cohort."""

    folder: Path
    title: str
    results: list[Result] = field(default_factory=list)
    run: Path | None = None
    demo: dict[str, Any] | None = None
    studies: list[dict[str, Any]] = field(default_factory=list)


def find(
    path: str | os.PathLike, scores: str | os.PathLike | None = None, studies: Sequence[str | os.PathLike] = ()
) -> Found:
    """Look into a folder of results, a demo, a training run, or at one result's JSON, which one of its images stands
    for too.

    ``scores`` is the file that ``evaluate --json`` wrote; without it, the folder's own are taken. ``studies`` are JSON
    files of ``study`` beside those of the folder.
    Damaged files of a folder are passed over with a warning. Raises InputError where there is nothing to report and for
    files that are none of these, UsageError for scores of other images.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(path, "no such file or folder", "a folder of results, a run, or one result's .json")
    if images.is_image(path) and not path.is_dir():
        path = _record_of(path)
    folder = path if path.is_dir() else path.parent
    found = Found(folder, real(path).name if path.is_dir() else path.stem)
    names = [path] if path.is_file() else _json_files(folder)
    documents = _documents(names)
    damaged = [p for p in names if p not in documents and not _is_empty(p)]
    if path.is_dir() and (folder / "log.jsonl").is_file():
        found.run = folder
    demo = documents.get(folder / "demo.json") if path.is_dir() else None
    if demo is not None and isinstance(demo.get("scores"), dict) and is_scores({"definitions": {}} | demo["scores"]):
        _demo(found, demo)
    else:
        found.results = [_result(p, d, folder) for p, d in documents.items() if is_record(d)]
        derived = {p: d[RECORD] for p, d in documents.items() if is_record(mapping(d.get(RECORD)))}
        found.results += [_derivative(p, record, folder) for p, record in derived.items()]
        found.results += [_original(p, d, folder) for p, d in documents.items() if is_original(d)]
        found.results.sort(key=lambda result: result.stem)
    given = _documents([Path(scores)]) if scores is not None else {}
    if scores is not None and not given and not _is_empty(Path(scores)):
        raise InputError(scores, "is no JSON object", "the file that `fastsrgan evaluate --json` wrote")
    more = _documents(map(Path, studies))
    for name in set(map(Path, studies)) - {p for p, d in more.items() if is_study(d)}:
        raise InputError(name, "holds no study", "the .json that `fastsrgan study` wrote")
    found.studies = [sound(d, STUDY) for d in (documents | more).values() if is_study(d)]
    if scores is not None and not any(map(is_scores, given.values())):
        raise InputError(scores, "holds no scores", "the file that `fastsrgan evaluate --json` wrote")
    for where, document in (given or documents).items():
        if is_scores(document):
            _assign(found.results, document, where, strict=bool(given))
    if not found.results and found.run is None and not found.studies:
        raise InputError(path, f"holds no result, run or study{_of_damage(damaged, path)}", HINT)
    for name in damaged:
        log.warning("%s: is %s, left out", name, _wrong_with(name))
    return found


def _record_of(image: Path) -> Path:
    """The record beside an image of a result. Raises InputError where none names it."""
    stem = images.stem(image)
    own = [image.with_name(f"{name}.json") for name in (stem.rpartition("_")[0], stem)]
    for path in [*own, *sorted(image.parent.glob("*.json"))]:
        document = read_json(path)
        made = mapping(document.get("outputs")) if is_record(document) or is_original(document) else {}
        of_sidecar = path == own[1] and is_record(mapping(document.get(RECORD)))
        if of_sidecar or image.name in {Path(str(name)).name for name in made.values()}:
            return path
    reason = "is an image, and no record beside it names it"
    raise InputError(image, reason, "the folder or the STEM.json that `fastsrgan infer` or `job-model` wrote")


def _json_files(folder: Path) -> list[Path]:
    """JSON files of a folder and, where it is no run or demo, of all below it but stores."""
    own = [p for p in sorted(folder.glob("*.json")) if p.exists()]
    if (folder / "log.jsonl").is_file() or (folder / "demo.json").is_file():
        return own
    below = [p for p in walk_files(folder) if p.suffix == ".json" and p.parent != folder and p.is_file()]
    return own + [p for p in below if p.name != "zarr.json" and not _in_other(p, folder)]


def _in_other(path: Path, folder: Path) -> bool:
    """Whether a file below a folder is part of a store or of a training run there."""
    between = [parent for parent in path.parents if parent != folder and folder in parent.parents]
    return any((p / "zarr.json").is_file() or (p / "log.jsonl").is_file() for p in between)


def _is_empty(path: Path) -> bool:
    """Whether a file is a JSON object with nothing in it, which ``read_json`` does not tell from damage."""
    if is_special(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(1000).removeprefix(codecs.BOM_UTF8).translate(None, b" \t\r\n") == b"{}"
    except OSError:
        return False


def _of_damage(damaged: Sequence[Path], path: Path) -> str:
    if not damaged:
        return ""
    if path in damaged:
        return f": it is {_wrong_with(path)}"
    return f"; {_wrong_with(*damaged)}: {some([p.name for p in damaged], NAMED)}"


def _wrong_with(*paths: Path) -> str:
    """Why ``read_json`` makes nothing of some files."""
    open_ = all(os.access(path, os.R_OK) for path in paths)
    return "damaged or no JSON object" if open_ else "damaged or closed by its permissions"


def is_record(document: Any) -> bool:
    """Whether this is what ``infer`` writes beside a result."""
    parts = [document.get(key) for key in ("input", "outputs", "weights")]
    return all(isinstance(part, dict) for part in parts) and isinstance(parts[1].get("sr"), str)


def is_scores(document: Any) -> bool:
    """Whether this is what ``evaluate --json`` writes, of a pair or of a table."""
    return isinstance(document.get("definitions"), dict) and (
        isinstance(document.get("image"), dict) or isinstance(document.get("rows"), list)
    )


def is_study(document: Any) -> bool:
    """Whether this is what ``study`` writes."""
    return isinstance(document.get("study"), str)


def sound(document: dict[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """A document without the entries that are of another kind than they should be."""
    return {key: value for key, value in document.items() if isinstance(value, kinds.get(key, object))}


def sound_scores(scores: dict[str, Any]) -> dict[str, Any]:
    """The same of scores, whose figures lie in regions."""
    scores = sound(scores, SCORES)
    return scores | {"image": {name: region for name, region in scores["image"].items() if isinstance(region, dict)}}


def _documents(paths: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """The JSON objects among some files; others are passed over."""
    found = {}
    for path in paths:
        if not path.exists():
            raise InputError(path, "no such file", "check the path")
        if value := read_json(path):
            found[path] = value
    return found


def _result(path: Path, record: dict[str, Any], root: Path) -> Result:
    files: dict[str, Path] = {}
    for kind in KINDS:
        name = record["outputs"].get(kind)
        if isinstance(name, str) and (there := _first(_near(name, path.parent))):
            files[kind] = there
    source = record["input"].get("path")
    if isinstance(source, str):
        beside = _near(source, path.parent, path.parent.parent)  # since folders move
        if there := _first([*beside, Path(source)]):
            files["input"] = there
    stem = path.relative_to(root).with_suffix("").as_posix()
    return Result(stem, sound(record, PARTS), files, folder=path.parent)


def _original(path: Path, record: dict[str, Any], root: Path) -> Result:
    """A result of ``job-model``, which lies two folders below its image, as if ``infer`` had made it."""
    made_with, outputs, made = record["made_with"], record["outputs"], mapping(record.get("report"))
    weights = {"path": "weights of job-model", "sha256": made_with.get("weights")}
    kinds = {"sr": outputs["SR"], "seg": outputs.get("Cortex"), "mask": outputs.get("Mask")}
    source = {"path": str(image_folder(path) / Path(record["image"]).name), "sha256": record.get("sha256")}
    parts: dict[str, Any] = {"input": source, "weights": weights, "outputs": kinds}
    parts |= made | {key: record[key] for key in ("warnings", "provenance") if key in record}
    result = _result(path, parts, root)
    result.probable = True
    result.stem = f"{path.parent.relative_to(root).as_posix()}/{images.stem(record['image'])}".removeprefix("./")
    return result


def _derivative(path: Path, record: dict[str, Any], root: Path) -> Result:
    """A result of ``infer --bids``: the images lie under their BIDS names beside the sidecar."""
    result = _result(path, record, root)
    sr = next((p for p in (path.with_suffix(".nii.gz"), path.with_suffix(".nii")) if p.is_file()), None)
    image = None if sr is None else parse(sr)
    if sr is not None and image is not None:
        seg = sr.with_name(image.derived(f"cortex{image.suffix}", "dseg").name)
        doubt = sr.with_name(image.derived("doubt").name)
        mask = sr.with_name(image.derived(f"mask{image.suffix}", "dseg").name)
        there = {"seg": seg, "doubt": doubt, "mask": mask}
        result.files |= {"sr": sr} | {kind: path for kind, path in there.items() if path.is_file()}
    return result


def _near(name: str, *folders: Path) -> list[Path]:
    """A recorded path's file, if it lies in one of the folders now."""
    own = Path(name).name
    return [folder / own for folder in folders] if own not in ("", "..") else []


def _first(paths: Sequence[Path]) -> Path | None:
    return next((path for path in paths if os.path.exists(path) and path.name), None)


def _assign(results: list[Result], scores: dict[str, Any], where: Path, strict: bool) -> None:
    """Give scores to the results they are of, by the name of the image they compare."""
    rows = scores["rows"] if isinstance(scores.get("rows"), list) else [scores]
    rows = [sound_scores(row) for row in rows if isinstance(row, dict) and isinstance(row.get("image"), dict)]
    matched = 0
    for result in results:
        own = result.files.get("sr", result.folder / Path(result.record["outputs"]["sr"]).name)
        mine = [row for row in rows if _of(row, own)]
        mine = [row for row in mine if row.get("subject") == result.stem] if len(mine) > 1 else mine
        if not mine and len(rows) == len(results) == 1 and "files" not in rows[0]:
            mine = rows
        if len(mine) > 1:
            raise UsageError(where, f"scores {own.name} {len(mine)} times", "leave one, or name another with --scores")
        if mine:
            if result.scores is not None:
                raise UsageError(where, f"scores {own.name} a second time", "choose one file with --scores")
            matched += 1
            result.scores = {"definitions": scores["definitions"]} | mine[0]
            _truth(result, mine[0].get("files") or {}, where.parent)
    if strict and not matched:
        raise UsageError(where, "scores none of these results", "evaluate the images of this folder")


def _of(row: dict[str, Any], sr: Path) -> bool:
    named = row.get("files", {}).get("sr")
    if not isinstance(named, str):
        return False
    try:
        if os.path.realpath(named) == os.path.realpath(sr):
            return True
    except ValueError:  # letters that no path has
        return False
    return Path(named).name == sr.name and not os.path.exists(named)


def _truth(result: Result, files: dict[str, Any], folder: Path) -> None:
    for kind in ("hr", "label"):
        name = files.get(kind)
        places = (Path(name), folder / name) if isinstance(name, str) else ()
        if there := next((p for p in places if images.is_image(p) and os.path.isfile(p)), None):
            result.files[kind] = there


def _demo(found: Found, demo: dict[str, Any]) -> None:
    """The demo's test subject, with its truth from the demo's cohort, and the demo's run."""
    folder, found.demo = found.folder, demo
    if (folder / "run" / "log.jsonl").is_file():
        found.run = folder / "run"
    for path, record in _documents(sorted((folder / "out").glob("*.json"))).items():
        if is_record(record):
            result = _result(path, record, folder / "out")
            result.scores = sound_scores(demo["scores"])
            found.results.append(result)
    if len(found.results) != 1:
        raise InputError(folder, f"its demo holds {len(found.results)} results", "run `fastsrgan demo --overwrite`")
    cohort = folder / "cohort" / "cohort.csv"
    tests = [row for row in table.read_table(cohort) if row.base == "Test"] if cohort.is_file() else []
    if tests:
        truth = {"hr": tests[0].image, "label": tests[0].label}
        found.results[0].files |= {kind: p for kind, p in truth.items() if p is not None and images.is_image(p)}
