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

from fastsrgan import checkpoint, modelfile, weights
from fastsrgan.config import TrainConfig
from fastsrgan.degrade import Degradation
from fastsrgan.errors import InputError, ModelError, ResourceError, UsageError
from fastsrgan.feed import Feed, PatchRule, epoch_groups, resident_limit
from fastsrgan.pair import Models
from fastsrgan.pool import Batch, Pool
from fastsrgan.runtime import (
    QUIET,
    Progress,
    StopRequest,
    atomic_write,
    output_folder,
    pick_device,
    provenance,
    rng,
    write_json,
)
from fastsrgan.store import Store, open_store
from fastsrgan.trainlog import RunLog
from fastsrgan.validate import validate

log = logging.getLogger("fastsrgan")


@dataclass
class Position:
    """Where a run stands: the next step of ``group`` in ``epoch``; ``updates`` generator updates are done.

    ``resident`` is the number of subjects in a group: chosen by the memory that was free at the start, kept when the
    run is resumed, since another number would deal the patches anew.
    """

    epoch: int = 1
    group: int = 0
    step: int = 0
    updates: int = 0
    best: float | None = None
    resident: int | None = None


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
    if snapshot_folder and config.scaled:
        raise UsageError("snapshot_folder", "its files cannot hold a scaled head", "--scaled False, or no -sf")
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
    c = config
    degradation = Degradation(c.new_low_res, c.contrast_max, c.noise, c.geometry, c.interp, c.interpolation_type)
    rule = PatchRule(config.patch_size, config.stride, config.image_cropping_method == "overlapping_with_mask")
    feed = Feed(store, degradation, rule, seed=config.seed, device=target, strict=strict)
    run_log = RunLog(folder, dice_file, mse_file, mask_classes)
    run = Run(folder, config, store, models, feed, names["Train"], names["Test"], mask_classes, progress, run_log)
    run.position.epoch = config.init_epoch
    run.snapshot_folder = output_folder(snapshot_folder) if snapshot_folder else None
    if resume:
        load(run)
    else:
        run_log.begin(config.init_epoch)
    with atomic_write(folder / "config.yaml") as temporary:
        temporary.write_text(config.to_yaml(), encoding="utf8")
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
    size = at.resident = c.resident_subjects or at.resident or resident_limit(run.store, run.train)
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


def finish_epoch(run: Run, epoch: int) -> None:
    """Validate, log, and keep the weights that are best on the Test subjects, as the paper does."""
    at = run.position
    scores = {}
    if run.test and epoch % run.config.validate_every == 0:
        c, generator = run.config, run.models.shipped()
        scores = validate(generator, run.feed, run.test, batch_size=c.batch_size, mask_classes=run.mask_classes)
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
    weights.save_generator(path, run.models.shipped(), run.models.critic, card=card)


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
