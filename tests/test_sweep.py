"""Slab by slab or in one go, with tiles that need no pass: the same result, the same bits where that is promised."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import plans
from torch import nn

from fastsrgan.errors import ResourceError
from fastsrgan.infer import planes as slabs
from fastsrgan.infer import sweep, tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.stitch import Stitcher
from fastsrgan.infer.sweep import predict, stream
from fastsrgan.model.networks import GeneratorSpec, build_generator

WINDOWS = ("constant", "gaussian")


class Local(nn.Module):
    """Cheap; what comes out depends on where a tile lies. Counts the tiles that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.tiles = 0

    def forward(self, x):
        self.tiles += len(x)
        place = torch.linspace(0, 1, x.shape[2]).view(-1, 1, 1)
        return torch.cat([x * place + x.mean((2, 3, 4), keepdim=True), x.square()], 1)


class Planes:
    """A source that is not in memory, and remembers what it was asked for."""

    def __init__(self, volume: torch.Tensor) -> None:
        self.volume, self.shape, self.asked = volume, tuple(volume.shape), []

    def planes(self, first, stop):
        self.asked.append((first, stop))
        return self.volume[first:stop].clone()


def some(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def streamed(source, plan, network, batch="auto", done=0, region=None) -> tuple[torch.Tensor, dict]:
    """What the sink gets; every plane once."""
    out = torch.full((2, *plan.shape), torch.nan)

    def sink(first, planes):
        assert out[:, first : first + planes.shape[1]].isnan().all()
        out[:, first : first + planes.shape[1]] = planes

    return out, stream(source, plan, TileNetwork(network, 1.0, batch=batch), sink, region=region, done=done)


@pytest.fixture(scope="module")
def generator():
    return build_generator(GeneratorSpec(kernel=1), seed=1).eval()


# --- ones ---------------------------------------------------------------------------------------------------------


class Ones(nn.Module):
    """Ones in some precision, wherever the tile lies."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return torch.ones_like(x, dtype=self.dtype).expand(-1, 2, -1, -1, -1)


@settings(max_examples=80, deadline=None)
@given(
    plans(largest=30),
    st.sampled_from(WINDOWS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 4, "auto"]),
    st.booleans(),
)
def test_ones_in_ones_out(plan, window, dtype, batch, rolling):
    """Every window, step, tile precision, odd size, padding and way: exactly one."""
    if len(plan) > 3000:
        return
    volume, plan = some(plan.shape), replace(plan, window=window)
    out = (
        streamed(Planes(volume), plan, Ones(dtype), batch)[0]
        if rolling
        else predict(volume, plan, TileNetwork(Ones(dtype), 1.0, batch=batch))[0]
    )
    assert torch.equal(out, torch.ones(2, *plan.shape))


# --- by slabs -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(plans(largest=26), st.sampled_from(WINDOWS), st.sampled_from([1, 3, "auto"]))
def test_slabs_give_the_same_bits(plan, window, batch):
    """Any plan: padded, smaller than a tile, one slab only; from memory and from a source that is not in memory."""
    if len(plan) > 400:
        return
    volume, network, plan = some(plan.shape), Local(), replace(plan, window=window)
    whole, _ = predict(volume, plan, TileNetwork(network, 1.0, batch=batch))
    for source in (slabs.Whole(volume), Planes(volume)):
        out, facts = streamed(source, plan, network, batch)
        assert torch.equal(out, whole) and facts["tiles_network"] + facts["tiles_constant"] == len(plan)


def test_slabs_give_the_same_bits_with_a_real_network(generator):
    volume = some((50, 30, 21))
    plan = tiles.plan(volume.shape, 16, (5, 9, 7))
    for batch in ("auto", 3):
        whole, _ = predict(volume, plan, TileNetwork(generator, 1.0, batch=batch))
        assert torch.equal(streamed(Planes(volume), plan, generator, batch=batch)[0], whole)


@settings(max_examples=60, deadline=None)
@given(plans(largest=30))
def test_planes_are_loaded_once_and_in_order(plan):
    volume = some(plan.shape)
    source, padded = Planes(volume), tiles.pad(volume, plan)
    held = slabs.Held(source, plan)
    for x in plan.origins[0]:
        assert torch.equal(held.planes(x, x + plan.patch[0]), padded[x : x + plan.patch[0]])
        assert len(held.memory) == plan.patch[0]
        first, stop = max(0, x - plan.pad_before[0]), min(plan.shape[0], x + plan.patch[0] - plan.pad_before[0])
        if first < stop:
            assert torch.equal(held.inner(first, stop), volume[first:stop])
    if plan.pad_before[0] == 0:
        firsts = [a for a, b in source.asked if b - a > 1]
        assert firsts == sorted(firsts)


class Sociable(Local):
    """What comes out also depends on the tiles in the batch, as the rounding of convolutions does."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x.mean() + 0.01 * len(x)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("padding", tiles.PADDINGS)
def test_a_run_that_goes_on_gives_the_same_bits(window, padding):
    """From every plane at which a run could have been killed."""
    volume = some((29, 12, 10))
    plan = tiles.plan(volume.shape, 8, 3, padding=padding, window=window)
    whole, _ = streamed(Planes(volume), plan, Sociable(), 2)
    computed = []
    for done in range(30):
        out, facts = streamed(Planes(volume), plan, Sociable(), 2, done=done)
        assert out[:, :done].isnan().all() and torch.equal(out[:, done:], whole[:, done:])
        computed.append(facts["tiles_network"])
    assert computed[0] == len(plan) and computed == sorted(computed, reverse=True) and computed[28] < len(plan) / 2


def test_any_array_that_takes_slices_is_a_sink():
    class Zarr:
        """Like a Zarr array: assignment only."""

        def __init__(self):
            self.written = []

        def __setitem__(self, key, value):
            self.written.append((key[1].start, value.copy()))

    volume, plan = some((20, 9, 8)), tiles.plan((20, 9, 8), 8, 5)
    array, target = Zarr(), np.full((2, 20, 9, 8), np.nan, np.float32)
    for store in (array, target):

        def write(first, planes, store=store):
            store[:, first : first + planes.shape[1]] = planes.numpy()

        stream(slabs.Whole(volume), plan, TileNetwork(Local(), 1.0), write)
    assert np.array_equal(np.concatenate([planes for _, planes in array.written], axis=1), target)
    assert [first for first, _ in array.written] == [0, 5, 10, 12]
    assert np.array_equal(target, predict(volume, plan, TileNetwork(Local(), 1.0))[0].numpy())


@pytest.mark.parametrize("when", ["begin", "middle"])
def test_sums_move_to_the_cpu_when_the_device_is_full(when, generator, monkeypatch, caplog):
    """Two devices that are both this CPU: on the first one memory runs out, when sums are made or later on."""
    volume, plan = some((30, 12, 12)), tiles.plan((30, 12, 12), 8, 4)
    expected, _ = predict(volume, plan, TileNetwork(generator, 1.0, batch=2))
    first, second = torch.device("cpu", 0), torch.device("cpu")
    monkeypatch.setattr(sweep, "sum_devices", lambda device: [first, second])
    right = sweep.Stitcher.__init__, sweep.Stitcher.add
    calls = []

    def full(self, *args, **kwargs):
        right[0](self, *args, **kwargs)
        if when == "begin" and self.device == first:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def add(self, some_tiles):
        calls.append(self.device)
        if when == "middle" and self.device == first and len(calls) > 8:
            raise RuntimeError("CUDA error: out of memory")
        right[1](self, some_tiles)

    monkeypatch.setattr(sweep.Stitcher, "__init__", full)
    monkeypatch.setattr(sweep.Stitcher, "add", add)
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        out, _ = streamed(Planes(volume), plan, generator, batch=2)
    assert torch.allclose(out, expected, rtol=0, atol=1e-5)  # found: 0 (rounding)
    assert [r.getMessage() for r in caplog.records] == [
        "out of memory on cpu:0: the result is summed on the CPU, which is slower"
    ]
    monkeypatch.setattr(sweep, "sum_devices", lambda device: [first])
    calls.clear()
    with pytest.raises((torch.OutOfMemoryError, RuntimeError), match="out of memory"):
        streamed(slabs.Whole(volume), plan, generator, batch=2)


# --- tiles of one value -------------------------------------------------------------------------------------------


def blocks(shape=(40, 24, 24)):
    """Noise in the middle, one value in front, another behind."""
    volume = torch.zeros(shape)
    volume[16:24] = some((8, *shape[1:]))
    volume[24:] = 0.25
    return volume


def test_tiles_of_one_value_are_computed_once_for_each_value():
    volume, plan, network = blocks(), tiles.plan((40, 24, 24), 8, 4), Local()
    expected = np.zeros((2, 40, 24, 24))
    count = np.zeros((40, 24, 24))
    constant = 0
    for origin in plan:
        at = tuple(slice(o, o + 8) for o in origin)
        expected[(slice(None), *at)] += network(volume[at][None, None])[0].numpy()
        count[at] += 1
        constant += int(volume[at].min() == volume[at].max())
    network.tiles = 0
    out, facts = predict(volume, plan, TileNetwork(network, 1.0))
    # Found: 1.8e-7
    assert np.abs(out.numpy() - (expected / count).clip([[[[-9]]], [[[0]]]], [[[[9]]], [[[1]]]])).max() < 1e-6
    assert facts["tiles_constant"] == constant > len(plan) / 3
    assert network.tiles == len(plan) - constant + 2, "two values"
    again, _ = predict(volume, plan, TileNetwork(network, 1.0))
    assert torch.equal(out, again)


@pytest.mark.parametrize("spec", [{}, {"conditional": True}, {"network": "unet", "mask_classes": 3}, {"scaled": True}])
def test_a_tile_of_one_value_is_what_its_own_pass_gives(spec):
    """Exact: such tiles have the bits of a batch of one; the result agrees with one pass for every tile."""
    generator = build_generator(GeneratorSpec(kernel=2, **spec), seed=3).eval()
    volume = blocks((40, 12, 12))
    plan = tiles.plan(volume.shape, 8, 4)
    out, facts = predict(volume, plan, TileNetwork(generator, 2.0, batch=3))
    assert facts["tiles_constant"] > 0
    network = TileNetwork(generator, 2.0)
    with network.working():
        alone = network(torch.full((1, 1, 8, 8, 8), 0.25))[0]
    lone, _ = predict(torch.full((8, 8, 8), 0.25), tiles.plan((8, 8, 8), 8, 8), TileNetwork(generator, 2.0))
    assert torch.equal(lone[1:], alone[1:].clamp(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_is_constant", lambda *args: False)
        every, counted = predict(volume, plan, TileNetwork(generator, 2.0, batch=3))
    assert counted["tiles_constant"] == 0 and (every - out).abs().max() < 1e-6  # found: 0 (rounding)


def test_a_volume_of_one_value_costs_one_tile(generator):
    network = Local()
    out, facts = predict(torch.full((40, 40, 40), 3.0), tiles.plan((40, 40, 40), 16, 4), TileNetwork(network, 1.0))
    assert network.tiles == 1 and facts["tiles_network"] == 0 and out.shape == (2, 40, 40, 40)


def test_only_so_many_values_are_kept(generator):
    """A staircase: more values than are remembered is slower, not wrong."""
    volume = torch.arange(8.0).repeat_interleave(8).view(-1, 1, 1).expand(64, 8, 8).contiguous()
    network = Local()
    plan = tiles.plan(volume.shape, 8, 8)
    out, facts = predict(volume, plan, TileNetwork(network, 1.0))
    assert facts["tiles_constant"] == 8 == network.tiles
    assert torch.allclose(out[0, 0::8], 2 * volume[0::8] - volume[0::8], atol=1e-6)  # found: 0 (rounding)


# --- regions ------------------------------------------------------------------------------------------------------


def identity_index(shape):
    return [np.arange(n) for n in shape]


@settings(max_examples=30, deadline=None)
@given(plans(largest=24), st.sampled_from(WINDOWS), st.data())
def test_a_region_is_computed_as_without_it_and_the_rest_left_alone(plan, window, data):
    if len(plan) > 300:
        return
    volume, plan = some(plan.shape), replace(plan, window=window)
    generator = build_generator(GeneratorSpec(kernel=1), seed=4).eval() if len(plan) < 9 else Local()
    mask = np.zeros(plan.shape, bool)
    corner = [data.draw(st.integers(0, n - 1)) for n in plan.shape]
    mask[tuple(slice(c, c + data.draw(st.integers(1, 9))) for c in corner)] = True
    wanted = tiles.from_mask(mask, identity_index(plan.shape))
    whole, _ = predict(volume, plan, TileNetwork(generator, 1.0))
    out, facts = predict(volume, plan, TileNetwork(generator, 1.0), region=wanted)
    inside = torch.from_numpy(mask)
    assert (out - whole)[:, inside].abs().max() < 1e-5  # found: 0 (rounding)
    assert torch.equal(out[0][~inside], volume[~inside]) and (out[1:, ~inside] == 0).all()
    touched = 0
    for at in plan:
        first = [o - b for o, b in zip(at, plan.pad_before, strict=True)]
        block = tuple(slice(max(0, a), max(0, a + p)) for a, p in zip(first, plan.patch, strict=True))
        touched += bool(mask[block].any())
    assert facts["tiles_outside"] == len(plan) - touched
    by_slabs, _ = streamed(Planes(volume), plan, generator, region=wanted)
    assert torch.equal(by_slabs, out)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_region_meets_the_tiles_that_see_it_wherever_padding_lies_in_front(axis):
    """Of every voxel along an axis that has three zeros in front of it: no tile too few, and none too many."""
    shape = [8, 8, 8]
    shape[axis] = 22
    plan = tiles.plan(shape, 8, 7, padding="original")
    assert plan.pad_before == (3, 3, 3) and plan.grid[axis] == 4
    volume, network = some(plan.shape), Local()
    whole, _ = predict(volume, plan, TileNetwork(network, 1.0))
    for place in range(22):
        mask = np.zeros(plan.shape, bool)
        mask[tuple(place if d == axis else 4 for d in range(3))] = True
        region = tiles.from_mask(mask, identity_index(plan.shape))
        out, facts = predict(volume, plan, TileNetwork(network, 1.0), region=region)
        padded = np.pad(
            mask, [(b, n - m - b) for b, n, m in zip(plan.pad_before, plan.padded_shape, plan.shape, strict=True)]
        )
        seen = sum(padded[tuple(slice(o, o + 8) for o in at)].any() for at in plan)
        assert facts["tiles_outside"] == len(plan) - seen and 0 < seen < len(plan)
        assert torch.allclose(out[:, mask], whole[:, mask], atol=1e-6)  # found: 0 (rounding)


def test_a_box_is_a_region():
    index = [np.array([0, 0, 1, 1, 2, 2, 3]), np.arange(5), np.arange(4)]
    box = tiles.from_box((1, 0, 2), (2, 3, 3), index)
    planes = box.planes(0, 7)
    assert planes.shape == (7, 5, 4) and planes.sum() == 4 * 4 * 2
    assert planes[2:6, :4, 2:].all()
    assert box.touches((0, 0, 0), (3, 1, 3)) and not box.touches((0, 0, 0), (2, 5, 4))
    assert not box.touches((6, 0, 0), (9, 9, 9)) and box.touches((-5, -5, -5), (50, 50, 50))
    assert not box.touches((-9, 0, 0), (0, 5, 4)), "wholly in front of the volume"


def test_the_box_around_a_head(phantom):
    data = np.pad(np.asarray(phantom.data), ((9, 3), (4, 12), (7, 7)))
    noisy = data + np.random.default_rng(0).rayleigh(0.01 * data.max(), data.shape)
    for image in (data, noisy):
        low, high = tiles.head_box(image, (4.0, 4.0, 4.0))
        tissue = np.argwhere(data > 0.1 * data.max())
        first, last = tissue.min(0), tissue.max(0)
        assert all(0 <= a - b <= 6 for a, b in zip(first, low, strict=True)), (first, low)
        assert all(0 <= b - a <= 6 or b == n - 1 for a, b, n in zip(last, high, data.shape, strict=True)), (last, high)


def test_the_margin_around_a_head_is_one_length_in_mm_on_every_axis():
    data = np.zeros((40, 40, 40), np.float32)
    data[15:25, 15:25, 15:25] = 100
    low, high = tiles.head_box(data, (1.0, 2.0, 5.0))
    assert (low, high) == ((5, 10, 13), (34, 29, 26))  # 10, 5 and 2 voxels
    assert tiles.head_box(data, (0.5, 9.0, 30.0)) == ((0, 14, 15), (39, 25, 24)), "not beyond the volume"


def test_a_tile_without_room_is_an_error_with_a_hint(generator):
    class Full(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ResourceError, match="one tile of 8 x 8 x 8"):
        predict(torch.zeros(20, 8, 8), tiles.plan((20, 8, 8), 8, 4), TileNetwork(Full(), 1.0))


class Careless(nn.Module):
    """Not one of ours: it works in place on what it was given."""

    def forward(self, x):
        return torch.cat([x.mul_(2), x], 1)


@pytest.mark.parametrize(
    "spec",
    [
        GeneratorSpec(kernel=2),
        GeneratorSpec(kernel=2, scaled=True, mask_classes=2),
        GeneratorSpec("unet", kernel=2),
        GeneratorSpec(kernel=2, conditional=True),
        GeneratorSpec(kernel=2, residual=False),
    ],
    ids=str,
)
def test_our_generators_look_at_the_volume_and_leave_it_alone(monkeypatch, spec):
    volume, plan = some((20, 16, 32)).double(), tiles.plan((20, 16, 32), 16, 8)
    before, network = volume.clone(), TileNetwork(build_generator(spec).double(), 1.0)
    network.size = 3
    with network.working():
        seen = torch.cat(list(network.outputs(volume, plan, range(len(plan)))))
        assert torch.equal(volume, before)
        monkeypatch.setattr(tiles, "view", lambda *given: None)
        copied = torch.cat(list(network.outputs(volume, plan, range(len(plan)))))
    torch.testing.assert_close(seen, copied, rtol=1e-6, atol=1e-6)  # found: 0 of it


def test_a_network_of_unknown_make_gets_copies():
    volume, plan = some((16, 16, 32)), tiles.plan((16, 16, 32), 16, 8)
    before = volume.clone()
    out, _ = predict(volume, plan, TileNetwork(Careless(), 1.0))
    assert torch.equal(volume, before)
    torch.testing.assert_close(out[0], 2 * before)


@pytest.mark.parametrize(("batch", "planes"), [(1, 24), (3, 40)])
def test_a_sweep_holds_the_planes_of_as_many_slabs_as_fill_its_batches(batch, planes):
    """Of four slabs of four tiles two, or all, are a group of eight batches, as the plan of its memory counts them."""
    plan, held = tiles.plan((40, 24, 20), 16, 8), []
    network = TileNetwork(Local(), 1.0, batch=batch)
    network.choose_batch(batch, plan)
    watched = sweep.Sweep(Planes(some(plan.shape)), plan, network, watch=lambda: held.append(watched.held.memory) or {})
    with watched.timed(""):
        watched.run(lambda channels: Stitcher(plan, channels))
    assert plan.grid == (4, 2, 2) and max(map(len, held)) == planes
