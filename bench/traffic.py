"""Bytes that a compiled generator moves per patch, by the compiler's own count: no GPU and no C++ compiler is needed.

    python -m bench traffic                          # forward alone and forward + backward, k = 16, batch 16 of 64^3
    python -m bench traffic --largest 20             # and the kernels that move most

The network is traced in its forms for CUDA (fastsrgan/model/gpu.py), its activations in bfloat16, and lowered by
Inductor for the CPU; each kernel that its scheduler makes counts every array that it reads or writes once, convolutions
among them. No code is generated and nothing is computed. What it cannot see: the cache, what a convolution's library
does inside, and the outputs of a convolution's gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import compile_fx, config
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

from bench.data_page import table
from fastsrgan.cli.console import HelpFormatter
from fastsrgan.model import layers
from fastsrgan.model.compiled import INDUCTOR
from fastsrgan.model.networks import Generator, GeneratorSpec


class Moved(NamedTuple):
    """Bytes of one kernel: in which pass it is, and what it computes."""

    backward: bool
    bytes: int
    what: str


class Count:
    """Stands for Inductor's compiler: lowers and schedules a graph, counts, and gives a function of empty results."""

    def __init__(self) -> None:
        self.kernels: list[Moved] = []

    def of(self, backward: bool) -> int:
        """Bytes of the forward or of the backward pass."""
        return sum(kernel.bytes for kernel in self.kernels if kernel.backward == backward)

    def __call__(self, gm: Any, inputs: Any, *, is_inference: bool = False, is_backward: bool = False, **_: Any) -> Any:
        results = [r.meta["val"] if isinstance(r, torch.fx.Node) else r for r in gm.graph.output_node().args[0]]
        fake = torch._guards.detect_fake_mode([*inputs, *(r for r in results if isinstance(r, Tensor))])
        with V.set_fake_mode(fake):
            compile_fx._recursive_post_grad_passes(gm, is_inference=is_inference)
            compile_fx.record_original_output_strides(gm)
            graph = GraphLowering(gm, example_inputs=inputs, is_inference=is_inference, is_backward=is_backward)
            with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
                graph.run(*inputs)
                graph.init_wrapper_code()
                graph._update_scheduler()
                for node in graph.scheduler.nodes:
                    self.kernels.append(Moved(is_backward, node.get_read_write_buffers_sizes(), _name(node)))

        def run(_: Any) -> Any:
            return tuple(
                torch.empty_strided(r.shape, r.stride(), dtype=r.dtype) if isinstance(r, Tensor) else r for r in results
            )

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _name(node: Any) -> str:
    origins = {str(origin) for one in node.get_nodes() for origin in one.node.get_origins()}
    return " ".join(sorted(origins))


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Layers in the forms that they have on CUDA, on any device."""
    # oneDNN's rule for layouts stands for cuDNN's, which was not run; torch follows it for types that this processor
    # has no instructions for.
    backend = torch._C._ConvBackend.Mkldnn
    with (
        mock.patch.object(layers, "by_hand", lambda x: False),
        mock.patch.object(layers, "for_gpu", lambda x: True),
        mock.patch.object(torch._C, "_select_conv_backend", lambda *args, **options: backend),
    ):
        yield


def count(function: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Count:
    """What ``function`` moves on x, compiled; with ``backward`` its gradient for all parameters too."""
    torch._dynamo.reset()
    found = Count()
    with config.patch(force_disable_caches=True, **INDUCTOR), as_on_cuda():
        fast = torch.compile(
            function,
            fullgraph=True,
            dynamic=False,
            backend=lambda gm, inputs: compile_fx.compile_fx(gm, inputs, inner_compile=found),
        )
        with torch.set_grad_enabled(backward):
            out = fast(x)
        if backward:
            out.sum().backward()
    torch._dynamo.reset()
    return found


def generator(kernel: int, patch: int, dtype: torch.dtype, backward: bool, batch: int = 16) -> Count:
    """A pass of the plain generator on a batch."""
    network = Generator(GeneratorSpec(kernel=kernel)).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return network.raw(x)

    return count(function, torch.rand(batch, 1, patch, patch, patch), backward)


def main(argv: Sequence[str]) -> str:
    """``python -m bench traffic``."""
    parser = argparse.ArgumentParser(prog="python -m bench traffic", description=__doc__, formatter_class=HelpFormatter)
    for name, default, text in (
        ("kernel", 16, "channels of the generator's first convolution"),
        ("patch", 64, "edge of a patch in voxels"),
        ("batch", 16, "patches at a time"),
        ("largest", 0, "list so many of the kernels that move most"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} ({default})")
    args = parser.parse_args(argv)
    alone, both = (
        generator(args.kernel, args.patch, torch.bfloat16, backward, args.batch) for backward in (False, True)
    )
    million = 1e6 * args.batch  # bytes per patch
    rows = [
        ["forward alone", len(alone.kernels), f"{alone.of(False) / million:.1f}"],
        ["forward of a training step", sum(not k.backward for k in both.kernels), f"{both.of(False) / million:.1f}"],
        ["its backward", sum(k.backward for k in both.kernels), f"{both.of(True) / million:.1f}"],
        ["forward + backward", len(both.kernels), f"{(both.of(False) + both.of(True)) / million:.1f}"],
    ]
    lines = table(["pass", "kernels", "MB per patch"], [[str(cell) for cell in row] for row in rows])
    for kernel in sorted(both.kernels, key=lambda k: -k.bytes)[: args.largest]:
        which = "backward" if kernel.backward else "forward"
        lines += f"\n{which} {kernel.bytes / million:.1f} MB: {kernel.what[:160]}"
    return lines
