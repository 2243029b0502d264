"""Devices that the package takes for GPUs, made of this machine's memory and processor.

Every operation runs on the CPU, with its values; what lies "on cuda:0" is known by its storage. An operation whose
tensors lie on several devices is refused as CUDA refuses it, and so is NumPy's look at memory of a device. Memory can
be made to run out. Kernels are compiled by g++ (kernel_host.py). What it cannot show: speed, memory, what cuDNN and
reduced types do to values, races between streams.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from kernel_host import Host
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastsrgan.core import kernels

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
BYTES = 8 << 30  # of memory, as far as it is asked for
aten = torch.ops.aten

# What may read from one side and write to the other.
COPIES = (aten.copy_, aten._to_copy, aten.set_, aten._copy_from)
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)

FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor", "tensor",
    "zeros", "zeros_like",
)  # fmt: skip


class StandIn(TorchDispatchMode):
    """Where tensors lie, and the refusals.

    seen : operations on the devices so far; taken : pieces of memory that they gave
    kernels : runs those of the package
    full : told the number of each piece before it is given, whether there is no memory for it
    """

    there: ClassVar[dict[int, tuple[StorageWeakRef, int]]] = {}  # of all, since the package keeps tables by device

    def __init__(self, kernels: Host, devices: int) -> None:
        super().__init__()
        self.kernels, self.devices, self.current = kernels, devices, threading.local()
        self.seen = self.taken = 0
        self.full: Callable[[int], bool] = lambda number: False

    def place(self, tensor: torch.Tensor) -> torch.device | None:
        """The device that a tensor's memory is of; None: the host."""
        kept = self.there.get(tensor.untyped_storage()._cdata)
        return None if kept is None or kept[0].expired() else torch.device("cuda", kept[1])

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's memory is a device's."""
        return self.place(tensor) is not None

    def asked(self, device: Any) -> torch.device:
        """A device by any of its names; one without a number is the current one of this thread."""
        named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return torch.device("cuda", self.now()) if named.type == "cuda" and named.index is None else named

    def now(self) -> int:
        """The current device of this thread, the first one in a new thread."""
        return getattr(self.current, "index", 0)

    def choose(self, device: Any) -> None:
        """torch.cuda.set_device."""
        self.current.index = self.asked(device).index

    def take(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Its memory is the device's from now on."""
        assert device.index < self.devices, f"{device} of {self.devices}"
        self.taken += 1
        if self.full(self.taken):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tensor.nbytes} bytes.\nGPU {device}")
        storage = tensor.untyped_storage()
        self.there[storage._cdata] = StorageWeakRef(storage), device.index
        if len(self.there) > 5000:
            for key in [key for key, (kept, _) in list(self.there.items()) if kept.expired()]:
                self.there.pop(key, None)  # threads do so too

    def leave(self, tensor: torch.Tensor) -> None:
        """Its memory is the host's."""
        self.there.pop(tensor.untyped_storage()._cdata, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        on = [self.place(v) for v in given]
        packet = func.overloadpacket
        self.check(packet, given, on)
        asked = None if kwargs.get("device") is None else self.asked(kwargs["device"])
        if asked is not None and asked.type == "cuda":
            kwargs["device"] = CPU
        out = func(*args, **kwargs)
        goes = next(filter(None, on), CPU) if asked is None else asked
        if goes.type == "cuda":
            self.seen += 1
            known = {v.untyped_storage()._cdata for v in given}
            for made in tree_leaves(out):
                if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in known:
                    self.take(made, goes)
        return out

    def check(self, packet: Any, given: list[torch.Tensor], on: list[torch.device | None]) -> None:
        """RuntimeError where CUDA has one."""
        if not any(on) or packet in COPIES or _adding_gradients():
            return
        pairs = list(zip(given, on, strict=True))
        if packet in INDEXED:
            (_, first), *rest = pairs
            if first:  # places may be told from the host
                rest = [(v, at) for v, at in rest if v.dtype not in (torch.int64, torch.int32, torch.bool, torch.uint8)]
            pairs = [(given[0], first), *rest]
        devices = {at for v, at in pairs if at or v.dim()}
        if len(devices) > 1 or (None in devices and any(at for _, at in pairs)):
            told = [(tuple(v.shape), str(at or CPU)) for v, at in pairs]
            raise RuntimeError(f"Expected all tensors to be on the same device, but {packet} got {told}")


def _adding_gradients() -> bool:
    """Whether autograd adds to a gradient, of memory that it took below where operations are seen."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name().endswith("AccumulateGrad")


class Kernels(Host):
    """Kernels of the device: no memory of the host may reach one."""

    @staticmethod
    def _value(argument: kernels.Argument) -> Any:
        if isinstance(argument, torch.Tensor):
            assert argument.is_cuda, "a kernel on a device got memory of the host"
            return ctypes.c_void_p(argument.data_ptr())
        return Host._value(argument)


class _Event:
    def __init__(self, *args: Any, **more: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    wait = synchronize = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 1.0


class _Stream(_Event):
    cuda_stream = 0
    wait_event = wait_stream = _Event.record

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def is_capturing(self) -> bool:
        return False


def _patches(mode: StandIn) -> Iterator[Any]:
    """What of torch says where a tensor lies, or asks the driver."""
    plain = {name: getattr(torch.Tensor, name) for name in ("to", "cpu", "numpy", "__array__", "device", "grad")}
    device_of = plain["device"].__get__

    def to(tensor: torch.Tensor, *args: Any, copy: bool = False, **more: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **more)
        here = mode.place(tensor) or CPU
        there = here if device is None else mode.asked(device)
        made = plain["to"](
            tensor,
            dtype=dtype or tensor.dtype,
            copy=copy or here != there,
            memory_format=layout or torch.preserve_format,
        )
        if here != there:
            mode.take(made, there) if there.type == "cuda" else mode.leave(made)
        return made

    def grad(tensor: torch.Tensor) -> torch.Tensor | None:  # some are made below where operations are seen
        found, place = plain["grad"].__get__(tensor), mode.place(tensor)
        if found is not None and place is not None and not mode.has(found):
            mode.take(found, place)
        return found

    def refused(name: str) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
            if mode.has(tensor):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            return plain[name](tensor, *args, **more)

        return call

    shared = torch.as_tensor

    def made(function: Any) -> Any:
        def call(*args: Any, device: Any = None, **more: Any) -> torch.Tensor:
            found = function(*args, **more)
            if device is not None:
                if mode.asked(device).type == "cuda" and function is not shared:
                    mode.take(found, mode.asked(device))
                else:
                    found = found.to(device)
            return found

        return call

    def like(function: Any) -> Any:  # torch names the tensor's device itself
        def call(tensor: torch.Tensor, *args: Any, device: Any = None, **more: Any) -> torch.Tensor:
            return to(function(tensor, *args, **more), tensor.device if device is None else torch.device(device))

        return call

    def run(thread: threading.Thread) -> None:
        with mode:
            whole(thread)

    @contextlib.contextmanager
    def stream(stream: _Stream | None) -> Iterator[None]:
        before = mode.now()
        mode.choose(before if stream is None or stream.device is None else stream.device)
        yield
        mode.choose(before)

    whole = threading.Thread.run
    of = mock.patch.object
    yield of(threading.Thread, "run", run)
    yield of(torch.Tensor, "device", property(lambda t: mode.place(t) or device_of(t)), create=True)
    yield of(torch.Tensor, "grad", property(grad, plain["grad"].__set__, plain["grad"].__delete__), create=True)
    yield of(torch.Tensor, "is_cuda", property(mode.has), create=True)
    yield of(torch.Tensor, "is_cpu", property(lambda t: not mode.has(t)), create=True)
    yield of(torch.Tensor, "to", to)
    yield of(torch.Tensor, "cpu", lambda t, *a, **m: to(t, CPU))
    yield of(torch.Tensor, "cuda", lambda t, *a, **m: to(t, mode.asked("cuda")))
    yield of(torch.Tensor, "numpy", refused("numpy"))
    yield of(torch.Tensor, "__array__", refused("__array__"))
    yield of(torch.Tensor, "pin_memory", lambda t, *a: t)
    yield of(torch.Tensor, "record_stream", lambda t, *a: None)
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        yield of(torch.Tensor, name, like(getattr(torch.Tensor, name)))
    read = torch.load

    def load(file: Any, map_location: Any = None, **more: Any) -> Any:
        found = read(file, map_location=CPU, **more)
        asked = CPU if map_location is None else mode.asked(map_location)
        return tree_map_only(torch.Tensor, lambda t: to(t, asked), found)

    yield of(torch, "load", load)
    for name in FACTORIES:
        yield of(torch, name, made(getattr(torch, name)))
    yield mock.patch.dict(kernels.RUNNERS, {"cuda": mode.kernels})
    yield of(kernels, "cupy_available", lambda: True)
    properties = types.SimpleNamespace(
        name="stand-in", total_memory=BYTES, multi_processor_count=1, major=9, minor=0,
    )  # fmt: skip
    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: mode.devices,
        "current_device": mode.now,
        "set_device": mode.choose,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "stand-in",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (BYTES, BYTES),
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "set_sync_debug_mode": lambda mode: None,
        "manual_seed_all": lambda seed: None,
        "current_stream": lambda device=None: _Stream(),
        "stream": stream,
        "Stream": _Stream,
        "Event": _Event,
    }.items():
        yield of(torch.cuda, name, value)
    # Builds for CUDA ask it of the driver at every step of an optimiser.
    yield of(torch.accelerator, "current_stream", lambda device=None: _Stream())


@contextlib.contextmanager
def stand_in(folder: Path, devices: int = 1) -> Iterator[StandIn]:
    """Within, ``cuda`` and ``cuda:0`` ... are devices of torch, in threads that begin within too; kernels are compiled
    in ``folder``."""
    mode = StandIn(Kernels(folder), devices)
    with contextlib.ExitStack() as stack:
        for patch in _patches(mode):
            stack.enter_context(patch)
        stack.enter_context(mode)
        yield mode
