"""The table of faults (tools/mutants.py) follows the code, and its runner tells what is noticed from what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from fastsrgan.core.system import source_commit
from tools import mutants, reliability

ROOT = Path(__file__).parent.parent
PARTS = ("observation", "pool", "critic", "loop", "options", "bench", "inference", "pages", "files", "volume")
PARTS += ("evaluate", "store", "model", "core", "commands", "dicom")
ENTRY = """[[mutant]]
what = "{what}"
file = "code.py"
old = '''{old}'''
new = '''{new}'''
tests = ["test_code.py::{test}"]
{more}
"""


def test_every_fault_stands_where_the_table_says_and_its_tests_are_there():
    """Text that stands exactly once, another text, still Python, tests by their names: else the entry is mended."""
    table = mutants.table()
    assert not mutants.faults(table)
    parts = Counter(m.part for m in table)
    assert len(table) >= 120 and set(parts) == set(PARTS) and min(parts.values()) >= 8, parts


def test_what_is_wrong_with_a_table_is_said(tmp_path):
    (tmp_path / "code.py").write_text("x = 1\ny = 1\n", encoding="utf8")
    (tmp_path / "test_code.py").write_text("def test_x():\n    pass\n", encoding="utf8")
    one = mutants.Mutant("p", "w", "code.py", "x = 1", "x = 2", ("test_code.py::test_x",))
    other = [
        mutants.Mutant("p", "twice there", "code.py", " = 1", " = 2", ("test_code.py",)),
        mutants.Mutant("p", "not there", "code.py", "z = 1", "z = 2", ("test_code.py",)),
        mutants.Mutant("p", "no file", "none.py", "x", "y", ("test_code.py",)),
        mutants.Mutant("p", "no Python", "code.py", "x = 1", "x = ", ("test_code.py",)),
        mutants.Mutant("p", "no test", "code.py", "x = 1", "x = 2", ("test_code.py::test_y", "test_none.py")),
    ]
    assert not mutants.faults([one], tmp_path)
    found = mutants.faults([one, one, *other], tmp_path)
    assert [line.split(": ", 2)[1] for line in found] == [
        "w", "twice there", "not there", "no file", "no Python", "no test", "no test"
    ]  # fmt: skip


def test_a_run_tells_what_is_noticed_goes_on_and_leaves_the_sources_alone(tmp_path):
    """A package of two functions: one is tested, one is not, one test fails anyway, one change is the same by law."""
    root, folder = tmp_path / "root", tmp_path / "table"
    root.mkdir()
    folder.mkdir()
    code = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
    tests = "import importlib.util\nfrom pathlib import Path\n\n"
    tests += "spec = importlib.util.spec_from_file_location('own', Path(__file__).with_name('code.py'))\n"
    tests += "own = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(own)\n\n\n"
    tests += "def test_double():\n    assert own.double(2) == 4\n\n\ndef test_broken():\n    assert own.double(0)\n"
    (root / "code.py").write_text(code, encoding="utf8")
    (root / "test_code.py").write_text(tests, encoding="utf8")
    rows = [
        ("noticed", "2 * x", "3 * x", "test_double", ""),
        ("same for this test", "2 * x", "x * x", "test_double", ""),
        ("the same by law", "2 * x", "x * 2", "test_double", 'same = "a product"'),
        ("fails anyway", "2 * x", "3 * x", "test_broken", ""),
        ("gone", "4 * x", "3 * x", "test_double", ""),
    ]
    text = "\n".join(ENTRY.format(what=w, old=o, new=n, test=t, more=m) for w, o, n, t, m in rows)
    (folder / "part.toml").write_text(text, encoding="utf8")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tools import mutants
mutants.LIBRARIES = ()
table = mutants.table(Path({str(folder)!r}))
results = mutants.run(table, table, Path({str(tmp_path / "r.json")!r}), 5, Path({str(root)!r}))
print(mutants.report(table, results))
"""
    # In a process of its own: the runner forks, which a process with threads should not.
    command = [sys.executable, "-c", script]
    surroundings = {**os.environ, "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    surroundings.pop("PYTEST_XDIST_WORKER", None)
    first, second = (
        subprocess.run(command, capture_output=True, text=True, env=surroundings, check=True, cwd=tmp_path)
        for _ in range(2)
    )
    told, kept = first.stdout, json.loads((tmp_path / "r.json").read_text(encoding="utf8"))
    assert {row["commit"] for row in kept["mutants"].values()} == {source_commit()}
    assert set(kept["machine"]) == {"cpu", "cores"} and "commit" in reliability.commit_of(kept["mutants"]["part: gone"])
    assert "noticed    part: noticed  test_code.py::test_double" in told
    assert "missed     part: same for this test" in told and "tests fail without it part: fails anyway" in told
    assert "no longer applies part: gone" in told
    assert "| part | 5 | 1 | 1 | 1 | 2 |" in told and "* part: the same by law: a product" in told
    assert "\nMissed:\n\n* part: same for this test\n" in told
    # What was judged is not tried again, what was not is.
    assert "part: noticed  test" not in second.stdout and "part: gone" in second.stdout
    assert (root / "code.py").read_text(encoding="utf8") == code
