"""The examples of the pages, the help texts and the docstrings: Python is run, command lines are parsed as typed."""

from __future__ import annotations

import argparse
import doctest
import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from cohort import SMALL, make_store
from report_results import make_results, make_scores

import fastsrgan
from fastsrgan.cli.main import build_parser, normalised
from fastsrgan.train.run import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs" / "errors.md")  # its commands are wrong on purpose
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(?:\.venv/bin/)?(fastsrgan [a-z]+ [^`]+)`")
COMMAND = re.compile(r"(?:^|\s|/)fastsrgan\s+(.*)", re.DOTALL)


def text(page: Path) -> str:
    return page.read_text(encoding="utf8")


def shell_lines(source: str) -> list[list[str]]:
    """Words after ``fastsrgan`` of every command line in a text of commands."""
    found = []
    for line in source.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if match := COMMAND.search(part):
                found.append(shlex.split(match[1], comments=True))
    return found


def from_pages() -> list[tuple[str, list[str]]]:
    return [
        (page.name, words)
        for page in PAGES
        for language, block in BLOCK.findall(text(page))
        if language not in ("python", "json", "yaml")
        for words in shell_lines(block)
    ]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def from_help() -> list[tuple[str, list[str]]]:
    # The text after the examples also says "fastsrgan ...": only the indented lines are commands.
    return [
        (f"{name} --help", words)
        for name, p in subparsers().items()
        for words in shell_lines("\n".join(re.findall(r"^ +.*", (p.epilog or "").replace("\\\n", " "), re.MULTILINE)))
    ]


EXAMPLES = from_pages() + from_help()


def test_examples_are_found():
    assert len(from_pages()) > 25 and len(from_help()) >= len(subparsers()) > 8
    assert {"README.md", "index.md", "training.md", "evaluation.md", "report.md"} <= {name for name, _ in EXAMPLES}


@pytest.mark.parametrize(("where", "words"), EXAMPLES, ids=lambda v: v if isinstance(v, str) else " ".join(v)[:60])
def test_a_command_line_is_understood(where, words):
    """With the parser of the command itself: every option exists, every value has its form."""
    parse(words)


def parse(words: list[str]) -> argparse.Namespace:
    return build_parser().parse_args([word for word in normalised(words) if word not in ("--debug", "--quiet")])


def test_a_wrong_line_is_refused(capsys):
    for words in (["infer", "a.nii.gz", "--paches", "8"], ["studdy"], ["study", "steps", "--ratios", "x"]):
        with pytest.raises((SystemExit, fastsrgan.FastsrganError)):
            parse(words)


def test_options_named_in_sentences_exist():
    known = {name: {o for a in p._actions for o in a.option_strings} for name, p in subparsers().items()}
    seen = 0
    for page in PAGES:
        for line in INLINE.findall(text(page)):
            name, *words = line.split()[1:]
            for word in words:
                if re.fullmatch(r"--?[A-Za-z][\w-]*", word):
                    seen += 1
                    assert word in known[name], f"{page.name}: {line}"
    assert seen > 5


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """What the pages' Python takes for granted: a run, results with scores, a scan as an array, its affine, a head."""
    out = make_results(tmp_path)
    make_scores(out)
    shutil.copy(out / "scores.json", tmp_path / "scores.json")
    short = SMALL.replace(epochs=1, steps_per_epoch=1, critic_iterations=1)
    train(make_store(tmp_path, train=1, test=0), tmp_path / "run", short, device="cpu")
    monkeypatch.chdir(tmp_path)
    data, affine = np.random.default_rng(0).random((16, 16, 6)).astype(np.float32), np.diag([1.0, 1, 3, 1])
    result = fastsrgan.infer_volume(data, affine, fastsrgan.load_generator("run"), patch=16, step=16)
    return {"data": data, "affine": affine, "hr": np.ones((12, 12, 12), np.float32), "result": result}


def test_the_python_of_the_pages_runs(prepared):
    blocks = [
        (page.name, code) for page in PAGES for language, code in BLOCK.findall(text(page)) if language == "python"
    ]
    assert {"README.md", "api.md", "report.md"} <= {name for name, _ in blocks}
    for name, code in blocks:
        names = dict(prepared)
        exec(compile(code, name, "exec"), names)
        if "figure" in names:
            assert (Path("result.png")).stat().st_size > 1000
        if "low" in names:
            assert names["low"].shape == (12, 12, 12)


def test_the_examples_of_the_docstrings_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_examples = [p for p in sorted((ROOT / "fastsrgan").rglob("*.py")) if ">>> " in text(p)]
    assert with_examples
    for path in with_examples:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        done = doctest.testmod(module)
        assert done.attempted > 0 and done.failed == 0, path.name
