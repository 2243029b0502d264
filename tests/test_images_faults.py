"""Damaged, lying and odd images end as docs/reliability.md says, rows 1 to 8, 11 and 13: a clear error or a warning."""

import bz2
import gzip
import os
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import HEAD, file_bytes, header_of, qform_fields, rigid, write

from fastsrgan.errors import FastsrganError, InputError, ResourceError
from fastsrgan.io import nifti as images
from fastsrgan.volume.geometry import Orientation, Volume

MIB = 1 << 20
LABEL = (HEAD > 450).astype(np.uint8)


def refused(path, match, read=images.load, **options):
    """Reading ends in one clear line with exit code 3, having cost little memory."""
    tracemalloc.start()
    with pytest.raises(InputError, match=match) as caught:
        read(path, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert str(path)[:-4] in str(caught.value)
    assert peak < 40 * MIB


# Files that are damaged


@pytest.mark.fault(1)
def test_every_truncation_of_a_gzip_image_is_found(tmp_path):
    whole = write(tmp_path / "w.nii.gz").read_bytes()
    path = tmp_path / "cut.nii.gz"
    for keep in [*range(1, len(whole), 37), *range(len(whole) - 9, len(whole))]:
        path.write_bytes(whole[:keep])
        refused(path, "truncated" if keep > 1 else "not a NIfTI")


@pytest.mark.fault(1)
@pytest.mark.parametrize("name", ["cut.nii", "cut.img"])
def test_every_truncation_of_a_plain_image_is_found(tmp_path, name):
    path = write(tmp_path / name)
    whole = path.read_bytes()
    for keep in (len(whole) - 1, len(whole) // 2, 5):
        path.write_bytes(whole[:keep])
        refused(path, "truncated")


@pytest.mark.fault(1)
def test_a_gzip_that_ends_well_but_too_early_is_truncated(tmp_path):
    path = tmp_path / "short.nii.gz"
    path.write_bytes(gzip.compress(file_bytes()[:-2]))
    refused(path, "truncated: the header declares 772 bytes, the file holds 770 bytes")


@pytest.mark.fault(2)
@pytest.mark.parametrize(("at", "what"), [(-8, "checksum"), (-4, "checksum"), (40, "gzip|truncated")])
def test_a_wrong_crc_length_or_byte_is_found(tmp_path, at, what):
    path = write(tmp_path / "crc.nii.gz")
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x55
    path.write_bytes(raw)
    refused(path, what)
    refused(path, what, images.load_stored)
    refused(path, what, images.load_label)


@pytest.mark.fault(2)
def test_the_trailer_is_read_also_behind_the_chosen_volume(tmp_path):
    path = write(tmp_path / "series.nii.gz", np.stack([HEAD] * 4, axis=-1))
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 1
    path.write_bytes(raw)
    refused(path, "checksum", volume=0)


def test_more_data_than_declared_is_refused_and_padding_told(tmp_path):
    slice_bytes = 6 * 5 * 2
    for name, pack in (("more.nii", bytes), ("more.nii.gz", gzip.compress)):
        path = tmp_path / name
        path.write_bytes(pack(file_bytes() + bytes(slice_bytes - 1)))
        assert images.load(path).warnings == ("59 bytes behind the last voxel were ignored",)
        for extra in (slice_bytes, 5000):
            path.write_bytes(pack(file_bytes() + bytes(extra)))
            refused(path, "more data than the 7 x 6 x 5 voxels")
    path.write_bytes(gzip.compress(file_bytes()) + b"garbage")
    assert images.load(path).warnings == ("7 bytes behind the gzip data were ignored",)


# Headers that lie


@pytest.mark.fault(3)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("version", "shape"), [(1, (32767, 32767, 32767)), (2, (2**21, 2**21, 4)), (2, (2**40, 2**40, 2**40))]
)
def test_a_header_that_claims_tebibytes_is_refused_at_no_cost(tmp_path, suffix, version, shape):
    block = header_of((1, 1, 1), "i2", rigid(), version=version, dim=(slice(1, 4), shape)) + bytes(100)
    path = tmp_path / f"lie{suffix}"
    path.write_bytes(gzip.compress(block) if suffix == ".nii.gz" else block)
    refused(path, "truncated: the header declares .*iB")


def bomb(path, header: bytes, zeros: int):
    """A valid gzip image of zeros: members of 16 MiB, packed once."""
    piece = gzip.compress(bytes(16 * MIB), 9)
    path.write_bytes(gzip.compress(header) + piece * (zeros // (16 * MIB)))
    return path


@pytest.mark.fault(4)
def test_a_gzip_bomb_is_refused_without_unpacking(tmp_path):
    header = header_of((704, 704, 704), "i2", rigid())
    path = bomb(tmp_path / "bomb.nii.gz", header + b"\0\0\0\0", 704 * MIB)
    assert path.stat().st_size < MIB
    refused(path, "gzip bomb.*gunzip")


@pytest.mark.fault(4)
def test_a_bomb_behind_a_modest_header_is_refused_after_one_slice(tmp_path):
    path = bomb(tmp_path / "tail.nii.gz", file_bytes(), 704 * MIB)
    refused(path, "more data than")


@pytest.mark.fault(4)
def test_max_voxels_limits_what_is_read(tmp_path):
    path = write(tmp_path / "m.nii.gz")
    refused(path, "7 x 6 x 5 voxels are more than the limit of 209.*--max-voxels", max_voxels=209)
    assert images.load(path, max_voxels=210).data.size == 210


@pytest.mark.fault(7)
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"dim": (0, 0)}, "impossible dimensions"),
        ({"dim": (0, 9)}, "impossible dimensions"),
        ({"dim": (2, -6)}, "impossible dimensions"),
        ({"dim": (3, 0)}, "impossible dimensions"),
        ({"dim": (0, 2)}, "2-D image"),
        ({"dim": (slice(0, 6), (5, 7, 6, 5, 1, 3))}, "5-D image .*vectors or channels"),
        ({"datatype": 128}, "RGB voxels"),
        ({"datatype": 2304}, "RGBA"),
        ({"datatype": 32}, "complex.*magnitude"),
        ({"datatype": 1792}, "complex"),
        ({"datatype": 2048}, "complex"),
        ({"datatype": 1}, "1-bit"),
        ({"datatype": 1536}, "128-bit"),
        ({"datatype": 77}, "unknown type 77"),
        ({"vox_offset": np.nan}, "offset"),
        ({"vox_offset": 100}, "offset 100 is impossible"),
        ({"vox_offset": 1e30}, "truncated"),
        ({"scl_slope": np.inf}, "scaling"),
        ({"scl_inter": np.nan}, "scaling"),
        ({"magic": b"ni1"}, "separate .img"),
        ({"magic": b"abc"}, "no NIfTI mark"),
    ],
)
def test_impossible_headers_are_refused(tmp_path, fields, match):
    refused(write(tmp_path / "h.nii", **fields), match)


@pytest.mark.parametrize(
    ("fields", "match"), [({"bitpix": 8}, "bitpix is 8"), ({"vox_offset": 0}, "352"), ({"xyzt_units": 5}, "code 5")]
)
def test_harmless_slips_of_a_header_are_told(tmp_path, fields, match):
    volume = images.load(write(tmp_path / "slip.nii", **fields))
    np.testing.assert_array_equal(volume.data, HEAD)
    assert [w for w in volume.warnings if match in w]


# What is no image


def test_what_is_no_image_is_named(tmp_path):
    contents = {
        "empty.nii.gz": (b"", "empty"),
        "text.nii": (b"hello, this is no image" * 40, "not a NIfTI image"),
        "tiny.nii": (b"\x5c\x01\0\0", "truncated: 4 bytes"),
        "dicom.nii": (bytes(128) + b"DICM" + bytes(600), "DICOM"),
        "head.nii.gz": (gzip.compress(b"\0\0\0\1\0\0\1\0" + bytes(600)), "MGH"),
        "x.nii.bz2": (b"BZh91AY&SY" + bytes(20), "bzip2"),
        "crlf.nii": (header_of((1, 1, 1), "u1", version=2).replace(b"\r\n\x1a\n", b"\n\x1a\n\0") + bytes(9), "mark"),
    }
    for name, (content, match) in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, match)
    (tmp_path / "folder.nii").mkdir()
    refused(tmp_path / "folder.nii", "is a folder")
    refused(tmp_path / "none.nii.gz", "no such file")
    os.mkfifo(tmp_path / "pipe.nii")
    refused(tmp_path / "pipe.nii", "not a regular file")
    with pytest.raises(InputError):
        images.load("a\0b.nii")
    with pytest.raises(InputError):
        images.load("a" * 5000 + ".hdr")


def test_half_a_pair_is_refused_by_name(tmp_path):
    write(tmp_path / "p.hdr")
    os.remove(tmp_path / "p.img")
    refused(tmp_path / "p.hdr", r"other half p\.img is missing")


# Odd voxels


@pytest.mark.fault(5)
def test_nan_and_infinite_voxels_are_zero_counted_and_told(tmp_path):
    data = HEAD.astype(np.float64)
    data[0, 0, 0], data[1, 2, 3], data[6, 5, 4], data[2, 2, 2] = np.nan, np.inf, -np.inf, 1e300
    path = write(tmp_path / "nan.nii.gz", data)
    for volume in (images.load(path), images.load_stored(path)[3]):
        assert volume.meta["nan_count"] == 4
        assert "3 of 210 voxels are NaN or infinite: read as 0" in volume.warnings
        assert "1 of 210 voxels is beyond 1e+18, which no intensity is: read as 0" in volume.warnings
        assert np.isfinite(volume.data).all()
        assert volume.data[1, 2, 3] == volume.data[2, 2, 2] == 0
        assert volume.data[3, 3, 3] == HEAD[3, 3, 3]


@pytest.mark.fault(5, 6)
def test_numbers_too_large_for_the_arrays_are_told_apart_from_nan(tmp_path):
    refused(write(tmp_path / "a.nii", np.full((3, 3, 3), 1e300)), "every voxel is beyond 1e.18, which no intensity")
    scaled = images.load(write(tmp_path / "b.nii", np.arange(27, dtype=np.int16).reshape(3, 3, 3), slope=3e38))
    assert "26 of 27 voxels are beyond 1e+18, which no intensity is: read as 0" in scaled.warnings
    assert not any("NaN" in warning for warning in scaled.warnings)


@pytest.mark.fault(5)
@pytest.mark.parametrize("mark", [np.finfo(np.float32).max, np.finfo(np.float32).min, 1.1e18, -1.1e18])
def test_the_largest_numbers_mark_what_is_not_there(tmp_path, mark):
    """Was "weights: give voxels that are NaN or infinite: they are damaged" of an image with such a background."""
    data = HEAD.astype(np.float32)
    data[0], data[1, 0, 0] = mark, 9e17 * np.sign(mark)
    path = write(tmp_path / "a.nii", data)
    for volume in (images.load(path), images.load_stored(path)[3]):
        assert not volume.data[0].any() and np.array_equal(volume.data[1:], data[1:])
        told = f"{data[0].size} of {data.size} voxels are beyond 1e+18, which no intensity is: read as 0"
        assert told in volume.warnings and not any("NaN" in warning for warning in volume.warnings)


@pytest.mark.fault(1)
def test_one_byte_too_few_and_an_odd_place_of_the_voxels_are_told_exactly(tmp_path):
    """Said that 56.59 KiB were declared and 56.59 KiB were there."""
    big = np.zeros((40, 36, 20), np.int16)
    path = write(tmp_path / "a.nii", big)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "20 voxels, 57952 bytes, the file has 57951 bytes")
    refused(write(tmp_path / "b.nii", big, vox_offset=353), "20 voxels from byte 353 on, 57953 bytes, .* 57952 bytes")
    refused(write(tmp_path / "c.nii", big, vox_offset=1e30), r"20 voxels from byte 1e\+30 on")


@pytest.mark.fault(8)
def test_unknown_codes_and_an_intercept_without_a_slope_are_told(tmp_path):
    told = images.load(write(tmp_path / "a.nii", sform_code=77)).warnings
    assert "the sform code 77 is unknown: taken as 2, aligned to another image" in told
    told = images.load(write(tmp_path / "b.nii", slope=np.nan, inter=5.0)).warnings
    assert "the intensity scaling has no slope (NaN): its intercept 5 is ignored too" in told
    assert not images.load(write(tmp_path / "c.nii", slope=np.nan, inter=np.nan)).warnings  # as nibabel writes


@pytest.mark.fault(6)
def test_all_nan_is_refused_and_constant_and_negative_images_are_told(tmp_path):
    path = write(tmp_path / "a.nii", np.full((3, 3, 3), np.nan, np.float32))
    refused(path, "every voxel is NaN")
    refused(path, "every voxel is NaN", images.load_stored)
    assert "the image is constant: every voxel is 5" in images.load(write(path, np.full((3, 3, 3), 5))).warnings
    lowest = int(HEAD.min()) - 800
    assert f"intensities are negative, down to {lowest}" in images.load(write(path, HEAD - np.int16(800))).warnings
    scaled = images.load_stored(write(path, HEAD, slope=-2.0, inter=100.0))[3]
    assert any(f"down to {100 - 2 * HEAD.max()}" in w for w in scaled.warnings)


def test_scaling_that_overflows_is_refused_for_the_store(tmp_path):
    refused(write(tmp_path / "o.nii", HEAD, slope=3e38), "overflows", images.load_stored)


@pytest.mark.fault(35)
def test_no_memory_is_a_resource_error(tmp_path, monkeypatch):
    def empty(*_, **__):
        raise MemoryError

    path = write(tmp_path / "m.nii")
    monkeypatch.setattr(np, "empty", empty)
    with pytest.raises(ResourceError, match="not enough memory for 7 x 6 x 5 voxels, 840 bytes"):
        images.load(path)


# Labels


def image_of(shape=HEAD.shape, affine=None):
    return Volume(np.zeros(shape, np.float32), rigid() if affine is None else affine)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i8", "f4", "f8"])
def test_labels_are_whole_numbers_whatever_their_type(tmp_path, dtype):
    path = write(tmp_path / "l.nii.gz", (LABEL * 3).astype(dtype))
    label = images.load_label(path, image_of())
    assert label.data.dtype == np.uint8
    np.testing.assert_array_equal(label.data, LABEL * 3)
    assert label.meta["values"] == [0, 3]
    assert label.warnings == ()
    scaled = images.load_label(write(path, LABEL * np.uint8(255), slope=1 / 255))
    np.testing.assert_array_equal(scaled.data, LABEL)


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("value", "match"),
    [(0.5, "fractions such as 0.5"), (np.nan, "NaN"), (np.inf, "NaN or inf"), (-1, "-1"), (256, "256")],
)
def test_labels_that_are_none_are_refused(tmp_path, value, match):
    data = LABEL.astype(np.float32)
    data[6, 5, 4] = value
    refused(write(tmp_path / "l.nii.gz", data), match, images.load_label)


def test_labels_may_be_off_a_whole_number_by_a_thousandth(tmp_path):
    """As labels that are stored as scaled integers are."""
    for off, taken in ((0.0005, True), (-0.0005, True), (0.002, False), (-0.002, False)):
        data = np.array([0, 1, 2 + off], np.float32).reshape(3, 1, 1)
        path = images.save(tmp_path / "l.nii", data, np.eye(4), overwrite=True)
        if taken:
            assert images.load_label(path).data.ravel().tolist() == [0, 1, 2]
        else:
            with pytest.raises(InputError, match="fractions"):
                images.load_label(path)


def test_an_empty_label_is_told(tmp_path):
    assert "every voxel is 0" in images.load_label(write(tmp_path / "e.nii", LABEL * 0)).warnings[0]


@pytest.mark.fault(13)
def test_a_label_on_another_grid_is_refused_with_both_grids(tmp_path):
    path = write(tmp_path / "l.nii.gz", LABEL)
    shifted, turned = rigid(), rigid(turn=(0.3, -0.2, 0.51))
    shifted[0, 3] += 0.1
    for like in (image_of((7, 6, 4)), image_of((6, 7, 5)), image_of(affine=shifted), image_of(affine=turned)):
        refused(path, "grid.*label 7 x 6 x 5 voxels of .* mm, axes .*; image .*nearest", images.load_label, like=like)
    near = rigid()
    near[0, 3] += 0.005  # text of two decimals; what is accepted and why: tests/test_placement.py
    assert images.load_label(path, image_of(affine=near)).warnings == ()


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True), (False, True, False)])
def test_a_label_stored_in_another_order_comes_back_on_the_image(tmp_path, axes, flips):
    turn = Orientation(axes, flips)
    path = write(tmp_path / "t.nii.gz", turn.apply(LABEL), turn.affine(rigid(), LABEL.shape))
    label = images.load_label(path, image_of())
    np.testing.assert_array_equal(label.data, LABEL)
    np.testing.assert_array_equal(label.affine, rigid())
    assert all(stride > 0 for stride in label.data.strides)
    assert ("reoriented" in "".join(label.warnings)) == (turn != Orientation())


# Anything at all


BASE = file_bytes()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), max_size=6), st.integers(0, len(BASE)), st.booleans()
)
def test_any_header_ends_in_a_volume_or_a_clear_error(tmp_path_factory, edits, keep, cut):
    raw = bytearray(BASE)
    for at, value in edits:
        raw[at] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.nii"
    path.write_bytes(raw[:keep] if cut else raw)
    for read in (images.load, images.load_stored, images.load_label):
        try:
            result = read(path)
        except FastsrganError as error:
            assert error.exit_code == 3
            continue
        volume = result[3] if isinstance(result, tuple) else result
        assert np.isfinite(volume.data).all()
        assert np.isfinite(volume.affine).all()
        assert abs(np.linalg.det(volume.affine)) > 0


@pytest.mark.fault(2)
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2000), st.integers(1, 255))
def test_any_flipped_byte_of_a_gzip_is_found_or_harmless(tmp_path_factory, at, flip):
    raw = bytearray(gzip.compress(BASE, 6, mtime=0))
    at %= len(raw)
    raw[at] ^= flip
    path = tmp_path_factory.getbasetemp() / "flip.nii.gz"
    path.write_bytes(raw)
    try:
        volume = images.load(path)
    except InputError:
        return
    np.testing.assert_array_equal(volume.data, HEAD)
    # Time, system and flags of the gzip header are covered by no checksum, nor the bits that fill its last byte.
    assert at < 10 or at == len(raw) - 9


@pytest.mark.parametrize(
    ("kind", "way"),
    [("tar", "tar -xf"), ("tar.gz", "tar -xf"), ("gz.gz", "gunzip"), ("zip", "unzip"), ("bz2", "bunzip2")],
)
def test_an_image_in_a_parcel_is_told_how_to_unpack_it(tmp_path, kind, way):
    """Was "is not a NIfTI image: it begins with ... (a .nii or .nii.gz file)", of a file so called."""
    path, plain = tmp_path / "x.nii.gz", file_bytes()
    if kind.startswith("tar"):
        (tmp_path / "x.nii").write_bytes(plain)
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(tmp_path / "x.nii", "x.nii")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.nii", plain)
    else:
        path.write_bytes(bz2.compress(plain) if kind == "bz2" else gzip.compress(gzip.compress(plain)))
    with pytest.raises(InputError, match="is not a NIfTI image but") as caught:
        images.load(path)
    assert way in caught.value.hint


@pytest.mark.parametrize(
    ("content", "what", "way"),
    [
        (bytes(128) + b"DICM", "a DICOM file", "convert it with dcm2niix"),
        (b"NRRD0004", "an NRRD file", ".nrrd"),
        (b"\0\0\0\1\0\0", "a FreeSurfer MGH file", ".mgh"),
        (b"\x89HDF", "an HDF5 or MINC file", "mnc2nii"),
        (b"\ntype = string-attribute\n", "an AFNI header", "3dAFNItoNIFTI"),
        (b"MATRIX72v", "an ECAT file", "mri_convert"),
        (b"CDF\1", "a NetCDF or MINC file", "mnc2nii"),
        (b"ObjectType = Image", "a MetaImage header", ".mha"),
        (b"NDims = 3", "a MetaImage header", ".mhd"),
        (b"\x89PNG", "a PNG picture", "convert it to .nii.gz first"),
        (b"\xff\xd8\xff", "a JPEG picture", "convert"),
        (b"II*\0", "a TIFF picture", "convert"),
        (b"%PDF", "a PDF document", "convert"),
        (b"PK\3\4", "a zip archive", "unzip"),
        (b"BZh9", "a bzip2 file", "bunzip2"),
        (b"\xfd7zXZ", "an xz file", "unxz"),
        (b"\x28\xb5\x2f\xfd", "a zstd file", "unzstd"),
    ],
)
def test_a_file_of_another_kind_under_the_name_is_named_with_a_way(tmp_path, content, what, way):
    (tmp_path / "a.nii").write_bytes(content + bytes(600))
    with pytest.raises(InputError, match=f"is not a NIfTI image but {what}") as error:
        images.load(tmp_path / "a.nii")
    assert way in error.value.hint


@pytest.mark.parametrize(
    ("size", "told"), [(0.006, ""), (0.004, "unusual"), (49.0, ""), (51.0, "unusual"), (1e-9, "is impossible")]
)
def test_the_size_of_voxels_has_two_sides(tmp_path, size, told):
    path = write(tmp_path / "a.nii", HEAD, np.diag([size, size, size, 1.0]))
    if told == "is impossible":
        refused(path, told)
    else:
        assert [told in text for text in images.load(path).warnings] == [True] * bool(told)


@pytest.mark.parametrize(("degrees", "told"), [(0.03, False), (0.1, True), (10.0, True)])
def test_a_shear_is_told_in_degrees(tmp_path, degrees, told):
    affine = np.eye(4)
    affine[:2, 1] = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    found = images.load(write(tmp_path / "a.nii", HEAD, affine)).warnings
    assert [f"sheared by {degrees:.2g} degrees" in text for text in found] == [True] * told


def test_forms_that_differ_are_told_in_mm_whatever_the_unit(tmp_path):
    moved = np.diag([1e-3] * 3 + [1.0]) @ rigid()
    stored = moved.copy()
    moved[0, 3] += 0.004  # metres
    told = images.load(write(tmp_path / "a.nii", HEAD, stored, units=1, **qform_fields(moved))).warnings
    assert any("sform and qform place voxels up to 4 mm apart" in text for text in told)


@pytest.mark.parametrize("name", ["a.HDR", "a.IMG", "a.hdr", "a.img", "a.hdr.gz"])
def test_the_other_half_of_a_pair_is_found_packed_or_not(tmp_path, name):
    write(tmp_path / "a.hdr")
    big = name.isupper() or ".H" in name or ".I" in name
    for half in ("hdr", "img"):
        path = tmp_path / f"a.{half}"
        raw = path.read_bytes()
        path.unlink()
        ending = half.upper() if big else half
        packed = ((half in name) == name.endswith(".gz") and name.endswith("z")) or (half == "img" and name == "a.hdr")
        (tmp_path / f"a.{ending}{'.gz' * packed}").write_bytes(gzip.compress(raw) if packed else raw)
    place = tmp_path / name
    np.testing.assert_array_equal(images.load(place).data, HEAD)


def test_voxels_are_written_in_pieces_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("fastsrgan.io.nifti_voxels.CHUNK_BYTES", 200)  # two slices of 84 bytes
    series = np.stack([HEAD, HEAD[::-1], HEAD + 7], axis=-1)
    for dtype in (np.int16, np.float64):
        for data in (HEAD, series):
            path = images.save(tmp_path / "a.nii.gz", data, np.eye(4), dtype=dtype, overwrite=True)
            last = images.load(path, volume=2 if data.ndim == 4 else None).data
            np.testing.assert_array_equal(last, data if data.ndim == 3 else data[..., 2])


@pytest.mark.fault(4)
def test_a_file_may_unpack_to_five_hundred_times_its_size(tmp_path, monkeypatch):
    """Beyond a size that is free: a sparse label map reaches 350."""
    shape = (100, 100, 50)  # 1 MB of zeros are packed to 1 kB
    for noise, taken in ((4000, True), (0, False)):
        data = np.zeros(shape, np.uint8, order="F")
        data.ravel(order="K")[:noise] = np.random.default_rng(0).integers(0, 255, noise)
        path = tmp_path / f"{noise}.nii.gz"
        path.write_bytes(gzip.compress(file_bytes(data), 9))
        ratio = (data.size + 352) / path.stat().st_size
        assert 50 < ratio < 400 if taken else 500 < ratio < 1032
        np.testing.assert_array_equal(images.load(path).data, data)
        with monkeypatch.context() as patched:
            patched.setattr("fastsrgan.io.nifti_voxels.EXPANSION_FREE", 1000)
            if taken:
                images.load(path)
            else:
                refused(path, f"refused as a gzip bomb: .*, {int(ratio)} times the file's")


def test_a_form_must_span_the_space_and_a_qform_without_a_hand_is_right_handed(tmp_path):
    for share, form in ((2e-3, "sform"), (5e-4, "qform")):
        flat = np.eye(4)
        flat[:3, 2] = 0, np.sqrt(1 - share**2), share
        path = write(tmp_path / "a.nii", HEAD, flat, **qform_fields(rigid()))
        assert images.load(path).meta["orientation"] == form
    fields = qform_fields(rigid()) | {"sform_code": 0}
    fields["pixdim"] = (slice(0, 4), [0.0, *fields["pixdim"][1][1:]])
    np.testing.assert_allclose(
        images.load(write(tmp_path / "b.nii", HEAD, **fields)).affine, rigid(), atol=4e-7
    )  # found: 4e-8


def test_a_home_folder_in_quotes_and_a_url_are_told_as_that(tmp_path):
    for place, told in (("~/a.nii", "not the home folder within quotes"), ("s3://b/a.nii", "download it first")):
        with pytest.raises(InputError) as error:
            images.load(place)
        assert told in error.value.hint


@pytest.mark.parametrize(("there", "asked"), [("a.nii.gz", "a.nii"), ("a.nii", "a.nii.gz"), ("a.nii.gz", "A.NII.GZ")])
def test_a_name_that_is_there_packed_or_in_other_letters_is_offered(tmp_path, there, asked):
    (tmp_path / there).touch()
    with pytest.raises(InputError, match="no such file") as caught:
        images.load(tmp_path / asked)
    assert caught.value.hint == f"did you mean {there}?"
    with pytest.raises(InputError, match="no such file") as caught:
        images.load(tmp_path / "b.nii.gz")  # another subject's is none
    assert caught.value.hint == "check the path"


def test_a_pattern_that_no_shell_filled_in_is_told_as_that(tmp_path):
    with pytest.raises(InputError, match="no such file") as caught:
        images.load(tmp_path / "*.nii.gz")
    assert "patterns without quotes" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "way"),
    [
        ("scans.lst", b"a.nii.gz\nb.nii.gz\n", "a list of images ends in .txt, .csv or .tsv"),
        ("scans.json", b'["a.nii.gz"]', "a list of images ends in .txt, .csv or .tsv"),
        ("scans.txt", b"a.nii.gz\r\n", "not in another list"),
        ("sc\u00e4ns", "B\u00e4cker/a.nii.gz\n".encode(), "a list of images ends in"),
        ("a.mat", b"MATLAB 5.0 MAT-file\0\1\2\3", "FreeSurfer MGH, NRRD, MetaImage and DICOM are read"),
        ("a.nii.gz", b"a.nii.gz\nb.nii.gz\n", "a .nii or .nii.gz file"),
        ("a+orig.BRIK", b"\1\2\3\4", "3dAFNItoNIFTI makes NIfTI of HEAD and BRIK"),
        ("a.REC", bytes(20), "dcm2niix makes NIfTI of PAR and REC"),
    ],
)
def test_the_way_out_of_a_file_that_is_no_image_is_told_by_what_it_is(tmp_path, name, content, way):
    """A list under another ending was told to be no NIfTI image, and that a .nii file is wanted."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="is not a NIfTI image: it begins with") as caught:
        images.load(tmp_path / name)
    assert way in caught.value.hint
