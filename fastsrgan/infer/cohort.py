"""Many images through one model: the next one is read and the one before written while the network works.

One image ahead and one behind, where memory allows (``memory_plan.Beside``); the results are those of one after the
other, to the byte. Several ranks take the images from one counter, the largest first, so that none is idle while there
are images left; an image that a rank took and did not finish, because it died, is failed and not done.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastsrgan.core.files import finite
from fastsrgan.core.ranks import ALONE, LostRank, Ranks
from fastsrgan.errors import FastsrganError, ResourceError
from fastsrgan.infer.image import Job, Loaded, bytes_while_writing, compute, load, names, write
from fastsrgan.infer.planes import Unfinished
from fastsrgan.infer.split import Together
from fastsrgan.io.image_list import Image, size_of

log = logging.getLogger("fastsrgan")

Item = dict[str, Any]  # what the summary says of one image


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

    def told(self, place: int) -> Item | None:
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

    def __init__(self, job: Job, images: Sequence[Image], ranks: Ranks = ALONE) -> None:
        self.job, self.images, self.ranks = job, images, ranks
        self.deal = Deal(images, ranks)
        self.items: dict[int, Item] = {}
        self.lost = False
        self.began, self.ended, self.worked = time.perf_counter(), 0, 0
        self.ahead: tuple[int, Future[Loaded | None] | None] | None = None
        self.behind: tuple[int, int, Future[dict[str, Any]]] | None = None

    def run(self) -> list[Item]:
        """All images; every failure ends in its image's item. Raises LostRank on other ranks than 0."""
        with contextlib.ExitStack() as stack:
            self.reader = stack.enter_context(ThreadPoolExecutor(1, "reader"))
            self.writer = stack.enter_context(ThreadPoolExecutor(1, "writer"))
            stack.callback(self._cancel)
            while (place := self._next()) is not None:
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
                self.behind = place, size, self.writer.submit(write, loaded, self.job)
                del loaded  # the writer's alone, who drops it
            self.wait()
        return self._gathered()

    # --- one image ahead, one behind

    def _next(self) -> int | None:
        return self.ahead[0] if self.ahead else self.deal.take()

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
        return _Neighbours(self, self.behind[1] if self.behind else 0, 0 if place is None else self._size(place))

    def _size(self, place: int) -> int:
        return max(1, size_of(self.images[place]))

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
                record = future.result()
            except Exception as error:
                self._failed(place, error)
            else:
                self._ended(place, {key: record[key] for key in ("outputs", "seconds", "warnings")})

    def _cancel(self) -> None:
        for pool in (self.reader, self.writer):
            pool.shutdown(wait=False, cancel_futures=True)

    # --- what becomes of an image

    def _item(self, place: int, status: str) -> Item:
        image = self.images[place]
        return {"input": str(image.path), "stem": image.name, "status": status}

    def _skipped(self, place: int) -> None:
        outputs = names(self.job.outputs(self.images[place]))
        self._note(place, self._item(place, "skipped") | {"outputs": outputs})

    def _failed(self, place: int, error: Exception) -> None:
        self._note(place, failure(self._item(place, "failed"), error))

    def _ended(self, place: int, facts: dict[str, Any]) -> None:
        self.worked += 1
        self._note(place, self._item(place, "done") | facts)

    def _note(self, place: int, item: Item) -> None:
        self.items[place] = item
        self.ended = self.deal.tell(place, item) or self.ended + 1
        tell_progress(self.items.values(), self.ended, len(self.images), self.worked, self.began, self.ranks.world)

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
                item = self.deal.told(place) or failure(self._item(place, "failed"), lost, tell=False)
                self.items.setdefault(place, item)
        return [self.items[place] for place in sorted(self.items)]


class _Neighbours:
    """``memory_plan.Beside`` of a cohort."""

    def __init__(self, cohort: Cohort, result: int, image: int) -> None:
        self.cohort, self.result, self.image = cohort, result, image

    def settle(self, result: bool, image: bool) -> None:
        if self.result and not result:
            log.info("no room for a result that is being written beside this image: waiting for it")
            self.cohort.wait()
        if image:
            self.cohort.read_ahead()
        elif self.image:
            log.info("no room for the next image beside this one: it is read afterwards")


def together(job: Job, images: Sequence[Image], ranks: Ranks) -> list[Item]:
    """The images one after the other, each over all ranks (``split``); rank 0 writes."""
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
                    item |= {key: record[key] for key in ("outputs", "seconds", "warnings")}
        except LostRank:
            raise
        except Exception as error:
            shared.failed(error)
            if not ranks.rank:
                shutil.rmtree(Unfinished.partial_of(job.planes(image)), ignore_errors=True)
            item = failure(item | {"status": "failed"}, error, tell=not ranks.rank)
        items.append(item)
        worked = sum(i["status"] == "done" for i in items)
        tell_progress(items, len(items), len(images), worked, began)
    return items


def failure(item: Item, error: Exception, tell: bool = True) -> Item:
    """The item of an image that failed, which is told in one line; what is not a user's fault keeps its traceback."""
    if tell:
        log.error("%s", error, exc_info=None if isinstance(error, FastsrganError) else error)
    code = error.exit_code if isinstance(error, FastsrganError) else FastsrganError.exit_code
    return item | {"error": str(error) or type(error).__name__, "exit_code": code}


def tell_progress(items: Any, ended: int, total: int, worked: int, began: float, world: int = 1) -> None:
    """One line for a cohort: how many images, how long each took, how long it will be; nothing for one image."""
    if total == 1:
        return
    bad = sum(item["status"] == "failed" for item in items)
    text = f"{ended} of {total} images" + (f", {bad} failed" if bad else "")
    left = total - ended
    if worked and left:
        each = (time.perf_counter() - began) / worked
        text += f", {lasting(each / world)} each, {lasting(each * left / world)} left"
    elif not left:
        text += f" in {lasting(time.perf_counter() - began)}"
    log.info("%s", text)


def lasting(seconds: float) -> str:
    """A time as people say it: 12 s, 4.5 min, 3.1 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
