"""What people are told of a result by its record: the light, how the network saw the scan, and the words of a picture.

Every picture of a result, of `infer --png`, of the report and of ``fastsrgan.show``, has its words from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastsrgan.config import AXES
from fastsrgan.core.files import mapping
from fastsrgan.errors import InputError
from fastsrgan.evaluate.plausibility import GREEN, NO_PROOF, RED, YELLOW
from fastsrgan.model.purpose import Purpose, weights_called
from fastsrgan.volume.geometry import world_orientation

LIGHTS = (GREEN, YELLOW, RED)
ZERO = "zero"  # what the network saw outside a mask


def light_of(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The traffic light of a result and the reasons for it; None of older records."""
    verdict = mapping(record.get("plausibility"))
    if verdict.get("light") not in LIGHTS:
        return None
    reasons = verdict.get("reasons")
    return verdict["light"], "; ".join(map(str, reasons)) if isinstance(reasons, list) else ""


def unchecked_line(unchecked: object) -> str:
    """What the light says nothing of, and why, things of one reason together; "" where that is nothing."""
    why: dict[str, list[str]] = {}
    for name, reason in mapping(unchecked).items():
        why.setdefault(str(reason), []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in why.items()]
    return f"Not looked at: {'; '.join(parts)}" if parts else ""


def passes(record: Mapping[str, Any], affine_44: object = None) -> list[str]:
    """How often and how the network saw the scan, where that is more than once and as it lies; else nothing.

    affine_44 : of the result, by default the record's; it says which axis of the image goes from left to right
    """
    lines = []
    flips = record.get("flips")
    axes = [axis for axis in AXES if axis in flips] if isinstance(flips, str) and set(flips) <= set(AXES) else []
    if axes:
        named = f"{', '.join(axes[:-1])} and {axes[-1]}" if len(axes) > 1 else axes[0]
        along = f"mean of {2 ** len(axes)} mirror images, along {named}"
        both = axes == [_sides(record.get("affine") if affine_44 is None else affine_44)]
        lines.append("mean of both sides, left and right exchanged as well" if both else along)
    if record.get("upright"):
        lines.append("segmented with the head upright, in a second pass")
    return lines


def _sides(affine_44: object) -> str:
    """The image's axis from left to right; "" where that is not known."""
    try:
        return AXES[world_orientation(np.asarray(affine_44, float)).axes[0]]
    except (TypeError, ValueError, IndexError, InputError):
        return ""


def picture_words(record: Mapping[str, Any], affine_44: object = None) -> dict[str, Any]:
    """Options of ``pictures.figure.result_figure`` by a result's record: ``captions``, ``footer``, ``status`` and
    ``structure``; what the record does not say is left out.

    affine_44 : as of ``passes``
    """
    cut = mapping(record.get("region")).get("outside") == ZERO
    captions = {"spline": "of the same scan" + ", inside the mask" * cut}
    limit = record.get("threshold")
    captions |= {"seg": f"probability above {limit:g}"} if isinstance(limit, (int, float)) else {}
    tiles = [f"{key} {record[key]}" for key in ("patch", "step") if record.get(key) is not None]
    weights = [f"weights {weights_called(record['weights'])}"] if mapping(record.get("weights")) else []
    words: dict[str, Any] = {"captions": captions}
    words["footer"] = " · ".join([", ".join([*weights, *tiles]), *passes(record, affine_44)]).removeprefix(" · ")
    if "made_for" in record:
        words["structure"] = Purpose.of(record["made_for"]).outlined
    if found := light_of(record):
        light, reasons = found
        left = unchecked_line(mapping(record["plausibility"]).get("unchecked"))
        words["status"] = light, f"plausibility {light}: {'. '.join(filter(None, (reasons or NO_PROOF, left)))}"
    return words
