"""Degradation: the pipeline equals its matrices, is keyed, and keeps the golden numbers of the original."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsrgan.errors import InputError, UsageError
from fastsrgan.observation import model
from fastsrgan.observation.model import Degradation, degrade
from fastsrgan.volume.resample import degrade_matrix, upsample_matrix


def head(shape=(20, 22, 30), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32) * 900


def test_physical_degradation_equals_the_matrices():
    hr, spacing, low = head(), (1.0, 1.0, 0.8), (1.0, 2.2, 2.9)
    down = [degrade_matrix(n, s, r) for n, s, r in zip(hr.shape, spacing, low, strict=True)]
    lr = np.einsum("bj,ck,ijk->ibc", down[1], down[2], hr.astype(float)) ** 1.3
    scale = lr.max()
    up = [upsample_matrix(m, n, s / r) for m, n, s, r in zip(lr.shape, hr.shape, spacing, low, strict=True)]
    z = np.einsum("bj,ck,ijk->ibc", up[1], up[2], lr / scale)
    done = degrade(hr, spacing, low, power=1.3)
    assert done.low_res.shape == lr.shape and done.interpolated.shape == hr.shape == done.hr.shape
    # float32 products against float64: found 2.1e-7, 3.9e-7 and 1.7e-7.
    assert np.abs(done.low_res - lr / scale).max() < 2e-6
    assert np.abs(done.interpolated - z).max() < 2e-6  # found: 3.9e-7
    assert np.abs(done.hr - hr.astype(float) ** 1.3 / scale).max() < 1e-6  # found: 1.7e-7
    assert done.scale == pytest.approx(scale, rel=1e-6)  # found: 1.4e-8 (rounding)


@settings(max_examples=25)
@given(st.tuples(*[st.integers(5, 33)] * 3), st.floats(1, 6), st.floats(0.4, 1.3))
def test_sizes_agree_for_every_ratio_and_a_constant_stays_constant(shape, ratio, spacing):
    done = degrade(np.full(shape, 7.0), (spacing,) * 3, (spacing, spacing, spacing * ratio))
    assert done.interpolated.shape == shape == done.hr.shape
    for part in (done.low_res, done.interpolated, done.hr):
        assert np.abs(part - 1).max() < 2e-6  # found: 2.4e-7


def test_noise_has_the_asked_strength_is_keyed_and_clipped():
    hr = np.full((40, 40, 40), 100.0)
    a = degrade(hr, (1, 1, 1), (1, 1, 2), noise=0.03, key=(5, 1, "sub-01"))
    b = degrade(hr, (1, 1, 1), (1, 1, 2), noise=0.03, key=(5, 1, "sub-01"))
    c = degrade(hr, (1, 1, 1), (1, 1, 2), noise=0.03, key=(5, 2, "sub-01"))
    assert np.array_equal(a.low_res, b.low_res) and not np.array_equal(a.low_res, c.low_res)
    assert (a.low_res * a.scale).std() == pytest.approx(3.0, rel=0.002)  # found: 5.1e-4
    assert a.low_res.min() >= 0 and a.low_res.max() == 1


def test_golden_degradation_of_the_original(golden):
    import json

    from fastsrgan.io import nifti as images

    folder = golden / "degradation"
    for case in json.loads((folder / "meta.json").read_text(encoding="utf8")):
        if case.get("interp") != "scipy":
            continue
        hr = images.load(folder / case["hr"])
        expected = np.load(folder / f"case{case['case']}.npz")
        done = degrade(
            hr.data, hr.spacing, case["new_low_res"], power=case["contrast_power"], noise=0.0, geometry="segsrgan"
        )
        # Found: 3.6e-7, 1.2e-7 and 4.8e-7.
        assert np.abs(done.low_res - expected["lr_normalised"]).max() <= 2e-6
        assert np.abs(done.hr - expected["hr_normalised"]).max() <= 1e-6  # found: 1.2e-7
        assert np.abs(done.interpolated - expected["interpolated"]).max() <= 2e-6  # found: 4.8e-7


def test_draws_depend_on_the_key_alone_and_stay_in_their_ranges():
    setting = Degradation(((0.5, 0.5, 2.0), (0.5, 0.6, 4.0)), contrast=0.4, noise=0.02)
    draws = [setting.draw(3, epoch, f"sub-{s}") for epoch in range(40) for s in range(5)]
    again = [setting.draw(3, epoch, f"sub-{s}") for epoch in range(40) for s in range(5)]
    assert draws == again
    powers = np.array([d.power for d in draws])
    res = np.array([d.low_res for d in draws])
    # Found: 0.6, 1.4, 0.0098
    assert powers.min() >= 0.6 and powers.max() <= 1.4 and powers.std() == pytest.approx(0.8 / 12**0.5, rel=0.05)
    assert (res[:, 0] == 0.5).all() and 2 <= res[:, 2].min() < 2.2 and 3.8 < res[:, 2].max() <= 4  # found: 2, 4
    assert len({d.power for d in draws}) == len(draws)


@pytest.mark.parametrize("geometry", ["physical", "segsrgan"])
def test_apply_is_degrade_with_what_was_drawn(geometry):
    setting = Degradation(
        ((1, 1.2, 2.3), (1, 1.6, 3.1)), geometry=geometry, profile=0.1, artefacts={"motion": 0.2, "bias_field": 0.1}
    )
    draw, hr = setting.draw(3, 2, "sub-1"), head()
    by_hand = degrade(
        hr,
        (1, 1, 1),
        draw.low_res,
        power=draw.power,
        noise=draw.noise,
        key=(3, 2, "sub-1", "noise"),
        geometry=geometry,
        bias_field=0.1,
        width=draw.width,
        motion=0.2,
    )
    done = setting.apply(hr, (1, 1, 1), draw)
    turned = setting.apply(hr.transpose(0, 2, 1), (1, 1, 1), draw, (draw.low_res[0], draw.low_res[2], draw.low_res[1]))
    for name in ("low_res", "interpolated", "hr"):
        assert np.array_equal(getattr(done, name), getattr(by_hand, name))
    assert turned.low_res_mm[1] == draw.low_res[2] and turned.hr.shape[1] == done.hr.shape[2]


def test_apply_passes_on_all_that_the_law_holds(monkeypatch):
    law = Degradation(
        ((2, 2, 4),), geometry="segsrgan", interp="sitk", interpolation_type="Linear", block_bytes=10**9, rician=True,
        artefacts={"motion": 0.2},
    )  # fmt: skip
    seen = {}
    monkeypatch.setattr(model, "degrade", lambda *args, **settings: seen.update(settings))
    law.apply(head(), (1, 1, 1), law.draw(0, 1, "a"))
    same = ("geometry", "interp", "interpolation_type", "block_bytes", "rician")
    assert {name: seen[name] for name in same} == {name: getattr(law, name) for name in same} and seen["motion"] == 0.2


def test_a_lone_test_subject_has_the_middle_of_the_ranges():
    alone = Degradation(((1, 1, 2), (1, 2, 4)), contrast=0.4).linspace(0, 1)
    assert alone.low_res == (1.0, 1.5, 3.0) and alone.power == 1.0


def test_what_is_seen_of_an_image_is_what_apply_makes_of_it():
    """With the width, the gap and the shape of the profile that were drawn, on whichever axis is thick."""
    setting = Degradation(((1, 1.4, 2.3), (1, 1.6, 3.1)), 0.0, 0.0, profile=0.3, gap=0.4, profile_box=0.9)
    hr = head()
    for number, order in enumerate(((0, 1, 2), (2, 0, 1))):
        draw = setting.draw(3, number, "sub-1")
        low_res = tuple(draw.low_res[d] for d in order)
        done = setting.apply(hr, (1, 1, 1), draw, low_res)
        seen = setting.seen(hr.shape, (1, 1, 1), draw, low_res)
        assert abs(draw.width - 1) > 0.01 and draw.gap > 0.01 and draw.box > 0.01  # found: 0.12, 0.16, 0.033
        # Found: 2.4e-7
        assert np.abs(seen.forward(done.hr) - done.low_res).max() < 2e-6  # float32 products, as the matrices above


def test_validation_parameters_are_evenly_spaced():
    setting = Degradation(((1, 1, 2), (1, 1, 4)), contrast=0.5)
    draws = [setting.linspace(i, 3) for i in range(3)]
    assert [d.power for d in draws] == [0.5, 1.0, 1.5]
    assert [d.low_res[2] for d in draws] == [2.0, 3.0, 4.0]


def test_what_cannot_be_degraded_is_refused():
    with pytest.raises(InputError, match="maximum"):
        degrade(np.zeros((8, 8, 8)), (1, 1, 1), (1, 1, 2))
    with pytest.raises(InputError, match="maximum is nan"):
        degrade(np.full((8, 8, 8), np.nan), (1, 1, 1), (1, 1, 2), power=1.2, noise=0.1)
    with pytest.raises(UsageError, match="contrast power"):
        degrade(head(), (1, 1, 1), (1, 1, 2), power=0.0)
    with pytest.raises(UsageError, match="finer"):
        degrade(head(), (1, 1, 1), (1, 1, 0.5))
    with pytest.raises(UsageError, match="noise: -1"):
        degrade(head(), (1, 1, 1), (1, 1, 2), noise=-1)
    for image, sizes in (
        (head()[0], ((1, 1, 1), (1, 1, 2))),
        (head(), ((1, 1), (1, 1, 2))),
        (head(), ((1, 1, 1), (2,))),
    ):
        with pytest.raises(UsageError, match="two voxel sizes of three numbers"):
            degrade(image, *sizes)
    with pytest.raises(UsageError, match="one of physical, segsrgan"):
        degrade(head(), (1, 1, 1), (1, 1, 2), geometry="scipy")
    for bad in (
        {"low_res": ((1, 1),)},
        {"low_res": ((1, 1, 3),), "contrast": 1.0},
        {"low_res": ((1, 1, 3),), "noise": -1},
    ):
        with pytest.raises(UsageError):
            Degradation(**bad)
