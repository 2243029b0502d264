"""Adam for the generator's 7^3 head in coordinates in which its input is white.

The head sums 2744 taps of smooth, positive features. In a cosine basis of their 7^3 patches the constant component is
thousands of times stronger than the finest ones (`python tools/whitened_head.py [WEIGHTS]` prints it), so the head's
loss surface is stretched by the square of that: plain Adam steps small enough for the first hardly move the ones that
carry detail (docs/decisions/003). Here the head is head = u * P @ B, with B the
orthonormal 3-D cosine basis of the taps and P the inverse root mean square per channel and component, and Adam works
on u. The network's function and its file are unchanged.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from torch import Tensor

from fastsrgan.model.networks import Generator, GeneratorSpec

TAPS = 7
BETAS = (0.9, 0.99)
FLOOR = 0.005  # of the largest root mean square: finer components are not amplified beyond it


class WhitenedHead:
    """State and update of the head; ``rates`` are learning rates of u per output channel."""

    def __init__(self, generator: Generator, rates: tuple[float, ...], rng_seed: int = 0) -> None:
        one = torch.tensor(dct(np.eye(TAPS), norm="ortho", axis=0), dtype=torch.float32)
        self.basis = torch.einsum("ai,bj,ck->abcijk", one, one, one).reshape(TAPS**3, TAPS**3)
        self.generator, self.head = generator, generator.head
        self.rates = torch.tensor(rates).view(-1, 1, 1)
        self.shape = (*self.head.shape[:2], TAPS**3)
        self.scale = torch.ones(self.shape[1:])
        self.rms = torch.ones(self.shape[1:])
        self.u = self.head.detach().reshape(self.shape) @ self.basis.T
        self.m, self.v, self.steps = torch.zeros_like(self.u), torch.zeros_like(self.u), 0
        self.rng = torch.Generator().manual_seed(rng_seed)

    @torch.no_grad()
    def measure(self, x: Tensor, samples: int = 4000) -> None:
        """Take P from the features of a batch (B, 1, P, P, P); the head itself does not change."""
        features = self.generator.features(x)
        n, edge = features.shape[0], features.shape[-1]
        padded = F.pad(features, (TAPS // 2,) * 6, mode="reflect")
        power = torch.zeros(self.shape[1:])
        for s, (i, j, k) in enumerate(torch.randint(0, edge, (samples, 3), generator=self.rng).tolist()):
            patch = padded[s % n, :, i : i + TAPS, j : j + TAPS, k : k + TAPS].reshape(self.shape[1:])
            power += (patch @ self.basis.T) ** 2
        rms = (power / samples).sqrt()
        self.rms = rms
        scale = 1 / (rms + FLOOR * rms.max())
        change = scale / self.scale
        self.u, self.m, self.v = self.u / change, self.m * change, self.v * change**2
        self.scale = scale

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """One Adam step on u from the head's gradient; ``rate`` multiplies the channel rates."""
        g = (self.head.grad.reshape(self.shape) @ self.basis.T) * self.scale
        self.steps += 1
        self.m.lerp_(g, 1 - BETAS[0])
        self.v.lerp_(g * g, 1 - BETAS[1])
        m, v = self.m / (1 - BETAS[0] ** self.steps), self.v / (1 - BETAS[1] ** self.steps)
        self.u -= rate * self.rates * m / (v.sqrt() + 1e-12)
        self.head.copy_(((self.u * self.scale) @ self.basis).view_as(self.head))

    def state(self) -> dict:
        """Everything a resumed run needs besides the generator."""
        return {"u": self.u, "m": self.m, "v": self.v, "scale": self.scale, "steps": self.steps}

    def load(self, state: dict) -> None:
        """Continue from ``state``."""
        self.u, self.m, self.v = state["u"], state["m"], state["v"]
        self.scale, self.steps = state["scale"], state["steps"]


def spectrum(weights: str | None = None) -> None:
    """Print the root mean square of a generator's features by cosine component, largest to smallest."""
    from synthetic_heads import load_maps, make_block

    from fastsrgan.model.weights import load_generator
    from fastsrgan.observation.model import degrade

    generator = Generator(GeneratorSpec(kernel=8)) if weights is None else load_generator(weights)
    block = make_block(load_maps(), 0, 3)
    x = torch.from_numpy(degrade(block.image, (1, 1, 1), (1, 1, 3)).interpolated)[None, None]
    head = WhitenedHead(generator, (1.0,) * generator.spec.out_channels)
    head.measure(x)
    rms = head.rms.sort(dim=1, descending=True).values.mean(0)
    print(f"root mean square: largest {rms[0]:.3g}, tenth {rms[9]:.3g}, median {rms[171]:.3g}, smallest {rms[-1]:.3g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", help="a weight file (new weights)")
    spectrum(parser.parse_args().weights)
