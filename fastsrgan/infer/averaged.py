"""The mean of what several networks say, or of what one says of a tile and of its mirror images, as one network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastsrgan.errors import ModelError
from fastsrgan.infer.network import TileNetwork


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

    Raises ModelError for generators whose channels differ.
    """

    def __init__(
        self,
        generators: Sequence[nn.Module],
        axes: Sequence[int],
        slice_mm: float,
        device: torch.device | str,
        compile: str = "auto",
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(generators)
        # The precision is the caller's, whose autocast holds in here too.
        self.networks = [TileNetwork(generator, slice_mm, device, compile=compile) for generator in generators]
        self.flips = [c for n in range(len(axes) + 1) for c in itertools.combinations([2 + a for a in axes], n)]
        channels = {network.channels for network in self.networks if network.channels is not None}
        if len(channels) > 1:
            raise ModelError(
                "weights", f"of {sorted(channels)} channels cannot be averaged", "models of the same classes"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Mean over members and flips."""
        total = None
        for network, dims in itertools.product(self.networks, self.flips):
            seen = x.flip(dims) if dims else x
            y = network(seen)
            if network.residual:
                y[:, :1] = seen - y[:, :1]
            y = y.flip(dims) if dims else y
            if total is not None:
                total.add_(y)
            else:  # what was compiled is written over by the next pass
                total = y.clone() if network.compiled else y
        assert total is not None
        return total.div_(len(self.networks) * len(self.flips))


def average(
    generators: Sequence[nn.Module],
    axes: Sequence[int],
    slice_mm: float,
    device: torch.device | str,
    compile: str = "auto",
) -> nn.Module:
    """``Averaged``, or the generator itself where there is nothing to average."""
    if len(generators) == 1 and not axes:
        return generators[0]
    return Averaged(generators, axes, slice_mm, device, compile)


def members(generator: nn.Module) -> list[nn.Module]:
    """What is averaged; a generator that is no average is its own only member."""
    return list(generator.members) if isinstance(generator, Averaged) else [generator]
