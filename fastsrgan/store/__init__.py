"""Volumes in one Zarr store: reading, writing, checks."""

from typing import TYPE_CHECKING

from fastsrgan.core.lazy import lazy

if TYPE_CHECKING:
    from fastsrgan.store.reader import Store, open_store

__all__ = ["Store", "open_store"]

__getattr__ = lazy(__name__, {"Store": "fastsrgan.store.reader", "open_store": "fastsrgan.store.reader"})
