"""Results against the truth."""

from typing import TYPE_CHECKING

from fastsrgan.core.lazy import lazy

if TYPE_CHECKING:
    from fastsrgan.evaluate.pair import evaluate_files, evaluate_pair

__all__ = ["evaluate_files", "evaluate_pair"]

__getattr__ = lazy(__name__, {"evaluate_files": "fastsrgan.evaluate.pair", "evaluate_pair": "fastsrgan.evaluate.pair"})
