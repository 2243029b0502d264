"""What a process and its children write to disk and how much memory they take, from the accounts that Linux keeps."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType


def descendants(pid: int) -> list[int]:
    """Process ids below ``pid``, children first."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, front = [], [pid]
    while front:
        front = [child for parent in front for child in parents.get(parent, [])]
        found += front
    return found


def _counter(pid: int, name: str) -> int:
    try:
        found = re.search(rf"^{name}: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
    except OSError:
        if pid == os.getpid():  # no account must not look like nothing written
            raise
        return 0
    return int(found[1]) if found else 0


def written() -> dict[str, int]:
    """Bytes written so far by this process, its living children and, as Linux adds them up, those it has waited for.

    disk : file pages that were dirtied, to be written to a device; a file in memory (/dev/shm) does not count
    calls : what went through write(), pipes between processes and the terminal included
    """
    live = [os.getpid(), *descendants(os.getpid())]
    return {
        name: sum(_counter(pid, key) for pid in live) for name, key in (("disk", "write_bytes"), ("calls", "wchar"))
    }


def tree_cpu_seconds(pid: int) -> float:
    """CPU time of a process, its living children and those it has waited for."""
    ticks = 0
    for member in [pid, *descendants(pid)]:
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(v) for v in fields[11:15])  # user, system; the same of ended children
    return ticks / os.sysconf("SC_CLK_TCK")


class FolderWatch:
    """Which files below some folders are new or have changed since the watch began."""

    def __init__(self, folders: Iterable[str | os.PathLike]) -> None:
        self.folders = [Path(folder) for folder in folders]
        self._before = self._look()

    def _look(self) -> dict[Path, tuple[int, int]]:
        found = {}
        for folder in self.folders:
            for parent, _, names in os.walk(folder):
                for name in names:
                    path = Path(parent, name)
                    try:
                        state = path.lstat()
                    except OSError:
                        continue
                    found[path] = (state.st_size, state.st_mtime_ns)
        return found

    def changed(self) -> dict[Path, int]:
        """Path -> size in bytes of what is new or has changed."""
        return {path: state[0] for path, state in self._look().items() if self._before.get(path) != state}


class MemoryPeak:
    """Largest memory of a process and its children while the context is open, in bytes.

    Each page is counted once however many processes share it (proportional set size), looked at every ``interval``
    seconds by a thread: meant for a process that only waits, since the looking costs time.
    """

    def __init__(self, pid: int, interval: float = 0.05) -> None:
        self.pid, self.interval = pid, interval
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self.bytes = tree_memory(self.pid)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(self.interval):
            self.bytes = max(self.bytes, tree_memory(self.pid))


def tree_memory(pid: int) -> int:
    """Proportional set size of a process and its children, in bytes."""
    total = 0
    for member in [pid, *descendants(pid)]:
        try:
            found = re.search(r"^Pss:\s+(\d+) kB$", Path(f"/proc/{member}/smaps_rollup").read_text(), re.MULTILINE)
        except OSError:
            continue
        total += int(found[1]) * 1024 if found else 0
    return total
