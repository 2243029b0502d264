"""The weights of an image: those that are named, or the model of the package that was made for images like it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastsrgan.core.places import recorded
from fastsrgan.errors import ModelError, UsageError
from fastsrgan.evaluate.plausibility import Look, choose, own_dice
from fastsrgan.model import purpose as purposes
from fastsrgan.model import weights as weight_files
from fastsrgan.model.networks import Generator
from fastsrgan.model.purpose import MODELS, Purpose

log = logging.getLogger("fastsrgan")

AUTO = "auto"
PathLike = str | os.PathLike


@dataclass(frozen=True)
class Model:
    """Weights that are loaded: one file, or several whose results are averaged.

    facts : what a record says of the files
    apart : what the light says where they were made for different images
    dice : on the Test subjects of their own training, the lowest of several; None where the files do not say it
    """

    generators: tuple[Generator, ...]
    facts: dict[str, Any]
    purpose: Purpose
    apart: str = ""
    dice: float | None = None


class ModelChoice:
    """What ``--weights`` stands for; None and "auto" choose for each image. A file named auto comes first.

    Raises UsageError, ModelError for what cannot be used.
    """

    def __init__(self, weights: PathLike | Sequence[PathLike] | None) -> None:
        sources = [AUTO] if weights is None else [weights] if isinstance(weights, (str, os.PathLike)) else list(weights)
        chosen = [source for source in sources if str(source) == AUTO and not weight_files.is_meant(source)]
        if chosen and len(sources) > 1:
            raise UsageError("weights", "auto chooses one model, it is averaged with none", "name the models")
        self.by_name = {name: load_weights([weight_files.shipped(name)]) for name in MODELS} if chosen else {}
        self.named = None if chosen else load_weights(sources)
        self._introduced: set[str] = set()
        if self.named and all(str(source) in MODELS for source in sources):
            log.info("weights: %s (%s)", ", ".join(map(str, sources)), self.named.purpose.line())
        elif self.named and self.named.purpose == Purpose():
            log.info("weights: %s: %s", ", ".join(map(str, sources)), self.named.purpose.line())

    @property
    def mask_classes(self) -> int:
        """Of all of them."""
        return (self.named or next(iter(self.by_name.values()))).generators[0].spec.mask_classes

    @property
    def facts(self) -> dict[str, Any]:
        """For a summary."""
        if self.named:
            return self.named.facts
        return {"auto": {name: model.facts["sha256"] for name, model in self.by_name.items()}}

    def of(self, look: Look) -> tuple[Model, str, str]:
        """The model of an image; where it was chosen, its name and why."""
        if self.named:
            return self.named, "", ""
        name, why = choose(look)
        return self.by_name[name], name, why

    def introduce(self, name: str) -> None:
        """Say once what a model that was chosen segments and was made for."""
        if name not in self._introduced:
            self._introduced.add(name)
            log.info("weights: %s (%s)", name, self.by_name[name].purpose.line())

    def made(self, record: Mapping[str, Any], look: Callable[[], Look]) -> bool:
        """Whether a result was made with what its image would get now; ``look`` looks at the image, where the record
        does not hold what was seen. Raises KeyError for a record without weights."""
        if self.named:
            wanted = self.named
        else:
            told = record.get("plausibility")
            seen = Look.of(told.get("scan") if isinstance(told, Mapping) else None)
            wanted = self.of(seen or look())[0]
        return bool(record["weights"]["sha256"] == wanted.facts["sha256"])


def load_weights(sources: Sequence[PathLike]) -> Model:
    """The files, each any that ``fastsrgan.load_generator`` takes. Raises UsageError without any, ModelError."""
    if not sources:
        raise UsageError("weights", "none given", "a weight file, or leave it out for a model of the package")
    facts = [weight_files.info(source) for source in sources]
    models = [
        {"path": (path := weight_files.recorded_as(source)), "sha256": fact["sha256"], "spec": fact["generator"]}
        | ({} if (file := recorded(fact["file"])) == path else {"file": file})
        | ({"structures": found} if (found := (fact["card"] or {}).get("structures")) else {})
        for source, fact in zip(sources, facts, strict=True)
    ]
    generators = tuple(weight_files.load_generator(source) for source in sources)
    classes = {generator.spec.mask_classes for generator in generators}
    if len(classes) > 1:
        reason = f"of {' and '.join(map(str, sorted(classes)))} mask classes cannot be averaged"
        raise ModelError("weights", reason, "name models of the same classes")
    made_for = [Purpose.of(fact["made_for"]) for fact in facts]
    purpose, dice = purposes.common(made_for), own_dice([fact["card"] for fact in facts])
    if len(models) == 1:
        return Model(generators, models[0], purpose, dice=dice)
    if any(one.get("structures") != models[0].get("structures") for one in models):
        raise ModelError("weights", "of other structures cannot be averaged", "name models of the same structures")
    together = hashlib.sha256("".join(one["sha256"] for one in models).encode()).hexdigest()
    apart = purposes.averaged_apart(list(map(purposes.file_called, models)), made_for)
    return Model(generators, {"sha256": together, "averaged": models}, purpose, apart, dice)
