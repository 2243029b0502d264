"""A store of small heads of sizes that divide nothing, and what to do with it in other processes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from fastsrgan.data.feed import Feed, deal
from fastsrgan.data.pool import Resident
from fastsrgan.data.subject import PatchRule
from fastsrgan.observation.model import Degradation
from fastsrgan.store.reader import Store, open_store
from fastsrgan.store.writer import create_store, describe

CPU = torch.device("cpu")
SHAPES = [(41, 52, 37), (33, 29, 60), (50, 47, 44), (17, 61, 23), (61, 47, 53)]
RULE = PatchRule(16, 9)
DRAWN = Degradation(((1.0, 1.0, 2.0), (1.3, 1.2, 4.0)))


def make_store(folder: Path, shapes: list[tuple[int, int, int]] = SHAPES) -> Store:
    """Subjects "a", "b", ...: noise around a ball, stored in different orders of axes; every second has a mask."""
    with create_store(folder / "store") as writer:
        for i, shape in enumerate(shapes):
            rng = np.random.default_rng(i)
            grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
            image = ((grid**2).sum(0) < 0.9) * rng.integers(1, 1000, shape).astype(np.int16)
            label, mask = (image > 500).astype(np.uint8), (image // 300).astype(np.uint8)
            affine = np.roll(np.diag([-1.0, 1, 1, 1]), i % 2, axis=1) if i % 2 == 0 else np.diag([1.0, -1, 1, 1])
            writer.write(
                "abcdefgh"[i],
                "Train",
                image,
                1.0,
                0.0,
                label,
                mask if i % 2 else None,
                affine,
                describe(image, 1.0, 0.0),
            )
        writer.finish()
    return open_store(folder / "store")


def names(store: Store) -> list[str]:
    return [s.id for s in store.subjects]


def make_feed(store: Store, degradation: Degradation = DRAWN, **settings) -> Feed:
    return Feed(store, degradation, RULE, **{"seed": 3, "device": CPU, **settings})


def digest(resident: Resident) -> str:
    """All bits of a resident."""
    found = hashlib.sha256()
    for tensor in (resident.interpolated, resident.hr, resident.label, resident.mask):
        if tensor is not None:
            found.update(repr((tensor.dtype, tensor.shape)).encode())
            found.update(tensor.view(torch.uint8).numpy().tobytes())
    found.update(resident.origins.tobytes())
    return found.hexdigest()


def epochs_of_rank(folder: str, rank: int, world: int, size: int) -> list[list[list[tuple[str, str]]]]:
    """Subjects and bits of every group of two epochs, as one rank of a run prepares them."""
    torch.set_num_threads(rank + world)
    store = open_store(Path(folder) / "store")
    plan = [(e, g) for e in (1, 2) for g in deal(names(store), 3, e, size, rank, world)]
    done = [[(r.subject, digest(r)) for r in g] for g in make_feed(store, rank=rank, world=world).groups(iter(plan))]
    return [[g for (e, _), g in zip(plan, done, strict=True) if e == epoch] for epoch in (1, 2)]


class Pipeline:
    """In place of DALI's: calls the step on what it was fed, at once."""

    def __init__(self, step, device: torch.device) -> None:
        self.step, self.fed = step, {}

    def feed_input(self, name: str, arrays: list[np.ndarray]) -> None:
        self.fed[name] = torch.from_numpy(arrays[0].copy())

    def run(self) -> list[list[torch.Tensor]]:
        made = self.step(torch.utils.dlpack.to_dlpack(self.fed["image"]))
        made = [torch.utils.dlpack.from_dlpack(capsule) for capsule in made]
        return [[t] for t in (*made, self.fed["label"], self.fed["mask"])]
