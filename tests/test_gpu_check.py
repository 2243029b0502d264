"""tools/gpu_check.py: what it says without a GPU, and that its checks find what is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_host import Host

from fastsrgan.core import kernels as backend
from tools import gpu_check, gpu_parts

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Host:
    return Host(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def host(compiled, monkeypatch) -> Host:
    """Kernels run on CPU tensors, so that the checks for a GPU have something to check."""
    monkeypatch.delenv("FASTSRGAN_REFERENCE", raising=False)
    monkeypatch.setitem(backend.RUNNERS, "cpu", compiled)
    return compiled


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_and_runs_what_a_cpu_can(tmp_path):
    target = tmp_path / "found" / "gpu_check.json"
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), "--only", "kernels", "infer", "--json", str(target)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("no CUDA device here") and " 0 FAILED" in last
    report = json.loads(target.read_text())
    assert report["device"] == "cpu"
    assert [c["passed"] for c in report["parts"]["kernels"]] == [None]
    assert report["parts"]["infer"] and all(c["passed"] for c in report["parts"]["infer"])


BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"zarr", "numcodecs", "nibabel", "nilearn", "cupy", "tensorstore"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name.startswith("nvidia.dali"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_machine_without_the_optional_packages_runs_the_rest(tmp_path):
    """What is missing is told as not run; nothing fails for it."""
    (tmp_path / "sitecustomize.py").write_text(BARE, encoding="utf8")
    target = tmp_path / "gpu_check.json"
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), "--only", "kernels", "infer", "feed", "step"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json", str(target)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(target.read_text())["parts"]
    assert not [c for checks in parts.values() for c in checks if c["passed"] is False]
    assert any(c["passed"] for c in parts["infer"]) and any(c["passed"] for c in parts["step"])


def found(part: str, context: gpu_parts.Context) -> list[gpu_parts.Check]:
    return gpu_check.run_part(part, context)


def test_the_kernel_checks_pass_on_the_kernels_text(host):
    checks = found("kernels", gpu_parts.Context(CPU, 200.0, inside_sanitizer=True))
    assert {c.name.replace(",", "").split()[0] for c in checks} == {"overlap_add", "gather_tiles", "gather_patches"}
    assert len(checks) > 20 and all(c.passed for c in checks), [c for c in checks if not c.passed]
    assert {name for name, _ in host.ran} == set(backend.OPS)


@pytest.mark.parametrize("name", sorted(backend.OPS))
def test_the_kernel_checks_find_a_wrong_kernel(host, monkeypatch, name):
    run = backend.RUNNERS["cpu"]

    def wrong(kernel, grid, args, defines):
        run(kernel, grid, args, defines)
        if kernel == name:
            written = next(a for a in args if isinstance(a, torch.Tensor))
            written[(0,) * written.ndim] += 1

    monkeypatch.setitem(backend.RUNNERS, "cpu", wrong)
    checks = found("kernels", gpu_parts.Context(CPU, 200.0, inside_sanitizer=True))
    assert {c.name.replace(",", "").split()[0] for c in checks if not c.passed} == {name}


def test_what_raises_is_a_finding_and_a_missing_package_is_not_run(monkeypatch):
    def explodes(context):
        yield gpu_parts.Check("first", True)
        raise RuntimeError("cuDNN error")

    def lacks(context):
        yield gpu_parts.Check("first", True)
        raise ModuleNotFoundError("No module named 'zarr'")

    monkeypatch.setitem(gpu_parts.PARTS, "explodes", explodes)
    monkeypatch.setitem(gpu_parts.PARTS, "lacks", lacks)
    context = gpu_parts.Context(CPU, 60.0)
    assert [c.passed for c in found("explodes", context)] == [True, False]
    assert [c.passed for c in found("lacks", context)] == [True, None]
    assert "zarr" in found("lacks", context)[1].facts["reason"]


def test_a_whole_report_goes_into_the_json_and_not_onto_the_line(monkeypatch, capsys):
    made = gpu_parts.Check("bench x", True, {"command": "bench x", "report": {"rows": [1]}})
    monkeypatch.setitem(gpu_parts.PARTS, "bench", lambda context: iter([made]))
    (check,) = found("bench", gpu_parts.Context(CPU, 60.0))
    told = capsys.readouterr().out
    assert "command bench x" in told and "rows" not in told
    assert check.facts["report"] == {"rows": [1]}


def test_a_part_stops_when_its_time_is_up():
    def slow(context):
        for i in range(100):
            yield gpu_parts.Check(str(i), True)

    gpu_parts.PARTS["slow"] = slow
    try:
        checks = found("slow", gpu_parts.Context(CPU, 0.0))
    finally:
        del gpu_parts.PARTS["slow"]
    assert [c.passed for c in checks] == [True, None]
