"""How records name files, which others read elsewhere and later."""

from __future__ import annotations

import os
from pathlib import Path

from fastsrgan.core.files import real, url_of


def recorded(path: str | os.PathLike) -> str:
    """A path as records name it: absolute, without ``..``, by the names of links; a URL as it is.

    Only where ``..`` follows a link does what the link leads to stand for it: of link/../x the text alone would make
    another file's name.
    """
    if url_of(path) and "://" in os.fspath(path):
        return os.fspath(path)
    given = Path(path).absolute()
    done = Path(given.anchor)
    for part in given.parts[1:]:
        done = (real(done) if os.path.islink(done) else done).parent if part == ".." else done / part
    return str(done)
