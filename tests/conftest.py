"""What every test may use: thread limits, hypothesis profiles, poisoned memory, golden files and a procedural head."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Test processes side by side would each start a thread per core. Read when NumPy and torch are first imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))  # what the caller asked for, see below
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

# Threads that wait for others would spin, and there are more of them than cores: most of the time would go there.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Which exact form of a layer is faster depends on the machine, and on what else it does: tests take the fixed ones.
os.environ["FASTSRGAN_FORMS"] = "fixed"

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from kernel_host import Host
from phantom import Phantom, head

from fastsrgan.core import kernels
from fastsrgan.volume import adapt

# What is learned on a scan takes a user some seconds each time.
adapt.STEPS, ALL_STEPS = 40, adapt.STEPS

# The clock began long ago, as on a machine that is never turned off: seconds that are told without their beginning
# taken away cannot be mistaken for short ones.
clock = time.perf_counter
time.perf_counter = lambda: clock() + 1e7

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(threads)  # by default not one: what goes wrong between threads would never be seen here

# Times say nothing on shared cores, so there are no deadlines; in CI the same examples come each time.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps of learning on a scan as a user has."""
    monkeypatch.setattr(adapt, "STEPS", ALL_STEPS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped, with the reason, where no CUDA device is seen."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each reason for which tests were skipped in one line, with their number."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(reason_of(report.longrepr) for report in reports)
    if reasons:
        terminalreporter.section(f"{len(reports)} skipped")
    for reason, count in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])):
        terminalreporter.line(f"{count:5d}  {reason}")


def reason_of(longrepr: object) -> str:
    """Why a test was skipped, from its report: (file, line, "Skipped: reason")."""
    text = longrepr[-1] if isinstance(longrepr, (tuple, list)) else str(longrepr).splitlines()[-1]
    return " ".join(str(text).removeprefix("Skipped: ").split())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from ``empty`` is NaN (or the largest integer) in NumPy and torch: a voxel left unwritten shows."""

    def poison_array(make):
        def poisoned_array(*args, **kwargs):
            array = make(*args, **kwargs)
            if np.issubdtype(array.dtype, np.inexact):
                array.fill(np.nan)
            elif np.issubdtype(array.dtype, np.integer):
                array.fill(np.iinfo(array.dtype).max)
            return array

        return poisoned_array

    def poison_tensor(make):
        def poisoned_tensor(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.detach().fill_(torch.nan).requires_grad_(tensor.requires_grad)
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return poisoned_tensor

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, poison_array(getattr(np, name)))
        monkeypatch.setattr(torch, name, poison_tensor(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison_tensor(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def log_is_heard() -> Iterator[None]:
    """A command line that ran before in this process keeps the log to itself, and ``caplog`` of an older pytest
    hears nothing then: what passes would depend on the order of the tests.
    """
    with pytest.MonkeyPatch.context() as patch:  # one of its own: tests undo theirs
        patch.setattr(logging.getLogger("fastsrgan"), "propagate", True)
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the original's own inputs, weights and outputs."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def phantom() -> Phantom:
    """A head of 40 x 48 x 36 voxels of 4 mm with its label; arrays are read-only, ``phantom.head`` makes others."""
    return head()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Host:
    """Kernels that g++ has compiled, kept for the whole session."""
    return Host(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def host(compiled, monkeypatch) -> Iterator[Host]:
    """Operations on CPU tensors run the text of the kernels."""
    monkeypatch.delenv("FASTSRGAN_REFERENCE", raising=False)
    monkeypatch.setitem(kernels.RUNNERS, "cpu", compiled)
    compiled.ran.clear()
    compiled.backwards = False
    yield compiled
    compiled.backwards = False


@pytest.fixture(scope="module")
def near_the_spline():
    """A small generator close to the interpolation, as a trained one is, so that no voxel is clipped."""
    import torch

    from fastsrgan.model.networks import GeneratorSpec, build_generator

    made = build_generator(GeneratorSpec(kernel=1), seed=6).eval()
    with torch.no_grad():
        made.head.mul_(0.01)
    return made
