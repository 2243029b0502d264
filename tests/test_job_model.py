"""``fastsrgan job-model``: the original's list syntax, order, output tree and names, and what it does better."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from fastsrgan.cli import job_model as cli_job
from fastsrgan.cli import main as cli
from fastsrgan.compat import job_model as job
from fastsrgan.errors import PartialFailure, UsageError
from fastsrgan.infer.files import failure
from fastsrgan.infer.volume import InferResult, infer_volume
from fastsrgan.io import nifti as images
from fastsrgan.io.image_list import find_images
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator
from fastsrgan.report.collect import find
from fastsrgan.report.viewer import load_images

RESULT = "Result_with_mine"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return weights.save_generator(folder / "model.safetensors", build_generator(GeneratorSpec(kernel=1), seed=6))


def scan(path: Path, seed=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(30, 900, (12, 10, 6)).astype(np.int16)
    return images.save(path, data, np.diag([1.0, 1.0, 2.0, 1.0]))


def table(folder: Path, *entries) -> Path:
    path = folder / "list.csv"
    path.write_text("".join(f"{entry}\n" for entry in entries), encoding="utf8")
    return path


def run(listing, model, *words, patch="16", step="8", low="1,1,1", name="mine") -> int:
    command = ["job-model", "--path", listing, "--patch", patch, "--step", step, "--result_folder_name", name]
    command += ["--weights_path", model, "--new_low_res", low, "--device", "cpu", *words]
    return cli.main([str(word) for word in command])


def files(folder: Path) -> list[str]:
    """Images below a folder's results, as relative names."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("Result_with_*/**/*.nii.gz"))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def items(capsys) -> list[dict]:
    return json.loads(capsys.readouterr().out)["items"]


# --- list syntax --------------------------------------------------------------------------------------------------


def test_lists_of_patches_and_steps():
    assert cli_job.patches("64,128") == [64, 128] and cli_job.patches("None,32") == [None, 32]
    assert cli_job.steps("32 64,64 128") == [[32, 64], [64, 128]] and cli_job.steps("64") == [[64]]
    for bad in ("32,,64", "32 x", ""):
        with pytest.raises(UsageError, match="--step"):
            cli_job.steps(bad)
    with pytest.raises(UsageError, match="--patch"):
        cli_job.patches("64 128")


def test_the_plan_is_the_originals_order_and_tree(tmp_path):
    paths = [tmp_path / "a" / "x.nii.gz", tmp_path / "b" / "y.nii.gz"]
    tasks = job.plan(paths, [16, None], [[8, 4, 8], [1, 2]], "mine")
    assert [(t.image.name, t.patch, t.step, t.folder.name) for t in tasks] == [
        ("x.nii.gz", 16, 4, "patch_16_step_4"),
        ("x.nii.gz", 16, 8, "patch_16_step_8"),
        ("x.nii.gz", None, 1, "patch_None"),  # a step means nothing there: one result
        ("y.nii.gz", 16, 4, "patch_16_step_4"),
        ("y.nii.gz", 16, 8, "patch_16_step_8"),
        ("y.nii.gz", None, 1, "patch_None"),
    ]
    assert tasks[0].folder.parent == tmp_path / "a" / RESULT


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--patch", "16,32", "--step", "8"], "2 patch sizes and 1 group of steps"),
        (["--patch", "16", "--step", "20"], "larger than the patch"),
        (["--patch", "18"], "multiples of 4"),
        (["--new_low_res", "1,1"], "three sizes"),
        (["--new_low_res", "1,1,0"], "new resolution"),
        (["--by_batch", "maybe"], "neither True nor False"),
        (["--result_folder_name", "a/b"], "a name"),
        (["--interp", "sitk", "--geometry", "physical"], "segsrgan geometry"),
    ],
)
def test_nonsense_is_refused_before_any_work(tmp_path, model, capsys, words, told):
    scan(tmp_path / "a.nii.gz")
    assert run(table(tmp_path, "a.nii.gz"), model, *words) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("Result*"))


# --- the output tree ----------------------------------------------------------------------------------------------


def test_the_tree_names_and_types_are_the_originals(tmp_path, model):
    scan(tmp_path / "sub-01" / "T2.nii.gz")
    # As the original's README has it, steps without quotes.
    code = cli.main(
        [
            "job_model",
            "-p",
            str(table(tmp_path, "sub-01/T2.nii.gz")),
            "-pa",
            "16,None",
            "-s",
            "8",
            "16,1",
            "-rf",
            "mine",
        ]
        + ["-wp", str(model), "-n", "1,1,1", "--device", "cpu"]
    )
    assert code == 0
    assert files(tmp_path / "sub-01") == [
        f"{RESULT}/patch_16_step_16/Cortex_patch_16_step_16.nii.gz",
        f"{RESULT}/patch_16_step_16/SR_patch_16_step_16.nii.gz",
        f"{RESULT}/patch_16_step_8/Cortex_patch_16_step_8.nii.gz",
        f"{RESULT}/patch_16_step_8/SR_patch_16_step_8.nii.gz",
        f"{RESULT}/patch_None/Cortex_whole_image.nii.gz",
        f"{RESULT}/patch_None/SR_whole_image.nii.gz",
    ]
    assert [image.path.name for image in find_images([tmp_path], tmp_path / "out")] == ["T2.nii.gz"]
    cortex = images.load(tmp_path / "sub-01" / RESULT / "patch_None" / "Cortex_whole_image.nii.gz")
    assert cortex.meta["stored_dtype"] == "float64" and cortex.data.shape == (12, 10, 12)


def test_results_are_the_originals_numbers(golden, tmp_path, model):
    meta = json.loads((golden / "e2e" / "meta.json").read_text(encoding="utf8"))
    path = tmp_path / "lr_input.nii.gz"
    path.write_bytes((golden / "e2e" / "lr_input.nii.gz").read_bytes())
    assert run(table(tmp_path, path), golden / "weights_residual.h5", patch="32,None", step="16,1") == 0
    names = ("patch_32_step_16/{}_patch_32_step_16.nii.gz", "patch_None/{}_whole_image.nii.gz")
    scale = np.ptp(images.load(path).data)
    for case, name in zip(meta["runs"], names, strict=True):
        for kind, key, tolerance in (("SR", "sr", 1e-4 * scale), ("Cortex", "cortex", 1e-4)):
            got, wanted = images.load(tmp_path / RESULT / name.format(kind)), images.load(golden / "e2e" / case[key])
            assert np.abs(got.data - wanted.data).max() <= tolerance
            assert np.allclose(got.affine, wanted.affine, atol=1e-6)  # found: 0 (rounding)


def test_the_mask_is_written_for_models_that_have_it(golden, tmp_path):
    scan(tmp_path / "a.nii.gz")
    assert run(table(tmp_path, "a.nii.gz"), golden / "weights_residual_mask3.h5") == 0
    assert f"{RESULT}/patch_16_step_8/Mask_patch_16_step_8.nii.gz" in files(tmp_path)


def test_physical_geometry_is_a_choice(tmp_path, model):
    image = images.load(scan(tmp_path / "a.nii.gz"))
    assert run(table(tmp_path, "a.nii.gz"), model, "--geometry", "physical") == 0
    generator = weights.load_generator(model)
    # The original's program gives the network's own result, in any geometry.
    options = {"patch": 16, "step": 8, "new_resolution": (1, 1, 1), "device": "cpu", "agree": "off"}
    wanted = infer_volume(image.data, image.affine, generator, **options)
    got = images.load(tmp_path / RESULT / "patch_16_step_8" / "SR_patch_16_step_8.nii.gz")
    # Found: 0 (rounding)
    assert np.abs(got.data - wanted.sr).max() <= 1e-5 * np.ptp(wanted.sr) and np.allclose(got.affine, wanted.affine)


@pytest.mark.parametrize("flag", ["True", "False"])
def test_by_batch_works_and_changes_no_number(tmp_path, model, flag):
    for folder in ("plain", "batch"):
        scan(tmp_path / folder / "a.nii.gz")
    assert run(table(tmp_path, "plain/a.nii.gz"), model) == 0
    assert run(table(tmp_path, "batch/a.nii.gz"), model, "--by_batch", flag) == 0
    name = f"{RESULT}/patch_16_step_8/SR_patch_16_step_8.nii.gz"
    a, b = (images.load(tmp_path / folder / name).data for folder in ("plain", "batch"))
    assert np.abs(a - b).max() <= 1e-5 * np.ptp(a)  # found: 0 (rounding)


# --- which images, where ------------------------------------------------------------------------------------------


def test_the_list_has_no_header_is_sorted_and_may_have_a_base(tmp_path, model, capsys):
    for name in ("b", "a", "c"):
        scan(tmp_path / "data" / name / "T2.nii.gz")
    listing = tmp_path / "data" / "list.csv"
    listing.write_text("b/T2.nii.gz,ignored\nc/T2.nii.gz,\na/T2.nii.gz,x\nb/T2.nii.gz,twice\n", encoding="utf8")
    assert run("list.csv", model, "-dp", tmp_path / "data", "--json") == 0
    done = items(capsys)
    assert [Path(i["input"]).parent.name for i in done] == ["a", "b", "c"]
    assert {i["status"] for i in done} == {"done"}


@pytest.mark.parametrize("base", ["nowhere", "nowhere/"])
def test_a_base_that_is_no_folder_is_named_where_no_image_is_found(tmp_path, model, capsys, base):
    """The original joins strings, so nowhere and gm.nii.gz are nowheregm.nii.gz."""
    assert run(table(tmp_path, "gm.nii.gz", "wm.nii.gz"), model, "-dp", tmp_path / base) == 3
    told = capsys.readouterr().err
    assert "none of its images is there" in told and f"'{tmp_path / 'nowhere'}' stands before every entry" in told
    assert not list(tmp_path.glob("**/Result_with_*"))


def test_other_images_of_a_folder_are_processed_under_their_own_names(tmp_path, model):
    for seed, name in enumerate(("b", "a", "c")):
        scan(tmp_path / f"{name}.nii.gz", seed)
    assert run(table(tmp_path, "c.nii.gz", "b.nii.gz", "a.nii.gz"), model) == 0
    folder = f"{RESULT}/patch_16_step_8"
    assert files(tmp_path) == sorted(
        f"{folder}/{kind}_patch_16_step_8{tag}.nii.gz" for kind in ("Cortex", "SR") for tag in ("", "_b", "_c")
    )
    for image, tag in (("a", ""), ("b", "_b"), ("c", "_c")):
        record = json.loads((tmp_path / folder / f"fastsrgan{tag}.json").read_text(encoding="utf8"))
        assert record["image"] == f"{image}.nii.gz" and record["outputs"]["SR"] == f"SR_patch_16_step_8{tag}.nii.gz"
        source = images.load(tmp_path / f"{image}.nii.gz").data
        sr = images.load(tmp_path / folder / record["outputs"]["SR"]).data
        # Found: 0.31
        assert sr.min() >= source.min() and np.corrcoef(sr[:, :, ::2].ravel(), source.ravel())[0, 1] > 0.3


def test_names_stay_with_their_image_whatever_is_listed_later(tmp_path, model, capsys):
    for seed, name in enumerate("abc"):
        scan(tmp_path / f"{name}.nii.gz", seed)
    assert run(table(tmp_path, "b.nii.gz"), model) == 0  # b is the first that this folder saw
    before = contents(tmp_path)
    capsys.readouterr()
    assert run(table(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz"), model, "--json") == 0
    assert [i["status"] for i in items(capsys)] == ["done", "skipped", "done"]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {Path(n).name for n in set(after) - set(before)} == {
        f"{kind}_patch_16_step_8_{image}.nii.gz" for kind in ("SR", "Cortex") for image in "ac"
    }
    assert run(table(tmp_path, "c.nii.gz"), model, "--json") == 0
    assert items(capsys)[0]["status"] == "skipped" and contents(tmp_path) == after


def test_images_that_differ_in_their_ending_only_get_their_whole_name(tmp_path, model):
    for seed, name in enumerate(("0.nii.gz", "a.nii", "a.nii.gz")):
        scan(tmp_path / name, seed)
    assert run(table(tmp_path, "0.nii.gz", "a.nii", "a.nii.gz"), model) == 0
    tags = {Path(n).name.removeprefix("SR_patch_16_step_8") for n in files(tmp_path) if "/SR_" in n}
    assert tags == {".nii.gz", "_a.nii.gz", "_a.nii.gz.nii.gz"}


def test_results_of_the_original_are_kept_and_its_left_out_image_is_processed(tmp_path, model, capsys):
    for name in "ab":
        scan(tmp_path / f"{name}.nii.gz")
    theirs = tmp_path / RESULT / "patch_16_step_8"
    for kind in ("SR", "Cortex"):
        scan(theirs / f"{kind}_patch_16_step_8.nii.gz", 5)
    before = contents(tmp_path)
    listing = table(tmp_path, "a.nii.gz", "b.nii.gz")
    assert run(listing, model, "--json") == 0
    assert [i["status"] for i in items(capsys)] == ["skipped", "done"]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before and len(after) == 4
    assert run(listing, model, "--overwrite") == 0
    assert contents(tmp_path)[f"{RESULT}/patch_16_step_8/SR_patch_16_step_8.nii.gz"] not in before.values()


def test_finished_results_are_kept_and_others_made_with_something_else_refused(tmp_path, model, golden, capsys):
    path = scan(tmp_path / "a.nii.gz")
    listing = table(tmp_path, "a.nii.gz")
    assert run(listing, model) == 0
    before = contents(tmp_path)
    assert run(listing, model) == 0 and contents(tmp_path) == before
    (tmp_path / RESULT / "patch_16_step_8" / "SR_patch_16_step_8.nii.gz").unlink()
    assert run(listing, model) == 0 and contents(tmp_path) == before
    capsys.readouterr()
    for words, told in (([golden / "weights_residual.h5"], "another weights"), ([model, "-n", "2,2,2"], "resolution")):
        assert run(listing, *words) == 2
        assert told in capsys.readouterr().err
    path.unlink()
    scan(path, seed=9)
    assert run(listing, model) == 2 and "another image" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert run(listing, model, "--overwrite") == 0 and contents(tmp_path) != before


def test_a_series_is_of_dicom_alone(tmp_path, model, capsys):
    places = [scan(tmp_path / f"{name}.nii.gz") for name in "ab"]
    assert run(table(tmp_path, "a.nii.gz", "b.nii.gz"), model, "--series", "4") == 2
    assert cli.main(["infer", *map(str, places), "-o", str(tmp_path / "out"), "--series", "4"]) == 2
    assert capsys.readouterr().err.count("a.nii.gz: is no DICOM input and has no series") == 2
    assert not (tmp_path / RESULT).exists()


def test_a_bad_image_does_not_stop_the_others_and_leaves_nothing(tmp_path, model, capsys):
    for name in "ac":
        scan(tmp_path / name / "T2.nii.gz")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "T2.nii.gz").write_bytes(b"no image")
    listing = table(tmp_path, *(f"{n}/T2.nii.gz" for n in "abcd"))
    assert run(listing, model, "--json") == 6
    out = capsys.readouterr()
    assert [i["status"] for i in json.loads(out.out)["items"]] == ["done", "failed", "done", "failed"]
    assert "2 of 4 results failed" in out.err
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["T2.nii.gz"]
    assert run(table(tmp_path, "b/T2.nii.gz"), model) == 3  # the only one: its own error


def test_interp_sitk(tmp_path, model):
    pytest.importorskip("SimpleITK", reason="needs the extra sitk")
    scan(tmp_path / "a.nii.gz")
    assert run(table(tmp_path, "a.nii.gz"), model, "-int", "sitk", "-it", "Linear", low="1,1,0.9") == 0
    sr = images.load(tmp_path / RESULT / "patch_16_step_8" / "SR_patch_16_step_8.nii.gz")
    assert sr.data.shape == (12, 10, 12) and sr.spacing == pytest.approx((1, 1, 1))


def test_dicom_folders(tmp_path, model):
    pytest.importorskip("pydicom", reason="needs the extra dicom")
    from dicom_files import scanner_affine, volume, write_series

    data, affine = volume((12, 10, 6)), scanner_affine("axial", spacing=(1.0, 1.0, 2.0))
    write_series(tmp_path / "study" / "T2", data, affine, number=4)
    write_series(tmp_path / "study" / "T2", data + 1, affine, number=5, prefix="X")
    listing = table(tmp_path, "study/T2")
    assert run(listing, model) == 2  # two series and none chosen
    assert run(listing, model, "--series", "5") == 0
    assert files(tmp_path / "study") == [
        f"{RESULT}/patch_16_step_8/{kind}_patch_16_step_8.nii.gz" for kind in ("Cortex", "SR")
    ]
    sr = images.load(tmp_path / "study" / RESULT / "patch_16_step_8" / "SR_patch_16_step_8.nii.gz")
    assert sr.data.shape == (12, 10, 12)
    assert run(listing, model, "--series", "4") == 0
    assert f"{RESULT}/patch_16_step_8/SR_patch_16_step_8_T2_series-4.nii.gz" in files(tmp_path / "study")


def test_whatever_decides_about_a_result_is_in_its_record(monkeypatch, tmp_path):
    """So that a call with another value of it is refused; the batch and the device do not decide."""
    table = tmp_path / "l.csv"
    table.write_text("a.nii.gz\n", encoding="utf8")
    setups = []
    monkeypatch.setattr(job, "_run", lambda tasks, setup: setups.append(setup) or [])
    monkeypatch.setattr(job.weights, "info", lambda source: {"sha256": str(source)})
    monkeypatch.setattr(job.weights, "load_generator", lambda source: None)

    def made(**more):
        job.job_model(table, **{"weights_path": "w", **more})
        return setups[-1].made_with

    plain = made()
    others = {"interp": "sitk", "interpolation_type": "Linear", "geometry": "physical", "precision": "bf16"}
    others |= {"new_resolution": (1.0, 1.0, 2.0), "weights_path": "v"}
    for name, value in others.items():
        assert made(**{name: value}) != plain, name
    assert made(by_batch=False) == made(device="cpu") == made(series="3") == plain
    assert plain == {"weights": "w", "interp": "scipy", "interpolation_type": "Spline", "geometry": "segsrgan",
                     "new_resolution": [0.5, 0.5, 0.5], "precision": "fp32"}  # fmt: skip


def test_the_defaults_are_the_originals():
    """Of the function; those of the command stand in tests/test_original_options.py."""
    given = {name: p.default for name, p in inspect.signature(job.job_model).parameters.items()}
    del given["table"], given["progress"]
    assert given == {
        "weights_path": None, "patch": (128,), "step": ((64,),), "result_folder_name": "fastsrgan",
        "new_resolution": (0.5, 0.5, 0.5), "base_path": "", "by_batch": None, "interp": "scipy",
        "interpolation_type": "Spline", "geometry": "segsrgan", "series": None, "device": "auto", "precision": "fp32",
        "overwrite": False,
    }  # fmt: skip


def test_the_first_image_of_each_folder_has_the_plain_names(tmp_path):
    paths = [tmp_path / "a" / "x.nii", tmp_path / "a" / "y.nii", tmp_path / "b" / "z.nii"]
    tasks = job.plan(paths, [16, 32], [[8], [8]], "mine")
    assert [(t.image.name, t.patch, t.first) for t in tasks] == [
        (name, patch, name != "y.nii") for name in ("x.nii", "y.nii", "z.nii") for patch in (16, 32)
    ]
    task = tasks[0]
    assert (task.name("SR"), task.name("SR", "x")) == ("SR_patch_16_step_8.nii.gz", "SR_patch_16_step_8_x.nii.gz")
    assert task.record("").name == "fastsrgan.json" and task.record("x").name == "fastsrgan_x.json"
    with pytest.raises(UsageError, match="result_folder_name"):
        job.plan(paths, [16], [[8]], "")


@pytest.fixture
def told(monkeypatch, tmp_path):
    """A list of two images, and a place in which what the engine is given ends."""
    seen = []

    def apply(image, generator, **settings):
        seen.append(settings)
        return InferResult(image.data, image.data[None], image.affine, {"mine": 1})

    monkeypatch.setattr(job.compat, "apply", apply)
    for seed, name in enumerate("ab"):
        scan(tmp_path / f"{name}.nii.gz", seed)
    return seen, table(tmp_path, "b.nii.gz", "a.nii.gz")


def test_every_option_reaches_the_engine_and_the_summary_counts(told, tmp_path, model):
    seen, listing = told
    given = {"new_resolution": (1, 1, 2), "geometry": "physical", "precision": "bf16", "device": "cpu"}
    summary = job.job_model(listing, model, patch=[16, None], step=[[8], [5]], by_batch=True, **given)
    assert {key: len(summary[key]) if key == "items" else summary[key] for key in summary} == {
        "weights": {"path": str(model), "sha256": weights.info(model)["sha256"]},
        "done": 4, "skipped": 0, "failed": 0, "items": 4,
    }  # fmt: skip
    labels = [f"{n}.nii.gz {p}" for n in "ab" for p in ("patch_16_step_8", "patch_None")]
    assert [one.pop("label") for one in seen] == labels
    for k, one in enumerate(seen):
        del one["progress"]
        assert one == {
            "by_batch": True, "patch": None if k % 2 else 16, "step": 1 if k % 2 else 8, "new_resolution": [1, 1, 2],
            "geometry": "physical", "precision": "bf16", "device": "cpu", "interpolate": None,
        }  # fmt: skip
    first = summary["items"][0]
    folder = tmp_path / "Result_with_fastsrgan" / "patch_16_step_8"
    assert 0 < first.pop("seconds") < 1e6 and first == {
        "input": str(tmp_path / "a.nii.gz"), "patch": 16, "step": 8, "status": "done", "warnings": [],
        "outputs": {kind: str(folder / f"{kind}_patch_16_step_8.nii.gz") for kind in ("SR", "Cortex")},
    }  # fmt: skip
    record = json.loads((folder / "fastsrgan.json").read_text(encoding="utf8"))
    assert record["report"] == {"mine": 1} and record["warnings"] == [] and "fastsrgan" in record["provenance"]
    assert record["sha256"] == images.sha256(tmp_path / "a.nii.gz")
    again = job.job_model(listing, model, patch=[16, None], step=[[8], [5]], **given)
    assert (again["done"], again["skipped"], len(seen)) == (0, 4, 4)
    assert job.job_model(listing, model, patch=[16], step=[[8]], overwrite=True, **given)["done"] == 2


def test_a_step_of_a_whole_image_means_nothing(told, model):
    _, listing = told
    assert job.job_model(listing, model, patch=[None], step=[[0]], device="cpu")["done"] == 2
    with pytest.raises(UsageError, match="larger than the patch"):
        job.job_model(listing, model, patch=[16], step=[[900]], device="cpu")


def test_the_shipped_model_in_the_originals_geometry_is_warned_of(told, model, monkeypatch, caplog):
    _, listing = told
    monkeypatch.setattr(job.weights, "default_weights", lambda: model)
    for geometry, warned in (("physical", False), ("segsrgan", True)):
        with caplog.at_level("WARNING", "fastsrgan"):
            job.job_model(listing, patch=[16], step=[[8]], geometry=geometry, device="cpu", result_folder_name=geometry)
        assert ("trained in physical geometry" in caplog.text) == warned


def test_of_a_failure_the_first_is_told_and_its_name_given_back(told, tmp_path, model, monkeypatch):
    _, listing = told
    real = job.compat.apply

    def broken(image, *rest, **more):
        if image.meta["path"].endswith("a.nii.gz"):
            raise ZeroDivisionError("a bug")
        return real(image, *rest, **more)

    monkeypatch.setattr(job.compat, "apply", broken)
    with pytest.raises(PartialFailure, match="1 of 2 results failed, the first: a bug") as error:
        job.job_model(listing, model, patch=[16], step=[[8]], device="cpu")
    summary = error.value.summary
    assert [item["status"] for item in summary["items"]] == ["failed", "done"] and summary["failed"] == 1
    folder = tmp_path / "Result_with_fastsrgan" / "patch_16_step_8"
    assert sorted(p.name for p in folder.glob("*.json")) == ["fastsrgan_b.json"]


@pytest.mark.fault(24, 26)
@pytest.mark.parametrize("before", ["nothing", "another result"])
def test_a_result_that_ends_between_its_images_is_made_anew(tmp_path, model, monkeypatch, capsys, before):
    """The image that was written was taken for a result of the original, or stood beside another under the record of
    the result that was to be replaced: "there before, kept"."""
    scan(tmp_path / "a.nii.gz")
    listing, folder = table(tmp_path, "a.nii.gz"), tmp_path / RESULT / "patch_16_step_8"
    network = build_generator(GeneratorSpec(kernel=1), seed=7)
    first = weights.save_generator(tmp_path / "first.safetensors", network)
    assert run(listing, model, name="whole") == 0
    if before != "nothing":
        assert run(listing, first) == 0
    save = job.compat.images.save

    def full(path, *rest, **more):
        if "Cortex" in path.name:
            raise OSError(28, "No space left on device")
        return save(path, *rest, **more)

    with monkeypatch.context() as changed:
        changed.setattr(job.compat.images, "save", full)
        assert run(listing, model, "--overwrite") == 5
    capsys.readouterr()
    assert "outputs" not in json.loads((folder / "fastsrgan.json").read_text(encoding="utf8"))
    assert run(listing, model, "--json") == 0 and items(capsys)[0]["status"] == "done"
    for kind in ("SR", "Cortex"):
        name = f"{kind}_patch_16_step_8.nii.gz"
        assert (folder / name).read_bytes() == (tmp_path / "Result_with_whole" / folder.name / name).read_bytes()


def test_an_error_without_words_is_told_by_its_kind(monkeypatch):
    def broken(*args):
        raise AssertionError

    monkeypatch.setattr(job, "_claim", broken)
    tasks = [job.Task(Path("a.nii"), 16, 8, Path("r"), True)] * 2
    assert [item["error"] for item in job._run(tasks, None)] == ["AssertionError"] * 2
    assert failure({}, AssertionError())["error"] == "AssertionError"
    assert failure({}, AssertionError("why"))["error"] == "why"


def test_an_image_whose_names_are_all_taken_is_told(told, tmp_path, model):
    _, listing = told
    folder = tmp_path / "Result_with_fastsrgan" / "patch_16_step_8"
    folder.mkdir(parents=True)
    for tag in ("", "_a", "_a.nii.gz"):
        (folder / f"fastsrgan{tag}.json").write_text('{"image": "z.nii"}', encoding="utf8")
    with pytest.raises(PartialFailure, match=r"all names for a\.nii\.gz are taken") as error:
        job.job_model(listing, model, patch=[16], step=[[8]], device="cpu")
    assert [item["status"] for item in error.value.summary["items"]] == ["failed", "done"]


def test_report_shows_what_job_model_made(model, tmp_path, capsys):
    """Every patch and step of every image, the probability as the segmentation, the image beside it; the folder of
    results alone too."""
    named = (("a", "one"), ("b", "two"))
    listing = table(tmp_path, *(scan(tmp_path / folder / f"{name}.nii.gz") for folder, name in named))
    assert run(listing, model, patch="16,8", step="8,8") == 0
    results = find(tmp_path).results
    kinds = [
        f"{folder}/{RESULT}/patch_{p}_step_8/{name}" for folder, name in (("a", "one"), ("b", "two")) for p in (16, 8)
    ]
    assert [result.stem for result in results] == kinds
    sr, others = load_images(results[0], warnings := [])
    assert warnings == [] and sr is not None and {"low", "seg"} <= set(others)
    stored = images.load(results[0].files["seg"]).data
    assert np.array_equal(others["seg"].data, stored > 0.5)
    assert cli.main(["--quiet", "report", str(tmp_path)]) == 0
    assert cli.main(["--quiet", "report", str(tmp_path / "a" / RESULT / "patch_16_step_8" / "fastsrgan.json")]) == 0
    assert (tmp_path / "report.html").exists() and (
        tmp_path / "a" / RESULT / "patch_16_step_8" / "report.html"
    ).exists()
