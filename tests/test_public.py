"""The public Python interface of the README, as a user types it."""

from __future__ import annotations

import importlib
import sys
import types

import numpy as np
import pytest

import fastsrgan
import fastsrgan.losses as losses_module
from fastsrgan.core.lazy import lazy
from fastsrgan.observation.model import degrade


def test_degrade_is_the_function_and_losses_the_module():
    assert fastsrgan.degrade is degrade and fastsrgan.losses is losses_module
    done = fastsrgan.degrade(np.ones((8, 8, 9)), (1, 1, 1), (1, 1, 3))
    assert isinstance(done, fastsrgan.Degraded) and done.low_res.shape == (8, 8, 3)


@pytest.mark.parametrize("package", ["fastsrgan", "compat", "evaluate", "infer", "report", "store", "train"])
def test_names_of_packages_are_loaded_when_asked_for(package):
    name = package if package == "fastsrgan" else f"fastsrgan.{package}"
    module = importlib.import_module(name)
    assert all(hasattr(module, public) for public in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nonsense'"):
        _ = module.nonsense


def test_a_name_is_loaded_once_and_a_module_is_itself(monkeypatch):
    package = types.ModuleType("package")
    monkeypatch.setitem(sys.modules, "package", package)
    monkeypatch.setitem(sys.modules, "package.part", part := types.ModuleType("package.part"))
    part.thing, part.part = "held", "another of its name"
    load = lazy("package", {"part": "package.part", "thing": "package.part"})
    assert load("part") is part is package.part and load("thing") == "held" == package.thing


def test_readme_calls(golden):
    generator = fastsrgan.load_generator(golden / "weights_residual.h5")
    assert not generator.training and fastsrgan.load_critic(golden / "weights_residual.h5").spec.kernel > 0
    data = np.random.default_rng(0).random((16, 16, 6)).astype(np.float32)
    result = fastsrgan.infer_volume(data, np.diag([1, 1, 3, 1]), generator, patch=16, step=8)
    assert result.sr.shape == (16, 16, 18) == result.prob.shape[1:] and result.affine.shape == (4, 4)
    assert fastsrgan.losses.charbonnier(generator.head, generator.head).item() > 0


def test_every_public_name_is_there():
    assert all(hasattr(fastsrgan, name) for name in fastsrgan.__all__)
