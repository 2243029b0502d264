"""fastsrgan: super-resolution and segmentation of brain MRI with one 3-D GAN (SegSRGAN), fast.

The names below are the public Python interface. ``degrade`` is the function; its module is imported as
``from fastsrgan.degrade import ...``.
"""

from fastsrgan import losses
from fastsrgan._version import __version__
from fastsrgan.degrade import Degraded, degrade
from fastsrgan.errors import FastsrganError
from fastsrgan.geometry import Volume
from fastsrgan.infer import InferResult, infer_volume
from fastsrgan.viewer.show import show
from fastsrgan.weights import load_critic, load_generator

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
