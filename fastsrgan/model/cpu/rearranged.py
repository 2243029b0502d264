"""Weights re-arranged once for a whole inference.

The exact layers bring a weight into another shape at every call, since training changes it between two calls. Within
``held`` what came out is kept and used again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_kept: dict[Any, tuple[Tensor, Tensor]] | None = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within it, weights are re-arranged once. They must not change; gradients are not recorded."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def kept_bytes() -> int:
    """Memory of what is kept."""
    return sum(made.nbytes for _, made in _kept.values()) if _kept else 0


def once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate ``function(weight, *more)``, whose result depends on the weight and on hashable values."""

    @functools.wraps(function)
    def looked_up(weight: Tensor, *more: Any) -> Tensor:
        if _kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return function(weight, *more)
        key = (function, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device, more)
        if key not in _kept:
            _kept[key] = weight, function(weight, *more)  # the weight too, so that its address is not used again
        return _kept[key][1]

    return looked_up
