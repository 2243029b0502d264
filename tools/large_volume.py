"""A volume that does not fit into memory, done by slabs: how long, and how much memory beside image and result.

    python tools/large_volume.py --shape 1200 1200 1000 --limit 3

The image is noise in a file that is mapped into memory, and so is the result. The process is held to the limit by the
system (RLIMIT_DATA counts private memory, not mapped files): beyond it an allocation fails. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fastsrgan.cli.console import open_console
from fastsrgan.core.system import measured_on
from fastsrgan.infer.memory import SLABS
from fastsrgan.infer.volume import infer_volume
from fastsrgan.model.networks import GeneratorSpec, build_generator

GIB = 2**30


def field(name: str) -> int:
    """Bytes, of what the system knows about this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def noise(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Random voxels in a file, some planes at a time."""
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    draw = np.random.default_rng(0)
    for x in range(0, shape[0], 8):
        array[x : x + 8] = draw.random(array[x : x + 8].shape, np.float32)
    array.flush()
    return np.load(path, mmap_mode="r")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--shape", type=int, nargs=3, default=(1200, 1200, 1000))
    p.add_argument("--kernel", type=int, default=1, help="channels of the network")
    p.add_argument("--patch", type=int, default=64)
    p.add_argument("--step", type=int, default=64)
    p.add_argument("--limit", type=float, default=3.0, help="GiB beside image and result")
    p.add_argument("--folder", type=Path, default=Path("large_volume"), help="for image and result; removed at the end")
    args = p.parse_args()
    args.folder.mkdir(parents=True)
    progress = open_console(quiet=False, debug=False)
    try:
        generator = build_generator(GeneratorSpec(kernel=args.kernel)).eval()
        image = noise(args.folder / "image.npy", tuple(args.shape))
        limit = int(args.limit * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (field("VmData:") + limit,) * 2)
        before, most, began = field("RssAnon:"), 0, time.perf_counter()

        class Watched:
            start, finish = staticmethod(progress.start), staticmethod(progress.finish)

            @staticmethod
            def advance(n: int = 1, **facts: object) -> None:
                nonlocal most
                most = max(most, field("RssAnon:"))
                progress.advance(n, **facts)

        done = infer_volume(
            image,
            np.eye(4),
            generator,
            patch=args.patch,
            step=args.step,
            device="cpu",
            max_memory=limit,
            scratch=args.folder / "result",
            progress=Watched(),
        )
        memory = done.report["memory"]
        assert memory["mode"] == SLABS or np.prod(args.shape) * 16 < limit
        assert all(np.isfinite(plane).all() for plane in done.sr[:: args.patch])
        result = {
            "shape": list(args.shape),
            "mode": memory["mode"],
            "tiles": done.report["tiles"],
            "seconds": time.perf_counter() - began,
            "threads": torch.get_num_threads(),
            "limit_bytes": limit,
            "planned_bytes": memory["host_bytes"],
            "largest_seen_bytes": most - before,
            "image_and_result_bytes": image.nbytes * 3,
            **measured_on(),
        }
        print(json.dumps(result))
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
