"""The measure of how well an epoch is mixed: what it must say of orders that are known, and of smaller groups."""

from __future__ import annotations

import numpy as np
import pytest

from bench.shuffle import batch_subjects, quality

PATCHES = {f"s{i}": 150 + 7 * i for i in range(20)}


def test_known_orders_have_known_quality():
    sorted_, mixed = np.repeat(np.arange(10), 160), np.tile(np.arange(10), 160)
    one_by_one = quality(list(sorted_.reshape(-1, 16)))
    assert one_by_one["distinct"] == 1 and one_by_one["same"] == 1
    assert np.isclose(one_by_one["spread"], 0.1, rtol=0.01) and np.isclose(one_by_one["drift"], 0.9)  # found: 0.0056
    in_turn = quality(list(mixed.reshape(-1, 16)))
    assert in_turn["distinct"] == 10 and in_turn["same"] < 0.1  # found: 0.05
    assert np.isclose(in_turn["spread"], 1, rtol=0.01) and in_turn["drift"] < 1e-9  # found: 0.0056, 0 (rounding)
    assert quality([np.array([3])]) == {"distinct": 1, "same": 0, "spread": 0, "drift": 0}


def test_all_subjects_in_memory_is_a_full_shuffle():
    order = np.repeat(np.arange(20), list(PATCHES.values()))
    full = [quality(np.array_split(np.random.default_rng(s).permutation(order), len(order) // 16)) for s in range(3)]
    ours = quality(batch_subjects(PATCHES, 20, 16))
    for name in ours:
        assert np.isclose(ours[name], np.mean([f[name] for f in full]), rtol=0.1, atol=0.01)  # found: 0.11 of it


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_in_memory_mixes_within_itself(share):
    """A patch meets the subjects of its group alone: spread falls to the share, batches hold fewer subjects."""
    found = quality(batch_subjects(PATCHES, round(20 * share), 16))
    full = quality(batch_subjects(PATCHES, 20, 16))
    residents = 20 * share
    assert np.isclose(found["spread"], share, rtol=0.002) and found["drift"] > full["drift"] + 0.2  # found: 3.9e-4
    assert np.isclose(found["distinct"], residents * (1 - (1 - 1 / residents) ** 16), rtol=0.05)  # found: 0.011
    assert np.isclose(found["same"], 1 / residents, rtol=0.15)  # found: 0.028


def test_every_patch_of_every_subject_is_counted_on_all_ranks():
    taken = np.concatenate([m for rank in range(3) for m in batch_subjects(PATCHES, 3, 8, rank=rank, world=3)])
    assert np.array_equal(np.bincount(taken), list(PATCHES.values()))
