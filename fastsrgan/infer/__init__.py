"""Low resolution in, super-resolution and segmentation out."""

from typing import TYPE_CHECKING

from fastsrgan.core.lazy import lazy

if TYPE_CHECKING:
    from fastsrgan.infer.files import infer_files

__all__ = ["infer_files"]

__getattr__ = lazy(__name__, {"infer_files": "fastsrgan.infer.files"})
