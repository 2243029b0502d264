"""Other ways of dense inference, each as its makers or its users do it, over the tiles that fastsrgan takes.

Every function takes a volume, a plan, a network (B, 1, x, y, z) -> (B, C, x, y, z), tiles at a time and a window, and
gives (C, X, Y, Z). MONAI and TorchIO are called; the loops of nnU-Net and of SegSRGAN are written anew after their
documented behaviour: what is kept, in which precision, in which order.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsrgan.infer import tiles
from fastsrgan.infer.tiles import window_of

Network = Callable[[Tensor], Tensor]
Loop = Callable[[Tensor, tiles.TilePlan, Network, int, str], Tensor]

EXACT = 1e-5  # largest difference from the float64 sum, relative to the largest magnitude; found: 4.3e-6 (infer.json)
HALF = (
    1.0  # of half-precision sums: told, not gated. Where weights are below what half precision holds, values are lost
)


@dataclass(frozen=True)
class Peer:
    """loop : what does the work; windows : that it knows; tolerance : of its result

    needs : module that has to be installed; even : only even overlaps; gpu : only where tiles are on a GPU
    """

    loop: Loop
    windows: tuple[str, ...] = ("constant", "gaussian")
    tolerance: float = EXACT
    needs: str | None = None
    even: bool = False
    gpu: bool = False

    def not_run(self, plan: tiles.TilePlan) -> str | None:
        """Why it cannot do a plan here, and what would help; None where it can."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"pip install {self.needs}"
        if self.even and any(o % 2 for o in _overlap(plan)):
            return "takes even overlaps only"
        return None


def peers(window: str, device: str) -> dict[str, Peer]:
    """Those that know a window and a device."""
    gpu = device.startswith("cuda")
    return {name: p for name, p in PEERS.items() if window in p.windows and (gpu or not p.gpu)}


def step_of(plan: tiles.TilePlan) -> tuple[int, ...]:
    """Distance of the first two tiles along each axis; the patch where one tile is enough."""
    return tuple(o[1] - o[0] if len(o) > 1 else p for o, p in zip(plan.origins, plan.patch, strict=True))


def _overlap(plan: tiles.TilePlan) -> tuple[int, ...]:
    return tuple(p - s for p, s in zip(plan.patch, step_of(plan), strict=True))


def weight_of(plan: tiles.TilePlan, window: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(patch) weight of a tile's voxels."""
    wx, wy, wz = (torch.from_numpy(window_of(window, p)) for p in plan.patch)
    return (wx[:, None, None] * wy[:, None] * wz).to(dtype)


def cuts_of(plan: tiles.TilePlan) -> list[tuple[slice, ...]]:
    """Where each tile lies."""
    return [tuple(slice(o, o + p) for o, p in zip(origin, plan.patch, strict=True)) for origin in plan]


def reference(volume_XYZ: Tensor, plan: tiles.TilePlan, network: Network, batch: int, window: str) -> Tensor:
    """The definition, in float64 behind the network: sum of weighted tiles over sum of weights. No peer."""
    padded, cuts = tiles.pad(volume_XYZ, plan), cuts_of(plan)
    weight = weight_of(plan, window, torch.float64).to(padded.device)
    out, total = torch.zeros(()), torch.zeros(padded.shape, dtype=torch.float64, device=padded.device)
    for first in range(0, len(cuts), batch):
        chosen = cuts[first : first + batch]
        for cut, tile in zip(chosen, network(torch.stack([padded[cut][None] for cut in chosen])), strict=True):
            if not out.dim():
                out = total.new_zeros((tile.shape[0], *padded.shape))
            out[(slice(None), *cut)] += tile.double() * weight
            total[cut] += weight
    return (out / total)[(slice(None), *plan.crop)]


def plain_loop(volume_XYZ: Tensor, plan: tiles.TilePlan, network: Network, batch: int, window: str) -> Tensor:
    """What one would write: weighted tiles and their weights summed in float32, divided at the end."""
    padded, cuts = tiles.pad(volume_XYZ, plan), cuts_of(plan)
    weight = weight_of(plan, window).to(padded.device)
    out, total = None, torch.zeros_like(padded)
    for first in range(0, len(cuts), batch):
        chosen = cuts[first : first + batch]
        for cut, tile in zip(chosen, network(torch.stack([padded[cut][None] for cut in chosen])), strict=True):
            if out is None:
                out = padded.new_zeros((tile.shape[0], *padded.shape))
            out[(slice(None), *cut)] += tile * weight
            total[cut] += weight
    assert out is not None
    return (out / total)[(slice(None), *plan.crop)]


def monai(volume_XYZ: Tensor, plan: tiles.TilePlan, network: Network, batch: int, window: str) -> Tensor:
    """MONAI's ``sliding_window_inference``, everything on the volume's device."""
    return _monai(volume_XYZ, plan, network, batch, window, volume_XYZ.device)


def monai_cpu_sums(volume_XYZ: Tensor, plan: tiles.TilePlan, network: Network, batch: int, window: str) -> Tensor:
    """The same with volume and sums in host memory, tiles on the volume's device."""
    return _monai(volume_XYZ, plan, network, batch, window, torch.device("cpu"))


def _monai(
    volume_XYZ: Tensor, plan: tiles.TilePlan, network: Network, batch: int, window: str, sums: torch.device
) -> Tensor:
    from monai.inferers import sliding_window_inference

    padded = tiles.pad(volume_XYZ, plan)[None, None].to(sums)
    # Half a voxel more than the step: MONAI cuts patch * (1 - overlap) down to an integer.
    overlap = [max(0.0, 1 - (s + 0.5) / p) for s, p in zip(step_of(plan), plan.patch, strict=True)]
    # Its own Gaussian has another floor, so its map is given; the constant one it makes itself.
    given = {} if window == "constant" else {"roi_weight_map": weight_of(plan, window).to(volume_XYZ.device)}
    places = {"device": sums, "sw_device": volume_XYZ.device}
    out = sliding_window_inference(padded, plan.patch, batch, network, overlap=overlap, mode=window, **places, **given)
    assert isinstance(out, Tensor) and math.prod(out.shape[2:]) == padded.numel()
    return out[0][(slice(None), *plan.crop)]


def torchio(volume_XYZ: Tensor, plan: tiles.TilePlan, network: Network, batch: int, window: str) -> Tensor:
    """TorchIO's ``GridSampler``, loader and ``GridAggregator`` with averaging."""
    import torchio as tio

    padded = tiles.pad(volume_XYZ, plan)
    subject = tio.Subject(image=tio.ScalarImage(tensor=padded[None].cpu()))
    sampler = tio.GridSampler(subject, plan.patch, _overlap(plan))
    aggregator = tio.GridAggregator(sampler, overlap_mode="average")
    for some in tio.SubjectsLoader(sampler, batch_size=batch):
        out = network(some["image"][tio.DATA].to(padded.device))
        aggregator.add_batch(out, some[tio.LOCATION])
    return aggregator.get_output_tensor()[(slice(None), *plan.crop)]


def nnunet_style(volume_XYZ: Tensor, plan: tiles.TilePlan, network: Network, batch: int, window: str) -> Tensor:
    """nnU-Net's way: one tile at a time, the Gaussian scaled by 10, sums of tiles and of weights in half precision.

    Weights that half precision rounds to zero take the smallest one that is not.
    """
    padded = tiles.pad(volume_XYZ, plan)
    weight = (10 * weight_of(plan, window)).half().to(padded.device)
    weight[weight == 0] = weight[weight > 0].min()
    out, total = None, torch.zeros(padded.shape, dtype=torch.float16, device=padded.device)
    for cut in cuts_of(plan):
        tile = network(padded[cut][None, None])[0].half()
        if out is None:
            out = total.new_zeros((tile.shape[0], *padded.shape))
        out[(slice(None), *cut)] += tile * weight
        total[cut] += weight
    assert out is not None
    return torch.div(out, total, out=out)[(slice(None), *plan.crop)]


def original(volume_XYZ: Tensor, plan: tiles.TilePlan, network: Network, batch: int, window: str) -> Tensor:
    """SegSRGAN's way: patch by patch, one sum per output and one of the weights, NumPy arrays in float64."""
    padded = tiles.pad(volume_XYZ, plan)
    out, total = None, np.zeros(padded.shape)
    for cut in cuts_of(plan):
        tile = network(padded[cut][None, None])[0].cpu().numpy()
        if out is None:
            out = [np.zeros(padded.shape) for _ in tile]
        for one, channel in zip(out, tile, strict=True):
            one[cut] += channel
        total[cut] += 1
    assert out is not None
    return torch.from_numpy(np.stack([one / total for one in out]))[(slice(None), *plan.crop)]


PEERS: dict[str, Peer] = {
    "monai": Peer(monai, needs="monai"),
    "monai, sums on the CPU": Peer(monai_cpu_sums, ("constant",), needs="monai", gpu=True),
    "torchio": Peer(torchio, ("constant",), needs="torchio", even=True),
    "nnU-Net style": Peer(nnunet_style, ("gaussian",), HALF),
    "original": Peer(original, ("constant",)),
    "plain loop": Peer(plain_loop),
}
