"""Volumes that are seen a few planes at a time: sources, what is held of them, and results that survive a kill.

Planes lie along the first axis, the one along which slabs of tiles follow each other. Memory is that of a slab,
whatever the length of the volume along that axis.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.files import atomic_write, disk_error, mapping, need_space, read_json, sync_folder
from fastsrgan.infer import tiles

log = logging.getLogger("fastsrgan")

# (first plane, (C, n, Y, Z) float32 on the CPU): called in ascending order, every plane once
Sink = Callable[[int, Tensor], None]


class Source(Protocol):
    """A volume that gives planes."""

    shape: tiles.Triple

    def planes(self, first: int, stop: int) -> Tensor:
        """(stop - first, Y, Z) float32 on the CPU; the same bits for a plane whatever it is asked with."""


class Whole:
    """A volume in memory, or mapped into it."""

    def __init__(self, volume_XYZ: Tensor | np.ndarray) -> None:
        self.volume = torch.as_tensor(volume_XYZ)
        x, y, z = self.volume.shape
        self.shape = (x, y, z)

    def planes(self, first: int, stop: int) -> Tensor:
        """A view where the volume is float32."""
        return self.volume[first:stop].float()


def shift_(memory: Tensor, dim: int, keep: int, step: int) -> None:
    """Move places ``step`` ... ``step + keep`` of a dimension to its front, within the same memory."""
    for a in range(0, keep, step):  # in pieces, since what is read and what is written must not overlap
        n = min(step, keep - a)
        memory.narrow(dim, a, n).copy_(memory.narrow(dim, a + step, n))


class Held:
    """The planes of a padded volume that tiles are being cut from, on a device.

    A volume that is in memory, needs no padding and no other device is looked at where it is; of others a few planes
    are kept, and each is loaded once.
    """

    def __init__(self, source: Source, plan: tiles.TilePlan, device: torch.device | str = "cpu") -> None:
        self.source, self.plan, self.device = source, plan, torch.device(device)
        at_hand = isinstance(source, Whole) and plan.padded_shape == plan.shape and self.device.type == "cpu"
        self.whole = source.volume if at_hand and source.volume.dtype == torch.float32 else None  # type: ignore[attr-defined]
        self.memory: Tensor | None = None
        self.first = self.stop = 0

    def planes(self, first: int, stop: int) -> Tensor:
        """(stop - first, Y, Z) of the padded volume. Planes before the last ``first`` would be loaded again."""
        if first < self.first:
            self.first = self.stop = first
        if self.whole is not None:
            self.first, self.stop = first, stop
            return self.whole[first:stop]
        known = min(max(0, self.stop - first), stop - first)
        if self.memory is None or len(self.memory) < stop - first:
            larger = torch.empty((stop - first, *self.plan.padded_shape[1:]), device=self.device)
            if known and self.memory is not None:
                larger[:known] = self.memory[first - self.first : self.stop - self.first]
            self.memory = larger
        elif known and first > self.first:
            shift_(self.memory, 0, known, first - self.first)
        self._load(first + known, stop, self.memory[known : stop - first])
        self.first, self.stop = first, stop
        return self.memory[: stop - first]

    def inner(self, first: int, stop: int) -> Tensor:
        """Planes of the volume itself, without padding, out of those that are held."""
        before, (_, y, z) = self.plan.pad_before[0], self.plan.crop
        a, b = first + before - self.first, stop + before - self.first
        memory = self.whole[self.first : self.stop] if self.whole is not None else self.memory
        assert memory is not None and a >= 0 and b <= self.stop - self.first, "planes that are no longer held"
        return memory[a:b, y, z]

    def _load(self, first: int, stop: int, out: Tensor) -> None:
        """Padded planes ``first`` ... ``stop`` from the source."""
        plan, n = self.plan, self.plan.shape[0]
        index = np.arange(first, stop) - plan.pad_before[0]
        if plan.mirror:
            folded = index % (2 * n)
            index = np.minimum(folded, 2 * n - 1 - folded)
        real = (index >= 0) & (index < n)
        if not real.all():
            out.zero_()
        within = replace(
            plan,
            shape=(1, *plan.shape[1:]),
            padded_shape=(1, *plan.padded_shape[1:]),
            pad_before=(0, *plan.pad_before[1:]),
        )
        at = 0
        while at < len(index):
            run = at + 1
            while run < len(index) and real[run] == real[at] and index[run] == index[run - 1] + 1:
                run += 1
            if real[at]:
                some = self.source.planes(int(index[at]), int(index[run - 1]) + 1)
                part = replace(
                    within, shape=(len(some), *plan.shape[1:]), padded_shape=(len(some), *plan.padded_shape[1:])
                )
                out[at:run] = tiles.pad(some, part)
            at = run


def write_into(array: Any) -> Sink:
    """A sink that assigns to ``array[:, first:stop]``: NumPy, a memory map, Zarr, or any (C, X, Y, Z) like them."""

    def write(first: int, planes_CnYZ: Tensor) -> None:
        array[:, first : first + planes_CnYZ.shape[1]] = planes_CnYZ.numpy()

    return write


# --- results that survive a kill ----------------------------------------------------------------------------------

JOURNAL = "journal.json"


class Unfinished:
    """Arrays in files that grow by planes, and a journal of how far they are.

    They lie in a hidden folder beside ``folder`` that takes its name when the last plane is written. What was
    finished by a run that was killed is kept, if it was made with the same ``key``.

    Attributes
    ----------
    arrays : name -> memory map
    done : planes that are finished
    facts : what the run that began noted, plain values
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        key: str,
        shapes: dict[str, Sequence[int]],
        planes: int,
        facts: dict | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.partial = self.partial_of(self.folder)
        self.key, self.done, self.facts = key, 0, dict(facts or {})
        self.arrays: dict[str, Any] = {}  # memory maps
        try:
            if self._resumed(shapes, planes):
                log.info("%s: going on behind plane %d", self.folder, self.done)
                return
            shutil.rmtree(self.partial, ignore_errors=True)
            sizes = [4 * math.prod(shape) for shape in shapes.values()]
            need_space(self.folder, sum(sizes) + max(sizes))  # the image that is made of them lies beside them
            self.partial.mkdir(parents=True)
            self.arrays = {name: self._create(name, shape) for name, shape in shapes.items()}
        except OSError as error:
            raise disk_error(error, self.folder) from error
        self.note(0)

    @staticmethod
    def partial_of(folder: str | os.PathLike) -> Path:
        """Where the arrays of ``folder`` lie until they are finished."""
        return Path(folder).with_name(f".{Path(folder).name}.partial")

    def note(self, done: int) -> None:
        """``done`` planes are finished: first the planes reach the disk, then the journal says so."""
        try:
            for array in self.arrays.values():
                array.flush()
        except OSError as error:
            raise disk_error(error, self.folder) from error
        with atomic_write(self.partial / JOURNAL) as temporary:
            record = {"key": self.key, "done": done, "facts": self.facts}
            temporary.write_text(json.dumps(record) + "\n", encoding="utf8")
        self.done = done

    def finish(self) -> dict[str, np.ndarray]:
        """Rename into place; the arrays, mapped from there."""
        self.note(self.done)
        self.arrays.clear()
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self.partial, self.folder)
            sync_folder(self.folder.parent)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        return {path.stem: np.load(path, mmap_mode="r+") for path in sorted(self.folder.glob("*.npy"))}

    def _resumed(self, shapes: dict[str, Sequence[int]], planes: int) -> bool:
        """Go on where a run before this one stopped, where it was this run's work and its files are whole."""
        found = read_json(self.partial / JOURNAL)
        if found.get("key") != self.key:
            return False
        done, facts = found.get("done"), mapping(found.get("facts"))
        known = isinstance(done, int) and done in range(planes + 1) and facts.keys() == self.facts.keys()
        if not known or not all(self._is_whole(name, shape) for name, shape in shapes.items()):
            log.warning("%s: what an earlier run left is damaged, it is made anew", self.folder)
            return False
        self.done, self.facts = found["done"], facts
        self.arrays = {name: np.load(self._file(name), mmap_mode="r+") for name in shapes}
        return True

    def _is_whole(self, name: str, shape: Sequence[int]) -> bool:
        """Whether an array's file is as it was created. Mapped for reading: for writing, a short file would grow."""
        try:
            array = np.load(self._file(name), mmap_mode="r")
        except Exception:  # of a damaged header NumPy raises many kinds
            return False
        return array.shape == tuple(shape) and array.dtype == np.float32 and bool(array.flags.c_contiguous)

    def _create(self, name: str, shape: Sequence[int]) -> np.ndarray:
        array = np.lib.format.open_memmap(self._file(name), "w+", np.float32, tuple(shape))
        with open(self._file(name), "r+b") as file:
            # Blocks are taken now: a disk that fills up under a memory map would end the process by a signal.
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return array

    def _file(self, name: str) -> Path:
        return self.partial / f"{name}.npy"
