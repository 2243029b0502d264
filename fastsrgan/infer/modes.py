"""The ways of doing one volume: in memory, by slabs into files, or within a budget of seconds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.errors import InputError, ModelError, UsageError
from fastsrgan.infer import anytime, tiles
from fastsrgan.infer.engine import predict, stream
from fastsrgan.infer.interpolated import Interpolated, Results, nearest
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Unfinished, Whole
from fastsrgan.infer.region import Region, from_box, from_mask, head_box
from fastsrgan.infer.settings import HEAD, InferSettings
from fastsrgan.volume.geometry import Orientation
from fastsrgan.volume.intensity import Normaliser

log = logging.getLogger("fastsrgan")

BRIGHTER = 10  # times as bright as the image: no tissue is

# SR (X, Y, Z) and probabilities (C - 1, X, Y, Z) on stored axes, and how it went
Done = tuple[np.ndarray, np.ndarray, dict]


@dataclass(frozen=True)
class Prepared:
    """An image ready for tiles, and the way back.

    source : what tiles are cut from, processed axes
    spacing, wanted : voxel sizes of the image and of the result in mm, stored axis order
    region : where results are wanted, on the grid of the source; None: everywhere
    """

    source: Interpolated | Whole
    turn: Orientation
    norm: Normaliser
    spacing: tuple[float, float, float]
    wanted: tuple[float, float, float]
    geometry: str
    region: Region | None = None

    @property
    def slice_mm(self) -> float:
        """Size of the image's voxels through the plane."""
        return self.turn.permute(self.spacing)[2]

    def whole(self) -> Tensor:
        """(X, Y, Z) float32, processed axes."""
        return self.source.planes(0, self.source.shape[0])

    def stored(self, out_CXYZ: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Undo scale and orientation, in place; views of one array."""
        with torch.inference_mode():
            self.norm.invert_(out_CXYZ[0])
        out = self.turn.undo(out_CXYZ.numpy())
        return out[0], out[1:]


def in_memory(
    image: Prepared,
    plan: tiles.TilePlan,
    network: TileNetwork,
    settings: InferSettings,
    progress: Progress = QUIET,
    label: str = "infer",
) -> Done:
    """``engine.predict``."""
    out, facts = predict(image.whole(), plan, network, settings, region=image.region, progress=progress, label=label)
    return *image.stored(out), facts


def by_levels(
    image: Prepared,
    steps: Sequence[anytime.Level],
    network: TileNetwork,
    settings: InferSettings,
    progress: Progress = QUIET,
    label: str = "infer",
) -> Done:
    """``anytime.refine``."""
    out, facts = anytime.refine(
        image.whole(), steps, network, settings, region=image.region, progress=progress, label=label
    )
    return *image.stored(out), facts


def by_slabs(
    image: Prepared,
    plan: tiles.TilePlan,
    network: TileNetwork,
    settings: InferSettings,
    folder: Path,
    key: str,
    progress: Progress = QUIET,
    label: str = "infer",
) -> Done:
    """``engine.stream`` into files in ``folder``; goes on where a killed run with the same ``key`` ended."""
    files = Unfinished(folder, key, result_shapes(image, plan, network), plan.shape[0], {"batch": settings.batch})
    begun_at = files.done

    def write(first: int, planes: Tensor) -> None:
        Results(files.arrays["sr"], files.arrays["prob"], image.turn, image.norm)(first, planes)
        files.note(first + planes.shape[1])

    # The batch of the run that began: other batches would round otherwise.
    settings = replace(settings, batch=files.facts["batch"])
    facts = stream(
        image.source, plan, network, write, settings,
        region=image.region, done=files.done, progress=progress, label=label,
    )  # fmt: skip
    arrays = files.finish()
    return arrays["sr"], arrays["prob"], facts | {"begun_at_plane": begun_at}


def result_shapes(image: Prepared, plan: tiles.TilePlan, network: TileNetwork) -> dict[str, Sequence[int]]:
    """Of SR and probabilities, stored axes."""
    shape = [0, 0, 0]
    for axis, n in zip(image.turn.axes, plan.shape, strict=True):
        shape[axis] = n
    channels = network.channels or network.probe(plan.patch).channels
    return {"sr": shape, "prob": (channels - 1, *shape)}


def find_region(
    mask: np.ndarray | str | None, data_XYZ: np.ndarray, image: Prepared
) -> tuple[Region | None, dict | None]:
    """Where results are wanted, on the grid that tiles are cut from, and what the report says about it.

    Raises UsageError for an unknown name, InputError for a mask of another size or without a voxel.
    """
    if mask is None:
        return None, None
    turn = image.turn
    old, new = turn.permute(image.spacing), turn.permute(image.wanted)
    index = nearest(turn.permute(data_XYZ.shape), old, image.source.shape, new, image.geometry)
    if isinstance(mask, str):
        if mask != HEAD:
            raise UsageError("mask", f"{mask!r} is not allowed", f"an array, or {HEAD}")
        low, high = head_box(turn.apply(data_XYZ), old)
        return from_box(low, high, index), {"kind": "box, processed axes", "first": list(low), "last": list(high)}
    if np.shape(mask) != data_XYZ.shape:
        raise InputError(
            "mask", f"has the shape {np.shape(mask)}, the image {data_XYZ.shape}", "a mask on the grid of the image"
        )
    found = from_mask(turn.apply(np.asarray(mask)), index)
    return found, {"kind": "mask", "voxels": int(np.count_nonzero(found.mask))}


def check_result(done: tuple[np.ndarray, np.ndarray], data_XYZ: np.ndarray, precision: str, label: str) -> list[str]:
    """Warnings about a result that no image has: one value everywhere, or far brighter than the image it is made of.

    Raises ModelError where a voxel is NaN or infinite: weights that are finite may still give that.
    """
    low, high = np.inf, -np.inf
    for number, volume in enumerate((done[0], *done[1])):
        for plane in volume.transpose(np.argsort(volume.strides)[::-1]):  # as it lies in memory
            least, most = float(plane.min()), float(plane.max())  # of a plane with NaN both are
            if not (np.isfinite(least) and np.isfinite(most)):
                other = "" if precision == "fp32" else "--precision fp32, or "
                reason = "give voxels that are NaN or infinite: they are damaged, or their training diverged"
                raise ModelError("weights", reason, f"{other}other weights")
            low, high = (min(low, least), max(high, most)) if number == 0 else (low, high)
    brightest = max(float(plane.max()) for plane in data_XYZ)
    told = []
    if low == high and data_XYZ.min() < brightest:
        told.append(f"every voxel of the SR image is {low:g}: the weights may be damaged, try others")
    if high > BRIGHTER * brightest:
        told.append(
            f"the SR image reaches {high:.4g}, the image {brightest:.4g}: the weights may be damaged, try others"
        )
    for warning in told:
        log.warning("%s: %s", label, warning)
    return told
