"""The training loop: epochs of groups of steps, validation, snapshots (paper section 2; docs/training.md).

An epoch passes the generator once over every patch; before each generator update the critic takes
``critic_iterations`` updates on patches drawn uniformly from what is resident. Every random number is keyed by its
place (seed, epoch, group, step), so a run that was stopped anywhere continues to the same bits on the CPU. All ranks
take the same number of steps and stop after the same one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastsrgan.config import TrainConfig
from fastsrgan.core.draws import rng
from fastsrgan.core.files import write_json
from fastsrgan.core.kernels import to_device
from fastsrgan.core.signals import StopRequest
from fastsrgan.core.system import peak_memory
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.errors import InputError, ResourceError, counted, lasting
from fastsrgan.evaluate.figures import dice_name, dices_of_structures, mean_dice
from fastsrgan.model import checkpoint
from fastsrgan.model.cpu import forms
from fastsrgan.model.networks import Generator
from fastsrgan.model.weights import BEST
from fastsrgan.pictures.planes import write_panel
from fastsrgan.train.logs import contact_sheet
from fastsrgan.train.optimise import factor
from fastsrgan.train.snapshots import export, save, write_weights
from fastsrgan.train.state import Run, Turn, numbered
from fastsrgan.train.validate import Stopped, sample_patch, validate, validate_whole

log = logging.getLogger("fastsrgan")

LOST = 0.01  # Dice, or part of the label's size, below which a segmentation counts as none
WHOLE = ("whole_", "spline_", "linear_")  # how the scores of whole volumes begin
WORSE_DB = 0.5  # below the spline from which an image counts as damaged
BEST_BY = {  # what chose the best weights (``score``), as the last line of a training says it
    "both": "{named} plus gain {score:.4f} ({named} {dice:.4f})",
    "dice": "{named} {score:.4f}",
    "psnr": "PSNR {score:.2f} dB",
}


def loop(run: Run, stop: StopRequest) -> None:
    """All epochs from the run's position on; ends early at a stop request, after a snapshot.

    Raises InputError when no group fills a batch; ResourceError as ``count_bad``.
    """
    c, at = run.config, run.position
    if out_of_patience(run):
        run.ended_early = at.epoch - 1
        told = "the run ended after %s without a better score; a larger patience goes on"
        log.info(told, counted(at.stale, "validation"))
        return
    # The plan is read ahead of the position, so it is fixed before the position moves.
    turns = run.plan()
    run.began_at = run.done(turns[0], at.step / at.steps if at.steps else 0.0) if turns else 1.0
    if not turns and run.first:
        told = "the run is past epoch %d, the last: nothing is left to do, a larger --epoch goes on"
        log.warning(told, run.last_epoch)
    # Closed at the end, which stops the threads that prepare groups nobody will ask for.
    groups = run.feed.groups(iter([(t.epoch, t.subjects) for t in turns]))
    with contextlib.closing(groups) as residents:  # type: ignore[type-var]
        for index, turn in enumerate(turns):
            run_group(run, turn, next(residents), stop)
            last = index + 1 == len(turns) or turns[index + 1].epoch != turn.epoch
            if stopped(run, stop) or (last and at.updates and not end_epoch(run, turn.epoch, stop)):
                save(run)
                return
            if not last:
                at.next_group()
                continue
            at.next_epoch()
            if not at.updates:  # no patch so far: nothing may stay that looks like a run
                continue
            run.ended_early = turn.epoch if out_of_patience(run) else None
            if turn.epoch % c.snapshot == 0 or turn.epoch == run.last_epoch or run.ended_early:
                keep(run, last=turn.epoch == run.last_epoch or bool(run.ended_early))
                export(run, turn.epoch)
            if run.ended_early:
                log.info("epoch %d: no better score in %s, training ends", turn.epoch, counted(at.stale, "validation"))
                return
    if at.updates == 0:
        reason = f"none of its {len(run.train)} Train subjects gave a patch"
        raise InputError(run.store.url, reason, "see the warnings for what is left out")


def keep(run: Run, last: bool) -> None:
    """A snapshot; between epochs none amid updates that are not finite, so that the one before stays if the run ends
    for them. Where the run ends by itself or is stopped nothing that was trained may be lost."""
    if run.bad and not last:
        log.warning("no snapshot after update %d: the last %d were not finite", run.position.updates, run.bad)
    else:
        save(run)


def out_of_patience(run: Run) -> bool:
    """Whether ``patience`` validations in a row brought no better score."""
    return 0 < run.config.patience <= run.position.stale


def stopped(run: Run, stop: StopRequest) -> bool:
    """Whether any rank was told to stop: a question of all ranks, who then stop with the same signal."""
    agreed = -run.ranks.minimum(-(stop.signal or 0))
    # A signal may have come since it was asked for: it is then the next question's.
    stop.signal = agreed or stop.signal
    return agreed > 0


def run_group(run: Run, turn: Turn, residents: list[Resident], stop: StopRequest) -> None:
    """The generator's pass over one group of residents, critic updates before each of its updates."""
    c, at = run.config, run.position
    place = {"seed": run.feed.seed, "epoch": turn.epoch, "group": turn.group, "rank": run.ranks.rank}
    more: dict[str, Any] = {"mask_classes": run.mask_classes, "flips": c.flips, **place}
    pool = Pool(residents, run.feed.rule.patch, **more) if residents else None
    batches = shared_steps(run, turn, pool)
    at.steps = batches if c.steps_per_epoch is None else min(batches, capped(run, turn, c.steps_per_epoch))
    if pool is None or at.steps == 0:
        return
    if run.first and not at.updates:
        tell_if_short(c, min(at.steps * turn.groups, c.steps_per_epoch or math.inf) * len(numbered(c)))
    part = f", part {turn.group + 1}/{turn.groups}" if turn.groups > 1 else ""  # its subjects fit into memory
    run.progress.start(f"training epoch {turn.epoch}/{run.last_epoch}{part}", at.steps - at.step, "update")
    last: Told | None = None
    for indices in pool.generator_batches(run.batch, at.step, steps=batches):
        if at.step >= at.steps:
            break
        began = time.perf_counter()
        lr_factor = factor(c.lr_schedule, run.done(turn, at.step / at.steps), at.updates, c.lr_warmup, c.lr_end)
        run.models.set_rates(lr_factor)
        told = step(run, turn, pool, indices)
        told.lr_factor = lr_factor
        if run.first:
            forms.current().tell()
        at.step += 1
        at.updates += 1
        told.update, told.done = at.updates, run.done(turn, at.step / at.steps)
        # One step late: a GPU then has the next step to work on while the host reads what the last one gave.
        settle(run, turn, last)
        last = told
        told.seconds = time.perf_counter() - began
        if stopped(run, stop):
            break
    settle(run, turn, last)
    run.progress.finish()


def tell_if_short(config: TrainConfig, planned: float) -> None:
    """Warn where a run of about so many updates ends before its settings let it change the weights that it ships."""
    average = round(1 / (1 - config.ema))
    told, smaller = [], []
    if planned < config.lr_warmup:
        told.append(f"lr_warmup {config.lr_warmup} (the rate is still rising)")
        smaller.append("--lr-warmup")
    if planned < average:
        begun = f"a mean over {average} updates: what is validated and shipped is mostly the beginning"
        told.append(f"ema {config.ema:g} ({begun})")
        smaller.append("--ema")
    if told:
        what = counted(int(planned), "update is", "updates are")
        hint = f"take more, or a smaller {' and '.join(smaller)}"
        log.warning("about %s planned, too few for %s: %s", what, " and for ".join(told), hint)


def shared_steps(run: Run, turn: Turn, pool: Pool | None) -> int:
    """Updates that pass over a group once, as many on all ranks: the most that one of them needs for its patches, of
    which the others then take smaller batches."""
    own, patches = (pool.steps(run.batch), len(pool)) if pool is not None else (0, 0)
    steps = min(-run.ranks.minimum(-own), run.ranks.minimum(patches))
    if own and not steps:
        log.warning("epoch %d: group %d is passed over, a rank could not read its part", turn.epoch, turn.group + 1)
    return steps


def capped(run: Run, turn: Turn, most: int) -> int:
    """Updates that a group may have where an epoch has ``most``: an even share of those left, so that every subject
    has a part."""
    left = max(0, most - run.position.epoch_updates)
    return -(-left // (turn.groups - turn.group))


@dataclass
class Told:
    """One step's means of losses, which the device may still be working on, and what is logged with them.

    update, done : updates and share of the run behind it
    seconds : of its step, in which the values of the one before are read
    """

    critic: Mapping[str, float]
    generator: Mapping[str, float]
    batch: list[str]
    lr_factor: float = 0.0
    update: int = 0
    done: float = 0.0
    seconds: float = 0.0


def step(run: Run, turn: Turn, pool: Pool, indices: np.ndarray) -> Told:
    """Queue one generator update with the critic updates before it. On a GPU nothing here waits for it."""
    adversarial = run.models.adversarial(turn.epoch)
    critic = critic_steps(run, turn, pool) if adversarial else {}
    batch = pool.gather(indices)
    return Told(critic, run.models.generator_update(batch, adversarial), batch.ids)


def critic_steps(run: Run, turn: Turn, pool: Pool) -> Mapping[str, float]:
    """The critic updates before one generator update; the generator stands still meanwhile. Means of their losses."""
    at, count, shape = run.position, run.models.critic_iterations, run.models.eps_shape(run.batch)
    own = (run.ranks.rank,) if run.ranks.rank else ()
    keys = [(run.feed.seed, turn.epoch, turn.group, at.step, i, "eps", *own) for i in range(count)]
    eps = to_device(np.stack([rng(*key).random(shape, dtype=np.float32) for key in keys]), run.models.device)
    batches = [pool.gather(i) for i in pool.critic_indices(at.step, run.batch, count)]
    return run.models.critic_updates(batches, list(eps))


def settle(run: Run, turn: Turn, told: Told | None) -> None:
    """Read a step's losses, means over the ranks: judge, log and show them."""
    if told is None:
        return
    facts = {f"d_{k}": v for k, v in told.critic.items()} | {f"g_{k}": v for k, v in told.generator.items()}
    facts = run.ranks.mean(facts)
    count_bad(run, facts, told)
    tell(run, turn, facts, told)


def count_bad(run: Run, facts: dict[str, float], told: Told) -> None:
    """Count updates that were not finite; raise ResourceError after ``max_bad_steps`` in a row."""
    if not facts.get("g_skipped") and not facts.get("d_skipped"):
        run.bad = 0
        return
    run.bad += 1
    number = told.update - 1
    log.warning("update %d is not finite and was skipped (%d in a row): %s", number, run.bad, told.batch[:4])
    if run.bad >= run.config.max_bad_steps:
        ids = [name for names in run.ranks.gather(told.batch) for name in names]
        if run.first:
            found = {"facts": facts, "patches": ids, "update": number, "position": vars(run.position)}
            write_json(run.folder / "bad_batch.json", found)
        reason = counted(run.bad, "update was not finite", "updates in a row were not finite")
        kept = "the last good snapshot is in checkpoints/, " if checkpoint.snapshots(run.folder) else ""
        hint = f"{kept}the patches are in bad_batch.json; lower the learning rates"
        raise ResourceError(run.folder, reason, hint)


def tell(run: Run, turn: Turn, facts: dict[str, float], told: Told) -> None:
    """Log one step and show it."""
    if run.log is None:
        return
    speed = {"patches_per_second": len(told.batch) * run.ranks.world / told.seconds}
    facts = {**facts, "lr_factor": told.lr_factor, **speed, "memory_bytes": float(memory(run))}
    run.log.step(turn.epoch, told.update, told.seconds, run.feed.waited, facts)
    if run.board is not None:
        run.board.scalars("train", facts, told.update)
    elapsed = time.perf_counter() - run.began
    left = elapsed * (1 - told.done) / max(told.done - run.began_at, 1e-9)
    shown = {
        "rec": facts["g_reconstruction"],
        "W": facts.get("d_wasserstein"),
        "gp": facts.get("d_penalty"),
        "patches/s": facts["patches_per_second"],
        "|G|": facts.get("g_gradient"),
        "|D|": facts.get("d_gradient"),
        "wait": f"{100 * run.feed.waited / elapsed:.1f}%",
        "GB": facts["memory_bytes"] / 1e9,
        "run": f"{lasting(left, 0)} left",
    }
    run.progress.advance(1, **{k: v for k, v in shown.items() if v is not None})


def memory(run: Run) -> int:
    """Peak bytes so far: of the device's memory on CUDA, else of the process."""
    device = run.models.device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def end_epoch(run: Run, epoch: int, stop: StopRequest) -> bool:
    """Validate, log, and keep the weights that are best on the Test subjects, as the paper does.

    False when a stop request ended the validation, which then comes again after a resume.
    """
    at, c = run.position, run.config
    scores: dict[str, float] = {}
    generator = run.models.shipped()
    names = [name for name, _ in run.structures]
    each: dict[str, Any] = {"structures": names, "ranks": run.ranks, "stopped": lambda: stopped(run, stop)}
    try:
        if run.test and epoch % c.validate_every == 0:
            size = {"batch_size": run.batch * run.ranks.world, "mask_classes": run.mask_classes}
            own: dict[str, Any] = {"known": run.baselines, "arithmetic": run.models.arithmetic, **size}
            scores = validate(generator, run.feed, run.test, **each, **own)
        if run.test and c.whole_every and epoch % c.whole_every == 0:
            scores |= validate_whole(generator, run.feed, run.test, **each)
    except Stopped:
        return False
    warning = judge(run, epoch, scores)
    if "whole_PSNR" in scores and run.first:
        whole = {name: value for name, value in scores.items() if name.startswith(WHOLE)}
        run.progress.tell("validation of whole volumes", whole_line(epoch, whole), epoch=epoch, **whole)
    if run.log is not None and scores:
        run.log.epoch(epoch, scores, warning)
        show_sample(run, generator, epoch)
    if run.board is not None:
        run.board.scalars("validation", scores, at.updates)
        run.board.flush()
    write_weights(run, run.folder / "model.safetensors", {"epoch": epoch, **scores})
    return True


def show_sample(run: Run, generator: Generator, epoch: int) -> None:
    """The same patch of a Test subject after every validation, for the report and for TensorBoard."""
    patch = sample_patch(generator, run.feed, run.test)
    if patch is None:
        return
    sheet = contact_sheet(*patch).cpu()
    write_panel(run.folder, epoch, sheet.numpy())
    if run.board is not None:
        run.board.picture("test/input_sr_hr_segmentation_label", sheet, run.position.updates)


def judge(run: Run, epoch: int, scores: dict[str, float]) -> str:
    """Whether the epoch's score (``best_by``) is the best so far; its weights are kept then. Says how it goes.

    Returns what is wrong (``collapse``).
    """
    at = run.position
    value = score(scores, run.config.best_by)
    if value is None:
        return ""
    at.stale += 1
    if math.isfinite(value) and (at.best is None or value > at.best):
        at.best, at.best_epoch, at.best_dice, at.stale = value, epoch, mean_dice(scores), 0
        write_weights(run, run.folder / BEST, {"epoch": epoch, **scores})
    if run.first:
        patches = {name: v for name, v in scores.items() if not name.startswith(WHOLE)}  # the others have a line too
        facts = {"epoch": epoch, **patches, "score": value, "best": at.best, "best_epoch": at.best_epoch}
        run.progress.tell("validation", validation_line(epoch, scores, at.best_epoch or epoch), **facts)
    warning = collapse(scores, run.scores)
    if warning and run.first:
        log.warning("epoch %d: %s", epoch, warning)
    run.scores = scores
    return warning


def best_so_far(run: Run) -> dict[str, Any]:
    """The best score, what chose it, its epoch and Dice, for a summary; None before the first validation."""
    at, by = run.position, run.config.best_by
    named = dice_name(len(run.structures))
    return {"best": at.best, "best_by": by, "best_epoch": at.best_epoch, "best_dice": at.best_dice, "dice_is": named}


def score(scores: dict[str, float], best_by: str) -> float | None:
    """The number that chooses the best weights; None without a validation.

    "both": Dice plus the part of the spline's squared error that is gone, 1 - 10^(-gain / 10 dB), from -1 up to 1. An
    empty segmentation loses by the Dice it gives up, and an image no better than the spline by what others gain.
    """
    dice = mean_dice(scores)
    if dice is None:
        return None
    if best_by == "dice":
        return dice
    gone = 1 - 10 ** ((scores["PSNR_spline"] - scores["PSNR"]) / 10)
    return scores["PSNR"] if best_by == "psnr" else dice + max(gone, -1.0)


def validation_line(epoch: int, scores: dict[str, float], best: int) -> str:
    """A validation: PSNR in dB beside that of the spline and of the best linear estimate, SSIM beside the spline's,
    Dice, and the epoch that is best so far. A terminal of 80 columns breaks it between two figures."""
    words = [f"epoch {epoch}"]
    names = {"PSNR": ("PSNR", 2), "PSNR_spline": ("spline", 2), "PSNR_linear": ("linear", 2)}
    names |= {"SSIM": ("SSIM", 3), "SSIM_spline": ("spline", 3)}
    names |= {name: (name, 3) for name in scores if name.startswith("Dice") and name != "Dice_mask0"}  # no background
    words += [f"{word} {scores[name]:.{digits}f}" for name, (word, digits) in names.items() if name in scores]
    if named := dices_of_structures(scores):
        words.append(f"{dice_name(len(named))} {mean_dice(scores):.3f}")
    return " ".join([*words, f"best {best}"])


def whole_line(epoch: int, scores: dict[str, float]) -> str:
    """The figures of whole volumes, as ``validation_line``."""
    words = [f"epoch {epoch}, whole volumes"]
    for name in (key.removeprefix("whole_") for key in scores if key.startswith("whole_")):
        others = [f"{who} {scores[key]:.4g}" for who in ("spline", "linear") if (key := f"{who}_{name}") in scores]
        words.append(f"{name} {scores[f'whole_{name}']:.4g}" + f" ({', '.join(others)})" * bool(others))
    return " ".join(words)


def below_spline(validations: list[dict[str, Any]], best_epoch: int | None) -> str:
    """A warning where the image of the weights that are kept is damaged; empty where it is not.

    validations : the log's lines, of which the last of ``best_epoch`` counts
    """
    kept = [row["validation"] for row in validations if row["epoch"] == best_epoch]
    psnr, spline = (kept[-1].get(name) if kept else None for name in ("PSNR", "PSNR_spline"))
    if psnr is None or spline is None or psnr >= spline - WORSE_DB:
        return ""
    return (
        f"the best weights, of epoch {best_epoch}, are not yet of use for images: their SR on patches is "
        f"{spline - psnr:.1f} dB worse than the spline (docs/training.md, When one output is lost)"
    )


def collapse(scores: dict[str, float], before: dict[str, float]) -> str:
    """What is wrong where one output is lost while the other is learned; empty where nothing is."""
    dice, share = mean_dice(scores) or 0.0, scores["Seg_share"]
    empty, full = share < LOST * scores["Label_share"], share > 1 - LOST
    hint = "docs/training.md, When one output is lost"
    if before and (dice < LOST or empty or full) and scores["PSNR"] > before["PSNR"]:
        named = dice_name(len(dices_of_structures(scores)))
        what = "empty" if empty else "full" if full else "next to nothing of the label"
        return (
            f"the segmentation is {what} ({named} {dice:.3f}) while PSNR rises: --dice-weight 1 or more, a smaller "
            f"--lambda-rec, or other label classes ({hint})"
        )
    if before and scores["PSNR"] <= before["PSNR"] < scores["PSNR_spline"] - WORSE_DB:
        below = scores["PSNR_spline"] - scores["PSNR"]
        return (
            f"SR is {below:.1f} dB worse than the spline and does not rise: a smaller --lrgen or --head-rate, "
            f"--zero-head True, or a smaller --lambda-adv ({hint})"
        )
    return ""
