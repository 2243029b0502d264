"""Floating-point operations and least memory traffic of the networks, counted from their shapes."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

FLOAT = 4  # bytes of a value, where nothing else is said


class Count(NamedTuple):
    """Multiplications and additions of convolutions, and bytes that have to be moved even if everything were fused."""

    flop: float
    bytes: float

    def __add__(self, other: object) -> Count:
        assert isinstance(other, Count)
        return Count(self.flop + other.flop, self.bytes + other.bytes)

    def times(self, n: float) -> Count:
        """``n`` of them."""
        return Count(n * self.flop, n * self.bytes)


NOTHING = Count(0, 0)


def conv(
    inputs: int, outputs: int, size: int, taps: int, stride: int = 1, grow: int = 1, element: int = FLOAT
) -> Count:
    """One convolution of one patch of edge ``size``, up-sampled by ``grow`` before: each array read or written once.

    ``element``: bytes of a value.
    """
    out = size * grow // stride
    moved = inputs * size**3 + outputs * out**3 + inputs * outputs * taps**3
    return Count(2 * inputs * outputs * taps**3 * out**3, element * moved)


def generator(k: int, patch: int, element: int = FLOAT) -> list[Count]:
    """The layers of the plain generator, as usually written, with ``element`` bytes a value."""
    half, quarter = patch // 2, patch // 4
    layer = functools.partial(conv, element=element)
    return [
        layer(1, k, patch, 7),
        layer(k, 2 * k, patch, 3, 2),
        layer(2 * k, 4 * k, half, 3, 2),
        *[layer(4 * k, 4 * k, quarter, 3)] * 12,
        layer(4 * k, 2 * k, quarter, 3, grow=2),
        layer(2 * k, k, half, 3, grow=2),
        layer(k, 2, patch, 7),
    ]


def critic(k: int, patch: int, channels: int = 2, element: int = FLOAT) -> list[Count]:
    """The layers of the critic without its decision, a dot product, with ``element`` bytes a value."""
    layers = []
    for i in range(math.ceil(math.log2(patch)) - 1):
        layers.append(conv(channels if i == 0 else k * 2 ** (i - 1), k * 2**i, patch, 4, 2, element=element))
        patch = (patch + 1) // 2
    return layers


def forward(layers: list[Count]) -> Count:
    """One pass."""
    return sum(layers, NOTHING)


def both(layers: list[Count], to_input: bool = False) -> Count:
    """Forward and backward: three convolutions per layer, the first one's input gradient only where it is wanted."""
    return forward(layers).times(3) + (NOTHING if to_input else layers[0].times(-1))


def critic_update(layers: list[Count]) -> Count:
    """What the formula of WGAN-GP needs per patch: real, fake, and the interpolated one's gradient and its weights'.

    Autograd's double backward adds a backward pass of zeros through the forward graph, which is not counted.
    """
    return both(layers).times(2) + forward(layers).times(4)


def generator_update(g: list[Count], d: list[Count]) -> Count:
    """Generator forward and backward, critic forward and its input gradient."""
    return both(g) + forward(d).times(2)


def iteration(g: list[Count], d: list[Count], critics: int) -> Count:
    """``critics`` critic updates with fakes, then a generator update."""
    return (forward(g) + critic_update(d)).times(critics) + generator_update(g, d)
