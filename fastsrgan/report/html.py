"""HTML made of elements whose text is always escaped; what is not ``Html`` is text, whoever wrote it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from typing import Any

VOID = {"br", "img", "input", "meta"}
# Controls that HTML forbids, and halves of surrogate pairs, which file names may hold and UTF-8 cannot.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class Html(str):
    """Markup; only ``el``, ``join`` and this package's own files make it."""


def text(value: object) -> Html:
    """Any value as text, escaped for elements and for quoted attributes."""
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", str(value))))


def el(tag: str, *children: object, **attributes: object) -> Html:
    """``el("a", "x", href="y", class_="z", data_path="p")``: children that are no Html are escaped, None is left out.

    A trailing underscore of an attribute's name is dropped, others become ``-``; True gives a bare attribute.
    """
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.removesuffix("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{text(value)}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if tag in VOID else f"{opening}{join(*children)}</{tag}>")


def join(*children: object) -> Html:
    """Elements and texts one after the other; lists are taken apart, None is left out."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(*child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else text(child))
    return Html("".join(parts))


def data_block(identifier: str, value: Any) -> Html:
    """JSON inside a page: nothing in it can end the element, and any string survives, halves of surrogates too."""
    plain = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for sign in "<>&":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" id="{text(identifier)}">{plain}</script>')


def source_hash(source: str) -> str:
    """What a content security policy calls an inline script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def pointer(*keys: object) -> str:
    """JSON pointer (RFC 6901) to a place in the page's facts."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def number(value: Any, path: str, *, digits: int = 4, signed: bool = False) -> Html:
    """A figure of the facts: rounded to ``digits`` significant ones, with its full value and its place in the facts."""
    if value is None:
        return el("span", "–", class_="none", data_path=path)
    return el("data", shown(value, digits, signed), value=json.dumps(value), data_path=path)


def shown(value: float, digits: int = 4, signed: bool = False) -> str:
    """A number as people read it: 31.25, 0.9617, 1 484 329, +0.096; large ones without digits after the point."""
    sign = "+" if signed and value > 0 else ""
    if isinstance(value, int) or abs(value) >= 10**digits:
        return sign + f"{round(value):,}".replace(",", "\u202f")
    return sign + f"{value:.{digits}g}"
