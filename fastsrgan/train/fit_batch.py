"""Memory of a training step: what to say when it ran out, and which batch fits."""

from __future__ import annotations

import gc
import logging

import torch

from fastsrgan.config import TrainConfig
from fastsrgan.core.ranks import Ranks
from fastsrgan.core.system import free_memory, peak_memory
from fastsrgan.data.pool import Batch
from fastsrgan.errors import ResourceError, human, out_of_memory
from fastsrgan.train.gan import Models
from fastsrgan.train.state import Run

log = logging.getLogger("fastsrgan")


def fits(config: TrainConfig, mask_classes: int, device: torch.device, batch: int) -> bool:
    """Whether one iteration with ``batch`` patches runs in the memory there is, on networks made for the trial."""
    if device.type == "cpu" and least_bytes(config, mask_classes, batch) > free_memory():
        return False  # the system would end the process rather than refuse the memory
    trial = None
    try:
        trial = Models(config, mask_classes, device)
        p, channels = config.patch_size, 2 + mask_classes
        x = torch.rand((batch, 1, p, p, p), device=device)
        y = torch.rand((batch, channels, p, p, p), device=device)
        patches = Batch(x, y, torch.ones(batch, device=device), ["trial"] * batch)
        eps = torch.rand((batch, channels) if config.eps_per_channel else (batch,), device=device)
        trial.critic_updates([patches] * config.critic_iterations, [eps] * config.critic_iterations)
        trial.generator_update(patches, config.lambda_adv > 0)
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


def least_bytes(config: TrainConfig, mask_classes: int, batch: int) -> int:
    """What no step can do without: ``batch`` patches with their truth, and of a part of them the first features."""
    channels = batch * (1 + 2 + mask_classes) + -(-batch // config.accumulate) * config.kernel_gen
    return 4 * channels * config.patch_size**3


def refuse_hopeless(config: TrainConfig, mask_classes: int, device: torch.device, ranks: Ranks) -> None:
    """Raise ResourceError for a batch whose patches alone are more than a CPU's memory: it would end without a word."""
    own = config.batch_size // ranks.world
    least, free = least_bytes(config, mask_classes, own), free_memory() // ranks.local_world
    if device.type == "cpu" and least > free:
        what = f"{config.batch_size} patches of {config.patch_size} voxels need more than {human(least)} on each rank"
        fewer = own * free // least * ranks.world
        raise ResourceError("--batch-size", f"{what}, {human(free)} are free", f"below {fewer}, or --auto-batch True")


def batch_that_fits(config: TrainConfig, mask_classes: int, device: torch.device, ranks: Ranks) -> int:
    """The largest of batch_size, half of it, a quarter ... (patches of all ranks) whose iteration every rank can run.

    Raises ResourceError where not even one patch per rank fits.
    """
    own = config.batch_size // ranks.world
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
    device, c = run.models.device, run.config
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} of {total / 1e9:.1f} GB were in use"
    else:
        peak = f"the process held {peak_memory() / 1e9:.1f} GB"
    own = run.batch // 2
    while own and not fits(c, run.mask_classes, device, own):
        own //= 2
    hint = "a smaller --patch-size or --kernel-gen"
    if own:
        parts = -(-run.batch // own)
        hint = (
            f"--batch-size {own * run.ranks.world} fits, or --accumulate {parts * c.accumulate}; also --auto-batch True"
        )
    log.debug("%s", told)
    return ResourceError(str(device), f"out of memory at a batch of {c.batch_size} patches, {peak}", hint)
