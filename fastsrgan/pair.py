"""Generator and critic in training: their Adams, the generator's moving average, and one update of each."""

from __future__ import annotations

import logging
import os

import numpy as np
import torch
from torch import Tensor

from fastsrgan import modelfile, weights
from fastsrgan.config import TrainConfig
from fastsrgan.errors import ModelError
from fastsrgan.networks import Critic, CriticSpec, Generator, GeneratorSpec, build_generator
from fastsrgan.pool import Batch
from fastsrgan.step import critic_loss, generator_loss

log = logging.getLogger("fastsrgan")


class Models:
    """Generator, critic, their Adams and the generator's moving average."""

    def __init__(self, config: TrainConfig, mask_classes: int, device: torch.device) -> None:
        self.config, self.device = config, device
        spec = GeneratorSpec(
            config.network, config.kernel_gen, config.residual, config.conditional, mask_classes, config.scaled
        )
        self.generator = build_generator(spec, config.form, config.seed)
        if config.zero_head:
            with torch.no_grad():
                self.generator.head[0].zero_()
        self.critic = Critic(
            CriticSpec(config.kernel_dis, config.patch_size, spec.out_channels, config.conditional), config.seed + 1
        )
        self.average: dict[str, Tensor] | None = None
        self.finish()

    def finish(self) -> None:
        """Move to the device and make the optimisers; call again after replacing a network."""
        c = self.config
        self.generator.to(self.device).train()
        self.critic.to(self.device).train()
        self.adam_g = torch.optim.Adam(self.generator.parameters(), c.lr_gen, (c.beta1, c.beta2), eps=1e-8, fused=True)
        self.adam_d = torch.optim.Adam(self.critic.parameters(), c.lr_dis, (c.beta1, c.beta2), eps=1e-7, fused=True)
        if c.ema:
            self.average = {k: v.detach().clone() for k, v in self.generator.named_parameters()}

    def start_from(self, path: str | os.PathLike) -> None:
        """Take over the weights of a file: the generator, and the critic where the file holds a fitting one."""
        generator = weights.load_generator(path, self.config.form)
        if generator.spec != self.generator.spec:
            raise ModelError(
                path, f"holds {generator.spec}, this run trains {self.generator.spec}", "match network, kernel_gen, ..."
            )
        self.generator = generator.requires_grad_(True)
        try:
            critic = weights.load_critic(path)
        except ModelError as error:
            log.info("%s: the critic starts anew", error)
        else:
            if critic.spec == self.critic.spec:
                self.critic = critic.requires_grad_(True)
            else:
                log.info("%s: its critic %s does not fit this run, which starts a new one", path, critic.spec)
        self.finish()

    def critic_update(self, batch: Batch, fake: Tensor, eps: Tensor) -> dict[str, float]:
        """One Adam step of the critic; skipped when the loss is not finite."""
        c = self.config
        terms = critic_loss(
            self.critic,
            batch.y,
            fake,
            eps,
            c.lambda_gp,
            batch.res,
            "explicit" if c.penalty in ("auto", "manual") else c.penalty,
        )
        return self._apply(self.adam_d, self.critic, terms, 0.0)

    def generator_update(self, batch: Batch, adversarial: bool) -> dict[str, float]:
        """One Adam step of the generator and of its moving average; skipped when the loss is not finite."""
        c = self.config
        self.critic.requires_grad_(False)
        terms = generator_loss(
            self.generator,
            self.critic,
            batch.x,
            batch.y,
            lambda_rec=c.lambda_rec,
            lambda_adv=c.lambda_adv if adversarial else 0.0,
            reconstruction=c.reconstruction_loss,
            res=batch.res,
        )
        head = self.generator.head.detach().clone() if c.head_rate != 1 else None
        values = self._apply(self.adam_g, self.generator, terms, c.clip_norm)
        if head is not None:
            with torch.no_grad():
                self.generator.head.lerp_(head, 1 - c.head_rate)
        self.critic.requires_grad_(True)
        if self.average is not None and not values.get("skipped"):
            with torch.no_grad():
                for name, parameter in self.generator.named_parameters():
                    self.average[name].lerp_(parameter, 1 - c.ema)
        return values

    @staticmethod
    def _apply(
        adam: torch.optim.Optimizer, network: torch.nn.Module, terms: dict[str, Tensor], clip: float
    ) -> dict[str, float]:
        adam.zero_grad(set_to_none=True)
        terms["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip or float("inf"))
        values = {k: float(v.detach()) for k, v in terms.items()}
        values["gradient"] = float(norm)
        if not np.isfinite(values["total"]) or not np.isfinite(values["gradient"]):
            return {**values, "skipped": 1.0}
        adam.step()
        return values

    def shipped(self) -> Generator:
        """The generator that is validated and shipped: the moving average where there is one."""
        if self.average is None:
            return self.generator
        return modelfile.assemble(self.generator.spec, self.average, self.generator.form)

    @torch.no_grad()
    def generate(self, batch: Batch) -> Tensor:
        """Fakes for the critic, without a graph."""
        return self.generator(batch.x, batch.res)
