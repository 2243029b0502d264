"""What is planned against what is taken; which way is chosen; what is refused and with which advice."""

import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastsrgan.core import system
from fastsrgan.errors import ResourceError, UsageError
from fastsrgan.infer import memory as memory_plan
from fastsrgan.infer import tiles
from fastsrgan.infer.memory import LIBRARIES, MEMORY, NEXT_IMAGE, RESULT_BEFORE, SLABS, TilingJob, plan_memory
from fastsrgan.infer.network import KEPT, Needs, TileNetwork
from fastsrgan.infer.network import needs as count_needs
from fastsrgan.infer.volume import infer_volume
from fastsrgan.model.networks import GeneratorSpec, build_generator

PROBE = Path(__file__).parent / "memory_probe.py"
MIB = 2**20


def probe(**job) -> dict:
    """One inference in a process of its own."""
    done = subprocess.run([sys.executable, str(PROBE), json.dumps(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")


@pytest.mark.fault(35)
@needs_linux
@pytest.mark.parametrize(
    "job",
    [
        {"shape": [96, 64, 64], "kernel": 8, "patch": 64, "step": 32},
        {"shape": [160, 96, 64], "kernel": 1, "patch": 48, "step": 29, "window": "gaussian"},
        {"shape": [64, 64, 24], "spacing": [1, 1, 3], "kernel": 4, "network": "unet", "patch": 64, "step": 40},
    ],
    ids=lambda job: f"{job['kernel']}-{job['patch']}",
)
def test_what_is_taken_lies_between_half_the_plan_and_the_plan(job):
    """Half of what the arrays need: how much torch itself takes beside them differs from machine to machine."""
    found = probe(**job)
    assert found["mode"] == MEMORY
    assert (found["planned"] - LIBRARIES) / 2 <= found["measured"] <= found["planned"], found


@pytest.mark.fault(35)
@needs_linux
def test_by_slabs_memory_does_not_grow_with_the_length():
    """Four times the length under a limit that the process enforces: the default limit is what the process may take."""
    job = {"kernel": 1, "patch": 32, "step": 32, "batch": 1, "scratch": True}
    short = probe(shape=[256, 64, 64], max_memory=36 * MIB, **job)
    long = probe(shape=[1024, 64, 64], data_limit=90 * MIB, **job)
    assert short["mode"] == long["mode"] == SLABS
    assert long["planned"] == short["planned"] and long["measured"] <= long["planned"]
    result = 2 * 4 * 1024 * 64 * 64
    # a result that grew with the length would add 24 MiB; the allocator's own noise was 0.5 to 5.3 MiB on two machines
    assert abs(long["measured"] - short["measured"]) < result / 4
    assert long["measured"] < result + 4 * 1024 * 64 * 64, "less than image and result would take"


# --- decisions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    return TileNetwork(build_generator(GeneratorSpec(kernel=4)), 1.0)


def job(shape=(300, 100, 90), patch=64, step=32, **more) -> TilingJob:
    return TilingJob(tiles.plan(shape, patch, step), 2, **more)


def test_the_way_follows_the_limit(network):
    roomy = plan_memory(job(can_stream=True), network, "auto", 2**33)
    assert roomy.mode == MEMORY and roomy.total("disk") == 0
    whole = roomy.total("host")
    long = job((3000, 100, 90), can_stream=True)
    slabs = plan_memory(long, network, 1, whole)
    assert slabs.mode == SLABS and slabs.total("host") <= whole
    assert slabs.total("disk") == 4 * 2 * 3000 * 100 * 90
    with pytest.raises(ResourceError, match=r"needs .* MiB, the limit is .* MiB .*by slabs"):
        plan_memory(replace(long, can_stream=False), network, 1, whole)
    with pytest.raises(ResourceError, match="without --budget"):
        plan_memory(replace(long, levels=True), network, 1, whole)


def test_the_batch_shrinks_before_the_way_changes(network):
    large = plan_memory(job(), network, 8, 2**33)
    assert large.batch == 8
    smaller = plan_memory(job(), network, 8, large.total("host") - 1)
    assert smaller.batch == 4 and smaller.mode == MEMORY


def test_neighbours_of_a_cohort_take_what_is_left(network, monkeypatch):
    """The result before comes first; mode and batch are those of the image alone."""

    class Neighbours:
        result, image = MIB, 2 * MIB

    alone = plan_memory(job(), network, 4, 2**33)
    needed = alone.total("host")
    for spare, expected in ((0, 0), (1, 1), (2, 1), (3, 3)):
        found = plan_memory(job(), network, 4, needed + spare * MIB, Neighbours())
        assert found.total("host") == needed + expected * MIB and (found.batch, found.mode) == (4, MEMORY)
        assert (found.has(RESULT_BEFORE), found.has(NEXT_IMAGE)) == (spare > 0, spare > 2)
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 2**30)
    assert plan_memory(job(), network, 4, None, Neighbours()).limit == int(0.9 * (2**30 + MIB)), "it is held already"


def test_a_network_of_unknown_make_is_taken_to_need_more_than_one_of_sixteen_channels_has_alive():
    """But not many times as much; in proportion to the voxels of all tiles."""
    layers = [nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3, padding=1), nn.Conv3d(16, 2, 1)]
    foreign = TileNetwork(nn.Sequential(*layers), 1.0)
    alive = count_needs(foreign.generator, (16, 16, 16)).alive
    assert alive < foreign.bytes_of((16, 16, 16)) < 8 * alive  # found: 2.9
    assert foreign.bytes_of((16, 32, 48), 3) == 18 * foreign.bytes_of((16, 16, 16))


def test_a_mean_over_passes_and_a_shared_volume_are_planned(network):
    plain, averaged = (plan_memory(job(averaged=flag), network, 2, 2**33) for flag in (False, True))
    assert averaged.total("host") == plain.total("host") + 2 * 4 * 64**3 * (1 + 2 * 2)
    shared = plan_memory(job(can_stream=True, split=True), network, 2, 2**33)
    assert shared.mode == SLABS and shared.total("host") < plain.total("host")


@pytest.mark.fault(35)
def test_the_advice_of_a_refusal_works(network):
    with pytest.raises(ResourceError, match=r"--patch (\d+) needs") as refused:
        plan_memory(job(patch=128, step=64), network, "auto", 90 * MIB)
    limit, patch = re.fullmatch(r"--max-memory (\d+)M; or --patch (\d+) needs .*", refused.value.hint).groups()
    assert plan_memory(job(patch=128, step=64), network, "auto", int(limit) * MIB).mode == MEMORY
    with pytest.raises(ResourceError):
        plan_memory(job(patch=128, step=64), network, "auto", (int(limit) - 1) * MIB)
    patch = int(patch)
    assert patch < 128 and plan_memory(job(patch=patch, step=patch), network, "auto", 90 * MIB).mode == MEMORY
    with pytest.raises(
        ResourceError, match=r"--max-memory \d+M; or a machine with more memory.* --patch 16 still needs"
    ):
        plan_memory(job(), network, "auto", MIB)


@pytest.mark.fault(35)
def test_a_limit_that_the_machine_has_not_is_not_recommended_silently(network, monkeypatch):
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 2 * MIB)
    with pytest.raises(ResourceError, match=r"--max-memory \d+M, more than the 2 MiB that are free; or"):
        plan_memory(job(), network, "auto", MIB)


def test_without_a_limit_what_is_free_counts(network, monkeypatch):
    monkeypatch.setattr(memory_plan, "free_memory", lambda: 2**40)
    assert plan_memory(job(), network, 1).limit == int(0.9 * 2**40)
    monkeypatch.setattr(memory_plan, "free_memory", lambda: MIB)
    with pytest.raises(ResourceError, match="KiB are free"):
        plan_memory(job(), network, 1)


def test_free_memory_is_what_the_tightest_limit_leaves(monkeypatch):
    plain = system.free_memory()
    assert plain > 0
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10**6, 10**6) if what == resource.RLIMIT_AS else (-1, -1))
    assert system.free_memory() == 0, "this process has taken more already"
    text = {"/sys/fs/cgroup/memory.max": "123456789", "/sys/fs/cgroup/memory.current": "23456789"}
    monkeypatch.setattr(resource, "getrlimit", lambda what: (-1, -1))
    monkeypatch.setattr(system, "_lines", lambda path: text.get(path, "").splitlines())
    assert system.free_memory() == 10**8 and system.total_memory() == 123456789
    text["/proc/self/cgroup"] = "0::/jobs/a"  # a batch job within: its group's limit, and those of all around it
    text |= {"/sys/fs/cgroup/jobs/memory.max": "33000000", "/sys/fs/cgroup/jobs/memory.current": "3000000"}
    assert system.free_memory() == 3 * 10**7
    text |= {"/sys/fs/cgroup/jobs/a/memory.max": "max", "/sys/fs/cgroup/jobs/a/memory.current": "3000000"}
    assert system.free_memory() == 3 * 10**7
    folder = "/sys/fs/cgroup/memory"
    text = {f"{folder}/memory.limit_in_bytes": "50000000", f"{folder}/memory.usage_in_bytes": "1000000"}
    assert system.free_memory() == 49 * 10**6, "the first version of control groups"
    text[f"{folder}/memory.limit_in_bytes"] = str(2**63 - 4096)
    assert system.free_memory() > 2**27, "which has a number for none"


def test_what_linux_would_give_up_for_a_process_counts_as_free(monkeypatch):
    """MemAvailable: pages of files that were read lie in memory, and go where it is needed."""
    text = {"/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 700 kB\nCached: 650 kB\n"}
    monkeypatch.setattr(resource, "getrlimit", lambda what: (-1, -1))
    monkeypatch.setattr(system, "_lines", lambda path: text.get(path, "").splitlines())
    assert system.free_memory() == 700 * 1024


def test_the_plan_reaches_log_and_report(caplog):
    generator = build_generator(GeneratorSpec(kernel=1))
    with caplog.at_level("INFO", "fastsrgan"):
        done = infer_volume(np.ones((20, 20, 20)), np.eye(4), generator, patch=16, step=8, device="cpu", label="a.nii")
    told = done.report["memory"]
    assert told["mode"] == MEMORY and told["host_bytes"] == sum(r["bytes"] for r in told["rows"])
    (line,) = [r.getMessage() for r in caplog.records if "memory beside the image" in r.getMessage()]
    assert line.startswith("a.nii: memory beside the image: ") and line.endswith("in memory") and "\n" not in line
    with pytest.raises(ResourceError, match="memory"):
        infer_volume(np.ones((20, 20, 20)), np.eye(4), generator, patch=16, device="cpu", max_memory=1000, step=8)
    with pytest.raises(UsageError, match="max memory"):
        infer_volume(np.ones((20, 20, 20)), np.eye(4), generator, patch=16, device="cpu", max_memory=0, step=8)


# --- what a network takes -----------------------------------------------------------------------------------------


def test_the_count_knows_what_is_alive():
    """Against sums by hand: three arrays at once, then two; views and in-place work are free."""

    def network(x):
        a = x + 1
        b = a * 2
        del x
        b.mul_(3)
        c = b[:, :, 1:].sum((2, 3, 4), keepdim=True)
        del a
        return torch.cat([b, b], 1) + c

    one = 4 * 16 * 24 * 64
    found = count_needs(network, (16, 24, 200))
    # x stays with the caller; b, the doubled array, and the doubled result of the sum
    assert found == Needs((16, 24, 64), one * (1 + 1 + 2 + 2) + 4, 2)
    assert found.of((16, 24, 64), 3) == 3 * found.of((16, 24, 64)) == KEPT * 3 * found.alive
    assert found.of((16, 24, 128)) / found.of((16, 24, 64)) == pytest.approx(134 / 70)


def test_needs_grow_with_tiles_channels_and_size():
    found = {k: TileNetwork(build_generator(GeneratorSpec(kernel=k)), 1.0) for k in (4, 8)}
    one, more = (found[k].bytes_of((32, 32, 32)) for k in (4, 8))
    assert 1.2 * one < more < 4 * one  # found: 1.9
    assert 1.5 * one < found[4].bytes_of((32, 32, 32), 2) <= 2 * one  # found: 1.997
    assert 1.5 * one < found[4].bytes_of((32, 32, 64)) < 2.5 * one  # found: 1.8
    fixed = found[8].probe((32, 32, 32)).fixed
    assert fixed > 0 and found[8].probe((16, 16, 16)).fixed == fixed, "weights, whatever the tile"


def test_a_foreign_network_is_not_run_for_the_plan():
    class Foreign(torch.nn.Module):
        def forward(self, x):
            raise AssertionError("run")

    plan = plan_memory(replace(job()), TileNetwork(Foreign(), 1.0), 1, 2**33)
    assert plan.total("host") > 4 * 16 * 64**3


@pytest.mark.parametrize("first", [16, 48])
def test_what_a_tile_takes_does_not_depend_on_which_was_counted_before(first):
    """Or a plan would follow the order of a cohort's volumes."""
    used, fresh = (TileNetwork(build_generator(GeneratorSpec(kernel=2), seed=1), 1.0) for _ in range(2))
    used.probe((first,) * 3)
    assert used.bytes_of((32, 32, 32)) == fresh.bytes_of((32, 32, 32))
    assert used.probe((32, 32, 32)).edges == (32, 32, 32)
