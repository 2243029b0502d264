"""Works and is killed, in a loop, for as long as asked: ``python tools/soak.py --minutes 20``.

Each round, on a small cohort: a conversion, a training run and a list of images to infer are killed with SIGKILL at
random moments and called again until they end. Store, losses, weights, optimisers and images must then have every bit
of an unbroken run, and every snapshot that is found on the way must be whole. Beside them one process that is never
killed trains and infers over and over; its memory, file descriptors and threads must not grow. The last line is JSON;
exit code 1 when anything was lost or grew.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT, ROOT / "tests"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from cohort import SMALL, losses, make_store  # noqa: E402
from processes import CONTEXT, ended, outcome, start  # noqa: E402

from fastsrgan.convert import convert  # noqa: E402
from fastsrgan.core.files import write_json  # noqa: E402
from fastsrgan.core.system import measured_on, provenance  # noqa: E402
from fastsrgan.infer.files import infer_files  # noqa: E402
from fastsrgan.io import nifti as images  # noqa: E402
from fastsrgan.model import checkpoint, weights  # noqa: E402
from fastsrgan.model.networks import GeneratorSpec, build_generator  # noqa: E402
from fastsrgan.store.reader import open_store  # noqa: E402
from fastsrgan.train.run import train  # noqa: E402

CONFIG = SMALL.replace(epochs=4, steps_per_epoch=2, critic_iterations=1, keep_checkpoints=2, ema=0.9)
IMAGES = 4
MOST_KILLS = 8  # of one job in one round, then it may end
GROWTH_MIB = 16.0  # of the process that is never killed, from its second quarter to its last


# --- the jobs; each can be called again after a kill ----------------------------------------------------------------


def convert_job(place: Path, out: Path) -> None:
    convert(place / "cohort.csv", out, resume=True, workers=2)


def train_job(place: Path, out: Path) -> None:
    train(place / "cohort.zarr", out, CONFIG, resume=bool(checkpoint.snapshots(out)))


def infer_job(place: Path, out: Path) -> None:
    scans = sorted(place.glob("scan-*.nii.gz"))
    infer_files(scans, out, place / "w.safetensors", patch=16, step=8, resume=True)


JOBS = {"convert": convert_job, "train": train_job, "infer": infer_job}


def bits(kind: str, out: Path) -> dict[str, str]:
    """SHA-256 of everything that two runs which are the same share."""
    if kind == "train":
        snapshot = checkpoint.newest(out)
        state = torch.load(snapshot / "state.pt", weights_only=True)
        found = {"losses": repr(losses(out)), "state": digest_of(state), "snapshot": snapshot.name}
        names = [snapshot / checkpoint.MODEL, out / "dice.csv", out / "mse.csv"]
        return found | {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in names}
    skipped = {"infer_summary.json"}
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in skipped]
    if kind == "infer":  # records hold times and paths; what SIGKILL left has a temporary name
        files = [p for p in files if p.suffix != ".json" and not p.name.startswith(".")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def digest_of(value: Any) -> str:
    """A hash of nested containers of tensors and plain values."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in part:
                digest.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for inner in part:
                add(inner)
        elif isinstance(part, torch.Tensor):
            digest.update(part.contiguous().numpy().tobytes())
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


def unsound(kind: str, out: Path) -> list[str]:
    """What stands half-written under its final name after a kill."""
    if kind == "train":
        return [line for snapshot in checkpoint.snapshots(out) for line in checkpoint.verify(snapshot)]
    if kind == "convert":
        return open_store(out).verify() if (out / "manifest.json").exists() else []
    found = []
    for path in out.glob("*.nii.gz") if out.exists() else ():
        if not path.name.startswith("."):
            try:
                images.load(path)
            except Exception as error:
                found.append(f"{path.name}: {error}")
    return found


# --- killed and called again ----------------------------------------------------------------------------------------


def killed_until_done(kind: str, place: Path, out: Path, seconds: float, chance: random.Random) -> dict[str, Any]:
    """One job, killed at moments within the time that an unbroken one takes, which is short on an idle machine."""
    kills, problems = 0, []
    note = place / f"{kind}.outcome"
    while True:
        note.unlink(missing_ok=True)
        began = time.monotonic()
        process = start(JOBS[kind], place, out, out=note)
        if kills < MOST_KILLS:
            process.join(chance.uniform(0, seconds))
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                problems += unsound(kind, out)
                continue
        if ended(process, 3600) != 0:
            problems.append(str(outcome(note).get("error", "no end")))
        elif not kills:  # it was faster than before: again, sooner
            shutil.rmtree(out)
            seconds = min(seconds, time.monotonic() - began) / 2
            continue
        return {"kills": kills, "problems": problems}


def unbroken(kind: str, place: Path, out: Path) -> tuple[dict[str, str], float]:
    """The bits of a run that nobody kills, and its seconds."""
    seconds = []
    for _ in range(2):  # the first one also waits for the server of processes
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        process = start(JOBS[kind], place, out, out=place / "outcome")
        if ended(process, 3600) != 0:
            raise SystemExit(f"{kind}: {outcome(place / 'outcome')}")
        seconds.append(time.monotonic() - began)
    return bits(kind, out), seconds[-1]


# --- the process that is never killed -------------------------------------------------------------------------------


def steady(place: Path, pipe: Connection) -> None:
    """Trains and infers once for each message, and answers with what the process holds."""
    torch.set_num_threads(1)
    turn = 0
    while pipe.recv():
        out = place / "steady"
        shutil.rmtree(out, ignore_errors=True)
        train(place / "cohort.zarr", out / "run", CONFIG.replace(epochs=1, seed=turn))
        infer_files([place / "scan-0.nii.gz"], out / "sr", place / "w.safetensors", patch=16, step=8)
        turn += 1
        pipe.send(held())


def held() -> dict[str, float]:
    """Resident memory in MiB, open file descriptors, threads."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return {
        "rss_mib": int(resident.split()[1]) / 1024,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def growth(rows: list[dict[str, float]]) -> dict[str, Any]:
    """First and last values of each figure, by the median of the second and of the last quarter."""
    n = len(rows)
    if n < 8:
        return {"turns": n, "enough": False, "grew": []}
    found: dict[str, Any] = {"turns": n, "enough": True}
    for name in rows[0]:
        early = statistics.median(r[name] for r in rows[n // 4 : n // 2])
        late = statistics.median(r[name] for r in rows[-(n // 4) :])
        found[name] = {"early": round(early, 1), "late": round(late, 1)}
    limits = {"rss_mib": GROWTH_MIB, "descriptors": 0, "threads": 0}
    found["grew"] = [k for k, most in limits.items() if found[k]["late"] - found[k]["early"] > most]
    return found


# --- all of it ------------------------------------------------------------------------------------------------------


def prepare(place: Path) -> None:
    """Cohort, store, scans and weights."""
    make_store(place)
    for i in range(IMAGES):
        noise = np.random.default_rng(i).random((19, 22, 9)).astype(np.float32)
        images.save(place / f"scan-{i}.nii.gz", noise, np.diag([1, 1, 3, 1.0]))
    weights.save_generator(place / "w.safetensors", build_generator(GeneratorSpec(kernel=2), seed=1).eval())


def soak(minutes: float, seed: int) -> dict[str, Any]:
    """Rounds until the time is over; the figures."""
    began, chance = time.monotonic(), random.Random(seed)
    found: dict[str, Any] = {"minutes": minutes, "seed": seed, "rounds": 0, "kills": dict.fromkeys(JOBS, 0)}
    problems: list[str] = []
    turns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        place = Path(name)
        prepare(place)
        expected = {kind: unbroken(kind, place, place / f"whole-{kind}") for kind in JOBS}
        here, there = CONTEXT.Pipe()
        worker = CONTEXT.Process(target=steady, args=(place, there), daemon=True)
        worker.start()
        while time.monotonic() - began < 60 * minutes:
            here.send(True)
            for kind, (whole, seconds) in expected.items():
                out = place / f"killed-{kind}"
                shutil.rmtree(out, ignore_errors=True)
                one = killed_until_done(kind, place, out, seconds, chance)
                found["kills"][kind] += one["kills"]
                problems += [f"round {found['rounds']}: {kind}: {text}" for text in one["problems"]]
                if not one["problems"] and bits(kind, out) != whole:
                    problems.append(f"round {found['rounds']}: {kind}: other bits than an unbroken run")
            turns.append(here.recv())
            found["rounds"] += 1
            print(f"round {found['rounds']}: {found['kills']} kills, {len(problems)} problems, {turns[-1]}", flush=True)
        here.send(False)
        worker.join(60)
    steadily = growth(turns)
    problems += [f"{name} grew: {steadily[name]}" for name in steadily["grew"]]
    found |= {"problems": problems, "steady": steadily, "minutes_taken": round((time.monotonic() - began) / 60, 1)}
    return found | measured_on() | {"provenance": provenance()}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    found = soak(args.minutes, args.seed)
    if args.json:
        write_json(args.json, found)
    print(json.dumps(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
