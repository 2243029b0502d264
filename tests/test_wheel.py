"""The wheel built from the tree is complete, installs, and runs outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from fastsrgan._version import __version__

ROOT = Path(__file__).parent.parent
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "fastsrgan", "kernels")


def run(command: list[object], folder: Path) -> str:
    """Output of a command that must succeed, in ``folder`` and without a path to the checkout."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what the wheel is made of, so that building leaves nothing in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"], tree)
    (built,) = (tree / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; dependencies come from the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel], folder)
    (place,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # Names in a .pth of that folder are not followed from here, so an editable install of the checkout stays unseen.
    # Packages of the running environment may lie in several such folders.
    outer = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    (place / "outer.pth").write_text("\n".join(outer))
    return folder


def test_the_wheel_holds_the_package_its_kernels_and_models(tree, wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {p.relative_to(tree).as_posix() for p in (tree / "fastsrgan").rglob("*") if p.is_file()}
    kernels = {p.relative_to(tree).as_posix() for p in (tree / "kernels").rglob("*") if p.is_file()}
    expected |= {f"fastsrgan/{name}" for name in kernels}
    info = f"fastsrgan-{__version__}.dist-info"
    assert {"fastsrgan/py.typed", "fastsrgan/kernels/README.md"} <= expected
    assert expected <= inside
    assert {name for name in inside - expected if not name.startswith(info)} == set()
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= inside


def test_the_installed_command_runs_outside_the_checkout(tree, installed):
    command = installed / "venv" / "bin" / "fastsrgan"
    assert run([command, "--version"], installed).split()[-1] == __version__
    facts = json.loads(run([command, "doctor", "--json"], installed))
    assert facts["fastsrgan"] == __version__
    shipped = sorted(p.name for p in (tree / "fastsrgan" / "models").glob("*.safetensors"))
    assert [w["name"] for w in facts["weights"]] == shipped


def test_the_package_that_runs_is_the_installed_one(tree, installed):
    python = installed / "venv" / "bin" / "python"
    program = """
import importlib.metadata, runpy, sys, fastsrgan
print(fastsrgan.__file__, importlib.metadata.version("fastsrgan"), flush=True)
sys.argv[1:] = ["--version"]
runpy.run_module("fastsrgan", run_name="__main__", alter_sys=True)
"""
    first, second = run([python, "-c", program], installed).splitlines()
    place, version = first.split()
    assert Path(place).is_relative_to(installed) and version == second.split()[-1] == __version__
    assert (Path(place).parent / "kernels" / "README.md").read_text() == (tree / "kernels" / "README.md").read_text()
