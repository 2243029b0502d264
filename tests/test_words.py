"""The words of the sources: no document that is not in the repository, one name for one class, names that say what
they are."""

from __future__ import annotations

import ast
import collections
import itertools
import re
from pathlib import Path

import pytest
from test_layers import ORDER

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastsrgan"
FOLDERS = ("fastsrgan", "kernels", "tools", "tests", "bench", "docs", ".github")
TEXTS = {".py", ".cu", ".h", ".md", ".toml", ".yml", ".yaml", ".cfg"}
# Plans and lists that stand elsewhere, and the numbers of their entries.
ELSEWHERE = re.compile(
    r"DESIGN(\.md| D\d| section)|SEGSRGAN\.md|FAULTS(\.md| \d)|STYLE(\.md| section)|ANCHORS|\bFABLE\b"
    r"|(?<![\w×*/ ])\bD\d{1,2}\b(?! ?[x×])|[(;,] ?D\d{1,2}[);,]"
)
NOTHING = {"told", "found", "asked", "looked_at", "within", "how"}  # as names, these say nothing
FILE = re.compile(r"\b[a-z][a-z0-9_]+\.py\b")
# Files of others that are named: the original's scripts, and what Python or a user's project has.
OTHERS = {"setup.py", "conftest.py", "train.py"}


def texts() -> list[Path]:
    """All that is written by hand or shown to readers."""
    found = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.suffix in TEXTS and p.is_file()]
    return [*found, *sorted(ROOT.glob("*.md")), ROOT / "Makefile", ROOT / "pyproject.toml"]


def classes(folder: Path) -> dict[str, list[str]]:
    """Name of a class, without underscores before it -> where it is."""
    places = collections.defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return places


def names(tree: ast.Module) -> set[str]:
    """Names of a module and of its classes: functions, values, methods, fields."""
    found = set()
    for body in [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                found |= {target.id} if isinstance(target, ast.Name) else set()
    return {name.lstrip("_") for name in found}


def test_no_document_is_named_that_is_not_here():
    mentions = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), 1)
        if ELSEWHERE.search(line)
    ]
    assert not mentions, "\n".join(mentions)


@pytest.mark.parametrize(
    "text", ["(DESIGN D5)", "as FAULTS.md says", "the matrices (D1)", "D14: agreement", "STYLE section 5"]
)
def test_a_mention_is_seen(text):
    assert ELSEWHERE.search(text)


@pytest.mark.parametrize("text", ["(D1 x D2)(U1 x U2)", "DEFAULTS = {}", "DESIGNED", "a 3D10 grid"])
def test_other_words_are_not_mentions(text):
    assert not ELSEWHERE.search(text)


def test_a_class_has_a_name_of_its_own():
    twice = {name: places for name, places in classes(PACKAGE).items() if len(places) > 1}
    assert not twice


def test_names_of_modules_and_classes_say_what_they_are():
    empty = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in names(ast.parse(path.read_text(encoding="utf8"))) & NOTHING
    ]
    assert not empty, "\n".join(empty)
    assert names(ast.parse("class A:\n    told: int\n    def how(self): ...\nasked = 1")) >= {"told", "how", "asked"}


def test_modules_that_are_named_exist():
    there = {
        path.name
        for folder in ("fastsrgan", "tools", "tests", "bench", "docs")
        for path in (ROOT / folder).rglob("*.py")
    }
    gone = [
        f"{path.relative_to(ROOT)}:{number}: {name}"
        for folder in ("fastsrgan", "tools", "bench", "kernels")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".cu", ".h")
        for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), 1)
        for name in FILE.findall(line)
        if name not in there | OTHERS
    ]
    assert not gone, "\n".join(gone)


# --- CONTRIBUTING.md ------------------------------------------------------------------------------------------------

GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
STEP = re.compile(r"^\d\. `([\w/]+\.py)`(.*(?:\n   .*)*)", re.M)


def defined(path: Path) -> set[str]:
    """Names of functions, classes and their methods (`Class.method` too) in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_the_map_names_every_package_in_order():
    block = GUIDE.split("```")[3]
    assert "errors" in block, "the second block of CONTRIBUTING.md is the map"
    words = [word for line in block.splitlines() for word in re.split(r"\s{3,}", line)[0].replace("/", "").split()]
    assert words and set(words) == {name for name in ORDER if not name.startswith("__")}
    places = [ORDER.index(name) for name in words if name not in ("_version",)]
    assert sorted(places) == sorted(set(places))


@pytest.mark.parametrize("begin, most", [("to the first loss", 4), ("NIfTI file to its result", 6)])
def test_a_walk_names_files_and_functions_that_are_there(begin, most):
    part = GUIDE[GUIDE.index(begin) :]
    steps = STEP.findall(part[: part.index("\n\n", part.index("\n1. "))])
    assert 0 < len(steps) <= most
    for name, words in steps:
        path = PACKAGE / name
        assert path.is_file(), name
        first, _, _ = words.partition(":")
        called = [word.split("(")[0] for word in re.findall(r"`([\w.]+)`", first)]
        assert called and set(called) <= defined(path), (name, called)


def called_in(path: Path) -> set[str]:
    """Names of what a file calls or hands on to be called."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf8"))))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize("begin", ["to the first loss", "NIfTI file to its result"])
def test_every_step_of_a_walk_is_called_in_the_one_before(begin):
    part = GUIDE[GUIDE.index(begin) :]
    steps = STEP.findall(part[: part.index("\n\n", part.index("\n1. "))])
    for (name, _), (following, words) in itertools.pairwise(steps):
        first = re.findall(r"`([\w.]+)`", words.partition(":")[0])[0].split(".")[-1]
        assert first in called_in(PACKAGE / name), f"{name} does not call {first} of {following}"


def test_every_file_that_contributing_names_is_there():
    named = set(re.findall(r"`((?:fastsrgan|tests|tools|docs|bench)?/?[\w/]+\.(?:py|md))`", GUIDE))
    assert named
    gone = [name for name in named if not any((base / name).is_file() for base in (ROOT, PACKAGE))]
    assert not gone, gone
