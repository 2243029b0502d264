"""Laws of DICOM series: every ending, class, trait and field counts; tolerances have two sides; no file is lost."""

from __future__ import annotations

import gzip
import logging

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="needs the extra dicom")

from dicom_files import Dataset, read, scanner_affine, volume, write_enhanced, write_series

from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.io import any_image, dicom, dicom_header
from fastsrgan.io.image_list import find_images

SMALL = (3, 2, 4)
ENDINGS = (".dcm", ".ima", ".dicom", ".dcm.gz", ".ima.gz", ".dicom.gz")


def small(folder, data=None, change=None, **settings):
    return write_series(folder, volume(SMALL) if data is None else data, scanner_affine(), change=change, **settings)


def refused(path, match, **settings):
    with pytest.raises(InputError, match=match) as caught:
        dicom.load(path, **settings)
    return caught.value


# --- what is DICOM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_of_every_ending_is_a_slice_and_never_passed_over(tmp_path, ending):
    """Read, packed where the name says so; empty or torn it is lost; its name without the ending is the stem."""
    paths = small(tmp_path)
    last = paths[-1].rename(tmp_path / f"Last{ending.upper() if ending == '.ima' else ending}")
    if ending.endswith(".gz"):
        last.write_bytes(gzip.compress(last.read_bytes()))
    assert dicom.load(tmp_path).data.shape == SMALL and any_image.load_any(last).data.shape == SMALL
    assert any_image.stem(last) == "Last" and dicom.is_dicom(tmp_path / f"none{ending}")
    whole = last.read_bytes()
    for torn in (b"", whole[: len(whole) // 2]):
        last.write_bytes(torn)
        refused(tmp_path, last.name)


def test_a_file_without_an_ending_is_known_by_its_mark_and_others_are_none(tmp_path):
    path = small(tmp_path)[1].rename(tmp_path / "IM2")
    assert any_image.load_any(path).meta["format"] == "DICOM" and any_image.stem(path) == "IM2"
    (tmp_path / "a.txt").write_bytes(bytes(127) + b"DICM")
    assert not dicom.is_dicom(tmp_path / "a.txt") and not dicom.is_dicom(tmp_path / "none")


def test_explicit_elements_without_a_preamble_are_read(tmp_path):
    for path in small(tmp_path):
        ds = read(path)
        del ds.file_meta
        ds.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=False)
    assert np.array_equal(dicom.load(tmp_path).data, volume(SMALL)[:, ::-1])


def test_what_a_packed_file_unpacks_to_has_a_limit(tmp_path, monkeypatch):
    (path,) = small(tmp_path, volume((3, 2, 1)))
    raw = path.read_bytes()
    (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(raw))
    path.unlink()
    for limit, fits in ((len(raw), True), (len(raw) - 1, False)):
        monkeypatch.setattr(dicom_header, "_MOST_UNPACKED", limit)
        if fits:
            dicom.load(tmp_path)
        else:
            with pytest.raises(ResourceError, match="unpacks to more than 4 GiB"):
                dicom.load(tmp_path)


ANY_IMAGE = ("1.1", "2", "2.1", "4", "4.1", "6.1", "7", "7.2", "12.1", "20", "128", "128.1", "130")


@pytest.mark.parametrize(
    ("kind", "lost"), [*((kind, True) for kind in ANY_IMAGE), ("88.11", False), ("66", False), ("11.1", False)]
)
def test_a_header_without_an_image_is_a_lost_slice_where_its_class_is_an_image(tmp_path, kind, lost):
    """CR, CT, MR, US, NM, PET and enhanced ones; a report, raw data and a display state are none."""
    paths = small(tmp_path, volume((3, 2, 3)))
    ds = read(paths[0])
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = f"1.2.840.10008.5.1.4.1.1.{kind}"
    for name in ("Rows", "Columns", "PixelData"):
        delattr(ds, name)
    ds.save_as(tmp_path / "other.dcm")
    if lost:
        refused(tmp_path, "other.dcm is cut off within its header")
    else:
        assert dicom.load(tmp_path).data.shape == (3, 2, 3)


@pytest.mark.parametrize(("kind", "what"), [("66.4", "segmentation"), ("66.7", "segmentation"), ("30", "parametric")])
def test_what_is_no_acquisition_is_refused_as_that_and_disturbs_none(tmp_path, kind, what):
    def made(ds, k):
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = f"1.2.840.10008.5.1.4.1.1.{kind}"

    small(tmp_path / "a", change=made, number=9)
    refused(tmp_path, f"{what}.*not an acquisition")
    small(tmp_path / "b", number=2)
    assert dicom.load(tmp_path).meta["series"] == "2"


@pytest.mark.parametrize("name", ["PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"])
@pytest.mark.parametrize("lost", ["absent", "short"])
def test_every_part_of_the_place_is_needed(tmp_path, name, lost):
    def change(ds, k):
        if lost == "absent":
            delattr(ds, name)
        else:
            setattr(ds, name, list(getattr(ds, name))[:-1])

    small(tmp_path, volume((3, 2, 2)), change=change)
    error = refused(tmp_path, f"has no usable {name}, so no place in the patient")
    assert "dcm2niix" in error.hint


def test_an_unknown_compression_says_what_to_install(tmp_path):
    paths = small(tmp_path)
    ds = read(paths[0])
    from pydicom.encaps import encapsulate

    for path in paths:
        ds = read(path)
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
        ds.PixelData = encapsulate([bytes(20)])
        ds["PixelData"].is_undefined_length = True
        ds.save_as(path)
    error = refused(tmp_path, r"its pixels are compressed \(MPEG2.*\) and no decoder is there")
    assert error.hint.startswith("pip install") and error.exit_code == 3


# --- which series -------------------------------------------------------------------------------------------------


def test_a_number_is_meant_before_a_part_of_a_description(tmp_path):
    for number, text in ((3, "T1"), (4, "T2 3 mm"), (5, "flair 30")):
        small(tmp_path / str(number), number=number, description=text)
    assert dicom.load(tmp_path, series="3").meta["description"] == "T1"
    assert dicom.load(tmp_path, series="FLAIR").meta["series"] == "5"
    for nothing in ("", "  ", "x"):
        with pytest.raises(UsageError, match=r"is none of 3 'T1' .*; 4 .*; 5 "):
            dicom.load(tmp_path, series=nothing)
    with pytest.raises(UsageError, match="holds 3 series") as error:
        dicom.load(tmp_path)
    assert error.value.hint == "choose one with --series NUMBER"


def test_the_one_with_a_place_is_meant_where_two_fit(tmp_path):
    def screen(ds, k):
        del ds.ImagePositionPatient

    small(tmp_path / "a", description="T2 tse", number=1)
    small(tmp_path / "b", description="T2 shot", number=2, change=screen)
    assert dicom.load(tmp_path, series="T2").meta["series"] == "1"
    refused(tmp_path, "ImagePositionPatient", series="2")


def test_a_slice_stands_for_what_lies_beside_it_alone(tmp_path):
    data = volume((3, 2, 6))
    paths = small(tmp_path, data, uid="1.2.9")
    (tmp_path / "below").mkdir()
    for path in paths[4:]:
        path.rename(tmp_path / "below" / path.name)
    assert dicom.load(paths[0]).data.shape[2] == 4 and dicom.load(tmp_path).data.shape[2] == 6


def test_a_series_without_a_number_is_called_so_and_comes_last(tmp_path):
    def unnumbered(ds, k):
        del ds.SeriesNumber

    small(tmp_path / "a", change=unnumbered, description="", uid="1.2.3.1")
    small(tmp_path / "b", number=12, uid="1.2.3.3")
    small(tmp_path / "c", number=7, uid="1.2.3.2")
    with pytest.raises(UsageError, match=r"holds 3 series: 7 'T2' .*; 12 'T2' .*; \? \(4 images of 3 x 2\)"):
        dicom.load(tmp_path)


# --- files that are lost, copied, or none ---------------------------------------------------------------------------


def test_a_named_series_is_read_beside_files_that_say_of_none_which_are_told(tmp_path):
    small(tmp_path, number=5)
    others = small(tmp_path, number=6, prefix="Z")
    for path in others:
        path.write_bytes(b"")
    error = refused(tmp_path, f"cannot be read: {others[0]} is empty.* and 1 more")
    assert "--series 5 leaves out what does not say of which series it is" in error.hint
    told = dicom.load(tmp_path, series="5").warnings
    assert len(told) == 4 and all("left out, it does not say of which series it is" in text for text in told)


@pytest.mark.parametrize("lost", ["SeriesInstanceUID", "SeriesNumber"])
def test_a_slice_that_does_not_say_of_which_series_it_is_is_not_lost_without_a_word(tmp_path, lost):
    """At an end of the stack nothing else would show it; other series of other numbers are no such thing."""
    last = small(tmp_path, number=5)[-1]
    small(tmp_path / "b", number=6)
    ds = read(last)
    uid = ds.SeriesInstanceUID
    delattr(ds, lost)
    ds.save_as(last)
    with pytest.raises(UsageError, match="holds 3 series"):
        dicom.load(tmp_path)
    image = dicom.load(tmp_path, series=uid if lost == "SeriesInstanceUID" else "5")
    assert image.warnings == (f"1 file does not say of which series it is, left out: {last}",)
    assert dicom.load(tmp_path, series="6").warnings == (image.warnings if lost == "SeriesInstanceUID" else ())


def test_a_named_series_is_refused_without_its_own_slice(tmp_path):
    def comma(path):
        path.write_bytes(path.read_bytes().replace(b"3.0 ", b"3,0 "))

    comma(small(tmp_path / "a", number=5)[1])
    small(tmp_path / "b", number=6)
    error = refused(tmp_path, "IM0002.dcm its .* 3,0 is no number", series="5")
    assert "leaves out" not in error.hint
    with pytest.raises(UsageError, match=r"5 'T2' \(3 images of 3 x 2, 1 more cannot be read\); 6"):
        dicom.load(tmp_path)


def test_a_copy_is_told_by_its_voxels_whatever_else_it_says(tmp_path):
    """Of one SOPInstanceUID: exported again with another name it is left out, with other voxels it is another slice."""
    paths = small(tmp_path)
    plain = dicom.load(tmp_path).data
    ds = read(paths[1])
    ds.PatientName = "Another^Name"
    ds.save_as(tmp_path / "again.dcm")
    found = dicom.load(tmp_path)
    assert np.array_equal(found.data, plain) and "1 image is a copy of others" in found.warnings[0]
    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(tmp_path / "again.dcm")
    refused(tmp_path, "a slice is there 2 times")


@pytest.mark.parametrize(("name", "value"), [("RescaleSlope", "2"), ("RescaleIntercept", "-1024")])
def test_the_same_numbers_under_another_scaling_are_no_copy(tmp_path, name, value):
    """They are other intensities, and nothing says which are meant."""
    ds = read(small(tmp_path)[1])
    ds.RescaleSlope, ds.RescaleIntercept = ds.get("RescaleSlope", 1), ds.get("RescaleIntercept", 0)
    setattr(ds, name, value)
    ds.save_as(tmp_path / "again.dcm")
    refused(tmp_path, "a slice is there 2 times")


def test_images_without_an_identity_are_never_copies(tmp_path):
    def nameless(ds, k):
        ds.SOPInstanceUID = ""

    paths = small(tmp_path, change=nameless)
    (tmp_path / "again.dcm").write_bytes(paths[1].read_bytes())
    refused(tmp_path, "a slice is there 2 times")


def test_many_copies_are_counted_and_three_named(tmp_path):
    for path in small(tmp_path):
        (tmp_path / f"x{path.name}").write_bytes(path.read_bytes())
    (told,) = dicom.load(tmp_path).warnings
    assert told.startswith("4 images are copies") and told.endswith(" and 1 more") and told.count(".dcm") == 3


def test_other_files_of_a_folder_are_named(tmp_path, caplog):
    small(tmp_path / "s")
    for name in ("s/a.txt", "b.txt", ".hidden", "c.txt", "d.txt"):
        (tmp_path / name).write_text("no image", encoding="utf8")
    with caplog.at_level(logging.INFO, "fastsrgan"):
        dicom.load(tmp_path)
    assert "4 files are no DICOM images and left out: b.txt, c.txt, d.txt and 1 more" in caplog.text


def test_the_sum_of_a_series_is_that_of_its_own_files(tmp_path):
    paths = small(tmp_path, number=1)
    small(tmp_path, number=2, prefix="Z")
    before = any_image.sha256(tmp_path, "1")
    assert before != any_image.sha256(tmp_path, "2") and before == any_image.sha256(paths[0])
    raw = bytearray(paths[-1].read_bytes())
    raw[-1] ^= 1
    paths[-1].write_bytes(raw)
    assert any_image.sha256(tmp_path, "1") != before


# --- the grid -----------------------------------------------------------------------------------------------------


def moved(axis, mm, slices=(1,)):
    def change(ds, k):
        if k in slices:
            place = [float(v) for v in ds.ImagePositionPatient]
            place[axis] += mm
            ds.ImagePositionPatient = place

    return change


def said(name, value, slices=range(9)):
    def change(ds, k):
        if k in slices:
            setattr(ds, name, value)

    return change


# Slices 3 mm apart: a hundredth of it is allowed, 0.02 mm at least; 0.01 mm in the size of pixels.
SIDES = {
    "uneven": (moved(2, 0.01), moved(2, 0.05), "unevenly spaced"),
    "sideways": (moved(0, 0.025), moved(0, 0.04), "shifted sideways"),
    "pixels": (said("PixelSpacing", [1.255, 1.0], [1]), said("PixelSpacing", [1.28, 1.0], [1]), "several image sizes"),
    "turned": (
        said("ImageOrientationPatient", [1, 0.0005, 0, -0.0005, 1, 0], [2]),
        said("ImageOrientationPatient", [1, 0.002, 0, -0.002, 1, 0], [2]),
        "several orientations",
    ),
    "length": (
        said("ImageOrientationPatient", [1.0004, 0, 0, 0, 1, 0]),
        said("ImageOrientationPatient", [1.001, 0, 0, 0, 1, 0]),
        "ImageOrientationPatient .* is impossible",
    ),
}


@pytest.mark.parametrize("kind", SIDES)
def test_a_grid_may_be_off_by_what_headers_are_rounded_to_and_no_more(tmp_path, kind):
    good, bad, told = SIDES[kind]
    small(tmp_path / "good", change=good)
    assert dicom.load(tmp_path / "good").warnings == ()
    small(tmp_path / "bad", change=bad)
    refused(tmp_path / "bad", told)


@pytest.mark.parametrize(
    ("name", "near", "far", "told"),
    [
        ("SliceThickness", 2.975, 2.96, "the slices are 2.96 mm thick and 3 mm apart, gaps of 0.04 mm"),
        ("SliceThickness", 3.025, 3.04, "the slices are 3.04 mm thick and 3 mm apart, an overlap of 0.04 mm"),
        ("SpacingBetweenSlices", 3.025, 3.04, "the slices are 3 mm apart, their header says 3.04 mm: the positions"),
        ("SpacingBetweenSlices", 2.975, 2.96, "the slices are 3 mm apart, their header says 2.96 mm: the positions"),
        ("ImagesInAcquisition", 3, 5, "the header speaks of 5 images, 4 are here"),
    ],
)
def test_what_a_header_says_of_its_slices_is_compared_with_them(tmp_path, name, near, far, told):
    small(tmp_path / "near", change=said(name, near))
    small(tmp_path / "far", change=said(name, far))
    assert dicom.load(tmp_path / "near").warnings == ()
    (text,) = dicom.load(tmp_path / "far").warnings
    assert text.startswith(told)


def test_where_slices_are_missing_and_how_wide_gaps_are_is_told(tmp_path):
    data = volume((3, 2, 9))
    small(tmp_path / "a", data, change=lambda ds, k: k not in (4, 5))
    # From 12.5 mm on, slices 3 mm apart, along LPS z: 9 mm are between those on both sides.
    refused(tmp_path / "a", "slices are missing: 2 between 21.5 and 30.5 mm along their normal")
    small(tmp_path / "b", data, change=moved(2, -0.9, [6]))
    error = refused(tmp_path / "b", "unevenly spaced: 2.1 to 3.9 mm, the widest between 29.6 and 33.5 mm")
    assert "Eq_1.nii" in error.hint
    small(tmp_path / "c", data, change=moved(0, 2.0, [6]))
    assert "Tilt_1.nii" in refused(tmp_path / "c", "sideways").hint


# --- volumes ------------------------------------------------------------------------------------------------------

TRAITS = {
    "EchoTime": (5.0, 9.0),
    "EchoNumbers": (1, 2),
    "ComplexImageComponent": ("MAGNITUDE", "PHASE"),
    "InversionTime": (100.0, 900.0),
    "EffectiveEchoTime": (5.0, 9.0),
    "TemporalPositionIdentifier": (1, 2),
    "TemporalPositionIndex": (1, 2),
    "DiffusionBValue": (0.0, 1000.0),
    "DiffusionGradientOrientation": ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]),
    "AcquisitionNumber": (1, 2),
    "FrameAcquisitionNumber": (1, 2),
    "TriggerTime": (10.0, 20.0),
    "ImageType": (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]),
    "FrameType": (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]),
}


@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_tells_volumes_apart_whatever_the_order_of_images(tmp_path, trait):
    """No warning: only where nothing else does their numbers tell."""
    data = volume((3, 2, 2))
    for t, value in enumerate(TRAITS[trait]):

        def mark(ds, k, t=t, value=value):
            setattr(ds, trait, value)
            ds.InstanceNumber = (1, 4)[k] + t if k == 0 else (4, 3)[t]  # neither by volume nor by place in order

        small(tmp_path, data + 100 * t, uid="1.2", prefix=f"V{t}_", change=mark)
    for t in range(2):
        found = dicom.load(tmp_path, volume=t)
        assert np.array_equal(found.data, (data + 100 * t)[:, ::-1]) and found.warnings == ()
    refused(tmp_path, rf"holds 2 volumes: 0 {trait} .*; 1 {trait} .*\(infer takes --volume, 0 to 1, .* dcm2niix")


def test_volumes_that_nothing_tells_apart_are_refused_and_numbers_alone_are_said(tmp_path):
    data = volume((3, 2, 3))
    for t in range(2):
        small(tmp_path / "same", data + 100 * t, uid="1.2", prefix=f"V{t}_")
        small(tmp_path / "numbers", data + 100 * t, uid="1.2", prefix=f"V{t}_", first=1 + 3 * t)
    refused(tmp_path / "same", "a slice is there 2 times")
    refused(tmp_path / "numbers", "holds 2 volumes, told apart by the order of their images alone")


def test_one_volume_is_number_0_and_no_other(tmp_path):
    small(tmp_path)
    assert dicom.load(tmp_path, volume=0).meta["volume"] == 0
    for wrong in (1, -1):
        refused(tmp_path, f"holds 1 volume, .*; there is no volume {wrong}", volume=wrong)


def test_many_volumes_are_named_up_to_eight(tmp_path):
    for count, more in ((8, False), (9, True)):
        for t in range(count):
            folder = tmp_path / str(count)
            small(folder, volume((1, 1, 1)), uid="1.2", prefix=f"{t}_", first=t + 1, change=said("EchoTime", t + 1.0))
        reason = refused(tmp_path / str(count), f"{count} volumes: 0 EchoTime 1.0; .*7 EchoTime 8.0").reason
        assert reason.endswith("; ...") == more and "8 EchoTime" not in reason


def frames_of(name, value, sequence, inside=None):
    def change(ds):
        for k, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
            del group.FrameContentSequence
            item = holder = Dataset()
            if inside:
                holder = Dataset()
                setattr(item, inside, [holder])
            setattr(holder, name, value[k // 2])
            setattr(group, sequence, [item])

    return change


@pytest.mark.parametrize(
    ("name", "sequence", "inside"),
    [
        ("TemporalPositionIndex", "FrameContentSequence", None),
        ("FrameAcquisitionNumber", "FrameContentSequence", None),
        ("EffectiveEchoTime", "MREchoSequence", None),
        ("DiffusionBValue", "MRDiffusionSequence", None),
        ("DiffusionGradientOrientation", "MRDiffusionSequence", "DiffusionGradientDirectionSequence"),
        ("FrameType", "MRImageFrameTypeSequence", None),
    ],
)
def test_traits_of_frames_are_found_in_their_groups(tmp_path, name, sequence, inside):
    """InstanceNumber is one for all frames, and their order alone a warning."""
    data = np.stack([volume((3, 2, 2)), volume((3, 2, 2)) + 100], axis=3)
    change = frames_of(name, TRAITS[name], sequence, inside)
    path = write_enhanced(tmp_path / "e.dcm", data, scanner_affine(), change=change)
    found = dicom.load(path, volume=1)
    assert np.array_equal(found.data, 2.0 * data[:, ::-1, :, 1] + 5) and found.warnings == ()


def test_what_a_frame_says_of_itself_comes_before_what_all_share(tmp_path):
    def own(ds):
        for k, group in enumerate(ds.PerFrameFunctionalGroupsSequence):
            item = Dataset()
            item.RescaleSlope, item.RescaleIntercept = k + 3, -1
            group.PixelValueTransformationSequence = [item]
        ds.RescaleSlope = 50

    data = volume((3, 2, 2))
    path = write_enhanced(tmp_path / "e.dcm", data, scanner_affine(), change=own)
    assert np.array_equal(dicom.load(path).data, (data * [3.0, 4.0] - 1)[:, ::-1])


# --- what is told -------------------------------------------------------------------------------------------------


def test_the_facts_of_a_series_are_complete(tmp_path):
    data = volume(SMALL) - 20
    small(tmp_path, data, number=7, description=" T2 TSE ", uid="1.2.3.44", scale=[(2, 1)] * 4)
    image = dicom.load(tmp_path)
    low, high = 2.0 * data.min() + 1, 2.0 * data.max() + 1
    kept = {"series": "7", "description": "T2 TSE", "series_uid": "1.2.3.44", "volume": 0, "volumes": 1}
    kept |= {"slice_thickness_mm": 3.0, "slice_distance_mm": 3.0}
    assert image.meta == {
        "path": str(tmp_path),
        "format": "DICOM",
        "stored_dtype": "int16",
        "stored_shape": SMALL,
        "slope": 2.0,
        "inter": 1.0,
        "units": "mm",
        "orientation": "patient",
        "space_code": 1,
        "nan_count": 0,
        "min": low,
        "max": high,
        **kept,
        "dicom": kept,
    }
    assert image.warnings == (f"intensities are negative, down to {low:g}",)
    assert image.data.flags.f_contiguous and dicom.load(tmp_path, dtype=np.float64).data.dtype == np.float64


def test_the_limit_of_voxels_is_the_last_number_that_is_taken(tmp_path):
    small(tmp_path)
    assert dicom.load(tmp_path, max_voxels=24).data.size == 24 == any_image.load_any(tmp_path, max_voxels=24).data.size
    error = refused(tmp_path, "3 x 2 x 4 voxels are more than the limit of 23", max_voxels=23)
    assert "--max-voxels" in error.hint
    with pytest.raises(InputError, match="more than the limit of 23"):
        any_image.load_any(tmp_path, max_voxels=23)


def test_constant_images_and_scalings_of_single_slices_are_told(tmp_path):
    small(tmp_path / "a", np.full(SMALL, 7, np.int16))
    assert dicom.load(tmp_path / "a").warnings == ("the image is constant: every voxel is 7",)
    small(tmp_path / "b", scale=[(1, 0), (1, 0), (0.5, 0), (2, 0)])
    (told,) = dicom.load(tmp_path / "b").warnings
    assert "(RescaleSlope 0.5 to 2)" in told
    small(tmp_path / "c", scale=[(1, 0), (1, 0), (1, 0), (1, 3)])
    assert dicom.load(tmp_path / "c").meta["stored_dtype"] == "float32"


def test_what_a_header_does_not_say_of_its_slices_is_not_compared(tmp_path):
    def silent(ds, k):
        del ds.SliceThickness, ds.SpacingBetweenSlices

    small(tmp_path, change=silent)
    found = dicom.load(tmp_path)
    assert found.warnings == () and found.meta["slice_thickness_mm"] is None
    assert found.meta["slice_distance_mm"] == pytest.approx(3.0)


def test_slices_of_two_volumes_lie_at_one_place_within_what_is_rounded(tmp_path):
    data = volume((3, 2, 3))
    for t, off in enumerate((0.0, 0.004)):

        def change(ds, k, t=t, off=off):
            ds.EchoTime = t + 1.0
            return moved(2, off, range(3))(ds, k)

        small(tmp_path, data + 100 * t, uid="1.2", prefix=f"V{t}_", change=change)
    assert np.array_equal(dicom.load(tmp_path, volume=1).data, (data + 100)[:, ::-1])


@pytest.mark.parametrize("name", ["IM0009.dcm", "IM0009"])
def test_a_slice_that_was_not_fetched_is_lost_and_another_file_is_not(tmp_path, name):
    small(tmp_path, number=3)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (tmp_path / "notes.txt").write_bytes(pointer)
    assert dicom.load(tmp_path).warnings == ()
    (tmp_path / name).write_bytes(pointer)
    refused(tmp_path, f"{name} its content was not fetched: a pointer of git LFS")


def test_what_is_named_like_a_slice_and_is_none_is_told_as_that(tmp_path):
    for k, path in enumerate(small(tmp_path)):
        path.rename(tmp_path / f"IM{k}")
    (tmp_path / "IM9").write_text("no image at all", encoding="utf8")
    refused(tmp_path, "IM9 is no DICOM file, but named like the slices beside it")
    (tmp_path / "IM9").rename(tmp_path / "README")
    assert dicom.load(tmp_path).data.shape == SMALL


def test_an_empty_element_is_none(tmp_path):
    """As anonymisers leave them."""

    def emptied(ds, k):
        for name in (
            "RescaleSlope",
            "RescaleIntercept",
            "SpacingBetweenSlices",
            "InstanceNumber",
            "ImagesInAcquisition",
        ):
            setattr(ds, name, "")

    small(tmp_path, change=emptied)
    found = dicom.load(tmp_path)
    assert np.array_equal(found.data, volume(SMALL)[:, ::-1]) and found.warnings == ()


def test_frames_that_do_not_fit_into_memory_are_no_fault_of_the_file(tmp_path, monkeypatch):
    """Exit code 5, that of the surroundings: the same file is read where there is more memory."""

    class Large:
        @property
        def pixel_array(self):
            raise MemoryError

    monkeypatch.setattr(dicom_header, "_dataset", lambda path, force: Large())
    with pytest.raises(ResourceError, match="not enough memory for its frames") as error:
        dicom_header.pixels(tmp_path / "a.dcm", (4, 4))
    assert error.value.exit_code == 5


def test_other_files_of_a_folder_are_named_once_whatever_is_read_besides(tmp_path, caplog):
    small(tmp_path)
    (tmp_path / "notes.txt").write_text("no image", encoding="utf8")
    with caplog.at_level(logging.INFO, "fastsrgan"):
        dicom.load(tmp_path)
        any_image.sha256(tmp_path)
    assert caplog.text.count("no DICOM image") == 1


def test_what_a_library_says_is_cut_at_a_word():
    long = "The number of bytes of pixel data is less than expected: " + "an unusual cause " * 10
    told = dicom_header._line(ValueError(long))
    assert told.endswith(" ...") and len(told) <= 124 and long.startswith(told[:-4] + " ")
    assert dicom_header._line(ValueError("short\nmore")) == "short"
    assert (
        dicom_header._line(ValueError("x" * 300)) == "x" * 120 + " ..." and dicom_header._line(KeyError()) == "KeyError"
    )


@pytest.mark.parametrize(
    ("name", "content", "what", "way"),
    [
        ("a.dcm", bytes(344) + b"n+1\0" + bytes(300), "a NIfTI image", "end its name in .nii"),
        ("a.ima", gzip.compress(bytes(344) + b"n+1\0" + bytes(300), mtime=0), "a NIfTI image", "end its name in .nii"),
        ("a.dicom", b"NRRD0004\n" + bytes(600), "an NRRD file", "end its name in .nrrd"),
        ("a.DCM", b"\x89PNG" + bytes(600), "a PNG picture", "convert it"),
    ],
)
def test_another_format_under_a_name_of_dicom_is_called_what_it_is(tmp_path, name, content, what, way):
    """Alone it "holds no DICOM image", and its folder "holds no image"."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"is not a DICOM file but {what}") as caught:
        any_image.load_any(tmp_path / name)
    assert way in caught.value.hint
    with pytest.raises(InputError, match=f"holds no DICOM image: {name} is not a DICOM file but {what}") as caught:
        any_image.load_any(tmp_path)
    assert way in caught.value.reason
    small(tmp_path)  # beside slices it is one of the other files
    assert any_image.load_any(tmp_path).data.shape[2] > 1


def test_indices_of_colours_are_no_intensities(tmp_path):
    """A picture in a palette has one number a voxel, as a scan has, and is a colour picture all the same."""
    small(tmp_path / "a", change=lambda ds, k: setattr(ds, "PhotometricInterpretation", "PALETTE COLOR"))
    for place in (tmp_path / "a", tmp_path / "a" / "IM0001.dcm"):
        with pytest.raises(InputError, match=r"colour picture|holds no DICOM image"):
            any_image.load_any(place)


def test_a_slice_without_its_size_lacks_it_and_is_not_cut_off(tmp_path):
    small(tmp_path)
    lacking = dicom_header.read_frames
    ds = read(tmp_path / "IM0002.dcm")
    del ds.Rows
    ds.save_as(tmp_path / "IM0002.dcm", enforce_file_format=True)
    with pytest.raises(InputError, match="has no Rows or no Columns"):
        lacking(tmp_path / "IM0002.dcm")
    whole = (tmp_path / "IM0001.dcm").read_bytes()
    (tmp_path / "IM0002.dcm").write_bytes(whole[:400])
    with pytest.raises(InputError, match="is cut off within its header"):
        lacking(tmp_path / "IM0002.dcm")


def test_a_thickness_below_zero_makes_no_gap(tmp_path):
    small(tmp_path, change=lambda ds, k: setattr(ds, "SliceThickness", "-3"))
    assert not [line for line in any_image.load_any(tmp_path).warnings if "gap" in line]


# --- slices of one volume show one thing --------------------------------------------------------------------------


def every(step, **fields):
    """Sets fields of every so many slices, the second first."""

    def change(ds, k):
        if k % step == 1:
            for name, value in fields.items():
                setattr(ds, name, value)

    return change


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}, "phase"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "PHASE MAP", "P", "FFE"]}, "phase"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "R_IR", "R", "IR"]}, "real"),
        ({"ComplexImageComponent": "IMAGINARY"}, "imaginary"),
    ],
)
def test_magnitudes_and_phases_at_places_of_their_own_are_no_volume(tmp_path, fields, kind, step):
    """They became one image without a word: every second slice a phase."""
    small(tmp_path, change=every(step, **fields))
    caught = refused(tmp_path, f"{4 // step} of {kind}, such as IM0002.dcm" if step == 4 else f"2 of {kind}, such as")
    assert "of magnitude" in caught.reason and "move the slices of the other out" in caught.hint


def test_what_says_no_component_is_none(tmp_path):
    small(tmp_path, change=every(2, ImageType=["ORIGINAL", "PRIMARY", "OTHER"]))
    assert "ImageType" in dicom.load(tmp_path).warnings[0]
    write_enhanced(tmp_path / "e" / "a.dcm", volume(SMALL), scanner_affine())
    assert dicom.load(tmp_path / "e").warnings == ()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"EchoTime": 7.38}, "EchoTime 100.0 for 3, 7.38 for 1, such as IM0002.dcm"),
        (
            {"ImageType": ["DERIVED", "SECONDARY", "M", "ND"]},
            "for 3, DERIVED\\SECONDARY\\M\\ND for 1, such as IM0002.dcm",
        ),
        ({"EchoTime": 100.9}, ""),
        ({"EchoTime": None}, ""),
        ({"AcquisitionNumber": 2, "TriggerTime": 30.0}, ""),
    ],
)
def test_slices_of_another_contrast_are_told(tmp_path, fields, told):
    small(tmp_path, change=every(4, **fields))
    warnings = dicom.load(tmp_path).warnings
    assert len(warnings) == bool(told) and all(told in line for line in warnings)


# --- what else lies in a study ------------------------------------------------------------------------------------

SPECTRUM, REPORT = "1.2.840.10008.5.1.4.1.1.4.2", "1.2.840.10008.5.1.4.1.1.88.11"


@pytest.mark.parametrize(("kind", "name"), [(SPECTRUM, "MR Spectroscopy Storage"), (REPORT, "Basic Text SR Storage")])
def test_dicom_without_an_image_is_called_that_and_disturbs_none(tmp_path, kind, name):
    """Named itself a report was "not a DICOM file but a DICOM file", and a spectrum cut off within its header."""
    other = small(tmp_path / "other", number=9)[0]
    ds = read(other)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = kind
    del ds.PixelData
    if kind == REPORT:
        del ds.Rows, ds.Columns
    for path in (tmp_path / "other").iterdir():
        path.unlink()
    ds.save_as(tmp_path / "other" / "a.dcm", enforce_file_format=True)
    caught = refused(tmp_path / "other" / "a.dcm", f"is a DICOM file without an image \\({name}\\)")
    assert "name a DICOM slice" in caught.hint
    refused(tmp_path / "other", f"holds no DICOM image: a.dcm is a DICOM file without an image \\({name}\\)")
    small(tmp_path, number=3)
    assert dicom.load(tmp_path).warnings == ()


def test_a_class_that_the_standard_does_not_know_has_no_name():
    assert dicom_header._class_of("1.3.12.2.1107.5.9.1.99") == "" == dicom_header._class_of("")


def test_a_segmentation_is_not_to_be_converted(tmp_path):
    small(tmp_path, change=lambda ds, k: setattr(ds, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.66.4"))
    assert refused(tmp_path, "is a segmentation").hint == "name the series that it was made of"


def test_packed_slices_are_read_under_any_name_and_never_lost(tmp_path):
    """`gzip IM0001` was told to be read "by its folder", and the folder to hold no image."""
    for path in small(tmp_path):
        (tmp_path / f"{path.stem}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    last = tmp_path / "IM0004.gz"
    for place in (tmp_path, last):
        assert any_image.load_any(place).data.shape == SMALL
    assert any_image.stem(last) == "IM0004"
    whole = last.read_bytes()
    for keep, told in ((len(whole) // 2, "IM0004.gz is damaged"), (40, "IM0004.gz is no DICOM file, but named like")):
        last.write_bytes(whole[:keep])
        refused(tmp_path, told)
    last.rename(tmp_path / "notes.tar.gz")
    assert dicom.load(tmp_path).data.shape[2] == SMALL[2] - 1


def test_two_patients_under_one_uid_are_two_series(tmp_path):
    """Anonymisers write such UIDs: the slices of both "were there 2 times", or lay between each other."""
    for name in "ab":
        small(tmp_path / name, uid="1.2.3", change=lambda ds, k, name=name: setattr(ds, "PatientID", name))
    with pytest.raises(UsageError, match=r"in a, patient a, .* in b, patient b, ") as caught:
        dicom.load(tmp_path)
    assert caught.value.hint == (
        f"name the sub-folders, each for a result of its own: {tmp_path / 'a'} {tmp_path / 'b'}"
    )
    one = tmp_path / "one"
    small(one, uid="1.2.3", change=lambda ds, k: setattr(ds, "PatientID", "ab"[k % 2]))
    with pytest.raises(UsageError, match="holds 2 series") as caught:
        dicom.load(one)
    assert caught.value.hint == "move the images of one of them to a folder of its own"


def test_a_slice_that_lost_its_patient_is_one_of_the_series(tmp_path):
    paths = small(tmp_path, change=lambda ds, k: setattr(ds, "PatientID", "" if k == 1 else "a"))
    for place in (tmp_path, paths[1]):
        assert dicom.load(place).data.shape == SMALL


def test_an_acquisition_in_each_of_two_folders_is_told_as_that(tmp_path):
    for name in "ab":
        small(tmp_path / name, uid="1.2.3")
    assert f"name one of the folders, such as {tmp_path / 'a'}" in refused(tmp_path, "is there 2 times").hint
    small(tmp_path / "one", uid="1.2.4")
    small(tmp_path / "one", uid="1.2.4", prefix="again")
    assert "name one of the folders" not in refused(tmp_path / "one", "is there 2 times").hint


def test_where_series_share_a_number_each_says_what_tells_it_apart(tmp_path):
    """The one of another description had no UID, beside the hint to choose one by UID."""
    for uid, description in (("1.2.3", "T2"), ("1.2.4", "T2"), ("1.2.5", "scout")):
        small(tmp_path, uid=uid, description=description, prefix=uid)
    with pytest.raises(UsageError, match=r"UID 1\.2\.3; .*UID 1\.2\.4; .*UID 1\.2\.5 ") as caught:
        dicom.load(tmp_path)
    assert caught.value.hint == "choose one with --series UID"


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("p1/T2", "p2/T2"), "p1 p2"),
        (("all/p1/T2", "all/p2/T2"), "all/p1 all/p2"),
        (("p1/T2", "p1/T1"), "p1/T1 p1/T2"),
        (("p1/v1/T2", "p1/v2/T2", "p2/v1/T2"), "p1/v1 p1/v2 p2/v1 (with an output folder each: their names are alike)"),
        (("p1", "p1"), ""),
    ],
)
def test_the_folders_that_are_offered_can_be_named(tmp_path, folders, named):
    """Of p1/T2 and p2/T2 both T2 were offered, whose results would have one name."""
    for k, folder in enumerate(folders):
        small(tmp_path / folder, uid=f"1.2.{k}", prefix=str(k))
    with pytest.raises(UsageError) as caught:
        dicom.load(tmp_path)
    words = ", or name the sub-folders, each for a result of its own: " if named else ""
    assert caught.value.hint.replace(f"{tmp_path}/", "") == f"choose one with --series UID{words}{named}"


def test_two_folders_of_one_name_are_not_sent_to_the_folder_above(tmp_path):
    for name in "ab":
        small(tmp_path / name / "T2", uid=f"1.2.{ord(name)}")
    with pytest.raises(UsageError, match="would write to the same files") as caught:
        find_images([tmp_path / "a" / "T2", tmp_path / "b" / "T2"], tmp_path / "out")
    assert caught.value.hint == "outputs are named after the image: use one output folder for each"


def test_slices_of_two_patients_that_are_named_one_by_one_are_two_images(tmp_path):
    paths = small(tmp_path, uid="1.2.3", change=lambda ds, k: setattr(ds, "PatientID", "ab"[k % 2]))
    assert [image.path for image in find_images(paths, tmp_path / "out")] == paths[:2]
