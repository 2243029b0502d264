"""What the results of images will take on the disk, asked for before the first of them is computed (FAULTS 24)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastsrgan.core.files import need_space
from fastsrgan.errors import FastsrganError
from fastsrgan.infer.image import Job
from fastsrgan.infer.interpolated import target_spacing
from fastsrgan.io import dicom, formats
from fastsrgan.io import nifti as images
from fastsrgan.io.image_list import Image, size_of
from fastsrgan.volume.geometry import grid_size, spacing_of

PACKED = 0.125  # bytes that gzip leaves of a label; of measured numbers, as SR and probabilities are, nothing is saved


def need_room(found: Sequence[Image], job: Job) -> None:
    """Refuse to begin what the disk of the output folder cannot hold; raises ResourceError.

    Images that a resumed call will find finished are not counted.
    """
    todo = [image for image in found if not (job.resume and job.record(image).exists())]
    need_space(job.out, sum(bytes_of(image, job) for image in todo))


def bytes_of(image: Image, job: Job) -> int:
    """Of the results of one image, at most; 0 where only reading it tells what is wrong with it."""
    try:
        if dicom.is_dicom(image.path):
            return size_of(image) // 2  # of the voxels that are there, whatever is added between them
        file = formats.examine(image.path, images.MAX_VOXELS)
        own = spacing_of(file.affine)
        wanted = target_spacing(own, file.shape, job.settings.new_resolution)
    except (FastsrganError, OSError):
        return 0
    voxels = math.prod(grid_size(n, a, b) for n, a, b in zip(file.shape, own, wanted, strict=True))
    integer = job.settings.dtype == "input" and np.dtype(file.dtype).kind in "iu"
    each = {"sr": np.dtype(file.dtype).itemsize if integer else 4, "prob": 4, "seg": PACKED, "mask": PACKED}
    return int(voxels * sum(each.get(kind, 0) for kind in job.outputs(image)))
