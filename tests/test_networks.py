"""Architectures: parameter counts, sizes, conditioning, initial values, refusals."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fastsrgan.core.draws import rng
from fastsrgan.errors import ModelError
from fastsrgan.model import networks
from fastsrgan.model.networks import Critic, CriticSpec, Generator, GeneratorSpec, build_generator, is_flat

ROOT = Path(__file__).parent.parent
SPECS = [
    GeneratorSpec(network, 2, residual, conditional, classes)
    for network in networks.NETWORKS
    for residual in (True, False)
    for conditional in (True, False)
    for classes in (0, 3)
]
IDS = ["-".join(map(str, s.to_dict().values())) for s in SPECS]


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_papers_generator_has_1_483_664_parameters():
    assert count(build_generator(GeneratorSpec(kernel=16))) == 1_483_664


def test_the_unets_head_sees_the_skip():
    k = 2
    unet = build_generator(GeneratorSpec("unet", k))
    assert tuple(unet.head.shape) == (2, 2 * k, 7, 7, 7)
    assert [tuple(b.conv_a.shape[:2]) for b in unet.blocks] == [(k, k), (2 * k, 2 * k), (4 * k, 4 * k)]


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_output_channels_and_ranges(spec):
    generator = build_generator(spec, seed=1).eval()
    x = random(2, 1, 8, 12, 16)
    with torch.no_grad():
        y = generator(x, 3.0 if spec.conditional else None)
        head = generator.raw(x, 3.0 if spec.conditional else None)
    assert y.shape == (2, 2 + spec.mask_classes, 8, 12, 16)
    sr = x - head[:, :1] if spec.residual else head[:, :1]  # minus, as in the original; the paper says summed
    assert torch.equal(y[:, :1], sr)
    assert torch.allclose(y[:, 1:2], 1 / (1 + torch.exp(-head[:, 1:2])), atol=1e-6)  # found: 1.2e-7
    if spec.mask_classes:
        assert torch.allclose(y[:, 2:].sum(1), torch.ones(2, 8, 12, 16), atol=1e-6)  # found: 1.8e-7
        assert torch.allclose(y[:, 2:].log().diff(dim=1), head[:, 2:].diff(dim=1), atol=2e-6)  # found: 4.8e-7


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_a_batch_is_its_samples(network):
    generator = build_generator(GeneratorSpec(network, 2)).double()
    x = random(3, 1, 8, 8, 12).double()
    with torch.no_grad():
        together, alone = generator(x), torch.cat([generator(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)  # found: 0 (rounding)


def test_a_head_of_zero_returns_the_input():
    generator = build_generator(GeneratorSpec(kernel=2))
    with torch.no_grad():
        generator.head.zero_()
        x = random(1, 1, 8, 8, 8)
        y = generator(x)
    assert torch.equal(y[:, :1], x)
    assert torch.equal(y[:, 1:], torch.full_like(x, 0.5))


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_the_stem_does_not_see_a_constant_offset(network):
    """The stem's norm removes the mean of the input and of the resolution, so float32 must not suffer from them."""
    generator = build_generator(GeneratorSpec(network, 2, conditional=True), seed=2)
    x = (random(1, 1, 8, 8, 8) * 1024).round() / 1024  # exact in float32 with 50 added
    with torch.no_grad():
        wanted, got = generator.raw(x, 0.5), generator.raw(x + 50, 1000.0)
    assert (got - wanted).abs().max() <= 5e-6 * wanted.abs().max()  # found: 1.4e-6


def with_shifts(network, form):
    """A generator whose norms have scales and shifts, as after training."""
    generator = build_generator(GeneratorSpec(network, 2), form, seed=1)
    for i, parameter in enumerate(p for p in generator.parameters() if p.ndim == 1):
        parameter.data = random(*parameter.shape, seed=i) + 0.5
    return generator


@pytest.mark.parametrize("form", ["fast", "reference"])
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_constant_patches_give_constants_and_finite_gradients(network, form):
    """A norm of rounding is noise of unit variance, and 17 gradients of 1e7 overflow: background must do neither."""
    generator = with_shifts(network, form)
    ringing = 1e-9 * random(1, 1, 8, 8, 8)  # what a spline leaves far from the head
    for x in (torch.zeros(1, 1, 8, 8, 8), torch.full((1, 1, 8, 8, 8), 0.7), ringing):
        y = generator(x)
        assert (y.amax((2, 3, 4)) - y.amin((2, 3, 4))).max() <= 1e-6  # found: 1.2e-7
        with torch.no_grad():
            other = with_shifts(network, "reference").double()(x.double())
        assert (y - other).abs().max() <= 2e-6  # found: 6.6e-7
        y.pow(2).sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad.abs().max() <= 1e6, name  # found: 2.18e4


def test_flat_is_what_differs_by_float32s_resolution_in_every_channel():
    x = torch.zeros(4, 2, 8, 8, 8)
    for sample, (first, second) in enumerate(((0, 0), (2.0**-23, 2.0**-23), (2.0**-22, 0), (0, 2.0**-22))):
        x[sample, 0, 3, 3, 3], x[sample, 1, 5, 5, 5] = first, second
    assert is_flat(x).flatten().tolist() == [True, True, False, False]


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_a_constant_patch_does_not_change_its_neighbours_in_the_batch(network):
    generator = with_shifts(network, "fast").double()
    x = torch.cat([random(1, 1, 8, 8, 8), torch.full((1, 1, 8, 8, 8), 0.3)]).double()
    with torch.no_grad():
        assert torch.allclose(generator(x)[:1], generator(x[:1]), rtol=0, atol=1e-12)  # found: 0 (rounding)


@pytest.mark.parametrize("shape", [(8, 8, 10), (9, 8, 8), (4, 8, 8), (8, 0, 8), (8, 8, 7)])
def test_sizes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ModelError, match=r"multiple of 4.*at least 8") as error:
        build_generator(GeneratorSpec(kernel=1))(torch.zeros(1, 1, *shape))
    assert " x ".join(map(str, shape)) in str(error.value)


@pytest.mark.parametrize("res", [2.0, torch.tensor(2.0), torch.tensor([2.0, 2.0]), torch.full((2, 1, 8, 8, 8), 2.0)])
def test_the_resolution_may_be_a_scalar_a_vector_or_a_volume(res):
    x = random(2, 1, 8, 8, 8)
    assert torch.equal(networks.resolution_channel(x, res), torch.full((2, 1, 8, 8, 8), 2.0))
    generator = build_generator(GeneratorSpec(kernel=1, conditional=True))
    with torch.no_grad():
        assert torch.equal(generator(x, res), generator(x, 2.0))


def test_each_sample_gets_its_own_resolution():
    x = random(2, 2, 16, 16, 16)
    critic = Critic(CriticSpec(2, 16, conditional=True), seed=4)
    with torch.no_grad():
        both = critic(x, torch.tensor([0.5, 3.0]))
        assert torch.allclose(both[0], critic(x[:1], 0.5)[0], atol=1e-6)  # found: 3.7e-9 (rounding)
        assert torch.allclose(both[1], critic(x[1:], 3.0)[0], atol=1e-6)  # found: 3e-8 (rounding)
        assert not torch.allclose(both[0], critic(x[:1], 3.0)[0], atol=1e-3)  # found: 0.21


def test_conditional_networks_ask_for_the_resolution():
    with pytest.raises(ModelError, match="slice thickness"):
        build_generator(GeneratorSpec(kernel=1, conditional=True))(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ModelError, match="slice thickness"):
        Critic(CriticSpec(1, 16, conditional=True))(torch.zeros(1, 2, 16, 16, 16))


# --- critic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", range(16, 129, 4))
def test_every_patch_size_gives_one_value(patch):
    critic = Critic(CriticSpec(1, patch))
    with torch.no_grad():
        assert critic(torch.zeros(1, 2, patch, patch, patch)).shape == (1, 1)


def test_the_critic_of_a_64_patch_is_the_papers():
    with torch.device("meta"):
        critic = Critic(CriticSpec())
    assert [tuple(w.shape[:2]) for w in critic.convs] == [(32, 2), (64, 32), (128, 64), (256, 128), (512, 256)]
    assert all(tuple(w.shape[2:]) == (4, 4, 4) for w in critic.convs)
    assert tuple(critic.decision.shape) == (1, 512, 2, 2, 2)
    assert {CriticSpec(1, p).depth for p in range(36, 65, 4)} == {5}


def test_the_critic_takes_segmentation_classes_and_resolution():
    critic = Critic(CriticSpec(2, 16, in_channels=5, conditional=True))
    assert critic.convs[0].shape[1] == 6
    with torch.no_grad():
        assert critic(random(3, 5, 16, 16, 16), torch.tensor([1.0, 2.0, 3.0])).shape == (3, 1)


@pytest.mark.parametrize("n", range(2, 20))
def test_padding_is_tensorflows_same(n):
    """TensorFlow: ceil(n / 2) outputs, the padding they need split with the odd voxel behind."""
    kernel, out = 4, -(-n // 2)
    total = max((out - 1) * 2 + kernel - n, 0)
    x = np.zeros(total + n)
    x[total // 2 : total // 2 + n] = np.arange(1, n + 1)
    wanted = [x[2 * i : 2 * i + kernel].sum() for i in range(out)]
    line = torch.arange(1.0, n + 1).view(1, 1, n, 1, 1).expand(1, 1, n, 2, 2).clone()
    line[..., 1:, :], line[..., 1:] = 0, 0
    got = torch.nn.functional.conv3d(networks.same_pad(line), torch.ones(1, 1, 4, 4, 4), stride=2)
    assert got[0, 0, :, 0, 0].tolist() == wanted


def test_the_leak_is_one_hundredth():
    critic = Critic(CriticSpec(1, 16))
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.fill_(0)
        critic.biases[-1].fill_(-1.0)
        critic.decision.fill_(1.0)
        assert critic(random(1, 2, 16, 16, 16)).item() == pytest.approx(critic.decision.numel() * -0.01)


# --- initial values and refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda s: build_generator(GeneratorSpec(kernel=2), seed=s), lambda s: Critic(CriticSpec(2), s)]
)
def test_a_seed_fixes_the_initial_values(make):
    torch.manual_seed(1)
    first = make(5).state_dict()
    torch.manual_seed(2)
    again, other = make(5).state_dict(), make(6).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(
    ("module", "gain"),
    [(build_generator(GeneratorSpec(kernel=8)), 1), (Critic(CriticSpec(8, 32)), 2)],
    ids=["lecun", "he"],
)
def test_initial_kernels_are_keras_truncated_normals(module, gain):
    """Variance gain / fan_in after the cut at two standard deviations; no kernel is another one's beginning."""
    for parameter in module.parameters():
        if parameter.ndim == 5 and parameter.numel() > 2000:
            std = (gain / parameter[0].numel()) ** 0.5
            assert parameter.std().item() == pytest.approx(std, rel=0.06)  # found: 0.015
            assert parameter.abs().max().item() <= 2 * std / 0.8796 + 1e-6  # rounding; found: 2.9e-6 below
    kernels = [p.detach().flatten()[:8] / p[0].numel() ** -0.5 for p in module.parameters() if p.ndim == 5]
    assert all(not torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(kernels) for b in kernels[:i])  # found: 1.7


def test_truncated_normals_have_their_distribution():
    """Against the distribution function between -2 and 2, at the 1e-4 level of Kolmogorov's test."""
    values = networks.truncated_normal(rng(3, "test"), 200_000)
    assert np.abs(values).max() <= 2
    assert stats.kstest(values, stats.truncnorm(-2, 2).cdf).pvalue > 1e-4  # found: 0.31
    assert values.std() == pytest.approx(
        0.87962566103423978, rel=5e-3
    )  # what ``init_normal`` divides by; found: 0.0012


def test_a_seed_gives_the_same_bits_on_every_processor():
    """Under torch's plain instruction set, and as they were when this was written."""
    program = (
        "import hashlib; from fastsrgan.model.networks import *;"
        "made = (build_generator(GeneratorSpec(kernel=3), seed=7), Critic(CriticSpec(3, 16), seed=7));"
        "print(*(hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for m in made for p in m.parameters()))"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    made = (build_generator(GeneratorSpec(kernel=3), seed=7), Critic(CriticSpec(3, 16), seed=7))
    here = [hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for m in made for p in m.parameters()]
    assert done.stdout.split() == here
    assert hashlib.sha256("".join(here).encode()).hexdigest()[:16] == "62132c700e46bf1a"


@pytest.mark.parametrize(
    "make",
    [
        lambda: GeneratorSpec("resnet"),
        lambda: GeneratorSpec(kernel=0),
        lambda: GeneratorSpec(mask_classes=-1),
        lambda: CriticSpec(patch=12),
        lambda: CriticSpec(patch=66),
        lambda: build_generator(GeneratorSpec(kernel=1), form="quick"),
    ],
)
def test_specs_that_make_no_network_are_refused(make):
    with pytest.raises(ModelError):
        make()


def test_specs_are_plain_values():
    for spec in (GeneratorSpec("unet", 3, False, True, 2), CriticSpec(4, 32, 4, True)):
        assert type(spec)(**spec.to_dict()) == spec


@pytest.mark.parametrize("network", ["plain", "unet"])
def test_a_constant_resolution_changes_nothing(network):
    """Decision 010: the stem's norm removes what a constant channel adds, here and in the original."""
    generator = build_generator(GeneratorSpec(network, 3, conditional=True), seed=4).double()
    x = torch.rand(1, 1, 16, 16, 16, dtype=torch.double)
    assert (generator(x, 1.0) - generator(x, 4.0)).abs().max() < 1e-10  # found: 0 (rounding)


def test_a_scaled_head_makes_the_image_equivariant_and_leaves_the_segmentation():
    """Decision 011: the norms remove the input's scale, so a plain head corrects faint and strong images alike."""
    x = torch.rand(2, 1, 16, 20, 16, dtype=torch.double)
    for scaled in (False, True):
        generator = build_generator(GeneratorSpec(kernel=3, scaled=scaled), seed=5).double()
        y, faint = generator(x), generator(0.1 * x)
        assert (y[:, 1] - faint[:, 1]).abs().max() < 1e-6  # found: 8.2e-8 (rounding)
        correction = (x - y[:, :1], 0.1 * x - faint[:, :1])
        factor = 0.1 if scaled else 1.0
        # Found: 9.1e-8 (rounding)
        assert (correction[1] - factor * correction[0]).abs().max() < 1e-6 * correction[0].abs().max()


def test_in_plane_gradient_of_a_ramp_and_of_a_constant():
    x = torch.arange(8.0).reshape(1, 1, 8, 1, 1).expand(2, 1, 8, 8, 8) * torch.tensor([3.0, 0.0]).view(2, 1, 1, 1, 1)
    assert networks.in_plane_gradient(x).flatten().tolist() == [3.0, 0.0]
    through = torch.arange(8.0).expand(1, 1, 8, 8, 8)
    assert networks.in_plane_gradient(through).item() == 0.0


@pytest.mark.parametrize("scaled", [False, True])
def test_samples_one_by_one_at_full_resolution_are_the_batch(monkeypatch, scaled):
    generator = build_generator(GeneratorSpec(kernel=2, scaled=scaled), seed=1).double()
    x = torch.rand(3, 1, 12, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[1] = 0.25  # without contrast
    sizes = []
    enter = Generator._enter
    monkeypatch.setattr(Generator, "_enter", lambda self, x, flat: sizes.append(len(x)) or enter(self, x, flat))
    with torch.inference_mode():
        whole = generator(x)
        monkeypatch.setattr(networks, "ONE_BY_ONE", 1)
        parts = generator(x)
    assert sizes == [3, 1, 1, 1]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)  # found: 0 of it
    with torch.no_grad():  # training's passes stay whole
        generator(x)
    assert sizes[-1] == 3


def test_shapes_are_known_without_drawing_weights(monkeypatch):
    """Found as a fuzzed case: 13 s of draws for a file that only says that its network has 255 channels."""
    monkeypatch.setattr(networks, "truncated_normal", lambda *_: pytest.fail("weights were drawn"))
    for spec in (GeneratorSpec(kernel=5), CriticSpec(kernel=5, patch=32)):
        assert networks.skeleton(spec).state_dict().keys() == networks.parameter_shapes.__wrapped__(spec).keys()
    monkeypatch.undo()
    assert float(networks.build_generator(GeneratorSpec(kernel=5)).stem.std()) > 0
