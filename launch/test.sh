#!/usr/bin/env bash
# Lint, format, types and tests.
# usage: bash launch/test.sh [--all]     --all adds the tests marked slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Python keeps what it compiles: the many processes of the tests would compile it all again.
unset PYTHONDONTWRITEBYTECODE

case "$#:${1:-}" in
  0:) selection=(-m "not slow") ;;
  1:--all) selection=() ;;
  1:-h | 1:--help)
    sed -n '2,3s/^# //p' launch/test.sh
    exit 0
    ;;
  *)
    echo "error: unknown arguments: $*; use --all or none" >&2
    exit 2
    ;;
esac

bash launch/setup.sh test models

# The oracles want the CPU build of torch, which only some package indexes serve. Where it
# cannot be had their tests skip; a torch that does not import would confuse transformers.
torch=2.13.0
if ! .venv/bin/python -c "import torch; assert torch.__version__.startswith('$torch')" 2>/dev/null; then
  echo "setup: installing torch $torch (CPU) ..."
  build=$torch
  if [[ $(uname -s) == Linux ]]; then build+=+cpu; fi
  if ! { .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input \
    --no-deps --no-compile "torch==$build" && .venv/bin/python -c "import torch"; } 2>/dev/null; then
    .venv/bin/python -m pip uninstall -qq -y torch 2>/dev/null
    echo "setup: no torch $build from the configured package indexes; its oracle tests will skip"
  fi
fi

# The copies of node and pyright that the lock brings, and no look for newer ones.
export PYRIGHT_PYTHON_GLOBAL_NODE=off PYRIGHT_PYTHON_IGNORE_WARNINGS=1

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
cores=$(getconf _NPROCESSORS_ONLN)
exec .venv/bin/python -m pytest -q -rs -n "$((cores < 4 ? cores : 4))" --dist loadscope --no-loadscope-reorder \
  ${selection[@]+"${selection[@]}"}
