"""Training on images made of label maps: the table, the store, every visit anew and keyed, resumed to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from cohort import SMALL, losses, make_store
from feed_store import CPU, DRAWN, RULE, digest

from fastsrgan.convert import convert
from fastsrgan.data.feed import Feed, deal, resident_limit
from fastsrgan.data.settings_check import refuse_faults
from fastsrgan.data.subject import PatchRule
from fastsrgan.data.visit import Visits
from fastsrgan.errors import InputError, ModelError, UsageError
from fastsrgan.io import nifti as images
from fastsrgan.observation.model import Degradation
from fastsrgan.observation.synthesis import Synthesis
from fastsrgan.store.reader import Store, open_store
from fastsrgan.train import run as run_module
from fastsrgan.train.run import train
from fastsrgan.train.validate import fixed_resident, readable

SHAPE = (24, 28, 30)
CONFIG = SMALL.replace(structure="3,42", synthetic_strip=0.5, resident_subjects=1)
BY_MASK = {"image_cropping_method": "overlapping_with_mask"}


def tissues(i: int) -> np.ndarray:
    """A head in FreeSurfer's numbers."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    r = np.sqrt(((grid * np.array([1.1, 1.0 + 0.1 * i, 1.2])[:, None, None, None]) ** 2).sum(0))
    labels = np.zeros(SHAPE, np.int16)
    for radius, value in ((0.95, 516), (0.8, 24), (0.7, 3), (0.45, 2)):
        labels[r < radius] = value
    labels[(grid[0] > 0) & (labels == 3)] = 42
    return labels


def make(folder: Path) -> Path:
    """Two Train subjects and a Test subject without images, one Train subject with an image, no label and tissues."""
    lines = ["HR_image,Label_image,Tissue_image,Base"]
    for i, base in enumerate(["Train", "Train", "Train", "Test"]):
        images.save(folder / f"sub-{i}_tissues.nii.gz", tissues(i), np.diag([1.0, -1.0, 1.0, 1.0]))
        own = ""
        if i == 2:
            own = "sub-2_T1w.nii.gz"
            images.save(folder / own, (3 * tissues(i)).astype(np.int16), np.diag([1.0, -1.0, 1.0, 1.0]))
        lines.append(f"{own},,sub-{i}_tissues.nii.gz,{base}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    convert(folder / "cohort.csv", folder / "cohort.zarr")
    return folder / "cohort.zarr"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("tissues"))


@pytest.fixture(scope="module")
def store(path) -> Store:
    return open_store(path)


def feed(store: Store, share: float = 0.0, structure=(3, 42), **options) -> Feed:
    return Feed(store, DRAWN, RULE, seed=3, device=CPU, visits=Visits(share, structure, Synthesis()), **options)


def test_a_store_holds_tissues_with_and_without_an_image(path, store):
    found = {s.id: s for s in store.subjects}
    assert [s.has_image for s in found.values()] == [False, False, True, False]
    assert all(s.has_tissues and not s.has_label for s in found.values())
    for i, s in enumerate(found.values()):
        sample = store.read(s.id)
        assert sample.tissues is not None and sample.tissues.dtype == np.uint16
        assert np.array_equal(sample.tissues, tissues(i)) and (sample.image is None) == (i != 2)
        assert np.array_equal(store.read_region(s.id, "tissues", (slice(3, 9),) * 3), tissues(i)[3:9, 3:9, 3:9])
    assert not store.verify()
    before = {p: p.read_bytes() for p in path.rglob("0") if p.is_file()}
    assert convert(path.parent / "cohort.csv", path, resume=True)["kept"] == 4
    assert before == {p: p.read_bytes() for p in path.rglob("0") if p.is_file()}


def test_small_values_are_stored_in_a_byte(tmp_path):
    images.save(tmp_path / "a_tissues.nii.gz", np.minimum(tissues(0), 8).astype(np.int16), np.eye(4))
    (tmp_path / "t.csv").write_text("Tissue_image,Base\na_tissues.nii.gz,Train\n", encoding="utf8")
    convert(tmp_path / "t.csv", tmp_path / "s.zarr")
    (subject,) = open_store(tmp_path / "s.zarr").subjects
    assert subject.arrays == {"tissues": {"dtype": "uint8"}}


def test_a_row_without_image_and_tissues_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("HR_image,Label_image,Tissue_image,Base\n,,,Train\n", encoding="utf8")
    with pytest.raises(InputError, match="HR_image is empty"):
        convert(tmp_path / "t.csv", tmp_path / "s.zarr")


def test_tissues_of_another_grid_are_refused(tmp_path):
    images.save(tmp_path / "a.nii.gz", tissues(0), np.eye(4))
    images.save(tmp_path / "b.nii.gz", tissues(0)[1:], np.eye(4))
    (tmp_path / "t.csv").write_text(
        "HR_image,Label_image,Tissue_image,Base\na.nii.gz,,b.nii.gz,Train\n", encoding="utf8"
    )
    with pytest.raises(InputError, match="Tissue_image"):
        convert(tmp_path / "t.csv", tmp_path / "s.zarr")


def test_every_visit_is_a_function_of_seed_epoch_and_subject(store):
    made = {(e, s.id): digest(feed(store).prepare(e, s.id)) for e in (1, 2) for s in store.subjects}
    again = {(e, s.id): digest(feed(store).prepare(e, s.id)) for s in store.subjects[::-1] for e in (2, 1)}
    assert made == again
    assert len(set(made.values())) == len(made)
    other = Feed(store, DRAWN, RULE, seed=4, device=CPU, visits=Visits(0.0, (3, 42), Synthesis()))
    assert digest(other.prepare(1, "sub-0_tissues")) != made[1, "sub-0_tissues"]


def test_images_are_made_anew_in_every_epoch_and_seed(store):
    """Not only degraded anew: with one resolution and contrast and without noise they differ, and their labels do."""
    plain = Degradation(((1.0, 1.0, 3.0),), 0.0, 0.0)
    looks = []
    for seed, epoch in ((3, 1), (3, 2), (3, 3), (4, 1), (3, 1)):
        made = Feed(store, plain, RULE, seed=seed, device=CPU, visits=Visits(1.0, (3, 42), Synthesis()))
        looks.append(made.prepare(epoch, "sub-0_tissues"))
    for part in ("hr", "label"):
        bits = [getattr(look, part).numpy().tobytes() for look in looks]
        assert bits[0] == bits[-1] and len(set(bits)) == 4


def test_ranks_and_threads_see_the_same_visits(store):
    names = [s.id for s in store.subjects if s.split == "Train"]

    def seen(rank: int, world: int, threads: int) -> dict[tuple[int, str], str]:
        plan = [(e, g) for e in (1, 2) for g in deal(names, 3, e, 2, rank, world)]
        groups = feed(store, 0.5, rank=rank, world=world, threads=threads).groups(iter(plan))
        return {(e, r.subject): digest(r) for (e, _), group in zip(plan, groups, strict=True) for r in group}

    alone = seen(0, 1, 1)
    assert len(alone) == 6
    for rank in range(3):
        assert seen(rank, 3, 2).items() <= alone.items()


def test_the_share_of_made_images_is_the_one_asked_for(store):
    sample = store.read("sub-2_T1w")
    visits = Visits(0.3, (3, 42), Synthesis())
    own = [visits.of(sample, (0, epoch, "sub-2"), share=None).image is sample.image for epoch in range(60)]
    assert 0.5 < np.mean(own) < 0.9  # found: 0.7
    assert all(visits.of(sample, (0, epoch, "sub-2"), share=0.0).image is sample.image for epoch in range(20))
    assert not any(Visits(1.0, (3, 42)).of(sample, (0, e, "sub-2")).image is sample.image for e in range(3))


def test_a_made_image_has_no_mask_of_another_image(store):
    sample = store.read("sub-2_T1w")
    sample = dataclasses.replace(sample, mask=np.zeros(sample.image.shape, np.uint8))
    made = Visits(1.0, (3, 42)).of(sample, (0, 1, "sub-2"))
    assert made.image is not sample.image and made.mask is None and made.tissues is None
    assert Visits(0.0, (3, 42)).of(sample, (0, 1, "sub-2")).mask is sample.mask


def test_the_label_is_the_structure_in_made_and_own_images(store):
    sample = store.read("sub-2_T1w")
    own = Visits(0.0, (3, 42)).of(sample, (0, 1, "a"))
    assert np.array_equal(own.label, np.isin(tissues(2), (3, 42)))
    other = Visits(0.0, (2,)).of(sample, (0, 1, "a"))
    assert np.array_equal(other.label, tissues(2) == 2)
    made = Visits(1.0, (3, 42)).of(sample, (0, 1, "a"))
    assert made.label.dtype == np.uint8 and set(np.unique(made.label)) == {0, 1}
    assert made.label.shape == made.image.shape and made.tissues is None
    labelled = dataclasses.replace(sample, label=np.zeros(SHAPE, np.uint8))
    assert not Visits(0.0, (3, 42)).of(labelled, (0, 1, "a")).label.any()  # a Label_image is the label


def test_structures_that_are_missing_are_told(store):
    sample = store.read("sub-0_tissues")
    with pytest.raises(InputError, match="--structure"):
        Visits().of(sample, (0, 1, "a"))
    with pytest.raises(InputError, match="hold none of 77"):
        Visits(0.0, (77,)).of(sample, (0, 1, "a"))


def test_test_subjects_look_the_same_in_every_epoch(store):
    bits = set()
    for _ in range(2):
        made = readable(feed(store, 1.0), "sub-3_tissues")
        bits.add(digest(fixed_resident(feed(store), made, 0, 1)))
    assert len(bits) == 1
    own = readable(feed(store, 1.0), "sub-2_T1w")
    assert np.array_equal(own.image, 3 * tissues(2))


def test_memory_counts_the_largest_image_that_may_be_made(store):
    names = [s.id for s in store.subjects]
    budget = 10 * int(np.prod(SHAPE)) * 9
    small, large = (
        resident_limit(store, names, budget, visits=Visits(1.0, (3,), Synthesis(scaling=(0.5, s)))) for s in (1.0, 1.5)
    )
    assert (small, large) == (4, 1)  # of four, and of 10 / (2 x 1.5^3): all three axes may grow


def test_a_run_learns_from_label_maps_alone(path, tmp_path):
    result = train(path, tmp_path / "run", CONFIG.replace(validate_every=1))
    assert result["updates"] == 8 and result["left_out"] == {}
    assert result["best_dice"] is not None and result["data_wait_seconds"] >= 0


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(path, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = CONFIG.replace(synthetic=0.5, epochs=3, steps_per_epoch=3)
        train(path, tmp_path / "whole", config)
        train(path, tmp_path / "parts", config.replace(epochs=1))
        train(path, tmp_path / "parts", config, resume=True)
    finally:
        torch.set_num_threads(before)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, other = ((tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert one == other


def test_a_run_without_a_structure_is_refused_at_once(path, tmp_path):
    with pytest.raises(InputError, match="no structure is named"):
        train(path, tmp_path / "run", CONFIG.replace(structure=""))


def test_tissues_without_the_structure_are_refused_before_the_first_update(store, path):
    """Each was left out with a warning when its turn came, in the middle of a run."""
    law, rule = run_module.degradation(CONFIG), PatchRule.of(CONFIG)
    for share in (0.0, 1.0):
        refuse_faults(store, law, rule, None, (77, 3), share=share)  # one value is enough
    with pytest.raises(InputError, match="tissues hold none of the structure's values 77, 78") as caught:
        refuse_faults(store, law, rule, None, (77, 78))
    told = str(caught.value)
    assert all(f"sub-{i}_" in told for i in range(4)) and "(they hold 2, 3, 24, 42, 516)" in told
    assert "name values of the tissues with --structure" in caught.value.hint
    other = open_store(path)
    subject = other.subject("sub-2_T1w")  # an image of its own, and now a label: tissues are for made images alone
    subject.arrays["label"] = subject.arrays["tissues"]
    for share, missing in ((0.0, False), (0.5, True)):
        with pytest.raises(InputError) as caught:
            refuse_faults(other, law, rule, None, (77,), share=share)
        assert ("sub-2_T1w" in str(caught.value)) == missing


@pytest.mark.parametrize(("way", "why"), [({"fit_mask": True}, "fit_mask"), (BY_MASK, "overlapping_with_mask")])
def test_masks_are_refused_where_images_are_made(tmp_path, way, why):
    images.save(tmp_path / "a_tissues.nii.gz", tissues(0), np.eye(4))
    images.save(tmp_path / "a_mask.nii.gz", (tissues(0) > 0).astype(np.uint8), np.eye(4))
    row = "HR_image,Label_image,Mask_image,Tissue_image,Base\n,,a_mask.nii.gz,a_tissues.nii.gz,Train\n"
    (tmp_path / "t.csv").write_text(row, encoding="utf8")
    convert(tmp_path / "t.csv", tmp_path / "s.zarr")
    with pytest.raises(InputError, match=f"made of tissues have no mask: a_tissues .{why} needs HR_image"):
        train(tmp_path / "s.zarr", tmp_path / "run", CONFIG.replace(**way))


def test_a_structure_of_tissues_that_no_subject_has_is_refused(tmp_path):
    store = make_store(tmp_path)
    for settings in ({"synthetic": 0.5}, {}):
        with pytest.raises(UsageError, match=r"^structure: no subject has tissues"):
            train(store, tmp_path / "run", SMALL.replace(structure="1", **settings))


def test_a_subject_with_neither_label_nor_tissues_is_refused_beside_those_with_tissues(path):
    store = open_store(path)
    del store.subject("sub-2_T1w").arrays["tissues"]
    law, rule = run_module.degradation(CONFIG), PatchRule.of(CONFIG)
    with pytest.raises(InputError, match=r"without a label: sub-2_T1w .training needs Label_image or Tissue_image"):
        refuse_faults(store, law, rule, None, run_module.visits(CONFIG).structure)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"synthetic": 1.5}, "synthetic"),
        ({"synthetic": 0.5, "structure": ""}, "synthetic"),
        ({"synthetic": 0.5, "fit_mask": True}, "synthetic"),
        ({"synthetic_strip": -0.1}, "synthetic_strip"),
        ({"structure": "grey"}, "structure"),
        ({"structure": "3;42"}, "structure"),
        ({"tissue_means": "5:0.4"}, "tissue_means"),
        ({"tissue_means": "5:nan:0.1"}, "tissue_means"),
    ],
)
def test_settings_that_are_none_are_refused(changes, name):
    with pytest.raises(ModelError, match=name):
        CONFIG.replace(**changes)
