"""What a benchmark times: the work that is named, once, and nothing else; and the median is the median."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import common, infer, naive, step
from bench.__main__ import parse
from bench.peers_infer import PEERS
from fastsrgan.infer import tiles

QUICK = [
    "--quick",
    "--kernel",
    "2",
    "--batch",
    "2",
    "--patch",
    "16",
    "--critic-kernel",
    "2",
    "--critic-iterations",
    "2",
]
LARGE = 1000  # elements: what counts as an array and not as a number


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but where it is moved."""
    now = SimpleNamespace(seconds=100.0, cpu=7.0)
    monkeypatch.setattr(common.time, "perf_counter", lambda: now.seconds)
    monkeypatch.setattr(common.time, "process_time", lambda: now.cpu)
    return now


@pytest.mark.parametrize("seconds", [[3, 1, 2], [9, 1, 2, 4], [5], [1, 1, 1, 50, 60]])
def test_the_median_is_the_median(seconds):
    found = common.spread([common.Turn(float(s), 10.0 - s) for s in seconds])
    assert found["seconds_median"] == statistics.median(seconds) == np.median(seconds)
    assert (found["seconds_min"], found["seconds_max"]) == (min(seconds), max(seconds))
    assert found["cpu_seconds_median"] == np.median([10.0 - s for s in seconds])
    assert found["repeats"] == len(seconds)


def test_a_row_has_the_time_of_the_calls_alone_once_a_round_and_its_ratios_are_of_medians(clock):
    """Building, the first call of the gate and the comparison cost time that no row has."""
    calls: Counter[str] = Counter()
    taken = {"fastsrgan": [50.0, 1.0, 2.0, 30.0], "peer": [60.0, 8.0, 4.0, 3.0], common.TRUTH: [70.0]}

    def side(name):
        def call():
            clock.seconds += taken[name][calls[name]]
            clock.cpu += 0.5 * taken[name][calls[name]]
            calls[name] += 1
            return [np.ones(3)]

        return call

    def build():
        clock.seconds += 1000
        return {name: side(name) for name in taken}

    args = SimpleNamespace(repeats=3, device="cpu", memory=False)
    row = common.measure(common.Case("some", {}, build, 1e-6, ("patches", 6.0)), args)
    assert calls == {"fastsrgan": 4, "peer": 4, common.TRUTH: 1}
    assert (row["seconds_median"], row["seconds_min"], row["seconds_max"]) == (2.0, 1.0, 30.0)
    assert row["peers"]["peer"]["seconds_median"] == 4.0 and row["cpu_seconds_median"] == 1.0
    assert row["ratio_to"] == {"peer": 2.0} and row["patches_per_second"] == 3.0
    assert row["ratio_range"] == {"peer": [0.1, 8.0]}


def test_rounds_of_inference_have_the_time_of_the_calls_alone(clock):
    case = infer.Dense("some", {}, lambda c: {}, "cpu")
    taken = iter([1.0, 5.0, 3.0, 6.0])

    def call():
        clock.seconds += next(taken)
        case.clock(lambda: setattr(clock, "seconds", clock.seconds + 0.25))()
        return []

    turns, inside = case._rounds({"a": call, "b": call}, SimpleNamespace(repeats=2, limit=1e9))
    assert {name: [t.seconds for t in found] for name, found in turns.items()} == {"a": [1.25, 3.25], "b": [5.25, 6.25]}
    assert inside == {"a": [0.25, 0.25], "b": [0.25, 0.25]}


@pytest.fixture
def counted(monkeypatch) -> Counter[str]:
    """Passes and steps of the plain side."""
    found: Counter[str] = Counter()

    def counting(owner, name, what):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: found.update([what]) or plain(*a, **k))

    counting(naive.NaiveGenerator, "forward", "generator")
    counting(naive.NaiveCritic, "forward", "critic")
    counting(torch.Tensor, "backward", "backward")
    counting(torch.autograd, "grad", "grad")
    counting(torch.optim.Adam, "step", "adam")
    return found


UPDATE = Counter(critic=3, grad=1, backward=1, adam=1)
GENERATOR = Counter(generator=1, critic=1, backward=1, adam=1)
WORK = {
    "generator forward,": Counter(generator=1),
    "generator forward + backward": Counter(generator=1, backward=1),
    "critic update": UPDATE,
    "generator update": GENERATOR,
    "iteration of 2 + 1": UPDATE + UPDATE + Counter(generator=2) + GENERATOR,
}


class Conversions(TorchDispatchMode):
    """Counts arrays that are made in another type, or copied as they are, by what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_to_copy", "aten::clone") and args[0].numel() > LARGE:
            self.found.append(f"{func} of {tuple(args[0].shape)}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", WORK)
def test_the_plain_side_does_the_named_work_once_and_converts_nothing(counted, row):
    """One timed call: the paper's passes, the penalty's gradient, one backward pass and one step for each update."""
    case = next(c for c in step.cases(parse(["step", *QUICK])) if c.name.startswith(row))
    call = case.build()["naive"]
    call()
    counted.clear()
    with Conversions() as mode:
        call()
    assert counted == WORK[row]
    assert not mode.found


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if "constant" in peer.windows and not peer.gpu])
def test_peers_of_inference_see_each_tile_once_and_convert_nothing_but_by_their_own_law(name):
    plan = tiles.plan((20, 20, 20), 16, 4)
    if why := PEERS[name].not_run(plan):
        pytest.skip(why)
    seen = []

    def network(x):
        seen.append(len(x))
        return x

    volume = torch.rand(plan.shape)
    with Conversions() as mode:
        PEERS[name].loop(volume, plan, network, 2, "constant")
    assert sum(seen) == len(plan) == 8
    # MONAI and TorchIO copy by their own code, which is what is timed; neither volume nor tiles change their type.
    assert not [
        text for text in mode.found if "_to_copy" in text and str(plan.patch) not in text
    ]  # the window's weights


def test_every_side_of_a_row_has_its_inputs_before_it_is_timed(monkeypatch):
    """Pools, networks and random patches are made by ``build``: a call makes none."""
    made = []
    for owner, name in itertools.product((step,), ("pool", "models", "build_generator")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, plain=plain, name=name: made.append(name) or plain(*a))
    for case in step.cases(parse(["step", *QUICK])):
        if not case.name.startswith(("generator forward,", "critic update")):
            continue
        sides = case.build()
        made.clear()
        for call in sides.values():
            call()
        assert not made, case.name
