"""The choice between torch and kernels: kernel text, a CuPy that is absent, broken or there, the registry."""

from __future__ import annotations

import logging
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsrgan.core import kernels as backend
from fastsrgan.core.kernels import KernelUnavailable, Op


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing remembered from the process, nothing left behind."""
    monkeypatch.delenv("FASTSRGAN_REFERENCE", raising=False)
    caches = (backend._cupy_problem, backend._compiled, backend._say_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


class FakeCupy(types.ModuleType):
    """What backend uses of CuPy, on the CPU; records compilations, launches and the streams they were queued on."""

    def __init__(self, devices: int = 1, fails: Exception | None = None) -> None:
        super().__init__("cupy")
        self.device, self.stream = 0, None
        self.compiled: list[tuple[int, str, tuple[str, ...]]] = []
        self.launched: list[tuple] = []
        fake = self

        class Device:
            def __init__(self, index: int | None = None) -> None:
                self.id = fake.device if index is None else index

            def __enter__(self):
                self.before, fake.device = fake.device, self.id

            def __exit__(self, *_):
                fake.device = self.before

        class Stream:
            def __init__(self, stream) -> None:
                self.stream, self.device = stream, fake.device  # CuPy asks for the current device

            from_external = classmethod(lambda cls, stream: cls(stream))

            def __enter__(self):
                assert self.device == fake.device, "the stream of another device than the current one"
                fake.stream = self.stream

            def __exit__(self, *_):
                fake.stream = None

        def compile_module(code, options, backend):
            def get_function(name):
                if fails is not None:
                    raise fails
                assert f"{name}(" in code and backend == "nvrtc"
                fake.compiled.append((fake.device, name, options))
                return lambda *call: fake.launched.append((name, fake.device, fake.stream, *call))

            return types.SimpleNamespace(get_function=get_function)

        runtime = types.SimpleNamespace(getDeviceCount=lambda: devices)
        self.cuda = types.SimpleNamespace(Device=Device, Stream=Stream, runtime=runtime)
        self.RawModule = compile_module


@pytest.fixture
def cupy(monkeypatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


# --- text ---------------------------------------------------------------------------------------------------------


def test_text_comes_whole_from_the_source_tree():
    for name in ("overlap_add", "gather_tiles", "gather_patches"):
        text = backend.kernel_source(name)
        assert f"{name}(" in text and "struct bf16" in text and "#include" not in text


def test_text_inside_a_wheel_is_preferred(monkeypatch, tmp_path):
    """As hatch lays a wheel out: fastsrgan/kernels."""
    shutil.copytree(backend.KERNEL_FOLDERS[1], tmp_path / "kernels")
    (tmp_path / "kernels" / "own.cu").write_text('a\n#include "scalar.cuh"\nb\n')
    monkeypatch.setattr(backend, "KERNEL_FOLDERS", [tmp_path / "kernels", Path("nowhere")])
    lines = backend.kernel_source("own").splitlines()
    assert lines[0] == "a" and lines[-1] == "b" and "typedef float f32;" in lines


def test_missing_text_is_no_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "KERNEL_FOLDERS", [tmp_path])
    with pytest.raises(KernelUnavailable, match=r"kernels/overlap_add.cu is not part of this installation"):
        backend.kernel_source("overlap_add")


def test_defines_become_options_in_a_fixed_order():
    assert backend.define_options({"TILE": "f16", "A": 1}) == (*backend.OPTIONS, "-DA=1", "-DBLOCK=256", "-DTILE=f16")
    assert "--fmad=false" in backend.OPTIONS


# --- CuPy ---------------------------------------------------------------------------------------------------------


def test_cupy_that_sees_a_device_is_available(cupy):
    assert backend.cupy_available() and backend.runs_kernels(torch.device("cuda", 0))
    assert not backend.runs_kernels(torch.device("cpu"))


def broken_cupy() -> dict[str, types.ModuleType | None]:
    no_driver = FakeCupy()

    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient\nand more")

    no_driver.cuda.runtime.getDeviceCount = fail
    return {
        "absent": None,
        "no device": FakeCupy(devices=0),
        "an empty folder of that name": types.ModuleType("cupy"),
        "no driver": no_driver,
    }


@pytest.mark.parametrize("case", broken_cupy())
def test_cupy_that_cannot_be_used_costs_one_line(monkeypatch, caplog, case):
    monkeypatch.setitem(sys.modules, "cupy", broken_cupy()[case])
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        for _ in range(3):
            assert not backend.cupy_available() and not backend.runs_kernels(torch.device("cuda", 0))
    assert len(caplog.messages) == 1 and "slower" in caplog.messages[0] and "\n" not in caplog.messages[0]


def test_an_import_that_raises_anything_is_survived(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise SystemError('initialization of core failed')")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert not backend.cupy_available() and "core failed" in str(backend._cupy_problem())


def test_a_kernel_is_compiled_once_per_device_and_defines(cupy):
    first = backend.kernel("overlap_add", TILE="f16")
    assert backend.kernel("overlap_add", TILE="f16") is first and len(cupy.compiled) == 1
    assert backend.kernel("overlap_add", TILE="f32") is not first
    with cupy.cuda.Device(1):
        assert backend.kernel("overlap_add", TILE="f16") is not first
    assert [(device, options[-1]) for device, _, options in cupy.compiled] == [
        (0, "-DTILE=f16"),
        (0, "-DTILE=f32"),
        (1, "-DTILE=f16"),
    ]


def test_compiler_errors_make_a_kernel_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(fails=OSError("libnvrtc.so.13: cannot open shared object file")))
    with pytest.raises(KernelUnavailable, match="overlap_add cannot be compiled: OSError: libnvrtc"):
        backend.kernel("overlap_add", TILE="f32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64])
def test_a_kernel_gets_the_address_of_a_tensor(cupy, monkeypatch, dtype):
    """Also of what autograd watches, of views, of types that NumPy does not know, and of what inference mode made."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "torch's stream")
    with torch.inference_mode(dtype == torch.uint8):
        whole = torch.arange(60).to(dtype).reshape(3, 4, 5)
    if dtype.is_floating_point:
        whole.requires_grad_()
    view = whole[1:, ::2]
    backend._run_cupy("gather_tiles", (1, 1, 1), [view, view.expand(2, 2, 2, 5)], {"SOURCE": "f32", "TARGET": "f16"})
    ((*_, args),) = cupy.launched
    assert args == (whole.data_ptr() + 20 * dtype.itemsize,) * 2 and {type(a) for a in args} == {np.int64}


def test_memory_of_two_devices_is_for_no_kernel(cupy):
    here, there = torch.ones(4), torch.ones(4, device="meta")
    with pytest.raises(AssertionError, match="memory of several devices"):
        backend.launch("gather_tiles", (1, 1, 1), [there, 7, here], SOURCE="f32", TARGET="f16")


def test_a_launch_goes_to_the_tensors_device_and_torchs_stream(cupy, monkeypatch):
    asked = []

    def current_stream(device):
        asked.append(device)
        return "torch's stream"

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(backend, "_device", lambda _: torch.device("cuda", 3))
    backend.launch("gather_tiles", (257, 70000, 2), [some := torch.ones(4), 7, None], SOURCE="f32", TARGET="f16")
    ((name, device, stream, grid, block, args),) = cupy.launched  # from a thread whose current device is the first
    assert (name, device, stream) == ("gather_tiles", 3, "torch's stream") and asked == [torch.device("cuda", 3)]
    assert grid == (2, 65535, 2) and block == (backend.BLOCK, 1, 1)
    assert args == (some.data_ptr(), 7, 0)
    assert cupy.device == 0


def test_nothing_to_do_launches_nothing(cupy):
    backend.launch("gather_tiles", (0, 5, 5), [torch.ones(1)], SOURCE="f32", TARGET="f32")
    assert not cupy.compiled and not cupy.launched


# --- the registry -------------------------------------------------------------------------------------------------


@pytest.fixture
def doubled(monkeypatch) -> Op:
    """An operation whose kernel can be told from its body, on a CPU that runs kernels."""
    monkeypatch.setattr(backend, "OPS", {})
    monkeypatch.setitem(backend.RUNNERS, "cpu", lambda *_: None)

    def by_kernel(x: torch.Tensor, times: int = 2) -> object:
        return "kernel" if times < 9 else NotImplemented

    @backend.op("doubled", launch=by_kernel, example=lambda seed, device: (torch.ones(1, device=device),))
    def body(x: torch.Tensor, times: int = 2) -> object:
        """What it does."""
        return "body"

    return body


def test_an_operation_is_registered_and_keeps_its_documentation(doubled):
    assert {"doubled": doubled} == backend.OPS and doubled.__doc__ == "What it does."
    with pytest.raises(AssertionError, match="two operations"):
        backend.op("doubled", launch=doubled.launch, example=doubled.example)(doubled.body)


def test_the_device_chooses(doubled, monkeypatch):
    assert doubled(torch.ones(2)) == "kernel" and doubled(torch.ones(2), times=3) == "kernel"
    assert doubled(torch.ones(2, device="meta")) == "body"
    monkeypatch.delitem(backend.RUNNERS, "cpu")
    assert doubled(torch.ones(2)) == "body"


def test_arguments_that_the_kernel_declines_go_to_the_body(doubled):
    assert doubled(torch.ones(2), 9) == "body" and doubled(torch.ones(2), 2) == "kernel"


@pytest.mark.parametrize(("value", "result"), [("1", "body"), ("yes", "body"), ("0", "kernel"), ("", "kernel")])
def test_the_reference_can_be_asked_for(doubled, monkeypatch, caplog, value, result):
    monkeypatch.setenv("FASTSRGAN_REFERENCE", value)
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert [doubled(torch.ones(2)) for _ in range(2)] == [result] * 2
    assert len(caplog.messages) == (result == "body")


def test_a_kernel_that_cannot_be_had_is_given_up_once(doubled, caplog):
    tries = []

    def unavailable(*_):
        tries.append(1)
        raise KernelUnavailable("doubled cannot be compiled: no NVRTC")

    doubled.launch = unavailable
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert [doubled(torch.ones(2)) for _ in range(3)] == ["body"] * 3
    assert len(tries) == 1 and len(caplog.messages) == 1 and "no NVRTC" in caplog.messages[0]


def test_errors_of_a_launch_are_not_hidden(doubled):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    doubled.launch = broken
    with pytest.raises(RuntimeError, match="illegal memory access"):
        doubled(torch.ones(2))
