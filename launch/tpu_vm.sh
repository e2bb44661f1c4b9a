#!/usr/bin/env bash
# A command on all workers of a Cloud TPU VM: created, filled, run, collected and deleted.
# usage: bash launch/tpu_vm.sh --name NAME --zone ZONE --type TPU [OPTIONS] COMMAND FLAGS...
#   --name, --zone, --type  of the TPU VM, such as v5litepod-16; one that is there is used
#   --project ID            of it; else that of gcloud
#   --runtime VERSION       its software; else the one that fits the type
#   --nfs SERVER:/SHARE     mounted at runs/ on all workers: needed where there are several, and
#                           for what must outlive the VM
#   --spot                  cheaper, and preempted at any time; wants --nfs
#   --attempts N            starts of the command, at most (100)
#   --keep                  does not delete the VM at the end
#   --dry-run               prints what would be run
#   COMMAND FLAGS           of python -m launch.COMMAND, with a --workdir below runs/:
#                           train --config=configs/finetune.py:queryner --workdir=runs/queryner
# The files that git tracks travel, as they are now. A preempted command (status 75, or the VM is
# gone) is started again, on a new VM if need be. After any other failure the VM stays.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/common.sh"

name="" zone="" type="" project="" runtime="" nfs="" attempts=100 spot="" keep="" dry_run=""
while (($#)); do
  case $1 in
    --name | --zone | --type | --project | --runtime | --nfs | --attempts)
      [[ -n ${2:-} && $2 != -* ]] || fail "missing value: $1; see bash launch/tpu_vm.sh --help"
      declare "${1#--}=$2"
      shift
      ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help)
      usage "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    -*) fail "unknown option: $1; see bash launch/tpu_vm.sh --help" ;;
    *) break ;;
  esac
  shift
done
for option in name zone type; do
  [[ -n ${!option} ]] || fail "missing option: --$option; see bash launch/tpu_vm.sh --help"
done
[[ $attempts =~ ^[1-9][0-9]*$ ]] || fail "no count: --attempts=$attempts; give 1 or more"
[[ -z $nfs || $nfs =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*$ ]] ||
  fail "no share: --nfs=$nfs; give SERVER:/SHARE"
[[ -z $spot || -n $nfs ]] ||
  fail "no place that outlives a preempted VM: --spot; give --nfs SERVER:/SHARE too"
check_command "$root" "${1:-}"
workdir=""
for flag in "$@"; do
  if [[ $flag == --workdir=* ]]; then workdir=${flag#--workdir=}; fi
done
[[ $workdir =~ ^runs/[A-Za-z0-9._/-]+$ && $workdir != *..* ]] ||
  fail "no folder below runs: --workdir=$workdir; give one such as --workdir=runs/queryner"
if [[ -z $runtime ]]; then
  case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "no runtime known for it: --type=$type; give --runtime VERSION too" ;;
  esac
fi

vm=(gcloud compute tpus tpu-vm)
place=(--zone="$zone")
[[ -z $project ]] || place+=(--project="$project")
describe=("${vm[@]}" describe "$name" "${place[@]}" --format="value(state)")
create=("${vm[@]}" create "$name" "${place[@]}" --accelerator-type="$type" --version="$runtime")
[[ -z $spot ]] || create+=(--spot)
pack=ecomjax.tgz
copy=("${vm[@]}" scp "$pack" "$name:$pack" "${place[@]}" --worker=all)
on_all=("${vm[@]}" ssh "$name" "${place[@]}" --worker=all)
collect=("${vm[@]}" scp --recurse "$name:ecomjax/$workdir" "$(dirname "$workdir")" "${place[@]}")
delete=("${vm[@]}" delete "$name" "${place[@]}" --quiet)

# The VMs have Python 3.10.
packages=python3.11-venv mount=""
if [[ -n $nfs ]]; then
  packages+=" nfs-common"
  mount="mkdir -p runs && { mountpoint -q runs || sudo mount -t nfs $nfs runs; } && "
  mount+="sudo chmod a+rwx runs && "
fi
apt="sudo apt-get -qq -o DPkg::Lock::Timeout=300"
prepare="mkdir -p ecomjax && tar -xzf $pack -C ecomjax && cd ecomjax && $apt update && "
prepare+="$apt install -y $packages && ${mount}bash launch/setup.sh runtime tpu models"
run="cd ecomjax && exec $(show .venv/bin/python -m "launch.$1" --hosts=auto "${@:2}")"

if [[ -n $dry_run ]]; then
  show "${describe[@]}"
  echo "# unless it is READY; where it is PREEMPTED or TERMINATED it is deleted first:"
  show "${create[@]}"
  echo "git ls-files -z | tar --null -T - -czf $pack"
  show "${copy[@]}"
  show "${on_all[@]}" --command="$prepare"
  show "${on_all[@]}" --command="$run"
  echo "# from the beginning where its status is 75, or the VM is not READY; then:"
  show mkdir -p "$(dirname "$workdir")"
  show "${collect[@]}"
  [[ -n $keep ]] || show "${delete[@]}"
  exit 0
fi
for program in gcloud git; do
  command -v "$program" >/dev/null || fail "no such program: $program; install it"
done

cd "$root"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git ls-files -z | tar --null -T - -czf "$scratch/$pack"
state() { "${describe[@]}" 2>/dev/null || true; }
for ((attempt = 1; attempt <= attempts; attempt++)); do
  found=$(state)
  if [[ $found != READY ]]; then
    case $found in
      "") ;;
      PREEMPTED | TERMINATED) "${delete[@]}" ;;
      *)
        # What is stopped, or on its way to another state, may hold something of somebody.
        ((attempt > 1)) || fail "the VM is $found: $name; start it, delete it or wait"
        sleep 60
        continue
        ;;
    esac
    if ! "${create[@]}"; then
      # The first time it is a mistake; after a preemption there may be no TPU for a while.
      ((attempt > 1)) || fail "cannot create the VM: $name; see above"
      sleep 60
      continue
    fi
  fi
  status=0
  (cd "$scratch" && "${copy[@]}") && "${on_all[@]}" --command="$prepare" &&
    "${on_all[@]}" --command="$run" || status=$?
  if ((status == 75)) || { ((status != 0)) && [[ $(state) != READY ]]; }; then
    echo "tpu_vm.sh: preempted; starting again" >&2
    continue
  fi
  ((status == 0)) || fail "status $status: $name; see above, the same command goes on with the VM"
  mkdir -p "$(dirname "$workdir")"
  "${collect[@]}"
  [[ -n $keep ]] || "${delete[@]}"
  exit 0
done
echo "tpu_vm.sh: preempted $attempts times; the same command goes on" >&2
exit 75
