"""Figures that the SegSRGAN paper reports, for orientation beside a study on other images (SEGSRGAN.md section 6).

Delannoy et al. 2020: dHCP newborns at 0.5 mm, 8 test subjects, slices of 3 mm, patches of 128; nothing of it was
measured with this software. "augmented" models were trained with contrast and noise augmentation.
"""

from __future__ import annotations

from typing import Any

SOURCE = (
    "The paper's own data (Delannoy et al. 2020; dHCP newborns, 8 test subjects, 0.5 x 0.5 x 3 mm, patch 128): other "
    "images and other weights, a reference for the shape of the curves and not a target"
)
NOISY = "noisy (sigma 2)"
STEPS = (30, 80, 128)


def _rows(condition: str, model: str, **columns: tuple[float, ...]) -> list[dict[str, Any]]:
    return [
        {"condition": condition, "model": model, "step": step} | {name: values[i] for name, values in columns.items()}
        for i, step in enumerate(STEPS)
    ]


IMAGES = [
    *_rows("original", "image figures", psnr_db=(26.96, 25.85, 24.24), ssim=(0.73, 0.69, 0.65)),
    *_rows(NOISY, "image figures", psnr_db=(25.40, 24.45, 23.24), ssim=(0.49, 0.46, 0.44)),
]
SEGMENTATIONS = [
    *_rows("original", "plain", dice=(0.855, 0.831, 0.805), components=(8.6, 45.3, 104.3)),
    *_rows(NOISY, "plain", dice=(0.819, 0.785, 0.740), components=(26.6, 98.5, 193.1)),
    *_rows("original", "augmented", dice=(0.849, 0.827, 0.806), components=(5.7, 33.6, 61.7)),
    *_rows(NOISY, "augmented", dice=(0.836, 0.812, 0.790), components=(5.8, 33.5, 61.8)),
]
BASELINE = [
    {"condition": "original", "model": "baseline", "step": None, "psnr_db": 24.22, "ssim": 0.63, "dice": 0.735},
]
TIMES = [
    {"condition": "original", "model": "P100, about", "step": 10, "seconds": 600.0},
    {"condition": "original", "model": "P100, about", "step": 100, "seconds": 4.0},
]
# What is printed beside each study.
REFERENCE: dict[str, list[dict[str, Any]]] = {
    "steps": [*BASELINE, *IMAGES[:3], *SEGMENTATIONS[:3], *TIMES],
    "noise": [*BASELINE, *IMAGES, *SEGMENTATIONS[:6]],
    "augmentation": SEGMENTATIONS,
    "resolution": [],
    "curves": [],
}
