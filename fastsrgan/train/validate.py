"""Scores of a generator on the Test subjects between epochs: patch-wise (paper figure 6), and on whole volumes.

Contrast and resolution are spaced evenly over the subjects, as in the original, and the noise is keyed, so every epoch
sees the same images. Subjects are dealt to the ranks; what comes back is the same on all of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.ranks import ALONE, Ranks
from fastsrgan.data.feed import Feed, make_resident
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.errors import InputError
from fastsrgan.evaluate import metrics
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.sweep import predict
from fastsrgan.model.arithmetic import Arithmetic, pick_precision
from fastsrgan.model.networks import Generator
from fastsrgan.observation.slice_axis import stored_draw
from fastsrgan.store.reader import Sample
from fastsrgan.volume.geometry import processing_orientation
from fastsrgan.volume.resample import apply_axes, degrade_matrix, upsample_matrix

log = logging.getLogger("fastsrgan")

PATCH, STEP = 128, 30  # whole volumes: the defaults of `fastsrgan infer`
SMALLEST = 2 * metrics.SSIM_RADIUS + 1


class Stopped(Exception):
    """A stop was asked for in the middle of a validation, which is then begun anew after a resume."""


def never() -> bool:
    """No stop request."""
    return False


@torch.inference_mode()
def validate(
    generator: Generator,
    feed: Feed,
    subjects: list[str],
    *,
    batch_size: int,
    mask_classes: int = 0,
    ranks: Ranks = ALONE,
    stopped: Callable[[], bool] = never,
    arithmetic: Arithmetic | None = None,
) -> dict[str, float]:
    """Patch-wise scores on the Test subjects (paper figure 6).

    ``Dice`` over all patches and ``MSE`` of SR clipped at 0, as in the original; ``PSNR``, the mean over subjects of
    10 log10(max HR^2 / MSE) in dB. With a mask head, the Dice of each mask class also. Empty without subjects.
    ``stopped`` is asked by all ranks together, before each turn of one subject per rank; Stopped is raised when true.
    On a GPU the network computes as in training (``arithmetic``), in batches of one size, and a subject's sums are read
    once; on a CPU in float32.
    """
    fixed = feed.device.type == "cuda"
    channels = 2 + mask_classes
    total = torch.zeros(4 + 3 * (channels - 1), dtype=torch.double)
    for index in dealt(len(subjects), ranks, stopped):
        sample = readable(feed, subjects[index])
        if sample is None:
            continue
        resident = fixed_resident(feed, sample, index, len(subjects))
        pool = Pool([resident], feed.rule.patch, mask_classes=mask_classes)
        sums = torch.zeros(2 + 3 * (channels - 1), dtype=torch.double, device=feed.device)
        top = torch.zeros((), device=feed.device)
        for start in range(0, len(pool), batch_size):
            chosen = np.arange(start, min(start + batch_size, len(pool)))
            n = len(chosen)
            batch = pool.gather(np.pad(chosen, (0, batch_size - n), mode="edge") if fixed else chosen)
            with arithmetic.autocast() if fixed and arithmetic is not None else contextlib.nullcontext():
                pred = generator(batch.x, batch.res)
            sums += validation_sums(pred[:n].float(), batch.y[:n])
            top = torch.maximum(top, batch.y[:n, 0].max())
        sums = sums.cpu()
        decibels = 10 * math.log10(max(float(top), 1e-12) ** 2 / max(float(sums[0] / sums[1]), 1e-20))
        total += torch.cat([torch.tensor([decibels, 1.0], dtype=torch.double), sums])
    decibels, count, squared, voxels, *rest = ranks.sums(total.tolist())
    if not count:
        return {}
    dices = [2 * both / max(a + b, 1) for both, a, b in zip(rest[::3], rest[1::3], rest[2::3], strict=True)]
    labels = ["Dice"] if len(dices) == 1 else ["Dice_label_1", *(f"Dice_mask{i}" for i in range(len(dices) - 1))]
    return {**dict(zip(labels, dices, strict=True)), "MSE": squared / voxels, "PSNR": decibels / count}


def validation_sums(pred: Tensor, target: Tensor) -> Tensor:
    """Squared error and voxels, then overlap and sizes of each binary channel: (2 + 3 (C - 1),) float64."""
    error = ((pred[:, 0].clamp(min=0) - target[:, 0]) ** 2).double().sum()
    parts = [error, torch.tensor(float(target[:, 0].numel()), dtype=torch.double, device=pred.device)]
    for channel in range(1, pred.shape[1]):
        p, y = (pred[:, channel] > 0.5).double(), target[:, channel].double()
        parts += [(p * y).sum(), p.sum(), y.sum()]
    return torch.stack([part.to(torch.double) for part in parts])


def validate_whole(
    generator: Generator,
    feed: Feed,
    subjects: list[str],
    *,
    ranks: Ranks = ALONE,
    stopped: Callable[[], bool] = never,
) -> dict[str, float]:
    """Scores of whole Test volumes by dense overlapping tiles, beside the spline's: means over the subjects.

    ``whole_PSNR``, ``whole_SSIM`` (metrics.DEFINITIONS), ``whole_Dice``; ``spline_PSNR``, ``spline_SSIM`` of the
    network's input, ``spline_Dice`` of the label a reader of the low-resolution image would draw, interpolated back
    (paper table 2). A score that a volume does not allow (SSIM below 11 voxels) is left out. ``stopped``: as for
    ``validate``.
    """
    names = [f"{who}_{score}" for who in ("whole", "spline") for score in ("PSNR", "SSIM", "Dice")]
    total = dict.fromkeys(names, (0.0, 0))
    for index in dealt(len(subjects), ranks, stopped):
        sample = readable(feed, subjects[index])
        if sample is None:
            continue
        resident = fixed_resident(feed, sample, index, len(subjects))
        for name, value in whole_scores(generator, feed, sample, resident, index, len(subjects)).items():
            total[name] = (total[name][0] + value, total[name][1] + 1)
    pairs = ranks.sums([v for name in names for v in total[name]])
    return {name: pairs[2 * i] / pairs[2 * i + 1] for i, name in enumerate(names) if pairs[2 * i + 1]}


def whole_scores(
    generator: Generator, feed: Feed, sample: Sample, resident: Resident, index: int, count: int
) -> dict[str, float]:
    """Scores of one subject; names as for ``validate_whole``."""
    volume = resident.interpolated.float().cpu()
    out, _ = predict(
        volume,
        tiles.plan(volume.shape, PATCH, STEP),
        TileNetwork(generator, resident.resolution, feed.device, pick_precision("auto", feed.device)),
    )
    hr, label = resident.hr.float().cpu().numpy(), resident.label.cpu().numpy()
    images = {"whole": (out[0].clamp(min=0).numpy(), out[1].numpy()), "spline": (volume.numpy(), None)}
    scores = {}
    for who, (image, segmentation) in images.items():
        scores[f"{who}_PSNR"] = metrics.psnr(image, hr)
        if min(hr.shape) >= SMALLEST:
            scores[f"{who}_SSIM"] = metrics.ssim(image, hr)
        if segmentation is None:
            segmentation = drawn_label(feed, sample, label, index, count)
        if segmentation is not None:
            scores[f"{who}_Dice"] = metrics.dice(segmentation, label)
    return {k: v for k, v in scores.items() if math.isfinite(v)}


def drawn_label(feed: Feed, sample: Sample, label_XYZ: np.ndarray, index: int, count: int) -> np.ndarray | None:
    """The label cut at 0.5 on the low-resolution grid, interpolated back; None with the original's SimpleITK forms."""
    d = feed.degradation
    if d.interp != "scipy" or d.geometry != "physical":
        return None
    draw = stored_draw(d.linspace(index, count), feed.axes, sample.affine)
    turn = processing_orientation(sample.affine, draw.low_res)
    sizes = list(zip(label_XYZ.shape, turn.permute(sample.spacing), turn.permute(draw.low_res), strict=True))
    low = apply_axes(label_XYZ.astype(np.float32), [degrade_matrix(n, s, r) for n, s, r in sizes]) > 0.5
    back = [None if m == n else upsample_matrix(m, n, s / r) for (n, s, r), m in zip(sizes, low.shape, strict=True)]
    return apply_axes(low.astype(np.float32), back)


def sample_patch(generator: Generator, feed: Feed, subjects: list[str]) -> tuple[Tensor, Tensor, Tensor] | None:
    """The middle patch of the first Test subject that can be read: input (P, P, P), prediction and target
    (C, P, P, P); None without one. No random number is drawn."""
    for index, subject in enumerate(subjects):
        sample = readable(feed, subject)
        if sample is None:
            continue
        pool = Pool([fixed_resident(feed, sample, index, len(subjects))], feed.rule.patch)
        batch = pool.gather(np.array([len(pool) // 2]))
        with torch.inference_mode():
            return batch.x[0, 0], generator(batch.x, batch.res)[0], batch.y[0]
    return None


def readable(feed: Feed, subject: str) -> Sample | None:
    """A Test subject; None, with a warning the first time, where it cannot be read (``strict``: raised)."""
    if subject in feed.quarantined:
        return None
    try:
        # Made images look the same in every epoch; who has an image of his own is judged by it.
        return feed.visits.of(feed.store.read(subject), (0, "validation", subject), feed.device, share=0.0)
    except InputError as error:
        if feed.strict:
            raise
        feed.quarantined[subject] = str(error)
        log.warning("Test subject %s is left out of every validation: %s", subject, error)
        return None


def fixed_resident(feed: Feed, sample: Sample, index: int, count: int) -> Resident:
    """Test subject ``index`` of ``count``, degraded as in every epoch."""
    draw = stored_draw(feed.degradation.linspace(index, count), feed.axes, sample.affine)
    return make_resident(sample, feed.degradation, draw, feed.rule, feed.device, move=feed.move)


def dealt(count: int, ranks: Ranks, stopped: Callable[[], bool]) -> Iterator[int]:
    """This rank's indices of ``count`` items, with the question whether to stop before each turn of all ranks."""
    for start in range(0, count, ranks.world):
        if stopped():
            raise Stopped
        if start + ranks.rank < count:
            yield start + ranks.rank
