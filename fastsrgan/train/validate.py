"""Scores of a generator on the Test subjects between epochs: patch-wise (paper figure 6), and on whole volumes.

On patches contrast and resolution are spaced evenly over the subjects, as in the original, and the noise is keyed, so
every epoch sees the same images. Whole volumes are scored as ``infer`` and ``evaluate`` would: the subject's own
contrast, no noise. Subjects are dealt to the ranks; what comes back is the same on all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.progress import quiet
from fastsrgan.core.ranks import ALONE, Ranks
from fastsrgan.data.feed import Feed
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.data.subject import make_resident
from fastsrgan.errors import InputError
from fastsrgan.evaluate import metrics
from fastsrgan.evaluate.grids import onto_grid, reader_label_map
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.sweep import predict
from fastsrgan.infer.volume import infer_volume
from fastsrgan.model.arithmetic import Arithmetic, pick_precision
from fastsrgan.model.networks import Generator
from fastsrgan.observation.model import Draw
from fastsrgan.observation.slice_axis import stored_draw
from fastsrgan.store.reader import Sample
from fastsrgan.train.objectives import agreed_patches
from fastsrgan.volume.consistency import best_linear, observation
from fastsrgan.volume.geometry import Volume, processing_orientation, resampled_affine
from fastsrgan.volume.intensity import lifted

log = logging.getLogger("fastsrgan")

PATCH, STEP = 128, 30  # whole volumes in the original's geometry
SMALLEST = 2 * metrics.SSIM_RADIUS + 1
BASELINES = ("spline", "linear")  # what a network is compared with on the same patches
Known = dict[str, dict[str, tuple[float, float]]]  # subject -> baseline -> PSNR in dB, SSIM


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
    known: Known | None = None,
    structures: Sequence[str] = (),
    arithmetic: Arithmetic | None = None,
) -> dict[str, float]:
    """Patch-wise scores on the Test subjects (paper figure 6).

    ``Dice`` over all patches and ``MSE`` of SR clipped at 0, as in the original; ``PSNR``, the mean over subjects of
    10 log10(max HR^2 / MSE) in dB, and ``SSIM``, the mean over subjects of that of their patches (``metrics.ssim``, the
    range is the maximum of the subject's HR). ``PSNR_spline``, ``SSIM_spline`` and, in physical geometry,
    ``PSNR_linear``, ``SSIM_linear``: of the network's input and of the best linear estimate (``best_linear``) on the
    same patches, clipped alike; they are those of every epoch and kept in ``known``. ``Seg_share``, ``Label_share``:
    parts of the patches' voxels that are segmented, and that the label holds. With a mask head, the Dice of each mask
    class also, named by ``structures`` from class 1 on where they are structures of a label map. Empty without
    subjects. ``stopped`` is asked by all ranks together, before each turn of one subject per rank; Stopped is raised
    when true. On a GPU the network computes as in training (``arithmetic``), in batches of one size, and a subject's
    sums are read once; on a CPU in float32.
    """
    fixed = feed.device.type == "cuda"
    channels = 2 + mask_classes
    known = {} if known is None else known
    total = torch.zeros(3 + 3 * len(BASELINES) + 2 + 3 * (channels - 1), dtype=torch.double)
    for index in dealt(len(subjects), ranks, stopped):
        sample = readable(feed, subjects[index])
        if sample is None:
            continue
        resident = fixed_resident(feed, sample, index, len(subjects))
        pool, highest = Pool([resident], feed.rule.patch, mask_classes=mask_classes), float(resident.hr.max())
        sums = torch.zeros(2 + 3 * (channels - 1), dtype=torch.double, device=feed.device)
        top, similar = torch.zeros((), device=feed.device), torch.zeros((), dtype=torch.double, device=feed.device)
        for start in range(0, len(pool), batch_size):
            chosen = np.arange(start, min(start + batch_size, len(pool)))
            n = len(chosen)
            batch = pool.gather(np.pad(chosen, (0, batch_size - n), mode="edge") if fixed else chosen)
            with arithmetic.autocast() if fixed and arithmetic is not None else contextlib.nullcontext():
                pred = agreed_patches(generator(batch.x, batch.res), batch.x, batch.agree)
            pred, target = pred[:n].float(), batch.y[:n]
            sums += validation_sums(pred, target)
            top = torch.maximum(top, target[:, 0].max())
            similar += patch_ssim(pred[:, 0].clamp(min=0), target[:, 0], highest).sum()
        sums = sums.cpu()
        if sample.id not in known:
            known[sample.id] = baselines(feed, sample, resident, index, len(subjects), batch_size)
        there = [(*known[sample.id][name], 1.0) if name in known[sample.id] else (0.0, 0.0, 0.0) for name in BASELINES]
        level = decibels(float(top), float(sums[0] / sums[1]))
        own = [level, float(similar) / len(pool), 1.0, *(v for row in there for v in row)]
        total += torch.cat([torch.tensor(own, dtype=torch.double), sums])
    values = ranks.sums(total.tolist())
    if not values[2]:
        return {}
    squared, voxels, *rest = values[3 + 3 * len(BASELINES) :]
    dices = [2 * both / max(a + b, 1) for both, a, b in zip(rest[::3], rest[1::3], rest[2::3], strict=True)]
    names = ["Dice"] if len(dices) == 1 or structures else ["Dice_label_1"]
    names += ["Dice_mask0", *(f"Dice_{name}" for name in structures)] if structures else []
    names += [] if structures else [f"Dice_mask{i}" for i in range(len(dices) - 1)]
    scores = {**dict(zip(names, dices, strict=True)), "MSE": squared / voxels}
    for i, ending in enumerate(("", *(f"_{name}" for name in BASELINES))):
        levels, similarities, count = values[3 * i : 3 * i + 3]
        if count:
            scores |= {f"PSNR{ending}": levels / count, f"SSIM{ending}": similarities / count}
    return scores | {"Seg_share": rest[1] / voxels, "Label_share": rest[2] / voxels}


def decibels(top: float, squared: float) -> float:
    """10 log10(top^2 / MSE)."""
    return 10 * math.log10(max(top, 1e-12) ** 2 / max(squared, 1e-20))


def validation_sums(pred: Tensor, target: Tensor) -> Tensor:
    """Squared error and voxels, then overlap and sizes of each binary channel: (2 + 3 (C - 1),) float64."""
    error = ((pred[:, 0].clamp(min=0) - target[:, 0]) ** 2).double().sum()
    parts = [error, torch.tensor(float(target[:, 0].numel()), dtype=torch.double, device=pred.device)]
    for channel in range(1, pred.shape[1]):
        p, y = (pred[:, channel] > 0.5).double(), target[:, channel].double()
        parts += [(p * y).sum(), p.sum(), y.sum()]
    return torch.stack([part.to(torch.double) for part in parts])


def patch_ssim(image_BPPP: Tensor, truth_BPPP: Tensor, top: float) -> Tensor:
    """``metrics.ssim`` of each patch with the range ``top``, on the device: (B,) float64."""
    size, r = image_BPPP.shape[-1], metrics.SSIM_RADIUS
    taps = torch.exp(-0.5 * (torch.arange(-r, r + 1, dtype=torch.double) / metrics.SSIM_SIGMA) ** 2)
    window = torch.zeros(size - 2 * r, size, dtype=torch.double)
    for row in range(size - 2 * r):
        window[row, row : row + 2 * r + 1] = taps / taps.sum()
    window = window.to(image_BPPP.device)

    def mean(values: Tensor) -> Tensor:
        values = torch.einsum("px,bxyz->bpyz", window, values)
        return torch.einsum("qy,bpyz->bpqz", window, values) @ window.T

    x, y = image_BPPP.double(), truth_BPPP.double()
    mean_x, mean_y = mean(x), mean(y)
    c1, c2 = (metrics.SSIM_K1 * max(top, 1e-12)) ** 2, (metrics.SSIM_K2 * max(top, 1e-12)) ** 2
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    upper = (2 * product + c1) * (2 * (mean(x * y) - product) + c2)
    return (upper / ((squares + c1) * (mean(x * x + y * y) - squares + c2))).mean((1, 2, 3))


def baselines(
    feed: Feed, sample: Sample, resident: Resident, index: int, count: int, batch_size: int
) -> dict[str, tuple[float, float]]:
    """PSNR in dB and SSIM of ``BASELINES`` on the patches of a Test subject; no best linear estimate in the original's
    geometry."""
    images = {"spline": resident.interpolated, "linear": linear_estimate(feed, sample, resident, index, count)}
    highest, found = float(resident.hr.max()), {}
    for name, image in images.items():
        if image is None:
            continue
        pool = Pool([dataclasses.replace(resident, interpolated=image)], feed.rule.patch)
        squared, top, similar = 0.0, 0.0, 0.0
        for start in range(0, len(pool), batch_size):
            batch = pool.gather(np.arange(start, min(start + batch_size, len(pool))))
            x, y = batch.x[:, 0].clamp(min=0), batch.y[:, 0]
            squared += float(((x - y) ** 2).double().sum())
            top = max(top, float(y.max()))
            similar += float(patch_ssim(x, y, highest).sum())
        found[name] = decibels(top, squared / (len(pool) * feed.rule.patch**3)), similar / len(pool)
    if "linear" in found:  # its weight was chosen on the volume; on the patches its limit, the spline, may be better
        found["linear"] = max(found["linear"], found["spline"])
    return found


def linear_estimate(feed: Feed, sample: Sample, resident: Resident, index: int, count: int) -> Tensor | None:
    """The best linear estimate of a Test subject from its scan as it is validated on, on the grid of ``resident``."""
    law = feed.degradation
    draw = stored_draw(law.linspace(index, count), feed.axes, sample.affine)
    turn = processing_orientation(sample.affine, draw.low_res)
    spacing, low_res = turn.permute(sample.spacing), turn.permute(draw.low_res)
    seen = law.seen(tuple(resident.hr.shape), spacing, draw, low_res)
    if seen is None or sample.image is None:
        return None
    done = law.apply(lifted(np.ascontiguousarray(turn.apply(sample.image))), spacing, draw, low_res)
    made = best_linear(done.interpolated, done.low_res, done.hr, seen)
    return torch.from_numpy(made).to(resident.hr)


def validate_whole(
    generator: Generator,
    feed: Feed,
    subjects: list[str],
    *,
    structures: Sequence[str] = (),
    ranks: Ranks = ALONE,
    stopped: Callable[[], bool] = never,
) -> dict[str, float]:
    """Scores of whole Test volumes, those that ``evaluate`` gives of ``infer``'s results: means over the subjects.

    The scan is the subject's image as thick slices of the subject's resolution, its own contrast, without noise.
    ``whole_PSNR``, ``whole_SSIM`` (metrics.DEFINITIONS), ``whole_Dice``; ``spline_PSNR``, ``spline_SSIM``,
    ``spline_Dice``: of the spline, and of the label a reader of the low-resolution image would draw, interpolated back
    (paper table 2);
    ``linear_PSNR``, ``linear_SSIM`` of the best linear estimate. ``whole_Dice_NAME``: of each of several structures,
    in the map that the classes of the mask head make. A score that a volume does not allow (SSIM below 11
    voxels) is left out. ``stopped``: as for ``validate``.
    """
    names = [f"{who}_{score}" for who in ("whole", *BASELINES) for score in ("PSNR", "SSIM", "Dice")]
    names += [f"whole_Dice_{name}" for name in structures]
    total = dict.fromkeys(names, (0.0, 0))
    for index in dealt(len(subjects), ranks, stopped):
        sample = readable(feed, subjects[index])
        if sample is None:
            continue
        plain = Draw(stored_draw(feed.degradation.linspace(index, len(subjects)), feed.axes, sample.affine).low_res)
        scored = whole_scores if feed.degradation.geometry == "physical" else original_scores
        for name, value in scored(generator, feed, sample, plain, structures).items():
            total[name] = (total[name][0] + value, total[name][1] + 1)
    pairs = ranks.sums([v for name in names for v in total[name]])
    return {name: pairs[2 * i] / pairs[2 * i + 1] for i, name in enumerate(names) if pairs[2 * i + 1]}


def whole_scores(
    generator: Generator, feed: Feed, sample: Sample, draw: Draw, structures: Sequence[str] = ()
) -> dict[str, float]:
    """Scores of one subject through ``infer_volume``; names as for ``validate_whole``."""
    assert sample.image is not None and sample.label is not None
    hr, label = Volume(lifted(sample.image), sample.affine), Volume(sample.label, sample.affine)
    done = feed.degradation.apply(hr.data, hr.spacing, draw)
    low = done.low_res * np.float32(done.scale)
    scan = Volume(low, resampled_affine(hr.affine, hr.data.shape, low.shape, draw.low_res))
    with quiet():
        # Uncompiled: the compilations of this job are for its updates.
        made = infer_volume(
            scan.data, scan.affine, generator, new_resolution=list(hr.spacing), device=str(feed.device), compile="off"
        )
    notes: list[str] = []
    sr, spline = (onto_grid(v, hr, notes=notes).data for v in (Volume(made.sr, made.affine), scan))

    def placed(inside: np.ndarray) -> np.ndarray:
        return onto_grid(Volume(inside.astype(np.uint8), made.affine), hr, order=0, notes=notes).data

    seg = placed(made.prob[0] > metrics.SEG_THRESHOLD)
    seen = observation(low.shape, draw.low_res, hr.data.shape, hr.spacing)
    assert seen is not None
    return {
        **image_scores("whole", sr, hr.data),
        **image_scores("spline", spline, hr.data),
        **image_scores("linear", best_linear(spline, low, hr.data, seen), hr.data),
        "whole_Dice": metrics.dice(seg, label.data),
        "spline_Dice": metrics.dice(reader_label_map(label, scan, notes).data, label.data),
        **structure_dices(made.prob[1:], sample.mask, structures, placed),
    }


def structure_dices(
    probabilities: np.ndarray,
    truth: np.ndarray | None,
    structures: Sequence[str],
    placed: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> dict[str, float]:
    """``whole_Dice_NAME`` of each structure: classes of the mask head (C, X, Y, Z) against those of a mask."""
    if truth is None or not structures:
        return {}
    made = probabilities.argmax(axis=0)
    pairs = {name: (placed(np.equal(made, i)), np.equal(truth, i)) for i, name in enumerate(structures, 1)}
    return {f"whole_Dice_{name}": metrics.dice(*pair) for name, pair in pairs.items()}


def image_scores(who: str, image: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM of a volume where they exist."""
    scores = {f"{who}_PSNR": metrics.psnr(image, truth)}
    if min(truth.shape) >= SMALLEST:
        scores[f"{who}_SSIM"] = metrics.ssim(image, truth)
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def original_scores(
    generator: Generator, feed: Feed, sample: Sample, draw: Draw, structures: Sequence[str] = ()
) -> dict[str, float]:
    """Scores of one subject in the original's geometry, whose grids no file names: by tiles on the processed arrays."""
    resident = make_resident(sample, feed.degradation, draw, feed.rule, feed.device, move=feed.move)
    volume = resident.interpolated.float().cpu()
    out, _ = predict(
        volume,
        tiles.plan(volume.shape, PATCH, STEP),
        TileNetwork(generator, resident.resolution, feed.device, pick_precision("auto", feed.device)),
    )
    hr, label = resident.hr.float().cpu().numpy(), resident.label.cpu().numpy()
    classes = None if resident.mask is None else resident.mask.cpu().numpy()
    return {
        **image_scores("whole", out[0].clamp(min=0).numpy(), hr),
        **image_scores("spline", volume.numpy(), hr),
        "whole_Dice": metrics.dice(out[1].numpy(), label),
        **structure_dices(out[2:].numpy(), classes, structures),
    }


def sample_patch(generator: Generator, feed: Feed, subjects: list[str]) -> tuple[Tensor, Tensor, Tensor] | None:
    """The patch of the first readable Test subject whose middle planes show most of the label's edge: input (P, P, P),
    prediction and target (C, P, P, P); None without one. No random number is drawn."""
    for index, subject in enumerate(subjects):
        sample = readable(feed, subject)
        if sample is None:
            continue
        resident = fixed_resident(feed, sample, index, len(subjects))
        pool = Pool([resident], feed.rule.patch)
        batch = pool.gather(np.array([central_patch(resident, feed.rule.patch)]))
        with torch.inference_mode():
            pred = agreed_patches(generator(batch.x, batch.res), batch.x, batch.agree)
            return batch.x[0, 0], pred[0], batch.y[0]
    return None


def central_patch(resident: Resident, patch: int) -> int:
    """Index of the patch with most structure in its three middle planes: in each, the smaller of what the label holds
    and leaves; of equals the one nearest to the middle of the volume."""
    label, middle = resident.label, np.array(resident.label.shape) / 2
    ranked = []
    for index, origin in enumerate(resident.origins):
        cut = [slice(max(int(o), 0), max(int(o) + patch, 0)) for o in origin]
        held = 0
        for axis, start in enumerate(origin):
            at = min(max(int(start) + patch // 2, 0), label.shape[axis] - 1)
            plane = label[tuple(slice(at, at + 1) if d == axis else s for d, s in enumerate(cut))]
            inside = int((plane > 0).sum())
            held += min(inside, plane.numel() - inside)
        ranked.append((-held, float(np.abs(origin + patch / 2 - middle).sum()), index))
    return min(ranked)[-1]


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
