"""Memory of a training step: what to say when it ran out, and which batch fits."""

from __future__ import annotations

import gc
import logging

import torch

from fastsrgan.config import TrainConfig
from fastsrgan.core.ranks import Ranks
from fastsrgan.core.system import free_memory, peak_memory
from fastsrgan.errors import ResourceError, human, out_of_memory
from fastsrgan.train.gan import Models, least_bytes
from fastsrgan.train.state import Run

log = logging.getLogger("fastsrgan")


def fits(config: TrainConfig, mask_classes: int, device: torch.device, batch: int) -> bool:
    """Whether one iteration with ``batch`` patches runs in the memory there is, on networks made for the trial."""
    if device.type == "cpu" and least_bytes(config, mask_classes, batch) > free_memory():
        return False  # the system would end the process rather than refuse the memory
    trial = None
    try:
        trial = Models(config, mask_classes, device)
        trial.try_iteration(batch)
        return True
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        del trial
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def refuse_hopeless(config: TrainConfig, mask_classes: int, device: torch.device, ranks: Ranks, batch: int) -> None:
    """Raise ResourceError where ``batch`` patches alone are more than a CPU's memory: it would end without a word."""
    own = batch // ranks.world
    least, free = least_bytes(config, mask_classes, own), free_memory() // ranks.local_world
    if device.type == "cpu" and least > free:
        what = f"{batch} patches of {config.patch_size} voxels need more than {human(least)} on each rank"
        fewer = own * free // least * ranks.world
        raise ResourceError("--batch-size", f"{what}, {human(free)} are free", f"below {fewer}, or --auto-batch True")


def batch_that_fits(config: TrainConfig, mask_classes: int, device: torch.device, ranks: Ranks, batch: int) -> int:
    """The largest of ``batch``, half of it, a quarter ... (patches of all ranks) whose iteration every rank can run.

    Raises ResourceError where not even one patch per rank fits.
    """
    own = batch // ranks.world
    while True:
        if ranks.minimum(int(fits(config, mask_classes, device, own))):
            return own * ranks.world
        if own == 1:
            raise ResourceError(
                str(device), "no memory for a batch of one patch", "a smaller --patch-size or --kernel-gen"
            )
        own //= 2


def memory_error(run: Run, told: str) -> ResourceError:
    """What ran out, the measured peak, and the largest batch that fits, found by trying."""
    device, models = run.models.device, run.models
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} of {total / 1e9:.1f} GB were in use"
    else:
        peak = f"the process held {peak_memory() / 1e9:.1f} GB"
    own = run.batch // 2
    while own and not fits(run.config, run.mask_classes, device, own):
        own //= 2
    hint = "a smaller --patch-size or --kernel-gen"
    if own:
        parts = -(-run.batch // own)
        more = parts * models.micro_batches
        hint = f"--batch-size {own * run.ranks.world} fits, or --accumulate {more}; also --auto-batch True"
    log.debug("%s", told)
    return ResourceError(
        str(device), f"out of memory at a batch of {run.batch * run.ranks.world} patches, {peak}", hint
    )
