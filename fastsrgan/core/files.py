"""Files that appear whole or not at all, names they have until then, places to write to, JSON."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import socket
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fastsrgan.errors import FastsrganError, InputError, ResourceError, UsageError, human

log = logging.getLogger("fastsrgan")
P = ParamSpec("P")
T = TypeVar("T")

MOST_JSON = 64 * 2**20  # bytes of a JSON file that is read
_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits))


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it is synced and renamed, on failure removed.

    Raises ResourceError when the folder is missing or not writable, the disk is full, or ``path`` is a device or pipe.
    """
    path = Path(path)
    if is_special(path):  # renaming a file onto it would put the file in place of a pipe, or of /dev/null
        raise ResourceError(path, "is not a regular file", "name a file")
    temporary = temporary_name(path)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # a disk that cannot be written to says so for what is not there too
                temporary.unlink(missing_ok=True)


def disk_error(error: OSError, path: Path) -> Exception:
    """The ResourceError that says what an operating-system error means for a user; other errors unchanged."""
    if error.errno == errno.EFBIG:
        hint = "raise it, ulimit -f tells it, or choose a disk of another format"
        return ResourceError(path, "no space left: larger than the limit on the size of a file", hint)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(existing_parent(path)).free
        return ResourceError(
            path, f"no space left on the disk, {human(free)} free", "free space or choose another folder"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return ResourceError(path, "cannot be written", "check the permissions or choose another folder")
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EINVAL):
        return ResourceError(path, f"cannot be written: {(error.strerror or '').lower()}", "choose another folder")
    if error.errno == errno.EISDIR:
        return ResourceError(path, "is a folder", "name a file")
    if error.errno == errno.ENOENT and path.parent.is_dir():
        return ResourceError(path, "cannot be written here", "choose another folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST) or (error.errno == errno.ENOENT and not path.parent.is_dir()):
        return ResourceError(path, "its folder is missing or is a file", "create the folder or choose another one")
    return error


def existing_parent(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    path = Path(path).absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def need_space(path: str | os.PathLike, needed: int) -> None:
    """Refuse to begin what the disk of ``path`` cannot hold, ``needed`` bytes. Raises ResourceError."""
    free = shutil.disk_usage(existing_parent(Path(path))).free
    if free < needed:
        told = f"no space left on the disk: needs {human(needed)}, {human(free)} free"
        raise ResourceError(path, told, "free space or choose another folder")


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_folder(path: str | os.PathLike) -> Path:
    """Create ``path`` if need be and make sure that a file can be written there, before any work starts.

    Raises ResourceError, and UsageError for a URL and as `refuse_home`.
    """
    if url := url_of(path):
        raise UsageError(url, "is a URL, this is written to a folder", "name a folder")
    path = Path(path)
    refuse_home(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(path / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        if os.path.exists(path) and not os.path.isdir(path):
            raise ResourceError(path, "is a file, a folder is needed", "choose another output folder") from error
        raise disk_error(error, path) from error
    return path


@contextlib.contextmanager
def left_as_found(paths: Iterable[str | os.PathLike]) -> Iterator[None]:
    """Where what is done within ends in an error, take away the folders that it made and left empty: of these paths
    and above them."""
    chains = [(Path(path), *Path(path).parents) for path in paths]
    missing = {folder for chain in chains for folder in chain if not os.path.lexists(folder)}
    try:
        yield
    except BaseException:
        for folder in sorted(missing, key=lambda one: len(one.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def output_file(path: str | os.PathLike) -> Path:
    """Make sure that a file can be written in its folder, before any work starts.

    What killed processes left of it under temporary names is taken away.
    Raises UsageError for a folder, a device, a pipe or a URL, ResourceError where the folder is missing or cannot be
    written.
    """
    path = Path(path)
    if url := url_of(path):
        raise UsageError(url, "is a URL, this is written to a file", "name a file")
    if os.path.isdir(path):
        raise UsageError(path, "is a folder", f"name a file, {path / 'NAME'}")
    if is_special(path):
        raise UsageError(path, "is not a regular file", "name a file")
    refuse_home(path)
    folder = path.absolute().parent
    if not os.path.isdir(folder):
        reason = "its folder is a file" if os.path.exists(folder) else "its folder is missing"
        raise ResourceError(path, reason, "create the folder or choose another one")
    output_folder(folder)
    remove_abandoned(folder, [path.name])
    return path


def refuse_home(path: Path) -> None:
    """Raise UsageError where ~ would be the name of a folder: the command line takes it for the home folder."""
    front = "".join(path.parts[:1])
    if front.startswith("~") and os.path.expanduser(front) != front and not os.path.lexists(front):
        raise UsageError(path, f"{front} is not taken for a home folder here", "write the whole path")


def is_special(path: str | os.PathLike) -> bool:
    """Whether a path is a pipe, a device or a socket, of which reading may never end; False for what is not there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def url_of(path: str | os.PathLike) -> str | None:
    """The URL that a path was before it was taken for a path, which leaves one slash of two; None where it was none."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+:)(?:/+(.*))?$", os.fspath(path))
    if found and os.path.isdir(found[1]):  # a folder of such a name
        return None
    return f"{found[1]}//{found[2] or ''}" if found else None


def real(path: str | os.PathLike) -> Path:
    """A path without links. Unlike ``Path.resolve`` it does not fail at a link to itself."""
    return Path(os.path.realpath(path))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null, since JSON has none."""
    with atomic_write(path) as temporary:
        text = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf8", errors="surrogateescape")  # bytes of file names as they are


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or none that can be read."""
    try:
        if is_special(path) or os.path.getsize(path) > MOST_JSON:
            return {}
        return parse_json(Path(path).read_bytes().decode("utf-8-sig", "surrogateescape"))  # as write_json writes
    except (OSError, ValueError):
        return {}


def sizes(paths: Mapping[str, str | os.PathLike]) -> dict[str, int]:
    """Bytes of the files that are there, by the same keys."""
    return {key: os.path.getsize(path) for key, path in paths.items() if os.path.isfile(path)}


def whole(paths: Mapping[str, str | os.PathLike], known: Mapping[str, Any]) -> bool:
    """Whether all files are there, each as large as is ``known`` of it."""
    there = sizes(paths)
    return len(there) == len(paths) and all(known.get(key, size) == size for key, size in there.items())


def mapping(value: Any) -> dict[str, Any]:
    """A value that should be a JSON object; empty where it is none."""
    return value if isinstance(value, dict) else {}


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is; empty where it is none, whatever it is."""
    try:
        value = _DECODER.decode(text if isinstance(text, str) else text.decode("utf8"))
    except (ValueError, RecursionError):
        return {}
    return mapping(value)


def finite(value: Any) -> Any:
    """``value`` with NumPy numbers made plain, paths made text, and non-finite floats made None, recursively."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, os.PathLike):
        return str(value)
    if hasattr(value, "tolist"):  # arrays and numbers of NumPy, which is not loaded for others
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def walk_files(folder: str | os.PathLike, again: list[Path] | None = None) -> Iterator[Path]:
    """Every file below a folder, by name, those of folders that are links last; each real folder once, no hidden ones.

    A folder goes by its own name where that lies below ``folder`` too, else by its first link. ``again`` gets the
    folders that were met under another name before. A link that leads nowhere is a path too: reading it says so. Raises
    InputError for a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        reason = f"cannot be listed: {error.strerror or error}"
        raise InputError(error.filename or folder, reason, "check its permissions, or move it away") from error

    seen: set[str] = set()
    tops = [os.fspath(folder)]
    for top in tops:  # which grows
        for where, below, names in os.walk(top, onerror=refuse):
            place = os.path.realpath(where)
            if place in seen:
                below[:] = []
                if again is not None:
                    again.append(Path(where))
                continue
            seen.add(place)
            below[:] = sorted(name for name in below if not name.startswith("."))
            tops += [path for name in below if os.path.islink(path := os.path.join(where, name))]
            yield from (Path(where, name) for name in sorted(names))


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
    return not _is_alive(int(found["process"]))


# --- locks --------------------------------------------------------------------------------------------------------

LOCK = ".fastsrgan.lock"


class LockedFolder(ResourceError):
    """A folder or result that another process writes to, or may."""


class FolderLock:
    """One writer at a time in a folder, a store's or a run's, for as long as this object is not released.

    The kernel holds the lock and frees it when the process dies, so a file left behind is stale and is taken over with
    a warning; one from another host may be alive where the file system keeps locks to itself, and is not.

    name : of the folder in messages
    elsewhere : take over a file that another host left, too: the caller knows that its process has ended

    Raises LockedFolder, and ResourceError when the folder cannot be made.
    """

    def __init__(self, folder: Path, name: str | None = None, elsewhere: bool = False) -> None:
        self.folder, self.name, self.elsewhere = folder, name or str(folder), elsewhere
        self._file: int | None = None
        refuse_home(folder)
        try:
            self._made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._acquire(folder / LOCK)
        except OSError as error:
            raise write_error(error, self.name) from error

    def release(self) -> None:
        """Remove the lock, and the folder where nothing else came into it."""
        if self._file is None:
            return
        (self.folder / LOCK).unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        if self._made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()

    def _sign(self, descriptor: int, path: Path) -> None:
        """Write who holds the lock; where the disk is full, leave neither the file nor a folder that it was made in."""
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, lock_signature(), 0)
        except OSError:
            path.unlink(missing_ok=True)
            if self._made:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
            raise

    def _acquire(self, path: Path) -> int:
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # its holder removed the folder in between
                path.parent.mkdir(parents=True, exist_ok=True)
                continue
            try:
                holder = lock_holder(os.pread(descriptor, 1000, 0))
                judge_lock(self.name, holder, held=not _flock(descriptor), elsewhere=self.elsewhere)
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                        self._sign(descriptor, path)
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its holder removed the file in between


class ResultLock(FolderLock):
    """One writer at a time of a result, which is several files: a lock in a hidden folder beside its ``record``.

    What a dead process left, of another machine too, is taken over. It is released with its ``owner`` at the latest.
    ``name`` is the result's in messages, its record's by default. Raises as FolderLock.
    """

    def __init__(self, record: Path, owner: object = None, name: str | None = None) -> None:
        own = _fitting(record.stem, slice(255 - len("..lock")))
        super().__init__(record.with_name(f".{own}.lock"), name or str(record), elsewhere=True)
        self._made = True  # nothing but the lock lies there, also where a killed process made it
        if owner is not None:
            weakref.finalize(owner, self.release)


def unlocks_where_it_fails(stage: Callable[P, T]) -> Callable[P, T]:
    """A stage of work on a result, whose first argument holds its ``lock`` or None: let go of where the stage ends in
    an error, so that the folder that was made for it can be taken away."""

    @functools.wraps(stage)
    def wrapped(*args: P.args, **more: P.kwargs) -> T:
        try:
            return stage(*args, **more)
        except BaseException:
            if (lock := getattr(args[0], "lock", None)) is not None:
                lock.release()
            raise

    return wrapped


def judge_lock(
    name: str, holder: dict[str, Any] | None, *, held: bool, by_process: bool = False, elsewhere: bool = False
) -> None:
    """Refuse a lock that is or may be alive; say that a dead one is taken over.

    held : whether it is known to be; by_process : whether a process of this host that lives holds it too
    """
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    here = holder is not None and holder["host"] == socket.gethostname()
    alive = by_process and holder is not None and here and _is_alive(holder["pid"])
    if held or alive:
        hint = "wait until it ends" + (f"; if it is no conversion, delete {name}/{LOCK}" if alive else "")
        raise LockedFolder(name, f"is being written by {who}", hint)
    if holder and not here and not elsewhere:
        raise LockedFolder(name, f"is locked by {who}", f"if that run is over, delete {name}/{LOCK}")
    if holder:
        log.warning("%s: %s did not end properly, its lock is taken over", name, who)


def lock_signature() -> bytes:
    """What a lock says about its holder, another at every call."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "token": secrets.token_hex(8)}).encode()


def lock_holder(raw: bytes | None) -> dict[str, Any] | None:
    """pid and host from the bytes of a lock; None where they name nobody."""
    content = parse_json(raw or b"")
    if not isinstance(content.get("pid"), int) or "host" not in content:
        return None
    return {"pid": content["pid"], "host": str(content["host"])}


def write_error(error: OSError, name: str) -> FastsrganError:
    """What a failure to write means for a user."""
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and os.path.isfile(name):
        return ResourceError(name, "is a file, a folder is needed", "choose another output folder")
    known = disk_error(error, Path(name))
    if isinstance(known, FastsrganError):
        return known
    return ResourceError(name, f"cannot be written: {error.strerror or error}", "check the path and its disk")


def _flock(descriptor: int) -> bool:
    """Take the kernel's lock; False when another holds it. File systems without locks are trusted."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        _tell_no_locks()
    return True


@functools.cache
def _tell_no_locks() -> None:
    log.warning("the file system knows no locks: take care that only one process writes to this folder")


def _is_alive(pid: int) -> bool:
    """Whether a process of this host runs, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """What several folders are called side by side: their names, or as much of the ends of their paths as differs."""
    parts = [Path(path).resolve().parts for path in paths]
    names: list[str] = []
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]).replace("//", "/") for own in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names
