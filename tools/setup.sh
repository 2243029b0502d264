#!/usr/bin/env bash
# Build the virtual environment that `make demo` and `make test` use: fastsrgan (editable), its dependencies in the
# versions of constraints.txt, the developer tools and, where there is an NVIDIA driver, the matching CUDA extra.
#
#   tools/setup.sh [FOLDER]      default .venv; safe to run again, also after an interruption
#   tools/setup.sh --cuda        only print which CUDA extra this machine would get: none, 12 or 13
#
#   PYTHON       interpreter to use (default: the first of python3, python3.1x that is 3.11 or newer)
#   CUDA         auto (default), none, 12 or 13
#   TORCH_INDEX  where torch comes from: a URL, or "pypi"
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${1:-.venv}
PY=$VENV/bin/python
LOG=$VENV/setup.log
TORCH=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
WHEELS=https://download.pytorch.org/whl
unset PYTHONPATH PYTHONHOME
started=$SECONDS

say() { printf '%s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

find_python() { # prints the first interpreter that is new enough
  local candidate found="" candidates=(python3 python3.14 python3.13 python3.12 python3.11 python)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
    found="$found $candidate is $("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo broken);"
  done
  fail "fastsrgan needs Python 3.11 or newer:${found:- none was found;} install one" \
    "(Debian, Ubuntu: apt install python3 python3-venv), or name it: make setup PYTHON=/path/to/python3"
}

driver_release() { # prints the major release of the NVIDIA driver, nothing without one
  local release=""
  if command -v nvidia-smi >/dev/null 2>&1; then
    release=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || release=""
  fi
  if [[ ! $release =~ ^[0-9]+\. && -r /proc/driver/nvidia/version ]]; then
    release=$(grep -oE '[0-9]{3,}\.[0-9]+(\.[0-9]+)?' /proc/driver/nvidia/version | head -n 1) || release=""
  fi
  [[ $release =~ ^([0-9]+)\. ]] && say "${BASH_REMATCH[1]}" || true
}

choose_cuda() { # prints none, 12 or 13
  local driver
  case ${CUDA:-auto} in
    none | 12 | 13) say "$CUDA" ;;
    auto)
      driver=$(driver_release)
      if [[ -z $driver ]]; then
        say none
      elif ((driver >= 580)); then
        say 13
      elif ((driver >= 525)); then
        say 12
      else
        say "      NVIDIA driver $driver is older than 525 (CUDA 12): installing for the CPU" >&2
        say none
      fi
      ;;
    *) fail "CUDA=$CUDA: auto, none, 12 or 13 are known" ;;
  esac
}

reachable() {
  "$PY" - "$1" <<'PYTHON' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=8)
PYTHON
}

show() { # pip's output -> one line that moves on a terminal, a few lines elsewhere
  local line count=0 name
  while IFS= read -r line; do
    case $line in
      Collecting\ * | Processing\ *) count=$((count + 1)) ;;
      *Downloading\ *" MB)"* | *"Using cached "*" MB)"*) ;;
      "Installing collected packages"*) line="installing $count packages" ;;
      WARNING:*"Retrying"*) ;;
      *) continue ;;
    esac
    name=${line#"${line%%[![:space:]]*}"}
    if [[ -t 1 ]]; then
      printf '\r\033[K      %3d  %.90s' "$count" "$name"
    elif [[ $line != Collecting\ * && $line != Processing\ * ]]; then
      printf '      %.100s\n' "$name"
    fi
  done
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
}

pip_install() {
  "$PY" -m pip install --disable-pip-version-check --no-input --progress-bar off -c constraints.txt "$@" 2>&1 |
    tee -a "$LOG" | show
}

installed_torch() {
  "$PY" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

install_torch() { # only where another build than the package index's is wanted
  local build=$1 index=${TORCH_INDEX:-} wanted=torch==$TORCH
  if [[ -z $index && $build != pypi ]]; then
    index=$WHEELS/$build wanted=torch==$TORCH+$build
  fi
  if [[ -z $index || $index == pypi ]]; then
    # A build for the CPU left from an earlier setup would satisfy pip.
    if [[ $build == pypi && $(installed_torch) == *+cpu ]]; then "$PY" -m pip uninstall -q -y torch; fi
    say "[2/4] PyTorch $TORCH comes from the package index"
  elif [[ $(installed_torch) == "$TORCH+$build" ]]; then
    say "[2/4] PyTorch $TORCH+$build is there"
  elif reachable "$index/torch/"; then
    say "[2/4] PyTorch $TORCH from $index"
    pip_install --no-deps --index-url "$index" "$wanted" || fail_pip
  else
    say "[2/4] $index cannot be reached: PyTorch $TORCH comes from the package index"
    if [[ $build == cu126 ]]; then
      say "      its CUDA 13 needs an NVIDIA driver 580 or newer; with yours fastsrgan will run on the CPU"
    fi
  fi
}

fail_pip() {
  tail -n 15 "$LOG" >&2
  fail "pip could not install everything (whole log: $LOG); is the network there? Run the same command again to go on."
}

if [[ $VENV == --cuda ]]; then
  choose_cuda
  exit
fi
python=$(find_python)
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python has no venv module (Debian, Ubuntu: apt install python3-venv)"
say "[1/4] $("$python" -c 'import platform; print("Python", platform.python_version())') in $VENV"
if ! "$PY" -c 'import pip, sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
fi
: >"$LOG"

cuda=$(choose_cuda)
case $cuda in
  none) install_torch cpu ;;
  12) install_torch cu126 ;;
  13) install_torch pypi ;;
esac

say "[3/4] fastsrgan, its dependencies and the developer tools"
pip_install hatchling || fail_pip # first, so that the editable build below needs no second download
pip_install --no-build-isolation -e '.[dev]' || fail_pip
if [[ $cuda == none ]]; then
  if ! pip_install --no-build-isolation -e '.[dev,dali]'; then
    tail -n 5 "$LOG"
    say "      DALI could not be installed: threads feed the training, and the tests of its pipeline are skipped"
  fi
else
  say "      extra cuda$cuda: DALI and CuPy"
  if ! pip_install --no-build-isolation -e ".[dev,cuda$cuda]"; then
    tail -n 5 "$LOG"
    say "      extra cuda$cuda could not be installed: going on without DALI and CuPy (see fastsrgan doctor)"
  fi
fi

say "[4/4] ready in $((SECONDS - started)) s: $("$PY" -c 'import torch; print("torch", torch.__version__, "with a CUDA device" if torch.cuda.is_available() else "on the CPU")')"
