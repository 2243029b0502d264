"""fastsrgan: super-resolution and segmentation of brain MRI with one 3-D GAN (SegSRGAN), fast.

The names below are the public Python interface, each loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsrgan._version import __version__
from fastsrgan.core.lazy import lazy

if TYPE_CHECKING:
    from fastsrgan import losses
    from fastsrgan.errors import FastsrganError
    from fastsrgan.infer.volume import InferResult, infer_volume
    from fastsrgan.model.weights import load_critic, load_generator
    from fastsrgan.observation.model import Degraded, degrade
    from fastsrgan.report.show import show
    from fastsrgan.volume.geometry import Volume

__all__ = [
    "Degraded",
    "FastsrganError",
    "InferResult",
    "Volume",
    "__version__",
    "degrade",
    "infer_volume",
    "load_critic",
    "load_generator",
    "losses",
    "show",
]

__getattr__ = lazy(
    __name__,
    {
        "Degraded": "fastsrgan.observation.model",
        "FastsrganError": "fastsrgan.errors",
        "InferResult": "fastsrgan.infer.volume",
        "Volume": "fastsrgan.volume.geometry",
        "infer_volume": "fastsrgan.infer.volume",
        "load_critic": "fastsrgan.model.weights",
        "load_generator": "fastsrgan.model.weights",
        "show": "fastsrgan.report.show",
        "degrade": "fastsrgan.observation.model",
        "losses": "fastsrgan.losses",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
