"""Where fastsrgan's time goes: one volume stage by stage, and how long the steps of a training run wait for data."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from bench.cohort import Cohort, Work
from bench.common import synchronise
from bench.data_sides import make_feed, make_pool
from bench.shuffle import batch_subjects, quality
from fastsrgan.config import TrainConfig
from fastsrgan.convert import convert
from fastsrgan.core.progress import QUIET
from fastsrgan.data.pool import Resident
from fastsrgan.demo.template import make_cohort
from fastsrgan.model.weights import default_weights
from fastsrgan.observation.model import Degradation
from fastsrgan.train.run import short_training, train

STAGES = ("read", "degrade", "place", "gather")


def facts_of(seconds: list[float]) -> dict[str, Any]:
    """Median and spread, in the form of all rows; nothing is compared here, so the gate is open."""
    return {
        "passed": True,
        "tolerance": 0.0,
        "max_error": 0.0,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "repeats": len(seconds),
        "peers": {},
        "ratio_to": {},
        "ratio_range": {},
    }


@dataclass(frozen=True)
class Stages:
    """One volume from the store to batches, each stage by itself and none beside another."""

    name: str
    cohort: Cohort

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """The row: ``stages`` holds median seconds, ``convert`` what the store cost once."""
        work = self.cohort.made()
        _, resident = one_volume(work, 0)
        runs = [one_volume(work, epoch)[0] for epoch in range(1, args.repeats + 1)]
        stages = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
        return {
            "name": self.name,
            "shape": list(work.shape),
            "patches": work.patches,
            **facts_of([sum(run[stage] for stage in STAGES) for run in runs]),
            "stages": stages,
            "gathered_per_second": work.patches / stages["gather"],
            "resident_shape": list(resident.hr.shape),
            "resident_bytes_per_voxel": resident.nbytes / resident.hr.numel(),
            "convert": self.cohort.facts,
        }

    def lines(self, row: Mapping[str, Any]) -> list[str]:
        """The stages."""
        return [", ".join(f"{stage} {seconds * 1e3:.1f} ms" for stage, seconds in row["stages"].items())]


def one_volume(work: Work, epoch: int) -> tuple[dict[str, float], Resident]:
    """Seconds of each stage for the first subject, and what is kept of it."""
    feed, name = make_feed(work), work.names[0]
    spent = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, call: Callable) -> Callable:
        def wrapped(*a: Any, **k: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*a, **k)
            finally:
                spent[stage] += time.perf_counter() - began

        return wrapped

    apply = timed("degrade", Degradation.apply)
    with (
        mock.patch.object(Degradation, "apply", apply),
        mock.patch.object(feed.store, "read", timed("read", feed.store.read)),
    ):
        began = time.perf_counter()
        resident = feed.prepare(epoch, name)
        spent["place"] = time.perf_counter() - began - spent["read"] - spent["degrade"]
    began = time.perf_counter()
    pool = make_pool(work, [resident], epoch)
    for indices in pool.generator_batches(work.batch):
        pool.gather(indices)
    synchronise(work.device)
    spent["gather"] = time.perf_counter() - began
    return spent, resident


@dataclass(frozen=True)
class Training:
    """A real training run: the demo's, or a few small updates on the bench's cohort with ``--quick``.

    ``wait_share`` is the share of the steps' time that the run waited for groups of subjects after the first one;
    ``first_wait_seconds`` until that was there is told beside it, since nothing can be made ahead of it.
    """

    name: str
    cohort: Cohort

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """The row: seconds of an update, and the waiting."""
        with tempfile.TemporaryDirectory(prefix="fastsrgan-bench-") as folder:
            run = Path(folder, "run")
            if args.quick:
                work = self.cohort.made()
                config = TrainConfig(
                    new_low_res=(work.low_res,),
                    epochs=2,
                    steps_per_epoch=2,
                    batch_size=2,
                    patch_size=work.patch,
                    kernel_gen=2,
                    kernel_dis=2,
                    critic_iterations=1,
                )
                done = train(work.store, run, config, device=args.device)
            else:
                cohort = make_cohort(Path(folder, "cohort"), n_train=2, n_test=1, seed=0, sd_voxels=2.5)
                convert(cohort.csv, Path(folder, "store"))
                start = default_weights()
                done = short_training(Path(folder, "store"), run, start, (1.0, 1.0, 3.0), args.device, QUIET)
            log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf8").splitlines()]
        steps = [line["seconds"] for line in log if "update" in line]
        return {
            "name": self.name,
            **facts_of(steps),
            "updates": done["updates"],
            "run_seconds": done["seconds"],
            "data_wait_seconds": done["data_wait_seconds"],
            "first_wait_seconds": done["first_wait_seconds"],
            "wait_share": done["data_wait_seconds"] / sum(steps),
        }

    def lines(self, row: Mapping[str, Any]) -> list[str]:
        """The waiting."""
        return [
            f"{row['updates']} updates in {row['run_seconds']:.1f} s, of which {row['data_wait_seconds']:.2f} s waiting"
            f" ({100 * row['wait_share']:.2f} %); {row['first_wait_seconds']:.2f} s until the first"
        ]


@dataclass(frozen=True)
class Shuffle:
    """How well groups of subjects mix an epoch, beside all subjects at once: counted, not timed."""

    name: str
    cohort: Cohort
    subjects: int = 40

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """The row: ``groups`` holds bench.shuffle.quality for each number of resident subjects."""
        work = self.cohort.made()
        patches = {f"subject{i}": work.patches for i in range(self.subjects)}
        groups, seconds = {}, []
        for size in (1, 2, 4, 8, 16, self.subjects):
            began = time.perf_counter()
            drawn = batch_subjects(patches, size, work.batch)
            seconds.append(time.perf_counter() - began)
            groups[size] = quality(drawn)
        return {"name": self.name, "subjects": self.subjects, **facts_of(seconds), "groups": groups}

    def lines(self, row: Mapping[str, Any]) -> list[str]:
        """A line for each size."""
        return [
            f"{size} of {row['subjects']} resident: {q['distinct']:.1f} subjects in a batch, drift {q['drift']:.2f}"
            for size, q in row["groups"].items()
        ]


def cases(cohort: Cohort) -> list[Stages | Training | Shuffle]:
    """The rows without peers."""
    return [
        Stages("one volume, stage by stage", cohort),
        Training("training run, waiting for data", cohort),
        Shuffle("shuffle of a cohort that does not fit", cohort),
    ]
