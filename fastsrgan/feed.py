"""From the store to degraded volumes in memory: read, orient, degrade and place patches, ahead of the training step.

Subjects of an epoch come in a keyed order, in groups that fit in memory; a thread prepares the next group while the
current one is trained on. Nothing is written to disk.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastsrgan.degrade import Degradation, Draw, degrade
from fastsrgan.errors import InputError
from fastsrgan.geometry import Orientation, processing_orientation
from fastsrgan.pool import Resident, patch_origins, positive_box
from fastsrgan.resample import modulo_size
from fastsrgan.runtime import rng
from fastsrgan.store import Sample, Store

log = logging.getLogger("fastsrgan")

RESIDENT_BYTES_PER_VOXEL = 4 + 4 + 1 + 1  # interpolated, hr, label, mask


@dataclass(frozen=True)
class PatchRule:
    """Which patches are taken: edge, grid stride, and whether the mask decides (``overlapping_with_mask``)."""

    patch: int
    stride: int
    by_mask: bool = False


def make_resident(
    sample: Sample, degradation: Degradation, draw: Draw, rule: PatchRule, device: torch.device
) -> Resident:
    """Degrade one subject and place its patches. Raises InputError without a label, or a mask where one is needed."""
    if sample.label is None:
        raise InputError(sample.id, "has no label", "training needs Label_image for every subject")
    if rule.by_mask and sample.mask is None:
        raise InputError(sample.id, "has no mask", "overlapping_with_mask needs Mask_image for every subject")
    turn = Orientation()
    if degradation.geometry == "physical":
        turn = processing_orientation(sample.affine, draw.low_res)
    spacing, low_res = turn.permute(sample.spacing), turn.permute(draw.low_res)
    image, label = turn.apply(sample.image), turn.apply(sample.label)
    mask = None if sample.mask is None else turn.apply(sample.mask)
    done = degrade(
        image,
        spacing,
        low_res,
        power=draw.power,
        noise=draw.noise,
        key=draw.key,
        geometry=degradation.geometry,
        interp=degradation.interp,
        interpolation_type=degradation.interpolation_type,
    )
    shape = image.shape
    if degradation.geometry == "segsrgan":
        shape = tuple(modulo_size(n, r / s) for n, s, r in zip(shape, spacing, low_res, strict=True))
    # SciPy's zoom may return another size than the image's at fractional ratios: what all arrays share is used.
    cut = tuple(slice(0, min(a, b)) for a, b in zip(shape, done.interpolated.shape, strict=True))
    hr = done.hr[cut]
    origins = patch_origins(
        hr.shape, rule.patch, rule.stride, positive_box(hr), mask[cut] if rule.by_mask and mask is not None else None
    )

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Resident(
        sample.id,
        tensor(done.interpolated[cut]),
        tensor(hr),
        tensor(label[cut]),
        None if mask is None else tensor(mask[cut]),
        float(low_res[2]),
        origins,
    )


def epoch_groups(subjects: list[str], seed: int, epoch: int, size: int) -> list[list[str]]:
    """The subjects of an epoch in keyed order, in groups of at most ``size``, as even as possible."""
    order = [subjects[i] for i in rng(seed, epoch, "subjects").permutation(len(subjects))]
    count = -(-len(order) // size)
    return [list(group) for group in np.array_split(np.asarray(order, object), count)]


def resident_limit(store: Store, subjects: list[str], budget_bytes: int | None = None) -> int:
    """How many of the subjects may be resident at once; two groups live at a time, one in use and one being made.

    The budget is 40 % of the memory that is free now unless given.
    """
    if budget_bytes is None:
        budget_bytes = int(0.4 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    largest = max(int(np.prod(store.subject(s).shape)) for s in subjects) * RESIDENT_BYTES_PER_VOXEL
    return max(1, min(len(subjects), budget_bytes // (2 * largest)))


class Feed:
    """Groups of residents, one prepared ahead by a thread.

    A subject that cannot be read is left out of the run with a warning (``strict``: raised). ``waited`` is the time in
    seconds that the caller spent waiting.
    """

    def __init__(
        self,
        store: Store,
        degradation: Degradation,
        rule: PatchRule,
        *,
        seed: int,
        device: torch.device,
        strict: bool = False,
    ) -> None:
        self.store, self.degradation, self.rule = store, degradation, rule
        self.seed, self.device, self.strict = seed, device, strict
        self.waited = 0.0
        self.quarantined: dict[str, str] = {}

    def prepare(self, epoch: int, group: list[str]) -> list[Resident]:
        """The residents of a group of subjects for one epoch, in order."""
        residents = []
        for name in group:
            if name in self.quarantined:
                continue
            try:
                sample = self.store.read(name)
                draw = self.degradation.draw(self.seed, epoch, name)
                residents.append(make_resident(sample, self.degradation, draw, self.rule, self.device))
            except InputError as error:
                if self.strict:
                    raise
                self.quarantined[name] = str(error)
                log.warning("subject %s is left out: %s", name, error)
        return residents

    def groups(self, plan: Iterator[tuple[int, list[str]]]) -> Iterator[list[Resident]]:
        """Residents for each (epoch, subjects) of ``plan``, the next prepared while the caller works."""
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            pending = None
            for epoch, group in plan:
                following = pool.submit(self.prepare, epoch, group)
                if pending is not None:
                    yield self._take(pending)
                pending = following
            if pending is not None:
                yield self._take(pending)

    def _take(self, pending: concurrent.futures.Future) -> list[Resident]:
        began = time.perf_counter()
        try:
            return pending.result()
        finally:
            self.waited += time.perf_counter() - began
