"""Two results of the same subjects beside one truth: differences, a paired test, limits of agreement.

Differences are the second result's figure minus the first's, subject by subject. The test is Wilcoxon's signed-rank
test, two-sided (``scipy.stats.wilcoxon``): it asks nothing of how differences are distributed. The limits of agreement
are those of Bland and Altman 1986: mean difference +- 1.96 sample standard deviations.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core.files import output_folder, short_names
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.errors import InputError, UsageError, counted
from fastsrgan.evaluate.cohort import AS_IT_IS, Choice, evaluate_folders, told_left, told_once
from fastsrgan.evaluate.pair import Keep, flat, moments
from fastsrgan.io.output_place import SCORED, check_place

log = logging.getLogger("fastsrgan")

TEST = "Wilcoxon signed-rank, two-sided (scipy.stats.wilcoxon)"
SECTIONS = ("image.", "segmentation.", "structures.")
LIMITS = 1.96
LEVEL = 0.05
PICTURE = "bland-altman.png"
# Panels of the picture: figure, heading.
PANELS = (
    ("image.whole.psnr_db", "PSNR, dB"),
    ("image.whole.ssim", "SSIM"),
    ("segmentation.dice", "Dice"),
    ("segmentation.volume_ml", "volume of the segmentation, mL"),
)


def compare_folders(
    first: str | os.PathLike,
    second: str | os.PathLike,
    truth: str | os.PathLike,
    *,
    png: str | os.PathLike | None = None,
    choice: Choice = AS_IT_IS,
    keep: Keep | None = None,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Evaluate two folders of ``fastsrgan infer`` against one of truths, each as ``evaluate_folders``, and compare.

    ``png`` is a folder for the picture ``bland-altman.png``, before which ``keep`` is called with the result.

    Returns ``names`` (of the two results), ``rows`` (subject, and ``figures``: those of both results and their
    difference by dotted path, ``first.``, ``second.``, ``difference.``), ``summary`` of these, ``comparison`` (see
    ``compared``), ``failed`` (subjects that one of the two lacks), ``test`` and ``notes`` (of the subjects that are
    compared, after the folder and the subject).
    Raises UsageError for one folder given twice, InputError where no subject was evaluated in both.
    """
    if Path(first).resolve() == Path(second).resolve():
        raise UsageError("evaluate", "the two results are one folder", "RESULTS OTHER_RESULTS TRUTH")
    picture = None if png is None else check_place(output_folder(png) / PICTURE, (), SCORED)
    more: dict[str, Any] = {"choice": choice, "progress": progress}
    names = short_names([first, second])
    results = [
        evaluate_folders(path, truth, beside=name, **more) for path, name in zip((first, second), names, strict=True)
    ]
    scores = [{row["subject"]: _figures(row) for row in result["rows"]} for result in results]
    subjects = [name for name in scores[0] if name in scores[1]]
    failed = []
    for name, result in zip(names, results, strict=True):
        failed += [one | {"error": f"{name}: {one['error']}"} for one in result["failed"]]
    known = {f["subject"] for f in failed}
    for i in (0, 1):
        for subject in scores[i]:
            if subject not in scores[1 - i] and subject not in known:
                failed.append({"subject": subject, "error": f"only in {names[i]}"})
                log.warning("%s: only in %s", subject, names[i])
    if not subjects:
        raise InputError(second, f"no subject was evaluated in both {names[0]} and {names[1]}", "compare one cohort")
    rows = [{"subject": s, "figures": _beside(scores[0][s], scores[1][s])} for s in subjects]
    figures = [f for f in scores[0][subjects[0]] if all(f in scores[i][s] for i in (0, 1) for s in subjects)]
    pairs = {f: np.array([[scores[i][s][f] for s in subjects] for i in (0, 1)]) for f in figures}
    about: dict[str, list[str]] = {}
    for name, result in zip(names, results, strict=True):
        for line in told_once([row for row in result["rows"] if row["subject"] in subjects]):
            about.setdefault(line, []).append(name)
    notes = [f"{' and '.join(folders)}: {line}" for line, folders in about.items()]
    lacking = [set(result["without_result"]) for result in results]
    notes += told_left([name for name in results[0]["without_result"] if name in lacking[1]], truth)
    least = 2.0 ** (1 - len(subjects))
    if least > LEVEL:
        few = f"with {counted(len(subjects), 'subject')} the smallest p of the test is {least:.3g}"
        notes.append(f"{few}: it cannot show a difference at {LEVEL:g}, whatever the figures")
    columns = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    result = {
        "names": names,
        "rows": rows,
        "failed": failed,
        "summary": {n: moments([r["figures"][n] for r in rows if n in r["figures"]]) for n in columns},
        "comparison": {figure: compared(*pair) for figure, pair in pairs.items()},
        "test": TEST,
        "notes": notes,
        "definitions": results[0]["definitions"] | {"limits": "mean difference +- 1.96 sd (Bland and Altman 1986)"},
    }
    if keep is not None:
        keep(result)
    if picture is not None:
        from fastsrgan.pictures.bland_altman import bland_altman

        shown = [(heading, *pairs[figure]) for figure, heading in PANELS if figure in pairs]
        bland_altman(picture, shown, (names[0], names[1]))
    return result


def compared(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Two results' figures of the same subjects, in one order.

    Returns ``first``, ``second``, ``difference`` (second minus first; mean, sd, n), ``limits`` (of agreement; None for
    one subject) and ``p`` (None for fewer than two; 1 where all are equal).
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    apart = b - a
    told = moments(apart.tolist())
    return {
        "first": moments(a.tolist()),
        "second": moments(b.tolist()),
        "difference": told,
        "limits": limits(apart) if len(apart) > 1 else None,
        "p": _p(apart) if len(apart) > 1 else None,
    }


def limits(differences: np.ndarray) -> list[float]:
    """Bland and Altman's limits of agreement."""
    mean, half = float(differences.mean()), LIMITS * float(differences.std(ddof=1))
    return [mean - half, mean + half]


def _p(differences: np.ndarray) -> float:
    from scipy.stats import wilcoxon

    return 1.0 if not differences.any() else float(wilcoxon(differences).pvalue)


def _figures(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in flat(row).items() if name.startswith(SECTIONS)}


def _beside(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    told = {f"first.{k}": v for k, v in first.items()} | {f"second.{k}": v for k, v in second.items()}
    return told | {f"difference.{k}": second[k] - v for k, v in first.items() if k in second}
