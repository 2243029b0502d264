"""fastsrgan: super-resolution and segmentation of brain MRI with one 3-D GAN (SegSRGAN), fast.

The names below are the public Python interface, each loaded when it is first asked for. ``degrade`` is the function;
its module is imported as ``from fastsrgan.degrade import ...``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastsrgan._version import __version__

if TYPE_CHECKING:
    from fastsrgan import losses
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

_MODULES = {
    "Degraded": "degrade",
    "FastsrganError": "errors",
    "InferResult": "infer",
    "Volume": "geometry",
    "infer_volume": "infer",
    "load_critic": "weights",
    "load_generator": "weights",
    "show": "viewer.show",
}


class _Package(ModuleType):
    """This package, whose commands must be able to answer a signal before torch is loaded."""

    def __getattr__(self, name: str) -> Any:
        if name == "losses":
            return importlib.import_module("fastsrgan.losses")
        if name not in _MODULES:
            raise AttributeError(f"module 'fastsrgan' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"fastsrgan.{_MODULES[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    @property
    def degrade(self) -> Any:
        """The function; the import system would put the module of this name here."""
        return importlib.import_module("fastsrgan.degrade").degrade

    @degrade.setter
    def degrade(self, module: ModuleType) -> None: ...


sys.modules[__name__].__class__ = _Package
