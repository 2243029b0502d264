"""Scores between epochs: the paper's definitions on patches, the spline's own on whole volumes, a stop in between."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from cohort import SMALL, losses, make_store, rows

from fastsrgan.data.feed import Feed, PatchRule
from fastsrgan.observation.model import Degradation
from fastsrgan.store.reader import open_store
from fastsrgan.train import loop
from fastsrgan.train.run import train
from fastsrgan.train.validate import fixed_resident, validate, validate_whole


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("cohort"))


def make_feed(store: Path) -> Feed:
    degradation = Degradation(SMALL.new_low_res, SMALL.contrast_max, SMALL.noise, SMALL.geometry)
    return Feed(open_store(store), degradation, PatchRule(16, 12), seed=0, device=torch.device("cpu"), threads=1)


class Identity(torch.nn.Module):
    """Gives its input back as SR and the truth's threshold as segmentation."""

    def forward(self, x, res=None):
        return torch.cat([x, (x > 0.3).to(x.dtype)], 1)


def test_validation_scores_are_those_of_the_paper_s_definitions(store):
    feed = make_feed(store)
    names = [s.id for s in feed.store.subjects]
    scores = validate(Identity(), feed, names, batch_size=3)
    squared, voxels, both, sizes, decibels = 0.0, 0, 0, 0, []
    for index, name in enumerate(names):
        resident = fixed_resident(feed, feed.store.read(name), index, len(names))
        top, own = 0.0, []
        for o in resident.origins:
            cut = tuple(slice(int(a), int(a) + 16) for a in o)
            x, y, label = resident.interpolated[cut], resident.hr[cut], resident.label[cut] > 0
            own.append(((x.clamp(min=0) - y).double() ** 2).sum())
            top, voxels = max(top, float(y.max())), voxels + y.numel()
            both, sizes = both + int((label & (x > 0.3)).sum()), sizes + int(label.sum() + (x > 0.3).sum())
        squared += float(sum(own))
        decibels.append(10 * np.log10(top**2 / (float(sum(own)) / (16**3 * len(own)))))
    assert scores["MSE"] == pytest.approx(squared / voxels)
    assert scores["Dice"] == pytest.approx(2 * both / sizes)
    assert scores["PSNR"] == pytest.approx(np.mean(decibels))
    assert validate(Identity(), feed, [], batch_size=3) == {}


def test_whole_volumes_of_a_network_that_does_nothing_score_as_the_spline(store):
    feed = make_feed(store)
    names = [s.id for s in feed.store.subjects]
    scores = validate_whole(Identity(), feed, names)
    assert scores["whole_PSNR"] == pytest.approx(scores["spline_PSNR"], abs=0.05)  # SR is cut at 0, the spline is not
    assert scores["whole_SSIM"] == pytest.approx(scores["spline_SSIM"], abs=0.02)
    assert 15 < scores["spline_PSNR"] < 60 and 0 < scores["whole_Dice"] < scores["spline_Dice"] < 1


def test_a_stop_in_the_middle_of_a_validation_comes_back_to_it(store, tmp_path, monkeypatch):
    train(store, tmp_path / "whole", SMALL)
    asked, original = [], loop.validate

    def stopping(*args, stopped, **options):
        def ask():
            asked.append(1)
            if len(asked) == 1:
                signal.raise_signal(signal.SIGTERM)
            return stopped()

        return original(*args, stopped=ask, **options)

    monkeypatch.setattr(loop, "validate", stopping)
    first = train(store, tmp_path / "run", SMALL)
    assert first["exit_code"] == 143 and first["updates"] == 4 and not rows(tmp_path / "run", "validation")
    train(store, tmp_path / "run", SMALL, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
