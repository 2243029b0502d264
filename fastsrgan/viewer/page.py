"""The documented path of ``report``, whose home is ``fastsrgan.report.page``."""

from fastsrgan.report.page import report

__all__ = ["report"]
