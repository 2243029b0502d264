"""Damaged files through every reader, for as long as asked: ``python tools/fuzz.py --minutes 60``.

Two engines: plain seeded damage, and atheris, which grows its inputs by the code they reach (``pip install atheris``;
taken where it is there). A case is its target and its number, ``--target store --case 1234``, or with atheris its
input, ``--target store --input build/fuzz/store-1a2b3c``; either runs that one again. A finding is anything but
success or a one-line FastsrganError, 20 s of processor time, 512 MiB of memory, five minutes without an end, or a dead
process; its files and traceback are kept in the folder of ``--out``. Exit code 1 when there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch count the cores

ROOT = Path(__file__).parent.parent
for place in (ROOT, ROOT / "tests", ROOT / "tools"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

WATCHED = ["fastsrgan", "nibabel", "pydicom", "yaml"]  # what atheris counts the reached code of
TURN = 60.0  # seconds of a process, then the next target
STUCK = 300.0  # seconds in one case after which its process is ended: processor time has its own limit
MEMORY = 6 << 30  # private memory: a case that needs more is a finding, not the end of the machine


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the cases, in memory where there is room: they are written and read thousands of times."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 256 << 20
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=shm if roomy else None) as folder:
        yield Path(folder)


def in_process(work: Callable[[], None], log: Path, progress: Callable[[], int], seconds: float) -> str:
    """Run ``work`` in a forked process; what ended it other than success, "" for nothing.

    The libraries are imported once, in this process; what crashes costs one case.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    seen, moved, until = progress(), time.monotonic(), time.monotonic() + 3 * seconds + STUCK
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return f"the process ended with {code}: {log.read_text(errors='replace')[-400:]}" if code else ""
        if progress() != seen:
            seen, moved = progress(), time.monotonic()
        if time.monotonic() - moved > STUCK or time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no end after {STUCK:g} s"
        time.sleep(0.05)


def supervise(names: list[str], args: argparse.Namespace, engine: Any) -> int:
    """Every target in turn, each turn a process of its own, until the time is over."""
    from fastsrgan.core.system import measured_on  # behind `load`, which instruments it

    began = time.monotonic()
    until, where = began + 60 * args.minutes, measured_on()
    turn = min(TURN, 60 * args.minutes / len(names))
    found: dict[str, str] = {}
    with scratch() as folder:
        while time.monotonic() < until:
            for name in names:
                ended = in_process(
                    lambda n=name: engine.work(n, folder, turn), args.out / "log.txt", engine.moved, turn
                )
                for cause, case in engine.findings(name, ended).items():
                    if f"{name}: {cause}" not in found:
                        print(f"{name} case {case}: {cause}", flush=True)
                    found.setdefault(f"{name}: {cause}", case)
                shutil.rmtree(folder / name, ignore_errors=True)
                used = resource.getrusage(resource.RUSAGE_CHILDREN)
                summary = {
                    "engine": engine.name,
                    "minutes": round((time.monotonic() - began) / 60, 1),
                    "cpu_minutes": round((used.ru_utime + used.ru_stime) / 60, 1),
                    "cases": {n: engine.cases(n) for n in names},
                    "findings": found,
                    **where,
                }
                text = json.dumps(summary, indent=2) + "\n"
                (args.out / "summary.json").write_text(text, encoding="utf8")
                if time.monotonic() > until:
                    break
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(args.json.read_text(encoding="utf8")) if args.json.exists() else []
        args.json.write_text(json.dumps([*before, summary], indent=2) + "\n", encoding="utf8")
    print(json.dumps({"cases": summary["cases"], "findings": len(found)}))
    return 1 if found else 0


def chosen(engine: str) -> str:
    """ "plain" or "atheris"; says which."""
    there = importlib.util.find_spec("atheris") is not None
    if engine == "atheris" and not there:
        raise SystemExit("error: atheris: not installed (pip install atheris, or --engine plain)")
    if engine == "auto":
        engine = "atheris" if there else "plain"
    hint = "" if there else " (pip install atheris for inputs that grow by the code they reach)"
    print(f"engine: {engine}{hint}", flush=True)
    return engine


def load(engine: str) -> tuple[Any, dict[str, Any]]:
    """The module of an engine and the targets, imported so that the engine sees what they reach."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=WATCHED):
            import fuzz_targets
    else:
        import fuzz_targets
    import fuzz_engines

    logging.getLogger("fastsrgan").setLevel(logging.CRITICAL)
    return fuzz_engines, fuzz_targets.TARGETS


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--engine", choices=("auto", "plain", "atheris"), default="auto")
    parser.add_argument("--target", action="append", help="(all)")
    parser.add_argument("--case", type=int, help="run this case of the plain engine alone")
    parser.add_argument("--input", type=Path, help="run this input of atheris alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="findings go here (build/fuzz)")
    parser.add_argument("--json", type=Path, help="figures of the whole run are added to this list")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    alone = args.case is not None or args.input is not None
    which = "plain" if alone else chosen(args.engine)
    engines, targets = load(which)
    names = args.target or list(targets)
    if unknown := set(names) - set(targets):
        raise SystemExit(f"error: --target: no {', '.join(sorted(unknown))} (one of {', '.join(targets)})")
    if not alone:
        engine = engines.Plain(args.out, args.first) if which == "plain" else engines.Atheris(args.out)
        return supervise(names, args, engine)
    failed = False
    with scratch() as folder:
        for name in names:
            draw = engines.chance_of(name, args.input.read_bytes() if args.input else args.case)
            case = engines.run_case(name, folder, draw, str(args.input or args.case))
            print(case["trace"] or f"{name} case {case['case']}: {case['error'] or 'fine'}")
            failed = failed or bool(case["error"])
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
