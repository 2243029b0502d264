"""What the thresholds of the traffic light were taken from: `python tools/plausibility_figures.py CASES.json [...]`.

    python tools/plausibility_figures.py CASES.json                  # looks at scans and labels: quick
    python tools/plausibility_figures.py CASES.json -w adult --infer 4 --json FIGURES.json

CASES.json: {"name": {"image": "x.nii.gz", "labels": "x_labels.nii.gz", "structure": [3, 42]}, ...}, paths relative to
it, as tools/label_heads.py writes it; "mask" limits a scan to its head. A case with labels is a sharp image: it is
looked at as slices 3 and 6 voxels thick along its third axis (Gaussian), without noise and with 3 % of the maximum.
Without labels it is a scan and looked at as it is, and in its mask.

One line a scan: what `evaluate.plausibility.measure` sees, the fullest and third fullest border plane, of labels their
volume, share of the head and `enclosed`, with --infer those of what `fastsrgan infer -w WEIGHTS` makes of the scans of
that ratio (0: of scans as they are), the share of its two largest pieces (`made_whole`) and its light. Then smallest
and largest of each column, per kind (the name without its first word).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import write_json
from fastsrgan.core.system import provenance
from fastsrgan.errors import counted
from fastsrgan.evaluate import plausibility
from fastsrgan.infer.files import infer_files
from fastsrgan.io import nifti as images
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.head import tissue_level
from fastsrgan.volume.resample import apply_axes, slice_profile_matrix

RATIOS, NOISES = (3, 6), (0.0, 0.03)


@dataclass(frozen=True)
class Scan:
    """A scan of a case.

    ratio : 0 where it is as it was acquired; labels, image : of the sharp image, cut as the scan
    """

    kind: str
    ratio: int
    noise: float
    volume: Volume
    mask: Path | None = None
    image: np.ndarray | None = None
    labels: np.ndarray | None = None


def scans(name: str, case: dict[str, Any], folder: Path, ratios: tuple[int, ...]) -> Iterator[Scan]:
    """Every scan of a case."""
    kind = name.partition(" ")[2] or name
    whole = images.load(folder / case["image"])
    mask = folder / case["mask"] if "mask" in case else None
    if "labels" not in case:
        yield Scan(kind, 0, 0.0, whole)
        if mask:
            yield Scan(f"{kind} masked", 0, 0.0, whole, mask)
        return
    there = images.load_label(folder / case["labels"], largest=65535)
    sharp, inside = whole.data.astype(np.float32), np.isin(there.data, case["structure"])
    for ratio in ratios:
        n = sharp.shape[2] // ratio * ratio
        low = apply_axes(sharp[:, :, :n], [None, None, slice_profile_matrix(n, n // ratio, float(ratio), 1.0, 0.0)])
        affine = whole.affine @ np.diag([1, 1, ratio, 1])
        affine[:3, 3] += whole.affine[:3, 2] * (ratio - 1) / 2
        for noise in NOISES:
            drawn = np.random.default_rng(0).normal(0, noise * float(low.max()), low.shape)
            scan = np.clip(low + drawn, 0, None).astype(np.float32)
            yield Scan(kind, ratio, noise, Volume(scan, affine), None, sharp[:, :, :n], inside[:, :, :n])


def looked(scan: Scan) -> dict[str, float]:
    """The numbers of a scan and of its labels."""
    volume = scan.volume
    mask = images.load_label(scan.mask, like=volume).data if scan.mask else None
    look = plausibility.measure(volume.data, volume.spacing, mask)
    data = volume.data if mask is None else np.where(mask > 0, volume.data, 0)
    level = tissue_level(data.astype(np.float32))
    planes = sorted(float(np.mean(data.take(end, axis) > level)) for axis in range(3) for end in (0, -1))
    found = look.to_dict() | {"fullest_plane": planes[-1], "third_plane": planes[-3]}
    if scan.labels is not None and scan.image is not None:
        spacing = (*volume.spacing[:2], volume.spacing[2] / scan.ratio)
        found["label_ml"] = float(scan.labels.sum() * np.prod(spacing) / 1000)
        found["label_share"] = found["label_ml"] / look.head_ml
        found["label_encloses"] = plausibility.enclosed(scan.image, scan.labels, spacing) or 0.0
    return found


def inferred(scan: Scan, weights: str) -> dict[str, Any]:
    """The same of what `infer` makes of it, and the light."""
    with tempfile.TemporaryDirectory() as place:
        path = images.save(Path(place) / "scan.nii.gz", scan.volume.data, scan.volume.affine)
        mask = None if scan.mask is None else str(scan.mask)
        out = Path(infer_files([path], Path(place) / "out", weights, mask=mask, device="cpu")["out_dir"])
        record = json.loads((out / "scan.json").read_text(encoding="utf8"))
        told, whole = record["plausibility"], record.get("segmentation", {}).get("two_largest_share", 0.0)
        seg = images.load_label(out / "scan_seg.nii.gz")
        ml = float(seg.data.sum() * np.prod(seg.spacing) / 1000)
        within = plausibility.enclosed(images.load(out / "scan_sr.nii.gz").data, seg.data, seg.spacing)
    share = ml / told["scan"]["head_ml"] if told["scan"]["head_ml"] else 0.0
    made = {"made_ml": ml, "made_share": share, "made_encloses": within or 0.0, "made_whole": whole}
    return made | {"light": told["light"]}


def main() -> None:
    """Every case, then the ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path)
    parser.add_argument("-w", "--weights", default="adult")
    parser.add_argument("--infer", type=int, metavar="RATIO", help="infer scans of this ratio, without noise; 0: as is")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for path in args.cases:
        for name, case in json.loads(path.read_text(encoding="utf8")).items():
            ratios = RATIOS if not args.infer else tuple(sorted({*RATIOS, args.infer}))
            for scan in scans(name, case, path.parent, ratios):
                row = {"case": name, "kind": scan.kind, "ratio": scan.ratio, "noise": scan.noise} | looked(scan)
                if scan.ratio == args.infer and not scan.noise:
                    row |= inferred(scan, args.weights)
                rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
                print(json.dumps(rows[-1]), flush=True)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        ours = [row for row in rows if row["kind"] == kind]
        names = dict.fromkeys(k for row in ours for k, v in row.items() if not isinstance(v, str))
        values = {n: [row[n] for row in ours if n in row] for n in names if n not in ("ratio", "noise")}
        print(
            f"{kind} ({counted(len(ours), 'scan')}):",
            ", ".join(f"{n} {min(v):g} to {max(v):g}" for n, v in values.items()),
        )
    told = {"weights": args.weights, "rows": rows, "provenance": provenance()}
    if args.json:
        write_json(args.json, told)
    print(told["provenance"])


if __name__ == "__main__":
    main()
