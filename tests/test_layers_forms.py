"""Every fast layer equals its plain form: values and all gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsrgan import layers
from fastsrgan.networks import GENERATORS, GeneratorSpec, build_generator

TOLERANCE = 1e-12
EVEN = st.sampled_from([4, 6, 8, 10])
SIZES = st.sampled_from([2, 3, 4, 5, 7])


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_equal_with_gradients(fast, plain, *inputs):
    """Same value and same gradient for every input, relative to the largest value of each kind."""
    results = []
    for function in (fast, plain):
        leaves = [x.clone().requires_grad_(True) for x in inputs]
        value = function(*leaves)
        weights = random(99, *value.shape)  # another gradient at every voxel
        results.append([[value], torch.autograd.grad((value * weights).sum(), leaves)])
    for got, wanted in zip(*results, strict=True):
        largest = max(w.abs().max() for w in wanted)
        for g, w in zip(got, wanted, strict=True):
            assert g.shape == w.shape
            assert (g - w).abs().max() <= TOLERANCE * max(largest, 1)


@settings(max_examples=15, deadline=None)
@given(st.tuples(EVEN, EVEN, EVEN), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_conv7(size, inputs, outputs, batch):
    x, weight = random(0, batch, inputs, *size), random(1, outputs, inputs, 7, 7, 7)
    assert_equal_with_gradients(
        lambda x, w: layers.conv7_reflect(x, w, "fast"), lambda x, w: layers.conv7_reflect(x, w, "reference"), x, weight
    )


@settings(max_examples=15, deadline=None)
@given(st.tuples(SIZES, SIZES, SIZES), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
def test_upsampling(size, inputs, outputs, batch):
    x, weight = random(0, batch, inputs, *size), random(1, outputs, inputs, 3, 3, 3)
    assert_equal_with_gradients(
        lambda x, w: layers.upsample_conv(x, w, "fast"), lambda x, w: layers.upsample_conv(x, w, "reference"), x, weight
    )


@settings(max_examples=15, deadline=None)
@given(st.tuples(SIZES, SIZES, SIZES), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_instance_norm(size, channels, batch, relu):
    norm = layers.InstanceNorm(channels, relu)
    x, scale, shift = random(0, batch, channels, *size), random(1, channels), random(2, channels)

    def run(form):
        return lambda x, s, t: torch.func.functional_call(norm, {"scale": s, "shift": t}, (x, form))

    assert_equal_with_gradients(run("fast"), run("reference"), x, scale, shift)


def test_instance_norm_is_the_originals_formula():
    """Biased variance, 1e-7 added to the standard deviation: a channel with little contrast shows it."""
    x = 1e-7 * random(0, 2, 3, 4, 4, 4) + 1
    norm = layers.InstanceNorm(3, relu=False)
    mean, std = x.mean((2, 3, 4), keepdim=True), x.std((2, 3, 4), keepdim=True, unbiased=False)
    for form in layers.FORMS:
        assert torch.allclose(norm.double()(x, form), (x - mean) / (std + 1e-7), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e4])
def test_instance_norm_of_constant_patches_has_finite_gradients(value):
    norm = layers.InstanceNorm(2)
    with torch.no_grad():
        norm.shift.fill_(0.5)
    x = torch.full((1, 2, 4, 4, 4), value, requires_grad=True)
    y = norm(x)
    assert torch.allclose(y, torch.full_like(y, 0.5), atol=1e-3)
    y.pow(2).sum().backward()
    for gradient in (x.grad, norm.scale.grad, norm.shift.grad):
        assert torch.isfinite(gradient).all()


def test_one_constant_channel_does_not_disturb_the_others():
    x = random(0, 2, 3, 4, 4, 4)
    x[0, 1] = 2.0
    norm = layers.InstanceNorm(3).double()
    assert_equal_with_gradients(lambda x: norm(x, "fast")[:, ::2], lambda x: norm(x, "reference")[:, ::2], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_statistics_are_float32(dtype):
    """A mean of 50 with a deviation of 0.5 leaves bfloat16 four steps: sums in half precision would be far off."""
    x = (50 + 0.5 * random(0, 1, 2, 16, 16, 16)).to(dtype)
    norm = layers.InstanceNorm(2, relu=False)
    got, wanted = norm(x), norm(x.float())
    assert got.dtype == dtype
    assert (got.float() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()


def test_reflection_mirrors_without_repeating_the_edge():
    x = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 1, 4, 4, 4)
    assert layers.reflect_pad(x, 3)[0, 0, :, 0, 0].tolist() == [3, 2, 1, 0, 1, 2, 3, 2, 1, 0]


def test_convolution_correlates_and_keeps_size():
    """One tap at (0, 1, 2) of a 3^3 kernel looks one voxel back along x and one ahead along z."""
    x = random(0, 1, 1, 5, 6, 7)
    weight = torch.zeros(1, 1, 3, 3, 3, dtype=torch.float64)
    weight[0, 0, 0, 1, 2] = 1
    y = layers.conv_reflect(x, weight)
    assert y.shape == x.shape
    assert torch.equal(y[0, 0, 1:, :, :-1], x[0, 0, :-1, :, 1:])
    assert torch.equal(layers.conv_reflect(x, weight, stride=2), y[:, :, ::2, ::2, ::2])


def test_upsampling_repeats_each_voxel():
    weight = torch.zeros(1, 1, 3, 3, 3, dtype=torch.float64)
    weight[0, 0, 1, 1, 1] = 1
    x = random(0, 1, 1, 3, 4, 5)
    for form in layers.FORMS:
        assert torch.allclose(layers.upsample_conv(x, weight, form), F.interpolate(x, scale_factor=2), atol=1e-15)


# --- whole generators ---------------------------------------------------------------------------------------------

SPECS = [
    GeneratorSpec(network, 3, residual, conditional, classes)
    for network in GENERATORS
    for residual, conditional, classes in [(True, False, 0), (False, False, 2), (True, True, 0), (False, True, 3)]
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s.to_dict().values())))
def test_generators_agree_in_both_forms(spec):
    x, res = random(0, 2, 1, 12, 8, 16).abs(), torch.tensor([0.5, 3.0], dtype=torch.float64)
    results = []
    for form in layers.FORMS:
        generator = build_generator(spec, form, seed=3).double()
        for i, parameter in enumerate(p for p in generator.parameters() if p.ndim == 1):
            parameter.data = random(i, *parameter.shape)  # scales and shifts that matter
        y = generator(x, res if spec.conditional else None)
        (y * random(99, *y.shape)).sum().backward()
        results.append((y, {n: p.grad for n, p in generator.named_parameters()}))
    (fast, fast_grads), (plain, plain_grads) = results
    assert (fast - plain).abs().max() <= TOLERANCE * plain.abs().max()
    # Some gradients are 0 but for rounding (a shift behind which another norm stands): relative to the largest of all.
    largest = max(g.abs().max() for g in plain_grads.values())
    for name, gradient in plain_grads.items():
        assert (fast_grads[name] - gradient).abs().max() <= TOLERANCE * largest, name
