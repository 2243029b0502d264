"""The original's Python function with its own arguments, numbers and files.

``from fastsrgan.compat import segmentation`` takes the place of the original's import. Nothing here, nor anything that
the package imports, looks for the network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from fastsrgan.config import CHOICES
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.errors import InputError, UsageError
from fastsrgan.infer.volume import InferResult, Interpolate, Spacing, infer_volume
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import Generator
from fastsrgan.volume.geometry import Volume
from fastsrgan.volume.resample import Matrix, apply_axes
from fastsrgan.volume.resample_sitk import check_interpolator, expand_matrix, whole_factor

DONE = "Segmentation Done"  # what the original returns


def segmentation(
    input_file_path: str | os.PathLike,
    step: int,
    new_resolution: float | Sequence[float],
    path_output_cortex: str | os.PathLike,
    path_output_hr: str | os.PathLike,
    path_output_mask: str | os.PathLike | None,
    weights_path: str | os.PathLike,
    interpolation_type: str | Sequence[str] = "Spline",
    patch: int | None = None,
    spline_order: int = 3,
    by_batch: bool = False,
    interp: str = "scipy",
    *,
    geometry: str = "segsrgan",
    series: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    progress: Progress = QUIET,
) -> str:
    """Super-resolve and segment one image, as the original does.

    Parameters
    ----------
    input_file_path : .nii.gz, .nii, .hdr / .img, or a DICOM folder
    step, patch : of the tiles in voxels; patch None takes the whole image at once
    new_resolution : voxel size of the results in mm, one or three
    path_output_cortex : gets the averaged probability of the structure, float64
    path_output_hr : gets the super-resolved image, float32
    path_output_mask : gets the likeliest mask class, float64, where the model has a mask head; else unused
    weights_path : Keras HDF5 of the original, or any other weights
    interpolation_type : the interpolator of ``interp="sitk"``, one of ``resample_sitk.INTERPOLATORS``
    spline_order : of ``interp="scipy"``, 0 to 5
    by_batch : tiles go through the network together, as many as memory takes, instead of one after the other; the
        numbers are the same
    interp : "scipy", zoom by a spline; "sitk", SimpleITK's Expand by rounded factors
    geometry, series, device, precision : see ``infer.infer_volume`` and ``dicom.select``. "physical" puts every voxel
        where it is; the default gives the original's numbers.

    Returns
    -------
    "Segmentation Done". Existing outputs are replaced, as by the original.

    Raises
    ------
    UsageError, InputError, ModelError, ResourceError
    """
    interpolate = interpolation(interp, interpolation_type, spline_order, geometry)
    generator = weights.load_generator(weights_path)
    outputs = {"Cortex": Path(path_output_cortex), "SR": Path(path_output_hr)}
    if generator.spec.mask_classes:
        if path_output_mask is None:
            raise UsageError("path_output_mask", "is not given, but the model has a mask head", "name a .nii.gz file")
        outputs["Mask"] = Path(path_output_mask)
    for target in outputs.values():
        images.check_output(target, overwrite=True)
    image = any_image.load_any(input_file_path, series=series)
    result = apply(
        image, generator, patch=patch, step=step, new_resolution=new_resolution, interpolate=interpolate,
        by_batch=by_batch, geometry=geometry, device=device, precision=precision, progress=progress,
        label=Path(input_file_path).name,
    )  # fmt: skip
    write(outputs, result, image)
    return DONE


def interpolation(
    interp: str, interpolation_type: str | Sequence[str] = "Spline", spline_order: int = 3, geometry: str = "segsrgan"
) -> Interpolate | None:
    """How the input gets onto the new grid; None for the cubic spline, which ``infer_volume`` has itself.

    Raises UsageError for what does not exist. A list of interpolators, which is the original's default and fails
    there with sitk, stands for Spline.
    """
    kind = interpolation_type if isinstance(interpolation_type, str) else "Spline"
    if interp not in CHOICES["interp"]:
        raise UsageError("interp", f"{interp!r} is not allowed", f"one of {', '.join(CHOICES['interp'])}")
    if spline_order not in range(6):
        raise UsageError("spline order", f"{spline_order!r} is not allowed", "0 to 5")
    check_interpolator(kind)
    if interp == "scipy" and spline_order == 3:
        return None
    if geometry != "segsrgan":
        reason = "only the segsrgan geometry has others than the cubic spline"
        raise UsageError("interpolation", reason, "--geometry segsrgan")
    if interp == "sitk":
        return lambda volume, spacing, wanted: expanded(volume, spacing, wanted, kind)
    return lambda volume, spacing, wanted: zoomed(volume, spacing, wanted, spline_order)


def expanded(volume_XYZ: np.ndarray, spacing: Spacing, wanted: Spacing, kind: str) -> tuple[np.ndarray, Spacing]:
    """SimpleITK's Expand by the rounded factors; the voxel size that comes out is the input's over these factors."""
    factors = [whole_factor(s, w) for s, w in zip(spacing, wanted, strict=True)]
    matrices: list[Matrix] = [expand_matrix(n, k, kind) for n, k in zip(volume_XYZ.shape, factors, strict=True)]
    x, y, z = (s / k for s, k in zip(spacing, factors, strict=True))
    return apply_axes(volume_XYZ, matrices), (x, y, z)


def zoomed(volume_XYZ: np.ndarray, spacing: Spacing, wanted: Spacing, order: int) -> tuple[np.ndarray, Spacing]:
    """SciPy's zoom with a spline of another order."""
    factors = [s / w for s, w in zip(spacing, wanted, strict=True)]
    return np.ascontiguousarray(ndimage.zoom(volume_XYZ, factors, order=order), np.float32), wanted


def apply(image: Volume, generator: Generator, *, by_batch: bool | None, label: str, **settings) -> InferResult:
    """``infer_volume`` of a loaded image. ``by_batch`` True and None let the engine choose the batch, False is 1."""
    settings |= {"batch": 1 if by_batch is False else "auto", "agree": "off"}  # the network's own, as the original's
    try:
        return infer_volume(image.data, image.affine, generator, label=label, **settings)
    except InputError as error:
        raise InputError(image.meta.get("path", label), error.reason, error.hint) from error


def write(outputs: dict[str, Path], result: InferResult, image: Volume) -> None:
    """The files of a result in the types of the original: SR float32, Cortex float64, Mask float64."""
    arrays = {"SR": result.sr, "Cortex": result.prob[0]}
    if "Mask" in outputs:
        arrays["Mask"] = result.prob[1:].argmax(axis=0)
    for kind, target in outputs.items():
        dtype = np.float32 if kind == "SR" else np.float64
        code = image.meta.get("space_code", 1)
        images.save(target, arrays[kind], result.affine, dtype=dtype, overwrite=True, code=code)
