"""What the fuzzers read: each target makes a good file, damages it, and hands it to the readers of a user's file.

A case may end in success or in a FastsrganError of one line, within bounded time and memory. ``tools/fuzz.py`` runs
them for as long as asked, ``test_faults_fuzz.py`` for some seconds, and what was found once is kept there as a test.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import dicom_files
import fuzz_mutate as mutate
import nifti_files
import numpy as np
import torch
from cohort import SMALL

from fastsrgan import config
from fastsrgan.core.files import write_json
from fastsrgan.errors import FastsrganError
from fastsrgan.evaluate import cohort as evaluate_cohort
from fastsrgan.evaluate.pair import evaluate_files
from fastsrgan.infer.bids import evaluate_bids, infer_bids
from fastsrgan.infer.files import infer_files
from fastsrgan.io import any_image
from fastsrgan.io import nifti as images
from fastsrgan.io import tables as table
from fastsrgan.io.bids import check_derivatives
from fastsrgan.io.image_list import find_images
from fastsrgan.model import checkpoint, weights
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model.networks import Critic, CriticSpec, GeneratorSpec, build_generator
from fastsrgan.report import viewer as stage
from fastsrgan.report.page import report
from fastsrgan.store import files as store_files
from fastsrgan.store.reader import open_store
from fastsrgan.store.remote import fingerprint
from fastsrgan.store.writer import create_store
from fastsrgan.study import curves as study_curves
from fastsrgan.train import logs as trainlog
from fastsrgan.train import snapshots

GOLDEN = Path(__file__).parent / "golden"
Case = Callable[[], object]


@dataclass(frozen=True)
class Target:
    """``prepare(folder)`` makes what is good, once; ``damage(folder, chance)`` writes one case and returns its path;
    ``read(path)`` is every reader that may meet it."""

    prepare: Callable[[Path], None]
    damage: Callable[[Path, random.Random], Path]
    read: Callable[[Path], None]


def tried(*calls: Case) -> None:
    """Call all of them: each may succeed or end in a FastsrganError of one line with a documented code."""
    for call in calls:
        try:
            call()
        except FastsrganError as error:
            if "\n" in str(error) or len(str(error)) > 40_000 or error.exit_code not in (2, 3, 4, 5, 6):
                raise AssertionError(f"an error nobody can read: {str(error)[:300]!r}") from error


def finite(volume: Any) -> None:
    """Voxels and affine of what was read are numbers."""
    if not (np.isfinite(volume.data).all() and np.isfinite(volume.affine).all()):
        raise AssertionError("voxels or affine that are not finite")


# --- images -------------------------------------------------------------------------------------------------------


def nifti_prepare(folder: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"version": 2}, {"order": ">"}, {"slope": 0.5, "inter": -3.0}, {"version": 2}]
    for i, options in enumerate(variants):
        (folder / f"seed{i}").write_bytes(nifti_files.file_bytes(**options))
    (folder / "seed5").write_bytes(nifti_files.file_bytes(np.ones((4, 3, 2, 2), np.float32)))


def nifti_damage(folder: Path, chance: random.Random) -> Path:
    seeds = [p.read_bytes() for p in sorted(folder.glob("seed*"))]
    raw, packing = mutate.bytes_of(chance.choice(seeds), chance, seeds), chance.randrange(4)
    path = folder / ("case.nii" if packing == 0 else "case.nii.gz")
    if packing > 1:
        raw = gzip.compress(raw, 1, mtime=0)
    if packing == 3:
        raw = mutate.bytes_of(raw, chance, [raw])
    path.write_bytes(raw)
    return path


def nifti_read(path: Path) -> None:
    like = images.Volume(np.zeros(nifti_files.HEAD.shape, np.float32), nifti_files.rigid())
    tried(
        lambda: finite(images.load(path)),
        lambda: finite(images.load(path, volume=1)),
        lambda: images.load_stored(path),
        lambda: images.load_label(path, like),
    )


def dicom_prepare(folder: Path) -> None:
    data, affine = dicom_files.volume((5, 4, 3)), dicom_files.scanner_affine()
    dicom_files.write_series(folder / "seed", data, affine)
    dicom_files.write_enhanced(folder / "enhanced.dcm", data, affine)


def dicom_damage(folder: Path, chance: random.Random) -> Path:
    shutil.rmtree(folder / "case", ignore_errors=True)
    files = sorted(p for p in (folder / "seed").rglob("*") if p.is_file())
    seeds = [p.read_bytes() for p in files]
    (folder / "case").mkdir()
    if chance.random() < 0.3:
        data = (folder / "enhanced.dcm").read_bytes()
        (folder / "case" / "0.dcm").write_bytes(mutate.bytes_of(data, chance, seeds))
        return folder / "case"
    hit = chance.randrange(len(seeds))
    for i, data in enumerate(seeds):
        if i == hit or chance.random() < 0.2:
            data = mutate.bytes_of(data, chance, seeds)
        (folder / "case" / f"{i}.dcm").write_bytes(data)
    return folder / "case"


# --- weights ------------------------------------------------------------------------------------------------------


def weights_read(path: Path) -> None:
    """Every reader of a weight file or run folder; what is loaded has finite weights."""

    def loaded(*read: Any) -> None:
        _, parameters = read
        if not all(bool(torch.isfinite(p).all()) for p in parameters.values()):
            raise AssertionError("weights that are not finite")

    def critic() -> None:
        source = weights._resolve(path)
        loaded(*weights._reader(source).read_parameters(source.file, "critic"))

    tried(  # what load_generator and load_critic do before they fill a network, which costs more than all the rest
        lambda: loaded(*weights._generator_parameters(weights._resolve(path), True)),
        critic,
        lambda: weights.info(path),
    )


def native_prepare(folder: Path) -> None:
    generator, critic = build_generator(GeneratorSpec(kernel=1)), Critic(CriticSpec(kernel=1, patch=16))
    average = build_generator(GeneratorSpec(kernel=1), seed=1)
    modelfile.write(folder / "seed.safetensors", generator, critic, ema=average, card={"a": [1, 2]})


def native_damage(folder: Path, chance: random.Random) -> Path:
    data = (folder / "seed.safetensors").read_bytes()
    path = folder / "case.safetensors"
    if chance.random() < 0.5:
        path.write_bytes(mutate.bytes_of(data, chance, [data]))
        return path
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if chance.random() < 0.5:
        ours = json.loads(header["__metadata__"]["fastsrgan"])
        header["__metadata__"]["fastsrgan"] = json.dumps(mutate.value_of(ours, chance))
    else:
        header = mutate.value_of(header, chance)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path


def keras_prepare(folder: Path) -> None:
    shutil.copyfile(GOLDEN / "weights_residual_mask3.h5", folder / "seed.h5")


def keras_damage(folder: Path, chance: random.Random) -> Path:
    data = (folder / "seed.h5").read_bytes()
    (folder / "case.h5").write_bytes(mutate.bytes_of(data, chance, [data]))
    return folder / "case.h5"


def run_prepare(folder: Path) -> None:
    native_prepare(folder)
    state = {"models": {"critic_steps": 3, "m": torch.ones(3)}, "position": {"epoch": 1}, "data": "0"}
    writers = {
        checkpoint.MODEL: lambda p: shutil.copyfile(folder / "seed.safetensors", p),
        "state.pt": lambda p: torch.save(state, p),
        "config.yaml": lambda p: p.write_text(SMALL.to_yaml(), encoding="utf8"),
    }
    checkpoint.write(folder / "seed", 7, writers, {"epoch": 1, "ranks": 1})


def run_damage(folder: Path, chance: random.Random) -> Path:
    """A run folder whose manifest, or state under a manifest that fits, was changed."""
    run = folder / "case"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "seed", run)
    snapshot = run / checkpoint.FOLDER / "step-00000007"
    listed = json.loads((snapshot / checkpoint.MANIFEST).read_text(encoding="utf8"))
    if chance.random() < 0.5:
        state = (snapshot / "state.pt").read_bytes()
        (snapshot / "state.pt").write_bytes(mutate.bytes_of(state, chance, [state]))
        size, digest = (snapshot / "state.pt").stat().st_size, checkpoint.sha256(snapshot / "state.pt")
        listed["files"]["state.pt"] = {"bytes": size, "sha256": digest}
    else:
        listed = mutate.value_of(listed, chance)
    (snapshot / checkpoint.MANIFEST).write_text(json.dumps(listed), encoding="utf8")
    return run


def run_read(run: Path) -> None:
    weights_read(run)
    snapshot = run / checkpoint.FOLDER / "step-00000007"
    tried(
        lambda: checkpoint.newest(run),
        lambda: checkpoint.verify(snapshot),
        lambda: snapshots.read_state(snapshot, "cpu"),
    )


# --- stores, tables, settings -------------------------------------------------------------------------------------


def store_prepare(folder: Path) -> None:
    image = (np.arange(7 * 6 * 5).reshape(7, 6, 5) % 200).astype(np.int16)
    label = (image > 90).astype(np.uint8)
    with create_store(folder / "seed") as writer:
        for name in ("a", "b"):
            writer.write(name, "Train", image, 1.0, 0.0, label, None, np.eye(4), {"bounding_box": [[0, 7]] * 3})
        writer.finish()


def store_damage(folder: Path, chance: random.Random) -> Path:
    """The manifest changed under a digest that fits; or a file below it, with a manifest that lists it as it is."""
    case = folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(folder / "seed", case)
    path = case / store_files.MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest.pop("digest")
    kind = chance.randrange(4)
    if kind == 0:
        manifest = mutate.value_of(manifest, chance)
    elif kind == 1:
        array = case / "a" / chance.choice(("image", "label")) / "zarr.json"
        array.write_text(json.dumps(mutate.value_of(json.loads(array.read_bytes()), chance)), encoding="utf8")
    elif kind == 2:
        shard = case / "a" / "image" / "c/0/0/0"
        shard.write_bytes(mutate.bytes_of(shard.read_bytes(), chance, [shard.read_bytes()]))
    if kind in (1, 2) and chance.random() < 0.8:
        files = manifest["subjects"]["a"]["files"]
        files |= {key: fingerprint((case / "a" / key).read_bytes()) for key in files}
    text = path.read_bytes()
    if kind == 3:
        text = mutate.bytes_of(text, chance, [text])
    elif isinstance(manifest, dict):
        try:
            manifest["digest"] = store_files._digest(manifest)
        except ValueError:  # NaN, which no digest is made of
            manifest["digest"] = "0"
        text = json.dumps(manifest).encode()
    path.write_bytes(text)
    return case


def store_read(path: Path) -> None:
    def everything(reader: str) -> None:
        store = open_store(path, reader)
        for subject in store.subjects:
            tried(
                lambda s=subject: store.read(s.id),
                lambda s=subject: store.read_region(s.id, "image", (slice(1, 3), slice(0, 2), slice(0, 5))),
                lambda s=subject: (s.spacing, s.raw_bytes, s.stored_bytes),
            )
        store.verify()

    tried(lambda: everything("zarr"), lambda: everything("auto"))
    tried(lambda: create_store(path, resume=True).close(), lambda: create_store(path).close())


def table_prepare(folder: Path) -> None:
    for name in ("a.nii", "b.nii.gz", "l.nii", "m.nii"):
        (folder / name).touch()
    rows = 'HR_image,Label_image,Base,Mask_image\na.nii,l.nii,Train,\n"b.nii.gz",m.nii,Test,l.nii\n'
    (folder / "seed0").write_text(rows, encoding="utf8")
    (folder / "seed1").write_text(rows.replace(",", ";"), encoding="utf8")
    (folder / "seed2").write_text("a.nii\n# b\nb.nii.gz\n", encoding="utf8")
    scored = rows.replace("HR_image,Label_image,Base", "SR_image,HR_image,Label_image").replace("Train", "a.nii")
    (folder / "seed3").write_text(scored, encoding="utf8")


def table_damage(folder: Path, chance: random.Random) -> Path:
    seeds = [p.read_bytes() for p in sorted(folder.glob("seed*"))]
    text = mutate.text_of(chance.choice(seeds).decode(), chance)
    raw = text.encode(chance.choice(("utf8", "utf8", "utf-8-sig", "utf-16")), "replace")
    path = folder / chance.choice(("case.csv", "case.txt"))
    path.write_bytes(mutate.bytes_of(raw, chance, seeds) if chance.random() < 0.2 else raw)
    return path


def table_read(path: Path) -> None:
    tried(
        lambda: table.read_table(path),
        lambda: table.read_table(path, need_label=False, base_path=str(path.parent)),
        lambda: table.read_list(path),
        lambda: evaluate_cohort._read(path),
    )


def config_prepare(folder: Path) -> None:
    (folder / "seed").write_text(SMALL.to_yaml(), encoding="utf8")


def config_damage(folder: Path, chance: random.Random) -> Path:
    text = (folder / "seed").read_text(encoding="utf8")
    if chance.random() < 0.5:
        text = json.dumps(mutate.value_of(SMALL.to_dict(), chance))
    else:
        text = mutate.text_of(text, chance)
    (folder / "case.yaml").write_bytes(text.encode("utf8", "replace"))
    return folder / "case.yaml"


# --- records, scores, studies and logs that a report or a resumed call reads ---------------------------------------

RECORDS = ("case.json", "scores.json", "study.json", "log.jsonl", "summary.json")


def records_prepare(folder: Path) -> None:
    """What ``infer``, ``evaluate``, ``study`` and ``train`` leave, of an image of a few voxels."""
    image = images.save(folder / "case.nii", nifti_files.HEAD, nifti_files.rigid((1.0, 1.0, 3.0)))
    network = weights.save_generator(folder / "w.safetensors", build_generator(GeneratorSpec(kernel=1)).eval())
    seed = folder / "seed"
    infer_files([image], seed, network, patch=8, step=8, device="cpu")
    write_json(seed / "scores.json", evaluate_files(seed / "case_sr.nii.gz", seed / "case_sr.nii.gz"))
    rows = [{"model": "m", "step": step, "figures": {"psnr": {"mean": 30.0 + step, "sd": 1.0}}} for step in (4, 8)]
    write_json(
        seed / "study.json",
        {"study": "steps", "rows": rows, "heads": ["a"], "fit": [{"step": 4, "power": 3.0, "r2": 0.9}]},
    )
    lines = [{"epoch": 1, "update": n, "g_total": 0.5, "seconds": 1.0} for n in (1, 2)]
    lines.append({"epoch": 1, "validation": {"Dice": 0.5, "MSE": 0.1}})
    (seed / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")
    write_json(seed / "summary.json", {"epochs": 1, "updates": 2, "best": 0.5})


def records_damage(folder: Path, chance: random.Random) -> Path:
    """One of the files changed: its values, or its text."""
    case = folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(folder / "seed", case)
    path = case / chance.choice(RECORDS)
    text = path.read_text(encoding="utf8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = mutate.json_of(lines[at], chance)
        text = "\n".join(lines)
    else:
        text = mutate.json_of(text, chance)
    path.write_text(text, encoding="utf8", errors="replace")
    return case


def _report(case: Path) -> None:
    """The page without its picture, whose drawing takes more than all the rest."""
    with mock.patch.object(stage, "picture", return_value=b""):
        report(case, overwrite=True)


def records_read(case: Path) -> None:
    image, network = case.parent / "case.nii", case.parent / "w.safetensors"
    tried(
        lambda: _report(case),
        lambda: infer_files([image], case, network, patch=8, step=8, device="cpu", resume=True),
        lambda: find_images([case], case.parent / "out"),
        lambda: study_curves.curves(case),
        lambda: trainlog.RunLog(case).cut(1, 1),
    )


BIDS = ("case/dataset_description.json", "case/sub-01/anat/sub-01_desc-sr_T1w.json", "sub-01/anat/sub-01_T1w.json")


def bids_prepare(folder: Path) -> None:
    """A dataset of one image, and the derivatives made of it."""
    raw = folder / "seed"
    (raw / "sub-01/anat").mkdir(parents=True)
    images.save(raw / "sub-01/anat/sub-01_T1w.nii.gz", nifti_files.HEAD, nifti_files.rigid((1.0, 1.0, 3.0)))
    write_json(raw / "sub-01/anat/sub-01_T1w.json", {"SkullStripped": False})
    network = weights.save_generator(folder / "w.safetensors", build_generator(GeneratorSpec(kernel=1)).eval())
    infer_bids(raw, raw / "case", network, patch=8, step=8, device="cpu")


def bids_damage(folder: Path, chance: random.Random) -> Path:
    """One of the JSON files changed."""
    case = folder / "raw"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(folder / "seed", case)
    path = case / chance.choice(BIDS)
    path.write_text(mutate.json_of(path.read_text(encoding="utf8"), chance), encoding="utf8", errors="replace")
    return case


def bids_read(raw: Path) -> None:
    network = raw.parent / "w.safetensors"
    tried(
        lambda: infer_bids(raw, raw / "case", network, patch=8, step=8, device="cpu", resume=True),
        lambda: evaluate_bids(raw / "case", raw),
        lambda: check_derivatives(raw / "case"),
    )


TARGETS = {
    "bids": Target(bids_prepare, bids_damage, bids_read),
    "records": Target(records_prepare, records_damage, records_read),
    "nifti": Target(nifti_prepare, nifti_damage, nifti_read),
    "dicom": Target(dicom_prepare, dicom_damage, lambda p: tried(lambda: finite(any_image.load_any(p)))),
    "safetensors": Target(native_prepare, native_damage, weights_read),
    "keras": Target(keras_prepare, keras_damage, weights_read),
    "run": Target(run_prepare, run_damage, run_read),
    "store": Target(store_prepare, store_damage, store_read),
    "table": Target(table_prepare, table_damage, table_read),
    "config": Target(config_prepare, config_damage, lambda p: tried(lambda: config.from_yaml(p))),
}
