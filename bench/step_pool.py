"""What the timed and checked training steps work on: patches of one volume, made without a file or a store."""

from __future__ import annotations

import numpy as np
import torch

from bench.common import texture
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.data.subject import patch_origins
from fastsrgan.observation.model import degrade

EPOCH = 1  # whose draws the steps take


def pool(patch: int, batch: int, device: str) -> Pool:
    """Patches of one textured volume, degraded by a factor of three, a label of its brighter half."""
    edge = patch + 16
    # Without air: its many equal voxels would cross a ReLU's kink together, by rounding alone.
    hr = texture((edge, edge, edge), air=False)
    done = degrade(hr, (1.0, 1.0, 1.0), (1.0, 1.0, 3.0))
    label = (done.hr > np.median(done.hr)).astype(np.uint8)
    origins = patch_origins(hr.shape, patch, 8, tuple((0, n) for n in hr.shape))
    z, x, s = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (done.interpolated, done.hr, label))
    resident = Resident("texture", z, x, s, None, 3.0, np.resize(origins, (max(batch, len(origins)), 3)))
    return Pool([resident], patch)
