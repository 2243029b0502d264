"""Image files of every format of the registry: geometry and voxels against nibabel and SimpleITK, damage."""

import nibabel as nib
import numpy as np
import pytest
from nifti_files import HEAD, rigid

from fastsrgan.errors import InputError, ResourceError
from fastsrgan.io import formats
from fastsrgan.io import nifti as images
from fastsrgan.io.tables import read_list, subject_ids

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
