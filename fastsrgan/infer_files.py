"""The documented path of ``infer_files``, whose home is ``fastsrgan.infer.files``."""

from fastsrgan.infer.files import infer_files

__all__ = ["infer_files"]
