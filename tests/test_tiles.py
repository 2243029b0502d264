"""Tile plans: coverage, sizes, both paddings, gathering."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsrgan.errors import UsageError
from fastsrgan.infer import tiles

PATCHES = st.none() | st.sampled_from([8, 12, 16, 20, 32])


@st.composite
def plans(draw, largest: int = 50) -> tiles.TilePlan:
    """Any volume (also smaller than a tile, also prime sizes), any patch per axis, any step without gaps."""
    shape = draw(st.tuples(*[st.integers(1, largest)] * 3))
    patch = draw(st.tuples(PATCHES, PATCHES, PATCHES))
    step = tuple(draw(st.integers(1, p or 40)) for p in patch)
    return tiles.plan(shape, patch, step, padding=draw(st.sampled_from(tiles.PADDINGS)))


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A volume whose voxels are all different."""
    return torch.arange(1, np.prod(shape) + 1, dtype=torch.float32).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(plans(largest=200))
def test_every_voxel_is_covered_and_no_tile_leaves_the_padded_volume(plan):
    for axis in range(3):
        covered = np.zeros(plan.padded_shape[axis], int)
        for origin in plan.origins[axis]:
            assert 0 <= origin <= plan.padded_shape[axis] - plan.patch[axis]
            covered[origin : origin + plan.patch[axis]] += 1
        assert covered[plan.crop[axis]].min() >= 1
        assert covered.min() >= 1
        assert list(plan.origins[axis]) == sorted(set(plan.origins[axis]))


@settings(max_examples=100, deadline=None)
@given(plans())
def test_tiles_have_sizes_a_network_takes(plan):
    assert all(p % 4 == 0 and p >= 8 for p in plan.patch)


@settings(max_examples=60, deadline=None)
@given(plans(largest=24))
def test_padding_keeps_the_volume_and_crop_gives_it_back(plan):
    volume = numbered(plan.shape)
    padded = tiles.pad(volume, plan)
    assert tuple(padded.shape) == plan.padded_shape
    assert torch.equal(padded[plan.crop], volume)
    if not plan.mirror:
        assert padded.sum(dtype=torch.float64) == volume.sum(dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(plans(largest=24), st.integers(1, 5))
def test_gather_reads_each_tile_where_the_plan_says(plan, batch):
    padded = tiles.pad(numbered(plan.shape), plan)
    buffer = torch.full((batch, 1, *plan.patch), torch.nan)
    origins = list(plan)
    assert len(origins) == len(plan) == np.prod(plan.grid)
    for start in range(0, min(len(plan), 12), batch):
        indices = range(start, min(start + batch, len(plan)))
        got = tiles.gather(padded, plan, indices, buffer)
        assert got.shape == (len(indices), 1, *plan.patch)
        for tile, (x, y, z) in zip(got, origins[start : indices.stop], strict=True):
            px, py, pz = plan.patch
            assert torch.equal(tile[0], padded[x : x + px, y : y + py, z : z + pz])


@settings(max_examples=60, deadline=None)
@given(plans(largest=24), st.integers(1, 5))
def test_a_view_is_what_is_gathered_without_a_copy(plan, batch):
    padded = tiles.pad(numbered(plan.shape), plan)
    for start in range(0, min(len(plan), 12), batch):
        indices = range(start, min(start + batch, len(plan)))
        seen = tiles.view(padded, plan, indices)
        assert seen is not None or len(indices) > 2
        if seen is not None:
            assert seen.untyped_storage()._cdata == padded.untyped_storage()._cdata
            assert torch.equal(seen, tiles.gather(padded, plan, indices))


def test_a_view_needs_one_distance_between_tiles_and_a_padded_volume():
    plan = tiles.plan((16, 16, 42), 16, 8)
    assert plan.origins[2] == (0, 8, 16, 24, 26)
    volume = numbered(plan.shape)
    assert tiles.view(volume, plan, [0, 1, 2, 3]) is not None
    assert tiles.view(volume, plan, [2, 3, 4]) is None  # the last tile is moved back
    assert tiles.view(volume, plan, [1, 0]) is None  # torch has no negative strides
    part = volume[:, :, 10:]  # what begins elsewhere in its memory
    inner = tiles.plan(part.shape, 16, 8)
    assert torch.equal(tiles.view(part, inner, [1, 2]), tiles.gather(part, inner, [1, 2]))
    short = tiles.plan((16, 16, 10), 16, 8)
    assert tiles.view(numbered(short.shape), short, [0]) is None


def test_order_is_c_order_of_the_grid():
    plan = tiles.plan((20, 16, 24), 8, 4)
    assert list(plan) == [(x, y, z) for x in plan.origins[0] for y in plan.origins[1] for z in plan.origins[2]]
    assert [plan.index(n) for n in range(len(plan))] == list(np.ndindex(plan.grid))


def test_shift_moves_only_the_last_tile():
    plan = tiles.plan((100, 128, 129), 64, 30)
    assert plan.origins == ((0, 30, 36), (0, 30, 60, 64), (0, 30, 60, 65))
    assert plan.padded_shape == plan.shape


def test_an_axis_shorter_than_the_patch_is_one_tile_of_the_next_allowed_size():
    plan = tiles.plan((70, 5, 203), (128, 64, None), 30)
    assert plan.patch == (72, 8, 204) and plan.origins == ((0,), (0,), (0,))
    assert plan.pad_before == (1, 1, 0)
    plan = tiles.plan((70, 5, 203), (80, 64, None), 30, multiple=32)
    assert plan.patch == (80, 32, 224) and plan.origins == ((0,), (0,), (0,)), "no larger than the patch"
    assert plan.crop == (slice(5, 75), slice(13, 18), slice(10, 213)) and plan.padded_shape == plan.patch


def test_mirror_padding_is_numpys_symmetric():
    plan = tiles.plan((3, 5, 8), 16, 4)
    volume = numbered(plan.shape)
    widths = [(b, t - n - b) for n, t, b in zip(plan.shape, plan.padded_shape, plan.pad_before, strict=True)]
    assert np.array_equal(tiles.pad(volume, plan).numpy(), np.pad(volume.numpy(), widths, mode="symmetric"))


@pytest.mark.parametrize(
    ("n", "patch", "step", "padded", "before"),
    [
        (36, 32, 16, 48, 6),  # (36 - 32) % 16 = 4, 12 added
        (48, 32, 16, 64, 8),  # aligned already: a whole step
        (37, 32, 16, 48, 5),  # 11 added: the smaller half in front
        (20, 32, 16, 32, 6),  # smaller than the patch, where the rule reaches it
        (10, 32, 16, 32, 11),  # and where it does not
        (36, None, 1, 40, 2),  # whole image: a multiple of 4, plus 4 when it already is
        (37, None, 1, 40, 1),
    ],
)
def test_original_padding(n, patch, step, padded, before):
    plan = tiles.plan((n, n, n), patch, step, padding="original")
    assert plan.padded_shape == (padded,) * 3 and plan.pad_before == (before,) * 3
    size = patch or padded
    assert plan.origins[0] == tuple(range(0, padded - size + 1, step))


@pytest.mark.parametrize("patch", [62, 4, 0, -8, 64.5, (64, 64), "64"])
def test_patches_that_no_network_takes_are_refused(patch):
    with pytest.raises(UsageError, match="patch"):
        tiles.plan((100, 100, 100), patch, 4)


@pytest.mark.parametrize("step", [0, -1, 65, (16, 16, 80), None, 2.5])
@pytest.mark.parametrize("padding", tiles.PADDINGS)
def test_steps_that_leave_gaps_are_refused(step, padding):
    with pytest.raises(UsageError, match="step"):
        tiles.plan((100, 100, 100), 64, step, padding=padding)


def test_other_nonsense_is_refused():
    with pytest.raises(UsageError, match="no voxels"):
        tiles.plan((10, 0, 10), 8, 4)
    with pytest.raises(UsageError, match="padding"):
        tiles.plan((10, 10, 10), 8, 4, padding="zeros")
