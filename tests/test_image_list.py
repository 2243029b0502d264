"""Images that a user means: what a folder holds besides, names that clash, and how much memory each takes."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from nifti_files import HEAD, write

from fastsrgan.errors import InputError, UsageError
from fastsrgan.io.image_list import Image, find_images, size_of


def names(*inputs, out="none"):
    return [image.name for image in find_images(inputs, out)]


@pytest.mark.parametrize("ending", [".json", ".tsv", ".png", ".html", ".csv", ".PNG"])
def test_what_lies_beside_images_and_results_is_not_told(tmp_path, caplog, ending):
    write(tmp_path / "a.nii")
    (tmp_path / f"x{ending}").write_text("x", encoding="utf8")
    (tmp_path / "other.docx").write_text("x", encoding="utf8")
    with caplog.at_level(logging.INFO, "fastsrgan"):
        assert names(tmp_path) == ["a"]
    assert "1 other file is left out: other.docx" in caplog.text and f"x{ending}" not in caplog.text


def test_the_data_of_an_image_are_no_other_file_and_a_folder_of_two_names_is_told(tmp_path, caplog):
    """Was "2 other files are left out: a.raw, other.raw" of an image that was read, and no word of the second name."""
    (tmp_path / "data").mkdir()
    for name in ("data/a.raw", "data/other.raw"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.nhdr").write_text("NRRD0004\ndata file: data/a.raw\n", encoding="utf8")
    (tmp_path / "b.mhd").write_text("NDims = 3\nElementDataFile = ./data/a.raw\n", encoding="utf8")
    (tmp_path / "second").symlink_to("data")
    with caplog.at_level(logging.INFO, "fastsrgan"):
        assert names(tmp_path) == ["a", "b"]
    assert caplog.messages[1:] == [
        f"{tmp_path}: 1 other file is left out: data/other.raw",
        f"{tmp_path}: 1 folder was met under another name, taken once: second",
    ]


def test_files_of_the_output_folder_are_neither_images_nor_told(tmp_path, caplog):
    (tmp_path / "out").mkdir()
    for name in ("a.nii", "out/b.nii"):
        write(tmp_path / name)
    (tmp_path / "out" / "notes.docx").write_text("x", encoding="utf8")
    with caplog.at_level(logging.INFO, "fastsrgan"):
        assert names(tmp_path, out=tmp_path / "out") == ["a"]
    assert "notes" not in caplog.text
    assert names(tmp_path / "out", out=tmp_path / "out") == ["b"]


def record(folder, name, key="weights", **more):
    outputs = {"sr": f"/elsewhere/{name}_sr.nii"}
    text = json.dumps({"provenance": {}, key: {}, "outputs": outputs} | more)
    (folder / f"{name}.json").write_text(text, encoding="utf8")


def test_results_are_known_by_their_record_and_counted(tmp_path, caplog):
    for name in ("a", "a_sr", "b", "b_sr", "c", "c_sr", "d", "e"):
        write(tmp_path / f"{name}.nii")
    record(tmp_path, "a")
    record(tmp_path, "b", "made_with")
    record(tmp_path, "c", "mine")  # of another program
    for k, odd in enumerate(({"outputs": 5}, {"outputs": {"sr": 5}}, {"weights": 1})):
        (tmp_path / f"odd{k}.json").write_text(json.dumps({"provenance": {}, "weights": {}} | odd), encoding="utf8")
    with caplog.at_level(logging.INFO, "fastsrgan"):
        assert names(tmp_path) == ["a", "b", "c", "c_sr", "d", "e"]
    told = f"{tmp_path}: 6 images: a.nii, b.nii, c.nii and 3 more (2 results of an earlier call left out)"
    assert told in caplog.text
    caplog.clear()
    (tmp_path / "new").mkdir()
    for k in range(4):
        write(tmp_path / "new" / f"{k}.nii")
        with caplog.at_level(logging.INFO, "fastsrgan"):
            names(tmp_path / "new")
    assert [text.split(": ")[-1] for text in caplog.messages] == [
        "0.nii", "0.nii, 1.nii", "0.nii, 1.nii, 2.nii", "0.nii, 1.nii, 2.nii and 1 more",
    ]  # fmt: skip
    for k in range(2, 4):  # nothing more where all are named, results of an earlier call or not
        (tmp_path / "new" / f"{k}.nii").unlink()
    write(tmp_path / "new" / "0_sr.nii")
    record(tmp_path / "new", "0")
    with caplog.at_level(logging.INFO, "fastsrgan"):
        names(tmp_path / "new")
    assert caplog.messages[-1].endswith(": 2 images: 0.nii, 1.nii (1 result of an earlier call left out)")


@pytest.mark.parametrize("below", ["sub-1/anat", "sub-1/ses-1/anat"])
def test_derivatives_of_an_earlier_call_are_its_results(tmp_path, below):
    """Named as a folder a dataset gave its own dseg and SR images to the network again."""
    own, other = (tmp_path / "derivatives" / name for name in ("fastsrgan", "other"))
    for root, maker in ((own, "fastsrgan"), (other, "fMRIPrep")):
        (root / below).mkdir(parents=True)
        write(root / below / "sub-1_desc-x_T1w.nii")
        text = json.dumps({"GeneratedBy": [{"Name": maker}]})
        (root / "dataset_description.json").write_text(text, encoding="utf8")
    (tmp_path / "deep" / "down").mkdir(parents=True)
    write(tmp_path / "a.nii"), write(tmp_path / "deep" / "down" / "b.nii")
    assert names(tmp_path) == ["a", "deep/down/b", f"derivatives/other/{below}/sub-1_desc-x_T1w"]
    with pytest.raises(UsageError, match="holds results only"):
        find_images(own, "none")


def test_results_beside_the_slices_that_they_were_made_of_leave_a_dicom_folder(tmp_path, caplog):
    """A second call for the same folder was refused: "holds results only"."""
    for name in ("a_sr.nii", "slice.dcm"):
        write(tmp_path / name)
    record(tmp_path, "a")
    with caplog.at_level(logging.INFO, "fastsrgan"):
        assert find_images(tmp_path, tmp_path) == [Image(tmp_path, tmp_path.name)]
    assert not caplog.messages  # reading it tells of what is no slice
    (tmp_path / "slice.dcm").unlink()
    with pytest.raises(UsageError, match="holds results only"):
        find_images(tmp_path, tmp_path)


def test_names_that_clash_are_told_with_the_way_out(tmp_path):
    for name in ("p/a.nii", "p/a.mgz", "q/a.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name)
    for other, hint in (("p/a.mgz", "differ in the ending alone"), ("q/a.nii", "one output folder for each")):
        with pytest.raises(UsageError, match="would write to the same files") as error:
            names(tmp_path / "p/a.nii", tmp_path / other)
        assert hint in error.value.hint and error.value.what == str(tmp_path / other)
    for name in ("q/b.nii", "q/a.nii.gz", "q/b.nii.gz"):
        write(tmp_path / name)
    with pytest.raises(UsageError, match=r"a.nii, and so would 1 more: .*b.nii.gz \(") as error:
        names(tmp_path / "q")  # all at once, as of images that were unpacked in place
    (tmp_path / "link.nii").symlink_to(tmp_path / "p" / "a.nii")
    assert names(tmp_path / "link.nii", tmp_path / "p" / "a.nii") == ["link", "a"]
    with pytest.raises(UsageError, match="no image given"):
        names()


def test_lists_folders_and_files_come_in_their_order(tmp_path):
    for name in ("in/z.nii", "in/y.nii", "b.nii", "a.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name)
    (tmp_path / "l.TXT").write_text("b.nii\nin\n", encoding="utf8")
    assert names(tmp_path / "l.TXT", tmp_path / "a.nii", tmp_path / "b.nii") == ["b", "y", "z", "a"]
    assert find_images(str(tmp_path / "a.nii"), "none") == [Image(tmp_path / "a.nii", "a")]


@pytest.mark.parametrize("dtype", ["u1", "i2", "f8"])
def test_an_image_takes_four_bytes_a_voxel_whatever_its_type(tmp_path, dtype):
    series = np.stack([HEAD.astype(dtype)] * 3, axis=-1)
    assert size_of(Image(write(tmp_path / "a.nii.gz", HEAD.astype(dtype)), "a")) == 4 * HEAD.size
    assert size_of(Image(write(tmp_path / "b.nii", series), "b")) == 4 * HEAD.size  # one volume is read


def test_what_cannot_be_read_takes_nothing_and_dicom_four_times_its_files(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"none")
    assert size_of(Image(tmp_path / "a.nii", "a")) == size_of(Image(tmp_path / "none.nii", "n")) == 0
    (tmp_path / "s" / "t").mkdir(parents=True)
    for name, n in (("1.dcm", 100), ("t/2.dcm", 50)):
        (tmp_path / "s" / name).write_bytes(bytes(n))
    assert size_of(Image(tmp_path / "s", "s")) == 600 and size_of(Image(tmp_path / "s/1.dcm", "s")) == 400


def test_a_series_of_what_is_no_dicom_is_refused_and_of_a_folder_it_is_the_folder(tmp_path):
    write(tmp_path / "a.nii")
    with pytest.raises(UsageError, match="has no series"):
        find_images(tmp_path / "a.nii", "none", "3")
    assert find_images(tmp_path, "none", "3") == [Image(tmp_path, f"{tmp_path.name}_series-3", "3")]
    with pytest.raises(InputError, match="no such file"):
        find_images(tmp_path / "none.txt", "none")
