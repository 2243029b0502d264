"""Every fast layer equals its plain form: values and all gradients, in float64; rounding in float32."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsrgan.model import layers
from fastsrgan.model.cpu import doubling, fused, normed, spectral, winograd
from fastsrgan.model.networks import NETWORKS, GeneratorSpec, build_generator

TOLERANCE = 1e-12
EVEN = st.sampled_from([4, 6, 8, 10])
SIZES = st.sampled_from([2, 3, 4, 5, 7])
CONVOLUTIONS = {
    "3^3": (layers.conv3_reflect, 3),
    "7^3": (layers.conv7_reflect, 7),
    "halving": (layers.halving_conv, 3),
    "doubling": (layers.upsample_conv, 3),
}
drawn = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["cpu", "gpu", "other"])
def forms(request, monkeypatch):
    """The fast forms of a CPU, of CUDA, and of a CPU in half precision; Winograd's products however small the layer."""
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd, "MAX_WASTED", 1e9)
    if request.param != "cpu":
        monkeypatch.setattr(layers, "by_hand", lambda x: False)
    monkeypatch.setattr(layers, "for_gpu", lambda x: request.param == "gpu")
    return request.param


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


def both(convolution):
    """The fast form and the plain one."""
    return (lambda *a: convolution(*a, "fast")), (lambda *a: convolution(*a, "reference"))


@drawn
@given(st.tuples(EVEN, EVEN, EVEN), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_conv7(forms, size, inputs, outputs, batch):
    x, weight = random(0, batch, inputs, *size), random(1, outputs, inputs, 7, 7, 7)
    assert_equal_with_gradients(*both(layers.conv7_reflect), x, weight)


@drawn
@given(st.tuples(SIZES, SIZES, SIZES), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
def test_upsampling(forms, size, inputs, outputs, batch):
    x, weight = random(0, batch, inputs, *size), random(1, outputs, inputs, 3, 3, 3)
    assert_equal_with_gradients(*both(layers.upsample_conv), x, weight)


@drawn
@given(st.tuples(*[st.integers(2, 19)] * 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
def test_conv3(forms, size, inputs, outputs, batch):
    """Tiles of four outputs meet sizes that they do not divide, and axes of one or several matrices."""
    x, weight = random(0, batch, inputs, *size), random(1, outputs, inputs, 3, 3, 3)
    assert_equal_with_gradients(*both(layers.conv3_reflect), x, weight)


@drawn
@given(st.tuples(SIZES, SIZES, SIZES), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_halving(forms, size, inputs, outputs, batch):
    x, weight = random(0, batch, inputs, *size), random(1, outputs, inputs, 3, 3, 3)
    assert_equal_with_gradients(*both(layers.halving_conv), x, weight)


@drawn
@given(st.tuples(SIZES, SIZES, SIZES), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_instance_norm(forms, size, channels, batch, relu):
    norm = layers.InstanceNorm(channels, relu)
    x, scale, shift = random(0, batch, channels, *size), random(1, channels), random(2, channels)

    def run(form):
        return lambda x, s, t: torch.func.functional_call(norm, {"scale": s, "shift": t}, (x, form))

    assert_equal_with_gradients(run("fast"), run("reference"), x, scale, shift)


def steps(y):
    """Names of the steps of a backward pass, and whether any was written by hand."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    by_hand = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in seen)
    return {node.name().removesuffix("Backward0") for node in seen} - {"torch::autograd::AccumulateGrad"}, by_hand


@pytest.mark.parametrize("name", [*CONVOLUTIONS, "norm"])
def test_the_plain_form_is_made_of_torchs_own_steps_and_the_fast_one_is_another(forms, name):
    """Comparing them says nothing where one is the other; the plain one is the same wherever it is worked out."""
    function, kernel = CONVOLUTIONS.get(name, (layers.InstanceNorm(3).double(), 3))
    x, weight = random(0, 2, 3, 6, 4, 8).requires_grad_(), random(1, 2, 3, *(kernel,) * 3).requires_grad_()
    one = function if name != "norm" else lambda x, _, form="fast": function(x, form)
    (plain, by_hand), (fast, _) = steps(one(x, weight, "reference")), steps(one(x, weight))
    assert not by_hand
    if name != "norm":
        assert plain == {"Convolution", "ReflectionPad3D"} | ({"UpsampleNearest3D"} if name == "doubling" else set())
    # In half precision on a CPU torch's own is as fast.
    assert (fast == plain) == (forms == "other" and name in ("3^3", "halving"))
    numbers = x, random(2, 3), random(3, 3), weight
    (plain, by_hand), (fast, _) = (steps(norm_and(one, form)(*numbers)) for form in ("reference", "fast"))
    assert not by_hand and fast != plain


def norm_and(convolution, form, flat=None):
    """norm_conv as a function of all that has a gradient."""

    def run(x, scale, shift, weight):
        norm = layers.InstanceNorm(x.shape[1])
        del norm.scale, norm.shift
        norm.scale, norm.shift = scale, shift
        return layers.norm_conv(x, norm, weight, convolution, form, flat)

    return run


@pytest.mark.parametrize(("parts", "outputs"), [("whole", 4), ("parts", 4), ("parts", 2)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_norm_and_convolution_in_one(forms, name, parts, outputs, monkeypatch):
    """A constant channel, a sample that is flat, and memory for a channel and a sample at a time or for all.

    Of seven taps the side with more channels is the one that goes in parts.
    """
    if parts == "parts":
        monkeypatch.setattr(normed, "BLOCK", 1)
        monkeypatch.setattr(fused, "HELD_BYTES", 1)
        monkeypatch.setattr(spectral, "HELD_BYTES", 1)
    convolution, kernel = CONVOLUTIONS[name]
    x = random(0, 5, 3, 4, 6, 8) + 3
    x[1, 2] = 0.5
    flat = torch.zeros(5, 1, 1, 1, 1, dtype=torch.bool)
    flat[3] = True
    inputs = x, random(1, 3), random(2, 3), random(3, outputs, 3, *(kernel,) * 3)
    assert_equal_with_gradients(norm_and(convolution, "fast", flat), norm_and(convolution, "reference", flat), *inputs)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_gets_no_gradient_and_changes_none(name, frozen):
    convolution, kernel = CONVOLUTIONS[name]
    inputs = {"x": random(0, 2, 3, 4, 6, 4), "weight": random(1, 2, 3, *(kernel,) * 3)}
    gradients = []
    for form in layers.FORMS:
        leaves = {k: v.clone().requires_grad_(k != frozen) for k, v in inputs.items()}
        convolution(**leaves, form=form).square().sum().backward()
        assert leaves.pop(frozen).grad is None
        gradients.extend(v.grad for v in leaves.values())
    assert torch.allclose(*gradients, rtol=0, atol=1e-14 * gradients[1].abs().max())  # found: 6e-16


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_norm_and_convolution_keep_one_array(name, monkeypatch):
    """Between the passes: x, the weight, numbers of each channel; Winograd's values where they stand for the result."""
    convolution, kernel = CONVOLUTIONS[name]
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    x, weight = random(0, 2, 4, 12, 8, 8).requires_grad_(), random(1, 4, 4, *(kernel,) * 3).requires_grad_()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layers.norm_conv(x, layers.InstanceNorm(4).double(), weight, convolution)
    values = 6**3 / 4**3 if name == "3^3" else 0
    assert sum(kept.values()) - weight.nbytes <= (1 + values) * x.nbytes + 1000
    y.sum().backward()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_x_is_written_over_only_without_gradients(name):
    convolution, kernel = CONVOLUTIONS[name]
    x, weight = random(0, 2, 3, 4, 4, 4), random(1, 2, 3, *(kernel,) * 3)
    norm = layers.InstanceNorm(3).double()
    before = x.clone()
    with_gradients = layers.norm_conv(x, norm, weight, convolution)
    assert torch.equal(x, before)
    with torch.no_grad():
        # Found: 0 (rounding)
        assert torch.allclose(layers.norm_conv(x, norm, weight, convolution), with_gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_second_derivative_is_refused_rather_than_wrong(name):
    convolution, kernel = CONVOLUTIONS[name]
    x = random(0, 1, 1, 4, 4, 4).requires_grad_()
    y = layers.norm_conv(x, layers.InstanceNorm(1).double(), random(1, 2, 1, *(kernel,) * 3), convolution)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "size"),
    [("3^3", 64, 64, 12), ("7^3", 16, 2, 12), ("7^3", 1, 16, 12), ("halving", 16, 32, 16), ("doubling", 32, 16, 8)],
)
def test_float32_rounds_little_more_than_the_plain_form(name, inputs, outputs, size):
    """The layers of the paper's generator: values and gradients within 5e-6 of the largest, 10 x the plain form's."""
    convolution, kernel = CONVOLUTIONS[name]
    x = random(0, 2, inputs, size, size, size).relu()
    weight = random(1, outputs, inputs, *(kernel,) * 3) / (inputs * kernel**3) ** 0.5

    def run(form, dtype):
        leaves = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        y = convolution(*leaves, form)
        return [y.detach(), *torch.autograd.grad(y, leaves, random(2, *y.shape).to(dtype))]

    truth = run("reference", torch.float64)
    errors = {
        form: [
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(run(form, torch.float32), truth, strict=True)
        ]
        for form in layers.FORMS
    }
    for fast, plain in zip(errors["fast"], errors["reference"], strict=True):
        assert fast <= min(5e-6, 10 * plain), errors  # found: 3.4e-6, 8.1 times


def test_a_large_mean_costs_no_more_digits_than_it_must():
    """mean 1000, deviation 1: float32 has 6e-5 of it left; sums of squares would have lost all."""
    x = (1000 + random(0, 2, 3, 16, 16, 16)).float()
    norm = layers.InstanceNorm(3, relu=False)
    with torch.no_grad():
        assert (norm(x) - norm.double()(x.double(), "reference")).abs().max() <= 2e-4  # found: 6.8e-5


def test_the_forms_by_hand_are_for_full_precision_on_the_cpu():
    x = torch.zeros(1)
    assert layers.by_hand(x) and layers.by_hand(x.double())
    assert not layers.by_hand(x.half()) and not layers.by_hand(x.bfloat16()) and not layers.by_hand(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not layers.by_hand(x)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_lone_small_image_is_convolved_alike(stride):
    x, weight = random(0, 1, 3, 9, 8, 7).float(), random(1, 4, 3, 3, 3, 3).float()
    wanted = F.conv3d(x.double(), weight.double(), stride=stride)
    assert (doubling.convolve(x, weight, stride) - wanted).abs().max() <= 1e-5  # found: 9.3e-6
    assert torch.equal(doubling.convolve(x.double(), weight.double(), stride), wanted)


@given(st.integers(1, 700))
def test_transforms_have_even_sizes_with_small_prime_factors(n):
    def fits(m):
        for p in (2, 3, 5, 7):
            while m % p == 0:
                m //= p
        return m == 1

    size = spectral.good_size(n)
    assert size >= n and size % 2 == 0 and fits(size)
    assert not any(fits(m) for m in range(n + n % 2, size, 2))


def test_instance_norm_is_the_originals_formula():
    """Biased variance, 1e-7 added to the standard deviation: a channel with little contrast shows it."""
    x = 1e-7 * random(0, 2, 3, 4, 4, 4) + 1
    norm = layers.InstanceNorm(3, relu=False)
    mean, std = x.mean((2, 3, 4), keepdim=True), x.std((2, 3, 4), keepdim=True, unbiased=False)
    for form in layers.FORMS:
        assert torch.allclose(norm.double()(x, form), (x - mean) / (std + 1e-7), rtol=1e-6)  # found: 5.7e-7


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e4])
def test_instance_norm_of_constant_patches_has_finite_gradients(value):
    norm = layers.InstanceNorm(2)
    with torch.no_grad():
        norm.shift.fill_(0.5)
    x = torch.full((1, 2, 4, 4, 4), value, requires_grad=True)
    y = norm(x)
    assert torch.allclose(y, torch.full_like(y, 0.5), atol=1e-3)  # found: 0
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
        # Found: 0 (rounding)
        assert torch.allclose(layers.upsample_conv(x, weight, form), F.interpolate(x, scale_factor=2), atol=1e-15)


# --- whole generators ---------------------------------------------------------------------------------------------

SPECS = [
    GeneratorSpec(network, 3, residual, conditional, classes, scaled)
    for network in NETWORKS
    for residual, conditional, classes, scaled in [
        (True, False, 0, False),
        (False, False, 2, True),
        (True, True, 0, True),
        (False, True, 3, False),
    ]
]
SHAPES = itertools.cycle([(12, 8, 16), (20, 8, 12), (8, 8, 28), (8, 36, 8)])


@pytest.mark.parametrize(("spec", "shape"), list(zip(SPECS, SHAPES, strict=False)), ids=str)
def test_generators_agree_in_both_forms(forms, spec, shape):
    x, res = random(0, 2, 1, *shape).abs(), torch.tensor([0.5, 3.0], dtype=torch.float64)
    results = []
    for form in layers.FORMS:
        generator = build_generator(spec, form, seed=3).double()
        for i, parameter in enumerate(p for p in generator.parameters() if p.ndim == 1):
            parameter.data = random(i, *parameter.shape)  # scales and shifts that matter
        image = x.clone().requires_grad_()
        y = generator(image, res if spec.conditional else None)
        (y * random(99, *y.shape)).sum().backward()
        results.append((y, {"x": image.grad, **{n: p.grad for n, p in generator.named_parameters()}}))
    (fast, fast_grads), (plain, plain_grads) = results
    assert (fast - plain).abs().max() <= TOLERANCE * plain.abs().max()
    # Some gradients are 0 but for rounding (a shift behind which another norm stands): relative to the largest of all.
    largest = max(g.abs().max() for g in plain_grads.values())
    for name, gradient in plain_grads.items():
        assert (fast_grads[name] - gradient).abs().max() <= TOLERANCE * largest, name


@pytest.mark.parametrize("shape", [(40, 8, 8), (8, 40, 12), (8, 12, 40)])
def test_long_axes_go_in_several_blocks_whose_results_are_put_together(poisoned, shape):
    """The convolution by points, forward and backward, against torch's; memory that is not written to is NaN."""
    assert max(len(a.inputs) for n in shape for a in [winograd._axis(n, torch.double, winograd.GATHER)]) > 1
    some = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, *shape, dtype=torch.double, generator=some).requires_grad_()
    weight = torch.randn(3, 2, 3, 3, 3, dtype=torch.double, generator=some).requires_grad_()
    plain = torch.nn.functional.conv3d(torch.nn.functional.pad(x, [1] * 6, mode="reflect"), weight)
    grad = torch.randn(plain.shape, dtype=torch.double, generator=some)
    expected = [plain, *torch.autograd.grad(plain, (x, weight), grad)]
    with torch.no_grad():
        out, values = winograd.forward(x, weight)
        found = [out, *winograd.backward(grad, values, weight, (True, True))]
    # Found: 3.4e-15
    assert all(float((a - b).detach().norm() / b.detach().norm()) < 1e-13 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("outputs", "inputs", "form"), [(fused.PLAIN_STEM, 1, "library"), (15, 1, "spectral"), (16, 2, "spectral")]
)
def test_from_sixteen_outputs_on_a_stem_is_a_plain_convolution(monkeypatch, outputs, inputs, form):
    chosen, plain = {}, fused.forms.choose
    monkeypatch.setattr(
        fused.forms,
        "choose",
        lambda what, shape, w, fixed, *rest: chosen.update({what: fixed}) or plain(what, shape, w, fixed, *rest),
    )
    with torch.no_grad():
        layers.conv7_reflect(torch.rand(1, inputs, 8, 8, 8), torch.rand(outputs, inputs, 7, 7, 7))
    assert chosen == {"conv7 forward": form}


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 2), (2, 5), (3, 3)])
def test_however_few_channels_go_together_a_spectral_convolution_is_the_plain_one(monkeypatch, inputs, outputs):
    """A cache that holds one channel's spectra: the groups' parts are summed, or put side by side."""
    monkeypatch.setattr(spectral, "HELD_BYTES", 1)
    x, weight = random(0, 2, inputs, 6, 4, 8), random(1, outputs, inputs, 7, 7, 7)
    assert len(spectral._Plan.of(x.shape, weight).groups) == max(inputs, outputs)
    grad, dx = random(2, 2, outputs, 6, 4, 8), torch.zeros_like(x)
    y = spectral.forward(x, weight)
    dw = spectral.backward(grad, x, weight, lambda where, part: dx.__setitem__(where, part), True)
    leaves = [x.clone().requires_grad_(True), weight.clone().requires_grad_(True)]
    plain = layers.conv7_reflect(*leaves, "reference")
    for got, wanted in zip((y, dx, dw), (plain, *torch.autograd.grad(plain, leaves, grad)), strict=True):
        assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
