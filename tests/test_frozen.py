"""What a change of the sources alone must not change: public names, import paths, commands, files and results.

Everything is compared with the texts in ``tests/frozen``. A change that is meant is written there by
``python tests/test_frozen.py``, and its difference is read before it is committed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors import safe_open

import fastsrgan
from fastsrgan.__main__ import main

FROZEN = Path(__file__).parent / "frozen"
ROOT = Path(__file__).parent.parent
# Facts of the machine, the moment or the versions, whatever they stand in.
VOLATILE = {
    *(
        "seconds",
        "tile_seconds",
        "tiles_per_second",
        "data_wait_seconds",
        "patches_per_second",
        "memory_bytes",
        "memory",
        "file_bytes",  # packed, which depends on the last bit of each voxel
    ),
    *("provenance", "date", "made_by", "version", "digest"),
}


# --- names ----------------------------------------------------------------------------------------------------------


def documented() -> set[str]:
    """Dotted names that README.md and docs/ tell users to import, or describe."""
    names = {f"fastsrgan.{name}" for name in fastsrgan.__all__}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf8")
        names |= set(re.findall(r"^::: (fastsrgan[\w.]*)", text, re.M))
        for module, imported in re.findall(r"from (fastsrgan[\w.]*) import ([\w, ]+)", text):
            names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
        names |= set(re.findall(r"^ *import (fastsrgan[\w.]*)", text, re.M))
        for module, first, more in re.findall(r"`(fastsrgan\.[\w.]+)\.(\w+)`((?:, `\w+`)*)", text):
            names |= {f"{module}.{name}" for name in [first, *re.findall(r"\w+", more)]}
    return names


def looked_up(name: str) -> Any:
    """What a dotted name stands for after the import that its page shows."""
    module, _, attribute = name.rpartition(".")
    if not module:
        return importlib.import_module(name)
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        return importlib.import_module(name)


def described(name: str) -> str:
    """A name with what calls of it rely on."""
    value = looked_up(name)
    if inspect.ismodule(value):
        public = [n for n, v in vars(value).items() if not n.startswith("_") and getattr(v, "__module__", "") == name]
        return f"{name}: module of {' '.join(sorted(public))}"
    if isinstance(value, type) and issubclass(value, Exception):
        return f"{name}: error, exit code {getattr(value, 'exit_code', None)}"
    if isinstance(value, type):
        members = [n for n in vars(value) if not n.startswith("_")]
        return f"{name}{signature(value)}: {' '.join(sorted(members))}"
    return f"{name}{signature(value)}" if callable(value) else f"{name}: {type(value).__name__}"


def signature(value: Any) -> str:
    """Parameters with their defaults. Types stand in the page of each name, and their aliases may change."""
    whole = inspect.signature(value)
    plain = [p.replace(annotation=p.empty) for p in whole.parameters.values()]
    return re.sub(
        r"<[\w.]* object at 0x\w+>", "...", str(whole.replace(parameters=plain, return_annotation=whole.empty))
    )


def names_text() -> str:
    """All of them, a line each."""
    return "\n".join(map(described, sorted(documented()))) + "\n"


# --- commands -------------------------------------------------------------------------------------------------------


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """The parser whose help a command line prints."""
    shown: list[argparse.ArgumentParser] = []
    printed, argv = argparse.ArgumentParser.print_help, sys.argv
    argparse.ArgumentParser.print_help = lambda self, file=None: shown.append(self)  # type: ignore[method-assign]
    sys.argv = ["fastsrgan", *words, "--help"]
    try:
        assert main() == 0
    finally:
        argparse.ArgumentParser.print_help, sys.argv = printed, argv  # type: ignore[method-assign]
    return shown[0]


def commands() -> dict[str, str]:
    """Command -> its line in the general help."""
    choices = next(a for a in parser_of([])._actions if isinstance(a, argparse._SubParsersAction))
    return {a.dest: a.help or "" for a in choices._choices_actions}


def help_text(words: list[str]) -> str:
    """What ``--help`` tells, without the layout, which changes with the version of Python: an option a line."""
    parser = parser_of(words)
    formatter = parser._get_formatter()
    lines = [f"{parser.prog}: {parser.description}", ""]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines += [f"{name}: {text}" for name, text in commands().items()]
            continue
        name = " ".join(action.option_strings) or f"argument {action.dest}"
        facts = {key: getattr(action, key) for key in ("metavar", "nargs", "choices", "default", "const")}
        facts["required"] = action.required or None
        said = "; ".join(f"{k} {v}" for k, v in facts.items() if v is not None and v != argparse.SUPPRESS)
        text = "hidden" if action.help == argparse.SUPPRESS else formatter._expand_help(action) if action.help else ""
        lines.append(f"{name} [{said}] {text}".rstrip())
    return "\n".join([*lines, "", *(parser.epilog or "").strip().splitlines()]) + "\n"


# --- files ----------------------------------------------------------------------------------------------------------


def make_cohort(folder: Path) -> None:
    """Three subjects of 24 x 28 x 30 voxels with whole numbers, which no processor rounds in its own way."""
    x, y, z = np.meshgrid(*(np.arange(n) - n // 2 for n in (24, 28, 30)), indexing="ij")
    lines = ["HR_image,Label_image,Base"]
    for i in range(3):
        far = x * x + (y - i) ** 2 + z * z
        image = np.where(far < 120, 300 + 7 * ((3 * x + 5 * y + (2 + i) * z) % 41) + 200 * (far < 50), 0)
        for name, data in ((f"s{i}.nii", image.astype(np.int16)), (f"s{i}_gm.nii", (far < 50).astype(np.uint8))):
            nibabel.save(nibabel.Nifti1Image(data, np.diag([1.0, 1, 1, 1])), folder / name)
        lines.append(f"s{i}.nii,s{i}_gm.nii,{'Test' if i == 2 else 'Train'}")
    thick = nibabel.Nifti1Image(image[:, :, ::3].astype(np.int16), np.diag([1.0, 1, 3, 1]))
    nibabel.save(thick, folder / "scan.nii")
    (folder / "c.csv").write_text("\n".join(lines) + "\n", encoding="utf8")


def command(*words: str) -> None:
    """A command that succeeds."""
    argv, sys.argv = sys.argv, ["fastsrgan", "--quiet", *words]
    try:
        assert main() == 0, words
    finally:
        sys.argv = argv


SETTINGS = """\
new_low_res: [[1, 1, 3]]
epochs: 1
batch_size: 2
patch_size: 16
stride: 12
kernel_gen: 2
kernel_dis: 2
critic_iterations: 1
steps_per_epoch: 2
precision: fp32
feed_threads: 1
"""


def make_files(folder: Path) -> None:
    """Store, run, result, scores and page of the cohort, each by its command."""
    make_cohort(folder)
    (folder / "c.yaml").write_text(SETTINGS, encoding="utf8")
    with chdir(folder):
        command("convert", "c.csv", "c.zarr")
        command("train", "c.zarr", "-o", "run", "--config", "c.yaml", "--device", "cpu")
        tiles = ("--patch", "16", "--step", "12", "--device", "cpu", "--precision", "fp32")
        command("infer", "scan.nii", "-o", "out", *tiles)
        command("evaluate", "--sr", "out/scan_sr.nii.gz", "--hr", "s2.nii", "--json", "scores.json")
        command("report", "out", "-o", "page.html", "--scores", "scores.json")


def plain(value: Any) -> Any:
    """A record without what is of the machine and the moment; of a path its last part."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return "sha256"
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def as_text(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def store_text(folder: Path) -> str:
    """Size and digest of every file of the store; of those that hold the source's place, their words."""
    store = folder / "c.zarr"
    files: dict[str, Any] = {}
    for path in sorted(p for p in store.rglob("*") if p.is_file() and p.name != "manifest.json"):
        name, data = path.relative_to(store).as_posix(), path.read_bytes()
        told = str(folder).encode() in data
        files[name] = plain(json.loads(data)) if told else f"{len(data)} bytes {hashlib.sha256(data).hexdigest()}"
    manifest = plain(json.loads((store / "manifest.json").read_text(encoding="utf8")))
    for subject in manifest["subjects"].values():
        del subject["files"]["zarr.json"]
    return as_text({"files": files, "manifest": manifest})


def kinds(value: Any) -> Any:
    """A tree of saved state as the kinds of its values."""
    if isinstance(value, dict):
        return {str(k): kinds(v) for k, v in value.items() if k != "param_groups"}  # torch's own, of its version
    if isinstance(value, list | tuple):
        return [kinds(v) for v in value] if len(value) < 9 else f"{len(value)} values"
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def snapshot_text(folder: Path) -> str:
    """The snapshot's manifest and files, as far as no digest of rounded numbers is in them."""
    run = folder / "run"
    (snapshot,) = (run / "checkpoints").iterdir()
    manifest = json.loads((snapshot / "manifest.json").read_text(encoding="utf8"))
    manifest["files"]["state.pt"] = "sizes differ from one version of torch to another"
    with safe_open(snapshot / "model.safetensors", "pt") as file:
        model = {name: kinds(file.get_tensor(name)) for name in sorted(file.keys())}
    state = torch.load(snapshot / "state.pt", weights_only=True)
    return as_text(
        {
            "folder": snapshot.relative_to(run).as_posix(),
            "run": sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()),
            "manifest": plain(manifest),
            "model": model,
            "state": kinds({k: v for k, v in state.items() if k != "rng"}),
            "config": (snapshot / "config.yaml").read_text(encoding="utf8").splitlines(),
            "log": [plain(json.loads(line)) for line in (run / "log.jsonl").read_text(encoding="utf8").splitlines()],
        }
    )


def result_text(folder: Path) -> str:
    """The result's files: header bytes, some of the values, and the record."""
    out = folder / "out"
    images = {}
    for kind in ("sr", "seg"):
        image = nibabel.load(out / f"scan_{kind}.nii.gz")
        data = np.asanyarray(image.dataobj)
        images[kind] = {"header": image.header.binaryblock.hex(), "values": data[2::5, 3::6, 4::7].ravel().tolist()}
    return as_text(
        {
            "files": sorted(p.name for p in out.iterdir()),
            "images": images,
            "record": plain(json.loads((out / "scan.json").read_text(encoding="utf8"))),
            "scores": plain(json.loads((folder / "scores.json").read_text(encoding="utf8"))),
        }
    )


def report_text(folder: Path) -> str:
    """The record that a page carries."""
    page = (folder / "page.html").read_text(encoding="utf8")
    facts = re.search(r'<script[^>]*id="facts"[^>]*>(.*?)</script>', page, re.S)
    assert facts
    return as_text(plain(json.loads(facts[1])))


# --- comparison -----------------------------------------------------------------------------------------------------

TEXTS: dict[str, Callable[[Path], str]] = {
    "store.json": store_text,
    "snapshot.json": snapshot_text,
    "result.json": result_text,
    "report.json": report_text,
}
# Rounding alone: one thread with AVX2 and two with SSE4.2 differed by at most 1.5e-5 of 1 + |value| (AMD EPYC, Zen 3).
CLOSE = {"rtol": 3e-4, "atol": 3e-4}


def differences(new: Any, old: Any, where: str = "") -> Iterator[str]:
    """Where two records differ: floating-point numbers by more than rounding, all else at all."""
    if isinstance(new, dict) and isinstance(old, dict):
        for key in sorted(new.keys() | old.keys()):
            if key not in new or key not in old:
                yield f"{where}/{key}: {'new' if key in new else 'gone'}"
            else:
                yield from differences(new[key], old[key], f"{where}/{key}")
    elif isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        for i, pair in enumerate(zip(new, old, strict=True)):
            yield from differences(*pair, f"{where}/{i}")
    elif isinstance(new, float) and isinstance(old, float):
        if not np.isclose(new, old, **CLOSE, equal_nan=True):
            yield f"{where}: {new}, was {old}"
    elif new != old:
        yield f"{where}: {new!r}, was {old!r}"


@functools.cache
def frozen_helps() -> list[str]:
    return sorted(path.stem for path in (FROZEN / "help").glob("*.txt"))


def test_public_names_and_documented_paths_stay():
    assert names_text().splitlines() == (FROZEN / "names.txt").read_text(encoding="utf8").splitlines()


def test_no_command_comes_or_goes():
    assert sorted(["fastsrgan", *commands()]) == frozen_helps()


@pytest.mark.parametrize("name", frozen_helps())
def test_help(name):
    text = help_text([] if name == "fastsrgan" else [name])
    assert text.splitlines() == (FROZEN / "help" / f"{name}.txt").read_text(encoding="utf8").splitlines()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    make_files(folder)
    return folder


@pytest.mark.parametrize("name", TEXTS)
def test_files(files, name):
    old = json.loads((FROZEN / name).read_text(encoding="utf8"))
    assert not list(differences(json.loads(TEXTS[name](files)), old))


def test_differences_are_seen():
    old = {"a": [1, 2.0], "b": "x"}
    assert not list(differences({"a": [1, 2.0001], "b": "x"}, old))
    assert list(differences({"a": [2, 2.1], "c": 1}, old)) == [
        "/a/0: 2, was 1",
        "/a/1: 2.1, was 2.0",
        "/b: gone",
        "/c: new",
    ]


def freeze() -> None:
    """Write all texts anew."""
    shutil.rmtree(FROZEN, ignore_errors=True)
    (FROZEN / "help").mkdir(parents=True)
    (FROZEN / "names.txt").write_text(names_text(), encoding="utf8")
    for name in ["fastsrgan", *commands()]:
        text = help_text([] if name == "fastsrgan" else [name])
        (FROZEN / "help" / f"{name}.txt").write_text(text, encoding="utf8")
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        for name, made in TEXTS.items():
            (FROZEN / name).write_text(made(Path(folder)), encoding="utf8")


if __name__ == "__main__":
    os.environ["FASTSRGAN_FORMS"] = "fixed"  # as conftest.py sets it for the tests
    freeze()
