"""The doctor says what is there, survives whatever is broken, and keeps off the network."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

from fastsrgan import doctor
from fastsrgan.cli.main import main


@pytest.fixture(scope="module")
def facts() -> dict:
    return doctor.diagnose()


def install(folder: Path, distribution: str, module: str, source: str) -> None:
    """A fake distribution with one module, as pip would leave it."""
    info = folder / f"{distribution.replace('-', '_')}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.9\n")
    (folder / f"{module}.py").write_text(source)


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder that this process and its children import from first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def test_the_report_is_plain_values_and_single_lines(facts):
    assert json.loads(json.dumps(facts)) == facts
    lines = doctor.describe(facts)
    assert all(isinstance(line, str) and "\n" not in line for line in lines)
    for text in facts["warnings"]:
        assert f"warning: {text}" in lines
    for what in ("training", "inference", "stitching", "data feed"):
        assert any(f"{what}: {facts['plan'][what]}" in line for line in lines)


def test_the_facts_are_this_machine(facts):
    assert facts["packages"]["torch"].startswith("2.") and None not in facts["packages"].values()
    assert 0 < facts["cpu"]["usable"] <= facts["cpu"]["count"] and facts["cpu"]["torch_threads"] >= 1
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    shipped = Path(doctor.__file__).parent / "models"
    assert [w["name"] for w in facts["weights"]] == sorted(p.name for p in shipped.glob("*.safetensors"))


@pytest.mark.fault(43)
def test_the_network_is_never_touched(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    doctor.describe(doctor.diagnose())


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("program", "answer", "problem"),
    [
        ("print('chatter'); print('[1, 2]')", [1, 2], None),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", None, "crashed with SIGSEGV"),
        ("raise ImportError('libcudart.so.13: cannot open')", None, "ImportError: libcudart.so.13: cannot open"),
        ("raise SystemExit(3)", None, "ended with 3"),
        ("print('not JSON')", None, "unexpected answer 'not JSON'"),
        ("pass", None, "unexpected answer ''"),
    ],
)
def test_a_probe_survives_what_it_tries(program, answer, problem):
    assert doctor.probe(program) == (answer, problem)


def test_a_probe_that_hangs_is_given_up():
    assert doctor.probe("import time; time.sleep(60)", seconds=0.5) == (None, "no answer after 0.5 s")


def test_a_broken_package_is_a_warning(site):
    install(site, "cupy-cuda13x", "cupy", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    found = doctor.diagnose()
    assert found["optional"]["cupy"]["problem"] == "crashed with SIGSEGV"
    assert found["optional"]["cupy"]["sees_device"] is False
    assert "cupy 9.9 is installed but unusable: crashed with SIGSEGV" in found["warnings"]


def test_a_package_that_works_is_named_with_its_version(site):
    install(site, "tensorstore", "tensorstore", "")
    found = doctor.diagnose()
    assert any("tensorstore: 9.9 - " in line for line in doctor.describe(found))


def test_both_cuda_extras_at_once_are_a_warning(site):
    install(site, "cupy-cuda13x", "cupy", "raise ImportError('no libcuda.so.1')")
    install(site, "nvidia-dali-cuda120", "unused", "")
    text = "\n".join(doctor.diagnose()["warnings"])
    # The tests' own environment may hold DALI too.
    assert "extras cuda12 and cuda13 are both installed (cupy-cuda13x, nvidia-dali-cuda120" in text


def gpu(facts: dict, **changes) -> dict:
    return {
        **facts,
        "gpu": {"driver": None, "torch_cuda": None, "cudnn": 91500, "devices": [], "problem": None, **changes},
    }


def test_with_a_device_the_work_goes_there(facts, monkeypatch):
    monkeypatch.delenv("FASTSRGAN_REFERENCE", raising=False)
    device = {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30, "capability": "9.0", "problem": None}
    found = gpu(facts, driver="580.65.06", torch_cuda="13.0", devices=[device])
    found["optional"] = {**found["optional"], "cupy": {**found["optional"]["cupy"], "sees_device": False}}
    plan = doctor.plan(found)
    assert plan["inference"] == "fp16 on cuda (NVIDIA H100)"
    assert "cuda" in plan["training"] and "cuda" in plan["stitching"]
    assert plan["stitching"].endswith("by plain torch")
    with_cupy = {**found["optional"], "cupy": {**found["optional"]["cupy"], "sees_device": True}}
    assert doctor.plan({**found, "optional": with_cupy})["stitching"].endswith("by CUDA kernels")
    lines = doctor.describe({**found, "plan": plan, "warnings": doctor.warnings(found)})
    assert any("cuda:0 NVIDIA H100, 80 GiB, capability 9.0" in line for line in lines)
    assert not any("driver" in w for w in doctor.warnings(found))
    assert any("cuDNN 9.10.2" in w and "9.15" in w for w in doctor.warnings(gpu(facts, devices=[device], cudnn=91002)))


@pytest.mark.fault(42)
@pytest.mark.parametrize("broken", [[1], [0], [0, 1, 2]])
def test_a_gpu_that_is_broken_hides_no_other(facts, monkeypatch, broken):
    """One that fails, crashes its process or hangs has its line with the reason; the others are told as they are."""
    asked = []

    def probe(program):
        if "device_count" in program:
            return {"count": 3, "cudnn": 91500}, None
        number = int(re.search(r"cuda:(\d)", program)[1])
        assert f"get_device_properties({number})" in program
        asked.append(number)
        sizes = {"name": f"GPU {number}", "memory_bytes": 2**30, "capability": "9.0"}
        return (None, "crashed with SIGBUS") if number in broken else (sizes, None)

    monkeypatch.setattr(doctor, "probe", probe)
    monkeypatch.setattr(doctor.torch.version, "cuda", "13.0")
    found = facts | {"gpu": doctor._gpu()}
    assert sorted(asked) == [0, 1, 2]
    plan, told = doctor.plan(found), doctor.warnings(found)
    lines = [line.strip() for line in doctor.describe(found | {"plan": plan, "warnings": told})]
    for number in range(3):
        good, bad = f"cuda:{number} GPU {number}, 1 GiB, capability 9.0", f"cuda:{number} cannot be used: crashed"
        assert any(line.startswith(bad if number in broken else good) for line in lines)
        hint = {1: "--device cuda:0", 0: "--device cuda:1"}[broken[0]] if len(broken) == 1 else "--device cpu"
        assert (f"{bad} with SIGBUS ({hint})" in told) == (number in broken)
    assert all(("cannot be used" in how) == (0 in broken) for how in plan.values()), "auto takes the first"


@pytest.mark.fault(42)
def test_without_a_device_the_cpu_works_in_fp32(facts):
    plan = doctor.plan(gpu(facts))
    assert all("cpu" in how.lower() for how in plan.values())
    assert "fp32" in plan["inference"] and "fp32" in plan["training"]


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"driver": "580.65.06"}, "is a build for the CPU"),
        ({"driver": "550.54.15", "torch_cuda": "13.0"}, "sees no GPU"),
        ({"driver": "580.65.06", "torch_cuda": "13.0", "problem": "crashed with SIGABRT"}, "crashed with SIGABRT"),
    ],
)
def test_a_driver_that_is_not_used_is_explained(facts, changes, text):
    assert any(text in warning for warning in doctor.warnings(gpu(facts, **changes)))


@pytest.mark.fault(44)
def test_small_shared_memory_and_missing_weights_come_with_a_way_out(facts):
    found = doctor.warnings({**facts, "shm": 64 * 2**20, "weights": []})
    assert "/dev/shm has only 64 MiB: start the container with --shm-size=8g" in found
    assert any("--weights" in text for text in found)
    assert not any("/dev/shm" in text for text in doctor.warnings({**facts, "shm": 8 * 2**30}))


def test_the_driver_is_asked_for_its_release(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 580.65.06\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert doctor.driver() == "580.65.06"


def test_cores_and_memory_are_told_in_the_order_of_their_words(facts):
    some = facts | {
        "cpu": {"model": "m", "usable": 2, "count": 8, "torch_threads": 3, "bf16": True},
        "memory": {"available": 3 * 2**30, "total": 16 * 2**30},
        "weights": [{"name": "w.safetensors", "bytes": 2_500_000}],
    }
    lines = [line[12:] for line in doctor.describe(some)]
    assert "m, 2 of 8 cores, 3 threads in torch" in lines and "native bf16: yes" in lines
    assert "3 GiB free of 16 GiB" in lines and "w.safetensors (2.5 MB)" in lines


@pytest.mark.parametrize(("free", "told"), [(3.9, True), (4.1, False)])
def test_little_memory_is_less_than_four_gibibytes(facts, free, told):
    some = facts | {"memory": {"available": int(free * 2**30), "total": 2**36}}
    assert any("of memory are free" in text for text in doctor.warnings(some)) == told


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1.5), ("100000 50000", 2), ("max 100000", 3), ("", 3)])
def test_cores_are_those_of_a_containers_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(doctor, "_read", lambda path: quota or None)
    assert doctor._usable_cores() == cores


def test_memory_that_is_there_and_that_can_be_had_are_told_apart(monkeypatch):
    monkeypatch.setattr(doctor, "total_memory", lambda: 16 << 30)
    monkeypatch.setattr(doctor, "free_memory", lambda: 3 << 30)
    monkeypatch.setattr(doctor, "probe", lambda *_, **__: (None, None))
    assert doctor.diagnose()["memory"] == {"total": 16 << 30, "available": 3 << 30}


def test_an_nvidia_smi_that_fails_is_no_driver(monkeypatch, tmp_path):
    """As where its library and the kernel's module differ."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "_read", lambda path: None)
    assert doctor.driver() is None


def test_the_command_prints_its_lines_or_one_json_document(monkeypatch, capsys, facts):
    monkeypatch.setattr(doctor, "diagnose", lambda: facts)
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == "\n".join(doctor.describe(facts)) + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "50")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > len(doctor.describe(facts)), "what is wider than a terminal is broken between words"
    assert all(len(line) <= 50 or " " not in line.strip() for line in lines)
    assert all(line[: doctor.INDENT].strip() == "" for line in lines if line.startswith(" ")), "below its beginning"
