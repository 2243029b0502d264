"""One network's optimiser step: mean over ranks, loss scale, clipping, Adam; skipped where a number is not finite.

Nothing here waits for the device: whether a step is skipped is decided where the gradients are, and told later. With
several ranks, gradients travel while others are computed (docs/data-engine.md, Many ranks).

The learning rate over a run, as a factor of its first value.

Epochs differ in length: subjects differ in size, and a remainder below one batch is left out of each group. The share
of a run that is done is therefore counted in epochs and parts of them, not in updates of an estimated total: it is a
function of the place in the run alone, so it is the same after a resume, and it ends where the last epoch ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsrgan.core.ranks import ALONE, Ranks

FIRST_SCALE, GROWTH, BACKOFF, PATIENCE = 2.0**14, 2.0, 0.5, 2000  # of the loss scale: torch's GradScaler, start lower
GROUPS = 4  # of gradients that travel together


class Optimiser:
    """Adam of one network.

    Parameters
    ----------
    network : its parameters, whose ``grad`` a step uses up
    rate, betas, eps : Adam's settings
    clip : largest gradient norm; 0 is off
    scaled : whether gradients come multiplied by ``scale``
    ranks : whose gradients are averaged
    """

    def __init__(
        self,
        network: torch.nn.Module,
        rate: float,
        betas: tuple[float, float],
        eps: float,
        *,
        clip: float = 0.0,
        scaled: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters = list(network.parameters())
        self.rate, self.clip, self.ranks = rate, clip, ranks
        self.adam = torch.optim.Adam(self.parameters, rate, betas, eps=eps, fused=True)
        self._groups = grouped(self.parameters)
        self._sent: list[Callable[[], None]] = []  # what waits for the mean of each group that is on its way
        device = self.parameters[0].device
        self.scale: Tensor | None = torch.full((), FIRST_SCALE, device=device) if scaled else None
        self.growth = torch.zeros((), dtype=torch.int32, device=device)

    def clear(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss. In the ``last`` pass before a step each group is sent once it is complete.

        Groups are sent in their order, which is the same on all ranks, and the last one by ``send``. A pass that fails
        leaves nothing to wait for: the error ends this rank, and the others with it.
        """
        if not last or self.ranks.world == 1:
            loss.backward()
            return
        missing = [{id(p) for p in group} for group in self._groups[:-1]]

        def arrived(parameter: Tensor) -> None:
            for group in missing:
                group.discard(id(parameter))
            while len(self._sent) < len(missing) and not missing[len(self._sent)]:
                self._send(self._groups[len(self._sent)])

        hooks = [p.register_post_accumulate_grad_hook(arrived) for p in self.parameters]
        try:
            loss.backward()
        except BaseException:
            self._sent = []
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def send(self, total: Tensor) -> None:
        """Send the gradients that are not under way, with their loss: all ranks skip the step, or none."""
        self._total = total.detach().float().reshape(1).clone()
        self._send([p for group in self._groups[len(self._sent) :] for p in group], self._total)

    def _send(self, parameters: Sequence[Tensor], *more: Tensor) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._sent.append(self.ranks.start_average_([*gradients, *more]))

    def step(self) -> dict[str, Tensor]:
        """Wait for the mean of what was sent; scale back, clip and apply it.

        Returns scalars on the device: gradient (its norm before clipping), skipped (1 where loss or gradient is not
        finite and nothing changed), overflow (1 where the loss scale was too large, and nothing changed either).
        """
        for finish in self._sent:
            finish()
        self._sent = []
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scale is not None:
            torch._foreach_div_(gradients, self.scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        lost = ~torch.isfinite(self._total[0])
        bad = (lost | ~torch.isfinite(norm)).float()
        self.adam.found_inf = bad  # type: ignore[attr-defined]  # fused kernels look at it and leave all as it is
        self.adam.step()
        told = {"gradient": norm, "skipped": bad}
        if self.scale is not None:
            told = {"gradient": norm, "skipped": lost.float(), "overflow": bad - lost.float()}
            torch._amp_update_scale_(self.scale, self.growth, bad, GROWTH, BACKOFF, PATIENCE)
        self.clear()
        return told

    def set_rate(self, factor: float) -> None:
        """The learning rate as a fraction of its first value."""
        for group in self.adam.param_groups:
            group["lr"] = self.rate * factor

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the parameters."""
        return {"adam": self.adam.state_dict(), "scale": self.scale, "growth": self.growth}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` gave, also under another layout or precision."""
        betas = self.adam.param_groups[0]["betas"]
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:  # torch takes the settings of the state too
            group["betas"] = betas
        for parameter, kept in self.adam.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                kept[name] = torch.empty_like(parameter).copy_(kept[name])  # the fused kernel wants equal strides
        if self.scale is not None and state["scale"] is not None:
            self.scale.copy_(state["scale"])
            self.growth.copy_(state["growth"])


def grouped(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """The last parameters first, as a backward pass of the generator comes to them, in at most ``GROUPS`` groups.

    All but the last have the ``GROUPS``-th part of all values or a little more, so the last, which travels when
    nothing is left to compute, is the smallest.
    """
    groups: list[list[Tensor]] = [[]]
    most = sum(p.numel() for p in parameters) / GROUPS
    for parameter in reversed(parameters):
        if sum(p.numel() for p in groups[-1]) >= most:
            groups.append([])
        groups[-1].append(parameter)
    return groups


def share(epoch: int, epochs: int, part: float) -> float:
    """Share of a run that is done, in [0, 1]: ``part`` of ``epoch`` (counted from 1) of ``epochs``."""
    return (epoch - 1 + part) / epochs


def factor(shape: str, done: float, update: int, warmup: int = 0, end: float = 0.0) -> float:
    """Learning rate of an update over lr_gen and lr_dis.

    Parameters
    ----------
    shape : "constant"; "linear" or "cosine" from 1 down to ``end``
    done : share of the run before this update, see ``share``
    update : updates done before this one
    warmup : first updates, over which the rate rises linearly: 1/warmup, 2/warmup ...; multiplies the shape
    """
    fall = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[shape]
    rise = min(1.0, (update + 1) / warmup) if warmup else 1.0
    return rise * (1 - (1 - end) * fall if shape != "constant" else 1.0)
