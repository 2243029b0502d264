"""What is kept of a volume for training: the part in which patches lie, and nothing changes by it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastsrgan.data.pool import Pool
from fastsrgan.data.subject import PatchRule, make_resident
from fastsrgan.observation.model import Degradation, Draw
from fastsrgan.store.reader import Sample

CPU = torch.device("cpu")
DRAW = Draw((1.0, 1.0, 3.0), power=1.3, noise=0.02, key=(3, "noise"))
EXTRAS = dataclasses.replace(DRAW, rician=True, width=1.2, artefacts={"bias_field": 0.3, "motion": 0.5})


def head(shape=(41, 37, 46), low=(3, 6, 9), high=(35, 31, 43)) -> Sample:
    """An ellipsoid in air, with a hole, label and classes."""
    rng = np.random.default_rng(8)
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    middle = [((a + b - 1) / 2, (b - a) / 2) for a, b in zip(low, high, strict=True)]
    inside = sum(((g - c) / r) ** 2 for g, (c, r) in zip(grid, middle, strict=True)) <= 1
    image = np.where(inside, rng.integers(50, 900, shape), 0).astype(np.int16)
    image[tuple(slice(int(c) - 2, int(c) + 2) for c, _ in middle)] = 0
    mask = rng.integers(0, 3, shape).astype(np.uint8) * inside
    return Sample(
        "h", "Train", image, (image > 400).astype(np.uint8), mask.astype(np.uint8), np.eye(4), (1.0, 1.0, 1.0)
    )


@pytest.mark.parametrize(
    ("rule", "options", "draw"),
    [
        (PatchRule(16, 7), {}, DRAW),
        (PatchRule(16, 7, by_mask=True), {}, DRAW),
        (PatchRule(28, 20), {}, DRAW),  # one position where the head is narrower
        (PatchRule(44, 20), {}, DRAW),  # larger than the volume on two axes
        (PatchRule(16, 7), {"block_bytes": 300_000}, DRAW),
        (PatchRule(16, 7), {}, EXTRAS),
        (PatchRule(16, 7), {"block_bytes": 600_000}, EXTRAS),
        (PatchRule(16, 7), {}, dataclasses.replace(DRAW, low_res=(3.0, 1.0, 1.0))),
        (PatchRule(16, 7), {"geometry": "segsrgan"}, DRAW),
    ],
    ids=["grid", "by mask", "narrow", "large patch", "slabs", "extras", "extras in slabs", "turned", "segsrgan"],
)
def test_patches_are_those_of_the_whole_volume(rule, options, draw):
    sample, law = head(), Degradation((draw.low_res,), **options)
    whole, part = (make_resident(sample, law, draw, rule, CPU, crop=crop) for crop in (False, True))
    assert part.nbytes < whole.nbytes or max(rule.patch, 40) >= 44
    assert np.array_equal(part.origins + part.offset, whole.origins) and len(part.origins)
    batches = [Pool([r], rule.patch, mask_classes=3).gather(np.arange(len(r.origins))) for r in (whole, part)]
    assert batches[0].ids == batches[1].ids
    for a, b in ((batches[0].x, batches[1].x), (batches[0].y, batches[1].y)):
        assert (a - b).abs().max() <= 2e-6 and a.abs().max() > 0.5  # found: 2.4e-7, 0.99
    assert torch.equal(batches[0].y[:, 1:], batches[1].y[:, 1:])


@pytest.mark.parametrize("low_res", [(1.0, 1.0, 3.0), (3.0, 1.0, 1.0)])
def test_patches_of_the_part_agree_with_the_slices_of_the_whole_volume(low_res):
    """Slices are counted from the first voxel of the whole volume and to its last, whatever is kept of it."""
    draw, rule = dataclasses.replace(DRAW, low_res=low_res), PatchRule(16, 7, agree=True)
    law = Degradation((low_res,))
    whole, part = (make_resident(head(), law, draw, rule, CPU, crop=crop) for crop in (False, True))
    assert part.offset[2] > 0 and part.hr.shape[2] < whole.hr.shape[2] and part.slices is not None
    agree = [Pool([r], 16).gather(np.arange(len(r.origins))).agree for r in (whole, part)]
    assert torch.equal(*agree) and len(agree[0].flatten(1).unique(dim=0)) > 1


def test_sizes_that_the_originals_ratio_changes_are_kept_whole():
    law = Degradation(((1.0, 1.0, 2.7),), geometry="segsrgan")
    draw = dataclasses.replace(DRAW, low_res=(1.0, 1.0, 2.7))
    whole, part = (make_resident(head(), law, draw, PatchRule(16, 7), CPU, crop=crop) for crop in (False, True))
    assert part.offset == (0, 0, 0) and torch.equal(part.hr, whole.hr)
    assert torch.equal(part.interpolated, whole.interpolated)


def test_an_image_without_air_is_kept_whole():
    sample = head()
    full = dataclasses.replace(sample, image=sample.image + 1)
    law = Degradation((DRAW.low_res,))
    whole, part = (make_resident(full, law, DRAW, PatchRule(16, 7), CPU, crop=crop) for crop in (False, True))
    assert part.offset == (0, 0, 0) and torch.equal(part.hr, whole.hr)
