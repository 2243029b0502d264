"""The laws of every draw of a training: of what it depends, that no two share a value, and the ranges of the paper."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from feed_store import make_store
from scipy import ndimage, stats
from spies import CONFIG, SUBJECTS, recorded, resident, spied

from fastsrgan.core.draws import rng
from fastsrgan.data import visit
from fastsrgan.data.feed import Feed, deal
from fastsrgan.data.pool import Pool
from fastsrgan.data.subject import PatchRule
from fastsrgan.data.visit import Visits
from fastsrgan.model.networks import Critic, CriticSpec, Generator, GeneratorSpec
from fastsrgan.observation.artefacts import ARTEFACTS
from fastsrgan.observation.model import Degradation, degrade
from fastsrgan.observation.synthesis import Synthesis
from fastsrgan.store.reader import Sample
from fastsrgan.train.validate import fixed_resident
from fastsrgan.volume.resample import FWHM, slice_axis

PAPER = Degradation(((1.0, 1.2, 2.0), (1.5, 2.0, 4.0)), contrast=0.5, noise=0.03)
SEEDS, EPOCHS = range(2), range(1, 41)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Values are inside the range and uniform over it, by a Kolmogorov-Smirnov test with fixed seeds."""
    assert low <= values.min() and values.max() <= high
    # 640 draws reach within 1 % of an end with a probability of 0.998; found: 0.62 % at most.
    assert values.min() < low + 0.01 * (high - low) and values.max() > high - 0.01 * (high - low)
    # Found: 0.06 to 0.84 over these keys. A range that is half as wide gives 1e-80.
    assert stats.kstest((values - low) / (high - low), "uniform").pvalue > 1e-3


def assert_unrelated(columns: dict[str, np.ndarray]) -> None:
    """No two columns share a value, and their ranks do not go together."""
    for (one, a), (two, b) in itertools.combinations(columns.items(), 2):
        assert not np.isclose(a, b, rtol=0, atol=1e-12).any(), (one, two)  # found: 1
        # Of 600 independent pairs |rho| is above 0.16 once in 10 000; found: at most 0.08.
        assert abs(stats.spearmanr(a, b).statistic) < 0.16, (one, two)


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """What is drawn for every seed, epoch and subject, as the number in [0, 1) that it was made of."""
    law = Degradation(PAPER.low_res, contrast=0.5, noise=0.03, profile=0.3, gap=0.4, profile_box=0.8, noise_from=0.01)
    found = [law.draw(seed, epoch, name) for seed in SEEDS for epoch in EPOCHS for name in SUBJECTS + ("sub-01", "s2")]
    low, high = np.array(law.low_res)
    axes = (np.array([d.low_res for d in found]) - low) / (high - low)
    return {
        "x": axes[:, 0],
        "y": axes[:, 1],
        "z": axes[:, 2],
        "contrast": np.array([d.power for d in found]) - 0.5,
        "width": (np.array([d.width for d in found]) - 0.7) / 0.6,
        "gap": np.array([d.gap for d in found]) / 0.4,
        "box": np.array([d.box for d in found]) / 0.8,
        "noise level": (np.array([d.noise for d in found]) - 0.01) / 0.02,
        "noise": np.array([rng(int(d.key[0]), *d.key[1:]).random() for d in found]),
    }


def test_each_draw_has_the_papers_range_and_no_two_share_a_value(drawn):
    """Contrast in [1 - c, 1 + c], every axis of its own in its bounds, over subjects, epochs and seeds."""
    for name, values in drawn.items():
        assert_uniform(values, 0.0, 1.0)
        assert len(set(values)) == len(values), f"{name}: another subject, epoch or seed has the same"
    assert_unrelated(drawn)


def test_subjects_epochs_and_seeds_are_drawn_apart():
    """None of the three is left out of a key: changing one alone changes every number."""
    plain = PAPER.draw(3, 5, "a")
    for other in (PAPER.draw(4, 5, "a"), PAPER.draw(3, 6, "a"), PAPER.draw(3, 5, "b")):
        assert plain.power != other.power and plain.key != other.key
        assert not set(plain.low_res) & set(other.low_res)


def test_no_two_purposes_share_a_key(monkeypatch, tmp_path):
    """Over a whole training, with everything on that draws: one place in the sources asks for a key, no other does."""
    store = make_store(tmp_path)
    found = recorded(monkeypatch)
    everything = dict.fromkeys(ARTEFACTS, 0.2)
    law = Degradation(PAPER.low_res, profile=0.1, gap=0.1, profile_box=0.5, artefacts=everything, rician=True)
    names = [s.id for s in store.subjects][:3]
    feed = Feed(store, law, PatchRule(16, 9), seed=0, device=torch.device("cpu"), threads=1)
    for epoch, name in itertools.product((1, 2), names):
        feed.prepare(epoch, name)
    # Of a subject with an image and tissues it is drawn which of the two a visit shows.
    both = dataclasses.replace(store.read("b"), tissues=store.read("b").mask + 1)
    visits = Visits(0.5, (2, 3), Synthesis())
    with monkeypatch.context() as patch:
        patch.setattr(store, "read", lambda name: both)
        dressed = Feed(store, law, PatchRule(16, 9), seed=0, device=torch.device("cpu"), threads=1, visits=visits)
        for epoch in range(3, 7):
            dressed.prepare(epoch, "b")
    for index, name in enumerate(names):
        fixed_resident(feed, store.read(name), index, len(names))
    for rank in range(2):
        spied(monkeypatch, CONFIG.replace(flips="xyz"), rank=rank, world=2)
    places: dict[tuple, set[str]] = {}
    for key, place in found:
        places.setdefault(key, set()).add(place)
    shared = {key: asked for key, asked in places.items() if len(asked) > 1}
    # Ranks deal the same permutation of subjects like cards: one key for all, from one place.
    assert not shared, shared
    purposes = {place for asked in places.values() for place in asked}
    assert len(purposes) >= 14, sorted(
        purposes
    )  # resolution, contrast, noise, ..., order, critic, flips, eps, subjects
    assert {key[0] for key in places} == {0}, "every key begins with the seed"


def test_noise_and_its_imaginary_channel_are_drawn_apart():
    flat = np.full((24, 24, 24), 100.0)
    plain = degrade(flat, (1, 1, 1), (1, 1, 2), noise=0.03, key=(0, "n"))
    both = degrade(flat, (1, 1, 1), (1, 1, 2), noise=0.03, key=(0, "n"), rician=True)
    real = plain.low_res * plain.scale - 100
    imaginary = np.sqrt(np.maximum((both.low_res * both.scale) ** 2 - (real + 100) ** 2, 0))
    # |N(0, 3)|: were both the same draw, the two would be proportional. Found: 0.01.
    assert abs(np.corrcoef(np.abs(real).ravel(), imaginary.ravel())[0, 1]) < 0.1
    assert imaginary.std() == pytest.approx(3 * np.sqrt(1 - 2 / np.pi), rel=0.05)  # found: within 1 %


def test_every_voxel_has_noise_of_its_own():
    """Also across the pieces in which a volume is worked on."""
    flat = np.full((64, 64, 40), 100.0)
    done = degrade(flat, (1, 1, 1), (1, 1, 1), noise=0.03, key=(0, "n"))
    noise = (done.low_res * done.scale - 100).ravel()
    assert len(np.unique(noise)) > 0.9 * noise.size  # found: 0.94
    for lag in (1, 40, 24576, 40 * 64):
        assert abs(np.corrcoef(noise[:-lag], noise[lag:])[0, 1]) < 0.02, lag  # found: at most 0.005


# --- the observation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["physical", "segsrgan"])
def test_the_low_resolution_is_clipped_at_zero_behind_the_noise(geometry):
    """Air takes the noise too, and no image that a scanner stores is negative: half of it is exactly 0."""
    hr = np.zeros((32, 32, 32))
    hr[8:24, 8:24, 8:24] = 50.0
    for power in (1.0, 1.4):
        done = degrade(hr, (1, 1, 1), (1, 1, 2), power=power, noise=0.1, key=(0, "n"), geometry=geometry)
        assert done.low_res.min() == 0 and done.low_res.max() == 1
        air = done.low_res[:6]
        assert 0.45 < (air == 0).mean() < 0.55  # found: 0.49 to 0.51


@pytest.mark.parametrize("power", [0.6, 1.5])
def test_the_contrast_comes_before_the_noise_whose_size_is_of_the_maximum_behind_it(power):
    """Noise of one size everywhere, whatever the power: raised with the image it would differ with the brightness."""
    hr = np.full((48, 32, 32), 200.0)
    hr[:24] = 60.0  # dark half: noise that was raised to a power would be of another size here
    done = degrade(hr, (1, 1, 1), (1, 1, 1), power=power, noise=0.02, key=(0, "n"))
    noisy = done.low_res * done.scale / 200**power  # the brightest voxel was 1 before the noise
    dark, bright = noisy[:20], noisy[28:]
    # Found: 1.9e-4
    assert bright.mean() == pytest.approx(1.0, abs=5e-4) and dark.mean() == pytest.approx(0.3**power, abs=5e-4)
    assert bright.std() == pytest.approx(0.02, rel=0.02)  # found: within 0.7 %
    assert dark.std() == pytest.approx(0.02, rel=0.02)  # found: 0.0058
    # The truth has the contrast, no noise, and the same scale.
    assert np.allclose(done.hr[30] * done.scale, 200**power, rtol=1e-6)  # found: 4.3e-8 (rounding)
    assert np.allclose(done.hr[2] * done.scale, 60**power, rtol=1e-6)  # found: 1.2e-7


@pytest.mark.parametrize("interp", ["scipy", "sitk"])
@pytest.mark.parametrize("spacing", [1.0, 0.5])
def test_the_originals_blur_is_of_the_resolution_in_mm_as_voxels(interp, spacing):
    """Sigma is resolution / 2.3548, computed in mm and used in voxels, on every axis, whatever the spacing."""
    if interp == "sitk":
        pytest.importorskip("SimpleITK", reason="pip install fastsrgan[sitk]")
    mm = (2 * spacing, 2 * spacing, 4 * spacing)
    hr = rng(0, "image").random((24, 20, 32)) + 0.5
    done = degrade(hr, (spacing,) * 3, mm, geometry="segsrgan", interp=interp)
    sigma = [r / 2.3548200450309493 for r in mm]
    blurred = ndimage.gaussian_filter(hr, sigma)
    if interp == "sitk":
        expected = blurred[::2, ::2, ::4]
    else:
        expected = ndimage.zoom(blurred, [spacing / r for r in mm], order=0)
    assert pytest.approx(2.3548200450309493, rel=1e-12) == FWHM  # found: 0 (rounding)
    # float32 products: found 3e-7. A sigma that is one per cent off differs by 2e-3.
    np.testing.assert_allclose(done.low_res * done.scale, expected, atol=2e-6 * expected.max())  # found: 0.14 of it


def test_of_equal_axes_the_last_is_across_the_slices():
    assert [slice_axis(mm) for mm in [(1, 1, 1), (3, 1, 3), (2, 2, 1), (1, 3, 1)]] == [2, 2, 1, 1]


# --- validation -----------------------------------------------------------------------------------------------------


def test_validation_noise_differs_per_subject_and_is_the_same_in_every_epoch():
    """Each Test subject has noise of its own, which no training draw has either."""
    draws = [PAPER.linspace(i, 4) for i in range(4)]
    seen = [rng(int(d.key[0]), *d.key[1:]).standard_normal(1000) for d in draws]
    for a, b in itertools.combinations(seen, 2):
        assert not np.isin(a, b).any() and abs(np.corrcoef(a, b)[0, 1]) < 0.15  # found: at most 0.05
    assert [PAPER.linspace(i, 4) for i in range(4)] == draws
    trained = {PAPER.draw(0, epoch, name).key for epoch in EPOCHS for name in ("0", "1", "validation")}
    assert not trained & {d.key for d in draws}
    flat = np.full((20, 20, 20), 10.0)
    images = [PAPER.apply(flat, (1, 1, 1), d, (1, 1, 1)).low_res for d in draws[1:3]]
    assert abs(np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1]) < 0.05  # found: 0.01


def test_which_visits_show_a_made_image_is_drawn_for_every_subject_epoch_and_seed(monkeypatch):
    """The share is that of all visits; no two subjects, epochs or seeds show made images together."""
    monkeypatch.setattr(
        visit, "synthesise", lambda tissues, *_: (torch.ones(tissues.shape), torch.from_numpy(tissues.astype(np.int16)))
    )
    ones = np.ones((2, 2, 2), np.uint8)
    both = Sample("a", "Train", ones.astype(np.float32), ones, None, np.eye(4), (1.0, 1.0, 1.0), ones)
    visits, names = Visits(0.3, (1,), Synthesis()), ("a", "b", "c", "d")
    made = np.array(
        [
            [[visits.of(both, (seed, epoch, name)).tissues is None for name in names] for epoch in range(1, 301)]
            for seed in SEEDS
        ]
    )
    assert 0.26 < made.mean() < 0.34  # of 2400 visits; found: 0.288
    series = [made[seed, :, k] for seed in SEEDS for k in range(len(names))]
    for a, b in itertools.combinations(series, 2):  # of 300 independent pairs |r| is above 0.22 once in 10 000
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.22  # found: at most 0.17
    for a in series:
        assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.22  # found: at most 0.083


# --- pool and feed --------------------------------------------------------------------------------------------------


def pool_of(rank: int = 0, **key) -> Pool:
    return Pool([resident(name) for name in SUBJECTS], 16, **{"seed": 1, "epoch": 1, "rank": rank, **key})


def test_critic_patches_come_from_all_residents_alike():
    """Uniform over every patch of every resident: in one batch, in one iteration and over many."""
    pool = pool_of()
    drawn = np.stack([pool.critic_indices(step, 32, 5) for step in range(40)])
    subjects = pool.table[drawn, 0]
    assert all(len(np.unique(batch)) >= 4 for batch in subjects.reshape(-1, 32))
    counts = np.bincount(drawn.ravel(), minlength=len(pool))
    assert stats.chisquare(counts).pvalue > 1e-3  # found: 0.4
    assert stats.chisquare(np.bincount(subjects.ravel(), minlength=len(SUBJECTS))).pvalue > 1e-3  # found: 0.15


def test_critic_draws_differ_over_updates_steps_groups_epochs_seeds_and_ranks():
    pools = [pool_of(), pool_of(rank=1), pool_of(group=1), pool_of(epoch=2), pool_of(seed=2)]
    batches = [batch for pool in pools for step in range(6) for batch in pool.critic_indices(step, 16, 5)]
    assert len({batch.tobytes() for batch in batches}) == len(batches)
    for a, b in itertools.combinations(batches, 2):
        assert (a == b).mean() < 0.6  # of 36 patches one in 36 agrees by chance; found: at most 0.31
    orders = [pool.order() for pool in pools]
    assert len({order.tobytes() for order in orders}) == len(orders)
    for order in orders:
        assert sorted(order) == list(range(len(pools[0])))


def test_flips_are_drawn_apart_for_every_patch_of_every_update():
    pool = pool_of(flips="xyz")
    generator = [indices // len(pool) for indices in pool.generator_batches(6)]
    critic = [row // len(pool) for step in range(6) for row in pool.critic_indices(step, 6, 5)]
    patterns = [tuple(bits) for bits in (*generator, *critic)]
    assert len(set(patterns)) == len(patterns)
    counts = np.bincount(np.concatenate([*generator, *critic]), minlength=8)
    assert stats.chisquare(counts).pvalue > 1e-3  # found: 0.3


def test_ranks_get_other_subjects_and_draw_other_patches():
    for epoch in (1, 2, 3):
        shares = [deal(list(SUBJECTS), 0, epoch, 2, rank, 2) for rank in range(2)]
        flat = [[name for group in share for name in group] for share in shares]
        assert sorted(flat[0] + flat[1]) == sorted(SUBJECTS)
    orders = {tuple(deal(list(SUBJECTS), seed, epoch, 6, 0, 1)[0]) for seed in SEEDS for epoch in EPOCHS}
    assert len(orders) > 70, "every epoch and seed has an order of its own"


def test_no_two_kernels_start_alike():
    """Initial values differ between layers, networks and seeds."""
    networks = [Generator(GeneratorSpec(kernel=2), seed=s) for s in (0, 1)]
    networks += [Critic(CriticSpec(kernel=2, patch=16), seed=s) for s in (0, 1)]
    first = [p.detach().flatten()[:8].numpy() for n in networks for p in n.parameters() if p.ndim == 5]
    for a, b in itertools.combinations([p / np.abs(p).max() for p in first], 2):
        assert not np.allclose(a, b)


def test_a_subject_looks_otherwise_in_every_epoch_and_seed(tmp_path):
    """What the feed gives, not what it could draw: contrast, resolution and noise of the epoch that was asked for."""
    store = make_store(tmp_path, [(20, 18, 22)])
    looks = []
    for seed, epoch in ((0, 1), (0, 2), (1, 1), (0, 1)):
        feed = Feed(store, PAPER, PatchRule(16, 9), seed=seed, device=torch.device("cpu"), threads=1)
        looks.append(feed.prepare(epoch, "a"))
    assert torch.equal(looks[0].interpolated, looks[3].interpolated)
    for a, b in itertools.combinations(looks[:3], 2):
        assert not torch.equal(a.hr, b.hr) and not torch.equal(a.interpolated, b.interpolated)
        assert a.resolution != b.resolution
