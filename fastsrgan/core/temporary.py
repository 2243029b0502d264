"""Temporary names, under which a file stands until it is whole; and what killed processes left under such names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

_HOST = hashlib.blake2b(platform.node().encode("utf8", "replace"), digest_size=4).hexdigest()
_NAME_ROOM = 255 - len("..tmp-01234567-4194304-01234567")  # bytes of a file's own name in a temporary one
_TEMPORARY = re.compile(
    r"(?P<front>\..*\.tmp-)(?:(?P<host>[0-9a-f]{8})-)?(?P<process>\d+)-[0-9a-f]{8}(?P<ending>(?:\..*)?)", re.DOTALL
)


def temporary_name(path: Path) -> Path:
    """A private name beside ``path`` with the same suffixes, for writing before renaming; at most 255 bytes long."""
    front, ending = _around(path.name)
    return path.with_name(f"{front}{_HOST}-{os.getpid()}-{secrets.token_hex(4)}{ending}")


def _around(name: str) -> tuple[str, str]:
    """What stands before and behind host, process and number in the temporary names of a file."""
    stem, dot, suffixes = name.partition(".")
    ending = _fitting(dot + suffixes, slice(-_NAME_ROOM, None))
    return f".{_fitting(stem, slice(_NAME_ROOM - len(os.fsencode(ending))))}.tmp-", ending


def _fitting(text: str, part: slice) -> str:
    return text if len(raw := os.fsencode(text)) == len(raw[part]) else raw[part].decode("utf8", "ignore")


def remove_abandoned(folder: Path, names: Iterable[str]) -> None:
    """Take away the temporary files that killed processes left of the files ``names`` in a folder.

    Those of processes that are alive stay. Whether one of another machine is alive is not known here: what that wrote
    is taken away when it is older than a day.
    """
    targets = {_around(name) for name in names}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found and (found["front"], found["ending"]) in targets:
                with contextlib.suppress(OSError):
                    if _abandoned(found, entry):
                        os.unlink(entry)


def _abandoned(found: re.Match[str], entry: os.DirEntry[str]) -> bool:
    if found["host"] != _HOST:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > 24 * 3600
    try:
        os.kill(int(found["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's
        pass
    return False
