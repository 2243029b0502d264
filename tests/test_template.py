"""The embedded template and the cohort made from it: real data, invertible deformations, the same bytes again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest

from fastsrgan.core.draws import rng
from fastsrgan.demo import template
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.io import nifti as images
from fastsrgan.io.tables import read_table
from fastsrgan.volume.geometry import Volume

SHAPE = (30, 34, 28)


@pytest.fixture(scope="module")
def small():
    """A ball of white matter in a shell of grey matter, skull-stripped: what the template is, 50 times smaller."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    radius = np.sqrt(((index - np.array([[14.0], [16], [13]]).reshape(3, 1, 1, 1)) ** 2).sum(0))
    white = np.clip(6.5 - radius, 0, 1).astype(np.float32)
    grey = (np.clip(10.5 - radius, 0, 1) - white).astype(np.float32)
    affine = np.array([[1, 0, 0, -14], [0, 1, 0, -16], [0, 0, 1, -13], [0, 0, 0, 1.0]])
    t1 = (220 * white + 160 * grey).astype(np.float32)
    return tuple(Volume(data, affine) for data in (t1, grey, white))


@pytest.fixture(scope="module")
def mni():
    return template.mni152()


def test_the_template_is_mni152(mni):
    t1, grey, white = mni
    for volume in mni:
        assert volume.data.shape == (197, 233, 189)
        assert volume.spacing == (1, 1, 1)
        np.testing.assert_array_equal(volume.affine[:3, 3], [-98, -134, -72])
    assert t1.data.max() == 255
    assert grey.data.min() == white.data.min() == 0
    assert grey.data.max() == white.data.max() == 1
    # White matter is brighter than grey on T1, and outside the brain there is nothing.
    assert t1.data[white.data > 0.9].mean() > t1.data[grey.data > 0.9].mean() + 30  # found: 0
    assert 0.2 < (t1.data > 0).mean() < 0.25  # found: 0.22
    # The template is symmetric: x = 0 mm is index 98, the middle of 197.
    assert np.corrcoef(t1.data[:, 100, 90], t1.data[::-1, 100, 90])[0, 1] > 0.99  # found: 1


def test_cropping_keeps_the_brain_where_it_is(mni):
    t1, grey, white = template._crop_to_brain(*mni)
    assert t1.data.shape == (161, 197, 163)
    assert (t1.data > 0).sum() == (mni[0].data > 0).sum()
    voxel = np.array([80, 90, 70])
    world = (t1.affine @ [*voxel, 1])[:3]
    there = np.rint(np.linalg.inv(mni[0].affine) @ [*world, 1])[:3].astype(int)
    for cropped, whole in zip((t1, grey, white), mni, strict=True):
        assert cropped.data[tuple(voxel)] == whole.data[tuple(there)]


def test_without_nilearn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="pip install nilearn"):
        template.mni152()


def test_a_nilearn_without_the_maps_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(template, "_nilearn_data", lambda: tmp_path)
    with pytest.raises(ResourceError, match="mni_icbm152_wm"):
        template.mni152()


def test_nilearn_itself_is_not_imported(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "nilearn"]:
        monkeypatch.delitem(sys.modules, name)
    assert (template._nilearn_data() / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz").is_file()
    assert "nilearn" not in sys.modules


def test_no_displacement_changes_nothing(small):
    t1, grey, white = small
    moved = template.deform([v.data for v in small], rng(0, "x"), sd_voxels=0)
    for result, volume, tolerance in zip(moved, (t1, grey, white), (1e-12, 0, 0), strict=True):  # found: 3.8e-14
        np.testing.assert_allclose(result, volume.data, atol=tolerance)


def test_arrays_move_together_and_as_displacement_says():
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in SHAPE), indexing="ij"))
    coded = (index[0] + 100 * index[1] + 10000 * index[2]).astype(np.float32)
    cubic, linear = template.deform([coded, coded], rng(3, "x"), sd_voxels=1.0)
    control, (wx, wy, wz) = template.displacement(SHAPE, rng(3, "x"), 1.0)
    u = np.einsum("cabd,xa,yb,zd->cxyz", control, wx, wy, wz, optimize=True)
    where = index + u
    inside = np.all([(w > 2) & (w < n - 3) for w, n in zip(where, SHAPE, strict=True)], axis=0)
    outside = np.any([(w < 0) | (w > n - 1) for w, n in zip(where, SHAPE, strict=True)], axis=0)
    expected = where[0] + 100 * where[1] + 10000 * where[2]
    np.testing.assert_allclose(linear[inside], expected[inside], rtol=1e-6)  # found: 5.9e-8 (rounding)
    # Near the border the cubic spline bends to its mirror image.
    deep = np.all([(w > 9) & (w < n - 10) for w, n in zip(where, SHAPE, strict=True)], axis=0)
    np.testing.assert_allclose(cubic[deep], expected[deep], rtol=1e-6)  # found: 1.6e-7
    assert (linear[outside] == 0).all()
    assert outside.any()


def test_the_displacement_has_its_standard_deviation_at_the_control_points():
    control, (wx, wy, wz) = template.displacement((61, 61, 61), rng(0, "sd"), 4.0, grid=7)
    assert control.std() == pytest.approx(4, rel=0.05)  # found: 0.0087
    u = np.einsum("cabd,xa,yb,zd->cxyz", control, wx, wy, wz, optimize=True)
    np.testing.assert_allclose(u[:, ::10, ::10, ::10], control, atol=1e-12)  # found: 6.2e-15 (rounding)


def test_the_demo_cohort_does_not_fold():
    shape, full = (41, 50, 41), (161, 197, 163)
    for name in ("sub-01", "sub-02", "sub-03", "sub-04"):
        control, (wx, wy, wz) = template.displacement(shape, rng(0, "cohort", name, "deformation"))
        u = np.einsum("cabd,xa,yb,zd->cxyz", control, wx, wy, wz, optimize=True)
        step = [(n - 1) / (m - 1) for n, m in zip(full, shape, strict=True)]
        jacobian = np.stack([np.stack(np.gradient(component, *step), -1) for component in u], -2) + np.eye(3)
        assert np.linalg.det(jacobian)[3:-3, 3:-3, 3:-3].min() > 0


@pytest.mark.parametrize(("grid", "sd"), [(3, 4.0), (7, -1.0), (7, np.nan)])
def test_deformations_that_make_no_sense_are_refused(small, grid, sd):
    with pytest.raises(UsageError):
        template.deform([small[0].data], rng(0), sd, grid)


def test_arrays_of_several_shapes_are_refused(small):
    with pytest.raises(UsageError, match="shapes"):
        template.deform([small[0].data, small[0].data[1:]], rng(0))


def test_contrast_is_what_it_says(small):
    t1, grey, white = (v.data for v in small)
    np.testing.assert_allclose(template.Contrast(1, 0, 0).apply(t1, grey, white), t1, rtol=1e-6)  # found: 0 (rounding)
    # Found: 1.7e-7
    np.testing.assert_allclose(template.Contrast(2, 0, 0).apply(t1, grey, white), t1**2 / t1.max(), rtol=1e-6)
    mixed = template.Contrast(1, 0.1, -0.2).apply(t1, grey, white)
    assert mixed[14, 16, 13] == pytest.approx(0.8 * 220, rel=1e-6)  # found: 0 (rounding)
    assert mixed[14, 16, 13 + 8] == pytest.approx(1.1 * 160, rel=1e-6)  # found: 0 (rounding)
    assert (mixed[t1 == 0] == 0).all()
    draws = [template.Contrast.draw(rng(s)) for s in range(50)]
    # Found: 0.8 to 1.2, 0.08
    assert all(0.8 <= d.power <= 1.25 and max(abs(d.grey_gain), abs(d.white_gain)) <= 0.08 for d in draws)


@pytest.fixture(scope="module")
def cohort(small, tmp_path_factory):
    return template.make_cohort(tmp_path_factory.mktemp("cohort"), 2, 1, seed=5, template=small, sd_voxels=1.0)


def test_a_cohort_is_a_training_table(cohort, small):
    rows = read_table(cohort.csv)
    assert [r.base for r in rows] == ["Train", "Train", "Test"]
    assert [r.image for r in rows] == [s.image for s in cohort.subjects]
    assert cohort.of("Test") == cohort.subjects[2:]
    expected = template._crop_to_brain(*small)[0]
    for row in rows:
        image = images.load(row.image)
        label = images.load_label(row.label, like=image)
        assert label.meta["values"] == [0, 1]
        assert image.meta["stored_dtype"] == "int16"
        assert (image.data.min(), image.data.max()) == (0, 1000)
        np.testing.assert_allclose(image.affine, expected.affine)
        assert image.data.shape == label.data.shape == expected.data.shape
        # The label is where the shell is: 160 of 220, whatever the subject's contrast made of it.
        inside = label.data > 0
        assert inside.any()
        assert (image.data[inside] > 0).mean() > 0.99  # found: 1


def test_labels_are_thresholded_after_the_deformation(small):
    t1, grey, white = small
    contrast = template.Contrast(1, 0, 0)
    _, label = template.synthesise(t1, grey, white, contrast, rng(9, "x"), 1.0)
    moved = template.deform([t1.data, grey.data], rng(9, "x"), 1.0)[1]
    np.testing.assert_array_equal(label, moved > 0.5)


def test_subjects_differ_and_their_draws_are_written_down(cohort):
    a, b, c = (images.load(s.image).data for s in cohort.subjects)
    assert min(np.abs(a - b).max(), np.abs(b - c).max(), np.abs(a - c).max()) > 100
    facts = json.loads((cohort.csv.parent / "cohort.json").read_text())
    assert facts["seed"] == 5
    assert len({s["contrast"]["power"] for s in facts["subjects"].values()}) == 3


def _bytes(cohort):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(cohort.csv.parent.iterdir())}


def test_the_same_seed_gives_the_same_bytes(cohort, small, tmp_path):
    again = template.make_cohort(tmp_path / "again", 2, 1, seed=5, template=small, sd_voxels=1.0)
    assert _bytes(again) == _bytes(cohort)
    other = template.make_cohort(tmp_path / "other", 2, 1, seed=6, template=small, sd_voxels=1.0)
    assert all(_bytes(other)[s.image.name] != _bytes(cohort)[s.image.name] for s in cohort.subjects)


def test_a_larger_cohort_begins_with_the_same_subjects(cohort, small, tmp_path):
    larger = template.make_cohort(tmp_path, 3, 1, seed=5, template=small, sd_voxels=1.0)
    for name in ("sub-01_T1w.nii.gz", "sub-03_T1w.nii.gz", "sub-03_label-GM.nii.gz"):
        assert _bytes(larger)[name] == _bytes(cohort)[name]


def test_existing_files_are_kept_unless_asked(cohort, small):
    before = _bytes(cohort)
    folder = cohort.csv.parent
    with pytest.raises(UsageError, match="exists"):
        template.make_cohort(folder, 2, 1, seed=6, template=small)
    assert _bytes(cohort) == before
    template.make_cohort(folder, 2, 1, seed=5, template=small, sd_voxels=1.0, overwrite=True)
    assert _bytes(cohort) == before


def test_progress_is_told(small, tmp_path):
    seen = []

    class Watch:
        def start(self, label, total, unit):
            seen.append((total, unit))

        def advance(self, n=1, **facts):
            seen.append(facts["subject"])

        def finish(self):
            seen.append("end")

    template.make_cohort(tmp_path, 1, 1, template=small, sd_voxels=0.5, progress=Watch())
    assert seen == [(2, "subject"), "sub-01", "sub-02", "end"]


@pytest.mark.parametrize("counts", [(0, 0), (-1, 2)])
def test_a_cohort_needs_subjects(tmp_path, counts, small):
    with pytest.raises(UsageError, match="at least one"):
        template.make_cohort(tmp_path, *counts, template=small)


def test_a_deformation_goes_by_slabs_of_so_many_voxels_and_no_more(monkeypatch):
    """Whatever the axes are; the result does not depend on it."""
    some = np.random.default_rng(1).random((5, 8, 30), np.float32)
    whole = template.deform([some], rng(2, "x"), 0.5)
    sizes, plain = [], template.ndimage.map_coordinates
    monkeypatch.setattr(template, "_SLAB_VOXELS", 500)
    monkeypatch.setattr(
        template.ndimage, "map_coordinates", lambda a, at, *b, **k: (sizes.append(at[0].size), plain(a, at, *b, **k))[1]
    )
    parts = template.deform([some], rng(2, "x"), 0.5)
    assert sizes == [480, 480, 240] and np.array_equal(parts[0], whole[0])


def test_what_was_drawn_and_of_what_is_written_down(cohort, small):
    facts = json.loads((cohort.csv.parent / "cohort.json").read_text())
    labels = [images.load_label(s.label).data for s in cohort.subjects]
    assert facts["template"] == template.NOTICE and "McGill University" in facts["template"]
    assert facts["sd_voxels"] == 1.0 and facts["shape"] == list(labels[0].shape)
    assert [s["base"] for s in facts["subjects"].values()] == ["Train", "Train", "Test"]
    assert [s["label_voxels"] for s in facts["subjects"].values()] == [int(label.sum()) for label in labels]
    for k, name in enumerate(("sub-01", "sub-02", "sub-03")):
        drawn = template.Contrast.draw(rng(5, "cohort", name, "contrast"))
        assert facts["subjects"][name]["contrast"] == asdict(drawn) and cohort.subjects[k].name == name
    assert nib.load(cohort.subjects[0].image).header["descrip"].item() == b"fastsrgan synthetic subject"


def test_a_margin_of_eight_voxels_is_kept_where_there_is_one():
    data = np.zeros((40, 30, 12), np.float32)
    data[15:20, 3:9, 5:6] = 1
    affine = np.diag([1.0, 2, 3, 1])
    image, other = template._crop_to_brain(Volume(data, affine, ("odd",), {"a": 1}), Volume(data + 5, affine))
    assert image.data.shape == (5 + 16, 9 + 8, 12) and np.array_equal(other.data, image.data + 5)
    assert np.array_equal(image.affine[:3, 3], [7, 0, 0]) and (image.warnings, image.meta) == (("odd",), {"a": 1})
    assert np.array_equal(image.data, data[7:28, 0:17]) and np.array_equal(affine[:3, 3], [0, 0, 0])


def test_the_smallest_deformations_and_orders_that_are_allowed(small):
    whole = [v.data for v in small]
    assert template.deform(whole[:1], rng(0), 0.0, 4)[0].shape == SHAPE
    for orders in ([3], [3, 1, 1, 1]):
        with pytest.raises(UsageError, match="not one order each"):
            template.deform(whole, rng(0), 1.0, orders=orders)
    cubic, linear = template.deform([whole[0]] * 2, rng(0, "x"), 1.0)
    asked = template.deform([whole[0]] * 2, rng(0, "x"), 1.0, orders=[1, 3])
    assert np.array_equal(asked[1], cubic) and np.array_equal(asked[0], linear) and not np.array_equal(cubic, linear)


def test_the_defaults_of_a_cohort(tmp_path, monkeypatch):
    tiny = np.zeros((40, 8, 8), np.float32)
    tiny[16:24, 1:7, 1:7] = 1
    monkeypatch.setattr(template, "mni152", lambda: (Volume(tiny, np.eye(4)),) * 3)
    made = template.make_cohort(tmp_path / "a")
    assert [s.base for s in made.subjects] == ["Train", "Train", "Train", "Test"]
    facts = json.loads((tmp_path / "a" / "cohort.json").read_text())
    assert (facts["seed"], facts["sd_voxels"]) == (0, 4.0)
    uncut = template.make_cohort(tmp_path / "b", 1, 0, crop=False, sd_voxels=1.0)
    assert images.load(uncut.subjects[0].image).data.shape == tiny.shape
    assert facts["shape"] == [24, 8, 8]


def test_another_seed_draws_another_contrast_too(cohort, small, tmp_path):
    other = template.make_cohort(tmp_path, 2, 1, seed=6, template=small, sd_voxels=1.0)
    drawn, others = (json.loads((c.csv.parent / "cohort.json").read_text())["subjects"] for c in (cohort, other))
    for name, facts in drawn.items():
        assert not set(facts["contrast"].values()) & set(others[name]["contrast"].values())
