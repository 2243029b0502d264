"""How well an epoch mixes its patches when not all subjects are in memory at once, beside a full shuffle."""

from __future__ import annotations

import numpy as np
import torch

from fastsrgan.data.feed import deal
from fastsrgan.data.pool import Pool, Resident

WINDOWS = 10  # parts of an epoch whose mix of subjects is compared with the whole


def batch_subjects(
    patches: dict[str, int], size: int, batch: int, *, seed: int = 0, epoch: int = 1, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """Subject numbers of the patches of every generator batch of an epoch, in order: what ``train`` would take.

    patches : patches of each subject; size : subjects in memory at once
    """
    names, nothing = list(patches), torch.zeros((1, 1, 1))
    found = []
    for group, members in enumerate(deal(names, seed, epoch, size, rank, world)):
        made = [Resident(n, nothing, nothing, nothing, None, 0.0, np.zeros((patches[n], 3), int)) for n in members]
        pool = Pool(made, 1, seed=seed, epoch=epoch, group=group, rank=rank)
        numbers = np.array([names.index(n) for n in members])
        found += [numbers[pool.table[indices, 0]] for indices in pool.generator_batches(batch)]
    return found


def quality(batches: list[np.ndarray]) -> dict[str, float]:
    """How mixed an epoch is.

    Returns
    -------
    distinct : mean number of subjects in a batch
    same : share of the pairs of patches in a batch that are of one subject
    spread : mean distance in time of two patches of one subject, over that of any two: 1 when mixed over the epoch
    drift : mean total-variation distance between the mix of subjects in a tenth of the epoch and in the whole: 0 when
        every part is like the whole, 1 when parts have no subject in common with it
    """
    pairs, alike = 0, 0
    for members in batches:
        counts = np.unique(members, return_counts=True)[1]
        pairs += len(members) * (len(members) - 1)
        alike += int((counts * (counts - 1)).sum())
    order = np.concatenate(batches)
    gaps = [_mean_gap(np.flatnonzero(order == s)) for s in np.unique(order) if (order == s).sum() > 1]
    whole = np.bincount(order) / len(order)
    parts = [np.bincount(p, minlength=len(whole)) / len(p) for p in np.array_split(order, min(WINDOWS, len(order)))]
    return {
        "distinct": float(np.mean([len(np.unique(members)) for members in batches])),
        "same": alike / pairs if pairs else 0.0,
        "spread": float(np.mean(gaps)) / _mean_gap(np.arange(len(order))) if gaps else 0.0,
        "drift": float(np.mean([np.abs(part - whole).sum() / 2 for part in parts])),
    }


def _mean_gap(times: np.ndarray) -> float:
    """Mean distance between two of these ascending times."""
    n = len(times)
    return float(((2 * np.arange(n) - n + 1) * times).sum() / (n * (n - 1) / 2)) if n > 1 else 0.0
