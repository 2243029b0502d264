"""CUDA kernels, checked three ways: run on the CPU through g++, compiled by NVRTC, run on a GPU if any.

Outputs are poisoned with NaN and lie between guards, so a voxel that is not written or one too many fails.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_host import equal_within, exactness, guarded, reference
from kernel_nvrtc import compile_for
from test_tiles import plans

from fastsrgan.core import kernels as backend
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.infer import stitch, sweep, tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.values import WINDOWS
from fastsrgan.model.networks import GeneratorSpec, build_generator

CPU = torch.device("cpu")
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CONVERSIONS = [("f32", "f32"), ("f32", "f16"), ("f32", "bf16"), ("f16", "f32"), ("bf16", "f32")]
NAMES = sorted(p.stem for p in backend.KERNEL_FOLDERS[1].glob("*.cu"))
VARIANTS = [
    *(("overlap_add", {"TILE": t}) for t in FLOATS),
    *(("gather_tiles", {"SOURCE": s, "TARGET": t}) for s, t in (*CONVERSIONS, ("u8", "f32"))),
    *(("gather_patches", {"IMAGE": t}) for t in FLOATS),
    *(("standard_normal", {"PASS": n}) for n in (0, 1)),
]
SHARED = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}  # fixtures that hold for all examples


# --- every operation ----------------------------------------------------------------------------------------------


def assert_kernel_equals_reference(operation: backend.Op, seed: int, device: torch.device) -> None:
    expected = operation.body(*operation.example(seed, device))
    got = operation.launch(*operation.example(seed, device))
    assert got is not NotImplemented
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, expected)), strict=True):
        assert b.isfinite().all() and equal_within(a, b, operation.rtol)


def test_every_kernel_is_an_operation_and_every_operation_a_kernel():
    assert sorted(backend.OPS) == NAMES == sorted({name for name, _ in VARIANTS})


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", sorted(backend.OPS))
def test_kernels_do_what_the_references_do(host, name, backwards, seed):
    """Also when the last thread runs first: no thread depends on another."""
    host.backwards = backwards
    assert_kernel_equals_reference(backend.OPS[name], seed, CPU)
    assert [ran for ran, _ in host.ran].count(name) == len(host.ran) > 0


@pytest.mark.parametrize("name", sorted(backend.OPS))
def test_kernels_stride_over_what_the_grid_leaves(host, monkeypatch, name):
    """CUDA takes 65535 blocks along y and z; with fewer, each does the work of several."""
    monkeypatch.setattr(backend, "MAX_GRID", (2**31 - 1, 5, 2))
    assert_kernel_equals_reference(backend.OPS[name], 0, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and backend.cupy_available()), reason="no CUDA device, or no CuPy")
@pytest.mark.parametrize("name", sorted(backend.OPS))
def test_kernels_do_what_the_references_do_on_a_gpu(name):
    assert_kernel_equals_reference(backend.OPS[name], 0, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("name", "defines"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_kernels_compile_for_gpus(name, defines, architecture):
    """Without headers: machine code comes out, no warning, and the kernel is in it by its plain name."""
    code = compile_for(backend.kernel_source(name), name, architecture, backend.define_options(defines))
    assert code.startswith(b"\x7fELF") and f".text.{name}".encode() in code


def test_only_written_multiply_adds_are_fused():
    """The roundings on a GPU are those of the text."""
    assert "fma.rn.f32" in _ptx_of("p[3] = fmaf(p[0], p[1], p[2]);")
    assert "fma.rn.f32" not in _ptx_of("p[3] = p[0] * p[1] + p[2];")


def _ptx_of(line: str) -> str:
    source = f'extern "C" __global__ void f(float* p) {{ {line} }}'
    return compile_for(source, "f", "compute_80", backend.define_options({})).decode()


# --- overlap_add --------------------------------------------------------------------------------------------------


def some_tiles(plan: tiles.TilePlan, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(plan), channels, *plan.patch, generator=generator).to(dtype)


def in_parts(plan: tiles.TilePlan, some: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    stitcher = stitch.Stitcher(plan, some.shape[1])
    for low, high in zip([0, *cuts], [*cuts, len(plan)], strict=True):
        stitcher.add(some[low:high])
    return stitcher.result()


@settings(max_examples=60, **SHARED)
@given(
    plans(largest=26),
    st.integers(1, 4),
    st.sampled_from(sorted(FLOATS)),
    st.sampled_from(sorted(WINDOWS)),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_overlap_add_equals_the_reference(host, poisoned, plan, channels, dtype, window, last, backwards, data):
    """Any plan, channels, type, memory format and batches; backwards too; the same bits."""
    if len(plan) * np.prod(plan.patch) * channels > 1_500_000:
        return
    plan, some = replace(plan, window=window), some_tiles(plan, channels, FLOATS[dtype])
    if last:
        some = some.to(memory_format=torch.channels_last_3d)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(plan) - 1), max_size=6))) if len(plan) > 1 else []
    expected = reference(lambda: in_parts(plan, some, cuts))
    host.backwards = backwards
    got = in_parts(plan, some, cuts)
    assert got.dtype == torch.float32 and got.isfinite().all()
    assert equal_within(got, expected, exactness())
    assert host.ran[-1] == ("overlap_add", {"TILE": dtype})


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("window", sorted(WINDOWS))
def test_overlap_add_of_ones_is_ones(host, poisoned, window, dtype):
    plan = tiles.plan((23, 31, 19), (12, 16, 8), (3, 5, 1), window=window)
    ones = torch.ones(1, 2, 1, 1, 1, dtype=FLOATS[dtype]).expand(len(plan), 2, *plan.patch)
    assert torch.equal(stitch.overlap_add(ones, plan), torch.ones(2, *plan.padded_shape))
    assert host.ran


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 7, 12, 16, 23])
def test_overlap_add_does_not_depend_on_batches_and_repeats_its_bits(host, poisoned, batch, backwards):
    """Batches that end within a row, with a row, with a slab, and hold several slabs."""
    plan = tiles.plan((24, 21, 31), (12, 12, 16), (5, 4, 5), window="gaussian")
    assert plan.grid == (4, 4, 4)
    some = some_tiles(plan, 2)
    whole = stitch.overlap_add(some, plan)
    host.backwards = backwards
    assert torch.equal(in_parts(plan, some, list(range(batch, len(plan), batch))), whole)
    assert torch.equal(stitch.overlap_add(some, plan), whole)


def test_overlap_add_writes_nothing_else(host):
    plan = tiles.plan((21, 15, 22), (12, 8, 12), (5, 3, 7), window="gaussian")
    stitcher = stitch.Stitcher(plan, 3)
    checks = []
    for owner, name in ((stitcher, "memory"), *((stitcher.adder, name) for name in ("slab", "row", "next_row"))):
        memory, untouched = guarded(tuple(getattr(owner, name).shape))
        setattr(owner, name, memory)
        checks.append(untouched)
    some = some_tiles(plan, 3)
    for part in some.split(5):
        stitcher.add(part)
    assert equal_within(stitcher.result(), reference(lambda: stitch.overlap_add(some, plan)), exactness())
    assert all(untouched() for untouched in checks)


def test_overlap_add_keeps_infinities_and_nan_where_they_are(host):
    plan = tiles.plan((20, 8, 8), (8, 8, 8), 4)
    some = some_tiles(plan, 1, torch.float16)
    some[0, 0, 1, 2, 3], some[3, 0, 7, 7, 7] = torch.inf, torch.nan
    out = stitch.overlap_add(some, plan)
    assert out[0, 1, 2, 3] == torch.inf and out[0, 19, 7, 7].isnan() and (~out.isfinite()).sum() == 2


def test_a_sum_is_finished_the_way_it_was_begun(host, monkeypatch):
    plan = tiles.plan((20, 20, 20), 8, 4)
    some = some_tiles(plan, 1)
    expected = reference(lambda: stitch.overlap_add(some, plan))
    stitcher = reference(lambda: stitch.Stitcher(plan, 1))
    stitcher.add(some)
    assert torch.equal(stitcher.result(), expected) and not host.ran
    stitcher = stitch.Stitcher(plan, 1)
    stitcher.add(some[:5])
    monkeypatch.setenv("FASTSRGAN_REFERENCE", "1")
    with pytest.raises(AssertionError, match="the way it was begun"):
        stitcher.add(some[5:])


# --- gather_tiles -------------------------------------------------------------------------------------------------


@settings(max_examples=60, **SHARED)
@given(plans(largest=24), st.sampled_from(CONVERSIONS), st.booleans(), st.data())
def test_gather_tiles_equals_the_reference(host, plan, types, padded, data):
    """From a padded volume and through the padding, any strides, from one type to another."""
    source, target = types
    if plan.padded_shape[0] * plan.padded_shape[1] * plan.padded_shape[2] > 60_000:
        return
    volume = torch.randn(plan.shape, generator=torch.Generator().manual_seed(1)).to(FLOATS[source])
    volume = volume.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert volume.shape == plan.shape
    if padded:
        volume = tiles.pad(volume, plan)
    first = data.draw(st.integers(0, len(plan) - 1))
    indices = range(first, min(first + 3, len(plan)))
    out, untouched = guarded((len(indices), 1, *plan.patch), FLOATS[target])
    tiles.gather(volume, plan, indices, out)
    expected = reference(
        lambda: tiles.gather(tiles.pad(volume, plan) if not padded else volume, plan, indices, out * 0)
    )
    assert torch.equal(out, expected) and untouched()
    assert host.ran[-1] == ("gather_tiles", {"SOURCE": source, "TARGET": target})


def test_gather_tiles_leaves_the_rest_of_the_buffer_alone(host):
    plan = tiles.plan((20, 20, 20), 8, 4)
    buffer = torch.full((5, 1, 8, 8, 8), torch.nan)
    got = tiles.gather(torch.ones(20, 20, 20), plan, range(2, 5), buffer)
    assert got.shape == (3, 1, 8, 8, 8) and (got == 1).all() and buffer[3:].isnan().all()
    assert host.ran


def test_what_the_kernel_does_not_take_goes_to_the_reference(host):
    plan = tiles.plan((20, 20, 20), 8, 4)
    assert tiles.gather(torch.ones(20, 20, 20, dtype=torch.float64), plan, range(3)).dtype == torch.float64
    out = torch.full((1, 8, 8, 8, 3), torch.nan).movedim(-1, 0)
    assert (tiles.gather(torch.ones(20, 20, 20), plan, range(3), out) == 1).all()
    assert not host.ran


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_every_half_becomes_its_float_and_comes_back(host, half):
    """All 65536 patterns: subnormals, infinities and signed zeros by their bits; NaN stays NaN."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(FLOATS[half]).view(32, 32, 64)
    floats, back = convert(values, torch.float32), convert(values.float(), FLOATS[half])
    nan = values.isnan()
    assert torch.equal(floats.view(torch.int32)[~nan], values.float().view(torch.int32)[~nan])
    assert torch.equal(back.view(torch.int16)[~nan], values.view(torch.int16)[~nan])
    assert floats[nan].isnan().all() and back[nan].isnan().all()
    assert host.ran


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_floats_round_to_halves_as_torch_rounds_them(host, half):
    """Random bits, every tie between neighbouring halves and its neighbours on both sides."""
    halves = torch.arange(2**15, dtype=torch.int32).to(torch.uint16).view(FLOATS[half]).float()
    ties = ((halves[:-1].double() + halves[1:].double()) / 2).float()
    ties = torch.cat([ties[ties.isfinite()], torch.tensor([65519.99, 65520.0, 65536.0, 3e38, 1e-45, 2.0**-25])])
    near = torch.cat([ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(torch.inf))])
    bits = torch.randint(-(2**31), 2**31, (60_000,), generator=torch.Generator().manual_seed(0)).int()
    values = torch.cat([near, -near, bits.view(torch.float32)])
    values = values[: len(values) // 1024 * 1024].view(32, 32, -1)[..., : len(values) // 4096 * 4]
    got, expected = convert(values, FLOATS[half]), values.to(FLOATS[half])
    nan = values.isnan()
    assert torch.equal(got.view(torch.int16)[~nan], expected.view(torch.int16)[~nan]) and got[nan].isnan().all()
    assert host.ran and values.numel() > 150_000


def convert(volume: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A volume as one tile of another type."""
    plan = tiles.plan(volume.shape, None, 1)
    assert plan.patch == tuple(volume.shape)
    return tiles.gather(volume, plan, range(1), torch.empty((1, 1, *plan.patch), dtype=dtype))[0, 0]


# --- gather_patches -----------------------------------------------------------------------------------------------


def residents(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, patch: int = 8) -> list[Resident]:
    made, rng = [], np.random.default_rng(0)
    for name, shape in zip("abc", shapes, strict=False):
        image, hr = (torch.from_numpy(rng.random(shape, np.float32)).to(dtype) for _ in range(2))
        label, mask = (torch.from_numpy(rng.integers(0, n, shape, np.uint8)) for n in (2, 4))
        origins = rng.integers(1 - patch, shape, (6, 3))  # at least one voxel inside
        made.append(Resident(name, image, hr, label, mask, 2.5, origins))
    return made


@settings(max_examples=40, **SHARED)
@given(
    st.lists(st.tuples(*[st.integers(1, 26)] * 3), min_size=1, max_size=3),
    st.sampled_from([8, 12, 17]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(sorted(FLOATS)),
    st.booleans(),
)
def test_gather_patches_equals_the_reference(host, poisoned, shapes, patch, classes, dtype, flipped):
    """Subjects of any size mixed in a batch, patches over every edge, mirrored or not."""
    pool = Pool(residents(shapes, FLOATS[dtype], patch), patch, mask_classes=classes)
    rng = np.random.default_rng(1)
    indices = rng.integers(len(pool), size=5)
    flips = rng.integers(0, 2, (5, 3)) > 0 if flipped else None
    got, expected = pool.gather(indices, flips), reference(lambda: pool.gather(indices, flips))
    assert torch.equal(got.x, expected.x) and torch.equal(got.y, expected.y) and got.ids == expected.ids
    assert got.y.dtype == torch.float32 and got.y.shape[1] == 2 + classes
    assert host.ran[-1] == ("gather_patches", {"IMAGE": dtype})


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_the_kernel_gathers_what_stands_there(host, poisoned, dtype):
    """Crop, mirror, conversion, both intensities and every mask class, beside plain indexing of padded volumes."""
    made = residents([(20, 13, 26), (9, 30, 17)], FLOATS[dtype])
    pool = Pool(made, 8, mask_classes=4, seed=2, flips="xyz")
    indices = np.concatenate(list(pool.generator_batches(5)))
    got = pool.gather(indices)
    assert host.ran[-1] == ("gather_patches", {"IMAGE": dtype}) and len(set(indices // len(pool))) > 3
    for b, (bits, row) in enumerate(zip(indices // len(pool), pool.table[indices % len(pool)], strict=True)):
        r, cut = made[row[0]], tuple(slice(o + 8, o + 16) for o in row[1:])
        mirrored = [d for d in range(3) if bits >> d & 1]
        z, x, label, mask = (
            torch.nn.functional.pad(v.float(), (8,) * 6)[cut].flip(mirrored)
            for v in (r.interpolated, r.hr, r.label, r.mask)
        )
        assert torch.equal(got.x[b, 0], z) and torch.equal(
            got.y[b], torch.stack([x, label, *(mask == c for c in range(4))])
        )


def test_flips_mirror_whole_patches(host):
    pool = Pool(residents([(20, 22, 24)]), 8, mask_classes=2)
    indices = np.array([0, 1, 2])
    plain = pool.gather(indices)
    turned = pool.gather(indices, np.array([[True, False, False], [False, True, True], [False] * 3]))
    for a, b in ((plain.x, turned.x), (plain.y, turned.y)):
        assert torch.equal(b[0], a[0].flip(1)) and torch.equal(b[1], a[1].flip(2, 3)) and torch.equal(b[2], a[2])


def test_patches_of_volumes_that_the_kernel_does_not_take(host):
    first = residents([(20, 22, 24)])[0]
    turned = Resident("t", first.interpolated.permute(2, 1, 0), *(v.permute(2, 1, 0) for v in (first.hr, first.label)),
                      None, 2.5, first.origins)  # fmt: skip
    pool = Pool([turned], 8)
    got = pool.gather(np.arange(4))
    assert torch.equal(got.y, reference(lambda: pool.gather(np.arange(4))).y) and not host.ran


# --- together -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_inference_is_the_same_with_kernels(host, batch):
    generator = build_generator(GeneratorSpec(kernel=2), seed=3)
    volume = torch.rand((18, 21, 16), generator=torch.Generator().manual_seed(0))
    plan = tiles.plan(volume.shape, 8, 5, window="gaussian")
    got, _ = sweep.predict(volume, plan, TileNetwork(generator, 3.0, batch=batch))
    expected, _ = reference(lambda: sweep.predict(volume, plan, TileNetwork(generator, 3.0, batch=batch)))
    assert {name for name, _ in host.ran} == {"gather_tiles", "overlap_add"}
    assert equal_within(got, expected, exactness())
