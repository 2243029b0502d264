"""Generator and critic in training: their optimisers, the generator's moving average, one update of each, and which
batch of patches the memory has room for."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsrgan.config import TrainConfig
from fastsrgan.core.kernels import set_rounding
from fastsrgan.core.ranks import ALONE, Ranks
from fastsrgan.core.system import free_memory, peak_memory
from fastsrgan.data.pool import Batch
from fastsrgan.data.subject import PatchRule
from fastsrgan.errors import ModelError, ResourceError, UsageError, counted, human, out_of_memory
from fastsrgan.model import weights
from fastsrgan.model.compiled import CompiledJob, proven, turned_on, whole
from fastsrgan.model.cpu.rearranged import held
from fastsrgan.model.networks import Critic, CriticSpec, Generator, GeneratorSpec, assemble, build_generator, describe
from fastsrgan.train import precision
from fastsrgan.train.critic_step import critic_gradients, parameters, score
from fastsrgan.train.objectives import agreed_patches, critic_loss, generator_loss
from fastsrgan.train.optimise import Optimiser

log = logging.getLogger("fastsrgan")

GENERATOR_CHUNK = {"cpu": 4, "cuda": 64}  # patches of a pass without gradients at a time
Terms = dict[str, Tensor]
Data = tuple[Tensor, Tensor, Tensor, float, Tensor]  # real, fake, eps, weight of the penalty, resolution


def generator_spec(config: TrainConfig, mask_classes: int = 0) -> GeneratorSpec:
    """The generator that the settings ask for."""
    return GeneratorSpec(
        *(config.network, config.kernel_gen, config.residual, config.conditional, mask_classes, config.scaled),
        shifted=config.physical,
    )


def settings_of(spec: GeneratorSpec | CriticSpec | None) -> dict[str, Any]:
    """The settings that ask for a network which weights hold; none for no network."""
    if not isinstance(spec, GeneratorSpec):
        return {} if spec is None else {"kernel_dis": spec.kernel}
    asked = {"network": spec.network, "kernel_gen": spec.kernel, "fit_mask": spec.mask_classes > 0}
    return asked | {name: getattr(spec, name) for name in ("residual", "conditional", "scaled")}


def differences(held: GeneratorSpec, wanted: GeneratorSpec) -> tuple[str, str]:
    """Reason and hint of an error about a generator that is not the one the settings ask for, setting by setting."""
    names = {"kernel": "kernel_gen", "mask_classes": "classes of the masks"}
    then, now = held.to_dict(), wanted.to_dict()
    told = [(names.get(key, key), then[key], now[key]) for key in then if then[key] != now[key]]
    reason = f"its network has other settings: {', '.join(f'{name} {a}, not {b}' for name, a, b in told)}"
    hint = f"give the same {', '.join(name for name, *_ in told)}, or begin a run without these weights"
    return reason, hint


def wanted(config: TrainConfig, device: torch.device) -> bool:
    """Whether the parts of a training step are compiled on this device.

    Double backward cannot be compiled: with ``penalty: autograd`` "auto" is off. Raises ResourceError when "on" was
    asked for where it cannot be.
    """
    if config.penalty == "autograd":
        if config.compile == "on":
            raise ResourceError("--compile", "double backward cannot be compiled", "--penalty manual, or --compile off")
        return False
    return turned_on(config.compile, device)


def compiled(
    function: Callable,
    config: TrainConfig,
    device: torch.device,
    backend: Any = "inductor",
    job: CompiledJob | None = None,
) -> Callable:
    """``function``, compiled whole where ``wanted``. Gradients of micro-batches add up: they go without CUDA graphs.

    With "auto", a compiler that fails is named in the log and the function runs as it is; with "on" the error is a
    ResourceError.
    """
    if not wanted(config, device):
        return function
    return whole(function, device, config.compile == "on", backend, config.accumulate == 1, job)


class Models:
    """Generator, critic, their optimisers and the generator's moving average.

    Parameters
    ----------
    config : settings of networks, losses, optimisers and arithmetic
    mask_classes : softmax channels behind SR and segmentation
    device : where all of it lives
    ranks : the processes whose gradients are averaged, once per optimiser step
    kept_precision : what "auto" stands for where a run goes on from a snapshot: that one's

    Raises
    ------
    ResourceError : the device cannot compute as asked, or computes wrongly (precision.self_test)
    """

    def __init__(
        self,
        config: TrainConfig,
        mask_classes: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        kept_precision: str | None = None,
    ) -> None:
        self.config, self.device, self.ranks = config, device, ranks
        self.arithmetic = precision.choose(config, device, kept_precision)
        if not self.arithmetic.proven:
            precision.self_test(self.arithmetic)
        fast, strict = config, config.compile == "on"
        on_cuda = device.type == "cuda" and wanted(config, device)
        if on_cuda and not proven(lambda: precision.self_test(self.arithmetic, compiled=True), strict):
            fast = config.replace(compile="off")
        self.static = wanted(fast, device)  # batches are filled up to one size: each other one would be compiled anew
        spec = generator_spec(config, mask_classes)
        self.generator = build_generator(spec, config.form, config.seed)
        if config.zero_head:
            with torch.no_grad():
                self.generator.head[0].zero_()
        judged = CriticSpec(config.kernel_dis, PatchRule.of(config).patch, spec.out_channels, spec.conditional)
        self.critic = Critic(judged, config.seed + 1)
        self.average: dict[str, Tensor] | None = None
        self.critic_count = 0  # critic updates done, which the lazy penalty counts by
        by_job = functools.partial(compiled, config=fast, device=device, job=CompiledJob())
        self._fakes, self._generator_terms = by_job(self._forward), by_job(self._generator_loss)
        self._critic_terms, self._explicit_terms = by_job(critic_gradients), by_job(critic_loss)
        self.joint_fakes = config.joint_fakes and ranks.world == 1
        self.critic_iterations, self.micro_batches = config.critic_iterations, config.accumulate
        self.batch = batch_of_rank(config, ranks)
        self.finish()

    def finish(self) -> None:
        """Move to the device and make the optimisers; call again after replacing a network."""
        c, scaled = self.config, self.arithmetic.scaled
        for network in (self.generator, self.critic):
            self.arithmetic.arrange(network.train())
        if self.arithmetic.device.type == "cuda":
            set_rounding(self.arithmetic.tf32)
            torch.backends.cudnn.benchmark = True  # patches have one size: each layer is timed once, then the fastest
        betas = (c.beta1, c.beta2)
        more: dict[str, Any] = {"scaled": scaled, "ranks": self.ranks}
        self.optimiser_g = Optimiser(self.generator, c.lr_gen, betas, 1e-8, clip=c.clip_norm, **more)
        self.optimiser_d = Optimiser(self.critic, c.lr_dis, betas, 1e-7, **more)
        if c.ema:
            self.average = {k: v.detach().clone() for k, v in self.generator.named_parameters()}

    def start_from(self, path: str | os.PathLike) -> None:
        """Take over the weights of a file: the generator, and the critic where the file holds a fitting one."""
        generator = weights.load_generator(path, self.config.form)
        if generator.spec != self.generator.spec:
            raise ModelError(path, *differences(generator.spec, self.generator.spec))
        generator.spec = self.generator.spec  # what this training does to values below 0 holds from here on
        self.generator = generator.requires_grad_(True)
        tell = log.info if self.config.lambda_adv else log.debug  # without its loss there is no use of a critic
        try:
            critic = weights.load_critic(path)
        except ModelError as error:
            tell("%s: the critic starts anew", error)
        else:
            if critic.spec == self.critic.spec:
                self.critic = critic.requires_grad_(True)
            else:
                told = "%s: its critic, %s, does not fit this run, which starts a new one"
                tell(told, path, describe(critic.spec))
        self.finish()

    def set_rates(self, factor: float) -> None:
        """Both learning rates as a fraction of their first value."""
        self.optimiser_g.set_rate(factor)
        self.optimiser_d.set_rate(factor)

    def eps_shape(self, patches: int) -> tuple[int, ...]:
        """Of the random numbers of a critic update: one for each patch, or for each of its channels."""
        channels = (self.generator.spec.out_channels,) if self.config.eps_per_channel else ()
        return patches, *channels

    def adversarial(self, epoch: int) -> bool:
        """Whether the critic learns, and the generator from it, in an epoch."""
        return epoch > self.config.warmup_epochs and self.config.lambda_adv > 0

    def try_iteration(self, patches: int) -> None:
        """One iteration on random patches."""
        p, channels = self.critic.spec.patch, self.generator.spec.out_channels
        x = torch.rand((patches, 1, p, p, p), device=self.device)
        y = torch.rand((patches, channels, p, p, p), device=self.device)
        batch = Batch(x, y, torch.ones(patches, device=self.device), ["trial"] * patches)
        eps = torch.rand(self.eps_shape(patches), device=self.device)
        self.critic_updates([batch] * self.critic_iterations, [eps] * self.critic_iterations)
        self.generator_update(batch, self.config.lambda_adv > 0)

    # --- critic -------------------------------------------------------------------------------------------------------

    def critic_updates(self, batches: list[Batch], eps: Sequence[Tensor]) -> Means:
        """All critic updates of an iteration; the generator stands still, so one pass of it makes all fakes.

        With several ranks it makes those of each update alone, while the gradients of the one before travel.
        ``eps``: (B,) or (B, C) for each batch. Returns the means of total, wasserstein, penalty (where it was computed)
        and gradient over the updates, and the share that was skipped, if any was.
        """
        fakes: Iterator[Tensor] = map(self.generate, batches)  # each when its turn comes
        if self.joint_fakes:
            agree = None if batches[0].agree is None else torch.cat([b.agree for b in batches])  # type: ignore[misc]
            x, res = (torch.cat([getattr(b, name) for b in batches]) for name in ("x", "res"))
            together = Batch(x, batches[0].y, res, [], agree)
            fakes = iter(self.generate(together).split([len(b.x) for b in batches]))
        rows: list[Terms] = []
        apply: Callable[[], Terms] = dict  # there is no update before the first one
        for batch, fake, e in zip(batches, fakes, eps, strict=True):
            rows.append(apply())
            apply = self._critic_gradients(batch, fake, e)
        return Means([*rows, apply()])

    def critic_update(self, batch: Batch, fake: Tensor, eps: Tensor) -> Means:
        """One Adam step of the critic; skipped where the loss or its gradient is not finite."""
        return Means([self._critic_gradients(batch, fake, eps)()])

    def _critic_gradients(self, batch: Batch, fake: Tensor, eps: Tensor) -> Callable[[], Terms]:
        """Send the gradients of an update to the other ranks; what is returned waits for theirs and takes the step."""
        c, o = self.config, self.optimiser_d
        weight = c.lambda_gp * c.penalty_every if self.critic_count % c.penalty_every == 0 else 0.0
        self.critic_count += 1
        rows = []
        for part, share in self._parts(len(batch.x)):
            data: Data = (batch.y[part], fake[part], eps[part], weight, batch.res[part])
            scale = share if o.scale is None else share * o.scale
            by_hand = c.penalty in ("auto", "manual")
            terms = (self._by_hand if by_hand else self._by_autograd)(data, scale)
            rows.append({k: share * v.detach() for k, v in terms.items()})
        terms = _summed(rows)
        o.send(terms["total"])
        terms["penalty"] = terms["penalty"] / c.penalty_every
        kept = {k: v for k, v in terms.items() if weight or k != "penalty"}
        return lambda: {**kept, **o.step()}

    @property
    def _half(self) -> torch.dtype | None:
        """The type that the critic is computed in by hand, where it is not that of its weights."""
        return self.arithmetic.dtype if self.arithmetic.dtype != torch.float32 else None

    def _by_hand(self, data: Data, scale: Tensor | float) -> Terms:
        terms, gradients = self._critic_terms(self.critic, *data, dtype=self._half, scale=scale)
        for parameter, gradient in zip(parameters(self.critic), gradients, strict=True):
            if parameter.grad is not None:
                parameter.grad += gradient
            elif gradient.stride() == parameter.stride() and self.joint_fakes:
                parameter.grad = gradient
            else:  # a copy, also where the next fakes are made before the step: their graph would overwrite it
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
        return terms

    def _by_autograd(self, data: Data, scale: Tensor | float) -> Terms:
        with self.arithmetic.autocast():
            if self.config.penalty == "autograd":
                terms = critic_loss(self.critic, *data, penalty="autograd")
            else:
                terms = self._explicit_terms(self.critic, *data)
        (terms["total"] * scale).backward()  # sent by ``send``: the first layer's bias, of the first group, comes last
        return terms

    # --- generator ----------------------------------------------------------------------------------------------------

    def generator_update(self, batch: Batch, adversarial: bool) -> Means:
        """One Adam step of the generator and of its moving average; skipped where a number is not finite."""
        c, o = self.config, self.optimiser_g
        self.critic.requires_grad_(False)
        rows = []
        # With a critic of two kinds, with its penalty and without, a job's compilations are for what comes after.
        warming = not adversarial and c.lambda_adv > 0 and c.penalty_every > 1
        loss = self._generator_loss if warming else self._generator_terms
        parts = list(self._filled(batch))
        for i, (x, y, res, agree, of_samples, share) in enumerate(parts, 1):
            terms = loss(x, y, res, adversarial, of_samples, agree)
            o.backward(terms["total"] * (share if o.scale is None else share * o.scale), last=i == len(parts))
            rows.append({k: share * v.detach() for k, v in terms.items()})
        self.critic.requires_grad_(True)
        terms = _summed(rows)
        head = self.generator.head.detach().clone() if c.head_rate != 1 else None
        o.send(terms["total"])
        told = o.step()
        with torch.no_grad():
            if head is not None:
                self.generator.head.lerp_(head, 1 - c.head_rate)
            if self.average is not None:
                weight = (1 - c.ema) * (1 - told["skipped"] - told.get("overflow", 0))
                for name, parameter in self.generator.named_parameters():
                    self.average[name].lerp_(parameter, weight.to(parameter.dtype))
        return Means([{**terms, **told}])

    def _generator_loss(
        self,
        x: Tensor,
        y: Tensor,
        res: Tensor,
        adversarial: bool,
        weights: Tensor | None = None,
        agree: Tensor | None = None,
    ) -> Terms:
        c = self.config
        plain = c.penalty in ("explicit", "autograd")
        with self.arithmetic.autocast():
            return generator_loss(
                *(self.generator, self.critic, x, y),
                lambda_rec=c.lambda_rec,
                lambda_adv=c.lambda_adv if adversarial else 0.0,
                reconstruction=c.reconstruction_loss,
                dice_weight=c.dice_weight,
                res=res,
                weights=weights,
                agree=agree,
                score=Critic.__call__ if plain else functools.partial(score, dtype=self._half),
            )

    def shipped(self) -> Generator:
        """The generator that is validated and shipped: the moving average where there is one."""
        if self.average is None:
            return self.generator
        return assemble(self.generator.spec, self.average, self.generator.form)

    @torch.no_grad()
    def generate(self, batch: Batch) -> Tensor:
        """Fakes for the critic, without a graph: (B, 2 + classes, P, P, P) of the type of ``batch.x``, in chunks."""
        most = self.config.generator_chunk or GENERATOR_CHUNK[self.device.type]
        size = math.ceil(len(batch.x) / math.ceil(len(batch.x) / most))  # equal chunks are one shape to compile
        fakes = None
        with held() if self.device.type == "cpu" else contextlib.nullcontext():
            for at in range(0, len(batch.x), size):
                part = slice(at, min(at + size, len(batch.x)))
                seen = (_part(t, part, size if self.static else 0) for t in (batch.x, batch.res, batch.agree))
                made = self._fakes(*seen)[: part.stop - at]
                if fakes is None:
                    fakes = batch.x.new_empty(len(batch.x), *made.shape[1:])
                fakes[part] = made
        assert fakes is not None
        return fakes

    def _forward(self, x: Tensor, res: Tensor, agree: Tensor | None = None) -> Tensor:
        with self.arithmetic.autocast():
            return agreed_patches(self.generator(x, res), x, agree)

    # --- shared -------------------------------------------------------------------------------------------------------

    def _parts(self, n: int) -> list[tuple[slice, float]]:
        """Slices of the micro-batches of ``n`` patches, and the share of each in their mean."""
        size = math.ceil(n / self.micro_batches)
        return [(slice(i, min(i + size, n)), min(size, n - i) / n) for i in range(0, n, size)]

    def _filled(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float]]:
        """The micro-batches of a generator update: x, y, res, agree, weights of their samples, share of the batch.

        Where they are compiled, all are of one size whatever the batch's: repeated samples of weight 0 fill them up.
        """
        n, size = len(batch.x), math.ceil(self.batch / self.micro_batches)
        given = batch.x, batch.y, batch.res, batch.agree
        if not self.static or n > size * self.micro_batches:
            for part, share in self._parts(n):
                x, y, res, agree = (_part(t, part) for t in given)
                yield x, y, res, agree, None, share
            return
        for at in range(0, n, size):
            part = slice(at, min(at + size, n))
            count = part.stop - at
            weights = (torch.arange(size, device=batch.x.device) < count).to(batch.x.dtype) / count
            x, y, res, agree = (_part(t, part, size) for t in given)
            yield x, y, res, agree, weights, count / n

    def state(self) -> dict[str, Any]:
        """What the next update depends on besides networks and moving average."""
        return {
            "generator": self.optimiser_g.state(),
            "critic": self.optimiser_d.state(),
            "critic_count": self.critic_count,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave."""
        self.optimiser_g.load_state(state["generator"])
        self.optimiser_d.load_state(state["critic"])
        self.critic_count = state["critic_count"]


def _summed(rows: list[Terms]) -> Terms:
    return {k: sum((r[k] for r in rows[1:]), rows[0][k]) for k in rows[0]}


def _part(x: Tensor | None, part: slice, size: int = 0) -> Any:
    """Samples of (n, ...): over and over up to ``size`` of them, where that is more."""
    if x is None or size <= len(x[part]):
        return None if x is None else x[part]
    return x[part][torch.arange(size, device=x.device) % len(x[part])]


class Means(Mapping[str, float]):
    """Means over updates of each of their terms, over those that have it, read when they are first asked for.

    Until then nobody waits for the device: it writes them to the host behind the work that is queued.
    """

    def __init__(self, rows: list[Terms]) -> None:
        self._names = list(dict.fromkeys(k for row in rows for k in row))
        means = [torch.stack([row[k].double() for row in rows if k in row]).mean() for k in self._names]
        self._numbers = torch.stack(means).to("cpu", non_blocking=True)  # pinned memory, where they come from CUDA
        self._there = torch.cuda.Event() if means[0].is_cuda else None
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(means[0].device))

    @functools.cached_property
    def _values(self) -> dict[str, float]:
        """Where no update was skipped, nothing is said of it."""
        if self._there is not None:
            self._there.synchronize()
        found = zip(self._names, self._numbers.tolist(), strict=True)
        return {k: v for k, v in found if v or k not in ("skipped", "overflow")}

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


# --- batch and memory -------------------------------------------------------------------------------------------------


def batch_of_rank(config: TrainConfig, ranks: Ranks) -> int:
    """Patches per update of each rank. Raises UsageError where the batch cannot be shared out."""
    if config.batch_size % ranks.world:
        reason = f"{counted(config.batch_size, 'patch is', 'patches are')} not divided by {ranks.world} ranks"
        raise UsageError("batch_size", reason, f"a multiple of {ranks.world}: it counts the patches of all ranks")
    return config.batch_size // ranks.world


def least_bytes(config: TrainConfig, mask_classes: int, batch: int) -> int:
    """What no step can do without: ``batch`` patches with their truth, and of a part of them the first features."""
    channels = batch * (1 + 2 + mask_classes) + -(-batch // config.accumulate) * config.kernel_gen
    return 4 * channels * PatchRule.of(config).patch ** 3


def fits(config: TrainConfig, mask_classes: int, device: torch.device, batch: int) -> bool:
    """Whether one iteration with ``batch`` patches runs in the memory there is, on networks made for the trial."""
    if device.type == "cpu" and least_bytes(config, mask_classes, batch) > free_memory():
        return False  # the system would end the process rather than refuse the memory
    trial = None
    try:
        trial = Models(config, mask_classes, device)
        trial.try_iteration(batch)
        return True
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        del trial
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def refuse_hopeless(config: TrainConfig, mask_classes: int, device: torch.device, ranks: Ranks) -> None:
    """Raise ResourceError where a batch's patches alone are more than a CPU's memory: it would end without a word."""
    own = batch_of_rank(config, ranks)
    least, free = least_bytes(config, mask_classes, own), free_memory() // ranks.local_world
    if device.type == "cpu" and least > free:
        size, fewer = f"of {PatchRule.of(config).patch} voxels", own * free // least * ranks.world
        what = counted(config.batch_size, f"patch {size} needs", f"patches {size} need")
        reason = f"{what} more than {human(least)} on each rank, {human(free)} are free"
        raise ResourceError("--batch-size", reason, f"below {fewer}, or --auto-batch True")


def with_fitting_batch(
    config: TrainConfig, mask_classes: int, device: torch.device, ranks: Ranks, then: TrainConfig | None = None
) -> TrainConfig:
    """The settings with the batch that fits (``auto_batch``); a run that goes on keeps the one of ``then``."""
    size = then.batch_size if then else batch_that_fits(config, mask_classes, device, ranks)
    if size != config.batch_size:
        why = "--auto-batch keeps the run's" if then else "memory allows"
        log.warning("batch_size %d: %s %d", config.batch_size, why, size)
    return config.replace(batch_size=size)


def batch_that_fits(config: TrainConfig, mask_classes: int, device: torch.device, ranks: Ranks) -> int:
    """The largest of the batch, half of it, a quarter ... (patches of all ranks) whose iteration every rank can run.

    Raises ResourceError where not even one patch per rank fits.
    """
    own = batch_of_rank(config, ranks)
    while True:
        if ranks.minimum(int(fits(config, mask_classes, device, own))):
            return own * ranks.world
        if own == 1:
            reason = "no memory for a batch of one patch"
            raise ResourceError(str(device), reason, "a smaller --patch-size or --kernel-gen")
        own //= 2


def memory_error(models: Models, told: str) -> ResourceError:
    """What ran out, the measured peak, and the largest batch that fits, found by trying."""
    device, own, world = models.device, models.batch // 2, models.ranks.world
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} of {total / 1e9:.1f} GB were in use"
    else:
        peak = f"the process held {peak_memory() / 1e9:.1f} GB"
    while own and not fits(models.config, models.generator.spec.mask_classes, device, own):
        own //= 2
    hint = "a smaller --patch-size or --kernel-gen"
    if own:
        more = -(-models.batch // own) * models.micro_batches
        hint = f"--batch-size {own * world} fits, or --accumulate {more}; also --auto-batch True"
    log.debug("%s", told)
    size = counted(models.batch * world, "patch", "patches")
    return ResourceError(str(device), f"out of memory at a batch of {size}, {peak}", hint)
