"""Commands that end in an error or a warning, and the faults they meet: what ``docs/errors.md`` shows.

Each case makes its fault in the current folder, which holds what ``commands.make_work`` makes, and returns the words
of a command. Names are relative, so that the messages are the same wherever they are made.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from damage import Canary, bomb, claims_64_tib, cut, flip, keras_with, strange_state
from nifti_files import HEAD, qform_fields, rigid, write

from fastsrgan.cli.main import main
from fastsrgan.model import checkpoint, weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.store.files import MANIFEST

HEADER = "HR_image,Label_image,Base\n"
INFER = ["infer", "scan.nii.gz", "-o", "out", "-w", "w.safetensors"]
TRAIN = ["train", "cohort.zarr", "-o", "run", "--config", "c.yaml"]
CONVERT = ["convert", "table.csv", "new.zarr"]
Words = list[str]
CASES: list[tuple[int, str, Callable[[], Words]]] = []  # row of docs/reliability.md or 0, what came, the fault


def case(row: int, what: str) -> Callable[[Callable[[], Words]], Callable[[], Words]]:
    """Add a case."""

    def added(make: Callable[[], Words]) -> Callable[[], Words]:
        CASES.append((row, what, make))
        return make

    return added


def line(row: int, what: str, *words: str, text: str = "", name: str = "table.csv") -> None:
    """Add a case whose fault is a text file, or the command line itself."""

    def make() -> Words:
        if text:
            Path(name).write_text(text, encoding="utf8")
        return list(words)

    CASES.append((row, what, make))


def image(row: int, what: str, data: np.ndarray = HEAD, affine: np.ndarray | None = None, **options: object) -> None:
    """Add a case whose fault is an image."""

    def make() -> Words:
        more = options.pop("words", [])
        write("scan.nii.gz", data, rigid((1.0, 1, 3)) if affine is None else affine, **options)
        return [*INFER, *more]  # type: ignore[misc]

    CASES.append((row, what, make))


def damaged(row: int, what: str, spoil: Callable[[Path], object]) -> None:
    """Add a case whose fault is an image whose bytes were changed."""

    def make() -> Words:
        spoil(write("scan.nii.gz", HEAD, rigid((1.0, 1, 3))))
        return INFER

    CASES.append((row, what, make))


# --- the command line ---------------------------------------------------------------------------------------------

line(0, "a command that is none", "infr", "scan0.nii.gz", "-o", "out")
line(0, "an option that is none", *INFER, "--overwite")
line(0, "a value that is none", "infer", "scan0.nii.gz", "-o", "out", "--step", "0")
line(0, "an option that took the argument behind it", "convert", "cohort.csv", "--label", "3,42", "new.zarr")
line(0, "nothing to write to", "infer", "scan0.nii.gz")
line(0, "no such image", *INFER[:1], "scn0.nii.gz", *INFER[2:])
line(0, "a URL for an image", *INFER[:1], "https://example.org/scan.nii.gz", *INFER[2:])

# --- images -------------------------------------------------------------------------------------------------------

damaged(1, "cut off", lambda path: cut(path, -40))
damaged(1, "nothing in it", lambda path: path.write_bytes(b""))
damaged(
    1, "a web page in place of the download", lambda path: path.write_bytes(b"<!DOCTYPE html><title>Log in</title>")
)
damaged(2, "a checksum that does not fit", lambda path: flip(path, -7))
damaged(3, "a header that claims 64 TiB", claims_64_tib)
damaged(4, "a gzip bomb", bomb)
image(5, "a NaN", np.where(np.arange(HEAD.size).reshape(HEAD.shape) == 9, np.nan, HEAD).astype(np.float32))
image(6, "all NaN", np.full((3, 4, 5), np.nan, np.float32))
image(6, "all zero", np.zeros_like(HEAD))
image(6, "constant", np.full((7, 6, 5), 7, np.int16))
image(7, "a series of volumes", np.stack([HEAD] * 3, 3))
image(7, "a volume that the series has not", np.stack([HEAD] * 3, 3), words=["--volume", "5"])
image(7, "a vector in each voxel", HEAD, dim=(slice(0, 6), (5, 7, 6, 5, 1, 3)))
image(7, "colours", HEAD, datatype=128)
image(7, "complex numbers", HEAD, datatype=32)
image(8, "two orientations", HEAD, rigid((1.0, 1, 3)), **qform_fields(rigid((1.0, 1, 3), origin=(9, 9, 9))))
image(8, "no orientation", HEAD, sform_code=0, qform_code=0)
image(10, "a shear", HEAD, np.array([[1.0, 0.2, 0, 3], [0, 1, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]]))
image(11, "microns", HEAD, rigid((900.0, 900, 3000)), units=3)
image(11, "microns that are said to be millimetres", HEAD, rigid((900.0, 900, 3000)))
image(11, "a voxel size of zero", HEAD, sform_code=0, qform_code=0, pixdim=(slice(1, 4), (0, 1, 1)))


def label(row: int, what: str, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    """Add a case whose fault is a label."""

    def make() -> Words:
        write("image.nii.gz", HEAD, rigid((1.0, 1, 3)))
        data, affine = change((HEAD > 450).astype(np.float32), rigid((1.0, 1, 3)))
        write("label.nii.gz", data, affine)
        Path("table.csv").write_text(HEADER + "image.nii.gz,label.nii.gz,Train\n", encoding="utf8")
        return CONVERT

    CASES.append((row, what, make))


label(13, "fractions", lambda data, affine: (data * 0.4, affine))
label(13, "another size", lambda data, affine: (data[1:], affine))
label(13, "another place", lambda data, affine: (data, affine + np.outer([1, 0, 0, 0], [0, 0, 0, 5])))
label(13, "the image's array without its header", lambda data, affine: (data, np.eye(4)))


@case(13, "a truth without its header")
def _lost_truth() -> Words:
    write("sr.nii.gz", HEAD, rigid((1.0, 1, 3)))
    write("truth.nii.gz", HEAD, np.eye(4))
    return ["evaluate", "--sr", "sr.nii.gz", "--hr", "truth.nii.gz"]


@case(13, "several structures, none of them chosen")
def _several_structures() -> Words:
    write("hr.nii.gz", HEAD, rigid((1.0, 1, 3)))
    write("aseg.nii.gz", np.resize(np.array([0, 2, 3, 41, 42], np.uint8), HEAD.shape), rigid((1.0, 1, 3)))
    return ["evaluate", "--sr", "hr.nii.gz", "--hr", "hr.nii.gz", "--seg", "aseg.nii.gz", "--label", "aseg.nii.gz"]


@case(13, "a structure that no label holds")
def _lost_structure() -> Words:
    return [*_several_structures(), "--label-classes", "99"]


line(13, "labels of a store chosen again", *TRAIN, "--label", "3,42")


@case(1, "a pointer in place of the file")
def _pointer() -> Words:
    Path("scan.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    return INFER


# --- tables -------------------------------------------------------------------------------------------------------

MANY = "none.nii.gz,sub-0_gm.nii.gz,Train\nsub-0.nii.gz,sub-0_gm.nii.gz,trian\nsub-1.nii.gz,sub-1_gm.nii.gz,Train\n"
line(14, "all faults at once", *CONVERT, text=HEADER + MANY + "sub-1.nii.gz,sub-2_gm.nii.gz,Test\n")
line(14, "columns of other names", *CONVERT, text="HR_img,Label,Base\na,b,Train\n")
OPEN = '"sub-1.nii.gz,sub-1_gm.nii.gz,Train\nsub-2.nii.gz,sub-2_gm.nii.gz,Test\n'
line(14, "a quote that is left open", *CONVERT, text=HEADER + OPEN)
line(14, "a workbook", "convert", "table.xlsx", "new.zarr", text="PK\3\4...", name="table.xlsx")
line(14, "no such table", "convert", "cohrt.csv", "new.zarr")


@case(15, "one of three")
def _one_of_three() -> Words:
    shutil.copyfile("scan1.nii.gz", "cut.nii.gz")
    cut(Path("cut.nii.gz"), -40)
    return ["infer", "scan0.nii.gz", "cut.nii.gz", "scan2.nii.gz", *INFER[2:], "--patch", "16", "--step", "16"]


# --- weights and settings -----------------------------------------------------------------------------------------


def bad_weights(row: int, what: str, make: Callable[[Path], object], name: str = "bad.safetensors") -> None:
    """Add a case whose fault is a weight file."""

    def made() -> Words:
        make(Path(name))
        return ["infer", "scan0.nii.gz", "-o", "out", "-w", name]

    CASES.append((row, what, made))


def _half(path: Path) -> None:
    shutil.copyfile("w.safetensors", path)
    cut(path, path.stat().st_size // 2)


def _nan(path: Path) -> None:
    network = build_generator(GeneratorSpec(kernel=1)).eval()
    network.head.data[...] = np.nan
    weights.save_generator(path, network)


bad_weights(16, "cut off", _half)
bad_weights(16, "of another architecture", lambda path: keras_with(path, "another shape"), "bad.h5")
bad_weights(16, "NaN", _nan)
bad_weights(16, "no weights at all", lambda path: shutil.copyfile("scan0.nii.gz", path))
line(16, "a URL", "infer", "scan0.nii.gz", "-o", "out", "-w", "https://example.org/w.h5")
bad_weights(17, "a pickle", lambda path: path.write_bytes(pickle.dumps(Canary(Path("canary")))), "bad.pt")
bad_weights(18, "4 TiB", lambda path: keras_with(path, "4 TiB"), "bad.h5")
bad_weights(18, "a link to another file", lambda path: keras_with(path, "a link"), "bad.h5")


def settings(what: str, text: str) -> None:
    """Add a case whose fault is a file of settings."""
    line(19, what, *TRAIN[:-1], "bad.yaml", text=text, name="bad.yaml")


settings("code", "!!python/object/apply:os.system ['touch canary']\n")
settings("a misspelt setting", "new_low_res: [1, 1, 3]\nbatchsize: 3\n")
settings("a value that is none", "new_low_res: [1, 1, 3]\nbatch_size: many\n")
settings("a value out of range", "new_low_res: [1, 1, 3]\nbatch_size: 0\n")


# --- snapshots and stores -----------------------------------------------------------------------------------------


@case(23, "the only snapshot damaged")
def _snapshot() -> Words:
    assert main(["--quiet", *TRAIN]) == 0
    state = checkpoint.newest(Path("run")) / "state.pt"
    flip(state, state.stat().st_size // 2)
    return [*TRAIN, "--resume"]


line(26, "a run is there", *TRAIN)
line(24, "a full disk, asked for before the work", *CONVERT, text=HEADER + "sub-0.nii.gz,sub-0_gm.nii.gz,Train\n")
line(25, "a file in place of the folder", *INFER[:1], "scan0.nii.gz", "-o", "c.yaml", "-w", "w.safetensors")
line(26, "a store is there", "convert", "cohort.csv", "cohort.zarr")


@case(26, "results are there")
def _results() -> Words:
    words = [*INFER[:1], "scan0.nii.gz", "-o", "results", "-w", "w.safetensors", "--patch", "16", "--step", "16"]
    assert main(["--quiet", *words]) == 0
    return words


@case(29, "a changed byte and a lost file")
def _chunks() -> Words:
    shutil.copytree("cohort.zarr", "hurt.zarr")
    shard = Path("hurt.zarr/sub-0/image/c/0/0/0")
    flip(shard, shard.stat().st_size // 3)
    Path("hurt.zarr/sub-1/label/c/0/0/0").unlink()
    return ["verify", "hurt.zarr"]


line(29, "the same in training", "train", "hurt.zarr", *TRAIN[2:3], "hurt_run", *TRAIN[4:], "--strict")


@case(29, "a forged manifest")
def _forged() -> Words:
    shutil.copytree("cohort.zarr", "forged.zarr")
    path = Path("forged.zarr") / MANIFEST
    path.write_text(path.read_text(encoding="utf8").replace("sub-0", "sub-9"), encoding="utf8")
    return ["info", "forged.zarr"]


line(31, "nobody answers", "info", "http://127.0.0.1:9/cohort.zarr")


@case(32, "a newer store")
def _newer() -> Words:
    shutil.copytree("cohort.zarr", "newer.zarr")
    path = Path("newer.zarr") / MANIFEST
    told = json.loads(path.read_text(encoding="utf8")) | {"format": 2, "made_by": "9.1", "needs": "9.0"}
    path.write_text(json.dumps(told), encoding="utf8")
    return ["info", "newer.zarr"]


line(32, "no store", "info", "cohort.csv")
line(35, "more than --max-memory", *INFER[:1], "scan0.nii.gz", *INFER[2:], "--max-memory", "0.1M")
line(42, "a device that is not there", *INFER[:1], "scan0.nii.gz", *INFER[2:], "--device", "cuda:99")


@case(17, "a pickle in a snapshot")
def _strangers_state() -> Words:
    words = ["train", "cohort.zarr", "-o", "theirs", "--config", "c.yaml"]
    assert main(["--quiet", *words]) == 0
    strange_state(Path("theirs"), Path("canary"))
    return [*words, "--resume"]


@case(0, "equal voxels")
def _equal() -> Words:
    write("small.nii.gz", HEAD[:3, :1, :2], rigid((1.0, 1, 1)))
    return ["infer", "small.nii.gz", "-o", "out", "-w", "w.safetensors"]


@case(12, "smaller than a patch")
def _small() -> Words:
    write("small.nii.gz", HEAD[:3, :1, :2], rigid((1.0, 1, 2)))
    return ["infer", "small.nii.gz", "-o", "out", "-w", "w.safetensors"]
