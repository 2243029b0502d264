"""The public Python interface of the README, as a user types it."""

from __future__ import annotations

import numpy as np

import fastsrgan
import fastsrgan.observation.model as degrade_module
from fastsrgan.observation.model import Degradation


def test_degrade_is_the_function_whatever_was_imported_before():
    import fastsrgan.observation.model  # would hide a function of the same name

    done = fastsrgan.degrade(np.ones((8, 8, 9)), (1, 1, 1), (1, 1, 3))
    assert isinstance(done, fastsrgan.Degraded) and done.low_res.shape == (8, 8, 3)
    assert callable(degrade_module) and Degradation is not None


def test_readme_calls(golden):
    generator = fastsrgan.load_generator(golden / "weights_residual.h5")
    assert not generator.training and fastsrgan.load_critic(golden / "weights_residual.h5").spec.kernel > 0
    data = np.random.default_rng(0).random((16, 16, 6)).astype(np.float32)
    result = fastsrgan.infer_volume(data, np.diag([1, 1, 3, 1]), generator, patch=16, step=8)
    assert result.sr.shape == (16, 16, 18) == result.prob.shape[1:] and result.affine.shape == (4, 4)
    assert fastsrgan.losses.charbonnier(generator.head, generator.head).item() > 0


def test_every_public_name_is_there():
    assert all(hasattr(fastsrgan, name) for name in fastsrgan.__all__)
