"""Room on the disk, asked for before an inference begins."""

from __future__ import annotations

import shutil
from collections import namedtuple

import nibabel as nib
import numpy as np
import pytest
from commands import TILES, call, make_work, one_line

from fastsrgan.errors import ResourceError
from fastsrgan.infer import files as infer_files
from fastsrgan.infer import planes as slabs

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_work(tmp_path_factory.mktemp("work"))


def disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free))


@pytest.mark.fault(24)
def test_inference_asks_for_room_before_the_first_image_is_read(work, tmp_path, capsys, monkeypatch):
    """Of all images together: each alone would fit."""
    monkeypatch.setattr(infer_files, "load", None)
    monkeypatch.setattr("fastsrgan.infer.files.load", None)
    disk(monkeypatch, 6000)  # 7 x 6 x 15 voxels of 4 bytes and a packed label: 2.6 kB
    words = ("infer", *(work / f"scan{i}.nii.gz" for i in range(3)), "-o", tmp_path, "-w", work / "w.safetensors")
    code, _, told = call(capsys, *words, *TILES)
    assert code == 5
    one_line(told, str(tmp_path), "no space left on the disk: needs", "free", "choose another folder")
    assert list(tmp_path.iterdir()) == []


def test_a_residual_is_asked_for_with_the_scans_own_voxels(work, tmp_path, capsys, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("fastsrgan.infer.files.need_space", lambda _, size: asked.append(size))
    words = ("infer", work / "scan0.nii.gz", "-w", work / "w.safetensors", *TILES)
    assert call(capsys, *words, "-o", tmp_path / "a")[0] == 0
    assert call(capsys, *words, "-o", tmp_path / "b", "--save-residual")[0] == 0
    assert asked[1] - asked[0] == 4 * int(np.prod(nib.load(tmp_path / "b" / "scan0_residual.nii.gz").shape))


@pytest.mark.fault(24)
def test_what_is_asked_for_is_enough_and_not_much_more(work, tmp_path, capsys, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("fastsrgan.infer.files.need_space", lambda _, size: asked.append(size))
    words = (
        "infer",
        work / "scan0.nii.gz",
        "-o",
        tmp_path,
        "-w",
        work / "w.safetensors",
        "--save-prob",
        "--uncertainty",
        *TILES,
    )
    assert call(capsys, *words)[0] == 0
    images = sum(path.stat().st_size for path in tmp_path.glob("*.nii.gz"))
    headers = 4 * 400
    assert images - headers <= asked[0] <= 3 * images


def test_what_is_finished_is_not_asked_for_again(work, tmp_path, capsys, monkeypatch):
    words = ("infer", work / "scan0.nii.gz", "-o", tmp_path, "-w", work / "w.safetensors", *TILES)
    assert call(capsys, *words)[0] == 0
    disk(monkeypatch, 0)
    assert call(capsys, *words, "--resume")[0] == 0


@pytest.mark.fault(24)
def test_slabs_ask_for_their_files_and_the_image_that_is_made_of_them(tmp_path, monkeypatch):
    shapes = {"sr": (4, 4, 4), "prob": (1, 4, 4, 4)}
    disk(monkeypatch, 3 * 4**4 - 1)
    with pytest.raises(ResourceError, match="no space left on the disk: needs"):
        slabs.Unfinished(tmp_path / "a", "key", shapes, 4)
    assert list(tmp_path.iterdir()) == []
    disk(monkeypatch, 3 * 4**4)
    begun = slabs.Unfinished(tmp_path / "a", "key", shapes, 4)
    disk(monkeypatch, 0)  # what is taken already is not asked for again
    again = slabs.Unfinished(tmp_path / "a", "key", shapes, 4)
    assert np.array_equal(again.arrays["sr"], begun.arrays["sr"])
