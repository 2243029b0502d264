"""``fastsrgan.show``: a result as a matplotlib figure, for notebooks and scripts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.errors import InputError, UsageError
from fastsrgan.evaluate.wording import picture_words
from fastsrgan.infer.volume import InferResult
from fastsrgan.pictures.figure import Column, planes, result_columns, result_options
from fastsrgan.pictures.planes import from_lowest
from fastsrgan.volume.geometry import Volume

WIDTH = 1000


def show(
    result: InferResult | Volume | str | os.PathLike,
    image: Volume | tuple[np.ndarray, np.ndarray] | None = None,
    *,
    truth: Volume | tuple[np.ndarray, np.ndarray] | None = None,
    label: Volume | tuple[np.ndarray, np.ndarray] | None = None,
    **options: Any,
) -> Any:
    """Draw planes of a result across its slices, with a detail and the segmentation's outline: a matplotlib Figure.

    Parameters
    ----------
    result : what ``infer_volume`` returned; a folder with one result, or one result's JSON; an image file; a Volume
    image : the low-resolution image, as a Volume or (array, affine); known already where ``result`` is a path
    truth, label : high-resolution image and its label, likewise
    options : title, footer, status (a light and its words), structure, at_mm (R, A, S), convention ("radiological" or
        "neurological"), width_px (1000); footer, status and structure are by default what the record says

    Raises InputError for what cannot be read or shown, UsageError for a folder with several results, ResourceError
    where matplotlib is missing.

    >>> import numpy as np, fastsrgan
    >>> ball = sum((i - 12) ** 2 for i in np.ogrid[:25, :25, :25]) < 90
    >>> figure = fastsrgan.show(fastsrgan.Volume(ball * 500.0, np.eye(4)), width_px=300)
    >>> type(figure).__name__, len(figure.axes)
    ('Figure', 4)
    """
    others = {
        name: v if isinstance(v, Volume) else Volume(*v)
        for name, v in (("low", image), ("truth", truth), ("label", label))
        if v is not None
    }
    record: dict[str, Any] = {}
    if isinstance(result, InferResult):
        sr, record = Volume(np.asarray(result.sr), result.affine), result.report
        others["seg"] = Volume(np.asarray(result.prob[0]), result.affine)
    elif isinstance(result, Volume):
        sr = result
    else:
        sr, found, record = _read(Path(result))
        others = found | others
    if not others and not isinstance(result, InferResult):
        sr = from_lowest({"sr": sr})[0]["sr"]
        return planes([Column(sr, "Image")], **{"reference": sr, "width_px": WIDTH, **options})
    volumes = {"sr": sr} | others
    if "low" in volumes:
        from fastsrgan.evaluate.grids import inside_mask, onto_grid

        volumes["spline"] = inside_mask(record, onto_grid(volumes["low"], sr, notes=[]), sr)
    volumes, _ = from_lowest(volumes)
    words = picture_words(record, sr.affine)
    columns = result_columns(volumes, words.pop("captions"))
    return planes(columns, **{**result_options(volumes), "width_px": WIDTH, **words, **options})


def _read(path: Path) -> tuple[Volume, dict[str, Volume], dict[str, Any]]:
    """The SR image, what lies beside it, and its record."""
    if path.is_file() and path.suffix.lower() != ".json":
        from fastsrgan.io import any_image  # here, since `import fastsrgan` needs no reader of images

        return any_image.load_any(path), {}, {}
    # Only here: `import fastsrgan` needs neither evaluate nor the pages.
    from fastsrgan.report.collect import find
    from fastsrgan.report.viewer import load_images

    found = find(path)
    if len(found.results) != 1:
        raise UsageError(path, f"holds {len(found.results)} results", "one result's .json, or a folder with one")
    warnings: list[str] = []
    sr, others = load_images(found.results[0], warnings)
    if sr is None:
        raise InputError(path, "its super-resolved image cannot be read", "; ".join(warnings) or "infer it again")
    return sr, others, found.results[0].record
