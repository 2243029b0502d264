"""Odd and damaged images through the commands: one line and a code and no half file, or a warning in the record."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from damage import bomb, claims_64_tib, cut, flip
from nifti_files import HEAD, qform_fields, rigid, write

from fastsrgan.cli.main import main
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator

MIB = 1 << 20
LABEL = (HEAD > 450).astype(np.uint8)
TILES = ("--patch", "16", "--step", "12")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small generator that changes the image."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    return weights.save_generator(path, build_generator(GeneratorSpec(kernel=1), seed=1).eval())


def call(capsys, *words: object) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    code = main(["--quiet", *map(str, words)])
    return code, capsys.readouterr().err


# fault -> (what is done to a good file, words of the message)
REFUSED = {
    "1 truncated": (lambda p: cut(p, p.stat().st_size - 40), "truncated"),
    "2 checksum": (lambda p: flip(p, -8), "checksum"),
    "3 claims 64 TiB": (claims_64_tib, "truncated: the header declares"),
    "4 bomb": (bomb, "gzip bomb"),
    "6 all NaN": (lambda p: write(p, np.full((3, 4, 5), np.nan, np.float32)), "every voxel is NaN"),
    "6 all zero": (lambda p: write(p, np.zeros_like(HEAD)), "at least one voxel must be above zero"),
    "7 many volumes": (lambda p: write(p, np.stack([HEAD] * 3, 3)), "--volume"),
    "7 five axes": (lambda p: write(p, HEAD, dim=(slice(0, 6), (5, 7, 6, 5, 1, 3))), "vectors or channels"),
    "7 RGB": (lambda p: write(p, HEAD, datatype=128), "RGB"),
    "7 complex": (lambda p: write(p, HEAD, datatype=32), "complex"),
    "11 zero voxel size": (
        lambda p: write(p, HEAD, sform_code=0, qform_code=0, pixdim=(slice(1, 4), (0, 1, 1))),
        "voxel size",
    ),
}
REFUSED_ROWS = [pytest.param(name, id=name, marks=pytest.mark.fault(int(name.split()[0]))) for name in REFUSED]


@pytest.mark.parametrize("name", REFUSED_ROWS)
def test_refused_images_end_with_3_and_one_line(tmp_path, capsys, model, name):
    spoil, words = REFUSED[name]
    scan, out, store = write(tmp_path / "scan.nii.gz"), tmp_path / "out", tmp_path / "store.zarr"
    write(tmp_path / "label.nii.gz", LABEL)
    spoil(scan)
    code, told = call(capsys, "infer", scan, "-o", out, "-w", model, *TILES)
    *warnings, error = told.splitlines()
    assert code == 3 and all(line.startswith("warning: ") for line in warnings), told
    assert error.startswith(f"error: {scan}: ") and words in error and error.endswith(")")
    assert not out.exists()
    (tmp_path / "t.csv").write_text("HR_image,Label_image,Base\nscan.nii.gz,label.nii.gz,Train\n", encoding="utf8")
    code, told = call(capsys, "convert", tmp_path / "t.csv", store)
    assert (code, told.count("\n")) == (3, 1), told
    assert "line 2" in told and not store.exists()


SHEARED = np.array([[1.0, 0.2, 0, 3], [0, 1, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]])
LEFT = rigid() @ np.diag([-1.0, 1, 1, 1])
TURNED = rigid()[:, [2, 0, 1, 3]]
CONFLICT = {**qform_fields(rigid(turn=(0.0, 0.4, 0.1), origin=(9, 9, 9)))}
SPOTS = HEAD.astype(np.float32)
SPOTS[1, 2, 3], SPOTS[0, 0, 0] = np.nan, np.inf
# fault -> (voxels, affine, options of the file, words of the warning or "")
ACCEPTED = {
    "5 NaN and Inf": (SPOTS, rigid(), {}, "2 of 210 voxels are NaN or infinite: read as 0"),
    "6 constant": (np.full((7, 6, 5), 7, np.int16), rigid(), {}, "constant"),
    "7 a series of one": (HEAD[..., None], rigid(), {}, ""),
    "8 conflict": (HEAD, rigid(), CONFLICT, "the sform is used"),
    "8 no orientation": (HEAD, rigid(), {"sform_code": 0, "qform_code": 0}, "no orientation"),
    "9 left-handed": (HEAD, LEFT, {}, ""),
    "9 permuted and oblique": (HEAD, TURNED, {}, ""),
    "10 sheared": (HEAD, SHEARED, {}, "sheared"),
    "11 microns": (HEAD, rigid((900.0, 900, 3000)), {"units": 3}, "micrometre"),
    "11 microns taken for mm": (HEAD, rigid((900.0, 900, 3000)), {}, "unusual: check the units"),
    "11 negative voxel size": (
        HEAD,
        rigid(),
        {"sform_code": 0, "qform_code": 0, "pixdim": (slice(1, 4), (-1, 1, 3))},
        "negative",
    ),
    "12 smaller than a patch": (HEAD[:3, :1, :2], rigid((1.0, 1, 2)), {}, ""),
}
ACCEPTED_ROWS = [pytest.param(name, id=name, marks=pytest.mark.fault(int(name.split()[0]))) for name in ACCEPTED]


def corners(shape, affine) -> np.ndarray:
    """The eight corners of the field of view in mm."""
    ends = np.array(list(itertools.product(*((-0.5, n - 0.5) for n in shape))))
    return ends @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("name", ACCEPTED_ROWS)
def test_odd_images_give_finite_results_in_their_place_and_a_warning(tmp_path, capsys, model, name):
    data, affine, options, words = ACCEPTED[name]
    scan, out = write(tmp_path / "scan.nii.gz", data, affine, **options), tmp_path / "out"
    code, told = call(capsys, "infer", scan, "-o", out, "-w", model, *TILES)
    assert code == 0, told
    read = images.load(scan)
    result = images.load(out / "scan_sr.nii.gz")
    record = json.loads((out / "scan.json").read_text(encoding="utf8"))
    assert words in told and words in " ".join(record["warnings"])
    assert np.isfinite(nib.load(out / "scan_sr.nii.gz").get_fdata()).all()
    grow = np.array(read.spacing) / result.spacing
    assert np.all(np.abs(np.array(result.data.shape) - np.array(read.data.shape) * grow) <= 0.51)  # found: 0.33
    there, here = corners(result.data.shape, result.affine), corners(read.data.shape, read.affine)
    moved = np.linalg.norm(there[:, None] - here[None], axis=2).min(axis=1).max()
    assert moved <= 0.51 * max(result.spacing) * np.sqrt(3), moved  # found: 0.096
    if len(set(np.unique(data).tolist())) == 1:
        assert np.abs(result.data - float(data.flat[0])).max() < 2e-6  # a constant stays what it was; found: 4.8e-7


@pytest.mark.fault(7)
def test_the_hint_of_a_series_works(tmp_path, capsys, model):
    scan = write(tmp_path / "series.nii.gz", np.stack([HEAD, HEAD[::-1]], 3))
    code, told = call(capsys, "infer", scan, "-o", tmp_path / "out", "-w", model, *TILES, "--volume", "1")
    assert code == 0, told
    code, told = call(capsys, "infer", scan, "-o", tmp_path / "out2", "-w", model, *TILES, "--volume", "2")
    assert code == 3 and "0 to 1" in told, told


@pytest.mark.fault(4)
def test_max_voxels_is_an_option(tmp_path, capsys, model):
    scan = write(tmp_path / "scan.nii.gz")
    code, told = call(capsys, "infer", scan, "-o", tmp_path / "out", "-w", model, "--max-voxels", "100")
    assert code == 3 and "--max-voxels" in told
