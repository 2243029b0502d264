"""Scores of a generator on the Test subjects between epochs (paper figure 6)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastsrgan.feed import Feed, make_resident
from fastsrgan.networks import Generator
from fastsrgan.pool import Pool


@torch.inference_mode()
def validate(
    generator: Generator,
    feed: Feed,
    subjects: list[str],
    *,
    batch_size: int,
    mask_classes: int = 0,
) -> dict[str, float]:
    """Patch-wise scores on the Test subjects (paper figure 6): Dice over all patches, MSE of SR clipped at 0.

    Contrast and resolution are spaced evenly over the subjects, as in the original. With a mask head, also the Dice of
    each mask class. Empty when there are no subjects.
    """
    total = None
    for index, name in enumerate(subjects):
        draw = feed.degradation.linspace(index, len(subjects))
        resident = make_resident(feed.store.read(name), feed.degradation, draw, feed.rule, feed.device)
        pool = Pool([resident], feed.rule.patch, mask_classes=mask_classes)
        for start in range(0, len(pool), batch_size):
            batch = pool.gather(np.arange(start, min(start + batch_size, len(pool))))
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
