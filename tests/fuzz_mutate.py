"""Seeded damage for the fuzzers: to bytes, to values of JSON, to text. The same seed gives the same damage."""

from __future__ import annotations

import copy
import json
import random
import string
from collections.abc import Callable
from typing import Any

NUMBERS = (0, -1, 1, 2, 3, 7, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64, -(2**63), 10**30)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, False, "", "x", [], {}, [[]], [None], {"": 0}, -0.5, 1e-320, 1e308, float("nan"), float("inf")),
    *("../../../etc/passwd", "/etc/passwd", "a/../../b", "\0", "\n", "ü" * 40, "9" * 400, "A" * 5000, "{" * 3000),
)


def bytes_of(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """A few edits of ``data``: flips, lost, doubled and foreign parts, numbers at the edge."""
    found = bytearray(data)
    for _ in range(1 << chance.randrange(4)):
        at = chance.randrange(len(found) + 1) if chance.random() < 0.5 else chance.randrange(min(len(found), 600) + 1)
        length = min(1 << chance.randrange(10), len(found) - at)
        kind = chance.randrange(7)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif kind == 2:
            size = chance.choice((2, 4, 8))
            number = chance.choice(NUMBERS) % (1 << 8 * size)
            found[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))
        elif kind == 3:
            del found[at : at + length]
        elif kind == 4:
            found[at:at] = found[at : at + length]
        elif kind == 5:
            other = chance.choice(others)
            start = chance.randrange(len(other) + 1)
            found[at : at + length] = other[start : start + length]
        elif chance.random() < 0.2:
            del found[at:]
    return bytes(found)


def value_of(value: Any, chance: random.Random) -> Any:
    """``value``, made of lists, mappings and plain values, with a few places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(1 + chance.randrange(3)):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(chance.choice(VALUES))
        holder, key = chance.choice(places)
        _change(holder, key, chance)
    return value


def json_of(text: str, chance: random.Random) -> str:
    """The text of a JSON document, damaged: mostly its values, at times its letters."""
    if chance.random() < 0.2:
        return text_of(text, chance)
    return json.dumps(value_of(json.loads(text), chance))


def _places(value: Any) -> Any:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from _places(inner)


def _change(holder: Any, key: Any, chance: random.Random) -> None:
    kind = chance.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice(("", "extra", "../x", key + "_", "9" * 300))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.extend([holder[key]] * chance.choice((1, 2, 50)))
    elif kind == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        change: Callable[[Any], Any] = chance.choice((lambda v: v + 1, lambda v: -v, lambda v: v * 2**40, str, float))
        holder[key] = change(holder[key])
    elif kind == 4 and isinstance(holder[key], str):
        holder[key] = text_of(holder[key], chance)
    else:
        holder[key] = copy.deepcopy(chance.choice(VALUES))


def text_of(text: str, chance: random.Random) -> str:
    """Text with letters, lines and separators changed."""
    for _ in range(1 + chance.randrange(3)):
        at = chance.randrange(len(text) + 1)
        length = min(1 << chance.randrange(7), len(text) - at)
        signs = ",;\t\"'\r\n\0 #:-[]{}&*!|>%@`~=../\\" + "\ufeff\u2028\x85é" + string.ascii_letters + string.digits
        piece = "".join(chance.choice(signs) for _ in range(1 + chance.randrange(4))) * chance.choice((1, 1, 1, 3000))
        kind = chance.randrange(4)
        if kind == 0:
            text = text[:at] + piece + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + length :]
        elif kind == 2:
            text = text[: at + length] + text[at : at + length] * chance.choice((1, 1, 500)) + text[at + length :]
        else:
            text = text[:at] + str(chance.choice(VALUES)) + text[at + length :]
    return text
