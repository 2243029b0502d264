"""Within a budget: nested levels, equal to a plain run at the step they reached; a clock that the test turns."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastsrgan.errors import UsageError
from fastsrgan.infer import anytime, tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.sweep import predict
from fastsrgan.model.networks import GeneratorSpec, build_generator

VOLUME = torch.rand(37, 30, 23, generator=torch.Generator().manual_seed(0))
LEVELS = anytime.levels(VOLUME.shape, 16, 2)
PLANS = [level.plan for level in LEVELS]


class Clock:
    """Seconds that pass when tiles are computed, ``pace`` of them each."""

    def __init__(self, pace=lambda done: 1.0) -> None:
        self.now, self.done, self.pace = 100.0, 0, pace

    def __call__(self) -> float:
        return self.now


class Timed(nn.Module):
    """A network that takes its time."""

    def __init__(self, inner: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.inner, self.clock = inner, clock

    def forward(self, x):
        for _ in range(len(x)):
            self.clock.now += self.clock.pace(self.clock.done)
            self.clock.done += 1
        return self.inner(x)


@pytest.fixture(scope="module")
def generator():
    return build_generator(GeneratorSpec(kernel=1), seed=1).eval()


class Local(nn.Module):
    """Cheap, and what comes out depends on where a tile lies."""

    def forward(self, x):
        place = torch.linspace(0, 1, x.shape[2]).view(-1, 1, 1)
        return torch.cat([x * place + x.mean((2, 3, 4), keepdim=True), x.square()], 1)


def test_steps_are_nested():
    assert [level.step for level in LEVELS] == [(8, 8, 8), (4, 4, 4), (2, 2, 2)]
    found = anytime.levels((200, 200, 200), (None, 64, 128), "auto")
    assert [level.step for level in found] == [(96, 32, 64), (48, 16, 32), (24, 8, 16), (12, 4, 8)]
    assert len(anytime.levels((20, 20, 20), 16, 16)) == 1
    assert len(anytime.levels((12, 9, 8), 64, "auto")) == 1
    with pytest.raises(UsageError, match="step"):
        anytime.levels((20, 20, 20), 16, "some")
    with pytest.raises(UsageError, match="step"):
        anytime.levels((20, 20, 20), 16, 17)


@settings(max_examples=80, deadline=None)
@given(st.tuples(*[st.integers(1, 60)] * 3), st.sampled_from([8, 16, 24, (8, 16, None)]), st.integers(1, 8))
def test_every_tile_of_a_level_comes_once(shape, patch, step):
    plans, seen = [level.plan for level in anytime.levels(shape, patch, step)], set()
    assert all(len(a) < len(b) for a, b in itertools.pairwise(plans))
    before = None
    for plan in plans:
        for grid in anytime.new_tiles(plan, before):
            assert not seen & set(grid)
            seen |= set(grid)
        assert seen == set(plan)
        before = plan
    assert plans[-1] == tiles.plan(shape, patch, step)


@pytest.mark.parametrize("window", ["constant", "gaussian"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_level_equals_a_plain_run_at_its_step(window, n, poisoned):
    plans = [replace(plan, window=window) for plan in PLANS[:n]]
    levels = [level._replace(plan=plan) for level, plan in zip(LEVELS, plans, strict=False)]
    out, facts = anytime.refine(VOLUME, levels, TileNetwork(Local(), 1.0, batch=7), 1e9)
    plain, _ = predict(VOLUME, plans[-1], TileNetwork(Local(), 1.0))
    assert out.shape == plain.shape and (out - plain).abs().max() < 2e-6  # found: 1.4e-6
    assert [level["tiles"] for level in facts["levels"]] == [len(p) for p in plans]
    assert list(itertools.accumulate(level["new_tiles"] for level in facts["levels"])) == [len(p) for p in plans]
    assert facts["tiles_network"] == len(plans[-1]), "no tile twice"


@pytest.mark.parametrize("budget", [0, 1e6])
def test_a_region_within_a_budget_is_that_of_a_plain_run(budget):
    """Elsewhere the volume itself and no probability, in the first level as in the last."""
    mask = np.zeros(VOLUME.shape, bool)
    mask[3:9, 20:28, 10:14] = True
    region = tiles.from_mask(mask, [np.arange(n) for n in VOLUME.shape])
    plan = PLANS[-1 if budget else 0]
    plain, counted = predict(VOLUME, plan, TileNetwork(Local(), 1.0), region=region)
    found, facts = anytime.refine(VOLUME, LEVELS, TileNetwork(Local(), 1.0), budget, region=region)
    inside = torch.from_numpy(mask)
    assert torch.equal(found[0][~inside], VOLUME[~inside]) and not found[1][~inside].any()
    # Found: 1.8e-7, 3e-7 (rounding)
    assert (found[0] - plain[0]).abs().max() < 1e-6 and (found[1] - plain[1]).abs().max() < 2e-6
    assert facts["tiles_outside"] == counted["tiles_outside"] > 0


def test_a_level_equals_a_plain_run_with_a_real_network(generator):
    found = anytime.levels(VOLUME.shape, (16, 32, 16), (4, 8, 8))
    out, _ = anytime.refine(VOLUME, found, TileNetwork(generator, 1.0), 1e9)
    plain, _ = predict(VOLUME, found[-1].plan, TileNetwork(generator, 1.0))
    assert len(found) == 2 and (out - plain).abs().max() < 2e-6  # found: 4.8e-7


def counts(budget, pace=lambda done: 1.0, batch=1):
    clock = Clock(pace)
    _, facts = anytime.refine(VOLUME, LEVELS, TileNetwork(Timed(Local(), clock), 1.0, batch=batch), budget, clock=clock)
    return [level["tiles"] for level in facts["levels"]], clock.now - 100, facts


def test_what_fits_the_budget_is_decided_by_the_clock_alone():
    sizes = [len(p) for p in PLANS]
    assert counts(0)[0] == sizes[:1], "the first level comes in any case"
    assert counts(sizes[1] - 1)[0] == sizes[:1]
    assert counts(sizes[1])[:2] == (sizes[:2], sizes[1])
    assert counts(sizes[2] - 1)[:2] == (sizes[:2], sizes[1]), "a level that cannot end in time is not begun"
    done, seconds, facts = counts(sizes[2], batch=3)
    assert (done, seconds, facts["level_given_up"]) == (sizes, sizes[2], False)
    assert counts(sizes[2])[2]["levels"] == counts(sizes[2])[2]["levels"]


def test_a_level_that_turns_out_too_slow_is_given_up_and_leaves_no_trace():
    first = len(PLANS[0])
    budget = 1.5 * len(PLANS[1])
    clock = Clock(lambda done: 1.0 if done < first + 20 else 10.0)
    out, facts = anytime.refine(VOLUME, LEVELS, TileNetwork(Timed(Local(), clock), 1.0, batch=1), budget, clock=clock)
    assert facts["level_given_up"] and [level["tiles"] for level in facts["levels"]] == [first]
    assert clock.now - 100 < anytime.SLACK * budget
    # Found: 0 (rounding)
    assert torch.allclose(out, predict(VOLUME, PLANS[0], TileNetwork(Local(), 1.0))[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("late", "ends"), [(1.05, True), (1.2, False)])
def test_a_level_that_was_begun_may_end_a_tenth_too_late(late, ends):
    first, budget = len(PLANS[0]), len(PLANS[1])
    slower = (late * budget - first) / (budget - first)  # seconds of a tile, once it was begun
    done, seconds, facts = counts(budget, lambda n: 1.0 if n < first else slower)
    assert done == [first, budget][: 1 + ends] and facts["level_given_up"] != ends
    # Rounding of sums; found: 4.3e-13
    assert (seconds == pytest.approx(late * budget, abs=4e-12, rel=0)) == ends and seconds < late * budget + 4e-12


def test_the_live_line_shows_level_rate_and_time_left():
    class Recorder:
        def __init__(self):
            self.events = []

        def start(self, label, total, unit):
            self.events.append((label, total, unit))

        def advance(self, n=1, **facts):
            self.events.append((n, facts))

        def finish(self):
            self.events.append("finish")

    recorder, clock = Recorder(), Clock()
    network = Timed(Local(), clock)
    anytime.refine(
        VOLUME,
        LEVELS[:2],
        TileNetwork(network, 1.0, batch=1),
        1e9,
        clock=clock,
        progress=recorder,
        label="a",
    )
    assert recorder.events[0] == ("a, level 1", len(PLANS[0]), "tile") and recorder.events[-1] == "finish"
    advances = [e for e in recorder.events if isinstance(e[1], dict)]
    assert sum(n for n, _ in advances) == len(PLANS[1])
    assert advances[-1][1] == {"level": "2/2", "eta": "0 s"}
    assert advances[0][1]["eta"] == f"{len(PLANS[0]) - 1} s"


def test_a_budget_of_nothing_is_one_and_none_is_a_minute():
    sizes = [len(p) for p in PLANS]
    assert counts(0, lambda n: 1e-6)[0] == sizes[:1]
    assert counts(None, lambda n: 59 / sizes[1])[0] == sizes[:2]


def test_the_batch_is_chosen_for_the_tiles_of_the_last_level(monkeypatch):
    asked, plain = [], TileNetwork.choose_batch
    monkeypatch.setattr(TileNetwork, "choose_batch", lambda self, *args: asked.append(args) or plain(self, *args))
    anytime.refine(VOLUME, LEVELS[:2], TileNetwork(Local(), 1.0, batch=3), 0)
    assert (3, PLANS[1]) in asked and (3, PLANS[0]) not in asked


def test_the_rate_of_a_level_is_its_own_from_its_eighth_tile_on():
    first, told = len(PLANS[0]), []
    clock = Clock(lambda done: 1.0 if done < first else 3.0)
    progress = SimpleNamespace(
        start=lambda *args: told.clear(),
        finish=lambda: None,
        advance=lambda n, **facts: told.append(facts["eta"]),
    )
    network = TileNetwork(Timed(Local(), clock), 1.0, batch=1)
    anytime.refine(VOLUME, LEVELS[:2], network, 1e9, clock=clock, progress=progress)
    new = len(PLANS[1]) - first
    rates = [*((first + k) / (first + 3 * k) for k in range(1, 8)), 1 / 3, 1 / 3]
    assert told[:9] == [f"{(new - k) / rate:.0f} s" for k, rate in enumerate(rates, 1)]


@pytest.mark.parametrize("pace", [0.001, 3.0])
def test_the_rate_is_of_the_tiles_over_their_time_however_short(pace):
    done, seconds, facts = counts(1e9, lambda n: pace)
    assert facts["tile_seconds"] == pytest.approx(seconds)
    assert facts["tiles_per_second"] == pytest.approx(done[-1] / seconds)
