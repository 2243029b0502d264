"""fastsrgan: super-resolution and segmentation of brain MRI with one 3-D GAN (SegSRGAN), fast.

The names below are the public Python interface; each is loaded when it is first used, so that importing the package
needs no torch and no optional part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsrgan._version import __version__

if TYPE_CHECKING:
    from fastsrgan import losses
    from fastsrgan.degrade import Degraded, degrade
    from fastsrgan.errors import FastsrganError
    from fastsrgan.infer import InferResult, infer_volume
    from fastsrgan.weights import load_critic, load_generator

_WHERE = {
    "Degraded": "degrade",
    "degrade": "degrade",
    "FastsrganError": "errors",
    "InferResult": "infer",
    "infer_volume": "infer",
    "load_critic": "weights",
    "load_generator": "weights",
}

__all__ = [
    "Degraded",
    "FastsrganError",
    "InferResult",
    "__version__",
    "degrade",
    "infer_volume",
    "load_critic",
    "load_generator",
    "losses",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("fastsrgan.losses")
    if name in _WHERE:
        return getattr(importlib.import_module(f"fastsrgan.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'fastsrgan' has no attribute {name!r}")
