"""Weights from any file a user has: Keras HDF5 of the original, safetensors, or a run of our own training.

Which of them a path is, is read from its content. Pickles are recognised and never opened.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from fastsrgan.core.files import is_special, output_file, url_of
from fastsrgan.core.places import recorded
from fastsrgan.errors import ModelError, UsageError, counted
from fastsrgan.model import checkpoint
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model.networks import NETWORKS, Critic, CriticSpec, Generator, GeneratorSpec, assemble, parameter_shapes
from fastsrgan.model.purpose import MADE_FOR, MODELS, Purpose

log = logging.getLogger("fastsrgan")

HDF5 = b"\x89HDF\r\n\x1a\n"  # first bytes; h5py is loaded for such files only
BEST = "best.safetensors"  # of a run folder: the weights of its best validation
SHIPPED = Path(__file__).parent.parent / "models"
TEMPLATE = "segsrgan-k8-synthetic-heads.safetensors"


DEFAULT = next(iter(MODELS))
LEGACY_NOTE = (
    "residual conditional U-Net: SegSRGAN 2.2.4 subtracted from image and resolution alike and gave three channels;"
    " here it gives two, the image (its first) and the segmentation (its third)"
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib"}


@dataclass(frozen=True)
class _WeightFile:
    """A file that holds weights: ``kind`` is "keras", "safetensors" or "checkpoint"."""

    file: Path
    kind: str


# --- loading ------------------------------------------------------------------------------------------------------


def load_generator(path: str | os.PathLike = DEFAULT, form: str = "fast", *, ema: bool = True) -> Generator:
    """The generator of a weight file, in eval mode on the CPU.

    Parameters
    ----------
    path : Keras HDF5 of the original (any name), safetensors, a snapshot folder of a training, a run folder (its
        ``best.safetensors``, else its newest undamaged snapshot; others: ``of_run``), or the name of a model of the
        package, "adult" or "perinatal"
    form : "fast" or "reference", see fastsrgan.model.layers
    ema : take the moving average of the generator where the file holds one

    Raises
    ------
    ModelError : missing, damaged, a pickle, another architecture, NaN or infinite weights
    """
    source = _resolve(path)
    if source.file != Path(path):
        log.info("%s: weights of %s", path, source.file)
    spec, parameters = _generator_parameters(source, ema)
    return assemble(spec, parameters, form)


def load_critic(path: str | os.PathLike) -> Critic:
    """The critic of a weight file, in eval mode on the CPU; ``path`` as for ``load_generator``.

    Raises ModelError as ``load_generator`` does, and when the file holds no critic.
    """
    source = _resolve(path)
    return assemble(*_reader(source).read_parameters(source.file, "critic"))


def read_spec(path: str | os.PathLike) -> tuple[GeneratorSpec, CriticSpec | None]:
    """Generator and critic specs of a weight file; the critic's is None where there is none. Reads no weight.

    Raises ModelError as ``load_generator`` does.
    """
    header = _header(_resolve(path))
    return header.generator, header.critic


def info(path: str | os.PathLike) -> dict[str, Any]:
    """Everything a weight file says about itself, as JSON values; reads no weight.

    Keys: ``path``, ``file`` (the file inside a folder), ``kind`` ("keras", "safetensors" or "checkpoint"), ``bytes``,
    ``sha256``, ``generator`` and ``critic`` (specs; critic may be None), ``parameters`` and ``critic_parameters``
    (counts), ``ema``, ``card``, ``made_for`` (see ``purpose``), ``notes`` (list of sentences).
    """
    source = _resolve(path)
    header = _header(source)
    return {
        "path": str(path),
        "file": str(source.file),
        "kind": source.kind,
        "bytes": source.file.stat().st_size,
        "sha256": checkpoint.sha256(source.file),
        "generator": header.generator.to_dict(),
        "critic": header.critic.to_dict() if header.critic else None,
        "parameters": _count(header.generator),
        "critic_parameters": _count(header.critic) if header.critic else 0,
        "ema": header.ema,
        "card": header.card,
        "made_for": _purpose(source, header).to_dict(),
        "notes": [LEGACY_NOTE] if source.kind == "keras" and _is_legacy(header.generator) else [],
    }


def of_run(path: str | os.PathLike, which: str) -> Path:
    """The weights of a run folder that ``which`` names: "best", "last" (the newest snapshot) or a number of updates.

    Raises UsageError for a path that is no run folder or another ``which``; ModelError where there are none such.
    """
    run = Path(path)
    if not run.is_dir():
        raise UsageError(path, f"is no run folder, of which {which} could be taken", "leave --checkpoint out")
    if which == "best":
        if not (run / BEST).is_file():
            reason = "holds no best weights: no validation ended yet, or there are no Test subjects"
            raise ModelError(run, reason, "--checkpoint last")
        return run / BEST
    if which == "last":
        return checkpoint.newest(run)
    if not which.isdecimal():
        raise UsageError("--checkpoint", f"{which!r} is not allowed", "best, last or a number of updates")
    found = {int(folder.name.partition("-")[2]): folder for folder in checkpoint.snapshots(run)}
    if int(which) not in found:
        there = ", ".join(map(str, found)) or "none"
        reason = f"holds no snapshot of {counted(int(which), 'update')}"
        raise ModelError(run, reason, f"there are: {there} (--keep-checkpoints)")
    return found[int(which)]


def damaged(run: Path) -> list[str]:
    """What is wrong with the weight files in a run folder, one line each (`fastsrgan.model.safetensors.check_sum`)."""
    return checkpoint.refusals(modelfile.check_sum, ((path,) for path in sorted(run.glob("*.safetensors"))))


def purpose(path: str | os.PathLike) -> Purpose:
    """What weights were made for, by their card; of the package's own models by ``MODELS``.

    Raises ModelError as ``load_generator`` does.
    """
    source = _resolve(path)
    return _purpose(source, _header(source))


def template_weights() -> Path:
    """The weights that know the heads which demo and quick studies make of the template: grey matter (decision 003).

    Raises ModelError where the file is missing.
    """
    path = SHIPPED / TEMPLATE
    if not path.is_file():
        raise ModelError(path, "is missing from the installation", "install fastsrgan again")
    return path


def default_weights() -> Path:
    """The first model of the package; one log line says which and what it was made for.

    Raises ModelError where its file is missing, as in a checkout whose models were removed.
    """
    others = ", ".join(name for name in MODELS if name != DEFAULT)
    log.info("weights: %s (%s); others: %s", DEFAULT, MODELS[DEFAULT].purpose.line(), others)
    return shipped(DEFAULT)


def shipped(name: str) -> Path:
    """The file of a model of the package. Raises ModelError where it is not there."""
    path = SHIPPED / MODELS[name].file
    if not path.is_file():
        raise ModelError(path, f"the shipped model {name!r} is missing", "reinstall fastsrgan, or name a weight file")
    return path


def recorded_as(source: str | os.PathLike) -> str:
    """What a record calls weights: a model of the package by its name, any other file or folder by its whole path."""
    return str(source) if str(source) in MODELS and not is_meant(source) else recorded(source)


# --- saving and conversion ----------------------------------------------------------------------------------------


def save_generator(
    path: str | os.PathLike,
    generator: Generator,
    critic: Critic | None = None,
    card: Mapping[str, Any] | None = None,
    *,
    ema: Generator | Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a safetensors file, atomically; what it holds and raises: ``fastsrgan.model.safetensors.write``."""
    return modelfile.write(path, generator, critic, ema=ema, card=card)


def import_keras(source: str | os.PathLike, target: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Convert a Keras HDF5 file of the original to safetensors: generator and, where there is one, critic.

    Raises ModelError when ``source`` cannot be used, ResourceError when ``target`` exists or cannot be written.
    """
    found = _resolve(source)
    if found.kind != "keras":
        raise ModelError(source, "no Keras HDF5 file", "it can be used with --weights as it is")
    target = _free(target, overwrite, found.file)
    generator = load_generator(source)
    critic = load_critic(source) if read_spec(source)[1] else None
    card = {"converted_from": found.file.name, "converted_sha256": checkpoint.sha256(found.file)}
    if _is_legacy(generator.spec):
        card["note"] = LEGACY_NOTE
    return modelfile.write(target, generator, critic, card=card)


def export_keras(
    source: str | os.PathLike, target: str | os.PathLike, *, ema: bool = True, overwrite: bool = False
) -> Path:
    """Convert weights without a scaled head to the HDF5 layout of the original's snapshots, which its programs read.

    A critic for patches other than 36 to 64 has another depth than the original's; it is written all the same, and a
    log line says so. Raises as ``import_keras`` does.
    """
    from fastsrgan.model import keras as keras_h5

    found = _resolve(source)
    target = _free(target, overwrite, found.file)
    networks: list[tuple[Any, Any]] = [_generator_parameters(found, ema)]
    critic = _header(found).critic
    if critic is not None:
        networks.append(_reader(found).read_parameters(found.file, "critic"))
        if critic.depth != keras_h5.CRITIC_DEPTH:
            log.warning("%s: the critic has %d layers, the original only reads 5", target, critic.depth)
    return keras_h5.write(target, *networks)


def _free(target: str | os.PathLike, overwrite: bool, source: Path) -> Path:
    """A place for a weight file. Raises UsageError where something stands that is not to be replaced: without
    ``overwrite`` anything, else the source and what is no weight file."""
    path = output_file(target)
    if path.exists() and not overwrite:
        raise UsageError(path, "exists already and is kept", "--overwrite, or another name")
    if path.exists() and path.samefile(source):
        raise UsageError(path, "is an input and would be overwritten", "name another file")
    try:
        known = not path.exists() or path.stat().st_size == 0 or bool(_sniff(path))
    except ModelError:
        known = False
    if not known:
        raise UsageError(path, "exists already and is no weight file, it is kept", "name another file, or remove it")
    return path


# --- sources ------------------------------------------------------------------------------------------------------


def _purpose(source: _WeightFile, header: modelfile.ModelHeader) -> Purpose:
    for model in MODELS.values():
        if source.file == SHIPPED / model.file:
            return model.purpose
    return Purpose.of(header.card.get(MADE_FOR))


def _header(source: _WeightFile) -> modelfile.ModelHeader:
    if source.kind != "keras":
        return modelfile.read_header(source.file)
    return modelfile.ModelHeader(*_reader(source).read_specs(source.file))


def _reader(source: _WeightFile) -> ModuleType:
    """What reads the parameters of such a file."""
    if source.kind != "keras":
        return modelfile
    from fastsrgan.model import keras

    return keras


def _generator_parameters(source: _WeightFile, ema: bool) -> tuple[GeneratorSpec, dict[str, Tensor]]:
    part = "ema" if source.kind != "keras" and ema and _header(source).ema else "generator"
    spec, parameters = _reader(source).read_parameters(source.file, part)
    if source.kind == "keras" and _is_legacy(spec):
        log.warning("%s: %s", source.file, LEGACY_NOTE)
    return spec, parameters


def _is_legacy(spec: GeneratorSpec) -> bool:
    return NETWORKS[spec.network].legacy and spec.conditional and spec.residual


def _count(spec: GeneratorSpec | CriticSpec) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(spec).values())


def is_meant(path: str | os.PathLike) -> bool:
    """Whether a name that the package knows as well means what is at that path: a file, or a folder with weights. A
    folder of adults' scans may be named adult."""
    if not os.path.isdir(path):
        return os.path.lexists(path)
    run = Path(path)
    return (run / checkpoint.MANIFEST).is_file() or (run / BEST).is_file() or bool(checkpoint.folders(run))


def _resolve(path: str | os.PathLike) -> _WeightFile:
    path = shipped(str(path)) if str(path) in MODELS and not is_meant(path) else Path(path)
    if os.path.isdir(path):
        lone = (path / checkpoint.MANIFEST).is_file()
        if not lone and (path / BEST).is_file():
            return _WeightFile(path / BEST, "safetensors")
        snapshot = path if lone else checkpoint.newest(path)
        return _WeightFile(checkpoint.verified(snapshot, checkpoint.MODEL), "checkpoint")
    return _WeightFile(path, _sniff(path))


def _sniff(path: Path) -> str:
    """The kind of a weight file from its first bytes."""
    if is_special(path):
        raise ModelError(path, "is not a regular file", "a weight file or a run folder")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except (OSError, ValueError) as error:
        if url := url_of(path):
            raise ModelError(url, "is a URL, weights are read from paths", "download the file first") from error
        if isinstance(error, FileNotFoundError):
            hint = f"a weight file, a run folder, or a model of the package: {', '.join(MODELS)}"
            raise ModelError(path, "no such file or directory", hint) from error
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ModelError(path, reason, "check the path and its permissions") from error
    if head.startswith(HDF5):
        return "keras"
    if head[8:9] == b"{":
        return "safetensors"
    if path.suffix.lower() in _PICKLES or head[:4] == b"PK\x03\x04" or _PICKLE.match(head):
        reason = "looks like a pickle or zip archive, which can run code and is never opened"
        raise ModelError(path, reason, "convert it to safetensors, or use the original's HDF5 file")
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(path, "a Git LFS pointer, not the file itself", "git lfs pull")
    reason = "empty" if not head else "neither Keras HDF5 nor safetensors"
    raise ModelError(path, reason, "the original's weights, safetensors of fastsrgan, or a run folder")
