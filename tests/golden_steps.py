"""Losses of 20 training iterations on small networks in float64, and the file that keeps them.

    python tests/golden_steps.py     writes tests/golden/steps.json from the plain forms: reference layers, three critic
                                     calls and double backward, fakes of each update alone

The file changes only with the mathematics of a step. tests/test_golden_steps.py runs every form against it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from fastsrgan.config import TrainConfig, from_mapping
from fastsrgan.data.pool import Batch
from fastsrgan.train.gan import Models

FILE = Path(__file__).parent / "golden" / "steps.json"
ITERATIONS = 20
PLAIN: dict[str, Any] = {"form": "reference", "penalty": "autograd", "joint_fakes": False}
NAMES = ("d_total", "d_wasserstein", "d_penalty", "g_total", "g_reconstruction", "g_adversarial")
SETTINGS: dict[str, Any] = {
    "new_low_res": [[1.0, 1.0, 3.0]],
    "batch_size": 3,
    "patch_size": 20,
    "kernel_gen": 2,
    "kernel_dis": 3,
    "critic_iterations": 2,
    "lr_gen": 1e-3,
    "lr_dis": 1e-3,
    "lambda_adv": 0.1,
    "conditional": True,
}
# The type is pinned here and not in the file's settings: which one `auto` takes depends on the machine.
CONFIG = from_mapping(SETTINGS).replace(precision="fp32")


def batch(seed: int, config: TrainConfig = CONFIG) -> tuple[Batch, Tensor]:
    """A batch of smooth patches, their labels and degraded inputs, and the interpolation weights."""
    draw = torch.Generator().manual_seed(seed)
    n, p = config.batch_size, config.patch_size
    noise = torch.rand((n, 1, p + 6, p + 6, p + 6), generator=draw, dtype=torch.double)
    image = torch.nn.functional.avg_pool3d(noise, 7, stride=1)
    image = (image - image.amin()) / (image.amax() - image.amin())
    x = torch.nn.functional.avg_pool3d(image, (1, 1, 3), stride=1, padding=(0, 0, 1))
    y = torch.cat([image, (image > 0.5).double()], 1)
    res = 1 + 4 * torch.rand(n, generator=draw, dtype=torch.double)
    eps = torch.rand((n, 2) if config.eps_per_channel else (n,), generator=draw, dtype=torch.double)
    return Batch(x, y, res, [f"{seed}-{i}" for i in range(n)]), eps


def double(models: Models) -> Models:
    """The same networks in float64."""
    models.generator.double()
    models.critic.double()
    models.finish()
    return models


def losses(iterations: int = ITERATIONS, **changes: Any) -> list[dict[str, float]]:
    """The losses of every iteration with some settings changed."""
    config = CONFIG.replace(**changes)
    models = double(Models(config, 0, torch.device("cpu")))
    rows = []
    for i in range(iterations):
        drawn = [batch(100 * i + j) for j in range(config.critic_iterations)]
        critic = models.critic_updates([b for b, _ in drawn], [e for _, e in drawn])
        generator = models.generator_update(batch(100 * i + 99)[0], adversarial=True)
        facts = {f"d_{k}": v for k, v in critic.items()} | {f"g_{k}": v for k, v in generator.items()}
        rows.append({name: facts[name] for name in NAMES})
    return rows


if __name__ == "__main__":
    kept = {"command": "python tests/golden_steps.py", "settings": SETTINGS}
    rows = ",\n".join(json.dumps(row) for row in losses(**PLAIN))
    FILE.write_text(json.dumps(kept)[:-1] + f', "rows": [\n{rows}\n]}}\n', encoding="utf8")
