"""All tiles of a volume through a generator on a device, stitched (DESIGN D8, D9, D11): in memory or by slabs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.system import out_of_memory
from fastsrgan.errors import ResourceError
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Sink, Source, Whole
from fastsrgan.infer.region import Region
from fastsrgan.infer.settings import InferSettings
from fastsrgan.infer.stitch import Stitcher
from fastsrgan.infer.sweep import Sweep

log = logging.getLogger("fastsrgan")

DEFAULTS = InferSettings()


def predict(
    volume_XYZ: Tensor,
    plan: tiles.TilePlan,
    network: TileNetwork,
    settings: InferSettings = DEFAULTS,
    *,
    region: Region | None = None,
    progress: Progress = QUIET,
    label: str = "infer",
) -> tuple[Tensor, dict]:
    """Apply a network to a normalised volume, densely.

    Parameters
    ----------
    volume_XYZ : (X, Y, Z) float32 on the CPU, of the plan's shape
    settings : of which the window and the batch count here
    region : where results are wanted; elsewhere channel 0 is the volume and the others are 0

    Returns
    -------
    (C, X, Y, Z) float32 on the CPU, SR first, then probabilities in [0, 1]; and facts: batch, tile_seconds,
    tiles_per_second, and how many tiles went through the network, held one value, or lay outside the region.

    Raises
    ------
    UsageError : an impossible batch. ResourceError : no memory for a single tile.
    """
    out: list[Tensor] = []

    def keep(first: int, planes: Tensor) -> None:
        if not out:
            out.append(torch.empty((planes.shape[0], *plan.shape)))
        out[0][:, first : first + planes.shape[1]] = planes

    if network.device.type != "cpu":
        facts = stream(Whole(volume_XYZ), plan, network, keep, settings, region=region, progress=progress, label=label)
        return out[0], facts
    network.choose_batch(settings.batch, plan)
    sweep = Sweep(Whole(volume_XYZ), plan, network, region=region, progress=progress)
    made: list[Stitcher] = []

    def stitcher(channels: int) -> Stitcher:
        made.append(Stitcher(plan, channels, settings.window, finished=finisher(sweep, lambda first, planes: None)))
        return made[0]

    with sweep.timed(label):
        sweep.run(stitcher)
    return made[0].result()[(slice(None), *plan.crop)], sweep.facts


def stream(
    source: Source,
    plan: tiles.TilePlan,
    network: TileNetwork,
    sink: Sink,
    settings: InferSettings = DEFAULTS,
    *,
    region: Region | None = None,
    done: int = 0,
    progress: Progress = QUIET,
    label: str = "infer",
) -> dict:
    """``predict`` by slabs: planes go to ``sink`` as soon as they are final, and only those of a slab are in memory.

    done : planes that the sink has from a run before this one, with the same batch
    """
    network.choose_batch(settings.batch, plan)
    sweep = Sweep(source, plan, network, region=region, progress=progress)
    written = [done]

    def write(first: int, planes: Tensor) -> None:
        if first + planes.shape[1] > written[0]:
            sink(max(first, written[0]), planes[:, max(0, written[0] - first) :].cpu())
            written[0] = first + planes.shape[1]

    places = sum_devices(network.device)
    with sweep.timed(label):
        for n, place in enumerate(places):
            first = sweep.restart(written[0])

            def stitcher(channels: int, place: torch.device = place, first: int = first) -> Stitcher:
                finished = finisher(sweep, write)
                return Stitcher(plan, channels, settings.window, place, finished=finished, rolling=True, first=first)

            try:
                sweep.run(stitcher, first)
                break
            except (ResourceError, RuntimeError) as error:
                full = isinstance(error, ResourceError) or out_of_memory(error)
                if not full or n == len(places) - 1:
                    raise
            log.warning("out of memory on %s: the result is summed on the CPU, which is slower", place)
            torch.cuda.empty_cache()
    return sweep.facts


def sum_devices(device: torch.device) -> list[torch.device]:
    """Where sums may be kept, the first choice first."""
    return [device] if device.type == "cpu" else [device, torch.device("cpu")]


def finisher(sweep: Sweep, sink: Sink) -> Callable[[int, Tensor], None]:
    """What is done with final sums: crop, subtract from the volume, clamp, fill what lies outside; in place."""
    plan, region, held = sweep.plan, sweep.region, sweep.held

    def finish(x: int, planes: Tensor) -> None:
        before, after = plan.crop[0].start, plan.crop[0].stop
        first, stop = max(x, before), min(x + planes.shape[1], after)
        if first >= stop:
            return
        out = planes[:, first - x : stop - x, plan.crop[1], plan.crop[2]]
        volume = held.inner(first - before, stop - before).to(out.device)
        if sweep.network.residual:
            torch.sub(volume, out[0], out=out[0])
        out[1:].clamp_(0, 1)  # means of probabilities, exceeded by rounding only
        if region is not None:
            outside = ~region.planes(first - before, stop - before).to(out.device)
            out[0][outside] = volume[outside]
            out[1:].masked_fill_(outside, 0)
        sink(first - before, out)

    return finish
