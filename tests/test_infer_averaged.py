"""Flips and ensembles: the mean over mirror images of the axes that were named, and over networks."""

import numpy as np
import pytest
import torch
from nifti_files import rigid
from torch import nn

from fastsrgan.errors import ModelError, UsageError
from fastsrgan.infer.values import flip_axes
from fastsrgan.infer.volume import infer_volume
from fastsrgan.model.networks import GeneratorSpec, build_generator

SHAPE = (20, 16, 12)  # whole tiles of multiples of 4: padding is no mirror image of itself
AFFINE = rigid((1.0, 1.0, 2.5)) @ np.array([[0, 0, -1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
TILES = {"patch": 16, "step": 12, "device": "cpu", "agree": "off"}
WHOLE = {"patch": None, "step": 12, "device": "cpu", "agree": "off"}


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(3).random(SHAPE, np.float32) * 500


@pytest.fixture(scope="module")
def networks():
    return [build_generator(GeneratorSpec(kernel=1), seed=seed).eval() for seed in (5, 6)]


class Pointwise(nn.Module):
    """Sees one voxel at a time: what it makes of a mirror image is the mirror image of what it makes."""

    def forward(self, x):
        return torch.cat([x * (1.5 - x), torch.sigmoid(3 * x - 1)], dim=1)


def assert_equal_but_for_rounding(one, other):
    assert np.abs(one.sr - other.sr).max() <= 1e-6 * 500  # found: 2.4e-7 of the 500
    assert np.abs(one.prob - other.prob).max() <= 1e-6  # found: 1.2e-7


def test_flips_of_a_network_that_commutes_with_them_change_nothing(data):
    plain = infer_volume(data, AFFINE, Pointwise(), **TILES)
    for flips in ("y", "xyz"):
        assert_equal_but_for_rounding(infer_volume(data, AFFINE, Pointwise(), **TILES, flips=flips), plain)


def test_flips_are_the_mean_over_flipped_images(data, networks):
    """Axes are those of the image, whatever its orientation; a whole image as one tile shows which were flipped."""
    done = infer_volume(data, AFFINE, networks[0], **WHOLE, flips="xz")
    runs = []
    for step in ((1, 1, 1), (-1, 1, 1), (1, 1, -1), (-1, 1, -1)):
        turn = tuple(slice(None, None, s) for s in step)
        one = infer_volume(data[turn], AFFINE, networks[0], **WHOLE)
        runs.append((one.sr[turn], one.prob[(slice(None), *turn)]))
    inside = np.all([sr > data.min() for sr, _ in runs], axis=0)  # the clamp at the image's minimum follows the mean
    assert np.abs(done.sr - np.mean([sr for sr, _ in runs], axis=0))[inside].max() < 2e-6 * 500  # found: 4.9e-7
    assert inside.mean() > 0.3  # found: 0.51
    assert np.abs(done.prob - np.mean([prob for _, prob in runs], axis=0)).max() < 1e-5  # found: 0 (rounding)
    assert np.abs(runs[1][0] - runs[0][0]).max() > 1e-3 * 500, "this network is no symmetry of anything"  # found: 6.3
    assert done.report["flips"] == "xz" and done.report["networks"] == 1
    assert any(row["what"] == "means" for row in done.report["memory"]["rows"])


def test_a_model_averaged_with_itself_is_the_model(data, networks):
    plain = infer_volume(data, AFFINE, networks[0], **TILES)
    assert_equal_but_for_rounding(infer_volume(data, AFFINE, [networks[0]] * 2, **TILES), plain)
    assert "networks" not in plain.report
    alone = infer_volume(data, AFFINE, [networks[0]], **TILES)
    assert np.array_equal(alone.sr, plain.sr) and np.array_equal(alone.prob, plain.prob)


def test_an_ensemble_is_the_mean_of_its_members(data, networks):
    one, two = (infer_volume(data, AFFINE, network, **TILES) for network in networks)
    both = infer_volume(data, AFFINE, networks, **TILES)
    inside = (one.sr > data.min()) & (two.sr > data.min())
    # Found: 0.77, 4.9e-7
    assert inside.mean() > 0.3 and np.abs(both.sr - (one.sr + two.sr) / 2)[inside].max() < 2e-6 * 500
    # Found: 6e-8 (rounding)
    assert np.abs(both.prob - (one.prob + two.prob) / 2).max() < 1e-6 and both.report["networks"] == 2


def test_what_cannot_be_averaged_is_refused(data, networks):
    assert [flip_axes(f) for f in ("none", "x", "zx", "xyz")] == [(), (0,), (0, 2), (0, 1, 2)]
    for flips in ("", "xx", "w", "x y"):
        with pytest.raises(UsageError, match="flips"):
            infer_volume(data, AFFINE, networks[0], **TILES, flips=flips)
    masks = build_generator(GeneratorSpec(kernel=1, mask_classes=3))
    with pytest.raises(ModelError, match="cannot be averaged"):
        infer_volume(data, AFFINE, [networks[0], masks], **TILES)


class Upwards(nn.Module):
    """SR is the tile, the probabilities say where it is brighter than the voxel before along the last axis, or the
    first: what an axis is called is seen."""

    def forward(self, x):
        return torch.cat([x, *((x > x.roll(1, dims=axis)).float() for axis in (4, 2))], dim=1)


def world(array, axes):
    """With the axes that point to R, A and S in this order, which lie in ``axes``."""
    return np.transpose(array, axes)


@pytest.mark.parametrize("through", ["R", "A", "S"])
def test_probabilities_of_an_upright_head_are_those_of_its_own_axes_and_sr_stays(through):
    """Stored in whatever order; slices that are axial already have the one pass, without a word in the report."""
    rng = np.random.default_rng(8)
    order = [1, 2, 0]  # stored axes point to S, R and A
    mm = [1.0, 1.0, 1.0]
    mm["SRA".index(through)] = 2.0
    shape = [12 if m == 1 else 6 for m in mm]
    affine = np.zeros((4, 4))
    for stored, to in enumerate("SRA"):
        affine["RAS".index(to), stored] = mm[stored]
    affine[3, 3] = 1
    data = rng.random(shape, np.float32) * 500
    made = {
        up: infer_volume(
            data, affine, Upwards(), patch=None, step=4, device="cpu", agree="off", upright=up, flips=flips
        )
        for up, flips in (("off", "none"), ("on", "none"), ("auto", "none"))
    }
    assert (made["on"].sr == made["off"].sr).all() and (made["auto"].prob == made["off"].prob).all()
    sr = world(made["on"].sr, order)
    across = "RAS".index(through)
    for up, last, first in (("on", 2, 0), ("off", across, (across + 1) % 3)):
        for prob, axis in zip(made[up].prob, (last, first), strict=True):
            assert (world(prob, order) == (sr > np.roll(sr, 1, axis))).mean() > 0.999  # found: 1
    assert made["off"].report.get("upright") is None
    assert made["on"].report.get("upright") == {"R": [2, 0, 1], "A": [1, 2, 0], "S": None}[through]
    if through == "S":
        assert (made["on"].prob == made["off"].prob).all()
    else:
        assert (made["on"].prob != made["off"].prob).mean() > 0.3  # found: 0.5


def test_an_upright_pass_is_of_every_network_and_flip_and_in_the_physical_geometry_alone(data, networks):
    sagittal = np.diag([2.0, 1, 1, 1])
    turned = {name: infer_volume(data, sagittal, networks, **WHOLE, flips="x", upright=name) for name in ("on", "off")}
    runs = [infer_volume(data, sagittal, n, **WHOLE, flips="x", upright="on") for n in networks]
    assert np.abs(turned["on"].prob - np.mean([r.prob for r in runs], axis=0)).max() < 1e-5  # found: 1e-7
    assert (turned["on"].sr == turned["off"].sr).all()
    assert np.abs(turned["on"].prob - turned["off"].prob).max() > 1e-2  # found: 0.39
    segsrgan = [
        infer_volume(data, sagittal, networks[0], **WHOLE, geometry="segsrgan", upright=u) for u in ("on", "off")
    ]
    assert (segsrgan[0].prob == segsrgan[1].prob).all() and "upright" not in segsrgan[0].report
    with pytest.raises(UsageError, match="upright"):
        infer_volume(data, sagittal, networks[0], **WHOLE, upright="yes")
