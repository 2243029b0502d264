"""What a device's ceilings allow, layer by layer and phase by phase, beside what was measured: docs/roofline.md.

    python -m bench roofline                                     # from bench/results/*/{layers,step}.json
    python -m bench roofline --matmul 300e12 --copy 2e12         # floors of a device with these ceilings, --type bf16

FLOPs and bytes come from the layers' shapes (``bench.flops``). The floor of a piece of work is the longer of its FLOPs
over the device's best matrix product and its least bytes over the device's best copy, both measured in the run that
measured the step. A floor counts the operations as usually written: exact rewrites that need fewer products (phases of
an up-sampling convolution, Winograd tiles, spectral 7^3) can come out below it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import flops
from bench.common import NAIVE, commit_of, is_quick
from bench.data_page import RESULTS, duration, table
from bench.flops import Count
from fastsrgan.cli.console import HelpFormatter
from fastsrgan.errors import InputError
from fastsrgan.model.arithmetic import TYPES

BLOCKS = 12  # convolutions of the residual blocks
REPEATED = {"norm, 3^3 of a block": BLOCKS}
HEAD = f"""# Roofline

The tables are made by `python -m bench report` from the files named below; `python -m bench roofline --matmul FLOPS
--copy BYTES` gives the floors of another device. FLOPs and least bytes (every array of a convolution read or written
once) follow from the layers' shapes (`bench/flops.py`), the ceilings of each table from the best large matrix product
and the best large copy of its own run. The floor is the longer of the two times. It counts products as usually written,
so a rewrite that needs fewer of them can be faster than the floor.

{NAIVE}.
"""
CLOSING = """
What to read from the tables, and what would close the gaps:

* Layers below their floor owe it to forms that need fewer products (decision 002). The transforms around those
  products are bound by memory; a kernel that keeps a tile in the cache from transform to product is what is left.
* The halving layers are furthest above the floor and a small share of the whole: little arithmetic for what a norm
  and a stride of two move. A kernel that normalises while it gathers its taps is what they lack.
* The first and the last layer have one and two channels: a product with so few rows fills no matrix unit, whatever its
  FLOPs. The spectral form removes most of their products; what remains is memory traffic.
* Instance norm and ReLU are counted with the layer behind them but add no FLOPs and no bytes to the floor, though they
  read and write their input once more.
* The critic's weight gradients have few output voxels and many taps; the step by hand computes them from inputs that
  are lifted once (decision 015).
"""
H100 = (700e12, 2.9e12)  # FLOP per second of bfloat16 products, bytes per second of copies: assumed, no source, not run
ASSUMED = """
## An accelerator, by arithmetic

No accelerator was measured. `python -m bench roofline --matmul 700e12 --copy 2.9e12 --type bf16`: ceilings that are
assumed for an H100, without a source and not run, bfloat16, k 16 and 32, batch 16, 64^3. `floor`: every array of a
convolution read or written once, two bytes a value, products as usually written. `as run` and `uncompiled`: what the
code asks for when every operation is a kernel of its own, counted on tensors without memory (`bench/uncompiled.py`).
`at best`: the longer of the two at the ceilings; a compiler that fuses norms, pads and activations lies between it and
the floor. `left`: `at best` over `floor`.

{table}

What the compiled generator moves is counted by `python -m bench traffic` (k 16, batch 16, 64^3, bfloat16), each array
that a kernel reads or writes once. The budgets are 200 MB per patch for a forward pass alone and 600 MB for the forward
and backward pass of a training step; tests/test_gpu_forms.py asks for both with one of the six blocks. It counted
169.9 MB for a forward pass alone and, in a training step, 186.7 MB forward and 332.3 MB backward, together 519.0 MB in
305 kernels, with torch 2.13.0; these figures are typed from its output, not made with this page.

Emulated: the compiler's passes and its plan of kernels, made for a CPU with the options, forms and layouts of CUDA
(oneDNN's rule of layouts stands for cuDNN's; that the two are the same is assumed, cuDNN was not run); changes of
layout, counted on CPU tensors and on CUDA tensors without memory, on which autograd cannot run: its operations
are traced on a CPU and called again one by one. Compiled by a real compiler: the kernels of `kernels/`, by NVRTC. Run
on a GPU: nothing.
"""


class Ceilings(NamedTuple):
    """FLOP per second of a matrix product, bytes per second of a copy."""

    matmul: float
    copy: float

    def floor(self, count: Count) -> float:
        """Seconds below which the work as written cannot be done."""
        return max(count.flop / self.matmul, count.bytes / self.copy)

    def bound(self, count: Count) -> str:
        """Which ceiling it is."""
        return "products" if count.flop / self.matmul > count.bytes / self.copy else "memory"


def layer_counts(kernel: int, patch: int, element: int = flops.FLOAT) -> dict[str, Count]:
    """The generator's layers by the names of ``bench layers``, one of each."""
    g = flops.generator(kernel, patch, element)
    names = ["stem 7^3", "norm, first halving", "norm, second halving", "norm, 3^3 of a block"]
    names += ["norm, first doubling", "norm, second doubling", "norm, head 7^3"]
    return dict(zip(names, [*g[:4], *g[-3:]], strict=True))


def phase_counts(
    kernel: int, critic_kernel: int, patch: int, critics: int, element: int = flops.FLOAT
) -> dict[str, Count]:
    """The phases of training by the beginnings of the row names of ``bench step``, per patch, ``element`` bytes a
    value."""
    g, d = flops.generator(kernel, patch, element), flops.critic(critic_kernel, patch, element=element)
    return {
        "generator forward,": flops.forward(g),
        "generator forward + backward": flops.both(g),
        "critic update": flops.critic_update(d),
        "generator update": flops.generator_update(g, d),
        "iteration": flops.iteration(g, d, critics),
    }


def layer_table(report: dict[str, Any], top: Ceilings) -> str:
    """Forward and backward of each layer beside its floor; layers that occur several times are summed."""
    s = report["settings"]
    kernel, batch = s["kernel"][0], s["batch"][0]
    rows = {row["name"]: row for row in report["rows"] if row["passed"]}
    lines = []
    for name, one in layer_counts(kernel, s["patch"]).items():
        n = REPEATED.get(name, 1)
        count = one.times(n * batch)
        forward, training = (
            next((r for k, r in rows.items() if k.startswith(f"{name}, ") and k.endswith(ending)), None)
            for ending in (", forward", ", forward + backward")
        )
        if forward is None or training is None:
            continue
        took, plain = forward["seconds_median"], forward["peers"]["plain"]["seconds_median"]
        # The gradient of the weights is a pass of its own, that of the input too where another layer is behind.
        back = count.times(2 if name.startswith("stem") else 3)
        trained = n * training["seconds_median"]
        lines.append(
            [
                f"{name}{f', {n} of them' if n > 1 else ''}",
                f"{count.flop / 1e9:.3g}",
                f"{count.bytes / 1e6:.3g}",
                top.bound(count),
                duration(top.floor(count)),
                f"{duration(n * took)} ({n * took / top.floor(count):.2g} x)",
                f"{duration(n * plain)} ({n * plain / top.floor(count):.2g} x)",
                duration(top.floor(back)),
                f"{duration(trained)} ({trained / top.floor(back):.2g} x)",
            ]
        )
    head = ["layer", "GFLOP", "MB", "bound by", "floor", "forward", "plain forward", "floor, training", "training"]
    return table(head, lines)


def phase_table(report: dict[str, Any], top: Ceilings) -> str:
    """Each phase of training beside its floor. The least bytes are those that the row itself counted, in the type that
    it computed in; rows of older reports have float32's."""
    s = report["settings"]
    counts = phase_counts(s["kernel"][0], s["critic_kernel"], s["patch"], s["critic_iterations"])
    lines = []
    for start, one in counts.items():
        row = next((r for r in report["rows"] if r["name"].startswith(start) and "seconds_median" in r), None)
        if row is None:
            continue
        count = one.times(row["batch"])
        count = Count(count.flop, row.get("least_bytes", count.bytes))
        took, floor = row["seconds_median"], top.floor(count)
        plain = [row["peers"].get(name, {}).get("seconds_median") for name in ("naive", "naive, channels last")]
        lines.append(
            [
                row["name"],
                f"{count.flop / 1e9:.4g}",
                f"{count.bytes / 1e9:.3g}",
                duration(floor),
                f"{duration(took)} ({took / floor:.2g} x)",
                *("not run" if p is None else f"{duration(p)} ({p / floor:.2g} x)" for p in plain),
            ]
        )
    return table(["phase", "GFLOP", "GB", "floor", "fastsrgan", "naive", "naive, channels last"], lines)


def floors(top: Ceilings, kernel: int, critic_kernel: int, patch: int, batch: int, critics: int, kind: str) -> str:
    """Every phase on a device with these ceilings: its floor, what the code does uncompiled, and what is left."""
    from bench import uncompiled

    dtype = TYPES[kind]
    written = phase_counts(kernel, critic_kernel, patch, critics, dtype.itemsize)
    run = uncompiled.phases(kernel, critic_kernel, patch, critics, dtype)
    lines = []
    for name, one in written.items():
        count, ours = one.times(batch), run[name].times(batch)
        floor, took = top.floor(count), top.floor(ours)
        cells = [f"{count.flop / 1e9:.4g}", f"{count.bytes / 1e9:.3g}", top.bound(count), duration(floor)]
        cells += [f"{ours.flop / 1e9:.4g}", f"{ours.bytes / 1e9:.3g}", top.bound(ours), duration(took)]
        lines.append([name.rstrip(","), *cells, f"{took / floor:.2g} x"])
    head = ["phase", "GFLOP", "GB", "bound by", "floor", "GFLOP as run", "GB uncompiled", "bound by", "at best", "left"]
    return table(head, lines)


def ceilings(report: dict[str, Any]) -> Ceilings:
    """Those that the run itself measured: on its device, where rows have them, else the CPU's. Raises InputError for a
    report without them."""
    known = [row["ceilings"] for row in report["rows"] if "ceilings" in row]
    known += [report["machine"]] if report["device"] == "cpu" else []
    for found in known:
        if "matmul_flop_per_second" in found:
            return Ceilings(found["matmul_flop_per_second"], found["copy_bytes_per_second"])
    bench = f"bench {report['bench']}"
    raise InputError(bench, "the report has no ceilings", f"`python -m {bench} --json FILE` makes one")


def told(report: dict[str, Any], top: Ceilings) -> str:
    """What a table was made of, and its ceilings."""
    m = report["machine"]
    return (
        f"`{' '.join(report['command'])}`, {commit_of(report)}: {m['cpu']}, {m['threads']} threads, device "
        f"{report['device']}, {top.matmul / 1e9:.4g} GFLOP/s in a product, {top.copy / 1e9:.3g} GB/s in a copy (read "
        "and written).\n"
    )


def section(folder: Path) -> list[str]:
    """One machine's tables as Markdown, each beside the ceilings of its own run; nothing of what was measured with
    --quick."""
    lines = []
    for name, title, made in (("step", "Phases", phase_table), ("layers", "Layers of the generator", layer_table)):
        path = folder / f"{name}.json"
        report = json.loads(path.read_text(encoding="utf8")) if path.is_file() else None
        if report is None or is_quick(report):
            continue
        top = ceilings(report)
        lines += [f"{title}, {told(report, top)}", made(report, top)]
    return [f"\n## {folder.name}\n", *lines] if lines else []


def page() -> str:
    """The whole page."""
    sections = [line for folder in sorted(RESULTS.iterdir()) if folder.is_dir() for line in section(folder)]
    return "\n".join([HEAD, *sections]).rstrip() + "\n" + CLOSING + ASSUMED.format(table=assumed()).rstrip() + "\n"


def assumed() -> str:
    """The table of the device that ``ASSUMED`` names, with the settings that a training has unless told otherwise."""
    return floors(Ceilings(*H100), 16, 32, 64, 16, 5, "bf16")


def main(argv: Sequence[str]) -> str:
    """``python -m bench roofline``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench roofline", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--matmul", type=float, metavar="FLOPS", help="ceiling of matrix products, FLOP per second")
    parser.add_argument("--type", choices=sorted(TYPES), default="bf16", help="that the networks compute in (bf16)")
    parser.add_argument(
        "--copy", type=float, metavar="BYTES", help="ceiling of copies, bytes read and written a second"
    )
    for name, default, text in (
        ("kernel", 16, "channels of the generator's first convolution"),
        ("critic-kernel", 32, "channels of the critic's first convolution"),
        ("patch", 64, "edge of a patch in voxels"),
        ("batch", 16, "patches at a time"),
        ("critics", 5, "critic updates per generator update"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} ({default})")
    args = parser.parse_args(argv)
    if (args.matmul is None) != (args.copy is None):
        parser.error("--matmul and --copy belong together")
    if args.matmul is None:
        return page()
    if min(args.matmul, args.copy, args.kernel, args.critic_kernel, args.patch, args.batch, args.critics) <= 0:
        parser.error("numbers above zero")
    top = Ceilings(args.matmul, args.copy)
    return floors(top, args.kernel, args.critic_kernel, args.patch, args.batch, args.critics, args.type)
