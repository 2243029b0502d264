"""The processes of one training run: who this one is, and what they tell each other (docs/decisions/016-ranks.md).

``torchrun`` starts the processes and names each in its environment. One process alone is ``ALONE``, for which every
reduction is the identity, so that callers need no case of their own. Tensors on a CUDA device go over NCCL, everything
else, the loop's own questions included, over gloo: asking whether a rank was told to stop waits for no GPU.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import itertools
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fastsrgan.errors import FastsrganError, ModelError, ResourceError, UsageError, counted

log = logging.getLogger("fastsrgan")

TIMEOUT = datetime.timedelta(minutes=30)  # a rank that waits for a slow disk is not dead; a dead one is noticed at once
# How long the process that holds the store waits for the others to read why it ends. They answer within milliseconds,
# on a machine with ten times as many processes as cores within a second or two.
FAREWELL = datetime.timedelta(seconds=20)
KILLED = "a rank left no error"  # a key of the store
SHARED_MEMORY = 2**28  # bytes that NCCL's buffers in /dev/shm may need for the ranks of one machine


class LostRank(ResourceError):
    """Another rank ended or failed; its own error stands in the text where it left one."""


class Ranks:
    """All ranks as one of them sees them. This class is a process alone, the others derive from it.

    rank, world : number of this process, and how many there are
    local_world : how many of them share this machine
    """

    rank, world, local_world = 0, 1, 1

    def start_average_(self, tensors: list[Tensor]) -> Callable[[], None]:
        """Send tensors, one message per type and device, and return at once.

        All ranks start the same ones in the same order. The function that is returned waits for the others and replaces
        each tensor by its mean over the ranks, in place.
        """
        return lambda: None

    def sums(self, values: list[float]) -> list[float]:
        """Sum of each value over the ranks, in float64."""
        return values

    def mean(self, facts: dict[str, float]) -> dict[str, float]:
        """Mean of each named value over the ranks that have it, in float64."""
        return facts

    def minimum(self, value: int) -> int:
        """The smallest value of any rank."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return -self.minimum(-int(flag)) > 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, plain Python, in the order of ranks."""
        return [value]

    def agree(self, name: str, value: object) -> None:
        """ModelError on every rank when ``str(value)`` is not the same on all of them."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def noted(self, what: str) -> bool:
        """Whether ``note(what)`` was called in this job, also before torchrun restarted its ranks."""
        return False

    def note(self, what: str) -> None:
        """Remember ``what`` for as long as the job lasts."""

    @property
    def store(self) -> dist.Store | None:
        """Small values that every rank reads and writes without waiting for others; None for a process alone."""
        return None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Part from the others; an error is left for them to read."""


ALONE = Ranks()
_GROUPS = itertools.count()  # of this process: every rank makes the same ones, in the same order


@functools.cache
def _job_store(rank: int, world: int, address: str | None, port: str | None) -> dist.Store:
    """The store of a job. It is kept as long as the process: the next group of ranks finds it where it is, and not one
    that rank 0 is about to close."""
    store, *_ = next(dist.rendezvous("env://", rank, world, timeout=TIMEOUT))
    return store


class TorchRanks(Ranks):
    """The ranks of a torchrun job.

    A rank that ends while others wait for it breaks their connection: they raise LostRank with the error it left. The
    error lies in a store that torchrun holds, or without torchrun rank 0, which ends behind all others.

    backend : "gloo" lets ranks share a GPU, which NCCL refuses; None: NCCL for CUDA devices
    """

    def __init__(
        self,
        rank: int,
        world: int,
        local_world: int,
        device: torch.device,
        patience: datetime.timedelta = TIMEOUT,
        backend: str | None = None,
    ) -> None:
        self.rank, self.world, self.local_world = rank, world, local_world
        self._names: list[str] = []  # of values that ``mean`` was asked for
        self._works: list[list[dist.Work]] = []  # messages that are under way
        backend = backend or ("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        try:
            self._holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            self._lasting = _job_store(rank, world, os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
            # The store outlives a restart by torchrun, and a script may train several times: the ranks must not find
            # the addresses of those before them.
            attempt = f"fastsrgan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{world}/{next(_GROUPS)}"
            self._store = dist.PrefixStore(attempt, self._lasting)
            # Its functions have the default group as an argument: imported later, by torch's compiler, they would keep
            # the connections open that ``_part`` closes.
            importlib.import_module("torch.distributed.nn.functional")
            dist.init_process_group(
                backend,
                store=self._store,
                rank=rank,
                world_size=world,
                timeout=patience,
                device_id=device if "nccl" in backend else None,
            )
        except (ValueError, RuntimeError) as error:
            reason = f"cannot reach the other ranks: {str(error).splitlines()[0]}"
            raise ResourceError(f"rank {rank}", reason, "start with torchrun, see docs/training.md") from error

    @torch.no_grad()
    def start_average_(self, tensors: list[Tensor]) -> Callable[[], None]:
        kinds: dict[tuple, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        sent = [(same, torch.cat([t.reshape(-1) for t in same])) for same in kinds.values()]
        with self._others():
            works = [dist.all_reduce(flat, async_op=True) for _, flat in sent]
        self._works = [*filter(None, self._works), works]

        @torch.no_grad()
        def finish() -> None:
            for same, flat in sent:
                with self._others():
                    works.pop(0).wait()
                parts = flat.div_(self.world).split([t.numel() for t in same])
                torch._foreach_copy_(same, [p.view(t.shape) for p, t in zip(parts, same, strict=True)])

        return finish

    def sums(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        with self._others():
            dist.all_reduce(total)
        return total.tolist()

    def mean(self, facts: dict[str, float]) -> dict[str, float]:
        unknown = not facts.keys() <= set(self._names)
        row = [facts.get(name, 0.0) for name in self._names]
        there = [float(name in facts) for name in self._names]
        missed, *total = self.sums([float(unknown), *row, *there])
        if missed:
            # New names somewhere, as in the first step: they are exchanged, and known to all ranks from then on.
            self._names = sorted({name for names in self.gather([*self._names, *facts]) for name in names})
            return self.mean(facts)
        pairs = zip(self._names, total, total[len(self._names) :], strict=False)
        return {name: value / count for name, value, count in pairs if count}

    def minimum(self, value: int) -> int:
        least = torch.tensor(value, dtype=torch.int64)
        with self._others():
            dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def agree(self, name: str, value: object) -> None:
        values = self.gather(str(value))
        differing = [f"rank {r} has {v}" for r, v in enumerate(values) if v != values[0]]
        if differing:
            reason = f"not the same on all ranks: rank 0 has {values[0]}, {', '.join(differing)}"
            raise ModelError(name, reason, "start every rank with the same command, data and version")

    def barrier(self) -> None:
        self.minimum(0)

    @property
    def store(self) -> dist.Store:
        return self._store

    def noted(self, what: str) -> bool:
        return self._lasting.check([what])

    def note(self, what: str) -> None:
        self._lasting.set(what, "")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                self.barrier()  # rank 0 may hold the store that the others still talk to
            except LostRank:
                self._part()
                raise
            dist.destroy_process_group()
            return
        if not isinstance(error, LostRank):
            text = str(error) if isinstance(error, FastsrganError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):
                self._store.set("error", f"rank {self.rank} failed: {' '.join(text.split())}")
        self._part()

    def _part(self) -> None:
        """Leave the others after a failure. The process that holds the store stays until all have read the error."""
        for works in self._works:
            works.clear()  # a connection stays open as long as a message on it is remembered
        with contextlib.suppress(RuntimeError):
            # First the connections: ranks that wait for this one notice it, and read the error. destroy_process_group
            # would do for gloo; with NCCL it may wait for messages that no rank sends any more.
            dist.distributed_c10d._abort_process_group()
        with contextlib.suppress(RuntimeError):
            # One that was killed reads nothing; where several were, the wait is as long as it may be.
            expected = self.world - self._store.check([KILLED])
            if self._store.add("parted", 1) >= expected:
                self._store.set("all parted", "")
            elif self._holds_store:
                self._store.wait(["all parted"], FAREWELL)

    def gather(self, value: Any) -> list[Any]:
        out: list[Any] = [None] * self.world
        with self._others():
            dist.all_gather_object(out, value)
        return out

    @contextlib.contextmanager
    def _others(self) -> Iterator[None]:
        """Names the reason where a collective call fails."""
        try:
            yield
        except RuntimeError as error:
            traceback.clear_frames(error.__traceback__)  # they remember the message that failed, see ``_part``
            raise LostRank(f"rank {self.rank}", self._reason(error), "the others have stopped; see --resume") from error

    def _reason(self, error: RuntimeError) -> str:
        with contextlib.suppress(RuntimeError):
            if self._store.check(["error"]):
                return self._store.get("error").decode()
            self._store.set(KILLED, "")
        first = str(error).splitlines()[0].partition("] ")
        return f"lost another rank, which left no error: {(first[2] or first[0]).partition('. ')[0]}"


def launched() -> bool:
    """Whether torchrun started this process, or a batch script in its place one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"


def speaks() -> bool:
    """Whether this process tells what all ranks do: rank 0, or a process alone."""
    return os.environ.get("RANK", "0") == "0" or not launched()


def from_environment(device: torch.device, patience: datetime.timedelta = TIMEOUT) -> Ranks:
    """The ranks that torchrun's variables name (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    patience : how long a rank that has nothing left to do waits for the others

    Raises
    ------
    UsageError : a variable is missing or no number; ResourceError : the other ranks cannot be reached, or have the same
    GPU, which NCCL refuses in words that do not say so.
    """
    if not launched():
        return ALONE
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    local = _number("LOCAL_WORLD_SIZE", 1)
    if device.type == "cuda" and local > 1:
        if device.index != _number("LOCAL_RANK", 0) and not _sees_its_own():
            reason = f"{counted(local, 'rank')} of this machine would share it"
            raise ResourceError(str(device), reason, "--device auto: each takes a GPU of its own")
        spare_shared_memory()
    return TorchRanks(rank, world, local, device, patience)


def local_device(name: str) -> str:
    """The name of this rank's device: its own GPU of the machine for "auto" and "cuda", else ``name``.

    Raises ResourceError when the machine has more ranks than GPUs.
    """
    if not launched() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    seen, local, here = torch.cuda.device_count(), _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    if _sees_its_own():
        return "cuda:0"
    if here > seen:
        reason = f"{counted(here, 'rank')} on this machine, {counted(seen, 'CUDA device')} seen"
        raise ResourceError("--device", reason, f"torchrun --nproc-per-node {seen}, or --device cpu")
    return f"cuda:{local}"


def _sees_its_own() -> bool:
    """Whether this rank sees no GPU but its own: as a batch system shows them, or torchrun --virtual-local-rank, where
    each rank is the machine's first."""
    shown = "CUDA_VISIBLE_DEVICES" in os.environ and torch.cuda.device_count() == 1
    return shown and not ("TORCHELASTIC_RUN_ID" in os.environ and _number("LOCAL_RANK", 0))


def spare_shared_memory(folder: str = "/dev/shm") -> None:
    """Keep NCCL out of a /dev/shm that is too small for it, as in a container's default 64 MB; says so once."""
    try:
        room = os.statvfs(folder)
    except OSError:
        return
    free = room.f_bavail * room.f_frsize
    if free < SHARED_MEMORY and "NCCL_SHM_DISABLE" not in os.environ:
        os.environ["NCCL_SHM_DISABLE"] = "1"
        text = "%s has %.0f MB free: ranks without a direct link use sockets instead, which is slower (--shm-size 1g)"
        log.warning(text, folder, free / 1e6)


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UsageError(name, f"{text!r} is no number, WORLD_SIZE is set", "start with torchrun, or unset WORLD_SIZE")
    return int(text)
