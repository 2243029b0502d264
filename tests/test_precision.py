"""Types by capability, on faked devices; half precision end to end; the self-test refuses wrong convolutions."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastsrgan.config import TrainConfig
from fastsrgan.data.pool import Batch
from fastsrgan.errors import ResourceError
from fastsrgan.infer.network import inference_test
from fastsrgan.model import arithmetic as arithmetics
from fastsrgan.model.arithmetic import TF32, Arithmetic, pick_precision
from fastsrgan.model.networks import Critic, CriticSpec, Generator, GeneratorSpec
from fastsrgan.train import optimise, precision
from fastsrgan.train.gan import Models
from fastsrgan.train.objectives import generator_loss
from fastsrgan.train.optimise import Optimiser
from fastsrgan.train.precision import choose, self_test

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CONFIG = TrainConfig(new_low_res=((1.0, 1.0, 3.0),), batch_size=2, patch_size=16, kernel_gen=2, kernel_dis=2)


@pytest.fixture
def capability(monkeypatch):
    """Makes CUDA devices of a compute capability."""

    def fake(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Fake {}.{}".format(*capability))

    return fake


# --- choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sm", "dtype"),
    [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16), ((7, 0), torch.float16)]
    + [((6, 1), torch.float32)],
)
def test_cuda_takes_the_widest_half_type_that_it_multiplies(capability, sm, dtype):
    capability(*sm)
    found = choose(CONFIG, CUDA)
    assert (found.dtype, found.scaled) == (dtype, dtype == torch.float16)
    assert found.channels_last and not found.tf32 and not found.proven
    assert choose(CONFIG.replace(precision="fp32", tf32=True, layout="contiguous"), CUDA) == Arithmetic(CUDA, tf32=True)


def test_what_a_device_cannot_do_is_refused_with_the_alternative(capability):
    capability(7, 5)
    with pytest.raises(ResourceError, match=r"Fake 7\.5 has no bf16 \(auto, fp32 or fp16\)"):
        choose(CONFIG.replace(precision="bf16"), CUDA)
    with pytest.raises(ResourceError, match="fp16 is for CUDA"):
        choose(CONFIG.replace(precision="fp16"), CPU)


def test_a_cpu_computes_in_float32_unless_asked(monkeypatch, caplog):
    """Whatever the processor can do."""
    everything = dict.fromkeys(("avx512_bf16", "amx_bf16", "bf16", "avx512_fp16"), True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: everything, raising=False)
    assert choose(CONFIG, CPU).dtype == torch.float32
    assert pick_precision("auto", CPU) == "fp32"
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert choose(CONFIG.replace(precision="bf16"), CPU).dtype == torch.bfloat16
    assert "slower than fp32 on every CPU" in caplog.text
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert not choose(CONFIG.replace(layout="channels_last"), CPU).channels_last
    assert "channels_last is for CUDA" in caplog.text


# --- half precision -----------------------------------------------------------------------------------------------


def batch(n: int = 2) -> Batch:
    y = torch.rand((n, 2, 16, 16, 16), generator=torch.Generator().manual_seed(1))
    return Batch(y[:, :1] * 0.9, y, torch.full((n,), 3.0), ["patch"] * n)


@pytest.mark.parametrize("penalty", ["manual", "explicit"])
def test_an_iteration_in_bfloat16_is_close_to_float32(penalty):
    exact, near = (Models(CONFIG.replace(precision=p, penalty=penalty), 0, CPU) for p in ("fp32", "bf16"))
    assert near.arithmetic.dtype == torch.bfloat16
    eps, b = torch.tensor([[0.3, 0.8], [0.6, 0.1]]), batch()
    for m in (exact, near):
        assert m.generate(b).dtype == torch.float32
    facts, others = ([m.critic_updates([b], [eps]), m.generator_update(b, True)] for m in (exact, near))
    for f, o in zip(facts, others, strict=True):
        assert o.keys() == f.keys()
        assert o["total"] == pytest.approx(f["total"], rel=0.05, abs=0.02)  # found: 0.76 of it
        assert o["gradient"] == pytest.approx(f["gradient"], rel=0.1)  # found: 0.012
    for network in (near.generator, near.critic):
        assert all(p.dtype == torch.float32 for p in network.parameters())


def test_norms_losses_and_penalty_stay_float32_under_autocast():
    generator, critic = Generator(GeneratorSpec(kernel=2)), Critic(CriticSpec(kernel=2, patch=16))
    seen = []
    hooks = [m.register_forward_hook(lambda m, a, y: seen.append((type(m).__name__, y.dtype))) for m in [critic]]
    with Arithmetic(CPU, torch.bfloat16).autocast():
        terms = generator_loss(generator, critic, batch().x, batch().y)
    assert {t.dtype for t in terms.values()} == {torch.float32}
    assert seen == [("Critic", torch.bfloat16)], "autocast was not at work"
    for hook in hooks:
        hook.remove()


# --- loss scale ---------------------------------------------------------------------------------------------------


def scaled() -> tuple[torch.nn.Linear, Optimiser]:
    network = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(network.weight)
    return network, Optimiser(network, 0.1, (0.5, 0.999), 1e-8, scaled=True)


def push(network: torch.nn.Linear, o: Optimiser, size: float = 1.0) -> dict[str, torch.Tensor]:
    loss = size * network(torch.ones(1, 3)).sum()
    (loss * o.scale).backward()
    o.send(loss)
    return o.step()


def test_a_scaled_step_is_the_unscaled_one():
    network, o = scaled()
    plain = torch.nn.Linear(3, 1, bias=False)
    plain.load_state_dict(network.state_dict())
    other = Optimiser(plain, 0.1, (0.5, 0.999), 1e-8)
    told = push(network, o)
    loss = plain(torch.ones(1, 3)).sum()
    loss.backward()
    other.send(loss)
    assert torch.allclose(told["gradient"], other.step()["gradient"])
    assert torch.allclose(network.weight, plain.weight)


def test_overflow_halves_the_scale_and_is_not_counted_as_a_bad_loss(monkeypatch):
    network, o = scaled()
    first, before = float(o.scale), network.weight.detach().clone()
    told = push(network, o, 1e36)
    assert (float(told["overflow"]), float(told["skipped"])) == (1, 0)
    assert float(o.scale) == first / 2 and torch.equal(network.weight, before)
    assert float(push(network, o, float("nan"))["skipped"]) == 1
    assert float(o.scale) == first / 4
    monkeypatch.setattr("fastsrgan.train.optimise.PATIENCE", 2)
    assert float(push(network, o)["overflow"]) == 0
    kept = o.state()
    push(network, o)
    assert float(o.scale) == first / 2 and not torch.equal(network.weight, before)
    _, other = scaled()
    other.load_state(kept)
    assert float(other.scale) == first / 2 and int(other.growth) == int(o.growth)


def test_the_loss_scale_moves_as_torchs_does_and_starts_lower():
    torchs = torch.amp.GradScaler("cpu", init_scale=optimise.FIRST_SCALE)
    assert (torchs.get_growth_factor(), torchs.get_backoff_factor()) == (optimise.GROWTH, optimise.BACKOFF)
    assert torchs.get_growth_interval() == optimise.PATIENCE
    plain = torch.amp.GradScaler("cpu")
    assert plain._init_scale > optimise.FIRST_SCALE and float(scaled()[1].scale) == optimise.FIRST_SCALE


def test_the_first_loss_scale_leaves_gradients_from_2_to_the_minus_38_to_2_in_half_precision():
    gradients = torch.tensor([2.0**-38, 2.0])
    assert torch.equal((gradients * optimise.FIRST_SCALE).half().float() / optimise.FIRST_SCALE, gradients)


def test_the_moving_average_stands_still_where_the_loss_scale_overflows():
    models = Models(CONFIG.replace(precision="fp32", ema=0.5), 0, CPU)
    x = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = Batch(x, torch.cat([x, (x > 0.5).float()], 1), torch.full((2,), 3.0), ["a", "b"])
    models.generator_update(batch, False)  # from here on average and weights differ
    o = Optimiser(models.generator, CONFIG.lr_gen, (0.5, 0.999), 1e-8, scaled=True)
    o.scale.fill_(torch.inf)
    models.optimiser_g = o
    before = {name: mean.clone() for name, mean in models.average.items()}
    assert models.generator_update(batch, False)["overflow"] == 1
    assert all(torch.equal(before[name], mean) for name, mean in models.average.items())


def test_good_steps_are_counted_over_a_snapshot():
    """The scale grows after so many of them, whether the run was resumed meanwhile or not."""
    network, o = scaled()
    push(network, o)
    push(network, o)
    _, other = scaled()
    other.load_state(o.state())
    assert int(other.growth) == int(o.growth) == 2


# --- self-test ----------------------------------------------------------------------------------------------------


CONVOLUTION, BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


@pytest.fixture
def fresh():
    self_test.cache_clear()
    inference_test.cache_clear()
    yield
    self_test.cache_clear()
    inference_test.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sound_device_passes_and_the_limits_are_near(fresh, dtype):
    """Some processors have bfloat16: their sums are float32, five times as near as those of torch's own loops."""
    off = self_test(Arithmetic(CPU, dtype))
    kernels = [value for name, value in off.items() if name not in ("generator", "critic")]
    for name in ("generator", "critic"):
        assert off[name] <= precision.NETWORK_LIMITS[name][dtype]
    if dtype != torch.float32:  # float32 on a CPU convolves by hand
        assert (
            len(kernels) == 3
            and arithmetics.KERNEL_LIMITS[dtype] / 12 < max(kernels) <= arithmetics.KERNEL_LIMITS[dtype]
        )
    assert min(off.values()) > 0, "compared with itself"


class Kernels(TorchDispatchMode):
    """Kernels of a device: with the operands of float32 convolutions cut to TF32, or with a fault in one of them.

    fault : "tap" (the first tap of the weight is left out), "channels" (two outputs change places), "gradient" (the
        weight's is zero), or "" for none; at : of the calls, which one
    """

    def __init__(self, fault: str = "", at: int = 0, tf32: bool = False) -> None:
        super().__init__()
        self.fault, self.at, self.tf32, self.calls = fault, at, tf32, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (CONVOLUTION, BACKWARD) or args[1].dtype == torch.float64:
            return func(*args, **(kwargs or {}))
        args = [cut(a) if self.tf32 and isinstance(a, torch.Tensor) else a for a in args]
        hit = False
        if func == (BACKWARD if self.fault == "gradient" else CONVOLUTION):
            hit, self.calls = self.calls == self.at, self.calls + 1
        if hit and self.fault == "tap":
            args[1] = args[1].clone()
            args[1][..., 0, 0, 0] = 0
        out = func(*args, **(kwargs or {}))
        if hit and self.fault == "channels":
            out[:, :2] = out[:, [1, 0]]
        if hit and self.fault == "gradient":
            out[1].zero_()
        return out


def in_each_step(monkeypatch, wrong: Kernels) -> Kernels:
    """Its calls counted anew in each small step."""
    gradients = precision._gradients

    def counted(*args):
        wrong.calls = 0
        return gradients(*args)

    monkeypatch.setattr(precision, "_gradients", counted)
    return wrong


def cut(x: torch.Tensor) -> torch.Tensor:
    """float32 cut to the 10 bits of mantissa of TF32, as tensor cores read it: twice as coarse as rounding."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def library(monkeypatch):
    """float32 by the library's convolutions, as on a GPU."""
    monkeypatch.setattr("fastsrgan.model.layers.by_hand", lambda x: x.dtype == torch.float64)
    monkeypatch.setattr("fastsrgan.train.critic_step._fast", lambda x, dtype: dtype == torch.float64)


def arithmetic(kind) -> Arithmetic:
    return Arithmetic(CPU, tf32=True) if kind == TF32 else Arithmetic(CPU, kind)


KINDS = [torch.float32, torch.bfloat16, torch.float16, TF32]


class OneByOne(TorchDispatchMode):
    """float32 convolutions and their weights' gradients with every sum in one accumulator, product by product.

    No order of a sum rounds more often. Products and sums of single arrays have the same bits on every processor.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in (CONVOLUTION, BACKWARD) or args[1].dtype != torch.float32:
            return out
        back = func == BACKWARD
        x, weight = args[1 if back else 0], args[2 if back else 1]
        stride, padding, transposed = args[4 if back else 3], args[5 if back else 4], args[7 if back else 6]
        if transposed:
            return out
        x = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
        for d, k in enumerate(weight.shape[2:]):
            x = x.unfold(2 + d, k, stride[d])
        b, _, *grid = x.shape[:5]
        columns = x.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(b * math.prod(grid), -1)
        if not back:
            sums = one_by_one(columns.T, weight.flatten(1).T)  # (voxels, O)
            out.copy_(sums.view(b, *grid, -1).movedim(-1, 1))
            if args[2] is not None:
                out += args[2].view(-1, 1, 1, 1)
        elif args[10][1]:
            out[1].copy_(one_by_one(args[0].movedim(1, -1).flatten(0, 3), columns).view_as(weight))
        return out


def one_by_one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n, p), (n, q) -> (p, q): the sum over n of the products, one after the other."""
    sums = a.new_zeros(a.shape[1], b.shape[1])
    for row, other in zip(a.contiguous(), b.contiguous(), strict=True):
        sums += row[:, None] * other
    return sums


@functools.cache
def exact_gradients(seed: int) -> dict[str, torch.Tensor]:
    """In float64: the same for every kind."""
    return precision._gradients(Arithmetic(CPU, torch.float64), None, seed)


@contextlib.contextmanager
def without_onednn():
    """As ``torch.backends.mkldnn.flags``, which sets TF32 as well and so warns."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_limits_are_near_what_sound_arithmetic_gives(library, kind):
    """At most twice the worst of two seeds, with a tenth for the sums of other processors.

    By the library as this processor has it, and without oneDNN, whose kernels differ from one to the other: the same
    bits on all of them.
    """
    worst: dict[str, float] = {}
    oneself = functools.partial(Kernels, tf32=kind == TF32)
    ways = [(oneself,), (oneself, without_onednn), *([(OneByOne,)] if kind == torch.float32 else [])]
    for seed in (1, 2):
        exact = exact_gradients(seed)
        for way in ways:
            kernels = arithmetics.Kernels()
            with contextlib.ExitStack() as stack:
                for context in way:
                    stack.enter_context(context())
                found = precision._gradients(arithmetic(kind), kernels, seed)
            off = {name: arithmetics.relative(found[name].double(), exact[name]) for name in exact}
            for name, value in {**off, "kernels": max(kernels.off.values())}.items():
                worst[name] = max(worst.get(name, 0.0), value)
    limits = {"kernels": arithmetics.KERNEL_LIMITS, **precision.NETWORK_LIMITS}
    for name, value in worst.items():
        assert value <= limits[name][kind] <= 2.2 * value, worst


def test_the_limit_of_float32_is_what_rounding_comes_to():
    """At most twice 2^-24 sqrt(n / 6): n roundings of up to half a last bit, evenly, of partial sums that grow as the
    root of their length; n = 2 * 16^3, the products of the longest sum, a weight's gradient. Not below it either."""
    assert 1 <= arithmetics.KERNEL_LIMITS[torch.float32] / (2.0**-24 * (2 * 16**3 / 6) ** 0.5) <= 2  # found: 1.63


FORWARD = zip(KINDS, ("tap", "tap", "channels", "channels"), strict=True)  # one limit refuses both


@pytest.mark.parametrize(("kind", "fault"), [*FORWARD, *((kind, "gradient") for kind in KINDS)])
def test_one_wrong_kernel_is_refused_by_the_limit_on_kernels(fresh, library, monkeypatch, kind, fault):
    """One call among the forty of each step, in the middle of the generator, with no help from the other limit."""
    monkeypatch.setattr(
        precision, "NETWORK_LIMITS", dict.fromkeys(("generator", "critic"), dict.fromkeys(KINDS, float("inf")))
    )
    name = "weight gradients" if fault == "gradient" else "convolutions"
    wrong = in_each_step(monkeypatch, Kernels(fault, at=20, tf32=kind == TF32))
    with wrong, pytest.raises(ResourceError, match=f"{name} are off by"):
        self_test(arithmetic(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("network", "at"), [("critic", 0), ("generator", 10)])
def test_one_wrong_kernel_is_refused_by_the_limit_on_networks(fresh, library, monkeypatch, kind, network, at):
    """Two channels change places behind the critic's first convolution, or the generator's second; no other limit."""
    monkeypatch.setattr(precision, "KERNEL_LIMITS", dict.fromkeys(KINDS, float("inf")))
    wrong = in_each_step(monkeypatch, Kernels("channels", at, tf32=kind == TF32))
    with wrong, pytest.raises(ResourceError, match=f"{network} gradients are off by"):
        self_test(arithmetic(kind))


def test_gradients_that_are_off_for_one_draw_of_values_alone_are_no_fault(fresh, library, monkeypatch):
    """A value near a kink, which rounding takes to its other side: not the device's fault, and rare."""
    monkeypatch.setattr(precision, "KERNEL_LIMITS", dict.fromkeys(KINDS, float("inf")))
    with Kernels("channels", at=10):  # in the first step
        off = self_test(arithmetic(torch.float32))
    assert off["generator"] <= precision.NETWORK_LIMITS["generator"][torch.float32]


def test_float32_with_operands_cut_to_tf32_is_refused(fresh, library):
    """What cuDNN does by default, where TF32 was not asked for; where it was, the same products are right."""
    with Kernels(tf32=True), pytest.raises(ResourceError, match=r"(convolutions|gradients) are off by"):
        self_test(Arithmetic(CPU, torch.float32))
    with Kernels(tf32=True):
        assert self_test(arithmetic(TF32))["convolutions"] <= arithmetics.KERNEL_LIMITS[TF32]
    with Kernels(tf32=True), pytest.raises(ResourceError, match="convolutions are off by"):
        inference_test(CPU, torch.float32)


def test_each_type_is_held_to_its_own_limit():
    """That TF32 is on loosens what is asked of float32, of no other type."""
    kinds = [(torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.float16, True)]
    kinds += [(torch.bfloat16, False), (torch.bfloat16, True)]
    for dtype, tf32 in kinds:
        limit = arithmetics.KERNEL_LIMITS[TF32 if tf32 and dtype == torch.float32 else dtype]
        device = Arithmetic(CPU, dtype, tf32=tf32)
        arithmetics.refuse(device, {"convolutions": limit}, arithmetics.KERNEL_LIMITS)
        for value in (1.01 * limit, math.nan):
            with pytest.raises(ResourceError, match=f"{limit} allowed"):
                arithmetics.refuse(device, {"convolutions": value}, arithmetics.KERNEL_LIMITS)


class Operands(TorchDispatchMode):
    """A tensor core: operands of float32 convolutions rounded to a half type, products summed in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (CONVOLUTION, BACKWARD) and args[1].dtype == self.dtype:
            wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
            out = func(*wide, **(kwargs or {}))
            narrow = tuple(None if o is None else o.to(self.dtype) for o in (out if isinstance(out, tuple) else (out,)))
            return narrow if isinstance(out, tuple) else narrow[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_rounded_to_half_precision_pass(fresh, library, dtype):
    with Operands(dtype):
        off = self_test(Arithmetic(CPU, dtype))
        assert inference_test(CPU, dtype)["convolutions"] <= arithmetics.KERNEL_LIMITS[dtype]
    assert all(off[name] <= precision.NETWORK_LIMITS[name][dtype] for name in ("generator", "critic"))


def test_tf32_that_is_not_asked_for_is_off_during_the_test(fresh, monkeypatch):
    seen = []
    gradients = precision._gradients

    def spied(arithmetic, *more):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return gradients(arithmetic, *more)

    monkeypatch.setattr(precision, "_gradients", spied)
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = True
        precision._expected(1)
        seen.clear()
        self_test(Arithmetic(CPU, torch.float32))
        assert seen == [(False, False)]
        assert all(place.allow_tf32 for place in places), "as before afterwards"
    finally:
        for place, was in zip(places, before, strict=True):
            place.allow_tf32 = was


SESSIONS = {
    "as torch begins": "pass",
    "Lightning's advice": "torch.set_float32_matmul_precision('high')",
    "products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "all": "torch.backends.fp32_precision = 'tf32'",
    "all of cuDNN": "torch.backends.cudnn.fp32_precision = 'tf32'",
    "no convolutions": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "no convolutions, by the old name": "torch.backends.cudnn.allow_tf32 = False",
}
IN_SESSIONS = """
import os, sys, torch
from fastsrgan.core.kernels import rounding, set_rounding

def now():
    return [place.fp32_precision for place in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]

for session in sys.argv[1:]:
    if os.fork():
        assert not os.wait()[1], session
        continue
    exec(session)
    before = now()
    for tf32, name in ((False, "ieee"), (True, "tf32")):
        with rounding(tf32):
            assert now() == [name] * 2
        assert now() == before
    set_rounding(False)
    assert now() == ["ieee"] * 2
    os._exit(0)
"""


def test_tf32_is_as_asked_whatever_a_session_set_by_torchs_old_names_or_its_new_ones():
    """torch raises where one of the old switches is read that a new one contradicts, and "all" wins over an old one."""
    command = [sys.executable, "-c", IN_SESSIONS, *SESSIONS.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("fault", ["tap", "channels"])
def test_inference_refuses_a_wrong_kernel(fresh, fault):
    assert inference_test(CPU, torch.bfloat16)["convolutions"] <= arithmetics.KERNEL_LIMITS[torch.bfloat16]
    inference_test.cache_clear()
    with Kernels(fault, at=5), pytest.raises(ResourceError, match="convolutions are off by"):
        inference_test(CPU, torch.bfloat16)


def breaks(monkeypatch, dtype: torch.dtype, change) -> None:
    """Wrong convolutions in one type, as some cuDNN releases had them."""
    right = F.conv3d

    def wrong(x, weight, *args, **kwargs):
        y = right(x, weight, *args, **kwargs)
        return change(y) if y.dtype == dtype else y

    monkeypatch.setattr(F, "conv3d", wrong)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: torch.cat([y[:1], 0 * y[1:]]),  # the second sample is not computed
        lambda y: y * torch.where(torch.arange(y.shape[1]) == 1, 2.0, 1.0)[:, None, None, None].to(y.dtype),
        lambda y: y.roll(1, -1),
        lambda y: y * float("nan"),
    ],
    ids=["sample", "channel", "shift", "nan"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_convolutions_are_refused(fresh, monkeypatch, dtype, change):
    breaks(monkeypatch, dtype, change)
    with pytest.raises(ResourceError, match=r"computes wrong convolutions: .* off by .*--device cpu"):
        self_test(Arithmetic(CPU, dtype))


def test_a_device_that_fails_is_named(fresh, monkeypatch):
    def fails(y):
        raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED\nmore lines")

    breaks(monkeypatch, torch.bfloat16, fails)
    with pytest.raises(ResourceError, match=r"a small training step failed: CUDNN_STATUS_EXECUTION_FAILED \("):
        Models(CONFIG.replace(precision="bf16"), 0, CPU)


def test_the_oracles_own_arithmetic_is_not_tested_anew(monkeypatch):
    monkeypatch.setattr(precision, "self_test", lambda arithmetic: pytest.fail("float32 on the CPU is the oracle"))
    assert Models(CONFIG.replace(precision="fp32"), 0, CPU).arithmetic.proven


def test_the_self_test_names_a_cudnn_release_that_is_slow_in_half_precision(monkeypatch, caplog):
    exact = {name: torch.ones(3, dtype=torch.float64) for name in ("generator", "critic")}
    monkeypatch.setattr(precision, "_gradients", lambda *of: exact)
    monkeypatch.setattr(precision, "_expected", lambda seed: exact)
    for version, dtype, told in (
        (90799, torch.bfloat16, False),
        (90800, torch.bfloat16, True),
        (91002, torch.float16, True),
        (91002, torch.float32, False),
        (91500, torch.bfloat16, False),
    ):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda v=version: v)
        self_test.cache_clear()
        caplog.clear()
        self_test(Arithmetic(torch.device("cuda", 0), dtype))
        assert ("several times slower" in caplog.text) is told, (version, dtype)
    self_test.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_only_half_types_are_cast_to_and_torch_warns_of_none(recwarn, dtype):
    """Float64, that of the self-test's truth, brought a warning about autocast at the beginning of every training."""
    with Arithmetic(torch.device("cpu"), dtype).autocast():
        assert torch.is_autocast_enabled("cpu") is (dtype == torch.bfloat16)
    assert not recwarn.list


def test_an_arithmetic_says_what_it_is():
    gpu = torch.device("cuda")
    assert str(Arithmetic(gpu)) == "fp32, contiguous"
    assert str(Arithmetic(gpu, tf32=True)) == "fp32 with TF32, contiguous"
    assert str(Arithmetic(gpu, torch.bfloat16, channels_last=True)) == "bf16, channels last"
