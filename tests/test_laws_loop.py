"""The laws of an iteration and of the loop around it, by networks that write down what they are given, and when."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from spies import CONFIG, PATCHES, SCORES, SUBJECTS, spied

from fastsrgan.data.feed import deal
from fastsrgan.data.pool import Batch
from fastsrgan.data.visit import Visits
from fastsrgan.errors import ResourceError
from fastsrgan.model import safetensors
from fastsrgan.model import weights as weight_files
from fastsrgan.train import loop as loop_module
from fastsrgan.train import snapshots
from fastsrgan.train.gan import Models
from fastsrgan.train.run import degradation
from fastsrgan.train.state import Position

TOTAL = len(SUBJECTS) * PATCHES


def subjects_of(ids: list[str]) -> set[str]:
    return {name.partition("@")[0] for name in ids}


# --- one iteration --------------------------------------------------------------------------------------------------


def test_the_order_of_an_iteration_is_rate_then_all_critic_updates_then_the_generator(monkeypatch):
    networks, _ = spied(monkeypatch)
    kinds = [what for what, _ in networks.events]
    assert kinds == ["rates", "critic", "generator"] * (len(kinds) // 3) and len(kinds) // 3 == networks_updates(CONFIG)
    for facts in networks.of("critic"):
        assert len(facts.ids) == len(facts.eps) == CONFIG.critic_iterations
        assert all(len(ids) == CONFIG.batch_size for ids in facts.ids)


def networks_updates(config, subjects: int = len(SUBJECTS)) -> int:
    """Updates of a run whose groups are all full."""
    groups = subjects // config.resident_subjects
    return config.epochs * groups * -(-config.resident_subjects * PATCHES // config.batch_size)


@pytest.mark.parametrize("per_channel", [True, False])
def test_epsilon_is_drawn_for_every_sample_channel_update_step_group_epoch_and_rank(monkeypatch, per_channel):
    """Uniform in [0, 1), and no two samples of a whole training have the same."""
    config = CONFIG.replace(eps_per_channel=per_channel)
    found = []
    for rank in range(2):
        networks, _ = spied(monkeypatch, config.replace(batch_size=8, resident_subjects=2), rank=rank, world=2)
        found += [eps for facts in networks.of("critic") for eps in facts.eps]
    assert {eps.shape for eps in found} == {(4, 2) if per_channel else (4,)}
    every = np.concatenate([eps.ravel() for eps in found])
    assert every.size >= 400 and len(np.unique(every)) == every.size
    assert stats.kstest(every, "uniform").pvalue > 1e-3  # found: 0.4 and 0.7


def test_another_seed_has_other_epsilons(monkeypatch):
    one, other = (
        np.concatenate([np.ravel(f.eps) for f in spied(monkeypatch, CONFIG.replace(seed=s))[0].of("critic")])
        for s in (0, 1)
    )
    assert not np.isin(one, other).any()


def test_critic_patches_are_of_all_resident_subjects_and_new_in_each_update(monkeypatch):
    networks, _ = spied(monkeypatch, CONFIG.replace(batch_size=8, resident_subjects=6))
    batches = [ids for facts in networks.of("critic") for ids in facts.ids]
    assert len({tuple(ids) for ids in batches}) == len(batches)
    assert min(len(subjects_of(ids)) for ids in batches) >= 3  # of 8 uniform draws; one subject would give 1
    counts = np.array([[ids_.startswith(name) for ids in batches for ids_ in ids] for name in SUBJECTS]).sum(1)
    assert stats.chisquare(counts).pvalue > 1e-3  # found: 0.78


def test_ranks_train_on_other_subjects_and_other_patches(monkeypatch):
    seen = []
    for rank in range(2):
        networks, _ = spied(monkeypatch, CONFIG.replace(batch_size=8), rank=rank, world=2)
        seen.append([f.ids for f in networks.of("generator")])
    per_epoch = len(seen[0]) // 2
    for epoch in range(2):
        part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        one, other = ([name for ids in ranks[part] for name in ids] for ranks in seen)
        assert not set(one) & set(other) and len(one) + len(other) == TOTAL
        assert sorted(one + other) == sorted({*one, *other})


def test_fakes_come_from_the_generator_before_its_update_and_each_update_moves_the_critic():
    """Real networks: the weights that each of the six calls of an iteration saw, and changed."""
    torch.manual_seed(0)
    config = CONFIG.replace(critic_iterations=3, precision="fp32")
    models = Models(config, 0, torch.device("cpu"))
    batches = [Batch(torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 16, 16, 16), torch.full((2,), 3.0), ["a"] * 2)] * 3
    seen = []
    terms, fakes = models._critic_terms, models._fakes
    models._fakes = lambda *args: seen.append(("fakes", weights(models.generator))) or fakes(*args)

    def critic_terms(critic, real, fake, eps, *args, **more):
        seen.append(("critic", weights(critic), fake.clone(), eps.clone()))
        return terms(critic, real, fake, eps, *args, **more)

    models._critic_terms = critic_terms
    before = weights(models.generator)
    eps = [torch.rand(2, 2) for _ in range(3)]
    models.critic_updates(batches, eps)
    assert weights(models.generator) == before, "the generator stands still meanwhile"
    critics = [entry for entry in seen if entry[0] == "critic"]
    assert all(entry[1] == before for entry in seen if entry[0] == "fakes")
    assert len(critics) == 3 and len({entry[1] for entry in critics}) == 3, "each update sees the one before"
    assert weights(models.critic) not in {entry[1] for entry in critics}
    for (_, _, _, given), wanted in zip(critics, eps, strict=True):
        assert torch.equal(given, wanted)
    after = weights(models.critic)
    models.generator_update(batches[0], adversarial=True)
    assert weights(models.critic) == after and weights(models.generator) != before


@pytest.mark.parametrize("penalty", ["auto", "explicit"])
def test_the_generators_update_leaves_no_gradient_in_the_critic(penalty):
    """Else it would be part of the critic's next update."""
    models = Models(CONFIG.replace(precision="fp32", penalty=penalty), 0, torch.device("cpu"))
    batch = Batch(torch.rand(1, 1, 16, 16, 16), torch.rand(1, 2, 16, 16, 16), torch.full((1,), 3.0), ["a"])
    models.generator_update(batch, adversarial=True)
    assert all(p.grad is None and p.requires_grad for p in models.critic.parameters())


def weights(network: torch.nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in network.parameters())


@pytest.mark.parametrize("joint", [True, False])
def test_each_update_gets_the_fakes_of_its_own_patches(joint):
    config = CONFIG.replace(critic_iterations=3, precision="fp32", joint_fakes=joint)
    models = Models(config, 0, torch.device("cpu"))
    batches = [
        Batch(torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 16, 16, 16), torch.full((2,), 3.0), []) for _ in range(3)
    ]
    given = []
    terms = models._critic_terms

    def critic_terms(critic, real, fake, *args, **more):
        given.append((real.clone(), fake.clone()))
        return terms(critic, real, fake, *args, **more)

    models._critic_terms = critic_terms
    models.critic_updates(batches, [torch.rand(2, 2)] * 3)
    for (real, fake), batch in zip(given, batches, strict=True):
        assert torch.equal(real, batch.y)
        with torch.no_grad():
            # 2e-6: passes of other sizes round otherwise; found 6e-7. Fakes of another batch differ by 0.1.
            assert (fake - models.generator(batch.x, batch.res)).abs().max() < 2e-6


# --- epochs and groups ----------------------------------------------------------------------------------------------


def test_one_epoch_passes_once_over_every_patch_of_every_group(monkeypatch):
    """All groups, each patch once, and none of another group's; the critic's patches are of the same group."""
    networks, _ = spied(monkeypatch)
    generator, critic = networks.of("generator"), networks.of("critic")
    per_epoch = len(generator) // 2
    for epoch in range(2):
        part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        names = [name for facts in generator[part] for name in facts.ids]
        assert len(names) == TOTAL == len(set(names))
        groups = [
            g
            for g, _ in itertools.groupby(
                generator[part], key=lambda f: len(subjects_of(f.ids)) and group_of(f, generator[part])
            )
        ]
        assert len(groups) == 2 and not groups[0] & groups[1] and groups[0] | groups[1] == set(SUBJECTS)
        for g, c in zip(generator[part], critic[part], strict=True):
            assert subjects_of([name for ids in c.ids for name in ids]) <= group_of(g, generator[part])


def group_of(facts: SimpleNamespace, epoch: list[SimpleNamespace]) -> frozenset[str]:
    """The subjects of the half of an epoch in which an update lies."""
    at = next(i for i, one in enumerate(epoch) if one is facts)
    half = epoch[: len(epoch) // 2] if at < len(epoch) // 2 else epoch[len(epoch) // 2 :]
    return frozenset().union(*(subjects_of(one.ids) for one in half))


def test_every_epoch_deals_its_subjects_anew(monkeypatch):
    """Which subjects are in memory together changes from epoch to epoch."""
    networks, _ = spied(monkeypatch, CONFIG.replace(epochs=5))
    updates = networks.of("generator")
    per_epoch = len(updates) // 5
    first = [group_of(updates[e * per_epoch], updates[e * per_epoch : (e + 1) * per_epoch]) for e in range(5)]
    assert len(set(first)) >= 4  # of 20 possible ones; found: 5


def test_the_pool_of_a_group_has_the_key_of_its_place(monkeypatch):
    """Seed, epoch, group and rank: whatever a pool draws then differs between them."""
    made = []
    plain = loop_module.Pool

    def pool(*args, **more):
        made.append(plain(*args, **more))
        return made[-1]

    monkeypatch.setattr(loop_module, "Pool", pool)
    spied(monkeypatch, CONFIG.replace(seed=4, resident_subjects=2, batch_size=8), rank=1, world=2)
    # Three subjects a rank, two groups in each of two epochs.
    assert [one.key for one in made] == [(4, epoch, group, 1) for epoch in (1, 2) for group in (0, 1)]


def test_every_epoch_has_an_order_of_its_own(monkeypatch):
    networks, _ = spied(monkeypatch, CONFIG.replace(epochs=3))
    names = [name for facts in networks.of("generator") for name in facts.ids]
    epochs = [tuple(names[i * TOTAL : (i + 1) * TOTAL]) for i in range(3)]
    assert len(set(epochs)) == 3


def test_a_run_that_goes_on_in_a_group_takes_the_patches_that_are_left(monkeypatch):
    whole, _ = spied(monkeypatch)
    names = [f.ids for f in whole.of("generator")]
    at = Position(epoch=1, group=1, step=2, steps=5, updates=7, epoch_updates=5, resident=3)
    rest, _ = spied(monkeypatch, position=at)
    assert [f.ids for f in rest.of("generator")] == names[7:]
    for one, other in zip(whole.of("critic")[7:], rest.of("critic"), strict=True):
        assert one.ids == other.ids and all(np.array_equal(a, b) for a, b in zip(one.eps, other.eps, strict=True))


@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
def test_the_critic_waits_for_exactly_as_many_epochs_as_asked(monkeypatch, warmup):
    networks, _ = spied(monkeypatch, CONFIG.replace(warmup_epochs=warmup, epochs=3))
    adversarial = [facts.adversarial for facts in networks.of("generator")]
    per_epoch = len(adversarial) // 3
    assert adversarial == [False] * (warmup * per_epoch) + [True] * ((3 - warmup) * per_epoch)
    assert len(networks.of("critic")) == (3 - warmup) * per_epoch


def test_without_an_adversarial_term_there_is_no_critic_update(monkeypatch):
    networks, _ = spied(monkeypatch, CONFIG.replace(lambda_adv=0.0))
    assert not networks.of("critic") and not any(f.adversarial for f in networks.of("generator"))


@pytest.mark.parametrize("warmup", [1, 4, 7])
def test_rates_rise_over_exactly_as_many_updates_as_asked_and_follow_the_share_of_the_run(monkeypatch, warmup):
    config = CONFIG.replace(lr_warmup=warmup, lr_schedule="linear", lr_end=0.2)
    networks, _ = spied(monkeypatch, config)
    factors = [f.factor for f in networks.of("rates")]
    n = len(factors)
    expected = [min(1.0, (i + 1) / warmup) * (1 - 0.8 * i / n) for i in range(n)]
    np.testing.assert_allclose(factors, expected, rtol=1e-12)  # found: 4e-16 (rounding)


def test_flips_reach_the_patches_of_generator_and_critic(monkeypatch):
    """Along x alone, for about half of the patches: a patch that is mirrored begins with its last plane."""
    networks, _ = spied(monkeypatch, CONFIG.replace(flips="x", epochs=4))
    planes = torch.cat([f.x[:, 0, :, 0, 0] for f in networks.of("generator")])
    mirrored = (planes.diff(dim=1) < 0).all(1)
    assert ((planes.diff(dim=1) > 0).all(1) | mirrored).all()
    assert 0.35 < mirrored.double().mean() < 0.65  # of 144; found 0.5
    networks, _ = spied(monkeypatch)
    assert all((f.x[:, 0, :, 0, 0].diff(dim=1) > 0).all() for f in networks.of("generator"))


# --- validation, snapshots ------------------------------------------------------------------------------------------


def test_the_averaged_generator_is_validated_on_the_test_subjects_alone(monkeypatch):
    networks, calls = spied(monkeypatch, CONFIG.replace(whole_every=2, epochs=4, validate_every=1))
    validated = [facts for what, facts in calls if what == "validate"]
    whole = [facts for what, facts in calls if what == "whole"]
    assert len(validated) == 4 and len(whole) == 2
    for facts in (*validated, *whole):
        assert facts.generator is networks.averaged and facts.subjects == ["t1", "t2"]


@pytest.mark.parametrize(("every", "epochs", "expected"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4]), (3, 3, [3])])
def test_validations_and_snapshots_come_in_the_epochs_that_were_asked_for(monkeypatch, every, epochs, expected):
    _, calls = spied(monkeypatch, CONFIG.replace(validate_every=every, snapshot=every, epochs=epochs))
    epoch, validated = 1, []
    for what, facts in calls:
        if what == "validate":
            validated.append(epoch)
        if what == "write_weights" and facts.args[0].name == "model.safetensors":
            assert facts.args[1]["epoch"] == epoch
            epoch += 1
    assert validated == expected
    saved = [facts.epoch - 1 for what, facts in calls if what == "save"]
    assert saved == sorted({*expected, epochs}) and [f.args[0] for w, f in calls if w == "export"] == saved


def epochs_of(calls, kind: str) -> list[int]:
    """In which epochs there were calls of a kind; an epoch ends where its weights are written."""
    epoch, found = 1, []
    for what, facts in calls:
        if what == kind:
            found.append(epoch)
        epoch += what == "write_weights" and facts.args[0].name == "model.safetensors"
    return found


@pytest.mark.parametrize(("patches", "whole"), [(2, 3), (3, 2), (1, 4), (4, 0)])
def test_whole_volumes_are_validated_in_epochs_of_their_own(monkeypatch, patches, whole):
    _, calls = spied(monkeypatch, CONFIG.replace(validate_every=patches, whole_every=whole, epochs=6))
    assert epochs_of(calls, "validate") == [e for e in range(1, 7) if e % patches == 0]
    assert epochs_of(calls, "whole") == [e for e in range(1, 7) if whole and e % whole == 0]


@pytest.mark.parametrize("best_by", ["dice", "psnr"])
def test_the_best_epoch_by_the_chosen_score_is_kept(monkeypatch, best_by):
    table = {1: (0.4, 31.0), 2: (0.6, 30.0), 3: (0.5, 33.0), 4: (0.6, 32.0)}
    scores = lambda turn: SCORES | {"Dice": table[turn][0], "PSNR": table[turn][1]}  # noqa: E731
    _, calls = spied(monkeypatch, CONFIG.replace(epochs=4, best_by=best_by), scores=scores)
    kept = [f.args[1]["epoch"] for what, f in calls if what == "write_weights" and f.args[0].name == "best.safetensors"]
    assert kept == ([1, 2] if best_by == "dice" else [1, 3])
    table[1] = (math.nan, math.nan)  # no score at all: what follows is better
    _, calls = spied(monkeypatch, CONFIG.replace(epochs=4, best_by=best_by), scores=scores)
    kept = [f.args[1]["epoch"] for what, f in calls if what == "write_weights" and f.args[0].name == "best.safetensors"]
    assert kept == ([2] if best_by == "dice" else [2, 3])


def test_the_weights_that_are_written_are_the_averaged_ones_and_the_snapshot_holds_both(tmp_path):
    """A file for use holds the average; a snapshot the generator that training goes on with, and the average."""
    config = CONFIG.replace(ema=0.9, precision="fp32")
    models = Models(config, 0, torch.device("cpu"))
    with torch.no_grad():
        for value in models.average.values():
            value.add_(1.0)
    raw, averaged = dict(models.generator.named_parameters()), models.average
    store = SimpleNamespace(subjects=[])
    feed = SimpleNamespace(store=store, degradation=degradation(config), visits=Visits())
    run = SimpleNamespace(
        first=True, models=models, config=config, position=Position(updates=3), folder=tmp_path,
        store=store, feed=feed, ranks=SimpleNamespace(world=1), snapshot_folder=tmp_path / "keras",
        structures=(), start=None,
    )  # fmt: skip
    (tmp_path / "keras").mkdir()
    snapshots.write_weights(run, tmp_path / "model.safetensors", {"epoch": 1})
    snapshots.export(run, 1)
    for file in (tmp_path / "model.safetensors", tmp_path / "keras" / "SegSRGAN_epoch_1"):
        for name, value in weight_files.load_generator(file).named_parameters():
            assert torch.equal(value, averaged[name]) and not torch.equal(value, raw[name])
    snapshots.save(run)
    (snapshot,) = (tmp_path / "checkpoints").iterdir()
    for part, expected in (("generator", raw), ("ema", averaged)):
        _, held = safetensors.read_parameters(snapshot / "model.safetensors", part)
        assert all(torch.equal(held[name], expected[name]) for name in expected)
    said = [weight_files.info(folder / "model.safetensors")["made_for"] for folder in (tmp_path, snapshot)]
    assert said[0] == said[1] and said[0]["voxel_mm"]
    with torch.no_grad():
        models.critic.get_parameter("decision").view(-1)[0] = float("inf")
    run.position.updates = 4
    with pytest.raises(ResourceError, match=r"after 4 updates the weights are not finite.*--resume goes on"):
        snapshots.save(run)
    assert list((tmp_path / "checkpoints").iterdir()) == [snapshot], "the good one stands"


# --- updates that are not finite ------------------------------------------------------------------------------------


def test_the_count_of_bad_updates_begins_anew_behind_a_good_one(monkeypatch, tmp_path):
    """Two in a row, a good one, two in a row: no three in a row."""
    bad = {1, 2, 4, 5, 7, 8}
    networks, _ = spied(monkeypatch, CONFIG.replace(max_bad_steps=3), skipped=bad.__contains__)
    assert len(networks.of("generator")) == networks_updates(CONFIG)
    with pytest.raises(ResourceError, match="3 updates in a row"):
        spied(monkeypatch, CONFIG.replace(max_bad_steps=3), skipped={4, 5, 6}.__contains__, folder=tmp_path)
    found = json.loads((tmp_path / "bad_batch.json").read_text(encoding="utf8"))
    assert found["update"] == 5


@pytest.mark.parametrize("epoch", (1, 2))
def test_between_epochs_no_snapshot_is_written_amid_updates_that_are_not_finite(monkeypatch, epoch, caplog):
    """The one before is "the last good snapshot" that the end of such a run names; at its own end none is left out."""
    config = CONFIG.replace(snapshot=1, epochs=2)
    last = epoch * networks_updates(config) // 2
    _, calls = spied(monkeypatch, config, skipped={last}.__contains__)
    assert [facts.epoch - 1 for what, facts in calls if what == "save"] == ([2] if epoch == 1 else [1, 2])
    assert ("the last 1 were not finite" in caplog.text) == (epoch == 1)


def test_an_epoch_may_be_cut_short_and_every_group_has_its_share(monkeypatch):
    networks, _ = spied(monkeypatch, CONFIG.replace(steps_per_epoch=4))
    seen = [subjects_of(f.ids) for f in networks.of("generator")]
    assert len(seen) == 8
    for epoch in (seen[:4], seen[4:]):
        assert not (epoch[0] | epoch[1]) & (epoch[2] | epoch[3])


@pytest.mark.parametrize(("most", "shares"), [(1, [1, 0]), (3, [2, 1]), (4, [2, 2]), (9, [5, 4]), (99, [5, 5])])
def test_updates_of_a_short_epoch_are_shared_out_evenly_the_first_groups_having_those_left_over(
    monkeypatch, most, shares
):
    """Groups of three subjects, 18 patches in batches of 4: at most 5 updates each. Larger groups come first."""
    networks, _ = spied(monkeypatch, CONFIG.replace(steps_per_epoch=most, epochs=1))
    seen = [frozenset(subjects_of(f.ids)) for f in networks.of("generator")]
    groups = [frozenset(members) for members in deal(list(SUBJECTS), CONFIG.seed, 1, 3, 0, 1)]
    assert [sum(subjects <= group for subjects in seen) for group in groups] == shares and len(seen) == sum(shares)


def test_patience_ends_a_run_after_exactly_as_many_validations_without_a_better_score(monkeypatch):
    scores = lambda turn: SCORES | {"Dice": 0.5 if turn == 2 else 0.4}  # noqa: E731
    _, calls = spied(monkeypatch, CONFIG.replace(epochs=9, patience=3), scores=scores)
    assert sum(what == "validate" for what, _ in calls) == 5


RISING = "too few for lr_warmup 100 (the rate is still rising) and for ema 0.999 (a mean over 1000 updates: what is"
SHORT = {
    "": {"lr_warmup": 20, "ema": 0.95},
    "about 20 updates are planned, too few for lr_warmup 21": {"lr_warmup": 21},
    "too few for ema 0.96 (a mean over 25 updates: what is validated and shipped is mostly the beginning): take more, "
    "or a smaller --ema": {"ema": 0.96},
    RISING: {"ema": 0.999, "lr_warmup": 100, "epochs": 4},
    "smaller --lr-warmup and --ema": {"ema": 0.99, "lr_warmup": 99},
    "about 10 updates": {"lr_warmup": 11, "steps_per_epoch": 5},
}


@pytest.mark.parametrize("told", SHORT)
def test_a_run_that_is_too_short_for_its_settings_is_told_so_once(monkeypatch, caplog, told):
    config = CONFIG.replace(**SHORT[told])
    with caplog.at_level("WARNING", logger="fastsrgan"):
        networks, _ = spied(monkeypatch, config)
    assert len(networks.of("generator")) == (config.steps_per_epoch or 10) * config.epochs
    assert [told in record.getMessage() for record in caplog.records] == [True] * bool(told)
