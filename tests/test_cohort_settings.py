"""Settings against a whole cohort before the first update, anatomy instead of stored axes, warnings that travel."""

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from cohort import make_store
from test_validate import Identity

from fastsrgan.cli.main import main
from fastsrgan.config import TrainConfig
from fastsrgan.convert import convert
from fastsrgan.data.settings_check import few_slices, full_subjects, odd_sizes, small_subjects, thick_order
from fastsrgan.data.subject import PatchRule, make_resident, patch_origins
from fastsrgan.data.visit import Visits
from fastsrgan.errors import InputError, UsageError
from fastsrgan.infer.volume import infer_volume
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model.networks import Generator, GeneratorSpec
from fastsrgan.observation.model import Degradation, Draw
from fastsrgan.observation.slice_axis import axes_across, choose_axes, describe, on_stored_axes, stored_draw, world_axes
from fastsrgan.store.reader import Sample, open_store
from fastsrgan.train import run as train
from fastsrgan.train.validate import fixed_resident, linear_estimate, validate_whole
from fastsrgan.volume.intensity import lifted, normaliser

SIDE = 20


def head(seed=0, shape=(SIDE, SIDE, SIDE)):
    rng = np.random.default_rng(seed)
    image = np.zeros(shape, np.float32)
    image[2:-2, 2:-2, 2:-2] = rng.random(tuple(n - 4 for n in shape)) + 0.5
    return image, (image > 1).astype(np.uint8)


def cohort(folder, *subjects):
    """A store of subjects given as changes: spacing, label, mask, image, affine."""
    folder.mkdir(exist_ok=True)
    rows = ["HR_image,Label_image,Mask_image,Base"]
    for i, change in enumerate(subjects):
        image, label = head(i)
        image, label, mask = change.get("image", image), change.get("label", label), change.get("mask")
        affine = change.get("affine", np.diag([*([change.get("spacing", 1.0)] * 3), 1.0]))
        nib.save(nib.Nifti1Image(image, affine), folder / f"h{i}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / f"l{i}.nii.gz")
        if mask is not None:
            nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), folder / f"m{i}.nii.gz")
        name = f"m{i}.nii.gz" if mask is not None else ""
        rows.append(f"h{i}.nii.gz,l{i}.nii.gz,{name},{'Test' if i == len(subjects) - 1 else 'Train'}")
    (folder / "cohort.csv").write_text("\n".join(rows) + "\n")
    convert(folder / "cohort.csv", folder / "c.zarr", workers=1)
    return open_store(folder / "c.zarr")


def config(**settings):
    return TrainConfig(**{"new_low_res": ((1.0, 1.0, 3.0),), "patch_size": 16, "stride": 12} | settings)


def refuse(store, c):
    """What ``prepare`` asks of the subjects."""
    law, rule, shown = train.degradation(c), PatchRule.of(c), train.visits(c)
    train.refuse_faults(store, law, rule, (0, 1, 2), shown.structure, c.fit_mask)


# --- one list of faults, before the first update ------------------------------------------------------------------


def test_every_subject_that_is_too_coarse_is_named_at_once(tmp_path):
    store = cohort(tmp_path / "c", {}, {"spacing": 1.2}, {"spacing": 1.0000005}, {"spacing": 1.5}, {})
    with pytest.raises(InputError) as error:
        refuse(store, config())
    told = "coarser than the low resolution of 1 x 1 x 3 mm: h1 (1.2 x 1.2 x 1.2 mm), h3 (1.5 x 1.5 x 1.5 mm)"
    assert error.value.reason == told


def test_bounds_count_by_the_finest_that_can_be_drawn(tmp_path):
    store = cohort(tmp_path / "c", {}, {})
    refuse(store, config(new_low_res=((1.0, 1.0, 2.0), (1.6, 1.6, 4.0))))
    for bounds in (((0.95, 1.0, 2.0), (1.6, 1.6, 4.0)), ((1.6, 1.6, 4.0), (1.0, 0.95, 2.0))):
        with pytest.raises(InputError, match=r"h0 \(1 x 1 x 1 mm\), h1"):
            refuse(store, config(new_low_res=bounds))


def test_simpleitk_takes_what_rounds_to_a_whole_voxel(tmp_path):
    store = cohort(tmp_path / "c", {"spacing": 1.9}, {"spacing": 2.1}, {})
    with pytest.raises(InputError) as error:
        refuse(store, config(geometry="segsrgan", interp="sitk"))
    assert error.value.reason == "coarser than the low resolution of 1 x 1 x 3 mm: h1 (2.1 x 2.1 x 2.1 mm)"


def test_masks_labels_and_patches_of_all_subjects_in_one_list(tmp_path):
    whole, corner = np.ones((SIDE,) * 3), np.zeros((SIDE,) * 3)
    corner[0, 0, 0] = 1
    plane = np.zeros((SIDE,) * 3)
    plane[:, :, :11] = 1  # many voxels, and still patches of 16 that are half in it
    subjects = [{"mask": whole}, {"mask": corner}, {}, {"mask": plane}, {"mask": whole, "label": head()[1] * 2}]
    store = cohort(tmp_path / "c", *subjects)
    with pytest.raises(InputError) as error:
        refuse(store, config(image_cropping_method="overlapping_with_mask", new_low_res=((2, 2, 2),)))
    told = error.value.reason
    assert told.startswith("3 faults: ") and "without a patch of 16 voxels" in told and "in the mask: h1" in told
    assert "patch_size or stride" in error.value.hint  # patches lie on a grid: a finer one may meet the mask
    assert "without a mask: h2" in told and "other values than 0 and 1: h4 (also 2)" in told and "h3" not in told


@pytest.mark.parametrize("size", (9, 11, 13, "shell"))
def test_a_mask_has_a_patch_where_training_would_find_one(tmp_path, size):
    mask = np.zeros((SIDE,) * 3, np.uint8)
    if size == "shell":  # 2368 of the 4096 voxels of the head's patch; of the image's own patches 1016 at most
        mask[2:18, 2:18, 2:18] = 1
        mask[4:16, 4:16, 4:16] = 0
    else:
        mask[2 : 2 + size, :, :] = 1
    store = cohort(tmp_path / "c", {"mask": mask}, {"mask": np.ones((SIDE,) * 3)})
    settings = config(image_cropping_method="overlapping_with_mask", patch_size=16, new_low_res=((1, 1, 3),))
    law, rule = Degradation(settings.new_low_res), PatchRule(16, 12, True)
    found = make_resident(store.read("h0"), law, Draw((1.0, 1.0, 3.0)), rule, torch.device("cpu"), crop=True).origins
    if len(found):
        refuse(store, settings)
    else:
        with pytest.raises(InputError, match="lie in the mask: h0"):
            refuse(store, settings)


def test_the_command_ends_before_the_first_update(tmp_path, capsys):
    cohort(tmp_path / "c", {}, {"spacing": 1.2}, {})
    words = ["train", str(tmp_path / "c" / "c.zarr"), "-o", str(tmp_path / "run"), "-n", "1", "1", "3", "-ps", "16"]
    assert main([*words, "--resident-subjects", "1", "--device", "cpu"]) == 3
    assert "h1 (1.2 x 1.2 x 1.2 mm)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists() or not (tmp_path / "run" / "log.jsonl").read_text()


def test_scans_with_the_images_own_voxels_are_told(tmp_path):
    store = cohort(tmp_path / "c", {}, {"spacing": 0.5})
    told = full_subjects(store, Degradation(((1.0, 1.0, 1.0),)), (0, 1, 2))
    assert told == ["1 of 2 subjects: 1 x 1 x 1 mm (-n) are their own voxels, so nothing is to be super-resolved: h0"]
    assert not full_subjects(store, Degradation(((1.0, 1.0, 1.0), (1.0, 1.0, 2.0))), (0, 1, 2))


@pytest.mark.parametrize(("count", "more"), [(20, ""), (21, " and 1 more"), (25, " and 5 more")])
def test_twenty_subjects_are_told_by_name_and_the_others_counted(count, more):
    subjects = [SimpleNamespace(id=f"h{n}", spacing=(1.0, 1.0, 1.0)) for n in range(count)]
    (told,) = full_subjects(SimpleNamespace(subjects=subjects), Degradation(((1.0, 1.0, 1.0),)), None)
    named = ", ".join(f"h{n}" for n in range(20))
    assert told.startswith(f"{count} of {count} subjects: 1 x 1 x 1 mm") and told.endswith(f": {named}{more}")


@pytest.mark.parametrize(
    ("sizes", "axes", "told"),
    [
        ([(3, 1, 1)], (0, 1, 2), "3 mm along R, 1 mm along A, 1 mm along S are sagittal thick slices"),
        ([(1, 1, 2), (1, 4, 2)], (0, 1, 2), "1 to 4 mm along A, 2 mm along S are coronal thick slices"),
        ([(3, 1, 1)], (1, 2, 0), "3 mm along A, 1 mm along S, 1 mm along R are coronal thick slices"),
        ([(1, 1, 3)], (0, 1, 2), ""),
        ([(2, 1, 2)], (0, 1, 2), ""),
        ([(1, 1, 1)], (0, 1, 2), ""),
        ([(3, 1, 1)], None, ""),
    ],
)
def test_thick_slices_that_are_not_the_last_number_are_told(sizes, axes, told):
    """They are made so, along the axis of the largest number; the stored axes of segsrgan geometry mean nothing."""
    found = thick_order(Degradation(tuple(tuple(map(float, one)) for one in sizes)), axes)
    assert told in "".join(found) and len(found) == bool(told)


def test_thick_slices_along_the_first_axis_are_said_before_the_first_update(tmp_path, caplog):
    store = cohort(tmp_path / "c", {}, {})
    assert len(odd_sizes(store, Degradation(((3.0, 1.0, 1.0),)), PatchRule(16, 12), (0, 1, 2))) == 1
    c = config(new_low_res=((3.0, 1.0, 1.0),), max_bad_steps=1, kernel_gen=1, kernel_dis=1, batch_size=1)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "attempt", stopped)
        train.train(store.url, tmp_path / "run", c, device="cpu")
    assert "3 mm along R, 1 mm along A, 1 mm along S are sagittal thick slices" in caplog.text


def test_slices_thicker_than_a_head_are_refused_and_few_of_them_told(tmp_path):
    """The coarsest that may be drawn counts, across every axis of the head, which may fill little of its image."""
    small = head(1)[0] * 0
    small[8:12, 8:12, 8:12] = 1
    store = cohort(tmp_path / "c", {}, {"image": small}, {"image": head(2)[0] - 9})  # heads of 16, 4 and 20 mm
    refuse(store, config(new_low_res=((1.0, 1.0, 4.0),)))
    for sizes in (((1.0, 1.0, 4.5),), ((1.0, 1.0, 1.0), (4.5, 1.0, 1.0))):
        with pytest.raises(InputError) as error:
            refuse(store, config(new_low_res=sizes))
        assert error.value.reason == "no thicker than one slice of 4.5 mm (-n): h1 (4 mm)"
    with pytest.raises(InputError, match=r"of 200 mm \(-n\): h0 \(16 mm\), h1 \(4 mm\), h2 \(20 mm\)"):
        refuse(store, config(new_low_res=((1.0, 1.0, 200.0),)))
    told = few_slices(store, Degradation(((1.0, 1.0, 2.0), (1.0, 1.0, 4.5))), (0, 1, 2))
    assert told == ["2 of 3 subjects: 4.5 mm (-n) leave fewer than 4 slices of a head: h0 (3.6), h1 (0.89)"]
    assert not few_slices(store, Degradation(((1.0, 1.0, 1.0),)), (0, 1, 2))
    assert told[0] in odd_sizes(store, Degradation(((1.0, 1.0, 2.0), (1.0, 1.0, 4.5))), PatchRule(16, 12), (0, 1, 2))


def stopped(*_):
    raise KeyboardInterrupt


def test_subjects_smaller_than_a_patch_are_told(tmp_path):
    thin = head(shape=(SIDE, SIDE, 6))
    store = cohort(tmp_path / "c", {"image": thin[0], "label": thin[1]}, {})
    assert small_subjects(store, PatchRule(16, 12)) == ["h0: 20 x 20 x 6 voxels are smaller than a patch of 16"]
    assert small_subjects(store, PatchRule(6, 6)) == []


# --- directions of the body ---------------------------------------------------------------------------------------


ORDERS = {"RAS": (0, 1, 2), "ASR": (1, 2, 0), "SRA": (2, 0, 1), "SAR": (2, 1, 0)}


def stored(order, flips=(1, 1, 1)):
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(order)] * flips
    return affine


@pytest.mark.parametrize("order", ORDERS.values())
@pytest.mark.parametrize("flips", ((1, 1, 1), (-1, 1, -1)))
def test_stored_axes_get_the_number_of_their_direction(order, flips):
    affine = stored(order, flips)
    assert world_axes(affine) == order
    sizes = on_stored_axes((1.0, 2.0, 3.0), (0, 1, 2), affine)
    assert sizes == tuple((1.0, 2.0, 3.0)[axis] for axis in order)


def test_in_the_originals_geometry_the_numbers_are_along_stored_axes(tmp_path):
    store = cohort(tmp_path / "c", {}, {"affine": stored((1, 2, 0))})
    assert train.slice_axes(store, config()) == (0, 1, 2)
    assert train.slice_axes(store, config(geometry="segsrgan")) is None


def test_auto_takes_the_axes_of_most_subjects():
    affines = {"a": stored((0, 1, 2)), "b": stored((1, 2, 0)), "c": stored((0, 1, 2), (-1, -1, 1))}
    assert choose_axes(affines, "auto") == ((0, 1, 2), ["b"])
    assert choose_axes(affines, "R") == ((1, 2, 0), ["a", "c"])
    assert [axes_across(d) for d in "SAR"] == [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
    assert describe((0, 1, 2), ((1, 1, 3), (1, 1, 5))) == "1 mm along R, 1 mm along A, 3 to 5 mm along S"


@pytest.mark.parametrize("direction", "SAR")
@pytest.mark.parametrize("order", ORDERS.values())
def test_a_head_stored_in_another_order_trains_on_the_same_patches(direction, order):
    """The law: what the network sees depends on the head alone, not on how it was stored."""
    image, label = head(3, (20, 22, 24))
    mask = (image > 0.75).astype(np.uint8)
    axes, law, rule = axes_across(direction), Degradation(((1.0, 1.0, 3.0),), noise=0.0), PatchRule(16, 8)
    seen = []
    for way in ((0, 1, 2), order):
        turned = [np.ascontiguousarray(a.transpose(way)) for a in (image, label, mask)]
        sample = Sample("h", "Train", *turned, stored(way), (1.0, 1.0, 1.0))
        draw = stored_draw(Draw((1.0, 1.0, 3.0)), axes, sample.affine)
        seen.append(make_resident(sample, law, draw, rule, torch.device("cpu")))
    for part in ("interpolated", "hr", "label", "mask"):
        assert torch.equal(getattr(seen[0], part), getattr(seen[1], part)), part
    assert np.array_equal(seen[0].origins, seen[1].origins)


@pytest.mark.parametrize("order", ORDERS.values())
def test_a_test_subject_stored_in_another_order_is_validated_alike(order):
    """As above, of validation: its low resolution is along the directions of the body too."""
    image, label = head(3, (20, 22, 24))
    feed = SimpleNamespace(
        degradation=Degradation(((1.0, 1.0, 3.0),), noise=0.0), axes=axes_across("R"), rule=PatchRule(16, 8),
        device=torch.device("cpu"), move=None,
    )  # fmt: skip
    seen = []
    for way in ((0, 1, 2), order):
        turned = [np.ascontiguousarray(a.transpose(way)) for a in (image, label)]
        sample = Sample("h", "Test", *turned, None, stored(way), (1.0, 1.0, 1.0))
        seen.append(fixed_resident(feed, sample, 0, 2))
    for part in ("interpolated", "hr", "label"):
        assert torch.equal(getattr(seen[0], part), getattr(seen[1], part)), part


@pytest.mark.parametrize("direction", "SAR")
def test_whole_volumes_and_the_best_linear_estimate_do_not_depend_on_the_storage(direction):
    """Figures of a head in its storage and in the world's: slices are across the same direction of the body."""
    image, label = head(3, (20, 22, 24))
    found, made = [], []
    for way in ((0, 1, 2), *ORDERS.values()):
        turned = [np.ascontiguousarray(a.transpose(way)) for a in (image, label)]
        sample = Sample("h", "Test", *turned, None, stored(way), (1.0, 1.0, 1.0))
        feed = SimpleNamespace(
            degradation=Degradation(((1.0, 1.0, 3.0),), noise=0.0), axes=axes_across(direction), rule=PatchRule(16, 8),
            device=torch.device("cpu"), move=None, visits=Visits(), quarantined={}, strict=True,
            store=SimpleNamespace(read=lambda name, sample=sample: sample),
        )  # fmt: skip
        found.append(validate_whole(Identity(), feed, ["h"]))
        made.append(linear_estimate(feed, sample, fixed_resident(feed, sample, 0, 1), 0, 1))
    for scores, estimate in zip(found[1:], made[1:], strict=True):
        assert scores == pytest.approx(found[0], rel=1e-6) and scores["spline_PSNR"] < 60  # found: 1.6e-8
        assert torch.allclose(estimate, made[0], atol=1e-5)  # found: 0


def test_a_mixed_cohort_is_told_once(tmp_path, caplog):
    image, label = head(0)
    turned = {"image": image.transpose(1, 2, 0), "label": label.transpose(1, 2, 0), "affine": stored((1, 2, 0))}
    store = cohort(tmp_path / "c", {}, {}, turned, {})
    assert train.slice_axes(store, config()) == (0, 1, 2)
    assert caplog.text.count("stored in another axis order") == 1 and "3 mm along S" in caplog.text
    assert train.slice_axes(store, config(geometry="segsrgan")) is None


# --- one normalisation --------------------------------------------------------------------------------------------


def test_values_below_zero_are_moved_up_alike_in_training_and_inference():
    image, label = head(0)
    scores = np.where(image > 0, (image - 1) / 0.3, -5).astype(np.float32)
    sample = Sample("h", "Train", scores, label, None, np.eye(4), (1.0, 1.0, 1.0))
    law = Degradation(((1.0, 1.0, 1.0),), noise=0.0)
    seen = make_resident(sample, law, Draw((1.0, 1.0, 1.0)), PatchRule(16, 8), torch.device("cpu"))
    norm = normaliser(scores, shifted=True)
    # Found: 0 (rounding)
    torch.testing.assert_close(seen.interpolated, torch.from_numpy(norm.apply(scores)), atol=1e-6, rtol=0)
    assert float(seen.interpolated.min()) == 0 and float(seen.interpolated.max()) == pytest.approx(1)
    np.testing.assert_allclose(norm.invert(norm.apply(scores)), scores, atol=2e-6)  # found: 3.6e-7


def test_images_without_values_below_zero_are_untouched():
    image = head(0)[0]
    assert lifted(image) is image
    assert normaliser(image, shifted=True) == normaliser(image)


class Same(torch.nn.Module):
    """SR is the input; the segmentation is where it is above a half."""

    def __init__(self, shifted):
        super().__init__()
        self.spec = GeneratorSpec(shifted=shifted)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.cat([x, (x > 0.5).float()], 1)


@pytest.mark.parametrize("shift", (0.0, -3.0, 100.0))
def test_a_shifted_scan_gives_the_shifted_result(shift):
    """The law for networks that were trained so: adding a number to a scan with values below 0 adds it to the SR."""
    scan = head(0)[0] - 50
    plain, moved = (
        infer_volume(image, np.eye(4), Same(True), patch=16, step=8, device="cpu")
        for image in (scan, scan + shift / 10)
    )
    np.testing.assert_allclose(moved.sr, plain.sr + shift / 10, atol=7e-6)  # found: 7.7e-7 (rounding), of 50
    np.testing.assert_array_equal(moved.prob, plain.prob)
    np.testing.assert_allclose(plain.sr, scan, atol=7e-6)  # found: 0 (rounding), of 50
    assert plain.report["intensity_shift"] == pytest.approx(-50)  # found: 0 (rounding)


def test_the_weights_keep_the_record_and_older_ones_are_as_they_were(tmp_path):
    for shifted in (True, False):
        generator = Generator(GeneratorSpec(kernel=2, shifted=shifted), "reference", seed=0)
        modelfile.write(tmp_path / "w.safetensors", generator)
        assert modelfile.read_header(tmp_path / "w.safetensors").generator.shifted is shifted
        assert ("shifted" in generator.spec.to_dict()) is shifted


def test_networks_of_both_kinds_are_not_averaged():
    with pytest.raises(UsageError, match="trained alike"):
        infer_volume(head(0)[0], np.eye(4), [Same(True), Same(False)], patch=16, step=8, device="cpu")


# --- warnings travel with the data --------------------------------------------------------------------------------


def test_what_convert_says_of_the_data_is_in_the_runs_log_record_and_report(tmp_path, caplog, capsys):
    folder = tmp_path / "c"
    holes = head(0)[0]
    holes[5:8, 5:8, 5:8] = np.nan
    cohort(folder, {"image": holes}, {})
    text = "27 of 8000 voxels are NaN or infinite: read as 0"
    words = ["-n", "1", "1", "3", "-ps", "16", "--stride", "12", "-b", "2", "--kernel_gen", "2", "--kernel_dis", "2"]
    words += ["-e", "1", "--steps-per-epoch", "1", "--number-of-disciminator-iteration", "1", "--device", "cpu"]
    assert main(["train", str(folder / "cohort.csv"), "-o", str(tmp_path / "run"), *words]) == 0
    assert f"h0: {text}" in caplog.text + capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["data_warnings"] == {"h0": [text]}
    assert main(["report", str(tmp_path / "run")]) == 0
    assert text in (tmp_path / "run" / "report.html").read_text()


def test_origins_are_there_for_whole_masks():
    assert len(patch_origins((20, 20, 20), 16, 12, ((0, 20),) * 3, np.ones((20, 20, 20))))


def test_images_wholly_below_zero_train_as_what_they_are_moved_to(tmp_path, capsys):
    """Training moves them up by their minimum, as inference does; the original's geometry does not, and refuses them
    before the first update; one of a single value teaches nothing."""
    low = [{"image": head(n)[0] - 10} for n in range(2)]
    store = cohort(tmp_path / "a", *low)
    sample = store.read(store.subjects[0].id)
    assert float(sample.image.max()) < 0
    words = ["--quiet", "train", str(tmp_path / "a" / "c.zarr"), "-o", str(tmp_path / "run"), "-n", "1", "1", "2"]
    assert main([*words, "--geometry", "segsrgan"]) == 3
    told = capsys.readouterr().err
    assert "without a voxel above 0" in told and "--geometry physical moves them up" in told
    with pytest.raises(InputError, match="no voxel is above 0"):
        cohort(tmp_path / "b", *({"image": np.full((SIDE,) * 3, -5 - n, np.int16)} for n in range(2)))


def test_a_table_without_train_rows_is_refused_before_it_is_converted(tmp_path, capfd):
    make_store(tmp_path, train=1, test=1)
    table = tmp_path / "test.csv"
    table.write_text((tmp_path / "cohort.csv").read_text(encoding="utf8").replace("Train", "Test"), encoding="utf8")
    assert main(["train", str(table), "-o", str(tmp_path / "run"), "-n", "1", "1", "3"]) == 3
    assert capfd.readouterr().err == f"error: {table}: has no Train subjects (give rows with Base = Train)\n"
    assert not (tmp_path / "run").exists()
