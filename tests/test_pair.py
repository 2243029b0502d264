"""Updates of generator and critic: switches agree, nothing moves where a number is not finite, state is complete."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_steps import CONFIG, batch, double
from torch.utils._python_dispatch import TorchDispatchMode

from fastsrgan.core.ranks import Ranks
from fastsrgan.model.cpu.rearranged import kept_bytes
from fastsrgan.model.networks import build_generator
from fastsrgan.model.weights import save_generator
from fastsrgan.train.gan import Models
from fastsrgan.train.objectives import generator_loss
from fastsrgan.train.optimise import GROUPS, Optimiser
from fastsrgan.train.run import snapshot_bytes

CPU = torch.device("cpu")
MOMENTS = ("exp_avg", "exp_avg_sq")


def models(ranks: Ranks | None = None, **changes) -> Models:
    ranks = ranks or Ranks()
    config = CONFIG.replace(batch_size=CONFIG.batch_size * ranks.world, **changes)
    return double(Models(config, 0, CPU, ranks))


def weights(m: Models) -> list[torch.Tensor]:
    return [p.detach().clone() for network in (m.generator, m.critic) for p in network.parameters()]


def iterate(m: Models, seeds=(1, 2, 3)) -> dict[str, float]:
    drawn = [batch(s) for s in seeds[:-1]]
    critic = m.critic_updates([b for b, _ in drawn], [e for _, e in drawn])
    generator = m.generator_update(batch(seeds[-1])[0], adversarial=True)
    return {f"d_{k}": v for k, v in critic.items()} | {f"g_{k}": v for k, v in generator.items()}


def worst(found, expected) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in zip(found, expected, strict=True))


# --- the same update in other ways --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, float], list[torch.Tensor]]:
    """Facts of an iteration with the settings as they are, and the weights behind it."""
    m = models()
    return iterate(m), weights(m)


@pytest.mark.parametrize(
    "changes",
    [
        {"penalty": "manual"},
        {"penalty": "explicit"},
        {"penalty": "autograd"},
        {"joint_fakes": False},
        {"generator_chunk": 1},
        {"generator_chunk": 4},
        {"accumulate": 2},
        {"accumulate": 3, "penalty": "explicit"},
        {"accumulate": 7},
        {"form": "reference"},
    ],
    ids=str,
)
def test_switches_do_not_change_an_update(plain, changes):
    (facts, expected), other = plain, models(**changes)
    others = iterate(other)
    assert facts.keys() == others.keys()
    assert others == pytest.approx(facts, rel=5e-12)  # found: 3.8e-13
    # Adam's first steps have the size of the rate, 1e-3: a sign that rounding turns would show.
    # Found: 1.6e-12
    assert max(float((a - b).abs().max()) for a, b in zip(weights(other), expected, strict=True)) <= 1e-11


def test_critic_updates_are_single_updates_on_the_same_fakes():
    together, single = models(), models()
    drawn = [batch(s) for s in (1, 2)]
    facts = together.critic_updates([b for b, _ in drawn], [e for _, e in drawn])
    rows = [single.critic_update(b, single.generate(b), e) for b, e in drawn]
    assert facts == pytest.approx({k: np.mean([r[k] for r in rows]) for k in rows[0]}, rel=1e-12)  # found: 0 (rounding)
    assert worst(weights(together), weights(single)) <= 1e-12  # found: 0 (rounding)


def test_the_generator_makes_every_fake_of_an_iteration_in_one_pass_of_chunks(monkeypatch):
    m, sizes = models(generator_chunk=4), []
    forward = m.generator.forward
    monkeypatch.setattr(m.generator, "forward", lambda x, res=None: sizes.append(len(x)) or forward(x, res))
    m._fakes = m._forward
    drawn = [batch(s) for s in (1, 2, 3)]
    m.critic_updates([b for b, _ in drawn], [e for _, e in drawn])
    assert sizes == [3, 3, 3]


def test_the_fakes_of_an_iteration_share_weights_that_are_rearranged_once_and_the_next_ones_do_not():
    m, kept = models(generator_chunk=1), []
    forward = m._forward
    m._fakes = lambda *seen: (forward(*seen), kept.append(kept_bytes()))[0]
    b, _ = batch(1)
    before = m.generate(b)
    assert len(kept) == len(b.x) > 1 and kept[0] > 0 and len(set(kept)) == 1 and not kept_bytes()
    with torch.no_grad():
        for weight in m.generator.parameters():  # in place, as an optimiser changes them
            weight.mul_(1.5)
    assert torch.equal(m.generate(b), forward(b.x, b.res)) and not torch.equal(m.generate(b), before)


@pytest.mark.parametrize("classes", [0, 1, 3])
def test_the_dice_term_is_the_mean_over_all_channels_behind_the_image(classes):
    """Each of them is learned by it, and the image is not."""
    draw = torch.Generator().manual_seed(classes)
    pred, y = (torch.rand((2, 2 + classes, 4, 4, 4), generator=draw, dtype=torch.float64) for _ in range(2))
    pred.requires_grad_(True)
    options = {"lambda_adv": 0.0, "lambda_rec": 0.0, "dice_weight": 0.5}
    terms = generator_loss(lambda x, res: pred, None, y[:, :1], y, **options)
    parts = [
        (2 * (pred[:, c] * y[:, c]).sum() + 1) / (pred[:, c].sum() + y[:, c].sum() + 1) for c in range(1, 2 + classes)
    ]
    assert float(terms["dice"]) == pytest.approx(1 - float(sum(parts)) / len(parts), rel=1e-12)  # found: 0 (rounding)
    assert float(terms["total"]) == pytest.approx(0.5 * float(terms["dice"]), rel=1e-12)  # found: 0
    (gradient,) = torch.autograd.grad(terms["total"], pred)
    assert [bool(gradient[:, c].abs().max() > 0) for c in range(2 + classes)] == [False] + [True] * (1 + classes)


def test_terms_add_up_and_dice_is_added_when_asked():
    plain, other = models(), models(dice_weight=0.25)
    facts, more = (m.generator_update(batch(5)[0], True) for m in (plain, other))
    assert more["total"] == pytest.approx(facts["total"] + 0.25 * more["dice"], rel=1e-12)  # found: 0 (rounding)
    assert "dice" not in facts
    alone = models(lambda_rec=2.0).generator_update(batch(5)[0], adversarial=False)
    # Found: 0 (rounding)
    assert alone["adversarial"] == 0 and alone["total"] == pytest.approx(2 * facts["reconstruction"], rel=1e-12)


def test_a_lazy_penalty_comes_every_kth_update_with_k_times_the_weight():
    m, full = models(penalty_every=2), models(lambda_gp=2 * CONFIG.lambda_gp)
    for i, seed in enumerate((1, 2, 3)):
        b, eps = batch(seed)
        fake = full.generate(b)
        lazy, whole = m.critic_update(b, fake, eps), full.critic_update(b, fake, eps)
        if i != 1:
            # Found: 0 (rounding)
            assert lazy["total"] == pytest.approx(lazy["wasserstein"] + 2 * lazy["penalty"], rel=1e-9)
        else:
            assert "penalty" not in lazy and lazy["total"] == lazy["wasserstein"]
        if i == 0:
            assert lazy["total"] == pytest.approx(whole["total"], rel=1e-12)  # found: 0 (rounding)
            assert worst(weights(m), weights(full)) <= 1e-12  # found: 0 (rounding)
    resumed = models(penalty_every=2)
    resumed.load_state(m.state())
    assert "penalty" not in resumed.critic_update(b, fake, eps)


# --- optimiser ----------------------------------------------------------------------------------------------------


def test_rates_scale_both_networks_and_the_head_has_its_own():
    for factor in (0.0, 0.5):
        m = models(head_rate=0.25)
        before = weights(m)
        m.set_rates(factor)
        iterate(m, (1, 2))
        moved = [float((a - b).abs().max()) for a, b in zip(weights(m), before, strict=True)]
        head = [name for name, _ in m.generator.named_parameters()].index("head")
        assert max(moved[: len(list(m.generator.parameters()))]) <= factor * 1.01e-3  # found: 1e-3
        assert moved[head] <= 0.25 * factor * 1.01e-3  # found: 1e-3
        assert (max(moved) == 0) == (factor == 0)


def test_clipping_limits_the_gradient_but_tells_it_whole():
    free, bound = models(), models(clip_norm=1e-12)
    b, _ = batch(1)
    facts, told = free.generator_update(b, True), bound.generator_update(b, True)
    # Found: 1.6, 0 (rounding)
    assert told["gradient"] == pytest.approx(facts["gradient"], rel=1e-12) and told["gradient"] > 1e-3
    # Adam's epsilon is 1e-8: a gradient of 1e-12 moves next to nothing.
    # Found: 7.3e-9 (rounding)
    assert max(float((x - y).abs().max()) for x, y in zip(weights(bound), weights(models()), strict=True)) <= 1e-6


class Told(Ranks):
    """Two ranks with the same gradients, the other one's loss a given number."""

    world = 2

    def __init__(self, other: float = 0.0) -> None:
        self.calls: list[int] = []
        self.other = other

    def start_average_(self, tensors: list[torch.Tensor]) -> Callable[[], None]:
        self.calls.append(len(tensors))
        loss = [t for t in tensors if t.dtype == torch.float32]
        return lambda: [t.add_(self.other) for t in loss] and None


def test_ranks_send_every_gradient_once_per_optimiser_step_and_the_loss():
    ranks = Told()
    m = models(ranks, accumulate=3)
    iterate(m)
    critic, generator = (len(list(n.parameters())) for n in (m.critic, m.generator))
    assert ranks.calls[:2] == [critic + 1, critic + 1]
    assert len(ranks.calls) == 2 + GROUPS and sum(ranks.calls[2:]) == generator + 1


@pytest.mark.parametrize(
    ("ranks", "changes"), [(Told(), {}), (None, {"joint_fakes": False}), (None, {})], ids=["ranks", "alone", "joint"]
)
def test_the_fakes_that_are_made_while_gradients_travel_do_not_touch_them(ranks, changes):
    """A CUDA graph lends its outputs until another one runs."""
    plain, m = models(**changes), models(ranks, **changes)
    lent: list[torch.Tensor] = []
    critic, fakes = m._critic_terms, m._fakes

    def replayed(*args, **options):
        terms, gradients = critic(*args, **options)
        lent[:] = gradients
        return terms, gradients

    def overwriting(*args):
        for gradient in lent:
            gradient.fill_(torch.nan)
        return fakes(*args)

    m._critic_terms, m._fakes = replayed, overwriting
    assert iterate(m) == pytest.approx(iterate(plain), rel=1e-12)  # found: 0
    assert worst(weights(m), weights(plain)) <= 1e-11  # found: 0; as above, of Adam's first steps


@pytest.mark.fault(36)
@pytest.mark.parametrize("where", ["fake", "other rank", "weights"])
def test_where_a_number_is_not_finite_nothing_moves(where):
    m = models(Told(float("inf")) if where == "other rank" else None, ema=0.5)
    for mean in m.average.values():  # away from the weights, to which it must not go on
        mean.add_(1)
    before, kept, state = weights(m), copy.deepcopy(m.average), copy.deepcopy(m.state())
    b, eps = batch(1)
    fake = m.generate(b)
    if where == "fake":
        fake, b.x = fake * float("nan"), b.x * float("inf")
    if where == "weights":
        with torch.no_grad():
            for network in (m.generator, m.critic):
                next(network.parameters()).fill_(float("nan"))
        before = weights(m)
    assert m.critic_update(b, fake, eps)["skipped"] == 1
    assert m.generator_update(b, False)["skipped"] == 1
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(weights(m), before, strict=True))
    assert where == "weights" or all(torch.equal(m.average[k], kept[k]) for k in kept)
    for name in ("generator", "critic"):
        for old, new in zip(
            state[name]["adam"]["state"].values(), m.state()[name]["adam"]["state"].values(), strict=False
        ):
            assert all(torch.equal(old[k], new[k]) for k in old)
        assert all(float(s["step"]) == 0 for s in m.state()[name]["adam"]["state"].values())


@pytest.mark.fault(36)
def test_after_a_skipped_update_training_goes_on_as_if_it_had_not_been():
    m, plain = models(ema=0.9), models(ema=0.9)
    b, eps = batch(1)
    iterate(m), iterate(plain)
    m.critic_update(b, m.generate(b) * float("nan"), eps)
    assert iterate(m, (4, 5)) == iterate(plain, (4, 5))
    assert all(torch.equal(x, y) for x, y in zip(weights(m), weights(plain), strict=True))


def test_the_moving_average_follows_its_formula():
    m = models(ema=0.75)
    first = [p.detach().clone() for p in m.generator.parameters()]
    m.generator_update(batch(1)[0], False)
    for old, new, mean in zip(first, m.generator.parameters(), m.average.values(), strict=True):
        assert torch.allclose(mean, 0.75 * old + 0.25 * new, rtol=1e-12, atol=1e-15)  # found: 0 of it
    shipped = dict(m.shipped().named_parameters())
    assert all(torch.equal(shipped[k], v) for k, v in m.average.items())


def test_state_is_complete_to_the_bit(tmp_path):
    changes = {"ema": 0.9, "penalty_every": 3, "clip_norm": 1.0}
    whole, part = models(**changes), models(**changes)
    iterate(whole), iterate(part)
    torch.save(part.state(), tmp_path / "state.pt")
    resumed = models(**changes)
    for name in ("generator", "critic"):
        getattr(resumed, name).load_state_dict(getattr(part, name).state_dict())
    resumed.average = {k: v.clone() for k, v in part.average.items()}
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert iterate(whole, (4, 5, 6)) == iterate(resumed, (4, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


class Waits(TorchDispatchMode):
    """Counts what would wait for a device: tensors read as Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("penalty", ["manual", "explicit"])
def test_an_update_reads_nothing_back_before_its_end(penalty):
    m = models(penalty=penalty, clip_norm=1.0, ema=0.5, head_rate=0.5)
    (b, eps), read = batch(1), []
    fake = m.generate(b)
    with pytest.MonkeyPatch.context() as patch, Waits() as waits:
        patch.setattr("fastsrgan.train.gan.Means", lambda rows: read.append(waits.count) or {})
        m.critic_update(b, fake, eps)
        m.generator_update(b, True)
    assert read == [0, 0]


def test_a_loss_scale_changes_no_update_in_any_number_of_parts():
    """Gradients are scaled up together and back together."""
    found = []
    for scaled, parts in ((False, 1), (True, 2)):
        m = models(accumulate=parts)
        c = m.config
        for name, network, rate, eps in (("g", m.generator, c.lr_gen, 1e-8), ("d", m.critic, c.lr_dis, 1e-7)):
            setattr(m, f"optimiser_{name}", Optimiser(network, rate, (c.beta1, c.beta2), eps, scaled=scaled))
        facts = iterate(m)
        found.append(([facts["d_gradient"], facts["g_gradient"]], weights(m)))
    (plain, expected), (facts, moved) = found
    assert facts == pytest.approx(plain, rel=1e-6)  # found: 3e-8, of a loss in float32
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(moved, expected, strict=True))  # found: 7e-13


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_room_for_a_snapshot_is_that_of_all_that_it_holds(ema):
    m = models(ema=ema)
    iterate(m)
    held = [*weights(m), *(m.average or {}).values()]
    held += [kept[name] for o in (m.optimiser_g, m.optimiser_d) for kept in o.adam.state.values() for name in MOMENTS]
    # Those of float32, and no more than twice as much.
    assert sum(4 * t.numel() for t in held) <= snapshot_bytes(m) <= 2 * sum(4 * t.numel() for t in held)


def test_networks_of_start_weights_are_those_that_learn(tmp_path):
    """Optimisers and average belong to what was loaded, not to the networks that were there before."""
    config = CONFIG.replace(ema=0.5)
    begun, m = (Models(config.replace(seed=seed), 0, CPU) for seed in (5, 6))
    save_generator(tmp_path / "w.safetensors", begun.generator, begun.critic)
    m.start_from(tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(weights(m), weights(begun), strict=True))
    assert all(torch.equal(p, m.average[name]) for name, p in m.generator.named_parameters())
    for optimiser, network in ((m.optimiser_g, m.generator), (m.optimiser_d, m.critic)):
        assert [*map(id, optimiser.parameters)] == [*map(id, network.parameters())] and network.training
    (some, eps), before = batch(1), weights(m)
    some = replace(some, x=some.x.float(), y=some.y.float(), res=some.res.float())
    m.critic_update(some, m.generate(some), eps.float())
    m.generator_update(some, adversarial=True)
    assert not any(torch.equal(a, b) for a, b in zip(weights(m), before, strict=True))


@pytest.mark.parametrize("geometry", ["physical", "segsrgan"])
def test_start_weights_take_the_way_of_this_training_with_values_below_zero(tmp_path, geometry):
    m = Models(CONFIG.replace(geometry=geometry), 0, CPU, Ranks())
    other = replace(m.generator.spec, shifted=geometry != "physical")
    save_generator(tmp_path / "w.safetensors", build_generator(other, seed=5))
    m.start_from(tmp_path / "w.safetensors")
    assert m.generator.spec.shifted is m.shipped().spec.shifted is (geometry == "physical")
