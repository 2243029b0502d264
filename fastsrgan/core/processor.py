"""Which processor this is. Imports nothing of the package: what times depend on is read below everything else."""

from __future__ import annotations

import itertools
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Its name, with family, model and stepping where the system tells them: the name alone may be "AMD EPYC"."""
    try:
        lines = CPUINFO.read_text(encoding="utf8", errors="replace").splitlines()
    except OSError:
        lines = []
    first = itertools.takewhile(str.strip, lines)
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
    numbers = "/".join(fields[name] for name in ("cpu family", "model", "stepping") if fields.get(name))
    name = fields.get("model name") or platform.processor() or platform.machine() or "processor"
    return f"{name} {numbers}".strip()
