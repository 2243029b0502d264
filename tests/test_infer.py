"""One volume in, super-resolution and segmentation out: geometry, intensities, the original's numbers."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nifti_files import rigid
from torch import nn

from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.infer.planes import target_spacing
from fastsrgan.infer.settings import InferSettings
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.model.weights import load_generator
from fastsrgan.volume.geometry import Orientation, grid_size, spacing_of
from fastsrgan.volume.resample import apply_axes, upsample_matrix

GOLDEN = Path(__file__).parent / "golden"
TURNS = [
    Orientation(axes, flips)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product([False, True], repeat=3)
]


@pytest.fixture(scope="module")
def identity() -> nn.Module:
    generator = build_generator(GeneratorSpec(kernel=1))
    nn.init.zeros_(generator.head)
    return generator


@pytest.fixture(scope="module")
def random_net() -> nn.Module:
    return build_generator(GeneratorSpec(kernel=2), seed=5)


def voxel_centres(shape, affine) -> np.ndarray:
    """(X, Y, Z, 3) world positions in mm."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def blobs(shape, affine, centres, sigma) -> np.ndarray:
    world = voxel_centres(shape, affine)
    return sum(np.exp(-0.5 * ((world - c) ** 2).sum(-1) / sigma**2) for c in centres)


def find(data, affine, near, radius) -> np.ndarray:
    """Centre of mass in world mm of what lies within ``radius`` of a point."""
    world = voxel_centres(data.shape, affine)
    weight = data * (((world - near) ** 2).sum(-1) < radius**2)
    return (world * weight[..., None]).sum((0, 1, 2)) / weight.sum()


# --- where things are ---------------------------------------------------------------------------------------------


@pytest.mark.fault(9)
@pytest.mark.parametrize(
    ("spacing", "turn", "stored"),
    [
        ((1.0, 1.25, 3.0), (0.0, 0.0, 0.0), Orientation()),
        ((1.0, 1.25, 3.0), (0.3, -0.2, 0.5), Orientation()),  # oblique
        ((1.0, 1.25, 3.0), (0.0, 0.0, 0.0), Orientation((0, 1, 2), (True, False, False))),  # left-handed
        ((1.0, 1.25, 3.0), (0.2, 0.1, -0.3), Orientation((2, 0, 1), (True, True, False))),  # permuted, oblique
        ((3.0, 1.0, 1.25), (0.0, 0.0, 0.0), Orientation((1, 2, 0), (False, True, True))),  # sagittal
        ((1.0, 3.3, 0.9), (-0.4, 0.2, 1.2), Orientation((0, 2, 1), (False, False, True))),  # coronal, odd ratios
    ],
)
@pytest.mark.parametrize("new_resolution", [None, 0.8])
def test_blobs_stay_where_they_were(identity, spacing, turn, stored, new_resolution):
    """Found within 0.05 voxel in world space, on grids of any orientation."""
    field = np.array([44.0, 45.0, 48.0])
    shape = tuple(round(f / s) for f, s in zip(field, spacing, strict=True))
    affine = rigid(spacing, turn)
    sigma = max(spacing)
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    offsets = np.array([[-0.211, -0.17, -0.19], [0.2, 0.187, -0.163], [0.17, -0.2, 0.215]]) * field
    centres = [middle + affine[:3, :3] / spacing @ o for o in offsets]
    data = 100 * blobs(shape, affine, centres, sigma)
    result = infer_volume(
        stored.apply(data), stored.affine(affine, shape), identity, patch=32, step=24, new_resolution=new_resolution
    )
    voxel = min(spacing_of(result.affine))
    assert spacing_of(result.affine) == pytest.approx([new_resolution or min(spacing)] * 3)
    for centre in centres:
        found = find(result.sr, result.affine, centre, 3 * sigma)
        assert np.abs(found - centre).max() < 0.05 * voxel  # found: 0.008


@pytest.mark.fault(9)
@pytest.mark.parametrize("stored", TURNS[::5], ids=str)
def test_one_head_stored_differently_is_one_result(random_net, stored):
    """With a network that is no symmetry of anything: equal bits in world space, for every permutation and flip."""
    data = np.random.default_rng(0).random((18, 14, 7)).astype(np.float32)
    affine = rigid((1.0, 1.1, 2.7), (0.2, -0.1, 0.15))
    settings = {"patch": (16, 12, None), "step": (7, 5, 30)}
    plain = infer_volume(data, affine, random_net, **settings)
    moved = infer_volume(
        stored.apply(data),
        stored.affine(affine, data.shape),
        random_net,
        patch=stored.permute(settings["patch"]),
        step=stored.permute(settings["step"]),
    )
    assert np.array_equal(moved.sr, stored.apply(plain.sr))
    assert np.array_equal(moved.prob, stored.apply(plain.prob))
    # Found: 3.6e-15 (rounding)
    assert np.allclose(moved.affine, stored.affine(plain.affine, plain.sr.shape), atol=1e-12)


@pytest.mark.parametrize(("n", "old", "new"), [(203, 0.5, 3.0), (34, 3.0, 0.5), (67, 3.0, 0.7), (5, 3.3, 1.0)])
def test_non_integer_ratios_keep_the_field_of_view(identity, n, old, new):
    affine = rigid((1.0, 1.0, old))
    data = np.random.default_rng(1).random((9, 8, n)) + 0.1
    result = infer_volume(data, affine, identity, new_resolution=(1.0, 1.0, new), patch=None)
    m = grid_size(n, old, new)
    assert result.sr.shape == (9, 8, m) and result.prob.shape == (1, 9, 8, m)
    assert spacing_of(result.affine) == pytest.approx((1.0, 1.0, new))
    assert abs(m * new - n * old) <= new / 2 + 1e-12  # rounding; found: 0
    centre_in = affine @ [4, 3.5, (n - 1) / 2, 1]
    assert np.allclose(result.affine @ [4, 3.5, (m - 1) / 2, 1], centre_in)


def test_there_and_back_gives_one_size(identity):
    """203 slices of 0.5 mm -> 34 of 3 mm -> 204 of 0.5 mm -> 34 of 3 mm: the sizes are a fixed point."""
    data, affine, sizes = np.ones((8, 8, 203)), rigid((1.0, 1.0, 0.5)), []
    for spacing in (3.0, 0.5, 3.0):
        result = infer_volume(data, affine, identity, new_resolution=(1.0, 1.0, spacing), patch=None)
        data, affine = result.sr, result.affine
        sizes.append(data.shape[2])
    assert sizes == [34, 204, 34]


# --- what the values are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", ["physical", "segsrgan"])
@pytest.mark.parametrize("window", ["constant", "gaussian"])
def test_the_identity_network_returns_the_input(identity, geometry, window):
    data = np.random.default_rng(2).integers(-50, 900, (23, 17, 11)).astype(np.int16)
    affine = rigid()
    result = infer_volume(
        data, affine, identity, new_resolution="same", patch=8, step=5, geometry=geometry, window=window
    )
    assert np.allclose(result.sr, data, rtol=2e-7, atol=2e-4) and result.sr.dtype == np.float32  # found: 0.11 of it
    assert np.allclose(result.affine, affine, atol=1e-12)  # found: 0 (rounding)
    assert (result.prob == 0.5).all() and result.prob.dtype == np.float32


def test_the_identity_network_returns_the_interpolation(identity):
    data = np.random.default_rng(3).random((20, 18, 8)).astype(np.float32) * 700
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    result = infer_volume(data, affine, identity, patch=16, step=9, agree="off")
    assert 0 < result.report["tile_seconds"] <= result.report["seconds"] < 1e6
    up = upsample_matrix(data.shape[2], 3 * data.shape[2], 1 / 3)
    spline = apply_axes(data, [None, None, up])
    assert np.abs(result.sr - np.maximum(spline, data.min())).max() < 1e-3  # found: 1.8e-4


def test_intensities_scale_with_the_input_and_stay_above_its_minimum(random_net):
    data = np.random.default_rng(4).random((16, 16, 8)).astype(np.float32) + 0.3
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    one = infer_volume(data, affine, random_net, patch=16, step=8)
    thousand = infer_volume(data * 1024, affine, random_net, patch=16, step=8)
    assert one.report["agree"]["weight"] == thousand.report["agree"]["weight"]
    assert np.allclose(one.sr * 1024, thousand.sr, rtol=1e-6)  # found: 0 (rounding)
    assert np.array_equal(one.prob, thousand.prob)
    assert one.sr.min() == data.min()


@pytest.mark.fault(12)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 50, 2), (7, 5, 13)])
def test_volumes_smaller_than_a_patch_come_back_in_their_size(random_net, shape):
    result = infer_volume(np.full(shape, 5.0), rigid((1.0, 1.0, 1.0)), random_net, patch=32, step=16)
    assert result.sr.shape == shape and np.isfinite(result.sr).all() and np.isfinite(result.prob).all()


@pytest.mark.fault(6)
def test_a_constant_volume_stays_finite(identity, random_net):
    data = np.full((16, 16, 8), 42.0)
    assert np.allclose(infer_volume(data, rigid(), identity, patch=16, step=8).sr, 42)
    assert np.isfinite(infer_volume(data, rigid(), random_net, patch=16, step=8).sr).all()


def test_conditional_networks_get_the_slice_spacing():
    seen = []

    class Conditional(nn.Module):
        spec = GeneratorSpec(conditional=True)

        def forward(self, x, res):
            seen.append(res)
            return torch.cat([x, x], 1)

    data, affine = np.ones((9, 8, 10)), rigid((3.25, 1.0, 1.1))
    infer_volume(data, affine, Conditional(), patch=None)
    infer_volume(data, affine, Conditional(), patch=None, geometry="segsrgan")
    assert seen == [pytest.approx(3.25), pytest.approx(1.1)]  # the thickest axis; the original takes the third


# --- the original's numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [0, 1])
def test_segsrgan_geometry_gives_what_the_original_gave(run):
    """Outputs of the published Keras code on a real crop, tiles and whole image (tests/golden/README.md)."""
    meta = json.loads((GOLDEN / "e2e" / "meta.json").read_text())
    case = meta["runs"][run]
    image = images.load(GOLDEN / "e2e" / "lr_input.nii.gz")
    sr = images.load(GOLDEN / "e2e" / case["sr"])
    cortex = images.load(GOLDEN / "e2e" / case["cortex"])
    result = infer_volume(
        image.data,
        image.affine,
        load_generator(GOLDEN / case["weights"]),
        patch=case["patch"],
        step=case["step"],
        new_resolution=meta["new_resolution"],
        geometry="segsrgan",
    )
    assert result.sr.shape == sr.data.shape
    assert np.abs(result.sr - sr.data).max() < 1e-4 * np.ptp(image.data)  # found: 1.6e-5
    assert np.abs(result.prob[0] - cortex.data).max() < 1e-5  # found: 2.9e-6
    assert np.array_equal(result.affine, sr.affine)


def test_segsrgan_geometry_keeps_the_origin_and_declares_the_new_spacing(identity):
    affine = rigid((1.0, 1.2, 3.0))
    result = infer_volume(
        np.random.default_rng(6).random((9, 8, 10)),
        affine,
        identity,
        patch=None,
        new_resolution=(0.5, 1.2, 1.0),
        geometry="segsrgan",
    )
    assert result.sr.shape == (18, 8, 30)
    assert np.allclose(result.affine[:3, 3], affine[:3, 3])
    assert np.allclose(result.affine[:3, :3], affine[:3, :3] * [0.5, 1, 1 / 3])


# --- settings -----------------------------------------------------------------------------------------------------


def asked(new_resolution):
    return InferSettings(new_resolution=new_resolution)


def test_target_spacing():
    own, shape = (0.9, 0.903, 3.0), (100, 100, 30)
    assert target_spacing(own, shape, asked(None)) == (0.9, 0.903, 0.9)  # within 1 % of the finest: left alone
    assert target_spacing(own, shape, asked("same")) == own
    assert target_spacing(own, shape, asked(0.5)) == (0.5, 0.5, 0.5)
    assert target_spacing(own, shape, asked(np.float32(0.5))) == (0.5, 0.5, 0.5)
    assert target_spacing(own, shape, asked([0.90001, 1.0, 3.0])) == (0.9, 1.0, 3.0)  # rounding of a header


@pytest.mark.parametrize("nonsense", [0, -1.0, (1.0, 1.0), (1, 1, float("nan")), "fine", [1, 1, 1, 1]])
def test_resolutions_that_are_none_are_refused(nonsense):
    with pytest.raises(UsageError, match="new resolution"):
        target_spacing((1, 1, 3), (10, 10, 10), asked(nonsense))


def test_a_resolution_beyond_any_memory_is_refused_before_work(identity):
    with pytest.raises(ResourceError, match="voxels"):
        infer_volume(np.ones((64, 64, 64)), np.eye(4), identity, new_resolution=0.01)


@pytest.mark.parametrize(
    "setting",
    [{"patch": 30}, {"step": 200}, {"window": "welch"}, {"precision": "int8"}, {"geometry": "itk"}, {"batch": 0}],
)
def test_nonsense_settings_are_usage_errors(identity, setting):
    with pytest.raises(UsageError):
        infer_volume(np.ones((16, 16, 16)), np.eye(4), identity, **setting)


@pytest.mark.parametrize(
    ("data", "affine"),
    [
        (np.zeros((8, 8, 8)), np.eye(4)),
        (-np.ones((8, 8, 8)), np.eye(4)),
        (np.full((8, 8, 8), np.nan), np.eye(4)),
        (np.where(np.arange(512).reshape(8, 8, 8) == 7, np.inf, 1.0), np.eye(4)),
        (np.ones((8, 8)), np.eye(4)),
        (np.ones((8, 0, 8)), np.eye(4)),
        (np.ones((8, 8, 8)), np.zeros((4, 4))),
        (np.ones((8, 8, 8)), np.eye(3)),
    ],
)
def test_volumes_that_cannot_be_used_are_input_errors(identity, data, affine):
    with pytest.raises(InputError):
        infer_volume(data, affine, identity)


def test_the_report_names_the_settings_as_used(identity):
    result = infer_volume(np.ones((20, 16, 8)), np.diag([1.0, 1.0, 2.0, 1.0]), identity, patch=16, step=8)
    expected = {"patch": 16, "step": 8, "geometry": "physical", "window": "constant", "precision": "fp32"}
    expected |= {"device": "cpu", "new_resolution": [1.0, 1.0, 1.0], "shape": [20, 16, 16], "tiles": 2, "warnings": []}
    if torch.cuda.is_available():
        expected = {k: v for k, v in expected.items() if k not in ("device", "precision")}
    assert {key: result.report[key] for key in expected} == expected
    coarser = infer_volume(np.ones((20, 16, 8)), np.eye(4), identity, patch=16, step=8, new_resolution=(1, 1, 2))
    assert "coarser" in coarser.report["warnings"][0]
