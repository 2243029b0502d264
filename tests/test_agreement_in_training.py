"""Agreement as the last layer of training: what a patch's result becomes is what ``infer`` makes of a volume's."""

import numpy as np
import pytest
import torch
from cohort import make_store

from fastsrgan.config import TrainConfig
from fastsrgan.core.ranks import ALONE
from fastsrgan.core.threads import one_thread
from fastsrgan.data.pool import Batch, Pool, Slices
from fastsrgan.data.subject import PatchRule, make_resident, slices_of
from fastsrgan.errors import UsageError
from fastsrgan.observation.model import Degradation
from fastsrgan.store.reader import Sample, open_store
from fastsrgan.train.gan import Models
from fastsrgan.train.objectives import agreed_patches, generator_loss
from fastsrgan.train.run import prepare
from fastsrgan.volume.consistency import observation, patch_agreement
from fastsrgan.volume.resample import slice_profile_matrix, spline_matrix

CPU = torch.device("cpu")
NARROW = 0.8  # width of the profile over the spacing of slices
REACH = 12  # voxels from a patch's end that slices beyond it still change by a hundredth


@pytest.mark.parametrize("ratio", [2.0, 2.7, 6.5])
@pytest.mark.parametrize("first", [-5, 13, 50])
def test_a_patch_becomes_what_the_volume_becomes(ratio, first):
    n, patch, w, draw = 90, 48, 0.03, np.random.default_rng(3)
    seen = observation((4, 4, round(n / ratio)), (1, 1, ratio), (4, 4, n), (1, 1, 1), thickness_mm=NARROW * ratio)
    m = len(seen.down[2])
    scan, sr = draw.random((4, 4, m)), draw.random((4, 4, n))
    up, down = spline_matrix(m, n, 1 / ratio), slice_profile_matrix(n, m, ratio, NARROW)
    whole = sr + np.linalg.solve(down @ down.T + w * np.eye(m), (scan - sr @ down.T)[..., None])[..., 0] @ down
    low, high = max(first, 0), min(first + patch, n)
    x, pred = (np.zeros((1, 1, 4, 4, patch)) for _ in range(2))
    x[0, 0, :, :, low - first : high - first] = (scan @ up.T)[..., low:high]
    pred[0, 0, :, :, low - first : high - first] = sr[..., low:high]
    both = torch.tensor(np.concatenate([pred, pred], 1))
    layer = torch.from_numpy(patch_agreement(first, patch, n, m, ratio, NARROW, w))[None]
    made = agreed_patches(both, torch.tensor(x), layer).numpy()
    assert np.array_equal(made[:, 1:], both[:, 1:].numpy())  # the segmentation is left alone
    reach = round(REACH * ratio / 2)
    inner = slice(0 if first <= 0 else first + reach, n if first + patch >= n else first + patch - reach)
    found = made[0, 0, :, :, inner.start - first : inner.stop - first]
    assert inner.stop - inner.start > 4 or ratio > 6
    if found.size:
        assert np.abs(found - whole[..., inner]).max() < 0.03  # found: 0.016, of a change of 1
        assert np.abs(found - sr[..., inner]).max() > 0.1  # found: 0.49


def test_the_spline_becomes_the_best_linear_estimate_and_a_mirrored_patch_the_mirror_image():
    slices = Slices(48, 16, 3.0, 0.1)
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(1, 1, 2, 2, 48, generator=draw)
    up, down = spline_matrix(16, 48, 1 / 3), slice_profile_matrix(48, 16, 3.0, NARROW)
    scan = torch.rand(2, 2, 16, generator=draw)
    x[0, 0] = scan @ torch.tensor(up.T).float()
    made = agreed_patches(x, x, torch.from_numpy(slices.of(0, 48, False))[None])
    back = np.linalg.solve(down @ down.T + 0.1 * np.eye(16), down)
    linear = x[0, 0].double() + (scan.double() - x[0, 0].double() @ torch.tensor(down.T)) @ torch.tensor(back)
    assert (made[0, 0] - linear).abs().max() < 5e-6  # found: 6e-7
    turned = torch.from_numpy(slices.of(0, 48, True).copy())[None]
    assert (agreed_patches(x.flip(-1), x.flip(-1), turned).flip(-1) - made).abs().max() < 2e-6  # found: 4.2e-7


def sample(spacing=(1.0, 1.0, 1.0)) -> Sample:
    image = np.random.default_rng(0).random((24, 24, 40)).astype(np.float32)
    label = (image > 0.5).astype(np.uint8)
    return Sample(
        id="a", image=image, label=label, mask=None, affine=np.diag([*spacing, 1.0]), spacing=spacing, split="Train"
    )


def test_patches_know_their_place_among_the_slices():
    law = Degradation(((1.0, 1.0, 2.5),), noise=0.02)
    made = make_resident(sample(), law, law.draw(0, 1, "a"), PatchRule(16, 12, agree=True), CPU)
    assert made.slices == slices_of((24, 24, 40), (1.0, 1.0, 1.0), (1.0, 1.0, 2.5), 0.02)
    assert (made.slices.n, made.slices.m, made.slices.ratio) == (40, 16, 2.5)
    pool = Pool([made], 16, flips="z")
    at = np.array([0, 3, 3 + 4 * len(pool)])
    batch = pool.gather(at)
    for row, index in zip(batch.agree, at, strict=True):
        corner = int(made.origins[index % len(pool)][2])
        assert np.array_equal(row.numpy(), made.slices.of(corner, 16, index >= len(pool)))
    assert not np.array_equal(batch.agree[0], batch.agree[1]) or made.origins[0][2] == made.origins[3][2]
    plain = make_resident(sample(), law, law.draw(0, 1, "a"), PatchRule(16, 12), CPU)
    assert plain.slices is None and Pool([plain], 16).gather(at[:2]).agree is None


def test_the_weight_is_that_of_the_noise_that_was_drawn():
    law = Degradation(((1.0, 1.0, 2.5),), noise=0.06, noise_from=0.01)
    draws = [law.draw(0, epoch, "a") for epoch in (1, 2, 3)]
    made = [make_resident(sample(), law, draw, PatchRule(16, 12, agree=True), CPU).slices.weight for draw in draws]
    assert made == [slices_of((24, 24, 40), (1.0,) * 3, (1.0, 1.0, 2.5), draw.noise).weight for draw in draws]
    assert len(set(made)) == 3


def test_noise_lets_a_result_yield_less_and_coarse_planes_not_at_all():
    at = [slices_of((24, 24, 40), (1.0,) * 3, (1.0, 1.0, 3.0), noise).weight for noise in (0.0, 0.02, 0.04)]
    assert at[0] == 0.03 and at[0] < at[1] < at[2] and 3 < slices_of((9,) * 3, (1.0,) * 3, (1, 1, 3), 0.03).weight < 7
    assert slices_of((24, 24, 40), (1.0,) * 3, (2.0, 2.0, 3.0), 0.0) is None
    # Slices hardly thicker than the result's voxels are left as they are, those of a quarter more are not.
    assert not patch_agreement(0, 16, 40, 33, 1.2, NARROW, 0.03).any()
    assert patch_agreement(0, 16, 40, 32, 1.25, NARROW, 0.03)[1].any()


def test_the_loss_and_the_critics_fakes_see_the_result_that_agrees():
    config = TrainConfig(new_low_res=((1.0, 1.0, 3.0),), patch_size=16, batch_size=2, kernel_gen=2, kernel_dis=2)
    with one_thread():
        models = Models(config, 0, CPU)
        x, y = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 16, 16, 16)
        layer = torch.from_numpy(Slices(16, 5, 3.0, 0.03).of(0, 16, False)).repeat(2, 1, 1, 1)
        batch = Batch(x, y, torch.full((2,), 3.0), ["a", "b"], layer)
        pred = models.generator(x).detach()
        agreed = agreed_patches(pred, x, layer)
        assert (agreed - pred).abs().max() > 0.01  # found: 2.5
        assert torch.allclose(models.generate(batch), agreed)
        loss = lambda out: generator_loss(lambda *a: out, models.critic, x, y, lambda_adv=0.0)  # noqa: E731
        told = generator_loss(models.generator, models.critic, x, y, lambda_adv=0.0, agree=layer)
        # Found: 0 (rounding)
        assert float(told["total"].detach()) == pytest.approx(float(loss(agreed)["total"].detach()), rel=1e-6)
        assert float(told["total"].detach()) != pytest.approx(float(loss(pred)["total"]), rel=1e-3)  # found: 0.19
        assert models.generator_update(batch, False)["reconstruction"] == pytest.approx(
            float(loss(agreed)["reconstruction"]),
            rel=1e-6,  # found: 0 (rounding)
        )


def test_a_loss_behind_the_layer_does_not_pay_for_what_the_scan_says():
    """What D sees of an error costs next to nothing, what it cannot see costs all."""
    ratio, n, m = 3.0, 48, 16
    down = slice_profile_matrix(n, m, ratio, NARROW)
    seen = torch.from_numpy((down.T @ np.linalg.solve(down @ down.T, np.ones(m))).astype(np.float32))
    layer = torch.from_numpy(patch_agreement(0, n, n, m, ratio, NARROW, 1e-6))[None]
    x = torch.zeros(1, 1, 1, 1, n)
    left = agreed_patches((x + seen).expand(1, 2, 1, 1, n), x, layer)[0, 0]
    assert left.abs().max() < 1e-5 * seen.abs().max()  # found: 3.1e-6
    wave = torch.from_numpy(np.linalg.svd(down)[2][-1].astype(np.float32))  # D takes it to zero
    kept = agreed_patches((x + wave).expand(1, 2, 1, 1, n), x, layer)[0, 0]
    assert (kept - wave).abs().max() < 1e-6 * wave.abs().max()  # found: 4.2e-8 (rounding)


def test_the_originals_geometry_is_refused(tmp_path):
    store = open_store(make_store(tmp_path))
    config = TrainConfig(new_low_res=((1.0, 1.0, 3.0),), patch_size=16, agree=True, geometry="segsrgan")
    with pytest.raises(UsageError, match="--geometry physical"):
        prepare(store, tmp_path / "run", config, CPU, ALONE, strict=False, resume=False)
