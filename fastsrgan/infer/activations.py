"""What a network takes while it works: counted on one tile, scaled where that was smaller than the wanted ones."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
