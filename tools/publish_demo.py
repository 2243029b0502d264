"""Put a demo's picture and figures into the README, after `make demo`: `tools/publish_demo.py demo --machine TEXT`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from fastsrgan.core.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def block(facts: dict, machine: str) -> str:
    """The README's table and line of one demo.json."""
    columns = list(facts["table"][0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in facts["table"]:
        cells = ["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    training, total = facts["training"], facts["seconds"]["total"]
    made = facts["provenance"]
    note = (
        f"{total:.0f} s in all, {facts['seconds']['train']:.0f} s of it for {training['updates']} training updates and "
        f"{facts['seconds']['infer']:.0f} s for inference; {facts['peak_memory_bytes'] / 2**30:.1f} GiB at most; "
        f"on {training['device']}, {machine}, torch {made['torch']}, commit {made['commit']}."
    )
    dice = (
        "The spline has no segmentation: its Dice is that of the true label map drawn on the thick slices and "
        "interpolated. PSNR uses the maximum of the truth; SSIM is Gaussian-weighted, 3-D; components are 26-connected."
    )
    return "\n".join([*lines, "", note + " " + dice])


def main() -> None:
    """Copy the picture, rewrite the block between the markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", nargs="?", type=Path, default=Path("demo"), help="output folder of a demo (demo)")
    parser.add_argument(
        "--machine", required=True, help="where the demo ran, as: 2 cores of an AMD EPYC 25/17/1 (AVX2)"
    )
    args = parser.parse_args()
    demo = args.demo
    facts = json.loads((demo / "demo.json").read_text(encoding="utf8"))
    (ROOT / "docs" / "images").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(demo / "demo.png", ROOT / "docs" / "images" / "demo.png")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with atomic_write(readme) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{block(facts, args.machine)}\n{END}{after}", encoding="utf8")


if __name__ == "__main__":
    main()
