#!/bin/sh
# usage: install.sh VENV LOW HIGH PYTHON...
#
# Creates the virtual environment VENV if it is missing or broken, with the first PYTHON whose version lies in
# LOW ... HIGH ("3.11" "3.12"), then installs the lock file of its version and this checkout (editable) into it.
set -eu

venv=$1 low=$2 high=$3
shift 3

# True if the interpreter runs (a shim may exist and fail), has a version in the range and can make environments.
suits() {
  "$1" - "$low" "$high" 2>/dev/null <<'PYTHON'
import ensurepip, sys, venv
low, high = (tuple(map(int, version.split("."))) for version in sys.argv[1:])
sys.exit(not low <= sys.version_info[:2] <= high)
PYTHON
}

if ! { suits "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
  found=
  for python in "$@"; do
    if suits "$python"; then
      found=$python
      break
    fi
  done
  if [ -z "$found" ]; then
    range="$low or newer"
    [ "$low" = "$high" ] && range=$low
    echo "error: no Python $range with venv and ensurepip among: $*; install one (on Debian and Ubuntu also" \
      "python3-venv), or name it: make PYTHON=/path/to/python ..." >&2
    exit 1
  fi
  echo "Creating $venv with $("$found" --version)"
  "$found" -m venv --clear "$venv"
fi

if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
  lock=requirements/lock-py311.txt
else
  lock=requirements/lock-py312.txt
fi
quiet=-q
[ -t 1 ] && quiet=
echo "Installing $lock into $venv (the first time a download of about 300 MB)"
"$venv/bin/python" -m pip install $quiet --disable-pip-version-check -r "$lock"
"$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
