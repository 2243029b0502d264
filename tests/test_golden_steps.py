"""Twenty training iterations give the losses that are kept in tests/golden/steps.json, whatever form computes them."""

from __future__ import annotations

import json

import pytest
from golden_steps import FILE, ITERATIONS, NAMES, PLAIN, SETTINGS, losses


@pytest.fixture(scope="module")
def kept() -> list[dict[str, float]]:
    found = json.loads(FILE.read_text(encoding="utf8"))
    assert found["settings"] == SETTINGS, found["command"]
    assert len(found["rows"]) == ITERATIONS
    return found["rows"]


def worst(rows: list[dict[str, float]], kept: list[dict[str, float]]) -> float:
    scale = {name: max(abs(row[name]) for row in kept) for name in NAMES}
    pairs = list(zip(rows, kept[: len(rows)], strict=True))
    return max(abs(row[name] - wanted[name]) / scale[name] for row, wanted in pairs for name in NAMES)


def test_the_default_step_gives_the_golden_losses(kept):
    assert worst(losses(), kept) <= 1e-12  # found: 4e-14 (rounding)


@pytest.mark.parametrize(
    "changes",
    [PLAIN, {"penalty": "explicit"}, {"joint_fakes": False, "generator_chunk": 2}, {"accumulate": 2}],
    ids=lambda changes: ", ".join(changes),
)
def test_every_switch_gives_the_golden_losses(kept, changes):
    assert worst(losses(2, **changes), kept) <= 1e-12  # found: 1e-14 (rounding)


def test_the_golden_losses_would_show_a_change(kept):
    assert worst(losses(2, lambda_gp=10.001), kept) > 1e-5  # found: 8.8e-5
    assert worst(losses(2, beta1=0.501), kept) > 1e-5  # found: 1.9e-5
