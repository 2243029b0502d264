"""Adapting a network's image to its scan: parts sum to the whole, known truths are found, nothing else is touched."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from nifti_files import rigid
from scipy import ndimage

from fastsrgan.cli.main import main
from fastsrgan.infer import modes
from fastsrgan.infer import volume as infer
from fastsrgan.infer.memory import SLABS, plan_memory
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.volume import adapt
from fastsrgan.volume.acquisition import assumed
from fastsrgan.volume.adapt import BESIDES, DETAIL, IMAGE, SEEN, Around, Learned, Trial, adapt_, bands, learn, scales
from fastsrgan.volume.consistency import agree, observation, residual
from fastsrgan.volume.resample import slice_profile_matrix, spline_matrix

RATIO, SHAPE, UNIT = 3.0, (40, 44, 48), 1.0


def textured(seed=0, shape=SHAPE, sd=1.0):
    """(X, Y, Z) float32: texture of about unit brightness, all of it tissue."""
    noise = np.random.default_rng(seed).normal(size=shape)
    rough = ndimage.gaussian_filter(noise, sd)
    return torch.from_numpy((0.6 + 0.1 * rough / rough.std()).astype(np.float32))


def thick(truth, ratio=RATIO):
    """Its slices, their interpolation, and D."""
    n = truth.shape[2]
    down = slice_profile_matrix(n, int(n / ratio), ratio)
    scan = truth @ torch.from_numpy(down.T.astype(np.float32))
    up = spline_matrix(len(down), n, 1 / ratio)
    return scan, scan @ torch.from_numpy(up.T.astype(np.float32)), down


W = 0.003


def trial(network, seed=0):
    truth = textured(seed)
    scan, start, down = thick(truth)
    return Trial(truth, scan, start, network(truth, start), down, torch.ones(*SHAPE[:2], 1))


def adapted(image, start, learned, **more):
    """A copy of the image, adapted."""
    made = np.asarray(image).copy()
    down = thick(start)[2]
    adapt_(made, lambda first, stop: start[first:stop], learned, RATIO, down, W, UNIT, **more)
    return made


def drawn(seed=5, size=0.1):
    """A perceptron that learned nothing, of which every layer answers."""
    rows = np.random.default_rng(seed)
    shapes = [layer.shape for layer in adapt._first_layers()]
    layers = tuple(torch.from_numpy(rows.normal(0, 0.2, shape).astype(np.float32)) for shape in shapes)
    scaling = tuple(torch.tensor([[[0.0]] * n, [[0.1]] * n]) for n in (SEEN, BESIDES))
    return Learned(layers, scaling, size)


def agreed(image, scan, ratio=RATIO, w=0.003):
    made = image.numpy().copy()
    n, m = image.shape[2], scan.shape[2]
    seen = observation(scan.shape, (1, 1, ratio), image.shape, (1, 1, ratio * m / n))
    agree(made, scan.numpy(), seen, w)
    return made


def error(image, truth):
    return float(((np.asarray(image) - np.asarray(truth))[6:-6, 6:-6] ** 2).mean())


def test_bands_and_scales_sum_to_the_whole():
    for n, ratio, knots in itertools.product((48, 61), (2.0, 3.3, 6.0), (DETAIL, IMAGE)):
        assert np.abs(sum(bands(n, ratio, knots)) - np.eye(n)).max() < 1e-12  # found: 7.5e-15
    volume = textured()
    assert (sum(scales(volume)) - volume).abs().max() < 1e-6  # found: 1.5e-8


def test_bands_are_of_rising_frequency_and_leave_the_mean_to_the_first():
    n, ratio = 60, 3.0
    waves = [np.cos(np.pi * (np.arange(n) + 0.5) * k / n) for k in (0, n / ratio * 1.0, n / ratio * 1.8)]
    shares = [[float(wave @ band @ wave / (wave @ wave)) for band in bands(n, ratio, DETAIL)] for wave in waves]
    assert np.allclose(shares, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], atol=1e-9)  # found: 4.4e-16
    flat = [float(np.abs(band @ np.ones(n)).max()) for band in bands(n, ratio, IMAGE)]
    assert flat[0] == pytest.approx(1) and max(flat[1:]) < 1e-9  # found: 1.2e-14


def test_what_a_network_leaves_out_is_learned(all_steps):
    """It finds half of what is missing: the rest is learned, on textures that were not seen too."""
    half = [trial(lambda truth, start: start + 0.5 * (truth - start), seed) for seed in (0, 1)]
    learned = learn(half, RATIO, W, UNIT)
    assert learned.gain_db > learned.gain_db_without + 10  # found: 49.67 and 7.27
    truth = textured(7)
    scan, start, _ = thick(truth)
    network = start + 0.5 * (truth - start)
    before, after = (
        error(agreed(v, scan), truth) for v in (network, torch.from_numpy(adapted(network, start, learned)))
    )
    assert after < before / 100  # found: 16,822 times


def test_what_a_network_makes_up_is_taken_out():
    def wrong(truth, start):
        return start + 0.05 * (textured(99) - 0.6) / 0.1

    learned = learn([trial(wrong, seed) for seed in (0, 1)], RATIO, W, UNIT)
    assert learned.gain_db > learned.gain_db_without + 0.8  # found: 1.20 more


def test_gains_are_those_of_the_results_on_lines_that_were_kept_back():
    """In dB over interpolation, after agreement with the scan, with what was learned and without."""
    made = trial(lambda truth, start: start + 0.5 * (truth - start), 2)
    learned = learn([made], RATIO, W, UNIT)
    i, j = adapt._lines(made.truth > 0).nonzero().T
    kept = (i // adapt.TILE + 2 * (j // adapt.TILE)) % adapt.KEPT_BACK == 0
    results = (made.result, torch.from_numpy(adapted(made.result, made.start, learned)))
    errors = [((agreed(v, made.scan) - made.truth.numpy())[i[kept], j[kept]] ** 2).mean() for v in results]
    base = ((made.start - made.truth)[i[kept], j[kept]] ** 2).mean()
    gains = [10 * np.log10(float(base) / error) for error in errors]
    assert gains == pytest.approx([learned.gain_db_without, learned.gain_db], abs=0.02)  # found: 0.006
    assert learned.gain_db > learned.gain_db_without + 3


def test_gains_are_told_of_lines_that_were_not_learned_from(monkeypatch):
    """Where the truth is chance, nothing holds on other lines, however well those that were seen are known."""
    rows = np.random.default_rng(0)

    def chance(seed):
        made = trial(lambda truth, start: start, seed)
        return replace(made, truth=made.truth + 0.1 * torch.from_numpy(rows.standard_normal(SHAPE, np.float32)))

    found = learn([chance(0), chance(1)], RATIO, W, UNIT)
    assert found.gain_db < found.gain_db_without + 0.2  # found: 0; with 600 steps 0.02 less
    parts = [adapt._part(chance(seed), RATIO, W, UNIT) for seed in (0, 1)]
    shares = [1 - part.learned / len(part.near) for part in parts]
    assert all(0.15 < share < 0.25 for share in shares)  # found: 0.20


def test_learning_begins_at_the_image_as_it_is(monkeypatch):
    monkeypatch.setattr(adapt, "STEPS", 0)
    learned = learn([trial(lambda truth, start: start + 0.5 * (truth - start))], RATIO, W, UNIT)
    assert learned.gain_db == learned.gain_db_without > 1


def test_where_the_network_is_right_nothing_is_learned():
    learned = learn([trial(lambda truth, start: truth, seed) for seed in (0, 1)], RATIO, W, UNIT)
    truth = textured(7)
    assert np.abs(adapted(truth, thick(truth)[1], learned) - truth.numpy()).max() < 1e-6  # found: 0


def test_lines_count_as_often_as_they_are_told_to():
    """The errors of a trial that does not count are told of the other alone, and what is learned follows what counts:
    of two trials that ask for the opposite the heavier is followed."""

    def shifted(by, counts):
        made = trial(lambda truth, start: start + 0.5 * (truth - start), 3)
        truth = made.result + by * (made.truth - made.start)
        return replace(made, truth=truth, counts=torch.full((*SHAPE[:2], 1), counts))

    one, none = shifted(0.5, 1.0), shifted(-0.5, 0.0)
    alone, both = (learn(trials, RATIO, W, UNIT) for trials in ((one, one), (one, none)))
    assert both.gain_db_without == alone.gain_db_without
    # Scales are those of all lines. Found: 24.9 and 25.8, without 7.1; with the other counted as well 1.8 and 2.2
    assert abs(both.gain_db - alone.gain_db) < 3 and both.gain_db > both.gain_db_without + 3
    parts = [adapt._part(made, RATIO, W, UNIT) for made in (one, replace(one, counts=2 * one.counts))]
    assert torch.equal(2 * parts[0].counted, parts[1].counted) and set(parts[0].counted.unique().tolist()) <= {0.0, 1.0}


def test_last_bits_of_a_trial_do_not_decide_about_the_image():
    """Other processors and layouts have others; the activation has no kinks."""
    half = [trial(lambda truth, start: start + 0.5 * (truth - start), seed) for seed in (0, 1)]
    rows = np.random.default_rng(0)
    nearly = [
        replace(t, result=t.result * (1 + 1e-6 * torch.from_numpy(rows.standard_normal(SHAPE, np.float32))))
        for t in half
    ]
    truth = textured(7)
    start = thick(truth)[1]
    made = [adapted(start, start, learn(trials, RATIO, W, UNIT)) for trials in (half, nearly)]
    assert (
        np.abs(made[0] - start.numpy()).max() > 0.01 and np.abs(made[0] - made[1]).max() < 1e-4
    )  # found: 0.08, 1.3e-6; with 600 steps 0.03, 2.7e-6


@pytest.mark.gpu
def test_a_gpu_learns_what_a_processor_learns():
    half = trial(lambda truth, start: start + 0.5 * (truth - start))
    there = Trial(*(v.cuda() if isinstance(v, torch.Tensor) else v for v in vars(half).values()))
    truth = textured(7)
    start = thick(truth)[1]
    made = [adapted(start, start, learn([one], RATIO, W, UNIT)) for one in (half, there)]
    assert np.abs(made[0] - made[1]).max() < 1e-3  # not measured: needs a CUDA device


def test_mirrored_lines_are_those_of_the_mirrored_image():
    image = [textured(seed, (12, 13, 24)) for seed in (0, 1)]
    down = slice_profile_matrix(24, 8, RATIO)
    near = Around(*image, RATIO, down, W, UNIT).lines(torch.tensor([4]), torch.tensor([5]))[0]
    for a, b in itertools.product((0, 1), repeat=2):
        axes = [axis for axis, turned in enumerate((a, b)) if turned]
        turned = Around(*(v.flip(axes) for v in image), RATIO, down, W, UNIT)
        i, j = (torch.tensor([n - 1 - k if t else k]) for n, k, t in ((12, 4, a), (13, 5, b)))
        assert torch.allclose(turned.lines(i, j)[0], near[:, adapt._mirrored(a, b)], atol=1e-5)  # found: 0


def test_an_answer_sees_the_result_nearly_as_it_will_agree():
    """L: of planes that stay as they are it is the result that agrees."""
    truth = textured(3)
    scan, start, down = thick(truth)
    network = start + 0.3 * (truth - start)
    around = Around(start, network, RATIO, down, W, UNIT)
    seen = around.near[2][1:-1, 1:-1, 2:-2]
    assert np.abs(seen.numpy() - agreed(network, scan)).max() < 1e-4  # found: 5.4e-7


@pytest.mark.parametrize("slab", [1, 9 * 44 * 48, 1 << 21])
def test_slabs_give_what_the_whole_gives_and_strides_do_not_matter(monkeypatch, slab):
    """A slab is as thick as the reach at least: its rim is read before it is overwritten."""
    truth = textured(3)
    _, start, down = thick(truth)
    network = (start + 0.3 * (truth - start)).numpy()
    found = []
    for voxels, turned in ((1 << 40, False), (slab, True)):
        monkeypatch.setattr(adapt, "SLAB", voxels)
        made = np.asfortranarray(network) if turned else network.copy()
        adapt_(made, lambda first, stop: start[first:stop], drawn(), RATIO, down, W, UNIT)
        found.append(made)
    assert np.abs(found[0] - found[1]).max() < 1e-6 and np.abs(found[0] - network).max() > 0.05  # found: 0, 1.5


def test_air_stays_as_the_network_gives_it():
    """Around the head, and on lines that go through it."""
    start = textured(4)
    start[:, :15] = 0
    start[:, :, 36:] = 0
    network = start + 0.02 * (textured(5) - 0.6)
    made = adapted(network, start, drawn())
    for air in (np.s_[:, :9], np.s_[:, :, 36:]):
        assert np.abs(made[air] - network[air].numpy()).max() < 1e-6  # found: 0
    assert np.abs(made[:, 20:, :36] - network[:, 20:, :36].numpy()).max() > 0.1  # found: 1.65


def test_trials_have_the_scans_noise_and_its_profile_or_both_profiles_where_it_is_a_guess(monkeypatch):
    """Slices keep a part of the truth's noise; so much is added that they have all of it."""
    n, noise = 60, 0.05
    flat = torch.full((80, 80, n), 0.5)
    noisy = flat + noise * torch.from_numpy(np.random.default_rng(0).standard_normal(flat.shape, np.float32))
    for kind, wide in ((0.0, 1.0), (1.0, 1.0), (0.0, 0.5)):
        cut = adapt._cut(noisy, slice_profile_matrix(n, 20, 3.0, wide, kind), noise, 0.0, 0)
        assert float(cut.std()) == pytest.approx(noise, rel=0.02)  # found: 0.0012
    seen, tried, real = [], [], adapt.learn
    monkeypatch.setattr(adapt, "learn", lambda trials, *more: tried.extend(trials) or real(trials, *more))

    def network(x):
        seen.append(x)
        return x

    truth = textured(6, (48, 48, 48)).numpy()
    for known, told in (("named", "box"), ("guessed", "guess")):
        seen.clear(), tried.clear()
        scan = thick(torch.from_numpy(truth))[0].numpy()
        believed = assumed(told, None, 3.0, 1.0)
        _, start, down = thick(torch.from_numpy(truth))
        adapt.adapt(truth.copy(), scan, lambda a, b, x=start: x[a:b], network, believed, down, 0.03, 3.0, 1.0)
        assert len(seen) == 2 and believed.known == known
        for axis, x in enumerate(seen):
            turned = torch.from_numpy(truth).transpose(axis, 2).contiguous()
            for half, kind in zip(
                (slice(0, 24), slice(24, 48)), (("box", "gaussian"), ("gaussian", "box"))[axis], strict=True
            ):
                kind = kind if known == "guessed" else "box"
                here = (half, slice(None)) if axis else (slice(None), half)
                down = slice_profile_matrix(48, 16, 3.0, 1.0, float(kind == "box"))
                again = spline_matrix(16, 48, 1 / 3) @ down
                wanted = turned[here] @ torch.from_numpy(again.T.astype(np.float32))
                # The truth is textured, so that some noise is seen in it. Found: 0.0043, the other profile 0.0098
                assert (x[here] - wanted).abs().mean() < 0.006, (known, axis, kind)
                counts = 2 if (known, kind) == ("guessed", "box") else 1
                assert torch.equal(tried[axis].counts[here], torch.full_like(tried[axis].counts[here], counts))


@pytest.fixture(scope="module")
def generator(near_the_spline):
    return near_the_spline


def head(shape=(40, 44, 16), seed=2):
    """(x, y, z) a scan with air around it."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 0.8)
    inside = (x**2 + y**2 + z**2 < 0.9).astype(np.float32)
    return np.maximum(0, inside * (500 + 300 * texture)).astype(np.float32)


AFFINE, FAST = rigid((1.0, 1.0, 3.0)), {"patch": 24, "step": 12, "device": "cpu"}


def test_off_is_the_networks_own_image_and_segmentations_never_change(generator):
    scan = head()
    auto, off = (infer_volume(scan, AFFINE, generator, **FAST, adapt=value) for value in ("auto", "off"))
    assert "adapt" not in off.report and auto.report["adapt"]["trials"] == 2
    assert auto.report["adapt"]["gain_db"] >= auto.report["adapt"]["gain_db_without"]
    assert not np.array_equal(auto.sr, off.sr) and np.array_equal(auto.prob, off.prob)
    again = infer_volume(scan, AFFINE, generator, **FAST)
    assert np.array_equal(again.sr, auto.sr), "the default, and nothing is drawn by chance"


def test_it_learns_whatever_mode_of_torch_its_caller_is_in(generator):
    scan = head()
    plain = infer_volume(scan, AFFINE, generator, **FAST).sr
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert np.array_equal(infer_volume(scan, AFFINE, generator, **FAST).sr, plain)


def test_by_slabs_and_on_other_axes_it_has_the_same_bits(generator, tmp_path, monkeypatch):
    scan = head()
    whole = infer_volume(scan, AFFINE, generator, **FAST)
    monkeypatch.setattr(infer, "plan_memory", lambda job, *args: replace(plan_memory(job, *args), mode=SLABS))
    slabs = infer_volume(scan, AFFINE, generator, **FAST, scratch=tmp_path / "s")
    assert slabs.report["memory"]["mode"] == SLABS and np.array_equal(slabs.sr, whole.sr)
    monkeypatch.undo()
    turned = infer_volume(np.ascontiguousarray(scan.transpose(2, 0, 1)), AFFINE[:, [2, 0, 1, 3]], generator, **FAST)
    assert np.array_equal(turned.sr.transpose(1, 2, 0), whole.sr)
    for done in (whole, turned):
        # What is learned takes its own time, no part of what agreement takes.
        spent, taken = done.report["adapt"].pop("seconds"), done.report["agree"]["seconds"]
        assert spent > 0 < taken and spent + taken < done.report["seconds"]
    assert turned.report["adapt"] == whole.report["adapt"]


@pytest.mark.parametrize(
    ("shape", "mm", "more"),
    [
        ((40, 44, 16), (1.0, 1.0, 3.0), {"agree": "off"}),
        ((40, 44, 36), (1.0, 1.0, 1.3), {"new_resolution": 1.0}),
        ((18, 20, 16), (2.2, 2.2, 3.0), {"new_resolution": 1.0}),
        ((40, 44, 16), (1.0, 1.0, 3.0), {"new_resolution": "same"}),
        ((40, 44, 16), (1.0, 1.0, 3.0), {"geometry": "segsrgan"}),
    ],
)
def test_nothing_is_adapted_without_agreement_or_where_slices_hide_little_more_than_planes(generator, shape, mm, more):
    done = infer_volume(head(shape), rigid(mm), generator, **FAST, **more)
    assert "adapt" not in done.report


def test_planes_may_be_made_a_little_finer_too(generator):
    """As perinatal weights do, which make voxels of their own size of larger ones."""
    done = infer_volume(head((30, 34, 16)), rigid((1.4, 1.4, 3.0)), generator, **FAST, new_resolution=1.0)
    off = infer_volume(head((30, 34, 16)), rigid((1.4, 1.4, 3.0)), generator, **FAST, new_resolution=1.0, adapt="off")
    assert done.report["adapt"]["trials"] == 2 and not np.array_equal(done.sr, off.sr)


def test_a_block_that_is_too_small_is_said_to_be(generator):
    done = infer_volume(head((30, 30, 16)), AFFINE, generator, **FAST)
    off = infer_volume(head((30, 30, 16)), AFFINE, generator, **FAST, adapt="off")
    told = done.report["adapt"]
    assert told.pop("seconds") < done.report["seconds"]
    assert told == {"trials": 0, "reason": "a block of 30 x 30 x 48 voxels is too small to be tried"}
    assert np.array_equal(done.sr, off.sr)


def test_slices_too_thick_for_the_block_and_scans_without_a_bright_voxel_are_said_to_be_too(generator):
    for scan, mm, reason in (
        (head((40, 44, 4)), 12.0, "a block of 40 x 44 x 48 voxels is too small to be tried"),
        (0 * head() - 1, 3.0, "the scan has no bright voxels"),
    ):
        volume = torch.from_numpy(np.repeat(scan, int(mm), 2))
        believed = assumed("guess", None, mm, 1.0)
        told = adapt.adapt(volume.numpy(), scan, lambda a, b, x=volume: x[a:b], None, believed, None, 0.03, mm, 1.0)
        assert told == {"trials": 0, "reason": reason}


@pytest.mark.parametrize("down_by", [4.0, 1.0])
def test_a_scan_with_values_below_0_is_adapted_as_the_one_that_is_moved_up(down_by):
    """Nothing above 0, or a part of it as in z-scores: intensities count from the lowest value, so that the trials
    gain the same and the image is adapted alike."""
    truth = textured(6, (48, 48, 48)).clamp(min=0)
    scan, start, down = thick(truth)
    truth, scan, start = (v - scan.min() for v in (truth, scan, start))  # the scan's lowest value is 0
    base = start + 0.5 * (truth - start)
    made, gains = [], []
    for low in (0.0, -down_by):
        image = (base + low).numpy().copy()
        told = adapt.adapt(
            image, scan.numpy() + np.float32(low), lambda a, b, x=start + low: x[a:b], lambda x: x,
            assumed("box", None, 3.0, 1.0), down, 0.03, 3.0, 1.0, floor=float(scan.min()) + low,
        )  # fmt: skip
        made.append(image - np.float32(low))
        gains.append((told["trials"], told["gain_db"]))
    assert gains[1] == (2, pytest.approx(gains[0][1], abs=0.05))  # found: 0; learning makes rounding larger
    assert all(np.abs(v - base.numpy()).mean() > 0.001 for v in made)  # found: 0.0064


def test_of_a_scan_within_a_mask_what_counts_is_learned_and_adapted():
    """The network is shown air where the mask ends, on what it says there nothing is learned, and the image outside
    stays the interpolated scan."""
    truth = textured(6, (48, 48, 48)).clamp(min=0) + 0.2
    scan, start, down = thick(truth)
    share = torch.zeros(truth.shape)
    share[:, 16:] = 1
    image = start + 0.5 * share * (truth - start)
    made, shown = image.numpy().copy(), []

    def network(x):
        shown.append(x)
        return x * (x > 0.1)  # an edge where the mask makes one

    whole = scan.numpy()
    own = np.where(np.arange(48)[None, :, None] >= 16, whole, np.float32(0))
    told = adapt.adapt(
        made, own, lambda a, b: start[a:b], network, assumed("box", None, 3.0, 1.0), down, 0.03, 3.0, 1.0,
        share=lambda a, b: share[a:b],
    )  # fmt: skip
    assert told["trials"] == 2 and told["gain_db"] > told["gain_db_without"]
    along_x, along_y = shown  # axes exchanged with the last one
    assert float(along_x[:, :12].abs().max()) < 1e-6 < 0.1 < float(along_x[:, 20:].mean())
    assert float(along_y[..., :8].abs().mean()) < 0.01 < 0.1 < float(along_y[..., 24:].mean())  # found: 0.002
    changed = np.abs(made - image.numpy())
    assert changed[:, :16].max() == 0 and changed[:, 16:].mean() > 0.001
    told = adapt.adapt(
        made, own, lambda a, b: start[a:b], network, assumed("box", None, 3.0, 1.0), down, 0.03, 3.0, 1.0,
        share=lambda a, b: torch.zeros_like(start[a:b]),
    )  # fmt: skip
    assert told["reason"].startswith("nothing was gained"), "a mask that no line of the block lies in"


def test_an_image_that_nothing_is_gained_on_stays(generator, monkeypatch):
    real = adapt.learn
    monkeypatch.setattr(adapt, "learn", lambda *args: replace(real(*args), gain_db=0.5, gain_db_without=0.5))
    done, off = (infer_volume(head(), AFFINE, generator, **FAST, adapt=value) for value in ("auto", "off"))
    told = done.report["adapt"]
    assert told["reason"].startswith("nothing was gained") and told["trials"] == 2 and told["gain_db"] == 0.5
    assert np.array_equal(done.sr, off.sr)


def test_memory_is_that_of_the_block_or_of_a_slab():
    assert adapt.held_bytes((400, 440, 480)) == adapt.held_bytes((4000, 440, 480))
    small = adapt.held_bytes((40, 44, 48))
    assert 40 * 4 * 40 * 44 * 48 < small < adapt.held_bytes((400, 440, 480))


@pytest.mark.parametrize("noise", [0.0, 60.0])
def test_each_percentage_is_of_the_image_that_it_is_said_of(generator, monkeypatch, caplog, noise):
    """Of the result, of the same image without agreement, and of the network's own, which is nearer to a noisy scan:
    named together they misled while the second was the third."""
    scan = head()
    scan = scan + noise * np.random.default_rng(3).normal(size=scan.shape)
    scan = np.clip(scan, 5, None).astype(np.float32)  # nothing is exactly 0, and SR is kept 0 nowhere
    with caplog.at_level("INFO", "fastsrgan"):
        done = infer_volume(scan, AFFINE, generator, **FAST)
    told = done.report["agree"]
    own = infer_volume(scan, AFFINE, generator, **FAST, agree="off")
    monkeypatch.setattr(modes, "_agree", lambda *args: 0.0)
    adapted = infer_volume(scan, AFFINE, generator, **FAST)
    seen = observation(
        scan.shape,
        (1.0, 1.0, 3.0),
        done.sr.shape,
        (1.0, 1.0, 1.0),
        profile=told["profile"],
        thickness_mm=told["width_mm"],
    )
    rms = [100 * np.sqrt(np.mean(residual(r.sr, scan, seen) ** 2) / np.mean(scan**2)) for r in (done, adapted, own)]
    keys = ("residual_percent", "residual_percent_without", "residual_percent_network")
    assert [told[key] for key in keys] == pytest.approx(rms, rel=1e-4)  # found: 2e-7 (rounding)
    assert told["residual_percent"] < told["residual_percent_without"] and rms[1] != pytest.approx(rms[2], rel=0.01)
    without, network = (f"{told[key]:.2g} %" for key in keys[1:])
    assert f"{without} without agreement, {network} the network's own image; weight" in caplog.text


def test_the_command_line_records_it(generator, tmp_path, capsys):
    images.save(tmp_path / "a.nii", head(), AFFINE)
    weights.save_generator(tmp_path / "w.safetensors", generator)
    words = ["infer", str(tmp_path / "a.nii"), "-w", str(tmp_path / "w.safetensors"), "--patch", "24", "--step", "12"]
    for more, there in (([], True), (["--adapt", "off"], False)):
        out = tmp_path / f"out{there}"
        assert main([*words, "-o", str(out), *more]) == 0
        record = json.loads((out / "a.json").read_text(encoding="utf8"))
        assert ("adapt" in record) == there and record["asked"].get("adapt") == (None if there else "off")
        assert main(["report", str(out)]) == 0
        page = (out / "report.html").read_text(encoding="utf8")
        assert ("tried on the scan&#x27;s own slices" in page or "tried on the scan's own slices" in page) == there
        if there:
            gains = (f">{record['adapt'][key]:.4g}<" for key in ("gain_db", "gain_db_without"))
            assert all(gain in page for gain in gains)
    assert "tried on the scan's own slices" in capsys.readouterr().err
