"""Training settings: one frozen dataclass that refuses nonsense, read from and written to YAML.

Defaults are the original code's (SEGSRGAN.md section 4); ``PRESETS`` holds the paper's where they differ.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import reprlib
import types
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from fastsrgan.errors import ModelError

Triple = tuple[float, float, float]
SIZE_MULTIPLE = 4  # of the edges that networks take: two stride-2 convolutions
MIN_SIZE = 8  # reflect padding at a quarter of the resolution needs two voxels
MAX_BYTES, MAX_DEPTH = 1 << 17, 8  # of a settings file, whose reader takes its time
LARGEST_LABEL = 32767
LARGEST = {"patch_size": 1024, "kernel_gen": 1024, "kernel_dis": 1024, "bias_field": 5}  # e^5 is 148-fold

CHOICES = {
    "network": ("plain", "unet"),
    "reconstruction_loss": ("charbonnier", "dice"),
    "geometry": ("physical", "segsrgan"),
    "interp": ("scipy", "sitk"),
    "interpolation_type": (
        "NearestNeighbor",
        "Linear",
        "Spline",
        "Gaussian",
        "Hamming",
        "Cosine",
        "Welch",
        "Lanczos",
        "Blackman",
    ),
    "image_cropping_method": ("bounding_box", "overlapping_with_mask"),
    "form": ("fast", "reference"),
    "layer_forms": ("auto", "measured", "fixed"),
    "penalty": ("auto", "manual", "explicit", "autograd"),
    "feed": ("auto", "dali", "threads"),
    "pool_precision": ("auto", "fp32", "fp16", "bf16"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "layout": ("auto", "contiguous", "channels_last"),
    "compile": ("auto", "on", "off"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "best_by": ("dice", "psnr"),
    "slice_axis": ("auto", "S", "A", "R"),
}
SHARES = ("synthetic", "synthetic_free", "synthetic_invert", "synthetic_strip")

POSITIVE = (
    *("epochs", "init_epoch", "batch_size", "stride", "critic_iterations", "head_rate", "lr_gen", "lr_dis"),
    *("kernel_gen", "kernel_dis", "snapshot", "validate_every", "keep_checkpoints", "max_bad_steps"),
    *("prefetch", "accumulate", "penalty_every"),
)
NOT_NEGATIVE = (
    *("lambda_rec", "lambda_adv", "lambda_gp", "noise", "warmup_epochs", "clip_norm", "ema", "contrast_max"),
    *(
        "bias_field",
        "profile",
        "profile_box",
        "gap",
        "motion",
        "feed_threads",
        "generator_chunk",
        "lr_warmup",
        "lr_end",
        "patience",
    ),
    *("whole_every", "dice_weight"),
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run besides its data.

    new_low_res : one triple of mm (fixed) or two (bounds drawn uniformly per image and epoch), see slice_axis
    slice_axis : directions of the body that these are along: in the plane twice, then through it along "S" (axial
        slices), "A" (coronal) or "R" (sagittal); "auto": those of most subjects' stored axes. In segsrgan geometry
        always each subject's stored axes
    epochs, init_epoch : last and first epoch, counted from 1; epochs - init_epoch + 1 remain
    batch_size, patch_size, stride : patches per update, their edge and grid spacing in voxels
    critic_iterations : critic updates per generator update
    lambda_rec, lambda_adv, lambda_gp : weights of reconstruction, adversarial term and gradient penalty
    eps_per_channel : draw the penalty's interpolation per sample and channel (the code) or per sample (the paper)
    contrast_max, noise : the power is uniform in [1 - c, 1 + c]; noise std as a fraction of the LR maximum
    geometry : observation model, "physical" in millimetres or "segsrgan", the original's numbers
    interp, interpolation_type : "sitk" (segsrgan geometry): SimpleITK's Expand with one of nine interpolators
    network, kernel_gen, kernel_dis, residual, conditional, fit_mask : architecture (networks.py)
    scaled : SR head in units of the patch's in-plane gradient (networks.GeneratorSpec; not in the paper)
    zero_head : start a new generator's SR head at zero, so that training starts at the spline
    snapshot : epochs between checkpoints; validate_every : epochs between validations
    steps_per_epoch : stop an epoch after so many generator updates (None: every patch once)
    warmup_epochs : epochs without the adversarial term and without critic updates
    ema : decay of the averaged generator that is saved beside the trained one; 0 is off
    head_rate : learning rate of the generator's head as a fraction of lr_gen (its 7^3 taps add up, docs/decisions/003)
    clip_norm : largest gradient norm of a generator update; 0 is off
    resident_subjects : subjects kept in memory at once (None: as many as fit)
    max_bad_steps : updates with NaN or infinite loss in a row before training stops
    bias_field, rician, profile, flips, motion : clinical extras of the degradation, each off by default (extras.py):
        largest log amplitude of a smooth field; Rician instead of Gaussian noise; relative spread of the slice
        profile's width; axes of random mirroring, "x" to "xyz"; sd in mm and degrees of motion between slices
    gap, profile_box : thickness of slices over their spacing is uniform in [1 - gap, 1], the share of the box in the
        slice profile uniform in [0, profile_box]; at 0 slices touch and their profile is the Gaussian
    feed : "dali", "threads", or whichever is there; feed_threads, prefetch : its threads (0: auto), groups made ahead
    resident_memory : GB for resident volumes (None: 40 % of what is free); pool_precision : their type
    block_memory : GB above which one volume is degraded in blocks (None: whole)
    form, penalty : exact rewrites of network layers and of the gradient penalty ("reference"/"autograd": plain forms)
    layer_forms : which fast form a layer takes on a CPU: "measured", the one that was timed as faster on this machine,
        or "fixed", the same everywhere; "auto" is FASTSRGAN_FORMS, else measured (forms.py). A resumed run keeps its
    joint_fakes : one generator pass for the fakes of all critic updates; generator_chunk : patches of it at a time (0:
        auto)
    precision, tf32, layout, compile : how the device computes; "auto" decides by the kind of device (docs/training.md)
    accumulate : micro-batches that make one update; auto_batch : lower batch_size before the first update until it fits
    lr_schedule, lr_warmup, lr_end : shape, updates of linear warm-up, last rate as a fraction
    patience : validations without a better score before training stops; 0 is off; best_by : that score
    whole_every : epochs between validations on whole volumes with dense overlap; 0 is off
    tensorboard : write scalars and sample images to RUN/tensorboard
    penalty_every : critic updates between gradient penalties, weighted accordingly; dice_weight : soft Dice term added
    synthetic : share of the visits of a subject with an image and tissues in which the image is made of the tissues;
        without an image it always is
    structure : values of the tissues that are the label, for example "3,42"
    tissue_means : "VALUE:MEAN:SD,..." about which means are drawn, in parts of full scale ("": any contrast)
    synthetic_free, synthetic_invert, synthetic_strip : shares of the synthetic visits with a mean for each structure,
        with bright and dark exchanged, and of a head without all that is not brain (synthesis.py)
    """

    new_low_res: tuple[Triple, ...] = ()
    epochs: int = 200
    init_epoch: int = 1
    batch_size: int = 16
    patch_size: int = 64
    stride: int = 20
    critic_iterations: int = 5
    lr_gen: float = 1e-4
    lr_dis: float = 1e-4
    beta1: float = 0.5
    beta2: float = 0.999
    lambda_rec: float = 1.0
    lambda_adv: float = 1e-3
    lambda_gp: float = 10.0
    eps_per_channel: bool = True
    reconstruction_loss: str = "charbonnier"
    contrast_max: float = 0.5
    noise: float = 0.03
    geometry: str = "physical"
    interp: str = "scipy"
    interpolation_type: str = "Spline"
    image_cropping_method: str = "bounding_box"
    network: str = "plain"
    kernel_gen: int = 16
    kernel_dis: int = 32
    residual: bool = True
    conditional: bool = False
    fit_mask: bool = False
    scaled: bool = False
    zero_head: bool = False
    snapshot: int = 1
    validate_every: int = 1
    keep_checkpoints: int = 3
    steps_per_epoch: int | None = None
    warmup_epochs: int = 0
    ema: float = 0.0
    head_rate: float = 1.0
    clip_norm: float = 0.0
    resident_subjects: int | None = None
    max_bad_steps: int = 10
    seed: int = 0
    bias_field: float = 0.0
    rician: bool = False
    profile: float = 0.0
    profile_box: float = 0.0
    gap: float = 0.0
    flips: str = ""
    motion: float = 0.0
    feed: str = "auto"
    feed_threads: int = 0
    prefetch: int = 1
    resident_memory: float | None = None
    pool_precision: str = "auto"
    block_memory: float | None = None
    form: str = "fast"
    layer_forms: str = "auto"
    penalty: str = "auto"
    joint_fakes: bool = True
    generator_chunk: int = 0
    precision: str = "auto"
    tf32: bool = False
    layout: str = "auto"
    compile: str = "auto"
    accumulate: int = 1
    auto_batch: bool = False
    lr_schedule: str = "constant"
    lr_warmup: int = 0
    lr_end: float = 0.0
    patience: int = 0
    best_by: str = "dice"
    whole_every: int = 0
    tensorboard: bool = False
    penalty_every: int = 1
    dice_weight: float = 0.0
    synthetic: float = 0.0
    structure: str = ""
    tissue_means: str = ""
    synthetic_free: float = 0.25
    synthetic_invert: float = 0.2
    synthetic_strip: float = 0.5
    slice_axis: str = "auto"
    preset: str = "code"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ModelError(f"config: {name}", f"{shown(value)} is not allowed", f"one of {', '.join(allowed)}")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ModelError(f"config: {f.name}", f"{value} is not allowed", "a finite number")
        usable = all(len(t) == 3 and min(t) > 0 and math.isfinite(sum(t)) for t in self.new_low_res)
        if len(self.new_low_res) not in (1, 2) or not usable:
            raise ModelError(
                "config: new_low_res",
                f"{shown(self.new_low_res)} is not allowed",
                "one or two triples of positive millimetres",
            )
        for name, largest in LARGEST.items():
            if getattr(self, name) > largest:
                raise ModelError(
                    f"config: {name}", f"{shown(getattr(self, name))} is not allowed", f"at most {largest}"
                )
        if self.patch_size % 4 or self.patch_size < 16:
            lower = max(16, self.patch_size // 4 * 4)
            raise ModelError(
                "config: patch_size",
                f"{self.patch_size} is not allowed",
                f"a multiple of 4 (two stride-2 layers) from 16 up; try {lower} or {lower + 4}",
            )
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ModelError(f"config: {name}", f"{getattr(self, name)} is not allowed", "a number above zero")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ModelError(f"config: {name}", f"{getattr(self, name)} is not allowed", "zero or above")
        for name in ("resident_memory", "block_memory", "resident_subjects", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ModelError(f"config: {name}", f"{value} is not allowed", "a number above zero, or leave it out")
        if not set(self.flips) <= set("xyz") or len(set(self.flips)) < len(self.flips):
            hint = "letters of the axes to mirror, each once, for example xy"
            raise ModelError("config: flips", f"{shown(self.flips)} is not allowed", hint)
        for name in ("contrast_max", "ema", "noise", "beta1", "beta2", "profile", "gap"):
            if getattr(self, name) >= 1:
                raise ModelError(f"config: {name}", f"{getattr(self, name)} is not allowed", "below 1")
        if self.profile_box > (1 if self.geometry == "physical" else 0):
            hint = "at most 1, the box alone" if self.geometry == "physical" else "0: segsrgan geometry has no box"
            raise ModelError("config: profile_box", f"{self.profile_box} is not allowed", hint)
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ModelError(f"config: {name}", f"{getattr(self, name)} is not allowed", "a share from 0 to 1")
        if self.synthetic and not self.structure:
            raise ModelError("config: synthetic", "which tissues are the label is not said", "structure: 3,42")
        if self.synthetic and (self.fit_mask or self.image_cropping_method == "overlapping_with_mask"):
            reason = "images that are made have no mask, which fit_mask and overlapping_with_mask need"
            raise ModelError("config: synthetic", reason, "leave one of them out")
        label_values(self.structure), tissue_gaussians(self.tissue_means)
        if self.init_epoch > self.epochs:
            raise ModelError(
                "config: init_epoch",
                f"{self.init_epoch} is behind the last epoch, {self.epochs}",
                "more epochs, or a smaller init_epoch",
            )
        if self.slice_axis != "auto" and self.geometry == "segsrgan":
            raise ModelError("config: slice_axis", "the segsrgan geometry keeps the stored axes", "geometry: physical")
        if self.interp == "sitk" and self.geometry != "segsrgan":
            raise ModelError("config: interp", f"sitk is unknown in {self.geometry} geometry", "geometry: segsrgan")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists."""
        values = dataclasses.asdict(self)
        values["new_low_res"] = [list(t) for t in self.new_low_res]
        return values

    def to_yaml(self) -> str:
        """YAML text that ``from_yaml`` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def replace(self, **changes: Any) -> TrainConfig:
        """A validated copy with some settings changed."""
        return dataclasses.replace(self, **changes)


def label_values(text: str) -> tuple[int, ...]:
    """The whole numbers in "3,42". Raises ModelError for anything else."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and 0 < int(part[:9]) <= LARGEST_LABEL for part in parts):
        hint = f"label values from 1 to {LARGEST_LABEL} with commas between, 3,42"
        raise ModelError("config: structure", f"{shown(text)} is not allowed", hint)
    return tuple(sorted({int(part) for part in parts}))


def tissue_gaussians(text: str) -> tuple[tuple[int, float, float], ...]:
    """(value, mean, sd) of each entry of "5:0.46:0.04,1:0.53:0.04". Raises ModelError for anything else."""
    found = {}
    for entry in text.split(",") if text else []:
        try:
            value, mean, sd = entry.split(":")
            found[label_values(value.strip())[0]] = float(mean), float(sd)
        except (ValueError, IndexError, ModelError):
            found[0] = 0.0, 0.0
    if 0 in found or not all(0 < mean <= 1 and 0 <= sd <= 1 for mean, sd in found.values()):
        hint = "VALUE:MEAN:SD,... with means above 0 and up to 1, 5:0.46:0.04,1:0.53:0.04"
        raise ModelError("config: tissue_means", f"{shown(text)} is not allowed", hint)
    return tuple((value, *gaussian) for value, gaussian in sorted(found.items()))


PRESETS: dict[str, dict[str, Any]] = {
    "code": {},
    "paper": {"batch_size": 32, "lambda_gp": 100.0, "eps_per_channel": False, "beta1": 0.9},
}


def from_mapping(values: dict[str, Any], what: str = "config") -> TrainConfig:
    """A configuration from plain values; unknown keys and wrong types are ModelErrors that name what was meant."""
    known = {f.name: f for f in fields(TrainConfig)}
    hints = typing.get_type_hints(TrainConfig)
    preset = values.get("preset", "code")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ModelError(f"{what}: preset", f"{shown(preset)} is not allowed", f"one of {', '.join(PRESETS)}")
    checked: dict[str, Any] = dict(PRESETS[preset])
    for key, value in values.items():
        name = (key if isinstance(key, str) else shown(key)).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ModelError(
                f"{what}: {name[:80]}", "unknown setting", f"did you mean {near[0]}?" if near else "see docs/config.md"
            )
        checked[name] = _coerce(name, value, hints[name], what)
    try:
        return TrainConfig(**checked)
    except ModelError as error:  # what is allowed is known there, where it was read here
        raise ModelError(error.what.replace("config", what, 1), error.reason, error.hint) from error


def _coerce(name: str, value: Any, hint: Any, what: str) -> Any:
    """``value`` as the annotated type, or ModelError; booleans are not numbers here, nor numbers booleans."""
    if name == "new_low_res":
        try:
            triples = [value] if value and not isinstance(value[0], (list, tuple)) else value
            return tuple(tuple(float(v) for v in t) for t in triples)
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise ModelError(
                f"{what}: {name}", f"{shown(value)} is not allowed", "one or two triples of millimetres, [[1, 1, 3]]"
            ) from error
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    kind = next(k for k in kinds if k is not type(None))
    if kind is float and isinstance(value, float):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    if kind in (bool, str) and isinstance(value, kind):
        return value
    allowed = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")
    raise ModelError(f"{what}: {name}", f"{shown(value)} is not {allowed}", "see docs/config.md")


def shown(value: Any) -> str:
    """A value as it stands in a message: short, whatever it holds."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"


class _Loader(yaml.SafeLoader):
    """Plain values only. Aliases, which can make a small file a huge structure, and repeated keys are refused."""

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
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def from_yaml(path: str | Path) -> TrainConfig:
    """Read a configuration file. Tags that would build objects, unknown keys and wrong types are ModelErrors."""
    return from_mapping(read_yaml(path), what=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (safe loader). Raises ModelError."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe may never end
        raise ModelError(path, "is not a regular file", "a YAML file of settings is expected")
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise ModelError(path, "is too large for settings", f"at most {MAX_BYTES} bytes")
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
    except OSError as error:
        told = f"cannot be read: {error.strerror or error}"
        raise ModelError(path, told, "a YAML file of settings, see docs/config.md") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # dates and numbers that are none
        reason = (str(getattr(error, "problem", None) or error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(path, f"is not plain YAML: {reason}", "a mapping of settings, see docs/config.md") from error
    if not isinstance(values, dict):
        raise ModelError(path, "holds no settings", "a mapping such as 'epochs: 50'")
    return values
