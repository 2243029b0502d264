"""DICOM series made by pydicom: their place in the world as dcm2niix gives it, choices, and what is refused."""

import gzip
import json
import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="needs the extra dicom")

import dicom_files
from dicom_files import generate_uid, read, scanner_affine, volume, write_enhanced, write_series

from fastsrgan.cli import main as cli
from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.io import any_image, dicom
from fastsrgan.io import nifti as images
from fastsrgan.io.image_list import find_images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.volume.geometry import spacing_of

RECORDED = json.loads(dicom_files.GOLDEN.read_text(encoding="utf8"))


def world_values(data, affine) -> dict:
    """World position of every voxel, to a tenth of a millimetre -> its value."""
    points = np.moveaxis(np.indices(data.shape), 0, -1).reshape(-1, 3) @ affine[:3, :3].T + affine[:3, 3]
    return dict(zip(map(tuple, np.round(points, 1) + 0.0), data.ravel().tolist(), strict=True))


# --- geometry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dicom_files.cases())
def test_affine_and_voxels_are_those_of_dcm2niix(tmp_path, name):
    """Recorded from dcm2niix on the same series (`python tests/dicom_files.py DCM2NIIX` records anew)."""
    image = dicom.load(dicom_files.write_case(tmp_path, name))
    wanted = RECORDED[name]
    assert np.array_equal(image.data, wanted["data"])
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.data.shape], [1])).reshape(4, -1)
    # Found: 4.3e-6
    assert np.abs((image.affine - np.array(wanted["affine"])) @ corners).max() < 1e-4  # mm; headers are decimal text


@pytest.mark.parametrize("plane", dicom_files.PLANES)
def test_every_voxel_lies_where_the_scanner_put_it(tmp_path, plane):
    affine = scanner_affine(plane)
    write_series(tmp_path, volume(), affine, order=[3, 0, 5, 1, 4, 2])
    image = dicom.load(tmp_path)
    assert world_values(image.data, image.affine) == world_values(volume(), affine)
    assert image.spacing == pytest.approx((1.0, 1.25, 3.0))
    assert np.linalg.det(image.affine) < 0  # dcm2niix's storage order, whatever the order of files


def test_an_oblique_position_is_the_headers_own(tmp_path):
    """Image Position (Patient) is the centre of the first pixel of the first row, in LPS."""
    affine = scanner_affine("coronal", turn=dicom_files.SLANT)
    path = write_series(tmp_path, volume(), affine)[2]
    image, ds = dicom.load(tmp_path), read(path)
    assert image.data[0, ds.Rows - 1, 2] == ds.pixel_array[0, 0]
    place = (image.affine @ [0, ds.Rows - 1, 2, 1])[:3]
    assert place == pytest.approx(np.array(ds.ImagePositionPatient, float) * [-1, -1, 1], abs=2e-10)  # found: 6e-11


def test_a_written_result_keeps_the_place(tmp_path):
    write_series(tmp_path / "in", volume(), scanner_affine("sagittal", turn=dicom_files.SLANT))
    image = dicom.load(tmp_path / "in")
    again = images.load(images.save(tmp_path / "out.nii.gz", image.data, image.affine))
    # Found: 5.3e-7
    assert np.allclose(again.affine, image.affine, atol=2e-6) and np.array_equal(again.data, image.data)


def test_enhanced_multi_frame_has_its_own_frames_and_scaling(tmp_path):
    path = write_enhanced(tmp_path / "e.dcm", volume(), scanner_affine("axial"), order=[5, 3, 1, 0, 2, 4])
    for source in (path, tmp_path):
        image = dicom.load(source)
        doubled = volume() * 2.0 + 5
        assert world_values(image.data, image.affine) == world_values(doubled, scanner_affine("axial"))


def test_frames_without_a_place_are_refused(tmp_path):
    def drop(ds):
        del ds.PerFrameFunctionalGroupsSequence

    write_enhanced(tmp_path / "e.dcm", volume(), scanner_affine(), change=drop)
    refused(tmp_path, "6 frames and places for 0")


# --- intensities --------------------------------------------------------------------------------------------------


def test_slope_and_intercept_are_those_of_each_slice(tmp_path):
    data = volume((6, 5, 4))
    scale = [(1, 0), (0.5, 3), (2, -10), (1.25, 0.5)]
    write_series(tmp_path, data, scanner_affine("axial"), scale=scale)
    image = dicom.load(tmp_path)
    wanted = np.stack([data[:, ::-1, k] * s + i for k, (s, i) in enumerate(scale)], axis=2)
    assert np.allclose(image.data, wanted) and image.data.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_signed_and_unsigned_pixels(tmp_path, dtype):
    data = volume((6, 5, 4)).astype(dtype)
    data[0, 0, 0] = 65000 if dtype == np.uint16 else -7
    write_series(tmp_path, data, scanner_affine("axial"))
    image = dicom.load(tmp_path)
    assert image.meta["stored_dtype"] == np.dtype(dtype).name and image.data[0, -1, 0] == data[0, 0, 0]
    assert bool(image.warnings) == (dtype == np.int16)  # negative intensities are told


def test_run_length_compression_is_read(tmp_path):
    from pydicom.uid import RLELossless

    paths = write_series(tmp_path, volume(), scanner_affine("axial"))
    before = dicom.load(tmp_path).data
    for path in paths:
        ds = read(path)
        ds.compress(RLELossless, generate_instance_uid=False)
        ds.save_as(path)
    assert np.array_equal(dicom.load(tmp_path).data, before)


# --- which series, which volume -----------------------------------------------------------------------------------


def test_of_several_series_one_is_chosen(tmp_path):
    data, affine = volume(), scanner_affine("axial")
    write_series(tmp_path / "a", data, affine, number=3, description="T2 TSE", uid="1.2.3.30")
    write_series(tmp_path / "b", data[:, :, :4], affine, number=12, description="T2 localiser")
    with pytest.raises(UsageError, match=r"2 series: 3 'T2 TSE' \(6 images of 11 x 9\); 12 .*--series"):
        dicom.load(tmp_path)
    for choice, slices in (("3", 6), ("12", 4), ("1.2.3.30", 6), ("tse", 6), (" 12 ", 4)):
        assert dicom.load(tmp_path, series=choice).data.shape[2] == slices
    with pytest.raises(UsageError, match="none of 3 'T2 TSE'"):
        dicom.load(tmp_path, series="4")
    with pytest.raises(UsageError, match="fits 2 series"):
        dicom.load(tmp_path, series="T2")


def test_a_slice_stands_for_its_series_in_its_folder(tmp_path):
    data, affine = volume(), scanner_affine("axial")
    write_series(tmp_path, data, affine, number=1, prefix="A")
    paths = write_series(tmp_path, data[:, :, :4], affine, number=2, prefix="B")
    assert dicom.load(paths[1]).data.shape == (11, 9, 4)


def test_other_files_and_pictures_do_not_disturb(tmp_path):
    data, affine = volume(), scanner_affine("axial")
    write_series(tmp_path / "deep" / "er", data, affine)
    (tmp_path / "notes.txt").write_text("no DICOM", encoding="utf8")
    (tmp_path / "deep" / "empty").write_bytes(b"")

    def colour(ds, k):
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.PixelData = ds.PixelData * 3

    def screen(ds, k):
        del ds.ImagePositionPatient, ds.ImageOrientationPatient

    write_series(tmp_path / "shots", data[:, :, :2], affine, number=90, change=colour)
    write_series(tmp_path / "screens", data[:, :, :2], affine, number=91, change=screen)
    assert dicom.load(tmp_path).data.shape == (11, 9, 6)
    refused(tmp_path / "screens", "ImagePositionPatient")


@pytest.mark.parametrize("trait", ["EchoTime", "TemporalPositionIdentifier", "AcquisitionNumber"])
def test_a_series_of_several_volumes_needs_a_choice(tmp_path, trait):
    affine, uid = scanner_affine("axial"), "1.2.3.77"
    for t in range(3):
        data = volume() + 1000 * t

        def mark(ds, k, t=t):
            setattr(ds, trait, t + 1)

        write_series(tmp_path, data, affine, uid=uid, prefix=f"V{t}_", first=1 + 6 * t, change=mark)
    with pytest.raises(InputError, match=r"3 volumes.*--volume, 0 to 2"):
        dicom.load(tmp_path)
    for t in range(3):
        image = dicom.load(tmp_path, volume=t)
        assert np.array_equal(image.data, (volume() + 1000 * t)[:, ::-1]) and image.meta["volumes"] == 3
    with pytest.raises(InputError, match="there is no volume 3"):
        dicom.load(tmp_path, volume=3)


def test_enhanced_with_several_volumes(tmp_path):
    data = np.stack([volume(), volume() + 1000], axis=3)
    path = write_enhanced(tmp_path / "e.dcm", data, scanner_affine("axial"))
    assert np.array_equal(dicom.load(path, volume=1).data, 2.0 * (volume() + 1000)[:, ::-1] + 5)


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(folder, match, **settings):
    with pytest.raises(InputError, match=match):
        dicom.load(folder, **settings)


def leave_out(*numbers):
    return lambda ds, k: k not in numbers


def test_missing_slices_are_refused(tmp_path):
    write_series(tmp_path, volume((6, 5, 9)), scanner_affine("axial"), change=leave_out(4, 5))
    refused(tmp_path, "slices are missing: 2 between")


def test_uneven_slices_are_refused(tmp_path):
    def push(ds, k):
        if k == 3:
            x, y, z = ds.ImagePositionPatient
            ds.ImagePositionPatient = [x, y, float(z) + 0.4]

    write_series(tmp_path, volume(), scanner_affine("axial"), change=push)
    refused(tmp_path, "unevenly spaced: 2.6 to 3.4 mm")


def test_copies_of_images_are_left_out_with_a_warning(tmp_path):
    """The same SOPInstanceUID and voxels: one slice, or the whole study exported twice."""
    paths = write_series(tmp_path / "a", volume(), scanner_affine("axial"))
    plain = dicom.load(tmp_path)
    (tmp_path / "copy.dcm").write_bytes(paths[2].read_bytes())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = dicom.load(tmp_path)
    assert np.array_equal(found.data, plain.data) and "7 images are copies" in found.warnings[0]


def test_slices_that_are_there_twice_and_differ_are_refused(tmp_path):
    paths = write_series(tmp_path / "a", volume(), scanner_affine("axial"))
    ds = read(paths[2])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    ds.PixelData = bytes(len(ds.PixelData))
    (tmp_path / "b").mkdir()
    ds.save_as(tmp_path / "b" / "IM0003.dcm")
    refused(tmp_path, r"a slice is there 2 times.*/a/IM0003.dcm, .*/b/IM0003.dcm; 1 of 6 places have 2 images")


def test_localisers_in_one_series_are_refused(tmp_path):
    for plane in dicom_files.PLANES:
        write_series(tmp_path, volume(), scanner_affine(plane), uid="1.2.3.5", prefix=plane)
    refused(tmp_path, "several orientations")


def test_image_sizes_that_differ_are_refused(tmp_path):
    write_series(tmp_path, volume((11, 9, 3)), scanner_affine("axial"), uid="1.2.3.6")
    shifted = scanner_affine("axial", origin=(-20.0, 31.0, 21.5))
    write_series(tmp_path, volume((9, 9, 3)), shifted, uid="1.2.3.6", prefix="X")
    refused(tmp_path, "several image sizes")


def test_tilted_stacks_are_refused(tmp_path):
    affine = scanner_affine("axial")
    affine[1, 2] = 0.3
    write_series(tmp_path, volume(), affine)
    for path in tmp_path.iterdir():  # the orientation stays that of the pixels, the positions drift
        ds = read(path)
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.save_as(path)
    refused(tmp_path, "sideways .5.7 degrees, gantry tilt")


def test_what_cannot_be_placed_or_decoded_is_refused(tmp_path):
    def no_position(ds, k):
        del ds.ImagePositionPatient

    def mosaic(ds, k):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]

    def skewed(ds, k):
        ds.ImageOrientationPatient = [1, 0, 0, 0.5, 0.5, 0]

    def without_directions(ds, k):
        ds.ImageOrientationPatient = [0] * 6

    def one_direction(ds, k):
        ds.ImageOrientationPatient = [1, 0, 0, 1, 0, 0]

    def no_size(ds, k):
        ds.PixelSpacing = [0, 1]

    for name, change, told in (
        ("position", no_position, "ImagePositionPatient"),
        ("mosaic", mosaic, "mosaic"),
        ("skew", skewed, r"ImageOrientationPatient \(1, 0, 0, 0.5, 0.5, 0\) is impossible"),
        ("zeros", without_directions, r"ImageOrientationPatient \(0, 0, 0, 0, 0, 0\) is impossible"),
        ("parallel", one_direction, r"ImageOrientationPatient \(1, 0, 0, 1, 0, 0\) is impossible"),
        ("size", no_size, r"PixelSpacing \(0, 1\) is impossible"),
    ):
        write_series(tmp_path / name, volume(), scanner_affine("axial"), change=change)
        refused(tmp_path / name, told)


def test_single_slices_need_a_thickness(tmp_path):
    def thin(ds, k):
        del ds.SliceThickness, ds.SpacingBetweenSlices

    write_series(tmp_path / "a", volume((6, 5, 1)), scanner_affine("axial"))
    assert spacing_of(dicom.load(tmp_path / "a").affine) == pytest.approx((1.0, 1.25, 3.0))
    write_series(tmp_path / "b", volume((6, 5, 1)), scanner_affine("axial"), change=thin)
    refused(tmp_path / "b", "without a thickness")


def test_a_single_slice_is_as_far_from_the_next_as_it_says_and_not_as_thick(tmp_path):
    def apart(ds, k):
        ds.SpacingBetweenSlices, ds.SliceThickness = 5.0, 3.0

    def thick(ds, k):
        ds.SliceThickness = 3.0
        del ds.SpacingBetweenSlices

    for name, change, wanted in (("a", apart, 5.0), ("b", thick, 3.0)):
        write_series(tmp_path / name, volume((6, 5, 1)), scanner_affine("axial"), change=change)
        assert spacing_of(dicom.load(tmp_path / name).affine) == pytest.approx((1.0, 1.25, wanted))


@pytest.mark.parametrize("slices", [1, 6])
def test_the_sign_of_a_distance_of_slices_says_nothing(tmp_path, slices):
    def backwards(ds, k):
        ds.SpacingBetweenSlices = -3.0

    write_series(tmp_path / "a", volume((6, 5, slices)), scanner_affine("axial"))
    write_series(tmp_path / "b", volume((6, 5, slices)), scanner_affine("axial"), change=backwards)
    plain, found = dicom.load(tmp_path / "a"), dicom.load(tmp_path / "b")
    assert np.array_equal(found.affine, plain.affine) and np.array_equal(found.data, plain.data)
    assert found.warnings == plain.warnings


@pytest.mark.parametrize("keep", [200, 700, -20])
def test_truncated_files_are_refused(tmp_path, keep):
    path = write_series(tmp_path, volume(), scanner_affine("axial"))[1]
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, r"damaged|decoded|no usable|missing|truncated|no number")


def test_folders_without_images_and_paths_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no image .*DICOM slices, or of NIfTI")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "scan.mgz").write_bytes(b"not read")
    refused(tmp_path / "others", "holds no DICOM image .*name image files themselves")
    refused(tmp_path / "none.dcm", "no such file")
    (tmp_path / "text.dcm").write_text("no", encoding="utf8")
    refused(tmp_path / "text.dcm", "holds no DICOM image")


def test_too_many_voxels_are_refused(tmp_path):
    write_series(tmp_path, volume(), scanner_affine("axial"))
    refused(tmp_path, "more than the limit of 500", max_voxels=500)


def test_doubts_are_warnings(tmp_path):
    def doubtful(ds, k):
        ds.SpacingBetweenSlices, ds.ImagesInAcquisition = 3.3, 20

    write_series(tmp_path, volume(), scanner_affine("axial"), change=doubtful)
    warnings = dicom.load(tmp_path).warnings
    assert "3 mm apart, their header says 3.3 mm" in warnings[0] and "20 images, 6 are here" in warnings[1]
    write_series(tmp_path / "large", volume(), scanner_affine("axial", spacing=(60.0, 60.0, 80.0)))
    assert any(
        "60 x 60 x 80 mm is unusual: check the units" in text for text in dicom.load(tmp_path / "large").warnings
    )


def test_odd_intensities_are_warnings(tmp_path):
    """Both were passed over in silence."""

    def odd(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept, ds.PhotometricInterpretation = 0, 0, "MONOCHROME1"

    write_series(tmp_path / "odd", volume(), scanner_affine("axial"), change=odd)
    write_series(tmp_path / "plain", volume(), scanner_affine("axial"))
    plain, found = dicom.load(tmp_path / "plain"), dicom.load(tmp_path / "odd")
    assert plain.warnings == () and (found.data == plain.data).all()
    assert "RescaleSlope is 0" in found.warnings[0] and "MONOCHROME1" in found.warnings[1] and len(found.warnings) == 2


def test_a_series_of_colour_pictures_is_named_as_one(tmp_path):
    def coloured(ds, k):
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.PixelData = ds.PixelData * 3

    write_series(tmp_path, volume(), scanner_affine("axial"), change=coloured)
    (tmp_path / "a.txt").write_text("no image", encoding="utf8")
    refused(tmp_path, "only colour pictures as IM0001.dcm")


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    write_series(tmp_path, volume(), scanner_affine("axial"))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ResourceError, match=r"pip install 'fastsrgan\[dicom\]'"):
        dicom.load(tmp_path)


# --- series are judged one by one ---------------------------------------------------------------------------------


def test_two_examinations_with_one_number_are_told_apart(tmp_path):
    for name in "ab":
        write_series(tmp_path / name, volume(), scanner_affine("axial"), number=5, uid=f"1.2.3.{ord(name)}")
    for series in (None, "5"):
        with pytest.raises(UsageError) as error:
            dicom.load(tmp_path, series=series)
        for name in "ab":
            assert f"in {name}, patient secret-id, of 20200101, UID 1.2.3.{ord(name)}" in error.value.reason
        assert f"{tmp_path / 'a'} {tmp_path / 'b'}" in error.value.hint
    assert dicom.load(tmp_path, series="1.2.3.98").meta["series_uid"] == "1.2.3.98"
    assert "secret-id" not in str(dicom.load(tmp_path, series="1.2.3.98").meta)


def test_one_uid_with_two_numbers_is_two_series(tmp_path):
    for number in (4, 401):
        write_series(
            tmp_path, volume() + number, scanner_affine("axial"), number=number, uid="1.2.3", prefix=f"{number}_"
        )
    for number in (4, 401):
        assert np.array_equal(dicom.load(tmp_path, series=str(number)).data, (volume() + number)[:, ::-1])


def comma(path):
    path.write_bytes(path.read_bytes().replace(b"3.0 ", b"3,0 "))


def cut_header(path):
    path.write_bytes(path.read_bytes()[:700])


def cut_pixels(path):
    path.write_bytes(path.read_bytes()[:-30])


def mosaic(path):
    ds = read(path)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "VFRAME"]
    ds.save_as(path)


def frames_without_places(path):
    ds = read(path)
    ds.NumberOfFrames, ds.PixelData = 3, ds.PixelData * 3
    ds.save_as(path)


def segmentation(path):
    ds = read(path)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.4"
    ds.save_as(path)


@pytest.mark.parametrize("damage", (comma, cut_header, cut_pixels, mosaic, frames_without_places, segmentation))
def test_what_is_wrong_with_another_series_is_no_fault_of_the_wanted_one(tmp_path, damage):
    write_series(tmp_path, volume(), scanner_affine("axial"), number=5)
    others = write_series(tmp_path, volume(), scanner_affine("axial"), number=6, prefix="Z")
    for path in others if damage in (mosaic, segmentation) else others[:1]:
        damage(path)
    assert np.array_equal(dicom.load(tmp_path, series="5").data, volume()[:, ::-1])
    if damage in (mosaic, frames_without_places):  # and the odd one, when it is asked for, says what is wrong with it
        refused(tmp_path, "mosaic of slices|has 3 frames", series="6")


def cut_behind_the_number(path):
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(b"\x20\x00\x13\x00") + 4])  # in front of InstanceNumber's value


@pytest.mark.parametrize("damage", (comma, cut_behind_the_number))
def test_another_series_of_which_nothing_can_be_read_is_a_warning(tmp_path, damage):
    write_series(tmp_path, volume(), scanner_affine("axial"), number=5)
    for path in write_series(tmp_path, volume(), scanner_affine("axial"), number=6, prefix="Z"):
        damage(path)
    found = dicom.load(tmp_path)
    assert found.data.shape == (11, 9, 6) and sum("of another series" in text for text in found.warnings) == 6


@pytest.mark.parametrize("keep", range(520, 1000, 40))
def test_a_file_cut_anywhere_in_its_header_is_never_lost(tmp_path, keep):
    """What is left of a UID may be the beginning of any."""
    paths = write_series(tmp_path, volume((6, 5, 4)), scanner_affine("axial"))
    paths[-1].write_bytes(paths[-1].read_bytes()[:keep])
    refused(tmp_path, paths[-1].name)


@pytest.mark.parametrize("where", (0, 2, -1))
@pytest.mark.parametrize(
    "damage",
    (cut_header, cut_pixels, comma, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(bytes(2600))),
)
def test_a_slice_that_cannot_be_read_is_never_lost(tmp_path, damage, where):
    """At an end of the stack nothing else would show it."""
    paths = write_series(tmp_path, volume(), scanner_affine("axial"))
    damage(paths[where])
    refused(tmp_path, rf"{paths[where].name}")


def test_an_empty_slice_without_an_ending_is_not_lost(tmp_path):
    for k, path in enumerate(write_series(tmp_path, volume(), scanner_affine("axial"))):
        path.rename(tmp_path / f"IM{k}")
    (tmp_path / "README").write_bytes(b"")
    assert dicom.load(tmp_path).data.shape == (11, 9, 6)
    (tmp_path / "IM5").write_bytes(b"")
    refused(tmp_path, "IM5 is empty")


def test_files_without_a_preamble_and_packed_ones(tmp_path):
    for k, path in enumerate(write_series(tmp_path, volume(), scanner_affine("axial"))):
        ds = read(path)
        if k % 2:
            del ds.file_meta
            path.unlink()
            ds.save_as(path.with_suffix(""), implicit_vr=True, little_endian=True, enforce_file_format=False)
        else:
            (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    assert np.array_equal(dicom.load(tmp_path).data, volume()[:, ::-1])


def test_linked_folders_are_followed_once(tmp_path):
    write_series(tmp_path / "store" / "s5", volume(), scanner_affine("axial"))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "s5").symlink_to(tmp_path / "store" / "s5")
    (tmp_path / "study" / "again").symlink_to(tmp_path / "study")
    assert dicom.load(tmp_path / "study").data.shape == (11, 9, 6)


# --- volumes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbering", ("volume by volume", "place by place"))
def test_volumes_that_only_their_numbers_tell_apart(tmp_path, numbering):
    for t in range(3):

        def number(ds, k, t=t):
            ds.InstanceNumber = t * 6 + k + 1 if numbering == "volume by volume" else k * 3 + t + 1

        write_series(tmp_path, volume() + 1000 * t, scanner_affine("axial"), uid="1.2", prefix=f"V{t}_", change=number)
    for t in range(3):
        found = dicom.load(tmp_path, volume=t)
        assert np.array_equal(found.data, (volume() + 1000 * t)[:, ::-1]) and found.meta["volume"] == t
        assert any(numbering in text for text in found.warnings)


def test_volumes_that_two_traits_together_tell_apart(tmp_path):
    for t, (b, g) in enumerate(((0, [1, 0, 0]), (1000, [1, 0, 0]), (1000, [0, 1, 0]), (1000, [0, 0, 1]))):

        def weight(ds, k, b=b, g=g):
            ds.DiffusionBValue, ds.DiffusionGradientOrientation = float(b), g
            ds.TriggerTime = 10.0 * k  # of each slice: no help

        settings = {"uid": "1.2", "prefix": f"V{t}_", "first": 1 + 6 * t, "change": weight}
        write_series(tmp_path, volume() + 1000 * t, scanner_affine("axial"), **settings)
    for t in range(4):
        assert np.array_equal(dicom.load(tmp_path, volume=t).data, (volume() + 1000 * t)[:, ::-1])


def test_the_choice_says_which_volume_is_which(tmp_path):
    for t, kind in enumerate("MP"):

        def mark(ds, k, t=t, kind=kind):
            ds.ImageType, ds.EchoTime = ["ORIGINAL", "PRIMARY", kind, "ND"], 5.0 * (t + 1)

        write_series(tmp_path, volume(), scanner_affine("axial"), uid="1.2", prefix=kind, first=1 + 6 * t, change=mark)
    with pytest.raises(InputError, match=r"2 volumes: 0 EchoTime 5.0, ImageType .*\\M\\ND; 1 EchoTime 10.0, .*\\P"):
        dicom.load(tmp_path)


def test_images_that_are_counted_over_all_volumes_are_not_missed(tmp_path):
    for t in range(3):

        def count(ds, k, t=t):
            ds.TemporalPositionIdentifier, ds.ImagesInAcquisition = t + 1, 18

        write_series(tmp_path, volume(), scanner_affine("axial"), uid="1.2", prefix=f"V{t}_", change=count)
    assert dicom.load(tmp_path, volume=0).warnings == ()


@pytest.mark.parametrize(("thick", "told"), ((2.0, "gaps of 1 mm"), (4.5, "an overlap of 1.5 mm"), (3.0, "")))
def test_thickness_and_distance_of_slices(tmp_path, thick, told):
    def set_thickness(ds, k):
        ds.SliceThickness = thick

    write_series(tmp_path, volume(), scanner_affine("axial"), description="T2 TSE", change=set_thickness)
    found = dicom.load(tmp_path)
    assert found.meta["slice_thickness_mm"] == thick and found.meta["slice_distance_mm"] == pytest.approx(3.0)
    assert found.meta["dicom"]["description"] == "T2 TSE" and found.meta["dicom"]["series"] == "1"
    assert told in "".join(found.warnings) and len(found.warnings) == bool(told)


def test_slices_with_scalings_of_their_own_have_no_integer_type(tmp_path):
    scale = [(1, 0)] * 5 + [(3, 0)]
    write_series(tmp_path, volume(), scanner_affine("axial"), scale=scale)
    found = dicom.load(tmp_path)
    assert found.meta["stored_dtype"] == "float32" and found.meta["slope"] == 1
    assert any("scalings of their own" in text for text in found.warnings)


# --- as an input --------------------------------------------------------------------------------------------------


def test_any_image_takes_both_kinds(tmp_path):
    paths = write_series(tmp_path / "T2", volume(), scanner_affine("axial"))
    nifti = images.save(tmp_path / "a.nii.gz", volume(), np.eye(4))
    assert any_image.load_any(nifti).meta["format"] == "NIfTI-1"
    assert any_image.load_any(tmp_path / "T2").meta["format"] == "DICOM"
    assert any_image.stem(nifti) == "a" and any_image.stem(tmp_path / "T2") == "T2"
    assert any_image.stem(f"{tmp_path}/T2/", "4 b") == "T2_series-4_b" and any_image.stem(paths[0]) == "IM0001"
    before = any_image.sha256(tmp_path / "T2")
    assert any_image.sha256(nifti) == images.sha256(nifti) and any_image.sha256(paths[3]) == before
    paths[5].unlink()
    assert any_image.sha256(tmp_path / "T2") != before
    with pytest.raises(UsageError, match="no series"):
        any_image.load_any(nifti, series="1")
    with pytest.raises(InputError, match="no such file"):
        any_image.load_any(tmp_path / "none", series="1")


def test_infer_takes_a_folder(tmp_path, capsys):
    data, affine = volume((12, 10, 6)), scanner_affine("sagittal", spacing=(1.0, 1.0, 2.0), turn=dicom_files.SLANT)
    write_series(tmp_path / "study", data, affine, number=4)
    write_series(tmp_path / "study", data, affine, number=5, prefix="X")
    model = weights.save_generator(tmp_path / "m.safetensors", build_generator(GeneratorSpec(kernel=1), seed=6))
    command = ["infer", str(tmp_path / "study"), "-o", str(tmp_path / "out"), "-w", str(model), "--patch", "16"]
    command += ["--step", "8", "--device", "cpu"]
    assert cli.main(command) == 2 and "--series" in capsys.readouterr().err
    assert cli.main([*command, "--series", "4"]) == 0
    sr = images.load(tmp_path / "out" / "study_series-4_sr.nii.gz")
    record = json.loads((tmp_path / "out" / "study_series-4.json").read_text(encoding="utf8"))
    assert record["input"]["series"] == "4" and "secret" not in json.dumps(record).lower()
    source = dicom.load(tmp_path / "study", series="4")
    centre = [(n - 1) / 2 for n in source.data.shape]
    # Found: 6.8e-7
    assert np.allclose(sr.affine @ [*((n - 1) / 2 for n in sr.data.shape), 1], source.affine @ [*centre, 1], atol=5e-6)
    assert cli.main([*command, "--series", "4", "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("skipped")


def test_what_a_frame_leaves_empty_is_taken_from_what_all_frames_share(tmp_path):
    """An element without a value stands beside the frame: it hides nothing."""

    def emptied(ds):
        for group in ds.PerFrameFunctionalGroupsSequence:
            measures = dicom_files.Dataset()
            measures.PixelSpacing, measures.SliceThickness = None, None
            group.PixelMeasuresSequence = [measures]

    path = write_enhanced(tmp_path / "e.dcm", volume(), scanner_affine("axial"), change=emptied)
    image = dicom.load(path)
    assert np.allclose(spacing_of(image.affine), (1.0, 1.25, 3.0), atol=1e-9)  # found: 0
    assert image.meta["slice_thickness_mm"] == 3.0


def test_files_that_begin_with_their_first_element_are_read(tmp_path):
    """As some archives send them: the meta elements of group 2 without a preamble. Pixels were refused."""
    for path in write_series(tmp_path, volume(), scanner_affine("axial")):
        path.write_bytes(path.read_bytes()[132:])
    assert np.array_equal(dicom.load(tmp_path).data, volume()[:, ::-1])


@pytest.mark.parametrize(
    ("pointer", "way"),
    [
        ("/annex/objects/MD5E-s1--0.dcm\n", "git annex get"),
        ("version https://git-lfs.github.com/spec/v1\n", "lfs pull"),
    ],
)
def test_a_slice_that_was_not_fetched_says_how_to_fetch_it(tmp_path, pointer, way):
    last = write_series(tmp_path, volume(), scanner_affine("axial"))[-1]
    last.write_text(pointer, encoding="utf8")
    with pytest.raises(InputError, match="was not fetched") as caught:
        dicom.load(tmp_path)
    assert way in caught.value.hint and last.name in caught.value.hint


@pytest.mark.parametrize(("written", "read_as"), [("T2\\sag", "T2\\sag"), ("T2\n  sag", "T2 sag")])
def test_a_description_of_odd_signs_is_one_line_of_text(tmp_path, written, read_as):
    """A backslash parts values in DICOM: it was "['T2', 'sag']"."""
    write_series(tmp_path, volume(), scanner_affine("axial"), description=written)
    assert dicom.load(tmp_path).meta["description"] == read_as


def test_a_whole_description_comes_before_a_part_of_one(tmp_path):
    write_series(tmp_path / "a", volume(), scanner_affine("axial"), number=1, description="T2")
    write_series(tmp_path / "b", volume(), scanner_affine("axial"), number=2, description="T2 FLAIR")
    assert dicom.load(tmp_path, series="t2").meta["series"] == "1"
    assert dicom.load(tmp_path, series="flair").meta["series"] == "2"


def test_the_slices_of_a_series_named_one_by_one_are_one_image(tmp_path, caplog):
    """`infer series/*.dcm` made the same result as often as there are slices."""
    paths = write_series(tmp_path / "s", volume(), scanner_affine("axial"))
    other = write_series(tmp_path / "t", volume(), scanner_affine("axial"), prefix="X")
    found = find_images([*paths, other[2]], tmp_path / "out")
    assert [image.path for image in found] == [paths[0], other[2]]
    assert "6 slices are named" in caplog.text


def test_a_name_that_is_a_uid_has_no_ending(tmp_path):
    (path,) = write_series(tmp_path, volume()[:, :, :1], scanner_affine("axial"))
    assert [any_image.stem(path.rename(tmp_path / name)) for name in ["1.2.840.7"]] == ["1.2.840.7"]
    for name in ("a.b.dcm", "a.b.IMA", "a.b.dcm.gz"):
        assert any_image.stem(tmp_path / name) == "a.b"


def test_a_scout_within_the_series_is_named(tmp_path):
    """Was told to choose another --series, where there is one alone."""
    uid = generate_uid()
    write_series(tmp_path, volume(), scanner_affine("axial"), uid=uid)
    write_series(tmp_path, volume()[:, :, :1], scanner_affine("sagittal"), uid=uid, prefix="SCOUT", first=7)
    with pytest.raises(InputError, match="several orientations") as caught:
        dicom.load(tmp_path)
    assert "SCOUT0007.dcm" in caught.value.hint
    next(tmp_path.glob("SCOUT*")).unlink()
    assert dicom.load(tmp_path).data.shape == volume().shape


def test_a_copy_of_a_file_of_many_frames_is_named_once(tmp_path):
    path = write_enhanced(tmp_path / "e.dcm", volume(), scanner_affine("axial"))
    path.with_name("again.dcm").write_bytes(path.read_bytes())
    (told,) = [w for w in dicom.load(tmp_path).warnings if "copies" in w]
    assert told.startswith("6 images") and told.count(".dcm") == 1


def test_a_series_that_is_passed_over_is_named_with_its_fault(tmp_path):
    """A mosaic, and a series with a damaged header, were left out without a word beside one that can be read."""

    def mosaic(ds, k):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]

    data, affine = volume(), scanner_affine()
    write_series(tmp_path / "good", data, affine, number=3)
    write_series(tmp_path / "bold", data, affine, number=5, description="bold", change=mosaic)
    found = dicom.load(tmp_path)
    assert found.meta["series"] == "3"
    assert found.warnings == (
        "series 5 'bold' (6 images of 11 x 9) is left out, its IM0001.dcm is a mosaic of slices (MOSAIC)",
    )
    assert dicom.load(tmp_path, series="3").warnings == ()


def test_the_fault_of_the_file_that_is_named_is_told_first(tmp_path):
    """Another file of the series was named."""

    def unplaced(ds, k):
        if k in (1, 4):
            del ds.ImagePositionPatient

    paths = write_series(tmp_path, volume(), scanner_affine(), change=unplaced)
    for path in (paths[1], paths[4]):
        with pytest.raises(InputError, match=f"{path.name}: has no usable ImagePositionPatient"):
            dicom.load(path)


@pytest.mark.parametrize("digits", [1, 2, 4])
@pytest.mark.parametrize("count", [3, 20, 40])
def test_positions_that_were_rounded_are_a_stack_and_no_gantry_tilt(tmp_path, digits, count):
    """Positions of one digit behind the point were refused as a tilt of 0.08 degrees."""

    def rounded(ds, k):
        ds.ImagePositionPatient = [f"{float(v):.{digits}f}" for v in ds.ImagePositionPatient]

    affine = scanner_affine(turn=dicom_files.SLANT)
    write_series(tmp_path, volume((6, 5, count)), affine, change=rounded)
    found = dicom.load(tmp_path)
    corners = np.array([[0, 0, 0, 1], [0, 0, count - 1, 1], [5, 4, count - 1, 1]]).T
    flipped = np.eye(4)
    flipped[1] = [0, -1, 0, 4]
    apart = np.abs(found.affine @ flipped @ corners - affine @ corners).max()
    assert apart < 0.051  # 0.049 mm measured, half of the last digit
    assert all("sheared" in text for text in found.warnings) and (digits < 2 or not found.warnings)


def test_a_tilt_beyond_any_rounding_is_refused_at_one_digit_too(tmp_path):
    def shifted(ds, k):
        ds.ImagePositionPatient = [
            f"{float(v) + 0.1 * k * (n == 0):.1f}" for n, v in enumerate(ds.ImagePositionPatient)
        ]

    write_series(tmp_path, volume((6, 5, 20)), scanner_affine(turn=dicom_files.SLANT), change=shifted)
    with pytest.raises(InputError, match="gantry tilt"):
        dicom.load(tmp_path)


def test_a_multi_frame_file_cut_off_anywhere_is_one_line_and_other_series_are_read(tmp_path):
    """Wherever it ends before its pixels it is called cut off or damaged, never a series of its own."""
    whole = write_enhanced(tmp_path / "whole.dcm", volume(), scanner_affine()).read_bytes()
    write_series(tmp_path / "two" / "other", volume(), scanner_affine(), number=7)
    cut = tmp_path / "two" / "cut.dcm"
    pixels = whole.index(b"\xe0\x7f\x10\x00")
    for end in (1, 131, 160, 170, 700, 900, 1300, *range(pixels - 130, pixels, 13)):
        cut.write_bytes(whole[:end])
        refused(cut, "is (cut off within its header|damaged)")
        found = dicom.load(tmp_path / "two", series="7")
        assert np.array_equal(np.sort(found.data, axis=None), np.sort(volume(), axis=None))
        assert len(found.warnings) == 1 and str(cut) in found.warnings[0], end
    cut.write_bytes(bytes(5000))
    refused(tmp_path / "two", "may be a slice of the series.* holds zeros where DICOM begins")
