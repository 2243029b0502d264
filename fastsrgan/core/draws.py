"""Keyed random draws."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def rng(seed: int | str, *key: int | str) -> np.random.Generator:
    """A counter-based generator that depends on (seed, key) alone: the same bits on any rank, device or resume point.

    ``rng(seed, epoch, subject, "noise")`` names a draw by what it is for, so no draw depends on the ones before it.
    """
    import numpy as np

    text = json.dumps([int(seed), *key]).encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, np.uint64)))
