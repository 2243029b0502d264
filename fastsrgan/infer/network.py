"""A generator on a device: batches of tiles in, what is to be stitched out; precision, batch size, memory.

A generator is linear in its first output channel up to the subtraction from the input, and the windows sum to 1. What
is stitched is therefore the head alone, and the volume is subtracted from once: it never passes through the network's
precision nor through the sums.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastsrgan.config import MIN_SIZE
from fastsrgan.core.system import out_of_memory
from fastsrgan.errors import ResourceError
from fastsrgan.infer import tiles
from fastsrgan.infer.activations import Needs, needs
from fastsrgan.infer.settings import check_batch
from fastsrgan.model import compiled
from fastsrgan.model.arithmetic import TYPES, inference_test
from fastsrgan.model.cpu import forms
from fastsrgan.model.cpu.rearranged import held, kept_bytes
from fastsrgan.model.networks import Generator

log = logging.getLogger("fastsrgan")

CPU_BATCH_VOXELS = 2**19
LONE_TILE = 96**3  # voxels; torch 2.13 convolves one smaller tile alone without oneDNN, 1.8 x slower than two at once
CUDA_MAX_BATCH = 32
FOREIGN = 16 * 4 * 6  # bytes per voxel that a network of unknown make is taken to need: six copies of 16 channels
CUDA_SHARE = 0.6  # of the free memory, planned for one batch

# What networks took when it was counted: the volumes of a cohort do not each pay for a pass.
_counted: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Needs]] = weakref.WeakKeyDictionary()


class TileNetwork:
    """A generator on a device.

    Attributes
    ----------
    residual : channel 0 of what comes out is what the volume loses, else it is the result itself
    size : tiles per forward pass; halved when memory runs out
    compiled : by torch.compile: batches are filled up to ``size``, and a result holds until the next pass
    """

    def __init__(
        self,
        generator: nn.Module,
        slice_mm: float,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        compile: str = "auto",
    ) -> None:
        self.device, self.dtype = torch.device(device), TYPES[precision]
        if self.device.type == "cuda":
            inference_test(self.device, self.dtype)
        self.generator = generator.to(self.device)
        spec = getattr(generator, "spec", None)
        self.more = (slice_mm,) if getattr(spec, "conditional", False) else ()
        # The head can be taken apart only where the subtraction and the sigmoid are known to be ours.
        self.fused = isinstance(generator, Generator) and type(generator).forward is Generator.forward
        self.residual = self.fused and generator.spec.residual  # type: ignore[union-attr]
        self.size = 1
        self.compiled = self.fused and compiled.asked(compile, self.device)
        self._plain = head if self.fused else whole
        self._forward = fast_head(self.device, compile == "on") if self.compiled else self._plain

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

    def choose_batch(self, asked: str | int, plan: tiles.TilePlan) -> int:
        """Set and return ``size``: an estimate for "auto", which running out of memory corrects."""
        self.size = min(self._wanted(asked, plan), len(plan))
        return self.size

    def _wanted(self, asked: str | int, plan: tiles.TilePlan) -> int:
        if isinstance(check_batch(asked), int):
            return int(asked)
        voxels = math.prod(plan.patch)
        if self.device.type == "cpu":
            return max(CPU_BATCH_VOXELS // voxels, 2 if voxels < LONE_TILE else 1)
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(int(CUDA_SHARE * free / self.bytes_of(plan.patch)), CUDA_MAX_BATCH))

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
                sizes = " x ".join(map(str, plan.patch))
                raise ResourceError(
                    str(self.device), f"no memory for one tile of {sizes} voxels", "take a smaller --patch"
                ) from error
        # Outside the handler, whose traceback keeps the failed attempt's activations alive.
        self.size = len(indices) // 2
        log.warning("out of memory on %s: going on with %d tiles at a time", self.device, self.size)
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
        if self.device.type == "cuda":
            # torch lets convolutions round to TF32 by default; fp32 is asked for to have none of that.
            now = torch.backends.cudnn
            return now.flags(enabled=True, benchmark=now.benchmark, deterministic=now.deterministic, allow_tf32=False)
        return contextlib.nullcontext()


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
