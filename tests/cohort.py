"""A cohort of a few small subjects for tests of training: enough anatomy to learn from, sizes that divide nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fastsrgan.config import TrainConfig
from fastsrgan.convert import convert
from fastsrgan.io import nifti as images

SMALL = TrainConfig(
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
    precision="fp32",
    feed_threads=1,
)


def make_store(folder: Path, train: int = 2, test: int = 1, masks: bool = False) -> Path:
    """A store of subjects of 24 x 28 x 30 voxels; as masks, where they are wanted, serve the labels."""
    lines = ["HR_image,Label_image,Base" + ",Mask_image" * masks]
    for i, base in enumerate(["Train"] * train + ["Test"] * test):
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 28, 30)), indexing="ij"))
        r = np.sqrt(((grid * np.array([1.1, 1.0 + 0.1 * i, 1.2])[:, None, None, None]) ** 2).sum(0))
        image = np.where(r < 0.9, 400 + 300 * np.cos(9 * r + i), 0).astype(np.int16)
        images.save(folder / f"sub-{i}.nii.gz", image, np.eye(4))
        images.save(folder / f"sub-{i}_gm.nii.gz", (r < 0.6).astype(np.uint8), np.eye(4))
        lines.append(f"sub-{i}.nii.gz,sub-{i}_gm.nii.gz,{base}" + f",sub-{i}_gm.nii.gz" * masks)
    (folder / "cohort.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    convert(folder / "cohort.csv", folder / "cohort.zarr")
    return folder / "cohort.zarr"


def rows(run: Path, key: str = "update") -> list[dict]:
    """Lines of a run's log that have ``key``."""
    return [r for r in map(json.loads, (run / "log.jsonl").read_text(encoding="utf8").splitlines()) if key in r]


def losses(run: Path) -> list[tuple]:
    """Every loss of every update, and the validations: what two runs that are the same share."""
    timed = {"seconds", "data_wait_seconds", "patches_per_second", "memory_bytes"}
    lines = [{k: v for k, v in row.items() if k not in timed} for row in rows(run, "epoch")]
    return [tuple(sorted((k, str(v)) for k, v in line.items())) for line in lines]
