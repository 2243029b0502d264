"""Snapshots of a training run: everything it needs to go on, and how it goes on (docs/training.md).

Written by rank 0, read by all. The order of patches and every random number follow from the position, so a snapshot
holds networks, moving average, both optimisers and the position, and nothing else moves.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from fastsrgan import config as settings
from fastsrgan.core.files import mapping
from fastsrgan.core.system import provenance
from fastsrgan.data.feed import Feed
from fastsrgan.errors import ModelError, ResourceError, counted
from fastsrgan.model import checkpoint, weights
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model.arithmetic import TYPES
from fastsrgan.model.cpu import forms
from fastsrgan.model.networks import CriticSpec, GeneratorSpec, assemble, describe, parameter_shapes
from fastsrgan.model.purpose import MADE_FOR, SIDES, Purpose
from fastsrgan.observation.slice_axis import on_stored_axes
from fastsrgan.train.gan import differences
from fastsrgan.train.state import Position, Run, data_identity, epoch_part, remaining
from fastsrgan.volume.geometry import PLANES, plane_across

log = logging.getLogger("fastsrgan")

KERAS = "SegSRGAN_epoch_"
START = "start_weights"  # of a card and a summary
ROOM = 1.5  # factor by which the structure of a scan may be smaller or larger than those of the training


def save(run: Run) -> None:
    """A snapshot of everything that the run needs to go on."""
    if not run.first:
        return
    m, at = run.models, run.position
    # A single update of far too large a rate: it was finite itself, what it left is not, nor will be what follows.
    if not all(bool(p.isfinite().all()) for network in (m.generator, m.critic) for p in network.parameters()):
        reason = f"after {counted(at.updates, 'update')} the weights are not finite, so no snapshot is written"
        hint = "lower the learning rates; --resume goes on from the snapshot before, where there is one"
        raise ResourceError(run.folder, reason, hint)
    state = {"models": m.state(), "position": dict(vars(at)), "data": data_identity(run.store)}
    writers = {
        checkpoint.MODEL: lambda p: modelfile.write(
            p, m.generator, m.critic, ema=m.average, card={"updates": at.updates, **said_of(run)}
        ),
        "state.pt": lambda p: p.write_bytes(packed(state)),
        "config.yaml": lambda p: p.write_text(run.config.to_yaml(), encoding="utf8"),
    }
    arithmetic = {"precision": m.arithmetic.name, "layer_forms": forms.current().record()}
    facts = {"epoch": at.epoch, "ranks": run.ranks.world, "arithmetic": arithmetic}
    checkpoint.write(run.folder, at.updates, writers, facts)
    checkpoint.prune(run.folder, run.config.keep_checkpoints)


def kept_arithmetic(folder: Path) -> tuple[str | None, str, dict[str, str]]:
    """How the run in a folder computed up to its newest undamaged snapshot, and in which it therefore goes on.

    Returns the precision, the mode of the layer forms ("measured" or "fixed") and the form of each layer that had a
    choice. Snapshots of versions that did not record them: None, "fixed", none.
    """
    whole = (s for s in reversed(checkpoint.folders(folder)) if not checkpoint.verify(s))
    snapshot = next(whole, None)  # where there is none, ``load`` says so
    recorded = mapping(checkpoint.manifest(snapshot).get("arithmetic")) if snapshot else {}
    name, choices = recorded.get("precision"), mapping(recorded.get("layer_forms"))
    mode = choices.get("mode")
    names = {layer: form for layer, form in mapping(choices.get("forms")).items() if isinstance(form, str)}
    if not isinstance(name, str) or not isinstance(mode, str) or name not in TYPES or mode not in forms.MODES:
        return None, "fixed", {}
    return name, mode, names


def packed(state: dict[str, Any]) -> memoryview:
    """The bytes of torch.save, which itself ends a full disk in an error that does not say so."""
    held = io.BytesIO()
    torch.save(state, held)
    return held.getbuffer()


def load(run: Run) -> None:
    """Continue from the newest undamaged snapshot of the run folder.

    Raises ModelError where there is none, or where it does not fit the settings.
    """
    snapshot = checkpoint.newest(run.folder)
    run.ranks.agree("snapshot", snapshot.name)
    load_networks(run, snapshot)
    state = read_state(snapshot, run.models.device)
    run.models.load_state(state["models"])
    known = {f.name for f in fields(Position)}
    position = Position(**{k: v for k, v in state["position"].items() if k in known})
    run.position = placed(run, position, snapshot, state["data"])
    if not run.position.updates:  # what gave no patch then may give some now
        run.position = run.beginning
    if run.log is not None:
        run.log.cut(run.position.updates, run.position.epoch)
        if run.changed:
            run.log.changed(run.position.epoch, run.position.updates, run.changed)
        before = [row["validation"] for row in run.log.validations() if "PSNR" in row["validation"]]
        run.scores = before[-1] if before and None not in before[-1].values() else {}
        log.info("continuing %s at epoch %d, update %d", snapshot, run.position.epoch, run.position.updates)


def read_state(snapshot: Path, device: torch.device | str) -> dict[str, Any]:
    """What a snapshot holds beside the networks: "models", "position" and "data", as `save` writes them.

    Tensors and plain values only: no object is built and no code of the file is run. Raises ModelError for others.
    """
    path, hint = snapshot / "state.pt", "start anew from its weights, -w"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # pickle, zip and torch each refuse in their own ways
        raise ModelError(path, "is damaged or holds more than tensors and plain values", hint) from error
    if not isinstance(state, dict) or not state.keys() >= {"models", "position", "data"}:
        raise ModelError(path, "was written by another version", hint)
    return state


def load_networks(run: Run, snapshot: Path) -> None:
    """Generator, critic and moving average of a snapshot. Raises ModelError where the settings ask for others."""
    m, file = run.models, snapshot / checkpoint.MODEL
    run.start = mapping(modelfile.read_header(file).card.get(START)) or None
    spec, parameters = modelfile.read_parameters(file, "generator")
    assert isinstance(spec, GeneratorSpec)
    if spec != m.generator.spec:
        raise ModelError(snapshot, *differences(spec, m.generator.spec))
    m.generator = assemble(spec, parameters, m.generator.form).requires_grad_(True)
    critic_spec, parameters = modelfile.read_parameters(file, "critic")
    assert isinstance(critic_spec, CriticSpec)
    check_critic(snapshot, critic_spec, m.critic.spec)
    m.critic = assemble(m.critic.spec, parameters).requires_grad_(True)
    m.finish()
    if m.average is not None and modelfile.read_header(file).ema:  # else it begins here, at the generator
        _, average = modelfile.read_parameters(file, "ema")
        m.average = {k: v.to(m.device) for k, v in average.items()}


def check_critic(snapshot: Path, held: CriticSpec, wanted: CriticSpec) -> None:
    """ModelError where a snapshot's critic is not the one that is asked for; patches of another size may share one."""
    if parameter_shapes(held) == parameter_shapes(wanted):
        return
    told = f"the critic in it is {describe(held)}, the settings ask for {describe(wanted)}"
    same = f"--patch-size {held.patch} --kernel-dis {held.kernel}"
    anew = f"-w {snapshot.parent.parent}"
    raise ModelError(snapshot, told, f"resume with {same}, or start anew in another folder with {anew}")


def changes(then: settings.TrainConfig, now: settings.TrainConfig) -> dict[str, str]:
    """Settings that differ between a snapshot and the run that goes on from it -> what is done with them (RESUMED)."""
    rows = settings.SETTINGS.items()
    found = {name: row.resume for name, row in rows if getattr(then, name) != getattr(now, name)}
    if "epochs" in found and now.lr_schedule != "constant":  # the rate follows the share of the run that is done
        found["epochs"] = settings.NEW
    return found


def placed(run: Run, at: Position, snapshot: Path, data: str) -> Position:
    """Where the run goes on from a snapshot's position; what differs from an unbroken run is said.

    The same settings, data and number of ranks: at the very step. Another number of ranks: the subjects of the epoch
    that are not done are dealt anew, and a group that was begun comes again. Settings or data that decide which patch
    comes when: the epoch begins anew.
    """
    then, now = settings.from_yaml(snapshot / "config.yaml"), run.config
    changed = changes(then, now)
    kept = {k for k, resume in changed.items() if resume == settings.KEPT and getattr(now, k) == "auto"}
    taken = [k for k, resume in changed.items() if resume in settings.TAKEN and k not in kept]
    if taken:
        told = ", ".join(f"{k} {getattr(then, k)} -> {getattr(now, k)}" for k in taken)
        log.warning("settings differ from the snapshot's, the run goes on with the new ones: %s", told)
    before, after = then.to_dict(), now.to_dict()
    run.changed = {k: [before[k], after[k]] for k in taken}
    unused = [k for k, resume in changed.items() if resume == settings.START]
    if unused:
        log.warning("settings that act only where a run begins, and not in this one: %s", ", ".join(unused))
        run.config = now.replace(**{k: getattr(then, k) for k in unused})  # the record tells what was
    if settings.JUDGED in changed.values():
        at.best, at.best_epoch, at.best_dice, at.stale = None, None, None, 0
    moved = [k for k, resume in changed.items() if resume == settings.ANEW]
    moved += ["data"] if data != data_identity(run.store) else []
    if at.epoch > run.last_epoch:  # nothing is left to do
        return at
    if moved:
        log.warning("another %s: epoch %d begins anew", ", ".join(moved), at.epoch)
        at.left, at.before, at.group, at.step, at.steps, at.epoch_updates = None, 0.0, 0, 0, 0, 0
        at.resident, at.world = None, run.ranks.world
    elif at.world != run.ranks.world:
        told = "the run had %s and has %d now: what is left of epoch %d is dealt anew"
        log.warning(told, counted(at.world, "rank"), run.ranks.world, at.epoch)
        redeal(run, at)
    return at


def redeal(run: Run, at: Position) -> None:
    """Deal what is left of the epoch to the ranks there are now.

    Subjects that are too few for one per rank wait for the next epoch. The schedule goes on from where it was.
    """
    at.left, at.before = remaining(run, at), epoch_part(run, at)
    if len(at.left) < run.ranks.world:
        ranks = f"left for {counted(run.ranks.world, 'rank')}"
        log.warning("%s for the next epoch", counted(len(at.left), f"subject {ranks} waits", f"subjects {ranks} wait"))
        at.left = []
    # Updates of a group that comes again still count against steps_per_epoch.
    at.epoch_updates += at.step
    at.group = at.step = at.steps = 0
    at.resident, at.world = None, run.ranks.world


def write_weights(run: Run, path: Path, facts: dict[str, Any]) -> None:
    """The weights for use, with the facts a reader of the file wants."""
    if run.first:
        card = {**facts, **said_of(run), "updates": run.position.updates, "config": run.config.to_dict()}
        card |= provenance()
        weights.save_generator(path, run.models.shipped(), run.models.critic, card=card)


def made_for(feed: Feed, flips: str = "") -> Purpose:
    """What a training knows of it: label values, voxel sizes, slice ratios and planes, volumes of the structure with
    room."""
    subjects = [subject for subject in feed.store.subjects if subject.split == "Train"]
    values = feed.visits.structure
    chosen = [list(values)] if values else [s.attrs["label_classes"] for s in subjects if "label_classes" in s.attrs]
    same = chosen and all(one == chosen[0] for one in chosen)
    name = f"label {', '.join(map(str, chosen[0]))}" if same else "structure of the training's labels"
    called = {"" if values else s.attrs.get("label_name", "") for s in subjects}
    name = (called.pop() if len(called) == 1 else "") or name
    volumes = []
    for subject in subjects:
        kind, wanted = ("label_counts", (1,)) if "label_counts" in subject.attrs else ("tissues_counts", values)
        voxels = sum(subject.attrs.get(kind, {}).get(str(value), 0) for value in wanted)
        volumes += [voxels * math.prod(subject.spacing) / 1000] * bool(voxels)
    finest = [min(sizes) for sizes in feed.degradation.low_res]
    ratios = [float(f"{max(sizes) / min(sizes):.4g}") for sizes in feed.degradation.low_res]
    planes = {
        plane_across(s.affine, sizes if feed.axes is None else on_stored_axes(sizes, feed.axes, s.affine))
        for s, sizes in itertools.product(subjects, feed.degradation.low_res)
    }
    physical = feed.degradation.geometry == "physical"
    return Purpose(
        structures=((1, name),),
        slices=tuple(plane for plane in PLANES.values() if plane in planes and physical),
        voxel_mm=(min(finest), max(finest)),
        # Patches lie as slices do: of axial ones alone the first axis goes from left to right.
        mirrored=SIDES if "x" in flips and planes == {PLANES["S"]} and physical else "",
        slice_ratio=(min(ratios), max(ratios)),
        structure_ml=(min(volumes) / ROOM, max(volumes) * ROOM) if volumes else None,
    )


def said_of(run: Run) -> dict[str, Any]:
    """What weights say of what they were made for, of the weights that the run began with, and of the classes of their
    mask head."""
    classes = {"structures": [{"name": n, "values": v} for n, v in run.structures]} if run.structures else {}
    began = {START: run.start} if run.start else {}
    return {**classes, **began, MADE_FOR: made_for(run.feed, run.config.flips).to_dict()}


def export(run: Run, epoch: int) -> None:
    """The original's snapshot file, when a folder for it was named."""
    if run.snapshot_folder and run.first:
        target = run.snapshot_folder / f"{KERAS}{epoch}"
        weights.export_keras(run.folder / "model.safetensors", target, overwrite=True)


def epoch_of(path: Path) -> int | None:
    """The epoch whose file of the original's form (``export``) is called like this; None for other names."""
    number = path.name.removeprefix(KERAS)
    return int(number) if re.fullmatch("[1-9][0-9]{0,8}", number) and path.name != number else None
