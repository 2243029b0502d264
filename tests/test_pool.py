"""Pool and feed: every patch once, keyed draws, exact copies, edges, and the mask rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsrgan.degrade import Degradation, Draw
from fastsrgan.errors import InputError
from fastsrgan.feed import Feed, PatchRule, epoch_groups, make_resident
from fastsrgan.pool import Pool, Resident, copy_patch, patch_origins, positive_box
from fastsrgan.store import Sample

CPU = torch.device("cpu")


def resident(name: str, shape=(20, 24, 28), patch=8, stride=6, seed=0) -> Resident:
    rng = np.random.default_rng(seed)
    hr = torch.from_numpy(rng.random(shape, dtype=np.float32))
    label = torch.from_numpy((rng.random(shape) > 0.5).astype(np.uint8))
    mask = torch.from_numpy(rng.integers(0, 3, shape).astype(np.uint8))
    origins = patch_origins(shape, patch, stride, tuple((0, n) for n in shape))
    return Resident(name, hr * 2, hr, label, mask, 3.0, origins)


@settings(max_examples=40)
@given(st.tuples(*[st.integers(4, 70)] * 3), st.sampled_from([8, 16, 32]), st.integers(1, 25), st.data())
def test_patches_cover_the_box_and_stay_inside_where_they_can(shape, patch, stride, data):
    box = []
    for n in shape:
        low = data.draw(st.integers(0, n - 1))
        box.append((low, data.draw(st.integers(low + 1, n))))
    origins = patch_origins(shape, patch, stride, tuple(box))
    assert len(np.unique(origins, axis=0)) == len(origins)
    for d, (low, high) in enumerate(box):
        covered = np.zeros(shape[d] + 2 * patch, bool)
        for o in np.unique(origins[:, d]):
            covered[o + patch : o + 2 * patch] = True
            if shape[d] >= patch:
                assert 0 <= o <= shape[d] - patch
        if stride <= patch or high - low <= patch:
            assert covered[low + patch : high + patch].all()


def test_generator_pass_takes_every_patch_once_and_mixes_subjects():
    pool = Pool([resident("a"), resident("b", seed=1)], 8, epoch=3)
    batches = list(pool.generator_batches(4))
    taken = np.concatenate(batches)
    assert len(set(taken.tolist())) == len(taken) == len(pool) // 4 * 4
    assert sum(len(set(pool.table[b][:, 0])) == 2 for b in batches) > len(batches) / 2
    resumed = list(pool.generator_batches(4, first=5))
    assert all(np.array_equal(a, b) for a, b in zip(batches[5:], resumed, strict=True))
    other = Pool(pool.residents, 8, epoch=4)
    assert not np.array_equal(other.order(), pool.order())


def test_critic_draws_are_keyed_and_uniform():
    pool = Pool([resident("a")], 8)
    draws = np.concatenate([pool.critic_indices(s, 50, 5).ravel() for s in range(40)])
    assert np.array_equal(pool.critic_indices(7, 4, 5), pool.critic_indices(7, 4, 5))
    counts = np.bincount(draws, minlength=len(pool))
    expected = len(draws) / len(pool)
    assert ((counts - expected) ** 2 / expected).sum() < 1.5 * len(pool)  # chi-square, far above its 1e-6 quantile


def test_gather_copies_what_stands_there():
    pool = Pool([resident("a"), resident("b", seed=1)], 8, mask_classes=3)
    indices = np.array([0, len(pool) - 1, 5])
    batch = pool.gather(indices)
    for b, (subject, i, j, k) in enumerate(pool.table[indices]):
        r = pool.residents[subject]
        cut = (slice(i, i + 8), slice(j, j + 8), slice(k, k + 8))
        assert torch.equal(batch.x[b, 0], r.interpolated[cut]) and torch.equal(batch.y[b, 0], r.hr[cut])
        assert torch.equal(batch.y[b, 1], r.label[cut].float())
        assert torch.equal(batch.y[b, 2:].argmax(0).to(torch.uint8), r.mask[cut])
        assert (batch.y[b, 2:].sum(0) == 1).all()
        assert batch.ids[b] == f"{r.subject}@{i},{j},{k}"


def test_patches_hang_over_the_edges_of_small_volumes_with_zeros():
    volume = torch.ones(5, 9, 20)
    out = torch.full((8, 8, 8), torch.nan)
    copy_patch(out, volume, np.array([-1, 1, 6]))
    assert out.sum() == 5 * 8 * 8 and (out[0] == 0).all() and (out[6:] == 0).all()
    origins = patch_origins((5, 9, 20), 8, 4, ((0, 5), (0, 9), (0, 20)))
    assert set(origins[:, 0]) == {-2}


def test_mask_rule_keeps_patches_with_more_than_half_inside():
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[:9] = 1
    origins = patch_origins((16,) * 3, 8, 4, ((0, 16),) * 3, mask)
    assert set(origins[:, 0]) == {0, 4}  # 8 and 5 of 8 planes inside; at 8 only 1
    assert len(patch_origins((16,) * 3, 8, 4, ((0, 16),) * 3, np.zeros_like(mask))) == 0
    with pytest.raises(InputError, match="none found"):
        r = resident("a")
        Pool([Resident("a", r.hr, r.hr, r.label, None, 3.0, np.empty((0, 3), int))], 8)


def test_positive_box_keeps_the_last_plane():
    image = np.zeros((6, 7, 8))
    image[2:5, 1:3, 7] = 1
    assert positive_box(image) == ((2, 5), (1, 3), (7, 8))
    assert positive_box(np.zeros((3, 4, 5))) == ((0, 3), (0, 4), (0, 5))


def sample(affine: np.ndarray, shape=(18, 20, 24)) -> Sample:
    rng = np.random.default_rng(4)
    image = rng.random(shape, dtype=np.float32)
    spacing = tuple(np.sqrt((affine[:3, :3] ** 2).sum(0)))
    return Sample("s", "Train", image, (image > 0.5).astype(np.uint8), None, affine, spacing)


def test_residents_are_processed_with_the_through_plane_axis_last():
    degradation = Degradation(((3.0, 1.0, 1.0),), 0.0, 0.0)
    r = make_resident(sample(np.diag([1.0, 1, 1, 1])), degradation, Draw((3.0, 1.0, 1.0)), PatchRule(8, 8), CPU)
    assert tuple(r.hr.shape) == (20, 24, 18) and r.resolution == 3.0
    # Where the low-resolution axis was, the interpolated image is smooth and the truth is not.
    rough = [(r.interpolated.diff(dim=d).std() / r.hr.diff(dim=d).std()).item() for d in range(3)]
    assert rough[2] < 0.5 * min(rough[:2])


def test_missing_label_or_mask_is_said():
    s = sample(np.eye(4))
    degradation, draw = Degradation(((1.0, 1.0, 3.0),)), Draw((1.0, 1.0, 3.0))
    unlabelled = Sample(s.id, s.split, s.image, None, None, s.affine, s.spacing)
    with pytest.raises(InputError, match="Label_image"):
        make_resident(unlabelled, degradation, draw, PatchRule(8, 8), CPU)
    with pytest.raises(InputError, match="Mask_image"):
        make_resident(s, degradation, draw, PatchRule(8, 8, by_mask=True), CPU)


def test_groups_hold_every_subject_once_in_an_order_of_their_own_each_epoch():
    names = [f"sub-{i}" for i in range(11)]
    groups = epoch_groups(names, 0, 1, 4)
    assert sorted(name for group in groups for name in group) == sorted(names) and max(map(len, groups)) <= 4
    assert groups == epoch_groups(names, 0, 1, 4) != epoch_groups(names, 0, 2, 4)


class _Store:
    def __init__(self, bad: str) -> None:
        self.bad = bad

    def read(self, name: str) -> Sample:
        if name == self.bad:
            raise InputError(name, "chunk is damaged")
        return sample(np.eye(4))


def test_feed_yields_the_plan_in_order_and_leaves_out_what_is_damaged():
    degradation = Degradation(((1.0, 1.0, 2.0),))
    feed = Feed(_Store("b"), degradation, PatchRule(8, 8), seed=1, device=CPU)  # type: ignore[arg-type]
    groups = list(feed.groups(iter([(1, ["a", "b"]), (1, ["c"]), (2, ["b", "a"])])))
    assert [len(g) for g in groups] == [1, 1, 1] and list(feed.quarantined) == ["b"]
    assert not torch.equal(groups[0][0].hr, groups[2][0].hr)  # another epoch, another contrast
    strict = Feed(_Store("b"), degradation, PatchRule(8, 8), seed=1, device=CPU, strict=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="damaged"):
        list(strict.groups(iter([(1, ["b"])])))
