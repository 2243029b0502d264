"""Put trained weights into the package, with their card.

    python tools/publish_weights.py adult RUN [--scores FILE.md]
    python tools/publish_weights.py perinatal RUN --updates 7000 --scores SCORES.json --machine "..."

For adult, RUN is a folder of train_demo_weights.py and FILE.md holds the tables of `tools/score_weights.py --markdown`.
For perinatal, RUN is a run of `fastsrgan train` (docs/decisions/024) and SCORES.json a list of rows with case, ratio,
profile, noise, spline_db, linear_gain, sr_gain, spline_ssim, ssim_gain, dice, dice_interpolated and components.
Writes the model's file in fastsrgan/models/, with what it was made for (fastsrgan/model/purpose.py: change that first),
and its card beside it, for perinatal the table in README.md too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastsrgan.core.files import atomic_write
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model import weights
from fastsrgan.model.purpose import MADE_FOR

ROOT = Path(__file__).resolve().parent.parent
CARDS = {"adult": ("model_card.md", "README.md"), "perinatal": ("model_card_perinatal.md", "perinatal.md")}
RECIPES = {
    "adult": "tools/train_demo_weights.py, docs/decisions/003-demo-weights.md",
    "perinatal": "tools/perinatal_volumes.py, docs/decisions/024-perinatal-weights.md",
}
BEGIN, END = "<!-- perinatal:begin -->", "<!-- perinatal:end -->"


def table(rows: list[dict[str, Any]], short: bool) -> str:
    """The rows in Markdown; ``short``: without SSIM, map and components."""
    heads = ["case", "ratio", "profile", "noise", "spline dB", "best linear", "fastsrgan"]
    heads += ["Dice"] if short else ["SSIM spline", "SSIM gain", "Dice", "Dice of the map", "components"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in rows:
        cells = [r["case"], str(r["ratio"]), r["profile"], f"{r['noise']:g}", f"{r['spline_db']:.2f}"]
        cells += [f"{r['linear_gain']:+.2f}", f"{r['sr_gain']:+.2f}"]
        if not short:
            cells += [f"{r['spline_ssim']:.4f}", f"{r['ssim_gain']:+.4f}"]
        cells += [f"{r['dice']:.3f}"]
        if not short:
            cells += [f"{r['dice_interpolated']:.3f}", str(r["components"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_scores(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What a perinatal card says of its scores, and the rows."""
    rows = json.loads(path.read_text(encoding="utf8"))

    def said(r: dict[str, Any]) -> str:
        return f"{r['sr_gain']:+.2f} dB ({r['case']}, ratio {r['ratio']}, {r['profile']}, noise {r['noise']:g})"

    ordered = sorted(rows, key=lambda r: r["sr_gain"])
    return {"scores": table(rows, False), "worst": said(ordered[0]), "best": said(ordered[-1])}, rows


def main() -> None:
    """Copy, describe."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=CARDS)
    p.add_argument("run", type=Path)
    p.add_argument("--scores", type=Path, help="Markdown tables of score_weights.py; for perinatal a JSON list")
    p.add_argument("--updates", type=int, help="of all stages, for perinatal")
    p.add_argument("--machine", default="one machine", help="where the scores were made")
    p.add_argument("--options", default="", help="of fastsrgan infer, in the scores")
    args = p.parse_args()
    file = args.run / "ema.safetensors" if args.model == "adult" else args.run
    generator = weights.load_generator(file)
    card = modelfile.read_header(file).card if args.model == "adult" else {"updates": args.updates}
    target = weights.SHIPPED / weights.MODELS[args.model].file
    made_for = weights.MODELS[args.model].purpose
    card |= {"recipe": RECIPES[args.model], MADE_FOR: made_for.to_dict()}
    weights.save_generator(target, generator, card=card)
    facts = weights.info(target)
    known = {"name": target.name, "parameters": facts["parameters"], "sha256": facts["sha256"]}
    known["made_for"] = made_for.line()
    known["megabytes"] = facts["bytes"] / 1e6
    if args.model == "adult":
        known |= {k: card.get(k) for k in ("seed", "step", "minutes", "commit", "share")}
        known["scores"] = args.scores.read_text(encoding="utf8").strip() if args.scores else "Not scored."
    else:
        scores, rows = of_scores(args.scores)
        options = f" and `{args.options}`" if args.options else ""
        known |= scores | {"updates": f"{args.updates:,}", "machine": args.machine, "options": options}
        page = (ROOT / "README.md").read_text(encoding="utf8")
        before, rest = page.split(BEGIN)
        shown = [r for r in rows if r["ratio"] == 3]
        note = "PSNR in dB inside the head: the spline's, and the gain of the best linear estimate and of fastsrgan. "
        note += f"On {args.machine}."
        with atomic_write(ROOT / "README.md") as temporary:
            text = f"{before}{BEGIN}\n{table(shown, True)}\n\n{note}\n{END}{rest.split(END)[1]}"
            temporary.write_text(text, encoding="utf8")
    template, beside = CARDS[args.model]
    text = Path(__file__).with_name(template).read_text(encoding="utf8").format(**known)
    with atomic_write(weights.SHIPPED / beside) as temporary:
        temporary.write_text(text, encoding="utf8")
    print(target)


if __name__ == "__main__":
    main()
