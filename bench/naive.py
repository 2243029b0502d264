"""SegSRGAN in plain eager PyTorch, as one would carefully write it from the paper: the yardstick of ``bench step``.

Two sides use it: tensors in PyTorch's usual order of memory, and channels last. Stock modules, autograd's double
backward for the gradient penalty, three critic calls and one generator call per critic update. Nothing of fastsrgan's
computation is used; only weights are copied from it, so that results can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastsrgan.data.pool import Batch
from fastsrgan.model.networks import Critic, Generator

Pairs = list[tuple[Tensor, Tensor]]


def conv(i: int, o: int, size: int, stride: int = 1) -> nn.Conv3d:
    """Reflect-padded convolution without bias."""
    return nn.Conv3d(i, o, size, stride, size // 2, bias=False, padding_mode="reflect")


def norm(channels: int) -> nn.InstanceNorm3d:
    """The stock module has epsilon inside the root: the square of the paper code's, which is outside."""
    return nn.InstanceNorm3d(channels, eps=1e-14, affine=True)


class Residual(nn.Module):
    """conv, norm, ReLU, conv, norm, plus the input."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(c, c, 3), norm(c), nn.ReLU(), conv(c, c, 3), norm(c))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class NaiveGenerator(nn.Module):
    """The paper's generator: (B, 1, X, Y, Z) -> (B, 2, X, Y, Z)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(conv(1, k, 7), norm(k), nn.ReLU()),
            *(conv(k, 2 * k, 3, 2), norm(2 * k), nn.ReLU()),
            *(conv(2 * k, 4 * k, 3, 2), norm(4 * k), nn.ReLU()),
            *(Residual(4 * k) for _ in range(6)),
            *(nn.Upsample(scale_factor=2), conv(4 * k, 2 * k, 3), norm(2 * k), nn.ReLU()),
            *(nn.Upsample(scale_factor=2), conv(2 * k, k, 3), norm(k), nn.ReLU()),
            conv(k, 2, 7),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.cat([x - y[:, :1], torch.sigmoid(y[:, 1:])], dim=1)

    def paired(self, g: Generator) -> Pairs:
        """(fastsrgan's parameter, ours) for every parameter."""
        theirs: list[Tensor] = [g.stem, g.stem_norm.scale, g.stem_norm.shift]
        for weight, n in ((g.down1, g.down1_norm), (g.down2, g.down2_norm)):
            theirs += [weight, n.scale, n.shift]
        for b in g.blocks:
            theirs += [b.conv_a, b.norm_a.scale, b.norm_a.shift, b.conv_b, b.norm_b.scale, b.norm_b.shift]  # type: ignore[union-attr,list-item]
        for weight, n in ((g.up1, g.up1_norm), (g.up2, g.up2_norm)):
            theirs += [weight, n.scale, n.shift]
        return list(zip([*theirs, g.head], self.parameters(), strict=True))


class NaiveCritic(nn.Module):
    """The paper's critic: (B, 2, P, P, P) -> (B, 1)."""

    def __init__(self, k: int, patch: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 2
        while patch > 2:
            layers += [nn.Identity() if patch % 2 == 0 else nn.ZeroPad3d((0, 1, 0, 1, 0, 1))]
            layers += [nn.Conv3d(channels, k, 4, 2, 1), nn.LeakyReLU(0.01)]
            channels, k, patch = k, 2 * k, (patch + 1) // 2
        self.body = nn.Sequential(*layers, nn.Conv3d(channels, 1, 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).flatten(1)

    def paired(self, c: Critic) -> Pairs:
        """(fastsrgan's parameter, ours) for every parameter."""
        theirs = [p for pair in zip(c.convs, c.biases, strict=True) for p in pair]
        return list(zip([*theirs, c.decision], self.parameters(), strict=True))


def copy(pairs: Pairs) -> None:
    """Take over the values of the first of each pair."""
    with torch.no_grad():
        for theirs, own in pairs:
            own.copy_(theirs)


def channels_last(network: nn.Module) -> nn.Module:
    """The network with its weights and inputs in PyTorch's other order of memory, which some convolutions prefer. What
    stock norms give is in the usual order again, as it is for all who set this."""

    def reordered(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.contiguous(memory_format=torch.channels_last_3d) for x in inputs)

    network.register_forward_pre_hook(reordered)
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def charbonnier(pred: Tensor, target: Tensor) -> Tensor:
    """Paper eq. 12."""
    return torch.sqrt((pred - target) ** 2 + 1e-6).mean()


class NaiveTrainer:
    """The alternating updates of WGAN-GP (paper eq. 9-12) with the paper's weights and Adam's settings."""

    def __init__(self, generator: NaiveGenerator, critic: NaiveCritic, lr: float, betas: tuple[float, float]) -> None:
        self.generator, self.critic = generator, critic
        self.adam_g = torch.optim.Adam(generator.parameters(), lr, betas, eps=1e-8)
        self.adam_d = torch.optim.Adam(critic.parameters(), lr, betas, eps=1e-7)

    def critic_update(self, real: Tensor, fake: Tensor, eps: Tensor, weight: float = 10.0) -> dict[str, float]:
        """One Adam step of the critic; ``eps`` (B, C)."""
        self.adam_d.zero_grad()
        distance = self.critic(fake).mean() - self.critic(real).mean()
        eps = eps[:, :, None, None, None]
        x = (eps * real + (1 - eps) * fake).requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.critic(x).sum(), x, create_graph=True)
        penalty = weight * ((gradient.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
        (distance + penalty).backward()
        self.adam_d.step()
        values = {"total": distance + penalty, "wasserstein": distance, "penalty": penalty}
        return {k: v.item() for k, v in values.items()}

    def generator_update(self, x: Tensor, y: Tensor, lambda_adv: float = 1e-3) -> dict[str, float]:
        """One Adam step of the generator; gradients of the critic's weights, which nobody needs, are not made."""
        self.critic.requires_grad_(False)
        self.adam_g.zero_grad()
        pred = self.generator(x)
        rec, adv = charbonnier(pred, y), -self.critic(pred).mean()
        total = rec + lambda_adv * adv
        total.backward()
        self.critic.requires_grad_(True)
        self.adam_g.step()
        return {"total": total.item(), "reconstruction": rec.item(), "adversarial": adv.item()}

    def iteration(self, critic_batches: list[Batch], eps: list[Tensor], batch: Batch) -> tuple[dict, dict]:
        """Critic updates, each with fakes of its own, then one generator update: mean losses and losses."""
        rows = []
        for b, e in zip(critic_batches, eps, strict=True):
            with torch.no_grad():
                fake = self.generator(b.x)
            rows.append(self.critic_update(b.y, fake, e))
        return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}, self.generator_update(batch.x, batch.y)
