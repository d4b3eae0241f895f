#!/usr/bin/env bash
# Sets up .venv once, then reproduces Tables 1-7 (./run_all.sh), lists the plan (--dry-run) or proves it (./run_all.sh test).
# Relative paths mean the caller's folder; `setup` sets up and stops.
set -euo pipefail
export PYTHONUTF8=1
script=$0
while [ -L "$script" ]; do
  target=$(readlink "$script")
  case $target in /*) script=$target ;; *) script=$(dirname "$script")/$target ;; esac
done
root=$(CDPATH='' cd -P -- "$(dirname "$script")" && pwd)

fail() { echo "error: $*" >&2; exit 2; }

# Help and errors of the call come first, from the standard library alone; goes on where the packages are needed.
check() {
  case ${1:-} in setup | test) return ;; esac
  local status=0
  KN_CHECK=1 PYTHONPATH="$root" "$interpreter" -P -m kn "$@" || status=$?
  case $status:${KN_PYTHON:-} in
  10:* | 11:?*) ;;
  11:) fail "this needs the packages (about 3 GB): run ./run_all.sh setup first" ;;
  *) exit "$status" ;;
  esac
}

interpreter=${KN_PYTHON:-$root/.venv/bin/python}
if [ -z "${KN_PYTHON:-}" ]; then
  python=$interpreter
  stamp=$root/.venv/kn-pins
  pins=$(cd "$root" && cksum requirements.txt)
  if [ ! -x "$python" ] || [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$pins" ]; then
    interpreter=""
    for candidate in python3.11 python3.12 python3.13 python3 python; do
      fits=$("$candidate" -c 'import sys; print((3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || true)
      if [ "$fits" = True ]; then  # it says so itself: a name that runs something else does not count
        interpreter=$candidate
        break
      fi
    done
    [ -n "$interpreter" ] || fail "Python 3.11, 3.12 or 3.13 is needed, found $(python3 --version 2>&1 || echo none):" \
      "install one, or name an environment with KN_PYTHON=/path/to/python"
    check "$@"
    [ -w "$root" ] || fail "the folder $root cannot be written: clone into one that can"
    echo "setting up .venv with $("$interpreter" --version) (once; the pins take about 3 GB)"
    "$interpreter" -m venv "$root/.venv" || fail "the virtual environment could not be made:" \
      "install Python's venv module (Debian: apt-get install python3-venv)"
    "$python" -m pip install --disable-pip-version-check -r "$root/requirements.txt" ||
      fail "the pins could not be installed: see pip's message above; run ./run_all.sh again to go on"
    printf '%s\n' "$pins" > "$stamp"
    echo "set up in $((SECONDS / 60)) min $((SECONDS % 60)) s"
  fi
  # kn is importable in every kernel and folder; written again where the checkout has moved
  link=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kn.pth
  if [ ! -f "$link" ] || [ "$(cat "$link")" != "$root" ]; then printf '%s\n' "$root" > "$link"; fi
else
  python=$KN_PYTHON
  [ -x "$(command -v "$python" || true)" ] || fail "KN_PYTHON=$python is not a Python that can be run"
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' ||
    fail "KN_PYTHON=$python is $("$python" --version 2>&1): Python 3.11 or newer is needed"
  check "$@"
  "$python" "$root/kn/suite/pins.py" "$root/requirements.txt" ||
    fail "KN_PYTHON=$python lacks packages: $python -m pip install -r requirements.txt"
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
fi

export OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
[ "${1:-}" = mirror ] || export HF_HUB_OFFLINE=1  # nothing else reaches for a network
case ${1:-} in
setup) exit ;;
test)
  shift
  for name in KN_HOME KN_REPORTS KN_MIRROR; do
    case ${!name:-/} in /*) ;; *) export "$name=$PWD/${!name}" ;; esac
  done
  case $python in /*) ;; */*) python=$PWD/$python ;; esac
  cd "$root"
  exec "$python" -m pytest "$@"
  ;;
esac
export KN_QUICK_IMPORT=1  # kn/__init__.py: --help and the plan need no model
exec "$python" -P -m kn "$@"  # -P: a file of the caller's folder takes no module's place
