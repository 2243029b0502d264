"""Keyed randomness, atomic files, devices, signals, and the errors that become one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastsrgan.core import draws, processor, ranks, system
from fastsrgan.core import files as core_files
from fastsrgan.errors import ResourceError, UsageError


def test_draws_depend_on_their_key_alone():
    a = draws.rng(1, 2, "sub-01", "noise").standard_normal(5)
    draws.rng(1, 2, "sub-01", "noise").random(100)
    assert np.array_equal(a, draws.rng(1, 2, "sub-01", "noise").standard_normal(5))
    others = [(2, 2, "sub-01", "noise"), (1, 3, "sub-01", "noise"), (1, 2, "sub-02", "noise"), (1, 2, "sub-01", "x")]
    assert all(not np.array_equal(a, draws.rng(*k).standard_normal(5)) for k in others)


def test_draws_are_the_same_on_every_machine():
    # Philox is defined to the bit; these values may never change, or stored runs could not be resumed.
    assert draws.rng(0, 1, "sub-01", "contrast").integers(0, 2**32, 3).tolist() == [1588247429, 4291509495, 543574631]


@pytest.mark.fault(24)
def test_atomic_write_leaves_the_old_file_on_any_failure(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf8")
    with pytest.raises(RuntimeError), core_files.atomic_write(path) as temporary:
        temporary.write_text("half", encoding="utf8")
        raise RuntimeError
    assert path.read_text(encoding="utf8") == "old" and os.listdir(tmp_path) == ["a.json"]
    with core_files.atomic_write(path) as temporary:
        assert temporary.suffix == ".json" and temporary.parent == tmp_path
        temporary.write_text("new", encoding="utf8")
    assert path.read_text(encoding="utf8") == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.fault(24)
def test_a_full_disk_is_a_resource_error_that_names_the_file(tmp_path):
    with (
        pytest.raises(ResourceError, match=r"a\.bin: no space left") as caught,
        core_files.atomic_write(tmp_path / "a.bin"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 5 and not os.listdir(tmp_path)


@pytest.mark.fault(25)
def test_output_folder_says_when_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError):
            core_files.output_folder(path)
    assert core_files.output_folder(tmp_path / "a" / "b").is_dir()


def test_json_has_no_nan(tmp_path):
    values = {"a": float("nan"), "b": [np.float32(1.5), np.inf], "c": np.arange(2), "d": tmp_path}
    core_files.write_json(tmp_path / "a.json", values)
    read = json.loads((tmp_path / "a.json").read_text(encoding="utf8"))
    assert read == {"a": None, "b": [1.5, None], "c": [0, 1], "d": str(tmp_path)}


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("name", "kind"), [("cuda:99", ResourceError), ("tpu", UsageError), ("gpu", UsageError), ("meta", UsageError)]
)
def test_devices_that_are_not_there_are_refused(name, kind):
    with pytest.raises(kind, match="--device"):
        system.pick_device(name)


def test_allocator_setting_keeps_memory_between_steps():
    code = (
        "import numpy as np, resource\n"
        "from fastsrgan.core.system import tune_allocator\n"
        "print(tune_allocator())\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): np.ones(4_000_000)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(faults())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if out[0] == "True":  # a C library with mallopt
        assert int(out[1]) < 8000  # 20 fresh arrays of 32 MB would touch 156,000 pages


@pytest.mark.fault(25)
def test_a_disk_that_is_read_only_is_one_line_with_the_final_name(tmp_path, monkeypatch):
    """Was told with the temporary name: removing what is not there fails on such a disk too."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "temporary")

    monkeypatch.setattr(core_files.Path, "unlink", refused)
    with (
        pytest.raises(ResourceError, match=r"a\.json: cannot be written \(check"),
        core_files.atomic_write(tmp_path / "a.json"),
    ):
        refused()


def test_json_is_read_as_it_is_written_and_whatever_else_is_there_is_none(tmp_path):
    path = tmp_path / "a.json"
    values = {"path": os.fsdecode(b"/tmp/\xff.nii"), "n": [1, 2.5, None], "big": 10**50}
    core_files.write_json(path, values)
    assert core_files.read_json(path) == values
    for text in (b"", b"[1]", b"5", b"[" * 10**5, b"\xff\xfe", b'{"a": ' + b"9" * 10**4 + b"}", b"{"):
        path.write_bytes(text)
        assert core_files.read_json(path) in ({}, {"a": float("inf")})
    for place in (tmp_path, tmp_path / "none", "a\0b"):
        assert core_files.read_json(place) == {}


def test_a_folder_with_a_colon_is_no_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        core_files.url_of("exp:/r.html") == "exp://r.html"
        and core_files.url_of("C:/x") is core_files.url_of("a/b:/c") is None
    )
    (tmp_path / "exp:").mkdir()
    assert core_files.url_of("exp:/r.html") is None and core_files.output_file("exp:/r.html").name == "r.html"


@pytest.mark.fault(25)
def test_a_pipe_or_a_device_is_not_replaced_by_a_file(tmp_path):
    """Root's ``--json /dev/null`` put a file in its place, for every program of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    match = r"pipe: is not a regular file \(name a file\)"
    with pytest.raises(ResourceError, match=match), core_files.atomic_write(pipe) as temporary:
        temporary.write_text("x")
    with pytest.raises(UsageError, match="is not a regular file"):
        core_files.output_file(pipe)
    assert core_files.is_special(pipe) and [p.name for p in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("name", ["n" * 243 + ".nii.gz", "ä" * 120 + ".nii.gz", "a." + "b" * 250, "n" * 255])
def test_any_name_that_a_file_may_have_can_be_written_to(tmp_path, name):
    """The temporary name was too long where the name itself was not."""
    for text in ("old", "new"):
        with core_files.atomic_write(tmp_path / name) as place:
            assert len(os.fsencode(place.name)) <= 255
            place.write_text(text)
    if name.endswith(".nii.gz"):
        assert place.name.endswith(".nii.gz")
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "new"


def test_what_killed_processes_left_is_taken_away(tmp_path, monkeypatch):
    names = ["x_sr.nii.gz", "y" * 240 + ".nii.gz"]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = [core_files.temporary_name(tmp_path / name) for name in names]
    monkeypatch.setattr(os, "getpid", lambda: dead.pid)
    left = [core_files.temporary_name(tmp_path / name) for name in names]
    other = core_files.temporary_name(tmp_path / "z_sr.nii.gz")
    monkeypatch.setattr("fastsrgan.core.files._HOST", "0" * 8)
    elsewhere, long_ago = (core_files.temporary_name(tmp_path / names[0]) for _ in range(2))
    monkeypatch.undo()
    for path in (*mine, *left, other, elsewhere, long_ago, tmp_path / names[0], tmp_path / ".x_sr.tmp-notes.nii.gz"):
        path.write_text("half")
    os.utime(long_ago, (0, 0))
    before = set(tmp_path.iterdir())
    core_files.remove_abandoned(tmp_path, names)
    assert before - set(tmp_path.iterdir()) == {*left, long_ago}
    core_files.remove_abandoned(tmp_path / "none", names)


def test_the_chosen_gpu_is_the_current_one_before_anything_else_is_asked_of_it(monkeypatch):
    """Work that names no device would otherwise open a context on GPU 0, in every rank."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: calls.append("current") or 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    device = system.pick_device(ranks.local_device("auto"))
    assert device == torch.device("cuda:2") and calls == ["cuda:2"]
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable)
    calls.clear()
    assert system.pick_device("cuda") == system.pick_device("auto") == torch.device("cuda:0")
    assert calls == ["current", "current"], "the device that torch has already is taken as it is"


@pytest.mark.fault(42)
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_a_gpu_that_refuses_is_named_in_one_line(monkeypatch, name):
    def refuse(*device):
        raise torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for call in ("current_device", "set_device"):
        monkeypatch.setattr(torch.cuda, call, refuse)
    with pytest.raises(ResourceError, match=r"cuda.*: cannot be used: CUDA error: .* busy or unavailable \(see"):
        system.pick_device(name)


def test_what_torch_keeps_of_a_devices_memory_is_free(monkeypatch):
    """Else the batch of a cohort's second volume would be smaller than that of its first."""
    kept = [6]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 - sum(kept), 10))
    assert system.free_memory(torch.device("cuda", 0)) == 10


def test_the_peak_of_memory_is_the_kernels_own_in_bytes():
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (told,) = (line for line in lines if line.startswith("VmHWM"))
    assert system.peak_memory() == pytest.approx(1024 * int(told.split()[1]), rel=0.04)  # found: 0.0042


def test_memory_that_could_be_had_is_the_machines_or_the_tightest_groups(monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limits, most in (([], whole), ([(whole * 2, 5)], whole), ([(7000, 1), (5000, 4999)], 5000)):
        monkeypatch.setattr(system, "_group_limits", lambda limits=limits: iter(limits))
        assert system.total_memory() == most


def test_a_record_names_the_versions_of_all_that_computed_it():
    told = system.provenance()
    packages = ("fastsrgan", "torch", "numpy", "scipy", "zarr", "nibabel")
    assert {name: told[name] for name in packages} == {name: metadata.version(name) for name in packages}
    assert told["python"] == sys.version.split()[0] and told["commit"] == system.source_commit()


def test_a_figure_says_its_commit_and_the_machine_that_measured_it(monkeypatch, tmp_path):
    monkeypatch.setattr(system, "source_commit", lambda: "0123456789ab-dirty")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    told = "processor : 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A Cpu 9\nstepping : 1\n\nmodel name : B\n"
    processor.CPUINFO.write_text(told, encoding="utf8")
    here = {"cpu": "A Cpu 9 25/17/1", "cores": os.cpu_count()}
    assert system.measured_on() == {"commit": "0123456789ab-dirty", "machine": here}
    processor.CPUINFO.write_text("model name\t: Arm 1\nstepping :\n", encoding="utf8")
    assert processor.processor() == "Arm 1"
    processor.CPUINFO.unlink()
    assert processor.processor() == (platform.processor() or platform.machine()) != ""


@pytest.mark.parametrize(
    "tool", ["fuzz", "mutants", "test_matrix", "soak", "large_volume", "option_study", "doubt_rule"]
)
def test_every_tool_that_keeps_figures_writes_where_they_were_measured(tool):
    """By the one function; that `mutants` and `test_matrix` keep it for each row is seen in their own tests."""
    source = (Path(__file__).parent.parent / "tools" / f"{tool}.py").read_text(encoding="utf8")
    assert "measured_on()" in source and "fastsrgan.core.system import measured_on" in source


def test_the_commit_of_a_checkout_says_whether_its_files_were_changed(monkeypatch, tmp_path):
    """None where the package runs from no checkout, whatever folder lies around it."""
    monkeypatch.setattr(system, "__file__", str(tmp_path / "fastsrgan" / "core" / "system.py"))
    assert system.source_commit() is None

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "x")
    commit = git("rev-parse", "HEAD")[:12]
    assert system.source_commit() == commit
    (tmp_path / "a").write_text("2")
    assert system.source_commit() == f"{commit}-dirty"
    below = tmp_path / "site" / "fastsrgan" / "core"
    below.mkdir(parents=True)
    monkeypatch.setattr(system, "__file__", str(below / "system.py"))
    assert system.source_commit() is None


@pytest.mark.fault(24)
def test_room_that_is_just_enough_is_enough(monkeypatch, tmp_path):
    """Asked of the disk of the nearest folder that is there."""
    asked = []
    monkeypatch.setattr(core_files.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=7000))
    core_files.need_space(tmp_path / "a" / "b", 7000)
    with pytest.raises(ResourceError, match=r"b: no space left on the disk: needs 6\.837 KiB, 6\.836 KiB free"):
        core_files.need_space(tmp_path / "a" / "b", 7001)
    assert asked == [tmp_path, tmp_path] and core_files.existing_parent(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("number", "told"),
    [
        *((name, "no space left on the disk, ") for name in ("ENOSPC", "EDQUOT")),
        ("EFBIG", "no space left: larger than the limit on the size of a file"),
        *((name, "cannot be written (check the permissions") for name in ("EACCES", "EROFS", "EPERM")),
        *((name, "cannot be written: ") for name in ("ENAMETOOLONG", "ELOOP", "EIO", "EINVAL")),
        ("EISDIR", "is a folder (name a file)"), ("ENOENT", "cannot be written here"),
        *((name, "its folder is missing or is a file") for name in ("ENOTDIR", "EEXIST")),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_told_by_its_reason(tmp_path, number, told):
    error = OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
    assert str(core_files.disk_error(error, tmp_path / "a")).startswith(f"{tmp_path / 'a'}: {told}")
    gone = OSError(errno.ENOENT, "")
    assert "its folder is missing" in str(core_files.disk_error(gone, tmp_path / "none" / "a"))
    other = OSError(errno.ECONNRESET, "")
    assert core_files.disk_error(other, tmp_path) is other


def test_gpus_are_counted_from_zero(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert system.pick_device("cuda:1") == torch.device("cuda:1") and system.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ResourceError, match="cuda:2 asked, 2 CUDA devices seen"):
        system.pick_device("cuda:2")


@pytest.mark.parametrize(
    ("error", "alive"), [(PermissionError, True), (OverflowError, True), (ProcessLookupError, False)]
)
def test_a_process_of_another_user_is_alive_though_it_cannot_be_signalled(tmp_path, monkeypatch, error, alive):
    """Its temporary files stay, and its lock holds."""

    def kill(pid, number):
        assert number == 0
        raise error

    monkeypatch.setattr(os, "kill", kill)
    path = core_files.temporary_name(tmp_path / "a.nii")
    path.write_text("half")
    core_files.remove_abandoned(tmp_path, ["a.nii"])
    assert path.exists() == alive
    holder = core_files.lock_holder(core_files.lock_signature())
    with pytest.raises(ResourceError, match="is being written by") if alive else contextlib.nullcontext():
        core_files.judge_lock("store", holder, held=False, by_process=True)


@pytest.mark.fault(24)
@pytest.mark.parametrize("there", [False, True])
def test_a_lock_that_a_full_disk_cannot_take_leaves_nothing(tmp_path, monkeypatch, there):
    """An empty lock stayed, in the folder that was made for it."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "store"
    if there:
        folder.mkdir()
    monkeypatch.setattr(core_files.os, "pwrite", full)
    with pytest.raises(ResourceError, match="no space left on the disk"):
        core_files.FolderLock(folder)
    assert list(tmp_path.rglob("*")) == [folder] * there
