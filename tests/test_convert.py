"""Conversion: what a store holds equals the files; faults come first; interruptions, damage and changes are mended."""

import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import nifti_files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from processes import CONTEXT, Flag, Post
from rich.console import Console

from fastsrgan import convert as convert_module
from fastsrgan.cli import console
from fastsrgan.cli.console import PlainProgress
from fastsrgan.cli.main import main
from fastsrgan.config import TrainConfig
from fastsrgan.convert import convert
from fastsrgan.core.files import LOCK
from fastsrgan.errors import FastsrganError, InputError, ModelError, PartialFailure, ResourceError, UsageError
from fastsrgan.io import nifti as images
from fastsrgan.store import files as store_files
from fastsrgan.store.reader import open_store, to_float32
from fastsrgan.store.writer import PERCENTILES, create_store, describe, encode
from fastsrgan.train.run import train
from fastsrgan.volume.placement import axis_codes

SHAPE = (21, 18, 10)
AFFINE = nifti_files.rigid()


def head(seed, dtype=np.int16, shape=SHAPE):
    random_ = np.random.default_rng(seed)
    image = random_.integers(0, 900, shape) * (random_.random(shape) < 0.7)
    image[:3] = image[:, :2] = image[..., 8:] = 0
    return image.astype(dtype)


def cohort(folder: Path, n=4, suffix=".nii.gz", shape=SHAPE, **options):
    """A table of n subjects, the last one in Test."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["HR_image,Label_image,Base"]
    for i in range(n):
        image = head(i, shape=shape)
        nifti_files.write(folder / f"s{i}{suffix}", image, AFFINE, **options)
        nifti_files.write(folder / f"l{i}.nii.gz", (image > 500).astype(np.uint8), AFFINE)
        lines.append(f"s{i}{suffix},l{i}.nii.gz,{'Test' if i == n - 1 else 'Train'}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Recorder:
    """A progress that remembers."""

    def __init__(self):
        self.lines = []

    def start(self, label, total, unit):
        self.lines.append([label, total, unit, 0, {}, "open"])

    def advance(self, n=1, **facts):
        self.lines[-1][3] += n
        self.lines[-1][4] = facts

    def finish(self):
        self.lines[-1][5] = "done"


# --- what is stored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["i2", "u1", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize(("slope", "inter"), [(1.0, 0.0), (0.137, -2.5)])
@pytest.mark.parametrize("stored", ["auto", "float32"])
def test_a_store_reads_as_the_files_do(tmp_path, dtype, slope, inter, stored):
    data = head(1).astype(dtype) if dtype != "u1" else (head(1) % 256).astype(dtype)
    nifti_files.write(tmp_path / "a.nii.gz", data, AFFINE, slope=slope, inter=inter)
    nifti_files.write(tmp_path / "a_seg.nii", (head(1) % 5).astype(np.int16), AFFINE)
    (tmp_path / "t.csv").write_text("HR_image,Label_image,Mask_image,Base\na.nii.gz,a_seg.nii,a_seg.nii,Train\n")
    convert(tmp_path / "t.csv", tmp_path / "store", dtype=stored)
    store = open_store(tmp_path / "store")
    sample, source = store.read("a"), images.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(sample.image, source.data)
    np.testing.assert_array_equal(sample.affine, source.affine)
    np.testing.assert_array_equal(sample.label, head(1) % 5)
    np.testing.assert_array_equal(sample.mask, sample.label)
    kept = np.dtype(dtype) if np.dtype(dtype).kind in "iu" and stored == "auto" else np.dtype("f4")
    (subject,) = store.subjects
    assert subject.arrays["image"]["dtype"] == kept.name


def test_attributes(tmp_path):
    table = cohort(tmp_path, 2, slope=0.5)
    convert(table, tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert [(s.id, s.split) for s in store.subjects] == [("s0", "Train"), ("s1", "Test")] and store.complete
    attrs, sample = store.subjects[0].attrs, store.read("s0")
    (x, y, z) = attrs["bounding_box"]
    inside = np.zeros(SHAPE, bool)
    inside[slice(*x), slice(*y), slice(*z)] = True
    assert not sample.image[~inside].any() and (x, y, z) == ([3, 21], [2, 18], [0, 8])
    assert attrs["intensity"]["max"] == sample.image.max() and attrs["intensity"]["min"] == 0
    assert attrs["intensity"]["mean"] == pytest.approx(sample.image.mean(dtype=float))
    assert attrs["label_counts"] == {str(v): int((sample.label == v).sum()) for v in (0, 1)}
    assert attrs["orientation"] == "".join(nib.aff2axcodes(AFFINE)) and attrs["source_dtype"] == "int16"
    assert attrs["source"]["image"] == {
        "path": str(tmp_path / "s0.nii.gz"),
        "sha256": images.sha256(tmp_path / "s0.nii.gz"),
    }
    assert attrs["source"]["label"]["path"] == str(tmp_path / "l0.nii.gz") and attrs["warnings"] == []


def test_warnings_of_the_reader_are_kept(tmp_path):
    table = cohort(tmp_path, 1)
    bad = head(0).astype(np.float32)
    bad[5, 5, 5] = np.nan
    nifti_files.write(tmp_path / "s0.nii.gz", bad, AFFINE)
    summary = convert(table, tmp_path / "store")
    assert "1 of 3780 voxels is NaN" in summary["warnings"]["s0"][0]
    assert np.isfinite(open_store(tmp_path / "store").read("s0").image).all()


def test_labels_of_other_values_than_0_and_1_are_said_and_not_trained_on(tmp_path):
    table = cohort(tmp_path, 3)
    nifti_files.write(tmp_path / "l0.nii.gz", (head(0) > 500).astype(np.uint8) * 255, AFFINE)
    nifti_files.write(tmp_path / "l2.nii.gz", (head(2) // 250).astype(np.uint8), AFFINE)
    summary = convert(table, tmp_path / "store")
    assert set(summary["warnings"]) == {"s0", "s2"}
    (told,) = summary["warnings"]["s0"]
    assert told.startswith("label: holds 0, 255; training wants 1 in the structure")
    assert told.endswith("--label-classes 255 takes that value for the structure")  # one value is no choice of 3,42
    assert open_store(tmp_path / "store").subject("s0").attrs["warnings"] == [told]
    config = TrainConfig(new_low_res=((1.5, 1.5, 3.0),), patch_size=16, kernel_gen=1, kernel_dis=1)
    with pytest.raises(InputError, match=r"than 0 and 1: s0 \(also 255\), s2 \(also 2, 3\) \(make each label 1"):
        train(tmp_path / "store", tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


arrays = hnp.arrays(
    st.sampled_from([np.int16, np.uint8, np.uint16, np.int32, np.float32]),
    st.tuples(*[st.integers(1, 5)] * 3),
    elements={"min_value": 0, "max_value": 255},
) | hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-(2.0**20), 2.0**20, width=32))


@settings(max_examples=50, deadline=None)
@given(arrays, st.sampled_from([1.0, 0.3, -2.0]), st.sampled_from([0.0, -40.0]), st.sampled_from("CF"))
def test_statistics_are_those_of_the_intensities(stored, scale, offset, order):
    facts = describe(np.asarray(stored, order=order), scale, offset)
    values = to_float32(stored, scale, offset)
    flat = np.sort(values, axis=None)
    for name, q in PERCENTILES.items():
        assert facts["intensity"][name] == flat[int(np.ceil(q * flat.size)) - 1]
    assert facts["intensity"]["min"] == flat[0] and facts["intensity"]["max"] == flat[-1]
    positive = np.argwhere(values > 0)
    if len(positive):
        assert facts["bounding_box"] == list(zip(positive.min(0), positive.max(0) + 1, strict=True))
    else:
        assert facts["bounding_box"] is None


floats = st.one_of(
    hnp.arrays(np.float32, (4, 3, 2), elements=st.floats(low, high, width=32))
    for low, high in ((-(2.0**60), 2.0**60), (99, 100), (-1, 0), (-3, -2))
)


@settings(max_examples=50, deadline=None)
@given(floats)
def test_quantised_floats_keep_zero_order_and_the_stated_error(values):
    levels, scale, offset, facts = encode(values, 1.0, 0.0, "int16")
    back = to_float32(levels, scale, offset)
    span = float(values.max()) - float(values.min())
    error = np.abs(back.astype(float) - values)
    assert levels.dtype == np.int16 and error.max() == facts["quantisation"]["max_error"]
    assert error.max() <= 0.5001 * span / 65534 + np.spacing(np.abs(values).max())  # found: 0.97 of it
    if values.min() <= 0 <= values.max():
        assert not back[values == 0].any()
    order = np.argsort(values, axis=None)
    assert (np.diff(back.ravel()[order]) >= 0).all()


def test_all_levels_are_used_but_for_the_one_that_zero_costs():
    levels, _, _, facts = encode(np.linspace(10, 20, 60).reshape(3, 4, 5), 1.0, 0.0, "int16")
    assert (levels.min(), levels.max()) == (-32768, 32767)
    assert facts["quantisation"]["step"] == pytest.approx(10 / 65535, rel=1e-12)  # found: 0
    levels, _, _, facts = encode(np.linspace(-3, 7, 60).reshape(3, 4, 5), 1.0, 0.0, "int16")
    assert int(levels.max()) - int(levels.min()) in (65533, 65534)  # low and high are rounded to levels
    assert facts["quantisation"]["step"] == pytest.approx(10 / 65534, rel=1e-12)  # found: 0


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64]),
        (3, 3, 3),
        elements={"min_value": 0, "max_value": 127},
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 512),
)
def test_integers_of_a_fitting_range_stay_exact(stored, start, spread):
    info = np.iinfo(stored.dtype)
    moved = np.clip(stored.astype(object) * spread + start, info.min, info.max).astype(stored.dtype)
    for scale, offset in ((1.0, 0.0), (0.25, 3.0)):
        levels, new_scale, new_offset, _ = encode(moved, scale, offset, "int16")
        assert levels.dtype.itemsize <= 2
        np.testing.assert_array_equal(to_float32(levels, new_scale, new_offset), to_float32(moved, scale, offset))


def test_integers_that_just_fill_sixteen_bits_stay_exact():
    for stored in (np.array([[[0, 1, 32768, 65535]]], np.uint16), np.array([[[-5, 0, 7, 65530]]], np.int32)):
        levels, scale, offset, facts = encode(stored, 1.0, 0.0, "int16")
        assert levels.dtype == np.int16 and not facts
        np.testing.assert_array_equal(to_float32(levels, scale, offset), stored)


def test_a_range_of_one_value_more_than_sixteen_bits_is_rounded_and_never_wraps():
    for stored in (np.array([[[0, 1, 32769, 65536]]], np.int32), np.array([[[-40000, 0, 25536]]], np.int32)):
        levels, scale, offset, facts = encode(stored, 1.0, 0.0, "int16")
        # Found: 0.22; half a level is 0.5
        assert np.abs(to_float32(levels, scale, offset) - stored).max() == facts["quantisation"]["max_error"] <= 0.51


def test_int16_conversion_says_its_error(tmp_path):
    table = cohort(tmp_path, 1)
    values = head(0).astype(np.float32) * np.float32(np.pi)
    nifti_files.write(tmp_path / "s0.nii.gz", values, AFFINE)
    convert(table, tmp_path / "store", dtype="int16")
    store = open_store(tmp_path / "store")
    worst = np.abs(store.read("s0").image.astype(float) - values).max()
    assert worst == store.subjects[0].attrs["quantisation"]["max_error"] <= values.max() / 131066
    assert not store.read("s0").image[values == 0].any()


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (-1, -1, 1), (1, -1, -1)])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0)])
def test_axis_codes_are_nibabels(axes, flips):
    affine = AFFINE.copy()
    affine[:3, :3] = (AFFINE[:3, :3] * flips)[:, axes]
    assert axis_codes(affine) == "".join(nib.aff2axcodes(affine))


# --- faults come first --------------------------------------------------------------------------------------------


@pytest.mark.fault(13)
def test_every_fault_is_told_before_anything_is_written(tmp_path):
    table = cohort(tmp_path, 7)
    label = (head(0) > 500).astype(np.float32)
    moved = AFFINE.copy()
    moved[0, 3] += 0.5
    nifti_files.write(tmp_path / "l0.nii.gz", label * 0.5, AFFINE)
    nifti_files.write(tmp_path / "l1.nii.gz", np.where(label > 0, np.nan, 0).astype(np.float32), AFFINE)
    nifti_files.write(tmp_path / "l2.nii.gz", label[1:], AFFINE)
    nifti_files.write(tmp_path / "l3.nii.gz", label, moved)
    (tmp_path / "s4.nii.gz").write_bytes(b"not an image")
    nifti_files.write(tmp_path / "s5.nii.gz", np.stack([head(5)] * 2, 3), AFFINE)
    shutil.copy(tmp_path / "s6.nii.gz", tmp_path / "s5b.nii.gz")
    with open(table, "a") as f:
        f.write("s5b.nii.gz,l5.nii.gz,Train\n")
    with pytest.raises(InputError) as caught:
        convert(table, tmp_path / "store")
    told = str(caught.value)
    for expected in (
        "7 faults: line 2: Label_image",
        "fractions such as 0.5",
        "line 3: Label_image",
        "NaN",
        "line 4: Label_image",
        "line 5: Label_image",
        "grid is not the image's",
        "line 6: HR_image",
        "not a NIfTI image",
        "line 7: HR_image",
        "2 volumes",
        "line 9: s5b.nii.gz holds the same image as s6.nii.gz at line 8, one is in Train and one in Test",
    ):
        assert expected in told
    assert not (tmp_path / "store").exists()


@pytest.mark.fault(26)
def test_a_store_stays_when_the_table_to_overwrite_it_is_bad(tmp_path):
    table = cohort(tmp_path, 2)
    convert(table, tmp_path / "store")
    before = tree(tmp_path / "store")
    with pytest.raises(UsageError, match="exists, with 2 subjects"):
        convert(table, tmp_path / "store")
    table.write_text("HR_image,Label_image,Base\nnone.nii,none.nii,Train\n")
    with pytest.raises(InputError, match="no such file"):
        convert(table, tmp_path / "store", overwrite=True)
    assert tree(tmp_path / "store") == before


@pytest.mark.fault(15)
def test_images_found_damaged_later_cost_only_themselves(tmp_path):
    table = cohort(tmp_path, 4)
    convert(table, tmp_path / "clean")
    good = {i: (tmp_path / f"s{i}.nii.gz").read_bytes() for i in (1, 2)}
    (tmp_path / "s1.nii.gz").write_bytes(good[1][:-100])
    nifti_files.write(tmp_path / "s2.nii.gz", head(2) * 0, AFFINE)
    with pytest.raises(PartialFailure) as caught:
        convert(table, tmp_path / "store")
    for expected in ("2 of 4 subjects failed", "line 3", "truncated", "line 4", "no voxel is above 0", "--resume"):
        assert expected in str(caught.value)
    store = open_store(tmp_path / "store")
    assert [s.id for s in store.subjects] == ["s0", "s3"] and not store.complete and store.verify() == []
    for i, data in good.items():
        (tmp_path / f"s{i}.nii.gz").write_bytes(data)
    assert convert(table, tmp_path / "store", resume=True)["converted"] == 2
    assert tree(tmp_path / "store") == tree(tmp_path / "clean")
    for i in range(4):
        packed = (tmp_path / f"s{i}.nii.gz").read_bytes()
        (tmp_path / f"s{i}.nii.gz").write_bytes(packed[:-100])
    with pytest.raises(InputError, match="truncated"):
        convert(table, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_bad_options(tmp_path):
    table = cohort(tmp_path, 1)
    with pytest.raises(UsageError, match=r"'int8' is unknown .one of auto, int16, float32"):
        convert(table, tmp_path / "store", dtype="int8")
    with pytest.raises(UsageError, match="--workers"):
        convert(table, tmp_path / "store", workers=0)
    convert(table, tmp_path / "store")
    with pytest.raises(UsageError, match="was made with dtype auto, not int16"):
        convert(table, tmp_path / "store", dtype="int16", resume=True)


@pytest.mark.fault(24)
def test_the_disk_is_asked_before_the_first_volume(tmp_path, monkeypatch):
    table = cohort(tmp_path, 2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store_files.shutil, "disk_usage", lambda _: usage(9, 9, 1000))
    with pytest.raises(ResourceError, match=r"no space left on the disk: needs .* KiB, 1000 bytes free"):
        convert(table, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.fault(24)
def test_a_failure_of_the_disk_ends_the_conversion(tmp_path, monkeypatch):
    table = cohort(tmp_path, 6)
    real, calls = store_files.Keys.put_all, []

    def full(self, data):
        calls.append(next(iter(data)).split("/")[0])
        real(self, data)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_files.Keys, "put_all", full)
    with pytest.raises(ResourceError, match="no space left"):
        convert(table, tmp_path / "store", workers=1)
    store = open_store(tmp_path / "store")
    assert len(store.subjects) >= 2 and not store.complete and store.verify() == []
    assert not (tmp_path / "store" / calls[2]).exists() and not (tmp_path / "store" / LOCK).exists()


@pytest.mark.fault(24)
def test_a_disk_that_is_full_at_the_first_volume_leaves_no_store(tmp_path, monkeypatch):
    table = cohort(tmp_path, 2)
    (tmp_path / "empty").mkdir()

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_files.Keys, "put_all", full)
    for name in ("store", "empty"):
        with pytest.raises(ResourceError, match="no space left"):
            convert(table, tmp_path / name)
    assert not (tmp_path / "store").exists() and not list((tmp_path / "empty").iterdir())


@pytest.mark.fault(25)
@pytest.mark.parametrize("way", ["overwrite", "resume", "resume unread"])
def test_a_store_that_may_not_be_changed_in_part_stays_whole(tmp_path, monkeypatch, way):
    """``--overwrite`` took the manifest and the other subjects away before it met the folder of another user;
    ``--resume`` called a subject that it may not read damaged, and left it out of the manifest."""
    table, access = cohort(tmp_path, 3), os.access
    convert(table, tmp_path / "store")
    before = tree(tmp_path / "store")
    if way == "resume":  # it is to be written again
        nifti_files.write(tmp_path / "s1.nii.gz", head(9), AFFINE)
    closed, denied = tmp_path / "store" / "s1" / "image", os.R_OK if way == "resume unread" else os.W_OK
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (path == closed and mode & denied))
    told = "cannot be read" if way == "resume unread" else "cannot be replaced"
    with pytest.raises(ResourceError, match=f"s1/image: {told} .check its permissions"):
        convert(table, tmp_path / "store", overwrite=way == "overwrite", resume=way != "overwrite")
    assert len(open_store(tmp_path / "store").subjects) == 3 and open_store(tmp_path / "store").verify() == []
    assert {name: data for name, data in tree(tmp_path / "store").items() if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }


# --- the same store, however it was reached -----------------------------------------------------------------------


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    table = cohort(tmp_path, 6)
    for workers in (1, 4):
        convert(table, tmp_path / f"store{workers}", workers=workers)
    assert tree(tmp_path / "store1") == tree(tmp_path / "store4")


@pytest.mark.fault(26)
def test_converting_again_changes_nothing(tmp_path):
    table = cohort(tmp_path, 3)
    assert convert(table, tmp_path / "store", resume=True)["converted"] == 3
    before = tree(tmp_path / "store")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("c/0/0/0")}
    summary = convert(table, tmp_path / "store", resume=True)
    assert (summary["converted"], summary["kept"], summary["subjects"]) == (0, 3, 3)
    assert tree(tmp_path / "store") == before and all(p.stat().st_mtime_ns == t for p, t in times.items())


def test_changed_files_splits_and_damage_are_converted_again(tmp_path, caplog):
    table = cohort(tmp_path, 5)
    convert(table, tmp_path / "store")
    nifti_files.write(tmp_path / "s0.nii.gz", head(99), AFFINE)
    nifti_files.write(tmp_path / "l1.nii.gz", (head(1) > 300).astype(np.uint8), AFFINE)
    table.write_text(table.read_text().replace("s2.nii.gz,l2.nii.gz,Train", "s2.nii.gz,l2.nii.gz,Test"))
    shard = tmp_path / "store/s3/image/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        summary = convert(table, tmp_path / "store", resume=True)
    assert (summary["converted"], summary["kept"]) == (4, 1)
    assert "s3 is damaged in the store: converted again" in caplog.text
    convert(table, tmp_path / "clean")
    assert tree(tmp_path / "store") == tree(tmp_path / "clean")


def test_a_second_table_adds_but_never_takes_over_a_name(tmp_path, caplog):
    first, second = cohort(tmp_path / "one", 2), cohort(tmp_path / "two", 3)
    convert(first, tmp_path / "store")
    before = tree(tmp_path / "store")
    nifti_files.write(tmp_path / "two/s0.nii.gz", head(50), AFFINE)
    with pytest.raises(InputError, match=r"line 2: subject s0 is in the store already, made from .*one/s0\.nii\.gz"):
        convert(second, tmp_path / "store", resume=True)
    assert tree(tmp_path / "store") == before
    second.write_text("HR_image,Label_image,Base\ns2.nii.gz,l2.nii.gz,Train\n")
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert convert(second, tmp_path / "store", resume=True)["subjects"] == 3
    assert "2 subjects are not in this table and were kept (s0, s1)" in caplog.text


@pytest.mark.fault(14)
def test_a_series_is_to_be_split_since_a_table_cannot_choose_of_it(tmp_path):
    """The hint named an option that convert does not have."""
    table = cohort(tmp_path, 2)
    nifti_files.write(tmp_path / "s0.nii.gz", np.stack([head(0)] * 2, -1), AFFINE)
    nifti_files.write(tmp_path / "l1.nii.gz", np.ones((*SHAPE, 3), np.uint8), AFFINE)
    with pytest.raises(InputError, match=r"4-D image with 2 volumes.*4-D image with 3 volumes") as caught:
        convert(table, tmp_path / "store")
    assert "--volume" not in str(caught.value)
    nifti_files.write(tmp_path / "l1.nii.gz", np.ones(SHAPE, np.uint8), AFFINE)
    with pytest.raises(InputError, match=r"\(split the series into one file a volume"):
        convert(table, tmp_path / "store")


def test_a_folder_in_place_of_the_manifest_is_named(tmp_path):
    table = cohort(tmp_path, 2)
    convert(table, tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    (tmp_path / "store" / "manifest.json").mkdir()
    with pytest.raises(ModelError, match=r"manifest\.json: is a folder where a file should be"):
        convert(table, tmp_path / "store", resume=True)


def test_a_second_table_cannot_test_on_what_the_store_trains_on(tmp_path):
    table = cohort(tmp_path, 2)
    convert(table, tmp_path / "store")
    shutil.copy(tmp_path / "s0.nii.gz", tmp_path / "new.nii.gz")
    table.write_text("HR_image,Label_image,Base\nnew.nii.gz,l0.nii.gz,Test\n")
    with pytest.raises(InputError, match=r"line 2: new\.nii\.gz holds the same image as subject s0 in the store"):
        convert(table, tmp_path / "store", resume=True)


def test_moved_sources_are_still_the_same(tmp_path):
    convert(cohort(tmp_path / "one", 2), tmp_path / "store")
    (tmp_path / "one").rename(tmp_path / "two")
    assert convert(tmp_path / "two/table.csv", tmp_path / "store", resume=True)["kept"] == 2


def _convert_quietly(table, store, begun):
    begun.set()
    try:
        convert(table, store, resume=True, workers=2)
    except FastsrganError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")  # beside the test that fails for it
        sys.stderr.flush()
        os._exit(9)


def _times(store: Path) -> dict[str, int]:
    """When the voxels of the subjects that are listed were written."""
    subjects = open_store(store).subjects
    return {s.id: (store / s.id / "image/c/0/0/0").stat().st_mtime_ns for s in subjects}


@pytest.mark.fault(20)
def test_killed_at_random_moments_and_resumed(tmp_path):
    """FASTSRGAN_KILLS is the number of kills (8; the full check is 20)."""
    table, store = cohort(tmp_path, 6), tmp_path / "store"
    began = time.monotonic()
    convert(table, tmp_path / "clean", workers=2)
    seconds = time.monotonic() - began
    chance, killed = random.Random(5), 0
    before: dict[str, int] = {}
    attempts = int(os.environ.get("FASTSRGAN_KILLS", "8"))
    for attempt in range(10 * attempts):
        if attempt >= attempts and killed:
            break  # more attempts only where each came too late, as on a machine whose load has gone
        begun = Flag()
        process = CONTEXT.Process(target=_convert_quietly, args=(table, store, begun))
        process.start()
        assert begun.wait()
        process.join(chance.uniform(0, seconds))
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        killed += process.exitcode == -9
        if (store / "manifest.json").exists():
            assert open_store(store).verify() == []
            assert before.items() <= _times(store).items()  # finished volumes are not made again
            before = _times(store)
            if open_store(store).complete:
                shutil.rmtree(store)
                before = {}
    assert killed
    summary = convert(table, store, resume=True)
    assert summary["kept"] == len(before) and before.items() <= _times(store).items()
    assert tree(store) == tree(tmp_path / "clean")


def _watch(store, allowed, ready, stop, problems):
    """Read all the time; what is neither a whole subject nor one that is just being replaced is a problem."""
    ready.set()
    reads = 0
    while not stop.is_set():
        try:
            opened = open_store(store)
        except InputError:  # before the first manifest
            continue
        for s in opened.subjects:
            try:
                sample = opened.read(s.id)
            except InputError as error:
                now = {t.id: t.files for t in open_store(store).subjects}
                if now.get(s.id) == s.files:
                    problems.put(f"{s.id}: {error}")
                continue
            reads += 1
            seen = hashlib.sha256(sample.image.tobytes() + sample.label.tobytes()).hexdigest()
            if seen not in allowed[s.id]:
                problems.put(f"{s.id} is neither its old nor its new self")
    problems.put(reads)


@pytest.mark.fault(28)
def test_another_process_sees_whole_subjects_only(tmp_path):
    """First while subjects are added, then while half of them are written anew."""
    table, store = cohort(tmp_path, 8), tmp_path / "store"
    heads = {f"s{i}": [head(i), head(i + 50)] if i % 2 else [head(i)] for i in range(8)}
    allowed = {
        name: {hashlib.sha256(h.astype(np.float32).tobytes() + (h > 500).tobytes()).hexdigest() for h in versions}
        for name, versions in heads.items()
    }
    ready, stop, problems = Flag(), Flag(), Post()
    process = CONTEXT.Process(target=_watch, args=(store, allowed, ready, stop, problems))
    process.start()
    assert ready.wait()
    convert(table, store, workers=2)
    for i in range(1, 8, 2):
        nifti_files.write(tmp_path / f"s{i}.nii.gz", head(i + 50), AFFINE)
        nifti_files.write(tmp_path / f"l{i}.nii.gz", (head(i + 50) > 500).astype(np.uint8), AFFINE)
    assert convert(table, store, resume=True, workers=2)["converted"] == 4
    stop.set()
    found = [problems.get()]
    while not isinstance(found[-1], int):
        found.append(problems.get())
    process.join()
    assert found[:-1] == [] and found[-1] > 0


# --- what it tells ------------------------------------------------------------------------------------------------


def test_summary_and_progress(tmp_path):
    table, progress = cohort(tmp_path, 3), Recorder()
    summary = convert(table, tmp_path / "store", progress=progress)
    check, work = progress.lines
    assert check[:4] == ["check", 3, "subject", 3] and work[:4] == ["convert", 3, "volume", 3]
    assert check[5] == work[5] == "done" and set(work[4]) == {"mb_per_s", "failed"}
    subjects = open_store(tmp_path / "store").subjects
    assert summary["raw_bytes"] == 3 * 3 * np.prod(SHAPE) and summary["stored_bytes"] == sum(
        s.stored_bytes for s in subjects
    )
    assert summary["ratio"] == summary["raw_bytes"] / summary["stored_bytes"] and 0 < summary["seconds"] < 1e6
    assert (summary["subjects"], summary["converted"], summary["kept"], summary["warnings"]) == (3, 3, 0, {})


def test_a_conversion_ends_in_one_line_about_the_store(tmp_path, capsys):
    table, store = cohort(tmp_path, 3), tmp_path / "store"
    for more, done in (([], "3 converted, 0 kept"), (["--resume"], "0 converted, 3 kept")):
        assert main(["convert", str(table), str(store), "--quiet", *more]) == 0
        raw, size = (sum(getattr(s, f"{name}_bytes") for s in open_store(store).subjects) for name in ("raw", "stored"))
        line = f"{store}: 3 subjects, {size / 1e6:.1f} MB, {raw / size:.1f} x smaller than in memory; {done}, "
        out = capsys.readouterr().out
        assert out.startswith(line) and re.fullmatch(r"\d+\.\d s\n", out.removeprefix(line))


def test_info_lists_subjects_and_the_whole(tmp_path, capsys):
    table, store = cohort(tmp_path, 3), tmp_path / "store"
    convert(table, store)
    assert main(["info", str(store)]) == 0
    header, _, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["subject", "split", "shape", "spacing", "mm", "label", "arrays", "MB", "ratio"]
    assert re.fullmatch(
        r"s2 +Test +21 x 18 x 10 +1 x 1.2 x 3 +[\d.]+ % +image int16, label uint8 +0\.\d+ +[\d.]+", rows[2]
    )
    subjects = open_store(store).subjects
    assert main(["info", str(store), "--json"]) == 0
    figures = [(row["MB"], row["ratio"]) for row in json.loads(capsys.readouterr().out)]
    assert figures == [(round(s.stored_bytes / 1e6, 2), round(s.raw_bytes / s.stored_bytes, 2)) for s in subjects]
    size = sum(p.stat().st_size for p in store.rglob("*") if p.is_file() and p.parent != store)
    assert size == sum(s.stored_bytes for s in subjects)
    ratio = 3 * 3 * np.prod(SHAPE) / size
    expected = f"{store}: 3 subjects (2 Train, 1 Test), {size / 1e6:.2f} MB, {ratio:.2f} x smaller than in memory"
    assert total == expected
    with create_store(store, resume=True, settings={"dtype": "auto"}) as writer:
        writer.finish(complete=False)
    assert main(["info", str(store)]) == 0 and "the conversion has not ended" in capsys.readouterr().out


def test_progress_tells_rates_and_the_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    out = io.StringIO()
    convert(cohort(tmp_path, 3), tmp_path / "store", workers=1, progress=PlainProgress(Console(file=out, width=200)))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("convert:")]
    number = r"[\d.e+-]+"
    rates = rf"mb_per_s={number} failed=0"
    assert re.fullmatch(rf"convert: 1/3 volumes  {number}/s  \d+ s left  {rates}", lines[0])
    assert re.fullmatch(rf"convert: 3/3 volumes  {number}/s  {rates}", lines[-1])


def test_a_url_as_the_store(tmp_path):
    table = cohort(tmp_path, 2)
    url = f"memory://{tmp_path.name}/store"
    convert(table, url)
    assert convert(table, url, resume=True)["kept"] == 2
    np.testing.assert_array_equal(open_store(url).read("s1").image, images.load(tmp_path / "s1.nii.gz").data)
    assert open_store(url).verify() == []


def test_a_summary_counts_the_whole_store_and_the_pace_of_what_was_converted():
    """MB are 10^6 bytes; the ratio is how many times smaller the store is."""
    listed = {n: SimpleNamespace(id=n, raw_bytes=8e6, stored_bytes=2e6, attrs={"warnings": w})
              for n, w in (("a", []), ("b", ["odd"]), ("c", []))}  # fmt: skip
    told = convert_module._summary("s", listed, [listed["a"]], [listed["b"], listed["c"]], 4.0)
    assert told == {
        "store": "s", "subjects": 3, "converted": 1, "kept": 2, "raw_bytes": 24e6, "stored_bytes": 6e6, "ratio": 4.0,
        "seconds": 4.0, "volumes_per_s": 0.25, "mb_per_s": 2.0, "warnings": {"b": ["odd"]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value", "told", "way"),
    [
        ("Label_image", np.nan, "the label holds NaN", "set them to 0"),
        ("Label_image", 0.4, "the label holds fractions", "nearest neighbour"),
        ("Label_image", -1, "the label holds the value -1", "--label-classes"),
        ("Mask_image", 1000, "the mask holds the value 1000", "1 inside and 0 outside"),
    ],
)
def test_values_that_are_not_taken_come_with_a_way_out_of_their_own(tmp_path, column, value, told, way):
    """Each was sent to resampling and to --label-classes, a mask too, which that does not choose of."""
    nifti_files.write(tmp_path / "a.nii.gz")
    label = (nifti_files.HEAD > 450).astype(np.float32)
    nifti_files.write(tmp_path / "good.nii.gz", label)
    nifti_files.write(tmp_path / "bad.nii.gz", np.where(label == 0, np.float32(value), label))
    names = {"Label_image": "good.nii.gz", "Mask_image": "good.nii.gz", column: "bad.nii.gz"}
    row = f"a.nii.gz,{names['Label_image']},{names['Mask_image']},Train"
    (tmp_path / "t.csv").write_text(f"HR_image,Label_image,Mask_image,Base\n{row}\n", encoding="utf8")
    with pytest.raises(InputError, match=f"{column} .*{told}") as caught:
        convert(tmp_path / "t.csv", tmp_path / "s.zarr")
    assert way in caught.value.hint and ("--label-classes" in caught.value.hint) == (value == -1)


@pytest.mark.parametrize("slow", ["s0", "twin"])
@pytest.mark.parametrize(("split", "told"), [("Test", ", and one is in Train and one in"), ("Train", ": it counts")])
def test_one_image_packed_in_two_ways_is_noticed_in_train_and_test(tmp_path, monkeypatch, split, told, slow):
    """Only files of the same bytes were. It is told of the later name, whichever was ready first."""
    table, own, other = cohort(tmp_path, 2), convert_module._convert, threading.Event()
    nib.save(nib.load(tmp_path / "s0.nii.gz"), tmp_path / "twin.nii")
    table.write_text(f"HR_image,Label_image,Base\ns0.nii.gz,l0.nii.gz,Train\ntwin.nii,l1.nii.gz,{split}\n")

    def one(job, *rest):
        assert job.row.subject != slow or other.wait(30)
        subject = own(job, *rest)
        if job.row.subject != slow:
            other.set()
        return subject

    monkeypatch.setattr(convert_module, "_convert", one)
    found = convert(table, tmp_path / "store", workers=2)["warnings"]
    assert any(f"the same voxels as s0, it seems{told} " in text for text in found["twin"])
    assert not any("the same voxels" in text for text in found.get("s0", []))


@pytest.mark.parametrize("suffix", (".nii", ".nii.gz"))
def test_room_is_asked_for_what_is_converted_and_not_for_what_is_kept(tmp_path, monkeypatch, suffix):
    """About the size in memory, or that of the files where they are packed to less."""
    table, asked = cohort(tmp_path, 3, suffix), []
    for i in range(3 if suffix == ".nii" else 0):
        nifti_files.write(tmp_path / "l.nii", (head(i) > 500).astype(np.uint8), AFFINE).rename(
            tmp_path / f"l{i}.nii.gz"
        )
    monkeypatch.setattr(convert_module.StoreWriter, "need_space", lambda self, n: asked.append(n))
    convert(table, tmp_path / "store", workers=1)
    files = [(tmp_path / f"s{i}{suffix}").stat().st_size + (tmp_path / f"l{i}.nii.gz").stat().st_size for i in range(3)]
    raw = 3 * int(np.prod(SHAPE))  # int16 and a label
    assert asked[0] == sum(min(size, raw) for size in files)
    assert (suffix == ".nii.gz") == (files[0] < raw)
    asked.clear()
    shard = tmp_path / "store/s1/image/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    convert(table, tmp_path / "store", resume=True, workers=1)
    assert asked[0] == min(files[1], raw)


def test_attributes_of_labels_masks_and_tissues_count_their_values(tmp_path):
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    nifti_files.write(tmp_path / "a.nii", head(1), AFFINE)
    nifti_files.write(tmp_path / "l.nii", (values % 14).astype(np.uint8), AFFINE)
    nifti_files.write(tmp_path / "m.nii", np.zeros(SHAPE, np.uint8), AFFINE)
    nifti_files.write(tmp_path / "t.nii", (values % 3 * 500).astype(np.int16), AFFINE)
    (tmp_path / "t.csv").write_text("HR_image,Label_image,Mask_image,Tissue_image,Base\na.nii,l.nii,m.nii,t.nii,Test\n")
    convert(tmp_path / "t.csv", tmp_path / "store")
    (subject,) = open_store(tmp_path / "store").subjects
    assert subject.attrs["label_counts"] == {str(v): int((values % 14 == v).sum()) for v in range(14)}
    assert subject.attrs["mask_counts"] == {"0": values.size}
    assert subject.attrs["tissues_counts"] == {str(500 * v): int((values % 3 == v).sum()) for v in range(3)}
    mask, label = subject.attrs["warnings"]
    assert mask == "mask: the mask is empty: every voxel is 0"
    assert label.startswith("label: holds 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 4 more values; training wants 1")
    assert {name: array["dtype"] for name, array in subject.arrays.items()} == {
        "image": "int16", "label": "uint8", "mask": "uint8", "tissues": "uint16",
    }  # fmt: skip


@pytest.mark.parametrize(("column", "largest"), [("Label_image", 255), ("Mask_image", 255), ("Tissue_image", 32767)])
def test_the_largest_value_of_every_map_is_the_last_that_is_taken(tmp_path, column, largest):
    nifti_files.write(tmp_path / "a.nii", head(1), AFFINE)
    (tmp_path / "t.csv").write_text(f"HR_image,Label_image,Base,{column}x\na.nii,l.nii,Train,\n")
    columns = list(dict.fromkeys(["HR_image", "Label_image", column, "Base"]))
    cells = {"HR_image": "a.nii", "Label_image": "l.nii", "Base": "Train"} | {column: "m.nii"}
    (tmp_path / "t.csv").write_text(f"{','.join(columns)}\n{','.join(cells[name] for name in columns)}\n")
    nifti_files.write(tmp_path / "l.nii", (head(1) > 500).astype(np.uint8), AFFINE)
    for value in (largest, largest + 1):
        nifti_files.write(tmp_path / "m.nii", np.where(head(1) > 500, value, 0).astype(np.int32), AFFINE)
        if value > largest:
            with pytest.raises(InputError, match=f"line 2: {column} .*{value}"):
                convert(tmp_path / "t.csv", tmp_path / "other")
        else:
            convert(tmp_path / "t.csv", tmp_path / "store")


def test_structures_that_a_map_does_not_hold_are_told_with_their_counts(tmp_path):
    table = cohort(tmp_path, 2)
    nifti_files.write(tmp_path / "l0.nii.gz", (head(0) // 300).astype(np.uint8), AFFINE)  # 0, 1, 2
    nifti_files.write(tmp_path / "l1.nii.gz", (head(1) // 60).astype(np.uint8), AFFINE)  # 0 to 14
    chosen = ["a=1", "b=2", "c=9", "d=8"]
    summary = convert(table, tmp_path / "store", label_classes=chosen)
    subject, _ = open_store(tmp_path / "store").subjects
    counts = np.bincount((head(0) // 300).ravel(), minlength=5).tolist()
    assert subject.attrs["mask_counts"] == {str(v): n for v, n in enumerate([*counts[:3], 0, 0])}
    assert subject.attrs["label_absent"] == [8, 9] and subject.attrs["label_name"] == "a"
    assert "label: holds nothing of c, d" in subject.attrs["warnings"] == summary["warnings"]["s0"]
    convert(table, tmp_path / "plain", label_classes="1")
    attrs = open_store(tmp_path / "plain").subjects[0].attrs
    assert attrs["label_classes"] == [1] and not {"label_absent", "label_name", "structures"} & set(attrs)


def test_a_label_of_several_values_is_refused_where_training_asks_for_two(tmp_path):
    table = cohort(tmp_path, 2)
    nifti_files.write(tmp_path / "l1.nii.gz", (head(1) // 60).astype(np.uint8), AFFINE)  # 0 to 14
    told = "line 3: Label_image .*l1.nii.gz: the label holds other values than 0 and 1, also 2, 3, 4, .*, 13$"
    with pytest.raises(InputError) as error:
        convert(table, tmp_path / "store", binary=True)
    assert re.search(told, error.value.reason) and "--label-classes" in error.value.hint
    assert convert(table, tmp_path / "chosen", binary=True, label_classes="1")["converted"] == 2
    assert convert(table, tmp_path / "store")["converted"] == 2
    nifti_files.write(tmp_path / "l1.nii.gz", (head(1) > 500).astype(np.uint8) * 2, AFFINE)
    with pytest.raises(InputError, match=r"also 2 \(--label-classes 2 takes that value for the structure\)"):
        convert(table, tmp_path / "two", binary=True)


def test_the_check_says_how_many_faults_it_found(tmp_path):
    table, progress = cohort(tmp_path, 3), Recorder()
    for i in (0, 2):
        (tmp_path / f"s{i}.nii.gz").write_bytes(b"none")
    with pytest.raises(InputError, match=r"2 faults: lines 2, 4: HR_image \S*s0.nii.gz and 1 other: "):
        convert(table, tmp_path / "store", progress=progress, workers=1)
    assert progress.lines == [["check", 3, "subject", 3, {"faults": 2}, "done"]]


def test_voxels_that_outshine_the_rest_are_weighed_as_intensities(tmp_path):
    """Not as they are stored: the same image with an intercept has the same warnings as one without."""
    data = head(0).astype(np.int32)
    data[5, 5, 5] = 30000
    table = cohort(tmp_path, 1)
    for inter, shift in ((0.0, 0), (-500000.0, 500000)):
        nifti_files.write(tmp_path / "s0.nii.gz", data + shift, AFFINE, inter=inter, slope=1.0)
        convert(table, tmp_path / f"store{shift}")
        (told,) = open_store(tmp_path / f"store{shift}").subjects[0].attrs["warnings"]
        assert told.startswith("1 of 3780 voxels is up to") and "the image is divided by its maximum" in told


def test_where_all_that_is_new_is_damaged_what_is_there_stays_and_counts(tmp_path):
    table = cohort(tmp_path, 2)
    text = table.read_text()
    table.write_text("\n".join(text.splitlines()[:2]) + "\n")
    convert(table, tmp_path / "store")
    table.write_text(text)
    (tmp_path / "s1.nii.gz").write_bytes((tmp_path / "s1.nii.gz").read_bytes()[:-100])
    with pytest.raises(PartialFailure, match=r"1 of 2 subjects failed, the others are in .*: line 3: .*truncated"):
        convert(table, tmp_path / "store", resume=True)
    store = open_store(tmp_path / "store")
    assert [s.id for s in store.subjects] == ["s0"] and not store.complete


def test_maps_with_the_same_fault_are_told_together_with_the_way_out(tmp_path):
    """A cohort of FreeSurfer's maps: one fault a line said the same forty times, and the way out was lost in it."""
    table = cohort(tmp_path, 20)
    for i in range(20):
        label = np.zeros(head(i).shape, np.int16)
        label[3:6] = 1035 + 50 * i
        nifti_files.write(tmp_path / f"l{i}.nii.gz", label, AFFINE)
    with pytest.raises(InputError) as caught:
        convert(table, tmp_path / "store")
    told = caught.value.reason
    assert told.startswith("20 faults: 20 lines, 2, 3, 4, ") and ", 13 and 8 more: Label_image " in told
    assert told.count("the label holds") == 1 and "the value 1035 to 1985" in told and "and 19 others: " in told
    assert "choose the structure with --label-classes" in caught.value.hint
    with pytest.raises(InputError) as caught:
        convert(table, tmp_path / "store", label_classes="cortex")
    assert caught.value.reason.count("is a name") == 1 and "--label-names FILE" in caught.value.hint


def test_a_lookup_table_that_nothing_asks_for_is_no_use(tmp_path):
    """It was passed over in silence, and the map was taken as it is."""
    table = cohort(tmp_path, 2)
    (tmp_path / "names.txt").write_text("1 cortex 0 0 0 0\n")
    with pytest.raises(UsageError, match="--label-names: has no use"):
        convert(table, tmp_path / "store", label_names=tmp_path / "names.txt")
    assert convert(table, tmp_path / "s", label_names=tmp_path / "names.txt", label_classes="cortex")["subjects"] == 2
