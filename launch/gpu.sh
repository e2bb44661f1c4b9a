#!/usr/bin/env bash
# On a machine with NVIDIA GPUs: set-up, then a command, started again when it was preempted.
# usage: bash launch/gpu.sh [--dry-run] COMMAND FLAGS...
#   COMMAND FLAGS  of python -m launch.COMMAND, run in the repository:
#                  train --config=configs/finetune.py:queryner --workdir=runs/queryner
#   --dry-run      prints what would be run
# A command that SIGTERM has stopped ends with status 75 once it has saved. It is started again,
# unless this script was told to stop too: then whoever runs the script has to.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/common.sh"

dry_run=""
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    -h | --help)
      usage "${BASH_SOURCE[0]}"
      exit 0
      ;;
    -*) fail "unknown option: $1; see bash launch/gpu.sh --help" ;;
    *) break ;;
  esac
  shift
done
check_command "$root" "${1:-}"
setup=(bash launch/setup.sh runtime gpu models)
command=(.venv/bin/python -m "launch.$1" "${@:2}")

if [[ -n $dry_run ]]; then
  show "${setup[@]}"
  show "${command[@]}"
  echo "# the last again, for as long as its status is 75"
  exit 0
fi
command -v nvidia-smi >/dev/null ||
  fail "no NVIDIA driver: nvidia-smi; install the driver, or run the command itself on CPUs"

cd "$root"
"${setup[@]}"
stopped="" child=""
stop() {
  stopped=1
  [[ -z $child ]] || kill "-$1" "$child" 2>/dev/null || true
}
trap 'stop TERM' TERM
trap 'stop INT' INT
trap 'stop HUP' HUP
set -m # Without it, a command in the background would be deaf to SIGINT.
while true; do
  "${command[@]}" &
  child=$! status=0 last=0
  # A trapped signal ends wait before the command has ended.
  while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  wait "$child" 2>/dev/null || last=$?
  ((last == 127)) || status=$last
  if ((status != 75)) || [[ -n $stopped ]]; then exit "$status"; fi
  echo "gpu.sh: preempted; starting again" >&2
done
