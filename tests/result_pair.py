"""A small result with its truth as files, for the tests of the evaluation of tables, folders and trees."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastsrgan.io import nifti as images

SHAPE = (14, 17, 13)


def make_pair(folder: Path) -> dict[str, Path]:
    """``hr`` of noise, ``sr`` near it, and where each is above 115, ``label`` and ``seg``: 1 mm, in the same place."""
    rng = np.random.default_rng(0)
    hr = (100 + 30 * rng.random(SHAPE)).astype(np.float32)
    sr = (hr + rng.normal(0, 3, SHAPE)).astype(np.float32)
    arrays = {"hr": hr, "sr": sr, "seg": (sr > 115).astype(np.uint8), "label": (hr > 115).astype(np.uint8)}
    return {name: images.save(folder / f"{name}.nii.gz", data, np.eye(4)) for name, data in arrays.items()}
