"""Derivatives against the published rules: the schema of the BIDS standard, and its validator where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from test_bids import QUICK, make_dataset, model  # noqa: F401 (a fixture)

from fastsrgan.core.files import read_json, write_json
from fastsrgan.infer.bids import IGNORED, infer_bids
from fastsrgan.io.bids import DESCRIPTION, check_derivatives, description, sidecar


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("bids")
    infer_bids(
        make_dataset(folder / "raw"), folder / "deriv", model, save_prob=True, uncertainty=True, png=True, **QUICK
    )
    return folder


@pytest.fixture
def derivatives(made, tmp_path):
    """Two participants, one with sessions, an acquisition and a run; every kind of file that is written."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "deriv"


def schema():
    """The rules of the standard as data."""
    loader = pytest.importorskip("bidsschematools.schema", reason="pip install bidsschematools: the rules of BIDS")
    return loader.load_schema()


def patterns(rules) -> list[re.Pattern[str]]:
    """What paths in a derivatives dataset may look like."""
    from bidsschematools.rules import regexify_filename_rules

    groups = [*rules.rules.files.deriv.values(), *rules.rules.files.common.values()]
    return [re.compile(rule["regex"]) for group in groups for rule in regexify_filename_rules(group, rules, level=1)]


def strangers(out: Path, known: list[re.Pattern[str]]) -> list[str]:
    """Paths that are no BIDS and not ignored."""
    paths = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    passed = [*IGNORED, ".bidsignore"]
    seen = [path for path in paths if not any(fnmatch(part, one) for part in path.parts for one in passed)]
    return [str(path) for path in seen if not any(rule.fullmatch(path.as_posix()) for rule in known)]


def test_every_file_has_a_name_of_the_standard(derivatives):
    known = patterns(schema())
    assert len(list(derivatives.rglob("*_desc-sr_*.nii.gz"))) == 4 and list(derivatives.rglob("figures/*.png"))
    assert strangers(derivatives, known) == []
    for page in ("report.html", "sub-01_anat_sub-01_desc-sr_T1w_report.html"):  # of `fastsrgan report`
        (derivatives / page).touch()
    assert strangers(derivatives, known) == []
    for name in ("sub-01_desc-sr_acq-x_T1w.nii.gz", "sub-01_desc-sr_brain.nii.gz"):
        (derivatives / "sub-01/anat" / name).touch()
        assert strangers(derivatives, known) == [f"sub-01/anat/{name}"]
        (derivatives / "sub-01/anat" / name).unlink()


def test_sidecars_and_description_hold_the_required_fields(derivatives):
    fields = schema().rules.sidecars.derivatives.common_derivatives
    required = [key for key, level in fields.ImageDerivatives.fields.items() if level == "required"]
    recommended = [key for key, what in fields.CommonDerivativeFields.fields.items() if "recommended" in str(what)]
    assert "SkullStripped" in required
    for image in derivatives.rglob("*.nii.gz"):
        said = read_json(sidecar(image))
        wanted = recommended + (required if image.name.endswith(("T1w.nii.gz", "T2w.nii.gz")) else [])
        assert [key for key in wanted if key not in said] == [], image.name
    assert {"Name", "BIDSVersion", "DatasetType", "GeneratedBy"} <= set(read_json(derivatives / DESCRIPTION))


def test_lines_of_an_earlier_bidsignore_are_kept(made, model, tmp_path):  # noqa: F811
    out, dataset = tmp_path, made / "raw"
    (out / ".bidsignore").write_bytes(b"*.html\ncaf\xe9\nfigures")
    for _ in range(2):
        infer_bids(dataset, out, model, participants=["01"], suffixes=("T1w",), overwrite=True, **QUICK)
        assert (out / ".bidsignore").read_bytes().split() == [b"*.html", b"caf\xe9", b"figures", b".fastsrgan"]


def validator() -> str:
    """The command of the standard's own validator; with its deno about 96 MB: make test-extras brings it."""
    beside = Path(sys.executable).parent / "bids-validator-deno"
    found = shutil.which("bids-validator-deno") or (str(beside) if beside.exists() else None)
    if found is None:
        pytest.skip("the BIDS validator is not installed: make test-extras")
    return found


def issues(root: Path) -> dict[str, list[str]]:
    """What the validator finds: severity -> codes and places."""
    done = subprocess.run([validator(), str(root), "--format", "json"], capture_output=True, text=True, check=False)
    told: dict[str, list[str]] = {"error": [], "warning": []}
    for issue in json.loads(done.stdout)["issues"]["issues"]:
        told[issue["severity"]].append(f"{issue['code']} {issue.get('subCode', '')} {issue.get('location')}")
    return told


def test_the_validator_finds_no_error(derivatives):
    told = issues(derivatives)
    assert told["error"] == [] and all("AUTHORS" in line for line in told["warning"])
    (derivatives / "sub-01/anat/sub-01_desc-sr_T1w.json").unlink()
    assert any("SkullStripped" in line for line in issues(derivatives)["error"])


@pytest.mark.parametrize("name", ("inv-1_MP2RAGE", "echo-2_MEGRE", "flip-1_mt-on_MPM", "run-1_echo-1_part-mag_T2starw"))
def test_derivatives_of_images_of_several_parts_break_no_rule(tmp_path, caplog, name):
    """What --suffix takes is no fault of its derivatives, entities stand in the order of BIDS."""
    entities, suffix = name.rsplit("_", 1)
    sr = tmp_path / "sub-1" / "anat" / f"sub-1_{entities}_desc-sr_{suffix}.nii.gz"
    sr.parent.mkdir(parents=True)
    sr.write_bytes(b"")
    meta = {"Sources": [], "SpatialReference": "orig", "SkullStripped": False}
    sidecar(sr).write_text(json.dumps(meta), encoding="utf8")
    write_json(tmp_path / DESCRIPTION, description("x", "1", {}))
    assert check_derivatives(tmp_path) == []
