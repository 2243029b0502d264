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
from fastsrgan.volume.adapt import DETAIL, IMAGE, Fit, Trial, adapt_, bands, fit, place_levels, places, scales
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


def trial(network, seed=0):
    truth = textured(seed)
    scan, start, down = thick(truth)
    return Trial(truth, scan, start, network(truth, start), down, torch.ones(SHAPE[:2]))


def agreed(image, scan, ratio=RATIO, w=0.003):
    made = image.numpy().copy()
    n, m = image.shape[2], scan.shape[2]
    seen = observation(scan.shape, (1, 1, ratio), image.shape, (1, 1, ratio * m / n))
    agree(made, scan.numpy(), seen, w)
    return made


def error(image, truth):
    return float(((np.asarray(image) - np.asarray(truth))[6:-6, 6:-6] ** 2).mean())


def test_bands_scales_and_places_sum_to_the_whole():
    for n, ratio, knots in itertools.product((48, 61), (2.0, 3.3, 6.0), (DETAIL, IMAGE)):
        assert np.abs(sum(bands(n, ratio, knots)) - np.eye(n)).max() < 1e-12  # found: 7.5e-15
    volume = textured()
    assert (sum(scales(volume)) - volume).abs().max() < 1e-6  # found: 1.5e-8
    levels = place_levels(volume, UNIT)
    weights = places(volume * torch.linspace(0, 1, SHAPE[2]), levels, UNIT)
    assert (sum(weights) - 1).abs().max() < 1e-6 and all(w.min() >= 0 for w in weights)  # found: 6e-8
    assert all(w.max() > 0.9 for w in weights)


def test_bands_are_of_rising_frequency_and_leave_the_mean_to_the_first():
    n, ratio = 60, 3.0
    waves = [np.cos(np.pi * (np.arange(n) + 0.5) * k / n) for k in (0, n / ratio * 1.0, n / ratio * 1.8)]
    shares = [[float(wave @ band @ wave / (wave @ wave)) for band in bands(n, ratio, DETAIL)] for wave in waves]
    assert np.allclose(shares, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], atol=1e-9)  # found: 4.4e-16
    flat = [float(np.abs(band @ np.ones(n)).max()) for band in bands(n, ratio, IMAGE)]
    assert flat[0] == pytest.approx(1) and max(flat[1:]) < 1e-9  # found: 1.2e-14


def test_detail_that_is_half_of_the_truths_is_doubled():
    """The network finds half of what is missing: so the numbers of its detail are 2, and the result is the truth."""
    half = [trial(lambda truth, start: start + 0.5 * (truth - start), seed) for seed in (0, 1)]
    fitted = fit(half, RATIO, 0.003, UNIT)
    assert np.abs(fitted.detail[:, :, 1:3].mean() - 2) < 0.1  # found: 1.977
    assert np.abs(fitted.image).max() < 0.1 and fitted.gain_db > fitted.gain_db_without + 3
    truth = textured(7)
    scan, start, _ = thick(truth)
    network = (start + 0.5 * (truth - start)).numpy()
    made = network.copy()
    adapt_(made, lambda first, stop: start[first:stop], fitted, RATIO, place_levels(start, UNIT), UNIT)
    before, after = (error(agreed(torch.from_numpy(v), scan), truth) for v in (network, made))
    assert after < before / 100  # found: 1,211 times


def test_lines_count_as_often_as_they_are_told_to():
    """Twice is what the same trial given twice is, not at all is what it is without them."""
    one, two = (trial(lambda truth, start, share=share: start + share * (truth - start), 3) for share in (0.5, 0.8))

    def numbers(*trials):
        found = fit(trials, RATIO, 0.003, UNIT)
        return np.concatenate([found.detail.ravel(), found.image.ravel(), [found.gain_db, found.gain_db_without]])

    twice = numbers(one, replace(two, counts=2 * two.counts))
    assert np.allclose(twice, numbers(one, two, two), atol=0.011)  # three digits; found: 0
    none = numbers(one, replace(two, counts=0 * two.counts))
    assert np.allclose(none, numbers(one), atol=0.011) and not np.allclose(twice, none, atol=0.05)  # found: 0, 22


def test_a_network_that_is_right_is_left_as_it_is():
    fitted = fit([trial(lambda truth, start: truth, seed) for seed in (0, 1)], RATIO, 0.003, UNIT)
    assert np.abs(fitted.detail - 1).max() < 0.01 and np.abs(fitted.image).max() < 0.01  # found: 0, 2.3e-7


def test_detail_that_is_wrong_is_left_out():
    def wrong(truth, start):
        return start + 0.05 * (textured(99) - 0.6) / 0.1

    fitted = fit([trial(wrong, seed) for seed in (0, 1)], RATIO, 0.003, UNIT)
    assert np.abs(fitted.detail[:, :, 1:3]).mean() < 0.25  # found: 0.16
    assert fitted.gain_db > fitted.gain_db_without


@pytest.mark.parametrize("slab", [1, 9 * 44 * 48, 1 << 21])
def test_slabs_give_what_the_whole_gives_and_strides_do_not_matter(monkeypatch, slab):
    """A slab is as thick as the reach at least: its rim is read before it is overwritten."""
    truth = textured(3)
    _, start, _ = thick(truth)
    network = (start + 0.3 * (truth - start)).numpy()
    rows = np.random.default_rng(5)
    numbers = Fit(rows.uniform(0, 3, (2, 3, 4)), rows.uniform(-0.2, 0.2, (2, 3, 3)), 0.0, 0.0)
    levels, found = place_levels(start, UNIT), []
    for voxels, turned in ((1 << 40, False), (slab, True)):
        monkeypatch.setattr(adapt, "SLAB", voxels)
        made = np.asfortranarray(network) if turned else network.copy()
        adapt_(made, lambda first, stop: start[first:stop], numbers, RATIO, levels, UNIT)
        found.append(made)
    assert np.abs(found[0] - found[1]).max() < 1e-6 and np.abs(found[0] - network).max() > 0.05  # found: 0, 0.065


def test_air_stays_as_the_network_gives_it():
    start = textured(4)
    start[:, :15] = 0
    network = start + 0.02 * (textured(5) - 0.6)
    made = network.numpy().copy()
    rows = Fit(np.full((2, 3, 4), 3.0), np.full((2, 3, 3), 0.5), 0.0, 0.0)
    adapt_(made, lambda first, stop: start[first:stop], rows, RATIO, place_levels(start, UNIT), UNIT)
    assert np.abs(made[:, :9] - network[:, :9].numpy()).max() < 1e-6  # found: 0
    assert np.abs(made[:, 20:] - network[:, 20:].numpy()).max() > 0.01


def test_trials_have_the_scans_noise_and_its_profile_or_both_profiles_where_it_is_a_guess(monkeypatch):
    """Slices keep a part of the truth's noise; so much is added that they have all of it."""
    n, noise = 60, 0.05
    flat = torch.full((80, 80, n), 0.5)
    noisy = flat + noise * torch.from_numpy(np.random.default_rng(0).standard_normal(flat.shape, np.float32))
    for kind, wide in ((0.0, 1.0), (1.0, 1.0), (0.0, 0.5)):
        cut = adapt._cut(noisy, slice_profile_matrix(n, 20, 3.0, wide, kind), noise, 0.0, 0)
        assert float(cut.std()) == pytest.approx(noise, rel=0.02)  # found: 0.0012
    seen, tried, real = [], [], adapt.fit
    monkeypatch.setattr(adapt, "fit", lambda trials, *more: tried.extend(trials) or real(trials, *more))

    def network(x):
        seen.append(x)
        return x

    truth = textured(6, (48, 48, 48)).numpy()
    for known, told in (("named", "box"), ("guessed", "guess")):
        seen.clear(), tried.clear()
        scan = thick(torch.from_numpy(truth))[0].numpy()
        believed = assumed(told, None, 3.0, 1.0)
        start = thick(torch.from_numpy(truth))[1]
        adapt.adapt(truth.copy(), scan, lambda a, b, x=start: x[a:b], network, believed, 0.03, 3.0, 1.0)
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


def test_by_slabs_and_on_other_axes_it_has_the_same_bits(generator, tmp_path, monkeypatch):
    scan = head()
    whole = infer_volume(scan, AFFINE, generator, **FAST)
    monkeypatch.setattr(infer, "plan_memory", lambda job, *args: replace(plan_memory(job, *args), mode=SLABS))
    slabs = infer_volume(scan, AFFINE, generator, **FAST, scratch=tmp_path / "s")
    assert slabs.report["memory"]["mode"] == SLABS and np.array_equal(slabs.sr, whole.sr)
    monkeypatch.undo()
    turned = infer_volume(np.ascontiguousarray(scan.transpose(2, 0, 1)), AFFINE[:, [2, 0, 1, 3]], generator, **FAST)
    assert np.array_equal(turned.sr.transpose(1, 2, 0), whole.sr) and turned.report["adapt"] == whole.report["adapt"]


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
    assert done.report["adapt"] == {"trials": 0, "reason": "a block of 30 x 30 x 48 voxels is too small to be tried"}
    assert np.array_equal(done.sr, off.sr)


def test_slices_too_thick_for_the_block_and_scans_without_a_bright_voxel_are_said_to_be_too(generator):
    for scan, mm, reason in (
        (head((40, 44, 4)), 12.0, "a block of 40 x 44 x 48 voxels is too small to be tried"),
        (-head() - 1, 3.0, "the scan has no bright voxels"),
    ):
        volume = torch.from_numpy(np.repeat(scan, int(mm), 2))
        believed = assumed("guess", None, mm, 1.0)
        told = adapt.adapt(volume.numpy(), scan, lambda a, b, x=volume: x[a:b], None, believed, 0.03, mm, 1.0)
        assert told == {"trials": 0, "reason": reason}


def test_memory_is_that_of_the_block_or_of_a_slab():
    assert adapt.held_bytes((40, 44, 48)) == 120 * 40 * 44 * 48
    assert adapt.held_bytes((400, 440, 480)) == adapt.held_bytes((4000, 440, 480)) == 120 * 128**3


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
