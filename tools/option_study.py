"""What training options are worth on the demo cohort, each alone against the paper's recipe, over several seeds.

    python tools/option_study.py -o STUDY              # goes on where it was stopped; --markdown prints the table
    python tools/option_study.py -o STUDY --updates 50 --seeds 1 --arms paper ema
    python tools/option_study.py -o STUDY --arms recipe agreement --json FILE      # docs/decisions/029

Every cell (option, seed) is one run of `fastsrgan.train.run.train` on the cohort that `fastsrgan demo` makes, from new
weights, for the same number of generator updates. Scores are those of the Test subject after the last update, patch
by patch as in the paper's figure 6, and of some arms on the whole volume, through ``infer``. Options are compared with
the first arm; a difference counts where all seeds agree on its sign.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from fastsrgan.cli.console import table
from fastsrgan.config import TrainConfig
from fastsrgan.convert import convert
from fastsrgan.core.files import write_json
from fastsrgan.core.system import measured_on, provenance, tune_allocator
from fastsrgan.demo.template import make_cohort
from fastsrgan.train.run import train

BASE: dict[str, Any] = {
    "new_low_res": ((1.0, 1.0, 3.0),),
    "kernel_gen": 8,
    "kernel_dis": 8,
    "patch_size": 32,
    "batch_size": 8,
    "stride": 32,
    "zero_head": True,
    "head_rate": 0.02,
    "lr_gen": 1e-3,
    "contrast_max": 0.2,
    "noise": 0.01,
    "epochs": 2,
}
ARMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "ema": {"ema": 0.98},
    "dice": {"dice_weight": 0.5},
    "lazy penalty": {"penalty_every": 4},
    "ttur": {"lr_dis": 4e-4},
    "flips": {"flips": "x"},
    "u-net": {"network": "unet"},
    "scaled head": {"scaled": True},
}
# As the shipped weights are trained: no critic, profiles and thicknesses drawn; with whole volumes in the end.
RECIPE: dict[str, Any] = {
    "new_low_res": ((1.0, 1.0, 2.0), (1.0, 1.0, 6.0)),
    "lambda_adv": 0.0,
    "lambda_rec": 20.0,
    "dice_weight": 1.0,
    "scaled": True,
    "head_rate": 0.1,
    "ema": 0.98,
    "clip_norm": 5.0,
    "flips": "x",
    "profile": 0.1,
    "profile_box": 1.0,
    "noise_from": 0.0,
    "noise": 0.04,
    "whole_every": 2,
}
ARMS |= {"recipe": RECIPE, "agreement": RECIPE | {"agree": True}}
SCORES = ("PSNR", "Dice", "whole_PSNR", "whole_Dice")


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-o", "--out", type=Path, required=True, help="folder of the runs; finished cells are kept")
    p.add_argument("--updates", type=int, default=160, help="generator updates of a run")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--arms", nargs="+", default=list(ARMS)[:8], choices=list(ARMS), metavar="ARM")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write all cells into one file")
    p.add_argument("--markdown", action="store_true", help="only print the table of what is there")
    return p.parse_args()


def cell(out: Path, store: Path, arm: str, seed: int, updates: int) -> dict[str, Any]:
    """Scores of one run, from its file where it is finished."""
    settings = {**BASE, **ARMS[arm], "seed": seed, "steps_per_epoch": updates // BASE["epochs"]}
    settings |= {"validate_every": BASE["epochs"], "snapshot": BASE["epochs"]}
    config = TrainConfig(**settings)
    target = out / f"{arm.replace(' ', '-')}-{seed}.json"
    if target.exists():
        found = json.loads(target.read_text(encoding="utf8"))
        if found["config"] == config.to_dict():
            return found
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    done = train(store, run, config, device="cpu")
    if done["stopped"]:
        sys.exit(done["exit_code"])
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf8").splitlines()]
    scores = {k: v for row in rows for k, v in row.get("validation", {}).items()}
    found = {"arm": arm, "seed": seed, "updates": done["updates"], "seconds": done["seconds"], "scores": scores}
    write_json(target, {**found, "config": config.to_dict(), "provenance": provenance(), **measured_on()})
    return json.loads(target.read_text(encoding="utf8"))


def own_settings(arm: str, first: str) -> list[tuple[str, Any]]:
    """What an arm sets otherwise than the first one."""
    return [(k, v) for k, v in ARMS[arm].items() if arm == first or ARMS[first].get(k) != v]


def summary(cells: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row per option: mean over the seeds, and the difference from the first one's seed by seed."""
    first = cells[0]["arm"]
    base = {c["seed"]: c["scores"] for c in cells if c["arm"] == first}
    common = [score for score in SCORES if all(score in c["scores"] for c in cells)]
    rows = []
    for arm in dict.fromkeys(c["arm"] for c in cells):
        own = {c["seed"]: c["scores"] for c in cells if c["arm"] == arm}
        row = {
            "option": arm,
            "settings": ", ".join(f"{k} {v}" for k, v in own_settings(arm, first)),
            "runs": str(len(own)),
        }
        for score in common:
            row[score] = f"{statistics.fmean(s[score] for s in own.values()):.4g}"
            gains = [own[seed][score] - base[seed][score] for seed in own if seed in base]
            if arm != first and gains:
                sure = len({g > 0 for g in gains}) == 1 and len(gains) > 1
                told = " ".join(f"{g:+.2g}" for g in gains)
                row[f"{score} gain"] = f"{statistics.fmean(gains):+.2g} ({told}){' *' if sure else ''}"
        rows.append(row)
    return rows


def main() -> None:
    """Run what is missing, then print the table."""
    args = parse()
    if args.markdown:
        files = sorted(args.out.glob("*-[0-9]*.json"), key=lambda p: list(ARMS).index(json.loads(p.read_text())["arm"]))
        rows = summary([json.loads(path.read_text(encoding="utf8")) for path in files])
        columns = list(dict.fromkeys(k for row in rows for k in row))
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in rows:
            print("| " + " | ".join(row.get(c, "") for c in columns) + " |")
        return
    tune_allocator()
    args.out.mkdir(parents=True, exist_ok=True)
    store = args.out / "cohort.zarr"
    if not (store / "manifest.json").exists():
        cohort = make_cohort(args.out / "cohort", n_train=2, n_test=1, seed=0, sd_voxels=2.5, overwrite=True)
        convert(cohort.csv, store)
    cells = []
    for seed in range(args.seeds):
        for arm in args.arms:
            cells.append(cell(args.out, store, arm, seed, args.updates))
            print(arm, seed, f"{cells[-1]['seconds']:.0f} s", cells[-1]["scores"], flush=True)
    if args.json:
        write_json(args.json, {"cells": cells})
    print(table(summary(cells)))


if __name__ == "__main__":
    main()
