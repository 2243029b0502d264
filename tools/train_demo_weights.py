"""Train segsrgan-k8-synthetic-heads of fastsrgan/models/ (kernel_gen 8), from nothing but nilearn's MNI152 maps.

    python tools/train_demo_weights.py -o RUN --minutes 90
    python tools/train_demo_weights.py -o RUN --resume              # after an interruption
    python tools/train_demo_weights.py -o RUN --score head.nii.gz   # follow the gain over spline on a head of your own

Recipe (docs/decisions/003): random anatomy blocks (synthetic_heads.py), degraded afresh for every draw with the
physical operators: through-plane ratio 1.5 to 6.5 (its logarithm is uniform), sometimes in-plane too, contrast power
0.5 to 1.5, noise up to 3 %; Charbonnier(SR) in units of each patch's Charbonnier(spline), so that thin slices, which
miss little, count as much as thick ones, + soft Dice + Charbonnier(segmentation); SR head starts at zero, so training
starts at the spline;
Adam with warm-up and cosine decay, the head in white coordinates (whitened_head.py); EMA weights are kept.
No adversarial term.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import save_file
from synthetic_heads import Block, load_maps, make_block
from whitened_head import WhitenedHead

from fastsrgan.core.draws import rng
from fastsrgan.core.system import provenance, tune_allocator
from fastsrgan.losses import charbonnier, soft_dice
from fastsrgan.model.networks import Generator, GeneratorSpec
from fastsrgan.model.weights import load_generator
from fastsrgan.observation.model import degrade

BLOCK, POOL = 96, 24
SHAPES = ((4, 48), (2, 64), (1, 80))  # (batch, patch edge): tiles of several sizes, since instance norm sees the tile
SHAPE_ODDS = (0.5, 0.35, 0.15)
HEAD_RATES = (4e-4, 1e-3)  # SR, segmentation; in white coordinates
RATIOS = (1.5, 6.5)
LEAST = 0.002  # added to the spline's error: a patch that misses nothing must not outweigh the others
MEASURE_EVERY = 500
TYPICAL_GRADIENT = 0.04  # in-plane, of a head whose maximum is 1: what a head without scale was trained for


class Pool:
    """Blocks resident in memory; one is degraded anew at every draw, one replaced every few."""

    def __init__(self, maps, seed: int, start: int = 0) -> None:
        self.maps, self.seed, self.made = maps, seed, start
        self.blocks: list[Block] = []
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for _ in range(POOL):
            self.add()

    def add(self) -> None:
        """A new block at the end, the oldest leaves."""
        self.blocks.append(make_block(self.maps, self.seed, self.made, BLOCK))
        self.pairs.append(self.degraded(self.blocks[-1], self.made, 0))
        self.made += 1
        if len(self.blocks) > POOL:
            del self.blocks[0], self.pairs[0]

    def degraded(self, block: Block, index: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """(input, truth) of a block, both (n, n, n), with parameters keyed by (index, turn)."""
        r = rng(self.seed, "degrade", index, turn)
        through = math.exp(r.uniform(*np.log(RATIOS))) if r.random() < 0.97 else 1.0
        within = r.uniform(1, min(2, through)) if r.random() < 0.2 else 1.0
        noise = 0.0 if r.random() < 0.35 else r.uniform(0, 0.03)
        out = degrade(
            block.image,
            (1.0, 1.0, 1.0),
            (within, within, through),
            power=r.uniform(0.5, 1.5),
            noise=noise,
            key=(self.seed, "noise", index, turn),
        )
        gain = np.float32(1.0 if r.random() < 0.4 else r.uniform(0.4, 1.0))  # brighter voxels elsewhere in the head
        return out.interpolated * gain, out.hr * gain

    def draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch: input (B, 1, P, P, P) and target (B, 2, P, P, P)."""
        r = rng(self.seed, "draw", step)
        if step % 6 == 5:
            self.add()
        which = int(r.integers(len(self.blocks)))
        self.pairs[which] = self.degraded(self.blocks[which], which, step + 1)
        batch, edge = SHAPES[r.choice(len(SHAPES), p=SHAPE_ODDS)]
        x = torch.empty(batch, 1, edge, edge, edge)
        y = torch.empty(batch, 2, edge, edge, edge)
        filled = 0
        while filled < batch:
            b = int(r.integers(len(self.blocks)))
            cut = tuple(slice(o, o + edge) for o in r.integers(4, BLOCK - 4 - edge + 1, 3))
            if self.pairs[b][1][cut].mean() < 0.08:
                continue
            x[filled, 0] = torch.from_numpy(self.pairs[b][0][cut])
            y[filled, 0] = torch.from_numpy(self.pairs[b][1][cut])
            y[filled, 1] = torch.from_numpy(self.blocks[b].label[cut])
            filled += 1
        return x, y


@torch.inference_mode()
def score(generator: Generator, path: str, ratio: float, noise: float = 0.0, tile: int = 64, step: int = 32) -> dict:
    """PSNR in dB of spline and SR against a head, on the central 128^3 or so, tiles averaged as in use."""
    image = np.asanyarray(nib.load(path).dataobj).astype(np.float32)
    cut = tuple(slice(max(0, (n - 128) // 2), max(0, (n - 128) // 2) + min(n, 128)) for n in image.shape)
    d = degrade(image[cut], (1.0, 1.0, 1.0), (1.0, 1.0, ratio), noise=noise, key="score")
    total, weight = np.zeros_like(d.hr), np.zeros_like(d.hr)
    starts = [sorted({*range(0, n - tile, step), n - tile}) for n in d.hr.shape]
    for i in starts[0]:
        for j in starts[1]:
            for k in starts[2]:
                cut = (slice(i, i + tile), slice(j, j + tile), slice(k, k + tile))
                out = generator(torch.from_numpy(np.ascontiguousarray(d.interpolated[cut]))[None, None])
                total[cut] += out[0, 0].numpy()
                weight[cut] += 1
    sr = total / weight
    head = d.hr > 0.1 * d.hr.max()

    def psnr(x: np.ndarray) -> float:
        return float(20 * math.log10(d.hr.max()) - 10 * math.log10(((x - d.hr)[head] ** 2).mean()))

    return {"spline": round(psnr(d.interpolated), 3), "gain": round(psnr(sr) - psnr(d.interpolated), 3)}


def relative(sr: torch.Tensor, spline: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Charbonnier of a patch in units of the spline's."""
    return charbonnier(sr, truth) / (charbonnier(spline, truth) + LEAST)


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-o", "--out", type=Path, required=True, help="run folder")
    p.add_argument("--kernel", type=int, default=8)
    p.add_argument("--minutes", type=float, default=90, help="length of the schedule")
    p.add_argument(
        "--iterations", type=int, help="length of the schedule in iterations instead: reproducible to the bit"
    )
    p.add_argument("--lr", type=float, default=5e-4, help="of all layers but the head")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--init", type=Path, help="start from these weights; a head without scale gets one")
    p.add_argument("--resume", action="store_true")
    p.add_argument(
        "--score", action="append", default=[], metavar="IMAGE", help="log the gain on this head (not trained on)"
    )
    p.add_argument("--score-every", type=float, default=12, metavar="MINUTES")
    return p.parse_args()


class Trainer:
    """Generator, EMA copy, Adam and the schedule; everything a resumed run needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        spec = GeneratorSpec(kernel=args.kernel, scaled=True)
        self.generator = Generator(spec, seed=args.seed)
        with torch.no_grad():
            self.generator.head[0].zero_()
            if args.init:
                first = load_generator(args.init)
                self.generator.load_state_dict(first.state_dict())
                if not first.spec.scaled:
                    self.generator.head[0] /= TYPICAL_GRADIENT
        self.ema = Generator(spec)
        self.ema.load_state_dict(self.generator.state_dict())
        self.trunk = [p for name, p in self.generator.named_parameters() if name != "head"]
        self.adam = torch.optim.Adam(self.trunk, args.lr, betas=(0.9, 0.999), fused=True)
        self.head = WhitenedHead(self.generator, HEAD_RATES, args.seed)
        self.step, self.seconds = 0, 0.0

    def progress(self) -> float:
        """Fraction of the schedule that is done."""
        if self.args.iterations:
            return self.step / self.args.iterations
        return self.seconds / (60 * self.args.minutes)

    def update(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        """One step; returns the losses."""
        if self.step % MEASURE_EVERY == 0:
            self.head.measure(x)
        rate = min(1, (self.step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1, self.progress())))
        for group in self.adam.param_groups:
            group["lr"] = self.args.lr * rate
        out = self.generator(x)
        sr = torch.stack([relative(*patch) for patch in zip(out[:, :1], x, y[:, :1], strict=True)]).mean()
        dice = soft_dice(out[:, 1:], y[:, 1:])
        loss = sr + dice + charbonnier(out[:, 1:], y[:, 1:])
        self.generator.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trunk, 5.0)
        if not torch.isfinite(norm):
            return {"skipped": 1.0}
        self.adam.step()
        self.head.update(rate)
        decay = min(0.998, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for e, p in zip(self.ema.parameters(), self.generator.parameters(), strict=True):
                e.lerp_(p, 1 - decay)
        self.step += 1
        return {
            "loss": loss.item(),
            "sr": sr.item(),
            "dice": 1 - dice.item(),
            "rate": rate,
            "norm": norm.item(),
        }

    def save(self) -> None:
        """EMA weights for use and the whole state for --resume, each renamed into place."""
        folder = self.args.out
        meta = {
            "format": 1,
            "generator": self.generator.spec.to_dict(),
            "critic": None,
            "card": {"step": self.step, "minutes": round(self.seconds / 60, 1), "seed": self.args.seed, **provenance()},
        }
        tensors = {f"generator.{k}": v.contiguous() for k, v in self.ema.state_dict().items()}
        save_file(tensors, folder / "ema.tmp", metadata={"fastsrgan": json.dumps(meta)})
        (folder / "ema.tmp").rename(folder / "ema.safetensors")
        state = {"generator": self.generator.state_dict(), "ema": self.ema.state_dict(), "adam": self.adam.state_dict()}
        state["head"] = self.head.state()
        torch.save({**state, "step": self.step, "seconds": self.seconds}, folder / "state.tmp")
        (folder / "state.tmp").rename(folder / "state.pt")

    def load(self) -> None:
        """Continue from the state in the run folder."""
        state = torch.load(self.args.out / "state.pt", weights_only=True)
        self.generator.load_state_dict(state["generator"])
        self.ema.load_state_dict(state["ema"])
        self.adam.load_state_dict(state["adam"])
        self.head.load(state["head"])
        self.step, self.seconds = state["step"], state["seconds"]


def main() -> None:
    """Train until the schedule ends."""
    args = parse()
    tune_allocator()
    torch.set_flush_denormal(True)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    if args.resume:
        trainer.load()
    pool = Pool(load_maps(), args.seed, start=trainer.step // 6)
    log = open(args.out / "log.jsonl", "a", encoding="utf8")  # noqa: SIM115  (lives as long as the process)
    print(f"{trainer.generator.spec}, {sum(p.numel() for p in trainer.generator.parameters())} parameters", flush=True)
    mean: dict[str, float] = {}
    scored = trainer.seconds
    while trainer.progress() < 1:
        began = time.perf_counter()
        facts = trainer.update(*pool.draw(trainer.step))
        trainer.seconds += time.perf_counter() - began
        for k, v in facts.items():
            mean[k] = v if k not in mean else 0.98 * mean[k] + 0.02 * v
        if trainer.step % 25 == 0:
            row = {
                "step": trainer.step,
                "minutes": round(trainer.seconds / 60, 2),
                **{k: float(f"{v:.4g}") for k, v in mean.items()},
            }
            log.write(json.dumps(row) + "\n")
            log.flush()
            if trainer.step % 100 == 0:
                print(row, flush=True)
        if trainer.step % 250 == 0:
            trainer.save()
        if args.score and trainer.seconds - scored > 60 * args.score_every:
            scored = trainer.seconds
            report(trainer, log)
    trainer.save()
    report(trainer, log)


def report(trainer: Trainer, log) -> None:
    """Gain over spline on the heads that were named, for the log; nothing is chosen by it."""
    for path in trainer.args.score:
        for ratio in (2, 3, 6):
            row = {"step": trainer.step, "head": Path(path).name, "ratio": ratio, **score(trainer.ema, path, ratio)}
            log.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
