#!/usr/bin/env bash
# From a fresh clone to a report: prompted, tuned, mixed and merged on four tasks.
# usage: bash launch/quickstart.sh [--data DIR] [--smoke] [--workdir DIR]
#   --data DIR     real data, DIR/<task>/{train,validation,test}.jsonl; else a synthetic shop
#   --smoke        a few minutes to see that everything runs; its numbers mean nothing
#   --workdir DIR  where the runs and the report go (runs/quickstart[-smoke][-data]); the same
#                  command again resumes there
set -euo pipefail
# Python keeps what it compiles for the next start.
unset PYTHONDONTWRITEBYTECODE
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$root/launch/quickstart.sh"; }
fail() {
  echo "error: $1" >&2
  exit 2
}

variant=quickstart suffix="" data="" workdir=""
while (($#)); do
  case $1 in
    --data | --workdir)
      [[ -n ${2:-} ]] || fail "missing folder: $1; give one, e.g. $1 path/to/folder"
      declare "${1#--}=$2"
      shift
      ;;
    --data=* | --workdir=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --smoke) variant=smoke suffix=-smoke ;;
    -h | --help)
      usage
      exit 0
      ;;
    *) fail "unknown option: $1; see bash launch/quickstart.sh --help" ;;
  esac
  shift
done

data_flags=()
if [[ -n $data ]]; then
  [[ -d $data ]] || fail "no such folder: $data; --data wants <task>/{train,validation,test}.jsonl in it"
  suffix+=-data
  if [[ $variant == quickstart ]]; then variant=real; fi
  data_flags+=(--config.data.source=local --config.data.path="$(cd "$data" && pwd)")
fi
flags=(--config="configs/study.py:$variant" ${data_flags[@]+"${data_flags[@]}"})
workdir=${workdir:-$root/runs/quickstart$suffix}
[[ $workdir == /* ]] || workdir=$PWD/$workdir

cd "$root"
bash launch/setup.sh runtime models
exec .venv/bin/python -m launch.study "${flags[@]}" --workdir="$workdir"
