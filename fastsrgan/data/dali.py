"""Volumes through a DALI pipeline: from the reading threads to the device, degraded on the way.

One definition for CPU and GPU: external sources, the copy to the device, and the law of degradation as a Python
function that gets the volume by DLPack where it lies. The law is called and not written again in DALI's operators:
those differ from it in the last bits and know nothing of its extras (docs/decisions/012-dali-feed.md).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import dlpack

from fastsrgan.core.threads import held, one_thread
from fastsrgan.errors import ResourceError
from fastsrgan.observation.model import Degraded

HINT = "pip install 'fastsrgan[cuda13]' (or cuda12), or --feed threads"
NAMES = ("image", "label", "mask")


class DaliMover:
    """Degrades volumes and brings them to a device, one at a time, for any number of threads.

    Raises ResourceError where DALI is not installed or cannot work on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        try:
            self._step = Step(device)
            self._pipeline = define(self._step, device)  # imports DALI, whose own way out comes after _leave
            _movers.add(self)
            _before_dali_leaves()
        except Exception as error:  # a broken installation or an old driver raises anything
            words = " ".join(str(error).split())[:200]
            raise ResourceError("DALI", f"cannot be used here: {type(error).__name__}: {words}", HINT) from error

    def __call__(
        self, image: np.ndarray, label: np.ndarray, mask: np.ndarray | None, law: Callable[[Any], Degraded]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(X, Y, Z) float32, uint8, uint8, C order -> interpolated, hr, label, mask: DALI's memory on the device.

        Raises what ``law`` raises.
        """
        nothing = np.zeros((1, 1, 1), np.uint8)
        with held(self._lock):
            self._step.law, self._step.error = law, None
            for name, array in zip(NAMES, (image, label, nothing if mask is None else mask), strict=True):
                self._pipeline.feed_input(name, [array])
            outputs = self._pipeline.run()
            self._step.law, error = None, self._step.error
            moved = [torch.from_dlpack(output[0]) for output in outputs]
            if moved[0].is_cuda:  # before the next volume takes the memory that DALI still copies from
                torch.cuda.current_stream(moved[0].device).synchronize()
        if error is not None:
            raise error
        return moved[0], moved[1], moved[2], None if mask is None else moved[3]


_movers: weakref.WeakSet[DaliMover] = weakref.WeakSet()


@functools.cache
def _before_dali_leaves() -> None:
    atexit.register(_leave)


def _leave() -> None:
    """At its end a process waits for every pipeline, for ever for one whose step hangs: such a one is left behind."""
    for mover in _movers:
        if mover._lock.locked():
            pipeline = mover._pipeline
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
        """One thread on a CPU. On CUDA a stream, finished at the end, and products in full precision, whatever the
        training step asks of its own."""
        if self._stream is None:
            with one_thread():
                yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.cuda.stream(self._stream):
                yield
            self._stream.synchronize()
        finally:
            torch.set_float32_matmul_precision(before)


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
