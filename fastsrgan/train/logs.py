"""What a training run writes about itself: log.jsonl, and the original's Dice and MSE tables.

Scalars and sample images of a run for TensorBoard, in RUN/tensorboard (extra ``tensorboard``).
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsrgan.core.files import atomic_write, disk_error, output_folder, parse_json
from fastsrgan.errors import ResourceError

log = logging.getLogger("fastsrgan")

LOG, DICE_TABLE, MSE_TABLE = "log.jsonl", "dice.csv", "mse.csv"  # in the run folder
_EPOCH = re.compile(r"[0-9]{1,9}")


class RunLog:
    """RUN/log.jsonl (one line per update and per validation) and two CSV tables indexed by epoch.

    Columns are the original's: ``Dice`` or ``Dice_label_1``, ``Dice_mask0`` ..., and ``MSE``.
    """

    def __init__(
        self, folder: Path, dice_file: str | os.PathLike | None = None, mse_file: str | os.PathLike | None = None
    ) -> None:
        self.path = folder / LOG
        self.dice_file = Path(dice_file) if dice_file else folder / DICE_TABLE
        self.mse_file = Path(mse_file) if mse_file else folder / MSE_TABLE
        for path in (self.dice_file, self.mse_file):
            output_folder(path.parent)

    def step(self, epoch: int, update: int, seconds: float, waited: float, facts: dict[str, float]) -> None:
        """One generator update with its critic updates."""
        self._line({"epoch": epoch, "update": update, "seconds": seconds, "data_wait_seconds": waited, **facts})

    def epoch(self, epoch: int, scores: dict[str, float], warning: str = "") -> None:
        """One validation, with what is wrong by it."""
        self._line({"epoch": epoch, "validation": scores, **({"warning": warning} if warning else {})})
        if dices := {k: v for k, v in scores.items() if k.startswith("Dice")}:
            self._row(self.dice_file, epoch, dices)
        if "MSE" in scores:  # not where whole volumes alone were scored
            self._row(self.mse_file, epoch, {"MSE": scores["MSE"]})

    def changed(self, epoch: int, updates: int, settings: dict[str, list[Any]]) -> None:
        """That a resumed run goes on with other settings behind so many updates: name -> [before, now]."""
        self._line({"epoch": epoch, "behind_update": updates, "changed": settings})

    def cut(self, updates: int, epoch: int) -> None:
        """Forget what lies after a snapshot that a resumed run starts from."""
        if self.path.exists():
            kept = []
            for line in self.path.read_text(encoding="utf8", errors="replace").splitlines():
                row = parse_json(line)
                # What an earlier resume from here on changed is said anew, against the same snapshot.
                behind, of = row.get("behind_update"), row.get("epoch")
                at = behind + 1 if isinstance(behind, int) else row.get("update", 0)
                if not isinstance(at, int) or not isinstance(of, int):
                    continue  # the line that a killed process was writing
                if at <= updates and (of < epoch or "validation" not in row):
                    kept.append(line + "\n")
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf8")
        self.begin(epoch)

    def validations(self) -> list[dict[str, Any]]:
        """The lines of all validations, in their order."""
        text = self.path.read_text(encoding="utf8", errors="replace") if self.path.exists() else ""
        return [row for row in map(parse_json, text.splitlines()) if isinstance(row.get("validation"), dict)]

    def begin(self, epoch: int) -> None:
        """Keep what the tables say of epochs before this one, also in files that the original wrote."""
        for path in (self.dice_file, self.mse_file):
            if path.exists():
                self._write(path, [r for r in self._rows(path) if int(r[""]) < epoch])

    def _line(self, row: dict) -> None:
        plain = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in row.items()}
        try:
            with open(self.path, "a", encoding="utf8") as f:
                f.write(json.dumps(plain) + "\n")
        except OSError as error:
            raise disk_error(error, self.path) from error

    @staticmethod
    def _rows(path: Path) -> list[dict[str, str]]:
        if not path.exists():
            return []
        try:
            with open(path, newline="", encoding="utf8") as f:
                rows = [{k: v for k, v in r.items() if k is not None} for r in csv.DictReader(f)]
        except (ValueError, csv.Error):
            log.warning("%s is damaged and is made anew; %s has the scores of all epochs", path, LOG)
            return []
        # The original also writes empty lines for the epochs to come.
        return [r for r in rows if _EPOCH.fullmatch(r.get("") or "") and any(v for k, v in r.items() if k)]

    def _row(self, path: Path, epoch: int, values: dict[str, float]) -> None:
        rows = [r for r in self._rows(path) if r.get("") != str(epoch)]
        self._write(path, [*rows, {"": str(epoch), **{k: repr(float(v)) for k, v in values.items()}}])

    @staticmethod
    def _write(path: Path, rows: list[dict[str, str]]) -> None:
        with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf8") as f:
            writer = csv.DictWriter(f, fieldnames=list(dict.fromkeys(k for r in rows for k in r)) or [""])
            writer.writeheader()
            writer.writerows(rows)


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
