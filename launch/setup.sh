#!/usr/bin/env bash
# Makes .venv in the repository and installs lock files into it, each only when it has changed.
# usage: bash launch/setup.sh LOCK...     names in launch/locks, e.g. `runtime models`
# PYTHON=/path/to/python chooses the interpreter; else the first of 3.11 or newer is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

new_enough() { "$@" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    if new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer: PATH; install one, or set PYTHON to its path" >&2
  exit 2
}

if ! new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  echo "setup: making .venv with $python"
  "$python" -m venv --clear .venv
fi

for lock in "$@"; do
  file=launch/locks/$lock.txt stamp=.venv/$lock.installed
  if cmp -s "$file" "$stamp"; then continue; fi
  echo "setup: installing $file into .venv ..."
  # The locks are complete, so nothing is resolved; modules are compiled when first imported.
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input \
    --require-hashes --no-deps --no-compile -r "$file"
  cp "$file" "$stamp"
  echo "setup: $lock ready after $SECONDS s"
done
