"""The checks of tools/gpu_check.py: each part yields what it found, one check at a time."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core import kernels as backend
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.infer import stitch, sweep, tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.values import WINDOWS
from fastsrgan.model.arithmetic import TYPES
from fastsrgan.model.networks import GeneratorSpec, build_generator

ROOT = Path(__file__).resolve().parent.parent
SUM_TOLERANCE = 1e-6  # of the largest value: torch's addcmul may round twice where the kernel rounds once


@dataclass
class Check:
    """One finding. passed : None where it was not run, with ``facts["reason"]``."""

    name: str
    passed: bool | None
    facts: dict[str, Any] = field(default_factory=dict)


class Step(NamedTuple):
    """A check that is made when its turn comes; what it raises is no end of the others."""

    name: str
    call: Callable[[], Check]


Part = Callable[["Context"], Iterator["Check | Step"]]


@dataclass
class Context:
    """Where the checks run; ``budget``: seconds for all of them, ``deadline``: end of the part that runs."""

    device: torch.device
    budget: float
    deadline: float = 0.0
    inside_sanitizer: bool = False

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to check."""
        return self.device.type == "cuda"

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


# --- kernels ------------------------------------------------------------------------------------------------------


def kernels(c: Context) -> Iterator[Check | Step]:
    """Every kernel against its reference: odd sizes, all types, poisoned outputs, the same bits again."""
    if not backend.runs_kernels(c.device):
        yield Check("kernels", None, {"reason": "not run: needs a CUDA device and CuPy"})
        return
    for name, seed in itertools.product(sorted(backend.OPS), range(1 if c.inside_sanitizer else 4)):
        yield Step(f"{name}, example {seed}", functools.partial(_parity, c, name, seed))
    yield from _overlap_add(c)
    yield from _gathers(c)
    if not c.inside_sanitizer:
        yield Step("compute-sanitizer", functools.partial(_sanitizer, c))


def _parity(c: Context, name: str, seed: int) -> Check:
    """``standard_normal`` is NumPy's on the host, so this is also the check that noise has the same bits everywhere."""
    operation = backend.OPS[name]
    expected = _tensors(operation.body(*operation.example(seed, c.device)))
    runs = [_tensors(operation.launch(*operation.example(seed, c.device))) for _ in range(3)]
    c.sync()
    error = max(_difference(a, b) for a, b in zip(runs[0], expected, strict=True))
    again = all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    facts = {"error": error, "repeats": again}
    return Check(f"{name}, example {seed}", error <= operation.rtol and again, facts)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    assert result is not NotImplemented
    return result if isinstance(result, tuple) else (result,)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| over the largest |b|; infinite where a is not finite."""
    if not bool(a.isfinite().all()):
        return float("inf")
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


SMALL = (((19, 15, 22), (8, 12, 12), (5, 4, 7)), ((11, 11, 11), 12, 12))  # shape, patch, step
LARGE = (((95, 71, 82), (32, 24, 40), (10, 8, 7)), ((64, 64, 64), 64, 64), ((47, 64, 43), 32, (5, 16, 1)))


def _overlap_add(c: Context) -> Iterator[Step]:
    plans = LARGE if c.cuda and not c.inside_sanitizer else SMALL
    for (shape, patch, step), (kind, dtype), window in itertools.product(plans, TYPES.items(), WINDOWS):
        plan = tiles.plan(shape, patch, step, window=window)
        name = f"overlap_add {kind} {window} {'x'.join(map(str, shape))}"
        yield Step(name, functools.partial(_overlap, c, name, plan, dtype))


def _overlap(c: Context, name: str, plan: tiles.TilePlan, dtype: torch.dtype) -> Check:
    draw = torch.Generator().manual_seed(0)
    some = torch.randn(len(plan), 2, *plan.patch, generator=draw).to(dtype)
    expected = stitch.overlap_add(some, plan)
    here = some.to(c.device)
    runs = [_in_batches(here, plan, size) for size in (len(plan), 7, 3)]
    error = _difference(runs[0], expected)
    again = all(torch.equal(runs[0], other) for other in runs[1:])
    ones = torch.ones(1, 1, 1, 1, 1, dtype=dtype, device=c.device).expand(len(plan), 2, *plan.patch)
    law = _difference(stitch.overlap_add(ones, plan), torch.ones(2, *plan.padded_shape))
    facts = {"error": error, "ones": law, "any batches, same bits": again}
    return Check(name, error <= SUM_TOLERANCE and law <= SUM_TOLERANCE and again, facts)


def _in_batches(some: Tensor, plan: tiles.TilePlan, size: int) -> Tensor:
    sums = stitch.Stitcher(plan, some.shape[1], some.device)
    for part in some.split(size):
        sums.add(part)
    return sums.result()


def _gathers(c: Context) -> Iterator[Step]:
    for kind, target in itertools.product(TYPES, TYPES):
        if "fp32" in (kind, target):
            yield Step(f"gather_tiles {kind} to {target}", functools.partial(_gather_tiles, c, kind, target))
    for kind, classes in itertools.product(TYPES, (0, 3)):
        yield Step(f"gather_patches {kind}, {classes} classes", functools.partial(_gather_patches, c, kind, classes))


def _gather_tiles(c: Context, kind: str, target: str) -> Check:
    volume = torch.from_numpy(np.random.default_rng(0).random((41, 37, 53), np.float32)).to(TYPES[kind])
    plan = tiles.plan((41, 37, 53), (16, 12, 20), (5, 7, 9))
    out, expected = (
        torch.full((len(plan), 1, *plan.patch), torch.nan, dtype=TYPES[target], device=d) for d in (c.device, "cpu")
    )
    tiles.gather(volume.to(c.device), plan, range(len(plan)), out)
    tiles.gather(volume, plan, range(len(plan)), expected)
    return Check(f"gather_tiles {kind} to {target}", torch.equal(out.cpu(), expected))


def _gather_patches(c: Context, kind: str, classes: int) -> Check:
    both = []
    for device in (c.device, torch.device("cpu")):
        pool = Pool(_residents(TYPES[kind], device), 12, mask_classes=classes)
        indices, flips = np.arange(len(pool)), np.random.default_rng(1).random((len(pool), 3)) > 0.5
        both.append(pool.gather(indices, flips))
    same = torch.equal(both[0].x.cpu(), both[1].x) and torch.equal(both[0].y.cpu(), both[1].y)
    return Check(f"gather_patches {kind}, {classes} classes", same)


def _residents(dtype: torch.dtype, device: torch.device) -> list[Resident]:
    made, some = [], np.random.default_rng(2)
    for name, shape in (("a", (21, 9, 33)), ("b", (40, 27, 18))):
        image, hr = (torch.from_numpy(some.random(shape, np.float32)).to(device, dtype) for _ in range(2))
        label, mask = (torch.from_numpy(some.integers(0, n, shape, np.uint8)).to(device) for n in (2, 4))
        made.append(Resident(name, image, hr, label, mask, 2.5, some.integers(-8, 14, (7, 3))))
    return made


def _sanitizer(c: Context) -> Check:
    """The kernels once more under NVIDIA's memory checker."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return Check("compute-sanitizer", None, {"reason": "not run: it is not installed"})
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(ROOT / "tools/gpu_check.py")]
    command += ["--only", "kernels", "--inside-sanitizer", "--device", str(c.device)]
    left = max(10.0, c.deadline - time.monotonic())
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        return Check("compute-sanitizer", None, {"reason": f"not run: not done in {left:.0f} s"})
    return Check("compute-sanitizer memcheck", done.returncode == 0, {"said": done.stdout[-300:].strip()})


# --- inference ----------------------------------------------------------------------------------------------------

# Of the image's maximum, and of the probability. fp16: 2e-4 and 0.014 were emulated for the shipped networks.
INFER_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


def infer(c: Context) -> Iterator[Check | Step]:
    """A whole volume with air: the device against the CPU in float32; in fp16 first, which "auto" takes."""
    from bench.common import texture

    volume = torch.from_numpy(texture((75, 83, 66) if c.cuda else (35, 43, 26)))
    patch, step = (64, 16) if c.cuda else (16, 8)
    plans = {window: tiles.plan(tuple(volume.shape), patch, step, window=window) for window in WINDOWS}
    cpu = build_generator(GeneratorSpec(kernel=8), seed=1).eval()
    truth = {w: sweep.predict(volume, plan, TileNetwork(cpu, 3.0))[0] for w, plan in plans.items()}

    def predict(precision: str, window: str, compiled: str = "off") -> Check:
        generator = build_generator(GeneratorSpec(kernel=8), seed=1).eval()
        network = TileNetwork(generator, 3.0, c.device, precision, compiled)
        runs = [sweep.predict(volume, plans[window], network) for _ in range(2)]
        error = _difference(runs[1][0], truth[window])
        # Transposed convolutions may add in another order each time: a fact, and no condition.
        facts = {"error": error, "repeats": torch.equal(runs[0][0], runs[1][0])}
        facts["tiles/s"] = runs[1][1]["tiles_per_second"]
        how = " compiled" * (compiled == "on")
        return Check(f"predict {precision} {window}{how}", error <= INFER_TOLERANCE[precision], facts)

    precisions = ("fp16", "fp32", "bf16") if c.cuda else ("fp32",)
    for precision, window in itertools.product(precisions, WINDOWS):
        yield Step(f"predict {precision} {window}", functools.partial(predict, precision, window))
    for precision in precisions:
        if not c.cuda:
            yield Check(f"predict {precision} compiled", None, {"reason": "not run: no CUDA device"})
            continue
        # Batches span runs of tiles, between which constant ones call the same graph: its outputs may not be lost.
        call = functools.partial(predict, precision, next(iter(WINDOWS)), "on")
        yield Step(f"predict {precision} compiled", call)


# --- benchmarks ---------------------------------------------------------------------------------------------------


def bench(c: Context) -> Iterator[Check]:
    """`python -m bench`, in a short form: its gates are the checks, its rows the evidence."""
    short = {
        "step": ["--kernel", "16", "--batch", "16"],
        "kernels": ["--shape", "128", "128", "128", "--batch", "16"],
        "infer": ["--shape", "128", "128", "128", "--batch", "8", "--steps", "32", "--limit", "5"],
        "layers": ["--kernel", "16", "--batch", "16"],
        "data": ["--shape", "97", "113", "89", "--no-engine"],
    }
    for name, sizes in short.items():
        if not c.cuda:
            sizes = ["--quick"]
        device = ["--device", str(c.device)] if name != "data" else []
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "bench.json"
            command = [sys.executable, "-m", "bench", name, *sizes, *device, "--repeats", "3", "--no-memory"]
            left = max(10.0, c.deadline - time.monotonic())
            try:
                done = subprocess.run(
                    [*command, "--json", str(target)],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    timeout=left,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                yield Check(f"bench {name}", None, {"reason": f"not run: not done in {left:.0f} s"})
                continue
            if "No module named" in done.stderr:
                yield Check(f"bench {name}", None, {"reason": f"not run: {done.stderr.strip().splitlines()[-1]}"})
                continue
            report = json.loads(target.read_text()) if target.is_file() else {"said": done.stderr[-300:]}
            yield Check(f"bench {name}", done.returncode == 0, {"command": " ".join(command[1:]), "report": report})


def _training(name: str) -> Part:
    """A part of tools/gpu_training.py, which is imported when it is run: it needs more of the package."""

    def run(c: Context) -> Iterator[Check | Step]:
        module = importlib.import_module("tools.gpu_training")
        yield from getattr(module, name)(c)

    return run


# The most important first: what is cut off is lost from the end.
PARTS: dict[str, Part] = {
    "step": _training("step"),
    "infer": infer,
    "kernels": kernels,
    "compile": _training("compile_"),
    "waits": _training("waits"),
    "feed": _training("feed"),
    "ranks": _training("ranks"),
    "bench": bench,
}
