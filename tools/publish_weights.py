"""Put trained weights into the package, with their card: `python tools/publish_weights.py RUN [--scores FILE.md]`.

RUN is a folder of train_demo_weights.py. FILE.md holds the tables of `tools/score_weights.py --markdown` for the heads
that the model card reports. Writes fastsrgan/models/<name>.safetensors and README.md beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastsrgan.core.files import atomic_write
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model import weights

MODELS = Path(__file__).resolve().parent.parent / "fastsrgan" / "models"
NAME = "segsrgan-k8-synthetic-heads.safetensors"
RECIPE = "tools/train_demo_weights.py, docs/decisions/003-demo-weights.md"

CARD = Path(__file__).with_name("model_card.md")


def main() -> None:
    """Copy, describe."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("--scores", type=Path, help="Markdown tables of score_weights.py")
    args = p.parse_args()
    header = modelfile.read_header(args.run / "ema.safetensors")
    generator = weights.load_generator(args.run / "ema.safetensors")
    target = MODELS / NAME
    MODELS.mkdir(exist_ok=True)
    for old in MODELS.glob("*.safetensors"):
        old.unlink()
    weights.save_generator(target, generator, card={**header.card, "recipe": RECIPE})
    facts = weights.info(target)
    text = CARD.read_text(encoding="utf8").format(
        name=NAME,
        parameters=facts["parameters"],
        megabytes=facts["bytes"] / 1e6,
        sha256=facts["sha256"],
        scores=args.scores.read_text(encoding="utf8").strip() if args.scores else "Not scored.",
        **{k: header.card.get(k) for k in ("seed", "step", "minutes", "commit", "share")},
    )
    with atomic_write(MODELS / "README.md") as temporary:
        temporary.write_text(text, encoding="utf8")
    print(target)


if __name__ == "__main__":
    main()
