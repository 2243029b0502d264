"""What `make setup` decides before it installs anything."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUP = ROOT / "tools" / "setup.sh"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(["bash", str(SETUP), *arguments], capture_output=True, text=True, env=env, check=False)


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("driver", "cuda"),
    [
        ("580.65.06", "13"),
        ("600.10", "13"),
        ("579.99", "12"),
        ("525.60.13", "12"),
        ("524.1", "none"),
        ("470.5", "none"),
    ],
)
def test_the_cuda_extra_follows_the_driver(tmp_path, driver, cuda):
    program(tmp_path / "nvidia-smi", f"echo {driver}")
    done = run("--cuda", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", CUDA="auto")
    assert (done.returncode, done.stdout.strip()) == (0, cuda)
    assert ("older than 525" in done.stderr) == (cuda == "none")


def test_a_choice_by_hand_wins_and_nonsense_is_refused(tmp_path):
    program(tmp_path / "nvidia-smi", "echo 580.65.06")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert run("--cuda", PATH=path, CUDA="none").stdout.strip() == "none"
    assert run("--cuda", PATH=path, CUDA="12").stdout.strip() == "12"
    refused = run("--cuda", PATH=path, CUDA="11")
    assert refused.returncode == 1 and "auto, none, 12 or 13" in refused.stderr


def test_an_old_python_is_named_with_what_is_needed(tmp_path):
    old = program(tmp_path / "python3", 'case "$2" in *version_info*) exit 1;; *) echo 3.10.12;; esac')
    done = run(str(tmp_path / "venv"), PYTHON=str(old))
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    assert "needs Python 3.11 or newer" in done.stderr and "3.10.12" in done.stderr and "PYTHON=" in done.stderr


def test_constraints_pin_every_direct_dependency_within_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^=;\s]+", line) for line in lines)
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pinned) == len(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_the_continuous_integration_is_make_test():
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert os.access(script, os.X_OK) and commands[-1] == "exec make test" and "set -euo pipefail" in commands


def extras(tmp_path: Path, browser: bool, pip: str = "exit 0") -> subprocess.CompletedProcess:
    """``make test-extras`` with a pip that does as told, where no package manager is."""
    for folder in ("venv/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
    program(tmp_path / "venv" / "bin" / "python", pip)
    for word in ("dirname", "id"):
        (tmp_path / "path" / word).symlink_to(shutil.which(word))
    if browser:
        program(tmp_path / "path" / "chromium", "exit 0")
    words = [shutil.which("bash"), str(ROOT / "tools" / "test_extras.sh"), str(tmp_path / "venv")]
    environment = {**os.environ, "PATH": str(tmp_path / "path")}
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


def test_the_extras_of_the_tests_say_what_is_there_and_what_is_not(tmp_path):
    done = extras(tmp_path / "all", browser=True)
    assert done.returncode == 0 and f"Chromium: {tmp_path}/all/path/chromium is there" in done.stdout, done.stderr
    done = extras(tmp_path / "no browser", browser=False)
    assert done.returncode == 1 and "Chromium: install it" in done.stderr and "validator: 3" in done.stdout
    done = extras(tmp_path / "no validator", browser=True, pip="exit 1")
    assert done.returncode == 1 and "BIDS validator: pip could not install" in done.stderr
