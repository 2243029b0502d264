"""tools/gpu_check.py: what it says without a GPU, and that its checks find what is broken."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastsrgan.core import kernels as backend
from fastsrgan.errors import ResourceError
from tools import gpu_check, gpu_parts

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if name.startswith("nvidia.dali") or top in {
            "zarr", "numcodecs", "nibabel", "nilearn", "cupy", "tensorstore", "h5py", "yaml", "safetensors", "rich",
            "pydicom", "SimpleITK", "fsspec", "s3fs",
        }:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_machine_with_torch_numpy_and_scipy_alone_runs_what_it_can(tmp_path):
    """Everything but the benches, on the CPU: what is missing is told as not run, nothing fails for it."""
    (tmp_path / "sitecustomize.py").write_text(BARE, encoding="utf8")
    target = tmp_path / "found" / "gpu_check.json"
    parts = [name for name in gpu_parts.PARTS if name != "bench"]
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), "--only", *parts, "--json", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("no CUDA device here") and " 0 FAILED" in last
    report = json.loads(target.read_text())
    assert report["device"] == "cpu" and list(report["parts"]) == parts
    checks = {name: {c["name"]: c for c in rows} for name, rows in report["parts"].items()}
    passed = {name for name, rows in checks.items() if any(c["passed"] for c in rows.values())}
    assert passed == {"step", "infer", "feed", "ranks"}
    for name in ("kernels", "compile", "waits"):
        assert all(c["passed"] is None and c["facts"]["reason"].startswith("not run: ") for c in checks[name].values())
    assert "DALI" in checks["feed"]["DALI plain"]["facts"]["reason"]
    assert checks["step"]["losses fp32"]["facts"]["error"] < 1e-3  # found: 2.2e-5 to 1.2e-4


def test_the_order_is_that_of_importance():
    assert list(gpu_parts.PARTS) == ["step", "infer", "kernels", "compile", "waits", "feed", "ranks", "bench"]


@pytest.fixture
def parts(monkeypatch) -> dict:
    """No parts but those of a test."""
    made: dict = {}
    monkeypatch.setattr(gpu_parts, "PARTS", made)
    return made


def test_the_report_is_there_after_every_check(parts, tmp_path):
    """What is read in the middle of a run: all that is done, and the rest as cut off."""
    target, seen = tmp_path / "gpu_check.json", []

    def first(context):
        yield gpu_parts.Check("one", True)
        yield gpu_parts.Step("two", lambda: seen.append(json.loads(target.read_text())) or gpu_parts.Check("two", True))

    parts["first"] = first
    parts["second"] = lambda context: iter([gpu_parts.Check("three", True)])
    assert gpu_check.main(["--device", "cpu", "--json", str(target)]) == 0
    (middle,) = seen
    assert [c["name"] for c in middle["parts"]["first"]] == ["one"]
    assert middle["parts"]["second"][0]["facts"]["reason"] == "not run: cut off before it began"
    assert middle["count"] == {"passed": 1, "FAILED": 0, "not run": 1}
    assert json.loads(target.read_text())["count"] == {"passed": 3, "FAILED": 0, "not run": 0}


def test_a_refusal_or_an_error_of_one_check_takes_no_other_with_it(parts):
    def refuses():
        raise ResourceError("NVIDIA A100, fp32", "computes wrong convolutions", "another release")

    def explodes():
        raise RuntimeError("cuDNN error")

    def some(context):
        yield gpu_parts.Step("refused", refuses)
        yield gpu_parts.Step("explodes", explodes)
        yield gpu_parts.Step("fine", lambda: gpu_parts.Check("fine", True))

    parts["some"] = some
    checks = found("some", gpu_parts.Context(CPU, 60.0))
    assert [(c.name, c.passed) for c in checks] == [("refused", None), ("explodes", False), ("fine", True)]
    assert checks[0].facts["reason"].startswith("not run: NVIDIA A100") and "cuDNN error" in checks[1].facts["reason"]


def test_a_self_test_that_refuses_fails_and_the_step_goes_on(monkeypatch):
    from tools import gpu_training

    def refuse(arithmetic):
        raise ResourceError("cpu", "computes wrong convolutions", "x")

    monkeypatch.setattr(gpu_training.precision, "self_test", refuse)
    monkeypatch.setattr(gpu_training, "_curve", lambda c, config: (torch.ones(5, 3).numpy(), {}))
    verdicts = {c.name: c.passed for c in found("step", gpu_parts.Context(CPU, 60.0))}
    assert verdicts["self-test fp32"] is False and verdicts["losses fp32"] is True


def found(part: str, context: gpu_parts.Context) -> list[gpu_parts.Check]:
    context.deadline = context.deadline or time.monotonic() + context.budget
    return gpu_check.run_part(part, context)


def test_the_kernel_checks_pass_on_the_kernels_text(host):
    checks = found("kernels", gpu_parts.Context(CPU, 200.0, inside_sanitizer=True))
    assert {c.name.replace(",", "").split()[0] for c in checks} == set(backend.OPS)
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


WRITES = """
import json, sys, time
def note(*names):
    rows = [{"name": name, "passed": True, "facts": {}} for name in names]
    open(sys.argv[-1], "w").write(json.dumps({"parts": {"step": rows}}))
note("one")
"""
ENDS = {
    "as it should": ("note('one', 'two')", ["one", "two"], None),
    "by a crash": ("import os; os.kill(os.getpid(), 11)", ["one", "its process"], "ended with -11"),
    "never": ("time.sleep(600)", ["one", "its process"], "did not come to its end"),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_part_in_a_process_of_its_own_costs_no_other_part(monkeypatch, capsys, how):
    """After an illegal access a process can use its device no more, and a call may never return: what was found until
    then stays, and the process is one failed check."""
    monkeypatch.setattr(gpu_check, "LEAVING", 0.0)
    ending, names, reason = ENDS[how]
    seen: list[list[str]] = []
    command = [sys.executable, "-c", WRITES + ending]
    checks = gpu_check.run_alone(command, "step", 5.0, lambda done: seen.append([c.name for c in done]))
    assert [c.name for c in checks] == names and names[:1] == seen[0][:1]
    assert [c.passed for c in checks] == [True, reason is None]
    assert reason is None or (reason in checks[-1].facts["reason"] and reason in capsys.readouterr().out)


def test_on_a_gpu_each_part_is_its_own_process_and_together_they_keep_to_the_time(monkeypatch, tmp_path):
    ran: list[tuple[list[str], str, float]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(gpu_check, "machine", lambda device: {})

    def alone(command, name, seconds, tell):
        ran.append((command, name, seconds))
        tell([gpu_parts.Check("one", True)])
        return [gpu_parts.Check("one", True), gpu_parts.Check("its process", False, {"reason": "ended with -11"})]

    monkeypatch.setattr(gpu_check, "run_alone", alone)
    assert gpu_check.main(["--json", str(tmp_path / "found.json"), "--budget", "330"]) == 1
    assert [name for _, name, _ in ran] == list(gpu_parts.PARTS)
    for command, name, seconds in ran:
        options = dict(zip(command[2::2], command[3::2], strict=True))
        assert options["--only"] == name and options["--device"] == "cuda:0"
        assert float(options["--budget"]) + gpu_check.STARTING <= seconds + 0.5 <= 331
    assert ran[0][2] < 330 - 7 * gpu_check.STARTING, "each part behind it is left its start and some seconds"
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["count"] == {"passed": 8, "FAILED": 8, "not run": 0}


def test_a_whole_report_goes_into_the_json_and_not_onto_the_line(monkeypatch, capsys):
    made = gpu_parts.Check("bench x", True, {"command": "bench x", "report": {"rows": [1]}})
    monkeypatch.setitem(gpu_parts.PARTS, "bench", lambda context: iter([made]))
    (check,) = found("bench", gpu_parts.Context(CPU, 60.0))
    told = capsys.readouterr().out
    assert "command bench x" in told and "rows" not in told
    assert check.facts["report"] == {"rows": [1]}


def test_a_part_stops_when_its_time_is_up(parts):
    def slow(context):
        yield gpu_parts.Check("0", True)
        context.deadline = time.monotonic() - 1
        yield gpu_parts.Check("1", True)
        yield gpu_parts.Check("2", True)

    parts["slow"] = slow
    checks = found("slow", gpu_parts.Context(CPU, 60.0))
    assert [c.passed for c in checks] == [True, True, None]
    assert checks[-1].facts["reason"] == "not run: its share of the time is over"
