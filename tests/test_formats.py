"""Image files of every format of the registry: geometry and voxels against nibabel and SimpleITK, damage."""

import bz2
import gzip
import re
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
from nifti_files import HEAD, rigid

from fastsrgan.errors import InputError, ResourceError
from fastsrgan.io import formats
from fastsrgan.io import nifti as images
from fastsrgan.io.nifti_voxels import DEFLATE_LIMIT
from fastsrgan.io.tables import read_list, subject_ids
from fastsrgan.volume.placement import axis_codes

sitk = pytest.importorskip("SimpleITK", reason="extra sitk")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ITK_NAMES = ("a.nrrd", "a.nhdr", "a.mha", "a.mhd")


def write_itk(path, data=HEAD, affine=None, packed=False):
    lps = LPS @ (rigid() if affine is None else affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(data.T)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), packed)
    return path


@pytest.mark.parametrize("name", ("a.mgz", "a.mgh", "A.MGZ"))
@pytest.mark.parametrize("dtype", ("u1", "i2", "i4", "f4"))
def test_mgh_has_nibabels_voxels_and_place(tmp_path, name, dtype):
    nib.save(nib.MGHImage(HEAD.astype(dtype), rigid()), tmp_path / name.lower())
    path = (tmp_path / name.lower()).rename(tmp_path / name)
    volume, oracle = images.load(path), nib.load(path)
    np.testing.assert_array_equal(volume.data, oracle.get_fdata())
    np.testing.assert_allclose(volume.affine, oracle.affine, atol=2e-6)  # found: 3.6e-7
    assert volume.meta["stored_dtype"] == np.dtype(dtype).name
    assert volume.warnings == ()


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("name", ITK_NAMES)
def test_itk_formats_have_the_voxels_and_place_of_simpleitk_and_of_nifti(tmp_path, name, packed):
    """SimpleITK writes one image in both formats: what is read of them is one volume, in nibabel's world."""
    path = write_itk(tmp_path / name, packed=packed)
    sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / "same.nii.gz"))
    volume, oracle = images.load(path), nib.load(tmp_path / "same.nii.gz")
    np.testing.assert_array_equal(volume.data, HEAD)
    np.testing.assert_allclose(volume.affine, oracle.affine, atol=1e-6)  # found: 4e-8 (rounding)
    np.testing.assert_allclose(volume.affine, rigid(), atol=1e-12)  # found: 4.4e-16 (rounding)
    assert volume.meta["stored_dtype"] == "int16"


def test_a_series_of_volumes_is_chosen_from_as_in_nifti(tmp_path):
    both = np.stack([HEAD, HEAD + 1], axis=3).astype(np.float32)
    nib.save(nib.MGHImage(both, rigid()), tmp_path / "a.mgz")
    sitk.WriteImage(sitk.GetImageFromArray(both.T, isVector=False), str(tmp_path / "a.nrrd"))
    for name in ("a.mgz", "a.nrrd"):
        np.testing.assert_array_equal(images.load(tmp_path / name, volume=1).data, HEAD + 1)
        with pytest.raises(InputError, match="2 volumes and one is needed"):
            images.load(tmp_path / name)


@pytest.mark.parametrize("encoding", ["bzip2", "BZ2"])
def test_an_nrrd_that_is_packed_with_bzip2_is_called_so(tmp_path, encoding):
    text = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nencoding: {encoding}\nendian: little\n\n"
    (tmp_path / "a.nrrd").write_bytes(text.encode() + bz2.compress(HEAD.astype("<i2").tobytes(order="F")))
    with pytest.raises(InputError, match=r"packed with bzip2, which is not read .*gzip") as caught:
        images.load(tmp_path / "a.nrrd")
    assert "damaged" not in str(caught.value)


def test_files_without_a_place_say_so(tmp_path):
    raw = HEAD.astype("<i2").tobytes(order="F")
    (tmp_path / "a.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nencoding: raw\nendian: little\n\n" + raw
    )
    image = nib.MGHImage(HEAD.astype("f4"), rigid())
    nib.save(image, tmp_path / "a.mgh")
    head = bytearray((tmp_path / "a.mgh").read_bytes())
    head[28:30] = b"\0\0"  # goodRASFlag
    (tmp_path / "a.mgh").write_bytes(head)
    for name in ("a.nrrd", "a.mgh"):
        assert any("no orientation" in text for text in images.load(tmp_path / name).warnings)
    np.testing.assert_allclose(images.load(tmp_path / "a.mgh").affine, nib.load(tmp_path / "a.mgh").affine)


@pytest.mark.parametrize("name", (*ITK_NAMES, "a.mgh", "a.mgz"))
def test_a_cut_file_is_told(tmp_path, name):
    path = tmp_path / name
    if "mg" in name:
        nib.save(nib.MGHImage(HEAD, rigid()), path)
    else:
        write_itk(path)
    cut = next(p for p in formats.parts(path)[::-1])
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(InputError) as error:
        images.load(path)
    assert error.value.exit_code == 3
    assert "truncated" in str(error.value) or "damaged" in str(error.value)


@pytest.mark.fault(1)
@pytest.mark.parametrize("keep", (4, 10, 89))
def test_an_mgh_header_that_ends_early_is_truncated(tmp_path, keep):
    """It was said to be no MGH file but an MGH file."""
    nib.save(nib.MGHImage(HEAD, rigid()), tmp_path / "a.mgh")
    (tmp_path / "a.mgh").write_bytes((tmp_path / "a.mgh").read_bytes()[:keep])
    with pytest.raises(InputError, match=f"a.mgh: truncated: {keep} bytes where the header alone needs 90 "):
        images.load(tmp_path / "a.mgh")


def damage(path, at, flip=0xFF):
    held = bytearray(path.read_bytes())
    held[at] ^= flip
    path.write_bytes(held)


@pytest.mark.fault(2)
@pytest.mark.parametrize("name", ITK_NAMES)
def test_any_flipped_byte_of_packed_voxels_is_found_or_harmless(tmp_path, name):
    """SimpleITK reads a damaged .mha as other voxels, and a .nrrd whose trailer has another length."""
    path = write_itk(tmp_path / name, packed=True)
    data = formats.parts(path)[-1]
    whole = data.read_bytes()
    start = 0 if data != path else max(whole.rfind(b"LOCAL\n") + 6, whole.rfind(b"\n\n\x1f\x8b") + 2)
    places = range(start + 10 if "n" in name else start, len(whole))  # of gzip's own header no sum is kept
    assert len(places) > 100
    harmless = []
    for at in [*places[::7], *places[-8:]]:
        damage(data, at, 0x10)
        try:
            np.testing.assert_array_equal(images.load(path).data, HEAD)
            harmless.append(at)
        except InputError as error:
            assert re.search("damaged|truncated", str(error))
        data.write_bytes(whole)
    assert len(harmless) <= 1  # the bits that fill the last byte before the sum
    np.testing.assert_array_equal(images.load(path).data, HEAD)


@pytest.mark.fault(2)
@pytest.mark.parametrize("tags", (0, 10, 5000))
def test_an_mgz_is_read_to_its_checksum_behind_any_tags(tmp_path, tags):
    image = nib.MGHImage(HEAD, rigid())
    path = tmp_path / "a.mgz"
    path.write_bytes(gzip.compress(image.to_bytes() + np.random.default_rng(0).bytes(tags)))
    np.testing.assert_array_equal(images.load(path).data, HEAD)
    damage(path, -6)
    with pytest.raises(InputError, match="the gzip checksum is wrong"):
        images.load(path)


@pytest.mark.fault(4)
def test_a_bomb_behind_packed_voxels_is_refused(tmp_path):
    nib.save(nib.MGHImage(HEAD, rigid()), tmp_path / "a.mgh")
    piece = gzip.compress(bytes(16 << 20), 9)  # 17 of them are more than is accepted of any file
    (tmp_path / "a.mgz").write_bytes(gzip.compress((tmp_path / "a.mgh").read_bytes()) + 17 * piece)
    head = write_itk(tmp_path / "a.nrrd", packed=True).read_bytes()
    (tmp_path / "a.nrrd").write_bytes(head[: head.index(b"\x1f\x8b")] + (tmp_path / "a.mgz").read_bytes())
    for name in ("a.mgz", "a.nrrd"):
        with pytest.raises(InputError, match="refused as a bomb"):
            images.load(tmp_path / name)


def test_packed_voxels_of_unknown_length_are_refused(tmp_path):
    """Without CompressedDataSize MetaIO unpacks nothing, and what lay in the memory were the voxels."""
    write_itk(tmp_path / "a.mha", packed=True)
    whole = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "b.mha").write_bytes(re.sub(rb"CompressedDataSize = \d+\n", b"", whole))
    images.load(tmp_path / "a.mha")
    with pytest.raises(InputError, match=r"b\.mha: its voxels are packed and CompressedDataSize is missing"):
        images.load(tmp_path / "b.mha")


def test_an_axis_of_an_nrrd_without_a_direction_is_refused(tmp_path):
    """ITK takes nan for 1 mm."""
    write_itk(tmp_path / "a.nrrd")
    header, voxels = (tmp_path / "a.nrrd").read_bytes().split(b"\n\n", 1)
    lost = re.sub(rb"(space directions: .*) \([^)]*\)", rb"\1 (nan,nan,nan)", header)
    assert lost != header
    (tmp_path / "a.nrrd").write_bytes(lost + b"\n\n" + voxels)
    with pytest.raises(InputError, match=r"an axis of its space directions is no number \(nan\)"):
        images.load(tmp_path / "a.nrrd")


def test_bytes_behind_the_last_packed_voxel_are_told(tmp_path):
    """As behind voxels that are not packed: the header may say too few."""
    held = write_itk(tmp_path / "a.nrrd", packed=True).read_bytes()
    at = held.index(b"\x1f\x8b")
    for more in (1, 2):
        (tmp_path / "a.nrrd").write_bytes(held[:at] + gzip.compress(gzip.decompress(held[at:]) + bytes(more)))
        found = images.load(tmp_path / "a.nrrd")
        np.testing.assert_array_equal(found.data, HEAD)
        told = {1: "1 byte behind the last voxel was ignored", 2: "2 bytes behind the last voxel were ignored"}
        assert told[more] in found.warnings


def test_packed_voxels_are_looked_for_where_the_header_says(tmp_path):
    """Behind long texts and a header of the data file; a length that is too short, and many files, are refused."""
    path = write_itk(tmp_path / "a.nrrd", packed=True)
    held = path.read_bytes()
    long = b"NRRD0005\nnote:=" + b"x" * 70000 + b"\nencoding:=raw\n"
    path.write_bytes(held.replace(held[: held.index(b"\n") + 1], long, 1))
    np.testing.assert_array_equal(images.load(path).data, HEAD)
    damage(path, -2)
    with pytest.raises(InputError, match="the gzip checksum is wrong"):
        images.load(path)
    path.write_bytes(held.replace(b"\nencoding", b"\nline skip: 1\nencoding", 1))
    with pytest.raises(InputError, match="behind lines"):
        images.load(path)
    path = write_itk(tmp_path / "a.mha", packed=True)
    held = path.read_bytes()
    path.write_bytes(held + b"behind it")
    assert images.load(path).warnings == ("9 bytes behind the zlib data were ignored",)
    size = int(re.search(rb"CompressedDataSize = (\d+)", held)[1])
    path.write_bytes(held.replace(b"Size = %d" % size, b"Size = %d" % (size - 20)))
    with pytest.raises(InputError, match="packed bytes, there are"):
        images.load(path)
    path.write_bytes(held[:-size] + zlib.compress(HEAD.tobytes(order="F")[:-2]))
    with pytest.raises(InputError, match="truncated: the header declares"):
        images.load(path)


@pytest.mark.fault(10, 11)
@pytest.mark.parametrize("name", ("a.mgz", "a.mgh", "a.nrrd", "a.mha"))
def test_a_shear_and_unusual_voxels_are_told_of_every_format(tmp_path, name):
    def read(affine):
        if "mg" in name:
            nib.save(nib.MGHImage(HEAD, affine), tmp_path / name)
        else:
            write_itk(tmp_path / name, affine=affine)
        return images.load(tmp_path / name)

    assert read(rigid()).warnings == ()
    sheared = rigid() @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    volume = read(sheared)
    np.testing.assert_allclose(volume.affine, sheared, atol=2e-6)  # found: 1.3e-7
    images.save(tmp_path / "same.nii", HEAD, sheared)
    assert volume.warnings == images.load(tmp_path / "same.nii").warnings
    assert "sheared by" in volume.warnings[0]
    assert read(rigid((1.0, 1, 80))).warnings == ("the voxel size 1 x 1 x 80 mm is unusual: check the units",)


@pytest.mark.fault(11)
def test_a_negative_voxel_size_is_told_with_what_is_made_of_it(tmp_path):
    """As nibabel and SimpleITK: the axis runs the other way."""
    nib.save(nib.MGHImage(HEAD.astype("f4"), rigid()), tmp_path / "a.mgh")
    head = bytearray((tmp_path / "a.mgh").read_bytes())
    head[30:34] = struct.pack(">f", -1)
    (tmp_path / "a.mgh").write_bytes(head)
    text = write_itk(tmp_path / "a.mha", affine=np.diag([1.0, 1, 3, 1])).read_bytes()
    (tmp_path / "a.mha").write_bytes(text.replace(b"ElementSpacing = 1 1 3", b"ElementSpacing = -1 1 3"))
    (tmp_path / "a.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nspacings: -1 1 3\nencoding: raw\nendian: little\n\n"
        + HEAD.astype("<i2").tobytes(order="F")
    )
    for name in ("a.mgh", "a.mha", "a.nrrd"):
        volume = images.load(tmp_path / name)
        assert "the voxel size is negative (-1 x 1" in volume.warnings[0], name
        assert min(volume.spacing) > 0
        if name == "a.mgh":
            # As above; found: 1e-6
            np.testing.assert_allclose(volume.affine, nib.load(tmp_path / name).affine, atol=2e-6)
        else:
            direction = np.reshape(sitk.ReadImage(str(tmp_path / name)).GetDirection(), (3, 3))
            np.testing.assert_allclose(np.sign(np.diag(volume.affine)[:3]), np.diag(LPS[:3, :3] @ direction))


@pytest.mark.fault(1)
@pytest.mark.parametrize("name", ("a.mha", "a.mhd"))
def test_a_plain_metaimage_that_ends_early_is_one_line(tmp_path, capfd, name):
    """MetaIO would write lines of its own to standard error."""
    write_itk(tmp_path / name)
    held = tmp_path / name if name == "a.mha" else tmp_path / "a.raw"
    held.write_bytes(held.read_bytes()[:-60])
    with pytest.raises(InputError, match="truncated: the header declares 420 bytes, the file holds 360") as error:
        images.load(tmp_path / name)
    assert error.value.what == str(held)
    assert capfd.readouterr() == ("", "")


def test_headers_that_lie_are_refused_before_anything_is_allocated(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(
        b"NRRD0004\ntype: float\ndimension: 3\nsizes: 90000 90000 90000\nencoding: raw\nendian: little\n\n1234"
    )
    (tmp_path / "a.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 90000 90000 90000\n"
        b"ElementType = MET_FLOAT\nElementDataFile = LOCAL\n1234"
    )
    (tmp_path / "b.mhd").write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 9 9 9\nElementType = MET_FLOAT\nElementDataFile = gone.raw\n"
    )
    for name, reason in (("a.nrrd", "truncated"), ("a.mha", "truncated"), ("b.mhd", "gone.raw: no such file")):
        with pytest.raises(InputError, match=reason):
            images.load(tmp_path / name)


@pytest.mark.parametrize("name", ("a.mgz", *ITK_NAMES))
def test_another_file_under_the_name_is_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else" * 20)
    with pytest.raises(InputError, match="begins with"):
        images.load(tmp_path / name)


def test_without_simpleitk_the_hint_says_what_to_install(tmp_path, monkeypatch):
    path = write_itk(tmp_path / "a.nrrd")
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    with pytest.raises(ResourceError, match=r"need SimpleITK \(pip install"):
        images.load(path)


def test_the_hash_covers_every_file_of_an_image(tmp_path):
    path = write_itk(tmp_path / "a.mhd")
    before = images.sha256(path)
    data = formats.parts(path)[1]
    raw = bytearray(data.read_bytes())
    raw[5] ^= 1
    data.write_bytes(raw)
    assert images.sha256(path) != before


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_every_suffix_is_known_to_names_lists_and_folders(tmp_path, suffix):
    path = tmp_path / f"scan{suffix}"
    assert images.is_image(path) and images.stem(path) == "scan"
    assert subject_ids([path]) == ["scan"]
    (tmp_path / "list.csv").write_text(f"scan{suffix};later;words\n")
    assert read_list(tmp_path / "list.csv") == [path]


def test_a_label_of_another_format_lies_on_its_image(tmp_path):
    write_itk(tmp_path / "image.nrrd")
    label = (HEAD > 400).astype(np.uint8)
    nib.save(nib.MGHImage(label, rigid()), tmp_path / "label.mgz")
    like = images.load(tmp_path / "image.nrrd")
    np.testing.assert_array_equal(images.load_label(tmp_path / "label.mgz", like).data, label)


@pytest.mark.parametrize("name", ITK_NAMES)
def test_bytes_in_a_name_that_are_no_text_are_refused_before_they_reach_simpleitk(tmp_path, name):
    """Ended the process: std::logic_error."""
    path = tmp_path / f"\udce4{name}"
    try:
        write_itk(tmp_path / name).rename(path)
    except OSError:
        pytest.skip("this disk takes text for names only")
    with pytest.raises(InputError, match="no UTF-8"):
        images.load(path)


@pytest.mark.parametrize(
    ("field", "axes", "told"),
    [
        ("Space: RAS", "RAS", ""),
        ("space: left-anterior-superior", "LAS", ""),
        ("space: scanner-xyz", "LPS", "names no directions of the body"),
        ("space dimension: 3", "LPS", "names no directions of the body"),
        ("spacings: 1 1 3", "LPS", "no orientation"),
    ],
)
def test_what_an_nrrd_says_of_its_space_is_taken_or_told(tmp_path, field, axes, told):
    raw = HEAD.astype("<i2").tobytes(order="F")
    place = "" if "spacings" in field else "space directions: (1,0,0) (0,1,0) (0,0,3)\nspace origin: (1,2,3)\n"
    text = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nencoding: raw\nendian: little\n{field}\n{place}\n"
    (tmp_path / "a.nrrd").write_bytes(text.encode() + raw)
    found = images.load(tmp_path / "a.nrrd")
    assert axis_codes(found.affine) == axes
    assert [told in warning for warning in found.warnings] == [True] * bool(told)


@pytest.mark.parametrize("name", [*ITK_NAMES, "a.mgz", "a.mgh"])
def test_a_nifti_file_under_another_formats_name_is_told_so(tmp_path, name):
    """Was "copy or download the file again"."""
    nib.save(nib.Nifti1Image(HEAD, rigid()), tmp_path / "x.nii.gz")
    (tmp_path / "x.nii.gz").rename(tmp_path / name)
    with pytest.raises(InputError, match="but a NIfTI image") as caught:
        images.load(tmp_path / name)
    assert ".nii" in caught.value.hint


def test_one_format_under_anothers_name_is_told_so(tmp_path):
    write_itk(tmp_path / "x.nrrd").rename(tmp_path / "x.mha")
    with pytest.raises(InputError, match="is not a MetaImage file but an NRRD file") as caught:
        images.load(tmp_path / "x.mha")
    assert ".nrrd" in caught.value.hint


@pytest.mark.parametrize(("slope", "offset", "told"), [("1", "0", False), ("2.5", "10", True), ("1", "-1024", True)])
def test_a_metaimages_intensity_scaling_is_told(tmp_path, slope, offset, told):
    """SimpleITK does not apply it, and says nothing."""
    lines = f"ElementToIntensityFunctionSlope = {slope}\nElementToIntensityFunctionOffset = {offset}\nElementType"
    path = write_itk(tmp_path / "a.mha")
    path.write_bytes(path.read_bytes().replace(b"ElementType", lines.encode(), 1))
    found = images.load(path)
    assert [warning.startswith("its intensity scaling") for warning in found.warnings] == [True] * told


def test_the_formats_and_the_endings_of_their_files_are_these():
    """The longest first, so that none of a name is left."""
    assert [(each.name, each.suffixes) for each in formats.FORMATS] == [
        ("NIfTI", (".nii.gz", ".nii", ".hdr.gz", ".img.gz", ".hdr", ".img")),
        ("FreeSurfer MGH", (".mgh.gz", ".mgz", ".mgh")),
        ("NRRD", (".nrrd", ".nhdr")),
        ("MetaImage", (".mha", ".mhd")),
    ]
    assert formats.NAMES == "NIfTI, FreeSurfer MGH, NRRD or MetaImage"


def put(path, data=HEAD, affine=None):
    """An image of the format that its name says."""
    affine = rigid() if affine is None else affine
    if path.suffix in (".mgh", ".mgz"):
        nib.save(nib.MGHImage(data, affine), path)
    elif path.suffix == ".nii":
        nib.save(nib.Nifti1Image(data, affine), path)
    else:
        write_itk(path, data, affine)
    return path


@pytest.mark.parametrize("name", ("a.nii", "a.mgh", "a.mgz", "a.nrrd", "a.mha"))
def test_the_limit_of_voxels_is_the_last_number_that_is_taken_of_every_format(tmp_path, name):
    path = put(tmp_path / name)
    assert images.load(path, max_voxels=HEAD.size).data.size == HEAD.size
    with pytest.raises(InputError, match=f"7 x 6 x 5 voxels are more than the limit of {HEAD.size - 1}"):
        images.load(path, max_voxels=HEAD.size - 1)


@pytest.mark.parametrize("dtype", ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"))
@pytest.mark.parametrize("name", ("a.nrrd", "a.mha"))
def test_every_type_of_voxels_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, name, dtype):
    data = (HEAD % 120).astype(dtype)
    path = write_itk(tmp_path / name, data)
    monkeypatch.setattr(formats, "CHUNK_BYTES", 80)
    volume = images.load(path)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.meta["stored_dtype"] == np.dtype(dtype).name


def mgh(path, at, value, form=">i"):
    """An .mgh file with one field of its header changed."""
    put(path, HEAD)
    held = bytearray(path.read_bytes())
    struct.pack_into(form, held, at, value)
    path.write_bytes(held)
    return path


def test_unsigned_and_unknown_types_of_mgh_and_sizes_that_cannot_be(tmp_path):
    """Type 10 is what newer programs write; nibabel does not know it."""
    volume = images.load(mgh(tmp_path / "a.mgh", 20, 10))
    np.testing.assert_array_equal(volume.data, HEAD)
    assert volume.meta["stored_dtype"] == "uint16"
    for at, value, told in ((20, 7, "unknown type 7"), (4, 0, "impossible dimensions"), (16, -1, "impossible dim")):
        with pytest.raises(InputError, match=told):
            images.load(mgh(tmp_path / "b.mgh", at, value))
    with pytest.raises(InputError, match="begins with"):
        images.load(mgh(tmp_path / "c.mgh", 0, 2))
    for size, told in ((0.0, "orientation is unusable"), (1e9, "is impossible")):
        with pytest.raises(InputError, match=told):
            images.load(mgh(tmp_path / "d.mgh", 30, size, ">f"))


@pytest.mark.parametrize("name", ("a.nrrd", "a.mha"))
def test_what_is_no_volume_of_real_numbers_is_refused(tmp_path, name):
    path = tmp_path / name
    flat, colours = HEAD[..., 0].T, np.stack([HEAD.T] * 3, -1)
    sitk.WriteImage(sitk.GetImageFromArray(flat), str(path))
    with pytest.raises(InputError, match="is a 2-D image of 7 x 6"):
        images.load(path)
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(path))
    with pytest.raises(InputError, match="vectors, colours or complex numbers in each voxel"):
        images.load(path)


@pytest.mark.parametrize(
    ("name", "form", "orientation", "order"),
    [
        ("a.mgh", "MGH", "vox2ras", "big"),
        ("a.mgz", "MGH", "vox2ras", "big"),
        ("a.nrrd", "NRRD", "patient", "little"),
        ("a.mhd", "MetaImage", "patient", "little"),
    ],
)
def test_the_facts_of_every_format_are_complete(tmp_path, name, form, orientation, order):
    meta = images.load(put(tmp_path / name)).meta
    assert meta == {
        "path": str(tmp_path / name),
        "format": form,
        "byte_order": order,
        "stored_dtype": "int16",
        "stored_shape": (7, 6, 5),
        "volumes": 1,
        "volume": 0,
        "slope": 1.0,
        "inter": 0.0,
        "units": "mm",
        "orientation": orientation,
        "space_code": 1,
        "nan_count": 0,
        "min": float(HEAD.min()),
        "max": float(HEAD.max()),
    }


def test_a_place_that_is_not_said_is_none(tmp_path):
    raw = HEAD.astype("<i2").tobytes(order="F")
    head = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 7 6 5\nencoding: raw\nendian: little\n"
    (tmp_path / "a.nrrd").write_bytes(head + b"\n" + raw)
    assert images.load(tmp_path / "a.nrrd").meta["orientation"] == "none"
    placed = b"space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\n\n"
    (tmp_path / "b.nrrd").write_bytes(head + placed + raw)
    assert images.load(tmp_path / "b.nrrd").meta["orientation"] == "patient"
    assert images.load(mgh(tmp_path / "c.mgh", 28, 0, ">h")).meta["orientation"] == "none"


def test_a_data_file_below_its_header_belongs_to_the_image(tmp_path):
    path = write_itk(tmp_path / "a.mhd")
    (tmp_path / "raw").mkdir()
    (tmp_path / "a.raw").rename(tmp_path / "raw" / "b.raw")
    path.write_bytes(path.read_bytes().replace(b"= a.raw", b"= raw/b.raw"))
    assert formats.parts(path) == (path, tmp_path / "raw" / "b.raw")
    np.testing.assert_array_equal(images.load(path).data, HEAD)


def test_packed_voxels_behind_a_header_of_their_own_file(tmp_path):
    """MetaImage's HeaderSize, which SimpleITK passes over as well; of a file alone they stand behind the text."""
    path = write_itk(tmp_path / "a.mhd", packed=True)
    raw = formats.parts(path)[1]
    packed = raw.read_bytes()
    text = path.read_bytes().replace(b"ElementDataFile", b"HeaderSize = 40\nElementDataFile")
    path.write_bytes(text)
    raw.write_bytes(bytes(40) + packed)
    np.testing.assert_array_equal(images.load(path).data, HEAD)
    damage(raw, -2)
    with pytest.raises(InputError, match="the zlib checksum is wrong"):
        images.load(path)


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_a_small_header_may_stand_before_any_number_of_voxels(tmp_path, name):
    """What the files of an image hold together bounds it, not what its header alone could hold packed."""
    large = np.zeros((96, 96, 96), np.uint8)
    large[3, 4, 5] = 7
    path = write_itk(tmp_path / name, large)
    assert path.stat().st_size * DEFLATE_LIMIT < large.size
    np.testing.assert_array_equal(images.load(path).data, large)


def write_list(path, place, kind="list", volumes=3):
    """An NRRD of several volumes whose axis of that kind stands at ``place``, as of 3 as 3D Slicer and unu write it."""
    data = np.stack([HEAD + n for n in range(volumes)], place)
    axes = ["(1,0,0)", "(0,2,0)", "(0,0,3)"]
    axes.insert(place, "none")
    kinds = ["domain"] * 3
    kinds.insert(place, kind)
    lines = ["NRRD0004", "type: int16", "dimension: 4", "space: left-posterior-superior", "encoding: raw"]
    lines += ["endian: little", "space origin: (5,6,7)", f"sizes: {' '.join(map(str, data.shape))}"]
    lines += [f"space directions: {' '.join(axes)}", f"kinds: {' '.join(kinds)}", "", ""]
    path.write_bytes("\n".join(lines).encode() + data.astype("<i2").tobytes("F"))
    return path


@pytest.mark.parametrize("place", (0, 1, 3))
def test_the_list_axis_of_an_nrrd_holds_volumes_wherever_it_stands(tmp_path, place):
    path = write_list(tmp_path / "a.nrrd", place)
    for n in range(3):
        volume = images.load(path, volume=n)
        np.testing.assert_array_equal(volume.data, HEAD + n)
        np.testing.assert_array_equal(volume.affine, LPS @ [[1, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    for wrong, told in ((None, "4-D image with 3 volumes .*--volume, 0 to 2"), (3, "no volume 3 .*0 to 2")):
        with pytest.raises(InputError, match=told):
            images.load(path, volume=wrong)
    np.testing.assert_array_equal(images.load(write_list(path, place, volumes=1)).data, HEAD)


def test_axes_of_an_nrrd_that_are_no_volumes_are_refused_with_what_to_write(tmp_path):
    for kind in ("vector", "RGB-color"):  # what a voxel holds
        with pytest.raises(InputError, match="has vectors, colours"):
            images.load(write_list(tmp_path / "a.nrrd", 0, kind), volume=0)
    for kind in ("time", "???"):  # of no space, and no list: ITK reads none of them
        with pytest.raises(InputError, match=r"which axis .*`kinds: list domain domain domain`"):
            images.load(write_list(tmp_path / "a.nrrd", 0, kind), volume=0)
    plain = write_list(tmp_path / "a.nrrd", 0).read_bytes()
    lines = [line for line in plain.splitlines(keepends=True) if not line.startswith((b"space", b"kinds"))]
    (tmp_path / "b.nrrd").write_bytes(b"".join(lines).replace(b"encoding", b"spacings: nan 1 2 3\nencoding"))
    with pytest.raises(InputError, match="axis 0 has no voxel size"):
        images.load(tmp_path / "b.nrrd", volume=0)


def write_slices(folder, names, of="mhd", named=None):
    """HEAD as a header and a file for each slice; ``named`` in the header's place of ``names``."""
    for name, plane in zip(names, np.moveaxis(HEAD, 2, 0), strict=False):
        plane.astype("<i2").T.tofile(folder / name)
    sizes = " ".join(map(str, HEAD.shape))
    text = {
        "mhd": f"NDims = 3\nBinaryData = True\nElementSpacing = 1 1 3\nDimSize = {sizes}\nElementType = MET_SHORT\n"
        "ElementDataFile = ",
        "nhdr": f"NRRD0004\ntype: int16\ndimension: 3\nsizes: {sizes}\nspace: left-posterior-superior\n"
        "space directions: (1,0,0) (0,1,0) (0,0,3)\nspace origin: (0,0,0)\nendian: little\nencoding: raw\ndata file: ",
    }[of]
    path = folder / f"a.{of}"
    path.write_text(text + (named or "\n".join(["LIST", *names])) + "\n")
    return path


SLICES = [f"s{i:02d}.raw" for i in range(HEAD.shape[2])]


@pytest.mark.parametrize("of", ["mhd", "nhdr"])
@pytest.mark.parametrize("named", [None, f"s%02d.raw 0 {len(SLICES) - 1} 1"])
def test_slices_in_files_of_their_own_are_read_and_belong_to_the_image(tmp_path, of, named):
    path = write_slices(tmp_path, SLICES, of, named)
    np.testing.assert_array_equal(images.load(path).data, HEAD)
    assert formats.parts(path) == (path, *(tmp_path / name for name in SLICES))


@pytest.mark.fault(1)
def test_slices_without_a_file_or_a_whole_one_are_no_empty_slices(tmp_path):
    """MetaIO gives zeros for what a list does not name."""
    path = write_slices(tmp_path, SLICES, named="\n".join(["LIST", *SLICES[:-2]]))
    with pytest.raises(InputError, match="names 3 data files for 5 slices"):
        images.load(path)
    path = write_slices(tmp_path, SLICES, named=f"LIST 3\n{SLICES[0]}")
    with pytest.raises(InputError, match="several slices each"):
        images.load(path)
    path = write_slices(tmp_path, SLICES)
    (tmp_path / SLICES[1]).write_bytes(b"short")
    with pytest.raises(InputError, match=r"s01\.raw: truncated: the header declares a slice of 7 x 6, 84 bytes"):
        images.load(path)
    (tmp_path / SLICES[1]).unlink()
    with pytest.raises(InputError, match=r"s01\.raw: no such file"):
        images.load(path)
    with pytest.raises(InputError, match="which is no pattern"):
        images.load(write_slices(tmp_path, SLICES, named="s%q.raw 0 4 1"))


@pytest.mark.parametrize("of", ["mhd", "nhdr"])
@pytest.mark.parametrize("named", ["/etc/hostname", "../other.raw", "b/../../other.raw", "LIST\n../other.raw", "."])
def test_a_header_names_no_file_outside_its_folder(tmp_path, of, named):
    """Voxels made of any file of the machine, a device that never ends, or a traceback."""
    (tmp_path / "in" / "b").mkdir(parents=True)
    HEAD.astype("<i2").T.tofile(tmp_path / "other.raw")
    path = write_slices(tmp_path / "in", [], of, named)
    with pytest.raises(InputError, match=r"outside its own folder|not a regular file"):
        images.load(path)
    path = write_slices(tmp_path / "in", [], of, str(tmp_path / "in" / "b" / "x.raw"))
    HEAD.astype("<i2").T.tofile(tmp_path / "in" / "b" / "x.raw")
    np.testing.assert_array_equal(images.load(path).data, HEAD)  # the whole path of one below it


@pytest.mark.parametrize(
    "old, new, told",
    [
        (r"NDims = 3\n", "", "has no NDims"),
        (r"NDims = 3", "NDims = 30", "impossible dimensions: NDims 30"),
        (r"DimSize = 7 6 5", "DimSize = 7 6", "impossible dimensions: NDims 3, DimSize 7 6"),
        (r"DimSize = 7 6 5", "DimSize = 7 -6 5", "impossible dimensions"),
        (r"ElementDataFile.*", "", "has no ElementDataFile"),
        (r"(NDims = 3)\n(TransformMatrix.*)\n", r"\2\n\1\n", "in front of NDims"),
        (r"BinaryData = True", "BinaryData = False", "truncated: 210 voxels are declared, the file holds"),
    ],
)
def test_metaimages_that_cannot_be_parsed_are_one_line(tmp_path, capfd, old, new, told):
    """MetaIO says it in lines of its own, and its last reason is another one."""
    path = write_itk(tmp_path / "a.mha")
    text = path.read_bytes().replace(b"BinaryData = True\n", b"", 1) if "Transform" in old else path.read_bytes()
    text = re.sub(rb"(BinaryDataByteOrderMSB|CompressedData) = \w+\n", b"", text)
    text = re.sub(old.encode(), new.encode(), text, count=1)
    path.write_bytes(text)
    with pytest.raises(InputError, match=told):
        images.load(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_a_file_that_is_packed_as_a_whole_says_so(tmp_path, name):
    path = write_itk(tmp_path / name)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="packed with gzip as a whole"):
        images.load(path)
