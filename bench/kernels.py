"""Each device operation against the copy ceiling: bytes that it must move, over those that a plain copy moves."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.common import Case, Sides, texture
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.data.subject import patch_origins
from fastsrgan.infer import stitch, tiles
from fastsrgan.volume import resample

FACTOR = 3
CHANNELS = 2  # SR and segmentation
CEILING = "copy of the same bytes"
TOLERANCE = 1e-5  # of the largest value; found: 3.9e-7 (results/epyc-zen3-2cores/kernels.json)


def cases(args: argparse.Namespace) -> list[Case]:
    """Overlap-add, tile gather, patch gather, degradation products: kernels on CUDA devices, torch on CPUs."""
    shape = tuple(args.shape)
    plan = tiles.plan(shape, args.patch, args.step)
    tile, volume = int(np.prod(plan.patch)), int(np.prod(plan.padded_shape))
    patches = args.batch[0]
    low = -(-shape[2] // FACTOR)
    work: dict[str, tuple[Callable[[argparse.Namespace], Sides], int]] = {
        "overlap_add": (_overlap_add, CHANNELS * 4 * (len(plan) * tile + volume)),
        "gather_tiles": (_gather_tiles, 4 * (volume + len(plan) * tile)),
        # Read: two float32 images and a uint8 label; written: three float32 channels.
        "gather_patches": (_gather_patches, patches * args.patch**3 * (4 + 4 + 1 + 12)),
        "degradation products": (_products, 4 * (2 * int(np.prod(shape)) + 2 * shape[0] * shape[1] * low)),
    }
    found = []
    for name, (build, size) in work.items():
        facts = {"shape": list(shape), "patch": args.patch, "step": args.step, "bytes": size}
        if name == "gather_patches":
            facts["batch"] = patches
        found.append(
            Case(name, facts, functools.partial(_with_ceiling, build, size, args), TOLERANCE, ("bytes", float(size)))
        )
    return found


def _with_ceiling(build: Callable[[argparse.Namespace], Sides], size: int, args: argparse.Namespace) -> Sides:
    """``fastsrgan`` and a copy that moves ``size`` bytes, half of them read, half written.

    The copy hands back what the operation has to give, so the gate holds for it too.
    """
    sides = dict(build(args))
    truth = sides.pop("reference")()
    source = torch.zeros(size // 8, dtype=torch.float32, device=args.device)
    target = torch.empty_like(source)

    def copy() -> Sequence[Any]:
        target.copy_(source)
        return truth

    return {**sides, CEILING: copy}


def _volume(args: argparse.Namespace) -> Tensor:
    return torch.from_numpy(texture(args.shape)).to(args.device)


def _overlap_add(args: argparse.Namespace) -> Sides:
    volume = _volume(args)
    plan = tiles.plan(tuple(args.shape), args.patch, args.step)
    padded = tiles.pad(volume, plan)
    some = tiles.gather(padded, plan, range(len(plan))).expand(-1, CHANNELS, -1, -1, -1).contiguous()
    # Tiles cut from a volume have that volume as their mean.
    truth = padded.expand(CHANNELS, *padded.shape)
    return {"fastsrgan": lambda: [stitch.overlap_add(some, plan)], "reference": lambda: [truth]}


def _gather_tiles(args: argparse.Namespace) -> Sides:
    plan = tiles.plan(tuple(args.shape), args.patch, args.step)
    padded = tiles.pad(_volume(args), plan)
    out = torch.empty((len(plan), 1, *plan.patch), device=args.device)
    windows = [
        padded[tuple(slice(o, o + p) for o, p in zip(origin, plan.patch, strict=True))].clone() for origin in plan
    ]
    return {
        "fastsrgan": lambda: [tiles.gather(padded, plan, range(len(plan)), out)],
        "reference": lambda: [torch.stack(windows)[:, None]],
    }


def _gather_patches(args: argparse.Namespace) -> Sides:
    hr = _volume(args)
    z, label = hr.roll(1, 2), (hr > 0.5).to(torch.uint8)
    origins = patch_origins(tuple(hr.shape), args.patch, 20, tuple((0, n) for n in hr.shape))
    pool = Pool([Resident("texture", z, hr, label, None, float(FACTOR), origins)], args.patch)
    indices = pool.order()[np.arange(args.batch[0]) % len(pool)]
    cuts = [tuple(slice(int(o), int(o) + args.patch) for o in pool.table[i, 1:]) for i in indices]

    def ours() -> list[Tensor]:
        done = pool.gather(indices)
        return [done.x, done.y]

    def plain() -> list[Tensor]:
        pairs = [torch.stack([hr[cut], label[cut].float()]) for cut in cuts]
        return [torch.stack([z[cut][None] for cut in cuts]), torch.stack(pairs)]

    return {"fastsrgan": ours, "reference": plain}


def _products(args: argparse.Namespace) -> Sides:
    """Blur, decimation and spline interpolation along one axis, as the matrix products of decision 001 (NumPy)."""
    hr = texture(args.shape)
    n = hr.shape[2]
    down = resample.degrade_matrix(n, 1.0, float(FACTOR), "physical")
    assert down is not None
    up = resample.upsample_matrix(down.shape[0], n, 1 / FACTOR, "physical")

    def ours() -> list[np.ndarray]:
        return [resample.apply_axes(resample.apply_axes(hr, [None, None, down]), [None, None, up])]

    def plain() -> list[np.ndarray]:
        both = np.asarray(_dense(up) @ _dense(down))
        return [np.einsum("xyz,wz->xyw", hr.astype(np.float64), both)]

    return {"fastsrgan": ours, "reference": plain}


def _dense(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, np.float64)
