"""Which of its exact forms a layer runs in on the CPU: the fixed rule, or what was timed as faster on this machine.

All forms of a layer agree to rounding, so the choice changes the last bits of float32 and the time, nothing else. What
is asked for is the setting ``layer_forms`` of a training, else the variable FASTSRGAN_FORMS, else "measured" for a
training and "fixed" for all other work, which is short and whose results are to be the same on every machine:

    fixed : the rule of each layer, the same on every machine
    measured : the candidates are timed once for each kind and size of layer, on the first use. Another than the rule's
        is taken where it is faster by the factor CLEARLY, so that a tie is not decided by noise. Where other programs
        take the processor, or where a job has timed for BUDGET, the rule's is taken and nothing is kept.

Times are kept in a file of the user's cache folder for each machine: processor, instruction set, threads, torch. The
file is only ever a saving: whatever is wrong with it, layers are timed again. A training records the forms that it used
and a resumed one gets them back, on whatever machine (docs/decisions/022).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsrgan.core.processor import processor
from fastsrgan.errors import UsageError, counted

log = logging.getLogger("fastsrgan")

MODES = ("measured", "fixed")
VARIABLE, FOLDER_VARIABLE = "FASTSRGAN_FORMS", "FASTSRGAN_CACHE"
VERSION = 1  # of the file and of what is timed: a change of a form's code that changes its speed raises it
CLEARLY = 1.2  # times faster than the fixed form
LEAST_WORK = 2**25  # products of a call below which no form is worth timing
LARGEST = 48  # edge in voxels up to which layers are timed as they are
EDGES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # edges count as the next of these
ROUNDS, SECONDS = 4, 0.05  # of timing a layer: no new round after these
BUDGET = 1.0  # seconds that a job may spend on timing; the layer at work is finished
UNDISTURBED = 0.8  # least share of its time that the calling thread had a processor to itself: it works, or spins
HOPELESS = 2.5  # times slower than the best in the first round, whose first calls also make plans
MOST_BYTES = 2**22  # of the file

Calls = Mapping[str, Callable[[], object]]  # form -> call that does the work once
Trials = Callable[[Tensor, Tensor], Calls]  # of an input (B, C, X, Y, Z) and a weight


class Choices:
    """The forms of one job.

    mode : "measured" or "fixed"
    kept : layer -> form, taken whatever the mode: those of a snapshot
    used : layer -> form, of every layer that had a choice, in the order of their first use
    timed, seconds : layers timed by this job and the time that took; left : layers that could not be timed
    """

    def __init__(self, mode: str, kept: Mapping[str, str] | None = None) -> None:
        self.mode, self.kept = mode, dict(kept or {})
        self.used: dict[str, str] = {}
        self.timed, self.seconds, self.left = 0, 0.0, 0
        self._logged = False

    def record(self) -> dict[str, Any]:
        """Plain values: what ``job`` takes to go on in the same forms."""
        return {"mode": self.mode, "forms": {**self.kept, **self.used}}

    def key(self) -> list[Any]:
        """What results depend on: the mode and, where it is "measured", all forms that are known to be taken."""
        if self.mode == "fixed" and not self.kept:
            return [self.mode]
        return [self.mode, machine(), sorted({**taken(table_of_machine()), **self.kept, **self.used}.items())]

    def tell(self) -> None:
        """Log ``line``, once, when there was a choice."""
        if self.used and not self._logged and self.mode == "measured":
            self._logged = True
            log.info(self.line())

    def line(self) -> str:
        """One line for a log."""
        if self.mode == "fixed":
            return "layer forms: fixed, the same on every machine"
        how = f"{self.timed} timed in {self.seconds:.2f} s" if self.timed else "known from an earlier job"
        if self.left:
            how += f", {self.left} left at the fixed form since the machine was busy"
        names = ", ".join(f"{layer}: {form}" for layer, form in self.used.items())
        return f"layer forms: {how}; {VARIABLE}=fixed takes the same on every machine ({names or 'no choice so far'})"


_lock = threading.RLock()
_current: Choices | None = None
_tables: dict[tuple[str, Path | None], dict[str, dict[str, Any]]] = {}  # of a machine and a file: layer -> times


def wanted_mode(setting: str = "auto", otherwise: str = "fixed") -> str:
    """What a setting stands for: "auto" is FASTSRGAN_FORMS, or ``otherwise`` without it. Raises UsageError."""
    mode = os.environ.get(VARIABLE) or otherwise if setting == "auto" else setting
    if mode not in MODES:
        raise UsageError(VARIABLE, f"{mode[:40]!r} is not allowed", f"one of {', '.join(MODES)}")
    return mode


@contextlib.contextmanager
def job(mode: str, kept: Mapping[str, str] | None = None) -> Iterator[Choices]:
    """Within it, layers run in the forms of this job; outside of any, in those that FASTSRGAN_FORMS asks for."""
    global _current
    before, _current = _current, Choices(mode, kept)
    try:
        yield _current
    finally:
        _current = before


def current() -> Choices:
    """The choices that layers take now."""
    global _current
    if _current is None:
        _current = Choices(wanted_mode())
    return _current


def choose(kind: str, shape: Sequence[int], weight: Tensor, fixed: str, trials: Trials) -> str:
    """The form that a layer takes.

    Parameters
    ----------
    kind : of the layer and of the work, "conv3 training"
    shape : (B, I, X, Y, Z) of the input
    weight : (O, I, k, k, k)
    fixed : the rule's form
    trials : all that may be taken, the rule's among them
    """
    if weight.dtype != torch.float32 or _work(shape, weight) < LEAST_WORK:
        return fixed
    choices, layer = current(), layer_name(kind, shape, weight)
    if layer in choices.kept:
        form = choices.kept[layer]
    elif choices.mode == "fixed":
        form = fixed
    else:
        form = _measured(choices, layer, shape, weight, fixed, trials)
    choices.used.setdefault(layer, form)
    return form


def _work(shape: Sequence[int], weight: Tensor) -> int:
    return shape[0] * math.prod(shape[2:]) * weight.numel()


def layer_name(kind: str, shape: Sequence[int], weight: Tensor) -> str:
    """Of all layers that share a timing: "conv3 training 64>64 16x16x16", with "one" for a lone sample."""
    edges = "x".join(str(next((e for e in EDGES if n <= e), EDGES[-1])) for n in shape[2:])
    o, i = weight.shape[:2]
    return f"{kind} {i}>{o} {edges}{' one' if shape[0] == 1 else ''}"


# --- timing -------------------------------------------------------------------------------------------------------


def _measured(choices: Choices, layer: str, shape: Sequence[int], weight: Tensor, fixed: str, trials: Trials) -> str:
    if layer in choices.used:  # whatever another job has written since
        return choices.used[layer]
    with _lock:
        table = table_of_machine()
        known = _checked(table.get(layer))
        if known is not None and fixed in known:
            return faster(known, fixed)
        if choices.seconds > BUDGET:
            choices.left += 1
            return fixed
        began = time.perf_counter()
        seconds, disturbed = _time(shape, weight, fixed, trials)
        choices.seconds += time.perf_counter() - began
        log.debug("%s timed%s: %s", layer, " beside other programs" if disturbed else "", seconds)
        if disturbed:
            choices.left += 1
            return fixed
        choices.timed += 1
        table[layer] = {"seconds": seconds, "fixed": fixed}
        save(table)
        return faster(seconds, fixed)


def faster(seconds: Mapping[str, float], fixed: str) -> str:
    """The form that was fastest, where it was clearly faster than the rule's."""
    best = min(seconds, key=lambda form: seconds[form])
    return best if seconds[best] * CLEARLY < seconds[fixed] else fixed


def _time(shape: Sequence[int], weight: Tensor, fixed: str, trials: Trials) -> tuple[dict[str, float], bool]:
    """Seconds of each form, the least of a few rounds in turns; and whether other programs took the processor."""
    draw = torch.Generator().manual_seed(0)  # the job's own random numbers go on as if nothing was timed
    edges = [min(n, LARGEST) for n in shape[2:]]
    # Modes that count a network's tensors must not see these; weights are others, so nothing is kept of them.
    with torch._C.DisableTorchFunction(), torch.no_grad():
        x = torch.rand((min(shape[0], 2), shape[1], *edges), generator=draw)
        w = torch.rand(tuple(weight.shape), generator=draw) - 0.5
        calls = dict(trials(x, w))
        seconds = dict.fromkeys([fixed, *(form for form in calls if form != fixed)], math.inf)
        began, worked = time.perf_counter(), time.thread_time()
        for turn in range(ROUNDS):
            for form in seconds:
                if turn and seconds[form] > HOPELESS * min(seconds.values()):
                    continue
                start = time.perf_counter()
                calls[form]()
                seconds[form] = min(seconds[form], time.perf_counter() - start)
            if time.perf_counter() - began > SECONDS:
                break
    share = (time.thread_time() - worked) / (time.perf_counter() - began)
    return seconds, share < UNDISTURBED


# --- what is known of this machine --------------------------------------------------------------------------------


def machine() -> str:
    """What times depend on: processor, instruction set of torch and oneDNN, threads, torch."""
    isa = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return ", ".join(
        [processor(), f"{isa}{f' (oneDNN up to {limit[:40]})' if limit else ''}",
         counted(torch.get_num_threads(), "thread"), f"torch {torch.__version__}"]
    )  # fmt: skip


def cache_file() -> Path | None:
    """Where times are kept: FASTSRGAN_CACHE, else XDG_CACHE_HOME/fastsrgan, else ~/.cache/fastsrgan; None: nowhere."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder) / "forms.json"
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        parent = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # nobody's home
        return None
    return parent / "fastsrgan" / "forms.json"


def table_of_machine() -> dict[str, dict[str, Any]]:
    """Layer -> {"seconds": {form: seconds}} of this machine, read from the file once."""
    name, path = machine(), cache_file()
    if (name, path) not in _tables:
        _tables[name, path] = _read(path).get(name, {})
    return _tables[name, path]


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    """Machine -> table; empty where nothing can be read that was written by this version."""
    try:
        if path is None or not path.is_file() or path.stat().st_size > MOST_BYTES:
            return {}
        values = json.loads(path.read_text(encoding="utf8"))
        known = isinstance(values, dict) and values.get("version") == VERSION
        machines = values.get("machines") if known else {}
        return {name: table for name, table in machines.items() if isinstance(table, dict)}
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}


def taken(table: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Layer -> form of what a table knows."""
    found = {}
    for layer, row in table.items():
        seconds = _checked(row)
        if seconds is not None and row.get("fixed") in seconds:
            found[layer] = faster(seconds, row["fixed"])
    return found


def facts() -> dict[str, Any]:
    """What a report of this machine says: mode of trainings and of other work, machine, file, and layer ->
    {"form", "seconds"} of what was timed."""
    table = table_of_machine()
    forms = taken(table)
    layers = {layer: {"form": form, "seconds": table[layer]["seconds"]} for layer, form in sorted(forms.items())}
    path = cache_file()
    try:
        modes = {"training": wanted_mode(otherwise="measured"), "inference": wanted_mode()}
    except UsageError as error:
        modes = dict.fromkeys(("training", "inference"), str(error))
    return {**modes, "machine": machine(), "file": None if path is None else str(path), "layers": layers}


def _checked(row: Any) -> dict[str, float] | None:
    """The times of a layer where a row of the file holds them."""
    seconds = row.get("seconds") if isinstance(row, dict) else None
    if not isinstance(seconds, dict) or not seconds:
        return None
    fine = all(isinstance(s, float) and math.isfinite(s) and s > 0 for s in seconds.values())
    return seconds if fine else None


def save(table: Mapping[str, dict[str, Any]]) -> bool:
    """Add a table to the file, or do without where that cannot be done; whether it was."""
    path = cache_file()
    if path is None:
        return False
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        machines = _read(path)
        machines[machine()] = {**machines.get(machine(), {}), **table}
        temporary.write_text(json.dumps({"version": VERSION, "machines": machines}, indent=1), encoding="utf8")
        os.replace(temporary, path)
    except OSError as error:
        log.debug("times of layer forms are not kept: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True
