"""Self-contained HTML pages about results and runs, and the figure of ``fastsrgan.show``."""

from typing import TYPE_CHECKING

from fastsrgan.core.lazy import lazy

if TYPE_CHECKING:
    from fastsrgan.report.page import report

__all__ = ["report"]

__getattr__ = lazy(__name__, {"report": "fastsrgan.report.page"})
