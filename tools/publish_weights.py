"""Put trained weights into the package, with their card.

    python tools/publish_weights.py adult RUN --updates 2000 --scores SCORES.json --machine "..." --commit COMMIT
    python tools/publish_weights.py perinatal RUN --updates 7000 --scores SCORES.json --machine "..." --commit COMMIT

RUN is a run of `fastsrgan train` (docs/decisions/024 and 026), COMMIT the code that trained, and SCORES.json the list
of `tools/score_thick_slices.py`. Writes the model's file in fastsrgan/models/, with what it was made for
(fastsrgan/model/purpose.py: change that first), and its card beside it, for perinatal the table in README.md too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fastsrgan.core.files import atomic_write
from fastsrgan.model import weights
from fastsrgan.model.purpose import MADE_FOR

ROOT = Path(__file__).resolve().parent.parent
CARDS = {"adult": ("model_card.md", "README.md"), "perinatal": ("model_card_perinatal.md", "perinatal.md")}
RECIPES = {
    "adult": "docs/decisions/026-adult-weights.md",
    "perinatal": "tools/perinatal_volumes.py, docs/decisions/024-perinatal-weights.md",
}
BEGIN, END = "<!-- perinatal:begin -->", "<!-- perinatal:end -->"


def table(rows: list[dict[str, Any]], short: bool) -> str:
    """The rows in Markdown; ``short``: without SSIM, map and components."""
    heads = ["case", "ratio", "profile", "noise", "spline dB", "best linear", "fastsrgan", "guess"]
    heads += ["Dice"] if short else ["SSIM spline", "SSIM gain", "Dice", "Dice of the map", "components"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in rows:
        cells = [r["case"], str(r["ratio"]), r["profile"], f"{r['noise']:g}", f"{r['spline_db']:.2f}"]
        cells += [f"{r['linear_gain']:+.2f}", f"{r['sr_gain']:+.2f}", f"{r['guess_gain']:+.2f}"]
        if not short:
            cells += [f"{r['spline_ssim']:.4f}", f"{r['ssim_gain']:+.4f}"]
        cells += [f"{r['dice']:.3f}"]
        if not short:
            cells += [f"{r['dice_interpolated']:.3f}", str(r["components"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of_scores(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """What a card says of its scores, and the rows."""
    rows = json.loads(path.read_text(encoding="utf8"))

    def said(r: dict[str, Any]) -> str:
        gain = min(r["sr_gain"], r["guess_gain"])
        return f"{gain:+.2f} dB ({r['case']}, ratio {r['ratio']}, {r['profile']}, noise {r['noise']:g})"

    ordered = sorted(rows, key=lambda r: min(r["sr_gain"], r["guess_gain"]))
    return {"scores": table(rows, False), "worst": said(ordered[0]), "best": said(ordered[-1])}, rows


def main() -> None:
    """Copy, describe."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=CARDS)
    p.add_argument("run", type=Path)
    p.add_argument("--mean-with", type=Path, metavar="RUN", help="ship the mean of both runs' weights")
    p.add_argument("--share", type=float, default=0.5, help="of RUN in that mean (0.5)")
    p.add_argument("--scores", type=Path, required=True, help="JSON of tools/score_thick_slices.py")
    p.add_argument("--updates", type=int, required=True, help="of all stages")
    p.add_argument("--seed", type=int, default=0, help="of the training (0)")
    p.add_argument("--commit", required=True, help="of the code that trained")
    p.add_argument("--machine", required=True, help="where the scores were made")
    p.add_argument("--options", default="", help="of fastsrgan infer, in the scores")
    args = p.parse_args()
    target = weights.SHIPPED / weights.MODELS[args.model].file
    made_for = weights.MODELS[args.model].purpose
    card = {"step": args.updates, "seed": args.seed, "commit": args.commit, "recipe": RECIPES[args.model]}
    generator = weights.load_generator(args.run)
    if args.mean_with:
        other = dict(weights.load_generator(args.mean_with).named_parameters())
        with torch.no_grad():
            for name, parameter in generator.named_parameters():
                parameter.copy_(args.share * parameter + (1 - args.share) * other[name])
    weights.save_generator(target, generator, card={**card, MADE_FOR: made_for.to_dict()})
    facts = weights.info(target)
    known = {"name": target.name, "parameters": facts["parameters"], "sha256": facts["sha256"]}
    known |= {"made_for": made_for.line(), "megabytes": facts["bytes"] / 1e6, "commit": args.commit}
    scores, rows = of_scores(args.scores)
    options = f" and `{args.options}`" if args.options else ""
    known |= scores | {"updates": f"{args.updates:,}", "machine": args.machine, "options": options}
    if args.model == "perinatal":
        page = (ROOT / "README.md").read_text(encoding="utf8")
        before, rest = page.split(BEGIN)
        shown = [r for r in rows if r["ratio"] == 3]
        note = (
            "PSNR in dB inside the head: the spline's, and the gain of the best linear estimate, of fastsrgan, and of "
        )
        note += "fastsrgan where the scan does not show its slice profile (`--profile guess`), as scanners' do not. "
        note += f"`python tools/score_thick_slices.py CASES.json -w perinatal`{options}, on {args.machine}."
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
