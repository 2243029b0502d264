"""What the axes of charts show."""

from __future__ import annotations

MINUS = "−"  # as Matplotlib writes it at an axis
LEAST = 0.05  # what an axis spans at least, of the largest value on it


def axis_range(low: float, high: float, size: float = 0.0) -> tuple[float, float]:
    """Ends of an axis for values from ``low`` to ``high``: it spans at least ``LEAST`` of the largest of them, or of
    ``size`` where that is larger, so that a change that is nothing beside the values looks like nothing.

    The values lie in its middle, but an axis of values from 0 to 1, as of Dice and SSIM, does not leave that range.
    """
    missing = LEAST * (max(abs(low), abs(high), size) or 1 / LEAST) - (high - low)
    if missing <= 0:
        return low, high
    bottom, top = low - missing / 2, high + missing / 2
    over = max(top - 1, 0.0) if 0 < low < high <= 1 else 0.0
    return bottom - over, top - over
