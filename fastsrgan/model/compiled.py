"""torch.compile and CUDA graphs for the parts of a training step and for tiles, with one switch.

Compiled are the generator on a batch of tiles (infer/network.py) and three functions of a training step: the critic's
gradients, the generator's loss (with its backward pass) and the generator's forward pass without gradients. All have
static shapes and never wait for the device. tests/test_compiled.py traces them whole, without graph breaks, with the
backends that run on a CPU. None of this has run on a GPU yet: on CUDA "auto" compiles after a small compiled step has
been compared with float64 on the device at hand, and whatever the compiler fails at runs uncompiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsrgan.errors import FastsrganError, ResourceError, out_of_memory

log = logging.getLogger("fastsrgan")

MOST = 4  # compilations of a job; what comes beyond runs as it is
# Of Inductor, for CUDA. Layouts stay as the layers have them: its own choice is for 2-D convolutions and forgets, where
# nothing needs a gradient, that inputs of 3-D ones have their channels innermost, so that each would be copied. Norm,
# ReLU and padding have more than the 30 operations from which it writes what is between, in float32.
INDUCTOR: dict[str, Any] = {"layout_optimization": False, "realize_opcount_threshold": 100}
_LAZY = "force_non_lazy_backward_lowering"  # compiles a backward pass with its forward pass, where errors are caught


def turned_on(setting: str, device: torch.device) -> bool:
    """Whether a ``compile`` setting asks for it on a device: "auto" is CUDA."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


class CompiledJob:
    """The compilations of one job, which its functions share: ``MOST`` of them.

    kinds : each function with the shapes, types and plain values of the arguments that it was compiled for
    """

    def __init__(self) -> None:
        self.kinds: set[Any] = set()
        self._told = False

    def admits(self, kind: Any) -> bool:
        """Whether it is among the kinds, or one of the first ``MOST`` and from now on among them."""
        if kind not in self.kinds and len(self.kinds) == MOST:
            if not self._told:
                log.warning("compiled %d times already, what differs runs uncompiled", MOST)
                self._told = True
            return False
        self.kinds.add(kind)
        return True


def whole(
    function: Callable,
    device: torch.device,
    strict: bool,
    backend: Any = "inductor",
    graphs: bool = True,
    job: CompiledJob | None = None,
) -> Callable:
    """``function`` compiled for the shapes it is called with, without graph breaks; on CUDA as a graph that one launch
    replays (``graphs``), whose outputs its next replay overwrites.

    strict : an error of the compiler is a ResourceError, else the function runs as it is and the log says so
    job : what its compilations are counted with; None: it has ``MOST`` of its own
    """
    options: dict[str, Any] | None = None
    if device.type == "cuda" and backend == "inductor":
        options = INDUCTOR | ({"triton.cudagraphs": True} if graphs else {})  # the latter is mode "reduce-overhead"
    fast = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)
    return _Guarded(function, fast, strict, job or CompiledJob())


def proven(test: Callable[[], object], strict: bool) -> bool:
    """Whether a test of compiled functions passes; else the log says in one line that all runs uncompiled.

    strict : its error is raised. Memory that runs out is raised in any case.
    """
    try:
        test()
    except Exception as error:
        if strict or out_of_memory(error):
            raise
        log.warning("the self-test failed when compiled, everything runs uncompiled: %s", _line(error))
        return False
    return True


class _Guarded:
    """Calls the compiled function, or the plain one once compiling has failed and for what its job does not admit."""

    def __init__(self, plain: Callable, fast: Callable, strict: bool, job: CompiledJob) -> None:
        self.plain, self.fast, self.strict, self.job = plain, fast, strict, job

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.fast is self.plain:
            return self.plain(*args, **options)
        kind = self, _kind((args, sorted(options.items()))), _modes()
        new = kind not in self.job.kinds
        if not self.job.admits(kind):
            return self.plain(*args, **options)
        try:
            if not new or not hasattr(torch._functorch.config, _LAZY):
                return self.fast(*args, **options)
            with torch._functorch.config.patch(_LAZY, True):
                return self.fast(*args, **options)
        except Exception as error:
            # The first call compiles: whatever fails then, but for want of memory, is the compiler's until the plain
            # function fails too.
            errors = torch._dynamo.exc
            known = isinstance(error, (errors.TorchDynamoException, errors.FailOnRecompileLimitHit))
            if out_of_memory(error) or isinstance(error, FastsrganError) or not (new or known):
                raise
            if self.strict:
                raise ResourceError("--compile on", f"compiling failed: {_line(error)}", "--compile off") from error
            reason = _line(error)
        log.warning("compiling failed, it runs uncompiled: %s", reason)
        self.fast = self.plain
        return self.plain(*args, **options)


def _kind(value: Any) -> Any:
    """What a compiled function depends on: of tensors shape, type and strides, of networks what they are made of."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride(), value.requires_grad
    if isinstance(value, torch.nn.Module):
        return type(value), getattr(value, "spec", None), tuple(_kind(p) for p in value.parameters())
    if isinstance(value, (list, tuple)):
        return tuple(_kind(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((k, _kind(v)) for k, v in value.items())
    return value if isinstance(value, (bool, int, float, str, torch.dtype, type(None))) else type(value)


def _modes() -> tuple:
    """Modes of torch that are part of what is compiled."""
    casts = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), casts


def _line(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # torch names its backend first
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
