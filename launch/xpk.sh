#!/usr/bin/env bash
# A command as a workload on the TPUs of a GKE cluster, by xpk; restarted when it was preempted.
# usage: bash launch/xpk.sh --cluster NAME --zone ZONE --type TPU --name NAME [OPTIONS] \
#          COMMAND FLAGS...
#   --cluster, --zone  of the cluster, which `xpk cluster create` has made
#   --type TPU         such as v5litepod-16
#   --name NAME        of the workload
#   --project ID       of the cluster; else that of gcloud
#   --slices N         of TPUs (1)
#   --restarts N       at most (100)
#   --image IMAGE      with Python 3.11 or newer, to which the files are added (python:3.12)
#   --dry-run          prints what would be run
#   COMMAND FLAGS      of python -m launch.COMMAND, whose --workdir lies in storage that
#                      `xpk storage attach` mounts in every workload of the cluster:
#                      train --config=configs/finetune.py:queryner --workdir=/storage/queryner
# The files that git tracks travel, as they are now.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/common.sh"

cluster="" zone="" type="" name="" project="" slices=1 restarts=100 image=python:3.12 dry_run=""
while (($#)); do
  case $1 in
    --cluster | --zone | --type | --name | --project | --slices | --restarts | --image)
      [[ -n ${2:-} && $2 != -* ]] || fail "missing value: $1; see bash launch/xpk.sh --help"
      declare "${1#--}=$2"
      shift
      ;;
    --dry-run) dry_run=1 ;;
    -h | --help)
      usage "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    -*) fail "unknown option: $1; see bash launch/xpk.sh --help" ;;
    *) break ;;
  esac
  shift
done
for option in cluster zone type name; do
  [[ -n ${!option} ]] || fail "missing option: --$option; see bash launch/xpk.sh --help"
done
for option in slices restarts; do
  [[ ${!option} =~ ^[1-9][0-9]*$ ]] || fail "no count: --$option=${!option}; give 1 or more"
done
check_command "$root" "${1:-}"

# The container hands SIGTERM to its own process: exec.
command=$(show .venv/bin/python -m "launch.$1" --hosts=auto "${@:2}")
files=ecomjax-files
create=(xpk workload create --cluster="$cluster" --zone="$zone")
[[ -z $project ]] || create+=(--project="$project")
create+=(
  --workload="$name" --tpu-type="$type" --num-slices="$slices"
  --base-docker-image="$image" --script-dir="$files"
  --max-restarts="$restarts" --restart-on-exit-codes=75 --termination-grace-period-seconds=120
  --command="bash launch/setup.sh runtime tpu models && exec $command"
)

if [[ -n $dry_run ]]; then
  echo "mkdir $files && git ls-files -z | tar --null -T - -cf - | tar -xf - -C $files"
  show "${create[@]}"
  exit 0
fi
for program in xpk git; do
  command -v "$program" >/dev/null || fail "no such program: $program; install it"
done

cd "$root"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/$files"
git ls-files -z | tar --null -T - -cf - | tar -xf - -C "$scratch/$files"
cd "$scratch"
"${create[@]}"
