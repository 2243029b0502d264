"""Sizes as they stand in messages."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def human(n_bytes: int) -> str:
    """1536 -> '1.5 KiB'."""
    size, unit = float(n_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.4g} {_UNITS[unit]}"


def compared(a_bytes: int, b_bytes: int) -> tuple[str, str]:
    """Two sizes that differ, exactly where they are the same when rounded: ('56.59 KiB', '2 KiB')."""
    if human(a_bytes) != human(b_bytes):
        return human(a_bytes), human(b_bytes)
    return f"{a_bytes} bytes", f"{b_bytes} bytes"


def times(values: Sequence[float]) -> str:
    """(1, 2, 0.5) -> '1 x 2 x 0.5'."""
    return " x ".join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in values)
