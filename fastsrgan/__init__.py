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

_HOMES = {
    "errors": ("FastsrganError",),
    "infer.volume": ("InferResult", "infer_volume"),
    "losses": ("losses",),
    "model.weights": ("load_critic", "load_generator"),
    "observation.model": ("Degraded", "degrade"),
    "report.show": ("show",),
    "volume.geometry": ("Volume",),
}
__getattr__ = lazy(__name__, {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
