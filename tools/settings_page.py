"""``python tools/settings_page.py``: docs/config.md from the rows of fastsrgan/config.py.

``--check`` writes nothing and ends with 1 when the page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fastsrgan.config import ADVANCED, BASIC, RESUMED, SETTINGS, Setting

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "config.md"
TOP = """# Settings of a training run

Made by `python tools/settings_page.py` from the rows of `fastsrgan/config.py`; a test says when this page is out of
date.

`fastsrgan train --config FILE.yaml` reads a mapping of these settings; options on the command line win over it, and
`preset: paper` or `recommended`, or the option `--preset`, changes defaults. The settings of a run are kept in
`RUN/config.yaml` and in every snapshot. Unknown keys, wrong types and values that are not allowed are refused. `none`
is `null` in a file, or no line at all. Names of options take `-` and `_` alike.

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


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    if not args.check:
        PAGE.write_text(page(), encoding="utf8")
        return 0
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf8") != page()
    if stale:
        print(f"{PAGE} is out of date: python tools/settings_page.py", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
