"""``python tools/settings_page.py``: docs/config.md from the rows of fastsrgan/config.py, and the tables of registries.

A table stands in its page between ``<!-- NAME: python tools/settings_page.py -->`` and ``<!-- end -->``.
``--check`` writes nothing and ends with 1 when a page is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from fastsrgan.config import ADVANCED, BASIC, RESUMED, SETTINGS, Setting
from fastsrgan.evaluate.figures import FIGURES
from fastsrgan.observation.artefacts import ARTEFACTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "config.md"
TOP = """# Settings of a training run

Made by `python tools/settings_page.py` from the rows of `fastsrgan/config.py`; a test says when this page is out of
date.

`fastsrgan train --config FILE.yaml` reads a mapping of these settings; options on the command line win over it, and
`preset: paper` or `recommended`, or the option `--preset`, changes defaults. The settings of a run are kept in
`RUN/config.yaml` and in every snapshot. Unknown keys, wrong types and values that are not allowed are refused. `none`
is `null` in a file, or no line at all where the preset has no value of its own. Names of options take `-` and `_`
alike.

```yaml
new_low_res: [[0.5, 0.5, 2], [0.5, 0.5, 4]]
batch_size: 8
ema: 0.999
```

A run that is resumed with another value than its snapshot's (last column):

"""
HEAD = "| setting | default | allowed | option | meaning | resumed |\n|---|---|---|---|---|---|\n"


def allowed(row: Setting) -> str:
    """Values that are allowed, as far as they are choices or bounds; the meaning says the rest."""
    if row.choices:
        return ", ".join(f"`{choice}`" for choice in row.choices)
    if row.kind is bool:
        return "true, false"
    bounds = [(row.above, "above {:g}"), (row.low, "from {:g}"), (row.high, "up to {:g}"), (row.below, "below {:g}")]
    said = ", ".join(text.format(bound) for bound, text in bounds if bound is not None)
    said = said or ("any whole number" if row.kind is int else "")
    return f"{said}, or none" if row.optional else said


def line(row: Setting) -> str:
    """The row of a setting."""
    text = row.text(row.default).lower() if row.kind is bool else row.text(row.default)
    default = "required" if row.default == () else text
    for preset, value in row.presets.items():
        default += f"; {preset}: {row.text(value).lower() if row.kind is bool else row.text(value)}"
    meaning = f"{row.help}; {row.more}" if row.more else row.help
    options = ", ".join(f"`{flag}`" for flag in row.flags)
    return f"| `{row.name}` | {default} | {allowed(row)} | {options} | {meaning} | {row.resume} |\n"


def page() -> str:
    """The whole page."""
    text = TOP + "".join(f"* {name}: {what}\n" for name, what in RESUMED.items())
    for group in (BASIC, ADVANCED):
        rows = "".join(line(row) for row in SETTINGS.values() if row.group == group)
        text += f"\n## {group.capitalize()} settings\n\n{HEAD}{rows}"
    return text


def figures() -> str:
    """The figures of an evaluation."""
    better = {1: "more", -1: "less", 0: ""}
    head = "| name | figure | better | definition |\n|---|---|---|---|\n"
    rows = [(name, f.named, better[f.better], f.definition.replace("|", "\\|")) for name, f in FIGURES.items()]
    return head + "".join(f"| `{name}` | {label} | {sign} | {meaning} |\n" for name, label, sign, meaning in rows)


def artefacts() -> str:
    """What `artefacts` of a training run takes."""
    where = {"image": "image and truth", "slices": "slices as they are formed", "scan": "the finished scan"}
    rows = [(name, where[a.stage], a.amount, a.below) for name, a in ARTEFACTS.items()]
    head = "| name | acts on | amount | up to |\n|---|---|---|---|\n"
    return head + "".join(f"| `{n}` | {on} | {amount} | {below:g} |\n" for n, on, amount, below in rows)


# Page and table -> what makes it.
TABLES: dict[tuple[str, str], Callable[[], str]] = {
    ("evaluation.md", "figures"): figures,
    ("training.md", "artefacts"): artefacts,
}


def pages() -> dict[Path, str]:
    """Every page that is made here, or has a table that is, and its text."""
    made = {PAGE: page()}
    for (name, table), make in TABLES.items():
        path = ROOT / "docs" / name
        text = made.get(path) or path.read_text(encoding="utf8")
        mark = f"<!-- {table}: python tools/settings_page.py -->\n"
        assert text.count(mark) == 1, f"{path} has no place for the table {table}"
        made[path] = re.sub(f"({re.escape(mark)}).*?(<!-- end -->)", lambda m: m[1] + make() + m[2], text, flags=re.S)  # noqa: B023
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf8") != text]
    if args.check:
        for path in stale:
            print(f"{path} is out of date: python tools/settings_page.py", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(pages()[path], encoding="utf8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
