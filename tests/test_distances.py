"""Surface distances: equal to MONAI and to distances between all pairs of points, exact by hand, None when empty."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from fastsrgan.errors import InputError
from fastsrgan.evaluate.metrics import surface, surface_distances, surface_scores

CASES = [((9, 13, 11), (1.0, 1.0, 1.0)), ((17, 7, 12), (0.5, 0.7, 3.0)), ((5, 5, 21), (2.5, 1.0, 0.3))]


def _masks(shape, seed=0):
    """Two ragged masks that touch the border of the volume and have several parts."""
    rng = np.random.default_rng(seed)
    return [ndimage.gaussian_filter(rng.normal(size=shape), 1.2, mode="wrap") > 0.05 for _ in range(2)]


def _all_pairs(a, b, spacing):
    points = [np.argwhere(surface(m)) * np.asarray(spacing) for m in (a, b)]
    apart = cdist(*points)
    return apart.min(1), apart.min(0)


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_distances_are_those_of_the_nearest_of_all_points(shape, spacing):
    a, b = _masks(shape)
    for found, expected in zip(surface_distances(a, b, spacing), _all_pairs(a, b, spacing), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)  # found: 9.5e-16 (rounding)


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_both_figures_are_monais(shape, spacing):
    metrics = pytest.importorskip("monai.metrics", reason="MONAI is not installed")
    import torch

    a, b = _masks(shape, 1)
    one_hot = [torch.from_numpy(np.stack([~m, m])[None].astype(np.float32)) for m in (a, b)]
    hausdorff = metrics.HausdorffDistanceMetric(percentile=95)(*one_hot, spacing=spacing)
    average = metrics.SurfaceDistanceMetric(symmetric=True)(*one_hot, spacing=spacing)
    scores = surface_scores(a, b, spacing)
    assert scores["hausdorff95_mm"] == pytest.approx(float(hausdorff), rel=1e-6)  # found: 1.7e-8 (rounding)
    assert scores["surface_distance_mm"] == pytest.approx(float(average), rel=1e-6)  # found: 7.6e-8 (rounding)


def test_a_shift_along_the_thick_axis_is_its_spacing():
    a = np.zeros((7, 8, 9), bool)
    a[3, 4, 2] = True
    scores = surface_scores(a, np.roll(a, 2, 2), (0.5, 0.5, 3.0))
    assert scores == {"hausdorff95_mm": 6.0, "surface_distance_mm": 6.0}


def test_equal_masks_are_no_distance_apart_and_order_does_not_matter():
    a, b = _masks((11, 9, 7), 2)
    assert surface_scores(a, a, (1, 2, 3)) == {"hausdorff95_mm": 0.0, "surface_distance_mm": 0.0}
    assert surface_scores(a, b, (1, 2, 3)) == pytest.approx(surface_scores(b, a, (1, 2, 3)))


def test_five_percent_of_outliers_do_not_move_the_percentile():
    a = np.zeros((5, 41, 31), bool)
    a[2, 10:38] = True  # flat: every voxel is surface
    b = a.copy()
    b[2, 1, :20] = True  # 2.3 % of the surface, far away
    assert surface_scores(b, a, (1, 1, 1))["hausdorff95_mm"] == 0
    assert max(surface_distances(b, a, (1, 1, 1))[0]) == 9


def test_the_rest_of_the_volume_changes_nothing():
    a, b = _masks((9, 8, 7), 3)
    wide = [np.pad(m, ((3, 5), (0, 4), (2, 1))) for m in (a, b)]
    assert surface_scores(*wide, (1, 2, 0.5)) == surface_scores(a, b, (1, 2, 0.5))


@pytest.mark.parametrize("empty", [(True, False), (False, True), (True, True)])
def test_an_empty_mask_has_no_distance(empty):
    full = np.ones((3, 4, 5), np.uint8)
    a, b = (full * 0 if e else full for e in empty)
    assert surface_scores(a, b, (1, 1, 1)) == {"hausdorff95_mm": None, "surface_distance_mm": None}


def test_probabilities_are_cut_at_a_half():
    a, b = _masks((9, 8, 7), 4)
    soft = np.where(a, 0.6, 0.5).astype(np.float32)
    assert surface_scores(soft, b, (1, 1, 2)) == surface_scores(a, b, (1, 1, 2))


def test_shapes_that_differ_are_refused():
    with pytest.raises(InputError, match="sizes differ"):
        surface_scores(np.ones((3, 4, 5)), np.ones((3, 4, 6)), (1, 1, 1))
