"""What a subject shows at one visit: its own image, or one that is made of its map of tissues (docs/training.md)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch

from fastsrgan.core.draws import rng
from fastsrgan.core.threads import one_thread
from fastsrgan.errors import InputError
from fastsrgan.observation.synthesis import Synthesis, synthesise
from fastsrgan.store.reader import Sample


@dataclass(frozen=True)
class Visits:
    """Which visits show a made image, how it is made, and which tissues are the label.

    share : of the visits of a subject that has both an image and tissues
    structure : values of the tissues inside the label
    """

    share: float = 0.0
    structure: tuple[int, ...] = ()
    settings: Synthesis = field(default_factory=Synthesis)

    def of(
        self, sample: Sample, key: tuple[int | str, ...], device: torch.device | None = None, share: float | None = None
    ) -> Sample:
        """The sample with the image and label of this visit, a function of the key alone.

        The image that is made has the subject's voxel size and axes, and a shape of its own (``synthesise``). Without
        a Label_image, the label of a subject's own image are the tissues of the structure.

        Raises InputError where an image has to be made, or a label found, and the structure is not named or missing.
        """
        if sample.tissues is None:
            return sample
        made = sample.image is None or rng(*key, "synthetic").random() < (self.share if share is None else share)
        if not made:
            own = self._inside(sample, sample.tissues) if sample.label is None else sample.label
            return dataclasses.replace(sample, label=own)
        with one_thread():
            image, tissues = synthesise(sample.tissues, sample.spacing, key, self.settings, device)
        label = self._inside(sample, tissues.cpu().numpy())
        return dataclasses.replace(sample, image=image.cpu().numpy(), label=label, mask=None, tissues=None)

    def _inside(self, sample: Sample, tissues_XYZ: np.ndarray) -> np.ndarray:
        """1 inside the structure, uint8."""
        if not self.structure:
            raise InputError(sample.id, "which of its tissues are the label is not said", "--structure 3,42")
        table = np.zeros(max(int(tissues_XYZ.max()), *self.structure) + 1, np.uint8)
        table[list(self.structure)] = 1
        inside = table[tissues_XYZ]
        if not inside.any():
            named = ", ".join(map(str, self.structure))
            raise InputError(sample.id, f"its tissues hold none of {named}", "name values of its tissues, --structure")
        return inside
