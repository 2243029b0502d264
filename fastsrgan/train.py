"""The training loop: feed -> pool -> step -> validate -> checkpoint (paper section 2; DESIGN section 5).

An epoch passes the generator once over every patch; before each generator update the critic takes
``critic_iterations`` updates on patches drawn uniformly from what is resident. Every random number is keyed by its
place (seed, epoch, group, step), so a run that was stopped anywhere continues to the same bits on the CPU.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsrgan import checkpoint, modelfile, weights
from fastsrgan.config import TrainConfig
from fastsrgan.degrade import Degradation
from fastsrgan.errors import InputError, ModelError, ResourceError, UsageError
from fastsrgan.feed import Feed, PatchRule, epoch_groups, make_resident, resident_limit
from fastsrgan.networks import Critic, CriticSpec, Generator, GeneratorSpec, build_generator
from fastsrgan.pool import Batch, Pool
from fastsrgan.runtime import QUIET, Progress, StopRequest, output_folder, pick_device, provenance, rng, write_json
from fastsrgan.step import critic_loss, generator_loss
from fastsrgan.store import Store, open_store
from fastsrgan.trainlog import RunLog

log = logging.getLogger("fastsrgan")


@dataclass
class Position:
    """Where a run stands: the next step of ``group`` in ``epoch``; ``updates`` generator updates are done."""

    epoch: int = 1
    group: int = 0
    step: int = 0
    updates: int = 0
    best: float | None = None


class Models:
    """Generator, critic, their Adams and the generator's moving average."""

    def __init__(self, config: TrainConfig, mask_classes: int, device: torch.device) -> None:
        self.config, self.device = config, device
        spec = GeneratorSpec(config.network, config.kernel_gen, config.residual, config.conditional, mask_classes)
        self.generator = build_generator(spec, config.form, config.seed)
        if config.zero_head:
            with torch.no_grad():
                self.generator.head[0].zero_()
        self.critic = Critic(
            CriticSpec(config.kernel_dis, config.patch_size, spec.out_channels, config.conditional), config.seed + 1
        )
        self.average: dict[str, Tensor] | None = None
        self.finish()

    def finish(self) -> None:
        """Move to the device and make the optimisers; call again after replacing a network."""
        c = self.config
        self.generator.to(self.device).train()
        self.critic.to(self.device).train()
        self.adam_g = torch.optim.Adam(self.generator.parameters(), c.lr_gen, (c.beta1, c.beta2), eps=1e-8, fused=True)
        self.adam_d = torch.optim.Adam(self.critic.parameters(), c.lr_dis, (c.beta1, c.beta2), eps=1e-7, fused=True)
        if c.ema:
            self.average = {k: v.detach().clone() for k, v in self.generator.named_parameters()}

    def start_from(self, path: str | os.PathLike) -> None:
        """Take over the weights of a file: the generator, and the critic where the file holds a fitting one."""
        generator = weights.load_generator(path, self.config.form)
        if generator.spec != self.generator.spec:
            raise ModelError(
                path, f"holds {generator.spec}, this run trains {self.generator.spec}", "match network, kernel_gen, ..."
            )
        self.generator = generator.requires_grad_(True)
        try:
            critic = weights.load_critic(path)
        except ModelError as error:
            log.info("%s: the critic starts anew", error)
        else:
            if critic.spec == self.critic.spec:
                self.critic = critic.requires_grad_(True)
            else:
                log.info("%s: its critic %s does not fit this run, which starts a new one", path, critic.spec)
        self.finish()

    def critic_update(self, batch: Batch, fake: Tensor, eps: Tensor) -> dict[str, float]:
        """One Adam step of the critic; skipped when the loss is not finite."""
        c = self.config
        terms = critic_loss(self.critic, batch.y, fake, eps, c.lambda_gp, batch.res, c.penalty)
        return self._apply(self.adam_d, self.critic, terms, 0.0)

    def generator_update(self, batch: Batch, adversarial: bool) -> dict[str, float]:
        """One Adam step of the generator and of its moving average; skipped when the loss is not finite."""
        c = self.config
        self.critic.requires_grad_(False)
        terms = generator_loss(
            self.generator,
            self.critic,
            batch.x,
            batch.y,
            lambda_rec=c.lambda_rec,
            lambda_adv=c.lambda_adv if adversarial else 0.0,
            reconstruction=c.reconstruction_loss,
            res=batch.res,
        )
        head = self.generator.head.detach().clone() if c.head_rate != 1 else None
        values = self._apply(self.adam_g, self.generator, terms, c.clip_norm)
        if head is not None:
            with torch.no_grad():
                self.generator.head.lerp_(head, 1 - c.head_rate)
        self.critic.requires_grad_(True)
        if self.average is not None and not values.get("skipped"):
            with torch.no_grad():
                for name, parameter in self.generator.named_parameters():
                    self.average[name].lerp_(parameter, 1 - c.ema)
        return values

    @staticmethod
    def _apply(
        adam: torch.optim.Optimizer, network: torch.nn.Module, terms: dict[str, Tensor], clip: float
    ) -> dict[str, float]:
        adam.zero_grad(set_to_none=True)
        terms["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip or float("inf"))
        values = {k: float(v.detach()) for k, v in terms.items()}
        values["gradient"] = float(norm)
        if not np.isfinite(values["total"]) or not np.isfinite(values["gradient"]):
            return {**values, "skipped": 1.0}
        adam.step()
        return values

    @torch.no_grad()
    def generate(self, batch: Batch) -> Tensor:
        """Fakes for the critic, without a graph."""
        return self.generator(batch.x, batch.res)


@dataclass
class Run:
    """One call of ``train``: everything the loop hands around."""

    folder: Path
    config: TrainConfig
    store: Store
    models: Models
    feed: Feed
    train: list[str]
    test: list[str]
    mask_classes: int
    progress: Progress
    log: RunLog
    position: Position = field(default_factory=Position)
    snapshot_folder: Path | None = None
    bad: int = 0


def train(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    config: TrainConfig,
    *,
    device: str = "auto",
    start_weights: str | os.PathLike | None = None,
    resume: bool = False,
    strict: bool = False,
    snapshot_folder: str | os.PathLike | None = None,
    dice_file: str | os.PathLike | None = None,
    mse_file: str | os.PathLike | None = None,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Train a generator and critic on the Train subjects of a store.

    Parameters
    ----------
    source : store made by ``fastsrgan convert`` (folder or URL)
    folder : run folder; gets config.yaml, log.jsonl, dice.csv, mse.csv, checkpoints/, model.safetensors
    start_weights : Keras HDF5, safetensors or run folder to start from
    resume : continue the run in ``folder`` from its newest undamaged snapshot
    snapshot_folder : also write SegSRGAN_epoch_N in the original's HDF5 form
    dice_file, mse_file : where the per-epoch tables go (default: the run folder)

    Returns
    -------
    dict : epochs, updates, seconds, data_wait, best validation, path of the final weights, stopped (signal or None)

    Raises
    ------
    InputError : no Train subjects, no patches; ModelError : weights or snapshot do not fit; ResourceError : memory,
    disk, device, or ``max_bad_steps`` updates in a row that were not finite.
    """
    folder = output_folder(folder)
    if not resume and checkpoint.snapshots(folder):
        raise UsageError(folder, "already holds a run", "--resume continues it, or choose another folder")
    store = open_store(source)
    names = {split: [s.id for s in store.subjects if s.split == split] for split in ("Train", "Test")}
    if not names["Train"]:
        raise InputError(store.url, "has no Train subjects", "give rows with Base = Train to `fastsrgan convert`")
    target = pick_device(device)
    mask_classes = count_mask_classes(store, names["Train"]) if config.fit_mask else 0
    models = Models(config, mask_classes, target)
    if start_weights is not None and not resume:
        models.start_from(start_weights)
    degradation = Degradation(config.new_low_res, config.contrast_max, config.noise, config.geometry)
    rule = PatchRule(config.patch_size, config.stride, config.image_cropping_method == "overlapping_with_mask")
    feed = Feed(store, degradation, rule, seed=config.seed, device=target, strict=strict)
    run_log = RunLog(folder, dice_file, mse_file, mask_classes)
    run = Run(folder, config, store, models, feed, names["Train"], names["Test"], mask_classes, progress, run_log)
    run.position.epoch = config.init_epoch
    run.snapshot_folder = output_folder(snapshot_folder) if snapshot_folder else None
    if resume:
        load(run)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf8")
    began = time.perf_counter()
    with StopRequest() as stop:
        loop(run, stop)
    seconds = time.perf_counter() - began
    return summary(run, seconds, stop)


def count_mask_classes(store: Store, subjects: list[str]) -> int:
    """Classes of the masks: one more than the largest value in them."""
    largest = 0
    for name in subjects:
        mask = store.read(name).mask
        if mask is None:
            raise InputError(name, "has no mask", "fit_mask needs Mask_image for every subject")
        largest = max(largest, int(mask.max()))
    return largest + 1


def plan(run: Run, size: int) -> Iterator[tuple[int, list[str]]]:
    """(epoch, subjects) of every group still to do, from the run's position on."""
    first = run.position
    for epoch in range(first.epoch, run.config.epochs + 1):
        groups = epoch_groups(run.train, run.config.seed, epoch, size)
        yield from ((epoch, g) for g in groups[first.group if epoch == first.epoch else 0 :])


def loop(run: Run, stop: StopRequest) -> None:
    """All epochs from the run's position on; ends early at a stop request, after a snapshot."""
    c, at = run.config, run.position
    size = c.resident_subjects or resident_limit(run.store, run.train)
    # The plan is read ahead of the position, so it is fixed before the position moves.
    ahead = list(plan(run, size))
    residents = run.feed.groups(iter(ahead))
    for index, (epoch, _) in enumerate(ahead):
        pool_residents = next(residents)
        last_of_epoch = index + 1 == len(ahead) or ahead[index + 1][0] != epoch
        if pool_residents:
            pool = Pool(
                pool_residents, c.patch_size, mask_classes=run.mask_classes, seed=c.seed, epoch=epoch, group=at.group
            )
            run_group(run, pool, epoch, stop)
        if stop:
            save(run)
            return
        at.group, at.step = at.group + 1, 0
        if last_of_epoch:
            finish_epoch(run, epoch)
            at.epoch, at.group = epoch + 1, 0
            if epoch % c.snapshot == 0 or epoch == c.epochs:
                save(run)
                export_snapshot(run, epoch)
    if at.updates == 0:
        raise InputError(
            run.store.url,
            f"its patches do not fill one batch of {c.batch_size}",
            "lower batch_size, patch_size or stride",
        )


def run_group(run: Run, pool: Pool, epoch: int, stop: StopRequest) -> None:
    """The generator's pass over one group of residents, critic updates before each of its updates."""
    c, at = run.config, run.position
    steps = pool.steps(c.batch_size)
    if c.steps_per_epoch is not None:
        steps = min(steps, c.steps_per_epoch)
    run.progress.start(f"epoch {epoch}/{c.epochs}", (steps - at.step) * c.batch_size, "patches")
    adversarial = epoch > c.warmup_epochs and c.lambda_adv > 0
    for indices in pool.generator_batches(c.batch_size, at.step):
        if at.step >= steps or stop:
            break
        began, facts = time.perf_counter(), {}
        if adversarial:
            facts = critic_steps(run, pool, epoch)
        batch = pool.gather(indices)
        values = run.models.generator_update(batch, adversarial)
        facts.update({f"g_{k}": v for k, v in values.items()})
        count_bad(run, facts, batch)
        at.step += 1
        at.updates += 1
        seconds = time.perf_counter() - began
        run.log.step(epoch, at.updates, seconds, run.feed.waited, facts)
        shown = {"rec": facts["g_reconstruction"], "W": facts.get("d_wasserstein"), "gp": facts.get("d_penalty")}
        run.progress.advance(c.batch_size, **{k: v for k, v in shown.items() if v is not None})
    run.progress.finish()


def critic_steps(run: Run, pool: Pool, epoch: int) -> dict[str, float]:
    """The critic updates before one generator update; the generator stands still meanwhile. Means of their losses."""
    c, at = run.config, run.position
    channels = 2 + run.mask_classes
    rows = []
    for i, indices in enumerate(pool.critic_indices(at.step, c.batch_size, c.critic_iterations)):
        batch = pool.gather(indices)
        shape = (c.batch_size, channels) if c.eps_per_channel else (c.batch_size,)
        eps = rng(c.seed, epoch, at.group, at.step, i, "eps").random(shape, dtype=np.float32)
        rows.append(
            run.models.critic_update(batch, run.models.generate(batch), torch.from_numpy(eps).to(batch.y.device))
        )
    return {f"d_{k}": float(np.mean([r.get(k, 0.0) for r in rows])) for k in {k for r in rows for k in r}}


def count_bad(run: Run, facts: dict[str, float], batch: Batch) -> None:
    """Count updates that were not finite; raise ResourceError after ``max_bad_steps`` in a row."""
    if not facts.get("g_skipped") and not facts.get("d_skipped"):
        run.bad = 0
        return
    run.bad += 1
    log.warning(
        "update %d is not finite and was skipped (%d in a row): %s", run.position.updates, run.bad, batch.ids[:4]
    )
    if run.bad >= run.config.max_bad_steps:
        write_json(
            run.folder / "bad_batch.json", {"facts": facts, "patches": batch.ids, "position": vars(run.position)}
        )
        raise ResourceError(
            run.folder,
            f"{run.bad} updates in a row were not finite",
            "the last good snapshot is in checkpoints/, the patches are in bad_batch.json; lower the learning rates",
        )


@torch.inference_mode()
def validate(run: Run) -> dict[str, float]:
    """Patch-wise scores on the Test subjects (paper figure 6): Dice over all patches, MSE of SR clipped at 0.

    Contrast and resolution are spaced evenly over the subjects, as in the original. With a mask head, also the Dice of
    each mask class. Empty when there are no Test subjects.
    """
    c, total = run.config, None
    generator = evaluation_generator(run.models)
    for index, name in enumerate(run.test):
        draw = run.feed.degradation.linspace(index, len(run.test))
        resident = make_resident(run.store.read(name), run.feed.degradation, draw, run.feed.rule, run.models.device)
        pool = Pool([resident], c.patch_size, mask_classes=run.mask_classes)
        for start in range(0, len(pool), c.batch_size):
            batch = pool.gather(np.arange(start, min(start + c.batch_size, len(pool))))
            sums = validation_sums(generator(batch.x, batch.res), batch.y)
            total = sums if total is None else total + sums
    if total is None:
        return {}
    squared, count, *rest = total.tolist()
    scores = {"MSE": squared / count}
    dices = [2 * both / max(a + b, 1) for both, a, b in zip(rest[::3], rest[1::3], rest[2::3], strict=True)]
    labels = ["Dice"] if len(dices) == 1 else ["Dice_label_1", *(f"Dice_mask{i}" for i in range(len(dices) - 1))]
    return {**dict(zip(labels, dices, strict=True)), **scores}


def validation_sums(pred: Tensor, target: Tensor) -> Tensor:
    """Squared error and voxels, then overlap and sizes of each binary channel: (2 + 3 (C - 1),) float64."""
    error = ((pred[:, 0].clamp(min=0) - target[:, 0]) ** 2).double().sum()
    parts = [error, torch.tensor(float(target[:, 0].numel()), dtype=torch.double, device=pred.device)]
    for channel in range(1, pred.shape[1]):
        p, y = (pred[:, channel] > 0.5).double(), target[:, channel].double()
        parts += [(p * y).sum(), p.sum(), y.sum()]
    return torch.stack([part.to(torch.double) for part in parts])


def evaluation_generator(models: Models) -> Generator:
    """The generator that is validated and shipped: the moving average where there is one."""
    if models.average is None:
        return models.generator
    return modelfile.assemble(models.generator.spec, models.average, models.generator.form)


def finish_epoch(run: Run, epoch: int) -> None:
    """Validate, log, and keep the weights that are best on the Test subjects, as the paper does."""
    at = run.position
    scores = validate(run) if run.test and epoch % run.config.validate_every == 0 else {}
    if scores:
        run.log.epoch(epoch, scores)
        dice = scores.get("Dice", scores.get("Dice_label_1", 0.0))
        if at.best is None or dice > at.best:
            at.best = float(dice)
            write_weights(run, run.folder / "best.safetensors", {"epoch": epoch, **scores})
    write_weights(run, run.folder / "model.safetensors", {"epoch": epoch, **scores})


def write_weights(run: Run, path: Path, facts: dict[str, Any]) -> None:
    """The weights for use, with the facts a reader of the file wants."""
    card = {**facts, "updates": run.position.updates, "config": run.config.to_dict(), **provenance()}
    weights.save_generator(path, evaluation_generator(run.models), run.models.critic, card=card)


def export_snapshot(run: Run, epoch: int) -> None:
    """The original's snapshot file, when a folder for it was named."""
    if run.snapshot_folder is not None:
        target = run.snapshot_folder / f"SegSRGAN_epoch_{epoch}"
        weights.export_keras(run.folder / "model.safetensors", target, overwrite=True)


def save(run: Run) -> None:
    """A snapshot of everything that the run needs to go on."""
    m, at = run.models, run.position
    state = {"adam_g": m.adam_g.state_dict(), "adam_d": m.adam_d.state_dict(), "position": vars(at)}
    writers = {
        "model.safetensors": lambda p: modelfile.write(
            p, m.generator, m.critic, ema=m.average, card={"updates": at.updates}
        ),
        "state.pt": lambda p: torch.save(state, p),
        "config.yaml": lambda p: p.write_text(run.config.to_yaml(), encoding="utf8"),
    }
    checkpoint.write(run.folder, at.updates, writers, {"epoch": at.epoch})
    checkpoint.prune(run.folder, run.config.keep_checkpoints)


def load(run: Run) -> None:
    """Continue from the newest undamaged snapshot of the run folder."""
    snapshot = checkpoint.newest(run.folder)
    m = run.models
    spec, parameters = modelfile.read_parameters(snapshot / "model.safetensors", "generator")
    if spec != m.generator.spec:
        raise ModelError(
            snapshot, f"holds {spec}, the settings ask for {m.generator.spec}", "resume with the run's own settings"
        )
    m.generator = modelfile.assemble(spec, parameters, run.config.form).requires_grad_(True)
    critic_spec, parameters = modelfile.read_parameters(snapshot / "model.safetensors", "critic")
    m.critic = modelfile.assemble(critic_spec, parameters).requires_grad_(True)
    m.finish()
    if m.average is not None:
        _, average = modelfile.read_parameters(snapshot / "model.safetensors", "ema")
        m.average = {k: v.to(m.device) for k, v in average.items()}
    state = torch.load(snapshot / "state.pt", map_location=m.device, weights_only=True)
    m.adam_g.load_state_dict(state["adam_g"])
    m.adam_d.load_state_dict(state["adam_d"])
    run.position = Position(**state["position"])
    run.log.cut(run.position.updates, run.position.epoch)
    log.info("continuing %s at epoch %d, update %d", snapshot, run.position.epoch, run.position.updates)


def summary(run: Run, seconds: float, stop: StopRequest) -> dict[str, Any]:
    """What the run did, for the caller and for RUN/summary.json."""
    facts = {
        "epochs": min(run.position.epoch, run.config.epochs + 1) - run.config.init_epoch,
        "updates": run.position.updates,
        "seconds": round(seconds, 3),
        "data_wait_seconds": round(run.feed.waited, 3),
        "best_dice": run.position.best,
        "weights": str(run.folder / "model.safetensors"),
        "left_out": run.feed.quarantined,
        "device": str(run.models.device),
        "stopped": stop.signal,
        "exit_code": stop.code,
        "provenance": provenance(),
    }
    write_json(run.folder / "summary.json", facts)
    return facts
