"""Every option of ``infer`` and ``train`` reaches the place where it acts, from the command line on.

``ACTS`` has a row for each option of ``InferSettings``: what is typed, what is read off the engine, and what has to be
found there; without the option something else is found. So a wire that is cut anywhere on the way shows.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import shlex
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from nifti_files import rigid
from spies import CONFIG, NOTHING_TRAINED, Alone

from fastsrgan.cli import main as cli
from fastsrgan.cli.main import main
from fastsrgan.core.ranks import ALONE
from fastsrgan.evaluate.cohort import Choice
from fastsrgan.infer import bids, sweep
from fastsrgan.infer import files as files_module
from fastsrgan.infer import image as image_module
from fastsrgan.infer import modes as modes_module
from fastsrgan.infer import settings as settings_module
from fastsrgan.infer import volume as volume_module
from fastsrgan.infer.network import TileNetwork, members
from fastsrgan.infer.settings import options
from fastsrgan.io import nifti as images
from fastsrgan.model import weights
from fastsrgan.model.networks import Generator, GeneratorSpec, build_generator
from fastsrgan.train import gan
from fastsrgan.train import run as run_module

SHAPE, MM = (14, 12, 5), (1.0, 1.0, 2.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A scan of whole numbers, two volumes in one file, a mask, and two networks of one channel."""
    made = tmp_path_factory.mktemp("options")
    some = np.random.default_rng(0)
    for name, seed in (("w", 6), ("v", 7)):
        weights.save_generator(made / f"{name}.safetensors", build_generator(GeneratorSpec(kernel=1), seed=seed))
    images.save(made / "a.nii", some.integers(1, 90, SHAPE).astype(np.int16), rigid(MM))
    images.save(made / "two.nii", some.integers(1, 90, (*SHAPE, 2)).astype(np.int16), rigid(MM))
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:9, 3:8, 1:4] = 1
    images.save(made / "mask.nii", mask, rigid(MM))
    return made


class Engine:
    """Arguments of the calls that an inference makes, by function, and its files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.calls: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.out = out
        # Drawing takes longer than all else; tests/test_infer_outputs.py sees the picture.
        monkeypatch.setattr(image_module, "_picture", lambda *args: self.calls["_picture"].append({"target": args[0]}))
        for module, name in (
            (settings_module, "pick_device"),
            *((volume_module, n) for n in ("plan_memory", "find_region", "average", "by_levels")),
            *((volume_module, "deviations"), (modes_module, "wanted")),
            *((volume_module.tiles, "plan"), (modes_module, "observation"), (modes_module, "_weight")),
            *((image_module, "segment"), (image_module, "process")),
            *((image_module.any_image, "load_any"), (image_module.any_image, "sha256")),
            *((files_module, "find_images"), (files_module, "together")),
            *((sweep.Stitcher, "__init__"), (TileNetwork, "__init__"), (Generator, "raw")),
        ):
            monkeypatch.setattr(module, name, self.spy(getattr(module, name)))

    def spy(self, plain: Callable) -> Callable:
        known = inspect.signature(plain)

        @functools.wraps(plain)
        def call(*args, **more):
            bound = known.bind(*args, **more)
            bound.apply_defaults()
            found = dict(bound.arguments)
            self.calls[plain.__qualname__].append(found)
            result = plain(*args, **more)
            found["result"] = result
            return result

        return call

    def of(self, function: str, argument: str) -> Any:
        """An argument of the first call."""
        return self.calls[function][0][argument] if self.calls[function] else None

    @property
    def plan(self):
        """The tiles that were taken."""
        return self.calls["plan"][-1]["result"]

    def written(self, kind: str) -> bool:
        return bool(list(self.out.glob(f"*{kind}")))

    @property
    def sr(self):
        return nib.load(next(self.out.glob("*_sr.nii.gz")))


class Act(NamedTuple):
    """words : typed; look : what is read; found : what it has to be; beside : words that both sides have"""

    words: str
    look: Callable[[Engine], Any]
    found: Any = True
    beside: str = "--agree off"


def batches(e: Engine) -> int:
    return max(len(call["x"]) for call in e.calls["Generator.raw"])


def spacing(e: Engine) -> tuple[float, ...]:
    return tuple(round(float(v), 3) for v in e.sr.header.get_zooms())


DENSE = "--patch 8 --step 4 --agree off"

ACTS: dict[str, Act] = {
    "patch": Act("--patch 12", lambda e: e.plan.patch[0], 12),
    "step": Act("--step 3", lambda e: {b - a for a, b in itertools.pairwise(e.plan.origins[0][:-1])}, {3},
        "--patch 8 --agree off"),
    "budget": Act("--budget 0s", lambda e: e.calls["by_levels"] and e.of("by_levels", "budget"), 0.0, DENSE),
    "new_resolution": Act("--new-resolution 1 1 1.25", spacing, (1.0, 1.0, 1.25)),
    "geometry": Act("--geometry segsrgan", lambda e: (e.plan.mirror, e.of("find_region", "image").geometry),
        (False, "segsrgan")),
    "window": Act("--window gaussian", lambda e: e.of("Stitcher.__init__", "plan").window, "gaussian", DENSE),
    "batch": Act("--batch 3", batches, 3, DENSE),
    "precision": Act("--precision bf16", lambda e: e.of("TileNetwork.__init__", "precision"), "bf16"),
    "compile": Act("--compile off", lambda e: (e.of("TileNetwork.__init__", "compile"), e.of("average", "compile")),
        ("off", "off")),
    "precision_check": Act("--check-precision", lambda e: len(e.calls["deviations"]), 1),
    "max_memory": Act("--max-memory 3G", lambda e: e.of("plan_memory", "limit"), 3 * 2**30),
    "mask": Act("--mask {folder}/mask.nii", lambda e: e.calls["find_region"][0]["result"][1],
        {"kind": "mask", "voxels": 7 * 5 * 3}),
    "outside": Act("--outside zero", lambda e: float(e.of("find_region", "data_XYZ")[0, 0, 0]), 0.0,
        "--agree off --mask {folder}/mask.nii"),
    "upright": Act("--upright on", lambda e: e.of("process", "settings").upright, "on"),
    "flips": Act("--flips xz", lambda e: sorted(e.of("average", "axes")), [0, 2]),
    "agree": Act("--agree 0.5", lambda e: e.calls["_weight"][0]["result"][0], 0.5, ""),
    "adapt": Act("--adapt off", lambda e: e.calls["wanted"][0]["result"].adapt, False, "--new-resolution 1"),
    "slice_thickness": Act("--slice-thickness 2", lambda e: e.calls["observation"][1]["thickness_mm"], 2.0, ""),
    "profile": Act("--profile box", lambda e: e.of("observation", "profile"), "box", ""),
    "threshold": Act("--threshold 0.25", lambda e: e.of("segment", "threshold"), 0.25),
    "largest_component": Act("--largest-component", lambda e: e.of("segment", "largest_component")),
    "min_size": Act("--min-size 5", lambda e: e.of("segment", "min_mm3"), 5.0),
    "dtype": Act("--dtype input", lambda e: e.sr.get_data_dtype(), np.int16),
    "save_prob": Act("--save-prob", lambda e: e.written("_prob.nii.gz")),
    "save_residual": Act("--save-residual", lambda e: e.written("_residual.nii.gz"), beside=""),
    "uncertainty": Act("--uncertainty", lambda e: e.written("_doubt.nii.gz"), beside=""),
    "png": Act("--png", lambda e: [call["target"].name for call in e.calls["_picture"]], ["a.png"]),
    "max_voxels": Act("--max-voxels 900",
        lambda e: {call["max_voxels"] for call in e.calls["load_any"]}, {900}, "--agree off --mask {folder}/mask.nii"),
}  # fmt: skip


def test_every_option_has_its_place_here():
    own = {"device", "split_volume", "series", "volume"}  # each has a test of its own below
    assert ACTS.keys() | own == options().keys() and not ACTS.keys() & own


@pytest.fixture
def engine(monkeypatch, tmp_path):
    return Engine(monkeypatch, tmp_path / "out")


def infer(folder: Path, out: Path, image: str, words: str) -> int:
    given = words.format(folder=folder).split()
    return main(["--quiet", "infer", str(folder / image), "-o", str(out), "-w", str(folder / "w.safetensors"), *given])


@pytest.mark.parametrize("name", ACTS)
def test_an_option_reaches_the_place_where_it_acts(name, folder, tmp_path):
    act = ACTS[name]
    for words, expected in ((f"{act.beside} {act.words}", True), (act.beside, False)):
        with pytest.MonkeyPatch.context() as patch:
            engine = Engine(patch, tmp_path / str(expected))
            assert infer(folder, engine.out, "a.nii", words) == 0
            assert (act.look(engine) == act.found) == expected, words


def test_the_volume_of_a_series_is_the_one_that_is_computed(folder, engine):
    expected = np.asarray(nib.load(folder / "two.nii").dataobj)
    assert not np.array_equal(expected[..., 0], expected[..., 1])
    assert infer(folder, engine.out, "two.nii", "--agree off --volume 1") == 0
    assert np.array_equal(engine.of("process", "data_XYZ"), expected[..., 1])
    assert main(["--quiet", "infer", str(folder / "two.nii"), "-o", str(engine.out / "none")]) == 3, "which is not said"


def test_the_series_of_a_folder_is_asked_for_wherever_the_image_is_read(folder, engine, monkeypatch):
    """A stand-in for a DICOM folder, whose readers take the series."""
    for module, name in ((image_module.any_image, "load_any"), (image_module.any_image, "sha256")):
        spied = getattr(module, name)
        plain = functools.partial(
            lambda spied, path, series=None, **more: (
                engine.calls[spied.__wrapped__.__name__].append({"series": series}),
                spied.__wrapped__(path, **more),
            )[1],
            spied,
        )
        monkeypatch.setattr(module, name, plain)
    found = engine.calls["find_images"]
    monkeypatch.setattr(
        files_module, "find_images",
        lambda inputs, out, series: found.append({"series": series})
        or [replace(image, series=series) for image in PLAIN_FIND(inputs, out)],
    )  # fmt: skip
    assert infer(folder, engine.out, "a.nii", "--agree off --series 2") == 0
    assert [engine.of(name, "series") for name in ("load_any", "sha256", "find_images")] == ["2", "2", "2"]


PLAIN_FIND = files_module.find_images
NOTHING: dict[str, Any] = {"items": [], "unneeded": 0}  # a summary


@pytest.mark.parametrize("split", [True, False])
def test_a_volume_is_split_over_ranks_where_that_is_asked(folder, engine, monkeypatch, split):
    monkeypatch.setattr("fastsrgan.core.ranks.from_environment", lambda *args: Alone(0, 2))
    calls = []
    monkeypatch.setattr(files_module, "together", lambda job, listed, ranks: calls.append("together") or [])
    monkeypatch.setattr(files_module.Cohort, "run", lambda cohort: calls.append("cohort") or [])
    assert infer(folder, engine.out, "a.nii", "--agree off" + " --split-volume" * split) == 0
    assert calls == ["together" if split else "cohort"]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_ends_with_the_code_of_what_failed_and_the_first_alone_says_so(
    folder, engine, monkeypatch, capsys, rank
):
    """A launcher judges a job by all of its processes."""

    def failing(*args, **more):
        failed = {"status": "failed", "input": "b", "error": "b: is damaged", "exit_code": 3}
        summary = {**NOTHING, "items": [failed], "done": 1, "skipped": 0, "failed": 1}
        raise files_module.SomeFailed("out", "1 of 2 volumes failed: b", "see the errors above", summary)

    monkeypatch.setattr("fastsrgan.core.ranks.from_environment", lambda *args: Alone(rank, 2))
    monkeypatch.setattr("fastsrgan.core.ranks.speaks", lambda: rank == 0)
    monkeypatch.setattr("fastsrgan.infer.files.infer_files", failing)
    assert infer(folder, engine.out, "a.nii", "--agree off") == 6
    assert ("1 of 2 volumes failed" in capsys.readouterr().err) == (rank == 0)


def test_the_device_that_is_named_is_the_one_that_is_asked_for(folder, engine, monkeypatch):
    asked = []
    plain = settings_module.pick_device
    monkeypatch.setattr(settings_module, "pick_device", lambda name: asked.append(name) or plain("cpu"))
    assert infer(folder, engine.out, "a.nii", "--agree off --device cuda:7") == 0
    assert asked[0] == "cuda:7"
    assert engine.of("TileNetwork.__init__", "device") == torch.device("cpu") == engine.of("average", "device")


def test_every_network_that_is_named_is_averaged(folder, engine):
    assert infer(folder, engine.out, "a.nii", f"--agree off -w {folder}/v.safetensors") == 0
    networks = members(engine.calls["average"][0]["result"])
    for name, network in zip("wv", networks, strict=True):
        assert torch.equal(network.head, weights.load_generator(folder / f"{name}.safetensors").head)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"overwrite": False, "resume": False}),
        (["--overwrite"], {"overwrite": True}),
        (["--resume"], {"resume": True}),
        (["-w", "a", "-w", "b"], {"weights": ["a", "b"]}),
    ],
)
def test_what_is_no_option_of_a_volume_reaches_infer_files(monkeypatch, words, expected):
    calls = []
    monkeypatch.setattr(
        files_module, "infer_files", lambda *args, **more: calls.append((args, more)) or {"items": [], "unneeded": 0}
    )
    assert main(["--quiet", "infer", "one.nii", "two.nii", "-o", "there", *words]) == 0
    (inputs, out, given), more = calls[0]
    assert inputs == ["one.nii", "two.nii"] and out == "there"
    assert {"weights": given, **more}.items() >= expected.items()


def test_the_choice_of_a_dataset_reaches_infer_bids(monkeypatch):
    calls = []
    monkeypatch.setattr(
        bids, "infer_bids", lambda *args, **more: calls.append((args, more)) or {"items": [], "unneeded": 0}
    )
    words = "--bids data -o there --participant-label 01 02 --session-label a --suffix FLAIR --desc preproc --step 8"
    assert main(["--quiet", "infer", *words.split()]) == 0
    (root, out, _), more = calls[0]
    assert (root, out, more["participants"], more["sessions"]) == ("data", "there", ["01", "02"], ["a"])
    assert more["suffixes"] == ["FLAIR"] and more["desc"] == "preproc" and more["step"] == 8


# --- train ------------------------------------------------------------------------------------------------------------

TRAIN = {
    "device": (["--device", "cuda:3"], "cuda:3"),
    "start_weights": (["-w", "adult"], "adult"),
    "resume": (["--resume"], True),
    "strict": (["--strict"], True),
    "snapshot_folder": (["-sf", "snapshots"], "snapshots"),
    "dice_file": (["-dice", "d.csv"], "d.csv"),
    "mse_file": (["-mse", "m.csv"], "m.csv"),
}


def trained(monkeypatch, *words: str) -> tuple[tuple, dict[str, Any]]:
    """What the command calls ``train`` with."""
    calls = []
    monkeypatch.setattr(run_module, "train", lambda *args, **more: calls.append((args, more)) or NOTHING_TRAINED)
    assert main(["--quiet", "train", "c.zarr", "-o", "run", "-n", "1", "1", "3", *words]) == 0
    return calls[0]


@pytest.mark.parametrize("name", TRAIN)
def test_an_option_of_train_that_is_no_setting_reaches_train(monkeypatch, name):
    words, value = TRAIN[name]
    default = trained(monkeypatch)[1]
    (source, folder, _), more = trained(monkeypatch, *words)
    assert (source, folder) == ("c.zarr", "run")
    changed = {key for key in more if key != "progress" and more[key] != default[key]}
    assert changed == {name} and more[name] == value


def test_every_option_of_train_is_a_setting_or_stands_here():
    """So that no option can be added without the place where it acts."""
    parser = next(a for a in cli.build_parser()._actions if a.dest == "command").choices["train"]
    names = {a.dest for a in parser._actions} - {"help"}
    elsewhere = {
        *("source", "csv", "out", "config", "json", "u_net"),  # read by the command itself: tests/test_cli.py
        *("base_path", "label_classes", "label_names"),  # of the conversion, below
        *("folder_training_data", "multi_gpu"),  # of the original, accepted and told
        *("weights", "checkpoint"),  # start_weights; tests/test_weights.py
    }
    assert names - elsewhere == (set(vars(CONFIG)) | set(TRAIN)) - {"start_weights"}


def test_what_names_the_data_reaches_the_conversion(monkeypatch, tmp_path):
    from fastsrgan import convert as convert_module

    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("3 cortex\n", encoding="utf8")
    (tmp_path / "c.csv").write_text("HR_image,Label_image,Base\na.nii,b.nii,Train\n", encoding="utf8")
    (tmp_path / "data").mkdir()
    for name in ("a.nii", "b.nii"):
        (tmp_path / "data" / name).touch()
    calls = []
    monkeypatch.setattr(
        convert_module, "convert",
        lambda *args, **more: calls.append(more) or {"subjects": 0, "converted": 0},
    )  # fmt: skip
    monkeypatch.setattr(run_module, "train", lambda *args, **more: NOTHING_TRAINED)
    words = ["-csv", tmp_path / "c.csv", "-o", tmp_path / "run", "-n", 1, 1, 3, "--base-path", "data"]
    words += ["--label-classes", "3,42", "--label-names", "names.txt"]
    assert main(["--quiet", "train", *map(str, words)]) == 0
    assert (calls[0]["base_path"], calls[0]["label_classes"], calls[0]["label_names"]) == (
        "data",
        ["3,42"],
        "names.txt",
    )


def test_what_train_is_given_reaches_the_run(monkeypatch, tmp_path):
    """From the keywords of ``train`` to the feed, the log, the snapshots and the weights that it begins with."""
    seen: dict[str, Any] = {}

    def prepare(store, folder, config, device, ranks, strict, resume, kept):
        seen.update(strict=strict, config=config, device=device)
        return SimpleNamespace(first=True, folder=folder, mask_classes=0, snapshot_folder=None, progress=None)

    class Enough(Exception):
        pass

    def begin(run, start_weights, resume):
        seen.update(run=run, start_weights=start_weights, begun_as=resume)
        raise Enough

    for name, value in (("prepare", prepare), ("begin", begin), ("data_identity", lambda store: "")):
        monkeypatch.setattr(run_module, name, value)
    monkeypatch.setattr(run_module, "open_store", lambda source: seen.update(source=source) or SimpleNamespace(url="s"))
    monkeypatch.setattr(run_module, "pick_device", lambda name: seen.update(asked=name) or torch.device("cpu"))
    monkeypatch.setattr(run_module, "has_snapshot", lambda *args: True)
    progress = SimpleNamespace()
    with pytest.raises(Enough):
        run_module.train(
            "c.zarr", tmp_path / "run", CONFIG, device="cuda:3", start_weights="w", resume=True, strict=True,
            snapshot_folder=tmp_path / "keras", dice_file=tmp_path / "d.csv", mse_file=tmp_path / "m.csv",
            progress=progress,
        )  # fmt: skip
    run = seen["run"]
    assert (seen["source"], seen["asked"], seen["strict"], seen["start_weights"]) == ("c.zarr", "cuda:3", True, "w")
    assert seen["begun_as"] is True and seen["config"] is CONFIG and run.progress is progress
    assert run.snapshot_folder == tmp_path / "keras"
    assert (run.log.dice_file, run.log.mse_file) == (tmp_path / "d.csv", tmp_path / "m.csv")


@pytest.mark.parametrize(("world", "seconds"), [(1, 0.0), (2, 5.0)])
def test_of_several_ranks_two_interruptions_in_a_moment_are_one(monkeypatch, tmp_path, world, seconds):
    """A terminal's Ctrl-C reaches each rank twice; a process alone stops at the second, whenever that comes."""

    class Enough(Exception):
        pass

    def heard(again_after: float) -> None:
        raise Enough(again_after)

    names = ("pick_device", "agree_on_settings", "lock", "refuse_inside", "data_identity", "keep_arithmetic", "begin")
    for name in (*names, "tell_of_data", "known_run", "open_store", "prepare"):
        monkeypatch.setattr(run_module, name, lambda *args, **more: SimpleNamespace(first=False, url=""))
    monkeypatch.setattr(run_module, "from_environment", lambda device: Alone(world=world))
    monkeypatch.setattr(run_module, "StopRequest", heard)
    with pytest.raises(Enough) as found:
        run_module.train("c.zarr", tmp_path / "run", CONFIG, device="cpu")
    assert found.value.args == (seconds,)


def test_a_strict_run_has_a_strict_feed_and_start_weights_are_taken(monkeypatch, tmp_path):
    from test_laws_settings import CPU, Seen

    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(CONFIG, patch, tmp_path)
        assert seen.run.feed.strict is False
        run = run_module.prepare(seen.run.store, tmp_path, CONFIG, CPU, ALONE, strict=True, resume=False)
        assert run.feed.strict is True
        taken = []
        patch.setattr(gan.Models, "start_from", lambda models, path: taken.append(path))
        run_module.begin(run, "w.safetensors", False)
        assert taken == ["w.safetensors"]


# --- other commands ---------------------------------------------------------------------------------------------------

COMMANDS = {
    "report": (
        "report one -o page.html --scores s.json --study a.json b.json --hr h.nii --label l.nii --mask m.nii "
        "--label-classes 3,42 --label-names t.txt --max-mb 7 --overwrite",
        "fastsrgan.report.page.report",
        [Path("page.html")],
        {"path": "one", "out": "page.html", "scores": "s.json", "studies": ["a.json", "b.json"], "hr": "h.nii",
         "label": "l.nii", "mask": "m.nii", "max_mb": 7.0, "overwrite": True, "label_names": "t.txt"},
    ),
    "report of runs": (
        "report one two -o page.html --overwrite", "fastsrgan.report.page.runs_report", [Path("page.html")],
        {"runs": ["one", "two"], "out": "page.html", "overwrite": True},
    ),
    "job-model": (
        'job-model -p l.csv -dp base -pa 64,128 -s "32,48 64" -rf mine -wp w.h5 -bb True -n 1,2,3 -int sitk '
        "-it Linear --geometry physical --series 4 --device cpu --precision bf16 --overwrite",
        "fastsrgan.compat.job_model.job_model",
        {"items": []},
        {"table": "l.csv", "base_path": "base", "patch": [64, 128], "step": [[32], [48, 64]], "weights_path": "w.h5",
         "result_folder_name": "mine", "by_batch": True, "new_resolution": (1.0, 2.0, 3.0), "interp": "sitk",
         "interpolation_type": "Linear", "geometry": "physical", "series": "4", "device": "cpu", "precision": "bf16",
         "overwrite": True},
    ),
    "evaluate": (
        "evaluate --sr a --hr b --seg c --label d --mask e --lr f --baseline g --baseline-seg h --doubt i "
        "--label-classes 3,42 4 --label-names t.txt --png p.png",
        "fastsrgan.evaluate.pair.evaluate_files",
        {"image": {"whole": {"psnr_db": 1.0}}},
        {"sr": "a", "hr": "b", "seg": "c", "label": "d", "mask": "e", "lr": "f", "baseline": "g", "baseline_seg": "h",
         "doubt": "i", "png": "p.png", "label_classes": ["3,42", "4"], "label_names": "t.txt"},
    ),
    "convert": (
        "convert a.csv b.zarr --workers 3 --dtype int16 --base-path data --label-classes 3,42 --label-names t.txt "
        "--overwrite --json",
        "fastsrgan.convert.convert",
        {"warnings": {}},
        {"csv": "a.csv", "store_url": "b.zarr", "workers": 3, "dtype": "int16", "base_path": "data",
         "label_classes": ["3,42"], "label_names": "t.txt", "overwrite": True, "resume": False},
    ),
    "convert resumed": (
        "convert a.csv b.zarr --resume --json", "fastsrgan.convert.convert", {"warnings": {}},
        {"resume": True, "overwrite": False, "label_classes": None},
    ),
    "demo": (
        "demo -o there --device cpu --seed 5 --low-res 1 2 4 --overwrite", "fastsrgan.demo.run.run",
        {"table": [{"x": 1}], "picture": "p", "json": "j", "page": "h", "seconds": 1.0},
        {"out": "there", "device": "cpu", "seed": 5, "low_res_mm": (1.0, 2.0, 4.0), "overwrite": True},
    ),
    "evaluate a table": (
        "evaluate --table t.csv --png pictures --label-classes 3,42 4 --label-names t.txt --json",
        "fastsrgan.evaluate.cohort.evaluate_table", {},
        {"csv_path": "t.csv", "png": "pictures", "choice": Choice(["3,42", "4"], "t.txt")},
    ),
    "evaluate folders": (
        "evaluate a b --png pictures --label-classes 3 --json", "fastsrgan.evaluate.cohort.evaluate_folders", {},
        {"results": "a", "truth": "b", "png": "pictures", "choice": Choice(["3"])},
    ),
    "evaluate two results": (
        "evaluate a b c --png pictures --label-classes 3 --json", "fastsrgan.evaluate.compare.compare_folders", {},
        {"first": "a", "second": "b", "truth": "c", "png": "pictures", "choice": Choice(["3"])},
    ),
    "evaluate a dataset": (
        "evaluate --bids a b --png pictures --label-classes 3 --json", "fastsrgan.infer.bids.evaluate_bids", {},
        {"derivatives": "a", "truth": "b", "png": "pictures", "choice": Choice(["3"])},
    ),
    "weights import": (
        "weights import a.h5 b.safetensors", "fastsrgan.model.weights.import_keras", "b",
        {"source": "a.h5", "target": "b.safetensors", "overwrite": False},
    ),
    "weights export": (
        "weights export a.safetensors b.h5 --overwrite", "fastsrgan.model.weights.export_keras", "b",
        {"source": "a.safetensors", "target": "b.h5", "overwrite": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_typed_of_another_command_reaches_its_function(monkeypatch, tmp_path, name):
    """Every option with a value other than its default, under the argument that it stands for."""
    words, target, result, expected = COMMANDS[name]
    module, _, function = target.rpartition(".")
    plain = inspect.signature(getattr(importlib.import_module(module), function))
    calls = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("3 cortex\n", encoding="utf8")
    monkeypatch.setattr(target, lambda *args, **more: calls.append(plain.bind(*args, **more).arguments) or result)
    assert main(["--quiet", *shlex.split(words)]) == 0
    (given,) = calls
    assert {key: given.get(key) for key in expected} == expected
