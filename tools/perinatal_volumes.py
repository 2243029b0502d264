"""Training volumes of the perinatal model: `python tools/perinatal_volumes.py ATLAS -o DIR --volumes 60 [--smooth]`.

ATLAS holds NAME_T2w.nii.gz and NAME_tissues.nii.gz (1 white matter, 2 ventricles, 3 cerebellum, 4 outer fluid,
5 cortex, 6 deep grey matter, 7 brainstem, 8 corpus callosum), as the spatio-temporal atlas of the fetal brain with
spina bifida aperta has them (Fidon et al. 2021, CC0). DIR gets images (int16), labels of the cortex and table.csv for
`fastsrgan convert`; volumes that are there are kept. --hold-out names brains that stay out.

Each volume is one brain under rotation, scaling by 0.72 to 1.4 (ages and voxel sizes), a smooth deformation and a bias
field; in 45 % its intensities are drawn about the tissues' own means, or freely; in 35 % it gets fluid, skull and
scalp, so that a scan need not be stripped. --smooth is the second stage: images less often sharpened, often smoother
than the atlas. --strip is the fifth: without a head around it, a brain loses its outer fluid, wholly or but for a rim,
in 40 %, and has a darker one in 30 %, as brain extraction and other sequences leave it. --maps is the sixth: the brains
are those of FOLDER (NAME_tissues.nii.gz of tools/folded_tissues.py, without images), scaled by 0.7 to 1.05; their
intensities are drawn about the means of ATLAS, or freely. Everything follows from the number of the volume.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from fastsrgan.core.files import atomic_write

CORTEX, FLUID, VOXEL_MM, LARGEST = 5, 4, 0.8, 150
SCALES, MAPS = (0.72, 1.4), (0.7, 1.05)  # of the atlas's brains and of those of --maps
HELD_OUT = ["GA34_operated", "GA25_notoperated"]
FULL = 20000  # the stored value of intensity 1


def load(path: Path) -> np.ndarray:
    """(X, Y, Z) in RAS order."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.squeeze(np.asarray(image.dataobj))


def smooth_field(draw: np.random.Generator, shape: list[int], points: int, sd: float) -> np.ndarray:
    """(3, X, Y, Z) of Gaussian control points, cubic in between."""
    control = draw.normal(0, sd, (3, points, points, points)).astype(np.float32)
    zoomed = [ndimage.zoom(c, [n / points for n in shape], order=3, mode="nearest") for c in control]
    return np.stack([z[: shape[0], : shape[1], : shape[2]] for z in zoomed])


def texture(draw: np.random.Generator, shape: list[int], sigma: float) -> np.ndarray:
    """Noise of one size, standard deviation 1."""
    noise = ndimage.gaussian_filter(draw.normal(size=shape).astype(np.float32), sigma)
    return noise / noise.std()


def places(
    draw: np.random.Generator, tissues: np.ndarray, head: bool, scales: tuple[float, float]
) -> tuple[np.ndarray, list[int]]:
    """Where each voxel of the new volume lies in the atlas, (3, X, Y, Z), and its size."""
    inside = np.argwhere(tissues > 0)
    low, high = inside.min(0), inside.max(0) + 1
    scale = float(np.exp(draw.uniform(*np.log(scales))))
    pad = 18 if head else 6
    size = [min(LARGEST, int(np.ceil((h - m) * scale * 1.08)) + 2 * pad) for m, h in zip(low, high, strict=True)]
    turn = np.eye(3)
    for axis, angle in enumerate(draw.uniform(-1, 1, 3) * np.deg2rad(18)):
        one, other = [d for d in range(3) if d != axis]
        step = np.eye(3)
        step[[one, one, other, other], [one, other, one, other]] = (
            np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        )  # fmt: skip
        turn = turn @ step
    matrix = turn @ np.diag(draw.uniform(0.92, 1.08, 3)) / scale
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in size], indexing="ij"))
    centre = np.array([(n - 1) / 2 for n in size])[:, None, None, None]
    at = np.tensordot(matrix, grid - centre, (1, 0)) + ((low + high - 1) / 2)[:, None, None, None]
    at = at + smooth_field(draw, size, 5, draw.uniform(0.5, 2.2)) + smooth_field(draw, size, 9, draw.uniform(0, 0.8))
    if draw.random() < 0.5:
        at[0] = (low[0] + high[0] - 1) - at[0]
    return at.astype(np.float32), size


def drawn_contrast(
    draw: np.random.Generator, labels: np.ndarray, means: np.ndarray, sds: np.ndarray, smooth: bool
) -> np.ndarray:
    """An image whose structures have intensities about the tissues' own, or free ones with a visible cortex."""
    own = draw.random() < 0.7
    if own:
        chosen = means + draw.normal(0, 0.10, 8)
        chosen[7] = chosen[0] * draw.uniform(0.75, 1.0)
    else:
        chosen = draw.uniform(0.15, 1.0, 8)
        while min(abs(chosen[4] - chosen[0]), abs(chosen[4] - chosen[3])) < 0.12:
            chosen = draw.uniform(0.15, 1.0, 8)
    spread = np.clip(sds * draw.uniform(0.3, 0.9), 0.015, 0.09)
    of_mean, of_sd = (np.concatenate([[0], v]).astype(np.float32) for v in (chosen, spread))
    shape = list(labels.shape)
    rough = 0.6 * texture(draw, shape, draw.uniform(0.5, 1.0)) + 0.7 * texture(draw, shape, 5)
    image = of_mean[labels] + of_sd[labels] * rough
    image = ndimage.gaussian_filter(image, draw.uniform(0.4, 1.3) if smooth else draw.uniform(0.35, 0.75))
    return np.where(labels > 0, np.maximum(image, 0.01), 0)


def own_contrast(draw: np.random.Generator, image: np.ndarray, labels: np.ndarray, smooth: bool) -> np.ndarray:
    """The atlas's image, sharpened, smoothed or roughened: an atlas is smoother than a person."""
    image = np.where(labels > 0, np.clip(image, 0, None), 0)
    if draw.random() < (0.25 if smooth else 0.5):
        image = image + draw.uniform(0.2, 0.8) * (image - ndimage.gaussian_filter(image, 1.0))
    elif smooth and draw.random() < 0.5:
        image = ndimage.gaussian_filter(image, draw.uniform(0.3, 1.1))
    image = np.where(labels > 0, np.clip(image, 0, None), 0)
    if draw.random() < (0.35 if smooth else 0.6):
        rough = draw.uniform(0, 0.035) * texture(draw, list(labels.shape), draw.uniform(0.5, 0.9))
        image = np.where(labels > 0, np.clip(image + rough, 0.005, None), 0)
    return image


def with_head(draw: np.random.Generator, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The brain within fluid, bone, scalp and sometimes muscle below."""
    shape = list(labels.shape)
    outside = labels == 0
    distance = ndimage.distance_transform_edt(outside).astype(np.float32) + 2 * smooth_field(draw, shape, 6, 0.7)[0]
    edges = np.cumsum(draw.uniform([0.5, 1.0, 2.0], [3.0, 3.5, 7.0]))
    rough = texture(draw, shape, draw.uniform(0.6, 2))
    values = [draw.uniform(0.6, 1.0), draw.uniform(0.03, 0.25), draw.uniform(0.25, 0.95)]
    shell = np.select([distance < e for e in edges], values, 0.0).astype(np.float32)
    shell = np.where(shell > 0, np.clip(shell * (1 + 0.12 * rough), 0.01, None), 0)
    if draw.random() < 0.5:
        below = (np.arange(shape[2]) < shape[2] * draw.uniform(0.1, 0.35)) & outside & (distance < 25)
        muscle = np.clip(draw.uniform(0.2, 0.7) * (1 + 1.5 * ndimage.gaussian_filter(rough, 2)), 0.02, 1.2)
        shell = np.where(below & (distance >= edges[1]), muscle, shell)
    return np.where(outside, ndimage.gaussian_filter(shell, 0.6), image)


def with_other_fluid(draw: np.random.Generator, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The brain without its outer fluid, with a rim of it, with a darker one, or as it was."""
    kind = draw.random()
    if kind < 0.4:
        tissue = (labels > 0) & (labels != FLUID)
        rim = draw.uniform(0, 2.5) + smooth_field(draw, list(labels.shape), 6, 0.7)[0] if draw.random() < 0.6 else 0.0
        return np.where(tissue | (ndimage.distance_transform_edt(~tissue) < rim), image, 0)
    if kind < 0.7:
        amount = ndimage.gaussian_filter((labels == FLUID).astype(np.float32), 0.5)
        return image * (1 - amount * draw.uniform(0.1, 0.7))
    return image


def read_atlas(
    folder: Path, held_out: list[str]
) -> tuple[list[tuple[np.ndarray | None, np.ndarray]], np.ndarray, np.ndarray]:
    """Image and tissues of each brain, and mean and standard deviation of the eight tissues."""
    brains: list[tuple[np.ndarray | None, np.ndarray]] = []
    facts = []
    for path in sorted(folder.glob("*_T2w.nii.gz")):
        name = path.name[: -len("_T2w.nii.gz")]
        if name in held_out:
            continue
        image = load(path).astype(np.float32)
        image = np.clip(image / np.percentile(image[image > 0], 99.9), 0, 1.3)
        tissues = load(folder / f"{name}_tissues.nii.gz").astype(np.uint8)
        brains.append((image, tissues))
        held = [image[tissues == value] for value in range(1, 9)]
        facts.append([(v.mean(), v.std()) if v.size else (np.nan, np.nan) for v in held])
    means, sds = np.nanmean(facts, 0).T
    return brains, means, sds


def main() -> None:
    """One volume after the other; those that are there are kept."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("atlas", type=Path)
    p.add_argument("-o", "--out", type=Path, required=True)
    p.add_argument("--volumes", type=int, default=60)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--seed", type=int, default=77)
    p.add_argument("--hold-out", nargs="*", default=HELD_OUT, metavar="NAME")
    p.add_argument("--smooth", action="store_true")
    p.add_argument("--strip", action="store_true")
    p.add_argument("--maps", type=Path, metavar="FOLDER")
    args = p.parse_args()
    brains, means, sds = read_atlas(args.atlas, args.hold_out)
    if args.maps:
        found = sorted(args.maps.glob("*_tissues.nii.gz"))
        brains = [(None, load(path).astype(np.uint8)) for path in found]
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(args.first, args.first + args.volumes):
        files = [args.out / f"p{number:03d}{end}.nii.gz" for end in ("", "_cortex")]
        rows.append(f"{files[0].name},{files[1].name},{'Test' if number % 24 == 23 else 'Train'}")
        if all(file.exists() for file in files):
            continue
        draw = np.random.default_rng((args.seed, number))
        image, tissues = brains[number % len(brains)]
        head = draw.random() < 0.35
        at, size = places(draw, tissues, head, MAPS if args.maps else SCALES)
        labels = ndimage.map_coordinates(tissues, at, order=0)
        cortex = ndimage.map_coordinates((tissues == CORTEX).astype(np.float32), at, order=1) > 0.5
        if draw.random() < 0.45 or image is None:
            made = drawn_contrast(draw, labels, means, sds, args.smooth)
        else:
            made = own_contrast(draw, ndimage.map_coordinates(image, at, order=3), labels, args.smooth)
        if head:
            made = with_head(draw, made, labels)
        elif args.strip:
            made = with_other_fluid(draw, made, labels)
        if draw.random() < 0.6:
            made = made * np.exp(draw.uniform(0, 0.35) * smooth_field(draw, size, 3, 0.6)[0])
        made = np.minimum(made / max(np.percentile(made[made > 0], 99.95), 1e-6), 1.6 if draw.random() < 0.2 else 1.15)
        affine = np.diag([VOXEL_MM, VOXEL_MM, VOXEL_MM, 1.0])
        for file, data in zip(files, (np.round(made * FULL).astype(np.int16), cortex.astype(np.uint8)), strict=True):
            with atomic_write(file) as temporary:
                nib.save(nib.Nifti1Image(data, affine), temporary)
        print(f"{number - args.first + 1}/{args.volumes} {files[0].name} {made.shape}", flush=True)
    (args.out / "table.csv").write_text("\n".join(["HR_image,Label_image,Base", *rows]) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
