"""The Brain Imaging Data Structure, as far as anatomical images and their derivatives go (BIDS 1.10).

Names, where images lie, what a derivatives dataset must say of itself, and a check of those rules.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastsrgan.core.files import mapping, read_json
from fastsrgan.core.places import recorded
from fastsrgan.errors import InputError, counted, some
from fastsrgan.io import nifti as images
from fastsrgan.io.nifti_voxels import no_such_file

log = logging.getLogger("fastsrgan")

VERSION = "1.10.0"
DESCRIPTION = "dataset_description.json"
SUFFIXES = ("T1w", "T2w", "FLAIR", "PDw", "UNIT1", "T2starw", "T2star")  # images of one contrast, weighted or uniform
NAMED = 5  # images that are left out and told by name
# Entities of anatomical images and of derivatives made from them, in the order that names must have.
ENTITIES = ("sub", "ses", "sample", "task", "tracksys", "acq", "nuc", "voi", "ce", "trc", "stain", "rec", "dir", "run",
            "mod", "echo", "flip", "inv", "mt", "part", "proc", "hemi", "space", "split", "recording", "chunk", "seg",
            "res", "den", "label", "desc")  # fmt: skip
SEGMENTATIONS = ("dseg", "probseg")
# Other images of anatomy, which --suffix takes: of several echoes, flip angles or inversion times, and made of them.
OTHERS = ("PD", "PDT2", "FLASH", "inplaneT1", "inplaneT2", "angio", "defacemask", "VFA", "IRT1", "MP2RAGE", "MPM",
          "MTS", "MTR", "MESE", "MEGRE", "TB1TFL", "MTsat", "MTRmap", "T1map", "T2map", "T2starmap", "R1map", "R2map",
          "R2starmap", "PDmap", "M0map", "MTVmap", "MWFmap", "Chimap", "S0map", "CT")  # fmt: skip
RECORD = "FastsrganRecord"  # key of a sidecar: what `fastsrgan infer` wrote
_NAME = re.compile(r"(?P<entities>sub-[A-Za-z0-9+]+(?:_[a-z]+-[A-Za-z0-9+]+)*)_(?P<suffix>[A-Za-z0-9]+)(?P<end>\..+)")
_IMAGE = (".nii.gz", ".nii")


@dataclass(frozen=True)
class BidsImage:
    """An image of a dataset: its path, its name's entities in order, and the suffix (T1w, dseg, ...)."""

    path: Path
    entities: tuple[tuple[str, str], ...]
    suffix: str

    @property
    def subject(self) -> str:
        """The participant's label, without ``sub-``."""
        return self.entities[0][1]

    @property
    def folder(self) -> PurePosixPath:
        """Its place in a dataset: sub-01/anat or sub-01/ses-1/anat."""
        session = dict(self.entities).get("ses")
        return PurePosixPath(f"sub-{self.subject}", *([f"ses-{session}"] if session else []), "anat")

    def derived(self, desc: str, suffix: str | None = None, end: str = ".nii.gz") -> PurePosixPath:
        """Place and name of what is made from it: the same entities with another ``desc``."""
        kept = [(key, value) for key, value in self.entities if key != "desc"]
        name = "_".join(f"{key}-{value}" for key, value in [*kept, ("desc", desc)])
        return self.folder / f"{name}_{suffix or self.suffix}{end}"


def parse(path: Path) -> BidsImage | None:
    """What a file's name says; None for a name that is not BIDS, or no image's."""
    match = _NAME.fullmatch(path.name)
    if match is None or match["end"] not in _IMAGE:
        return None
    pairs = [part.split("-", 1) for part in match["entities"].split("_")]
    return BidsImage(path, tuple((key, value) for key, value in pairs), match["suffix"])


def find_bids(
    root: str | os.PathLike,
    participants: Sequence[str] = (),
    sessions: Sequence[str] = (),
    suffixes: Sequence[str] = SUFFIXES,
    desc: str | None = None,
) -> list[BidsImage]:
    """The anatomical images of a dataset, sorted by name.

    Parameters
    ----------
    participants, sessions : labels with or without ``sub-`` / ``ses-``; none: all
    suffixes : kinds of images
    desc : of derivatives: only those; None: images without one

    What lies among the anatomical images and is not taken is counted and named in the log.

    Raises InputError for a folder that is no dataset, a participant or session that is not there, or no image.
    """
    root = Path(root)
    if not os.path.lexists(root):
        raise no_such_file(root)
    if not root.is_dir() or not any(root.glob("sub-*/")):
        raise InputError(root, "holds no folder sub-...", "name the root of a BIDS dataset")
    wanted = _labels(root, "participant", "sub-", participants, "sub-*")
    visits = _labels(root, "session", "ses-", sessions, "sub-*/ses-*/")
    found, left = [], []
    for pattern in ("sub-*/anat", "sub-*/ses-*/anat"):
        for path in (path for folder in sorted(root.glob(f"{pattern}/")) for path in sorted(folder.iterdir())):
            if not images.is_image(path) or path.name.startswith("."):
                continue
            if wanted and path.relative_to(root).parts[0].removeprefix("sub-") not in wanted:
                continue
            image = parse(path)
            if desc is None and image is not None and image.suffix in SEGMENTATIONS:
                continue
            if image is None:
                left.append((path, "no BIDS name of a NIfTI image"))
                continue
            if path.parent != root / image.folder:  # its derivatives would be those of another participant or session
                left.append((path, f"lies in {path.parent.relative_to(root).as_posix()}"))
                continue
            if visits and dict(image.entities).get("ses") not in visits:
                continue
            own = dict(image.entities).get("desc")
            if dict(image.entities).get("part", "mag") != "mag":
                left.append((path, f"part {dict(image.entities)['part']}, no magnitude"))
            elif image.suffix not in suffixes:
                left.append((path, f"suffix {image.suffix}"))
            elif own != desc:
                left.append((path, f"--desc {own} takes it" if own else "no desc"))
            else:
                found.append(image)
    places = [f"{front}{below}/" for front in ("sub-*", "sub-*/ses-*") for below in ("", "/anat/*")]
    for path in (path for place in places for folder in root.glob(place) for path in sorted(folder.iterdir())):
        subject = path.relative_to(root).parts[0].removeprefix("sub-")
        if images.is_image(path) and not path.name.startswith(".") and (not wanted or subject in wanted):
            left.append((path, f"in {path.parent.relative_to(root)}"))
    passed = some([f"{path.name} ({why})" for path, why in left], NAMED)
    if not found:
        limits = [f"participants {', '.join(sorted(wanted))}"] * bool(wanted)
        limits += [f"sessions {', '.join(sorted(visits))}"] * bool(visits)
        limits += [f"desc {desc}"] * bool(desc)
        where = f" of {' and '.join(limits)}" if limits else ""
        others = f"; {counted(len(left), 'is', 'are')} not taken: {passed}" if left else ""
        reason = f"no {' or '.join(suffixes)} image{where}{others}"
        raise InputError(root, reason, "they lie in sub-XX/anat or sub-XX/ses-YY/anat")
    if left and desc is None:
        log.info("%s: %s not taken: %s", root, counted(len(left), "image is", "images are"), passed)
    return sorted(found, key=lambda image: str(image.path))


def _labels(root: Path, what: str, front: str, asked: Sequence[str], places: str) -> set[str]:
    """Labels without their front. Raises InputError where a dataset has no folder of one."""
    wanted = {label.removeprefix(front) for label in asked}
    there = {path.name.removeprefix(front) for path in root.glob(places) if path.is_dir()}
    if wanted - there:
        raise InputError(
            root, f"no {what} {', '.join(sorted(wanted - there))}", f"there are {some(sorted(there), 10) or 'none'}"
        )
    return wanted


def description(name: str, version: str, sources: dict[str, str]) -> dict[str, Any]:
    """dataset_description.json of a derivatives dataset; ``sources`` {short name: relative path or URI}."""
    return {
        "Name": name,
        "BIDSVersion": VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "fastsrgan", "Version": version}],
        "SourceDatasets": [{"URL": url} for url in sources.values()],
        "DatasetLinks": sources,
    }


def is_own(dataset: Path) -> bool:
    """Whether fastsrgan made a dataset."""
    makers = read_json(dataset / DESCRIPTION).get("GeneratedBy")
    listed = makers if isinstance(makers, list) else []
    return any(isinstance(one, dict) and one.get("Name") == "fastsrgan" for one in listed)


def sidecar(image: Path) -> Path:
    """The JSON beside an image."""
    return image.with_name(image.name.removesuffix(".gz").removesuffix(".nii") + ".json")


def sidecars(image: Path, end: str = ".json") -> list[Path]:
    """The JSON files that speak of an image: the one beside it, then, in a dataset, those that it inherits from (BIDS,
    "The Inheritance Principle"): of its suffix and of no other entities, from its own folder up to the root. Of a
    segmentation the ``.tsv`` files likewise."""
    found = [image.with_name(f"{images.stem(image)}{end}")]
    above = Path(recorded(image)).parents
    top = next((depth for depth, folder in enumerate(above[:4]) if (folder / DESCRIPTION).is_file()), None)
    entities, _, suffix = images.stem(image).rpartition("_")
    if top is None or not entities.startswith("sub-"):
        return found
    for folder in above[: top + 1]:
        there = [p for p in folder.glob(f"*{suffix}{end}") if p.name != found[0].name]
        parts = {p: p.name.removesuffix(f"{suffix}{end}").rstrip("_").split("_") for p in there}
        parts = {p: part for p, part in parts.items() if part == [""] or set(part) <= set(entities.split("_"))}
        found += sorted(parts, key=lambda p: (-len(p.name), p.name))
    return found


def stated(image: Path, key: str) -> tuple[Any, Path]:
    """What the nearest of an image's sidecars that speaks of ``key`` says, and which; None and the one beside it."""
    files = sidecars(image)
    return next(((said[key], file) for file in files if key in (said := read_json(file))), (None, files[0]))


def check_derivatives(root: str | os.PathLike) -> list[str]:
    """What breaks the rules in a derivatives dataset of anatomical images; empty where nothing does.

    Looked at: dataset_description.json and its required fields; every name's entities, their order and agreement with
    the folders; sidecars with the fields that derivatives must have; sources that exist; the lookup tables of
    segmentations.
    """
    root = Path(root)
    said = read_json(root / DESCRIPTION)
    faults = [f"{DESCRIPTION}: no {key}" for key in ("Name", "BIDSVersion", "GeneratedBy") if not said.get(key)]
    if said.get("DatasetType") != "derivative":
        faults.append(f"{DESCRIPTION}: DatasetType is not derivative")
    makers = said.get("GeneratedBy") or []
    if not isinstance(makers, list) or not all(mapping(by).get("Name") for by in makers):
        faults.append(f"{DESCRIPTION}: GeneratedBy without a Name")
    links = {name: str(link) for name, link in mapping(said.get("DatasetLinks")).items()}
    for path in sorted(root.glob("sub-*/**/*.nii.gz")):
        faults += [f"{path.relative_to(root)}: {fault}" for fault in _image_faults(root, path, links)]
    return faults


def _image_faults(root: Path, path: Path, links: dict[str, str]) -> list[str]:
    image = parse(path)
    if image is None:
        return ["not a BIDS name"]
    keys = [key for key, _ in image.entities]
    faults = [f"unknown entity {key}" for key in keys if key not in ENTITIES]
    if not faults and (sorted(keys, key=ENTITIES.index) != keys or len(set(keys)) < len(keys)):
        faults.append("entities twice or out of order")
    if path.parent != root / image.folder:
        faults.append(f"does not lie in {image.folder}")
    if image.suffix not in (*SUFFIXES, *OTHERS, *SEGMENTATIONS):
        faults.append(f"suffix {image.suffix}")
    meta = read_json(sidecar(path))
    required = ["Sources", "SpatialReference"] + ["SkullStripped"] * (image.suffix not in SEGMENTATIONS)
    faults += [f"its JSON has no {key}" for key in required if key not in meta]
    sources = meta.get("Sources", [])
    sources = [str(uri) for uri in sources] if isinstance(sources, list) else [str(sources)]
    faults += [f"source {uri} is not there" for uri in sources if not _resolves(root, uri, links)]
    if image.suffix == "dseg" and not sidecar(path).with_suffix(".tsv").exists():
        faults.append("no table of its labels beside it")
    return faults


def _resolves(root: Path, uri: str, links: dict[str, str]) -> bool:
    """Whether bids:NAME:PATH leads to a file; links to other machines are taken at their word."""
    match = re.fullmatch(r"bids:([A-Za-z0-9_-]*):(.+)", uri)
    if match is None or (match[1] and match[1] not in links):
        return False
    base = links.get(match[1], ".")
    if "://" in base and not base.startswith("file://"):
        return True
    return os.path.exists(root / base.removeprefix("file://") / match[2])
