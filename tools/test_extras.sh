#!/usr/bin/env bash
# What some tests need beside the Python packages of tools/setup.sh; without it they are skipped, and say so.
#
#   tools/test_extras.sh [FOLDER]     default .venv; safe to run again
#
# The BIDS validator is a wheel of about 96 MB for FOLDER, Chromium a Debian package (about 400 MB with what it needs),
# which root may install.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${1:-.venv}/bin/python
VALIDATOR=3.0.2 # the one that docs/evaluation.md names
missing=0

say() { printf '%s\n' "$*"; }

if "$PY" -m pip install --disable-pip-version-check --no-input -q "bids-validator-deno==$VALIDATOR"; then
  say "BIDS validator: $VALIDATOR is there"
else
  say "BIDS validator: pip could not install bids-validator-deno==$VALIDATOR" >&2
  missing=1
fi

# Files alone: ``command -v`` would find functions too.
browser() { type -P chromium || type -P chromium-browser || type -P google-chrome; }

if browser >/dev/null; then
  say "Chromium: $(browser) is there"
elif ! command -v apt-get >/dev/null; then
  say "Chromium: install it with the packages of this system" >&2
  missing=1
elif [[ $(id -u) != 0 ]]; then
  say "Chromium: only root may install it: sudo apt-get install chromium" >&2
  missing=1
elif apt-get update -q && apt-get install -q -y --no-install-recommends chromium && browser >/dev/null; then
  say "Chromium: $(browser) is there"
else
  say "Chromium: apt-get could not install it" >&2
  missing=1
fi
exit $missing
