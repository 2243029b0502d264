"""Trust: what weights say they were made for, the traffic light, weights chosen by the head, isotropic images."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from cohort import SMALL, make_store
from nifti_files import rigid
from phantom import head

import fastsrgan
from fastsrgan.cli.main import main
from fastsrgan.data.visit import Visits
from fastsrgan.errors import UsageError
from fastsrgan.evaluate import choice, plausibility
from fastsrgan.evaluate.choice import ModelChoice
from fastsrgan.evaluate.plausibility import GREEN, RED, YELLOW, Look, choose, judge, measure, own_dice
from fastsrgan.infer import image as infer_image
from fastsrgan.infer.bids import infer_bids
from fastsrgan.infer.files import infer_files
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.model.purpose import MADE_FOR, MODELS, NOT_SAID, Purpose, averaged_apart, common, span
from fastsrgan.store.reader import Store
from fastsrgan.train.run import degradation
from fastsrgan.train.snapshots import made_for
from fastsrgan.volume.head import tissue_box, tissue_level

FAST = {"patch": 16, "step": 16, "device": "cpu"}
ADULT = replace(MODELS["adult"].purpose, contrasts=("T1",), contrast="T1-like contrast", dice=())  # of T1
PERINATAL = MODELS["perinatal"].purpose


# --- what a scan is like --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown():
    """A whole phantom head, 140 x 176 x 124 mm, with thick slices."""
    return head((40, 48, 18), (4.0, 4.0, 8.0))


def test_a_head_is_where_planes_hold_tissue_enough():
    """Above a tenth of the brightest, in at least two thousandths of a plane: a few bright voxels of air are none."""
    scan = np.zeros((30, 40, 50), np.float32)
    scan[5:20, 8:30, 10:41] = 100.0
    scan[0, 8:30, 12] = 9.0  # too dark
    scan[3, 20, 20:23] = scan[4, 20, 20:24] = 11.0  # 3 and 4 of 2000 voxels
    level = tissue_level(scan)
    assert level == pytest.approx(10.0)
    assert tissue_box(scan, level) == ((4, 8, 10), (19, 29, 40))
    assert tissue_box(scan, 1000.0) == ((0, 0, 0), (29, 39, 49))


def test_the_head_is_measured_in_mm_whatever_the_grid(grown):
    for shape, spacing in (((40, 48, 18), (4.0, 4.0, 8.0)), ((80, 32, 36), (2.0, 6.0, 4.0))):
        found = head(shape, spacing)
        look = measure(found.data, found.spacing)
        assert abs(look.head_mm - 176) <= max(spacing) and look.is_head and look.filled == 0
        assert look.voxel_mm == min(spacing) and look.slice_ratio == max(spacing) / min(spacing)
        # The phantom's edges are as soft as its voxels are large, and air ends at a tenth of the brightest.
        assert look.head_ml == pytest.approx(4 / 3 * np.pi * 70 * 88 * 62 / 1000, rel=0.2)  # found: 0.17
    turned = measure(np.ascontiguousarray(grown.data.transpose(2, 0, 1)), (8.0, 4.0, 4.0))
    assert turned == measure(grown.data, grown.spacing)


def test_a_large_image_is_looked_at_in_part_and_measures_the_same(grown, monkeypatch):
    fine = head((80, 96, 72), (2.0, 2.0, 2.0))
    whole = measure(fine.data, fine.spacing)
    monkeypatch.setattr(plausibility, "SAMPLE", 20_000)
    part = measure(fine.data, fine.spacing)
    # Found: 0 in all; of another head every second voxel may tell a little else.
    assert abs(part.head_mm - whole.head_mm) <= 8 and abs(part.fluid - whole.fluid) < 0.1
    assert part.head_ml == pytest.approx(whole.head_ml, rel=0.03) and part.filled == whole.filled  # found: 0, as above


def test_what_is_cut_out_of_a_body_is_no_head_and_a_mask_makes_it_one(grown):
    inside = grown.data[12:28, 14:34, 5:13]
    look = measure(inside, grown.spacing)
    assert look.filled == 6 and not look.is_head
    mask = np.zeros(inside.shape, np.uint8)
    mask[2:-2, 2:-2, 1:-1] = 1
    masked = measure(inside, grown.spacing, mask)
    assert masked.is_head and masked.head_mm == 64
    nothing = measure(np.zeros((8, 8, 8), np.float32), (1, 1, 1))
    assert nothing.head_mm == 0 and not nothing.is_head
    noise = measure(np.random.default_rng(0).uniform(0, 900, (64, 64, 20)), (1, 1, 3))
    assert not noise.is_head


def test_fluid_is_told_from_the_tail_of_intensities(grown):
    """The phantom's fluid is dark; in the negative of its inside it is bright."""
    dark = measure(grown.data, grown.spacing).fluid
    negative = np.where(grown.data > 0, 250 - grown.data, 0)
    assert dark < -plausibility.FLUID_SKEW and measure(negative, grown.spacing).fluid > plausibility.FLUID_SKEW
    assert measure(grown.data * 7 + 3, grown.spacing).fluid == pytest.approx(dark, abs=1e-6)  # found: 0 (rounding)


def test_thick_slices_lie_in_a_plane_of_the_body_however_they_are_stored():
    """Sagittal slices of a brain had half of its cortex under a green light: the weights knew axial ones alone."""
    data, turned = np.ones((6, 6, 6)), np.eye(4)[[2, 0, 1, 3]]  # stored A, S, R
    for spacing, plane, other in (((1, 1, 3), "axial", "sagittal"), ((3, 1, 1), "sagittal", "coronal")):
        assert measure(data, spacing, None, rigid(spacing)).slices == plane
        assert measure(data, spacing, None, turned @ np.diag([*spacing, 1.0])).slices == other
    for spacing in ((1, 1, 1), (1, 3, 3), (1, 1, 1.005)):  # no one direction
        assert measure(data, spacing, None, rigid(spacing)).slices == ""
    assert measure(data, (1, 1, 3)).slices == ""  # nothing says how it lies


def test_a_mask_a_label_map_and_an_image_that_was_rounded_away_are_no_scan():
    """They were green: a mask of a brain has the size, the voxels and the edges of one."""
    brain, labels = ribbon(480, 620, 120)
    noisy = np.where(brain > 0, brain + np.random.default_rng(0).normal(0, 9, brain.shape), 0)
    for image, values in ((labels, 1), (brain > 0, 1), (brain, 2), (noisy / noisy.max() > 0.5, 1)):
        look = measure(np.asarray(image, np.float32), (1, 1, 1))
        assert look.values == values
        assert light(look, 600, ADULT)[0] == light(look, 50, PERINATAL)[0] == light(look, 50, Purpose())[0] == RED
    assert measure(np.rint(noisy), (1, 1, 1)).values == plausibility.FEW_VALUES
    assert measure(np.zeros((8, 8, 8)), (1, 1, 1)).values == 0


def test_a_look_survives_its_record():
    look = measure(head().data, (4.0, 4.0, 8.0), None, np.diag([4.0, 4.0, 8.0, 1.0]))
    assert look.slices == "axial"
    assert Look.of(json.loads(json.dumps(look.to_dict()))) == look
    older = {name: value for name, value in look.to_dict().items() if name != "values"}
    assert Look.of(older) == replace(look, values=0)
    assert (
        Look.of(None) is None and Look.of({"head_mm": 3}) is None and Look.of(look.to_dict() | {"fluid": "a"}) is None
    )


# --- which model ----------------------------------------------------------------------------------------------------

NEWBORN = Look(96.0, 300.0, 0, 0.3, 0.8, 3.0, 0.0)
GROWN = Look(180.0, 3500.0, 0, -0.4, 1.0, 4.0, 0.0)


@pytest.mark.parametrize(
    ("look", "name", "why"),
    (
        (NEWBORN, "perinatal", "head 96 mm long"),
        (GROWN, "adult", "head 180 mm long"),
        (replace(NEWBORN, head_mm=134.0), "perinatal", "134"),
        (replace(NEWBORN, head_mm=137.0), "adult", "137"),
        (replace(NEWBORN, head_mm=20.0), "adult", "fits no model"),
        (replace(NEWBORN, filled=6), "adult", "no head is seen"),
        (replace(NEWBORN, head_mm=0.0), "adult", "no head is seen"),
    ),
)
def test_the_size_of_the_head_chooses(look, name, why):
    chosen, said = choose(look)
    assert chosen == name and why in said


# --- the light ------------------------------------------------------------------------------------------------------


def seg_of(ml: float, border: bool = False) -> np.ndarray:
    """A segmentation of voxels of 1 mL."""
    seg = np.zeros((12, 12, 12), np.uint8)
    inner = np.zeros((10, 10, 10), np.uint8)
    inner.reshape(-1)[: round(ml)] = 1
    seg[1:-1, 1:-1, 1:-1] = inner
    if border:
        seg[0, :4, 0] = 1
    return seg


def light(look: Look, ml: float, purpose: Purpose, **more) -> tuple[str, str]:
    verdict = judge(look, seg_of(ml, **more), 1000.0, purpose)
    assert verdict.line().startswith(verdict.light)
    return verdict.light, "; ".join(verdict.reasons)


def test_what_the_weights_were_made_for_is_green():
    assert light(NEWBORN, 50, PERINATAL) == (GREEN, "")
    assert light(GROWN, 600, ADULT) == (GREEN, "")
    told = judge(GROWN, seg_of(600), 1000.0, ADULT).line()
    assert told.startswith("green: as expected in size of the head, contrast") and "slice ratio" in told
    assert told.endswith("; no proof that the segmentation is right, look at the pictures")


@pytest.mark.parametrize(
    ("percent", "wanted"), ((None, GREEN), (25.0, GREEN), (25.1, YELLOW), (50.0, YELLOW), (51, RED))
)
def test_an_image_that_does_not_give_the_scan_back_is_not_green(percent, wanted):
    """Weights of four updates made noise, in the range of volumes, and the light was green."""
    verdict = judge(NEWBORN, seg_of(50), 1000.0, PERINATAL, misfit=percent)
    assert verdict.light == wanted and ("fit to the scan" in verdict.checked) == (percent is not None)
    assert wanted == GREEN or f"differs from the scan by {percent:.0f} %" in verdict.line()


@pytest.mark.parametrize(
    ("share", "wanted"), ((None, GREEN), (1.0, GREEN), (0.95, GREEN), (0.94, YELLOW), (0.7, YELLOW), (0.69, RED))
)
def test_a_cortex_in_pieces_is_not_green(share, wanted):
    """Phantoms and stacks with the mother around the head gave 8 to 29 pieces of a fitting volume."""
    verdict = judge(NEWBORN, seg_of(50), 1000.0, PERINATAL, whole_share=share)
    assert verdict.light == wanted and ("pieces" in verdict.checked) == (share is not None)
    words = f"cortical grey matter is in pieces: the two largest are {100 * (share or 0):.0f} % of it, expected 95 %"
    assert wanted == GREEN or words in verdict.line()
    own = judge(NEWBORN, seg_of(50), 1000.0, replace(PERINATAL, contrasts=()), whole_share=share)
    assert own.light == wanted, "weights of own trainings that call it a cortex are judged alike"
    other = judge(NEWBORN, seg_of(50), 1000.0, replace(PERINATAL, structures=((1, "deep grey"),)), whole_share=share)
    assert other.light == GREEN and "pieces" not in other.checked, "other structures may be in pieces"
    assert "do not say that they segment a cortex" in other.unchecked["pieces"]


@pytest.mark.parametrize(
    ("name", "cortex"),
    (
        ("cortical grey matter", True), ("cortex", True), ("Left-Cerebral-Cortex", True), ("ctx", False),
        ("subcortical grey matter", False), ("label 3, 42", False), ("structure of the training's labels", False),
    ),
)  # fmt: skip
def test_a_cortex_is_what_the_weights_call_so(name, cortex):
    purpose = Purpose(structures=((1, name), (2, "white matter")))
    assert purpose.is_cortex == cortex and (purpose.piece_mm3 is None) == (not cortex)
    assert not Purpose(structures=((1, "white matter"), (2, "cortex"))).is_cortex, "the image shows the first"


def test_what_is_not_looked_at_is_said_with_its_reason():
    verdict = judge(NEWBORN, seg_of(50), 1000.0, replace(PERINATAL, head_mm=None))
    assert verdict.unchecked.keys() == {"size of the head", "fit to the scan"} and verdict.light == GREEN
    assert "; not looked at: size of the head, fit to the scan; no proof" in verdict.line()
    assert verdict.to_dict()["unchecked"] == verdict.unchecked
    whole = judge(NEWBORN, seg_of(50), 1000.0, PERINATAL, misfit=1.0, whole_share=1.0)
    assert not whole.unchecked and "not looked at" not in whole.line() and not set(whole.checked) & {*whole.unchecked}
    upright = judge(replace(NEWBORN, slices="sagittal"), seg_of(50), 1000.0, PERINATAL, misfit=1.0, upright=True)
    assert not upright.unchecked and "direction of the slices" not in upright.checked and upright.light == GREEN


@pytest.mark.parametrize(
    ("dice", "wanted"), ((None, GREEN), (0.65, GREEN), (0.64, YELLOW), (0.3, YELLOW), (0.29, RED), (0.0, RED))
)
def test_weights_that_do_not_segment_their_own_test_subjects_are_not_green(dice, wanted):
    """After nine updates the image was the spline, which fits the scan, the segmentation noise of a fitting volume."""
    verdict = judge(NEWBORN, seg_of(50), 1000.0, PERINATAL, own_dice=dice)
    assert verdict.light == wanted and ("Dice of the weights' own training" in verdict.checked) == (dice is not None)
    assert wanted == GREEN or f"Dice of these weights on the Test subjects of their own training is {dice:.2f}" in (
        verdict.line()
    )


def test_the_dice_of_weights_is_that_of_their_card_and_the_lowest_of_those_that_are_averaged(tmp_path):
    cards = ({"Dice": 0.7, "config": {"Dice": 0.1}}, {"Dice_cortex": 0.25, "Dice_white": 0.75, "Dice": 0.9}, {})
    cards[1]["structures"] = [{"name": "cortex", "values": [3]}, {"name": "white", "values": [2]}]
    files = [tmp_path / f"{i}.safetensors" for i in range(len(cards))]
    for file, card in zip(files, cards, strict=True):
        weights.save_generator(file, build_generator(GeneratorSpec(kernel=1)), card=card)
    assert [choice.load_weights([file]).dice for file in files] == [0.7, 0.5, None]
    assert (
        choice.load_weights(files[::2]).dice == 0.7
        and own_dice(cards) == 0.5
        and own_dice([{"Dice": "high"}, None, 3]) is None
    )
    assert choice.load_weights(["perinatal"]).dice is None, "whose card has figures of whole heads"


@pytest.mark.parametrize(
    ("change", "ml"), (({"head_mm": 310.0}, 600), ({"head_ml": 1.1e4}, 600)), ids=["a neck", "much beside the brain"]
)
def test_a_mask_is_offered_where_more_than_a_head_is_seen_and_then_it_is_measured_inside(change, ml):
    look = replace(GROWN, **change)
    found, why = light(look, ml, ADULT)
    assert found == YELLOW and "(--mask FILE, an image of where the brain is, leaves out the rest)" in why
    assert "--mask" not in judge(look, seg_of(ml), 1000.0, ADULT, masked=True).line()
    both = light(replace(GROWN, filled=6, head_ml=1.1e4), ml, ADULT)[1]
    assert both.count("--mask FILE") == 1 and both.index("--mask") < both.index("% of the head")
    assert "--mask" not in light(replace(GROWN, head_mm=130.0), ml, ADULT)[1], "too small: nothing to leave out"
    assert "--mask" not in light(replace(GROWN, head_ml=1000.0), ml, ADULT)[1]


def test_a_newborn_given_to_adult_and_the_reverse_are_red():
    found, why = light(NEWBORN, 50, ADULT)
    assert found == RED and "96 mm long, made for 140 to 290 mm (--weights perinatal is made for it)" in why
    found, why = light(GROWN, 600, PERINATAL)
    assert found == RED and "--weights adult is made for it" in why


@pytest.mark.parametrize(
    ("change", "wanted", "words"),
    (
        ({"filled": 6}, RED, "tissue fills 6 of the 6 borders (--mask FILE, "),
        ({"head_mm": 0.0}, RED, "nothing is brighter than air"),
        ({"head_mm": 135.0}, YELLOW, "135 mm long"),
        ({"head_mm": 139.7}, YELLOW, "139.7 mm long, made for 140 to 290"),
        ({"fluid": 0.5}, RED, "the bright tail of intensities as in T2 or T2 before myelination images; made for T1"),
        ({"fluid": 0.1}, GREEN, ""),
        ({"lowest": -1000.0}, RED, "as in CT"),
        ({"voxel_mm": 0.5}, YELLOW, "voxels of 0.5 mm, made for 0.7 to 1.3 mm"),
        ({"voxel_mm": 0.2}, RED, "voxels of 0.2 mm"),
        ({"slice_ratio": 9.0}, YELLOW, "slices 9 times the voxel size"),
        ({"slice_ratio": 30.0}, RED, "slices 30 times"),
        ({"slices": "sagittal"}, YELLOW, "sagittal slices, made for axial ones"),
        ({"slices": "axial"}, GREEN, ""),
        ({"slices": ""}, GREEN, ""),
        ({"values": 1}, RED, "the head has 1 different value, as a mask, a label map or an image that was rounded has"),
        ({"values": 31}, RED, "the head has 31 different values"),
        ({"values": 32}, GREEN, ""),
        ({"head_ml": 900.0}, YELLOW, "66.7 % of the head, expected 6 to 45 %"),
    ),
)
def test_every_deviation_changes_the_light_and_says_why(change, wanted, words):
    found, why = light(replace(GROWN, **change), 600, ADULT)
    assert found == wanted and words in why


def ribbon(inside: float, cortex: float, outside: float, spacing=(1.0, 1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    """A brain of 120 x 150 x 110 mm: white matter, a cortex 3 mm thick with folds 24 mm apart, fluid, scalp; labels."""
    grid = np.meshgrid(*(np.arange(-80, 80, s) for s in spacing), indexing="ij")
    x, y, z = grid

    def ball(less: float) -> np.ndarray:
        return (x / (60 - less)) ** 2 + (y / (75 - less)) ** 2 + (z / (55 - less)) ** 2 < 1

    label = (ball(0) & ~ball(3)) | (ball(0) & (x % 24 < 3))
    image = np.select([label, ball(0), ball(-4), ball(-12)], [cortex, inside, outside, 700.0], 0.0)
    return image, label.astype(np.uint8)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 2.0, 1.6)])
def test_what_the_segmentation_encloses_is_told_beside_it(spacing):
    """Whatever the grid, and scalp that is brighter than all of it."""
    for inside, cortex, outside in ((780, 520, 150), (480, 620, 120), (350, 520, 950)):
        image, label = ribbon(inside, cortex, outside, spacing)
        assert plausibility.enclosed(image, label, spacing) == pytest.approx(inside / cortex, rel=2e-4)  # found: 3.4e-5
    assert plausibility.enclosed(image, np.zeros_like(label), spacing) is None
    ball = ribbon(1, 1, 1, spacing)[0] == 1
    assert plausibility.enclosed(image, ball, spacing) is None, "a structure that encloses nothing"


def test_a_fifth_of_voxels_that_are_far_brighter_do_not_change_the_brightness_of_what_is_enclosed():
    """Medians: vessels and the like, inside and in the segmentation itself, weigh as voxels, not as their values."""
    spacing = (2.5, 2.5, 2.5)
    image, label = ribbon(780, 520, 150, spacing)
    bright = (np.random.default_rng(0).random(image.shape) < 0.2) & (image > 0)
    image[bright] = 9000
    assert plausibility.enclosed(image, label, spacing) == 1.5


ALL = replace(ADULT, contrasts=("T1", "FLAIR", "T2"))
SEEN = {  # skew of intensities, brightness of what is enclosed
    "T1": (-0.35, 1.4),
    "FLAIR": (-0.45, 0.86),
    "FLAIR, cut wrongly": (-0.45, 1.14),
    "T2": (0.5, 0.75),
    "newborn T2": (0.3, 1.3),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_contrast_is_foreign_only_where_the_weights_do_not_know_it(name):
    fluid, within = SEEN[name]

    def seen(purpose: Purpose, **more: float) -> tuple[str, str]:
        verdict = judge(replace(GROWN, fluid=fluid, **more), seg_of(600), 1000.0, purpose, within=within)
        assert verdict.to_dict()["enclosed"] == within
        return verdict.light, "; ".join(verdict.reasons)

    light, why = seen(ADULT)
    assert light == (GREEN if name == "T1" else RED)
    if name == "FLAIR":
        assert "0.86 times the structure's brightness inside it as in FLAIR images; made for T1-like contrast" in why
    assert (seen(ALL)[0] == GREEN) == (name in ("T1", "FLAIR", "T2"))
    assert seen(replace(ADULT, contrasts=()))[0] == GREEN  # not said, not judged
    newborn = replace(ADULT, contrasts=("T2 before myelination",))
    assert (seen(newborn)[0] == GREEN) == (name == "newborn T2")


def test_a_contrast_that_the_weights_segment_poorly_is_yellow_and_says_so():
    """As FLAIR of earlier weights (a cortex 44 % too large was green), where nothing else comes into question."""
    adult = replace(MODELS["adult"].purpose, dice=(("T1", (0.73, 0.81)), ("FLAIR", (0.57, 0.63)), ("T2", (0.69, 0.78))))
    for name, (fluid, within) in SEEN.items():
        verdict = judge(replace(GROWN, fluid=fluid), seg_of(600), 1000.0, adult, within=within)
        rough = [reason for reason in verdict.reasons if "Dice 0.57 to 0.63 on their card" in reason]
        assert (verdict.light, len(rough)) == (YELLOW, 1) if name == "FLAIR" else not rough
        assert (verdict.light == GREEN) == (name in ("T1", "T2"))
    for fluid, within in ((-0.45, None), (0.0, 0.8)):  # nothing enclosed, or dark and bright alike: it may be T1 or T2
        assert judge(replace(GROWN, fluid=fluid), seg_of(600), 1000.0, adult, within=within).light == GREEN


def test_a_contrast_near_its_range_is_yellow_and_unclear_fluid_decides_nothing():
    assert judge(GROWN, seg_of(600), 1000.0, ADULT, within=1.22).light == YELLOW
    assert judge(replace(GROWN, fluid=0.1), seg_of(600), 1000.0, ADULT, within=1.4).light == GREEN
    assert judge(replace(GROWN, fluid=0.1), seg_of(600), 1000.0, ADULT, within=0.8).light == RED


def test_the_segmentation_is_compared_with_the_weights():
    assert light(GROWN, 200, ADULT)[0] == YELLOW and "200 mL, expected 230 to 800 mL" in light(GROWN, 200, ADULT)[1]
    assert light(GROWN, 100, ADULT)[0] == RED
    assert light(GROWN, 0, ADULT) == (RED, "nothing was segmented")
    found, why = light(NEWBORN, 50, PERINATAL, border=True)
    assert found == YELLOW and "lies on the image's border" in why
    assert "--mask" not in judge(replace(GROWN, filled=6), seg_of(600), 1000.0, ADULT, masked=True).line()


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("end", [0, -1])
def test_a_segmentation_is_told_on_every_border_of_the_image(axis, end):
    seg = np.zeros((24, 24, 24), np.uint8)
    seg[6:18, 6:18, 6:18] = 1
    assert "border" not in judge(NEWBORN, seg, 5e4 / 1728, PERINATAL).line()
    seg.swapaxes(0, axis)[end, 6:18, 6:18] = 1
    assert "lies on the image's border" in judge(NEWBORN, seg, 5e4 / 1872, PERINATAL).line()


def test_weights_that_say_nothing_are_never_green():
    found, why = light(GROWN, 600, Purpose())
    assert found == YELLOW and "what they were made for is not said" in why
    assert light(replace(GROWN, filled=6, lowest=-1000.0), 600, Purpose())[0] == YELLOW  # nothing to hold it against


def test_an_average_of_weights_for_different_images_is_called_so_and_names_them():
    """Was "what they were made for is not said", of weights that say it."""
    names, other = ("adult", "own.safetensors"), replace(ALL, contrast="T2-like contrast", head_mm=(50, 130))
    apart = averaged_apart(("adult", "perinatal"), [MODELS[name].purpose for name in ("adult", "perinatal")])
    assert "averaged, adult (T1-, T2- or FLAIR-like contrast, adults) and perinatal (T2-like contrast, 21 to" in apart
    assert "give -w only those made for images like this" in apart
    verdict = judge(GROWN, seg_of(600), 1000.0, common([MODELS["adult"].purpose, PERINATAL]), apart=apart)
    assert (verdict.light, verdict.reasons) == (YELLOW, (apart,)) and "not said" not in verdict.line()
    assert f"and own.safetensors ({NOT_SAID})" in averaged_apart(names, [ALL, Purpose()])
    assert "(T2-like contrast, head 50 to 130 mm)" in averaged_apart(names, [replace(ALL, contrast="c"), other])
    for alike in (ALL, replace(ALL, dice=(), voxel_mm=(1, 2), slice_ratio=None, structure_ml=(1, 2))):
        assert averaged_apart(names, [ALL, alike]) == ""
    assert averaged_apart(names, [Purpose(), Purpose()]) == averaged_apart(names[:1], [ALL]) == ""


# --- what weights say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_purpose_survives_a_file_and_a_shipped_one_has_all_parts(name, tmp_path):
    purpose = MODELS[name].purpose
    said = [key for key in purpose.__dataclass_fields__ if getattr(purpose, key)]
    assert set(purpose.__dataclass_fields__) - set(said) <= {
        "outside",
        "grid_mm",
        "island_mm3",
        "mirrored",
    }  # not of every model
    assert weights.purpose(name) == purpose and Purpose.of(weights.info(name)["made_for"]) == purpose
    saved = weights.save_generator(
        tmp_path / "w.safetensors", build_generator(GeneratorSpec(kernel=1)), card={MADE_FOR: purpose.to_dict()}
    )
    assert weights.purpose(saved) == purpose
    assert purpose.structure in purpose.line() and purpose.contrast in purpose.line()


def test_a_training_says_what_it_knows(tmp_path):
    store = Store(make_store(tmp_path))
    law = degradation(SMALL.replace(new_low_res=((0.5, 0.5, 2.0), (1.0, 1.0, 6.0))))
    feed = SimpleNamespace(store=store, degradation=law, visits=Visits(), axes=None)
    known = made_for(feed)
    volumes = [s.attrs["label_counts"]["1"] / 1000 for s in store.subjects if s.split == "Train"]
    assert known.structures == ((1, "structure of the training's labels"),)
    assert known.voxel_mm == (0.5, 1.0) and known.slice_ratio == (4.0, 6.0) and known.head_mm is None
    assert known.structure_ml == (min(volumes) / 1.5, max(volumes) * 1.5)
    for subject in store.subjects:
        subject.affine[:3, :3] *= 2  # voxels of eight times the volume
    assert made_for(feed).structure_ml == (8 * min(volumes) / 1.5, 8 * max(volumes) * 1.5)
    for subject in store.subjects:
        subject.affine[:3, :3] /= 2
        subject.attrs["label_classes"] = [3, 42]
    assert made_for(feed).structure == "label 3, 42"
    assert light(replace(GROWN, voxel_mm=1.0, slice_ratio=5.0), sum(known.structure_ml) / 2, known)[0] == GREEN
    assert Purpose.of(known.to_dict()) == known


@pytest.mark.parametrize(
    "card",
    (
        None,
        "a brain",
        {"head_mm": [9, 3], "slice_ratio": ["a", 2], "voxel_mm": [1], "structures": "cortex", "contrast": 5},
        {"dice": {"X": [0.1, 0.2], "T1": [0.8, 0.7], "T2": 3}},
        {"structures": [{"value": "1", "name": "cortex"}, {"value": 1, "name": " "}, 3], "contrasts": ["X", 3]},
    ),
)
def test_what_is_no_purpose_is_not_said(card):
    assert Purpose.of(card) == Purpose() and Purpose.of(card).line() == "what they were made for is not said"


def test_ranges_of_a_card_are_two_numbers_from_zero_up_the_smaller_first():
    for given, found in (([0, 5], (0.0, 5.0)), ((2, 2), (2.0, 2.0)), ([5, 1], None), ([-1, 5], None), ([1, 1e9], None)):
        assert Purpose.of({"structure_ml": given}).structure_ml == found, given
    assert (span((2.0, 2.0)), span((0.7, 1.25)), span(None)) == ("2", "0.7 to 1.25", "")


def test_of_averaged_weights_counts_what_all_say_alike():
    other = replace(ADULT, contrast="any", structure_ml=None)
    both = common([ADULT, other])
    assert both.structures == ADULT.structures and both.contrast == "" and both.structure_ml is None


def test_the_first_model_is_the_default_of_load_generator():
    assert weights.DEFAULT == "adult" and fastsrgan.load_generator().spec == fastsrgan.load_generator("adult").spec
    assert not np.array_equal(
        fastsrgan.load_generator("perinatal").stem[0].detach(), fastsrgan.load_generator().stem[0].detach()
    )


# --- through files --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The package's models replaced by tiny networks."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(weights, "SHIPPED", folder)
    for seed, model in enumerate(MODELS.values(), 1):
        weights.save_generator(folder / model.file, build_generator(GeneratorSpec(kernel=1), seed=seed))
    return folder


def scan(path, size_mm: float, spacing=(4.0, 4.0, 8.0), code=None):
    """The phantom's head, of another size."""
    shape = tuple(round(1.1 * extent / s) for extent, s in zip((140, 176, 124), spacing, strict=True))
    data = head(shape, spacing).data
    affine = rigid(tuple(size_mm / 176 * s for s in spacing))
    path.parent.mkdir(parents=True, exist_ok=True)
    return images.save(path, data, affine)


def record_of(out, name="a"):
    return json.loads((out / f"{name}.json").read_text())


def test_the_head_chooses_the_weights_and_the_record_says_so(tmp_path, small, caplog):
    caplog.set_level("INFO", "fastsrgan")
    paths = [scan(tmp_path / "a.nii.gz", 96), scan(tmp_path / "b.nii.gz", 200)]
    done = infer_files(paths, tmp_path / "out", **FAST)
    assert done["weights"] == {"auto": {name: weights.info(name)["sha256"] for name in MODELS}}
    for name, model in (("a", "perinatal"), ("b", "adult")):
        record = record_of(tmp_path / "out", name)
        assert record["weights"]["name"] == model and record["weights"]["chosen"].startswith("auto: head")
        assert record["weights"]["sha256"] == weights.info(model)["sha256"]
        assert record["structures"] == [{"value": 1, "name": MODELS[model].structure}]
        assert record["made_for"] == MODELS[model].purpose.to_dict()
        header = nib.load(tmp_path / "out" / f"{name}_seg.nii.gz").header
        assert header.get_intent()[0] == "label" and header.get_intent()[2] == MODELS[model].structure[:15]
        assert MODELS[model].structure in bytes(header["descrip"]).decode()
    assert "a.nii.gz: weights: perinatal (head" in caplog.text and "--weights chooses otherwise" in caplog.text
    for model in MODELS:  # what it is for, once
        assert caplog.text.count(f"weights: {model} ({MODELS[model].purpose.line()})") == 1
    # A resumed call compares what it would choose, by what was seen then.
    seen = []
    look_at = infer_image.look_at
    infer_image.look_at = lambda *args: seen.append(args) or look_at(*args)
    try:
        assert infer_files(paths, tmp_path / "out", "auto", resume=True, **FAST)["skipped"] == 2
        assert not seen
        record = record_of(tmp_path / "out")
        del record["plausibility"]
        (tmp_path / "out" / "a.json").write_text(json.dumps(record))
        assert infer_files(paths[:1], tmp_path / "out", resume=True, **FAST)["skipped"] == 1 and len(seen) == 1
    finally:
        infer_image.look_at = look_at
    with pytest.raises(UsageError, match="another weights"):
        infer_files(paths[:1], tmp_path / "out", "adult", resume=True, **FAST)
    infer_files(paths[:1], tmp_path / "out", "adult", overwrite=True, **FAST)
    record = record_of(tmp_path / "out")
    assert "chosen" not in record["weights"] and record["plausibility"]["light"] == RED
    assert any(w.startswith("plausibility red") and "--weights perinatal" in w for w in record["warnings"])
    with pytest.raises(UsageError, match="another weights"):
        infer_files(paths[:1], tmp_path / "out", resume=True, **FAST)


def test_the_head_inside_a_mask_is_the_one_that_chooses(tmp_path, small):
    path = scan(tmp_path / "a.nii.gz", 200)
    image = images.load(path)
    mask = np.zeros(image.data.shape, np.uint8)
    mask[tuple(slice(round(0.3 * n), round(0.7 * n)) for n in mask.shape)] = 1
    images.save(tmp_path / "mask.nii.gz", mask, image.affine)
    infer_files([path], tmp_path / "out", mask=tmp_path / "mask.nii.gz", **FAST)
    record = record_of(tmp_path / "out")
    assert record["weights"]["name"] == "perinatal"
    assert record["plausibility"]["scan"] == measure(image.data, image.spacing, mask, image.affine).to_dict()


def test_auto_is_averaged_with_nothing_and_a_file_of_that_name_comes_first(tmp_path, small, monkeypatch):
    with pytest.raises(UsageError, match="averaged with none"):
        ModelChoice(["auto", "adult"])
    monkeypatch.chdir(tmp_path)
    weights.save_generator(tmp_path / "auto", build_generator(GeneratorSpec(kernel=2), seed=1))
    named = ModelChoice("auto").named
    assert named is not None and named.facts["spec"]["kernel"] == 2 and ModelChoice(None).named is not None


def test_an_average_of_two_shipped_models_says_so_in_every_record(tmp_path):
    infer_files([scan(tmp_path / "a.nii.gz", 96)], tmp_path / "out", ["adult", "perinatal"], **FAST)
    told = record_of(tmp_path / "out")["plausibility"]
    assert any("averaged, adult (T1-, T2- or FLAIR-like" in reason for reason in told["reasons"])
    assert told["light"] != GREEN and ModelChoice(["adult", "adult"]).named.apart == ""


def test_weights_that_do_not_say_are_told_in_one_line(tmp_path, caplog):
    caplog.set_level("INFO", "fastsrgan")
    model = weights.save_generator(tmp_path / "w.safetensors", build_generator(GeneratorSpec(kernel=1), seed=1))
    infer_files([scan(tmp_path / "a.nii.gz", 96)], tmp_path / "out", model, **FAST)
    assert caplog.text.count("w.safetensors: what they were made for is not said") == 1
    record = record_of(tmp_path / "out")
    told = record["plausibility"]
    assert record["structures"] == [] and record["made_for"] == {} and told["light"] == RED
    assert "hardly trained" in told["reasons"][0] and told["checked"] == ["fit to the scan"]
    infer_files([tmp_path / "a.nii.gz"], tmp_path / "off", model, agree="off", **FAST)
    told = record_of(tmp_path / "off")["plausibility"]
    assert told["light"] == YELLOW and told["checked"] == []
    assert nib.load(tmp_path / "out" / "a_seg.nii.gz").header.get_intent()[2] == "structure"


def test_derivatives_are_resumed_by_the_chosen_name(tmp_path, small):
    root = tmp_path / "raw"
    scan(root / "sub-01" / "anat" / "sub-01_T2w.nii.gz", 96)
    (root / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.9.0"}')
    infer_bids(root, tmp_path / "out", **FAST)
    anat = tmp_path / "out" / "sub-01" / "anat"
    assert "cortical grey matter" in (anat / "sub-01_desc-cortexT2w_dseg.tsv").read_text()
    assert infer_bids(root, tmp_path / "out", resume=True, **FAST)["skipped"] == 1
    with pytest.raises(UsageError, match="another weights"):
        infer_bids(root, tmp_path / "out", "adult", resume=True, **FAST)


# --- isotropic images -----------------------------------------------------------------------------------------------


def infer(*words) -> int:
    return main([str(word) for word in ("infer", "--patch", 16, "--step", 16, "--device", "cpu", *words)])


def test_an_isotropic_image_is_left_alone_unless_asked_for(tmp_path, small, capsys):
    same = scan(tmp_path / "same.nii.gz", 96, (6.0, 6.0, 6.0))
    thick = scan(tmp_path / "thick.nii.gz", 96)
    assert infer(same, "-o", tmp_path / "out", "--json") == 2
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["unneeded"] == 1 and told["done"] == 0 and told["items"][0]["status"] == "unneeded"
    assert "nothing to super-resolve" in told["items"][0]["reason"] and "--new-resolution same" in shown.err
    assert not list((tmp_path / "out").iterdir())
    assert infer(same, "-o", tmp_path / "out") == 2
    assert capsys.readouterr().out.startswith(f"unneeded {same}  voxels of 3.27")
    blurred = scan(tmp_path / "blurred.nii.gz", 96, (6.0, 6.0, 6.0))
    (tmp_path / "blurred.json").write_text('{"SliceThickness": 6.0}', encoding="utf8")  # of voxels of 3.27 mm
    assert infer(blurred, "-o", tmp_path / "blurred") == 0, "slices that overlap"
    assert infer(same, thick, "-o", tmp_path / "out") == 0
    told = json.loads((tmp_path / "out" / "infer_summary.json").read_text())
    assert [item["status"] for item in told["items"]] == ["unneeded", "done"] and told["failed"] == 0
    assert infer(same, "-o", tmp_path / "out", "--new-resolution", "same") == 0
    assert images.load(tmp_path / "out" / "same_seg.nii.gz").data.shape == images.load(same).data.shape
    capsys.readouterr()


# --- the light is shown ---------------------------------------------------------------------------------------------


def test_the_light_is_in_the_terminal_and_the_report(tmp_path, small, capsys):
    path = scan(tmp_path / "a.nii.gz", 96)
    assert infer(path, "-o", tmp_path / "out", "-w", "adult") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"done    {path}  red  ") and "plausibility red: " in shown.err
    assert main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'class="light-red">● red</b>' in page and "made for 140 to 290 mm" in page
    assert "Segmented: cortical grey matter; made for T1-, T2- or FLAIR-like contrast" in page
    capsys.readouterr()


# --- one table of models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_table_and_the_card_say_what_the_model_says(name):
    purpose, root = MODELS[name].purpose, Path(__file__).parent.parent
    (row,) = [line for line in (root / "README.md").read_text("utf8").splitlines() if line.startswith(f"| `{name}`")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    wanted = [purpose.structure, purpose.contrast, purpose.ages, purpose.view]
    slices = f"{' or '.join(purpose.slices)}, {span(purpose.slice_ratio)}"
    assert cells[1:-1] == [*wanted, span(purpose.head_mm), slices]
    page = {"adult": "README.md"}.get(name, f"{name}.md")
    figures = ", ".join(f"{c} {low:.2f} to {high:.2f}" for c, (low, high) in purpose.dice)
    assert cells[-1] == f"{figures} ([card](fastsrgan/models/{page}))"
    card = (root / "fastsrgan" / "models" / page).read_text("utf8")
    for contrast, ends in purpose.dice:
        case = {"T2 before myelination": "perinatal "}.get(contrast, f" {contrast}")
        rows = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("| ") and case in line[:24]]
        dice = [float(cells[10]) for cells in rows if len(cells) == 13]
        assert len(dice) >= 6 and ends == pytest.approx((min(dice), max(dice)), abs=0.0051)  # found: 0.005, two digits
    assert f"| segments | {purpose.line()} |" in card


def test_slices_that_weights_do_not_know_are_segmented_upright_and_then_no_reason_for_doubt(tmp_path, caplog):
    """Told in one line, recorded, and off where it is said; weights that name no slices have the one pass."""
    names = {"known": ("axial",), "not-said": ()}
    for name, slices in names.items():
        purpose = Purpose(structures=((1, "cortex"),), slices=slices)
        generator = build_generator(GeneratorSpec(kernel=1), seed=3)
        weights.save_generator(tmp_path / name, generator, card={MADE_FOR: purpose.to_dict()})
    rng = np.random.default_rng(2)
    for name, shape, mm in (("sagittal", (6, 20, 20), (3.0, 1, 1)), ("axial", (20, 20, 6), (1.0, 1, 3))):
        data = np.pad(rng.random(shape, np.float32) * 500, 3)
        nib.save(nib.Nifti1Image(data, np.diag([*mm, 1.0])), tmp_path / f"{name}.nii.gz")
    found = {}
    for image, model, upright in itertools.product(("sagittal", "axial"), names, ("auto", "off")):
        out = tmp_path / f"{image}-{model}-{upright}"
        caplog.clear()
        with caplog.at_level("INFO", logger="fastsrgan"):
            infer_files([tmp_path / f"{image}.nii.gz"], out, tmp_path / model, upright=upright, save_prob=True, **FAST)
        record = json.loads((out / f"{image}.json").read_text(encoding="utf8"))
        told = [line for line in caplog.messages if "sagittal slices: segmented with the head upright" in line]
        turned = (image, model, upright) == ("sagittal", "known", "auto")
        assert (record.get("upright") == [2, 0, 1]) is turned and len(told) == turned, out
        doubted = any("sagittal slices, made for axial ones" in why for why in record["plausibility"]["reasons"])
        assert doubted == ((image, model, upright) == ("sagittal", "known", "off"))
        assert record["asked"].get("upright") == ("off" if upright == "off" else None)
        found[image, model, upright] = np.asarray(nib.load(out / f"{image}_prob.nii.gz").dataobj)
    assert (found["sagittal", "not-said", "auto"] == found["sagittal", "not-said", "off"]).all()
    assert (found["axial", "known", "auto"] == found["axial", "known", "off"]).all()
    assert np.abs(found["sagittal", "known", "auto"] - found["sagittal", "known", "off"]).max() > 0.05  # found: 0.70


@pytest.mark.parametrize("known, scan, turned", [
    (("sagittal",), "axial", False), (("sagittal",), "coronal", False), (("coronal", "sagittal"), "axial", False),
    (("axial",), "coronal", True), (("axial", "coronal"), "sagittal", True), (("axial", "coronal"), "coronal", False),
])  # fmt: skip
def test_a_head_is_turned_upright_for_weights_alone_that_saw_heads_so(tmp_path, caplog, known, scan, turned):
    """To others it would be as strange; their light says what they do not know, whatever is asked for."""
    purpose = Purpose(structures=((1, "cortex"),), slices=known)
    weights.save_generator(tmp_path / "w", build_generator(GeneratorSpec(kernel=1)), card={MADE_FOR: purpose.to_dict()})
    thick = ("sagittal", "coronal", "axial").index(scan)
    shape, mm = ([6 if d == thick else 16 for d in range(3)], [3.0 if d == thick else 1.0 for d in range(3)])
    data = np.pad(np.random.default_rng(2).random(shape, np.float32) * 500, 3)
    nib.save(nib.Nifti1Image(data, np.diag([*mm, 1.0])), tmp_path / "a.nii.gz")
    for asked in ("auto", "on"):
        caplog.clear()
        with caplog.at_level("INFO", logger="fastsrgan"):
            infer_files([tmp_path / "a.nii.gz"], tmp_path / asked, tmp_path / "w", upright=asked, agree="off", **FAST)
        record = json.loads((tmp_path / asked / "a.json").read_text(encoding="utf8"))
        assert any("segmented with the head upright" in line for line in caplog.messages) == (
            turned and asked == "auto"
        )
        assert ("upright" in record) == (turned if asked == "auto" else scan != "axial")
        doubted = any(f"{scan} slices, made for" in why for why in record["plausibility"]["reasons"])
        assert doubted == (scan not in known and not turned)


def test_weights_that_know_left_and_right_exchanged_see_both(tmp_path, caplog):
    """Along the axis of the file that goes from left to right, however it is stored; told, recorded, and off where it
    is said. Weights that do not say so have one pass."""
    for name, mirrored in (("both", "R"), ("not-said", "")):
        purpose = Purpose(structures=((1, "cortex"),), mirrored=mirrored)
        generator = build_generator(GeneratorSpec(kernel=1), seed=3)
        weights.save_generator(tmp_path / name, generator, card={MADE_FOR: purpose.to_dict()})
    data = np.pad(np.random.default_rng(2).random((20, 18, 6), np.float32) * 500, 3)
    axial = np.diag([1.0, 1, 3, 1])
    nib.save(nib.Nifti1Image(data, axial), tmp_path / "ras.nii.gz")
    nib.save(nib.Nifti1Image(np.moveaxis(data, 0, 1)[:, ::-1], axial[:, [1, 0, 2, 3]]), tmp_path / "als.nii.gz")
    found = {}
    for image, model, flips in itertools.product(("ras", "als"), ("both", "not-said"), ("auto", "none", "x", "y")):
        out = tmp_path / f"{image}-{model}-{flips}"
        caplog.clear()
        with caplog.at_level("INFO", logger="fastsrgan"):
            infer_files([tmp_path / f"{image}.nii.gz"], out, tmp_path / model, flips=flips, **FAST)
        record = json.loads((out / f"{image}.json").read_text(encoding="utf8"))
        sides = (model, flips) == ("both", "auto")
        assert len([line for line in caplog.messages if "left and right exchanged" in line]) == sides
        chosen = flips if flips in "xy" else {"ras": "x", "als": "y"}[image] if sides else None
        assert record.get("flips") == chosen and record["asked"].get("flips") == (None if flips == "auto" else flips)
        found[image, model, flips] = np.asarray(nib.load(out / f"{image}_sr.nii.gz").dataobj)
    for image, axis in (("ras", "x"), ("als", "y")):
        assert (found[image, "both", "auto"] == found[image, "both", axis]).all()
        assert (found[image, "not-said", "auto"] == found[image, "both", "none"]).all()
    moved = np.abs(found["ras", "both", "auto"] - found["ras", "both", "none"]).max()
    assert moved > 10  # found: 400


@pytest.mark.parametrize("moved", (0.0, -300.0, -5000.0))
def test_a_head_of_shifted_intensities_is_as_large(grown, moved):
    """z-scores and images wholly below 0: the same box, volume and skew; a mask's outside is no tissue."""
    plain = measure(grown.data, (4, 4, 8))
    shifted = measure(grown.data + np.float32(moved), (4, 4, 8))
    assert replace(shifted, lowest=plain.lowest) == replace(plain, fluid=shifted.fluid)
    assert shifted.fluid == pytest.approx(plain.fluid, abs=1e-3) and plain.is_head
    box = np.zeros(grown.data.shape, np.uint8)
    box[10:20, 12:30, 4:12] = 1
    inside = [measure(grown.data + np.float32(m), (4, 4, 8), box).head_mm for m in (0.0, moved)]
    assert inside[0] == inside[1] < plain.head_mm
