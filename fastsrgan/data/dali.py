"""Volumes through a DALI pipeline: from the reading threads to the device, degraded on the way.

One definition for CPU and GPU: external sources, the copy to the device, and the law of degradation as a Python
function that gets the volume by DLPack where it lies. The law is called and not written again in DALI's operators:
those differ from it in the last bits and know nothing of its extras (docs/decisions/012-dali-feed.md).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import queue
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import dlpack

from fastsrgan.core.threads import one_thread, unwatched
from fastsrgan.errors import ResourceError
from fastsrgan.observation.model import Degraded

HINT = "pip install 'fastsrgan[cuda13]' (or cuda12), or --feed threads"
NAMES = ("image", "label", "mask")


class DaliMover:
    """Degrades volumes and brings them to a device, for any number of threads.

    Up to ``volumes`` at a time, each through a pipeline and a stream of its own; a thread that finds all of them at
    work waits for one.

    Raises ResourceError where DALI is not installed or cannot work on the device.
    """

    def __init__(self, device: torch.device, volumes: int = 1) -> None:
        self.device, self.busy = device, set[Any]()
        self._idle: queue.LifoQueue[tuple[Any, Step] | None] = queue.LifoQueue()
        for _ in range(volumes - 1):
            self._idle.put(None)  # is made when it is needed
        try:
            self._idle.put(self._made())  # imports DALI, whose own way out comes after _leave
            _movers.add(self)
            atexit.unregister(_leave)
            atexit.register(_leave)
        except Exception as error:  # a broken installation or an old driver raises anything
            words = " ".join(str(error).split())[:200]
            raise ResourceError("DALI", f"cannot be used here: {type(error).__name__}: {words}", HINT) from error

    def _made(self) -> tuple[Any, Step]:
        step = Step(self.device)
        return define(step, self.device), step

    def __call__(
        self, image: np.ndarray, label: np.ndarray, mask: np.ndarray | None, law: Callable[[Any], Degraded]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(X, Y, Z) float32, uint8, uint8, C order -> interpolated, hr, label, mask: DALI's memory on the device.

        Raises what ``law`` raises.
        """
        nothing = np.zeros((1, 1, 1), np.uint8)
        with self._pipeline() as (pipeline, step):
            step.law, step.error = law, None
            for name, array in zip(NAMES, (image, label, nothing if mask is None else mask), strict=True):
                pipeline.feed_input(name, [array])
            outputs = pipeline.run()
            step.law, error = None, step.error
            moved = [torch.from_dlpack(output[0]) for output in outputs]
            if moved[0].is_cuda:  # before the next volume takes the memory that DALI still copies from
                torch.cuda.current_stream(moved[0].device).synchronize()
        if error is not None:
            raise error
        return moved[0], moved[1], moved[2], None if mask is None else moved[3]

    @contextlib.contextmanager
    def _pipeline(self) -> Iterator[tuple[Any, Step]]:
        """A pipeline that no other thread has. The wait for it is not counted: of several jobs the one that hangs is
        named."""
        with unwatched():
            taken = self._idle.get()
        try:
            taken = taken or self._made()
            self.busy.add(taken[0])
            yield taken
        finally:
            if taken is not None:
                self.busy.discard(taken[0])
            self._idle.put(taken)


_movers: weakref.WeakSet[DaliMover] = weakref.WeakSet()


def _leave() -> None:
    """At its end a process waits for every pipeline, for ever for one whose step hangs: such a one is left behind."""
    for pipeline in [p for mover in _movers for p in [*mover.busy]]:
        getattr(type(pipeline), "_pipes", set()).discard(weakref.ref(pipeline))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline))


class Step:
    """The Python function of the pipeline: DLPack in and out, on the pipeline's device.

    An object of its own, since a pipeline that its function refers to is never freed.

    law : what to do with the next volume; error : what it raised
    """

    def __init__(self, device: torch.device) -> None:
        self.law: Callable[[Any], Degraded] | None = None
        self.error: BaseException | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, capsule: Any) -> tuple[Any, Any]:
        image = dlpack.from_dlpack(capsule)
        results: tuple[Any, Any] = (torch.zeros((1, 1, 1), device=image.device),) * 2
        try:
            assert self.law is not None
            with self._alone():
                done = self.law(image.numpy() if self._stream is None else image)
                results = done.interpolated, done.hr
        except BaseException as error:  # DALI would make a RuntimeError of it
            self.error = error
        return tuple(dlpack.to_dlpack(torch.as_tensor(r).contiguous()) for r in results)  # type: ignore[return-value]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread on a CPU; on CUDA a stream, finished at the end."""
        if self._stream is None:
            with one_thread():
                yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def define(degrade: Callable[[Any], tuple[Any, Any]], device: torch.device) -> Any:
    """The pipeline for one volume at a time: inputs image, label, mask; outputs interpolated, hr, label, mask."""
    dali, fn, types = (importlib.import_module(f"nvidia.dali{part}") for part in ("", ".fn", ".types"))
    on_gpu = device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,  # the threads that read are ahead already
        exec_dynamic=True,  # outputs then live as long as a tensor refers to them
    )
    with pipeline:
        # What goes to a GPU is copied to pinned memory first. On a CPU label and mask become outputs, copied too, and
        # the image is only read by the law while __call__ holds it.
        image = fn.external_source(name="image", ndim=3, dtype=types.FLOAT, no_copy=not on_gpu)
        label, mask = (fn.external_source(name=name, ndim=3, dtype=types.UINT8) for name in NAMES[1:])
        if on_gpu:
            image, label, mask = image.gpu(), label.gpu(), mask.gpu()
        interpolated, hr = fn.dl_tensor_python_function(
            image, function=degrade, num_outputs=2, batch_processing=False, device="gpu" if on_gpu else "cpu"
        )
        pipeline.set_outputs(interpolated, hr, label, mask)
    pipeline.build()
    return pipeline
