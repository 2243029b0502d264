"""Training: the run, the loop, the two networks' updates, snapshots, logs."""

from typing import TYPE_CHECKING

from fastsrgan.core.lazy import lazy

if TYPE_CHECKING:
    from fastsrgan.train.run import train

__all__ = ["train"]

__getattr__ = lazy(__name__, {"train": "fastsrgan.train.run"})
