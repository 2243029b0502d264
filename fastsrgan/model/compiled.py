"""torch.compile and CUDA graphs for the parts of a training step and for tiles, with one switch.

Compiled are the generator on a batch of tiles (infer/network.py) and three functions of a training step: the critic's
gradients, the generator's loss (with its backward pass) and the generator's forward pass without gradients. All have
static shapes and never wait for the device. tests/test_compiled.py traces them whole, without graph breaks, with the
backends that run on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from fastsrgan.config import TrainConfig
from fastsrgan.errors import ResourceError

log = logging.getLogger("fastsrgan")

# Capabilities of the GPUs on which tools/gpu_check.py has seen the compiled step right. None so far: "auto" is off.
SEEN_RIGHT: frozenset[tuple[int, int]] = frozenset()


def turned_on(setting: str, device: torch.device) -> bool:
    """Whether a ``compile`` setting asks for it on a device: "auto" is the CUDA devices of ``SEEN_RIGHT``."""
    if setting != "auto":
        return setting == "on"
    return device.type == "cuda" and bool(SEEN_RIGHT) and torch.cuda.get_device_capability(device) in SEEN_RIGHT


def wanted(config: TrainConfig, device: torch.device) -> bool:
    """Whether the parts of a training step are compiled on this device.

    Double backward cannot be compiled: with ``penalty: autograd`` "auto" is off. Raises ResourceError when "on" was
    asked for where it cannot be.
    """
    if config.penalty == "autograd":
        if config.compile == "on":
            raise ResourceError("--compile", "double backward cannot be compiled", "--penalty manual, or --compile off")
        return False
    return turned_on(config.compile, device)


def compiled(function: Callable, config: TrainConfig, device: torch.device, backend: Any = "inductor") -> Callable:
    """``function``, compiled whole where ``wanted``; on CUDA as a graph that one launch replays.

    A graph's outputs are overwritten by its next replay, so gradients of micro-batches that add up go without.
    With "auto", a compiler that fails is named in the log and the function runs as it is; with "on" the error is a
    ResourceError.
    """
    if not wanted(config, device):
        return function
    return whole(function, device, config.compile == "on", backend, graphs=config.accumulate == 1)


def whole(
    function: Callable, device: torch.device, strict: bool, backend: Any = "inductor", graphs: bool = True
) -> Callable:
    """``function`` compiled for the shapes it is called with, without graph breaks; ``graphs``: by CUDA graphs.

    strict : an error of the compiler is a ResourceError, else the function runs as it is and the log says so
    """
    graphs = graphs and device.type == "cuda" and backend == "inductor"
    fast = torch.compile(
        function, fullgraph=True, dynamic=False, backend=backend, mode="reduce-overhead" if graphs else None
    )
    return _Guarded(function, fast, strict)


class _Guarded:
    """Calls the compiled function, or the plain one once compiling has failed."""

    def __init__(self, plain: Callable, fast: Callable, strict: bool) -> None:
        self.plain, self.fast, self.strict = plain, fast, strict

    def __call__(self, *args: Any, **options: Any) -> Any:
        try:
            return self.fast(*args, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            if self.strict:
                raise ResourceError("--compile on", f"compiling failed: {reason}", "--compile off") from error
            log.warning("compiling failed, it runs uncompiled: %s", reason)
            self.fast = self.plain
            return self.plain(*args, **options)
