"""The training step: generator forward and backward, critic update, and the whole iteration beside plain PyTorch."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench import naive
from bench.common import Case, Sides, texture
from fastsrgan import train
from fastsrgan.config import TrainConfig
from fastsrgan.degrade import degrade
from fastsrgan.losses import charbonnier
from fastsrgan.networks import GeneratorSpec, build_generator
from fastsrgan.pair import Models
from fastsrgan.pool import Pool, Resident, patch_origins
from fastsrgan.runtime import rng

FORWARD_TOLERANCE = 5e-5
# In float32 a voxel within rounding of a ReLU's kink takes either slope. Rounding alone moves the gradient of a small
# weight tensor by up to 2 % of its norm, and losses by 1e-3 after a few Adam steps from a cold start, which have the
# size of the learning rate however small a gradient is. In float64 both are equal to 1e-12 (tests/test_bench.py).
GRADIENT_TOLERANCE = 5e-2
CRITIC_TOLERANCE = 5e-3  # of its gradients: LeakyReLU has kinks too, but few layers
LOSS_TOLERANCE = 1e-2  # of the largest term
ZERO = 1e-6  # of the largest gradient: a shift in front of an instance norm has a gradient of rounding only
EPOCH = 1


def cases(args: argparse.Namespace) -> list[Case]:
    """Forward and forward + backward for every kernel and batch; critic update and iteration for the first of each."""
    found = []
    for kernel, batch in itertools.product(args.kernel, args.batch):
        facts = {"kernel": kernel, "batch": batch, "patch": args.patch}
        patches = ("patches", float(batch))
        for name, backward in (("forward", False), ("forward + backward", True)):
            title = f"generator {name}, k {kernel}, batch {batch}, {args.patch}^3"
            build = _generator_sides(kernel, batch, args, backward)
            tolerance = GRADIENT_TOLERANCE if backward else FORWARD_TOLERANCE
            found.append(Case(title, facts, build, tolerance, patches, l2=backward))
    config = TrainConfig(
        new_low_res=((1.0, 1.0, 3.0),),
        kernel_gen=args.kernel[0],
        kernel_dis=args.critic_kernel,
        batch_size=args.batch[0],
        patch_size=args.patch,
        critic_iterations=args.critic_iterations,
    )
    n = float(config.batch_size)
    where = f"batch {config.batch_size}, {args.patch}^3"
    facts = {"kernel_dis": config.kernel_dis, "batch": config.batch_size, "patch": args.patch}
    title = f"critic update, k {config.kernel_dis}, {where}"
    sides = functools.partial(_critic_sides, config, args.device)
    found.append(Case(title, facts, sides, CRITIC_TOLERANCE, ("patches", n), l2=True))
    facts = {"kernel": config.kernel_gen, **facts, "critic_updates": config.critic_iterations, "generator_updates": 1}
    title = f"iteration of {config.critic_iterations} + 1, k {config.kernel_gen} and {config.kernel_dis}, {where}"
    sides = functools.partial(_iteration_sides, config, args.device)
    found.append(Case(title, facts, sides, LOSS_TOLERANCE, ("patches", n)))
    return found


def _generator_sides(kernel: int, batch: int, args: argparse.Namespace, backward: bool) -> Callable[[], Sides]:
    def build() -> Sides:
        spec = GeneratorSpec(kernel=kernel)
        forms = {form: build_generator(spec, form).to(args.device) for form in ("fast", "reference")}
        plain = naive.NaiveGenerator(kernel).to(args.device)
        pairs = plain.paired(forms["fast"])
        naive.copy(pairs)
        data = pool(args.patch, batch, args.device).gather(np.arange(batch))
        fast, reference = forms["fast"], forms["reference"]
        orders = {
            "fastsrgan": (fast, [ours for ours, _ in pairs]),
            "reference form": (reference, [ours for ours, _ in plain.paired(reference)]),
            "naive": (plain, [own for _, own in pairs]),
        }

        def forward(network: torch.nn.Module) -> list[Tensor]:
            with torch.no_grad():
                return [network(data.x)]

        def both(network: torch.nn.Module, parameters: list[Tensor]) -> list[Tensor]:
            network.zero_grad()
            loss = charbonnier(network(data.x), data.y)
            loss.backward()
            return [loss.detach(), *gradients(parameters)]

        if backward:
            return {name: lambda n=n, p=p: both(n, p) for name, (n, p) in orders.items()}  # type: ignore[misc]
        return {name: lambda n=n: forward(n) for name, (n, _) in orders.items()}  # type: ignore[misc]

    return build


def _critic_sides(config: TrainConfig, device: str) -> Sides:
    batch = pool(config.patch_size, config.batch_size, device).gather(np.arange(config.batch_size))
    explicit = models(config, device)
    autograd = models(replace(config, penalty="autograd"), device)
    plain = naive_trainer(config, explicit, device)
    draw = torch.Generator().manual_seed(0)
    fake = torch.rand(batch.y.shape, generator=draw).to(batch.y)
    eps = torch.rand(batch.y.shape[:2], generator=draw).to(batch.y)

    def ours(m: Models) -> list[Tensor]:
        terms = m.critic_update(batch, fake, eps)
        return [loss_vector(terms), *gradients([p for p, _ in plain.critic.paired(m.critic)])]

    def theirs() -> list[Tensor]:
        terms = plain.critic_update(batch.y, fake, eps)
        return [loss_vector(terms), *gradients(list(plain.critic.parameters()))]

    return {"fastsrgan": lambda: ours(explicit), "autograd penalty": lambda: ours(autograd), "naive": theirs}


def _iteration_sides(config: TrainConfig, device: str) -> Sides:
    """Both sides gather their patches from the same pool by the same keys: equal batches, equal interpolations."""
    patches = pool(config.patch_size, config.batch_size, device)
    indices = next(patches.generator_batches(config.batch_size))
    fast = models(config, device)
    plain = naive_trainer(config, fast, device)
    # What the training loop hands to its critic updates.
    at = SimpleNamespace(config=config, models=fast, mask_classes=0, position=train.Position())

    def ours() -> list[Tensor]:
        facts = train.critic_steps(cast(Any, at), patches, EPOCH)
        values = fast.generator_update(patches.gather(indices), adversarial=True)
        critic = {k.removeprefix("d_"): v for k, v in facts.items()}
        return [loss_vector(critic), loss_vector(values)]

    def theirs() -> list[Tensor]:
        drawn = patches.critic_indices(at.position.step, config.batch_size, config.critic_iterations)
        batches = [patches.gather(i) for i in drawn]
        shape = batches[0].y.shape[:2]
        group, step = at.position.group, at.position.step
        eps = [
            torch.from_numpy(rng(config.seed, EPOCH, group, step, i, "eps").random(shape, dtype=np.float32)).to(device)
            for i in range(len(batches))
        ]
        critic, values = plain.iteration(batches, eps, patches.gather(indices))
        return [loss_vector(critic), loss_vector(values)]

    return {"fastsrgan": ours, "naive": theirs}


# --- shared -------------------------------------------------------------------------------------------------------


def pool(patch: int, batch: int, device: str) -> Pool:
    """Patches of one textured volume, degraded by a factor of three, a label of its brighter half."""
    edge = patch + 16
    # Without air: its many equal voxels would cross a ReLU's kink together, by rounding alone.
    hr = texture((edge, edge, edge), air=False)
    done = degrade(hr, (1.0, 1.0, 1.0), (1.0, 1.0, 3.0))
    label = (done.hr > np.median(done.hr)).astype(np.uint8)
    origins = patch_origins(hr.shape, patch, 8, tuple((0, n) for n in hr.shape))
    z, x, s = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (done.interpolated, done.hr, label))
    resident = Resident("texture", z, x, s, None, 3.0, np.resize(origins, (max(batch, len(origins)), 3)))
    return Pool([resident], patch)


def models(config: TrainConfig, device: str) -> Models:
    """The networks and optimisers that ``fastsrgan train`` makes of a config."""
    return Models(config, 0, torch.device(device))


def naive_trainer(config: TrainConfig, start: Models, device: str) -> naive.NaiveTrainer:
    """The plain side, from the same weights."""
    generator = naive.NaiveGenerator(config.kernel_gen).to(device)
    critic = naive.NaiveCritic(config.kernel_dis, config.patch_size).to(device)
    naive.copy(generator.paired(start.generator))
    naive.copy(critic.paired(start.critic))
    return naive.NaiveTrainer(generator, critic, config.lr_gen, (config.beta1, config.beta2))


def gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Their gradients; those that are zero but for rounding as zeros."""
    found = [cast(Tensor, p.grad) for p in parameters]
    least = ZERO * max(float(g.abs().max()) for g in found)
    return [g if float(g.abs().max()) > least else torch.zeros_like(g) for g in found]


def loss_vector(terms: dict[str, float]) -> Tensor:
    """The loss terms that both sides have, as one vector: differences are then relative to the largest."""
    names = ("total", "wasserstein", "penalty", "reconstruction", "adversarial")
    return torch.tensor([terms[name] for name in names if name in terms], dtype=torch.float64)
