"""``make test-matrix``: a surrounding that is not in force, or that the machine lacks, never counts as passed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tools import reliability, test_matrix
from tools.test_matrix import ROWS, Row

ROOT = Path(__file__).parent.parent


def small_tests(folder: Path, text: str) -> list[str]:
    (folder / "test_small.py").write_text(f"import os\n\n\ndef test_it():\n    {text}\n", encoding="utf8")
    return [str(folder / "test_small.py"), "--rootdir", str(folder), "-c", os.devnull]


def test_every_row_of_the_issue_is_there_and_the_files_of_the_short_form_are():
    names = {row.name for row in ROWS}
    assert len(names) == len(ROWS)
    wanted = [f"ATEN_CPU_CAPABILITY={c}" for c in ("default", "avx2", "avx512")]
    wanted += [f"ONEDNN_MAX_CPU_ISA={c}" for c in ("AVX2", "AVX512_CORE", "AVX512_CORE_BF16")]
    wanted += ["1 thread", "2 threads", "4 threads", "TZ=Asia/Kolkata", "LC_ALL=C", "LC_ALL=tr_TR.UTF-8"]
    assert names >= set(wanted)
    assert all((ROOT / test.split("::")[0]).is_file() for test in test_matrix.SHORT)


def test_tests_run_in_the_surrounding_of_their_row(tmp_path):
    row = Row("zone", {"TZ": "Asia/Kolkata"}, in_force={"zone": "+0530", "threads": lambda n: n > 0})
    found = test_matrix.run(row, small_tests(tmp_path, "assert os.environ['TZ'] == 'Asia/Kolkata'"), jobs=0)
    assert (found["result"], found["tests"]) == ("passed", 1), found
    assert found["facts"]["zone"] == "+0530" and "reason" not in found
    found = test_matrix.run(Row("none"), small_tests(tmp_path, "assert os.environ.get('TZ') == 'Asia/Kolkata'"), jobs=0)
    assert found["result"] == "failed" and "test_it" in found["reason"], found


def test_a_surrounding_that_is_not_in_force_is_a_failure(tmp_path):
    row = Row("wrong", in_force={"simd": "a processor that nobody has"})
    found = test_matrix.run(row, small_tests(tmp_path, "pass"), jobs=0)
    assert found["result"] == "failed" and found["reason"].startswith("not in force: simd is "), found


def test_what_this_machine_lacks_is_said_and_not_run(tmp_path):
    def mounts(folder: Path) -> list[str]:
        raise test_matrix.CannotRun("no mounts")

    nowhere = [str(tmp_path / "no_such_test.py")]
    lacking = test_matrix.run(Row("feature", flags=("a_feature_of_nobody",)), nowhere, jobs=0)
    assert lacking == {"result": "not on this processor", "reason": "no a_feature_of_nobody"}
    assert test_matrix.run(Row("mount", wrapper=mounts), nowhere, jobs=0) == {
        "result": "not run",
        "reason": "no mounts",
    }


@pytest.mark.parametrize(
    ("code", "output", "result"),
    [
        (0, "3 passed, 1 skipped in 2s", "passed"),
        (0, "4 skipped in 2s", "failed"),
        (1, "FAILED tests/test_a.py::test_b - no\n1 failed, 3 passed in 2s", "failed"),
        (4, "ERROR: file or directory not found: tests/test_gone.py", "failed"),
        (5, "no tests ran in 0s", "failed"),
        (-9, "", "failed"),
    ],
)
def test_only_tests_that_ran_and_passed_pass(code, output, result):
    found = test_matrix.ended(code, output)
    assert found["result"] == result and (result == "passed") == ("reason" not in found)


def test_rows_of_another_processor_are_not_kept_beside_those_of_this_one(tmp_path):
    path = tmp_path / "matrix.json"
    assert test_matrix.kept(path, "a") == {}
    path.write_text(json.dumps({"cpu": "a", "cores": test_matrix.cores(), "rows": {"x": {"result": "passed"}}}))
    assert test_matrix.kept(path, "a") == {"x": {"result": "passed"}} and test_matrix.kept(path, "b") == {}


def test_the_page_tells_every_result_with_its_reason(tmp_path):
    rows = {
        "x": {"result": "passed", "tests": 7, "seconds": 3, "cpu_seconds": 5, "commit": "abc-dirty"},
        "z": {"result": "passed", "tests": 2, "seconds": 1, "cpu_seconds": 1, "files": ["tests/test_a.py"]},
        "y": {"result": "not on this processor", "reason": "no avx512f"},
    }
    (tmp_path / "matrix.json").write_text(json.dumps({"cpu": "a cpu", "cores": 2, "rows": rows}))
    text = reliability.matrix(tmp_path / "matrix.json")
    assert "a cpu, 2 cores" in text and "| x | passed | 7 |  | 3 | 5 | abc-dirty |" in text
    assert "| z | passed | 2 of test_a alone |  | 1 | 1 | not kept |" in text
    assert "| y | not on this processor: no avx512f |" in text
