"""Weights of the original SegSRGAN: the HDF5 files that Keras' ``save_weights`` writes (only h5py user).

Root groups: empty input layers, one generator (``G``, then ``_unet``, ``_cond``, ``_nn_residual`` as they apply)
and at most one discriminator (``DX`` or ``DX_cond``). A kernel is GROUP/LAYER/kernel:0 with axes (x, y, z, in, out); in
torch it is (out, in, x, y, z). Architecture and sizes are read from these names and shapes.

A file is not trusted: only hard links are followed, only three fixed levels deep; attributes are never read; storage
outside the file is refused; every declared shape is compared with the network's before memory is taken for it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from h5py import h5d, h5g, h5l, h5o, h5s, h5t, h5z
from torch import Tensor

from fastsrgan.core.files import atomic_write
from fastsrgan.errors import ModelError, counted
from fastsrgan.model.networks import (
    MAX_FILE,
    NETWORKS,
    CriticSpec,
    GeneratorSpec,
    check_finite,
    check_limits,
    describe,
    dims,
    parameter_shapes,
)

KERAS_VERSION = "2.2.4"
CRITIC_DEPTH = 5  # of the original, for every patch size
MAX_LINKS = 256  # of one group; the largest here has 68
KERAS_FILE = "a file written by Keras' save_weights"
MAX_SLACK = 16 * 2**20  # bytes of a file beside its weights: names, attributes, free space
MAX_INFLATION = 20  # declared bytes over file bytes; random weights do not compress
KNOWN_FILTERS = (h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32)

_CRITIC = re.compile(r"DX(_cond)?")
_LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file"}
_TO_TORCH, _TO_KERAS = (4, 3, 0, 1, 2), (2, 3, 4, 1, 0)

Spec = GeneratorSpec | CriticSpec
Layers = dict[str, dict[str, h5d.DatasetID]]


# --- names --------------------------------------------------------------------------------------------------------


def group_name(spec: Spec) -> str:
    """The root group that holds a network."""
    if isinstance(spec, CriticSpec):
        return "DX" + "_cond" * spec.conditional
    kind = NETWORKS[spec.network].keras
    if kind is None:
        reason = f"the original has no network {spec.network!r}"
        raise ModelError("network", reason, "safetensors files hold every network")
    return f"G{kind}" + "_cond" * spec.conditional + "_nn_residual" * (not spec.residual)


def _kinds() -> dict[str, str]:
    """What the original appends to a generator's name -> network."""
    return {entry.keras: name for name, entry in NETWORKS.items() if entry.keras is not None}


def _generator_group(name: str) -> re.Match[str] | None:
    kinds = "|".join(map(re.escape, sorted(_kinds(), key=len, reverse=True)))
    return re.fullmatch(f"G({kinds})(_cond)?(_nn_residual)?", name)


def input_names(spec: GeneratorSpec) -> list[str]:
    """The empty root groups of Keras' input layers."""
    return ["input_im_gen", *(["input_res_gen"] if spec.conditional else [])]


def weight_names(spec: Spec) -> dict[str, str]:
    """Our parameter name -> the original's weight name (LAYER/LEAF), in the original's order of creation."""
    prefix = group_name(spec)
    if isinstance(spec, CriticSpec):
        names = {}
        for i in range(spec.depth):
            names[f"convs.{i}"] = f"{prefix}_conv_dis_{i + 1}/kernel:0"
            names[f"biases.{i}"] = f"{prefix}_conv_dis_{i + 1}/bias:0"
        return {**names, "decision": "dis_decision/kernel:0"}
    names = {}
    for stage, label in NETWORKS[spec.network].stages.items():
        layers = [(stage, f"{stage}_norm", label, f"isnorm_{label}")]
        if stage.startswith("blocks."):
            layers = [
                (f"{stage}.conv_{s}", f"{stage}.norm_{s}", f"{label}_conv_{s}", f"{label}_isnorm_{s}") for s in "ab"
            ]
        for conv, norm, keras_conv, keras_norm in layers:
            names[conv] = f"{prefix}_gen_{keras_conv}/kernel:0"
            names |= {f"{norm}.{leaf}": f"{prefix}_gen_{keras_norm}/{leaf}:0" for leaf in ("scale", "shift")}
    return {**names, "head": f"{prefix}_gen_1conv/kernel:0"}


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Network:
    spec: Spec
    datasets: dict[str, h5d.DatasetID]  # by our parameter name


def read_specs(path: str | os.PathLike) -> tuple[GeneratorSpec, CriticSpec | None]:
    """Generator and critic of a Keras file, all names and shapes checked; no weight is read.

    Raises ModelError when the file is damaged, is no SegSRGAN weight file, or reaches outside itself.
    """
    with _opened(path) as networks:
        critic = networks.get("critic")
        return networks["generator"].spec, critic.spec if critic else None  # type: ignore[return-value]


def read_parameters(path: str | os.PathLike, part: str) -> tuple[Spec, dict[str, Tensor]]:
    """Spec and float32 parameters (torch names and axis order) of ``part``: "generator" or "critic".

    Raises ModelError as ``read_specs`` does, when the part is absent, or when a weight is NaN or infinite.
    """
    with _opened(path) as networks:
        if part not in networks:
            raise ModelError(path, f"holds no {part}", "take a file that was saved with both networks")
        network = networks[part]
        parameters = {}
        for name, dataset in network.datasets.items():
            array = np.empty(dataset.shape, np.float32)
            dataset.read(h5s.ALL, h5s.ALL, array)
            if array.ndim == 5:
                array = np.ascontiguousarray(array.transpose(_TO_TORCH))
            parameters[name] = torch.from_numpy(array)
            check_finite(path, weight_names(network.spec)[name], parameters[name])
    return network.spec, parameters


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[dict[str, _Network]]:
    """The networks of a file, checked; errors of the HDF5 library become ModelError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise ModelError(path, f"{size / 2**30:.0f} GiB is no weight file", f"at most {MAX_FILE >> 30} GiB")
        _check_driver(path)
        with h5py.File(path, "r", locking=False) as file:
            networks = _networks(path, file.id)
            _check_bytes(path, size, networks)
            yield networks
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        text = str(error).strip("'\"").splitlines() or [type(error).__name__]
        raise ModelError(path, f"damaged or truncated HDF5 file: {text[0][:160]}", "copy the file again") from error


def _check_driver(path: Path) -> None:
    """No file driver is named, as one that is a single file never does: the library would read that driver's block
    before anything else can be looked at, into memory of the size that damage says (found: 1.8 GB for 232 kB)."""
    with path.open("rb") as file:
        head = file.read(60)
    version, address_bytes = head[8:9], head[13:14]
    if version in (b"\0", b"\1") and address_bytes == b"\x08":  # of superblocks that have such an address
        address = head[48 + 4 * version[0] :][:8]
        if len(address) == 8 and address != b"\xff" * 8:
            raise ModelError(path, "damaged HDF5 file: it is said to need a driver of its own", "copy the file again")


def _networks(path: Path, file: h5py.h5f.FileID) -> dict[str, _Network]:
    root = h5g.open(file, b"/")
    groups: dict[str, Layers] = {}
    for name, item in _children(path, root, "/"):
        if not isinstance(item, h5g.GroupID):
            raise ModelError(path, f"{name[:80]!r} stands at the root", KERAS_FILE)
        groups[name] = _layers(path, item, name)
    generators = [g for g in groups if _generator_group(g)]
    critics = [g for g in groups if _CRITIC.fullmatch(g)]
    others = [g for g in groups if g not in generators + critics and groups[g]]
    if len(generators) != 1 or len(critics) > 1 or others:
        found = ", ".join(repr(g[:40]) for g in list(groups)[:6]) or "none"
        hint = "a file of the original's snapshots: Keras' save_weights, one generator and at most one discriminator"
        raise ModelError(path, f"no SegSRGAN weight file, its groups are {found}", hint)
    generator = _generator_spec(path, generators[0], groups[generators[0]])
    networks = {"generator": _match(path, generator, groups[generators[0]])}
    if critics:
        critic = _critic_spec(path, critics[0], groups[critics[0]], generator)
        networks["critic"] = _match(path, critic, groups[critics[0]])
    return networks


def _children(path: Path, group: h5g.GroupID, where: str) -> Iterator[tuple[str, object]]:
    """Name and opened object of every link of a group, hard links only."""
    count = group.get_num_objs()
    if count > MAX_LINKS:
        raise ModelError(path, f"{where[:80]!r} has {count} entries", f"at most {MAX_LINKS}")
    for raw in list(group):
        name = raw.decode("utf8", "replace")
        kind = group.links.get_info(raw).type
        if kind != h5l.TYPE_HARD:
            word = _LINKS.get(kind, "a special link")
            raise ModelError(path, f"{name[:80]!r} in {where[:80]!r} is {word}", "weights must lie in the file itself")
        yield name, h5o.open(group, raw)


def _layers(path: Path, group: h5g.GroupID, where: str) -> Layers:
    layers: Layers = {}
    for layer, item in _children(path, group, where):
        if not isinstance(item, h5g.GroupID):
            raise ModelError(path, f"{layer[:80]!r} in {where[:80]!r} is no layer", KERAS_FILE)
        layers[layer] = {}
        for leaf, dataset in _children(path, item, f"{where}/{layer}"):
            if not isinstance(dataset, h5d.DatasetID):
                raise ModelError(path, f"{leaf[:80]!r} in {layer[:80]!r} is no array", KERAS_FILE)
            layers[layer][leaf] = dataset
    return layers


def _find(path: Path, layers: Layers, name: str) -> h5d.DatasetID:
    """The dataset LAYER/LEAF; a network built twice in one TensorFlow process has ``_1`` behind its layer names."""
    layer, leaf = name.split("/")
    named = [n for n in layers if n == layer] or [n for n in layers if re.fullmatch(re.escape(layer) + r"_\d{1,3}", n)]
    if len(named) != 1 or leaf not in layers[named[0]]:
        raise ModelError(path, f"layer {name} is missing", "another architecture, or a damaged file")
    return layers[named[0]][leaf]


def _kernel_axes(path: Path, layers: Layers, name: str, size: int) -> tuple[int, int]:
    """(in, out) of the convolution whose shape tells a network's sizes."""
    shape = _find(path, layers, name).shape
    if len(shape) != 5 or shape[:3] != (size,) * 3 or min(shape) < 1:
        raise ModelError(path, f"layer {name} is {dims(shape)}", f"{size} x {size} x {size} x inputs x outputs")
    return shape[3], shape[4]


def _generator_spec(path: Path, group: str, layers: Layers) -> GeneratorSpec:
    kind, cond, plain = _generator_group(group).groups()  # type: ignore[union-attr]
    inputs, kernel = _kernel_axes(path, layers, f"{group}_gen_conv1/kernel:0", 7)
    outputs = _kernel_axes(path, layers, f"{group}_gen_1conv/kernel:0", 7)[1]
    if inputs != 1 + bool(cond):
        reason = f"layer {group}_gen_conv1 has {counted(inputs, 'input')}"
        raise ModelError(path, reason, f"group {group} has {1 + bool(cond)}")
    if outputs < 2:
        raise ModelError(path, f"layer {group}_gen_1conv has {outputs} outputs", "at least 2: image and segmentation")
    spec = GeneratorSpec(_kinds()[kind], kernel, plain is None, bool(cond), outputs - 2)
    check_limits(path, spec)
    return spec


def _critic_spec(path: Path, group: str, layers: Layers, generator: GeneratorSpec) -> CriticSpec:
    depth = sum(re.fullmatch(rf"{group}_conv_dis_\d(_\d{{1,3}})?", layer) is not None for layer in layers)
    kernel = _kernel_axes(path, layers, f"{group}_conv_dis_1/kernel:0", 4)[1]
    if not 3 <= depth <= 9:
        raise ModelError(path, f"{group} has {depth} convolutions", f"{CRITIC_DEPTH}, as the original has")
    spec = CriticSpec(kernel, 2 ** (depth + 1), generator.out_channels, group.endswith("_cond"))
    check_limits(path, spec)
    return spec


def _match(path: Path, spec: Spec, layers: Layers) -> _Network:
    """Pair every parameter of ``spec`` with its dataset, after comparing shapes and looking at how it is stored."""
    names, shapes = weight_names(spec), parameter_shapes(spec)
    datasets = {}
    for parameter, name in names.items():
        dataset, wanted = _find(path, layers, name), shapes[parameter]
        wanted = tuple(wanted[a] for a in _TO_KERAS) if len(wanted) == 5 else wanted
        if dataset.shape != wanted:
            raise ModelError(path, f"layer {name} is {dims(dataset.shape)}", f"{describe(spec)} needs {dims(wanted)}")
        _check_storage(path, name, dataset)
        datasets[parameter] = dataset
    surplus = sum(map(len, layers.values())) - len(names)
    if surplus:
        where = group_name(spec)
        told = counted(surplus, f"array in {where} belongs to no layer", f"arrays in {where} belong to no layer")
        raise ModelError(path, told, f"not {describe(spec)}")
    return _Network(spec, datasets)


def _check_storage(path: Path, name: str, dataset: h5d.DatasetID) -> None:
    plan, kind = dataset.get_create_plist(), dataset.get_type()
    if not isinstance(kind, h5t.TypeFloatID) or kind.get_size() not in (2, 4, 8):
        raise ModelError(path, f"layer {name} does not hold floating-point numbers", KERAS_FILE)
    if plan.get_external_count() or plan.get_layout() == h5d.VIRTUAL:
        raise ModelError(path, f"layer {name} is stored in another file", "weights must lie in the file itself")
    if plan.get_layout() == h5d.CHUNKED and any(c > n for c, n in zip(plan.get_chunk(), dataset.shape, strict=True)):
        raise ModelError(path, f"layer {name} is stored in chunks larger than itself", KERAS_FILE)
    if dataset.get_space_status() != h5d.SPACE_STATUS_ALLOCATED:
        raise ModelError(path, f"layer {name} was declared but never written", "copy the file again")
    filters = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
    if any(f not in KNOWN_FILTERS for f in filters):
        raise ModelError(path, f"layer {name} is compressed with filters {filters}", "none, or gzip")


def _check_bytes(path: Path, size: int, networks: Mapping[str, _Network]) -> None:
    every = [d for network in networks.values() for d in network.datasets.values()]
    stored = sum(d.get_storage_size() for d in every)
    declared = sum(int(np.prod(d.shape)) * d.get_type().get_size() for d in every)
    if stored > size or declared > MAX_INFLATION * size:
        reason = f"damaged: declares {declared} bytes of weights in a file of {size}"
        raise ModelError(path, reason, "copy the file again")
    if size - stored > MAX_SLACK:
        raise ModelError(path, f"{(size - stored) / 2**20:.0f} MiB beside the weights", KERAS_FILE)


# --- writing ------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike, *networks: tuple[Spec, Mapping[str, Tensor]]) -> Path:
    """Write a generator and, if given, its critic as the original's snapshots are, atomically.

    ``networks``: (spec, parameters by our names). Groups, attributes, types, order and axis order are those that
    Keras 2.2.4 writes; reading the file back gives the same bits. Raises ModelError for a scaled generator, which the
    original cannot hold.
    """
    path = Path(path)
    if any(isinstance(spec, GeneratorSpec) and spec.scaled for spec, _ in networks):
        reason = "the generator's SR head is scaled by the gradient, which the original has no layer for"
        raise ModelError(path, reason, "export a model trained with --scaled False")
    inputs = [n for spec, _ in networks if isinstance(spec, GeneratorSpec) for n in input_names(spec)]
    # In memory first: the operating system's own errors then come from one plain write.
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="earliest") as file:
        _set_names(file, "layer_names", inputs + [group_name(spec) for spec, _ in networks])
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", KERAS_VERSION.encode()
        for name in inputs:
            _set_names(file.create_group(name), "weight_names", [])
        for spec, parameters in networks:
            names, group = weight_names(spec), file.create_group(group_name(spec))
            _set_names(group, "weight_names", list(names.values()))
            for parameter, name in names.items():
                array = parameters[parameter].detach().to("cpu", torch.float32).numpy()
                group[name] = np.ascontiguousarray(array.transpose(_TO_KERAS) if array.ndim == 5 else array)
        file.flush()
        image = file.id.get_file_image()
    with atomic_write(path) as temporary:
        temporary.write_bytes(image)
    return path


def _set_names(item: h5py.Group, attribute: str, names: list[str]) -> None:
    # Bytes as Keras gives them: ASCII strings for h5py, and an empty float64 array where there are none.
    item.attrs[attribute] = [name.encode() for name in names] or np.zeros(0)
