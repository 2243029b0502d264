"""The original's own function and script."""

from typing import TYPE_CHECKING

from fastsrgan.core.lazy import lazy

if TYPE_CHECKING:
    from fastsrgan.compat.original import segmentation

__all__ = ["segmentation"]

__getattr__ = lazy(__name__, {"segmentation": "fastsrgan.compat.original"})
