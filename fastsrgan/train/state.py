"""What a training run is and where it stands: handed around by the loop, saved in snapshots."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastsrgan.config import TrainConfig
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.ranks import ALONE, Ranks
from fastsrgan.data.feed import Feed, deal
from fastsrgan.store.reader import Store
from fastsrgan.train.gan import Models
from fastsrgan.train.logs import Board, RunLog
from fastsrgan.train.optimise import share


def numbered(config: TrainConfig) -> range:
    """The epochs of a run, by their numbers."""
    return range(config.init_epoch, config.epochs + 1)


@dataclass
class Position:
    """Where a run stands: the next step of ``group`` in ``epoch``. Plain values, the same on all ranks.

    steps : steps of that group, 0 before it began
    updates : generator updates done; of them ``epoch_updates`` in the groups of this epoch before this one
    best : best validation score so far, of ``best_epoch``, ``stale`` validations ago; its ``best_dice`` too
    resident : subjects of a rank in memory at once: chosen by the memory that was free at the start, kept when the run
        is resumed, since another number would deal the subjects anew
    world : ranks that the subjects were dealt to
    left : subjects of this epoch still to do when they were last dealt anew, at ``before`` of the epoch; None: all
    """

    epoch: int = 1
    group: int = 0
    step: int = 0
    steps: int = 0
    updates: int = 0
    epoch_updates: int = 0
    best: float | None = None
    best_epoch: int | None = None
    best_dice: float | None = None
    stale: int = 0
    resident: int | None = None
    world: int = 1
    left: list[str] | None = None
    before: float = 0.0

    def next_group(self) -> None:
        """The group is done."""
        self.epoch_updates += self.step
        self.group, self.step, self.steps = self.group + 1, 0, 0

    def next_epoch(self) -> None:
        """The epoch is done."""
        self.epoch, self.left, self.before = self.epoch + 1, None, 0.0
        self.group = self.step = self.steps = self.epoch_updates = 0


class Turn(NamedTuple):
    """One group of subjects of one rank: number ``group`` of ``groups`` in ``epoch``."""

    epoch: int
    group: int
    groups: int
    subjects: list[str]


@dataclass
class Run:
    """One call of ``train``: everything the loop hands around.

    batch : patches per update of this rank
    structures : name and label values of the mask's classes from 1 on, where they are structures of a label map
    log, board, progress : of rank 0 alone
    bad : updates in a row that were not finite
    ended_early : the epoch after which ``patience`` ended the run
    baselines : what is compared with on the Test subjects, the same in every epoch
    scores : of the validation before
    resumed_at : updates behind it when this call resumed it
    changed : settings that this call goes on with and the snapshot had otherwise -> [before, now]
    start : path, file and SHA-256 of the weights that the run began with
    """

    folder: Path
    config: TrainConfig
    store: Store
    models: Models
    feed: Feed
    train: list[str]
    test: list[str]
    mask_classes: int
    structures: list[tuple[str, list[int]]] = field(default_factory=list)
    progress: Progress = QUIET
    log: RunLog | None = None
    ranks: Ranks = ALONE
    board: Board | None = None
    position: Position = field(default_factory=Position)
    snapshot_folder: Path | None = None
    bad: int = 0
    ended_early: int | None = None
    baselines: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    resumed_at: int | None = None
    changed: dict[str, list[Any]] = field(default_factory=dict)
    start: dict[str, str] | None = None
    began: float = field(default_factory=time.perf_counter)
    began_at: float = 0.0

    @property
    def batch(self) -> int:
        return self.models.batch

    @property
    def last_epoch(self) -> int:
        return numbered(self.config)[-1]

    @property
    def beginning(self) -> Position:
        """Where it stood before its first update."""
        return Position(epoch=numbered(self.config)[0], world=self.ranks.world)

    @property
    def first(self) -> bool:
        """Whether this rank writes."""
        return self.ranks.rank == 0

    def plan(self) -> list[Turn]:
        """Every group of this rank still to do. An epoch without one, which only awaits its validation, has an empty
        group."""
        at, size = self.position, self.position.resident or 1
        turns = []
        for epoch in range(at.epoch, self.last_epoch + 1):
            resumed = epoch == at.epoch
            names = at.left if resumed and at.left is not None else self.train
            groups = deal(names, self.feed.seed, epoch, size, self.ranks.rank, self.ranks.world) if names else []
            first = at.group if resumed else 0
            turns += [Turn(epoch, g, len(groups), groups[g]) for g in range(first, len(groups))]
            if first >= len(groups):
                turns.append(Turn(epoch, first, first + 1, []))
        return turns

    def done(self, turn: Turn, part: float) -> float:
        """Share of the whole run that is done at ``part`` of a group."""
        at = self.position
        epoch_part = at.before + (1 - at.before) * (turn.group + part) / turn.groups
        return share(turn.epoch, self.last_epoch, epoch_part)


def data_identity(store: Store) -> str:
    """A hash of what the store's manifest says of all subjects: two stores with the same have the same arrays."""
    rows = [[s.id, s.split, list(s.shape), s.affine.tolist(), s.arrays, s.files] for s in store.subjects]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:16]


def old_groups(run: Run, old: Position) -> list[list[list[str]]]:
    """The groups of the old position's epoch for each of its ranks."""
    names = run.train if old.left is None else old.left
    size, seed = old.resident or 1, run.feed.seed
    return [deal(names, seed, old.epoch, size, rank, old.world) if names else [] for rank in range(old.world)]


def remaining(run: Run, old: Position) -> list[str]:
    """Subjects of the old position's epoch that are not done, whatever ranks they were dealt to.

    A group that was begun is not done: its subjects come again, so no patch of the epoch is lost.
    """
    finished = old.group + (old.steps > 0 and old.step >= old.steps)
    gone = {name for groups in old_groups(run, old) for group in groups[:finished] for name in group}
    return [name for name in (run.train if old.left is None else old.left) if name not in gone]


def epoch_part(run: Run, old: Position) -> float:
    """Share of its epoch that is done at the old position."""
    groups = len(old_groups(run, old)[0])
    part = (old.group + (old.step / old.steps if old.steps else 0.0)) / groups if groups else 1.0
    return old.before + (1 - old.before) * min(part, 1.0)
