"""Networks, losses and gradients against what the original's own code computed (tests/golden/README.md)."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsrgan import losses
from fastsrgan.model.keras import weight_names
from fastsrgan.model.weights import load_critic, load_generator, read_spec
from fastsrgan.train.objectives import critic_loss, generator_loss

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = {
    "residual": ("plain", 4, True, False, 0),
    "nn_residual": ("plain", 2, False, False, 0),
    "cond": ("plain", 2, True, True, 0),
    "residual_mask3": ("plain", 2, True, False, 3),
    "u_net": ("unet", 3, True, False, 0),
    "u_net_nn_residual": ("unet", 2, False, False, 0),
    "u_net_cond": ("unet", 2, True, True, 0),
    "u_net_cond_nn_residual": ("unet", 2, False, True, 0),
}
LAMBDA_GP, LAMBDA_ADV, LR, BETAS = 10.0, 1e-3, 1e-4, (0.5, 0.999)


def golden(variant):
    """Path of the weights and the arrays of one variant."""
    with np.load(GOLDEN / f"io_{variant}.npz") as file:
        return GOLDEN / f"weights_{variant}.h5", dict(file)


def tensor(array):
    return torch.from_numpy(np.asarray(array, np.float32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_architecture_is_read_from_the_file(variant):
    generator, critic = read_spec(GOLDEN / f"weights_{variant}.h5")
    assert tuple(generator.to_dict().values()) == (*VARIANTS[variant], False)  # no scaled head there
    assert (critic is None) == (variant == "u_net_cond")
    if critic:
        assert (critic.depth, critic.in_channels) == (5, generator.out_channels)
        assert critic.conditional == generator.conditional


@pytest.mark.parametrize("form", ["fast", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_generators_give_the_originals_output(variant, form):
    path, io = golden(variant)
    wanted = io["g_output"]
    if variant == "u_net_cond":
        wanted = wanted[:, [0, 2]]  # the original subtracts from its resolution input too: one channel more
    with torch.no_grad():
        got = load_generator(path, form)(tensor(io["g_input"]), float(io.get("g_res", 0))).numpy()
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= 5e-5  # found: 1.9e-5


def test_the_residual_conditional_unet_is_loaded_with_a_note(caplog):
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        load_generator(GOLDEN / "weights_u_net_cond.h5")
        load_generator(GOLDEN / "weights_u_net_cond_nn_residual.h5")
    assert len(caplog.messages) == 1
    assert "weights_u_net_cond.h5: residual conditional U-Net" in caplog.messages[0]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "u_net_cond"])
def test_critics_give_the_originals_scores(variant):
    path, io = golden(variant)
    with torch.no_grad():
        got = load_critic(path)(tensor(io["d_input"]), float(io.get("g_res", 0))).numpy()
    assert got.shape == (1, 1)
    assert np.abs(got - io["d_output"]).max() <= 5e-6  # found: 1.3e-6


# --- losses, gradients and updates of one training iteration -----------------------------------------------------


@pytest.fixture(scope="module")
def step():
    with np.load(GOLDEN / "losses" / "losses.npz") as file:
        return dict(file)


def by_original_name(network):
    """Original weight name (LAYER/LEAF) -> our parameter."""
    parameters = dict(network.named_parameters())
    return {name: parameters[ours] for ours, name in weight_names(network.spec).items()}


def to_keras(t):
    return t.detach().permute(2, 3, 4, 1, 0).numpy() if t.ndim == 5 else t.detach().numpy()


def assert_gradients(network, names, step, prefix):
    parameters = by_original_name(network)
    assert list(parameters) == [str(n) for n in names]
    wanted = [step[f"{prefix}_grad_{i:02d}"] for i in range(len(names))]
    largest = max(np.abs(w).max() for w in wanted)
    for name, want in zip(names, wanted, strict=True):
        got = to_keras(parameters[str(name)].grad)
        # Relative to the array; a few arrays are rounding around 0, those relative to the largest gradient. Found: at
        # most 6e-2 of what is allowed, 7.5e-6 where that is 1.2e-4: the slope at a kink may be either one.
        assert np.abs(got - want).max() <= 1e-4 * max(np.abs(want).max(), 1e-2 * largest), name  # found: 1.1e-5


def load_after(network, names, step, prefix):
    """Put the original's weights behind its update into ``network``."""
    parameters = by_original_name(network)
    with torch.no_grad():
        for i, name in enumerate(names):
            array = tensor(step[f"{prefix}_after_{i:02d}"])
            parameters[str(name)].copy_(array.permute(4, 3, 0, 1, 2) if array.ndim == 5 else array)


def assert_updates(network, names, step, prefix, t, epsilon):
    """The original's first Adam step, its bias correction that of step ``t`` (see the golden README)."""
    parameters = by_original_name(network)
    largest = max(p.grad.abs().max().item() for p in parameters.values())
    scale = LR * np.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)
    compared = 0
    for i, name in enumerate(names):
        start, gradient = (to_keras(x).astype(float) for x in (parameters[str(name)], parameters[str(name)].grad))
        moved = scale * (1 - BETAS[0]) * gradient / (np.sqrt((1 - BETAS[1]) * gradient**2) + epsilon)
        clear = np.abs(gradient) > 1e-3 * largest  # elsewhere even the sign may be rounding
        compared += clear.sum()
        error = np.abs(start - moved - step[f"{prefix}_after_{i:02d}"])[clear]
        assert error.max(initial=0) <= 2e-3 * LR, name  # found: 6e-4 LR, of weights in float32
    assert compared > 0.1 * sum(p.numel() for p in parameters.values())  # found: 0.74


def critic_losses(critic, step):
    """[total, -mean D(real), mean D(fake), gradient penalty], the total with its graph."""
    real, fake, eps = (tensor(step[k]) for k in ("real", "fake", "eps"))
    real_term, fake_term = -critic(real).mean(), critic(fake).mean()
    penalty = losses.gradient_penalty(critic, real, fake, eps.flatten(1), LAMBDA_GP)
    return [real_term + fake_term + penalty, real_term, fake_term, penalty]


def test_charbonnier_and_dice(step):
    real, fake = tensor(step["real"]), tensor(step["fake"])
    assert losses.charbonnier(real, fake).item() == pytest.approx(float(step["charbonnier"]), rel=1e-5)  # found: 4.4e-6
    # Found: 2.9e-6
    assert losses.dice_charbonnier(real, fake).item() == pytest.approx(float(step["dice_loss"]), rel=1e-5)


def test_critic_step(step):
    critic = load_critic(GOLDEN / "losses" / "before.h5")
    terms = critic_losses(critic, step)
    assert [t.item() for t in terms] == pytest.approx(list(step["d_losses"]), rel=5e-6)  # found: 8.8e-7
    terms[0].backward()
    assert_gradients(critic, step["d_weight_names"], step, "d")
    assert_updates(critic, step["d_weight_names"], step, "d", t=2, epsilon=1e-7)


@pytest.mark.parametrize("penalty", ["explicit", "autograd"])
def test_critic_loss_of_training(step, penalty):
    """The same through the function that training calls, in both of its forms."""
    critic = load_critic(GOLDEN / "losses" / "before.h5")
    real, fake, eps = (tensor(step[k]) for k in ("real", "fake", "eps"))
    terms = critic_loss(critic, real, fake, eps.flatten(1), LAMBDA_GP, penalty=penalty)
    total, real_term, fake_term, gp = step["d_losses"]
    assert terms["total"].item() == pytest.approx(total, rel=1e-6)  # found: 0 (rounding)
    assert terms["penalty"].item() == pytest.approx(gp, rel=1e-6)  # found: 0 (rounding)
    # Found: 8.2e-7
    assert terms["wasserstein"].item() == pytest.approx(real_term + fake_term, abs=5e-6 * abs(fake_term))
    terms["total"].backward()
    assert_gradients(critic, step["d_weight_names"], step, "d")


def test_generator_loss_of_training(step):
    """In float64: in float32 one voxel lies within rounding of a ReLU's kink, and either slope is right."""
    critic = load_critic(GOLDEN / "losses" / "before.h5")
    load_after(critic, step["d_weight_names"], step, "d")
    generator, critic = load_generator(GOLDEN / "losses" / "before.h5").double(), critic.double()
    x, real = tensor(step["g_input"]).double(), tensor(step["real"]).double()
    terms = generator_loss(generator, critic, x, real, lambda_adv=LAMBDA_ADV)
    got = [terms[k].item() for k in ("total", "adversarial", "reconstruction")]
    assert got == pytest.approx(list(step["g_losses"]), rel=2e-6)  # found: 3.6e-7
    terms["total"].backward()
    assert_gradients(generator, step["g_weight_names"], step, "g")


def test_scores_on_the_way(step):
    critic = load_critic(GOLDEN / "losses" / "before.h5")
    real, fake, eps = (tensor(step[k]) for k in ("real", "fake", "eps"))
    with torch.no_grad():
        for key, x in {"d_real": real, "d_fake": fake, "d_interp": losses.interpolate(real, fake, eps)}.items():
            assert np.abs(critic(x).numpy() - step[key]).max() <= 2e-6  # found: 1.9e-7


def test_generator_step_against_the_updated_critic(step):
    critic = load_critic(GOLDEN / "losses" / "before.h5")
    load_after(critic, step["d_weight_names"], step, "d")
    critic.requires_grad_(False).double()
    generator = load_generator(GOLDEN / "losses" / "before.h5").double()
    output = generator(tensor(step["g_input"]).double())
    assert [output.mean().item(), output.std(unbiased=False).item()] == pytest.approx(
        list(step["g_out_stats"]),
        rel=1e-6,  # found: 5.1e-8 (rounding)
    )
    adversarial, reconstruction = -critic(output).mean(), losses.charbonnier(output, tensor(step["real"]).double())
    total = LAMBDA_ADV * adversarial + reconstruction
    # Found: 3.6e-7
    assert [total.item(), adversarial.item(), reconstruction.item()] == pytest.approx(list(step["g_losses"]), rel=2e-6)
    total.backward()
    assert_gradients(generator, step["g_weight_names"], step, "g")
    assert_updates(generator, step["g_weight_names"], step, "g", t=1, epsilon=1e-8)


def test_second_critic_step(step):
    critic = load_critic(GOLDEN / "losses" / "before.h5")
    load_after(critic, step["d_weight_names"], step, "d")
    got = [t.item() for t in critic_losses(critic, step)]
    assert got == pytest.approx(list(step["d_losses_second_step"]), rel=1e-5)  # found: 1e-6
