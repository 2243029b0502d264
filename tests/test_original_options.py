"""Every option of the original's two scripts, one row each: names, short forms, defaults, values.

The rows are the original's own. They are parsed through the real parser; two tiny trainings at the end see
that options and files of the original mean what they meant.
"""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from spies import NOTHING_TRAINED

from fastsrgan.cli import job_model as cli_job
from fastsrgan.cli import main as cli
from fastsrgan.cli import train as cli_train
from fastsrgan.config import TrainConfig, from_yaml
from fastsrgan.errors import UsageError
from fastsrgan.io import nifti as images
from fastsrgan.io.image_list import LISTS
from fastsrgan.model import checkpoint, weights
from fastsrgan.store.reader import open_store
from fastsrgan.train import run as training
from fastsrgan.train.gan import Models
from fastsrgan.train.validate import validation_sums

ROOT = Path(__file__).parent.parent
KERAS = Path(__file__).parent / "golden" / "weights_residual_mask3.h5"
NEEDED = ["-csv", "t.csv", "-sf", "snapshots", "-n", "0.5", "0.5", "3"]


def parse(*words):
    return cli.build_parser().parse_args(cli.normalised(["train", *map(str, words)]))


def settings(*words) -> TrainConfig:
    return cli_train.build_config(parse(*NEEDED, *words))


# Setting, names, default, a value as it is typed, and what it means.
SETTINGS = [
    ("epochs", ("-e", "--epoch"), 200, "17", 17),
    ("batch_size", ("-b", "--batch_size"), 16, "4", 4),
    ("snapshot", ("-s", "--snapshot"), 1, "5", 5),
    ("init_epoch", ("-i", "--init_epoch"), 1, "21", 21),
    ("kernel_gen", ("--kernel_gen",), 16, "8", 8),
    ("kernel_dis", ("--kernel_dis",), 32, "8", 8),
    ("lr_gen", ("--lrgen",), 1e-4, "0.001", 1e-3),
    ("lr_dis", ("--lrdis",), 1e-4, "0.001", 1e-3),
    ("lambda_rec", ("--lambrec",), 1.0, "2", 2.0),
    ("lambda_adv", ("--lambadv",), 1e-3, "0.01", 0.01),
    ("lambda_gp", ("--lambgp",), 10.0, "100", 100.0),
    ("critic_iterations", ("--number_of_disciminator_iteration",), 5, "3", 3),
    ("network", ("-u_net", "--u_net_generator"), "plain", "True", "unet"),
    ("conditional", ("-is_conditional", "--is_conditional"), False, "True", True),
    ("residual", ("-is_residual", "--is_residual"), True, "False", False),
    ("patch_size", ("-ps", "--patch_size"), 64, "32", 32),
    ("interp", ("-int", "--interp"), "scipy", "sitk", "sitk"),
    ("interpolation_type", ("-it", "--interpolation_type"), "Spline", "Lanczos", "Lanczos"),
    ("image_cropping_method", ("-icm", "--image_cropping_method"), "bounding_box", *["overlapping_with_mask"] * 2),
    ("fit_mask", ("-fm", "--fit_mask"), False, "True", True),
    ("reconstruction_loss", ("-rl", "--reconstruction_loss"), "charbonnier", "dice", "dice"),
    ("contrast_max", ("-contrast_max", "--contrast_max"), 0.5, "0.3", 0.3),
    ("noise", ("-percent_val_max", "--percent_val_max"), 0.03, "0.1", 0.1),
]
# Where it goes, names, default, a value, and what it means: options about files and machines.
OTHERS = [
    ("csv", ("-csv", "--csv"), None, "x.csv", "x.csv"),
    ("snapshot_folder", ("-sf", "--snapshot_folder"), None, "dir", "dir"),
    ("weights", ("-w", "--weights"), None, "SegSRGAN_epoch_20", "SegSRGAN_epoch_20"),
    ("dice_file", ("-dice", "--dice_file"), None, "d.csv", "d.csv"),
    ("mse_file", ("-mse", "--mse_file"), None, "m.csv", "m.csv"),
    ("folder_training_data", ("-folder_training_data", "--folder_training_data"), None, "tmp", "tmp"),
    ("multi_gpu", ("-multi_gpu", "--multi_gpu"), None, "True", True),
    ("base_path", ("-begining_path", "--base_path"), None, "/data", "/data"),
]
JOB = [
    ("table", ("-p", "--path"), None, "x.csv", "x.csv"),
    ("base_path", ("-dp", "--debut_path"), "", "/data", "/data"),
    ("patch", ("-pa", "--patch"), [128], "64,None", [64, None]),
    ("step", ("-s", "--step"), [[64]], "32 64,64 128", [[32, 64], [64, 128]]),
    ("result_folder_name", ("-rf", "--result_folder_name"), None, "N", "N"),
    ("weights_path", ("-wp", "--weights_path"), None, "w", "w"),
    ("by_batch", ("-bb", "--by_batch"), None, "True", True),
    ("new_resolution", ("-n", "--new_low_res"), (0.5, 0.5, 0.5), "1,1,0.7", (1.0, 1.0, 0.7)),
    ("interp", ("-int", "--interp"), "scipy", "sitk", "sitk"),
    ("interpolation_type", ("-it", "--interpolation_type"), "Spline", "Welch", "Welch"),
]


def every(rows):
    """One test case for each spelling of each option, ``-`` for ``_`` included."""
    cases = []
    for row in rows:
        names = [spelling for name in row[1] for spelling in dict.fromkeys([name, name.replace("_", "-")])]
        cases += [pytest.param(row[0], name, *row[2:], id=name) for name in names]
    return cases


@pytest.mark.parametrize(("setting", "name", "default", "typed", "meant"), every(SETTINGS))
def test_training_settings(setting, name, default, typed, meant):
    assert getattr(settings(), setting) == default
    assert getattr(settings(name, typed), setting) == meant
    assert getattr(settings(f"{name}={typed}"), setting) == meant if name.startswith("--") else True


@pytest.mark.parametrize(("where", "name", "default", "typed", "meant"), every(OTHERS))
def test_training_files_and_machines(where, name, default, typed, meant):
    assert getattr(parse(*NEEDED[-4:]), where) == default
    assert getattr(parse(*NEEDED[-4:], name, typed), where) == meant


@pytest.mark.parametrize(("argument", "name", "default", "typed", "meant"), every(JOB))
def test_job_model_options(argument, name, default, typed, meant):
    def parsed(*words):
        needed = [] if argument in ("table", "result_folder_name") else ["-p", "t.csv", "-rf", "name"]
        needed += {"table": ["-rf", "name"], "result_folder_name": ["-p", "t.csv"]}.get(argument, [])
        return cli_job.arguments(cli.build_parser().parse_args(cli.normalised(["job-model", *needed, *words])))

    if argument in ("table", "result_folder_name"):
        with pytest.raises(UsageError, match="required"):
            parsed()
    else:
        assert parsed()[argument] == default
    assert parsed(name, typed)[argument] == meant


@pytest.mark.parametrize("name", ["-n", "--new_low_res", "--new-low-res"])
def test_the_low_resolution_once_is_fixed_and_twice_are_bounds(name):
    command = ["-csv", "t.csv", "-sf", "s"]
    fixed = cli_train.build_config(parse(*command, name, 0.5, 0.5, 3))
    bounds = cli_train.build_config(parse(*command, name, 0.5, 0.5, 2, name, 0.5, 0.6, 4))
    assert fixed.new_low_res == ((0.5, 0.5, 3.0),)
    assert bounds.new_low_res == ((0.5, 0.5, 2.0), (0.5, 0.6, 4.0))
    with pytest.raises(UsageError, match="low resolution"):
        cli_train.build_config(parse(*command))
    with pytest.raises(UsageError, match="one or two triples"):
        cli_train.build_config(parse(*command, *[name, 1, 1, 3] * 3))


@pytest.mark.parametrize("name", ["-is_conditional", "-is_residual", "-fm", "-u_net", "-multi_gpu"])
@pytest.mark.parametrize(("text", "value"), [("True", True), ("False", False), ("true", True), ("0", False)])
def test_booleans_are_words(name, text, value):
    args = parse(*NEEDED, name, text)
    where = {"-fm": "fit_mask", "-multi_gpu": "multi_gpu", "-u_net": "u_net"}.get(name, name.removeprefix("-is_"))
    assert getattr(args, where) is value
    with pytest.raises(UsageError, match="neither True nor False"):
        parse(*NEEDED, name, "maybe")


def test_presets_and_what_the_configuration_records(tmp_path):
    code, paper = settings(), settings("--preset", "paper")
    assert (code.preset, code.batch_size, code.lambda_gp, code.eps_per_channel, code.beta1) == (
        "code",
        16,
        10,
        True,
        0.5,
    )
    assert (paper.preset, paper.batch_size, paper.lambda_gp, paper.eps_per_channel) == ("paper", 32, 100, False)
    assert settings("--preset", "paper", "-b", 4).batch_size == 4  # what was typed wins
    (tmp_path / "c.yaml").write_text(paper.to_yaml(), encoding="utf8")
    assert from_yaml(tmp_path / "c.yaml") == paper


def test_interp_sitk_takes_the_originals_geometry():
    assert settings().geometry == "physical"
    assert settings("--interp", "sitk").geometry == "segsrgan"
    with pytest.raises(UsageError, match="sitk is unknown in physical"):
        settings("--interp", "sitk", "--geometry", "physical")


def test_several_structures_are_learned_unless_that_is_declined():
    several = ("--label-classes", "3", "42")
    assert not settings().fit_mask and not settings(*several[:2]).fit_mask and settings(*several).fit_mask
    assert not settings(*several, "--fit-mask", "False").fit_mask


# --- what a call does with them -----------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Runs ``fastsrgan train`` up to the call of the training; the call's arguments."""
    seen = {}

    def train(source, folder, config, **options):
        seen.update(options, source=source, folder=str(folder), config=config)
        return NOTHING_TRAINED

    monkeypatch.setattr(training, "train", train)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        seen.clear()
        code = cli.main(["train", *map(str, words)])
        return code, seen

    return run


def test_every_ending_of_a_table_is_one_for_a_training():
    """Was "is a file, a store is a folder or a URL" of a .tsv, which `convert` and `study` take."""
    assert all(cli_train.is_table(f"a{ending}") and cli_train.is_table(f"A{ending.upper()}") for ending in LISTS)
    assert not any(map(cli_train.is_table, ("cohort.zarr", "s3://bucket/cohort", "csv")))


def test_a_command_of_the_original_runs_unchanged(called, capsys, monkeypatch):
    """The README's example with every required option; the table is converted on the way."""
    monkeypatch.setattr(cli_train, "convert_table", lambda table, args, folder, progress: f"store of {table}")
    command = "--new_low_res 0.5 0.5 3 --csv data.csv --snapshot_folder weights --dice_file dice.csv --mse_file mse.csv"
    command += " --folder_training_data temporary --multi_gpu True --is_residual False"
    code, seen = called(*command.split())
    assert code == 0
    assert (seen["source"], seen["folder"], seen["snapshot_folder"]) == ("store of data.csv", "weights", "weights")
    assert (seen["dice_file"], seen["mse_file"], seen["start_weights"]) == ("dice.csv", "mse.csv", None)
    assert seen["config"].residual is False and seen["config"].new_low_res == ((0.5, 0.5, 3.0),)
    notes = capsys.readouterr().err
    assert "nothing is written" in notes and "--multi_gpu" in notes


def test_continuing_needs_weights_and_keeps_the_earlier_run(called, tmp_path, monkeypatch, capsys):
    command = ["cohort.zarr", "-sf", "weights", "-n", 1, 1, 3, "-e", 40, "-i", 21]
    assert called(*command)[0] == 2 and "-w FILE" in capsys.readouterr().err
    (tmp_path / "weights").mkdir()
    shutil.copyfile(KERAS, tmp_path / "weights" / "SegSRGAN_epoch_20")
    code, seen = called(*command, "-w", "weights/SegSRGAN_epoch_20")
    assert code == 0 and seen["folder"] == "weights" and seen["start_weights"] == "weights/SegSRGAN_epoch_20"
    monkeypatch.setattr(checkpoint, "snapshots", lambda run: [run / "checkpoints" / "step-00000009"])
    code, seen = called(*command, "-w", "weights/SegSRGAN_epoch_20")
    assert code == 0 and seen["folder"] == "weights/from_epoch_21" and seen["snapshot_folder"] == "weights"
    assert called("cohort.zarr", "-sf", "weights", "-n", 1, 1, 3, "-e", 4, "-i", 5, "-w", "x")[0] == 2  # typed
    assert called("cohort.zarr", "-n", 1, 1, 3)[0] == 2 and called("-sf", "weights", "-n", 1, 1, 3)[0] == 2


def test_a_changed_table_is_converted_anew(called, tmp_path):
    for i in range(3):
        data = np.random.default_rng(i).integers(1, 90, (8, 8, 8)).astype(np.int16)
        images.save(tmp_path / f"s{i}.nii.gz", data, np.eye(4))
        images.save(tmp_path / f"l{i}.nii.gz", np.ones((8, 8, 8), np.uint8), np.eye(4))
    rows = [f"s{i}.nii.gz,l{i}.nii.gz,{'Train' if i else 'Test'}" for i in range(3)]
    for listed in (rows[:2], rows[:2], rows[1:], [rows[0].replace("Test", "Train"), rows[1]]):
        (tmp_path / "t.csv").write_text("\n".join(["HR_image,Label_image,Base", *listed]), encoding="utf8")
        code, seen = called("-csv", "t.csv", "-sf", "weights", "-n", 1, 1, 3)
        assert code == 0
        subjects = open_store(seen["source"]).subjects
        assert sorted((s.id, s.split) for s in subjects) == sorted((r[:2], r.split(",")[2]) for r in listed)
    # The table of a run that goes on from this one names other files: its data are kept in its own folder.
    (tmp_path / "weights" / "checkpoints" / "step-00000009").mkdir(parents=True)
    (tmp_path / "weights" / "checkpoints" / "step-00000009" / "manifest.json").write_text("{}", encoding="utf8")
    for named, place in ((listed, "weights"), (rows, "weights/from_epoch_2")):
        (tmp_path / "t.csv").write_text("\n".join(["HR_image,Label_image,Base", *named]), encoding="utf8")
        code, seen = called("-csv", "t.csv", "-sf", "weights", "-n", 1, 1, 3, "-i", 2, "-w", KERAS)
        assert code == 0 and seen["source"] == f"{place}/data.zarr"
        assert len(open_store("weights/data.zarr").subjects) == 2 and len(open_store(seen["source"]).subjects) == len(
            named
        )


def test_a_table_of_which_images_are_damaged_goes_on_when_they_are_mended(called, tmp_path, capsys):
    """There is no run yet that --resume could go on with: the hint must be one that helps."""
    for i in range(3):
        data = np.random.default_rng(i).integers(1, 90, (8, 8, 8)).astype(np.int16)
        images.save(tmp_path / f"s{i}.nii.gz", data, np.eye(4))
        images.save(tmp_path / f"l{i}.nii.gz", np.ones((8, 8, 8), np.uint8), np.eye(4))
    rows = [f"s{i}.nii.gz,l{i}.nii.gz,{'Train' if i else 'Test'}" for i in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(["HR_image,Label_image,Base", *rows]), encoding="utf8")
    whole = (tmp_path / "s2.nii.gz").read_bytes()
    (tmp_path / "s2.nii.gz").write_bytes(whole[:-9])
    command = ["-csv", "t.csv", "-sf", "weights", "-n", 1, 1, 3]
    assert called(*command)[0] == 6
    assert "(correct them and run the same command again)" in capsys.readouterr().err
    (tmp_path / "s2.nii.gz").write_bytes(whole)
    code, seen = called(*command)
    assert code == 0 and len(open_store(seen["source"]).subjects) == 3


def test_the_migration_page_has_every_option_and_names_tests_that_exist():
    page = (ROOT / "docs" / "migrating-from-segsrgan.md").read_text(encoding="utf8")
    for row in [*SETTINGS, *OTHERS, *JOB]:
        assert any(name in page for name in row[1]), row[1]
    file = None
    named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", page)
    for other, name in named:
        file = other or file  # `::test_x` is in the file named before
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf8"), f"{file}::{name}"
    assert len(named) > 100


# --- tiny trainings -----------------------------------------------------------------------------------------------

SMALL = ("-n", 1, 1, 2, "-b", 2, "-ps", 16, "--kernel_gen", 2, "--kernel_dis", 2, "--device", "cpu")
SMALL = (*SMALL, "--steps-per-epoch", 1, "--stride", 12)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A folder and CSV as the original wants them: two training subjects, one test subject, masks of two classes."""
    folder = tmp_path_factory.mktemp("cohort")
    lines = ["HR_image,Label_image,Mask_image,Base"]
    for i, base in enumerate(("Train", "Train", "Test")):
        rng = np.random.default_rng(i)
        image = rng.integers(50, 900, (24, 20, 22)).astype(np.int16)
        images.save(folder / f"{i}.nii.gz", image, np.eye(4))
        images.save(folder / f"{i}_label.nii.gz", (image > 500).astype(np.uint8), np.eye(4))
        images.save(folder / f"{i}_mask.nii.gz", np.ones(image.shape, np.uint8), np.eye(4))
        lines.append(f"/{i}.nii.gz,/{i}_label.nii.gz,/{i}_mask.nii.gz,{base}")
    (folder / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf8")
    return folder


def train(cohort, folder, *words):
    command = ["train", "--csv", cohort / "data.csv", "--base_path", cohort, "-sf", folder / "weights"]
    command += ["-dice", folder / "dice.csv", "-mse", folder / "mse.csv", "-folder_training_data", folder / "temporary"]
    assert cli.main([str(word) for word in [*command, *SMALL, *words]]) == 0
    assert not (folder / "temporary").exists()


def table(path):
    with open(path, newline="", encoding="utf8") as file:
        return list(csv.reader(file))


def test_snapshots_tables_and_continuation_are_the_originals(cohort, tmp_path):
    # A table that the original left: more epochs than this run will have, those behind its end empty.
    (tmp_path / "dice.csv").write_text(",Dice,Dice_Mask\n1,0.5,0.6\n2,,\n7,0.9,0.9\n", encoding="utf8")
    train(cohort, tmp_path, "-e", 2)
    for name in ("SegSRGAN_epoch_1", "SegSRGAN_epoch_2"):
        assert weights.info(tmp_path / "weights" / name)["kind"] == "keras"
        assert weights.load_critic(tmp_path / "weights" / name).spec.kernel == 2
    assert [row[0] for row in table(tmp_path / "dice.csv")] == ["", "1", "2"]
    assert table(tmp_path / "dice.csv")[0] == ["", "Dice"] and table(tmp_path / "mse.csv")[0] == ["", "MSE"]
    dice = [float(row[1]) for row in table(tmp_path / "dice.csv")[1:]]  # the best on the Test subjects is kept
    assert weights.info(tmp_path / "weights" / "best.safetensors")["card"]["epoch"] == 1 + int(np.argmax(dice))
    before = (tmp_path / "weights" / "SegSRGAN_epoch_2").read_bytes()
    continued = ["-w", tmp_path / "weights" / "SegSRGAN_epoch_2", "--init_epoch", 3, "--lrgen", 1e-12, "--lrdis", 1e-12]
    train(cohort, tmp_path, "-e", 4, "-s", 2, *continued)  # epoch - init_epoch + 1 = 2 more
    assert (tmp_path / "weights" / "SegSRGAN_epoch_2").read_bytes() == before
    assert not (tmp_path / "weights" / "SegSRGAN_epoch_3").exists()  # a snapshot every second epoch
    old, new = (weights.load_generator(tmp_path / "weights" / f"SegSRGAN_epoch_{n}") for n in (2, 4))
    for a, b in zip(old.parameters(), new.parameters(), strict=True):  # rates of nearly 0: it went on from there
        assert torch.allclose(a, b, atol=2e-11)  # found: 3.6e-12
    assert [row[0] for row in table(tmp_path / "dice.csv")] == ["", "1", "2", "3", "4"]


def test_the_optimisers_are_the_originals():
    models = Models(settings("--kernel_gen", 2, "--kernel_dis", 2, "-ps", 16, "--lrdis", 0.002), 0, torch.device("cpu"))
    for adam, rate, epsilon in ((models.optimiser_g.adam, 1e-4, 1e-8), (models.optimiser_d.adam, 2e-3, 1e-7)):
        assert (adam.defaults["lr"], adam.defaults["betas"], adam.defaults["eps"]) == (rate, (0.5, 0.999), epsilon)


def test_scores_per_epoch_are_the_originals():
    """Dice over all patches together, from probabilities above a half; MSE of the image clipped at 0."""
    rng = np.random.default_rng(0)
    pred = rng.normal(0.5, 0.4, (5, 3, 8, 8, 8)).astype(np.float32)
    target = np.concatenate([rng.random((5, 1, 8, 8, 8)), rng.integers(0, 2, (5, 2, 8, 8, 8))], axis=1)
    parts = [slice(0, 2), slice(2, 5)]
    sums = sum(validation_sums(torch.from_numpy(pred[p]), torch.from_numpy(target[p]).float()) for p in parts).numpy()
    # Found: 2.1e-9 (rounding)
    assert sums[0] / sums[1] == pytest.approx(((np.maximum(pred[:, 0], 0) - target[:, 0]) ** 2).mean(), rel=1e-6)
    for channel in (1, 2):
        both, positive, labelled = sums[3 * channel - 1 : 3 * channel + 2]
        p, y = pred[:, channel] > 0.5, target[:, channel] == 1
        assert (both, positive, labelled) == ((p & y).sum(), p.sum(), y.sum())


def test_every_choice_of_the_original_reaches_training(cohort, tmp_path):
    pytest.importorskip("SimpleITK", reason="needs the extra sitk")
    choices = "-is_conditional True -is_residual False -fm True -icm overlapping_with_mask -rl dice -u_net True"
    train(cohort, tmp_path, "-e", 1, "--interp", "sitk", "-it", "Linear", *choices.split())
    spec, critic = weights.read_spec(tmp_path / "weights" / "SegSRGAN_epoch_1")
    assert (spec.network, spec.conditional, spec.residual, spec.mask_classes) == ("unet", True, False, 2)
    assert critic.conditional and critic.in_channels == 4
    assert table(tmp_path / "dice.csv")[0] == ["", "Dice_label_1", "Dice_mask0", "Dice_mask1"]
    config = from_yaml(tmp_path / "weights" / "config.yaml")
    assert (config.interp, config.interpolation_type, config.geometry) == ("sitk", "Linear", "segsrgan")
