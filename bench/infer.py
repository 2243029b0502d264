"""Dense inference: stitching alone with an identity network, and a whole inference, beside MONAI and a plain loop."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import naive
from bench.common import TRUTH, Case, Sides, texture
from fastsrgan import tiles
from fastsrgan.infer import infer_volume
from fastsrgan.networks import GeneratorSpec, build_generator
from fastsrgan.stitch import WINDOWS, Stitcher

TOLERANCE = 1e-5
STITCH_SHAPE, WHOLE_SHAPE = (197, 233, 189), (128, 128, 128)

Network = Callable[[Tensor], Tensor]


def cases(args: argparse.Namespace) -> list[Case]:
    """Stitching with every window; whole inference for every kernel. MONAI where it is installed."""
    missing = {} if importlib.util.find_spec("monai") else {"monai": "pip install monai"}
    found = []
    shape = tuple(args.shape or STITCH_SHAPE)
    batch = args.batch[0]
    for window in WINDOWS:
        facts = _facts(shape, args, window)
        sides = _stitch_sides(shape, args, window, not missing)
        title = f"stitching alone, {window}, {_times(shape)}, patch {args.patch} step {args.step}"
        found.append(Case(title, facts, sides, TOLERANCE, ("tiles", float(facts["tiles"])), missing))
    shape = tuple(args.shape or WHOLE_SHAPE)
    for kernel in args.kernel:
        facts = {"kernel": kernel, **_facts(shape, args, "constant"), "batch": batch}
        sides = _whole_sides(shape, kernel, args, not missing)
        title = f"whole inference, k {kernel}, {_times(shape)}, patch {args.patch} step {args.step}"
        found.append(Case(title, facts, sides, TOLERANCE, ("tiles", float(facts["tiles"])), missing))
    return found


def _facts(shape: tuple[int, ...], args: argparse.Namespace, window: str) -> dict[str, Any]:
    count = len(tiles.plan(shape, args.patch, args.step))
    return {"shape": list(shape), "patch": args.patch, "step": args.step, "window": window, "tiles": count}


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _stitch_sides(shape: tuple[int, ...], args: argparse.Namespace, window: str, monai: bool) -> Callable[[], Sides]:
    """Tiles out of a volume, unchanged, and together again; the result has to be the volume."""

    def build() -> Sides:
        volume = torch.from_numpy(texture(shape)).to(args.device)
        plan = tiles.plan(shape, args.patch, args.step)
        batch = args.batch[0]

        def ours() -> list[Tensor]:
            padded = tiles.pad(volume, plan)
            stitcher = Stitcher(plan, 1, window, args.device)
            for first in range(0, len(plan), batch):
                stitcher.add(tiles.gather(padded, plan, range(first, min(first + batch, len(plan)))))
            return [stitcher.result()[(slice(None), *plan.crop)]]

        def identity(x: Tensor) -> Tensor:
            return x

        sides: dict[str, Callable[[], list[Tensor]]] = {"fastsrgan": ours}
        sides["plain loop"] = lambda: [plain_loop(volume, plan, identity, batch, window)]
        if monai:
            sides["monai"] = lambda: [monai_windows(volume, plan, args.step, identity, batch, window)]
        return sides | {TRUTH: lambda: [volume[None]]}

    return build


def _whole_sides(shape: tuple[int, ...], kernel: int, args: argparse.Namespace, monai: bool) -> Callable[[], Sides]:
    """An image as it was loaded -> SR in its range and probabilities: the same tiles through the same network.

    "naive network" is the plain loop around the paper's network in stock modules: what one would write without us.
    """

    def build() -> Sides:
        image = texture(shape) * np.float32(812)
        plan = tiles.plan(shape, args.patch, args.step)
        batch = args.batch[0]
        generator = build_generator(GeneratorSpec(kernel=kernel)).eval().to(args.device)
        plain = naive.NaiveGenerator(kernel).eval().to(args.device)
        naive.copy(plain.paired(generator))

        def ours() -> list[np.ndarray]:
            done = infer_volume(
                image,
                np.eye(4),
                generator,
                patch=args.patch,
                step=args.step,
                device=args.device,
                batch=batch,
                precision="fp32",
            )
            return [done.sr, done.prob]

        def around(windows: Callable[[Tensor], Tensor]) -> list[np.ndarray]:
            scale, floor = image.max(), image.min()
            with torch.inference_mode():
                out = windows(torch.from_numpy(image / scale).to(args.device)).cpu().numpy()
            return [np.maximum(out[0] * scale, floor), out[1:]]

        sides: dict[str, Callable[[], list[np.ndarray]]] = {"fastsrgan": ours}
        sides["plain loop"] = lambda: around(lambda v: plain_loop(v, plan, generator, batch))
        sides["plain loop, naive network"] = lambda: around(lambda v: plain_loop(v, plan, plain, batch))
        if monai:
            sides["monai"] = lambda: around(lambda v: monai_windows(v, plan, args.step, generator, batch))
        return sides

    return build


# --- peers --------------------------------------------------------------------------------------------------------


def plain_loop(
    volume_XYZ: Tensor, plan: tiles.TilePlan, network: Network, batch: int, window: str = "constant"
) -> Tensor:
    """Accumulate windowed tiles and their weights, divide at the end: (C, X, Y, Z)."""
    padded = tiles.pad(volume_XYZ, plan)
    wx, wy, wz = (torch.from_numpy(WINDOWS[window](p)).float().to(padded.device) for p in plan.patch)
    weight = wx[:, None, None] * wy[:, None] * wz
    cuts = [tuple(slice(o, o + p) for o, p in zip(origin, plan.patch, strict=True)) for origin in plan]
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


def monai_windows(
    volume_XYZ: Tensor, plan: tiles.TilePlan, step: int, network: Network, batch: int, window: str = "constant"
) -> Tensor:
    """MONAI's sliding window over the same tiles: (C, X, Y, Z)."""
    from monai.inferers import sliding_window_inference

    padded = tiles.pad(volume_XYZ, plan)[None, None]
    # Half a voxel more than the step: MONAI cuts patch * (1 - overlap) down to an integer.
    overlap = [max(0.0, 1 - (step + 0.5) / p) for p in plan.patch]
    out = sliding_window_inference(padded, plan.patch, batch, network, overlap=overlap, mode=window)
    assert isinstance(out, Tensor) and math.prod(out.shape[2:]) == padded.numel()
    return out[0][(slice(None), *plan.crop)]
