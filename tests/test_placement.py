"""One grid or two: what rounding makes of headers is accepted by every command, what lies elsewhere is not."""

import nibabel as nib
import numpy as np
import pytest
from nifti_files import rigid
from scipy.spatial.transform import Rotation

from fastsrgan.errors import InputError
from fastsrgan.evaluate.grids import onto_grid
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.placement import (
    describe_grid,
    difference,
    grid_distance,
    orientation_onto,
    refuse_placeless,
    same_grid,
)

SHAPE = (256, 40, 14)
PLACE = rigid(spacing=(1.0, 1.0, 3.0), turn=(0, 0, 0), origin=(-30.0, -30.0, -29.0))


def changed(**entries):
    affine = PLACE.copy()
    for name, value in entries.items():
        affine[int(name[1]), int(name[2])] += value
    return affine


def turned(degrees, about=(0.0, 0.0, 0.0)):
    """Turned about a voxel, as a rounded quaternion turns a grid about its first one."""
    affine, centre = PLACE.copy(), (PLACE @ [*about, 1])[:3]
    affine[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix() @ PLACE[:3, :3]
    affine[:3, 3] += centre - (affine @ [*about, 1])[:3]
    return affine


ROUNDED = {
    "1.000005 mm for 1": changed(a00=5e-6),
    "1e-4 in the cosines": changed(a10=1e-4, a01=-1e-4),
    "origins 3e-4 mm apart": changed(a03=-3.1e-4, a13=1.9e-4),
    "text with two decimals": changed(a03=0.005, a13=-0.005, a23=0.005),
    "a qform tilted by 0.02 degrees": turned(0.02),
    "a qform tilted by 0.1 degrees": turned(0.1),
    "tilted about the middle": turned(0.1, about=(127.5, 19.5, 6.5)),
}
ELSEWHERE = {
    "half a voxel": changed(a03=0.5),
    "a tenth of a voxel": changed(a13=0.1),
    "a slice": changed(a23=3.0),
    "one degree": turned(1.0),
    "a spacing of 1.01": changed(a00=0.01),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_headers_are_one_grid_for_labels_masks_and_scores(tmp_path, name):
    data = np.zeros(SHAPE, np.uint8)
    data[100:150, 10:30, 3:9] = 1
    nib.save(nib.Nifti1Image(data, ROUNDED[name]), tmp_path / "m.nii.gz")
    like = Volume(np.zeros(SHAPE, np.float32), PLACE)
    np.testing.assert_array_equal(images.load_label(tmp_path / "m.nii.gz", like).data, data)
    np.testing.assert_array_equal(any_image.load_mask(tmp_path / "m.nii.gz", like).data, data)
    stored = images.load(tmp_path / "m.nii.gz")
    assert onto_grid(stored, like) is stored


def test_what_is_taken_for_one_grid_and_differs_visibly_is_told(tmp_path):
    label = np.zeros(SHAPE, np.uint8)
    label[1:] = 1
    nib.save(nib.Nifti1Image(label, ROUNDED["a qform tilted by 0.1 degrees"]), tmp_path / "m.nii.gz")
    like = Volume(np.zeros(SHAPE, np.float32), PLACE)
    told = images.load_label(tmp_path / "m.nii.gz", like).warnings
    far = 255 * np.radians(0.1)
    assert any(f"up to {np.hypot(far, 39 * np.radians(0.1)):.3g} mm apart" in text for text in told), told
    for shift, seen in ((0.02, True), (0.005, False)):  # voxels
        nib.save(nib.Nifti1Image(label, changed(a03=shift)), tmp_path / "m.nii.gz")
        assert bool(images.load_label(tmp_path / "m.nii.gz", like).warnings) == seen


def test_where_an_axis_of_one_voxel_points_to_is_nothing():
    """A single slice: its thickness and the tilt of its normal place no voxel. Of two slices they do."""
    other = PLACE.copy()
    other[:3, 2] *= 1.1
    assert difference(other, PLACE, (256, 40, 1)).same and not difference(other, PLACE, (256, 40, 2)).same


@pytest.mark.parametrize("name", ELSEWHERE)
def test_another_place_is_refused_with_the_difference_in_mm(tmp_path, name):
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.uint8), ELSEWHERE[name]), tmp_path / "m.nii.gz")
    like = Volume(np.zeros(SHAPE, np.float32), PLACE)
    apart = difference(images.load(tmp_path / "m.nii.gz").affine, PLACE, SHAPE)
    assert not same_grid(images.load(tmp_path / "m.nii.gz"), like)
    for read, kind in ((images.load_label, "label"), (any_image.load_mask, "mask")):
        with pytest.raises(InputError) as error:
            read(tmp_path / "m.nii.gz", like)
        assert f"up to {apart.largest:.3g} mm apart, most at voxel" in error.value.reason
        assert kind in error.value.reason and "resample" in error.value.hint


@pytest.mark.parametrize(
    "affine", [PLACE[:, [1, 0, 2, 3]], turned(45), np.eye(4)[[1, 2, 0, 3]] @ PLACE], ids=["axes exchanged", "45", "120"]
)
def test_arrays_of_one_shape_are_refused_with_the_difference_in_mm_however_they_are_turned(affine):
    like = Volume(np.zeros(SHAPE, np.float32), PLACE)
    with pytest.raises(InputError) as error:
        orientation_onto(SHAPE, affine, like, "m.nii", "mask")
    assert f"is not the image's, {difference(affine, PLACE, SHAPE)}: mask" in error.value.reason
    with pytest.raises(InputError) as error:  # of another shape there is no voxel for each
        orientation_onto(SHAPE[::-1], affine, like, "m.nii", "mask")
    assert "apart" not in error.value.reason


def test_a_turn_beyond_rounding_is_another_grid_however_small_the_array():
    for radians, same in ((1e-3, True), (4e-3, False)):
        turned = np.eye(4)
        turned[:2, :2] = [[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]]
        apart = difference(turned, np.eye(4), (20, 20, 20))
        assert apart.least == 0 and apart.largest < 0.2 and apart.same is same  # found: 0.11


@pytest.mark.parametrize(("n", "same"), [(256, True), (400, False)])
def test_a_small_turn_is_rounding_until_another_voxel_is_the_nearest(n, same):
    """0.1 degrees about the first voxel: at the other end of 400 voxels they are 0.7 voxels apart."""
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("z", 0.1, degrees=True).as_matrix()
    apart = difference(turned, np.eye(4), (n, 10, 10))
    assert apart.least == 0 and apart.largest == pytest.approx((n - 1) * np.radians(0.1), rel=1e-3)  # found: 6e-4
    assert apart.same is same


def test_a_flipped_copy_that_was_rounded_is_turned_exactly(tmp_path):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 2, SHAPE).astype(np.uint8)
    flip = ROUNDED["1e-4 in the cosines"].copy()
    flip[:3, 3] += flip[:3, 0] * (SHAPE[0] - 1)
    flip[:3, 0] *= -1
    nib.save(nib.Nifti1Image(data[::-1], flip), tmp_path / "m.nii.gz")
    like = Volume(np.zeros(SHAPE, np.float32), PLACE)
    np.testing.assert_array_equal(images.load_label(tmp_path / "m.nii.gz", like).data, data)


def bare(path, data, codes=0, affine=None):
    image = nib.Nifti1Image(data, affine)
    image.header["sform_code"] = image.header["qform_code"] = codes
    image.header["pixdim"][1:4] = 1
    nib.save(image, path)


@pytest.mark.parametrize("kind", ("no form", "identity", "the identity of ITK", "that of radiology"))
def test_a_lost_header_is_copied_not_resampled(tmp_path, kind):
    data = np.ones(SHAPE, np.uint8)
    if kind == "no form":
        bare(tmp_path / "m.nii.gz", data)
    else:
        signs = {"identity": (1.0, 1), "the identity of ITK": (-1.0, -1), "that of radiology": (-1.0, 1)}
        place = np.diag([*signs[kind], 1, 1])
        nib.save(nib.Nifti1Image(data, place), tmp_path / "m.nii.gz")
    like = Volume(np.zeros(SHAPE, np.float32), PLACE)
    for read in (images.load_label, any_image.load_mask):
        with pytest.raises(InputError) as error:
            read(tmp_path / "m.nii.gz", like)
        assert "copy the image's header" in error.value.hint and "do not resample" in error.value.hint
    with pytest.raises(InputError, match="label has the reference's array and no place of its own") as error:
        onto_grid(images.load(tmp_path / "m.nii.gz"), like, order=0, name="label")
    assert "copy the reference's header" in error.value.hint
    with pytest.raises(InputError, match="the reference has the label's array and no place of its own") as error:
        onto_grid(like, images.load(tmp_path / "m.nii.gz"), order=0, name="label")
    assert "copy the label's header" in error.value.hint


def test_an_array_written_in_reverse_order_is_recognised(tmp_path):
    bare(tmp_path / "m.nii.gz", np.ones(SHAPE[::-1], np.uint8))
    with pytest.raises(InputError) as error:
        images.load_label(tmp_path / "m.nii.gz", Volume(np.zeros(SHAPE, np.float32), PLACE))
    assert "transpose it" in error.value.hint


def test_a_reversed_array_under_the_images_header_is_not_only_to_be_resampled():
    """As SimpleITK hands arrays to NumPy: resampled it would be the wrong label."""
    like = Volume(np.zeros(SHAPE, np.float32), PLACE)
    with pytest.raises(InputError) as error:
        orientation_onto(SHAPE[::-1], PLACE, like, "m.nii", "label", "sform")
    assert "with its axes reversed, transpose it, then copy the image's header" in error.value.hint


def test_a_grid_is_described_by_sizes_axes_and_first_voxel():
    affine = np.diag([1.0, 1, 3, 1])
    affine[:3, 3] = -5, -6, -12
    told = "10 x 12 x 8 voxels of 1 x 1 x 3 mm, axes RAS, first voxel at (-5, -6, -12) mm"
    assert describe_grid((10, 12, 8), affine) == told
    turned = affine @ np.array([[0, 0, -1, 9], [1, 0, 0, 0], [0, -1, 0, 7], [0, 0, 0, 1.0]])
    assert describe_grid((12, 8, 10), turned).startswith(
        "12 x 8 x 10 voxels of 1 x 3 x 1 mm, axes AIL, first voxel at (4,"
    )


@pytest.mark.parametrize(
    ("shape", "affine", "orientation", "copies", "resamples"),
    [
        (SHAPE, changed(a03=0.5), "", True, True),
        ((250, 40, 14), PLACE, "", False, True),
        (SHAPE, changed(a03=0.5), "none", True, False),
        (SHAPE, changed(a03=0.5), "pixdim", True, False),
        ((250, 40, 14), PLACE, "none", False, True),
        (SHAPE, changed(a03=0.5), "sform", True, True),
    ],
)
def test_the_way_out_is_a_copied_header_only_for_the_images_own_array(shape, affine, orientation, copies, resamples):
    like = Volume(np.zeros(SHAPE, np.float32), PLACE)
    with pytest.raises(InputError, match="mask's grid is not the image's") as error:
        orientation_onto(shape, affine, like, "m.nii", "mask", orientation)
    assert ("fslcpgeom IMAGE MASK" in error.value.hint) == copies and (
        "resample the mask onto" in error.value.hint
    ) == resamples


@pytest.mark.parametrize("affine", [np.eye(4), PLACE])
def test_an_image_that_lost_its_place_takes_that_of_what_was_drawn_on_it(affine):
    lost = Volume(np.zeros(SHAPE, np.float32), affine, (), {} if affine is not PLACE else {"orientation": "pixdim"})
    with pytest.raises(InputError) as error:
        orientation_onto(SHAPE, changed(a03=5), lost, "m.nii", "label map", "sform")
    assert error.value.hint == (
        "the image has the label map's array and no place of its own: copy the label map's header to it, for example "
        "with fslcpgeom LABEL IMAGE, do not resample"
    )
    with pytest.raises(InputError) as error:
        orientation_onto((250, 40, 14), changed(a03=5), lost, "m.nii", "label map", "sform")
    assert error.value.hint == "resample the label map onto the image with nearest neighbour"


@pytest.mark.parametrize("orientation", ["", "none"])
def test_a_volume_is_refused_for_its_lost_place_where_it_lies_elsewhere_alone(orientation):
    like = Volume(np.zeros((4, 5, 6), np.float32), np.diag([2.0, 2, 2, 1]))
    lost = np.eye(4) if not orientation else np.diag([3.0, 1, 1, 1])
    meta = {"orientation": orientation, "path": "gone.nii"}
    with pytest.raises(
        InputError, match=r"gone\.nii: the SR has the reference's array and no place of its own; .* apart"
    ):
        refuse_placeless(Volume(like.data, lost, (), meta), like, "SR")
    refuse_placeless(Volume(like.data, like.affine, (), meta), like, "SR")
    refuse_placeless(Volume(like.data[1:], lost, (), meta), like, "SR")
    refuse_placeless(Volume(like.data, np.diag([2.0, 2, 2.5, 1]), (), {}), like, "SR")


def test_two_grids_are_one_where_shape_and_place_are():
    like = Volume(np.zeros((4, 5, 6), np.float32), np.eye(4))
    assert same_grid(like, Volume(like.data, np.diag([1.001, 1, 1, 1]))) is True
    assert same_grid(like, Volume(like.data[..., 1:], np.eye(4))) is False
    assert grid_distance(np.eye(4), np.diag([1.1, 1, 1, 1]), (11, 5, 6)) == pytest.approx(1.0)
    apart = difference(np.diag([1.1, 1, 1, 1]), np.eye(4), (11, 5, 6))
    assert apart.voxel[0] == 10 and apart.turn == pytest.approx(0.1) and apart.size == 1 and apart.least == 0


def test_a_mask_is_turned_onto_its_image_like_a_label(tmp_path):
    data = np.random.default_rng(0).integers(0, 3, (5, 4, 3)).astype(np.float32) - 1  # below 0 is outside too
    place = np.diag([-1.0, 1, 2, 1])
    place[0, 3] = 4
    nib.save(nib.Nifti1Image(data[::-1], place), tmp_path / "m.nii")
    like = Volume(np.zeros((5, 4, 3), np.float32), np.diag([1.0, 1, 2, 1]))
    mask = any_image.load_mask(tmp_path / "m.nii", like)
    assert np.array_equal(mask.data, data) and np.array_equal(mask.affine, like.affine)
    assert any("reoriented" in text for text in mask.warnings) and any("negative" in text for text in mask.warnings)
    assert mask.meta["path"] == str(tmp_path / "m.nii")
    nib.save(nib.Nifti1Image(np.minimum(data, 0)[::-1], place), tmp_path / "m.nii")
    with pytest.raises(InputError, match="the mask marks no voxel"):
        any_image.load_mask(tmp_path / "m.nii", like)
    with pytest.raises(InputError, match="limit of 59"):
        any_image.load_mask(tmp_path / "m.nii", like, max_voxels=59)


def test_a_thickness_that_is_not_used_says_why(tmp_path):
    def told(spacing=3.0, **meta):
        volume = Volume(np.ones((2, 2, 2), np.float32), np.diag([1.0, 1, spacing, 1]), (), {"format": "DICOM", **meta})
        return any_image.slice_thickness(volume, "series")

    assert told(slice_thickness_mm=2.5, slice_distance_mm=3.0) == (2.5, "DICOM")
    assert told(slice_thickness_mm=2.5, slice_distance_mm=5.0) == (
        None, "DICOM: slices 5 mm apart, the image's are 3: resampled",
    )  # fmt: skip
    assert told(slice_thickness_mm=7.0) == (None, "DICOM: slices of 7 mm, 3 apart, are not believed")
    assert told() is None
    for odd in (True, "3", 0, -1.0, float("inf"), float("nan")):
        mm, said = told(slice_thickness_mm=odd)
        assert mm is None and said.startswith("DICOM: SliceThickness ") and said.endswith(" is no size in mm")
    (tmp_path / "a.b.json").write_text('{"SliceThickness": 2}')
    volume = Volume(np.ones((2, 2, 2), np.float32), np.diag([1.0, 1, 3, 1]), (), {})
    assert any_image.slice_thickness(volume, tmp_path / "a.b.nii.gz") == (2.0, "a.b.json")
    assert any_image.slice_thickness(volume, tmp_path / "c.nii.gz") is None
