"""Adam for the generator's 7^3 head in coordinates in which its input is white.

The head sums 2744 taps of smooth, positive features. Measured on this generator, the root mean square of the features'
7^3 patches falls from 13 (constant component) to 0.003 (finest) in a cosine basis, so the head's loss surface is
stretched by a factor of ten million: plain Adam steps of 1e-5 a tap move the image by half its error, and the
components that carry detail hardly move at all (docs/decisions/003). Here the head is head = u * P @ B, with B the
orthonormal 3-D cosine basis of the taps and P the inverse root mean square per channel and component, and Adam works
on u. The network's function and its file are unchanged.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dct
from torch import Tensor

from fastsrgan.networks import Generator

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
