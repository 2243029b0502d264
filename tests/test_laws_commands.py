"""What commands print of their results, what the doctor tells of a machine, and how values and errors are worded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import call

from fastsrgan import doctor, errors
from fastsrgan.cli import evaluate as cli
from fastsrgan.cli import job_model as cli_job
from fastsrgan.compat import job_model as job
from fastsrgan.errors import FastsrganError, PartialFailure, SettingsError
from fastsrgan.evaluate import cohort, pair
from fastsrgan.evaluate.grids import KNOWS, READER
from fastsrgan.infer import files as infer_files
from fastsrgan.study import run as study

# --- evaluate ---------------------------------------------------------------------------------------------------------

ONE = {
    "image": {"whole": {"psnr_db": 30.5, "mae": 2.5}, "mask": {"psnr_db": 20.5}}, "segmentation": {"dice": 0.75},
    "structures": {"white": {"dice": 0.5}},
    "doubt": {"error_over_doubt": 1.5, "deciles": [{"doubt": 0.125}, {"doubt": 7}]},
    "notes": [], "files": {"sr": "a_sr.nii"},
}  # fmt: skip
BASE = {
    "baseline": {"image": {"whole": {"psnr_db": 28.5, "mae": 2.0}}, "segmentation": {"dice": 0.75}},
    "gain": {"image": {"whole": {"psnr_db": 2.0, "mae": 0.5}}, "segmentation": {"dice": 0.0}},
    "baselines": {"segmentation": READER},
}


def test_a_pair_is_a_row_for_each_figure_with_the_baseline_where_there_is_one():
    rows = cli.figures(ONE)
    assert [(r["where"], r["figure"], r["value"]) for r in rows] == [
        ("whole", "psnr_db", "30.5"), ("whole", "mae", "2.5"), ("mask", "psnr_db", "20.5"),
        ("doubt", "error_over_doubt", "1.5"), ("segmentation", "dice", "0.75"), ("white", "dice", "0.5"),
    ]  # fmt: skip
    assert all(set(r) == {"where", "figure", "value"} for r in rows)
    more = {(r["where"], r["figure"]): [r["baseline"], r["difference"], r["better"]] for r in cli.figures(ONE | BASE)}
    assert more == {
        ("whole", "psnr_db"): ["28.5", "2", "yes"], ("whole", "mae"): ["2", "0.5", "no"],
        ("mask", "psnr_db"): [None] * 3, ("doubt", "error_over_doubt"): [None] * 3,
        ("segmentation", "dice"): ["0.75", "0", "equal"], ("white", "dice"): [None] * 3,
    }  # fmt: skip


def summary(**values: float) -> dict:
    return {name.replace("__", "."): {"mean": mean, "sd": 0.25, "n": 2} for name, mean in values.items()}


def test_a_cohort_is_a_line_for_each_subject_and_their_mean_and_one_for_each_figure():
    told = summary(image__whole__psnr_db=29.0, segmentation__dice=0.5, structures__white__dice=0.125, doubt__ratio=1.5)
    told |= summary(baseline__image__whole__psnr_db=28.0, gain__image__whole__psnr_db=1.0)
    rows = [ONE | BASE | {"subject": "a"}, {"subject": "b", "image": {"whole": {"psnr_db": 27.5}}, "notes": []}]
    found = cli.subjects({"rows": rows, "summary": told})
    assert found == [
        {"subject": "a", "PSNR dB": 30.5, "baseline PSNR dB": 28.5, "Dice": 0.75},
        {"subject": "b", "PSNR dB": 27.5, "baseline PSNR dB": None, "Dice": None},
        {"subject": "mean ± sd", "PSNR dB": "29 ± 0.25", "baseline PSNR dB": "28 ± 0.25", "Dice": "0.5 ± 0.25"},
    ]
    lines = [
        (r["where"], r["figure"], r["value"], r["difference"], r["n"]) for r in cli.cohort_figures({"summary": told})
    ]
    assert lines == [
        ("whole", "psnr_db", "29 ± 0.25", "1 ± 0.25", 2), ("segmentation", "dice", "0.5 ± 0.25", None, 2),
        ("white", "dice", "0.125 ± 0.25", None, 2), ("doubt", "ratio", "1.5 ± 0.25", None, 2),
    ]  # fmt: skip
    assert "baseline" not in cli.cohort_figures({"summary": summary(image__whole__psnr_db=1.0)})[0]


def test_figures_of_the_label_alone_are_not_compared():
    of = {"mean": 1.0, "sd": None, "n": 1}
    told = {"first": of, "second": of, "difference": of, "limits": None, "p": None}
    paths = ("segmentation.dice", "segmentation.label_volume_ml", "structures.white.volume_ml")
    rows = cli.comparison({"names": ["a", "b"], "comparison": dict.fromkeys(paths, told)})
    assert [(r["where"], r["figure"], r["limits"], r["p"]) for r in rows] == [
        ("segmentation", "dice", None, None), ("white", "volume_ml", None, None)
    ]  # fmt: skip


def test_numbers_have_four_digits_and_no_exponent_where_they_are_large():
    assert [cli.plain(v) for v in (12345.6, 9999.4, 0.000123456, 3, None)] == ["12346", "9999", "0.0001235", 3, None]
    assert cli.plain(-1234.5, 3) == "-1234" and cli.spread({"mean": 2.5, "sd": None}) == "2.5"
    assert cli.spread({"mean": 26.961, "sd": 0.412}) == "26.96 ± 0.41" and cli.spread(None) is None


@pytest.mark.parametrize("made", [ONE, ONE | BASE])
def test_what_is_printed_of_a_pair_and_where_its_figures_are_written(monkeypatch, tmp_path, capsys, made):
    monkeypatch.setattr(pair, "evaluate_files", lambda keep, **asked: keep(made) or made)
    words = ["evaluate", "--sr", "a", "--hr", "b", "--json", tmp_path / "e.json", "--csv", tmp_path / "e.csv"]
    code, out, _ = call(capsys, *words)
    assert code == 0 and "psnr_db" in out and (KNOWS in out) == ("baselines" in made)
    deciles = out[out.index("decile") :].splitlines()
    assert [line.split() for line in deciles[1:4] if "-" not in line][:2] == [["1", "0.125"], ["2", "7"]]
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf8")) == made
    assert (tmp_path / "e.csv").read_text(encoding="utf8").startswith("kind,subject,image.whole.psnr_db")
    code, out, _ = call(capsys, *words[:5], "--json")
    assert code == 0 and json.loads(out) == made


def test_subjects_that_were_not_evaluated_are_named_and_end_in_6(monkeypatch, capsys):
    failed = [{"subject": "x", "error": "only in one"}, {"subject": "y", "error": "broken"}]
    made = {"rows": [ONE | {"subject": "a"}], "failed": failed, "summary": summary(image__whole__psnr_db=1.0)}
    monkeypatch.setattr(cohort, "evaluate_folders", lambda *args, keep, **more: keep(made) or made)
    code, out, err = call(capsys, "evaluate", "a", "b")
    assert code == 6 and "2 not evaluated: x (only in one), y" in err and "mean ± sd" in out


@pytest.mark.parametrize("option", ["--csv", "--json", "--png"])
def test_no_input_is_written_over_by_the_figures_of_a_pair(tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(pair, "evaluate_files", lambda **asked: pytest.fail("work began"))
    (tmp_path / "a.nii").write_bytes(b"image")
    code, _, err = call(capsys, "evaluate", "--sr", tmp_path / "a.nii", "--hr", "b", option, tmp_path / "a.nii")
    assert code == 2 and "a.nii" in err and (tmp_path / "a.nii").read_bytes() == b"image"


# --- infer, job-model, study, report ----------------------------------------------------------------------------------


def test_a_line_of_each_image_has_its_light_and_outputs_or_why_there_are_none(monkeypatch, capsys):
    items = [
        {"input": "a", "status": "done", "outputs": {"sr": "a_sr", "seg": "a_seg"}, "plausibility": {"light": "red"}},
        {"input": "b", "status": "failed", "error": "b: is broken", "exit_code": 3},
        {"input": "c", "status": "skipped", "reason": "c: old"},
    ]  # fmt: skip
    summary = {"items": items, "done": 1, "skipped": 1, "unneeded": 0}
    error = infer_files.SomeFailed("infer", "1 of 3 failed", "see above", summary)

    def fail(*args, **more):
        raise error

    monkeypatch.setattr(infer_files, "infer_files", fail)
    code, out, err = call(capsys, "infer", "a", "b", "c", "-o", "out")
    assert code == 6 and err.startswith("error: infer: 1 of 3 failed")
    assert out.splitlines() == ["done    a  red  a_sr  a_seg", "failed  b  is broken", "skipped c  old"]
    code, out, _ = call(capsys, "infer", "a", "b", "c", "-o", "out", "--json")
    assert code == 6 and json.loads(out) == summary


def test_a_line_of_each_result_of_the_originals_script(monkeypatch, capsys, tmp_path):
    items = [
        {"input": "a", "status": "done", "patch": 64, "step": 32, "outputs": {"sr": "x", "seg": "y"}},
        {"input": "b", "status": "failed", "patch": None, "step": None, "error": "why"},
    ]
    calls = []
    monkeypatch.setattr(job, "job_model", lambda **asked: calls.append(asked) or {"items": items})
    words = ["job-model", "-p", "l.csv", "-rf", "n"]
    code, out, _ = call(capsys, *words)
    assert code == 0 and out.splitlines() == ["done    a  patch 64 step 32  x  y", "failed  b  whole image  why"]
    code, out, _ = call(capsys, *words, "--json")
    assert code == 0 and json.loads(out) == {"items": items}
    assert cli_job.patches("64, none,128") == [64, None, 128] and cli_job.steps("32 64,16") == [[32, 64], [16]]
    assert cli_job.resolution("0.5,1,2") == (0.5, 1.0, 2.0)
    assert call(capsys, *words, "-pa", "64,", "32", "-s", "16", "32,8")[0] == 0  # cut at their blanks by the shell
    assert calls[-1]["patch"] == [64, 32] and calls[-1]["step"] == [[16, 32], [8]]


def test_a_study_that_lost_heads_ends_in_6_and_lies_in_a_folder_of_its_kind(monkeypatch, capsys):
    asked = []
    facts = {"study": "curves", "rows": [{"epoch": 1, "Dice": 0.5}], "paper": {"rows": [], "source": "s"},
             "files": {"csv": "c.csv"}, "failed": [{"subject": "a", "error": "e"}] * 2}  # fmt: skip
    monkeypatch.setattr(study, "run", lambda *args, **more: asked.append((args, more)) or facts)
    code, out, err = call(capsys, "study", "noise", "c.csv", "--patch", "none")
    (kind, data, out_folder, models, settings), _ = asked[0]
    assert (kind, data, out_folder, models) == ("noise", ["c.csv"], "study-noise", ())
    assert settings.whole and settings.patch is None and not settings.steps and settings.seed == 0
    assert code == 6 and "study-noise: 2 heads could not be used" in err and "csv: c.csv" in out and "s:" not in out


def test_a_report_names_its_page_and_how_many_lie_beside_it(monkeypatch, capsys):
    for count in (1, 3):
        written = [Path(f"{n}.html") for n in range(count)]
        monkeypatch.setattr("fastsrgan.report.page.report", lambda *args, written=written, **more: written)
        code, out, _ = call(capsys, "report", "x")
        assert code == 0 and out.splitlines() == ["0.html", "and 2 pages of single results beside it"][:count]
        code, out, _ = call(capsys, "report", "x", "--json")
        assert code == 0 and json.loads(out) == [path.name for path in written]


# --- the doctor -------------------------------------------------------------------------------------------------------


def part(version: str | None, **more) -> dict:
    return {
        "version": version,
        "distributions": [],
        "sees_device": None,
        "problem": None,
        "purpose": "p",
        "extra": "e",
    } | more


def facts(**more) -> dict:
    return {
        "fastsrgan": "1", "python": "3", "platform": "p", "packages": dict.fromkeys(doctor.PACKAGES, "1.0"),
        "cpu": {"model": "m", "usable": 2, "count": 2, "torch_threads": 2, "bf16": False},
        "memory": {"total": 2**35, "available": 2**34}, "shm": 2**33,
        "gpu": {"driver": None, "torch_cuda": None, "cudnn": None, "devices": [], "problem": None},
        "optional": {"cupy": part(None), "dali": part(None)}, "weights": [{"name": "w", "bytes": 1}],
        "layer_forms": {"file": None, "training": "a", "inference": "b", "layers": {}}, "plan": {}, "warnings": [],
    } | more  # fmt: skip


def test_optional_packages_are_told_in_each_of_their_states():
    lines = doctor._optional_lines({
        "a": part(None), "b": part("2", problem="broken"), "c": part("2", sees_device=True),
        "d": part("2", sees_device=False), "f": part("2"),
    })  # fmt: skip
    assert lines == [
        "a: not installed (extra e) - p", "b: 2, unusable - p", "c: 2, sees the GPU - p", "d: 2, sees no GPU - p",
        "f: 2 - p",
    ]  # fmt: skip


def test_an_optional_package_is_asked_for_its_device_where_it_uses_one(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: {"second": "2.0", "third": "3.0"}.get(name))
    answers = [(True, None), (False, None), (None, "crashed"), (None, None)]
    monkeypatch.setattr(doctor, "probe", lambda program: answers.pop(0))
    made = doctor.Part("p", ("first", "second", "third"), "e", "code", on_device=True)
    found = [doctor._optional(made) for _ in range(3)]
    assert [(one["version"], one["sees_device"], one["problem"]) for one in found] == [
        ("2.0", True, None), ("2.0", False, None), ("2.0", False, "crashed")
    ]  # fmt: skip
    assert found[0]["distributions"] == ["second", "third"]
    assert doctor._optional(doctor.Part("p", ("second",), "e", "code"))["sees_device"] is None
    assert doctor._optional(doctor.Part("p", ("first",), "e", "code"))["version"] is None and not answers


def test_what_is_missing_or_too_small_is_a_warning_and_what_is_enough_is_none():
    assert doctor.warnings(facts()) == []
    lost = facts(packages={"torch": "2", "scipy": None, "zarr": None})
    assert doctor.warnings(lost) == ["not installed: scipy, zarr (reinstall fastsrgan)"]
    assert doctor.warnings(facts(shm=None)) == [] and doctor.warnings(facts(shm=2**26 + 1)) == []
    assert doctor.warnings(facts(memory={"total": None, "available": None})) == []
    both = {"cupy": part("1", distributions=["cupy", "cupy-cuda12x"]), "dali": part(None)}
    assert doctor.warnings(facts(optional=both)) == []
    assert doctor.warnings(facts(weights=[]))[0].startswith("no weights are shipped")


def test_the_lines_of_the_doctor_hold_each_fact_under_its_title():
    gpus = [{"name": n, "memory_bytes": 2**34, "capability": "9.0", "problem": None} for n in ("A", "B")]
    layer = {"form": "fast", "seconds": {"fast": 0.0012, "plain": 0.03}}
    some = facts(
        gpu={"driver": "580", "torch_cuda": "13.0", "cudnn": 1, "devices": gpus, "problem": None}, shm=None,
        weights=[{"name": "a", "bytes": 1_000_000}, {"name": "b", "bytes": 2_000_000}],
        packages=dict.fromkeys(doctor.PACKAGES, "1") | {"scipy": None}, memory={"available": None, "total": 2**30},
        layer_forms={"file": "f.json", "training": "fast", "inference": "plain", "layers": {"stem": layer}},
        plan={"training": "t", "inference": "i"}, warnings=["w1"],
    )  # fmt: skip
    lines = doctor.describe(some)
    rows = [(line[:12].strip(), line[12:]) for line in lines[:-1]]
    assert lines[-1] == "warning: w1"
    assert ("gpu", "NVIDIA driver 580, CUDA in torch 13.0") in rows and ("/dev/shm", "none") in rows
    assert [text for _, text in rows if text.startswith("cuda:")] == [
        "cuda:0 A, 16 GiB, capability 9.0", "cuda:1 B, 16 GiB, capability 9.0"
    ]  # fmt: skip
    assert ("memory", "unknown free of 1 GiB") in rows and ("weights", "a (1.0 MB), b (2.0 MB)") in rows
    assert ("runs", "training: t") in rows and ("", "inference: i") in rows
    packages = [text for title, text in rows if "torch 1" in text and title == "packages"]
    assert packages == ["torch 1  numpy 1  scipy missing  nibabel 1  zarr 1"]
    assert ("", "numcodecs 1  safetensors 1  h5py 1  nilearn 1  matplotlib 1") in rows
    words = f"fast in training, plain in inference ({doctor.forms.VARIABLE}), 1 timed on this machine, f.json"
    assert ("layer forms", words) in rows and ("", "stem: fast (fast 1.2 ms, plain 30 ms)") in rows
    none = [(line[:12].strip(), line[12:]) for line in doctor.describe(facts(weights=[]))]
    assert ("weights", "none shipped") in none and ("gpu", "NVIDIA driver not found, CUDA in torch none") in none


@pytest.mark.parametrize(("capability", "kind"), [("7.0", "fp16"), ("8.0", "bf16"), ("10.0", "bf16")])
def test_the_plan_is_that_of_the_first_device(monkeypatch, capability, kind):
    devices = [{"name": "A", "memory_bytes": 1, "capability": capability}, {"name": "B", "capability": "9.0"}]
    devices = [device | {"problem": None} for device in devices]
    some = facts(optional={"cupy": part("1", sees_device=True)})
    some["gpu"] = some["gpu"] | {"devices": devices}
    monkeypatch.setenv("FASTSRGAN_REFERENCE", "1")
    plan = doctor.plan(some)
    assert plan["training"] == f"{kind} on cuda (A)" and plan["stitching"] == "float32 sums on cuda (A) by plain torch"
    for value in ("0", ""):
        monkeypatch.setenv("FASTSRGAN_REFERENCE", value)
        assert doctor.plan(some)["stitching"].endswith("by CUDA kernels")
    assert plan["data feed"].endswith("memory of cuda") and doctor.plan(facts())["data feed"].endswith("of cpu")
    assert doctor.plan(facts())["training"] == "fp32 on cpu, 2 threads"


@pytest.mark.parametrize(("count", "said"), [(1, "1 of 1 core, 1 thread"), (2, "2 of 2 cores, 2 threads")])
def test_the_doctor_counts_in_the_right_number(monkeypatch, count, said):
    cpu = {"model": "m", "usable": count, "count": count, "torch_threads": count, "bf16": False}
    assert any(line.endswith(f"m, {said} in torch") for line in doctor.describe(facts(cpu=cpu)))
    monkeypatch.setattr(doctor.forms.torch, "get_num_threads", lambda: count)
    assert f", {said.partition(', ')[2]}, torch " in doctor.forms.machine()


def test_the_driver_is_read_from_the_system_where_no_program_tells_it(monkeypatch):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: gcc 13.3.0"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_read", lambda path: text if path == "/proc/driver/nvidia/version" else None)
    assert doctor.driver() == "570.86.15"
    monkeypatch.setattr(doctor, "_read", lambda path: None)
    assert doctor.driver() is None


def test_shared_memory_is_the_size_of_its_place(monkeypatch):
    place = SimpleNamespace(f_frsize=4096, f_bsize=1, f_blocks=1000, f_bavail=7, f_bfree=8)
    monkeypatch.setattr(doctor.os, "statvfs", lambda path: place)
    assert doctor._shm() == 4096 * 1000

    def gone(path):
        raise FileNotFoundError

    monkeypatch.setattr(doctor.os, "statvfs", gone)
    assert doctor._shm() is None


def test_a_cpu_has_bf16_where_any_of_its_units_has(monkeypatch):
    for found, told in (({}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": False, "bf16": True}, True)):
        monkeypatch.setattr(doctor.torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert doctor._cpu()["bf16"] is told
    monkeypatch.setattr(doctor.torch.cpu, "get_capabilities", lambda: {"cpu_name": "named"}, raising=False)
    assert doctor._cpu()["model"] == "named"


# --- words of errors and values ---------------------------------------------------------------------------------------


def test_each_kind_of_error_has_its_exit_code_and_says_what_reason_and_hint():
    codes = {"FastsrganError": 1, "UsageError": 2, "InputError": 3, "ModelError": 4, "SettingsError": 4,
             "ResourceError": 5, "PartialFailure": 6}  # fmt: skip
    kinds = {name: getattr(errors, name) for name in codes}
    assert {name: kind.exit_code for name, kind in kinds.items()} == codes
    assert str(PartialFailure(Path("a"), "b", "c")) == "a: b (c)" and PartialFailure("a", "b", "c").hint == "c"


def test_long_names_and_reasons_are_cut_in_the_middle_and_at_the_end():
    assert FastsrganError("x" * 1000, "y" * 32_000, "z").what == "x" * 1000
    told = FastsrganError("a" * 900 + "b" * 101, "y" * 32_001, "z")
    assert told.what == "a" * 500 + " ... " + "a" * 149 + "b" * 101 and len(told.what) == 755
    assert str(told) == f"{told.what}: {'y' * 32_000} ... (z)" and told.reason == "y" * 32_001


def test_several_faults_of_settings_are_told_together():
    one = SettingsError("f.yaml", [("epochs", "-1", "above 0")])
    two = SettingsError("f.yaml", [("epochs", "-1", "above 0"), ("ema", "2", "below 1")])
    assert str(one) == "f.yaml: epochs: -1 (above 0)" and len(two.faults) == 2
    assert str(two) == "f.yaml: 2 faults: epochs: -1, above 0; ema: 2, below 1 (see docs/config.md)"


def test_large_values_are_told_without_an_exponent():
    """`doctor` said 5.9e+02 ms, and a light "of 2.04e+03 mL"."""
    values = {2040.4: "2040", 999.4: "999", 999.6: "1000", 0.012345: "0.0123", 0: "0", -1234.5: "-1234", 1e9: "1e+09"}
    assert {value: errors.brief(value) for value in values} == values
    assert [errors.brief(value, 2) for value in (590.0, 99.4, 99.6, 5.44)] == ["590", "99", "100", "5.4"]


def test_sizes_and_lengths_are_told_in_units_of_1024():
    sizes = {
        0: "0 bytes",
        1023: "1023 bytes",
        1024: "1 KiB",
        1536: "1.5 KiB",
        2**20 - 1: "1024 KiB",
        5 * 2**40: "5 TiB",
    }
    assert {n: errors.human(n) for n in sizes} == sizes and errors.human(2**60) == "1024 PiB"
    assert errors.compared(1536, 2048) == ("1.5 KiB", "2 KiB")
    assert errors.compared(57945, 57946) == ("57945 bytes", "57946 bytes")
    assert errors.times((1, 2.0, 0.123456)) == "1 x 2 x 0.12346"
    assert errors.shown("x" * 99).count("x") < 40 and errors.shown(10**5000) == "a number of thousands of digits"


def test_a_lack_of_memory_is_seen_in_what_an_error_was_made_of():
    def made(error: BaseException, cause: BaseException | None = None, context: BaseException | None = None):
        error.__cause__, error.__context__ = cause, context
        return error

    other = type("OutOfMemoryError", (Exception,), {})()
    short = (MemoryError(), RuntimeError("CUDA error: Out of Memory"), OSError("Cannot allocate memory"), other)
    for error in (*short, ImportError("failed to map segment from shared object")):
        assert errors.out_of_memory(error) and errors.out_of_memory(made(ValueError(), error))
        assert errors.out_of_memory(made(ValueError(), None, made(KeyError(), error)))
    for error in (ValueError("out of memory"), RuntimeError("of memory"), None):
        assert not errors.out_of_memory(error)
