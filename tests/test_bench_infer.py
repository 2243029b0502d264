"""bench infer: the peers do the same work, a wrong result has no times, times lie apart, fit and picture."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import common, infer, infer_page, peers_infer, report
from bench.__main__ import main, parse
from bench.common import texture
from fastsrgan.infer import tiles
from fastsrgan.infer.stitch import Stitcher, overlap_add

SMALL = ["infer", "--quick", "--threads", "1", "--shape", "24", "20", "25", "--patch", "16", "--step", "10"]
SMALL += ["--steps", "14", "--kernel", "2"]
PLAIN, OWN = infer.PLAIN, infer.OWN


@pytest.fixture(autouse=True)
def as_before():
    threads, environment = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def loose(monkeypatch):
    """Instance norms over 4^3 voxels of an untrained network blow rounding up; 64^3 tiles stay within the gate."""
    monkeypatch.setattr(infer, "EXACT", 1e-4)
    known = {n: replace(p, tolerance=1e-4) for n, p in peers_infer.PEERS.items() if n != "nnU-Net style"}
    monkeypatch.setattr(peers_infer, "PEERS", known)


def bench(capsys, *more: str) -> tuple[int, dict]:
    code = main([*SMALL, *more])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


# --- peers --------------------------------------------------------------------------------------------------------


def local(x: torch.Tensor) -> torch.Tensor:
    """Two channels that depend on where a tile lies, so that tiles disagree."""
    place = torch.linspace(0, 1, x.shape[2]).view(-1, 1, 1)
    return torch.cat([x * place, x.square() - place], 1)


CASES = [((40, 29, 16), 16, (6, 10, 16)), ((21, 33, 18), 16, 4), ((24, 24, 9), (16, 16, 16), (16, 8, 16))]


@pytest.mark.parametrize(("shape", "patch", "step"), CASES)
@pytest.mark.parametrize("window", ["constant", "gaussian"])
@pytest.mark.parametrize("name", list(peers_infer.PEERS))
def test_every_peer_gives_the_float64_sum(name, window, shape, patch, step):
    """Same tiles, same windows: from the definition in float64, within what each one's arithmetic allows."""
    peer, plan = peers_infer.PEERS[name], tiles.plan(shape, patch, step, window=window)
    if window not in peer.windows:
        pytest.skip(f"{name} does not know the {window} window")
    if why := peer.not_run(plan):
        pytest.skip(why)
    volume = torch.from_numpy(texture(shape, air=False))
    truth = peers_infer.reference(volume, plan, local, 2, window)
    out = peer.loop(volume, plan, local, 2, window)
    assert truth.dtype == torch.float64
    assert common.largest_difference([out], [truth]) <= peer.tolerance
    inner = overlap_add(local(tiles.gather(tiles.pad(volume, plan), plan, range(len(plan)))), plan)
    assert common.largest_difference([inner[(slice(None), *plan.crop)]], [truth]) <= 1e-6  # found: 2.8e-7


@pytest.mark.parametrize(("patch", "step"), [(128, 30), (64, 32), (128, 10), (8, 8), (36, 7), (64, 60)])
def test_peers_take_the_same_tiles(patch, step):
    """MONAI's overlap and TorchIO's, from the plan alone: every tile once, at its place."""
    plan = tiles.plan((140, 139, 130), patch, step)
    origins: list[tuple[int, ...]] = []
    volume = torch.arange(math.prod(plan.shape), dtype=torch.float64).view(plan.shape)

    def noting(x: torch.Tensor) -> torch.Tensor:
        for n in x[:, 0, 0, 0, 0].tolist():
            origins.append(tuple(int(v) for v in np.unravel_index(int(n), plan.shape)))
        raise StopIteration if len(origins) > 400 else _Enough

    for name in ("monai", "torchio"):
        peer = peers_infer.PEERS[name]
        if peer.not_run(plan):
            continue
        origins.clear()
        with pytest.raises((StopIteration, _Enough)):
            peer.loop(volume, plan, noting, min(len(plan), 8), "constant")
        assert origins == list(plan)[: len(origins)] and len(origins) == min(len(plan), 8)


class _Enough(Exception):
    pass


def test_half_precision_sums_are_told_apart():
    """What nnU-Net's way loses at a dense step is seen, and gets no gate of its own making."""
    plan = tiles.plan((33, 32, 32), 16, 2)
    volume = torch.from_numpy(texture(plan.shape, air=False))
    truth = peers_infer.reference(volume, plan, local, 2, "gaussian")
    out = peers_infer.nnunet_style(volume, plan, local, 2, "gaussian")
    assert out.dtype == torch.float16 and out.isfinite().all()
    assert common.largest_difference([out], [truth]) > 1e-4  # found: 0.52


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_of_every_kind(capsys, tmp_path, loose, monkeypatch):
    monkeypatch.setattr(common, "without_ratios", lambda row: None)
    code, made = bench(capsys, "--json", str(tmp_path / "infer.json"), "--plot", str(tmp_path / "infer.svg"))
    assert code == 0 and json.loads((tmp_path / "infer.json").read_text()) == made
    assert "<svg" in (tmp_path / "infer.svg").read_text()
    assert {(r["kind"], r["window"], r["step"]) for r in made["rows"]} == {
        *((kind, "constant", step) for kind in infer_page.KINDS for step in (14, 10)),
        *((kind, "gaussian", 10) for kind in infer_page.KINDS),
    }
    for row in made["rows"]:
        assert row["passed"] and row["error_to_float64"] <= row["max_error"] <= row["tolerance"]
        assert row["tiles"] == len(tiles.plan(row["shape"], row["patch"], row["step"]))
        for facts in infer_page.sides(row).values():
            assert facts["seconds_min"] <= facts["seconds_median"] <= facts["seconds_max"] and facts["repeats"] == 2
            assert facts["tiles_per_second"] == pytest.approx(row["tiles"] / facts["seconds_median"])
            assert ("outside_network" in facts) == (row["kind"] == "whole inference")
            assert 0 < facts.get("outside_network", 0.5) < 1
        if row["kind"] == "sum alone":
            assert row["of_copy_ceiling"] == row["ratio_to"][infer.CEILING] > 0
    whole = {
        r["step"]: r["peers"] for r in made["rows"] if r["kind"] == "whole inference" and r["window"] == "constant"
    }
    around = {f"{peer}, {n}" for peer in ("monai", "torchio", "original") for n in (PLAIN, OWN)}
    assert around | {f"monai, {infer.LAST}"} == {*whole[10]}
    assert list(whole[14]) == [infer.HEADLINE]
    text = infer_page.markdown(made)
    assert all(f"{kind.capitalize()}, constant, 24 x 20 x 25" in text for kind in infer_page.KINDS)
    assert text in "\n".join(report.section(tmp_path / "infer.json", made))


def test_peers_that_cannot_run_say_why():
    plan = tiles.plan((24, 20, 25), 16, 7)
    assert peers_infer.Peer(peers_infer.plain_loop, even=True).not_run(plan) == "takes even overlaps only"
    assert peers_infer.PEERS["torchio"].even
    absent = peers_infer.Peer(peers_infer.plain_loop, needs="no_such_module")
    assert absent.not_run(plan) == "pip install no_such_module"
    case = next(c for c in infer.cases(parse([*SMALL, "--step", "7"])) if "stitching alone, constant" in c.name)
    assert "torchio" in case.missing and "torchio" not in case.build()


@pytest.mark.parametrize(
    ("only", "factor"),
    [
        ("sum alone", 1.001),
        ("sum alone", math.nan),
        ("stitching alone", 1.001),
        ("stitching alone", math.nan),
        ("whole inference", 1.001),
    ],
)
def test_a_wrong_result_has_no_times_and_exit_code_1(capsys, monkeypatch, loose, factor, only):
    right = Stitcher.result
    monkeypatch.setattr(Stitcher, "result", lambda self: right(self) * factor)
    code, made = bench(capsys, "--only", f"{only}, constant")
    assert code == 1 and made["rows"]
    for row in made["rows"]:
        assert not row["passed"] and "seconds_median" not in row
        assert all("seconds_median" not in facts for facts in row["peers"].values())
    assert infer_page.markdown(made) == ""


def test_whole_inference_refuses_nan_itself(capsys, monkeypatch, loose):
    right = Stitcher.result
    monkeypatch.setattr(Stitcher, "result", lambda self: right(self) * math.nan)
    assert main([*SMALL, "--only", "whole inference, constant"]) == 4
    out, told = capsys.readouterr()
    assert not out and "NaN or infinite" in told


def test_every_side_takes_the_tiles_that_are_asked_for(monkeypatch, loose):
    """fastsrgan's whole inference too: so many in each pass."""
    found = []
    right = infer.infer_volume
    monkeypatch.setattr(infer, "infer_volume", lambda *a, **k: (found.append(k["batch"]), right(*a, **k))[1])
    for batch in (1, 3):
        args = parse([*SMALL, "--batch", str(batch)])
        case = next(c for c in infer.cases(args) if c.name.startswith("whole inference"))
        case.build()["fastsrgan"]()
    assert found == [1, 3]


def test_time_in_the_network_lies_apart():
    clock = infer.Clock("cpu")
    slow = clock(lambda x: time.sleep(0.05) or x)
    slow(torch.zeros(1)), time.sleep(0.05), slow(torch.zeros(1))
    assert clock.seconds >= 0.1  # found: 0.12
    before = clock.seconds
    time.sleep(0.01)
    assert clock.seconds == before


def test_rounds_end_when_time_is_up(monkeypatch):
    args = parse([*SMALL, "--repeats", "50", "--limit", "1"])
    case = infer.Dense("slow", {"kind": "sum alone", "tiles": 1}, lambda clock: {}, "cpu")
    spent = []
    monkeypatch.setattr(infer, "time", SimpleNamespace(perf_counter=lambda: 0.3 * len(spent)))
    turns, _ = case._rounds({"ours": lambda: spent.append(1) or []}, args)
    assert len(turns["ours"]) == len(spent) == 3  # a fourth would end behind 1.2 s


# --- page ---------------------------------------------------------------------------------------------------------


def test_the_fit_finds_what_made_the_points():
    fit = infer_page.affine_fit({s: 2.5 + 3e6 / s**3 for s in (128, 64, 30, 10)})
    assert fit is not None and fit.base == pytest.approx(2.5) and fit.scale == pytest.approx(3e6)
    assert fit.r2 == pytest.approx(1) and fit(20) == pytest.approx(2.5 + 375)
    assert infer_page.affine_fit({10: 1.0, 20: 0.5}) is None


def test_reports_of_before_have_no_tables():
    assert infer_page.markdown({"rows": [{"name": "stitching alone", "passed": True, "seconds_median": 1.0}]}) == ""
