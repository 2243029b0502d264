"""Processes that tests start, stop and kill: ranks of a gloo job, and victims of SIGKILL.

They are forked from a server that has imported torch once, so that one costs no second of start-up.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAIT = 240.0  # seconds for what takes one or two on an idle machine
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastsrgan.train.run", "torch._dynamo"])


class Flag:
    """An event between processes. multiprocessing's own lies in /dev/shm, which may be full."""

    def __init__(self) -> None:
        self._told, self._teller = CONTEXT.Pipe(duplex=False)

    def set(self) -> None:
        """May be called once."""
        self._teller.send(True)

    def wait(self, seconds: float = WAIT) -> bool:
        """Whether it is set, or becomes set within some seconds."""
        return self._told.poll(seconds)

    def is_set(self) -> bool:
        """Whether it is set now."""
        return self._told.poll(0)


class Post:
    """A queue between processes, without /dev/shm: one puts, one gets."""

    def __init__(self) -> None:
        self._read, self._write = CONTEXT.Pipe(duplex=False)

    def put(self, value: Any) -> None:
        """Waits where much has not been read yet."""
        self._write.send(value)

    def get(self, seconds: float = WAIT) -> Any:
        """The next value; AssertionError when none comes."""
        assert self._read.poll(seconds), "nothing came"
        return self._read.recv()

    def empty(self) -> bool:
        """Whether nothing has come that was not read yet."""
        return not self._read.poll(0)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(target: Callable[..., Any], *args: Any, out: Path, **environment: Any) -> multiprocessing.Process:
    """Call ``target(*args)`` in a process; what it returns or raises goes to ``out`` as JSON, see ``outcome``."""
    process = CONTEXT.Process(target=_enter, args=(target, args, out, {k: str(v) for k, v in environment.items()}))
    process.start()
    return process


def start_ranks(
    target: Callable[..., Any], world: int, *args: Any, out: Path, **more: Any
) -> list[multiprocessing.Process]:
    """``target(*args)`` on every rank of a job; rank r's outcome goes to ``out``/r.json. ``more``: environment."""
    out.mkdir(parents=True, exist_ok=True)
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= more
    return [start(target, *args, out=out / f"{r}.json", RANK=r, LOCAL_RANK=r, **shared) for r in range(world)]


def on_ranks(target: Callable[..., Any], world: int, *args: Any, out: Path) -> list[Any]:
    """What ``target(*args)`` returned on each rank; AssertionError with the traceback of one that failed."""
    processes = start_ranks(target, world, *args, out=out)
    codes = [ended(p) for p in processes]
    found = [outcome(out / f"{r}.json") for r in range(world)]
    assert codes == [0] * world, found
    return [f["value"] for f in found]


def modules_on_ranks(command: list[str], world: int, out: Path) -> list[str]:
    """What ``python -m MODULE WORDS`` printed on each rank: without the seconds in which Python loads the libraries."""
    return on_ranks(_module, world, command[command.index("-m") + 1 :], out=out)


def _module(words: list[str]) -> str:
    sys.argv = words
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, end.code
    return said.getvalue()


def ended(process: multiprocessing.Process, seconds: float = WAIT) -> int | None:
    """Exit code of a process (negative: the signal that killed it); a process that does not end is killed: None."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def outcome(path: Path) -> dict[str, Any]:
    """``value`` that a process returned, or ``error`` (one line), ``kind`` and ``trace`` of what it raised."""
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else {}


def _enter(target: Callable[..., Any], args: tuple, out: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch

    from fastsrgan.errors import FastsrganError

    torch.set_num_threads(1)
    try:
        found, code = {"value": target(*args)}, 0
    except BaseException as error:
        found = {"error": str(error), "kind": type(error).__name__, "trace": traceback.format_exc()}
        code = error.exit_code if isinstance(error, FastsrganError) else 1
    out.write_text(json.dumps(found), encoding="utf8")
    sys.exit(code)
