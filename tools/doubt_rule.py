"""Measures the rule of `infer --uncertainty` (fastsrgan/volume/doubt.py) on images whose truth is known.

    python tools/doubt_rule.py --images GA34_T2w.nii.gz GA25_T2w.nii.gz --labels head04_labels.nii.gz \\
        --json bench/results/MACHINE/doubt.json --figure docs/images/doubt

Images go through the model `perinatal`; label maps of FreeSurfer's numbers become images of a random contrast
(observation/synthesis) and go through `adult`. The central --crop voxels of each are acquired in slices of 3 and 6
voxels by fastsrgan.degrade, with a Gaussian and a box profile, and with noise of 3 % of the maximum; the result is the
mean over the mirror images of --flips. a, p and s are those of the largest likelihood, were the errors normal with the
doubt as standard deviation; every case counts alike. "left out": with a rule that was measured on the other heads.

"ceiling": PSNR gained (dB) by SR clamped to the range of the scan's voxels around it, plus a margin.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage, optimize

import fastsrgan
from fastsrgan.core.files import write_json
from fastsrgan.core.system import measured_on, provenance
from fastsrgan.evaluate.metrics import calibration
from fastsrgan.observation.model import degrade
from fastsrgan.observation.synthesis import synthesise
from fastsrgan.study.plots import Panel, PlotLine, draw
from fastsrgan.volume import doubt
from fastsrgan.volume.consistency import Observation, observation
from fastsrgan.volume.doubt import Rule, doubt_

ACQUISITIONS = [(r, p, n) for r in (3, 6) for p, n in (("gaussian", 0.0), ("box", 0.0), ("gaussian", 0.03))]
HEAD = 0.1  # of full scale: what is brighter is no air
EVERY = 7  # voxel of a case counts in the fit
MARGINS = (0.0, 0.1, 0.25)  # of the range around a voxel


@dataclass
class Case:
    """One acquisition: parts of the rule, (voxels inside the head,) each, and the error.

    detail : r^2 W; typical : r^2 V; spread : u S; noise : n; single : PSNR gain of ceilings
    """

    head: str
    name: str
    error: np.ndarray
    detail: np.ndarray
    typical: float
    spread: np.ndarray
    noise: float
    facts: dict[str, Any]

    def variance(self, rule: Rule, every: int = 1) -> np.ndarray:
        """doubt^2."""
        detail, spread = self.detail[::every], self.spread[::every]
        own = rule.detail**2 * detail**rule.power * self.typical ** (1 - rule.power)
        return own + rule.spread**2 * spread + self.noise**2


def read(path: Path) -> tuple[np.ndarray, float]:
    """(X, Y, Z) in RAS order and its voxel size, that of isotropic voxels."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.squeeze(np.asarray(image.dataobj)), float(nib.affines.voxel_sizes(image.affine)[0])


def heads(args: argparse.Namespace) -> list[tuple[str, str, np.ndarray, float]]:
    """Name, model, image of full scale 1, voxel size."""
    made = []
    for path in args.images:
        data, mm = read(path)
        made.append((path.name.split("_")[0], "perinatal", data / np.percentile(data[data > 0], 99.9), mm))
    for path in args.labels:
        data, mm = read(path)
        name = path.name.split("_")[0]
        made.append((name, "adult", synthesise(data.astype(int), (mm,) * 3, (2026, name))[0].numpy(), mm))
    cut = []
    for name, model, data, mm in made:
        middle = np.argwhere(data > HEAD).mean(0).astype(int)
        first = [int(np.clip(c - args.crop // 2, 0, n - args.crop)) for c, n in zip(middle, data.shape, strict=True)]
        part = data[tuple(slice(f, f + args.crop) for f in first)]
        cut.append((name, model, np.ascontiguousarray(np.clip(part, 0, 1.2), np.float32), mm))
    return cut


def measure(name: str, model: str, truth: np.ndarray, mm: float, acquisition: tuple, flips: str) -> Case:
    """One head, acquired once."""
    ratio, profile, noise = acquisition
    low_mm = (mm, mm, mm * ratio)
    scan = degrade(truth, (mm,) * 3, low_mm, noise=noise, key="doubt", profile=profile)
    doubt.RULE = Rule(0.0, 1.0, 1.0)  # the spread alone
    done = fastsrgan.infer_volume(
        scan.low_res,
        np.diag([*low_mm, 1.0]),
        fastsrgan.load_generator(model),
        new_resolution=mm,
        patch=None,
        step=1,
        device="cpu",
        flips=flips,
        uncertainty=True,
    )
    assert done.doubt is not None
    told = done.report["doubt"]
    n = float(f"{told['noise'] or 0:.3g}")
    seen = observation(scan.low_res.shape, low_mm, truth.shape, (mm,) * 3)
    assert seen is not None
    inside = scan.hr > HEAD
    for axis, edge in enumerate((2, 2, ratio)):  # what the scan saw of beyond the part is not known to it
        np.moveaxis(inside, axis, 0)[:edge] = np.moveaxis(inside, axis, 0)[-edge:] = False
    parts = [_part(done.sr, scan.low_res, seen, Rule(1.0, power, 0.0))[inside] - n**2 for power in (1.0, 0.0)]
    error = (done.sr - scan.hr)[inside].astype(np.float64)
    facts = {"ratio": ratio, "profile": profile, "noise": noise, "rms_error": _rms(error), "lacking": told["lacking"]}
    facts["ceiling"] = {
        f"{margin:g}": 10 * math.log10(np.mean(error**2) / np.mean(_ceiling(done.sr, scan, margin)[inside] ** 2))
        for margin in MARGINS
    }
    spread = done.doubt[inside].astype(np.float64) ** 2 - n**2
    detail, typical, spread = np.maximum(parts[0], 0), float(parts[1].mean()), np.maximum(spread, 0)
    label = f"{name}, {ratio} voxels, {profile}{', noise 3 %' if noise else ''}"
    return Case(name, label, error, detail, typical, spread, n, facts)


def _part(sr: np.ndarray, scan: np.ndarray, seen: Observation, rule: Rule) -> np.ndarray:
    made = np.zeros(sr.shape)
    doubt_(made, sr, scan, seen, 2, rule=rule)
    return made**2


def _ceiling(sr: np.ndarray, scan: Any, margin: float) -> np.ndarray:
    """The error of SR inside the range of the scan's voxels around it, plus a share of that range."""
    low, high = (f(scan.low_res, 3, mode="nearest") for f in (ndimage.minimum_filter, ndimage.maximum_filter))
    ratio = sr.shape[2] // scan.low_res.shape[2]
    low, high = (np.repeat(a, ratio, 2) for a in (low, high))
    more = margin * (high - low)
    return np.clip(sr, low - more, high + more) - scan.hr


def _rms(values: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.square(values, dtype=np.float64))))


def fit(cases: Sequence[Case], spread: bool) -> tuple[Rule, float]:
    """The rule of the largest likelihood, and minus its logarithm per voxel."""

    def rule(x: np.ndarray) -> Rule:
        return Rule(math.exp(x[0]), 1 / (1 + math.exp(-x[1])), math.exp(x[2]) if spread else 0.0)

    def loss(x: np.ndarray) -> float:
        total = 0.0
        for case in cases:
            variance = case.variance(rule(x), EVERY) + 1e-10
            total += float(np.mean(np.log(variance) + case.error[::EVERY] ** 2 / variance)) / 2
        return total / len(cases)

    found = optimize.minimize(loss, [0.0, 0.5, 0.0][: 2 + spread], method="Nelder-Mead", options={"xatol": 1e-3})
    return rule(found.x), float(found.fun)


def row(case: Case, rule: Rule) -> dict[str, Any]:
    """How a rule does on a case."""
    error, made = (a.reshape(-1, 1, 1) for a in (case.error, np.sqrt(case.variance(rule))))
    found = calibration(error, np.zeros_like(error), made, np.ones(error.shape, bool))
    return {"case": case.name, **case.facts, **found}


def picture(base: Path, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Error over doubt of each decile: a panel for each ratio, a line for each case."""
    panels = []
    for ratio in (3, 6):
        own = [r for r in rows if r["ratio"] == ratio]
        lines = [
            PlotLine(name, [d["doubt"] for d in r["deciles"]], [d["error"] for d in r["deciles"]], number=n)
            for n, name in enumerate(names)
            for r in own
            if r["case"].startswith(name)
        ]
        ends = [f(d["doubt"] for r in own for d in r["deciles"]) for f in (min, max)]
        lines.append(PlotLine("as large as the doubt", ends, ends, style="fit", number=-1))
        panels.append(Panel(f"slices of {ratio} voxels: error by doubt", "doubt", lines))
    for path in draw(base, [panels], "Root mean square of the error in each decile of the doubt"):
        if path.suffix == ".svg":
            path.unlink()


def main() -> None:
    """Measure, fit, write."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", nargs="*", type=Path, default=[])
    p.add_argument("--labels", nargs="*", type=Path, default=[])
    p.add_argument("--crop", type=int, default=60, help="voxels, a multiple of 6")
    p.add_argument("--flips", default="xyz")
    p.add_argument("--json", type=Path)
    p.add_argument("--figure", type=Path, help="without its ending")
    args = p.parse_args()
    cases = []
    for name, model, truth, mm in heads(args):
        for acquisition in ACQUISITIONS:
            cases.append(measure(name, model, truth, mm, acquisition, args.flips))
            print(cases[-1].name, cases[-1].facts, flush=True)
    names = list(dict.fromkeys(case.head for case in cases))
    rule, loss = fit(cases, spread=True)
    alone, alone_loss = fit(cases, spread=False)
    elsewhere = {}
    if len(names) > 1:
        elsewhere = {name: fit([c for c in cases if c.head != name], spread=True)[0] for name in names}
    rows = []
    for case in cases:
        left = row(case, elsewhere[case.head]) if elsewhere else {}
        told = row(case, rule)
        by_parts = {
            part: row(case, replace(Rule(0, 1, 0), **{part: 1.0}))["rank_correlation"] for part in ("detail", "spread")
        }
        told |= {"left_out_error_over_doubt": left.get("error_over_doubt"), "rank_correlation_of": by_parts}
        rows.append(told)
        print(told["case"], {k: told[k] for k in ("rank_correlation", "error_over_doubt", *list(told)[-2:])})
    deciles = np.array([[d["error"] / d["doubt"] for d in r["deciles"]] for r in rows])
    result = {
        "rule": vars(rule),
        "loss": loss,
        "without_spread": vars(alone) | {"loss": alone_loss},
        "error_over_doubt_by_decile": np.sqrt(np.mean(deciles**2, 0)).tolist(),
        "flips": args.flips,
        "crop": args.crop,
        "cases": rows,
        "provenance": provenance(),
        **measured_on(),
    }
    for key in ("rule", "without_spread", "loss", "error_over_doubt_by_decile"):
        print(key, result[key])
    if args.json:
        write_json(args.json, result)
    if args.figure:
        picture(args.figure, rows, names)
    print(result["provenance"])


if __name__ == "__main__":
    main()
