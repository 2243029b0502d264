"""Every training setting reaches the place where it acts: changing it changes what the engine receives or does.

``ACTS`` has a row for each setting of ``config``: another value, what is read off the engine with it (``Seen``), and
what has to be found there. With the default something else is found: a wire that is cut shows in either.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from spies import CONFIG, SCORES, Alone, spied

from fastsrgan.config import SETTINGS, TrainConfig, from_mapping
from fastsrgan.core.ranks import ALONE
from fastsrgan.data import feed as feed_module
from fastsrgan.data.pool import Batch
from fastsrgan.errors import ResourceError
from fastsrgan.model import checkpoint, compiled
from fastsrgan.model.networks import Critic, Generator
from fastsrgan.observation.slice_axis import axes_across
from fastsrgan.train import gan, precision, snapshots
from fastsrgan.train import loop as loop_module
from fastsrgan.train import run as run_module
from fastsrgan.train.critic_step import parameters

CPU = torch.device("cpu")


class Stop(Exception):
    """What was asked for has been seen."""


class Seen:
    """What an engine with these settings receives and does; each part is made when it is looked at."""

    def __init__(self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, folder) -> None:
        self.config, self.patch, self.folder = config, monkeypatch, folder

    # --- what ``prepare`` makes of them

    @functools.cached_property
    def run(self):
        """Networks and feed, as ``train`` makes them; checks of memory and disk are not asked."""
        subjects = [
            SimpleNamespace(id=name, split=split, affine=np.eye(4), attrs={}, shape=(24, 24, 24), arrays={}, files={})
            for name, split in (("a", "Train"), ("b", "Train"), ("t", "Test"))
        ]
        mask = np.full((2, 2, 2), 2, np.uint8)
        store = SimpleNamespace(subjects=subjects, url="store", read=lambda name: SimpleNamespace(mask=mask))
        for name in ("refuse_faults", "refuse_hopeless", "need_space"):
            self.patch.setattr(run_module, name, lambda *args: None)
        self.patch.setattr(gan, "batch_that_fits", lambda *args: 1)
        self.patch.setattr(precision, "self_test", lambda *args: {})
        self.compiled_with: list[str] = []
        note = lambda function, config, device, job: self.compiled_with.append(config.compile) or function  # noqa: E731
        self.patch.setattr(gan, "compiled", note)
        self.engines: list[str] = []
        self.patch.setattr(feed_module, "pick_mover", lambda engine, *more: self.engines.append(engine))
        return run_module.prepare(store, self.folder, self.config, CPU, ALONE, strict=False, resume=False)

    @property
    def models(self):
        return self.run.models

    @property
    def law(self):
        return self.run.feed.degradation

    @property
    def made(self):
        """How images are made of tissues."""
        return self.run.feed.visits.settings

    @functools.cached_property
    def began(self):
        """The run when it has begun, with the limit of residents and the board that it asked for."""
        self.limits: list[SimpleNamespace] = []
        known = inspect.signature(feed_module.resident_limit)

        def limit(*args, **more):
            self.limits.append(SimpleNamespace(**known.bind(*args, **more).arguments))
            return 7

        self.boards: list[Any] = []
        self.patch.setattr(run_module, "resident_limit", limit)
        self.patch.setattr(run_module, "Board", lambda *args: self.boards.append(args))
        self.run.log = SimpleNamespace(cut=lambda *args: None)
        run_module.begin(self.run, None, False)
        return self.run

    def limit(self, name: str) -> Any:
        """What the number of residents was computed from."""
        assert self.began
        return getattr(self.limits[0], name)

    # --- one update

    @functools.cached_property
    def loss(self) -> dict[str, Any]:
        """The keywords of the generator's loss."""
        found: dict[str, Any] = {}

        def loss(generator, critic, x, y, **more):
            found.update(more)
            raise Stop

        self.patch.setattr(gan, "generator_loss", loss)
        x = torch.rand(1, 1, 16, 16, 16)
        with contextlib.suppress(Stop):
            self.models._generator_loss(x, x, torch.ones(1), True)
        return found

    @functools.cached_property
    def critic(self) -> list[SimpleNamespace]:
        """Weight of the penalty and way of each of four critic updates, and the chunks of the passes before them."""
        found: list[SimpleNamespace] = []
        self.passes: list[int] = []
        models = self.models

        def way(kind):
            def terms(critic, real, fake, eps, weight, res=None, penalty="explicit", **more):
                found.append(SimpleNamespace(way=kind, penalty=penalty, weight=weight, patches=len(real)))
                zero = sum(p.sum() for p in critic.parameters()) * 0
                out = {"total": zero, "wasserstein": zero, "penalty": zero}
                return out if kind == "graph" else (out, [torch.zeros_like(p) for p in parameters(critic)])

            return terms

        models._critic_terms, models._explicit_terms = way("by hand"), way("graph")
        self.patch.setattr(gan, "critic_loss", way("graph"))

        def fakes(x, res, agree=None):
            self.passes.append(len(x))
            return torch.zeros(len(x), 2, *x.shape[2:])

        models._fakes = fakes
        batches = [self.batch for _ in range(4)]
        models.critic_updates(batches, [torch.rand(2, 2)] * 4)
        return found

    @property
    def batch(self) -> Batch:
        return Batch(torch.zeros(2, 1, 16, 16, 16), torch.zeros(2, 2, 16, 16, 16), torch.ones(2), ["a", "b"])

    @functools.cached_property
    def step(self) -> SimpleNamespace:
        """What one generator update with a gradient of ones does to the weights: parts, movements, average."""
        models, parts = self.models, []

        def terms(x, y, res, adversarial, weights=None, agree=None):
            parts.append(len(x))
            total = sum(p.sum() for p in models.generator.parameters())
            return {"total": total, "reconstruction": total, "adversarial": total * 0}

        models._generator_terms = terms
        old = {k: p.detach().clone() for k, p in models.generator.named_parameters()}
        values = models.generator_update(self.batch, adversarial=False)
        new = dict(models.generator.named_parameters())
        moved = {k: float((new[k].detach() - old[k]).abs().mean()) for k in new}
        kept = None
        if models.average is not None:
            kept = float(((models.average["stem"] - new["stem"]) / (old["stem"] - new["stem"])).mean().detach())
        return SimpleNamespace(parts=parts, moved=moved, kept=kept, gradient=values["gradient"])

    # --- the loop

    @functools.cached_property
    def loop(self):
        """Events of the networks, and calls, of a whole run; Dice falls and PSNR rises from epoch to epoch."""
        self.pools: list[dict] = []
        plain = loop_module.Pool

        def pool(residents, patch, **more):
            self.pools.append({"patch": patch, **more})
            return plain(residents, patch, **more)

        self.patch.setattr(loop_module, "Pool", pool)
        scores = lambda turn: SCORES | {"Dice": 0.5 - 0.01 * turn, "PSNR": 30.0 + turn}  # noqa: E731
        networks, calls = spied(self.patch, self.config, scores=scores, folder=self.folder)
        return networks, calls

    def events(self, what: str) -> list[Any]:
        return self.loop[0].of(what)

    def calls(self, what: str, file: str = "") -> list[Any]:
        return [f for kind, f in self.loop[1] if kind == what and (not file or f.args[0].name == file)]

    @property
    def factors(self) -> list[float]:
        return [f.factor for f in self.events("rates")]

    @property
    def epochs(self) -> int:
        """Epochs that were run: after each, weights are written."""
        return len(self.calls("write_weights", "model.safetensors"))

    @property
    def bad_allowed(self) -> str:
        with pytest.raises(ResourceError) as caught:
            spied(self.patch, self.config, skipped=lambda update: True, folder=self.folder)
        return caught.value.reason.partition(" ")[0]

    # --- other places

    @property
    def on_cuda(self):
        """The arithmetic on a GPU of compute capability 9.0."""
        self.patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        chosen = []
        plain = precision.choose
        self.patch.setattr(precision, "choose", lambda config, *more: chosen.append(config) or plain(config, *more))
        assert self.models
        return plain(chosen[0], torch.device("cuda"))

    @property
    def forms_mode(self) -> str:
        modes: list[str] = []
        job = lambda mode, names: modes.append(mode) or contextlib.nullcontext()  # noqa: E731
        self.patch.setattr(run_module.forms, "job", job)
        with contextlib.ExitStack() as held:
            run_module.keep_arithmetic(held, self.folder, self.config, CPU, Alone(), False)
        return modes[0]

    @property
    def snapshots_kept(self) -> int:
        kept: list[int] = []
        self.patch.setattr(checkpoint, "write", lambda *args: None)
        self.patch.setattr(checkpoint, "prune", lambda folder, number: kept.append(number))
        snapshots.save(self.run)
        return kept[0]


class Act(NamedTuple):
    """value : another than the default; look : what is read; found : what it has to be (default: the value);
    beside : settings that both sides have"""

    value: Any
    look: Callable[[Seen], Any]
    found: Any = ...
    beside: dict[str, Any] = {}  # noqa: RUF012


def adam(s: Seen, which: int) -> set[float]:
    return {
        group["betas"][which] for o in (s.models.optimiser_g, s.models.optimiser_d) for group in o.adam.param_groups
    }


def rate(optimiser) -> float:
    return optimiser.adam.param_groups[0]["lr"]


def line(s: Seen, end: float) -> bool:
    """Whether the rates fall linearly to ``end``."""
    n = len(s.factors)
    return bool(np.allclose(s.factors, [1 - (1 - end) * i / n for i in range(n)]))


def initial(s: Seen, seed: int) -> bool:
    """Whether the networks begin with the values of a seed, the critic with those of the next, and draws use it."""
    generator, critic = Generator(s.models.generator.spec, seed=seed), Critic(s.models.critic.spec, seed + 1)
    same = torch.equal(generator.stem, s.models.generator.stem) and torch.equal(
        critic.convs[0], s.models.critic.convs[0]
    )
    return same and s.run.feed.seed == seed and bool(s.loop) and {p["seed"] for p in s.pools} == {seed}


SITK = {"geometry": "segsrgan"}
TISSUES = {"structure": "3"}
LOW = [1, 1, 3]
FITTING = {"resident_subjects": None}  # as many as fit in memory

ACTS: dict[str, Act] = {
    # what is seen
    "new_low_res": Act(((2.0, 2.0, 4.0),), lambda s: s.law.low_res),
    "contrast_max": Act(0.25, lambda s: s.law.contrast),
    "noise": Act(0.25, lambda s: s.law.noise),
    "noise_from": Act(0.01, lambda s: s.law.noise_from),
    "geometry": Act("segsrgan", lambda s: s.law.geometry),
    "interp": Act("sitk", lambda s: s.law.interp, beside=SITK),
    "interpolation_type": Act("Linear", lambda s: s.law.interpolation_type, beside=SITK | {"interp": "sitk"}),
    "bias_field": Act(0.5, lambda s: s.law.artefacts.get("bias_field")),
    "rician": Act(True, lambda s: s.law.rician),
    "profile": Act(0.25, lambda s: s.law.profile),
    "profile_box": Act(0.25, lambda s: s.law.profile_box),
    "gap": Act(0.25, lambda s: s.law.gap),
    "motion": Act(0.25, lambda s: s.law.artefacts.get("motion")),
    "artefacts": Act("gibbs:0.3", lambda s: s.law.artefacts.get("gibbs"), 0.3),
    "block_memory": Act(2.0, lambda s: s.law.block_bytes, 2 * 10**9),
    "synthetic": Act(0.75, lambda s: s.run.feed.visits.share, beside=TISSUES),
    "structure": Act("3,42", lambda s: s.run.feed.visits.structure, (3, 42)),
    "tissue_means": Act("5:0.46:0.04/5:0.6:0", lambda s: s.made.means, (((5, 0.46, 0.04),), ((5, 0.6, 0.0),))),
    "synthetic_free": Act(0.75, lambda s: s.made.free),
    "synthetic_invert": Act(0.75, lambda s: s.made.invert),
    "synthetic_strip": Act(0.75, lambda s: s.made.strip),
    "slice_axis": Act("A", lambda s: s.run.feed.axes, axes_across("A")),
    # which patches, when
    "batch_size": Act(2, lambda s: len(s.events("generator")[0].ids)),
    "patch_size": Act(
        32, lambda s: (s.run.feed.rule.patch, s.models.critic.spec.patch, s.limit("patch")), (32, 32, 32), FITTING
    ),
    "stride": Act(7, lambda s: s.run.feed.rule.stride),
    "image_cropping_method": Act("overlapping_with_mask", lambda s: s.run.feed.rule.by_mask, True),
    "flips": Act("xy", lambda s: bool(s.loop) and s.pools[0]["flips"]),
    "resident_subjects": Act(2, lambda s: s.began.position.resident),
    "resident_memory": Act(2.0, lambda s: s.limit("budget_bytes"), 2 * 10**9, FITTING),
    "prefetch": Act(3, lambda s: (s.run.feed.prefetch, s.limit("prefetch")), (3, 3), FITTING),
    "pool_precision": Act("fp16", lambda s: (s.run.feed.dtype, s.limit("precision")), (torch.float16, "fp16"), FITTING),
    "feed": Act("threads", lambda s: bool(s.run) and s.engines[0]),
    "feed_threads": Act(3, lambda s: s.run.feed.threads),
    "auto_batch": Act(True, lambda s: s.run.config.batch_size, 1),
    "seed": Act(5, lambda s: initial(s, 5), True),
    # networks and their arithmetic
    "network": Act("unet", lambda s: (s.models.generator.spec.network, type(s.models.generator).__name__),
        ("unet", "UNetGenerator")),
    "kernel_gen": Act(3, lambda s: s.models.generator.spec.kernel),
    "kernel_dis": Act(3, lambda s: s.models.critic.spec.kernel),
    "residual": Act(False, lambda s: s.models.generator.spec.residual),
    "conditional": Act(True, lambda s: (s.models.generator.spec.conditional, s.models.critic.spec.conditional),
        (True, True)),
    "fit_mask": Act(True, lambda s: (s.models.generator.spec.mask_classes, s.models.critic.spec.in_channels), (3, 5)),
    "scaled": Act(True, lambda s: s.models.generator.spec.scaled),
    "zero_head": Act(True, lambda s: not s.models.generator.head[0].any() and bool(s.models.generator.head[1].any())),
    "form": Act("reference", lambda s: s.models.generator.form),
    "layer_forms": Act("measured", lambda s: s.forms_mode),
    "precision": Act("bf16", lambda s: s.models.arithmetic.dtype, torch.bfloat16),
    "tf32": Act(True, lambda s: s.on_cuda.tf32),
    "layout": Act("contiguous", lambda s: s.on_cuda.channels_last, False),
    "compile": Act("on", lambda s: bool(s.run) and {compiled.turned_on(c, CPU) for c in s.compiled_with}, {True}),
    # one update
    "critic_iterations": Act(3, lambda s: len(s.events("critic")[0].ids)),
    "eps_per_channel": Act(False, lambda s: s.events("critic")[0].eps[0].ndim, 1),
    "lr_gen": Act(0.5, lambda s: rate(s.models.optimiser_g)),
    "lr_dis": Act(0.5, lambda s: rate(s.models.optimiser_d)),
    "beta1": Act(0.25, lambda s: adam(s, 0), {0.25}),
    "beta2": Act(0.25, lambda s: adam(s, 1), {0.25}),
    "lambda_rec": Act(0.25, lambda s: s.loss["lambda_rec"]),
    "lambda_adv": Act(0.25, lambda s: s.loss["lambda_adv"]),
    "reconstruction_loss": Act("dice", lambda s: s.loss["reconstruction"]),
    "agree": Act(True, lambda s: s.run.feed.rule.agree),
    "dice_weight": Act(0.25, lambda s: s.loss["dice_weight"]),
    "lambda_gp": Act(3.0, lambda s: [c.weight for c in s.critic], [3.0] * 4),
    "penalty_every": Act(2, lambda s: [c.weight for c in s.critic], [20.0, 0.0, 20.0, 0.0]),
    "penalty": Act("autograd", lambda s: {(c.way, c.penalty) for c in s.critic}, {("graph", "autograd")}),
    "joint_fakes": Act(False, lambda s: bool(s.critic) and s.passes, [2] * 4),
    "generator_chunk": Act(8, lambda s: bool(s.critic) and s.passes, [8]),
    "accumulate": Act(2, lambda s: s.step.parts, [1, 1]),
    "ema": Act(0.25, lambda s: s.step.kept and round(s.step.kept, 3)),
    "head_rate": Act(0.5, lambda s: round(s.step.moved["head"] / s.step.moved["stem"], 3)),
    "clip_norm": Act(0.25, lambda s: s.models.optimiser_g.clip),
    "max_bad_steps": Act(2, lambda s: s.bad_allowed, "2"),
    # the run
    "epochs": Act(3, lambda s: s.epochs),
    "init_epoch": Act(2, lambda s: s.epochs, 1),
    "steps_per_epoch": Act(4, lambda s: len(s.events("generator")), 8),
    "warmup_epochs": Act(1, lambda s: np.mean([f.adversarial for f in s.events("generator")]), 0.5),
    "snapshot": Act(2, lambda s: len(s.calls("export")), 2, {"epochs": 4}),
    "validate_every": Act(2, lambda s: len(s.calls("validate")), 2, {"epochs": 4}),
    "whole_every": Act(1, lambda s: len(s.calls("whole")), 2),
    "keep_checkpoints": Act(7, lambda s: s.snapshots_kept),
    "patience": Act(1, lambda s: s.epochs, 2, {"epochs": 4, "best_by": "dice"}),
    "best_by": Act("dice", lambda s: len(s.calls("write_weights", "best.safetensors")), 1),
    "lr_schedule": Act("linear", lambda s: line(s, 0.0), True),
    "lr_end": Act(0.5, lambda s: line(s, 0.5), True, {"lr_schedule": "linear"}),
    "lr_warmup": Act(3, lambda s: np.allclose(s.factors[:4], [1 / 3, 2 / 3, 1, 1]), True),
    "tensorboard": Act(True, lambda s: bool(s.began) and [first for _, first in s.boards], [1]),
    # It acts where settings are read: it gives other defaults.
    "preset": Act("paper", lambda s: from_mapping({"new_low_res": [LOW], "preset": s.config.preset}).batch_size, 32),
}  # fmt: skip


def test_every_setting_has_its_place_here():
    assert ACTS.keys() == SETTINGS.keys()


@pytest.mark.parametrize("name", ACTS)
def test_a_setting_reaches_the_place_where_it_acts(name, tmp_path):
    act = ACTS[name]
    found = act.value if act.found is ... else act.found
    plain = CONFIG.replace(**act.beside)
    assert getattr(plain, name) != act.value
    for config, expected in ((plain.replace(**{name: act.value}), True), (plain, False)):
        with pytest.MonkeyPatch.context() as patch:
            assert (act.look(Seen(config, patch, tmp_path)) == found) == expected, config


def test_train_and_test_subjects_are_those_of_the_store(monkeypatch, tmp_path):
    seen = Seen(CONFIG, monkeypatch, tmp_path)
    assert (seen.run.train, seen.run.test) == (["a", "b"], ["t"])


def test_in_the_originals_geometry_whole_volumes_have_to_fit(monkeypatch, tmp_path):
    """Its ratios may change the sizes, and then nothing of a volume is left out."""
    assert Seen(CONFIG.replace(**FITTING, geometry="segsrgan"), monkeypatch, tmp_path).limit("patch") == 0
