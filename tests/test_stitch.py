"""Overlap-add: ones in, ones out; tiles of a volume give the volume; precision, order, symmetry."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import numbered, plans

from fastsrgan.errors import UsageError
from fastsrgan.infer import stitch, tiles
from fastsrgan.infer.values import WINDOWS


def windowed(largest: int) -> st.SearchStrategy:
    """Plans of every window."""
    return st.builds(
        lambda plan, window: replace(plan, window=window), plans(largest), st.sampled_from(sorted(WINDOWS))
    )


def tiles_of(volume: torch.Tensor, plan: tiles.TilePlan) -> torch.Tensor:
    return tiles.gather(tiles.pad(volume, plan), plan, range(len(plan)))


def naive(tiles_N1: torch.Tensor, plan: tiles.TilePlan) -> np.ndarray:
    """The textbook form in float64: weighted sum over sum of weights."""
    weight = np.einsum("x,y,z->xyz", *(tiles.window_of(plan.window, p) for p in plan.patch))
    total, count = np.zeros(plan.padded_shape), np.zeros(plan.padded_shape)
    for tile, origin in zip(tiles_N1[:, 0].double().numpy(), plan, strict=True):
        at = tuple(slice(o, o + p) for o, p in zip(origin, plan.patch, strict=True))
        total[at] += weight * tile
        count[at] += weight
    return total / count


@settings(max_examples=200, deadline=None)
@given(windowed(300))
def test_the_windows_over_every_voxel_sum_to_one(plan):
    """Along each axis, in float32 and in the order of the sum: exactly 1."""
    for n, patch, origins, ws in zip(plan.padded_shape, plan.patch, plan.origins, tiles.weights(plan), strict=True):
        total = np.zeros(n, np.float32)
        for o, w in zip(origins, ws, strict=True):
            assert w.shape == (patch,) and w.dtype == np.float32 and (w > 0).all()
            total[o : o + patch] += w
        assert (total == 1).all()


@settings(max_examples=50, deadline=None)
@given(windowed(28))
def test_ones_in_ones_out(plan):
    if len(plan) > 2000:
        return
    ones = torch.ones(1, 2, *plan.patch).expand(len(plan), -1, -1, -1, -1)
    assert torch.equal(stitch.overlap_add(ones, plan), torch.ones(2, *plan.padded_shape))


@settings(max_examples=50, deadline=None)
@given(windowed(28))
def test_the_tiles_of_a_volume_give_the_volume(plan):
    if len(plan) > 2000:
        return
    volume = torch.rand(plan.shape, generator=torch.Generator().manual_seed(len(plan)))
    out = stitch.overlap_add(tiles_of(volume, plan), plan)[0]
    assert torch.allclose(out[plan.crop], volume, rtol=0, atol=1e-6)  # found: 2.4e-7


@settings(max_examples=40, deadline=None)
@given(windowed(24))
def test_disagreeing_tiles_give_the_windowed_mean(plan):
    if len(plan) > 500:
        return
    some = torch.randn(len(plan), 1, *plan.patch, generator=torch.Generator().manual_seed(1))
    assert np.abs(stitch.overlap_add(some, plan)[0].numpy() - naive(some, plan)).max() < 3e-6  # found: 3.4e-7


@pytest.mark.parametrize("window", sorted(WINDOWS))
def test_flips_commute(window):
    """Stitching mirrored tiles at mirrored places is the mirrored result, for any unsymmetric plan."""
    plan = tiles.plan((29, 21, 37), (16, 12, 20), (5, 7, 6), window=window)
    places = zip(plan.padded_shape, plan.patch, plan.origins, strict=True)
    mirrored = replace(plan, origins=tuple(tuple(sorted(n - p - o for o in origins)) for n, p, origins in places))
    some = torch.randn(len(plan), 2, *plan.patch, generator=torch.Generator().manual_seed(2))
    flipped = some.flip(0, 2, 3, 4)  # the last tile becomes the first on every axis
    out = stitch.overlap_add(flipped, mirrored).flip(1, 2, 3)
    assert torch.allclose(out, stitch.overlap_add(some, plan), rtol=0, atol=2e-6)  # found: 4.8e-7


@pytest.mark.parametrize("window", sorted(WINDOWS))
def test_coverage_of_4096_is_as_exact_as_float32(window):
    """A flat float32 sum of 13^3 equal terms drifts by 3e-5; counters of 8 bits and half-precision sums fail here."""
    plan = tiles.plan((31, 31, 31), 16, 1, window=window)
    assert max(np.bincount(np.add.outer(plan.origins[0], np.arange(16)).ravel())) ** 3 == 4096
    volume = 0.7 + 1e-3 * torch.rand(plan.shape, generator=torch.Generator().manual_seed(3))
    out = stitch.overlap_add(tiles_of(volume, plan), plan)[0]
    assert (out - volume).abs().max() < 5e-7  # found: 3.6e-7
    ones = torch.ones(1, 1, 16, 16, 16).expand(len(plan), -1, -1, -1, -1)
    assert (stitch.overlap_add(ones, plan) == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32_whatever_the_tiles_are(dtype):
    plan = tiles.plan((40, 24, 24), 16, 3)
    some = torch.rand(len(plan), 1, *plan.patch, generator=torch.Generator().manual_seed(4)).to(dtype)
    out = stitch.overlap_add(some, plan)
    assert out.dtype == torch.float32
    assert torch.equal(out, stitch.overlap_add(some.float(), plan))


def test_batch_sizes_and_reruns_do_not_change_a_bit():
    plan = tiles.plan((30, 27, 33), 16, (5, 8, 3), window="gaussian")
    some = torch.randn(len(plan), 2, *plan.patch, generator=torch.Generator().manual_seed(5))
    first = stitch.overlap_add(some, plan)
    for batch in (1, 7, 64):
        stitcher = stitch.Stitcher(plan, 2)
        for part in some.split(batch):
            stitcher.add(part)
        assert torch.equal(stitcher.result(), first)


@pytest.mark.parametrize("step", [8, 3])
@pytest.mark.parametrize("window", sorted(WINDOWS))
def test_unwritten_voxels_would_be_seen(poisoned, window, step):
    """Memory that the allocator did not clear, for flat and nested sums."""
    plan = tiles.plan((20, 21, 22), 8, step, window=window)
    for rolling in (False, True):
        out = planes_of(tiles_of(numbered(plan.shape), plan), plan, rolling)
        assert torch.allclose(out[0], numbered(plan.shape), rtol=1e-6)  # found: 3.3e-7


def planes_of(some: torch.Tensor, plan: tiles.TilePlan, rolling: bool, first: int = 0) -> torch.Tensor:
    """What ``finished`` is given, put together."""
    out = torch.full((some.shape[1], *plan.padded_shape), torch.nan)

    def keep(x: int, planes: torch.Tensor) -> None:
        assert out[:, x : x + planes.shape[1]].isnan().all(), "planes come once"
        out[:, x : x + planes.shape[1]] = planes

    stitcher = stitch.Stitcher(plan, some.shape[1], finished=keep, rolling=rolling, first=first)
    for part in some[stitcher.done :].split(5):
        stitcher.add(part)
    return out


@settings(max_examples=60, deadline=None)
@given(windowed(26))
def test_rolling_sums_are_the_same_bits_in_less_memory(plan):
    """Planes come in order as soon as they are final; beginning at a later slab changes those alone that miss tiles."""
    if len(plan) > 500:
        return
    some = torch.randn(len(plan), 2, *plan.patch, generator=torch.Generator().manual_seed(6))
    whole = stitch.overlap_add(some, plan)
    assert torch.equal(planes_of(some, plan, rolling=True), whole)
    assert torch.equal(planes_of(some, plan, rolling=False), whole)
    rolling = stitch.Stitcher(plan, 2, rolling=True, finished=lambda x, planes: None)
    assert rolling.memory is None or rolling.memory.shape[1] == plan.patch[0]
    first = len(plan.origins[0]) // 2
    late = planes_of(some, plan, rolling=True, first=first)
    right = plan.origins[0][first - 1] + plan.patch[0] if first else 0
    assert torch.equal(late[:, right:], whole[:, right:])


@settings(max_examples=60, deadline=None)
@given(windowed(26), st.data())
def test_parts_of_a_grid_add_up_to_the_whole(plan, data):
    """Plans with gaps that share no tile, onto one sum; divided by the window sums it is the plain result."""
    if len(plan) > 500:
        return
    some = torch.randn(len(plan), 2, *plan.patch, generator=torch.Generator().manual_seed(7))
    places = {origin: n for n, origin in enumerate(plan)}
    total = torch.zeros(2, *plan.padded_shape)
    old = [data.draw(st.sets(st.sampled_from(o), min_size=1)) for o in plan.origins]
    for part in parts(plan, old):
        stitcher = stitch.Stitcher(part, 2, onto=total)
        for at in part:
            stitcher.add(some[places[at]][None])
            places.pop(at)
    assert not places
    stitch.divide_planes(total, 0, stitch.window_sums(plan))
    assert torch.allclose(total, stitch.overlap_add(some, plan), rtol=0, atol=3e-6)  # found: 7.2e-7


def parts(plan: tiles.TilePlan, old: list[set[int]]) -> list[tiles.TilePlan]:
    """A grid as product grids: the old one, and what the new one adds to it."""
    x, y, z = ([o for o in origins if o in was] for origins, was in zip(plan.origins, old, strict=True))
    nx, ny, nz = ([o for o in origins if o not in was] for origins, was in zip(plan.origins, old, strict=True))
    grids = [(x, y, z), (nx, plan.origins[1], plan.origins[2]), (x, ny, plan.origins[2]), (x, y, nz)]
    return [replace(plan, origins=tuple(map(tuple, grid))) for grid in grids if all(grid)]


def test_the_gaussian_never_vanishes_and_is_symmetric():
    for n in (8, 64, 128, 512):
        w = tiles.window_of("gaussian", n)
        assert w.min() >= 1e-3 and w.max() <= 1 and np.array_equal(w, w[::-1])  # found: 0.001
        centre = np.log(w[n // 2 - 2 : n // 2 + 2])
        assert np.diff(centre, 2) == pytest.approx(-((8 / n) ** 2), rel=1e-12)  # -1 / sigma^2; found: 9e-14 (rounding)


@pytest.mark.parametrize("n", [8, 20, 64, 128])
def test_the_gaussian_is_its_formula_with_a_floor_of_a_thousandth(n):
    """sigma = n / 8; the outermost voxels would have 3e-4: where corners alone cover a voxel, digits would be lost."""
    distance = np.arange(n) - (n - 1) / 2
    plain = np.exp(-0.5 * (distance / (n / 8)) ** 2)
    # Found: 0 (rounding)
    np.testing.assert_allclose(tiles.window_of("gaussian", n), np.maximum(plain, 1e-3), rtol=1e-12)
    if n >= 20:
        assert plain.min() < 1e-3 == tiles.window_of("gaussian", n).min()


def test_a_corner_that_one_tile_covers_keeps_its_digits():
    plan = tiles.plan((40, 40, 40), 32, 8, window="gaussian")
    some = torch.rand((len(plan), 1, *plan.patch), generator=torch.Generator().manual_seed(0))
    out = stitch.overlap_add(some, plan)
    assert out[0, 0, 0, 0] == pytest.approx(float(some[0, 0, 0, 0, 0]), rel=1e-6)  # found: 0 (rounding)
    assert out[0, -1, -1, -1] == pytest.approx(float(some[-1, 0, -1, -1, -1]), rel=1e-6)  # found: 0 (rounding)


@pytest.mark.parametrize("n", [8, 64, 128])
def test_hann_windows_at_half_the_patch_sum_to_one(n):
    w = tiles.window_of("hann", n)
    assert w.min() >= 1e-3 and w.max() <= 1 and np.array_equal(w, w[::-1])  # found: 0.001
    np.testing.assert_allclose(w[: n // 2] + w[n // 2 :], 1, atol=1e-3)  # the floor's share; found: 8.5e-4


def test_an_unknown_window_is_refused():
    with pytest.raises(UsageError, match="constant, gaussian, hann"):
        tiles.weights(tiles.plan((16, 16, 16), 8, 4, window="welch"))
