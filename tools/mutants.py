"""``python tools/mutants.py``: small faults put into a copy, one at a time; the tests named beside each must notice.

The table is tools/mutants/*.toml, a file per part: what is wrong, the file, the text that stands there once, what is
put there, the tests, and, of a change that no test can see, why it is the same (``same``). A run goes on where the one
before ended (``--json``): what was noticed stays so, a survivor is tried again when its tests or its file have changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tools" / "mutants"
NOTICED, MISSED, GONE, BROKEN = "noticed", "missed", "no longer applies", "tests fail without it"
# Imported once, before the tests of each fault run in a fork: most of a short test's time is spent on these.
LIBRARIES = (
    "torch",
    "torch.utils._python_dispatch",
    "torch.distributed",
    "torch.optim",
    "scipy.ndimage",
    "scipy.stats",
)
LIBRARIES += ("zarr", "nibabel", "pytest", "hypothesis", "hypothesis.strategies", "yaml", "h5py", "safetensors.torch")
LIBRARIES += ("fsspec", "skimage.metrics", "rich.progress")
WHERE = "import json; from fastsrgan.core.system import measured_on; print(json.dumps(measured_on()))"
CPU_SECONDS = 300  # of the tests of one fault: what never ends is noticed too
PASSED, FAILED = 0, 1  # pytest's exit codes


@dataclass(frozen=True)
class Mutant:
    """One fault; ``tests`` are what pytest is given."""

    part: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    same: str = ""

    @property
    def name(self) -> str:
        """Unique in the table."""
        return f"{self.part}: {self.what}"

    def applied(self, text: str) -> str:
        """The file's text with the fault in it, "" where the old one does not stand there exactly once."""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else ""

    @property
    def fault(self) -> str:
        """A hash of all that the table says of it: what was noticed stays so while that is the same."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def state(self, root: Path) -> str:
        """A hash of the fault, of its file and of its tests: what decides whether a survivor is tried again."""
        digest = hashlib.sha256(self.fault.encode())
        for file in sorted({self.file, *(test.partition("::")[0] for test in self.tests)}):
            digest.update((root / file).read_bytes() if (root / file).is_file() else b"")
        return digest.hexdigest()[:16]


def table(folder: Path = TABLE) -> list[Mutant]:
    """All faults, by part."""
    found = []
    for path in sorted(folder.glob("*.toml")):
        for row in tomllib.loads(path.read_text(encoding="utf8"))["mutant"]:
            tests = row.pop("tests")
            found.append(Mutant(path.stem, tests=(tests,) if isinstance(tests, str) else tuple(tests), **row))
    return found


def faults(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """What is wrong with the table: text that does not stand there once, no change, no Python, tests that are gone."""
    wrong = [f"{name}: twice" for name, n in Counter(m.name for m in mutants).items() if n > 1]
    for m in mutants:
        path = root / m.file
        changed = m.applied(path.read_text(encoding="utf8")) if path.is_file() else ""
        if not changed or m.old == m.new:
            wrong.append(f"{m.name}: {GONE} to {m.file}")
        elif path.suffix == ".py":
            try:
                ast.parse(changed)
            except SyntaxError as error:
                wrong.append(f"{m.name}: is no Python ({error.msg})")
        for test in m.tests:
            file, _, inside = test.partition("::")
            text = (root / file).read_text(encoding="utf8") if (root / file).is_file() else ""
            names = inside.partition("[")[0].split("::") if inside else []
            if not text or any(f" {name}(" not in text and f"class {name}" not in text for name in names):
                wrong.append(f"{m.name}: there is no test {test}")
    return wrong


def copy_of(root: Path, target: Path) -> None:
    """What git tracks and what is new, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def outcome(copy: Path, tests: Sequence[str]) -> tuple[int, str, float]:
    """(exit code, what it said, processor seconds) of pytest in a fork, stopped at the first failure."""
    log = copy / ".mutant.log"
    pid = os.fork()
    if not pid:
        _child(copy, tests, log)
    _, status, used = os.wait4(pid, 0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what the tests started and left
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else FAILED
    told = log.read_text(encoding="utf8", errors="replace") if log.exists() else ""
    return code, told.strip(), used.ru_utime + used.ru_stime


def _child(copy: Path, tests: Sequence[str], log: Path) -> None:
    """The tests in this process, a fork; does not return."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    os.chdir(copy)
    sys.path[:0] = [str(copy)]
    # CI: hypothesis takes the same examples each time.
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "CI": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(out, stream)
    code = FAILED
    try:
        import pytest

        plugins = [word for name in ("pytest_timeout", "no:cacheprovider") for word in ("-p", name)]
        code = int(pytest.main(["-x", "-q", "--tb=line", "-W", "ignore", *plugins, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


@contextlib.contextmanager
def put_in(copy: Path, mutant: Mutant, turn: int) -> Iterator[None]:
    """The fault in the copy's file, which is as it was afterwards."""
    path = copy / mutant.file
    text, stat = path.read_bytes(), path.stat()
    path.write_text(mutant.applied(text.decode()), encoding="utf8")
    os.utime(path, (stat.st_atime, stat.st_mtime + 10 + turn))  # no compiled file of another text is taken for it
    try:
        yield
    finally:
        path.write_bytes(text)
        os.utime(path, (stat.st_atime, stat.st_mtime))


def first_failure(lines: str) -> str:
    """The test that pytest's short summary names first."""
    named = [line.split()[1] for line in lines.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return named[0] if named else f"ended early: {(lines.splitlines() or ['no word'])[-1][:120]}"


def run(
    chosen: Sequence[Mutant], mutants: Sequence[Mutant], target: Path, minutes: float, root: Path = ROOT
) -> dict[str, Any]:
    """Try those of the chosen that are to be tried until the time is over.

    Returns the results of all ``mutants`` so far by name, which are kept in ``target`` after each.
    """
    results = read(target)
    todo = [m for m in chosen if not settled(m, results.get(m.name), root)]
    todo.sort(key=lambda m: m.name in results)  # new ones first
    end, where = time.monotonic() + 60 * minutes, measured_on()
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    gc.freeze()  # a fork then shares what was imported
    sound: dict[tuple[str, ...], bool] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        copy_of(root, copy)
        for turn, mutant in enumerate(todo):
            if time.monotonic() > end:
                break
            results[mutant.name] = {
                **tried(copy, mutant, turn, sound),
                "fault": mutant.fault,
                "state": mutant.state(root),
                "commit": where["commit"],
            }
            result = results[mutant.name]
            print(f"{result['result']:10} {mutant.name}  {result.get('by', '')}", flush=True)
            save(target, results, mutants, where["machine"])
    return results


def measured_on() -> dict[str, Any]:
    """That of ``core.system``, in a process of its own: a fork of one that holds the package would test no copy."""
    return json.loads(subprocess.run([sys.executable, "-c", WHERE], cwd=ROOT, check=True, capture_output=True).stdout)


def tried(copy: Path, mutant: Mutant, turn: int, sound: dict[tuple[str, ...], bool]) -> dict[str, Any]:
    """What came of one fault; ``sound`` remembers which tests succeed without any."""
    path = copy / mutant.file
    if not path.is_file() or not mutant.applied(path.read_text(encoding="utf8")):
        return {"result": GONE}
    with put_in(copy, mutant, turn):
        code, told, seconds = outcome(copy, mutant.tests)
    result = {"result": MISSED, "cpu_seconds": round(seconds, 1)}
    if code == PASSED:
        return result
    if mutant.tests not in sound:  # a test that fails anyway notices nothing
        sound[mutant.tests] = outcome(copy, mutant.tests)[0] == PASSED
    return {**result, "result": NOTICED if sound[mutant.tests] else BROKEN, "by": first_failure(told)}


def read(target: Path) -> dict[str, Any]:
    """The results so far by name."""
    return json.loads(target.read_text(encoding="utf8"))["mutants"] if target.is_file() else {}


def settled(mutant: Mutant, result: dict[str, Any] | None, root: Path) -> bool:
    """Whether a fault need not be tried again."""
    if result is None or result["result"] in (GONE, BROKEN) or result.get("fault") != mutant.fault:
        return False
    return result["result"] == NOTICED or result["state"] == mutant.state(root)


def save(target: Path, results: dict[str, Any], mutants: Sequence[Mutant], machine: dict[str, Any]) -> None:
    """Results in the order of the table, whole or not at all."""
    ordered = {m.name: results[m.name] for m in mutants if m.name in results}
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine, "mutants": ordered}, indent=1) + "\n", encoding="utf8")
    temporary.replace(target)


def report(mutants: Sequence[Mutant], results: dict[str, Any]) -> str:
    """Parts as a table in Markdown, then every fault that no test noticed."""
    text = "| part | faults | noticed | the same by law | missed | not tried |\n|---|---|---|---|---|---|\n"
    results = {m.name: results[m.name] for m in mutants if results.get(m.name, {}).get("fault") == m.fault}
    rows = {part: [m for m in mutants if m.part == part] for part in dict.fromkeys(m.part for m in mutants)}
    for part, found in {**rows, "all": list(mutants)}.items():
        said = Counter(verdict(m, results.get(m.name)) for m in found)
        left = said["not tried"] + said[GONE] + said[BROKEN]
        text += f"| {part} | {len(found)} | {said[NOTICED]} | {said['the same']} | {said[MISSED]} | {left} |\n"
    same = [f"* {m.name}: {m.same}\n" for m in mutants if verdict(m, results.get(m.name)) == "the same"]
    missed = [f"* {m.name}\n" for m in mutants if verdict(m, results.get(m.name)) == MISSED]
    other = {m.name: verdict(m, results.get(m.name)) for m in mutants}
    odd = [f"* {name}: {said}\n" for name, said in other.items() if said in (GONE, BROKEN)]
    text += ("\nThe same by law, and why no test can notice:\n\n" + "".join(same)) if same else ""
    text += ("\nMissed:\n\n" + "".join(missed)) if missed else ""
    return text + (("\nNot judged:\n\n" + "".join(odd)) if odd else "")


def verdict(mutant: Mutant, result: dict[str, Any] | None) -> str:
    """What became of one fault."""
    if result is None:
        return "not tried"
    return "the same" if mutant.same and result["result"] == MISSED else str(result["result"])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--only", default="", help="words in the names of the faults to try, with commas between")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "mutants.json", help="results, gone on with")
    parser.add_argument("--list", action="store_true", help="try none, tell the results so far")
    args = parser.parse_args()
    mutants = table()
    words = [word.strip() for word in args.only.split(",") if word.strip()]
    chosen = [m for m in mutants if not words or any(word in m.name for word in words)]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    results = read(args.json) if args.list else run(chosen, mutants, args.json, args.minutes)
    print(report(chosen, results))
    return int(any(verdict(m, results.get(m.name)) in (MISSED, GONE, BROKEN) for m in chosen))


if __name__ == "__main__":
    raise SystemExit(main())
