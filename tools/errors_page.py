"""``python tools/errors_page.py``: docs/errors.md, what the commands say when something is wrong, word for word.

Every message is what a command said a moment ago, to a fault that was made for it (tests/error_cases.py). ``--check``
writes nothing and ends with 1 when the page is out of date.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
for place in (ROOT, ROOT / "tests"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

TOP = """# What errors say

Made by `python tools/errors_page.py`, which makes each fault and runs the command; a test says when the page is out of
date. The form is public: one line on standard error, `error: WHAT: REASON (HINT)`: what came, what is allowed or what
to do; the exit codes are those of the [README](../README.md). Warnings stand in the result's record and report too.
Sizes that depend on the machine are written as N, words of the HDF5 and safetensors libraries as ..., the current
folder as HERE; the calls are made with `--quiet` and ask object storage once. `verify` lists what it finds on standard
output. Faults that no single command shows (kills, signals, ranks, memory of a device) are in
[Reliability](reliability.md), with their tests.
"""
MACHINE = (  # what differs between machines, and what stands for it
    (re.compile(r"[\d.]+ (bytes|[KMGTP]iB) (is|are|free)"), r"N \2"),
    (re.compile(r"(needs|limit is|--max-memory) [\d.]+( ?)(M|KiB|MiB|GiB)\b"), r"\1 N\2\3"),
    (re.compile(r"\d+ CUDA devices"), "N CUDA devices"),
    (re.compile(r"; \d+ attempts in \d+ s"), ""),
    (re.compile(r"(safetensors|HDF5) file: [^(]*\("), r"\1 file: ... ("),  # the words of the library
    (re.compile(r"\d+ times the file's [\d.]+ KiB"), "N times the file's N KiB"),
    (re.compile(r"a gzip file of \d+ bytes"), "a gzip file of N bytes"),
)


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """A folder with good files, which is the current one; object storage is asked once only."""
    from commands import make_work

    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="errors-") as folder:
        make_work(Path(folder))
        os.chdir(folder)
        try:
            with mock.patch.dict(os.environ, {"FASTSRGAN_STORE_RETRIES": "0", "NO_COLOR": "1", "COLUMNS": "100"}):
                yield
        finally:
            os.chdir(before)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """A disk with 4 KiB left."""
    usage = namedtuple("usage", "total used free")
    with mock.patch.object(shutil, "disk_usage", lambda _: usage(1 << 20, 1 << 20, 4096)):
        yield


def run(words: list[str], around: contextlib.AbstractContextManager) -> tuple[int, str]:
    """Exit code of a command, and all it said, without what progress says."""
    from fastsrgan.cli.main import main

    said = io.StringIO()
    with around, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["--quiet", *words])
    text = said.getvalue().replace(f"{Path.cwd()}{os.sep}", "").replace(str(Path.cwd()), "HERE")
    for pattern, plain in MACHINE:
        text = pattern.sub(plain, text)
    return code, text


def page() -> str:
    """The whole page."""
    from error_cases import CASES

    from tools.reliability import FAULTS

    told: dict[int, list[str]] = {}
    with workplace():
        for row, what, make in CASES:
            for folder in ("out", "new.zarr"):
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                words = make()
            code, text = run(words, full_disk() if row == 24 else contextlib.nullcontext())
            shown = f"$ fastsrgan {shlex.join(words)}\n{text.rstrip()}"
            told.setdefault(row, []).append(f"{what}: exit code {code}\n\n```text\n{shown}\n```\n")
        if Path("canary").exists():
            raise RuntimeError("something ran that must never run")
    titles = {0: "the command line", **{n: fault for n, (fault, _, _) in FAULTS.items()}}
    parts = []
    for row in sorted(told):
        parts.append(f"\n## {f'{row}. ' if row else ''}{titles[row][:1].upper()}{titles[row][1:]}\n")
        parts += [f"\n{text[:1].upper()}{text[1:]}" for text in told[row]]
    return TOP + "".join(parts)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf8")
        return 0
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf8") != text
    if stale:
        print(f"{PAGE} is out of date: python tools/errors_page.py", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
