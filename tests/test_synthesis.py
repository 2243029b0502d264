"""Images made from label maps: keyed, aligned with their label, of the intensities that were drawn, never folded."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fastsrgan.errors import InputError, UsageError
from fastsrgan.observation import synthesis
from fastsrgan.observation.synthesis import INJECTIVE, Synthesis, draw_look, draw_shape, measured_means, synthesise

MM = (1.0, 1.0, 1.0)
KEY = (7, 3, "sub-1")
STILL = Synthesis(rotation=0, shear=0, scaling=(1, 1), warp=0, bias_field=0, strip=0, rim=0)
PLAIN = dataclasses.replace(STILL, texture=(0, 0), blur=(0, 0), scatter=0)


def brain(shape=(36, 40, 34)) -> np.ndarray:
    """White matter (2, 41) in cortex (3, 42) in fluid (24) in bone (515) and skin (516), with one ventricle (4)."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    r = np.sqrt((grid**2).sum(0))
    labels = np.zeros(shape, np.int16)
    for radius, value in ((0.95, 516), (0.87, 515), (0.78, 24), (0.7, 3), (0.5, 2), (0.2, 4)):
        labels[r < radius] = value
    right = grid[0] > 0
    labels[right & (labels == 3)] = 42
    labels[right & (labels == 2)] = 41
    return labels


def tissues(shape=(36, 40, 34)) -> np.ndarray:
    """The brain alone, in numbers of tissues, without any around it."""
    labels = brain(shape)
    found = np.zeros(shape, np.uint8)
    for value, values in ((1, (2, 41)), (2, (4,)), (5, (3, 42))):
        found[np.isin(labels, values)] = value
    return found


def core(labels: torch.Tensor, value: int, voxels: int = 3) -> np.ndarray:
    """A structure without its edges."""
    return ndimage.binary_erosion(labels.numpy() == value, iterations=voxels)


def test_the_key_alone_decides():
    labels = brain()
    one, two = synthesise(labels, MM, KEY), synthesise(labels, MM, KEY)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for other in ((8, 3, "sub-1"), (7, 4, "sub-1"), (7, 3, "sub-2")):
        image, _ = synthesise(labels, MM, other)
        assert image.shape != one[0].shape or not torch.equal(image, one[0])


def test_every_purpose_has_draws_of_its_own():
    """Turning one effect off leaves what the others draw: the same contrast with and without deformation."""
    values = [0, 2, 3, 4, 24, 41, 42, 515, 516]
    assert draw_look(KEY, values, Synthesis()).mean == draw_look(KEY, values, STILL).mean
    upright = dataclasses.replace(Synthesis(), invert=0)
    assert draw_look(KEY, values, upright).mean[3] == draw_look(KEY, [0, 3], upright).mean[3]
    still, moved = (
        draw_shape(KEY, (30, 30, 30), MM, dataclasses.replace(Synthesis(), rotation=r)) for r in (0.0, 15.0)
    )
    assert np.array_equal(still.warp_3KKK[:, :2, :2, :2], moved.warp_3KKK[:, :2, :2, :2])


def test_any_number_of_threads_gives_the_same_bits():
    labels, before = brain(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = synthesise(labels, MM, KEY)
        torch.set_num_threads(3)
        three = synthesise(labels, MM, KEY)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_without_effects_an_image_is_its_table_of_means():
    labels = brain()
    image, seen = synthesise(labels, MM, KEY, PLAIN)
    look = draw_look(KEY, sorted(map(int, np.unique(labels))), PLAIN)
    box = tuple(slice(int(w.min()), int(w.max()) + 1) for w in np.nonzero(labels))
    found = tuple(slice(int(w.min()), int(w.max()) + 1) for w in np.nonzero(seen.numpy()))
    assert np.array_equal(seen.numpy()[found], labels[box])
    for value in np.unique(labels)[1:]:
        there = image.numpy()[seen.numpy() == value]
        assert np.allclose(there, look.mean[int(value)], atol=1e-5), value  # coordinates are float32: 4e-7 was measured


@pytest.mark.parametrize("sigma", [0.0, 0.6, 0.8, 1.2])
def test_an_edge_is_as_wide_as_the_partial_volume_that_was_drawn(sigma):
    classes = torch.zeros((24, 9, 9), dtype=torch.uint8)
    classes[:12], classes[12:] = 1, 2
    none = dict.fromkeys((0, 2, 3), 0.0)
    look = synthesis.DrawnLook({0: 0.0, 2: 0.2, 3: 0.9}, none, (0.5, 0.0), False, False, 0, sigma, (1.0, 0.0, 0.0))
    image = synthesis._intensities(KEY, classes, [0, 2, 3], look).double().numpy()
    for line in (image[:, 4, 4], image[:, 0, 8]):
        steps, at = np.diff(line) / 0.7, np.arange(23) - 11
        assert (line[0], line[-1]) == pytest.approx((0.2, 0.9))
        assert (steps * at).sum() == pytest.approx(0, abs=5e-6)  # found: 5.5e-7
        # A sampled Gaussian of narrow width is a little narrower. Found: 0.007 at 0.6
        assert np.sqrt((steps * at**2).sum()) == pytest.approx(sigma, abs=0.01)


@pytest.mark.parametrize("value", [499, 500, 501])
def test_labels_from_500_on_lie_outside_the_brain(value):
    """They are seen in a head, go with a strip, and keep their brightness; without any the map ends at the brain."""
    labels = np.where(brain() >= 515, value, brain())
    for strip in (0.0, 1.0):
        image, seen = synthesise(labels, MM, KEY, dataclasses.replace(PLAIN, strip=strip))
        assert bool((seen == value).any()) == (value < 500 or not strip)
        assert float(image[seen == 0].mean()) < 0.04  # air: of any structure the mean is 0.05 at least; found: 0.014
    plain, turned = (
        draw_look(KEY, [0, 2, 3, value], dataclasses.replace(Synthesis(), invert=i)).mean for i in (0.0, 1.0)
    )
    assert (plain[value] == turned[value]) == (value >= 500) and plain[2] != turned[2]


@pytest.mark.parametrize("key", [(1, e, "a") for e in range(6)])
def test_image_and_label_stay_aligned(key):
    """Deformed, blurred and textured: inside each structure of the label the image has the mean that was drawn."""
    ranges = dataclasses.replace(Synthesis(), bias_field=0, texture=(0.02, 0.02))
    labels = brain((70, 76, 68))
    image, seen = synthesise(labels, MM, key, ranges)
    assert image.shape == seen.shape
    look = draw_look(key, sorted(map(int, np.unique(labels))), ranges)
    for value in (2, 41, 3, 42, 4):
        inside = core(seen, value)
        assert inside.sum() > 50
        there = image.numpy()[inside]
        # The texture's smooth part leaves a mean of few independent values.
        assert abs(float(there.mean()) - look.mean[value]) < 0.02, value  # found: 0.0085
        assert 0.004 < float(there.std()) < 0.04, value  # found: 0.0074 to 0.021


def test_measured_means_are_parts_of_the_brightest_structure_whatever_is_around():
    labels = np.repeat(np.array([0, 2, 3], np.uint8), 8).reshape(3, 2, 4)
    image = np.array([900.0, 400.0, 100.0])[labels.astype(int) - (labels > 0)]
    assert measured_means([image, 3 * image], [labels, labels]) == ((2, 1.0, 0.0), (3, 0.25, 0.0))


def test_texture_has_unit_variance_in_every_mixture():
    for grain in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.6, 0.64, 0.48)):
        found = synthesis._texture(KEY, (60, 64, 62), grain, torch.device("cpu"))
        assert abs(float(found.std()) - 1) < 0.1, grain  # found: 0.014
        assert abs(float(found.mean())) < 0.1, grain  # found: 0.07


def test_texture_has_three_scales():
    """Voxels, and splines of 2 and 5: of what lies a few voxels apart, the smoother is the more alike."""
    alike = []
    for grain in np.eye(3):
        found = synthesis._texture(KEY, (40, 44, 42), tuple(grain), torch.device("cpu")).double()
        alike.append([float((found[lag:] * found[:-lag]).mean() / found.square().mean()) for lag in (2, 5)])
    assert max(map(abs, alike[0])) < 0.02  # by chance its sd is 0.004; found: 0.0011
    # A cubic B-spline of white noise one knot apart, and 2.5 knots apart.
    # Found: 0.016
    assert alike[1] == pytest.approx([0.497, 0.005], abs=0.05) and alike[2] == pytest.approx([0.888, 0.497], abs=0.05)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), warp=st.floats(0, 1), spacing=st.sampled_from([MM, (0.8, 0.8, 0.8), (0.7, 1.2, 3.0)])
)
def test_a_deformation_never_folds(seed, warp, spacing):
    """The Jacobian of where voxels come from is positive everywhere, also at the strongest warp allowed."""
    shape = draw_shape((seed, 1, "x"), (40, 36, 20), spacing, dataclasses.replace(Synthesis(), warp=warp))
    assert np.abs(shape.warp_3KKK).max() <= INJECTIVE * shape.distance_mm
    frame = [(-22, 45), (-20, 41), (-12, 25)]
    found = [at.clone() for _, at in synthesis._sources(shape, [19.5, 17.5, 9.5], spacing, frame, torch.device("cpu"))]
    at = torch.cat(found, 1).double().numpy()
    gradient = np.stack([np.stack(np.gradient(one), 0) for one in at])  # (3, 3, X, Y, Z)
    determinant = np.linalg.det(gradient.transpose(2, 3, 4, 0, 1))
    assert determinant.min() > 0


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    times=st.sampled_from([0.25, 0.5, 2.0, 8.0]),
    size=st.sampled_from([(40, 36, 20), (9,) * 3]),
)
def test_a_deformation_does_not_depend_on_the_unit_of_length(seed, times, size):
    """All lengths so many times as large: the same in voxels, everywhere, with as many control points."""
    plain = Synthesis()
    low, high = plain.warp_mm
    scaled = dataclasses.replace(plain, warp_mm=(times * low, times * high))
    one = draw_shape((seed, 1, "x"), size, MM, plain)
    other = draw_shape((seed, 1, "x"), size, (times * MM[0], times * MM[1], times * MM[2]), scaled)
    assert other.warp_3KKK.shape == one.warp_3KKK.shape
    assert other.distance_mm == pytest.approx(times * one.distance_mm)
    np.testing.assert_allclose(other.affine_33, one.affine_33)
    np.testing.assert_allclose(other.warp_3KKK, times * one.warp_3KKK, rtol=1e-12)  # found: 1.1e-15 (rounding)


def test_scale_is_that_of_the_result():
    """Twice as large along x: twice as many voxels of every structure."""
    grown = dataclasses.replace(PLAIN, scaling=(1.999, 2.001))
    labels = tissues()
    _, seen = synthesise(labels, MM, KEY, grown)
    for value in (1, 2, 5):
        assert abs(int((seen == value).sum()) / int((labels == value).sum()) - 8) < 0.8  # found: 0.72


@pytest.mark.parametrize("key", [(2, e, "b") for e in range(8)])
def test_the_brain_always_fits(key):
    labels = brain((40, 44, 38))
    for strip in (0.0, 1.0):
        _, seen = synthesise(labels, MM, key, dataclasses.replace(Synthesis(), strip=strip))
        inside = (seen > 0) & (seen < 500) & (seen != 24)
        for d in range(3):
            for end in (0, -1):
                assert not inside.select(d, end).any()
        grown = np.linalg.det(np.linalg.inv(draw_shape(key, labels.shape, MM, Synthesis()).affine_33))
        cortex = int(((seen == 3) | (seen == 42)).sum()) / int(np.isin(labels, (3, 42)).sum())
        assert 0.6 < cortex / grown < 1.6  # found: 0.91 to 1.1


@pytest.mark.parametrize("key", [(3, e, "c") for e in range(6)])
def test_what_is_stripped_is_exactly_zero(key):
    labels = brain((44, 46, 42))
    image, seen = synthesise(labels, MM, key, dataclasses.replace(Synthesis(), strip=1.0))
    outside = seen.numpy() == 0
    assert outside.any()
    assert not image.numpy()[outside].any()
    assert (image.numpy()[core(seen, 2, 1)] > 0).all()
    far = ndimage.distance_transform_edt(~np.isin(seen.numpy(), (2, 3, 4, 41, 42)))
    assert not seen.numpy()[far > 20].any()


def test_a_stripped_head_keeps_its_brain_and_so_many_voxels_around_it():
    """Tight, the fluid around the brain goes too, but for one voxel more than the rim."""
    labels, ranges = (
        np.pad(brain((26, 28, 24)), ((14, 0), (0, 9), (0, 0))),
        dataclasses.replace(PLAIN, strip=1.0, rim=2),
    )
    kinds = set()
    for epoch in range(7):
        key = (3, epoch, "rim")
        look = draw_look(key, sorted(map(int, np.unique(labels))), ranges)
        core = (labels > 0) & (labels < 500) & ~(look.tight & (labels == 24))
        steps = ndimage.distance_transform_cdt(~core, metric="taxicab")
        expected = np.where(steps <= look.rim + look.tight, labels, 0)
        seen = synthesise(labels, MM, key, ranges)[1].numpy()
        box, there = (tuple(slice(w.min(), w.max() + 1) for w in np.nonzero(one)) for one in (expected, seen))
        assert np.array_equal(seen[there], expected[box]), epoch
        kinds.add((look.tight, look.rim))
    assert len(kinds) >= 4


def test_stripping_changes_nothing_of_the_brains_shape():
    """One deformation of one map, whatever of it is kept, and wherever in the map the brain lies."""
    labels = np.pad(brain((30, 34, 28)), ((22, 0), (0, 13), (0, 0)))
    shapes = []
    for strip in (0.0, 1.0):
        seen = synthesise(labels, MM, (4, 1, "x"), dataclasses.replace(Synthesis(), strip=strip))[1].numpy()
        inside = np.where(np.isin(seen, (2, 3, 4, 41, 42)), seen, 0)
        shapes.append(inside[tuple(slice(w.min(), w.max() + 1) for w in np.nonzero(inside))])
    assert shapes[0].shape == shapes[1].shape
    assert (shapes[0] != shapes[1]).mean() < 1e-3  # found: 0; a coordinate at a voxel's edge may round either way


def test_a_head_that_grows_is_seen_as_far_as_the_map_reached():
    """The brain fits always; what is around it needs no larger arrays than the map's."""
    labels = brain((30, 30, 30))  # its skin reaches to 0.95, and its fluid to 0.78, of the map
    _, seen = synthesise(labels, MM, KEY, dataclasses.replace(PLAIN, scaling=(1.2, 1.2)))
    assert max(seen.shape) <= 30 and bool((seen == 515).any())


def test_a_made_image_is_a_magnitude():
    noisy = dataclasses.replace(STILL, contrast=(0.01, 0.02), texture=(0.1, 0.1), blur=(0, 0))
    image, seen = synthesise(brain(), MM, KEY, noisy)
    tissue = image[seen > 0]
    # Noise about nearly 0, of which the lower half is turned up, not cut off.
    assert float(image.min()) >= 0 and float((tissue == 0).float().mean()) < 0.01  # found: 0
    assert 0.06 < float(tissue.mean()) < 0.1  # of |N(0, 0.1)|: 0.08; found: 0.084


def test_a_brain_without_surroundings_is_zero_outside_its_rim():
    labels = tissues((40, 44, 38))
    rims = set()
    for epoch in range(8):
        image, seen = synthesise(labels, MM, (3, epoch, "d"), dataclasses.replace(STILL, rim=3))
        look = draw_look((3, epoch, "d"), [0, 1, 2, 5], dataclasses.replace(STILL, rim=3))
        steps = ndimage.distance_transform_cdt(seen.numpy() == 0, metric="taxicab")
        assert not image.numpy()[steps > look.rim].any()
        rims.add(look.rim)
        if look.rim:
            assert (image.numpy()[(steps > 0) & (steps <= look.rim)] > 0).mean() > 0.95  # found: 1
    assert len(rims) > 1


def test_shares_and_ranges_are_those_asked_for():
    values = [0, 2, 3, 4, 41, 42, 515]
    ranges = Synthesis(strip=0.3, rim=2)
    looks = [draw_look((1, i, "e"), values, ranges) for i in range(400)]
    assert abs(np.mean([look.strip for look in looks]) - 0.3) < 0.08  # found: 0.013
    assert {look.rim for look in looks} == {0, 1, 2}
    # Of the texture's variance a fifth is of single voxels.
    shares = np.mean([np.square(look.grain) for look in looks], 0)
    assert shares == pytest.approx([0.2, 0.4, 0.4], abs=0.04)  # by chance its sd is 0.01; found: 0.017
    means = np.array([[look.mean[v] for v in values[1:]] for look in looks])
    assert means.min() >= ranges.contrast[0] and means.max() <= ranges.contrast[1]
    assert means.min() < 0.1 and means.max() > 0.95  # found: 0.05, 1
    sds = np.array([[look.sd[v] for v in values[1:]] for look in looks])
    assert sds.min() >= ranges.texture[0] and sds.max() <= ranges.texture[1]
    assert all(ranges.blur[0] - 0.025 <= look.blur <= ranges.blur[1] + 0.025 for look in looks)
    # Both sides have one Gaussian; white and grey matter are independent.
    assert np.array_equal(means[:, 0], means[:, 3]) and np.array_equal(means[:, 1], means[:, 4])
    assert abs(np.corrcoef(means[:, 0], means[:, 1])[0, 1]) < 0.2  # found: 0.0048; by chance its sd is 0.05
    # Scanners differ: half of them write zero in air, and none of their voxels has any noise then.
    assert 0.4 < np.mean([look.mean[0] == look.sd[0] == 0 for look in looks]) < 0.6  # found: 0.5
    shapes = [draw_shape((1, i, "e"), (8, 8, 8), MM, ranges) for i in range(200)]
    sizes = np.array([np.linalg.norm(np.linalg.inv(s.affine_33), axis=0) for s in shapes])
    assert 0.75 < sizes[:, 0].min() < 0.85 and 1.2 < sizes[:, 0].max() < 1.26  # found: 0.8, 1.2
    assert all(ranges.warp_mm[0] <= s.distance_mm <= ranges.warp_mm[1] for s in shapes)


def test_every_range_is_used_up_to_its_ends():
    s = Synthesis()
    looks = [draw_look((1, i, "r"), [0, 3, 515], s) for i in range(120)]
    shapes = [draw_shape((1, i, "r"), (8, 8, 8), MM, s) for i in range(120)]
    for values, (low, high) in (
        ([look.sd[3] for look in looks], s.texture),
        ([look.blur for look in looks], s.blur),
        ([look.surround[0] for look in looks], s.contrast),
        ([look.surround[1] for look in looks], s.texture),
        ([look.mean[515] for look in looks], s.contrast),
        ([look.sd[0] for look in looks], (0.0, 0.02)),  # of air, where it has noise at all
        ([shape.distance_mm for shape in shapes], s.warp_mm),
    ):
        room = 0.1 * (high - low)  # 120 draws leave a tenth of a range empty with a probability of 3e-6
        assert low - room < min(values) < low + room and high - room < max(values) < high + room
    # The parts of the texture's scales leave its variance as it is.
    assert np.allclose([np.square(look.grain).sum() for look in looks], 1)
    assert min(np.ptp([look.grain for look in looks], axis=0)) > 0.5  # found: 0.69


def test_each_share_is_drawn_on_its_own():
    """Free, inverted, stripped, tight: that a visit is one says nothing of the others."""
    given = {2: 0.3, 3: 0.5, 10: 0.9}
    halves = Synthesis(means=(tuple((v, m, 0.0) for v, m in given.items()),), free=0.5, invert=0.5, strip=0.5)
    looks = [draw_look((2, i, "s"), [0, *given], halves) for i in range(240)]
    found = np.array([[look.mean[v] for v in given] for look in looks])
    turned = np.isclose(found, [0.9, 0.7, 0.3]).all(1)
    told = turned | np.isclose(found, list(given.values())).all(1)  # of a free one it is not seen whether it is turned
    rows = np.array([[look.strip, look.tight] for look in looks], float)
    for columns in (np.column_stack([told, rows]), np.column_stack([turned, rows])[told]):
        assert np.abs(columns.mean(0) - 0.5).max() < 0.2  # found: 0.06; the sd of 120 is 0.05
        assert np.abs(np.corrcoef(columns.T) - np.eye(3)).max() < 0.4  # found: 0.11; of two that are one: 1


SIDES = {41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 58: 26, 60: 28}
TISSUES = {
    "white matter": (2, 7, 16, 28, 85),  # cerebrum, cerebellum, brain stem, ventral diencephalon, chiasm
    "grey matter": (3, 8, 17, 18, 26),  # cortex of both, hippocampus, amygdala, accumbens
    "deep grey matter": (10, 11, 12, 13),  # thalamus, caudate, putamen, pallidum
    "fluid": (4, 5, 14, 15, 24, 72),  # ventricles, around the brain
}


def test_tissues_and_sides_are_freesurfers():
    """Without scatter structures of one tissue are one; drawn freely, both sides of a structure are."""
    one = {side: side for members in TISSUES.values() for side in members}
    values = [0, *one, *SIDES, 515]

    def groups(**ranges) -> set[frozenset[int]]:
        mean = draw_look(KEY, values, dataclasses.replace(PLAIN, invert=0, **ranges)).mean
        return {frozenset(v for v in values if mean[v] == m) for m in set(mean.values())}

    right = {left: value for value, left in SIDES.items()}
    both = {value: {value, right.get(value, value)} for value in one}
    assert groups(free=1) == {frozenset({0}), frozenset({515}), *map(frozenset, both.values())}
    joined = [frozenset().union(*(both[v] for v in members)) for members in TISSUES.values()]
    assert groups(free=0) == {frozenset({0}), frozenset({515}), *joined}
    wide = Synthesis(free=0, invert=0, contrast=(0, 50))  # nothing is clipped
    apart = [draw_look((1, i), [0, 10, 11], wide).mean for i in range(80)]
    assert np.std([m[10] - m[11] for m in apart]) == pytest.approx(0.04 * np.sqrt(2), rel=0.3)  # found: 12 % below
    sides = ((3, 0.5, 0.1), (42, 0.5, 0.1))  # given apart, they are drawn apart
    look = draw_look(KEY, [0, 3, 42], Synthesis(means=(sides,), free=0, invert=0))
    assert abs(look.mean[3] - look.mean[42]) > 0.01 and look.sd[3] != look.sd[42]  # found: 0.13


def test_warps_are_of_any_strength_up_to_the_largest():
    warped = dataclasses.replace(STILL, warp=0.8)
    shapes = [draw_shape((1, i, "w"), (30, 30, 30), MM, warped) for i in range(200)]
    strengths = np.array([np.abs(s.warp_3KKK).max() / (INJECTIVE * s.distance_mm) for s in shapes])
    assert strengths.min() < 0.1 and 0.75 < strengths.max() <= 0.8  # found: 0.012, 0.797
    assert abs(strengths.mean() - 0.4) < 0.06  # found: 0.025


def test_heads_are_turned_either_way_about_every_axis():
    turned = dataclasses.replace(STILL, rotation=15.0)
    angles = np.array([np.linalg.inv(draw_shape((1, i), (8, 8, 8), MM, turned).affine_33) for i in range(200)])
    for one, other in ((1, 2), (0, 2), (0, 1)):
        sines = angles[:, one, other]
        # Found: 0.47 to 0.53, 0.27 to 0.30
        assert 0.4 < np.mean(sines > 0) < 0.6 and 0.2 < np.abs(sines).max() < 0.32  # sin 15 degrees is 0.26


def test_rotation_scale_and_shear_of_every_axis_are_drawn_on_their_own():
    """A is inv(R S D): the columns of R S D give the scales, what is left of them the shears, then the angles."""
    made = [np.linalg.inv(draw_shape((1, i, "own"), (8, 8, 8), MM, Synthesis()).affine_33) for i in range(400)]
    rows = []
    for forward in made:
        turn, upper = np.linalg.qr(forward)
        signs = np.sign(np.diag(upper))
        turn, upper = turn * signs, upper * signs[:, None]
        scales = np.diag(upper)
        slant = upper / scales
        rows.append([*np.log(scales), slant[0, 1], slant[0, 2], slant[1, 2], turn[2, 1], turn[2, 0], turn[1, 0]])
    values = np.array(rows)
    apart = np.corrcoef(values.T) - np.eye(9)
    assert np.abs(apart).max() < 0.25  # found: 0.13; 400 of two that are independent have an sd of 0.05
    assert np.ptp(values, axis=0).min() > 0.15  # every one of them varies, the shears by 0.2; found: 0.198
    assert np.abs((values > 0).mean(0) - 0.5).max() < 0.1  # either way alike; found: 0.06, and the sd is 0.025


def test_means_are_drawn_about_those_given():
    asked = ((1, 0.5, 0.02), (5, 0.4, 0.02))
    near = Synthesis(means=(asked,), free=0, invert=0)
    looks = [draw_look((1, i, "f"), [0, 1, 5], near).mean for i in range(100)]
    # Found: 0.0036, 0.0014
    assert abs(np.mean([m[1] for m in looks]) - 0.5) < 0.01 and abs(np.mean([m[5] for m in looks]) - 0.4) < 0.01
    assert 0.01 < np.std([m[1] for m in looks]) < 0.03  # found: 0.02
    turned = [draw_look((1, i, "f"), [0, 1, 5], dataclasses.replace(near, invert=1.0)).mean for i in range(100)]
    for before, after in zip(looks, turned, strict=True):  # bright and dark exchanged, the range kept
        assert after[1] == pytest.approx(before[5]) and after[5] == pytest.approx(before[1])
    skull = [draw_look(KEY, [0, 1, 5, 515], dataclasses.replace(near, invert=i)).mean[515] for i in (0, 1)]
    assert skull[0] == skull[1]
    free = [draw_look((1, i, "f"), [0, 1, 5], dataclasses.replace(near, free=1.0)).mean[1] for i in range(100)]
    assert np.std(free) > 0.2  # found: 0.27


def test_one_of_several_contrasts_is_drawn_per_visit():
    """A contrast holds for all structures of a visit; one that is given twice is drawn twice as often."""
    dark, bright = ((1, 0.2, 0.0), (5, 0.3, 0.0)), ((1, 0.8, 0.0), (5, 0.6, 0.0))
    mixed = Synthesis(means=(dark, dark, bright), free=0, invert=0)
    looks = [draw_look((1, i, "f"), [0, 1, 5], mixed).mean for i in range(300)]
    assert {(round(m[1], 3), round(m[5], 3)) for m in looks} == {(0.2, 0.3), (0.8, 0.6)}
    assert 0.58 < np.mean([m[1] < 0.5 for m in looks]) < 0.75  # 2 of 3; sd of such a mean: 0.027; found: 0.64


def test_measured_means_are_those_of_an_image():
    labels = tissues()
    image = np.where(labels == 1, 300.0, np.where(labels == 5, 200.0, np.where(labels == 2, 400.0, 0.0)))
    found = {value: (mean, sd) for value, mean, sd in measured_means([image], [labels])}
    assert found[1][0] == pytest.approx(0.75) and found[5][0] == pytest.approx(0.5) and found[2][0] == pytest.approx(1)
    doubled = measured_means([image, np.where(labels == 1, 380.0, image)], [labels, labels])
    assert {v: sd for v, _, sd in doubled}[1] > 0.05  # found: 0.1


def test_the_edge_lies_between_the_two_means():
    """Partial volume: at a border the image passes through what lies between, never beyond (no noise)."""
    ranges = dataclasses.replace(STILL, texture=(0, 0), blur=(0.6, 0.6), rotation=15, scaling=(0.9, 1.1), strip=1.0)
    image, seen = synthesise(brain(), MM, KEY, ranges)
    look = draw_look(KEY, sorted(map(int, np.unique(brain()))), ranges)
    white = np.isin(seen.numpy(), (2, 41))
    near = ndimage.binary_dilation(white) & np.isin(seen.numpy(), (3, 42))
    low, high = sorted((look.mean[2], look.mean[3]))
    between = image.numpy()[near]
    assert ((between > low + 0.05 * (high - low)) & (between < high - 0.05 * (high - low))).mean() > 0.3  # found: 0.99


def test_a_bias_field_is_smooth_and_bounded():
    labels = brain()
    even, _ = synthesise(labels, MM, KEY, PLAIN)
    shaded, _ = synthesise(labels, MM, KEY, dataclasses.replace(PLAIN, bias_field=0.4))
    inside = even > 0.01
    field = (shaded[inside] / even[inside]).log()
    assert float(field.std()) > 0.01 and float(field.abs().max()) <= 0.4 + 1e-5  # found: 0.046


def test_the_coordinates_are_those_of_the_plain_form():
    """One B-spline for warp and affine together, against the formula in float64."""
    spacing = (0.8, 1.0, 1.5)
    shape = draw_shape(KEY, (30, 28, 22), spacing, Synthesis())
    frame, middle = [(-16, 33), (-15, 29), (-11, 24)], [14.5, 13.5, 10.5]
    at = torch.cat([a for _, a in synthesis._sources(shape, middle, spacing, frame, torch.device("cpu"))], 1)
    k = shape.warp_3KKK.shape[1]
    voxels = [first + np.arange(n) for first, n in frame]
    matrices = [
        synthesis._spline(v.astype(float), shape.distance_mm / mm, k) for v, mm in zip(voxels, spacing, strict=True)
    ]
    x = np.stack(np.meshgrid(*(v * mm for v, mm in zip(voxels, spacing, strict=True)), indexing="ij"))
    x = x + np.einsum("cijk,xi,yj,zk->cxyz", shape.warp_3KKK, *matrices)
    expected = np.einsum("dc,cxyz->dxyz", shape.affine_33, x) / np.reshape(spacing, (3, 1, 1, 1))
    expected += np.reshape(middle, (3, 1, 1, 1))
    assert np.abs(at.numpy() - expected).max() < 5e-5  # found: 6.8e-6


def test_tensors_and_arrays_of_any_type_give_the_same():
    labels = tissues()
    first = synthesise(labels, MM, KEY)
    for other in (torch.from_numpy(labels), labels.astype(np.int64), np.asfortranarray(labels.astype(np.uint16))):
        assert all(torch.equal(a, b) for a, b in zip(first, synthesise(other, MM, KEY), strict=True))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.zeros((8, 8, 8), np.uint8), "no label from 1 to 499"),
        (np.full((8, 8, 8), 507, np.int16), "no label from 1 to 499"),
        (np.full((8, 8, 8), -1, np.int16), "outside 0 to 32767"),
        (np.full((8, 8, 8), 40000, np.int32), "outside 0 to 32767"),
        (np.arange(512, dtype=np.int16).reshape(8, 8, 8), "512 values"),
        (np.ones((8, 8, 8), np.float32), "three dimensions of whole numbers"),
        (np.ones((8, 8), np.uint8), "three dimensions of whole numbers"),
        (np.ones((0, 8, 8), np.uint8), "is empty"),
    ],
)
def test_maps_that_are_none_are_refused(labels, reason):
    with pytest.raises(InputError, match=reason):
        synthesise(labels, MM, KEY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"free": 1.5},
        {"warp": 2},
        {"scaling": (0, 1)},
        {"scaling": (2, 1)},
        {"shear": 0.6},
        {"texture": (-1, 1)},
        {"rim": -1},
    ],
)
def test_ranges_that_are_none_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Synthesis(**wrong)


def test_small_and_thin_maps_work():
    for shape in ((3, 3, 3), (1, 20, 20), (5, 30, 2)):
        labels = np.ones(shape, np.uint8)
        image, seen = synthesise(labels, MM, KEY)
        assert image.shape == seen.shape and bool((seen == 1).any()) and bool(torch.isfinite(image).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_image():
    labels = brain((70, 76, 68))
    image, seen = synthesise(labels, MM, KEY)
    other, there = synthesise(labels, MM, KEY, device="cuda")
    assert other.shape == image.shape
    # A coordinate at a voxel's edge rounds either way. Not measured: needs a CUDA device
    assert float((there.cpu() != seen).float().mean()) < 1e-4
    same = there.cpu() == seen
    assert float((other.cpu() - image)[same].abs().max()) < 1e-3  # not measured: needs a CUDA device
