"""A training loop around networks that only write down what they are given, for the laws of the loop itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastsrgan.config import TrainConfig
from fastsrgan.core import draws
from fastsrgan.core.ranks import Ranks
from fastsrgan.core.signals import StopRequest
from fastsrgan.data.pool import Batch, Resident
from fastsrgan.data.subject import PatchRule
from fastsrgan.train import loop as loop_module
from fastsrgan.train.gan import Models
from fastsrgan.train.state import Position, Run

# What the training returns to its command where nothing was trained.
NOTHING_TRAINED = {
    "exit_code": 0,
    "updates": 0,
    "resumed_at": None,
    "seconds": 0.0,
    "best_epoch": None,
    "weights": "",
    "stopped": None,
}
CONFIG = TrainConfig(
    new_low_res=((1.0, 1.0, 3.0),),
    epochs=2,
    batch_size=4,
    patch_size=16,
    kernel_gen=1,
    kernel_dis=1,
    critic_iterations=5,
    resident_subjects=3,
)
SUBJECTS = tuple("abcdef")
PATCHES = 6  # of each subject


class Alone(Ranks):
    """One rank of several, which never hears of the others."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world


# What a validation gives; of the baselines too.
SCORES = {"Dice": 0.5, "PSNR": 30.0, "SSIM": 0.9, "PSNR_spline": 30.0, "SSIM_spline": 0.9, "PSNR_linear": 30.0}
SCORES |= {"SSIM_linear": 0.9, "MSE": 0.1, "Seg_share": 0.1, "Label_share": 0.1}


class Networks:
    """In place of ``Models``: events in their order, each (what, facts)."""

    # What these say follows from the settings alone.
    eps_shape, adversarial = Models.eps_shape, Models.adversarial

    def __init__(
        self, config: TrainConfig, skipped: Callable[[int], bool] = lambda update: False, world: int = 1
    ) -> None:
        self.config, self.events, self.skipped = config, [], skipped
        self.batch, self.critic_iterations = config.batch_size // world, config.critic_iterations
        self.device = torch.device("cpu")
        self.generator, self.averaged = SimpleNamespace(spec=SimpleNamespace(out_channels=2)), object()
        self.critic, self.arithmetic = object(), object()

    def critic_updates(self, batches: list[Batch], eps: list[torch.Tensor]) -> dict[str, float]:
        self.events.append(("critic", SimpleNamespace(ids=[b.ids for b in batches], eps=[e.numpy() for e in eps])))
        return {"total": 0.0, "wasserstein": 0.0, "penalty": 0.0, "gradient": 0.0}

    def generator_update(self, batch: Batch, adversarial: bool) -> dict[str, float]:
        self.events.append(("generator", SimpleNamespace(ids=batch.ids, adversarial=adversarial, x=batch.x)))
        found = {"total": 0.0, "reconstruction": 0.0, "gradient": 0.0}
        done = sum(what == "generator" for what, _ in self.events)
        return found | ({"skipped": 1.0} if self.skipped(done) else {})

    def set_rates(self, factor: float) -> None:
        self.events.append(("rates", SimpleNamespace(factor=factor)))

    def shipped(self) -> object:
        return self.averaged

    def of(self, what: str) -> list[Any]:
        """The facts of one kind of event."""
        return [facts for kind, facts in self.events if kind == what]


class Ready:
    """In place of ``Feed``: residents without an image to speak of."""

    def __init__(self, config: TrainConfig, patches: int = PATCHES) -> None:
        self.seed, self.rule = config.seed, PatchRule.of(config)
        self.waited, self.first_wait, self.quarantined, self.patches = 0.0, 0.0, {}, patches

    def groups(self, plan):
        for _, names in plan:
            yield [resident(name, self.patches) for name in names]


def resident(name: str, patches: int = PATCHES) -> Resident:
    """A subject whose patches begin at x = 0, 1, 2, ... and whose volumes hold the place of each voxel."""
    volume = torch.arange(16.0 + patches)[:, None, None].expand(-1, 16, 16).contiguous() + 100 * ord(name[0])
    label = torch.zeros(volume.shape, dtype=torch.uint8)
    origins = np.array([[i, 0, 0] for i in range(patches)])
    return Resident(name, volume, volume + 0.5, label, None, 3.0, origins)


def spied(monkeypatch, config: TrainConfig = CONFIG, *, rank: int = 0, world: int = 1, patches: int = PATCHES, **more):
    """Run the loop; its networks, and the calls of what it validates, saves and writes with: (networks, calls).

    more : scores (epoch -> what a validation returns), skipped (of ``Networks``), position, test, folder
    """
    networks = Networks(config, more.get("skipped", lambda update: False), world)
    calls: list[tuple[str, Any]] = []
    scores = more.get("scores", lambda turn: SCORES)

    def validate(generator, feed, subjects, **options):
        calls.append(("validate", SimpleNamespace(generator=generator, subjects=list(subjects), options=options)))
        return scores(sum(what == "validate" for what, _ in calls))

    def whole(generator, feed, subjects, **options):
        calls.append(("whole", SimpleNamespace(generator=generator, subjects=list(subjects))))
        return {"whole_PSNR": 30.0}

    def note(what):
        return lambda run, *args: calls.append((what, SimpleNamespace(args=args, epoch=run.position.epoch)))

    monkeypatch.setattr(loop_module, "validate", validate)
    monkeypatch.setattr(loop_module, "validate_whole", whole)
    for what in ("save", "export", "write_weights"):
        monkeypatch.setattr(loop_module, what, note(what))
    position = more.get("position") or Position(epoch=config.init_epoch, resident=config.resident_subjects, world=world)
    run = Run(
        more.get("folder", Path("run")),
        config,
        None,  # type: ignore[arg-type]
        networks,  # type: ignore[arg-type]
        Ready(config, patches),  # type: ignore[arg-type]
        list(SUBJECTS),
        more.get("test", ["t1", "t2"]),
        0,
        ranks=Alone(rank, world),
        position=position,
    )
    loop_module.loop(run, StopRequest())
    return networks, calls


def recorded(monkeypatch) -> list[tuple[tuple, str]]:
    """Every key of a draw from now on, with the place in the sources that asked for it."""
    found: list[tuple[tuple, str]] = []
    plain = draws.rng

    def rng(seed, *key):
        frame = sys._getframe(1)
        found.append(((seed, *key), f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}:{frame.f_lasti}"))
        return plain(seed, *key)

    for name, module in list(sys.modules.items()):
        if name.startswith("fastsrgan") and getattr(module, "rng", None) is plain:
            monkeypatch.setattr(module, "rng", rng)
    return found
