"""Training by several ranks: the update of one process with the whole batch, the same place after a stop, one voice."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cohort import SMALL, losses, make_store, rows
from hypothesis import given
from hypothesis import strategies as st
from processes import ended, on_ranks, outcome, start, start_ranks
from torch.distributed import TCPStore

from fastsrgan.config import TrainConfig
from fastsrgan.core.ranks import ALONE, Ranks, from_environment
from fastsrgan.data.feed import deal
from fastsrgan.data.pool import Batch, Pool
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.model import checkpoint, networks, weights
from fastsrgan.train.gan import Models
from fastsrgan.train.optimise import Optimiser
from fastsrgan.train.run import agree_on_settings, train
from fastsrgan.train.snapshots import redeal
from fastsrgan.train.state import Position, Run, epoch_part, remaining

CPU = torch.device("cpu")
CONFIG = SMALL.replace(batch_size=4, ema=0.5, lr_schedule="linear", lr_end=0.2, resident_subjects=1, steps_per_epoch=6)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Five training subjects, which two ranks cannot share evenly, and three test subjects."""
    return make_store(tmp_path_factory.mktemp("cohort"), train=5, test=3)


# --- one update ---------------------------------------------------------------------------------------------------


def one_update(config: TrainConfig, ranks: Ranks, folder: Path) -> None:
    """A critic and a generator update of this rank's part of one batch of 6, in float64; saves all parameters."""
    some = torch.Generator().manual_seed(5)
    x = torch.rand((6, 1, 16, 16, 16), generator=some, dtype=torch.float64)
    y = torch.rand((6, 2, 16, 16, 16), generator=some, dtype=torch.float64)
    eps = torch.rand((6, 2), generator=some, dtype=torch.float64)
    part = slice(6 // ranks.world * ranks.rank, 6 // ranks.world * (ranks.rank + 1))
    batch = Batch(x[part], y[part], torch.ones(6, dtype=torch.float64)[part], [""] * len(x[part]))
    models = Models(config, 0, CPU, ranks)
    models.generator.double()
    models.critic.double()
    models.finish()
    models.set_rates(1.0)
    for optimiser in (models.optimiser_g, models.optimiser_d):
        optimiser.clear = lambda: None  # type: ignore[method-assign]  # the gradients stay to be looked at
    facts = models.critic_updates([batch], [eps[part]])
    facts = {**facts, **{f"g_{k}": v for k, v in models.generator_update(batch, True).items()}}
    networks = {"generator": models.generator, "critic": models.critic}
    named = [(f"{net}.{name}", p) for net, network in networks.items() for name, p in network.named_parameters()]
    found = {name: p.detach() for name, p in named}
    found |= {f"{name}.grad": p.grad for name, p in named if p.grad is not None}
    torch.save({"tensors": found, "facts": ranks.mean(facts)}, folder / f"{ranks.world}-{ranks.rank}.pt")


def one_update_on_rank(config: TrainConfig, folder: Path) -> None:
    with from_environment(CPU) as ranks:
        one_update(config, ranks, folder)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_update_of_two_ranks_is_that_of_the_whole_batch(tmp_path, accumulate):
    config = CONFIG.replace(batch_size=6, ema=0.0, clip_norm=0.5, kernel_gen=3, kernel_dis=3)
    one_update(config, ALONE, tmp_path)
    on_ranks(one_update_on_rank, 2, config.replace(accumulate=accumulate), tmp_path, out=tmp_path / "out")
    whole, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(whole["tensors"]) > 40
    largest = max(float(t.abs().max()) for name, t in whole["tensors"].items() if name.endswith(".grad"))
    for name, tensor in whole["tensors"].items():
        assert torch.equal(first["tensors"][name], second["tensors"][name]), name
        error = float((first["tensors"][name] - tensor).abs().max())
        # Adam's first step is a sign: where a gradient is all rounding, it makes 1e-13 of 1e-17. Found: 6.8e-15 here.
        assert error <= 1e-12 * (largest if name.endswith(".grad") else 1.0), (name, error)
    for name, value in whole["facts"].items():
        # Found: 2.2e-16 (rounding)
        assert first["facts"][name] == second["facts"][name] == pytest.approx(value, rel=1e-12), name


TRAVEL = CONFIG.replace(batch_size=12, kernel_gen=2, kernel_dis=2, critic_iterations=2, clip_norm=0.5, precision="fp32")


def iterations(how: str, accumulate: int) -> dict:
    """Three iterations, what the last one did in its order, and a hash of the weights.

    how : "" as it is; "after": every gradient is sent when the backward pass is over; "compiled": traced whole on rank
    0, beside one that is not
    """
    networks.N_BLOCKS = 1 if how == "compiled" else 2  # all are alike, and tracing takes its time
    with from_environment(CPU) as ranks:
        models = Models(TRAVEL.replace(accumulate=accumulate), 0, CPU, ranks)
        events: list[str] = []
        start, generate = ranks.start_average_, models.generate
        if how == "after":
            Optimiser.backward = lambda self, loss, last: loss.backward()  # type: ignore[method-assign]
        if how == "compiled" and ranks.rank == 0:
            models._generator_terms = torch.compile(models._generator_loss, backend="aot_eager", fullgraph=True)

        def spied(tensors):
            events.append("sent")
            finish = start(tensors)
            return lambda: events.append("waited") or finish()

        ranks.start_average_ = spied  # type: ignore[method-assign]
        models.generate = lambda batch: events.append("fakes") or generate(batch)  # type: ignore[method-assign]
        models.generator.stem.register_post_accumulate_grad_hook(lambda parameter: events.append("backward done"))
        draw = torch.Generator().manual_seed(ranks.rank)
        for _ in range(3):
            events.clear()
            made = [torch.rand((models.batch, c, 16, 16, 16), generator=draw) for c in (1, 2) for _ in range(3)]
            batches = [Batch(x, y, torch.ones(len(x)), [""] * len(x)) for x, y in zip(made[:3], made[3:], strict=True)]
            eps = [torch.rand((models.batch, 2), generator=draw) for _ in range(2)]
            models.critic_updates(batches[:2], eps)
            models.generator_update(batches[2], True)
        whole = torch.cat([p.detach().flatten() for net in (models.generator, models.critic) for p in net.parameters()])
        return {"events": events, "weights": whole.tolist()}


@pytest.fixture(scope="module")
def travelled(tmp_path_factory):
    """What ``iterations`` returned on each rank of a job: each job is run once."""

    return functools.cache(lambda *job: on_ranks(iterations, *job, out=tmp_path_factory.mktemp("travelled")))


CRITIC = ["fakes", "sent", "fakes", "waited", "sent", "waited"]


@pytest.mark.parametrize(
    ("how", "generators"),
    [
        ("", [["sent", "sent", "sent", "backward done", "sent"]] * 2),
        # The gradients of a compiled backward pass come together when it is over; of one block they are three groups.
        ("compiled", [["backward done", "sent", "sent", "sent"], ["sent", "sent", "backward done", "sent"]]),
    ],
    ids=["as it is", "compiled"],
)
def test_gradients_travel_while_others_are_computed(travelled, how, generators):
    for found, generator in zip(travelled(2, how, 1), generators, strict=True):
        assert found["events"] == [*CRITIC, *generator, *["waited"] * generator.count("sent")]


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (2, 2), (3, 1)])
def test_weights_are_those_of_gradients_that_are_sent_afterwards(travelled, world, accumulate):
    overlapped, after = (travelled(world, how, accumulate) for how in ("", "after"))
    assert after[0]["events"][len(CRITIC) :] == [*["backward done"] * accumulate, "sent", "waited"]
    first, then = (np.array(found[0]["weights"], np.float32) for found in (overlapped, after))
    assert all(found["weights"] == overlapped[0]["weights"] for found in overlapped)
    if world == 2:
        assert np.array_equal(first, then)  # a sum of two has one order
    else:  # measured: 6e-6, where Adam's first steps of 1e-4 make something of rounding
        assert np.abs(first - then).max() <= 3e-5


def failing(late: bool) -> None:
    """Rank 1 fails in a backward pass some of whose gradients are under way."""
    with from_environment(CPU) as ranks:
        models = Models(TRAVEL, 0, CPU, ranks)

        def fail(parameter) -> None:
            assert len(models.optimiser_g._sent) == 3
            raise ResourceError("disk", "no space left", "free space")

        if ranks.rank == 1:
            models.generator.stem.register_post_accumulate_grad_hook(fail)
        elif late:
            time.sleep(3)  # the others' messages wait for this rank's, which have not begun
        batch = Batch(*(torch.rand((6, c, 16, 16, 16)) for c in (1, 2)), torch.ones(6), [""] * 6)
        models.generator_update(batch, True)


@pytest.mark.fault(39)
@pytest.mark.parametrize("late", [False, True])
def test_a_rank_that_fails_in_a_backward_pass_ends_the_others(tmp_path, late):
    processes = start_ranks(failing, 3, late, out=tmp_path)
    assert [ended(p, 60) for p in processes] == [5, 5, 5]
    assert outcome(tmp_path / "1.json")["error"].startswith("disk: no space left")
    for rank in (0, 2):
        assert "failed: disk: no space left" in outcome(tmp_path / f"{rank}.json")["error"]


# --- runs ---------------------------------------------------------------------------------------------------------


def training(
    store: Path, run: Path, config: TrainConfig, at: int = 0, what: str = "", where: int = 1, plain: bool = False
) -> dict:
    """Train as a rank; behind update ``at``, rank ``where`` gets a signal, ends, or raises."""
    count, original = iter(range(1, 1000)), Models.generator_update

    def counted(self, *args, **kwargs):
        values = original(self, *args, **kwargs)
        if next(count) == at and self.ranks.rank == where:
            if what == "error":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            os.kill(os.getpid(), getattr(signal, what))
        return values

    Models.generator_update = counted  # type: ignore[method-assign]
    resume = bool(checkpoint.snapshots(run)) and not plain
    return train(store, run, config, resume=resume)


def unasked(*args) -> dict:
    """Train without --resume, as torchrun starts its ranks again."""
    return training(*args, plain=True)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    """A run of two ranks that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    first, second = on_ranks(training, 2, store, out / "run", CONFIG, out=out / "out")
    assert first["updates"] == second["updates"] == 12 and first["ranks"] == 2 and first["best"] == second["best"]
    return out / "run"


def test_two_ranks_write_one_run(store, whole):
    assert [r["update"] for r in rows(whole)] == list(range(1, 13))
    assert len(rows(whole, "validation")) == 2
    assert not checkpoint.verify(checkpoint.newest(whole))
    assert checkpoint.manifest(checkpoint.newest(whole))["ranks"] == 2
    assert all(np.isfinite(r["d_total"]) and np.isfinite(r["g_total"]) for r in rows(whole))
    assert weights.load_generator(whole / "model.safetensors").spec.kernel == 2


def test_the_ranks_validate_as_one_process_does(store, whole, tmp_path):
    config = CONFIG.replace(epochs=1, steps_per_epoch=1, lr_gen=1e-30, lr_dis=1e-30, whole_every=1)
    train(store, tmp_path / "one", config)
    on_ranks(training, 2, store, tmp_path / "two", config, out=tmp_path / "out")
    one, two = (rows(tmp_path / name, "validation")[0]["validation"] for name in ("one", "two"))
    assert one.keys() == two.keys() >= {"Dice", "MSE", "PSNR", "whole_PSNR", "spline_SSIM", "spline_Dice"}
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-12), name  # found: 1.7e-16


@pytest.mark.fault(37)
@pytest.mark.parametrize("what", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(store, whole, tmp_path, what):
    run = tmp_path / "run"
    stopped = on_ranks(training, 2, store, run, CONFIG, 4, what, out=tmp_path / "out")
    assert [s["exit_code"] for s in stopped] == [143, 143]
    assert [s["updates"] for s in stopped] == [4, 4] and checkpoint.newest(run).name == "step-00000004"
    on_ranks(training, 2, store, run, CONFIG, out=tmp_path / "again")
    assert losses(run) == losses(whole)
    same = [(folder / "model.safetensors").read_bytes() for folder in (run, whole)]
    networks = [weights.load_generator(folder / "model.safetensors").state_dict() for folder in (run, whole)]
    assert len(same[0]) and all(torch.equal(networks[0][k], networks[1][k]) for k in networks[0])


@pytest.mark.fault(39)
@pytest.mark.parametrize("what", ["SIGKILL", "error"])
def test_when_one_rank_dies_the_others_say_so_and_end(store, tmp_path, what):
    processes = start_ranks(training, 2, store, tmp_path / "run", CONFIG, 8, what, out=tmp_path / "out")
    codes = [ended(p) for p in processes]
    assert codes == [5, -signal.SIGKILL if what == "SIGKILL" else 5]
    found = outcome(tmp_path / "out" / "0.json")
    assert found["kind"] == "LostRank" and ("out of memory at a batch of 4" in found["error"]) == (what == "error")
    assert checkpoint.newest(tmp_path / "run").name == "step-00000006"  # of the last whole epoch


@pytest.mark.fault(36)
def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(store, tmp_path):
    config = CONFIG.replace(max_bad_steps=3)
    processes = start_ranks(poisoned, 2, store, tmp_path / "run", config, out=tmp_path / "out")
    assert [ended(p) for p in processes] == [5, 5]
    assert "3 updates in a row were not finite" in outcome(tmp_path / "out" / "1.json")["error"]
    bad = json.loads((tmp_path / "run" / "bad_batch.json").read_text(encoding="utf8"))
    assert len(bad["patches"]) == 4 and bad["facts"]["g_skipped"] == 1.0  # of both ranks
    assert [bool(r.get("g_skipped")) for r in rows(tmp_path / "run")] == [True, True]


def poisoned(store: Path, run: Path, config: TrainConfig) -> dict:
    """Train; rank 1 sees infinities."""
    original = Pool.gather

    def gather(self, indices, *more):
        batch = original(self, indices, *more)
        if os.environ["RANK"] == "1":
            batch.y[0, 0, 3, 3, 3] = torch.inf
        return batch

    Pool.gather = gather  # type: ignore[method-assign]
    return train(store, run, config)


def disagreeing(store: Path, run: Path, config: TrainConfig, other: Path | None) -> dict:
    if os.environ["RANK"] == "1":
        config = config.replace(lr_gen=5e-4) if other is None else config
        store = store if other is None else other
    return train(store, run, config)


@pytest.mark.fault(40)
@pytest.mark.parametrize("what", ["config", "data"])
def test_ranks_that_disagree_end_before_the_first_step(store, tmp_path, what):
    other = make_store(tmp_path, train=1) if what == "data" else None
    processes = start_ranks(disagreeing, 2, store, tmp_path / "run", CONFIG, other, out=tmp_path / "out")
    assert [ended(p) for p in processes] == [4, 4]
    wanted = "config: lr_gen: not the same on all ranks: rank 0 has 0.0001, rank 1 has 0.0005"
    for rank in range(2):
        error = outcome(tmp_path / "out" / f"{rank}.json")["error"]
        assert wanted in error if what == "config" else "training data: not the same on all ranks" in error
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_batch_that_the_ranks_cannot_share_is_a_usage_error():
    three = Ranks()
    three.world = 3
    with pytest.raises(UsageError, match="multiple of 3"):
        agree_on_settings(three, CONFIG)


# --- another number of ranks --------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 23),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.integers(1, 5),
    groups=st.integers(0, 9),
    whole_group=st.booleans(),
)
def test_what_is_left_of_an_epoch_is_what_no_rank_finished(count, worlds, size, groups, whole_group):
    worlds = tuple(min(w, count) for w in worlds)
    names = [f"s{i}" for i in range(count)]
    run = Run.__new__(Run)
    run.train, run.config, run.feed = names, SMALL, SimpleNamespace(seed=SMALL.seed)
    old = Position(epoch=3, group=groups, step=2, steps=2 if whole_group else 5, resident=size, world=worlds[0])
    dealt = [deal(names, SMALL.seed, 3, size, rank, worlds[0]) for rank in range(worlds[0])]
    finished = [n for own in dealt for group in own[: groups + whole_group] for n in group]
    left = remaining(run, old)
    assert sorted(left + finished) == sorted(names)
    part = epoch_part(run, old)
    assert 0 <= part <= 1 and (part == 1) == (groups + whole_group >= len(dealt[0]))
    run.ranks, dealt_anew = SimpleNamespace(world=worlds[1]), replace(old, epoch_updates=7)
    redeal(run, dealt_anew)  # the updates of a group that comes again still count in the epoch
    assert dealt_anew == replace(
        old, epoch_updates=9, group=0, step=0, steps=0, resident=None, world=worlds[1], before=part,
        left=left if len(left) >= worlds[1] else [],
    )  # fmt: skip
    if len(left) >= worlds[1]:
        again = [n for r in range(worlds[1]) for group in deal(left, SMALL.seed, 3, size, r, worlds[1]) for n in group]
        assert len(again) == len(set(again)) > len(left) - worlds[1] and set(again) <= set(left)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_between_two_groups_nothing_of_the_next_is_done(group, world):
    """A position without steps: the group has not begun, and its subjects are left whatever ranks there are then."""
    names = [f"sub-{i}" for i in range(8)]
    run = SimpleNamespace(train=names, feed=SimpleNamespace(seed=SMALL.seed))
    old = Position(epoch=2, group=group, resident=1, world=world)
    dealt = [deal(names, SMALL.seed, 2, 1, rank, world) for rank in range(world)]
    finished = [n for own in dealt for each in own[:group] for n in each]
    assert len(finished) == group * world
    assert sorted(remaining(run, old) + finished) == names
    assert epoch_part(run, old) == pytest.approx(group * world / len(names))


def test_one_rank_can_go_on_as_two_and_back(store, tmp_path):
    run, config = tmp_path / "run", CONFIG.replace(steps_per_epoch=None, epochs=3, stride=8)
    done = subprocess_free(training, store, run, config, 3, "SIGTERM", 0, out=tmp_path / "0.json")
    assert done["updates"] == 3 and done["ranks"] == 1
    two = on_ranks(training, 2, store, run, config, 9, "SIGTERM", out=tmp_path / "out")
    assert two[0]["updates"] == two[1]["updates"] == 12 and two[0]["ranks"] == 2
    done = subprocess_free(training, store, run, config, out=tmp_path / "1.json")
    assert done["epochs"] == 3 and done["ranks"] == 1
    history = rows(run)
    assert [r["update"] for r in history] == list(range(1, len(history) + 1))
    assert all(np.isfinite(r["g_total"]) and np.isfinite(r["d_total"]) for r in history)
    assert all(a["lr_factor"] >= b["lr_factor"] for a, b in itertools.pairwise(history)), "the schedule went back"


def subprocess_free(target, *args, out: Path) -> dict:
    """What a process alone returned."""
    assert ended(start(target, *args, out=out)) == 0, outcome(out)
    return outcome(out)["value"]


# --- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.fault(39)
def test_ranks_that_are_restarted_resume_their_own_run_and_no_other(store, whole, tmp_path):
    """As torchrun does it: the same store, one restart counted."""
    run = tmp_path / "run"

    def attempt(agent: TCPStore, restarts: int, *args) -> list[int | None]:
        told = {"TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_RESTART_COUNT": restarts}
        told |= {"TORCHELASTIC_USE_AGENT_STORE": True, "MASTER_PORT": agent.port}
        processes = start_ranks(unasked, 2, store, run, CONFIG, *args, out=tmp_path / "out", **told)
        return [ended(p) for p in processes]

    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert attempt(agent, 0, 8, "SIGKILL") == [5, -signal.SIGKILL]
    assert checkpoint.newest(run).name == "step-00000006"
    assert attempt(agent, 1) == [0, 0], outcome(tmp_path / "out" / "0.json")
    assert losses(run) == losses(whole)
    another = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for restarts in (0, 1):
        assert attempt(another, restarts) == [2, 2]
        assert "already holds a run" in outcome(tmp_path / "out" / "0.json")["error"]
