"""``fastsrgan.show``: the same picture from an object, a folder and a file; its documentation's example runs."""

from __future__ import annotations

import doctest
import json
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_results import make_results

import fastsrgan
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.io import nifti as images
from fastsrgan.report import show as module


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("show"), count=2)


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def test_a_file_an_object_and_a_record_give_one_picture(out):
    sr, seg = images.load(out / "scan_sr.nii.gz"), images.load_label(out / "scan_seg.nii.gz")
    scan = images.load(out.parent / "scan.nii.gz")
    record = json.loads((out / "scan.json").read_text(encoding="utf8"))
    result = fastsrgan.InferResult(sr.data, seg.data[None].astype(np.float32), sr.affine, record)
    options = {"width_px": 400}
    by_path = fastsrgan.show(out / "scan.json", **options)
    by_object = fastsrgan.show(result, (scan.data, scan.affine), **options)
    assert isinstance(by_path, Figure) and len(by_path.axes) == 3 * 4  # low, SR, outline; three planes and a detail
    assert np.array_equal(pixels(by_path), pixels(by_object)) and pixels(by_path).std() > 10
    alone = fastsrgan.show(str(out / "scan_sr.nii.gz"), **options)
    assert len(alone.axes) == 4 and np.array_equal(pixels(alone), pixels(fastsrgan.show(sr, **options)))


def test_faults_are_told(out, monkeypatch):
    with pytest.raises(UsageError, match="2 results"):
        fastsrgan.show(out)
    with pytest.raises(UsageError, match="one of radiological"):
        fastsrgan.show(out / "scan.json", convention="mirror")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ResourceError, match="pip install matplotlib"):
        fastsrgan.show(out / "scan.json")


def test_the_example_runs():
    failed, tried = doctest.testmod(module)
    assert tried == 4 and failed == 0


def test_an_image_wholly_below_zero_is_drawn_as_one_moved_up(out):
    sr, scan = images.load(out / "scan_sr.nii.gz"), images.load(out.parent / "scan.nii.gz")
    low = sr.data.min()
    drawn = []
    for shift in (0.0, 4096.0):
        moved = [fastsrgan.Volume(v.data - low - np.float32(shift), v.affine) for v in (sr, scan)]
        drawn.append([pixels(fastsrgan.show(*moved, width_px=300)), pixels(fastsrgan.show(moved[0], width_px=300))])
    for first, second in zip(*drawn, strict=True):
        assert np.abs(first - second).max() <= 2  # found: 0, of 255
