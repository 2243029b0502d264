"""Two processes that write one result at one moment: one wins wholly, the other ends with one line."""

import csv
import json
import socket
from pathlib import Path

import numpy as np
import pytest
from commands import TILES, Command, call, one_line
from nifti_files import HEAD, rigid, write

from fastsrgan.cli.main import main
from fastsrgan.core.files import LOCK, FolderLock, LockedFolder, ResultLock
from fastsrgan.evaluate.pair import flat
from fastsrgan.infer import bids
from fastsrgan.infer.bids import STAGE
from fastsrgan.model import weights
from fastsrgan.model.networks import GeneratorSpec, build_generator


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A scan, two truths and two models."""
    folder = tmp_path_factory.mktemp("writers")
    write(folder / "scan.nii.gz", HEAD, rigid((1.0, 1, 3)))
    for seed in (1, 2):
        data = np.random.default_rng(seed).integers(1, 900, (24, 22, 20)).astype(np.int16)
        write(folder / f"hr{seed}.nii.gz", data, rigid((1.0, 1, 1)))
    for seed in (1, 2):
        generator = build_generator(GeneratorSpec(kernel=1), seed=seed).eval()
        weights.save_generator(folder / f"w{seed}.safetensors", generator)
    return folder


def infer(made, out, seed=1, *more):
    return ["infer", made / "scan.nii.gz", "-o", out, "-w", made / f"w{seed}.safetensors", *TILES, *more]


def images(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*.nii.gz")}


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.fault(47)
def test_a_result_that_another_process_makes_is_left_to_it(made, tmp_path, capsys):
    assert call(capsys, *infer(made, tmp_path))[0] == 0
    before = images(tmp_path)
    with ResultLock(tmp_path / "scan.json"):
        code, _, told = call(capsys, *infer(made, tmp_path, 2, "--overwrite"))
    one_line(told, "scan.json: is being written by process")
    assert code == 5 and images(tmp_path) == before
    assert call(capsys, *infer(made, tmp_path, 2, "--overwrite"))[0] == 0
    assert images(tmp_path) != before and len(names(tmp_path)) == 3  # no lock is left


@pytest.mark.fault(47)
def test_a_result_that_came_meanwhile_is_kept(made, tmp_path, capsys, monkeypatch):
    """Neither its images nor its record are touched, and no time goes into another."""
    other = json.dumps({"outputs": {}})

    class Slow(ResultLock):
        def __init__(self, record, owner=None):
            record.write_text(other, encoding="utf8")
            super().__init__(record, owner)

    monkeypatch.setattr("fastsrgan.infer.image.ResultLock", Slow)
    monkeypatch.setattr("fastsrgan.infer.image.process", None)
    code, _, told = call(capsys, *infer(made, tmp_path))
    one_line(told, "written by another call meanwhile and is kept")
    assert code == 2 and (tmp_path / "scan.json").read_text(encoding="utf8") == other


@pytest.mark.fault(47)
@pytest.mark.parametrize("host", ("", "another"))
def test_the_lock_of_a_dead_process_is_taken_over(made, tmp_path, capsys, host):
    left = tmp_path / ".scan.lock"
    left.mkdir()
    (left / LOCK).write_text(json.dumps({"pid": 2**22 + 1, "host": host or socket.gethostname()}), encoding="utf8")
    code, _, told = call(capsys, *infer(made, tmp_path))
    assert code == 0 and "did not end properly, its lock is taken over" in told
    assert not left.exists()


def test_a_lock_is_released_with_its_owner(tmp_path):
    class Owner:
        pass

    owner = Owner()
    ResultLock(tmp_path / "a.json", owner)
    with pytest.raises(LockedFolder):
        ResultLock(tmp_path / "a.json")
    del owner
    with ResultLock(tmp_path / "a.json"):
        pass
    assert names(tmp_path) == []


@pytest.mark.fault(47)
def test_two_processes_with_other_weights_leave_the_result_of_one(made, tmp_path):
    alone = {}
    for seed in (1, 2):
        assert main(["--quiet", *map(str, infer(made, tmp_path / f"alone{seed}", seed))]) == 0
        alone[seed] = images(tmp_path / f"alone{seed}")
    both = [Command(tmp_path / f"p{s}", "--quiet", *infer(made, tmp_path / "out", s, "--overwrite")) for s in (1, 2)]
    ends = [one.end() for one in both]
    assert images(tmp_path / "out") in alone.values()
    for end in ends:
        assert end.code == 0 or (end.code == 5 and len(end.errors) == 1 and "Traceback" not in end.err), end
    assert 0 in [end.code for end in ends]


@pytest.mark.fault(47)
def test_job_model_leaves_a_result_to_the_process_that_makes_it(made, tmp_path, capsys):
    write(tmp_path / "scan.nii.gz", HEAD, rigid((1.0, 1, 3)))
    (tmp_path / "l.txt").write_text(str(tmp_path / "scan.nii.gz"), encoding="utf8")
    words = ["job-model", "-p", tmp_path / "l.txt", "-rf", "x", "-pa", "16", "-s", "16", "-n", "1,1,1"]
    folder = tmp_path / "Result_with_x" / "patch_16_step_16"
    folder.mkdir(parents=True)
    with ResultLock(folder / "fastsrgan.json"):
        code, _, told = call(capsys, *words, "-wp", made / "w1.safetensors")
    one_line(told, "is being written by process")
    assert code == 5 and not images(folder)
    assert call(capsys, *words, "-wp", made / "w1.safetensors")[0] == 0
    before = images(folder)
    code, _, told = call(capsys, *words, "-wp", made / "w2.safetensors")
    one_line(told, "was made with another weights")
    assert code == 2 and images(folder) == before and len(names(folder)) == 3


def dataset(made, root, count=2):
    for n in range(1, count + 1):
        path = root / f"sub-0{n}" / "anat" / f"sub-0{n}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes((made / "scan.nii.gz").read_bytes())
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}', encoding="utf8")
    return ["infer", "--bids", root, "-o", root.parent / "out", "-w", made / "w1.safetensors", *TILES]


@pytest.mark.fault(47)
def test_calls_for_other_participants_share_a_derivatives_dataset(made, tmp_path, capsys, monkeypatch):
    """As of a job for each participant: none takes away what another has on its stage."""
    words, out = dataset(made, tmp_path / "raw"), tmp_path / "out"
    out.mkdir()
    stages, place = set(), bids._place

    def placed(item, *args):
        stages.update(Path(path).relative_to(out).parts[0] for path in item["outputs"].values())
        return place(item, *args)

    monkeypatch.setattr(bids, "_place", placed)
    with FolderLock(out / STAGE):
        (out / STAGE / "sub-02_T1w_sr.nii.gz").write_bytes(b"of another call")
        assert call(capsys, *words, "--participant-label", "01")[0] == 0
        assert (out / STAGE / "sub-02_T1w_sr.nii.gz").read_bytes() == b"of another call"
        assert stages == {f"{STAGE}-2"} and not (out / f"{STAGE}-2").exists()
    assert sorted(images(out / "sub-01")) == ["sub-01_desc-cortexT1w_dseg.nii.gz", "sub-01_desc-sr_T1w.nii.gz"]


@pytest.mark.fault(47)
def test_derivatives_that_another_call_places_are_left_to_it(made, tmp_path, capsys):
    words, out = dataset(made, tmp_path / "raw"), tmp_path / "out"
    with ResultLock(out / "sub-01" / "anat" / "sub-01_desc-sr_T1w.json"):
        code, said, told = call(capsys, *words)
    assert STAGE not in said  # nothing lies there any more
    assert code == 6 and "sub-01_desc-sr_T1w.json: is being written by process" in told
    assert not images(out / "sub-01") and len(images(out / "sub-02")) == 2
    assert not (out / STAGE).exists()


@pytest.mark.fault(47)
def test_two_calls_of_one_dataset_make_each_derivative_once(made, tmp_path):
    words = dataset(made, tmp_path / "raw")
    ends = [one.end() for one in [Command(tmp_path / f"p{n}", "--quiet", *words) for n in range(2)]]
    assert len(images(tmp_path / "out")) == 4
    assert all("Traceback" not in end.err and "internal" not in end.err for end in ends), ends
    assert not list((tmp_path / "out").glob(".fastsrgan*"))


def scored(made, seed=1, *more):
    one, other = made / f"hr{seed}.nii.gz", made / f"hr{3 - seed}.nii.gz"
    return ["evaluate", "--sr", one, "--hr", other, *more]


@pytest.mark.fault(47)
@pytest.mark.parametrize("option", ("--csv", "--json", "--png"))
def test_an_evaluation_that_another_process_writes_is_left_to_it(made, tmp_path, capsys, option):
    place = tmp_path / "scores.of.it"
    with ResultLock(place):
        code, _, told = call(capsys, *scored(made, 1, option, place))
        one_line(told, "scores.of.it: is being written by process")
        assert code == 5 and not place.exists()
    assert call(capsys, *scored(made, 1, option, place))[0] == 0 and names(tmp_path) == [place.name]


@pytest.mark.fault(47)
def test_files_of_one_evaluation_share_a_lock_by_whatever_name(made, tmp_path, capsys):
    """They do not shut each other out."""
    words = ["--csv", tmp_path / "below" / ".." / "s.csv", "--json", tmp_path / "s.json", "--png", tmp_path / "s.x.png"]
    (tmp_path / "below").mkdir()
    assert call(capsys, *scored(made, 1, *words))[0] == 0
    assert names(tmp_path) == ["below", "s.csv", "s.json", "s.x.png"]


@pytest.mark.fault(47)
def test_the_pictures_of_a_cohort_are_left_to_the_process_that_fills_their_folder(made, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(f"SR_image,HR_image\n{made}/hr1.nii.gz,{made}/hr2.nii.gz\n", encoding="utf8")
    words, pictures = ["evaluate", "--table", tmp_path / "t.csv", "--png", tmp_path / "p"], tmp_path / "p"
    with ResultLock(pictures / "evaluate"):
        code, _, told = call(capsys, *words)
        one_line(told, f"{pictures}: is being written by process")
        assert code == 5
    assert call(capsys, *words)[0] == 0 and names(pictures) == ["hr1.png"]


@pytest.mark.fault(47)
def test_two_evaluations_at_once_leave_the_files_of_one(made, tmp_path):
    words = ["--csv", tmp_path / "s.csv", "--json", tmp_path / "s.json", "--png", tmp_path / "s.png"]
    ends = [one.end() for one in [Command(tmp_path / f"p{n}", "--quiet", *scored(made, n, *words)) for n in (1, 2)]]
    told = json.loads((tmp_path / "s.json").read_text(encoding="utf8"))
    with open(tmp_path / "s.csv", encoding="utf8") as file:
        (row,) = csv.DictReader(file)
    assert {name: float(value) for name, value in row.items() if name not in ("kind", "subject")} == flat(told)
    assert row["subject"] == Path(told["files"]["sr"]).name.removesuffix(".nii.gz")
    assert sorted(end.code for end in ends) in ([0, 0], [0, 5])
    assert all(end.code == 0 or len(end.errors) == 1 for end in ends)


def study(made, out, seed=1):
    words = ["study", "resolution", made / f"hr{seed}.nii.gz", "-o", out, "-w", made / "w1.safetensors"]
    return [*words, "--patch", "16", "--steps", "16", "--ratios", str(1 + seed)]


@pytest.mark.fault(47)
def test_a_study_that_another_process_makes_is_left_to_it(made, tmp_path, capsys):
    out = tmp_path / "out"
    with ResultLock(out / "study"):
        code, _, told = call(capsys, *study(made, out))
        one_line(told, f"{out}: is being written by process")
        assert code == 5 and names(out) == [".study.lock", f".study.lock/{LOCK}"]
    assert call(capsys, *study(made, out))[0] == 0
    assert not [name for name in names(out) if "lock" in name]


@pytest.mark.fault(47)
def test_two_studies_at_once_leave_the_files_of_one(made, tmp_path):
    out = tmp_path / "out"
    ends = [one.end() for one in [Command(tmp_path / f"p{n}", "--quiet", *study(made, out, n)) for n in (1, 2)]]
    told = json.loads((out / "resolution.json").read_text(encoding="utf8"))
    kinds = {row["condition"] for row in told["rows"]}
    with open(out / "resolution.csv", encoding="utf8") as file:
        assert {row["condition"] for row in csv.DictReader(file)} == kinds
    assert all(kind in (out / "resolution.md").read_text(encoding="utf8") for kind in kinds) and len(kinds) == 1
    assert sorted(end.code for end in ends) in ([0, 0], [0, 5])
    assert all(end.code == 0 or len(end.errors) == 1 for end in ends)


@pytest.mark.fault(47)
def test_pages_of_several_results_are_left_to_the_process_that_writes_them(made, tmp_path, capsys):
    for seed in (1, 2):
        assert call(capsys, *infer(made, tmp_path / f"s{seed}", seed))[0] == 0
    with ResultLock(tmp_path / "report"):
        code, _, told = call(capsys, "report", tmp_path)
        one_line(told, "is being written by process")
        assert code == 5 and not list(tmp_path.rglob("*.html"))
    assert call(capsys, "report", tmp_path)[0] == 0 and len(list(tmp_path.rglob("*.html"))) == 3
