"""The generator's building blocks: each in its plain form (the oracle) and in exact, faster ones.

Arrays are (B, C, X, Y, Z). ``form`` is ``"fast"`` or ``"reference"``; both share parameters and agree to rounding
(tests/test_layers_forms.py, float64 <= 1e-12). "fast" means gradients written by hand, spectra and Winograd's products
on the CPU (fused.py), the layers of gpu.py on CUDA, and convolutions of better shape elsewhere: on a CPU in half
precision and under torch.compile. Why each form is faster, with figures: docs/decisions/002.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsrgan.model import gpu
from fastsrgan.model.cpu import doubling, fused
from fastsrgan.model.cpu.normed import NORM_EPS
from fastsrgan.model.cpu.rearranged import once

FORMS = ("fast", "reference")


def by_hand(x: Tensor) -> bool:
    """Whether x is for the forms of fused.py: full precision on the CPU, outside autocast and torch.compile."""
    wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and wide and not torch.compiler.is_compiling()


def for_gpu(x: Tensor) -> bool:
    """Whether x is for the forms of gpu.py."""
    return x.device.type == "cuda"


class _NormFunction(torch.autograd.Function):
    """Instance norm with epsilon outside the root and optional ReLU; constant channels give the shift, gradient 0.

    The formula's gradient there is 1 / 1e-7 per layer (and NaN where sqrt(var) is differentiated): 17 norms of a
    constant patch overflow. ``flat`` (B, 1, 1, 1, 1) names samples that are constant but for rounding.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, flat: Tensor | None) -> Tensor:  # type: ignore[override]
        dims = (2, 3, 4)
        xf = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(xf, dims, unbiased=False, keepdim=True)
        std = var.sqrt()
        rstd = torch.where(_constant(std, flat), 0, 1 / (std + NORM_EPS))
        gain = rstd * scale.to(xf.dtype).view(1, -1, 1, 1, 1)
        y = torch.addcmul(shift.to(xf.dtype).view(1, -1, 1, 1, 1) - mean * gain, xf, gain)
        if relu:
            y = y.relu_()
        y = y.to(x.dtype)
        ctx.save_for_backward(x, mean, std, gain, rstd, y if relu else None)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, mean, std, gain, rstd, y = ctx.saved_tensors
        dims, n = (2, 3, 4), x[0, 0].numel()
        xc = x.to(mean.dtype) - mean
        g = grad.to(mean.dtype)
        if y is not None:
            g = torch.where(y > 0, g, 0)
        g_sum = g.sum(dims, keepdim=True)
        gx_sum = (g * xc).sum(dims, keepdim=True)
        pull = torch.where(std > 0, rstd * gx_sum / (n * std), 0)
        dx = torch.addcmul(g - g_sum / n, xc, pull, value=-1).mul_(gain)
        d_scale = (gx_sum * rstd).sum(0).flatten()
        return dx.to(x.dtype), d_scale, g_sum.sum(0).flatten(), None, None


def _constant(std: Tensor, flat: Tensor | None) -> Tensor:
    return std == 0 if flat is None else (std == 0) | flat


class InstanceNorm(nn.Module):
    """(x - mean) / (sqrt(var) + 1e-7) * scale + shift per sample and channel, biased variance, then ReLU if asked.

    Statistics are float32 for half-precision inputs. A constant channel gives ``shift`` and passes no gradient to x;
    so does every channel of the samples in ``flat`` (B, 1, 1, 1, 1) bool, which are constant but for rounding.
    """

    def __init__(self, channels: int, relu: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.relu = relu

    def forward(self, x: Tensor, form: str = "fast", flat: Tensor | None = None) -> Tensor:
        if form == "fast" and by_hand(x):
            return fused.Norm.apply(x, self.scale, self.shift, self.relu, flat)
        if form == "fast" and for_gpu(x):
            return gpu.norm_pad(x, self.scale, self.shift, self.relu, flat, gpu.Padding(0))
        if form == "fast":
            return _NormFunction.apply(x, self.scale, self.shift, self.relu, flat)
        xc = x - x.mean((2, 3, 4), keepdim=True)
        var = (xc**2).mean((2, 3, 4), keepdim=True)
        constant = _constant(var, flat)
        xc, std = torch.where(constant, 0, xc), torch.where(constant, 1, var).sqrt()
        y = xc / (std + NORM_EPS) * self.scale.view(1, -1, 1, 1, 1) + self.shift.view(1, -1, 1, 1, 1)
        return F.relu(y) if self.relu else y


def reflect_pad(x: Tensor, width: int) -> Tensor:
    """Mirror ``width`` voxels on each side of the three axes, the edge voxel not repeated."""
    return F.pad(x, (width,) * 6, mode="reflect")


def conv_reflect(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Reflect-pad so that stride 1 keeps the size, then convolve: weight (O, I, k, k, k), no bias."""
    return F.conv3d(reflect_pad(x, weight.shape[-1] // 2), weight, stride=stride)


def _fast(convolution: Callable[..., Tensor], x: Tensor, weight: Tensor, form: str) -> Tensor | None:
    """The form of a layer for where x is; None: it has none there, or the plain one was asked for."""
    by_cpu, by_gpu = _FAST[convolution]
    if form == "fast" and by_hand(x):
        return fused.Conv.apply(x, weight, by_cpu)
    return by_gpu.convolve(gpu.pad(x, by_gpu.padding), weight) if form == "fast" and for_gpu(x) else None


def conv3_reflect(x: Tensor, weight: Tensor, form: str = "fast") -> Tensor:
    """Reflect-pad 1 and convolve 3^3, size kept. Fast form: Winograd's products where they pay."""
    made = _fast(conv3_reflect, x, weight, form)
    return conv_reflect(x, weight) if made is None else made


def halving_conv(x: Tensor, weight: Tensor, form: str = "fast") -> Tensor:
    """Reflect-pad 1 and convolve 3^3 with stride 2: (B, I, 2X, 2Y, 2Z) -> (B, O, X, Y, Z)."""
    made = _fast(halving_conv, x, weight, form)
    return conv_reflect(x, weight, 2) if made is None else made


def _split_blocks(x: Tensor) -> Tensor:
    """(B, C, 2X, 2Y, 2Z) -> (B, 8 C, X, Y, Z): each 2^3 block of voxels becomes channels."""
    b, c, nx, ny, nz = x.shape
    blocks = x.reshape(b, c, nx // 2, 2, ny // 2, 2, nz // 2, 2)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, 8 * c, nx // 2, ny // 2, nz // 2)


def _merge_blocks(y: Tensor) -> Tensor:
    """(B, 8 C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z): the inverse of the split."""
    b, c8, nx, ny, nz = y.shape
    blocks = y.view(b, c8 // 8, 2, 2, 2, nx, ny, nz)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c8 // 8, 2 * nx, 2 * ny, 2 * nz)


@once
def _block_weight(weight: Tensor) -> Tensor:
    """(O, I, 7, 7, 7) -> (8 O, 8 I, 4, 4, 4): the same convolution on 2^3 blocks.

    Output phase p of a block and tap t touch input position p + t = 2 c + q: block offset c, phase q.
    """
    o, i, k = weight.shape[:3]
    taps = (k + 1 + 1) // 2
    rows = []
    for p in range(8):
        px, py, pz = p >> 2, (p >> 1) & 1, p & 1
        room = 2 * taps - k
        w = F.pad(weight, (pz, room - pz, py, room - py, px, room - px))
        w = w.view(o, i, taps, 2, taps, 2, taps, 2).permute(0, 1, 3, 5, 7, 2, 4, 6)
        rows.append(w.reshape(o, 8 * i, taps, taps, taps))
    return torch.stack(rows, 1).flatten(0, 1)


def conv7_reflect(x: Tensor, weight: Tensor, form: str = "fast") -> Tensor:
    """Reflect-pad 3 and convolve 7^3 (stem and head of the generator), sizes even.

    Fast form: spectra on the CPU, ``gpu.seven`` on CUDA. Elsewhere the same sums as a 4^3 convolution between 2^3
    blocks: 7^3 kernels with 1 input or 2 output channels leave a vector unit idle; 8 or 16 channels fill it.
    """
    if form == "reference":
        return conv_reflect(x, weight)
    if (made := _fast(conv7_reflect, x, weight, form)) is not None:
        return made
    return _merge_blocks(F.conv3d(_split_blocks(reflect_pad(x, 3)), _block_weight(weight)))


def upsample_conv(x: Tensor, weight: Tensor, form: str = "fast") -> Tensor:
    """Nearest x2, reflect-pad 1, convolve 3^3: (B, I, X, Y, Z) -> (B, O, 2X, 2Y, 2Z).

    Fast form: each output phase sees 2^3 distinct coarse voxels, so 27 taps fold into 8; reflecting the doubled grid
    by one voxel repeats the coarse edge voxel.
    """
    if form == "reference":
        return conv_reflect(F.interpolate(x, scale_factor=2, mode="nearest"), weight)
    made = _fast(upsample_conv, x, weight, form)
    return doubling.transposed_forward(x, weight) if made is None else made


# Each layer's forms on the cores of a CPU and on CUDA.
_FAST: dict[Callable[..., Tensor], tuple[fused.Convolution, gpu.Layer]] = {
    conv3_reflect: (fused.KERNEL3, gpu.SAME),
    conv7_reflect: (fused.KERNEL7, gpu.SEVEN),
    halving_conv: (fused.HALVING, gpu.HALVING),
    upsample_conv: (fused.DOUBLING, gpu.DOUBLING),
}


def norm_conv(
    x: Tensor,
    norm: InstanceNorm,
    weight: Tensor,
    convolution: Callable[..., Tensor],
    form: str = "fast",
    flat: Tensor | None = None,
) -> Tensor:
    """``convolution(norm(x), weight)``, the norm with ReLU; without gradients x may be written over.

    Fast form on the CPU: one step that keeps x alone for its backward pass; on CUDA norm and padding are one.
    """
    if form == "fast" and convolution in _FAST:
        by_cpu, by_gpu = _FAST[convolution]
        if for_gpu(x):
            return by_gpu.convolve(gpu.norm_pad(x, norm.scale, norm.shift, norm.relu, flat, by_gpu.padding), weight)
        if by_hand(x) and norm.relu:
            return fused.NormConv.apply(x, norm.scale, norm.shift, weight, by_cpu, flat, not torch.is_grad_enabled())
    return convolution(norm(x, form, flat), weight, form)
