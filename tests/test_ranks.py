"""What ranks tell each other: reductions with the values of a single process, disagreement and death named."""

from __future__ import annotations

import gc
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ended, on_ranks, outcome, start_ranks

from fastsrgan.core import ranks
from fastsrgan.core.ranks import ALONE, KILLED, TorchRanks, from_environment
from fastsrgan.errors import ModelError, ResourceError, UsageError

CPU = torch.device("cpu")


def tensors(rank: int) -> list[torch.Tensor]:
    some = torch.Generator().manual_seed(rank)
    kinds = [((3, 5), torch.float64), ((7,), torch.float32), ((), torch.float64), ((2, 1, 3), torch.float32)]
    made = [torch.randn(shape, generator=some, dtype=dtype) for shape, dtype in kinds]
    return [*made, torch.randn(4, 6, generator=some).T]  # not contiguous


def reductions() -> dict:
    with from_environment(CPU) as r:
        averaged = tensors(r.rank)
        r.start_average_(averaged)()
        facts = [{"loss": float(r.rank), "same": 2.0} for _ in range(2)]
        means = [r.mean(facts[0]), r.mean(facts[1])]
        uneven = r.mean({"loss": float(r.rank)} | ({"skipped": 1.0} if r.rank == 1 else {}))
        means += [uneven, r.mean(facts[0])]
        told = ""
        try:
            r.agree("config: seed", r.rank // 2)
        except ModelError as error:
            told = str(error)
        r.agree("version", 7)
        before = r.noted("begun")
        r.barrier()
        r.note("begun")
        r.barrier()
        return {
            "averaged": [t.tolist() for t in averaged],
            "means": means,
            "least": r.minimum(5 - r.rank),
            "any": [r.any(False), r.any(r.rank == 1)],
            "sums": r.sums([1.0, float(r.rank)]),
            "told": told,
            "noted": [before, r.noted("begun"), r.noted("else")],
            "gathered": r.gather(["a", r.rank]),
        }


def test_reductions_are_those_of_one_process(tmp_path):
    world = 3
    found = on_ranks(reductions, world, out=tmp_path)
    everyone = [tensors(rank) for rank in range(world)]
    expected = [torch.stack(same).mean(0) for same in zip(*everyone, strict=True)]
    for one in found:
        for got, want in zip(one["averaged"], expected, strict=True):
            # Found: 0.22 of it
            torch.testing.assert_close(torch.tensor(got, dtype=want.dtype), want, rtol=1e-6, atol=1e-7)
        assert one["means"][0] == one["means"][1] == one["means"][3] == {"loss": 1.0, "same": 2.0}
        assert one["means"][2] == {"loss": 1.0, "skipped": 1.0}  # of the ranks that have it
        assert one["least"] == 3 and one["any"] == [False, True] and one["sums"] == [3.0, 3.0]
        assert "config: seed" in one["told"] and "rank 2 has 1" in one["told"] and "rank 1" not in one["told"]
        assert one["noted"] == [False, True, False]
        assert one["gathered"] == [["a", 0], ["a", 1], ["a", 2]]
    assert all(one["averaged"] == found[0]["averaged"] for one in found), "the ranks differ in a bit"


def two_groups() -> list[float]:
    """Rank 0 comes to the second one late, and its addresses of the first still stand in the store."""
    found, kept = [], []
    for turn in range(2):
        if turn and os.environ["RANK"] == "0":
            time.sleep(1)
        with from_environment(torch.device("cpu")) as group:
            found += group.sums([1.0])
            kept.append(group._lasting)
        del group
        gc.collect()
    return found


def test_a_script_that_trains_twice_finds_the_others_again(tmp_path):
    """The second group took the addresses of the first, and torch's words for it named no reason."""
    assert on_ranks(two_groups, 2, out=tmp_path) == [[2.0, 2.0]] * 2


def test_a_process_alone_changes_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert from_environment(CPU) is ALONE
    mine = tensors(0)
    ALONE.start_average_(mine)()
    assert all(torch.equal(a, b) for a, b in zip(mine, tensors(0), strict=True))
    assert ALONE.mean({"a": 1.5}) == {"a": 1.5} and ALONE.sums([2.0]) == [2.0] and ALONE.minimum(-3) == -3
    assert ALONE.any(True) and not ALONE.any(False) and ALONE.gather("x") == ["x"]
    ALONE.agree("anything", object())
    ALONE.note("a")
    assert not ALONE.noted("a")


def test_the_reason_is_the_error_that_a_rank_left_else_what_the_connection_says():
    """One that left none is noted: the others do not wait for it when they part."""
    one = object.__new__(TorchRanks)
    one._store = store = torch.distributed.HashStore()
    store.set_timeout(timedelta(milliseconds=10))
    lost = RuntimeError("[gloo/pair.cc:5] Connection closed by peer. This may be\nanything")
    assert one._reason(lost) == "lost another rank, which left no error: Connection closed by peer"
    assert store.check([KILLED])
    one._store = other = torch.distributed.HashStore()
    other.set("error", "rank 1 failed: disk: full")
    assert one._reason(lost) == "rank 1 failed: disk: full" and not other.check([KILLED])


def waiting(death: str, ending: int) -> None:
    with from_environment(CPU) as r:
        r.barrier()
        if r.rank == ending:
            if death == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ResourceError("disk", "no space left", "free space")
        if death == "late" and r.rank == 2:
            read = r._reason
            r._reason = lambda error: time.sleep(1) or read(error)  # long after rank 0 could have ended with its store
        r.start_average_([torch.ones(3)])()


@pytest.mark.fault(39)
@pytest.mark.parametrize("ending", [0, 1])  # rank 0 holds the store of a job that torchrun did not start
@pytest.mark.parametrize("death", ["kill", "error", "late"])
def test_the_others_end_with_the_error_of_a_rank_that_ends(tmp_path, death, ending):
    processes = start_ranks(waiting, 3, death, ending, out=tmp_path)
    codes = [ended(p) for p in processes]  # long before the half hour that a message may take
    expected = [5, 5, 5]
    if death == "kill":
        expected[ending] = -signal.SIGKILL
    assert codes == expected
    for rank in {0, 1, 2} - {ending}:
        found = outcome(tmp_path / f"{rank}.json")
        assert found["kind"] == "LostRank", found
        wanted = "left no error" if death == "kill" else "failed: disk: no space left"
        assert wanted in found["error"]


def lingering(folder: Path) -> None:
    """Rank 1 fails with messages under way, and ends behind the others."""
    with from_environment(CPU) as r:
        import torch.distributed.nn.functional  # as torch's compiler does

        part = r._part

        def parted() -> None:
            part()
            (folder / f"parted {r.rank}").touch()
            until = time.monotonic() + 60
            while r.rank == 1 and len(list(folder.glob("parted *"))) < 3:
                assert time.monotonic() < until, "the others still wait for this rank"
                time.sleep(0.01)

        r._part = parted
        begun = [r.start_average_([torch.ones(3)]) for _ in range(2)]
        if r.rank == 1:
            raise ResourceError("disk", "no space left", "free space")
        for finish in [*begun, r.start_average_([torch.ones(3)])]:
            finish()


@pytest.mark.fault(39)
def test_a_rank_that_fails_closes_its_connections_before_it_ends(tmp_path):
    processes = start_ranks(lingering, 3, tmp_path, out=tmp_path)
    assert [ended(p) for p in processes] == [5, 5, 5]
    for rank in (0, 2):
        assert "failed: disk: no space left" in outcome(tmp_path / f"{rank}.json")["error"]


def test_incomplete_variables_are_a_usage_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="RANK"):
        from_environment(CPU)


def test_each_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert ranks.local_device("auto") == ranks.local_device("cuda") == "cuda:1"
    assert ranks.local_device("cpu") == "cpu" and ranks.local_device("cuda:0") == "cuda:0"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ResourceError, match="4 ranks on this machine, 2 CUDA devices"):
        ranks.local_device("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert ranks.local_device("auto") == "cuda:0", "a batch system shows each rank its own"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun")
    with pytest.raises(ResourceError, match="4 ranks on this machine, 1 CUDA device seen"):
        ranks.local_device("auto")  # what torchrun was shown, it shows to all
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ranks.local_device("auto") == "cuda:0", "of each rank with --virtual-local-rank"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("WORLD_SIZE")
    assert ranks.local_device("auto") == "auto"


@pytest.mark.fault(44)
def test_small_shared_memory_is_spared_and_said(monkeypatch, caplog):
    class Room:
        f_bavail, f_frsize = 2**14, 2**12  # 64 MB, as in a container

    monkeypatch.delenv("NCCL_SHM_DISABLE", raising=False)
    monkeypatch.setattr(os, "statvfs", lambda folder: Room)
    ranks.spare_shared_memory()
    assert os.environ.pop("NCCL_SHM_DISABLE") == "1" and "--shm-size" in caplog.text
    Room.f_bavail = 2**20
    ranks.spare_shared_memory()
    assert "NCCL_SHM_DISABLE" not in os.environ


@pytest.mark.parametrize(
    ("surroundings", "speaks", "launched"),
    [
        ({}, True, False),
        ({"RANK": "1"}, True, False),  # of something else: no other rank would speak
        ({"WORLD_SIZE": "1", "RANK": "1"}, True, False),
        ({"WORLD_SIZE": "2", "RANK": "1"}, False, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True, True),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "1", "RANK": "0"}, True, True),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1"}, False, True),
    ],
)
def test_one_process_speaks_for_all(monkeypatch, surroundings, speaks, launched):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    assert (ranks.speaks(), ranks.launched()) == (speaks, launched)


@pytest.mark.parametrize(
    ("device", "local", "spared"), [("cuda", "2", 1), ("cuda", "1", 0), ("cpu", "2", 0), ("cuda", None, 0)]
)
def test_ranks_are_those_of_the_surroundings(monkeypatch, device, local, spared):
    """Memory of one machine is shared by the ranks that are on it, where they have GPUs."""
    made, spares = [], []
    monkeypatch.setattr(ranks, "TorchRanks", lambda *args: made.append(args) or "ranks")
    monkeypatch.setattr(ranks, "spare_shared_memory", lambda: spares.append(1))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    device = f"{device}:1".replace("cpu:1", "cpu")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": local}.items():
        if value:
            monkeypatch.setenv(name, value)
    patience = ranks.TIMEOUT * 2
    assert from_environment(torch.device(device), patience) == "ranks"
    assert made == [(3, 4, int(local or 1), torch.device(device), patience)] and len(spares) == spared
    monkeypatch.setenv("RANK", "-1")
    with pytest.raises(UsageError, match="'-1' is no number"):
        from_environment(torch.device(device))


def test_ranks_that_would_share_a_gpu_are_told(monkeypatch):
    """NCCL refuses it in words that name neither the device nor what to do."""
    monkeypatch.setattr(ranks, "TorchRanks", lambda *args: "ranks")
    monkeypatch.setattr(ranks, "spare_shared_memory", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=r"cuda:0: 2 ranks of this machine would share it \(--device auto"):
        from_environment(torch.device("cuda", 0))
    assert from_environment(torch.device("cuda", 1)) == "ranks"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert from_environment(torch.device("cuda", 0)) == "ranks", "each rank sees its own"


@pytest.mark.parametrize(("free", "spared"), [(2**28 - 1, True), (2**28, False)])
def test_shared_memory_is_enough_from_its_limit_on_and_a_choice_is_kept(monkeypatch, free, spared):
    for before in (None, "0"):
        monkeypatch.delenv("NCCL_SHM_DISABLE", raising=False)
        if before:
            monkeypatch.setenv("NCCL_SHM_DISABLE", before)
        monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=free, f_frsize=1, f_bfree=1))
        ranks.spare_shared_memory()
        assert os.environ.get("NCCL_SHM_DISABLE") == (before or ("1" if spared else None))
        os.environ.pop("NCCL_SHM_DISABLE", None)
