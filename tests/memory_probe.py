"""Runs one inference in a process of its own and prints what was planned and what it took, as JSON.

python tests/memory_probe.py '{"shape": [96, 96, 96], "kernel": 8, "patch": 64, "step": 32}'
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from fastsrgan.infer.volume import infer_volume
from fastsrgan.model.networks import GeneratorSpec, build_generator


class Peak:
    """Largest anonymous memory of this process while it is open: pages of mapped files are not counted."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous()
        self.open = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.open:
            self.most = max(self.most, anonymous())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.thread.join()

    @property
    def growth(self) -> int:
        return self.most - self.before


def anonymous() -> int:
    """Bytes of anonymous memory that are resident."""
    return field("RssAnon:")


def field(name: str) -> int:
    """Bytes, of what the system knows about this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} this is not Linux")


def main(job: dict[str, Any]) -> dict[str, Any]:
    """One inference of noise."""
    torch.set_num_threads(1)
    spec = GeneratorSpec(kernel=job["kernel"], network=job.get("network", "plain"))
    generator = build_generator(spec).eval()
    data = np.random.default_rng(0).random(job["shape"], np.float32)
    spacing = job.get("spacing", [1, 1, 1])
    more = {name: job[name] for name in ("max_memory", "new_resolution", "window", "budget", "batch") if name in job}
    if "data_limit" in job:  # private memory that the process may still take
        limit = field("VmData:") + job["data_limit"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        scratch = Path(folder) / "result" if job.get("scratch") else None
        done = infer_volume(
            data,
            np.diag([*spacing, 1.0]),
            generator,
            patch=job["patch"],
            step=job["step"],
            device="cpu",
            scratch=scratch,
            **more,
        )
    memory = done.report["memory"]
    return {"planned": memory["host_bytes"], "mode": memory["mode"], "measured": peak.growth, "rows": memory["rows"]}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
