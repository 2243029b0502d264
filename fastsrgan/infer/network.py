"""A generator on a device: batches of tiles in, what is to be stitched out; precision, batch size, memory.

A generator is linear in its first output channel up to the subtraction from the input, and the windows sum to 1. What
is stitched is therefore the head alone, and the volume is subtracted from once: it never passes through the network's
precision nor through the sums.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastsrgan.config import MIN_SIZE, SIZE_MULTIPLE
from fastsrgan.core.kernels import unrounded
from fastsrgan.core.system import free_memory
from fastsrgan.errors import ModelError, ResourceError, counted, out_of_memory
from fastsrgan.infer import tiles
from fastsrgan.infer.planes import Held, Source
from fastsrgan.infer.values import check_batch
from fastsrgan.model import compiled
from fastsrgan.model.arithmetic import KERNEL_LIMITS, TYPES, Arithmetic, Kernels, device_name, native, refuse, relative
from fastsrgan.model.cpu import forms
from fastsrgan.model.cpu.rearranged import held, kept_bytes
from fastsrgan.model.networks import Generator, GeneratorSpec

log = logging.getLogger("fastsrgan")

# --- what a network takes while it works ----------------------------------------------------------------------------

LARGEST = 64  # edge in voxels up to which tiles are counted as they are: such a pass has room on any machine
HALO = 6  # voxels that the widest convolution adds to an axis
KEPT = 1.25  # what a process holds over what it uses: freed blocks of one layer do not fit the next one


class Needs(NamedTuple):
    """edges : of the tile that was counted; alive : bytes at once; channels : of the output; fixed : bytes whatever the
    tile.
    """

    edges: tuple[int, ...]
    alive: int
    channels: int
    fixed: int = 0

    def of(self, patch: Sequence[int], tiles: int = 1) -> int:
        """Bytes for a batch of other tiles: layers grow at most with the voxels that the widest convolution sees."""
        larger = math.prod((p + HALO) / (e + HALO) for p, e in zip(patch, self.edges, strict=True))
        return self.fixed + math.ceil(KEPT * self.alive * tiles * larger)


class _Tally(TorchFunctionMode):
    """Counts the bytes of tensors that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        for tensor in made:
            self._note(tensor)
        # Convolutions bring input and output into a layout of their own, beside the tensors that are seen.
        scratch = sum(t.nbytes for t in (args[0], *made)) if "conv" in getattr(func, "__name__", "") else 0
        self.peak = max(self.peak, self.live + scratch)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def needs(network: Callable[[Tensor], Tensor], patch: Sequence[int], device: torch.device | str = "cpu") -> Needs:
    """Run a network, (B, 1, X, Y, Z) -> (B, C, X, Y, Z), once on a tile and count what it has alive at once.

    The count follows any network and any change of it; no figure about a layer is written down anywhere.
    """
    edges = tuple(min(p, LARGEST) for p in patch)
    with torch.inference_mode(), _Tally() as tally:
        x = torch.rand((1, 1, *edges), device=device)
        out = network(x)
    return Needs(edges, tally.peak, out.shape[1])


# --- one network ----------------------------------------------------------------------------------------------------

CPU_BATCH_VOXELS = 2**19
LONE_TILE = 96**3  # voxels; torch 2.13 convolves one smaller tile alone without oneDNN, 1.8 x slower than two at once
CUDA_MAX_BATCH = 32
FOREIGN = 16 * 4 * 6  # bytes per voxel that a network of unknown make is taken to need: six copies of 16 channels
CUDA_SHARE = 0.6  # of the free memory, planned for one batch

# What networks took when it was counted: the volumes of a cohort do not each pay for a pass.
_counted: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Needs]] = weakref.WeakKeyDictionary()


@functools.cache
def inference_test(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The convolutions of a small forward pass against float64, once per process: kernel -> its relative difference.

    Raises ResourceError where one is beyond what rounding explains, or the device fails.
    """
    kernels = Kernels()
    try:
        arithmetic, generator, x = _small(device, dtype)
        with torch.no_grad(), arithmetic.flags(), arithmetic.autocast(), kernels:
            generator.raw(x)
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        reason = f"a small forward pass failed: {str(error).splitlines()[0]}"
        raise ResourceError(device_name(device), reason, "see `fastsrgan doctor`, or --device cpu") from error
    refuse(arithmetic, kernels.off, KERNEL_LIMITS)
    return kernels.off


def _small(device: torch.device, dtype: torch.dtype) -> tuple[Arithmetic, Generator, Tensor]:
    arithmetic = Arithmetic(device, dtype, device.type == "cuda")
    generator = Generator(GeneratorSpec(kernel=8), seed=1)
    arithmetic.arrange(generator)
    return arithmetic, generator, torch.rand((1, 1, 16, 16, 16), generator=torch.Generator().manual_seed(3)).to(device)


REPLAYS = 3  # of a compiled pass: the first compiles, the second records a graph, the third replays it
ALIKE = 4.0  # times the plain form's difference from float64 that a compiled pass may have


@functools.cache
def compiled_test(device: torch.device, dtype: torch.dtype, strict: bool) -> bool:
    """Whether a small pass comes out of ``fast_head`` as near to float64 as uncompiled; else a line in the log says so.

    strict : that is a ResourceError. Once per process.
    """

    def test() -> None:
        arithmetic, generator, x = _small(device, dtype)
        exact = copy.deepcopy(generator).to("cpu", torch.float64)
        exact.form = "reference"
        with torch.inference_mode():
            right = head(exact, x.cpu().double())
            fast = compiled.whole(head, device, True)
            with arithmetic.flags(), arithmetic.autocast():
                plain = relative(head(generator, x).double().cpu(), right)
                off = [relative(fast(generator, x).double().cpu(), right) for _ in range(REPLAYS)]
        if not all(value <= ALIKE * plain for value in off):
            reason = f"a compiled pass is off by {max(off):.2g}, uncompiled {plain:.2g}"
            raise ResourceError(device_name(device), reason, "--compile off")

    return compiled.proven(test, strict)


# Of the edges of tiles that an axis shorter than the patch gets where passes are compiled: volumes of many sizes have
# tiles of few. A CPU, where compiling is the exception, keeps to what the networks need.
MULTIPLES = {"cpu": SIZE_MULTIPLE, "cuda": 32}

# Tiles per compiled pass by device, type and tile: what the first volume of a job took, so that all are of one shape.
_sizes: dict[tuple, int] = {}


class TileNetwork:
    """A generator on a device.

    Attributes
    ----------
    residual : channel 0 of what comes out is what the volume loses, else it is the result itself
    batch : tiles per forward pass that are asked for, "auto" by memory
    size : tiles per forward pass; halved when memory runs out
    compiled : by torch.compile: batches are filled up to ``size``, the same for all volumes of a process with such
        tiles, and a result holds until the next pass
    """

    def __init__(
        self,
        generator: nn.Module,
        slice_mm: float,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        compile: str = "off",
        batch: str | int = "auto",
    ) -> None:
        self.device, self.dtype, self.batch = torch.device(device), TYPES[precision], batch
        if self.device.type == "cuda":
            inference_test(self.device, self.dtype)
        # Ours only: torch refuses this layout for weights of 2-D convolutions.
        innermost = self.device.type == "cuda" and isinstance(generator, Generator)
        Arithmetic(self.device, self.dtype, innermost).arrange(generator)
        self.generator = generator
        spec = getattr(generator, "spec", None)
        self.more: tuple = (slice_mm,) if getattr(spec, "conditional", False) else ()
        # The head can be taken apart only where the subtraction and the sigmoid are known to be ours.
        self.fused = isinstance(generator, Generator) and type(generator).forward is Generator.forward
        self.residual = self.fused and generator.spec.residual  # type: ignore[union-attr]
        self.size = 1
        self._plain = head if self.fused else whole
        self._forward = self._plain
        strict = compile == "on"
        self.compiled = self.fused and compiled.turned_on(compile, self.device)
        if self.compiled and self.device.type == "cuda":
            self.compiled = compiled_test(self.device, self.dtype, strict)
        if self.compiled:
            self._forward = fast_head(self.device, strict)
            self.more = tuple(torch.tensor(mm, device=self.device) for mm in self.more)  # a number would be compiled in
        elif isinstance(generator, Averaged):
            self.compiled = any(network.compiled for network in generator.networks)

    def __call__(self, tiles_N1XYZ: Tensor) -> Tensor:
        """(N, 1, X, Y, Z) -> (N, C, X, Y, Z) float32."""
        with self._precision():
            return self._forward(self.generator, tiles_N1XYZ, *self.more)

    def _uncompiled(self, tiles_N1XYZ: Tensor) -> Tensor:
        """A pass as ``probe`` counts it."""
        return self._plain(self.generator, tiles_N1XYZ, *self.more)

    @property
    def channels(self) -> int | None:
        """Of what comes out; None where only a pass tells."""
        return self.generator.spec.out_channels if isinstance(self.generator, Generator) and self.fused else None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The generator in its state for inference, its weights re-arranged once; as it was afterwards."""
        training = self.generator.training
        self.generator.eval()
        try:
            with torch.inference_mode(), held():
                yield
                if self.device.type == "cpu":
                    forms.current().tell()
        finally:
            self.generator.train(training)

    def probe(self, patch: Sequence[int]) -> Needs:
        """What tiles take on the device in float32, half precision at most that, from a pass of one."""
        known, key = _counted.setdefault(self.generator, {}), (tuple(patch), self.device)
        if key not in known:
            with self.working():
                # First a small one, for weights to be re-arranged: that does not grow with tiles.
                needs(self._uncompiled, (MIN_SIZE,) * 3, self.device)
                known[key] = needs(self._uncompiled, patch, self.device)._replace(fixed=kept_bytes())
        return known[key]

    def bytes_of(self, patch: Sequence[int], count: int = 1) -> int:
        """Memory that ``count`` tiles take in the network."""
        return self.probe(patch).of(patch, count) if self.fused else math.prod(patch) * FOREIGN * count

    @property
    def multiple(self) -> int:
        """What the edges of a tile that holds a whole axis are multiples of."""
        return MULTIPLES[self.device.type] if self.compiled else SIZE_MULTIPLE

    def choose_batch(self, batch: str | int, plan: tiles.TilePlan) -> int:
        """Set and return ``size``: an estimate for "auto", which running out of memory corrects."""
        wanted = self._wanted(batch, plan)
        self.size = wanted if self.compiled else min(wanted, len(plan))
        return self.size

    def settle(self, batch: int, plan: tiles.TilePlan) -> None:
        """Ask for the batch that was found to fit; an automatic one where passes are compiled is that of the first
        volume of this process with such tiles."""
        if self.compiled and self.batch == "auto":
            batch = _sizes.setdefault((self.device, self.dtype, plan.patch), batch)
        self.batch = batch

    def _wanted(self, batch: str | int, plan: tiles.TilePlan) -> int:
        if isinstance(check_batch(batch), int):
            return int(batch)
        voxels = math.prod(plan.patch)
        if self.device.type == "cpu":
            return max(CPU_BATCH_VOXELS // voxels, 2 if voxels < LONE_TILE else 1)
        return max(1, min(int(CUDA_SHARE * free_memory(self.device) / self.bytes_of(plan.patch)), CUDA_MAX_BATCH))

    def outputs(self, volume_XYZ: Tensor, plan: tiles.TilePlan, indices: Sequence[int]) -> Iterator[Tensor]:
        """Tiles ``indices`` through the network, batch by batch, in order; smaller ones once memory has run out.

        Raises ResourceError when there is no memory for a single tile.
        """
        while indices:
            count = -(-len(indices) // -(-len(indices) // self.size))  # batches of about one size
            if self.compiled:
                count = min(len(indices), self.size)  # of one size: each other one would be compiled anew
            y = self._try(volume_XYZ, plan, indices[:count])
            if y is None:
                continue
            indices = indices[count:]
            yield y[:count]

    def _try(self, volume_XYZ: Tensor, plan: tiles.TilePlan, indices: Sequence[int]) -> Tensor | None:
        try:
            return self(self._cut(volume_XYZ, plan, indices))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(indices) == 1:
                reason = f"no memory for one tile of {' x '.join(map(str, plan.patch))} voxels"
                raise ResourceError(str(self.device), reason, "take a smaller --patch") from error
        # Outside the handler, whose traceback keeps the failed attempt's activations alive.
        self.size = len(indices) // 2
        if self.compiled:
            _sizes[(self.device, self.dtype, plan.patch)] = self.size
        log.warning("out of memory on %s: going on with %s at a time", self.device, counted(self.size, "tile"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _cut(self, volume_XYZ: Tensor, plan: tiles.TilePlan, indices: Sequence[int]) -> Tensor:
        """A batch. Our generators never write to what they get, so they may look at the volume itself."""
        if self.compiled:
            indices = [*indices, *[indices[-1]] * (self.size - len(indices))]
        return (tiles.look if self.fused else tiles.gather)(volume_XYZ, plan, indices)

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.dtype != torch.float32:
            return torch.autocast(self.device.type, self.dtype)
        return unrounded(self.device)  # fp32 is asked for to have none of that


def whole(generator: nn.Module, tiles_N1XYZ: Tensor, *more: float) -> Tensor:
    """A network of unknown make on a batch: (N, 1, X, Y, Z) -> (N, C, X, Y, Z) float32, its results."""
    return generator(tiles_N1XYZ, *more).float()


def head(generator: nn.Module, tiles_N1XYZ: Tensor, *more: float) -> Tensor:
    """One of our generators on a batch: (N, 1, X, Y, Z) -> (N, C, X, Y, Z) float32, channel 0 the head alone."""
    out = generator.raw(tiles_N1XYZ, *more).float()  # type: ignore[operator]
    out[:, 1:2].sigmoid_()
    if out.shape[1] > 2:
        out[:, 2:] = torch.softmax(out[:, 2:], dim=1)
    return out


@functools.cache
def fast_head(device: torch.device, strict: bool) -> Callable[..., Tensor]:
    """``head`` compiled, on CUDA one graph; its result is written over by the next call. One for all volumes."""
    return compiled.whole(head, device, strict)


# --- the mean of several --------------------------------------------------------------------------------------------


class Averaged(nn.Module):
    """(B, 1, X, Y, Z) -> (B, C, X, Y, Z) float32: the mean SR and the mean probabilities.

    Tiles are flipped, not the volume, as nnU-Net does: the mean is over tiles at the same places. Each axis doubles the
    work.

    Parameters
    ----------
    generators : of one number of classes, as ``TileNetwork`` takes them
    axes : spatial axes, 0 to 2, of which every combination is flipped
    slice_mm : for generators that depend on it
    device : they are moved to
    compile : each of them, see ``compiled``
    spread : one more channel, the variance of the SR over members and flips, 0 of a single pass
    upright : spatial axes in whose order tiles are seen once more, for the probabilities alone; None: not

    Raises ModelError for generators whose channels differ.
    """

    def __init__(
        self,
        generators: Sequence[nn.Module],
        axes: Sequence[int],
        slice_mm: float,
        device: torch.device | str,
        compile: str = "off",
        spread: bool = False,
        upright: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.spread, self.upright = spread, upright
        self.members = nn.ModuleList(generators)
        # The precision is the caller's, whose autocast holds in here too.
        self.networks = [TileNetwork(generator, slice_mm, device, compile=compile) for generator in generators]
        self.flips = [c for n in range(len(axes) + 1) for c in itertools.combinations([2 + a for a in axes], n)]
        channels = {network.channels for network in self.networks if network.channels is not None}
        if len(channels) > 1:
            reason = f"of {sorted(channels)} channels cannot be averaged"
            raise ModelError("weights", reason, "models of the same classes")

    def forward(self, x: Tensor) -> Tensor:
        """Mean over members and flips."""
        total, passes = None, len(self.networks) * len(self.flips)
        squares = torch.zeros_like(x)
        for n, (network, dims) in enumerate(itertools.product(self.networks, self.flips)):
            seen = x.flip(dims) if dims else x
            y = self._both(network, seen) if self.upright else network(seen)
            if network.residual:
                y[:, :1] = seen - y[:, :1]
            y = y.flip(dims) if dims else y
            if total is not None:
                if self.spread:  # what a value adds to the sum of squares about the mean (Welford 1962)
                    squares += (y[:, :1] - total[:, :1] / n).square_().mul_(n / (n + 1))
                total.add_(y)
            else:  # what was compiled is written over by the next pass
                total = y.clone() if network.compiled else y
        assert total is not None
        total.div_(passes)
        return torch.cat([total, squares.div_(max(1, passes - 1))], 1) if self.spread else total

    def _both(self, network: TileNetwork, x: Tensor) -> Tensor:
        """What a network makes of tiles, with the probabilities that it makes of them turned."""
        assert self.upright is not None
        order = [0, 1, *(2 + axis for axis in self.upright)]
        y = network(x)
        y = y.clone() if network.compiled else y
        y[:, 1:] = network(x.permute(order).contiguous()).permute(np.argsort(order).tolist())[:, 1:]
        return y


def average(
    generators: Sequence[nn.Module],
    axes: Sequence[int],
    slice_mm: float,
    device: torch.device | str,
    compile: str = "off",
    spread: bool = False,
    upright: Sequence[int] | None = None,
) -> nn.Module:
    """``Averaged``, or the generator itself where there is nothing to average and one pass."""
    if len(generators) == 1 and not axes and not spread and not upright:
        return generators[0]
    return Averaged(generators, axes, slice_mm, device, compile, spread, upright)


def members(generator: nn.Module) -> list[nn.Module]:
    """What is averaged; a generator that is no average is its own only member."""
    return list(generator.members) if isinstance(generator, Averaged) else [generator]


# --- what a precision costs -----------------------------------------------------------------------------------------

TILES = 4  # compared
CANDIDATES = 16  # places in the volume of which those with most contrast are taken
EMULATED = 32  # edge of the tiles on a CPU that has to emulate the precision


def deviations(source: Source, plan: tiles.TilePlan, generator: nn.Module, slice_mm: float, device: torch.device,
               precision: str) -> dict[str, dict[str, float]]:  # fmt: skip
    """Largest and root-mean-square deviation from float32 of each precision that makes sense on a device.

    These are the chosen one, and of the others those that the device has. Units: SR in maxima of the image,
    probabilities as they are.

    Returns
    -------
    precision -> {"tiles", "edge", "sr_max", "sr_rms", "prob_max", "prob_rms"}
    """
    has = [name for name in TYPES if device.type == "cuda" or native(name)]
    wanted = [name for name in TYPES if name != "fp32" and (name in has or name == precision)]
    tiles_N1XYZ = _tiles(source, plan)
    result = {"fp32": _row(torch.zeros(1, 2), tiles_N1XYZ)} if precision == "fp32" else {}
    for name in wanted:
        some = tiles_N1XYZ if name in has else tiles_N1XYZ[:1, :, :EMULATED, :EMULATED, :EMULATED]
        results = []
        for each in ("fp32", name):
            network = TileNetwork(generator, slice_mm, device, each)
            with network.working(), _without_graphs(generator):
                results.append(torch.cat([network(tile[None].to(device)).cpu() for tile in some]))
        result[name] = _row(results[1] - results[0], some)
    return result


@contextlib.contextmanager
def _without_graphs(generator: nn.Module) -> Iterator[None]:
    """Members of a mean as they are: a few tiles, in batches of their own, are not worth a graph of each precision."""
    networks = generator.networks if isinstance(generator, Averaged) else []
    fast = [network._forward for network in networks]
    try:
        for network in networks:
            network._forward = network._plain
        yield
    finally:
        for network, forward in zip(networks, fast, strict=True):
            network._forward = forward


def _tiles(source: Source, plan: tiles.TilePlan) -> torch.Tensor:
    """(N, 1, *patch): the tiles with most contrast among some that lie evenly in the volume."""
    places = sorted(set(np.linspace(0, len(plan) - 1, min(CANDIDATES, len(plan))).round().astype(int).tolist()))
    held, best = Held(source, plan), []
    for n in places:
        x, y, z = plan.origin(n)
        volume = held.planes(x, x + plan.patch[0])
        shape = (volume.shape[0], volume.shape[1], volume.shape[2])
        part = replace(plan, shape=shape, padded_shape=shape, pad_before=(0, 0, 0), origins=((0,), (y,), (z,)))
        tile = tiles.gather(volume, part, [0])
        best.append((float(tile.amax() - tile.amin()), n, tile))
        best = sorted(best, key=lambda item: item[:2], reverse=True)[:TILES]
    return torch.cat([tile for _, _, tile in sorted(best, key=lambda item: item[1])])


def _row(difference: torch.Tensor, some: torch.Tensor) -> dict[str, float]:
    row: dict[str, float] = {"tiles": len(some), "edge": max(some.shape[2:])}
    for name, part in (("sr", difference[:, :1]), ("prob", difference[:, 1:])):
        row[f"{name}_max"] = float(part.abs().max())
        row[f"{name}_rms"] = math.sqrt(float(part.square().mean()))
    return row
