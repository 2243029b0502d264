"""Files in, files out: images through one model, with provenance, restart and a summary.

The next image is read and the one before written while the network works: one image ahead and one behind, where memory
allows (``memory.Beside``); the results are those of one after the other, to the byte. Several ranks take the images
from one counter, the largest first, so that none is idle while there are images left; an image that a rank took and did
not finish, because it died, is failed and not done.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastsrgan.core import system
from fastsrgan.core.files import finite, left_as_found, need_space, output_folder, remove_abandoned, write_json
from fastsrgan.core.places import recorded
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.ranks import ALONE, LostRank, Ranks
from fastsrgan.core.system import free_memory
from fastsrgan.errors import (
    FastsrganError,
    PartialFailure,
    ResourceError,
    UsageError,
    batch_code,
    counted,
    lasting,
    one_line,
)
from fastsrgan.evaluate.choice import ModelChoice
from fastsrgan.infer.image import (
    ImageJob,
    Isotropic,
    Loaded,
    bytes_while_writing,
    compute,
    load,
    names,
    write,
)
from fastsrgan.infer.memory import SHARE
from fastsrgan.infer.modes import Together
from fastsrgan.infer.planes import target_spacing
from fastsrgan.infer.settings import InferSettings, takes_options
from fastsrgan.io import dicom, formats
from fastsrgan.io import nifti as images
from fastsrgan.io.image_list import Image, find_images, size_of
from fastsrgan.io.nifti_voxels import no_such_file
from fastsrgan.volume.geometry import grid_size, spacing_of

log = logging.getLogger("fastsrgan")

# --- many images ----------------------------------------------------------------------------------------------------

Item = dict[str, Any]  # what the summary says of one image
TOLD = ("structures", "plausibility", "seconds", "warnings")  # of its record


class Deal:
    """Whose image is next: places in the list, each given to one rank.

    images : in the order of the list, the same on all ranks
    """

    def __init__(self, images: Sequence[Image], ranks: Ranks = ALONE) -> None:
        self.ranks, self.store, self.taken = ranks, ranks.store, 0
        self.order = list(range(len(images)))
        if self.store is not None:
            sizes = [size_of(image) for image in images]
            self.order.sort(key=lambda n: -sizes[n])

    def take(self, ahead: bool = False) -> int | None:
        """The next place; None at the end. Ahead of need (``ahead``) none of the last images is taken: one for each
        rank, they are left for those that are free first."""
        if self.store is None:
            self.taken += 1
            at = self.taken - 1
        else:
            with _reachable():
                if ahead and len(self.order) - self.store.add("taken", 0) < self.ranks.world:
                    return None
                at = self.store.add("taken", 1) - 1
        return self.order[at] if at < len(self.order) else None

    def tell(self, place: int, item: Item) -> int:
        """An image is done with; how many are."""
        if self.store is None:
            return 0
        with _reachable():
            self.store.set(f"image {place}", json.dumps(finite(item)))
            return self.store.add("ended", 1)

    def item(self, place: int) -> Item | None:
        """What was told of an image, by any rank."""
        assert self.store is not None
        key = f"image {place}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRank("ranks", "the process that deals the images is gone", "see --resume") from error


class Cohort:
    """The images of one call, one after the other, as this rank sees them.

    Attributes
    ----------
    items : place -> what the summary says; after ``run`` of all images on rank 0, elsewhere of those done here
    lost : whether a rank died
    """

    def __init__(self, job: ImageJob, images: Sequence[Image], ranks: Ranks = ALONE) -> None:
        self.job, self.images, self.ranks = job, images, ranks
        self.deal = Deal(images, ranks)
        self.items: dict[int, Item] = {}
        self.lost = False
        self.began, self.ended, self.worked = time.perf_counter(), 0, 0
        self.ahead: tuple[int, Future[Loaded | None] | None] | None = None
        self.behind: tuple[int, int, Future[tuple[dict[str, Any], float]]] | None = None

    def run(self) -> list[Item]:
        """All images; every failure ends in its image's item. Raises LostRank on other ranks than 0."""
        with ThreadPoolExecutor(1, "writer") as self.writer, ThreadPoolExecutor(1, "reader") as self.reader:
            while (place := self.ahead[0] if self.ahead else self.deal.take()) is not None:
                try:
                    loaded = self._read(place)
                    if loaded is None:
                        self._skipped(place)
                        continue
                    compute(loaded, self.job, self._label(place), beside=self._beside())
                except LostRank:
                    raise
                except Exception as error:
                    self._failed(place, error)
                    continue
                self.wait()
                size = bytes_while_writing(loaded, self.job)
                self.behind = place, size, self.writer.submit(_timed_write, loaded, self.job)
                del loaded  # the writer's alone, who drops it
            self.wait()
        return self._gathered()

    # --- one image ahead, one behind

    def _read(self, place: int) -> Loaded | None:
        ahead, self.ahead = self.ahead, None
        if ahead and ahead[1]:
            return ahead[1].result()
        if ahead:
            self.wait()  # there was no room for this image beside another: nor is there beside a result
        return load(self.images[place], self.job)

    def _beside(self) -> _Neighbours:
        """The result that is being written, and the image that would be read, while one is computed."""
        if self.behind and self.behind[2].done():
            self.wait()
        place = self.deal.take(ahead=True)
        self.ahead = None if place is None else (place, None)
        image = None if place is None else size_of(self.images[place])
        return _Neighbours(self, self.behind[1] if self.behind else 0, image)

    def read_ahead(self) -> None:
        """Begin to read the image that was taken ahead."""
        if self.ahead:
            place = self.ahead[0]
            self.ahead = place, self.reader.submit(load, self.images[place], self.job)

    def wait(self) -> None:
        """Until the result before is written; its errors are its image's."""
        if self.behind:
            (place, _, future), self.behind = self.behind, None
            try:
                record, at = future.result()
            except Exception as error:
                self._failed(place, error)
            else:
                self._ended(place, item_of(record, self.job.record(self.images[place])), at)

    # --- what becomes of an image

    def _item(self, place: int, status: str) -> Item:
        image = self.images[place]
        return {"input": str(image.path), "stem": image.name, "status": status}

    def _skipped(self, place: int) -> None:
        outputs = names(self.job.outputs(self.images[place]))
        self._note(place, self._item(place, "skipped") | {"outputs": outputs})

    def _failed(self, place: int, error: Exception) -> None:
        self._note(place, failure(self._item(place, "failed"), error))

    def _ended(self, place: int, facts: dict[str, Any], at: float) -> None:
        self.worked += 1
        self._note(place, self._item(place, "done") | facts, at)

    def _note(self, place: int, item: Item, at: float | None = None) -> None:
        self.items[place] = item
        self.ended = self.deal.tell(place, item) or self.ended + 1
        ranks = self.ranks.world
        tell_progress(self.items.values(), self.ended, len(self.images), self.worked, self.began, ranks, at)

    def _label(self, place: int) -> str:
        image = self.images[place]
        return f"{len(self.items) + (self.behind is not None) + 1}/{len(self.images)} {image.path.name}"

    def _gathered(self) -> list[Item]:
        """In the order of the list; images of ranks that died are failed."""
        try:
            self.ranks.barrier()
        except LostRank as error:
            if self.ranks.rank:
                raise
            log.error("%s", error)
            self.lost = True
        if self.ranks.world > 1 and not self.ranks.rank:
            for place in range(len(self.images)):
                lost = ResourceError(self.images[place].path, "its rank ended before it was done", "--resume does it")
                item = self.deal.item(place) or failure(self._item(place, "failed"), lost, tell=False)
                self.items.setdefault(place, item)
        return [self.items[place] for place in sorted(self.items)]


def _timed_write(loaded: Loaded, job: ImageJob) -> tuple[dict[str, Any], float]:
    """The record, and when it was complete: it is asked for when the next image is computed."""
    return write(loaded, job), time.perf_counter()


class _Neighbours:
    """``memory.Beside`` of a cohort."""

    def __init__(self, cohort: Cohort, result: int, image: int | None) -> None:
        self.cohort, self.result, self.image = cohort, result, image

    def settle(self, result: bool, image: bool) -> None:
        if self.result and not result:
            log.info("no room for a result that is being written beside this image: waiting for it")
            self.cohort.wait()
        if image:
            self.cohort.read_ahead()
        elif self.image is not None:
            log.info("no room for the next image beside this one: it is read afterwards")


def together(job: ImageJob, images: Sequence[Image], ranks: Ranks) -> list[Item]:
    """The images one after the other, each over all ranks (``modes``); rank 0 writes."""
    items: list[Item] = []
    began = time.perf_counter()
    for place, image in enumerate(images):
        item: Item = {"input": str(image.path), "stem": image.name, "status": "done"}
        shared = Together(ranks)
        try:
            loaded = load(image, job)
            if loaded is None:
                item |= {"status": "skipped", "outputs": names(job.outputs(image))}
            else:
                compute(loaded, job, f"{place + 1}/{len(images)} {image.path.name}", together=shared)
                if not ranks.rank:
                    record = write(loaded, job)
                    item |= item_of(record, job.record(image))
        except LostRank:
            raise
        except Exception as error:
            shared.failed(error)
            item = failure(item | {"status": "failed"}, error, tell=not ranks.rank)
        items.append(item)
        worked = sum(i["status"] == "done" for i in items)
        tell_progress(items, len(items), len(images), worked, began)
    return items


def failure(item: Item, error: Exception, tell: bool = True) -> Item:
    """The item of an image that failed, which is told in one line; what is not a user's fault keeps its traceback."""
    if isinstance(error, Isotropic):
        if tell:
            log.warning("%s", error)
        return item | {"status": "unneeded", "reason": str(error)}
    if tell:
        log.error("%s", error, exc_info=None if isinstance(error, FastsrganError) else error)
    code = error.exit_code if isinstance(error, FastsrganError) else FastsrganError.exit_code
    return item | {"error": str(error) or type(error).__name__, "exit_code": code}


def tell_progress(
    items: Any, ended: int, total: int, worked: int, began: float, world: int = 1, at: float | None = None
) -> None:
    """One line for a cohort: how many images, how long each took, how long it will be; nothing for one image.

    ``at`` : when the last of ``worked`` was complete, where that is not now; what was computed since is not left, and
    where that is more than was expected, of what is left nothing is said
    """
    if total == 1:
        return
    bad = sum(item["status"] == "failed" for item in items)
    text = f"{ended} of {total} images" + (f", {bad} failed" if bad else "")
    left = total - ended
    if worked and left:
        now = time.perf_counter()
        each = ((now if at is None else at) - began) / worked
        over = each * left / world - (0 if at is None else now - at)
        text += f", {lasting(each / world)} each" + (f", {lasting(over)} left" if over > 0 else "")
    elif not left:
        text += f" in {lasting(time.perf_counter() - began)}"
    log.info("%s", text)


# --- room on the disk -----------------------------------------------------------------------------------------------

PACKED = 0.125  # bytes that gzip leaves of a label; of measured numbers, as SR and probabilities are, nothing is saved


def need_room(listed: Sequence[Image], job: ImageJob) -> None:
    """Refuse to begin what the disk of the output folder cannot hold; raises ResourceError.

    Images that a resumed call will find finished are not counted.
    """
    todo = [image for image in listed if not (job.resume and job.record(image).exists())]
    need_space(job.out, sum(bytes_of(image, job) for image in todo))


def bytes_of(image: Image, job: ImageJob) -> int:
    """Of the results of one image, at most; 0 where only reading it tells what is wrong with it."""
    try:
        if dicom.is_dicom(image.path):
            return size_of(image) // 2  # of the voxels that are there, whatever is added between them
        file = formats.examine(image.path, images.MAX_VOXELS)
        own = spacing_of(file.affine)
        wanted = target_spacing(own, file.shape, job.settings)
    except (FastsrganError, OSError):
        return 0
    voxels = math.prod(grid_size(n, a, b) for n, a, b in zip(file.shape, own, wanted, strict=True))
    stored, outputs = np.dtype(file.dtype), job.outputs(image)
    each: dict[str, float] = {"sr": job.settings.sr_bytes(stored.kind, stored.itemsize)}
    each |= {"prob": 4, "doubt": 4, "seg": PACKED, "mask": PACKED}
    residual = 4 * math.prod(file.shape) if "residual" in outputs else 0  # on the scan's own grid
    return residual + int(voxels * sum(each.get(kind, 0) for kind in outputs))


# --- the call -------------------------------------------------------------------------------------------------------

SUMMARY = "infer_summary.json"
STATUSES = ("done", "skipped", "failed", "unneeded")  # of an item; unneeded: see ``image.Isotropic``
PathLike = str | os.PathLike


class SomeFailed(PartialFailure):
    """Volumes of a list failed; ``summary`` is what ``infer_files`` would have returned, its items have their codes."""

    def __init__(self, what: object, reason: str, hint: str, summary: dict[str, Any]) -> None:
        super().__init__(what, reason, hint)
        self.summary = summary
        codes = [item["exit_code"] for item in summary["items"] if item["status"] == "failed"]
        self.exit_code = batch_code(codes, summary["done"] + summary["skipped"])


@takes_options(files=True)
def infer_files(
    inputs: PathLike | Sequence[PathLike],
    out_dir: PathLike,
    weights: PathLike | Sequence[PathLike] | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    ranks: Ranks = ALONE,
    progress: Progress = QUIET,
    **options: Any,
) -> dict:
    """Super-resolve and segment images.

    For an image ``STEM.nii.gz`` the folder gets ``STEM_sr.nii.gz``, ``STEM_seg.nii.gz`` (uint8, 1 where the
    probability is above the threshold), with mask classes ``STEM_mask.nii.gz`` (uint8, the likeliest class), with
    ``save_prob`` ``STEM_prob.nii.gz`` (float32), with ``png`` ``STEM.png``, and last ``STEM.json``: the weights,
    settings and versions that made them. Images of a folder keep their subfolders. The next image is read and the one
    before written while one is computed, where memory allows.

    Parameters
    ----------
    inputs : one or several of NIfTI files, folders of them, DICOM folders or files, and .txt, .csv or .tsv lists; see
        ``image_list``
    weights : any weight file (``fastsrgan.load_generator``); several give the mean of their SR and of their
        probabilities; None and "auto" choose one of the package's models for each image, by the size of its head
        (``evaluate.plausibility.choose``)
    overwrite, resume : what to do with results that are there: replace them; or keep those that are complete and were
        made of the same image with the same weights and settings. Without either, they are refused before any work.
    ranks : of a torchrun job that this process is one of. Each image is done by one of them, the largest first, or by
        all of them where volumes are split. Every rank returns the same, rank 0 writes it.
    options : patch, step and all others that ``settings.InferSettings`` describes. What does not fit into memory
        is done by slabs into files beside the result, taken away at the end

    Returns
    -------
    {"out_dir", "weights", "done", "skipped", "failed", "unneeded", "items": [{"input", "stem", "status", "outputs",
    "structures", "plausibility", ...}]}; for more than one image also written to ``infer_summary.json``, there
    with outputs relative to its folder. Images that are isotropic already are unneeded: nothing is done with them
    unless ``new_resolution`` says what.

    Raises
    ------
    UsageError, ModelError, ResourceError : before any work. SomeFailed (with the summary), after every other volume is
    done, when a volume failed; its own error when there is only one.
    """
    settings = InferSettings.of(options)
    if settings.split_volume and ranks.world == 1:
        raise UsageError("--split-volume", "needs several processes", "torchrun --nproc-per-node N -m fastsrgan infer")
    listed = find_images(inputs, out_dir, settings.series)
    if settings.mask_file is not None and len(listed) > 1:
        raise UsageError("mask", f"one file for {len(listed)} images", "--crop-to-head, or one image at a time")
    if len(listed) == 1 and not os.path.lexists(listed[0].path):
        raise no_such_file(listed[0].path)  # of several each is said in its turn
    typed, settings = settings, settings.placed()
    if line := settings.chosen_tiles(typed):
        log.info("%s", line)
    with left_as_found([out_dir, *(Path(out_dir, image.name).parent for image in listed)]):
        out = output_folder(out_dir)
        models = ModelChoice(weights)
        if ranks.local_world > 1:
            settings = settings.limited_to(int(SHARE * free_memory() / ranks.local_world))
        job = ImageJob(out, models, settings, system.provenance(), progress, resume, overwrite or resume)
        _check_outputs(listed, job, overwrite or resume)
        if ranks.rank == 0:
            need_room(listed, job)
        ranks.agree("images", [image.name for image in listed])  # nobody writes before all have looked
        if ranks.world == len(listed) == 1:
            items, lost = [_alone(listed[0], job)], False
        elif settings.split_volume:
            items, lost = together(job, listed, ranks), False
        else:
            cohort = Cohort(job, listed, ranks)
            items, lost = cohort.run(), cohort.lost
        counts = Counter(item["status"] for item in items)
        summary: dict[str, Any] = {"out_dir": str(out), "weights": models.facts}
        summary |= {status: counts[status] for status in STATUSES} | {"items": items}
        if len(listed) > 1 and ranks.rank == 0:
            write_json(out / SUMMARY, portable(summary, out))
        # Behind the file, since torchrun ends all ranks as soon as one of them ends with a failure.
        summary = summary if lost else ranks.gather(summary)[0]
        if summary["failed"]:
            raise _some_failed(out, summary)
        return summary


def _some_failed(out: Path, summary: dict[str, Any]) -> SomeFailed:
    items = summary["items"]
    bad = ", ".join(one_line(item["stem"]) for item in items if item["status"] == "failed")
    hint = f"see {SUMMARY}" if len(items) > 1 else "see the error above"
    return SomeFailed(out, f"{summary['failed']} of {counted(len(items), 'volume')} failed: {bad}", hint, summary)


def _alone(image: Image, job: ImageJob) -> dict[str, Any]:
    """The only image: its errors are the call's."""
    item = {"input": str(image.path), "stem": image.name}
    try:
        loaded = load(image, job)
    except Isotropic as error:
        return failure(item, error, tell=False)  # the caller says it, once
    if loaded is None:
        return item | {"status": "skipped", "outputs": names(job.outputs(image))}
    record = write(compute(loaded, job, image.path.name), job)
    return item | {"status": "done"} | item_of(record, job.record(image))


def item_of(record: dict[str, Any], path: Path) -> Item:
    """What the item of an image has of its record at ``path``, with paths in the place of names."""
    outputs = {kind: str(path.with_name(name)) for kind, name in record["outputs"].items()}
    return {"outputs": outputs} | {key: record[key] for key in TOLD}


def portable(summary: dict[str, Any], out: Path) -> dict[str, Any]:
    """A summary as its file in ``out`` holds it: read from anywhere, paths mean the same."""
    items = [
        item
        | {"input": recorded(item["input"])}
        | ({"outputs": {k: os.path.relpath(v, out) for k, v in item["outputs"].items()}} if "outputs" in item else {})
        for item in summary["items"]
    ]
    return summary | {"out_dir": recorded(out), "items": items}


def _check_outputs(listed: Sequence[Image], job: ImageJob, replace: bool) -> None:
    """Before any work: folders are there, nothing that exists is written over unasked, and no input ever."""
    inputs = {os.path.realpath(image.path) for image in listed}
    inputs |= {os.path.realpath(mask) for mask in [job.settings.mask_file] if mask is not None}
    for folder in {job.record(image).parent for image in listed} - {job.out}:
        output_folder(folder)
    standing = []
    folders: dict[Path, list[str]] = {}
    for image in listed:
        for target in job.outputs(image).values():
            folders.setdefault(target.parent, []).append(target.name)
            if os.path.realpath(target) in inputs:
                raise UsageError(target, "is an input and would be overwritten", "choose another output folder")
            standing += [target] if os.path.exists(target) else []  # False for a name that is too long
    if standing and not replace:
        more = f" and {counted(len(standing) - 1, 'more file')}" if len(standing) > 1 else ""
        reason = "exists already and is kept"
        raise UsageError(f"{standing[0]}{more}", reason, "--overwrite, --resume or another folder")
    for folder, names_there in folders.items():
        remove_abandoned(folder, names_there)
