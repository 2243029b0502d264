"""What may be asked of an inference: a row for each option, with all that is to be known of it.

To add an option, add a field to ``InferSettings`` (its default, help, check, and whether a resumed run compares it) and
use it where it acts. ``fastsrgan infer``, the keywords of ``infer_volume`` and ``infer_files``, the record of a result
and what ``--resume`` compares follow from the row. Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from fastsrgan.config import CHOICES
from fastsrgan.core.files import finite
from fastsrgan.core.system import pick_device
from fastsrgan.errors import UsageError
from fastsrgan.infer.values import (
    AUTO,
    EVEN,
    OFF,
    ON,
    WINDOWS,
    PerAxis,
    Resolution,
    Step,
    batch_size,
    check_agree,
    check_batch,
    check_budget,
    check_max_memory,
    check_min_size,
    check_slice_thickness,
    check_threshold,
    check_tile,
    flip_axes,
    memory,
    millimetres,
    per_axis,
    seconds,
    size,
    step_size,
    tile_edge,
    voxels,
    word_or_number,
)

F = TypeVar("F", bound=Callable[..., Any])

HEAD = "head"  # the mask that is found in the image itself
OUTSIDE = (AUTO, "keep", ZERO := "zero")
ALWAYS, CHANGED, ELSEWHERE = "always", "changed", "elsewhere"
SAME: Any = object()  # as the default of the field
PAPER_STEP = 30


# --- the rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """What is to be known of an option besides its name, type and default.

    help : of the command line
    flag : where it is not the name
    parse : a word of the command line -> value; None makes a switch
    nargs, metavar : argparse's
    choices : all values; check : raises UsageError
    instead : another flag that stands for one of its values, and that flag's help
    recorded : in a record's ``asked``: ALWAYS, where it is CHANGED from the default, or ELSEWHERE in the record
    record_as : there, where it is not the name
    decides : whether a result depends on it, so that ``--resume`` compares it
    reported : whether ``InferResult.report`` names its value
    typed : the command line's default, where it is not the field's
    of_files : an option of ``infer_files`` alone; group : the part of the record that repeats it where it is changed
    basic : whether it stands in the first of the two groups of ``fastsrgan infer --help``
    """

    help: str
    flag: str = ""
    parse: Callable[[str], Any] | None = None
    nargs: str | None = None
    metavar: str | None = None
    choices: Collection[str] = ()
    check: Callable[[Any], Any] | None = None
    instead: tuple[str, str, str] | None = None
    recorded: str = ALWAYS
    record_as: str = ""
    decides: bool = True
    reported: bool = False
    typed: Any = SAME
    of_files: bool = False
    group: str = ""
    basic: bool = False


def option(default: Any, help: str, **more: Any) -> Any:
    """A field with its row."""
    return field(default=default, metadata={"option": Option(help, **more)})


@dataclass(frozen=True)
class InferSettings:
    """The options of an inference. Raises UsageError for values that no volume could be run with.

    Of one volume
    -------------
    patch, step : of the tiles in voxels of the new grid, one or one per stored axis; see ``tiles.plan``. Patch None:
        the whole image. Step "auto": as dense as the budget allows; None, which the command line takes where it is not
        given: see ``on``
    budget : seconds for the tiles: ever denser steps, each twice as dense, down to ``step``, as long as they fit;
        see ``anytime``
    new_resolution : voxel size of the result in mm: None, isotropic at the finest of the input's (of files the weights'
        own size where the scan is much coarser, see ``planes.own_grid``); one number; one per stored axis; or "same",
        the input's own
    geometry : "physical" keeps every structure where it was, on any orientation; "segsrgan" gives the original's
        numbers and its affine
    window : weight of a tile's voxels where tiles overlap, a name in ``values.WINDOWS``; "constant" is the paper's
    batch : tiles per forward pass, "auto" by memory; halved when memory runs out
    precision : "auto" (fp32 on CPU, fp16 on CUDA), "fp32", "bf16" or "fp16"; sums are float32 always
    compile : "on": the network through torch.compile, on CUDA as one graph; "off"; "auto": on CUDA, where a small
        compiled pass is right (``network.compiled_test``)
    precision_check : measure what the precision costs on a few tiles, for the report
    device : "auto", "cpu", "cuda" or "cuda:n"
    max_memory : bytes on the host beside the image; None takes what is free. What does not fit is done by slabs into
        files, or refused. A run that was killed goes on at its last slab.
    mask : (X, Y, Z) array, above zero where results are wanted (of files: the path of such an image), or "head": the
        box around what is brighter than air. Elsewhere SR is the interpolated image and the probabilities are 0; tiles
        that do not touch it are not computed
    outside : what the network sees where a mask array is not above zero: "keep", the scan; "zero", nothing, as in
        images of brains alone, and then SR is 0 there; "auto": of files what the weights were made for, else keep
    flips : "none", or axes of the image such as "x" or "xyz": the mean over all mirror images of each tile; "auto": of
        files the axis from left to right where the weights say that it is worth it, else none, as with denser and
        denser steps
    upright : thick slices are turned so that the network sees them across its last axis, as in training, and a sagittal
        or coronal stack with it the head. "on": the probabilities are of a second pass in which the head is upright, as
        networks saw it that were trained on axial slices alone; "off": of the same pass as SR; "auto": of files "on"
        where the weights say that they know axial slices and not the scan's, else "off". Axial slices have one pass
    agree : make the result agree with the scan (see ``agreement``): "auto", with a weight by the scan's noise, in the
        physical geometry; "off", the network's own result; or the weight, above 0: the smaller, the more the scan
        counts. A result on the scan's own grid has nothing to agree on
    adapt : "auto": before agreement, the network's image is adapted to the scan: its result, cut into thick slices
        along the axes in their plane, is given to the network again, and what the image lacks there is learned and
        added (``volume.adapt``); where slices hide more than planes do. "off": as it is
    uncertainty : also estimate how far SR may be from the truth, voxel by voxel; see ``volume.doubt``. The spread of
        ``flips`` and of several networks is a part of it
    slice_thickness : mm of the slices, for ``agree``; "auto": of files what DICOM or a BIDS sidecar says, else the
        spacing of slices
    profile : of the slices, for ``agree``: "gaussian" or "box", as wide as they are thick; "guess": not known, a
        Gaussian of 0.8 to 0.9 times that, and a larger weight; "auto": the one that the empty surroundings of a
        simulated scan show (``volume.profile``), else "guess"

    Of files
    --------
    threshold, largest_component, min_size : of the segmentation: the probability above which a voxel belongs to it;
        keep its largest component alone; leave out components of less mm^3. Components touch by faces, edges or corners
    dtype : of the SR image: "float32", or "input": rounded and clipped to the type and scaling of the image it was
        made of where that is an integer type
    save_prob, png : also write the probabilities, a picture
    save_residual : also write what the scan says and the result, acquired again, does not, on the scan's grid
    split_volume : each image over all ranks of a machine, not one image for each; see ``modes``
    series : which series of a DICOM folder, see ``dicom.select``; the results' names then end in ``_series-N``
    volume, max_voxels : see ``images.load``
    """

    # fmt: off
    patch: PerAxis = option(128, "tile edge in voxels, or none: the whole image (128)", parse=tile_edge,
        reported=True, basic=True)
    step: Step | None = option(PAPER_STEP,
        "voxels between tiles, or auto, as fits --budget or 60s; small is good and slow (half the patch; at most 30 on "
        "CUDA, with segsrgan or --budget)",
        parse=step_size, typed=None, reported=True, basic=True)
    budget: float | None = option(None,
        "60s, 2m: the densest steps down to --step that fit this time; 0: the first alone", parse=seconds,
        metavar="TIME", check=check_budget, reported=True)
    new_resolution: Resolution = option(None,
        "one size, three, or same (default: isotropic at the finest, or at the weights' own where that is coarse)",
        parse=size, nargs="+", metavar="MM", check=millimetres, basic=True)
    geometry: str = option("physical", "exact (physical), or the original's", parse=str, choices=CHOICES["geometry"],
        reported=True)
    window: str = option(EVEN, "weights inside a tile (constant)", parse=str, choices=WINDOWS, reported=True)
    batch: str | int = option("auto", "tiles per forward pass (auto)", parse=batch_size, check=check_batch,
        decides=False)
    precision: str = option("auto", "arithmetic of the network; auto: fp16 on CUDA, fp32 on a CPU (auto)", parse=str,
        choices=CHOICES["precision"], reported=True)
    compile: str = option("auto", "the network by torch.compile, on CUDA as one graph (auto)", parse=str,
        choices=CHOICES["compile"], recorded=CHANGED, reported=True)
    precision_check: bool = option(False, "report what the precision costs, on a few tiles", flag="--check-precision",
        recorded=ELSEWHERE, decides=False)
    device: str = option("auto", "auto, cpu, cuda or cuda:n", parse=str, decides=False, reported=True,
        basic=True)
    max_memory: int | None = option(None,
        "of the host, beside the image; what takes more is done by slabs, or refused: where these take more too, "
        "with --budget, with --step auto", parse=memory, metavar="G", check=check_max_memory, recorded=ELSEWHERE,
        decides=False)
    mask: Any = option(None, "compute only where this image is above zero", parse=str, metavar="FILE",
        instead=("--crop-to-head", HEAD, "compute only in the box around what is not air"), basic=True)
    outside: str = option(AUTO,
        "what the network sees outside --mask: the scan, or zero as in images of brains alone (auto: as the "
        "weights were made)", parse=str, choices=OUTSIDE, recorded=CHANGED)
    flips: str = option(AUTO,
        "mean over mirror images of each tile: none, x, xy, xyz, ... (auto: left and right where the weights say "
        "so, in twice the time)", parse=str, metavar="AXES", check=flip_axes, recorded=CHANGED)
    upright: str = option(AUTO,
        "segment sagittal and coronal slices with the head upright, in a second pass: on, off (auto: on where the "
        "weights were made for axial slices and not for these)", parse=str, choices=(AUTO, ON, OFF), recorded=CHANGED)
    agree: str | float = option(AUTO,
        "make SR, acquired again, agree with the scan: auto (off with segsrgan), off, or the weight of what the scan "
        "cannot say (auto)",
        parse=word_or_number(AUTO, OFF), metavar="W", check=check_agree)
    adapt: str = option(AUTO,
        "add to SR what the network leaves out, as learned on the scan's own slices, cut into thick ones: auto (where "
        "agree is on), off", parse=str, choices=(AUTO, OFF), recorded=CHANGED)
    uncertainty: bool = option(False,
        "also write the standard deviation that SR's error is taken to have, and the probability map; it "
        "costs no pass of the network of its own, with --flips (2 to 8 passes) or several weights their "
        "spread is a part", recorded=CHANGED, basic=True)
    slice_thickness: str | float = option(AUTO,
        "of the scan, where slices have gaps or overlap (auto: of DICOM or a BIDS sidecar, else the spacing)",
        parse=word_or_number(AUTO), metavar="MM", check=check_slice_thickness, recorded=CHANGED, basic=True)
    profile: str = option(AUTO, "of the slices (auto: what the scan shows, else guess)", parse=str,
        choices=(AUTO, "guess", "gaussian", "box"), recorded=CHANGED)
    threshold: float = option(0.5, "probability that makes the segmentation (0.5)", parse=float, check=check_threshold,
        recorded=CHANGED, of_files=True, group="segmentation", basic=True)
    largest_component: bool = option(False, "keep the segmentation's largest component alone", recorded=CHANGED,
        of_files=True, group="segmentation", basic=True)
    min_size: float | None = option(None, "leave out components of less cubic millimetres, 0 none (as the weights say)",
        parse=float, metavar="MM3", check=check_min_size, recorded=CHANGED, record_as="min_size_mm3", of_files=True,
        group="segmentation")
    dtype: str = option("float32",
        "of the SR image; input: rounded to the type and scaling of the image it was made of", parse=str,
        choices=("float32", "input"), recorded=CHANGED, of_files=True)
    save_prob: bool = option(False, "also write the probability map", recorded=ELSEWHERE, decides=False, of_files=True,
        basic=True)
    save_residual: bool = option(False, "also write the scan minus the result acquired again", recorded=ELSEWHERE,
        decides=False, of_files=True)
    png: bool = option(False, "also draw image, SR and segmentation side by side", recorded=ELSEWHERE, decides=False,
        of_files=True, basic=True)
    split_volume: bool = option(False, "under torchrun: each image over all ranks, not one image for each",
        recorded=ELSEWHERE, decides=False, of_files=True)
    series: str | None = option(None, "which series of a DICOM folder: number, UID or part of its description",
        parse=str, metavar="N", recorded=ELSEWHERE, of_files=True, basic=True)
    volume: int | None = option(None, "which volume of a 4-D image or DICOM series, from 0", parse=int, metavar="I",
        recorded=ELSEWHERE, of_files=True, basic=True)
    max_voxels: int = option(2**31, "refuse larger images (2147483648)", parse=voxels, metavar="N", recorded=ELSEWHERE,
        decides=False, of_files=True)
    # fmt: on

    def __post_init__(self) -> None:
        for name, row in options().items():
            value = getattr(self, name)
            if row.choices and value not in row.choices:
                raise UsageError(name, f"{value!r} is not allowed", f"one of {', '.join(row.choices)}")
            if row.check:
                row.check(value)
        if isinstance(self.step, str) and self.step != "auto":
            raise UsageError("step", f"{self.step!r} is not allowed", "a number of voxels, three, or auto")
        if self.uncertainty and (self.agree == OFF or (self.agree == AUTO and self.geometry == "segsrgan")):
            reason = "what the scan leaves open is told of a result that agrees with it"
            raise UsageError("uncertainty", reason, "--agree auto and --geometry physical, or --agree W")
        steps = per_axis("step", 1 if self.step is None or isinstance(self.step, str) else self.step)
        for patch, step in zip(per_axis("patch", self.patch), steps, strict=True):
            check_tile(patch, step)

    @classmethod
    def of(cls, given: Mapping[str, Any], files: bool = True) -> InferSettings:
        """From keywords. Raises TypeError for those that are none, as Python does."""
        known = options(files)
        for name in given:
            if name not in known:
                raise TypeError(f"unexpected keyword argument {name!r}")
        return cls(**given)

    def on(self, device: str) -> InferSettings:
        """The same for a device, "cpu" or "cuda:n", and with a step where none is given.

        That is the paper's 30 on CUDA, and in the original's geometry and within a budget, which ends where its time
        does. On a CPU, where it takes minutes and gains nothing that can be measured, it is half the patch
        (docs/inference.md). It is at most half the patch in any case.
        """
        if self.step is not None:
            return replace(self, device=device)
        sparse = device.startswith("cpu") and self.geometry == "physical" and self.budget is None
        edges = [128 if p is None else p for p in per_axis("patch", self.patch)]
        steps = tuple(edge // 2 if sparse else min(PAPER_STEP, edge // 2) for edge in edges)
        return replace(self, device=device, step=steps[0] if len(set(steps)) == 1 else steps)

    def record(self) -> dict[str, Any]:
        """The record of the options, by which another run tells whether it would do the same."""
        said = {}
        for name, row in options().items():
            value = getattr(self, name)
            if row.recorded == ALWAYS or (row.recorded == CHANGED and value != _DEFAULTS[name]):
                said[row.record_as or name] = value
        return said | {"mask": None if self.mask is None else str(self.mask)}

    def differing(self, record: Mapping[str, Any]) -> list[str]:
        """Which options that decide about a result another record, as ``record`` wrote it, has otherwise."""
        unsaid = {row.record_as or name: _DEFAULTS[name] for name, row in options().items() if row.recorded == CHANGED}
        idle = {row.record_as or name for name, row in options().items() if not row.decides}
        now, then = finite(self.record()), dict(record)
        return [
            key
            for key in {**now, **then, **unsaid}
            if key not in idle and now.get(key, unsaid.get(key)) != then.get(key, unsaid.get(key))
        ]

    def deciding(self) -> dict[str, Any]:
        """The options of a volume that decide about its voxels, but the mask."""
        rows = {name: row for name, row in options(files=False).items() if row.decides and name != "mask"}
        return {name: getattr(self, name) for name in rows}

    # --- what several options say together

    @property
    def physical(self) -> bool:
        """Whether every structure keeps its place, which the original's numbers do not."""
        return self.geometry == "physical"

    @property
    def in_levels(self) -> bool:
        """Whether ever denser tiles are tried, as ``anytime`` does."""
        return self.step == "auto" or self.budget is not None

    @property
    def grid_is_open(self) -> bool:
        """Whether the result's grid is left to the image and the weights."""
        return self.new_resolution is None

    @property
    def mask_file(self) -> Any:
        """The mask where it is a file, else None."""
        return None if self.mask is None or str(self.mask) == HEAD else self.mask

    @property
    def thickness_mm(self) -> float | None:
        """Of the slices, where it was asked for."""
        return None if isinstance(self.slice_thickness, str) else self.slice_thickness

    @property
    def thickness_from(self) -> str:
        """Who says how thick the slices are, "asked" or "spacing"; empty: the header may know."""
        if self.slice_thickness != AUTO:
            return "asked"
        return "" if self.physical and (self.agree != OFF or self.save_residual) else "spacing"

    @property
    def writes_prob(self) -> bool:
        """Whether the probability map is written: it is how far the segmentation may be trusted."""
        return self.save_prob or self.uncertainty

    def kinds(self, mask_classes: int) -> list[str]:
        """What is written of an image."""
        asked = {"mask": mask_classes > 0, "prob": self.writes_prob, "doubt": self.uncertainty}
        asked |= {"residual": self.save_residual, "png": self.png}
        return ["sr", "seg", *(kind for kind, wanted in asked.items() if wanted)]

    @property
    def of_agreement(self) -> list[str]:
        """The options that were chosen and say how a result is made to agree with its scan; none where it is not."""
        chosen = {"agree": self.agree != AUTO, "profile": self.profile != AUTO}
        return [] if self.agree == OFF else [name for name, said in chosen.items() if said]

    def sr_bytes(self, kind: str, size: int) -> int:
        """A voxel of the SR image on the disk; ``kind`` and ``size`` as NumPy has them of the input's type."""
        return size if self.dtype == "input" and kind in "iu" else 4

    def placed(self) -> InferSettings:
        """``on`` the device that is there. Raises ResourceError where the one that is asked for is not."""
        return self.on(str(pick_device(str(self.device))))

    def chosen_tiles(self, typed: InferSettings) -> str:
        """A line about the tiles where they were left open when the options were typed; else nothing."""
        if typed.step is not None or self.patch is None:
            return ""
        return f"tiles of {self.patch} voxels, {self.step} apart: --patch and --step choose others"

    def limited_to(self, host_bytes: int) -> InferSettings:
        """The same with a limit to the host's memory where none is asked for."""
        return self if self.max_memory is not None else replace(self, max_memory=host_bytes)

    def for_image(
        self, mask: Any, grid_mm: float | None, outside: str, slices: str = "", sides: str = ""
    ) -> tuple[InferSettings, list[str]]:
        """The same for one image, with its mask, and a line about whatever is left to the weights.

        grid_mm : the voxel size that they were made for, where the scan is much coarser
        outside : what they saw outside a mask
        slices : the plane of the scan's thick slices, where they know others alone, axial ones among them
        sides : the image's axis from left to right, where they are to see mirror images along it
        """
        own, told = {} if mask is None else {"mask": mask}, []
        if self.grid_is_open and grid_mm is not None and self.physical:
            own["new_resolution"] = grid_mm
            told.append(f"voxels of {grid_mm:g} mm, which the weights were made for (--new-resolution chooses others)")
        if mask is not None and self.outside == AUTO and outside == ZERO and self.physical:
            own["outside"] = ZERO
            told.append("zero outside the mask, as in what the weights were made for (--outside keep shows it all)")
        if slices and self.upright == AUTO and self.physical:
            own["upright"] = ON
            told.append(f"{slices} slices: segmented with the head upright, in a second pass (--upright off: one pass)")
        if sides and self.flips == AUTO and self.physical and not self.in_levels:
            own["flips"] = sides
            told.append("mean of both sides: as it is and with left and right exchanged (--flips none: half the time)")
        return replace(self, **own), told

    def least_component(self, island_mm3: tuple[float, float] | None) -> float:
        """Cubic millimetres of the smallest component that is kept; ``island_mm3`` : what the weights say of it."""
        if self.min_size is not None:
            return self.min_size
        return island_mm3[1] if island_mm3 and self.physical else 0.0

    def report(self) -> dict[str, Any]:
        """What ``InferResult.report`` says of the options."""
        return {name: getattr(self, name) for name, row in options().items() if row.reported}

    def changed(self, group: str) -> dict[str, Any]:
        """The options of a group that are not the default, as recorded."""
        rows = {name: row for name, row in options().items() if row.group == group}
        return {
            row.record_as or name: getattr(self, name)
            for name, row in rows.items()
            if getattr(self, name) != _DEFAULTS[name]
        }


_ROWS: dict[str, Option] = {f.name: f.metadata["option"] for f in fields(InferSettings)}
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(InferSettings)}


def options(files: bool = True) -> dict[str, Option]:
    """The rows by name, those of files too or of a volume alone."""
    return {name: row for name, row in _ROWS.items() if files or not row.of_files}


def takes_options(files: bool) -> Callable[[F], F]:
    """Decorator of a function that takes the options as keywords, ``**options``: its signature names them."""

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        keyword = inspect.Parameter.KEYWORD_ONLY
        named = [
            inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type)
            for f in fields(InferSettings)
            if f.name in options(files)
        ]
        first = [p for p in kept if p.kind is not keyword]
        last = [p for p in kept if p.kind is keyword]
        function.__signature__ = own.replace(parameters=[*first, *named, *last])  # type: ignore[attr-defined]
        return function

    return decorate


def basic_options(basic: bool) -> list[str]:
    """The names of the first group of options in ``fastsrgan infer --help``, or of the second."""
    return [name for name, row in _ROWS.items() if row.basic == basic]


def add_options(parser: argparse._ActionsContainer, *names: str) -> None:
    """The rows that are named as options of a command."""
    for name, row in ((name, _ROWS[name]) for name in names):
        flag = row.flag or f"--{name.replace('_', '-')}"
        if row.parse is None:
            parser.add_argument(flag, dest=name, action="store_true", help=row.help)
        else:
            words: dict[str, Any] = {"help": row.help, "metavar": row.metavar, "choices": tuple(row.choices) or None}
            default = _DEFAULTS[name] if row.typed is SAME else row.typed
            parser.add_argument(flag, dest=name, type=row.parse, nargs=row.nargs, default=default, **words)
        if row.instead:
            parser.add_argument(row.instead[0], dest=_switch(row.instead[0]), action="store_true", help=row.instead[2])


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of ``add_options``'s options, as keywords. Raises UsageError for two that contradict each other."""
    values = {}
    for name, row in _ROWS.items():
        value = getattr(args, name)
        values[name] = value[0] if row.nargs and value is not None and len(value) == 1 else value
        if row.instead and getattr(args, _switch(row.instead[0])):
            if value is not None:
                raise UsageError(f"--{name}", f"excludes {row.instead[0]}", "one of the two")
            values[name] = row.instead[1]
    return values


def _switch(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
