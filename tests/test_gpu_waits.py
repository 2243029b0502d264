"""A training iteration on a GPU that only seems to be there: nothing in it makes the host wait."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastsrgan.config import TrainConfig
from fastsrgan.core import kernels
from fastsrgan.data.pool import Patches, Pool, Resident
from fastsrgan.data.subject import PatchRule
from fastsrgan.model import arithmetic
from fastsrgan.train import gan, loop, precision
from fastsrgan.train.state import Position, Run, Turn

CUDA = torch.device("cuda", 0)
CONFIG = TrainConfig(
    new_low_res=((1.0, 1.0, 3.0),),
    kernel_gen=2,
    kernel_dis=2,
    patch_size=16,
    batch_size=4,
    critic_iterations=2,
    ema=0.5,
    clip_norm=1.0,
    head_rate=0.5,
)
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default}
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Waits(TorchDispatchMode):
    """What makes the host wait for a GPU: values that are read, and copies that are not asked to run by themselves, or
    that cannot because their host memory is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[int] = set()
        self.blocking: list[str] = []
        self.copies = 0

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place of Tensor.pin_memory, which needs a GPU."""
        copy = tensor.clone()
        self.pinned.add(id(copy))
        self.kept = [*getattr(self, "kept", []), copy]  # so that no other tensor gets its id
        return copy

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in READS:
            self.blocking.append(str(func))
        if func in COPIES:
            source, to = (args[0], out) if func is torch.ops.aten._to_copy.default else (args[1], args[0])
            self.copied(source, to, (kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2]))
        return out

    def copied(self, source: torch.Tensor, to: torch.Tensor, free: object) -> None:
        """Count a copy; ``free``: it was asked to run by itself."""
        if source.device.type != to.device.type:
            self.copies += 1
            if not free or (not source.is_cuda and id(source) not in self.pinned):
                self.blocking.append(f"{source.device} to {to.device}, non_blocking {bool(free)}")


class Event:
    """torch.cuda.Event: recorded behind queued work, waited for when values are read."""

    waited = 0

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        Event.waited += 1


class Indexing(TorchFunctionMode):
    """Square brackets and copies without a driver: torch's own ask for the device before a dispatch mode sees them."""

    def __init__(self, spy: Waits) -> None:
        super().__init__()
        self.spy = spy

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and args[0].is_cuda:
            return cut(args[0], args[1])
        if func is torch.Tensor.__setitem__ and args[0].is_cuda:
            func, args = torch.Tensor.copy_, (cut(args[0], args[1]), args[2])
            if not isinstance(args[1], torch.Tensor):
                return args[0]  # a number is written by the device itself
        if func is torch.Tensor.copy_ and args[0].is_cuda:  # there is no memory to copy
            self.spy.copied(args[1], args[0], (kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2]))
            return args[0]
        if func is torch.Tensor.__invert__:
            return torch.logical_not(*args)
        if func is torch.Tensor.contiguous and args[0].is_cuda:
            return args[0].clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def cut(tensor: torch.Tensor, index) -> torch.Tensor:
    """The view that an index of numbers, slices, None and ... means."""
    index = index if isinstance(index, tuple) else (index,)
    if ... in index:
        at, named = index.index(...), sum(i is not None and i is not ... for i in index)
        index = (*index[:at], *[slice(None)] * (tensor.ndim - named), *index[at + 1 :])
    axis = 0
    for i in index:
        if i is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(i, slice):
            start, stop, step = i.indices(tensor.shape[axis])
            assert step == 1
            tensor = tensor.narrow(axis, start, max(0, stop - start))
        else:
            tensor = tensor.select(axis, i)
            continue
        axis += 1
    return tensor


def arrange(self, network: torch.nn.Module) -> None:
    """In place of Arithmetic.arrange, since torch cannot move a module of tensors without memory."""
    for module in network.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = torch.nn.Parameter(torch.empty_like(p, device=CUDA))


@pytest.fixture
def waits(monkeypatch) -> Iterator[Waits]:
    """A device that torch takes for a GPU: tensors without memory, and the counter around every call."""
    spy = Waits()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: spy.pin(tensor))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(precision, "self_test", lambda *args, **more: {})
    monkeypatch.setattr(arithmetic.Arithmetic, "arrange", arrange)
    monkeypatch.setattr(Event, "waited", 0)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)  # a fused kernel, which has no form without memory
    monkeypatch.setattr(loop, "memory", lambda run: 0)
    with FakeTensorMode(allow_non_fake_inputs=True), Indexing(spy):
        yield spy


def residents() -> list[Resident]:
    made = []
    for name, shape in (("a", (20, 24, 22)), ("b", (18, 17, 30))):
        image = torch.empty(shape, dtype=torch.float16, device=CUDA)
        label = torch.empty(shape, dtype=torch.uint8, device=CUDA)
        origins = np.random.default_rng(0).integers(-4, 8, (8, 3))
        made.append(Resident(name, image, image, label, None, 3.0, origins))
    return made


def group(models: gan.Models, rows: list) -> tuple[Run, Turn]:
    board = types.SimpleNamespace(step=lambda epoch, update, seconds, waited, facts: rows.append((update, facts)))
    feed = types.SimpleNamespace(waited=0.0, seed=CONFIG.seed, rule=PatchRule(CONFIG.patch_size, CONFIG.stride))
    run = Run(Path(), CONFIG, None, models, feed, ["a", "b"], [], 0, log=board, position=Position())  # type: ignore[arg-type]
    return run, Turn(1, 0, 1, ["a", "b"])


@pytest.mark.parametrize("moved_by", ["kernel", "plain torch"])
def test_an_iteration_never_waits_but_for_the_values_of_the_one_before(waits, monkeypatch, moved_by):
    """17 pageable copies and two reads per iteration once stood here."""
    launched, order, rows = [], [], []
    if moved_by == "kernel":
        monkeypatch.setitem(kernels.RUNNERS, "cuda", lambda name, *rest: launched.append(name))
        monkeypatch.setattr(kernels, "cupy_available", lambda: True)
        rows_of = torch.empty((16, 10), dtype=torch.int64, device=CUDA)
        monkeypatch.setattr(Patches, "rows", rows_of)  # a tensor without memory has no address
    else:
        monkeypatch.delitem(kernels.RUNNERS, "cuda")
    models = gan.Models(CONFIG, 0, CUDA)

    # Autograd has no form without memory either; tests/test_pair.py shows that the loss and its gradient read nothing.
    def backward(total, *args) -> None:
        for p in models.generator.parameters():
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(
        models, "_generator_terms", lambda x, y, res, adversarial, *more: {"total": (x.sum() + y.sum()) * res.sum()}
    )
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    assert models.arithmetic.dtype == torch.bfloat16
    run, turn = group(models, rows)
    take_step = loop.step

    def step(*args):
        order.append("queued")
        return take_step(*args)

    def values(self) -> dict[str, float]:
        self._there.synchronize()
        order.append("read")
        return {"reconstruction": float(len(order)), "skipped": 0.0}

    monkeypatch.setattr(loop, "step", step)
    monkeypatch.setattr(gan.Means, "_values", property(values))
    monkeypatch.setattr(Pool, "steps", lambda self, batch: 3)
    with waits, torch.no_grad():
        loop.run_group(run, turn, residents(), types.SimpleNamespace(signal=None))
    assert waits.blocking == []
    # Once the group's table and resolutions; per step: indices of each batch, and eps; means of critic and generator.
    assert waits.copies == 1 + 3 * (3 + 1 + 2)
    reads = [i for i, what in enumerate(order) if what == "read"]
    queued = [i for i, what in enumerate(order) if what == "queued"]
    assert len(queued) == 3 and [u for u, _ in rows] == [1, 2, 3]
    # The values of a step are read once the next one is queued, the last ones at the end.
    assert (
        min(reads) > queued[1]
        and sum(queued[1] < r < queued[2] for r in reads) == sum(r > queued[2] for r in reads) / 2
    )
    assert launched == (["gather_patches"] * 9 if moved_by == "kernel" else [])


def test_the_counter_sees_what_waits(waits):
    """What the iteration was made of before: each is counted."""
    there = torch.empty(4, device=CUDA)
    host = torch.empty(4)
    with waits:
        host.to(CUDA)
        host.to(CUDA, non_blocking=True)  # pageable
        there.to("cpu")
        there.copy_(host)
        kernels.to_device(np.zeros(4, np.float32), CUDA)
        there.to("cpu", non_blocking=True)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            there[0].item()
    assert len(waits.blocking) == 4, waits.blocking
