"""Pool: every patch once, keyed draws, exact copies, edges, the mask rule, and memory that is used again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsrgan.data.pool import Pool, Resident, copy_patch
from fastsrgan.data.subject import PatchRule, make_resident, patch_origins, positive_box
from fastsrgan.errors import InputError, ModelError
from fastsrgan.observation.model import Degradation, Draw
from fastsrgan.store.reader import Sample

CPU = torch.device("cpu")


def resident(name: str, shape=(20, 24, 28), patch=8, stride=6, seed=0) -> Resident:
    rng = np.random.default_rng(seed)
    hr = torch.from_numpy(rng.random(shape, dtype=np.float32))
    label = torch.from_numpy((rng.random(shape) > 0.5).astype(np.uint8))
    mask = torch.from_numpy(rng.integers(0, 3, shape).astype(np.uint8))
    origins = patch_origins(shape, patch, stride, tuple((0, n) for n in shape))
    return Resident(name, hr * 2, hr, label, mask, 3.0, origins)


def with_patches(name: str, count: int) -> Resident:
    """A resident of which only the number of patches matters."""
    r = torch.zeros((8, 8, 8))
    return Resident(name, r, r, r.to(torch.uint8), None, 3.0, np.zeros((count, 3), int))


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


@settings(max_examples=40)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(1, 40), st.integers(0, 5))
def test_generator_pass_takes_every_patch_of_ragged_subjects_once(counts, batch, rank):
    """No remainder is left out, and none makes an update of a few patches: batches are as even as can be."""
    counts[0] += 1
    pool = Pool([with_patches(f"s{i}", n) for i, n in enumerate(counts)], 8, rank=rank)
    batches = list(pool.generator_batches(batch))
    assert sorted(np.concatenate(batches).tolist()) == list(range(sum(counts)))
    sizes = {len(b) for b in batches}
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1
    assert len(batches) == pool.steps(batch) == -(-sum(counts) // batch)


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 20), st.data())
def test_ranks_with_unequal_patches_can_agree_on_a_number_of_steps(count, batch, data):
    """The largest of the ranks' numbers: all patches still come once. A smaller one: full batches, patches left out."""
    pool = Pool([with_patches("s", count)], 8)
    asked = data.draw(st.integers(1, count + 3))
    batches, steps = list(pool.generator_batches(batch, 0, asked)), min(asked, count)  # no batch is empty
    taken = np.concatenate(batches).tolist()
    assert len(batches) == steps and len(set(taken)) == len(taken) == min(count, steps * batch)
    assert max(map(len, batches)) <= batch and max(map(len, batches)) - min(map(len, batches)) <= 1


def test_generator_pass_mixes_subjects_and_goes_on_where_it_stopped():
    residents = [resident("a"), resident("b", seed=1)]
    pool = Pool(residents, 8, epoch=3)
    batches = list(pool.generator_batches(4))
    assert sum(len(set(pool.table[b][:, 0])) == 2 for b in batches) > len(batches) / 2
    resumed = list(pool.generator_batches(4, first=5))
    assert len(resumed) == len(batches) - 5
    assert all(np.array_equal(a, b) for a, b in zip(batches[5:], resumed, strict=True))
    others = [Pool(residents, 8, epoch=4), Pool(residents, 8, epoch=3, group=1), Pool(residents, 8, epoch=3, rank=1)]
    assert not any(np.array_equal(other.order(), pool.order()) for other in others)


def test_state_is_a_position_and_what_comes_after_it_is_the_same():
    def fresh(**key: int) -> Pool:
        return Pool([resident("a"), resident("b", seed=1)], 8, seed=5, flips="xz", **{"epoch": 2, **key})

    pool = fresh()
    running = pool.generator_batches(3)
    for _ in range(7):
        next(running)
    saved = json.loads(json.dumps(pool.state()))
    rest = [(b, pool.critic_indices(pool.step, 3, 2)) for b in running]
    again = fresh()
    again.load_state(saved)
    assert again.step == 7
    resumed = [(b, again.critic_indices(again.step, 3, 2)) for b in again.generator_batches(3)]
    assert len(rest) == len(resumed) == pool.steps(3) - 7
    for (a, critic_a), (b, critic_b) in zip(rest, resumed, strict=True):
        assert np.array_equal(a, b) and np.array_equal(critic_a, critic_b)
        assert torch.equal(pool.gather(a).y, again.gather(b).y)
    for other in (fresh(epoch=3), fresh(group=1), fresh(rank=1)):
        with pytest.raises(ModelError, match="position in the epoch"):
            other.load_state(saved)


def test_flips_are_keyed_fair_and_only_along_the_axes_that_were_asked():
    residents = [resident("a"), resident("b", seed=1)]
    plain, pool = Pool(residents, 8, seed=1), Pool(residents, 8, seed=1, flips="zx")
    n, drawn = len(pool), []
    for step, (a, b) in enumerate(zip(plain.generator_batches(5), pool.generator_batches(5), strict=True)):
        critic = pool.critic_indices(step, 5, 2)
        assert np.array_equal(a, b % n) and np.array_equal(plain.critic_indices(step, 5, 2), critic % n)
        drawn += [*(b // n), *(critic // n).ravel()]
    counts = np.bincount(drawn, minlength=8)
    assert counts[[2, 3, 6, 7]].sum() == 0 and (counts[[0, 1, 4, 5]] > len(drawn) / 6).all()
    indices = next(pool.generator_batches(5, first=0))
    batch, straight = pool.gather(indices), plain.gather(indices % n)
    assert batch.ids == straight.ids
    for i, bits in enumerate(indices // n):
        axes = [1 + d for d in range(3) if bits >> d & 1]
        assert torch.equal(batch.x[i], straight.x[i].flip(axes)) and torch.equal(batch.y[i], straight.y[i].flip(axes))


def test_flips_that_are_given_mirror_along_their_own_axes():
    pool = Pool([resident("a")], 8)
    indices, flips = np.array([3, 1, 4, 2]), np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], bool)
    straight, batch = pool.gather(indices), pool.gather(indices, flips)
    for i, along in enumerate(flips):
        axes = [1 + int(d) for d in np.flatnonzero(along)]
        assert torch.equal(batch.x[i], straight.x[i].flip(axes)) and torch.equal(batch.y[i], straight.y[i].flip(axes))


@pytest.mark.parametrize("hold", ["batch", "view", "graph"])
def test_memory_of_a_batch_is_used_again_only_when_nothing_refers_to_it(hold):
    pool = Pool([resident("a"), resident("b", seed=1)], 8)
    weight = torch.ones((), requires_grad=True)
    batch = pool.gather(np.arange(4))
    expected, place = batch.y.clone(), batch.y.data_ptr()
    held = {"batch": batch, "view": batch.y[1:, 0], "graph": (weight * batch.y).sum()}[hold]
    del batch
    for _ in range(3):
        other = pool.gather(np.arange(9, 13))
        assert other.y.data_ptr() != place
    if hold == "graph":
        held.backward()
        assert torch.isclose(weight.grad, expected.sum())
    else:
        assert torch.equal(held if hold == "view" else held.y, expected[1:, 0] if hold == "view" else expected)
    del held, other
    # Now it is free: among a few batches that are all kept, one lies there; smaller ones fit as well.
    kept = [pool.gather(np.arange(3)) for _ in range(4)]
    assert place in [k.y.data_ptr() for k in kept]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_residents_take_half_the_memory_and_give_float32_patches(dtype):
    full = resident("a")
    half = dataclasses.replace(full, interpolated=full.interpolated.to(dtype), hr=full.hr.to(dtype))
    voxels = full.hr.numel()
    assert (full.nbytes, half.nbytes) == (10 * voxels, 6 * voxels)
    indices = np.array([3, 1, 40])
    a, b = Pool([full], 8, mask_classes=3).gather(indices), Pool([half], 8, mask_classes=3).gather(indices)
    assert b.x.dtype == b.y.dtype == torch.float32
    assert torch.equal(b.x, a.x.to(dtype).float()) and torch.equal(b.y[:, 0], a.y[:, 0].to(dtype).float())
    assert torch.equal(b.y[:, 1:], a.y[:, 1:])


def test_critic_draws_are_keyed_and_uniform():
    pool = Pool([resident("a")], 8)
    draws = np.concatenate([pool.critic_indices(s, 50, 5).ravel() for s in range(40)])
    assert np.array_equal(pool.critic_indices(7, 4, 5), pool.critic_indices(7, 4, 5))
    counts = np.bincount(draws, minlength=len(pool))
    expected = len(draws) / len(pool)
    # Found: 1
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


@pytest.mark.parametrize("origin", [(9, 0, 0), (5, 1, 1), (0, -8, 0), (0, 0, 20), (-20, 40, 0)])
def test_a_patch_beside_its_volume_is_zero(origin):
    out = torch.full((8, 8, 8), torch.nan)
    copy_patch(out, torch.ones(5, 9, 20), np.array(origin))
    assert (out == 0).all()


def test_mask_rule_keeps_patches_with_more_than_half_inside():
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[:9] = 1
    origins = patch_origins((16,) * 3, 8, 4, ((0, 16),) * 3, mask)
    assert set(origins[:, 0]) == {0, 4}  # 8 and 5 of 8 planes inside; at 8 only 1
    assert len(patch_origins((16,) * 3, 8, 4, ((0, 16),) * 3, np.zeros_like(mask))) == 0
    with pytest.raises(InputError, match="none found"):
        r = resident("a")
        Pool([Resident("a", r.hr, r.hr, r.label, None, 3.0, np.empty((0, 3), int))], 8)


def test_half_of_a_patch_inside_the_mask_is_not_enough():
    mask = np.zeros((8, 4, 4), np.uint8)
    mask[:2], mask[4:7] = 1, 1  # two and three of four planes
    assert patch_origins((8, 4, 4), 4, 4, ((0, 8), (0, 4), (0, 4)), mask).tolist() == [[4, 0, 0]]


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
    s = sample(np.diag([1.0, 1, 1, 1]))
    r = make_resident(s, degradation, Draw((3.0, 1.0, 1.0)), PatchRule(8, 8), CPU)
    assert tuple(r.hr.shape) == (20, 24, 18) and r.resolution == 3.0
    assert np.array_equal(r.label, s.label.transpose(1, 2, 0)), "the label lies where its image does"
    # Where the low-resolution axis was, the interpolated image is smooth and the truth is not.
    rough = [(r.interpolated.diff(dim=d).std() / r.hr.diff(dim=d).std()).item() for d in range(3)]
    assert rough[2] < 0.5 * min(rough[:2])  # found: 0.31


def test_missing_label_or_mask_is_said():
    s = sample(np.eye(4))
    degradation, draw = Degradation(((1.0, 1.0, 3.0),)), Draw((1.0, 1.0, 3.0))
    unlabelled = Sample(s.id, s.split, s.image, None, None, s.affine, s.spacing)
    with pytest.raises(InputError, match="Label_image"):
        make_resident(unlabelled, degradation, draw, PatchRule(8, 8), CPU)
    with pytest.raises(InputError, match="Mask_image"):
        make_resident(s, degradation, draw, PatchRule(8, 8, by_mask=True), CPU)
