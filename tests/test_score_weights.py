"""tools/score_weights.py: a network that changes nothing gains nothing, on every axis, ratio and orientation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phantom import centred_affine, head

from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import Generator, GeneratorSpec
from fastsrgan.volume.geometry import grid_size
from tools import score_weights

SHAPE, SPACING = (33, 40, 30), (4.0, 4.0, 4.0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A head with its label, the same head stored in another orientation, and weights that return the spline."""
    folder = tmp_path_factory.mktemp("score")
    affine = centred_affine(SHAPE, SPACING)
    phantom = head(SHAPE, affine=affine)
    images.save(folder / "head.nii.gz", phantom.data, affine)
    images.save(folder / "label.nii.gz", phantom.label, affine)
    turned = affine[:, [2, 0, 1, 3]] @ np.diag([-1.0, 1, 1, 1])
    turned[:3, 3] += affine[:3, 2] * (SHAPE[2] - 1)
    images.save(folder / "turned.nii.gz", phantom.data.transpose(2, 0, 1)[::-1], turned)
    generator = Generator(GeneratorSpec(kernel=1))
    with torch.no_grad():
        generator.head.zero_()
    weights.save_generator(folder / "spline.safetensors", generator)
    return folder


def score(files, tmp_path, *more: str) -> tuple[int, dict]:
    out = tmp_path / "out.json"
    base = [
        "-w",
        str(files / "spline.safetensors"),
        "--threads",
        "1",
        "--device",
        "cpu",
        "--agree",
        "off",
        "--json",
        str(out),
    ]
    code = score_weights.main([*base, *more])
    return code, json.loads(out.read_text()) if out.exists() else {}


def test_the_spline_gains_nothing_over_the_spline(files, tmp_path):
    more = ["--axis", "0", "1", "2", "--ratio", "2.5", "--noise", "0", "0.02", "--tiling", "16:12", "none:1"]
    code, report = score(files, tmp_path, str(files / "head.nii.gz"), *more)
    assert code == 0 and len(report["rows"]) == 3 * 2 * 2
    for row in report["rows"]:
        assert abs(row["gain_db"]) < 1e-6  # found: 1.6e-8 (rounding)
        assert row["spline"]["ssim_inside"] == pytest.approx(row["sr"]["ssim_inside"], abs=1e-9)  # found: 3.1e-10
        assert 10 < row["spline"]["psnr_inside"] < row["spline"]["psnr_whole"] < 60
        assert row["sr"]["dice"] is None
    planes = {row["plane"]: row["axis"] for row in report["rows"]}
    assert planes == {"sagittal": 0, "coronal": 1, "axial": 2}
    assert {row["tiling"] for row in report["rows"]} == {"16:12", "none:1"}


def test_storage_does_not_matter(files, tmp_path):
    more = ["--axis", "0", "1", "2", "--ratio", "2", "3", "--noise", "0", "--tiling", "16:16"]
    paths = [str(files / "head.nii.gz"), str(files / "turned.nii.gz")]
    _, report = score(files, tmp_path, *paths, *more)
    rows = report["rows"]
    for a, b in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True):
        assert (a["plane"], a["ratio"]) == (b["plane"], b["ratio"])
        assert a["spline"]["psnr_inside"] == pytest.approx(b["spline"]["psnr_inside"], abs=1e-6)  # found: 0 (rounding)


def test_thick_slices_cost_more_and_the_interpolated_label_suffers(files, tmp_path):
    more = ["--label", str(files / "label.nii.gz"), "--ratio", "1", "2", "4", "--noise", "0", "--tiling", "16:16"]
    _, report = score(files, tmp_path, str(files / "head.nii.gz"), *more)
    exact, two, four = (row["spline"] for row in report["rows"])
    assert exact["dice"] == 1 and two["dice"] > four["dice"] > 0.3  # found: 0.79, 0.63
    assert two["psnr_inside"] > four["psnr_inside"]
    # A probability of 0.5 everywhere is above the threshold nowhere.
    assert all(row["sr"]["dice"] == 0 for row in report["rows"])


def test_a_better_and_a_worse_network_are_told_apart(files, tmp_path, monkeypatch):
    infer = score_weights.infer_volume

    def bent(data, affine, generator, **settings):
        done = infer(data, affine, generator, **settings)
        done.sr[...] += offset[0]
        return done

    monkeypatch.setattr(score_weights, "infer_volume", bent)
    gains, offset = [], [0.0]
    for offset[0] in (0.02, 0.1):
        _, report = score(
            files, tmp_path, str(files / "head.nii.gz"), "--ratio", "2", "--noise", "0", "--tiling", "16:16"
        )
        gains.append(report["rows"][0]["gain_db"])
    assert 0 > gains[0] > gains[1]


def test_summary_names_the_worst_case(files, tmp_path):
    rows = [
        {"head": h, "plane": "axial", "ratio": r, "noise": 0.0, "tiling": t, "gain_db": g}
        for h, r, t, g in [
            ("a", 2, "64:32", 1.0),
            ("a", 3, "64:32", -0.5),
            ("b", 2, "64:32", 2.0),
            ("b", 2, "128:30", 3.0),
        ]
    ]
    summary = score_weights.summarise(rows)
    assert summary["64:32"]["all"]["worst"]["gain_db"] == -0.5 and summary["64:32"]["all"]["worst"]["head"] == "a"
    assert summary["64:32"]["all"]["mean_gain_db"] == pytest.approx(2.5 / 3)
    assert summary["64:32"]["heads"]["b"]["cases"] == 1 and summary["128:30"]["all"]["cases"] == 1
    lines = list(score_weights.lines(score_weights.summary_table(summary), markdown=True))
    assert lines[1].replace("-", "").replace("|", "") == "" and {line.count("|") for line in lines} == {7}


def test_markdown_table_and_crop(files, tmp_path, capsys):
    more = ["--crop", "24", "--ratio", "2", "--noise", "0", "--tiling", "16:16", "--markdown"]
    code, _ = score(files, tmp_path, str(files / "head.nii.gz"), *more)
    table = capsys.readouterr().out.splitlines()
    assert code == 0 and table[0].startswith("| head") and "| axial" in table[2]
    whole = score_weights.read_head(files / "head.nii.gz", None, None, 0)
    part = score_weights.read_head(files / "head.nii.gz", None, None, 24)
    assert part.image.data.shape == (24, 24, 24)
    # The middle of the part is where it was.
    at = [(n - 24) // 2 + 12 for n in whole.image.data.shape]
    assert part.image.data[12, 12, 12] == whole.image.data[tuple(at)]
    assert np.allclose(part.image.affine @ [12, 12, 12, 1], whole.image.affine @ [*at, 1])


def test_given_mask_is_the_region(files, tmp_path):
    inside = score_weights.read_head(files / "head.nii.gz", str(files / "label.nii.gz"), None, 0).mask
    assert np.array_equal(inside, images.load(files / "label.nii.gz").data > 0)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--synthetic", "0"], 2, "none given"),
        (["HEAD", "--label", "-", "-"], 2, "one per head"),
        (["HEAD", "--ratio", "0.5"], 2, "ratios from 1 up"),
        (["nowhere.nii.gz"], 3, "nowhere"),
        (["HEAD", "-w", "nowhere.safetensors"], 4, "nowhere"),
    ],
)
def test_wrong_requests_end_with_one_line(files, tmp_path, capsys, more, code, words):
    found, _ = score(files, tmp_path, *[str(files / "head.nii.gz") if m == "HEAD" else m for m in more])
    error = capsys.readouterr().err
    assert found == code and words in error and len(error.splitlines()) == 1


def test_a_result_on_another_grid_is_not_scored(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score_weights, "_returns", lambda *_: True)
    code, _ = score(files, tmp_path, str(files / "head.nii.gz"), "--ratio", "4", "--noise", "0", "--tiling", "16:16")
    assert code == 3 and "grid" in capsys.readouterr().err


@settings(max_examples=60)
@given(st.integers(24, 300), st.floats(1, 8), st.floats(0.2, 3))
def test_fitted_sizes_come_back(n, ratio, spacing):
    phantom = score_weights.Volume(np.zeros((2, 2, n), np.float32), np.diag([1, 1, spacing, 1]))
    whole = score_weights.Head("x", phantom, np.ones((2, 2, n), bool), None)
    fitted = score_weights.fit(whole, 2, ratio).image
    kept, fine = fitted.data.shape[2], fitted.spacing[2]
    assert grid_size(grid_size(kept, fine, fine * ratio), fine * ratio, fine) == kept
    assert n - kept <= 2 * ratio + 1  # at 4.5, every other number of thick slices ends in half a voxel
