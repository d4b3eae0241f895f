#!/usr/bin/env bash
# Sets up .venv once, then reproduces Tables 1-7 (./run_all.sh), lists the plan (--dry-run) or proves it (./run_all.sh test).
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "error: $*" >&2; exit 2; }

python=${KN_PYTHON:-.venv/bin/python}
if [ -z "${KN_PYTHON:-}" ]; then
  stamp=.venv/kn-pins
  pins=$(cksum requirements.txt)
  if [ ! -x .venv/bin/python ] || [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$pins" ]; then
    base=""
    for candidate in python3.11 python3.12 python3.13 python3 python; do
      if command -v "$candidate" >/dev/null 2>&1 &&
         "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        base=$candidate
        break
      fi
    done
    [ -n "$base" ] || fail "Python 3.11, 3.12 or 3.13 is needed, found $(python3 --version 2>&1 || echo none):" \
      "install one, or name an environment with KN_PYTHON=/path/to/python"
    [ -w . ] || fail "the folder $(pwd) cannot be written: clone into one that can"
    echo "setting up .venv with $("$base" --version) (once; the pins take about 3 GB)"
    "$base" -m venv .venv || fail "the virtual environment could not be made:" \
      "install Python's venv module (Debian: apt-get install python3-venv)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
      fail "the pins could not be installed: see pip's message above; run ./run_all.sh again to go on"
    printf '%s\n' "$pins" > "$stamp"
  fi
  # kn is importable in every kernel and folder; written again where the checkout has moved
  link=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kn.pth
  if [ ! -f "$link" ] || [ "$(cat "$link")" != "$PWD" ]; then printf '%s\n' "$PWD" > "$link"; fi
else
  [ -x "$(command -v "$python" || true)" ] || fail "KN_PYTHON=$python is not a Python that can be run"
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || fail "KN_PYTHON=$python is $("$python" --version 2>&1): Python 3.11 or newer is needed"
  "$python" kn/suite/pins.py requirements.txt || fail "KN_PYTHON=$python lacks packages: $python -m pip install -r requirements.txt"
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi

export OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ "${1:-}" = test ]; then
  shift
  exec "$python" -m pytest "$@"
fi
export KN_QUICK_IMPORT=1  # kn/__init__.py: --help and the plan need no model
exec "$python" -m kn "$@"
