"""What pictures and pages say of a result: the whole of its light, and how often and how the network saw the scan."""

from __future__ import annotations

import json

import numpy as np
import pytest
from report_results import make_model, make_scan

import fastsrgan
from fastsrgan.evaluate.wording import passes, picture_words
from fastsrgan.infer.files import infer_files
from fastsrgan.io import nifti as images
from fastsrgan.pictures import figure
from fastsrgan.report.page import report

SIDES = "mean of both sides, left and right exchanged as well"
RIGHT_FIRST, RIGHT_LAST = np.eye(4), np.eye(4)[[2, 0, 1, 3]]


@pytest.mark.parametrize(
    ("record", "affine", "words"),
    [
        ({}, RIGHT_FIRST, []),
        ({"flips": "none"}, RIGHT_FIRST, []),
        ({"flips": "x"}, RIGHT_FIRST, [SIDES]),
        ({"flips": "x"}, RIGHT_LAST, ["mean of 2 mirror images, along x"]),
        ({"flips": "z"}, RIGHT_LAST, [SIDES]),
        ({"flips": "x"}, None, ["mean of 2 mirror images, along x"]),
        ({"flips": "xyz"}, RIGHT_FIRST, ["mean of 8 mirror images, along x, y and z"]),
        ({"upright": [2, 1, 0]}, None, ["segmented with the head upright, in a second pass"]),
        (
            {"flips": "x", "upright": [0, 1, 2], "affine": RIGHT_FIRST.tolist()},
            None,
            [
                "mean of both sides, left and right exchanged as well",
                "segmented with the head upright, in a second pass",
            ],
        ),
        ({"flips": 3, "upright": None, "affine": "none"}, None, []),  # a record of elsewhere
        ({"flips": "x", "affine": [["a"] * 4] * 4}, None, ["mean of 2 mirror images, along x"]),
    ],
)
def test_passes_are_said_by_what_the_axes_of_the_image_are(record, affine, words):
    assert passes(record, affine) == words


def test_a_light_is_said_with_all_its_reasons_and_with_what_was_not_looked_at():
    said = {"light": "red", "reasons": ["one", "two"], "unchecked": {"pieces": "no cortex", "head": "no cortex"}}
    words = "plausibility red: one; two. Not looked at: pieces, head (no cortex)"
    assert picture_words({"plausibility": said})["status"] == ("red", words)
    words = "plausibility green: no proof that the segmentation is right, look at the pictures"
    assert picture_words({"plausibility": {"light": "green", "reasons": []}})["status"] == ("green", words)
    odd = {"plausibility": {"light": "blue"}, "threshold": "a", "weights": "b", "region": 3, "patch": None}
    assert picture_words(odd) == {"captions": {"spline": "of the same scan"}, "footer": ""}


def test_every_picture_of_a_result_says_the_same(tmp_path, monkeypatch):
    """`infer --png`, the picture of the report and `show`: the light with all its reasons, the passes, the mask."""
    scan = make_scan(tmp_path / "scan.nii.gz")
    volume = images.load(scan)
    mask = images.save(tmp_path / "mask.nii.gz", (volume.data > 100).astype(np.uint8), volume.affine)
    seen = []
    drawn = figure._drawn

    def kept(columns, **options):
        captions = {column.title: column.caption for column in columns}
        captions.pop("Best linear", None)  # of the report alone
        seen.append((captions, {key: options[key] for key in ("footer", "status", "structure")}))
        return drawn(columns, **options)

    monkeypatch.setattr(figure, "_drawn", kept)
    options = {"patch": 32, "step": 32, "device": "cpu", "flips": "x", "mask": mask, "outside": "zero", "png": True}
    infer_files([scan], tmp_path / "out", make_model(tmp_path), **options)
    report(tmp_path / "out")
    fastsrgan.show(tmp_path / "out" / "scan.json")
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    captions, words = seen[0]
    record = json.loads((tmp_path / "out" / "scan.json").read_text(encoding="utf8"))
    reasons = record["plausibility"]["reasons"]
    assert reasons and all(reason in words["status"][1] for reason in reasons)
    assert captions["Cubic spline"] == "of the same scan, inside the mask"
    assert captions["Segmentation"] == "probability above 0.5"
    assert words["footer"] == f"weights model.safetensors, patch 32, step 32 · {SIDES}"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf8")
    assert f'<th scope="row">passes</th><td>{SIDES}</td>' in page
