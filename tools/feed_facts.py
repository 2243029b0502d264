"""What docs/decisions/012-dali-feed.md and docs/data-engine.md say about the feed, measured on this machine.

    python tools/feed_facts.py                                 everything, some minutes
    python tools/feed_facts.py --only shuffle cores            parts: operators, cores, time, gather, shuffle

Nothing is read and nothing is written: volumes are noise.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # nothing needs to be installed

from bench.shuffle import batch_subjects, quality
from fastsrgan.core.draws import rng
from fastsrgan.core.threads import one_thread
from fastsrgan.data.feed import pick_mover
from fastsrgan.data.pool import Pool, Resident
from fastsrgan.data.subject import PatchRule, make_resident, patch_origins
from fastsrgan.errors import ResourceError
from fastsrgan.observation.model import Degradation
from fastsrgan.store.reader import Sample
from fastsrgan.volume.intensity import add_noise, contrast_power

CPU = torch.device("cpu")
FIXED = Degradation(((1.0, 1.0, 3.0),))


def main(argv: list[str]) -> None:
    """Run the parts that were asked for."""
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "operators": operators,
        "cores": cores,
        "time": seconds,
        "gather": gather,
        "shuffle": shuffle,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART")
    parser.add_argument("--shape", nargs=3, type=int, default=(197, 233, 189), metavar=("X", "Y", "Z"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    for name in args.only:
        print(f"\n{name}: {' '.join((parts[name].__doc__ or '').split())}")
        parts[name](args)


def operators(args: argparse.Namespace) -> None:
    """Voxels of a million whose bits differ between the law of degradation and DALI's own arithmetic."""
    try:
        from nvidia import dali
        from nvidia.dali import fn
    except ImportError as error:
        print(f"  not run: {error}")
        return
    some = np.random.default_rng(0)
    x = np.exp(some.uniform(-12, 0, (100, 100, 100))).astype(np.float32)
    noise = rng(0, "noise").standard_normal(x.shape, dtype=np.float32)
    for power in (0.5, 0.75, 1.0, 1.25, 1.49):
        pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            image, normal = (fn.external_source(name=name) for name in ("image", "normal"))
            raised = image ** np.float32(power)
            pipeline.set_outputs(raised, normal * np.float32(0.03) + image)
        pipeline.feed_input("image", [x])
        pipeline.feed_input("normal", [noise])
        theirs = [np.array(out[0]) for out in pipeline.run()]
        ours = contrast_power(torch.from_numpy(x), power).numpy()
        noisy = add_noise(torch.from_numpy(x.copy()), 0.03, rng(0, "noise")).numpy()
        ulp = np.abs(theirs[0].view(np.int32).astype(np.int64) - ours.view(np.int32))
        print(
            f"  power {power:4g}: {(ulp > 0).sum():7d} differ, by up to {ulp.max()} units in the last place; "
            f"keyed noise: {(theirs[1] != noisy).sum()} differ"
        )


def cores(args: argparse.Namespace) -> None:
    """Different results of one degradation among 1 to 8 threads of torch, left alone and as the feed does it."""
    before = torch.get_num_threads()
    for shape in (tuple(args.shape), (61, 47, 53), (33, 128, 17), (290, 290, 203)):
        image = np.random.default_rng(0).random(shape, dtype=np.float32)
        sample = Sample("noise", "Train", image, (image > 0.5).astype(np.uint8), None, np.eye(4), (1.0, 1.0, 1.0))
        draw, alone, fed = FIXED.draw(0, 1, "noise"), set(), set()
        for threads in (1, 2, 3, 4, 8):
            torch.set_num_threads(threads)
            done = FIXED.apply(image, (1.0, 1.0, 1.0), draw)
            alone.add(hashlib.sha256(done.interpolated.tobytes() + done.hr.tobytes()).digest())
            r = make_resident(sample, FIXED, draw, PatchRule(16, 20), CPU)
            fed.add(hashlib.sha256(r.interpolated.numpy().tobytes() + r.hr.numpy().tobytes()).digest())
        print(f"  {shape}: {len(alone)} left alone, {len(fed)} in the feed")
    torch.set_num_threads(before)


def seconds(args: argparse.Namespace) -> None:
    """Time per volume from decoded arrays to a resident on the CPU: processor seconds and wall seconds."""
    image = np.random.default_rng(0).random(args.shape, dtype=np.float32)
    sample = Sample("noise", "Train", image, (image > 0.5).astype(np.uint8), None, np.eye(4), (1.0, 1.0, 1.0))
    spent: dict[str, list[tuple[float, float]]] = {}
    movers = {}
    for engine in ("threads", "dali"):
        try:
            movers[engine] = pick_mover(engine, CPU)
        except ResourceError as error:
            print(f"  {engine}: not run: {error}")
    for epoch in range(args.repeats + 1):  # in turn, so that both see the same neighbours; the first is a warm-up
        for engine, move in movers.items():
            draw, began = FIXED.draw(0, epoch, "noise"), (time.process_time(), time.perf_counter())
            make_resident(sample, FIXED, draw, PatchRule(64, 20), CPU, move=move)
            spent.setdefault(engine, []).append((time.process_time() - began[0], time.perf_counter() - began[1]))
    for engine, times in spent.items():
        cpu, wall = (statistics.median(t[i] for t in times[1:]) for i in (0, 1))
        print(f"  {engine}: {cpu:.3f} s of processor, {wall:.3f} s, medians of {len(times) - 1}")


def gather(args: argparse.Namespace) -> None:
    """Batches of 16 patches of 64^3 on one core, memory used again or new each time: patches per processor second."""
    image = torch.rand(tuple(args.shape))
    origins = patch_origins(tuple(args.shape), 64, 20, tuple((0, n) for n in args.shape))
    pool = Pool([Resident("noise", image.clone(), image, (image > 0.5).to(torch.uint8), None, 3.0, origins)], 64)
    for name in ("used again", "new"):
        rates = []
        for indices in list(pool.generator_batches(16, 0))[: args.repeats + 2]:
            if name == "new":
                pool._buffers._free.clear()
                gc.collect()
            with one_thread():
                began = time.thread_time()
                pool.gather(indices)
                rates.append(len(indices) / (time.thread_time() - began))
        print(f"  memory {name}: {statistics.median(rates[2:]):.0f} patches/s")


def shuffle(args: argparse.Namespace) -> None:
    """40 subjects of 900 to 1270 patches, batches of 16, a share of the subjects in memory at once."""
    patches = {f"sub-{i}": 900 + 37 * (i * 7 % 11) for i in range(40)}
    print(f"  {'resident':>9} {'subjects in a batch':>20} {'pairs of one subject':>21} {'spread':>7} {'drift':>6}")
    for share in (0.025, 0.1, 0.25, 0.5, 1.0):
        q = quality(batch_subjects(patches, round(40 * share), 16))
        print(f"  {share:9.1%} {q['distinct']:20.2f} {q['same']:21.1%} {q['spread']:7.2f} {q['drift']:6.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
