"""Normal draws with NumPy's bits on any device: what keyed noise is made of (docs/decisions/004, 012)."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.draws import rng
from fastsrgan.core.kernels import launch, op, to_device

EDGE = 3.6541528853610088  # where the ziggurat's last layer ends and the tail begins
LAYERS, UNIT, TAIL = 256, 2.0**23, 1 << 30  # UNIT: words of a width; TAIL as in kernels/standard_normal.cu


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(256) each: number below which a draw of a layer is certain, width of the layer per word, density at its edge.

    The layers have equal areas under exp(-x^2 / 2), the lowest one with the tail (Marsaglia and Tsang 2000).
    """
    area = EDGE * math.exp(-(EDGE**2) / 2) + math.sqrt(math.pi / 2) * math.erfc(EDGE / math.sqrt(2))
    edge, density, certain = np.zeros(LAYERS), np.ones(LAYERS), np.zeros(LAYERS, np.int32)
    edge[-1], density[-1] = EDGE, math.exp(-(EDGE**2) / 2)
    edge[0] = area / density[-1]
    certain[0] = round(EDGE / edge[0] * UNIT)
    for i in range(LAYERS - 2, 0, -1):
        edge[i] = math.sqrt(-2 * math.log(area / edge[i + 1] + density[i + 1]))
        density[i] = math.exp(-(edge[i] ** 2) / 2)
        certain[i + 1] = round(edge[i] / edge[i + 1] * UNIT)
    made = certain, (edge / UNIT).astype(np.float32), density.astype(np.float32)
    return tuple(to_device(t, device) for t in made)  # type: ignore[return-value]


def _by_kernel(out: Tensor, generator: np.random.Generator) -> Any:
    state = generator.bit_generator.state
    # The kernel knows streams from their beginning on, where nothing is counted; another goes on on the host.
    if state["bit_generator"] != "Philox" or state["state"]["counter"].any() or not out.is_contiguous():
        return NotImplemented
    keys = state["state"]["key"].view(np.int64).tolist()
    n = out.numel()
    words = n + n // 32 + 4096  # 1.3 % more than draws are needed on average
    while True:
        values = torch.empty(words, device=out.device)
        lengths = torch.empty(words, dtype=torch.int32, device=out.device)
        launch("standard_normal", (words, 1, 1), [values, lengths, words, *keys, *tables(out.device)], PASS=0)
        own = lengths & ~TAIL
        reach = torch.cummax(torch.arange(words, device=out.device) + own, 0).values
        begins = torch.zeros(words, dtype=torch.uint8, device=out.device)
        launch("standard_normal", (words, 1, 1), [begins, own, reach, words], PASS=1)
        places = begins.nonzero().flatten()[:n]
        if len(places) == n:
            break
        words *= 2
    out.view(-1).copy_(values[places])
    tail = (lengths[places] >= TAIL).nonzero().flatten()  # one draw in 4000
    out.view(-1)[tail] = to_device(_tail(out.view(-1)[tail].cpu().numpy()), out.device)
    return out


def _tail(signed: np.ndarray) -> np.ndarray:
    """Draws in the tail from their uniform number and sign. The logarithm is the C library's, as in NumPy: others
    differ in the last bit."""
    log1pf = ctypes.CDLL(None).log1pf
    log1pf.restype, log1pf.argtypes = ctypes.c_float, [ctypes.c_float]
    logs = np.array([log1pf(-abs(u)) for u in signed.tolist()], np.float32)
    return np.copysign(np.float32(EDGE) + -np.float32(1 / EDGE) * logs, signed)


def _example(seed: int, device: torch.device) -> tuple[Tensor, np.random.Generator]:
    return torch.full((20011,), torch.nan, device=device), rng(seed, "example")


@op("standard_normal", launch=_by_kernel, example=_example)
def standard_normal(out: Tensor, generator: np.random.Generator) -> Tensor:
    """Fill a float32 tensor with the first draws of a fresh ``core.draws.rng``, in C order: the same bits everywhere.

    The generator is used up: whether it moves on depends on who drew.
    """
    drawn = generator.standard_normal(tuple(out.shape), dtype=np.float32)
    return out.copy_(to_device(np.asarray(drawn), out.device), non_blocking=True)
