"""Commands of the real command line in processes of their own, with faults around them: limits, no network, a terminal.

They are forked from the server of ``processes.py``, so one costs no second of start-up.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cohort import SMALL, make_store
from nifti_files import HEAD, rigid, write
from processes import CONTEXT, WAIT, ended

from fastsrgan import __main__
from fastsrgan.cli.main import main
from fastsrgan.infer import image as infer_job
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator

TILES = ("--patch", "16", "--step", "16")
SETTINGS = SMALL.replace(epochs=1, steps_per_epoch=2, critic_iterations=1)
HELD = "held"  # file that a process makes when it has reached the moment it is to be stopped at


def make_work(path: Path) -> Path:
    """A cohort with its table and store, three scans, settings and weights in a folder."""
    make_store(path)
    for i in range(3):
        write(path / f"scan{i}.nii.gz", np.roll(HEAD, i, 0), rigid((1.0, 1, 3)))
    (path / "c.yaml").write_text(SETTINGS.to_yaml(), encoding="utf8")
    weights.save_generator(path / "w.safetensors", build_generator(GeneratorSpec(kernel=1), seed=1).eval())
    return path


def call(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    code = main(["--quiet", *map(str, words)])
    return code, *capsys.readouterr()


def one_line(told: str, *words: str) -> None:
    """An error as users get it: one line with a hint in brackets, and these words."""
    assert told.count("\n") == 1 and told.startswith("error: "), told
    assert all(word in told for word in words), told


def litter(folder: Path) -> list[str]:
    """Temporary files below a folder."""
    return [str(p) for p in folder.rglob("*") if ".tmp-" in p.name or p.name.endswith(".partial")]


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative: by a signal), what it wrote, its largest memory in bytes."""

    code: int | None
    out: str
    err: str
    peak: int
    asked: list[str]

    @property
    def errors(self) -> list[str]:
        """The error lines on standard error."""
        # A terminal shows ^C, and how the bar ends, in front of it.
        return [line[line.index("error: ") :] for line in self.err.splitlines() if "error: " in line]


class Command:
    """A running command. ``folder`` gets its output.

    limits : names of RLIMIT constants -> value, set before the command
    hold : "slow", "stuck": see ``_hold``; ``wait_for`` returns when that moment is reached
    offline : no network device, and every attempt to use one is noted in ``Ended.asked``
    stdin : "null", "closed" or "tty"; with "tty" all three are a terminal, written to by ``key``
    streams : what standard output (1) and error (2) are instead of files: "closed", or "dead": a pipe nobody reads
    """

    def __init__(self, folder: Path, *words: object, stdin: str = "null", **faults: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.terminal = folder, None
        if stdin == "tty":
            self.terminal, slave = pty.openpty()
            faults["terminal"] = os.ttyname(slave)
            self._slave = slave
        self.process = CONTEXT.Process(target=_enter, args=(folder, [str(w) for w in words], stdin, faults))
        self.process.start()

    def wait_for(self, name: str = HELD) -> None:
        """Wait until a file is there; AssertionError when the command ends before."""
        until = time.monotonic() + WAIT
        while not (self.folder / name).exists():
            assert self.process.is_alive() and time.monotonic() < until, self.end()
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self.process.pid
        os.kill(self.process.pid, number)

    def key(self, text: bytes) -> None:
        """Type something on its terminal."""
        assert self.terminal is not None
        os.write(self.terminal, text)

    def keys_until_it_ends(self, text: bytes) -> None:
        """Type something again and again."""
        until = time.monotonic() + WAIT
        while self.process.is_alive() and time.monotonic() < until:
            self.key(text)
            time.sleep(0.2)

    def end(self) -> Ended:
        """Wait for the end."""
        shown = b""
        if self.terminal is not None:
            os.set_blocking(self.terminal, False)
            until = time.monotonic() + WAIT
            while self.process.is_alive() and time.monotonic() < until:
                with contextlib.suppress(OSError):
                    shown += os.read(self.terminal, 65536)
                time.sleep(0.02)
            with contextlib.suppress(OSError):
                shown += os.read(self.terminal, 65536)
            os.close(self.terminal)
            os.close(self._slave)
        code = ended(self.process, WAIT)
        told = {"peak": 0, "asked": []}
        with contextlib.suppress(OSError):
            told = json.loads((self.folder / "told.json").read_text(encoding="utf8"))
        out, err = (_text(self.folder / name) for name in ("out.txt", "err.txt"))
        text = shown.decode("utf8", "replace").replace("\r\n", "\n")
        return Ended(code, out or text, err or text, told["peak"], told["asked"])


def command(folder: Path, *words: object, **faults: Any) -> Ended:
    """Run a command to its end."""
    return Command(folder, *words, **faults).end()


@contextlib.contextmanager
def offline(asked: list[str]) -> Iterator[None]:
    """No way out of this process: attempts are noted in ``asked`` and fail as they do without a network."""

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(str(arguments[-1:])[:100])
        raise OSError(101, "Network is unreachable")

    names = [(socket, "getaddrinfo"), (socket, "create_connection")]
    before = [(where, name, getattr(where, name)) for where, name in names]
    connect, kinds = socket.socket.connect, (socket.AF_INET, socket.AF_INET6)

    def guarded(self: socket.socket, address: Any) -> Any:
        return refuse(address) if self.family in kinds else connect(self, address)

    for where, name in names:
        setattr(where, name, refuse)
    socket.socket.connect = guarded  # type: ignore[method-assign]
    try:
        yield
    finally:
        for where, name, old in before:
            setattr(where, name, old)
        socket.socket.connect = connect  # type: ignore[method-assign]


def _enter(folder: Path, words: list[str], stdin: str, faults: dict[str, Any]) -> None:
    os.environ.update(faults.get("environment", {}))
    # Tests that were started in the background ignore SIGINT, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "cwd" in faults:
        os.chdir(faults["cwd"])
    _connect(folder, stdin, faults.get("terminal"))
    torch.set_num_threads(1)
    if "hold" in faults:
        _hold(folder, stuck=faults["hold"] == "stuck")
    for name, value in faults.get("limits", {}).items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    asked: list[str] = []
    if faults.get("offline"):
        ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x40000000)  # user and network; where that is allowed
    for number, kind in faults.get("streams", {}).items():
        _spoil(number, kind)
    sys.argv = ["fastsrgan", *words]
    with offline(asked) if faults.get("offline") else contextlib.nullcontext():
        code = __main__.main() if "streams" in faults else main(words)
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / "told.json").write_text(json.dumps({"peak": peak, "asked": asked}), encoding="utf8")
    sys.exit(code)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf8") if path.is_file() else ""


def _connect(folder: Path, stdin: str, terminal: str | None) -> None:
    """Standard streams of the command."""
    if terminal is not None:
        os.setsid()
        here = os.open(terminal, os.O_RDWR)  # becomes the controlling terminal: Ctrl-C is a SIGINT from it
        for number in (0, 1, 2):
            os.dup2(here, number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        return
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", encoding="utf8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf8", closefd=False, buffering=1)  # noqa: SIM115
    if stdin == "closed":
        sys.stdin = None  # type: ignore[assignment]  # as Python makes it where descriptor 0 is closed
        os.close(0)
    else:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _spoil(number: int, kind: str) -> None:
    """Take a standard stream away, as a shell does with ``>&-``, or its reader."""
    name = {1: "stdout", 2: "stderr"}[number]
    if kind == "closed":
        os.close(number)
        setattr(sys, name, None)
        return
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)


def _hold(folder: Path, stuck: bool) -> None:
    """The second image's computation waits for a signal while the first image's files are written, slowly.

    ``stuck``: so slowly that nobody waits for it.
    """
    compute, write, calls = infer_job.process, images.write_voxels, []

    def held(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            return compute(*args, **options)
        (folder / HELD).touch()
        time.sleep(WAIT)
        raise AssertionError("no signal came")

    def slow(stream: Any, *args: Any, **options: Any) -> None:
        time.sleep(WAIT if stuck else 0.2)
        write(stream, *args, **options)

    infer_job.process, images.write_voxels = held, slow
