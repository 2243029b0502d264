"""Training settings: a row each, and the frozen dataclass of them, which refuses nonsense and is read from YAML.

A row holds all that is known of a setting. Made from it are its field, its checks, its option of ``fastsrgan train``,
its line in docs/config.md (``python tools/settings_page.py``), its part of ``PRESETS`` and what a resumed run does with
another value. A new setting is a row here and the place where it acts. Defaults are those of the original's code;
``PRESETS`` holds the paper's where they differ, and those of a recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastsrgan.errors import ModelError, SettingsError, shown

Triple = tuple[float, float, float]
SPACING_LIMITS = (1e-6, 1e6)  # mm; beyond them no unit is meant
SIZE_MULTIPLE = 4  # of the edges that networks take: two stride-2 convolutions
MIN_SIZE = 8  # reflect padding at a quarter of the resolution needs two voxels
LARGEST_LABEL = 32767
AXES = "xyz"  # of an image, as flips name them
MAX_BYTES, MAX_DEPTH = 1 << 17, 8  # of a settings file, whose reader takes its time

BASIC, ADVANCED = "basic", "advanced"  # the two groups of options

# What a run that is resumed does with another value than its snapshot's.
FREE, NEW, KEPT, ANEW, START, MATCH = "free", "new value", "auto goes on", "epoch anew", "not used", "must match"
JUDGED = "best anew"
RESUMED = {
    FREE: "takes the new value, which changes no update of the networks (`epochs` does with an `lr_schedule`: said)",
    JUDGED: "takes the new value, and forgets which weights were best by the old one",
    NEW: "takes the new value and says so",
    KEPT: "`auto` goes on as the snapshot did; any other value is taken, and that is said",
    ANEW: "takes the new value, says so and begins the epoch anew, since other patches come at other times",
    START: "keeps what it began with: the setting acts only where a run begins",
    MATCH: "is refused: the snapshot holds other networks",
}
TAKEN = (NEW, KEPT, ANEW)  # these are said


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The row of one setting.

    default, help : value without which it is given, and what it means, as ``--help`` says it
    resume : one of ``RESUMED``
    also : names of its option besides ``--name``, those of the original among them
    more : what docs/config.md says besides ``help``
    choices : the values there are; ``above``, ``low``, ``high``, ``below`` : bounds of numbers, the inner two included
    check : the hint about a value that is not allowed, "" about one that is
    presets : preset -> its value there
    metavar : what the help shows for text
    name, kind, optional : of its field: name, type (int, float, bool, str or tuple) and whether None is allowed
    """

    default: Any
    help: str
    resume: str
    also: tuple[str, ...] = ()
    group: str = ADVANCED
    more: str = ""
    choices: tuple[str, ...] = ()
    above: float | None = None
    low: float | None = None
    high: float | None = None
    below: float | None = None
    check: Callable[[Any], str] | None = None
    presets: Mapping[str, Any] = field(default_factory=dict)
    metavar: str = ""
    name: str = ""
    kind: type = str
    optional: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of its option, in the spelling with ``-``."""
        return (*self.also, f"--{self.name.replace('_', '-')}")

    def text(self, value: Any) -> str:
        """A value of it as help and documentation show it."""
        return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value) or "empty"

    def hint(self, value: Any) -> str:
        """What is allowed, where ``value`` is not; else nothing."""
        if self.choices and value not in self.choices:
            return f"one of {', '.join(self.choices)}"
        if value is None and self.optional:
            return ""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if self.high is not None and value > self.high:
            return f"at most {self.high}"
        if self.above is not None and not value > self.above:
            return f"a number above {self.above or 'zero'}{', or leave it out' if self.optional else ''}"
        if self.low is not None and value < self.low:
            return f"{self.low or 'zero'} or above"
        if self.below is not None and value >= self.below:
            return f"below {self.below}"
        return self.check(value) if self.check else ""

    def plain(self, value: Any, what: str) -> Any:
        """A plain value, as a file holds it, in the type of the field; booleans are no numbers here, nor the reverse.

        Raises ModelError, which names ``what``, for a value of another type.
        """
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None and self.optional:
            return None
        if self.kind is tuple:
            return triples(value, f"{what}: {self.name}")
        if self.kind is float and number and (isinstance(value, float) or abs(value) < 1e300):
            return float(value)
        if self.kind is int and number and isinstance(value, int) and abs(value) < 2**63:
            return value
        if self.kind in (bool, str) and isinstance(value, self.kind):
            return value
        allowed = {int: "a whole number", float: "a number", bool: "true or false"}.get(self.kind, "text")
        raise ModelError(f"{what}: {self.name}", f"{shown(value)} is not {allowed}", "see docs/config.md")


def setting(default: Any, help: str, resume: str, **facts: Any) -> Any:
    """A field of ``TrainConfig`` with its row: ``facts`` are further fields of `Setting`."""
    return field(default=default, metadata={"row": Setting(default=default, help=help, resume=resume, **facts)})


def triples(value: Any, what: str) -> tuple[tuple[float, ...], ...]:
    """[1, 1, 3] or [[1, 1, 2], [1, 1, 4]] as tuples of floats. Raises ModelError for what has no such form."""
    try:
        listed = [value] if value and not isinstance(value[0], (list, tuple)) else value
        return tuple(tuple(float(v) for v in t) for t in listed)
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        reason = f"{shown(value)} is not allowed"
        raise ModelError(what, reason, "one or two triples of millimetres, [[1, 1, 3]]") from error


def check_resolutions(value: tuple[Triple, ...]) -> str:
    """One triple, or two for bounds."""
    usable = all(len(t) == 3 and min(t) > 0 and math.isfinite(sum(t)) for t in value)
    return "" if len(value) in (1, 2) and usable else "one or two triples of positive millimetres"


def check_patch(edge: int) -> str:
    """The networks halve a patch twice."""
    lower = max(16, edge // 4 * 4)
    hint = f"a multiple of 4 (two stride-2 layers) from 16 up; try {lower} or {lower + 4}"
    return hint if edge % 4 or edge < 16 else ""


def check_flips(axes: str) -> str:
    """Some of the letters x, y and z."""
    return "" if len(set(axes) & set(AXES)) == len(axes) else "letters of the axes to mirror, each once, for example xy"


def label_values(text: str) -> tuple[int, ...]:
    """The whole numbers in "3,42". Raises ModelError for anything else."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and 0 < int(part[:9]) <= LARGEST_LABEL for part in parts):
        hint = f"values from 1 to {LARGEST_LABEL} with commas between, 3,42: made images have one structure"
        raise ModelError("config: structure", f"{shown(text)} is not allowed", hint)
    return tuple(sorted({int(part) for part in parts}))


def tissue_gaussians(text: str) -> tuple[tuple[tuple[int, float, float], ...], ...]:
    """(value, mean, sd) of each entry of "5:0.46:0.04,1:0.53:0.04", per contrast, "/" between. Raises ModelError."""
    contrasts = []
    for part in text.split("/") if text else []:
        found = {}
        for entry in part.split(","):
            try:
                value, mean, sd = map(str.strip, entry.split(":"))
                found[label_values(value)[0]] = float(mean), float(sd)
            except (ValueError, IndexError, ModelError):
                found[0] = 0.0, 0.0
        if 0 in found or not all(0 < mean <= 1 >= sd >= 0 for mean, sd in found.values()):
            hint = "VALUE:MEAN:SD,..., means in (0, 1], 5:0.46:0.04,1:0.53:0.04; / between contrasts"
            raise ModelError("config: tissue_means", f"{shown(text)} is not allowed", hint)
        contrasts.append(tuple((value, *gaussian) for value, gaussian in sorted(found.items())))
    return tuple(contrasts)


def named_amounts(text: str) -> dict[str, float]:
    """Name -> amount of the entries of "gibbs:0.3,motion:0.5". Raises ModelError for anything else."""
    amounts: dict[str, float] = {}
    for entry in text.split(",") if text else []:
        name, _, amount = (part.strip() for part in entry.partition(":"))
        try:
            value = float(amount)
        except ValueError:
            value = -1.0
        if not name.isidentifier() or name in amounts or not 0 <= value < math.inf:
            hint = "NAME:AMOUNT,... with each name once and amounts from 0 up, gibbs:0.3"
            raise ModelError("config: artefacts", f"{shown(text)} is not allowed", hint)
        amounts[name] = value
    return amounts


def hint_of(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """The check of a text that ``parse`` reads: its hint where it raises ModelError."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ModelError as error:
            return error.hint
        return ""

    return check


SITK = ("NearestNeighbor", "Linear", "Spline", "Gaussian", "Hamming", "Cosine", "Welch", "Lanczos", "Blackman")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run besides its data. The fields' rows say what they mean.

    Raises SettingsError for all values that are not allowed.
    """

    # fmt: off
    new_low_res: tuple[Triple, ...] = setting((),
        "mm of the scans to train for, in plane twice and through it (segsrgan geometry: stored axes); twice: bounds",
        NEW, group=BASIC, also=("-n",), check=check_resolutions, more="two triples: uniform per axis, image and epoch")
    epochs: int = setting(200, "last epoch", FREE, group=BASIC, also=("-e", "--epoch"), above=0)
    init_epoch: int = setting(1, "first epoch (epoch - init_epoch + 1 are run)", START, also=("-i",), above=0,
        more="epochs count from 1")
    batch_size: int = setting(16, "patches per update", ANEW, group=BASIC, also=("-b",), presets={"paper": 32}, above=0,
        more="of all ranks")
    patch_size: int = setting(64, "edge of the training patches", ANEW, group=BASIC, also=("-ps",), high=1024,
        check=check_patch,
        more="in voxels, a multiple of 4 from 16 up; refused on resume where the critic would have other layers")
    stride: int = setting(20, "grid spacing of the training patches", ANEW, above=0, more="in voxels")
    critic_iterations: int = setting(5, "critic updates per generator update", NEW,
        also=("--number-of-disciminator-iteration", "--number-of-discriminator-iteration"), above=0)
    lr_gen: float = setting(1e-4, "learning rate of the generator", NEW, group=BASIC, also=("--lrgen",),
        presets={"recommended": 8e-4}, above=0)
    lr_dis: float = setting(1e-4, "learning rate of the critic", NEW, group=BASIC, also=("--lrdis",), above=0)
    beta1: float = setting(0.5, "Adam's decay of gradients", NEW, presets={"paper": 0.9}, low=0, below=1)
    beta2: float = setting(0.999, "Adam's decay of squared gradients", NEW, low=0, below=1)
    lambda_rec: float = setting(1.0, "weight of the reconstruction loss", NEW, also=("--lambrec",),
        presets={"recommended": 20.0}, low=0)
    lambda_adv: float = setting(1e-3, "weight of the adversarial loss; 0 trains without a critic", NEW, group=BASIC,
        also=("--lambadv",), presets={"recommended": 0.0}, low=0)
    lambda_gp: float = setting(10.0, "weight of the gradient penalty", NEW, also=("--lambgp",),
        presets={"paper": 100.0}, low=0)
    eps_per_channel: bool = setting(True, "draw the penalty's interpolation per sample and channel, not per sample",
        NEW, presets={"paper": False})
    reconstruction_loss: str = setting("charbonnier", "reconstruction loss", NEW, also=("-rl",),
        choices=("charbonnier", "dice"))
    contrast_max: float = setting(0.5, "contrast power is uniform in [1 - c, 1 + c]", NEW, group=BASIC,
        also=("-contrast-max",), low=0, below=1)
    noise: float = setting(0.03, "noise std over the LR maximum, of every image (see --noise-from)", NEW, group=BASIC,
        also=("-percent-val-max", "--percent-val-max"), presets={"recommended": 0.04}, low=0, below=1)
    noise_from: float | None = setting(None, "noise std drawn per image and epoch from this to --noise", NEW,
        group=BASIC, presets={"recommended": 0.0}, low=0, below=1,
        more="none: every image has `noise`, as in the original; validation on patches always has `noise`")
    geometry: str = setting("physical", "observation model: exact in mm, or the original's numbers", ANEW,
        choices=("physical", "segsrgan"))
    interp: str = setting("scipy",
        "interpolation of the original's numbers; sitk implies --geometry segsrgan if none is set", NEW, also=("-int",),
        choices=("scipy", "sitk"), more="sitk: SimpleITK's Expand (extra `sitk`); in a file with `geometry: segsrgan`")
    interpolation_type: str = setting("Spline", "interpolator of --interp sitk", NEW, also=("-it",), choices=SITK)
    image_cropping_method: str = setting("bounding_box", "where patches are taken", ANEW, also=("-icm",),
        choices=("bounding_box", "overlapping_with_mask"))
    network: str = setting("plain", "architecture of the generator", MATCH, group=BASIC, choices=("plain", "unet"))
    kernel_gen: int = setting(16, "channels of the generator's first convolution", MATCH, group=BASIC, above=0,
        high=1024)
    kernel_dis: int = setting(32, "channels of the critic's first convolution", MATCH, group=BASIC, above=0, high=1024)
    residual: bool = setting(True, "output = input - head", MATCH, also=("-is-residual", "--is-residual"))
    conditional: bool = setting(False, "resolution as a second input", MATCH,
        also=("-is-conditional", "--is-conditional"), more="[no effect](decisions/010-conditional-input.md)")
    fit_mask: bool = setting(False, "also learn the classes of Mask_image; several --label imply True", MATCH,
        group=BASIC, also=("-fm",))
    scaled: bool = setting(False, "SR head in units of the patch's in-plane gradient: intensity-equivariant", MATCH,
        presets={"recommended": True}, more="[why](decisions/011-scaled-head.md); not in the paper")
    zero_head: bool = setting(False, "start at the spline: SR head zero", START, presets={"recommended": True},
        more="at 0 where `residual` is false")
    snapshot: int = setting(1, "epochs between snapshots", FREE, group=BASIC, also=("-s",), above=0)
    validate_every: int = setting(1, "epochs between validations", FREE, group=BASIC, above=0)
    keep_checkpoints: int = setting(3, "snapshots kept for --resume", FREE, above=0)
    steps_per_epoch: int | None = setting(None, "updates after which an epoch ends; none: every patch once", ANEW,
        group=BASIC, above=0)
    warmup_epochs: int = setting(0, "epochs before the adversarial term starts", NEW, low=0,
        more="without updates of the critic")
    ema: float = setting(0.0, "decay of an averaged generator, which is then validated and shipped; 0 off", NEW,
        group=BASIC, presets={"recommended": 0.999}, low=0, below=1, more="a resumed run may begin it")
    head_rate: float = setting(1.0, "learning rate of the generator's head over lr_gen", NEW, above=0,
        presets={"recommended": 0.1}, more="its 343 taps add up ([decision 003](decisions/003-demo-weights.md))")
    clip_norm: float = setting(0.0, "largest generator gradient norm; 0 off", NEW, presets={"recommended": 5.0}, low=0)
    resident_subjects: int | None = setting(None, "subjects of a group (--prefetch); none: all that fit", ANEW, above=0)
    max_bad_steps: int = setting(10, "updates in a row, none finite, that end the run", FREE, above=0)
    seed: int = setting(0, "seed of every random number", ANEW, group=BASIC)
    bias_field: float = setting(0.0, "largest log amplitude of a smooth bias field", NEW, low=0, high=5)  # 148-fold
    rician: bool = setting(False, "Rician instead of Gaussian noise", NEW)
    profile: float = setting(0.0, "relative spread of the slice profile's width", NEW, presets={"recommended": 0.2},
        low=0, below=1)
    profile_box: float = setting(0.0, "largest share of a box in the slice profile, the rest a Gaussian", NEW,
        presets={"recommended": 1.0}, low=0, high=1, more="drawn uniformly from 0 on")
    gap: float = setting(0.0, "largest gap between slices over their spacing", NEW, low=0, below=1,
        more="slice thickness over spacing is uniform from 1 - gap to 1")
    flips: str = setting("", "axes along which patches are mirrored at random, for example xy", NEW, check=check_flips,
        presets={"recommended": "x"}, metavar="AXES")
    motion: float = setting(0.0, "sd in mm and degrees of motion between slices", NEW, low=0)
    artefacts: str = setting("", "further artefacts of the scans, for example gibbs:0.3", NEW,
        metavar="NAME:AMOUNT,...", check=hint_of(named_amounts), more="[which there are](training.md#artefacts)")
    feed: str = setting("auto", "what moves volumes from the store", FREE, choices=("auto", "dali", "threads"),
        more="auto: threads; on CUDA with DALI whichever was faster on the first volumes")
    feed_threads: int = setting(0, "threads of the feed; 0 auto", FREE, low=0)
    prefetch: int = setting(1, "groups of subjects made ahead, in memory beside the one in use", FREE, above=0)
    resident_memory: float | None = setting(None, "GB for the groups in memory where --resident-subjects is none", ANEW,
        above=0, more="none: 40 % of what is free")
    pool_precision: str = setting("auto", "type of the resident intensities", NEW,
        choices=("auto", "fp32", "fp16", "bf16"))
    block_memory: float | None = setting(None, "GB above which a volume is degraded in blocks", NEW, above=0,
        more="none: whole")
    form: str = setting("fast", "network layers: exact fast forms or the plain ones", NEW,
        choices=("fast", "reference"))
    layer_forms: str = setting("auto", "fast forms on a CPU: timed for this machine, or the same everywhere", KEPT,
        choices=("auto", "measured", "fixed"), more="auto: FASTSRGAN_FORMS, else measured; ranks on CPUs: fixed")
    penalty: str = setting("auto", "critic update: by hand, with an explicit penalty graph, or double backward", NEW,
        choices=("auto", "manual", "explicit", "autograd"), more="all give the same gradients; auto takes the fastest")
    joint_fakes: bool = setting(True, "one generator pass for all critic updates of an iteration (one rank)", NEW)
    generator_chunk: int = setting(0, "patches per generator pass without gradients; 0 auto", NEW, low=0)
    precision: str = setting("auto", "arithmetic of the networks", KEPT, group=BASIC,
        choices=("auto", "fp32", "bf16", "fp16"), more="auto decides by the kind of device ([training](training.md))")
    tf32: bool = setting(False, "TF32 in float32 products of CUDA devices", NEW)
    layout: str = setting("auto", "memory layout of the activations", NEW,
        choices=("auto", "contiguous", "channels_last"), more="auto decides by the kind of device")
    compile: str = setting("auto", "torch.compile and CUDA graphs", NEW, choices=("auto", "on", "off"),
        more="auto decides by the kind of device")
    accumulate: int = setting(1, "micro-batches per update", NEW, above=0)
    auto_batch: bool = setting(False, "lower the batch size before the first update until it fits", FREE, group=BASIC)
    lr_schedule: str = setting("constant", "learning rate over the run", NEW, choices=("constant", "linear", "cosine"),
        presets={"recommended": "cosine"}, more="from epoch 1 to the last update")
    lr_warmup: int = setting(0, "updates of linear warm-up", NEW, presets={"recommended": 100}, low=0)
    lr_end: float = setting(0.0, "last learning rate over the first, of linear and cosine", NEW, low=0)
    patience: int = setting(0, "validations without a better score that end a run; 0 off", FREE, group=BASIC, low=0)
    best_by: str = setting("both", "score that chooses best.safetensors; both: Dice and gain over the spline", JUDGED,
        group=BASIC, choices=("both", "dice", "psnr"),
        more="Dice plus the part of the spline's error that is gone ([decision 027](decisions/027-best-weights.md))")
    whole_every: int = setting(0, "epochs between validations on whole volumes; 0 off", FREE, low=0,
        more="as `infer --step 30 --flips none` and `evaluate` give them")
    tensorboard: bool = setting(False, "write RUN/tensorboard", FREE, group=BASIC, more="scalars and sample images")
    penalty_every: int = setting(1, "critic updates between gradient penalties", NEW, above=0, more="weighted to match")
    dice_weight: float = setting(0.0, "weight of an added soft Dice term", NEW, presets={"recommended": 1.0}, low=0)
    agree: bool = setting(False, "make results agree with their scans before the loss sees them", NEW,
        more="as `infer --agree auto`, but for coarser planes ([029](decisions/029-agreement-in-training.md))")
    synthetic: float = setting(0.0, "share of the visits that show an image made of the subject's tissues", NEW, low=0,
        high=1, more="of subjects with an image and tissues; without an image it always is made"
        " ([training](training.md#images-made-of-label-maps))")
    structure: str = setting("", "values of the tissues that are the label, one structure: 3,42", NEW, metavar="VALUES",
        check=hint_of(label_values))
    tissue_means: str = setting("", "means of made images, VALUE:MEAN:SD,...; / between contrasts; without: any", NEW,
        check=hint_of(tissue_gaussians), metavar="MEANS", more="drawn about these, one contrast per visit")
    synthetic_free: float = setting(0.25, "share of made images with a mean for each structure", NEW, low=0, high=1)
    synthetic_invert: float = setting(0.2, "share of made images with bright and dark exchanged", NEW, low=0, high=1)
    synthetic_strip: float = setting(0.5, "share of made heads that show the brain alone", NEW, low=0, high=1)
    slice_axis: str = setting("auto", "direction through the slices of -n; auto: as most subjects are stored", NEW,
        group=BASIC, choices=("auto", "S", "A", "R"), more="S: axial, A: coronal, R: sagittal slices; new_low_res is"
        " in the plane twice, then through it; in segsrgan geometry always along each subject's stored axes")
    preset: str = setting("code", "defaults: the original code's, the paper's, or what was found to work", FREE,
        group=BASIC, choices=("code", "paper", "recommended"), more="code: but for `geometry`; "
        "recommended: [what to expect](training.md#a-recipe); options beside it win; not with `--resume` alone")
    # fmt: on

    def __post_init__(self) -> None:
        wrong = {name: hint for name, row in SETTINGS.items() if (hint := row.hint(getattr(self, name)))}
        found = [(name, f"{shown(getattr(self, name))} is not allowed", hint) for name, hint in wrong.items()]
        conflicts = self._conflicts({} if "artefacts" in wrong else named_amounts(self.artefacts))
        found += [(names[0], why, hint) for names, why, hint in conflicts if not wrong.keys() & set(names)]
        if found:
            raise SettingsError("config", found)

    def _conflicts(self, amounts: Mapping[str, float]) -> Iterator[tuple[tuple[str, ...], str, str]]:
        """(settings, reason, hint) of values that are allowed, but not together; ``amounts`` of the artefacts."""
        if self.profile_box and not self.physical:
            yield ("profile_box", "geometry"), "segsrgan geometry has no box", "0, or geometry: physical"
        if self.synthetic and not self.structure:
            yield ("synthetic", "structure"), "which tissues are the label is not said", "structure: 3,42"
        if self.synthetic and (self.fit_mask or self.image_cropping_method == "overlapping_with_mask"):
            yield ("synthetic",), "made images have no mask for fit_mask or overlapping_with_mask", "leave one out"
        if self.noise_from is not None and self.noise_from > self.noise:
            yield ("noise_from", "noise"), f"{self.noise_from} is above noise, {self.noise}", "from 0 to noise"
        for name in amounts:
            if getattr(self, name, 0):
                yield ("artefacts", name), f"{name} has an amount of its own too", f"leave out --{name}"
        if self.init_epoch > self.epochs:
            yield ("init_epoch", "epochs"), f"{self.init_epoch} is behind the last epoch, {self.epochs}", "more epochs"
        if self.slice_axis != "auto" and not self.physical:
            yield ("slice_axis", "geometry"), "the segsrgan geometry keeps the stored axes", "geometry: physical"
        if self.interp == "sitk" and self.physical:
            yield ("interp", "geometry"), f"sitk is unknown in {self.geometry} geometry", "geometry: segsrgan"

    @property
    def physical(self) -> bool:
        """Whether every structure keeps its place, which the original's numbers do not."""
        return self.geometry == "physical"

    @property
    def continues(self) -> str:
        """What a run is called that goes on from an earlier one's weights, as in the original; empty: it begins."""
        return f"from_epoch_{self.init_epoch}" if self.init_epoch > 1 else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists."""
        return dataclasses.asdict(self) | {"new_low_res": [list(t) for t in self.new_low_res]}

    def to_yaml(self) -> str:
        """YAML text that ``from_yaml`` reads back to an equal configuration."""
        import yaml  # here and below: what only computes, as on a bare GPU machine, needs no YAML

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def replace(self, **changes: Any) -> TrainConfig:
        """A validated copy with some settings changed."""
        return dataclasses.replace(self, **changes)


def _table() -> dict[str, Setting]:
    """Name -> row, completed with what the field says."""
    hints = typing.get_type_hints(TrainConfig)
    rows = {}
    for f in fields(TrainConfig):
        kinds = typing.get_args(hints[f.name]) if isinstance(hints[f.name], types.UnionType) else (hints[f.name],)
        kind = next(k for k in kinds if k is not types.NoneType)
        row, optional = f.metadata["row"], types.NoneType in kinds
        rows[f.name] = dataclasses.replace(row, name=f.name, kind=typing.get_origin(kind) or kind, optional=optional)
    return rows


SETTINGS: dict[str, Setting] = _table()
CHOICES: dict[str, tuple[str, ...]] = {name: row.choices for name, row in SETTINGS.items() if row.choices}
PRESETS: dict[str, dict[str, Any]] = {
    preset: {name: row.presets[preset] for name, row in SETTINGS.items() if preset in row.presets}
    for preset in CHOICES["preset"]
}


def from_mapping(values: dict[str, Any], what: str = "config") -> TrainConfig:
    """A configuration from plain values; unknown keys, wrong types and what is not allowed are one SettingsError."""
    found: list[tuple[str, str, str]] = []
    preset = values.get("preset", "code")
    if not isinstance(preset, str) or preset not in PRESETS:
        found, preset = [("preset", f"{shown(preset)} is not allowed", f"one of {', '.join(PRESETS)}")], "code"
    checked: dict[str, Any] = dict(PRESETS[preset])
    for key, value in (values | {"preset": preset}).items():
        name = (key if isinstance(key, str) else shown(key)).replace("-", "_")
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            hint = f"did you mean {near[0]}?" if near else "see docs/config.md"
            found.append((name[:80] if name.isprintable() else shown(key), "unknown setting", hint))
            continue
        try:
            checked[name] = SETTINGS[name].plain(value, what)
        except ModelError as error:
            found.append((name, error.reason, error.hint))
    try:
        config = TrainConfig(**checked)
    except SettingsError as error:  # what is allowed is known there, where it was read here
        raise SettingsError(what, found + [f for f in error.faults if f[0] not in {n for n, _, _ in found}]) from error
    if found:
        raise SettingsError(what, found)
    return config


@functools.cache
def _loader() -> type:
    """Plain values only. Aliases, which can make a small file a huge structure, and repeated keys are refused."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("aliases are not taken in settings")
            if self.depth >= MAX_DEPTH:
                raise yaml.YAMLError(f"lists within lists, more than {MAX_DEPTH} deep")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            names = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise yaml.YAMLError(f"{twice[:80]} is there twice")
            return super().construct_mapping(node, deep)

    # YAML 1.1 takes 1e-4, without a point, for text.
    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def from_yaml(path: str | Path) -> TrainConfig:
    """Read a configuration file. Tags that would build objects, unknown keys and wrong types are ModelErrors."""
    return from_mapping(read_yaml(path), what=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (safe loader). Raises ModelError."""
    import yaml

    if os.path.exists(path) and not os.path.isfile(path):  # a pipe may never end
        raise ModelError(path, "is not a regular file", "a YAML file of settings is expected")
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise ModelError(path, "is too large for settings", f"at most {MAX_BYTES} bytes")
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _loader())
    except OSError as why:
        raise ModelError(path, f"cannot be read: {why.strerror or why}", "check the path and its permissions") from why
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # dates and numbers that are none
        reason = (str(getattr(error, "problem", None) or error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(path, f"is not plain YAML: {reason}", "a mapping of settings, see docs/config.md") from error
    if not isinstance(values, dict):
        raise ModelError(path, "holds no settings", "a mapping such as 'epochs: 50'")
    return values
