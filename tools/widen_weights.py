"""Give a generator more channels without changing what it computes, to train on from there.

    python tools/widen_weights.py perinatal 12 wide.safetensors

Channels are doubled at random until there are as many as are wanted, and what leaves a doubled channel is shared
unequally by its copies (Net2WiderNet, Chen et al. 2016), which instance norms per channel let stand. Then every
convolution gets noise of 1 % of its standard deviation, so that copies can part in training. Of the plain network.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from fastsrgan.errors import ModelError
from fastsrgan.model import weights
from fastsrgan.model.networks import N_BLOCKS, Generator

NOISE = 0.01
SEED = 5


class Widening:
    """The draws of one call: which channels are doubled, and how their copies share."""

    def __init__(self, old: Generator, kernel: int) -> None:
        self.old, self.state = old, {name: value.clone() for name, value in old.state_dict().items()}
        self.random = torch.Generator().manual_seed(SEED)
        self.new: dict[str, Tensor] = {}
        self.times = old.spec.kernel, kernel

    def channels(self, times: int) -> Tensor:
        """(times x kernel,) of which old channel each new one is a copy."""
        n, m = (times * k for k in self.times)
        return torch.cat([torch.arange(n), torch.randperm(n, generator=self.random)[: m - n]])

    def norm(self, name: str, channels: Tensor) -> None:
        """Scale and shift of an instance norm."""
        for field in ("scale", "shift"):
            self.new[f"{name}.{field}"] = self.state[f"{name}.{field}"][channels]

    def shared(self, name: str, channels: Tensor) -> Tensor:
        """A convolution (out, in, ...) on doubled channels: copies get unequal shares that sum to the old weight."""
        made = self.state[name][:, channels].clone()
        for channel in range(self.state[name].shape[1]):
            at = (channels == channel).nonzero().flatten()
            if len(at) == 2:
                share = 0.5 + 0.25 * (2 * torch.rand(len(made), generator=self.random) - 1)
                share = share.view(-1, *[1] * (made.dim() - 2))
                made[:, at[0]] *= share
                made[:, at[1]] *= 1 - share
        return made


def widened(old: Generator, kernel: int) -> Generator:
    """The same function with ``kernel`` channels, at most twice as many. Raises ModelError for what cannot be done."""
    spec = old.spec
    if spec.network != "plain" or not spec.kernel <= kernel <= 2 * spec.kernel:
        reason = f"a {spec.network} network of {spec.kernel} channels cannot be given {kernel}"
        raise ModelError("widen", reason, "a plain network, at most twice its channels")
    made = Widening(old, kernel)
    first, half, quarter = (made.channels(times) for times in (1, 2, 4))
    back_half, back_first = made.channels(2), made.channels(1)
    made.new["stem"] = made.state["stem"][first]
    made.norm("stem_norm", first)
    made.new["down1"] = made.shared("down1", first)[half]
    made.norm("down1_norm", half)
    made.new["down2"] = made.shared("down2", half)[quarter]
    made.norm("down2_norm", quarter)
    for number in range(N_BLOCKS):
        inner, block = made.channels(4), f"blocks.{number}."
        made.new[f"{block}conv_a"] = made.shared(f"{block}conv_a", quarter)[inner]
        made.norm(f"{block}norm_a", inner)
        made.new[f"{block}conv_b"] = made.shared(f"{block}conv_b", inner)[quarter]
        made.norm(f"{block}norm_b", quarter)
    made.new["up1"] = made.shared("up1", quarter)[back_half]
    made.norm("up1_norm", back_half)
    made.new["up2"] = made.shared("up2", back_half)[back_first]
    made.norm("up2_norm", back_first)
    made.new["head"] = made.shared("head", back_first)
    wide = Generator(dataclasses.replace(spec, kernel=kernel))
    wide.load_state_dict(made.new)
    return wide


def part(wide: Generator, noise: float = NOISE) -> None:
    """Noise on every convolution, in place, in parts of its standard deviation."""
    random = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in wide.parameters():
            if parameter.dim() > 1:
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=random)


def main() -> None:
    """Load, widen, save."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", help="what fastsrgan.load_generator takes")
    p.add_argument("kernel", type=int, help="channels of the first convolution")
    p.add_argument("out", type=Path, help=".safetensors")
    args = p.parse_args()
    wide = widened(weights.load_generator(args.weights), args.kernel)
    part(wide)
    weights.save_generator(args.out, wide)
    print(args.out)


if __name__ == "__main__":
    main()
