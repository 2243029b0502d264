"""The layers of the paper's generator one by one: the forms for the CPU, the convolution forms, plain PyTorch.

The convolution forms are the fast ones of other devices (docs/decisions/002), run here for comparison.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.common import Case, Sides
from fastsrgan.model import layers

# Of an array's norm; found: 1.5e-6, 1.8e-5 (results/epyc-zen3-2cores/layers.json). Of gradients wider: at a ReLU's kink
# either slope is right, and how many voxels stand there depends on the shapes that are asked for.
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3


class Layer(NamedTuple):
    """inputs, outputs : channels in units of the first convolution's, 0 for those of the image

    coarse : edge of the patch over that of the input; norm : instance norm and ReLU in front
    """

    convolution: Callable[..., Tensor]
    kernel: int
    inputs: int
    outputs: int
    coarse: int
    norm: bool


LAYERS = {
    "stem 7^3": Layer(layers.conv7_reflect, 7, 0, 1, 1, False),
    "norm, first halving": Layer(layers.halving_conv, 3, 1, 2, 1, True),
    "norm, second halving": Layer(layers.halving_conv, 3, 2, 4, 2, True),
    "norm, 3^3 of a block": Layer(layers.conv3_reflect, 3, 4, 4, 4, True),
    "norm, first doubling": Layer(layers.upsample_conv, 3, 4, 2, 4, True),
    "norm, second doubling": Layer(layers.upsample_conv, 3, 2, 1, 2, True),
    "norm, head 7^3": Layer(layers.conv7_reflect, 7, 1, 0, 1, True),
}


def cases(args: argparse.Namespace) -> list[Case]:
    """Every layer, forward and forward + backward, for every kernel and batch."""
    found = []
    for kernel, batch, name, backward in itertools.product(args.kernel, args.batch, LAYERS, (False, True)):
        layer = LAYERS[name]
        size, inputs, outputs = args.patch // layer.coarse, layer.inputs * kernel or 1, layer.outputs * kernel or 2
        facts = {"kernel": kernel, "batch": batch, "size": size, "inputs": inputs, "outputs": outputs}
        passes = "forward + backward" if backward else "forward"
        title = f"{name}, {inputs} -> {outputs} channels, {size}^3, batch {batch}, {passes}"
        shapes = (batch, inputs, *(size,) * 3), (outputs, inputs, *(layer.kernel,) * 3)
        tolerance = GRADIENT_TOLERANCE if backward else FORWARD_TOLERANCE
        build = _sides(layer, *shapes, backward, args.device)
        found.append(Case(title, facts, build, tolerance, ("samples", float(batch)), l2=True))
    return found


def _sides(
    layer: Layer, image: tuple[int, ...], taps: tuple[int, ...], backward: bool, device: str
) -> Callable[[], Sides]:
    def build() -> Sides:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(image, generator=draw).to(device)
        weight = torch.randn(taps, generator=draw).to(device) * (taps[1] * taps[2] ** 3) ** -0.5
        norm = layers.InstanceNorm(image[1]).to(device)
        # An image needs no gradient in training, what comes from another layer does.
        leaves = [weight.requires_grad_(), *([x.requires_grad_(), *norm.parameters()] if layer.norm else [])]
        with torch.no_grad():
            grad = torch.randn(layer.convolution(x, weight).shape, generator=draw).to(device)

        def forward(form: str) -> Tensor:
            if layer.norm:
                return layers.norm_conv(x, norm, weight, layer.convolution, form)
            return layer.convolution(x, weight, form)

        def run(form: str) -> list[Tensor]:
            if backward:
                return list(torch.autograd.grad(forward(form), leaves, grad))
            # Gradients stay on, since x would be written over without; nothing is computed for them.
            return [forward(form).detach()]

        def convolutions() -> list[Tensor]:
            with mock.patch.object(layers, "by_hand", lambda x: False):
                return run("fast")

        return {"fastsrgan": lambda: run("fast"), "convolutions": convolutions, "plain": lambda: run("reference")}

    return build
