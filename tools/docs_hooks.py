"""What the site needs besides docs/: the model card, and links to files that lie outside of docs/.

The pages are read on their own too, so their links are relative to the repository. In the site a link to the model card
leads to its page, other files outside of docs/ are shown by their name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "fastsrgan" / "models" / "README.md"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the model card as a page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "model-card.md", content=CARD.read_text(encoding="utf8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave docs/ become links to the model card or plain names."""
    here = CARD.parent if page.file.src_uri == "model-card.md" else (ROOT / "docs" / page.file.src_uri).parent
    docs = ROOT / "docs"

    def replaced(found: re.Match) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (here / target).resolve()
        if path == CARD:
            return f"[{text}]({'../' * page.file.src_uri.count('/')}model-card.md{anchor})"
        if docs in path.parents and "slurm" not in path.parts:
            if here == CARD.parent:
                return f"[{text}]({path.relative_to(docs).as_posix()}{anchor})"
            return found[0]
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which does not exist")
        return text if text.startswith("`") else f"{text} (`{path.relative_to(ROOT).as_posix()}`)"

    return LINK.sub(replaced, markdown)
