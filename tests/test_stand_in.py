"""The whole way on a device that the package takes for a GPU (stand_in.py): nothing mixes its memory with the host's,
and what comes out is what the CPU gives."""

import functools
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cohort import SMALL, make_store, rows
from processes import on_ranks
from scipy import ndimage
from stand_in import CUDA, StandIn, stand_in

import fastsrgan
from bench.common import texture
from fastsrgan.core import ranks
from fastsrgan.errors import ResourceError
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.observation.synthesis import Synthesis, synthesise
from fastsrgan.train.run import train
from fastsrgan.volume import adapt
from tools import gpu_check, gpu_parts, gpu_training

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tools/gpu_check.py asks it")


@pytest.fixture
def cuda(tmp_path):
    """The devices, for a test."""
    with stand_in(tmp_path, devices=2) as device:
        yield device


# --- the device itself ----------------------------------------------------------------------------------------------


MIXED = {
    "a sum": lambda here, there: here + there,
    "a sum in place": lambda here, there: there.add_(here),
    "a product": lambda here, there: there @ here.T,
    "side by side": lambda here, there: torch.cat([here, there]),
    "a choice": lambda here, there: torch.where(there > 0, there, here),
    "places on the device of the host's memory": lambda here, there: here[there[0].long()],
    "a sum over two devices": lambda here, there: there + here.to("cuda:1"),
    "a mask of the host written by places of the device": lambda here, there: torch.zeros(
        4, dtype=torch.bool
    ).index_put_((there[0, :2].long(),), torch.tensor(True)),
    "a convolution": lambda here, there: torch.nn.functional.conv1d(there[None], here[:, None].reshape(1, 3, 4)),
}


@pytest.mark.parametrize("name", MIXED)
def test_memory_of_both_sides_is_refused(cuda, name):
    here = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="to be on the same device"):
        MIXED[name](here, here.to("cuda"))


@pytest.mark.parametrize("look", [lambda t: t.numpy(), np.asarray], ids=["numpy()", "asarray"])
def test_numpy_sees_none_of_the_devices_memory(cuda, look):
    there = torch.ones(3).to("cuda")
    with pytest.raises(TypeError, match="can't convert cuda"):
        look(there)
    assert look(there.cpu()).tolist() == [1, 1, 1]


def test_what_comes_of_the_devices_memory_is_the_devices(cuda):
    there = torch.ones(3, 4, device="cuda", requires_grad=True)
    views = [there[1:], there.T, there.view(-1), there.detach()]
    made = [there * 2, there.half(), torch.zeros_like(there), there.new_empty(3), there.sum(), there.to("cuda:0")]
    (there**2).sum().backward()
    assert {t.device for t in (*views, *made, there.grad)} == {CUDA}
    back = [there.cpu(), there.to("cpu"), torch.zeros_like(there, device="cpu"), torch.empty(3), torch.ones(3)[:2]]
    assert {t.device.type for t in back} == {"cpu"}


@pytest.mark.parametrize("use", [
    lambda here, there: there * torch.tensor(2.0),
    lambda here, there: there[torch.tensor([0, 2])],
    lambda here, there: there[torch.tensor([True, False, True])],
    lambda here, there: there.copy_(here),
    lambda here, there: here.copy_(there),
], ids=["a number", "places", "a mask", "to the device", "from it"])  # fmt: skip
def test_what_cuda_takes_from_the_host_is_taken(cuda, use):
    here = torch.ones(3, 4)
    assert torch.isfinite(use(here, here.to("cuda")).cpu()).all()


def test_a_kernel_gets_no_memory_of_the_host(cuda):
    from fastsrgan.core import kernels

    with pytest.raises(AssertionError, match="memory of the host"):
        kernels.RUNNERS["cuda"]("standard_normal", (1, 1, 1), [torch.ones(3)], {})


def test_afterwards_nothing_of_it_is_left(tmp_path):
    before = torch.Tensor.to, torch.Tensor.device, torch.cuda.is_available, torch.empty
    with stand_in(tmp_path):
        kept = torch.ones(3).to("cuda")
    assert (torch.Tensor.to, torch.Tensor.device, torch.cuda.is_available, torch.empty) == before
    assert kept.device.type == "cpu" and not torch.cuda.is_available()


# --- the way --------------------------------------------------------------------------------------------------------


def scan() -> np.ndarray:
    """(40, 44, 14), slices three voxels apart."""
    drawn = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 44, 14)), (2, 2, 1))
    return (100 * (drawn - drawn.min())).astype(np.float32)


ASKED = {
    "as is the default": {"flips": "x"},
    "not adapted, in views": {"adapt": "off", "flips": "none"},
    "neither adapted nor made to agree": {"adapt": "off", "agree": "off", "flips": "none"},
    "doubt": {"adapt": "off", "flips": "x", "uncertainty": True},
    "another window": {"adapt": "off", "flips": "none", "window": "gaussian"},
    "the original's geometry": {"adapt": "off", "flips": "none", "geometry": "segsrgan"},
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_result_is_the_cpus(tmp_path, asked):
    """Found: 2e-6 of the largest value and less, 5e-6 where what is learned on the scan is in it."""
    settings = {"new_resolution": (1.0, 1.0, 1.0), "patch": 32, "step": 24, "precision": "fp32", **ASKED[asked]}

    def result(device: str):
        network = build_generator(GeneratorSpec(kernel=2), seed=3).eval()
        with torch.no_grad():
            network.head.mul_(0.01)
        return fastsrgan.infer_volume(
            scan(), np.diag([1.0, 1.0, 3.0, 1.0]), network, device=device, compile="off", **settings
        )

    right = result("cpu")
    with stand_in(tmp_path) as device:
        made = result("cuda")
    assert device.seen > 100 and {name for name, _ in device.kernels.ran} >= {"gather_tiles", "overlap_add"}
    for name in ("sr", "prob", "doubt"):
        there, here = getattr(made, name), getattr(right, name)
        if here is not None:
            # The root of a small variance: found 6e-4.
            off = 2e-3 if name == "doubt" else 1e-5
            np.testing.assert_allclose(there, here, rtol=0, atol=off * np.abs(here).max())


def small(device: str) -> fastsrgan.InferResult:
    """An inference of a few tiles, four at a time."""
    network = build_generator(GeneratorSpec(kernel=2), seed=3).eval()
    settings = {"new_resolution": (1.0, 1.0, 1.0), "patch": 16, "step": 8, "precision": "fp32", "batch": 4}
    settings |= {"adapt": "off", "flips": "none", "compile": "off", "device": device}
    return fastsrgan.infer_volume(scan()[:24, :24, :8], np.diag([1.0, 1.0, 3.0, 1.0]), network, **settings)


def test_memory_that_runs_out_at_any_stage_costs_speed_or_is_one_line(tmp_path, caplog):
    """At the first piece of memory, in the self-test, where tiles are counted, in a batch of them, where sums are kept
    and at the last piece: lacking once, and from there on."""
    right = small("cpu").sr
    with stand_in(tmp_path) as device:
        small("cuda")  # afterwards the self-test is not made again
        device.taken = 0
        small("cuda")
        last, ended = device.taken, []
        for share in (0.0, 0.2, 0.6, 0.8, 1.0):
            for stays in (False, True):
                number = max(1, round(share * last))
                device.taken, device.full = 0, lambda n, a=number, s=stays: n >= a if s else n == a
                try:
                    made = small("cuda").sr
                except ResourceError as error:
                    assert str(error).startswith("cuda:0: ") and "nvidia-smi" in str(error) and "\n" not in str(error)
                    ended.append((share, stays))
                else:
                    np.testing.assert_allclose(made, right, rtol=0, atol=1e-5 * right.max())
                    assert "out of memory on cuda:0" in caplog.text
                caplog.clear()
    assert (0.8, False) not in ended and (1.0, False) not in ended and {share for share, s in ended if s} >= {0.0, 1.0}


def test_the_second_gpu_alone_is_used_where_it_is_named(tmp_path):
    """Also by the threads of the feed, which begin on the first."""
    right, store = small("cpu").sr, make_store(tmp_path)
    with stand_in(tmp_path, devices=2) as device:
        device.there.clear()
        np.testing.assert_allclose(small("cuda:1").sr, right, rtol=0, atol=1e-5 * right.max())
        config = SMALL.replace(epochs=1, steps_per_epoch=1, compile="off", noise=0.02, ema=0.5)
        for epochs in (1, 2):
            train(store, tmp_path / "run", config.replace(epochs=epochs), device="cuda:1", resume=epochs > 1)
        assert {index for _, index in device.there.values()} == {1}
        assert torch.cuda.current_device() == 1


def on_its_gpu(store: Path, run: Path) -> tuple[list[int], int, int]:
    """A training by one of the ranks of a machine with two GPUs, and another epoch of it: the GPUs that hold something,
    the current one, and the updates. By gloo, which takes tensors of the stand-in."""
    ranks.TorchRanks = functools.partial(ranks.TorchRanks, backend="gloo")  # type: ignore[misc, assignment]
    config, done = SMALL.replace(steps_per_epoch=1, compile="off"), 0
    with tempfile.TemporaryDirectory() as folder, stand_in(Path(folder), devices=2) as device:
        for epochs in (1, 2):
            done += train(store, run, config.replace(epochs=epochs), device="auto", resume=epochs > 1)["updates"]
        return sorted({index for _, index in device.there.values()}), torch.cuda.current_device(), done


def test_each_rank_has_a_gpu_and_touches_no_other(tmp_path):
    found = on_ranks(on_its_gpu, 2, make_store(tmp_path), tmp_path / "run", out=tmp_path / "out")
    assert found == [[[0], 0, 3], [[1], 1, 3]]


TRAININGS = {
    "with a critic": {},
    "a U-Net": {"network": "unet"},
    "everything drawn, resumed": {
        "flips": "xyz", "noise": 0.02, "rician": True, "bias_field": 0.3, "contrast_max": 0.5, "profile": 0.1,
        "profile_box": 1.0, "agree": True, "lambda_adv": 0.0, "ema": 0.5, "accumulate": 2, "clip_norm": 5.0,
        "epochs": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_the_cpus(tmp_path, name):
    """Found: losses and gradients differ by 1.4e-4 of their values or less, the U-Net's second penalty by 1.5e-3."""
    changes = {"epochs": 1, "steps_per_epoch": 2, "compile": "off", "pool_precision": "fp32", **TRAININGS[name]}
    store = make_store(tmp_path)

    def run(device: str) -> list[dict]:
        for epochs in range(1, changes["epochs"] + 1):
            config = SMALL.replace(**changes).replace(epochs=epochs)
            train(store, tmp_path / device, config, device=device, resume=epochs > 1)
        return rows(tmp_path / device)

    right = run("cpu")
    with stand_in(tmp_path) as device:
        made = run("cuda")
    assert device.seen > 1000 and "gather_patches" in {name for name, _ in device.kernels.ran}
    assert [r["update"] for r in made] == [r["update"] for r in right] == list(range(1, 2 * changes["epochs"] + 1))
    for there, here in zip(made, right, strict=True):
        told = [key for key in here if key[:2] in ("g_", "d_")]
        assert len(told) == (4 if "lambda_adv" in changes else 8)
        np.testing.assert_allclose([there[k] for k in told], [here[k] for k in told], rtol=3e-3, atol=1e-6)


def checked(part: str) -> dict[str, gpu_parts.Check]:
    context = gpu_parts.Context(CUDA, 300.0, inside_sanitizer=True)
    context.deadline = time.monotonic() + context.budget
    return {check.name: check for check in gpu_check.run_part(part, context)}


def test_kernels_are_their_plain_bodies_on_the_host(cuda):
    """The part of tools/gpu_check.py, in which each side runs its own form: patches beside their volume failed on the
    host, so that it could have passed on no GPU."""
    checks = checked("kernels")
    assert len(checks) > 20 and all(c.passed for c in checks.values()), [c for c in checks.values() if not c.passed]
    assert sum(name.startswith("gather_patches") for name in checks) >= 6


def test_volumes_that_threads_bring_to_the_device_are_the_hosts(cuda, monkeypatch):
    monkeypatch.setattr(gpu_training, "texture", lambda shape: texture([min(n, 64) for n in shape]))
    checks = checked("feed")
    mine = [c for name, c in checks.items() if name.startswith("threads ") and "epoch" in name]
    assert len(mine) >= 2 and all(c.passed and c.facts["on the device"] for c in mine)
    assert checks["DALI plain"].passed is None, "DALI asks the driver itself"


def test_images_are_made_of_labels_on_the_device(cuda):
    labels = np.random.default_rng(0).integers(0, 5, (12, 14, 10)).astype(np.int16)
    settings = Synthesis(strip=0.5)
    image, target = synthesise(labels, (1.0, 1.0, 1.0), (3, "a"), settings, device=CUDA)
    assert image.is_cuda and target.is_cuda and torch.isfinite(image.cpu()).all()


def test_a_mask_of_the_host_in_what_is_learned_would_be_found(tmp_path, monkeypatch):
    """The fault that stood there: places of the device indexed a mask of the host."""
    right = adapt._lines
    monkeypatch.setattr(torch, "zeros_like", lambda t, **more: torch.zeros(t.shape, dtype=t.dtype))
    with stand_in(tmp_path), pytest.raises(RuntimeError, match="same device"):
        right(torch.ones(20, 20, 4, dtype=torch.bool, device="cuda"))


def test_the_stand_in_counts_what_runs_on_it(cuda: StandIn):
    before = cuda.seen
    torch.ones(3) * 2
    assert cuda.seen == before
    torch.ones(3).to("cuda") * 2
    assert cuda.seen > before
