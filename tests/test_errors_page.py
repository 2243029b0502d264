"""docs/errors.md: what the commands say, word for word; and what holds for every error there is."""

from __future__ import annotations

import inspect
import re

import pytest

from fastsrgan import errors
from tools import errors_page, reliability

KINDS = [k for _, k in inspect.getmembers(errors, inspect.isclass) if issubclass(k, errors.FastsrganError)]
KINDS.remove(errors.SettingsError)  # made of faults that each have theirs


def test_the_page_shows_what_the_commands_say():
    told = errors_page.page()
    assert errors_page.PAGE.read_text(encoding="utf8") == told, "run python tools/errors_page.py and read what changed"
    rows = {int(n) for n in re.findall(r"^## (\d+)\. ", told, re.MULTILINE)}
    assert rows <= set(reliability.FAULTS) and len(rows) >= 25
    for said in re.findall(r"^error: (.*)$", told, re.MULTILINE):
        assert re.fullmatch(r"\S.*: .+ \(.+\)", said), said


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_without_a_way_out_cannot_be_made(kind):
    with pytest.raises(TypeError, match="hint"):
        kind("scan.nii", "is damaged")
    assert str(kind("scan.nii", "is damaged", "copy it again")) == "scan.nii: is damaged (copy it again)"


def test_what_a_file_says_of_itself_cannot_flood_a_message():
    """Found by atheris: 40,000 letters for the name of a network."""
    told = str(errors.ModelError("a" * 10**6, "b" * 10**6, "c"))
    assert len(told) < 34_000 and " ... " in told and told.endswith(" (c)")
