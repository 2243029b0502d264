"""What weight files, snapshots and precisions say, keep and refuse, at every bound."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastsrgan.errors import ModelError, UsageError
from fastsrgan.model import arithmetic, checkpoint, weights
from fastsrgan.model import keras as keras_h5
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model.cpu import forms
from fastsrgan.model.networks import Critic, CriticSpec, GeneratorSpec, build_generator, parameter_shapes
from fastsrgan.model.purpose import MODELS, Purpose, common

GOLDEN = Path(__file__).parent / "golden"
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def snapshot(run: Path, step: int, *names: str) -> Path:
    writers = {name: (lambda p, name=name: p.write_text(f"{name} {step}", encoding="utf8")) for name in names or "a"}
    return checkpoint.write(run, step, writers, {"epoch": step})


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_a_manifest_has_size_sum_and_step_of_what_was_written(tmp_path):
    found = checkpoint.manifest(snapshot(tmp_path, 12, "a", "b"))
    assert (found["format"], found["step"], found["epoch"], list(found["files"])) == (1, 12, 12, ["a", "b"])
    assert found["files"]["b"]["bytes"] == 4 and len(found["files"]["b"]["sha256"]) == 64


def test_every_file_of_a_snapshot_that_is_damaged_is_named(tmp_path):
    folder = snapshot(tmp_path, 1, "a", "b", "c")
    (folder / "a").write_text("x 1")  # as long as before
    (folder / "c").unlink()
    problems = checkpoint.verify(folder)
    assert len(problems) == 2 and str(folder / "a") in problems[0] and str(folder / "c") in problems[1]
    assert "SHA-256" in problems[0] and "missing" in problems[1]


def test_the_snapshot_before_is_promised_where_there_is_one_alone(tmp_path, caplog):
    """Without any the run's own weights are named, where they are there."""
    for step in (1, 2):
        (snapshot(tmp_path, step) / "a").unlink()
    for weights_there, hint in ((False, "copy the run again"), (True, f"its weights may be: -w {tmp_path}")):
        if weights_there:
            (tmp_path / checkpoint.MODEL).write_bytes(b"x")
        caplog.clear()
        with pytest.raises(ModelError, match="no snapshot of 2 is whole") as error:
            checkpoint.newest(tmp_path)
        assert error.value.hint.startswith(hint)
        assert ["taking the snapshot before it" in message for message in caplog.messages] == [True, False]


def test_a_removal_that_is_interrupted_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        snapshot(tmp_path, step)

    def killed(folder, ignore_errors=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, 1)
    assert [folder.name for folder in checkpoint.snapshots(tmp_path)] == ["step-00000002", "step-00000003"]
    assert (tmp_path / "checkpoints" / "step-00000001" / "a").exists()


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "b/a", ".a", "", "a" * 101])
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path, name):
    folder = snapshot(tmp_path, 1)
    values = json.loads((folder / checkpoint.MANIFEST).read_text())
    values["files"][name] = values["files"].pop("a")
    (folder / checkpoint.MANIFEST).write_text(json.dumps(values))
    with pytest.raises(ModelError, match="is no manifest of a snapshot"):
        checkpoint.manifest(folder)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(values | {"pad": " " * 2**20}))
    with pytest.raises(ModelError, match="too large"):
        checkpoint.manifest(folder)


def test_what_was_removed_leaves_no_half_of_a_snapshot(tmp_path):
    """Nothing of a writer that fails stays beside the snapshots."""

    def fails(path):
        path.write_text("half")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        checkpoint.write(tmp_path, 1, {"a": fails}, {})
    assert list((tmp_path / checkpoint.FOLDER).iterdir()) == []


# --- weight files -----------------------------------------------------------------------------------------------------


def saved(path: Path, **more) -> Path:
    return weights.save_generator(path, build_generator(GeneratorSpec(kernel=1), seed=3), **more)


def test_every_damaged_weight_file_of_a_run_is_named(tmp_path):
    paths = [saved(tmp_path / f"{name}.safetensors") for name in ("best", "last", "model")]
    assert weights.damaged(tmp_path) == []
    for path in (paths[0], paths[2]):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    told = weights.damaged(tmp_path)
    assert len(told) == 2 and str(paths[0]) in told[0] and str(paths[2]) in told[1]
    assert all("differs from the SHA-256" in line for line in told)


@pytest.mark.parametrize("sum_", [None, 5, "abc", "A" * 64])
def test_files_of_versions_without_a_sum_are_taken(tmp_path, sum_):
    """And are what they are: a changed byte of theirs cannot be told."""
    path = saved(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastsrgan"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = {k: v for k, v in header.items() if k != "sha256"} | ({} if sum_ is None else {"sha256": sum_})
    save_file(tensors, path, metadata={"fastsrgan": json.dumps(header)})
    modelfile.check_sum(path)
    assert weights.load_generator(path).spec.kernel == 1


def test_a_card_that_holds_a_sum_is_not_taken_for_the_files_own(tmp_path):
    """The file's own comes last in its header, whatever the card is called and holds."""
    path = saved(tmp_path / "a.safetensors", card={"zzz": modelfile.UNKNOWN, "sha256": modelfile.UNKNOWN})
    modelfile.check_sum(path)
    assert weights.info(path)["card"] == {"zzz": modelfile.UNKNOWN, "sha256": modelfile.UNKNOWN}


def test_what_is_converted_says_of_what_and_what_it_computes_otherwise(tmp_path):
    """The original's residual conditional U-Net alone."""
    for name, noted in (
        ("weights_u_net_cond", True), ("weights_u_net_cond_nn_residual", False), ("weights_residual_mask3", False)
    ):  # fmt: skip
        path = weights.import_keras(GOLDEN / f"{name}.h5", tmp_path / f"{name}.safetensors")
        found = weights.info(path)
        assert found["card"]["converted_from"] == f"{name}.h5"
        assert found["card"].get("note") == (weights.LEGACY_NOTE if noted else None)
        assert found["notes"] == [] and found["file"] == found["path"] == str(path)


def test_info_says_what_the_weights_were_made_for_and_how_large_they_are(tmp_path):
    critic = Critic(CriticSpec(1, 16), 1)
    generator = build_generator(GeneratorSpec(kernel=1), seed=3)
    card = {"made_for": {"contrast": "T9", "outside": "zero"}}
    found = weights.info(weights.save_generator(tmp_path / "a.safetensors", generator, critic, card))
    assert found["made_for"] == {"contrast": "T9", "outside": "zero"} and found["card"] == card
    assert found["bytes"] == (tmp_path / "a.safetensors").stat().st_size and found["ema"] is False
    assert found["parameters"] == sum(p.numel() for p in generator.parameters())
    assert found["critic_parameters"] == sum(p.numel() for p in critic.parameters())
    # A copy of a shipped file has its card; the file itself has what the package says of it.
    shutil.copyfile(weights.shipped("perinatal"), tmp_path / "copy.safetensors")
    assert weights.purpose("perinatal") == MODELS["perinatal"].purpose == weights.purpose(weights.shipped("perinatal"))
    said = weights.info(tmp_path / "copy.safetensors")["card"].get("made_for")
    assert weights.purpose(tmp_path / "copy.safetensors") == Purpose.of(said)


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_ones_own_called_like_a_shipped_file_are_not_taken_for_it(tmp_path, name):
    """What the file says holds: what it was made for, and in which checks its results are looked at."""
    card = {"made_for": {"contrast": "T9", "head_mm": [3, 4]}}
    generator = build_generator(GeneratorSpec(kernel=1), seed=3)
    for path in (tmp_path / MODELS[name].file, tmp_path / "run" / weights.BEST):
        path.parent.mkdir(exist_ok=True)
        weights.save_generator(path, generator, card=card)
        assert weights.purpose(path) == Purpose(contrast="T9", head_mm=(3, 4))
        assert weights.info(path)["made_for"] == card["made_for"]
    assert weights.purpose(name) == MODELS[name].purpose


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_others_stored_in_another_type_are_read_as_float32(tmp_path, dtype):
    path = saved(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fastsrgan"])
        tensors = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
    del header["sha256"]
    save_file(tensors, path, metadata={"fastsrgan": json.dumps(header)})
    found = weights.load_generator(path)
    for name, parameter in found.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, tensors[f"generator.{name}"].float()), name


def test_an_average_of_other_layers_is_refused_before_anything_is_read(tmp_path):
    path = saved(tmp_path / "a.safetensors", ema=build_generator(GeneratorSpec(kernel=2), seed=3))
    for use in (weights.info, weights.load_generator, lambda p: weights.load_generator(p, ema=False)):
        with pytest.raises(ModelError, match=r"tensor ema\.\S+ is 2 x 1 x 7 x 7 x 7 .*needs 1 x 1"):
            use(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"compression": "lzf"}, "compressed with filters"), ({"scaleoffset": 3}, "compressed with filters")],
)
def test_keras_arrays_are_read_through_filters_without_loss_alone(tmp_path, options, words):
    path, name = tmp_path / "a.h5", "G/G_gen_conv2/kernel:0"
    shutil.copyfile(GOLDEN / "weights_residual_mask3.h5", path)
    with h5py.File(path, "r+") as file:
        data = file[name][()]
        del file[name]
        file.create_dataset(name, data=data, chunks=True, **options)
    with pytest.raises(ModelError, match=words):
        weights.load_generator(path)


@pytest.mark.parametrize("version", [0, 1])
def test_a_keras_file_that_names_a_driver_is_refused_before_the_library_reads_it(tmp_path, monkeypatch, version):
    """Found as a fuzzed case: 1.8 GB were taken for the driver's block of a file of 232 kB."""
    data = bytearray((GOLDEN / "weights_residual_mask3.h5").read_bytes())
    assert data[8] == 0 and data[48:56] == b"\xff" * 8  # superblock 0, no driver
    if version == 1:  # has four bytes more before its addresses
        data[8:60] = b"\1" + data[9:24] + bytes(4) + data[24:56]
    at = 48 + 4 * version
    data[at : at + 8] = (767).to_bytes(8, "little")
    (tmp_path / "w.h5").write_bytes(data)
    monkeypatch.setattr("fastsrgan.model.keras.h5py.File", lambda *_, **__: pytest.fail("the library read it"))
    with pytest.raises(ModelError, match="damaged HDF5 file: it is said to need a driver of its own"):
        weights.load_generator(tmp_path / "w.h5")


def test_a_keras_file_that_declares_far_more_than_it_holds_is_refused(tmp_path):
    """Packed zeros: no weights are like that."""
    spec, path = GeneratorSpec(kernel=32), tmp_path / "packed.h5"
    zeros = {name: torch.zeros(shape) for name, shape in parameter_shapes(spec).items()}
    keras_h5.write(tmp_path / "plain.h5", (spec, zeros))
    with h5py.File(tmp_path / "plain.h5") as source, h5py.File(path, "w") as file:
        file.create_group("input_im_gen")
        for layer, item in source["G"].items():
            for leaf, data in item.items():
                file.create_dataset(f"G/{layer}/{leaf}", data=data[()], chunks=True, compression="gzip")
    assert weights.read_spec(tmp_path / "plain.h5")[0] == spec
    with pytest.raises(ModelError, match=r"declares .* bytes of weights in a file of"):
        weights.read_spec(path)


def test_a_snapshot_that_is_named_is_itself_whatever_lies_in_it(tmp_path):
    saved(tmp_path / "w.safetensors")
    folder = checkpoint.write(
        tmp_path, 3, {checkpoint.MODEL: lambda p: shutil.copyfile(tmp_path / "w.safetensors", p)}, {}
    )
    saved(folder / weights.BEST, card={"best": True})
    found = weights.info(folder)
    assert (found["file"], found["kind"], found["card"]) == (str(folder / checkpoint.MODEL), "checkpoint", {})


def test_what_is_meant_by_a_name_of_the_package_is_a_path_where_weights_lie(tmp_path, monkeypatch):
    """A file, a link that leads nowhere, a folder with weights of any kind; no folder of scans."""
    monkeypatch.chdir(tmp_path)
    assert not weights.is_meant("adult")
    (tmp_path / "scans").mkdir()
    assert not weights.is_meant("scans")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    saved(tmp_path / "file")
    snapshot(tmp_path / "run", 3)
    for name in ("link", "file", "run", "run/checkpoints/step-00000003"):
        assert weights.is_meant(name), name
    (tmp_path / "best").mkdir()
    saved(tmp_path / "best" / weights.BEST)
    assert weights.is_meant("best")
    with pytest.raises(ModelError, match="link: no such file"):
        weights.load_generator("link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="pipe: is not a regular file"):  # and does not wait for its other end
        weights.load_generator(tmp_path / "pipe")
    with pytest.raises(ModelError, match=r"s3://bucket/w\.safetensors: is a URL"):
        weights.load_generator("s3://bucket/w.safetensors")


# --- purposes ---------------------------------------------------------------------------------------------------------


def test_a_purpose_is_told_in_the_words_of_its_parts():
    made = Purpose(
        ((1, "cortex"), (2, "white matter")), contrast="T2-like", ages="adults", species="human", view="whole head",
        head_mm=(140, 290), voxel_mm=(1, 1), slice_ratio=(1.5, 6.5),
    )  # fmt: skip
    rest = "T2-like, adults, human, whole head, head 140 to 290 mm, voxels 1 mm, slice ratio 1.5 to 6.5"
    assert made.line() == f"cortex, white matter; made for {rest}" and made.line("all") == f"all; made for {rest}"
    assert Purpose(((1, "cortex"),)).line() == "cortex" and Purpose(contrast="T9").line() == "structure; made for T9"
    assert Purpose().structure == "structure" and Purpose().outlined == "segmentation" and made.outlined == "cortex"
    for length, name in ((40, "x" * 40), (41, "x" * 39 + "…")):
        assert Purpose(((1, "x" * length), (2, "b"))).outlined == name and len(name) == 40


def test_a_card_is_read_to_a_bound():
    many = [{"value": n, "name": f" part  {n}"} for n in range(70)]
    card = {"structures": many, "contrast": " T2 \n like " + "x" * 200, "outside": "keep", "ages": 5, "mirrored": "A"}
    found = Purpose.of(card)
    assert len(found.structures) == 64 and found.structures[3] == (3, "part 3")
    assert found.contrast == "T2 like " + "x" * 112 and found.outside == found.mirrored == "" and found.ages == ""
    assert Purpose.of({"mirrored": "R"}).mirrored == "R"
    assert Purpose.of({"structures": [{"value": True, "name": "a"}, {"value": 1.0, "name": "b"}]}).structures == ()
    told = Purpose.of({"dice": {"T2": [0.5, 0.6], "T1": [0.7, 0.8]}, "contrasts": ["T2", "T1"]})
    assert told.dice == (("T1", (0.7, 0.8)), ("T2", (0.5, 0.6))) and told.contrasts == ("T1", "T2")
    assert told.to_dict() == {"dice": {"T1": [0.7, 0.8], "T2": [0.5, 0.6]}, "contrasts": ["T1", "T2"]}


@pytest.mark.parametrize("card", ["a text", ["made_for"], 3, None])
def test_a_card_that_is_none_is_empty(tmp_path, card):
    path = saved(tmp_path / "a.safetensors", card={"a": 1})
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["fastsrgan"]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"fastsrgan": json.dumps(header | {"card": card})})
    assert modelfile.read_header(path).card == {} and header["card"] == {"a": 1}


def test_of_three_averaged_weights_one_that_says_otherwise_is_enough():
    one = Purpose(contrast="T1", ages="adults")
    assert common([one, one, replace(one, ages="old")]) == Purpose(contrast="T1")
    assert common([one]) == one


# --- precisions -------------------------------------------------------------------------------------------------------


def test_a_precision_that_is_left_open_is_the_devices(caplog):
    arithmetic._warn_once.cache_clear()
    assert arithmetic.pick_precision("auto", CUDA) == "fp16" and arithmetic.pick_precision("auto", CPU) == "fp32"
    for name in ("fp32", "bf16", "fp16"):
        assert arithmetic.pick_precision(name, CUDA) == name
    assert not caplog.records
    for _ in range(2):
        assert arithmetic.pick_precision("bf16", CPU) == "bf16" and arithmetic.pick_precision("fp32", CPU) == "fp32"
    assert [message[:21] for message in caplog.messages] == ["bf16 is slower than f"]  # once
    with pytest.raises(UsageError, match=r"precision: 'int8' is not allowed \(auto, fp32, bf16, fp16"):
        arithmetic.pick_precision("int8", CPU)


@pytest.mark.parametrize(
    ("features", "found"),
    [
        ({}, (True, False, False)),
        ({"avx512_bf16": True}, (True, True, False)),
        ({"amx_bf16": True, "avx512_fp16": False}, (True, True, False)),
        ({"avx512_fp16": True}, (True, False, True)),
        ({"amx_fp16": True, "bf16": True}, (True, True, True)),
    ],
)
def test_a_processor_has_the_precisions_that_its_instructions_say(monkeypatch, features, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert tuple(arithmetic.native(name) for name in ("fp32", "bf16", "fp16")) == found


def test_of_two_differences_the_worse_counts_and_nan_is_the_worst():
    nan = float("nan")
    assert arithmetic._worse(1.0, 2.0) == arithmetic._worse(2.0, 1.0) == 2.0
    assert arithmetic._worse(nan, 1.0) != 1.0 and arithmetic._worse(1.0, nan) != 1.0
    one, other = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert arithmetic.relative(one, other) == pytest.approx(5 / 4) and arithmetic.relative(0 * one, 0 * one) == 0


def test_a_layout_is_that_of_the_weights_and_flags_are_what_they_were():
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    for innermost, tf32 in ((False, True), (True, False)):
        made = arithmetic.Arithmetic(CPU, channels_last=innermost, tf32=tf32)
        network = build_generator(GeneratorSpec(kernel=4), seed=1)
        made.arrange(network)
        assert network.down1.is_contiguous(memory_format=torch.channels_last_3d) == innermost
        with pytest.raises(ZeroDivisionError), made.flags():
            assert [place.allow_tf32 for place in places] == [tf32] * 2
            raise ZeroDivisionError
        assert [place.allow_tf32 for place in places] == before


# --- forms of layers --------------------------------------------------------------------------------------------------


def test_layers_that_share_a_timing_have_one_name():
    weight = torch.ones(8, 4, 3, 3, 3)
    names = [forms.layer_name("conv3", shape, weight) for shape in (
        (2, 4, 16, 16, 16), (3, 4, 13, 15, 16), (1, 4, 16, 16, 16), (2, 4, 17, 16, 300))]  # fmt: skip
    assert names == ["conv3 4>8 16x16x16"] * 2 + ["conv3 4>8 16x16x16 one", "conv3 4>8 24x16x256"]
