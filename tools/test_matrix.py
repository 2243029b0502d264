"""``make test-matrix``: the tests that touch arithmetic, signals, ranks and files, once for each kind of machine.

    python tools/test_matrix.py                       every row
    python tools/test_matrix.py --rows avx2 root      the rows whose name holds one of these words
    python tools/test_matrix.py --list                the rows, and which of them this machine can show

A row is a surrounding: settings of torch's libraries, threads, a user, a language, a mount. Before its tests run, a
probe in the same surrounding says what is in force there; a setting that is not in force is a failure, and one that
this machine lacks is written down as such, never as passed. Rows that were run replace those kept in
bench/results/<machine>/matrix.json, from which tools/reliability.py makes the table of docs/reliability.md.
Ends with 1 when a row failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastsrgan.core.system import measured_on  # noqa: E402

CPUINFO = Path("/proc/cpuinfo")
NOBODY = 65534

# The short form, in the words of pytest: about a minute of two cores.
SHORT = (
    # arithmetic
    "tests/test_golden_steps.py",
    "tests/test_critic_step.py",
    "tests/test_engine.py",
    "tests/test_stitch.py",
    "tests/test_resample.py",
    # threads, signals
    "tests/test_workers.py",
    "tests/test_interrupts.py",
    "tests/test_resume.py",
    # ranks
    "tests/test_ranks.py",
    # files
    "tests/test_runtime.py",
    "tests/test_checkpoint.py",
    "tests/test_images.py",
    "tests/test_store.py",
    "tests/test_convert.py",
)

# Prints what is in force where it runs. The language is what a program would take over from the environment.
PROBE = """
import json, locale, os, time, torch
try:
    locale.setlocale(locale.LC_ALL, "")
    language = locale.setlocale(locale.LC_CTYPE)
except locale.Error:
    language = "none"
room = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
cpuinfo = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
print(json.dumps({
    "simd": torch.backends.cpu.get_cpu_capability(),
    "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
    "threads": torch.get_num_threads(),
    "user": os.getuid(),
    "zone": time.strftime("%z", time.localtime(0)),
    "language": language,
    "shm_free": room.f_bavail * room.f_frsize if room else 0,
    "bf16_flag": "avx512_bf16" in cpuinfo,
}))
"""


class CannotRun(Exception):
    """Why a row is not run on this machine."""


@dataclass(frozen=True)
class Row:
    """One surrounding.

    environment : variables of the tests and of the probe
    flags : what the processor has to announce in /proc/cpuinfo
    wrapper : makes the words in front of the command, given a folder for its files; raises CannotRun
    in_force : fact of the probe -> its value there, or a function that says whether the value will do
    busy : a busy loop on every core beside the tests
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    wrapper: Callable[[Path], list[str]] = lambda folder: []
    in_force: dict[str, Any] = field(default_factory=dict)
    busy: bool = False


def nobody(folder: Path) -> list[str]:
    """Another user than root, who owns nothing but the folder of the tests."""
    if os.getuid() != 0:
        return []  # the tests are that user's already
    _needs("setpriv")
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # Asked behind a shell: setpriv itself starts its program with the rights of root.
    asked = ["sh", "-c", 'exec "$0" -c "import torch"', sys.executable]
    if subprocess.run([*user, *asked], cwd=ROOT, capture_output=True).returncode:
        user = [*_interpreter_for_all(folder), *user]
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    if subprocess.run([*user, *asked], cwd=ROOT, capture_output=True).returncode:
        raise CannotRun(f"user {NOBODY} may not read {sys.executable} or this folder")
    return user


def _interpreter_for_all(folder: Path) -> list[str]:
    """Mounts in which an interpreter below a closed folder, as root's home is, can be reached by everyone."""
    base = Path(sys.base_prefix).resolve()
    closed = [place for place in base.parents if not place.stat().st_mode & 0o001]
    if not closed:
        return []
    (folder / "python").mkdir()
    return _mounted(
        f"mount --bind '{base}' '{folder}/python'; mount -t tmpfs -o mode=755 none '{closed[-1]}'; "
        f"mkdir -p '{base}'; mount --bind '{folder}/python' '{base}'"
    )


def full_shm(folder: Path) -> list[str]:
    """A /dev/shm of its own of 64 KiB, filled to the last byte."""
    return _mounted("mount -t tmpfs -o size=64k none /dev/shm; cat /dev/zero > /dev/shm/full 2>/dev/null || true")


def announced(folder: Path) -> list[str]:
    """A /proc/cpuinfo that announces bfloat16, whatever the processor can do."""
    told = re.sub(r"^(flags\s*:.*)$", r"\1 avx512f avx512_bf16 amx_bf16", CPUINFO.read_text(), flags=re.MULTILINE)
    (folder / "cpuinfo").write_text(told, encoding="utf8")
    return _mounted(f"mount --bind '{folder}/cpuinfo' {CPUINFO}")


def _mounted(program: str) -> list[str]:
    """The words that run a command behind a shell program in mounts of its own."""
    _needs("unshare")
    words = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else []), "sh", "-ec"]
    tried = subprocess.run([*words, program], capture_output=True, text=True)
    if tried.returncode:
        lines = tried.stderr.strip().splitlines()
        raise CannotRun(f"private mounts are not allowed here: {lines[-1] if lines else 'no reason given'}")
    return [*words, f'{program}\nexec "$@"', "sh"]


def turkish(folder: Path) -> list[str]:
    """Makes the Turkish locale in the folder, where it is not installed."""
    words = [sys.executable, "-c", "import locale; locale.setlocale(locale.LC_ALL, 'tr_TR.UTF-8')"]
    if subprocess.run(words, capture_output=True).returncode == 0:
        return []
    _needs("localedef")
    (folder / "locales").mkdir()
    words = ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(folder / "locales" / "tr_TR.UTF-8")]
    made = subprocess.run(words, capture_output=True, text=True)
    if not (folder / "locales" / "tr_TR.UTF-8" / "LC_CTYPE").exists():
        raise CannotRun(f"the locale tr_TR.UTF-8 is not installed and cannot be made: {made.stderr.strip()[:100]}")
    return ["env", f"LOCPATH={folder / 'locales'}"]


def _needs(command: str) -> None:
    if shutil.which(command) is None:
        raise CannotRun(f"{command} is not installed")


AVX512 = ("avx512f", "avx512dq", "avx512bw", "avx512vl")
ROWS = (
    Row("as it is"),
    Row("a processor that announces bfloat16", wrapper=announced, in_force={"bf16_flag": True}),
    Row("ATEN_CPU_CAPABILITY=default", {"ATEN_CPU_CAPABILITY": "default"}, in_force={"simd": "DEFAULT"}),
    Row("ATEN_CPU_CAPABILITY=avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, ("avx2",), in_force={"simd": "AVX2"}),
    Row("ATEN_CPU_CAPABILITY=avx512", {"ATEN_CPU_CAPABILITY": "avx512"}, AVX512, in_force={"simd": "AVX512"}),
    Row("ONEDNN_MAX_CPU_ISA=AVX2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, ("avx2",), in_force={"onednn": "AVX2"}),
    Row("ONEDNN_MAX_CPU_ISA=AVX512_CORE", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, AVX512),
    Row(
        "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16",
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        (*AVX512, "avx512_bf16"),
    ),
    Row("1 thread", {"OMP_NUM_THREADS": "1"}, in_force={"threads": 1}),
    Row("2 threads", {"OMP_NUM_THREADS": "2"}, in_force={"threads": 2}),
    # MKL, by itself, makes it no more threads than cores
    Row("4 threads", {"OMP_NUM_THREADS": "4", "MKL_DYNAMIC": "FALSE"}, in_force={"threads": 4}),
    Row("a user who is not root", wrapper=nobody, in_force={"user": lambda uid: uid != 0}),
    Row("TZ=Asia/Kolkata", {"TZ": "Asia/Kolkata"}, in_force={"zone": "+0530"}),
    Row("LC_ALL=C", {"LC_ALL": "C"}, in_force={"language": lambda name: name.startswith("C")}),
    Row("LC_ALL=tr_TR.UTF-8", {"LC_ALL": "tr_TR.UTF-8"}, wrapper=turkish, in_force={"language": "tr_TR.UTF-8"}),
    Row("a full /dev/shm", wrapper=full_shm, in_force={"shm_free": 0}),
    Row("a busy loop on every core", busy=True),
)


def features() -> set[str]:
    """What the processor announces; empty where the system does not say."""
    try:
        text = CPUINFO.read_text(encoding="utf8", errors="replace")
    except OSError:
        text = ""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return set(flags[1].split()) if flags else set()


@contextlib.contextmanager
def load(busy: bool) -> Iterator[None]:
    """Busy loops beside what is done inside."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores() if busy else 0)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run(row: Row, tests: Sequence[str], jobs: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """What a row came to: ``result`` ("passed", "failed", "not on this processor", "not run"), ``reason``, figures."""
    flags = features()
    missing = [flag for flag in row.flags if flag not in flags]
    if missing:
        return {"result": "not on this processor", "reason": f"no {', '.join(missing)}"}
    with tempfile.TemporaryDirectory(prefix="fastsrgan-matrix-") as name, load(row.busy):
        folder = Path(name)
        for below in ("home", "tmp"):
            (folder / below).mkdir()
        try:
            wrapper = row.wrapper(folder)
        except CannotRun as error:
            return {"result": "not run", "reason": str(error)}
        environment = {
            **os.environ,
            "HOME": f"{folder}/home",
            "TMPDIR": f"{folder}/tmp",
            "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/hypothesis",
            "PYTHONDONTWRITEBYTECODE": "1",
            **row.environment,
        }
        probe = subprocess.run(
            [*wrapper, sys.executable, "-c", PROBE], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        if probe.returncode:
            return {"result": "failed", "reason": f"the probe: {probe.stderr.strip().splitlines()[-1][:200]}"}
        facts = json.loads(probe.stdout)
        wrong = not_in_force(row, facts)
        if wrong:
            return {"result": "failed", "reason": f"not in force: {wrong}"}
        command = [*wrapper, sys.executable, "-m", "pytest", "-q", "-n", str(jobs), "-p", "no:cacheprovider"]
        command += ["--basetemp", f"{folder}/tmp/pytest", *more, *tests]
        began, before = time.monotonic(), _cpu_seconds()
        done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        found = ended(done.returncode, done.stdout)
        found |= {"seconds": round(time.monotonic() - began), "cpu_seconds": round(_cpu_seconds() - before)}
        return found | {"facts": facts}


def not_in_force(row: Row, facts: dict[str, Any]) -> str:
    """Which fact is not as the row wants it, in words; empty when all are."""
    for name, wanted in row.in_force.items():
        if not (wanted(facts[name]) if callable(wanted) else facts[name] == wanted):
            return f"{name} is {facts[name]!r}"
    return ""


def ended(code: int, output: str) -> dict[str, Any]:
    """Result and counts from pytest's exit code and output. No test at all is no pass."""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", output)}
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    passed = code == 0 and counts.get("passed", 0) > 0
    found: dict[str, Any] = {"result": "passed" if passed else "failed", "tests": counts.get("passed", 0)}
    if counts.get("skipped"):
        found["skipped"] = counts["skipped"]
    if not passed:
        lines = [line for line in output.splitlines() if line.strip()]
        found |= {"failed": failed, "reason": ", ".join(failed) or (lines[-1][:200] if lines else f"code {code}")}
    return found


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def told(name: str, found: dict[str, Any]) -> str:
    """A row in one line."""
    text = f"{name:40s} {found['result']}"
    if "seconds" in found:
        text += f", {found['tests']} tests, {found['seconds']} s ({found['cpu_seconds']} s of processor time)"
    return text + (f": {found['reason']}" if "reason" in found else "")


def kept(path: Path, name: str) -> dict[str, Any]:
    """The rows that were kept of this processor, in an order; without any when it is another one."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf8"))
        if found["cpu"] == name and found["cores"] == cores():
            return found["rows"]
    return {}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[""], metavar="WORD", help="rows whose name holds a word")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=min(cores(), 8))
    parser.add_argument("--tests", nargs="+", default=list(SHORT), help="other tests than those of the short form")
    parser.add_argument("--json", type=Path, help="file that keeps the rows, e.g. bench/results/<machine>/matrix.json")
    args = parser.parse_args()
    chosen = [row for row in ROWS if any(word.lower() in row.name.lower() for word in args.rows)]
    if not chosen:
        parser.error(f"no row holds {' or '.join(args.rows)}; see --list")
    flags, where = features(), measured_on()
    name = where["machine"]["cpu"]
    if args.list:
        for row in chosen:
            missing = [flag for flag in row.flags if flag not in flags]
            print(f"{row.name:40s} {'not on this processor: no ' + ', '.join(missing) if missing else 'can be run'}")
        return 0
    print(f"{name}, {cores()} cores, {len(args.tests)} files of tests, {args.jobs} processes")
    rows, commit = kept(args.json, name) if args.json else {}, where["commit"]
    failed = False
    for row in chosen:
        found = run(row, args.tests, args.jobs)
        failed |= found["result"] == "failed"
        if tuple(args.tests) != SHORT and "tests" in found:
            found["files"] = args.tests
        print(told(row.name, found), flush=True)
        rows[row.name] = found | {"commit": commit}
        if args.json:
            order = {row.name: rows[row.name] for row in ROWS if row.name in rows}
            text = json.dumps({"cpu": name, "cores": cores(), "rows": order}, indent=1)
            args.json.write_text(text + "\n", encoding="utf8")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
