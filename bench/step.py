"""The training step: generator, critic update, generator update and the whole iteration beside plain PyTorch."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bench import common, flops, naive
from bench.common import Case, Sides
from bench.step_pool import EPOCH, pool
from bench.step_ranks import Scaling
from fastsrgan.config import TrainConfig
from fastsrgan.core.draws import rng
from fastsrgan.core.ranks import ALONE, Ranks
from fastsrgan.data.pool import Batch
from fastsrgan.losses import charbonnier
from fastsrgan.model.cpu import forms
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.train import precision
from fastsrgan.train.critic_step import critic_gradients
from fastsrgan.train.gan import Models

# Gates are at most twice the worst that was measured, which stands beside each.
#
# In float32 a voxel within rounding of a ReLU's kink takes either slope. Rounding alone moves the gradient of a small
# weight tensor by up to a percent of its norm, and losses after a few Adam steps from a cold start, which have
# the size of the learning rate however small a gradient is. In float64 both are equal to 1e-12 (tests/test_bench.py).
# Measured: the most that earlier and present initial weights gave (that of results/epyc-zen3-2cores/step.json).
FORWARD_TOLERANCE = 2.3e-5  # 1.3e-5 (1.3e-5)
GRADIENT_TOLERANCE = 9e-3  # 4.6e-3 (4.4e-3)
CRITIC_TOLERANCE = 1e-2  # 6.1e-3 (6.4e-4): of gradients too, LeakyReLU has kinks as well
# Of the largest term, after five updates of the critic: 1.9e-4 (naive, channels last, k 16 and 32, batch 4, 64^3, on an
# EPYC Zen 3; naive 6.9e-5, fastsrgan's own forms at most 5.6e-5) at RATE, which takes no less time than another. At the
# paper's 1e-4 rounding decides the direction of many of Adam's steps: 5.8e-3 then, as much as a wrong kernel gives.
RATE = 1e-5
LOSS_TOLERANCE = 3.8e-4
# The same where fastsrgan's side computes in bfloat16 or float16. Measured in bfloat16 at k 8 and 16, batch 2, 32^3 on
# an EPYC Zen 3, which emulates it: critic 0.13, the generator's gradients together 0.018, losses after two updates 5e-3
HALF_CRITIC_TOLERANCE, HALF_GRADIENT_TOLERANCE, HALF_LOSS_TOLERANCE = 0.2, 0.035, 9e-3
# Gates that were missed and are wider since: the earlier one, what missed it, why it is no fault.
WIDENED = {
    "critic update": (
        5e-3,
        6.1e-3,
        "a float32 voxel within rounding of a kink of LeakyReLU takes either slope, which moves a small tensor's "
        "gradient by up to a percent of its norm; in float64 both sides are equal to 1e-12 (tests/test_bench.py)",
    )
}
NAIVE, CHANNELS_LAST = "naive", "naive, channels last"
ZERO = 1e-6  # of the largest gradient: a shift in front of an instance norm has a gradient of rounding only
# One setting changed back to its plain form at a time; "as it was" is all of them.
SWITCHES: dict[str, dict[str, Any]] = {
    "explicit penalty": {"penalty": "explicit"},
    "autograd penalty": {"penalty": "autograd"},
    "fakes of each update alone": {"joint_fakes": False},
    "reference form": {"form": "reference"},
}


@dataclass(frozen=True)
class Work(Case):
    """A case whose operations and least memory traffic are known."""

    count: flops.Count = flops.NOTHING

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """The row, with the layer forms of a training, the work that the formulas ask for and what that is of the
        device's ceilings."""
        with forms.job(forms.wanted_mode(otherwise="measured")) as choices:
            row = common.measure(self, args)
        row["layer_forms"] = choices.record()
        if not row["passed"]:
            return row
        top = ceilings(args.device, args.quick)
        row |= {"flop": self.count.flop, "least_bytes": self.count.bytes, "ceilings": top}
        for facts in (row, *(f for f in row["peers"].values() if "seconds_median" in f)):
            seconds = facts["seconds_median"]
            facts["of_matmul_ceiling"] = self.count.flop / seconds / top["matmul_flop_per_second"]
            facts["of_copy_ceiling"] = self.count.bytes / seconds / top["copy_bytes_per_second"]
        return row

    def lines(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The work as usually written over the time: rewrites that save products may exceed the ceiling."""
        told = [f"{row['flop'] / 1e9:.3g} GFLOP as usually written, {row['least_bytes'] / 1e6:.4g} MB at least"]
        for name, facts in (("fastsrgan", row), *row["peers"].items()):
            if "of_matmul_ceiling" in facts:
                matmul, copy = facts["of_matmul_ceiling"], facts["of_copy_ceiling"]
                told.append(f"{name}: {matmul:.0%} of the matmul ceiling, {copy:.0%} of the copy ceiling")
        return told


@functools.cache
def ceilings(device: str, quick: bool) -> dict[str, float]:
    """Best of ten on the device: bytes read and written per second by a large copy, FLOP/s of a float32 product and,
    on CUDA, of a bfloat16 one, which then is the ceiling."""
    cuda = device.startswith("cuda")
    edge, n = (128, 2**20) if quick else (8192, 2**28) if cuda else (2048, 2**26)
    a = torch.ones(n, device=device)
    b = torch.empty_like(a)
    calls: dict[str, Callable[[], list]] = {"copy": lambda: [b.copy_(a)]}
    kinds = {"float32": torch.float32, **({"bfloat16": torch.bfloat16} if cuda else {})}
    for name, kind in kinds.items():
        m = torch.ones((edge, edge), device=device, dtype=kind)
        calls[name] = lambda m=m: [m @ m]  # type: ignore[misc]
    turns = common.take_turns(calls, 10, device)
    best = {name: min(t.seconds for t in turns[name]) for name in calls}
    products = {f"{name}_flop_per_second": 2 * edge**3 / best[name] for name in kinds}
    top = {"copy_bytes_per_second": 8 * n / best["copy"], **products}
    return {**top, "matmul_flop_per_second": max(products.values())}


def cases(args: argparse.Namespace) -> list[Case | common.OwnWay]:
    """Generator passes for every kernel and batch; updates and iteration for every batch of the first kernel."""
    found: list[Case | common.OwnWay] = []
    for kernel, batch in itertools.product(args.kernel, args.batch):
        facts = {"kernel": kernel, "batch": batch, "patch": args.patch}
        layers = flops.generator(kernel, args.patch)
        for name, backward in (("forward", False), ("forward + backward", True)):
            title = f"generator {name}, k {kernel}, batch {batch}, {args.patch}^3"
            build = _generator_sides(kernel, batch, args, backward)
            tolerance = GRADIENT_TOLERANCE if backward else FORWARD_TOLERANCE
            count = (flops.both(layers) if backward else flops.forward(layers)).times(batch)
            found.append(Work(title, facts, build, tolerance, ("patches", float(batch)), l2=backward, count=count))
    for batch in args.batch:
        found += _update_cases(args, batch)
    if args.ranks:
        facts = {"kernel": args.kernel[0], "kernel_dis": args.critic_kernel, "batch": args.batch[0]}
        facts |= {"patch": args.patch, "critic_updates": args.critic_iterations, "ranks": args.ranks}
        where = f"k {args.kernel[0]}, batch {args.batch[0]} per rank, {args.patch}^3"
        found.append(Scaling(f"iteration on {args.ranks} ranks, {where}", facts, args))
    return found


def _update_cases(args: argparse.Namespace, batch: int) -> list[Case]:
    config = TrainConfig(
        new_low_res=((1.0, 1.0, 3.0),),
        kernel_gen=args.kernel[0],
        kernel_dis=args.critic_kernel,
        batch_size=batch,
        patch_size=args.patch,
        critic_iterations=args.critic_iterations,
        lr_gen=RATE,
        lr_dis=RATE,
    )
    dtype = precision.choose(config, torch.device(args.device)).dtype
    half, element = dtype != torch.float32, dtype.itemsize
    g = flops.generator(config.kernel_gen, args.patch, element)
    d = flops.critic(config.kernel_dis, args.patch, element=element)
    where = f"batch {batch}, {args.patch}^3"
    both = f"k {config.kernel_gen} and {config.kernel_dis}"
    n = config.critic_iterations
    of_critic, of_generator, of_losses = (
        (HALF_CRITIC_TOLERANCE, HALF_GRADIENT_TOLERANCE, HALF_LOSS_TOLERANCE)
        if half
        else (CRITIC_TOLERANCE, GRADIENT_TOLERANCE, LOSS_TOLERANCE)
    )
    rows = [
        ("critic update", f"k {config.kernel_dis}", _critic_sides, of_critic, flops.critic_update(d), True),
        ("generator update", both, _generator_update_sides, of_generator, flops.generator_update(g, d), True),
        (f"iteration of {n} + 1", both, _iteration_sides, of_losses, flops.iteration(g, d, n), False),
    ]
    found: list[Case] = []
    for name, kernels, sides, tolerance, count, l2 in rows:
        facts = {"kernel": config.kernel_gen, "kernel_dis": config.kernel_dis, "batch": batch, "patch": args.patch}
        facts |= {"critic_updates": n} if name.startswith("iteration") else {}
        title = f"{name}, {kernels}, {where}"
        build = functools.partial(sides, config, args.device)
        patches = ("patches", float(batch))
        found.append(Work(title, facts, build, tolerance, patches, l2=l2, count=count.times(batch)))
    return found


def _generator_sides(kernel: int, batch: int, args: argparse.Namespace, backward: bool) -> Callable[[], Sides]:
    def build() -> Sides:
        spec = GeneratorSpec(kernel=kernel)
        networks = {form: build_generator(spec, form).to(args.device) for form in ("fast", "reference")}
        plain, last = (naive.NaiveGenerator(kernel).to(args.device) for _ in range(2))
        pairs = plain.paired(networks["fast"])
        naive.copy(pairs)
        naive.copy(last.paired(networks["fast"]))
        naive.channels_last(last)
        data = pool(args.patch, batch, args.device).gather(np.arange(batch))
        fast, reference = networks["fast"], networks["reference"]
        orders: dict[str, tuple[torch.nn.Module, list[Tensor]]] = {
            "fastsrgan": (fast, [ours for ours, _ in pairs]),
            "reference form": (reference, [ours for ours, _ in plain.paired(reference)]),
            NAIVE: (plain, [own for _, own in pairs]),
            CHANNELS_LAST: (last, list(last.parameters())),
        }

        def forward(network: torch.nn.Module) -> list[Tensor]:
            with torch.no_grad():
                return [network(data.x)]

        def both(network: torch.nn.Module, parameters: list[Tensor]) -> list[Tensor]:
            network.zero_grad()
            loss = charbonnier(network(data.x), data.y)
            loss.backward()
            return [loss.detach(), *gradients([cast(Tensor, p.grad) for p in parameters])]

        if backward:
            return {name: lambda n=n, p=p: both(n, p) for name, (n, p) in orders.items()}  # type: ignore[misc]
        return {name: lambda n=n: forward(n) for name, (n, _) in orders.items()}  # type: ignore[misc]

    return build


def _critic_sides(config: TrainConfig, device: str) -> Sides:
    batch = pool(config.patch_size, config.batch_size, device).gather(np.arange(config.batch_size))
    sides: dict[str, dict[str, Any]] = {"fastsrgan": {}, "by hand, library convolutions": {}}
    sides |= {name: changed for name, changed in SWITCHES.items() if "penalty" in changed}
    ours = {name: models(replace(config, **changed), device, Kept()) for name, changed in sides.items()}
    ours["by hand, library convolutions"]._critic_terms = functools.partial(critic_gradients, fast=False)
    plain = naive_trainers(config, ours["fastsrgan"], device)
    draw = torch.Generator().manual_seed(0)
    fake = torch.rand(batch.y.shape, generator=draw).to(batch.y)
    eps = torch.rand(batch.y.shape[:2], generator=draw).to(batch.y)

    def own(m: Models) -> list[Tensor]:
        terms = m.critic_update(batch, fake, eps)
        kept = dict(zip(map(id, m.optimiser_d.parameters[::-1]), cast(Kept, m.ranks).gradients, strict=True))
        return [loss_vector(terms), *gradients([kept[id(p)] for p, _ in plain[NAIVE].critic.paired(m.critic)])]

    def theirs(trainer: naive.NaiveTrainer) -> list[Tensor]:
        terms = trainer.critic_update(batch.y, fake, eps)
        return [loss_vector(terms), *gradients([cast(Tensor, p.grad) for p in trainer.critic.parameters()])]

    return _sides(ours, own, plain, theirs)


def _generator_update_sides(config: TrainConfig, device: str) -> Sides:
    batch = pool(config.patch_size, config.batch_size, device).gather(np.arange(config.batch_size))
    ours = {form: models(replace(config, form=form), device, Kept()) for form in ("fast", "reference")}
    ours = {"fastsrgan": ours["fast"], "reference form": ours["reference"]}
    plain = naive_trainers(config, ours["fastsrgan"], device)
    half = ours["fastsrgan"].arithmetic.dtype != torch.float32

    def compared(found: list[Tensor]) -> list[Tensor]:
        # In half precision rounding is no longer small beside a small tensor's gradient.
        return [torch.cat([g.flatten() for g in found])] if half else gradients(found)

    def own(m: Models) -> list[Tensor]:
        terms = m.generator_update(batch, adversarial=True)
        kept = dict(zip(map(id, m.optimiser_g.parameters[::-1]), cast(Kept, m.ranks).gradients, strict=True))
        return [loss_vector(terms), *compared([kept[id(p)] for p, _ in plain[NAIVE].generator.paired(m.generator)])]

    def theirs(trainer: naive.NaiveTrainer) -> list[Tensor]:
        terms = trainer.generator_update(batch.x, batch.y)
        return [loss_vector(terms), *compared([cast(Tensor, p.grad) for p in trainer.generator.parameters()])]

    return _sides(ours, own, plain, theirs)


def _iteration_sides(config: TrainConfig, device: str) -> Sides:
    """All sides gather their patches from the same pool by the same keys: equal batches, equal interpolations."""
    patches = pool(config.patch_size, config.batch_size, device)
    indices = next(patches.generator_batches(config.batch_size))
    sides: dict[str, dict[str, Any]] = {"fastsrgan": {}, **SWITCHES}
    ours = {name: models(replace(config, **changed), device) for name, changed in sides.items()}
    plain = naive_trainers(config, ours["fastsrgan"], device)

    def draws() -> tuple[list[Batch], list[Tensor]]:
        drawn = patches.critic_indices(0, config.batch_size, config.critic_iterations)
        batches = [patches.gather(i) for i in drawn]
        eps = [
            torch.from_numpy(rng(config.seed, EPOCH, i, "eps").random(b.y.shape[:2], dtype=np.float32)).to(device)
            for i, b in enumerate(batches)
        ]
        return batches, eps

    def own(m: Models) -> list[Tensor]:
        critic = m.critic_updates(*draws())
        generator = m.generator_update(patches.gather(indices), adversarial=True)
        return [loss_vector(critic), loss_vector(generator)]  # read at the end, as in a training

    def theirs(trainer: naive.NaiveTrainer) -> list[Tensor]:
        critic, values = trainer.iteration(*draws(), patches.gather(indices))
        return [loss_vector(critic), loss_vector(values)]

    return _sides(ours, own, plain, theirs)


# --- shared -------------------------------------------------------------------------------------------------------


def _sides(
    ours: Mapping[str, Models],
    own: Callable[[Models], list[Tensor]],
    plain: Mapping[str, naive.NaiveTrainer],
    theirs: Callable[[naive.NaiveTrainer], list[Tensor]],
) -> Sides:
    """name -> call, ours first."""
    found: dict[str, Callable[[], list[Tensor]]] = {name: functools.partial(own, m) for name, m in ours.items()}
    return found | {name: functools.partial(theirs, trainer) for name, trainer in plain.items()}


class Kept(Ranks):
    """The gradients of the last optimiser step, which it hands over for averaging."""

    gradients: list[Tensor]

    def start_average_(self, tensors: list[Tensor]) -> Callable[[], None]:
        *self.gradients, _ = tensors
        return super().start_average_(tensors)


def models(config: TrainConfig, device: str, ranks: Ranks = ALONE) -> Models:
    """The networks and optimisers that ``fastsrgan train`` makes of a config."""
    return Models(config, 0, torch.device(device), ranks)


def naive_trainers(config: TrainConfig, start: Models, device: str) -> dict[str, naive.NaiveTrainer]:
    """The plain sides, from the same weights."""
    made = {}
    for name in (NAIVE, CHANNELS_LAST):
        generator = naive.NaiveGenerator(config.kernel_gen).to(device)
        critic = naive.NaiveCritic(config.kernel_dis, config.patch_size).to(device)
        naive.copy(generator.paired(start.generator))
        naive.copy(critic.paired(start.critic))
        if name == CHANNELS_LAST:
            naive.channels_last(generator), naive.channels_last(critic)
        made[name] = naive.NaiveTrainer(generator, critic, config.lr_gen, (config.beta1, config.beta2))
    return made


def gradients(found: list[Tensor]) -> list[Tensor]:
    """Gradients; those that are zero but for rounding as zeros."""
    least = ZERO * max(float(g.abs().max()) for g in found)
    return [g if float(g.abs().max()) > least else torch.zeros_like(g) for g in found]


def loss_vector(terms: dict[str, float]) -> Tensor:
    """The loss terms that both sides have, as one vector: differences are then relative to the largest."""
    names = ("total", "wasserstein", "penalty", "reconstruction", "adversarial")
    return torch.tensor([terms[name] for name in names if name in terms], dtype=torch.float64)
