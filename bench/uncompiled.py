"""What the code does for a step on an accelerator, counted without one: products as run, and bytes moved uncompiled.

The networks run on torch's "meta" device, whose tensors have shapes and no memory, so they take the forms of layers
that an accelerator takes. Every operation that makes or changes an array counts its tensors as read and its results
as written once; views count nothing. A compiler that fuses operations moves less, caches may too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.flops import Count
from fastsrgan.model.networks import Critic, CriticSpec, GeneratorSpec, build_generator
from fastsrgan.train.critic_step import critic_gradients
from fastsrgan.train.objectives import generator_loss

META = torch.device("meta")


class Moved(TorchDispatchMode):
    """Bytes of the tensors that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            read = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if func in (torch.ops.aten.copy_.default, torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar):
                read = read[1:]  # what is written over is not read
            written = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in (*read, *written))
        return out


def counted(work: Callable[[], object]) -> Count:
    """Products and bytes of a call on "meta" tensors."""
    with FlopCounterMode(display=False) as flops, Moved() as moved:
        work()
    return Count(flops.get_total_flops(), moved.bytes)


@functools.cache
def phases(kernel: int, critic_kernel: int, patch: int, critics: int, dtype: torch.dtype) -> dict[str, Count]:
    """The phases of training by the names of ``roofline.phase_counts``, for one patch, computed in ``dtype``.

    The networks hold that type throughout where a training holds weights in float32 and casts them: of the bytes of
    weights, shared by a batch, one cast is left out. Optimisers are not counted.
    """
    generator = build_generator(GeneratorSpec(kernel=kernel), "fast", 0).to(META, dtype)
    critic = Critic(CriticSpec(critic_kernel, patch), 1).to(META, dtype)
    x = torch.empty((1, 1, *(patch,) * 3), device=META, dtype=dtype)
    y = torch.empty((1, 2, *(patch,) * 3), device=META, dtype=dtype)
    eps = torch.empty((1, 2), device=META, dtype=dtype)

    def forward() -> None:
        with torch.no_grad():
            generator(x)

    def both() -> None:
        generator(x).square().mean().backward()

    def update() -> None:
        generator_loss(generator, critic, x, y, lambda_adv=0.1)["total"].backward()

    of_critic = counted(lambda: critic_gradients(critic, y, y, eps, 10.0, dtype=dtype))
    once, of_generator = counted(forward), counted(update)
    return {
        "generator forward,": once,
        "generator forward + backward": counted(both),
        "critic update": of_critic,
        "generator update": of_generator,
        "iteration": (once + of_critic).times(critics) + of_generator,
    }
