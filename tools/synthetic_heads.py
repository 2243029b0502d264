"""Blocks of random head anatomy for training the shipped weights, made from the MNI152 maps of nilearn's wheel.

Each block is a smoothly deformed, rescaled piece of the template. The template is an average of 152 heads, so its edges
are soft and its contrast is one T1; a network trained on it alone learns little about a sharp scan. Tissue
probabilities are sharpened with random wiggles, given random intensities (T1-like, T2-like or arbitrary), and wrapped
in a procedural skull and scalp. Everything is keyed: block ``i`` of seed ``s`` is always the same array.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from fastsrgan.core.draws import rng
from fastsrgan.volume.resample import apply_axes, spline_matrix

# Cyclic world orders that processing_orientation produces: axial, sagittal, coronal (through-plane axis last).
ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1))


@dataclass(frozen=True)
class Block:
    """image, label: (n, n, n) float32 >= 0 and uint8 (grey matter); voxels are the unit, ``voxel_mm`` their size."""

    image: np.ndarray
    label: np.ndarray
    voxel_mm: float


@dataclass(frozen=True)
class Maps:
    """The template: (4, X, Y, Z) T1, grey, white in 0..1 and distance to the brain's surface in mm; block centres."""

    channels: torch.Tensor
    centres: np.ndarray


def load_maps() -> Maps:
    """Read the MNI152 maps out of nilearn's wheel."""
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise SystemExit("error: nilearn: not installed (pip install nilearn, its wheel carries the MNI152 maps)")
    folder = Path(spec.origin).parent / "datasets" / "data"
    maps = {}
    for name in ("t1", "gm", "wm"):
        raw = np.asanyarray(nib.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz").dataobj)
        maps[name] = np.pad(raw.astype(np.float32) / 255, 16)
    brain = ndimage.binary_fill_holes(ndimage.binary_opening(maps["t1"] > 0.15, iterations=2))
    outside = ndimage.distance_transform_edt(~brain) - ndimage.distance_transform_edt(brain)
    maps["distance"] = outside.astype(np.float32)
    centres = np.argwhere(ndimage.binary_dilation(brain, iterations=6)[::4, ::4, ::4]) * 4
    channels = np.stack([maps[k] for k in ("t1", "gm", "wm", "distance")])
    return Maps(torch.from_numpy(channels), centres)


def blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (n, n, n) as one small matrix per axis, edges renormalised."""
    d = np.subtract.outer(np.arange(x.shape[0]), np.arange(x.shape[0])) / sigma
    matrix = np.exp(-0.5 * d**2) * (np.abs(d) <= 4)
    return apply_axes(x, [matrix / matrix.sum(1, keepdims=True)] * 3)


def smooth_field(r: np.random.Generator, n: int, knot: float, sd: float) -> np.ndarray:
    """(n, n, n) Gaussian field of standard deviation about ``sd``, correlated over ``knot`` voxels."""
    m = int(np.ceil(n / knot)) + 3
    coarse = r.standard_normal((m, m, m)).astype(np.float32)
    fine = apply_axes(coarse, [spline_matrix(m, n, round(1 / knot, 4))] * 3)
    return fine * np.float32(sd / max(float(fine.std()), 1e-6))


def make_block(maps: Maps, seed: int, index: int, n: int = 96) -> Block:
    """Block ``index`` of ``seed``, edge ``n`` voxels."""
    r = rng(seed, "block", index)
    voxel = float(np.exp(r.uniform(np.log(0.5), np.log(1.25))))
    sampled = _sample(maps, r, n, voxel)
    gm, wm = np.clip(sampled["gm"], 0, 1), np.clip(sampled["wm"], 0, 1)
    inside = np.clip(0.5 - sampled["distance"], 0, 1)
    csf = np.clip(inside - gm - wm, 0, 1)
    tissue = _sharpen(r, np.stack([csf, gm, wm, 1 - inside]), n)
    image = _intensities(r, tissue, sampled, n)
    # Most scans are about as sharp as their voxels allow; interpolated scans and averages of many heads are not.
    sigma = r.uniform(0.25, 0.6) if r.random() < 0.65 else r.uniform(0.6, 1.8)
    image = blur(image, sigma)
    image *= np.exp(smooth_field(r, n, n / 2, r.uniform(0, 0.2)))
    image += r.uniform(0, 0.008) * r.standard_normal(image.shape, dtype=np.float32)
    return Block(np.maximum(image, 0).astype(np.float32), (tissue[1] > 0.5).astype(np.uint8), voxel)


def _sample(maps: Maps, r: np.random.Generator, n: int, voxel: float) -> dict[str, np.ndarray]:
    """The maps on a deformed grid of ``n``^3 voxels of ``voxel`` mm around a random point of the head."""
    centre = maps.centres[r.integers(len(maps.centres))] + r.uniform(-4, 4, 3)
    order = ORDERS[r.choice(3, p=(0.6, 0.2, 0.2))]
    flips = np.where(r.random(3) < (0.5, 0.15, 0.15), -1.0, 1.0)
    rotation = np.linalg.qr(np.eye(3) + 0.12 * r.standard_normal((3, 3)))
    matrix = rotation[0] * np.sign(np.diag(rotation[1])) @ np.diag(flips * np.exp(r.normal(0, 0.06, 3)))
    axes = np.arange(n, dtype=np.float32) - (n - 1) / 2
    grid = np.meshgrid(axes, axes, axes, indexing="ij")
    # Processed axis i runs along world axis order[i].
    world = [np.zeros((n, n, n), np.float32) for _ in range(3)]
    for i, w in enumerate(order):
        world[w] = grid[i] * np.float32(voxel)
    amount = r.uniform(1, 4)
    coordinates = []
    for d in range(3):
        c = sum(np.float32(matrix[d, e]) * world[e] for e in range(3)) + np.float32(centre[d])
        coordinates.append(c + smooth_field(r, n, 28 / voxel, amount) + smooth_field(r, n, 10 / voxel, 0.15 * amount))
    shape = np.asarray(maps.channels.shape[1:], np.float32)
    # grid_sample wants (x, y, z) of the last, middle, first axis in [-1, 1].
    unit = [torch.from_numpy(c * np.float32(2 / (size - 1)) - 1) for c, size in zip(coordinates, shape, strict=True)]
    where = torch.stack(unit[::-1], dim=-1)[None]
    values = F.grid_sample(maps.channels[None], where, padding_mode="border", align_corners=True)[0].numpy()
    return dict(zip(("t1", "gm", "wm", "distance"), values, strict=True))


def _sharpen(r: np.random.Generator, p: np.ndarray, n: int) -> np.ndarray:
    """(4, n, n, n) tissue fractions with edges as steep as a real scan's, wiggling over one to three voxels."""
    temperature, amount = r.uniform(0.15, 0.8), r.uniform(0, 1.0)
    logits = np.log(np.clip(p, 1e-3, 1)) / temperature
    for c in range(3):
        wiggle = blur(r.standard_normal((n, n, n), dtype=np.float32), r.uniform(0.8, 2.0))
        logits[c] += wiggle * np.float32(amount * r.uniform(4, 14))
    logits -= logits.max(0)
    e = np.exp(logits)
    return e / e.sum(0)


def _intensities(r: np.random.Generator, tissue: np.ndarray, sampled: dict[str, np.ndarray], n: int) -> np.ndarray:
    """(n, n, n) image of the tissues: a T1-like, T2-like or arbitrary contrast, texture, skull and scalp."""
    kind = r.choice(3, p=(0.6, 0.2, 0.2))
    if kind == 0:
        levels = np.sort(r.uniform((0.05, 0.4, 0.7), (0.35, 0.65, 1.0)))
    elif kind == 1:
        levels = np.array([r.uniform(0.75, 1), r.uniform(0.45, 0.7), r.uniform(0.2, 0.45)])
    else:
        levels = r.uniform(0.05, 1, 3)
    image = sum(np.float32(level) * t for level, t in zip(levels, tissue[:3], strict=True))
    if kind == 0 and r.random() < 0.5:  # the template's own deep grey matter and cerebellum, made crisper
        t1 = np.clip(sampled["t1"], 0, 1)
        crisp = t1 + r.uniform(0.5, 2.5) * (t1 - blur(t1, 1.5))
        image = image + r.uniform(0.3, 1) * (np.clip(crisp, 0, 1.2) * (1 - tissue[3]) - image)
    texture = blur(r.standard_normal((n, n, n), dtype=np.float32), r.uniform(0.6, 1.5))
    image = image + texture * np.float32(r.uniform(0, 0.12)) * (1 - tissue[3])
    if r.random() < 0.75:
        image = image + tissue[3] * _shell(r, sampled["distance"], n)
    return image.astype(np.float32)


def _shell(r: np.random.Generator, distance: np.ndarray, n: int) -> np.ndarray:
    """Fluid, skull, marrow, muscle and fat as functions of a perturbed distance from the brain; air beyond."""
    d = distance + smooth_field(r, n, 9, r.uniform(0.3, 1.5))
    edges = np.cumsum(r.uniform((0.5, 1, 0.5, 1, 1.5, 2), (4, 3, 3, 3, 5, 6)))
    levels = np.concatenate(
        [
            [r.uniform(0.05, 0.9)],
            [0.04],
            [r.uniform(0.1, 0.9)],
            [0.05],
            [r.uniform(0.2, 0.7)],
            [r.uniform(0.4, 1.3)],
            [0.01],
        ]
    )
    sharpness = r.uniform(0.3, 0.8)
    image = np.full(d.shape, levels[0], np.float32)
    for edge, before, after in zip(edges, levels[:-1], levels[1:], strict=True):
        image += np.float32(after - before) / (1 + np.exp(np.clip((edge - d) / sharpness, -30, 30)))
    lumps = np.float32(1) + smooth_field(r, n, 4, r.uniform(0, 0.35)) * (d < edges[-1])
    return image * lumps
