"""Damaged files through every reader, for as long as asked: ``python tools/fuzz.py --minutes 60``.

A case is its target and its number: ``python tools/fuzz.py --target store --case 1234`` runs that one again. A finding
is anything but success or a one-line FastsrganError, 20 s of processor time, 512 MiB of memory, or a dead process; its
files and traceback are kept in the folder of ``--out``. Exit code 1 when there was one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
for place in (ROOT, ROOT / "tests"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from fuzz_targets import TARGETS  # noqa: E402

CPU_SECONDS, MIB = 20.0, 1 << 20
GROWTH_MIB = 512


class TooSlow(Exception):
    """A case took more processor time than any damaged file may."""


def run_cases(name: str, folder: Path, numbers: Iterable[int], out: Path) -> Iterator[dict[str, str]]:
    """Run cases of a target in ``folder``; yields one dict a case, with ``error`` where it was a finding."""
    target, folder = TARGETS[name], folder / name
    if not folder.exists():
        folder.mkdir()
        target.prepare(folder)
    for number in numbers:
        (out / f"{name}.now").write_text(str(number))
        path = target.damage(folder, random.Random(f"{name} {number}"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        error = trace = ""
        handler = signal.signal(signal.SIGPROF, _too_slow)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            target.read(path)
        except Exception as caught:
            error, trace = f"{type(caught).__name__}: {caught}"[:500], traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, handler)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 // MIB
        if not error and grown > GROWTH_MIB:
            error = f"memory: {grown} MiB for one case"
        if error:
            keep(out, name, number, path, f"{error}\n\n{trace}")
        yield {"target": name, "case": str(number), "error": error, "trace": trace}


def keep(out: Path, name: str, number: int, path: Path, text: str) -> None:
    """Files and traceback of a finding."""
    place = out / f"{name}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "error.txt").write_text(text, encoding="utf8", errors="replace")
    if path.is_dir():
        shutil.copytree(path, place / path.name)
    elif path.exists():
        shutil.copy(path, place / path.name)


def _too_slow(*_: object) -> None:
    raise TooSlow(f"{CPU_SECONDS:g} s of processor time")


def where(trace: str) -> str:
    """The last line of a traceback that is in the package: findings of one cause share it."""
    lines = [line.strip() for line in trace.splitlines() if "/fastsrgan/" in line and line.strip().startswith("File")]
    return lines[-1].split("/")[-1] if lines else "?"


def work(name: str, first: int, seconds: float, out: Path) -> int:
    """Cases of one target in this process, until the time is over; prints one JSON line."""
    limit = 6 << 30  # private memory: a case that needs more is a finding, not the end of the machine
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    until, number, causes = time.monotonic() + seconds, first, {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:

        def numbers() -> Iterator[int]:
            nonlocal number
            while time.monotonic() < until:
                yield number
                number += 1

        for case in run_cases(name, Path(scratch), numbers(), out):
            if case["error"]:
                causes.setdefault(f"{case['error'][:160]} [{where(case['trace'])}]", case["case"])
    print(json.dumps({"cases": number - first, "next": number, "findings": causes}))
    return 1 if causes else 0


def supervise(names: list[str], minutes: float, first: int, out: Path) -> int:
    """Every target in turn, each turn a process of its own, so that a crash of a library costs one case."""
    until = time.monotonic() + 60 * minutes
    turn = min(300.0, 60 * minutes / len(names))
    at = dict.fromkeys(names, first)
    total = dict.fromkeys(names, 0)
    found: dict[str, str] = {}
    while time.monotonic() < until:
        for name in names:
            command = [sys.executable, __file__, "--worker", "--target", name, "--case", str(at[name])]
            command += ["--seconds", str(turn), "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            try:
                told = json.loads(done.stdout.splitlines()[-1])
            except (IndexError, ValueError):
                number = int((out / f"{name}.now").read_text())
                told = {"cases": number - at[name] + 1, "next": number + 1}
                told["findings"] = {f"the process ended with {done.returncode}: {done.stderr[-400:]}": str(number)}
            at[name], total[name] = told["next"], total[name] + told["cases"]
            for cause, number in told["findings"].items():
                if f"{name}: {cause}" not in found:
                    print(f"{name} case {number}: {cause}", flush=True)
                found.setdefault(f"{name}: {cause}", number)
    summary = {"minutes": minutes, "first": first, "cases": total, "findings": found}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf8")
    print(json.dumps({"cases": total, "findings": len(found)}))
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="(all)")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="findings go here (build/fuzz)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.target or list(TARGETS)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("fastsrgan").setLevel(logging.CRITICAL)
    if args.worker:
        return work(names[0], args.case, args.seconds, args.out)
    if args.case is None:
        return supervise(names, args.minutes, args.first, args.out)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        failed = False
        for name in names:
            for case in run_cases(name, Path(scratch), [args.case], args.out):
                print(case["trace"] or f"{name} case {args.case}: {case['error'] or 'fine'}")
                failed = failed or bool(case["error"])
    return int(failed)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
