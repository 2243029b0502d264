"""Images read and written as nibabel does, over types, byte orders, formats and orientations."""

import gzip
import hashlib
import os
import resource
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import HEAD, OBLIQUE, oracle, qform_fields, rigid, write

from fastsrgan.errors import InputError, ResourceError, UsageError
from fastsrgan.io import nifti as images
from fastsrgan.io.nifti_voxels import CHUNK_BYTES
from fastsrgan.volume.geometry import Orientation, Volume, spacing_of

DTYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
quick = settings(max_examples=25, deadline=None)
angles = st.tuples(*[st.floats(-3.1, 3.1)] * 3)
spacings = st.tuples(*[st.floats(0.2, 6)] * 3)
shapes = st.tuples(*[st.integers(1, 6)] * 3)
affines = st.builds(rigid, spacings, angles, st.tuples(*[st.floats(-200, 200)] * 3))


def assert_same_image(path, volume, rtol=1e-6):
    data, affine = oracle(path)
    np.testing.assert_allclose(volume.data, data.reshape(volume.data.shape), rtol=rtol, atol=0)  # found: 0 (rounding)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)  # found: 0 (rounding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


# Reading


@quick
@given(
    st.sampled_from(DTYPES),
    st.sampled_from("<>"),
    st.sampled_from([1, 2]),
    st.sampled_from(["a.nii", "a.nii.gz", "a.hdr", "a.img"]),
    st.sampled_from([(1.0, 0.0), (0.0, 5.0), (0.5, -3.0), (np.nan, np.nan)]),
    affines,
    shapes,
)
def test_every_kind_of_file_reads_as_in_nibabel(folder, dtype, order, version, name, scaling, affine, shape):
    data = np.random.default_rng(0).integers(0, 120, shape).astype(dtype)
    slope, inter = scaling
    path = write(folder / name, data, affine, version=version, order=order, slope=slope, inter=inter)
    volume = images.load(path)
    assert_same_image(path, volume)
    assert volume.data.dtype == np.float32
    assert volume.data.shape == shape
    assert volume.meta["stored_dtype"] == np.dtype(dtype).name
    assert volume.meta["byte_order"] == ("little" if order == "<" else "big")
    assert volume.meta["format"] == f"NIfTI-{version}"
    np.testing.assert_allclose(volume.spacing, spacing_of(affine), rtol=1e-6)  # found: 4.4e-8 (rounding)
    shape_warnings = [w for w in volume.warnings if "constant" not in w and "negative" not in w]
    assert shape_warnings == []


@quick
@given(st.sampled_from(DTYPES), st.sampled_from("<>"), st.sampled_from([(1.0, 0.0), (0.25, -7.0), (-0.5, 9.0)]))
def test_load_stored_keeps_integers_and_says_how_to_scale_them(folder, dtype, order, scaling):
    data = np.random.default_rng(1).integers(0, 120, (4, 3, 5)).astype(dtype)
    path = write(folder / "s.nii.gz", data, slope=scaling[0], inter=scaling[1], order=order)
    stored, slope, inter, volume = images.load_stored(path)
    assert stored is volume.data
    if np.dtype(dtype).kind == "f":
        assert (stored.dtype, slope, inter) == (np.float32, 1.0, 0.0)
    else:
        assert stored.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(stored, data)
    expected = images.load(path)
    np.testing.assert_allclose(stored * slope + inter, expected.data, rtol=1e-6)  # found: 0 (rounding)
    assert (volume.meta["min"], volume.meta["max"]) == pytest.approx((expected.meta["min"], expected.meta["max"]))
    assert volume.warnings == expected.warnings


def test_a_volume_larger_than_one_piece_is_whole_and_costs_little_more_than_itself(tmp_path):
    data = np.random.default_rng(2).integers(0, 5, (200, 180, 170)).astype(">i2")
    path = write(tmp_path / "big.nii.gz", data, order=">", slope=2.0)
    assert data.nbytes > 2 * CHUNK_BYTES
    tracemalloc.start()
    volume = images.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(volume.data, data.astype(np.float32) * 2)
    assert peak < volume.data.nbytes + 12 * CHUNK_BYTES


@pytest.mark.fault(7)
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_one_volume_of_a_series_is_chosen_by_index(tmp_path, gz):
    series = np.stack([HEAD + 1000 * t for t in range(3)], axis=-1)
    path = write(tmp_path / f"series.nii{gz}", series)
    with pytest.raises(InputError, match=r"4-D image with 3 volumes.*--volume, 0 to 2"):
        images.load(path)
    for t in range(3):
        np.testing.assert_array_equal(images.load(path, volume=t).data, series[..., t])
    for wrong in (3, -1):
        with pytest.raises(InputError, match=f"no volume {wrong}"):
            images.load(path, volume=wrong)


@pytest.mark.fault(7)
@pytest.mark.parametrize("shape", [(7, 6, 5, 1), (7, 6, 5, 1, 1, 1)])
def test_a_series_of_one_is_a_volume(tmp_path, shape):
    volume = images.load(write(tmp_path / "one.nii.gz", HEAD.reshape(shape)))
    np.testing.assert_array_equal(volume.data, HEAD)


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    raw = write(tmp_path / "a.nii").read_bytes()
    (tmp_path / "packed.nii").write_bytes(gzip.compress(raw))
    (tmp_path / "plain.nii.gz").write_bytes(raw)
    for name in ("packed.nii", "plain.nii.gz"):
        np.testing.assert_array_equal(images.load(tmp_path / name).data, HEAD)


def test_gzip_of_many_members_and_padding_reads_whole(tmp_path):
    raw = write(tmp_path / "a.nii").read_bytes()
    members = [gzip.compress(raw[i : i + 50]) for i in range(0, len(raw), 50)]
    path = tmp_path / "blocks.nii.gz"
    path.write_bytes(b"".join(members) + gzip.compress(b"") + bytes(1000))
    volume = images.load(path)
    np.testing.assert_array_equal(volume.data, HEAD)
    assert volume.warnings == ()


# Place in the world


@pytest.mark.fault(9)
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, False), (True, True, True)])
def test_permuted_left_handed_and_oblique_grids_are_kept(tmp_path, axes, flips):
    turn = Orientation(axes, flips)
    path = write(tmp_path / "o.nii.gz", turn.apply(HEAD), turn.affine(rigid(), HEAD.shape))
    volume = images.load(path)
    np.testing.assert_array_equal(volume.data, turn.apply(HEAD))
    np.testing.assert_allclose(volume.affine, turn.affine(rigid(), HEAD.shape), atol=1e-5)  # found: 1.1e-6
    assert volume.warnings == ()


@quick
@given(affines, st.sampled_from([1, -1]))
def test_a_qform_alone_places_the_grid_as_in_nibabel(folder, affine, hand):
    affine = affine @ np.diag([hand, 1, 1, 1])
    path = write(folder / "q.nii", HEAD, affine, sform_code=0, **qform_fields(affine))
    volume = images.load(path)
    assert_same_image(path, volume)
    assert volume.meta["orientation"] == "qform"
    assert volume.warnings == ()


@pytest.mark.fault(8)
def test_a_conflict_of_sform_and_qform_is_told_and_the_sform_chosen(tmp_path):
    moved = rigid()
    moved[:3, 3] += 4
    volume = images.load(write(tmp_path / "c.nii", HEAD, rigid(), **qform_fields(moved)))
    np.testing.assert_allclose(volume.affine, rigid(), atol=1e-6)  # found: 4e-8 (rounding)
    assert any("sform and qform" in w and "6.93 mm apart: the sform is used" in w for w in volume.warnings)
    for shift, turn, told in ((0.4, 0.0, True), (0.02, 0.0, False), (0.0, 0.01, True), (0.0, 0.001, False)):
        other = rigid(turn=(0.3, -0.2, 0.5 + turn))
        other[0, 3] += shift
        near = images.load(write(tmp_path / "c.nii", HEAD, rigid(), **qform_fields(other)))
        assert any("sform and qform" in w for w in near.warnings) == told
    agreed = images.load(write(tmp_path / "c.nii", HEAD, rigid(), **qform_fields(rigid())))
    assert agreed.warnings == ()


@pytest.mark.fault(8)
def test_without_any_orientation_the_voxel_size_is_used_and_told(tmp_path):
    volume = images.load(write(tmp_path / "n.nii", HEAD, sform_code=0))
    np.testing.assert_allclose(volume.affine, np.diag([1, 1.2, 3, 1]), atol=1e-6)  # found: 4.8e-8 (rounding)
    assert any("no orientation" in w for w in volume.warnings)
    assert volume.meta["orientation"] == "pixdim"


def test_an_unusable_sform_gives_way(tmp_path):
    for broken in (0.0, np.nan):
        path = write(tmp_path / "b.nii", HEAD, srow_x=broken, srow_y=broken, **qform_fields(rigid()))
        volume = images.load(path)
        np.testing.assert_allclose(volume.affine, rigid(), atol=1e-6)  # found: 4e-8 (rounding)
        assert any("sform is unusable" in w and "qform is used" in w for w in volume.warnings)


@pytest.mark.fault(10)
def test_a_shear_is_kept_and_told(tmp_path):
    volume = images.load(write(tmp_path / "shear.nii", HEAD, OBLIQUE))
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-6)  # found: 9.5e-8 (rounding)
    assert any("sheared" in w for w in volume.warnings)


@pytest.mark.fault(11)
@pytest.mark.parametrize(("code", "name", "mm"), [(1, "metre", 1000.0), (3, "micrometre", 0.001)])
def test_other_units_become_millimetres(tmp_path, code, name, mm):
    stored = np.diag([1 / mm] * 3 + [1]) @ rigid()
    volume = images.load(write(tmp_path / "u.nii", HEAD, stored, units=code))
    np.testing.assert_allclose(volume.affine, rigid(), rtol=1e-6, atol=1e-4)  # found: 2.7e-4 of it
    assert any(f"{name}s" in w and "1 x 1.2 x 3 mm" in w for w in volume.warnings)


@pytest.mark.fault(11)
def test_odd_voxel_sizes_are_told_or_refused(tmp_path):
    def read(value, **fields):
        return images.load(write(tmp_path / "p.nii", HEAD, pixdim=(1, value), **fields))

    for value in (0.0, np.nan, np.inf):
        with pytest.raises(InputError, match="impossible voxel size"):
            read(value, sform_code=0)
        assert any("ignored, the sform" in w for w in read(value).warnings)
    negative = read(-1.0, sform_code=0)
    assert negative.spacing == pytest.approx((1, 1.2, 3))
    assert any("absolute value" in w for w in negative.warnings)
    assert any("the sform's voxel size 1 x 1.2 x 3" in w for w in read(2.0).warnings)
    assert any("unusual" in w for w in read(80.0, sform_code=0).warnings)
    with pytest.raises(InputError, match="impossible"):
        read(1e9, sform_code=0)


# Writing


@quick
@given(
    st.sampled_from([*DTYPES, "?", "f2", ">i2"]),
    st.sampled_from(["w.nii", "w.nii.gz"]),
    st.sampled_from([0, 2]),
    affines,
    shapes,
)
def test_what_is_saved_is_read_back(folder, dtype, name, lead, affine, shape):
    data = np.random.default_rng(3).integers(0, 2, (*shape, *([lead] if lead else []))).astype(dtype)
    path = images.save(folder / name, data, affine, overwrite=True)
    image = nib.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), data)
    np.testing.assert_allclose(image.get_sform(), affine, atol=2e-5)  # found: 7.2e-6
    again = images.load(path, volume=lead - 1 if lead else None)
    np.testing.assert_array_equal(again.data, data[..., -1] if lead else data)
    assert again.meta["units"] == "mm"
    assert [w for w in again.warnings if "constant" not in w] == []


@quick
@given(st.sampled_from([1, 2, 4]), st.sampled_from(["w.nii", "w.nii.gz"]), affines, shapes)
def test_sform_and_qform_are_written_and_say_the_same(folder, code, name, affine, shape):
    """Programs that know one of the two place the voxels alike, in the same world."""
    header = nib.load(images.save(folder / name, np.ones(shape, np.uint8), affine, overwrite=True, code=code)).header
    sform, qform = header.get_sform(coded=True), header.get_qform(coded=True)
    assert sform[1] == qform[1] == code
    # Quaternions in float32: 2e-5 of the largest number, as for the sform.
    scale = max(1.0, np.abs(affine).max())
    np.testing.assert_allclose(qform[0], sform[0], atol=2e-5 * scale)  # found: 0.025 of it, over 25 examples
    np.testing.assert_allclose(sform[0], affine, atol=2e-5 * scale)  # found: 0.0024 of it; float32 in the file


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "i8", "u8"])
def test_integers_are_rounded_and_clipped(tmp_path, dtype):
    info = np.iinfo(dtype)
    data = np.array([-1e30, -0.6, 0.4, 0.6, 1.5, 41.7, 1e30, float(info.max)]).reshape(2, 2, 2)
    path = images.save(tmp_path / "i.nii", data, np.eye(4), dtype=dtype)
    low = max(info.min, -1)
    expected = np.array([info.min, low, 0, 1, 2, 42, info.max, info.max], dtype).reshape(2, 2, 2)
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), expected)
    wide = np.array([-5, 300, 70000, 2**40, -(2**40), 0, 1, 2]).reshape(2, 2, 2)
    path = images.save(path, wide, np.eye(4), dtype=dtype, overwrite=True)
    clipped = [min(max(int(v), info.min), info.max) for v in wide.ravel()]
    assert np.asarray(nib.load(path).dataobj).ravel().tolist() == clipped


def test_non_finite_voxels_are_never_stored_as_integers(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        images.save(tmp_path / "n.nii", np.full((2, 2, 2), np.nan), np.eye(4), dtype=np.int16)
    assert os.listdir(tmp_path) == []


@pytest.mark.fault(10)
def test_a_sheared_affine_is_kept_exactly_by_the_sform_alone(tmp_path):
    path = images.save(tmp_path / "s.nii.gz", HEAD, OBLIQUE)
    header = nib.load(path).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)
    np.testing.assert_allclose(images.load(path).affine, OBLIQUE, atol=1e-6)  # found: 9.5e-8 (rounding)


def test_long_axes_are_written_as_nifti_2(tmp_path):
    path = images.save(tmp_path / "long.nii", np.ones((40000, 1, 1), np.uint8), np.eye(4))
    assert images.load(path).meta["format"] == "NIfTI-2"
    assert nib.load(path).shape == (40000, 1, 1)


@pytest.mark.fault(26)
def test_an_existing_file_is_kept_unless_told(tmp_path):
    path = images.save(tmp_path / "k.nii.gz", HEAD, np.eye(4))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        images.save(path, HEAD + 1, np.eye(4))
    assert path.read_bytes() == before
    images.save(path, HEAD + 1, np.eye(4), overwrite=True)
    np.testing.assert_array_equal(images.load(path).data, HEAD + 1)
    images.save(path, HEAD, np.eye(4), overwrite=True)
    assert path.read_bytes() == before  # no time or name inside: the same image is the same bytes


@pytest.mark.fault(24)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = images.save(tmp_path / "f.nii", HEAD, np.eye(4))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="the size of a file"):
            images.save(path, np.zeros((99, 99, 99), np.uint8), np.eye(4), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["f.nii"]


@pytest.mark.fault(25)
def test_bad_output_places_are_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for parent in ("missing", "file"):
        with pytest.raises(ResourceError, match="folder"):
            images.check_output(tmp_path / parent / "a.nii")
    for name in ("a.png", "a.hdr", "a"):
        with pytest.raises(UsageError, match=r"\.nii or \.nii\.gz"):
            images.check_output(tmp_path / name)
    (tmp_path / "d.nii").mkdir()
    with pytest.raises(UsageError, match="folder"):
        images.check_output(tmp_path / "d.nii", overwrite=True)


# Names and sums


def test_names(tmp_path):
    for name in ("sub-01_T2w.nii.gz", "sub-01_T2w.nii", "sub-01_T2w.HDR", "sub-01_T2w.img.gz", "sub-01_T2w.NII.GZ"):
        assert images.stem(f"/some.nii/{name}") == "sub-01_T2w"
        assert images.is_image(name)
    assert images.stem("a.b.nii.gz") == "a.b"
    assert not images.is_image("list.csv")
    (tmp_path / "folder.nii").mkdir()
    assert not images.is_image(tmp_path / "folder.nii")


def test_sha256_covers_all_bytes_of_an_image(tmp_path):
    single = write(tmp_path / "a.nii.gz")
    assert images.sha256(single) == hashlib.sha256(single.read_bytes()).hexdigest()
    pair = write(tmp_path / "b.hdr")
    both = pair.read_bytes() + pair.with_suffix(".img").read_bytes()
    assert images.sha256(pair) == images.sha256(tmp_path / "b.img") == hashlib.sha256(both).hexdigest()
    with pytest.raises(InputError):
        images.sha256(tmp_path / "none.nii")
    long = tmp_path / "long.nii"  # in pieces: a change in the last of them is another image
    long.write_bytes(bytes(2 * CHUNK_BYTES) + b"end")
    assert images.sha256(long) == hashlib.sha256(bytes(2 * CHUNK_BYTES) + b"end").hexdigest()


def test_volume_of_the_contract(tmp_path):
    volume = images.load(str(write(tmp_path / "v.nii")), dtype=np.float64)
    assert isinstance(volume, Volume)
    assert volume.data.dtype == np.float64
    expected = {"path": str(tmp_path / "v.nii"), "stored_dtype": "int16", "nan_count": 0, "units": "mm", "volume": 0}
    assert expected.items() <= volume.meta.items()


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 99])
def test_the_space_is_the_one_of_the_header_unless_it_is_unknown(tmp_path, code):
    """5 is another template; what no list has is taken as aligned to another image."""
    volume = images.load(write(tmp_path / "a.nii", HEAD, sform_code=code))
    assert volume.meta["space_code"] == (code if code < 6 else 2)
    assert any("code" in told and "is unknown" in told for told in volume.warnings) == (code > 5)


@pytest.mark.parametrize(("share", "told"), [(1.005, False), (1.02, True), (0.95, True)])
def test_a_voxel_size_that_differs_from_the_sforms_by_more_than_a_hundredth_is_told(tmp_path, share, told):
    size = spacing_of(images.load(write(tmp_path / "a.nii", HEAD)).affine)
    path = write(tmp_path / "b.nii", HEAD, pixdim=(slice(1, 4), [share * n for n in size]))
    assert any("pixdim is" in warning for warning in images.load(path).warnings) == told


@pytest.mark.parametrize("scaling", [(1e-3, 98765.4321), (0.1234567, -98765.4321), (1 / 3, 1e7 + 1), (1.0, 0.1)])
def test_what_is_stored_with_a_scaling_is_the_nearest_number_for_who_reads_the_header(tmp_path, scaling):
    """The header holds both in float32, which may lie several stored numbers away from those asked for."""
    stored = np.arange(-32000, 32000, 97, dtype=np.int16).reshape(-1, 5, 4)
    slope, inter = map(np.float64, np.float32(scaling))
    path = images.save(tmp_path / "a.nii", stored * slope + inter, np.eye(4), dtype=np.int16, scaling=scaling)
    assert np.array_equal(np.asarray(nib.load(path).dataobj.get_unscaled()), stored)
    again, *read, _ = images.load_stored(path)
    assert read == [slope, inter] and np.array_equal(again, stored)


def test_a_scaled_value_is_rounded_once_and_a_wrong_volume_says_what_can_be(tmp_path):
    """In float64 until the one rounding to float32."""
    data = np.random.default_rng(0).integers(0, 2**24, (9, 8, 7)).astype(np.int32)
    slope, inter = 0.1234567, -98765.4321
    path = write(tmp_path / "a.nii", data, slope=slope, inter=inter)
    exact = data * np.float64(np.float32(slope)) + np.float64(np.float32(inter))
    np.testing.assert_array_equal(images.load(path).data, exact.astype(np.float32))
    np.testing.assert_array_equal(images.load(path, dtype=np.float64).data, exact)
    with pytest.raises(InputError, match=r"has no volume 1 .--volume can be 0.$"):
        images.load(path, volume=1)
    with pytest.raises(InputError, match=r"has no volume 2 .--volume can be 0 to 1.$"):
        images.load(write(tmp_path / "b.nii", np.stack([data, data], -1)), volume=2)
