"""The benchmarks: their JSON, that a wrong result has no times, and that the plain side is the paper's network."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import modules_on_ranks

from bench import common, data, naive, step, step_ranks
from bench.__main__ import FROM_RESULTS, OPTIONS, main, parse
from fastsrgan.data import pool
from fastsrgan.model import networks
from fastsrgan.model.cpu import critic as critic_convs
from fastsrgan.model.cpu import fused
from fastsrgan.model.networks import Critic, CriticSpec, Generator, GeneratorSpec
from fastsrgan.train import critic_step

SMALL = {
    "step": ["--kernel", "2", "--batch", "2", "--patch", "16", "--critic-kernel", "2"],
    "data": ["--shape", "24", "20", "25", "--patch", "16", "--batch", "3"],
}


@pytest.fixture(autouse=True)
def as_before():
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def without_monai(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "monai" else find(name))


def bench(capsys, name: str, *more: str) -> tuple[int, dict]:
    code = main([name, "--quick", "--threads", "1", *SMALL[name], *more])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def with_ratios(monkeypatch):
    """The ratios of a --quick run, which are not to be told but are to be right."""
    monkeypatch.setattr(common, "without_ratios", lambda row: None)


def quick(path) -> list[str]:
    """One small case of `bench data --quick`, written to a file."""
    return [
        "data",
        "--quick",
        "--threads",
        "1",
        *map(str, SMALL["data"]),
        "--only",
        "patch gather",
        "--json",
        str(path),
    ]


def test_quick_tells_no_ratios(capsys, tmp_path):
    assert main(quick(tmp_path / "a.json")) == 0
    out = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["ratio_to"] == row["ratio_range"] == {} and "seconds_median" in row["peers"]["numpy slices and stack"]
    assert "numpy slices and stack" in out and "x ours" not in out
    row |= {"of_copy_ceiling": 0.5, "weak_scaling_efficiency": 0.9, "cpu_ratio_to": {"a": 2}}
    row["peers"]["a"] = {"of_matmul_ceiling": 0.3}
    common.without_ratios(row)
    assert not {"of_copy_ceiling", "weak_scaling_efficiency", "of_matmul_ceiling"} & {*row, *row["peers"]["a"]}
    assert row["cpu_ratio_to"] == {}


@pytest.mark.parametrize(
    ("load", "told"), [(0.0, ""), (0.99, ""), (1.0, "load average 1.0 on 2 cores before"), (7.96, "load average 8.0")]
)
def test_a_bench_says_that_the_machine_was_busy_before_it_began(monkeypatch, capsys, tmp_path, load, told):
    """Half of the cores or more in use by others; the file says the load in any case."""
    monkeypatch.setattr(common.os, "getloadavg", lambda: (load, 0.25, 0.125))
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda process: {0, 1})
    assert main(quick(tmp_path / "a.json")) == 0
    err = capsys.readouterr().err
    assert err.count("warning: the machine is busy") == bool(told) and told in err
    assert json.loads((tmp_path / "a.json").read_text())["machine"]["load_average_before"] == [load, 0.25, 0.125]


PROMISED = {  # (start of a row's name, a peer in it)
    "step": [
        ("generator forward,", "reference form"),
        ("generator forward + backward,", "naive"),
        ("critic update", "autograd penalty"),
        ("critic update", "by hand, library convolutions"),
        ("generator update", "reference form"),
        ("generator forward,", "naive, channels last"),
        ("iteration of 2 + 1", "naive, channels last"),
        ("iteration of 2 + 1", "explicit penalty"),
        ("iteration of 2 + 1", "naive"),
    ],
    "data": [
        ("degrade, segsrgan", "scipy"),
        ("degrade, physical", "scipy"),
        ("patch gather", "numpy slices and stack"),
        ("store read", "nii.gz, nibabel"),
    ],
}


# --- form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step", "data"])
def test_report_has_the_form_of_the_design(capsys, tmp_path, without_monai, with_ratios, name):
    code, report = bench(capsys, name, "--json", str(tmp_path / "out.json"))
    assert code == 0
    assert json.loads((tmp_path / "out.json").read_text()) == report
    assert list(report)[:4] == ["bench", "commit", "machine", "device"]
    assert (report["bench"], report["device"], report["machine"]["threads"]) == (name, "cpu", 1)
    for key in ("cpu", "cores", "torch", "copy_bytes_per_second", "matmul_flop_per_second", "load_average"):
        assert report["machine"][key]
    assert len({row["name"] for row in report["rows"]}) == len(report["rows"]) > 2
    for row in report["rows"]:
        assert row["passed"] and 0 <= row["max_error"] <= row["tolerance"]
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"] and row["repeats"] == 2
        assert row["cpu_seconds_median"] >= 0
        ran = {peer: facts for peer, facts in row["peers"].items() if "not_run" not in facts}
        assert ran.keys() == row["ratio_to"].keys() == row["ratio_range"].keys()
        for peer, facts in ran.items():
            assert row["ratio_to"][peer] == pytest.approx(facts["seconds_median"] / row["seconds_median"])
            assert facts["max_error"] <= row["max_error"]
    for start, peer in PROMISED[name]:
        assert any(row["name"].startswith(start) and peer in row["peers"] for row in report["rows"]), (start, peer)


# --- gate ---------------------------------------------------------------------------------------------------------


def broken_penalty(monkeypatch):
    right = critic_step._Work.penalise

    def wrong(self, *args):
        gradient = right(self, *args)
        self.penalty = 1.1 * self.penalty
        return 1.1 * gradient

    monkeypatch.setattr(critic_step._Work, "penalise", wrong)


def broken_head(monkeypatch):
    right = networks.conv7_reflect
    monkeypatch.setattr(
        networks, "conv7_reflect", lambda x, w, form: right(x, w, form) * (1.1 if form == "fast" else 1)
    )


def broken_degradation(monkeypatch):
    right = data.degrade

    def shifted(*a, **k):
        done = right(*a, **k)
        done.interpolated[...] = np.roll(done.interpolated, 1, 2)
        return done

    monkeypatch.setattr(data, "degrade", shifted)


def broken_gather(monkeypatch):
    monkeypatch.setattr(pool, "copy_patch", lambda out, volume, origin: out.zero_())


@pytest.mark.parametrize(
    ("name", "fault", "only"),
    [
        ("step", broken_penalty, "critic update"),
        ("step", broken_penalty, "iteration"),
        ("step", broken_head, "generator forward,"),
        ("step", broken_head, "generator forward + backward"),
        ("data", broken_degradation, "degrade, physical"),
        ("data", broken_degradation, "degrade, segsrgan"),
        ("data", broken_gather, "patch gather"),
    ],
)
def test_a_wrong_result_has_no_times_and_exit_code_1(capsys, monkeypatch, without_monai, name, fault, only):
    fault(monkeypatch)
    code, report = bench(capsys, name, "--only", only)
    assert code == 1 and report["rows"]
    for row in report["rows"]:
        assert not row["passed"]
        assert not any(key.startswith("seconds") or key.endswith("per_second") for key in row)
        assert all("seconds_median" not in facts for facts in row["peers"].values())


def one_wrong_kernel(monkeypatch, network: str, fault: str) -> None:
    """Of fastsrgan's own forms: one layer in the middle leaves out a tap, swaps two outputs, or gives no gradient."""

    def tapless(weight):
        weight = weight.clone()
        weight[..., 0, 0, 0] = 0
        return weight

    if network == "critic":
        choose, made = critic_convs.choose, []

        def wrong(weight, size, *more):
            made.append(size)
            if len(made) % 3 != 2:  # of the three layers of a critic of 16^3 patches
                return choose(weight, size, *more)
            layer = choose(tapless(weight) if fault == "tap" else weight, size, *more)
            forward = layer.forward
            if fault == "channels":
                layer.forward = lambda *a: forward(*a)[..., [1, 0, *range(2, len(weight))]]
            if fault == "gradient":
                layer.gradient = lambda: torch.zeros_like(weight)
            return layer

        monkeypatch.setattr(critic_convs, "choose", wrong)
        return
    forward, backward, calls = fused.Kernel3.forward, fused.Kernel3.backward, {"forward": 0, "backward": 0}

    def counted(name):
        calls[name] += 1
        return calls[name] % 12 == 6  # of the twelve layers of the blocks

    def wrong_forward(self, y, weight):
        hit = counted("forward")
        out, kept = forward(self, y, tapless(weight) if hit and fault == "tap" else weight)
        return (out[:, [1, 0, *range(2, len(weight))]] if hit and fault == "channels" else out), kept

    def wrong_backward(self, *args):
        dw = backward(self, *args)
        return torch.zeros_like(dw) if counted("backward") and fault == "gradient" else dw

    monkeypatch.setattr(fused.Kernel3, "forward", wrong_forward)
    monkeypatch.setattr(fused.Kernel3, "backward", wrong_backward)


@pytest.mark.parametrize(
    ("row", "network", "fault"),
    [
        *(("generator forward,", "generator", fault) for fault in ("", "tap", "channels")),
        *(("generator forward + backward", "generator", fault) for fault in ("", "tap", "channels", "gradient")),
        *(("critic update", "critic", fault) for fault in ("", "tap", "channels", "gradient")),
        *(("generator update", "generator", fault) for fault in ("", "tap", "channels", "gradient")),
        *(("iteration", "generator", fault) for fault in ("", "tap", "channels")),
        *(("iteration", "critic", fault) for fault in ("tap", "channels", "gradient")),
    ],
)
def test_every_gate_refuses_one_wrong_kernel(monkeypatch, row, network, fault):
    """A layer without a gradient shows where gradients are compared, and in losses that come after its step."""
    small = ["--kernel", "4", "--batch", "2", "--patch", "16", "--critic-kernel", "4", "--critic-iterations", "3"]
    (case,) = (c for c in step.cases(parse(["step", "--quick", *small])) if c.name.startswith(row))
    if fault:
        one_wrong_kernel(monkeypatch, network, fault)
    sides = case.build()
    ours, naives = ([torch.as_tensor(a).clone() for a in sides[name]()] for name in ("fastsrgan", "naive"))
    assert (common.largest_difference(ours, naives, case.l2) <= case.tolerance) == (not fault)


def test_a_step_report_is_drawn(capsys, tmp_path):
    code, _ = bench(capsys, "step", "--only", "critic update", "--plot", str(tmp_path / "step.png"))
    assert code == 0 and (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_that_drift_apart_have_no_times(capsys, monkeypatch, with_ratios, tmp_path):
    """Two ranks are programs of their own; one alone runs forked, without loading the libraries anew."""
    launch, launched, programs = step.Scaling.launch, {}, step_ranks.on_ranks
    monkeypatch.setattr(
        step_ranks,
        "on_ranks",
        lambda command, world, threads: (
            programs(command, world, threads) if world == 2 else modules_on_ranks(command, world, tmp_path)
        ),
    )
    monkeypatch.setattr(step.Scaling, "launch", lambda self, n: launched.setdefault(n, launch(self, n)))
    code, report = bench(capsys, "step", "--ranks", "2", "--only", "on 2 ranks")
    (row,) = report["rows"]
    assert code == 0 and row["weak_scaling_efficiency"] > 0 and row["ratio_to"].keys() == {"one rank"}
    monkeypatch.setattr(
        step.Scaling, "launch", lambda self, n: [{**r, "weights": str(i)} for i, r in enumerate(launched[n])]
    )
    code, report = bench(capsys, "step", "--ranks", "2", "--only", "on 2 ranks")
    assert code == 1 and "seconds_median" not in report["rows"][0]


def test_a_failed_row_does_not_stop_the_others(capsys, monkeypatch):
    broken_gather(monkeypatch)
    code, report = bench(capsys, "data")
    assert code == 1
    passed = {row["name"].split(",")[0]: row["passed"] for row in report["rows"]}
    assert passed["patch gather"] is False and passed["degrade"] and passed["store read"]


def test_differences_are_relative_and_nothing_slips_through():
    ones = torch.ones(3)
    assert common.largest_difference([ones * 1000, ones], [ones * 1001, ones]) == pytest.approx(1 / 1001)
    assert common.largest_difference([ones], [ones, ones]) == math.inf
    assert common.largest_difference([ones], [torch.ones(4)]) == math.inf
    assert math.isnan(common.largest_difference([ones * math.nan], [ones]))
    assert math.isnan(common.largest_difference([ones], [ones * math.nan]))
    assert common.largest_difference([ones], [ones * 0]) > 1e20  # found: 1e30
    assert common.largest_difference([ones * 2], [ones], l2=True) == pytest.approx(1)
    assert common.largest_difference([torch.tensor([0.0, 1])], [torch.tensor([3.0, 4])], l2=True) == pytest.approx(
        math.sqrt(18) / 5
    )
    assert common.largest_difference([np.zeros(3, np.uint8)], [np.zeros(3, np.int16)]) == 0


# --- method -------------------------------------------------------------------------------------------------------


def test_sides_take_turns():
    calls: list[str] = []
    turns = common.take_turns({name: lambda n=name: calls.append(n) for name in "abc"}, 3, "cpu")  # type: ignore[misc]
    assert calls == list("abc" * 3)
    assert {name: len(t) for name, t in turns.items()} == dict.fromkeys("abc", 3)
    found = common.spread([common.Turn(3, 1), common.Turn(1, 5), common.Turn(2, 4)])
    assert list(found.values()) == [2, 1, 3, 4, 3]


@pytest.mark.parametrize(("quick", "n", "edge"), [(True, 2**20, 128), (False, 2**26, 2048)])
def test_ceilings_count_what_a_copy_moves_and_a_product_multiplies(monkeypatch, quick, n, edge):
    """Each float is read and written, 8 bytes; an element of a product is edge multiplications and additions."""
    asked = []

    def timed(sides, repeats, device):
        asked.append((repeats, device))
        return {"copy": [common.Turn(s, 9.0) for s in (0.5, 0.25, 1.0)], "matmul": [common.Turn(2.0, 0.1)]}

    monkeypatch.setattr(common, "take_turns", timed)
    if not quick:  # what is not timed need not be there
        monkeypatch.setattr(common.torch, "ones", lambda *shape: torch.empty(0))
    found = common.ceilings(quick)
    assert found == {"copy_bytes_per_second": 2 * 4 * n / 0.25, "matmul_flop_per_second": 2 * edge**3 / 2.0}
    assert asked == [(5, "cpu")]


def test_every_command_is_in_the_help_and_has_its_own(capsys):
    for argv in ([], *([name] for name in FROM_RESULTS)):
        with pytest.raises(SystemExit) as stopped:
            main([*argv, "--help"])
        told = capsys.readouterr().out
        assert stopped.value.code == 0 and f"bench {' '.join(argv)}".strip() in told
        if not argv:
            assert all(f"\n    {name} " in told for name in (*OPTIONS, *FROM_RESULTS))


@pytest.mark.parametrize("name", [*OPTIONS, *FROM_RESULTS])
def test_every_option_of_a_bench_says_what_it_is(monkeypatch, name):
    """Several had a number as their help, or nothing."""
    made = []

    def helped(parser, *_):
        made.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", helped)
    with pytest.raises(SystemExit):
        main([name, "--help"])
    options = {a.dest: a.help or "" for a in made[0]._actions if a.help != argparse.SUPPRESS}
    assert [dest for dest, text in options.items() if not re.search("[a-z]{2}", text)] == []


def test_a_reader_that_goes_away_ends_a_bench_in_silence():
    """`python -m bench roofline | head` ended with a traceback."""
    words = [sys.executable, "-m", "bench", "project", *["1"] * 9999]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(common.__file__).parents[1])
    job.stdout.close()
    assert job.stderr.read() == b"" and job.wait(300) == 0


def test_peak_memory_sees_what_is_allocated_and_given_back():
    size = 80 * 2**20

    def side() -> list:
        torch.ones(size // 4).sum()
        return []

    case = common.Case("memory", {}, lambda: {"ours": side, "less": lambda: []}, 0.0)
    torch.ones(2 * size // 4).sum()  # an earlier, larger peak of the process does not count
    assert 0.9 * size <= common.peak_of(case, "ours", "cpu") <= 1.5 * size  # found: 1
    assert common.peak_of(case, "less", "cpu") <= 0.1 * size  # found: 0


def test_peak_memory_comes_from_a_process_of_its_own():
    args = parse(["data", "--quick", "--threads", "1", "--shape", "64", "64", "64", "--patch", "32", "--batch", "32"])
    name = next(case.name for case in data.cases(args) if case.name.startswith("patch gather"))
    batch_bytes = 32 * 3 * 32**3 * 4
    assert common.peak_in_child(name, "fastsrgan", args) >= batch_bytes


def test_texture_is_a_head_and_the_same_each_time():
    image = common.texture((20, 24, 22))
    assert image.dtype == np.float32 and image.max() == 1 and image.min() == 0
    assert image[0].max() == 0 and image[10, 12, 11] > 0.1  # found: 0.69
    assert np.array_equal(image, common.texture((20, 24, 22)))


def test_wrong_requests_end_with_one_line(capsys):
    assert main(["data", "--quick", "--threads", "1", "--only", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    for argv in (
        ["data", "--repeats", "-1"],
        ["data", "--repeats", "0"],
        ["data", "--threads", "0"],
        ["data", "--quick", "--plot", "x.png"],
        ["step", "--shape", "1", "2", "3"],
        ["layers", "--quick", "--patch", "18"],
        ["kernels", "--quick", "--patch", "49"],
        ["data", "--quick", "--shape", "64", "8", "64"],
        ["infer", "--quick", "--plot", "x.pdg"],
        ["report", "more"],
        ["nothing"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
    if not torch.cuda.is_available():
        assert main(["step", "--quick", "--threads", "1", "--device", "cuda"]) == 5
        assert "CUDA" in capsys.readouterr().err
    assert main(["step", "--quick", "--threads", "1", "--patch", "18"]) == 4
    assert "multiple of 4" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(capsys, monkeypatch, tmp_path, option):
    """An hour of figures was lost with it."""
    monkeypatch.setattr(common, "prepare", lambda args: pytest.fail("measured"))
    place = tmp_path / "missing" / "x.png"
    assert main(["infer", "--quick", option, str(place)]) == 5
    assert capsys.readouterr().err.startswith(f"error: {place}: its folder is missing")


# --- the plain side -----------------------------------------------------------------------------------------------


def test_naive_networks_are_the_papers(monkeypatch):
    generator = Generator(GeneratorSpec(kernel=2), "reference", seed=1).double()
    plain = naive.NaiveGenerator(2).double()
    naive.copy(plain.paired(generator))
    x = torch.rand(2, 1, 16, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    # The stock norm's epsilon is inside the root.
    assert torch.allclose(plain(x), generator(x), atol=5e-6)  # found: 1e-6
    for patch in (16, 20, 24, 36):
        critic = Critic(CriticSpec(kernel=2, patch=patch), seed=2).double()
        own = naive.NaiveCritic(2, patch).double()
        with torch.no_grad():
            for bias in critic.biases:
                bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
        naive.copy(own.paired(critic))
        y = torch.rand(2, 2, patch, patch, patch, dtype=torch.double, generator=torch.Generator().manual_seed(patch))
        assert torch.allclose(own(y), critic(y), rtol=1e-12, atol=1e-14)  # found: 0 of it


class ExactNorm(torch.nn.Module):
    """Epsilon outside the root, as in fastsrgan; the stock module differs by 1e-7, which Adam's first steps blow up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = x.mean((2, 3, 4), keepdim=True), x.std((2, 3, 4), unbiased=False, keepdim=True)
        scale, shift = (p.view(1, -1, 1, 1, 1) for p in (self.weight, self.bias))
        return (x - mean) / (std + 1e-7) * scale + shift


@pytest.mark.parametrize(
    ("row", "calls"), [("forward + backward", 1), ("critic update", 1), ("generator update", 1), ("iteration", 2)]
)
def test_in_float64_the_training_loop_is_the_naive_one(monkeypatch, row, calls):
    monkeypatch.setattr(naive, "norm", ExactNorm)
    gather, models, build = pool.Pool.gather, step.models, step.build_generator

    def gather_double(self, indices):
        batch = gather(self, indices)
        batch.x, batch.y = batch.x.double(), batch.y.double()
        return batch

    def models_double(*args):
        made = models(*args)
        made.generator.double(), made.critic.double()
        made.finish()
        return made

    monkeypatch.setattr(pool.Pool, "gather", gather_double)
    monkeypatch.setattr(step, "models", models_double)
    monkeypatch.setattr(step, "build_generator", lambda *a: build(*a).double())
    for network in (naive.NaiveGenerator, naive.NaiveCritic):
        monkeypatch.setattr(naive, network.__name__, lambda *a, made=network: made(*a).double())
    case = next(c for c in step.cases(parse(["step", "--quick", *SMALL["step"]])) if row in c.name)
    sides = case.build()
    for _ in range(calls):
        ours, *peers = ([torch.as_tensor(a).clone() for a in call()] for call in sides.values())
        assert all(common.largest_difference(ours, peer) < 5e-12 for peer in peers)  # found: 1.3e-12


@pytest.mark.parametrize("build", [lambda: naive.NaiveGenerator(4), lambda: naive.NaiveCritic(4, 16)])
def test_channels_last_is_another_order_of_the_same_numbers(build):
    plain, last = build().double(), build().double()
    last.load_state_dict(plain.state_dict())
    naive.channels_last(last)
    seen = []
    last.body.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    channels = next(plain.parameters()).shape[1]
    x = torch.rand(1, channels, 16, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(last(x), plain(x), atol=1e-9)  # found: 0
    order = {"memory_format": torch.channels_last_3d}
    assert seen[0].is_contiguous(**order) and all(p.is_contiguous(**order) for p in last.parameters() if p.dim() == 5)
    assert not all(p.is_contiguous(**order) for p in plain.parameters() if p.dim() == 5)


def test_the_plain_generator_update_makes_no_gradients_of_the_critic():
    trainer = naive.NaiveTrainer(naive.NaiveGenerator(2), naive.NaiveCritic(2, 16), 1e-3, (0.5, 0.999))
    trainer.generator_update(torch.rand(1, 1, 16, 16, 16), torch.rand(1, 2, 16, 16, 16))
    assert all(p.grad is None and p.requires_grad for p in trainer.critic.parameters())
    assert all(p.grad is not None for p in trainer.generator.parameters())


def test_rounding_is_not_compared_but_every_real_gradient_is():
    a, b, c = torch.tensor([1.0, 0.0]), torch.tensor([1e-9, 0.0]), torch.tensor([1e-5, 0.0])
    assert [float(g.sum()) for g in step.gradients([a, b, c])] == [1.0, 0.0, pytest.approx(1e-5)]


def test_matrices_are_forgotten():
    data.degrade(common.texture((12, 12, 12)), (1, 1, 1), (1, 1, 3))
    assert data.resample.spline_matrix.cache_info().currsize
    data.forget_matrices()
    assert not data.resample.spline_matrix.cache_info().currsize
    assert not data.resample.slice_profile_matrix.cache_info().currsize
