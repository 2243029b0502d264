"""Degradation in slabs: the whole volume's numbers, from any image that can be sliced, in less memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsrgan.core.draws import rng
from fastsrgan.core.threads import CACHED, each_piece
from fastsrgan.errors import ResourceError
from fastsrgan.observation.artefacts import ARTEFACTS, Drawn
from fastsrgan.observation.model import Degradation, degrade
from fastsrgan.observation.slabs import SharpImage, Slabs, acquire, interpolate, plan, truth
from fastsrgan.volume.intensity import add_noise, contrast_power, largest
from fastsrgan.volume.resample import degrade_matrix, support

EXTRAS = {"bias_field": 0.3, "rician": True, "width": 1.15, "motion": 0.6}


def head(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32) * 900


def smallest_budget(hr, spacing, low, **settings) -> int:
    """The smallest block_bytes that is accepted: as many slabs as there can be."""
    with pytest.raises(ResourceError) as refused:
        degrade(hr, spacing, low, block_bytes=1, **settings)
    return int(float(refused.value.hint.split()[1]) * 1e9)


def worst(a, b) -> float:
    assert a.low_res.shape == b.low_res.shape and a.scale == pytest.approx(b.scale, rel=1e-6)  # found: 2.6e-7
    return max(np.abs(getattr(a, n) - getattr(b, n)).max() for n in ("low_res", "interpolated", "hr"))


@pytest.fixture
def slab_counter(monkeypatch):
    """How many slabs were read, so that a comparison of the whole with the whole cannot pass for one with slabs."""
    read = []
    slab = SharpImage.slab

    def counted(self, start, stop):
        read.append((start, stop))
        return slab(self, start, stop)

    monkeypatch.setattr(SharpImage, "slab", counted)
    return read


@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("geometry", ["physical", "segsrgan"])
@pytest.mark.parametrize(
    ("shape", "low"),
    [((41, 37, 83), (1, 1, 3.37)), ((39, 73, 31), (1, 2.3, 1)), ((97, 39, 41), (5.9, 1.7, 2.1))],
    ids=["last axis", "middle axis", "all axes"],
)
@pytest.mark.usefixtures("poisoned")
def test_slabs_are_the_whole_volume(shape, low, geometry, extras, slab_counter):
    settings = {"power": 1.3, "noise": 0.03, "key": (3, 1, "sub-1", "noise"), "geometry": geometry, **extras}
    hr = head(shape)
    budget = smallest_budget(hr, (1, 1, 1), low, **settings)
    whole = degrade(hr, (1, 1, 1), low, **settings)
    slab_counter.clear()
    for times in (1, 1.7):
        # Found: 7.2e-7
        assert worst(degrade(hr, (1, 1, 1), low, block_bytes=int(times * budget), **settings), whole) < 2e-6
    assert len(slab_counter) > 12


@settings(max_examples=20)
@given(
    st.tuples(*[st.integers(6, 37)] * 3),
    st.floats(1.02, 6.3),
    st.integers(0, 2),
    st.integers(1, 9),
    st.integers(1, 11),
    st.booleans(),
)
def test_any_slabs_of_any_axis(shape, ratio, axis, slices, planes, biased):
    image, points = head(shape), rng(1, "points").uniform(-0.3, 0.3, (4, 4, 4))
    sizes = [ratio if d == axis else 1.0 for d in range(3)]
    down = [degrade_matrix(n, 1.0, r) for n, r in zip(shape, sizes, strict=True)]
    up = [None if d is None else d.T.copy() for d in down]
    source = SharpImage(image, axis, [Drawn(ARTEFACTS["bias_field"], points)] if biased else [])
    one, many = Slabs(*[max(shape)] * 2), Slabs(slices, planes)
    whole, parts = (acquire(source, down, slabs) for slabs in (one, many))
    assert (whole / parts - 1).abs().max() < 1e-6  # found: 2.4e-7
    raised = [interpolate(whole, up, axis, slabs) for slabs in (one, many)]
    assert (raised[0] - raised[1]).abs().max() < 900 * 1e-6  # found: 1.4e-7
    powers = [truth(source, 1.3, 900.0, slabs) for slabs in (one, many)]
    assert (powers[0] - powers[1]).abs().max() < 1e-6  # found: 2.4e-7
    assert np.array_equal(image, head(shape))


def test_the_sitk_interpolation_works_in_slabs_too():
    pytest.importorskip("SimpleITK", reason="SimpleITK, an optional package, is not installed")
    hr, settings = head((40, 41, 90)), {"geometry": "segsrgan", "interp": "sitk", "interpolation_type": "Linear"}
    budget = smallest_budget(hr, (1, 1, 1), (1, 1, 3), **settings)
    whole = degrade(hr, (1, 1, 1), (1, 1, 3), **settings)
    assert worst(degrade(hr, (1, 1, 1), (1, 1, 3), block_bytes=budget, **settings), whole) < 2e-6  # found: 3.6e-7


def test_noise_is_the_same_bits_in_any_pieces():
    x = torch.zeros(41, 43, 97)
    assert x.numel() > 2 * CACHED and x.numel() % CACHED
    expected = rng(5, "noise").standard_normal(x.shape, dtype=np.float32) * np.float32(0.25)
    assert np.array_equal(add_noise(x, 0.25, rng(5, "noise")).numpy(), expected)


@pytest.mark.parametrize("power", [0.01, 0.4, 0.97, 1.0, 1.3, 1.6, 4.0])
def test_contrast_power_is_the_power_in_any_pieces(power):
    x = head((41, 43, 97)) - 5
    out = torch.full(x.shape, float("nan"))
    contrast_power(torch.from_numpy(x), power, 900.0, out)
    expected = x / 900.0 if power == 1 else np.maximum(x.astype(float) / 900, 0) ** power
    assert np.abs(out.numpy() - expected).max() < 3e-7  # found: 1.5e-7
    assert power == 1 or (not out.numpy()[x <= 0].any() and out.numpy()[x > 0].all())
    part = contrast_power(torch.from_numpy(x[7:8]), power, 900.0)
    assert (part[0] - out[7]).abs().max() < 2e-7  # found: 0 (rounding)
    each_piece(lambda piece: piece.fill_(torch.nan), out)
    assert np.isnan(largest(out)) and torch.isnan(out).all()


def test_slices_read_the_planes_under_their_profile_and_no_more():
    matrix = degrade_matrix(200, 0.5, 3.1)
    poisoned = head((4, 5, 200))
    seen = support(matrix[10:14])
    assert seen.stop - seen.start < 60
    poisoned[..., : seen.start] = poisoned[..., seen.stop :] = np.nan
    alone = acquire(SharpImage(poisoned[..., seen], 2), [None, None, matrix[10:14, seen]], Slabs(4, 4))
    low = acquire(SharpImage(poisoned, 2), [None, None, matrix], Slabs(2, 200))
    assert torch.isfinite(alone).all() and torch.isnan(low[..., 0]).all()
    assert (low[..., 10:14] / alone - 1).abs().max() < 1e-6  # found: 0 (rounding)


def test_slabs_come_from_files_and_from_any_type(tmp_path):
    stored = (head((45, 47, 83)) * 30).astype(np.int16)
    np.save(tmp_path / "image.npy", stored)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    whole = degrade(stored.astype(np.float32), (1, 1, 1), (1, 1, 4.2), noise=0.02, key=1)
    budget = smallest_budget(mapped, (1, 1, 1), (1, 1, 4.2))
    for image in (mapped, np.asfortranarray(stored), stored.astype(">f4"), stored.astype(np.float64)):
        # Found: 3e-7
        assert worst(degrade(image, (1, 1, 1), (1, 1, 4.2), noise=0.02, key=1, block_bytes=budget), whole) < 2e-6


@pytest.mark.parametrize("low", [(1, 1, 1), (1, 1, 2.7)])
@pytest.mark.parametrize("block_bytes", [None, 10**6])
def test_the_image_is_never_written_to(low, block_bytes):
    hr = head((45, 47, 53))
    hr.flags.writeable = False
    before = hr.copy()
    tensor = torch.from_numpy(before.copy())
    a = degrade(hr, (1, 1, 1), low, power=0.8, noise=0.03, motion=0.3, bias_field=0.1, block_bytes=block_bytes)
    b = degrade(tensor, (1, 1, 1), low, power=0.8, noise=0.03, block_bytes=block_bytes)
    assert np.array_equal(hr, before) and np.array_equal(tensor.numpy(), before)
    assert isinstance(b.hr, torch.Tensor) and isinstance(a.hr, np.ndarray)
    c = degrade(hr, (1, 1, 1), low, power=0.8, noise=0.03, block_bytes=block_bytes)
    for name in ("low_res", "interpolated", "hr"):
        assert np.array_equal(getattr(b, name).numpy(), getattr(c, name))


def test_a_budget_below_one_slice_is_refused_with_what_it_takes():
    hr = head((50, 51, 60))
    with pytest.raises(ResourceError, match="block memory"):
        Degradation(((1, 1, 3),), block_bytes=1000).apply(hr, (1, 1, 1), Degradation(((1, 1, 3),)).draw(0, 1, "a"))
    slabs = plan(SharpImage(hr, 2), [None, None, degrade_matrix(60, 1, 3)], False, 10**9)
    assert slabs == Slabs(20, 60)


MEASURE = """
import sys
import numpy as np
from fastsrgan.observation.model import degrade

def memory(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])


def working_memory(hr, **settings):
    before = memory("VmRSS")
    done = degrade(hr, (1, 1, 1), (1, 1, 3), power=1.2, noise=0.03, bias_field=0.2, rician=True, **settings)
    return memory("VmHWM") - before - sum(a.nbytes for a in (done.low_res, done.interpolated, done.hr))


working_memory(np.ones((9, 9, 9), np.int16))
hr = np.random.default_rng(0).integers(0, 900, (121, 133, 501), np.int16)
print(working_memory(hr, block_bytes=int(sys.argv[1])), working_memory(hr))  # the higher peak last
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_slabs_keep_to_their_memory():
    budget = 6 * 2**20
    # glibc keeps what it took for small arrays; large ones, as those of volumes that need slabs, it gives back.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", MEASURE, str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    slabs, whole = map(int, done.stdout.split())
    assert slabs < budget and whole > 4 * budget
