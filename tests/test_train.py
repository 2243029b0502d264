"""The training loop end to end on small phantoms: it learns, resumes to the bit, and says what is wrong."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsrgan import checkpoint, images, weights
from fastsrgan.config import TrainConfig
from fastsrgan.convert import convert
from fastsrgan.errors import InputError, ModelError, ResourceError, UsageError
from fastsrgan.pair import Models
from fastsrgan.train import train

CONFIG = TrainConfig(
    new_low_res=((1.0, 1.0, 3.0),),
    epochs=2,
    batch_size=2,
    patch_size=16,
    stride=12,
    kernel_gen=2,
    kernel_dis=2,
    critic_iterations=2,
    steps_per_epoch=4,
    keep_checkpoints=5,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Two training subjects and one test subject of 24 x 28 x 30 voxels."""
    folder = tmp_path_factory.mktemp("cohort")
    lines = ["HR_image,Label_image,Base"]
    for i, base in enumerate(("Train", "Train", "Test")):
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 28, 30)), indexing="ij"))
        r = np.sqrt(((grid * np.array([1.1, 1.0 + 0.1 * i, 1.2])[:, None, None, None]) ** 2).sum(0))
        image = np.where(r < 0.9, 400 + 300 * np.cos(9 * r + i), 0).astype(np.int16)
        images.save(folder / f"sub-{i}.nii.gz", image, np.eye(4))
        images.save(folder / f"sub-{i}_gm.nii.gz", (r < 0.6).astype(np.uint8), np.eye(4))
        lines.append(f"sub-{i}.nii.gz,sub-{i}_gm.nii.gz,{base}")
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    convert(folder / "cohort.csv", folder / "cohort.zarr")
    return folder / "cohort.zarr"


def rows(run: Path, key: str = "update") -> list[dict]:
    return [r for r in map(json.loads, (run / "log.jsonl").read_text(encoding="utf8").splitlines()) if key in r]


def losses(run: Path) -> list[tuple]:
    return [(r["update"], r["g_total"], r["d_total"], r["d_penalty"]) for r in rows(run)]


def test_a_run_leaves_weights_tables_log_and_settings(store, tmp_path):
    result = train(store, tmp_path / "run", CONFIG, snapshot_folder=tmp_path / "snapshots")
    run = tmp_path / "run"
    assert result["updates"] == 8 and result["exit_code"] == 0
    generator = weights.load_generator(run / "model.safetensors")
    assert generator.spec.kernel == 2
    original = weights.load_generator(tmp_path / "snapshots" / "SegSRGAN_epoch_2")
    for a, b in zip(generator.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (run / "dice.csv").read_text(encoding="utf8").splitlines()[0] == ",Dice"
    assert [line.split(",")[0] for line in (run / "mse.csv").read_text(encoding="utf8").splitlines()] == ["", "1", "2"]
    assert "epochs: 2" in (run / "config.yaml").read_text(encoding="utf8")
    assert not checkpoint.verify(checkpoint.newest(run))


def test_training_lowers_the_reconstruction_loss(store, tmp_path):
    config = CONFIG.replace(
        lambda_adv=0.0, epochs=1, steps_per_epoch=40, stride=2, lr_gen=3e-3, beta1=0.9, zero_head=True, noise=0.0
    )
    train(store, tmp_path / "run", config)
    history = [r["g_reconstruction"] for r in rows(tmp_path / "run")]
    assert np.mean(history[-8:]) < 0.6 * np.mean(history[:8])


def test_stopped_anywhere_and_resumed_gives_the_same_bits(store, tmp_path, monkeypatch):
    config = CONFIG.replace(ema=0.5, resident_subjects=1, critic_iterations=1)
    train(store, tmp_path / "whole", config)
    expected = losses(tmp_path / "whole")
    assert len(expected) > 8
    for stop_at in (1, 5):
        run = tmp_path / f"stopped-{stop_at}"
        original = Models.generator_update
        count = iter(range(1, 1000))

        def counted(self, *args, original=original, count=count, stop_at=stop_at):
            values = original(self, *args)
            if next(count) == stop_at:
                signal.raise_signal(signal.SIGTERM)
            return values

        monkeypatch.setattr(Models, "generator_update", counted)
        assert train(store, run, config)["exit_code"] == 143
        monkeypatch.setattr(Models, "generator_update", original)
        assert len(losses(run)) == stop_at
        train(store, run, config, resume=True)
        assert losses(run) == expected
        for name in ("generator", "critic"):
            load = weights.load_generator if name == "generator" else weights.load_critic
            for a, b in zip(
                load(run / "model.safetensors").parameters(),
                load(tmp_path / "whole" / "model.safetensors").parameters(),
                strict=True,
            ):
                assert torch.equal(a, b)


def test_damaged_newest_snapshot_falls_back_to_the_one_before(store, tmp_path, caplog):
    train(store, tmp_path / "whole", CONFIG)
    train(store, tmp_path / "run", CONFIG)
    last = checkpoint.snapshots(tmp_path / "run")[-1]
    data = bytearray((last / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (last / "state.pt").write_bytes(bytes(data))
    result = train(store, tmp_path / "run", CONFIG, resume=True)
    assert result["updates"] == 8
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_starting_from_weights_takes_generator_and_critic(store, tmp_path):
    train(store, tmp_path / "first", CONFIG.replace(epochs=1))
    config = CONFIG.replace(epochs=1, steps_per_epoch=1, lr_gen=1e-12, lr_dis=1e-12)
    train(store, tmp_path / "second", config, start_weights=tmp_path / "first" / "model.safetensors")
    for load in (weights.load_generator, weights.load_critic):
        first, second = (load(tmp_path / name / "model.safetensors") for name in ("first", "second"))
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-9)
    with pytest.raises(ModelError, match="kernel_gen"):
        train(
            store,
            tmp_path / "third",
            CONFIG.replace(kernel_gen=3),
            start_weights=tmp_path / "first" / "model.safetensors",
        )


def test_nan_updates_are_skipped_and_end_the_run(store, tmp_path, monkeypatch):
    original = Models.generate
    monkeypatch.setattr(Models, "generate", lambda self, batch: original(self, batch) * float("nan"))
    with pytest.raises(ResourceError, match="3 updates in a row"):
        train(store, tmp_path / "run", CONFIG.replace(max_bad_steps=3))
    bad = json.loads((tmp_path / "run" / "bad_batch.json").read_text(encoding="utf8"))
    assert bad["patches"] and bad["facts"]["d_skipped"] == 1.0


def test_an_existing_run_is_not_overwritten(store, tmp_path):
    train(store, tmp_path / "run", CONFIG.replace(epochs=1, steps_per_epoch=1))
    with pytest.raises(UsageError, match="--resume"):
        train(store, tmp_path / "run", CONFIG)


def test_a_batch_that_no_group_can_fill_is_an_error(store, tmp_path):
    with pytest.raises(InputError, match="batch of 4096"):
        train(store, tmp_path / "run", CONFIG.replace(batch_size=4096))


def test_a_damaged_subject_is_left_out_or_ends_a_strict_run(store, tmp_path, caplog):
    import shutil

    copy = tmp_path / "damaged.zarr"
    shutil.copytree(store, copy)
    chunk = max((p for p in (copy).rglob("*") if p.is_file() and "sub-0" in str(p)), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 255
    chunk.write_bytes(bytes(data))
    result = train(copy, tmp_path / "run", CONFIG)
    assert list(result["left_out"]) and result["updates"] > 0
    with pytest.raises(InputError):
        train(copy, tmp_path / "strict", CONFIG, strict=True)
    assert threading.active_count() < 20
