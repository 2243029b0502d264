"""Types by capability, on faked devices; half precision end to end; the self-test refuses wrong convolutions."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from fastsrgan import precision
from fastsrgan.config import TrainConfig
from fastsrgan.errors import ResourceError
from fastsrgan.networks import Critic, CriticSpec, Generator, GeneratorSpec
from fastsrgan.optimise import Optimiser
from fastsrgan.pair import Models
from fastsrgan.pool import Batch
from fastsrgan.precision import Arithmetic, choose, native_bfloat16, self_test
from fastsrgan.step import generator_loss

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


@pytest.mark.parametrize(
    ("text", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 fma\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw fma\n", False),
        ("nothing of the kind\n", False),
    ],
)
def test_native_bfloat16_is_read_from_the_processors_flags(tmp_path, text, native):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + text, encoding="utf8")
    assert native_bfloat16(tmp_path / "cpuinfo") is native
    assert native_bfloat16(tmp_path / "absent") is False


def test_a_cpu_computes_in_bfloat16_only_where_it_can_or_must(monkeypatch, caplog):
    for native in (True, False):
        monkeypatch.setattr(precision, "native_bfloat16", lambda native=native: native)
        assert choose(CONFIG, CPU).dtype == (torch.bfloat16 if native else torch.float32)
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert choose(CONFIG.replace(precision="bf16"), CPU).dtype == torch.bfloat16
    assert "no native bfloat16" in caplog.text
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
        assert o["total"] == pytest.approx(f["total"], rel=0.05, abs=0.02)
        assert o["gradient"] == pytest.approx(f["gradient"], rel=0.3)
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
    return o.step(loss)


def test_a_scaled_step_is_the_unscaled_one():
    network, o = scaled()
    plain = torch.nn.Linear(3, 1, bias=False)
    plain.load_state_dict(network.state_dict())
    other = Optimiser(plain, 0.1, (0.5, 0.999), 1e-8)
    told = push(network, o)
    loss = plain(torch.ones(1, 3)).sum()
    loss.backward()
    assert torch.allclose(told["gradient"], other.step(loss)["gradient"])
    assert torch.allclose(network.weight, plain.weight)


def test_overflow_halves_the_scale_and_is_not_counted_as_a_bad_loss(monkeypatch):
    network, o = scaled()
    first, before = float(o.scale), network.weight.detach().clone()
    told = push(network, o, 1e36)
    assert (float(told["overflow"]), float(told["skipped"])) == (1, 0)
    assert float(o.scale) == first / 2 and torch.equal(network.weight, before)
    assert float(push(network, o, float("nan"))["skipped"]) == 1
    assert float(o.scale) == first / 4
    monkeypatch.setattr("fastsrgan.optimise.PATIENCE", 2)
    assert float(push(network, o)["overflow"]) == 0
    kept = o.state()
    push(network, o)
    assert float(o.scale) == first / 2 and not torch.equal(network.weight, before)
    _, other = scaled()
    other.load_state(kept)
    assert float(other.scale) == first / 2 and int(other.growth) == int(o.growth)


# --- self-test ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    self_test.cache_clear()
    yield
    self_test.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sound_device_passes_with_room(fresh, dtype):
    off = self_test(Arithmetic(CPU, dtype))
    assert set(off) == {"generator", "critic"}
    assert max(off.values()) < precision.TOLERANCE[dtype] / 1.5
    assert min(off.values()) > 0, "compared with itself"


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
