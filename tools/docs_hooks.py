"""What the site needs besides docs/: README and the model cards, and links to files that lie outside of docs/.

The pages are read on their own too, so their links are relative to the repository. In the site a link to README or to a
card leads to its page, other files outside of docs/ are shown by their name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "fastsrgan" / "models"
PAGES = {  # files outside of docs/ that are pages of the site
    ROOT / "README.md": "readme.md",
    MODELS / "README.md": "model-card.md",
    MODELS / "perinatal.md": "model-card-perinatal.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside of docs/."""
    from mkdocs.structure.files import File

    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=path.read_text(encoding="utf8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave docs/ become links to a page of ``PAGES`` or plain names."""
    docs, uri = ROOT / "docs", page.file.src_uri
    outside = next((path for path, name in PAGES.items() if name == uri), None)
    here = (outside or docs / uri).parent

    def replaced(found: re.Match) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (here / target).resolve()
        if path in PAGES:
            return f"[{text}]({'../' * uri.count('/')}{PAGES[path]}{anchor})"
        if docs in path.parents and "slurm" not in path.parts:
            if outside:
                return f"[{text}]({path.relative_to(docs).as_posix()}{anchor})"
            return found[0]
        if not path.exists():
            raise FileNotFoundError(f"{uri} links to {target}, which does not exist")
        return text if text.startswith("`") else f"{text} (`{path.relative_to(ROOT).as_posix()}`)"

    return LINK.sub(replaced, markdown)
