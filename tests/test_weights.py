"""Weight files: what goes in comes out, the original's layout, and everything that must be refused."""

import errno
import hashlib
import json
import logging
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from damage import Canary
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fastsrgan.errors import ModelError, ResourceError, UsageError
from fastsrgan.model import keras as keras_h5
from fastsrgan.model import safetensors as modelfile
from fastsrgan.model import weights
from fastsrgan.model.networks import Critic, CriticSpec, GeneratorSpec, build_generator, check_limits

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("weights_*.h5"), key=lambda p: p.name)
PLAIN = GOLDEN / "weights_residual_mask3.h5"  # the smallest with a critic
CONV2 = "G/G_gen_conv2/kernel:0"

SPECS = st.builds(
    GeneratorSpec,
    network=st.sampled_from(["plain", "unet"]),
    kernel=st.integers(1, 2),
    residual=st.booleans(),
    conditional=st.booleans(),
    mask_classes=st.integers(0, 3),
)


def random_generator(spec, seed=0):
    generator = build_generator(spec, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    for parameter in generator.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draws)
    return generator.eval()


def equal_networks(a, b):
    """Equal specs and equal bits."""
    if a.spec != b.spec:
        return False
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def contents(path):
    """Every object of an HDF5 file: kind, attributes with their HDF5 types, bytes, in the order of traversal."""
    found = {}

    def note(name, item):
        kinds = {k: h5py.h5a.open(item.id, k.encode()).get_type().encode() for k in item.attrs}
        values = {k: np.asarray(v).tolist() for k, v in item.attrs.items()}
        data = (item.dtype.str, item.shape, item[()].tobytes()) if isinstance(item, h5py.Dataset) else None
        found[name] = (type(item), kinds, values, data)

    with h5py.File(path) as file:
        note("/", file)
        file.visititems(note)
    return found


def edited(tmp_path, change, source=PLAIN):
    """A copy of a golden file after ``change(file)``."""
    path = tmp_path / "edited.h5"
    shutil.copyfile(source, path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replace(name, **options):
    """A change: the dataset ``name`` made anew with the options of create_dataset."""

    def change(file):
        options.setdefault("dtype", "f4")
        del file[name]
        file.create_dataset(name, **options)

    return change


# --- the original's files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [*FILES, GOLDEN / "losses" / "before.h5"], ids=lambda p: p.stem)
def test_export_gives_the_originals_file_back(tmp_path, source):
    """Names, order, attributes, types and bits, directly and by way of safetensors."""
    direct = weights.export_keras(source, tmp_path / "direct")
    imported = weights.import_keras(source, tmp_path / "imported.safetensors")
    again = weights.export_keras(imported, tmp_path / "again.h5")
    wanted = contents(source)
    for path in (direct, again):
        got = contents(path)
        assert list(got) == list(wanted)
        assert got == wanted


def test_exports_are_readable_by_old_hdf5_libraries(tmp_path):
    head = GOLDEN.joinpath("weights_cond.h5").read_bytes()[:9]
    assert weights.export_keras(PLAIN, tmp_path / "x").read_bytes()[:9] == head  # superblock version 0


@settings(max_examples=6, deadline=None)
@given(SPECS, st.sampled_from([None, 16, 32, 64, 128]), st.integers(0, 99))
def test_networks_survive_both_formats(tmp_path_factory, spec, patch, seed):
    folder = tmp_path_factory.mktemp("formats")
    generator = random_generator(spec, seed)
    critic = Critic(CriticSpec(1, patch, spec.out_channels, spec.conditional), seed) if patch else None
    native = weights.save_generator(folder / "a.safetensors", generator, critic, {"figure": 30.5})
    keras = weights.export_keras(native, folder / "a")
    for path in (native, keras):
        assert equal_networks(weights.load_generator(path), generator)
        if critic:
            assert equal_networks(weights.load_critic(path), critic)
        else:
            with pytest.raises(ModelError, match="holds no critic"):
                weights.load_critic(path)
        assert weights.read_spec(path) == (spec, critic.spec if critic else None)


def test_names_of_a_network_built_twice_are_understood(tmp_path):
    """TensorFlow puts _1 behind the layers of a second network in one process."""

    def rename(file):
        for group in ("G", "DX"):
            for layer in list(file[group]):
                file[group].move(layer, layer + "_1")

    assert equal_networks(weights.load_generator(edited(tmp_path, rename)), weights.load_generator(PLAIN))
    assert equal_networks(weights.load_critic(edited(tmp_path, rename)), weights.load_critic(PLAIN))


def test_the_empty_group_of_newer_keras_is_ignored(tmp_path):
    path = edited(tmp_path, lambda f: f.create_group("top_level_model_weights"))
    assert equal_networks(weights.load_generator(path), weights.load_generator(PLAIN))


def test_compressed_and_double_precision_arrays_are_read(tmp_path):
    with h5py.File(PLAIN) as file:
        array = file[CONV2][()]
    for dtype, options in (("f8", {}), ("f4", {"compression": "gzip", "shuffle": True, "chunks": True})):
        path = edited(tmp_path, replace(CONV2, data=array.astype(dtype), dtype=dtype, **options))
        assert equal_networks(weights.load_generator(path), weights.load_generator(PLAIN))


def test_a_critic_of_another_depth_is_exported_with_a_note(tmp_path, caplog):
    native = weights.save_generator(
        tmp_path / "a.safetensors", build_generator(GeneratorSpec(kernel=1)), Critic(CriticSpec(1, 32))
    )
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        weights.export_keras(native, tmp_path / "a")
    assert ["the critic has 4 layers" in m for m in caplog.messages] == [True]


def test_what_exists_is_kept(tmp_path):
    target = tmp_path / "x"
    target.write_bytes(b"precious")
    for convert in (weights.import_keras, weights.export_keras):
        with pytest.raises(UsageError, match="exists already"):
            convert(PLAIN, target)
        assert target.read_bytes() == b"precious"
        with pytest.raises(UsageError, match="is no weight file, it is kept"):
            convert(PLAIN, target, overwrite=True)
        assert target.read_bytes() == b"precious"
    for before in (b"", PLAIN.read_bytes()):
        target.write_bytes(before)
        weights.import_keras(PLAIN, target, overwrite=True)
        assert equal_networks(weights.load_generator(target), weights.load_generator(PLAIN))


def test_weights_are_not_written_over_what_they_are_made_of(tmp_path):
    """``weights import FILE FILE --overwrite`` put safetensors in the place of the original's file."""
    source, native = tmp_path / "a.h5", tmp_path / "a.safetensors"
    source.write_bytes(PLAIN.read_bytes())
    weights.import_keras(source, native)
    for convert, path in ((weights.import_keras, source), (weights.export_keras, native)):
        before = path.read_bytes()
        with pytest.raises(UsageError, match="is an input and would be overwritten"):
            convert(path, path, overwrite=True)
        assert path.read_bytes() == before


def test_import_takes_keras_files_only(tmp_path):
    native = weights.save_generator(tmp_path / "a.safetensors", build_generator(GeneratorSpec(kernel=1)))
    with pytest.raises(ModelError, match="no Keras HDF5 file"):
        weights.import_keras(native, tmp_path / "b.safetensors")


# --- our own files ------------------------------------------------------------------------------------------------


def test_equal_networks_give_equal_bytes(tmp_path):
    one, two = (
        weights.save_generator(tmp_path / n, random_generator(GeneratorSpec(kernel=2)), card={"b": 1, "a": 2})
        for n in "ab"
    )
    assert one.read_bytes() == two.read_bytes()


def test_loaded_networks_are_ready_for_use_and_for_training(tmp_path):
    for path in (PLAIN, weights.import_keras(PLAIN, tmp_path / "a.safetensors")):
        for network in (weights.load_generator(path, "reference"), weights.load_critic(path)):
            assert not network.training
            for parameter in network.parameters():
                assert parameter.requires_grad
                assert (parameter.device.type, parameter.dtype) == ("cpu", torch.float32)
                assert parameter.is_contiguous()
        assert weights.load_generator(path, "reference").form == "reference"
    with pytest.raises(ModelError, match="quick"):
        weights.load_generator(PLAIN, "quick")


def test_a_loaded_network_does_not_depend_on_its_file(tmp_path):
    path = weights.import_keras(PLAIN, tmp_path / "a.safetensors")
    generator = weights.load_generator(path)
    with open(path, "r+b") as file:
        file.seek(2000)
        file.write(bytes(4000))
    assert equal_networks(generator, weights.load_generator(PLAIN))


def test_the_moving_average_is_preferred(tmp_path):
    spec = GeneratorSpec(kernel=1)
    generator, average = random_generator(spec, 1), random_generator(spec, 2)
    for ema in (average, dict(average.named_parameters())):
        path = weights.save_generator(tmp_path / "a.safetensors", generator, ema=ema)
        assert equal_networks(weights.load_generator(path), average)
        assert equal_networks(weights.load_generator(path, ema=False), generator)
    assert equal_networks(weights.load_generator(weights.export_keras(path, tmp_path / "e")), average)
    assert equal_networks(weights.load_generator(weights.export_keras(path, tmp_path / "g", ema=False)), generator)
    assert weights.info(path)["ema"]


def test_half_precision_networks_are_stored_as_float32(tmp_path):
    generator = random_generator(GeneratorSpec(kernel=1)).bfloat16()
    loaded = weights.load_generator(weights.save_generator(tmp_path / "a.safetensors", generator))
    assert equal_networks(loaded, generator.float())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


def test_the_sum_is_of_all_bytes_of_a_large_file(tmp_path):
    path = weights.save_generator(tmp_path / "a.safetensors", build_generator(GeneratorSpec(kernel=8)))
    assert path.stat().st_size > 2**20  # more than what is read at a time
    modelfile.check_sum(path)
    for place in (-1, -(2**18)):
        changed = bytearray(path.read_bytes())
        changed[place] ^= 1
        (tmp_path / "b.safetensors").write_bytes(changed)
        with pytest.raises(ModelError, match="differs from the SHA-256"):
            modelfile.check_sum(tmp_path / "b.safetensors")


def test_info_tells_what_a_file_holds(tmp_path):
    keras = weights.info(GOLDEN / "weights_u_net_cond.h5")
    assert (keras["kind"], keras["critic"], keras["parameters"]) == ("keras", None, 11124)
    noted = {path.stem for path in GOLDEN.glob("weights_*.h5") if weights.info(path)["notes"]}
    assert noted == {"weights_u_net_cond"} and "third" in keras["notes"][0]  # the one that computes otherwise there
    native = weights.info(weights.import_keras(PLAIN, tmp_path / "a.safetensors"))
    assert native["kind"] == "safetensors"
    assert native["generator"] == {
        "network": "plain",
        "kernel": 2,
        "residual": True,
        "conditional": False,
        "mask_classes": 3,
        "scaled": False,
    }
    assert native["critic"]["in_channels"] == 5
    assert native["card"]["converted_sha256"] == hashlib.sha256(PLAIN.read_bytes()).hexdigest()
    assert native["parameters"] == sum(p.numel() for p in weights.load_generator(PLAIN).parameters())
    assert native["critic_parameters"] == sum(p.numel() for p in weights.load_critic(PLAIN).parameters())
    json.dumps(native)


def test_names_of_shipped_models_stand_for_their_files(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"'adult' is missing.*reinstall"):
        weights.default_weights()
    made = {}
    for kernel, (name, model) in enumerate(weights.MODELS.items(), 1):
        made[name] = random_generator(GeneratorSpec(kernel=kernel))
        weights.save_generator(tmp_path / model.file, made[name])
    for name, generator in made.items():
        loaded = weights.load_generator(name)
        assert loaded.spec == generator.spec and torch.equal(loaded.stem[0], generator.stem[0])
    assert weights.load_generator().spec.kernel == 1
    with caplog.at_level("INFO", "fastsrgan"):
        assert weights.default_weights() == tmp_path / weights.MODELS["adult"].file
    assert "adult" in caplog.text and "perinatal" in caplog.text
    # A folder of that name without weights is a folder of something else, such as scans.
    (tmp_path / "adult" / "scans").mkdir(parents=True)
    assert weights.load_generator("adult").spec.kernel == 1
    # Weights of that name are what a path is everywhere else.
    weights.save_generator(tmp_path / "perinatal", random_generator(GeneratorSpec(kernel=5)))
    assert weights.load_generator("perinatal").spec.kernel == 5
    weights.save_generator(tmp_path / "adult" / "best.safetensors", random_generator(GeneratorSpec(kernel=6)))
    assert weights.load_generator("adult").spec.kernel == 6
    with pytest.raises(ModelError, match=r"newborn: no such file.*adult, perinatal"):
        weights.load_generator("newborn")


def test_a_failed_write_leaves_the_file_before_it(tmp_path, monkeypatch):
    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    native = weights.import_keras(PLAIN, tmp_path / "a.safetensors")
    keras = weights.export_keras(PLAIN, tmp_path / "a")
    before = {p: p.read_bytes() for p in (native, keras)}
    monkeypatch.setattr(Path, "write_bytes", full)
    generator = random_generator(GeneratorSpec(kernel=1))
    with pytest.raises(ResourceError, match="no space left"):
        weights.save_generator(native, generator)
    with pytest.raises(ResourceError, match="no space left"):
        weights.export_keras(PLAIN, keras, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_missing_folder_is_named(tmp_path):
    for save in (
        lambda p: weights.save_generator(p, build_generator(GeneratorSpec(kernel=1))),
        lambda p: weights.export_keras(PLAIN, p),
    ):
        with pytest.raises(ResourceError, match="folder is missing"):
            save(tmp_path / "nowhere" / "x")


# --- snapshots of a training --------------------------------------------------------------------------------------


def snapshot(folder, seed, **manifest):
    """A snapshot folder as a training leaves it."""
    folder.mkdir(parents=True)
    generator = random_generator(GeneratorSpec(kernel=1), seed)
    model = weights.save_generator(folder / "model.safetensors", generator, Critic(CriticSpec(1, 16), seed))
    (folder / "state.pt").write_bytes(b"not looked at")
    entry = {"sha256": hashlib.sha256(model.read_bytes()).hexdigest(), "bytes": model.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": entry}, **manifest}))
    return generator


def flip(path, at=-5):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_the_moving_average_of_a_snapshot_is_what_a_run_is_used_with(tmp_path):
    """Of a run folder, of its checkpoints, of a snapshot alone; a snapshot goes on with both."""
    generator = snapshot(tmp_path / "checkpoints" / "step-00000020", 1)
    average = random_generator(generator.spec, 2)
    model = weights.save_generator(tmp_path / "m.safetensors", generator, Critic(CriticSpec(1, 16), 1), ema=average)
    folder = tmp_path / "checkpoints" / "step-00000020"
    entry = {"sha256": hashlib.sha256(model.read_bytes()).hexdigest(), "bytes": model.stat().st_size}
    model.replace(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": entry}}))
    for path in (tmp_path, tmp_path / "checkpoints", folder, folder / "model.safetensors"):
        assert equal_networks(weights.load_generator(path), average)
        assert equal_networks(weights.load_generator(path, ema=False), generator)


def test_a_run_gives_its_newest_snapshot(tmp_path, caplog):
    checkpoints = tmp_path / "checkpoints"
    generators = [snapshot(checkpoints / f"epoch-{n:04d}", n) for n in (2, 10, 9)]
    (checkpoints / "epoch-0099").mkdir()  # without manifest: passed over, with a warning
    (checkpoints / ".epoch-0098.tmp-1-2").mkdir()
    for path in (tmp_path, checkpoints, checkpoints / "epoch-0010"):
        assert equal_networks(weights.load_generator(path), generators[1])
    assert equal_networks(weights.load_generator(checkpoints / "epoch-0002"), generators[0])
    assert weights.info(tmp_path)["file"] == str(checkpoints / "epoch-0010" / "model.safetensors")
    flip(checkpoints / "epoch-0010" / "model.safetensors")
    with caplog.at_level(logging.WARNING, "fastsrgan"):
        assert equal_networks(weights.load_generator(tmp_path), generators[2])
    assert "epoch-0099" in caplog.messages[-2] and "epoch-0010" in caplog.messages[-1]
    with pytest.raises(ModelError, match="SHA-256"):
        weights.load_generator(checkpoints / "epoch-0010")
    for n in (2, 9):
        flip(checkpoints / f"epoch-{n:04d}" / "model.safetensors")
    with pytest.raises(ModelError, match="no snapshot of 4 is whole"):
        weights.load_critic(tmp_path)


def test_a_run_gives_its_best_and_others_by_name(tmp_path, caplog):
    generators = {n: snapshot(tmp_path / "checkpoints" / f"step-{n:08d}", n) for n in (20, 40)}
    best = random_generator(GeneratorSpec(kernel=1), 7)
    weights.save_generator(tmp_path / "best.safetensors", best)
    with caplog.at_level(logging.INFO, "fastsrgan"):
        assert equal_networks(weights.load_generator(tmp_path), best)
    assert f"{tmp_path}: weights of {tmp_path / 'best.safetensors'}" in caplog.text
    assert weights.info(tmp_path)["file"] == str(tmp_path / "best.safetensors")
    wanted = {"best": best, "last": generators[40], "20": generators[20]}
    for which, generator in wanted.items():
        assert equal_networks(weights.load_generator(weights.of_run(tmp_path, which)), generator)
    with pytest.raises(ModelError, match=r"no snapshot of 30 updates \(there are: 20, 40"):
        weights.of_run(tmp_path, "30")
    (tmp_path / "best.safetensors").unlink()
    assert equal_networks(weights.load_generator(tmp_path), generators[40])  # where no validation ended
    with pytest.raises(ModelError, match="--checkpoint last"):
        weights.of_run(tmp_path, "best")
    for path, which in ((tmp_path, "first"), (PLAIN, "last")):
        with pytest.raises(UsageError):
            weights.of_run(path, which)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"files": 3}', '{"files": {}}', "[" * 100_000])
def test_damaged_manifests(tmp_path, text):
    snapshot(tmp_path / "epoch-0001", 1)
    (tmp_path / "epoch-0001" / "manifest.json").write_text(text)
    for path in (tmp_path, tmp_path / "epoch-0001"):
        with pytest.raises(ModelError):
            weights.load_generator(path)


def test_a_folder_without_snapshots(tmp_path):
    with pytest.raises(ModelError, match="no snapshot in this folder"):
        weights.load_generator(tmp_path)


# --- files that are something else --------------------------------------------------------------------------------


@pytest.mark.fault(17)
@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.pkl", "x", "x.safetensors", "x.h5"])
@pytest.mark.parametrize("kind", ["protocol 0", "protocol 4", "torch"])
def test_pickles_are_never_executed(tmp_path, name, kind):
    path, canary = tmp_path / name, tmp_path / "canary"
    if kind == "torch":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Canary(canary)))
    else:
        path.write_bytes(pickle.dumps(Canary(canary), protocol=int(kind[-1])))
    for use in (weights.load_generator, weights.load_critic, weights.info, weights.read_spec):
        with pytest.raises(ModelError) as error:
            use(path)
        assert error.value.exit_code == 4
        if kind != "protocol 0" or name.endswith(("pt", "pth", "pkl")):
            assert "pickle" in str(error.value)
            assert "safetensors" in str(error.value)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello, I am no model", "neither Keras HDF5 nor safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ],
)
def test_other_files(tmp_path, data, words):
    path = tmp_path / "x.h5"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=words):
        weights.load_generator(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere.h5: no such file"):
        weights.load_generator(tmp_path / "nowhere.h5")


# --- HDF5 that must be refused ------------------------------------------------------------------------------------


def external_link(file):
    outside = Path(file.filename).with_name("outside.h5")
    with h5py.File(outside, "w") as other:
        other[CONV2] = file[CONV2][()]
    del file[CONV2]
    file[CONV2] = h5py.ExternalLink(outside.name, CONV2)


def external_group(file):
    shutil.copyfile(PLAIN, Path(file.filename).with_name("outside.h5"))
    del file["G"]
    file["G"] = h5py.ExternalLink("outside.h5", "/G")


def external_storage(file):
    shape = file[CONV2].shape
    outside = Path(file.filename).with_name("secret.bin")
    outside.write_bytes(bytes(4 * int(np.prod(shape))))
    replace(CONV2, shape=shape, external=[(str(outside), 0, h5py.h5f.UNLIMITED)])(file)


def virtual(file):
    layout = h5py.VirtualLayout(file[CONV2].shape, "f4")
    layout[:] = h5py.VirtualSource(str(PLAIN), CONV2, shape=file[CONV2].shape)
    del file[CONV2]
    file.create_virtual_dataset(CONV2, layout)


def soft_link(file):
    del file[CONV2]
    file[CONV2] = h5py.SoftLink("/G/G_gen_conv1/kernel:0")


def cycle(file):
    file["G/G_gen_conv1/again"] = file["G"]


def many_groups(file):
    for i in range(300):
        file.create_group(f"G/extra{i}")


def ballast(file):
    file.attrs.create("layer_names", np.zeros(2**22, "S5"))


def an_array_too_many(file):
    file["G"].create_group("ballast").create_dataset("x", data=np.zeros(2**22, "f8"))


def not_finite(value):
    def change(file):
        file["DX/DX_conv_dis_2/bias:0"][0] = value
        file[CONV2][1, 2, 0, 1, 1] = value

    return change


HUGE = 2**40  # float32: 4 TiB
REFUSED = {
    "external link": (external_link, "link to another file"),
    "external group": (external_group, "link to another file"),
    "external storage": (external_storage, "stored in another file"),
    "virtual dataset": (virtual, "stored in another file"),
    "soft link": (soft_link, "soft link"),
    "dangling soft link": (lambda f: f.__setitem__("G/away", h5py.SoftLink("/nowhere")), "soft link"),
    "cycle": (cycle, "no array"),
    "many groups": (many_groups, "entries"),
    "4 TiB": (replace(CONV2, shape=(3, 3, 3, 2, HUGE // 54)), "kernel 2 .* needs 3 x 3 x 3 x 2 x 4"),
    "4 TiB stem": (replace("G/G_gen_conv1/kernel:0", shape=(7, 7, 7, 1, HUGE // 343)), "declares kernel"),
    "4 TiB head": (replace("G/G_gen_1conv/kernel:0", shape=(7, 7, 7, 2, HUGE // 686)), "declares mask_classes"),
    "4 TiB in chunks": (
        replace(CONV2, shape=(3, 3, 3, 2, HUGE // 54), chunks=(3, 3, 3, 2, 1)),
        "needs 3 x 3 x 3 x 2 x 4",
    ),
    "huge chunks": (
        replace(CONV2, shape=(3, 3, 3, 2, 4), chunks=(3, 3, 3, 2, 2**20), maxshape=(3, 3, 3, 2, None)),
        "chunk",
    ),
    "never written": (replace(CONV2, shape=(3, 3, 3, 2, 4)), "never written"),
    "integers": (replace(CONV2, data=np.ones((3, 3, 3, 2, 4), "i4"), dtype="i4"), "floating-point"),
    "text": (replace(CONV2, data=np.zeros((3, 3, 3, 2, 4), "S4"), dtype="S4"), "floating-point"),
    "wrong shape": (
        replace(CONV2, data=np.ones((3, 3, 3, 2, 5))),
        r"conv2/kernel:0 is 3 x 3 x 3 x 2 x 5 .*needs 3 x 3 x 3 x 2 x 4",
    ),
    "wrong axes": (
        replace("G/G_gen_conv1/kernel:0", data=np.ones((2, 1, 7, 7, 7))),
        "conv1/kernel:0 is 2 x 1 x 7 x 7 x 7",
    ),
    "two inputs": (replace("G/G_gen_conv1/kernel:0", data=np.ones((7, 7, 7, 2, 2))), "has 2 inputs"),
    "one output": (replace("G/G_gen_1conv/kernel:0", data=np.ones((7, 7, 7, 2, 1))), "has 1 outputs"),
    "critic inputs": (replace("DX/DX_conv_dis_1/kernel:0", data=np.ones((4, 4, 4, 4, 1))), "needs 4 x 4 x 4 x 5 x 1"),
    "missing layer": (lambda f: f.__delitem__("G/G_gen_block3_conv_a"), "block3_conv_a/kernel:0 is missing"),
    "missing array": (lambda f: f.__delitem__("G/G_gen_isnorm_conv1/shift:0"), "isnorm_conv1/shift:0 is missing"),
    "a layer too many": (lambda f: f.copy("G/G_gen_conv3", f["G"], "G_gen_conv4"), "1 array in G"),
    "a group is an array": (lambda f: (f.__delitem__("G"), f.create_dataset("G", data=[1.0])), "at the root"),
    "no generator": (lambda f: f.__delitem__("G"), "no SegSRGAN weight file, its groups are 'DX', 'input_im_gen' "),
    "two generators": (
        lambda f: f.copy("G", f, "G_cond"),
        "no SegSRGAN weight file, its groups are 'DX', 'G', 'G_cond', 'input_im_gen' ",
    ),
    "two critics": (lambda f: f.copy("DX", f, "DX_cond"), "no SegSRGAN weight file"),
    "nothing": (lambda f: f.clear(), r"no SegSRGAN weight file, its groups are none \("),
    "another model": (lambda f: f.move("G", "model_1"), "no SegSRGAN weight file.*'model_1'"),
    "another network": (lambda f: f.move("G", "G_unet"), "G_unet_gen_conv1/kernel:0 is missing"),
    "NaN": (not_finite(np.nan), "G_gen_conv2/kernel:0 holds 1 NaN"),
    "infinity": (not_finite(-np.inf), "G_gen_conv2/kernel:0 holds 1 NaN or infinite"),
    "an array too many": (an_array_too_many, "1 array in G"),
}


@pytest.mark.fault(18)
@pytest.mark.parametrize("fault", REFUSED)
def test_keras_files_that_are_refused(tmp_path, fault):
    """With the error of bad weights, its reason, and without taking memory for what a file claims."""
    change, words = REFUSED[fault]
    path = edited(tmp_path, change)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=words) as error:
            weights.load_generator(path)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_critic_that_diverged_does_not_forbid_the_generator(tmp_path):
    path = edited(tmp_path, lambda f: f["DX/DX_conv_dis_2/bias:0"].__setitem__(0, np.nan))
    assert equal_networks(weights.load_generator(path), weights.load_generator(PLAIN))
    with pytest.raises(ModelError, match="DX_conv_dis_2/bias:0 holds 1 NaN"):
        weights.load_critic(path)


@pytest.mark.fault(18)
def test_huge_attributes_are_not_read(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(PLAIN) as source, h5py.File(path, "w", libver="latest") as file:
        for name in source:
            source.copy(name, file)
        ballast(file)  # 20 MiB
    with pytest.raises(ModelError, match="20 MiB beside the weights"):
        weights.load_generator(path)


@pytest.mark.fault(16)
def test_truncated_keras_files_are_refused(tmp_path):
    data = PLAIN.read_bytes()
    path = tmp_path / "x.h5"
    for length in [8, 9, 50, 96, 600, *range(1000, len(data), 23_456), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ModelError, match="damaged or truncated"):
            weights.load_generator(path)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_never_end_in_another_error(tmp_path_factory, changes):
    """HDF5 has no checksums here, so some changes pass; the ones that do not are ModelErrors."""
    data = bytearray(PLAIN.read_bytes())
    for at, value in changes:
        data[at] = value
    path = tmp_path_factory.getbasetemp() / "changed.h5"
    path.write_bytes(data)
    try:
        network = weights.load_generator(path)
    except ModelError:
        return
    assert all(torch.isfinite(p).all() for p in network.parameters())


# --- safetensors that must be refused -----------------------------------------------------------------------------


@pytest.fixture
def native(tmp_path):
    return weights.import_keras(PLAIN, tmp_path / "a.safetensors")


def with_header(path, change, body=None):
    """The file with its JSON header changed and the length in front corrected."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (data[8 + length :] if body is None else body))
    return path


def set_entry(name, **values):
    return lambda header: header[name].update(values)


def set_meta(**values):
    def change(header):
        meta = json.loads(header["__metadata__"]["fastsrgan"])
        for key, value in values.items():
            meta[key] = {**meta[key], **value} if isinstance(value, dict) else value
        header["__metadata__"]["fastsrgan"] = json.dumps(meta)

    return change


def renamed(old, new):
    return lambda header: {new if k == old else k: v for k, v in header.items()}


LIES = {
    "offsets behind the end": (set_entry("generator.stem", data_offsets=[0, 2**40]), "damaged"),
    "shape of 4 TiB": (set_entry("generator.stem", shape=[2**40]), "damaged"),
    "shape that overflows": (set_entry("generator.stem", shape=[2**40, 2**40]), "damaged"),
    "negative shape": (set_entry("generator.stem", shape=[-2, -1, 7, 7, 7]), "damaged"),
    "unknown type": (set_entry("generator.stem", dtype="F1"), "damaged"),
    "integers": (set_entry("generator.stem", dtype="I32"), "type I32"),
    "other axes": (set_entry("generator.stem", shape=[1, 2, 7, 7, 7]), "generator.stem is 1 x 2 x .* needs 2 x 1 x 7"),
    "no metadata": (lambda h: h.pop("__metadata__") and None, "not of fastsrgan"),
    "metadata without us": (lambda h: h["__metadata__"].update(fastsrgan="{") or None, "no JSON"),
    "deep metadata": (lambda h: h["__metadata__"].update(fastsrgan="[" * 100_000) or None, "no JSON"),
    "metadata is a list": (lambda h: h["__metadata__"].update(fastsrgan="[1]") or None, "format"),
    "newer format": (set_meta(format=99), "newer fastsrgan"),
    "no generator": (set_meta(generator=None), "no GeneratorSpec"),
    "unknown key": (set_meta(generator={"depth": 3}), "'depth'"),
    "text for a number": (set_meta(generator={"kernel": "2"}), "kernel is '2'"),
    "truth for a number": (set_meta(generator={"kernel": True}), "kernel is 'True'"),
    "huge kernel": (set_meta(generator={"kernel": 10**9}), "declares kernel"),
    "kernel beyond int64": (set_meta(generator={"kernel": 10**30}), "declares kernel"),
    "no kernel": (set_meta(generator={"kernel": 0}), "kernel 0"),
    "another kernel": (
        set_meta(generator={"kernel": 3}),
        "generator.stem is 2 x 1 x 7 x 7 x 7 .*kernel 3.* needs 3 x 1",
    ),
    "another network": (
        set_meta(generator={"network": "unet"}),
        "generator.up2 is 2 x 4 x 3 x 3 x 3 .*unet.* needs 2 x 8",
    ),
    "unknown network": (set_meta(generator={"network": "vit"}), "unknown generator 'vit'"),
    "huge critic": (set_meta(critic={"patch": 2**40}), "declares patch"),
    "another critic": (set_meta(critic={"patch": 16}), "critic.decision is 1 x 16 .* needs 1 x 4"),
    "missing tensor": (renamed("generator.down1", "other.down1"), "generator.down1 is missing"),
    "foreign tensor": (renamed("critic.decision", "generator.decision"), "belongs to no layer"),
}


@pytest.mark.fault(16)
@pytest.mark.parametrize("lie", LIES)
def test_safetensors_whose_header_lies(native, lie):
    change, words = LIES[lie]
    path = with_header(native, change)
    for use in (weights.load_generator, weights.info):
        with pytest.raises(ModelError, match=words) as error:
            use(path)
        assert error.value.exit_code == 4
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_safetensors_with_a_false_header_length(native, length):
    data = native.read_bytes()
    native.write_bytes(struct.pack("<Q", length) + data[8:])
    with pytest.raises(ModelError, match="damaged"):
        weights.load_generator(native)


@pytest.mark.fault(16)
def test_truncated_safetensors_are_refused(native):
    data = native.read_bytes()
    for length in [9, 100, 4000, len(data) // 2, len(data) - 1]:
        native.write_bytes(data[:length])
        with pytest.raises(ModelError, match="damaged"):
            weights.load_generator(native)


@pytest.mark.fault(16)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_safetensors_with_weights_that_are_not_finite(tmp_path, value):
    generator = random_generator(GeneratorSpec(kernel=1))
    with torch.no_grad():
        generator.down1[0, 0, 1, 1, 1] = value
    path = weights.save_generator(tmp_path / "a.safetensors", generator)
    with pytest.raises(ModelError, match=r"generator.down1 holds 1 NaN or infinite"):
        weights.load_generator(path)


def test_limits_hold_for_every_network_of_the_original():
    """A network as large as anybody trains is far below what is refused."""
    check_limits("x", GeneratorSpec(kernel=64, mask_classes=40))
    check_limits("x", CriticSpec(128, 256, 42))
    assert 2 * len(keras_h5.weight_names(GeneratorSpec())) < keras_h5.MAX_LINKS


def test_a_scaled_generator_is_not_exported_to_the_original(tmp_path):
    weights.save_generator(tmp_path / "w.safetensors", build_generator(GeneratorSpec(kernel=2, scaled=True)))
    assert weights.load_generator(tmp_path / "w.safetensors").spec.scaled
    with pytest.raises(ModelError, match="scaled by the gradient"):
        weights.export_keras(tmp_path / "w.safetensors", tmp_path / "w.h5")
    assert not (tmp_path / "w.h5").exists()
