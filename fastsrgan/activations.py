"""What a network takes while it works: counted on a small tile, scaled to any other."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PROBE = 24  # edge of the small tile in voxels
HALO = 6  # voxels that the widest convolution adds to an axis
KEPT = 1.5  # what a process holds over what it uses: freed blocks of one layer do not fit the next one


class Needs(NamedTuple):
    """probe : bytes alive at once for a tile of ``PROBE`` voxels per axis; channels : of the output."""

    probe: int
    channels: int

    def of(self, patch: Sequence[int], tiles: int = 1) -> int:
        """Bytes for a batch of larger tiles: every layer grows with the voxels that the widest convolution sees."""
        return math.ceil(KEPT * self.probe * tiles * math.prod((p + HALO) / (PROBE + HALO) for p in patch))


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


def needs(network: Callable[[Tensor], Tensor], device: torch.device | str = "cpu") -> Needs:
    """Run a network, (B, 1, X, Y, Z) -> (B, C, X, Y, Z), once on a small tile and count what it has alive at once.

    The count follows any network and any change of it; no figure about a layer is written down anywhere.
    """
    with torch.inference_mode(), _Tally() as tally:
        x = torch.rand((1, 1, PROBE, PROBE, PROBE), device=device)
        out = network(x)
    return Needs(tally.peak, out.shape[1])
