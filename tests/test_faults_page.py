"""docs/reliability.md: every row of what can go wrong has a test, and the page says which."""

from __future__ import annotations

from pathlib import Path

from tools import reliability

ROOT = Path(__file__).parent.parent


def test_every_row_has_a_test_and_the_page_names_them():
    tests = reliability.tests_of_rows(ROOT / "tests")
    assert sorted(tests) == list(range(1, 48)) and all(tests.values())
    assert reliability.PAGE.read_text(encoding="utf8") == reliability.page(tests), "run python tools/reliability.py"


def test_the_codes_of_the_errors_are_those_of_the_readme():
    from fastsrgan import errors
    from fastsrgan.cli.main import failed

    kinds = [getattr(errors, name) for name in dir(errors) if name.endswith(("Error", "Failure"))]
    codes = {kind.exit_code for kind in kinds if kind is not errors.FastsrganError}
    text = (ROOT / "README.md").read_text(encoding="utf8")
    assert codes == {2, 3, 4, 5, 6} and all(f"\n| {code} | " in text for code in {0, failed(ValueError()), *codes})
