"""Score a generator on heads it was not trained on: what it gains over cubic-spline interpolation, and where it loses.

    python tools/score_weights.py ch2.nii.gz macaque.nii.gz --synthetic 1 --crop 128 --markdown
    python tools/score_weights.py head.nii.gz --label gm.nii.gz --ratio 3 --axis 0 1 2 --tiling 64:32 128:30

Each head is acquired with thick slices by fastsrgan.degrade (physical geometry) at every ratio of slice thickness to
voxel size, noise level and slice axis, and goes through fastsrgan.infer_volume as a user's image would. The
spline is clipped at the acquired image's minimum, as the network's result is. With a label, a reader of the thick
slices is imitated: the degraded label is cut at 0.5 on the low-resolution grid, interpolated and cut at 0.5 again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from fastsrgan.core.files import finite, write_json
from fastsrgan.core.system import pick_device, provenance, tune_allocator
from fastsrgan.demo.template import make_cohort
from fastsrgan.errors import FastsrganError, InputError, UsageError, counted
from fastsrgan.evaluate import figures, metrics
from fastsrgan.infer.values import AUTO, OFF, word_or_number
from fastsrgan.infer.volume import infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import Generator
from fastsrgan.observation.model import Degraded, degrade
from fastsrgan.volume.geometry import Volume, grid_size, processing_orientation, resampled_affine
from fastsrgan.volume.resample import PROFILES, apply_axes, degrade_matrix, upsample_matrix

Triple = tuple[float, float, float]
Tiling = tuple[int | None, int]

PLANES = ("sagittal", "coronal", "axial")  # slices across R, A, S
HEAD_LEVEL = 0.1  # of the maximum
SYNTHETIC_SEED = 1000
DEFINITIONS = figures.definitions() | {
    "inside": f"the mask; without one, voxels above {HEAD_LEVEL} of the maximum, holes filled",
    "gain_db": "PSNR inside of SR minus that of the spline",
    "ratio": "slice thickness over voxel size; in-plane voxels stay as they are",
    "noise": "standard deviation of the noise in the acquired image, as a fraction of its maximum",
    "tiling": "edge of a tile and step in voxels of the result",
}


@dataclass(frozen=True)
class Head:
    """A head in world axes (R, A, S); ``mask`` and ``label`` are bool arrays of its shape."""

    name: str
    image: Volume
    mask: np.ndarray
    label: np.ndarray | None


# --- heads --------------------------------------------------------------------------------------------------------


def read_heads(args: argparse.Namespace) -> Iterator[Head]:
    """The heads that were named, then the synthetic ones."""
    count = len(args.heads)
    masks, labels = (
        _per_head(option, given, count) for option, given in (("--mask", args.mask), ("--label", args.label))
    )
    for path, mask, label in zip(args.heads, masks, labels, strict=True):
        yield read_head(Path(path), mask, label, args.crop)
    if args.synthetic:
        with tempfile.TemporaryDirectory(prefix="fastsrgan-score-") as folder:
            cohort = make_cohort(folder, n_train=0, n_test=args.synthetic, seed=SYNTHETIC_SEED)
            for i, subject in enumerate(cohort.subjects):
                yield read_head(subject.image, None, str(subject.label), args.crop, f"synthetic {i + 1}")


def _per_head(option: str, given: list[str], count: int) -> list[str | None]:
    if given and len(given) != count:
        raise UsageError(
            option,
            f"{counted(len(given), 'file')} for {counted(count, 'head')}",
            "one per head in their order, - for none",
        )
    return [None if g == "-" else g for g in given] or [None] * count


def read_head(path: Path, mask: str | None, label: str | None, crop: int, name: str | None = None) -> Head:
    """A head with its region and label, turned to world axes and cut to its central ``crop`` voxels (0: whole)."""
    image = images.load(path)
    turn = processing_orientation(image.affine, (1.0, 1.0, 1.0))
    arrays: list[np.ndarray | None] = [image.data]
    for other in (mask, label):
        arrays.append(None if other is None else images.load_label(other, image).data > 0)
    cut = tuple(_central(n, crop) for n in turn.permute(image.data.shape))
    data, inside, structure = (None if a is None else np.ascontiguousarray(turn.apply(a)[cut]) for a in arrays)
    assert data is not None
    if inside is None:
        inside = ndimage.binary_fill_holes(data > HEAD_LEVEL * data.max())
    if not inside.any():
        raise InputError(path, "has no voxel inside the mask", "another mask, or a larger --crop")
    affine = turn.affine(image.affine, image.data.shape)
    return Head(name or images.stem(path), Volume(data, _moved(affine, cut)), inside, structure)


def _central(n: int, keep: int) -> slice:
    keep = min(keep, n) if keep else n
    return slice((n - keep) // 2, (n - keep) // 2 + keep)


def _moved(affine_44: np.ndarray, cut: Sequence[slice]) -> np.ndarray:
    """The affine of a part of an array."""
    moved = np.array(affine_44, float)
    moved[:3, 3] = (moved @ [*(c.start for c in cut), 1])[:3]
    return moved


def fit(head: Head, axis: int, ratio: float) -> Head:
    """The head without the last slices that no whole number of thick slices would give back."""
    spacing = head.image.spacing[axis]
    n = head.image.data.shape[axis]
    while n > 1 and not _returns(n, spacing, spacing * ratio):
        n -= 1
    cut = tuple(slice(0, n) if d == axis else slice(0, size) for d, size in enumerate(head.image.data.shape))
    label = None if head.label is None else head.label[cut]
    return Head(head.name, Volume(head.image.data[cut], head.image.affine), head.mask[cut], label)


def _returns(n: int, fine_mm: float, coarse_mm: float) -> bool:
    """Whether a grid of ``n`` comes back from the coarse one, not by a hair."""
    back = grid_size(n, fine_mm, coarse_mm) * coarse_mm / fine_mm
    return abs(back - n) < 0.49


# --- scores -------------------------------------------------------------------------------------------------------


def score_head(head: Head, generator: Generator, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per axis, ratio, noise level and tiling."""
    for axis, ratio in itertools.product(args.axis, args.ratio):
        fitted = fit(head, axis, ratio)
        spacing = fitted.image.spacing
        low_res: Triple = tuple(s * ratio if d == axis else s for d, s in enumerate(spacing))  # type: ignore[assignment]
        label_map = None if fitted.label is None else readers_map(fitted.label, spacing, low_res)
        for noise in args.noise:
            key = f"score {axis} {ratio:g} {noise:g}"
            scan = degrade(fitted.image.data, spacing, low_res, noise=noise, key=key, profile=args.scan_profile)
            spline = np.maximum(scan.interpolated, scan.low_res.min())
            baseline = _scores(spline, label_map, scan.hr, fitted)
            for patch, step in args.tiling:
                facts = {"head": head.name, "plane": PLANES[axis], "axis": axis, "ratio": ratio, "noise": noise}
                began = time.perf_counter()
                sr, seg = _infer(scan, fitted.image, low_res, generator, patch, step, args)
                seconds = time.perf_counter() - began
                own = _scores(sr, seg, scan.hr, fitted)
                facts |= {"tiling": tiling_name((patch, step)), "seconds": round(seconds, 2)}
                yield {**facts, "spline": baseline, "sr": own, "gain_db": own["psnr_inside"] - baseline["psnr_inside"]}


def _infer(
    scan: Degraded,
    truth: Volume,
    low_res: Triple,
    generator: Generator,
    patch: int | None,
    step: int,
    args: argparse.Namespace,
) -> tuple[np.ndarray, np.ndarray]:
    """SR and probability of the structure on the truth's grid."""
    affine = resampled_affine(truth.affine, truth.data.shape, scan.low_res.shape, low_res)
    done = infer_volume(
        scan.low_res,
        affine,
        generator,
        patch=patch,
        step=step,
        new_resolution=list(truth.spacing),
        device=args.device,
        precision=args.precision,
        agree=args.agree,
    )
    if done.sr.shape != scan.hr.shape or not np.allclose(done.affine, truth.affine, atol=1e-3):
        raise InputError("inference", f"its grid {done.sr.shape} is not the truth's {scan.hr.shape}", "another --ratio")
    return done.sr, done.prob[0]


def readers_map(label: np.ndarray, spacing: Triple, low_res: Triple) -> np.ndarray:
    """The label as drawn on the thick slices (bool there), cubic-spline interpolation of it."""
    shape = [grid_size(n, s, r) for n, s, r in zip(label.shape, spacing, low_res, strict=True)]
    down = [degrade_matrix(n, s, r) for n, s, r in zip(label.shape, spacing, low_res, strict=True)]
    sizes = zip(label.shape, shape, spacing, low_res, strict=True)
    up = [None if n == m else upsample_matrix(m, n, s / r) for n, m, s, r in sizes]
    drawn = apply_axes(label.astype(np.float32), down) > 0.5
    return apply_axes(drawn.astype(np.float32), up)


def _scores(image: np.ndarray, seg: np.ndarray | None, truth: np.ndarray, head: Head) -> dict[str, Any]:
    whole, inside = metrics.ssim_regions(image, truth, [None, head.mask])
    return {
        "psnr_whole": metrics.psnr(image, truth),
        "psnr_inside": metrics.psnr(image, truth, head.mask),
        "ssim_whole": whole,
        "ssim_inside": inside,
        "dice": None if head.label is None or seg is None else metrics.dice(seg, head.label),
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and worst gain per head and over all, for each tiling."""

    def of(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        worst = min(chosen, key=lambda r: r["gain_db"])
        where = {k: worst[k] for k in ("head", "plane", "ratio", "noise", "gain_db")}
        return {"cases": len(chosen), "mean_gain_db": statistics.fmean(r["gain_db"] for r in chosen), "worst": where}

    result: dict[str, Any] = {}
    for tiling in dict.fromkeys(r["tiling"] for r in rows):
        here = [r for r in rows if r["tiling"] == tiling]
        heads = {name: of([r for r in here if r["head"] == name]) for name in dict.fromkeys(r["head"] for r in here)}
        result[tiling] = {"all": of(here), "heads": heads}
    return result


# --- tables -------------------------------------------------------------------------------------------------------

# dB inside the mask; behind the gain: spline / SR, PSNR of the whole volume, SSIM inside, Dice of the label.
COLUMNS = ("head", "plane", "ratio", "noise", "tiling", "spline dB", "SR dB", "gain dB", "whole dB", "SSIM", "Dice")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; pairs are spline / SR."""
    spline, sr = row["spline"], row["sr"]

    def pair(name: str, digits: int) -> str:
        if spline[name] is None or sr[name] is None:
            return "-"
        return f"{spline[name]:.{digits}f} / {sr[name]:.{digits}f}"

    texts = [row["head"], row["plane"], f"{row['ratio']:g}", f"{row['noise']:g}", row["tiling"]]
    texts += [f"{spline['psnr_inside']:.2f}", f"{sr['psnr_inside']:.2f}", f"{row['gain_db']:+.2f}"]
    return [*texts, pair("psnr_whole", 2), pair("ssim_inside", 4), pair("dice", 3)]


def lines(table: Iterable[Sequence[str]], markdown: bool) -> Iterator[str]:
    """Markdown, or columns of equal width."""
    rows = [list(r) for r in table]
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    for i, r in enumerate(rows):
        padded = [text.ljust(w) for text, w in zip(r, widths, strict=True)]
        yield "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()
        if markdown and i == 0:
            yield "|" + "|".join("-" * (w + 2) for w in widths) + "|"


def summary_table(summary: dict[str, Any]) -> Iterator[list[str]]:
    """Mean and worst gain per tiling and head."""
    yield ["tiling", "head", "cases", "mean gain dB", "worst gain dB", "worst case"]
    for tiling, found in summary.items():
        for name, facts in (*found["heads"].items(), ("all", found["all"])):
            w = facts["worst"]
            case = f"{w['head']}, {w['plane']}, ratio {w['ratio']:g}, noise {w['noise']:g}"
            numbers = [str(facts["cases"]), f"{facts['mean_gain_db']:+.2f}", f"{w['gain_db']:+.2f}"]
            yield [tiling, name, *numbers, case]


def tiling_name(tiling: Tiling) -> str:
    """ "64:32"; "none:1" for one tile around everything."""
    return f"{tiling[0] or 'none'}:{tiling[1]}"


# --- command line -------------------------------------------------------------------------------------------------


def tiling(text: str) -> Tiling:
    """ "64:32" -> (64, 32); a patch of "none" takes the whole volume."""
    patch, _, step = text.partition(":")
    try:
        return None if patch == "none" else int(patch), int(step or 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: PATCH:STEP, for example 64:32, or none:1") from error


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("heads", nargs="*", metavar="IMAGE", help="high-resolution NIfTI images, none of them trained on")
    p.add_argument("-w", "--weights", help="weight file or run folder (the shipped one)")
    p.add_argument("--mask", nargs="+", default=[], metavar="FILE", help="region to score, one per head, - for none")
    p.add_argument("--label", nargs="+", default=[], metavar="FILE", help="the structure, one per head, - for none")
    p.add_argument("--synthetic", type=int, default=0, metavar="N", help="also N deformed MNI152 subjects with labels")
    p.add_argument(
        "--ratio", type=float, nargs="+", default=[2.0, 3.0, 4.0, 6.0], help="slice over voxel size (2 3 4 6)"
    )
    p.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.02], help="fraction of the maximum (0 0.02)")
    p.add_argument(
        "--axis", type=int, nargs="+", default=[2], choices=(0, 1, 2), help="slice axis: 0 R, 1 A, 2 S of the world (2)"
    )
    p.add_argument("--tiling", type=tiling, nargs="+", default=[(64, 32)], metavar="PATCH:STEP", help="(64:32)")
    p.add_argument("--crop", type=int, default=0, metavar="N", help="score the central N voxels per axis only")
    p.add_argument("--scan-profile", default="gaussian", choices=PROFILES, help="of the slices (gaussian)")
    p.add_argument(
        "--agree", type=word_or_number(AUTO, OFF), default=AUTO, metavar="W", help="as of fastsrgan infer (auto)"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:n")
    p.add_argument("--precision", default="fp32", help="fp32, bf16, fp16 or auto (fp32)")
    p.add_argument("--threads", type=int, help="for torch (all cores)")
    p.add_argument("--markdown", action="store_true", help="print the tables in Markdown, for the model card")
    p.add_argument("--json", metavar="FILE", help="write everything here")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Score and print; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except FastsrganError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(args: argparse.Namespace) -> int:
    if not args.heads and not args.synthetic:
        raise UsageError("heads", "none given", "name NIfTI images, or --synthetic 1")
    if min(args.ratio) < 1 or args.crop < 0:
        raise UsageError("--ratio", f"{args.ratio}, --crop {args.crop}", "ratios from 1 up, a crop of voxels or 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    pick_device(args.device)
    tune_allocator()
    path = args.weights or weights.default_weights()
    generator = weights.load_generator(path)
    facts = weights.info(path)
    facts["path"], facts["file"] = Path(facts["path"]).name, Path(facts["file"]).name
    rows = []
    for head in read_heads(args):
        for row in score_head(head, generator, args):
            rows.append(row)
            print("  ".join(cells(row)), f"{row['seconds']:.1f} s", file=sys.stderr, flush=True)
    summary = summarise(rows)
    for table in ([list(COLUMNS), *map(cells, rows)], summary_table(summary)):
        print(*lines(table, args.markdown), "", sep="\n")
    if args.json:
        report = {"weights": facts, "rows": rows, "summary": summary, "definitions": DEFINITIONS}
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "markdown", "weights")}
        settings["heads"] = [Path(head).name for head in args.heads]
        write_json(args.json, finite(report | {"settings": settings, "provenance": provenance()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
