"""Mean of two generators' weights, its share chosen on synthetic blocks that no training saw.

    python tools/mix_weights.py FIRST.safetensors RUN -o MIXED      # a run folder for tools/publish_weights.py

A run that started from FIRST and was trained with another emphasis lies near it, and the networks between the two trade
one emphasis for the other. Of the shares 0, 1/4, ..., 1 of RUN the one is taken that gains most PSNR over the spline,
averaged over slice ratios, among those by which no block loses at any ratio (or else loses least).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from synthetic_heads import load_maps, make_block

from fastsrgan.core.files import write_json
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model.networks import Generator
from fastsrgan.model.weights import load_generator
from fastsrgan.observation.model import degrade

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
RATIOS = (2.0, 3.0, 4.5, 6.0)
SEED, BLOCKS, EDGE, MARGIN = 777, 8, 96, 8
NOISE = (0.0, 0.01, 0.02)
NO_LOSS = 0.0  # dB


@torch.inference_mode()
def gains(generator: Generator) -> dict[str, list[float]]:
    """ratio -> PSNR over the spline's in dB, inside the head, block by block."""
    maps, found = load_maps(), {}
    blocks = [make_block(maps, SEED, i, EDGE).image for i in range(BLOCKS)]
    for ratio in RATIOS:
        found[f"{ratio:g}"] = [gain(generator, block, ratio, i) for i, block in enumerate(blocks)]
    return found


def gain(generator: Generator, block: np.ndarray, ratio: float, index: int) -> float:
    """One block's gain, in one pass."""
    done = degrade(block, (1.0, 1.0, 1.0), (1.0, 1.0, ratio), noise=NOISE[index % len(NOISE)], key=(5, index))
    cut = (slice(MARGIN, EDGE - MARGIN),) * 3
    spline, truth = np.ascontiguousarray(done.interpolated[cut]), done.hr[cut]
    sr = generator(torch.from_numpy(spline)[None, None])[0, 0].numpy()
    inside = truth > 0.1 * truth.max()
    return float(10 * np.log10(((spline - truth)[inside] ** 2).mean() / ((sr - truth)[inside] ** 2).mean()))


def main() -> None:
    """Score every share, keep one."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("first", type=Path)
    p.add_argument("run", type=Path, help="folder of train_demo_weights.py")
    p.add_argument("-o", "--out", type=Path, required=True)
    args = p.parse_args()
    header = modelfile.read_header(args.run / "ema.safetensors")
    a, b = (load_generator(path).state_dict() for path in (args.first, args.run / "ema.safetensors"))
    mixed = load_generator(args.first).eval()
    rows = []
    for share in SHARES:
        mixed.load_state_dict({k: (1 - share) * a[k] + share * b[k] for k in a})
        found = gains(mixed)
        mean = float(np.mean([np.mean(g) for g in found.values()]))
        rows.append(
            {"share": share, "mean_gain_db": mean, "least_gain_db": min(map(min, found.values())), "all": found}
        )
        told = {ratio: round(float(np.mean(g)), 3) for ratio, g in found.items()}
        print(f"{share:.2f}: mean {mean:.3f}, least {rows[-1]['least_gain_db']:.3f}, {told}", flush=True)
    fine = [r for r in rows if r["least_gain_db"] > NO_LOSS]
    best = max(fine, key=lambda r: r["mean_gain_db"]) if fine else max(rows, key=lambda r: r["least_gain_db"])
    share = best["share"]
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {f"generator.{k}": ((1 - share) * a[k] + share * b[k]).contiguous() for k in a}
    card = {**header.card, "share": share}
    meta = {"format": 1, "generator": mixed.spec.to_dict(), "critic": None, "card": card}
    save_file(tensors, args.out / "ema.safetensors", metadata={"fastsrgan": json.dumps(meta)})
    write_json(args.out / "mix.json", {"first": args.first.name, "chosen": share, "rows": rows})
    print(f"share {share:g} of {args.run}")


if __name__ == "__main__":
    main()
