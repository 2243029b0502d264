"""How cases are drawn and run: by number (plain), or from bytes that atheris grows by the code they reach."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from fuzz_targets import TARGETS

CPU_SECONDS, MIB = 20.0, 1 << 20
GROWTH_MIB = 512


class TooSlow(Exception):
    """A case took more processor time than any damaged file may."""


class Drawn(random.Random):
    """Chance that is read from bytes, so that whoever grows them decides; behind their end it is seeded by them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.behind = random.Random(data)
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        """``k`` bits."""
        size = -(-k // 8)
        if self.at + size > len(self.data):
            self.at = len(self.data)
            return self.behind.getrandbits(k)
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "little") & ((1 << k) - 1)

    def random(self) -> float:
        """In [0, 1)."""
        return self.getrandbits(16) / 65536


def chance_of(name: str, what: int | bytes) -> random.Random:
    """The chance of a numbered case, or of an input."""
    return Drawn(what) if isinstance(what, bytes) else random.Random(f"{name} {what}")


def run_cases(name: str, folder: Path, numbers: Iterable[int]) -> Iterator[dict[str, str]]:
    """Run numbered cases of a target in ``folder``; yields one dict a case."""
    for number in numbers:
        yield run_case(name, folder, chance_of(name, number), str(number))


def run_case(name: str, folder: Path, chance: random.Random, case: str) -> dict[str, str]:
    """One case; ``error`` and ``trace`` where it was a finding."""
    target, folder = TARGETS[name], folder / name
    if not folder.exists():
        folder.mkdir()
        target.prepare(folder)
    path = target.damage(folder, chance)
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
    return {"target": name, "case": case, "error": error, "trace": trace, "path": str(path)}


def keep(out: Path, label: str, path: Path, text: str) -> None:
    """Files and traceback of a finding."""
    place = out / f"{label}.files"
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


class Plain:
    """Seeded damage, case by case. ``moved`` counts what was run, across the processes that run it."""

    name = "plain"

    def __init__(self, out: Path, first: int = 0) -> None:
        self.out, self.first = out, first
        self.count = mmap.mmap(-1, 8)  # shared with the processes
        self.next: dict[str, int] = {}
        self.known: set[str] = set()  # causes whose first case was kept

    def moved(self) -> int:
        """Cases of this turn so far."""
        return struct.unpack("q", self.count[:8])[0]

    def step(self) -> None:
        """One more."""
        self.count[:8] = struct.pack("q", self.moved() + 1)

    def cases(self, name: str) -> int:
        """Cases of a target so far."""
        return self.next.get(name, self.first) - self.first

    def work(self, name: str, folder: Path, seconds: float) -> None:
        """One turn of a target, in its own process."""
        until, number = time.monotonic() + seconds, self.next.get(name, self.first)
        self.start(name)
        while time.monotonic() < until:
            self.one(name, folder, chance_of(name, number), str(number))
            number += 1

    def start(self, name: str) -> None:
        """Forget the turn before."""
        self.count[:8] = struct.pack("q", 0)
        self._file(name).unlink(missing_ok=True)

    def one(self, name: str, folder: Path, chance: random.Random, label: str) -> bool:
        """One case; whether it was a finding not seen before."""
        case = run_case(name, folder, chance, label)
        self.step()
        cause = f"{case['error'][:160]} [{where(case['trace'])}]"
        if not case["error"] or f"{name}: {cause}" in self.known:
            return False
        self.known.add(f"{name}: {cause}")
        keep(self.out, f"{name}-{label}", Path(case["path"]), f"{case['error']}\n\n{case['trace']}")
        with open(self._file(name), "a", encoding="utf8") as file:
            file.write(json.dumps([cause, label]) + "\n")
        return True

    def findings(self, name: str, ended: str) -> dict[str, str]:
        """Causes and cases of the turn that is over; ``ended`` is what ended its process."""
        first = self.next.get(name, self.first)
        self.next[name] = first + self.moved() + bool(ended)
        found = self._found(name)
        if ended:
            found[ended] = str(first + self.moved())
        return found

    def _found(self, name: str) -> dict[str, str]:
        file, found = self._file(name), {}
        for line in file.read_text(encoding="utf8").splitlines() if file.exists() else []:
            cause, label = json.loads(line)
            found.setdefault(cause, label)
        self.known |= {f"{name}: {cause}" for cause in found}
        return found

    def _file(self, name: str) -> Path:
        return self.out / f"{name}.found"


class Atheris(Plain):
    """libFuzzer, through atheris: inputs are the chance; those that reach new code are kept in ``out``/corpus."""

    name = "atheris"

    def work(self, name: str, folder: Path, seconds: float) -> None:
        """One turn of a target; does not return, libFuzzer ends the process."""
        import atheris

        self.start(name)
        corpus = self.out / "corpus" / name
        corpus.mkdir(parents=True, exist_ok=True)

        def one(data: bytes) -> None:
            label = f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
            (self.out / f"{name}.now").write_bytes(data)
            if self.one(name, folder, Drawn(data), label):
                (self.out / label).write_bytes(data)

        sys.setrecursionlimit(1000)
        options = [f"-max_total_time={int(seconds)}", "-max_len=512", "-rss_limit_mb=0", "-timeout=120"]
        options += ["-detect_leaks=0", "-print_final_stats=1", f"-artifact_prefix={self.out}/{name}-"]
        atheris.Setup(["fuzz", *options, str(corpus)], one)
        atheris.Fuzz()

    def findings(self, name: str, ended: str) -> dict[str, str]:
        """As of Plain; the input of a dead process is kept."""
        self.next[name] = self.next.get(name, self.first) + self.moved() + bool(ended)
        found = self._found(name)
        if ended:
            label = f"{name}-dead-{os.urandom(3).hex()}"
            shutil.copyfile(self.out / f"{name}.now", self.out / label)
            found[ended] = label
        return found
