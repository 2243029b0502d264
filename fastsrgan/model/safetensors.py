"""Networks in a safetensors file: the only form in which fastsrgan writes weights for itself.

Tensors are named ``generator.<parameter>`` and, where there is one, ``critic.<parameter>`` and ``ema.<parameter>``
(the generator's moving average). The header's metadata holds one entry, ``fastsrgan``: JSON with ``format``, the specs
of ``generator`` and ``critic``, a model ``card`` and ``sha256`` of the whole file, in which its own digits count as
zeros. Shapes are compared with the spec before anything is read, files with that sum before their weights are taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsrgan.core.files import atomic_write, finite, parse_json
from fastsrgan.errors import ModelError
from fastsrgan.model.networks import (
    MAX_FILE,
    Critic,
    CriticSpec,
    Generator,
    GeneratorSpec,
    check_finite,
    check_limits,
    describe,
    dims,
    parameter_shapes,
)

FORMAT = 1
UNKNOWN = "0" * 64  # in the place of the file's own SHA-256 while that is computed
_SUM = re.compile(r"[0-9a-f]{64}")
PARTS = ("generator", "critic", "ema")
MAX_HEADER = 16 * 2**20


@dataclass(frozen=True)
class ModelHeader:
    """What a model file says it holds.

    Attributes
    ----------
    generator, critic : specs; ``critic`` is None where the file holds none
    ema : whether a moving average of the generator is there
    card : free facts: data, recipe, figures
    """

    generator: GeneratorSpec
    critic: CriticSpec | None = None
    ema: bool = False
    card: dict = field(default_factory=dict)


# --- writing ------------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike,
    generator: Generator,
    critic: Critic | None = None,
    *,
    ema: Generator | Mapping[str, Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write networks to one safetensors file, atomically; equal networks give equal bytes.

    Parameters
    ----------
    ema : moving average of the generator, as a network or as parameter name -> tensor
    card : facts about the weights, JSON values

    Raises
    ------
    ResourceError : the folder is missing or read-only, the disk is full
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for part, network in zip(PARTS, (generator, critic, ema), strict=True):
        parameters = dict(network.named_parameters()) if isinstance(network, nn.Module) else network or {}
        for name, value in parameters.items():
            tensors[f"{part}.{name}"] = value.detach().to("cpu", torch.float32).contiguous()
    header = {
        "format": FORMAT,
        "generator": generator.spec.to_dict(),
        "critic": critic.spec.to_dict() if critic is not None else None,
        "card": finite(dict(card or {})),
    }
    from safetensors.torch import save  # here and below: what only computes needs no files

    image = save(tensors, metadata={"fastsrgan": json.dumps(header | {"sha256": UNKNOWN}, sort_keys=True)})
    # The last one of the header: its keys are sorted, and a card may hold anything.
    place = image.rindex(UNKNOWN.encode(), 0, 8 + int.from_bytes(image[:8], "little"))
    digest = hashlib.sha256(image).hexdigest().encode()
    with atomic_write(path) as temporary:
        temporary.write_bytes(image[:place] + digest + image[place + len(digest) :])
    return path


# --- reading ------------------------------------------------------------------------------------------------------


def check_sum(path: str | os.PathLike) -> None:
    """Raise ModelError where a file is not what was written; files without a sum, of earlier versions, are taken."""
    with _opened(path) as file:
        known = parse_json((file.metadata() or {}).get("fastsrgan", "")).get("sha256")
    if not isinstance(known, str) or not _SUM.fullmatch(known):
        return
    with open(path, "rb") as raw:
        head = raw.read(8)
        before, _, behind = raw.read(int.from_bytes(head, "little")).rpartition(known.encode())
        digest = hashlib.sha256(head + before + UNKNOWN.encode() + behind)
        while part := raw.read(2**20):
            digest.update(part)
    if digest.hexdigest() != known:
        hint = "damaged: copy it again; if you changed it, leave sha256 out of its metadata"
        raise ModelError(path, "differs from the SHA-256 that was written into it", hint)


def read_header(path: str | os.PathLike) -> ModelHeader:
    """Specs and card of a model file, every tensor's shape checked against them; no weight is read.

    Raises ModelError when the file is damaged, of a newer format, or not of the architecture it claims.
    """
    with _opened(path) as file:
        return _checked_header(path, file)


def read_parameters(path: str | os.PathLike, part: str) -> tuple[GeneratorSpec | CriticSpec, dict[str, Tensor]]:
    """Spec and float32 parameters of ``part``: "generator", "critic" or "ema".

    Raises ModelError as ``read_header`` and ``check_sum`` do, when the part is absent, or when a weight is NaN or
    infinite.
    """
    with _opened(path) as file:
        header = _checked_header(path, file)
        spec = header.critic if part == "critic" else header.generator
        if spec is None or (part == "ema" and not header.ema):
            raise ModelError(path, f"holds no {part}", "take a file that was saved with both networks")
        parameters = {}
        for name in parameter_shapes(spec):
            # A copy: the tensor of an open file is a view of the mapped file.
            value = file.get_tensor(f"{part}.{name}").to(torch.float32, copy=True)
            check_finite(path, f"{part}.{name}", value)
            parameters[name] = value
    check_sum(path)  # behind what names a layer, which says more
    return spec, parameters


class _opened:
    """A safetensors file whose header is plausible; errors of reading it become ModelError."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def __enter__(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
            if size > MAX_FILE or length > min(size - 8, MAX_HEADER):
                reason = f"damaged: a header of {length} bytes in a file of {size} bytes"
                raise ModelError(self.path, reason, "copy the file again")
            self._file = safe_open(self.path, framework="pt")
            return self._file.__enter__()
        except (SafetensorError, OSError, RecursionError) as error:
            raise _damaged(self.path, error) from error

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from safetensors import SafetensorError

        self._file.__exit__(kind, error, trace)
        if isinstance(error, (SafetensorError, OSError)):
            raise _damaged(self.path, error) from error


def _damaged(path: Path, error: BaseException) -> ModelError:
    text = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return ModelError(path, f"damaged or truncated safetensors file: {text}", "copy the file again")


def _checked_header(path: str | os.PathLike, file: Any) -> ModelHeader:
    text = (file.metadata() or {}).get("fastsrgan")
    if text is None:
        raise ModelError(path, "safetensors, but not of fastsrgan", "`fastsrgan weights import` makes such files")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(path, "its fastsrgan header is no JSON", "copy the file again") from error
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise ModelError(path, "its fastsrgan header has no format number", "copy the file again")
    if header["format"] > FORMAT:
        reason = f"made by a newer fastsrgan, format {header['format']}"
        raise ModelError(path, reason, f"this one reads up to {FORMAT}")
    names = set(file.keys())
    generator = spec_from(GeneratorSpec, path, header.get("generator"))
    critic = spec_from(CriticSpec, path, header["critic"]) if header.get("critic") is not None else None
    ema = any(name.startswith("ema.") for name in names)
    card = header.get("card")
    _check_tensors(path, file, names, "generator", generator)
    for part, spec in (("ema", generator if ema else None), ("critic", critic)):
        if spec is not None:
            _check_tensors(path, file, names, part, spec)
    return ModelHeader(generator, critic, ema, card if isinstance(card, dict) else {})


def spec_from(kind: type, path: str | os.PathLike, values: Any) -> Any:
    """A GeneratorSpec or CriticSpec from the plain values a file holds; ModelError names what does not fit."""
    if not isinstance(values, dict):
        raise ModelError(path, f"its header has no {kind.__name__}", "copy the file again")
    known = {f.name: f for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            raise ModelError(path, f"unknown {kind.__name__} entry {name[:40]!r}", f"one of {', '.join(known)}")
        wanted = type(known[name].default)
        if type(value) is not wanted:
            raise ModelError(path, f"{kind.__name__} entry {name} is {str(value)[:40]!r}", f"a {wanted.__name__}")
    try:
        spec = kind(**values)
    except ModelError as error:
        raise ModelError(path, error.reason, error.hint) from error
    check_limits(path, spec)
    return spec


def _check_tensors(path: Any, file: Any, names: set[str], part: str, spec: GeneratorSpec | CriticSpec) -> None:
    wanted = parameter_shapes(spec)
    for name, shape in wanted.items():
        full = f"{part}.{name}"
        if full not in names:
            raise ModelError(path, f"tensor {full} is missing", f"{describe(spec)} needs it as {dims(shape)}")
        view = file.get_slice(full)
        if tuple(view.get_shape()) != shape:
            came = dims(tuple(view.get_shape()))
            raise ModelError(path, f"tensor {full} is {came}", f"{describe(spec)} needs {dims(shape)}")
        if view.get_dtype() not in ("F32", "F16", "BF16", "F64"):
            raise ModelError(path, f"tensor {full} has type {view.get_dtype()}", "a floating-point type")
    extra = sorted(n for n in names if n.startswith(part + ".") and n[len(part) + 1 :] not in wanted)
    if extra:
        reason = f"tensor {extra[0][:80]!r} belongs to no layer of {describe(spec)}"
        raise ModelError(path, reason, "another architecture, or a damaged file")
