"""The learning-rate schedule: a function of the place in the run, rising over the warm-up, ending where it should."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsrgan.train.optimise import factor, share
from fastsrgan.train.state import Position, Run, Turn, epoch_part


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@given(end=st.floats(0, 1), epochs=st.integers(1, 300))
def test_falls_from_one_to_the_end_and_never_rises(shape, end, epochs):
    places = [share(e, epochs, part) for e in {1, epochs // 2 + 1, epochs} for part in (0.0, 0.3, 1.0)]
    rates = [factor(shape, done, 10, end=end) for done in sorted(places)]
    assert factor(shape, 0.0, 0, end=end) == 1.0
    # Found: 5.6e-17 (rounding)
    assert factor(shape, share(epochs, epochs, 1.0), 10, end=end) == pytest.approx(end, abs=1e-12)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates))  # rounding; found: 0


def test_the_middle_of_the_run_is_the_middle_of_the_fall():
    assert factor("linear", 0.5, 0) == pytest.approx(0.5) == factor("cosine", 0.5, 0)
    assert factor("cosine", 0.25, 0) == pytest.approx(0.5 + 0.5**1.5)


def test_an_epoch_continues_where_the_one_before_ended():
    assert share(3, 7, 1.0) == share(4, 7, 0.0)


@given(update=st.integers(0, 10**6), done=st.floats(0, 1))
def test_constant_is_one_behind_the_warm_up(update, done):
    assert factor("constant", done, update, end=0.3) == 1.0
    assert factor("constant", done, update, warmup=20, end=0.3) == min(1.0, (update + 1) / 20)


def test_warm_up_starts_above_zero_and_multiplies_the_fall():
    assert factor("linear", 0.0, 0, warmup=4) == 0.25
    assert factor("linear", 0.5, 1, warmup=4, end=0.2) == pytest.approx(0.5 * 0.6)


def test_an_epoch_that_was_dealt_anew_goes_on_from_the_share_before():
    """Of what was left at ``before``, each group is its part: no rate falls back, and the epoch ends at 1."""
    half = SimpleNamespace(position=Position(before=0.5), last_epoch=2)
    parts = [Run.done(half, Turn(1, group, 2, []), part) for group, part in ((0, 0.0), (0, 0.5), (1, 0.5), (1, 1.0))]
    assert parts == [0.25, 0.3125, 0.4375, 0.5]
    run = SimpleNamespace(train=list("abcd"), feed=SimpleNamespace(seed=0))
    at = Position(group=1, step=3, steps=6, resident=1, before=0.25)
    assert epoch_part(run, at) == 0.25 + 0.75 * 1.5 / 4
    assert epoch_part(run, Position(group=1, resident=1)) == 0.25  # between two groups
