"""Scalars and sample images of a run for TensorBoard, in RUN/tensorboard (extra ``tensorboard``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsrgan.errors import ResourceError

FOLDER = "tensorboard"
GAP, GREY = 2, 0.5  # of the lines between slices: pixels, brightness


class Board:
    """Writes events; ``first`` is the first update to come, whatever an earlier process wrote from there on is hidden.

    Raises ResourceError where the package is missing.
    """

    def __init__(self, run: Path, first: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            hint = "pip install 'fastsrgan[tensorboard]', or --tensorboard False"
            raise ResourceError("tensorboard", "is not installed", hint) from error
        self.writer: Any = SummaryWriter(str(run / FOLDER), purge_step=first)

    def scalars(self, group: str, facts: dict[str, float], update: int) -> None:
        """Named values at an update, as ``group/name``."""
        for name, value in facts.items():
            self.writer.add_scalar(f"{group}/{name}", value, update)

    def picture(self, name: str, image_HW: Tensor, update: int) -> None:
        """A grey image, values in [0, 1]."""
        self.writer.add_image(name, image_HW.clamp(0, 1).cpu(), update, dataformats="HW")

    def flush(self) -> None:
        """Write what is waiting."""
        self.writer.flush()

    def close(self) -> None:
        """End the file."""
        self.writer.close()


def contact_sheet(x_PPP: Tensor, pred_CPPP: Tensor, y_CPPP: Tensor) -> Tensor:
    """One patch as a picture (3 P + 4, 5 P + 8): its middle slice along each axis, one row each, two pixels apart.

    Columns: interpolated input, SR, HR (all over the largest HR value), predicted segmentation, label.
    """
    top = y_CPPP[0].max().clamp_min(1e-6)
    volumes = [x_PPP / top, pred_CPPP[0] / top, y_CPPP[0] / top, pred_CPPP[1], y_CPPP[1]]
    middle = x_PPP.shape[0] // 2
    rows = [_apart([v.float().select(d, middle) for v in volumes], 1) for d in range(3)]
    return _apart(rows, 0)


def _apart(parts: list[Tensor], axis: int) -> Tensor:
    """Pictures side by side with a grey line between them."""
    shape = [GAP if d == axis else n for d, n in enumerate(parts[0].shape)]
    line = parts[0].new_full(shape, GREY)
    return torch.cat([piece for part in parts for piece in (line, part)][1:], axis)
