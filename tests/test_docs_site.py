"""The documentation builds as a site, with warnings as errors; every page is in its navigation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site needs the developer tools (mkdocs)")

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(ROOT / "tools/mkdocs.yml")]
    done = subprocess.run([*command, "-d", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_built_and_opens_from_a_file(site):
    pages = {p.relative_to(DOCS).with_suffix(".html") for p in DOCS.rglob("*.md")}
    missing = [p for p in pages if not (site / p).is_file() and p.name != "README.html"]
    assert not missing
    assert (site / "decisions/index.html").is_file() and (site / "model-card.html").is_file()
    text = (site / "index.html").read_text(encoding="utf8")
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:)?//[^"]+"', text)
    assert not fetched, "the site fetches nothing"


def test_the_api_page_shows_what_the_package_exports(site):
    import fastsrgan

    text = (site / "api.html").read_text(encoding="utf8")
    for name in fastsrgan.__all__:
        if name not in ("__version__", "losses"):
            assert f'id="fastsrgan.{name}"' in text or f".{name}" in text, name


def test_every_page_is_reached_from_the_navigation():
    named = set(re.findall(r":\s*(\S+\.md)", (ROOT / "tools/mkdocs.yml").read_text(encoding="utf8")))
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if p.parent == DOCS}
    assert pages | {"decisions/README.md", "readme.md", "model-card.md", "model-card-perinatal.md"} == named


def test_the_table_of_models_is_reached(site):
    """The site had neither README nor the card of `perinatal`, so its links to them were names of files."""
    for page in ("index", "own-data", "inference"):
        assert 'href="readme.html#your-own-scan"' in (site / f"{page}.html").read_text(encoding="utf8"), page
    overview = (site / "readme.html").read_text(encoding="utf8")
    assert 'id="your-own-scan"' in overview and 'href="model-card-perinatal.html"' in overview
    pictures = re.findall(r'<img[^>]+src="([^"]+)"', overview)
    assert pictures and all((site / path).is_file() for path in pictures)
