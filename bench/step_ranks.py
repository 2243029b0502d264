"""Weak scaling of the training iteration: the same batch per rank on one and on several ranks (``--ranks N``).

Every rank is a process with the same number of threads (CPU, gloo) or a GPU of its own (NCCL). The gate: after the
updates all ranks hold the same weights to the bit. Rank processes run ``python -m bench.step_ranks``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.common import ROOT, synchronise


@dataclass(frozen=True)
class Scaling:
    """One row; its peer is a single rank with the same batch and threads."""

    name: str
    facts: dict[str, Any]
    args: argparse.Namespace

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """Seconds per iteration on one rank and on all, one after the other."""
        found = {world: self.launch(world) for world in (1, args.ranks)}
        alone, all_ranks = (found[world][0]["seconds"] for world in (1, args.ranks))
        same = len({row["weights"] for row in found[args.ranks]}) == 1
        row: dict[str, Any] = {"name": self.name, **self.facts, "tolerance": 0.0, "max_error": float(not same)}
        row |= {"passed": same, "peers": {"one rank": {"max_error": 0.0}}}
        if not same:
            return row
        row |= spread(all_ranks)
        row["peers"]["one rank"] |= spread(alone)
        row["weak_scaling_efficiency"] = statistics.median(alone) / statistics.median(all_ranks)
        row["patches_per_second"] = args.ranks * self.facts["batch"] / row["seconds_median"]
        ratios = [a / b for a, b in zip(alone, all_ranks, strict=True)]
        row["ratio_to"] = {"one rank": row["weak_scaling_efficiency"]}
        row["ratio_range"] = {"one rank": [min(ratios), max(ratios)]}
        return row

    def lines(self, row: Mapping[str, Any]) -> Sequence[str]:
        """The efficiency, and what it would be at best."""
        if "weak_scaling_efficiency" not in row:
            return []
        speed = row["ranks"] * row["weak_scaling_efficiency"]
        return [f"weak scaling efficiency {row['weak_scaling_efficiency']:.0%}: {speed:.2f} x the patches of one rank"]

    def launch(self, world: int) -> list[dict[str, Any]]:
        """What every rank printed."""
        threads = max(1, self.args.threads // self.args.ranks)
        options = {**self.facts, "threads": threads, "repeats": self.args.repeats, "device": self.args.device}
        said = on_ranks([sys.executable, "-m", "bench.step_ranks", json.dumps(options)], world, threads)
        return [json.loads(out.splitlines()[-1]) for out in said]


def on_ranks(command: Sequence[str], world: int, threads: int) -> list[str]:
    """Run a command as the ranks of one machine: what each printed. Raises RuntimeError with the first rank's error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    done = [rank.communicate() for rank in ranks]
    for rank, (_, told) in zip(ranks, done, strict=True):
        if rank.returncode:
            raise RuntimeError(f"{' '.join(command)}: {told.strip()[-2000:]}")
    return [out for out, _ in done]


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """As bench.common.spread, of wall clocks alone."""
    return {
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "repeats": len(seconds),
    }


def main(options: dict[str, Any]) -> dict[str, Any]:
    """One rank: iterations on patches of its own, and a hash of the weights after them."""
    import hashlib

    import torch

    from bench.step_pool import EPOCH, pool
    from fastsrgan.config import TrainConfig
    from fastsrgan.core.draws import rng
    from fastsrgan.core.ranks import from_environment, local_device
    from fastsrgan.core.system import tune_allocator
    from fastsrgan.train.gan import Models

    torch.set_num_threads(options["threads"])
    tune_allocator()
    device = torch.device(local_device(options["device"]))
    config = TrainConfig(
        new_low_res=((1.0, 1.0, 3.0),),
        kernel_gen=options["kernel"],
        kernel_dis=options["kernel_dis"],
        batch_size=options["batch"],
        patch_size=options["patch"],
        critic_iterations=options["critic_updates"],
    )
    with from_environment(device) as ranks:
        models = Models(config, 0, device, ranks)
        patches = pool(config.patch_size, config.batch_size, str(device))
        seconds = []
        for step in range(options["repeats"] + 1):
            ranks.barrier()
            began = time.perf_counter()
            drawn = list(patches.critic_indices(ranks.rank + 100 * step, config.batch_size, config.critic_iterations))
            batches = [patches.gather(i) for i in drawn]
            eps = [
                torch.from_numpy(rng(EPOCH, ranks.rank, step, i).random(b.y.shape[:2], dtype="float32")).to(device)
                for i, b in enumerate(batches)
            ]
            models.critic_updates(batches, eps)
            models.generator_update(batches[0], adversarial=True)
            synchronise(str(device))
            ranks.barrier()
            seconds.append(time.perf_counter() - began)
    digest = hashlib.sha256()
    for network in (models.generator, models.critic):
        for parameter in network.parameters():
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return {"seconds": seconds[1:], "weights": digest.hexdigest()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
