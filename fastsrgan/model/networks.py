"""The SegSRGAN generators and critic (Delannoy et al. 2019, section 2.4).

Arrays are (B, C, X, Y, Z). The generator's only input is the interpolated low-resolution image, normalised by the
maximum of the low-resolution image; conditional models get the slice resolution in mm as a constant second channel.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsrgan.config import MIN_SIZE, SIZE_MULTIPLE
from fastsrgan.core.draws import rng
from fastsrgan.errors import ModelError
from fastsrgan.model.layers import (
    FORMS,
    InstanceNorm,
    by_hand,
    conv3_reflect,
    conv7_reflect,
    halving_conv,
    norm_conv,
    upsample_conv,
)

N_BLOCKS = 6
ONE_BY_ONE = 2**17  # voxels of a sample from which inference on a CPU takes full resolution sample by sample
MAX_FILE = 16 * 2**30  # bytes of weights
# The largest a spec may ask for: far above any network of this kind, far below what exhausts a machine.
LIMITS = {"kernel": 1024, "mask_classes": 256, "patch": 1024, "in_channels": 258}
FLAT = 2.0**-23  # of the image maximum: float32's resolution there


@dataclass(frozen=True)
class GeneratorSpec:
    """What fixes a generator's architecture; stored beside its weights.

    network : a name in ``NETWORKS``
    kernel : channels of the first convolution (the original's kernel_gen)
    residual : output channel 0 is input - head instead of the head alone
    conditional : a second input channel holds the slice resolution in mm
    mask_classes : number of softmax channels behind SR and segmentation
    scaled : the SR head is multiplied by the sample's in-plane gradient, so that SR(a x) = a SR(x) (not in the paper;
        docs/decisions/011)
    shifted : images with values below 0 were moved up by their minimum in training, and are in inference
        (``intensity.lifted``); no part of the architecture, so networks that differ in it alone are equal
    """

    network: str = "plain"
    kernel: int = 16
    residual: bool = True
    conditional: bool = False
    mask_classes: int = 0
    scaled: bool = False
    shifted: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ModelError("network", f"unknown generator {self.network[:40]!r}", f"one of {', '.join(NETWORKS)}")
        if self.kernel < 1 or self.mask_classes < 0:
            reason = f"kernel {self.kernel}, mask_classes {self.mask_classes}"
            raise ModelError("network", reason, "kernel >= 1, classes >= 0")

    @property
    def out_channels(self) -> int:
        """SR, segmentation and the mask classes."""
        return 2 + self.mask_classes

    def to_dict(self) -> dict:
        """Plain values for YAML, JSON or a safetensors header; without ``shifted`` where it is not so, as in files of
        versions that did not know it."""
        return {key: value for key, value in asdict(self).items() if key != "shifted" or value}


def _conv(out_channels: int, in_channels: int, size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(out_channels, in_channels, size, size, size))


class ResidualBlock(nn.Module):
    """conv 3^3, norm, ReLU, conv 3^3, norm, add the input; no ReLU after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_a, self.norm_a = _conv(channels, channels, 3), InstanceNorm(channels)
        self.conv_b, self.norm_b = _conv(channels, channels, 3), InstanceNorm(channels, relu=False)

    def forward(self, x: Tensor, form: str, flat: Tensor | None = None) -> Tensor:
        y = conv3_reflect(x, self.conv_a, form)
        y = norm_conv(y, self.norm_a, self.conv_b, conv3_reflect, form, flat)
        return x + self.norm_b(y, form, flat)


class Generator(nn.Module):
    """Residual-block generator: (B, 1, X, Y, Z) -> (B, 2 + classes, X, Y, Z), sizes multiples of 4 and at least 8.

    ``form`` selects the exact fast layers ("fast") or the plain ones ("reference"); parameters are the same.
    """

    def __init__(self, spec: GeneratorSpec | None = None, form: str = "fast", seed: int = 0) -> None:
        super().__init__()
        if form not in FORMS:
            raise ModelError("form", f"{form!r} is not allowed", f"one of {', '.join(FORMS)}")
        self.spec, self.form = spec or GeneratorSpec(), form
        self._build(self.spec.kernel)
        init_normal(self, 1.0, seed)  # Keras' lecun_normal

    def _build(self, k: int) -> None:
        self.stem, self.stem_norm = _conv(k, 1 + self.spec.conditional, 7), InstanceNorm(k)
        self.down1, self.down1_norm = _conv(2 * k, k, 3), InstanceNorm(2 * k)
        self.down2, self.down2_norm = _conv(4 * k, 2 * k, 3), InstanceNorm(4 * k)
        self.blocks = nn.ModuleList(ResidualBlock(4 * k) for _ in range(N_BLOCKS))
        self.up1, self.up1_norm = _conv(2 * k, 4 * k, 3), InstanceNorm(2 * k)
        self.up2, self.up2_norm = _conv(k, 2 * k, 3), InstanceNorm(k)
        self.head = _conv(self.spec.out_channels, k, 7)

    def features(self, x: Tensor) -> Tensor:
        """(B, 1 + conditional, X, Y, Z) -> (B, kernel, X, Y, Z), what the head convolution sees."""
        flat = is_flat(x)
        return self.up2_norm(self._leave(self._inner(self._enter(x, flat), flat), flat), self.form, flat)

    def _enter(self, x: Tensor, flat: Tensor) -> Tensor:
        """Down to half the resolution."""
        y = conv7_reflect(x, self.stem, self.form)
        return norm_conv(y, self.stem_norm, self.down1, halving_conv, self.form, flat)

    def _inner(self, y: Tensor, flat: Tensor) -> Tensor:
        """What works at half of the resolution and below."""
        f = self.form
        y = norm_conv(y, self.down1_norm, self.down2, halving_conv, f, flat)
        y = self.down2_norm(y, f, flat)
        for block in self.blocks:
            y = block(y, f, flat)
        return upsample_conv(y, self.up1, f)

    def _leave(self, y: Tensor, flat: Tensor) -> Tensor:
        """Back to the full resolution, before the last norm."""
        return norm_conv(y, self.up1_norm, self.up2, upsample_conv, self.form, flat)

    def _head(self, x: Tensor) -> Tensor:
        flat = is_flat(x)

        def out(y: Tensor, flat: Tensor) -> Tensor:
            y = self._leave(y, flat)
            return norm_conv(y, self.up2_norm, self.head, conv7_reflect, self.form, flat)

        # by_hand first: the compiler cannot trace the question after it.
        if not by_hand(x) or not torch.is_inference_mode_enabled() or x[0].numel() < ONE_BY_ONE:
            return out(self._inner(self._enter(x, flat), flat), flat)
        # Most of the memory is at full resolution, and there one sample keeps all cores busy.
        return each(out, self._inner(each(self._enter, x, flat), flat), flat)

    def raw(self, x: Tensor, res: Tensor | float | None = None) -> Tensor:
        """The head before subtraction, sigmoid and softmax, channel 0 in the units of x: (B, 2 + classes, X, Y, Z)."""
        check_sizes(x.shape[2:])
        y = with_resolution("generator", self.spec, x, res)
        # The stem's norm removes whatever is constant in an input channel (reflected edges keep it constant). Taking it
        # out here is exact and saves float32 the digits that the large mean and resolution would use up.
        y = y - y.mean((2, 3, 4), keepdim=True)
        head = self._head(y)
        if not self.spec.scaled:
            return head
        return torch.cat([head[:, :1] * in_plane_gradient(x).to(head.dtype), head[:, 1:]], dim=1)

    def forward(self, x: Tensor, res: Tensor | float | None = None) -> Tensor:
        """Channel 0 SR, channel 1 segmentation probability, further channels mask-class probabilities.

        ``res``: slice resolution in mm for conditional models: scalar, (B,) or (B, 1, X, Y, Z).
        Raises ModelError when sizes are no multiple of 4 or ``res`` is missing.
        """
        head = self.raw(x, res)
        sr = x - head[:, :1] if self.spec.residual else head[:, :1]
        parts = [sr, torch.sigmoid(head[:, 1:2])]
        if self.spec.mask_classes:
            parts.append(torch.softmax(head[:, 2:], dim=1))
        return torch.cat(parts, dim=1)


class UNetGenerator(Generator):
    """U-Net variant: a residual block at each of three scales and two skip connections."""

    def _build(self, k: int) -> None:
        super()._build(k)
        self.blocks = nn.ModuleList(ResidualBlock(c) for c in (k, 2 * k, 4 * k))
        self.up2, self.head = _conv(k, 4 * k, 3), _conv(self.spec.out_channels, 2 * k, 7)

    def features(self, x: Tensor) -> Tensor:
        """(B, 1 + conditional, X, Y, Z) -> (B, 2 kernel, X, Y, Z), what the head convolution sees."""
        f, flat = self.form, is_flat(x)
        fine = self.blocks[0](self.stem_norm(conv7_reflect(x, self.stem, f), f, flat), f, flat)
        mid = self.blocks[1](self.down1_norm(halving_conv(fine, self.down1, f), f, flat), f, flat)
        y = self.blocks[2](self.down2_norm(halving_conv(mid, self.down2, f), f, flat), f, flat)
        y = torch.cat([self.up1_norm(upsample_conv(y, self.up1, f), f, flat), mid], dim=1)
        return torch.cat([self.up2_norm(upsample_conv(y, self.up2, f), f, flat), fine], dim=1)

    def _head(self, x: Tensor) -> Tensor:
        return conv7_reflect(self.features(x), self.head, self.form)


@dataclass(frozen=True)
class Architecture:
    """A network in ``NETWORKS``.

    build : its class
    keras : what the original's weight files append to a generator's name; None: the original has no such network
    stages : stage of the network -> the original's name of it, in its order of creation, without the head
    legacy : the original's published weights are of this kind where they are conditional and residual
    """

    build: type[Generator]
    keras: str | None = None
    stages: Mapping[str, str] = field(default_factory=dict)
    legacy: bool = False


# A new network is a class and an entry here; config.py names the entries, since the command line starts without torch.
NETWORKS: dict[str, Architecture] = {
    "plain": Architecture(
        Generator,
        "",
        {"stem": "conv1", "down1": "conv2", "down2": "conv3"}
        | {f"blocks.{i}": f"block{i + 1}" for i in range(N_BLOCKS)}
        | {"up1": "deconv1", "up2": "deconv2"},
    ),
    "unet": Architecture(
        UNetGenerator,
        "_unet",
        {"stem": "conv1", "blocks.0": "block", "down1": "conv2", "blocks.1": "block1", "down2": "conv3"}
        | {"blocks.2": "block2", "up1": "deconv1", "up2": "deconv2"},
        legacy=True,
    ),
}


def each(part: Callable[[Tensor, Tensor], Tensor], x: Tensor, flat: Tensor) -> Tensor:
    """``part`` of a batch, sample by sample."""
    parts = [part(x[b : b + 1], flat[b : b + 1]) for b in range(len(x))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def build_generator(spec: GeneratorSpec, form: str = "fast", seed: int = 0) -> Generator:
    """A freshly initialised generator (lecun_normal, keyed by ``seed``)."""
    return NETWORKS[spec.network].build(spec, form, seed)


@dataclass(frozen=True)
class CriticSpec:
    """What fixes a critic's architecture.

    kernel : channels of the first convolution (the original's kernel_dis)
    patch : edge of the cubic patch it judges
    in_channels : SR, segmentation and mask classes, without the resolution channel
    conditional : the slice resolution in mm is its last input channel
    """

    kernel: int = 32
    patch: int = 64
    in_channels: int = 2
    conditional: bool = False

    def __post_init__(self) -> None:
        if self.patch < 16 or self.patch % SIZE_MULTIPLE:
            raise ModelError("critic", f"patch {self.patch}", "a multiple of 4 from 16 up, for example 64")
        if self.kernel < 1 or self.in_channels < 1:
            raise ModelError("critic", f"kernel {self.kernel}, in_channels {self.in_channels}", "both 1 or more")

    @property
    def depth(self) -> int:
        """Stride-2 convolutions until 2 voxels are left per axis: 5 for patches of 36 to 64, as in the paper."""
        return math.ceil(math.log2(self.patch)) - 1

    def to_dict(self) -> dict:
        """Plain values for YAML, JSON or a safetensors header."""
        return asdict(self)


class Critic(nn.Module):
    """(B, C, P, P, P) -> (B, 1): stride-2 4^3 convolutions with bias and LeakyReLU 0.01, then one 2^3 kernel.

    Padding is TensorFlow's "same": (1, 1) on even sizes, (1, 2) on odd ones.
    """

    SLOPE = 0.01

    def __init__(self, spec: CriticSpec | None = None, seed: int = 0) -> None:
        super().__init__()
        self.spec = spec or CriticSpec()
        channels = [self.spec.in_channels + self.spec.conditional]
        channels += [self.spec.kernel * 2**i for i in range(self.spec.depth)]
        self.convs = nn.ParameterList(_conv(o, i, 4) for i, o in itertools.pairwise(channels))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(o)) for o in channels[1:])
        self.decision = _conv(1, channels[-1], 2)
        init_normal(self, 2.0, seed)  # Keras' he_normal

    def forward(self, x: Tensor, res: Tensor | float | None = None) -> Tensor:
        """Score of each sample, shape (B, 1); higher is more real. ``res`` as for the generator."""
        x = with_resolution("critic", self.spec, x, res)
        for weight, bias in zip(self.convs, self.biases, strict=True):
            x = F.leaky_relu(F.conv3d(same_pad(x), weight, bias, stride=2), self.SLOPE)
        return F.conv3d(x, self.decision).flatten(1)


def same_pad(x: Tensor) -> Tensor:
    """Zero padding of TensorFlow's "same" for a 4^3 kernel with stride 2."""
    pad: list[int] = []
    for n in reversed(x.shape[2:]):
        pad += [1, 1 + n % 2]
    return F.pad(x, pad)


def with_resolution(what: str, spec: GeneratorSpec | CriticSpec, x: Tensor, res: Tensor | float | None) -> Tensor:
    """x, for a conditional network with the channel of ``res`` behind its own. Raises ModelError where ``res`` is
    missing."""
    if not spec.conditional:
        return x
    if res is None:
        raise ModelError(what, "conditional weights need a resolution", "pass res, the slice thickness in mm")
    return torch.cat([x, resolution_channel(x, res)], dim=1)


def resolution_channel(x: Tensor, res: Tensor | float) -> Tensor:
    """``res`` (scalar, (B,) or (B, 1, X, Y, Z)) as a channel of the shape of x's first one."""
    r = torch.as_tensor(res, dtype=x.dtype, device=x.device)
    if r.ndim <= 1:
        r = r.reshape(-1, 1, 1, 1, 1)
    return r.expand(x.shape[0], 1, *x.shape[2:])


def is_flat(x: Tensor) -> Tensor:
    """(B, C, X, Y, Z) -> (B, 1, 1, 1, 1) bool: samples with less contrast than FLAT in every channel.

    A constant sample stays constant through every layer, but each norm would blow its rounding, or the last ringing
    of a spline in the background, up to unit variance. The norms give their shift instead, the result for a constant.
    """
    contrast = x.amax((2, 3, 4), keepdim=True) - x.amin((2, 3, 4), keepdim=True)
    return (contrast <= FLAT).all(1, keepdim=True)


def in_plane_gradient(x: Tensor) -> Tensor:
    """Root mean square of the in-plane gradient of channel 0 per voxel: (B, C, X, Y, Z) -> (B, 1, 1, 1, 1) float32.

    In-plane are the first two axes: in processed orientation the last one is through-plane, the one without detail.
    """
    first = x[:, :1].float() if x.dtype in (torch.float16, torch.bfloat16) else x[:, :1]
    parts = [first.diff(dim=d).square().mean((1, 2, 3, 4)) for d in (2, 3)]
    return (parts[0] + parts[1]).sqrt().reshape(-1, 1, 1, 1, 1)


def check_sizes(shape: tuple[int, ...]) -> None:
    """Raise ModelError unless every size is a multiple of 4 and at least 8."""
    if any(n % SIZE_MULTIPLE or n < MIN_SIZE for n in shape):
        hint = f"each size must be a multiple of {SIZE_MULTIPLE} (two stride-2 layers) and at least {MIN_SIZE}"
        raise ModelError("generator", f"input of {' x '.join(map(str, shape))} voxels", hint)


def init_normal(module: nn.Module, gain: float, seed: int) -> None:
    """Draw every convolution kernel with the variance gain / fan_in."""
    # Keras draws a normal truncated at two standard deviations and rescales it to the wanted variance.
    for name, parameter in module.named_parameters():
        if parameter.ndim == 5 and not parameter.is_meta:  # a skeleton's have no values
            std = math.sqrt(gain / parameter[0].numel()) / 0.87962566103423978
            values = std * truncated_normal(rng(seed, "weights", name), parameter.numel())
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(values).view_as(parameter))


def truncated_normal(draw: np.random.Generator, n: int) -> np.ndarray:
    """``n`` numbers in float64 from the standard normal between -2 and 2, the same bits on every processor.

    NumPy's ziggurat gives a number of that range as one product of a table's value and a random integer; torch's
    ``trunc_normal_`` has vectorised functions whose last bits depend on the instruction set.
    """
    values = draw.standard_normal(n)
    while (beyond := np.flatnonzero(np.abs(values) > 2)).size:
        values[beyond] = draw.standard_normal(beyond.size)
    return values


# --- networks and their parameters --------------------------------------------------------------------------------


def skeleton(spec: GeneratorSpec | CriticSpec, form: str = "fast") -> Generator | Critic:
    """The network of ``spec`` with parameters that have shapes but no memory."""
    with torch.device("meta"):
        return build_generator(spec, form) if isinstance(spec, GeneratorSpec) else Critic(spec)


@functools.lru_cache(64)
def parameter_shapes(spec: GeneratorSpec | CriticSpec) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every parameter, torch's axis order (out, in, x, y, z)."""
    return {name: tuple(p.shape) for name, p in skeleton(spec).named_parameters()}


def assemble(spec: GeneratorSpec | CriticSpec, parameters: Mapping[str, Tensor], form: str = "fast") -> Any:
    """The network of ``spec`` that owns the given parameters, in eval mode."""
    network = skeleton(spec, form)
    network.load_state_dict(dict(parameters), strict=True, assign=True)
    return network.eval()


def check_limits(what: object, spec: GeneratorSpec | CriticSpec) -> None:
    """Raise ModelError where a spec asks for a network of absurd size."""
    for name, value in spec.to_dict().items():
        if name in LIMITS and value > LIMITS[name]:
            raise ModelError(what, f"declares {name} {value}", f"at most {LIMITS[name]}")


def check_finite(what: object, name: str, tensor: Tensor) -> None:
    """Raise ModelError where a weight is NaN or infinite."""
    if not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        reason = f"{name} holds {count} NaN or infinite values"
        raise ModelError(what, reason, "the file is damaged or its training diverged")


def describe(spec: GeneratorSpec | CriticSpec) -> str:
    """A spec in a few words, for messages."""
    if isinstance(spec, CriticSpec):
        return f"a critic of kernel {spec.kernel} for patch {spec.patch}"
    parts = [spec.network, *(["conditional"] if spec.conditional else []), "generator of kernel", str(spec.kernel)]
    return "a " + " ".join(parts) + (f" with {spec.mask_classes} mask classes" if spec.mask_classes else "")


def dims(shape: tuple[int, ...]) -> str:
    """A shape as it stands in messages."""
    return " x ".join(map(str, shape)) if shape else "a scalar"
