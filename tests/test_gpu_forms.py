"""The layers for CUDA, on this CPU: no change of layout, bytes by the compiler's count, columns of the head.

That they equal the plain forms with all gradients (float64, 1e-12) is in test_layers_forms.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from bench import traffic
from fastsrgan.model import gpu, layers, networks
from fastsrgan.model.networks import GeneratorSpec, build_generator

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
PADS = {aten.reflection_pad3d, aten.replication_pad3d, aten.reflection_pad3d_backward, aten.replication_pad3d_backward}
VIEWS = (
    "view",
    "permute",
    "slice",
    "expand",
    "unsqueeze",
    "select",
    "transpose",
    "detach",
    "split",
    "alias",
    "squeeze",
)


class Raw(torch.nn.Module):
    """A generator's head before subtraction and sigmoid, as a module."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.raw(x)


class Layouts(TorchDispatchMode):
    """Operations that take an activation in one layout and give, or also take, one in the other: passes over memory.

    Layouts are those of CUDA: torch's pads give contiguous results there, cuDNN's convolutions channels innermost where
    input or weight have them so, as oneDNN's do here. Activations are arrays of 5 axes with several channels.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.changes, self.atomics = batch, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in PADS:
            out = out.contiguous()
            self.atomics += [func] if "backward" in str(func) else []
        if "index_put" in str(func) or "scatter_add" in str(func):
            self.atomics.append(func)
        if str(func).split(".")[1] in VIEWS:
            return out
        seen = []
        for value in (*args, *(out if isinstance(out, (tuple, list)) else (out,))):
            if isinstance(value, torch.Tensor) and value.ndim == 5 and len(value) == self.batch:
                seen.append(layout(value))
        kinds = set(seen) - {None}
        if len(kinds) > 1:
            self.changes.append((str(func), seen))
        return out


def layout(x: torch.Tensor) -> str | None:
    """Which axis of (B, C, X, Y, Z) or (B, X, Y, Z, C) moves least in memory; None where there is but one channel."""
    strides = [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1 and s]
    if len(strides) < 5:
        return None
    return {1: "second axis innermost", 4: "last axis innermost"}.get(x.stride().index(min(x.stride())), "another")


def passes(spec: GeneratorSpec) -> Layouts:
    """A forward and a backward pass of a generator as on CUDA; activations are seen as (B, C, X, Y, Z)."""
    network = build_generator(spec).to(memory_format=torch.channels_last_3d)
    x = torch.rand(3, 1, 16, 24, 32)
    with Layouts(3) as seen:
        out = network.raw(x, 2.0) if spec.conditional else network.raw(x)
        grad = torch.rand_like(out, memory_format=torch.channels_last_3d)
        torch.autograd.grad(out, list(network.parameters()), grad)
    return seen


def passes_on_fake_cuda(spec: GeneratorSpec) -> Layouts:
    """The same on CUDA tensors without memory.

    Autograd ends the process at a CUDA tensor that needs a gradient, where torch has no CUDA ("PyTorch is not linked
    with support for cuda devices"): both passes are traced on the CPU, and each operation called again on CUDA tensors.
    """
    network = Raw(build_generator(spec).to(memory_format=torch.channels_last_3d))
    names, parameters = zip(*network.named_parameters(), strict=True)

    def both(parameters: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        out = torch.func.functional_call(network, dict(zip(names, parameters, strict=True)), (x,))
        grad = torch.ones_like(out, memory_format=torch.channels_last_3d)
        return [out, *torch.autograd.grad(out, parameters, grad)]

    x = torch.rand(3, 1, 16, 24, 32)
    graph = make_fx(both, tracing_mode="fake")(list(parameters), x)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    with FakeTensorMode(), traffic.as_on_cuda():
        there = [torch.empty_strided(p.shape, p.stride(), device="cuda") for p in (*parameters, x)]
        with torch.no_grad(), Layouts(3) as seen:
            out, *gradients = graph(there[:-1], there[-1])
    assert out.is_cuda and all(g.shape == p.shape and g.is_cuda for g, p in zip(gradients, parameters, strict=True))
    return seen


@pytest.fixture
def cuda(monkeypatch):
    """Layers as on CUDA."""
    monkeypatch.setattr(networks, "N_BLOCKS", 1)
    monkeypatch.setattr(layers, "by_hand", lambda x: False)
    monkeypatch.setattr(layers, "for_gpu", lambda x: True)


@pytest.mark.parametrize("spec", [GeneratorSpec(kernel=8), GeneratorSpec("unet", kernel=8)], ids=["plain", "unet"])
@pytest.mark.parametrize("way", [passes, passes_on_fake_cuda])
def test_no_layer_changes_the_layout_and_nothing_adds_with_atomics(cuda, monkeypatch, spec, way):
    seen = way(spec)
    assert not seen.changes and not seen.atomics
    monkeypatch.setattr(layers, "for_gpu", lambda x: False)
    before = passes(spec)
    assert len(before.changes) >= 10 and before.atomics, "the spy sees what torch's own pads do"


def test_the_head_is_a_product_of_64_columns(cuda, monkeypatch):
    calls = []
    right = F.conv3d
    monkeypatch.setattr(F, "conv3d", lambda x, w, *a, **o: calls.append((tuple(w.shape), o)) or right(x, w, *a, **o))
    network = build_generator(GeneratorSpec(kernel=16))
    network.raw(torch.rand(1, 1, 16, 16, 16))
    assert calls[-1] == ((64, 16, 8, 10, 10), {"stride": (2, 4, 4)})
    assert calls[0][0] == (8 * 16, 8, 4, 4, 4), "the stem reads 8 channels at once"


@pytest.mark.parametrize(("inputs", "sizes"), [(16, (4, 8, 12)), (16, (6, 10, 8)), (1, (4, 6, 8)), (2, (8, 8, 4))])
def test_the_head_and_the_stem_are_the_plain_convolution(cuda, inputs, sizes):
    """Float64, forward and both gradients; strides of 4 and of 2, blocks of the input from few channels."""
    draw = torch.Generator().manual_seed(1)
    x, weight = (
        torch.randn(s, generator=draw, dtype=torch.double).requires_grad_()
        for s in ((2, inputs, *sizes), (2, inputs, 7, 7, 7))
    )
    fast, plain = (layers.conv7_reflect(x, weight, form) for form in ("fast", "reference"))
    grad = torch.randn(plain.shape, generator=draw, dtype=torch.double)
    for a, b in zip(
        [fast, *torch.autograd.grad(fast, (x, weight), grad)],
        [plain, *torch.autograd.grad(plain, (x, weight), grad)],
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()  # found: 1.6e-15 (rounding)


def test_a_cpu_takes_none_of_it(monkeypatch):
    """Neither in float32 nor in half precision nor compiled."""
    for name in ("pad", "norm_pad"):
        monkeypatch.setattr(gpu, name, lambda *a: pytest.fail("a form for CUDA"))
    network, x = build_generator(GeneratorSpec(kernel=2)), torch.rand(1, 1, 8, 8, 8)
    network(x).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        network(x).sum().backward()


@pytest.mark.parametrize("padding", [gpu.Padding(1), gpu.Padding(3), gpu.Padding(1, True)], ids=str)
@pytest.mark.parametrize("compiling", [False, True])
def test_the_gradient_of_a_pad_is_its_transpose(monkeypatch, padding, compiling):
    """Both ways of adding what was padded, against torch's own pad."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.randn(2, 3, 4, 8, 5, dtype=torch.double, requires_grad=True)  # a long axis among short ones
    right = F.pad(x, (padding.width,) * 6, mode="replicate" if padding.repeated else "reflect")
    found = gpu.pad(x, padding)
    grad = torch.randn_like(right)
    assert torch.equal(found, right)
    a, b = (torch.autograd.grad(y, x, grad)[0] for y in (found, right))
    assert torch.allclose(a, b, rtol=0, atol=1e-14)  # found: 2.8e-15


@pytest.mark.parametrize("backward", [False, True], ids=["forward alone", "training"])
def test_bytes_of_a_compiled_pass_are_within_the_budget(monkeypatch, backward):
    """By Inductor's count, k = 16 in half precision, MB per 64^3 patch: 200 forward and 600 in all for six blocks.

    One block stands for the six, which are alike and move 7.8 and 20.8 MB each; tracing takes its time.
    """
    monkeypatch.setattr(networks, "N_BLOCKS", 1)
    batch = 16  # over which the weights' share is spread
    moved = traffic.generator(16, 64, torch.bfloat16, backward, batch)
    forward, both = (sum(moved.of(back) for back in which) / batch / 1e6 for which in ((False,), (False, True)))
    # Found: 130.9 forward alone, 147.6 and 414.9 in training.
    assert 100 < forward <= 200 - 5 * 7.8 and both <= 600 - 5 * 20.8 and (both > 2 * forward) == backward


def test_the_table_of_traffic_has_both_passes_apart_in_megabytes_of_one_patch(monkeypatch):
    asked, counts = [], {False: traffic.Count(), True: traffic.Count()}
    counts[False].kernels = [traffic.Moved(False, 30_000_000, "alone")]
    moved = ((False, 5, "first"), (True, 70, "last " * 40), (False, 9, "middle"), (True, 2, "least"))
    counts[True].kernels = [traffic.Moved(back, 10**6 * n, what) for back, n, what in moved]
    monkeypatch.setattr(traffic, "generator", lambda *args: asked.append(args) or counts[args[3]])
    told = traffic.main(["--kernel", "3", "--patch", "32", "--batch", "2", "--largest", "2"]).splitlines()
    assert asked == [(3, 32, torch.bfloat16, False, 2), (3, 32, torch.bfloat16, True, 2)]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in told[2:6]] == [
        ["forward alone", "1", "15.0"], ["forward of a training step", "2", "7.0"], ["its backward", "2", "36.0"],
        ["forward + backward", "4", "43.0"],
    ]  # fmt: skip
    assert told[7:] == [f"backward 35.0 MB: {('last ' * 40)[:160]}", "forward 4.5 MB: middle"]


def test_layers_take_their_own_forms_again_after_they_were_counted():
    before = layers.by_hand, layers.for_gpu, torch._C._select_conv_backend
    with traffic.as_on_cuda():
        assert layers.for_gpu(None) and not layers.by_hand(None)
    assert (layers.by_hand, layers.for_gpu, torch._C._select_conv_backend) == before
