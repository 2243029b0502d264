"""What a precision costs: a few tiles in it and in float32, side by side."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.planes import Held, Source
from fastsrgan.model.arithmetic import TYPES, native

TILES = 4  # compared
LOOKED_AT = 16  # places in the volume of which those with most contrast are taken
EMULATED = 32  # edge of the tiles on a CPU that has to emulate the precision


def deviations(source: Source, plan: tiles.TilePlan, generator: nn.Module, slice_mm: float, device: torch.device,
               precision: str) -> dict[str, dict[str, float]]:  # fmt: skip
    """Largest and root-mean-square deviation from float32 of each precision that makes sense on a device.

    These are the chosen one, and of the others those that the device has. Units: SR in maxima of the image,
    probabilities as they are.

    Returns
    -------
    precision -> {"tiles", "edge", "sr_max", "sr_rms", "prob_max", "prob_rms"}
    """
    has = [name for name in TYPES if device.type == "cuda" or native(name)]
    wanted = [name for name in TYPES if name != "fp32" and (name in has or name == precision)]
    tiles_N1XYZ = _tiles(source, plan)
    found = {"fp32": _row(torch.zeros(1, 2), tiles_N1XYZ)} if precision == "fp32" else {}
    for name in wanted:
        some = tiles_N1XYZ if name in has else tiles_N1XYZ[:1, :, :EMULATED, :EMULATED, :EMULATED]
        results = []
        for each in ("fp32", name):
            network = TileNetwork(generator, slice_mm, device, each)
            with network.working():
                results.append(torch.cat([network(tile[None].to(device)).cpu() for tile in some]))
        found[name] = _row(results[1] - results[0], some)
    return found


def _tiles(source: Source, plan: tiles.TilePlan) -> torch.Tensor:
    """(N, 1, *patch): the tiles with most contrast among some that lie evenly in the volume."""
    places = sorted(set(np.linspace(0, len(plan) - 1, min(LOOKED_AT, len(plan))).round().astype(int).tolist()))
    held, found = Held(source, plan), []
    for n in places:
        x, y, z = plan.origin(n)
        volume = held.planes(x, x + plan.patch[0])
        shape = (volume.shape[0], volume.shape[1], volume.shape[2])
        part = replace(plan, shape=shape, padded_shape=shape, pad_before=(0, 0, 0), origins=((0,), (y,), (z,)))
        tile = tiles.gather(volume, part, [0])
        found.append((float(tile.amax() - tile.amin()), n, tile))
        found = sorted(found, key=lambda item: item[:2], reverse=True)[:TILES]
    return torch.cat([tile for _, _, tile in sorted(found, key=lambda item: item[1])])


def _row(difference: torch.Tensor, some: torch.Tensor) -> dict[str, float]:
    row: dict[str, float] = {"tiles": len(some), "edge": max(some.shape[2:])}
    for name, part in (("sr", difference[:, :1]), ("prob", difference[:, 1:])):
        row[f"{name}_max"] = float(part.abs().max())
        row[f"{name}_rms"] = math.sqrt(float(part.square().mean()))
    return row
