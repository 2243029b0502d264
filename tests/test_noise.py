"""Normal draws by a kernel: NumPy's own bits, from NumPy's own tables (volume/noise.py)."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from kernel_host import reference

from fastsrgan.core.draws import rng
from fastsrgan.volume import intensity, noise

CPU = torch.device("cpu")


class Interface(ctypes.Structure):
    """NumPy's ``bitgen_t``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("state", "next_64", "next_32", "next_double", "raw")]


class Words:
    """NumPy's normal draws from words of our choice; ``used`` of them by the last draw."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.used = 0
        bits = np.random.Philox(0)
        interface = Interface.from_address(ctypes.cast(bits.ctypes.bit_generator, ctypes.c_void_p).value)
        self._next = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p)(self._word)
        interface.next_32 = ctypes.cast(self._next, ctypes.c_void_p).value
        self._generator = np.random.Generator(bits)

    def _word(self, state: object) -> int:
        self.used += 1
        return self.words.pop(0) if self.words else 512  # of layer 0, near zero: certain

    def draw(self, *words: int) -> np.float32:
        self.words, self.used = list(words), 0
        return self._generator.standard_normal(dtype=np.float32)


def test_the_tables_are_numpys():
    """The limit of every layer, on both sides of it, and every width."""
    numpy = Words()
    certain, width, _ = (t.numpy() for t in noise.tables(CPU))
    for layer, limit in enumerate(certain.tolist()):
        if limit:
            inside = numpy.draw((limit - 1) << 9 | layer)
            assert numpy.used == 1 and inside == np.float32(limit - 1) * width[layer]
        numpy.draw(limit << 9 | layer, 2**32 - 1, 2**32 - 1)
        assert numpy.used > 1, layer


def test_several_threads_may_draw_at_once(host):
    """The host's form of a kernel kept where it was in one place for all callers: wrong draws, or no end."""
    with ThreadPoolExecutor(4) as crew:
        drawn = list(crew.map(lambda n: noise.standard_normal(torch.empty(50_000), rng(n, "x")), range(8)))
    for n, draws in enumerate(drawn):
        assert np.array_equal(draws.numpy(), rng(n, "x").standard_normal(50_000, dtype=np.float32))


@pytest.mark.parametrize("backwards", [False, True])
def test_long_streams_have_numpys_bits(host, backwards):
    """A million draws: 12,000 rejections and about 250 in the tail, whatever the order of the threads."""
    host.backwards = backwards
    out = noise.standard_normal(torch.full((1_000_003,), torch.nan), rng(7, 1, "a", "noise"))
    expected = rng(7, 1, "a", "noise").standard_normal(1_000_003, dtype=np.float32)
    assert [name for name, _ in host.ran] == ["standard_normal"] * 2
    assert np.array_equal(out.numpy().view(np.uint32), expected.view(np.uint32))
    assert (np.abs(expected) > noise.EDGE).sum() > 150


@pytest.mark.parametrize("n", [1, 2, 255, 4097])
def test_short_streams_too(host, n):
    for seed in range(5):
        out = noise.standard_normal(torch.empty(n), rng(seed, "x"))
        assert np.array_equal(out.numpy(), rng(seed, "x").standard_normal(n, dtype=np.float32))


@pytest.mark.parametrize("drawn", [1, 2, 7, 8, 9])
def test_what_has_drawn_before_goes_on_on_the_host(host, drawn):
    """A block of words is eight of 32 bits: after it nothing is left over that would tell."""
    used, same = rng(3, "x"), rng(3, "x")
    for one in (used, same):
        one.integers(2**32, size=drawn, dtype=np.uint32)
    out = noise.standard_normal(torch.empty(50), used)
    assert not host.ran and np.array_equal(out.numpy(), same.standard_normal(50, dtype=np.float32))


def test_other_generators_and_places_that_are_not_in_order_are_filled_on_the_host(host):
    out = noise.standard_normal(torch.empty(50), np.random.Generator(np.random.PCG64(5)))
    expected = np.random.Generator(np.random.PCG64(5)).standard_normal(50, dtype=np.float32)
    assert np.array_equal(out.numpy(), expected)
    out = noise.standard_normal(torch.empty(5, 10).T, rng(3, "x"))
    assert np.array_equal(out.numpy(), rng(3, "x").standard_normal((10, 5), dtype=np.float32)) and not host.ran


def test_a_stream_that_ends_too_early_is_drawn_again_from_twice_the_words(host, monkeypatch):
    run, words = noise.launch, []

    def launch(name, grid, args, PASS):
        run(name, grid, args, PASS=PASS)
        if PASS == 1:
            words.append(grid[0])
            if len(words) < 3:
                args[0][20:] = 0  # no draw begins there
            assert len(words) < 5, "would go on for ever"

    monkeypatch.setattr(noise, "launch", launch)
    out = noise.standard_normal(torch.full((50,), torch.nan), rng(3, "x"))
    assert np.array_equal(out.numpy(), rng(3, "x").standard_normal(50, dtype=np.float32))
    assert words == [words[0], 2 * words[0], 4 * words[0]]


def test_noise_on_a_device_is_noise_on_the_cpu(monkeypatch, host):
    """What a GPU does, whole at once by the kernel, beside what a CPU does, piece by piece: Gaussian and Rician."""
    image = torch.rand((31, 44, 53), generator=torch.Generator().manual_seed(0))
    keys = rng(1, "a"), rng(1, "a", "imaginary")
    draws = [noise.standard_normal(torch.empty(image.numel()), key) for key in keys]
    assert len(host.ran) == 4
    for own in (1, 2):
        got = image.flatten() + draws[0] * 0.03
        if own == 2:
            got = torch.hypot(got, draws[1] * 0.03)
        fresh = [rng(1, "a"), *([rng(1, "a", "imaginary")] if own == 2 else [])]
        expected = reference(lambda f=fresh: intensity.add_noise(image.clone(), 0.03, *f))
        assert torch.equal(got.view(image.shape), expected)
