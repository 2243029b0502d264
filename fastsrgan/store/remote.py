"""Stores behind a URL: any file system that fsspec knows, every request bounded in time and tried again a few times.

Zarr's fsspec store passes on whatever goes wrong on the way, and each file system repeats requests by rules of its own.
Here one rule holds for all of them. What is missing is an answer and is told at once; so is a refusal (credentials,
rights). Everything else (an error of the server, a connection that is reset, no byte for a while, a request without
end) is tried again after waits that double, and then is a ResourceError that names the object.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from fastsrgan.core.draws import rng
from fastsrgan.errors import FastsrganError, ResourceError, UsageError

log = logging.getLogger("fastsrgan")

LONGEST_WAIT = 20.0  # seconds between two attempts
WHOLE = 10  # an attempt may take this many times the timeout, however steadily its bytes come
READ_ONLY = ("http", "https")
_T = TypeVar("_T")
# What a file system says of an object: answers, not failures.
_ANSWERS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)
_REFUSED = (PermissionError, NotImplementedError, ImportError, TypeError, ValueError, AttributeError, KeyError)
_NUMBER = {int: "a whole number", float: "a number"}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError")
_AGAIN = "%s/%s: %s: tried again; more of this is not told"
_RIGHTS = "check the URL, the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...) and their rights"
_PATIENCE = "check network and endpoint; FASTSRGAN_STORE_RETRIES and FASTSRGAN_STORE_TIMEOUT say how long it is tried"


@dataclass(frozen=True)
class Limits:
    """How long object storage is waited for.

    Attributes
    ----------
    retries : attempts after the first one
    timeout : seconds without a byte after which an attempt failed; an attempt in all ends after ten times that
    backoff : seconds before the second attempt, doubled before each further one up to 20, less up to a half by chance
    """

    retries: int = 6
    timeout: float = 30.0
    backoff: float = 0.25

    @classmethod
    def from_environment(cls) -> Limits:
        """FASTSRGAN_STORE_RETRIES, _TIMEOUT and _BACKOFF where they are set. Raises UsageError for other values."""
        found: dict[str, Any] = {}
        for name, kind, least in (("retries", int, 0), ("timeout", float, 1e-3), ("backoff", float, 0.0)):
            variable = f"FASTSRGAN_STORE_{name.upper()}"
            text = os.environ.get(variable)
            if not text:
                continue
            try:
                found[name] = kind(text)
            except ValueError:
                found[name] = math.nan
            if not least <= found[name] < math.inf:
                hint = f"{_NUMBER[kind]} from {least:g} up, or unset it"
                raise UsageError(variable, f"{text!r} is not allowed", hint)
        return cls(**found)

    def wait(self, key: str, attempt: int) -> float:
        """Seconds to wait after an attempt, counted from 1. Ranks that failed together do not come back together."""
        chance = rng(os.getpid(), "retry", key, attempt).uniform(0.5, 1.0)
        return min(LONGEST_WAIT, self.backoff * 2.0 ** min(attempt - 1, 64)) * chance


def open_url(url: str, read_only: bool) -> Remote:
    """The store behind a URL.

    Raises UsageError for a URL that nothing here can open or write, ResourceError for a missing package.
    """
    scheme = url.partition("://")[0].rpartition("::")[2]
    if scheme in READ_ONLY and not read_only:
        raise UsageError(url, "can only be read", "write to a folder or to object storage such as s3://bucket/name")
    limits = Limits.from_environment()
    try:
        store = FsspecStore.from_url(url, storage_options=_options(scheme, limits), read_only=read_only)
    except ImportError as error:
        raise ResourceError(url, f"cannot be opened: {error}", "pip install 'fastsrgan[s3]'") from error
    except ValueError as error:
        raise UsageError(url, f"is no URL that can be opened: {error}", "a folder, s3://, gs://, https://") from error
    except OSError as error:  # some file systems connect at once
        raise ResourceError(url, f"cannot be opened: {words(error)}", "check the URL and the network") from error
    if scheme in ("s3", "s3a"):
        store.fs.retries = 1  # of s3fs, beside ours
    return Remote(store, url, limits)


def _options(scheme: str, limits: Limits) -> dict[str, Any]:
    """What s3fs is told beside the environment: our timeouts, one attempt, one request an object, no stale listings."""
    if scheme not in ("s3", "s3a"):
        return {}
    from fsspec.config import conf  # what FSSPEC_S3 holds

    config = {"connect_timeout": limits.timeout, "read_timeout": limits.timeout, "retries": {"total_max_attempts": 1}}
    config = {**conf.get("s3", {}).get("config_kwargs", {}), **config}
    found = {"config_kwargs": config, "max_concurrency": 1, "use_listings_cache": False}
    # fsspec keeps a file system for each set of options: named here, two endpoints are two of them.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return found | ({"endpoint_url": endpoint} if endpoint else {})


class Remote(WrapperStore[FsspecStore]):
    """Zarr's fsspec store with the rule of this module, for reading, and what a writer needs beside it.

    After a request was given up, others have a single attempt for as long as the timeout is: a store that is down is
    not waited for again and again while what failed is tidied up.
    """

    def __init__(self, store: FsspecStore, url: str, limits: Limits) -> None:
        super().__init__(store)
        self._url, self.limits = url.rstrip("/"), limits
        self._told, self._down_until = False, -math.inf

    def with_read_only(self, read_only: bool = False) -> Remote:
        return Remote(self._store.with_read_only(read_only), self._url, self.limits)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return await self._patiently("read", key, lambda: self._store.get(key, prototype, byte_range))

    async def getsize(self, key: str) -> int:
        return await self._patiently("read", key, lambda: self._store.getsize(key))

    async def put(self, key: str, data: bytes) -> None:
        """Replace an object. Readers see the old bytes or the new ones."""
        await self._patiently("written", key, lambda: self._store.fs._pipe_file(self._path(key), data))

    async def create(self, key: str, data: bytes) -> bool:
        """Make an object that must not be there yet; False when it is. Atomic where the file system is (S3 is)."""
        try:
            await self._patiently("written", key, lambda: self._exclusively(self._path(key), data))
        except FileExistsError:
            return False
        return True

    async def _exclusively(self, path: str, data: bytes) -> None:
        fs = self._store.fs
        try:
            await fs._pipe_file(path, data, mode="create")
        except (TypeError, NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOSYS:
                raise
            if await fs._exists(path):  # the next best where nothing is exclusive
                raise FileExistsError(path) from None
            await fs._pipe_file(path, data)

    async def remove(self, key: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(*_ANSWERS):
            await self._patiently("removed", key, lambda: self._store.fs._rm_file(self._path(key)))

    async def names(self) -> list[str]:
        """What stands directly below the root."""

        async def collected() -> list[str]:
            return [name async for name in self._store.list_dir("")]

        return await self._patiently("listed", "", collected)

    async def sizes(self, prefix: str) -> dict[str, int]:
        """key below the prefix -> bytes, in as few requests as the file system can list them with."""
        top = self._path(prefix)
        try:
            found = await self._patiently("listed", prefix, lambda: self._store.fs._find(top, detail=True))
        except _ANSWERS:
            return {}
        return {name[len(top) + 1 :]: int(facts["size"] or 0) for name, facts in found.items()}

    def _path(self, key: str) -> str:
        return f"{self._store.path}/{key}".rstrip("/")

    async def _patiently(self, done: str, key: str, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """The outcome of a request. Raises what it answers, ResourceError where none comes or it is refused."""
        began = time.monotonic()
        tries = 1 if began < self._down_until else self.limits.retries + 1
        for n in range(1, tries + 1):
            try:
                async with asyncio.timeout(WHOLE * self.limits.timeout):
                    return await attempt()
            except _ANSWERS as error:
                if done == "written" and isinstance(error, FileNotFoundError):
                    raise self._failed(done, key, error, "does the bucket exist?") from error
                raise
            except FastsrganError:
                raise
            except Exception as error:
                if isinstance(error, _REFUSED) or type(error).__name__ in _NO_CREDENTIALS or _is_refusal(error):
                    raise self._failed(done, key, error, _RIGHTS) from error
                if n == tries:
                    self._down_until = time.monotonic() + self.limits.timeout
                    told = f"; {n} attempts in {time.monotonic() - began:.0f} s" if n > 1 else ""
                    raise self._failed(done, key, error, _PATIENCE, told) from error
                log.log(logging.DEBUG if self._told else logging.WARNING, _AGAIN, self._url, key, words(error))
                self._told = True
                await asyncio.sleep(self.limits.wait(key, n))
        raise AssertionError("the last attempt returns or raises")

    def _failed(self, done: str, key: str, error: Exception, hint: str, told: str = "") -> ResourceError:
        return ResourceError(f"{self._url}/{key}".rstrip("/"), f"cannot be {done}: {words(error)}{told}", hint)


def fingerprint(data: bytes) -> list[Any]:
    """[size, SHA-256] as a manifest holds them."""
    return [len(data), hashlib.sha256(data).hexdigest()]


def words(error: BaseException) -> str:
    """An error of a file system in one short line."""
    if isinstance(error, TimeoutError) and not str(error):
        return "no end to the request (timeout)"
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:160] or type(error).__name__


def _is_refusal(error: Exception) -> bool:
    """Whether an HTTP status says that the request itself is wrong: repeating it would change nothing."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
