"""Small results, runs and cohorts as the commands write them, for the tests of the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from phantom import head

from fastsrgan.core.files import write_json
from fastsrgan.evaluate.pair import evaluate_files
from fastsrgan.infer.files import infer_files
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.volume.geometry import Volume

THIN, THICK = (5.0, 5.0, 5.0), (5.0, 5.0, 15.0)


def make_model(folder: Path) -> Path:
    """Weights whose output is near the spline."""
    generator = build_generator(GeneratorSpec(kernel=2))
    generator.head.data[0] = 0
    return weights.save_generator(folder / "model.safetensors", generator)


def make_truth(folder: Path, name: str = "truth", noise: float = 0.0) -> tuple[Path, Path]:
    """A head of 33 x 39 x 27 voxels of 5 mm and its label."""
    whole = head((33, 39, 27), THIN)
    data = whole.data + noise * np.random.default_rng(1).standard_normal(whole.data.shape)
    image = images.save(folder / f"{name}.nii.gz", np.maximum(data, 0).astype(np.float32), whole.affine)
    return image, images.save(folder / f"{name}_label.nii.gz", whole.label, whole.affine)


def make_scan(path: Path, edge: float = 8.0) -> Path:
    """The same head in 9 thick slices."""
    scan = head((33, 39, 9), THICK, edge=edge)
    return images.save(path, scan.data, scan.affine)


def make_results(folder: Path, count: int = 1, stem: str = "scan") -> Path:
    """A folder of ``infer`` with ``count`` results, and its truth beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    scans = [make_scan(folder / f"{stem}{i or ''}.nii.gz", edge=7 + i) for i in range(count)]
    model = make_model(folder)
    infer_files(scans, folder / "out", model, patch=32, step=32, device="cpu")
    return folder / "out"


def make_scores(out: Path, stem: str = "scan", name: str = "scores.json") -> dict:
    """``evaluate --json`` of one result against the truth, with the scan itself as a baseline."""
    image, label = make_truth(out.parent)
    files = (out / f"{stem}_sr.nii.gz", image, out / f"{stem}_seg.nii.gz", label)
    scores = evaluate_files(*files, baseline=out.parent / f"{stem}.nii.gz", baseline_seg=label)
    write_json(out / name, scores)
    return json.loads((out / name).read_text(encoding="utf8"))


def make_run(folder: Path, updates: int = 700) -> Path:
    """A run folder as training leaves it."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(1, updates + 1):
        facts = {"g_reconstruction": 1 / i, "g_total": 1 / i + 1, "d_wasserstein": -i / 100, "d_penalty": 0.5}
        lines.append({"epoch": 1 + i // 100, "update": i, "seconds": 0.25, "data_wait_seconds": 0.0, **facts})
        if i % 100 == 0:
            lines.append({"epoch": i // 100, "validation": {"Dice": 1 - 50 / (i + 100), "MSE": 1 / i, "PSNR": 30.125}})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + '{"epoch": 8, "upd', encoding="utf8")  # killed while it wrote
    write_json(folder / "summary.json", {"epochs": 7, "updates": updates, "best": 0.9375, "device": "cpu"})
    (folder / "config.yaml").write_text("epochs: 7\nname: </pre><script>alert(1)</script>\n", encoding="utf8")
    return folder


def remembering(draw: Callable[..., bytes]) -> Callable[..., bytes]:
    """``viewer.picture`` that draws the same volumes once: nine tenths of what a page takes are its picture's."""
    drawn: dict[str, bytes] = {}

    def picture(sr: Volume, others: dict[str, Volume], words: dict[str, Any]) -> bytes:
        digest = hashlib.sha256(repr(words).encode())
        for name, volume in {"sr": sr, **others}.items():
            data = np.ascontiguousarray(volume.data)
            digest.update(repr((name, data.shape, data.dtype)).encode())
            digest.update(volume.affine.tobytes() + data.tobytes())
        key = digest.hexdigest()
        if key not in drawn:
            drawn[key] = draw(sr, others, words)
        return drawn[key]

    return picture


def make_known(folder: Path) -> Path:
    """The record of a result with a doubt map and several structures, each of known values in known places.

    40 x 44 x 36 voxels of 1 mm in the axes R, A, S. SR: 400. Doubt: 20, from x = 20 on 60. Segmentation: y = 4 to 13;
    structures 3, 41 and 90 from y = 4, 17 and 30 on, 10 voxels each. The weights name 3 and 41, and call 41 "<white>".
    """
    out = folder / "out"
    out.mkdir(parents=True)
    shape, affine, thick = (40, 44, 36), np.eye(4), np.diag([1.0, 1, 3, 1])
    thick[2, 3] = 1
    low = np.broadcast_to(np.where(np.arange(12) % 2, 140, 60).astype(np.float32), (*shape[:2], 12)).copy()
    sr, doubt = np.full(shape, 400, np.float32), np.full(shape, 20, np.float32)
    doubt[20:] = 60
    seg, mask = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for value, first in ((3, 4), (41, 17), (90, 30)):
        mask[6:34, first : first + 10, 6:30] = value
    seg[mask == 3] = 1
    scan = images.save(folder / "scan.nii.gz", low, thick)
    arrays = {"sr": sr, "seg": seg, "doubt": doubt, "mask": mask}
    outputs = {kind: str(images.save(out / f"scan_{kind}.nii.gz", data, affine)) for kind, data in arrays.items()}
    structures = [{"name": "cortex", "values": [3, 42]}, {"name": "<white>", "values": [77, 41]}]
    source = {"path": str(scan), "sha256": images.sha256(scan), "series": None, "volume": None}
    weights = {"path": "w", "sha256": "0", "structures": structures}
    record = {
        "input": source,
        "outputs": outputs,
        "weights": weights,
        "doubt": {"mean": 41.25, "p95": 60.5, "image_mean": 512.5},
    }
    write_json(out / "scan.json", record)
    return out / "scan.json"
