"""How a volume's values are stored, and what is noted about them: pure functions of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastsrgan.store.reader import to_float32

DTYPES = ("auto", "int16", "float32")
PERCENTILES = {"p1": 0.01, "p99": 0.99, "p99.9": 0.999}


def encode(
    stored: np.ndarray, scale: float, offset: float, dtype: str
) -> tuple[np.ndarray, float, float, dict[str, Any]]:
    """Bring stored values into the type asked for; intensity = stored * scale + offset before and after.

    Returns (stored, scale, offset, facts); facts hold the step and the largest error where values were quantised.
    int16: integers whose range fits stay exact, all else is rounded to 65 536 levels between its extremes; where these
    lie on both sides of 0, or one is 0, intensity 0 stays exactly 0, so that background stays background.
    """
    if dtype == "float32":
        return to_float32(stored, scale, offset), 1.0, 0.0, {}
    if dtype == "auto" or stored.dtype in (np.int16, np.int8, np.uint8):
        return stored, scale, offset, {}
    if stored.dtype.kind in "iu":
        least, most = int(stored.min()), int(stored.max())
        if most - least <= 65535:
            shift = 0 if least >= -32768 and most <= 32767 else least + 32768
            shifted = (stored - stored.dtype.type(least)).astype(np.int32) + (least - shift)
            return shifted.astype(np.int16), scale, offset + shift * scale, {}
    values = to_float32(stored, scale, offset)
    low, high = float(values.min()), float(values.max())
    around_zero = low <= 0 <= high
    step = (high - low) / (65534 if around_zero else 65535) or abs(low) / 32768 or 1.0
    offset = (round(low / step) + 32768) * step if around_zero else low + 32768 * step
    levels = np.empty_like(values, dtype=np.int16)
    error = 0.0
    for part, level in zip(values.T, levels.T, strict=True):  # by slice: float64 of a whole volume is not needed
        level[...] = np.clip(np.rint((part - np.float64(offset)) / step), -32768, 32767)
        back = to_float32(level, step, offset)
        error = max(error, float(np.abs(back.astype(np.float64) - part).max()))
    return levels, step, offset, {"quantisation": {"step": step, "max_error": error}}


def describe(stored: np.ndarray, scale: float, offset: float) -> dict[str, Any]:
    """Bounding box of intensity > 0 as (start, stop) per axis, None when there is none; and robust statistics.

    A percentile q is the smallest intensity with at least q of all voxels at or below it.
    """
    values = stored if scale == 1 and offset == 0 else to_float32(stored, scale, offset)
    inside = np.greater(values, 0)
    plane = np.any(inside, axis=2)
    lines = (np.any(plane, axis=1), np.any(plane, axis=0), np.any(inside, axis=(0, 1)))
    hits = [np.flatnonzero(line) for line in lines]
    box = [(int(hit[0]), int(hit[-1]) + 1) for hit in hits] if plane.any() else None
    n = values.size
    ranks = [max(0, int(np.ceil(q * n)) - 1) for q in PERCENTILES.values()]
    flat = values.ravel(order="K")
    if flat.dtype.kind in "iu" and flat.dtype.itemsize <= 2:
        low = int(flat.min())
        counts = np.bincount(flat.astype(np.int32) - low)
        found = [low + int(np.searchsorted(np.cumsum(counts), rank, side="right")) for rank in ranks]
    else:
        found = np.partition(flat, ranks)[ranks].tolist()
    extremes = {"min": float(flat.min()), "max": float(flat.max()), "mean": float(flat.mean(dtype=np.float64))}
    robust = {name: float(value) for name, value in zip(PERCENTILES, found, strict=True)}
    return {"bounding_box": box, "intensity": extremes | robust}
