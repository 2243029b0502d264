"""How others make the same patches: the original's preparation on disk, written anew from its description, TorchIO and
MONAI. Each peer is its law on one volume, for the comparison with ours, and its stream of epochs.

DIFFERENCES says what each of them does not do as fastsrgan does.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from bench.cohort import Epochs, Patches, Work, batches, forever
from fastsrgan.core.draws import rng
from fastsrgan.volume.resample import FWHM

Law = tuple[np.ndarray, np.ndarray, np.ndarray]  # interpolated, truth, label of one volume, (X, Y, Z)

DIFFERENCES = {
    "original": [
        "positions of patches are fastsrgan's, so that all sides make the same number; the original leaves out the last"
        " row of them, and the last plane of the bounding box",
        "one volume after the other on one core, all of them before the first batch; nothing is made ahead",
        "batches hold patches of one subject, two at its ends, and come in the order of the files; what is left over at"
        " the end of an epoch is dropped",
        "read with nibabel instead of SimpleITK; no prints",
    ],
    "torchio": [
        "whole volumes are read from .nii.gz and made in every epoch; fastsrgan reads a store that was converted before"
        " and interpolates the head's box only",
        "positions are uniform in the whole volume, air included (UniformSampler)",
        "the spline meets zeros outside the field of view; fastsrgan reflects",
        "noise and contrast come from the worker's generator: another number of workers gives other patches",
        "patches are mixed within a queue of two volumes; fastsrgan mixes all that are resident",
    ],
    "torchio, cropped": [
        "volumes are cropped to the head's box with a margin of 6 voxels and kept in memory from the first epoch on;"
        " fastsrgan reads its store in every epoch",
        "positions are uniform in what is left, margin included; all else as torchio",
    ],
    "torchio, linear, cropped": ["as torchio, cropped, with the linear interpolation of RandomAnisotropy"],
    "torchio, linear": ["as torchio, with the linear interpolation that RandomAnisotropy has by default"],
    "monai": [
        "whole volumes are read from .nii.gz and made in every epoch; fastsrgan reads a store that was converted before"
        " and interpolates the head's box only",
        "positions are uniform in the whole volume, air included (RandSpatialCropSamplesd)",
        "the Gaussian is integrated over a voxel (GaussianSmoothd, erf) with a width that makes up for it",
        "RandAdjustContrastd raises each image's own range to the power, so truth and input differ by a factor",
        "a spline of order 3 exists through SciPy only, one thread",
        "batches hold patches of one subject, two at its ends: RandSpatialCropSamplesd gives all of a volume at once;"
        " PatchDataset would load every volume in every worker",
    ],
    "monai, cropped": [
        "volumes are cropped to the head's box with a margin of 6 voxels and kept in memory (CacheDataset);"
        " fastsrgan reads its store in every epoch",
        "positions are uniform in what is left, margin included; all else as monai",
    ],
    "monai, trilinear, cropped": ["as monai, cropped, with the trilinear interpolation of torch (Resized)"],
    "monai, trilinear": ["as monai, with the trilinear interpolation of torch (Resized)"],
}
NEEDS = {name: name.partition(",")[0] for name in DIFFERENCES if name != "original"}


def parts(side: str) -> tuple[str, int]:
    """ "torchio of 32 a visit" -> "torchio", 32; 0 stands for all patches of an epoch."""
    name, _, visit = side.partition(" of ")
    return name, int(visit.split()[0]) if visit else 0


def missing(side: str) -> str | None:
    """What would make a peer run here; None when it does."""
    package = NEEDS.get(parts(side)[0])
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"pip install {package}"


def read(path: str) -> np.ndarray:
    """A NIfTI file's voxels as stored."""
    return np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]


def head_of(work: Work) -> tuple[slice, slice, slice]:
    """What peers keep of every volume when they crop: all heads of the cohort have one outline."""
    return work.part(read(work.image(work.names[0])))


# --- the original -------------------------------------------------------------------------------------------------


def original_law(work: Work, name: str, power: float = 1.0, noise: float = 0.0, key: tuple = (0,)) -> Law:
    """Crop, blur in voxels, decimate corner to corner, contrast, noise, clip, divide, zoom back; float64 throughout."""
    hr, label = (read(path).astype(np.float64)[work.cut] for path in (work.image(name), work.label(name)))
    lr = ndimage.gaussian_filter(hr, [r / FWHM for r in work.low_res])
    lr = ndimage.zoom(lr, [1 / r for r in work.low_res], order=0)
    hr, lr = hr**power, np.maximum(lr, 0) ** power
    if noise:
        lr = lr + rng(*key).normal(0, noise * lr.max(), lr.shape)
    lr = np.maximum(lr, 0)
    scale = lr.max()
    return ndimage.zoom(lr / scale, work.low_res, order=3), hr / scale, label


def original_patches(work: Work, name: str, *draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """(N, 1, P, P, P) and (N, 2, P, P, P) float64 of one volume, in the order of the grid."""
    interpolated, hr, label = original_law(work, name, *draw)
    p = work.patch

    def cut(volume: np.ndarray) -> np.ndarray:
        return np.stack([volume[i : i + p, j : j + p, k : k + p] for i, j, k in work.origins(hr)])

    return cut(interpolated)[:, None], np.swapaxes(np.stack([cut(hr), cut(label)]), 0, 1)


def original(work: Work) -> Epochs:
    """Every epoch: all volumes to files of one batch each, then the files one by one."""
    return forever(lambda epoch: _original_epoch(work, epoch))


def _original_epoch(work: Work, epoch: int) -> Iterator[Patches]:
    folder = Path(tempfile.mkdtemp(prefix="mini-batches-"))
    try:
        for data, label in _write_mini_batches(work, epoch, folder):
            yield Patches(*(torch.from_numpy(np.load(path)).float() for path in (data, label)))
    finally:
        shutil.rmtree(folder)


def _write_mini_batches(work: Work, epoch: int, folder: Path) -> list[tuple[Path, Path]]:
    files: list[tuple[Path, Path]] = []
    left: list[np.ndarray] = []
    for name in work.names:
        power = 1 + work.contrast * (2 * rng(work.seed, epoch, name, "contrast").random() - 1)
        arrays = original_patches(work, name, power, work.noise, (work.seed, epoch, name, "noise"))
        order = rng(work.seed, epoch, name, "order").permutation(len(arrays[0]))
        shuffled = [a[order] for a in arrays]
        joined = [np.concatenate(pair) for pair in zip(left, shuffled, strict=True)] if left else shuffled
        while len(joined[0]) >= work.batch:
            files.append((folder / f"data_{len(files)}.npy", folder / f"label_{len(files)}.npy"))
            for path, array in zip(files[-1], joined, strict=True):
                np.save(path, array[: work.batch])
            joined = [array[work.batch :] for array in joined]
        left = joined
    return files


# --- TorchIO ------------------------------------------------------------------------------------------------------


class TorchioLaw:
    """The degradation of one subject out of TorchIO's own transforms: RandomAnisotropy's two steps, with what the
    observation model has before, between and after them."""

    def __init__(self, work: Work, interpolation: str) -> None:
        self.work, self.interpolation = work, interpolation

    def __call__(self, subject: Any) -> Any:
        import torchio as tio

        work, hr = self.work, subject["hr"]
        only, sigma = {"include": ["lr"]}, [r / FWHM if r > 1 else 0.0 for r in work.low_res]
        shape, affine = hr.spatial_shape, hr.affine.copy()
        subject.add_image(tio.ScalarImage(tensor=hr.data.float(), affine=affine), "lr")
        hr.set_data(hr.data.float())
        subject = tio.Blur(tuple(sigma), **only)(subject)
        subject = tio.Resample(work.low_res, image_interpolation="nearest", **only)(subject)
        power = 1 + work.contrast * (2 * float(torch.rand(1)) - 1)
        subject = tio.Gamma({"lr": power, "hr": power}, include=["lr", "hr"])(subject)
        std = work.noise * float(subject["lr"].data.max())
        seed = int(torch.randint(2**31, (1,)))
        subject = tio.Noise({"lr": 0.0}, {"lr": std}, {"lr": seed}, **only)(subject) if std else subject
        subject = tio.Clamp(out_min=0, **only)(subject)
        scale = subject["lr"].data.max()
        for name in ("lr", "hr"):
            subject[name].set_data(subject[name].data / scale)
        return tio.Resample((shape, affine), image_interpolation=self.interpolation, **only)(subject)


def _torchio_subject(work: Work, name: str, cropped: bool) -> Any:
    import torchio as tio

    image, label = tio.ScalarImage(work.image(name)), tio.LabelMap(work.label(name))
    subject = tio.Subject(hr=image, label=label, num_samples=work.patches)
    if not cropped:
        return subject
    part = head_of(work)
    away = [n for axis, size in zip(part, work.shape, strict=True) for n in (axis.start, size - axis.stop)]
    kept = tio.Crop(tuple(away))(subject)
    images = {key: type(kept[key])(tensor=kept[key].data, affine=kept[key].affine) for key in ("hr", "label")}
    return tio.Subject(**images, num_samples=work.patches)  # without its files, so it is in memory


def torchio_law(work: Work, name: str, interpolation: str, cropped: bool = False) -> Law:
    """TorchIO's pipeline on one volume."""
    done = TorchioLaw(work, interpolation)(_torchio_subject(work, name, cropped))
    return tuple(done[key].data[0].numpy() for key in ("lr", "hr", "label"))  # type: ignore[return-value]


def torchio(work: Work, interpolation: str = "bspline", cropped: bool = False) -> Epochs:
    """TorchIO's queue: volumes from worker processes, patches cut and shuffled in the main one."""
    import torchio as tio

    dataset = tio.SubjectsDataset(
        [_torchio_subject(work, name, cropped) for name in work.names], transform=TorchioLaw(work, interpolation)
    )
    queue = tio.Queue(
        dataset,
        max_length=work.patches * min(work.subjects, 2),
        samples_per_volume=work.patches,
        sampler=tio.UniformSampler(work.patch),
        num_workers=work.workers,
    )

    def epoch(_: int) -> Iterator[Patches]:
        loader = tio.SubjectsLoader(queue, batch_size=work.batch, num_workers=0)
        return batches(((b["lr"]["data"], b["hr"]["data"], b["label"]["data"]) for b in loader), work.batch)

    return forever(epoch)


# --- MONAI --------------------------------------------------------------------------------------------------------


def divide(item: dict[str, Any]) -> dict[str, Any]:
    """Both images divided by the largest value of the low-resolution one."""
    scale = item["lr"].max()
    return {**item, "lr": item["lr"] / scale, "hr": item["hr"] / scale}


def monai_law_transforms(work: Work, interpolation: str, cropped: bool) -> list[Any]:
    """The degradation out of MONAI's dictionary transforms; the label is only read."""
    from monai import transforms as mt

    images, crop, shape = ["hr", "label"], [], work.shape
    if cropped:
        start, end = zip(*((axis.start, axis.stop) for axis in head_of(work)), strict=True)
        crop, shape = [mt.SpatialCropd(images, roi_start=start, roi_end=end)], tuple(np.subtract(end, start).tolist())
    low = [round(n / r) for n, r in zip(shape, work.low_res, strict=True)]
    # The erf kernel is a Gaussian integrated over a voxel, which adds the variance of a voxel, 1/12.
    sigma = [math.sqrt((r / FWHM) ** 2 - 1 / 12) if r > 1 else 0.0 for r in work.low_res]
    up = mt.Resized(["lr"], spatial_size=shape, mode="trilinear", align_corners=False)
    if interpolation == "spline":
        up = mt.ResampleToMatchd(
            ["lr"], key_dst="hr", mode=3, padding_mode="reflect", align_corners=False, dtype=np.float32
        )
    return [
        mt.LoadImaged(images, image_only=True),
        mt.EnsureChannelFirstd(images),
        *crop,
        mt.CastToTyped(["hr"], dtype=torch.float32),
        mt.CopyItemsd(["hr"], 1, ["lr"]),
        mt.GaussianSmoothd(["lr"], sigma=sigma),
        mt.Resized(["lr"], spatial_size=low, mode="nearest-exact"),
        divide,
        mt.RandAdjustContrastd(["hr", "lr"], prob=1.0, gamma=(1 - work.contrast, 1 + work.contrast)),
        mt.RandGaussianNoised(["lr"], prob=1.0, std=work.noise, sample_std=False),
        mt.ThresholdIntensityd(["lr"], threshold=0.0, above=True, cval=0.0),
        divide,
        up,
    ]


def monai_law(work: Work, name: str, interpolation: str, cropped: bool = False) -> Law:
    """MONAI's pipeline on one volume."""
    from monai.transforms import Compose

    done = Compose(monai_law_transforms(work, interpolation, cropped))(
        {"hr": work.image(name), "label": work.label(name)}
    )
    return tuple(np.asarray(done[key][0]) for key in ("lr", "hr", "label"))  # type: ignore[return-value]


def monai(work: Work, interpolation: str = "spline", cropped: bool = False) -> Epochs:
    """MONAI's data loader: volumes and their patches from worker processes, a volume at a time. Cropped volumes are
    kept by ``CacheDataset``, which keeps what comes before the first random transform, or transform that is none."""
    from monai import transforms as mt
    from monai.data import CacheDataset, DataLoader, Dataset

    keys = ["lr", "hr", "label"]
    crop = mt.RandSpatialCropSamplesd(keys, roi_size=[work.patch] * 3, num_samples=work.patches, random_size=False)
    plain = mt.EnsureTyped(keys, track_meta=False)  # what the crops need not carry along
    transform = mt.Compose([*monai_law_transforms(work, interpolation, cropped), plain, crop])
    files = [{"hr": work.image(name), "label": work.label(name)} for name in work.names]
    loader = DataLoader(
        CacheDataset(files, transform, progress=False) if cropped else Dataset(files, transform),
        batch_size=1,
        shuffle=True,
        num_workers=work.workers,
        persistent_workers=work.workers > 0,
    )
    return forever(lambda _: batches(((b["lr"], b["hr"], b["label"]) for b in loader), work.batch))
