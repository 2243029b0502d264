"""All tiles of a volume through a generator on a device, stitched: batches, precision, memory (DESIGN D8, D9, D11).

A generator is linear in its first output channel up to the subtraction from the input, and the windows sum to 1. What
is stitched is therefore the head alone, and the volume is subtracted from once: it never passes through the network's
precision nor through the sums.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time

import torch
from torch import Tensor, nn

from fastsrgan import tiles
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.networks import Generator
from fastsrgan.runtime import QUIET, Progress
from fastsrgan.stitch import Stitcher

log = logging.getLogger("fastsrgan")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_BATCH_VOXELS = 2**19
LONE_TILE = 96**3  # voxels; torch 2.13 convolves one smaller tile alone without oneDNN, 1.8 x slower than two at once
CUDA_MAX_BATCH = 32
CUDA_SHARE = 0.6  # of the free memory, planned for one batch


def check_precision(name: str) -> str:
    """``name`` if it is auto or a known precision, else UsageError."""
    if name != "auto" and name not in PRECISIONS:
        raise UsageError("precision", f"{name!r}", f"auto, {', '.join(PRECISIONS)}")
    return name


def check_batch(batch: str | int) -> str | int:
    """``batch`` if it is auto or a number of tiles, else UsageError."""
    if batch != "auto" and (not isinstance(batch, int) or batch < 1):
        raise UsageError("batch", f"{batch!r}", "auto, or a number of tiles from 1 up")
    return batch


def pick_precision(name: str, device: torch.device) -> str:
    """The precision that "auto" stands for on a device: bf16 on CUDA, else fp32. Says once what a CPU is slow at."""
    if check_precision(name) == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if device.type == "cpu" and name != "fp32" and not _native(name):
        _warn_once(f"{name} is not native to this CPU and far slower than fp32: take --precision auto")
    return name


@torch.inference_mode()
def predict(
    volume_XYZ: Tensor,
    plan: tiles.TilePlan,
    generator: nn.Module,
    slice_mm: float,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    window: str = "constant",
    batch: str | int = "auto",
    progress: Progress = QUIET,
    label: str = "infer",
) -> tuple[Tensor, dict]:
    """Apply a generator to a normalised volume, densely.

    Parameters
    ----------
    volume_XYZ : (X, Y, Z) float32 on the CPU, of the plan's shape
    generator : ``G(x)``, or ``G(x, slice_mm)`` where ``G.spec.conditional``; moved to the device
    precision : "fp32", "bf16" or "fp16"
    batch : tiles per forward pass; "auto" estimates it. It is halved when memory runs out.

    Returns
    -------
    (C, X, Y, Z) float32 on the CPU, SR first, then probabilities in [0, 1]; and facts: batch, tile_seconds,
    tiles_per_second.

    Raises
    ------
    UsageError : an impossible batch. ResourceError : no memory for a single tile.
    """
    work = _Work(generator, slice_mm, torch.device(device), PRECISIONS[precision])
    size = work.batch_size(batch, plan)
    training = work.generator.training
    work.generator.eval()
    progress.start(label, len(plan), "tiles")
    began = time.perf_counter()
    try:
        padded = tiles.pad(volume_XYZ.to(work.device), plan)
        stitcher, done = None, 0
        while done < len(plan):
            wanted = range(done, min(done + size, len(plan)))
            y = _batch(padded, plan, wanted, work)
            if len(y) < len(wanted):
                size = len(y)
            stitcher = stitcher or _stitcher(plan, y.shape[1], window, work.device)
            stitcher.add(y.to(stitcher.device))
            done += len(y)
            progress.advance(len(y), **{"tiles/s": done / (time.perf_counter() - began)})
    finally:
        progress.finish()
        work.generator.train(training)
    assert stitcher is not None
    out = stitcher.result()[(slice(None), *plan.crop)].cpu()
    if work.residual:
        torch.sub(volume_XYZ, out[0], out=out[0])
    out[1:].clamp_(0, 1)  # means of probabilities, exceeded by rounding only
    seconds = time.perf_counter() - began
    return out, {"batch": size, "tile_seconds": seconds, "tiles_per_second": len(plan) / seconds}


def _batch(padded_XYZ: Tensor, plan: tiles.TilePlan, indices: range, work: _Work) -> Tensor:
    """The first of ``indices`` through the network, as many as memory takes."""
    while True:
        try:
            return work(tiles.gather(padded_XYZ, plan, indices))
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if len(indices) == 1:
                sizes = " x ".join(map(str, plan.patch))
                raise ResourceError(
                    str(work.device), f"no memory for one tile of {sizes} voxels", "take a smaller --patch"
                ) from error
        # Outside the handler, whose traceback keeps the failed attempt's activations alive.
        indices = indices[: len(indices) // 2]
        log.warning("out of memory on %s: going on with %d tiles at a time", work.device, len(indices))
        if work.device.type == "cuda":
            torch.cuda.empty_cache()


def _stitcher(plan: tiles.TilePlan, channels: int, window: str, device: torch.device) -> Stitcher:
    """Sums on the device, or on the host when the device has no room for them."""
    try:
        return Stitcher(plan, channels, window, device)
    except RuntimeError as error:
        if device.type == "cpu" or not _out_of_memory(error):
            raise
    log.warning("out of memory on %s: the result is summed on the CPU, which is slower", device)
    torch.cuda.empty_cache()
    return Stitcher(plan, channels, window, "cpu")


def _native(precision: str) -> bool:
    features: dict = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may not have it
    names = ("avx512_bf16", "amx_bf16", "bf16") if precision == "bf16" else ("avx512_fp16", "amx_fp16", "fp16")
    return any(features.get(name) for name in names)


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


class _Work:
    """A generator on a device: tiles in, what is to be stitched out.

    residual : channel 0 of ``__call__`` is what the volume loses, else it is the result itself
    """

    def __init__(self, generator: nn.Module, slice_mm: float, device: torch.device, dtype: torch.dtype) -> None:
        self.generator = generator.to(device)
        self.device, self.dtype = device, dtype
        spec = getattr(generator, "spec", None)
        self.more = (slice_mm,) if getattr(spec, "conditional", False) else ()
        # The head can be taken apart only where the subtraction and the sigmoid are known to be ours.
        self.fused = isinstance(generator, Generator) and type(generator).forward is Generator.forward
        self.residual = self.fused and generator.spec.residual  # type: ignore[union-attr]

    def __call__(self, tiles_N1XYZ: Tensor) -> Tensor:
        with self._precision():
            if not self.fused:
                return self.generator(tiles_N1XYZ, *self.more).float()
            head = self.generator.raw(tiles_N1XYZ, *self.more).float()  # type: ignore[operator]
        head[:, 1:2].sigmoid_()
        if head.shape[1] > 2:
            head[:, 2:] = torch.softmax(head[:, 2:], dim=1)
        return head

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.dtype != torch.float32:
            return torch.autocast(self.device.type, self.dtype)
        if self.device.type == "cuda":
            # torch lets convolutions round to TF32 by default; fp32 is asked for to have none of that.
            now = torch.backends.cudnn
            return now.flags(enabled=True, benchmark=now.benchmark, deterministic=now.deterministic, allow_tf32=False)
        return contextlib.nullcontext()

    def batch_size(self, asked: str | int, plan: tiles.TilePlan) -> int:
        """Tiles per forward pass; an estimate for "auto", which running out of memory corrects."""
        if isinstance(check_batch(asked), int):
            return min(int(asked), len(plan))
        voxels = math.prod(plan.patch)
        if self.device.type == "cpu":
            least = 2 if voxels < LONE_TILE else 1
            return min(max(CPU_BATCH_VOXELS // voxels, least), len(plan))
        kernel = getattr(getattr(self.generator, "spec", None), "kernel", 16)
        # Around the last up-sampling: input, padded copy, output, norm's float32 copy and result, of `kernel` channels.
        needed = voxels * kernel * 4 * 6
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(int(CUDA_SHARE * free / needed), CUDA_MAX_BATCH, len(plan)))


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
