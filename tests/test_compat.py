"""The original's Python function and its SimpleITK interpolation, against its own outputs and against SimpleITK."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from fastsrgan import config
from fastsrgan.compat import original as compat
from fastsrgan.data.pool import Pool
from fastsrgan.data.subject import PatchRule, make_resident
from fastsrgan.errors import InputError, ModelError, ResourceError, UsageError
from fastsrgan.infer.volume import InferResult, infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.observation.model import Degradation, Draw, degrade
from fastsrgan.store.reader import Sample
from fastsrgan.volume import resample_sitk
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.resample import apply_axes

ROOT = Path(__file__).parent.parent
AFFINE = np.array([[-1.0, 0, 0, 30], [0, 1.2, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def sitk():
    return pytest.importorskip("SimpleITK", reason="needs the extra sitk")


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    """Weights whose SR is the network's input: what is written is the interpolation."""
    generator = build_generator(GeneratorSpec(kernel=1), seed=2)
    with torch.no_grad():
        generator.head[0].zero_()
    return weights.save_generator(tmp_path_factory.mktemp("identity") / "identity.safetensors", generator)


@pytest.fixture
def scan(tmp_path):
    data = np.random.default_rng(1).integers(40, 900, (12, 10, 7)).astype(np.int16)
    return images.save(tmp_path / "scan.nii.gz", data, AFFINE)


def segment(scan, model, folder, *, step=8, new_resolution=(0.5, 0.6, 1.0), mask=None, kind="Spline", **settings):
    """``segmentation`` into a folder; (SR, Cortex) as stored."""
    settings = {"patch": 16, "device": "cpu", **settings}
    paths = [folder / "Cortex.nii.gz", folder / "SR.nii.gz"]
    assert compat.segmentation(scan, step, new_resolution, *paths, mask, model, kind, **settings) == "Segmentation Done"
    return images.load(paths[1]), images.load(paths[0], dtype=np.float64)


def equal_but_for_rounding(a, b):
    """Rounding is what another batch size changes."""
    return np.isfinite(a).all() and np.abs(a - b).max() <= 1e-5 * np.ptp(b)  # found: 1.6e-6


# --- the function -------------------------------------------------------------------------------------------------


def test_the_signature_is_the_originals():
    given = [p for p in inspect.signature(compat.segmentation).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in given] == [
        "input_file_path",
        "step",
        "new_resolution",
        "path_output_cortex",
        "path_output_hr",
        "path_output_mask",
        "weights_path",
        "interpolation_type",
        "patch",
        "spline_order",
        "by_batch",
        "interp",
    ]
    assert [p.default for p in given[-4:]] == [None, 3, False, "scipy"]


@pytest.mark.parametrize("run", [0, 1], ids=["tiles", "whole image"])
def test_files_are_what_the_original_wrote(golden, tmp_path, run):
    folder = golden / "e2e"
    meta = json.loads((folder / "meta.json").read_text(encoding="utf8"))
    case = meta["runs"][run]
    paths = [tmp_path / "Cortex.nii.gz", tmp_path / "SR.nii.gz", tmp_path / "Mask.nii.gz"]
    told = compat.segmentation(
        str(folder / "lr_input.nii.gz"),
        case["step"],
        tuple(meta["new_resolution"]),
        *map(str, paths),
        str(golden / case["weights"]),
        "Spline",
        patch=case["patch"],
        by_batch=bool(run),
    )
    assert told == "Segmentation Done" and not paths[2].exists()
    range_of_input = np.ptp(images.load(folder / "lr_input.nii.gz").data)
    for path, name, tolerance in ((paths[1], case["sr"], 1e-4 * range_of_input), (paths[0], case["cortex"], 1e-4)):
        got, wanted = images.load(path, dtype=np.float64), images.load(folder / name, dtype=np.float64)
        assert got.meta["stored_dtype"] == wanted.meta["stored_dtype"] == ("float32" if "SR" in name else "float64")
        assert np.abs(got.data - wanted.data).max() <= tolerance
        assert np.allclose(got.affine, wanted.affine, atol=1e-6)  # found: 0 (rounding)


def test_by_batch_changes_no_number(scan, identity, tmp_path, monkeypatch):
    model = build_generator(GeneratorSpec(kernel=1), seed=6)
    path = weights.save_generator(tmp_path / "m.safetensors", model)
    sizes = []
    real = compat.infer_volume

    def watched(*args, **settings):
        result = real(*args, **settings)
        sizes.append(result.report["batch"])
        return result

    monkeypatch.setattr(compat, "infer_volume", watched)
    one, together = (segment(scan, path, tmp_path, by_batch=flag) for flag in (False, True))
    assert sizes[0] == 1 < sizes[1]
    for a, b in zip(one, together, strict=True):
        assert equal_but_for_rounding(a.data, b.data)


def test_a_scalar_resolution_is_isotropic(scan, identity, tmp_path):
    assert np.allclose(segment(scan, identity, tmp_path, new_resolution=0.6)[0].spacing, 0.6)


def test_the_mask_is_the_likeliest_class(golden, scan, tmp_path):
    model = golden / "weights_residual_mask3.h5"
    segment(scan, model, tmp_path, mask=tmp_path / "Mask.nii.gz")
    mask = images.load(tmp_path / "Mask.nii.gz", dtype=np.float64)
    image = images.load(scan)
    settings = {"patch": 16, "step": 8, "new_resolution": (0.5, 0.6, 1.0), "geometry": "segsrgan", "device": "cpu"}
    expected = infer_volume(image.data, image.affine, weights.load_generator(model), **settings)
    assert mask.meta["stored_dtype"] == "float64"
    assert np.array_equal(mask.data, expected.prob[1:].argmax(0)) and len(np.unique(mask.data)) > 1
    with pytest.raises(UsageError, match="mask head"):
        segment(scan, model, tmp_path)


def test_physical_geometry_is_a_choice(scan, tmp_path):
    model = build_generator(GeneratorSpec(kernel=1), seed=6).eval()
    path = weights.save_generator(tmp_path / "m.safetensors", model)
    sr, _ = segment(scan, path, tmp_path, geometry="physical")
    image = images.load(scan)
    settings = {"patch": 16, "step": 8, "new_resolution": (0.5, 0.6, 1.0), "device": "cpu", "agree": "off"}
    expected = infer_volume(image.data, image.affine, model, **settings)
    assert equal_but_for_rounding(sr.data, expected.sr)
    assert np.allclose(sr.affine, expected.affine, atol=2e-6)  # found: 5.5e-7


def test_existing_outputs_are_replaced_and_bad_ones_refused_before_work(scan, identity, tmp_path):
    for _ in range(2):
        segment(scan, identity, tmp_path)
    with pytest.raises(ResourceError, match="its folder is missing"):
        segment(scan, identity, tmp_path / "none")
    with pytest.raises(ModelError):
        segment(scan, tmp_path / "weights" / "downloaded", tmp_path)
    zero = images.save(tmp_path / "zero.nii.gz", np.zeros((8, 8, 8), np.int16), AFFINE)
    with pytest.raises(InputError, match=r"zero\.nii\.gz"):
        segment(zero, identity, tmp_path)


NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise SystemExit("the network was asked for")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import fastsrgan, fastsrgan.compat.original
from fastsrgan.cli.main import main
codes = [main([*words, "--help"]) for words in ([], ["job-model"], ["train"], ["infer"])]
sys.exit(any(codes))
"""


def test_importing_and_asking_for_help_do_not_touch_the_network():
    done = subprocess.run([sys.executable, "-c", NO_NETWORK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--result-folder-name" in done.stdout


# --- interpolation ------------------------------------------------------------------------------------------------


def expanded(sitk, volume_XYZ, factors, kind):
    """SimpleITK's own answer for a whole volume with some spacing; one thread, as the tests share their cores."""
    image = sitk.GetImageFromArray(volume_XYZ.swapaxes(0, 2).astype(np.float64))
    image.SetSpacing((0.5, 0.7, 3.0))
    expand = sitk.ExpandImageFilter()
    expand.SetNumberOfThreads(1)
    expand.SetExpandFactors(factors)
    expand.SetInterpolator(getattr(sitk, resample_sitk.INTERPOLATORS[kind]))
    return sitk.GetArrayFromImage(expand.Execute(image)).swapaxes(0, 2)


@pytest.mark.parametrize("kind", resample_sitk.INTERPOLATORS)
def test_matrices_are_what_expand_does(sitk, kind):
    volume = np.random.default_rng(0).random((7, 6, 5))
    wanted = expanded(sitk, volume, [2, 1, 3], kind)
    matrices = [resample_sitk.expand_matrix(n, k, kind) for n, k in zip(volume.shape, (2, 1, 3), strict=True)]
    assert np.abs(apply_axes(volume, matrices) - wanted).max() <= 1e-6  # found: 2.5e-7


@pytest.mark.parametrize("kind", ["Spline", "Linear", "Gaussian"])
def test_sitk_interpolates_the_input_by_rounded_factors(sitk, scan, identity, tmp_path, kind):
    sr, _ = segment(scan, identity, tmp_path, interp="sitk", kind=kind, new_resolution=(0.9, 0.6, 1.1))
    image = images.load(scan)
    wanted = np.maximum(expanded(sitk, image.data, [1, 2, 3], kind), image.data.min())
    assert sr.data.shape == (12, 20, 21)
    assert np.abs(sr.data - wanted).max() <= 1e-3  # found: 1.8e-4
    assert np.allclose(sr.affine, AFFINE @ np.diag([1, 1 / 2, 1 / 3, 1]), atol=1e-6)  # found: 2.4e-8 (rounding)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_spline_orders(scan, identity, tmp_path, order):
    sr, _ = segment(scan, identity, tmp_path, spline_order=order)
    data = images.load(scan).data
    wanted = np.maximum(ndimage.zoom(data.astype(np.float64), (2, 2, 3), order=order), data.min())
    assert np.abs(sr.data - wanted).max() <= 1e-3  # found: 3.2e-4


def test_interpolations_that_do_not_exist_are_refused(scan, identity, tmp_path):
    for settings, told in (
        ({"interp": "itk"}, "one of scipy, sitk"),
        ({"interp": "sitk", "kind": "BSpline"}, "one of NearestNeighbor"),
        ({"spline_order": 7}, "0 to 5"),
        ({"interp": "sitk", "geometry": "physical"}, "segsrgan geometry"),
        ({"interp": "sitk", "new_resolution": (3.0, 1.2, 3.0)}, "only enlarges"),
    ):
        with pytest.raises(UsageError, match=told):
            segment(scan, identity, tmp_path, **settings)
    # The original's default is the list of all names.
    segment(scan, identity, tmp_path, kind=list(resample_sitk.INTERPOLATORS))


def test_without_simpleitk_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    resample_sitk.expand_matrix.cache_clear()
    with pytest.raises(ResourceError, match=r"pip install 'fastsrgan\[sitk\]'"):
        resample_sitk.expand_matrix(5, 2)


# --- degradation --------------------------------------------------------------------------------------------------


def test_sitk_degradation_is_the_originals_at_every_stage(sitk, golden):
    """Case 2 of the original's own stages: whole factors, every third slice, Expand with a spline."""
    folder = golden / "degradation"
    case = json.loads((folder / "meta.json").read_text(encoding="utf8"))[2]
    hr = images.load(folder / case["hr"])
    done = degrade(
        hr.data,
        hr.spacing,
        case["new_low_res"],
        geometry="segsrgan",
        interp=case["interp"],
        interpolation_type=case["interpolation_type"],
    )
    with np.load(folder / "case2.npz") as wanted:
        # Found: 2.7e-7
        assert np.abs(done.low_res * done.scale - wanted["low_res"]).max() <= 2e-6 * wanted["low_res"].max()
        assert np.abs(done.low_res - wanted["lr_normalised"]).max() <= 2e-6  # found: 2.4e-7
        assert np.abs(done.hr - wanted["hr_normalised"]).max() <= 1e-6  # found: 1.2e-7
        assert np.abs(done.interpolated - wanted["interpolated"]).max() <= 2e-6  # found: 3e-7


def test_fractional_resolutions_are_rounded_by_sitk(sitk):
    rng = np.random.default_rng(3)
    image, label = rng.random((16, 16, 29)).astype(np.float32) + 0.1, np.ones((16, 16, 29), np.uint8)
    sample = Sample("a", "Train", image, label, None, np.eye(4), (1.0, 1.0, 1.0))
    degradation = Degradation(((1, 1, 2.6),), geometry="segsrgan", interp="sitk", interpolation_type="Linear")
    resident = make_resident(sample, degradation, Draw((1, 1, 2.6)), PatchRule(8, 8), torch.device("cpu"))
    assert resident.hr.shape == resident.interpolated.shape == resident.label.shape == (16, 16, 28)
    whole = degrade(image, (1, 1, 1), (1, 1, 2.6), geometry="segsrgan", interp="sitk", interpolation_type="Linear")
    assert whole.low_res.shape == (16, 16, 10) and whole.interpolated.shape == (16, 16, 30)  # steps of 3


@pytest.mark.parametrize(("slices", "mm"), [(29, 2.7), (28, 2.7), (203, 6.0), (31, 1.3)])
def test_sizes_that_the_originals_zoom_changes_are_cut_to_what_all_arrays_share(slices, mm):
    """A known complaint about the original: at some ratios its interpolated volume is larger than the truth."""
    image = np.random.default_rng(3).random((12, 12, slices)).astype(np.float32) + 0.1
    sample = Sample("a", "Train", image, np.ones(image.shape, np.uint8), None, np.eye(4), (1.0, 1.0, 1.0))
    degradation = Degradation(((1, 1, mm),), geometry="segsrgan")
    resident = make_resident(sample, degradation, Draw((1, 1, mm)), PatchRule(8, 8), torch.device("cpu"))
    whole = degrade(image, (1, 1, 1), (1, 1, mm), geometry="segsrgan")
    shared = min(whole.hr.shape[2], whole.interpolated.shape[2])
    for array in (resident.hr, resident.interpolated, resident.label):
        assert array.shape == (12, 12, shared)
    assert np.array_equal(resident.hr.numpy(), whole.hr[..., :shared])


def test_the_originals_patches_are_among_those_of_training(golden):
    """What `create_patch_from_df_hr` wrote for case 0; fastsrgan also reaches the upper border, which it left out."""
    folder = golden / "degradation"
    setting = json.loads((folder / "meta.json").read_text(encoding="utf8"))[3]["patches"]
    hr, label = images.load(folder / setting["hr"]), images.load_label(folder / "label_spacing_1.nii.gz")
    sample = Sample("a", "Train", hr.data, label.data, None, np.eye(4), (1.0, 1.0, 1.0))
    resolution = tuple(setting["new_low_res"])
    degradation = Degradation((resolution,), geometry="segsrgan")
    rule = PatchRule(setting["patch"], setting["stride"])
    resident = make_resident(sample, degradation, Draw(resolution), rule, torch.device("cpu"))
    batch = Pool([resident], setting["patch"]).gather(np.arange(len(resident.origins)))
    ours = torch.cat([batch.x.mean((2, 3, 4)), batch.x[:, :, 0, 0, 0], batch.y.mean((2, 3, 4))], dim=1).numpy()
    with np.load(folder / "patches.npz") as wanted:
        theirs = np.column_stack([wanted["data_mean"], wanted["data_first_voxel"], wanted["label_mean"]])
        assert (wanted["res_channel"] == resident.resolution).all()
    distance = np.abs(theirs[:, None] - ours[None]).max(2)
    assert (distance.min(1) <= 1e-6).all() and len(set(distance.argmin(1))) == len(theirs)  # found: 2.4e-7


def test_a_ratio_is_rounded_to_the_nearest_whole_factor():
    pairs = ((3.0, 1.01), (3.0, 0.99), (1.0, 1.4), (1.0, 0.6), (2.5, 1.0), (3.5, 1.0))
    assert [resample_sitk.whole_factor(*pair) for pair in pairs] == [3, 3, 1, 2, 2, 4]  # halves as Python rounds them


def test_settings_know_the_same_interpolators_and_where_they_exist():
    assert set(config.CHOICES["interpolation_type"]) == set(resample_sitk.INTERPOLATORS)
    assert all(name in theirs for name, theirs in resample_sitk.INTERPOLATORS.items())  # each is that of its name
    resolution = {"new_low_res": ((1, 1, 3),)}
    assert config.TrainConfig(**resolution, interp="sitk", geometry="segsrgan").interpolation_type == "Spline"
    with pytest.raises(ModelError, match="segsrgan"):
        config.TrainConfig(**resolution, interp="sitk")
    with pytest.raises(UsageError, match="--geometry segsrgan"):
        Degradation(((1, 1, 3),), interp="sitk")
    with pytest.raises(ModelError, match="interpolation_type"):
        config.TrainConfig(**resolution, interpolation_type="Cubic")


# --- a finding about the original ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["cond", "u_net_cond", "u_net_cond_nn_residual"])
def test_the_resolution_input_of_a_conditional_generator_has_no_effect(golden, variant):
    """A constant channel stays constant through reflection and a convolution without bias, and the instance norm that
    follows takes every channel's mean away. The critic has neither and does see the resolution."""
    generator = weights.load_generator(golden / f"weights_{variant}.h5").double()
    x = torch.rand(1, 1, 16, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fine, coarse = generator(x, 0.5), generator(x, 6.0)
    assert (fine - coarse).abs().max() <= 1e-9 and fine.std() > 0.01  # found: 0 (rounding), 0.48
    if variant != "u_net_cond":  # its file holds no critic
        critic = weights.load_critic(golden / f"weights_{variant}.h5")
        y = torch.rand(1, 2, 64, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert (critic(y, 0.5) - critic(y, 6.0)).abs().max() > 1e-3  # found: 0.36


def test_the_networks_own_result_is_asked_for_and_written_in_the_world_of_the_scan(monkeypatch, tmp_path):
    """Without agreement, which the original does not know, in any geometry; each array under its own name."""
    asked = []
    monkeypatch.setattr(compat, "infer_volume", lambda *args, **more: asked.append(more))
    image = Volume(np.ones((4, 5, 6), np.float32), np.diag([1.0, 1, 2, 1]), (), {"space_code": 4})
    for by_batch in (False, True, None):
        compat.apply(image, None, by_batch=by_batch, label="x", geometry="physical")
    assert [(more["agree"], more["batch"]) for more in asked] == [("off", 1), ("off", "auto"), ("off", "auto")]
    some = np.random.default_rng(0).random((4, 3, 4, 5), np.float32)
    result = InferResult(some[0], some[1:], np.eye(4), {})
    outputs = {kind: tmp_path / f"{kind}.nii.gz" for kind in ("SR", "Cortex", "Mask")}
    compat.write(outputs, result, image)
    found = {kind: images.load(path, dtype=np.float64) for kind, path in outputs.items()}
    assert {kind: volume.meta["space_code"] for kind, volume in found.items()} == dict.fromkeys(outputs, 4)
    assert [volume.meta["stored_dtype"] for volume in found.values()] == ["float32", "float64", "float64"]
    expected = {"SR": some[0], "Cortex": some[1], "Mask": some[2:].argmax(0)}
    assert all(np.array_equal(found[kind].data, expected[kind]) for kind in found)


def test_every_setting_reaches_the_engine(monkeypatch, scan, identity, tmp_path):
    asked = []

    def infer(data, affine, generator, **settings):
        asked.append(settings)
        return InferResult(data, data[None], affine, {})

    monkeypatch.setattr(compat, "infer_volume", infer)
    segment(scan, identity, tmp_path, step=4, geometry="physical", precision="bf16", by_batch=True, progress="p")
    (found,) = asked
    assert found == {
        "batch": "auto", "agree": "off", "label": "scan.nii.gz", "patch": 16, "step": 4, "geometry": "physical",
        "new_resolution": (0.5, 0.6, 1.0), "interpolate": None, "device": "cpu", "precision": "bf16", "progress": "p",
    }  # fmt: skip
    defaults = {p.name: p.default for p in inspect.signature(compat.segmentation).parameters.values()}
    assert [defaults[name] for name in ("geometry", "series", "device", "precision", "interpolation_type")] == [
        "segsrgan", None, "auto", "fp32", "Spline",
    ]  # fmt: skip


def test_zoomed_and_expanded_say_the_size_of_voxels_that_comes_out():
    data = np.random.default_rng(0).random((4, 5, 6))
    made, mm = compat.zoomed(data, (1.0, 1.0, 3.0), (0.5, 1.0, 1.0), 1)
    assert made.shape == (8, 5, 18) and made.dtype == np.float32 and mm == (0.5, 1.0, 1.0)
    made, mm = compat.expanded(data, (1.0, 1.0, 3.0), (0.6, 1.0, 1.0), "Linear")
    assert made.shape == (8, 5, 18) and mm == (0.5, 1.0, 1.0)
    for order, fine in ((0, True), (5, True), (6, False), (-1, False)):
        if fine:
            assert callable(compat.interpolation("scipy", "Spline", order))
        else:
            with pytest.raises(UsageError, match="0 to 5"):
                compat.interpolation("scipy", "Spline", order)
    assert compat.interpolation("scipy") is None is compat.interpolation("scipy", "Spline", 3, "physical")


def test_an_unusable_image_is_named_by_its_path(monkeypatch):
    def bad(*_, **__):
        raise InputError("data", "is odd", "mend it")

    monkeypatch.setattr(compat, "infer_volume", bad)
    image = Volume(np.ones((4, 5, 6), np.float32), np.eye(4), (), {"path": "/a.nii"})
    with pytest.raises(InputError, match=r"/a\.nii: is odd \(mend it\)"):
        compat.apply(image, None, by_batch=None, label="x")
    with pytest.raises(InputError, match=r"^x: is odd"):
        compat.apply(Volume(image.data, image.affine), None, by_batch=None, label="x")
