"""``fastsrgan train``: from a store and settings to a run folder with weights (docs/training.md).

Sets up the networks, the feed and the ranks, checks that all ranks are about to do the same, and calls the loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastsrgan import config as settings
from fastsrgan._version import __version__
from fastsrgan.config import TrainConfig
from fastsrgan.core.files import FolderLock, atomic_write, left_as_found, need_space, output_folder, write_json
from fastsrgan.core.places import recorded
from fastsrgan.core.progress import QUIET, Progress
from fastsrgan.core.ranks import Ranks, from_environment, local_device
from fastsrgan.core.signals import StopRequest
from fastsrgan.core.system import memory_of, pick_device, provenance
from fastsrgan.data.feed import Feed, resident_limit
from fastsrgan.data.settings_check import data_warnings, odd_sizes, refuse_faults, structures
from fastsrgan.data.subject import PatchRule
from fastsrgan.data.visit import Visits
from fastsrgan.errors import InputError, ModelError, UsageError, alike, out_of_memory, some, some_of
from fastsrgan.io import output_place
from fastsrgan.model import checkpoint
from fastsrgan.model.cpu import forms
from fastsrgan.model.weights import BEST, info, read_spec, recorded_as
from fastsrgan.observation.artefacts import ARTEFACTS
from fastsrgan.observation.model import Degradation
from fastsrgan.observation.slice_axis import Axes, choose_axes, describe
from fastsrgan.observation.synthesis import Synthesis
from fastsrgan.pictures.planes import cut_panels
from fastsrgan.store.reader import Store, open_store
from fastsrgan.train import snapshots
from fastsrgan.train.gan import (
    Models,
    batch_of_rank,
    generator_spec,
    memory_error,
    refuse_hopeless,
    with_fitting_batch,
)
from fastsrgan.train.logs import DICE_TABLE, LOG, MSE_TABLE, Board, RunLog
from fastsrgan.train.loop import below_spline, best_so_far, loop
from fastsrgan.train.precision import goes_on_in
from fastsrgan.train.state import Run, data_identity, numbered

log = logging.getLogger("fastsrgan")

DATA_FACTS = "data.json"  # in the run folder: the store, and warnings about its subjects


def train(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    config: TrainConfig,
    *,
    device: str = "auto",
    start_weights: str | os.PathLike | None = None,
    resume: bool = False,
    strict: bool = False,
    snapshot_folder: str | os.PathLike | None = None,
    dice_file: str | os.PathLike | None = None,
    mse_file: str | os.PathLike | None = None,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Train a generator and critic on the Train subjects of a store; one of the ranks where torchrun started several.

    Parameters
    ----------
    source : store made by ``fastsrgan convert`` (folder or URL)
    folder : run folder; gets config.yaml, log.jsonl, dice.csv, mse.csv, checkpoints/, model.safetensors
    device : auto, cpu, cuda or cuda:n; each rank takes its own GPU of the machine
    start_weights : Keras HDF5, safetensors or run folder to start from
    resume : continue the run in ``folder`` from its newest undamaged snapshot, or from the beginning where it ended
        before the first; a restart by torchrun always does
    snapshot_folder : also write SegSRGAN_epoch_N in the original's HDF5 form
    dice_file, mse_file : where the per-epoch tables go (default: the run folder)

    Returns
    -------
    dict : epochs, updates, seconds, data_wait, best validation, path of the final weights, stopped (signal or None)

    Raises
    ------
    InputError : no Train subjects, no patches, labels of other values than 0 and 1;
    ModelError : weights or snapshot do not fit, ranks disagree;
    ResourceError : memory, disk, device, a lost rank, another training in ``folder``, or ``max_bad_steps`` updates in a
    row that were not finite;
    UsageError : a run is there already, a file that is no run's stands where one is to be written, or the batch is not
    divided by the ranks.
    """
    made = [folder, snapshot_folder, *(os.path.dirname(file) for file in (dice_file, mse_file) if file)]
    with contextlib.ExitStack() as held:
        held.enter_context(left_as_found(path for path in made if path))
        inputs = [source, *([start_weights] if start_weights and not resume else [])]
        check_places(folder, config, inputs, snapshot_folder, dice_file, mse_file, resume=resume)
        target = pick_device(local_device(device))
        ranks = held.enter_context(from_environment(target))
        agree_on_settings(ranks, config)
        folder = output_folder(folder)
        lock(folder, ranks, held)
        resume = known_run(ranks, folder) if not resume else has_snapshot(ranks, folder, config, start_weights)
        store = open_store(source)
        refuse_inside(folder, store)
        ranks.agree("training data", data_identity(store))
        kept = keep_arithmetic(held, folder, config, target, ranks, resume)
        with memory_of(target):
            run = prepare(store, folder, config, target, ranks, strict, resume, kept)
        if start_weights is not None and not resume:
            began_with = info(start_weights)
            run.start = {"path": recorded_as(start_weights), "sha256": began_with["sha256"]}
            run.start["file"] = recorded(began_with["file"])
            learned = [one["name"] for one in (began_with["card"] or {}).get("structures", [])]
            if learned and learned != (names := [name for name, _ in run.structures]) and run.first:
                told = "%s: its classes are %s, those of this run %s: the mask head learns others in their place"
                log.warning(told, start_weights, ", ".join(learned), ", ".join(names) or "of Mask_image")
        if run.first:
            run.log = RunLog(folder, dice_file, mse_file)
            run.snapshot_folder = output_folder(snapshot_folder) if snapshot_folder else None
            run.progress = progress
        with memory_of(target):
            begin(run, start_weights, resume)
        tell_of_data(run)
        began = time.perf_counter()
        # torchrun passes on the Ctrl-C that the terminal already sent: two of them in a moment are one.
        with StopRequest(again_after=5.0 if ranks.world > 1 else 0.0) as stop:
            attempt(run, stop)
        return summary(run, time.perf_counter() - began, stop)


def short_training(
    store: Path,
    run_folder: Path,
    start: Path,
    low_res_mm: tuple[float, float, float],
    device: str,
    progress: Progress,
    **changes: Any,
) -> dict[str, Any]:
    """A few dozen adversarial updates from the shipped weights: long enough to watch, too short to change much.

    The head moves at a hundredth of the paper's rate, since a fresh Adam's first steps at the full rate would shift the
    image by more than its whole error; the moving average is what is used. ``changes``: of ``TrainConfig``'s settings.
    """
    spec, _ = read_spec(start)
    config = TrainConfig(
        new_low_res=(low_res_mm,), contrast_max=0.2, noise=0.0, epochs=2, steps_per_epoch=12, batch_size=4,
        patch_size=48, kernel_gen=spec.kernel, scaled=spec.scaled, kernel_dis=8, lr_gen=2e-5, head_rate=0.01, ema=0.9,
    ).replace(**changes)  # fmt: skip
    return train(store, run_folder, config, device=device, start_weights=start, progress=progress)


def check_places(
    folder: str | os.PathLike,
    config: TrainConfig,
    inputs: Sequence[str | os.PathLike],
    snapshot_folder: str | os.PathLike | None,
    dice_file: str | os.PathLike | None,
    mse_file: str | os.PathLike | None,
    *,
    resume: bool,
) -> None:
    """Make sure, before any work, that what a run writes beside its folder takes the place of its own kind only.

    The folders are made. Raises UsageError and ResourceError, as ``output_place.check_place``, and UsageError for
    Keras files of a network that they cannot hold.
    """
    if snapshot_folder and generator_spec(config).scaled:
        raise UsageError("snapshot_folder", "its files cannot hold a scaled head", "--scaled False, or no -sf")
    if dice_file and mse_file and os.path.realpath(dice_file) == os.path.realpath(mse_file):
        raise UsageError("--mse-file", f"{mse_file} is the table of Dice too", "a file for each")
    for named, usual, kind in ((dice_file, DICE_TABLE, output_place.DICE), (mse_file, MSE_TABLE, output_place.MSE)):
        path = Path(named or Path(folder) / usual)
        output_folder(path.parent)
        if named or not resume:
            output_place.check_place(path, inputs, kind)
        else:  # the run's own: where it is damaged it is made anew
            output_place.keep_inputs(path, inputs)
    for name in (checkpoint.MODEL, BEST, "config.yaml", LOG):
        output_place.keep_inputs(Path(folder) / name, [] if resume else inputs)
    if snapshot_folder:
        for path in output_folder(snapshot_folder).iterdir():
            epoch = snapshots.epoch_of(path)
            if epoch in numbered(config):
                output_place.check_place(path, inputs, output_place.WEIGHTS)


def agree_on_settings(ranks: Ranks, config: TrainConfig) -> None:
    """ModelError where a rank has another version or setting; UsageError as ``batch_of_rank``."""
    ranks.agree("version", f"fastsrgan {__version__} on torch {torch.__version__}")
    for name, value in config.to_dict().items() if ranks.world > 1 else ():
        ranks.agree(f"config: {name}", value)
    batch_of_rank(config, ranks)


def lock(folder: Path, ranks: Ranks, held: contextlib.ExitStack) -> None:
    """Keep other trainings out of the run folder until ``held`` is closed: ResourceError where one is at work in it.

    What a job that was started again left there on another machine has ended.
    """
    if ranks.rank:
        return
    again = ranks.noted(str(folder.absolute())) or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    held.callback(FolderLock(folder, elsewhere=again).release)


def known_run(ranks: Ranks, folder: Path) -> bool:
    """Whether to resume unasked: torchrun restarted the ranks of the job that began the run in this folder.

    Raises UsageError for a run of another job.
    """
    if ranks.noted(str(folder.absolute())):
        return bool(checkpoint.snapshots(folder))
    refuse_run(folder)
    return False


def refuse_run(folder: str | os.PathLike) -> None:
    """Raise UsageError for a folder that holds a run."""
    if checkpoint.snapshots(Path(folder)):
        raise UsageError(folder, "already holds a run", "--resume continues it, or choose another folder")


def has_snapshot(ranks: Ranks, folder: Path, config: TrainConfig, start_weights: str | os.PathLike | None) -> bool:
    """Whether a run can be continued; False, with a warning, where it ended before its first snapshot.

    Raises ModelError where no run began in the folder, or where beginning again would replace weights.
    """
    if checkpoint.folders(folder):
        if start_weights and not ranks.rank:
            log.warning("%s: the run has a snapshot, -w %s is not used", folder, start_weights)
        return True
    told, hint = "no snapshot in this folder", "leave --resume out to begin a run"
    if (folder / checkpoint.MODEL).is_file():
        told = "no snapshot in this folder, only weights"
        hint += f", which replaces them, or start from them in another folder with -w {folder / checkpoint.MODEL}"
    elif (folder / "config.yaml").is_file() and (start_weights or not config.continues):
        if not ranks.rank:
            weights = f"the weights {start_weights}" if start_weights else "new weights"
            log.warning("%s: no snapshot yet, the run starts from the beginning with %s", folder, weights)
        return False
    raise ModelError(folder, told, hint)


def keep_arithmetic(
    held: contextlib.ExitStack, folder: Path, config: TrainConfig, device: torch.device, ranks: Ranks, resume: bool
) -> str | None:
    """Set the layer forms of the run until ``held`` is closed; a resumed run has those of its snapshot, and says so.

    Returns the snapshot's precision, or None. Settings other than "auto" win over the snapshot.
    """
    mode = forms.wanted_mode(config.layer_forms, "measured")
    name: str | None = None
    names: dict[str, str] = {}
    if ranks.world > 1 and device.type == "cpu":
        mode = "fixed"  # ranks would time each other, and not all would choose the same
    if resume:
        name, kept_mode, names = snapshots.kept_arithmetic(folder)
        if config.layer_forms == "auto":
            mode = kept_mode
        else:
            names = {}
        if not ranks.rank and name is not None:  # else what cannot be read is told when it is
            same = f", {len(names)} of them as in the snapshot" if names else ""
            log.info("going on in %s, layer forms %s%s", goes_on_in(config, name), mode, same)
    held.enter_context(forms.job(mode, names))
    return name


def refuse_inside(folder: Path, store: Store) -> None:
    """Raise UsageError for a run folder in the store, which would then hold what is none of its subjects."""
    here, stored = os.path.realpath(folder), os.path.realpath(store.url)
    if os.path.isdir(stored) and os.path.commonpath([here, stored]) == stored:
        raise UsageError(folder, "lies in the store that is trained on", "choose another output folder")


def prepare(
    store: Store,
    folder: Path,
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks,
    strict: bool,
    resume: bool,
    kept_precision: str | None = None,
) -> Run:
    """Networks and feed for the subjects of a store, before the first update."""
    names = {split: [s.id for s in store.subjects if s.split == split] for split in ("Train", "Test")}
    if not names["Train"]:
        raise InputError(store.url, "has no Train subjects", "give rows with Base = Train to `fastsrgan convert`")
    axes, law, rule, shown = slice_axes(store, config), degradation(config), PatchRule.of(config), visits(config)
    refuse_faults(store, law, rule, axes, shown.structure, config.fit_mask, shown.share)
    found = structures(store)
    if found and not config.fit_mask:
        named = [name for name, _ in found]
        log.warning("structures %s: %s alone is learned, --fit-mask True learns each", ", ".join(named), named[0])
    mask_classes = 0
    if config.fit_mask:
        mask_classes = len(found) + 1 if found else count_mask_classes(store, names["Train"])
    if config.auto_batch:
        begun = settings.from_yaml(checkpoint.newest(folder) / "config.yaml") if resume else None
        config = with_fitting_batch(config, mask_classes, device, ranks, begun)
    refuse_hopeless(config, mask_classes, device, ranks)
    c = config
    feed = Feed(
        store, law, rule, seed=c.seed, device=device, strict=strict, rank=ranks.rank, world=ranks.world,
        engine=c.feed, threads=c.feed_threads, prefetch=c.prefetch, precision=c.pool_precision, visits=shown, axes=axes,
    )  # fmt: skip
    models = Models(c, mask_classes, device, ranks, kept_precision)
    need_space(folder, snapshot_bytes(models) * 2)  # one that stands and one that is written
    learned = found if config.fit_mask else []
    return Run(folder, c, store, models, feed, names["Train"], names["Test"], mask_classes, learned, ranks=ranks)


def degradation(config: TrainConfig) -> Degradation:
    """How the images of a run are degraded."""
    c = config
    return Degradation(
        *(c.new_low_res, c.contrast_max, c.noise, c.geometry, c.interp, c.interpolation_type),
        rician=c.rician, profile=c.profile, gap=c.gap, profile_box=c.profile_box, noise_from=c.noise_from,
        artefacts=artefact_amounts(c), block_bytes=None if c.block_memory is None else int(c.block_memory * 1e9),
    )  # fmt: skip


def artefact_amounts(config: TrainConfig) -> dict[str, float]:
    """Amount of every artefact: of the setting of its name, where there is one, and of ``artefacts``."""
    own = {name: getattr(config, name) for name in ARTEFACTS if name in settings.SETTINGS}
    return own | settings.named_amounts(config.artefacts)


def visits(config: TrainConfig) -> Visits:
    """Which visits show made images, by the settings of a run."""
    shares = {name: getattr(config, f"synthetic_{name}") for name in ("free", "invert", "strip")}
    made = Synthesis(settings.tissue_gaussians(config.tissue_means), **shares)
    return Visits(config.synthetic, settings.label_values(config.structure), made)


def slice_axes(store: Store, config: TrainConfig) -> Axes | None:
    """World axes of the low resolution's numbers, told where subjects differ; None: the stored axes of each."""
    if not config.physical:
        return None
    axes, others = choose_axes({s.id: s.affine for s in store.subjects}, config.slice_axis)
    if others:
        stored = some_of(len(others), len(store.subjects), "subject", "is stored", "are stored")
        told = "the low resolution is %s; %s in another axis order and turned alike (%s)"
        log.warning(told, describe(axes, config.new_low_res), stored, some(others, 3))
    return axes


def tell_of_data(run: Run) -> dict[str, list[str]]:
    """Log what the conversion noted about the subjects, and write it beside the run for its report."""
    found = data_warnings(run.store.subjects)
    if run.first:
        for line in alike(found):
            log.warning("%s", line)
        feed = run.feed
        for text in odd_sizes(feed.store, feed.degradation, feed.rule, feed.axes):
            log.warning("%s", text)
        write_json(run.folder / DATA_FACTS, {"store": recorded(run.store.url), "warnings": found})
    return found


def snapshot_bytes(models: Models) -> int:
    """About what a snapshot takes: weights, two moments of each for the optimisers, the moving average."""
    parameters = [p for network in (models.generator, models.critic) for p in network.parameters()]
    copies = 4 if models.average is None else 5
    return copies * sum(4 * p.numel() for p in parameters)


def begin(run: Run, start_weights: str | os.PathLike | None, resume: bool) -> None:
    """Weights and position to start from, the same on all ranks; settings and tables of the run folder."""
    c, ranks = run.config, run.ranks
    run.position = run.beginning
    if resume:
        snapshots.load(run)
        run.resumed_at = run.position.updates
    elif start_weights is not None:
        run.models.start_from(start_weights)
    ranks.agree("weights", weights_identity(run))
    if run.position.resident is None:
        run.position.resident = c.resident_subjects or group_size(run)
    if run.log is not None:
        if not resume:
            run.log.cut(0, run.position.epoch)
        cut_panels(run.folder, run.position.epoch)
        with atomic_write(run.folder / "config.yaml") as temporary:
            temporary.write_text(run.config.to_yaml(), encoding="utf8")  # not `c`: resumed, it keeps what it began with
        run.board = Board(run.folder, run.position.updates + 1) if c.tensorboard else None
    ranks.note(str(run.folder.absolute()))


def weights_identity(run: Run) -> str:
    """A hash of every parameter of both networks."""
    digest = hashlib.sha256()
    for network in (run.models.generator, run.models.critic):
        for parameter in network.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def group_size(run: Run) -> int:
    """Subjects of a rank in memory at once: as many as its memory allows, on the rank that has the least."""
    c = run.config
    budget = None if c.resident_memory is None else int(c.resident_memory * 1e9)
    device, precision = run.models.device, c.pool_precision
    # The original's ratios may keep a volume whole (fastsrgan.data.subject), and then all of it has to fit.
    patch = run.feed.rule.patch if run.feed.degradation.geometry == "physical" else 0
    more: dict[str, Any] = {"device": device, "precision": precision, "prefetch": c.prefetch, "patch": patch}
    return run.ranks.minimum(resident_limit(run.store, run.train, budget, **more, visits=run.feed.visits))


def count_mask_classes(store: Store, subjects: list[str]) -> int:
    """Classes of the masks: one more than the largest value in them."""
    largest = 0
    for name in subjects:
        mask = store.read(name).mask
        if mask is None:
            raise InputError(name, "has no mask", "fit_mask needs Mask_image for every subject")
        largest = max(largest, int(mask.max()))
    return largest + 1


def attempt(run: Run, stop: StopRequest) -> None:
    """The loop; memory that runs out becomes an error with the measured peak and a batch that fits."""
    told = ""
    try:
        loop(run, stop)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        told = str(error)
    finally:
        if run.board is not None:
            run.board.close()
    # Outside the handler, whose traceback keeps the failed step's activations alive.
    if told:
        raise memory_error(run.models, told)


def summary(run: Run, seconds: float, stop: StopRequest) -> dict[str, Any]:
    """What the run did, for the caller and for RUN/summary.json; the seconds are those since it was resumed."""
    at = run.position
    left_out = {k: v for one in run.ranks.gather(run.feed.quarantined) for k, v in one.items()}
    waited = run.ranks.mean({"waited": run.feed.waited})["waited"]
    validations = run.log.validations() if run.log is not None else []
    warnings = [f"epoch {row['epoch']}: {row['warning']}" for row in validations if "warning" in row]
    # A run that was stopped may still get there.
    if not stop.signal and (worthless := below_spline(validations, at.best_epoch)):
        log.warning("%s", worthless)
        warnings.append(worthless)
    facts = {
        "epochs": min(at.epoch, run.last_epoch + 1) - run.beginning.epoch,
        "updates": at.updates,
        "resumed_at": run.resumed_at,
        "seconds": round(seconds, 3),
        "data_wait_seconds": round(waited, 3),
        "first_wait_seconds": round(run.feed.first_wait, 3),
        **best_so_far(run),
        "ended_early": run.ended_early,
        snapshots.START: run.start,
        "weights": str(run.folder / checkpoint.MODEL) if (run.folder / checkpoint.MODEL).exists() else None,
        "best_weights": None if at.best is None else str(run.folder / BEST),
        "left_out": left_out,
        "data_warnings": data_warnings(run.store.subjects),
        "warnings": warnings,
        "batch_size": run.batch * run.ranks.world,
        "ranks": run.ranks.world,
        "device": str(run.models.device),
        "stopped": stop.signal,
        "exit_code": stop.code,
        "provenance": provenance(),
    }
    if run.first:
        # Files of the folder by their names, which hold wherever it goes and is read from.
        named = {k: Path(v).name for k in ("weights", "best_weights") if (v := facts[k])}
        write_json(run.folder / "summary.json", facts | named)
    return facts
