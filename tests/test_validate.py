"""Scores between epochs: the paper's definitions on patches, the spline's own on whole volumes, a stop in between."""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cohort import SMALL, losses, make_store, rows

from fastsrgan.data.feed import Feed
from fastsrgan.data.subject import PatchRule
from fastsrgan.evaluate import metrics
from fastsrgan.evaluate.pair import evaluate_files
from fastsrgan.infer.files import infer_files
from fastsrgan.infer.settings import PAPER_STEP, InferSettings
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.observation.model import Degradation, degrade
from fastsrgan.report.page import report
from fastsrgan.store.reader import open_store
from fastsrgan.train import loop
from fastsrgan.train import validate as validation
from fastsrgan.train.run import train
from fastsrgan.train.validate import (
    central_patch,
    fixed_resident,
    linear_estimate,
    patch_ssim,
    validate,
    validate_whole,
    validation_sums,
)
from fastsrgan.volume.geometry import resampled_affine


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("cohort"))


def make_feed(store: Path) -> Feed:
    degradation = Degradation(SMALL.new_low_res, SMALL.contrast_max, SMALL.noise, SMALL.geometry)
    return Feed(open_store(store), degradation, PatchRule(16, 12), seed=0, device=torch.device("cpu"), threads=1)


class Identity(torch.nn.Module):
    """Gives its input back as SR and the truth's threshold as segmentation."""

    def forward(self, x, res=None):
        return torch.cat([x, (x > 0.3).to(x.dtype)], 1)


def test_validation_scores_are_those_of_the_paper_s_definitions(store):
    feed = make_feed(store)
    names = [s.id for s in feed.store.subjects]
    scores = validate(Identity(), feed, names, batch_size=3)
    squared, voxels, both, sizes, decibels = 0.0, 0, 0, 0, []
    for index, name in enumerate(names):
        resident = fixed_resident(feed, feed.store.read(name), index, len(names))
        top, own = 0.0, []
        for o in resident.origins:
            cut = tuple(slice(int(a), int(a) + 16) for a in o)
            x, y, label = resident.interpolated[cut], resident.hr[cut], resident.label[cut] > 0
            own.append(((x.clamp(min=0) - y).double() ** 2).sum())
            top, voxels = max(top, float(y.max())), voxels + y.numel()
            both, sizes = both + int((label & (x > 0.3)).sum()), sizes + int(label.sum() + (x > 0.3).sum())
        squared += float(sum(own))
        decibels.append(10 * np.log10(top**2 / (float(sum(own)) / (16**3 * len(own)))))
    assert scores["MSE"] == pytest.approx(squared / voxels)
    assert scores["Dice"] == pytest.approx(2 * both / sizes)
    assert scores["PSNR"] == pytest.approx(np.mean(decibels))
    assert validate(Identity(), feed, [], batch_size=3) == {}


def test_scores_do_not_depend_on_the_size_of_batches(store, monkeypatch):
    """Nor on which of them holds the subject's brightest voxel, to which a PSNR is relative."""
    plain = validation.fixed_resident

    def bright(*given):
        resident = plain(*given)
        resident.hr[tuple(max(int(o), 0) + 3 for o in resident.origins[0])] = 3 * resident.hr.max()
        return resident

    monkeypatch.setattr(validation, "fixed_resident", bright)
    few, all_ = (validate(Identity(), make_feed(store), ["sub-2"], batch_size=n) for n in (2, 1000))
    assert few.keys() == all_.keys() and few == pytest.approx(all_, rel=1e-12)  # found: 1.1e-16 (rounding)


def test_patches_are_compared_with_the_spline_and_the_best_linear_estimate(store):
    """A network that does nothing is the spline; the best linear estimate is nearer to the truth."""
    feed, known = make_feed(store), {}
    names = [s.id for s in feed.store.subjects]
    scores = validate(Identity(), feed, names, batch_size=3, known=known)
    assert scores["PSNR"] == pytest.approx(scores["PSNR_spline"]) and scores["SSIM"] == pytest.approx(
        scores["SSIM_spline"]
    )
    assert scores["PSNR_linear"] > scores["PSNR_spline"] + 0.3  # found: 1.1 dB
    assert 0 < scores["Label_share"] < scores["Seg_share"] < 1
    x, y = torch.rand(2, 2, 16, 16, 16, dtype=torch.float64)
    by_patch = [metrics.ssim(a.numpy(), b.numpy(), data_range=0.7) for a, b in zip(x, y, strict=True)]
    assert patch_ssim(x, y, 0.7).tolist() == pytest.approx(by_patch, abs=1e-12)  # found: 4.2e-17 (rounding)
    assert set(known) == set(names)
    known[names[0]] = {"spline": (0.0, 0.0)}  # what is known is not computed again
    again = validate(Identity(), feed, names, batch_size=3, known=known)
    assert again["PSNR_spline"] < scores["PSNR_spline"] and again["PSNR"] == scores["PSNR"]


def test_the_best_linear_estimate_of_a_validation_is_never_below_the_spline(store, monkeypatch):
    """Its weight is the best of the volume: on the patches the spline, one of the estimates, may be better."""
    feed = make_feed(store)
    monkeypatch.setattr(validation, "best_linear", lambda spline, *_: spline + np.float32(0.1))
    names = [s.id for s in feed.store.subjects]
    scores = validate(Identity(), feed, names, batch_size=3)
    assert scores["PSNR_linear"] == scores["PSNR_spline"] and scores["SSIM_linear"] == scores["SSIM_spline"]
    monkeypatch.setattr(validation, "best_linear", lambda spline, *_: spline)
    scores = validate_whole(Identity(), feed, names[:1])  # of the spline that is scored beside it
    assert scores["linear_PSNR"] == scores["spline_PSNR"]


def test_what_is_below_zero_counts_as_zero_in_every_score(store):
    class Darker(Identity):
        def __init__(self, floor: float) -> None:
            super().__init__()
            self.floor = floor

        def forward(self, x, res=None):
            return torch.cat([(x - 0.2).clamp(min=self.floor), (x > 0.3).to(x.dtype)], 1)

    feed = make_feed(store)
    names, known = [s.id for s in feed.store.subjects], {}
    below, zero = (validate(Darker(floor), feed, names, batch_size=3, known=known) for floor in (-1.0, 0.0))
    assert below == zero and zero["SSIM"] < zero["SSIM_spline"]


def test_the_best_linear_estimate_of_a_shifted_image_is_the_estimate_shifted(store):
    """Of an image with values below 0 it is that of the image moved up, as all that training sees of it."""
    feed = make_feed(store)
    sample = feed.store.read(next(s.id for s in feed.store.subjects if s.split == "Test"))
    assert sample.image.min() == 0
    made = []
    for shift in (0, 300):  # whole numbers: exact in float32
        shifted = replace(sample, image=sample.image.astype(np.float32) - np.float32(shift))
        made.append(linear_estimate(feed, shifted, fixed_resident(feed, shifted, 0, 1), 0, 1))
    assert torch.equal(*made) and made[0].std() > 0.1  # found: 0.21


def test_half_a_probability_is_outside_as_in_inference():
    pred, truth = torch.full((1, 2, 4, 4, 4), metrics.SEG_THRESHOLD), torch.ones(1, 2, 4, 4, 4)
    pred[0, 1, 0] += 1e-6
    assert validation_sums(pred, truth)[2:].tolist() == [16, 16, 64]


def test_whole_volumes_score_as_infer_and_evaluate_do(store, tmp_path):
    """The thick slices of a Test subject, through `infer` and `evaluate`: the figures of the validation."""
    feed = make_feed(store)
    subject = next(s.id for s in feed.store.subjects if s.split == "Test")
    generator = build_generator(GeneratorSpec(kernel=2, shifted=True), seed=3).eval()
    scores = validate_whole(generator, feed, [subject])
    weights.save_generator(tmp_path / "w.safetensors", generator)
    sample = feed.store.read(subject)
    done = degrade(sample.image, sample.spacing, (1.0, 1.0, 3.0))
    affine = resampled_affine(sample.affine, sample.image.shape, done.low_res.shape, (1.0, 1.0, 3.0))
    images.save(tmp_path / "x.nii.gz", done.low_res * np.float32(done.scale), affine)
    images.save(tmp_path / "hr.nii.gz", sample.image, sample.affine)
    images.save(tmp_path / "label.nii.gz", sample.label, sample.affine)
    infer_files(
        [tmp_path / "x.nii.gz"], tmp_path / "out", tmp_path / "w.safetensors", new_resolution=[1.0] * 3, device="cpu"
    )
    files = [tmp_path / "out" / "x_sr.nii.gz", tmp_path / "hr.nii.gz", tmp_path / "out" / "x_seg.nii.gz"]
    found = evaluate_files(*files, tmp_path / "label.nii.gz", lr=tmp_path / "x.nii.gz")
    for who, result in (("whole", found), ("spline", found["baseline"])):
        image, seg = result["image"]["whole"], result["segmentation"]
        assert scores[f"{who}_PSNR"] == pytest.approx(image["psnr_db"], abs=1e-3)  # found: 0
        assert scores[f"{who}_SSIM"] == pytest.approx(image["ssim"], abs=1e-12)  # found: 2.2e-16 (rounding)
        assert scores[f"{who}_Dice"] == pytest.approx(seg["dice"], abs=1e-3)  # found: 0
    assert scores["linear_PSNR"] > scores["spline_PSNR"]


def test_whole_volumes_keep_labels_whole_and_have_the_papers_tiles_where_they_are_the_originals(store, monkeypatch):
    feed, plain, orders = make_feed(store), validation.onto_grid, []

    def onto_grid(volume, like, **more):
        orders.append((volume.data.dtype == np.uint8, more.get("order")))
        return plain(volume, like, **more)

    monkeypatch.setattr(validation, "onto_grid", onto_grid)
    validate_whole(Identity(), feed, [next(s.id for s in feed.store.subjects)])
    assert {order for whole, order in orders if whole} == {0} and len(orders) == 3  # neighbours of a label are no mean
    assert (InferSettings().patch, PAPER_STEP) == (validation.PATCH, validation.STEP)


def test_whole_volumes_of_the_original_are_clipped_at_zero_and_told_their_resolution(store, monkeypatch):
    law = Degradation(((1.0, 1.0, 3.0),), 0.0, 0.0, "segsrgan")
    feed = Feed(open_store(store), law, PatchRule(16, 12), seed=0, device=torch.device("cpu"), threads=1)
    networks, subject = [], feed.store.subjects[0].id
    monkeypatch.setattr(validation, "TileNetwork", lambda *args: networks.append(args[1]))
    found = []
    for level in (-1.0, 0.0):
        made = lambda volume, plan, network, level=level: (torch.stack([volume * 0 + level, volume]), None)  # noqa: E731
        monkeypatch.setattr(validation, "predict", made)
        found.append(validate_whole(Identity(), feed, [subject]))
    assert found[0] == found[1] and networks == [3.0, 3.0]


def test_whole_volumes_have_resolutions_spaced_evenly_over_the_subjects(store, monkeypatch):
    law = Degradation(((1.0, 1.0, 2.0), (1.0, 1.5, 4.0)))
    feed = Feed(open_store(store), law, PatchRule(16, 12), seed=0, device=torch.device("cpu"), threads=1)
    seen = []
    monkeypatch.setattr("fastsrgan.train.validate.whole_scores", lambda *a: seen.append(a[3]) or {"whole_PSNR": 1.0})
    validate_whole(Identity(), feed, [s.id for s in feed.store.subjects])
    assert [draw.low_res for draw in seen] == [(1.0, 1.0, 2.0), (1.0, 1.25, 3.0), (1.0, 1.5, 4.0)]
    assert {(draw.power, draw.noise) for draw in seen} == {(1.0, 0.0)}  # the subject's own contrast, no noise


def made(dice: float, gain: float, **more: float) -> dict[str, float]:
    """Scores of a validation whose spline has 26 dB."""
    shares = {"Seg_share": 0.1, "Label_share": 0.1}
    return {"Dice": dice, "PSNR": 26.0 + gain, "PSNR_spline": 26.0, "SSIM": 0.9} | shares | more


def test_neither_a_lost_segmentation_nor_a_blurred_image_is_the_best():
    healthy, empty, blurred = made(0.6, 0.5), made(0.0, 2.0), made(0.63, -1.0)
    assert loop.score(empty, "psnr") > loop.score(healthy, "psnr")  # what one score alone would take
    assert loop.score(blurred, "dice") > loop.score(healthy, "dice")
    assert loop.score(healthy, "both") > max(loop.score(empty, "both"), loop.score(blurred, "both"))
    assert loop.score(made(0.5, 0.0), "both") == pytest.approx(0.5)  # the spline adds nothing
    assert loop.score(made(0.9, -40.0), "both") == pytest.approx(-0.1)  # the worst image takes 1, and no more
    assert loop.score({}, "both") is None


def test_classes_of_a_mask_do_not_choose_the_best():
    """Of a map of several structures each counts; beside a Mask_image the label alone."""
    masked = {"Dice_label_1": 0.7, "Dice_mask0": 0.1, "Dice_mask1": 0.3}
    several = {"Dice": 0.7, "Dice_mask0": 0.1, "Dice_cortex": 0.6, "Dice_pallidum": 0.8}
    assert loop.mean_dice(masked) == loop.score(masked, "dice") == 0.7
    assert loop.mean_dice(several) == pytest.approx(0.7) and loop.mean_dice({"Dice": 0.4}) == 0.4


def test_a_lost_output_is_said_once_the_other_rises():
    before = made(0.0, 0.1)
    assert "empty" in loop.collapse(made(0.0, 0.2, Seg_share=0.0), before)
    assert "is full (Dice 0.150)" in loop.collapse(made(0.15, 0.2, Seg_share=1.0), before)
    assert "next to nothing" in loop.collapse(made(0.001, 0.2), before)
    for gain, earlier, below in ((-3.0, -2.0, "3.0"), (-2.0, -2.0, "2.0"), (-0.875, -0.625, "0.9")):
        assert f"SR is {below} dB worse than the spline" in loop.collapse(made(0.5, gain), made(0.4, earlier))
    for scores, earlier in (
        (made(0.0, 0.2), {}),
        (made(0.0, 0.05), before),
        (made(0.3, 0.2), before),
        (made(0.02, 0.2, Seg_share=0.002), before),  # little, but not nothing: 2 % of Dice, and of the label's voxels
        (made(0.5, -2.0), made(0.4, -3.0)),
        (made(0.5, -0.75), made(0.4, -0.5)),  # half a dB below was still sound
    ):
        assert loop.collapse(scores, earlier) == ""


def test_kept_weights_whose_image_is_worse_than_the_spline_are_told_at_the_end():
    log = [{"epoch": n, "validation": made(0.4, gain)} for n, gain in ((1, 0.0), (2, -23.0), (3, 0.5), (2, -0.75))]
    assert "of epoch 2, are not yet of use" in loop.below_spline(log[:2], 2)
    assert "their SR on patches is 23.0 dB worse than the spline" in loop.below_spline(log[:2], 2)
    # of a run that was resumed the last line counts
    assert "their SR on patches is 0.8 dB worse" in loop.below_spline(log, 2)
    assert loop.below_spline(log, 1) == loop.below_spline(log, 3) == loop.below_spline(log, None) == ""
    assert loop.below_spline([{"epoch": 1, "validation": made(0.4, -0.5)}], 1) == ""  # half a dB below is still sound
    assert loop.below_spline([{"epoch": 1, "validation": {"Dice": 0.4}}], 1) == ""


def test_a_run_ends_with_what_its_best_weights_are_not_worth(store, tmp_path, monkeypatch, caplog):
    """PSNR rises, so no epoch is warned of, and stays far below the spline's; the page of the run says it too."""
    gains = iter((-23.0, -18.0, 0.5))
    monkeypatch.setattr(loop, "validate", lambda *args, **more: made(0.4, next(gains)))
    short = SMALL.replace(epochs=2, steps_per_epoch=1)
    with caplog.at_level("WARNING", logger="fastsrgan"):
        found = train(store, tmp_path / "run", short.replace(best_by="psnr"))
    told = found["warnings"][-1]
    assert found["warnings"] == [told] and re.match(
        r"the best weights, of epoch 2, .* SR on patches is 18\.0 dB worse", told
    )
    assert [r.getMessage() for r in caplog.records].count(told) == 1
    assert report(tmp_path / "run")[0].read_text(encoding="utf8").count(f"<li>{told}</li>") == 1
    better = train(store, tmp_path / "run", short.replace(best_by="psnr", epochs=3), resume=True)
    assert better["best_epoch"] == 3 and better["warnings"] == []


def test_the_line_of_a_validation_has_the_spline_beside_psnr_and_ssim():
    """How a terminal of 80 columns breaks it: tests/test_training_words.py."""
    line = loop.validation_line(200, made(0.5834, 0.615, PSNR_linear=26.4, SSIM_spline=0.8765), 187)
    told = "epoch 200 PSNR 26.61 spline 26.00 linear 26.40 SSIM 0.900 spline 0.876 Dice 0.583 best 187"
    assert line == told.replace("0.876", f"{0.8765:.3f}")
    without = loop.validation_line(2, made(0.5834, 0.615), 2)
    assert without == "epoch 2 PSNR 26.61 spline 26.00 SSIM 0.900 Dice 0.583 best 2"


def test_the_line_of_several_structures_says_which_dice_is_which():
    several = {"Dice": 0.7, "Dice_mask0": 0.99, "Dice_cortex": 0.6, "Dice_white": 0.8}
    line = loop.validation_line(2, made(0.7, 0.5) | several, 2)
    assert line.endswith("Dice 0.700 Dice_cortex 0.600 Dice_white 0.800 mean Dice of 2 structures 0.700 best 2")
    masked = {"Dice_label_1": 0.7, "Dice_mask0": 0.99, "Dice_mask1": 0.5}
    line = loop.validation_line(2, {k: v for k, v in made(0.7, 0.5).items() if k != "Dice"} | masked, 2)
    assert line.endswith("Dice_label_1 0.700 Dice_mask1 0.500 best 2")
    lost = made(0.0, 0.2, Seg_share=0.0, Dice_cortex=0.0, Dice_white=0.0)
    assert "(mean Dice of 2 structures 0.000)" in loop.collapse(lost, made(0.0, 0.1))


def test_what_is_wrong_by_a_validation_is_kept_also_by_a_run_that_goes_on(store, tmp_path, monkeypatch):
    seen, short = [], SMALL.replace(epochs=2, steps_per_epoch=1)
    monkeypatch.setattr(loop, "collapse", lambda scores, before: seen.append((scores, before)) or "lost" * bool(before))
    train(store, tmp_path / "run", short)
    assert seen[1][1] == seen[0][0]
    found = train(store, tmp_path / "run", short.replace(epochs=3), resume=True)
    assert seen[2][1] == seen[1][0]  # compared with the validation before, of another process
    assert [line for line in found["warnings"] if line.startswith("epoch")] == ["epoch 2: lost", "epoch 3: lost"]
    assert [row.get("warning") for row in rows(tmp_path / "run", "validation")] == [None, "lost", "lost"]
    page = report(tmp_path / "run")[0].read_text(encoding="utf8")
    assert "<li>epoch 2: lost</li>" in page and "<li>epoch 3: lost</li>" in page


def test_the_line_of_whole_volumes_names_whose_figures_they_are():
    scores = {"whole_PSNR": 31.21, "spline_PSNR": 30.0, "linear_PSNR": 30.5, "whole_Dice": 0.7, "spline_Dice": 0.61}
    told = "epoch 3, whole volumes PSNR 31.21 (spline 30, linear 30.5) Dice 0.7 (spline 0.61)"
    assert loop.whole_line(3, scores) == told


def test_scores_of_whole_volumes_are_told_once(store, tmp_path):
    """In a pipe the line of the patches repeated them all."""
    told = []
    progress = SimpleNamespace(
        **dict.fromkeys(("start", "advance", "finish"), lambda *_, **__: None),
        tell=lambda group, text, **facts: told.append((group, facts)),
    )
    train(store, tmp_path / "run", SMALL.replace(epochs=1, steps_per_epoch=1, whole_every=1), progress=progress)
    (line,) = rows(tmp_path / "run", "validation")
    (first, patches), (other, whole) = told
    assert (first, other) == ("validation", "validation of whole volumes") and "whole_PSNR" in whole
    assert set(patches) & set(whole) == {"epoch"} and set(line["validation"]) <= set(patches) | set(whole)


def test_the_panel_s_patch_has_structure_in_its_middle_planes(store):
    feed = make_feed(store)
    subject = feed.store.subjects[0].id
    resident = fixed_resident(feed, feed.store.read(subject), 0, 1)
    chosen = resident.origins[central_patch(resident, 16)]
    label = np.pad(resident.label.numpy(), 16)
    held = []
    for origin in (chosen, *resident.origins):
        cut = label[tuple(slice(int(o) + 16, int(o) + 32) for o in origin)]
        planes = [cut.take(8, axis) for axis in range(3)]
        held.append(sum(min(int(p.sum()), p.size - int(p.sum())) for p in planes))
    assert held[0] == max(held) > 100


def test_a_stop_in_the_middle_of_a_validation_comes_back_to_it(store, tmp_path, monkeypatch):
    train(store, tmp_path / "whole", SMALL)
    asked, original = [], loop.validate

    def stopping(*args, stopped, **options):
        def ask():
            asked.append(1)
            if len(asked) == 1:
                signal.raise_signal(signal.SIGTERM)
            return stopped()

        return original(*args, stopped=ask, **options)

    monkeypatch.setattr(loop, "validate", stopping)
    first = train(store, tmp_path / "run", SMALL)
    assert first["exit_code"] == 143 and first["updates"] == 4 and not rows(tmp_path / "run", "validation")
    train(store, tmp_path / "run", SMALL, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
