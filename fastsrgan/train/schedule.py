"""The learning rate over a run, as a factor of its first value.

Epochs differ in length: subjects differ in size, and a remainder below one batch is left out of each group. The share
of a run that is done is therefore counted in epochs and parts of them, not in updates of an estimated total: it is a
function of the place in the run alone, so it is the same after a resume, and it ends where the last epoch ends.
"""

from __future__ import annotations

import math


def share(epoch: int, epochs: int, part: float) -> float:
    """Share of a run that is done, in [0, 1]: ``part`` of ``epoch`` (counted from 1) of ``epochs``."""
    return (epoch - 1 + part) / epochs


def factor(shape: str, done: float, update: int, warmup: int = 0, end: float = 0.0) -> float:
    """Learning rate of an update over lr_gen and lr_dis.

    Parameters
    ----------
    shape : "constant"; "linear" or "cosine" from 1 down to ``end``
    done : share of the run before this update, see ``share``
    update : updates done before this one
    warmup : first updates, over which the rate rises linearly: 1/warmup, 2/warmup ...; multiplies the shape
    """
    fall = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[shape]
    rise = min(1.0, (update + 1) / warmup) if warmup else 1.0
    return rise * (1 - (1 - end) * fall if shape != "constant" else 1.0)
