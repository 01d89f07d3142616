#!/usr/bin/env bash
# Trains on a Cloud TPU pod: creates it or takes one that is READY, installs this commit on all of its workers, starts
# `python -m var_jax train --distributed=auto` on all of them and follows the log of the first. When the pod is
# preempted or lost, it is created anew and the same command goes on from the checkpoints. Needs gcloud, logged in.
#
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=TYPE [FLAGS] -- --config=FILE.py:STAGE --workdir=DIR [...]
#
#   --name=NAME         the pod's name
#   --zone=ZONE         such as us-west4-a
#   --type=TYPE         such as v5litepod-256, v5p-128, v6e-64 or v4-32
#   --version=VERSION   runtime version, where that of the type is not wanted
#   --project=PROJECT   default: gcloud's
#   --spot              cheaper, and may be preempted at any time
#   --queued            waits for the pod as a queued resource of the same name
#   --mount=BUCKET:DIR  mounts a bucket at DIR on all workers, by gcsfuse, which is installed where it is missing
#   --restarts=N        how often to start again (default 100)
#   --poll=SECONDS      between two looks at the pod (default 30)
#   --dry_run           prints the commands of a run on a new pod, and runs none
#
# What stands after `--` goes to `python -m var_jax train`. The workdir has to be on storage that all workers see at the
# same path, and so has what the config names: a file share, or a bucket by --mount. gs:// addresses are not understood.
# Training does not depend on this script or its connections: when it was stopped, run it again to follow. A second
# training is never started beside one that runs. The pod is kept at the end, for you to delete.
# Exit status: 0 when trained, 2 for bad input here or of the training, 130 after Ctrl-C, 1 for all else.
#
# example:
#   bash launch/tpu_pod.sh --name=var --zone=us-west4-a --type=v5litepod-256 --spot --queued --mount=my-bucket:/mnt/my \
#     -- --config=experiments/imagenet256.py:generator,depth=16 --workdir=/mnt/my/d16 \
#     --config.data.path=/mnt/my/imagenet2012/5.1.0 --config.tokenizer=/mnt/my/tokenizer
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
. launch/tpu_workers.sh

note() { echo "tpu_pod: $*" >&2; }

fail() { # where the input is not to blame
  echo "error: $*" >&2
  exit 1
}

read_flags() {
  name='' zone='' type='' version='' project='' spot='' queued='' mount='' dry_run='' restarts=100 poll=30
  local flag value
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    flag=$1 value=${1#*=}
    shift
    case $flag in
      --help|-h) show_help launch/tpu_pod.sh ;;
      --name=?*) name=$value ;;
      --zone=?*) zone=$(one_word "$flag") ;;
      --type=?*) type=$(one_word "$flag") ;;
      --version=?*) version=$(one_word "$flag") ;;
      --project=?*) project=$(one_word "$flag") ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --mount=*) mount=$value
        [[ ! ${mount%%:*} =~ [A-Z] ]] ||
          error "$flag: a bucket's name has no capitals: write it as \`gcloud storage ls\` shows it, without gs://"
        [[ $mount != *://* ]] || error "$flag: write BUCKET:/DIR, the bucket without its gs://"
        [[ $mount =~ ^[a-z0-9][a-z0-9._-]{2,221}:/[a-zA-Z0-9._/-]+$ ]] || error "$flag is no bucket and path: write" \
          'BUCKET:/DIR, such as my-bucket:/mnt/my, with letters, digits and ._- alone' ;;
      --restarts=*) restarts=$value
        [[ $restarts =~ ^[0-9]{1,5}$ ]] || error "$flag is not a whole number: write one, such as --restarts=100" ;;
      --poll=*) poll=$(positive "$flag") ;;
      --dry_run) dry_run=1 ;;
      *) error "there is no flag $flag, or its value is missing: see \`bash launch/tpu_pod.sh --help\`; the arguments" \
           'of training stand after --' ;;
    esac
  done
  [ -n "$name" ] && [ -n "$zone" ] && [ -n "$type" ] || error '--name, --zone or --type is missing: give all three'
  [[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
    error "--name=$name cannot name a pod: use lower-case letters, digits and -, a letter first, 63 at most"
  [ -n "$version" ] || version=$(runtime_version)
  [ $# -gt 1 ] || error 'the arguments of training are missing: write -- --config=FILE.py:STAGE --workdir=/DIR'
  shift
  check_training "$@"
  # It stands between single quotes in the workers' commands.
  training=$(printf '%q ' "$@")
  training=${training% }
  training=${training//\'/\'\\\'\'}
}

runtime_version() {
  case $type in
    *-0*|*-) error "--type=$type ends in no number of chips or cores: write one such as v5litepod-16" ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) error "the runtime version for --type=$type is not known: add --version=VERSION" ;;
  esac
}

check_training() {
  local workdir config argument
  read_training "$@"
  commit=$(git rev-parse --verify --quiet HEAD) || error "$PWD is no git checkout: clone the repository, run it there"
  [[ $config = /* ]] || git cat-file -e "$commit:$config" 2> /dev/null ||
    error "there is no experiment $config in the last commit, which is what the workers get: check the path, commit it"
  case $workdir in
    /*) ;;
    '') error 'the workdir is missing: write --workdir=/DIR after --, on storage that all workers see' ;;
    *) error "--workdir=$workdir is another folder on every worker: give an absolute path on storage that all see" ;;
  esac
  for argument; do
    case $argument in
      --config.data.path=?*|--config.tokenizer=?*|--config.start_from=?*|--config.loss.lpips_weights=?*|\
      --config.measure.inception=?*)
        [[ ,${argument#*=} != *,[!/]* ]] ||
          error "$argument is another file or folder on every worker: give absolute paths on storage that all see" ;;
    esac
  done
}

# tpus GROUP VERB...: gcloud's command, in the zone and the project.
tpus() { run gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"}; }

pod_state() { state_of tpu-vm describe "$name" --format='value(state)'; }

queue_state() { state_of queued-resources describe "$name" --format='value(state.state)'; }

# MISSING when there is none, and UNREACHABLE when gcloud cannot tell: nothing is deleted because the network was down.
state_of() {
  local answer
  if answer=$(tpus "$@" 2>&1); then
    answer=${answer##*$'\n'}
    echo "${answer:-MISSING}"
  elif [[ $answer = *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$answer" >&2
    echo UNREACHABLE
  fi
}

create() {
  if [ -n "$queued" ]; then
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
      ${spot:+--spot}
  else
    tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
  fi
}

# Its failures do not matter: what is gone need not be deleted, and what stays makes creating fail.
delete() {
  if [ -n "$queued" ]; then
    tpus queued-resources delete "$name" --force --quiet || true
  else
    tpus tpu-vm delete "$name" --quiet || true
  fi
}

# Waits until the pod is READY, creating it where it is missing. Sets `reused` to whether it was READY at once.
get_pod() {
  local state
  reused=1
  while true; do
    state=$(pod_state)
    case $state in
      READY) return ;;
      MISSING) break ;;
      PREEMPTED|TERMINATED|SUSPENDED|UNKNOWN) note "the pod is $state: it is deleted"; delete; break ;;
      STOPPED|HIDDEN) fail "the pod is $state: start it or delete it, then run this again" ;;
      UNREACHABLE) [ "$starts" -gt 0 ] || fail 'gcloud cannot look at the pod, see above: correct that first' ;;
    esac
    note "the pod is $state"
    reused=''
    sleep "$poll"
  done
  reused=''
  if [ -n "$queued" ]; then get_from_queue; else create_until_there; fi
}

create_until_there() {
  until create; do
    # What fails at first is mostly a wrong flag, later mostly a zone without free TPUs.
    [ "$starts" -gt 0 ] || fail 'the pod could not be created, see above: correct the flags, or wait with --queued'
    count_start
  done
}

get_from_queue() {
  local state
  state=$(queue_state)
  while [ "$state" != ACTIVE ]; do
    case $state in
      MISSING) create_until_there ;;
      FAILED|SUSPENDED) note "the queued resource is $state: it is requested anew"; delete; count_start ;;
      *) note "the queued resource is $state"; sleep "$poll" ;;
    esac
    state=$(queue_state)
    if [ -n "$dry_run" ]; then return; fi
  done
}

count_start() {
  starts=$((starts + 1))
  [ "$starts" -le "$restarts" ] || fail "it was started again $restarts times: find out why, then run this again"
  sleep "$poll"
}

# any PATTERN, all PATTERN: whether lines are `var_jax PATTERN ...`.
any() { grep -q "^var_jax $1 " <<< "$lines"; }
all() { ! grep -qv "^var_jax $1 " <<< "$lines"; }

# Brings the training onto the pod.
launch() {
  lines=''
  if [ -n "$reused" ]; then
    look || return
    if any other; then error "another training runs on $name: wait until it ends, or use another --name"; fi
    if any running; then
      note 'this training runs already: its log follows'
      return
    fi
  fi
  if [ -z "$reused" ] || ! all ".* $commit"; then install || return; fi
  if [ -n "$mount" ]; then mount_bucket || return; fi
  start
}

# Follows the training. Returns 0 when it is done, 3 when it has to start again on a new pod.
watch() {
  local state unseen=0
  while true; do
    follow || note 'the connection to the first worker ended'
    state=$(pod_state)
    if [ -n "$dry_run" ]; then
      look
      return
    fi
    case $state in
      READY) ;;
      MISSING|PREEMPTED|TERMINATED|SUSPENDED|STOPPED|DELETING|UNKNOWN) note "the pod is $state"; return 3 ;;
      *) note "the pod is $state"; sleep "$poll"; continue ;;
    esac
    if ! look; then
      unseen=$((unseen + 1))
      [ "$unseen" -lt 10 ] || fail 'the pod is READY, but some workers cannot be reached: see why, then run this again'
      sleep "$poll"
      continue
    fi
    unseen=0
    if any running; then sleep "$poll"; continue; fi
    if all 0; then return 0; fi
    if any 143 || any none; then return 3; fi  # stopped, or its machine was lost
    if all '\(0\|75\|134\)'; then return 3; fi  # another worker was lost; 134: jax aborted for it
    if ! any 2; then fail 'training failed: see var_jax_run/log on the worker that ended first'; fi
    error 'training refused its input, see its line above: correct it and run this again'
  done
}

main() {
  read_flags "$@"
  [ -n "$dry_run" ] || command -v gcloud > /dev/null ||
    error 'there is no gcloud here: install it and log in, or use --dry_run to see what would be run'
  trap 'note "stopped; training goes on: run this again to follow it, or delete $name"; exit 130' INT
  starts=0
  local status
  while true; do
    get_pod
    if launch; then
      status=0
      watch || status=$?
      [ "$status" != 0 ] || break
    elif [ "$(pod_state)" = READY ]; then
      fail 'the workers could not be set up, see above: correct that and run this again'
    fi
    delete
    count_start
    note "it starts again: $starts of at most $restarts times"
  done
  note "done; the pod $name is kept: delete it when you need it no more"
}

main "$@"
