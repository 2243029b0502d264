"""How far a result may be from the truth: the rule against plain loops, 0 where the scan leaves nothing open."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from nifti_files import rigid

from fastsrgan.cli.main import main
from fastsrgan.errors import UsageError
from fastsrgan.evaluate import metrics
from fastsrgan.infer import modes
from fastsrgan.infer import volume as infer
from fastsrgan.infer.memory import SLABS
from fastsrgan.infer.network import Averaged
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.volume import doubt
from fastsrgan.volume.consistency import Observation, observation
from fastsrgan.volume.doubt import Rule, doubt_, lacking, summary, variance_in_profiles
from fastsrgan.volume.resample import slice_profile_matrix, spline_matrix

SHAPE, MM = (26, 24, 8), (1.0, 1.0, 3.0)
FINE = (26, 24, 24)
AFFINE = rigid(MM)
FAST = {"patch": 16, "step": 12, "device": "cpu", "uncertainty": True}
SMALL = 4 * 26 * 24 * 5  # bytes of a few planes


def smooth(shape, seed=0, noise=0.0):
    """Sums of waves of many lengths, above 0."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    data = np.full(shape, 500.0)
    for length in (3, 5, 8, 13, 21):
        way = rng.normal(size=3)
        data += 8 * length * np.sin(np.tensordot(way / np.linalg.norm(way), grid, 1) * 2 * np.pi / length + way[0])
    return data + noise * rng.normal(size=shape)


def seen(shape=SHAPE, fine=FINE, mm=MM):
    return observation(shape, mm, fine, (1, 1, 1))


@pytest.fixture(scope="module")
def networks():
    """Close to the interpolation, as trained ones are."""
    made = [build_generator(GeneratorSpec(kernel=1), seed=seed).eval() for seed in (6, 7)]
    for generator in made:
        with torch.no_grad():
            generator.head.mul_(0.05)
    return made


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (26, 12, 8)])
def test_what_profiles_hide_is_a_plain_variance(shape):
    """Of every voxel of the scan, by loops in float64, for one and for two thick axes."""
    mm = tuple(f / n for f, n in zip(FINE, shape, strict=True))
    d, image = seen(shape, mm=mm).down, smooth(FINE)
    got = variance_in_profiles(image, d)
    full = [np.eye(n) if m is None else m for n, m in zip(FINE, d, strict=True)]
    rng = np.random.default_rng(1)
    for place in rng.integers(0, FINE, (4, 3)):
        total = weight = 0.0
        for low in itertools.product(*(np.flatnonzero(m[:, at]) for m, at in zip(full, place, strict=True))):
            profile = np.einsum("i,j,k->ijk", *(m[at] for m, at in zip(full, low, strict=True)))
            mean = (profile * image).sum()
            here = np.prod([m[at, p] for m, at, p in zip(full, low, place, strict=True)])
            total += here * (profile * (image - mean) ** 2).sum()
            weight += here
        assert got[tuple(place)] == pytest.approx(total / weight, rel=1e-12)  # found: 3e-14 (rounding)
    assert np.allclose(variance_in_profiles(np.full(FINE, 7.0), d), 0, atol=1e-12)  # found: 1.4e-14 (rounding)


@pytest.mark.parametrize("slab_bytes", [1 << 24, SMALL])
def test_the_rule_is_its_formula_in_float64(slab_bytes):
    scan, sr = smooth(SHAPE, noise=5), smooth(FINE)
    variance = np.random.default_rng(2).random(FINE) * 1e-3
    made, rule = variance.copy(), Rule(1.3, 0.6, 1.7)
    told = doubt_(made, sr, scan, seen(), 2, 900.0, rule, slab_bytes)
    w = variance_in_profiles(sr, seen().down)
    typical = float(f"{w[sr > 0.1 * np.percentile(sr[::2, ::2], 99.9)].mean():.3g}")
    r, noise = (float(f"{told[key]:.3g}") for key in ("lacking", "noise"))
    expected = 1.3**2 * r**2 * typical * (w / typical) ** 0.6 + 1.7**2 * (2 / 3) * 900**2 * variance + noise**2
    # Found: 3.3e-16 (rounding), 0.38
    assert np.allclose(made, np.sqrt(expected), rtol=1e-12) and noise > 1 and 0.1 < r < 2


def test_the_rule_is_the_one_that_was_measured():
    """Decision 028; where r cannot be told it is in the middle of what was measured."""
    assert Rule() == Rule(detail=1.09, power=0.70, spread=1.05)
    scan, sr = smooth((9, 9, 8)), smooth((9, 9, 24))
    known = observation((9, 9, 8), MM, (9, 9, 24), (1, 1, 1))
    made = np.full((9, 9, 24), 1e-3)
    assert doubt_(made, sr, scan, known, 2, 900.0) == {"noise": None, "lacking": None}
    w = variance_in_profiles(sr, known.down)
    typical = float(f"{w[sr > 0.1 * np.percentile(sr[::2, ::2], 99.9)].mean():.3g}")
    expected = (1.09 * 0.6) ** 2 * typical * (w / typical) ** 0.70 + 1.05**2 * (2 / 3) * 900**2 * 1e-3
    assert np.allclose(made, np.sqrt(expected), rtol=1e-12)  # found: 2.2e-16 (rounding)


def test_what_is_lacking_is_the_error_of_thick_slices_over_what_they_hide():
    """In float64, along both axes that the scan resolves: averaged to slices of as many voxels, brought back by the
    spline that agrees with them; nothing is said of less than four slices, nor where noise explains nine tenths."""
    scan = smooth((24, 24, 14))
    known = observation((24, 24, 14), MM, (24, 24, 42), (1, 1, 1))
    low, back = slice_profile_matrix(24, 8, 3.0), spline_matrix(8, 24, 1 / 3)
    again = (back + low.T @ np.linalg.solve(low @ low.T + 0.03 * np.eye(8), np.eye(8) - low @ back)) @ low
    errors = variances = 0.0
    for axis in (0, 1):
        made = np.moveaxis(np.tensordot(again, scan, (1, axis)), 0, axis)
        errors += np.mean((scan - made) ** 2)
        variances += np.mean(variance_in_profiles(made, [low if d == axis else None for d in range(3)]))
    # Found: 4.6e-7, as the volume is taken in float32
    assert lacking(scan, known, 2, 0.0) == pytest.approx(np.sqrt(errors / variances), rel=2e-6)
    unit = 2 * ((np.eye(24) - again) ** 2).sum() / 24  # of the errors, by noise of 1
    for share, told in ((0.89, True), (0.91, False)):
        assert (lacking(scan, known, 2, np.sqrt(share * errors / unit)) is not None) == told
    for n, told in ((12, True), (11, False)):
        few = observation((n, n, 8), MM, (n, n, 24), (1, 1, 1))
        assert (lacking(smooth((n, n, 8)), few, 2, 0.0) is not None) == told


def test_what_an_interpolation_lacks_is_measured_along_the_axes_that_the_scan_resolves():
    """Detail of one direction only: without it along x and y nothing is lacking there."""
    fine, rough = smooth((40, 40, 10)), smooth((40, 40, 10))
    rough += 60 * np.sin(np.arange(40) * 2.2)[:, None, None]
    d = observation((40, 40, 10), MM, (40, 40, 30), (1, 1, 1))
    assert lacking(rough, d, 2, 0.0) > 1.3 * lacking(fine, d, 2, 0.0)  # found: 2.1
    noisy = fine + 10 * np.random.default_rng(0).normal(size=fine.shape)
    assert lacking(noisy, d, 2, 10.0) == pytest.approx(lacking(fine, d, 2, 0.0), rel=0.005)  # found: 0.0013
    assert lacking(noisy, d, 2, 0.0) > 1.1 * lacking(noisy, d, 2, 10.0), "the noise is taken off"  # found: 1.1
    # Also what noise adds to the variance within the profiles: left in, r were 0.9 % less.
    noisy = fine + 20 * np.random.default_rng(0).normal(size=fine.shape)
    assert lacking(noisy, d, 2, 20.0) == pytest.approx(lacking(fine, d, 2, 0.0), rel=0.004)  # found: 0.0011
    assert lacking(fine, d, 2, 1000.0) is None, "noise hides it"
    assert lacking(smooth((6, 6, 10)), observation((6, 6, 10), MM, (6, 6, 30), (1, 1, 1)), 2, 0.0) is None, "too small"


def test_a_scan_that_determines_all_leaves_no_doubt(networks):
    made = np.ones((5, 5, 5), np.float32)
    assert doubt_(made, made, made, Observation((None,) * 3), 2) == {"noise": None, "lacking": None}
    assert not made.any()
    done = infer_volume(smooth((20, 18, 16), noise=9), np.eye(4), networks[0], **FAST, flips="x")
    assert not done.doubt.any() and done.report["doubt"]["mean"] == 0
    assert any("leave nothing open" in warning for warning in done.report["warnings"])


def test_the_head_s_mean_and_percentile():
    rng = np.random.default_rng(4)
    made, sr = rng.random((20, 20, 20)).astype(np.float32), np.full((20, 20, 20), 100.0)
    sr[:10], made[:10] = 9, 2  # air with its noise: below a tenth of tissue
    sr[10:12] = 60
    told = summary(made, sr)
    assert told["mean"] == pytest.approx(made[10:].mean(), rel=1e-6)  # found: 1.7e-8 (rounding)
    assert told["p95"] == pytest.approx(np.percentile(made[10:], 95), abs=2 * 2 / 1000)  # found: 4e-4
    assert told["image_mean"] == 92  # 60 in two of ten planes


# --- the spread of the passes -----------------------------------------------------------------------------------------


def test_the_spread_is_that_of_a_loop_over_flips_and_networks(networks):
    x = torch.from_numpy(np.random.default_rng(3).random((2, 1, 16, 12, 16), np.float32))
    averaged = Averaged(networks, [0, 2], 3.0, "cpu", spread=True)
    with torch.inference_mode():
        got, plain = averaged(x), Averaged(networks, [0, 2], 3.0, "cpu")(x)
        runs = [network(x.flip(dims))[:, :1].flip(dims) for network in networks for dims in ([], [2], [4], [2, 4])]
    assert torch.equal(got[:, :-1], plain) and got.shape[1] == 3
    # Found: 0.065 of it
    assert torch.allclose(got[:, -1:], torch.stack(runs).double().var(0).float(), rtol=2e-5, atol=1e-12)
    assert got[:, -1].mean() > 1e-7  # found: 9.8e-4
    with torch.inference_mode():
        assert not Averaged(networks[:1], [], 3.0, "cpu", spread=True)(x)[:, -1].any()


def test_mirror_images_and_networks_add_their_spread(networks, monkeypatch):
    monkeypatch.setattr(doubt, "RULE", Rule(0.0, 1.0, 1.0))
    scan = smooth(SHAPE)
    plain = infer_volume(scan, AFFINE, networks[0], **FAST)
    assert np.ptp(plain.doubt) == 0, "noise alone"
    for more in ({"flips": "xz"}, {}):
        done = infer_volume(scan, AFFINE, networks if not more else networks[0], **FAST, **more)
        assert (done.doubt >= plain.doubt).all() and np.ptp(done.doubt) > 0


# --- whole inferences -------------------------------------------------------------------------------------------------


def test_it_changes_neither_the_result_nor_its_probabilities(networks):
    scan = smooth(SHAPE, noise=5)
    done = infer_volume(scan, AFFINE, networks[0], **FAST)
    plain = infer_volume(scan, AFFINE, networks[0], **{**FAST, "uncertainty": False})
    # Found: 2.4e-7, 1.8e-4
    assert np.allclose(done.sr, plain.sr, rtol=1e-6) and np.allclose(done.prob, plain.prob, atol=1e-6)
    assert plain.doubt is None and plain.prob.shape == done.prob.shape
    expected = np.zeros(FINE)
    doubt_(expected, done.sr.astype(float), scan, seen(), 2)
    assert np.allclose(done.doubt, expected, rtol=1e-3, atol=0.02)  # found: 0.18 of it
    assert done.report["doubt"] == pytest.approx(
        summary(done.doubt, done.sr) | doubt_(expected, done.sr, scan, seen(), 2)
    )


def test_what_is_told_of_it_leaves_out_what_is_kept_empty(networks):
    """Of a masked scan the figures are of the result as it is written, not of what the network made around it."""
    scan = smooth(SHAPE)
    scan[: SHAPE[0] // 2] = 0
    done = infer_volume(scan, AFFINE, networks[0], **FAST, agree=1000.0)  # a weight that changes next to nothing
    plain = infer_volume(scan, AFFINE, networks[0], **{**FAST, "uncertainty": False}, agree="off")
    empty = done.sr == 0
    assert done.report["voxels_kept_empty"] == np.count_nonzero(empty) > 0
    assert plain.sr[empty].max() > 0.12 * plain.sr.max(), "as bright as tissue"  # found: 0.137
    told = {key: done.report["doubt"][key] for key in ("mean", "p95", "image_mean")}
    assert told == pytest.approx(summary(done.doubt, done.sr), rel=1e-9)  # found: 0


@pytest.mark.parametrize("resolution", [None, 0.8])
def test_by_slabs_it_is_the_same_to_the_bit(networks, monkeypatch, tmp_path, resolution):
    """With an axis that slabs lie along, and (0.8 mm) without one."""
    monkeypatch.setattr(modes, "SLAB_BYTES", SMALL)
    monkeypatch.setattr(doubt, "SLAB_BYTES", SMALL)
    turned = np.array([[0, -1, 0, 5], [0, 0, 1, -3], [1, 0, 0, 9], [0, 0, 0, 1.0]]) @ AFFINE
    options = {**FAST, "new_resolution": resolution, "flips": "y"}
    scan = smooth(SHAPE, noise=5).astype(np.float32)
    whole = infer_volume(scan, turned, networks[0], **options)
    monkeypatch.setattr(infer, "plan_memory", lambda job, *args: replace(plan(job, *args), mode=SLABS))
    done = infer_volume(scan, turned, networks[0], **options, scratch=tmp_path / "s")
    assert isinstance(done.doubt, np.memmap) and np.array_equal(done.doubt, whole.doubt)
    assert np.array_equal(done.sr, whole.sr) and done.report["doubt"] == pytest.approx(whole.report["doubt"])


plan = infer.plan_memory


def test_within_a_budget_too(networks):
    options = {**FAST, "step": 8, "flips": "y"}
    scan = smooth(SHAPE)
    one, other = (infer_volume(scan, AFFINE, networks[0], **options, **more) for more in ({}, {"budget": 3600.0}))
    assert np.allclose(one.doubt, other.doubt, rtol=1e-6)  # found: 0 (rounding)


def test_exact_zeros_of_a_stripped_scan_have_none(networks):
    scan = smooth(SHAPE, noise=5)
    scan[:9] = 0
    done = infer_volume(scan, AFFINE, networks[0], **FAST, flips="x")
    assert not done.doubt[:9].any() and (done.doubt[9:] > 0).all()


@pytest.mark.parametrize("wrong", [{"agree": "off"}, {"geometry": "segsrgan"}])
def test_without_agreement_it_is_refused(networks, wrong):
    with pytest.raises(UsageError, match="uncertainty: what the scan leaves open"):
        infer_volume(smooth(SHAPE), AFFINE, networks[0], **FAST, **wrong)


# --- files, and whether it is right -----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, networks):
    weights.save_generator(tmp_path / "w.safetensors", networks[0])
    images.save(tmp_path / "a.nii.gz", smooth(SHAPE, noise=5).astype(np.float32), AFFINE)
    return tmp_path


def call(files, *words):
    first = [files / "a.nii.gz", "-o", files / "out", "-w", files / "w.safetensors", "--patch", 16, "--step", 12]
    code = main(["--quiet", "infer", *map(str, [*first, *words])])
    return json.loads((files / "out" / "a.json").read_text()) if code == 0 else code


def test_the_line_about_the_doubt_says_how_bright_the_image_is(networks, caplog):
    with caplog.at_level("INFO", "fastsrgan"):
        told = infer_volume(smooth(SHAPE), AFFINE, networks[0], **FAST).report["doubt"]
    (line,) = [r.getMessage() for r in caplog.records if "doubt inside the head" in r.getMessage()]
    mean, most, image = (f"{told[key]:.3g}" for key in ("mean", "p95", "image_mean"))
    assert line.endswith(f"head: {mean} on average, 95 % below {most}, where the image is {image} on average")


def test_the_files_the_record_and_what_a_resumed_call_compares(files):
    record = call(files, "--uncertainty")
    assert {"doubt", "prob"} <= record["outputs"].keys() and record["asked"]["uncertainty"] is True
    made = images.load(files / "out" / record["outputs"]["doubt"])
    sr = images.load(files / "out" / record["outputs"]["sr"])
    assert made.data.shape == FINE and np.allclose(made.affine, sr.affine)
    # Found: 0 (rounding)
    again = summary(made.data, sr.data)
    for key in ("mean", "image_mean"):
        assert record["doubt"][key] == pytest.approx(again[key], rel=1e-6)  # found: 0 (float32)
    assert call(files, "--uncertainty", "--resume") == record
    assert call(files, "--resume") == 2 and call(files, "--uncertainty", "--flips", "x", "--resume") == 2
    (files / "out" / "a_doubt.nii.gz").unlink()
    assert call(files, "--uncertainty", "--resume")["doubt"] == record["doubt"]
    assert (files / "out" / "a_doubt.nii.gz").is_file()


def test_evaluate_finds_it_and_says_whether_the_error_is_where_it_is(files, capsys):
    call(files, "--uncertainty")
    capsys.readouterr()
    sr = images.load(files / "out" / "a_sr.nii.gz")
    made = images.load(files / "out" / "a_doubt.nii.gz").data
    truth = sr.data + (2 * made * np.random.default_rng(0).normal(size=FINE)).astype(np.float32)
    images.save(files / "hr.nii.gz", truth, sr.affine)
    words = ["evaluate", "--sr", str(files / "out" / "a_sr.nii.gz"), "--hr", str(files / "hr.nii.gz")]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["doubt"]
    assert found["error_over_doubt"] == pytest.approx(2, rel=0.01) and len(found["deciles"]) == 10  # found: 0.0019
    assert all(1.7 < part["error"] / part["doubt"] < 2.3 for part in found["deciles"])  # found: 1.9 to 2
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "rank_correlation" in shown and "decile" in shown
    (files / "truth").mkdir()
    images.save(files / "truth" / "a.nii.gz", truth, sr.affine)
    assert main(["evaluate", str(files / "out"), str(files / "truth"), "--json", str(files / "scores.json")]) == 0
    told = json.loads((files / "scores.json").read_text())
    assert told["summary"]["doubt.error_over_doubt"]["mean"] == found["error_over_doubt"]
    assert "rank_correlation" in told["definitions"]


def test_the_rank_correlation_is_scipy_s():
    from scipy import stats

    rng = np.random.default_rng(5)
    made = np.round(rng.random((9, 9, 9)), 1) + 0.1  # with equals
    truth, sr = np.full(made.shape, 100.0), 100 + made * rng.normal(size=made.shape)
    found = metrics.calibration(sr, truth, made)
    assert found["rank_correlation"] == pytest.approx(stats.spearmanr(made.ravel(), np.abs(sr - truth).ravel())[0])
    assert found["error_over_doubt"] == pytest.approx(np.sqrt(((sr - truth) ** 2).mean() / (made**2).mean()))
    assert metrics.calibration(sr, truth, np.ones_like(made))["rank_correlation"] is None


def test_the_calibration_looks_at_the_field_of_view_alone():
    rng = np.random.default_rng(5)
    made, truth = rng.random((12, 9, 9)), np.full((12, 9, 9), 100.0)
    sr = 100 + made * rng.normal(size=made.shape)
    there = np.zeros(made.shape, bool)
    there[:5] = True
    sr[5:], cut = 0, slice(0, 5)  # as where an image ends
    alone = metrics.calibration(sr[cut], truth[cut], made[cut])
    for mask in (None, np.ones(made.shape, bool)):
        assert metrics.calibration(sr, truth, made, mask, part=there) == alone


def test_a_scan_wholly_below_zero_has_the_doubt_of_one_moved_up():
    """Tissue is told from air by what is brighter than the lowest value, not than 0."""
    scan = smooth(SHAPE, noise=5.0)
    scan -= scan.min()
    view, made = seen(), {}
    for shift in (0.0, 4096.0):
        image = upright = np.repeat(scan, 3, axis=2).astype(np.float32) - np.float32(shift)
        doubts = np.zeros(upright.shape, np.float32)
        facts = doubt_(doubts, image, (scan - shift).astype(np.float32), view, 2)
        made[shift] = facts | summary(doubts, image)
    mean = made[4096.0].pop("image_mean") + 4096
    assert made[0.0].pop("image_mean") == pytest.approx(mean, rel=1e-4)  # found: 3e-7
    assert made[4096.0] == pytest.approx(made[0.0], rel=1e-2)  # found: 2e-3, of float32 at 4096
    assert made[0.0]["mean"] > 0 and made[0.0]["noise"] is not None
