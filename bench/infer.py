"""Dense inference over a list of steps, beside MONAI, TorchIO and loops as nnU-Net and SegSRGAN have them.

Three kinds of rows. "sum alone": tiles that are at hand are summed, beside a copy of as many bytes. "stitching alone":
tiles out of a volume, through a network that returns what it gets, and together again. "whole inference": an image
as it was loaded to SR and probabilities; peers run the paper's network in stock modules and again fastsrgan's form.

Every result is compared with a sum in float64 of the same tiles. The time that a network took is taken apart from the
rest of a call: cutting, stitching, and for fastsrgan whatever else it does with an image.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench import naive
from bench.common import (
    TRUTH,
    Sides,
    Turn,
    largest_difference,
    peak_in_child,
    spread,
    synchronise,
    take_turns,
    texture,
)
from bench.peers_infer import EXACT, Network, peers, plain_loop, reference
from fastsrgan.infer import tiles
from fastsrgan.infer.network import TileNetwork
from fastsrgan.infer.stitch import Stitcher
from fastsrgan.infer.volume import infer_volume
from fastsrgan.model.cpu.rearranged import held
from fastsrgan.model.networks import GeneratorSpec, build_generator

STITCH_SHAPE, WHOLE_SHAPE = (160, 160, 160), (96, 112, 112)
CHANNELS = 2  # SR and segmentation
RING_BYTES = 2**27  # of different tiles that "sum alone" goes round, more than a cache holds
CEILING = "copy of the same bytes"
PLAIN, LAST, OWN = "plain network", "plain network, channels last", "fastsrgan's network"
HEADLINE = f"monai, {PLAIN}"
FEW_TILES = 64  # up to which whole inference at other than the main step is compared with MONAI
SUM, STITCH, WHOLE = "sum alone", "stitching alone", "whole inference"


class Clock:
    """Seconds that networks took."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, 0.0

    def __call__(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The network, timed."""

        def timed(*args: Any, **kwargs: Any) -> Tensor:
            synchronise(self.device)
            began = time.perf_counter()
            out = network(*args, **kwargs)
            synchronise(self.device)
            self.seconds += time.perf_counter() - began
            return out

        return timed


@dataclass
class Dense:
    """A ``bench.common.OwnWay``: as many rounds as fit, time within the network, a tolerance for each side.

    build : clock -> sides, ours first, ``TRUTH`` among them
    """

    name: str
    facts: dict[str, Any]
    make: Callable[[Clock], Sides]
    device: str
    tolerances: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    memory: bool = False

    def __post_init__(self) -> None:
        self.clock = Clock(self.device)

    def build(self) -> Sides:
        """side -> call"""
        return self.make(self.clock)

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """The row: gate first, then times, then memory."""
        sides = dict(self.build())
        truth = list(sides.pop(TRUTH)())
        ours = next(iter(sides))
        results = {name: list(call()) for name, call in sides.items()}
        to_truth = {name: largest_difference(result, truth) for name, result in results.items()}
        to_ours = {name: largest_difference(results[ours], result) for name, result in results.items()}
        del results, truth
        allowed = {name: self.tolerances.get(name, EXACT) for name in sides}
        exact = [name for name in sides if allowed[name] == EXACT]
        row: dict[str, Any] = {"name": self.name, **self.facts, "tolerance": EXACT}
        row["max_error"] = max((e[name] for name in exact for e in (to_truth, to_ours)), key=_nan_last)
        row["error_to_float64"] = to_truth[ours]
        row["passed"] = all(e[name] <= allowed[name] for name in sides for e in (to_truth, to_ours))
        row["peers"] = {
            name: {"max_error": to_ours[name], "error_to_float64": to_truth[name], "tolerance": allowed[name]}
            for name in sides
            if name != ours
        }
        if not row["passed"]:
            return row | {"peers": row["peers"] | {name: {"not_run": how} for name, how in self.missing.items()}}
        turns, inside = self._rounds(sides, args)
        _note_times(row, ours, turns, inside)
        row["peers"] |= {name: {"not_run": how} for name, how in self.missing.items()}
        if args.memory and self.memory:
            names = list(sides)
            del sides
            for name in names:
                if name != CEILING:
                    (row if name == ours else row["peers"][name])["peak_bytes"] = peak_in_child(self.name, name, args)
        return row

    def _rounds(self, sides: Sides, args: argparse.Namespace) -> tuple[dict[str, list[Turn]], dict[str, list[float]]]:
        """Every side once a round: its time, and of it the network's. Two rounds at least, then until time is up."""
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        inside: dict[str, list[float]] = {name: [] for name in sides}
        began = time.perf_counter()
        for done in range(args.repeats):
            if done >= 2 and (time.perf_counter() - began) * (done + 1) / done > args.limit:
                break
            for name, call in sides.items():
                self.clock.seconds = 0.0
                turns[name] += take_turns({name: call}, 1, self.device)[name]
                inside[name].append(self.clock.seconds)
        return turns, inside

    def lines(self, row: Mapping[str, Any]) -> Sequence[str]:
        """What is printed besides the times."""
        found = [f"error to the float64 sum {row['error_to_float64']:.1e}"]
        if "of_copy_ceiling" in row:
            found.append(f"{row['of_copy_ceiling']:.0%} of the copy ceiling")
        if "outside_network" in row:
            found.append(f"{row['outside_network']:.1%} of the time outside the network")
        return found


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _note_times(row: dict[str, Any], ours: str, turns: dict[str, list[Turn]], inside: dict[str, list[float]]) -> None:
    """Times of every side, ratios to ours, what is spent outside the network, and the share of the ceiling."""
    for name, mine in turns.items():
        into = row if name == ours else row["peers"][name]
        into |= spread(mine)
        into["tiles_per_second"] = row["tiles"] / into["seconds_median"]
        if row["kind"] == WHOLE:
            shares = [1 - net / turn.seconds for net, turn in zip(inside[name], mine, strict=True)]
            into["outside_network"] = statistics.median(shares)
    row["ratio_to"], row["ratio_range"] = {}, {}
    for name in row["peers"]:
        row["ratio_to"][name] = row["peers"][name]["seconds_median"] / row["seconds_median"]
        rounds = [theirs.seconds / own.seconds for theirs, own in zip(turns[name], turns[ours], strict=True)]
        row["ratio_range"][name] = [min(rounds), max(rounds)]
    if CEILING in row["peers"]:
        row["of_copy_ceiling"] = row["ratio_to"][CEILING]


# --- cases --------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> list[Dense]:
    """Sum and stitching alone for every step and window; whole inference for every step and kernel."""
    found = []
    steps = sorted({args.step, *args.steps}, reverse=True)
    steps = [s for s in steps if s <= args.patch]
    for window in ("constant", "gaussian"):  # others cost what the Gaussian does
        for step in steps if window == "constant" else [args.step]:
            found += [_sum_case(args, step, window), _stitch_case(args, step, window)]
    for kernel in args.kernel:
        for step in steps:
            found.append(_whole_case(args, step, "constant", kernel))
        found.append(_whole_case(args, args.step, "gaussian", kernel))
    return found


def _case(
    args: argparse.Namespace, kind: str, shape: tuple[int, ...], step: int, window: str, detail: str = ""
) -> tuple[str, dict[str, Any], tiles.TilePlan]:
    plan = tiles.plan(shape, args.patch, step, window=window)
    title = f"{kind}, {window}{detail}, {' x '.join(map(str, shape))}, patch {args.patch} step {step}"
    facts = {"kind": kind, "shape": list(shape), "patch": args.patch, "step": step, "window": window}
    return title, facts | {"tiles": len(plan)}, plan


def _sum_case(args: argparse.Namespace, step: int, window: str) -> Dense:
    """Tiles at hand: every tile is read once, the result written once."""
    shape = tuple(args.shape or STITCH_SHAPE)
    title, facts, plan = _case(args, SUM, shape, step, window)
    size = 4 * CHANNELS * (len(plan) * math.prod(plan.patch) + math.prod(plan.padded_shape))
    batch = args.batch[0]

    def make(clock: Clock) -> Sides:
        ring = _ring(plan, args.device)
        copied, target = (torch.ones(size // 8, device=args.device) for _ in range(2))

        def ours() -> list[Tensor]:
            stitcher = Stitcher(plan, CHANNELS, args.device)
            for first, count in _batches(len(plan), len(ring), batch):
                stitcher.add(ring[first : first + count])
            return [stitcher.result()]

        def served() -> Iterator[Tensor]:
            for first, count in _batches(len(plan), len(ring), batch):
                yield ring[first : first + count]

        def loop(one: Callable[..., Tensor]) -> list[Tensor]:
            given = served()
            return [one(copied.new_zeros(()).expand(plan.padded_shape), plan, lambda x: next(given), batch, window)]

        def copy() -> list[Tensor]:
            target.copy_(copied)
            return known

        known = ours()
        return {
            "fastsrgan": ours,
            "plain loop": lambda: loop(plain_loop),
            CEILING: copy,
            TRUTH: lambda: loop(reference),
        }

    return Dense(title, facts | {"bytes": size}, make, args.device)


def _ring(plan: tiles.TilePlan, device: str) -> Tensor:
    """(N, C, *patch) different tiles, fewer than the plan has when those would be too many."""
    count = min(len(plan), max(2, RING_BYTES // (4 * CHANNELS * math.prod(plan.patch))))
    draw = torch.Generator(device).manual_seed(0)
    return torch.rand((count, CHANNELS, *plan.patch), generator=draw, device=device)


def _batches(tiles_: int, ring: int, batch: int) -> Iterator[tuple[int, int]]:
    """(place in the ring, count) of one batch after the other, the same for all sides."""
    for first in range(0, tiles_, batch):
        count = min(batch, tiles_ - first, ring)
        yield (first % ring) if first % ring + count <= ring else 0, count


def _stitch_case(args: argparse.Namespace, step: int, window: str) -> Dense:
    """Tiles out of a volume, unchanged, and together again; the result has to be the volume."""
    shape = tuple(args.shape or STITCH_SHAPE)
    title, facts, plan = _case(args, STITCH, shape, step, window)
    known = peers(window, args.device)
    missing = {name: why for name, p in known.items() if (why := p.not_run(plan))}
    batch = args.batch[0]

    def make(clock: Clock) -> Sides:
        volume = torch.from_numpy(texture(shape)).to(args.device)

        def ours() -> list[Tensor]:
            padded = tiles.pad(volume, plan)
            stitcher = Stitcher(plan, 1, args.device)
            for first in range(0, len(plan), batch):
                chosen = range(first, min(first + batch, len(plan)))
                stitcher.add(tiles.look(padded, plan, chosen))
            return [stitcher.result()[(slice(None), *plan.crop)]]

        sides: dict[str, Callable[[], list[Tensor]]] = {"fastsrgan": ours}
        for name, peer in known.items():
            if name not in missing:
                sides[name] = lambda loop=peer.loop: [loop(volume, plan, _identity, batch, window)]  # type: ignore[misc]
        return sides | {TRUTH: lambda: [volume[None]]}

    tolerances = {name: peer.tolerance for name, peer in known.items()}
    return Dense(title, facts, make, args.device, tolerances, missing, memory=step == args.step)


def _identity(x: Tensor) -> Tensor:
    return x


def _whole_case(args: argparse.Namespace, step: int, window: str, kernel: int) -> Dense:
    """An image as it was loaded -> SR in its range and probabilities: the same tiles, the same weights."""
    shape = tuple(args.shape or WHOLE_SHAPE)
    title, facts, plan = _case(args, WHOLE, shape, step, window, f", k {kernel}")
    main = step == args.step
    few = len(plan) <= FEW_TILES
    known = {
        f"{name}, {network}": (peer, network)
        for name, peer in peers(window, args.device).items()
        for network in (PLAIN, LAST, OWN)
        # The plain loop does what MONAI does; fastsrgan's network within other loops is measured once, as is the plain
        # one in the other order of memory.
        if name != "plain loop"
        and (network == PLAIN or (main and window == "constant"))
        and (network != LAST or name == "monai")
        and (main or (few and name == "monai"))
    }
    missing = {name: why for name, (peer, _) in known.items() if (why := peer.not_run(plan))}
    batch = args.batch[0]

    def make(clock: Clock) -> Sides:
        image = texture(shape) * np.float32(812)
        generator = build_generator(GeneratorSpec(kernel=kernel)).eval().to(args.device)
        plain, last = (naive.NaiveGenerator(kernel).eval().to(args.device) for _ in range(2))
        for one in (plain, last):
            naive.copy(one.paired(generator))
        networks: dict[str, Network] = {PLAIN: clock(plain), OWN: clock(generator)}
        networks[LAST] = clock(naive.channels_last(last))
        settings: dict[str, Any] = {"patch": args.patch, "step": step, "window": window, "device": args.device}
        settings["batch"] = batch

        def ours() -> list[np.ndarray]:
            with mock.patch.object(TileNetwork, "__call__", clock(TileNetwork.__call__)):
                done = infer_volume(image, np.eye(4), generator, precision="fp32", agree="off", **settings)
            return [done.sr, done.prob]

        def around(loop: Callable[..., Tensor], network: Network) -> list[np.ndarray]:
            scale, floor = image.max(), image.min()
            with torch.inference_mode(), held():
                volume = torch.from_numpy(image / scale).to(args.device)
                out = loop(volume, plan, network, batch, window).cpu().numpy()
            return [np.maximum(out[0] * scale, floor), out[1:]]

        sides: dict[str, Callable[[], list[np.ndarray]]] = {"fastsrgan": ours}
        for name, (peer, network) in known.items():
            if name not in missing:
                sides[name] = lambda loop=peer.loop, n=networks[network]: around(loop, n)  # type: ignore[misc]
        # The paper's network where it is affordable, so that our form of it is checked too.
        oracle = plain if main or few else generator
        return sides | {TRUTH: lambda: around(reference, oracle)}

    tolerances = {name: peer.tolerance for name, (peer, _) in known.items()}
    return Dense(
        title, facts | {"kernel": kernel}, make, args.device, tolerances, missing, memory=main and window == "constant"
    )
